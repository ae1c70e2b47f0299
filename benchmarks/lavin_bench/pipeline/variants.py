"""The rungs of the pipeline's waterfall: the same sampling, from the way the authors run it to the fastest one here."""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lavin_bench.pipeline import authors_way
from lavin_bench.pipeline.authors_way import AuthorsWay
from lavin_bench.pipeline.flops import speed_flops
from lavin_bench.pipeline.peers import Peer, Peers, peers_of
from lavin_bench.timing import resident_bytes
from lavin_rt.devices import DTYPES, fast_in_bfloat16
from lavin_rt.dit.config import PRESETS, DiTConfig
from lavin_rt.dit.layout import Shape
from lavin_rt.dit.model import JDiT
from lavin_rt.dit.prepacked import pays, prepack_
from lavin_rt.pictures import images
from lavin_rt.pipeline import Pipeline
from lavin_rt.sampling import sampler
from lavin_rt.sampling.denoisers import Denoiser, PackedNetwork
from lavin_rt.sampling.executor import Executor
from lavin_rt.sampling.speeds import SPEEDS, TASK
from lavin_rt.vae.config import VAEConfig
from lavin_rt.vae.model import STVAE

Sampling = Callable[[int], torch.Tensor]
"""`steps -> latents [1, 16, 1, h, w]`: one sampling, of which the first compiles and captures what there is."""

RELEASED, RELEASED_VAE = PRESETS["lavin-dit-3.4b"], VAEConfig()
CPU_CONFIG = DiTConfig(hidden_size=576, depth=6, num_heads=8, kv_group=4)
# Nine encodings and a decoding are 4.6 % of the small transformer's FLOPs at 128 px, as they are 3.6 % of the
# released one's at 512 px: a wider VAE would flatter whoever encodes the context once.
CPU_VAE = VAEConfig(block_out_channels=(32, 32, 64, 64), layers_per_block=1)
QUICK_CONFIG = DiTConfig(hidden_size=48, depth=2, num_heads=2, kv_group=2)
TWO_BLOCKS = dataclasses.replace(RELEASED, depth=2)
# What a CPU runs, by the names that a child process is told.
CPU_CONFIGS = {"small": CPU_CONFIG, "quick": QUICK_CONFIG, "full": TWO_BLOCKS}
GUIDANCE = 1.5

AUTHORS_EAGER, AUTHORS_COMPILED = "authors' way, eager", "authors' way, compiled"


@torch.no_grad()
def random_model(config: DiTConfig, device: torch.device, dtype: torch.dtype = torch.float32, seed: int = 0) -> JDiT:
    """A model of random weights in `dtype`, none zero, activations at unit scale.

    Made on the device, one parameter at a time in float32. As after loading a checkpoint, the modulation linears are
    not on it: `modulation_source` has them in the host's memory, in `dtype`.
    """
    with torch.device("meta"):
        dit = JDiT(config)
    for block in dit.blocks:
        block.modulation.drop()
    dit = dit.to(dtype).to_empty(device=device).requires_grad_(False).eval()
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in dit.named_parameters():
        norm = name.endswith(("_norm", "embedder.1.weight"))
        std = 0.1 if norm or parameter.dim() == 1 or name.endswith("_embed") else parameter.shape[-1] ** -0.5
        parameter.copy_(torch.empty(parameter.shape, device=device).normal_(float(norm), std, generator=generator))
    hidden, linears = config.hidden_size, []
    for _ in range(config.depth):
        weight = torch.randn(2, 4 * hidden, hidden, device=device, generator=generator) * hidden**-0.5
        bias = torch.randn(2, 4 * hidden, device=device, generator=generator) * 0.1
        linears.append((weight.to("cpu", dtype), bias.to("cpu", dtype)))
    dit.modulation_source = lambda index, *place: tuple(part.to(*place) for part in linears[index])
    return dit


@torch.no_grad()
def random_vae(config: VAEConfig, device: torch.device, dtype: torch.dtype = torch.float32, seed: int = 0) -> STVAE:
    """A float32 VAE of random weights that `dtype` holds exactly, at unit scale."""
    with torch.device("meta"):
        vae = STVAE(config)
    vae = vae.to_empty(device=device).requires_grad_(False).eval()
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in vae.named_parameters():
        norm = "norm" in name and name.endswith("weight") and parameter.dim() == 1
        std = parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.1
        parameter.normal_(float(norm), std, generator=generator)
        parameter.copy_(parameter.to(dtype))
    return vae


