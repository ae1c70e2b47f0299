"""Pictures and clips written to files, and side by side."""

import pytest
import torch
from PIL import Image
from support.pictures import noise, one_line

from lavin_rt.errors import InputError
from lavin_rt.pictures import images


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


def test_output_check_makes_nothing(tmp_path):
    for name in ("a.png", "a.jpeg", "a.webp", "a.gif", "new/frames", "new/a.b/"):
        images.check_output(f"{tmp_path}/{name}", size=(512, 512))
    assert not list(tmp_path.rglob("*"))


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
