"""The command line: runs, records, exit codes, and one clear line for everything that cannot be used."""

from __future__ import annotations

import argparse
import io
import json
import pickle
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from pkgutil import resolve_name
from unittest.mock import Mock

import pytest
import torch
import triton
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from support.command import run, write_picture, write_template

from lavin_rt import devices, pipeline
from lavin_rt.cli import options
from lavin_rt.cli.main import main, parser
from lavin_rt.dit import packed
from lavin_rt.sampling import speeds


def test_a_run(setup, capsys):
    assert run(setup, "--grid", "--dtype", "float32") == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"{setup['-o']}  seed 0\nloading ") and "impl torch, cpu, float32" in out
    assert err == ""
    assert Image.open(setup["-o"]).size == (48, 32)
    grid = Image.open(setup["-o"].replace(".png", "-grid.png"))
    assert grid.size == (3 * 52 + 4, 2 * 36 + 4)


def test_json_record(setup, capsys):
    assert run({**setup, "--seed": "5", "--dtype": "float32"}, "--json") == 0
    out, err = capsys.readouterr()
    record = json.loads(out)
    assert err == ""
    assert record["results"] == [{"query": setup["--query"], "output": setup["-o"], "seed": 5}]
    assert (record["impl"], record["dtype"], record["size"], record["steps"]) == ("torch", "float32", [32, 48], 4)
    assert set(record["seconds"]) == {"loading", "context", "preparing", "queries"}


def test_quiet(setup, capsys):
    assert run(setup, "-q") == 0
    assert capsys.readouterr() == ("", "")


def test_the_same_seed_gives_the_same_picture(setup, tmp_path):
    pictures = []
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert run({**setup, "-o": str(tmp_path / f"{name}.png"), "--seed": seed}, "-q") == 0
        pictures.append((tmp_path / f"{name}.png").read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]


def test_several_queries_and_a_folder(setup, tmp_path):
    first, second = (write_picture(tmp_path / "queries" / f"{name}.png", seed) for name, seed in (("a", 3), ("b", 4)))
    out = tmp_path / "results"
    assert run({**setup, "--query": [str(first), setup["--query"]], "-o": str(out)}, "-q") == 0
    assert sorted(path.name for path in out.iterdir()) == ["a.png", "query.png"]
    again = tmp_path / "again"
    assert run({**setup, "--query": str(first.parent), "-o": str(again)}, "-q", "--keep-size") == 0
    assert sorted(path.name for path in again.iterdir()) == ["a.png", "b.png"]
    assert Image.open(again / "b.png").size == Image.open(second).size == (40, 30)


def test_clip(setup, tmp_path):
    for role in ("0_input", "0_target", "query"):
        parent = tmp_path / "clips" if role != "query" else tmp_path
        for frame in range(5):
            write_picture(parent / role / f"{frame}.png", frame)
    arguments = {
        **setup,
        "--task": str(tmp_path / "clips"),
        "--pairs": "1",
        "--query": str(tmp_path / "query"),
        "-o": str(tmp_path / "out.webp"),
    }
    assert run(arguments, "-q", "--clip") == 0
    assert Image.open(tmp_path / "out.webp").n_frames == 5
    assert run({**arguments, "-o": str(tmp_path / "frames/")}, "-q", "--clip") == 0


def test_saved_context(setup, tmp_path):
    context = tmp_path / "depth.safetensors"
    assert run({**setup, "--save-context": str(context)}, "-q") == 0
    assert run({**setup, "--task": str(context), "-o": str(tmp_path / "again.png")}, "-q") == 0
    assert (tmp_path / "again.png").read_bytes() == Path(setup["-o"]).read_bytes()


