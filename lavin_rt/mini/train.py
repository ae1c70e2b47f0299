"""`python -m lavin_rt.mini.train`: a checkpoint of lavin-mini from nothing, in one command that can be interrupted.

Processes render scenes and make all tasks' pairs while the networks are compiled and the VAE trains; then every picture
is encoded once, and the transformer trains on latents that stay on the device. Run again with the same folders it goes
on where it stopped; with more steps or minutes it goes on from where it ended.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

import torch

from lavin_rt.checkpoint import load_dit, load_vae, save_vae
from lavin_rt.config import DiTConfig
from lavin_rt.devices import resolve_device
from lavin_rt.errors import InputError
from lavin_rt.files import written_whole
from lavin_rt.mini.latents import encode_pieces
from lavin_rt.mini.pieces import Amounts, PieceMaker
from lavin_rt.mini.train_dit import PATCH, Contexts, Plan, TransformerRun, shapes_of
from lavin_rt.mini.train_vae import VAEPlan, train_vae
from lavin_rt.vae import VAEConfig


@dataclasses.dataclass(frozen=True)
class Preset:
    """A model, its data and the length of its training.

    Attributes:
        size: of pictures, pixels a side.
        amounts: of data.
        vae, dit: the networks.
        vae_plan, plan: of their trainings.
        patience: seconds without a new piece after which training goes on with those that are there.
    """

    size: int
    amounts: Amounts
    vae: VAEConfig
    dit: DiTConfig
    vae_plan: VAEPlan
    plan: Plan
    patience: float = 90.0


PRESETS = {
    "mini": Preset(
        size=64,
        amounts=Amounts(scenes=40_000, clips=2_500, ordinary=40_000, family=6_000, photographs=30_000),
        vae=VAEConfig(block_out_channels=(64, 64, 64, 64), layers_per_block=1),
        dit=DiTConfig(hidden_size=216, depth=10, num_heads=9, kv_group=3),
        vae_plan=VAEPlan(steps=8_000),
        plan=Plan(steps=16_000),
    ),
    # A minute on a CPU: shows that everything fits together and that losses fall, not what a trained model can do.
    "tiny": Preset(
        size=32,
        amounts=Amounts(24, 2, 24, 8, 12, scenes_a_piece=12, clips_a_piece=1),
        vae=VAEConfig(block_out_channels=(32, 32, 32, 32), layers_per_block=1),
        dit=DiTConfig(hidden_size=72, depth=2, num_heads=3, kv_group=3),
        vae_plan=VAEPlan(steps=30, batch=16, peak=2e-3, capacity=1000, first_pieces=1),
        plan=Plan(steps=120, tokens=1024, peak=3e-3, log_every=20, warmup=12),
    ),
}


class Stages:
    """What took how long, in `stages.jsonl`, and when the whole run has to end.

    The moment of the first start is kept in the folder: a run that goes on has the same end.
    """

    def __init__(self, output: Path, total_minutes: float | None):
        self.file, started = output / "stages.jsonl", output / "started"
        output.mkdir(parents=True, exist_ok=True)
        if not started.is_file():
            started.write_text(str(time.time()))
        self.started = float(started.read_text())
        self.end = None if total_minutes is None else self.started + 60 * total_minutes

    @property
    def left(self) -> float | None:
        """Seconds, if there is an end."""
        return None if self.end is None else max(0.0, self.end - time.time())

    def note(self, stage: str, **figures: float | str) -> None:
        record = {"stage": stage, "seconds": round(time.time() - self.started, 1), **figures}
        with open(self.file, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        print(json.dumps(record), file=sys.stderr, flush=True)


def train(
    preset: Preset,
    output: Path,
    cache: Path,
    device: torch.device,
    workers: int = 1,
    compile: bool = True,
    warm_start: Path | None = None,
    total_minutes: float | None = None,
) -> None:
    """All stages; see the module. `warm_start` is a folder with both networks' files, whose VAE is kept as it is."""
    from lavin_rt.mini.tasks import TASKS

    stages = Stages(output, total_minutes)
    stages.note("start", device=_name(device))
    maker = PieceMaker(cache, preset.size, preset.amounts, preset.plan.seed, workers)
    try:
        warm_dit, finished = None, output / "vae-finished"
        if warm_start is not None:
            warm_dit = load_dit(warm_start / "lavin_dit.safetensors", dtype=torch.float32, resident_modulation=True)
            # Latents mean something to the encoder alone that wrote them: a transformer goes on with its own VAE.
            if not (output / "stvae.safetensors").is_file():
                save_vae(load_vae(warm_start / "stvae.safetensors"), output / "stvae.safetensors")
                _write(finished, "of the warm start")
        run = TransformerRun(preset.dit, output, preset.plan, device, compile, warm_dit)
        run.compile(shapes_of(preset.plan), preset.size // PATCH)
        stages.note("transformer compiled")
        if not finished.is_file() or finished.read_text() != "of the warm start":
            length = str((preset.vae_plan.steps, preset.vae_plan.seconds))
            if not finished.is_file() or finished.read_text() != length:
                train_vae(maker, preset.vae, preset.size, output, preset.vae_plan, device, compile, preset.patience)
                _write(finished, length)
        stages.note("vae trained", pieces=len(maker.ready()))
        # The stored weights, rounded to half precision, are what latents are made with, here and ever after.
        vae = load_vae(output / "stvae.safetensors", device, torch.float32)
        pictures, clips = encode_pieces(maker, vae, device, preset.patience)
        if pictures is None:
            raise InputError(f"{cache}: no pieces with pictures; see the warnings above")
        del vae
        if device.type == "cuda":
            torch.cuda.empty_cache()
        counts = {"pictures": len(pictures.latents), "clips": 0 if clips is None else len(clips.latents)}
        stages.note("encoded", **counts)
        weights = {name: task.weight for name, task in TASKS.items()}
        dit = run.train(Contexts(pictures, clips, weights, preset.plan), stages.left)
        del dit
        stages.note("transformer trained")
    finally:
        maker.close()


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _write(path: Path, text: str) -> None:
    with written_whole(path) as partial:
        partial.write_text(text)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lavin_rt.mini.train", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for the checkpoint, logs and states")
    parser.add_argument("--cache", type=Path, required=True, help="folder for rendered pieces")
    parser.add_argument("--preset", choices=PRESETS, default="mini", help="tiny: a trial of a minute (default: mini)")
    parser.add_argument("--vae-steps", type=int, help="optimiser steps of the VAE (default: the preset's)")
    parser.add_argument("--vae-minutes", type=float, help="of the VAE's training, in the place of steps")
    parser.add_argument("--dit-steps", type=int, help="optimiser steps of the transformer (default: the preset's)")
    parser.add_argument("--minutes", type=float, help="of the transformer's training, in the place of steps")
    parser.add_argument("--total-minutes", type=float, help="of everything: the transformer has what the rest leaves")
    parser.add_argument("--tokens", type=int, help="of a step of the transformer (default: the preset's)")
    parser.add_argument("--scenes", type=int, help="to render (default: the preset's)")
    parser.add_argument("--clips", type=int, help="to render (default: the preset's)")
    parser.add_argument("--warm-start", type=Path, help="folder with lavin_dit.safetensors and stvae.safetensors")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: 0)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    parser.add_argument("--workers", type=int, default=1, help="processes that render (default: 1)")
    parser.add_argument("--threads", type=int, help="of PyTorch on the processor (default: its own choice)")
    parser.add_argument("--no-compile", action="store_true", help="do not run the networks through torch.compile")
    given = parser.parse_args(arguments)
    if given.threads:
        torch.set_num_threads(given.threads)
    try:
        device = resolve_device(given.device)
        if device.type == "cuda":
            _prepare_gpu()
        train(
            _chosen(given, device),
            given.output,
            given.cache,
            device,
            given.workers,
            device.type == "cuda" and not given.no_compile,
            given.warm_start,
            given.total_minutes,
        )
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; run again with the same folders to go on", file=sys.stderr)
        return 130
    return 0


