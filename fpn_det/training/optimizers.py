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

from fpn_det.models.layers import DeformableConv2d
from fpn_det.schema import Amount, Count, Decay, Fraction, Positive

KINDS = ("norm", "offset", "bias", "weight")  # the learning rate of the last, of the neck and heads, is logged
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
    # weight decay of all other biases except those of offsets; None: as for weights
    bias_weight_decay: Amount | None = None
    # learning rate of biases as a multiple of that of weights
    bias_lr_factor: Amount = 1.0
    # learning rate of the offsets of deformable convolutions as a multiple of that of weights (Zhu et al. 2019, 3.2)
    offset_lr_factor: Amount = 0.1
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
        """Parameter groups by kind (`KINDS`), without empty ones; the schedule multiplies `peak_lr`.

        With `layer_decay` these of every stage of the backbone, from its input on, and then those of neck and heads.
        """
        stages = model.backbone.parameters_by_stage() if self.layer_decay < 1 else []  # type: ignore[union-attr,operator]
        stage_of = {id(parameter): number for number, stage in enumerate(stages) for parameter in stage}
        found: list[dict[str, list[nn.Parameter]]] = [{kind: [] for kind in KINDS} for _ in range(len(stages) + 1)]
        deformable = [module for module in model.modules() if isinstance(module, DeformableConv2d)]
        offsets = {id(parameter) for module in deformable for parameter in module.offset.parameters()}
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.requires_grad:
                    kind = "offset" if id(parameter) in offsets else _kind(module, name, parameter)
                    found[stage_of.get(id(parameter), len(stages))][kind].append(parameter)
        lr_factors = {"bias": self.bias_lr_factor, "offset": self.offset_lr_factor}
        decays = {"norm": self.norm_weight_decay}
        if self.bias_weight_decay is not None:
            decays["bias"] = self.bias_weight_decay
        groups: list[dict[str, Any]] = []
        for number, kinds in enumerate(found):
            lr = self.scaled_lr(batch_size) * self.layer_decay ** (len(stages) - number)
            groups += [
                {
                    "params": parameters,
                    "peak_lr": lr * lr_factors.get(kind, 1.0),
                    "weight_decay": decays.get(kind, self.weight_decay),
                }
                for kind, parameters in kinds.items()
                if parameters
            ]
        return groups

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


def _kind(module: nn.Module, name: str, parameter: nn.Parameter) -> str:
    """The kind of a parameter of `module`. LayerScale, fusion weights, position tables and the like are as norms, as in timm."""
    if isinstance(module, NORMS) or "pos" in name or (parameter.dim() < 2 and name != "bias"):
        return "norm"
    return "bias" if name == "bias" else "weight"
