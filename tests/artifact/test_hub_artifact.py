"""Artifacts from a hub: what is fetched, what it becomes here, and code that runs only for who trusts it."""

from __future__ import annotations

import shutil
from pathlib import Path

import huggingface_hub
import pytest
from support.checks import refusal
from support.golden import GOLDEN
from support.small_artifact import read_manifest, write_manifest, write_small_artifact

from lavin_rt.checkpoint.files import Checkpoint
from lavin_rt.cli.main import main
from lavin_rt.find.model import Artifact, find_model
from lavin_rt.pipeline import Pipeline

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """A hub with one repository: like the library's own, its cache holds links, a local folder real files."""

    def __init__(self, folder: Path):
        self.repository, self.cache = folder / "repository", folder / "cache"
        self.fetched: list[str] = []

    def snapshot_download(self, repository, revision=None, allow_patterns=(), cache_dir=None, local_dir=None):
        assert repository == "owner/model" and revision in (None, COMMIT)
        names = [p.relative_to(self.repository).as_posix() for p in self.repository.rglob("*") if p.is_file()]
        place = Path(local_dir) if local_dir else self.cache / "models--owner--model" / "snapshots" / COMMIT
        for name in huggingface_hub.utils.filter_repo_objects(names, allow_patterns=list(allow_patterns)):
            self.fetched.append(name)
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).unlink(missing_ok=True)
            if local_dir:
                shutil.copy(self.repository / name, place / name)
            else:
                (place / name).symlink_to(self.repository / name)
        return str(place)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Hub:
    hub = Hub(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    return hub


def test_an_artifact_without_code_runs(hub):
    write_small_artifact(hub.repository)
    found = find_model("owner/model")
    assert isinstance(found, Artifact) and found.fetched and found.source == f"owner/model@{COMMIT}"
    assert not any(path.is_symlink() for path in found.folder.iterdir())
    assert Pipeline.from_pretrained("owner/model", device="cpu").impl == "onnx"


@pytest.mark.parametrize("kind", ["tensorrt", "aoti"])
def test_code_is_not_even_fetched_without_trust(hub, kind, tmp_path, capsys):
    write_small_artifact(hub.repository)
    write_manifest(hub.repository, {**read_manifest(hub.repository), "kind": kind})
    assert "--trust" in refusal(find_model, "owner/model")
    assert set(hub.fetched) == {"manifest.json"}
    query = GOLDEN.parent.parent / "lavin_rt" / "mini" / "template" / "depth_estimation" / "0_input.png"
    command = ["run", "--checkpoint", "owner/model", "--task", "depth", "--query", str(query)]
    assert main([*command, "-o", str(tmp_path / "out.png")]) == 2
    said = capsys.readouterr().err
    assert "--trust" in said and said.count("\n") == 1
    assert set(hub.fetched) == {"manifest.json"}
    assert find_model("owner/model", trust=True).fetched


@pytest.mark.parametrize("manifest", ["{}", "no JSON"])
def test_a_checkpoint_with_a_manifest_of_something_else(hub, manifest):
    hub.repository.mkdir()
    shutil.copy(GOLDEN / "dit_c.safetensors", hub.repository / "lavin_dit.safetensors")
    shutil.copy(GOLDEN / "stvae.pt", hub.repository / "stvae.pt")
    (hub.repository / "manifest.json").write_text(manifest)
    found = find_model("owner/model")
    assert isinstance(found, Checkpoint) and found.source == f"owner/model@{COMMIT}"
    assert hub.fetched.count("lavin_dit.safetensors") == 1
