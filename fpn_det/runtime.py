"""Devices, seeds and distributed communication. The only module that imports torch.distributed.

A single process runs the same code as many: without a launcher there is one rank, 0 of 1, and every collective returns its
input. Collectives whose name starts with `host` run over gloo on the CPU and do not synchronize the device.
"""

from __future__ import annotations

import ctypes
import datetime
import inspect
import os
import random
import sys
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

# Host collectives wait this long for a rank that is busy. The end of a process closes its connections and is noticed at once.
HOST_TIMEOUT = datetime.timedelta(days=1)
# Parameters of mallopt, from malloc.h of the GNU C library.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def pick_device(name: str = "auto") -> torch.device:
    """Return the device called `name`; `auto` prefers cuda, then mps, then cpu.

    Raises:
        ValueError: the device is unknown or not available; the message lists the available ones.
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


def keep_freed_memory(device: torch.device) -> None:
    """Let the C library keep freed memory for the next allocation, for work on the CPU and where the library is glibc.

    By default it returns large blocks to the system. A training step on the CPU frees and allocates the same tensors again and
    again, and the system clears every page each time, in 5 to 8 % of the step's time. The process stays at its peak size.
    """
    if device.type != "cpu" or sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # absent in other C libraries
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def seed_everything(seed: int) -> None:
    """Seed the global generators of random, numpy and torch. The package's own random draws take seeds as arguments."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed the global generators for one step, so that dropout and custom layers are reproducible after a resume."""
    (state,) = np.random.SeedSequence((seed, step, rank)).generate_state(1)
    seed_everything(int(state))


