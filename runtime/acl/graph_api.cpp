// The C interface of task groups and of captured graphs.
#include <cstring>
#include <fstream>

#include "runtime/acl/capture.h"
#include "runtime/acl/counters.h"
#include "runtime/acl/graph.h"
#include "runtime/acl/handles.h"

namespace host_runtime {
namespace {

// How long aclmdlRIDestroy waits for replays that were launched before.
constexpr auto kDestroyPatience = std::chrono::seconds(5);

aclError last_error() { return aclrtPeekAtLastError(ACL_RT_THREAD_LEVEL); }

HandleTable<TaskGroup>& task_groups() {
  static auto* const table = new HandleTable<TaskGroup>;
  return *table;
}

/// A graph that can be run; null with the error set for one that is still being captured.
std::shared_ptr<Graph> find_finished(aclmdlRI handle, const char* function) {
  auto graph = find_graph(handle, function);
  if (graph && !graph->finished.load()) {
    fail(ACL_ERROR_RT_MODEL_CAPTURED,
         std::string(function) + ": " + graph->description() + " is still being captured");
    return nullptr;
  }
  return graph;
}

aclError execute(const std::shared_ptr<Graph>& graph, Stream& stream, const char* function) {
  if (&stream.device != &graph->device) {
    return fail(ACL_ERROR_RT_STREAM_CONTEXT, std::string(function) + ": " + graph->description() +
                                                 " belongs to device " + std::to_string(graph->device.id) +
                                                 " and the stream to device " +
                                                 std::to_string(stream.device.id));
  }
  if (const aclError error = refuse_capturing(stream, function)) return error;
  graph->abort.store(false);
  count(Counter::kGraphLaunches);
  return stream.enqueue(std::make_shared<GraphLaunch>(graph));
}

}  // namespace
}  // namespace host_runtime

using namespace host_runtime;

aclError aclmdlRICaptureTaskGrpEnd(aclrtStream handle, aclrtTaskGrp* group) {
  return guarded("aclmdlRICaptureTaskGrpEnd", [&] {
    const char* const function = "aclmdlRICaptureTaskGrpEnd";
    if (group == nullptr) return fail_null(function, "handle");
    *group = nullptr;
    const auto stream = find_stream(handle, function);
    if (!stream) return last_error();
    std::lock_guard lock(capture_mutex());
    if (!stream->capture) {
      return fail(ACL_ERROR_RT_STREAM_NOT_CAPTURED,
                  std::string(function) + ": " + stream->description() + " is not being captured");
    }
    Capture::Member* member = stream->capture->member_of(*stream);
    if (!member->open_group) {
      return fail(ACL_ERROR_STREAM_TASK_GROUP_STATUS,
                  std::string(function) + ": no task group was begun on " + stream->description());
    }
    const auto ended = std::move(member->open_group);
    member->open_group.reset();
    if (!stream->capture->invalid.empty()) {
      return fail(ACL_ERROR_RT_STREAM_CAPTURE_INVALIDATED,
                  std::string(function) +
                      ": the capture was invalidated by an earlier error: " + stream->capture->invalid);
    }
    stream->capture->graph->groups.insert(ended);
    *group = task_groups().add(ended);
    return ACL_SUCCESS;
  });
}

aclError aclmdlRICaptureTaskUpdateBegin(aclrtStream handle, aclrtTaskGrp group_handle) {
  return guarded("aclmdlRICaptureTaskUpdateBegin", [&] {
    const char* const function = "aclmdlRICaptureTaskUpdateBegin";
    const auto stream = find_stream(handle, function);
    if (!stream) return last_error();
    if (group_handle == nullptr) return fail_null(function, "handle");
    const auto group = task_groups().find(group_handle);
    if (!group)
      return fail(ACL_ERROR_RT_INVALID_HANDLE,
                  std::string(function) + ": this task group does not exist; its graph was destroyed");
    if (const aclError error = refuse_capturing(*stream, function)) return error;
    std::lock_guard lock(capture_mutex());
    if (stream->update || group->updating) {
      return fail(ACL_ERROR_STREAM_TASK_GROUP_STATUS,
                  std::string(function) + ": the task group, or another one on " + stream->description() +
                      ", is being updated already");
    }
    const auto graph = group->graph.lock();
    if (!graph || !graph->finished.load()) {
      return fail(ACL_ERROR_RT_MODEL_CAPTURED,
                  std::string(function) + ": the graph of the task group is still being captured");
    }
    group->updating = true;
    stream->update = std::make_shared<GroupUpdate>(GroupUpdate{group, {}, ACL_SUCCESS});
    stream->diverted.store(true, std::memory_order_release);
    return ACL_SUCCESS;
  });
}

