"""Settings of the data, and the objects that they describe: annotations, transforms and loaders."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from fpn_det.annotations.check_objects import FlaggedObjects
from fpn_det.annotations.config import SplitConfig
from fpn_det.annotations.findings import WITHOUT_OBJECTS, Finding, OnError, raise_for_faults
from fpn_det.annotations.image_inspection import inspect_images
from fpn_det.annotations.reading import CheckedDataset, load_raw
from fpn_det.annotations.splits import TrainData, are_same_images, drop_images, find_overlap
from fpn_det.annotations.subsets import drop_empty, select_images, split_images
from fpn_det.data.bad_images import OnBadImage
from fpn_det.data.channel_statistics import ChannelStatistics, measure_channels
from fpn_det.data.collation import Canvas, Collator, ResizeOn
from fpn_det.data.dataset import DetectionDataset
from fpn_det.data.image_cache import ImageCache
from fpn_det.data.loaders import EvalLoader, TrainLoader
from fpn_det.data.proposals import SavedProposals, read_proposals
from fpn_det.data.sampling import GlobalBatches, repeat_factors
from fpn_det.data.tiles import Tiles, Tiling, TrainTiles
from fpn_det.data.transforms import Pipeline
from fpn_det.data.workers import StartMethod, Workers
from fpn_det.image_io import MAX_PIXELS, Dtype, PixelFormat, read_image
from fpn_det.runtime import Ranks, run_on_main
from fpn_det.schema import Amount, Count, CountOrZero, Fraction, Node, Part, Positive, Share, build
from fpn_det.structures import Annotations

SplitName = Literal["train", "val", "test"]
ReducedDecoding = Literal["never", "train", "always"]


@dataclass(frozen=True)
class ProposalsConfig:
    """Files of precomputed proposals in the COCO results format, for a model without an RPN."""

    train: str  # path
    val: str  # path
    test: str | None = None  # path; needed to evaluate the test split only
    train_limit: Count = 2000  # proposals per image in training, the best ones
    eval_limit: Count = 1000  # proposals per image in evaluation


@dataclass(frozen=True)
class TrainTileConfig:
    """Tiles of the training images, shown besides the images themselves. `tile.size=auto` evaluates in the same tiles."""

    size: Count | None = None  # side of a tile, px of the image; null = whole images only
    overlap: Part = Tiling.overlap  # of two neighbours, at least; fraction of the side
    min_visible: Fraction = 0.3  # leave out an object of which a tile shows less than this fraction of its area
    empty_share: Part = 0.1  # fraction of the tiles of an epoch that show no object


@dataclass(frozen=True)
class DataConfig:
    """Images and annotations, their transforms and loaders."""

    root: str = "datasets/coco"  # folder of the data set; the paths of train, val and test derive from it
    train: SplitConfig = field(default_factory=SplitConfig)
    val: SplitConfig = field(default_factory=SplitConfig)
    test: SplitConfig = field(default_factory=SplitConfig)  # read by evaluation with split=test only
    val_fraction: Share | None = None  # hold out this fraction of the training images instead of reading val
    max_images: Count | None = None  # use only the first images of each split, for trials
    classes: list[str] | None = None  # names of the classes to use; null = all
    on_error: OnError = "fail"  # faults of annotations and images: refuse, repair in memory, or leave out
    flagged_objects: FlaggedObjects = "crowd"  # difficult (VOC) or ignore (COCO): crowd regions, ordinary, or left out
    channels: Count = 3  # of the images; 3 of 8 bits are RGB pictures, for which any file is converted
    dtype: Dtype = "uint8"  # of their values, which files must have; float32 takes any numbers
    max_bad_fraction: Fraction = 0.1  # under on_error=skip, end the run if more of the images turn out to be bad
    max_image_pixels: Count = MAX_PIXELS  # largest width * height of an image file; larger ones are refused unread
    check: bool = True  # decode every image once before the run; the result is cached until the file changes
    keep_empty: bool = False  # train on images without objects too
    num_workers: CountOrZero = 4  # processes that read and transform images; 0 uses the main process
    start_method: StartMethod | None = None  # of the workers; null = the platform's default
    resize_on: ResizeOn = "worker"  # or device: workers only decode, the last flip and resize run on the device
    reduced_decoding: ReducedDecoding = "never"  # decode JPEG files at 1/2, 1/4 or 1/8 if that is large enough
    cache: str | None = None  # folder for decoded images, 3 bytes per pixel: about 100 GB for COCO
    canvas: Canvas = "batch"  # padded size: the batch's largest image, bucket (multiples of 128 px) or [H, W]
    group_by_aspect: bool = True  # batch landscape and portrait images separately
    repeat_threshold: Positive | None = None  # repeat images of classes found in less than this fraction of the images
    eval_batch_size: Count = 1  # images per rank
    min_visibility: Fraction = 0.0  # drop a box if transforms leave less than this fraction of its area
    min_area: Amount = 1.0  # drop a box that is smaller than this in the input frame, px^2
    train_transforms: dict[str, Node | None] = field(default_factory=dict)  # in order; null removes one
    eval_transforms: dict[str, Node | None] = field(default_factory=dict)  # in order; null removes one
    proposals: ProposalsConfig | None = None  # for a model without an RPN
    tile: TrainTileConfig = field(default_factory=TrainTileConfig)  # cut large training images

    def __post_init__(self) -> None:
        for name in ("train", "val") if self.val_fraction is None else ("train",):
            if getattr(self, name).annotations is None:
                otherwise = ", or data.val_fraction" if name == "val" else ""
                raise ValueError(
                    f"data.{name}: expected images and annotations, got none. "
                    f"Set data.{name}.images and data.{name}.annotations{otherwise}."
                )
        if self.classes is not None and (not self.classes or len(set(self.classes)) < len(self.classes)):
            raise ValueError(f"data.classes: expected names, each once, got {self.classes}. null takes all.")

    @property
    def pixel_format(self) -> PixelFormat:
        """Channels and dtype of the images."""
        return PixelFormat(self.channels, self.dtype)

    def validate(self, stride: int) -> None:
        """Check the settings that can be checked before data is read.

        Args:
            stride: of the model's coarsest feature map.

        Raises:
            ValueError: the arguments of a transform are invalid, `stride` does not divide the canvas, or a file of
                proposals is missing.
        """
        self.transforms(train=True)
        self.transforms(train=False)
        self.collator(stride)
        if self.proposals is not None:
            self.proposal_file("train")
            self.proposal_file("val")

    def transforms(self, train: bool) -> Pipeline:
        """Build the transforms of training or evaluation."""
        name = "train_transforms" if train else "eval_transforms"
        nodes: dict[str, Node | None] = getattr(self, name)
        chain = [build(node, f"data.{name}.{key}") for key, node in nodes.items() if node is not None]
        return Pipeline(chain, self.min_visibility, self.min_area, self.pixel_format)

    def read_train_and_val(self, seed: int) -> TrainData:
        """Read the training and validation sets, with the classes of the training set: on rank 0, for all ranks.

        Args:
            seed: of the random split under `val_fraction`.

        Raises:
            ValueError: annotations or images have faults that `on_error` does not allow, or no training image has objects.
        """
        data = run_on_main(partial(self._read_train_and_val, seed))
        return replace(data, train=data.train.share_memory(), val=data.val.share_memory())

    def _read_train_and_val(self, seed: int) -> TrainData:
        datasets = {"train": self.check_split("train", self.classes)}
        self._raise_for_faults("train", datasets["train"].findings)
        if self.val_fraction is None:
            datasets["val"] = self.check_split("val", datasets["train"].annotations.class_names)
        data = self.check_together(datasets, seed)
        for split, findings in data.findings.items():
            self._raise_for_faults(split, findings)
        return data

    def read_split(self, split: SplitName, class_names: Sequence[str], seed: int) -> Annotations:
        """Read the ground truth of a split for an evaluation: on rank 0, for all ranks.

        Args:
            split: part to read; under `val_fraction`, `train` and `val` are the two parts of the training images.
            class_names: classes that the weights were trained for.
            seed: of the random split under `val_fraction`.

        Raises:
            ValueError: annotations or images have faults that `on_error` does not allow.
        """
        return run_on_main(partial(self._read_split, split, class_names, seed))

    def _read_split(self, split: SplitName, class_names: Sequence[str], seed: int) -> Annotations:
        fraction = None if split == "test" else self.val_fraction
        source: SplitName = split if fraction is None else "train"
        checked = self.check_split(source, class_names)
        self._raise_for_faults(source, checked.findings)
        annotations = self._limited(checked.annotations)
        if fraction is None:
            return annotations
        train, val = split_images(annotations, fraction, seed, checked.digests)
        return train if split == "train" else val

    def check_split(self, split: SplitName, class_names: Sequence[str] | None) -> CheckedDataset:
        """Read and check one split. Faults are returned.

        Args:
            split: part to read.
            class_names: the classes and their order; None takes them from the files.

        Raises:
            ValueError: the files cannot be read, or do not say which images are of the split.
        """
        source: SplitConfig = getattr(self, split)
        inspect = partial(inspect_images, max_pixels=self.max_image_pixels, pixel_format=self.pixel_format)
        checked = source.load(
            split,
            class_names=class_names,
            subset=self.classes is not None,
            on_error=self.on_error,
            flagged_objects=self.flagged_objects,
            inspect=inspect if self.check else None,
        )
        others = {"train": ["val"] if self.val_fraction is None else [], "val": ["train"], "test": ["train"]}[split]
        same = [other for other in others if getattr(self, other) == source]
        if same and None in checked.image_lists:
            raise ValueError(
                f"data.{split}: expected a list or a folder of the images of the split, got all images of "
                f"{source.annotations}, which are those of data.{same[0]} too. "
                "Add ImageSets/Main/<split>.txt (VOC) or images/<split> (YOLO), or set data.val_fraction."
            )
        return checked

    def has_annotations(self, split: SplitName) -> bool:
        """Return whether a split has annotations of its own that can be read. Their values are not checked."""
        source: SplitConfig = getattr(self, split)
        if source.annotations is None:
            return False
        try:
            raw = load_raw(source.annotations, source.images, source.format, split)
        except (ValueError, OSError):
            return False
        others = [getattr(self, other) for other in get_args(SplitName) if other != split]
        is_apart = source not in others or all(part.image_list is not None for part in raw)
        return is_apart and all(part.is_labeled for part in raw)

    def check_together(self, datasets: Mapping[str, CheckedDataset], seed: int) -> TrainData:
        """Select the images to train and evaluate on, and find what concerns more than one object. Faults are returned.

        Training and `check-data` both use this, so both refuse the same data.

        Args:
            datasets: `train`, and `val` without `val_fraction`.
            seed: of the random split under `val_fraction`.
        """
        findings = {split: list(dataset.findings) for split, dataset in datasets.items()}
        train = datasets["train"]
        val = train.annotations
        if self.val_fraction is not None:
            train_images = self._limited(train.annotations)
            try:
                train_images, val = split_images(train_images, self.val_fraction, seed, train.digests)
            except ValueError as error:
                findings["train"].append(Finding("val_fraction", str(error).rstrip("."), "fatal"))
        else:
            if "val" in datasets:
                train = self._check_overlap(train, datasets["val"], findings)
                val = self._limited(datasets["val"].annotations)
            train_images = self._limited(train.annotations)
        if any(finding.kind == "no_annotations" for finding in findings.get("val", [])):
            message = "expected annotations to evaluate on, got a list of images without any"
            findings["val"].append(Finding("no_ground_truth", message, "fatal"))
        if not self.keep_empty:
            count, train_images = len(train_images), drop_empty(train_images)
            if num_empty := count - len(train_images):
                message = f"{num_empty} without objects are left out; data.keep_empty=true trains on them"
                findings["train"].append(Finding(WITHOUT_OBJECTS, message, "note"))
            if not len(train_images):
                message = "expected images with objects, got none. Set data.keep_empty=true to train on images without objects"
                findings["train"].append(Finding("no_objects", message, "fatal"))
        return TrainData(train_images, val, findings)

    def _check_overlap(
        self, train: CheckedDataset, val: CheckedDataset, findings: dict[str, list[Finding]]
    ) -> CheckedDataset:
        """Report images that are in both splits, and leave them out of training unless faults are refused."""
        if are_same_images(train, val):
            message = "the images are those of data.train; the metrics say nothing about other images"
            findings["val"].append(Finding("val_is_train", message, "warning"))
            return train
        overlap = find_overlap(train, val, "data.val")
        findings["train"] += overlap.values()
        return train if self.on_error == "fail" else drop_images(train, overlap)

    def _raise_for_faults(self, split: str, findings: Sequence[Finding]) -> None:
        raise_for_faults(findings, f"data.{split} ({getattr(self, split).annotations})", self.on_error)

    def _limited(self, annotations: Annotations) -> Annotations:
        if self.max_images is None:
            return annotations
        return select_images(annotations, torch.arange(min(self.max_images, len(annotations))))

    def measure_channels(self, annotations: Annotations) -> ChannelStatistics:
        """Measure mean and deviation of the channels of training images: on rank 0, for all ranks.

        Raises:
            ValueError: no image can be read, or a channel does not vary.
        """
        return run_on_main(partial(measure_channels, annotations, self._image_reader()))

    def train_loader(
        self,
        annotations: Annotations,
        *,
        batch_size: int,
        accumulate: int,
        seed: int,
        stride: int,
        ranks: Ranks,
        device: torch.device,
        on_bad_image: OnBadImage | None = None,
    ) -> TrainLoader:
        """Build the loader of this rank's share of the training batches.

        Args:
            annotations: of the training set.
            batch_size: images per step, over all ranks and micro-batches.
            accumulate: micro-batches per step.
            seed: of the order of the images and of the transforms.
            stride: of the model's coarsest feature map.
            ranks: this rank and their number.
            device: that batches are copied to.
            on_bad_image: called for each bad image, which is replaced; None makes bad images an error.
        """
        repeats, tiles = self._repeats_and_tiles(annotations)
        dataset = DetectionDataset(
            annotations,
            self.transforms(train=True),
            seed,
            reduced_decoding=self.reduced_decoding != "never",
            replace_bad=on_bad_image is not None,
            proposals=self._proposals("train", annotations, train=True),
            read=self._image_reader(),
            tiles=tiles,
        )
        parts = ranks.world_size * accumulate
        batches = GlobalBatches(dataset.sizes, batch_size, seed, parts, self.group_by_aspect, repeats)
        collator, workers = self.collator(stride), Workers(self.num_workers, self.start_method)
        return TrainLoader(dataset, batches, ranks, accumulate, collator, workers, device, on_bad_image)

    def _repeats_and_tiles(self, annotations: Annotations) -> tuple[Tensor | None, TrainTiles | None]:
        """Return how often an epoch shows each row of the training set, None for once, and the tiles."""
        of_images = torch.ones(len(annotations), dtype=torch.float64)
        of_classes = torch.ones(annotations.num_classes, dtype=torch.float64)
        if self.repeat_threshold:
            of_images, of_classes = repeat_factors(annotations, self.repeat_threshold)
        if self.tile.size is None:
            return of_images if self.repeat_threshold else None, None
        tiling = Tiling(self.tile.size, self.tile.overlap)
        tiles = TrainTiles.of_images(annotations, tiling, self.tile.min_visible, self.tile.empty_share, of_classes)
        return torch.cat([of_images, tiles.factors]), tiles

    def eval_loader(
        self,
        annotations: Annotations,
        *,
        seed: int,
        stride: int,
        ranks: Ranks,
        device: torch.device,
        on_bad_image: OnBadImage | None = None,
        split: SplitName = "val",
        tiling: Tiling | None = None,
    ) -> EvalLoader:
        """Build the loader of this rank's images of a split.

        Args:
            annotations: of the split.
            seed: of random transforms, if there are any.
            stride: of the model's coarsest feature map.
            ranks: this rank and their number.
            device: that batches are copied to.
            on_bad_image: called for each bad image, which is left out; None makes bad images an error.
            split: whose file of precomputed proposals is used.
            tiling: of each image; None for whole images only.
        """
        dataset = DetectionDataset(
            annotations,
            self.transforms(train=False),
            seed,
            reduced_decoding=self.reduced_decoding == "always",
            proposals=self._proposals(split, annotations, train=False),
            read=self._image_reader(),
            tiles=None if tiling is None else Tiles.of(annotations.sizes, tiling),
        )
        collator, workers = self.collator(stride), Workers(self.num_workers, self.start_method)
        return EvalLoader(dataset, self.eval_batch_size, ranks, collator, workers, device, on_bad_image)

    def single_images(
        self, annotations: Annotations, rows: Sequence[int], *, seed: int, stride: int, device: torch.device
    ) -> EvalLoader:
        """Build a loader of the images of some rows, in batches of one. `Batch.indices` count within `rows`."""
        single = replace(self, eval_batch_size=1, num_workers=0)
        chosen = select_images(annotations, torch.tensor(rows, dtype=torch.int64))
        return single.eval_loader(chosen, seed=seed, stride=stride, ranks=Ranks(), device=device)

    def proposal_file(self, split: SplitName) -> Path:
        """Return the file of precomputed proposals of a split.

        Raises:
            ValueError: there is none.
        """
        file: str | None = getattr(self.proposals, split)
        if file is None or not Path(file).is_file():
            found = "none" if file is None else f"{file}, which does not exist"
            raise ValueError(
                f"data.proposals.{split}: expected a file in the COCO results format, got {found}. "
                "Write one with evaluation=proposals."
            )
        return Path(file)

    def _proposals(self, split: SplitName, annotations: Annotations, train: bool) -> SavedProposals | None:
        if self.proposals is None:
            return None
        limit = self.proposals.train_limit if train else self.proposals.eval_limit
        return read_proposals(self.proposal_file(split), annotations, limit)

    def collator(self, stride: int) -> Collator:
        """Build what makes batches of examples, for a model of this stride."""
        return Collator(stride, self.canvas, self.resize_on)

    def _image_reader(self) -> Callable[[Path, int], np.ndarray]:
        if self.cache:
            return ImageCache(Path(self.cache), self.max_image_pixels, self.pixel_format).read
        return partial(read_image, max_pixels=self.max_image_pixels, pixel_format=self.pixel_format)
