"""The native runner, built with CMake: the same numbers as Python from the same artifact, one line where it cannot."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import struct
import subprocess
import zlib
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support.aoti_artifact import SPEEDS, artifact, changed, pipeline_cases
from support.golden import relative_error

from lavin_rt.pictures import context as contexts
from lavin_rt.pipeline import Pipeline

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    return artifact(tmp_path_factory)


@pytest.fixture(scope="session")
def native(native_build) -> Callable[..., subprocess.CompletedProcess]:
    """`native(*arguments)` runs the program."""

    def run(*arguments: object) -> subprocess.CompletedProcess:
        words = [str(native_build / "lavin-native"), *map(str, arguments)]
        return subprocess.run(words, capture_output=True, text=True, timeout=300)

    return run


def refused(done: subprocess.CompletedProcess) -> str:
    """The one line that a program which refused its input leaves."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("lavin-native: error: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


def write_picture(frame: torch.Tensor, path: Path) -> Path:
    Image.fromarray(frame.permute(1, 2, 0).contiguous().numpy()).save(path)
    return path


def read_picture(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1).int()


@pytest.fixture(scope="session")
def tasks(tmp_path_factory) -> list[dict]:
    """The golden pipeline runs on disk as PNG, and the arguments that give the golden order of the pairs."""
    made = []
    for number, case in enumerate(pipeline_cases()):
        folder = tmp_path_factory.mktemp(f"task{number}")
        (folder / "task").mkdir()
        for index, pair in enumerate(case["context"]):
            for role, frame in zip(("input", "target"), pair, strict=True):
                write_picture(frame, folder / "task" / f"{index}_{role}.png")
        write_picture(case["query"], folder / "query.png")
        save_file({"noise": case["noise"]}, folder / "noise.safetensors")
        pairs = contexts.read_template(folder / "task")
        seed = next(s for s in range(10**5) if contexts.choose_pairs(pairs, len(pairs), s) == pairs)
        height, width = case["size"].tolist()
        arguments = ["--task", folder / "task", "--pairs", len(pairs), "--seed", seed, "--size", f"{height}x{width}"]
        arguments += ["--guidance", case["cfg_scale"].item(), "--query", folder / "query.png"]
        made.append({"folder": folder, "arguments": arguments, "seed": seed, **case})
    return made


