"""Run LaVin-DiT: official checkpoints in, pictures out.

Names are imported when first used, so that `import lavin_rt` and `lavin-rt --help` do not wait for torch.
"""

from __future__ import annotations

import importlib

_HOMES = {
    "Cancelled": "errors",
    "DiTConfig": "dit.config",
    "EncodedContext": "pictures.encoded",
    "InputError": "errors",
    "JDiT": "dit.model",
    "NonFiniteError": "errors",
    "PRESETS": "dit.config",
    "Pipeline": "pipeline",
    "SPEEDS": "sampling.speeds",
    "STVAE": "vae.model",
    "Speed": "sampling.speeds",
    "Task": "task",
    "find_checkpoint": "find.model",
    "load_dit": "checkpoint.load",
    "load_vae": "checkpoint.load",
    "randomize_": "dit.model",
    "sample": "sampling.sampler",
    "save_dit": "checkpoint.load",
    "save_vae": "checkpoint.load",
    "schedule": "sampling.schedule",
}

__all__ = sorted([*_HOMES, "__version__"])


def __getattr__(name: str):
    if name == "__version__":
        from importlib.metadata import version

        return version("lavin-rt")
    if name not in _HOMES:
        raise AttributeError(f"module 'lavin_rt' has no attribute {name!r}")
    return getattr(importlib.import_module(f"lavin_rt.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
