"""Verification finds what is wrong with an artifact, and lets nothing wrong be left behind."""

from __future__ import annotations

import dataclasses
import json
import shutil
import types

import onnx_ir
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checks import refusal
from support.command import exit_code
from support.onnx_exports import exported, golden_checkpoint
from support.small_artifact import add_parts, read_manifest, write_manifest

from lavin_export.errors import VerificationError
from lavin_export.networks import denoiser
from lavin_export.to_onnx import export as to_onnx
from lavin_export.to_onnx.support import SupportReport
from lavin_export.verify import artifact as verify
from lavin_export.verify.artifact import relative_error, verify_artifact
from lavin_export.verify.modulation import check_modulation
from lavin_export.writer import writing
from lavin_rt.artifact.manifest import KEPT, Manifest
from lavin_rt.checkpoint.load import ModulationInFile, describe
from lavin_rt.cli.main import main
from lavin_rt.find.model import find_checkpoint


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A verified artifact and its checkpoint, not to be changed."""
    return exported(tmp_path_factory.mktemp("made"), "dit_b", torch.float32)


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made[0], tmp_path / "artifact")


def change_weight(folder, part="denoiser", name="blocks.0.x.down", by=0.5):
    """Changes one number of one weight in the artifact's data."""
    model = onnx_ir.load(folder / f"{part}.onnx")
    tensor = model.graph.initializers[name].const_value
    value = torch.from_numpy(tensor.numpy().copy()).reshape(-1)
    changed = value[value.numel() // 2] + by
    with open(folder / f"{part}.onnx.data", "r+b") as file:
        file.seek(tensor.offset + 4 * (value.numel() // 2))
        file.write(changed.numpy().tobytes())


def rehash(folder):
    write_manifest(folder, read_manifest(folder))


def test_the_modulation_is_read_once(tmp_path, monkeypatch):
    """By the plain model, which runs a dozen times in every dtype."""
    checkpoint, read = golden_checkpoint(tmp_path / "checkpoint", "dit_b"), []
    blocks = ModulationInFile.__call__
    monkeypatch.setattr(ModulationInFile, "__call__", lambda *given: read.append(given[1]) or blocks(*given))
    config = describe(checkpoint).config
    manifest = types.SimpleNamespace(
        schedules=[8], speeds={}, config=config, parts={"denoiser": {"ranges": denoiser.RANGES}}
    )
    cases = verify.Cases(manifest, checkpoint, 3)
    with torch.no_grad():
        passes, _, run = cases._of_transformer(torch.float32, torch.device("cpu"))
    assert len(passes) == 3 and run.isfinite().all()
    assert read == list(range(config.depth))


@pytest.mark.slow
def test_what_the_manifest_says(made):
    verification = Manifest.read(made[0]).verification
    assert verification["passed"] and verification["device"] == "cpu"
    assert set(verification["parts"]) == {"denoiser", "vae_encoder", "vae_decoder"}
    for checks in verification["parts"].values():
        assert len(checks) == 3
        assert all(0 < check["error"] <= check["budget"] == 1e-5 for check in checks)
    assert 0 < verification["sampling"]["error"] <= verification["sampling"]["budget"] == 1e-4
    assert verification["sampling"]["evaluations"] == 3
    first, odd, largest = (check["sizes"] for check in verification["parts"]["denoiser"])
    assert set(first.values()) == {1, 2} and odd["batch"] == 3 and largest["cond_frames"] == 9


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "name"),
    [("denoiser", "blocks.0.x.down"), ("denoiser", "rotary_cos"), ("vae_decoder", "network.conv_in.bias")],
)
def test_one_changed_weight(made, folder, part, name):
    """By its hash; with the hash made right, by its value; and by what it does to the results."""
    change_weight(folder, part, name)
    assert f"{part}.onnx.data is not the file" in refusal(verify_artifact, folder, made[1])
    rehash(folder)
    with pytest.raises(VerificationError, match=f"weight {name} of {part} is not the checkpoint's"):
        verify_artifact(folder, made[1])


@pytest.mark.slow
def test_a_weight_that_changes_results(made, folder, monkeypatch):
    """Without the look at the weights themselves, which other formats do not have."""
    monkeypatch.setattr(verify, "check_weights", lambda *_: None)
    change_weight(folder)
    rehash(folder)
    with pytest.raises(VerificationError, match=r"denoiser at .* is off by"):
        verify_artifact(folder, made[1])


def test_a_changed_row_of_modulation(tmp_path):
    """Of any evaluation of any schedule and speed."""
    checkpoint, folder = golden_checkpoint(tmp_path / "checkpoint", "dit_b"), tmp_path / "artifact"
    with writing(folder, "onnx", checkpoint, torch.float16, steps=(20, 40), speeds=["fast"]) as writer:
        add_parts(writer)
        writer.add_part(KEPT, **writer.parts["denoiser"])
        writer.write_modulation()
    manifest = Manifest.read(folder)
    check_modulation(manifest, checkpoint)
    sound = load_file(folder / "modulation.safetensors")
    for name in sorted(sound):
        if name.startswith("knots."):
            continue
        for value in (1e-3, float("nan")):
            tensors = {other: tensor.clone() for other, tensor in sound.items()}
            row = len(tensors[name]) * 2 // 3
            tensors[name][row].view(-1)[-1] += value
            save_file(tensors, folder / "modulation.safetensors")
            with pytest.raises(VerificationError, match=f"row {row} of {name} in .* is off by"):
                check_modulation(manifest, checkpoint)


@pytest.mark.slow
def test_a_changed_modulation_table(made, folder):
    """No graph and no weight differ, and no run of the verification reads the row."""
    tensors = load_file(folder / "modulation.safetensors")
    tensors["head_scale.20"][10] *= 1.01
    save_file(tensors, folder / "modulation.safetensors")
    rehash(folder)
    with pytest.raises(VerificationError, match=r"row 10 of head_scale\.20"):
        verify_artifact(folder, made[1])


@pytest.mark.slow
def test_the_command(made, folder, tmp_path, capsys):
    artifact, checkpoint = made
    weights = str(checkpoint.dit.parent)
    assert main(["export", "verify", str(artifact), "--checkpoint", weights, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["passed"]
    other = golden_checkpoint(tmp_path / "other", "dit_a")
    assert main(["export", "verify", str(artifact), "--checkpoint", str(other.dit.parent)]) == 2
    assert "was not exported from" in capsys.readouterr().err
    change_weight(folder)
    rehash(folder)
    assert main(["export", "verify", str(folder), "--checkpoint", weights]) == 1
    assert "do not use this artifact" in capsys.readouterr().err


@pytest.mark.slow
def test_a_failing_export_leaves_nothing_behind(made, tmp_path, monkeypatch, capsys):
    """The command, with an exporter that gets one weight wrong."""
    artifact, checkpoint = made
    parts = Manifest.read(artifact).parts

    def wrong(writer, folder, *_):
        for name in parts:
            for file in (f"{name}.onnx", f"{name}.onnx.data"):
                shutil.copy(artifact / file, folder)
        change_weight(folder)
        fields = [field.name for field in dataclasses.fields(to_onnx.TracedPart)]
        for name, part in parts.items():
            known = {"name": name, "support": SupportReport({}, (10, 15), []), **part}
            yield to_onnx.TracedPart(**{field: known[field] for field in fields})

    monkeypatch.setattr(to_onnx, "write_graphs", wrong)
    weights, output = str(checkpoint.dit.parent), tmp_path / "artifact"
    assert main(["export", "onnx", "--checkpoint", weights, "-o", str(output)]) == 1
    assert "is not the checkpoint's" in capsys.readouterr().err
    monkeypatch.setattr(verify, "check_weights", lambda *_: None)
    assert main(["export", "onnx", "--checkpoint", weights, "-o", str(output)]) == 1
    assert "is off by" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert main(["export", "onnx", "--checkpoint", weights, "-o", str(output), "--no-verify"]) == 0
    assert "not verified" in capsys.readouterr().out


def test_a_copy_for_the_verification_lies_beside_the_artifact(tmp_path, monkeypatch):
    """Whose place has to have room for it, not the temporary folder."""
    checkpoint, given = golden_checkpoint(tmp_path / "checkpoint", "dit_b"), {}
    monkeypatch.setattr(verify, "verify_artifact", lambda *_, **options: given.update(options) or {"passed": True})
    with writing(tmp_path / "artifact", "onnx", checkpoint, torch.bfloat16) as writer:
        add_parts(writer)
        writer.write_modulation()
        verify.verify_written(writer)
        assert given == {"room": tmp_path} and writer.verification["passed"]


def test_relative_error():
    truth = torch.ones(4)
    assert relative_error(truth, truth) == 0
    assert relative_error(torch.full((4,), float("nan")), truth) != 0
    assert not verify.PartCheck("part", {}, float("nan"), 1.0).passed
    assert relative_error(torch.ones(3), truth) == float("inf")


def test_refused_before_any_work(tmp_path, capsys):
    checkpoint = str(golden_checkpoint(tmp_path / "checkpoint", "dit_b").dit.parent)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    for given, said in (
        (["-o", str(tmp_path / "full")], "not empty"),
        (["-o", str(tmp_path / "a"), "--dtype", "int8"], "invalid choice: 'int8'"),
        (["-o", str(tmp_path / "a"), "--steps", "21"], "steps is 21"),
        (["-o", str(tmp_path / "a"), "--steps", "20", "20"], "twice"),
        (["-o", str(tmp_path / "a"), "--clip-frames", "6"], "6"),
        (["-o", str(tmp_path / "a"), "--device", "cuda:77"], "no device"),
    ):
        assert exit_code(["export", "onnx", "--checkpoint", checkpoint, *given]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1, error
    assert find_checkpoint(checkpoint) and not (tmp_path / "a").exists()


def test_help_of_every_format(capsys):
    for kind in ("onnx", "verify"):
        with pytest.raises(SystemExit) as done:
            main(["export", kind, "--help"])
        assert done.value.code == 0
        assert "--checkpoint" in capsys.readouterr().out
