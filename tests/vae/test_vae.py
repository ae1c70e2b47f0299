"""The autoencoder: against the original, fast form against plain form, and loading."""

from __future__ import annotations

import copy
from functools import lru_cache

import pytest
import torch
from support.golden import GOLDEN, golden_cases, relative_error
from support.vae_shapes import SMALL
from torch import nn

from lavin_rt.errors import InputError
from lavin_rt.vae.config import VAEConfig
from lavin_rt.vae.layers import DerivedKernel
from lavin_rt.vae.model import LATENT_SCALE, LATENT_SHIFT, STVAE, Posterior, scale_latents, unscale_latents

CASES = golden_cases("stvae")
FORMS = ("plain", "torch")
# Two channels a group, unlike the golden one's first level, and every level another width.


@lru_cache
def golden_weights() -> dict[str, torch.Tensor]:
    return torch.load(GOLDEN / "stvae.pt", weights_only=True)["state_dict"]


@lru_cache
def golden_vae(impl: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> STVAE:
    return STVAE.from_state_dict(golden_weights(), dtype, device, impl)[0]


def random_vae(config: VAEConfig = SMALL, dtype: torch.dtype = torch.float64) -> STVAE:
    torch.manual_seed(0)
    vae = STVAE(config).to(dtype)
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return vae.eval()


def in_form(vae: STVAE, impl: str, method: str, x: torch.Tensor) -> torch.Tensor:
    result = getattr(vae.in_form(impl), method)(x)
    return torch.cat([result.mean, result.logvar], 1) if isinstance(result, Posterior) else result


def passes(vae: STVAE, case: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """All results of a golden case; like the original's, the decoded are of the given mean."""
    with torch.inference_mode():
        posterior = vae.encode(case["pixels"].to(vae.device))
        decoded = vae.decode(case["mean"].to(vae.device))
    return {"mean": posterior.mean.cpu(), "logvar": posterior.logvar.cpu(), "decoded": decoded.cpu()}


def assert_golden(vae: STVAE, case: dict[str, torch.Tensor]) -> None:
    for name, result in passes(vae, case).items():
        assert result.shape == case[name].shape and result.dtype == vae.dtype
        assert relative_error(result, case[name]) <= 1e-5, name


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_original(case, impl):
    assert_golden(golden_vae(impl), CASES[case])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_half_precision_errors_stay_in_the_budget(case, dtype):
    plain, fast = (passes(golden_vae(impl, dtype), CASES[case]) for impl in FORMS)
    for name in plain:
        error = relative_error(fast[name], CASES[case][name])
        assert error <= 2 * relative_error(plain[name], CASES[case][name]), name


# One to nine frames, batches, sizes that no level halves evenly; in float64, where only a wrong formula differs.
@pytest.mark.parametrize("frames", range(1, 10))
def test_fast_encoder_is_the_plain_one(frames):
    pixels = torch.randn(1 + frames % 2, 3, frames, 17, 30, dtype=torch.float64)
    vae = random_vae()
    with torch.inference_mode():
        plain, fast = (in_form(vae, impl, "encode", pixels) for impl in FORMS)
    assert plain.shape[2:] == (-(-frames // 4), 2, 3)
    assert relative_error(fast, plain) <= 1e-12


@pytest.mark.parametrize("latent_frames", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [(1, 1), (3, 5)])
def test_fast_decoder_is_the_plain_one(latent_frames, size):
    latents = torch.randn(1 + latent_frames % 2, 16, latent_frames, *size, dtype=torch.float64)
    vae = random_vae()
    with torch.inference_mode():
        plain, fast = (in_form(vae, impl, "decode", latents) for impl in FORMS)
    assert plain.shape[1:] == (3, 1 + 4 * (latent_frames - 1), 8 * size[0], 8 * size[1])
    assert relative_error(fast, plain) <= 1e-12


def test_triton_form_on_a_cpu_is_the_torch_form():
    vae, latents = random_vae(dtype=torch.float32), torch.randn(1, 16, 2, 2, 3)
    with torch.inference_mode():
        assert (
            relative_error(in_form(vae, "triton", "decode", latents), in_form(vae, "torch", "decode", latents)) < 1e-6
        )
    assert vae.impl == "torch"


def test_unknown_impl():
    with pytest.raises(InputError, match="'fast', expected 'plain', 'torch' or 'triton'"):
        STVAE(SMALL, impl="fast")


def test_released_shape():
    with torch.device("meta"):
        vae = STVAE(VAEConfig())
    encoder, decoder = (sum(p.numel() for p in part.parameters()) for part in (vae.encoder, vae.decoder))
    assert (round(encoder / 1e6), round(decoder / 1e6)) == (92, 123)  # as published
    assert VAEConfig.from_state_dict(vae.state_dict()) == VAEConfig()
    shapes = {name: list(tensor.shape) for name, tensor in vae.state_dict().items()}
    assert VAEConfig.from_state_dict(shapes) == VAEConfig()


def test_golden_shape():
    config = VAEConfig.from_state_dict(golden_weights())
    assert config == VAEConfig(block_out_channels=(32, 32, 64, 64), layers_per_block=1)
    STVAE(config).load_state_dict(golden_weights(), strict=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_out_channels": (32, 64)}, "2 levels in block_out_channels"),
        ({"block_out_channels": (32, 32, 48, 64)}, "width 48 cannot be normalised in 32 groups"),
        ({"temporal_compression_ratio": 8}, "temporal_compression_ratio is 8"),
        ({"layers_per_block": 0}, "a number below 1"),
    ],
)
def test_impossible_config(changes, message):
    with pytest.raises(InputError, match=message):
        VAEConfig(**changes)


def test_loading_names_what_is_missing_and_misshapen():
    weights = dict(golden_weights())
    for layer in ("conv1", "conv2"):
        del weights[f"decoder.up_blocks.3.resnets.1.{layer}.conv.weight"]
    weights["encoder.norm_out.weight"] = torch.zeros(32)
    with pytest.raises(InputError) as caught:
        STVAE.from_state_dict(weights)
    message = str(caught.value)
    assert "2 missing: decoder.up_blocks.3.resnets.1.conv1.conv.weight, decoder.up_blocks.3" in message
    assert "1 of another shape: encoder.norm_out.weight [32] for [64]" in message
    assert "\n" not in message


def test_loading_abbreviates():
    weights = {name: tensor for name, tensor in golden_weights().items() if not name.startswith("decoder.up_blocks.2.")}
    with pytest.raises(InputError, match=r"\d+ missing: (decoder\.up_blocks\.2\.\S+, ){7}\S+ and \d+ more$"):
        STVAE.from_state_dict(weights)


# A lost tensor must not make the weights pass for those of a smaller network.
@pytest.mark.parametrize("name", ["encoder.down_blocks.0.resnets.1.conv1.conv.weight", "decoder.mid_block.resnets.1"])
def test_a_lost_tensor_is_missed(name):
    vae = STVAE(VAEConfig(block_out_channels=(32, 32, 32, 32), layers_per_block=3))
    weights = {key: tensor for key, tensor in vae.state_dict().items() if not key.startswith(name)}
    with pytest.raises(InputError, match=rf"missing: {name}"):
        STVAE.from_state_dict(weights)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, "no decoder.conv_in.conv.weight among 0 tensors$"),
        ({"blocks.0.gate": torch.zeros(1)}, "among 1 tensors, e.g. blocks.0.gate"),
        ({"decoder.conv_in.conv.weight": torch.zeros(4, 4, 3, 3)}, "is .4, 4, 3, 3., expected five dimensions"),
    ],
)
def test_other_weights_are_refused(weights, message):
    with pytest.raises(InputError, match=f"not the weights of an ST-VAE: .*{message}"):
        STVAE.from_state_dict(weights)


