"""The training loop.

The host reads from the device at log points only. Wherever weights are evaluated or saved there is a log point first, so
that nothing is done with weights before it is known that every step was finite.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fpn_det.data.loading import TrainLoader
from fpn_det.runs.log import RunLog
from fpn_det.runs.meters import Meters, Pace, memory_mib
from fpn_det.runtime import Ranks, seed_step
from fpn_det.training import memory
from fpn_det.training.optimization import Optimization
from fpn_det.training.settings import Trainer
from fpn_det.training.signals import Stopped, StopRequest


@dataclass(frozen=True)
class Loop:
    """What training is made of, and what is done along the way. Steps are counted as done: 1 is after the first update.

    Attributes:
        evaluated: the last step whose weights have been scored; one that is due and was cut short is made up for.
        evaluate: scores the weights after a step, unless `Stopped`; returns whether to go on.
        save: keeps the state after a step; the flag says that a checkpoint is due, or else only the best is kept.
        explain: what was not finite since the last log point, as an error.
    """

    optimization: Optimization
    loader: TrainLoader
    trainer: Trainer
    total_steps: int
    seed: int
    ranks: Ranks
    log: RunLog
    evaluated: int
    evaluate: Callable[[int, StopRequest], bool]
    save: Callable[[int, bool], None]
    explain: Callable[[], Exception]

    def run(self, step: int, stop: StopRequest) -> int:
        """Train on after `step`, to the end or until asked to stop. Returns the signal that cut it short, or 0."""
        pace = Pace(step, self.total_steps, self.loader.batch_size, self.trainer.eval_every)
        self.log.begin(pace)
        meters = Meters()
        batches = self.loader.iterate(step)
        self.optimization.model.train()
        signal, going_on = 0, True
        if self.evaluated < step and self._is_due(self.trainer.eval_every, step):
            signal, going_on = self._evaluate(step, stop, pace)
            self.save(step, True)
        while going_on and not signal:
            seed_step(self.seed, step, self.ranks.rank)
            with pace.waiting():
                micro_batches = [next(batches) for _ in range(self.trainer.accumulate)]
            with memory.explained(micro_batches[0]):
                all_losses = self.optimization.step(micro_batches, step)
            for losses in all_losses:
                meters.add({"loss": losses.total(), **losses.terms, **losses.statistics})
            meters.add(self.optimization.measures())
            step += 1
            self.log.advance(step)

            signal = stop.agreed()
            evaluating = self._is_due(self.trainer.eval_every, step)
            saving = self._is_due(self.trainer.save_every, step) or signal != 0
            if not (evaluating or saving or self._is_due(self.trainer.log_every, step)):
                continue
            values = meters.read()  # the one host read
            if values.pop("alarm"):
                raise self.explain()
            host_values = {"lr": self.optimization.lr, "memory_mib": memory_mib(self.optimization.device)}
            self.log.train(step, values | host_values, pace)
            if evaluating:
                signal, going_on = self._evaluate(step, stop, pace)
            self.save(step, saving or signal != 0 or not going_on)
            signal = signal or stop.agreed()
        return signal if going_on else 0

    def _evaluate(self, step: int, stop: StopRequest, pace: Pace) -> tuple[int, bool]:
        """Score the weights; returns the signal that came meanwhile, and whether there is more to do."""
        try:
            with pace.evaluating():
                going_on = self.evaluate(step, stop)
        except Stopped:
            going_on = True
        return stop.agreed(), going_on

    def _is_due(self, every: int, step: int) -> bool:
        return step >= self.total_steps or (every > 0 and step % every == 0)
