"""OpenVINO artifacts, on networks of one layer: what they compute, and what is refused of those that lie."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
import types
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import pytest
import torch
from support.checks import refusal
from support.command import exit_code
from support.onnx_exports import golden_checkpoint
from support.openvino_artifact import write_small_openvino
from support.small_artifact import WEIGHT, read_manifest, write_manifest, write_small_artifact

from lavin_export.to_openvino import export as to_openvino
from lavin_rt.artifact import load as artifact
from lavin_rt.artifact import openvino as runtime
from lavin_rt.artifact.manifest import Manifest
from lavin_rt.cli.main import main
from lavin_rt.errors import InputError
from lavin_rt.find.model import find_model
from lavin_rt.pipeline import Pipeline
from lavin_rt.sampling.schedule import schedule

openvino = pytest.importorskip("openvino", reason="needs the extra openvino")


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A sound artifact, not to be changed."""
    return write_small_openvino(tmp_path_factory.mktemp("sound") / "artifact")


def session(folder, dtype=torch.float32, part="denoiser") -> runtime.OpenVinoSession:
    manifest = Manifest.read(folder).computing_in(dtype)
    return runtime.OpenVinoSession(folder, manifest.parts[part], manifest)


def inputs(batch=1, frames=2, height=4, width=6) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(batch)
    shapes = (batch, 16, 1, height, width), (batch, 16, frames, height, width), (1, 2, 4, 24), (24,)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def test_a_pipeline_of_an_artifact(sound):
    """The velocity is `WEIGHT * latents` whatever the condition, so the result is the noise times a known factor."""
    picture = torch.zeros(32, 48, 3, dtype=torch.uint8)
    pipe = Pipeline.from_pretrained(sound)
    assert pipe.impl == "openvino" and pipe.dtype == torch.float32
    noise = torch.randn(2, 16, 1, 4, 6, generator=torch.Generator().manual_seed(0))
    task = pipe.task([(picture, picture)], size=(32, 48))
    factor = torch.prod(1 + WEIGHT * schedule(20).diff().double())
    for guidance in (1.0, 1.5):
        results = task.run([picture.numpy()] * 2, noise=noise, guidance=guidance)
        torch.testing.assert_close(
            torch.cat([result.latents for result in results]), (factor * noise.double()).float(), rtol=1e-5, atol=1e-6
        )


def test_the_vae_of_an_artifact(sound):
    _, vae, _ = artifact.load(sound)
    pixels = torch.rand(3, 3, 1, 16, 24, generator=torch.Generator().manual_seed(0))
    posterior = vae.encode(pixels)
    mean = pixels.unflatten(4, (3, 8)).unflatten(3, (2, 8)).mean((1, 4, 6)).unsqueeze(1).expand(3, 16, 1, 2, 3)
    torch.testing.assert_close(posterior.mean, mean)
    assert vae.decode(posterior.mean).shape == (3, 3, 1, 16, 24)


def test_results_and_inputs_are_the_callers(sound):
    """A result is no memory that the next call writes into; inputs may be views or have gradients."""
    run, given = session(sound), inputs(2)
    [first] = run(*given)
    kept = first.clone()
    given[0] = given[0].transpose(3, 4).contiguous().transpose(3, 4).requires_grad_()
    with torch.inference_mode():
        [second] = run(given[0] * 2, *given[1:])
    assert torch.equal(first, kept) and torch.equal(second, 2 * first)
    assert torch.equal(run(given[0].detach().contiguous().requires_grad_(), *given[1:])[0], kept)
    assert torch.equal(run(*given)[0], kept) and torch.equal(kept, WEIGHT * given[0])
    second += 1  # is not a tensor of inference mode


def test_compiled_shapes_are_held_and_bounded(sound, monkeypatch):
    run = session(sound)
    compiled, compile_model = [], run._core.compile_model
    run._core = type("Core", (), {"compile_model": lambda self, *given: compiled.append(1) or compile_model(*given)})()
    run._held = 2
    for batch, count in ((1, 1), (2, 2), (1, 2), (3, 3), (1, 3), (2, 4)):
        assert torch.equal(run(*inputs(batch))[0], WEIGHT * inputs(batch)[0])
        assert len(compiled) == count and len(run._requests) <= 2
    monkeypatch.setattr(runtime, "BYTES_HELD", 5)  # one copy of its weights of 4 bytes
    run = session(sound)
    for batch in (1, 2, 3):
        assert torch.equal(run(*inputs(batch))[0], WEIGHT * inputs(batch)[0])
    assert list(run._requests) == [()], "is compiled for all shapes at once"


