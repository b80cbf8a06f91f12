"""Settings as the source and the YAML files declare them, read without importing anything.

Help is printed before torch is imported. So types, defaults and meanings are taken from the syntax tree: of a dataclass
from its fields and their comments, of another class from its constructor and the `Args` of its docstring.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from fpn_det.locations import CONFIGS, PACKAGE

PACKAGE_HEADER = re.compile(r"#\s*@package\s+(\S+)")


@dataclass(frozen=True)
class Declaration:
    """One setting.

    Attributes:
        name: of the field or argument.
        type: source text of its annotation.
        default: source text of its default; None if it has none.
        meaning: its comment or the line of the docstring.
    """

    name: str
    type: str
    default: str | None
    meaning: str

    def describe(self) -> str:
        """The meaning in the words of a command line; the options where the type lists them and the meaning is missing."""
        options = re.search(r"Literal\[([^\]]*)\]", self.type)
        meaning = self.meaning or (options[1].replace("'", "") if options else "")
        return re.sub(r"\bNone\b", "null", meaning)


@cache
def declarations(class_path: str) -> dict[str, Declaration]:
    """Fields or constructor arguments of a class of this package, or of a script of the checkout, by name, those of its base classes first.

    Args:
        class_path: `fpn_det.module.Class` or `tools.script.Class`; an unknown one has no declarations.
    """
    module, _, class_name = class_path.rpartition(".")
    file = PACKAGE.parent / (module.replace(".", "/") + ".py")
    if not module.startswith(("fpn_det.", "tools.")) or not file.is_file():
        return {}
    source = file.read_text(encoding="utf-8")
    tree = ast.parse(source)
    node = next((item for item in tree.body if isinstance(item, ast.ClassDef) and item.name == class_name), None)
    if node is None:
        return {}
    found: dict[str, Declaration] = {}
    for base in node.bases:
        if isinstance(base, ast.Name):
            found |= declarations(_resolve(base.id, module, tree))
    is_dataclass = any("dataclass" in ast.unparse(item) for item in node.decorator_list)
    documented = _args_section(ast.get_docstring(node) or "")
    for item in _fields(node, source.splitlines()) if is_dataclass else _arguments(node):
        inherited = found[item.name].meaning if item.name in found else ""
        meaning = item.meaning or documented.get(item.name, "") or inherited
        found[item.name] = replace(item, meaning=_followed(item.name, meaning, module, tree))
    return found


def _followed(name: str, meaning: str, module: str, tree: ast.Module) -> str:
    """`meaning`; where it is ``see `ResNet`.``, that of the argument of the same name there."""
    reference = re.match(r"see `(\w+)`", meaning)
    there = declarations(_resolve(reference[1], module, tree)).get(name) if reference else None
    return there.meaning if there else meaning


def _resolve(name: str, module: str, tree: ast.Module) -> str:
    """Full name of a class that a module uses."""
    for item in tree.body:
        if isinstance(item, ast.ImportFrom) and any((alias.asname or alias.name) == name for alias in item.names):
            original = next(alias.name for alias in item.names if (alias.asname or alias.name) == name)
            return f"{item.module}.{original}"
    return f"{module}.{name}"


def class_of_field(class_path: str, name: str) -> str:
    """Full name of the class that annotates a field, such as `DataConfig` of `TrainConfig.data`."""
    module, _, class_name = class_path.rpartition(".")
    tree = ast.parse((PACKAGE.parent / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8"))
    node = next((item for item in tree.body if isinstance(item, ast.ClassDef) and item.name == class_name), None)
    for item in node.body if node else ():
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and item.target.id == name:
            return _resolve(ast.unparse(item.annotation).split(" ")[0], module, tree)
    bases = node.bases if node else ()
    return next(
        (found for base in bases if isinstance(base, ast.Name)
         and (found := class_of_field(_resolve(base.id, module, tree), name))),
        "",
    )  # fmt: skip


def _fields(node: ast.ClassDef, lines: list[str]) -> Iterator[Declaration]:
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            end = item.end_lineno or item.lineno
            comments = [_comment(line) for line in lines[item.lineno - 1 : end]]
            default = None if item.value is None else _without_factory(item.value)
            meaning = " ".join(comment for comment in comments if comment) or _comment_above(lines, item.lineno - 1)
            yield Declaration(item.target.id, ast.unparse(item.annotation), default, meaning)


def _comment_above(lines: list[str], end: int) -> str:
    start = end
    while lines[start - 1].lstrip().startswith("#"):
        start -= 1
    return " ".join(line.lstrip("# ") for line in lines[start:end])


def _comment(line: str) -> str:
    """The comment at the end of a line of code, without words for mypy; strings with a `#` are skipped."""
    found = re.match(r"""(?:[^#"']|"[^"]*"|'[^']*')*#\s?(?:type: ignore\S*\s*#?\s?)?(.*)$""", line)
    return found[1].strip() if found else ""


def _without_factory(value: ast.expr) -> str:
    factory = next((item.value for item in getattr(value, "keywords", ()) if item.arg == "default_factory"), None)
    if factory is None:
        return _default_word(value)
    return {"list": "[]", "dict": "{}"}.get(ast.unparse(factory), "")


def _arguments(node: ast.ClassDef) -> Iterator[Declaration]:
    function = next((item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__"), None)
    if function is None:
        return
    given = function.args
    positional = given.args[1:]
    missing = len(positional) - len(given.defaults)
    defaults = [None] * missing + list(given.defaults) + list(given.kw_defaults)
    for argument, default in zip([*positional, *given.kwonlyargs], defaults, strict=True):
        hint = "" if argument.annotation is None else ast.unparse(argument.annotation)
        text = None if default is None else _default_word(default)
        yield Declaration(argument.arg, hint, text, "")


def _args_section(docstring: str) -> dict[str, str]:
    """The text about each name in the `Args` or `Attributes` of a docstring; `a, b: text` is about both."""
    section = re.split(r"^(?:Args|Attributes):\n", docstring, maxsplit=1, flags=re.MULTILINE)[-1]
    if section == docstring:
        return {}
    found: dict[str, str] = {}
    names: list[str] = []
    for line in section.splitlines():
        if line and not line.startswith(" "):
            break
        if start := re.match(r"    (\w+(?:, \w+)*): (.*)", line):
            names = start[1].split(", ")
            found |= dict.fromkeys(names, start[2])
        elif line.strip():
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
    return found


@cache
def default_settings() -> dict[str, Any]:
    """The tree that the YAML files of `fpn-det train` give without any word on the command line."""
    tree: dict[str, Any] = {}
    _merge_file(tree, CONFIGS / "train.yaml", "")
    return tree


def _merge_file(tree: dict[str, Any], file: Path, package: str) -> None:
    if not file.is_file():
        return
    text = file.read_text(encoding="utf-8")
    if header := PACKAGE_HEADER.match(text):
        package = "" if header[1] == "_global_" else header[1]
    content = yaml.safe_load(text) or {}
    for entry in content.pop("defaults", []):
        for group, option in entry.items() if isinstance(entry, dict) else ():
            if option is not None and not group.startswith("override "):
                folder = CONFIGS / group if (CONFIGS / group).is_dir() else file.parent / group
                _merge_file(tree, folder / f"{option}.yaml", group)
        if isinstance(entry, str) and entry != "_self_":
            _merge_file(tree, file.parent / f"{entry}.yaml", package)
    node = tree
    for part in package.split(".") if package else ():
        node = node.setdefault(part, {})
    _merge(node, content)


def _merge(node: dict[str, Any], content: dict[str, Any]) -> None:
    for name, value in content.items():
        if isinstance(value, dict) and isinstance(node.get(name), dict):
            _merge(node[name], value)
        else:
            node[name] = value


def describe_setting(name: str, root: str = "fpn_det.training.config.TrainConfig") -> Declaration | None:
    """Type, default and meaning of the setting with a dotted name; None if it is not declared.

    The default is that of `fpn-det train` without an experiment: of the YAML files, otherwise of the source.
    """
    node: Any = default_settings()
    class_path = root
    *sections, last = name.split(".")
    for section in sections:
        node = node.get(section) if isinstance(node, dict) else None
        target = node.get("_target_") if isinstance(node, dict) else None
        class_path = target or class_of_field(class_path, section)
        if not class_path:
            return None
    found = declarations(class_path).get(last)
    if found is None:
        return None
    default = node[last] if isinstance(node, dict) and last in node else ...
    text = found.default if default is ... else as_word(default)
    return Declaration(name, found.type, text, found.meaning)


def _default_word(value: ast.expr) -> str:
    """The default of a field or argument as it is written on a command line; source text if it is not a plain value."""
    try:
        return as_word(ast.literal_eval(value))
    except ValueError:
        return ast.unparse(value)


def as_word(value: Any) -> str:
    """A plain value as it is written on a command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return "[" + ",".join(map(as_word, value)) + "]" if isinstance(value, list | tuple) else str(value)


def experiments() -> dict[str, str]:
    """The first sentence of the comment of each experiment, by name."""
    folder = CONFIGS / "experiment"
    found = {}
    for file in sorted(folder.rglob("*.yaml")):
        comment = []
        for line in file.read_text(encoding="utf-8").splitlines():
            if not line.startswith("#"):
                break
            if not PACKAGE_HEADER.match(line):
                comment.append(line.lstrip("# "))
        found[file.relative_to(folder).with_suffix("").as_posix()] = _first_sentence(" ".join(comment))
    return dict(sorted(found.items(), key=lambda item: (item[0].count("/"), item[0])))


def _first_sentence(text: str) -> str:
    return re.split(r"\.\s+(?=[A-Z])", text, maxsplit=1)[0].rstrip(".:")