def test_golden_pipelines(native, compiled, tasks, tmp_path):
    for task in tasks:
        done = native(
            "--artifact", compiled, *task["arguments"], "--noise", task["folder"] / "noise.safetensors",
            "--save-latents", tmp_path / "latents.safetensors", "-o", tmp_path / "out.png",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert relative_error(load_file(tmp_path / "latents.safetensors")["latents"], task["latents"]) < 1e-4
        assert (read_picture(tmp_path / "out.png") - task["image"].int()).abs().max() <= 1


def test_seed_and_encoded_context_as_in_python(native, compiled, tasks, tmp_path):
    """Noise from a seed, a context that Python encoded, another schedule."""
    pipe, task = Pipeline.from_pretrained(compiled, device="cpu"), tasks[0]
    size = tuple(task["size"].tolist())
    python = pipe.task(task["folder"] / "task", pairs=2, size=size, seed=task["seed"])
    python.context.save(tmp_path / "context.safetensors")
    query = task["folder"] / "query.png"
    for seed in (0, 2**64 - 1, -5):
        done = native(
            "--artifact", compiled, "--task", tmp_path / "context.safetensors", "--query", query,
            f"--seed={seed}", "--steps", 6, "--save-latents", tmp_path / "latents.safetensors",
            "-o", tmp_path / "out.png", "--threads", 1,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        result = python.run([query], steps=6, seed=seed)[0]
        assert relative_error(load_file(tmp_path / "latents.safetensors")["latents"], result.latents) < 1e-5
        assert (read_picture(tmp_path / "out.png") - result.frames[0].int()).abs().max() <= 1


@pytest.mark.parametrize("name", SPEEDS)
def test_speeds_as_in_python(native, compiled, tasks, tmp_path, name):
    pipe, task = Pipeline.from_pretrained(compiled, device="cpu"), tasks[0]
    python = pipe.task(task["folder"] / "task", pairs=2, size=(32, 48), seed=task["seed"])
    python.context.save(tmp_path / "context.safetensors")
    query = task["folder"] / "query.png"
    for guidance in (1.5, 1.0):
        done = native(
            "--artifact", compiled, "--task", tmp_path / "context.safetensors", "--query", query, "--speed", name,
            "--guidance", guidance, "--repeat", 2, "--save-latents", tmp_path / "latents.safetensors",
            "-o", tmp_path / "out.png", "--threads", 1,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        result = python.run([query], speed=SPEEDS[name], guidance=guidance)[0]
        assert relative_error(load_file(tmp_path / "latents.safetensors")["latents"], result.latents) < 1e-5


def test_pairs_are_chosen_as_in_python(native, compiled, tasks, tmp_path):
    """One pair of four: the latents are those of the pair that Python chooses by the same seed."""
    task = tasks[1]
    pipe = Pipeline.from_pretrained(compiled, device="cpu")
    arguments = ["--task", task["folder"] / "task", "--pairs", 1, "--size", 32, "--query", task["folder"] / "query.png"]
    for seed in (3, 4):
        expected = pipe.task(task["folder"] / "task", pairs=1, size=32, seed=seed)
        result = expected.run([task["folder"] / "query.png"], steps=6, seed=seed)[0]
        done = native(
            "--artifact", compiled, *arguments, "--seed", seed, "--steps", 6,
            "--save-latents", tmp_path / "latents.safetensors", "-o", tmp_path / "out.png", "-q",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert relative_error(load_file(tmp_path / "latents.safetensors")["latents"], result.latents) < 1e-5


def test_pictures_are_read_as_in_python(native, compiled, tasks, tmp_path):
    """Greyscale, palette, 16-bit and transparent PNG, resized: the query's latents decide the result."""
    generator = np.random.default_rng(0)
    rgba = Image.fromarray(generator.integers(0, 256, (37, 53, 4), dtype=np.uint8), "RGBA")
    kinds = {
        "grey.png": rgba.convert("L"),
        "rgba.png": rgba,
        "la.png": rgba.convert("LA"),
        "palette.png": rgba.convert("RGB").quantize(50),
        "grey16.png": Image.fromarray(generator.integers(0, 65536, (37, 53), dtype=np.uint16)),
        "bits.png": rgba.convert("1"),
    }
    pipe, task = Pipeline.from_pretrained(compiled, device="cpu"), tasks[0]
    python = pipe.task(task["folder"] / "task", pairs=2, size=(32, 48), seed=task["seed"])
    python.context.save(tmp_path / "context.safetensors")
    for name, picture in kinds.items():
        picture.save(tmp_path / name)
        done = native(
            "--artifact", compiled, "--task", tmp_path / "context.safetensors", "--query", tmp_path / name,
            "--steps", 6, "--guidance", 1, "--save-latents", tmp_path / "latents.safetensors",
            "-o", tmp_path / "out.png",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        result = python.run([tmp_path / name], steps=6, guidance=1.0)[0]
        assert relative_error(load_file(tmp_path / "latents.safetensors")["latents"], result.latents) < 1e-5, name


def test_broken_pictures(native, tasks, tmp_path):
    whole = (tasks[1]["folder"] / "query.png").read_bytes()
    huge = whole[:16] + struct.pack(">II", 20_000, 20_000) + whole[24:29]
    huge += struct.pack(">I", zlib.crc32(huge[12:])) + whole[33:]
    cases = {whole[:20]: "truncated", whole[:-40]: "truncated", huge: "too many pixels", whole[4:]: "expected PNG"}
    for content, said in cases.items():
        (tmp_path / "query.png").write_bytes(content)
        arguments = [*tasks[1]["arguments"], "--query", tmp_path / "query.png"]  # the last one counts
        assert said in refused(native("--artifact", "nowhere", *arguments, "-o", tmp_path / "out.png"))


def test_help_version_and_times(native, compiled, tasks, tmp_path):
    assert "exit codes" in native("--help").stdout
    assert re.match(r"lavin-native \d+\.\d+\.\d+, torch \d", native("--version").stdout)
    task = tasks[1]
    done = native(
        "--artifact", compiled, *task["arguments"], "-o", tmp_path / "out.png", "--time", "--repeat", 2, "--threads", 1
    )
    times = json.loads(done.stdout)
    assert done.stderr == ""
    assert times["threads"] == 1
    assert len(times["sampling"]) == len(times["query"]) == 2
    assert all(0 < sampling < query for sampling, query in zip(times["sampling"], times["query"], strict=True))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"--steps": "8"}, "has the schedules of 20, 6"),
        ({"--speed": "near"}, "has no speed near; it has exact, fastest, official20_held"),
        ({"--speed": "fastest", "--steps": "20"}, "speed fastest has a grid of its own, --steps is 20"),
        ({"--speed": "official20_held", "--steps": "6"}, "guided has evaluation 16, the grid has 5: 0 to 4"),
        ({"--size": "40"}, "multiples of 16"),
        ({"--pairs": "9"}, "4 are there"),
        ({"--pairs": "some"}, "--pairs is some; expected a whole number"),
        ({"--guidance": "nan"}, "--guidance is nan"),
        ({"--seed": "1.5"}, "--seed is 1.5"),
        ({"--query": "nowhere.png"}, "nowhere.png: No such file"),
        ({"--query": str(Path(__file__))}, "not a picture"),
        ({"--task": "nowhere"}, "no such folder"),
        ({"--output": "out.tga"}, "cannot write .tga"),
        ({"--output": "/proc/nowhere/out.png"}, "cannot be written"),
        ({"--device": "tpu"}, "--device: tpu not in {cpu,cuda}"),
        ({"--device": "cuda"}, "exported for cpu"),
        ({"--artifact": "nowhere"}, "expected the manifest of an artifact"),
        ({"--noise": str(Path(__file__))}, "not a sound safetensors file"),
        ({"--threads": "0"}, "--threads is 0; expected a whole number from 1 to 4096"),
        ({"--what": "x"}, "arguments were not expected: "),
    ],
)
def test_bad_input_is_one_line(native, compiled, tasks, tmp_path, change, said):
    words = list(map(str, tasks[1]["arguments"]))
    given = dict(zip(words[::2], words[1::2], strict=True))
    given |= {"--artifact": str(compiled), "--output": str(tmp_path / "out.png"), **change}
    assert said in refused(native(*(word for pair in given.items() for word in pair)))
    assert not (tmp_path / "out.png").exists()


def test_options_that_are_missing(native):
    assert "--artifact is required; see lavin-native --help" in refused(native())
    assert "--query: 1 required PICTURE missing" in refused(native("--artifact", "a", "--query"))


def test_libraries_that_are_missing(configure, tmp_path):
    done = configure(tmp_path, "-DCMAKE_DISABLE_FIND_PACKAGE_PNG=1", "-DCMAKE_DISABLE_FIND_PACKAGE_CLI11=1")
    assert done.returncode != 0
    assert re.search("lavin-native lacks .*: apt-get install libcli11-dev libpng-dev", done.stderr)


def corrupted(name: str, keep: int | None) -> Callable[[Path, dict], None]:
    """Cuts a file of an artifact to `keep` bytes, or changes its last one."""

    def change(folder: Path, values: dict) -> None:
        content = bytearray((folder / name).read_bytes())
        content[-1] ^= 1
        (folder / name).write_bytes(content if keep is None else content[:keep])

    return change


def without_weights(folder: Path, values: dict) -> None:
    values["parts"]["denoiser"]["weights"] = []


def with_foreign(**entries: object) -> Callable[[Path, dict], None]:
    return lambda folder, values: values.update(entries)


def without_inputs(folder: Path, values: dict) -> None:
    del values["parts"]["denoiser"]["inputs"]


def without_kept(folder: Path, values: dict) -> None:
    del values["parts"]["denoiser_kept"]


def with_half_a_size(folder: Path, values: dict) -> None:
    values["parts"]["denoiser"]["ranges"]["height"] = [1, 8.5]


def outside(folder: Path, values: dict) -> None:
    values["files"]["../denoiser.pt2"] = values["files"]["denoiser.pt2"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without_weights, "its weights are not all there"),
        (corrupted("denoiser.pt2", 1000), "cannot be loaded"),
        (corrupted("vae_decoder.weights.safetensors", 5000), "truncated"),
        (corrupted("vae_decoder.weights.safetensors", 4), "no header"),
        (without_inputs, "(/parts/denoiser) key 'inputs' not found"),
        (with_half_a_size, "expected a whole number, not 8.5"),
        (with_foreign(size=512.0), "expected a whole number, not 512.0"),
        (with_foreign(schedules={"20": 20}), "expected a list of whole numbers"),
        (with_foreign(kind="onnx"), "this program runs aoti"),
        (with_foreign(speeds=[]), "speeds is no object"),
        (with_foreign(speeds={"Fast": {}}), "a speed is named Fast"),
        (with_foreign(speeds={"a": {"steps": 3}}), "a speed has steps"),
        (with_foreign(speeds={"a": {"evaluations": 3.0}}), "expected a whole number, not 3.0"),
        (with_foreign(speeds={"a": {"times": [0, 0.5]}}), "no list of numbers increasing from 0 to 1"),
        (with_foreign(speeds={"a": {"refresh": [1]}}), "a set of evaluations lacks 0"),
        (with_foreign(speeds={"a": {"refresh": "tasks"}}), "refresh is tasks"),
        (with_foreign(speeds={"a": {"evaluations": 2, "guided": [0, 2]}}), "guided has evaluation 2, the grid has 2"),
        (with_foreign(speeds={"exact": {"guided": [0]}}), "its speed exact is another one"),
        (without_kept, "it has the speed fastest, but no part denoiser_kept"),
        (with_foreign(version=2), "its version is another one"),
        (with_foreign(format="else"), "not of a lavin-rt artifact"),
        (with_foreign(versions={"torch": "1.0.0"}), "compiled for torch 1.0.0"),
        (outside, "no plain one"),
    ],
)
def test_faults_that_hashes_do_not_show(native, compiled, tasks, tmp_path, change, said):
    """Weights that are missing would crash a package: the runner says so instead."""
    folder = changed(compiled, tmp_path / "artifact", change)
    task = tasks[1]
    assert said in refused(native("--artifact", folder, *task["arguments"], "-o", tmp_path / "out.png"))


