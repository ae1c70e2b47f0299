"""Task packs: made, shown, and taken wherever an encoded context is."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.command import write_picture, write_template
from support.golden import GOLDEN, relative_error
from test_pipeline import picture

from lavin_rt.checkpoint.load import load_dit, load_vae
from lavin_rt.cli.main import main
from lavin_rt.dit.model import randomize_
from lavin_rt.errors import InputError
from lavin_rt.kept_keys import transformer_fingerprint
from lavin_rt.packs import TaskPack, check_name, first_pairs
from lavin_rt.pictures.encoded import EncodedContext
from lavin_rt.pipeline import Pipeline
from lavin_rt.sampling.denoisers import make_network


def one_line(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert text and "\n" not in text
    return text


def encoded(pairs: int = 2) -> EncodedContext:
    latents = torch.randn(1, 16, 2 * pairs, 4, 6, generator=torch.Generator().manual_seed(0))
    return EncodedContext(latents, "ab" * 16, (32, 48), "mean", pairs, 1)


def test_a_pack_is_an_encoded_context_with_more_in_it(tmp_path):
    path = tmp_path / "My Task!.safetensors"
    thumbnails = torch.arange(4 * 3 * 8 * 12).remainder(256).to(torch.uint8).reshape(4, 3, 8, 12)
    TaskPack(encoded(), "cracks", "finds cracks", thumbnails).save(path)
    pack = TaskPack.load(path)
    assert (pack.name, pack.words) == ("cracks", "finds cracks") and torch.equal(pack.thumbnails, thumbnails)
    assert torch.equal(EncodedContext.load(path).latents, encoded().latents)
    encoded().save(path)
    plain = TaskPack.load(path)
    assert plain.name == "my-task" and plain.words == "" and plain.thumbnails is None


def test_the_first_pairs_of_a_context():
    whole = encoded(3)
    two = first_pairs(whole, 2)
    assert two.pairs == 2 and torch.equal(two.latents, whole.latents[:, :, :4])
    for count in (0, 4):
        with pytest.raises(InputError, match="3 are there"):
            first_pairs(whole, count)


@pytest.mark.parametrize("name", ["", "..", "a/b", "A", "a b", "x" * 65, "-a", "a\n"])
def test_names_that_are_none(name):
    with pytest.raises(InputError) as error:
        check_name(name)
    assert "small letters" in one_line(error)


def test_damaged_thumbnails(tmp_path):
    from safetensors import safe_open

    path = tmp_path / "a.safetensors"
    TaskPack(encoded(), "a", "", torch.zeros(4, 3, 8, 8, dtype=torch.uint8)).save(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file({**load_file(path), "thumbnails": torch.zeros(3, 3, 8, 8, dtype=torch.uint8)}, path, metadata)
    with pytest.raises(InputError) as error:
        TaskPack.load(path)
    assert "thumbnails" in one_line(error)


def golden(impl: str = "auto") -> Pipeline:
    dit = load_dit(GOLDEN / "dit_c.safetensors", dtype=torch.float32)
    return Pipeline(dit, load_vae(GOLDEN / "stvae.pt"), impl)


def test_kept_keys_are_used_and_belong_to_weights_size_and_pairs(tmp_path, monkeypatch):
    pipe, path = golden(), tmp_path / "kept.safetensors"
    task = pipe.task([(picture(2 * i), picture(2 * i + 1)) for i in range(2)], size=(32, 48))
    TaskPack.of(task, "kept", keep_keys=True).save(path)
    kept = TaskPack.load(path).context
    expected = task.run([picture(5)], speed="fastest")[0].latents
    plain = golden("plain")  # with keys of its own it is off by rounding, too
    own = plain.task(dataclasses.replace(kept, kept=None)).run([picture(5)], speed="fastest")[0].latents
    given = plain.task(path).run([picture(5)], speed="fastest")[0].latents
    assert relative_error(given, expected) <= 2 * relative_error(own, expected) <= 0.01
    with monkeypatch.context() as patch:
        patch.setattr(pipe.executor, "context_keys", None)  # not made anew
        assert torch.equal(pipe.task(path).run([picture(5)], speed="fastest")[0].latents, expected)
    assert first_pairs(kept, 1).kept is None and first_pairs(kept, 2).kept is kept.kept
    other = Pipeline(randomize_(load_dit(GOLDEN / "dit_c.safetensors", dtype=torch.float32), seed=1), pipe.vae)
    with pytest.raises(InputError) as error:
        other.task(path)
    assert "belong to other weights" in one_line(error) and "--keep-keys" in one_line(error)
    larger = pipe.task([(picture(0), picture(1))], size=(48, 48)).with_keys()
    with pytest.raises(InputError) as error:
        pipe.task(dataclasses.replace(kept, kept=larger.kept))
    assert "this model and size take [" in one_line(error)
    bad = dataclasses.replace(kept.kept, parts=kept.kept.parts * float("nan"))
    for parts in (bad.parts, bad.parts.to(torch.float8_e5m2)):
        dataclasses.replace(kept, kept=dataclasses.replace(bad, parts=parts)).save(path)
        with pytest.raises(InputError) as error:
            TaskPack.load(path)
        assert "expected finite numbers" in one_line(error)


def test_the_fingerprint_of_weights_is_of_all_of_them():
    """Modulation too, wherever it is: in memory or in the file that it is read from."""
    file = GOLDEN / "dit_c.safetensors"
    dropped = load_dit(file, dtype=torch.float32)
    resident = load_dit(file, dtype=torch.float32, resident_modulation=True)
    half = load_dit(file, dtype=torch.bfloat16)
    found = [transformer_fingerprint(make_network(dit, "torch")) for dit in (dropped, resident, half)]
    assert len(set(found)) == 1
    for parameter in ("weight", "bias"):
        with torch.no_grad():
            getattr(resident.blocks[-1].modulation, parameter).add_(1)
        found.append(transformer_fingerprint(make_network(resident, "torch")))
    assert len(set(found)) == 3


def test_keys_are_put_on_the_device_when_a_speed_wants_them(tmp_path):
    pipe = golden()
    task = pipe.task([(picture(0), picture(1))], size=(32, 48))
    task = pipe.task(task.with_keys())
    task.run([picture(5)], steps=4)
    exact = task.kept_bytes
    task.run([picture(5)], speed="fastest")
    assert task.kept_bytes == exact + task.context.kept.parts.nbytes > exact > 0


def test_add_show_and_run(tmp_path, capsys):
    folder, pack = write_template(tmp_path / "pairs", 3), tmp_path / "mine.safetensors"
    assert main(["task", "add", str(folder), "-o", str(pack), "--words", "of noise", "--size", "32"]) == 0
    assert "mine: 3 pairs at 32x32  (of noise)" in capsys.readouterr().out
    assert main(["task", "show", str(pack), "--json", "-o", str(tmp_path / "sheet.png")]) == 0
    assert json.loads(capsys.readouterr().out)["pairs"] == 3 and (tmp_path / "sheet.png").exists()
    query = write_picture(tmp_path / "query.png", 9)
    run = ["run", "--query", str(query), "--steps", "4", "-q"]
    assert main([*run, "--task", str(pack), "-o", str(tmp_path / "packed.png")]) == 0
    assert main(["task", "add", str(folder), "-o", str(pack), "--size", "32", "--keep-keys"]) == 0
    assert "mine: 3 pairs at 32x32, keys kept" in capsys.readouterr().out
    quick = ["run", "--query", str(query), "--speed", "fastest", "-q", "-o", str(tmp_path / "quick.png")]
    assert main([*quick, "--task", str(pack)]) == 0
    given = [str(folder / f"{i}_{role}.png") for i in range(2) for role in ("input", "target")]
    assert main(["task", "add", *given, "-o", str(pack), "--name", "two"]) == 0
    assert "two: 2 pairs at 64x64" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["depth", "-o", "x.png"], ".safetensors"),
        (["a.png", "b.png", "c.png", "-o", "x.safetensors"], "3 pictures"),
        (["a.png", "b.png", "-o", "x.safetensors", "--pairs", "1"], "leave it out"),
        (["nothing-like-it", "-o", "x.safetensors"], "unknown task"),
        (["depth", "-o", "x.safetensors", "--name", "A B"], "small letters"),
        (["depth", "-o", "x.safetensors", "--pairs", "0"], "0"),
        (["depth", "-o", "x.safetensors", "--words", "w" * 501], "500 at most"),
    ],
)
def test_packs_that_cannot_be_made(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Pipeline, "from_pretrained", None)  # no weights are read for them
    assert main(["task", "add", *arguments]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert words in line and not (tmp_path / "x.safetensors").exists()
