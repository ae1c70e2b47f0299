"""What both trainings share: averaged weights, the learning rate, a log, and a state to go on from."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from lavin_rt.errors import InputError
from lavin_rt.files import written_whole


class AveragedWeights:
    """An exponential moving average of a network's parameters, float32, young at first: its memory grows with the
    steps taken, up to `1 / (1 - decay)`.
    """

    def __init__(self, network: nn.Module, decay: float):
        self.decay = decay
        self.values = {name: p.detach().clone() for name, p in network.named_parameters()}

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        values = [self.values[name] for name, _ in network.named_parameters()]
        torch._foreach_lerp_(values, [p.detach() for p in network.parameters()], 1 - decay)

    @torch.no_grad()
    def copy_to(self, network: nn.Module) -> None:
        for name, parameter in network.named_parameters():
            parameter.copy_(self.values[name])


@dataclasses.dataclass(frozen=True)
class Rate:
    """The learning rate: a linear rise over `warmup` steps, constant, a linear fall over the last `fall` of `steps`
    (a share), to a hundredth of the peak.

    Constant in between, so that a run can be prolonged, or ended early, without having been planned so.
    """

    peak: float
    steps: int
    warmup: int
    fall: float = 0.3

    def at(self, step: int) -> float:
        rising = min(1.0, (step + 1) / self.warmup)
        falling = min(1.0, (self.steps - step) / max(1, round(self.fall * self.steps)))
        return self.peak * rising * max(falling, 0.01)


class Trainer:
    """A network in training: one optimiser step at a time, logged, averaged and kept.

    Args:
        network: float32, its parameters requiring gradients.
        rate: the learning rate.
        folder: for `<name>-state.pt`, which a later run goes on from, and `<name>-log.jsonl`.
        name: of the network, in files.
        decay: of the averaged weights.
        save_every: seconds between saves.
    """

    def __init__(
        self, network: nn.Module, rate: Rate, folder: Path, name: str, decay: float = 0.999, save_every: float = 120.0
    ):
        self.network, self.rate, self.folder, self.name, self.save_every = network, rate, folder, name, save_every
        matrices = [p for p in network.parameters() if p.dim() > 1]
        others = [p for p in network.parameters() if p.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=rate.peak, betas=(0.9, 0.98), eps=1e-8, fused=True)
        self.averaged = AveragedWeights(network, decay)
        self.step = 0
        self.seconds = 0.0
        self.log_every = min(50, max(1, rate.steps // 10))
        self._sums: dict[str, float] = {}
        self._count = 0
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def state_file(self) -> Path:
        return self.folder / f"{self.name}-state.pt"

    def resume(self) -> bool:
        """Goes on from the folder's state, if there is one.

        Raises:
            InputError: a state of another network.
        """
        if not self.state_file.is_file():
            return False
        state = torch.load(self.state_file, map_location="cpu", weights_only=True)
        try:
            self.network.load_state_dict(state["network"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(
                f"{self.state_file} belongs to another network ({reason}); choose another output folder"
            ) from error
        for name, value in state["averaged"].items():
            self.averaged.values[name].copy_(value)
        self.step, self.seconds = state["step"], state["seconds"]
        return True

    def save(self) -> None:
        state = {
            "network": self.network.state_dict(),
            "averaged": self.averaged.values,
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
        }
        with written_whole(self.state_file) as partial:
            torch.save(state, partial)

    def steps(self) -> Iterator[int]:
        """The steps that are left, with progress; saves now and then and at the end, interrupted or not."""
        saved = began = time.monotonic()
        before = self.seconds
        bar = tqdm(total=self.rate.steps, initial=self.step, desc=self.name, unit="step", mininterval=2.0)
        try:
            while self.step < self.rate.steps:
                yield self.step
                self.seconds = before + time.monotonic() - began
                bar.update()
                if time.monotonic() - saved > self.save_every:
                    self.save()
                    self.on_save()
                    saved = time.monotonic()
        finally:
            bar.close()
            self.save()
        self.on_save()

    def on_save(self) -> None:
        """Called after every save; may be replaced."""

    def update(self, loss: torch.Tensor, before_step: Callable[[], None] | None = None, **logged: float) -> None:
        """One optimiser step down a loss; logs the means of the loss and `logged` every 50 steps, or every
        tenth of a shorter run.

        `before_step` is called between gradients and step.

        Raises:
            InputError: the loss is no longer a finite number.
        """
        value = float(loss.detach())
        if not value < float("inf"):
            raise InputError(f"{self.name}: the loss became {value} in step {self.step}; lower the learning rate")
        rate = self.rate.at(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss.backward()
        if before_step is not None:
            before_step()
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.averaged.update(self.network, self.step)
        for key, amount in {"loss": value, "gradient": float(norm), **logged}.items():
            self._sums[key] = self._sums.get(key, 0.0) + amount
        self._count += 1
        self.step += 1
        if self.step % self.log_every == 0 or self.step == self.rate.steps:
            means = {key: round(total / self._count, 5) for key, total in self._sums.items()}
            self.log({"network": self.name, "step": self.step, **means, "rate": rate, "seconds": round(self.seconds)})
            self._sums, self._count = {}, 0

    def log(self, record: dict[str, Any]) -> None:
        with open(self.folder / f"{self.name}-log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
