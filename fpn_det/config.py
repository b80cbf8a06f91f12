"""What a run is made of: its settings as types, and the way from a command line to them.

Hydra composes YAML files and the command line to a tree. The tree is fitted to `Settings` (see `schema`), which refuses
what nobody would read: unknown names, other types, combinations of which one half would be ignored. The values are in
YAML alone; here are their types and meanings.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)
from yaml import YAMLError  # type: ignore[import-untyped]

from fpn_det.errors import Fault, explained, is_for_people
from fpn_det.evaluation.coco import EvaluationSettings
from fpn_det.models.views import Views
from fpn_det.runtime import is_echo
from fpn_det.saved import CONFIGS, read_yaml
from fpn_det.schema import (
    Amount,
    Count,
    CountOrZero,
    Fraction,
    Node,
    Positive,
    Share,
    check_names,
    did_you_mean,
    fit,
    listed,
)
from fpn_det.training.settings import Trainer

PACKAGES = ("fpn_det", "albumentations", "torch.optim")  # whose classes a `_target_` may name
COMPOSING = (HydraException, OmegaConfBaseException, YAMLError)  # what goes wrong before there are settings
FOR_PEOPLE = (ValueError, FloatingPointError, Fault)  # what a user did wrong, training that diverged, bad luck
FAILED, WRONG_COMMAND_LINE = 1, 2  # exit codes

S = TypeVar("S", bound="Settings")


@dataclass(frozen=True)
class Split:
    """One part of a data set."""

    images: str | list[str] | None  # folder, or one for each of the annotations; null = where the format has them
    annotations: str | list[str] | None  # a JSON file, or what the format calls for; several are put together
    format: Literal["coco", "voc", "yolo", "csv"] | None  # null = what it looks like


@dataclass(frozen=True)
class ProposalFiles:
    """What a model without an RPN gets instead: boxes in the COCO results format."""

    train: str
    val: str
    test: str | None  # read on demand
    train_limit: Count  # the best of an image that are used
    eval_limit: Count


@dataclass(frozen=True)
class Data:
    """Where pictures and boxes come from, and how they become batches."""

    root: str  # sets all paths, in COCO's layout
    train: Split
    val: Split
    test: Split  # read on demand
    val_fraction: Share | None  # take this part of the training images instead of `val`
    max_images: Count | None  # only the first of each part, for trials
    classes: list[str] | None  # a subset by name; null = all
    on_error: Literal["fail", "fix", "skip"]  # what to do about broken annotations and files
    max_bad_fraction: Fraction  # of a part's images that may turn out to be unusable on the way, under on_error=skip
    check: bool  # look into every picture first; what was seen is remembered until the file changes
    keep_empty: bool  # train on images without objects too
    num_workers: CountOrZero  # processes that read and transform
    start_method: Literal["fork", "spawn", "forkserver"] | None  # of these processes; null = the platform's own
    resize_on: Literal["worker", "device"]  # where the last flip and resize are made
    reduced_decoding: Literal[
        "never", "train", "always"
    ]  # of JPEG files at 1/2, 1/4 or 1/8, if the resize asks for less
    cache: str | None  # folder for decoded pictures; about 3 bytes a pixel
    canvas: Literal["batch"] | tuple[Count, Count]  # size of a batch: its largest image's, or [H, W] always
    group_by_aspect: bool  # batches of landscape or of portrait images
    repeat_threshold: Positive | None  # repeat images of classes that are in less than this share of them; null = never
    eval_batch_size: Count  # images per rank
    min_visibility: Fraction  # a box of which a transform leaves less than this goes
    min_area: Amount  # a box smaller than this in the input frame goes, px^2
    train_transforms: dict[str, Node | None]  # in this order; null leaves one out
    eval_transforms: dict[str, Node | None]
    proposals: ProposalFiles | None

    def __post_init__(self) -> None:
        for name in ("train", "val") if self.val_fraction is None else ("train",):
            if getattr(self, name).annotations is None:
                otherwise = ", or data.val_fraction" if name == "val" else ""
                raise ValueError(
                    f"data.{name}: expected images and annotations, got none. "
                    f"Set data.{name}.images and data.{name}.annotations{otherwise}."
                )
        if self.classes is not None and (not self.classes or len(set(self.classes)) < len(self.classes)):
            raise ValueError(f"data.classes: expected names, each once, got {self.classes}. null takes all.")


@dataclass(frozen=True)
class Settings:
    """All of a run."""

    experiment: str | None  # name of the file in configs/experiment
    seed: CountOrZero
    device: str  # auto, cpu, cuda, cuda:<number>, mps
    precision: Literal["fp32", "bf16", "fp16"]
    init_from: str | None  # file of weights that a new run starts with, of any project that interop reads
    resume: str | None  # auto, or the checkpoint of the run to go on with
    run: str | None  # folder of the run whose settings these are
    run_dir: str | None  # null = runs/<experiment>/<date>_<time>
    set_aside: bool  # move a run_dir that is in the way to a name with a date, instead of refusing it
    profile: bool  # record every operator of the run
    allow_targets: list[str]  # packages whose classes a `_target_` may name besides ours; on the command line only
    model: Node
    data: Data
    optimizer: Node
    schedule: Node
    trainer: Trainer
    evaluation: EvaluationSettings

    def __post_init__(self) -> None:
        if not isinstance(self, EvalSettings):
            self.trainer.check_best_metric(self.evaluation.metric_names)
        if self.model.get("roi_head", "") is None and self.evaluation.target == "detections":
            raise ValueError(
                "evaluation: expected proposals of a model without an ROI head, got detections. Say evaluation=proposals."
            )
        if self.model.get("rpn", "") is None and self.evaluation.target == "proposals":
            raise ValueError(
                "evaluation: expected detections of a model without an RPN, got proposals. Say evaluation=coco."
            )
        if (self.model.get("rpn", "") is None) != (self.data.proposals is not None):
            raise ValueError(
                "data.proposals: expected with model.rpn=null only, and then always. See experiment=fast_rcnn_r50_fpn."
            )
        if self.resume and self.init_from:
            raise ValueError(
                "resume: expected this or init_from, got both. resume goes on with a run, init_from starts a new one with its weights."
            )


@dataclass(frozen=True)
class EvalSettings(Settings):
    """Those of the run or checkpoint that is evaluated, and what to do with it."""

    checkpoint: str | None  # file; null = the run's best
    split: Literal["train", "val", "test"]
    weights: Literal["auto", "ema", "raw"]  # auto = the moving average if there is one
    tta: Views  # test-time augmentation


# Two ways to say one thing: naming one on the command line replaces the other, naming both is refused.
EITHER = [("trainer.epochs", "trainer.max_steps"), ("data.val_fraction", "data.val")]

# What would change nothing, or not what it seems to, if it is named on the command line: setting, when, why.
IDLE: list[tuple[str, Callable[[Any], bool], str]] = [
    ("hydra.run.dir", lambda settings: True, "the folder of a run is run_dir=<folder>"),
    ("hydra.job.chdir", lambda settings: True, "paths mean the folder where the command is typed"),
    (
        "experiment",
        lambda settings: settings.run is not None,
        "all settings come from run; repeat here those that differ",
    ),
    (
        "set_aside",
        lambda settings: settings.set_aside and settings.run_dir is None,
        "it moves what is in the way of run_dir, and none is set",
    ),
    (
        "set_aside",
        lambda settings: settings.set_aside and settings.resume is not None,
        "resume goes on in the folder that is there",
    ),
    (
        "schedule.warmup_factor",
        lambda settings: settings.schedule.get("warmup_steps") == 0,
        "schedule.warmup_steps=0 leaves no warm-up",
    ),
    *(
        (name, lambda settings: isinstance(settings, EvalSettings), "nothing is trained here")
        for name in (
            "optimizer",
            "schedule",
            "resume",
            "init_from",
            "run_dir",
            "set_aside",
            "profile",
            "data.train_transforms",
        )
    ),
]
DELETABLE = ("data.train_transforms.", "data.eval_transforms.", "evaluation.area_ranges.", "hydra")


def compose(overrides: Sequence[str] = (), config_name: str = "train") -> Settings:
    """The settings that `tools/train.py` would see with this command line.

    Raises:
        ValueError: a setting is unknown, mistyped or impossible.
    """
    try:
        with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
            tree = hydra.compose(config_name, list(overrides), return_hydra_config=True)
        HydraConfig.instance().set_config(tree)
        tree = OmegaConf.masked_copy(tree, [str(name) for name in tree if name != "hydra"])
    except COMPOSING as error:
        raise ValueError(explain(error)) from None
    return check(tree, overrides, Settings)


def check(tree: DictConfig, overrides: Sequence[str], schema: type[S]) -> S:
    """Settings from a composed tree.

    Args:
        tree: as Hydra composed it.
        overrides: the command line.
        schema: which settings are known.

    Raises:
        ValueError: a setting is unknown, mistyped or impossible.
    """
    if deleted := [name for name in overrides if name[0] == "~" and not name[1:].startswith(DELETABLE)]:
        raise ValueError(
            f"{deleted[0][1:]}: expected a value, got none: a setting cannot be deleted. Give it another value, or null."
        )
    named = _names(overrides)
    for one, other in EITHER:
        _choose(tree, one, other, named)
    try:
        values: Any = OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ValueError(explain(error)) from None
    if values.get("allow_targets") and "allow_targets" not in named:
        raise ValueError("allow_targets: expected on the command line only, got it from a file. Remove it there.")
    settings = fit(values, schema, "", (*PACKAGES, *(values.get("allow_targets") or ())))
    for key, is_idle, why in IDLE:
        if _is_named(key, named) and is_idle(settings):
            raise ValueError(f"{key}: has no effect here: {why}. Leave it out.")
    return settings


def _names(overrides: Sequence[str]) -> set[str]:
    return {override.lstrip("+~").split("=")[0] for override in overrides}


def _is_named(key: str, named: set[str]) -> bool:
    return any(name == key or name.startswith(f"{key}.") for name in named)


def _choose(tree: DictConfig, one: str, other: str, named: set[str]) -> None:
    """Set to null what the command line replaced by its alternative."""
    if not (_is_set(tree, one) and _is_set(tree, other)):
        return
    said = [_is_named(key, named) for key in (one, other)]
    if said[0] == said[1]:
        raise ValueError(f"{one}: expected this or {other}, got both. Leave one of them out, or set it to null.")
    replaced = other if said[0] else one
    value = OmegaConf.select(tree, replaced)
    OmegaConf.update(tree, replaced, dict.fromkeys(value) if isinstance(value, DictConfig) else None)


def _is_set(tree: DictConfig, key: str) -> bool:
    value = OmegaConf.select(tree, key)
    return any(item is not None for item in value.values()) if isinstance(value, DictConfig) else value is not None


def explain(error: Exception) -> str:
    """What Hydra, OmegaConf or YAML refused, in one sentence, with the nearest name."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.rpartition("/")
        options = error.options or []
        return f"{group or 'config'}: expected one of {listed(options)}, got '{name}'.{did_you_mean(name, options)}"
    if isinstance(error, OverrideParseException):
        return f"command line: expected name=value, got '{error.override}'. Put quotes around special characters: 'name=\"a=b\"'."
    if isinstance(error, ConfigCompositionException) and "Ambiguous value" in str(error):
        return f"command line: {str(error).splitlines()[0]}. Say -m to try them in turn, or name=[first,second] for a list."
    if isinstance(cause, InterpolationResolutionError):
        return f"{cause.full_key}: expected a value, got none: {str(cause).splitlines()[0]}."
    if isinstance(cause, MissingMandatoryValue):
        return f"{cause.full_key}: expected a value, got none. Say {cause.full_key}=... on the command line."
    if isinstance(cause, ConfigKeyError | ConfigAttributeError) and isinstance(cause.parent_node, DictConfig):
        where = str(cause.parent_node._get_full_key(None) or "")
        known = [str(name) for name in cause.parent_node if name != "hydra"]
        if not known:
            return f"{where}: is null, so it has no {cause.key}. Set all of it: '{where}={{{cause.key}: value, ...}}'."
        try:
            check_names([str(cause.key)], known, where)
        except ValueError as refusal:
            return str(refusal)
    return (
        f"config: {' '.join(str(error).split())}"
        if isinstance(error, YAMLError)
        else f"config: {str(error).splitlines()[0]}"
    )


