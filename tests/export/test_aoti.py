"""AOTInductor artifacts: compiled, verified, run from Python, and refused where they would do harm."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.aoti_artifact import SPEEDS, artifact, changed, golden_checkpoint, pipeline_cases, sessions
from support.checks import refusal
from support.golden import golden_cases, relative_error

import lavin_rt
from lavin_rt.artifact.aoti import PERMUTED, AotiSession, check_versions, read_weights
from lavin_rt.artifact.load import load
from lavin_rt.artifact.manifest import KEPT, Manifest
from lavin_rt.dit.layout import Shape
from lavin_rt.dit.modulation import modulation_table
from lavin_rt.sampling.executor import Executor
from lavin_rt.sampling.sampler import sampled as sampled_at

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    return artifact(tmp_path_factory)


def test_weights_keep_their_order_in_memory(tmp_path):
    from lavin_export.to_aoti import write_weights

    generator = torch.Generator().manual_seed(0)
    tensors = {
        "matrix": torch.randn(5, 7, generator=generator).t(),
        "convolution": torch.randn(3, 4, 2, 6, generator=generator).permute(3, 0, 2, 1),
        "contiguous": torch.randn(16, 3, generator=generator),
        "one row": torch.randn(1, 8, generator=generator).t(),
        "number": torch.tensor(1.5),
    }
    write_weights(tmp_path / "weights.safetensors", tensors)
    loaded = read_weights(tmp_path / "weights.safetensors", CPU)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor)
        assert loaded[name].stride() == tensor.stride() or tensor.is_contiguous()
    with pytest.raises(ValueError, match="leave gaps"):
        write_weights(tmp_path / "other.safetensors", {"gaps": torch.zeros(4, 6)[:, ::2]})


def test_matrices_are_reordered_and_keep_their_values(golden_dit):
    from lavin_export.networks.denoiser import BranchDenoiser
    from lavin_export.to_aoti import inner_first_

    network = BranchDenoiser(golden_dit("dit_a"))
    before = {name: parameter.clone() for name, parameter in network.named_parameters()}
    inner_first_(network)
    assert all(torch.equal(parameter, before[name]) for name, parameter in network.named_parameters())
    assert network.blocks[0]["x"].qkv.stride(0) == 1
    # The model that it was made of is as it was.
    assert golden_dit("dit_a").blocks[0].attention.qkv.is_contiguous()


@pytest.mark.parametrize(
    ("torch_version", "part", "said"),
    [
        ("1.0.0", {}, "compiled for torch 1.0.0"),
        (torch.__version__, {"machine": "vax"}, "compiled for vax processors"),
        (torch.__version__, {}, "compiled for None processors"),
    ],
)
def test_foreign_packages_are_refused(torch_version, part, said):
    assert said in refusal(check_versions, Path("denoiser.pt2"), torch_version, part, CPU)


def test_a_package_for_more_instructions_is_refused(monkeypatch):
    import platform

    part = {"machine": platform.machine(), "cpu_level": "AVX512"}
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert "export it on this machine" in refusal(check_versions, Path("denoiser.pt2"), torch.__version__, part, CPU)
    check_versions(Path("denoiser.pt2"), torch.__version__, {**part, "cpu_level": "AVX2"}, CPU)


@pytest.mark.parametrize(
    ("part", "weight"), [("denoiser", "blocks.1.x.proj"), ("vae_decoder", "network.conv_in.weight")]
)
def test_a_weight_slightly_off_is_found(tmp_path, part, weight):
    """By the bits themselves, nothing compiled: a change as small as this may pass for rounding in the results."""
    from types import SimpleNamespace

    from lavin_export.errors import VerificationError
    from lavin_export.networks import vae as vae_parts
    from lavin_export.networks.denoiser import BranchDenoiser
    from lavin_export.to_aoti import inner_first_, write_weights
    from lavin_export.verify.artifact import check_compiled_weights
    from lavin_rt.checkpoint.load import load_dit, load_vae

    checkpoint = golden_checkpoint(tmp_path / "checkpoint")
    vae = load_vae(checkpoint.vae, dtype=torch.float32)
    networks = {
        "denoiser": BranchDenoiser(load_dit(checkpoint.dit, dtype=torch.float32)),
        "vae_encoder_clip5": vae_parts.ExportedEncoder(vae, 5),
        "vae_decoder": vae_parts.ExportedDecoder(vae),
    }
    inner_first_(networks["denoiser"])
    parts = {name: {"weights": [f"{name}.weights.safetensors"]} for name in networks}
    for name, network in networks.items():
        write_weights(tmp_path / parts[name]["weights"][0], network.state_dict())
    manifest = SimpleNamespace(folder=tmp_path, parts=parts, dtype=torch.float32)
    check_compiled_weights(manifest, checkpoint)
    tensors = {name: tensor.clone() for name, tensor in networks[part].state_dict().items()}
    tensors[weight][1, :1] *= 1 + 2**-20
    write_weights(tmp_path / parts[part]["weights"][0], tensors)
    with pytest.raises(VerificationError, match=f"weight {weight} of {part} is not the checkpoint's"):
        check_compiled_weights(manifest, checkpoint)


def test_bad_options_are_refused(tmp_path):
    from lavin_export.to_aoti import export_aoti, inductor_options

    checkpoint = golden_checkpoint(tmp_path / "checkpoint")
    assert "expected one of native, avx512, avx2" in refusal(
        export_aoti, checkpoint, tmp_path / "out", device="cpu", cpu="z80"
    )
    assert "1 + 4k" in refusal(export_aoti, checkpoint, tmp_path / "out", device="cpu", clip_frames=[6])
    assert not (tmp_path / "out").exists()
    if hasattr(torch._inductor.config.cpp, "march"):
        assert inductor_options("avx2")["cpp.march"] == "x86-64-v3"


@pytest.mark.slow
def test_golden_forwards(compiled, golden_dit):
    """Times other than a schedule's, and batch, frames and sizes other than the exported example's."""
    denoiser = sessions(compiled)["denoiser"]
    for case in golden_cases("dit_c", "forward").values():
        for item in range(len(case["t"])):
            table = modulation_table(golden_dit("dit_c"), case["t"][item : item + 1])
            latents, cond = case["latents"][item : item + 1], case["cond_latents"][item : item + 1]
            velocity = denoiser(latents, cond, table.blocks[0], table.head_scale[0])[0]
            assert relative_error(velocity, case["velocity"][item : item + 1]) < 1e-5


@pytest.mark.slow
def test_golden_pipelines(compiled):
    pipe = lavin_rt.Pipeline.from_pretrained(compiled, device="cpu")
    for case in pipeline_cases():
        pairs = [tuple(frame.permute(1, 2, 0).numpy() for frame in pair) for pair in case["context"]]
        task = pipe.task(pairs, size=tuple(case["size"].tolist()))
        query = case["query"].permute(1, 2, 0).numpy()
        result = task.run([query], guidance=case["cfg_scale"].item(), noise=case["noise"])[0]
        assert relative_error(result.latents, case["latents"]) < 1e-4
        assert (result.frames[0].int() - case["image"].int()).abs().max() <= 1


@pytest.mark.slow
def test_batches_and_other_schedules(compiled, golden_dit):
    """Three queries at once on a schedule of six knots, as the plain model computes them; a golden sampling run."""
    case = golden_cases("dit_c", "sample")["sample0"]
    generator = torch.Generator().manual_seed(1)
    cond = case["cond_latents"] + torch.randn(3, *case["cond_latents"].shape[1:], generator=generator)
    noise = torch.randn(3, 16, 1, 8, 8, generator=generator)
    truth = lavin_rt.sample(golden_dit("dit_c"), cond, noise, steps=6, impl="plain")
    assert relative_error(sampled(compiled, cond, noise, 6), truth) < 1e-4
    assert relative_error(sampled(compiled, case["cond_latents"], case["noise"], 20), case["latents"]) < 1e-4
    assert "it has 20, 6" in refusal(sampled, compiled, cond, noise, 8)


def sampled(folder: Path, cond: torch.Tensor, noise: torch.Tensor, steps: int) -> torch.Tensor:
    """What `lavin_rt.sample` does with a model, at guidance 1.5, with an artifact's network."""
    network = load(folder, trust=True)[0]
    shape = Shape(len(cond), cond.shape[2], 1, noise.shape[2], *noise.shape[3:], guided=True)
    executor = Executor(network)
    frames = executor.embed(cond)
    return executor.sample(shape, frames[:, :-1], frames[:, -1:], noise, lavin_rt.schedule(steps), 1.5)


