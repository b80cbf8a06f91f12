"""Errors caused by the system (disk, data loader workers, other ranks), described in one sentence with a remedy.

Other errors keep their type and traceback.
"""

from __future__ import annotations

import errno
import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fpn_det.runtime import is_lost_rank_error, is_reported_by_main, mark_reported_by_main

REMEDIES = {
    errno.ENOSPC: "Free disk space.",
    errno.EDQUOT: "Free space within the disk quota.",
    errno.EFBIG: "Raise the limit of file sizes (ulimit -f).",
    errno.EROFS: "Choose a folder on a writable file system.",
    errno.EACCES: "Check the write permissions.",
    errno.EPERM: "Check the write permissions.",
    errno.EIO: "Check the disk.",
    errno.ESTALE: "Check the network file system.",
    errno.ENOMEM: "Lower data.num_workers or trainer.batch_size.",
    errno.EMFILE: "Raise the limit of open files (ulimit -n).",
}
WORKER_EXIT = re.compile(r"DataLoader worker \(pid.*?\) (?:is killed by signal: (?P<signal>[^.]*)|exited unexpectedly)")
WORKER_REMEDIES = {
    "Killed": "The system killed it for lack of memory: lower data.num_workers.",
    "Bus error": "The shared memory is full: enlarge /dev/shm (docker run --shm-size=8g), or set data.num_workers=0.",
}
PACKAGE = Path(__file__).parent


def is_user_facing(error: BaseException) -> bool:
    """Return whether the package, or the running script, raised this error itself, so that its message needs no traceback."""
    if error.__traceback__ is None:
        return True
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    script = getattr(sys.modules["__main__"], "__file__", None)
    return raised_in.is_relative_to(PACKAGE) or str(raised_in) == script


class SystemFault(Exception):
    """A failure outside of the program ended the run; the message is complete without a traceback."""


@contextmanager
def translate_system_errors(advice: Callable[[], str] = str) -> Iterator[None]:
    """Raise errors of the system as `SystemFault` within this context.

    An OSError in a background thread that writes files is not printed: the main thread fails with the same error.

    Args:
        advice: called on failure; returns a sentence that is appended to the message, such as how to resume.

    Raises:
        SystemFault: an OSError or RuntimeError that `describe_system_error` recognizes.
    """
    hook = threading.excepthook
    threading.excepthook = lambda failure: None if isinstance(failure.exc_value, OSError) else hook(failure)
    try:
        yield
    except (OSError, RuntimeError) as error:
        sentence = describe_system_error(error)
        if not sentence:
            raise
        fault = SystemFault(f"{sentence} {advice()}".strip())
        if is_reported_by_main(error):
            mark_reported_by_main(fault)
        raise fault from error
    finally:
        threading.excepthook = hook


def describe_system_error(error: Exception) -> str:
    """Describe an error of the system and its remedy; empty for all other errors."""
    if isinstance(error, OSError) and error.errno in REMEDIES:
        path = error.filename or "the files of the run"
        return f"system: expected to write {path}, got: {error.strerror}. {REMEDIES[error.errno]}"
    # the cause of a worker's error contains the signal
    if match := WORKER_EXIT.search(f"{error.__cause__}\n{error}"):
        remedy = WORKER_REMEDIES.get(match["signal"] or "", "Set data.num_workers=0 to see its error.")
        return f"data: expected the data loader workers to keep running, got: {match[0]}. {remedy}"
    if is_lost_rank_error(error):
        reason = str(error).split(". ")[0]
        return (
            f"distributed: expected all ranks to respond, but one has exited or hangs ({reason}). "
            "Its last messages are above and in its rank<k>.log; if there are none, it was killed: check the memory."
        )
    return ""
