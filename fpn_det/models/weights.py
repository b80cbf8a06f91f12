"""Validation of weights, and their adaptation to other input channels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

SHOWN_NAMES = 3
MAX_PARAMETERS = 2**31  # 8 GiB in float32, about seven times the largest published detectors


@contextmanager
def limited_parameters(limit: int = MAX_PARAMETERS) -> Iterator[None]:
    """Within this context, modules of more than `limit` parameters in all are refused before their values are drawn.

    Memory that the operating system has promised is taken only when values are written. A mistyped number of channels
    would then end in a process that is killed without a message.

    Raises:
        ValueError: a module brings the number of parameters above the limit.
    """
    total = 0

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal total
        if parameter is None:
            return
        total += parameter.numel()
        if total > limit:
            raise ValueError(
                f"model: expected settings of a detector of at most {limit:,} parameters, "
                f"got {total:,} at its first {type(module).__name__} of shape {list(parameter.shape)}."
            )

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


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


def widen_input(weight: Tensor, in_channels: int) -> Tensor:
    """Weights of a first convolution [D, 3, k, k] for images of other channels, [D, in_channels, k, k].

    For one channel, the sum over RGB: it gives for a grey image what RGB weights give for equal channels. For any other
    number the RGB weights repeat in their order, times 3 / in_channels, so that equal channels give the same output. The
    rule is timm's (`adapt_input_conv`).
    """
    if weight.shape[1] == in_channels:
        return weight
    if in_channels == 1:
        return weight.sum(dim=1, keepdim=True)
    repeated = weight.repeat(1, -(-in_channels // weight.shape[1]), 1, 1)[:, :in_channels]
    return repeated * (weight.shape[1] / in_channels)
