#include "json.h"

#include <charconv>
#include <cstring>

#include "error.h"

namespace lavin {

namespace {
constexpr int kMaxDepth = 64;
}

class JsonReader {
 public:
  explicit JsonReader(std::string_view text) : at_(text.data()), end_(text.data() + text.size()) {}

  Json document() {
    Json value = read(0);
    skip_space();
    if (at_ != end_) fail("something follows its value");
    return value;
  }

 private:
  [[noreturn]] static void fail(const char* reason) { throw InputError(std::string("no JSON: ") + reason); }

  void skip_space() {
    while (at_ != end_ && (*at_ == ' ' || *at_ == '\t' || *at_ == '\n' || *at_ == '\r')) ++at_;
  }

  char next() {
    if (at_ == end_) fail("it ends early");
    return *at_++;
  }

  bool take(char wanted) {
    skip_space();
    if (at_ == end_ || *at_ != wanted) return false;
    ++at_;
    return true;
  }

  void word(const char* rest) {
    for (; *rest; ++rest) {
      if (next() != *rest) fail("an unknown word");
    }
  }

  Json read(int depth) {
    if (depth > kMaxDepth) fail("it nests too deeply");
    skip_space();
    if (at_ == end_) fail("it ends early");
    Json value;
    switch (*at_) {
      case '{':
        ++at_;
        value.kind_ = Json::Kind::object;
        read_members(value, depth);
        return value;
      case '[':
        ++at_;
        value.kind_ = Json::Kind::array;
        if (take(']')) return value;
        do {
          value.array_.push_back(read(depth + 1));
        } while (take(','));
        if (!take(']')) fail("an array does not end");
        return value;
      case '"':
        ++at_;
        value.kind_ = Json::Kind::string;
        value.string_ = read_string();
        return value;
      case 't':
        word("true");
        value.kind_ = Json::Kind::boolean;
        return value;
      case 'f':
        word("false");
        value.kind_ = Json::Kind::boolean;
        return value;
      case 'n':
        word("null");
        return value;
      default:
        return read_number();
    }
  }

  void read_members(Json& value, int depth) {
    if (take('}')) return;
    do {
      if (!take('"')) fail("a name is missing");
      std::string name = read_string();
      if (!take(':')) fail("a colon is missing");
      if (!value.object_.emplace(std::move(name), read(depth + 1)).second) fail("a name appears twice");
    } while (take(','));
    if (!take('}')) fail("an object does not end");
  }

  std::string read_string() {
    std::string text;
    while (true) {
      char c = next();
      if (c == '"') return text;
      if (static_cast<unsigned char>(c) < 0x20) fail("a control character in a string");
      if (c != '\\') {
        text += c;
        continue;
      }
      static constexpr char kNames[] = "\"\\/bfnrt", kValues[] = "\"\\/\b\f\n\r\t";
      c = next();
      if (c == 'u') {
        append_utf8(text, read_code_point());
      } else if (const char* found = std::strchr(kNames, c); found && c) {
        text += kValues[found - kNames];
      } else {
        fail("an unknown escape");
      }
    }
  }

  uint32_t read_code_unit() {
    uint32_t value = 0;
    if (end_ - at_ < 4) fail("it ends early");
    auto [stop, error] = std::from_chars(at_, at_ + 4, value, 16);
    if (error != std::errc() || stop != at_ + 4) fail("a broken escape");
    at_ += 4;
    return value;
  }

  uint32_t read_code_point() {
    uint32_t first = read_code_unit();
    if (first < 0xD800 || first > 0xDFFF) return first;
    if (first > 0xDBFF || next() != '\\' || next() != 'u') fail("half a surrogate pair");
    uint32_t second = read_code_unit();
    if (second < 0xDC00 || second > 0xDFFF) fail("half a surrogate pair");
    return 0x10000 + ((first - 0xD800) << 10) + (second - 0xDC00);
  }

  static void append_utf8(std::string& text, uint32_t point) {
    if (point < 0x80) {
      text += static_cast<char>(point);
      return;
    }
    int more = point < 0x800 ? 1 : point < 0x10000 ? 2 : 3;
    static constexpr uint32_t kMarks[] = {0, 0xC0, 0xE0, 0xF0};
    text += static_cast<char>(kMarks[more] | (point >> (6 * more)));
    while (more-- > 0) text += static_cast<char>(0x80 | ((point >> (6 * more)) & 0x3F));
  }

  Json read_number() {
    const char* start = at_;
    bool integral = true;
    while (at_ != end_ && (std::strchr("+-.eE", *at_) || (*at_ >= '0' && *at_ <= '9'))) {
      if (std::strchr(".eE", *at_)) integral = false;
      ++at_;
    }
    Json value;
    value.kind_ = Json::Kind::number;
    const char* digits = start != at_ && *start == '-' ? start + 1 : start;
    bool zero_first = at_ - digits > 1 && digits[0] == '0' && digits[1] >= '0' && digits[1] <= '9';
    auto [stop, error] = std::from_chars(start, at_, value.number_);
    if (digits == at_ || *digits < '0' || *digits > '9' || zero_first || error != std::errc() || stop != at_) {
      fail("an unknown value");
    }
    if (integral) {
      auto [last, overflow] = std::from_chars(start, at_, value.integer_);
      value.integral_ = overflow == std::errc() && last == at_;
    }
    return value;
  }

  const char* at_;
  const char* end_;
};

Json Json::parse(std::string_view text) { return JsonReader(text).document(); }

namespace {
[[noreturn]] void wrong_kind(const char* expected) { throw InputError(std::string("expected ") + expected); }
}  // namespace

const std::string& Json::string() const {
  if (kind_ != Kind::string) wrong_kind("a string");
  return string_;
}

double Json::number() const {
  if (kind_ != Kind::number) wrong_kind("a number");
  return number_;
}

int64_t Json::integer() const {
  if (!is_integer()) wrong_kind("a whole number");
  return integer_;
}

const std::vector<Json>& Json::array() const {
  if (kind_ != Kind::array) wrong_kind("a list");
  return array_;
}

const std::map<std::string, Json>& Json::object() const {
  if (kind_ != Kind::object) wrong_kind("an object");
  return object_;
}

const Json* Json::find(const std::string& name) const {
  const auto& members = object();
  auto found = members.find(name);
  return found == members.end() ? nullptr : &found->second;
}

const Json& Json::operator[](const std::string& name) const {
  const Json* found = find(name);
  if (!found) throw InputError("it has no " + one_line(name));
  return *found;
}

}  // namespace lavin
