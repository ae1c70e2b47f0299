"""The weights of an ONNX artifact: held against the checkpoint to the bit, and widened to float32."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lavin_export import vae_parts
from lavin_rt.checkpoint import Checkpoint, load_vae
from lavin_rt.checkpoint_header import dit_config, open_checkpoint
from lavin_rt.errors import InputError, missing_extra
from lavin_rt.manifest import MODULATION, Manifest
from lavin_rt.onnx_file import check_external_files

if TYPE_CHECKING:
    import onnx_ir


def check_weights(manifest: Manifest, checkpoint: Checkpoint) -> None:
    """Compares every weight of an artifact's graphs with what the checkpoint's weights make, bit by bit.

    Raises:
        VerificationError: one that differs, by name.
        InputError: a graph that names other files, or a checkpoint of another model.
    """
    try:
        import onnx_ir
    except ImportError:
        raise missing_extra("onnx_ir", "onnx", "verifying an ONNX artifact") from None
    from lavin_export.to_onnx import denoiser_weights
    from lavin_export.verify import VerificationError

    file = open_checkpoint(checkpoint.dit)
    if dit_config(file) != manifest.config:
        raise InputError(f"{manifest.folder} was exported from another model than {checkpoint.dit}")
    vae = load_vae(checkpoint.vae, dtype=torch.float32)
    for name, part in manifest.parts.items():
        if name == "denoiser":
            weight = denoiser_weights(file, manifest.config, manifest.dtype)
        else:
            network = vae_parts.in_dtype(vae_parts.network_of(name, vae), manifest.dtype)
            weight = dict(network.named_parameters()).__getitem__
        for value in _external(_load(manifest, part["file"], part["weights"])):
            try:
                wanted = weight(value.name)
            except KeyError:
                raise VerificationError(f"{manifest.folder}: {name} has a weight {value.name}, of no model") from None
            # Linears are written transposed, as a MatMul wants them.
            if wanted.ndim == 2 and any(use.node.op_type == "MatMul" for use in value.uses()):
                wanted = wanted.T
            if wanted.dtype == torch.bfloat16 and value.dtype == onnx_ir.DataType.FLOAT:
                wanted = wanted.float()  # of what ONNX Runtime has no bfloat16 kernel for
            wanted = wanted.detach().contiguous().view(-1).view(torch.uint8)
            found = torch.frombuffer(bytearray(value.const_value.tobytes()), dtype=torch.uint8)
            if not torch.equal(wanted, found):
                raise VerificationError(
                    f"{manifest.folder}: the weight {value.name} of {name} is not the checkpoint's; "
                    "do not use this artifact"
                )


def widened(manifest: Manifest, folder: Path) -> Manifest:
    """A copy of a 16-bit artifact's graphs in float32, for a machine that cannot compute in 16 bits.

    Every value is exact; only arithmetic rounds less. One weight is in memory at a time.
    """
    import onnx_ir

    half = {torch.bfloat16: onnx_ir.DataType.BFLOAT16, torch.float16: onnx_ir.DataType.FLOAT16}[manifest.dtype]
    parts = {}
    for name, part in manifest.parts.items():
        model = _load(manifest, part["file"], part["weights"])
        graph = model.graph
        for value in (*graph.inputs, *(value for node in graph for value in node.outputs)):
            if value.dtype == half:
                value.dtype = onnx_ir.DataType.FLOAT
        for node in graph:
            if node.op_type == "Cast" and node.attributes["to"].as_int() == half:
                node.attributes["to"] = onnx_ir.AttrInt64("to", int(onnx_ir.DataType.FLOAT))
        data = folder / f"{part['file']}.data"
        with open(data, "xb") as file:
            for value in graph.initializers.values():
                array = value.const_value.numpy()
                external = isinstance(value.const_value, onnx_ir.ExternalTensor)
                if value.dtype == half:
                    array = array.astype("float32")
                    value.dtype = onnx_ir.DataType.FLOAT
                if not external:
                    value.const_value = onnx_ir.tensor(array, name=value.name)
                    continue
                offset, written = file.tell(), array.tobytes()
                file.write(written)
                value.const_value = onnx_ir.ExternalTensor(
                    data.name, offset, len(written), value.dtype, shape=value.shape, name=value.name, base_dir=folder
                )
        onnx_ir.save(model, folder / part["file"])
        float32 = {role: [{**tensor, "dtype": "float32"} for tensor in part[role]] for role in ("inputs", "outputs")}
        parts[name] = {**part, **float32, "weights": [data.name]}
    (folder / MODULATION).symlink_to((manifest.folder / MODULATION).resolve())
    return dataclasses.replace(manifest, folder=folder, dtype=torch.float32, parts=parts)


def _load(manifest: Manifest, file: str, weights: list[str]) -> onnx_ir.Model:
    try:
        import onnx_ir
    except ImportError:
        raise missing_extra("onnx_ir", "onnx", "verifying an ONNX artifact") from None
    check_external_files(manifest.folder / file, weights)
    return onnx_ir.load(manifest.folder / file)


def _external(model: onnx_ir.Model) -> list[onnx_ir.Value]:
    import onnx_ir

    values = model.graph.initializers.values()
    return [value for value in values if isinstance(value.const_value, onnx_ir.ExternalTensor)]
