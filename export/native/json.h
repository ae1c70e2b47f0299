// A strict reader of JSON (RFC 8259), for manifests and safetensors headers.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace lavin {

class Json {
 public:
  enum class Kind { null, boolean, number, string, array, object };

  // Throws InputError where `text` is no JSON, nests deeper than 64 levels or names a key twice.
  static Json parse(std::string_view text);

  bool is_array() const { return kind_ == Kind::array; }
  bool is_string() const { return kind_ == Kind::string; }
  bool is_null() const { return kind_ == Kind::null; }
  bool is_integer() const { return kind_ == Kind::number && integral_; }

  // Each throws InputError where the value is of another kind.
  const std::string& string() const;
  double number() const;
  int64_t integer() const;
  const std::vector<Json>& array() const;
  const std::map<std::string, Json>& object() const;

  // A member of an object; throws InputError where there is none.
  const Json& operator[](const std::string& name) const;
  // The same, or nullptr.
  const Json* find(const std::string& name) const;

 private:
  friend class JsonReader;

  Kind kind_ = Kind::null;
  bool integral_ = false;
  double number_ = 0;
  int64_t integer_ = 0;
  std::string string_;
  std::vector<Json> array_;
  std::map<std::string, Json> object_;
};

}  // namespace lavin