def test_loading_takes_tensors_and_reports_unexpected_ones():
    weights = {**golden_weights(), "loss.logvar": torch.zeros(1)}
    vae, unexpected = STVAE.from_state_dict(weights, torch.bfloat16)  # as stored
    assert unexpected == ["loss.logvar"]
    for name, parameter in vae.named_parameters():
        assert parameter.data_ptr() == weights[name].data_ptr(), f"{name} was copied"
        assert not parameter.requires_grad
    assert STVAE.from_state_dict(weights)[0].dtype == torch.float32


@pytest.mark.parametrize(
    ("method", "shape", "dtype", "message"),
    [
        ("encode", (1, 3, 16, 16), torch.float32, r"expected float \[N, 3, frames"),
        ("encode", (1, 1, 1, 16, 16), torch.float32, r"\[1, 1, 1, 16, 16\], expected"),
        ("encode", (1, 3, 1, 16, 16), torch.uint8, "pixels are torch.uint8"),
        ("encode", (1, 3, 1, 16, 7), torch.float32, "at least one of each and 8 rows"),
        ("encode", (0, 3, 1, 16, 16), torch.float32, "at least one of each"),
        ("decode", (1, 4, 1, 2, 2), torch.float32, r"expected float \[N, 16, frames"),
        ("decode", (1, 16, 0, 2, 2), torch.float32, "at least one of each"),
    ],
)
def test_wrong_input(method, shape, dtype, message):
    with pytest.raises(InputError, match=message):
        getattr(golden_vae("torch"), method)(torch.zeros(shape, dtype=dtype))


