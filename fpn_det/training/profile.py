"""Profile of a run by operator."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

from fpn_det.runs.log import RunLog
from fpn_det.terminal import shown_path

SHOWN_OPERATORS = 20


@contextmanager
def profiled(enabled: bool, log: RunLog) -> Iterator[None]:
    """Profile the body of the context if `enabled`: a table in the log, and `trace.json`. Meant for a few steps."""
    if not enabled:
        yield
        return
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        yield
    order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    log.info(profiler.key_averages().table(sort_by=order, row_limit=SHOWN_OPERATORS, max_name_column_width=50))
    trace: Path = log.folder / "trace.json"
    profiler.export_chrome_trace(str(trace))
    log.info(f"  trace  {shown_path(trace)}")
