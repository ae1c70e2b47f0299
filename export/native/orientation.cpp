#include "orientation.h"

#include <cstdint>
#include <string>

namespace lavin {

namespace {

constexpr uint64_t kOrientation = 0x0112;

// `size` bytes from `at` on as a number; the caller has seen that they are there.
uint64_t number(std::string_view data, size_t at, size_t size, bool big) {
  uint64_t value = 0;
  for (size_t i = 0; i < size; ++i) {
    value = value << 8 | static_cast<unsigned char>(data[big ? at + i : at + size - 1 - i]);
  }
  return value;
}

}  // namespace

std::optional<int> exif_orientation(std::string_view data) {
  constexpr std::string_view kPrefix("Exif\0\0", 6);
  while (data.starts_with(kPrefix)) data.remove_prefix(kPrefix.size());
  const bool big = data.starts_with(std::string_view("MM\0*", 4));
  if (data.size() < 8 || !(big || data.starts_with(std::string_view("II*\0", 4)))) return std::nullopt;
  const size_t first = number(data, 4, 4, big);
  if (first > data.size() - 2) return std::nullopt;
  std::optional<int> found;
  size_t at = first + 2;
  for (uint64_t left = number(data, first, 2, big); left && at + 12 <= data.size(); --left, at += 12) {
    if (number(data, at, 2, big) != kOrientation) continue;
    const uint64_t type = number(data, at + 2, 2, big), count = number(data, at + 4, 4, big);
    const size_t size = type == 3 || type == 8 ? 2 : type == 4 || type == 9 ? 4 : 0;  // SHORT, LONG and signed
    const uint64_t value = size && count == 1 ? number(data, at + 8, size, big) : 0;
    found = value <= 8 ? static_cast<int>(value) : 0;
  }
  return found;
}

std::optional<int> xmp_orientation(std::string_view packet) {
  constexpr std::string_view kName = "tiff:Orientation";
  for (size_t at = packet.find(kName); at != packet.npos; at = packet.find(kName, at)) {
    at += kName.size();
    std::string_view rest = packet.substr(at);
    const size_t skip = rest.starts_with("=\"") ? 2 : rest.starts_with('>') ? 1 : rest.size();
    rest = rest.substr(skip);
    if (!rest.empty() && rest[0] >= '0' && rest[0] <= '9') return rest[0] - '0';
  }
  return std::nullopt;
}

at::Tensor upright(const at::Tensor& picture, int orientation) {
  if (orientation < 2 || orientation > 8) return picture;
  const bool rows = orientation == 3 || orientation == 4 || orientation == 7 || orientation == 8;
  const bool columns = orientation == 2 || orientation == 3 || orientation == 6 || orientation == 7;
  at::Tensor turned = orientation >= 5 ? picture.transpose(1, 2) : picture;
  if (rows) turned = turned.flip(1);
  if (columns) turned = turned.flip(2);
  return turned.contiguous();
}

}  // namespace lavin
