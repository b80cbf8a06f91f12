"""One run, from its parts to its last words."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from fpn_det.data.loading import TrainLoader
from fpn_det.evaluation.coco import Evaluation, EvaluationSettings
from fpn_det.evaluation.evaluate import evaluate, write_evaluation
from fpn_det.models.detector import Detector
from fpn_det.runs.best import Best
from fpn_det.runs.folder import NAN_DUMP, RunFolder, versions
from fpn_det.runs.log import RunLog, shown_path
from fpn_det.runs.settings_diff import changes_table, read_settings
from fpn_det.runtime import Ranks, mark_as_echo, on_main, share_buffers
from fpn_det.structures import Annotations, Batch
from fpn_det.training import memory, nonfinite
from fpn_det.training.loop import Loop
from fpn_det.training.optimization import Optimization
from fpn_det.training.optimizers import Recipe
from fpn_det.training.schedule import Schedule
from fpn_det.training.settings import Trainer
from fpn_det.training.signals import StopRequest

State = dict[str, Any]


@dataclass(frozen=True)
class Parts:
    """What a run is made of.

    Attributes:
        model: on its device, with the weights that training starts from.
        schedule: makes the schedule for a number of `steps`.
        meaning: what the weights mean, for whoever loads them: `class_names`, `category_ids`, `preprocessing` and `config`
            (YAML text), in plain types.
        show: gets the step and the evaluation after each evaluation, to add pictures to the log. Rank 0 only.
    """

    model: Detector
    recipe: Recipe
    schedule: Callable[..., Schedule]
    train_loader: TrainLoader
    train_annotations: Annotations
    val_loader: Iterable[Batch]
    val_annotations: Annotations
    evaluation: EvaluationSettings
    meaning: State
    show: Callable[[int, Evaluation], None]


class Run:
    """Trains a detector, evaluates it on the way, and leaves everything in a folder.

    Args:
        seed: of all random draws.
        log: writes into `folder`.
    """

    def __init__(
        self, parts: Parts, trainer: Trainer, precision: str, seed: int, ranks: Ranks, folder: RunFolder, log: RunLog
    ) -> None:
        trainer.check_best_metric(parts.evaluation.metric_names)
        self.parts = parts
        self.trainer = trainer
        self.seed = seed
        self.ranks = ranks
        self.folder = folder.path
        self._rescue = folder.rescue
        self.log = log
        self.checkpoints = folder.checkpoints(trainer.keep_last)
        self.total_steps = trainer.total_steps(parts.train_loader.steps_per_epoch)
        self.versions = versions()
        self.best = Best(trainer.best_metric)
        self.evaluation: Evaluation | None = None
        self.has_improved = False

        state = folder.load(log.info)
        self.first_step = self.evaluated = 0 if state is None else state["progress"]["step"]
        batch_size = parts.train_loader.batch_size
        optimizer = parts.recipe.build(parts.model, batch_size)
        schedule = self._schedule(state)
        self.optimization = Optimization(parts.model, optimizer, schedule, precision, trainer.clip_norm, trainer.ema)
        if trainer.batch_size != "auto" and batch_size < trainer.batch_size:
            log.info(
                f"trainer.batch_size: the training set has images for {batch_size} per step only, not {trainer.batch_size}."
            )
        log.info(parts.recipe.describe_lr(batch_size, ranks.world_size, trainer.accumulate))
        if state is not None:
            self._restore(state)

    def train(self) -> int:
        """Train to the end. Returns the exit code: 0, or 128 + the signal that stopped the run after saving it (143, 130)."""
        if self._is_over(self.first_step):
            self.log.info(
                f"{shown_path(self.folder)} is complete: {self.first_step} of {self.total_steps} steps are done. "
                "For more, set a larger trainer.max_steps or trainer.epochs."
            )
            return 0
        if self.trainer.probe:
            self.optimization.model.train()
            self.log.info(memory.probe(self.optimization, self.parts.train_loader.largest(), self.trainer.accumulate))
        with StopRequest() as stop:
            number = self._loop().run(self.first_step, stop)
        if number:
            self.log.info(
                f"Stopped by {signal.Signals(number).name} and saved. "
                f"To go on, repeat the command with resume=auto run_dir={shown_path(self.folder)}"
            )
            return 128 + number
        assert self.evaluation is not None, "the last step is evaluated"
        self.log.hparams(read_settings(self.parts.meaning["config"]), self.evaluation.metrics)
        self.log.summary(self.best.metric, self.best.value, self.best.step, self.evaluation)
        return 0

    def _loop(self) -> Loop:
        return Loop(
            optimization=self.optimization,
            loader=self.parts.train_loader,
            trainer=self.trainer,
            total_steps=self.total_steps,
            seed=self.seed,
            ranks=self.ranks,
            log=self.log,
            evaluated=self.evaluated,
            evaluate=self._evaluate,
            save=self._save,
            explain=self._explain,
        )

    def _is_over(self, step: int) -> bool:
        early_stop = self.trainer.early_stop
        is_last = self.total_steps <= step == self.evaluated
        return is_last or (early_stop is not None and self.best.misses >= early_stop.patience)

    def _evaluate(self, step: int, stop: StopRequest) -> bool:
        """Score the weights; returns whether to go on training.

        Asked to stop, it does so while it detects; scoring, which is short, it brings to an end.

        Raises:
            Stopped: before anything was changed or written.
        """
        model = self.optimization.model_to_evaluate
        share_buffers(model)
        annotations = self.parts.val_annotations
        batches = stop.until_stopped(self.log.track(self.parts.val_loader, "evaluating"))
        self.evaluation = evaluation = evaluate(
            model,
            batches,
            annotations,
            self.parts.evaluation,
            self.optimization.dtype,
            with_losses=self.trainer.val_loss,
        )
        weights: Literal["ema", "raw"] = "raw" if self.optimization.ema is None else "ema"
        checkpoint = f"step_{step:08d}.pt"
        on_main(lambda: write_evaluation(self.folder, evaluation, annotations, step, checkpoint, weights))
        self.log.evaluation(step, self.evaluation)
        on_main(lambda: self.parts.show(step, evaluation))
        min_delta = self.trainer.early_stop.min_delta if self.trainer.early_stop else 0.0
        self.has_improved = self.best.update(step, self.evaluation.metrics, min_delta)
        self.evaluated = step
        return not self._is_over(step)

    def _save(self, step: int, is_due: bool) -> None:
        """Keep the state after `step` if that is due, or if it is the best one."""

        def save() -> None:
            if is_due:
                self.checkpoints.save(self._state(step), step, self.has_improved, self._is_over(step))
            else:
                self.checkpoints.save_best(self._state(step))

        if is_due or self.has_improved:
            on_main(save)
        self.has_improved = False

    def _explain(self) -> Exception:
        step = nonfinite.first_bad_step(self.optimization)
        what = nonfinite.explain(
            self.optimization, self.parts.train_loader.rebuild(step), self.parts.train_annotations, step, self.seed,
            self.ranks, self.folder / NAN_DUMP, lambda: self._state(step),
        )  # fmt: skip
        error = FloatingPointError(
            f"step {step + 1}: {what} {self._rescue()} If the images are right, lower optimizer.lr or set trainer.clip_norm."
        )
        if not self.ranks.is_main:
            mark_as_echo(error)
        return error

    def _state(self, step: int) -> State:
        return {
            "versions": self.versions,
            **self.optimization.state(),
            "schedule": _plain(self.optimization.schedule),
            "progress": {"step": step, "total_steps": self.total_steps, "evaluated": self.evaluated},
            "best": asdict(self.best),
            "rng": {"seed": self.seed},
            **self.parts.meaning,
        }

    def _schedule(self, state: State | None) -> Schedule:
        """A run that goes on keeps its curve and holds its end, whatever the new length; unless it got another schedule."""
        schedule = self.parts.schedule(steps=self.total_steps)
        if state is None:
            return schedule
        steps = state["schedule"]["steps"]
        same_curve = dataclasses.replace(schedule, steps=steps)
        if steps == self.total_steps or _plain(same_curve) != state["schedule"]:
            return schedule
        self.log.info(f"The learning rate keeps its curve over {steps} steps and then holds the last value.")
        return same_curve

    def _restore(self, state: State) -> None:
        names = state["class_names"], self.parts.meaning["class_names"]
        if names[0] != names[1]:
            raise ValueError(
                f"resume: expected the classes of the checkpoint, {', '.join(names[0])}, got {', '.join(names[1])}."
            )
        self.optimization.load(state)
        self.evaluated = state["progress"].get("evaluated", self.first_step)  # earlier versions never cut one short
        if state["best"]["metric"] == self.best.metric:
            self.best = Best(**state["best"])
        self.log.info(f"Going on after step {self.first_step} of {self.total_steps}.")
        table = changes_table(read_settings(state["config"]), read_settings(self.parts.meaning["config"]))
        if table is not None:
            self.log.info("Settings have changed since the checkpoint:")
            self.log.show(table)


def _plain(schedule: Schedule) -> State:
    return {"name": type(schedule).__name__, **asdict(schedule)}
