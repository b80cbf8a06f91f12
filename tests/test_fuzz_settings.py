"""Random command lines and saved settings: each composes and builds, or is refused in one sentence.

`make fuzz` multiplies the number of cases (FPN_DET_FUZZ) and starts from other seeds (FPN_DET_FUZZ_SEED).
"""

from __future__ import annotations

import copy
import os
import random
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import yaml
from tiny import SCRATCH

from fpn_det.composition import compose, compose_as, from_saved, read_saved
from fpn_det.config import DetectorConfig, EvalConfig
from fpn_det.training.config import TrainConfig

FACTOR = int(os.environ.get("FPN_DET_FUZZ", "1"))
SEED = int(os.environ.get("FPN_DET_FUZZ_SEED", "0"))
BASE = SCRATCH

VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3, 2**31, 2**63, -(2**70), 10**18, 0.5, -0.5, 1e-300, 1e300, float("nan"), float("inf"),
    "", " ", "x", "null", "auto", "0", "1e3", "fpn", "cpu", "cuda:99", "a.b", "${seed}", "${x}", "\\${seed}", "[x", "é\u202e\x1b",
    "\x00", "a/../b", "x" * 3000, [], [0], [1, 2], [[]], [None], ["a", "a"], [1e9, 2], {}, {"a": 1}, {"_target_": "x"},
    {"_target_": None}, {"_target_": "fpn_det.models.necks.fpn.FPN"}, {"_target_": "fpn_det.models.rpn.RPN", "_partial_": True},
    {"_partial_": True}, {"_target_": "albumentations.HorizontalFlip", "p": 2}, {"_target_": "albumentations.Compose"}, {1: 2},
)  # fmt: skip
TYPED = ("0x10", "1_000", "-0.5", "[0]", "{a:1}", "{a:[1,{b:2}]}", "'quoted'", '"x=y"', "a,b", "range(1,3)", "choice(1,2)", "glob(*)",
         "int(3)", "${seed}", "${oc.env:HOME}", "${data.root}", "", "null", "nan", "-inf", "1e999", "true", "x y", "[", "]", "{", "(", ")",
         "\\", "'", '"', "#", "=", "%", "é", "\x1b[2J", "_target_", "cosine", "adamw", "yolo", "resnet")  # fmt: skip


def names(tree: Any, prefix: str = "") -> Iterator[str]:
    """Dotted names of all sections and settings."""
    for name, value in tree.items() if isinstance(tree, dict) else ():
        yield f"{prefix}{name}"
        yield from names(value, f"{prefix}{name}.")


def put(tree: Any, name: str, value: Any) -> None:
    *sections, last = name.split(".")
    for section in sections:
        tree = tree.get(section)
        if not isinstance(tree, dict):
            return
    tree[last] = value


@pytest.fixture(scope="module")
def settings() -> dict[str, Any]:
    return yaml.safe_load(compose(BASE).to_yaml())


def build(config: DetectorConfig) -> None:
    """All that is built before data are read, with parameters that take no memory."""
    with torch.device("meta"):
        model = config.build_model(3)
    if isinstance(config, TrainConfig):
        config.data.validate(model.stride)
        config.build_recipe()
        config.build_schedule()(steps=10)


def assert_clean(action: Callable[[], Any], case: object) -> None:
    """The action succeeds, or refuses in one sentence of ours that begins with a place."""
    try:
        action()
    except ValueError as refusal:
        text = str(refusal)
        assert type(refusal) is ValueError and re.match(r".{1,3500}?: \S", text), f"{case!r}: {text}"
        assert "\n" not in text and len(text) < 4000, f"{case!r}: {text}"
    except Exception as error:
        raise AssertionError(f"{case!r}: {type(error).__name__}: {error}") from error


