import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support.pictures import hwc, noise, one_line, untimed

from lavin_rt.errors import InputError
from lavin_rt.pictures import images

# Reading


def test_path_image_array_and_tensor_give_the_same(tmp_path):
    array = noise(7, 5, 3)
    Image.fromarray(array).save(tmp_path / "a.png")
    array.flags.writeable = False
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(array), array, torch.tensor(array)):
        picture = images.load_picture(source)
        assert picture.dtype == torch.uint8 and picture.is_contiguous()
        np.testing.assert_array_equal(hwc(picture), array)


def test_arrays_are_copied():
    array, tensor = noise(4, 4, 3), torch.zeros(4, 1, 3, dtype=torch.uint8)
    for source in (array, tensor):
        images.load_picture(source).fill_(7)
    np.testing.assert_array_equal(array, noise(4, 4, 3))
    assert not tensor.any()


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV"])
def test_opaque_modes_are_what_pillow_converts_them_to(mode):
    picture = Image.fromarray(noise(6, 4, 3)).convert(mode)
    np.testing.assert_array_equal(hwc(images.load_picture(picture)), np.asarray(picture.convert("RGB")))


def test_cmyk_jpeg_file(tmp_path):
    Image.fromarray(noise(16, 16, 3)).convert("CMYK").save(tmp_path / "a.jpg")
    expected = np.asarray(Image.open(tmp_path / "a.jpg").convert("RGB"))
    np.testing.assert_array_equal(hwc(images.load_picture(tmp_path / "a.jpg")), expected)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_opaque_alpha_changes_nothing(mode):
    picture = Image.fromarray(noise(16, 16, 3)).convert(mode)
    np.testing.assert_array_equal(hwc(images.load_picture(picture)), np.asarray(picture.convert("RGB")))


def test_transparency_shows_white(tmp_path):
    pixels = noise(8, 8, 4)
    pixels[0, 0] = (10, 20, 30, 0)
    pixels[0, 1] = (0, 100, 200, 51)  # a fifth
    Image.fromarray(pixels).save(tmp_path / "a.png")
    picture = hwc(images.load_picture(tmp_path / "a.png")).astype(int)
    assert picture[0, 0].tolist() == [255, 255, 255]
    assert picture[0, 1].tolist() == [204, 224, 244]
    alpha = pixels[..., 3:] / 255
    assert np.abs(picture - (pixels[..., :3] * alpha + 255 * (1 - alpha))).max() <= 1


def test_transparent_palette_entry_and_colour_show_white(tmp_path):
    palette = Image.new("P", (4, 2), 1)
    palette.putpalette([1, 2, 3, 40, 50, 60])
    palette.putpixel((0, 0), 0)
    palette.save(tmp_path / "p.png", transparency=0)
    colour = Image.new("RGB", (4, 2), (40, 50, 60))
    colour.putpixel((0, 0), (1, 2, 3))
    colour.save(tmp_path / "c.png", transparency=(1, 2, 3))
    for name in ("p.png", "c.png"):
        picture = hwc(images.load_picture(tmp_path / name))
        assert picture[0, 0].tolist() == [255, 255, 255] and picture[1, 3].tolist() == [40, 50, 60]


def test_16_bit_greyscale_is_rounded_exactly(tmp_path):
    levels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = np.array([round(level / 257) for level in range(65536)]).reshape(256, 256)
    Image.fromarray(levels).save(tmp_path / "a.png")
    Image.fromarray(levels).save(tmp_path / "a.tif")
    (tmp_path / "a.pgm").write_bytes(b"P5 256 256 65535\n" + levels.astype(">u2").tobytes())
    sources = [tmp_path / "a.png", tmp_path / "a.tif", tmp_path / "a.pgm", Image.fromarray(levels)]
    for source in [*sources, Image.frombytes("I;16B", (256, 256), levels.astype(">u2").tobytes())]:
        for channel in images.load_picture(source):
            np.testing.assert_array_equal(channel.numpy(), expected)


