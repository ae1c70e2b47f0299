"""A decoder to start from, the inverse of the encoder in `principal`: patches put together from their components.

The decoder upsamples by repetition and knows nothing of a pixel's place inside its patch, so it is slow to learn any
detail. But every one of its norms multiplies what it normalises with a function of the latent. So the layers before the
last norm are first taught, on no picture at all, to write 16 fixed templates over and over, which zero padding makes
possible: from the border each layer can count on. The last norm multiplies them with the latent, which makes every
patch the sum of its components, and two channels each, of opposite sign, take the SiLU out:
`silu(x) - silu(-x) = x`. From there the whole decoder is trained on pictures.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import trange

from lavin_rt.mini.principal import Components, patch_synthesis
from lavin_rt.mini.training import Rate
from lavin_rt.vae import LATENT_SCALE, LATENT_SHIFT, Decoder
from lavin_rt.vae_layers import CausalConv, SpatialNormSiLU

PATCH = 8  # pixels to a latent pixel
TEACHING_STEPS = 300
TEACHING_RATE = 2e-3


@dataclasses.dataclass(frozen=True, eq=False)
class Synthesis:
    """Patches as sums of products, `patch[p, c] = sum_j templates[p, j] * colours[c, j] * (factors[j] @ latent)`, plus
    `means @ latent` for all pixels.

    Attributes:
        templates: `[64, J]`, of pixels (row, column), of deviation 1.
        colours: `[3, J]`.
        factors: `[J, 16]`, of scaled latents.
        means: `[3, 16]`, the mean colour of scaled latents.
    """

    templates: torch.Tensor
    colours: torch.Tensor
    factors: torch.Tensor
    means: torch.Tensor

    @classmethod
    def of(cls, components: Components, terms: int, sweeps: int = 300, seed: int = 0) -> Synthesis:
        """The best of `terms` products, by alternating least squares."""
        patches = patch_synthesis(components)  # [64, 3, 16]
        means = patches.mean(0)
        weights = components.gains.double()
        rest = (patches - means).double() * weights  # errors count as they do for latents of their usual size
        generator = torch.Generator().manual_seed(seed)
        parts = [torch.randn(size, terms, generator=generator, dtype=torch.float64) for size in rest.shape]
        for _ in range(sweeps):
            for mode in range(3):
                others = [part for i, part in enumerate(parts) if i != mode]
                products = torch.einsum("aj,bj->abj", *others).flatten(0, 1)
                solution = torch.linalg.lstsq(products, rest.movedim(mode, 0).flatten(1).T).solution.T
                parts[mode] = solution / solution.norm(dim=0) if mode < 2 else solution
        templates, colours, factors = parts
        deviation = templates.std(0, correction=0)
        factors = factors * deviation / weights[:, None]
        return cls((templates / deviation).float(), colours.float(), factors.T.float().contiguous(), means)


@torch.no_grad()
def start_decoder(decoder: Decoder, synthesis: Synthesis) -> None:
    """Sets the decoder's last two layers to put patches together, of templates that `teach_templates` is to make.

    Channels 2 j and 2 j + 1 of the last norm hold term j and its negative, so it takes two channels a term.
    """
    for module in decoder.modules():
        if isinstance(module, SpatialNormSiLU):
            for conv, bias in ((module.conv_y.conv, 1.0), (module.conv_b.conv, 0.0)):
                conv.weight.zero_()
                conv.bias.fill_(bias)
    decoder.conv_in.conv.weight.zero_()
    norm, out = decoder.norm_out, decoder.conv_out.conv
    shifts = torch.linalg.pinv(synthesis.colours) @ synthesis.means  # [J, 16]: what makes the mean colour
    for conv, scaled in ((norm.conv_y.conv, synthesis.factors), (norm.conv_b.conv, shifts)):
        raw = scaled * LATENT_SCALE
        for sign, rows in ((1, slice(0, None, 2)), (-1, slice(1, None, 2))):
            conv.weight[rows] = sign * raw[:, :, None, None, None]
            conv.bias[rows] = -sign * LATENT_SHIFT * raw.sum(1)
    out.weight.zero_()
    out.bias.zero_()
    out.weight[:, 0::2, -1, 1, 1], out.weight[:, 1::2, -1, 1, 1] = synthesis.colours, -synthesis.colours


def keep_past_taps(decoder: nn.Module) -> None:
    """Clears the gradients of the time taps that see the past, so that a step leaves them as they are.

    On single frames all taps see the same and would be moved alike, which blurs clips in time; pictures train the
    present tap alone, clips train all.
    """
    for module in decoder.modules():
        if isinstance(module, CausalConv) and module.conv.weight.grad is not None:
            module.conv.weight.grad[:, :, :-1] = 0


def teach_templates(decoder: Decoder, synthesis: Synthesis, side: int, steps: int = TEACHING_STEPS) -> float:
    """Trains the layers before the last norm to write the templates into every patch of `side` x `side`.

    Returns:
        the mean squared error of the templates, whose variance is 1.
    """
    conditioned = ("norm_out", "conv_out", "conv_y", "conv_b")
    learning = [p for name, p in decoder.named_parameters() if not any(part in name for part in conditioned)]
    target = synthesis.templates.T.view(-1, PATCH, PATCH).repeat(1, side, side).repeat_interleave(2, dim=0)
    latents = torch.zeros(1, decoder.conv_in.conv.in_channels, 1, side, side)
    seen: list[torch.Tensor] = []
    hook = decoder.norm_out.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    optimizer = torch.optim.AdamW(learning, lr=TEACHING_RATE, betas=(0.9, 0.98), weight_decay=0, fused=True)
    groups = decoder.norm_out.norm_layer.num_groups
    rate, error = Rate(TEACHING_RATE, steps, warmup=50, fall=0.4), torch.tensor(0.0)
    for step in trange(steps, desc="decoder's templates", unit="step"):
        optimizer.param_groups[0]["lr"] = rate.at(step)
        seen.clear()
        decoder(latents)
        error = (F.group_norm(seen[0], groups, eps=1e-6)[0, :, 0] - target).square().mean()
        optimizer.zero_grad()
        error.backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        keep_past_taps(decoder)
        optimizer.step()
    hook.remove()
    decoder.zero_grad()
    return float(error.detach())