def test_an_unexpected_tensor_is_one_warning(setup, checkpoint, tmp_path, capsys):
    folder = shutil.copytree(checkpoint, tmp_path / "more")
    with safe_open(checkpoint / "lavin_dit.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    save_file({**tensors, "pos_embed": torch.zeros(2)}, folder / "lavin_dit.safetensors", metadata)
    assert run({**setup, "--checkpoint": str(folder)}, "-q") == 0
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("lavin-rt: warning: ") and "pos_embed" in err
    assert run({**setup, "--checkpoint": str(folder)}, "-q", "--strict") == 2
    assert "pos_embed" in capsys.readouterr().err


class _Code:
    def __reduce__(self):
        return (Path("executed").touch, ())


def broken_checkpoint(kind: str, good: Path, folder: Path) -> Path:
    """A copy of the checkpoint with one thing wrong."""
    folder = shutil.copytree(good, folder)
    dit = folder / "lavin_dit.safetensors"
    with safe_open(dit, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        config = json.loads(file.metadata()["config"])
    if kind == "truncated":
        dit.write_bytes(dit.read_bytes()[:-100])
    elif kind == "not safetensors":
        dit.write_bytes(b"PK\x03\x04 not a checkpoint at all")
    elif kind == "pickle with code":
        with open(folder / "stvae.pt", "wb") as file:
            pickle.dump({"state_dict": _Code()}, file)
    elif kind == "no transformer":
        dit.unlink()
    else:
        if kind == "missing key":
            del tensors["blocks.0.x_mlp.up_proj.weight"]
        elif kind == "wrong shape":
            tensors["x_embedder.0.weight"] = tensors["x_embedder.0.weight"][:, :32].contiguous()
        elif kind == "head size":
            config["num_heads"] = 12  # 192 / 12 = 16
        elif kind == "kv_group":
            config["kv_group"] = 3
        metadata = None if kind == "no config" else {"config": json.dumps(config)}
        save_file(tensors, dit, metadata)
    return folder


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("truncated", "truncated"),
        ("not safetensors", "safetensors"),
        ("pickle with code", "stvae.pt"),
        ("no transformer", "lavin_dit.safetensors"),
        ("missing key", "blocks.0.x_mlp.up_proj.weight"),
        ("wrong shape", "x_embedder.0.weight"),
        ("head size", "head size 16"),
        ("kv_group", "kv_group 3"),
        ("no config", "config"),
    ],
)
def test_bad_checkpoint(setup, checkpoint, tmp_path, capsys, monkeypatch, kind, message):
    monkeypatch.chdir(tmp_path)
    folder = broken_checkpoint(kind, checkpoint, tmp_path / "broken")
    check_refused(run({**setup, "--checkpoint": str(folder)}), capsys, tmp_path, message)
    assert not Path("executed").exists()


def test_bad_archives(setup, checkpoint, tmp_path, capsys):
    def archive(member: tarfile.TarInfo, content: bytes = b"") -> str:
        path = tmp_path / "weights.tar.gz"
        with tarfile.open(path, "w:gz") as file:
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
        return str(path)

    link = tarfile.TarInfo("weights/lavin_dit.safetensors")
    link.type, link.linkname = tarfile.SYMTYPE, "../../secret"
    for member, message in (
        (tarfile.TarInfo("../escaped"), "escaped"),
        (tarfile.TarInfo("/tmp/absolute-member"), "absolute"),
        (link, "secret"),
    ):
        code = run({**setup, "--checkpoint": archive(member, b"x" if member.isreg() else b"")})
        check_refused(code, capsys, tmp_path, message)
    assert not (tmp_path.parent / "escaped").exists() and not Path("/tmp/absolute-member").exists()


