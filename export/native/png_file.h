// PNG through libpng; compiled only where CMake finds it.
#pragma once

#include <ATen/ATen.h>

#include <string_view>

#include "files.h"

namespace lavin {

// The picture in a PNG file's bytes, uint8 [3, H, W]; `path` is for messages. Throws InputError.
at::Tensor read_png(std::string_view bytes, const fs::path& path, int64_t max_pixels);

// Writes uint8 [3, H, W]. Throws InputError.
void write_png(const at::Tensor& picture, const fs::path& path);

}  // namespace lavin