def test_32_bit_values_are_refused():
    for mode in ("I", "F"):
        with pytest.raises(InputError) as error:
            images.load_picture(Image.new(mode, (2, 2)))
        assert f"mode {mode}" in one_line(error)


def oriented(array: np.ndarray, orientation: int) -> np.ndarray:
    """What the EXIF standard says a viewer shows: row 0 and column 0 of the stored picture are the sides it names."""
    if orientation >= 5:
        array = array.swapaxes(0, 1)
    flip_rows, flip_columns = {
        1: (False, False), 2: (False, True), 3: (True, True), 4: (True, False),
        5: (False, False), 6: (False, True), 7: (True, True), 8: (True, False),
    }[orientation]  # fmt: skip
    return array[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "webp", "tif"])
def test_exif_orientation(tmp_path, orientation, suffix):
    array, exif = noise(5, 3, 3), Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(array).save(path, exif=exif, **({"lossless": True} if suffix == "webp" else {}))
    for source in (path, Image.open(path)):
        np.testing.assert_array_equal(hwc(images.load_picture(source)), oriented(array, orientation))


def test_exif_orientation_of_a_16_bit_picture(tmp_path):
    levels, exif = np.arange(15, dtype=np.uint16).reshape(5, 3) * 257, Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(levels).save(tmp_path / "a.png", exif=exif)
    expected = oriented(np.arange(15).reshape(5, 3), 6)
    np.testing.assert_array_equal(images.load_picture(tmp_path / "a.png")[0].numpy(), expected)


def test_damaged_exif_is_no_reason_to_refuse(tmp_path):
    array = noise(5, 3, 3)
    Image.fromarray(array).save(tmp_path / "a.png", exif=b"Exif\0\0MM\0\x2a\0\0\xff\xff\xff\xff")
    np.testing.assert_array_equal(hwc(images.load_picture(tmp_path / "a.png")), array)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_unreadable_pictures(tmp_path):
    Image.fromarray(noise(64, 64, 3)).save(tmp_path / "whole.png")
    Image.fromarray(noise(64, 64, 3)).save(tmp_path / "whole.jpg")
    for name in ("whole.png", "whole.jpg"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name.replace("whole", "cut")).write_bytes(content[: len(content) // 2])
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "empty.png").touch()
    header = struct.pack(">IIBBBBB", 40000, 40000, 8, 2, 0, 0, 0)
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", b""))
    expected = {
        "cut.png": "cannot be read",
        "cut.jpg": "truncated",
        "text.png": "not a picture",
        "empty.png": "not a picture",
        "bomb.png": "bomb",
        "none.png": "no such picture",
        "": "Is a directory",
    }
    for name, words in expected.items():
        with pytest.raises(InputError) as error:
            images.load_picture(tmp_path / name)
        assert words in one_line(error) and str(tmp_path / name) in one_line(error)
        if name:
            with pytest.raises(InputError):
                images.load_clip(tmp_path / name)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("cut", range(10, 160, 10))
@pytest.mark.parametrize("suffix", ["png", "gif", "webp", "tif", "jpg", "avif"])
def test_a_file_cut_anywhere_is_an_input_error(tmp_path, suffix, cut):
    path = tmp_path / f"a.{suffix}"
    if f".{suffix}" not in Image.registered_extensions():
        pytest.skip("this Pillow reads no AVIF")
    Image.fromarray(noise(16, 16, 3)).save(path)
    content = path.read_bytes()
    assert cut < len(content) - 100
    path.write_bytes(content[:cut])
    for load in (images.load_picture, images.load_clip):
        with pytest.raises(InputError) as error:
            load(path)
        assert str(path) in one_line(error)


@pytest.mark.parametrize(
    "source",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4, 3), np.uint16),
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((3, 4, 4), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((1, 4, 4, 3), np.uint8),
        torch.zeros(4, 4, 3, dtype=torch.bfloat16),
        torch.zeros(3, 8, 8, dtype=torch.uint8),
    ],
)
def test_other_arrays_are_refused(source):
    with pytest.raises(InputError) as error:
        images.load_picture(source)
    assert str(list(source.shape)) in one_line(error) and "uint8 [H, W, 3]" in one_line(error)


