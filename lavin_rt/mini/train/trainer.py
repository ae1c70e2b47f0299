"""What the trainings share: averaged weights, the learning rate, a log, and a state to go on from.

Nothing here waits for the device in a step: figures are summed there and fetched when a line is logged.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor, distribute_tensor
from tqdm import tqdm

from lavin_rt.errors import InputError
from lavin_rt.mini.train.states import Origin, add_line, load_state, save_state

CLOCK_EVERY = 10  # steps
DIVERGED = 4.0  # times the lowest loss logged so far
EARLY = 20  # steps after which a training from nothing logs for the first time, as it may diverge from there on
SLOWEST = 0.05  # of the peak: a loss that runs away even so is the end


class AveragedWeights:
    """An exponential moving average of a network's parameters, float32, young at first: its memory grows with the
    steps taken, up to `1 / (1 - decay)`.
    """

    def __init__(self, network: nn.Module, decay: float):
        self.decay = decay
        self.values = {name: p.detach().clone() for name, p in network.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        learning = [(local(self.values[name]), local(p)) for name, p in network.named_parameters() if p.requires_grad]
        torch._foreach_lerp_([ours for ours, _ in learning], [theirs for _, theirs in learning], 1 - decay)

    @torch.no_grad()
    def copy_to(self, network: nn.Module) -> None:
        for name, parameter in network.named_parameters():
            if name in self.values:
                parameter.copy_(self.values[name])


def local(parameter: torch.Tensor) -> torch.Tensor:
    """This process's part of a parameter, without its gradient."""
    parameter = parameter.detach()
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def whole(parameter: torch.Tensor) -> torch.Tensor:
    """All of a parameter; of a sharded one every process has to ask."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def ranks() -> tuple[int, int]:
    """This process's number and how many there are: 0 and 1 unless torch.distributed runs."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@dataclasses.dataclass(frozen=True)
class Length:
    """How long a training lasts: `steps`, or `seconds` of training, whichever ends first; one may be None."""

    steps: int | None = None
    seconds: float | None = None

    def progress(self, step: int, seconds: float) -> float:
        """The share that is done, from 0 to 1."""
        limits = ((step, self.steps), (seconds, self.seconds))
        shares = [done / limit if limit > 0 else 1.0 for done, limit in limits if limit is not None]
        return min(1.0, max(shares, default=0.0))


@dataclasses.dataclass(frozen=True)
class Rate:
    """The learning rate: a linear rise over `warmup` steps, constant, a linear fall over the last `fall` of the
    training (a share), to a hundredth of the peak.

    Constant in between, so that a run can be prolonged, or ended early, without having been planned so.
    """

    peak: float
    warmup: int
    fall: float = 0.4

    def at(self, step: int, progress: float) -> float:
        rising = min(1.0, (step + 1) / self.warmup)
        falling = min(1.0, (1 - progress) / self.fall)
        return self.peak * rising * max(falling, 0.01)