def test_batches_are_exact():
    vae, pixels = random_vae().in_form("torch"), torch.randn(5, 3, 1, 16, 16, dtype=torch.float64)
    with torch.inference_mode():
        latents = vae.encode(pixels).mean
        assert relative_error(vae.encode(pixels, batch=2).mean, latents) <= 1e-12
        assert relative_error(vae.decode(latents, batch=2), vae.decode(latents)) <= 1e-12
    with pytest.raises(InputError, match="batch is 0"):
        vae.decode(latents, batch=0)


def test_posterior():
    mean, logvar = torch.randn(2, 16, 1, 2, 2), torch.randn(2, 16, 1, 2, 2)
    posterior = Posterior(mean, logvar)
    draw = posterior.sample(torch.Generator().manual_seed(5))
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(draw, mean + torch.exp(logvar / 2) * noise)
    assert posterior.mode() is mean
    assert Posterior(mean.bfloat16(), logvar.bfloat16()).sample().dtype == torch.bfloat16


def test_log_variance_is_clamped():
    vae = copy.deepcopy(golden_vae("torch"))
    vae.encoder.conv_out.conv.bias[16:24] = 1e3
    vae.encoder.conv_out.conv.bias[24:] = -1e3
    logvar = vae.encode(CASES["vae3"]["pixels"]).logvar
    assert (logvar[:, :8] == 20).all() and (logvar[:, 8:] == -30).all()


def test_latent_scaling():
    latents = torch.randn(1, 16, 1, 2, 2)
    assert LATENT_SHIFT == 0.032470703125 and LATENT_SCALE == 1.08936170213
    torch.testing.assert_close(scale_latents(latents), (latents - 0.032470703125) * 1.08936170213)
    torch.testing.assert_close(unscale_latents(scale_latents(latents)), latents)


def replaced(conv: nn.Module, weight: torch.Tensor) -> None:
    conv.weight = nn.Parameter(weight, requires_grad=False)


CHANGES = {
    "in place": lambda vae: [p.mul_(1.5) for p in vae.parameters()],
    "loaded": lambda vae: vae.load_state_dict({k: v * 1.5 for k, v in vae.state_dict().items()}),
    "assigned": lambda vae: vae.load_state_dict({k: v * 1.5 for k, v in vae.state_dict().items()}, assign=True),
    "replaced": lambda vae: [
        replaced(m.conv, m.conv.weight * 1.5) for m in vae.modules() if isinstance(m, DerivedKernel)
    ],
    "cast": lambda vae: vae.bfloat16(),
    "cast and back": lambda vae: vae.bfloat16().double(),
    "nothing": lambda vae: None,
}


