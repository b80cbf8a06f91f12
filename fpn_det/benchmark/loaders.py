"""The training loaders of both projects: random scale, random flip, batches on the device."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from itertools import islice
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import tv_tensors
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
from torchvision.transforms import v2

from fpn_det.benchmark.config import BenchmarkConfig
from fpn_det.benchmark.contestants import NUM_CLASSES, make_batch
from fpn_det.boxes import xyxy_to_xywh
from fpn_det.data.collation import PackedBatch
from fpn_det.runtime import Ranks
from fpn_det.training.config import TrainConfig

IMAGES = 64  # of the generated data set

Stream = Callable[[], Iterator[int]]  # starts workers and yields the number of images of each batch


def make_streams(config: BenchmarkConfig, folder: Path, device: torch.device) -> dict[str, tuple[Stream, Stream]]:
    """One epoch of the training images, fpn_det's loader and torchvision's, by measure.

    With `resize_on_device`, the workers of fpn_det only decode and the device resizes; `decoded` counts what those workers
    send, without the work of the device. torchvision's loader is the same in all measures.

    Args:
        config: options.
        folder: data set in the layout of COCO.
        device: that batches are copied to.
    """
    names = (
        f"data.root={folder}",
        f"data.num_workers={config.num_workers}",
        f"trainer.batch_size={config.batch_size}",
    )
    here, there = config.compose(*names), config.compose(*names, "data.resize_on=device")
    peer = _torchvision(here, device)
    return {
        "loader_images_per_s": (_ours(here, device), peer),
        "loader_resize_on_device_images_per_s": (_ours(there, device), peer),
        "loader_decoded_images_per_s": (_ours(there, device, decoded=True), peer),
    }


def _ours(settings: TrainConfig, device: torch.device, decoded: bool = False) -> Stream:
    annotations = settings.data.read_train_and_val(settings.seed).train
    stride = settings.build_model(annotations.num_classes).stride
    loader = settings.train_loader(annotations, stride, Ranks(), device)
    if decoded:
        return lambda: (
            len(packed.indices)
            for packed in islice(loader.packed_batches(0), loader.steps_per_epoch)
            if isinstance(packed, PackedBatch)
        )
    return lambda: map(len, islice(loader.iterate(0), loader.steps_per_epoch))


def _torchvision(settings: TrainConfig, device: torch.device) -> Stream:
    """The multi-scale recipe of torchvision's reference scripts, with the scales of `settings`."""
    data = settings.data
    resize, flip = data.train_transforms["resize"], data.train_transforms["flip"]
    assert resize and flip and data.train.images and data.train.annotations
    transforms = v2.Compose(
        [
            v2.RandomShortestSize(resize["sides"], resize["max_side"]),
            v2.RandomHorizontalFlip(flip["p"]),
            v2.PILToTensor(),
            v2.ToDtype(torch.float, scale=True),
            v2.ConvertBoundingBoxFormat(tv_tensors.BoundingBoxFormat.XYXY),
            v2.SanitizeBoundingBoxes(),
            v2.ToPureTensor(),
        ]
    )
    with redirect_stdout(None):  # pycocotools prints its progress
        dataset = CocoDetection(data.train.images, data.train.annotations, transforms=transforms)
    dataset.ids = [image for image in dataset.ids if any(not row["iscrowd"] for row in dataset.coco.imgToAnns[image])]
    loader = DataLoader(
        wrap_dataset_for_transforms_v2(dataset, target_keys=("boxes", "labels", "image_id")),
        int(settings.trainer.batch_size),
        shuffle=True,
        num_workers=data.num_workers,
        collate_fn=_collate,
        pin_memory=device.type == "cuda",
        drop_last=True,
    )

    def stream() -> Iterator[int]:
        for images, _ in loader:
            images = [image.to(device, non_blocking=True) for image in images]
            yield len(images)

    return stream


def _collate(examples: list) -> tuple:
    return tuple(zip(*examples, strict=True))


def write_images(folder: Path, size: tuple[int, int]) -> None:
    """Write a small data set in the layout of COCO. Grain gives the JPEG files the size of photographs."""
    torch.manual_seed(0)
    batch = make_batch(IMAGES, size)
    height, width = size
    names = [f"{row:03}.jpg" for row in range(IMAGES)]
    for part in ("train2017", "val2017"):
        (folder / part).mkdir(parents=True)
        for name, pixels in zip(names, batch.pixels, strict=True):
            grain = torch.randn(height, width, 1) * 8
            picture = (pixels.permute(1, 2, 0) + grain).clamp(0, 255).to(torch.uint8)
            Image.fromarray(picture.numpy()).save(folder / part / name, quality=90)
    boxes, labels = xyxy_to_xywh(batch.targets.boxes), batch.targets.labels
    objects = [(image, object) for image, object in batch.targets.valid.nonzero().tolist()]
    document = {
        "images": [{"id": row, "file_name": name, "height": height, "width": width} for row, name in enumerate(names)],
        "categories": [{"id": label + 1, "name": f"class {label}"} for label in range(NUM_CLASSES)],
        "annotations": [
            {
                "id": number,
                "image_id": image,
                "category_id": labels[image, object].item() + 1,
                "bbox": boxes[image, object].tolist(),
                "area": boxes[image, object, 2:].prod().item(),
                "iscrowd": 0,
            }
            for number, (image, object) in enumerate(objects, start=1)
        ],
    }
    (folder / "annotations").mkdir()
    for part in ("train2017", "val2017"):
        (folder / "annotations" / f"instances_{part}.json").write_text(json.dumps(document))
