"""The console script `fpn-det`. A command's module, and with it torch, is imported only to run that command.

Nothing else of weight is imported at the top, because Ctrl-C is handled from the first call on.
"""

from __future__ import annotations

import os
import select
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

HELP = ("-h", "--help", "help")
WRONG_COMMAND_LINE = 2  # exit code
INTERRUPTED = 128 + signal.SIGINT  # exit code
NO_READER = 141  # exit code, 128 + SIGPIPE


def main() -> None:
    """Run the command that the command line names."""
    words = sys.argv[1:]
    with ending_at_once():
        import difflib

        from fpn_det.cli.help import COMMANDS, overview
    if not words or words[0] in HELP:
        print(overview())
    elif words[0] not in COMMANDS:
        near = difflib.get_close_matches(words[0], COMMANDS, n=1)
        advice = f" Did you mean {near[0]}?" if near else " fpn-det --help lists the commands."
        print(f"fpn-det: expected a command, got '{words[0]}'.{advice}", file=sys.stderr)
        sys.exit(WRONG_COMMAND_LINE)
    else:
        sys.argv = [f"{sys.argv[0]} {words[0]}", *words[1:]]
        run(words[0])


def run(command: str) -> None:
    """Run a command with the words of the command line, or print its help."""
    try:
        with ending_at_once():
            import importlib
            import io

            from fpn_det.cli.help import command_help

            for stream in (sys.stdout, sys.stderr):
                if isinstance(stream, io.TextIOWrapper) and not stream.encoding.lower().startswith("utf"):
                    stream.reconfigure(encoding="ascii", errors="backslashreplace")  # the same bytes in every encoding
            if any(word in HELP[:2] for word in sys.argv[1:]):
                print(command_help(command))
                return
            module = importlib.import_module(f"fpn_det.cli.{command.replace('-', '_')}")
        module.main()
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        if not _has_no_reader(sys.stdout.fileno()):
            raise  # another pipe broke
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at the exit
        sys.exit(NO_READER)


def _has_no_reader(descriptor: int) -> bool:
    """True for a pipe whose reader, such as `head`, has ended."""
    if not hasattr(select, "poll"):  # Windows
        return False
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))


@contextmanager
def ending_at_once() -> Iterator[None]:
    """Let Ctrl-C end the process within this context: an exception would be lost or reported by what is imported."""
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end_at_once)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def _end_at_once(number: int, frame: FrameType | None) -> None:
    os.write(2, b"Interrupted.\n")
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    main()
