"""From settings to parts: the one place where a name in YAML becomes an object."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from fpn_det.annotations.image_files import Look, look_at
from fpn_det.annotations.overlap import without_shared
from fpn_det.annotations.reading import Examined, examine, judge, load_tables
from fpn_det.annotations.subsets import drop_empty, select_images, split_images
from fpn_det.config import Data, Node, Settings, Split, check, compose
from fpn_det.data.dataset import DetectionDataset
from fpn_det.data.image_cache import PictureCache
from fpn_det.data.loading import EvalLoader, TrainLoader
from fpn_det.data.proposals import SavedProposals, read_proposals
from fpn_det.data.sampling import GlobalBatches, repeat_factors
from fpn_det.data.transforms import Pipeline
from fpn_det.image_io import BadImage
from fpn_det.inference.predictor import Predictor
from fpn_det.interop import loading
from fpn_det.interop.coco_classes import category_ids
from fpn_det.models.detector import Detector
from fpn_det.models.views import Views
from fpn_det.runs.folder import versions
from fpn_det.runtime import Ranks, broadcast_object, current_ranks, pick_device
from fpn_det.saved import read_yaml, to_yaml
from fpn_det.schema import build
from fpn_det.structures import Annotations
from fpn_det.training.optimization import PRECISIONS

SplitName = Literal["train", "val", "test"]

# The experiment that gives the numbers of each project.
COMPAT = {
    "torchvision": "compat/torchvision_r50_fpn",
    "detectron2": "compat/detectron2_r50_fpn",
    "mmdet": "compat/mmdet_r50_fpn",
}


def build_model(settings: Settings, num_classes: int) -> Detector:
    """The detector with random weights; nothing is read."""
    return build(settings.model, "model")(num_classes=num_classes)


def build_transforms(transforms: dict[str, Node | None], data: Data, where: str) -> Pipeline:
    """The chain of transforms, in their order."""
    chain = [build(node, f"{where}.{name}") for name, node in transforms.items() if node is not None]
    return Pipeline(chain, data.min_visibility, data.min_area)


def read_training_data(data: Data, seed: int) -> tuple[Annotations, Annotations]:
    """What to train on and what to evaluate on. The classes are those of the training set."""
    examined = examine_split(data, "train", data.classes)
    judge(examined, f"data.train ({data.train.annotations})", data.on_error)
    if data.val_fraction is not None:
        train, val = split_images(_limited(examined.annotations, data), data.val_fraction, seed)
    else:
        held_out = examine_split(data, "val", examined.annotations.class_names)
        judge(held_out, f"data.val ({data.val.annotations})", data.on_error)
        # whoever names the same file twice means it
        alone = examined if data.train == data.val else without_shared(examined, held_out, data.on_error)
        train, val = _limited(alone.annotations, data), _limited(held_out.annotations, data)
    if not data.keep_empty:
        train = drop_empty(train)
        if not len(train):
            raise ValueError(
                "data.train: expected images with objects, got none. Set data.keep_empty=true to train on images without."
            )
    return train.share_memory(), val.share_memory()


def read_evaluation_data(data: Data, split: SplitName, class_names: Sequence[str], seed: int) -> Annotations:
    """The ground truth to score against; its classes are those that the weights were trained for."""
    source: SplitName = "train" if split == "val" and data.val_fraction is not None else split
    examined = examine_split(data, source, class_names)
    judge(examined, f"data.{source} ({getattr(data, source).annotations})", data.on_error)
    annotations = _limited(examined.annotations, data)
    return annotations if source == split else split_images(annotations, data.val_fraction or 0, seed)[1]


def examine_split(data: Data, split: SplitName, class_names: Sequence[str] | None) -> Examined:
    """One part of the data and what is wrong with it; `class_names` are the classes and their order, None takes them from the files."""
    source: Split = getattr(data, split)
    if source.annotations is None:
        raise ValueError(
            f"data.{split}: expected images and annotations, got none. Set data.{split}.images and data.{split}.annotations."
        )
    tables = load_tables(source.annotations, source.images, source.format, split)
    return examine(tables, class_names, data.classes is not None, data.on_error, _look_once if data.check else None)


def _look_once(paths: Iterable[str], folder: Path) -> Mapping[str, Look]:
    """Rank 0 looks for all."""
    return broadcast_object(look_at(paths, folder) if current_ranks().is_main else None)


def _limited(annotations: Annotations, data: Data) -> Annotations:
    if data.max_images is None:
        return annotations
    return select_images(annotations, torch.arange(min(data.max_images, len(annotations))))


Tell = Callable[[BadImage], None]


def read_saved_proposals(data: Data, split: SplitName, annotations: Annotations, train: bool) -> SavedProposals | None:
    """Those of `data.proposals` for the images of a split; None where the model has an RPN."""
    files = data.proposals
    if files is None:
        return None
    return read_proposals(proposal_file(data, split), annotations, files.train_limit if train else files.eval_limit)


def proposal_file(data: Data, split: SplitName) -> Path:
    """Where the saved proposals of a split are."""
    file: str | None = getattr(data.proposals, split)
    if file is None or not Path(file).is_file():
        found = "none" if file is None else f"{file}, which does not exist"
        raise ValueError(
            f"data.proposals.{split}: expected a file in the COCO results format, got {found}. evaluation=proposals writes one."
        )
    return Path(file)


def build_eval_loader(
    settings: Settings,
    annotations: Annotations,
    stride: int,
    ranks: Ranks,
    device: torch.device,
    tell: Tell | None = None,
    split: SplitName = "val",
) -> EvalLoader:
    """This rank's images as the model gets them; with `tell`, without those that cannot be used. `split` says whose they are."""
    data = settings.data
    transform = build_transforms(data.eval_transforms, data, "data.eval_transforms")
    proposals = read_saved_proposals(data, split, annotations, train=False)
    reduce, cache = data.reduced_decoding == "always", picture_cache(data)
    dataset = DetectionDataset(annotations, transform, settings.seed, reduce, proposals=proposals, cache=cache)
    where = (stride, data.canvas, device, data.resize_on, data.start_method, tell)
    return EvalLoader(dataset, data.eval_batch_size, ranks, data.num_workers, *where)