def test_other_types_are_refused():
    for source in (None, 5, b"bytes"):
        with pytest.raises(InputError) as error:
            images.load_picture(source)
        assert type(source).__name__ in one_line(error)


def test_names_with_line_breaks_stay_on_one_line(tmp_path):
    with pytest.raises(InputError) as error:
        images.load_picture(tmp_path / "a\nb.png")
    one_line(error)


# Sizes and values


@untimed
@given(st.integers(1, 400), st.integers(1, 400))
def test_sizes_are_read_in_every_form(rows, columns):
    height, width = 16 * rows, 16 * columns
    for size in (f"{height}x{width}", f" {height} X {width} ", f"{height}×{width}", (height, width), [height, width]):
        assert images.parse_size(size) == (height, width)
    for size in (height, str(height), np.int64(height)):
        assert images.parse_size(size) == (height, height)


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ("500", "496 or 512"),
        ("512x500", "width 500"),
        ((8, 512), "height 8"),
        (0, "16 or more"),
        (-16, "16 or more"),
        ("0x16", "16 or more"),
        *[
            (size, "384x640")
            for size in ("", "x", "512x", "a", "512x512x512", "-16", "5.5", "٥١٢", "9" * 5000, "512\n x")
        ],
        *[(size, "384x640") for size in (512.0, None, True, (), (16, 16, 16), ("16", "16"), (16, 16.0))],
    ],
)
def test_other_sizes_are_refused(size, words):
    with pytest.raises(InputError) as error:
        images.parse_size(size)
    assert words in one_line(error)


@untimed
@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 40), st.integers(1, 3), st.integers(1, 3))
def test_resize_is_interpolate_on_uint8(frames, height, width, rows, columns):
    clip = torch.from_numpy(noise(frames, 3, height, width))
    size = (16 * rows, 16 * columns)
    resized = images.resize(clip, size)
    expected = torch.nn.functional.interpolate(clip, size=size, mode="bicubic", antialias=True)
    assert resized.dtype == torch.uint8 and torch.equal(resized, expected)
    assert torch.equal(images.resize(clip[0], size), expected[0])
    assert torch.equal(images.resize(clip[None], size), expected[None])


def test_resize_leaves_alone_what_has_the_size():
    clip = torch.from_numpy(noise(2, 3, 16, 32))
    assert images.resize(clip, (16, 32)) is clip


def test_pixels_are_the_formula_and_come_back():
    frames = torch.arange(256, dtype=torch.uint8)
    pixels = images.to_pixels(frames)
    assert pixels.dtype == torch.float32 and torch.equal(pixels, frames.float() / 127.5 - 1)
    assert frames[-1] == 255 and pixels[0] == -1 and pixels[-1] == 1
    # Truncation may lose one level where the way there and back is rounded down.
    assert (frames.int() - images.from_pixels(pixels).int()).unique().tolist() in ([0], [0, 1])


@untimed
@given(st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=50))
def test_output_values_are_clamped_and_truncated(values):
    pixels = torch.tensor(values)
    kept = pixels.clone()
    expected = [int(np.float32(min(max(np.float32(v) / 2 + np.float32(0.5), 0), 1)) * np.float32(255)) for v in values]
    assert images.from_pixels(pixels).tolist() == expected
    assert torch.equal(pixels, kept)


def test_output_values_of_bfloat16_are_computed_in_float32():
    pixels = torch.tensor([0.99609375, 0.0078125, -5.0], dtype=torch.bfloat16)
    assert images.from_pixels(pixels).tolist() == [254, 128, 0]
