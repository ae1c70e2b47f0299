"""Training of the small ST-VAE: a decoder for latents that an encoder of principal components writes."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from lavin_rt.checkpoint import save_vae
from lavin_rt.mini.corpus import Corpus, to_pixels
from lavin_rt.mini.principal import Components, component_latents, draw_pictures, start_from_components
from lavin_rt.mini.start import PATCH, TEACHING_STEPS, Synthesis, keep_past_taps, start_decoder, teach_templates
from lavin_rt.mini.tasks import CLIP_TASKS, PICTURE_TASKS
from lavin_rt.mini.training import Rate, Trainer
from lavin_rt.vae import STVAE, VAEConfig, unscale_latents

EDGE_WEIGHT = 0.5
TARGETS_SHARE = 0.8  # of the pictures; the rest are inputs, noise and rain among them, which are never decoded
CORNER_WEIGHT = 6.0  # of the two patches whose latents come at half their size (see `principal`)
CLIP_EVERY = 25  # steps; a clip costs as much as about fifteen pictures
COMPONENT_PICTURES = 1200
POSTERIOR_DEVIATION = 0.08  # of latents; a decoder that has seen some noise forgives the transformer's errors


def make_vae(config: VAEConfig, components: Components, seed: int, side: int, teaching: int = TEACHING_STEPS) -> STVAE:
    """A network to start from, of pictures of `side` x `side` latent pixels: its encoder is finished (see `principal`),
    its decoder does what can be done linearly (see `start`).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = STVAE(config)
    start_from_components(vae, components, POSTERIOR_DEVIATION)
    synthesis = Synthesis.of(components, config.block_out_channels[0] // 2)
    start_decoder(vae.decoder, synthesis)
    teach_templates(vae.decoder, synthesis, side, teaching)
    return vae


def make_components(corpus: Corpus, config: VAEConfig, seed: int) -> Components:
    pictures = draw_pictures(corpus, seed, COMPONENT_PICTURES)
    return Components.of(pictures, config.latent_channels, config.block_out_channels[1], seed)


def reconstruction_loss(result: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """L1 of pixels and of their differences to the right and below; `[N, 3, T, H, W]`."""
    weights = torch.ones(pixels.shape[-2:], device=pixels.device)
    weights[:PATCH, :PATCH] = weights[-PATCH:, -PATCH:] = CORNER_WEIGHT
    error = (result - pixels) * weights
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + EDGE_WEIGHT * edges


def draw_frames(corpus: Corpus, rng: np.random.Generator, batch: int, clip: bool = False) -> np.ndarray:
    """Inputs and targets of random tasks, colour channels now and then exchanged, uint8 `[batch, T, S, S, 3]`."""
    tasks, frames = CLIP_TASKS if clip else PICTURE_TASKS, []
    for _ in range(batch):
        pair = corpus.draw(tasks[rng.integers(len(tasks))], rng)
        picture = pair[int(rng.random() < TARGETS_SHARE)]
        frames.append(picture[..., rng.permutation(3)] if rng.random() < 0.3 else picture)
    return np.stack(frames)


def train_vae(
    corpus: Corpus,
    vae: STVAE,
    components: Components,
    output: str | os.PathLike,
    steps: int,
    batch: int = 4,
    peak: float = 5e-4,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> None:
    """Trains in `output`, going on from the state there if any, and writes `stvae.safetensors` (float16) there.

    The encoder stays as it is: latents are known from the first step on, and a transformer can be trained on them while
    the decoder still learns to show them better.

    Args:
        vae: of `make_vae`; its decoder is what is trained.
    """
    output = Path(output)
    decoder = vae.train().to(device).decoder
    trainer = Trainer(decoder, Rate(peak, steps, warmup=min(100, steps // 10 + 1)), output, "vae", decay=0.998)
    trainer.resume()
    finished = copy.deepcopy(vae)

    def write() -> None:
        trainer.averaged.copy_to(finished.decoder)
        save_vae(copy.deepcopy(finished).half(), output / "stvae.safetensors")

    trainer.on_save = write
    for step in trainer.steps():
        rng, generator = np.random.default_rng([seed, step]), torch.Generator().manual_seed(seed * 1_000_003 + step)
        clip = step % CLIP_EVERY == CLIP_EVERY - 1
        frames = draw_frames(corpus, rng, 1 if clip else batch, clip)
        latents, pixels = component_latents(components, frames), to_pixels(frames).to(device)
        latents = latents + POSTERIOR_DEVIATION * torch.randn(latents.shape, generator=generator)
        result = decoder(unscale_latents(latents.to(device)))
        squared = F.mse_loss(result.detach(), pixels, reduction="none").mean((1, 2, 3, 4))
        trainer.update(
            reconstruction_loss(result, pixels),
            before_step=None if clip else lambda: keep_past_taps(decoder),
            psnr=float((10 * torch.log10(4 / squared)).mean()),
        )
