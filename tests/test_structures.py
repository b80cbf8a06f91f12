from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from compare import assert_close
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fpn_det.structures import Annotations, Batch, Detections, Losses, Pyramid, Targets


def test_targets_pad_to_powers_of_two_and_never_to_nothing():
    for most, width in ((0, 8), (1, 8), (8, 8), (9, 16), (17, 32)):
        targets = Targets.pad(
            [torch.rand(most, 4), torch.zeros(0, 4)], [torch.ones(most).long(), torch.zeros(0).long()]
        )
        assert targets.boxes.shape == (2, width, 4)
        assert targets.valid.sum(1).tolist() == [most, 0]
        assert (targets.boxes[1] == torch.tensor([0.0, 0.0, 1.0, 1.0])).all()


def test_targets_refuse_boxes_without_labels():
    with pytest.raises(ValueError, match="one label per box, got 3 labels for 2 boxes in image 0"):
        Targets.pad([torch.zeros(2, 4)], [torch.zeros(3).long()])


def test_cells_lie_level_by_level_and_row_by_row():
    levels = [torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6), torch.arange(2 * 3 * 2 * 3).view(2, 3, 2, 3)]
    pyramid = Pyramid(levels, (4, 8), torch.tensor([[16, 24]] * 2))
    assert pyramid.starts == [0, 24]
    assert pyramid.cells.shape == (2, 30, 3) and pyramid.cells.dtype == torch.float32
    assert (pyramid.cells[1, 0 + 2 * 6 + 5] == levels[0][1, :, 2, 5]).all()
    assert (pyramid.cells[0, 24 + 1 * 3 + 2] == levels[1][0, :, 1, 2]).all()


def test_detections_return_to_the_original_frame_by_the_ratio_of_sides():
    # an image of 100 x 200 (h, w), resized to 51 x 100: y scales by 100 / 51, x by 2
    batch = Batch(
        torch.zeros(1, 3, 64, 128, dtype=torch.uint8),
        torch.tensor([[51, 100]]),
        torch.tensor([[100, 200]]),
        Targets.pad([torch.zeros(0, 4)], [torch.zeros(0).long()]),
        torch.tensor([0]),
    )
    boxes = torch.tensor([[[10.0, 5.1, 100.5, 51.0]]])
    detections = Detections(boxes, torch.ones(1, 1), torch.zeros(1, 1).long(), torch.ones(1, 1).bool())
    assert_close(detections.to_original(batch).boxes, torch.tensor([[[20.0, 10.0, 200.0, 100.0]]]), 1e-5)


def test_losses_sum_their_terms_and_not_their_statistics():
    losses = Losses({"a": torch.tensor(1.0)}, {"s": torch.tensor(9.0)}) | Losses({"b": torch.tensor(2.0)})
    assert losses.total() == 3.0
    assert set(losses.statistics) == {"s"}


def test_annotations_state_image_and_class_counts():
    # 3 images with 2, 0 and 1 boxes; the last box is a crowd region
    annotations = Annotations(
        image_ids=torch.tensor([7, 8, 9]),
        path_bytes=torch.zeros(0, dtype=torch.uint8),
        path_offsets=torch.zeros(4, dtype=torch.int64),
        sizes=torch.ones(3, 2, dtype=torch.int64),
        offsets=torch.tensor([0, 2, 2, 3]),
        boxes=torch.zeros(3, 4, dtype=torch.float64),
        labels=torch.tensor([1, 0, 1]),
        iscrowd=torch.tensor([False, False, True]),
        area=torch.zeros(3, dtype=torch.float64),
        annotation_ids=torch.arange(3),
        class_names=("a", "b", "c"),
        category_ids=(1, 2, 3),
    )
    assert annotations.image_of_boxes.tolist() == [0, 0, 2]
    assert annotations.boxes_per_image.tolist() == [2, 0, 1]
    assert annotations.objects_per_image.tolist() == [2, 0, 0]
    assert annotations.boxes_per_class.tolist() == [1, 2, 0]

    digest = annotations.digest()
    starts = torch.tensor([0, 3, 3, 3])
    here, moved = (
        replace(annotations, path_bytes=torch.tensor(list(path), dtype=torch.uint8), path_offsets=starts)
        for path in (b"a/x", b"b/x")
    )
    assert moved.digest() == here.digest() != digest  # folders may change, names may not
    for changed in (
        replace(annotations, boxes=annotations.boxes + 1),
        replace(annotations, labels=annotations.labels.roll(1)),
        replace(annotations, iscrowd=~annotations.iscrowd),
        replace(annotations, class_names=("a", "c", "b")),
    ):
        assert changed.digest() != digest


def test_batches_are_copied_to_the_cpu_synchronously():
    """An asynchronous copy would let the host read pinned memory before it is written."""
    waits: dict[str, set[bool]] = {"cpu": set(), "cuda": set()}

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            if function is torch.ops.aten._to_copy.default:
                waits[torch.device(kwargs["device"]).type].add(not kwargs.get("non_blocking", False))
            return function(*args, **kwargs)

    with FakeTensorMode(), Recorder():
        targets = Targets.pad([torch.ones(2, 4)], [torch.ones(2, dtype=torch.int64)])
        sizes = torch.ones(1, 2, dtype=torch.int64)
        batch = Batch(torch.zeros(1, 3, 8, 8), sizes, sizes, targets, torch.zeros(1, dtype=torch.int64))
        on_gpu = batch.to("cuda")
        assert on_gpu.targets.boxes.device.type == "cuda"
        for device in ("cpu", torch.device("cpu")):
            assert on_gpu.to(device).pixels.device.type == "cpu"
    assert waits == {"cpu": {True}, "cuda": {False}}


def test_digest_of_annotations_changes_with_boxes_and_names_and_not_with_the_folder():
    def annotations(folder: str, name: str = "a.png", x: float = 1.0) -> Annotations:
        path = f"{folder}/{name}".encode()
        return Annotations(
            image_ids=torch.tensor([7]),
            path_bytes=torch.tensor(list(path), dtype=torch.uint8),
            path_offsets=torch.tensor([0, len(path)]),
            sizes=torch.tensor([[10, 20]]),
            offsets=torch.tensor([0, 1]),
            boxes=torch.tensor([[x, 1.0, 5.0, 5.0]], dtype=torch.float64),
            labels=torch.tensor([0]),
            iscrowd=torch.tensor([False]),
            area=torch.tensor([16.0], dtype=torch.float64),
            annotation_ids=torch.tensor([1]),
            class_names=("cat",),
            category_ids=(1,),
        )

    digest = annotations("/data").digest()
    assert annotations("/elsewhere/set").digest() == digest
    assert annotations("/data", x=1.5).digest() != digest
    assert annotations("/data", name="b.png").digest() != digest
