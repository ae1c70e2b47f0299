"""Writing an artifact: a folder that appears whole and verified, or not at all.

    with writing(output, "onnx", checkpoint, dtype, target, options, steps=(20,), speeds=["fast"]) as artifact:
        artifact.config, artifact.dtype, artifact.file      # the transformer's header, open for streaming
        artifact.vae()                                      # the checkpoint's STVAE, float32 on the CPU, loaded once
        ... write files into artifact.folder ...
        artifact.add_part("denoiser", "denoiser.onnx", ["denoiser.onnx.data"], inputs, outputs, ranges)
                                                            # as denoiser.specification and vae_parts.specification say
        artifact.write_modulation()                         # modulation.safetensors, read block by block
        artifact.versions["onnx"] = onnx.__version__
        verify_written(artifact, device)                    # writes errors and budgets into the manifest; raises

What it writes, `lavin_rt.artifact.manifest.Manifest` reads; nothing else passes between the two packages.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from lavin_rt.artifact.checked_files import file_sha256
from lavin_rt.artifact.manifest import FORMAT, KINDS, MODULATION, NAME, VERSION, Manifest
from lavin_rt.artifact.parts import FileEntry, Part, Ranges, Record, Target, TensorSpec
from lavin_rt.artifact.speeds import described, named_speeds, tables
from lavin_rt.checkpoint.files import Checkpoint
from lavin_rt.checkpoint.header import check_tensors, dit_config, open_checkpoint, picture_size
from lavin_rt.checkpoint.load import ModulationInFile, load_vae
from lavin_rt.checkpoint.names import official_layout, resident_layout
from lavin_rt.checkpoint.tensors import SafetensorsFile, write_safetensors
from lavin_rt.devices import DTYPES
from lavin_rt.dit.config import DiTConfig
from lavin_rt.dit.model import JDiT
from lavin_rt.dit.modulation import modulation_table
from lavin_rt.errors import InputError, one_line
from lavin_rt.files import check_writable, is_vacant, written_whole
from lavin_rt.find.model import HUB_ID
from lavin_rt.sampling.schedule import schedule
from lavin_rt.sampling.speeds import Speed
from lavin_rt.vae.model import LATENT_SCALE, LATENT_SHIFT, STVAE, vae_fingerprint

Speeds = Sequence[str] | Mapping[str, Speed]
KINDS_THAT_KEEP = ("aoti", "onnx", "openvino")  # keys and values of a context
ANY_DEVICE: Target = {"device": "any", "compute_capability": None}


@contextlib.contextmanager
def writing(
    output: str | os.PathLike,
    kind: str,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    target: Target | None = None,
    options: Record | None = None,
    steps: Sequence[int] = (20,),
    templates: bool = True,
    speeds: Speeds = (),
) -> Iterator[ArtifactWriter]:
    """A folder to export into, beside `output`, renamed to it when the block ends and removed if the block fails.

    Args:
        output: the artifact's folder; must not exist, or be empty.
        kind: "onnx", "tensorrt", "aoti" or "openvino".
        checkpoint: what `find_checkpoint` found.
        dtype: that the networks compute in: float32, float16 or bfloat16.
        target: device and compute capability, see `Manifest`; any device by default.
        options: of the export, for the record; plain values.
        steps: schedules to tabulate the modulation of.
        templates: copy the checkpoint's template folder, where it has one, so that tasks go by name.
        speeds: that it shall serve besides `exact`, by their names in `lavin_rt.sampling.speeds.SPEEDS`, or others with
            the names that they shall have.

    Raises:
        InputError: a folder that is in use, a checkpoint or template that cannot be read, a schedule that does not
            exist or comes twice, a speed that does not exist or cannot be served.
    """
    if kind not in KINDS or dtype not in DTYPES.values():
        raise InputError(f"cannot export {kind!r} in {dtype}; expected {', '.join(KINDS)} in {', '.join(DTYPES)}")
    if not steps:
        raise InputError("no schedule to export; expected at least one number of steps, such as 20")
    if len(set(steps)) < len(steps):
        raise InputError(f"steps are {list(steps)}, which names a schedule twice; give each once")
    for count in steps:
        schedule(count)
    served = named_speeds(speeds)
    for name, speed in served.items():
        check_served(name, speed, kind, max(steps))
    if os.path.lexists(output) and not (os.path.isdir(output) and is_vacant(output)):
        raise InputError(f"{output} is there and not empty; give another folder, or remove it first")
    check_writable(output, folder=True)
    with written_whole(output, folder=True) as partial:
        artifact = ArtifactWriter(
            partial, kind, checkpoint, dtype, target or ANY_DEVICE, options or {}, tuple(steps), served
        )
        if templates and checkpoint.templates is not None:  # before the work, which they may not spoil
            _copy_templates(checkpoint.templates, partial / "template")
        yield artifact
        artifact.write_manifest()


def _copy_templates(source: Path, folder: Path) -> None:
    try:
        shutil.copytree(source, folder, symlinks=False)
    except OSError as error:
        # Of several files, each with its place in the artifact and its reason, the first.
        several = isinstance(error, shutil.Error) and isinstance(error.args[0], list)
        path, reason = error.args[0][0][::2] if several else (error.filename or source, error.strerror or error)
        raise InputError(
            f"{path} cannot be copied into the artifact ({one_line(reason)}); mend or remove it, or leave the "
            "templates behind: --no-templates"
        ) from None


def check_served(name: str, speed: Speed, kind: str, steps: int) -> None:
    """Raises an `InputError` for a speed that artifacts of a kind cannot serve, or on none of the schedules up to one
    of so many knots.
    """
    if speed.keeps and kind not in KINDS_THAT_KEEP:
        raise InputError(
            f"speed {name} keeps keys and values of the context, which {kind} artifacts do not: leave it out, or give "
            "one that has no more than a grid of its own and held guidance"
        )
    speed.knots(None if speed.owns_grid else steps)


class ArtifactWriter:
    """An artifact being written; made by `writing`.

    Attributes:
        folder: where its files go.
        kind, dtype, target, options, steps: as given to `writing`.
        speeds: by name, `exact` among them.
        computes_in: that the networks compute in, where that is not the dtype of their files.
        config: the transformer's.
        file: the transformer's open header.
        checkpoint: its files.
        versions: of packages, for the record.
        parts: entered by `add_part`.
        verification: filled by `lavin_export.verify.artifact.verify_written`.
    """

    def __init__(
        self,
        folder: Path,
        kind: str,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        target: Target,
        options: Record,
        steps: tuple[int, ...],
        speeds: dict[str, Speed],
    ):
        self.folder, self.kind, self.checkpoint = folder, kind, checkpoint
        self.dtype, self.target, self.options, self.steps, self.speeds = dtype, target, options, steps, speeds
        self.computes_in = dtype
        self.file = open_checkpoint(os.path.abspath(checkpoint.dit))
        self.config: DiTConfig = dit_config(self.file)
        check_tensors(self.file, self.config, official_layout(self.config))
        self.versions = {"lavin_rt": importlib.metadata.version("lavin-rt"), "torch": torch.__version__}
        self.verification: Record = {}
        self.parts: dict[str, Part] = {}
        self._hashes: dict[tuple[str, int, int], FileEntry] = {}
        self._source: Record | None = None
        self._vae: STVAE | None = None

    @property
    def keeps(self) -> bool:
        """Whether a speed keeps keys and values of the context."""
        return any(speed.keeps for speed in self.speeds.values())

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def vae(self) -> STVAE:
        """The checkpoint's VAE, float32 on the CPU."""
        if self._vae is None:
            self._vae = load_vae(self.checkpoint.vae, dtype=torch.float32)
        return self._vae

    def add_part(
        self,
        name: str,
        file: str,
        weights: Sequence[str],
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        ranges: Ranges | list[Ranges],
        **more: Any,
    ) -> None:
        """Enters a compiled network, whose files lie in `folder`; the fields are those of `Manifest.parts`, and `more`
        is kept beside them for the record.
        """
        part: Part = {
            "file": file,
            "weights": list(weights),
            "inputs": list(inputs),
            "outputs": list(outputs),
            "ranges": ranges,
        }
        self.parts[name] = cast("Part", {**part, **more})

    def write_modulation(self) -> None:
        """Writes the modulation of every schedule and speed, float32, from the weights as the checkpoint has them.

        For the schedule of N knots `knots.N` `[N]`, `blocks.N` `[N - 1, depth, 2, 4, D]` and `head_scale.N`
        `[N - 1, D]`; `knots.speed.NAME` and so on for a speed that has a grid of its own, and `knots.context` for those
        that make the context's keys and values once a task. Reads one block's linears at a time.
        """
        dit = modulation_model(self.file, self.config)
        tensors: dict[str, torch.Tensor] = {}
        for name, knots in tables(self.steps, self.speeds).items():
            table = modulation_table(dit, knots[:-1])
            tensors |= {f"knots.{name}": knots, f"blocks.{name}": table.blocks, f"head_scale.{name}": table.head_scale}
        layout = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
        write_safetensors(self.folder / MODULATION, layout, tensors.values(), {"format": FORMAT})

    def write_manifest(self) -> Manifest:
        """Writes `manifest.json` over all files of the folder, and reads it back."""
        if self._source is None:
            self._source = {
                "name": _public_name(self.checkpoint),
                "dit_sha256": file_sha256(self.checkpoint.dit),
                "vae_sha256": file_sha256(self.checkpoint.vae),
            }
        values = {
            "format": FORMAT,
            "version": VERSION,
            "kind": self.kind,
            "dtype": str(self.computes_in).removeprefix("torch."),
            "config": dataclasses.asdict(self.config),
            "latent_scaling": {"shift": LATENT_SHIFT, "scale": LATENT_SCALE},
            "size": picture_size(self.file),
            "vae_fingerprint": vae_fingerprint(self.vae().state_dict()),
            "target": self.target,
            "versions": self.versions,
            "source": self._source,
            "schedules": list(self.steps),
            "speeds": {name: described(speed) for name, speed in self.speeds.items()},
            "parts": self.parts,
            "files": {path.name: self._entry(path) for path in sorted(self.folder.iterdir()) if _is_listed(path)},
            "verification": self.verification,
            "options": self.options,
        }
        (self.folder / NAME).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        return Manifest.read(self.folder)

    def _entry(self, path: Path) -> FileEntry:
        """Hash and size of a file, hashed again only when it has changed."""
        status = path.stat()
        key = (path.name, status.st_size, status.st_mtime_ns)
        if key not in self._hashes:
            self._hashes[key] = {"sha256": file_sha256(path), "bytes": status.st_size}
        return self._hashes[key]