@contextlib.contextmanager
def in_float32(dit: JDiT) -> Iterator[None]:
    """The model computes in float32 meanwhile, attention and MLP of a block converted when their turn comes: 4.9 GB of
    the released weights in 16 bits grow by a half gigabyte instead of as much again.
    """
    dtype = dit.dtype
    turns = [part for block in dit.blocks for part in (block.attention, block.mlp)] if dtype != torch.float32 else []

    def widen(part: torch.nn.Module, arguments: object) -> None:
        part.float()

    def narrow(part: torch.nn.Module, arguments: object, results: object) -> None:
        part.to(dtype)

    hooks = [part.register_forward_pre_hook(widen) for part in turns]
    hooks += [part.register_forward_hook(narrow) for part in turns]
    for part in (dit.cond_embedder, dit.x_embedder, dit.time_embedder, dit.head):
        part.float()
    for embed in (dit.prompt_embed, dit.answer_embed):
        embed.data = embed.data.float()
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        dit.to(dtype)


@dataclasses.dataclass(frozen=True)
class Setting:
    """One row of the matrix: a square picture and a number of pairs, guided, one query."""

    size: int
    pairs: int
    config: DiTConfig = RELEASED
    vae: VAEConfig = RELEASED_VAE

    @property
    def name(self) -> str:
        return f"{self.size} px, {self.pairs} pair{'s' * (self.pairs > 1)}"

    @property
    def shape(self) -> Shape:
        latent = self.size // 8
        return Shape(1, 2 * self.pairs + 1, 1, 1, latent, latent, guided=True)

    @property
    def useful_flops(self) -> int:
        """Of one step; the same for all variants, whatever they spare or pad."""
        return authors_way.useful_flops(self.config, self.shape.frame_tokens, self.shape.condition_frames)

    def flops(self, speed: str, steps: int) -> int:
        """Of a whole sampling at a speed, counted alike; `steps` are the knots of a speed without a grid."""
        chosen = SPEEDS[speed]
        knots = chosen.knots(None if chosen.owns_grid else steps)
        return speed_flops(self.config, self.shape, chosen, len(knots) - 1)

    def latents(self, device: torch.device, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """A random condition and noise, the same on every device."""
        generator, shape = torch.Generator().manual_seed(seed), self.shape
        frames = torch.randn(1, 16, shape.cond_frames + 1, shape.height, shape.width, generator=generator).to(device)
        return frames[:, :, :-1].contiguous(), frames[:, :, -1:].contiguous()


@dataclasses.dataclass(frozen=True)
class Variant:
    """One rung.

    Attributes:
        make: gets everything ready that outlives a query of a task, and returns the sampling of the next query.
        modulates: whether the modulation linears, 28 % of the parameters, have to be in the device's memory.
        speed: a name in `lavin_rt.SPEEDS`; all but `exact` are further from the truth than rounding, on purpose.
        dtype: that it computes in, where that is another one than the run's.
        peer: whether another engine runs the network.
    """

    make: Callable[[], Sampling]
    modulates: bool
    speed: str = "exact"
    dtype: torch.dtype | None = None
    peer: bool = False


class Baselines:
    """The authors' way over a model, eager and compiled; each is made once, as a compilation takes minutes."""

    def __init__(self, dit: JDiT, vae: STVAE | None = None):
        self.dit, self.vae = dit, vae
        self._made: dict[bool, AuthorsWay] = {}

    def way(self, compile: bool, steps: int | None = None) -> AuthorsWay:
        if compile not in self._made:
            self._made[compile] = AuthorsWay(self.dit, self.vae, compile=compile, guidance=GUIDANCE)
        if steps is not None:
            self._made[compile].knots = authors_way.knots(steps)
        return self._made[compile]


def variants(
    dit: JDiT, setting: Setting, baselines: Baselines, shared: bool = True, peers: Peers | None = None
) -> dict[str, Variant]:
    """The rungs that the model's device has, in the order of the waterfall; `shared` where several are to run.

    Each starts from an encoded context and an encoded query and ends with the target's latents; ours keep between two
    queries of a task what a task keeps.
    """
    cond, noise = setting.latents(dit.device)

    def authors(compile: bool, of: Callable[[], Baselines] = lambda: baselines, **more: Any) -> Variant:
        def make() -> Sampling:
            of().way(compile)
            return lambda steps: of().way(compile, steps).sample(cond, noise)

        return Variant(make, modulates=True, **more)

    def ours(network: Callable[[], Denoiser], graphs: bool = False, speed: str = "exact", **more: Any) -> Variant:
        chosen = SPEEDS[speed]
        shape = dataclasses.replace(setting.shape, kept=chosen.keeps)

        def make() -> Sampling:
            executor = Executor(network(), graphs=graphs)
            context, keys = executor.embed(cond[:, :, :-1]), None
            if chosen.refresh == TASK:
                keys = executor.context_keys(dataclasses.replace(shape, guided=False), context)

            def sample(steps: int) -> torch.Tensor:
                query = executor.embed(cond[:, :, -1:])
                knots = chosen.knots(None if chosen.owns_grid else steps)
                return executor.sample(shape, context, query, noise, knots, GUIDANCE, None, chosen, keys)

            return sample

        return Variant(make, modulates=False, speed=speed, **more)

    laid_out = functools.cache(partial(as_loaded, dit, shared))
    found = {
        AUTHORS_EAGER: authors(compile=False),
        AUTHORS_COMPILED: authors(compile=True),
        "exact savings": ours(lambda: PackedNetwork(dit, "torch")),
    }
    cuda = dit.device.type == "cuda"
    if cuda:
        found["Triton kernels"] = ours(lambda: PackedNetwork(dit, "triton"))
        found["CUDA graphs"] = ours(lambda: PackedNetwork(dit, "triton"), graphs=True)
    else:
        if pays(dit):
            found["savings, prepacked"] = ours(lambda: PackedNetwork(laid_out(), "torch"))
        found["savings, compiled"] = ours(lambda: PackedNetwork(laid_out(), "torch", compile=True))
    for speed in SPEEDS:
        if speed != "exact":
            name = f"{'CUDA graphs' if cuda else 'savings, compiled'}, {speed}"
            if cuda:
                found[name] = ours(lambda: PackedNetwork(dit, "triton"), graphs=True, speed=speed)
            else:
                found[name] = ours(lambda: PackedNetwork(laid_out(), "torch", compile=True), speed=speed)
    if peers is None:
        return found

    def engine(made: Peers, peer: Peer) -> Denoiser:
        return made.pipeline(peer).network

    half = torch.bfloat16
    if dit.dtype == torch.float32 and fast_in_bfloat16(dit.device):
        halved = functools.cache(lambda: as_loaded(copy.deepcopy(dit).to(half), shared=False))
        theirs = functools.cache(lambda: Baselines(copy.deepcopy(dit).to(half)))
        found[f"{AUTHORS_COMPILED}, bfloat16"] = authors(True, theirs, dtype=half)
        found["savings, bfloat16"] = ours(lambda: PackedNetwork(halved(), "torch"), dtype=half)
        found["savings, compiled, bfloat16"] = ours(lambda: PackedNetwork(halved(), "torch", compile=True), dtype=half)
        for name, peer in peers_of(half).items():
            found[f"{name}, bfloat16"] = ours(partial(engine, peers, peer), dtype=half, peer=True)
    for name, peer in peers_of(dit.dtype).items():
        found[name] = ours(partial(engine, peers, peer), peer=True)
    return found


def as_loaded(dit: JDiT, shared: bool = True) -> JDiT:
    """The model as a pipeline that is loaded by path has it; a copy where others use it as it is."""
    return prepack_(copy.deepcopy(dit) if shared else dit) if pays(dit) else dit


def task_pixels(setting: Setting) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], torch.Tensor, torch.Tensor]:
    """Random pictures `[H, W, 3]` uint8: a context's pairs, an earlier query of its task, and a query."""
    generator = torch.Generator().manual_seed(1)
    shape = (2 * setting.pairs + 2, setting.size, setting.size, 3)
    *context, earlier, query = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return list(zip(context[::2], context[1::2], strict=True)), earlier, query


