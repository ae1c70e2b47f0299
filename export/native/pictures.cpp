#include "pictures.h"

#include <ATen/ops/_upsample_bicubic2d_aa.h>
#include <png.h>

#include <cctype>
#include <csetjmp>
#include <cstring>
#include <vector>

#include "error.h"

namespace lavin {

namespace {

constexpr int64_t kMaxPixels = 178'956'970;  // where Pillow sees a decompression bomb

// PNG is read by rows: libpng's simple interface changes pictures of 16 bits or with a gamma.
// What libpng's callbacks reach; of plain types, since they leave by longjmp.
struct Source {
  const char* at;
  size_t left;
  char message[200];
};

void on_error(png_structp png, png_const_charp message) {
  auto* source = static_cast<Source*>(png_get_error_ptr(png));
  std::strncpy(source->message, message, sizeof source->message - 1);
  std::longjmp(png_jmpbuf(png), 1);
}

void on_warning(png_structp, png_const_charp) {}

void on_read(png_structp png, png_bytep target, png_size_t count) {
  auto* source = static_cast<Source*>(png_get_io_ptr(png));
  if (count > source->left) png_error(png, "it is truncated");
  std::memcpy(target, source->at, count);
  source->at += count;
  source->left -= count;
}

// Reads up to the pixels and asks for 8-bit RGBA; false where libpng failed.
bool read_header(png_structp png, png_infop info) {
  if (setjmp(png_jmpbuf(png))) return false;
  png_read_info(png, info);
  const int type = png_get_color_type(png, info), depth = png_get_bit_depth(png, info);
  if (depth == 16) {
    // As in Python: greyscale rounded, of colour the high byte, all that Pillow reads of it.
    if (type == PNG_COLOR_TYPE_GRAY) {
      png_set_scale_16(png);
    } else {
      png_set_strip_16(png);
    }
  }
  png_set_expand(png);  // palettes and tRNS to RGBA, few bits to 8
  png_set_gray_to_rgb(png);
  png_set_add_alpha(png, 0xFF, PNG_FILLER_AFTER);
  png_set_interlace_handling(png);
  png_read_update_info(png, info);
  return true;
}

bool read_rows(png_structp png, png_bytepp rows) {
  if (setjmp(png_jmpbuf(png))) return false;
  png_read_image(png, rows);
  png_read_end(png, nullptr);
  return true;
}

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

at::Tensor load_picture(const fs::path& path) {
  auto file = MappedFile::open(path, "a picture, .png");
  if (!file->text().starts_with("\x89PNG\r\n\x1a\n")) {
    throw InputError(one_line(path.string()) + ": not a picture that can be read; expected PNG");
  }
  Source source{file->data(), file->size(), ""};
  png_structp png = png_create_read_struct(PNG_LIBPNG_VER_STRING, &source, on_error, on_warning);
  png_infop info = png ? png_create_info_struct(png) : nullptr;
  if (!info) {
    png_destroy_read_struct(&png, nullptr, nullptr);
    throw std::bad_alloc();
  }
  png_set_read_fn(png, &source, on_read);
  bool sound = read_header(png, info);
  const int64_t height = png_get_image_height(png, info), width = png_get_image_width(png, info);
  if (sound && height > kMaxPixels / width) {
    std::strcpy(source.message, "it has too many pixels");
    sound = false;
  }
  at::Tensor pixels;
  if (sound) {
    pixels = at::empty({height, width, 4}, at::kByte);
    std::vector<png_bytep> rows(height);
    for (int64_t row = 0; row < height; ++row) rows[row] = pixels.data_ptr<uint8_t>() + row * width * 4;
    sound = read_rows(png, rows.data());
  }
  png_destroy_read_struct(&png, &info, nullptr);
  if (!sound) {
    throw InputError(one_line(path.string()) + ": cannot be read as a picture (" + one_line(source.message) +
                     "); give a sound file");
  }
  at::Tensor picture = at::empty({3, height, width}, at::kByte);
  const uint8_t* from = pixels.const_data_ptr<uint8_t>();
  uint8_t* to = picture.data_ptr<uint8_t>();
  for (int64_t i = 0, count = height * width; i < count; ++i) {
    for (int c = 0; c < 3; ++c) to[c * count + i] = over_white(from[4 * i + c], from[4 * i + 3]);
  }
  return picture;
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
