"""Counts of what a GPU would be asked to do, without one.

fpn_det's detector runs on CUDA tensors without data (torch's FakeTensorMode): an operator computes shapes, dtypes and devices
only, and one that needs a value, such as `.item()`, raises. Autograd needs a CUDA context, so the backward pass is counted on
CPU tensors without data, which run the same operators. torchvision's detector needs values; it runs on the CPU with data.

An operator that computes counts as one kernel (in truth a sort is several), a foreach operator as the launches of torch's
`multi_tensor_apply`, a view as none. Calls of cuDNN and of matrix products are not counted. Bytes are those of all tensors
that a kernel reads and writes; of a table that is read by indices, the rows that are read.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fpn_det.benchmark.config import BenchmarkConfig
from fpn_det.benchmark.contestants import NUM_CLASSES, OBJECTS, make_contestants
from fpn_det.benchmark.measures import host_reads
from fpn_det.models import layers, nms
from fpn_det.structures import Batch, Targets
from fpn_det.training.optimization import Optimization

LIBRARY_CALLS = {"convolution", "convolution_backward", "mm", "addmm", "bmm", "baddbmm"}
ALLOCATIONS = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "lift_fresh",
    "detach",
    "_unsafe_view",
    "scalar_tensor",
}
ROW_READS = {"index", "gather", "embedding", "index_select"}  # read as many values of a table as they return
# Limits of one launch of multi_tensor_apply (ATen/native/cuda/MultiTensorApply.cuh), by the number of lists.
CHUNK, MAX_BLOCKS, MAX_TENSORS = 65536, 320, {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}


class DeviceCounter(TorchDispatchMode):
    """Counts the work of a device, for tensors with and without data.

    Attributes:
        kernels: by name of the operator, without cuDNN and matrix products.
        bytes: that these kernels read and write.
        between_devices: operators with tensors of the host and of the device, copies included.
        host_constants: tensors made of Python numbers, which are copied to the device where there is one.
        host_reads: operators whose result on the host depends on values on the device.
        matrix_dtypes, upsampling_dtypes: of the results of matrix products and of upsampling.
        channels_last: memory format of the first convolution's input.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.bytes = 0
        self.between_devices: list[str] = []
        self.host_constants = 0
        self.host_reads = 0
        self.matrix_dtypes: set[torch.dtype] = set()
        self.upsampling_dtypes: set[torch.dtype] = set()
        self.channels_last: bool | None = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        namespace, _, name = func.name().partition("::")
        name = name.split(".")[0]
        if namespace in ("prim", "profiler"):  # attributes of tensors, marks of the profiler
            return func(*args, **kwargs)
        self.host_reads += host_reads(func, args)
        if name == "suppress":
            return self._suppress(func, args, kwargs)
        # the fused updates have no function of shapes
        has_result = not (name.startswith("_fused_") and _is_fake(args[0][0]))
        result = func(*args, **kwargs) if has_result else None
        inputs, results = _tensors((args, kwargs)), _tensors(result)
        self._watch_devices(name, inputs + results)
        self.host_constants += name == "lift_fresh" and results[0].dim() > 0
        if name in LIBRARY_CALLS:
            self.matrix_dtypes.add(results[0].dtype)
            if name == "convolution" and self.channels_last is None:
                self.channels_last = args[0].is_contiguous(memory_format=torch.channels_last)
        elif not _is_view(func) and name not in ALLOCATIONS:
            self.kernels[name] += _launches(name, args)
            self.bytes += _bytes(name, inputs, results, mutates=func._schema.is_mutable)
        if name.startswith("upsample") and not name.endswith("backward"):
            self.upsampling_dtypes.add(results[0].dtype)
        return result

    def _watch_devices(self, name: str, tensors: list[Tensor]) -> None:
        if {tensor.device.type for tensor in tensors} == {"cpu", "cuda"}:
            # a scalar of the host is an argument of the kernel, unless it is copied or is an index
            copies = name in ("_to_copy", "copy_", "index", "index_put", "index_put_")
            if copies or any(tensor.dim() and tensor.device.type == "cpu" for tensor in tensors):
                self.between_devices.append(name)

    def _suppress(self, func, args, kwargs) -> Tensor:
        """Count the kernels within suppression, whose two Triton kernels are only counted."""
        if not _is_fake(args[0]):
            return func(*args, **kwargs)
        triton_kernels = importlib.import_module("fpn_det.models.nms_triton")
        with (
            self,
            mock.patch.object(triton_kernels, "_pack_overlaps", _CountedKernel(self, "_pack_overlaps", output=3)),
            mock.patch.object(triton_kernels, "_collect", _CountedKernel(self, "_collect", output=0)),
        ):
            return nms._suppress(*args, **kwargs)


class _CountedKernel:
    """Stands for a Triton kernel: counts a launch and half of the bitmask's bytes, those right of its diagonal."""

    def __init__(self, counter: DeviceCounter, name: str, output: int) -> None:
        self.counter, self.name, self.bitmask = counter, name, output

    def __getitem__(self, grid: tuple[int, ...]) -> _CountedKernel:
        return self

    def __call__(self, *args: Any, **options: Any) -> None:
        self.counter.kernels[self.name] += 1
        self.counter.bytes += _nbytes(args[self.bitmask]) // 2


def _is_fake(value: Any) -> bool:
    return isinstance(value, torch._subclasses.FakeTensor)


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _is_view(func) -> bool:
    returned = [each.alias_info for each in func._schema.returns]
    return bool(returned) and all(alias is not None and not alias.is_write for alias in returned)


