"""The files of a checkpoint."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from lavin_rt.checkpoint.header import CheckpointFile, open_checkpoint


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The files of a checkpoint.

    Attributes:
        dit: the transformer, `lavin_dit.safetensors`.
        vae: `stvae.safetensors` or `stvae.pt`.
        templates: the folder whose sub-folders are tasks, or None.
        source: where they come from, for records: the path as given, or `owner/name@commit`.
        header: of the transformer's file, where it has been read.
    """

    dit: Path
    vae: Path
    templates: Path | None
    source: str
    header: CheckpointFile | None = dataclasses.field(default=None, compare=False, repr=False)

    def read_header(self) -> CheckpointFile:
        """The transformer's header, read now where it was not before; an `InputError` as `open_checkpoint`."""
        # By its absolute path: tensors are read later, perhaps from another working folder.
        return self.header or open_checkpoint(os.path.abspath(self.dit))