@dataclass(frozen=True)
class Ranks:
    """Rank of this process, as in torch.distributed.

    Attributes:
        rank: in [0, world_size).
        world_size: number of processes.
        local_rank: rank among the processes of this machine.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0


_is_single_process = False


@contextmanager
def single_process() -> Iterator[None]:
    """Disable all collectives within this context: every process has rank 0 of 1."""
    global _is_single_process
    _is_single_process = True
    try:
        yield
    finally:
        _is_single_process = False


def current_ranks() -> Ranks:
    """Return the rank of this process in the current process group; 0 of 1 without a group."""
    if _is_single_process or not dist.is_initialized():
        return Ranks()
    return Ranks(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", 0)))


@contextmanager
def process_group(device: str, timeout_minutes: float) -> Iterator[tuple[Ranks, torch.device]]:
    """Initialize the process group of a job started by `torchrun`, or by a launcher that sets the same variables.

    Args:
        device: see `pick_device`. With cuda, each process takes the GPU of its local rank.
        timeout_minutes: timeout of collectives on the device. Host collectives, which wait while rank 0 scores or saves, wait
            until a process ends.

    Raises:
        ValueError: only some of the launcher's variables are set.
    """
    _adopt_slurm_variables()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in os.environ]
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and missing:
        raise ValueError(
            f"distributed: WORLD_SIZE is set but {', '.join(missing)} are not. Launch with torchrun, or unset WORLD_SIZE."
        )
    chosen = pick_device(device)
    keep_freed_memory(chosen)
    if missing:
        if chosen.type == "cuda" and chosen.index is not None:
            torch.cuda.set_device(chosen)  # libraries allocate on the current device
        yield Ranks(), chosen
        return
    if chosen.type == "cuda":
        chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        torch.cuda.set_device(chosen)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo",  # CPU tensors over gloo
        timeout=datetime.timedelta(minutes=timeout_minutes),
    )
    global _host_group
    _host_group = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=HOST_TIMEOUT))
    try:
        yield current_ranks(), chosen
    finally:
        _host_group = None
        dist.destroy_process_group()


def _adopt_slurm_variables() -> None:
    """Set torchrun's variables from those of `srun`, for a job step with several tasks.

    Raises:
        ValueError: the step has several tasks, and the address of the first is unknown.
    """
    if "RANK" in os.environ or int(os.environ.get("SLURM_NTASKS", 1)) < 2 or "SLURM_PROCID" not in os.environ:
        return
    address = os.environ.get("MASTER_ADDR") or os.environ.get("SLURM_LAUNCH_NODE_IPADDR")
    if int(os.environ.get("SLURM_NNODES", 1)) == 1:
        address = address or "localhost"
    if not address:
        raise ValueError(
            f"distributed: expected the address of the first node of {os.environ['SLURM_NTASKS']} tasks, got none. Set "
            "MASTER_ADDR=$(scontrol show hostnames $SLURM_JOB_NODELIST | head -n 1) before srun."
        )
    port = 20000 + int(os.environ.get("SLURM_JOB_ID", 0)) % 20000  # the same on all tasks of a job
    os.environ |= {
        "RANK": os.environ["SLURM_PROCID"],
        "WORLD_SIZE": os.environ["SLURM_NTASKS"],
        "LOCAL_RANK": os.environ.get("SLURM_LOCALID", "0"),
        "MASTER_ADDR": address,
        "MASTER_PORT": os.environ.get("MASTER_PORT", str(port)),
    }


def set_float32_precision(allow_tf32: bool) -> None:
    """Choose the precision of float32 convolutions and matrix products on CUDA: full, or TensorFloat-32."""
    torch.backends.cudnn.allow_tf32 = allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allow_tf32


# Group of the host collectives.
_host_group: dist.ProcessGroup | None = None


def is_lost_rank_error(error: Exception) -> bool:
    """Return whether a collective failed because another rank ended or cannot be reached."""
    # gloo raises RuntimeError, so its message is inspected
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def wrap_in_ddp(model: nn.Module) -> nn.Module:
    """Wrap the model in DistributedDataParallel, which averages gradients over ranks; a single process keeps the bare model.

    DDP does not broadcast buffers here, because the training step does not read them: see `broadcast_buffers`.
    """
    if current_ranks().world_size == 1:
        return model
    # newer versions of torch warn about the former name of this argument
    known = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {name: False, "gradient_as_bucket_view": True}
    options["find_unused_parameters"] = getattr(model, "has_unused_parameters", False)
    return DistributedDataParallel(model, **options)


def broadcast_buffers(module: nn.Module) -> None:
    """Copy the buffers of rank 0 to all ranks.

    Norms that are not synchronized accumulate different running statistics on each rank. Checkpoints store those of rank 0, so
    all ranks must evaluate with the same ones.
    """
    if current_ranks().world_size > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def broadcast_object(value: Any) -> Any:
    """Return the value of rank 0 on every rank."""
    if current_ranks().world_size == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, group=_host_group)
    return values[0]


def gather_objects(value: Any) -> list[Any] | None:
    """Return the values of all ranks, ordered by rank, on rank 0, and None elsewhere. Values are pickled: pass plain arrays."""
    ranks = current_ranks()
    if ranks.world_size == 1:
        return [value]
    gathered: list[Any] | None = [None] * ranks.world_size if ranks.is_main else None
    dist.gather_object(value, gathered, dst=0, group=_host_group)
    return gathered


def host_all_reduce_max(value: int) -> int:
    """Return the largest value of all ranks."""
    return _host_all_reduce(value, dist.ReduceOp.MAX)


def host_all_reduce_min(value: int) -> int:
    """Return the smallest value of all ranks."""
    return _host_all_reduce(value, dist.ReduceOp.MIN)


def _host_all_reduce(value: int, operation: dist.ReduceOp.RedOpType) -> int:
    if current_ranks().world_size == 1:
        return value
    reduced = torch.tensor(value)
    dist.all_reduce(reduced, op=operation, group=_host_group)
    return int(reduced)


def run_on_main(work: Callable[[], T]) -> T:
    """Call `work` on rank 0 only; its return value or exception is broadcast to all ranks.

    Raises:
        ValueError, OSError, FloatingPointError: raised by `work`; on all ranks.
    """
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
            mark_reported_by_main(failure)
        raise failure
    return result


def mark_reported_by_main(error: BaseException) -> None:
    """Mark an exception that rank 0 raises too, so that it is reported once."""
    error.__dict__["is_reported_by_main"] = True


def is_reported_by_main(error: BaseException) -> bool:
    """Return whether rank 0 raises this exception too."""
    return "is_reported_by_main" in error.__dict__


def all_reduce_mean(value: Tensor) -> Tensor:
    """Return the mean of a tensor over ranks, as a new tensor without gradient."""
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
    """Return the sum of a tensor over ranks. Differentiable: the gradient is summed over ranks too."""
    return _AllReduceSum.apply(value) if current_ranks().world_size > 1 else value
