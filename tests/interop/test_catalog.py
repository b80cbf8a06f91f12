"""Published detectors by name, served by a local HTTP server."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import torchvision

from fpn_det import api
from fpn_det.composition import compose
from fpn_det.interop import catalog
from fpn_det.interop.conventions import UnfoldedDetector
from fpn_det.interop.conversion import convert
from fpn_det.interop.loading import load_weights

V2 = "torchvision/fasterrcnn_resnet50_fpn_v2"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    folder = tmp_path / "served"
    folder.mkdir()
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    handler.log_message = lambda *args: None  # type: ignore[attr-defined]
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}", folder
        http.shutdown()
        thread.join()


def publish(monkeypatch: pytest.MonkeyPatch, name: str, url: str, sha256: str | None = None) -> None:
    item = catalog.Published(url, 1.0, 1, "none", sha256)
    monkeypatch.setattr(catalog, "PUBLISHED", {**catalog.PUBLISHED, name: item})
    monkeypatch.setattr(api, "PUBLISHED", catalog.PUBLISHED)


@pytest.mark.slow
def test_a_detector_by_name_is_torchvisions_own(server, tmp_path: Path, monkeypatch):
    url, folder = server
    torch.manual_seed(0)
    theirs = torchvision.models.detection.fasterrcnn_resnet50_fpn_v2(
        weights=None, weights_backbone=None, num_classes=91
    )
    torch.save(theirs.state_dict(), folder / "weights")
    digits = hashlib.sha256((folder / "weights").read_bytes()).hexdigest()[:8]
    file = (folder / "weights").rename(folder / f"v2-{digits}.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    publish(monkeypatch, V2, f"{url}/{file.name}")
    api.load(V2, device="cpu")
    file.unlink()  # the second time it comes from the cache
    predictor = api.load(V2, device="cpu")
    # test_parity_torchvision proves that these settings give torchvision's detections
    assert isinstance(predictor.model, UnfoldedDetector) and predictor.class_names[0] == "person"
    expected = convert(theirs.state_dict(), "torchvision", "fpn_det").state
    assert all(torch.equal(value, expected[key]) for key, value in predictor.model.state_dict().items())
    # the recipe for fine-tuning has the structure of these weights, and takes classes by name
    model = compose(["experiment=finetune"]).build_model(2)
    report = load_weights(model, V2, ["dog", "my own"])
    assert report.copied == ("dog",) and report.new_classes == ("my own",) and not report.remarks
    rows = theirs.state_dict()["roi_heads.box_predictor.cls_score.weight"]
    state = model.state_dict()["roi_head.predictor.class_logits.weight"]
    assert torch.equal(state[0], rows[18]) and torch.equal(state[-1], rows[0])


def test_a_file_with_another_hash_is_refused_and_not_kept(server, tmp_path: Path, monkeypatch):
    url, folder = server
    torch.save({}, folder / "weights-01234567.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    publish(monkeypatch, V2, f"{url}/weights-01234567.pth")
    with pytest.raises(ValueError, match=r"^init_from: no file at .*weights-01234567.pth.*invalid hash value"):
        catalog.locate(V2, "init_from")
    path = catalog.PUBLISHED[V2].path
    assert not path.exists()
    path.write_bytes(b"put there by hand")
    with pytest.raises(ValueError, match=r"SHA-256 starts with 01234567 at .*Remove it"):
        catalog.locate(V2, "init_from")


def test_without_network_the_file_and_its_place_are_named(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    publish(monkeypatch, V2, "http://127.0.0.1:9/v2-dd69338a.pth")
    with pytest.raises(
        ValueError, match=rf"no file at {tmp_path}/hub/checkpoints/v2-dd69338a.pth, and http.*put it there"
    ):
        catalog.locate(V2, "init_from")


def test_names_are_checked_before_anything_is_fetched():
    with pytest.raises(ValueError, match="Did you mean torchvision/fasterrcnn_resnet50_fpn"):
        catalog.check_detector("torchvision/fasterrcnn_resnet50_fpm", "init_from")
    with pytest.raises(ValueError, match=r"nowhere.pt, which does not exist"):
        catalog.check_detector("nowhere.pt", "init_from")
    for name, item in catalog.PUBLISHED.items():
        catalog.check_detector(name, "init_from")
        assert item.url.startswith("https://") and 30 < item.ap < 50 and item.licence
    assert catalog.PUBLISHED["torchvision/fasterrcnn_resnet50_fpn"].hash == "258fb6c6"
    assert catalog.PUBLISHED["detectron2/faster_rcnn_R_50_FPN_1x"].hash is None


def test_a_name_of_no_detector_is_refused_by_load():
    with pytest.raises(ValueError, match="load: expected the name of a published detector"):
        api.load("mmdet/no_such")
