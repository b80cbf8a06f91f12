"""State dicts of backbones by name or path: fetched once, verified, and read without executing code.

| source | weights |
|---|---|
| `<path>` | a file of torch or safetensors |
| `timm/<name>` | those that timm publishes under this name, by the Hugging Face Hub and its cache (extra `timm`) |
| `pip/<distribution>` | the one file of weights in an installed package |
| a URL, for `fetch` | kept in torch's cache, where torchvision's own weights are |
"""

from __future__ import annotations

import hashlib
import http.client
import importlib.metadata
import json
import os
import re
import sys
import urllib.request
import zipfile
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

SAFETENSORS = ".safetensors"
SUFFIXES = (".pth", ".pt", SAFETENSORS)
DESCRIBED = "fpn_det weights 1"  # `format` of the metadata of a safetensors file that describes its detector
TIMM, PIP = "timm/", "pip/"
TIMEOUT_S = 30.0  # how long a server may send nothing
TIMM_EXTRA = "expected the package timm, got none. Install it: pip install 'fpn_det[timm]'."
Channels = tuple[float, float, float]  # a value for red, green and blue
HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,})\.\w+$")  # torchvision and timm name files after their SHA-256


def check_source(source: str, where: str) -> None:
    """Refuse a source that `read_state` would refuse, as far as that is known without the network or reading a file.

    Args:
        source: see the module.
        where: prefix of messages.

    Raises:
        ValueError: there is no such file, package or name.
    """
    if source.startswith(TIMM):
        _timm_repository(source.removeprefix(TIMM), where)
    elif source.startswith(PIP):
        _file_of_package(source.removeprefix(PIP), where)
    elif not Path(source).is_file():
        raise ValueError(
            f"{where}: no file for weights at {Path(source).absolute()}. Give another path, or set "
            "model.backbone.weights=null."
        )


def read_state(source: str, where: str) -> dict[str, Tensor]:
    """Read the state dict of a source on the CPU.

    Args:
        source: see the module.
        where: prefix of messages.

    Raises:
        ValueError: there is no such source, it cannot be fetched, or is damaged.
    """
    check_source(source, where)
    if source.startswith(TIMM):
        path = _fetch_timm(source.removeprefix(TIMM), where)
    elif source.startswith(PIP):
        path = _file_of_package(source.removeprefix(PIP), where)
    else:
        path = Path(source)
    return read_state_file(path, where)


def read_state_file(path: Path, where: str) -> dict[str, Tensor]:
    """Read the state dict in a file of torch or safetensors; one under `state_dict` is taken out.

    Raises:
        ValueError: the file is damaged or holds something else.
    """
    try:
        state = _load(path)
    except Exception as error:  # of any kind: a damaged file may raise anything
        if isinstance(error, ValueError) and str(error).startswith(f"{path}: expected"):
            raise
        reason = (" ".join(str(error).split()) or type(error).__name__)[:150]
        raise ValueError(
            f"{where}: expected a state dict in {path}, got a damaged or foreign file ({reason}). {remedy_for(path)}"
        ) from None
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{where}: expected a state dict in {path}, got other content. Give another file.")
    return dict(state)