class Trainer:
    """A network in training: one optimiser step at a time, logged, averaged and kept.

    With several processes (torch.distributed) each has one, the first writes, and all follow the first one's clock.

    Args:
        network: float32; what requires gradients is trained.
        rate: the learning rate.
        length: of the training.
        folder: for `<name>-state.pt`, which a later run goes on from, and `<name>-log.jsonl`.
        name: of the network, in files.
        decay: of the averaged weights.
        save_every: seconds between saves.
        log_every: steps between lines of the log.
        origin: what the state belongs to.

    Attributes:
        on_save: called after every save.
        on_trouble: called after the loss ran away.
    """

    def __init__(
        self,
        network: nn.Module,
        rate: Rate,
        length: Length,
        folder: Path,
        name: str,
        decay: float = 0.999,
        save_every: float = 60.0,
        log_every: int = 200,
        origin: Origin | None = None,
    ):
        self.network, self.rate, self.length, self.folder, self.name = network, rate, length, folder, name
        self.save_every, self.log_every, self.origin = save_every, log_every, origin or {}
        learning = [p for p in network.parameters() if p.requires_grad]
        matrices, others = [p for p in learning if p.dim() > 1], [p for p in learning if p.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=rate.peak, betas=(0.9, 0.98), eps=1e-8, fused=True)
        self.averaged = AveragedWeights(network, decay)
        self.step = 0
        self.seconds = 0.0
        self.samples = 0
        self.slower = 1.0  # factor of this peak's rate, smaller after a loss that ran away
        self.best = math.inf
        self._sums: dict[str, tuple[torch.Tensor, int]] = {}
        self._logged = (0.0, 0)
        self.on_save: Callable[[], None] = lambda: None
        self.on_trouble: Callable[[], None] = lambda: None
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def state_file(self) -> Path:
        return self.folder / f"{self.name}-state.pt"

    @property
    def progress(self) -> float:
        return self.length.progress(self.step, self.seconds)

    def resume(self) -> bool:
        """Goes on from the folder's state, if there is one; at its slower rate where the peak is the same.

        Raises:
            InputError: a state of another network or origin, or one of weights that ran away.
        """
        if not self.state_file.is_file():
            return False
        state = load_state(self.state_file, self.origin)
        try:
            set_state_dict(
                self.network,
                self.optimizer,
                model_state_dict=state["network"],
                optim_state_dict=state["optimizer"],
                options=StateDictOptions(full_state_dict=True),
            )
        except (RuntimeError, ValueError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(
                f"{self.state_file} belongs to another network ({reason}); choose another output folder"
            ) from error
        for name, value in state["averaged"].items():
            kept = self.averaged.values[name]
            if isinstance(kept, DTensor):
                value = distribute_tensor(value.to(kept.device), kept.device_mesh, kept.placements)
            kept.copy_(value)
        self.step, self.seconds, self.samples = state["step"], state["seconds"], state["samples"]
        self.best = min(self.best, state.get("best", math.inf))  # earlier states have none
        if state.get("peak") == self.rate.peak:
            self.slower = min(self.slower, state["slower"])
        self._logged = (self.seconds, self.samples)
        return True

    def save(self) -> None:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        network, optimizer = get_state_dict(self.network, self.optimizer, options=options)
        averaged = {name: whole(value).cpu() for name, value in self.averaged.values.items()}
        if ranks()[0]:
            return
        state = {
            "network": network,
            "averaged": averaged,
            "optimizer": optimizer,
            "step": self.step,
            "seconds": self.seconds,
            "samples": self.samples,
            "best": self.best,
            "slower": self.slower,
            "peak": self.rate.peak,
        }
        save_state(state, self.origin, self.state_file)

    def steps(self) -> Iterator[int]:
        """The steps that are left, with progress; saves now and then and at the end, interrupted or not.

        What ran away is never saved: training goes back to the state on disk, at half the rate.
        """
        before, saved, began = self.seconds, self.seconds, time.monotonic()
        if not self.step:
            self.save()
        hidden = ranks()[0] > 0
        bar = tqdm(
            total=self.length.steps, initial=self.step, desc=self.name, unit="step", mininterval=10.0, disable=hidden
        )
        try:
            while self.progress < 1:
                yield self.step
                self.seconds = self._common(before + time.monotonic() - began)
                bar.update()
                over = self.progress >= 1
                if not over and self.seconds - saved <= self.save_every:
                    continue
                means = self._means()
                if not self._sound(means):
                    self._go_back(means)
                elif not over:
                    self.save()
                    self.on_save()
                    saved = self.seconds
        except BaseException:
            # Others would wait for this one, which they do not know to have stopped.
            if ranks()[1] == 1 and self._sound(self._means()):
                self.save()
            raise
        finally:
            bar.close()
        self.save()
        self.on_save()

    def _common(self, seconds: float) -> float:
        """The first process's clock, asked for now and then, so that all do the same in the same step."""
        if ranks()[1] > 1 and self.step % CLOCK_EVERY and self.step > CLOCK_EVERY:
            return self.seconds
        return self.of_the_first(seconds)

    def of_the_first(self, value: float) -> float:
        """The first process's value, in all of them."""
        if ranks()[1] == 1:
            return value
        shared = torch.tensor([value], dtype=torch.float64, device=local(next(self.network.parameters())).device)
        dist.broadcast(shared, 0)
        return float(shared)

    def update(
        self,
        loss: torch.Tensor,
        samples: int = 0,
        before_step: Callable[[], None] | None = None,
        **logged: torch.Tensor,
    ) -> None:
        """One optimiser step down a loss; logs the means of the loss and of `logged` now and then.

        `before_step` is called between gradients and step.
        """
        rate = self.rate.at(self.step, self.progress) * self.slower
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss.backward()
        if before_step is not None:
            before_step()
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.averaged.update(self.network, self.step)
        for key, amount in {"loss": loss, "gradient": norm, **logged}.items():
            total, count = self._sums.get(key, (0.0, 0))
            self._sums[key] = total + whole(amount.detach()).float(), count + 1
        self.step += 1
        self.samples += samples
        if self.step % self.log_every == 0 or self.step == EARLY or self.progress >= 1:
            self._log_means(rate)

    def _means(self) -> dict[str, float]:
        """The means since the last line, and the weights' norm, of all processes."""
        weights = nn.utils.get_total_norm([local(p) for p in self.network.parameters() if p.requires_grad])
        means = torch.stack([*(total / count for total, count in self._sums.values()), weights.float()])
        if ranks()[1] > 1:
            dist.all_reduce(means)
            means /= ranks()[1]
        return dict(zip([*self._sums, "weights"], means.tolist(), strict=True))

    def _sound(self, means: dict[str, float]) -> bool:
        """Whether training did not run away: a single step may be of a kind whose loss is always higher."""
        loss, steps = means.get("loss", 0.0), self._sums.get("loss", (0.0, 0))[1]
        bound = DIVERGED * self.best if steps >= min(EARLY, self.log_every) else math.inf
        return loss < bound and math.isfinite(means["weights"])

    def _go_back(self, means: dict[str, float]) -> None:
        """To the state on disk, at half the rate; what ran away stays unsound where that is the end."""
        self.slower /= 2
        loss = means.get("loss", math.nan)
        if self.slower < SLOWEST or not self.resume():
            raise InputError(f"{self.name}: training ran away, the loss is {loss:.7g}; lower the rate")
        self._sums = {}
        print(f"warning: {self.name}: loss {loss:.7g}; back to step {self.step} at half the rate", flush=True)
        self.on_trouble()

    def _log_means(self, rate: float) -> None:
        means = self._means()
        if not self._sound(means):
            self._go_back(means)
            return
        values, self._sums = {key: round(means[key], 7) for key in self._sums}, {}
        self.best = min(self.best, values["loss"])
        seconds, samples = self.seconds - self._logged[0], self.samples - self._logged[1]
        self._logged = (self.seconds, self.samples)
        speed = {"samples": self.samples, "samples/s": round(samples / seconds)} if samples and seconds > 0 else {}
        now = {"rate": rate, **speed, "seconds": round(self.seconds, 1)}
        self.log({"network": self.name, "step": self.step, **values, **now})

    def log(self, record: dict[str, Any]) -> None:
        add_line(record, self.folder / f"{self.name}-log.jsonl")


def autocast(device: torch.device | str) -> contextlib.AbstractContextManager:
    """bfloat16 where it is fast: on a GPU, and on a processor with AMX; float32 elsewhere."""
    kind = torch.device(device).type
    enabled = kind == "cuda" or (kind == "cpu" and torch.cpu._is_amx_tile_supported())
    return torch.autocast(kind, torch.bfloat16, enabled=enabled)
