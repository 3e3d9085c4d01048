// Looking into captured graphs: streams, tasks, their parameters, the debug print.
#include <cstring>

#include "runtime/acl/capture.h"
#include "runtime/acl/graph.h"
#include "runtime/acl/handles.h"
#include "runtime/acl/value.h"

namespace host_runtime {
namespace {

aclError last_error() { return aclrtPeekAtLastError(ACL_RT_THREAD_LEVEL); }

HandleTable<GraphStream>& graph_streams() {
  static auto* const table = new HandleTable<GraphStream>;
  return *table;
}

/// A node keeps its graph alive only while a call looks at it.
struct NodeHandle {
  std::weak_ptr<Graph> graph;
  Node* node;
};

struct NodeHandles {
  std::mutex mutex;
  std::map<const void*, NodeHandle> by_address;
};

NodeHandles& node_handles() {
  static auto* const all = new NodeHandles;
  return *all;
}

aclmdlRITask handle_of(const std::shared_ptr<Graph>& graph, Node& node) {
  std::lock_guard lock(node_handles().mutex);
  node_handles().by_address[&node] = {graph, &node};
  return &node;
}

struct FoundNode {
  std::shared_ptr<Graph> graph;
  Node* node = nullptr;
};

FoundNode find_node(aclmdlRITask handle, const char* function) {
  std::lock_guard lock(node_handles().mutex);
  const auto found = node_handles().by_address.find(handle);
  if (found != node_handles().by_address.end()) {
    if (auto graph = found->second.graph.lock()) return {std::move(graph), found->second.node};
    node_handles().by_address.erase(found);
  }
  fail(ACL_ERROR_RT_INVALID_HANDLE,
       std::string(function) + ": this task does not exist; its graph was destroyed");
  return {};
}

/// Copies `values` out by CANN's convention: a null array asks for the number.
template <typename Value>
aclError copy_out(const char* function, const std::vector<Value>& values, Value* out, uint32_t* number) {
  if (number == nullptr) return fail_null(function, "the number");
  const auto available = static_cast<uint32_t>(values.size());
  if (out != nullptr && *number < available) {
    return fail(ACL_ERROR_RT_INSUFFICIENT_INPUT_ARRAY, std::string(function) + ": the array has room for " +
                                                           std::to_string(*number) + " of " +
                                                           std::to_string(available));
  }
  if (out != nullptr) std::copy(values.begin(), values.end(), out);
  *number = available;
  return ACL_SUCCESS;
}

/// CANN's name of a node in its debug print; events and values carry what pairs them.
std::string trace_name(const Node& node, const Task& task) {
  if (const auto* captured = dynamic_cast<const CapturedEventTask*>(&task)) {
    const bool record = captured->action == EventTask::Action::kRecord;
    return (record ? "EVENT_RECORD_" : "EVENT_WAIT_") +
           std::to_string(record ? static_cast<int64_t>(node.index) : node.awaits);
  }
  if (const auto* external = dynamic_cast<const EventTask*>(&task)) {
    const auto id = std::to_string(reinterpret_cast<uintptr_t>(external->event.get()));
    switch (external->action) {
      case EventTask::Action::kRecord:
        return "EXTERNAL_EVENT_RECORD_" + id;
      case EventTask::Action::kWait:
        return "EXTERNAL_EVENT_WAIT_" + id;
      case EventTask::Action::kReset:
        return "EVENT_RESET_" + id;
    }
  }
  if (const auto* value = dynamic_cast<const ValueTask*>(&task)) {
    return (value->is_wait ? "MEM_WAIT_VALUE_" : "MEM_WRITE_VALUE_") +
           std::to_string(reinterpret_cast<uintptr_t>(value->address));
  }
  return task.name();
}

std::string trace_type(const Node& node) {
  switch (node.type) {
    case ACL_MODEL_RI_TASK_KERNEL:
      return "KERNEL";
    case ACL_MODEL_RI_TASK_EVENT_RECORD:
      return "EVENT_RECORD";
    case ACL_MODEL_RI_TASK_EVENT_WAIT:
      return "EVENT_WAIT";
    case ACL_MODEL_RI_TASK_EVENT_RESET:
      return "EVENT_RESET";
    case ACL_MODEL_RI_TASK_VALUE_WRITE:
      return "MEM_WRITE_VALUE";
    case ACL_MODEL_RI_TASK_VALUE_WAIT:
      return "MEM_WAIT_VALUE";
    case ACL_MODEL_RI_TASK_DEFAULT:
      break;
  }
  return "DEFAULT";
}

}  // namespace

std::string json_escaped(const std::string& text) {
  std::string result;
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      result += '\\';
      result += c;
    } else if (static_cast<unsigned char>(c) < 0x20) {
      char code[8];
      std::snprintf(code, sizeof code, "\\u%04x", c);
      result += code;
    } else {
      result += c;
    }
  }
  return result;
}

