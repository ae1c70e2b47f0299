"""`bench speeds`: the whole command on a tiny model, what a wrong result does, and refusals."""

from __future__ import annotations

import json

import pytest
import torch
from support.command import exit_code

from lavin_bench.pipeline import speeds
from lavin_bench.pipeline.variants import CPU_VAE, QUICK_CONFIG, Setting
from lavin_bench.report import render
from lavin_rt.cli.main import main


def test_command(tmp_path, capsys):
    main(["bench", "speeds", "--quick", "--speed", "exact", "fastest", "-o", str(tmp_path / "speeds.json")])
    record = json.loads((tmp_path / "speeds.json").read_text())
    exact, fastest = record["rows"]
    assert record["relative_error"] <= 1e-4 and exact["apart"] == 0 < fastest["apart"]
    assert (exact["evaluations"], fastest["evaluations"]) == (19, 4)
    assert all(0 < row["sampling"]["median"] < row["call"]["median"] for row in record["rows"])
    assert exact["flops"] > 5 * fastest["flops"] and record["peak_bytes"] > 0
    text = render(record)
    assert "| exact | 19 |" in text and "a tiny model, 32 px, 1 pair" in text
    alone = render({**record, "rows": [fastest]})
    assert "exact" not in alone and "| fastest | 4 |" in alone


def test_a_wrong_step_is_not_timed(monkeypatch):
    monkeypatch.setattr(speeds, "relative_error", lambda *_: 1e-3)
    cpu = torch.device("cpu")
    with pytest.raises(RuntimeError, match=r"by 1\.0e-03, allowed 1\.0e-04; nothing timed"):
        speeds.run(Setting(32, 1, QUICK_CONFIG, CPU_VAE), cpu, torch.float32, ["fast"], 1)


@pytest.mark.parametrize("option", [("--blocks", "0"), ("--blocks", "23"), ("--size", "100"), ("--repeats", "0")])
def test_refusals(option, capsys):
    assert exit_code(["bench", "speeds", *option]) == 2
    assert f"{option[0]} is {option[1]}" in capsys.readouterr().err
