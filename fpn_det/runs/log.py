"""Log a run to the screen, to `log.txt` and to TensorBoard. The only module that imports TensorBoard.

Only rank 0 prints; other ranks write to `rank{k}.log`. On a terminal a progress bar is shown below the lines; files and pipes
get lines without carriage returns. An undefined value (None) is printed as n/a and adds no point to a curve.
"""

from __future__ import annotations

import datetime
import math
import shlex
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.columns import Columns
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.table import Table
from rich.text import Text
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from fpn_det.evaluation.coco import Evaluation
from fpn_det.runs.bad_files import read_bad_files
from fpn_det.runs.meters import Pace
from fpn_det.runs.records import StepRecords
from fpn_det.runs.step_lines import StepLines, clock, loss_text
from fpn_det.runs.tags import tag_evaluation, tag_metrics, tag_steps
from fpn_det.runs.trackers import LoggerName, Tracker, start_trackers
from fpn_det.runtime import Ranks
from fpn_det.terminal import PLAIN_WIDTH, SafeConsole, printable, replace_unencodable, say, shown_path, standard_console

T = TypeVar("T")

CLASSES_PER_COLUMN = 20
METRICS_PER_TABLE = 8  # more are cut where a line has 80 characters
SLOW_DATA = 0.3  # fraction of the time spent waiting for data above which a warning is logged


