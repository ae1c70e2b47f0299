"""Reuse in artifacts: the denoiser that takes and gives keys and values, by itself and in every kind of artifact."""

from __future__ import annotations

import types

import pytest
import torch
from safetensors.torch import load_file
from support.checks import refusal
from support.denoiser_artifact import CPU, network_of, write_onnx, write_openvino
from support.golden import CASES, GOLDEN, relative_error
from support.onnx_exports import golden_checkpoint

from lavin_export.networks import denoiser, kept_denoiser
from lavin_export.networks.denoiser import BranchDenoiser
from lavin_export.networks.kept_denoiser import KeptDenoiser
from lavin_export.verify.speeds import PlainBranches, kept_passes, kept_sizes
from lavin_rt.artifact import load as artifact
from lavin_rt.artifact.manifest import KEPT, Manifest
from lavin_rt.sampling.denoisers import make_network
from lavin_rt.sampling.sampler import sample, sampled
from lavin_rt.sampling.speeds import Speed

ONCE = Speed(evaluations=3, refresh="task", guided={0, 2})
SPEEDS = {**CASES, "once": ONCE}


@pytest.fixture(scope="module")
def tiers() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "tiers_cases.safetensors")


@pytest.fixture(scope="module")
def modules(golden_dit) -> PlainBranches:
    """The modules that are traced, in an artifact's place."""
    dit = golden_dit("dit_a")
    manifest = types.SimpleNamespace(
        folder="artifact",
        config=dit.config,
        dtype=torch.float32,
        kind="aoti",
        schedules=[20],
        files={"weights": {"bytes": 1}},
        parts={
            "denoiser": {"ranges": denoiser.RANGES, "weights": ["weights"]},
            KEPT: {"ranges": kept_denoiser.RANGES, "weights": ["weights"]},
        },
        check_speed=lambda speed: None,
    )
    network = PlainBranches(manifest, dit)
    network._sessions[KEPT] = KeptDenoiser(BranchDenoiser(dit))
    return network


@pytest.mark.parametrize("name", CASES)
def test_golden(modules, tiers, name):
    assert relative_error(sampled(modules, tiers["cond_latents"], tiers["noise"], CASES[name]), tiers[name]) <= 1e-4


@pytest.mark.parametrize(("pair_frames", "query_frames"), [(4, 1), (4, 2), (0, 1)])
def test_clips_batches_and_a_context_without_pairs(modules, golden_dit, pair_frames, query_frames):
    generator = torch.Generator().manual_seed(0)
    cond = torch.randn(2, 16, pair_frames + query_frames, 4, 6, generator=generator)
    noise = torch.randn(2, 16, query_frames, 4, 6, generator=generator)
    for speed in (ONCE, CASES["uniform8_both"]):
        for guidance in (1.5, 1.0):
            options = {"guidance": guidance, "query_frames": query_frames, "speed": speed}
            truth = sample(golden_dit("dit_a"), cond, noise, impl="plain", **options)
            assert relative_error(sampled(modules, cond, noise, **options), truth) <= 1e-5


def test_without_frames_given_it_is_the_other_denoiser(golden_dit):
    plain = BranchDenoiser(golden_dit("dit_c"))
    kept = KeptDenoiser(plain)
    assert {*kept.state_dict()} == {*plain.state_dict()}
    assert all(kept.state_dict()[name].data_ptr() == value.data_ptr() for name, value in plain.state_dict().items())
    given = kept_denoiser.example_inputs(plain.config, kept_frames=0)
    velocity, keys, values = kept(*given)
    assert torch.equal(velocity, plain(*given[:4]))
    assert keys.shape == values.shape == (2, 2, 3, 2, 3, plain.config.kv_size)


