"""What someone meets who has read nothing: one line for every surprise."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from PIL import Image

from lavin_kernels import static
from lavin_rt.cli.main import main
from lavin_rt.find.model import BUNDLED, find_checkpoint, find_model
from lavin_rt.pictures import images
from lavin_rt.pipeline import Pipeline

DEPTH = str(BUNDLED / "template" / "depth_estimation" / "0_input.png")
CLIP = BUNDLED / "template" / "frame_prediction" / "0_input"


def run(*arguments: object) -> int:
    return main(["run", "--steps", "4", *map(str, arguments)])


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline.from_pretrained()


def help_of(capsys, *command: str) -> str:
    with pytest.raises(SystemExit):
        main([*command, "--help"])
    return " ".join(capsys.readouterr().out.split())


def test_the_small_model_says_what_it_is(tmp_path, capsys):
    assert run("--task", "depth", "--query", DEPTH, "-o", tmp_path / "a.png") == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "note:" in line]
    assert len(said) == 1 and "64 px" in said[0] and "depth" in said[0] and "makes little" in said[0]
    assert run("--task", "depth", "--query", DEPTH, "-o", tmp_path / "b.png", "-q") == 0
    assert not capsys.readouterr().err


def test_keep_size_says_how_soft_answers_become(tmp_path, capsys):
    Image.open(DEPTH).resize((200, 100)).save(tmp_path / "large.png")
    assert run("--task", "depth", "--query", tmp_path / "large.png", "-o", tmp_path / "a.png", "--keep-size") == 0
    assert "computed at 64x64; --keep-size enlarges them to 100x200" in capsys.readouterr().err
    assert Image.open(tmp_path / "a.png").size == (200, 100)


def test_a_clip_without_its_option_is_asked_about(tmp_path, capsys):
    assert run("--task", "frame_prediction", "--query", CLIP, "-o", tmp_path / "a.webp") == 2
    assert "or --clip where they are the frames of one clip" in capsys.readouterr().err
    assert run("--task", "frame_prediction", "--query", CLIP / "0.png", "-o", tmp_path / "a.png") == 2
    assert "did you mean --clip" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert run("--task", "depth", "--query", CLIP, "--clip", "-o", tmp_path / "a.webp") == 2
    assert "leave --clip out" in capsys.readouterr().err


def test_longer_clips_are_cut(tmp_path, capsys, pipe):
    frames = [images.load_picture(path) for path in images.frame_files(CLIP)]
    seven = tmp_path / "seven"
    seven.mkdir()
    for i, frame in enumerate([*frames, *frames[:2]]):
        images.to_pil(frame).save(seven / f"{i}.png")
    arguments = ["--task", "frame_prediction", "--query", seven, "--clip", "-o", tmp_path / "a.webp", "--pairs", 1]
    assert run(*arguments) == 2
    assert "--frames 5" in capsys.readouterr().err
    assert run(*arguments, "--frames", 5) == 0
    assert len(images.load_clip(tmp_path / "a.webp")) == 5
    assert run(*arguments, "--frames", 6) == 2
    assert "expected 1 + 4k" in capsys.readouterr().err
    task = pipe.task("frame_prediction", pairs=1, frames=1)
    assert task.context.frames_per_clip == 1
    [result] = task.run([seven], steps=4)
    assert len(result.frames) == 1


def test_help_names_tasks_lengths_and_costs(capsys):
    said = help_of(capsys, "run")
    for words in (
        "depth_estimation",
        "have 5",
        "1 + 4k",
        "up to two minutes",
        "--frames",
        "--allow-huge",
        "default: mini",
    ):
        assert words in said, words
    assert "default: mini" in help_of(capsys, "export", "onnx")


def test_info_lists_the_tasks(capsys):
    assert main(["info"]) == 0
    assert "depth_estimation" in capsys.readouterr().out
    assert main(["info", "--json"]) == 0
    assert "negative" in json.loads(capsys.readouterr().out)["tasks"]["by name"]


def test_the_small_model_has_a_name(tmp_path, monkeypatch):
    assert find_model("mini") == find_model() == find_checkpoint("lavin-mini") == find_checkpoint(None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mini").mkdir()  # a folder of one's own comes first
    with pytest.raises(ValueError, match="mini"):
        find_model("mini")


def test_a_folder_run_says_pictures_a_second(tmp_path, capsys):
    for name in ("a", "b"):
        Image.open(DEPTH).save(tmp_path / f"{name}.png")
    arguments = ["--task", "depth", "--query", tmp_path, "-o", tmp_path / "out/", "--pairs", 1]
    assert run(*arguments) == 0
    assert re.search(r"\d pictures/s", capsys.readouterr().out)
    assert run(*arguments, "--json") == 0
    assert json.loads(capsys.readouterr().out)["pictures_per_second"] > 0


def test_pipelines_and_tasks_say_what_they_are(pipe):
    assert re.fullmatch(r"<Pipeline lavin-mini: 64 px, impl \w+, \w+, \w+>", repr(pipe))
    assert "<Task: 2 pairs at 64x64, <Pipeline" in repr(pipe.task("depth", pairs=2))


def test_huge_pictures_by_an_option(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "huge.png")
    arguments = ["--task", "depth", "--query", tmp_path / "huge.png", "-o", tmp_path / "a.png", "--pairs", 1]
    assert run(*arguments) == 2
    assert "--allow-huge" in capsys.readouterr().err
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)  # the templates may be read
    assert run(*arguments, "--allow-huge") == 0
    assert Image.MAX_IMAGE_PIXELS == 3000


@pytest.mark.slow
def test_the_static_check_says_where_it_stands(capsys):
    assert static.main(["--capability", "90"]) == 0
    assert "compiling 1/" in capsys.readouterr().err
