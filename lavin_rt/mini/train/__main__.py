"""`python -m lavin_rt.mini.train`: a checkpoint from nothing, in one command that can be interrupted.

lavin-mini: processes render scenes and make all tasks' pairs while the networks are compiled and the VAE trains; then
every picture is encoded once, and the transformer trains on latents that stay on the device. With `--pairs` a
transformer of any size trains on folders of example pairs instead, all of it (under `torchrun` sharded over the
processes) or low-rank adapters. Run again with the same folders it goes on where it stopped; with more steps or minutes
the transformer goes on from where it ended. What a folder's transformer was trained on stays as it is: other pairs,
another VAE, seed or warm start need another folder.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import hashlib
import math
import os
import sys
import time
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from lavin_rt.checkpoint.load import load_dit, load_vae, save_vae
from lavin_rt.devices import resolve_device
from lavin_rt.dit import config
from lavin_rt.dit.model import JDiT
from lavin_rt.errors import InputError
from lavin_rt.files import check_writable, written_whole
from lavin_rt.find.model import find_checkpoint
from lavin_rt.mini.train.dit import PATCH, Contexts, TransformerRun, shapes_of
from lavin_rt.mini.train.folders import folder_pools
from lavin_rt.mini.train.latents import encode_pieces
from lavin_rt.mini.train.presets import PRESETS, Preset, preset
from lavin_rt.mini.train.states import ELSE, add_line
from lavin_rt.mini.train.trainer import ranks
from lavin_rt.mini.train.vae import train_vae
from lavin_rt.mini.world.pieces import PieceMaker
from lavin_rt.vae.model import STVAE

Number = TypeVar("Number", int, float, int | None)
OF_A_WARM_START = "of the warm start"
LEAST = {  # of what is given as a number, by its argument
    **dict.fromkeys(("dit_steps", "tokens", "scenes", "workers", "threads"), 1),
    **dict.fromkeys(("vae_steps", "clips", "lora", "seed", "vae_minutes", "minutes", "total_minutes"), 0),
}
LARGEST_SEED = 2**32 - 1
PATIENCE = datetime.timedelta(hours=3)  # of processes that wait for the first one


class Stages:
    """What took how long, in `stages.jsonl`, and when the whole run has to end.

    The moment of the first start is kept in the folder: a run that goes on has the same end.
    """

    def __init__(self, output: Path, total_minutes: float | None):
        self.file, started = output / "stages.jsonl", output / "started"
        output.mkdir(parents=True, exist_ok=True)
        if not started.is_file():
            _write(started, str(time.time()))
        self.started = _seconds_in(started)
        self.end = None if total_minutes is None else self.started + 60 * total_minutes

    @property
    def left(self) -> float | None:
        """Seconds, if there is an end."""
        return None if self.end is None else max(0.0, self.end - time.time())

    def note(self, stage: str, **figures: float | str) -> None:
        add_line({"stage": stage, "seconds": round(time.time() - self.started, 1), **figures}, self.file)


def _seconds_in(started: Path) -> float:
    try:
        seconds = float(started.read_text())
    except ValueError:  # no text, or no number
        seconds = float("nan")
    if not math.isfinite(seconds):
        raise InputError(f"{started} is damaged; expected the seconds of the first start; delete it to start anew")
    return seconds


@dataclasses.dataclass(frozen=True)
class TrainingSetting:
    """How and where a training runs.

    Attributes:
        output, cache: folders for what comes out, and for rendered pieces.
        device: of this process.
        workers: processes that render.
        compile: run the networks through `torch.compile`.
        warm_start: a checkpoint to begin with, whose VAE is kept as it is.
        total_minutes: of everything.
        lora: rank of adapters that are trained in the place of all weights, or 0.
        checkpointing: compute activations again in the backward pass.
        vae: weights that the VAE's training begins with; for folders of pairs, and in the place of a warm start's, the
            VAE as it is.
    """

    output: Path
    cache: Path | None
    device: torch.device
    workers: int = 1
    compile: bool = True
    warm_start: str | None = None
    total_minutes: float | None = None
    lora: int = 0
    checkpointing: bool = False
    vae: str | None = None

    def start(self) -> JDiT | None:
        """The weights to begin with, whose VAE, or the one given for them, is put into the output folder."""
        if self.warm_start is None:
            return None
        files = find_checkpoint(self.warm_start)
        dit = load_dit(files.dit, dtype=torch.float32, resident_modulation=True)
        # Latents mean something to the encoder alone that wrote them: a transformer goes on with its own VAE.
        if not ranks()[0]:
            self.put_vae(self.vae or files.vae)
            _write(self.output / "vae-finished", OF_A_WARM_START)
        return dit

    def put_vae(self, path: str | os.PathLike) -> None:
        """A VAE as it is into the output folder, unless it is there."""
        vae, file = load_vae(path), self.output / "stvae.safetensors"
        if not file.is_file() or load_vae(file).fingerprint != vae.fingerprint:
            self.check_vae_is_free()
            save_vae(vae, file)

    def check_vae_is_free(self) -> None:
        """Raises an InputError where the folder's VAE has to stay, as a transformer was trained on its latents."""
        state = self.output / "dit-state.pt"
        if state.is_file() and (self.output / "stvae.safetensors").is_file():
            raise InputError(f"{state} belongs to the VAE beside it, which would change; {ELSE}")

    def run(self, chosen: Preset, dit: JDiT | None) -> TransformerRun:
        shape = chosen.dit if dit is None else dit.config
        return TransformerRun(
            shape, self.output, chosen.plan, self.device, self.compile, dit, self.lora, self.checkpointing
        )


