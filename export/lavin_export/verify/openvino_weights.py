"""The weights of an OpenVINO artifact, which keep their names of the ONNX graph that it was made of."""

from __future__ import annotations

from collections.abc import Iterator

from lavin_export.verify.onnx_weights import Stored
from lavin_rt.artifact.manifest import Manifest
from lavin_rt.artifact.openvino import import_openvino, read_network
from lavin_rt.artifact.parts import Part


def stored_weights(manifest: Manifest, part: Part) -> Iterator[Stored]:
    """The constants of an OpenVINO network, mapped, one read at a time; its own small numbers are among them."""
    openvino = import_openvino("verifying an OpenVINO artifact")
    model = read_network(openvino, manifest.folder, part)
    for constant in (node for node in model.get_ops() if node.get_type_name() == "Constant"):
        uses = {port.get_node().get_type_name() for port in constant.output(0).get_target_inputs()}
        single = constant.get_element_type() == openvino.Type.f32
        yield constant.get_friendly_name(), "MatMul" in uses, single, constant.data.tobytes()
