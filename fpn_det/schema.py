"""Typed settings: fit a tree of plain values, as YAML gives it, to dataclasses and constructors, and build objects from it.

A mapping with `_target_` is a node: it names a class and holds its arguments. Names, types and defaults of both kinds
come from the declarations that the code itself reads, so there is no second list of settings that could disagree.
`complete` adds the declared defaults of all that a tree leaves out, `fit` checks and converts, `build` makes the objects.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import inspect
import math
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from fpn_det.errors import is_user_facing

SCALARS = {bool: "true or false", int: "a whole number", float: "a number", str: "a string", type(None): "null"}
NODE_KEYS = ("_target_", "_partial_")
Node = dict[str, Any]  # a class by name (`_target_`) and its arguments

# What albumentations' checks of arguments add to their sentence.
PYDANTIC = re.compile(r"\d+ validation errors? for InitSchema | \[type=.*?\]| For further information visit \S+")


@dataclasses.dataclass(frozen=True)
class Range:
    """The second half of an `Annotated` hint: finite numbers from `low` to `high`, or only those `above` or `below` them."""

    low: float
    high: float = math.inf
    above: bool = False
    below: bool = False

    def __contains__(self, value: float) -> bool:
        inside = self.low <= value <= self.high and math.isfinite(value)
        return inside and not (self.above and value == self.low) and not (self.below and value == self.high)

    def __str__(self) -> str:
        low = f"more than {self.low:g}" if self.above else f"at least {self.low:g}"
        if self.high == math.inf:
            return low
        if self.above or self.below:
            return f"{low} and {'less than' if self.below else 'at most'} {self.high:g}"
        return f"between {self.low:g} and {self.high:g}"


Count = Annotated[int, Range(1)]
CountOrZero = Annotated[int, Range(0)]
Amount = Annotated[float, Range(0)]
Positive = Annotated[float, Range(0, above=True)]
Fraction = Annotated[float, Range(0, 1)]
Share = Annotated[float, Range(0, 1, above=True, below=True)]  # a part that is neither nothing nor all
Part = Annotated[float, Range(0, 1, below=True)]  # a part that is not all
Decay = Annotated[float, Range(0, 1, below=True)]  # how much of the past stays


def fit(value: Any, hint: Any, where: str, packages: Sequence[str]) -> Any:
    """`value` as the type that `hint` asks for: mappings become dataclasses, whole numbers floats where those are asked for.

    A hint that says nothing about plain values (Any, a class, a callable) admits all; nodes are checked wherever they are.

    Args:
        value: scalars, lists and mappings with text keys.
        hint: a type hint.
        where: the dotted name of the value, for messages.
        packages: nodes may name classes of these only.

    Raises:
        ValueError: a name is unknown or a value has another type, with the nearest name or what was expected.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if _is_node(value):
        return _fit_node(value, hint, where, packages)
    if origin is Annotated:
        fitted, limits = fit(value, arguments[0], where, packages), arguments[1]
        if fitted not in limits:
            raise ValueError(f"{where}: expected {describe(hint)}, got {value!r}.")
        return fitted
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _fit_record(value, hint, where, packages)
    if is_union(hint):
        return _fit_union(value, hint, where, packages)
    if origin is Literal:
        if value not in arguments:
            raise ValueError(
                f"{where}: expected one of {listed(arguments)}, got {value!r}.{did_you_mean(value, arguments)}"
            )
        return value
    if hint in SCALARS:
        if type(value) is int and hint is float:
            return float(value)
        if value is None and hint is not type(None):
            raise ValueError(f"{where}: expected {describe(hint)}, got null. Say {where}=... on the command line.")
        if type(value) is not hint:
            raise ValueError(f"{where}: expected {describe(hint)}, got {value!r}.")
        return value
    if origin is tuple and arguments[1:] != (...,):
        if not isinstance(value, list) or len(value) != len(arguments):
            raise ValueError(f"{where}: expected {describe(hint)}, got {value!r}.")
        pairs = enumerate(zip(value, arguments, strict=True))
        return tuple(fit(item, kind, f"{where}.{i}", packages) for i, (item, kind) in pairs)
    if origin in (list, tuple, Sequence):
        if not isinstance(value, list):
            raise ValueError(f"{where}: expected {describe(hint)}, got {value!r}.")
        items = (fit(item, arguments[0], f"{where}.{i}", packages) for i, item in enumerate(value))
        return tuple(items) if origin is tuple else list(items)
    if _is_made(hint):
        raise ValueError(f"{where}: expected {describe(hint)}, got {'null' if value is None else repr(value)}.")
    if isinstance(value, Mapping):
        kind = arguments[1] if origin in (dict, Mapping) else Any
        return {key: fit(item, kind, f"{where}.{key}", packages) for key, item in value.items()}
    if origin in (dict, Mapping):
        raise ValueError(f"{where}: expected names with values, got {value!r}.")
    if isinstance(value, list):
        return [fit(item, Any, f"{where}.{i}", packages) for i, item in enumerate(value)]
    return value


