"""The demo's choice of pairs, and its sheet."""

from __future__ import annotations

import sys

import numpy as np
from PIL import Image

from lavin_rt.cli import demo
from lavin_rt.find.model import BUNDLED
from lavin_rt.pictures.context import read_template


def test_every_row_asks_a_scene_and_the_cup():
    """The cup's photograph is the one of its split with such a red; scenes have nothing like it all over."""
    for row in demo.ROWS:
        context, queries = row.asked()
        assert len(context) == demo.PAIRS and len(queries) == 2
        shown = {pair[0].tobytes() for pair in context}
        assert not shown & {query[0].tobytes() for query in queries}
        (scene, _), (photograph, *truth) = queries
        assert len(truth) == (row.photograph is not None)
        # What would be right where it is a picture, else the photograph itself.
        picture = truth[0] if row.task in ("deblurring", "colorization") else photograph
        red = [np.mean(part[..., 0].astype(int) - part[..., 2]) for part in (picture, scene)]
        assert red[0] > 60 > red[1], row


def test_the_last_rows_differ_in_their_pairs_targets_alone():
    (first, asked), (other, again) = (row.asked() for row in demo.ROWS[-2:])
    assert all(np.array_equal(a[0], b[0]) and not np.array_equal(a[1], b[1]) for a, b in zip(first, other, strict=True))
    assert all(np.array_equal(a[0], b[0]) for a, b in zip(asked, again, strict=True))


def test_a_folder_that_is_a_file_is_refused_at_once(tmp_path, monkeypatch, capsys):
    (tmp_path / "demo").write_text("")
    monkeypatch.setattr(sys, "argv", ["demo", "--output", str(tmp_path / "demo")])
    assert demo.main() == 2 and "demo" in capsys.readouterr().err


def test_the_sheet_leaves_unknown_truths_white():
    cell = np.zeros((64, 64, 3), np.uint8)
    drawn = np.asarray(demo.sheet([("depth", [cell] * 7 + [None])]))
    assert drawn.shape == (2 * demo.STRIP + demo.CELL + demo.GAP, 8 * (demo.CELL + demo.GAP) + demo.GAP, 3)
    bottom = drawn[-demo.GAP - 1]
    assert (bottom[demo.GAP] == 0).all() and (bottom[-demo.CELL :] == 255).all()
    pair = read_template(BUNDLED / "template" / "hue")[0]
    assert Image.open(pair.input).size == (64, 64)
