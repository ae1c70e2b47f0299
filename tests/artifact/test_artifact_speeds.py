"""Speeds of artifacts: which are served, what their names mean, and what is refused before anything is loaded."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.checks import refusal
from support.command import exit_code, write_picture, write_template
from support.small_artifact import HELD, WEIGHT, add_parts, read_manifest, write_manifest

from lavin_export.writer import writing
from lavin_rt.artifact import load as artifact
from lavin_rt.artifact.manifest import Manifest
from lavin_rt.artifact.speeds import described, named_speeds, parsed_speeds
from lavin_rt.checkpoint.load import load_dit
from lavin_rt.dit.modulation import modulation_table
from lavin_rt.pipeline import Pipeline
from lavin_rt.sampling.schedule import schedule
from lavin_rt.sampling.speeds import SPEEDS, Speed

GRID = Speed(evaluations=5)
ON_A_SCHEDULE = Speed(guided={0, 9})


def answer(folder, speed):
    """Noise, and the latents that an artifact makes of it."""
    picture = torch.zeros(32, 48, 3, dtype=torch.uint8)
    noise = torch.randn(1, 16, 1, 4, 6, generator=torch.Generator().manual_seed(0))
    task = Pipeline.from_pretrained(folder, device="cpu").task([(picture, picture)], size=(32, 48))
    return noise, task.run([picture.numpy()], noise=noise, speed=speed)[0].latents


def test_a_speed_that_it_serves(sound):
    """Both branches have the velocity `WEIGHT * latents`, so that its grid alone decides."""
    noise, latents = answer(sound, HELD)
    factor = torch.prod(1 + WEIGHT * HELD.knots().diff().double())
    torch.testing.assert_close(latents, (factor * noise.double()).float(), rtol=1e-5, atol=1e-6)
    assert Manifest.read(sound).record()["speeds"] == ["exact", "held"]


def test_others_are_refused_with_the_list(sound):
    for speed, name in (("fast", "fast"), (Speed(evaluations=7), r"Speed(evaluations=7)")):
        assert f"has no speed {name}; it has exact, held: choose one of these" in refusal(answer, sound, speed)


def test_one_of_the_first_version_is_exact(folder):
    values = read_manifest(folder)
    del values["speeds"]
    write_manifest(folder, values)
    assert Manifest.read(folder).speeds == {"exact": Speed()}
    assert "it has exact: choose" in refusal(answer, folder, HELD)
    noise, latents = answer(folder, "exact")
    assert latents.shape == noise.shape


def test_another_meaning_of_a_name(folder):
    values = read_manifest(folder)
    write_manifest(folder, {**values, "speeds": {"fast": {"evaluations": 3}}})
    assert "it has exact, fast; its fast is another one than this package's" in refusal(answer, folder, "fast")


def test_a_table_of_other_knots(folder):
    values = read_manifest(folder)
    write_manifest(folder, {**values, "speeds": {"held": {"times": [0, 0.25, 0.75, 1]}}})
    assert "its 4 knots are not this package's" in refusal(answer, folder, Speed(times=(0, 0.25, 0.75, 1)))
    write_manifest(folder, {**values, "speeds": {"lost": {"evaluations": 6}}})
    assert "knots.speed.lost is None" in refusal(answer, folder, Speed(evaluations=6))


@pytest.mark.parametrize(
    ("speeds", "said"),
    [
        ([], "speeds is [], expected dict"),
        ({"Fast": {}}, "a speed is named 'Fast'"),
        ({"a": []}, "speed a is [], expected evaluations, times, refresh, guided"),
        ({"a": {"steps": 3}}, "expected evaluations, times, refresh, guided"),
        ({"a": {"evaluations": True}}, "evaluations is True, expected a whole number"),
        ({"a": {"evaluations": 3.0}}, "evaluations is 3.0, expected a whole number"),
        ({"a": {"evaluations": 0}}, "speed a: evaluations is 0; expected a whole number from 1"),
        ({"a": {"times": "01"}}, "times is '01', expected a list of numbers"),
        ({"a": {"times": [0, True]}}, "times is [0, True], expected a list of numbers"),
        ({"a": {"times": [0, 0.5]}}, "expected numbers increasing from 0 to 1"),
        ({"a": {"times": [0, 10**400]}}, "expected a list of numbers from 0 to 1"),
        ({"a": {"guided": [0, 1000]}}, "guided is [0, 1000], expected a list of whole numbers from 0 to 999"),
        ({"a": {"refresh": [0]}}, "it has the speed a, but no part denoiser_kept"),
        ({"a": {"times": [0, 1], "evaluations": 1}}, "expected one of them"),
        ({"a": {"guided": {"0": 0}}}, "guided is {'0': 0}, expected a list of whole numbers"),
        ({"a": {"guided": "task"}}, "guided is 'task', expected a list"),
        ({"a": {"guided": [0, 1.0]}}, "guided is [0, 1.0], expected a list"),
        ({"a": {"evaluations": 2, "guided": [0, 2]}}, "guided has evaluation 2, the grid has 2"),
        (
            {"a": {"refresh": "tasks"}},
            "refresh is 'tasks', expected a list of whole numbers from 0 to 999, or \"task\"",
        ),
        ({"exact": {"evaluations": 3}}, "speed exact is {'evaluations': 3}, expected {}"),
    ],
)
def test_manifests_that_contradict_themselves(folder, speeds, said):
    write_manifest(folder, {**read_manifest(folder), "speeds": speeds})
    message = refusal(Manifest.read, folder)
    assert said in message and message.endswith("export it again")


def test_only_of_given_frames_there_may_be_none(folder):
    values = read_manifest(folder)
    for size, fits in (("kept_frames", True), ("cond_frames", False)):
        values["parts"]["denoiser_kept"] = {**values["parts"]["denoiser"], "ranges": {size: [0, 4]}}
        write_manifest(folder, values)
        if fits:
            Manifest.read(folder)
        else:
            assert "part denoiser_kept has the ranges {'cond_frames': [0, 4]}" in refusal(Manifest.read, folder)


def test_definitions_come_back():
    every = {**SPEEDS, "grid": GRID, "some": ON_A_SCHEDULE}
    assert parsed_speeds({name: described(speed) for name, speed in every.items()}) == every
    assert named_speeds(["near", "exact"]) == {"exact": Speed(), "near": SPEEDS["near"]}
    for given, said in (
        (["quick"], "speed is 'quick'; expected one of exact, near, fast, fastest"),
        ("fast", "expected a list of names"),
        ({"Grid": GRID}, "a speed is named 'Grid'"),
        ({"grid": "fast"}, "speed grid is 'fast'; expected a Speed"),
        ({"exact": Speed(evaluations=4)}, "speed exact is Speed(evaluations=4"),
    ):
        assert said in refusal(named_speeds, given)


def test_writing(checkpoint, tmp_path):
    output, speeds = tmp_path / "artifact", {"grid": GRID, "some": ON_A_SCHEDULE, "held": HELD}
    with writing(output, "onnx", checkpoint, torch.float32, steps=(6, 20), speeds=speeds) as writer:
        add_parts(writer)
        writer.write_modulation()
    read = Manifest.read(output)
    assert read.speeds == {"exact": Speed(), **speeds} and next(iter(read.speeds)) == "exact"
    network = artifact.ArtifactNetwork(read, torch.device("cpu"), lambda: None)
    dit = load_dit(checkpoint.dit, dtype=torch.float32)
    for knots in (schedule(6), schedule(20), GRID.knots(), HELD.knots()):
        table = modulation_table(dit, knots[:-1])
        assert all(map(torch.equal, network.table(knots), (table.blocks, table.head_scale)))
    for speed in speeds.values():
        network.check_speed(speed)


def test_speeds_that_cannot_be_served(checkpoint, tmp_path):
    def refused(kind, speeds, **options):
        entered = writing(tmp_path / "artifact", kind, checkpoint, torch.float32, speeds=speeds, **options)
        message = refusal(entered.__enter__)
        assert not (tmp_path / "artifact").exists()
        return message

    assert "speed fast keeps keys and values of the context, which tensorrt artifacts do not" in refused(
        "tensorrt", ["fast"]
    )
    assert "guided has evaluation 9, the grid has 5" in refused("onnx", {"some": ON_A_SCHEDULE}, steps=(6,))
    assert "speed is 'quick'" in refused("onnx", ["quick"])


def test_the_commands(sound, tmp_path, monkeypatch, capsys):
    """Refused with the list before a file of the artifact is read, by everything that runs one."""
    monkeypatch.setattr(Manifest, "check_files", lambda *_: pytest.fail("its files are read"))
    query, task = write_picture(tmp_path / "query.png", 9), write_template(tmp_path / "pairs")
    place = ["--checkpoint", str(sound), "--speed", "fast"]
    commands = [
        ["run", *place, "--task", str(task), "--query", str(query), "-o", str(tmp_path / "out.png")],
        ["serve", *place, "--port", "0"],
        ["map", *place, "--task", str(task), "--queries", str(tmp_path), "-o", str(tmp_path / "out")],
    ]
    for command in commands:
        assert exit_code(command) == 2
        said = capsys.readouterr().err
        assert "has no speed fast; it has exact, held: choose one of these" in said and said.count("\n") == 1
    assert not (tmp_path / "out.png").exists() and not (tmp_path / "out").exists()
    assert exit_code(["export", "onnx", "--speed", "quick", "-o", str(tmp_path / "new")]) == 2
    assert "invalid choice: 'quick'" in capsys.readouterr().err


def test_keys_and_values_are_kept_in_no_file(sound):
    picture = torch.zeros(32, 48, 3, dtype=torch.uint8)
    task = Pipeline.from_pretrained(sound, device="cpu").task([(picture, picture)], size=(32, 48))
    assert "by their fingerprint, which an artifact does not have" in refusal(task.with_keys)
    assert "keeps no keys and values" in refusal(task._kept_keys)


def test_a_service_offers_what_the_artifact_has(sound):
    from lavin_rt.serve.service import Service

    service = Service(Pipeline.from_pretrained(sound, device="cpu"))
    assert service.speeds == ["exact"]
    name = next(iter(service.library._entries))
    assert "has no speed fast" in refusal(service.kind, name, None, 1.5, "fast")
    assert dataclasses.astuple(service.limits) and "has no speed near" in refusal(
        Service, service.pipeline, None, (), "near"
    )
