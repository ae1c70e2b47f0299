import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from lavin_rt import context, images
from lavin_rt.context import ContextFrames, Pair
from lavin_rt.errors import InputError

# Nothing here is timed: neither examples nor their making.
untimed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def one_line(error) -> str:
    """The message of an `InputError`, which has to fit on one line."""
    message = str(error.value)
    assert message and len(message.splitlines()) == 1
    return message


def picture(path, value=0, size=(8, 6)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path)


def template(folder, *names):
    for i, name in enumerate(names):
        picture(folder / f"{name}_input.png", 2 * i)
        picture(folder / f"{name}_target.png", 2 * i + 1)
    return folder


# Template folders


def test_pairs_come_in_natural_order(tmp_path):
    template(tmp_path, "10", "2", "a", "1")
    pairs = context.read_template(tmp_path)
    assert [pair.name for pair in pairs] == ["1", "2", "10", "a"]
    for pair in pairs:
        assert pair.input == tmp_path / f"{pair.name}_input.png"
        assert pair.target == tmp_path / f"{pair.name}_target.png"


def test_text_before_the_first_underscore_pairs(tmp_path):
    picture(tmp_path / "7_rgb_indoor_input.jpg")
    picture(tmp_path / "7_depth_target.WEBP")
    picture(tmp_path / "7.png")
    picture(tmp_path / ".8_input.png")
    (tmp_path / "9_input.txt").write_text("passed over")
    (tmp_path / "9_notes").mkdir()
    assert context.read_template(str(tmp_path)) == [
        Pair("7", tmp_path / "7_rgb_indoor_input.jpg", tmp_path / "7_depth_target.WEBP")
    ]


def test_folders_of_frames_and_animations_are_clips(tmp_path):
    for i in range(5):
        picture(tmp_path / "x_input" / f"{i}.png", i)
    frames = torch.full((5, 3, 6, 8), 9, dtype=torch.uint8)
    frames[:, 0] = torch.arange(5)[:, None, None]
    images.save_picture(frames, tmp_path / "x_target.png")
    (pair,) = context.read_template(tmp_path)
    clips = ContextFrames.prepare([pair], (16, 16))
    assert clips[0].shape == clips[1].shape == (1, 3, 5, 16, 16)
    assert torch.equal(clips.frames[0][:, 0, 0, 0], torch.arange(5)) and (clips.frames[1][:, 1:] == 9).all()


def test_template_folders_that_cannot_be_used(tmp_path):
    (tmp_path / "empty").mkdir()
    picture(tmp_path / "plain" / "0.png")
    template(tmp_path / "lonely", "0", "1", "2")
    (tmp_path / "lonely" / "1_target.png").unlink()
    (tmp_path / "lonely" / "2_input.png").unlink()
    template(tmp_path / "double", "scene")
    picture(tmp_path / "double" / "scene_2_input.png")
    (tmp_path / "file").touch()
    cases = {
        "none": ["no such folder"],
        "file": ["no such folder"],
        "empty": ["*_input", "*_target"],
        "plain": ["*_input", "*_target"],
        "lonely": ["1_input.png, 2_target.png", "partner"],
        "double": ["scene_2_input.png", "scene_input.png", "before the first _"],
    }
    for name, words in cases.items():
        with pytest.raises(InputError) as error:
            context.read_template(tmp_path / name)
        assert all(word in one_line(error) for word in [*words, str(tmp_path / name)])


def test_many_lonely_pictures_are_counted(tmp_path):
    for i in range(12):
        picture(tmp_path / f"{i}_input.png")
    with pytest.raises(InputError) as error:
        context.read_template(tmp_path)
    assert "0_input.png, 1_input.png, 2_input.png, 3_input.png, 4_input.png and 7 more" in one_line(error)


# Choosing


def named(*names) -> list[Pair]:
    return [Pair(name, f"{name}_input.png", f"{name}_target.png") for name in names]


def test_the_choice_is_the_same_everywhere():
    # From `printf 0:3 | sha256sum` and so on, sorted; `0:draw:3` modulo 8 for repeats.
    pairs = named(*map(str, range(8)))
    assert [pair.name for pair in context.choose_pairs(pairs, 4, 0)] == ["7", "4", "3", "2"]
    assert [pair.name for pair in context.choose_pairs(pairs, 8, 1)] == ["7", "4", "6", "5", "2", "3", "0", "1"]
    assert [pair.name for pair in context.choose_pairs(pairs, 6, 0, repeats=True)] == ["4", "1", "6", "0", "3", "6"]


@untimed
@given(st.lists(st.text(max_size=3), min_size=1, max_size=12, unique=True), st.integers(), st.data())
def test_choice_without_repeats(names, seed, data):
    pairs = named(*names)
    count = data.draw(st.integers(1, len(pairs)))
    chosen = context.choose_pairs(pairs, count, seed)
    assert len(set(chosen)) == count and set(chosen) <= set(pairs)
    assert context.choose_pairs(data.draw(st.permutations(pairs)), count, seed) == chosen
    assert context.choose_pairs(pairs, len(pairs), seed)[:count] == chosen
    with pytest.raises(InputError) as error:
        context.choose_pairs(pairs, len(pairs) + 1, seed)
    assert str(len(pairs)) in one_line(error)


@untimed
@given(st.integers(1, 5), st.integers(1, 12), st.integers())
def test_choice_with_repeats(count_of_pairs, count, seed):
    pairs = named(*map(str, range(count_of_pairs)))
    chosen = context.choose_pairs(pairs, count, seed, repeats=True)
    assert len(chosen) == count and set(chosen) <= set(pairs)
    assert context.choose_pairs(pairs[::-1], count, seed, repeats=True) == chosen


