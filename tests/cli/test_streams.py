"""Standard streams that are closed, full or narrow, and any names: the picture is written, the exit code right."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import lavin_rt.cli.main

FULL = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")


def run(folder: Path, redirections: str, *options: str, query: str | bytes = "q.png", **environment: str):
    """A run in a process of its own, with a shell's redirections."""
    command = [sys.executable, "-m", "lavin_rt", "run", "--task", "depth", "--query", query, "--pairs", "1"]
    command += ["--steps", "4", *options]
    words = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    return subprocess.run(
        ["bash", "-c", f'"$@" {redirections}', "bash", *command],
        cwd=folder,
        env=words,
        capture_output=True,
        timeout=120,
    )


@pytest.fixture
def folder(tmp_path) -> Path:
    ramp = np.tile(np.arange(64, dtype=np.uint8) * 4, (64, 1))
    Image.fromarray(np.stack([ramp] * 3, -1)).save(tmp_path / "q.png")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("redirections", "options", "code"),
    [
        ("2>&-", (), 0),
        (">&-", (), 0),
        ("<&- >&- 2>&-", (), 0),
        pytest.param("2>/dev/full", (), 0, marks=FULL),
        pytest.param(">/dev/full", (), 2, marks=FULL),
        pytest.param(">/dev/full", ("-q",), 0, marks=FULL),
        pytest.param(">/dev/full", ("--json",), 2, marks=FULL),
        (">&-", ("--json",), 2),
    ],
)
def test_the_picture_is_written_whatever_the_streams(folder, redirections, options, code):
    done = run(folder, redirections, "-o", "o.png", *options)
    assert done.returncode == code
    assert Image.open(folder / "o.png").size == (64, 64)
    assert b"Traceback" not in done.stderr and b"Exception ignored" not in done.stderr
    if code:
        [line] = [line for line in done.stderr.splitlines() if not line.startswith(b"lavin-rt: note: ")]
        assert line.startswith(b"lavin-rt: error: standard output: ")


@FULL
@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_that_cannot_be_printed(option):
    words = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "lavin_rt", option], env=words, stdout=full, stderr=subprocess.PIPE, timeout=60
        )
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1 and b"standard output" in done.stderr


def test_files_that_are_opened_do_not_become_standard_streams(tmp_path):
    """With descriptor 2 closed the next file would be it, and a library's message would end in a picture."""
    code = (
        "import os, sys; from lavin_rt.process import sound_streams\n"
        "with sound_streams():\n"
        f"    file = open({str(tmp_path / 'o')!r}, 'w'); assert file.fileno() > 2, file.fileno()\n"
        "    print('lost', file=sys.stderr); sys.stderr.flush(); os.write(2, b'lost too'); file.write('kept')\n"
    )
    words = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = ["bash", "-c", '"$@" 0<&- 2>&-', "bash", sys.executable, "-c", code]
    done = subprocess.run(command, env=words, capture_output=True, timeout=60)
    assert done.returncode == 0 and (tmp_path / "o").read_text() == "kept" and done.stdout == b""


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii"])
@pytest.mark.parametrize(
    "name", [b"caf\xe9", "k\u65e5".encode(), b"two\nlines"], ids=["latin-1", "japanese", "newline"]
)
def test_names_in_any_encoding(folder, encoding, name):
    os.rename(folder / "q.png", os.fsencode(folder) + b"/" + name + b".png")
    query = os.fsdecode(name + b".png")
    options = ("-o", "out/", "--save-context", os.fsdecode(name + b".safetensors"), "--grid")
    done = run(folder, "", *options, query=query, PYTHONIOENCODING=encoding)
    assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr
    assert sorted(os.listdir(os.fsencode(folder) + b"/out")) == [name + b"-grid.png", name + b".png"]
    again = run(folder, "", "--json", "-o", "o.png", "--task", options[3], query=query, PYTHONIOENCODING=encoding)
    assert again.returncode == 0, again.stderr


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii"])
def test_refusals_of_such_names_are_one_line(folder, encoding):
    done = run(folder, "", "-o", "o.png", query=os.fsdecode(b"caf\xe9\xff-\xe6\x97\xa5.png"), PYTHONIOENCODING=encoding)
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1 and b"no such picture" in done.stderr


def test_a_terminal_that_is_gone_ends_no_run(monkeypatch, capsys):
    """Behind nohup, writing to it is an input/output error."""

    class Gone:
        encoding = "utf-8"

        def write(self, text):
            raise OSError(5, "Input/output error")

        def flush(self):
            raise OSError(5, "Input/output error")

        def isatty(self):
            return True

        def fileno(self):
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(sys, "stderr", Gone())
    assert lavin_rt.cli.main.main(["run", "--task", "depth", "--query", "nowhere.png", "-o", "o.png"]) == 2


def test_the_module_runs_as_the_command(monkeypatch, capsys):
    import runpy

    monkeypatch.setattr(sys, "argv", ["lavin-rt", "--version"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("lavin_rt", run_name="__main__")
    assert not ended.value.code and capsys.readouterr().out.startswith("lavin-rt ")
