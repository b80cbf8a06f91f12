"""Settings of the data, from files to batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch

from fpn_det.annotations.findings import Finding
from fpn_det.annotations.image_inspection import ImageInfo, inspect_images
from fpn_det.annotations.reading import CheckedDataset, Format, check_raw, load_raw, raise_for_faults
from fpn_det.annotations.split_overlap import drop_overlap
from fpn_det.annotations.subsets import drop_empty, select_images, split_images
from fpn_det.data.collation import ResizeOn, check_canvas
from fpn_det.data.dataset import DetectionDataset
from fpn_det.data.image_cache import PictureCache
from fpn_det.data.loading import EvalLoader, TrainLoader
from fpn_det.data.proposals import SavedProposals, read_proposals
from fpn_det.data.sampling import GlobalBatches, repeat_factors
from fpn_det.data.transforms import Pipeline
from fpn_det.image_io import BadImage
from fpn_det.runtime import Ranks, broadcast_object, current_ranks
from fpn_det.schema import Amount, Count, CountOrZero, Fraction, Node, Positive, Share, build
from fpn_det.structures import Annotations

SplitName = Literal["train", "val", "test"]


@dataclass(frozen=True)
class SplitConfig:
    """One part of a data set."""

    images: str | list[str] | None = (
        None  # folder, or one for each of the annotations; null = where the format has them
    )
    annotations: str | list[str] | None = None  # a JSON file, or what the format calls for; several are concatenated
    format: Format | None = None  # null = recognized


@dataclass(frozen=True)
class ProposalsConfig:
    """Proposals of a model without an RPN: boxes in the COCO results format."""

    train: str  # file
    val: str  # file
    test: str | None = None  # file, for the evaluation of the test split
    train_limit: Count = 2000  # the best of an image that are used
    eval_limit: Count = 1000


@dataclass(frozen=True)
class TrainData:
    """The images to train on and to evaluate on, and what was found wrong with their annotations."""

    train: Annotations
    val: Annotations
    findings: list[Finding]


@dataclass(frozen=True)
class DataConfig:
    """Images and annotations, and how they become batches."""

    root: str = "datasets/coco"  # sets all paths, in COCO's layout
    train: SplitConfig = field(default_factory=SplitConfig)
    val: SplitConfig = field(default_factory=SplitConfig)
    test: SplitConfig = field(default_factory=SplitConfig)  # evaluated on request only
    val_fraction: Share | None = None  # take this part of the training images instead of `val`
    max_images: Count | None = None  # only the first of each part, for trials
    classes: list[str] | None = None  # a subset by name; null = all
    on_error: Literal["fail", "fix", "skip"] = "fail"  # what to do about broken annotations and files
    max_bad_fraction: Fraction = 0.1  # of images that may turn out to be unusable during training, under on_error=skip
    check: bool = True  # look into every image file first; the result is cached until the file changes
    keep_empty: bool = False  # train on images without objects too
    num_workers: CountOrZero = 4  # processes that read and transform
    start_method: Literal["fork", "spawn", "forkserver"] | None = None  # of these processes; null = the platform's own
    resize_on: ResizeOn = "worker"  # where the last flip and resize are done
    reduced_decoding: Literal["never", "train", "always"] = "never"  # of JPEG files at 1/2, 1/4 or 1/8, if enough
    cache: str | None = None  # folder for decoded images; about 3 bytes a pixel
    canvas: Literal["batch"] | tuple[Count, Count] = "batch"  # size of a batch: its largest image's, or [H, W] always
    group_by_aspect: bool = True  # batches of landscape or of portrait images
    repeat_threshold: Positive | None = None  # repeat images of classes that are in less than this share of them
    eval_batch_size: Count = 1  # images per rank
    min_visibility: Fraction = 0.0  # drop a box of which a transform leaves less than this
    min_area: Amount = 1.0  # drop a box smaller than this in the input frame, px^2
    train_transforms: dict[str, Node | None] = field(default_factory=dict)  # in this order; null leaves one out
    eval_transforms: dict[str, Node | None] = field(default_factory=dict)
    proposals: ProposalsConfig | None = None

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

    def validate(self, stride: int) -> None:
        """Refuse what can be refused before anything is read.

        Args:
            stride: of the model's coarsest map, which must divide a fixed canvas.

        Raises:
            ValueError: a transform refuses its arguments, the canvas does not fit, or a file of proposals is missing.
        """
        self.transforms(train=True)
        self.transforms(train=False)
        check_canvas(self.canvas, stride)
        for split in ("train", "val") if self.proposals else ():
            self.proposal_file(split)

    def transforms(self, train: bool) -> Pipeline:
        """The transforms of training or of evaluation, in their order."""
        name = "train_transforms" if train else "eval_transforms"
        nodes: dict[str, Node | None] = getattr(self, name)
        chain = [build(node, f"data.{name}.{key}") for key, node in nodes.items() if node is not None]
        return Pipeline(chain, self.min_visibility, self.min_area)

    def read_train_and_val(self, seed: int) -> TrainData:
        """What to train on and what to evaluate on. The classes are those of the training set."""
        examined = self.check_split("train", self.classes)
        raise_for_faults(examined, f"data.train ({self.train.annotations})", self.on_error)
        findings = list(examined.findings)
        if self.val_fraction is not None:
            train, val = split_images(self._limited(examined.annotations), self.val_fraction, seed)
        else:
            held_out = self.check_split("val", examined.annotations.class_names)
            raise_for_faults(held_out, f"data.val ({self.val.annotations})", self.on_error)
            findings += held_out.findings
            alone = examined if self.train == self.val else drop_overlap(examined, held_out, self.on_error)
            train, val = self._limited(alone.annotations), self._limited(held_out.annotations)
        if not self.keep_empty:
            train = drop_empty(train)
            if not len(train):
                raise ValueError(
                    "data.train: expected images with objects, got none. "
                    "Set data.keep_empty=true to train on images without."
                )
        return TrainData(train.share_memory(), val.share_memory(), findings)

    def read_split(self, split: SplitName, class_names: Sequence[str], seed: int) -> Annotations:
        """The ground truth to evaluate against; its classes are those that the weights were trained for."""
        source: SplitName = "train" if split == "val" and self.val_fraction is not None else split
        examined = self.check_split(source, class_names)
        raise_for_faults(examined, f"data.{source} ({getattr(self, source).annotations})", self.on_error)
        annotations = self._limited(examined.annotations)
        return annotations if source == split else split_images(annotations, self.val_fraction or 0, seed)[1]

    def check_split(self, split: SplitName, class_names: Sequence[str] | None) -> CheckedDataset:
        """One part of the data and what is wrong with it.

        Args:
            class_names: the classes and their order; None takes them from the files.
        """
        source: SplitConfig = getattr(self, split)
        if source.annotations is None:
            raise ValueError(
                f"data.{split}: expected images and annotations, got none. "
                f"Set data.{split}.images and data.{split}.annotations."
            )
        tables = load_raw(source.annotations, source.images, source.format, split)
        return check_raw(
            tables, class_names, self.classes is not None, self.on_error, _look_once if self.check else None
        )

    def _limited(self, annotations: Annotations) -> Annotations:
        if self.max_images is None:
            return annotations
        return select_images(annotations, torch.arange(min(self.max_images, len(annotations))))

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
        on_bad_image: Callable[[BadImage], None] | None = None,
    ) -> TrainLoader:
        """This rank's share of the training batches; with `on_bad_image`, unusable images are replaced."""
        reduce, replace_bad = self.reduced_decoding != "never", on_bad_image is not None
        proposals = self._proposals("train", annotations, train=True)
        dataset = DetectionDataset(
            annotations, self.transforms(train=True), seed, reduce, replace_bad, proposals, self._image_cache()
        )
        repeats = repeat_factors(annotations, self.repeat_threshold)[0] if self.repeat_threshold else None
        parts = ranks.world_size * accumulate
        batches = GlobalBatches(annotations.sizes, batch_size, seed, parts, self.group_by_aspect, repeats)
        options = (stride, self.canvas, device, self.resize_on, self.start_method, on_bad_image)
        return TrainLoader(dataset, batches, ranks, accumulate, self.num_workers, *options)

    def eval_loader(
        self,
        annotations: Annotations,
        *,
        seed: int,
        stride: int,
        ranks: Ranks,
        device: torch.device,
        on_bad_image: Callable[[BadImage], None] | None = None,
        split: SplitName = "val",
    ) -> EvalLoader:
        """This rank's images of a split; with `on_bad_image`, unusable images are left out."""
        proposals = self._proposals(split, annotations, train=False)
        dataset = DetectionDataset(
            annotations,
            self.transforms(train=False),
            seed,
            self.reduced_decoding == "always",
            proposals=proposals,
            cache=self._image_cache(),
        )
        options = (stride, self.canvas, device, self.resize_on, self.start_method, on_bad_image)
        return EvalLoader(dataset, self.eval_batch_size, ranks, self.num_workers, *options)

    def single_images(
        self, annotations: Annotations, rows: Sequence[int], *, seed: int, stride: int, device: torch.device
    ) -> EvalLoader:
        """The images of some rows as the model gets them, one by one; `Batch.indices` count within `rows`."""
        single = replace(self, eval_batch_size=1, num_workers=0)
        chosen = select_images(annotations, torch.tensor(rows, dtype=torch.int64))
        return single.eval_loader(chosen, seed=seed, stride=stride, ranks=Ranks(), device=device)

    def proposal_file(self, split: SplitName) -> Path:
        """The file with the saved proposals of a split."""
        file: str | None = getattr(self.proposals, split)
        if file is None or not Path(file).is_file():
            found = "none" if file is None else f"{file}, which does not exist"
            raise ValueError(
                f"data.proposals.{split}: expected a file in the COCO results format, got {found}. "
                "evaluation=proposals writes one."
            )
        return Path(file)

    def _proposals(self, split: SplitName, annotations: Annotations, train: bool) -> SavedProposals | None:
        files = self.proposals
        if files is None:
            return None
        limit = files.train_limit if train else files.eval_limit
        return read_proposals(self.proposal_file(split), annotations, limit)

    def _image_cache(self) -> PictureCache | None:
        return PictureCache(Path(self.cache)) if self.cache else None


def _look_once(paths: Iterable[str], folder: Path) -> Mapping[str, ImageInfo]:
    """Rank 0 looks for all."""
    return broadcast_object(inspect_images(paths, folder) if current_ranks().is_main else None)
