"""A table of picture files with the corners of their formats, made by this script, and what each has to be read as.

`python tests/picture_files.py FOLDER` writes them.
"""

from __future__ import annotations

import dataclasses
import io
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

HEIGHT, WIDTH = 11, 13
GREY, COLOUR, PALETTE, GREY_ALPHA, COLOUR_ALPHA = 0, 2, 3, 4, 6
CHANNELS = {GREY: 1, COLOUR: 3, PALETTE: 1, GREY_ALPHA: 2, COLOUR_ALPHA: 4}


@dataclasses.dataclass(frozen=True)
class PictureFile:
    """One file: its name, its bytes, what it shows (uint8 `[H, W, 3]`; None where it has to be refused)."""

    name: str
    content: bytes
    shows: np.ndarray | None


def noise(*shape: int, most: int = 255, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, most + 1, shape)


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


# The table


def files() -> list[PictureFile]:
    """All of them."""
    made = [file for make in _MAKERS for file in make()]
    assert len({file.name for file in made}) == len(made)
    return made


def _depths() -> Iterator[PictureFile]:
    for interlaced in (False, True):
        way = "-interlaced" if interlaced else ""
        for bits in (1, 2, 4, 8, 16):
            most = 2**bits - 1
            grey = noise(HEIGHT, WIDTH, 1, most=most)
            shown = rgb(np.round(grey * 255 / most))
            yield PictureFile(f"grey{bits}{way}.png", png(grey, GREY, bits, interlaced), shown)
        for bits in (1, 2, 4, 8):
            colours, indices = noise(2**bits, 3, seed=1), noise(HEIGHT, WIDTH, 1, most=2**bits - 1)
            table = chunk(b"PLTE", colours.astype(np.uint8).tobytes())
            shown = colours[indices[..., 0]].astype(np.uint8)
            yield PictureFile(f"palette{bits}{way}.png", png(indices, PALETTE, bits, interlaced, table), shown)
        for kind, name in ((COLOUR, "colour"), (GREY_ALPHA, "grey-alpha"), (COLOUR_ALPHA, "colour-alpha")):
            for bits in (8, 16):
                samples = noise(HEIGHT, WIDTH, CHANNELS[kind], most=2**bits - 1)
                high = samples >> (bits - 8)
                alpha = high[..., -1] if kind != COLOUR else np.full((HEIGHT, WIDTH), 255)
                colour = rgb(high[..., 0]) if kind == GREY_ALPHA else high[..., :3]
                yield PictureFile(f"{name}{bits}{way}.png", png(samples, kind, bits, interlaced), on_white(colour, alpha))


def _keys() -> Iterator[PictureFile]:
    """Transparency by colour key at every depth, and in palettes."""
    for bits in (1, 2, 4, 8, 16):
        most = 2**bits - 1
        grey = noise(HEIGHT, WIDTH, 1, most=most, seed=2)
        key = int(grey[3, 4, 0])
        if bits == 16:  # neighbours that share one of the bytes, and 8-bit value, with the key
            grey[0, :3, 0] = key ^ 1, key ^ 0x100, key
        clear = np.where(grey[..., 0] == key, 0, 255)
        trns = chunk(b"tRNS", struct.pack(">H", key))
        for interlaced in (False, True):
            name = f"key-grey{bits}{'-interlaced' * interlaced}.png"
            shown = on_white(rgb(np.round(grey * 255 / most)), clear)
            yield PictureFile(name, png(grey, GREY, bits, interlaced, trns), shown)
    for bits in (8, 16):
        colours = noise(HEIGHT, WIDTH, 3, most=2**bits - 1, seed=3)
        key = colours[3, 4].copy()
        colours[5:7] = key
        colours[0, 0], colours[0, 1] = key ^ 1, key ^ [0, 1, 0]
        clear = np.where((colours == key).all(-1), 0, 255)
        trns = chunk(b"tRNS", struct.pack(">3H", *key.tolist()))
        for interlaced in (False, True):
            name = f"key-colour{bits}{'-interlaced' * interlaced}.png"
            shown = on_white(colours >> (bits - 8), clear)
            yield PictureFile(name, png(colours, COLOUR, bits, interlaced, trns), shown)
    for bits in (1, 2, 4, 8):
        colours, indices = noise(2**bits, 3, seed=4), noise(HEIGHT, WIDTH, 1, most=2**bits - 1, seed=5)
        table = chunk(b"PLTE", colours.astype(np.uint8).tobytes())
        for name, alphas in (("one", [255] * (2**bits - 1) + [0]), ("some", [0, 128]), ("first", [0])):
            alpha = np.full(2**bits, 255)
            alpha[: len(alphas)] = alphas
            content = png(indices, PALETTE, bits, False, table + chunk(b"tRNS", bytes(alphas)))
            shown = on_white(colours[indices[..., 0]], alpha[indices[..., 0]])
            yield PictureFile(f"key-palette{bits}-{name}.png", content, shown)


