"""What a run tells: to the screen, to `log.txt` and to TensorBoard. The only file that knows TensorBoard.

Rank 0 speaks; every other rank writes to a file of its own, `rank{k}.log`. On a terminal there is a progress bar below
the lines; in files and pipes there are lines only, without carriage returns. An undefined value (None) is shown as n/a
and never becomes a point of a curve.
"""

from __future__ import annotations

import datetime
import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.columns import Columns
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from fpn_det.evaluation.coco import Evaluation
from fpn_det.runs.bad_files import listed
from fpn_det.runs.meters import Pace
from fpn_det.runtime import Ranks
from fpn_det.terminal import SafeConsole, printable, replace_unencodable

T = TypeVar("T")

CLASSES_PER_COLUMN = 20
SLOW_DATA = 0.3  # part of the time spent waiting for data that is worth a warning
PLAIN_WIDTH = 140  # of tables where there is no terminal to measure


class RunLog:
    """The voice of one run, on every rank. Use as a context: an exception that ends the run is written down with its trace.

    Args:
        folder: the run's folder, made if it is not there.
        ranks: this process's place.
        screen: where rank 0 prints; by default the standard output.
    """

    def __init__(self, folder: Path, ranks: Ranks, screen: Console | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        name = "log.txt" if ranks.is_main else f"rank{ranks.rank}.log"
        self._file = (folder / name).open("a", encoding="utf-8", errors="backslashreplace", buffering=1)
        self._plain = SafeConsole(file=self._file, width=PLAIN_WIDTH, color_system=None, force_terminal=False)
        # bound to the stream of now: whoever redirects sys.stdout for a while does not catch the progress bar
        width = None if sys.stdout.isatty() else PLAIN_WIDTH
        self._screen = (screen or SafeConsole(file=sys.stdout, width=width)) if ranks.is_main else None
        if self._screen is not None:
            replace_unencodable(self._screen.file)
        self._writer: SummaryWriter | None = None
        columns = (
            TextColumn("{task.description}"),
            BarColumn(None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
        )
        without_bar = self._screen is None or not self._screen.is_terminal
        self._bar = Progress(*columns, console=self._screen, transient=True, expand=True, disable=without_bar)
        self._training: TaskID | None = None
        self._has_warned = False
        self._opened = time.perf_counter()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        with suppress(OSError) if error is not None else nullcontext():  # on a full disk: it has been noticed
            if error is not None:
                self._file.write(printable("".join(traceback.format_exception(kind, error, trace))))
            if self._writer is not None:
                self._writer.close()
            self._file.close()

    def info(self, text: str) -> None:
        """One line (or several) for people."""
        stamp = f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S}"
        self._plain.print(f"{stamp}  {text}", markup=False, highlight=False, soft_wrap=True)
        if self._screen is not None:
            self._screen.print(text, markup=False, soft_wrap=True)

    def begin(self, pace: Pace) -> None:
        """Training starts, or goes on after `pace.first_step`: open TensorBoard and, on a terminal, the progress bar.

        Points that an interrupted run left behind that step are purged from the curves.
        """
        if self._screen is None:
            return
        purge_step = pace.first_step + 1 if pace.first_step else None
        self._writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=purge_step)
        self._training = self._bar.add_task("training", total=pace.total_steps, completed=pace.first_step, note="")
        self._bar.start()

    def advance(self, step: int) -> None:
        """Move the progress bar; cheap enough for every step."""
        if self._training is not None:
            self._bar.update(self._training, completed=step)

    def track(self, items: Iterable[T], title: str) -> Iterator[T]:
        """Go through `items` with a progress bar of their own."""
        self._bar.start()
        task = self._bar.add_task(title, total=len(items) if isinstance(items, Sized) else None, note="")
        for item in items:
            yield item
            self._bar.advance(task)
        self._bar.remove_task(task)

    def train(self, step: int, values: Mapping[str, float], pace: Pace) -> None:
        """One line and one point per curve. Names with a slash (`rois/P2`) are statistics: curves only.

        Throughput is measured here, since the last call.
        """
        values = {**values, **pace.read(step)}
        if bad_files := listed(self.folder):
            values["data/bad_files"] = len(bad_files)
        eta_s = pace.eta_s(step)
        eta = "" if eta_s is None else f"eta {datetime.timedelta(seconds=round(eta_s))}"
        shown = [f"{name} {_number(value)}" for name, value in values.items() if "/" not in name]
        width = len(str(pace.total_steps))
        self.info("  ".join([f"step {step:{width}}/{pace.total_steps}", *shown, eta]))
        if pace.data_share > SLOW_DATA and not self._has_warned and pace.is_warm:
            self._has_warned = True
            self.info(
                f"Training waits for data: {pace.data_share:.0%} of the time since the last line. Raise data.num_workers; "
                "let the device resize (data.resize_on=device) or files be decoded smaller (data.reduced_decoding=train)."
            )
        self.scalars(step, {name if "/" in name else f"train/{name}": value for name, value in values.items()})
        if self._training is not None:
            self._bar.update(self._training, completed=step, note=eta)

    def evaluation(self, step: int, evaluation: Evaluation) -> None:
        """The tables of an evaluation, and a point per metric and class."""
        loss = f", loss {_number(evaluation.metrics['loss'] or 0)}" if "loss" in evaluation.metrics else ""
        self.info(f"evaluation at step {step}: {evaluation.num_images} images in {evaluation.seconds:.1f} s{loss}")
        self.show(metrics_table(evaluation))
        self.show(classes_table(evaluation))
        for remark in evaluation.remarks():
            self.info(remark)
        classes = {f"val_class_AP/{name}": row["AP"] for name, row in evaluation.per_class.items()}
        metrics = {f"val/{name}": value for name, value in evaluation.metrics.items()}
        self.scalars(step, metrics | classes | evaluation.statistics)

    def scalars(self, step: int, values: Mapping[str, float | None]) -> None:
        """Points for TensorBoard, on the disk at once; undefined values make none."""
        if self._writer is None:
            return
        for name, value in values.items():
            if value is not None:
                self._writer.add_scalar(name, value, step)
        self._writer.flush()  # a killed run goes on from its last checkpoint, and so should its curves

    def hparams(self, settings: Mapping[str, Any], metrics: Mapping[str, float | None]) -> None:
        """The settings beside what they led to, for TensorBoard's HParams; among the other curves, not in a run of their own."""
        if self._writer is None:
            return
        plain = {
            name: value if isinstance(value, bool | int | float | str) else str(value)
            for name, value in settings.items()
        }
        reached = {f"val/{name}": value for name, value in metrics.items() if value is not None}
        writer = self._writer._get_file_writer()
        for summary in hparams(plain, reached):
            writer.add_summary(summary)

    def picture(self, step: int, name: str, picture: NDArray[np.uint8]) -> None:
        """A picture for TensorBoard, [h, w, 3] RGB."""
        if self._writer is not None:
            self._writer.add_image(name, picture, step, dataformats="HWC")

    def summary(self, metric: str, best: float | None, best_step: int, evaluation: Evaluation) -> None:
        """The last words: what came out (of the last evaluation), where it lies, and what to type next."""
        self.info("last evaluation")
        self.show(metrics_table(evaluation))
        python, folder = shown_path(Path(sys.executable)), shown_path(self.folder)
        seconds = datetime.timedelta(seconds=round(time.perf_counter() - self._opened))
        self.info(
            f"Done in {seconds}. Best {metric} {_metric(best)} at step {best_step}.\n"
            f"  run folder   {folder}\n"
            f"  TensorBoard  {python} -m tensorboard.main --logdir {folder / 'tensorboard'}\n"
            f"  next         {python} tools/eval.py run={folder}"
        )

    def show(self, picture: RenderableType) -> None:
        """A table, for people."""
        self._plain.print(picture)
        if self._screen is not None:
            self._screen.print(picture)


def metrics_table(evaluation: Evaluation) -> Columns:
    """The headline numbers: precision, then recall, side by side if they fit."""
    tables = []
    for kind in ("AP", "AR"):
        row = {name: value for name, value in evaluation.metrics.items() if name.startswith(kind)}
        if not row:
            continue
        table = _table(*row)
        table.add_row(*[_metric(value) for value in row.values()])
        tables.append(table)
    return Columns(tables)


def classes_table(evaluation: Evaluation) -> Columns:
    """A row per class, in as many columns as fit."""
    rows = list(evaluation.per_class.items())
    tables = []
    for start in range(0, len(rows), CLASSES_PER_COLUMN):
        table = _table("class", "objects", "AP", "AP50", "AR")
        table.columns[0].justify = "left"
        for name, row in rows[start : start + CLASSES_PER_COLUMN]:
            table.add_row(Text(name), str(row["objects"]), _metric(row["AP"]), _metric(row["AP50"]), _metric(row["AR"]))
        tables.append(table)
    return Columns(tables)


def shown_path(path: Path) -> Path:
    """A path as somebody would type it here: relative if it lies below the working directory."""
    path, here = path.absolute(), Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def _table(*names: str) -> Table:
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _metric(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3f}"


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
