"""`lavin-rt bench quality`: what it asks, how it answers, and that its verdicts are those of known answers."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("embreex", reason="needs the extra train")
pytest.importorskip("trimesh", reason="needs the extra train")

from lavin_bench import report
from lavin_bench.pipeline.variants import CPU_VAE, QUICK_CONFIG, random_model, random_vae
from lavin_bench.quality import strangers as quality_strangers
from lavin_bench.quality import taught
from lavin_bench.quality.answers import Answered, Answers, Sampling
from lavin_bench.quality.bench import across_tasks, answer, context_record, run, task_record
from lavin_bench.quality.figures import border_steps, figures
from lavin_bench.quality.queries import CONTEXTS_FROM, Scenery, TaskQueries, alike, draw
from lavin_bench.quality.report import quality_table, summary
from lavin_bench.quality.sheet import context_sheet, tasks_sheet
from lavin_bench.timing import header
from lavin_rt.checkpoint.load import save_dit, save_vae
from lavin_rt.cli.main import main
from lavin_rt.errors import InputError
from lavin_rt.mini.world.sources import CLIPS_FROM, SCENE_SEEDS
from lavin_rt.mini.world.tasks import TASKS
from lavin_rt.pipeline import Pipeline

CPU, SIZE, SCENES = torch.device("cpu"), 32, 8
NAMES = ("depth_estimation", "panoptic_segmentation", "edge_detection", "object_detection", "denoising")
SHORT = Sampling(steps=4, batch=3)


@pytest.fixture(scope="module")
def drawn() -> list[TaskQueries]:
    return draw(SIZE, SCENES, 2, [TASKS[name] for name in NAMES], show=False)


@pytest.fixture(scope="module")
def clips() -> TaskQueries:
    return draw(SIZE, 2, 1, [TASKS["frame_prediction"]], show=False)[0]


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline(random_model(QUICK_CONFIG, CPU), random_vae(CPU_VAE, CPU), source="random", size=SIZE)


def answered(asked: TaskQueries, one: np.ndarray, two: np.ndarray | None = None, shuffled=None) -> Answered:
    """As if a pipeline had answered so with one pair and with two."""
    return Answered(asked, {1: one, 2: one if two is None else two}, shuffled, asked.targets)


def test_no_scene_of_a_query_is_in_a_context(monkeypatch):
    rendered: dict[str, set[int]] = {}

    def pictures(self, task, first, count):
        rendered.setdefault("contexts" if first >= CONTEXTS_FROM else "queries", set()).add((first, count))
        return original(self, task, first, count)

    original = Scenery.pictures
    monkeypatch.setattr(Scenery, "pictures", pictures)
    draw(16, 2, 1, [TASKS["depth_estimation"], TASKS["object_detection"]], show=False)
    assert {first for first, _ in rendered["queries"]} == {0}
    assert {first for first, _ in rendered["contexts"]} == {CONTEXTS_FROM}
    # Both kinds, of pictures and of clips, stay apart within the split whatever is asked for.
    assert len(SCENE_SEEDS["evaluation"]) > CLIPS_FROM + CONTEXTS_FROM and CONTEXTS_FROM < CLIPS_FROM


def test_tasks_of_the_same_pictures_are_asked_about_the_same_scenes(drawn):
    by_name = {asked.task.name: asked for asked in drawn}
    assert [asked.task.name for asked in alike(drawn)] == [
        "depth_estimation",
        "panoptic_segmentation",
        "edge_detection",
    ]
    for asked in drawn:
        photographs = 1 if asked.task.source == "any" else 0
        assert asked.scenes == SCENES and len(asked) == SCENES + photographs
        assert len({query.tobytes() for query in asked.queries}) == len(asked), "a query comes twice"
        assert not {query.tobytes() for query in asked.queries} & {pair[0].tobytes() for pair in asked.pool}
        assert all(len(set(row)) == 2 for row in asked.picks.tolist())
    assert np.array_equal(by_name["depth_estimation"].queries, by_name["edge_detection"].queries[:SCENES])


def test_families_are_asked_about_members_that_are_trained_and_that_are_not():
    """Every query has the context of its own member, shuffled or not, and both kinds ask about the same inputs."""
    task = TASKS["mask_colours"]
    trained, held_out = draw(SIZE, 5, 2, [task], show=False)
    assert (trained.name, held_out.name) == ("mask_colours", "mask_colours, held out")
    assert trained.members[0] is task.members[0] and not set(trained.members) & set(held_out.members)
    assert set(held_out.members) <= set(task.held_out) and np.array_equal(trained.queries, held_out.queries)
    for asked in (trained, held_out):
        assert len(asked.members) == 4

        def colours(pictures: np.ndarray) -> set[tuple[int, ...]]:
            return {tuple(colour) for colour in np.unique(pictures.reshape(-1, 3), axis=0).tolist()}

        for item, rows in enumerate(asked.picks):
            of_query = colours(asked.targets[item])
            assert len(of_query) == 2
            for context in (rows, asked.partner(rows)):
                assert colours(asked.pool[context, 1]) == of_query
            assert not set(rows) & set(asked.partner(rows))
    record, _ = task_record(answered(held_out, held_out.targets))
    assert record["held_out"] and len(record["members"]) == 4 and record["clear"]


def test_steps_at_borders_of_patches():
    """1 where nothing is special about borders; more where patches are shifted against each other."""
    smooth = np.add.outer(np.arange(64), np.arange(64))[None, None, ..., None].repeat(3, axis=-1).astype(np.uint8)
    assert border_steps(smooth) == [1, 0]
    shifted = smooth + 4 * (np.arange(64) // 16).astype(np.uint8)[:, None]
    assert border_steps(shifted) == [3, 0]  # steps of 5 instead of 1 across half of the borders
    assert border_steps(np.concatenate([smooth, shifted])) == [2, 12.7062]  # of two pictures, Student's t
    assert border_steps(np.zeros_like(smooth)) is None


def test_drawing_again_gives_the_same_and_more_pairs_begin_with_fewer(drawn):
    task = TASKS["denoising"]
    first = next(asked for asked in drawn if asked.task is task)
    [again] = draw(SIZE, SCENES, 2, [task], show=False)
    [other] = draw(SIZE, SCENES, 2, [task], seed=1, show=False)
    assert np.array_equal(first.queries, again.queries) and np.array_equal(first.picks, again.picks)
    assert not np.array_equal(first.queries, other.queries)
    row = first.picks[0]
    assert np.array_equal(first.context_means(1)[0], first.pool[row[0], 1])
    mean = first.pool[row, 1].astype(float).mean(0)
    assert np.abs(first.context_means(2)[0] - mean).max() <= 0.5


@pytest.mark.parametrize("shuffled", [False, True])
def test_answers_are_those_of_a_task_of_the_pipeline(drawn, pipe, shuffled):
    """In batches, each query with its own context, as `Pipeline.task` gives one by one."""
    asked = drawn[0]
    with torch.no_grad():
        results = Answers(pipe, asked, SHORT).results(2, shuffled)
    for item in (0, 2, 7):
        rows = asked.picks[item]
        shown = asked.pool[asked.partner(rows) if shuffled else rows, 1, 0]
        task = pipe.task(list(zip(asked.pool[rows, 0, 0], shown, strict=True)))
        [result] = task.run([asked.queries[item, 0]], steps=4, seed=item)
        assert (result.frames.permute(0, 2, 3, 1).int() - torch.from_numpy(results[item]).int()).abs().max() <= 1


def test_clips_are_answered(clips, pipe):
    with torch.no_grad():
        found = answer(pipe, clips, [1], SHORT, lambda count: None)
    task = pipe.task([(clips.pool[clips.picks[1, 0], 0], clips.pool[clips.picks[1, 0], 1])])
    [result] = task.run([clips.queries[1]], steps=4, seed=1)
    assert found.shuffled is None and found.results[1].shape == clips.targets.shape
    assert (result.frames.permute(0, 2, 3, 1).int() - torch.from_numpy(found.results[1][1]).int()).abs().max() <= 1


def test_right_answers_beat_both_yardsticks_and_the_yardsticks_do_not(drawn):
    for asked in drawn:
        right, _ = task_record(answered(asked, asked.targets))
        assert right["clear"], right
        name = right["measures"][0]["name"]
        copied, _ = task_record(answered(asked, asked.queries))
        assert copied["pairs"][-1]["better_than"]["copy"][name] == [0, 0] and not copied["clear"]
        averaged, _ = task_record(answered(asked, asked.context_means(2)))
        assert averaged["pairs"][-1]["better_than"]["mean"][name] == [0, 0] and not averaged["clear"]
        assert averaged["pairs"][0]["better_than"]["mean"][name] != [0, 0]  # of one pair it is another picture


def test_differences_are_paired_and_point_the_right_way(drawn):
    """Results better by a known amount for every query: the interval has no width."""
    asked = next(asked for asked in drawn if asked.task.name == "denoising")
    clean, noise = (
        asked.targets.astype(int).clip(60, 180),
        np.random.default_rng(0).choice([-1, 1], asked.targets.shape),
    )
    known = TaskQueries(asked.task, asked.pool, asked.picks, asked.queries, np.uint8(clean), asked.scenes)
    far, near = (np.uint8(clean + amount * noise) for amount in (40, 4))
    record, found = task_record(answered(known, far, near, shuffled=far), exact=answered(known, near, far))
    assert record["more_pairs"]["PSNR"] == pytest.approx([20, 0], abs=1e-4)
    assert record["shuffled"]["better_than_right"]["PSNR"] == pytest.approx([-20, 0], abs=1e-4)
    assert [row["better_than_exact"]["PSNR"][0] for row in record["pairs"]] == pytest.approx([-20, 20], abs=1e-4)
    across = across_tasks([record], [found])
    assert across["more_pairs"] == pytest.approx([20, 0], abs=1e-4)
    assert across["shuffled_minus_right"] == pytest.approx([-20, 0], abs=1e-4)


def test_the_confusion_tells_which_task_was_done(drawn):
    group = alike(drawn)
    right = [answered(asked, asked.targets) for asked in group]
    done = context_record(right)
    assert done["matrix"] == (SCENES * np.eye(3, dtype=int)).tolist() and done["chance"] == pytest.approx(1 / 3)
    assert done["nearest_to_right"]["2"] == [1, 0]
    # A model that reads no context does depth whatever it is shown.
    blind = [answered(asked, np.resize(group[0].targets, asked.targets.shape)) for asked in group]
    assert context_record(blind)["matrix"] == [[SCENES, 0, 0]] * 3
    assert context_record(blind)["nearest_to_right"]["2"][0] == pytest.approx(1 / 3, abs=1e-5)
    assert context_record(right[:1]) is None and context_sheet(right[:1]) is None


def test_a_pipeline_against_itself_makes_no_difference(drawn, pipe):
    with torch.no_grad():
        record, found = run(pipe, drawn[:3], [1, 2], SHORT, exact=pipe, show=False)
    for task in record["tasks"]:
        assert all(change == [0, 0] for row in task["pairs"] for change in row["better_than_exact"].values())
        assert "shuffled" in task and "more_pairs" in task
    assert json.loads(json.dumps(record)) == record
    text = quality_table(record)
    assert report.render(record) == text and "positive is better" in text
    assert all(name in text for name in NAMES[:3]) and text.count("\n\n|") == 3
    task = record["tasks"][0]
    name = task["measures"][0]["name"]
    task["shuffled"]["better_than_right"][name] = [-0.3, 0.2]
    assert f"clearly worse: {task['task']} ({name} -0.300 ± 0.200)" in quality_table(record)
    assert "Against random in float32" in "\n".join(summary(record))
    assert tasks_sheet(found).width > context_sheet(found).width > 300


def test_what_a_pipeline_cannot_run_is_named(clips, drawn, pipe, monkeypatch):
    original = Answers.results

    def results(self, *arguments, **options):
        if self.asked.task.is_clip:
            raise InputError("takes clips of 1 frames, not 5")
        return original(self, *arguments, **options)

    monkeypatch.setattr(Answers, "results", results)
    with torch.no_grad():
        record, _ = run(pipe, [clips, drawn[0]], [1], SHORT, show=False)
        assert record["skipped"] == [{"task": "frame_prediction", "reason": "takes clips of 1 frames, not 5"}]
        assert "Skipped: frame_prediction" in quality_table(record)
        with pytest.raises(InputError, match="no task could be run"):
            run(pipe, [clips], [1], SHORT, show=False)


def test_figures_of_the_target_are_perfect(drawn):
    for asked in drawn:
        assert figures(asked, asked.targets)["fidelity"].min() == pytest.approx(100)


def test_a_stranger_is_answered_as_the_pairs_say(tmp_path, monkeypatch):
    """By a model that knows the mapping, and by one that copies; both through the pictures on disk."""
    mapping, asked = (quality_strangers.as_grey, quality_strangers.inverted), []

    def run_command(steps: tuple[quality_strangers.Mapping, ...], arguments: list[str]) -> int:
        folder, queries = Path(arguments[2]), arguments[arguments.index("--query") + 1 :]
        asked.append((len(list(folder.iterdir())), len(queries)))
        for query in queries:
            picture = np.asarray(Image.open(query))
            out = Path(arguments[arguments.index("-o") + 1]) / Path(query).name
            out.parent.mkdir(exist_ok=True)
            Image.fromarray(quality_strangers.mapped(steps, picture)).save(out)
        return 0

    found = []
    for steps in (mapping, ()):
        monkeypatch.setattr(quality_strangers, "lavin_rt", functools.partial(run_command, steps))
        found.append(quality_strangers.ask(mapping, 2, 3, SIZE, 0, tmp_path / str(len(found))))
    assert asked == [(10, 8)] * 4
    knowing, copying = found
    assert knowing["model"] == 100 and knowing["own_target_nearest"] == 1 and knowing["copy"] == copying["model"]
    assert copying["better_than"]["copy"] == [0, 0] and knowing["queries"] == 6 and knowing["pairs_asked"] == 10
    rows = [{"mapping": "grey, then inverted", "kind": quality_strangers.COMPOSED, **row} for row in found]
    text = report.render({"kind": "strangers", "header": {**header(), "dtype": "float32"}, "rows": rows})
    assert text.count("**both**") == 1 and "composition" in text


@pytest.mark.slow
def test_a_mapping_is_taught_and_asked_for(tmp_path, capsys):
    """Two steps teach nothing, but move the answers."""
    output = tmp_path / "taught.json"
    command = ["--steps", "2", "--queries", "2", "--size", "32", "--export", "--threads", "1"]
    assert taught.main([*command, "--json", str(output)]) == 0
    record = json.loads(output.read_text())
    assert record["better_than"]["before"][0] != 0 and record["apart"] == {}
    shown = capsys.readouterr().out
    assert "12 pairs, 2 steps of rank 16" in shown and report.render(record) in shown + "\n"
    assert taught.main(["--queries", "1"]) == 2 and "--queries is 1" in capsys.readouterr().err


@pytest.mark.parametrize("command", [quality_strangers.main, taught.main])
def test_what_cannot_be_is_refused_before_anything_is_asked(command, tmp_path, capsys):
    assert command(["--size", "50"]) == 2 and "--size is 50; expected" in capsys.readouterr().err
    assert command(["--json", str(tmp_path)]) == 2 and str(tmp_path) in capsys.readouterr().err
    assert command(["--queries", "0"]) == 2 and "--queries is 0; expected" in capsys.readouterr().err
    assert command(["--seed", "-1"]) == 2 and "--seed is -1; expected" in capsys.readouterr().err


def test_command(tmp_path, pipe, capsys):
    folder, output = tmp_path / "checkpoint", tmp_path / "out" / "quality.json"
    folder.mkdir()
    save_dit(random_model(QUICK_CONFIG, CPU), folder / "lavin_dit.safetensors")
    save_vae(pipe.vae, folder / "stvae.safetensors")
    command = ["bench", "quality", "--checkpoint", str(folder), "--device", "cpu", "--size", "32", "--steps", "4"]
    command += ["--tasks", "depth_estimation", "normal_estimation", "--quick"]
    assert main([*command, "--dtype", "bfloat16", "--against", "-o", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "depth_estimation" in printed and "of 2 trained tasks" in printed and "positive is better" in printed
    record = json.loads(output.read_text())
    assert record["header"]["dtype"] == "bfloat16" and record["exact"]["dtype"] == "float32"
    changes = [row["better_than_exact"]["AbsRel"][0] for row in record["tasks"][0]["pairs"]]
    assert all(0 < abs(change) < 1 for change in changes)
    for suffix in ("", "-context"):
        assert output.with_name(f"quality{suffix}.png").read_bytes()[1:4] == b"PNG"
    for wrong, message in (
        (["--scenes", "1"], "--scenes is 1; expected at least 2"),
        (["--tasks", "nosuch"], "unknown task 'nosuch'"),
        (["--size", "40"], "--size is 40; expected a positive multiple of 16"),
    ):
        assert main([*command, *wrong]) == 2
        assert message in capsys.readouterr().err
