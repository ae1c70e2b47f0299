"""The bytes of picture files that no library writes: PNG of every depth, TIFF, EXIF, XMP, and colour profiles."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image, ImageCms

HEIGHT, WIDTH = 11, 13
GREY, COLOUR, PALETTE, GREY_ALPHA, COLOUR_ALPHA = 0, 2, 3, 4, 6


# PNG, written here: Pillow writes neither few bits with a colour key, nor 16-bit colours, nor interlaced.


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _rows(samples: np.ndarray, bits: int) -> bytes:
    """Samples `[h, w, channels]` as unfiltered rows."""
    flat = samples.reshape(len(samples), -1)
    if bits == 16:
        packed = flat.astype(">u2").view(np.uint8).reshape(len(flat), -1)
    else:
        each = (flat[..., None] >> np.arange(bits - 1, -1, -1)) & 1
        packed = np.packbits(each.reshape(len(flat), -1).astype(np.uint8), axis=1)
    return b"".join(b"\0" + row.tobytes() for row in packed)


_ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))


def png(
    samples: np.ndarray,
    kind: int,
    bits: int = 8,
    interlaced: bool = False,
    before: bytes = b"",
    after: bytes = b"",
) -> bytes:
    """A PNG of samples `[h, w, channels]`; `before` and `after` are chunks around the pixels."""
    header = struct.pack(">IIBBBBB", samples.shape[1], samples.shape[0], bits, kind, 0, 0, interlaced)
    parts = [samples[top::down, left::right] for top, left, down, right in _ADAM7] if interlaced else [samples]
    data = zlib.compress(b"".join(_rows(part, bits) for part in parts if part.size))
    half = len(data) // 2
    pixels = chunk(b"IDAT", data[:half]) + chunk(b"IDAT", data[half:])
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    return start + before + pixels + after + chunk(b"IEND", b"")


def on_white(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """8-bit colours `[h, w, 3]` under alpha `[h, w]`."""
    share = alpha[..., None] / 255
    return np.round(colours * share + 255 * (1 - share)).astype(np.uint8)


def rgb(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey.reshape(HEIGHT, WIDTH, 1), 3, axis=2).astype(np.uint8)


def exif(orientation: int, order: str = "<", kind: int = 3) -> bytes:
    value = struct.pack(f"{order}HH" if kind == 3 else f"{order}I", *([orientation, 0] if kind == 3 else [orientation]))
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8)
    return head + struct.pack(f"{order}HHHI", 1, 0x0112, kind, 1) + value + bytes(4)


def xmp(orientation: int) -> bytes:
    return (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" '
        f'tiff:Orientation="{orientation}"/></x:xmpmeta>'
    ).encode()


def itxt(text: bytes, compressed: bool = False) -> bytes:
    body = zlib.compress(text) if compressed else text
    return chunk(b"iTXt", b"XML:com.adobe.xmp\0" + bytes([compressed, 0]) + b"\0\0" + body)


def upright(picture: np.ndarray, orientation: int) -> np.ndarray:
    """What the EXIF standard says a viewer shows."""
    if orientation >= 5:
        picture = picture.swapaxes(0, 1)
    rows, columns = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    return picture[:: -1 if rows else 1, :: -1 if columns else 1]


# Colour profiles


def _tag(kind: bytes, data: bytes) -> bytes:
    body = kind + bytes(4) + data
    return body + bytes(-len(body) % 4)


def _s15(*values: float) -> bytes:
    return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))


def matrix_profile(columns: list[tuple[float, float, float]] | None, gamma: float) -> bytes:
    """An ICC profile of version 2: RGB of three primaries (XYZ under D50), or grey where there are none."""
    curve = _tag(b"curv", struct.pack(">IH", 1, round(gamma * 256)))
    tags = {b"wtpt": _tag(b"XYZ ", _s15(0.9642, 1, 0.8249)), b"cprt": _tag(b"text", b"none\0")}
    tags[b"desc"] = _tag(b"desc", struct.pack(">I", 5) + b"test\0" + bytes(78))
    if columns is None:
        tags[b"kTRC"] = curve
    else:
        for name, column in zip((b"r", b"g", b"b"), columns, strict=True):
            tags[name + b"XYZ"] = _tag(b"XYZ ", _s15(*column))
            tags[name + b"TRC"] = curve
    table, data, start = b"", b"", 128 + 4 + 12 * len(tags)
    for name, body in tags.items():
        table += name + struct.pack(">II", start + len(data), len(body))
        data += body
    space = b"GRAY" if columns is None else b"RGB "
    head = struct.pack(">I", start + len(data)) + bytes(4) + struct.pack(">I", 0x02100000) + b"mntr" + space + b"XYZ "
    head += bytes(12) + b"acsp" + bytes(28) + _s15(0.9642, 1, 0.8249)
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + data


ADOBE_RGB = [(0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457)]
DISPLAY_P3 = [(0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.06657, 0.78407)]


def profiles() -> dict[str, bytes]:
    return {
        "adobe": matrix_profile(ADOBE_RGB, 2.19921875),
        "p3": matrix_profile(DISPLAY_P3, 2.2),
        "grey": matrix_profile(None, 1.0),
        "srgb": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
    }


def cmyk_profile() -> bytes:
    """A profile of an idealised press: 8-bit tables from CMYK to Lab with two points an axis."""
    lab = []
    for c in (0, 1):
        for m in (0, 1):
            for y in (0, 1):
                for k in (0, 1):
                    lightness = 100 * (1 - k) * (1 - 0.25 * c - 0.3 * m - 0.08 * y)
                    a = 60 * (m - c) * (1 - k)
                    b = 70 * (y - 0.5 * c - 0.3 * m) * (1 - k)
                    lab += [round(lightness * 255 / 100), round(a) + 128, round(b) + 128]
    ramp = bytes(range(256))
    matrix = _s15(1, 0, 0, 0, 1, 0, 0, 0, 1)
    lut = _tag(b"mft1", bytes([4, 3, 2, 0]) + matrix + ramp * 4 + bytes(lab) + ramp * 3)
    tags = {
        b"A2B0": lut,
        b"wtpt": _tag(b"XYZ ", _s15(0.9642, 1, 0.8249)),
        b"cprt": _tag(b"text", b"none\0"),
        b"desc": _tag(b"desc", struct.pack(">I", 5) + b"test\0" + bytes(78)),
    }
    table, data, start = b"", b"", 128 + 4 + 12 * len(tags)
    for name, body in tags.items():
        table += name + struct.pack(">II", start + len(data), len(body))
        data += body
    head = struct.pack(">I", start + len(data)) + bytes(4) + struct.pack(">I", 0x02100000) + b"prtrCMYKLab "
    head += bytes(12) + b"acsp" + bytes(28) + _s15(0.9642, 1, 0.8249)
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + data


def converted(picture: Image.Image, profile: bytes) -> np.ndarray:
    """A picture in sRGB by LittleCMS."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    target = ImageCms.createProfile("sRGB")
    return np.asarray(ImageCms.profileToProfile(picture, source, target, outputMode="RGB"))


def tiff(samples: np.ndarray, bits: int, photometric: int, order: str = "<") -> bytes:
    """An uncompressed grey TIFF."""
    if bits == 16:
        data = samples.astype(f"{order}u2").tobytes()
    elif bits == 12:
        each = ((samples.reshape(HEIGHT, -1)[..., None] >> np.arange(11, -1, -1)) & 1).reshape(HEIGHT, -1)
        data = np.packbits(each.astype(np.uint8), axis=1).tobytes()
    else:
        data = samples.astype(np.uint8).tobytes()
    tags = [
        (256, 3, WIDTH), (257, 3, HEIGHT), (258, 3, bits), (259, 3, 1), (262, 3, photometric),
        (273, 4, 8 + 2 + 12 * 9 + 4), (277, 3, 1), (278, 3, HEIGHT), (279, 4, len(data)),
    ]  # fmt: skip
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(tags))
    for tag, kind, value in tags:
        head += struct.pack(f"{order}HHI", tag, kind, 1)
        head += struct.pack(f"{order}HH", value, 0) if kind == 3 else struct.pack(f"{order}I", value)
    return head + bytes(4) + data
