"""Engines that are really built and run, where TensorRT and a GPU are at hand: no one has run these yet."""

from __future__ import annotations

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

PROFILE = "batch=1:1:3,cond_frames=3:5:9,target_frames=1:1:2,height=16:32:96,width=16:32:96"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exported_verified_and_captured(tmp_path, dtype):
    pytest.importorskip("tensorrt", reason="needs TensorRT")
    from support.onnx_exports import golden_checkpoint

    from lavin_export.to_tensorrt.build import BuildOptions
    from lavin_export.to_tensorrt.export import export_tensorrt
    from lavin_export.to_tensorrt.profiles import parse
    from lavin_rt.artifact.tensorrt import TensorRTSession

    checkpoint = golden_checkpoint(tmp_path / "checkpoint", "dit_c")
    options = BuildOptions(optimization_level=1)
    given = {"dtype": dtype, "profiles": [parse(PROFILE)], "options": options, "steps": (4,)}
    manifest = export_tensorrt(checkpoint, tmp_path / "artifact", quiet=True, **given)
    assert manifest.verification["passed"]
    build = manifest.parts["denoiser"]["build"]
    assert build["attention"]["nodes"] == manifest.config.depth
    device = torch.device("cuda", 0)
    session = TensorRTSession(manifest.folder, manifest.parts["denoiser"], manifest, device)
    config = manifest.config
    latents, cond = (torch.randn(2, 16, frames, 4, 6, device=device, dtype=dtype) for frames in (1, 5))
    rows = (
        torch.randn(config.depth, 2, 4, config.hidden_size, device=device),
        torch.randn(config.hidden_size).to(device),
    )
    (eager,) = session(latents, cond, *rows)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        session(latents, cond, *rows)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        (captured,) = session(latents, cond, *rows)
    captured.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.allclose(captured, eager, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