@pytest.mark.slow
@pytest.mark.parametrize("name", SPEEDS)
def test_speeds(compiled, golden_dit, name):
    """Two queries, with and without guidance, and a context without pairs, as the plain model samples them."""
    network, speed = load(compiled, trust=True)[0], SPEEDS[name]
    generator = torch.Generator().manual_seed(2)
    for queries, frames, guidance in ((2, 5, 1.5), (1, 5, 1.0), (1, 1, 1.5)):
        cond = torch.randn(queries, 16, frames, 6, 8, generator=generator)
        noise = torch.randn(queries, 16, 1, 6, 8, generator=generator)
        truth = lavin_rt.sample(golden_dit("dit_c"), cond, noise, guidance=guidance, impl="plain", speed=speed)
        assert relative_error(sampled_at(network, cond, noise, speed, guidance=guidance), truth) <= 1e-4


@pytest.mark.slow
def test_both_denoisers_share_their_weights(compiled):
    """One file, and once they are loaded one memory."""
    network, _, manifest = load(compiled, trust=True)
    assert manifest.parts[KEPT]["weights"] == manifest.parts["denoiser"]["weights"] == ["denoiser.weights.safetensors"]
    checked = manifest.verification
    assert set(checked["speeds"]) == set(SPEEDS) and len(checked["parts"][KEPT]) == 9
    plain, kept = network.session._weights, network.loaded(KEPT)._weights
    assert kept.keys() == plain.keys()
    assert all(kept[name].data_ptr() == tensor.data_ptr() for name, tensor in plain.items())
    assert network.session is network.loaded("denoiser"), "one was let go for the other"


