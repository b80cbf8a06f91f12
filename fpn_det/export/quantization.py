"""8-bit weights and activations for OpenVINO by post-training quantization (NNCF).

Convolutions and matrix products of backbone, neck and heads are quantized, with what lies between the convolutions. The last layers,
whose results are scores and box deltas, take little time and stay in float, as box decoding and suppression: a box has
more than 256 positions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from torch import Tensor

from fpn_det.export.libraries import imported

WEIGHTED = {"Convolution", "GroupConvolution", "MatMul"}
# Operators that read scores or boxes of one stage for the next one.
BETWEEN_STAGES = {"TopK", "GatherElements", "ROIAlign", "NonZero", "ShapeOf"}


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
    quantized = nncf.quantize(
        model,
        dataset,
        preset=nncf.QuantizationPreset.MIXED,  # features of a pyramid have both signs, but not evenly
        subset_size=len(inputs),
        ignored_scope=scope,
        target_device=nncf.TargetDevice.CPU,
    )
    _read_in_8_bits(quantized)
    return quantized


def _read_in_8_bits(model: Any) -> None:
    """Give RoIAlign the maps in 8 bits, as the RPN gets them.

    OpenVINO 2026.4 computes zeros for the RPN on some CPUs if the output of a convolution is read both in float and in 8 bits.
    """
    for operator in model.get_ordered_ops():
        if operator.get_type_name() == "FakeQuantize":
            source = operator.input_value(0)
            for reader in source.get_target_inputs():
                if reader.get_node().get_type_name() != "FakeQuantize":
                    reader.replace_source_output(operator.output(0))
    model.validate_nodes_and_infer_types()


def in_float(model: Any) -> set[str]:
    """Names of the operators that are not quantized.

    Quantized are the operators with weights, except for the last of each stage, and those between two convolutions on the way
    from pixels to maps.
    """
    operators = model.get_ordered_ops()
    users, sources = defaultdict(list), defaultdict(list)
    for operator in operators:
        for value in operator.input_values():
            source = value.get_node()
            users[source.get_friendly_name()].append(operator)
            sources[operator.get_friendly_name()].append(source)

    def of_types(types: set[str]) -> list[Any]:
        return [operator for operator in operators if operator.get_type_name() in types]

    convolutions = of_types({"Convolution"})
    between = _reachable(convolutions, users) & _reachable(convolutions, sources)
    quantized = between - _reachable(of_types({"TopK"}), users) - _names(of_types(WEIGHTED))
    quantized |= _names(of_types(WEIGHTED)) & _reachable(of_types(WEIGHTED), sources, until=BETWEEN_STAGES)
    return _names(operators) - quantized


def _names(operators: Iterable[Any]) -> set[str]:
    return {operator.get_friendly_name() for operator in operators}


def _reachable(starts: list[Any], edges: dict[str, list[Any]], until: Collection[str] = ()) -> set[str]:
    """Names of the operators that edges lead to from `starts`, not through operators of the types `until`."""
    found: set[str] = set()
    waiting = list(starts)
    while waiting:
        for operator in edges[waiting.pop().get_friendly_name()]:
            if operator.get_friendly_name() not in found and operator.get_type_name() not in until:
                found.add(operator.get_friendly_name())
                waiting.append(operator)
    return found
