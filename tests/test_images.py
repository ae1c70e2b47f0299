import random
import re
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from lavin_rt import images
from lavin_rt.errors import InputError

# Nothing here is timed: neither examples nor their making.
untimed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def one_line(error) -> str:
    """The message of an `InputError`, which has to fit on one line."""
    message = str(error.value)
    assert message and len(message.splitlines()) == 1
    return message


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def hwc(frames: torch.Tensor) -> np.ndarray:
    return frames.movedim(-3, -1).numpy()


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


# Clips


def test_a_picture_is_a_clip_of_one_frame(tmp_path):
    array = noise(4, 6, 3)
    Image.fromarray(array).save(tmp_path / "a.jpg", quality=90)
    for source in (array, Image.fromarray(array), array[None], [array], tmp_path / "a.jpg"):
        assert images.load_clip(source).shape == (1, 3, 4, 6)


def test_folder_of_frames_in_natural_order(tmp_path):
    frames = noise(13, 4, 6, 3)
    order = list(range(13))
    random.Random(0).shuffle(order)
    for i in order:
        Image.fromarray(frames[i]).save(tmp_path / f"frame{i}.{'PNG' if i % 2 else 'bmp'}")
    (tmp_path / "notes.txt").write_text("passed over")
    (tmp_path / ".hidden.png").write_text("passed over")
    np.testing.assert_array_equal(hwc(images.load_clip(tmp_path)), frames)
    np.testing.assert_array_equal(hwc(images.load_clip(frames)), frames)
    np.testing.assert_array_equal(hwc(images.load_clip(torch.tensor(frames))), frames)
    np.testing.assert_array_equal(hwc(images.load_clip(list(frames))), frames)


@untimed
@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=8, unique=True), st.sampled_from(["", "a", "frame_"]))
def test_natural_order_is_numeric(numbers, prefix):
    names = [f"{prefix}{number}.png" for number in numbers]
    assert sorted(names, key=images.natural_key) == [f"{prefix}{number}.png" for number in sorted(numbers)]


@untimed
@given(st.lists(st.text(max_size=6), max_size=8))
def test_natural_order_takes_any_name(names):
    assert sorted(sorted(names, key=images.natural_key)) == sorted(names)


def test_frames_of_different_sizes_are_named(tmp_path):
    for i in range(5):
        Image.new("RGB", (6, 5 if i == 3 else 4)).save(tmp_path / f"{i}.png")
    with pytest.raises(InputError) as error:
        images.load_clip(tmp_path)
    assert "3.png is 5x6, expected 4x6" in one_line(error)


@pytest.mark.parametrize(
    ("count", "nearest"), [(0, "1, 5, 9"), (2, "1 and 5"), (4, "1 and 5"), (6, "5 and 9"), (8, "5 and 9")]
)
def test_frame_counts_are_one_and_a_multiple_of_four(tmp_path, count, nearest):
    for i in range(count):
        Image.new("RGB", (2, 2)).save(tmp_path / f"{i}.png")
    for source in (tmp_path, np.zeros((count, 2, 2, 3), np.uint8), [np.zeros((2, 2, 3), np.uint8)] * count):
        with pytest.raises(InputError) as error:
            images.load_clip(source)
        assert nearest in one_line(error)
    with pytest.raises(InputError):
        images.check_clip_frames(count, "clip")


@untimed
@given(st.integers(-3, 300))
def test_check_clip_frames(count):
    if count in range(1, 400, 4):
        images.check_clip_frames(count)
        return
    with pytest.raises(InputError) as error:
        images.check_clip_frames(count)
    if count > 0:
        below, above = map(int, re.findall(r"\d+", one_line(error))[-2:])
        assert below < count < above == below + 4 and below % 4 == 1


def test_pages_and_depth_maps_are_not_frames(tmp_path):
    first, second = (Image.fromarray(noise(4, 4, 3, seed=seed)) for seed in range(2))
    first.save(tmp_path / "pages.tif", save_all=True, append_images=[second])
    first.save(tmp_path / "phone.mpo", save_all=True, append_images=[second])
    for name in ("pages.tif", "phone.mpo"):
        assert Image.open(tmp_path / name).n_frames == 2
        assert len(images.load_clip(tmp_path / name)) == 1


