"""VAE checkpoints in and out, and pickles that mean harm."""

from __future__ import annotations

import os
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checks import refusal, same_bytes
from support.golden import GOLDEN

from lavin_rt.checkpoint.load import load_vae, save_vae


@pytest.fixture
def vae_tensors():
    return torch.load(GOLDEN / "stvae.pt", weights_only=True)["state_dict"]


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_vae_comes_back_as_it_was(tmp_path, vae_tensors, suffix):
    path = tmp_path / f"stvae.{suffix}"
    vae = load_vae(GOLDEN / "stvae.pt")
    assert vae.dtype == torch.bfloat16 and not vae.training
    save_vae(vae, path)
    saved = torch.load(path, weights_only=True)["state_dict"] if suffix == "pt" else load_file(path)
    assert same_bytes(saved, vae_tensors)
    again = load_vae(path, dtype=torch.float32)
    assert same_bytes(dict(again.state_dict()), {name: value.float() for name, value in vae_tensors.items()})
    assert os.listdir(tmp_path) == [path.name]
    assert "expected .safetensors or .pt" in refusal(save_vae, vae, tmp_path / "stvae.bin")


def test_a_vae_as_a_flat_state_dict_with_more_in_it(tmp_path, vae_tensors):
    path = tmp_path / "stvae.pt"
    torch.save(vae_tensors | {"loss.logvar": torch.zeros(1), "loss.steps": torch.zeros(1, dtype=torch.int64)}, path)
    with pytest.warns(UserWarning, match=r"2 tensors .*: loss.logvar, loss.steps") as caught:
        assert load_vae(path).dtype == torch.bfloat16
    assert len(caught) == 1
    assert "loss.logvar" in refusal(load_vae, path, strict=True)
    more = {"loss.scale": torch.zeros(1), "loss.steps": torch.zeros(1, dtype=torch.int64)}
    save_file(vae_tensors | more, path.with_suffix(".safetensors"))
    with pytest.warns(UserWarning, match=r"2 tensors .*: loss.scale, loss.steps") as caught:
        load_vae(path.with_suffix(".safetensors"))
    assert len(caught) == 1


def test_a_vae_with_missing_or_wrong_tensors(tmp_path, vae_tensors):
    path, name = tmp_path / "stvae.pt", "decoder.up_blocks.1.resnets.0.norm1.conv_y.conv.weight"
    torch.save({name_: value for name_, value in vae_tensors.items() if name_ != name}, path)
    message = refusal(load_vae, path)
    assert name in message and str(path) in message
    torch.save(vae_tensors | {name: vae_tensors[name][:-1]}, path)
    assert name in refusal(load_vae, path)
    torch.save(vae_tensors | {name: vae_tensors[name].to(torch.int8)}, path)
    assert "quantized" in refusal(load_vae, path)
    save_file(vae_tensors | {name: vae_tensors[name].to(torch.float8_e5m2)}, path.with_suffix(".safetensors"))
    assert "quantized" in refusal(load_vae, path.with_suffix(".safetensors"))
    for content in ([1], {"state_dict": {"a": 1}}, {1: torch.zeros(1)}, torch.zeros(3)):
        torch.save(content, path)
        assert "no state dict" in refusal(load_vae, path)
    torch.save({}, path)
    assert "decoder.conv_in.conv.weight" in refusal(load_vae, path)
    assert "torch.int64" in refusal(load_vae, GOLDEN / "stvae.pt", dtype=torch.int64)


class Mischief:
    """Makes a file when a pickle of it is loaded by a trusting reader."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_with_code_is_refused_and_does_not_run(tmp_path, vae_tensors, legacy):
    path, mark = tmp_path / "stvae.pt", tmp_path / "mark"
    content = {"state_dict": vae_tensors, "extra": Mischief(str(mark))}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    message = refusal(load_vae, path)
    assert "posix.mkdir" in message and "was not loaded" in message
    assert not mark.exists()
    path.write_bytes(pickle.dumps(Mischief(str(mark))))
    refusal(load_vae, path)
    assert not mark.exists()
    torch.load(GOLDEN / "stvae.pt", weights_only=True)
    pickle.loads(path.read_bytes())  # the same pickle does run where it is trusted
    assert mark.exists()


@pytest.mark.parametrize("length", [0, 1, 3, 100, 5000, 1_000_000, 5_641_266])
def test_a_truncated_vae(tmp_path, length):
    path = tmp_path / "stvae.pt"
    path.write_bytes((GOLDEN / "stvae.pt").read_bytes()[:length])
    assert str(path) in refusal(load_vae, path)


@pytest.mark.parametrize("content", [b"hello", b"<html></html>", b"\x80\x02.", b"\x80\x02]q\x00.", bytes(range(256))])
def test_a_vae_that_is_something_else(tmp_path, content):
    path = tmp_path / "stvae.pt"
    path.write_bytes(content)
    assert str(path) in refusal(load_vae, path)


def test_no_vae_at_all(tmp_path):
    assert "no such file" in refusal(load_vae, tmp_path / "stvae.pt")
    assert "No such file" in refusal(load_vae, tmp_path / "stvae.safetensors")
