from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest

from fpn_det.schema import Range, complete, describe, fit, locate


@dataclass(frozen=True)
class Inner:
    size: tuple[int, int]


@dataclass(frozen=True)
class Outer:
    rate: float
    mode: Literal["fast", "slow"]
    count: Annotated[int, Range(1)]
    names: list[str] | None
    inner: Inner | None
    node: dict[str, Any]


class Part:
    def __init__(self, width: int, ratios: Sequence[float] = (), inner: Callable[..., Part] | None = None) -> None:
        self.width = width


class Open:
    def __init__(self, width: int, *args: Any, **kwargs: Any) -> None:
        self.width = width


GOOD = {"rate": 1, "mode": "fast", "count": 1, "names": ["a"], "inner": {"size": [1, 2]}, "node": {}}
PART = {"_target_": f"{__name__}.Part"}


def fitted(**changes: Any) -> Outer:
    return fit({**GOOD, **changes}, Outer, "", (__name__,))


def test_fit_makes_dataclasses_floats_and_tuples():
    assert fitted() == Outer(1.0, "fast", 1, ["a"], Inner((1, 2)), {})
    assert type(fitted().rate) is float
    assert fitted(inner=None, names=None).inner is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rat": 1}, "rat: there is no setting of that name. Did you mean rate?"),
        ({"zzz": 1}, "zzz: there is no setting of that name. Known here: rate, mode"),
        ({"rate": "fast"}, "rate: expected a number, got 'fast'."),
        ({"rate": True}, "rate: expected a number, got True."),
        ({"rate": None}, "rate: expected a number, got null."),
        ({"mode": "fats"}, "mode: expected one of fast or slow, got 'fats'. Did you mean fast?"),
        ({"count": 0}, "count: expected a whole number at least 1, got 0."),
        ({"count": 1.5}, "count: expected a whole number, got 1.5."),
        ({"names": [1]}, "names.0: expected a string, got 1."),
        ({"names": "a"}, "names: expected a list, each item a string or null, got 'a'."),
        ({"inner": {"size": [1]}}, "inner.size: expected a list of 2 values, got [1]."),
        ({"inner": {"sizes": [1]}}, "inner.sizes: there is no setting of that name. Did you mean inner.size?"),
        ({"inner": {}}, "inner: expected a value for size, got none."),
        ({"node": 3}, "node: expected names with values, got 3."),
    ],
)
def test_fit_refuses_and_names_the_place(changes, words):
    with pytest.raises(ValueError) as refusal:
        fitted(**changes)
    assert words in str(refusal.value)


def test_fit_refuses_a_missing_value():
    with pytest.raises(ValueError, match="config: expected a value for rate, got none"):
        fit({name: value for name, value in GOOD.items() if name != "rate"}, Outer, "", ())


@pytest.mark.parametrize(
    ("node", "words"),
    [
        ({"width": 3, "rations": [1]}, "node.rations: there is no setting of that name. Did you mean node.ratios?"),
        ({"width": "3"}, "node.width: expected a whole number, got '3'."),
        ({}, "node: expected a value for width, got none. Set node.width=..."),
        ({"_partial_": True, "width": 3}, "node.width: follows from other settings and cannot be set. Leave it out."),
        ({"width": 3, "inner": {**PART, "_partial_": True, "ratio": []}}, "node.inner.ratio: there is no setting"),
    ],
)
def test_fit_checks_nodes_by_the_signature_of_their_class(node, words):
    with pytest.raises(ValueError) as refusal:
        fitted(node={**PART, **node})
    assert words in str(refusal.value)


def test_complete_adds_the_defaults_of_what_a_node_leaves_out():
    node = {**PART, "width": 3, "inner": {**PART, "_partial_": True, "ratios": [2.0]}}
    completed = complete(node, Any, (__name__,))
    assert completed == {**node, "ratios": [], "inner": {**node["inner"], "inner": None}}
    assert complete(completed, Any, (__name__,)) == completed
    assert fitted(node=node).node == node and fitted(node=completed).node == completed


def test_a_class_may_take_arguments_of_any_name():
    node = {"_target_": f"{__name__}.Open", "width": 3, "depth": 4}
    assert fitted(node=complete(node, Any, (__name__,))).node == node


@pytest.mark.parametrize(
    "name",
    ["os.system", "torch.hub.load", "fpn_det.runtime.os.system", "fpn_det.errors.Path", "fpn_det", 3, "fpn_detx.Y"],
)
def test_locate_admits_classes_of_the_packages_only(name):
    with pytest.raises(ValueError, match=r"^here: expected"):
        locate(name, "here", ("fpn_det",))


def test_locate_suggests_a_class():
    with pytest.raises(ValueError, match=r"fpn_det.models.necks.fpn has no class 'PFN'. Did you mean FPN"):
        locate("fpn_det.models.necks.fpn.PFN", "here", ("fpn_det",))


def test_describe_says_what_a_hint_asks_for():
    assert describe(float | None) == "a number or null"
    assert describe(list[int]) == "a list, each item a whole number"
    assert describe(Annotated[float, Range(0, 1)]) == "a number between 0 and 1"
    assert describe(Annotated[float, Range(0, above=True)]) == "a number more than 0"