def _is_made(hint: Any) -> bool:
    """True for objects that only a node can describe: instances of a class, and callables."""
    return get_origin(hint) is Callable or (
        inspect.isclass(hint) and get_origin(hint) is None and hint not in (object, Any, dict, list)
    )


def _fit_record(value: Any, record: type, where: str, packages: Sequence[str]) -> Any:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: expected its settings by name, got {value!r}.")
    hints = get_type_hints(record, include_extras=True)
    required = [field.name for field in dataclasses.fields(record) if not _has_default(field)]
    check_names(value, hints, where)
    _check_complete(value, required, where)
    given = {name: hint for name, hint in hints.items() if name in value}
    return record(**{name: fit(value[name], hint, join(where, name), packages) for name, hint in given.items()})


def _has_default(field: dataclasses.Field) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def _check_kind(node: Mapping[str, Any], target: type, hint: Any, where: str) -> None:
    """Refuse a node that makes another kind of object than `hint` asks for: an instance, or a class with arguments."""
    partial = node.get("_partial_", False)
    if not isinstance(partial, bool):
        raise ValueError(f"{join(where, '_partial_')}: expected true or false, got {partial!r}.")
    options = [option for option in (get_args(hint) if is_union(hint) else (hint,)) if option is not type(None)]
    makers = [option for option in options if get_origin(option) is Callable]
    kinds = [get_args(option)[1] for option in makers] or options
    if makers and not partial:
        raise ValueError(f"{join(where, '_partial_')}: expected true: other arguments follow from other settings.")
    classes = [kind for kind in kinds if inspect.isclass(kind) and get_origin(kind) is None and kind is not object]
    if len(classes) < len(kinds) or any(getattr(kind, "_is_protocol", False) for kind in classes):
        return
    if not makers and partial:
        raise ValueError(f"{join(where, '_partial_')}: expected false, got true. Leave it out.")
    if not issubclass(target, tuple(classes)):
        names = listed(kind.__name__ for kind in classes)
        raise ValueError(f"{join(where, '_target_')}: expected a class of {names}, got {target.__name__!r}.")


def _fit_node(node: Mapping[str, Any], hint: Any, where: str, packages: Sequence[str]) -> Node:
    """The node with its arguments fitted to the signature of the class that it names."""
    target = locate(node["_target_"], join(where, "_target_"), packages)
    _check_kind(node, target, hint, where)
    parameters = _parameters(target)
    given = {name: item for name, item in node.items() if name not in NODE_KEYS}
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    named = {name: parameter for name, parameter in parameters.items() if parameter.kind not in variadic}
    required = [name for name, parameter in named.items() if parameter.default is parameter.empty]
    if not node.get("_partial_"):
        _check_complete(given, required, where)
    elif deduced := [name for name in required if not isinstance(given.get(name), Mapping | None)]:
        raise ValueError(f"{join(where, deduced[0])}: follows from other settings and cannot be set. Leave it out.")
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        check_names(given, (name for name in named if name in given or name not in required), where)
    hints = {name: _hint_of(parameter) for name, parameter in named.items()}
    fitted = {name: fit(item, hints.get(name, Any), join(where, name), packages) for name, item in given.items()}
    return {name: node[name] for name in NODE_KEYS if name in node} | fitted


def _hint_of(parameter: inspect.Parameter) -> Any:
    """The hint of a parameter; Any if it has none or one that cannot be evaluated."""
    hint = parameter.annotation
    return Any if isinstance(hint, str) or hint is parameter.empty else hint


def complete(value: Any, hint: Any, packages: Sequence[str]) -> Any:
    """`value` with the declared defaults of everything it leaves out, as far as records and nodes can be told apart.

    Nothing is checked or converted: that is the work of `fit`.
    """
    if _is_node(value):
        return _complete_node(value, packages)
    record = next((item for item in (hint, *get_args(hint)) if dataclasses.is_dataclass(item)), None)
    if isinstance(value, Mapping) and record is not None:
        hints = get_type_hints(record, include_extras=True)
        given = {name: complete(item, hints.get(name, Any), packages) for name, item in value.items()}
        for item in dataclasses.fields(record):
            if item.name not in given and _has_default(item):
                given[item.name] = complete(_default_of(item), hints[item.name], packages)
        return given
    if isinstance(value, Mapping):
        return {name: complete(item, Any, packages) for name, item in value.items()}
    return value