std::string Graph::debug_json(bool verbose) const {
  // Chrome trace events. Times are places in the stream, not measurements: a wait ends where what it waits
  // for ends.
  std::vector<double> end_of_stream(streams.size(), 0.0);
  std::vector<double> end_of_node(nodes.size(), 0.0);
  std::string result = "[\n";
  for (const Node& node : nodes) {
    const TaskPtr task = task_of(node);
    const bool control = node.type != ACL_MODEL_RI_TASK_KERNEL && node.type != ACL_MODEL_RI_TASK_DEFAULT;
    double begin = end_of_stream[node.stream];
    double duration = control ? 0.5 : 2.0;
    if (node.awaits >= 0) {
      const double reached = end_of_node[static_cast<size_t>(node.awaits)];
      if (reached > begin + duration) duration = reached - begin;
    }
    end_of_node[node.index] = begin + duration;
    end_of_stream[node.stream] = begin + duration + 0.2;
    const std::string stream = std::to_string(streams[node.stream]->id);
    result += "{\"name\": \"" + json_escaped(trace_name(node, *task)) + "\", \"pid\": \"" +
              std::to_string(getpid()) + " aclGraph\", \"tid\": \"stream" + stream +
              "\", \"ts\": " + std::to_string(begin) + ", \"dur\": " + std::to_string(duration) +
              ", \"ph\": \"X\", \"args\": {\"Model Id\": " + std::to_string(id) +
              ", \"Stream Id\": " + stream + ", \"Task Id\": " + std::to_string(node.index) +
              ", \"Task Type\": \"" + trace_type(node) + "\"";
    if (verbose) result += ", \"Arguments\": " + task->arguments_json();
    result += node.index + 1 < nodes.size() ? "}},\n" : "}}\n";
  }
  return result + "]\n";
}

}  // namespace host_runtime

using namespace host_runtime;

aclError aclmdlRIGetStreams(aclmdlRI modelRI, aclrtStream* streams, uint32_t* numStreams) {
  return guarded("aclmdlRIGetStreams", [&] {
    const auto graph = find_graph(modelRI, "aclmdlRIGetStreams");
    if (!graph) return last_error();
    std::vector<aclrtStream> handles;
    for (const auto& stream : graph->streams) {
      if (!graph_streams().find(stream.get())) graph_streams().add(stream);
      handles.push_back(stream.get());
    }
    return copy_out("aclmdlRIGetStreams", handles, streams, numStreams);
  });
}

aclError aclmdlRIGetTasksByStream(aclrtStream handle, aclmdlRITask* tasks, uint32_t* numTasks) {
  return guarded("aclmdlRIGetTasksByStream", [&] {
    const char* const function = "aclmdlRIGetTasksByStream";
    const auto stream = graph_streams().find(handle);
    const auto graph = stream ? stream->graph.lock() : nullptr;
    if (!graph) {
      if (stream) graph_streams().remove(handle);
      return fail(ACL_ERROR_RT_STREAM_MODEL,
                  std::string(function) + ": the stream is not one of aclmdlRIGetStreams of a live graph");
    }
    std::vector<aclmdlRITask> handles;
    for (const size_t index : stream->nodes) handles.push_back(handle_of(graph, graph->nodes[index]));
    return copy_out(function, handles, tasks, numTasks);
  });
}

aclError aclmdlRITaskGetType(aclmdlRITask task, aclmdlRITaskType* type) {
  return guarded("aclmdlRITaskGetType", [&] {
    if (type == nullptr) return fail_null("aclmdlRITaskGetType", "type");
    const FoundNode found = find_node(task, "aclmdlRITaskGetType");
    if (found.node == nullptr) return last_error();
    *type = found.node->type;
    return ACL_SUCCESS;
  });
}

