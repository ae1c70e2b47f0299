"""Beside other programs: the choices that are held against each other, the record, its table, and refusals."""

from __future__ import annotations

import subprocess

import pytest

from lavin_bench import report
from lavin_bench.pipeline import crowded


def test_every_choice_in_every_round(monkeypatch, tmp_path):
    asked = []

    def seconds_of(environment, options, output):
        asked.append((tuple(environment), tuple(options)))
        return 1.5 if options == ["--threads", "2"] else 1.0

    monkeypatch.setattr(crowded, "processors", lambda: 2)
    monkeypatch.setattr(crowded, "seconds_of", seconds_of)
    record = crowded.run(2)
    passive = ("OMP_WAIT_POLICY=passive",)
    choices = {((), ()), *((wait, ("--threads", n)) for wait in ((), passive) for n in "12")}
    assert set(asked) == choices and len(asked) == 3 * 2 * len(choices)
    assert [row["programs"] for row in record["rows"]] == [0, 1, 2]
    assert all(row["auto_over_best"] == 1 and row["seconds"]["2 threads"]["median"] == 1.5 for row in record["rows"])
    assert "| 2 | 1.00 (1.00–1.00) |" in report.render(record)


def test_programs_run_meanwhile_and_are_gone_afterwards(monkeypatch):
    started, start = [], subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *given: started.append(start(*given)) or started[-1])
    with pytest.raises(KeyError), crowded.busy(2):
        assert [program.poll() for program in started] == [None, None]
        raise KeyError
    assert all(program.poll() is not None for program in started)


def test_one_real_answer(tmp_path):
    assert crowded.seconds_of([], ["--threads", "1", "--steps", "4"], tmp_path / "answer.png") > 0
    assert (tmp_path / "answer.png").is_file()


@pytest.mark.parametrize(
    ("options", "said"), [(["--repeats", "0"], "--repeats is 0"), (["--json", "/dev/null/f.json"], "/dev/null")]
)
def test_refusals(options, said, capsys):
    assert crowded.main(options) == 2
    assert said in capsys.readouterr().err