def _default_of(item: dataclasses.Field) -> Any:
    value = item.default if item.default is not dataclasses.MISSING else item.default_factory()  # type: ignore[operator]
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else as_plain(value)  # type: ignore[arg-type]


def _complete_node(node: Mapping[str, Any], packages: Sequence[str]) -> Node:
    try:
        parameters = _parameters(locate(node["_target_"], "", packages))
    except ValueError:
        return dict(node)  # refused by `fit`, with its place
    given = dict(node)
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty:
            continue
        default = as_plain(parameter.default)
        if name not in given:
            given[name] = default
        elif _is_node(default) and isinstance(given[name], Mapping) and "_target_" not in given[name]:
            given[name] = default | given[name]  # arguments of the default class
    return {name: complete(item, Any, packages) for name, item in given.items()}


def _is_node(value: Any) -> bool:
    return isinstance(value, Mapping) and "_target_" in value


def missing_names(value: Any, record: type, where: str = "") -> list[str]:
    """Dotted names of the fields of `record`, and of records within it, that the mapping `value` does not have."""
    missing = []
    hints = get_type_hints(record, include_extras=True)
    for name, hint in hints.items():
        if name not in value:
            missing.append(join(where, name))
        elif dataclasses.is_dataclass(hint) and isinstance(value[name], Mapping):
            missing += missing_names(value[name], hint, join(where, name))  # type: ignore[arg-type]
    return missing


def as_plain(default: Any) -> Any:
    """A default of a signature as YAML would state it.

    A class is a `_partial_` node, a `functools.partial` of a class one with arguments, and an instance of a dataclass
    the node that makes it. Tuples are lists; anything else is taken as it is.
    """
    if isinstance(default, functools.partial):
        return _node_of(default.func, default.keywords) | {"_partial_": True}
    if inspect.isclass(default):
        return _node_of(default, {}) | {"_partial_": True}
    if dataclasses.is_dataclass(default):
        arguments = {field.name: getattr(default, field.name) for field in dataclasses.fields(default) if field.init}
        return _node_of(type(default), arguments)
    if isinstance(default, list | tuple):
        return [as_plain(item) for item in default]
    if isinstance(default, Mapping):
        return {name: as_plain(item) for name, item in default.items()}
    return default


def _node_of(target: Any, arguments: Mapping[str, Any]) -> Node:
    name = f"{target.__module__}.{target.__qualname__}"
    return {"_target_": name, **{key: as_plain(value) for key, value in arguments.items()}}


def build(node: Any, where: str) -> Any:
    """The object that a fitted node describes; lists and mappings of nodes are built item by item.

    Only classes that `fit` has admitted are called, with plain values: nothing in a string is interpreted.

    Args:
        node: of a tree that `fit` returned.
        where: its dotted name, for messages.

    Raises:
        ValueError: it names no class, or the class refuses its arguments.
    """
    if not _is_node(node):
        raise ValueError(f"{where}: expected a class by name (_target_), got none.")
    module, _, name = node["_target_"].rpartition(".")
    target = getattr(importlib.import_module(module), name)
    arguments = {key: _build_within(item, join(where, key)) for key, item in node.items() if key not in NODE_KEYS}
    if node.get("_partial_"):
        return functools.partial(target, **arguments)
    try:
        return target(**arguments)
    except Exception as error:
        reason = PYDANTIC.sub("", " ".join(str(error).split()))
        if isinstance(error, ValueError) and is_user_facing(error):
            raise ValueError(_placed(reason, where)) from None
        raise ValueError(f"{where}: {node['_target_']} refuses its arguments: {reason}.") from None


def _placed(reason: str, where: str) -> str:
    """A refusal with its full dotted name: classes name their own settings only (`backbone.depth: ...`)."""
    parent, _, last = where.rpartition(".")
    if reason.startswith(where.split(".")[0]):
        return reason
    return join(parent, reason) if reason.startswith((f"{last}.", f"{last}:")) else f"{where}: {reason}"


def _build_within(value: Any, where: str) -> Any:
    if isinstance(value, Mapping):
        if "_target_" in value:
            return build(value, where)
        return {key: _build_within(item, join(where, str(key))) for key, item in value.items()}
    if isinstance(value, list):
        return [_build_within(item, f"{where}.{number}") for number, item in enumerate(value)]
    return value


