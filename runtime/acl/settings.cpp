#include "runtime/acl/settings.h"

#include <algorithm>
#include <cstdlib>
#include <functional>
#include <map>
#include <stdexcept>

namespace host_runtime {
namespace {

using Setter = std::function<void(Settings&, const std::string&)>;

[[noreturn]] void refuse(const std::string& value, const std::string& expected) {
  throw std::invalid_argument("'" + value + "' is not " + expected);
}

uint64_t number(const std::string& value, uint64_t least, uint64_t most) {
  const bool digits =
      !value.empty() && std::all_of(value.begin(), value.end(), [](char c) { return c >= '0' && c <= '9'; });
  if (!digits || value.size() > 18) refuse(value, "a whole number");
  const uint64_t result = std::stoull(value);
  if (result < least || result > most) {
    refuse(value, "between " + std::to_string(least) + " and " + std::to_string(most));
  }
  return result;
}

uint64_t bytes(const std::string& value) {
  static const std::map<std::string, int> units = {{"", 0},     {"B", 0},    {"KiB", 10},
                                                   {"MiB", 20}, {"GiB", 30}, {"TiB", 40}};
  const size_t split = std::min(value.find_first_not_of("0123456789"), value.size());
  const auto unit = units.find(value.substr(split));
  if (unit == units.end()) refuse(value, "a size such as 64GiB (units: B, KiB, MiB, GiB, TiB)");
  return number(value.substr(0, split), 1, uint64_t{1} << 20) << unit->second;
}

CheckMode check_mode(const std::string& value) {
  if (value == "off") return CheckMode::kOff;
  if (value == "on") return CheckMode::kOn;
  if (value != "fatal") refuse(value, "off, on or fatal");
  return CheckMode::kFatal;
}

const std::map<std::string, Setter>& setters() {
  static const std::map<std::string, Setter> table = {
      {"devices",
       [](Settings& s, const std::string& v) { s.devices = static_cast<uint32_t>(number(v, 1, 64)); }},
      {"soc",
       [](Settings& s, const std::string& v) {
         if (v.compare(0, 6, "Ascend") != 0) refuse(v, "the name of a chip such as Ascend910B3");
         s.soc = v;
       }},
      {"hbm", [](Settings& s, const std::string& v) { s.hbm = bytes(v); }},
      {"check", [](Settings& s, const std::string& v) { s.check = check_mode(v); }},
      {"seed", [](Settings& s, const std::string& v) { s.seed = number(v, 0, UINT32_MAX); }},
      {"delay_us",
       [](Settings& s, const std::string& v) { s.delay_us = static_cast<uint32_t>(number(v, 0, 1000000)); }},
      {"streams",
       [](Settings& s, const std::string& v) { s.streams = static_cast<uint32_t>(number(v, 2, 65536)); }},
      {"spin_us",
       [](Settings& s, const std::string& v) { s.spin_us = static_cast<uint32_t>(number(v, 0, 10000)); }},
      {"cann", [](Settings& s, const std::string& v) { s.cann = v; }},
  };
  return table;
}

size_t edit_distance(const std::string& a, const std::string& b) {
  std::vector<size_t> row(b.size() + 1);
  for (size_t j = 0; j <= b.size(); ++j) row[j] = j;
  for (size_t i = 1; i <= a.size(); ++i) {
    size_t diagonal = row[0];
    row[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      const size_t above = row[j];
      row[j] = std::min({above + 1, row[j - 1] + 1, diagonal + (a[i - 1] == b[j - 1] ? 0 : 1)});
      diagonal = above;
    }
  }
  return row[b.size()];
}

std::string unknown_key(const std::string& key) {
  std::string nearest;
  std::string all;
  size_t best = SIZE_MAX;
  for (const auto& [name, setter] : setters()) {
    all += (all.empty() ? "" : ", ") + name;
    const size_t distance = edit_distance(key, name);
    if (distance < best) {
      best = distance;
      nearest = name;
    }
  }
  return "unknown key '" + key + "', did you mean '" + nearest + "'? The keys are " + all;
}

}  // namespace

Settings parse_settings(const std::string& text) {
  Settings result;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find(',', begin), text.size());
    const std::string item = text.substr(begin, end - begin);
    begin = end + 1;
    const size_t equals = item.find('=');
    const std::string key = item.substr(0, equals);
    const auto setter = setters().find(key);
    if (equals == std::string::npos) {
      result.error = "'" + item + "' is not of the form key=value";
    } else if (setter == setters().end()) {
      result.error = unknown_key(key);
    } else {
      try {
        setter->second(result, item.substr(equals + 1));
      } catch (const std::invalid_argument& error) {
        result.error = key + ": " + error.what();
      }
    }
    if (!result.error.empty()) {
      result.error = "NPU_COMPILER_HOST=\"" + text + "\": " + result.error;
      return result;
    }
  }
  return result;
}

const Settings& settings() {
  static const Settings* const value = [] {
    const char* text = std::getenv("NPU_COMPILER_HOST");
    return new Settings(parse_settings(text == nullptr ? "" : text));
  }();
  return *value;
}

}  // namespace host_runtime
