"""The files of a checkpoint."""

from __future__ import annotations

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The files of a checkpoint.

    Attributes:
        dit: the transformer, `lavin_dit.safetensors`.
        vae: `stvae.safetensors` or `stvae.pt`.
        templates: the folder whose sub-folders are tasks, or None.
        source: where they come from, for records: the path as given, or `owner/name@commit`.
    """

    dit: Path
    vae: Path
    templates: Path | None
    source: str
