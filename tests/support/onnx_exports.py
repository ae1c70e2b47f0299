"""Real exports of the golden models, made once for the tests that look at them."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from lavin_export.to_onnx.export import export_onnx
from lavin_rt.checkpoint.files import Checkpoint
from lavin_rt.find.model import find_checkpoint
from support.golden import GOLDEN


def golden_checkpoint(folder: Path, name: str) -> Checkpoint:
    """A checkpoint folder with one of the golden transformers and the golden VAE."""
    folder.mkdir(parents=True)
    shutil.copy(GOLDEN / f"{name}.safetensors", folder / "lavin_dit.safetensors")
    shutil.copy(GOLDEN / "stvae.pt", folder)
    return find_checkpoint(folder)


def exported(folder: Path, name: str, dtype: torch.dtype, **options) -> tuple[Path, Checkpoint]:
    """The verified ONNX artifact of a golden model, and the checkpoint that it was made of."""
    checkpoint = golden_checkpoint(folder / "checkpoint", name)
    export_onnx(checkpoint, folder / "artifact", dtype=dtype, **options)
    return folder / "artifact", checkpoint
