"""The files of a training: the state that it goes on from, with what it belongs to, and the lines of its logs."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lavin_rt.checkpoint.load import write_pickle
from lavin_rt.errors import InputError, listed, one_line

Origin = Mapping[str, str]
"""What a state belongs to and cannot go on with another of, by what a user calls it: `{"seed": "0", ...}`."""
ELSE = "choose another output folder, or remove that file to begin anew"
PARTS = {"network", "averaged", "optimizer", "step", "seconds", "samples"}


def save_state(state: dict[str, Any], origin: Origin, file: Path) -> None:
    """Writes a state with its origin."""
    write_pickle(state | {"origin": dict(origin)}, file)


def load_state(file: Path, origin: Origin) -> dict[str, Any]:
    """A state, on the processor. One from before origins were kept is taken, with a warning, for this origin's.

    Raises:
        InputError: it is damaged, of another origin, naming what differs, or of weights that ran away.
    """
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        missing = PARTS - state.keys()
    except MemoryError:
        raise
    except Exception as error:  # damage shows anywhere in the zip reader or the unpickler, in many ways
        raise InputError(f"{file} cannot be read ({one_line(error, 100)}); {ELSE}") from None
    if missing:
        raise InputError(f"{file} is no training's state, without {listed(sorted(missing))}; {ELSE}")
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


def add_line(record: dict[str, Any], file: Path) -> None:
    """Adds a line to a log and shows it; of several processes the first one does.

    Raises:
        InputError: the file cannot be written.
    """
    if dist.is_initialized() and dist.get_rank():
        return
    line = json.dumps(record)
    try:
        with open(file, "a", encoding="utf-8") as log:
            log.write(line + "\n")
    except OSError as error:
        raise InputError(f"{file}: cannot be written ({error.strerror}); make room and run again to go on") from None
    print(line, file=sys.stderr, flush=True)
