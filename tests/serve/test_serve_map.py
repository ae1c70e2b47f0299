"""`lavin-rt map`: queries found, pictures that are those of a run, lost workers, second calls."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.command import exit_code
from support.serving import picture

from lavin_rt.cli.main import main
from lavin_rt.errors import InputError

pytest.importorskip("fsspec", reason="needs the extra ray")
pytest.importorskip("pyarrow", reason="needs the extra ray")

import pyarrow.parquet

from lavin_rt.serve import fleet


@pytest.fixture
def queries(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for i in (1, 2, 10):
        (folder / f"{i}.png").write_bytes(picture(i))
    (folder / ".hidden.png").write_bytes(b"")
    (folder / "notes.txt").write_text("no picture")
    return folder


def names(found):
    return [name.rpartition("/")[2] for name in found]


def test_queries_are_found_in_natural_order(queries, tmp_path):
    assert names(fleet.find_queries(str(queries))) == ["1.png", "2.png", "10.png"]
    assert names(fleet.find_queries(f"{queries}/1*.png")) == ["1.png", "10.png"]
    pyarrow.parquet.write_table(pyarrow.table({"path": ["in/2.png", str(queries / "1.png")]}), tmp_path / "q.parquet")
    assert names(fleet.find_queries(str(tmp_path / "q.parquet"))) == ["2.png", "1.png"]
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/pictures/a.png", picture())
    assert fleet.find_queries("memory://pictures") == ["memory:///pictures/a.png"]
    for nothing in (str(tmp_path / "nowhere"), f"{tmp_path}/*.gif", "nosuch://x"):
        with pytest.raises(InputError):
            fleet.find_queries(nothing)
    broken = tmp_path / "broken.parquet"
    for content, words in (
        (b"PAR1 nothing", "no sound Parquet"),
        ((tmp_path / "q.parquet").read_bytes()[:-40], "no sound"),
    ):
        broken.write_bytes(content)
        with pytest.raises(InputError, match=words):
            fleet.find_queries(str(broken))
    pyarrow.parquet.write_table(pyarrow.table({}), broken)
    with pytest.raises(InputError, match="no columns"):
        fleet.find_queries(str(broken))
    with pytest.raises(InputError, match=r"both be written to a\.png"):
        fleet.output_names(["file:///x/a.png", "file:///x/a.jpg"], "png")


def test_a_manifest_is_read_as_written(tmp_path):
    rows = [{"query": "a", "output": "a.png", "seed": 3, "status": "done", "error": "", "seconds": 0.5, "batch": 2}]
    folder = fleet.place(str(tmp_path / "out put"))
    (tmp_path / "out put").mkdir()
    fleet.write_manifest(folder, rows)
    assert fleet.read_manifest(folder, {fleet.MANIFEST}) == rows and fleet.read_manifest(folder, set()) == []
    (tmp_path / "out put" / fleet.MANIFEST).write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"no sound Parquet.*move it away"):
        fleet.read_manifest(folder, {fleet.MANIFEST})


@pytest.mark.parametrize(
    "more",
    [
        ["--workers", "0"],
        ["--steps", "5"],
        ["--speed", "x"],
        ["--queries", "nowhere"],
        ["--guidance", "nan"],
        ["--task", "nowhere"],
        ["--pairs", "0"],
        ["--checkpoint", "nowhere"],
    ],
)
def test_options_that_do_not_fit(queries, tmp_path, more, capsys, monkeypatch):
    monkeypatch.setattr(fleet, "answered", None)  # no process is started for them
    pytest.importorskip("ray", reason="needs the extra ray")
    command = ["map", "--task", "depth", "--queries", str(queries), "-o", str(tmp_path / "out"), *more]
    assert exit_code(command) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def actor_processes() -> list[int]:
    """Ray's worker processes of this user that hold an actor of ours."""
    found = []
    for name in os.listdir("/proc"):
        try:
            if name.isdigit() and b"MapWorker" in Path(f"/proc/{name}/cmdline").read_bytes():
                found.append(int(name))
        except OSError:
            continue
    return found


def descends_from(process: int, ancestor: int) -> bool:
    while process > 1:
        if process == ancestor:
            return True
        with open(f"/proc/{process}/stat") as file:
            process = int(file.read().rpartition(")")[2].split()[1])
    return False


@pytest.mark.slow
def test_sixty_queries_on_two_workers_one_of_which_is_lost(tmp_path, capsys):
    ray = pytest.importorskip("ray", reason="needs the extra ray")
    queries, out, right = tmp_path / "in", tmp_path / "out", tmp_path / "right"
    queries.mkdir()
    for i in range(60):
        (queries / f"{i}.png").write_bytes(picture(i))
    broken = (7, 13, 22, 41, 55)
    for i in broken:
        (queries / f"{i}.png").write_bytes(b"this is no picture")
    shared = ["--task", "depth", "--steps", "4", "--dtype", "float32", "--device", "cpu"]
    command = ["map", *shared, "--queries", str(queries), "-o", str(out), "--workers", "2", "--json"]
    command += ["--cpus-per-worker", "0.5"]
    killed = []

    def kill() -> None:
        end = time.monotonic() + 200
        while time.monotonic() < end and not killed:
            if out.is_dir() and len(list(out.glob("*.png"))) >= 8:
                mine = [process for process in actor_processes() if descends_from(process, os.getpid())]
                for process in mine[:1]:
                    os.kill(process, signal.SIGKILL)
                    killed.append(process)
            time.sleep(0.02)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        assert main(command) == 0
        killer.join()
        assert killed, "no worker was lost"
        said = json.loads(capsys.readouterr().out)
        assert said == {"queries": 60, "done": 55, "there": 0, "failed": 5}
        rows = pyarrow.parquet.read_table(out / "manifest.parquet").to_pylist()
        assert sorted(row["output"] for row in rows) == sorted(f"{i}.png" for i in range(60))
        failed = [row for row in rows if row["status"] == "failed"]
        assert sorted(int(row["output"][:-4]) for row in failed) == list(broken)
        assert all("picture" in row["error"] for row in failed)
        for i in (0, 1, 2):
            query = str(queries / f"{i}.png")
            result = str(right / f"{i}.png")
            # The task's pairs are chosen by the seed, too, so the run is given them in a file.
            if i == 0:
                extra = ["--save-context", str(tmp_path / "task.safetensors")]
                assert main(["run", *shared, "--query", query, "-o", result, *extra, "-q"]) == 0
                shared[1] = str(tmp_path / "task.safetensors")
            else:
                assert main(["run", *shared, "--query", query, "-o", result, "--seed", str(i), "-q"]) == 0
            values = [np.asarray(Image.open(path)).astype(int) for path in (out / f"{i}.png", result)]
            assert abs(values[0] - values[1]).max() <= 2
        capsys.readouterr()
        before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.png")}
        assert main(command) == 0
        assert json.loads(capsys.readouterr().out) == {"queries": 60, "done": 55, "there": 55, "failed": 5}
        assert before == {path.name: path.stat().st_mtime_ns for path in out.glob("*.png")}
    finally:
        killed.append(0)
        ray.shutdown()
