"""`make demo`: from photographs and an official-layout checkpoint to a picture, on any machine.

The checkpoint is small and has random weights: it shows that the whole path works, not what the released model can do.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lavin_rt.checkpoint import save_dit, save_vae
from lavin_rt.cli import main as lavin_rt
from lavin_rt.config import DiTConfig
from lavin_rt.errors import missing_extra
from lavin_rt.model import JDiT, randomize_
from lavin_rt.vae import STVAE, VAEConfig

# Photographs that ship inside scikit-image: the context's, and the query.
CONTEXT = ("astronaut", "chelsea", "rocket", "retina")
QUERY = "coffee"


def write_photographs(folder: Path) -> Path:
    """Writes the template of a task photo -> edges (Sobel), and the query; returns the query's path."""
    try:
        from skimage import color, data, filters
    except ImportError:
        raise missing_extra("scikit-image", "demo", "the demo") from None
    template = folder / "checkpoint" / "template" / "edge_detection"
    template.mkdir(parents=True, exist_ok=True)
    for name in CONTEXT:
        photo = getattr(data, name)()
        edges = filters.sobel(color.rgb2gray(photo))
        edges = np.uint8(255 * np.clip(edges / np.quantile(edges, 0.99), 0, 1))
        Image.fromarray(photo).save(template / f"{name}_input.png")
        Image.fromarray(edges).convert("RGB").save(template / f"{name}_target.png")
    query = folder / f"{QUERY}.png"
    Image.fromarray(getattr(data, QUERY)()).save(query)
    return query


def write_checkpoint(folder: Path) -> Path:
    """Writes a small random checkpoint under the official names and in the official layout."""
    folder.mkdir(parents=True, exist_ok=True)
    dit = JDiT(DiTConfig(hidden_size=288, depth=4, num_heads=4, kv_group=4))
    save_dit(randomize_(dit), folder / "lavin_dit.safetensors")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = STVAE(VAEConfig(block_out_channels=(32, 32, 64, 64), layers_per_block=1))
    save_vae(vae, folder / "stvae.pt")
    return folder


def main() -> int:
    """Runs the demo; returns the exit code of `lavin-rt run`."""
    parser = argparse.ArgumentParser(prog="python -m lavin_rt.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder to write to (default: demo)")
    folder = parser.parse_args().output
    query = write_photographs(folder)
    checkpoint = write_checkpoint(folder / "checkpoint")
    command = [
        "run",
        "--checkpoint",
        checkpoint,
        "--task",
        "edge_detection",
        "--query",
        query,
        "-o",
        folder / "edges.png",
    ]
    command = [str(word) for word in command] + ["--size", "128", "--grid"]
    print(
        "This demo's checkpoint has random weights: the picture shows that the path works, not what the model can do."
    )
    print("$ lavin-rt " + shlex.join(command))
    code = lavin_rt(command)
    if code == 0:
        print(f"Look at {folder / 'edges-grid.png'}: context pairs, the query, and below it the answer.")
    return code


if __name__ == "__main__":
    sys.exit(main())
