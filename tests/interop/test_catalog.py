"""Published detectors by name, served by a local HTTP server."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import torchvision
from compare import assert_close
from torch import Tensor, nn

from fpn_det import api, weight_files
from fpn_det.composition import compose
from fpn_det.data.transforms import ResizeShortestSide
from fpn_det.interop import catalog
from fpn_det.interop.loading import load_weights
from fpn_det.interop.reading import read_weights
from fpn_det.weight_files import read_state_file

V2 = "torchvision/fasterrcnn_resnet50_fpn_v2"
SIDE = 200  # px, of the image in the model


@contextmanager
def serving(handler: Callable[..., BaseHTTPRequestHandler]) -> Iterator[str]:
    """The URL of a local HTTP server that runs within this context."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    folder = tmp_path / "served"
    folder.mkdir()
    with serving(partial(SimpleHTTPRequestHandler, directory=str(folder))) as url:
        yield url, folder


class Stalls(BaseHTTPRequestHandler):
    """Sends 100 of 1000 bytes, and no more within two seconds."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(bytes(100))
        self.wfile.flush()
        time.sleep(2)
        self.close_connection = True


class ClosesEarly(BaseHTTPRequestHandler):
    """Closes the connection after 100 of 1000 bytes, announced as a whole or in chunks."""

    def do_GET(self) -> None:
        self.send_response(200)
        chunked = "chunked" in self.path
        self.protocol_version = "HTTP/1.1"
        self.send_header(*(("Transfer-Encoding", "chunked") if chunked else ("Content-Length", "1000")))
        self.end_headers()
        self.wfile.write((b"3e8\r\n" if chunked else b"") + bytes(100))
        self.close_connection = True


def publish(monkeypatch: pytest.MonkeyPatch, name: str, url: str, sha256: str | None = None) -> None:
    item = catalog.Published(url, 1.0, 1, "none", sha256)
    monkeypatch.setattr(catalog, "PUBLISHED", {**catalog.PUBLISHED, name: item})
    monkeypatch.setattr(api, "PUBLISHED", catalog.PUBLISHED)


def spread(layer: nn.Module, run: Callable[[], object], std: float, greatest: float | None = None) -> None:
    """Scale a layer until its outputs have this deviation and, if given, shift them until this is the greatest."""
    outputs: list[Tensor] = []
    hook = layer.register_forward_hook(lambda module, inputs, output: outputs.append(output.flatten()))
    run()
    hook.remove()
    values = torch.cat(outputs)
    factor = std / values.std()
    layer.weight *= factor
    layer.bias *= factor
    if greatest is not None:
        layer.bias += greatest - factor * values.max()


@torch.no_grad()
def random_detector(name: str, image: Tensor) -> nn.Module:
    """torchvision's detector with random weights under which no scores of an image are equal.

    A probability close to 1 is the same float32 number for many logits. torchvision sorts the survivors of suppression with
    a sort that is not stable, so which of equal proposals are the last of 1000 is arbitrary there. No objectness is above
    one half here.
    """
    torch.manual_seed(0)
    model = getattr(torchvision.models.detection, name)(weights=None, weights_backbone=None, num_classes=91)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = 1.0
    model.transform.min_size, model.transform.max_size = (SIDE,), 2 * SIDE
    model([image] * 2, [{"boxes": torch.tensor([[9.0, 9, 60, 50]]), "labels": torch.tensor([1])}] * 2)
    model.eval()
    predictor = model.roi_heads.box_predictor
    spread(model.rpn.head.cls_logits, lambda: model([image]), std=2.0, greatest=0.0)
    spread(model.rpn.head.bbox_pred, lambda: model([image]), std=0.3)
    spread(predictor.cls_score, lambda: model([image]), std=2.0)
    spread(predictor.bbox_pred, lambda: model([image]), std=1.0)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fasterrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2"])
def test_a_detector_by_name_gives_the_detections_of_torchvision(name: str, server, tmp_path: Path, monkeypatch):
    url, folder = server
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 12, 20, generator=generator)
    image = (nn.functional.interpolate(coarse, size=(150, 250), mode="bilinear")[0] * 255).to(torch.uint8)
    theirs = random_detector(name, image / 255)
    torch.save(theirs.state_dict(), folder / "weights")
    digits = hashlib.sha256((folder / "weights").read_bytes()).hexdigest()[:8]
    file = (folder / "weights").rename(folder / f"detector-{digits}.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    publish(monkeypatch, f"torchvision/{name}", f"{url}/{file.name}")
    api.load(f"torchvision/{name}", device="cpu")
    file.unlink()  # the second time it comes from the cache
    predictor = api.load(f"torchvision/{name}", device="cpu")
    (resize,) = (step for step in predictor.preprocessing.transform.deferred if isinstance(step, ResizeShortestSide))
    assert (resize.sides, resize.max_side) == ([800], 1333)  # torchvision's, here smaller
    resize.sides, resize.max_side = [SIDE], 2 * SIDE
    (found,) = predictor.predict([image.permute(1, 2, 0).numpy()])
    with torch.no_grad():
        (expected,) = theirs([image / 255])
    assert predictor.class_names[0] == "person" and len(found.boxes) == len(expected["boxes"]) >= 50
    assert torch.equal(torch.as_tensor(found.labels) + 1, expected["labels"])
    assert_close(torch.as_tensor(found.boxes), expected["boxes"], 5e-6)
    assert_close(torch.as_tensor(found.scores), expected["scores"], 1e-5)


def test_the_recipe_for_fine_tuning_has_the_structure_of_the_weights_and_takes_classes_by_name(tmp_path: Path):
    torch.manual_seed(0)
    theirs = torchvision.models.detection.fasterrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None)
    torch.save(theirs.state_dict(), tmp_path / "v2.pth")
    model = compose(["experiment=finetune"]).build_model(2)
    report = load_weights(model, tmp_path / "v2.pth", ["dog", "my own"])
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


@pytest.mark.parametrize(
    ("name", "words"),
    [("whole.pkl", "the connection ended after 100 of 1,000 bytes"), ("chunked.pkl", "IncompleteRead")],
)
def test_a_file_whose_connection_ends_early_is_refused_and_not_kept(name: str, words: str, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    with serving(ClosesEarly) as url:
        publish(monkeypatch, V2, f"{url}/{name}")
        with pytest.raises(
            ValueError, match=rf"^init_from: no file at .*{name}, and .* could not be fetched \({words}"
        ):
            catalog.locate(V2, "init_from")
    path = catalog.PUBLISHED[V2].path
    assert [file.name for file in path.parent.iterdir()] == [f"{name}.lock"]


def test_a_server_that_sends_nothing_more_is_given_up(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(weight_files, "TIMEOUT_S", 0.2)
    with serving(Stalls) as url:
        publish(monkeypatch, V2, f"{url}/slow.pth")
        with pytest.raises(
            ValueError, match=r"^init_from: no file at .*slow.pth, and .* could not be fetched \(timed out\)"
        ):
            catalog.locate(V2, "init_from")


def test_the_rest_of_a_killed_download_is_replaced(server, tmp_path: Path, monkeypatch):
    url, folder = server
    torch.save({"weight": torch.arange(3.0)}, folder / "weights.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    publish(monkeypatch, V2, f"{url}/weights.pth")
    path = catalog.PUBLISHED[V2].path
    path.parent.mkdir(parents=True)
    path.with_name("weights.pth.partial").write_bytes(bytes(5000))
    assert catalog.locate(V2, "init_from") == path
    assert path.read_bytes() == (folder / "weights.pth").read_bytes()
    assert not path.with_name("weights.pth.partial").exists()


def test_a_damaged_file_in_the_cache_is_to_be_removed(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    publish(monkeypatch, V2, "http://127.0.0.1:9/weights.pth")
    path = catalog.PUBLISHED[V2].path
    path.parent.mkdir(parents=True)
    own = tmp_path / "own.pth"
    for file, remedy in [(path, r"Remove it, so that it is fetched again\.$"), (own, r"Give another file\.$")]:
        file.write_bytes(bytes(100))
        for read in (read_weights, partial(read_state_file, where="ResNet(50)")):
            with pytest.raises(ValueError, match=remedy):
                read(file)


def test_without_network_the_file_and_its_place_are_named(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    publish(monkeypatch, V2, "http://127.0.0.1:9/v2-dd69338a.pth")
    with pytest.raises(
        ValueError, match=rf"no file at {tmp_path}/hub/checkpoints/v2-dd69338a.pth, and http.*put it there"
    ):
        catalog.locate(V2, "init_from")


def test_names_are_checked_before_anything_is_fetched(tmp_path: Path):
    with pytest.raises(ValueError, match="Did you mean torchvision/fasterrcnn_resnet50_fpn"):
        catalog.check_detector("torchvision/fasterrcnn_resnet50_fpm", "init_from")
    with pytest.raises(ValueError, match=r"nowhere.pt, which does not exist"):
        catalog.check_detector("nowhere.pt", "init_from")
    (tmp_path / "run").mkdir()
    with pytest.raises(
        ValueError, match=r"got the folder .*/run\. The best of a run is .*/run/checkpoints/best\.pt\.$"
    ):
        catalog.check_detector(tmp_path / "run", "init_from")
    for name, item in catalog.PUBLISHED.items():
        catalog.check_detector(name, "init_from")
        assert item.url.startswith("https://") and 30 < item.ap < 50 and item.licence
    assert catalog.PUBLISHED["torchvision/fasterrcnn_resnet50_fpn"].hash == "258fb6c6"
    assert catalog.PUBLISHED["detectron2/faster_rcnn_R_50_FPN_1x"].hash is None


def test_a_name_of_no_detector_is_refused_by_load():
    with pytest.raises(ValueError, match="load: expected the name of a published detector"):
        api.load("mmdet/no_such")
