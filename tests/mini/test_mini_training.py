"""The trainings of lavin-mini: pieces, pools of latents, losses, states to go on from."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support.mini_pools import SMALL, WEIGHTS, contexts, plan_of, random_pool

pytest.importorskip("embreex", reason="needs the extra train")

from lavin_rt.checkpoint.load import load_dit, load_vae
from lavin_rt.dit.model import JDiT
from lavin_rt.errors import InputError, TooLittleMemory
from lavin_rt.find.model import find_checkpoint
from lavin_rt.mini.train import dit as train_dit
from lavin_rt.mini.train import latents
from lavin_rt.mini.train import vae as train_vae_module
from lavin_rt.mini.train.__main__ import Stages, main
from lavin_rt.mini.train.compiled import Compiled
from lavin_rt.mini.train.dit import BatchShape, Plan, TransformerRun, flow_loss, initialise_, shapes_of, task_shares
from lavin_rt.mini.train.latents import LatentPool, TaskLatents, encode, encode_pieces, to_device
from lavin_rt.mini.train.presets import PRESETS
from lavin_rt.mini.train.trainer import Length, Rate, Trainer
from lavin_rt.mini.train.vae import make_vae, part_taps_, scale_to_unit_, train_vae, vae_loss, whole_taps
from lavin_rt.mini.world.pieces import CLIPS, PICTURES, Amounts, Arrivals, Piece, make_piece
from lavin_rt.mini.world.tasks import TASKS
from lavin_rt.vae.config import VAEConfig
from lavin_rt.vae.model import STVAE, scale_latents

SHORT = dataclasses.replace(plan_of(12), tokens=64, log_every=200)


def records(folder: Path, network: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{network}-log.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_the_short_preset_brings_the_loss_down(tmp_path):
    """The transformer's by a fifth within a minute; the folder is then a checkpoint."""
    arguments = ["--preset", "tiny", "--output", tmp_path / "run", "--cache", tmp_path / "cache", "--device", "cpu"]
    assert main([str(a) for a in arguments]) == 0
    losses = [record["loss"] for record in records(tmp_path / "run", "dit") if "loss" in record]
    assert losses[-1] < losses[0] / 1.2, losses
    found = find_checkpoint(tmp_path / "run")
    dit, vae = load_dit(found.dit, strict=True), load_vae(found.vae, strict=True)
    assert dit.config == PRESETS["tiny"].dit and dit.dtype == vae.dtype == torch.float16


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(tmp_path, monkeypatch):
    once = TransformerRun(SMALL, tmp_path / "whole", SHORT, compile=False).train(contexts(SHORT))

    class Stop(Exception):
        pass

    counted = 0

    def stopping(*arguments):
        nonlocal counted
        counted += 1
        if counted == 6:
            raise Stop
        return flow_loss(*arguments)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(train_dit, "flow_loss", stopping)
        TransformerRun(SMALL, tmp_path / "parts", SHORT, compile=False).train(contexts(SHORT))
    again = TransformerRun(SMALL, tmp_path / "parts", SHORT, compile=False).train(contexts(SHORT))
    for (name, a), b in zip(once.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_warm_start_begins_where_the_weights_are(tmp_path):
    start = initialise_(JDiT(SMALL), seed=3)
    with torch.no_grad():
        for parameter in start.parameters():
            parameter.add_(0.01)
    before = [parameter.detach().clone() for parameter in start.parameters()]
    plan = dataclasses.replace(SHORT, steps=1, peak=1e-5)
    warm = TransformerRun(SMALL, tmp_path, plan, compile=False, warm_start=start).train(contexts(SHORT))
    for parameter, old in zip(warm.parameters(), before, strict=True):
        assert (parameter - old).abs().max() < 1e-4


def test_a_state_of_another_network_is_refused(tmp_path):
    plan = dataclasses.replace(SHORT, steps=1)
    TransformerRun(SMALL, tmp_path, plan, compile=False).train(contexts(SHORT))
    wider = dataclasses.replace(SMALL, hidden_size=72)
    with pytest.raises(InputError, match=r"dit-state.pt belongs to another network .*; choose another output folder"):
        TransformerRun(wider, tmp_path, plan, compile=False).train(contexts(SHORT))


@pytest.mark.parametrize("content", [b"", b"yesterday", b"nan", b"\xff\xfe"])
def test_a_damaged_time_of_the_start_is_said(content, tmp_path):
    (tmp_path / "started").write_bytes(content)
    with pytest.raises(InputError, match="started is damaged; expected the seconds of the first start; delete it"):
        Stages(tmp_path, 10)


def test_a_run_without_time_saves_what_it_has(tmp_path):
    TransformerRun(SMALL, tmp_path, SHORT, compile=False).train(contexts(SHORT), seconds=0)
    assert load_dit(tmp_path / "lavin_dit.safetensors").config == SMALL
    assert not any("loss" in record for record in records(tmp_path, "dit"))


def test_a_batch_is_contexts_of_one_task_and_one_member_each():
    pool = random_pool()
    edges = torch.tensor([0.5, 1.0])
    cond, data, tasks = pool.draw(edges, 2, 64, torch.Generator().manual_seed(0))
    assert cond.shape == (64, 16, 5, 4, 4) and data.shape == (64, 16, 1, 4, 4)
    seen = set()
    for item in range(64):
        factor = next(f for f in (-1, 2) if torch.equal(data[item, :, 0], f * cond[item, :, 4]))
        assert torch.equal(cond[item, :, 1:4:2], factor * cond[item, :, 0:4:2])
        seen.add((int(tasks[item]), factor))
    assert seen == {(0, -1), (1, -1), (1, 2)}


@pytest.mark.parametrize("repeat", [0.0, 1.0])
def test_the_query_may_be_one_of_the_pairs(repeat: float):
    cond, data, _ = random_pool().draw(torch.tensor([0.5, 1.0]), 3, 32, torch.Generator().manual_seed(0), repeat)
    same = (cond[:, :, 0:6:2] == cond[:, :, 6:7]).all((1, 3, 4)) & (cond[:, :, 1:7:2] == data).all((1, 3, 4))
    assert same.any(1).float().mean() == pytest.approx(repeat, abs=0.35)
    assert repeat == 0 or (same.any(1).all() and same.any(0).all())


def test_mappings_have_their_share_of_the_samples():
    pool = random_pool(names=("depth_estimation", "denoising", "negative"))
    pool = LatentPool(pool.latents, (pool.tasks[0], TaskLatents("denoising", pool.tasks[0].rows), pool.tasks[2]))
    assert task_shares(pool, WEIGHTS, families=0.4) == pytest.approx([0.15, 0.45, 0.4])
    assert sum(task_shares(random_pool(names=("negative",)), WEIGHTS, families=0.4)) == pytest.approx(1)


def test_shapes_hold_about_the_same_tokens():
    for shape in shapes_of(Plan(steps=1)):
        frames = 2 if shape.clips else 1
        cond, data, noise, t, tasks = contexts(Plan(steps=1)).draw(shape, 4096, torch.Generator().manual_seed(0))
        assert cond.shape[2] == (frames * (2 * shape.pairs + 1) if shape.pairs else 1 + frames)
        assert data.shape == noise.shape and data.shape[2] == frames and len(t) == len(tasks) == len(cond)
        tokens = len(cond) * (cond.shape[2] + frames) * 4
        assert 0.8 * 4096 < tokens <= 4096
    assert BatchShape(False, 0) in shapes_of(Plan(steps=1))


def test_the_loss_is_that_of_the_flow():
    """Of a network that predicts zero: the mean square of `data - noise`."""
    dit = initialise_(JDiT(SMALL), seed=0)  # begins with a velocity of zero
    cond, data, noise, t, _ = contexts(SHORT).draw(BatchShape(False, 1), 512, torch.Generator().manual_seed(1))
    loss = flow_loss(dit, cond, data, noise, t)
    assert torch.allclose(loss, (data - noise).square().mean((1, 2, 3, 4)))


def test_the_learning_rate_rises_stays_and_falls():
    rate = Rate(peak=1.0, warmup=10, fall=0.2)
    assert rate.at(0, 0.0) == pytest.approx(0.1) and rate.at(9, 0.1) == rate.at(50, 0.5) == rate.at(79, 0.79) == 1
    assert rate.at(90, 0.9) == pytest.approx(0.5) and rate.at(99, 0.99) == pytest.approx(0.05)


def test_a_length_is_of_steps_or_of_seconds_the_sooner():
    assert Length(steps=10).progress(5, 1e9) == 0.5
    assert Length(seconds=10).progress(10**9, 4) == 0.4
    assert Length(steps=10, seconds=100).progress(3, 60) == 0.6
    assert Length(steps=10, seconds=0).progress(0, 0) == Length(steps=0).progress(0, 0) == 1
    assert Length().progress(10, 10) == 0


AMOUNTS = Amounts(8, 1, 8, 2, 3, scenes_a_piece=8, clips_a_piece=1)


@pytest.fixture(scope="module")
def pieces() -> dict[str, Piece]:
    return {kind: make_piece(kind, 0, 32, AMOUNTS, seed=0) for kind in (PICTURES, CLIPS)}


def test_a_piece_has_every_trained_task_and_every_member(pieces, tmp_path):
    for kind, frames in ((PICTURES, 1), (CLIPS, 5)):
        piece = pieces[kind]
        assert piece.frames.shape[1:] == (frames, 32, 32, 3) and piece.frames.dtype == np.uint8
        for name, rows in piece.rows.items():
            task = TASKS[name]
            assert task.trained and task.is_clip == (kind == CLIPS)
            assert len(rows) == len(task.members) and (rows[..., 0] == rows[:1, :, 0]).all()
            assert rows.max() < len(piece.frames)
    assert {"depth_estimation", "denoising", "hue"} <= set(pieces[PICTURES].rows)
    pieces[PICTURES].save(tmp_path / "piece.npz")
    kept = Piece.load(tmp_path / "piece.npz")
    assert np.array_equal(kept.frames, pieces[PICTURES].frames)
    assert np.array_equal(kept.rows["hue"], pieces[PICTURES].rows["hue"])


@pytest.mark.parametrize("content", [b"PK not a piece", b""])
def test_a_damaged_piece_is_removed(content: bytes, tmp_path):
    (tmp_path / "piece.npz").write_bytes(content)
    assert Piece.load(tmp_path / "piece.npz") is None and not (tmp_path / "piece.npz").exists()


class Made:
    """What `Arrivals` asks of a `PieceMaker`."""

    def __init__(self, paths: list[Path], done: bool):
        self.work, self.paths, self.done = dict.fromkeys(paths), paths, done

    def ready(self) -> list[Path]:
        return self.paths

    def arriving(self, patience: float) -> Arrivals:
        return Arrivals(self, patience)

    @staticmethod
    def kind(path: Path) -> str:
        return path.stem


def test_pieces_arrive_once_and_waiting_has_an_end():
    paths = [Path("a"), Path("b")]
    assert list(Arrivals(Made(paths, done=True), 0)) == paths
    slow = Arrivals(Made(paths, done=False), patience=0)
    assert list(slow) == paths and slow.next(wait=False) is None


@pytest.fixture(scope="module")
def vae():
    return make_vae(VAEConfig(block_out_channels=(32, 32, 32, 32), layers_per_block=1), seed=0)


def test_every_pair_is_encoded(pieces, vae, tmp_path):
    paths = [tmp_path / f"{kind}.npz" for kind in pieces]
    for path, piece in zip(paths, pieces.values(), strict=True):
        piece.save(path)
    pictures, clips = encode_pieces(Made(paths, done=True), vae, torch.device("cpu"), 0)
    assert len(pictures.latents) == len(pieces[PICTURES].frames) and clips.latents.shape[2] == 2
    task = next(task for task in pictures.tasks if task.name == "negative")
    row = task.rows[1, 0, 1]
    pixels = to_device(
        torch.from_numpy(pieces[PICTURES].frames[pieces[PICTURES].rows["negative"][1, 0, 1]])[None], "cpu"
    )
    with torch.no_grad():
        expected = scale_latents(vae.encode(pixels).mode())[0]
    assert (pictures.latents[row] - expected).norm() < 2e-3 * expected.norm()


def test_pieces_are_encoded_once(pieces, vae, tmp_path, monkeypatch):
    path = tmp_path / "pictures.npz"
    pieces[PICTURES].save(path)
    first, second = (_encoded(path, vae) for _ in range(2))
    monkeypatch.setattr(latents, "encode", None)
    assert torch.equal(_encoded(path, vae), first) and torch.equal(second, first)
    next(tmp_path.glob("*.npy")).write_bytes(b"half")
    with pytest.raises(TypeError):  # encodes again
        _encoded(path, vae)
    monkeypatch.undo()
    assert torch.equal(_encoded(path, vae), first)
    other = make_vae(vae.config, seed=1)
    assert not torch.equal(_encoded(path, other), first) and len(list(tmp_path.glob("*.npy"))) == 2


def test_a_batch_of_the_vae_that_does_not_fit_is_halved_to_an_end(tmp_path, monkeypatch):
    counted = []

    def full(*tensors: torch.Tensor) -> torch.Tensor:
        counted.append(tensors)
        raise torch.OutOfMemoryError

    monkeypatch.setattr(train_vae_module, "vae_loss", full)
    monkeypatch.setattr(train_vae_module, "held_out", lambda *_: None)
    frames = np.zeros((8, 1, 32, 32, 3), np.uint8)
    rows = {"negative": np.arange(8, dtype=np.int32).reshape(1, 4, 2)}
    Piece(frames, rows, frames[:, 0]).save(tmp_path / "pictures.npz")
    plan = dataclasses.replace(PRESETS["tiny"].vae_plan, batch=40)
    maker = Made([tmp_path / "pictures.npz"], done=True)
    with pytest.raises(TooLittleMemory, match="out of memory in batches of 16 pictures"):
        train_vae(maker, PRESETS["tiny"].vae, 32, tmp_path, plan, torch.device("cpu"), compile=False)
    assert len(counted) == 3  # of 40, 20 and 16


def test_a_picture_that_does_not_fit_is_said(vae, monkeypatch):
    def full(pixels: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(vae.encoder, "forward", full)
    with pytest.raises(TooLittleMemory, match="out of memory while encoding 1 x 32 x 48"):
        encode(vae, torch.zeros(3, 1, 32, 48, 3, dtype=torch.uint8), torch.device("cpu"))


def _encoded(path: Path, vae: STVAE) -> torch.Tensor:
    pictures, _ = encode_pieces(Made([path], done=True), vae, torch.device("cpu"), 0)
    return pictures.latents


def test_folding_a_scale_into_the_vae_leaves_its_pictures(vae):
    scaled = copy.deepcopy(vae)
    pixels = torch.rand(4, 3, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        means = vae.encode(pixels).mean
        scale_to_unit_(scaled, float(means.square().mean().sqrt()))
        scale = scaled.encode(pixels).mean.square().mean().sqrt()
        assert scale * 1.08936170213 == pytest.approx(1, rel=1e-4)
        assert torch.allclose(scaled(pixels), vae(pixels), atol=1e-4)
        before, after = vae.encode(pixels).logvar - 2 * means.abs().log(), scaled.encode(pixels)
        assert torch.allclose(after.logvar - 2 * after.mean.abs().log(), before, atol=1e-2)


def test_pictures_do_not_see_how_a_kernel_is_divided_in_time(vae):
    parted, generator = part_taps_(copy.deepcopy(vae)).train(), torch.Generator().manual_seed(0)
    pixels, noise = torch.rand(2, 3, 1, 32, 32, generator=generator) * 2 - 1, torch.zeros(2, 16, 1, 4, 4)
    expected = vae_loss(vae, pixels, noise, noise)[0]
    loss = vae_loss(parted, pixels, noise, noise)[0]
    loss.backward()
    assert torch.allclose(loss, expected, rtol=1e-5)
    past = [parameter for name, parameter in parted.named_parameters() if name.endswith("weight.original1")]
    assert len(past) > 10 and not any(parameter.grad.any() for parameter in past)
    with torch.no_grad():
        for parameter in past:
            parameter.normal_(0, 0.05, generator=generator)
        assert torch.allclose(vae_loss(parted, pixels, noise, noise)[0], expected, rtol=1e-3)
        plain = whole_taps(parted)
        clip = torch.rand(1, 3, 5, 32, 32, generator=generator)
        assert torch.allclose(plain(clip), parted(clip), atol=1e-5)
        assert not torch.allclose(plain(clip), vae(clip), atol=1e-2)


def test_a_loss_that_ran_away_brings_the_last_state_back(tmp_path):
    network = torch.nn.Linear(2, 1)
    trainer = Trainer(network, Rate(0.1, 1), Length(steps=6), tmp_path, "line", log_every=1)
    troubles, seen = [], []
    trainer.on_trouble = lambda: troubles.append(trainer.step)
    for step in trainer.steps():
        factor = 1e9 if len(seen) == 3 else 1.0
        seen.append(step)
        trainer.update(factor * (1 + 0 * network(torch.ones(1, 2)).sum()))
    assert seen == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5] and troubles == [0] and trainer.slower == 0.5


def test_a_compilation_that_computes_something_else_is_not_used(tmp_path, monkeypatch, capsys):
    network = torch.nn.Linear(3, 3)
    compiled = Compiled(network, lambda net, x: net(x).square(), enabled=False)
    compiled.enabled, tensors = True, (torch.zeros(4, 3),)
    compiled.whole = lambda net, x: net(x).square() + net(x.detach()).sum()
    before = [parameter.detach().clone() for parameter in network.parameters()]
    compiled.warm_up(*tensors)
    assert not compiled.enabled and "results differ" in capsys.readouterr().err
    assert all(map(torch.equal, network.parameters(), before))
    compiled.enabled, compiled.whole = True, compiled.function
    compiled.warm_up(*tensors)
    assert compiled.enabled and compiled.shapes == {((4, 3),)}