class RunLog:
    """Log of one run, on every rank. Used as a context manager, it writes the traceback of an exception that ends the run.

    Args:
        folder: run folder; created if it does not exist.
        ranks: rank of this process.
        screen: console of rank 0; by default the standard output.
    """

    def __init__(self, folder: Path, ranks: Ranks, screen: Console | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        name = "log.txt" if ranks.is_main else f"rank{ranks.rank}.log"
        self._file = (folder / name).open("a", encoding="utf-8", errors="backslashreplace", buffering=1)
        self._plain = SafeConsole(file=self._file, width=PLAIN_WIDTH, color_system=None, force_terminal=False)
        # The current stream is kept, so that a later redirection of sys.stdout does not receive the progress bar.
        self._screen = (screen or standard_console()) if ranks.is_main else None
        if self._screen is not None:
            replace_unencodable(self._screen.file)
        self._writer: SummaryWriter | None = None
        self._trackers: dict[str, Tracker] = {}
        self._records: StepRecords | None = None
        columns = (
            TextColumn("{task.description}"),
            BarColumn(None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeLeft(),
        )
        without_bar = self._screen is None or not self._screen.is_terminal
        self._bar = Progress(*columns, console=self._screen, transient=True, expand=True, disable=without_bar)
        self._training: TaskID | None = None
        self._lines = StepLines(PLAIN_WIDTH if self._screen is None else self._screen.width)
        self._has_warned = False
        self._opened = time.perf_counter()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        with (
            suppress(OSError) if error is not None else nullcontext()
        ):  # the error that ends the run has priority over a full disk
            if error is not None:
                self._file.write(printable("".join(traceback.format_exception(kind, error, trace))))
            if self._writer is not None:
                self._writer.close()
            self._track(lambda tracker: tracker.close())
            self._file.close()

    def info(self, text: str) -> None:
        """Log one or more lines of text."""
        stamp = f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S}"
        self._plain.print(f"{stamp}  {text}", markup=False, highlight=False, soft_wrap=True)
        if self._screen is not None:
            say(self._screen, text)

    def begin(
        self,
        pace: Pace,
        loggers: Sequence[LoggerName] = ("tensorboard",),
        settings: Mapping[str, Any] | None = None,
        trains: bool = True,
    ) -> None:
        """Open TensorBoard, trackers, `training.jsonl` and the progress bar, at the start of training or after `pace.first_step` of a resumed run.

        Points of later steps, which an interrupted run may have written, are purged from the curves.

        Args:
            trains: False where steps are shown only; there is neither `training.jsonl` nor the bar that `advance` moves.
        """
        if self._screen is None:
            return
        purge_step = pace.first_step + 1 if pace.first_step else None
        if "tensorboard" in loggers:
            self._writer = SummaryWriter(str(event_folder(self.folder)), purge_step=purge_step)
        self._trackers = start_trackers(loggers, self.folder, settings or {})
        if trains:
            self._records = StepRecords(self.folder, pace.first_step)
            self._training = self._bar.add_task(
                "training", total=pace.total_steps, completed=pace.first_step, note="", ends_at=None
            )
            self._bar.start()

    def advance(self, step: int, pace: Pace) -> None:
        """Update the progress bar and its time left. Cheap enough to be called at every step."""
        if self._training is not None:
            left_s = pace.eta_s(step)
            ends_at = None if left_s is None else time.monotonic() + left_s
            self._bar.update(self._training, completed=step, ends_at=ends_at)

    def track(self, items: Iterable[T], title: str) -> Iterator[T]:
        """Iterate over `items` and show a progress bar."""
        self._bar.start()
        task = self._bar.add_task(title, total=len(items) if isinstance(items, Sized) else None, note="", ends_at=None)
        for item in items:
            yield item
            self._bar.advance(task)
        self._bar.remove_task(task)

    def train(self, step: int, values: Mapping[str, float], parts: Sequence[str], pace: Pace) -> None:
        """Log what matters of a step as one line, and every value as a point of a curve and in `training.jsonl`.

        Throughput since the previous call is added.

        Args:
            step: number of completed steps.
            values: by name.
            parts: names of the terms that add up to the loss.
            pace: of the run.
        """
        values = {**values, **pace.read(step)}
        for line in self._lines.add(step, values, parts, pace):
            self.info(line)
        if pace.data_share > SLOW_DATA and not self._has_warned and pace.is_warm:
            self._has_warned = True
            self.info(
                f"Training is limited by data loading: {pace.data_share:.0%} of the time since the last line was spent waiting. "
                "Raise data.num_workers, resize on the device (data.resize_on=device), or decode JPEG files at a reduced size "
                "(data.reduced_decoding=train)."
            )
        bad_files = read_bad_files(self.folder)
        tagged = tag_steps(values | ({"bad_files": len(bad_files)} if bad_files else {}))
        if self._records is not None:
            self._records.add(step, tagged)
        self.scalars(step, tagged)
        if self._training is not None:
            self._bar.update(self._training, note=f"loss {loss_text(values['loss'])}")

    def evaluation(self, step: int, evaluation: Evaluation) -> None:
        """Log the tables of an evaluation, and each metric as a point of a curve."""
        loss = f", loss {_number(evaluation.metrics['loss'] or 0)}" if "loss" in evaluation.metrics else ""
        self.info(f"evaluation at step {step}: {evaluation.num_images} images in {evaluation.seconds:.1f} s{loss}")
        self.show(metrics_table(evaluation))
        self.show(classes_table(evaluation))
        if (best := evaluation.best_f1) is not None:
            self.info(
                f"best F1 {best.f1:.3f} with one score threshold {best.score:.3f} for all classes: precision\n"
                f"  {best.precision:.3f}, recall {best.recall:.3f}, from IoU {evaluation.match_iou:g} on. The column score has\n"
                "  the best threshold of each class."
            )
        for remark in evaluation.remarks():
            self.info(remark)
        self.scalars(step, tag_evaluation(evaluation))

    def scalars(self, step: int, values: Mapping[str, float | None]) -> None:
        """Write scalars to TensorBoard, flushed, and to trackers. Undefined values (None) are skipped."""
        defined = {name: value for name, value in values.items() if value is not None}
        self._track(lambda tracker: tracker.scalars(step, defined))
        if self._writer is None:
            return
        for name, value in defined.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # a resumed run continues the curves of a killed one

    def hparams(self, settings: Mapping[str, Any], metrics: Mapping[str, float | None]) -> None:
        """Write settings and final metrics to TensorBoard's HParams, in the event file of the run."""
        if self._writer is None:
            return
        plain = {
            name: value if isinstance(value, bool | int | float | str) else str(value)
            for name, value in settings.items()
        }
        reached = {tag: value for tag, value in tag_metrics(metrics).items() if value is not None}
        writer = self._writer._get_file_writer()
        for summary in hparams(plain, reached):
            writer.add_summary(summary)

    def image(self, step: int, name: str, image: NDArray[np.uint8]) -> None:
        """Write an RGB image [h, w, 3] to TensorBoard and trackers, as `images/<name>`."""
        self._track(lambda tracker: tracker.image(step, f"images/{name}", image))
        if self._writer is not None:
            self._writer.add_image(f"images/{name}", image, step, dataformats="HWC")

    def summary(self, metric: str, best: float | None, best_step: int, next_steps: Sequence[str]) -> None:
        """Log the result at the end of a run, below the tables of its last evaluation.

        Args:
            metric: name of the metric that decides about the best weights.
            best: its best value; None if it was never defined.
            best_step: the step of the best weights.
            next_steps: commands that follow.
        """
        seconds = datetime.timedelta(seconds=round(time.perf_counter() - self._opened))
        lines = [
            f"Done in {seconds}. Best {metric} {_metric(best)} at step {best_step}.",
            f"  run folder   {shown_path(self.folder)}",
            f"  TensorBoard  {watch_command(self.folder)}",
            "Next:",
            *(f"  {command}" for command in next_steps),
        ]
        self.info("\n".join(lines))

    def _track(self, write: Callable[[Tracker], None]) -> None:
        """Write to each tracker. One that fails is left out from then on; it is not worth a run."""
        for name, tracker in list(self._trackers.items()):
            try:
                write(tracker)
            except Exception as error:
                del self._trackers[name]
                self.info(f"logger: {name} failed and gets nothing more: {type(error).__name__}: {error}")

    def show(self, table: RenderableType) -> None:
        """Log a table."""
        self._lines.restart()
        self._plain.print(table)
        if self._screen is not None:
            self._screen.print(table)


class TimeLeft(ProgressColumn):
    """The time to the moment `ends_at` of a task (`time.monotonic`), or where it is None, rich's estimate."""

    def render(self, task: Task) -> Text:
        ends_at = task.fields["ends_at"]
        left_s = task.time_remaining if ends_at is None else max(ends_at - time.monotonic(), 0)
        return Text("" if left_s is None else f"{clock(left_s)} left")


def metrics_table(evaluation: Evaluation) -> Columns:
    """Lay out AP and AR metrics in tables, side by side if the width suffices."""
    tables = []
    for kind in ("AP", "AR"):
        names = [name for name in evaluation.metrics if name.startswith(kind)]
        if not names:
            continue
        size = math.ceil(len(names) / math.ceil(len(names) / METRICS_PER_TABLE))  # tables of about the same width
        for start in range(0, len(names), size):
            part = names[start : start + size]
            table = _table(*part)
            table.add_row(*(_metric(evaluation.metrics[name]) for name in part))
            tables.append(table)
    return Columns(tables)


def classes_table(evaluation: Evaluation) -> Columns:
    """Lay out one row per class, in as many columns as the width allows. `score` is the threshold of the best F1."""
    rows = list(evaluation.per_class.items())
    tables = []
    for start in range(0, len(rows), CLASSES_PER_COLUMN):
        metrics = ("AP", "AP50", "AR", "F1", "score")
        table = _table("class", "objects", *metrics)
        table.columns[0].justify = "left"
        for name, row in rows[start : start + CLASSES_PER_COLUMN]:
            table.add_row(Text(name), str(row["objects"]), *(_metric(row[metric]) for metric in metrics))
        tables.append(table)
    return Columns(tables)


def watch_command(folder: Path) -> str:
    """The command that shows the curves of the run in `folder`."""
    return f"tensorboard --logdir {shlex.quote(str(shown_path(event_folder(folder))))}"


def event_folder(folder: Path) -> Path:
    """Return the folder of TensorBoard's event files: the run folder, so that its name is the name of the run in TensorBoard.

    A run of an earlier version is continued in its subfolder `tensorboard`.
    """
    earlier = folder / "tensorboard"
    return earlier if earlier.is_dir() else folder


def _table(*names: str) -> Table:
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _metric(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3f}"


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
