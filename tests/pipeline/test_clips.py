"""Clips: folders of frames, animations, arrays."""

import random
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support.pictures import hwc, noise, one_line, untimed

from lavin_rt.errors import InputError
from lavin_rt.pictures import images


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