def test_the_still_before_an_animation_is_not_a_frame(tmp_path):
    frames = [Image.fromarray(frame) for frame in noise(6, 4, 4, 3)]
    frames[0].save(tmp_path / "a.png", save_all=True, append_images=frames[1:], default_image=True)
    np.testing.assert_array_equal(hwc(images.load_clip(tmp_path / "a.png")), noise(6, 4, 4, 3)[1:])


def test_an_open_animation_stays_where_it_was(tmp_path):
    images.save_picture(torch.from_numpy(noise(5, 3, 4, 4)), tmp_path / "a.png")
    image = Image.open(tmp_path / "a.png")
    image.seek(2)
    np.testing.assert_array_equal(images.load_clip(image), noise(5, 3, 4, 4))
    assert image.tell() == 2
    np.testing.assert_array_equal(images.load_picture(image), noise(5, 3, 4, 4)[2])


def test_durations_of_other_programs_are_not_frames(tmp_path):
    frames = [Image.new("L", (4, 4), 40 * i) for i in range(5)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=[100, 100, 100, 100, 900])
    assert len(images.load_clip(tmp_path / "a.gif")) == 5


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


# Writing


@pytest.mark.parametrize("suffix", [".png", ".webp", ".PNG"])
@pytest.mark.parametrize("frames", [1, 5])
def test_lossless_formats_return_every_value(tmp_path, suffix, frames):
    clip = torch.from_numpy(noise(frames, 3, 16, 24))
    images.save_picture(clip, tmp_path / f"a{suffix}")
    assert torch.equal(images.load_clip(tmp_path / f"a{suffix}"), clip)
    assert [path.name for path in tmp_path.iterdir()] == [f"a{suffix}"]


@pytest.mark.parametrize("suffix", [".png", ".webp", ".gif"])
@pytest.mark.parametrize("order", [[0, 0, 0, 0, 0], [0, 0, 1, 1, 0], [0, 1, 1, 1, 1]])
def test_repeated_frames_of_a_clip_survive(tmp_path, suffix, order):
    flat = torch.stack([torch.full((3, 8, 8), 40), torch.full((3, 8, 8), 200)]).to(torch.uint8)
    clip = flat[order]
    images.save_picture(clip, tmp_path / f"a{suffix}")
    assert torch.equal(images.load_clip(tmp_path / f"a{suffix}"), clip)


def test_gif_clip_of_few_colours_returns(tmp_path):
    clip = torch.from_numpy(noise(9, 3, 8, 8)) // 128 * 255
    images.save_picture(clip, tmp_path / "a.gif")
    assert torch.equal(images.load_clip(tmp_path / "a.gif"), clip)


def test_jpeg_is_close_on_a_smooth_picture(tmp_path):
    ramp = torch.linspace(0, 255, 64).to(torch.uint8)
    picture = torch.stack([ramp.expand(64, 64), ramp[:, None].expand(64, 64), ramp.flip(0).expand(64, 64)])
    images.save_picture(picture, tmp_path / "a.jpg")
    loaded = images.load_picture(tmp_path / "a.jpg")
    assert (loaded.int() - picture.int()).abs().max() <= 6
    assert Image.open(tmp_path / "a.jpg").format == "JPEG"


@pytest.mark.parametrize("name", ["frames", "frames/", "frames.v2/"])
def test_folder_of_numbered_frames(tmp_path, name):
    clip = torch.from_numpy(noise(13, 3, 4, 6))
    images.save_picture(clip, f"{tmp_path}/{name}")
    files = sorted(path.name for path in (tmp_path / name).iterdir())
    assert files == [f"{i:04d}.png" for i in range(13)]
    assert torch.equal(images.load_clip(tmp_path / name), clip)
    assert len(list(tmp_path.iterdir())) == 1


def test_an_empty_folder_is_filled_and_a_full_one_refused(tmp_path):
    clip = torch.from_numpy(noise(1, 3, 4, 6))
    (tmp_path / "a.b").mkdir()
    images.save_picture(clip, tmp_path / "a.b")
    with pytest.raises(InputError) as error:
        images.save_picture(clip, tmp_path / "a.b")
    assert "not empty" in one_line(error)
    assert torch.equal(images.load_clip(tmp_path / "a.b"), clip)


def test_a_file_is_replaced_and_parents_are_made(tmp_path):
    path = tmp_path / "new" / "folder" / "a.png"
    for seed in range(2):
        picture = torch.from_numpy(noise(3, 4, 6, seed=seed))
        images.save_picture(picture, path)
        assert torch.equal(images.load_picture(path), picture)
    assert [entry.name for entry in path.parent.iterdir()] == ["a.png"]


