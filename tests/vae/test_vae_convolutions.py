"""How the autoencoder convolves: float32 in full, pictures in two dimensions, clips with a warning where needed."""

from __future__ import annotations

import types
import warnings

import pytest
import torch
from support.vae_shapes import SMALL
from torch.utils._python_dispatch import TorchDispatchMode

import lavin_rt.artifact.aoti
import lavin_rt.vae.layers
from lavin_rt.vae.layers import as_clips, as_pictures, chosen_by_process, convolution
from lavin_rt.vae.model import STVAE, warn_of_slow_clips


class Convolutions(TorchDispatchMode):
    """Every convolution's dimensions, and whether the call itself allows TF32; None leaves it to the process."""

    def __init__(self):
        super().__init__()
        self.found: list[tuple[int, bool | None]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "convolution" in func.name():
            allowed = args[12] if func is torch.ops.aten._convolution.default else None
            self.found.append((args[1].dim() - 2, allowed))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("impl", "frames", "dims"), [("plain", 1, {2, 3}), ("torch", 1, {2}), ("torch", 5, {2, 3})])
def test_float32_on_cuda_asks_for_no_tf32_with_every_call(impl, frames, dims, monkeypatch):
    """No setting of the process is touched, which other threads read; pictures need no convolution of clips."""
    monkeypatch.setattr(lavin_rt.vae.layers, "chosen_by_process", lambda x: False)
    vae = STVAE(SMALL, impl)
    with Convolutions() as seen, torch.no_grad():
        vae.decode(vae.encode(torch.zeros(1, 3, frames, 16, 16)).mean)
    own = [(size, allowed) for size, allowed in seen.found if allowed is not None]
    assert {allowed for _, allowed in own} == {False} and {size for size, _ in own} == dims
    assert len(own) == sum(isinstance(module, torch.nn.Conv2d | torch.nn.Conv3d) for module in vae.modules())


def test_what_is_left_to_the_process():
    def choice(device: str, dtype: torch.dtype) -> bool:
        return chosen_by_process(types.SimpleNamespace(device=torch.device(device), dtype=dtype))

    assert not choice("cuda", torch.float32)
    assert choice("cuda", torch.bfloat16) and choice("cpu", torch.float32)


@pytest.mark.parametrize("transposed", [False, True])
def test_the_exact_convolution_is_the_ordinary_one(transposed, monkeypatch):
    x, weight, bias = torch.randn(2, 4, 5, 6), torch.randn(4, 4, 4, 4), torch.randn(4)
    ordinary = convolution(x, weight, bias, 2, 1, transposed)
    monkeypatch.setattr(lavin_rt.vae.layers, "chosen_by_process", lambda x: False)
    assert torch.equal(convolution(x, weight, bias, 2, 1, transposed), ordinary)


def test_clips_in_16_bits_on_torch_2_9_are_warned_of(monkeypatch):
    cuda, half = torch.device("cuda"), torch.bfloat16
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu130")
    for cudnn, dtype, warned in ((91002, half, True), (91500, half, False), (91002, torch.float32, False)):
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda found=cudnn: found)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            warn_of_slow_clips(dtype, cuda)
        assert bool(caught) == warned
    monkeypatch.setattr(torch, "__version__", "2.10.0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_slow_clips(half, cuda)


def test_compiled_code_finds_the_setting_whole_and_leaves_it_as_it_was():
    """Reading it fails in every thread where cuDNN's settings differ from one another."""
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision
    with lavin_rt.host_state.full_float32, lavin_rt.host_state.full_float32:
        assert cudnn.allow_tf32 is False and cudnn.conv.fp32_precision != "tf32"
    assert (cudnn.allow_tf32, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision) == before


def test_a_trace_computes_nothing_from_the_weights_of_a_clips_shortcuts():
    """Exporters want weights as they are: TensorRT takes no convolution with a computed kernel."""
    vae = STVAE(SMALL).requires_grad_(False)
    block = vae.decoder.up_blocks[1].resnets[0]
    latents, x = torch.randn(1, 16, 2, 2, 2), torch.randn(1, block.conv1.conv.in_channels, 3, 4, 4)
    traced = torch.export.export(block, (x, latents))
    weights = {node for node in traced.graph.nodes if node.op == "placeholder" and node.name.startswith("p_")}
    computed = [
        node for node in traced.graph.nodes if node.op == "call_function" and set(node.all_input_nodes) <= weights
    ]
    assert block.conv_shortcut is not None and not [node for node in computed if node.all_input_nodes]
    torch.testing.assert_close(traced.module()(x, latents), block(x, latents))


@pytest.mark.parametrize(("clips", "frames"), [(1, 1), (2, 1), (1, 3), (2, 3)])
def test_pictures_of_channels_last_clips_are_channels_last_views(clips, frames):
    """By their strides, too, which decide how PyTorch pads, normalizes and convolves, of a single picture as well."""
    x = torch.randn(clips, 6, frames, 8, 10).contiguous(memory_format=torch.channels_last_3d)
    pictures = as_pictures(x)
    canonical = torch.empty_like(pictures, memory_format=torch.channels_last).stride()
    assert pictures.stride() == canonical and pictures.data_ptr() == x.data_ptr()
    assert torch.equal(pictures.unflatten(0, (clips, frames)), x.transpose(1, 2))
    again = as_clips(pictures, clips)
    assert again.stride() == x.stride() and again.data_ptr() == x.data_ptr() and torch.equal(again, x)