def _colours() -> Iterator[PictureFile]:
    """What PNG says of its colours: gamma and primaries are passed over, profiles converted."""
    samples, grey = noise(HEIGHT, WIDTH, 3, seed=6), noise(HEIGHT, WIDTH, 1, seed=7)
    plain, plain_grey = samples.astype(np.uint8), grey.astype(np.uint8)
    gamma = chunk(b"gAMA", struct.pack(">I", 100000))
    primaries = chunk(b"cHRM", struct.pack(">8I", 31270, 32900, 64000, 33000, 21000, 71000, 15000, 6000))
    intent = chunk(b"sRGB", b"\0")
    yield PictureFile("gamma1.png", png(samples, COLOUR, before=gamma), plain)
    yield PictureFile("gamma-primaries.png", png(samples, COLOUR, before=gamma + primaries), plain)
    yield PictureFile("gamma-grey16.png", png(grey * 257, GREY, 16, before=gamma), rgb(grey))
    yield PictureFile("srgb.png", png(samples, COLOUR, before=intent), plain)
    known = profiles()

    def iccp(name: str) -> bytes:
        return chunk(b"iCCP", b"profile\0\0" + zlib.compress(known[name]))

    as_rgb, as_grey = Image.fromarray(plain), Image.fromarray(plain_grey[..., 0])
    for name in ("adobe", "p3"):
        wide = converted(as_rgb, known[name])
        yield PictureFile(f"profile-{name}.png", png(samples, COLOUR, before=iccp(name)), wide)
        yield PictureFile(f"profile-{name}16.png", png(samples * 256 + 77, COLOUR, 16, before=iccp(name)), wide)
        with_alpha = np.concatenate([samples, noise(HEIGHT, WIDTH, 1, seed=8)], -1)
        content = png(with_alpha, COLOUR_ALPHA, before=iccp(name))
        yield PictureFile(f"profile-{name}-alpha.png", content, on_white(wide, with_alpha[..., 3]))
        content = png(samples, COLOUR, before=intent + iccp(name))
        yield PictureFile(f"profile-{name}-after-srgb.png", content, wide)
        trns = chunk(b"tRNS", struct.pack(">3H", *samples[2, 2].tolist()))
        clear = np.where((samples == samples[2, 2]).all(-1), 0, 255)
        content = png(samples, COLOUR, before=iccp(name) + trns)
        yield PictureFile(f"profile-{name}-key.png", content, on_white(wide, clear))
    colours, indices = noise(16, 3, seed=9), noise(HEIGHT, WIDTH, 1, most=15, seed=10)
    table = chunk(b"PLTE", colours.astype(np.uint8).tobytes())
    shown = converted(Image.fromarray(colours[indices[..., 0]].astype(np.uint8)), known["adobe"])
    yield PictureFile("profile-palette4.png", png(indices, PALETTE, 4, before=iccp("adobe") + table), shown)
    yield PictureFile("profile-srgb.png", png(samples, COLOUR, before=iccp("srgb")), plain)
    shown = converted(as_grey, known["grey"])
    yield PictureFile("profile-grey.png", png(grey, GREY, before=iccp("grey")), shown)
    yield PictureFile("profile-grey16.png", png(grey * 257, GREY, 16, before=iccp("grey")), shown)
    yield PictureFile("profile-of-colour-on-grey.png", png(grey, GREY, before=iccp("adobe")), rgb(grey))
    yield PictureFile("profile-of-grey-on-colour.png", png(samples, COLOUR, before=iccp("grey")), plain)
    damaged = chunk(b"iCCP", b"profile\0\0" + zlib.compress(known["adobe"][:200]))
    yield PictureFile("profile-damaged.png", png(samples, COLOUR, before=damaged), plain)


