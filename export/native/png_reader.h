// What is in a PNG file.
#pragma once

#include <ATen/ATen.h>

#include <string>
#include <string_view>

namespace lavin {

struct Png {
  at::Tensor pixels;     // uint8 RGBA [H, W, 4], as they stand in the file
  std::string profile;   // ICC, empty where there is none
  bool grey = false;     // of the file's colours, which the profile is of
  int orientation = 1;   // by EXIF, else by XMP
};

bool is_png(std::string_view data);

// Throws InputError: damaged, truncated, or of more than `max_pixels`.
Png read_png(std::string_view data, int64_t max_pixels);

}  // namespace lavin
