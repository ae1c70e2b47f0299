"""What a training leaves in its folder, and what goes on from there."""

from __future__ import annotations

import dataclasses
import gc
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.mini_pools import SMALL, contexts, plan_of

pytest.importorskip("embreex", reason="needs the extra train")

from lavin_rt.checkpoint.load import load_dit, load_vae, save_vae
from lavin_rt.errors import InputError
from lavin_rt.mini.train.__main__ import TrainingSetting, _train_vae, main
from lavin_rt.mini.train.dit import TransformerRun
from lavin_rt.mini.train.presets import PRESETS
from lavin_rt.mini.train.trainer import Length, Rate, Trainer

PLAN = dataclasses.replace(plan_of(3), tokens=64, log_every=200)


def trained(folder: Path, **changes: float) -> torch.nn.Module:
    plan = dataclasses.replace(PLAN, **changes)
    return TransformerRun(SMALL, folder, plan, compile=False).train(contexts(plan))


def line(folder: Path, **options: float) -> Trainer:
    return Trainer(torch.nn.Linear(2, 1), Rate(0.1, 1), Length(steps=6), folder, "line", **options)


def step(trainer: Trainer, factor: float = 1.0) -> None:
    trainer.update(factor * (1 + 0 * trainer.network(torch.ones(1, 2)).sum()))


def test_what_ran_away_is_not_kept(tmp_path):
    with pytest.raises(InputError, match=r"dit: training ran away, the loss is .*; lower the rate"):
        trained(tmp_path, peak=1e30)
    gc.collect()  # ends the loop that was left
    assert not (tmp_path / "lavin_dit.safetensors").exists()
    assert all(p.isfinite().all() for p in trained(tmp_path, peak=1e-3).parameters())
    assert all(p.isfinite().all() for p in load_dit(tmp_path / "lavin_dit.safetensors").parameters())


def test_the_loss_is_judged_before_every_save(tmp_path):
    trainer, seen, saved = line(tmp_path, save_every=-1), [], []
    trainer.on_save = lambda: saved.append(trainer.step)
    for _ in trainer.steps():
        seen.append(trainer.step)
        step(trainer, float("nan") if len(seen) == 3 else 1.0)
    assert seen == [0, 1, 2, 2, 3, 4, 5] and saved == [1, 2, 3, 4, 5, 6] and trainer.slower == 0.5


