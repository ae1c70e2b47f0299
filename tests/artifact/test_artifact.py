"""The artifact's folder and manifest, and running one, on graphs of one layer."""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch
from support.checks import refusal
from support.small_artifact import WEIGHT, add_parts, read_manifest, write_manifest

from lavin_export.writer import modulation_model, writing
from lavin_rt.artifact import load as artifact
from lavin_rt.artifact.manifest import KEPT, Manifest, artifact_values
from lavin_rt.artifact.sizes import bind_sizes, check_ranges, sized
from lavin_rt.checkpoint.load import load_dit
from lavin_rt.cli.main import main
from lavin_rt.dit.layout import Shape
from lavin_rt.dit.modulation import modulation_table
from lavin_rt.errors import InputError
from lavin_rt.find.model import find_model
from lavin_rt.pipeline import Pipeline
from lavin_rt.sampling.schedule import schedule


def test_is_artifact(sound, tmp_path):
    assert artifact_values(sound)["kind"] == Manifest.read(sound).kind
    assert artifact_values(tmp_path) is None and artifact_values(tmp_path / "nowhere") is None
    (tmp_path / "manifest.json").write_text('{"name": "a web page"}')
    assert artifact_values(tmp_path) is None


def test_sizes():
    part = {
        "inputs": [{"name": "pixels", "shape": [1, 3, 1, "8*rows", "8*columns"]}, {"name": "more", "shape": ["rows"]}],
        "ranges": [{"rows": [1, 4]}, {"rows": [6, 8], "columns": [2, 2]}],
    }
    assert bind_sizes(part, [(1, 3, 1, 16, 24), (2,)]) == {"rows": 2, "columns": 3}
    assert sized([1, "16*rows", "columns"], {"rows": 2, "columns": 3}) == (1, 32, 3)
    for shapes in (
        [(1, 3, 1, 16, 24)],
        [(1, 3, 1, 16, 24), (3,)],
        [(1, 3, 1, 17, 24), (2,)],
        [(2, 3, 1, 16, 24), (2,)],
    ):
        refusal(bind_sizes, part, shapes)
    for rows, columns, fits in ((4, 9, True), (5, 2, False), (6, 3, False), (8, 2, True), (9, 2, False)):
        if fits:
            check_ranges(part, {"rows": rows, "columns": columns})
        else:
            message = refusal(check_ranges, part, {"rows": rows, "columns": columns})
            assert "rows 1 to 4 or rows 6 to 8, columns 2 to 2" in message


def test_a_pipeline_of_an_artifact(sound):
    """The velocity is `WEIGHT * latents` whatever the condition, so the result is the noise times a known factor."""
    picture = torch.zeros(32, 48, 3, dtype=torch.uint8)
    network, vae, described = artifact.load(sound)
    assert described.kind == network.impl == "onnx"
    noise = torch.randn(2, 16, 1, 4, 6, generator=torch.Generator().manual_seed(0))
    pipe = Pipeline(network, vae)
    task = pipe.task([(picture, picture)], size=(32, 48))
    for guidance in (1.0, 1.5):
        results = task.run([picture.numpy()] * 2, noise=noise, guidance=guidance)
        factor = torch.prod(1 + WEIGHT * schedule(20).diff().double())
        torch.testing.assert_close(
            torch.cat([result.latents for result in results]), (factor * noise.double()).float(), rtol=1e-5, atol=1e-6
        )
    assert task.context.vae_fingerprint == described.vae_fingerprint


def test_the_size_where_none_is_asked_for(sound):
    """The artifact's, and an encoded context's own."""
    pipe = Pipeline.from_pretrained(sound)
    picture = torch.zeros(32, 48, 3, dtype=torch.uint8)
    assert pipe.task([(picture, picture)]).size == (64, 64)
    context = pipe.task([(picture, picture)], size=(32, 48)).context
    assert pipe.task(context).size == (32, 48)
    assert "encoded at size 32x48, asked for 64x64" in refusal(pipe.task, context, size=64)


