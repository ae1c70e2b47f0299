"""Training of lavin-mini: losses fall, a stopped run goes on as if it had not stopped, and what is written loads."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("embreex", reason="needs the extra train")
pytest.importorskip("trimesh", reason="needs the extra train")

from lavin_rt.checkpoint import find_checkpoint, load_dit, load_vae
from lavin_rt.config import DiTConfig
from lavin_rt.errors import InputError
from lavin_rt.mini import train_vae
from lavin_rt.mini.corpus import Corpus, to_pixels
from lavin_rt.mini.latents import LatentPool, TaskLatents, encode_pictures
from lavin_rt.mini.principal import Components, component_latents, patch_synthesis
from lavin_rt.mini.start import Synthesis, teach_templates
from lavin_rt.mini.tasks import TASKS
from lavin_rt.mini.train import PRESETS, main
from lavin_rt.mini.train_dit import Plan, draw_batch, flow_loss, initialise_, train_dit
from lavin_rt.mini.training import Rate
from lavin_rt.model import JDiT
from lavin_rt.vae import STVAE, scale_latents, unscale_latents

SMALL = DiTConfig(hidden_size=36, depth=1, num_heads=1, kv_group=1)


def records(folder: Path, network: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{network}-log.jsonl").read_text().splitlines()]


def random_pool(frames: int = 1) -> LatentPool:
    """Pairs of two tasks; targets are the negated input by the first variant, twice the input by the second."""
    inputs = torch.randn(20, 16, frames, 4, 4, generator=torch.Generator().manual_seed(0))
    rows = torch.arange(20)[:, None] + torch.tensor([[[0, 20]], [[0, 40]]])
    tasks = tuple(TaskLatents(name, rows[:, i::2]) for i, name in enumerate(("depth_estimation", "denoising")))
    return LatentPool(torch.cat([inputs, -inputs, 2 * inputs]).half(), tasks)


@pytest.mark.slow
def test_the_short_preset_brings_the_loss_down(tmp_path):
    """The transformer's by a factor of 1.3 within a minute; the folder is then a checkpoint, its VAE shows pictures."""
    arguments = ["--preset", "tiny", "--output", tmp_path / "run", "--cache", tmp_path / "cache", "--no-compile"]
    assert main([str(a) for a in [*arguments, "--device", "cpu"]]) == 0
    losses = [record["loss"] for record in records(tmp_path / "run", "dit") if "loss" in record]
    assert losses[-1] < losses[0] / 1.3, losses
    found = find_checkpoint(tmp_path / "run")
    dit, vae = load_dit(found.dit, strict=True), load_vae(found.vae, strict=True)
    assert dit.config == PRESETS["tiny"].dit and dit.dtype == vae.dtype == torch.float16
    vae = vae.float()
    pixels = to_pixels(Corpus.make("template", 32, 8, 1).scenes.colour)
    assert F.mse_loss(vae(pixels), pixels) < 0.5 * pixels.var()


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    plan = Plan(steps=12, batch=4, pairs=(0.5, 0.5))
    pools = random_pool(), random_pool(2)
    once = train_dit(*pools, SMALL, whole, plan, compile=False)

    class Stop(Exception):
        pass

    counted = 0

    def stopping(*arguments):
        nonlocal counted
        counted += 1
        if counted == 6:
            raise Stop
        return flow_loss(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lavin_rt.mini.train_dit.flow_loss", stopping)
        with pytest.raises(Stop):
            train_dit(*pools, SMALL, parts, plan, compile=False)
    again = train_dit(*pools, SMALL, parts, plan, compile=False)
    for (name, a), b in zip(once.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_warm_start_begins_where_the_weights_are(tmp_path):
    start = initialise_(JDiT(SMALL), seed=3)
    with torch.no_grad():
        for parameter in start.parameters():
            parameter.add_(0.01)
    before = [parameter.detach().clone() for parameter in start.parameters()]
    warm = train_dit(
        random_pool(), random_pool(2), SMALL, tmp_path, Plan(steps=1, peak=1e-5), compile=False, warm_start=start
    )
    for parameter, old in zip(warm.parameters(), before, strict=True):
        assert (parameter - old).abs().max() < 1e-4


def test_a_state_of_another_network_is_refused(tmp_path):
    plan = Plan(steps=1, batch=2)
    train_dit(random_pool(), random_pool(2), SMALL, tmp_path, plan, compile=False)
    wider = dataclasses.replace(SMALL, hidden_size=72)
    with pytest.raises(InputError, match=r"dit-state.pt belongs to another network .*; choose another output folder"):
        train_dit(random_pool(), random_pool(2), wider, tmp_path, plan, compile=False)


def test_a_batch_is_contexts_of_one_task_and_one_variant_each():
    pool = random_pool()
    cond, data = draw_batch(pool, pairs=2, batch=32, generator=torch.Generator().manual_seed(0))
    assert cond.shape == (32, 16, 5, 4, 4) and data.shape == (32, 16, 1, 4, 4)
    of_task = [{tuple(pool.latents[i].flatten()[:4].tolist()) for i in task.rows[0, :, 0]} for task in pool.tasks]
    seen = set()
    for item in range(32):
        inputs = {tuple(cond[item, :, frame].unsqueeze(1).flatten()[:4].half().tolist()) for frame in (0, 2, 4)}
        task = [inputs <= known for known in of_task].index(True)
        factor = next(f for f in (-1, 2) if torch.equal(data[item, :, 0], f * cond[item, :, 4]))
        assert torch.equal(cond[item, :, 1:4:2], factor * cond[item, :, 0:4:2])
        seen.add((task, factor))
    assert len(seen) == 4


def test_every_variant_of_a_target_is_encoded():
    corpus, task = Corpus.make("template", 32, 8, 1), dataclasses.replace(TASKS["negative"], source="scene")
    vae = STVAE(PRESETS["tiny"].vae).eval()
    pool = encode_pictures(corpus, vae, [task], photographs=0, degraded=0)
    [found] = pool.tasks
    assert found.rows.shape == (2, 8, 2)
    assert torch.equal(found.rows[0, :, 0], found.rows[1, :, 0])
    rng = np.random.default_rng([0, 2])
    mirrored = [bool(rng.random() < 0.5) for _ in range(8)]
    pairs = np.stack([task.make(corpus.still(i, turned), rng) for i, turned in enumerate(mirrored)])
    for rows, vary in zip(found.rows, task.variants, strict=True):
        for column, pictures in enumerate((pairs[:, 0], vary(pairs[:, 1]))):
            expected = scale_latents(vae.encode(to_pixels(pictures[:, None])).mode())
            assert (pool.latents[rows[:, column]] - expected).norm() < 1e-3 * expected.norm()


def test_the_loss_is_that_of_the_flow():
    """Of a network that predicts zero: the mean square of `data - noise`."""
    dit = initialise_(JDiT(SMALL), seed=0)  # begins with a velocity of zero
    cond, data = draw_batch(random_pool(), 1, 64, torch.Generator().manual_seed(1))
    loss = flow_loss(dit, cond, data, torch.Generator().manual_seed(2))
    noise = torch.randn(data.shape, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(loss, (data - noise).square().mean())


def test_the_encoder_computes_the_principal_components():
    """Of pictures and of clips, as the direct computation does, and with unit variance of the scaled latents."""
    corpus = Corpus.make("template", 64, 6, 1)
    config = PRESETS["mini"].vae
    components = train_vae.make_components(corpus, config, seed=0)
    vae = train_vae.make_vae(config, components, seed=0, side=8, teaching=0).requires_grad_(False)
    for clip in (False, True):
        frames = train_vae.draw_frames(corpus, np.random.default_rng(0), 3, clip)
        latents = scale_latents(vae.encode(to_pixels(frames)).mean)
        direct = component_latents(components, frames)
        assert latents.shape == direct.shape == (3, 16, 2 if clip else 1, 8, 8)
        assert (latents - direct).norm() / direct.norm() < 1e-3
    pictures = train_vae.draw_frames(corpus, np.random.default_rng(1), 64)
    assert float(component_latents(components, pictures).square().mean()) == pytest.approx(1, rel=0.3)


@pytest.fixture(scope="module")
def components() -> Components:
    """Of smooth random pictures."""
    coarse = torch.rand(40, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    pictures = F.interpolate(coarse, (64, 64), mode="bicubic").clamp(0, 1).permute(0, 2, 3, 1)
    return Components.of((pictures * 255).to(torch.uint8).numpy(), channels=16, kept=32)


def test_patches_are_sums_of_products(components):
    synthesis, patches = Synthesis.of(components, terms=16), patch_synthesis(components)
    sums = torch.einsum("pj,cj,jk->pck", synthesis.templates, synthesis.colours, synthesis.factors) + synthesis.means
    error = ((sums - patches) * components.gains).square().sum() / (patches * components.gains).square().sum()
    assert error < 0.02


def test_a_decoder_that_knows_its_templates_puts_patches_together(components):
    """With the templates given to the last norm, what it shows is the linear inverse, but for the two corners that are
    lost and the products' small error.
    """
    config = PRESETS["mini"].vae
    vae = train_vae.make_vae(config, components, seed=0, side=8, teaching=0).requires_grad_(False)
    synthesis = Synthesis.of(components, terms=16)
    templates = synthesis.templates.T.view(1, 16, 1, 8, 8).repeat(1, 1, 1, 8, 8).repeat_interleave(2, dim=1)
    vae.decoder.norm_out.register_forward_pre_hook(lambda _, inputs: (templates, inputs[1]))
    latents = torch.randn(1, 16, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    shown = vae.decoder(unscale_latents(latents * components.gains[:, None, None, None]))
    patches = torch.einsum(
        "pck,ktrs->rpsc", patch_synthesis(components), latents[0] * components.gains[:, None, None, None]
    )
    expected = patches.unflatten(1, (8, 8)).permute(4, 0, 1, 3, 2).reshape(3, 64, 64)
    assert (shown[0, :, 0] - expected).square().mean() < 0.02 * expected.square().mean()


def test_templates_can_be_taught_on_no_picture(components):
    vae = train_vae.make_vae(PRESETS["mini"].vae, components, seed=0, side=4, teaching=0)
    assert (
        teach_templates(vae.decoder, Synthesis.of(components, terms=16), side=4, steps=60) < 0.1
    )  # of a variance of 1


def test_the_learning_rate_rises_stays_and_falls():
    rate = Rate(peak=1.0, steps=100, warmup=10, fall=0.2)
    assert rate.at(0) == pytest.approx(0.1) and rate.at(9) == rate.at(50) == rate.at(80) == 1
    assert rate.at(90) == pytest.approx(0.5) and rate.at(99) == pytest.approx(0.05)