aclError aclmdlRICaptureTaskUpdateEnd(aclrtStream handle) {
  return guarded("aclmdlRICaptureTaskUpdateEnd", [&] {
    const char* const function = "aclmdlRICaptureTaskUpdateEnd";
    const auto stream = find_stream(handle, function);
    if (!stream) return last_error();
    std::shared_ptr<GroupUpdate> update;
    {
      std::lock_guard lock(capture_mutex());
      update.swap(stream->update);
      if (!update) {
        return fail(ACL_ERROR_STREAM_TASK_GROUP_STATUS,
                    std::string(function) + ": no update was begun on " + stream->description());
      }
      update->group->updating = false;
      stream->diverted.store(stream->capture != nullptr, std::memory_order_release);
    }
    if (update->error != ACL_SUCCESS) {
      return fail(update->error, std::string(function) +
                                     ": a task of the update was refused, so the graph was left as it was");
    }
    if (update->tasks.size() != update->group->nodes.size()) {
      return fail(ACL_ERROR_RT_INTERNAL_ERROR,
                  std::string(function) + ": the update has " + std::to_string(update->tasks.size()) +
                      " tasks and the task group " + std::to_string(update->group->nodes.size()) +
                      "; the graph was left as it was");
    }
    return stream->enqueue(std::make_shared<UpdateTask>(std::move(*update)));
  });
}

aclError aclmdlRIExecuteAsync(aclmdlRI modelRI, aclrtStream handle) {
  return guarded("aclmdlRIExecuteAsync", [&] {
    const auto graph = find_finished(modelRI, "aclmdlRIExecuteAsync");
    if (!graph) return last_error();
    const auto stream = find_stream(handle, "aclmdlRIExecuteAsync");
    if (!stream) return last_error();
    return execute(graph, *stream, "aclmdlRIExecuteAsync");
  });
}

aclError aclmdlRIExecute(aclmdlRI modelRI, int32_t timeout) {
  return guarded("aclmdlRIExecute", [&] {
    const auto graph = find_finished(modelRI, "aclmdlRIExecute");
    if (!graph) return last_error();
    const auto stream = primary_context(graph->device).default_stream();
    if (!stream) return last_error();
    if (const aclError error = execute(graph, *stream, "aclmdlRIExecute")) return error;
    return stream->synchronize(deadline_after_ms(timeout), "aclmdlRIExecute");
  });
}

aclError aclmdlRIAbort(aclmdlRI modelRI) {
  return guarded("aclmdlRIAbort", [&] {
    const auto graph = find_finished(modelRI, "aclmdlRIAbort");
    if (!graph) return last_error();
    graph->abort.store(true);
    return ACL_SUCCESS;
  });
}

aclError aclmdlRIDestroy(aclmdlRI modelRI) {
  return guarded("aclmdlRIDestroy", [&] {
    const auto graph = find_finished(modelRI, "aclmdlRIDestroy");
    if (!graph) return last_error();
    const bool idle = graph->launch_done.wait([&] { return graph->launches_pending.load() == 0; },
                                              Clock::now() + kDestroyPatience);
    if (!idle) {
      return fail(ACL_ERROR_RT_MODEL_RUNNING,
                  "aclmdlRIDestroy: " + graph->description() +
                      " is still running; synchronize its stream before destroying it");
    }
    unregister_graph(modelRI);
    for (const auto& group : graph->groups) task_groups().remove(group.get());
    std::vector<std::pair<aclrtCallback, void*>> callbacks;
    {
      std::lock_guard lock(graph->callbacks_mutex);
      callbacks.swap(graph->destroy_callbacks);
    }
    for (const auto& [function, argument] : callbacks) function(argument);
    return ACL_SUCCESS;
  });
}