def _fit_union(value: Any, hint: Any, where: str, packages: Sequence[str]) -> Any:
    refusals = []
    for option in get_args(hint):
        try:
            return fit(value, option, where, packages)
        except ValueError as refusal:
            refusals.append(refusal)
    structured = [option for option in get_args(hint) if option not in SCALARS]
    if len(structured) == 1 and isinstance(value, list | Mapping):
        raise refusals[get_args(hint).index(structured[0])]  # it is that option, with a mistake inside
    raise ValueError(f"{where}: expected {describe(hint)}, got {value!r}.")


def locate(name: Any, where: str, packages: Sequence[str]) -> type:
    """The class with this dotted name. Nothing outside `packages` is even imported.

    Raises:
        ValueError: it is not one of theirs, or does not exist.
    """
    if not isinstance(name, str) or not _belongs(name, packages):
        raise ValueError(
            f"{where}: expected a class of {listed(packages)}, got {name!r}. "
            f"To admit classes of your own, say allow_targets=[your_package] on the command line."
        )
    module_name, _, class_name = name.rpartition(".")
    try:
        target = getattr(importlib.import_module(module_name), class_name)
    except ImportError as error:
        raise ValueError(f"{where}: expected the name of a class, got {name!r}: {error}.") from None
    except AttributeError:
        names = [key for key, item in vars(importlib.import_module(module_name)).items() if inspect.isclass(item)]
        raise ValueError(
            f"{where}: {module_name} has no class '{class_name}'.{did_you_mean(class_name, names)}"
        ) from None
    if not inspect.isclass(target) or not _belongs(f"{target.__module__}.", packages):
        raise ValueError(f"{where}: expected a class of {listed(packages)}, got {name!r}.")
    return target


def is_union(hint: Any) -> bool:
    """True for `A | B` and `Optional[A]`."""
    return get_origin(hint) in (Union, types.UnionType)


def _belongs(name: str, packages: Sequence[str]) -> bool:
    return any(name.startswith(package + ".") for package in packages)


def _parameters(target: type) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(target, eval_str=True).parameters
    except NameError:  # a hint names what is imported for type checkers only
        return inspect.signature(target).parameters


def _check_complete(given: Mapping[str, Any], required: Iterable[str], where: str) -> None:
    if missing := [name for name in required if name not in given]:
        words = " ".join(f"{join(where, name)}=..." for name in missing)
        raise ValueError(f"{where or 'config'}: expected a value for {', '.join(missing)}, got none. Set {words}")


def check_names(given: Iterable[str], known: Iterable[str], where: str) -> None:
    """Refuse a name that is not known, and suggest the nearest one."""
    known = list(known)
    for name in given:
        if name not in known:
            nearest = did_you_mean(name, known, where) or f" Known here: {', '.join(known)}."
            raise ValueError(f"{join(where, name)}: there is no setting of that name.{nearest}")


def did_you_mean(name: Any, known: Iterable[Any], where: str = "") -> str:
    """' Did you mean x?' with the nearest known name, or nothing if none is near."""
    near = difflib.get_close_matches(str(name), [str(item) for item in known], n=1)
    return f" Did you mean {join(where, near[0])}?" if near else ""


def join(where: str, name: str) -> str:
    """A dotted name, one step deeper."""
    return f"{where}.{name}" if where else name


def listed(items: Iterable[Any]) -> str:
    """`a, b or c`."""
    texts = [str(item) for item in items]
    return " or ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 1 else texts)


def describe(hint: Any) -> str:
    """A type hint in words."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return listed(dict.fromkeys(describe(option) for option in arguments))
    if origin is Literal:
        return listed(arguments)
    if origin is Annotated:
        return f"{describe(arguments[0])} {arguments[1]}"
    if origin is tuple and arguments[1:] != (...,):
        return f"a list of {len(arguments)} values"
    if origin in (list, tuple, Sequence):
        return f"a list, each item {describe(arguments[0])}"
    if dataclasses.is_dataclass(hint):
        return "{" + ", ".join(f"{field.name}: ..." for field in dataclasses.fields(hint)) + "}"
    if _is_made(hint) and hint not in SCALARS:
        kind = get_args(hint)[1] if origin is Callable else hint
        return f"a class by name ({getattr(kind, '__name__', 'any')}, as _target_)"
    return SCALARS.get(hint, getattr(hint, "__name__", str(hint)))
