"""OpenVINO exports of the golden model: what they compute, and what verification finds."""

from __future__ import annotations

import dataclasses
import resource
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support.checks import refusal
from support.command import exit_code, write_picture, write_template
from support.golden import golden_cases, relative_error
from support.onnx_exports import golden_checkpoint
from support.openvino_artifact import exported_openvino
from support.small_artifact import read_manifest, write_manifest

from lavin_export.errors import VerificationError
from lavin_export.to_openvino import int8
from lavin_export.to_openvino.shared import save_network
from lavin_export.verify import artifact as verify
from lavin_export.verify.artifact import verify_artifact
from lavin_export.verify.int8 import EightBits, rounded
from lavin_rt.artifact import load as artifact
from lavin_rt.artifact.manifest import Manifest
from lavin_rt.artifact.openvino import core
from lavin_rt.dit.layout import Shape
from lavin_rt.files import written_whole
from lavin_rt.find.model import find_checkpoint
from lavin_rt.pipeline import Pipeline
from lavin_rt.sampling.executor import Executor
from lavin_rt.sampling.sampler import sample
from lavin_rt.sampling.schedule import schedule

openvino = pytest.importorskip("openvino", reason="needs the extra openvino")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with `checkpoint` and `artifact`, not to be changed."""
    return exported_openvino(tmp_path_factory)


@pytest.fixture(scope="module")
def loaded(made):
    return artifact.load(made / "artifact")


def run(network, cond_latents, noise, steps, guidance):
    queries, _, frames, height, width = cond_latents.shape
    shape = Shape(queries, frames, 1, noise.shape[2], height, width, guided=guidance != 1.0)
    executor = Executor(network)
    rows = executor.embed(cond_latents)
    return executor.sample(shape, rows[:, :-1], rows[:, -1:], noise, schedule(steps), guidance)


def test_a_network_that_does_not_fit(tmp_path):
    """Files of 64 kB at most, in the place of a full disk, of which OpenVINO says as little."""
    operators = openvino.opset13
    given = operators.parameter([-1, 512], np.float32, name="x")
    weight = operators.constant(np.ones((512, 64), np.float32), name="weight")
    model = openvino.Model([operators.matmul(given, weight, False, False)], [given], "m")
    output = tmp_path / "artifact"

    def write():
        with written_whole(output, folder=True) as partial:
            save_network(openvino, model, partial / "m.xml")

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    try:
        said = refusal(write)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert said.startswith(f"{output}: cannot be written (OpenVINO: ") and "is the disk full?" in said
    assert not list(tmp_path.iterdir())
    write()
    assert {path.name for path in output.iterdir()} == {"m.xml", "m.bin"}


@pytest.mark.slow
def test_what_was_written(made):
    manifest = Manifest.read(made / "artifact")
    assert manifest.kind == "openvino" and manifest.dtype == torch.float32 and manifest.target["device"] == "cpu"
    assert manifest.verification["passed"] and manifest.verification["method"] == "as it runs"
    errors = [check["error"] for checks in manifest.verification["parts"].values() for check in checks]
    assert len(errors) == 15 and 0 < max(errors) <= 1e-5
    parts = ["denoiser", "vae_encoder", "vae_decoder", "vae_encoder_clip5", "vae_decoder_clip5"]
    files = {f"{name}.{suffix}" for name in parts for suffix in ("xml", "bin")} | {"modulation.safetensors"}
    assert set(manifest.files) == files and list(manifest.parts) == parts
    assert {path.name for path in (made / "artifact").iterdir()} == files | {"manifest.json"}, "graphs are left"


@pytest.mark.slow
@pytest.mark.parametrize("case", sorted(golden_cases("dit_c", "sample")))
def test_golden_sampling(loaded, case):
    case = golden_cases("dit_c")[case]
    network, _, manifest = loaded
    steps = int(case["num_steps"])
    if steps not in manifest.schedules:
        pytest.skip(f"{steps} knots were not exported")
    latents = run(network, case["cond_latents"], case["noise"], steps, float(case["cfg_scale"]))
    assert relative_error(latents, case["latents"]) <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("case", sorted(golden_cases("pipeline", "pipeline")))
def test_golden_pipeline(loaded, case):
    case = golden_cases("pipeline")[case]
    network, vae, _ = loaded
    pairs = [(given, wanted) for given, wanted in case["context"].permute(0, 1, 3, 4, 2)]
    task = Pipeline(network, vae).task(pairs, size=tuple(case["size"].tolist()))
    [result] = task.run([case["query"].permute(1, 2, 0)], guidance=float(case["cfg_scale"]), noise=case["noise"])
    assert relative_error(result.latents, case["latents"]) <= 1e-4
    assert (result.frames[0].int() - case["image"].int()).abs().max() <= 1


@pytest.mark.slow
def test_other_batches_contexts_sizes_and_clips(loaded, golden_dit):
    """None of these is what the graphs were traced with."""
    network, vae, _ = loaded
    generator = torch.Generator().manual_seed(0)
    for queries, frames, targets, height, width in ((1, 1, 1, 2, 2), (3, 9, 1, 10, 4), (1, 3, 3, 2, 14)):
        cond = torch.randn(queries, 16, frames, height, width, generator=generator)
        noise = torch.randn(queries, 16, targets, height, width, generator=generator)
        truth = sample(golden_dit("dit_c"), cond, noise, steps=8, guidance=2.0, impl="plain")
        assert relative_error(run(network, cond, noise, 8, 2.0), truth) <= 1e-4
    case = golden_cases("stvae")["vae1"]
    assert case["pixels"].shape[2] == 5
    posterior = vae.encode(case["pixels"])
    assert relative_error(posterior.mean, case["mean"]) <= 1e-5
    assert relative_error(vae.decode(case["mean"]), case["decoded"]) <= 1e-5


@pytest.mark.slow
def test_one_network_for_all_shapes(made, loaded):
    """As a network runs that is too large to be compiled for every shape."""
    network, _, manifest = loaded
    from lavin_rt.artifact.openvino import OpenVinoSession

    session = OpenVinoSession(made / "artifact", manifest.parts["denoiser"], manifest)
    session._held = 0
    blocks, head_scale = network.table(schedule(8))
    for height, width in ((4, 6), (2, 10)):
        latents, cond = torch.randn(1, 16, 1, height, width), torch.randn(2, 16, 3, height, width)[:1]
        given = latents, cond, blocks[3], head_scale[3]
        assert relative_error(session(*given)[0], network.session(*given)[0]) <= 1e-6
    assert list(session._requests) == [()]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*no bfloat16")
def test_bfloat16(made, golden_dit):
    """Within twice the plain model's own error where the processor has bfloat16, in float32 elsewhere."""
    network, _, _ = artifact.load(Manifest.read(made / "artifact").computing_in(torch.bfloat16))
    case = golden_cases("dit_c")["sample0"]
    latents = run(network, case["cond_latents"], case["noise"], 20, float(case["cfg_scale"]))
    error = relative_error(latents, case["latents"])
    assert error <= 2e-2
    if network.session.computes_in == torch.bfloat16:
        assert error > 1e-5, "bfloat16 cannot be this exact: it was not computed in"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*no bfloat16")
