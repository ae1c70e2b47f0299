"""An artifact made by hand in a second: graphs of one layer where a model's would be, but everything else as exported.

The denoiser's velocity is `weight * latents`, the encoder averages blocks of 8 x 8 pixels into every channel, the
decoder repeats the mean of the channels. Besides `exact` it serves the speed `held`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file

from lavin_rt.artifact.manifest import FORMAT, PARTS, VERSION
from lavin_rt.dit.config import DiTConfig
from lavin_rt.sampling.schedule import schedule
from lavin_rt.sampling.speeds import Speed

CONFIG = DiTConfig(hidden_size=24, depth=1, num_heads=1, kv_group=1)
GRID = ["height", "width"]
RANGES = {"batch": [1, 4], "target_frames": [1, 2], "cond_frames": [1, 9], "height": [2, 64], "width": [2, 64]}
WEIGHT = -0.5
HELD = Speed(times=(0, 0.25, 0.5, 1), guided={0, 1})


def write_small_artifact(folder: Path) -> Path:
    """Writes the artifact and returns its folder."""
    folder.mkdir()
    latents = ("latents", ["batch", 16, "target_frames", *GRID])
    cond = ("cond_latents", ["batch", 16, "cond_frames", *GRID])
    modulation, head_scale = ("modulation", [1, 2, 4, 24]), ("head_scale", [24])
    node = helper.make_node("Mul", ["latents", "weight"], ["velocity"])
    inputs = [latents, cond, modulation, head_scale]
    parts = {
        "denoiser": _part(
            folder, "denoiser", [node], {"weight": np.float32([WEIGHT])}, inputs, [("velocity", latents[1])], RANGES
        )
    }
    pixels, latent = ("pixels", [1, 3, 1, "8*rows", "8*columns"]), [1, 16, 1, "rows", "columns"]
    sizes = {"rows": [1, 64], "columns": [1, 64]}
    encoder = np.full((32, 3, 1, 8, 8), 1 / 192, dtype=np.float32)
    strides = {"strides": [1, 8, 8]}
    nodes = [
        helper.make_node("Conv", ["pixels", "weight"], ["moments"], **strides),
        helper.make_node("Split", ["moments"], ["mean", "logvar"], axis=1, num_outputs=2),
    ]
    outputs = [("mean", latent), ("logvar", latent)]
    parts["vae_encoder"] = _part(folder, "vae_encoder", nodes, {"weight": encoder}, [pixels], outputs, sizes)
    decoder = np.full((16, 3, 1, 8, 8), 1 / 16, dtype=np.float32)
    nodes = [helper.make_node("ConvTranspose", ["latents", "weight"], ["pixels"], **strides)]
    parts["vae_decoder"] = _part(
        folder, "vae_decoder", nodes, {"weight": decoder}, [("latents", latent)], [pixels], sizes
    )
    tables = {}
    for name, knots in {"20": schedule(20), "speed.held": HELD.knots()}.items():
        count = len(knots) - 1
        tables |= {f"knots.{name}": knots, f"blocks.{name}": torch.zeros(count, 1, 2, 4, 24)}
        tables[f"head_scale.{name}"] = torch.zeros(count, 24)
    save_file(tables, folder / "modulation.safetensors")
    values = {
        "format": FORMAT,
        "version": VERSION,
        "kind": "onnx",
        "dtype": "float32",
        "config": dataclasses.asdict(CONFIG),
        "size": 64,
        "latent_scaling": {"shift": 0.032470703125, "scale": 1.08936170213},
        "target": {"device": "any", "compute_capability": None},
        "vae_fingerprint": "0" * 32,
        "versions": {},
        "source": {"name": "by hand"},
        "schedules": [20],
        "speeds": {"exact": {}, "held": {"times": [0, 0.25, 0.5, 1], "guided": [0, 1]}},
        "parts": parts,
        "files": {},
        "verification": {},
        "options": {},
    }
    write_manifest(folder, values)
    return folder


def write_manifest(folder: Path, values: dict) -> None:
    """Writes a manifest with the hashes of the files that are there."""
    files = {
        path.name: {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "bytes": path.stat().st_size}
        for path in sorted(folder.iterdir())
        if path.name != "manifest.json" and path.is_file()
    }
    (folder / "manifest.json").write_text(json.dumps({**values, "files": files}))


def read_manifest(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def _part(folder: Path, name: str, nodes: list, weights: dict, inputs: list, outputs: list, ranges: dict) -> dict:
    """Writes one graph with external weights; returns its entry in the manifest."""
    data, initialisers = f"{name}.onnx.data", []
    with open(folder / data, "wb") as file:
        for weight_name, array in weights.items():
            tensor = numpy_helper.from_array(array, weight_name)
            place = {"location": data, "offset": str(file.tell()), "length": str(file.write(array.tobytes()))}
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            tensor.external_data.extend(onnx.StringStringEntryProto(key=k, value=v) for k, v in place.items())
            initialisers.append(tensor)
    ends = [
        [helper.make_tensor_value_info(tensor, TensorProto.FLOAT, shape) for tensor, shape in tensors]
        for tensors in (inputs, outputs)
    ]
    graph = helper.make_graph(nodes, name, *ends, initializer=initialisers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    (folder / f"{name}.onnx").write_bytes(model.SerializeToString())
    described = [[{"name": n, "dtype": "float32", "shape": shape} for n, shape in ts] for ts in (inputs, outputs)]
    return {
        "file": f"{name}.onnx",
        "weights": [data],
        "inputs": described[0],
        "outputs": described[1],
        "ranges": ranges,
    }


def add_parts(writer) -> None:
    """Adds parts that hold nothing, for tests of what is around them."""
    for name in PARTS:
        (writer.folder / name).write_bytes(name.encode())
        inputs, outputs = ([{"name": tensor, "dtype": "float32", "shape": ["rows"]}] for tensor in ("x", "y"))
        writer.add_part(name, name, [], inputs, outputs, {"rows": [1, 2]})