@pytest.mark.slow
def test_weights_are_the_mapped_file(compiled):
    """No second copy: the tensors that a package points to lie in the mapping of the file on disk."""
    loaded = sessions(compiled)
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    mapped = [
        [int(bound, 16) for bound in line[0].split("-")] for line in lines if line[-1].endswith("weights.safetensors")
    ]
    assert len(mapped) >= len(loaded)
    for session in loaded.values():
        for tensor in session._weights.values():
            assert any(first <= tensor.data_ptr() < last for first, last in mapped)
            assert tensor.data_ptr() % 64 == 0 or tensor.nbytes % 64


@pytest.mark.slow
def test_package_holds_no_weights(compiled):
    for part in Manifest.read(compiled).parts.values():
        weights = sum((compiled / name).stat().st_size for name in part["weights"])
        assert weights > 1e6
        # The golden models are small: code alone, it would be smaller than code and weights.
        assert (compiled / part["file"]).stat().st_size < 3e6


@pytest.mark.slow
def test_inputs_that_were_not_exported_are_refused(compiled):
    parts = sessions(compiled)
    config = Manifest.read(compiled).config
    rows = torch.zeros(config.depth, 2, 4, config.hidden_size), torch.zeros(config.hidden_size)
    latents = torch.zeros(1, 16, 1, 4, 4)
    denoiser, encoder = parts["denoiser"], parts["vae_encoder"]
    assert "cond_latents is [1, 16, 1, 4, 6]" in refusal(denoiser, latents, torch.zeros(1, 16, 1, 4, 6), *rows)
    assert "asked for batch 65" in refusal(denoiser, *[torch.zeros(65, 16, 1, 4, 4)] * 2, *rows)
    assert "torch.float64" in refusal(denoiser, latents.double(), latents, *rows)
    assert "3 inputs given" in refusal(denoiser, latents, latents, rows[0])
    assert "[1, 3, 1, 8*rows, 8*columns]" in refusal(encoder, torch.zeros(1, 3, 1, 30, 32))


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["no weights", "a weight less", "truncated package", "no package"])
def test_faults_that_hashes_do_not_show(compiled, tmp_path, fault):
    """A package without its weights would crash the process; every one of these is an error of one line instead."""

    def change(folder: Path, values: dict) -> None:
        part, weights = values["parts"]["denoiser"], folder / "denoiser.weights.safetensors"
        tensors = load_file(weights)
        if fault == "no weights":
            part["weights"] = []
        elif fault == "a weight less":
            del tensors["blocks.1.x.proj"]
            save_file(tensors, weights, {PERMUTED: "{}"})
        elif fault == "truncated package":
            package = folder / "denoiser.pt2"
            package.write_bytes(package.read_bytes()[:-3000])
        else:
            (folder / "denoiser.pt2").write_bytes(b"not a package")

    folder = changed(compiled, tmp_path / "artifact", change)
    manifest = Manifest.read(folder)
    manifest.check_files()
    message = refusal(AotiSession, folder, manifest.parts["denoiser"], manifest, CPU)
    assert {"no weights": "are missing", "a weight less": "blocks.1.x.proj"}.get(fault, "denoiser") in message