@pytest.mark.parametrize("repeats", [False, True])
def test_choice_is_even(repeats):
    pairs = named("a", "b", "c", "d")
    firsts = [context.choose_pairs(pairs, 1, seed, repeats)[0].name for seed in range(2000)]
    # Four standard deviations of a binomial with p = 1/4.
    assert all(abs(firsts.count(name) - 500) < 4 * (2000 * 3 / 16) ** 0.5 for name in "abcd")


@pytest.mark.parametrize("repeats", [False, True])
def test_impossible_choices(repeats):
    for pairs, count in ((named("a"), 0), (named("a"), -1), (named("a"), 1.5), ([], 1)):
        with pytest.raises(InputError) as error:
            context.choose_pairs(pairs, count, 0, repeats)
        one_line(error)


def test_given_pairs_are_taken_in_full_and_in_order(tmp_path):
    arrays = [np.full((6, 8, 3), i, np.uint8) for i in range(6)]
    given_pairs = [(arrays[4], arrays[5]), [arrays[0], Image.fromarray(arrays[1])], Pair("x", arrays[2], arrays[3])]
    clips = ContextFrames.prepare(context.given_pairs(given_pairs), (16, 16))
    assert [int(frames[0, 0, 0, 0]) for frames in clips.frames] == [4, 5, 0, 1, 2, 3]
    for wrong in ([], [(arrays[0],)], [arrays[0]], ["ab"], 5, None):
        with pytest.raises(InputError) as error:
            context.given_pairs(wrong)
        one_line(error)


# Tasks by name


def test_tasks_are_found_by_folder_name_and_beginning(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first / "depth_estimation", second / "depth_estimation", second / "edge_detection"):
        template(folder, "0")
    for name in ("pose", "pose_to_image", "normal_estimation", "normal_to_image"):
        template(second / name, "0")
    (second / "README_not_a_task").touch()
    roots = [tmp_path / "missing", first, second]
    assert context.find_task("depth", roots) == first / "depth_estimation"
    assert context.find_task("depth_estimation", roots) == first / "depth_estimation"
    assert context.find_task("edge", roots) == second / "edge_detection"
    assert context.find_task("pose", roots) == second / "pose"
    assert context.find_task(second / "edge_detection", roots) == second / "edge_detection"
    assert context.find_task("first/depth_estimation", []).samefile(first / "depth_estimation")
    for name, words in {
        "normal": ["normal_estimation, normal_to_image"],
        "colour": ["'colour'", "depth_estimation, edge_detection, normal_estimation, normal_to_image, pose"],
        "README": ["unknown"],
        "": ["unknown"],
        "first/none": ["first/none", "no such folder"],
    }.items():
        with pytest.raises(InputError) as error:
            context.find_task(name, roots)
        assert all(word in one_line(error) for word in words)
    with pytest.raises(InputError) as error:
        context.find_task("depth", [])
    assert "give a folder" in one_line(error)


# Frames


def test_frames_are_resized_and_normalised():
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 256, (20, 30, 3), dtype=np.uint8) for _ in range(4)]
    clips = ContextFrames.prepare([Pair("0", *arrays[:2]), Pair("1", *arrays[2:])], (16, 32))
    assert len(clips) == 4 and clips.pairs == 2 and clips.frames_per_clip == 1 and clips.size == (16, 32)
    for clip, array in zip(clips, arrays, strict=True):
        frame = torch.from_numpy(array).permute(2, 0, 1)[None]
        resized = torch.nn.functional.interpolate(frame, size=(16, 32), mode="bicubic", antialias=True)
        assert clip.dtype == torch.float32 and clip.is_contiguous()
        assert torch.equal(clip, (resized.float() / 127.5 - 1)[:, :, None])


def test_rows_of_the_side_by_side_picture():
    arrays = [np.full((16, 16, 3), i, np.uint8) for i in range(4)]
    clips = ContextFrames.prepare([Pair("0", *arrays[:2]), Pair("1", *arrays[2:])], (16, 16))
    query, result = (torch.full((1, 3, 16, 16), value, dtype=torch.uint8) for value in (4, 5))
    rows = clips.rows(query, result)
    assert [[int(cell.max()) for cell in row] for row in rows] == [[0, 2, 4], [1, 3, 5]]
    assert images.grid(rows, margin=0)[0, 0, ::16, ::16].tolist() == [[0, 2, 4], [1, 3, 5]]


def test_clips_of_different_lengths_are_named():
    one, five = np.zeros((1, 4, 4, 3), np.uint8), np.zeros((5, 4, 4, 3), np.uint8)
    with pytest.raises(InputError) as error:
        ContextFrames.prepare([Pair("a", five, five), Pair("b", five, one)], (16, 16))
    assert "target of context pair b has 1 frames, the first input 5" in one_line(error)
    with pytest.raises(InputError):
        ContextFrames.prepare([], (16, 16))
    with pytest.raises(InputError) as error:
        context.check_query_frames(1, 5, "query.png")
    assert "query.png: 1 frames" in one_line(error) and "5" in one_line(error)
    context.check_query_frames(5, 5)


@pytest.mark.parametrize("end", ["\n", "\x0c", "\x85", "\u2028"])
def test_names_of_several_lines_stay_on_one(tmp_path, end):
    (tmp_path / f"0{end}b_input.png").touch()
    with pytest.raises(InputError) as error:
        context.read_template(tmp_path)
    assert len(str(error.value).splitlines()) == 1
    (tmp_path / f"depth{end}x").mkdir()
    (tmp_path / f"depth{end}y").mkdir()
    for name in ("depth", "nowhere"):
        with pytest.raises(InputError) as error:
            context.find_task(name, [tmp_path])
        assert len(str(error.value).splitlines()) == 1