def modulation_model(file: SafetensorsFile, config: DiTConfig) -> JDiT:
    """A float32 model of which only what makes modulation tables has memory; the rest is on the meta device."""
    with torch.device("meta"):
        dit = JDiT(config)
    for block in dit.blocks:
        block.modulation.drop()
    wanted = ("time_embedder.", "prompt_embed", "answer_embed", "head.modulation.")
    with file.reader() as reader:
        for place in resident_layout(config):
            if place.parameter.startswith(wanted):
                value = torch.empty(place.shape, dtype=torch.float32)
                reader.read_into(place.official, value)
                owner, _, name = place.parameter.rpartition(".")
                setattr(dit.get_submodule(owner), name, torch.nn.Parameter(value, requires_grad=False))
    dit.modulation_source = ModulationInFile(file, config)
    return dit


def _is_listed(path: Path) -> bool:
    """Whether the manifest names a path: all files but itself; templates are pictures, and may be changed."""
    return path.is_file() and path.name != NAME


def _public_name(checkpoint: Checkpoint) -> str:
    """A hub id with its commit, or the last part of a local path: an artifact is handed on, the maker's folders not."""
    source = checkpoint.source
    repository, at, _ = source.partition("@")
    if at and HUB_ID.fullmatch(repository) and not os.path.lexists(source):
        return source
    return os.path.basename(os.path.abspath(source))
