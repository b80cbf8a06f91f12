from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from torch.utils._python_dispatch import TorchDispatchMode

from fpn_det.models import nms
from fpn_det.models.nms import nms_keep

METHODS = ["torchvision", "batched"]


def crowded_boxes(groups: int, size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(groups, size, 2, generator=generator) * 60
    boxes = torch.cat([corners, corners + 10 + torch.rand(groups, size, 2, generator=generator) * 30], dim=2)
    return boxes, torch.rand(groups, size, generator=generator), torch.rand(groups, size, generator=generator) > 0.2


@pytest.mark.parametrize("method", METHODS)
def test_nms_by_hand(method: str):
    # in a row, each overlapping its neighbor by 1/3: the best removes its neighbors, which then remove nothing
    boxes = torch.tensor([[[0.0, 0, 10, 10], [5, 0, 15, 10], [10, 0, 20, 10], [15, 0, 25, 10]]])
    scores = torch.tensor([[0.9, 0.8, 0.7, 0.6]])
    keep = nms_keep(boxes, scores, torch.ones(1, 4).bool(), 0.3, method=method)
    assert keep.tolist() == [[True, False, True, False]]
    # without the first, the second comes back and removes the third
    keep = nms_keep(boxes, scores, torch.tensor([[False, True, True, True]]), 0.3, method=method)
    assert keep.tolist() == [[False, True, False, True]]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", range(4))
def test_nms_equals_torchvision_group_by_group(method: str, seed: int):
    boxes, scores, valid = crowded_boxes(3, 200, seed)
    keep = nms_keep(boxes, scores, valid, 0.4, method=method)
    for group in range(3):
        (rows,) = torch.where(valid[group])
        expected = rows[torchvision.ops.nms(boxes[group][rows], scores[group][rows], 0.4)]
        assert set(keep[group].nonzero().flatten().tolist()) == set(expected.tolist())


@pytest.mark.parametrize("method", METHODS)
def test_nms_of_labels_equals_torchvision_batched_nms(method: str):
    boxes, scores, valid = crowded_boxes(2, 200, 9)
    labels = torch.randint(0, 4, (2, 200), generator=torch.Generator().manual_seed(0))
    keep = nms_keep(boxes, scores, valid, 0.3, labels, method)
    for group in range(2):
        (rows,) = torch.where(valid[group])
        survivors = torchvision.ops.batched_nms(boxes[group][rows], scores[group][rows], labels[group][rows], 0.3)
        assert set(keep[group].nonzero().flatten().tolist()) == set(rows[survivors].tolist())


def test_nms_batched_reaches_the_end_of_long_chains():
    # 100 boxes in a row, best first: exactly every second one survives, and the last answer needs ~50 rounds
    x = torch.arange(100.0) * 5
    boxes = torch.stack([x, torch.zeros(100), x + 10, torch.full((100,), 10.0)], dim=1)[None]
    keep = nms_keep(boxes, -torch.arange(100.0)[None], torch.ones(1, 100).bool(), 0.3, method="batched")
    assert keep[0].tolist() == [i % 2 == 0 for i in range(100)]


@pytest.mark.parametrize("pair_bytes", [4 * 50 * 50, 4 * 32 * 50 * 2, 1])
def test_nms_batched_is_the_same_in_blocks(monkeypatch: pytest.MonkeyPatch, pair_bytes: int):
    boxes, scores, valid = crowded_boxes(5, 50, 3)
    labels = torch.randint(0, 2, (5, 50), generator=torch.Generator().manual_seed(0))
    whole = [nms_keep(boxes, scores, valid, 0.4, each, "batched") for each in (None, labels)]
    monkeypatch.setattr(nms, "PAIR_BYTES", pair_bytes)
    for expected, each in zip(whole, (None, labels), strict=True):
        assert torch.equal(expected, nms_keep(boxes, scores, valid, 0.4, each, "batched"))


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor that an operator returns."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.nbytes = max(self.nbytes, result.numel() * result.element_size())
        return result


def test_nms_batched_of_one_large_group_needs_bounded_memory():
    size = 20_000  # all pairs would be 1.5 GiB of float32
    boxes, scores, valid = crowded_boxes(1, size, 0)
    with LargestTensor() as largest:
        keep = nms._batched(boxes, scores, valid, 0.5, None) & valid
    assert largest.nbytes <= 1 << 27
    (rows,) = torch.where(valid[0])
    expected = rows[torchvision.ops.nms(boxes[0][rows], scores[0][rows], 0.5)]
    assert set(keep[0].nonzero().flatten().tolist()) == set(expected.tolist())


MEMORY_PROGRAM = """
import resource
import torch
import torchvision
from fpn_det.models import nms

torch.manual_seed(0)
corners = torch.rand(80_000, 2) * 2000
boxes = torch.cat([corners, corners + 10 + torch.rand(80_000, 2) * 90], dim=1)
scores = torch.rand(80_000)
expected = torch.zeros(80_000, dtype=torch.bool)
expected[torchvision.ops.nms(boxes, scores, 0.5)] = True
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
keep = nms._batched(boxes[None], scores[None], torch.ones(1, 80_000, dtype=torch.bool), 0.5, None)[0]
kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
assert torch.equal(keep, expected) and 10_000 < keep.sum() < 70_000, keep.sum()
assert kibibytes < 1 << 20, kibibytes
print(int(keep.sum()), kibibytes)
"""


@pytest.mark.slow
def test_nms_batched_of_80_000_boxes_takes_less_than_a_gibibyte():
    subprocess.run([sys.executable, "-c", MEMORY_PROGRAM], check=True)


@pytest.mark.parametrize("method", METHODS)
def test_nms_of_labels_with_a_box_that_is_not_finite(method: str):
    boxes, scores, valid = crowded_boxes(2, 50, 4)
    labels = torch.randint(0, 3, (2, 50), generator=torch.Generator().manual_seed(0))
    valid[0, 0] = True
    without = valid.clone()
    without[0, 0] = False
    expected = nms_keep(boxes, scores, without, 0.3, labels, method)
    assert expected.sum() < without.sum()
    boxes[0, 0, 2] = torch.nan
    keep = nms_keep(boxes, scores, valid, 0.3, labels, method)
    keep[0, 0] = False
    assert torch.equal(keep, expected)


TRITON_PROGRAM = """
import sys
import torch
from fpn_det.models import nms_triton

boxes, valid, labels, expected = torch.load(sys.argv[1])
for threshold_labels, keep in zip((None, labels), expected, strict=True):
    assert torch.equal(nms_triton.greedy_mask(boxes, valid, 0.4, threshold_labels) & valid, keep)
nms_triton.BITMASK_BYTES = 1  # 32 rows at a time
assert torch.equal(nms_triton.greedy_mask(boxes, valid, 0.4, labels) & valid, expected[1])
"""


@pytest.mark.skipif(not nms.HAS_TRITON, reason="needs triton")
@pytest.mark.parametrize("size", [1, 32, 150])
def test_nms_in_triton_equals_the_others_in_the_interpreter(tmp_path: Path, size: int):
    boxes, _, valid = crowded_boxes(3, size, 5)
    valid[0, 0] = True
    boxes[0, 0, 1] = torch.nan
    labels = torch.randint(0, 2, (3, size), generator=torch.Generator().manual_seed(0))
    scores = -torch.arange(float(size)).expand(3, -1)
    expected = [nms_keep(boxes, scores, valid, 0.4, each, "torchvision") for each in (None, labels)]
    torch.save((boxes, valid, labels, expected), tmp_path / "example.pt")
    environment = os.environ | {"TRITON_INTERPRET": "1"}  # read when triton is imported
    command = [sys.executable, "-c", TRITON_PROGRAM, str(tmp_path / "example.pt")]
    subprocess.run(command, check=True, env=environment)


@pytest.mark.skipif(not nms.HAS_TRITON, reason="needs triton")
def test_nms_in_triton_compiles_for_a_gpu():
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fpn_det.models import nms_triton

    numbers = {"first_row": "i32", "num_rows": "i32", "num_words": "i32"}
    pack = {"boxes": "*fp32", "areas": "*fp32", "labels": "*i64", "bits": "*i32", "iou_threshold": "fp32"}
    pack |= numbers | {"num_boxes": "i32", "has_labels": "constexpr", "block_rows": "constexpr"}
    collect = {"bits": "*i32", "removed": "*i32", "kept": "*i32"} | numbers
    collect |= {"padded_words": "constexpr", "tile_rows": "constexpr"}
    for kernel, signature, constants in (
        (nms_triton._pack_overlaps, pack, {"has_labels": True, "block_rows": nms_triton.ROWS_PER_PROGRAM}),
        (nms_triton._collect, collect, {"padded_words": 64, "tile_rows": 32}),
        (nms_triton._collect, collect, {"padded_words": 4096, "tile_rows": 1}),
    ):
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        compiled = triton.compile(source, GPUTarget("cuda", 80, 32), options={"enable_fp_fusion": False})
        # a fused multiply-add would round differently from `box_iou`
        assert "fma" not in compiled.asm["ptx"]


@pytest.mark.parametrize("method", METHODS)
def test_nms_of_nothing(method: str):
    assert nms_keep(torch.zeros(2, 0, 4), torch.zeros(2, 0), torch.zeros(2, 0).bool(), 0.5, method=method).shape == (
        2,
        0,
    )
    nothing = nms_keep(torch.zeros(2, 3, 4), torch.zeros(2, 3), torch.zeros(2, 3).bool(), 0.5, method=method)
    assert not nothing.any()


def test_nms_refuses_an_unknown_method():
    with pytest.raises(ValueError, match="got 'fast'"):
        nms_keep(torch.zeros(1, 1, 4), torch.zeros(1, 1), torch.ones(1, 1).bool(), 0.5, method="fast")
