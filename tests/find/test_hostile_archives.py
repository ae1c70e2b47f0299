"""Archives that mean harm, or are broken."""

from __future__ import annotations

import copy
import gzip
import os
import random
import shutil
import stat
import tarfile
from pathlib import Path

import pytest
from support.checks import refusal
from test_download import entry, link, loads, pack, pack_checkpoint, tree

from lavin_rt import files
from lavin_rt.find.archives import unpack
from lavin_rt.find.model import find_checkpoint


@pytest.fixture(params=[True, False], ids=["data_filter", "without"])
def python(request, monkeypatch):
    """Pythons with and without tarfile's own `data_filter`."""
    if not request.param:
        monkeypatch.delattr(tarfile, "data_filter", raising=False)


HARM = {  # OUTSIDE stands for the absolute path of a folder beside the one that is unpacked into
    "climbs": [entry("../evil", b"x")],
    "climbs from within": [entry("a/../../evil", b"x")],
    "climbs back": [entry("../inside/evil", b"x")],
    "absolute": [entry("OUTSIDE/evil", b"x")],
    "double slash": [entry("/OUTSIDE/evil", b"x")],
    "climbing folder": [entry("../evil", type=tarfile.DIRTYPE)],
    "windows drive": [entry("C:\\evil", b"x")],
    "windows climb": [entry("a\\..\\..\\evil", b"x")],
    "link to the root": [link("a", "/")],
    "absolute link": [link("a", "OUTSIDE/secret")],
    "link up": [link("a", "..")],
    "link up from a folder": [link("a/b", "../..")],
    "link up in disguise": [link("a", "b/../../evil"), entry("b/file")],
    "link to nowhere": [link("a", "b")],
    "link to itself": [link("a", "a")],
    "link through a link": [entry("p/q/file"), link("p/q/root", "../.."), link("deep", "p/q/root/..")],
    "link inside": [entry("a/b"), link("up/in/side", "../../a/b")],
    "hard link inside": [entry("a/b"), link("hard", "a/b", tarfile.LNKTYPE)],
    "file through a link": [entry("sub/file"), link("a", "sub"), entry("a/evil", b"x")],
    "file through an outward link": [link("a", "../outside"), entry("a/evil", b"x")],
    "link through an outward link": [link("a", "../outside"), link("a/b", "x")],
    "file in place of a link": [link("a", "b"), entry("b"), entry("a", b"x")],
    "hard link up": [link("a", "../outside/secret", tarfile.LNKTYPE)],
    "absolute hard link": [link("a", "OUTSIDE/secret", tarfile.LNKTYPE)],
    "hard link to nothing": [link("a", "b", tarfile.LNKTYPE)],
    "hard link to a link": [entry("s"), link("b", "s"), link("a", "b", tarfile.LNKTYPE)],
    "hard link over a file": [entry("a"), entry("b"), link("a", "b", tarfile.LNKTYPE)],
    "device": [entry("a", type=tarfile.CHRTYPE, devmajor=1, devminor=3)],
    "block device": [entry("a", type=tarfile.BLKTYPE)],
    "pipe": [entry("a", type=tarfile.FIFOTYPE)],
    "file in place of a folder": [entry("a/b"), entry("a", b"x")],
    "folder in place of a file": [entry("a", b"x"), entry("a/b")],
    "folder of a file's name": [entry("a", b"x"), entry("a", type=tarfile.DIRTYPE)],
    "the folder itself": [entry(".", b"x")],
}


@pytest.mark.parametrize("members", HARM.values(), ids=HARM.keys())
def test_harmful_archives_change_nothing(tmp_path, python, members):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_bytes(b"secret")
    placed = copy.deepcopy(members)
    for member, _ in placed:
        member.name = member.name.replace("OUTSIDE", str(tmp_path / "outside"))
        member.linkname = member.linkname.replace("OUTSIDE", str(tmp_path / "outside"))
    archive = pack(tmp_path / "weights.tar.gz", entry("first", b"1"), *placed)
    before = tree(tmp_path)
    message = refusal(unpack, archive, tmp_path / "inside")
    assert "is not unpacked: its member" in message
    assert tree(tmp_path) == before


