from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice
from pathlib import Path

import albumentations as A
import numpy as np
import pytest
import torch
from torch import Tensor

from fpn_det.annotations.reading import read_annotations
from fpn_det.annotations.subsets import drop_empty
from fpn_det.data import loaders
from fpn_det.data.collation import Collator, PackedBatch
from fpn_det.data.dataset import DetectionDataset, Example
from fpn_det.data.flip_resize import FlipResize
from fpn_det.data.loaders import EvalLoader, TrainLoader
from fpn_det.data.sampling import GlobalBatches, Key
from fpn_det.data.transforms import Pipeline, ResizeShortestSide
from fpn_det.data.workers import BUFFERS_PER_WORKER, Workers
from fpn_det.runtime import Ranks
from fpn_det.structures import Batch

CPU = torch.device("cpu")


@pytest.fixture
def dataset(document, write, pictures) -> DetectionDataset:
    chain = [A.HorizontalFlip(p=0.5), A.RandomBrightnessContrast(p=0.5), ResizeShortestSide([40, 48, 64], 100)]
    return DetectionDataset(drop_empty(read_annotations(write(document), pictures)), Pipeline(chain), seed=5)


def loader(
    dataset: DetectionDataset, ranks: Ranks | None = None, accumulate: int = 1, workers: int = 0, start_method=None
) -> TrainLoader:
    ranks = ranks or Ranks()
    batches = GlobalBatches(dataset.annotations.sizes, 4, seed=1, parts=ranks.world_size * accumulate)
    return TrainLoader(
        dataset, batches, ranks, accumulate, Collator(32, (128, 128)), Workers(workers, start_method), CPU
    )


