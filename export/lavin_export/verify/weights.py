"""The weights of an ONNX or OpenVINO artifact, held against the checkpoint to the bit."""

from __future__ import annotations

import torch

from lavin_export.errors import VerificationError
from lavin_export.networks import vae as vae_parts
from lavin_export.networks.weights import denoiser_weights, weight_names
from lavin_export.verify import onnx_weights, openvino_weights
from lavin_export.verify.int8 import in_int8
from lavin_rt.artifact.manifest import KEPT, Manifest
from lavin_rt.checkpoint.files import Checkpoint
from lavin_rt.checkpoint.header import open_checkpoint
from lavin_rt.checkpoint.load import load_vae


def check_weights(manifest: Manifest, checkpoint: Checkpoint) -> None:
    """Compares every weight of an artifact's graphs with what the checkpoint's weights make, bit by bit.

    Raises:
        VerificationError: one that differs or is missing, by name.
        InputError: a graph that names other files.
    """
    file = open_checkpoint(checkpoint.dit)
    vae = load_vae(checkpoint.vae, dtype=torch.float32)
    onnx = manifest.kind == "onnx"
    stored_weights = onnx_weights.stored_weights if onnx else openvino_weights.stored_weights
    dtype = manifest.dtype if onnx else torch.float32
    for part_name, part in manifest.parts.items():
        if part_name == "denoiser" and in_int8(manifest):
            continue  # its results tell
        if part_name in ("denoiser", KEPT):
            weight, names = denoiser_weights(file, manifest.config, dtype), set(weight_names(manifest.config))
        else:
            network = vae_parts.in_dtype(vae_parts.network_of(part_name, vae), dtype)
            parameters = dict(network.named_parameters())
            weight, names = parameters.__getitem__, set(parameters)
        found = set()
        for name, multiplied, single, content in stored_weights(manifest, part):
            if name not in names:
                if not onnx:
                    continue  # OpenVINO's own axes and sizes
                raise VerificationError(f"{manifest.folder}: {part_name} has a weight {name}, of no model")
            found.add(name)
            wanted = weight(name)
            # Linears are written transposed, as a MatMul wants them.
            if wanted.ndim == 2 and multiplied:
                wanted = wanted.T
            if wanted.dtype == torch.bfloat16 and single:
                wanted = wanted.float()  # of what ONNX Runtime has no bfloat16 kernel for
            wanted = wanted.detach().contiguous().view(-1).view(torch.uint8)
            if not torch.equal(wanted, torch.frombuffer(bytearray(content), dtype=torch.uint8)):
                raise VerificationError(
                    f"{manifest.folder}: the weight {name} of {part_name} is not the checkpoint's; "
                    "do not use this artifact"
                )
        if found != names:
            raise VerificationError(
                f"{manifest.folder}: {part_name} lacks the weight {min(names - found)}; do not use this artifact"
            )
