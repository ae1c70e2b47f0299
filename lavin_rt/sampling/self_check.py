"""Known answers: whether this machine computes what the model defines."""

from __future__ import annotations

import dataclasses

import torch

from lavin_rt.dit.config import DiTConfig
from lavin_rt.dit.model import JDiT
from lavin_rt.dit.prepacked import pays, prepack_
from lavin_rt.sampling.sampler import sample

# Latents that the plain model gave in float64 on a CPU for `known_model` and `known_inputs`, steps 6, guidance 1.5:
# the first
# element of every channel.
KNOWN = (
    0.13259090,
    1.15457201,
    -0.00881758,
    -0.97964317,
    -0.47300068,
    0.95140904,
    0.56241500,
    -0.86276501,
    -0.35734949,
    0.63732964,
    0.54678476,
    -0.76668096,
    -0.80007505,
    0.86774695,
    0.82696897,
    -0.44499129,
)


@dataclasses.dataclass(frozen=True)
class KnownAnswer:
    """One line of a self-check: what was computed, its relative error and the error allowed."""

    name: str
    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed


def known_model() -> JDiT:
    """A small model whose weights are sines of their index, and so need no random generator and no file."""
    config = DiTConfig(hidden_size=144, depth=2, num_heads=2, kv_group=2)
    dit = JDiT(config).requires_grad_(False).eval()
    for index, parameter in enumerate(dit.parameters()):
        parameter.copy_(_sines(parameter.shape, index) * parameter.shape[-1] ** -0.5)
    return dit


def known_inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """Condition latents `[1, 16, 3, 4, 6]` and noise `[1, 16, 1, 4, 6]`, float32."""
    return _sines((1, 16, 3, 4, 6), 100).float(), _sines((1, 16, 1, 4, 6), 101).float()


def _sines(shape: tuple[int, ...], index: int) -> torch.Tensor:
    count = torch.Size(shape).numel()
    return (torch.arange(count, dtype=torch.float64) * (1 + 0.618 * index)).sin().view(shape)


def check_known_answers(device: torch.device) -> list[KnownAnswer]:
    """Samples the known model with every implementation that the device has, in float32. Weights laid out for 16 bits
    are tried before they are taken (`can_prepack`), and with a checkpoint's own (`check_checkpoint`).
    """
    dit = known_model().to(device)
    cond, noise = known_inputs()
    truth = torch.tensor(KNOWN, dtype=torch.float64)
    checks = []
    for impl in ("plain", "torch", *(["triton"] if device.type == "cuda" else [])):
        latents = sample(dit, cond, noise, steps=6, guidance=1.5, impl=impl)
        name = f"known answer, impl {impl}, float32"
        checks.append(KnownAnswer(name, relative_error(latents[0, :, 0, 0, 0], truth), 1e-4))
    return checks


def check_checkpoint(dit: JDiT, impl: str) -> KnownAnswer:
    """A checkpoint's packed step against its plain model in the same dtype, on three frames of 4 x 6 latents; the model
    has to be this check's alone.
    """
    cond, noise = known_inputs()
    plain = sample(dit, cond, noise, steps=4, impl="plain")
    if impl == "torch" and pays(dit):
        prepack_(dit)  # as a pipeline does
    error = relative_error(sample(dit, cond, noise, steps=4, impl=impl), plain)
    dtype = str(dit.dtype).removeprefix("torch.")
    return KnownAnswer(
        f"checkpoint, impl {impl} against plain, {dtype}", error, 1e-4 if dit.dtype == torch.float32 else 5e-2
    )


def relative_error(result: torch.Tensor, truth: torch.Tensor) -> float:
    """`||result - truth|| / ||truth||` in float64."""
    result, truth = result.double(), truth.to(result.device).double()
    return ((result - truth).norm() / truth.norm()).item()
