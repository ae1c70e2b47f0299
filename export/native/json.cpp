#include "json.h"

#include <set>

#include "error.h"

namespace lavin {

Json parse_json(std::string_view text) {
  // The library passes over the one, and stops at the other as at the end.
  if (text.starts_with("\xEF\xBB\xBF") || text.find('\0') != std::string_view::npos) {
    throw InputError("no JSON: it has a byte order mark or a zero byte");
  }
  constexpr int kMaxDepth = 64;
  std::vector<std::set<std::string>> names;  // of the objects that are open
  const auto check = [&](int depth, Json::parse_event_t event, const Json& value) {
    if (depth > kMaxDepth) throw InputError("no JSON: it nests too deeply");
    if (event == Json::parse_event_t::object_start) names.emplace_back();
    if (event == Json::parse_event_t::object_end) names.pop_back();
    if (event == Json::parse_event_t::key && !names.back().insert(value.get<std::string>()).second) {
      throw InputError("no JSON: a name appears twice");
    }
    return true;
  };
  try {
    return Json::parse(text, check);
  } catch (const Json::exception& error) {
    throw InputError("no JSON: " + reason(error));
  }
}

int64_t whole(const Json& value) {
  const bool fits = !value.is_number_unsigned() || value.get<uint64_t>() <= INT64_MAX;
  if (!value.is_number_integer() || !fits) {
    throw InputError("expected a whole number, not " + one_line(value.dump(), 40));
  }
  return value.get<int64_t>();
}

std::vector<int64_t> wholes(const Json& value) {
  if (!value.is_array()) throw InputError("expected a list of whole numbers, not " + one_line(value.dump(), 40));
  std::vector<int64_t> numbers;
  for (const Json& item : value) numbers.push_back(whole(item));
  return numbers;
}

std::string reason(const std::exception& error) {
  const std::string text = error.what();
  return one_line(text.starts_with("[json.exception.") ? text.substr(text.find("] ") + 2) : text);
}

}  // namespace lavin