def test_it_is_told_precision_and_threads(sound):
    run = session(sound)
    run(*inputs())
    [request] = run._requests.values()
    model = request.get_compiled_model()
    assert model.get_property("INFERENCE_PRECISION_HINT").get_type_name() == "f32"
    assert model.get_property("INFERENCE_NUM_THREADS") == torch.get_num_threads()
    assert model.get_property("NUM_STREAMS") == 1 and model.get_property("ENABLE_CPU_PINNING") is False
    assert runtime.precision(torch.bfloat16, "x") == "bf16"


@pytest.mark.parametrize("has", [True, False])
def test_bfloat16_where_the_processor_has_it(sound, monkeypatch, has):
    core = runtime.core(openvino)
    told = types.SimpleNamespace(
        read_model=core.read_model,
        get_property=lambda device, name: ["FP32", "BF16"] if has else ["FP32"],
    )
    monkeypatch.setattr(runtime, "core", lambda library: told)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run = session(sound, torch.bfloat16)
    assert run.computes_in == (torch.bfloat16 if has else torch.float32)
    assert [str(one.message) for one in said] == (
        [] if has else ["this processor has no bfloat16: OpenVINO computes in float32"]
    )
    assert run._settings["INFERENCE_PRECISION_HINT"] == "bf16"


@pytest.mark.filterwarnings("ignore:.*no bfloat16")
def test_the_dtype_asked_for(sound, folder):
    pipe = Pipeline.from_pretrained(sound, dtype="bfloat16")
    assert pipe.dtype == torch.bfloat16 and pipe._origin[1]["dtype"] == torch.bfloat16
    assert "OpenVINO computes in float32 or bfloat16" in refusal(Pipeline.from_pretrained, sound, dtype="float16")
    write_manifest(folder, {**read_manifest(folder), "dtype": "bfloat16"})
    assert Pipeline.from_pretrained(folder).dtype == torch.bfloat16
    assert Pipeline.from_pretrained(folder, dtype="float32").dtype == torch.float32


def test_the_dtype_of_another_kind_stays(tmp_path):
    onnx_artifact = write_small_artifact(tmp_path / "onnx")
    assert "was exported in float32, asked for float16" in refusal(
        Pipeline.from_pretrained, onnx_artifact, dtype="float16"
    )


def test_calls_from_several_threads(sound):
    """Which one request would refuse, or mix up."""
    run = session(sound)

    def work(seed):
        given = inputs(4, 9, 64, 64)
        given[0] = given[0] + seed
        return all(torch.equal(run(*given)[0], WEIGHT * given[0]) for _ in range(20))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


def test_info(sound, capsys):
    assert main(["info", str(sound), "--self-check"]) == 0
    shown = capsys.readouterr().out
    assert "openvino" in shown and "as exported" in shown and "yes, on cpu" in shown


def test_it_needs_no_trust(sound):
    """Of a hub, either: it is a graph, as ONNX is, and no code."""
    from_hub = dataclasses.replace(find_model(sound), fetched=True)
    assert Pipeline.from_pretrained(from_hub).impl == "openvino"


def test_without_the_package(sound, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "openvino", None)
    line = "needs the package openvino, which is not installed: pip install 'lavin-rt[openvino]'"
    assert line in refusal(artifact.load, sound)
    assert exit_code(["export", "openvino", "-o", str(tmp_path / "out")]) == 2
    assert line in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", ["denoiser.xml", "denoiser.bin", "modulation.safetensors"])
def test_truncated_changed_missing_and_linked_files(folder, tmp_path, monkeypatch, file):
    def run(*_):
        raise AssertionError("a hostile artifact came to be loaded")

    monkeypatch.setattr(runtime, "import_openvino", run)
    path, content = folder / file, (folder / file).read_bytes()
    path.write_bytes(content[:-1])
    assert "bytes, the manifest says" in refusal(artifact.load, folder)
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert "is not the file that was exported" in refusal(artifact.load, folder)
    path.unlink()
    assert "not complete" in refusal(artifact.load, folder)
    (tmp_path / "outside").write_bytes(content)
    path.symlink_to(tmp_path / "outside")
    assert "no plain file" in refusal(artifact.load, folder)


def edited(folder, change):
    """Changes the denoiser's XML, with its right hash."""
    path = folder / "denoiser.xml"
    content = change(path.read_bytes())
    assert content != path.read_bytes()
    path.write_bytes(content)
    write_manifest(folder, read_manifest(folder))
    return folder


