"""What a transformer checkpoint's header tells: its configuration, and whether its tensors are the expected ones."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import reprlib
import warnings
from collections.abc import Iterable, Mapping
from functools import reduce
from pathlib import Path
from typing import TypeVar

import torch

from lavin_rt.checkpoint.names import WRAPPERS, Place, official_name
from lavin_rt.checkpoint.tensors import FLOAT_DTYPES, SafetensorsFile
from lavin_rt.dit.config import PRESETS, DiTConfig
from lavin_rt.errors import InputError, listed

T = TypeVar("T")

RELEASED = PRESETS["lavin-dit-3.4b"]
RELEASED_SIZE = 512


@dataclasses.dataclass(frozen=True, eq=False)
class CheckpointFile(SafetensorsFile):
    """A checkpoint's file, tensors by their official names; `renamed` where wrappers had changed those."""

    renamed: bool = False


def open_checkpoint(path: str | os.PathLike) -> CheckpointFile:
    """Reads a checkpoint's header, or those of all files that an index names.

    Raises:
        InputError: as `SafetensorsFile.open`, or two tensors that are one by their official name.
    """
    file = SafetensorsFile.open(path)
    entries = officially_named(path, file.entries)
    return CheckpointFile(file.path, entries, file.metadata, file.files, entries.keys() != file.entries.keys())


def officially_named(path: str | os.PathLike, found: Mapping[str, T]) -> dict[str, T]:
    """What a file has by name, by official names instead.

    Raises:
        InputError: two that are one by their official name.
    """
    entries = {official_name(name): entry for name, entry in found.items()}
    if len(entries) < len(found):
        raise InputError(f"{path} holds tensors with and without the prefixes of wrappers; write it again without them")
    return entries


def report_renamed(path: str | os.PathLike, renamed: bool) -> None:
    """Says in one warning that a checkpoint was saved from a wrapped model."""
    if renamed:
        wrappers = " or ".join(f"{name}." for name in WRAPPERS)
        warnings.warn(f"{path} was saved from a wrapped model: {wrappers} is left out of its names", stacklevel=4)


def dit_config(file: SafetensorsFile) -> DiTConfig:
    """A transformer checkpoint's configuration: from its metadata, `config.json` beside it, or as the released one.

    Raises:
        InputError: there is none, it is malformed, it does not fit the tensors, or the file holds no such transformer.
    """
    found = _read_off_shapes(file)
    beside = file.path.with_name("config.json")
    if "config" in file.metadata:
        config, source = _config_from_json(file.metadata["config"], f"{file.path} (metadata)"), "its metadata"
    elif beside.is_file():
        try:
            text = beside.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise InputError(f"cannot read {beside}: {error}; expected the checkpoint's config in JSON") from None
        config, source = _config_from_json(text, str(beside)), str(beside)
    elif (found["depth"][0], found["hidden_size"][0]) == (RELEASED.depth, RELEASED.hidden_size):
        config, source = RELEASED, "the released model's config"
    else:
        raise InputError(
            f"{file.path} has no config, neither in its metadata nor in {beside}, and is not the released model (it "
            f"has depth {found['depth'][0]}, hidden size {found['hidden_size'][0]}); write hidden_size, depth, "
            "num_heads and kv_group as JSON into that config.json"
        )
    for name, (value, where) in found.items():
        says = getattr(config, name)
        if value != says:
            name = "hidden_size / kv_group" if name == "kv_size" else name
            raise InputError(f"{file.path}: {source} says {name} = {says}, but {where}; correct the config")
    return config


def picture_size(file: SafetensorsFile) -> int:
    """The size of the pictures that a transformer was trained on, pixels a side, from its metadata, or the released
    one's.

    Raises:
        InputError: metadata that say no such size.
    """
    text = file.metadata.get("size", str(RELEASED_SIZE))
    if not re.fullmatch(r"[1-9][0-9]{1,4}", text) or int(text) % 16:
        raise InputError(f"{file.path}: its metadata say size {reprlib.repr(text)}; expected a multiple of 16")
    return int(text)


