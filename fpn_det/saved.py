"""Settings as text: what a run saves, read again by this version and by later ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, ListConfig, OmegaConf

from fpn_det.migration import migrate
from fpn_det.schema import join

PACKAGE = Path(__file__).parent
CONFIGS = (
    PACKAGE / "configs" if (PACKAGE / "configs").is_dir() else PACKAGE.parent / "configs"
)  # installed, or a checkout

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
    plain = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    assert isinstance(plain, dict)
    migrate(plain)  # type: ignore[arg-type]
    tree = OmegaConf.create(plain)
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