def test_harmless_members(tmp_path, python):
    members = [
        entry("./a/b", b"1", mode=0o4777, uid=12345),
        entry("empty", type=tarfile.DIRTYPE, mode=0),
        entry("a/..b", b"2"),
        entry("twice", b"old"),
        entry("twice", b"new"),
        entry("long/" * 60 + "ä", b"3"),
    ]
    unpack(pack(tmp_path / "a.tar.gz", *members), tmp_path / "new" / "folder")
    folder = tmp_path / "new" / "folder"
    os.umask(mask := os.umask(0o77))
    assert (folder / "a" / "b").read_bytes() == b"1"
    assert (folder / "a" / "..b").read_bytes() == b"2"
    assert (folder / "twice").read_bytes() == b"new"
    assert (folder / ("long/" * 60 + "ä")).read_bytes() == b"3"
    assert (folder / "a" / "b").stat().st_mode & 0o7111 == 0  # neither setuid nor executable
    assert os.listdir(folder / "empty") == []
    assert {stat.S_IMODE((folder / name).stat().st_mode) for name in ("a", "empty")} == {0o777 & ~mask}
    assert os.listdir(tmp_path / "new") == ["folder"]


def test_damaged_archives_leave_nothing(tmp_path):
    noise = random.Random(0).randbytes(300_000)
    whole = pack(tmp_path / "whole.tar.gz", entry("a", noise), entry("b", noise)).read_bytes()
    plain = gzip.decompress(whole)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    cases = {
        "empty": b"",
        "text": b"hello",
        "cut in the header": whole[:5],
        "cut in the first file": whole[: len(whole) // 3],
        "cut in the second file": whole[: 2 * len(whole) // 3],
        "cut in the checksum": whole[:-5],
        "a flipped bit": bytes(flipped),
        "no gzip": plain,
        "a cut tar in a sound gzip": gzip.compress(plain[:400_000], 0),
        "no tar in it": gzip.compress(noise),
        "text in it": gzip.compress(b"hello"),
    }
    for name, content in cases.items():
        path = tmp_path / "weights.tar.gz"
        path.write_bytes(content)
        message = refusal(unpack, path, tmp_path / "folder")
        assert "is damaged, truncated or no .tar.gz" in message, name
        assert sorted(os.listdir(tmp_path)) == ["weights.tar.gz", "whole.tar.gz"], name


def test_an_interrupted_unpacking_leaves_nothing(tmp_path):
    def interrupt(done, total):
        raise KeyboardInterrupt

    archive = pack(tmp_path / "weights.tar.gz", entry("a", b"1"))
    with pytest.raises(KeyboardInterrupt):
        unpack(archive, tmp_path / "folder", interrupt)
    assert os.listdir(tmp_path) == ["weights.tar.gz"]


def test_places_that_cannot_be_written(tmp_path):
    archive = pack(tmp_path / "weights.tar.gz", entry("a", b"1"))
    (tmp_path / "file").touch()
    assert "cannot be written" in refusal(unpack, archive, tmp_path / "file" / "folder")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept").touch()
    assert "cannot be written" in refusal(unpack, archive, tmp_path / "full")
    assert sorted(tree(tmp_path)) == ["file", "full", "full/kept", "weights.tar.gz"]
    assert "cannot read" in refusal(unpack, tmp_path / "none.tar.gz", tmp_path / "folder")
    assert "cannot read" in refusal(unpack, tmp_path / "full", tmp_path / "folder")


def test_another_process_that_unpacks_faster(tmp_path, monkeypatch):
    archive = pack_checkpoint(tmp_path / "weights.tar.gz")
    replace = os.replace

    def late(source, target):
        if not Path(target).exists():
            shutil.copytree(source, target)  # what the other process did in the meantime
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", late)
    loads(find_checkpoint(archive, cache=tmp_path / "cache"))
    assert len(list((tmp_path / "cache").iterdir())) == 1