def test_an_interrupted_run_keeps_nothing_that_ran_away(tmp_path):
    trainer = line(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        for _ in (running := trainer.steps()):
            step(trainer, float("nan") if trainer.step == 2 else 1.0)
            if trainer.step == 3:
                running.throw(KeyboardInterrupt)
    assert torch.load(trainer.state_file)["step"] == 0


def test_a_state_remembers_its_slower_rate_of_a_peak(tmp_path):
    trainer = line(tmp_path)
    trainer.slower = 0.25
    trainer.save()
    same, other = line(tmp_path), line(tmp_path)
    other.rate = Rate(0.05, 1)
    assert same.resume() and other.resume() and (same.slower, other.slower) == (0.25, 1.0)


def test_a_state_of_weights_that_ran_away_is_refused(tmp_path):
    trainer = line(tmp_path)
    trainer.averaged.values["bias"].fill_(float("inf"))
    trainer.save()
    with pytest.raises(InputError, match=r"line-state.pt: its weights are not all finite numbers; choose another"):
        line(tmp_path).resume()


def taught(output: Path, pairs: Path, *options: object) -> int:
    """The exit code of a short training in this folder; options that come again win."""
    given = ["--output", output, "--pairs", pairs, "--device", "cpu", "--dit-steps", 2, "--size", 32, "--tokens", 128]
    return main([str(part) for part in (*given, *options)])


def test_a_state_goes_on_with_what_it_was_trained_on_alone(folders, checkpoint, tmp_path, capsys):
    output, other = tmp_path / "run", tmp_path / "vae.safetensors"
    torch.manual_seed(1)
    save_vae(type(load_vae(checkpoint / "stvae.safetensors"))(load_vae(checkpoint / "stvae.safetensors").config), other)
    start = ["--warm-start", checkpoint, "--lora", 2]
    assert taught(output, folders[0], *start) == 0
    before = {path.name: path.read_bytes() for path in output.glob("*.safetensors")}
    capsys.readouterr()
    for pairs, options, named in (
        (folders[1], start, "another set of pairs (negative"),
        (folders[0], [*start, "--seed", 1], "another seed (0, now 1)"),
        (folders[0], [*start, "--lora", 1], "another LoRA rank (2, now 1)"),
        (folders[0], [], "another warm start ("),
        (folders[0], [*start, "--vae", other], "belongs to the VAE beside it"),
    ):
        assert taught(output, pairs, *options) == 2
        said = capsys.readouterr().err
        assert f"{output}/dit-state.pt belongs to " in said and named in said and "choose another output folder" in said
        assert {path.name: path.read_bytes() for path in output.glob("*.safetensors")} == before
    assert taught(output, folders[0], *start, "--dit-steps", 3, "--peak", 1e-4) == 0
    assert torch.load(output / "dit-state.pt")["step"] == 3


def test_a_picture_that_changed_is_another_pair(folders, checkpoint, tmp_path, capsys):
    assert taught(tmp_path / "run", folders[0], "--warm-start", checkpoint) == 0
    (folders[0] / "0_target.png").write_bytes((folders[0] / "1_target.png").read_bytes())
    assert taught(tmp_path / "run", folders[0], "--warm-start", checkpoint) == 2
    assert "another set of pairs" in capsys.readouterr().err


def test_a_state_of_before_origins_is_taken(tmp_path, capsys):
    trainer = line(tmp_path, origin={"seed": "0"})
    trainer.save()
    torch.save({k: v for k, v in torch.load(trainer.state_file).items() if k != "origin"}, trainer.state_file)
    assert line(tmp_path, origin={"seed": "1"}).resume()
    assert "does not say what it was trained on" in capsys.readouterr().err


def test_the_vae_stays_as_it_is_under_a_transformer(checkpoint, tmp_path):
    """With more steps, or another file to keep; without a state it is replaced."""
    chosen, file, other = PRESETS["tiny"], tmp_path / "run" / "stvae.safetensors", tmp_path / "vae.safetensors"
    kept = dataclasses.replace(chosen, vae_plan=dataclasses.replace(chosen.vae_plan, steps=0))
    torch.manual_seed(1)
    vae = load_vae(checkpoint / "stvae.safetensors")
    save_vae(type(vae)(vae.config), other)
    file.parent.mkdir()
    setting = TrainingSetting(file.parent, None, torch.device("cpu"), vae=str(checkpoint / "stvae.safetensors"))
    _train_vae(kept, setting, None)
    (file.parent / "dit-state.pt").touch()
    _train_vae(kept, setting, None)
    for plan, changed in ((chosen, setting), (kept, dataclasses.replace(setting, vae=str(other)))):
        with pytest.raises(InputError, match=r"dit-state.pt belongs to the VAE beside it"):
            _train_vae(plan, changed, None)
    assert load_vae(file).fingerprint == vae.fingerprint
    (file.parent / "dit-state.pt").unlink()
    _train_vae(kept, dataclasses.replace(setting, vae=str(other)), None)
    assert load_vae(file).fingerprint == load_vae(other).fingerprint


@pytest.mark.parametrize("left", [0, 100, 2000, "other"])
def test_a_damaged_state_is_refused(left: int | str, tmp_path):
    trainer = line(tmp_path)
    trainer.save()
    if left == "other":
        torch.save({"network": {}}, trainer.state_file)
    else:
        trainer.state_file.write_bytes(trainer.state_file.read_bytes()[:left])
    with pytest.raises(InputError, match=r"line-state.pt (cannot be read|is no training's state).*; choose another"):
        line(tmp_path).resume()


FULL = """
import resource, sys
from pathlib import Path
import torch
from lavin_rt.errors import InputError
from lavin_rt.mini.train.states import add_line, save_state
from lavin_rt.checkpoint.load import save_vae
from lavin_rt.vae.config import VAEConfig
from lavin_rt.vae.model import STVAE
folder, vae = Path(sys.argv[1]), STVAE(VAEConfig(block_out_channels=(32, 32, 32, 32), layers_per_block=1))
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
big = {"step": torch.zeros(100_000), "other": torch.zeros(2000)}
for act in (
    lambda: save_state(big, {}, folder / "dit-state.pt"),
    lambda: save_vae(vae, folder / "stvae.pt"),
    lambda: [add_line({"step": step}, folder / "log.jsonl") for step in range(10_000)],
):
    try:
        act()
        print("written")
    except InputError as error:
        print(error)
"""


def test_a_full_disk_is_said_and_the_state_before_stays(tmp_path):
    (tmp_path / "dit-state.pt").write_bytes(b"before")
    ran = subprocess.run([sys.executable, "-c", FULL, tmp_path], capture_output=True, text=True, check=True)
    lines = ran.stdout.splitlines()
    for said, name in zip(lines, ("dit-state.pt", "stvae.pt", "log.jsonl"), strict=True):
        assert f"{name}: cannot be written (File too large)" in said
    assert (tmp_path / "dit-state.pt").read_bytes() == b"before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dit-state.pt", "log.jsonl"]
