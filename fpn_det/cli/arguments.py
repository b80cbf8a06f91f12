"""The command line of commands that do not compose a config: `name=value` words, fitted to a dataclass.

The words are those of `fpn-det train`: `count=3`, `only=[train,loader]`, `path="a=b.pth"`, `value=null`. Where a string is
expected, what follows the first `=` is taken literally, so that most paths need no quotes.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from fpn_det.cli.help import script_help
from fpn_det.cli.launch import USER_ERRORS, end_with
from fpn_det.composition import parse_words
from fpn_det.errors import translate_system_errors
from fpn_det.schema import check_names, fit

S = TypeVar("S")


def run_command(command: Callable[[S], object], schema: type[S], positional: str | None = None) -> None:
    """Fit the words of the command line to `schema` and run `command` with the result; --help of a script shows its options.

    Exit codes are those of `launch`: 2 with one sentence for wrong input, 1 with one sentence for a failure of the system.

    Args:
        command: the work.
        schema: dataclass of its options.
        positional: name of the option that a word without `=` sets.
    """
    if not {"-h", "--help"}.isdisjoint(sys.argv[1:]):
        print(
            script_help(
                sys.modules[schema.__module__].__doc__ or "", f"tools.{Path(sys.argv[0]).stem}.{schema.__name__}"
            )
        )
        return
    try:
        with translate_system_errors():
            command(fit_words(sys.argv[1:], schema, positional))
    except USER_ERRORS as error:
        end_with(error)


def fit_words(words: Sequence[str], schema: type[S], positional: str | None = None) -> S:
    """The options that `name=value` words set, as a `schema` dataclass; the others have their defaults.

    A field `overrides` collects the words with a dotted name, which are settings of a training run.

    Args:
        words: of the command line.
        schema: dataclass of the options.
        positional: name of the option that a word without `=` sets.

    Raises:
        ValueError: a name is unknown or missing, or a value has another type.
    """
    hints = get_type_hints(schema, include_extras=True)
    given: dict[str, Any] = {}
    overrides = []
    for word in words:
        name, separator, text = word.partition("=")
        if not separator and positional is not None and not word.startswith("-"):
            name, text = positional, word
        elif not separator or word.startswith("-"):
            raise ValueError(f"command line: expected name=value, got '{word}'. --help shows the options.")
        if "overrides" in hints and "." in name:
            overrides.append(word)
            continue
        check_names([name], (item for item in hints if item != "overrides"), "")
        given[name] = parse_value(name, text, hints[name])
    if "overrides" in hints:
        given["overrides"] = overrides
    return fit(given, schema, "", ())


def parse_value(name: str, text: str, hint: Any) -> Any:
    """The plain value that `text` denotes where `hint` is expected."""
    kinds = list(_alternatives(hint))
    takes_list = any(get_origin(kind) in (list, tuple) for kind in kinds)
    is_quoted = text.startswith(('"', "'")) or (takes_list and text.startswith("["))
    if str in kinds and text != "null" and not is_quoted:
        return text
    (override,) = parse_words([f"{name}={text}"])
    if override.is_sweep_override():  # first,second
        return [_plain(item) for item in override.sweep_iterator()]
    value = override.value()
    return value if isinstance(value, list) or value is None or not takes_list else [value]


def _alternatives(hint: Any) -> Iterable[Any]:
    """The types that a hint admits; `str` for a literal string."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        for option in get_args(hint):
            yield from _alternatives(option)
    elif origin is Annotated:
        yield from _alternatives(get_args(hint)[0])
    elif origin is Literal:
        yield from (type(option) for option in get_args(hint))
    else:
        yield hint


def _plain(text: str) -> Any:
    """An element of `first,second`, which Hydra gives as text."""
    return parse_words([f"item={text}"])[0].value()
