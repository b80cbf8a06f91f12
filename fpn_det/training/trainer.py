"""Training from the first step to the last: build, resume, train, evaluate, save."""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

import torch

from fpn_det.annotations.findings import Finding, describe_findings, summarize_findings
from fpn_det.data.sampling import check_divides, describe_repeats, repeat_factors
from fpn_det.evaluation.coco import Evaluation
from fpn_det.evaluation.evaluate import evaluate, write_evaluation
from fpn_det.interop import loading
from fpn_det.interop.catalog import check_detector
from fpn_det.runs.bad_files import BadFiles
from fpn_det.runs.best_metric import BestMetric
from fpn_det.runs.checkpoint import load_on_all_ranks
from fpn_det.runs.folder import NAN_DUMP, RunFolder, versions, write_settings
from fpn_det.runs.log import RunLog, watch_command
from fpn_det.runs.meters import Meters, Pace, memory_mib
from fpn_det.runs.settings_diff import changes_table, read_settings, typed_settings
from fpn_det.runs.trackers import check_installed
from fpn_det.runtime import (
    Ranks,
    broadcast_buffers,
    host_all_reduce_min,
    mark_reported_by_main,
    run_on_main,
    seed_everything,
    seed_step,
    single_process,
)
from fpn_det.structures import ScoreThresholds
from fpn_det.terminal import shown_path
from fpn_det.training import memory, nonfinite
from fpn_det.training.capture import make_step
from fpn_det.training.config import TrainConfig
from fpn_det.training.intervals import in_steps
from fpn_det.training.introduction import (
    describe_device,
    describe_input,
    describe_model,
    describe_split,
    describe_tiles,
    introduce,
)
from fpn_det.training.next_steps import next_steps
from fpn_det.training.optimization import Optimization
from fpn_det.training.schedule import Schedule
from fpn_det.training.signals import Stopped, StopRequest
from fpn_det.visualization.panels import draw_batch, draw_comparison, pick_images
from fpn_det.visualization.pyramid_panels import draw_pyramid, inspect_pyramid

SHOWN_IMAGES = 8  # validation images drawn with ground truth and detections

State = dict[str, Any]


