"""The pixels of a Pillow image as 8-bit sRGB on white, whatever its depth, transparency, colour profile and number."""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from lavin_rt.errors import InputError

# A profile that moves no colour by more levels than this is sRGB: most files with one, which stay as they are.
SRGB_TOLERANCE = 2
_SPACES = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}
# Of PNG's greys of few bits, what Pillow multiplies the samples with.
_SCALES = {"L;2": 85, "L;4": 17}
_PHOTOMETRIC, _BITS, _MIN_IS_WHITE = 262, 258, 0


@contextlib.contextmanager
def huge_pictures(allowed: bool) -> Iterator[None]:
    """Reads pictures of any number of pixels in the block, where `allowed`; else Pillow's limit holds as it is."""
    before = Image.MAX_IMAGE_PIXELS
    if allowed:
        Image.MAX_IMAGE_PIXELS = None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def load(image: Image.Image) -> np.ndarray | None:
    """Loads a picture's pixels; returns where a PNG's colour key makes them transparent, bool `[H, W]`, or None.

    Pillow compares the key with the samples after it has made 8 bits of them, which is right for 8 bits alone.
    """
    key = image.info.get("transparency")
    first = not getattr(image, "is_animated", False) or image.tell() == 0
    if image.format != "PNG" or key is None or image.mode not in ("L", "I", "I;16", "RGB") or not first:
        image.load()
        return None
    raw = image.tile[0][3] if image.tile else None
    low = _low_bytes(image) if raw == "RGB;16B" else None
    image.load()
    if image.mode == "I" or image.mode.startswith("I;16"):
        return np.asarray(image) == key
    samples = np.asarray(image)
    if image.mode == "L":
        scale = _SCALES.get(raw, 1)
        return samples == key % (255 // scale + 1) * scale
    if low is not None:
        return ((samples.astype(np.uint16) << 8 | low) == np.array(key)).all(-1)
    # A picture that was loaded before does not tell its depth; of 16 bits it has kept the high byte.
    high = np.array(key) >> 8 if max(key) > 255 and raw is None else np.array(key) & 255
    return (samples == high).all(-1)


def _low_bytes(image: Image.Image) -> np.ndarray:
    """The low bytes of a PNG's 16-bit colours, uint8 `[H, W, 3]`: Pillow unpacks one byte of each at a time."""
    position = image.fp.tell()
    # Not to be closed: the file is the other image's.
    again = Image.open(image.fp)
    again.tile = [(*again.tile[0][:3], "RGB;16L")]
    low = np.array(again)
    image.fp.seek(position)
    return low


def to_rgb(image: Image.Image, keyed: np.ndarray | None, name: str) -> np.ndarray:
    """A loaded picture as uint8 `[H, W, 3]` in sRGB, on white.

    Args:
        image: the picture, of any mode.
        keyed: where a colour key makes it transparent, as `load` says.
        name: what the picture is called in messages.

    Raises:
        InputError: 32-bit values of unknown range.
    """
    # Older Pillow opens 16-bit PNG as mode "I", and every Pillow 16-bit PGM.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        opaque, alpha = _eight_bits(image), None
    elif image.mode in ("I", "F"):
        raise InputError(f"{name}: 32-bit values (mode {image.mode}) of unknown range; convert to 8 or 16 bits first")
    elif keyed is None and image.has_transparency_data:
        if image.mode == "La":
            image = image.convert("LA")
        rgba = image.convert("RGBA")
        alpha = rgba.getchannel("A")
        opaque = image.convert("L") if image.mode in ("1", "L", "LA") else rgba.convert("RGB")
    else:
        opaque, alpha = image, None
        if keyed is not None and "transparency" in opaque.info:
            opaque = opaque.copy()
            del opaque.info["transparency"]
    if keyed is not None:
        alpha = Image.fromarray(np.where(keyed, 0, 255).astype(np.uint8))
    rgb = to_srgb(opaque, image.info.get("icc_profile"))
    if alpha is None:
        return np.asarray(rgb)
    rgb = rgb.copy()
    rgb.putalpha(alpha)
    return np.asarray(Image.alpha_composite(Image.new("RGBA", rgb.size, "white"), rgb).convert("RGB"))


def _eight_bits(image: Image.Image) -> Image.Image:
    """A 16-bit grey picture as mode "L": `round(x / 257)`."""
    levels, tags = np.asarray(image).astype(np.uint32), getattr(image, "tag_v2", {})
    most = 4095 if tags.get(_BITS) == (12,) else 65535
    grey = (levels * 255 + most // 2) // most
    return Image.fromarray((255 - grey if tags.get(_PHOTOMETRIC) == _MIN_IS_WHITE else grey).astype(np.uint8))


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """An opaque picture in sRGB, mode "RGB"; profiles that are damaged or of another kind of colours are ignored."""
    family = "L" if image.mode in ("1", "L") else image.mode if image.mode in ("CMYK", "LAB") else "RGB"
    transform = _transform(profile, family) if profile or family == "LAB" else None
    if transform is None:
        return image.convert("RGB")
    from PIL import ImageCms

    return ImageCms.applyTransform(image.convert(family), transform)


@functools.lru_cache(maxsize=16)
def _transform(profile: bytes | None, family: str) -> Any:
    """From a profile's colours, of Pillow's mode `family`, to sRGB; None where nothing is to be done."""
    from PIL import ImageCms

    try:
        # Lab has no profile of its own where a file has none.
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile) if family != "LAB" else ImageCms.createProfile("LAB"))
        if family != "LAB" and _SPACES.get(source.profile.xcolor_space.strip()) != family:
            return None
        target = ImageCms.createProfile("sRGB")
        transform = ImageCms.buildTransform(source, target, family, "RGB", ImageCms.Intent.PERCEPTUAL)
    # Pillow passes on what LittleCMS has against a profile.
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
    if family not in ("L", "RGB"):
        return transform
    levels = np.arange(0, 256, 15 if family == "RGB" else 1, dtype=np.uint8)
    colours = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(1, -1, 3) if family == "RGB" else levels[None]
    shown = np.asarray(ImageCms.applyTransform(Image.fromarray(colours), transform)).astype(int)
    moved = np.abs(shown - (colours if family == "RGB" else colours[..., None])).max()
    return None if moved <= SRGB_TOLERANCE else transform
