"""What the tests of artifacts start from."""

from __future__ import annotations

import shutil

import pytest
from support.checks import write_dit_a
from support.golden import GOLDEN
from support.small_artifact import write_small_artifact

from lavin_rt.find.model import find_checkpoint


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A sound artifact, not to be changed."""
    return write_small_artifact(tmp_path_factory.mktemp("sound") / "artifact")


@pytest.fixture
def folder(sound, tmp_path):
    """A copy of it, to change or to damage."""
    return shutil.copytree(sound, tmp_path / "artifact")


@pytest.fixture
def checkpoint(tmp_path):
    """A golden checkpoint with a task's folder, to export."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    write_dit_a(folder)
    shutil.copy(GOLDEN / "stvae.pt", folder)
    (folder / "template" / "edges").mkdir(parents=True)
    return find_checkpoint(folder)
