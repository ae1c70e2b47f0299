"""The benchmarks' programs: bad input is one line and exit code 2, before anything is measured."""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
from pathlib import Path

import pytest
from support.golden import ROOT

from lavin_bench import report
from lavin_bench.quality import speeds
from lavin_rt.pictures.context import read_template
from lavin_rt.pipeline import Pipeline


@pytest.mark.parametrize(
    ("module", "words", "said"),
    [
        ("quality.speed_search", ["--tasks", "nosuch"], "unknown task 'nosuch'"),
        ("quality.speed_search", ["--scenes", "1"], "--scenes is 1; expected at least 2"),
        ("quality.speed_search", ["--evaluations", "0"], "expected"),
        ("quality.speed_search", ["-o", str(ROOT / "README.md" / "a.json")], "README.md"),
        ("quality.taught", ["--queries", "1"], "--queries is 1; expected at least 2"),
        ("pipeline.vae_forms", ["--size", "12"], "--size is 12; expected a positive multiple of 8"),
        ("pipeline.vae_forms", ["--device", "nosuch"], "nosuch"),
        ("pipeline.crowded", ["--repeats", "0"], "--repeats is 0; expected at least 1"),
        ("pipeline.authors_alone", ["--size", "0"], "--size is 0; expected a positive multiple of 16"),
        ("pipeline.waterfall", ["/nosuch.json"], "/nosuch.json: No such file"),
        ("soak", ["--calls", "3", "--settled", "3"], "--calls is 3; expected at least 4"),
        ("export_size", ["--folder", "/nosuch", "--depth", "0"], "--depth is 0; expected at least 1"),
        ("gpu_check", ["--dry-run", "--output", "/nosuch", "--minutes", "nan"], "--minutes is nan; expected"),
        ("report", ["/nosuch.json"], "/nosuch.json: No such file"),
        ("report", [str(ROOT / "README.md")], "README.md: not JSON"),
    ],
)
def test_bad_input_is_one_line(module, words, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [module, *words])
    assert importlib.import_module(f"lavin_bench.{module}").main() == 2
    error = capsys.readouterr().err
    assert said in error and error.startswith("error: ") and error.count("\n") == 1


def test_every_program_tells_bad_input_alike():
    """Workers, which are given what a parent checked, aside."""
    workers = {"kernels/tune.py", "pipeline/startup.py", "pipeline/variants.py", "engines.py"}
    folder = Path(report.__file__).parent
    for path in folder.rglob("*.py"):
        source, name = path.read_text(), str(path.relative_to(folder))
        if '__name__ == "__main__"' in source and name not in workers:
            assert "@program\ndef main(" in source or "except InputError as error:" in source, name
            assert re.search(r"^    sys\.exit\(main\(\)\)$", source, re.MULTILINE), name


@pytest.mark.parametrize("record", [[], {"kind": "nosuch"}, {"kind": "taught"}, {"kind": "kernels", "rows": [1]}])
def test_a_record_without_a_table_is_bad_input(record, tmp_path, monkeypatch, capsys):
    (tmp_path / "own.json").write_text(json.dumps(record))
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path / "own.json")])
    assert report.main() == 2 and "record" in capsys.readouterr().err


def test_own_pairs_have_a_table(monkeypatch, tmp_path):
    pipe = Pipeline.from_pretrained(device="cpu")
    found = read_template(pipe.template_roots[0] / "depth_estimation")[:3]
    options = argparse.Namespace(task="mypairs", seed=0, size=32, steps=4, guidance=1.5)
    record = speeds.own_pairs_record(pipe, found, ["fastest"], 4, options)
    assert (record["pairs"], record["size"], record["steps"], record["queries"]) == (2, [32, 32], 4, 3)
    table = report.render(json.loads(json.dumps(record)))
    assert "mypairs: 3 queries, 2 pairs, 32x32 px, guidance 1.5" in table
    assert "| exact |" in table and re.search(r"\| fastest \| [\d.]+ \| [+-][\d.]+ ± [\d.]+ \|", table)