def test_the_vae_of_an_artifact(sound):
    _, vae, _ = artifact.load(sound)
    pixels = torch.rand(3, 3, 1, 16, 24, generator=torch.Generator().manual_seed(0))
    posterior = vae.encode(pixels)
    mean = pixels.unflatten(4, (3, 8)).unflatten(3, (2, 8)).mean((1, 4, 6)).unsqueeze(1).expand(3, 16, 1, 2, 3)
    torch.testing.assert_close(posterior.mean, mean)
    assert vae.decode(posterior.mean).shape == (3, 3, 1, 16, 24)
    # Blocks of pixels do not see each other in these graphs, so that tiles give what the whole gives.
    large = torch.rand(1, 3, 1, 128, 72, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(vae.encode(large, tile=8).mean, vae.encode(large).mean)
    assert "takes clips of 1 frames, not 5" in refusal(vae.encode, torch.zeros(1, 3, 5, 16, 16))
    assert "export it with --clip-frames 5" in refusal(vae.decode, torch.zeros(1, 16, 2, 2, 2))


def test_schedules_and_shapes_that_it_does_not_have(sound):
    network, _, _ = artifact.load(sound)
    blocks, head_scale = network.table(schedule(20))
    assert blocks.shape == (19, 1, 2, 4, 24) and head_scale.shape == (19, 24)
    assert "it has 20: choose" in refusal(network.table, schedule(30))
    message = refusal(network.step, Shape(5, 3, 1, 1, 4, 4, guided=True))
    assert "batch 5" in message and "batch 1 to 4" in message
    network.step(Shape(4, 3, 1, 1, 4, 4, guided=True))
    changed = schedule(20).clone()
    changed[3] += 0.001
    assert "knots are not" in refusal(network.table, changed)


def exported_anew(path):
    """Another file of the same size in a file's place, a millisecond younger."""
    content, status = path.read_bytes(), path.stat()
    path.unlink()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 10**6))


def test_an_artifact_that_is_exported_anew_while_it_is_in_use(folder):
    """What is opened late is not taken from the new one."""
    values = read_manifest(folder)
    late = {"vae_decoder_clip5": values["parts"]["vae_decoder"], KEPT: values["parts"]["denoiser"]}
    write_manifest(folder, {**values, "parts": {**values["parts"], **late}})
    network, vae, _ = artifact.load(folder)
    vae.decode(torch.zeros(1, 16, 1, 2, 2))
    network.table(schedule(20))
    for name, use in (
        ("modulation.safetensors", lambda: network.table(schedule(20))),
        ("vae_decoder.onnx.data", lambda: vae.decode(torch.zeros(1, 16, 2, 2, 2))),
        ("denoiser.onnx", lambda: network.loaded(KEPT)),
    ):
        exported_anew(folder / name)
        assert f"{name} has changed since its model was loaded; load the model again" in refusal(use)
        (folder / name).unlink()
        assert f"{name} cannot be read any more: No such file" in refusal(use)
    vae.decode(torch.zeros(1, 16, 1, 2, 2))
    network.loaded("denoiser")


def test_a_damaged_manifest_is_not_taken_for_a_checkpoints(folder):
    path = folder / "manifest.json"
    path.write_bytes(path.read_bytes()[:-9])
    assert refusal(find_model, folder).startswith(f"{path} is no JSON (")
    (folder / "modulation.safetensors").unlink()
    assert "expected lavin_dit.safetensors" in refusal(find_model, folder)


def test_info_of_an_artifact(sound, folder, capsys):
    assert main(["info", str(sound), "--self-check"]) == 0
    shown = capsys.readouterr().out
    assert "onnx" in shown and "as exported" in shown and "batch 1 to 4" in shown
    values = read_manifest(folder)
    write_manifest(folder, {**values, "target": {**values["target"], "device": "cuda"}})
    assert main(["info", str(folder)]) == 0
    assert "no: " in capsys.readouterr().out
    (folder / "denoiser.onnx").write_bytes(b"")
    assert main(["info", str(folder), "--self-check"]) == 2