def argument(name: str) -> str | None:
    """The value of `name=value` on the command line, where it is needed before anything is composed."""
    values = [word.removeprefix(f"{name}=") for word in sys.argv[1:] if word.startswith(f"{name}=")]
    return values[-1] if values else None


def launch(
    task: Callable[[S], None], schema: type[S], config_name: str, saved: Callable[[], str] | None = None
) -> None:
    """Compose the settings that the command line asks for and hand them to `task`; the one entry of all tools.

    What a user did wrong (a ValueError of ours) ends in one sentence and exit code 2, training that is not finite or that
    something from outside ended in one and exit code 1, anything else in its trace.

    Args:
        task: the work.
        schema: which settings it has.
        config_name: file in configs/.
        saved: gives the YAML text of an earlier run's settings, which the file's defaults list names `saved`.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra's own short message would tell people to write +name=value

    @hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=config_name)
    def main(tree: DictConfig) -> None:
        join_cluster()
        try:
            with explained():
                task(_placed(check(tree, HydraConfig.get().overrides.task, schema)))
        except FOR_PEOPLE as error:
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                raise  # to the sweep, which tells its jobs apart
            _end(error)

    try:
        if saved:
            ConfigStore.instance().store("saved", read_yaml(saved(), _remark))
        main()
    except COMPOSING as error:
        _end(ValueError(explain(error)))
    except FOR_PEOPLE as error:
        _end(error)


def _placed(settings: S) -> S:
    """In a sweep a run lies in the folder of its job, unless the command line says where."""
    job = HydraConfig.get()
    has_place = settings.run_dir is not None and "run_dir" in _names(job.overrides.task)
    if job.mode != RunMode.MULTIRUN or has_place or settings.resume not in (None, "auto"):
        return settings
    return replace(settings, run_dir=job.runtime.output_dir, set_aside=False)


def _remark(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr)


def join_cluster() -> None:
    """In a job of Hydra's submitit launcher: set the variables that torchrun would have set."""
    if "SUBMITIT_EXECUTOR" in os.environ:
        from submitit.helpers import TorchDistributedEnvironment  # an optional extra

        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)


def _end(error: Exception) -> None:
    """End with one sentence; an error that is not meant for people deserves its trace."""
    rank = os.environ.get("RANK", "0")
    if not is_for_people(error):
        raise error
    if not is_echo(error):
        print(str(error) if rank == "0" else f"rank {rank}: {error}", file=sys.stderr)
    sys.exit(WRONG_COMMAND_LINE if isinstance(error, ValueError) else FAILED)