def test_verification_tells_what_is_stored_from_what_is_reused(modules, golden_dit, monkeypatch):
    """Both velocities and the keys are held against the plain model's, each by itself."""
    manifest = types.SimpleNamespace(schedules=[20], parts=modules.manifest.parts)
    truth = kept_passes(make_network(golden_dit("dit_a"), "plain"), manifest, 600)
    assert len(truth) == 3 * len(kept_sizes(manifest, 600)) == 6
    errors = [relative_error(*pair) for pair in zip(kept_passes(modules, manifest, 600), truth, strict=True)]
    assert max(errors) <= 1e-5
    module = modules.loaded(KEPT)

    def turned(*given):
        """Keys as if the context stood one frame further on."""
        velocity, keys, values = module(*given)
        return velocity, keys.roll(1, 2), values

    monkeypatch.setitem(modules._sessions, KEPT, turned)
    errors = [relative_error(*pair) for pair in zip(kept_passes(modules, manifest, 600), truth, strict=True)]
    assert errors[3] <= 1e-5 and min(errors[4:]) > 1e-3


def test_one_of_two_large_denoisers_is_loaded_at_a_time(modules):
    """Of kinds whose sessions have their weights for themselves."""
    opened = []

    def open_part(name):
        opened.append(name)
        return lambda *given: (given[0],)

    for kind, size, both in (("aoti", 2**40, True), ("onnx", 2**20, True), ("onnx", 2**30, False)):
        manifest = types.SimpleNamespace(
            **{**vars(modules.manifest), "kind": kind, "files": {"weights": {"bytes": size}}}
        )
        network = artifact.ArtifactNetwork(manifest, CPU, open_part("denoiser"), open_part)
        for name in (KEPT, "denoiser", KEPT):
            network.loaded(name)
            assert set(network._sessions) == ({"denoiser", KEPT} if both else {name})
        assert opened == ["denoiser", KEPT] + ([] if both else ["denoiser", KEPT])
        opened.clear()


def test_what_keeps_nothing_is_said_at_export(tmp_path, monkeypatch):
    from lavin_export import to_aoti
    from lavin_export.to_openvino.export import export_openvino

    checkpoint, output = golden_checkpoint(tmp_path / "checkpoint", "dit_c"), tmp_path / "out"
    monkeypatch.setattr(to_aoti, "resolve_device", lambda device: torch.device("cuda"))
    for export, options, said in (
        (
            to_aoti.export_aoti,
            {"dtype": "float32"},
            "which aoti artifacts for cuda do not: leave it out, or export for",
        ),
        (export_openvino, {"int8": True}, "which artifacts in int8 do not: leave out that speed, or --int8"),
    ):
        message = refusal(export, checkpoint, output, speeds=["exact", "fast"], **options)
        assert "speed fast keeps keys and values of the context" in message and said in message
    assert not output.exists()


@pytest.fixture(scope="module")
def onnx_artifact(tmp_path_factory):
    return write_onnx(tmp_path_factory.mktemp("onnx") / "made", "dit_a", SPEEDS)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["onnx", "openvino"])
def test_golden_artifacts(tmp_path, onnx_artifact, tiers, golden_dit, kind):
    """Every golden speed, a context that is kept once a task, two queries, other sizes than were traced, no pairs."""
    folder = onnx_artifact
    if kind == "openvino":
        folder = write_openvino(tmp_path / "made", "dit_a", SPEEDS, onnx_artifact)
    manifest = Manifest.read(folder)
    parts = manifest.parts
    assert parts[KEPT]["weights"] == parts["denoiser"]["weights"] and len(parts[KEPT]["weights"]) == 1
    assert len(manifest.files) == 6, "two graphs, a file of weights, the modulation, and what stands for a VAE"
    network = network_of(folder)
    for name, speed in CASES.items():
        assert relative_error(sampled(network, tiers["cond_latents"], tiers["noise"], speed), tiers[name]) <= 1e-4
    generator = torch.Generator().manual_seed(0)
    for queries, frames, height, width in ((2, 5, 6, 4), (1, 1, 2, 2)):
        cond = torch.randn(queries, 16, frames, height, width, generator=generator)
        noise = torch.randn(queries, 16, 1, height, width, generator=generator)
        truth = sample(golden_dit("dit_a"), cond, noise, impl="plain", speed=ONCE)
        assert relative_error(sampled(network, cond, noise, ONCE), truth) <= 1e-4