def test_writing(checkpoint, tmp_path):
    output = tmp_path / "artifact"
    output.mkdir()  # an empty folder is fine
    with writing(output, "onnx", checkpoint, torch.float16, steps=(4, 20), options={"a": 1}) as writer:
        assert writer.folder.parent == output and list(output.iterdir()) == [writer.folder]
        add_parts(writer)
        writer.write_modulation()
    read = Manifest.read(output)
    read.check_files()
    assert read.dtype == torch.float16 and read.schedules == (4, 20) and read.options == {"a": 1}
    assert (output / "template" / "edges").is_dir()
    assert str(tmp_path) not in (output / "manifest.json").read_text(), "the maker's folders are nobody's business"
    dit = load_dit(checkpoint.dit, dtype=torch.float32)
    assert read.config == dit.config
    network = artifact.ArtifactNetwork(read, torch.device("cpu"), lambda: None)
    for steps in (4, 20):
        table = modulation_table(dit, schedule(steps)[:-1])
        assert all(map(torch.equal, network.table(schedule(steps)), (table.blocks, table.head_scale)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["artifact", "checkpoint"]


def test_writing_leaves_nothing_behind(checkpoint, tmp_path):
    output = tmp_path / "artifact"
    with pytest.raises(RuntimeError, match="midway"), writing(output, "onnx", checkpoint, torch.float32) as writer:
        add_parts(writer)
        raise RuntimeError("midway")
    with pytest.raises(InputError), writing(output, "onnx", checkpoint, torch.float32) as writer:
        writer.write_modulation()  # and no parts: the manifest contradicts itself
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("owner/model@0123abcd", "owner/model@0123abcd"),
        ("/home/me@work/model", "model"),
        ("../me@work/model", "model"),
        ("here/model@2", "model@2"),
        (".", "the current one"),
        ("model/", "model"),
    ],
)
def test_what_a_manifest_says_of_the_source(checkpoint, tmp_path, monkeypatch, source, name):
    (tmp_path / "the current one" / "here" / "model@2").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "the current one")
    with writing(tmp_path / "a", "onnx", dataclasses.replace(checkpoint, source=source), torch.float32) as writer:
        add_parts(writer)
        writer.write_modulation()
    assert Manifest.read(tmp_path / "a").source["name"] == name


def test_a_template_that_cannot_be_copied(checkpoint, tmp_path):
    """Found before the work that it would lose."""
    lost = checkpoint.templates / "edges" / "0_input.png"
    lost.symlink_to(tmp_path / "nowhere")
    given = (tmp_path / "artifact", "onnx", checkpoint, torch.float32)
    said = refusal(writing(*given).__enter__)
    assert said.startswith(f"{lost} cannot be copied into the artifact ([Errno 2] No such file") and "[(" not in said
    with writing(*given, templates=False) as writer:
        add_parts(writer)
        writer.write_modulation()
    assert not (tmp_path / "artifact" / "template").exists()


def test_writing_where_something_is(checkpoint, tmp_path):
    output = tmp_path / "artifact"
    output.mkdir()
    (output / "half").write_text("of another one")
    with pytest.raises(InputError, match="not empty"), writing(output, "onnx", checkpoint, torch.float32):
        pytest.fail("was entered")
    assert (output / "half").read_text() == "of another one"
    with pytest.raises(InputError, match="steps is 7"):  # before anything is made
        writing(tmp_path / "other", "onnx", checkpoint, torch.float32, steps=(7,)).__enter__()
    assert not (tmp_path / "other").exists()


def test_a_modulation_model_holds_little(checkpoint):
    with writing(checkpoint.dit.parent / "out", "onnx", checkpoint, torch.float32) as writer:
        model = modulation_model(writer.file, writer.config)
        add_parts(writer)
        writer.write_modulation()
    assert all(parameter.is_meta for parameter in model.blocks.parameters())