def _load(path: Path) -> Any:
    if path.suffix == SAFETENSORS:
        return read_safetensors(path)[0]
    if zipfile.is_zipfile(path):
        check_archive(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a safetensors file: its tensors, and what `safetensors_bytes` was given to describe them; nothing for other files."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        metadata = file.metadata() or {}
    if metadata.pop("format", None) != DESCRIBED:
        return tensors, {}
    return tensors, {name: json.loads(text) for name, text in metadata.items()}


def safetensors_bytes(tensors: dict[str, Tensor], description: dict[str, Any]) -> bytes:
    """The content of a safetensors file. `description` is plain values by name, of which the metadata hold the JSON texts."""
    metadata = {"format": DESCRIBED} | {name: json.dumps(value) for name, value in description.items()}
    return save({name: value.contiguous() for name, value in tensors.items()}, metadata)


def check_archive(path: Path) -> None:
    """Refuse a zip archive that unpacks to more than the size of its file: torch stores tensors without compression.

    Raises:
        ValueError: it claims more.
    """
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        claimed = sum(entry.file_size for entry in archive.infolist())
    if claimed > size:
        raise ValueError(
            f"{path}: expected a file made by torch.save, got {size:,} bytes that unpack to {claimed:,}. Do not trust it."
        )


def cache_path(url: str, name: str | None = None) -> Path:
    """File in torch's cache that keeps what is fetched from a URL; `name` replaces the last part of the URL."""
    return _cache_folder() / (name or url.rsplit("/", 1)[1])


def _cache_folder() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints"


def remedy_for(path: Path) -> str:
    """Advice for a damaged file of weights, one sentence: `fetch` replaces what is gone from its cache."""
    return "Remove it, so that it is fetched again." if path.parent == _cache_folder() else "Give another file."


def fetch(url: str, where: str, name: str | None = None, sha256: str | None = None) -> Path:
    """Fetch a file into torch's cache, with a progress bar on a terminal, unless it is there.

    Args:
        url: of the file.
        where: prefix of messages.
        name: of the file in the cache; None = the last part of the URL.
        sha256: hash or its first digits; None = those in the name of the file, if any.

    Raises:
        ValueError: it is not there and could not be fetched, or has another hash; names the file to put in place.
    """
    path = cache_path(url, name)
    if sha256 is None and (found := HASH_IN_NAME.search(path.name)):
        sha256 = found[1]
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{path}.lock"):  # ranks and jobs that share the cache
                if not path.is_file():
                    _download(url, path, sha256)
        except (OSError, http.client.HTTPException) as error:
            raise ValueError(
                f"{where}: no file at {path}, and {url} could not be fetched ({' '.join(str(error).split())}). "
                "Download it elsewhere and put it there."
            ) from error
    elif sha256 is not None and not (actual := _sha256(path)).startswith(sha256):
        raise ValueError(
            f"{where}: expected a file whose SHA-256 starts with {sha256} at {path}, got {actual[:8]}. "
            "Remove it, so that it is fetched again."
        )
    return path


def _download(url: str, path: Path, sha256: str | None) -> None:
    """Fetch a file, and move it to `path` when it is complete.

    Raises:
        OSError, HTTPException: the server cannot be reached, ends the file early, or sends one with another hash.
    """
    partial = path.with_name(f"{path.name}.partial")  # one name under the lock: what a killed fetch left is replaced
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    request = urllib.request.Request(url, headers={"User-Agent": "fpn_det"})  # some servers refuse that of urllib
    try:
        with (
            urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer,
            partial.open("wb") as file,
            Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress,
        ):
            size = int(answer.headers.get("Content-Length", 0)) or None
            task = progress.add_task(path.name, total=size)
            while block := answer.read(1 << 20):
                file.write(block)
                progress.advance(task, len(block))
        got = partial.stat().st_size
        if size is not None and got != size:  # `read` ends without an error when a connection is closed
            raise OSError(f"the connection ended after {got:,} of {size:,} bytes")
        if sha256 is not None and not (actual := _sha256(partial)).startswith(sha256):
            raise OSError(f'invalid hash value (expected "{sha256}", got "{actual}")')
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def pixel_statistics(source: str | None, where: str) -> tuple[Channels, Channels] | None:
    """Mean and deviation of the RGB pixels, on 0..255, that the weights of a source expect; None if it does not tell.

    Args:
        source: see the module; timm alone tells.
        where: prefix of messages.

    Raises:
        ValueError: timm is not installed, or has no such weights.
    """
    if source is None or not source.startswith(TIMM):
        return None
    config = _timm_config(source.removeprefix(TIMM), where)
    return _on_255(config.mean), _on_255(config.std)


def _on_255(values: Channels) -> Channels:
    return 255 * values[0], 255 * values[1], 255 * values[2]


def _timm_repository(name: str, where: str) -> tuple[str, str]:
    """Repository on the Hugging Face Hub, and file in it, of the weights that timm publishes under `name`."""
    config = _timm_config(name, where)
    return config.hf_hub_id, config.hf_hub_filename or "model.safetensors"


def _timm_config(name: str, where: str) -> Any:
    """timm's description of the weights that it publishes under `name`."""
    try:
        import timm
    except ImportError:
        raise ValueError(f"{where}: {TIMM_EXTRA}") from None
    try:
        config = timm.get_pretrained_cfg(name)
    except RuntimeError:  # of an unknown tag
        config = None
    if config is None:
        architecture = name.split(".")[0]
        near = timm.list_pretrained(f"{architecture}*")[:5] or timm.list_pretrained(f"{architecture[:6]}*")[:5]
        raise ValueError(
            f"{where}: expected a name of timm's weights, got '{name}'."
            + (f" Similar ones: {', '.join(near)}." if near else " timm.list_pretrained() lists them.")
        )
    if not config.hf_hub_id:
        raise ValueError(f"{where}: expected a model that timm has weights for, got '{name}'. Give a file.")
    return config


def _fetch_timm(name: str, where: str) -> Path:
    import huggingface_hub

    repository, file = _timm_repository(name, where)
    if not sys.stderr.isatty() and "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ:
        huggingface_hub.utils.disable_progress_bars()
    try:
        path = Path(huggingface_hub.hf_hub_download(repository, file))
    except Exception as error:  # of any kind: the HTTP client has its own
        url = huggingface_hub.hf_hub_url(repository, file)
        raise ValueError(
            f"{where}: timm/{name} is not in the cache of the Hugging Face Hub, and {url} could not be fetched "
            f"({type(error).__name__}). Download it elsewhere and set model.backbone.weights=<file>."
        ) from error
    expected = path.resolve().name  # a large file is stored under its SHA-256
    if re.fullmatch(r"[0-9a-f]{64}", expected) and _sha256(path) != expected:
        raise ValueError(f"{where}: expected a file with SHA-256 {expected} at {path}, got another one. Remove it.")
    return path


def _file_of_package(distribution: str, where: str) -> Path:
    """The file of weights in an installed package, of which no code runs."""
    try:
        files = importlib.metadata.files(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(
            f"{where}: expected the package {distribution}, got none. Install it: pip install {distribution}."
        ) from None
    found = [Path(str(file.locate())) for file in files if file.suffix in SUFFIXES]
    if len(found) != 1 or not found[0].is_file():
        raise ValueError(
            f"{where}: expected a package with one file of weights ({', '.join(SUFFIXES)}), got {len(found)} in "
            f"{distribution}. Give the path of the file."
        )
    return found[0]
