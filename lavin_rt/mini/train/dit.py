"""Training of the small J-DiT: conditional flow matching on random contexts (LaVin-DiT, arXiv 2411.11505, 3.3)."""

from __future__ import annotations

import copy
import dataclasses
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F

from lavin_rt.checkpoint.load import save_dit
from lavin_rt.dit.config import DiTConfig
from lavin_rt.dit.model import GATE_MLP, GATE_MSA, JDiT
from lavin_rt.dit.prepacked import parameter_samples
from lavin_rt.errors import TooLittleMemory
from lavin_rt.mini.train.compiled import Compiled
from lavin_rt.mini.train.latents import LatentPool
from lavin_rt.mini.train.sharded import TrainedDiT, adapt_, load_trained_, merged, shard_
from lavin_rt.mini.train.states import Origin
from lavin_rt.mini.train.trainer import Length, Rate, Trainer, autocast, ranks
from lavin_rt.sampling.sampler import null_condition
from lavin_rt.vae.model import vae_fingerprint

NULL_SHARE = 0.1
# Times are sigmoid(N(mean, deviation)): rather early ones, where the result must come from the condition. Nine of
# the sampler's twenty knots lie below 0.05, where a mean of 0 and a deviation of 1 would put 0.2 % of the samples.
TIME_MEAN, TIME_DEVIATION = -0.8, 1.2
GATE_START = 0.3  # before tanh: all layers learn from the first step on
PATCH = 8  # pixels a side of a latent pixel
LEAST_TOKENS = 2048  # of a step, which are not halved where memory is short
COMPILE_SECONDS = 110.0  # for all shapes together; those that are left run as they are


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run of the transformer's training does.

    Attributes:
        steps, seconds: of the training, the sooner; None for no such limit.
        tokens: of a step, condition and target.
        peak: learning rate.
        warmup: steps of its rise.
        decay: of the averaged weights.
        pairs: shares of 1, 2, 3, ... pairs at first, and at the end.
        clip_pairs: the same of clips' contexts, all along.
        clips: share of steps that train clips.
        families: share of samples that are mappings to be read off the pairs.
        repeat: share of contexts whose query is one of the pairs.
        seed: of everything.
    """

    steps: int | None
    seconds: float | None = None
    tokens: int = 131_072
    peak: float = 1e-3
    warmup: int = 400
    decay: float = 0.9985
    pairs: tuple[tuple[float, ...], tuple[float, ...]] = ((0.3, 0.3, 0.0, 0.4, 0.0), (0.15, 0.2, 0.05, 0.5, 0.1))
    clip_pairs: tuple[float, ...] = (0.35, 0.3, 0.0, 0.35)
    clips: float = 0.1
    families: float = 0.45
    repeat: float = 0.04
    log_every: int = 200
    seed: int = 0


@torch.no_grad()
def initialise_(dit: JDiT, seed: int) -> JDiT:
    """Weights to start training from: unit-preserving linears, open gates, a velocity of zero. Returns the model."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in dit.named_parameters():
        if name.endswith(("_norm", "embedder.1.weight")):
            parameter.fill_(1)
        elif name.endswith("_embed"):
            parameter.normal_(0, 0.02, generator=generator)
        elif name.endswith("bias") or "modulation" in name or name == "head.linear.weight":
            parameter.zero_()
        else:
            parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
    for block in dit.blocks:
        assert block.modulation.bias is not None
        gates = block.modulation.bias.view(2, 4, -1)
        gates[:, [GATE_MSA, GATE_MLP]] = GATE_START
    return dit


