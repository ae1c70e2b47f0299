"""Training of the small ST-VAE, encoder and decoder: LaVin-DiT (arXiv 2411.11505), section 3.2.

A batch is of pictures or, now and then, of clips. On single frames all time taps of a convolution see the same, and
would be moved alike, which blurs clips in time: pictures train the taps' sum alone, clips also how it is divided.
"""

from __future__ import annotations

import concurrent.futures
import copy
import dataclasses
import operator
import os
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrize

from lavin_rt.checkpoint.load import save_vae
from lavin_rt.errors import InputError, TooLittleMemory
from lavin_rt.mini.train.compiled import Compiled
from lavin_rt.mini.train.latents import to_device
from lavin_rt.mini.train.trainer import Length, Rate, Trainer, autocast
from lavin_rt.mini.world.pieces import CLIPS, PICTURES, Arrivals, Piece, PieceMaker
from lavin_rt.mini.world.sources import photograph_crop
from lavin_rt.vae.config import VAEConfig
from lavin_rt.vae.layers import CausalConv, SpatialNormSiLU
from lavin_rt.vae.model import LATENT_SCALE, STVAE

SQUARED_WEIGHT, ABSOLUTE_WEIGHT, EDGE_WEIGHT = 10.0, 0.5, 0.5
KL_WEIGHT = 0.004  # of the mean over a latent's elements
NOISE = 0.04  # of latents, besides the posterior's own: the decoder has to forgive the transformer's errors
PHOTOGRAPHS, PHOTOGRAPHS_SHARE = "photographs", 0.3
CLIP_EVERY, CLIPS_BEGIN = 8, 0.3  # steps between batches of clips, and when they begin (share of the training)
FEED_EVERY = 10  # steps between new pieces
CLIP_COST = 8  # a clip costs as much as so many pictures
TARGETS_A_TASK, INPUTS_A_TASK = 30, 10  # frames that the VAE takes of a task in a piece
LEAST_BATCH = 16  # which is not halved where memory is short
EVALUATION_PHOTOGRAPHS = 96


@dataclasses.dataclass(frozen=True)
class VAEPlan:
    """What a run of the VAE's training does.

    Attributes:
        steps, seconds: of the training, the sooner; None for no such limit.
        batch: pictures.
        peak: learning rate.
        capacity: frames kept on the device, of each kind.
        first_pieces: pieces that have to be there to begin with.
        seed: of everything.
    """

    steps: int | None
    seconds: float | None = None
    batch: int = 256
    peak: float = 1e-3
    capacity: int = 200_000
    first_pieces: int = 12
    seed: int = 0


@torch.no_grad()
def make_vae(config: VAEConfig, seed: int) -> STVAE:
    """A network to train: unit-preserving convolutions of the present frame, quiet residual branches, and norms of the
    decoder that begin as plain ones.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = STVAE(config)
    for module in vae.modules():
        if isinstance(module, CausalConv) and module.conv.weight.shape[2] > 1:
            module.conv.weight[:, :, -1] *= 3**0.5
            module.conv.weight[:, :, :-1] = 0  # frames begin as pictures do
        if isinstance(module, SpatialNormSiLU):
            for conv, bias in ((module.conv_y.conv, 1.0), (module.conv_b.conv, 0.0)):
                conv.weight *= 0.3
                assert conv.bias is not None
                conv.bias.fill_(bias)
    for level in (*vae.encoder.down_blocks, vae.encoder.mid_block, *vae.decoder.up_blocks, vae.decoder.mid_block):
        for block in level.resnets:
            block.conv2.conv.weight *= 0.3
    channels = config.latent_channels
    vae.encoder.conv_out.conv.weight[channels:] *= 0.1
    assert vae.encoder.conv_out.conv.bias is not None
    vae.encoder.conv_out.conv.bias[channels:] = -4.0
    return vae


class Taps(nn.Module):
    """A causal convolution's weight `[O, I, 3, k, k]` as the sum over its time taps, which is all that a picture sees,
    and the taps of the past: pictures train the one, and the other can change without changing pictures.
    """

    def forward(self, total: torch.Tensor, past: torch.Tensor) -> torch.Tensor:
        return torch.cat([past, (total - past.sum(2)).unsqueeze(2)], dim=2)

    def right_inverse(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return weight.sum(2), weight[:, :, :-1].clone()


def part_taps_(vae: STVAE) -> STVAE:
    """Puts every causal convolution's weight in that form. Returns the network."""
    for module in vae.modules():
        if isinstance(module, CausalConv) and module.conv.weight.shape[2] > 1:
            parametrize.register_parametrization(module.conv, "weight", Taps())
    return vae


