#include "pictures.h"

#include <ATen/ops/_upsample_bicubic2d_aa.h>
#include <png.h>

#include <cctype>

#include "error.h"
#include "orientation.h"
#include "png_reader.h"
#include "profile.h"

namespace lavin {

namespace {

// `value` under `alpha` over white, in the integers in which Pillow composites.
uint8_t over_white(uint32_t value, uint32_t alpha) {
  const uint32_t sum = (value * alpha + 255 * (255 - alpha)) * 128 + (0x80 << 7);
  return static_cast<uint8_t>((((sum >> 8) + sum) >> 8) >> 7);
}

}  // namespace

std::string suffix(const fs::path& path) {
  std::string text = path.extension().string();
  for (char& c : text) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  return text;
}

at::Tensor load_picture(const fs::path& path, int64_t max_pixels) {
  auto file = MappedFile::open(path, "a picture, .png");
  const std::string name = one_line(path.string());
  if (!is_png(file->text())) {
    throw InputError(name + ": not a picture that can be read; expected PNG, convert it or use lavin-rt run");
  }
  try {
    return decode_png(file->text(), max_pixels);
  } catch (const InputError& error) {
    throw InputError(name + ": cannot be read as a picture (" + error.what() + "); give a sound file");
  }
}

at::Tensor decode_png(std::string_view data, int64_t max_pixels) {
  Png png = read_png(data, max_pixels);
  uint8_t* from = png.pixels.data_ptr<uint8_t>();
  const int64_t height = png.pixels.size(0), width = png.pixels.size(1), count = height * width;
  if (!png.profile.empty()) convert_to_srgb(png.profile, png.grey, from, count);
  at::Tensor picture = at::empty({3, height, width}, at::kByte);
  uint8_t* to = picture.data_ptr<uint8_t>();
  for (int64_t i = 0; i < count; ++i) {
    for (int c = 0; c < 3; ++c) to[c * count + i] = over_white(from[4 * i + c], from[4 * i + 3]);
  }
  return upright(picture, png.orientation);
}

void check_output(const fs::path& path) {
  const std::string found = suffix(path);
  if (found != ".png") {
    throw InputError(one_line(path.string()) + ": cannot write " + (found.empty() ? "that" : found) +
                     "; expected a name ending in .png");
  }
  check_writable(path);
}

void save_picture(const at::Tensor& picture, const fs::path& path) {
  const at::Tensor pixels = picture.permute({1, 2, 0}).contiguous();
  png_image image{};
  image.version = PNG_IMAGE_VERSION;
  image.width = static_cast<png_uint_32>(pixels.size(1));
  image.height = static_cast<png_uint_32>(pixels.size(0));
  image.format = PNG_FORMAT_RGB;
  written_whole(path, [&](const fs::path& partial) {
    if (!png_image_write_to_file(&image, partial.c_str(), 0, pixels.const_data_ptr(), 0, nullptr)) {
      throw InputError(one_line(path.string()) + ": cannot be written (" + one_line(image.message) + ")");
    }
  });
}

at::Tensor resize(const at::Tensor& picture, int64_t height, int64_t width) {
  if (picture.size(1) == height && picture.size(2) == width) return picture;
  return at::_upsample_bicubic2d_aa(picture.unsqueeze(0).contiguous(), {height, width}, /*align_corners=*/false)[0];
}

at::Tensor to_pixels(const at::Tensor& picture) {
  return picture.to(at::kFloat).div_(127.5).sub_(1).unsqueeze(0).unsqueeze(2);
}

at::Tensor from_pixels(const at::Tensor& pixels) {
  const at::Tensor frame = pixels.to(at::kCPU, at::kFloat).squeeze(0).squeeze(1);
  return (frame / 2 + 0.5).clamp_(0, 1).mul_(255).to(at::kByte);
}

}  // namespace lavin