@pytest.mark.parametrize("change", CHANGES)
def test_derived_kernels_follow_the_weights(change):
    vae = random_vae().requires_grad_(False)
    latents = torch.randn(1, 16, 1, 2, 3, dtype=torch.float64)
    with torch.inference_mode():
        before = in_form(vae, "torch", "decode", latents)
    changed = copy.deepcopy(vae)
    assert torch.equal(in_form(changed, "torch", "decode", latents), before)
    CHANGES[change](changed)
    fresh = random_vae().to(changed.dtype).requires_grad_(False)
    fresh.load_state_dict(changed.state_dict())
    truth = in_form(fresh, "torch", "decode", latents)
    assert torch.equal(in_form(changed, "torch", "decode", latents), truth)
    assert torch.equal(truth.double(), before) == (change == "nothing")
    assert torch.equal(in_form(vae, "torch", "decode", latents), before)  # the copy shares nothing with it


def test_derived_kernels_are_bounded_and_outside_the_state_dict():
    vae = random_vae(VAEConfig(block_out_channels=(32, 32, 32, 32), layers_per_block=1)).requires_grad_(False)
    names = list(vae.state_dict())
    with torch.inference_mode():
        vae.decode(vae.encode(torch.zeros(1, 3, 1, 16, 16)).mean)
    assert list(vae.state_dict()) == names
    kept = sum(module.kept_bytes for module in vae.modules() if isinstance(module, DerivedKernel))
    assert 0 < kept < 0.45 * sum(p.nbytes for p in vae.parameters())


def test_gradients_of_the_fast_form():
    gradients = []
    for impl in FORMS:
        vae = random_vae()
        pixels = torch.linspace(-1, 1, 3 * 17 * 18, dtype=torch.float64).view(1, 3, 1, 17, 18).requires_grad_()
        vae.in_form(impl)(pixels).square().mean().backward()
        gradients.append(
            [pixels.grad, *(p.grad for name, p in vae.named_parameters() if "encoder.conv_out" not in name)]
        )
    for fast, plain in zip(*reversed(gradients), strict=True):
        assert relative_error(fast, plain) <= 1e-9


def test_kernels_kept_in_inference_mode_serve_gradients_of_the_input():
    vae = random_vae().requires_grad_(False)
    latents = torch.randn(1, 16, 1, 2, 2, dtype=torch.float64)
    with torch.inference_mode():
        vae.decode(latents)
    latents.requires_grad_()
    vae.decode(latents).sum().backward()
    assert latents.grad.isfinite().all() and latents.grad.any()


@pytest.mark.parametrize("warm", [False, True])
def test_traces_whole(warm):
    vae = random_vae(dtype=torch.float32).requires_grad_(False)
    latents = torch.randn(1, 16, 1, 2, 3)
    if warm:
        vae.decode(latents)
    traced = torch.export.export(vae.decoder, (latents,)).module()
    assert relative_error(traced(latents), vae.decode(latents)) <= 1e-6
    compiled = torch.compile(vae.encoder, backend="eager", fullgraph=True)
    pixels = torch.randn(1, 3, 1, 16, 16)
    torch.testing.assert_close(compiled(pixels)[:, :16], vae.encode(pixels).mean)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", [*FORMS, "triton"])
@pytest.mark.parametrize("case", CASES)
def test_gpu_float32_is_float32(case, impl):
    assert_golden(golden_vae(impl, device="cuda"), CASES[case])  # TF32 would miss it a hundredfold


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_gpu_half_precision_errors_stay_in_the_budget(case, dtype, impl):
    plain, fast = (passes(golden_vae(form, dtype, "cuda"), CASES[case]) for form in ("plain", impl))
    for name in plain:
        error = relative_error(fast[name], CASES[case][name])
        assert error <= 2 * relative_error(plain[name], CASES[case][name]), name


@pytest.mark.gpu
def test_gpu_precision_setting_is_restored():
    before = torch.backends.cudnn.conv.fp32_precision, torch.backends.cudnn.allow_tf32
    golden_vae("torch", device="cuda").decode(torch.zeros(1, 16, 1, 2, 2))
    assert (torch.backends.cudnn.conv.fp32_precision, torch.backends.cudnn.allow_tf32) == before
