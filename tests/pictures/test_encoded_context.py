"""Encoded contexts in files, and the fingerprint of a VAE."""

import dataclasses
import re

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_context import one_line

from lavin_rt.dit.config import DiTConfig
from lavin_rt.dit.model import JDiT, randomize_
from lavin_rt.errors import InputError
from lavin_rt.pictures.encoded import EncodedContext
from lavin_rt.pipeline import Pipeline
from lavin_rt.vae.config import VAEConfig
from lavin_rt.vae.model import STVAE, vae_fingerprint


def encoded(pairs=2, frames_per_clip=5, size=(32, 48), dtype=torch.float32) -> EncodedContext:
    latent_frames = 2 * pairs * (1 + (frames_per_clip - 1) // 4)
    latents = torch.randn(1, 16, latent_frames, size[0] // 8, size[1] // 8, generator=torch.Generator().manual_seed(0))
    return EncodedContext(latents.to(dtype), "ab" * 16, size, "mean", pairs, frames_per_clip)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frames_per_clip", [1, 5])
def test_encoded_context_comes_back(tmp_path, dtype, frames_per_clip):
    saved = encoded(frames_per_clip=frames_per_clip, dtype=dtype)
    path = tmp_path / "new" / "task.safetensors"
    saved.save(path)
    loaded = EncodedContext.load(path)
    assert torch.equal(loaded.latents, saved.latents) and loaded.latents.dtype == dtype
    for field in ("vae_fingerprint", "size", "posterior", "pairs", "frames_per_clip"):
        assert getattr(loaded, field) == getattr(saved, field)
    assert list(load_file(path)) == ["latents"]
    assert [entry.name for entry in path.parent.iterdir()] == ["task.safetensors"]


def test_strided_latents_are_saved_as_they_are(tmp_path):
    whole = encoded()
    strided = EncodedContext(whole.latents.transpose(3, 4), whole.vae_fingerprint, (48, 32), "mean", 2, 5)
    strided.save(tmp_path / "a.safetensors")
    assert torch.equal(EncodedContext.load(tmp_path / "a.safetensors").latents, strided.latents)


def test_the_vae_is_hashed_when_a_context_is_saved_or_compared(tmp_path, monkeypatch):
    hashed = []
    monkeypatch.setattr(STVAE, "fingerprint", property(lambda vae: hashed.append(vae) or "cd" * 16))
    dit = randomize_(JDiT(DiTConfig(hidden_size=144, depth=1, num_heads=2, kv_group=2))).eval().requires_grad_(False)
    vae = STVAE(VAEConfig(norm_num_groups=2, block_out_channels=(4, 6, 8, 10), layers_per_block=1))
    pipe, picture = Pipeline(dit, vae.requires_grad_(False)), Image.new("RGB", (16, 16))
    task = pipe.task([(picture, picture)], size=16)
    task(picture, steps=4)
    assert not hashed
    task.context.save(tmp_path / "a.safetensors")
    assert len(hashed) == 1 and task.context.vae_fingerprint == "cd" * 16
    pipe.task(tmp_path / "a.safetensors"), pipe.task(task.context)
    assert len(hashed) == 1
    assert dataclasses.replace(task.context, vae_fingerprint="0" * 32).vae_fingerprint == "0" * 32
    with pytest.raises(TypeError, match="vae_fingerprint"):
        EncodedContext(task.context.latents)


def test_encoded_context_is_refused_elsewhere(tmp_path):
    encoded().save(tmp_path / "a.safetensors")
    loaded = EncodedContext.load(tmp_path / "a.safetensors")
    loaded.check("ab" * 16)
    loaded.check("ab" * 16, (32, 48), frames=5, posterior="mean")
    for arguments, words in [
        (("cd" * 16, (32, 48)), ["another VAE", "abababab", "cdcdcdcd"]),
        (("ab" * 16, (48, 32)), ["32x48", "48x32"]),
        (("ab" * 16, (32, 48), 1), ["1 frames", "5"]),
        (("ab" * 16, (32, 48), 5, "sample"), ["mean", "sample"]),
    ]:
        with pytest.raises(InputError) as error:
            loaded.check(*arguments)
        assert all(word in one_line(error) for word in words)


def test_files_that_are_no_encoded_context(tmp_path):
    encoded().save(tmp_path / "whole.safetensors")
    content = (tmp_path / "whole.safetensors").read_bytes()
    for cut in (0, 4, 100, len(content) - 1):
        (tmp_path / f"cut{cut}.safetensors").write_bytes(content[:cut])
    (tmp_path / "text.safetensors").write_text("not one at all, just some text")
    (tmp_path / "folder.safetensors").mkdir()
    save_file({"latents": encoded().latents}, tmp_path / "foreign.safetensors")
    for path in [*sorted(tmp_path.iterdir()), tmp_path / "missing.safetensors"]:
        if path.name != "whole.safetensors":
            with pytest.raises(InputError) as error:
                EncodedContext.load(path)
            assert path.name in one_line(error) and "encoded context" in one_line(error)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": "2"}, "version 2"),
        ({"version": None}, "version none"),
        ({"size": None}, "size"),
        ({"size": "31x48"}, "31"),
        ({"size": "48x32"}, "[1, 16, 8, 6, 4]"),
        ({"pairs": "two"}, "two"),
        ({"pairs": "3"}, "[1, 16, 12, 4, 6]"),
        ({"pairs": "-2"}, "[1, 16, 8, 4, 6]"),
        ({"frames_per_clip": "4"}, "1 + 4k"),
        ({"vae_fingerprint": None}, "vae_fingerprint"),
        ({"posterior": None}, "posterior"),
    ],
)
def test_contradictions_in_an_encoded_context(tmp_path, changes, words):
    path = tmp_path / "a.safetensors"
    encoded().save(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata() | changes
    save_file(load_file(path), path, {key: value for key, value in metadata.items() if value is not None})
    with pytest.raises(InputError) as error:
        EncodedContext.load(path)
    assert words in one_line(error) and str(path) in one_line(error)


def test_unsound_latents_in_an_encoded_context(tmp_path):
    path = tmp_path / "a.safetensors"
    encoded().save(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    latents = load_file(path)["latents"]
    broken = latents.clone()
    broken[0, 0, 0, 0, 0] = float("nan")
    small = latents.to(torch.float8_e5m2)  # with which PyTorch does not calculate
    for tensors in (
        {"latents": broken},
        {"latents": latents.int()},
        {"latents": small},
        {"latents": latents, "more": latents[0].clone()},
    ):
        save_file(tensors, path, metadata)
        with pytest.raises(InputError) as error:
            EncodedContext.load(path)
        one_line(error)


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    encoded().save(path)
    before = path.read_bytes()

    def fail(self, content):
        with open(self, "wb") as file:
            file.write(content[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", fail)
    with pytest.raises(InputError) as error:
        encoded(pairs=1).save(path)
    assert "No space left" in one_line(error)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.safetensors"] and path.read_bytes() == before


def test_a_context_cannot_be_saved_below_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError) as error:
        encoded().save(tmp_path / "file" / "a.safetensors")
    assert "cannot be written" in one_line(error)


# The VAE's fingerprint


def state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "b.weight": torch.randn(4, 3, generator=generator),
        "a.bias": torch.randn(4, generator=generator).bfloat16(),
        "steps": torch.tensor(3),
        "empty": torch.zeros(0, 2),
    }


def test_fingerprint_is_that_of_the_tensors_not_of_the_file(tmp_path):
    torch.save({"state_dict": state()}, tmp_path / "vae.pt")
    save_file(state(), tmp_path / "vae.safetensors")
    loaded = torch.load(tmp_path / "vae.pt", weights_only=True)["state_dict"]
    fingerprints = {
        vae_fingerprint(tensors)
        for tensors in (
            state(),
            loaded,
            load_file(tmp_path / "vae.safetensors"),
            dict(reversed(state().items())),
            state() | {"b.weight": state()["b.weight"].t().contiguous().t()},
            {name: torch.nn.Parameter(t, requires_grad=False) for name, t in state().items()},
            state() | {"b.weight": state()["b.weight"].bfloat16()},
        )
    }
    assert len(fingerprints) == 1 and re.fullmatch("[0-9a-f]{32}", fingerprints.pop())


def test_fingerprint_changes_with_everything():
    one_bit = state()
    one_bit["a.bias"].view(torch.int16)[2] ^= 1
    others = [
        one_bit,
        state() | {"b.weight": state()["b.weight"].reshape(3, 4)},
        {name.replace("a.", "c."): tensor for name, tensor in state().items()},
        {name: tensor for name, tensor in state().items() if name != "empty"},
        state() | {"more": torch.zeros(0)},
        state() | {"empty": torch.zeros(0, 3)},
    ]
    fingerprints = [vae_fingerprint(tensors) for tensors in [state(), *others]]
    assert len(set(fingerprints)) == len(fingerprints)
