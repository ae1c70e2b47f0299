"""The golden model as an AOTInductor artifact, compiled once for all tests of a session."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lavin_rt.artifact.checked_files import file_sha256
from lavin_rt.artifact.manifest import Manifest
from lavin_rt.find.model import find_checkpoint
from lavin_rt.sampling.speeds import SPEEDS as SPEEDS_BY_NAME
from support.golden import CASES, GOLDEN, golden_cases
from support.once import made_once

# On grids of their own and on the artifact's schedules, with and without kept keys, once a task and refreshed.
SPEEDS = {
    **{name: CASES[name] for name in ("uniform8", "uniform8_both", "official20_held", "official20_reuse")},
    "fastest": SPEEDS_BY_NAME["fastest"],
}


def golden_checkpoint(folder: Path):
    """A folder with the golden transformer "c" and the golden VAE under their official names."""
    folder.mkdir(exist_ok=True)
    for source, name in (("dit_c.safetensors", "lavin_dit.safetensors"), ("stvae.pt", "stvae.pt")):
        shutil.copyfile(GOLDEN / source, folder / name)
    return find_checkpoint(folder)


def artifact(temporary: pytest.TempPathFactory) -> Path:
    """The artifact's folder, verified; some minutes."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ on this machine")

    def export(folder: Path) -> None:
        from lavin_export.to_aoti import export_aoti

        # Compiled code asks how many threads there are when it runs, whatever it was compiled with.
        checkpoint = golden_checkpoint(folder / "checkpoint")
        export_aoti(checkpoint, folder / "artifact", device="cpu", steps=[20, 6], speeds=SPEEDS)

    return made_once(temporary, "golden-aoti", export) / "artifact"


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