def test_other_files_than_were_exported(native, compiled, tasks, tmp_path):
    folder = tmp_path / "artifact"
    shutil.copytree(compiled, folder)
    task = tasks[1]

    def said() -> str:
        return refused(native("--artifact", folder, *task["arguments"], "-o", tmp_path / "out.png"))

    corrupted("vae_encoder.pt2", None)(folder, {})
    assert "vae_encoder.pt2 is not the file that was exported" in said()
    (folder / "vae_encoder.pt2").unlink()
    assert "no such file" in said()
    (folder / "vae_encoder.pt2").symlink_to(compiled / "vae_encoder.pt2")
    assert "no plain file" in said()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"format": "lavin-rt artifact", "format": 1}', "a name appears twice"),
        ('{"a": {"b": 1}, "c": {"b": 1, "b": 2}}', "a name appears twice"),
        ("[" * 66 + "]" * 66, "it nests too deeply"),
        ("[" * 10**6, "it nests too deeply"),
        ("[" * 60 + "]" * 60, "cannot use value() with array"),
        ('{"size": 01}', "no JSON: parse error"),
        ('{"size": NaN}', "no JSON: parse error"),
        ('{"size": 1e999}', "no JSON: number overflow"),
        ("{} {}", "no JSON: parse error"),
        ("", "no JSON: parse error"),
        ("{}\0", "no JSON: it has a byte order mark or a zero byte"),
        ("\ufeff{}", "no JSON: it has a byte order mark or a zero byte"),
    ],
)
def test_manifest_is_read_strictly(native, tasks, tmp_path, text, said):
    (tmp_path / "manifest.json").write_text(text)
    assert said in refused(native("--artifact", tmp_path, *tasks[1]["arguments"], "-o", tmp_path / "out.png"))


