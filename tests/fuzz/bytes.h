// A fuzzer of one reader: hostile bytes are read, or refused with an InputError of one line; all else is a crash.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <string_view>

#include "error.h"

template <typename Read>
int fuzz(const uint8_t* data, size_t size, const Read& read) {
  try {
    read(std::string_view(reinterpret_cast<const char*>(data), size));
  } catch (const lavin::InputError& error) {
    const std::string_view message = error.what();
    if (message.empty() || message.find('\n') != message.npos) std::abort();
  }
  return 0;
}

// A safetensors file of a header and tensors' bytes, parted by a zero, whose length stands before it; what begins with a
// zero is the file itself. (So a fuzzer changes the header, not its length alone.)
inline std::string safetensors(std::string_view data) {
  if (data.empty() || data[0] == 0) return std::string(data.substr(data.empty() ? 0 : 1));
  data.remove_prefix(1);
  const size_t end = std::min(data.find('\0'), data.size());
  std::string file(8, '\0');
  for (int i = 0; i < 8; ++i) file[i] = static_cast<char>(static_cast<uint64_t>(end) >> (8 * i));
  file.append(data.substr(0, end)).append(data.substr(std::min(end + 1, data.size())));
  return file;
}
