"""Official checkpoints in and out: `lavin_dit.safetensors` and `stvae.pt` under their own key names.

The transformer's tensors are read straight into the joined parameters, so that loading needs no second copy of the
model, and the blocks' modulation linears (28 % of the parameters) stay in the file until a schedule's modulation table,
or a call of the plain model, asks for them.
"""

from __future__ import annotations

import dataclasses
import math
import os
import pickle
import re
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Any

import torch

from lavin_rt.checkpoint.files import Checkpoint
from lavin_rt.checkpoint.header import (
    CheckpointFile,
    check_dtype,
    check_tensors,
    common_dtype,
    dit_config,
    officially_named,
    open_checkpoint,
    quantized_message,
    report_renamed,
    report_unexpected,
)
from lavin_rt.checkpoint.names import modulation_layout, official_layout, resident_layout
from lavin_rt.checkpoint.tensors import FLOAT_DTYPES, SafetensorsFile, write_safetensors
from lavin_rt.dit.config import PRESETS, DiTConfig
from lavin_rt.dit.model import JDiT
from lavin_rt.errors import InputError
from lavin_rt.files import Progress, written_whole
from lavin_rt.host_state import own_state
from lavin_rt.vae.model import STVAE


@own_state()
def load_dit(
    path: str | os.PathLike | CheckpointFile,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    strict: bool = False,
    progress: Progress | None = None,
    resident_modulation: bool = False,
) -> JDiT:
    """Loads an official transformer checkpoint.

    Loading takes the memory of the model and 16 MiB (32 MiB, pinned, for a GPU). Parameters do not require gradients;
    for training load with `resident_modulation=True` and call `dit.requires_grad_()`.

    Args:
        path: `lavin_dit.safetensors`, float32, bfloat16, float16 or float64, or the index of one in several files; or
            what `open_checkpoint` made of it.
        device: where the parameters are to live.
        dtype: of the parameters; None keeps the file's (the narrowest that holds all of them, should they differ).
        strict: stop on unexpected tensors instead of naming them in one warning.
        progress: called with (bytes read, bytes to read).
        resident_modulation: load the modulation linears too; otherwise `dit.modulation_source` reads them from the file
            when they are asked for, and the file has to stay as it is while the model is in use.

    Raises:
        InputError: not a safetensors file, a truncated one, no config, one that does not fit the tensors, missing,
            misshapen or quantized tensors (and with `strict` unexpected ones); the message names them.
    """
    check_dtype(dtype)
    # Read again later, perhaps from another working folder.
    file = path if isinstance(path, CheckpointFile) else open_checkpoint(os.path.abspath(path))
    report_renamed(file.path, file.renamed)
    config = dit_config(file)
    everything = official_layout(config)
    report_unexpected(file.path, check_tensors(file, config, everything), strict)

    with torch.device("meta"):
        dit = JDiT(config)
    if not resident_modulation:
        for block in dit.blocks:
            block.modulation.drop()
        dit.modulation_source = ModulationInFile(file, config)
    dtype = dtype or common_dtype(file, everything)
    # Not `to_empty`, which makes tensors like those of the meta device, for which torch imports sympy: a second.
    dit._apply(lambda tensor: torch.empty(tensor.shape, dtype=dtype, device=device))
    parameters = dict(dit.named_parameters())
    places = everything if resident_modulation else resident_layout(config)
    places = sorted(places, key=lambda place: (file.entries[place.official].file, file.entries[place.official].start))
    done, total = 0, sum(file.entries[place.official].size for place in places)
    with file.reader() as reader:
        for place in places:
            reader.read_into(place.official, place.of(parameters[place.parameter].data))
            done += file.entries[place.official].size
            if progress is not None:
                progress(done, total)
    return dit.requires_grad_(False).eval()


