from __future__ import annotations

import copy
import dataclasses
import io

import pytest
import torch
from compare import assert_close
from parts import TinyDetector, TinyLoader, differences, make_batch, make_optimization, snapshot
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fpn_det.structures import Batch, Losses
from fpn_det.training.optimization import LossScale
from fpn_det.training.optimizers import SGD, AdamW

RECIPES = [SGD(lr=0.1, base_batch_size=None), AdamW(lr=0.01, base_batch_size=None)]


def spoiled(batch: Batch) -> Batch:
    return dataclasses.replace(batch, pixels=batch.pixels.float().fill_(float("nan")))


class Operators(TorchDispatchMode):
    """Notes which operators run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


class SteepDetector(TinyDetector):
    """Its loss is finite while its gradient is not, on a batch whose first image has an odd number."""

    def forward(self, batch: Batch, step: int) -> Losses:
        losses = super().forward(batch, step)
        zero = (self.head.bias - self.head.bias.detach()).sum()  # the root's slope at 0 is infinite
        return losses | Losses({"roi_root": zero.sqrt()}) if batch.indices[0] % 2 else losses


@pytest.mark.parametrize("recipe", RECIPES, ids=["sgd", "adamw"])
def test_step_equals_plain_torch(recipe):
    optimization = make_optimization(TinyDetector(norm=False), recipe)
    model = copy.deepcopy(optimization.model)
    kind, options = (torch.optim.SGD, {"momentum": 0.9}) if isinstance(recipe, SGD) else (torch.optim.AdamW, {})
    plain = kind(recipe.groups(model, 4), lr=recipe.lr, **options)
    for step in range(4):
        batch = make_batch([step, step + 1, step + 2, step + 3])
        optimization.step([batch], step)
        model(batch, step).total().backward()
        plain.step()
        plain.zero_grad()
    for name, weight in model.named_parameters():
        assert_close(optimization.parameters[name], weight, 1e-5)


@pytest.mark.parametrize("clip_norm", [0.1, 100.0])
def test_clipping_equals_torchs(clip_norm):
    optimization = make_optimization(
        recipe=SGD(lr=1.0, base_batch_size=None, momentum=0.0, weight_decay=0.0), clip_norm=clip_norm
    )
    torch.manual_seed(0)
    model = TinyDetector()
    batch = make_batch([0, 1, 2, 3])
    model(batch, 0).total().backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    before = snapshot(optimization)
    optimization.step([batch], 0)
    assert_close(optimization.measures()["grad_norm"], norm, 1e-5)
    for name, weight in model.named_parameters():
        assert_close(optimization.parameters[name], before[f"model.{name}"] - weight.grad, 1e-6, name)


def test_accumulation_equals_the_big_batch():
    big, small = make_optimization(TinyDetector(norm=False)), make_optimization(TinyDetector(norm=False))
    small.model.load_state_dict(big.model.state_dict())
    for step in range(3):
        big.step([make_batch([0, 1, 2, 3])], step)
        small.step([make_batch([0]), make_batch([1]), make_batch([2]), make_batch([3])], step)
    for name, weight in big.model.state_dict().items():
        assert_close(small.model.state_dict()[name], weight, 1e-5)


@pytest.mark.parametrize("first_is_bad", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("recipe", RECIPES, ids=["sgd", "adamw"])
def test_bad_step_touches_nothing(recipe, precision, first_is_bad):
    optimization = make_optimization(recipe=recipe, precision=precision, clip_norm=1.0, ema_decay=0.9)
    good = make_batch([0, 1])
    if not first_is_bad:
        optimization.step([good, good], 0)
    before = snapshot(optimization)
    optimization.step([good, spoiled(good)], 1)
    after = snapshot(optimization)
    if first_is_bad and isinstance(recipe, AdamW):  # its state is made by the first step; it must be that of no step
        made = [name for name in after if name not in before]
        assert made and all(not after.pop(name).any() for name in made)
    assert differences(before, after) == []
    assert int(optimization.alarm) == 1


def test_nothing_moves_after_an_alarm():
    optimization = make_optimization(ema_decay=0.9)
    good = make_batch([0, 1])
    optimization.step([good], 0)
    before = snapshot(optimization)
    optimization.step([spoiled(good)], 1)
    optimization.step([good], 2)
    optimization.step([spoiled(good)], 3)
    assert differences(before, snapshot(optimization)) == []
    assert int(optimization.alarm) == 1


def test_infinite_gradient_of_a_finite_loss_touches_nothing():
    optimization = make_optimization(SteepDetector())
    before = snapshot(optimization)
    (losses,) = optimization.step([make_batch([1, 2])], 5)
    assert torch.isfinite(losses.total())
    assert differences(before, snapshot(optimization)) == []
    assert int(optimization.alarm) == 5


def test_fp16_overflow_halves_the_scale_and_is_no_alarm():
    optimization = make_optimization(SteepDetector(), precision="fp16")
    before = snapshot(optimization)
    optimization.step([make_batch([1, 2])], 0)
    assert differences(before, snapshot(optimization)) == []
    assert int(optimization.alarm) == -1
    assert float(optimization.scale.value) == 2.0**15
    optimization.step([make_batch([2, 3])], 1)
    assert differences(before, snapshot(optimization)) != []
    assert float(optimization.scale.value) == 2.0**15


def test_fp16_alarm_when_the_loss_is_bad_or_the_scale_is_not_to_blame():
    optimization = make_optimization(precision="fp16")
    optimization.step([spoiled(make_batch([0, 1]))], 0)
    assert int(optimization.alarm) == 0
    optimization = make_optimization(SteepDetector(), precision="fp16")
    for step in range(20):  # from 2^16 down to 1 in 16 steps
        optimization.step([make_batch([1, 2])], step)
    assert int(optimization.alarm) == 16


def test_fp16_starts_with_its_own_scale_where_the_run_began_in_another_precision():
    before, resumed = make_optimization(precision="fp32"), make_optimization(precision="fp16")
    resumed.load(before.state())
    assert float(resumed.scale.value) == 2.0**16


def test_loss_scale_doubles_when_it_may():
    scale = LossScale(grows=True, device=torch.device("cpu"))
    for _ in range(LossScale.GROWTH_INTERVAL):
        assert float(scale.value) == 2.0**16
        scale.update(torch.tensor(False))
    assert float(scale.value) == 2.0**17


def test_lr_follows_the_schedule():
    optimization = make_optimization(recipe=SGD(lr=0.5, base_batch_size=None, bias_lr_factor=2.0), steps=16)
    object.__setattr__(optimization.schedule, "warmup_steps", 4)
    optimization.step([make_batch([0, 1])], 2)
    assert optimization.lr == pytest.approx(0.5 * (0.001 + 0.999 * 2 / 4))
    lrs = sorted(group["lr"] for group in optimization.optimizer.param_groups)
    assert lrs == pytest.approx([optimization.lr, optimization.lr, 2 * optimization.lr])


def test_step_reads_nothing_from_the_device():
    optimization = make_optimization(clip_norm=1.0, ema_decay=0.9)
    batches = [make_batch([0, 1]), make_batch([2, 3])]
    with Operators() as operators:
        optimization.step(batches, 0)
        optimization.step(batches, 1)
    assert "_fused_sgd_" in operators.names
    assert operators.names.isdisjoint({"_local_scalar_dense", "nonzero", "masked_select", "equal"})


@pytest.mark.parametrize("recipe", RECIPES, ids=["sgd", "adamw"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_state_goes_on_to_the_bit(recipe, precision):
    options = {"precision": precision, "clip_norm": 1.0, "ema_decay": 0.9}
    straight = make_optimization(recipe=recipe, **options)
    batches = TinyLoader(accumulate=2).iterate(0)
    batches = [[next(batches), next(batches)] for _ in range(6)]
    for step in range(3):
        straight.step(batches[step], step)
    resumed = make_optimization(TinyDetector(), recipe, **options)
    resumed.load(reread(straight.state()))
    for step in range(3, 6):
        for optimization in (straight, resumed):
            optimization.step(batches[step], step)
    assert differences(snapshot(straight), snapshot(resumed)) == []


def reread(state):
    """The state as it comes back from a file."""
    file = io.BytesIO()
    torch.save(state, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


def test_load_refuses_another_model_or_optimizer():
    sgd, adamw = (make_optimization(recipe=recipe) for recipe in RECIPES)
    with pytest.raises(ValueError, match=r"resume: expected a checkpoint of AdamW, got one of SGD\. .*init_from"):
        adamw.load(sgd.state())
    other = make_optimization(TinyDetector(norm=False))
    with pytest.raises(ValueError, match=r"resume: .* 2 are in one only, such as norm.bias"):
        other.load(sgd.state())


def test_optimization_refuses_wrong_settings():
    with pytest.raises(ValueError, match="precision: expected one of fp32, tf32, bf16, fp16, got 'fp8'"):
        make_optimization(precision="fp8")
    with pytest.raises(ValueError, match=r"trainer.clip_norm: expected a positive length, got 0"):
        make_optimization(clip_norm=0.0)
    with pytest.raises(ValueError, match=r"ema: expected a decay between 0 and 1, got 1"):
        make_optimization(ema_decay=1.0)
