"""Optimizers with their learning rates and weight decays by kind of parameter.

They are torch's fused ones: one pass over weight, gradient and momentum, and a device flag (`found_inf`) skips the update.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from fpn_det.schema import Amount, Count, Decay, Fraction, Positive

NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


@dataclass(frozen=True, kw_only=True)
class Recipe(ABC):
    """Settings of all optimizers."""

    # peak learning rate at base_batch_size images per step
    lr: Positive
    # lr is scaled linearly from here to the batch size of the run; None: use lr unscaled
    base_batch_size: Count | None = 16
    # weight decay of the weights of convolutions and linear layers
    weight_decay: Amount = 1e-4
    # weight decay of the weights and biases of norms, of other scalars and vectors that are no biases, and of position embeddings
    norm_weight_decay: Amount = 0.0
    # weight decay of all other biases; None: as for weights
    bias_weight_decay: Amount | None = None
    # learning rate of biases as a multiple of that of weights
    bias_lr_factor: Amount = 1.0
    # learning rate of a stage of the backbone as a multiple of that of the stage after it; neck and heads have the full one. 1: all do
    layer_decay: Fraction = 1.0

    def scaled_lr(self, batch_size: int) -> float:
        """The peak learning rate at `batch_size` images per step, over all ranks and accumulation."""
        return self.lr if self.base_batch_size is None else self.lr * batch_size / self.base_batch_size

    def describe_lr(self, batch_size: int, world_size: int, accumulate: int) -> str:
        """One line, such as `0.0025 for 2 images a step (0.02 for 16)`, with the parts of a step if it has several."""
        line = f"{self.scaled_lr(batch_size):g} for {batch_size} images a step"
        if self.base_batch_size not in (None, batch_size):
            line += f" ({self.lr:g} for {self.base_batch_size})"
        per_part = f"{batch_size // (world_size * accumulate)} images"
        ranks = f"{world_size} ranks x " if world_size > 1 else ""
        parts = f" x {accumulate} accumulated" if accumulate > 1 else ""
        return f"{line}, {ranks}{per_part}{parts}" if ranks or parts else line

    def groups(self, model: nn.Module, batch_size: int) -> list[dict[str, Any]]:
        """Parameter groups by kind, without empty ones; the schedule multiplies `peak_lr`.

        The kinds are norms and what decays as they do (`_is_like_norm`), biases, and weights.

        With `layer_decay` these of every stage of the backbone, from its input on, and then those of neck and heads.
        """
        stages = model.backbone.parameters_by_stage() if self.layer_decay < 1 else []  # type: ignore[union-attr,operator]
        stage_of = {id(parameter): number for number, stage in enumerate(stages) for parameter in stage}
        norms: list[list[nn.Parameter]] = [[] for _ in range(len(stages) + 1)]
        biases: list[list[nn.Parameter]] = [[] for _ in norms]
        weights: list[list[nn.Parameter]] = [[] for _ in norms]
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.requires_grad:
                    like_norm = isinstance(module, NORMS) or _is_like_norm(name, parameter)
                    group = norms if like_norm else biases if name == "bias" else weights
                    group[stage_of.get(id(parameter), len(stages))].append(parameter)
        bias_weight_decay = self.weight_decay if self.bias_weight_decay is None else self.bias_weight_decay
        groups: list[dict[str, Any]] = []
        for number in range(len(norms)):
            lr = self.scaled_lr(batch_size) * self.layer_decay ** (len(stages) - number)
            groups += [
                {"params": norms[number], "peak_lr": lr, "weight_decay": self.norm_weight_decay},
                {"params": biases[number], "peak_lr": lr * self.bias_lr_factor, "weight_decay": bias_weight_decay},
                {"params": weights[number], "peak_lr": lr, "weight_decay": self.weight_decay},
            ]
        return [group for group in groups if group["params"]]

    @abstractmethod
    def build(self, model: nn.Module, batch_size: int) -> Optimizer:
        """Make the optimizer of the trainable parameters of `model`, which must be on its device."""


@dataclass(frozen=True, kw_only=True)
class SGD(Recipe):
    """Stochastic gradient descent with momentum."""

    # decay of the running sum of gradients
    momentum: Decay = 0.9
    # Nesterov momentum; requires momentum
    nesterov: bool = False

    def __post_init__(self) -> None:
        if self.nesterov and not self.momentum:
            raise ValueError("optimizer.nesterov: expected momentum above 0, got momentum=0. Set optimizer.momentum.")

    def build(self, model: nn.Module, batch_size: int) -> Optimizer:
        groups = self.groups(model, batch_size)
        optimizer = torch.optim.SGD(
            groups, self.scaled_lr(batch_size), momentum=self.momentum, nesterov=self.nesterov, fused=True
        )
        if self.momentum:
            # torch makes the buffers in the first step, and leaves them uninitialized if that step is skipped
            for parameter in (parameter for group in groups for parameter in group["params"]):
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer


@dataclass(frozen=True, kw_only=True)
class AdamW(Recipe):
    """Adam with decoupled weight decay."""

    weight_decay: Amount = 0.05
    # decays of the running means of the gradient and of its square
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    # added to the root of the mean square
    eps: Positive = 1e-8

    def build(self, model: nn.Module, batch_size: int) -> Optimizer:
        return torch.optim.AdamW(
            self.groups(model, batch_size), self.scaled_lr(batch_size), self.betas, self.eps, fused=True
        )


def _is_like_norm(name: str, parameter: nn.Parameter) -> bool:
    """True for LayerScale, fusion weights, position tables and the like: timm and their papers do not decay them."""
    return (parameter.dim() < 2 and name != "bias") or "pos" in name