def _config_from_json(text: str, source: str) -> DiTConfig:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{source}: the config is no JSON ({error}); correct it") from None
    if not isinstance(values, dict):
        raise InputError(f"{source}: the config is {type(values).__name__}, expected a JSON object; correct it")
    return DiTConfig.from_dict(values, source)


def _read_off_shapes(file: SafetensorsFile) -> dict[str, tuple[int, str]]:
    """What the tensors' shapes tell of the configuration, as far as they are there: the value and where it shows."""

    def size(name: str, dimension: int) -> int | None:
        entry = file.entries.get(name)
        return entry.shape[dimension] if entry is not None and len(entry.shape) > dimension else None

    blocks = [match for match in (re.match(r"blocks\.(\d{1,4})\.joint_attn\.", name) for name in file.entries) if match]
    hidden = size("prompt_embed", 1) or size("answer_embed", 1)
    if not blocks or hidden is None:
        first = listed(sorted(file.entries), 3) or "none"
        raise InputError(
            f"{file.path} is no LaVin-DiT transformer: its tensors are {first}; expected lavin_dit.safetensors"
        )
    depth = 1 + max(int(match[1]) for match in blocks)
    found = {
        "hidden_size": (hidden, f"prompt_embed has width {hidden}"),
        "depth": (depth, f"the file holds {depth} blocks"),
    }
    key, embedder = "blocks.0.joint_attn.cond_k.weight", "x_embedder.0.weight"
    if (rows := size(key, 0)) is not None:
        found["kv_size"] = (rows, f"{key} has {rows} rows")
    if (features := size(embedder, 1)) is not None:
        found["in_channels"] = (features // 4, f"{embedder} has {features} columns")
    return found


def check_tensors(file: SafetensorsFile, config: DiTConfig, places: Iterable[Place]) -> list[str]:
    """Stops on missing, misshapen or quantized tensors, all in one error; returns the names of unexpected ones."""
    expected = {place.official: place.shape for place in places}
    missing = [name for name in expected if name not in file.entries]
    present = {name: file.entries[name] for name in expected if name in file.entries}
    misshapen = [
        f"{name} (is {list(entry.shape)}, expected {list(expected[name])})"
        for name, entry in present.items()
        if entry.shape != expected[name]
    ]
    quantized = [f"{name} ({entry.dtype})" for name, entry in present.items() if entry.dtype not in FLOAT_DTYPES]
    if quantized:
        raise InputError(quantized_message(file.path, quantized))
    problems = []
    if missing:
        problems.append(f"misses {len(missing)} of {len(expected)} tensors: {listed(missing)}")
    if misshapen:
        problems.append(f"has {len(misshapen)} misshapen tensors: {listed(misshapen)}")
    if problems:
        raise InputError(
            f"{file.path} {'; '.join(problems)}; expected a LaVin-DiT transformer of {config}: "
            "download it again or correct its config"
        )
    return [name for name in file.entries if name not in expected]


def report_unexpected(path: str | os.PathLike, names: Iterable[str], strict: bool) -> None:
    """Names unexpected tensors in one warning, or with `strict` in an `InputError`."""
    names = sorted(names)
    if not names:
        return
    found = f"{path} holds {len(names)} tensors that this model does not have: {listed(names)}"
    if strict:
        raise InputError(f"{found}; expected none (strict): load without strict to ignore them")
    warnings.warn(f"{found}; they are ignored", stacklevel=4)


def quantized_message(path: Path, names: list[str]) -> str:
    return (
        f"{path} has {len(names)} tensors that are not floating point of 16 to 64 bits: {listed(names)}; "
        "quantized checkpoints cannot be used, get the original; what was merely cast to float8 can be cast back and "
        "saved, as exact as it is"
    )


def common_dtype(file: SafetensorsFile, places: Iterable[Place]) -> torch.dtype:
    """The narrowest dtype that holds all these tensors exactly."""
    return reduce(torch.promote_types, {FLOAT_DTYPES[file.entries[place.official].dtype] for place in places})


def check_dtype(dtype: torch.dtype | None) -> None:
    if dtype is not None and dtype not in FLOAT_DTYPES.values():
        raise InputError(f"dtype is {dtype}; expected one of {', '.join(map(str, FLOAT_DTYPES.values()))}")