def test_output_is_checked_before_the_work(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a.txt").touch()
    cases = [
        ("a.tiff", {}, "cannot write .tiff"),
        ("a.v2", {}, ".png"),
        ("a.jpg", {"frames": 5}, "5 frames"),
        ("a.webp", {"size": (16400, 16)}, "16383"),
        ("file", {}, "is a file"),
        ("full", {}, "not empty"),
        ("file/a.png", {}, "cannot be written"),
        ("file/deep/frames/", {}, "cannot be written"),
    ]
    for name, options, words in cases:
        with pytest.raises(InputError) as error:
            images.check_output(f"{tmp_path}/{name}", **options)
        assert words in one_line(error) and name in one_line(error)
    with pytest.raises(InputError):
        images.check_output("")
    with pytest.raises(InputError):
        images.check_output("/proc/nowhere/a.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full"]


def test_output_check_leaves_nothing_but_the_parents(tmp_path):
    for name in ("a.png", "a.jpeg", "a.webp", "a.gif", "new/frames", "new/a.b/"):
        images.check_output(f"{tmp_path}/{name}", size=(512, 512))
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["new"]


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.gif", "frames/"])
@pytest.mark.parametrize(
    "failure", [OSError(28, "No space left on device"), RuntimeError("broken"), KeyboardInterrupt()]
)
def test_a_failing_encoder_leaves_nothing(tmp_path, monkeypatch, name, failure):
    clip = torch.from_numpy(noise(5, 3, 4, 6))
    before = b"what was there"
    if not name.endswith("/"):
        (tmp_path / name).write_bytes(before)
    save, calls = Image.Image.save, []

    def failing(image, file, *args, **options):
        calls.append(file)
        if name.endswith("/") and len(calls) < 3:
            return save(image, file, *args, **options)
        file.write(b"half") if hasattr(file, "write") else file.write_bytes(b"half")
        raise failure

    monkeypatch.setattr(Image.Image, "save", failing)
    with pytest.raises(InputError if isinstance(failure, OSError) else type(failure)) as error:
        images.save_picture(clip, f"{tmp_path}/{name}")
    assert calls
    if isinstance(failure, OSError):
        assert "No space left" in one_line(error)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == ([] if name.endswith("/") else [before])


@pytest.mark.parametrize("shape", [(4, 6, 3), (2, 4, 6, 3), (4, 6), (0, 3, 4, 6), (1, 1, 3, 4, 6)])
def test_frames_of_another_shape_are_refused(tmp_path, shape):
    with pytest.raises(InputError) as error:
        images.save_picture(torch.zeros(shape, dtype=torch.uint8), tmp_path / "a.png")
    assert str(list(shape)) in one_line(error)
    with pytest.raises(InputError):
        images.save_picture(torch.zeros(3, 4, 4), tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


# Side by side


def test_grid_places_cells_between_white_margins():
    cells = [torch.full((3, 4, 6), value, dtype=torch.uint8) for value in (10, 20, 30, 40)]
    sheet = images.grid([[cells[0], cells[1], cells[2]], [cells[3], None]], margin=2)
    assert sheet.shape == (1, 3, 2 * 4 + 3 * 2, 3 * 6 + 4 * 2) and sheet.dtype == torch.uint8
    rest = sheet.clone()
    for top, left, value in ((2, 2, 10), (2, 10, 20), (2, 18, 30), (8, 2, 40)):
        assert (sheet[..., top : top + 4, left : left + 6] == value).all()
        rest[..., top : top + 4, left : left + 6] = 255
    assert (rest == 255).all()


def test_grid_resizes_and_holds_the_last_frame():
    clip = torch.from_numpy(noise(5, 3, 16, 16))
    short = torch.from_numpy(noise(2, 3, 20, 30))
    sheet = images.grid([[clip], [short]], size=(16, 32), margin=1)
    assert sheet.shape == (5, 3, 35, 34)
    assert torch.equal(sheet[:, :, 1:17, 1:33], images.resize(clip, (16, 32)))
    assert torch.equal(sheet[:, :, 18:34, 1:33], images.resize(short, (16, 32))[[0, 1, 1, 1, 1]])


def test_grid_of_nothing_is_refused():
    for rows in ([], [[]], [[None]]):
        with pytest.raises(InputError) as error:
            images.grid(rows)
        one_line(error)
