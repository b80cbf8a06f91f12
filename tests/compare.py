"""Compare floating-point tensors relative to their magnitude.

Kernels for different instruction sets add in different orders, so the rounding error of a cell is proportional to the largest
terms of its sum, not to the cell's own value. Element-wise tolerances (`torch.allclose`) therefore fail at cells that happen
to be close to zero.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def assert_close(
    actual: Tensor | np.ndarray,
    expected: Tensor | np.ndarray,
    tolerance: float,
    name: str = "",
    magnitude: float | None = None,
) -> None:
    """Assert that shapes and types agree and that max |actual - expected| <= tolerance * magnitude.

    Differences are computed in float64. A NaN or an infinity on either side fails.

    Args:
        name: prefix of the message.
        magnitude: max |expected| by default. Given where the expected value is zero up to rounding, for instance the
            gradient of a bias in front of a batch norm: then it is the magnitude of the terms that cancel.
    """
    actual, expected = torch.as_tensor(actual).detach(), torch.as_tensor(expected).detach()
    where = f"{name}: " if name else ""
    assert actual.shape == expected.shape, f"{where}expected shape {tuple(expected.shape)}, got {tuple(actual.shape)}"
    assert actual.dtype == expected.dtype, f"{where}expected {expected.dtype}, got {actual.dtype}"
    if not expected.numel():
        return
    actual, expected = actual.double(), expected.double()
    assert actual.isfinite().all() and expected.isfinite().all(), f"{where}expected finite values"
    difference = (actual - expected).abs()
    if magnitude is None:
        magnitude = expected.abs().max().item()
    index = np.unravel_index(int(difference.argmax()), difference.shape)
    assert difference.max() <= tolerance * magnitude, (
        f"{where}expected a difference of at most {tolerance:g} * {magnitude:.6g} (the magnitude), "
        f"got {difference.max():.3g} at {tuple(map(int, index))}: {actual[index]:.8g} for {expected[index]:.8g}"
    )
