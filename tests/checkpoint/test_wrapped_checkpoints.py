"""Checkpoints as others save them: prefixes of wrappers, several files, float8, links of a hub's cache."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.checks import refusal

import lavin_rt
from lavin_rt.checkpoint.load import describe, load_dit, load_vae
from lavin_rt.checkpoint.tensors import SafetensorsFile
from lavin_rt.find.model import BUNDLED, find_checkpoint, find_model

DIT, VAE = BUNDLED / "weights" / "lavin_dit.safetensors", BUNDLED / "weights" / "stvae.safetensors"
NAMES = {
    "data parallel": lambda name: f"module.{name}",
    "compiled": lambda name: f"_orig_mod.{name}",
    "both": lambda name: f"module._orig_mod.{name}",
    "compiled blocks": lambda name: name.replace("blocks.1.", "blocks.1._orig_mod."),
}


def metadata() -> dict[str, str]:
    with safe_open(DIT, "pt") as file:
        return file.metadata()


def write_shards(folder: Path, tensors: dict[str, torch.Tensor], stem: str = "lavin_dit", count: int = 3) -> Path:
    names, places = sorted(tensors), {}
    for i in range(count):
        file = f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors"
        part = {name: tensors[name] for name in names[i::count]}
        save_file(part, folder / file, metadata=metadata())
        places |= dict.fromkeys(part, file)
    index = folder / f"{stem}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return index


def same(found: torch.nn.Module, expected: torch.nn.Module) -> None:
    tensors = found.state_dict()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensors[name], tensor), name


def warned(load: Callable) -> tuple[torch.nn.Module, list[str]]:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        return load(), [str(one.message) for one in said]


@pytest.mark.parametrize("kind", NAMES)
def test_prefixes_of_wrappers_are_taken_with_one_warning(tmp_path, kind):
    renamed = {NAMES[kind](name): tensor for name, tensor in load_file(DIT).items()}
    save_file(renamed, tmp_path / "lavin_dit.safetensors", metadata=metadata())
    dit, said = warned(lambda: load_dit(tmp_path / "lavin_dit.safetensors"))
    same(dit, load_dit(DIT))
    assert len(said) == 1 and "wrapped model" in said[0]
    # Modulation is read from the file when it is asked for.
    for found, expected in zip(dit.modulation_parameters(1), load_dit(DIT).modulation_parameters(1), strict=True):
        assert torch.equal(found, expected)
    torch.save({"state_dict": {NAMES[kind](name): t for name, t in load_file(VAE).items()}}, tmp_path / "stvae.pt")
    vae, said = warned(lambda: load_vae(tmp_path / "stvae.pt"))
    same(vae, load_vae(VAE))
    assert len(said) == 1
    assert describe(find_checkpoint(tmp_path)).unexpected == ()


def test_names_with_and_without_prefix_are_refused(tmp_path):
    tensors = load_file(DIT)
    tensors["module.prompt_embed"] = tensors["prompt_embed"].clone()
    save_file(tensors, tmp_path / "lavin_dit.safetensors", metadata=metadata())
    assert "prefixes of wrappers" in refusal(load_dit, tmp_path / "lavin_dit.safetensors")
    tensors = load_file(VAE)
    name = next(iter(tensors))
    torch.save(tensors | {f"module.{name}": tensors[name].clone()}, tmp_path / "stvae.pt")
    assert "prefixes of wrappers" in refusal(load_vae, tmp_path / "stvae.pt")


def test_a_checkpoint_in_several_files(tmp_path):
    index = write_shards(tmp_path, load_file(DIT))
    write_shards(tmp_path, load_file(VAE), "stvae", 2)
    files = find_checkpoint(tmp_path)
    assert files.dit == index and files.vae.name == "stvae.safetensors.index.json"
    assert find_checkpoint(index).dit == index
    dit = load_dit(files.dit)
    same(dit, load_dit(DIT))
    for found, expected in zip(dit.modulation_parameters(0), load_dit(DIT).modulation_parameters(0), strict=True):
        assert torch.equal(found, expected)
    same(load_vae(files.vae), load_vae(VAE))
    described = describe(files)
    assert described.size == sum(path.stat().st_size for path in tmp_path.glob("lavin_dit-*"))
    assert lavin_rt.Pipeline.from_pretrained(tmp_path).size == 64
    lavin_rt.save_dit(dit, tmp_path / "one.safetensors", size=64)
    same(load_dit(tmp_path / "one.safetensors"), dit)
    part = tmp_path / "lavin_dit-00002-of-00003.safetensors"
    os.utime(part, (1, 1))
    assert "has changed" in refusal(dit.modulation_parameters, 1)


def test_indices_that_do_not_fit(tmp_path):
    index = write_shards(tmp_path, load_file(DIT), count=2)
    content = json.loads(index.read_text())

    def with_places(places: object) -> str:
        index.write_text(json.dumps({"weight_map": places}))
        return refusal(SafetensorsFile.open, index)

    places = content["weight_map"]
    assert "no index" in with_places({})
    assert "no index" in with_places([1])
    assert "no index" in with_places({"a": "../elsewhere.safetensors"})
    assert "no index" in with_places({"a": None, "b": 1})
    assert "no index" in with_places({"a": index.name})
    assert "cannot read" in with_places({**places, "a": "missing.safetensors"})
    assert "is not where it says" in with_places({**places, "a": next(iter(places.values()))})
    first, second = sorted(tmp_path.glob("lavin_dit-*"))
    shutil.copy(first, second)
    one = load_file(first)
    assert "in two of them" in with_places({**dict.fromkeys(one, first.name), next(iter(one)): second.name})
    index.write_text("[" * 10_000)
    assert "no index" in refusal(SafetensorsFile.open, index)


def test_float8_is_refused_with_what_to_do(tmp_path):
    tensors = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in load_file(DIT).items()}
    save_file(tensors, tmp_path / "lavin_dit.safetensors", metadata=metadata())
    message = refusal(load_dit, tmp_path / "lavin_dit.safetensors")
    assert "F8_E4M3" in message and "get the original" in message and "cast back" in message
    torch.save({name: tensor.to(torch.float8_e5m2) for name, tensor in load_file(VAE).items()}, tmp_path / "stvae.pt")
    assert "get the original" in refusal(load_vae, tmp_path / "stvae.pt")


def test_links_of_a_hub_s_cache_that_lead_nowhere_are_named(tmp_path):
    (tmp_path / "lavin_dit.safetensors").symlink_to("../../blobs/0123")
    shutil.copy(VAE, tmp_path)
    message = refusal(find_checkpoint, tmp_path)
    assert "is a link to ../../blobs/0123, which is not there" in message
    (tmp_path / "lavin_dit.safetensors").unlink()
    shutil.copy(DIT, tmp_path)
    (tmp_path / "stvae.safetensors").unlink()
    (tmp_path / "stvae.safetensors").symlink_to("nowhere")
    assert "stvae.safetensors is a link" in refusal(find_checkpoint, tmp_path)


def test_an_artifact_of_links_is_refused_as_one(tmp_path):
    (tmp_path / "blob").write_text(json.dumps({"format": "lavin-rt artifact", "version": 1}))
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "manifest.json").symlink_to("../blob")
    message = refusal(lavin_rt.Pipeline.from_pretrained, tmp_path / "snapshot")
    assert "neither links nor devices" in message and "give the hub's id" in message
    assert "neither links nor devices" in refusal(find_model, tmp_path / "snapshot")
