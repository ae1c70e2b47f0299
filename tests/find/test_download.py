"""Finding a checkpoint in folders, archives and the hub's cache, and archives that mean harm."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from support.checks import refusal
from support.golden import GOLDEN

from lavin_rt.checkpoint.files import Checkpoint
from lavin_rt.checkpoint.load import load_dit, load_vae
from lavin_rt.find.model import find_checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything in a folder: files with their contents, folders and links with None."""
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*"))}
    return {
        name: path.read_bytes() if path.is_file() and not path.is_symlink() else None for name, path in paths.items()
    }


def entry(name: str, content: bytes = b"", **fields) -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for field, value in fields.items():
        setattr(member, field, value)
    return member, content


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tuple[tarfile.TarInfo, bytes]:
    return entry(name, type=kind, linkname=target)


def pack(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        for member, content in members:
            tar.addfile(member, io.BytesIO(content))
    return path


def pack_checkpoint(path: Path, *prefixes: str, vae: str = "stvae.pt") -> Path:
    """A `weights.tar.gz` with golden weights below the folders `prefixes`."""
    prefix = "".join(f"{folder}/" for folder in prefixes)
    dit, vae_bytes = (GOLDEN / "dit_c.safetensors").read_bytes(), (GOLDEN / "stvae.pt").read_bytes()
    return pack(path, entry(f"{prefix}lavin_dit.safetensors", dit), entry(f"{prefix}{vae}", vae_bytes))


def pack_templates(path: Path, *prefixes: str) -> Path:
    prefix = "".join(f"{folder}/" for folder in prefixes)
    names = [f"{prefix}{task}/{i}_{role}.png" for task in "ab" for i in range(2) for role in ("input", "target")]
    return pack(path, *[entry(name, b"png") for name in names])


def lay_out(folder: Path, vae: str = "stvae.pt") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(GOLDEN / "dit_c.safetensors", folder / "lavin_dit.safetensors")
    shutil.copy(GOLDEN / "stvae.pt", folder / vae)
    return folder


def loads(found: Checkpoint) -> None:
    load_dit(found.dit)
    load_vae(found.vae)


# Folders.


def test_a_folder(tmp_path):
    folder = lay_out(tmp_path / "model")
    found = find_checkpoint(folder)
    assert found == Checkpoint(folder / "lavin_dit.safetensors", folder / "stvae.pt", None, str(folder))
    loads(found)
    assert find_checkpoint(folder / "lavin_dit.safetensors").vae == folder / "stvae.pt"
    (folder / "template").mkdir()
    assert find_checkpoint(folder).templates == folder / "template"
    assert find_checkpoint(folder / "lavin_dit.safetensors").templates == folder / "template"
    (folder / "stvae.safetensors").touch()
    assert find_checkpoint(folder).vae == folder / "stvae.safetensors"


def test_a_folder_with_weights_in_it(tmp_path):
    lay_out(tmp_path / "model" / "weights")
    (tmp_path / "model" / "template").mkdir()
    for path in (tmp_path / "model", tmp_path / "model" / "weights"):
        found = find_checkpoint(path)
        assert found.dit == tmp_path / "model" / "weights" / "lavin_dit.safetensors"
        assert found.templates == tmp_path / "model" / "template"


def test_a_file_of_another_name(tmp_path):
    folder = lay_out(tmp_path)
    tuned = (folder / "lavin_dit.safetensors").rename(folder / "tuned.safetensors")
    assert find_checkpoint(tuned).dit == tuned
    assert "stvae.pt, tuned.safetensors; expected lavin_dit.safetensors" in refusal(find_checkpoint, folder)


def test_what_is_missing_is_named(tmp_path):
    assert "holds nothing; expected lavin_dit.safetensors and" in refusal(find_checkpoint, tmp_path)
    lay_out(tmp_path)
    (tmp_path / "stvae.pt").unlink()
    message = refusal(find_checkpoint, tmp_path)
    assert "holds lavin_dit.safetensors; expected stvae.safetensors or stvae.pt" in message
    (tmp_path / "notes.txt").touch()
    assert "is no checkpoint" in refusal(find_checkpoint, tmp_path / "notes.txt")
    assert "no revision 'main'" in refusal(find_checkpoint, tmp_path, revision="main")
    (tmp_path / "lavin_dit.safetensors").unlink()
    for i in range(20):
        (tmp_path / f"{i:02d}").mkdir()
    assert "holds 00/, 01/, 02/, 03/, 04/, 05/ and 15 more; expected" in refusal(find_checkpoint, tmp_path)


@pytest.mark.parametrize(
    "name", ["", "missing", "./missing/model", "../model", "/missing/model", "a/b/c", "a//b", "a/.b", "http://a/b",
             "missing/lavin_dit.safetensors", "missing/weights.tar.gz", "a/b c", "a\\b", "~nosuchuser/x"]
)  # fmt: skip
def test_neither_a_path_nor_a_hub_id(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert "nor a Hugging Face id" in refusal(find_checkpoint, name)


# Archives.


@pytest.mark.parametrize("prefixes", [(), ("weights",), ("release", "weights")])
def test_the_published_archives(tmp_path, prefixes):
    archive = pack_checkpoint(tmp_path / "weights.tar.gz", *prefixes)
    before, calls = tree(tmp_path), []
    found = find_checkpoint(archive, cache=tmp_path / "cache", progress=lambda done, total: calls.append((done, total)))
    assert found.templates is None and found.source == str(archive)
    assert calls[-1] == (archive.stat().st_size,) * 2 and calls == sorted(calls)
    loads(found)
    (unpacked,) = (tmp_path / "cache").iterdir()
    assert {name: value for name, value in tree(tmp_path).items() if not name.startswith("cache")} == before
    inside = [f"{'/'.join([*prefixes, name])}" for name in ("lavin_dit.safetensors", "stvae.pt")]
    assert [name for name, value in tree(unpacked).items() if value is not None] == inside

    templates = pack_templates(tmp_path / "template.tar.gz", *prefixes)
    found = find_checkpoint(archive, cache=tmp_path / "cache")
    assert sorted(path.name for path in found.templates.iterdir()) == ["a", "b"]
    stamp = found.dit.stat().st_mtime_ns
    archive.rename(tmp_path / "moved")
    (tmp_path / "moved").rename(archive)
    assert find_checkpoint(tmp_path, cache=tmp_path / "cache").dit == found.dit  # the folder that holds the archives
    assert found.dit.stat().st_mtime_ns == stamp  # unpacked once
    assert len(list((tmp_path / "cache").iterdir())) == 2

    pack_checkpoint(archive, "other", vae="stvae.safetensors")
    os.utime(archive, ns=(0, 0))
    assert find_checkpoint(archive, cache=tmp_path / "cache").vae.name == "stvae.safetensors"  # a changed archive
    templates.write_bytes(b"")
    assert "is damaged" in refusal(find_checkpoint, archive, cache=tmp_path / "cache")


def test_templates_inside_the_weights_archive(tmp_path):
    members = [entry("x/weights/lavin_dit.safetensors"), entry("x/weights/stvae.pt"), entry("x/template/a/0_input.png")]
    found = find_checkpoint(pack(tmp_path / "weights.tar.gz", *members), cache=tmp_path / "cache")
    assert found.templates == found.dit.parent.parent / "template"


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ([], "holds nothing; expected lavin_dit.safetensors"),
        ([entry("a/readme.md")], "holds a/; expected lavin_dit.safetensors"),
        ([entry("lavin_dit.safetensors")], "expected stvae.safetensors or stvae.pt"),
        ([entry("a/b/c/lavin_dit.safetensors"), entry("a/b/c/stvae.pt")], "holds a/; expected"),
    ],
)
def test_an_archive_without_a_checkpoint_is_not_kept(tmp_path, members, said):
    archive = pack(tmp_path / "weights.tgz", *members)
    assert said in refusal(find_checkpoint, archive, cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    lay_out(tmp_path)
    pack(tmp_path / "template.tar.gz", entry("readme.md"))
    message = refusal(find_checkpoint, tmp_path, cache=tmp_path / "cache")
    assert "template.tar.gz holds readme.md; expected folders with *_input" in message
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_default_cache_is_that_of_the_hub_library(tmp_path):
    archive = pack_checkpoint(tmp_path / "weights.tar.gz")
    code = "import sys; from lavin_rt.find.model import find_checkpoint; print(find_checkpoint(sys.argv[1]).dit)"
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_ASSETS_CACHE", None)
    output = subprocess.run([sys.executable, "-c", code, archive], env=environment, check=True, capture_output=True)
    assert Path(output.stdout.decode().strip()).is_relative_to(tmp_path / "home" / "assets" / "lavin-rt")


def test_the_default_cache_without_the_hub_library(tmp_path, monkeypatch):
    archive = pack_checkpoint(tmp_path / "weights.tar.gz")
    for name in ("huggingface_hub", "huggingface_hub.constants"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(Path, "home", classmethod(lambda cls: tmp_path / "home"))
    assert find_checkpoint(archive).dit.is_relative_to(tmp_path / "home" / ".cache" / "huggingface" / "assets")
    message = refusal(find_checkpoint, "somebody/something")
    assert "pip install 'lavin-rt[hub]'" in message and "somebody/something is no local path" in message


# The hub.


def hub_cache(folder: Path, archives: bool) -> Path:
    """A cache as huggingface_hub leaves it behind, with `owner/model` at `main`."""
    repository = folder / "models--owner--model"
    snapshot = repository / "snapshots" / COMMIT
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "blobs").mkdir()
    snapshot.mkdir(parents=True)
    if archives:
        pack_checkpoint(repository / "blobs" / "1", "weights")
        pack_templates(repository / "blobs" / "2", "template")
        (snapshot / "weights.tar.gz").symlink_to("../../blobs/1")
        (snapshot / "template.tar.gz").symlink_to("../../blobs/2")
    else:
        lay_out(snapshot)
        (snapshot / "template").mkdir()
    return folder


def offline(cache: Path, *revisions: str) -> list[str]:
    """What `find_checkpoint("owner/model", revision)` finds, or refuses, in a process that may not use the network."""
    code = """
import sys
from lavin_rt.find.model import find_checkpoint
from lavin_rt.errors import InputError
for revision in sys.argv[1:]:
    try:
        found = find_checkpoint("owner/model", revision if revision != "default" else None)
        print(found.dit, found.vae, found.templates, found.source)
    except InputError as error:
        print(error)
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache)}
    command = [sys.executable, "-c", code, *revisions]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.splitlines()


def test_offline_and_not_in_the_cache(tmp_path):
    (said,) = offline(tmp_path, "default")
    assert "owner/model is no local path" in said
    assert "the hub cannot be reached" in said
    assert "give a folder with lavin_dit.safetensors" in said


@pytest.mark.parametrize("archives", [False, True])
def test_offline_from_the_cache(tmp_path, archives):
    cache = hub_cache(tmp_path, archives)
    snapshot = cache / "models--owner--model" / "snapshots" / COMMIT
    unpacked = cache / "models--owner--model" / "unpacked" / COMMIT
    before = tree(snapshot)
    *found, other = offline(cache, "default", "main", COMMIT, "v2")
    root = unpacked / "weights.tar.gz" / "weights" if archives else snapshot
    templates = unpacked / "template.tar.gz" / "template" if archives else snapshot / "template"
    expected = [root / "lavin_dit.safetensors", root / "stvae.pt", templates, f"owner/model@{COMMIT}"]
    assert found == [" ".join(map(str, expected))] * 3
    assert "at revision 'v2'" in other and "the hub cannot be reached" in other
    assert tree(snapshot) == before
    loads(Checkpoint(*expected))


def test_a_local_folder_comes_before_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    lay_out(tmp_path / "owner" / "model")
    assert find_checkpoint("owner/model").dit == Path("owner/model/lavin_dit.safetensors")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ("GatedRepoError", "needs permission"),
        ("RepositoryNotFoundError", "does not exist, or is private"),
        ("RevisionNotFoundError", "check the revision"),
        ("LocalEntryNotFoundError", "the hub cannot be reached"),
        ("HfHubHTTPError", "could not be fetched"),
        ("HFValidationError", "could not be fetched"),
        (ConnectionResetError("one\ntwo"), "could not be fetched (one two)"),
    ],
)
def test_what_the_hub_may_answer(monkeypatch, tmp_path, error, said):
    import huggingface_hub.errors

    if isinstance(error, str):
        kind = getattr(huggingface_hub.errors, error)
        error = kind.__new__(kind)  # their arguments differ between versions

    def snapshot_download(repository, **options):
        assert repository == "owner/model"
        assert options["revision"] == "v1"
        assert options["cache_dir"] == tmp_path
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    message = refusal(find_checkpoint, "owner/model", revision="v1", cache=tmp_path)
    assert said in message and "owner/model is no local path" in message and "at revision 'v1'" in message


def test_only_what_is_needed_is_asked_of_the_hub(monkeypatch, tmp_path):
    import huggingface_hub

    repository = [
        "weights.tar.gz", "template.tar.gz", "lavin_dit.safetensors", "weights/stvae.pt", "template/a/0_input.png",
        "config.json", "README.md", ".gitattributes", "optimizer.pt", "video.mp4", "weights/dit_step1000.safetensors",
    ]  # fmt: skip

    def snapshot_download(name, allow_patterns, **options):
        kept = list(huggingface_hub.utils.filter_repo_objects(repository, allow_patterns=allow_patterns))
        assert kept == repository[:6]
        return str(hub_cache(tmp_path, archives=True) / "models--owner--model" / "snapshots" / COMMIT)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    loads(find_checkpoint("owner/model"))