def _chosen(given: argparse.Namespace, device: torch.device) -> Preset:
    """The preset with what the command line changes; limits in minutes lift those in steps."""
    preset = PRESETS[given.preset]
    amounts = dataclasses.replace(
        preset.amounts, scenes=given.scenes or preset.amounts.scenes, clips=given.clips or preset.amounts.clips
    )
    vae_plan = dataclasses.replace(preset.vae_plan, seed=given.seed, steps=given.vae_steps or preset.vae_plan.steps)
    if given.vae_minutes is not None:
        vae_plan = dataclasses.replace(vae_plan, seconds=60 * given.vae_minutes, steps=given.vae_steps)
    plan = dataclasses.replace(
        preset.plan,
        seed=given.seed,
        steps=given.dit_steps or preset.plan.steps,
        tokens=given.tokens or preset.plan.tokens,
    )
    if given.minutes is not None or given.total_minutes is not None:
        seconds = None if given.minutes is None else 60 * given.minutes
        plan = dataclasses.replace(plan, seconds=seconds, steps=given.dit_steps)
    return dataclasses.replace(preset, amounts=amounts, vae_plan=vae_plan, plan=plan)


def _prepare_gpu() -> None:
    """Fast float32 products where autocast leaves any, and attention by the kernels that know grouped heads."""
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.enable_cudnn_sdp(False)


if __name__ == "__main__":
    sys.exit(main())
