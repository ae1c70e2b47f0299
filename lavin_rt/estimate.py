"""What the published model takes on this machine, in bytes and seconds, from a probe of its parts and before any
download.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from lavin_rt.devices import memory_at_hand
from lavin_rt.dit.config import PRESETS, DiTConfig
from lavin_rt.dit.layout import Shape
from lavin_rt.dit.model import JDiT
from lavin_rt.dit.packed import resolve_impl
from lavin_rt.sampling.allocator import Allocator, Modelled
from lavin_rt.sampling.denoisers import PackedNetwork, PlainNetwork, make_network
from lavin_rt.sampling.schedule import schedule
from lavin_rt.vae.config import VAEConfig
from lavin_rt.vae.model import STVAE

RELEASED = PRESETS["lavin-dit-3.4b"]
PROBE = 128  # pixels a side at most; what is larger is reckoned from there
STORED = 2  # bytes of a published weight
META = torch.device("meta")
Net = TypeVar("Net", bound=nn.Module)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bytes and seconds.

    Attributes:
        download: of the checkpoint's files.
        memory: the most that weights, a step and the decoder take at once; `at_hand`, what there is.
        context: encoding the pairs, once a task. prepare: the modulation of a schedule, once a schedule.
        query: one picture. evaluation: of the network, of which a query takes `evaluations`.
    """

    download: int
    memory: int
    at_hand: int
    context: float
    prepare: float
    query: float
    evaluation: float
    evaluations: int


@torch.no_grad()
def estimate(
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
    impl: str = "auto",
    steps: int = 20,
    config: DiTConfig = RELEASED,
    vae_config: VAEConfig | None = None,
) -> Estimate:
    """Runs a block of the transformer, its attention alone, and the autoencoder on a picture, and reckons with them.

    Args:
        shape: of a query's sampling, of pictures.
        device, dtype, impl: what it would run with.
        steps: knots of the published schedule.
        config, vae_config: of the networks; the published ones by default.
    """
    vae_config = VAEConfig() if vae_config is None else vae_config
    weights, modulation, coder = parameters(config, vae_config)
    evaluations = len(schedule(steps)) - 1
    head, block, prepare = _transformer(config, shape, device, dtype, impl, steps)
    workspace = _step_bytes(config, shape, device, dtype, resolve_impl(impl, device, config))
    encode, decode = _autoencoder(vae_config, shape, device, dtype)
    evaluation = head + (config.depth - 1) * block
    used = max(workspace, _decoder_bytes(vae_config, shape, dtype))
    return Estimate(
        download=STORED * (weights + coder),
        memory=(weights - modulation + coder) * dtype.itemsize + used,
        at_hand=memory_at_hand(device),
        context=(shape.cond_frames - shape.query_frames) * encode,
        prepare=prepare * config.depth,
        query=encode + evaluations * evaluation + decode,
        evaluation=evaluation,
        evaluations=evaluations,
    )


def parameters(config: DiTConfig, vae_config: VAEConfig) -> tuple[int, int, int]:
    """Parameters of the transformer, of its modulation linears among them, and of the autoencoder."""
    with META:
        dit, vae = JDiT(config), STVAE(vae_config)
    parts = dit, nn.ModuleList(block.modulation for block in dit.blocks), vae
    dit_size, modulation, vae_size = (sum(parameter.numel() for parameter in part.parameters()) for part in parts)
    return dit_size, modulation, vae_size


def _transformer(
    config: DiTConfig, shape: Shape, device: torch.device, dtype: torch.dtype, impl: str, steps: int
) -> tuple[float, float, float]:
    """Seconds of an evaluation with one block, of each more block, and of one block's modulation of a schedule."""
    most = PROBE // 8
    probed = dataclasses.replace(shape, height=min(shape.height, most), width=min(shape.width, most))
    (head, first), (both, second) = (_blocks(depth, config, probed, device, dtype, impl, steps) for depth in (1, 2))
    block, prepare = max(both - head, 0.0), max(second - first, 0.0)
    if probed != shape:
        attention = _attention(config, probed, device, dtype)
        longer = shape.frame_tokens / probed.frame_tokens
        head, block = head * longer, max(block - attention, 0.0) * longer + attention * longer**2
    return head, block, prepare


