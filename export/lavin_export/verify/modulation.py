"""The modulation of an artifact, held against what the checkpoint's weights make of every evaluation."""

from __future__ import annotations

import torch

from lavin_export.errors import VerificationError
from lavin_export.writer import modulation_model
from lavin_rt.artifact.manifest import MODULATION, Manifest
from lavin_rt.artifact.speeds import read_table, tables
from lavin_rt.checkpoint.files import Checkpoint
from lavin_rt.checkpoint.header import dit_config, open_checkpoint
from lavin_rt.dit.modulation import modulation_table
from lavin_rt.errors import InputError

ALLOWED = 1e-5  # relative, of a block's modulation or the head's at one evaluation


def check_modulation(manifest: Manifest, checkpoint: Checkpoint) -> None:
    """Compares the tables of all schedules and speeds, row by row: a run reads few of them.

    Raises:
        VerificationError: a row that differs, by its table.
        InputError: knots that are not this package's, a damaged file, or a checkpoint of another model.
    """
    file = open_checkpoint(checkpoint.dit)
    if dit_config(file) != manifest.config:
        raise InputError(f"{manifest.folder} was exported from another model than {checkpoint.dit}")
    named = tables(manifest.schedules, manifest.speeds)
    counts = [len(knots) - 1 for knots in named.values()]
    # At once, as every block is read from the file for it.
    right = modulation_table(
        modulation_model(file, manifest.config), torch.cat([knots[:-1] for knots in named.values()])
    )
    parts = zip(named.items(), right.blocks.split(counts), right.head_scale.split(counts), strict=True)
    for (name, knots), blocks, head_scale in parts:
        found = read_table(manifest.folder / MODULATION, [name], manifest.config, knots)
        for part, wanted in (("blocks", blocks.flatten(2)), ("head_scale", head_scale.unsqueeze(1))):
            error = (found[part].reshape(wanted.shape) - wanted).norm(dim=-1)
            # Weights that are zero make zeros.
            error = (error / wanted.norm(dim=-1).clamp_min(torch.finfo(wanted.dtype).tiny)).amax(1)
            for row, off in enumerate(error.tolist()):
                if not off <= ALLOWED:  # NaN, too
                    raise VerificationError(
                        f"{manifest.folder}: row {row} of {part}.{name} in {MODULATION} is off by {off:.2e} from the "
                        f"checkpoint's, allowed are {ALLOWED:.2e}; do not use this artifact"
                    )