def train(chosen: Preset, setting: TrainingSetting) -> None:
    """All stages of lavin-mini; see the module. Of several processes the first one renders and trains the VAE."""
    from lavin_rt.mini.world.tasks import TASKS

    stages, (rank, world) = Stages(setting.output, setting.total_minutes), ranks()
    stages.note("start", device=_name(setting.device))
    if rank:
        dist.barrier()
    assert setting.cache is not None  # only a training on folders has none
    maker = PieceMaker(setting.cache, chosen.size, chosen.amounts, chosen.plan.seed, setting.workers)
    try:
        dit = setting.start()
        if world == 1:  # compiles while pieces are made; several processes can only begin together
            run = _compiled(chosen, setting, dit)
            stages.note("transformer compiled")
        if not rank:
            _train_vae(chosen, setting, maker)
            stages.note("vae trained", pieces=len(maker.ready()))
        if world > 1:
            if not rank:
                for _ in maker.arriving(chosen.patience):
                    pass
                dist.barrier()
            run = _compiled(chosen, setting, dit)
        # The stored weights, rounded to half precision, are what latents are made with, here and ever after.
        vae = load_vae(setting.output / "stvae.safetensors", setting.device, torch.float32)
        pictures, clips = encode_pieces(maker, vae, setting.device, chosen.patience)
        if pictures is None:
            raise InputError(f"{setting.cache}: no pieces with pictures; see the warnings above")
        names = sorted(name for name, task in TASKS.items() if task.trained)
        tasks = f"{len(names)} of {hashlib.sha256(' '.join(names).encode()).hexdigest()[:8]}"
        origin = {"VAE": vae.fingerprint, "set of tasks": tasks, "size": f"{chosen.size} px"}
        del vae
        if setting.device.type == "cuda":
            torch.cuda.empty_cache()
        counts = {"pictures": len(pictures.latents), "clips": 0 if clips is None else len(clips.latents)}
        stages.note("encoded", **counts)
        weights = {name: task.weight for name, task in TASKS.items()}
        run.train(Contexts(pictures, clips, weights, chosen.plan, origin), stages.left)
        stages.note("transformer trained")
    finally:
        maker.close()