@torch.no_grad()
def whole_taps(vae: STVAE) -> STVAE:
    """A plain copy of such a network."""
    plain = STVAE(vae.config).to(next(vae.parameters()).device)
    for name, parameter in plain.named_parameters():
        parameter.copy_(operator.attrgetter(name)(vae))
    return plain


def reconstruction_loss(result: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """L2 and L1 of pixels, and L1 of their differences to the right and below; `[N, 3, T, H, W]`."""
    error = result.float() - pixels
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return SQUARED_WEIGHT * error.square().mean() + ABSOLUTE_WEIGHT * error.abs().mean() + EDGE_WEIGHT * edges


def vae_loss(vae: STVAE, pixels: torch.Tensor, noise: torch.Tensor, extra: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The loss, and for the log the KL divergence and the squared error by item `[N]`.

    `noise` and `extra` are unit Gaussians like the latents: the posterior's, and what the decoder gets besides.
    """
    moments = vae.encoder(pixels).float()
    mean, logvar = moments.chunk(2, dim=1)
    logvar = logvar.clamp(-30.0, 20.0)
    latents = mean + torch.exp(0.5 * logvar) * noise + NOISE * extra
    result = vae.decoder(latents)
    divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    loss = reconstruction_loss(result, pixels) + KL_WEIGHT * divergence
    squared = (result.detach().float() - pixels).square().mean((1, 2, 3, 4))
    return loss, divergence, squared


class FrameStore:
    """uint8 frames on the device, more of them as pieces arrive; when it is full, new ones replace random old ones."""

    def __init__(self, capacity: int, device: torch.device, seed: int):
        self.capacity, self.device, self.rng = capacity, device, np.random.default_rng([seed, 17])
        self.frames: dict[str, torch.Tensor] = {}
        self.filled: dict[str, int] = {}

    def add(self, kind: str, frames: np.ndarray) -> None:
        if not len(frames):
            return
        if kind not in self.frames:
            capacity = self.capacity if kind != CLIPS else max(1, self.capacity // 20)
            self.frames[kind] = torch.zeros(capacity, *frames.shape[1:], dtype=torch.uint8, device=self.device)
            self.filled[kind] = 0
        store, filled = self.frames[kind], self.filled[kind]
        free = min(len(store) - filled, len(frames))
        places = [*range(filled, filled + free), *self.rng.integers(0, len(store), len(frames) - free)]
        store[torch.tensor(places, device=self.device)] = torch.from_numpy(frames).to(self.device)
        self.filled[kind] = filled + free

    def add_piece(self, kind: str, piece: Piece) -> None:
        """Some inputs and more targets of every task."""
        chosen = []
        for rows in piece.rows.values():
            for column, count in ((0, INPUTS_A_TASK), (1, TARGETS_A_TASK)):
                chosen.append(self.rng.permutation(np.unique(rows[..., column]))[:count])
        self.add(kind, piece.frames[np.concatenate(chosen)])
        self.add(PHOTOGRAPHS, piece.photographs[:, None])

    def draw(self, kind: str, count: int, generator: torch.Generator) -> torch.Tensor:
        """`[count, 3, T, S, S]` float32 in [-1, 1]."""
        at = torch.rand(count, generator=generator, device=self.device, dtype=torch.float64) * self.filled[kind]
        return to_device(self.frames[kind][at.long()], self.device)


def augmented(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Pictures `[N, 3, 1, S, S]` mirrored, turned upside down or transposed, with channels exchanged, a third of them
    in other contrast or inverted.
    """

    def chance(share: float) -> torch.Tensor:
        draws = torch.rand(len(pixels), generator=generator, device=pixels.device)
        return (draws < share)[:, None, None, None, None]

    pixels = torch.where(chance(0.5), pixels.flip(-1), pixels)
    pixels = torch.where(chance(0.15), pixels.flip(-2), pixels)
    pixels = torch.where(chance(0.15), pixels.transpose(-1, -2), pixels)
    order = torch.rand(len(pixels), 3, generator=generator, device=pixels.device).argsort(1)
    exchanged = pixels.gather(1, order[:, :, None, None, None].expand_as(pixels))
    pixels = torch.where(chance(0.3), exchanged, pixels)
    draws = torch.rand(2, len(pixels), 1, 1, 1, 1, generator=generator, device=pixels.device)
    contrast = (pixels * (0.5 + draws[0]) + 0.6 * (draws[1] - 0.5)).clamp(-1, 1)
    pixels = torch.where(chance(0.3), contrast, pixels)
    return torch.where(chance(0.1), -pixels, pixels)


@torch.no_grad()
def scale_to_unit_(vae: STVAE, deviation: float) -> STVAE:
    """Folds a factor into the weights, after which latents whose root mean square was `deviation` come out with one
    that `scale_latents` makes 1, and the decoder shows them as before. Returns the network.
    """
    factor, channels = 1 / (LATENT_SCALE * max(deviation, 1e-3)), vae.config.latent_channels
    out = vae.encoder.conv_out.conv
    assert out.bias is not None
    out.weight[:channels] *= factor
    out.bias[:channels] *= factor
    out.bias[channels:] += 2 * float(np.log(factor))
    reading = [vae.decoder.conv_in.conv]
    for module in vae.decoder.modules():
        if isinstance(module, SpatialNormSiLU):
            reading += [module.conv_y.conv, module.conv_b.conv]
    for conv in reading:
        conv.weight /= factor
    return vae


@torch.no_grad()
def reconstruction_psnr(vae: STVAE, pixels: torch.Tensor) -> float:
    """Mean PSNR in dB of pictures `[N, 3, T, S, S]` in [-1, 1], as decoded from the posterior's mean."""
    means = vae.encoder(pixels)[:, : vae.config.latent_channels]
    squared = (vae.decoder(means).clamp(-1, 1) - pixels).square().mean((1, 2, 3, 4))
    return float((10 * torch.log10(4 / squared)).mean())


def held_out(size: int, device: torch.device, seed: int) -> torch.Tensor:
    """Crops of photographs that training never sees, `[N, 3, 1, S, S]`."""
    rng = np.random.default_rng([seed, 23])
    crops = [photograph_crop("evaluation", rng, size) for _ in range(EVALUATION_PHOTOGRAPHS)]
    return to_device(torch.from_numpy(np.stack(crops)[:, None]), device)


def train_vae(
    maker: PieceMaker,
    config: VAEConfig,
    size: int,
    output: str | os.PathLike,
    plan: VAEPlan,
    device: torch.device,
    compile: bool,
    patience: float = 600.0,
    start: STVAE | None = None,
) -> None:
    """Trains in `output`, going on from the state there if any, and writes `stvae.safetensors` (float16) there.

    `start` is a float32 network to begin with, in the place of one of `config` from nothing.

    Raises:
        InputError: the state there has another origin, training ran away, or there are no pictures.
        TooLittleMemory: the smallest batch does not fit.
    """
    output = Path(output)
    rate = Rate(plan.peak, warmup=200) if start is None else Rate(plan.peak / 2, warmup=100, fall=0.8)
    begun = "none" if start is None else start.fingerprint
    origin = {"seed": str(plan.seed), "VAE to begin with": begun, "size": f"{size} px"}
    vae = part_taps_(make_vae(config, plan.seed) if start is None else start).train().requires_grad_().to(device)
    channels = config.latent_channels
    network = Compiled(vae, vae_loss, enabled=compile)
    length = Length(plan.steps, plan.seconds)
    trainer = Trainer(vae, rate, length, output, "vae", decay=0.998, save_every=45, origin=origin)
    trainer.resume()
    latent = channels, 1, size // 8, size // 8
    network.warm_up(*[torch.zeros(plan.batch, *rest, device=device) for rest in ((3, 1, size, size), latent, latent)])
    store, photographs = FrameStore(plan.capacity, device, plan.seed), held_out(size, device, plan.seed)
    arriving = maker.arriving(patience)
    _take(store, maker, arriving, plan.first_pieces)
    while not (PICTURES in store.frames and CLIPS in store.frames) and _take(store, maker, arriving, 1):
        pass
    if PICTURES not in store.frames:
        raise InputError(f"{maker.folder}: no pieces with pictures; see the warnings above")
    averaged, batch = copy.deepcopy(vae), plan.batch

    def write() -> None:
        trainer.averaged.copy_to(averaged)
        finished = whole_taps(averaged)
        generator = torch.Generator(device).manual_seed(plan.seed)
        some = store.draw(PICTURES, 256, generator)
        with torch.no_grad():
            deviation = float(finished.encoder(some)[:, :channels].square().mean().sqrt())
        figures = {
            "psnr": reconstruction_psnr(finished, some),
            "photographs": reconstruction_psnr(finished, photographs),
        }
        trainer.log({"network": "vae", "step": trainer.step, "deviation": deviation, **figures})
        save_vae(scale_to_unit_(finished, deviation).half(), output / "stvae.safetensors")

    trainer.on_save = write
    torch.backends.cudnn.benchmark = device.type == "cuda"
    trainer.log({"network": "vae", "from": trainer.step, "plan": dataclasses.asdict(plan), "config": str(config)})
    generator, coming = torch.Generator(device), None
    reader = concurrent.futures.ThreadPoolExecutor(1)
    for step in trainer.steps():
        if step % FEED_EVERY == 0:
            coming = _feed(store, maker, arriving, coming, reader)
        generator.manual_seed(plan.seed * 1_000_003 + step)
        clip = CLIPS in store.frames and step % CLIP_EVERY == 0 and trainer.progress > CLIPS_BEGIN
        if clip:
            pixels = store.draw(CLIPS, max(1, batch // CLIP_COST), generator)
        else:
            of_photographs = max(1, round(batch * PHOTOGRAPHS_SHARE))
            drawn = [store.draw(PHOTOGRAPHS, of_photographs, generator)]
            drawn.append(store.draw(PICTURES, batch - of_photographs, generator))
            pixels = augmented(torch.cat(drawn), generator)
        shape = len(pixels), channels, 1 + (pixels.shape[2] - 1) // 4, size // 8, size // 8
        noises = [torch.randn(shape, generator=generator, device=device) for _ in range(2)]
        try:
            with autocast(device):
                loss, divergence, squared = network(pixels, *noises)
            psnr = (10 * torch.log10(4 / squared)).mean()
            figures = {"psnr of clips": psnr} if clip else {"psnr": psnr}
            trainer.update(loss, len(pixels), None, divergence=divergence, **figures)
        except torch.OutOfMemoryError as error:
            loss = divergence = squared = None
            trainer.optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            if batch <= LEAST_BATCH:
                raise TooLittleMemory(
                    f"out of memory in batches of {batch} pictures; free some of the device's"
                ) from error
            batch = max(LEAST_BATCH, batch // 2)
            print(f"warning: out of memory; batches of {batch} from now on", flush=True)

    torch.backends.cudnn.benchmark = False  # the shapes that follow differ
    reader.shutdown()


def _feed(
    store: FrameStore,
    maker: PieceMaker,
    arriving: Arrivals,
    coming: tuple[Path, concurrent.futures.Future] | None,
    reader: concurrent.futures.ThreadPoolExecutor,
) -> tuple[Path, concurrent.futures.Future] | None:
    """Puts a piece that was read in the background into the store, and has the next one read."""
    if coming is not None:
        path, future = coming
        if not future.done():
            return coming
        if future.result() is not None:
            store.add_piece(maker.kind(path), future.result())
    following = arriving.next(wait=False)
    return None if following is None else (following, reader.submit(Piece.load, following))


def _take(store: FrameStore, maker: PieceMaker, arriving: Arrivals, count: int) -> int:
    """Puts the next pieces into the store, and says how many."""
    taken = 0
    while taken < count and (path := arriving.next()) is not None:
        piece = Piece.load(path)
        if piece is not None:
            store.add_piece(maker.kind(path), piece)
            taken += 1
    return taken