def assert_same(one: Batch, other: Batch) -> None:
    for name in ("pixels", "sizes", "original_sizes", "indices"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    for name in ("boxes", "labels", "valid"):
        assert torch.equal(getattr(one.targets, name), getattr(other.targets, name)), name


def test_dataset_returns_objects_without_crowds(document, write, pictures):
    annotations = read_annotations(write(document), pictures)
    dataset = DetectionDataset(annotations, Pipeline([A.HorizontalFlip(p=1)]), seed=0)
    example = dataset[Key(3, 0)]
    # image 3 is 64 px wide; its boxes are 5..28 and 5..28
    assert example.boxes.tolist() == [[36, 3, 59, 18], [36, 13, 59, 29]]
    assert example.labels.tolist() == [0, 1]
    assert (example.original_size, example.index) == ((48, 64), 3)
    assert dataset[Key(1, 0)].boxes.shape == (0, 4)  # crowds only
    assert dataset[Key(2, 0)].boxes.shape == (0, 4)  # nothing


@pytest.mark.parametrize(
    ("column", "value"), [("boxes", float("nan")), ("boxes", float("inf")), ("labels", 2), ("labels", -1)]
)
def test_dataset_names_the_invalid_annotation(document, write, pictures, column, value):
    annotations = read_annotations(write(document), pictures)
    getattr(annotations, column)[annotations.rows(3)][1] = value
    dataset = DetectionDataset(annotations, Pipeline([]), seed=0)
    with pytest.raises(
        ValueError, match=r"3.png \(image 37\): annotation 6: expected a finite box and a label below 2, got"
    ):
        dataset[Key(3, 0)]


def test_dataset_names_the_image_whose_size_differs_from_the_annotations(document, write, pictures):
    document["images"][0] |= {"width": 48, "height": 64}
    document["images"][3] |= {"width": 100}
    dataset = DetectionDataset(read_annotations(write(document), pictures), Pipeline([]), seed=0)
    with pytest.raises(
        ValueError, match=r"0\.png: expected 48 x 64 px as annotated, got 64 x 48\. The annotations ignore its EXIF"
    ):
        dataset[Key(0, 0)]
    with pytest.raises(ValueError, match=r"3\.png: expected 100 x 48 px as annotated, got 64 x 48\. Correct"):
        dataset[Key(3, 0)]


def test_dataset_names_the_image_on_which_a_transform_fails(document, write, pictures):
    dataset = DetectionDataset(
        read_annotations(write(document), pictures), Pipeline([A.RandomCrop(height=60, width=10, p=1)]), seed=0
    )
    with pytest.raises(ValueError, match=r"0\.png \(image 7, annotations 1, 2\): a transform failed: CropSizeError"):
        dataset[Key(0, 0)]


def example(height: int, width: int, objects: int = 0, index: int = 0) -> Example:
    random = np.random.default_rng(height * width + objects)
    boxes = np.sort(random.uniform(0, min(height, width), (objects, 2, 2)), axis=1).reshape(-1, 4).astype(np.float32)
    pixels = random.integers(1, 256, (height, width, 3), dtype=np.uint8)
    return Example(pixels, FlipResize((height, width)), boxes, np.arange(objects), (2 * height, 2 * width), index)


def test_collate_pads_images_to_the_smallest_canvas_that_the_stride_divides():
    examples = [example(40, 70, 3, 5), example(65, 32, 9, 2), example(10, 10)]
    batch = Collator(32).collate(examples)
    assert batch.pixels.shape == (3, 3, 96, 96)
    assert batch.pixels.dtype == torch.uint8
    assert batch.pixels.is_contiguous(memory_format=torch.channels_last)
    assert batch.sizes.tolist() == [[40, 70], [65, 32], [10, 10]]
    assert batch.original_sizes.tolist() == [[80, 140], [130, 64], [20, 20]]
    assert batch.indices.tolist() == [5, 2, 0]
    assert batch.targets.boxes.shape == (3, 16, 4)
    assert batch.targets.valid.sum(dim=1).tolist() == [3, 9, 0]
    for image, each in zip(batch.pixels, examples, strict=True):
        height, width = each.pixels.shape[:2]
        assert np.array_equal(image[:, :height, :width].permute(1, 2, 0), each.pixels)
        assert image.sum() == each.pixels.sum(dtype=np.int64)  # the padding is zero
    assert all(
        field.dtype == torch.int64 for field in (batch.sizes, batch.original_sizes, batch.indices, batch.targets.labels)
    )


def test_collate_pads_to_a_fixed_canvas_and_refuses_larger_images():
    assert Collator(32, (64, 128)).collate([example(40, 70)]).pixels.shape == (1, 3, 64, 128)
    with pytest.raises(ValueError, match=r"data\.canvas: expected images of at most 64 x 64 px \(h x w\), got 40 x 70"):
        Collator(32, (64, 64)).collate([example(40, 70)])


def test_bucket_canvas_has_few_shapes():
    collator = Collator(32, "bucket")
    assert collator.canvas_size([(40, 70), (129, 32)]) == (256, 128)
    assert Collator(96, "bucket").canvas_size([(40, 70)]) == (384, 384)  # the stride divides it too
    sides = range(640, 801, 32)
    sizes = [(side, long) for side in sides for long in range(side, 1334, 7)]
    # shorter sides 640, 768 and 896 with longer ones from themselves to 1408
    assert len({collator.canvas_size([size]) for size in sizes}) == 7 + 6 + 5
    assert len({Collator(32).canvas_size([size]) for size in sizes}) > 80


def test_unpacking_does_not_copy_pixels():
    packed = Collator(32).pack([example(40, 70)])
    assert packed.finish(packed.unpack()).pixels.data_ptr() == packed.pixels.data_ptr()


def test_a_canvas_that_the_stride_does_not_divide_is_refused():
    with pytest.raises(
        ValueError, match=r"data\.canvas: expected sides that the model's stride 32 divides, got \[100, 128\]"
    ):
        Collator(32, (100, 128))


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")  # a machine may have fewer cores
@pytest.mark.parametrize("workers", [1, 4])
def test_batches_do_not_depend_on_the_number_of_workers(dataset, workers):
    expected = list(islice(loader(dataset).iterate(0), 9))
    found = list(islice(loader(dataset, workers=workers).iterate(0), 9))
    for one, other in zip(expected, found, strict=True):
        assert_same(one, other)


@pytest.mark.slow
def test_batches_are_the_same_from_spawned_workers(dataset):
    expected = list(islice(loader(dataset).iterate(0), 5))
    found = list(islice(loader(dataset, workers=2, start_method="spawn").iterate(0), 5))
    for one, other in zip(expected, found, strict=True):
        assert_same(one, other)


def test_batches_of_ranks_and_micro_batches_form_the_global_batch(dataset):
    whole = list(islice(loader(dataset).iterate(0), 3))
    for world_size, accumulate in [(2, 1), (1, 2), (2, 2)]:
        shares = [
            list(islice(loader(dataset, Ranks(r, world_size), accumulate).iterate(0), 3 * accumulate))
            for r in range(world_size)
        ]
        for step, batch in enumerate(whole):
            parts = [share[step * accumulate + number] for number in range(accumulate) for share in shares]
            assert torch.equal(torch.cat([part.indices for part in parts]), batch.indices)
            assert torch.equal(torch.cat([part.pixels for part in parts]), batch.pixels)


@pytest.mark.parametrize(
    "place",
    [
        lambda resize: [A.HorizontalFlip(p=0.5), resize],
        lambda resize: [resize, A.VerticalFlip(p=0.5)],
        lambda resize: [A.Sequential([resize], p=1)],
    ],
    ids=["deferred", "followed by another transform", "in a composition"],
)
def test_a_side_per_step_is_that_of_all_images_on_all_ranks(document, write, pictures, place):
    sides = [40, 48, 64]
    chain = place(ResizeShortestSide(sides, 1000, per_step=True))
    dataset = DetectionDataset(drop_empty(read_annotations(write(document), pictures)), Pipeline(chain), seed=5)

    def batches(ranks: Ranks, accumulate: int, workers: int = 0) -> list[Batch]:
        global_batches = GlobalBatches(dataset.annotations.sizes, 4, 1, ranks.world_size * accumulate)
        made = TrainLoader(dataset, global_batches, ranks, accumulate, Collator(32), Workers(workers), CPU)
        return list(islice(made.iterate(0), 60 * accumulate))

    whole = batches(Ranks(), 1)
    drawn = [batch.sizes.amin(dim=1).unique().tolist() for batch in whole]
    assert all(len(each) == 1 for each in drawn)  # all images of a step
    counts = [sum(each == [side] for each in drawn) for side in sides]
    assert sum(counts) == 60 and min(counts) >= 10  # of 20 expected; standard deviation 3.7
    for world_size, accumulate, workers in [(2, 1, 0), (1, 2, 1), (2, 2, 0)]:
        for rank in range(world_size):
            share = batches(Ranks(rank, world_size), accumulate, workers)
            assert [batch.sizes.amin(dim=1).unique().tolist() for batch in share[::accumulate]] == drawn


def test_iterate_starts_at_any_step_and_rebuild_gives_the_same_batches(dataset):
    straight = list(islice(loader(dataset, accumulate=2).iterate(0), 10))
    resumed = list(islice(loader(dataset, accumulate=2, workers=1).iterate(3), 4))
    for one, other in zip(straight[6:], resumed, strict=True):
        assert_same(one, other)
    for one, other in zip(straight[8:], loader(dataset, accumulate=2).rebuild(4), strict=True):
        assert_same(one, other)


def test_epochs_differ(dataset):
    batches = list(islice(loader(dataset).iterate(0), 12))  # 1 step per epoch: 4 of 6 images
    seen = {pixels.numpy().tobytes() for batch in batches for pixels in batch.pixels}
    assert len(seen) > 24  # of 48: six images, flipped or not, lighter or not, three sizes


def test_batches_do_not_change_while_later_ones_are_loaded(dataset):
    """Workers reuse their buffers, but a batch that was returned must not change."""
    held = []
    for batch in islice(loader(dataset, workers=2).iterate(0), 16):
        held.append((batch, batch.pixels.clone()))
        time.sleep(0.01)
    for step, (batch, pixels) in enumerate(held):
        assert torch.equal(batch.pixels, pixels)
        assert_same(batch, loader(dataset).rebuild(step)[0])


def test_loading_leaves_the_global_generator_alone(dataset):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    next(loader(dataset, workers=1).iterate(0))
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_a_one_line_error_from_any_process(document, write, pictures, tmp_path, workers):
    content = (pictures / "3.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    document["images"][3]["file_name"] = str(tmp_path / "cut.png")
    dataset = DetectionDataset(read_annotations(write(document), pictures), Pipeline([]), seed=0)
    with pytest.raises(ValueError) as caught:
        list(islice(loader(dataset, workers=workers).iterate(0), 4))
    assert str(caught.value).startswith(f"{tmp_path}/cut.png: expected a complete image")
    assert "\n" not in str(caught.value)


def test_a_process_with_abandoned_workers_ends():
    """Workers ignore SIGTERM, with which multiprocessing would end them. Tried in a child process first."""
    lines = (
        "import sys, multiprocessing",
        "from fpn_det.data.workers import Workers, load_in_workers",
        "def abandon():",
        "    batches = iter(load_in_workers({1: 1, 2: 2}, [1, 2], Workers(2)))",
        "    next(batches)",
        "    sys.modules['kept'] = batches",
        "child = multiprocessing.get_context('fork').Process(target=abandon)",
        "child.start()",
        "child.join()",
        "abandon()",
    )
    ended = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, timeout=200)
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere workers poll for their parent every five seconds")
def test_workers_end_with_a_killed_main_process():
    """Covers a worker that is blocked sending a batch larger than a pipe."""
    lines = (
        "from itertools import count",
        "from fpn_det.data.workers import Workers, load_in_workers",
        "class Large: __getitem__ = lambda self, key: bytes(10**6)",
        "batches = iter(load_in_workers(Large(), count(), Workers(1)))",
        "next(batches)",
        "print(batches._workers[0].pid, flush=True)",
        "input()",
    )
    process = subprocess.Popen(
        [sys.executable, "-c", "\n".join(lines)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    worker = Path("/proc") / process.stdout.readline().strip() / "stat"
    assert worker.exists()
    process.kill()
    process.wait()
    for _ in range(100):
        if not worker.exists() or worker.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the worker is still running")


@pytest.mark.parametrize("workers", [0, 2])
def test_eval_loader_yields_every_image_once_and_can_be_iterated_again(document, write, pictures, workers):
    annotations = read_annotations(write(document), pictures)
    dataset = DetectionDataset(annotations, Pipeline([ResizeShortestSide([40], 100)]), seed=0)
    shares = [EvalLoader(dataset, 3, Ranks(rank, 3), Collator(32), Workers(workers), CPU) for rank in range(3)]
    assert [len(share) for share in shares] == [1, 1, 1]
    for share in shares:
        next(iter(share))  # abandoned
    for _ in range(2):
        seen = torch.cat([batch.indices for share in shares for batch in share])
        assert sorted(seen.tolist()) == list(range(8))


def test_eval_loader_of_a_rank_without_images_is_empty(document, write, pictures):
    dataset = DetectionDataset(read_annotations(write(document), pictures), Pipeline([]), seed=0)
    empty = EvalLoader(dataset, 1, Ranks(9, 10), Collator(32), Workers(1), CPU)
    assert len(empty) == 0
    assert list(empty) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_batches_on_the_gpu_equal_those_on_the_cpu(dataset):
    device = torch.device("cuda")
    batches = GlobalBatches(dataset.annotations.sizes, 4, seed=1)
    on_gpu = TrainLoader(dataset, batches, Ranks(), 1, Collator(32, (128, 128)), Workers(2), device).iterate(0)
    for one, other in zip(islice(loader(dataset).iterate(0), 20), on_gpu, strict=False):
        torch.cuda._sleep(10_000_000)  # the model is busy while the next batch is copied
        assert other.pixels.is_cuda
        assert_same(one, other.to("cpu"))


def test_pixels_are_copied_to_the_gpu_before_their_buffer_may_be_overwritten(monkeypatch):
    """Streams are simulated: a copy happens when the host waits for it, and a requested item overwrites the one before."""
    copies: list[Callable[[], Tensor]] = []
    locked: set[int] = set()

    class Stream:
        def __init__(self, device: torch.device) -> None:
            pass

        def synchronize(self) -> None:
            while copies:
                copies.pop(0)()

        def record_event(self) -> Stream:
            return self

        def wait_stream(self, other: Stream) -> None:
            pass  # the device waits, not the host

    def to(batch: Batch, device: torch.device) -> Batch:
        assert batch.pixels.untyped_storage().data_ptr() in locked
        target = torch.zeros_like(batch.pixels)
        copies.append(lambda: target.copy_(batch.pixels))
        return replace(batch, pixels=target)

    def packed_batches(count: int) -> Iterator[PackedBatch]:
        buffers = [torch.zeros(32 * 32 * 3, dtype=torch.uint8) for _ in range(BUFFERS_PER_WORKER)]
        for number in range(count):
            packed = Collator(32).pack([example(32, 32)], allocate=lambda *shape, n=number: buffers[n % 3].view(shape))
            packed.pixels.fill_(number)
            yield replace(packed, buffer=(0, number % 3))
            packed.pixels.fill_(99)

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(device))
    monkeypatch.setattr(Batch, "to", to)
    monkeypatch.setattr(Batch, "pin_memory", lambda batch: batch)
    monkeypatch.setattr(loaders, "cuda_host_register", lambda address, size: locked.add(address) is None)
    monkeypatch.setattr(loaders, "cuda_host_unregister", locked.remove)
    monkeypatch.setattr(loaders, "_used_on_current_stream", lambda batch: batch)
    batches = list(loaders._on_device(packed_batches(7), torch.device("cuda")))
    assert [batch.pixels.unique().tolist() for batch in batches] == [[number] for number in range(7)]
    assert not locked and not copies
    abandoned = loaders._on_device(packed_batches(7), torch.device("cuda"))
    first = next(abandoned)
    abandoned.close()  # type: ignore[attr-defined]
    assert first.pixels.unique().tolist() == [0] and not locked and not copies
