"""OpenVINO artifacts for tests: the small one made by hand, and the golden model's, exported once."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.once import made_once
from support.onnx_exports import golden_checkpoint
from support.small_artifact import read_manifest, write_manifest, write_small_artifact


def write_small_openvino(folder: Path) -> Path:
    """The artifact of `write_small_artifact` with its graphs in OpenVINO's form; returns its folder."""
    import openvino

    from lavin_rt.artifact.openvino import core

    write_small_artifact(folder)
    values = {**read_manifest(folder), "kind": "openvino", "target": {"device": "cpu", "compute_capability": None}}
    for name, part in values["parts"].items():
        model = core(openvino).read_model(str(folder / part["file"]))
        openvino.save_model(model, str(folder / f"{name}.xml"), compress_to_fp16=False)
        del model
        for file in (part["file"], *part["weights"]):
            (folder / file).unlink()
        part |= {"file": f"{name}.xml", "weights": [f"{name}.bin"]}
    write_manifest(folder, values)
    return folder


def exported_openvino(temporary: pytest.TempPathFactory) -> Path:
    """A folder with the golden model's `checkpoint`, and its verified `artifact` with clips of five frames; minutes."""

    def export(folder: Path) -> None:
        from lavin_export.to_openvino.export import export_openvino

        checkpoint = golden_checkpoint(folder / "checkpoint", "dit_c")
        export_openvino(checkpoint, folder / "artifact", steps=(20, 8), clip_frames=[5])

    return made_once(temporary, "golden-openvino", export)