def flow_loss(dit: JDiT, cond: torch.Tensor, data: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The squared error of the velocity at times `t` `[B]`, the mean of every sample: `[B]`."""
    at = t[:, None, None, None, None]
    velocity = dit(at * data + (1 - at) * noise, t, cond)
    return F.mse_loss(velocity.float(), data - noise, reduction="none").mean((1, 2, 3, 4))


def task_shares(pool: LatentPool, weights: Mapping[str, float], families: float) -> list[float]:
    """The tasks' shares of the samples: mappings (tasks of several members) have `families` of them together."""
    groups: dict[bool, float] = {}
    for task in pool.tasks:
        groups[len(task.rows) > 1] = groups.get(len(task.rows) > 1, 0.0) + weights[task.name]
    part = {True: families, False: 1 - families} if len(groups) == 2 else dict.fromkeys(groups, 1.0)
    return [weights[task.name] / groups[len(task.rows) > 1] * part[len(task.rows) > 1] for task in pool.tasks]


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """A kind of batch: `pairs` 0 is the null condition."""

    clips: bool
    pairs: int

    def batch(self, tokens: int, frames: int, side: int) -> int:
        """Samples of about so many tokens, as many for every process; `frames` of a query and `side` of its latents."""
        of_sample = (frames * (2 * self.pairs + 2) if self.pairs else 1 + 2 * frames) * (side // 2) ** 2
        world = ranks()[1]
        return max(world, (tokens // of_sample // 8 * 8 or tokens // of_sample) // world * world)


def chances(plan: Plan, clips: bool, progress: float) -> list[float]:
    """Of 1, 2, 3, ... pairs in contexts of clips or of pictures."""
    if clips:
        return list(plan.clip_pairs)
    first, last = plan.pairs
    return [a + (b - a) * progress for a, b in zip(first, last, strict=True)]


def shapes_of(plan: Plan) -> list[BatchShape]:
    """All that can come, the most frequent first."""
    found: dict[BatchShape, float] = {}
    for clips, share in ((False, 1 - plan.clips), (True, plan.clips)):
        of_pairs = [NULL_SHARE, *chances(plan, clips, 0.5)]
        found |= {BatchShape(clips, pairs): share * chance for pairs, chance in enumerate(of_pairs)}
    return sorted((shape for shape, chance in found.items() if chance > 0), key=lambda shape: -found[shape])


class Contexts:
    """Random batches of both pools, one of which may be missing; `weights` are the tasks' shares within a pool, and
    `origin` says what the latents are of. A context has fewer pairs than the smallest task of its pool, as the query's
    own would be among them: but for the plan's share of `repeat`, and but for tasks of a single pair.
    """

    def __init__(
        self,
        pictures: LatentPool | None,
        clips: LatentPool | None,
        weights: Mapping[str, float],
        plan: Plan,
        origin: Origin | None = None,
    ):
        self.plan, self.origin = plan, origin or {}
        self.pools: dict[bool, LatentPool] = {}
        self.pools |= {kind: pool for kind, pool in ((False, pictures), (True, clips)) if pool is not None}
        self.edges = {}
        for kind, pool in self.pools.items():
            sums = torch.tensor(task_shares(pool, weights, plan.families)).cumsum(0)
            self.edges[kind] = (sums / sums[-1]).to(pool.latents.device)
        self.most = {
            kind: max(1, min(task.rows.shape[1] for task in pool.tasks) - 1) for kind, pool in self.pools.items()
        }
        self.names = [task.name for pool in self.pools.values() for task in pool.tasks]
        self.first_clip = len(pictures.tasks) if pictures is not None else 0

    def shape(self, generator: torch.Generator, progress: float) -> BatchShape:
        """A random one; `generator` is the processor's."""
        kind, null = torch.rand(2, generator=generator).tolist()
        clips = False not in self.pools or (True in self.pools and kind < self.plan.clips)
        if null < NULL_SHARE:
            return BatchShape(clips, 0)
        pairs = int(torch.tensor(chances(self.plan, clips, progress)).multinomial(1, generator=generator)) + 1
        return BatchShape(clips, min(pairs, self.most[clips]))

    def shapes(self) -> list[BatchShape]:
        """All that can come, about the most frequent first."""
        there = (shape for shape in shapes_of(self.plan) if shape.clips in self.pools)
        return list(dict.fromkeys(BatchShape(shape.clips, min(shape.pairs, self.most[shape.clips])) for shape in there))

    def sizes(self, shape: BatchShape, tokens: int) -> tuple[int, int, int]:
        """Batch, latent frames of a query, and side of its latents."""
        frames, side = (self.pools[shape.clips].latents.shape[i] for i in (2, 3))
        return shape.batch(tokens, frames, side), frames, side

    def draw(self, shape: BatchShape, tokens: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        """Conditions, targets, noise, times and the samples' tasks (places in `names`), all on the device."""
        pool = self.pools[shape.clips]
        batch, frames, _ = self.sizes(shape, tokens)
        cond, data, tasks = pool.draw(self.edges[shape.clips], max(1, shape.pairs), batch, generator, self.plan.repeat)
        if not shape.pairs:
            cond = null_condition(cond, query_frames=frames)
        noise = torch.randn(data.shape, generator=generator, device=data.device)
        times = torch.randn(batch, generator=generator, device=data.device) * TIME_DEVIATION + TIME_MEAN
        return cond, data, noise, times.sigmoid(), tasks + (self.first_clip if shape.clips else 0)


def compile_shapes(
    network: Compiled, shapes: list[tuple[int, int, int, int]], channels: int, device: torch.device, limit: float
) -> None:
    """Compiles for batches `(samples, condition frames, target frames, side)`, the first first, within a time."""
    spent = 0.0
    for batch, conds, frames, side in shapes:
        if not network.enabled:
            return
        if spent > limit:
            print(f"warning: {limit:.0f} s of compilation; other shapes run as they are", file=sys.stderr, flush=True)
            return
        cond, data, noise = (
            torch.zeros(batch, channels, t, side, side, device=device) for t in (conds, frames, frames)
        )
        seconds = network.warm_up(cond, data, noise, torch.zeros(batch, device=device))
        spent += seconds
        print(f"compiled for {batch} x {conds} + {frames} frames in {seconds:.1f} s", file=sys.stderr, flush=True)


class TransformerRun:
    """The transformer's training in two parts, as compilation need not wait for the latents.

    With several processes (torch.distributed) its parameters are sharded, and every batch is divided among them.

    Args:
        config: of the network.
        output: folder for the checkpoint, the log and the state.
        plan: what to do.
        device: of this process.
        compile: run the blocks through `torch.compile`.
        warm_start: weights to begin with.
        lora: rank of adapters that are trained in the place of all weights; 0 trains the weights.
        checkpointing: compute activations again in the backward pass.
    """

    def __init__(
        self,
        config: DiTConfig,
        output: str | os.PathLike,
        plan: Plan,
        device: torch.device | str = "cpu",
        compile: bool = True,
        warm_start: JDiT | None = None,
        lora: int = 0,
        checkpointing: bool = False,
    ):
        self.output, self.plan, self.device = Path(output), plan, torch.device(device)
        self.dit = initialise_(JDiT(config), plan.seed) if warm_start is None else warm_start.requires_grad_()
        start = "none"
        if warm_start is not None:
            start = vae_fingerprint({name: samples for name, _, samples in parameter_samples(warm_start)})
        self.origin = {"seed": str(plan.seed), "warm start": start, "LoRA rank": str(lora)}
        self.dit.train().to(self.device)
        if lora:
            adapt_(self.dit, lora, plan.seed)
        self.finished = copy.deepcopy(self.dit)
        network = TrainedDiT(self.dit, checkpointing)
        if ranks()[1] > 1:
            shard_(network)
        self.network = Compiled(network, flow_loss, compile, network.blocks)

    def compile(self, shapes: list[BatchShape], side: int, clip_frames: int = 2) -> None:
        """Compiles for batches of these shapes; `side` of the latents."""
        sizes = []
        for shape in shapes:
            frames = clip_frames if shape.clips else 1
            conds = frames * (2 * shape.pairs + 1) if shape.pairs else 1 + frames
            sizes.append((shape.batch(self.plan.tokens, frames, side) // ranks()[1], conds, frames, side))
        compile_shapes(self.network, sizes, self.dit.config.in_channels, self.device, COMPILE_SECONDS)

    def train(
        self,
        contexts: Contexts,
        seconds: float | None = None,
        on_save: Callable[[], None] = lambda: None,
    ) -> JDiT:
        """Trains, going on from the state in the folder if any, and writes `lavin_dit.safetensors` (float16) there,
        and `lavin_dit_raw.safetensors`, whose weights are not averaged, to go on from.

        Args:
            contexts: what to train on.
            seconds: of training from now on, in the place of the plan's.
            on_save: called after every save.

        Returns:
            The network with averaged weights, for inference.

        Raises:
            InputError: the state has another origin (see `load_state`), or training ran away.
        """
        plan, network, device = self.plan, cast("TrainedDiT", self.network.network), self.device
        warmup = min(plan.warmup, (plan.steps or 10 * plan.warmup) // 10 + 1)
        trainer = Trainer(
            network,
            Rate(plan.peak, warmup),
            Length(plan.steps, plan.seconds),
            self.output,
            "dit",
            plan.decay,
            log_every=plan.log_every,
            origin={**self.origin, **contexts.origin},
        )
        trainer.resume()
        if seconds is not None:
            trainer.length = Length(plan.steps, trainer.seconds + max(0.0, trainer.of_the_first(seconds)))
        tokens, (rank, world) = plan.tokens, ranks()
        size = PATCH * next(iter(contexts.pools.values())).latents.shape[-1]

        def write() -> None:
            for averaged, name in ((None, "lavin_dit_raw"), (trainer.averaged.values, "lavin_dit")):
                load_trained_(self.finished, network, averaged)
                if not rank:
                    save_dit(merged(self.finished).half(), self.output / f"{name}.safetensors", size)
            on_save()

        trainer.on_save = write
        trainer.on_trouble = self.network.stop
        trainer.log(
            {"network": "dit", "from": trainer.step, "plan": dataclasses.asdict(plan), "config": str(self.dit.config)}
        )
        generator, shaping = torch.Generator(device), torch.Generator()
        errors = torch.zeros(2, len(contexts.names), device=device)
        for step in trainer.steps():
            seed = plan.seed * 1_000_003 + step
            shape = contexts.shape(shaping.manual_seed(seed), trainer.progress)
            try:
                batch = contexts.draw(shape, tokens, generator.manual_seed(seed))
                cond, data, noise, t, tasks = (part[rank::world] for part in batch)
                with autocast(device):
                    losses = self.network(cond, data, noise, t)
                trainer.update(losses.mean(), len(batch[0]))
            except torch.OutOfMemoryError as error:
                losses = None
                trainer.optimizer.zero_grad(set_to_none=True)
                torch.cuda.empty_cache()
                if world > 1 or tokens < LEAST_TOKENS:  # of several processes this one alone knows of it
                    raise TooLittleMemory(
                        f"out of memory in a step of {tokens} tokens; give fewer --tokens, or --checkpointing"
                    ) from error
                tokens //= 2
                print(f"warning: out of memory; {tokens} tokens a step from now on", file=sys.stderr, flush=True)
                continue
            if shape.pairs:
                errors[0].index_add_(0, tasks, losses.detach().float())
                errors[1].index_add_(0, tasks, torch.ones_like(losses))
            if trainer.step % (5 * plan.log_every) == 0:
                means = (errors[0] / errors[1]).tolist()
                found = {name: round(mean, 4) for name, mean in zip(contexts.names, means, strict=True) if mean == mean}
                trainer.log({"network": "dit", "step": trainer.step, "losses": found})
                errors.zero_()
        load_trained_(self.finished, network, trainer.averaged.values)
        return merged(self.finished).requires_grad_(False).eval()
