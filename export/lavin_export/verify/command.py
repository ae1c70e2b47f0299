"""`lavin-rt export verify`, and a verification in lines."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lavin_export.verify.artifact import verify_artifact
from lavin_rt.artifact.checked_files import file_sha256
from lavin_rt.artifact.manifest import Manifest
from lavin_rt.devices import resolve_device
from lavin_rt.errors import InputError
from lavin_rt.find.model import find_checkpoint


def from_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs `lavin-rt export verify`."""
    manifest = Manifest.read(arguments.artifact)
    checkpoint = find_checkpoint(arguments.checkpoint, revision=arguments.revision)
    for role, path in (("dit", checkpoint.dit), ("vae", checkpoint.vae)):
        if file_sha256(path) != manifest.source.get(f"{role}_sha256"):
            raise InputError(
                f"{arguments.artifact} was not exported from {path} (another SHA-256); give the checkpoint that it was "
                f"exported from: {manifest.source.get('name')}"
            )
    device = resolve_device(arguments.device if arguments.device != "auto" else _device_of(manifest))
    return verify_artifact(Path(arguments.artifact), checkpoint, device)


def _device_of(manifest: Manifest) -> str:
    return "cuda" if manifest.target["device"] == "cuda" else "cpu"


def shown(verification: Mapping[str, Any]) -> Sequence[str]:
    """A verification in lines."""
    lines = []
    for name, checks in verification["parts"].items():
        worst = max(checks, key=lambda check: check["error"] / check["budget"])
        lines.append(f"ok  {name}: error {worst['error']:.1e}, allowed {worst['budget']:.1e}, {len(checks)} shapes")
    run = verification["sampling"]
    lines.append(
        f"ok  sampling, {run['evaluations']} evaluations: error {run['error']:.1e}, allowed {run['budget']:.1e}"
    )
    for name, of_speed in verification.get("speeds", {}).items():
        lines.append(f"ok  speed {name}: error {of_speed['error']:.1e}, allowed {of_speed['budget']:.1e}")
    return [*lines, f"on {verification['device']}, {verification['method']}"]
