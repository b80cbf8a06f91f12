"""Settings of a training run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

import torch

from fpn_det.config import DetectorConfig
from fpn_det.data.bad_images import OnBadImage
from fpn_det.data.channel_statistics import ChannelStatistics
from fpn_det.data.loaders import TrainLoader
from fpn_det.runs.trackers import LoggerName
from fpn_det.runtime import Ranks
from fpn_det.schema import (
    Amount,
    Count,
    CountOrZero,
    Node,
    Positive,
    Share,
    build,
    did_you_mean,
    listed,
)  # fmt: skip
from fpn_det.structures import Annotations
from fpn_det.training.intervals import Interval
from fpn_det.training.optimizers import Recipe
from fpn_det.training.schedule import Schedule

C = TypeVar("C", bound="TrainConfig")


@dataclass(frozen=True)
class EarlyStopping:
    """Ends a run whose metric no longer improves."""

    patience: Count  # evaluations without improvement
    min_delta: Amount = 0.0  # an improvement must exceed this


@dataclass(frozen=True)
class TrainerConfig:
    """Length, batch size and intervals of a run. Steps are optimizer updates."""

    epochs: Positive | None = None  # length of the run, also a fraction of an epoch
    max_steps: Count | None = None  # length of the run in steps, instead of epochs
    batch_size: Count | Literal["auto"] = (
        16  # images per step, over all ranks and accumulation; auto = as many as the GPUs hold
    )
    accumulate: Count = 1  # backward passes per step
    eval_every: Interval | None = None  # between evaluations, such as '1 epoch' or '500 steps'; null = only at the end
    save_every: Interval | None = "5000 steps"  # between checkpoints; null = only at the end
    log_every: Interval | None = "20 steps"  # between log lines; null = with evaluations and checkpoints only
    clip_norm: Positive | None = None  # upper bound of the gradient's norm
    ema: Share | None = None  # decay of the moving average of the weights, e.g. 0.999
    compile: bool = False  # compile backbone and neck
    capture: bool | Literal["auto"] = (
        False  # replay steps as CUDA graphs, one for each shape; auto = on one GPU, not several
    )
    keep_last: CountOrZero = 2  # numbered checkpoints to keep; 0 = all
    best_metric: str = "AP"  # decides which checkpoint becomes best.pt
    early_stop: EarlyStopping | None = None  # end the run when the metric stops improving
    val_loss: bool = False  # also measure the losses on the validation images, with every evaluation
    report: bool = True  # write the report of the last evaluation, as `fpn-det report` does
    probe: bool = False  # first rehearse a step of the largest images and most objects, to report the peak of memory
    timeout_minutes: Positive = 30.0  # how long one rank waits for another within a step

    def __post_init__(self) -> None:
        if self.epochs is None and self.max_steps is None:
            raise ValueError("trainer: expected a length, got none. Set trainer.epochs or trainer.max_steps.")
        if self.batch_size != "auto" and self.batch_size % self.accumulate:
            raise ValueError(
                f"trainer.batch_size: expected a multiple of trainer.accumulate={self.accumulate}, got {self.batch_size}."
            )
        if self.early_stop and not self.eval_every:
            raise ValueError(
                "trainer.early_stop: expected evaluations during training, got none. Set trainer.eval_every='1 epoch'."
            )

    def check_best_metric(self, names: Sequence[str]) -> None:
        """Refuse a `best_metric` that an evaluation does not report."""
        known = [*names, "loss"] if self.val_loss else list(names)
        if self.best_metric not in known:
            remedy = (
                " Set trainer.val_loss=true." if self.best_metric == "loss" else did_you_mean(self.best_metric, known)
            )
            raise ValueError(f"trainer.best_metric: expected one of {listed(known)}, got '{self.best_metric}'.{remedy}")

    def total_steps(self, steps_per_epoch: int) -> int:
        """Length of the run in steps."""
        if self.max_steps is not None:
            return self.max_steps
        assert self.epochs is not None, "checked at construction"
        return max(1, round(self.epochs * steps_per_epoch))


@dataclass(frozen=True, kw_only=True)
class TrainConfig(DetectorConfig):
    """All settings of a training run."""

    optimizer: Node
    schedule: Node
    trainer: TrainerConfig
    experiment: str | None = None  # name of the file in configs/experiment
    init_from: str | None = (
        None  # weights that a new run starts from: a file of any project, or a name of `fpn-det weights`
    )
    resume: str | None = None  # auto, a checkpoint or a run folder to continue from
    run: str | None = None  # run folder whose settings a new run takes
    run_dir: str | None = None  # folder of the run; null = runs/<experiment>/<date>_<time>
    set_aside: bool = False  # rename an existing run_dir instead of refusing it
    logger: list[LoggerName] = field(
        default_factory=lambda: ["tensorboard"]
    )  # where curves, images and settings go, besides metrics.jsonl and training.jsonl; mlflow, wandb and trackio are extras
    profile: bool = False  # record every operator of the run

    def __post_init__(self) -> None:
        super().__post_init__()
        self.trainer.check_best_metric(self.evaluation.metric_names)

    def measure_channels(self, annotations: Annotations) -> ChannelStatistics:
        """Measure mean and deviation of the channels of training images, in the order of `model.channel_order`.

        Raises:
            ValueError: they cannot be measured.
        """
        found = self.data.measure_channels(annotations)
        if self.model.get("channel_order") == "bgr":
            return replace(found, mean=found.mean[::-1], std=found.std[::-1])
        return found

    def with_normalization(self: C, mean: Sequence[float], std: Sequence[float]) -> C:
        """The same settings with mean and deviation of the channels."""
        return replace(self, model=self.model | {"pixel_mean": list(mean), "pixel_std": list(std)})

    def build_recipe(self) -> Recipe:
        """The optimizer's rule with its learning rates and weight decays; `Recipe.build` makes torch's optimizer."""
        return build(self.optimizer, "optimizer")

    def build_schedule(self) -> Callable[..., Schedule]:
        """Makes the learning rate schedule of a run of `steps` steps."""
        return build(self.schedule, "schedule")

    def train_loader(
        self,
        annotations: Annotations,
        stride: int,
        ranks: Ranks,
        device: torch.device,
        batch_size: int | None = None,
        on_bad_image: OnBadImage | None = None,
    ) -> TrainLoader:
        """This rank's share of the training batches.

        Args:
            stride: of the model, which the sides of a batch must divide by.
            batch_size: images per step; None = `trainer.batch_size`.
            on_bad_image: called for each image that cannot be used and is replaced; None makes it an error.
        """
        size = self.trainer.batch_size if batch_size is None else batch_size
        assert size != "auto", "measured before batches are made"
        return self.data.train_loader(
            annotations,
            batch_size=size,
            accumulate=self.trainer.accumulate,
            seed=self.seed,
            stride=stride,
            ranks=ranks,
            device=device,
            on_bad_image=on_bad_image,
        )