aclError aclmdlRIDestroyRegisterCallback(aclmdlRI modelRI, aclrtCallback func, void* userData) {
  return guarded("aclmdlRIDestroyRegisterCallback", [&] {
    const auto graph = find_graph(modelRI, "aclmdlRIDestroyRegisterCallback");
    if (!graph) return last_error();
    if (func == nullptr) return fail_null("aclmdlRIDestroyRegisterCallback", "func");
    std::lock_guard lock(graph->callbacks_mutex);
    graph->destroy_callbacks.emplace_back(func, userData);
    return ACL_SUCCESS;
  });
}

aclError aclmdlRIDestroyUnregisterCallback(aclmdlRI modelRI, aclrtCallback func) {
  return guarded("aclmdlRIDestroyUnregisterCallback", [&] {
    const auto graph = find_graph(modelRI, "aclmdlRIDestroyUnregisterCallback");
    if (!graph) return last_error();
    std::lock_guard lock(graph->callbacks_mutex);
    auto& callbacks = graph->destroy_callbacks;
    for (auto it = callbacks.begin(); it != callbacks.end(); ++it) {
      if (it->first != func) continue;
      callbacks.erase(it);
      return ACL_SUCCESS;
    }
    return fail(ACL_ERROR_INVALID_PARAM,
                "aclmdlRIDestroyUnregisterCallback: this function is not registered");
  });
}

aclError aclmdlRISetName(aclmdlRI modelRI, const char* name) {
  return guarded("aclmdlRISetName", [&] {
    if (name == nullptr) return fail_null("aclmdlRISetName", "name");
    const auto graph = find_graph(modelRI, "aclmdlRISetName");
    if (!graph) return last_error();
    std::lock_guard lock(capture_mutex());
    graph->name = name;
    return ACL_SUCCESS;
  });
}

aclError aclmdlRIGetName(aclmdlRI modelRI, uint32_t maxLen, char* name) {
  return guarded("aclmdlRIGetName", [&] {
    if (name == nullptr) return fail_null("aclmdlRIGetName", "name");
    const auto graph = find_graph(modelRI, "aclmdlRIGetName");
    if (!graph) return last_error();
    std::lock_guard lock(capture_mutex());
    if (maxLen < graph->name.size() + 1)
      return fail(ACL_ERROR_INVALID_PARAM, "aclmdlRIGetName: maxLen is too small");
    std::memcpy(name, graph->name.c_str(), graph->name.size() + 1);
    return ACL_SUCCESS;
  });
}

aclError aclmdlRIGetId(aclmdlRI modelRI, uint32_t* modelRIId) {
  if (modelRIId == nullptr) return fail_null("aclmdlRIGetId", "modelRIId");
  const auto graph = find_graph(modelRI, "aclmdlRIGetId");
  if (!graph) return last_error();
  *modelRIId = graph->id;
  return ACL_SUCCESS;
}

aclError aclmdlRIDebugJsonPrint(aclmdlRI modelRI, const char* path, uint32_t flags) {
  return guarded("aclmdlRIDebugJsonPrint", [&] {
    if (path == nullptr) return fail_null("aclmdlRIDebugJsonPrint", "path");
    const auto graph = find_finished(modelRI, "aclmdlRIDebugJsonPrint");
    if (!graph) return last_error();
    std::ofstream file(path);
    file << graph->debug_json((flags & ACL_MDLRI_DEBUG_JSON_PRINT_VERBOSE) != 0);
    file.close();
    if (!file) {
      return fail(ACL_ERROR_INVALID_PARAM,
                  std::string("aclmdlRIDebugJsonPrint: cannot write ") + path + ": " + std::strerror(errno));
    }
    return ACL_SUCCESS;
  });
}

aclError aclmdlRIDebugPrint(aclmdlRI modelRI) {
  return guarded("aclmdlRIDebugPrint", [&] {
    const auto graph = find_finished(modelRI, "aclmdlRIDebugPrint");
    if (!graph) return last_error();
    for (const Node& node : graph->nodes) {
      std::fprintf(stderr, "%s device %d stream %d task %zu %s\n", graph->description().c_str(),
                   graph->device.id, graph->streams[node.stream]->id, node.index,
                   graph->task_of(node)->name().c_str());
    }
    return ACL_SUCCESS;
  });
}