def check_refused(code: int, capsys, tmp_path: Path, message: str) -> None:
    """Exit code 2, one line on stderr that has the message, nothing on stdout, nothing half-written."""
    out, err = capsys.readouterr()
    assert code == 2
    assert out == ""
    assert (
        err.startswith(("lavin-rt: error: ", "lavin-rt run: error: ")) and err.endswith("\n") and err.count("\n") == 1
    ), err
    assert message in err and "Traceback" not in err
    assert not list(tmp_path.rglob("out*")) and not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--size": "40"}, "multiple"),
        ({"--size": "wide"}, "wide"),
        ({"--size": "0x32"}, "0"),
        ({"--steps": "7"}, "even number from 4 to 136"),
        ({"--steps": "2"}, "even number from 4 to 136"),
        ({"--steps": "138"}, "even number from 4 to 136"),
        ({"--pairs": "0"}, "0"),
        ({"--pairs": "3"}, "3"),
        ({"--task": "no_such_task"}, "depth_estimation"),
        ({"--device": "cuda:99"}, "cuda:99"),
        ({"--device": "abacus"}, "abacus"),
        ({"--dtype": "int8"}, "int8"),
        ({"--impl": "fast"}, "fast"),
        ({"--posterior": "mode"}, "mode"),
        ({"--batch-size": "0"}, "batch_size is 0"),
        ({"--guidance": "nan"}, "guidance"),
        ({"--tile": "50"}, "--tile is 50"),
        ({"--query": "missing.png"}, "missing.png"),
        ({"--checkpoint": "no/such/folder"}, "no/such/folder"),
        ({"--save-context": "context.bin"}, ".safetensors"),
        ({"--seed": "99999999999999999999999"}, "seed is"),
        ({"--seed": "-9223372036854775809"}, "seed is"),
        ({"--query": "q" * 300 + ".png"}, "qqq"),
        ({"--task": "t" * 300}, "ttt"),
        ({"--chunk": "1"}, "--chunk is 1"),
        ({"--impl": "triton"}, "CUDA"),
    ],
)
def test_bad_option(setup, tmp_path, capsys, change, message):
    check_refused(run({**setup, **change}), capsys, tmp_path, message)


