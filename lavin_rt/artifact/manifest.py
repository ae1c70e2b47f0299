"""The manifest of an artifact: a folder with one model compiled for ONNX Runtime, TensorRT, AOTInductor or
OpenVINO.

An artifact may come from anyone: whatever its manifest says is checked here before a file of it is opened.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar, cast

import torch

from lavin_rt.artifact.checked_files import REAL_FILES, check_hashes
from lavin_rt.artifact.parts import FileEntry, Part, Record, Target
from lavin_rt.artifact.sizes import parse_size, ranges_of, shown
from lavin_rt.artifact.speeds import parsed_speeds
from lavin_rt.devices import DTYPES
from lavin_rt.dit.config import DiTConfig
from lavin_rt.errors import InputError
from lavin_rt.files import Progress, Stamp, check_stamp
from lavin_rt.sampling.speeds import Speed

T = TypeVar("T")
FORMAT, VERSION = "lavin-rt artifact", 1
NAME = "manifest.json"
KINDS = ("onnx", "tensorrt", "aoti", "openvino")
KINDS_OF_CODE = ("tensorrt", "aoti")
KINDS_OF_ANY_DTYPE = ("openvino",)  # whose files are float32, and computed in what is asked for
MODULATION = "modulation.safetensors"
PARTS = ("denoiser", "vae_encoder", "vae_decoder")
KEPT = "denoiser_kept"  # the part with keys and values of the context among its inputs and outputs
MAX_BYTES = 16 * 2**20
# Options of TensorRT exports that only 0.1 had; its plans with one of them are not run.
ONLY_IN_0_1 = ("plugins", "refit", "strip_plan", "weight_streaming", "version_compatible")

_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_PART = re.compile(r"denoiser(?:_kept)?|vae_(?:encoder|decoder)(?:_clip[0-9]{1,4})?")


@dataclasses.dataclass(frozen=True, eq=False)
class Manifest:
    """What an artifact is.

    Attributes:
        folder: where it lies.
        kind: "onnx", "tensorrt", "aoti" or "openvino".
        dtype: that the networks compute in, of an OpenVINO artifact where nothing else is asked for.
        config: the transformer's.
        vae_fingerprint: of the VAE, as `lavin_rt.vae.model.vae_fingerprint`.
        latent_scaling: {"shift", "scale"} between the VAE and the transformer.
        size: of the pictures that the checkpoint was trained on, pixels a side.
        target: the device that it was made for.
        schedules: numbers of knots that the modulation file has.
        speeds: by name, those that it serves, `exact` always among them.
        parts: by name: "denoiser", "vae_encoder", "vae_decoder", "vae_encoder_clip5", ...
        files: every file but the manifest itself.
        versions, source, options, verification: of the export, for the record.
        stamps: by name, of the files that were checked.
    """

    folder: Path
    kind: str
    dtype: torch.dtype
    config: DiTConfig
    vae_fingerprint: str
    latent_scaling: dict[str, float]
    size: int
    target: Target
    schedules: tuple[int, ...]
    speeds: dict[str, Speed]
    parts: dict[str, Part]
    files: dict[str, FileEntry]
    versions: dict[str, str]
    source: Record
    options: Record
    verification: Record
    stamps: dict[str, Stamp] = dataclasses.field(default_factory=dict)

    @classmethod
    def read(cls, folder: str | os.PathLike) -> Manifest:
        """Reads and checks a folder's manifest; opens no other file.

        Raises:
            InputError: no manifest, one of another format or version, or one that contradicts itself.
        """
        return cls.of(Path(folder), _read_json(Path(folder) / NAME))

    @classmethod
    def of(cls, folder: Path, values: Mapping[str, object]) -> Manifest:
        """A folder's manifest from what its `manifest.json` holds; raises as `read` does."""
        path = folder / NAME
        if values.get("format") != FORMAT:
            raise InputError(f"{path} is not of a lavin-rt artifact (its format is {shown(values.get('format'))})")
        if values.get("version") != VERSION:
            raise InputError(
                f"{path} is of version {shown(values.get('version'))}, this package reads {VERSION}; export it again"
            )
        try:
            return _parsed(folder, values)
        except InputError as error:
            raise InputError(f"{path}: {error}; export it again") from None

    def computing_in(self, dtype: torch.dtype) -> Manifest:
        """The same artifact, computing in a dtype; an `InputError` where it was exported for another one alone."""
        if dtype != self.dtype and self.kind not in KINDS_OF_ANY_DTYPE:
            made, asked = (str(one).removeprefix("torch.") for one in (self.dtype, dtype))
            raise InputError(
                f"{self.folder} was exported in {made}, asked for {asked}; leave dtype out or export it again"
            )
        return dataclasses.replace(self, dtype=dtype)

    def check_speed(self, speed: Speed) -> None:
        """Raises an `InputError` for a speed that the artifact was not exported for, with those it has."""
        if speed in self.speeds.values():
            return
        name, has = speed.name, ", ".join(self.speeds)
        other = f"; its {name} is another one than this package's" if name in self.speeds else ""
        raise InputError(
            f"{self.folder} has no speed {name}; it has {has}{other}: choose one of these, or export it for that speed"
        )

    def check_files(self, progress: Progress | None = None) -> None:
        """Compares every file with its size and hash; `progress` and errors as of `check_hashes`."""
        self.stamps.update(check_hashes(self.folder, self.files, progress))

    def check_unchanged(self, *names: str) -> None:
        """Raises an `InputError` for a file that is gone, or another one, since `check_files`."""
        for name in names:
            if name in self.stamps:
                check_stamp(self.folder / name, self.stamps[name])

    def check_device(self, device: torch.device) -> None:
        """Raises an `InputError` where the artifact was made for another kind of device or another GPU."""
        wanted = self.target["device"]
        if wanted not in ("any", device.type):
            raise InputError(
                f"{self.folder} was exported for {wanted} and cannot run on {device}; "
                f"choose --device {wanted} or export it for {device.type}"
            )
        capability = self.target.get("compute_capability")
        if device.type != "cuda" or capability is None:
            return
        found = torch.cuda.get_device_capability(device)
        if tuple(capability) == found:
            return
        raise InputError(
            f"{self.folder} was exported for a GPU of compute capability {capability[0]}.{capability[1]}, {device} has "
            f"{found[0]}.{found[1]}; export it on this machine"
        )

    def record(self) -> Record:
        """What `lavin-rt info` shows."""
        denoiser = self.parts["denoiser"]
        shown = [
            "; ".join(f"{name} {least} to {most}" for name, (least, most) in one.items()) for one in ranges_of(denoiser)
        ]
        checked = self.verification
        sampling = checked.get("sampling")
        return {
            "artifact": str(self.folder),
            "kind": self.kind,
            "dtype": str(self.dtype).removeprefix("torch."),
            "int8": [name for name, part in self.parts.items() if part.get("quantized") == "int8"] or None,
            "for": _target_text(self.target),
            "exported from": self.source.get("name"),
            **dataclasses.asdict(self.config),
            "size": self.size,
            "schedules": list(self.schedules),
            "speeds": list(self.speeds),
            "parts": list(self.parts),
            "sizes (latents)": shown,
            "bytes": sum(entry["bytes"] for entry in self.files.values()),
            "vae_fingerprint": self.vae_fingerprint,
            "versions": [f"{name} {version}" for name, version in self.versions.items()],
            "verified": "yes" if checked.get("passed") is True else "no",
            "sampling error": sampling.get("error") if isinstance(sampling, dict) else None,
        }


