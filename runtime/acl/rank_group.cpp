#include "runtime/acl/rank_group.h"

#include <map>
#include <mutex>

namespace host_runtime {
namespace {

struct Groups {
  std::mutex mutex;
  std::map<std::string, RankGroupPtr> by_name;
};

/// Never destroyed: communicators are withdrawn while the process exits.
Groups& groups() {
  static auto* all = new Groups;
  return *all;
}

}  // namespace

void publish_group(const std::string& name, RankGroupPtr group) {
  const std::lock_guard<std::mutex> guard(groups().mutex);
  groups().by_name[name] = std::move(group);
}

void withdraw_group(const std::string& name) {
  const std::lock_guard<std::mutex> guard(groups().mutex);
  groups().by_name.erase(name);
}

RankGroupPtr find_group(const std::string& name) {
  const std::lock_guard<std::mutex> guard(groups().mutex);
  const auto found = groups().by_name.find(name);
  return found == groups().by_name.end() ? nullptr : found->second;
}

}  // namespace host_runtime