@torch.no_grad()
def save_dit(dit: JDiT, path: str | os.PathLike, size: int | None = None) -> None:
    """Writes a model in the official layout, its config in the metadata, in the dtype that it has in memory.

    Writes tensor by tensor beside `path`, then renames. Modulation linears that stayed in a checkpoint's file are
    copied from there.

    Args:
        dit: the model.
        path: of the file.
        size: of the pictures that it was trained on, pixels a side, for the metadata; without it a reader takes the
            released model's.

    Raises:
        InputError: the file cannot be written, or the checkpoint that holds the modulation linears is gone or changed.
    """
    config, path = dit.config, Path(os.path.abspath(path))
    source = dit.modulation_source
    if source is None and any(block.modulation.weight is None for block in dit.blocks):
        raise InputError(
            "the model's modulation linears were dropped and no file holds them; load the model again to save it"
        )
    parameters = dict(dit.named_parameters())
    resident = resident_layout(config)
    layout = [(place.official, parameters[place.parameter].dtype, place.shape) for place in resident]
    for index in range(config.depth):
        layout += [(place.official, dit.dtype, place.shape) for place in modulation_layout(config, index)]

    def tensors() -> Iterator[torch.Tensor]:
        for place in resident:
            yield place.of(parameters[place.parameter])
        for index in range(config.depth):
            weight, bias = dit.modulation_parameters(index)
            for place in modulation_layout(config, index):
                yield place.of(weight if place.parameter.endswith("weight") else bias)

    replaces_source = isinstance(source, ModulationInFile) and path.resolve() == source.file.path.resolve()
    metadata = {"format": "pt", "config": config.to_json()} | ({} if size is None else {"size": str(size)})
    write_safetensors(path, layout, tensors(), metadata)
    if replaces_source:
        dit.modulation_source = ModulationInFile(SafetensorsFile.open(path), config)


@dataclasses.dataclass(frozen=True, eq=False)
class ModulationInFile:
    """The modulation linears of a checkpoint on disk: `source(block, device, dtype)` reads a weight and a bias of both
    streams.
    """

    file: SafetensorsFile
    config: DiTConfig

    def __call__(
        self, index: int, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One block's weight `[2, 4 D, D]` and bias `[2, 4 D]`; None keeps the file's dtype.

        Raises:
            InputError: the file is gone or has changed.
        """
        places = modulation_layout(self.config, index)
        dtype, hidden = dtype or common_dtype(self.file, places), self.config.hidden_size
        weight, bias = (torch.empty(2, 4 * hidden, *rest, dtype=dtype, device=device) for rest in ((hidden,), ()))
        with self.file.reader() as reader:
            for place in places:
                reader.read_into(place.official, place.of(weight if place.parameter.endswith("weight") else bias))
        return weight, bias


@own_state()
def load_vae(
    path: str | os.PathLike,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    strict: bool = False,
) -> STVAE:
    """Loads an official VAE checkpoint.

    Args:
        path: `stvae.safetensors`, or `stvae.pt`, a file of `torch.save` with a state dict or `{"state_dict": ...}`, of
            which tensors are read and no code is run.
        device: where the parameters are to live.
        dtype: of the parameters; None keeps the file's (the narrowest that holds all of them, should they differ).
        strict: stop on unexpected tensors instead of naming them in one warning.

    Raises:
        InputError: not such a file, a truncated one, a pickle with anything but tensors in it, missing, misshapen or
            quantized tensors (and with `strict` unexpected ones).
    """
    check_dtype(dtype)
    path = Path(path)
    found = _read_safetensors(path) if path.suffix in (".safetensors", ".json") else _read_pickle(path)
    tensors = officially_named(path, found)
    report_renamed(path, tensors.keys() != found.keys())
    dtypes = {name: tensor.dtype for name, tensor in tensors.items() if name.startswith(("encoder.", "decoder."))}
    quantized = [name for name, found in dtypes.items() if found not in FLOAT_DTYPES.values()]
    if quantized:
        raise InputError(quantized_message(path, quantized))
    if dtype is None:
        dtype = reduce(torch.promote_types, set(dtypes.values()), *([] if dtypes else [torch.float32]))
    try:
        vae, unexpected = STVAE.from_state_dict(tensors, dtype=dtype, device=device)
    except InputError as error:
        raise InputError(f"{path}: {error}; expected stvae.pt or stvae.safetensors") from None
    report_unexpected(path, unexpected, strict)
    return vae


def save_vae(vae: STVAE, path: str | os.PathLike) -> None:
    """Writes a VAE under its official names, as safetensors or, with the suffix .pt, as the official file has it.

    Raises:
        InputError: another suffix, or the file cannot be written.
    """
    path = Path(path)
    tensors = {name: tensor.detach() for name, tensor in vae.state_dict().items()}
    if path.suffix == ".safetensors":
        layout = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
        write_safetensors(path, layout, tensors.values(), {"format": "pt"})
    elif path.suffix == ".pt":
        state_dict = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        write_pickle({"state_dict": state_dict}, path)
    else:
        raise InputError(f"{path} ends in {path.suffix!r}; expected .safetensors or .pt")


def write_pickle(content: dict[str, Any], path: str | os.PathLike) -> None:
    """Writes what `torch.save` takes.

    Raises:
        InputError: the file cannot be written.
    """
    with written_whole(path) as partial, open(partial, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # the zip writer's, while it closes after one of the file's
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """A file's floating-point tensors; those of other dtypes only as placeholders on the meta device."""
    file, tensors = SafetensorsFile.open(path), {}
    with file.reader() as reader:
        for name, entry in file.entries.items():
            if entry.dtype in FLOAT_DTYPES:
                tensors[name] = torch.empty(entry.shape, dtype=FLOAT_DTYPES[entry.dtype])
                reader.read_into(name, tensors[name])
            else:
                tensors[name] = torch.empty(entry.shape, dtype=torch.uint8, device="meta")
    return tensors


def _read_pickle(path: Path) -> dict[str, torch.Tensor]:
    """The state dict in a file of `torch.save`; nothing that such a file may bring as code is run."""
    if not path.is_file():
        raise InputError(f"cannot read {path}: no such file; expected stvae.pt or stvae.safetensors")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"refers to {found[1]}" if found else "is no pickle of tensors"
        raise InputError(f"{path} {what} and was not loaded; expected a state dict of tensors alone") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; expected stvae.pt or stvae.safetensors") from None
    # A truncated or foreign file fails anywhere in the zip reader or the unpickler, in many ways.
    except Exception as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise InputError(f"{path} is truncated or no PyTorch file ({reason}); download or copy it again") from None
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in content.items()
    ):
        raise InputError(f"{path} holds no state dict of tensors; expected stvae.pt or stvae.safetensors")
    return content


