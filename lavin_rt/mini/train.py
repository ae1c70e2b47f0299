"""`python -m lavin_rt.mini.train`: a checkpoint of lavin-mini from nothing, in one command that can be interrupted.

Renders the scenes, trains the VAE, encodes every picture once, and trains the transformer on the latents. Run again
with the same folders it goes on where it stopped; with more steps it goes on from where it ended.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

import torch

from lavin_rt.checkpoint import load_dit, load_vae, save_vae
from lavin_rt.config import DiTConfig
from lavin_rt.context import vae_fingerprint
from lavin_rt.devices import resolve_device
from lavin_rt.errors import InputError
from lavin_rt.mini.corpus import Corpus
from lavin_rt.mini.latents import cached_latents
from lavin_rt.mini.tasks import CLIP_TASKS, PICTURE_TASKS
from lavin_rt.mini.train_dit import Plan, train_dit
from lavin_rt.mini.train_vae import make_components, make_vae, train_vae
from lavin_rt.vae import VAEConfig


@dataclasses.dataclass(frozen=True)
class Preset:
    """A model, its data and the length of its training.

    Attributes:
        size: of pictures, pixels a side.
        scenes, clips, photographs: how many of each to train on.
        degraded: pictures of every task that spoils pictures.
        vae, dit: the networks.
        teaching: steps that teach the VAE's decoder its templates.
        vae_steps, vae_batch, vae_peak: of the VAE's training.
        plan: of the transformer's.
    """

    size: int
    scenes: int
    clips: int
    photographs: int
    degraded: int
    vae: VAEConfig
    dit: DiTConfig
    teaching: int
    vae_steps: int
    vae_batch: int
    vae_peak: float
    plan: Plan


PRESETS = {
    "mini": Preset(
        size=64,
        scenes=4000,
        clips=200,
        photographs=1500,
        degraded=3500,
        vae=VAEConfig(block_out_channels=(32, 32, 64, 64), layers_per_block=1),
        dit=DiTConfig(hidden_size=216, depth=5, num_heads=3, kv_group=3),
        teaching=300,
        vae_steps=1650,
        vae_batch=4,
        vae_peak=5e-4,
        plan=Plan(steps=20800, clips=0.06),
    ),
    # A minute on a CPU: shows that everything fits together and that losses fall, not what a trained model can do.
    "tiny": Preset(
        size=32,
        scenes=24,
        clips=2,
        photographs=12,
        degraded=24,
        vae=VAEConfig(block_out_channels=(32, 32, 64, 64), layers_per_block=1),
        dit=DiTConfig(hidden_size=72, depth=2, num_heads=1, kv_group=1),
        teaching=60,
        vae_steps=12,
        vae_batch=2,
        vae_peak=1e-3,
        plan=Plan(steps=120, batch=16, peak=3e-3),
    ),
}


def train(
    preset: Preset,
    output: Path,
    cache: Path,
    device: torch.device,
    workers: int = 1,
    compile: bool = True,
    warm_start: Path | None = None,
) -> None:
    """All stages; see the module. `warm_start` is a folder with both networks' files, whose VAE is kept as it is."""
    corpus = Corpus.make("train", preset.size, preset.scenes, preset.clips, cache, workers)
    seed = preset.plan.seed
    finished, warm_dit = output / "vae-finished", None
    if warm_start is not None:
        warm_dit = load_dit(warm_start / "lavin_dit.safetensors", dtype=torch.float32, resident_modulation=True)
        # Latents mean something to the encoder alone that wrote them: a transformer goes on with its own VAE.
        if not (output / "stvae.safetensors").is_file():
            output.mkdir(parents=True, exist_ok=True)
            save_vae(load_vae(warm_start / "stvae.safetensors"), output / "stvae.safetensors")
            finished.write_text(str(preset.vae_steps))  # a later run does not train another
    elif not finished.is_file() or finished.read_text() != str(preset.vae_steps):
        components = make_components(corpus, preset.vae, seed)
        started = (output / "vae-state.pt").is_file()
        teaching = 0 if started else preset.teaching  # the state has what was taught
        vae = make_vae(preset.vae, components, seed, preset.size // 8, teaching)
        train_vae(corpus, vae, components, output, preset.vae_steps, preset.vae_batch, preset.vae_peak, seed, device)
        finished.write_text(str(preset.vae_steps))
    # The stored weights, rounded to half precision, are what latents are made with, here and ever after.
    vae = load_vae(output / "stvae.safetensors", device, torch.float32)
    pictures, clips = cached_latents(
        cache,
        corpus,
        vae,
        vae_fingerprint(vae.state_dict()),
        [task for task in PICTURE_TASKS if task.trained],
        [task for task in CLIP_TASKS if task.trained],
        preset.photographs,
        preset.degraded,
        seed,
    )
    del corpus
    train_dit(pictures, clips, preset.dit, output, preset.plan, device, compile, warm_dit)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lavin_rt.mini.train", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for the checkpoint, logs and states")
    parser.add_argument("--cache", type=Path, required=True, help="folder for rendered scenes and latents")
    parser.add_argument("--preset", choices=PRESETS, default="mini", help="tiny: a trial of a minute (default: mini)")
    parser.add_argument("--vae-steps", type=int, help="optimiser steps of the VAE (default: the preset's)")
    parser.add_argument("--dit-steps", type=int, help="optimiser steps of the transformer (default: the preset's)")
    parser.add_argument("--warm-start", type=Path, help="folder with lavin_dit.safetensors and stvae.safetensors")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: 0)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    parser.add_argument("--threads", type=int, help="of PyTorch; so many processes render (default: one)")
    parser.add_argument("--no-compile", action="store_true", help="do not run the networks through torch.compile")
    given = parser.parse_args(arguments)
    preset = PRESETS[given.preset]
    plan = dataclasses.replace(preset.plan, seed=given.seed, steps=given.dit_steps or preset.plan.steps)
    preset = dataclasses.replace(preset, plan=plan, vae_steps=given.vae_steps or preset.vae_steps)
    if given.threads:
        torch.set_num_threads(given.threads)
    try:
        device = resolve_device(given.device)
        train(
            preset,
            given.output,
            given.cache,
            device,
            given.threads or 1,
            not given.no_compile,
            given.warm_start,
        )
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; run again with the same folders to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
