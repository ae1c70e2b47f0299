// Which way up a picture is, as EXIF or XMP say.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <string_view>

namespace lavin {

// The orientation in EXIF data, a TIFF structure that "Exif\0\0" may stand before: 1 to 8, 0 where the tag is no such
// number, none where there is no tag. Damaged data have as many tags as can be read.
std::optional<int> exif_orientation(std::string_view data);

// The orientation in an XMP packet: the digit after `tiff:Orientation`.
std::optional<int> xmp_orientation(std::string_view packet);

// [3, H, W] turned as a viewer shows a picture of that orientation; itself for 1 and whatever is none.
at::Tensor upright(const at::Tensor& picture, int orientation);

}  // namespace lavin