def _launches(name: str, args: Sequence[Any]) -> int:
    """Kernels of an operator: one, or those of multi_tensor_apply for an operator on lists of tensors."""
    if not name.startswith(("_foreach_", "_fused_")):
        return 1
    lists = [each for each in args if isinstance(each, (list, tuple)) and each and isinstance(each[0], Tensor)]
    first = lists[0]
    layouts = [[(tensor.shape, tensor.stride()) for tensor in each] for each in lists]
    if any(layout != layouts[0] for layout in layouts):
        return len(first)  # torch then runs one operator after another
    most = MAX_TENSORS[min(len(lists), 5)]
    launches = blocks = tensors = 0
    for tensor in first:
        tensors += 1
        for _ in range(-(-tensor.numel() // CHUNK)):
            blocks += 1
            if blocks == MAX_BLOCKS:
                launches, blocks, tensors = launches + 1, 0, 1
        if tensors == most:
            launches, blocks, tensors = launches + (blocks > 0), 0, 0
    return launches + (blocks > 0)


def _bytes(name: str, inputs: list[Tensor], results: list[Tensor], mutates: bool) -> int:
    written = sum(map(_nbytes, results))
    if name in ROW_READS:
        indices = [tensor for tensor in inputs if tensor.dtype in (torch.int64, torch.int32, torch.bool)]
        return 2 * written + sum(map(_nbytes, indices))
    if name.startswith("_embedding_bag") and "backward" not in name:
        table, bags = inputs[0], inputs[1]
        return written + bags.numel() * table.shape[1] * table.element_size() + sum(map(_nbytes, inputs[1:]))
    read = sum(map(_nbytes, inputs))
    return read + (written if results or not mutates else read)


def _nbytes(tensor: Tensor) -> int:
    """Bytes of the distinct values of a tensor; an expanded one repeats them."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else min(size, 1)
    return count * tensor.element_size()


@contextmanager
def fake_cuda() -> Iterator[None]:
    """Within this context, tensors have no data and CUDA needs no GPU; tensors of the CPU take the GPU's way."""
    with (
        FakeTensorMode(),
        # torch turns autocast for CUDA off where it finds no GPU
        mock.patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        mock.patch.object(torch.cuda, "is_bf16_supported", lambda *_: True),
        mock.patch.object(nms, "_uses_triton", lambda boxes: True),
        mock.patch.object(layers, "_scales_together", lambda weight: True),
    ):
        yield


def count_ours(config: BenchmarkConfig) -> dict[str, DeviceCounter]:
    """Counters of fpn_det's training step, and of its parts `forward`, `backward` and `update`, and of `detection`.

    The settings are those of the benchmark, with the guard against steps that are not finite.
    """
    settings = replace(config, nms="batched").compose(f"precision={config.precision}")
    counters = {name: DeviceCounter() for name in ("forward", "backward", "update", "detection")}
    with fake_cuda():
        for device in ("cuda", "cpu"):
            with torch.device(device):
                model = settings.build_model(NUM_CLASSES).train()
            batch = _batch_without_data(config, device)
            optimizer = settings.build_recipe().build(model, config.batch_size)
            schedule = settings.build_schedule()(steps=10)
            trainer = settings.trainer
            optimization = Optimization(model, optimizer, schedule, settings.precision, trainer.clip_norm)
            optimization.set_step(0)
            with optimization.autocast():
                model(batch, optimization._step)  # fills caches
            on_cuda = device == "cuda"
            with optimization.autocast(), counters["forward"] if on_cuda else nullcontext():
                total = model(batch, optimization._step).total()
            if not on_cuda:
                with counters["backward"]:
                    total.backward()
                continue
            for weight in optimization.parameters.values():
                weight.grad = torch.zeros_like(weight)
            with counters["update"]:
                optimization._update(torch.isfinite(total.detach()))
            with optimization.autocast(), torch.no_grad():
                model.eval().detect(batch)
                with counters["detection"]:
                    model.detect(batch)
    return counters


def _batch_without_data(config: BenchmarkConfig, device: str) -> Batch:
    count = config.batch_size
    with torch.device(device):
        objects = torch.zeros(count, OBJECTS, dtype=torch.int64)
        sizes = torch.zeros(count, 2, dtype=torch.int64)
        pixels = torch.zeros(count, 3, *config.size, dtype=torch.uint8)
        return Batch(pixels, sizes, sizes, Targets(torch.zeros(count, OBJECTS, 4), objects, objects > 0), sizes[:, 0])


def count_torchvision(config: BenchmarkConfig) -> dict[str, DeviceCounter]:
    """Counters of torchvision's training step and of its detection."""
    _, peer = make_contestants(config, torch.device("cpu"))
    for group in peer.optimizer.param_groups:
        group["foreach"] = True  # its default on CUDA
    counters = {"training": DeviceCounter(), "detection": DeviceCounter()}
    for run, counter in zip((peer.train(), peer.inference()), counters.values(), strict=True):
        peer.model.train(counter is counters["training"])
        run()  # fills caches, makes the state of the optimizer
        with counter:
            run()
    return counters


def gpu_counts(config: BenchmarkConfig) -> Iterator[tuple[str, list[float]]]:
    """Yield the name of each count with its two values, fpn_det's first."""
    ours, peer = count_ours(config), count_torchvision(config)
    parts = {"training": [ours[name] for name in ("forward", "backward", "update")], "detection": [ours["detection"]]}
    for name, counters in parts.items():
        theirs = peer[name]
        yield f"{name}_kernels", [sum(counter.kernels.total() for counter in counters), theirs.kernels.total()]
        yield f"{name}_mib", [sum(counter.bytes for counter in counters) / 2**20, theirs.bytes / 2**20]
        yield f"{name}_host_reads", [sum(counter.host_reads for counter in counters), theirs.host_reads]
        copies = sum(len(counter.between_devices) for counter in counters)
        yield f"{name}_host_device_copies", [copies, theirs.host_constants]