def _turned() -> Iterator[PictureFile]:
    samples = noise(HEIGHT, WIDTH, 3, seed=11)
    plain = samples.astype(np.uint8)

    def turned(name: str, orientation: int, before: bytes = b"", after: bytes = b"") -> PictureFile:
        return PictureFile(name, png(samples, COLOUR, before=before, after=after), upright(plain, orientation))

    for orientation in range(1, 9):
        order = "<>"[orientation % 2]
        yield turned(f"exif{orientation}.png", orientation, chunk(b"eXIf", exif(orientation, order)))
    for orientation in (3, 6, 8):
        yield turned(f"xmp{orientation}.png", orientation, itxt(xmp(orientation)))
    as_element = itxt(xmp(1).replace(b'tiff:Orientation="1"/>', b"><tiff:Orientation>6</tiff:Orientation>"))
    yield turned("xmp-element.png", 6, as_element)
    yield turned("xmp-compressed.png", 6, itxt(xmp(6), compressed=True))
    yield turned("exif-behind.png", 6, after=chunk(b"eXIf", exif(6)))
    yield turned("xmp-behind.png", 6, after=itxt(xmp(6)))
    yield turned("exif-before-xmp.png", 3, chunk(b"eXIf", exif(3)) + itxt(xmp(6)))
    yield turned("exif-long.png", 6, chunk(b"eXIf", exif(6, kind=4)))
    yield turned("exif-of-no-orientation.png", 1, chunk(b"eXIf", exif(9)))
    yield turned("exif-with-marker.png", 6, chunk(b"eXIf", b"Exif\0\0" + exif(6)))
    yield turned("exif-damaged.png", 1, chunk(b"eXIf", b"MM\0*\xff\xff\xff\xff"))
    digits = (b"Exif\0\0" + exif(6)).hex()
    text = f"\nexif\n{len(digits) // 2:8}\n" + "\n".join(digits[i : i + 72] for i in range(0, len(digits), 72)) + "\n"
    raw = b"Raw profile type exif\0\0" + zlib.compress(text.encode())
    yield turned("exif-as-text.png", 6, chunk(b"zTXt", raw))
    grey = noise(HEIGHT, WIDTH, 1, most=65535, seed=12)
    key = int(grey[4, 4, 0])
    chunks = chunk(b"tRNS", struct.pack(">H", key)) + chunk(b"eXIf", exif(5))
    shown = on_white(rgb(np.round(grey / 257)), np.where(grey[..., 0] == key, 0, 255))
    yield PictureFile("exif-key-grey16.png", png(grey, GREY, 16, before=chunks), upright(shown, 5))


def _encoded(name: str, image: Image.Image, shows: np.ndarray | None, **options) -> PictureFile:
    buffer = io.BytesIO()
    image.save(buffer, {"jpg": "JPEG", "tif": "TIFF"}.get(name.split(".")[-1], name.split(".")[-1].upper()), **options)
    return PictureFile(name, buffer.getvalue(), shows)


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
        (256, 3, WIDTH), (257, 3, HEIGHT), (258, 3, bits), (259, 3, 1), (262, 3, photometric), (273, 4, 8 + 2 + 12 * 9 + 4),
        (277, 3, 1), (278, 3, HEIGHT), (279, 4, len(data)),
    ]  # fmt: skip
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(tags))
    for tag, kind, value in tags:
        head += struct.pack(f"{order}HHI", tag, kind, 1)
        head += struct.pack(f"{order}HH", value, 0) if kind == 3 else struct.pack(f"{order}I", value)
    return head + bytes(4) + data


