"""A training run from its settings: what is refused first, how its parts are put together, what a sweep of runs ends with."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from rich.console import Console

from fpn_det.api import (
    build_eval_loader,
    build_model,
    build_train_loader,
    build_transforms,
    proposal_file,
    read_training_data,
    single_images,
)
from fpn_det.config import Settings
from fpn_det.data.collation import check_canvas
from fpn_det.data.sampling import check_divides, describe_repeats, repeat_factors
from fpn_det.evaluation.coco import Evaluation
from fpn_det.interop import loading
from fpn_det.models.detector import Detector
from fpn_det.runs.bad_files import BadFiles
from fpn_det.runs.log import PLAIN_WIDTH, RunLog
from fpn_det.runs.overview import compare, find_runs, runs_table, write_results
from fpn_det.runs.settings_diff import read_settings
from fpn_det.runtime import Ranks, agree_on_max, alone, seed_everything
from fpn_det.saved import to_yaml
from fpn_det.schema import build
from fpn_det.structures import Annotations
from fpn_det.training import memory
from fpn_det.training.optimization import Optimization
from fpn_det.training.run import Parts
from fpn_det.visualization.panels import draw_batch, draw_comparison, some_images
from fpn_det.visualization.pyramid_panels import draw_levels, read_levels

SHOWN_IMAGES = 8  # of the validation set, with ground truth and detections


def check_parts(settings: Settings, ranks: Ranks, device: torch.device) -> None:
    """Refuse what the parts themselves refuse, before a folder is made and data are read.

    Raises:
        ValueError: a part refuses its settings, or they do not go together.
    """
    trainer = settings.trainer
    if trainer.batch_size != "auto":
        check_divides(ranks.world_size * trainer.accumulate, trainer.batch_size)
    elif device.type != "cuda":
        raise ValueError(
            f"trainer.batch_size: expected a number on {device.type}, got auto, which asks a GPU what it can hold. Try 4."
        )
    build(settings.optimizer, "optimizer")
    build(settings.schedule, "schedule")(steps=trainer.max_steps or sys.maxsize)
    build_transforms(settings.data.train_transforms, settings.data, "data.train_transforms")
    build_transforms(settings.data.eval_transforms, settings.data, "data.eval_transforms")
    model = build_model(settings, num_classes=1)
    check_canvas(settings.data.canvas, model.stride)
    for name in ("rpn", "roi_head"):
        normalizer = (settings.model.get(name) or {}).get("normalizer", "constant")
        if trainer.accumulate > 1 and normalizer != "constant":
            raise ValueError(
                f"model.{name}.normalizer: expected constant with trainer.accumulate={trainer.accumulate}, got {normalizer}, "
                f"whose gradients would not be those of the whole batch. Set trainer.accumulate=1."
            )
    for split in ("train", "val") if settings.data.proposals else ():
        proposal_file(settings.data, split)
    if settings.init_from and not Path(settings.init_from).is_file():
        raise ValueError(f"init_from: expected a file of weights, got {settings.init_from}, which does not exist.")
    if not (settings.init_from or settings.resume):
        model.check_pretrained()


def settle_batch_size(
    settings: Settings, model: Detector, train: Annotations, ranks: Ranks, device: torch.device, resumed: Path | None
) -> Settings:
    """Replace `trainer.batch_size=auto` by what every rank's memory holds, or by what the run in the folder `resumed` found.

    Raises:
        ValueError: not even one image fits.
    """
    trainer = settings.trainer
    parts = ranks.world_size * trainer.accumulate
    if resumed is not None and (resumed / "config.yaml").is_file():
        batch_size = read_settings((resumed / "config.yaml").read_text())["trainer.batch_size"]
        return replace(settings, trainer=replace(trainer, batch_size=batch_size))
    with alone():
        smallest = replace(settings, trainer=replace(trainer, batch_size=parts))
        loader = build_train_loader(smallest, train, model.stride, ranks, device)
        optimizer = build(settings.optimizer, "optimizer").build(model, parts)
        schedule = build(settings.schedule, "schedule")(steps=sys.maxsize)
        optimization = Optimization(
            model.train(), optimizer, schedule, settings.precision, trainer.clip_norm, trainer.ema
        )
        limit = len(train) // parts
        num_images = memory.largest_that_fits(lambda count: memory.fits(optimization, loader.largest(count)), limit)
    num_images = -agree_on_max(-num_images)
    if not num_images:
        raise ValueError(f"trainer.batch_size: expected room for one image on {device}, got none. {memory.KNOBS}")
    return replace(settings, trainer=replace(trainer, batch_size=num_images * parts))


def build_parts(settings: Settings, ranks: Ranks, device: torch.device, log: RunLog, fresh: bool) -> Parts:
    """All that a training run is made of.

    Args:
        log: gets the pictures.
        fresh: the run starts now, from pretrained weights or `init_from`; else it goes on from a checkpoint.
    """
    seed_everything(settings.seed)
    recipe, schedule = build(settings.optimizer, "optimizer"), build(settings.schedule, "schedule")
    train, val = read_training_data(settings.data, settings.seed)
    model = build_model(settings, train.num_classes)
    if fresh and settings.init_from:
        log.info(loading.load_weights(model, settings.init_from, train.class_names).table())
    elif fresh:
        model.load_pretrained()
    model.to(device)
    if settings.trainer.compile:
        model.backbone.compile(dynamic=True)
        model.neck.compile(dynamic=True)
    if settings.trainer.batch_size == "auto":
        settings = settle_batch_size(settings, model, train, ranks, device, None if fresh else log.folder)
        log.info(f"trainer.batch_size: auto is {settings.trainer.batch_size} here.")
    bad_files = BadFiles(log.folder, len(train) + len(val), settings.data.max_bad_fraction, log.info)
    tell = bad_files if settings.data.on_error == "skip" else None
    train_loader = build_train_loader(settings, train, model.stride, ranks, device, tell)
    if settings.data.repeat_threshold:
        log.info(describe_repeats(*repeat_factors(train, settings.data.repeat_threshold), train.class_names))
    shown = some_images(val, SHOWN_IMAGES)
    named = settings.evaluation.target == "detections"

    def show(step: int, evaluation: Evaluation) -> None:
        for row in shown:
            log.picture(
                step, f"val/{val.path(row).name}", draw_comparison(val, evaluation.detections, row, named=named)
            )
        log.picture(step, "train/batch", draw_batch(train_loader.rebuild(step)[0], train.class_names))
        for batch in single_images(settings, val, shown[:1], model.stride, device) if model.rpn else ():
            log.picture(step, "val/levels", draw_levels(read_levels(model, batch), batch))

    return Parts(
        model=model,
        recipe=recipe,
        schedule=schedule,
        train_loader=train_loader,
        train_annotations=train,
        val_loader=build_eval_loader(settings, val, model.stride, ranks, device, tell),
        val_annotations=val,
        evaluation=settings.evaluation,
        meaning={
            "class_names": list(train.class_names),
            "category_ids": list(train.category_ids),
            "preprocessing": settings.data.eval_transforms,
            "config": to_yaml(settings),
        },
        show=show,
    )


class SweepResults(Callback):
    """When a sweep is over, shows its runs in one table, which also lies in its folder."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        if runs := find_runs(folder):
            names, rows = compare(runs, folder)
            write_results(folder, names, rows)
            Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH).print(runs_table(names, rows))
            print(f"{folder / 'results.md'} and results.csv")