def _blocks(
    depth: int, config: DiTConfig, shape: Shape, device: torch.device, dtype: torch.dtype, impl: str, steps: int
) -> tuple[float, float]:
    """Seconds of an evaluation of so many blocks, and of their modulation of a schedule."""
    dit = _filled(JDiT, dataclasses.replace(config, depth=depth), device, dtype)
    network = make_network(dit, impl)
    if isinstance(network, PackedNetwork):
        network.prepack()
    knots = schedule(steps)
    rows = [part[0] for part in network.table(knots)]
    step = network.step(shape)
    condition = step.buffers()
    latents = torch.zeros(
        shape.queries, config.in_channels, shape.target_frames, shape.height, shape.width, device=device
    )
    return _seconds(lambda: step(latents, condition, *rows), device), _seconds(lambda: network.table(knots), device)


def _attention(config: DiTConfig, shape: Shape, device: torch.device, dtype: torch.dtype) -> float:
    """Seconds of the attention of one block's branches."""
    seconds = 0.0
    for frames in shape.condition_frames:
        length = (frames + shape.target_frames) * shape.frame_tokens
        query = torch.zeros(1, config.num_heads, length, config.head_size, device=device, dtype=dtype)
        key = query[:, : config.num_kv_heads].contiguous()
        attend = partial(nn.functional.scaled_dot_product_attention, query, key, key, enable_gqa=True)
        seconds += _seconds(attend, device)
    return seconds


def _autoencoder(config: VAEConfig, shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Seconds of encoding and of decoding a picture."""
    vae = _filled(STVAE, config, device, dtype)
    height, width = (min(8 * side, PROBE) for side in (shape.height, shape.width))
    pixels = torch.zeros(1, 3, 1, height, width, device=device, dtype=dtype)
    latents = torch.zeros(1, config.latent_channels, 1, height // 8, width // 8, device=device, dtype=dtype)
    larger = 64 * shape.height * shape.width / (height * width)
    encode, decode = _seconds(lambda: vae.encode(pixels), device), _seconds(lambda: vae.decode(latents), device)
    return encode * larger, decode * larger


def _step_bytes(config: DiTConfig, shape: Shape, device: torch.device, dtype: torch.dtype, impl: str) -> int:
    """What a step takes at most, besides the weights; `impl` as it is on the device."""
    with META:
        dit = JDiT(dataclasses.replace(config, depth=1)).to(dtype)
    network = PlainNetwork(dit) if impl == "plain" else PackedNetwork(dit, impl)
    network.device = device  # what it takes there, told by a model that takes nothing
    return network.workspace(shape)


def _decoder_bytes(config: VAEConfig, shape: Shape, dtype: torch.dtype) -> int:
    """What decoding a picture takes at most, besides the weights."""
    allocator = Allocator()
    with META:
        vae = STVAE(config).to(dtype).requires_grad_(False)
        latents = torch.empty(1, config.latent_channels, 1, shape.height, shape.width, dtype=dtype)
    with Modelled(allocator):
        vae.decode(latents)
    return allocator.peak_allocated


def _filled(kind: Callable[[Any], Net], config: Any, device: torch.device, dtype: torch.dtype) -> Net:
    """A network with weights of no meaning."""
    with META:
        network = kind(config).to(dtype)
    network = network.to_empty(device=device).requires_grad_(False).eval()
    for tensor in (*network.parameters(), *network.buffers()):
        tensor.fill_(0.01)
    return network


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """The shorter of two runs."""
    found = []
    for _ in range(2):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - start)
    return min(found)