@dataclasses.dataclass(frozen=True)
class Description:
    """What a checkpoint is, without its weights.

    Attributes:
        files: where it lies.
        config: the transformer's.
        parameters: of the transformer, modulation linears included.
        dtype: of the transformer's tensors, the narrowest that holds all of them.
        size: of the transformer's file, in bytes.
        unexpected: names of tensors that are not the transformer's.
    """

    files: Checkpoint
    config: DiTConfig
    parameters: int
    dtype: torch.dtype
    size: int
    unexpected: tuple[str, ...]

    def record(self) -> dict[str, Any]:
        """As plain values, for printing."""
        templates = self.files.templates
        return {
            "source": self.files.source,
            "transformer": str(self.files.dit),
            "vae": str(self.files.vae),
            "tasks": sorted(task.name for task in templates.iterdir() if task.is_dir()) if templates else [],
            "preset": next((name for name, config in PRESETS.items() if config == self.config), None),
            **dataclasses.asdict(self.config),
            "parameters": self.parameters,
            "dtype": str(self.dtype).removeprefix("torch."),
            "bytes": self.size,
            "unexpected": list(self.unexpected),
        }


def describe(files: Checkpoint) -> Description:
    """Reads and checks the transformer's header; an `InputError` for whatever `load_dit` would refuse."""
    file = files.read_header()
    config = dit_config(file)
    places = official_layout(config)
    unexpected = check_tensors(file, config, places)
    parameters = sum(math.prod(place.shape) for place in places)
    dtype, size = common_dtype(file, places), file.size
    return Description(files, config, parameters, dtype, size, tuple(unexpected))
