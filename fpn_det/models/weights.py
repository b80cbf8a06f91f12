"""Validation of weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

SHOWN_NAMES = 3


def refuse_nonfinite_weights(state: Mapping[str, Tensor], where: str) -> None:
    """Validate that all parameters and buffers are finite. Reads from the device once.

    A detector with such weights finds nothing, which would be reported as an AP of 0.

    Args:
        state: a state dict.
        where: prefix of the message, such as the file of the weights.

    Raises:
        ValueError: a tensor contains NaN or infinity.
    """
    tensors = {name: tensor for name, tensor in state.items() if tensor.is_floating_point() and tensor.numel()}
    if not tensors:
        return
    finite = torch.stack([tensor.isfinite().all() for tensor in tensors.values()]).tolist()
    bad = [name for name, is_finite in zip(tensors, finite, strict=True) if not is_finite]
    if bad:
        shown = ", ".join(bad[:SHOWN_NAMES]) + (f" and {len(bad) - SHOWN_NAMES} more" if len(bad) > SHOWN_NAMES else "")
        raise ValueError(
            f"{where}: expected finite weights, got NaN or infinity in {shown}. Use weights of an earlier step."
        )
