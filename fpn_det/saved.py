"""Settings as text: what a run saves, read again by this version and by later ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, ListConfig, OmegaConf

from fpn_det.schema import join

PACKAGE = Path(__file__).parent
CONFIGS = (
    PACKAGE / "configs" if (PACKAGE / "configs").is_dir() else PACKAGE.parent / "configs"
)  # installed, or a checkout

# Settings of older versions: what they are called now, and how their value is said.
RENAMED: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "model.neck.extra_level": ("model.neck.extra_levels", int),
}
# Modules of older versions, which a saved `_target_` may name.
MOVED_MODULES = {
    "fpn_det.anchors": "fpn_det.models.anchors",
    "fpn_det.matching": "fpn_det.models.matching",
    "fpn_det.pyramid": "fpn_det.models.roi_align",
    "fpn_det.models.neck": "fpn_det.models.necks.fpn",
    "fpn_det.models.bifpn": "fpn_det.models.necks.bifpn",
    "fpn_det.models.pafpn": "fpn_det.models.necks.pafpn",
    "fpn_det.models.pyramids": "fpn_det.models.necks.baselines",
    "fpn_det.engine.optimizers": "fpn_det.training.optimizers",
    "fpn_det.engine.schedule": "fpn_det.training.schedule",
}
SECTIONS = (
    "",
    "data",
    "data.train",
    "data.val",
    "data.test",
    "trainer",
    "evaluation",
)  # whose names are always the same


def to_yaml(settings: Any) -> str:
    """The settings as a file that composes to them again."""
    return OmegaConf.to_yaml(OmegaConf.create(asdict(settings)))


def read_yaml(text: str, tell: Callable[[str], object] = str) -> DictConfig:
    """The tree of a saved `config.yaml`, also of an older version; its paths under `data.root` follow that setting again.

    Args:
        tell: hears about settings that the file does not have, because they are newer.
    """
    tree = OmegaConf.create(text)
    assert isinstance(tree, DictConfig)
    for old, (new, convert) in RENAMED.items():
        section, _, name = old.rpartition(".")
        if (node := OmegaConf.select(tree, section)) and name in node:
            OmegaConf.update(tree, new, convert(node.pop(name)))
    _rename_targets(tree)
    if added := _add_newer(tree):
        tell(f"Not in the saved settings, so as in configs/: {', '.join(added)}.")
    root = OmegaConf.select(tree, "data.root")
    for split in ("train", "val", "test") if root else ():
        for name in ("images", "annotations"):
            paths = OmegaConf.select(tree, f"data.{split}.{name}")
            several = isinstance(paths, ListConfig)
            under = [_under_root(path, root) for path in (paths if several else [paths])]
            OmegaConf.update(tree, f"data.{split}.{name}", under if several else under[0])
    return tree


def _rename_targets(node: Any) -> None:
    if isinstance(node, DictConfig):
        target = OmegaConf.to_container(node, resolve=False).get("_target_")  # type: ignore[union-attr]
        if isinstance(target, str):
            module, _, name = target.rpartition(".")
            node["_target_"] = f"{MOVED_MODULES.get(module, module)}.{name}"
        for key in node:
            if not OmegaConf.is_interpolation(node, str(key)):
                _rename_targets(node._get_node(key))


def _under_root(path: str | None, root: str) -> str | None:
    if path is None or not (path == root or path.startswith(f"{root}/")):
        return path
    return f"${{data.root}}{path.removeprefix(root)}"


def _add_newer(tree: DictConfig) -> list[str]:
    """Give an older tree what is missing in it, as configs/ have it; returns the names."""
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        defaults = hydra.compose("train")
    added = []
    for section in SECTIONS:
        known, present = (OmegaConf.select(one, section) if section else one for one in (defaults, tree))
        for name in known if isinstance(present, DictConfig) else ():
            if name not in present:
                present[name] = known[name]
                added.append(join(section, str(name)))
    return added
