"""8-bit weights and activations for OpenVINO by post-training quantization (NNCF).

Convolutions and matrix products of backbone, neck and heads are quantized, with what lies between the convolutions. Box
decoding, RoIAlign and suppression stay in float: a box has more than 256 positions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fpn_det.export.libraries import imported

WEIGHTED = {"Convolution", "GroupConvolution", "MatMul"}


def quantize(model: Any, inputs: Sequence[tuple[Tensor, Tensor]]) -> Any:
    """Quantize an OpenVINO model.

    Args:
        model: of one detector, not modified.
        inputs: images and sizes of batches, as the model takes them, by which the ranges of activations are found.

    Raises:
        ValueError: nncf is not installed.
    """
    nncf = imported("nncf")
    nncf.set_log_level(40)  # errors
    dataset = nncf.Dataset([[images.numpy(), sizes.numpy()] for images, sizes in inputs])
    scope = nncf.IgnoredScope(names=sorted(in_float(model)), validate=False)
    return nncf.quantize(
        model, dataset, subset_size=len(inputs), ignored_scope=scope, target_device=nncf.TargetDevice.CPU
    )


def in_float(model: Any) -> set[str]:
    """Names of the operators that are not quantized.

    Quantized are the operators with weights, and those between two convolutions on the way from pixels to maps.
    """
    operators = model.get_ordered_ops()
    users, sources = defaultdict(list), defaultdict(list)
    for operator in operators:
        for value in operator.input_values():
            source = value.get_node()
            users[source.get_friendly_name()].append(operator)
            sources[operator.get_friendly_name()].append(source)
    convolutions = [operator for operator in operators if operator.get_type_name() == "Convolution"]
    chosen = [operator for operator in operators if operator.get_type_name() == "TopK"]
    after_first = _reachable(convolutions, users)
    before_last = _reachable(convolutions, sources)
    between = (after_first & before_last) - _reachable(chosen, users)
    return {
        operator.get_friendly_name()
        for operator in operators
        if operator.get_type_name() not in WEIGHTED and operator.get_friendly_name() not in between
    }


def _reachable(starts: list[Any], edges: dict[str, list[Any]]) -> set[str]:
    """Names of the operators that edges lead to from `starts`, which belong to them."""
    found = {operator.get_friendly_name() for operator in starts}
    waiting = list(starts)
    while waiting:
        for operator in edges[waiting.pop().get_friendly_name()]:
            if operator.get_friendly_name() not in found:
                found.add(operator.get_friendly_name())
                waiting.append(operator)
    return found
