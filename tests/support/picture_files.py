"""A table of picture files with the corners of their formats, made by this script, and what each has to be read as.

`python tests/support/picture_files.py FOLDER` writes them.
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
from PIL import Image

from support.picture_bytes import (  # fmt: skip
    COLOUR,
    COLOUR_ALPHA,
    GREY,
    GREY_ALPHA,
    HEIGHT,
    PALETTE,
    WIDTH,
    chunk,
    cmyk_profile,
    converted,
    exif,
    itxt,
    on_white,
    png,
    profiles,
    rgb,
    tiff,
    upright,
    xmp,
)

CHANNELS = {GREY: 1, COLOUR: 3, PALETTE: 1, GREY_ALPHA: 2, COLOUR_ALPHA: 4}


@dataclasses.dataclass(frozen=True)
class PictureFile:
    """One file: its name, its bytes, what it shows (uint8 `[H, W, 3]`; None where it has to be refused)."""

    name: str
    content: bytes
    shows: np.ndarray | None


def noise(*shape: int, most: int = 255, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, most + 1, shape)


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
                content = png(samples, kind, bits, interlaced)
                yield PictureFile(f"{name}{bits}{way}.png", content, on_white(colour, alpha))


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
    ramps = np.mgrid[0:HEIGHT, 0:WIDTH, 5:6].reshape(3, HEIGHT, WIDTH)
    smooth = Image.fromarray(np.stack(ramps, -1).astype(np.uint8) * 15)
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
        wide = converted(Image.fromarray(decoded), known[name])
        yield _encoded(f"profile-{name}.jpg", smooth, wide, quality=95, icc_profile=known[name])
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
    both = {"save_all": True, "append_images": [second], "duration": 100}
    yield _encoded("animated.gif", first, still, **both)
    yield _encoded("animated.webp", first, still, lossless=True, **both)
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
    claims = struct.pack(">I", 2**31 - 1) + b"iTXtXML:com.adobe.xmp"
    yield PictureFile("chunk-behind-the-end.png", sound[:33] + claims + sound[33:], None)
    header = struct.pack(">IIBBBBB", 2**31 - 1, 1, 8, 2, 0, 0, 0)
    wide = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"")
    yield PictureFile("row-of-gigabytes.png", wide, None)
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