@torch.no_grad()
def oracles(dit: JDiT, vae: STVAE, setting: Setting, steps: int, whole: bool) -> list[torch.Tensor]:
    """The plain model's latents of what `variants` and, where `whole`, `whole_calls` do, in float32."""
    with in_float32(dit):
        return _oracles(dit, vae, setting, steps, whole)


def _oracles(dit: JDiT, vae: STVAE, setting: Setting, steps: int, whole: bool) -> list[torch.Tensor]:
    sampled = sampler.sample(dit, *setting.latents(dit.device), steps, GUIDANCE, "plain").cpu()
    context, _, query = task_pixels(setting)
    if not whole:
        return [sampled]
    noise = setting.latents(torch.device("cpu"))[1]
    # float32 means float32, also where cuDNN would rather have fewer bits.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        task = Pipeline(dit, vae, impl="plain").task(context, size=setting.size)
        [result] = task.run([query], steps=steps, guidance=GUIDANCE, noise=noise)
    return [sampled, result.latents]


def whole_calls(
    dit: JDiT, vae: STVAE, setting: Setting, baselines: Baselines, peers: Peers | None = None
) -> dict[str, Variant]:
    """Whole calls from a query's pixels to its answer's, at the second query of a task; a call's `frames` are its
    last answer.
    """
    context, earlier, query = task_pixels(setting)
    noise = setting.latents(torch.device("cpu"))[1]

    def authors(compile: bool) -> Variant:
        def make() -> Sampling:
            baselines.way(compile)
            shown = torch.stack([picture for pair in context for picture in pair])

            def answer(steps: int) -> torch.Tensor:
                pairs, asked = (images.to_pixels(pictures.permute(0, 3, 1, 2)) for pictures in (shown, query[None]))
                latents, answered = baselines.way(compile, steps).answer(pairs, asked, noise)
                call.frames = images.from_pixels(answered).cpu()
                return latents

            call: Any = answer
            return call

        return Variant(make, modulates=True)

    def ours(pipeline: Callable[[], Pipeline], peer: bool = False) -> Variant:
        def make() -> Sampling:
            pipe = pipeline()
            task = pipe.task(context, size=setting.size)
            task(earlier, guidance=GUIDANCE)

            def answer(steps: int) -> torch.Tensor:
                [result] = task.run([query], steps=steps, guidance=GUIDANCE, noise=noise)
                call.frames, call.image = result.frames, result.image  # a call ends with a PIL image
                return result.latents

            call: Any = answer
            return call

        return Variant(make, modulates=False, peer=peer)

    laid_out = functools.cache(partial(as_loaded, dit))
    eager = ours(lambda: Pipeline(laid_out(), vae))
    compiled = ours(lambda: Pipeline(laid_out(), vae, compile=True))
    found = {AUTHORS_EAGER: authors(compile=False), AUTHORS_COMPILED: authors(compile=True)}
    if dit.device.type == "cuda":
        return found | {"task(query)": eager}
    found |= {"task(query), eager": eager, "task(query), compiled": compiled}
    if peers is not None:
        for name, peer in peers_of(dit.dtype).items():
            found[name] = ours(partial(peers.pipeline, peer), peer=True)
    return found


def weights_bytes(dit: JDiT, modulates: bool) -> int:
    """Memory of the weights that a variant needs."""
    modulation = 2 * 4 * dit.config.hidden_size * (dit.config.hidden_size + 1) * dit.config.depth
    elements = sum(parameter.numel() for parameter in dit.parameters()) + modulates * modulation
    return elements * dit.dtype.itemsize


def main() -> None:
    """Prints the peak memory of one variant on a CPU, in bytes beyond all weights: what a fresh process can tell."""
    parser = argparse.ArgumentParser(prog="lavin_bench.pipeline.variants", description=main.__doc__)
    parser.add_argument("variant")
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--pairs", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--config", choices=CPU_CONFIGS, required=True)
    parser.add_argument("--dtype", choices=DTYPES, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    setting = Setting(options.size, options.pairs, CPU_CONFIGS[options.config])
    dit = random_model(setting.config, torch.device("cpu"), DTYPES[options.dtype])
    variant = variants(dit, setting, Baselines(dit), shared=False)[options.variant]
    before = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM counts from here on
    sample = variant.make()
    sample(options.steps)
    sample(options.steps)
    print(resident_bytes("VmHWM") - before)


if __name__ == "__main__":
    main()
