"""Where the program runs: device, precision, ranks and seeds. The only file that knows torch.distributed.

One process is the same code as many: without a launcher there is one rank, 0 of 1, and every collective is the identity.
"""

from __future__ import annotations

import datetime
import inspect
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")

PATIENCE = datetime.timedelta(days=1)  # with a rank that is alive; the death of one is noticed at once


def pick_device(name: str = "auto") -> torch.device:
    """The device that `name` asks for; `auto` takes the best that is there.

    Raises:
        ValueError: the device is unknown or absent, with what is available.
    """
    present = ["cpu"]
    if torch.cuda.is_available():
        present.insert(0, "cuda")
    if torch.backends.mps.is_available():
        present.append("mps")
    if name == "auto":
        name = present[0]
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (number and not number.isdigit()):
        raise ValueError(f"device: expected auto, cpu, cuda, cuda:<number> or mps, got '{name}'.")
    if kind not in present:
        raise ValueError(
            f"device: '{name}' is not available here (torch {torch.__version__} sees {', '.join(present)}). Use device=auto."
        )
    if kind == "cuda" and number and int(number) >= torch.cuda.device_count():
        raise ValueError(f"device: '{name}' does not exist, this machine has {torch.cuda.device_count()} GPU(s).")
    return torch.device(name)


def seed_everything(seed: int) -> None:
    """Seed every generator that a library could draw from. Our own draws take their seeds as arguments."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Let whatever draws from a global generator (dropout, a user's layer) depend on the step, not on the past."""
    (state,) = np.random.SeedSequence((seed, step, rank)).generate_state(1)
    seed_everything(int(state))


@dataclass(frozen=True)
class Ranks:
    """This process's place among all: `rank` of `world_size`, `local_rank` on its machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0


_is_alone = False


@contextmanager
def alone() -> Iterator[None]:
    """Within this context each process works for itself, as if there were no other."""
    global _is_alone
    _is_alone = True
    try:
        yield
    finally:
        _is_alone = False


def current_ranks() -> Ranks:
    """The place of this process in the group that is open now; 0 of 1 without one."""
    if _is_alone or not dist.is_initialized():
        return Ranks()
    return Ranks(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", 0)))


@contextmanager
def process_group(device: str, timeout_minutes: float) -> Iterator[tuple[Ranks, torch.device]]:
    """Join the job that `torchrun` (or a cluster's launcher with the same variables) started, and leave it at the end.

    Args:
        device: see `pick_device`.
        timeout_minutes: how long one rank waits for another in the middle of a step. Where one rank works for all
            (it scores, it saves), the others wait for as long as it lives.

    Raises:
        ValueError: only some of the launcher's variables are set.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in os.environ]
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and missing:
        raise ValueError(
            f"distributed: WORLD_SIZE is set but {', '.join(missing)} are not. Launch with torchrun, or unset WORLD_SIZE."
        )
    if missing:
        yield Ranks(), pick_device(device)
        return
    chosen = pick_device(device)
    if chosen.type == "cuda":
        chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        torch.cuda.set_device(chosen)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo",  # what is on the host is exchanged there
        timeout=datetime.timedelta(minutes=timeout_minutes),
    )
    global _host_group
    _host_group = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=PATIENCE))
    try:
        yield current_ranks(), chosen
    finally:
        _host_group = None
        dist.destroy_process_group()


# Exchanges between hosts, by which ranks wait for one another's work.
_host_group: dist.ProcessGroup | None = None


def tells_of_lost_rank(error: Exception) -> bool:
    """Whether this says that another rank has ended, or cannot be reached, while this one waited for it."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(
        error
    )  # gloo's errors have no class of their own


def wrap_for_ranks(model: nn.Module) -> nn.Module:
    """The module whose backward averages gradients over the ranks: DDP with more than one, else the model itself.

    Buffers are not broadcast in training, which reads none: see `share_buffers`.
    """
    if current_ranks().world_size == 1:
        return model
    # newer versions of torch warn about the old name of the same setting
    known = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {name: False, "gradient_as_bucket_view": True}
    return DistributedDataParallel(model, **options)


def share_buffers(module: nn.Module) -> None:
    """Give every rank the buffers of rank 0.

    Norms that are not synchronized gather running statistics on each rank for itself, and a checkpoint holds those of
    rank 0: so all ranks must evaluate with them.
    """
    if current_ranks().world_size > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def broadcast_object(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    if current_ranks().world_size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=_host_group)
    return box[0]


def gather_objects(value: Any) -> list[Any] | None:
    """The values of all ranks, in their order, on rank 0; None on the others. Plain arrays only, please."""
    ranks = current_ranks()
    if ranks.world_size == 1:
        return [value]
    gathered: list[Any] | None = [None] * ranks.world_size if ranks.is_main else None
    dist.gather_object(value, gathered, dst=0, group=_host_group)
    return gathered


def agree_on_max(value: int) -> int:
    """The largest value of all ranks, without touching the device."""
    if current_ranks().world_size == 1:
        return value
    box = torch.tensor(value)
    dist.all_reduce(box, op=dist.ReduceOp.MAX, group=_host_group)
    return int(box)


def on_main(work: Callable[[], T]) -> T:
    """What `work` returns or raises on rank 0, on all ranks; for work that one rank does for all."""
    result: T | None = None
    failure: Exception | None = None
    if current_ranks().is_main:
        try:
            result = work()
        except (ValueError, OSError, FloatingPointError) as error:
            failure = error
    result, failure = broadcast_object((result, failure))
    if failure is not None:
        if not current_ranks().is_main:
            mark_as_echo(failure)
        raise failure
    return result


def mark_as_echo(error: BaseException) -> None:
    """Note that rank 0 raises this too, so that it need not be told twice."""
    error.__dict__["is_echo"] = True


def is_echo(error: BaseException) -> bool:
    """Whether rank 0 raises this too."""
    return "is_echo" in error.__dict__


def all_reduce_mean(value: Tensor) -> Tensor:
    """The mean of a tensor over the ranks, without gradient, as a new tensor."""
    ranks = current_ranks()
    if ranks.world_size == 1:
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total / ranks.world_size


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient


def all_reduce_sum(value: Tensor) -> Tensor:
    """The sum of a tensor over the ranks; differentiable, and its gradient is summed over the ranks too."""
    return _AllReduceSum.apply(value) if current_ranks().world_size > 1 else value