def _compiled(chosen: Preset, setting: TrainingSetting, dit: JDiT | None) -> TransformerRun:
    run = setting.run(chosen, dit)
    run.compile(shapes_of(chosen.plan), chosen.size // PATCH)
    return run


def _train_vae(chosen: Preset, setting: TrainingSetting, maker: PieceMaker) -> None:
    """Unless the folder says that it is done."""
    finished, plan = setting.output / "vae-finished", chosen.vae_plan
    done = finished.read_text() if finished.is_file() else ""
    if done == OF_A_WARM_START:
        return
    start = None if setting.vae is None else load_vae(setting.vae, dtype=torch.float32)
    length = str((plan.steps, plan.seconds))
    wanted = f"{length} from {'nothing' if start is None else start.fingerprint}"
    if setting.vae is not None and plan.steps == 0:
        setting.put_vae(setting.vae)
    elif done in (wanted, length):  # the length alone: an earlier version's
        return
    else:
        setting.check_vae_is_free()
        where = setting.output, plan, setting.device, setting.compile
        train_vae(maker, chosen.vae, chosen.size, *where, chosen.patience, start)
    _write(finished, wanted)


def train_on_folders(chosen: Preset, setting: TrainingSetting, folders: list[Path], size: int) -> None:
    """The transformer alone, on folders of example pairs, each a task.

    Args:
        chosen: whose transformer and plan are taken.
        folders: in the templates' layout.
        size: of pictures, pixels a side.
    """
    stages = Stages(setting.output, setting.total_minutes)
    stages.note("start", device=_name(setting.device))
    dit, file = setting.start(), setting.output / "stvae.safetensors"
    if dit is None and setting.vae is not None and not ranks()[0]:
        setting.put_vae(setting.vae)
    if ranks()[1] > 1:
        dist.barrier()
    if not file.is_file():
        raise InputError("no VAE to encode the pairs with; give --vae FILE or --warm-start CHECKPOINT")
    network: STVAE = load_vae(file, setting.device, torch.float32)
    pools = folder_pools(folders, network, size, setting.device)
    tasks = sorted(f"{task.name} {task.digest[:8]}" for pool in pools if pool is not None for task in pool.tasks)
    origin = {"VAE": network.fingerprint, "set of pairs": ", ".join(tasks), "size": f"{size} px"}
    del network
    stages.note("encoded", latents=sum(len(pool.latents) for pool in pools if pool is not None))
    weights = {task.name: 1.0 for pool in pools if pool is not None for task in pool.tasks}
    run, contexts = setting.run(chosen, dit), Contexts(*pools, weights, chosen.plan, origin)
    run.compile(contexts.shapes(), size // PATCH, 1 if pools[1] is None else pools[1].latents.shape[2])
    stages.note("transformer compiled")
    run.train(contexts, stages.left)
    stages.note("transformer trained")


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _write(path: Path, text: str) -> None:
    with written_whole(path) as partial:
        partial.write_text(text)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m lavin_rt.mini.train", description=__doc__.splitlines()[0])
    made.add_argument("--output", type=Path, required=True, help="folder for the checkpoint, logs and states")
    made.add_argument("--cache", type=Path, help="folder for rendered pieces; needed without --pairs")
    made.add_argument(
        "--preset",
        choices=[*PRESETS, *config.PRESETS],
        default="mini",
        help="tiny: a trial of a minute (default: mini)",
    )
    made.add_argument(
        "--vae-steps", type=int, help="optimiser steps of the VAE; 0 keeps --vae as it is (default: the preset's)"
    )
    made.add_argument("--vae-minutes", type=float, help="of the VAE's training, in the place of steps")
    made.add_argument("--dit-steps", type=int, help="optimiser steps of the transformer (default: the preset's)")
    made.add_argument("--minutes", type=float, help="of the transformer's training, in the place of steps")
    made.add_argument("--total-minutes", type=float, help="of everything: the transformer has what the rest leaves")
    made.add_argument("--tokens", type=int, help="of a step of the transformer (default: the preset's)")
    made.add_argument("--peak", type=float, help="the transformer's learning rate (default: the preset's)")
    made.add_argument("--scenes", type=int, help="to render (default: the preset's)")
    made.add_argument("--clips", type=int, help="to render (default: the preset's)")
    made.add_argument("--pairs", type=Path, nargs="+", metavar="DIR", help="train on these folders of example pairs")
    made.add_argument("--size", type=int, help="of the folders' pictures, pixels a side (default: the preset's)")
    made.add_argument("--vae", help="VAE to begin with, or for --pairs (default: the warm start's)")
    made.add_argument("--warm-start", metavar="CHECKPOINT", help="weights to begin with: a folder or a hub id")
    made.add_argument("--lora", type=int, default=0, metavar="RANK", help="train adapters of this rank and merge them")
    made.add_argument("--checkpointing", action="store_true", help="less memory for a third more arithmetic")
    made.add_argument("--seed", type=int, default=0, help="of everything random (default: 0)")
    made.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    made.add_argument("--workers", type=int, default=1, help="processes that render (default: 1)")
    made.add_argument("--threads", type=int, help="of PyTorch on the processor (default: its own choice)")
    made.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="run the networks through torch.compile (default: on a GPU; on a processor it takes minutes to begin)",
    )
    return made


def main(arguments: list[str] | None = None) -> int:
    given = parser().parse_args(arguments)
    try:
        _check(given)
        if given.threads is not None:
            torch.set_num_threads(given.threads)
        if not given.pairs and given.cache is None:
            raise InputError("no folder for rendered pieces; give --cache DIR, or --pairs DIR... to train on")
        if given.lora and (given.warm_start is None or dist.is_torchelastic_launched()):
            raise InputError("--lora trains a change to given weights in one process; give --warm-start CHECKPOINT")
        device, chosen = _device(given.device), _chosen(given)
        setting = TrainingSetting(
            given.output,
            given.cache,
            device,
            given.workers,
            device.type == "cuda" if given.compile is None else given.compile,
            given.warm_start,
            given.total_minutes,
            given.lora,
            given.checkpointing,
            given.vae,
        )
        if given.pairs:
            train_on_folders(chosen, setting, given.pairs, _or(given.size, chosen.size))
        else:
            train(chosen, setting)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; run again with the same folders to go on", file=sys.stderr)
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


def _check(given: argparse.Namespace) -> None:
    """Raises an InputError for numbers that mean nothing and for folders that cannot be written."""
    for name, least in LEAST.items():
        value = getattr(given, name)
        if value is not None and not least <= value < math.inf:
            raise InputError(f"--{name.replace('_', '-')} is {value}; expected a number of at least {least}")
    if given.seed > LARGEST_SEED:
        raise InputError(f"--seed is {given.seed}; expected at most {LARGEST_SEED}")
    if given.peak is not None and not 0 < given.peak < math.inf:
        raise InputError(f"--peak is {given.peak}; expected a positive number such as 0.001")
    if given.size is not None and (given.size < 1 or given.size % 16):
        raise InputError(f"--size is {given.size}; expected a positive multiple of 16")
    if not given.pairs and given.vae_steps == 0 and given.vae is None and given.warm_start is None:
        raise InputError("--vae-steps 0 keeps a VAE as it is, and none is given; give --vae FILE")
    for folder in (given.output, given.cache):
        if folder is not None:
            check_writable(folder / "started")


def _or(value: Number | None, otherwise: Number) -> Number:
    return otherwise if value is None else value


def _device(name: str) -> torch.device:
    """The device of this process, of which `torchrun` starts several; a GPU is prepared."""
    device = resolve_device(name)
    if dist.is_torchelastic_launched():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
        if device.type == "cuda":
            device = torch.device("cuda", dist.get_rank() % torch.cuda.device_count())
            torch.cuda.set_device(device)
    if device.type == "cuda":
        # Fast float32 products where autocast leaves any, and attention by the kernels that know grouped heads.
        torch.set_float32_matmul_precision("high")
        torch.backends.cuda.enable_cudnn_sdp(False)
    return device


def _chosen(given: argparse.Namespace) -> Preset:
    """The preset with what the command line changes; limits in minutes lift those in steps."""
    chosen = preset(given.preset)
    amounts = dataclasses.replace(
        chosen.amounts, scenes=_or(given.scenes, chosen.amounts.scenes), clips=_or(given.clips, chosen.amounts.clips)
    )
    vae_plan = dataclasses.replace(chosen.vae_plan, seed=given.seed)
    if given.vae_steps is not None:
        vae_plan = dataclasses.replace(vae_plan, steps=given.vae_steps)
    if given.vae_minutes is not None:
        vae_plan = dataclasses.replace(vae_plan, seconds=60 * given.vae_minutes, steps=given.vae_steps)
    plan = dataclasses.replace(
        chosen.plan,
        seed=given.seed,
        steps=_or(given.dit_steps, chosen.plan.steps),
        tokens=_or(given.tokens, chosen.plan.tokens),
        peak=_or(given.peak, chosen.plan.peak),
    )
    if given.minutes is not None or given.total_minutes is not None:
        seconds = None if given.minutes is None else 60 * given.minutes
        plan = dataclasses.replace(plan, seconds=seconds, steps=given.dit_steps)
    return dataclasses.replace(chosen, amounts=amounts, vae_plan=vae_plan, plan=plan)


if __name__ == "__main__":
    sys.exit(main())
