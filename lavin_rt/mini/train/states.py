"""The file that a training goes on from, and what it belongs to."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lavin_rt.errors import InputError, one_line
from lavin_rt.files import written_whole

Origin = Mapping[str, str]
"""What a state belongs to and cannot go on with another of, by what a user calls it: `{"seed": "0", ...}`."""
ELSE = "choose another output folder, or remove that file to begin anew"


def save_state(state: dict[str, Any], origin: Origin, file: Path) -> None:
    """Writes a state with its origin."""
    with written_whole(file) as partial:
        torch.save(state | {"origin": dict(origin)}, partial)


def load_state(file: Path, origin: Origin) -> dict[str, Any]:
    """A state, on the processor. One from before origins were kept is taken, with a warning, for this origin's.

    Raises:
        InputError: it is of another origin, naming what differs, or of weights that ran away.
    """
    state = torch.load(file, map_location="cpu", weights_only=True)
    if "origin" not in state:
        print(f"warning: {file} does not say what it was trained on; going on with it", file=sys.stderr, flush=True)
    found = state.get("origin", {})
    other = [
        f"another {name} ({one_line(found[name], 40)}, now {one_line(value, 40)})"
        for name, value in origin.items()
        if found.get(name, value) != value
    ]
    if other:
        raise InputError(f"{file} belongs to {' and '.join(other)}; {ELSE}")
    if not all(bool(value.isfinite().all()) for part in ("network", "averaged") for value in state[part].values()):
        raise InputError(f"{file}: its weights are not all finite numbers; {ELSE}")
    return state
