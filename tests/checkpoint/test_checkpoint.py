"""Official transformer checkpoints in and out."""

from __future__ import annotations

import itertools
import json
import os
import types

import pytest
import safetensors
import torch
from safetensors.torch import load_file
from support.checks import DTYPES, golden, refusal, same_bytes, write_dit_a
from support.golden import GOLDEN

from lavin_rt.checkpoint import tensors as safetensors_io
from lavin_rt.checkpoint.header import dit_config, picture_size
from lavin_rt.checkpoint.load import load_dit, load_vae, save_dit, save_vae
from lavin_rt.checkpoint.tensors import SafetensorsFile
from lavin_rt.dit.model import JDiT, randomize_
from lavin_rt.dit.modulation import modulation_table

DITS = ["dit_a", "dit_b", "dit_c"]


@pytest.mark.parametrize("resident_modulation", [False, True])
@pytest.mark.parametrize("name", DITS)
def test_saving_gives_back_the_bytes_that_were_loaded(tmp_path, name, resident_modulation):
    tensors, metadata = golden(name)
    dit = load_dit(GOLDEN / f"{name}.safetensors", resident_modulation=resident_modulation)
    assert not dit.training
    assert not any(parameter.requires_grad for parameter in dit.parameters())
    save_dit(dit, tmp_path / "saved.safetensors")
    assert same_bytes(load_file(tmp_path / "saved.safetensors"), tensors)
    with safetensors.safe_open(tmp_path / "saved.safetensors", "pt") as file:
        assert json.loads(file.metadata()["config"]) == json.loads(metadata["config"])
    assert os.listdir(tmp_path) == ["saved.safetensors"]


def test_tensors_are_joined_as_the_model_reads_them():
    tensors, _ = golden("dit_b")
    dit = load_dit(GOLDEN / "dit_b.safetensors")
    block, joint = dit.blocks[0], "blocks.0.joint_attn."

    def stacked(pattern: str, *parts: str) -> torch.Tensor:
        """Both streams' tensors, several joined by rows."""
        return torch.stack([torch.cat([tensors[pattern.format(s, part)] for part in parts]) for s in ("cond", "x")])

    assert torch.equal(block.attention.qkv, stacked(joint + "{}_{}.weight", "q", "k", "v"))
    assert torch.equal(block.attention.q_norm, stacked(joint + "{}_{}.weight", "qnorm"))
    assert torch.equal(block.attention.k_norm, stacked(joint + "{}_{}.weight", "knorm"))
    assert torch.equal(block.attention.proj, stacked(joint + "{}_{}.weight", "proj"))
    assert torch.equal(block.mlp.gate_up, stacked("blocks.0.{}_mlp.{}_proj.weight", "gate", "up"))
    assert torch.equal(block.mlp.down, stacked("blocks.0.{}_mlp.{}_proj.weight", "down"))
    assert block.modulation.weight is None and block.modulation.bias is None
    weight, bias = dit.modulation_source(0)
    assert torch.equal(weight, stacked("blocks.0.{}_modulation.1.{}", "weight"))
    assert torch.equal(bias, stacked("blocks.0.{}_modulation.1.{}", "bias"))
    assert torch.equal(dit.time_embedder.first.weight, tensors["t_embedder.mlp.0.weight"])
    assert torch.equal(dit.time_embedder.second.bias, tensors["t_embedder.mlp.2.bias"])
    assert torch.equal(dit.head.modulation.weight, tensors["final_layer.adaLN_modulation.1.weight"])
    assert torch.equal(dit.head.linear.bias, tensors["final_layer.linear.bias"])
    assert torch.equal(dit.x_embedder[1].bias, tensors["x_embedder.1.bias"])
    assert torch.equal(dit.answer_embed, tensors["answer_embed"])
    resident = load_dit(GOLDEN / "dit_b.safetensors", resident_modulation=True)
    assert resident.modulation_source is None
    assert torch.equal(resident.blocks[0].modulation.weight, weight)
    assert torch.equal(resident.blocks[0].modulation.bias, bias)


@pytest.mark.parametrize("loaded", DTYPES)
@pytest.mark.parametrize("stored", DTYPES)
def test_dtypes_are_converted_as_torch_does_it(tmp_path, monkeypatch, stored, loaded):
    monkeypatch.setattr(safetensors_io, "STAGING_BYTES", 1000)  # many pieces per tensor, the last one short
    path = write_dit_a(
        tmp_path, lambda tensors, _: tensors.update({name: value.to(stored) for name, value in tensors.items()})
    )
    assert load_dit(path).dtype == stored
    save_dit(load_dit(path, dtype=loaded), tmp_path / "saved.safetensors")
    expected = {name: value.to(stored).to(loaded) for name, value in golden("dit_a")[0].items()}
    assert same_bytes(load_file(tmp_path / "saved.safetensors"), expected)


class Late(safetensors_io._Staging):
    """Copies as a GPU does them, at the last moment at which they may still be under way."""

    def __init__(self, device: torch.device):
        super().__init__(device)
        self._buffers = [torch.empty_like(self._buffers[0]) for _ in range(2)]
        self._copied = [None, None]

    def copy(self, staged, destination):
        self._copied[self._turn] = types.SimpleNamespace(synchronize=lambda: destination.copy_(staged))


