#include "png_reader.h"

#include <png.h>

#include <algorithm>
#include <cctype>
#include <csetjmp>
#include <cstring>
#include <optional>
#include <vector>

#include "error.h"
#include "orientation.h"

namespace lavin {

namespace {

constexpr std::string_view kSignature = "\x89PNG\r\n\x1a\n";
// Names of chunks, each with its zero. What says something about colours but the profile is passed over.
constexpr png_byte kPassedOver[] = "bKGD\0cHRM\0gAMA\0hIST\0oFFs\0pCAL\0pHYs\0sBIT\0sCAL\0sPLT\0sRGB\0tIME";
constexpr png_alloc_size_t kMaxChunk = 8'000'000;  // bytes of a profile or a text, decompressed
constexpr png_byte kExif[] = "eXIf";

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

// Throws where a chunk ends behind the file: libpng makes room for whatever length one claims.
void check_chunks(std::string_view data) {
  for (size_t at = kSignature.size(); at + 8 <= data.size();) {
    if (data.substr(at + 4, 4) == "IEND") return;
    const auto* length = reinterpret_cast<const png_byte*>(data.data() + at);
    at += 8;
    if (png_get_uint_32(length) > data.size() - at) throw InputError("it is truncated");
    at += png_get_uint_32(length) + size_t{4};
  }
}

// Reads up to the pixels and asks for 8-bit RGBA; false where libpng failed.
bool read_header(png_structp png, png_infop info, int64_t max_pixels, bool& grey) {
  if (setjmp(png_jmpbuf(png))) return false;
  // Pillow reads pixels of any gamma as they are, and knows no limit of a side.
  png_set_keep_unknown_chunks(png, PNG_HANDLE_CHUNK_NEVER, kPassedOver, sizeof kPassedOver / 5);
  // libpng's own reader of EXIF takes none that begins with its JPEG marker.
  png_set_keep_unknown_chunks(png, PNG_HANDLE_CHUNK_ALWAYS, kExif, 1);
  png_set_crc_action(png, PNG_CRC_DEFAULT, PNG_CRC_ERROR_QUIT);
  png_set_user_limits(png, PNG_UINT_31_MAX, PNG_UINT_31_MAX);
  png_set_chunk_malloc_max(png, kMaxChunk);
  png_read_info(png, info);
  // Before libpng makes room for a row.
  const int64_t height = png_get_image_height(png, info), width = png_get_image_width(png, info);
  if (height > max_pixels / width) png_error(png, "it has too many pixels, see --allow-huge");
  const int type = png_get_color_type(png, info), depth = png_get_bit_depth(png, info);
  grey = !(type & PNG_COLOR_MASK_COLOR);
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
  return true;
}

// What stands behind the pixels, as far as it can be read: a picture is not refused for it.
void read_rest(png_structp png, png_infop info) {
  if (setjmp(png_jmpbuf(png))) return;
  png_read_end(png, info);
}

// The bytes that ImageMagick writes as text: "\nexif\n    1234\n", then hexadecimal digits in lines.
std::string raw_profile(std::string_view text) {
  for (int line = 0; line < 3; ++line) text = text.substr(std::min(text.size(), text.find('\n') + 1));
  std::string bytes;
  int digits = 0, value = 0;
  for (const char c : text) {
    if (std::isspace(static_cast<unsigned char>(c))) continue;
    if (!std::isxdigit(static_cast<unsigned char>(c))) return "";
    value = value << 4 | (c <= '9' ? c - '0' : (c | 32) - 'a' + 10);
    if (++digits % 2 == 0) bytes += static_cast<char>(value & 0xFF);
  }
  return digits % 2 ? "" : bytes;
}

int orientation_of(png_structp png, png_infop info) {
  png_unknown_chunkp chunks = nullptr;
  std::optional<int> by_exif, by_xmp;
  bool has_exif = false;
  for (int i = 0, count = png_get_unknown_chunks(png, info, &chunks); i < count; ++i) {
    by_exif = exif_orientation({reinterpret_cast<const char*>(chunks[i].data), chunks[i].size});
    has_exif = true;
  }
  png_textp texts = nullptr;
  int count = 0;
  png_get_text(png, info, &texts, &count);
  for (int i = 0; i < count; ++i) {
    const size_t size = std::max(texts[i].text_length, texts[i].itxt_length);
    const std::string_view key = texts[i].key, text(texts[i].text ? texts[i].text : "", texts[i].text ? size : 0);
    if (key == "Raw profile type exif" && !has_exif) by_exif = exif_orientation(raw_profile(text));
    if (key == "XML:com.adobe.xmp") by_xmp = xmp_orientation(text);
  }
  return by_exif.value_or(by_xmp.value_or(1));
}

}  // namespace

bool is_png(std::string_view data) { return data.starts_with(kSignature); }

Png read_png(std::string_view data, int64_t max_pixels) {
  check_chunks(data);
  Source source{data.data(), data.size(), ""};
  png_structp png = png_create_read_struct(PNG_LIBPNG_VER_STRING, &source, on_error, on_warning);
  png_infop info = png ? png_create_info_struct(png) : nullptr;
  if (!info) {
    png_destroy_read_struct(&png, nullptr, nullptr);
    throw std::bad_alloc();
  }
  png_set_read_fn(png, &source, on_read);
  Png result;
  bool sound = read_header(png, info, max_pixels, result.grey);
  const int64_t height = png_get_image_height(png, info), width = png_get_image_width(png, info);
  if (sound) {
    result.pixels = at::empty({height, width, 4}, at::kByte);
    std::vector<png_bytep> rows(height);
    for (int64_t row = 0; row < height; ++row) rows[row] = result.pixels.data_ptr<uint8_t>() + row * width * 4;
    sound = read_rows(png, rows.data());
  }
  if (sound) {
    read_rest(png, info);
    png_charp name = nullptr;
    png_bytep profile = nullptr;
    png_uint_32 size = 0;
    int compression = 0;
    if (png_get_iCCP(png, info, &name, &compression, &profile, &size)) {
      result.profile.assign(reinterpret_cast<const char*>(profile), size);
    }
    result.orientation = orientation_of(png, info);
  }
  png_destroy_read_struct(&png, &info, nullptr);
  if (!sound) throw InputError(one_line(source.message));
  return result;
}

}  // namespace lavin
