#include "pictures.h"

#include <ATen/ops/_upsample_bicubic2d_aa.h>

#include <cctype>
#include <fstream>

#include "error.h"

#ifdef LAVIN_PNG
#include "png_file.h"
#endif

namespace lavin {

namespace {

constexpr int64_t kMaxPixels = 178'956'970;  // where Pillow sees a decompression bomb

InputError unreadable(const fs::path& path, const std::string& reason) {
  return InputError(one_line(path.string()) + ": cannot be read as a picture (" + reason + "); give a sound file");
}

// The next number of a PPM header; whitespace and comments before it are passed over.
int64_t header_number(const char*& at, const char* end) {
  while (at != end && (std::isspace(static_cast<unsigned char>(*at)) || *at == '#')) {
    if (*at == '#') {
      while (at != end && *at != '\n') ++at;
    } else {
      ++at;
    }
  }
  int64_t value = 0;
  const char* first = at;
  for (; at != end && std::isdigit(static_cast<unsigned char>(*at)) && at - first < 9; ++at) {
    value = 10 * value + (*at - '0');
  }
  return at == first ? -1 : value;
}

at::Tensor read_ppm(const MappedFile& file, const fs::path& path) {
  const char *at = file.data() + 2, *end = file.data() + file.size();
  const int64_t channels = file.data()[1] == '6' ? 3 : 1;
  const int64_t width = header_number(at, end), height = header_number(at, end), most = header_number(at, end);
  if (width < 1 || height < 1 || most < 1 || at == end) throw unreadable(path, "its header is broken");
  if (most != 255) throw unreadable(path, "its values go to " + std::to_string(most) + ", not to 255");
  if (height > kMaxPixels / width) throw unreadable(path, "it has too many pixels");
  ++at;  // the one space behind the header
  if (end - at < height * width * channels) throw unreadable(path, "it is truncated");
  void* data = const_cast<char*>(at);
  const at::Tensor pixels = at::from_blob(data, {height, width, channels}, at::kByte);
  // A copy in any case: the file is not mapped for longer than this.
  return pixels.permute({2, 0, 1}).expand({3, height, width}).clone(at::MemoryFormat::Contiguous);
}

void write_ppm(const at::Tensor& picture, const fs::path& path) {
  const at::Tensor pixels = picture.permute({1, 2, 0}).contiguous();
  std::ofstream out(path, std::ios::binary);
  out << "P6\n" << pixels.size(1) << " " << pixels.size(0) << "\n255\n";
  out.write(static_cast<const char*>(pixels.const_data_ptr()), pixels.numel());
  out.flush();
  if (!out) throw InputError(one_line(path.string()) + ": cannot be written; is the disk full?");
}

}  // namespace

std::string suffix(const fs::path& path) {
  std::string text = path.extension().string();
  for (char& c : text) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  return text;
}

std::string known_suffixes() {
#ifdef LAVIN_PNG
  return ".png or .ppm";
#else
  return ".ppm (this build has no libpng)";
#endif
}

at::Tensor load_picture(const fs::path& path) {
  auto file = MappedFile::open(path, "a picture, " + known_suffixes());
  const std::string_view text = file->text();
  if (text.starts_with("P6") || text.starts_with("P5")) return read_ppm(*file, path);
#ifdef LAVIN_PNG
  if (text.starts_with("\x89PNG\r\n\x1a\n")) return read_png(text, path, kMaxPixels);
#endif
  throw InputError(one_line(path.string()) + ": not a picture that can be read; expected " + known_suffixes());
}

void check_output(const fs::path& path) {
  const std::string found = suffix(path);
  bool known = found == ".ppm";
#ifdef LAVIN_PNG
  known |= found == ".png";
#endif
  if (!known) {
    throw InputError(one_line(path.string()) + ": cannot write " + (found.empty() ? "that" : found) +
                     "; expected a name ending in " + known_suffixes());
  }
  check_writable(path);
}

void save_picture(const at::Tensor& picture, const fs::path& path) {
  written_whole(path, [&](const fs::path& partial) {
#ifdef LAVIN_PNG
    if (suffix(path) == ".png") return write_png(picture, partial);
#endif
    write_ppm(picture, partial);
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
