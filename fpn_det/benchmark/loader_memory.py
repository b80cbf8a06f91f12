"""Memory of a training loader and its workers, and its growth with the size of the data set.

Measured as the sum of the proportional set sizes (PSS): a page that n processes share counts as 1/n in each. Pages of files, such
as libraries, are left out: their share depends on what else runs on the machine.
"""

from __future__ import annotations

import os
import warnings
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image

from fpn_det.data.collation import Collator
from fpn_det.data.dataset import DetectionDataset
from fpn_det.data.loaders import TrainLoader
from fpn_det.data.sampling import GlobalBatches
from fpn_det.data.transforms import Pipeline
from fpn_det.data.workers import StartMethod, Workers
from fpn_det.runtime import Ranks
from fpn_det.structures import Annotations

FEW, MANY = 100, 100_000  # images
OBJECTS = 7  # of each, as in COCO
BATCHES = 200  # of 8 images, read before the measurement
METHODS: tuple[StartMethod, ...] = ("fork", "spawn")
NUM_WORKERS = 4


def loader_growth_mib(few: int = FEW, many: int = MANY) -> dict[str, float]:
    """MiB that `many` instead of `few` images add, by start method of the workers (`none` = without workers)."""
    kinds: list[tuple[str, int, StartMethod | None]] = [
        ("none", 0, None),
        *((method, NUM_WORKERS, method) for method in METHODS),
    ]
    return {
        name: _in_a_process(many, workers, method) - _in_a_process(few, workers, method)
        for name, workers, method in kinds
    }


def _in_a_process(num_images: int, num_workers: int, start_method: StartMethod | None) -> float:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_measure, num_images, num_workers, start_method).result()


def _measure(num_images: int, num_workers: int, start_method: StartMethod | None) -> float:
    """MiB of this process and its descendants while they load."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores
    with TemporaryDirectory() as folder:
        file = Path(folder) / "picture.png"
        Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(file)
        dataset = DetectionDataset(_annotations(num_images, str(file)).share_memory(), Pipeline([]), seed=0)
        order = GlobalBatches(dataset.annotations.sizes, 8, seed=0)
        workers = Workers(num_workers, start_method)
        loader = TrainLoader(dataset, order, Ranks(), 1, Collator(32), workers, torch.device("cpu"))
        batches = loader.iterate(0)
        for _ in islice(batches, BATCHES):
            pass
        return sum(map(_pss_mib, _family(os.getpid())))


def _annotations(num_images: int, path: str) -> Annotations:
    """Annotations of `num_images` images, all of one file."""
    count, encoded = num_images * OBJECTS, path.encode()
    return Annotations(
        image_ids=torch.arange(num_images),
        path_bytes=torch.frombuffer(bytearray(encoded * num_images), dtype=torch.uint8),
        path_offsets=torch.arange(num_images + 1) * len(encoded),
        sizes=torch.full((num_images, 2), 32),
        offsets=torch.arange(num_images + 1) * OBJECTS,
        boxes=torch.tensor([[4.0, 4.0, 20.0, 24.0]], dtype=torch.float64).repeat(count, 1),
        labels=torch.zeros(count, dtype=torch.int64),
        iscrowd=torch.zeros(count, dtype=torch.bool),
        area=torch.full((count,), 320.0, dtype=torch.float64),
        annotation_ids=torch.arange(count) + 1,
        class_names=("thing",),
        category_ids=(1,),
    )


def _family(pid: int) -> list[int]:
    """A process and all its descendants."""
    children = Path(f"/proc/{pid}/task").glob("*/children")
    return [
        pid,
        *(member for listed in children for child in listed.read_text().split() for member in _family(int(child))),
    ]


def _pss_mib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:"))) / 1024
