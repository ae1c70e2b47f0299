"""Pictures that tests share."""

import numpy as np
import torch
from hypothesis import HealthCheck, settings

untimed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def one_line(error) -> str:
    """The message of an `InputError`, which has to fit on one line."""
    message = str(error.value)
    assert message and len(message.splitlines()) == 1
    return message


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def hwc(frames: torch.Tensor) -> np.ndarray:
    return frames.movedim(-3, -1).numpy()