def artifact_values(folder: str | os.PathLike) -> Record | None:
    """What a folder's `manifest.json` holds where it says that it is an artifact's (of whatever version), else None.

    Raises:
        InputError: it is one, but a link, or damaged, as a modulation beside it tells.
    """
    path = Path(folder) / NAME
    if not path.is_file():
        return None
    try:
        values = _read_json(Path(os.path.realpath(path)))
    except InputError:
        if path.with_name(MODULATION).is_file():
            raise
        return None
    if values.get("format") != FORMAT:
        return None
    if path.is_symlink():
        _read_json(path)  # says why it may not be one
    return values


def _read_json(path: Path) -> Record:
    try:
        status = os.lstat(path)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; expected the manifest of an artifact") from None
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{path} is no plain file; an artifact holds neither links nor devices: {REAL_FILES}")
    if status.st_size > MAX_BYTES:
        raise InputError(f"{path} has {status.st_size:,} bytes; no manifest is larger than {MAX_BYTES:,}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; expected the manifest of an artifact") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no JSON ({type(error).__name__}); export or fetch the artifact again") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} holds {type(values).__name__}, expected a JSON object; export the artifact again")
    return values


def _parsed(folder: Path, values: Mapping[str, object]) -> Manifest:
    """A folder's manifest, its fields checked."""
    kind, dtype = values.get("kind"), values.get("dtype")
    if kind not in KINDS:
        raise InputError(f"kind is {shown(kind)}, expected one of {', '.join(KINDS)}")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise InputError(f"dtype is {shown(dtype)}, expected one of {', '.join(DTYPES)}")
    config = DiTConfig.from_dict(_typed(values, "config", dict), "config")
    files = _typed(values, "files", dict)
    for name, entry in files.items():
        check_file_name(name)
        size, digest = (entry.get("bytes"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
        if type(size) is not int or size < 0 or not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
            raise InputError(f"the entry of {name} is {shown(entry)}, expected its bytes and sha256")
    if MODULATION not in files:
        raise InputError(f"it lists no {MODULATION}")
    parts = _typed(values, "parts", dict)
    for name, part in parts.items():
        _check_part(name, part, files)
    missing = [name for name in PARTS if name not in parts]
    if missing:
        raise InputError(f"it has no part {', '.join(missing)}")
    schedules = _typed(values, "schedules", list)
    if not schedules or not all(type(steps) is int and 2 <= steps <= 1000 for steps in schedules):
        raise InputError(f"schedules are {shown(schedules)}, expected numbers of knots")
    speeds = parsed_speeds(values.get("speeds"))
    keeping = [name for name, speed in speeds.items() if speed.keeps]
    if keeping and KEPT not in parts:
        raise InputError(f"it has the speed {keeping[0]}, but no part {KEPT}")
    scaling = _typed(values, "latent_scaling", dict)
    if not all(isinstance(scaling.get(name), float | int) for name in ("shift", "scale")):
        raise InputError(f"latent_scaling is {shown(scaling)}, expected shift and scale")
    size = _typed(values, "size", int)
    if size < 16 or size % 16:
        raise InputError(f"size is {size}, expected a positive multiple of 16")
    target = _typed(values, "target", dict)
    capability = target.get("compute_capability")
    pair = isinstance(capability, list) and len(capability) == 2 and all(type(number) is int for number in capability)
    if target.get("device") not in ("any", "cpu", "cuda") or not (capability is None or pair):
        raise InputError(f"target is {shown(target)}, expected a device and a compute capability")
    options = _typed(values, "options", dict)
    if kind == "tensorrt":
        _check_options(options, target)
    return Manifest(
        folder=folder,
        kind=kind,
        dtype=DTYPES[dtype],
        config=config,
        vae_fingerprint=_typed(values, "vae_fingerprint", str),
        latent_scaling=scaling,
        size=size,
        target=cast("Target", target),
        schedules=tuple(schedules),
        speeds=speeds,
        parts=parts,
        files=files,
        versions={str(k): str(v) for k, v in _typed(values, "versions", dict).items()},
        source=_typed(values, "source", dict),
        options=options,
        verification=_typed(values, "verification", dict),
    )


def check_file_name(name: object) -> None:
    """Raises an `InputError` unless `name` is a plain file name: no folder, nothing hidden, nothing special."""
    if not isinstance(name, str) or not _FILE.fullmatch(name) or name == NAME:
        raise InputError(f"it names the file {shown(name)}; expected plain names of files in its folder")


def _check_part(name: str, part: object, files: Mapping[str, object]) -> None:
    if not _PART.fullmatch(name):
        raise InputError(f"the part {shown(name)} is unknown")
    if not isinstance(part, dict):
        raise InputError(f"part {name} is {shown(part)}, expected an object")
    for file in [part.get("file"), *_typed(part, "weights", list)]:
        check_file_name(file)
        if file not in files:
            raise InputError(f"part {name} needs {file}, which is not among the files")
    sizes = set()
    for role in ("inputs", "outputs"):
        tensors = _typed(part, role, list)
        if not tensors:
            raise InputError(f"part {name} has no {role}")
        for tensor in tensors:
            shape = tensor.get("shape") if isinstance(tensor, dict) else None
            if not isinstance(shape, list) or not isinstance(tensor.get("name"), str):
                raise InputError(f"part {name} has {shown(tensor)} among its {role}")
            if tensor.get("dtype") not in list(DTYPES):
                raise InputError(f"part {name}: dtype of {tensor['name']} is {shown(tensor.get('dtype'))}")
            names = {parse_size(item)[1] for item in shape if not (type(item) is int and item > 0)}
            if role == "inputs":
                sizes |= names
            elif names - sizes:
                raise InputError(f"part {name}: no input gives the size {', '.join(sorted(names - sizes))}")
    ranges = part.get("ranges")
    for one in ranges if isinstance(ranges, list) and ranges else [ranges]:
        bounds = one.items() if isinstance(one, dict) else [("", None)]
        # Of frames whose keys and values are given there may be none.
        if not all(
            isinstance(b, list) and len(b) == 2 and all(type(n) is int and n >= (size != "kept_frames") for n in b)
            for size, b in bounds
        ):
            raise InputError(f"part {name} has the ranges {shown(ranges)}")


def _check_options(options: Mapping[str, object], target: Mapping[str, object]) -> None:
    given = [name for name in ONLY_IN_0_1 if options.get(name)]
    if target.get("hardware_compatibility") is not None:
        given.append("hardware_compatibility")
    if given:
        switches = " and ".join(f"--{name.replace('_', '-')}" for name in given)
        raise InputError(f"it was made with {switches}, which only lavin-rt 0.1 had")


def _typed(values: Mapping[str, object], name: str, kind: type[T]) -> T:
    value = values.get(name)
    if not isinstance(value, kind):
        raise InputError(f"{name} is {shown(value)}, expected {kind.__name__}")
    return value


def _target_text(target: Target) -> str:
    capability = target.get("compute_capability")
    text = "any device" if target["device"] == "any" else target["device"]
    return text + (f", compute capability {capability[0]}.{capability[1]}" if capability else "")
