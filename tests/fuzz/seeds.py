"""Small sound files of every kind, from which the fuzzers start."""

from __future__ import annotations

import io
import json
import sys
import tarfile
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save as save_tensors

from lavin_rt.config import DiTConfig
from lavin_rt.official_layout import official_layout

sys.path.insert(0, str(Path(__file__).parents[1]))
import picture_files
import small_artifact

CONFIG = DiTConfig(hidden_size=6, depth=1, num_heads=1, kv_group=1)
LARGEST = 1200  # bytes of a picture among the seeds


def save(tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """A safetensors file as `readers.safetensors` and its twin in `bytes.h` put it together."""
    content = save_tensors(tensors, metadata)
    header = 8 + int.from_bytes(content[:8], "little")
    return b"\1" + content[8:header].rstrip() + b"\0" + content[header:]


def checkpoint() -> dict[str, bytes]:
    tensors = {place.official: torch.zeros(place.shape, dtype=torch.bfloat16) for place in official_layout(CONFIG)}
    return {
        "metadata": save(tensors, {"config": CONFIG.to_json(), "size": "64"}),
        "bare": save({"prompt_embed": torch.zeros(1, 12), "blocks.0.joint_attn.cond_k.weight": torch.zeros(6, 12)}),
    }


def vae() -> dict[str, bytes]:
    tensors = {"encoder.conv_in.weight": torch.zeros(2, 3), "decoder.conv_in.bias": torch.zeros(4)}
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    old = io.BytesIO()
    torch.save({"state_dict": tensors}, old, _use_new_zipfile_serialization=False)
    return {"zip": buffer.getvalue(), "legacy": old.getvalue(), "safetensors": save(tensors)}


def manifest(kind: str) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        values = small_artifact.read_manifest(small_artifact.write_small_artifact(Path(folder) / "artifact"))
    values["kind"] = kind
    values["versions"] = {"torch": torch.__version__}
    for part in values["parts"].values():
        part |= {"machine": "x86_64", "cpu_level": "avx2"} if kind == "aoti" else {}
    return {kind: json.dumps(values).encode(), f"{kind}-indented": json.dumps(values, indent=1).encode()}


def context() -> dict[str, bytes]:
    described = {
        "format": "lavin-rt encoded context", "version": "1", "vae_fingerprint": "0" * 32, "size": "16x16",
        "posterior": "mean", "pairs": "1", "frames_per_clip": "1",
    }  # fmt: skip
    latents = torch.zeros(1, 16, 2, 2, 2, dtype=torch.bfloat16)
    pack = {"latents": latents, "thumbnails": torch.zeros(2, 3, 2, 2, dtype=torch.uint8)}
    return {
        "plain": save({"latents": latents}, described),
        "pack": save(pack, {**described, "name": "depth", "words": "how far"}),
        "clip": save({"latents": torch.zeros(1, 16, 4, 2, 2)}, {**described, "frames_per_clip": "5"}),
    }


def archive() -> dict[str, bytes]:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, kind, link in (
            ("weights", tarfile.DIRTYPE, ""),
            ("weights/a.txt", tarfile.REGTYPE, ""),
            ("weights/b.txt", tarfile.SYMTYPE, "a.txt"),
            ("weights/c.txt", tarfile.LNKTYPE, "weights/a.txt"),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, link
            member.size = 3 if kind == tarfile.REGTYPE else 0
            tar.addfile(member, io.BytesIO(b"abc"))
    long = io.BytesIO()
    with tarfile.open(fileobj=long, mode="w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo("ü" * 90 + "/" + "x" * 120))
    return {"links": b"\1" + buffer.getvalue().rstrip(b"\0") + bytes(1024), "pax": b"\1" + long.getvalue()[:4096]}


def template() -> dict[str, bytes]:
    return {
        "pairs": b"0_input.png\n0_target.png\n1_input.jpg\n1_target.webp\n.hidden\nreadme.txt",
        "clips": b"depth/0_input/\ndepth/0_target/\n0_input/\n0_target/0000.png",
        "lonely": b"0_input.png\n0_b_input.png",
    }


def picture(suffixes: tuple[str, ...]) -> dict[str, bytes]:
    return {
        file.name: file.content
        for file in picture_files.files()
        if file.name.endswith(suffixes) and len(file.content) < LARGEST
    }


PYTHON = {
    "checkpoint": checkpoint,
    "vae": vae,
    "manifest": lambda: manifest("onnx"),
    "context": context,
    "archive": archive,
    "template": template,
    "picture": lambda: picture((".png", ".tif", ".jpg", ".webp", ".gif")),
}
NATIVE = {
    "manifest": lambda: manifest("aoti"),
    "safetensors": lambda: {**context(), **checkpoint()},
    "context": context,
    "picture": lambda: picture((".png",)),
}
