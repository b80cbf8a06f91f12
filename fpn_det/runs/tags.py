"""Names of curves. TensorBoard sorts them by their first parts, which therefore put what is looked at first to the top.

| tag | content |
|---|---|
| `AP/AP`, `AP/AR100`, ... | metrics of an evaluation |
| `images/...` | training batch, validation images, pyramid |
| `loss/loss`, `loss/rpn_box`, ... | loss and its terms; `loss/val_...` on the validation images |
| `lr` | learning rate |
| `machine/...` | images per second, seconds of waiting for data, memory |
| `optimizer/...` | gradient norm, loss scale |
| `per_class_AP/...` | AP of each class |
| `pyramid/...` | statistics of levels and of sampling |
"""

from __future__ import annotations

from collections.abc import Mapping

from fpn_det.evaluation.coco import Evaluation

OF_STEPS = {
    "lr": "lr",
    **{name: f"machine/{name}" for name in ("images_per_s", "data_s", "memory_mib", "bad_files")},
    **{name: f"optimizer/{name}" for name in ("grad_norm", "loss_scale")},
}


def tag_steps(values: Mapping[str, float]) -> dict[str, float]:
    """Name the values of training steps. A name with a slash (`rois/P2`) is a statistic, an unknown one a term of the loss."""
    return {
        f"pyramid/{name}" if "/" in name else OF_STEPS.get(name, f"loss/{name}"): value
        for name, value in values.items()
    }


def tag_metrics(metrics: Mapping[str, float | None]) -> dict[str, float | None]:
    """Name the metrics of an evaluation, one of which may be the loss."""
    return {"loss/val_loss" if name == "loss" else f"AP/{name}": value for name, value in metrics.items()}


def tag_evaluation(evaluation: Evaluation) -> dict[str, float | None]:
    """Name all numbers of an evaluation that become curves."""
    classes = {f"per_class_AP/{name}": row["AP"] for name, row in evaluation.per_class.items()}
    statistics = {
        name.replace("val_loss/", "loss/val_") if name.startswith("val_loss/") else f"pyramid/{name}": value
        for name, value in evaluation.statistics.items()
    }
    return tag_metrics(evaluation.metrics) | classes | statistics


def present_tag(tag: str) -> str:
    """Return the name that a curve of an earlier version, such as `train/loss` or `val/AP`, has today."""
    group, _, name = tag.partition("/")
    if group == "train":
        return next(iter(tag_steps({name: 0.0})))
    return next(iter(tag_metrics({name: None}))) if group == "val" else tag
