"""What several tests of the trainer begin with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.mini_pools import SMALL

from lavin_rt.checkpoint.load import save_dit, save_vae
from lavin_rt.dit.model import JDiT
from lavin_rt.mini.train.dit import initialise_
from lavin_rt.vae.config import VAEConfig
from lavin_rt.vae.model import STVAE


@pytest.fixture
def folders(tmp_path) -> list[Path]:
    """Two tasks of four pairs: the negative, and the picture itself."""
    rng, found = np.random.default_rng(0), []
    for name in ("negative", "same"):
        folder = tmp_path / name
        folder.mkdir()
        for i in range(4):
            picture = rng.integers(0, 256, (40, 48, 3), np.uint8)
            Image.fromarray(picture).save(folder / f"{i}_input.png")
            Image.fromarray(255 - picture if name == "negative" else picture).save(folder / f"{i}_target.png")
        found.append(folder)
    return found


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A small transformer and a small VAE."""
    folder = tmp_path / "start"
    folder.mkdir()
    torch.manual_seed(0)
    save_dit(initialise_(JDiT(SMALL), 0), folder / "lavin_dit.safetensors")
    save_vae(STVAE(VAEConfig(block_out_channels=(32, 32, 32, 32), layers_per_block=1)), folder / "stvae.safetensors")
    return folder
