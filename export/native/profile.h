// Colour profiles: from what a picture embeds to sRGB.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace lavin {

// Converts `count` RGBA pixels to sRGB in place and leaves their alpha, as Python does: nothing where the profile is
// sRGB up to two levels, damaged, or of another kind of colours than the file (`grey`, else RGB).
void convert_to_srgb(std::string_view profile, bool grey, uint8_t* pixels, size_t count);

}  // namespace lavin
