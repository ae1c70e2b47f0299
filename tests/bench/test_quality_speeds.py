"""`lavin-rt bench quality --speed`: judgement on known answers, and a record that grows task by task."""

from __future__ import annotations

import copy
import json
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

pytest.importorskip("embreex", reason="needs the extra train")
pytest.importorskip("trimesh", reason="needs the extra train")

from lavin_bench import report
from lavin_bench.pipeline.variants import CPU_VAE, QUICK_CONFIG, random_model, random_vae
from lavin_bench.quality import speeds
from lavin_bench.quality.answers import Sampling
from lavin_bench.quality.figures import figures
from lavin_bench.quality.queries import TaskQueries, draw
from lavin_bench.quality.speeds import run_speeds, speed_row
from lavin_bench.quality.speeds_report import HEIGHT, front, verdict
from lavin_rt.mini.world.tasks import TASKS
from lavin_rt.pipeline import Pipeline
from lavin_rt.sampling.speeds import SPEEDS

NAMES = ("edge_detection", "inpainting", "orientation")


@pytest.fixture(scope="module")
def drawn() -> list[TaskQueries]:
    return draw(32, 4, 2, [TASKS[name] for name in NAMES], show=False)


@pytest.fixture(scope="module")
def saved(drawn) -> list[dict]:
    """The record after every task."""
    cpu = torch.device("cpu")
    pipe = Pipeline(random_model(QUICK_CONFIG, cpu), random_vae(CPU_VAE, cpu), source="random", size=32)
    kept: list[dict] = []
    run_speeds(pipe, drawn, 2, Sampling(steps=4), ["fast"], lambda record: kept.append(copy.deepcopy(record)))
    return kept


def test_a_record_is_kept_after_every_task(saved):
    assert [[task["task"] for task in record["tasks"]] for record in saved] == [
        ["edge_detection"],
        ["edge_detection", "inpainting"],
        ["edge_detection", "inpainting", "orientation"],
        ["edge_detection", "inpainting", "orientation", "orientation, held out"],
    ]
    for record in saved:
        text = report.render(json.loads(json.dumps(record)))
        assert all(task["task"] in text for task in record["tasks"])


def test_a_speed_is_judged_by_what_it_loses_at_worst(drawn):
    asked = drawn[0]
    right = np.clip(asked.targets.astype(np.int16) + 2, 0, 255).astype(np.uint8)
    exact = figures(asked, right)
    same = speed_row(asked, SPEEDS["near"], right, right, exact)
    assert same["within"] and same["worst_loss"] == 0
    noise = np.random.default_rng(0).integers(-90, 90, right.shape)
    worse = speed_row(asked, SPEEDS["near"], np.clip(right + noise, 0, 255).astype(np.uint8), right, exact)
    assert not worse["within"] and worse["worst_loss"] > 0.1 and worse["psnr_to_exact"] < 40
    many = speed_row(drawn[1], SPEEDS["near"], drawn[1].targets, drawn[1].targets, figures(drawn[1], drawn[1].targets))
    assert "within" not in many


def test_tasks_that_the_model_does_are_told_from_others(saved):
    record = copy.deepcopy(saved[-1])
    tasks = {task["task"]: task for task in record["tasks"]}
    assert not any(task["clear"] for task in tasks.values()), "random weights do no task"
    tasks["edge_detection"]["clear"] = True
    for name, within in (("edge_detection", False), ("orientation", True), ("orientation, held out", True)):
        tasks[name]["rows"][1] |= {"within": within, "worst_loss": 0.25, "psnr_to_exact": 31.0}
    done, others = verdict(record)
    assert "clearly better" in done and "0 of 1 within" in done and "fast in edge_detection (25.0%, 31.0 dB)" in done
    assert "does not do" in others and "2 of 2 within their bounds." in others


def test_the_legend_has_room_for_every_task(saved):
    record = copy.deepcopy(saved[-1])
    record["tasks"] = [{**record["tasks"][0], "task": f"task {index}", "clear": True} for index in range(40)]
    root = ElementTree.fromstring(front(record))
    lowest = max(float(part.get("y")) for part in root.iter() if part.tag.endswith("text"))
    assert HEIGHT < lowest < float(root.get("height"))
    empty = front({**record, "tasks": [{**record["tasks"][0], "clear": False}]})
    assert float(ElementTree.fromstring(empty).get("height")) == HEIGHT


def test_unknown_speeds_are_named():
    with pytest.raises(speeds.InputError, match="--speed has 'slow'; expected some of exact, near, fast, fastest"):
        speeds.known_speeds(["fast", "slow"])