aclError aclmdlRITaskGetSeqId(aclmdlRITask task, uint32_t* id) {
  return guarded("aclmdlRITaskGetSeqId", [&] {
    if (id == nullptr) return fail_null("aclmdlRITaskGetSeqId", "id");
    const FoundNode found = find_node(task, "aclmdlRITaskGetSeqId");
    if (found.node == nullptr) return last_error();
    *id = static_cast<uint32_t>(found.node->index);
    return ACL_SUCCESS;
  });
}

aclError aclmdlRITaskGetParams(aclmdlRITask task, aclmdlRITaskParams* params) {
  return guarded("aclmdlRITaskGetParams", [&] {
    if (params == nullptr) return fail_null("aclmdlRITaskGetParams", "params");
    const FoundNode found = find_node(task, "aclmdlRITaskGetParams");
    if (found.node == nullptr) return last_error();
    Node& node = *found.node;
    std::memset(params, 0, sizeof *params);
    params->type = node.type;
    params->taskGrp = node.group.get();
    params->opInfoPtr = node.operator_info.empty() ? nullptr : node.operator_info.data();
    params->opInfoSize = node.operator_info.size();
    const TaskPtr current = found.graph->task_of(node);
    if (const auto* event = dynamic_cast<const EventTask*>(current.get())) {
      const bool record = event->action == EventTask::Action::kRecord;
      params->eventRecordTaskParams = {event->event.get(), event->event->flags,
                                       record ? ACL_EVENT_RECORD_EXTERNAL : ACL_EVENT_WAIT_EXTERNAL};
    } else if (const auto* captured = dynamic_cast<const CapturedEventTask*>(current.get())) {
      params->eventRecordTaskParams = {captured->event.get(), captured->event->flags,
                                       ACL_EVENT_RECORD_DEFAULT};
    } else if (const auto* value = dynamic_cast<const ValueTask*>(current.get())) {
      params->valueWaitTaskParams = {value->address, value->value, value->flag};
    }
    return ACL_SUCCESS;
  });
}

aclError aclmdlRITaskSetParams(aclmdlRITask task, aclmdlRITaskParams* params) {
  return guarded("aclmdlRITaskSetParams", [&] {
    const char* const function = "aclmdlRITaskSetParams";
    if (params == nullptr) return fail_null(function, "params");
    const FoundNode found = find_node(task, function);
    if (found.node == nullptr) return last_error();
    const auto* value = dynamic_cast<const ValueTask*>(found.graph->task_of(*found.node).get());
    if (value == nullptr || params->type != found.node->type) {
      return fail(ACL_ERROR_RT_FEATURE_NOT_SUPPORT,
                  std::string(function) +
                      ": only tasks that write or wait for a value can be given new parameters; "
                      "operators are updated by aclmdlRICaptureTaskUpdateBegin");
    }
    TaskGroup single;
    single.nodes = {found.node->index};
    const auto& wanted = params->valueWaitTaskParams;
    found.graph->replace(single, {std::make_shared<ValueTask>(value->is_wait, wanted.devAddr, wanted.value,
                                                              value->is_wait ? wanted.flag : 0)});
    return ACL_SUCCESS;
  });
}

aclError aclmdlRITaskDisable(aclmdlRITask task) {
  return guarded("aclmdlRITaskDisable", [&] {
    const FoundNode found = find_node(task, "aclmdlRITaskDisable");
    if (found.node == nullptr) return last_error();
    found.graph->set_enabled(*found.node, false);
    return ACL_SUCCESS;
  });
}

aclError aclmdlRIUpdate(aclmdlRI modelRI) {
  return find_graph(modelRI, "aclmdlRIUpdate") ? ACL_SUCCESS : last_error();  // changes take effect at once
}

aclError aclmdlRIKernelTaskGetAttribute(aclmdlRITask task, aclrtLaunchKernelAttrId,
                                        aclrtLaunchKernelAttrValue*) {
  const FoundNode found = find_node(task, "aclmdlRIKernelTaskGetAttribute");
  if (found.node == nullptr) return last_error();
  return fail(ACL_ERROR_RT_FEATURE_NOT_SUPPORT,
              "aclmdlRIKernelTaskGetAttribute: operators of the host runtime have no launch attributes");
}