def test_an_artifact_in_bfloat16(made, tmp_path, monkeypatch):
    """Differs in its manifest alone. At small sizes, as plain bfloat16 takes minutes on a processor without."""
    monkeypatch.setattr(verify, "LARGEST", verify.ODD)
    monkeypatch.setattr(verify, "LARGEST_PICTURE", verify.ODD_PICTURE)
    folder = shutil.copytree(made / "artifact", tmp_path / "artifact")
    values = {**read_manifest(folder), "dtype": "bfloat16"}
    values["parts"] = {name: part for name, part in values["parts"].items() if "clip" not in name}
    write_manifest(folder, values)
    found = verify_artifact(folder, find_checkpoint(made / "checkpoint"))
    has = "BF16" in core(openvino).get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    assert found["method"] == ("as it runs" if has else "in float32 arithmetic, as this processor has no bfloat16")
    checks = [check for checks in found["parts"].values() for check in checks]
    assert all(1e-4 < check["budget"] < 0.1 for check in checks)


@pytest.mark.slow
@pytest.mark.parametrize(("part", "name"), [("denoiser", "blocks.0.x.down"), ("vae_decoder", "network.conv_in.weight")])
def test_one_changed_weight(made, tmp_path, part, name):
    """With its right hash, and too small a change for any result to tell."""
    folder = shutil.copytree(made / "artifact", tmp_path / "artifact")
    model = core(openvino).read_model(folder / f"{part}.xml")
    [constant] = [node for node in model.get_ops() if node.get_friendly_name() == name]
    old = np.array(constant.data)
    del model, constant
    content = bytearray((folder / f"{part}.bin").read_bytes())
    at = content.index(old.tobytes()) + 4 * (old.size // 2)
    value = np.nextafter(old.reshape(-1)[old.size // 2], np.float32(9))
    content[at : at + 4] = value.tobytes()
    (folder / f"{part}.bin").write_bytes(content)
    write_manifest(folder, read_manifest(folder))
    with pytest.raises(VerificationError, match=f"weight {name} of {part} is not the checkpoint's"):
        verify_artifact(folder, find_checkpoint(made / "checkpoint"))


@pytest.mark.slow
def test_a_weight_under_another_name(made, tmp_path):
    folder = shutil.copytree(made / "artifact", tmp_path / "artifact")
    network = folder / "denoiser.xml"
    network.write_bytes(network.read_bytes().replace(b'"blocks.0.x.down"', b'"blocks.0.x.other"'))
    write_manifest(folder, read_manifest(folder))
    with pytest.raises(VerificationError, match=r"denoiser lacks the weight blocks.0.x.down"):
        verify_artifact(folder, find_checkpoint(made / "checkpoint"))


@pytest.mark.slow
def test_the_commands(made, tmp_path, capsys):
    """`export verify`, and `run` on pairs of a folder."""
    assert exit_code(["export", "verify", str(made / "artifact"), "--checkpoint", str(made / "checkpoint")]) == 0
    assert "as it runs" in capsys.readouterr().out
    query, task = write_picture(tmp_path / "query.png", 9), write_template(tmp_path / "pairs")
    given = ["--task", str(task), "--query", str(query), "--size", "32x48", "--pairs", "2", "--steps", "8"]
    results = []
    for name in ("artifact", "checkpoint"):
        output = tmp_path / f"{name}.png"
        command = ["run", "--checkpoint", str(made / name), *given, "--dtype", "float32", "-o", str(output)]
        assert exit_code(command) == 0, capsys.readouterr().err
        results.append(np.asarray(Image.open(output)).astype(int))
    assert abs(results[0] - results[1]).max() <= 1


def test_refused_before_any_work(tmp_path, capsys):
    checkpoint, output = str(golden_checkpoint(tmp_path / "checkpoint", "dit_a").dit.parent), tmp_path / "out"
    (tmp_path / "empty").mkdir()
    for options, line in (
        (["--int8"], "has none; expected a folder of tasks' folders: --calibrate DIR"),
        (["--int8", "--calibrate", str(tmp_path / "empty")], "has none; expected a folder of tasks' folders"),
        (["--dtype", "float16"], "OpenVINO computes in float32 or bfloat16"),
        (["--clip-frames", "4"], "4"),
        (["--steps", "7"], "steps is 7"),
    ):
        assert exit_code(["export", "openvino", "--checkpoint", checkpoint, "-o", str(output), *options]) == 2
        said = capsys.readouterr().err
        assert line in said and said.count("\n") == 1 and not output.exists()


@pytest.mark.slow
def test_the_bundled_model_in_int8(tmp_path):
    """Whose tasks are more than most, and held against the plain model by the command itself."""
    assert exit_code(["export", "openvino", "--int8", "-o", str(tmp_path / "mini")]) == 0
    assert Manifest.read(tmp_path / "mini").record()["int8"] == ["denoiser"]


@pytest.mark.slow
def test_calibration(made, tmp_path, monkeypatch):
    """Both branches on the way to each task's last target, of tasks with few pairs too, and to noise."""
    for name, pairs in (("few", 1), ("many", 6)):
        write_template(tmp_path / name, pairs)
    manifest = dataclasses.replace(Manifest.read(made / "artifact"), size=32)
    samples = list(int8.calibration(manifest, tmp_path))
    assert len(samples) == (2 + 3) * 4 * 2
    assert [tuple(cond.shape) for _, cond, *_ in samples] == [
        (1, 16, frames, 4, 4) for of_cond in (1, 7, 9, 3, 1) for _ in range(4) for frames in (of_cond, 2)
    ]
    network, vae, _ = artifact.load(made / "artifact")
    blocks, head_scale = network.table(schedule(20))
    latents = Pipeline(network, vae).task(tmp_path / "many", 4, 32).context.latents
    for index, evaluation in enumerate((0, 6, 12, 18)):
        (noisy, cond, *rows), (other, null, *_) = samples[8 + 2 * index : 10 + 2 * index]
        assert torch.equal(noisy, other) and torch.equal(cond, latents[:, :, :-1])
        assert not null[:, :, 0].any() and torch.equal(null[:, :, 1], cond[:, :, -1])
        assert torch.equal(rows[0], blocks[evaluation]) and torch.equal(rows[1], head_scale[evaluation])
        noise = (noisy - schedule(20)[evaluation] * latents[:, :, -1:]) / (1 - schedule(20)[evaluation])
        assert 0.8 < noise.std() < 1.2
    write_template(tmp_path / "more", 1)
    monkeypatch.setattr(int8, "TASKS", 2)
    assert len(list(int8.calibration(manifest, tmp_path))) == (2 + 3) * 4 * 2  # of the first and the last of three


@pytest.mark.slow
def test_int8(made, tmp_path, monkeypatch, capsys):
    """Verified against what rounding to 8 bits costs by itself, and found out where it is worse than that."""
    folder = shutil.copytree(made / "artifact", tmp_path / "artifact")
    exact = {path.name: path.stat().st_size for path in folder.iterdir()}

    def of_noise(manifest, templates):
        """As verification has it: contexts of the golden VAE, which is not trained, are nothing like it."""
        blocks, head_scale = artifact.load(manifest)[0].table(schedule(20))
        generator = torch.Generator().manual_seed(0)
        for evaluation in range(0, 19, 2):
            for side in (2, 8):
                given = [
                    torch.randn(1, 16, frames, side, side, generator=generator) for frames in (1, 1 + evaluation % 3)
                ]
                yield [*given, blocks[evaluation], head_scale[evaluation]]

    monkeypatch.setattr(int8, "calibration", of_noise)
    int8.quantize_denoiser(Manifest.read(folder), tmp_path)
    assert not capsys.readouterr().out
    assert {path.name for path in folder.iterdir()} == set(exact)
    assert (folder / "denoiser.bin").stat().st_size < 0.4 * exact["denoiser.bin"]
    values = read_manifest(folder)
    values["parts"]["denoiser"]["quantized"] = "int8"
    write_manifest(folder, values)
    assert Manifest.read(folder).record()["int8"] == ["denoiser"]
    checkpoint = find_checkpoint(made / "checkpoint")
    found = verify_artifact(folder, checkpoint)
    for name, checks in found["parts"].items():
        for check in checks:
            assert (check["budget"] == 1e-5) == (name != "denoiser") and (check["error"] > 1e-4) == (name == "denoiser")
    assert 1e-4 < found["sampling"]["error"] <= found["sampling"]["budget"] < 0.2
    tensors = load_file(folder / "modulation.safetensors")
    tensors["head_scale.20"] += 1
    save_file(tensors, folder / "modulation.safetensors")
    write_manifest(folder, read_manifest(folder))
    with pytest.raises(VerificationError, match=r"row 0 of head_scale.20 in modulation.safetensors is off by"):
        verify_artifact(folder, checkpoint)
    with pytest.MonkeyPatch.context() as patch:  # what the denoiser makes of it
        patch.setattr(verify, "check_modulation", lambda manifest, checkpoint: None)
        with pytest.raises(VerificationError, match=r"denoiser at .* is off by"):
            verify_artifact(folder, checkpoint)


def test_eight_bits():
    rows, weight = torch.tensor([[0.5, -1.27], [0.004, 1.0]]), torch.tensor([[63.0, 0.4], [0.0063, 0.0]])
    whole_rows, whole_weight = torch.tensor([[0.5, -1.27], [0.0, 1.0]]), torch.tensor([[63.0, 0.0], [0.0063, 0.0]])
    torch.testing.assert_close(rounded(rows, (0, 1), 127), whole_rows)
    torch.testing.assert_close(rounded(weight, -1, 63), whole_weight)
    with EightBits():
        result = torch.nn.functional.linear(rows, weight)
    torch.testing.assert_close(result, whole_rows @ whole_weight.T)
    assert torch.equal(rounded(torch.zeros(2), -1, 63), torch.zeros(2))


@pytest.mark.slow
def test_nncf_tells_nobody():
    """In a process of its own, as NNCF tells nobody in one with pytest in it."""
    code = (
        "from lavin_export.to_openvino.int8 import import_nncf\n"
        "import_nncf()\n"
        "from nncf.telemetry.wrapper import NNCFTelemetryStub, telemetry\n"
        "import sys, openvino_telemetry\n"
        "assert isinstance(telemetry, NNCFTelemetryStub), type(telemetry)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_without_nncf(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "nncf", None)
    assert exit_code(["export", "openvino", "--int8", "-o", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "exporting in int8 needs the package nncf" in said and "lavin-rt[openvino]" in said
    assert said.count("\n") == 1 and not (tmp_path / "out").exists()
