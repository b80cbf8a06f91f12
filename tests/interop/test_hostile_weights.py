"""Files of weights that claim more than they hold, recurse, or lack what they should have: one sentence, little memory."""

from __future__ import annotations

import pickle
import resource
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from fpn_det.interop.loading import read_as_ours
from fpn_det.interop.reading import read_weights
from fpn_det.runs.checkpoint import FORMAT, check_fields, load_checkpoint

GIB = 1 << 30


def deep(levels: int) -> bytes:
    """A pickle of dictionaries in dictionaries: {'a': {'a': ...}}."""
    return b"\x80\x04" + b"}X\x01\x00\x00\x00a" * levels + b"N" + b"s" * levels + b"."


def deep_list(levels: int) -> bytes:
    return b"\x80\x04" + b"]" * levels + b"a" * (levels - 1) + b"."


# numpy.ndarray of 2^40 bytes: numpy.core.multiarray._reconstruct(numpy.ndarray, (1 << 40,), b"b")
HUGE_ARRAY = (
    b"\x80\x02}X\x05\x00\x00\x00model}X\x01\x00\x00\x00acnumpy.core.multiarray\n_reconstruct\n"
    b"cnumpy\nndarray\n\x8a\x06\x00\x00\x00\x00\x00\x01\x85U\x01b\x87Rss."
)
PICKLES = {
    "index of a memo": b"\x80\x02}r\xff\xff\xff\x7f.",
    "index of a memo as text": b"(dp99999999999\n.",
    "bytes of terabytes": b"\x80\x04\x8e" + (1 << 42).to_bytes(8, "little") + b"x.",
    "text of gigabytes": b"\x80\x04\x8d" + (1 << 34).to_bytes(8, "little") + b"x.",
    "frame of gigabytes": b"\x80\x04\x95" + (1 << 40).to_bytes(8, "little") + b"}.",
    "huge number": b"\x80\x02\x8b\xff\xff\xff\x7fx.",
    "deep dictionaries": deep(20_000),
    "deep lists": deep_list(20_000),
    "huge array": HUGE_ARRAY,
    "unknown protocol": b"\x80\x63}.",
    "empty stack": b"\x80\x04.",
    "extension": b"\x80\x02\x82\x01.",
    "persistent id": b"\x80\x02U\x01aQ.",
}


def write_archive(path: Path, pickled: bytes, records: dict[str, bytes] | None = None, method: int = 0) -> None:
    with zipfile.ZipFile(path, "w", compression=method) as archive:
        archive.writestr("archive/data.pkl", pickled)
        for name, content in {"byteorder": b"little", "version": b"3\n", **(records or {})}.items():
            archive.writestr(f"archive/{name}", content)


def assert_refused(path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for reader in (read_weights, read_as_ours, load_checkpoint):
        with pytest.raises(ValueError) as refusal:
            reader(path)
        assert str(refusal.value).startswith(f"{path}: expected ") and "\n" not in str(refusal.value)
        assert len(str(refusal.value)) < 500
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < GIB, f"{grown / GIB:.1f} GiB more memory"


@pytest.mark.parametrize("kind", ["pickle", "archive"])
@pytest.mark.parametrize("name", PICKLES)
def test_pickles_that_claim_too_much_are_refused(tmp_path, name, kind):
    path = tmp_path / "weights.pth"
    if kind == "pickle":
        path.write_bytes(PICKLES[name])
    else:
        write_archive(path, PICKLES[name])
    assert_refused(path)


def test_an_archive_that_unpacks_to_more_than_its_file_is_refused(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "small.pth")
    with zipfile.ZipFile(tmp_path / "small.pth") as archive:
        pickled = archive.read("small/data.pkl")
    path = tmp_path / "bomb.pth"
    write_archive(path, pickled, {"data/0": bytes(64 << 20)}, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1 << 20
    assert_refused(path)
    with pytest.raises(ValueError, match="that unpack to"):
        read_weights(path)


def test_a_tensor_whose_elements_share_one_place_is_refused(tmp_path):
    path = tmp_path / "expanded.pth"
    torch.save({"model": {"a": torch.zeros(1).expand(1 << 40)}}, path)
    assert_refused(path)


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(3).to_sparse(),
        torch.empty(3, device="meta"),
        torch.quantize_per_tensor(torch.zeros(3), 1.0, 0, torch.qint8),
        np.array(["a"]),
        1.0,
        None,
    ],
    ids=["sparse", "meta", "quantized", "text", "number", "none"],
)
def test_values_that_are_no_dense_tensors_are_not_weights(tmp_path, value):
    path = tmp_path / "weights.pth"
    torch.save({"model": {"a": value}}, path)
    with pytest.raises(ValueError, match="expected"):
        read_weights(path)


SOUND = {
    "format": FORMAT,
    "model": {"a": torch.zeros(1)},
    "ema": None,
    "progress": {"step": 1, "total_steps": 1},
    "class_names": ["cat"],
    "config": "seed: 0\n",
}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, ...) for name in SOUND if name != "format"),
        ("model", [1]),
        ("model", {"a": 1}),
        ("ema", "x"),
        ("progress", {"step": "one"}),
        ("progress", {}),
        ("class_names", []),
        ("class_names", [1]),
        ("class_names", "cat"),
        ("config", {"seed": 0}),
        ("config", None),
    ],
)
def test_a_checkpoint_without_a_part_is_refused(tmp_path, name, value):
    path = tmp_path / "damaged.pt"
    state = OrderedDict(SOUND)
    if value is ...:
        del state[name]
    else:
        state[name] = value
    torch.save(dict(state), path)
    with pytest.raises(ValueError, match=f"{path}: expected"):
        check_fields(path, load_checkpoint(path))
    with pytest.raises(ValueError, match="expected"):
        read_as_ours(path)


def test_sound_weights_in_every_form_are_read(tmp_path):
    torch.save(SOUND, tmp_path / "sound.pt")
    assert load_checkpoint(tmp_path / "sound.pt")["class_names"] == ["cat"]
    (tmp_path / "arrays.pkl").write_bytes(pickle.dumps({"model": {"a": np.zeros((8, 8), np.float32)}}))
    assert read_weights(tmp_path / "arrays.pkl").state["a"].shape == (8, 8)
