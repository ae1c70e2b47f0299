#include "profile.h"

#include <lcms2.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <memory>
#include <vector>

namespace lavin {

namespace {

constexpr int kSrgbTolerance = 2;  // levels

using Profile = std::unique_ptr<void, decltype(&cmsCloseProfile)>;
using Transform = std::unique_ptr<void, decltype(&cmsDeleteTransform)>;

Transform make_transform(std::string_view data, bool grey) {
  const Profile source(cmsOpenProfileFromMem(data.data(), static_cast<cmsUInt32Number>(data.size())), cmsCloseProfile);
  const Profile target(cmsCreate_sRGBProfile(), cmsCloseProfile);
  if (!source || !target || cmsGetColorSpace(source.get()) != (grey ? cmsSigGrayData : cmsSigRgbData)) {
    return {nullptr, cmsDeleteTransform};
  }
  const cmsUInt32Number from = grey ? TYPE_GRAY_8 : TYPE_RGBA_8, to = grey ? TYPE_RGB_8 : TYPE_RGBA_8;
  return {cmsCreateTransform(source.get(), from, target.get(), to, INTENT_PERCEPTUAL, 0), cmsDeleteTransform};
}

}  // namespace

void convert_to_srgb(std::string_view profile, bool grey, uint8_t* pixels, size_t count) {
  const Transform transform = make_transform(profile, grey);
  if (!transform) return;
  int moved = 0;
  if (grey) {
    std::array<uint8_t, 256> levels;
    std::array<uint8_t, 3 * 256> shown;
    for (int i = 0; i < 256; ++i) levels[i] = static_cast<uint8_t>(i);
    cmsDoTransform(transform.get(), levels.data(), shown.data(), 256);
    for (int i = 0; i < 3 * 256; ++i) moved = std::max(moved, std::abs(shown[i] - i / 3));
    if (moved <= kSrgbTolerance) return;
    for (size_t i = 0; i < count; ++i) std::copy_n(&shown[3 * pixels[4 * i]], 3, pixels + 4 * i);
    return;
  }
  std::vector<uint8_t> colours;
  for (int i = 0; i < 18 * 18 * 18; ++i) {
    for (const int level : {i / 324, i / 18 % 18, i % 18, 17}) colours.push_back(static_cast<uint8_t>(15 * level));
  }
  std::vector<uint8_t> shown(colours.size(), 255);
  cmsDoTransform(transform.get(), colours.data(), shown.data(), static_cast<cmsUInt32Number>(colours.size() / 4));
  for (size_t i = 0; i < colours.size(); ++i) moved = std::max(moved, std::abs(shown[i] - colours[i]));
  if (moved <= kSrgbTolerance) return;
  // LittleCMS counts pixels in 32 bits.
  constexpr size_t kTogether = size_t{1} << 24;
  for (size_t done = 0; done < count; done += kTogether) {
    uint8_t* from = pixels + 4 * done;
    cmsDoTransform(transform.get(), from, from, static_cast<cmsUInt32Number>(std::min(kTogether, count - done)));
  }
}

}  // namespace lavin