def _others() -> Iterator[PictureFile]:
    """Formats that Python reads and the native runner refuses."""
    grey8, grey16 = noise(HEIGHT, WIDTH, 1, seed=13), noise(HEIGHT, WIDTH, 1, most=65535, seed=14)
    yield PictureFile("min-is-white8.tif", tiff(grey8, 8, 0), rgb(255 - grey8))
    yield PictureFile("min-is-black8.tif", tiff(grey8, 8, 1), rgb(grey8))
    yield PictureFile("min-is-white16.tif", tiff(grey16, 16, 0), rgb(255 - np.round(grey16 / 257)))
    yield PictureFile("min-is-black16.tif", tiff(grey16, 16, 1), rgb(np.round(grey16 / 257)))
    yield PictureFile("min-is-black16-big.tif", tiff(grey16, 16, 1, ">"), rgb(np.round(grey16 / 257)))
    grey12 = noise(HEIGHT, WIDTH, 1, most=4095, seed=15)
    yield PictureFile("grey12.tif", tiff(grey12, 12, 1), rgb(np.round(grey12 * 255 / 4095)))
    colours = Image.fromarray(noise(HEIGHT, WIDTH, 3, seed=16).astype(np.uint8))
    plain, known = np.asarray(colours), profiles()
    smooth = Image.fromarray(np.stack(np.mgrid[0:HEIGHT, 0:WIDTH, 5:6].reshape(3, HEIGHT, WIDTH), -1).astype(np.uint8) * 15)
    for orientation in range(2, 9):
        tag = Image.Exif()
        tag[0x0112] = orientation
        yield _encoded(f"exif{orientation}.webp", colours, upright(plain, orientation), lossless=True, exif=tag)
    tag = Image.Exif()
    tag[0x0112] = 6
    as_jpeg = _encoded("plain.jpg", smooth, None, quality=95).content
    decoded = np.asarray(Image.open(io.BytesIO(as_jpeg)))
    yield PictureFile("plain.jpg", as_jpeg, decoded)
    yield _encoded("exif6.jpg", smooth, upright(decoded, 6), quality=95, exif=tag)
    yield _encoded("xmp6.jpg", smooth, upright(decoded, 6), quality=95, xmp=xmp(6))
    yield _encoded("exif6.tif", colours, upright(plain, 6), exif=tag)
    for name in ("adobe", "p3"):
        yield _encoded(
            f"profile-{name}.jpg", smooth, converted(Image.fromarray(decoded), known[name]), quality=95, icc_profile=known[name]
        )  # fmt: skip
        wide = converted(colours, known[name])
        yield _encoded(f"profile-{name}.webp", colours, wide, lossless=True, icc_profile=known[name])
        yield _encoded(f"profile-{name}.tif", colours, wide, icc_profile=known[name])
    ink = colours.convert("CMYK")
    yield _encoded("cmyk.tif", ink, np.asarray(ink.convert("RGB")))
    press = cmyk_profile()
    yield _encoded("profile-cmyk.tif", ink, converted(ink, press), icc_profile=press)
    content = _encoded("cmyk.jpg", smooth.convert("CMYK"), None, quality=95, icc_profile=press).content
    yield PictureFile("profile-cmyk.jpg", content, converted(Image.open(io.BytesIO(content)), press))
    lab = Image.merge("LAB", [Image.new("L", (WIDTH, HEIGHT), value) for value in (128, 128, 128)])
    yield _encoded("lab.tif", lab, np.full((HEIGHT, WIDTH, 3), 119, np.uint8))
    first, second = Image.new("RGB", (WIDTH, HEIGHT), (40, 50, 60)), Image.new("RGB", (WIDTH, HEIGHT), (200, 0, 0))
    still = np.full((HEIGHT, WIDTH, 3), (40, 50, 60), np.uint8)
    for suffix, options in (("gif", {}), ("webp", {"lossless": True})):
        yield _encoded(f"animated.{suffix}", first, still, save_all=True, append_images=[second], duration=100, **options)
    yield PictureFile("float.tif", _encoded("f.tif", Image.new("F", (4, 4)), None).content, None)


def _still_and_refused() -> Iterator[PictureFile]:
    first, second = Image.new("RGB", (WIDTH, HEIGHT), (40, 50, 60)), Image.new("RGB", (WIDTH, HEIGHT), (200, 0, 0))
    still = np.full((HEIGHT, WIDTH, 3), (40, 50, 60), np.uint8)
    animated = _encoded("animated.png", first, still, save_all=True, append_images=[second], duration=100)
    yield animated
    content = _encoded("a.png", first, None, save_all=True, append_images=[second], default_image=True).content
    yield PictureFile("animated-with-still.png", content, still)
    samples = noise(HEIGHT, WIDTH, 3, seed=17)
    plain, sound = samples.astype(np.uint8), png(samples, COLOUR)
    yield PictureFile("one-pixel.png", png(samples[:1, :1], COLOUR), plain[:1, :1])
    yield PictureFile("wide.png", png(np.tile(samples[:1], (1, 200, 1)), COLOUR), np.tile(plain[:1], (1, 200, 1)))
    yield PictureFile("no-end.png", sound[:-12], plain)
    yield PictureFile("more-behind.png", sound + b"more", plain)
    text = chunk(b"tEXt", b"Comment\0hello")
    yield PictureFile("private-chunk.png", png(samples, COLOUR, before=chunk(b"prVt", b"abc") + text), plain)
    yield PictureFile("cut.png", sound[:-60], None)
    yield PictureFile("cut-in-header.png", sound[:20], None)
    yield PictureFile("wrong-checksum.png", sound[:29] + bytes([sound[29] ^ 1]) + sound[30:], None)
    header = struct.pack(">IIBBBBB", 40000, 40000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"")
    yield PictureFile("bomb.png", bomb, None)
    header = struct.pack(">IIBBBBB", 13, 0, 8, 2, 0, 0, 0)
    yield PictureFile("no-rows.png", b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b""), None)
    header = struct.pack(">IIBBBBB", 13, 11, 3, 0, 0, 0, 0)
    yield PictureFile("three-bits.png", b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b""), None)
    yield PictureFile("text.png", b"not a picture", None)
    yield PictureFile("empty.png", b"", None)


_MAKERS: tuple[Callable[[], Iterator[PictureFile]], ...] = (
    _depths, _keys, _colours, _turned, _others, _still_and_refused,
)  # fmt: skip


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for file in files():
        (folder / file.name).write_bytes(file.content)
