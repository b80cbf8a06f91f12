"""How a run goes: the settings of training, apart from model, data and optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fpn_det.schema import Amount, Count, CountOrZero, Positive, Share, did_you_mean, listed


@dataclass(frozen=True)
class EarlyStop:
    """When to give up."""

    patience: Count  # evaluations without progress of the best metric
    min_delta: Amount  # how much more counts as progress


@dataclass(frozen=True)
class Trainer:
    """How long, how large, how often."""

    epochs: Positive | None  # length of the run; or
    max_steps: Count | None
    batch_size: (
        Count | Literal["auto"]
    )  # images per step, over all ranks and accumulation; auto = what a GPU's memory holds
    accumulate: Count  # backward passes per step
    eval_every: CountOrZero  # steps; 0 = only at the end
    save_every: CountOrZero  # steps; 0 = only at the end
    log_every: Count  # steps
    clip_norm: Positive | None  # upper bound of the gradient's norm
    ema: Share | None  # decay of the moving average of the weights, e.g. 0.999
    compile: bool  # compile backbone and neck
    keep_last: CountOrZero  # numbered checkpoints that stay; 0 = all
    best_metric: str  # decides which checkpoint is `best`
    early_stop: EarlyStop | None
    val_loss: bool  # measure the losses on the validation images too, with every evaluation
    probe: bool  # begin with a step of the largest images and most objects, which changes nothing but tells the peak of memory
    timeout_minutes: Positive  # until a rank that hears nothing from the others in the midst of a step gives up

    def __post_init__(self) -> None:
        if self.epochs is None and self.max_steps is None:
            raise ValueError("trainer: expected a length, got none. Set trainer.epochs or trainer.max_steps.")
        if self.batch_size != "auto" and self.batch_size % self.accumulate:
            raise ValueError(
                f"trainer.batch_size: expected a multiple of trainer.accumulate={self.accumulate}, got {self.batch_size}."
            )
        if self.early_stop and not self.eval_every:
            raise ValueError("trainer.early_stop: expected evaluations on the way, got none. Set trainer.eval_every.")

    @property
    def settled_batch_size(self) -> int:
        """The number, once `auto` has been replaced by it."""
        assert self.batch_size != "auto", "a batch size is found before anything is made of it"
        return self.batch_size

    def check_best_metric(self, names: Sequence[str]) -> None:
        """Refuse a `best_metric` that is not among those that an evaluation gives."""
        known = [*names, *(["loss"] if self.val_loss else [])]
        if self.best_metric not in known:
            way_out = (
                " Set trainer.val_loss=true." if self.best_metric == "loss" else did_you_mean(self.best_metric, known)
            )
            raise ValueError(
                f"trainer.best_metric: expected one of {listed(known)}, got '{self.best_metric}'.{way_out}"
            )

    def total_steps(self, steps_per_epoch: int) -> int:
        """The length of the run."""
        if self.max_steps is not None:
            return self.max_steps
        assert self.epochs is not None, "the config asks for one of the two"
        return max(1, round(self.epochs * steps_per_epoch))
