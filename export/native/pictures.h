// Pictures: read as uint8 RGB, resized as the model expects, written whole or not at all.
#pragma once

#include <ATen/ATen.h>

#include "files.h"

namespace lavin {

// A file name's suffix in lower case, with its dot.
std::string suffix(const fs::path& path);

constexpr int64_t kMaxPixels = 178'956'970;  // where Pillow sees a decompression bomb

// A PNG as uint8 [3, H, W], as Python reads it: transparency composited on white, 16 bits made 8, colours converted to
// sRGB from an embedded profile, orientation by EXIF or XMP applied.
// Throws InputError: no such file, not such a picture, truncated, or of more than `max_pixels`.
at::Tensor load_picture(const fs::path& path, int64_t max_pixels = kMaxPixels);

// The same of a file's bytes; errors do not name it.
at::Tensor decode_png(std::string_view data, int64_t max_pixels = kMaxPixels);

// Writes uint8 [3, H, W] as .png, whole or not at all.
void save_picture(const at::Tensor& picture, const fs::path& path);

// Throws InputError for a name or a place that save_picture cannot write to; makes nothing.
void check_output(const fs::path& path);

// Bicubic antialiased resampling of uint8 [3, H, W] on uint8 values; aspect ratio is ignored.
at::Tensor resize(const at::Tensor& picture, int64_t height, int64_t width);

// uint8 [3, H, W] to the VAE's float32 [1, 3, 1, H, W] in [-1, 1], and back from the VAE's pixels.
at::Tensor to_pixels(const at::Tensor& picture);
at::Tensor from_pixels(const at::Tensor& pixels);

}  // namespace lavin
