// What a user is told when something they gave cannot be used.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace lavin {

// One line with what was found, what was expected and what to do; the program prints it and exits with code 2.
struct InputError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A text of one line, for messages.
inline std::string one_line(std::string text, size_t most = 300) {
  for (char& c : text) {
    if (static_cast<unsigned char>(c) < 0x20) c = ' ';
  }
  return text.size() > most ? text.substr(0, most) + "..." : text;
}

// Numbers or texts with commas between them, for messages.
template <typename Items>
std::string joined(const Items& items, const char* between = ", ") {
  std::ostringstream text;
  for (const char* before = ""; const auto& item : items) {
    text << before << item;
    before = between;
  }
  return text.str();
}

}  // namespace lavin
