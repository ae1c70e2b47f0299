"""The checkpoint and the templates that ship with the package."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import lavin_rt.mini
from lavin_rt.checkpoint.load import load_dit, load_vae
from lavin_rt.mini.world.measures import MEASURES, measure
from lavin_rt.mini.world.tasks import TASKS
from lavin_rt.pictures.context import find_task, read_template
from lavin_rt.pictures.images import load_clip
from lavin_rt.pipeline import Pipeline

FOLDER = Path(lavin_rt.mini.__file__).parent
WEIGHTS, TEMPLATES = FOLDER / "weights", FOLDER / "template"
MEGABYTE = 1_000_000


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    dit = load_dit(WEIGHTS / "lavin_dit.safetensors", dtype=torch.float32, strict=True)
    vae = load_vae(WEIGHTS / "stvae.safetensors", dtype=torch.float32, strict=True)
    return Pipeline(dit, vae)


def test_the_weights_are_half_precision_and_small():
    files = sorted(WEIGHTS.glob("*.safetensors"))
    assert [file.name for file in files] == ["lavin_dit.safetensors", "stvae.safetensors"]
    sizes = [file.stat().st_size for file in files]
    assert max(sizes) <= 30 * MEGABYTE and sum(sizes) <= 36 * MEGABYTE
    dit, vae = load_dit(files[0], strict=True), load_vae(files[1], strict=True)
    assert dit.dtype == vae.dtype == torch.float16
    assert dit.config.kv_group > 1 and vae.config.norm_num_groups == 32
    for network in (dit, vae):
        assert all(parameter.isfinite().all() for parameter in network.parameters())


def test_every_task_has_templates_that_differ():
    assert {path.name for path in TEMPLATES.iterdir()} == set(TASKS)
    for task in TASKS.values():
        pairs = read_template(TEMPLATES / task.name)
        assert len(pairs) == 8
        clips = [load_clip(source) for pair in pairs for source in (pair.input, pair.target)]
        assert {tuple(clip.shape) for clip in clips} == {(5 if task.is_clip else 1, 3, 64, 64)}
        assert len({clip.numpy().tobytes() for clip in clips[0::2]}) == len(pairs)


@pytest.mark.parametrize(
    ("short", "name"),
    [("depth", "depth_estimation"), ("normal", "normal_estimation"), ("panoptic", "panoptic_segmentation")],
)
def test_short_names_of_tasks(short: str, name: str):
    assert find_task(short, [TEMPLATES]).name == name


@pytest.mark.parametrize("name", ["depth_estimation", "normal_estimation", "denoising", "hue"])
def test_the_model_does_the_task_that_the_context_shows(pipe: Pipeline, name: str):
    """On the template's other pairs, better on average than both yardsticks; what it is worth, the benchmark says."""
    task, pairs = TASKS[name], read_template(TEMPLATES / name)
    context = [(pair.input, pair.target) for pair in pairs[:2]]
    answer = pipe.task(context, size=(64, 64))
    pictures = {role: [np.asarray(Image.open(getattr(p, role))) for p in pairs] for role in ("input", "target")}
    mean = np.uint8(np.mean(pictures["target"][:2], axis=0))
    deciding = MEASURES[task.measure][0]
    gains = []
    for query, target in zip(pictures["input"][2:], pictures["target"][2:], strict=True):
        figures = [measure(task, np.asarray(answer(query)), target)[deciding.name]]
        figures += [measure(task, simple, target)[deciding.name] for simple in (query, mean)]
        gains.append([deciding.better(figures[0], simple) for simple in figures[1:]])
    assert (np.mean(gains, axis=0) > 0).all()