def test_tasks_by_name(native, compiled, tasks, tmp_path):
    """A task of the artifact's templates, by its name or a beginning of it that no other has."""
    folder, task = tmp_path / "artifact", tasks[1]
    shutil.copytree(compiled, folder)
    for name in ("depth", "depth_more", "normal_estimation"):
        shutil.copytree(task["folder"] / "task", folder / "template" / name)

    def run(name: str) -> subprocess.CompletedProcess:
        arguments = [name if before == "--task" else word for before, word in pairwise([None, *task["arguments"]])]
        return native("--artifact", folder, *arguments, "-o", tmp_path / "out.png")

    for name in ("depth", "normal"):
        done = run(name)
        assert done.returncode == 0, done.stderr
    assert "task dep fits depth, depth_more; give more of the name" in refused(run("dep"))
    assert "nowhere: no such folder or task; expected" in refused(run("nowhere"))
    assert "one of depth, depth_more, normal_estimation" in refused(run("nowhere"))


def test_context_of_another_vae(native, compiled, tasks, tmp_path):
    pipe, task = Pipeline.from_pretrained(compiled, device="cpu"), tasks[1]
    context = pipe.task(task["folder"] / "task", pairs=2, size=32).context
    path = tmp_path / "context.safetensors"
    arguments = [
        "--artifact",
        compiled,
        "--task",
        path,
        "--query",
        task["folder"] / "query.png",
        "-o",
        tmp_path / "o.png",
    ]
    dataclasses.replace(context, vae_fingerprint="0" * 32).save(path)
    assert "encoded by another VAE" in refused(native(*arguments))
    context.save(path)
    assert "encoded at size 32x32, asked for 48" in refused(native(*arguments, "--size", 48))
    save_file({"latents": context.latents}, path)
    assert "not an encoded context" in refused(native(*arguments))