def test_no_buffer_is_read_into_while_it_is_copied(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_io, "STAGING_BYTES", 1000)
    path = write_dit_a(tmp_path)
    ordinary = load_dit(path, dtype=torch.float64)
    monkeypatch.setattr(safetensors_io, "_Staging", Late)
    late = load_dit(path, dtype=torch.float64)
    assert same_bytes(dict(late.state_dict()), dict(ordinary.state_dict()))
    assert all(map(torch.equal, late.modulation_parameters(0), ordinary.modulation_parameters(0)))
    assert late.modulation_parameters(0)[0].dtype == torch.float64


def test_mixed_dtypes_load_into_the_one_that_holds_them_all(tmp_path):
    path = write_dit_a(
        tmp_path, lambda tensors, _: tensors.update(prompt_embed=tensors["prompt_embed"].float() + 2**-20)
    )
    dit = load_dit(path)
    assert {parameter.dtype for parameter in dit.parameters()} == {torch.float32}
    assert torch.equal(dit.prompt_embed, golden("dit_a")[0]["prompt_embed"].float() + 2**-20)
    assert dit.modulation_parameters(0)[0].dtype == torch.float32


def test_progress_counts_the_bytes_that_are_read():
    calls = []
    load_dit(GOLDEN / "dit_c.safetensors", progress=lambda done, total: calls.append((done, total)))
    tensors = golden("dit_c")[0]
    size = sum(value.nbytes for name, value in tensors.items() if "_modulation.1" not in name or "adaLN" in name)
    assert calls[-1] == (size, size)
    assert all(before[0] < after[0] and after[1] == size for before, after in itertools.pairwise(calls))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_loading_to_a_gpu_gives_the_same_tensors(tmp_path, dtype):
    path = GOLDEN / "dit_a.safetensors"
    there, here = load_dit(path, "cuda", dtype), load_dit(path, "cpu", dtype)
    assert there.device.type == "cuda"
    for (name, one), (_, other) in zip(there.named_parameters(), here.named_parameters(), strict=True):
        assert torch.equal(one.cpu(), other), name
    save_dit(there, tmp_path / "saved.safetensors")
    assert same_bytes(
        load_file(tmp_path / "saved.safetensors"), {name: value.to(dtype) for name, value in golden("dit_a")[0].items()}
    )


def test_a_model_made_in_memory_is_saved_and_loads_alike(tmp_path):
    dit = randomize_(JDiT(dit_config(SafetensorsFile.open(GOLDEN / "dit_c.safetensors"))), seed=3)
    save_dit(dit, tmp_path / "made.safetensors", size=64)
    assert picture_size(SafetensorsFile.open(tmp_path / "made.safetensors")) == 64
    loaded = load_dit(tmp_path / "made.safetensors", resident_modulation=True)
    for (name, one), (_, other) in zip(dit.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(one, other), name


def test_saving_over_the_file_that_holds_the_modulation(monkeypatch, tmp_path):
    path = write_dit_a(tmp_path)
    monkeypatch.chdir(tmp_path)
    dit = load_dit(path.name)
    before = modulation_table(dit, torch.tensor([0.25])).blocks
    save_dit(dit, path)
    monkeypatch.chdir(GOLDEN)  # the path was relative; the model must find its file from anywhere
    assert torch.equal(modulation_table(dit, torch.tensor([0.25])).blocks, before)
    assert same_bytes(load_file(path), golden("dit_a")[0])


def test_a_modulation_source_that_is_gone_or_changed(tmp_path):
    path = write_dit_a(tmp_path)
    dit = load_dit(path)
    write_dit_a(tmp_path, lambda tensors, _: tensors["prompt_embed"].zero_())
    os.utime(path, ns=(0, 1))
    assert "has changed" in refusal(dit.modulation_source, 0)
    path.unlink()
    assert "cannot be read any more" in refusal(dit.modulation_source, 0)
    assert "cannot be read any more" in refusal(save_dit, dit, tmp_path / "other.safetensors")
    assert os.listdir(tmp_path) == []
    dit.modulation_source = None
    assert "were dropped" in refusal(save_dit, dit, tmp_path / "other.safetensors")


def test_a_folder_that_cannot_be_written(tmp_path):
    dit, vae = load_dit(GOLDEN / "dit_c.safetensors"), load_vae(GOLDEN / "stvae.pt")
    (tmp_path / "file").write_bytes(b"")
    folder = tmp_path / "file"  # missing ones are made
    assert "cannot be written" in refusal(save_dit, dit, folder / "dit.safetensors")
    assert "cannot be written" in refusal(save_vae, vae, folder / "vae.safetensors")
    assert "cannot be written" in refusal(save_vae, vae, folder / "vae.pt")
    (tmp_path / "dit.safetensors").mkdir()
    (tmp_path / "dit.safetensors" / "kept").touch()
    assert "cannot be written" in refusal(save_dit, dit, tmp_path / "dit.safetensors")
    assert sorted(os.listdir(tmp_path)) == ["dit.safetensors", "file"]
