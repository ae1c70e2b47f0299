"""The golden model as an AOTInductor artifact, compiled once for all tests of a session."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lavin_rt.artifact.manifest import Manifest, file_sha256
from lavin_rt.find.model import find_checkpoint
from support.golden import GOLDEN, golden_cases


def golden_checkpoint(folder: Path):
    """A folder with the golden transformer "c" and the golden VAE under their official names."""
    folder.mkdir(exist_ok=True)
    for source, name in (("dit_c.safetensors", "lavin_dit.safetensors"), ("stvae.pt", "stvae.pt")):
        shutil.copyfile(GOLDEN / source, folder / name)
    return find_checkpoint(folder)


@functools.cache
def artifact(root: Path) -> Path:
    """The artifact's folder; about a minute and a half."""
    from lavin_export.to_aoti import export_aoti

    if shutil.which("g++") is None:
        pytest.skip("no g++ on this machine")
    checkpoint = golden_checkpoint(root / "golden-checkpoint")
    # Compiled code asks how many threads there are when it runs, whatever it was compiled with.
    return export_aoti(checkpoint, root / "golden-aoti", device="cpu", steps=[20, 6])


def changed(source: Path, folder: Path, change: Callable[[Path, dict], None]) -> Path:
    """A copy of an artifact after `change(copy, manifest)`; files that changed get their new hashes, so that only what
    reads them can notice.
    """
    shutil.copytree(source, folder)
    values = json.loads((folder / "manifest.json").read_text())
    change(folder, values)
    for name in values["files"]:
        if (folder / name).exists():
            values["files"][name] = {"sha256": file_sha256(folder / name), "bytes": (folder / name).stat().st_size}
    (folder / "manifest.json").write_text(json.dumps(values))
    return folder


def sessions(folder: Path, device: str = "cpu") -> dict:
    """Every part of an artifact, loaded."""
    from lavin_rt.artifact.aoti import AotiSession

    manifest = Manifest.read(folder)
    return {name: AotiSession(folder, part, manifest, torch.device(device)) for name, part in manifest.parts.items()}


def pipeline_cases() -> list[dict]:
    """The golden pipeline runs, pairs as lists of uint8 `[3, H, W]`."""
    return list(golden_cases("pipeline").values())
