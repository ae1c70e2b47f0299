"""The check of a GPU as a program: parts that fail, hang or are killed lose nothing, and a second call goes on."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.golden import ROOT

from lavin_bench import gpu_check, gpu_summary

SLEEPER = """
import json, subprocess, sys, time
from pathlib import Path
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
Path(sys.argv[1]).write_text(json.dumps({"kind": "tests", "child": child.pid}))
time.sleep(60)
"""


def visit(folder) -> gpu_check.Visit:
    return gpu_check.Visit(folder, torch.device("cpu"), dry=True)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_a_part_beyond_its_limit_is_ended_with_all_it_started(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "GRACE", 0.5)
    popen = gpu_check.subprocess.Popen
    path = tmp_path / "tests.json"
    monkeypatch.setattr(
        gpu_check.subprocess,
        "Popen",
        lambda command, **options: popen([sys.executable, "-c", SLEEPER, str(path)], **options),
    )
    assert gpu_check.run_in_process("tests", visit(tmp_path), 2.0) == "stopped"
    child = json.loads(path.read_text())["child"]
    deadline = time.monotonic() + 5
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(child)


def test_a_part_writes_what_it_has_before_it_fails(tmp_path, monkeypatch):
    def run(visit, save):
        save({"kind": "kernels", "rows": [1], "failures": []})
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setitem(gpu_check.PARTS, "kernels", gpu_check.CheckPart(1, run))
    assert gpu_check.run_part("kernels", visit(tmp_path)) == 1
    record = json.loads((tmp_path / "kernels.json").read_text())
    assert record["rows"] == [1] and "illegal memory access" in record["failures"][0]
    assert not gpu_check.completed(tmp_path / "kernels.json")


def test_an_interrupted_part_keeps_its_record(tmp_path, monkeypatch):
    def run(visit, save):
        save({"kind": "tuning", "kernels": {"swiglu": 1}, "failures": []})
        raise KeyboardInterrupt

    monkeypatch.setitem(gpu_check.PARTS, "tuning", gpu_check.CheckPart(1, run))
    with pytest.raises(KeyboardInterrupt):
        gpu_check.run_part("tuning", visit(tmp_path))
    assert json.loads((tmp_path / "tuning.json").read_text())["kernels"] == {"swiglu": 1}
    assert not gpu_check.completed(tmp_path / "tuning.json")


def test_a_second_call_goes_on_where_the_first_stopped(tmp_path, monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(gpu_check, "run_in_process", lambda name, visit, seconds: ran.append(name) or "done")
    (tmp_path / "standard.json").write_text(json.dumps({"kind": "pipeline", "settings": [], "complete": True}))
    (tmp_path / "tuning.json").write_text(json.dumps({"kind": "tuning", "kernels": {}, "failures": ["stopped"]}))
    command = ["gpu_check", "--dry-run", "--output", str(tmp_path), "--only", "standard", "tuning", "graphs"]
    monkeypatch.setattr(sys, "argv", command)
    assert gpu_check.main() == 0
    assert ran == ["tuning", "graphs"] and "done before" in capsys.readouterr().out


@pytest.mark.parametrize(("rate", "patience", "size"), [(700e12, 1, 512), (60e12, 1, 256), (60e12, 4, 512)])
def test_a_slow_gpu_samples_256_px_or_has_more_time(tmp_path, monkeypatch, rate, patience, size):
    sampled, started = [], []
    monkeypatch.setattr(gpu_check, "matmul_ceiling", lambda *arguments, **options: {"flops_per_second": rate})
    monkeypatch.setattr(gpu_check.pipeline, "run", lambda chosen, *arguments, **options: sampled.append(chosen) or {})
    monkeypatch.setattr(gpu_check.startup, "run", lambda options, *arguments, **more: started.append(options) or {})
    small = dataclasses.replace(visit(tmp_path), dry=False, patience=patience)
    for part in ("standard", "standard-tuned", "peers", "startup"):
        gpu_check.PARTS[part].run(small, lambda record: None)
    assert [[one.size for one in chosen] for chosen in sampled] == [[size], list(dict.fromkeys((size, 256))), [size]]
    assert started[0]["size"] == size


def test_more_minutes_are_more_for_every_part(tmp_path, monkeypatch):
    asked, commands = [], []
    monkeypatch.setattr(gpu_check, "run_in_process", lambda name, visit, seconds: asked.append(seconds) or "done")
    for minutes in ("9.5", "95"):
        command = ["gpu_check", "--dry-run", "--output", str(tmp_path), "--only", "graphs", "--minutes", minutes]
        monkeypatch.setattr(sys, "argv", command)
        assert gpu_check.main() == 0
    assert asked == [60, 600]
    monkeypatch.undo()
    monkeypatch.setattr(gpu_check.subprocess, "Popen", lambda command, **options: commands.append(command) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        gpu_check.run_in_process("graphs", dataclasses.replace(visit(tmp_path), patience=10.0), 1)
    assert commands[0][-2:] == ["--minutes", "95.0"]


def test_the_first_tests_are_attention_and_executor_and_every_other_comes_later(tmp_path, monkeypatch):
    """All GPU tests take longer than the two minutes that correctness has before anything is measured."""
    root = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").is_file())
    monkeypatch.chdir(root)
    commands = []

    def ran(command, stdout, **options):
        commands.append(command)
        stdout.write("1 passed")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(gpu_check.subprocess, "run", ran)
    for first in (True, False):
        gpu_check._tests(visit(tmp_path), lambda record: None, first)
    assert all(command[command.index("-m", 3) + 1] == "gpu and not slow" for command in commands)
    first, later = ([part for part in command if part.endswith(".py")] for command in commands)
    assert "joint_attention_gpu" in first[0] and "executor_gpu" in first[1] and len(first) < 6
    marked = {str(path) for path in Path("tests").rglob("test_*.py") if "gpu" in path.read_text()}
    assert marked <= {*first, *later} and not {*first} & {*later} and all(Path(path).is_file() for path in first)


@pytest.mark.parametrize(
    ("code", "said", "dry", "right"),
    [
        (0, "3 passed", False, True),
        (5, "3 deselected", True, True),
        (5, "3 deselected", False, False),
        (1, "python: No module named pytest", False, False),
        (-9, "", False, False),
        (1, "FAILED tests/a.py::b\n1 failed", False, False),
    ],
)
def test_tests_that_did_not_pass_are_never_done_before(tmp_path, monkeypatch, code, said, dry, right):
    def ran(command, stdout, **options):
        stdout.write(said)
        return SimpleNamespace(returncode=code)

    monkeypatch.setattr(gpu_check.subprocess, "run", ran)
    assert gpu_check.run_part("tests-first", dataclasses.replace(visit(tmp_path), dry=dry)) == (not right)
    assert gpu_check.completed(tmp_path / "tests-first.json") == right
    failures = json.loads((tmp_path / "tests-first.json").read_text())["failures"]
    assert len(failures) == (not right) and all(str(code) in one or "FAILED" in one for one in failures)


def test_without_a_device_it_says_so(tmp_path, monkeypatch, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--output", str(tmp_path / "never")])
    assert gpu_check.main() == 2
    assert "no CUDA device" in capsys.readouterr().err and not (tmp_path / "never").exists()


@pytest.mark.parametrize(("capability", "size", "held"), [("9.0", 512, True), ("9.0", 256, False), ("8.9", 512, False)])
def test_bounds_in_seconds_are_those_of_one_generation(tmp_path, capability, size, held):
    row = {"variant": "CUDA graphs", "seconds": {"median": 5.0}}
    setting = {"name": "a", "size": size, "rows": [row], "speedups": [], "skipped": []}
    record = {"kind": "pipeline", "header": {"capability": capability}, "settings": [setting], "failures": []}
    (tmp_path / "standard.json").write_text(json.dumps(record))
    assert ("at most" in "\n".join(gpu_summary.lines(tmp_path, {"standard": "done"}))) == held


def test_the_summary_has_a_line_for_every_part_and_names_failures(tmp_path):
    (tmp_path / "kernels.json").write_text(
        json.dumps({"kind": "kernels", "rows": [], "failures": ["a\nValueError: b"]})
    )
    text = "\n".join(gpu_summary.lines(tmp_path, {"kernels": "failed", "startup": "no time left; call again"}))
    assert "FAILURE ValueError: b" in text and "startup" in text


@pytest.mark.slow
def test_the_whole_script_runs_dry(tmp_path, monkeypatch):
    """All parts in their processes on a CPU, one of them with a limit that it cannot keep."""
    parts = {**gpu_check.PARTS, "kernels": dataclasses.replace(gpu_check.PARTS["kernels"], seconds=3.0)}
    monkeypatch.setattr(gpu_check, "PARTS", parts)
    monkeypatch.chdir(ROOT)
    names = [name for name in parts if name not in ("peers", "tests", "standard-tuned")]
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--dry-run", "--output", str(tmp_path), "--only", *names])
    assert gpu_check.main() == 1
    found = {name: gpu_check.completed(tmp_path / f"{name}.json") for name in names}
    assert not found.pop("kernels") and all(found.values()), found