class Trainer:
    """Trains a detector, evaluates it on the way, and keeps everything in its run folder.

    A run has three parts, called in this order: the constructor builds what needs no data, `prepare` reads the data and
    restores a checkpoint, `train` runs the loop. All ranks call them together. Steps are counted as done: 1 is after the
    first update.

    Attributes:
        has_trained: a step has been completed by this process.
        first_step: the step after which training starts or continues.
        evaluated: the last step whose weights were evaluated.
        evaluation: the last evaluation; None before the first.
        score_thresholds: of the last evaluation, also of the run's earlier life.

    Args:
        config: all settings of the run.
        ranks: place of this process among all.
        device: of this process.

    Raises:
        ValueError: settings are impossible or exclude each other. No folder has been made and no data read by then.
    """

    def __init__(self, config: TrainConfig, ranks: Ranks, device: torch.device) -> None:
        self.config = config
        self.ranks = ranks
        self.device = device
        self.has_trained = False
        trainer = config.trainer
        if trainer.batch_size != "auto":
            check_divides(ranks.world_size * trainer.accumulate, trainer.batch_size)
        elif device.type != "cuda":
            raise ValueError(
                f"trainer.batch_size: expected a number on {device.type}, got auto, which measures a GPU's memory. Try 4."
            )
        check_installed(config.logger)
        self.recipe = config.build_recipe()
        self.make_schedule = config.build_schedule()
        self.make_schedule(steps=trainer.max_steps or sys.maxsize)
        seed_everything(config.seed)
        self.model = config.build_model(num_classes=None)
        self.model.check_accumulation(trainer.accumulate)
        config.data.validate(self.model.stride)
        if config.needs_normalization and config.data.transforms(train=True).normalizes:
            raise ValueError(
                "model.pixel_mean: expected values where the transforms normalize, got null. Set model.pixel_mean and "
                "model.pixel_std, to 0 and 1 for each channel if the transforms do all."
            )
        if config.resume is None:  # a run that continues reads none of these weights
            if config.init_from:
                check_detector(config.init_from, "init_from")
            else:
                self.model.check_pretrained()

    def prepare(self, folder: RunFolder, log: RunLog, overrides: Sequence[str] = ()) -> None:
        """Read the data, finish the model, and start from pretrained weights, `init_from` or a checkpoint.

        Args:
            folder: of the run, held by this process.
            log: writes into it.
            overrides: words of the command line, which the folder records.

        Raises:
            ValueError: the data cannot be used, or the checkpoint is of another model.
        """
        self.folder, self.log, self.overrides = folder, log, overrides
        config = self.config
        data = config.data.read_train_and_val(config.seed)
        self.train_annotations, self.val_annotations = data.train, data.val
        self._report_findings(data.findings)
        state = load_on_all_ranks(lambda: folder.load(log.info))
        if config.needs_normalization:
            self._settle_normalization(state)
        self._prepare_model(is_new=state is None)
        if config.trainer.batch_size == "auto":
            self._settle_batch_size(resumes=state is not None)
        self._build_loaders()
        self.metadata: State = {
            "class_names": list(self.train_annotations.class_names),
            "category_ids": list(self.train_annotations.category_ids),
            "preprocessing": config.data.eval_transforms,
            "config": self.config.to_yaml(),
            "data_digests": {"train": self.train_annotations.digest(), "val": self.val_annotations.digest()},
        }
        self._prepare_optimization(state)
        if self.ranks.is_main:  # after all that refuses, so that a refused resume leaves the settings of the run
            self.overrides = write_settings(folder.path, self.metadata["config"], overrides)
        log.info(self._introduction(data.findings))

    def _introduction(self, findings: Mapping[str, Sequence[Finding]]) -> str:
        """Say what is trained, on what, for how long, and where to watch it."""
        config, path, batch_size = self.config, self.folder.path, self.train_loader.batch_size
        splits = {"train": self.train_annotations, "val": self.val_annotations}
        shown = "images or tiles" if self.train_loader.tiles else "images"
        on_error, per_epoch = config.data.on_error, self.train_loader.steps_per_epoch
        is_interval = 0 < self.eval_every < self.total_steps
        evaluations = f"evaluated every {self.eval_every} steps" if is_interval else "evaluated at the end"
        epochs = f"{self.total_steps / per_epoch:.3g}"
        rows = {
            "device": describe_device(self.device, config.precision, self.ranks.world_size),
            **{name: describe_split(split, findings.get(name, []), on_error) for name, split in splits.items()},
            "model": describe_model(self.model, config.model),
            "input": describe_input(config.data.train_transforms, config.data.eval_transforms),
            **describe_tiles(self.train_loader.tiles, config.data.tile.size, config.tiling),
            "length": f"{self.total_steps} steps of {batch_size} {shown}: {epochs} {'epoch' if epochs == '1' else 'epochs'} "
            f"of {per_epoch} steps; {evaluations}",
            "lr": self.recipe.describe_lr(batch_size, self.ranks.world_size, config.trainer.accumulate)
            + f"\n{self.optimization.schedule.describe_warmup()}",
            "folder": str(shown_path(path)),
            "watch": watch_command(path),
        }
        return introduce(rows)

    def _report_findings(self, findings: Mapping[str, Sequence[Finding]]) -> None:
        """Log what was found in the data, and repaired or left out, and write it to `data_report.json`."""
        on_error = self.config.data.on_error
        if self.ranks.is_main:
            summary = summarize_findings(findings, on_error)
            (self.folder.path / "data_report.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
        for split, found in findings.items():
            if shown := [finding for finding in found if finding.severity != "note"]:
                outcome = "warnings" if on_error == "fail" else "warnings, and faults that were repaired or left out"
                self.log.info(f"data.{split}: {outcome}:\n{describe_findings(shown)}")

    def _settle_normalization(self, state: State | None) -> None:
        """Replace a mean and deviation of null by those of the training images, or by what the resumed run found.

        Raises:
            ValueError: they cannot be measured.
        """
        if state is None:
            measured = self.config.measure_channels(self.train_annotations)
            mean, std = measured.mean, measured.std
            self.log.info(measured.describe())
        else:
            saved = read_settings(state["config"])
            mean, std = saved["model.pixel_mean"], saved["model.pixel_std"]
        self.config = self.config.with_normalization(mean, std)
        self.model.set_normalization(mean, std)

    def _prepare_model(self, is_new: bool) -> None:
        """Give the model its classes and weights, and move it to the device."""
        self.model.reset_classifier(self.train_annotations.num_classes)
        if is_new and self.config.init_from:
            report = loading.load_weights(self.model, self.config.init_from, self.train_annotations.class_names)
            self.log.info(report.table())
        elif is_new:
            self.model.load_pretrained()
        self.model.to(self.device)
        if self.config.trainer.compile:
            self.model.backbone.compile(dynamic=True)
            self.model.neck.compile(dynamic=True)

    def _settle_batch_size(self, resumes: bool) -> None:
        """Replace `trainer.batch_size=auto` by what every rank's memory holds, or by what the resumed run found.

        Raises:
            ValueError: there is no room for a single image.
        """
        trainer = self.config.trainer
        per_image = self.ranks.world_size * trainer.accumulate
        saved = self.folder.path / "config.yaml"
        if resumes and saved.is_file():
            batch_size = read_settings(saved.read_text())["trainer.batch_size"]
        else:
            with single_process():
                loader = self.config.train_loader(
                    self.train_annotations, self.model.stride, self.ranks, self.device, batch_size=per_image
                )
                optimizer = self.recipe.build(self.model, per_image)
                schedule = self.make_schedule(steps=sys.maxsize)
                optimization = Optimization(
                    self.model.train(), optimizer, schedule, self.config.precision, trainer.clip_norm, trainer.ema
                )
                limit = loader.images_per_epoch // per_image
                fitting = memory.largest_that_fits(
                    lambda count: memory.fits(optimization, loader.largest(count)), limit
                )
            fitting = host_all_reduce_min(fitting)
            if not fitting:
                raise ValueError(
                    f"trainer.batch_size: expected room for one image on {self.device}, got none. {memory.KNOBS}"
                )
            batch_size = fitting * per_image
        self.config = dataclasses.replace(self.config, trainer=dataclasses.replace(trainer, batch_size=batch_size))
        self.log.info(f"trainer.batch_size: auto is {batch_size} here.")

    def _build_loaders(self) -> None:
        config, num_images = self.config, len(self.train_annotations) + len(self.val_annotations)
        bad_files = BadFiles(self.folder.path, num_images, config.data.max_bad_fraction, self.log.info)
        on_bad_image = bad_files if config.data.on_error == "skip" else None
        place = self.model.stride, self.ranks, self.device
        self.train_loader = config.train_loader(self.train_annotations, *place, on_bad_image=on_bad_image)
        self.val_loader = config.eval_loader(
            self.val_annotations, *place, on_bad_image=on_bad_image, tiling=config.tiling
        )
        if config.data.repeat_threshold:
            factors = repeat_factors(self.train_annotations, config.data.repeat_threshold)
            self.log.info(describe_repeats(*factors, self.train_annotations.class_names))
        self.shown = pick_images(self.val_annotations, SHOWN_IMAGES)

    def _prepare_optimization(self, state: State | None) -> None:
        """Build optimizer and schedule, and restore a checkpoint."""
        trainer, log = self.config.trainer, self.log
        self.checkpoints = self.folder.checkpoints(trainer.keep_last)
        per_epoch = self.train_loader.steps_per_epoch
        self.total_steps = trainer.total_steps(per_epoch)
        intervals = trainer.eval_every, trainer.save_every, trainer.log_every
        self.eval_every, self.save_every, self.log_every = (in_steps(interval, per_epoch) for interval in intervals)
        self.versions = versions()
        self.best = BestMetric(trainer.best_metric)
        self.evaluation: Evaluation | None = None
        self.score_thresholds: ScoreThresholds | None = None
        self.first_step = self.evaluated = 0 if state is None else state["progress"]["step"]
        batch_size = self.train_loader.batch_size
        optimizer = self.recipe.build(self.model, batch_size)
        schedule = self._schedule(state)
        self.optimization = Optimization(
            self.model, optimizer, schedule, self.config.precision, trainer.clip_norm, trainer.ema
        )
        if trainer.batch_size != "auto" and batch_size < trainer.batch_size:
            log.info(
                f"trainer.batch_size: the training set has images for {batch_size} per step only, not {trainer.batch_size}."
            )
        if state is not None:
            self._restore(state)
        self.take_step = make_step(self.optimization, trainer.capture, log.info)

    def _schedule(self, state: State | None) -> Schedule:
        """The learning rate schedule. A resumed run of another length keeps its curve and holds the last value."""
        schedule = self.make_schedule(steps=self.total_steps)
        if state is None:
            return schedule
        steps = state["schedule"]["steps"]
        same_curve = dataclasses.replace(schedule, steps=steps)
        if steps == self.total_steps or _as_dict(same_curve) != state["schedule"]:
            return schedule
        self.log.info(f"The learning rate keeps its curve over {steps} steps and then holds the last value.")
        return same_curve

    def _restore(self, state: State) -> None:
        saved, present = state["class_names"], self.metadata["class_names"]
        if saved != present:
            raise ValueError(
                f"resume: expected the classes of the checkpoint, {', '.join(saved)}, got {', '.join(present)}."
            )
        self.optimization.load(state)
        self.evaluated = state["progress"].get("evaluated", self.first_step)  # absent in the earliest checkpoints
        self.score_thresholds = ScoreThresholds.read(state.get("score_thresholds"), "resume")
        if state["best"]["metric"] == self.best.metric:
            self.best = BestMetric(**state["best"])
        self.log.info(f"Resuming after step {self.first_step} of {self.total_steps}.")
        digests = state.get("data_digests", {})  # absent in the earliest checkpoints
        for split, digest in self.metadata["data_digests"].items():
            if digests.get(split, digest) != digest:
                self.log.info(
                    f"data.{split}: images or annotations have changed since the checkpoint. The run continues with the new ones."
                )
        table = changes_table(read_settings(state["config"]), read_settings(self.metadata["config"]))
        if table is not None:
            self.log.info("Settings have changed since the checkpoint:")
            self.log.show(table)

    def train(self) -> int:
        """Train to the end. Returns the exit code: 0, or 128 + the signal that stopped the run after saving (143, 130)."""
        path, trainer = shown_path(self.folder.path), self.config.trainer
        if self._is_over(self.first_step):
            longer = (
                "Its early stop is due: set a larger trainer.early_stop.patience"
                if self.first_step < self.total_steps
                else "For more at the last learning rate, set a larger trainer.max_steps or trainer.epochs"
            )
            self.log.info(
                f"{path} is complete: {self.first_step} of {self.total_steps} steps are done. {longer}; "
                f"with a schedule of its own, start a new run: init_from={path}/checkpoints/last.pt."
            )
            return 0
        if trainer.probe:
            self.optimization.model.train()
            self.log.info(memory.probe(self.optimization, self.train_loader.largest(), trainer.accumulate))
        with StopRequest() as stop:
            received = self._run_steps(stop)
        if received:
            name = signal.Signals(received).name
            self.log.info(f"Stopped by {name} and saved. To continue:\n  {self.folder.resume_command()}")
            return 128 + received
        assert self.evaluation is not None, "the last step is evaluated"
        settings = typed_settings(self.overrides, read_settings(self.metadata["config"]))
        self.log.hparams(settings, self.evaluation.metrics)
        commands = next_steps(self.folder.path, self.config.data, self.config.model) if self.ranks.is_main else []
        self.log.summary(self.best.metric, self.best.value, self.best.step, commands)
        return 0

    def _run_steps(self, stop: StopRequest) -> int:
        """Run the training loop. Returns the signal that stopped it, or 0.

        The host reads from the device at log points only. There is one before weights are evaluated or saved, so that
        nothing is done with weights before every step is known to be finite.
        """
        trainer, step = self.config.trainer, self.first_step
        loader = self.train_loader
        pace = Pace(step, self.total_steps, loader.batch_size, self.eval_every, steps_per_epoch=loader.steps_per_epoch)
        self.log.begin(pace, self.config.logger, read_settings(self.metadata["config"]))
        meters = Meters()
        batches = loader.iterate(step)
        self.optimization.model.train()
        received, is_over = 0, False
        if self.evaluated < step and self._is_due(self.eval_every, step):  # interrupted before its evaluation
            received, is_over = self._evaluate(step, stop, pace, is_saved=True)
        while not (received or is_over):
            seed_step(self.config.seed, step, self.ranks.rank)
            with pace.waiting():
                micro_batches = [next(batches) for _ in range(trainer.accumulate)]
            with memory.explained(micro_batches[0]):
                all_losses = self.take_step(micro_batches, step)
            for losses in all_losses:
                meters.add({"loss": losses.total(), **losses.terms, **losses.statistics})
            meters.add(self.optimization.measures())
            step += 1
            self.has_trained = True
            self.log.advance(step, pace)

            received = stop.agreed()
            evaluates = self._is_due(self.eval_every, step)
            saves = self._is_due(self.save_every, step) or received != 0
            if not (evaluates or saves or self._is_due(self.log_every, step)):
                continue
            values = meters.read()  # the one host read
            if values.pop("alarm"):
                raise self._explain_nonfinite()
            host_values = {"lr": self.optimization.lr, "memory_mib": memory_mib(self.optimization.device)}
            self.log.train(step, values | host_values, list(all_losses[0].terms), pace)
            if saves:  # before the evaluation, which may fail
                self._save(step)
                received = stop.agreed()
            if evaluates and not received:
                received, is_over = self._evaluate(step, stop, pace, is_saved=saves)
        return 0 if is_over else received

    def _is_due(self, every: int, step: int) -> bool:
        return step >= self.total_steps or (every > 0 and step % every == 0)

    def _is_over(self, step: int) -> bool:
        early_stop = self.config.trainer.early_stop
        is_last = self.total_steps <= step == self.evaluated
        return is_last or (early_stop is not None and self.best.misses >= early_stop.patience)

    def _evaluate(self, step: int, stop: StopRequest, pace: Pace, is_saved: bool) -> tuple[int, bool]:
        """Evaluate the weights and save what follows from it. Returns the signal received meanwhile, and whether the run is over.

        Asked to stop while it detects, it leaves everything as it was: a resumed run evaluates the step again.

        Args:
            is_saved: a checkpoint of this step exists, and is written again with the result.
        """
        is_best = False
        try:
            with pace.evaluating(), memory.explained_evaluation(self.config.data.eval_batch_size):
                is_best = self._score(step, stop)
        except Stopped:
            if not is_saved:
                self._save(step)
            return stop.agreed(), False
        is_over, received = self._is_over(step), stop.agreed()
        if is_saved or is_over or received:
            self._save(step, is_best)
        elif is_best:
            run_on_main(lambda: self.checkpoints.save_best(self._state(step)))
        return received or stop.agreed(), is_over

    def _score(self, step: int, stop: StopRequest) -> bool:
        """Score the weights on the validation set and record it. Returns whether they are the best so far.

        Raises:
            Stopped: a rank was asked to stop; nothing has been changed or written.
        """
        config = self.config
        model = self.optimization.model_to_evaluate
        broadcast_buffers(model)
        batches = stop.until_stopped(self.log.track(self.val_loader, "evaluating"))
        self.evaluation = evaluation = evaluate(
            model,
            batches,
            self.val_annotations,
            config.evaluation,
            self.optimization.dtype,
            with_losses=config.trainer.val_loss,
        )
        self.score_thresholds = evaluation.score_thresholds
        weights: Literal["ema", "raw"] = "raw" if self.optimization.ema is None else "ema"
        checkpoint = f"step_{step:08d}.pt"
        run_on_main(
            lambda: write_evaluation(self.folder.path, evaluation, self.val_annotations, step, checkpoint, weights)
        )
        self.log.evaluation(step, evaluation)
        if self.ranks.is_main:
            try:
                self.log_figures(step, evaluation)
            except Exception as error:  # a figure is not worth a run
                self.log.info(f"The figures of step {step} could not be drawn: {type(error).__name__}: {error}")
        min_delta = config.trainer.early_stop.min_delta if config.trainer.early_stop else 0.0
        is_best = self.best.update(step, evaluation.metrics, min_delta)
        self.evaluated = step
        return is_best

    def log_figures(self, step: int, evaluation: Evaluation) -> None:
        """Draw a training batch, and validation images with ground truth and detections, for TensorBoard. Rank 0 only."""
        config, log = self.config, self.log
        thresholds, class_names = evaluation.score_thresholds, self.train_annotations.class_names
        for row in self.shown:
            picture = draw_comparison(
                self.val_annotations,
                evaluation.detections,
                thresholds,
                row,
                config.evaluation,
                config.data.max_image_pixels,
            )
            log.image(step, self.val_annotations.path(row).name, picture)
        batch = self.train_loader.rebuild(step)[0]
        log.image(step, "train_batch", draw_batch(batch, class_names))
        if self.model.rpn is None:
            return
        for batch in config.single_images(self.val_annotations, self.shown[:1], self.model.stride, self.device):
            inspection = inspect_pyramid(self.model, batch, thresholds.of(class_names) if thresholds else None)
            log.image(step, "pyramid", draw_pyramid(inspection, batch))

    def _save(self, step: int, is_best: bool = False) -> None:
        """Write a checkpoint of the state after `step`. Rank 0 writes, all ranks call."""
        run_on_main(lambda: self.checkpoints.save(self._state(step), step, is_best, self._is_over(step)))

    def _state(self, step: int) -> State:
        return {
            "versions": self.versions,
            **self.optimization.state(),
            "schedule": _as_dict(self.optimization.schedule),
            "progress": {"step": step, "total_steps": self.total_steps, "evaluated": self.evaluated},
            "best": asdict(self.best),
            "score_thresholds": self.score_thresholds and asdict(self.score_thresholds),
            "rng": {"seed": self.config.seed},
            **self.metadata,
        }

    def _explain_nonfinite(self) -> Exception:
        """The error that names what was not finite since the last log point; the step is kept for `replay`."""
        step = nonfinite.first_bad_step(self.optimization)
        cause = nonfinite.explain(
            self.optimization,
            self.train_loader.rebuild(step),
            self.train_annotations,
            step,
            self.config.seed,
            self.ranks,
            self.folder.path / NAN_DUMP,
            lambda: self._state(step),
        )
        error = FloatingPointError(
            f"step {step + 1}: {cause} If the images are right, lower optimizer.lr or set trainer.clip_norm. "
            f"{self.folder.resume_advice()}"
        )
        if not self.ranks.is_main:
            mark_reported_by_main(error)
        return error


def _as_dict(schedule: Schedule) -> State:
    return {"name": type(schedule).__name__, **asdict(schedule)}
