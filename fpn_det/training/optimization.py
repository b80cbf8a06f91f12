"""The update of the weights: backward pass, accumulation, precision, clipping, optimizer, moving average.

A step reads nothing from the device. Two device scalars carry what depends on the gradient to a fused optimizer:
`grad_scale` divides the gradient (unscaling and clipping in the same pass as the update), and `found_inf` makes the kernel
skip the update. What changes from step to step (number, learning rates, decay of the average) is written to device scalars
by `set_step`, and state is updated in place, so that `run` can be captured as a CUDA graph (`capture.py`).

A step whose loss or gradient is not finite changes no weight, momentum, average or norm statistic, on any rank: a bad loss
makes the reduced gradient NaN on all of them. No later step changes anything either. The host reads the alarm at its next
log point, finds the state as the bad step found it, and can explain the step. An overflow under fp16's loss scale is no
alarm: it halves the scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fpn_det.config import PRECISIONS
from fpn_det.models.detector import Detector
from fpn_det.models.layers import RunningStatistics
from fpn_det.runtime import all_reduce_mean, wrap_in_ddp
from fpn_det.structures import Batch, Losses
from fpn_det.training.ema import EMA
from fpn_det.training.schedule import Schedule

OTHERWISE = "To start a new run from its weights, set init_from instead of resume."


class LossScale:
    """Dynamic loss scale for fp16; constant 1 unless `grows`."""

    GROWTH_INTERVAL = 2000  # steps without overflow before it doubles

    def __init__(self, grows: bool, device: torch.device) -> None:
        self.grows = grows
        self.value = torch.tensor(2.0**16 if grows else 1.0, device=device)
        self.good_steps = torch.tensor(0, device=device)

    def update(self, overflow: Tensor) -> None:
        """Halve the scale after an overflow (a bool on the device), double it after GROWTH_INTERVAL steps without one."""
        if not self.grows:
            return
        good_steps = torch.where(overflow, 0, self.good_steps + 1)
        ripe = good_steps == self.GROWTH_INTERVAL
        self.value.copy_(torch.where(overflow, self.value / 2, torch.where(ripe, self.value * 2, self.value)))
        self.good_steps.copy_(torch.where(ripe, 0, good_steps))


class NormStatistics:
    """Running statistics of batch norms and others, which the forward pass updates before the step is known to be good."""

    def __init__(self, model: nn.Module) -> None:
        kinds = (nn.modules.batchnorm._NormBase, RunningStatistics)
        updated = [module for module in model.modules() if isinstance(module, kinds)]
        buffers = [buffer for module in updated for buffer in module.buffers()]
        dtypes = dict.fromkeys(buffer.dtype for buffer in buffers)
        # those of one dtype are kept in one tensor, because a kernel for each of a hundred small buffers takes longer
        self._groups = [[buffer for buffer in buffers if buffer.dtype == dtype] for dtype in dtypes]
        self._kept = [_joined(group) for group in self._groups]

    def keep(self) -> None:
        """Snapshot the running statistics."""
        for group, kept in zip(self._groups, self._kept, strict=True):
            kept.copy_(_joined(group))

    def settle(self, bad: Tensor) -> None:
        """After a step: restore the snapshot if the step was `bad` (a bool on the device), then take a new one."""
        for group, kept in zip(self._groups, self._kept, strict=True):
            kept.copy_(torch.where(bad, kept, _joined(group)))
            parts = kept.split([buffer.numel() for buffer in group])
            torch._foreach_copy_(group, [part.view_as(buffer) for part, buffer in zip(parts, group, strict=True)])


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


class Optimization:
    """Optimizes the weights of a model, which is on its device and has its initial weights.

    Args:
        model: returns `Losses` for (batch, step). Its losses are means over images, so that neither accumulation nor
            ranks change the objective.
        optimizer: fused, with `peak_lr` in its groups.
        schedule: the fraction of `peak_lr` at each step.
        precision: of convolutions and matrix products; weights and their updates are fp32 always.
        clip_norm: upper bound of the gradient norm over all parameters; None = no clipping.
        ema_decay: of the moving average of the weights; None = no average.

    Attributes:
        alarm: on the device, the first step that was not finite; -1 if there is none.
        lr: of the last step, for weights.
    """

    def __init__(
        self,
        model: Detector,
        optimizer: Optimizer,
        schedule: Schedule,
        precision: str = "fp32",
        clip_norm: float | None = None,
        ema_decay: float | None = None,
    ) -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got '{precision}'.")
        if clip_norm is not None and clip_norm <= 0:
            raise ValueError(
                f"trainer.clip_norm: expected a positive length, got {clip_norm}. Use null for no clipping."
            )
        self.model = model
        self.optimizer = optimizer
        self.schedule = schedule
        self.clip_norm = clip_norm
        self.parameters = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self.device = next(iter(self.parameters.values())).device
        self.precision = precision
        self.dtype = PRECISIONS[precision]
        self.scale = LossScale(precision == "fp16", self.device)
        self.ema = None if ema_decay is None else EMA(model, ema_decay)
        self.alarm = torch.tensor(-1, device=self.device)
        self.lr = 0.0
        self._step = torch.tensor(0, device=self.device)
        self._average_rate = torch.tensor(0.0, device=self.device)
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(0.0, device=self.device)
        self._grad_norm = torch.tensor(0.0, device=self.device)
        self._statistics = NormStatistics(model)
        self._forward = wrap_in_ddp(model)

    @property
    def model_to_evaluate(self) -> Detector:
        """The moving average of the weights, if there is one."""
        return self.model if self.ema is None else self.ema.model

    def autocast(self) -> AbstractContextManager:
        """The autocast context of the forward pass."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def step(self, batches: Sequence[Batch], step: int) -> list[Losses]:
        """One update from the micro-batches of one step. Returns the losses of each, on the device, without gradient."""
        self.set_step(step)
        return self.run(batches)

    def set_step(self, step: int) -> None:
        """Set what the next `run` takes from the number of its step."""
        self.lr = self.lr_of(step)
        self._step.fill_(step)
        for group in self.optimizer.param_groups:
            group["lr"].fill_(group["peak_lr"] * self.schedule.factor(step))
        if self.ema is not None:
            self._average_rate.fill_(self.ema.rate(step))

    def run(self, batches: Sequence[Batch]) -> list[Losses]:
        """The step after `set_step`. All that it reads and keeps are tensors of the device, always the same ones."""
        finite = self.alarm < 0
        found = []
        for number, batch in enumerate(batches, start=1):
            # ranks exchange gradients once per step, in the backward pass of the last micro-batch
            with nullcontext() if number == len(batches) else self._no_exchange():
                with self.autocast():
                    losses = self._forward(batch, self._step)
                total = losses.total()
                # a box that is not finite overlaps nothing, so no loss shows it
                finite = finite & torch.isfinite(total.detach()) & torch.isfinite(batch.targets.boxes).all()
                total.backward(torch.where(finite, self.scale.value / len(batches), torch.nan))
            found.append(losses.detach())
        self._update(finite)
        return found

    def rehearse(self, batches: Sequence[Batch]) -> None:
        """Run a complete step that changes nothing, by the same mechanism as a step after an alarm."""
        state = (self.alarm, self.scale.value, self.scale.good_steps)
        kept = [tensor.clone() for tensor in state]
        self.alarm.zero_()
        try:
            self.step(batches, step=0)
        finally:  # also if there was not enough memory, anywhere in the step
            for tensor, value in zip(state, kept, strict=True):
                tensor.copy_(value)
            self._statistics.settle(torch.tensor(True, device=self.device))
            self.optimizer.zero_grad()

    def measures(self) -> dict[str, Tensor]:
        """Device scalars to log: the gradient norm of the last good step before clipping, the alarm, the loss scale."""
        measures = {"grad_norm": self._grad_norm, "alarm": self.alarm >= 0}
        return measures | ({"loss_scale": self.scale.value} if self.scale.grows else {})

    def lr_of(self, step: int) -> float:
        """The learning rate of weights at a step; they are the last parameter group."""
        return self.optimizer.param_groups[-1]["peak_lr"] * self.schedule.factor(step)

    def _no_exchange(self) -> AbstractContextManager:
        return self._forward.no_sync() if hasattr(self._forward, "no_sync") else nullcontext()  # type: ignore[operator]

    @torch.no_grad()
    def _update(self, finite: Tensor) -> None:
        gradients = [weight.grad for weight in self.parameters.values() if weight.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients))) / self.scale.value
        if self.scale.grows:  # an overflow is told from a bad loss alike on all ranks
            finite = all_reduce_mean(finite.float()) == 1
        bad = ~(finite & (norm < torch.inf))  # NaN fails
        first_alarm = bad & (self.alarm < 0) & (~finite | (self.scale.value <= 1))
        self.alarm.copy_(torch.where(first_alarm, self._step, self.alarm))
        self._grad_norm.copy_(torch.where(bad, self._grad_norm, norm))

        shrink = 1.0 if self.clip_norm is None else ((norm + 1e-6) / self.clip_norm).clamp(min=1)
        self.optimizer.grad_scale = self.scale.value * shrink  # type: ignore[attr-defined]
        self.optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad()

        self._statistics.settle(bad)
        if self.ema is not None:
            self.ema.update(self._average_rate * ~bad)
        self.scale.update(bad & (self.alarm < 0))

    def state(self) -> dict[str, Any]:
        """State for a checkpoint, by parameter name."""
        return {
            "model": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.model.state_dict(),
            "optimizer": {
                "name": type(self.optimizer).__name__,
                "state": {name: dict(self.optimizer.state[weight]) for name, weight in self.parameters.items()},
            },
            "scaler": {"scale": self.scale.value, "good_steps": self.scale.good_steps} if self.scale.grows else None,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Restore `state`. Settings (learning rate, weight decay, clipping) stay those of this object.

        Raises:
            ValueError: the state is that of another model or optimizer.
        """
        name, tensors = state["optimizer"]["name"], state["optimizer"]["state"]
        if name != type(self.optimizer).__name__:
            raise ValueError(
                f"resume: expected a checkpoint of {type(self.optimizer).__name__}, got one of {name}. {OTHERWISE}"
            )
        if differing := sorted(tensors.keys() ^ self.parameters.keys()):
            raise ValueError(
                f"resume: expected a checkpoint that trained the same parameters, but {len(differing)} are in one only, "
                f"such as {differing[0]}. {OTHERWISE}"
            )
        try:
            self.model.load_state_dict(state["model"])
            if self.ema is not None:
                self.ema.model.load_state_dict(state["ema"] or state["model"])
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(
                f"resume: expected a checkpoint of this model, got another: {reason}. {OTHERWISE}"
            ) from None
        for name, weight in self.parameters.items():
            self.optimizer.state[weight].update({key: value.to(self.device) for key, value in tensors[name].items()})
        if self.scale.grows and state["scaler"] is not None:  # the run may have begun in another precision
            self.scale.value.copy_(state["scaler"]["scale"])
            self.scale.good_steps.copy_(state["scaler"]["good_steps"])
        self._statistics.keep()
