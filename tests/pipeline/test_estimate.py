"""What the published model takes here, told before it is downloaded."""

from __future__ import annotations

import json

import pytest
import torch
from support.command import exit_code

from lavin_rt import estimate as estimates
from lavin_rt.cli.main import main
from lavin_rt.dit import packed
from lavin_rt.dit.config import DiTConfig
from lavin_rt.dit.model import JDiT
from lavin_rt.task import task_shape
from lavin_rt.vae.config import VAEConfig
from lavin_rt.vae.model import STVAE

CPU = torch.device("cpu")
SMALL = DiTConfig(hidden_size=144, depth=6, num_heads=2, kv_group=2)
CODER = VAEConfig(block_out_channels=(32, 32, 32, 32), layers_per_block=1)


def small(size: int, dtype: torch.dtype = torch.float32, impl: str = "auto") -> estimates.Estimate:
    shape = task_shape(1, 2, 1, (size, size), guided=True)
    return estimates.estimate(shape, CPU, dtype, impl, config=SMALL, vae_config=CODER)


def test_bytes_are_those_of_the_networks():
    dit, vae = JDiT(SMALL), STVAE(CODER)
    size = sum(parameter.numel() for network in (dit, vae) for parameter in network.parameters())
    modulation = sum(parameter.numel() for block in dit.blocks for parameter in block.modulation.parameters())
    found = small(64)
    assert found.download == 2 * size
    assert found.memory > 4 * (size - modulation)
    assert found.memory > 1.7 * small(64, dtype=torch.bfloat16).memory


def test_a_picture_is_its_evaluations_and_the_autoencoder():
    found = small(64)
    assert found.evaluations == 19 and found.query > 19 * found.evaluation > 0
    assert found.context > 0 and found.prepare >= 0


@pytest.mark.parametrize("impl", ["plain", "triton"])
def test_every_implementation_that_the_device_has(monkeypatch, impl):
    """Kernels run where the device is, not on a network without memory; here their references stand in for them."""
    monkeypatch.setattr(packed, "_kernels_run_on", lambda device: device.type == "cpu")
    found = small(64, impl=impl)
    assert found.evaluation > 0 and found.memory > 0


def test_what_is_larger_than_the_probe_is_reckoned(monkeypatch):
    """Of 512 pixels, 16 times the probe's tokens: all but attention takes 16 times as long, attention 256 times."""
    monkeypatch.setattr(estimates, "_blocks", lambda depth, *_: (1.0 + 2 * (depth - 1), 0.1 * depth))
    monkeypatch.setattr(estimates, "_attention", lambda *_: 0.5)
    assert small(128).evaluation == 1 + 5 * 2
    assert small(512).evaluation == 16 * 1 + 5 * (16 * 1.5 + 256 * 0.5)
    assert small(512).prepare == pytest.approx(6 * 0.1)
    assert small(512).memory > small(128).memory


def test_the_published_model_s_parameters():
    """3.40 billion, 0.93 of them modulation, as the release has them."""
    weights, modulation, coder = estimates.parameters(estimates.RELEASED, VAEConfig())
    assert (weights, modulation) == (3_398_976_064, 934_686_720) and 2 * coder < 0.5e9


@pytest.mark.slow
def test_the_command_needs_no_checkpoint(capsys):
    main(["info", "--device", "cpu", "--size", "64", "--pairs", "1", "--json"])
    found = json.loads(capsys.readouterr().out)["the published model, estimated"]
    assert found["for"].startswith("64x64, 1 pair,") and found["download"].startswith("7.2")
    assert {"memory", "a picture", "context, once a task"} < set(found)


@pytest.mark.parametrize("options", [["--size", "50"], ["--size", "big"], ["--pairs", "0"]])
def test_sizes_that_it_does_not_take(options, capsys):
    assert exit_code(["info", *options]) == 2
    assert capsys.readouterr().err.count("\n") == 1
