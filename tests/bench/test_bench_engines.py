"""`bench engines`: which engines run, that a wrong one gets no times, and the whole command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lavin_bench import engines
from lavin_bench.engines import ENGINES, TRUTH, Bench, CpuEngine, compare
from lavin_bench.report import render
from lavin_rt.cli.main import main


class Answers(Bench):
    """Engines that answer at once: with ones, but for those in `wrong`."""

    def __init__(self, folder: Path, wrong: dict[str, float], absent: str = ""):
        super().__init__(folder, native=None, threads=1, quick=True)
        self.checkpoint = folder
        self.wrong, self.absent = wrong, absent

    def missing(self, engine: CpuEngine) -> str | None:
        return "not there" if self.absent in engine.needs else super().missing(CpuEngine(native=engine.native))

    def export(self, engine: CpuEngine) -> float | None:
        return 2.0 if engine.export else None

    def first(self, engine: CpuEngine) -> float:
        return 1.0

    def answer(self, name: str) -> torch.Tensor:
        if name not in self.wrong:
            return torch.ones(4)
        if not self.wrong[name]:
            raise RuntimeError("it ended")
        return torch.ones(4) + self.wrong[name]

    def calls(self, engine: CpuEngine, stack):
        seconds = iter(range(1, 100))
        return lambda: float(next(seconds))


def test_rows_and_reasons(tmp_path):
    """One that cannot run and one that fails are left out with the reason; the others have their figures."""
    found = compare(Answers(tmp_path, {"AOTInductor": 0.0}, absent="openvino"), list(ENGINES), 20)
    assert found["skipped"] == {
        "AOTInductor": "it ended",
        "native runner": "no --native PROGRAM",
        "OpenVINO": "not there",
    }
    rows = {row["engine"]: row for row in found["rows"]}
    assert list(rows) == [TRUTH, "packed, compiled", "ONNX Runtime"]
    assert rows[TRUTH]["export_seconds"] is None and rows["ONNX Runtime"]["export_seconds"] == 2
    # The first call is start-up.
    assert rows[TRUTH]["p50"] == 11.5 and rows[TRUTH]["p95"] == 20
    header = {"device": "a CPU", "torch": "2", "date": "2026-11-26T00:00"}
    text = render({"kind": "engines", "header": header, "setting": "32 px", **found})
    assert "| ONNX Runtime | 2 s |" in text and "Left out: AOTInductor (it ended); native" in text


def test_a_wrong_engine_gets_no_times(tmp_path):
    with pytest.raises(RuntimeError, match=r"ONNX Runtime: no times, its latents differ by 1.0e-02; at most 0.0001"):
        compare(Answers(tmp_path, {"ONNX Runtime": 0.01}), list(ENGINES), 2)
    with pytest.raises(RuntimeError, match="it ended"):
        compare(Answers(tmp_path, {TRUTH: 0.0}), list(ENGINES), 2)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--engine", "tvm"], "--engine is 'tvm'; expected a part of one of: packed, eager"),
        (["--repeats", "0"], "--repeats is 0; expected at least 1"),
        (["--threads", "0"], "--threads is 0; expected 1 to 4096"),
        (["--native", "/nowhere"], "--native /nowhere is no program"),
        (["--native", "tests"], "--native tests is no program"),
        (["-o", "README.md/x.json"], "README.md/x.json"),
    ],
)
def test_bad_options(arguments, said, capsys, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    monkeypatch.setattr(engines, "Bench", None)
    assert main(["bench", "engines", *arguments]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_command(tmp_path, capsys):
    """The whole command on a tiny model, for an engine without an export and one with."""
    output = tmp_path / "engines.json"
    assert main(["bench", "engines", "--quick", "--engine", "openvino", "-o", str(output)]) == 0
    record = json.loads(output.read_text())
    assert [row["engine"] for row in record["rows"]] == [TRUTH, "OpenVINO"] and not record["skipped"]
    first, second = record["rows"]
    assert first["relative_error"] == 0 < second["relative_error"] < 1e-4
    assert second["bytes"] < first["bytes"], "the modulation's linears stay in the checkpoint"
    assert second["export_seconds"] > 1 and all(
        0 < row["p50"] < row["again_seconds"]["median"] for row in record["rows"]
    )
    assert "OpenVINO" in capsys.readouterr().out