def test_mutated_saved_settings_are_read_or_refused(settings):
    chance = random.Random(SEED)
    places = list(names(settings))
    for _ in range(60 * FACTOR):
        tree = copy.deepcopy(settings)
        mutations = []
        for _ in range(chance.choice((1, 1, 2, 3))):
            name, kind = chance.choice(places), chance.random()
            if kind < 0.1:
                name += chance.choice((".extra", "._args_", "._partial_", "._target_", "x"))
            value = chance.choice(VALUES)
            put(tree, name, copy.deepcopy(value))
            mutations.append((name, value))
        try:
            text = yaml.safe_dump(tree, sort_keys=False)
        except Exception:  # PyYAML refuses some control characters
            continue
        assert_clean(lambda text=text: build(from_saved(text)), mutations)


def test_mutated_text_of_settings_is_read_or_refused(settings):
    chance = random.Random(SEED + 1)
    sound = yaml.safe_dump(settings, sort_keys=False)
    pieces = (
        "{",
        "}",
        "[",
        "]",
        ":",
        "- ",
        "&a ",
        "*a",
        "!!python/name:os.system ",
        "\t",
        "\x00",
        "é",
        "'",
        '"',
        "#",
        "|\n",
        "? ",
        "---\n",
        "%",
    )
    for _ in range(40 * FACTOR):
        text = sound
        for _ in range(chance.randint(1, 4)):
            start = chance.randrange(len(text))
            end = min(len(text), start + chance.choice((0, 0, 1, 5, 200)))
            text = text[:start] + chance.choice(pieces) + text[end:]
        assert_clean(lambda text=text: from_saved(text), text[max(0, start - 40) : start + 40])


def test_random_words_compose_or_are_refused(settings):
    chance = random.Random(SEED + 2)
    places = [
        *names(settings),
        "data",
        "neck",
        "optimizer",
        "schedule",
        "experiment",
        "evaluation",
        "hydra.run.dir",
        "x",
        "a.b.c",
    ]
    for _ in range(12 * FACTOR):
        words = []
        for _ in range(chance.choice((1, 1, 2))):
            sign = chance.choice(("", "", "", "+", "++", "~"))
            name = chance.choice(places) + chance.choice(("", "", "", "", ".x", "._target_", "@x", "/y"))
            words.append(f"{sign}{name}" + ("" if sign == "~" else f"={chance.choice(TYPED)}"))
        assert_clean(lambda words=words: build(compose([*BASE, *words])), words)


@pytest.mark.parametrize(
    "word",
    [
        "+schedule=[0]",
        "++model.roi_head=-0.5",
        "model.roi_head.pooler=0x10",
        "model.rpn.anchors=1000000",
        "model.neck.channels=1000000000000",
        "model.neck._partial_=-0.5",
        "model._partial_=-0.5",
        "optimizer._partial_=true",
        "schedule._partial_=false",
        "model.backbone=3",
        "model.backbone={_target_:fpn_det.models.necks.fpn.FPN}",
        "optimizer=[]",
        "data=[]",
        "data.train=x",
        "evaluation.area_ranges=x",
        "tta=1",
    ],
)
def test_words_that_ended_in_a_traceback_are_refused(word):
    with pytest.raises(ValueError) as refusal:
        build(compose([*BASE, word]))
    assert_clean(lambda: build(compose([*BASE, word])), word)
    assert str(refusal.value)


@pytest.mark.parametrize("channels", [20_000, 100_000_000])  # memory for it may be promised, or refused at once
def test_a_model_that_no_memory_holds_is_refused(channels):
    config = compose([*BASE, f"model.neck.channels={channels}"])
    with pytest.raises(
        ValueError, match="^model: expected settings of a detector( of at most|, got ones that cannot be built)"
    ):
        config.build_model(3)


def test_saved_settings_are_evaluated_or_refused(settings):
    chance = random.Random(SEED + 3)
    places = list(names(settings))
    for _ in range(8 * FACTOR):
        tree = copy.deepcopy(settings)
        name, value = chance.choice(places), chance.choice(VALUES)
        put(tree, name, copy.deepcopy(value))
        try:
            text = yaml.safe_dump(tree, sort_keys=False)
        except Exception:
            continue
        assert_clean(
            lambda text=text: build(compose_as(EvalConfig, "eval", ["run=x"], read_saved(text))), (name, value)
        )
