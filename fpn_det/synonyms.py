"""Settings by the names that they have in other tools, for refusals that name the setting of this one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

# Name in ultralytics, detectron2, mmdetection or torchvision's references, in lower case: the setting of fpn_det.
SYNONYMS = {
    # lengths and intervals
    "epochs": "trainer.epochs",
    "max_epochs": "trainer.epochs",
    "num_epochs": "trainer.epochs",
    "train_cfg.max_epochs": "trainer.epochs",
    "max_iters": "trainer.max_steps",
    "max_iter": "trainer.max_steps",
    "max_steps": "trainer.max_steps",
    "train_cfg.max_iters": "trainer.max_steps",
    "solver.max_iter": "trainer.max_steps",
    "train_cfg.val_interval": "trainer.eval_every",
    "eval_interval": "trainer.eval_every",
    "test.eval_period": "trainer.eval_every",
    "val": "trainer.eval_every",
    "save_period": "trainer.save_every",
    "save_interval": "trainer.save_every",
    "solver.checkpoint_period": "trainer.save_every",
    "default_hooks.checkpoint.interval": "trainer.save_every",
    "log_interval": "trainer.log_every",
    "print_freq": "trainer.log_every",
    "default_hooks.logger.interval": "trainer.log_every",
    "patience": "trainer.early_stop={patience: <evaluations>}",
    # batches
    "batch": "trainer.batch_size",
    "batch_size": "trainer.batch_size",
    "solver.ims_per_batch": "trainer.batch_size",
    "train_dataloader.batch_size": "trainer.batch_size",
    "accumulate": "trainer.accumulate",
    "accumulate_grad_batches": "trainer.accumulate",
    "workers": "data.num_workers",
    "num_workers": "data.num_workers",
    "dataloader.num_workers": "data.num_workers",
    "train_dataloader.num_workers": "data.num_workers",
    "rect": "data.group_by_aspect",
    "aspect_ratio_group_factor": "data.group_by_aspect",
    # optimization
    "lr": "optimizer.lr",
    "lr0": "optimizer.lr",
    "learning_rate": "optimizer.lr",
    "base_lr": "optimizer.lr",
    "solver.base_lr": "optimizer.lr",
    "optim_wrapper.optimizer.lr": "optimizer.lr",
    "momentum": "optimizer.momentum",
    "solver.momentum": "optimizer.momentum",
    "weight_decay": "optimizer.weight_decay",
    "solver.weight_decay": "optimizer.weight_decay",
    "optim_wrapper.optimizer.weight_decay": "optimizer.weight_decay",
    "nbs": "optimizer.base_batch_size",
    "auto_scale_lr.base_batch_size": "optimizer.base_batch_size",
    "cos_lr": "schedule=cosine",
    "lr_steps": "schedule.milestones",
    "solver.steps": "schedule.milestones",
    "solver.gamma": "schedule.gamma",
    "warmup": "schedule.warmup_steps",
    "warmup_epochs": "schedule.warmup_steps",
    "solver.warmup_iters": "schedule.warmup_steps",
    "grad_clip": "trainer.clip_norm",
    "solver.clip_gradients.clip_value": "trainer.clip_norm",
    "ema": "trainer.ema",
    "model_ema": "trainer.ema",
    "amp": "precision=bf16",
    "fp16": "precision=fp16",
    "half": "precision=fp16",
    "solver.amp.enabled": "precision=bf16",
    # weights and folders
    "weights": "init_from",
    "load_from": "init_from",
    "model.weights": "init_from",
    "pretrained": "model.backbone.weights",
    "resume_from": "resume",
    "project": "run_dir",
    "name": "run_dir",
    "save_dir": "run_dir",
    "output_dir": "run_dir",
    "work_dir": "run_dir",
    "exist_ok": "set_aside",
    "model.device": "device",
    "cudnn_benchmark": "device",
    "randomness.seed": "seed",
    # data
    "data_root": "data.root",
    "data_path": "data.root",
    "dataset": "data.root",
    "datasets.train": "data.train.annotations",
    "datasets.test": "data.val.annotations",
    "train_dataloader.dataset.ann_file": "data.train.annotations",
    "val_dataloader.dataset.ann_file": "data.val.annotations",
    "classes": "data.classes",
    "nc": "data.classes",
    "num_classes": "data.classes",
    "model.roi_heads.num_classes": "data.classes",
    "model.roi_head.bbox_head.num_classes": "data.classes",
    "fraction": "data.max_images",
    "cache": "data.cache",
    "ch": "data.channels",
    "channels": "data.channels",
    "in_channels": "data.channels",
    "in_chans": "data.channels",
    "num_channels": "data.channels",
    "dtype": "data.dtype",
    "imgsz": "data.train_transforms.resize.sides",
    "img_size": "data.train_transforms.resize.sides",
    "input.min_size_train": "data.train_transforms.resize.sides",
    "input.max_size_train": "data.train_transforms.resize.max_side",
    "input.min_size_test": "data.eval_transforms.resize.sides",
    "slice": "tile.size",
    "slicing": "tile.size",
    "sahi": "tile.size",
    "slice_size": "tile.size",
    "slice_height": "tile.size",
    "slice_width": "tile.size",
    "patch_size": "tile.size",
    "tile_size": "tile.size",
    "overlap_ratio": "tile.overlap",
    "overlap_height_ratio": "tile.overlap",
    "overlap_width_ratio": "tile.overlap",
    "multi_scale": "data.train_transforms.resize.sides",
    "fliplr": "data.train_transforms.flip.p",
    "hflip_prob": "data.train_transforms.flip.p",
    "mosaic": "data.train_transforms.mosaic",
    "mixup": "data.train_transforms.mix_up",
    "copy_paste": "data.train_transforms.copy_paste",
    # model
    "backbone": "model.backbone.depth",
    "depth": "model.backbone.depth",
    "model.resnets.depth": "model.backbone.depth",
    "freeze": "model.backbone.frozen_stages",
    "trainable_backbone_layers": "model.backbone.frozen_stages",
    "model.backbone.freeze_at": "model.backbone.frozen_stages",
    "sync_bn": "model.backbone.norm",
    "model.anchor_generator.sizes": "model.rpn.anchors.sizes",
    "model.anchor_generator.aspect_ratios": "model.rpn.anchors.ratios",
    "conf": "model.roi_head.test_filter.score_threshold",
    "score_thresh": "model.roi_head.test_filter.score_threshold",
    "model.roi_heads.score_thresh_test": "model.roi_head.test_filter.score_threshold",
    "model.test_cfg.rcnn.score_thr": "model.roi_head.test_filter.score_threshold",
    "iou": "model.roi_head.test_filter.nms_iou",
    "nms_thresh": "model.roi_head.test_filter.nms_iou",
    "model.roi_heads.nms_thresh_test": "model.roi_head.test_filter.nms_iou",
    "max_det": "model.roi_head.test_filter.max_detections",
    "test.detections_per_image": "model.roi_head.test_filter.max_detections",
    "augment": "tta.flip",
    # processes
    "gpus": "torchrun --nproc_per_node=<number>",
    "num_gpus": "torchrun --nproc_per_node=<number>",
    "world_size": "torchrun --nproc_per_node=<number>",
}

# Where the value of another tool has another form: name, test of the value, and what to set.
VALUES: dict[str, tuple[Callable[[str], bool], str]] = {
    "data": (lambda value: value.endswith((".yaml", ".yml")), "data=yolo data.root={value}"),
    "model": (lambda value: value.endswith((".pt", ".pth", ".pkl")), "init_from={value}"),
    "resume": (lambda value: value.lower() == "true", "resume=auto"),
    "device": (
        lambda value: value.replace(",", "").isdigit(),
        "device=cuda:<number>, or start one process per GPU: torchrun",
    ),
    "backbone": (
        lambda value: value.lower().startswith("resnet") and value != "resnet",
        "model.backbone.depth=<number>",
    ),
    "optimizer": (lambda value: value.lower() in ("sgd", "adamw") and value != value.lower(), "optimizer={lower}"),
    "profile": (lambda value: value == "True", "profile=true"),
}


# Commands that do not train have these in place of the settings of training.
EVALUATION = {
    "trainer.batch_size": "data.eval_batch_size",
    "data.train_transforms.resize.sides": "data.eval_transforms.resize.sides",
}


def refuse_synonym(name: str, value: str, known: Iterable[str], trains: bool = True) -> None:
    """Refuse a word of another tool with the setting of this one.

    Args:
        name: of a `name=value` word.
        value: its text.
        known: sections and settings of the command, which are not taken for words of other tools.
        trains: True for commands with the settings of training.

    Raises:
        ValueError: the word is another tool's.
    """
    if name in VALUES and VALUES[name][0](value):
        form = VALUES[name][1].format(value=value, lower=value.lower())
        raise ValueError(f"{name}: expected the form of fpn_det, got '{value}'. Set {form}.")
    if name not in known and (setting := SYNONYMS.get(name.lower())):
        setting = setting if trains else EVALUATION.get(setting, setting)
        raise ValueError(f"{name}: there is no setting of that name. It is called {setting} here.")


def find_by_last_name(name: str, tree: Any) -> list[str]:
    """Dotted names of the settings in a tree that end with the same word as `name`."""
    last = name.rpartition(".")[2].lower()
    return [found for found in _names(tree) if found.rpartition(".")[2] == last and found != name]


def _names(tree: Any, prefix: str = "") -> Iterable[str]:
    for name, value in tree.items() if isinstance(tree, dict) else ():
        yield f"{prefix}{name}"
        yield from _names(value, f"{prefix}{name}.")