def picture_cache(data: Data) -> PictureCache | None:
    """Where decoded pictures are kept, if they are."""
    return PictureCache(Path(data.cache)) if data.cache else None


def single_images(
    settings: Settings, annotations: Annotations, rows: Sequence[int], stride: int, device: torch.device
) -> EvalLoader:
    """The images of some rows as the model gets them, one by one; `Batch.indices` count within `rows`."""
    alone = replace(settings, data=replace(settings.data, eval_batch_size=1, num_workers=0))
    return build_eval_loader(
        alone, select_images(annotations, torch.tensor(rows, dtype=torch.int64)), stride, Ranks(), device
    )


def build_train_loader(
    settings: Settings,
    annotations: Annotations,
    stride: int,
    ranks: Ranks,
    device: torch.device,
    tell: Tell | None = None,
) -> TrainLoader:
    """This rank's share of the training batches; with `tell`, others take the place of images that cannot be used."""
    data, trainer = settings.data, settings.trainer
    transform = build_transforms(data.train_transforms, data, "data.train_transforms")
    proposals = read_saved_proposals(data, "train", annotations, train=True)
    reduce, replace_bad = data.reduced_decoding != "never", tell is not None
    dataset = DetectionDataset(
        annotations, transform, settings.seed, reduce, replace_bad, proposals, picture_cache(data)
    )
    parts = ranks.world_size * trainer.accumulate
    repeats = repeat_factors(annotations, data.repeat_threshold)[0] if data.repeat_threshold else None
    batches = GlobalBatches(
        annotations.sizes, trainer.settled_batch_size, settings.seed, parts, data.group_by_aspect, repeats
    )
    where = (stride, data.canvas, device, data.resize_on, data.start_method, tell)
    return TrainLoader(dataset, batches, ranks, trainer.accumulate, data.num_workers, *where)