def test_bad_contexts(setup, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    unpaired = write_template(tmp_path / "unpaired")
    (unpaired / "1_target.png").unlink()
    for folder, message in (("empty", "empty"), ("unpaired", "1_input.png"), ("nowhere/at/all", "nowhere")):
        check_refused(run({**setup, "--task": str(tmp_path / folder)}), capsys, tmp_path, message)


def test_bad_pictures(setup, tmp_path, capsys):
    whole = Path(setup["--query"]).read_bytes()
    for name, content in (("text.png", b"no picture"), ("cut.png", whole[: len(whole) // 2]), ("empty.png", b"")):
        (tmp_path / name).write_bytes(content)
        check_refused(run({**setup, "--query": str(tmp_path / name)}), capsys, tmp_path, name)


def test_bad_outputs(setup, tmp_path, capsys):
    (tmp_path / "file").touch()
    two = [setup["--query"], str(write_picture(tmp_path / "other" / "query.png", 1))]
    for arguments, message in (
        ({"-o": str(tmp_path / "file" / "result.png")}, "file"),
        ({"-o": str(tmp_path / "result.xyz")}, ".xyz"),
        ({"-o": str(tmp_path / "result.png"), "--query": two}, "2 queries"),
        ({"-o": str(tmp_path / "results"), "--query": two}, "query.png"),
        ({"-o": setup["--query"]}, "replace the query itself"),
        ({"-o": str(tmp_path), "--query": setup["--query"]}, "replace the query itself"),
    ):
        check_refused(run({**setup, **arguments}), capsys, tmp_path, message)
    assert not (tmp_path / "result.png").exists()


def test_a_grid_replaces_nothing(setup, tmp_path, capsys):
    two = [str(write_picture(tmp_path / f"{name}.png", 1)) for name in ("a", "a-grid")]
    assert run({**setup, "--query": two, "-o": str(tmp_path / "results")}, "--grid") == 2
    assert "a-grid.png" in capsys.readouterr().err


def test_an_empty_folder_of_queries(setup, tmp_path, capsys):
    (tmp_path / "none").mkdir()
    check_refused(run({**setup, "--query": str(tmp_path / "none")}), capsys, tmp_path, "no pictures in this folder")


def test_unknown_option_is_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["run", "--fast"])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and err.startswith("lavin-rt run: error: ")


def test_non_finite_weights_fail_with_the_step(setup, checkpoint, tmp_path, capsys):
    folder = shutil.copytree(checkpoint, tmp_path / "nan")
    with safe_open(folder / "lavin_dit.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    tensors["final_layer.linear.bias"][0] = float("nan")
    save_file(tensors, folder / "lavin_dit.safetensors", metadata)
    assert run({**setup, "--checkpoint": str(folder)}) == 1
    err = capsys.readouterr().err
    assert "step 1 of 3" in err and err.count("\n") == 1
    assert not Path(setup["-o"]).exists()


def test_interrupt(setup, capsys, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("lavin_rt.sampling.executor.Executor.sample", interrupt)
    assert run(setup) == 130
    assert capsys.readouterr().err == "lavin-rt: error: interrupted\n"
    assert not Path(setup["-o"]).exists()


def test_info(checkpoint, capsys):
    assert main(["info", str(checkpoint), "--json", "--self-check"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["checkpoint"]["hidden_size"] == 192 and record["checkpoint"]["tasks"] == ["depth_estimation"]
    assert record["machine"]["torch"] == torch.__version__
    assert "GB reserved" in record["memory on a GPU"]["at most"]
    assert len(record["self-check"]) == 3 and all(check["passed"] for check in record["self-check"])
    assert main(["info"]) == 0
    assert "impl" in capsys.readouterr().out


def test_info_fails_where_the_machine_computes_wrong(capsys, monkeypatch):
    monkeypatch.setattr("lavin_rt.dit.cpu_operators.swiglu", lambda gate_up: gate_up.chunk(2, dim=-1)[1])
    assert main(["info", "--self-check"]) == 1
    out, err = capsys.readouterr()
    assert "FAILED" in out and "self-check failed" in err


@pytest.mark.parametrize(
    "error",
    [
        subprocess.CalledProcessError(1, ["gcc", "driver.c"]),  # as Triton builds its driver
        triton.runtime.errors.OutOfResources(114688, 101376, "shared memory"),
    ],
)
def test_errors_of_kernels_are_one_line(error, capsys, monkeypatch):
    monkeypatch.setattr("lavin_rt.cli.info.machine", Mock(side_effect=error))
    assert main(["info"]) == 1
    assert capsys.readouterr().err == f"lavin-rt: error: {type(error).__name__}: {error}\n"


def test_info_refuses_what_run_would(checkpoint, tmp_path, capsys):
    folder = broken_checkpoint("missing key", checkpoint, tmp_path / "broken")
    assert main(["info", str(folder)]) == 2
    assert "blocks.0.x_mlp.up_proj.weight" in capsys.readouterr().err


def test_help_does_not_wait_for_torch():
    """`--help` and `--version` import neither torch nor anything that does; that keeps them under half a second."""
    code = (
        "import sys; from lavin_rt.cli.main import main\n"
        "for words in (['--help'], ['run', '--help'], ['--version']):\n"
        "    try: main(words)\n"
        "    except SystemExit as stop: assert not stop.code\n"
        "assert not {'torch', 'numpy', 'PIL', 'triton'} & set(sys.modules), sorted(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "lavin-rt run --checkpoint" in " ".join(result.stdout.split())


def test_every_command_is_there():
    """Every parser without commands below it names the function that runs it."""
    found, parsers = [], [parser()]
    while parsers:
        one = parsers.pop()
        inner = [action for action in one._actions if isinstance(action, argparse._SubParsersAction)]
        parsers += [child for action in inner for child in action.choices.values()]
        found += [] if inner else [one.get_default("run")]
    assert len(found) >= 15 and all(callable(resolve_name(name)) for name in found)


def test_choices_are_what_the_modules_know():
    assert set(options.DTYPES) == {"auto", *devices.DTYPES} and options.IMPLS == packed.IMPLEMENTATIONS
    assert options.POSTERIORS == pipeline.POSTERIORS and tuple(speeds.SPEEDS) == options.SPEEDS
