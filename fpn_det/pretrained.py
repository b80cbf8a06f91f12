"""Weights of any project with the settings that they need: model, preprocessing and conventions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fpn_det.composition import compose, from_saved
from fpn_det.interop.loading import Weights, load_weights
from fpn_det.runs.folder import versions
from fpn_det.training.config import TrainConfig


def settings_for(weights: Weights, allow_targets: Sequence[str] = ()) -> TrainConfig:
    """The settings under which weights give the results they were trained for: their own, or those of their project.

    Args:
        weights: of any project.
        allow_targets: packages whose classes their settings may name too.

    Raises:
        ValueError: the file holds weights of fpn_det without settings, or settings that cannot be used.
    """
    if weights.config is not None:
        return from_saved(weights.config, str(weights.source), allow_targets)
    if weights.project == "fpn_det":
        raise ValueError(
            f"{weights.source}: expected a checkpoint, got weights without settings. Name an experiment as well."
        )
    return compose(weights.settings)


def to_checkpoint(weights: Weights, config: TrainConfig) -> dict[str, Any]:
    """Weights as the checkpoint of a finished run with these settings, which can be evaluated and predicts.

    Raises:
        ValueError: they are not of the model that the settings describe.
    """
    model = config.build_model(weights.num_classes)
    load_weights(model, weights)
    return {
        "versions": versions(),
        "model": model.state_dict(),
        "ema": None,
        "progress": {"step": 0, "total_steps": 0},
        "class_names": list(weights.names),
        "category_ids": list(weights.category_ids),
        "score_thresholds": weights.score_thresholds,
        "preprocessing": config.data.eval_transforms,
        "config": config.to_yaml(),
    }