def load_weights(model: Detector, state: dict[str, Any], where: str, weights: str = "auto") -> Literal["ema", "raw"]:
    """Fill a model with the weights of a checkpoint; returns which were taken.

    Args:
        state: of a checkpoint.
        where: its file, for messages.
        weights: `ema`, `raw`, or `auto` for the moving average if there is one.

    Raises:
        ValueError: the checkpoint is of another model, or has no moving average.
    """
    average = state["ema"] if weights != "raw" else None
    if weights == "ema" and average is None:
        raise ValueError(f"{where}: expected a moving average of the weights, got none. Say weights=raw.")
    try:
        model.load_state_dict(average or state["model"])
    except RuntimeError as error:
        raise ValueError(
            f"{where}: expected the weights of this model, got others: {' '.join(str(error).split())[:300]}."
        ) from None
    return "ema" if average else "raw"


def load(
    source: str | Path, weights: str | Path | None = None, device: str = "auto", tta: Views | None = None
) -> Predictor:
    """A detector that is ready to predict.

    Args:
        source: a checkpoint, the folder of a run (its best checkpoint), another project's file of weights, or the name of
            an experiment.
        weights: a file of any project; in place of the source's own. An experiment needs one.
        device: see `pick_device`.
        tta: test-time augmentation, such as `Views(scales=(0.5, 1.0, 2.0), flip=True)`.

    Raises:
        ValueError: there is no such source, or the weights are of another model.
    """
    path = Path(source)
    path = path / "checkpoints" / "best.pt" if path.is_dir() else path
    if path.is_file():
        described = loading.read_as_ours(path)
        settings = settings_of(described)
        found = loading.read_as_ours(weights) if weights else described
    else:
        settings = compose([f"experiment={source}"])
        if weights is None:
            raise ValueError(f"load: expected weights for the experiment {source}, got none. Say weights=<file>.")
        found = loading.read_as_ours(weights)
    model = build_model(settings, found.num_classes)
    loading.load_weights(model, found)
    return build_predictor(settings, model, found.names, pick_device(device), tta)


def build_predictor(
    settings: Settings, model: Detector, class_names: Sequence[str], device: torch.device, tta: Views | None = None
) -> Predictor:
    """A model with weights, and all that turns pictures into its input."""
    data = settings.data
    transform = build_transforms(data.eval_transforms, data, "data.eval_transforms")
    options = (PRECISIONS[settings.precision], tta, data.resize_on, data.reduced_decoding == "always")
    return Predictor(model.to(device), class_names, transform, data.eval_batch_size, data.canvas, device, *options)


def settings_of(weights: loading.Weights) -> Settings:
    """The settings under which weights mean what they were trained to: their own, or those of the project they are from."""
    if weights.config is not None:
        return check(read_yaml(weights.config), (), Settings)
    if weights.project == "fpn_det":
        raise ValueError(
            f"{weights.source}: expected a checkpoint, got weights without settings. Name an experiment as well."
        )
    experiment = COMPAT[weights.project] + ("_v2" if weights.layout.normed_neck else "")
    return compose([f"experiment={experiment}", f"model.backbone.depth={weights.layout.depth}"])


def as_checkpoint(weights: loading.Weights, settings: Settings) -> dict[str, Any]:
    """Weights as a checkpoint of a run with these settings that has ended: it evaluates and predicts.

    Raises:
        ValueError: they are not of the model that the settings make.
    """
    model = build_model(settings, weights.num_classes)
    loading.load_weights(model, weights)
    return {
        "versions": versions(),
        "model": model.state_dict(),
        "ema": None,
        "progress": {"step": 0, "total_steps": 0},
        "class_names": list(weights.names),
        "category_ids": category_ids(weights.names),
        "preprocessing": settings.data.eval_transforms,
        "config": to_yaml(settings),
    }