@pytest.mark.parametrize(
    "change",
    [
        lambda xml: xml[: len(xml) // 2],
        lambda xml: b"<",
        lambda xml: b"",
        lambda xml: b"\x00" + xml,
        lambda xml: xml.replace(b'type="Multiply"', b'type="Evil"'),
        lambda xml: xml.replace(b'offset="0"', b'offset="18446744073709551612"'),
        lambda xml: xml.replace(b'offset="0"', b'offset="-4"'),
        lambda xml: xml.replace(b'offset="0"', b'offset="4"'),
    ],
    ids=["half", "less", "empty", "binary", "operator", "far", "before", "behind"],
)
def test_networks_that_are_none(folder, change):
    message = refusal(artifact.load, edited(folder, change))
    assert "denoiser.xml" in message and "export or fetch the artifact again" in message


def test_a_network_of_another_form(folder, tmp_path, monkeypatch):
    """OpenVINO goes by a file's content, and other forms name files of the machine to read weights from."""
    (tmp_path / "onnx").mkdir()
    graph = write_small_artifact(tmp_path / "onnx" / "artifact") / "denoiser.onnx"
    model = onnx.load(graph, load_external_data=False)
    model.graph.initializer[0].external_data[0].value = "../secret"
    assert "is no XML file of OpenVINO" in refusal(artifact.load, edited(folder, lambda _: model.SerializeToString()))


@pytest.mark.parametrize("weights", [[], ["denoiser.bin", "vae_encoder.bin"]])
def test_weights_of_no_or_several_files(folder, weights):
    values = read_manifest(folder)
    values["parts"]["denoiser"]["weights"] = weights
    write_manifest(folder, values)
    assert "expected one file" in refusal(artifact.load, folder)


def test_weights_that_end_early(folder):
    (folder / "vae_encoder.bin").write_bytes(b"\0" * 16)
    write_manifest(folder, read_manifest(folder))
    assert "cannot be loaded" in refusal(artifact.load, folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda part: part["inputs"][0].update(name="other"),
        lambda part: part["inputs"][0].update(dtype="float16"),
        lambda part: part["inputs"][3].update(shape=[25]),
        lambda part: part["inputs"].reverse(),
        lambda part: part["outputs"][0].update(shape=["batch", 17, "target_frames", "height", "width"]),
        lambda part: part["outputs"].append(part["outputs"][0]),
        lambda part: part["inputs"].append({"name": "more", "dtype": "float32", "shape": [1]}),
    ],
    ids=["name", "dtype", "size", "order", "output", "two outputs", "five inputs"],
)
def test_a_network_that_is_not_what_the_manifest_says(folder, change):
    values = read_manifest(folder)
    change(values["parts"]["denoiser"])
    write_manifest(folder, values)
    assert "its manifest says" in refusal(artifact.load, folder)


def test_an_output_of_other_sizes(folder):
    values = read_manifest(folder)
    values["parts"]["denoiser"]["outputs"][0]["shape"][3:] = ["width", "height"]
    write_manifest(folder, values)
    network, _, _ = artifact.load(folder)
    with pytest.raises(InputError, match="its manifest says"):
        network.session(*inputs())


def test_another_device(sound):
    assert "cannot run on cuda" in refusal(Manifest.read(sound).check_device, torch.device("cuda:0"))


def test_an_export_in_bfloat16(tmp_path, monkeypatch):
    """Its files are float32, and hold what the graphs do to the bit; what made them is gone."""
    checkpoint, graphs = golden_checkpoint(tmp_path / "checkpoint", "dit_a"), write_small_artifact(tmp_path / "graphs")

    def small(writer, folder, lengths, progress):
        assert writer.dtype == torch.float32 and lengths == [1]
        for name, part in read_manifest(graphs)["parts"].items():
            for file in (part["file"], *part["weights"]):
                shutil.copy(graphs / file, folder)
            yield types.SimpleNamespace(name=name, support=None, **part)
            assert not list(folder.iterdir())

    monkeypatch.setattr(to_openvino.to_onnx, "graphs", small)
    made = to_openvino.export_openvino(checkpoint, tmp_path / "out", dtype=torch.bfloat16, verify=False)
    assert made.kind == "openvino" and made.dtype == torch.bfloat16 and made.target["device"] == "cpu"
    assert (made.folder / "denoiser.bin").read_bytes() == np.float32(WEIGHT).tobytes()
    assert (made.folder / "vae_encoder.bin").stat().st_size >= 4 * 32 * 3 * 64
    assert not list((tmp_path / "out").glob("*.onnx*"))


def test_signals_are_handled_when_sessions_have_gone(sound):
    """OpenVINO sets signal stacks; where they had gone before their thread, the next signal was a crash."""
    code = (
        "import faulthandler, signal, sys; from lavin_rt.pipeline import Pipeline\n"
        "faulthandler.enable(); signal.signal(signal.SIGUSR1, lambda *_: None)\n"  # has a signal stack of its own
        "first, second = (Pipeline.from_pretrained(sys.argv[1]) for _ in range(2))\n"
        "del first; del second; signal.raise_signal(signal.SIGUSR1)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code, sound], env=environment, check=True, timeout=120)
