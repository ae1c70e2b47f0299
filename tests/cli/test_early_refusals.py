"""What can be refused is refused before a checkpoint is loaded, and a still is taken as one."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.command import exit_code

import lavin_rt
from lavin_rt.cli.main import main
from lavin_rt.pipeline import Pipeline


def stills(count: int) -> list[Image.Image]:
    ramp = np.tile(np.arange(64, dtype=np.uint8) * 4, (64, 1))
    return [Image.fromarray(np.stack([np.roll(ramp, 8 * i, 1)] * 3, -1)) for i in range(count)]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    first, *others = stills(5)
    first.save("q.png")
    for suffix in ("gif", "webp", "png"):
        first.save(
            f"a5.{suffix}", save_all=True, append_images=others, **{"lossless": True} if suffix == "webp" else {}
        )
        first.save(f"a4.{suffix}", save_all=True, append_images=others[:3])
    os.mkdir("frames")
    for i, frame in enumerate(stills(5)):
        frame.save(f"frames/{i}.png")
    os.mkdir("full")
    Path("full/content").touch()
    Path("immutable.png").touch()
    first.save(f"{'n' * 250}.png")
    return tmp_path


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["-o", f"{'n' * 256}.png"], "longer than the 255 bytes"),
        (["-o", f"{'n' * 256}/"], "longer than the 255 bytes"),
        (["--query", f"{'n' * 250}.png", "-o", "grids/", "--grid"], "longer than the 255 bytes"),
        (["-o", "g.webp", "--grid", "--size", "16", "--repeats", "--pairs", "830"], "16383 pixels a side"),
        (["-o", "g.webp", "--grid", "--repeats", "--pairs", "250"], "16383 pixels a side"),
        (["-o", "g.jpg", "--grid", "--repeats", "--pairs", "1000"], "65500 pixels a side"),
        (["-o", "full/"], None),
        (["-o", "q.png/o.png"], "Not a directory"),
        (["-o", "o.png", "--save-context", f"{'n' * 256}.safetensors"], "longer than the 255 bytes"),
        (["-o", "o.png", "--save-context", "full"], "expected a name ending in .safetensors"),
        (["--query", "a5.gif", "--clip", "-o", "o.png"], "5 frames, the task's pairs are pictures"),
        (["--query", "frames", "--task", "video_depth", "-o", "out/"], "did you mean --clip"),
        (["--query", "a5.gif", "--task", "video_depth", "-o", "o.gif"], "did you mean --clip"),
        (["-o", "o.png", "--batch-size", "0"], "batch_size is 0"),
        (["-o", "o.png", "--guidance", "nan"], "guidance is nan"),
        (["-o", "o.png", "--posterior", "mode"], "invalid choice: 'mode'"),
        (["-o", "o.png", "--steps", "5"], "steps is 5"),
        (["-o", "o.png", "--seed", str(2**64)], "seed is"),
        (["-o", "o.png", "--impl", "fast"], "invalid choice: 'fast'"),
        (["-o", "o.png", "--dtype", "int8"], "invalid choice: 'int8'"),
    ],
)
def test_before_a_checkpoint_is_loaded(folder, monkeypatch, capsys, options, expected):
    loaded = []
    monkeypatch.setattr(lavin_rt.pipeline, "load_dit", lambda *_, **__: loaded.append(1))
    before = sorted(os.listdir())
    given = ["run", "--task", "depth", "--query", "q.png", "--pairs", "1", *options]
    if expected is None:  # files go into a folder with others
        monkeypatch.setattr(Pipeline, "task", lambda *_, **__: pytest.fail("not reached"))
        monkeypatch.setattr(lavin_rt.pipeline, "load_dit", lambda *_, **__: (_ for _ in ()).throw(MemoryError))
        assert main(given) == 1
        return
    assert exit_code(given) == 2 and not loaded
    assert expected in capsys.readouterr().err
    assert sorted(os.listdir()) == before  # not a folder more


@pytest.mark.parametrize("name", ["a4.gif", "a5.gif", "a4.webp", "a5.webp", "a4.png", "a5.png"])
def test_an_animation_given_as_a_picture_is_its_first_frame(folder, name):
    task = lavin_rt.Pipeline.from_pretrained().task("depth", pairs=1)
    first = Image.open(name).convert("RGB")
    plain = np.asarray(task(first, steps=4))
    assert np.array_equal(np.asarray(task(name, steps=4)), plain)
    assert main(["run", "--task", "depth", "--query", name, "-o", "o.png", "--steps", "4", "--pairs", "1", "-q"]) == 0
    assert np.abs(np.asarray(Image.open("o.png")).astype(int) - plain).max() <= 1


def test_an_animation_among_pictures_of_a_folder(folder):
    os.rename("a5.gif", "frames/9.gif")
    assert main(["run", "--task", "depth", "--query", "frames", "-o", "o/", "--steps", "4", "--pairs", "1", "-q"]) == 0
    assert len(os.listdir("o")) == 6