@pytest.mark.slow
def test_one_changed_weight_fails_verification(compiled, tmp_path):
    from lavin_export.errors import VerificationError
    from lavin_export.verify.artifact import verify_artifact

    def change(folder: Path, values: dict) -> None:
        weights = folder / "denoiser.weights.safetensors"
        content = bytearray(weights.read_bytes())
        header = 8 + int.from_bytes(content[:8], "little")
        content[header + 4000 + 3] ^= 0x40  # an exponent's bit
        weights.write_bytes(content)

    folder = changed(compiled, tmp_path / "artifact", change)
    with pytest.raises(VerificationError):
        verify_artifact(folder, golden_checkpoint(tmp_path / "checkpoint"))
    shutil.copyfile(compiled / "denoiser.weights.safetensors", folder / "denoiser.weights.safetensors")
    changed(folder, tmp_path / "restored", lambda *_: None)
    assert verify_artifact(tmp_path / "restored", golden_checkpoint(tmp_path / "checkpoint"))["passed"]


@pytest.mark.gpu
@pytest.mark.slow
def test_golden_pipelines_on_a_gpu(tmp_path):
    """Kernels inside of the package: the golden latents in float32, and every kernel launched as often as the graph
    calls it.
    """
    from torch.profiler import ProfilerActivity, profile

    from lavin_export.to_aoti import export_aoti

    folder = export_aoti(
        golden_checkpoint(tmp_path / "checkpoint"), tmp_path / "artifact", device="cuda", dtype="float32"
    )
    assert Manifest.read(folder).parts["denoiser"]["impl"] == "triton"
    pipe = lavin_rt.Pipeline.from_pretrained(folder, device="cuda")
    for case in pipeline_cases():
        pairs = [tuple(frame.permute(1, 2, 0).numpy() for frame in pair) for pair in case["context"]]
        task = pipe.task(pairs, size=tuple(case["size"].tolist()))
        query = case["query"].permute(1, 2, 0).numpy()
        result = task.run([query], guidance=case["cfg_scale"].item(), noise=case["noise"])[0]
        assert relative_error(result.latents, case["latents"]) < 1e-4
        assert (result.frames[0].int() - case["image"].int()).abs().max() <= 1
    session = pipe.dit.session
    config = pipe.dit.config
    rows = torch.zeros(config.depth, 2, 4, config.hidden_size).cuda(), torch.zeros(config.hidden_size).cuda()
    inputs = torch.zeros(2, 16, 1, 4, 4).cuda(), torch.zeros(2, 16, 3, 4, 4).cuda()
    session(*inputs, *rows)
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        session(*inputs, *rows)
        torch.cuda.synchronize()
    launched = [event.name for event in recorded.events()]
    for kernel, count in (("joint_attention_kernel", 2), ("qk_norm_rope_kernel", 2), ("swiglu_kernel", 2)):
        assert sum(kernel in name for name in launched) == count
