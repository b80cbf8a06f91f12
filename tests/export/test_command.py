"""`fpn-det export` as it is used: from a checkpoint to a file that predicts and evaluates, with fpn_det and without."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import ROOT, TINY

from fpn_det import api
from fpn_det.composition import compose, compose_as, read_saved
from fpn_det.export.export import ExportConfig, export, saved_settings
from fpn_det.models.views import Views
from fpn_det.runs.checkpoint import save_checkpoint

sys.path.insert(0, str(Path(__file__).parent.parent / "models"))
from test_detector import spread_out

pytestmark = pytest.mark.slow
# Sides of at least 97 px, which a file does not pad to a canvas of its own.
RESIZE = (
    "data.eval_transforms.resize={_target_: fpn_det.data.transforms.ResizeShortestSide, sides: [128], max_side: 192}"
)
IDS = [9, 4, 6, 2, 7, 1]


def require_libraries() -> None:
    for library in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(library)


def make_checkpoint(shapes_dataset: Path, folder: Path) -> Path:
    """A detector that is sure of what it sees, as a run leaves it."""
    torch.manual_seed(0)
    config = compose([*TINY, f"data.root={shapes_dataset}", RESIZE])
    names = list(config.data.read_train_and_val(seed=0).train.class_names)
    state = {
        "model": spread_out(config.build_model(len(names))).state_dict(),
        "ema": None,
        "progress": {"step": 2},
        "class_names": names,
        "category_ids": IDS,
        "score_thresholds": {"overall": 0.3, "classes": {}},
        "config": config.to_yaml(),
    }
    folder.mkdir(exist_ok=True)
    save_checkpoint(folder / "best.pt", state)
    return folder / "best.pt"


def pictures_of(shapes_dataset: Path) -> list[Path]:
    return sorted(file for file in shapes_dataset.rglob("*") if file.suffix in (".jpg", ".png"))


def export_config(checkpoint: Path, *words: str) -> ExportConfig:
    saved = read_saved(saved_settings(None, str(checkpoint)))
    return compose_as(ExportConfig, "export", [f"checkpoint={checkpoint}", *words], saved)


@pytest.fixture(scope="module")
def files(shapes_dataset, tmp_path_factory) -> tuple[Path, Path, list[str]]:
    """A checkpoint, its ONNX file, and what the export said."""
    require_libraries()
    checkpoint = make_checkpoint(shapes_dataset, tmp_path_factory.mktemp("export") / "run")
    said: list[str] = []
    return checkpoint, export(export_config(checkpoint, "verify=ap"), said.append), said


def test_the_file_is_proven_and_says_what_it_is(files):
    checkpoint, file, said = files
    assert file == checkpoint.with_suffix(".onnx")
    assert re.match(
        r"13 images .*, [1-9]\d* detections: boxes differ by at most .*, 0 detections on one side only", said[0]
    )
    assert re.match(r"AP on 8 images: 0\.\d{4}, of torch 0\.\d{4}", said[1])
    assert [path.name for path in file.parent.iterdir() if path.name.startswith(".")] == []
    import onnx

    model = onnx.load(file)
    about = {item.key: json.loads(item.value) for item in model.metadata_props}
    assert about["category_ids"] == IDS and about["checkpoint"] == "best.pt"
    assert {opset.domain: opset.version for opset in model.opset_import}[""] == about["opset"]
    assert {node.domain for node in model.graph.node} == {""} and not model.functions
    assert str(ROOT) not in str(model.graph.node[0].metadata_props)


def test_the_file_predicts_and_evaluates_as_its_checkpoint_does(files, shapes_dataset):
    checkpoint, file, _ = files
    pictures = pictures_of(shapes_dataset)
    ours, theirs = api.load(checkpoint, device="cpu"), api.load(file)
    assert theirs.class_names == ours.class_names and theirs.category_ids == ours.category_ids
    for expected, found in zip(ours.predict(pictures[:4]), theirs.predict(pictures[:4]), strict=True):
        assert found.names == expected.names
        torch.testing.assert_close(found.boxes, expected.boxes, atol=0.05, rtol=0)
        torch.testing.assert_close(found.scores, expected.scores, atol=1e-4, rtol=0)
    evaluations = [api.evaluate(path, "device=cpu") for path in (checkpoint, file)]
    assert evaluations[0].metrics["AP"] == pytest.approx(evaluations[1].metrics["AP"], abs=2e-3)
    with pytest.raises(ValueError, match="expected no test-time augmentation of an exported model"):
        api.load(file, tta=Views(flip=True)).predict(pictures[:1])


def test_the_commands_treat_the_file_of_a_run_like_its_checkpoint(run_tool, shapes_dataset, tmp_path):
    require_libraries()
    low = "model.roi_head.test_filter.score_threshold=0.01"
    api.train(
        [*TINY, f"data.root={shapes_dataset}", f"run_dir={tmp_path / 'run'}", "data.eval_batch_size=3", low, RESIZE]
    )
    assert run_tool("export.py", "run=run").returncode == 0
    (exported,) = (tmp_path / "run").rglob("*.onnx")
    source = f"source={shapes_dataset / 'val2017'}"
    rows, metrics = {}, {}
    for name, checkpoint in (("torch", "run=run"), ("onnx", f"checkpoint={exported}")):
        result = run_tool("predict.py", checkpoint, source, "score=0", "draw=false", f"out={name}", "device=cpu")
        assert result.returncode == 0, result.stderr
        rows[name] = json.loads((tmp_path / name / "predictions.json").read_text())
        result = run_tool("eval.py", checkpoint, "device=cpu")
        assert result.returncode == 0, result.stderr
        folder = exported.name if name == "onnx" else "best"
        metrics[name] = json.loads((tmp_path / "run" / "eval" / folder / "metrics.json").read_text())
    (one, other) = (_columns(rows[name]) for name in ("torch", "onnx"))
    tolerance = np.array([0, 0, 0.01, 0.01, 0.01, 0.01, 1e-4])
    same = (abs(one[:, None] - other) <= tolerance).all(axis=2)
    # scores of two steps are so close that another order of equal ones may exchange a few at the limit of detections
    assert len(one) == len(other) > 100 and same.any(axis=0).mean() > 0.98 and same.any(axis=1).mean() > 0.98
    assert metrics["onnx"]["weights"] == "exported"
    assert metrics["onnx"]["AP"] == pytest.approx(metrics["torch"]["AP"], abs=1e-4)


def _columns(rows: list[dict]) -> np.ndarray:
    """Image, category, box and score of each detection, f64 [D, 7]."""
    return np.array([[row["image_id"], row["category_id"], *row["bbox"], row["score"]] for row in rows])


def only_with(folder: Path, *distributions: str) -> list[str]:
    """The command of a Python that has these distributions, what they require, and nothing else."""
    folder.mkdir()
    for name in distributions:
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or ()} - {".."}:
            if not (folder / top).exists():
                (folder / top).symlink_to(Path(str(distribution.locate_file(top))))
    start = f"import runpy, sys; sys.path.append({str(folder)!r}); del sys.argv[0]; runpy.run_path(sys.argv[0])"
    return [sys.executable, "-I", "-S", "-c", start]


def test_the_program_of_the_documentation_finds_the_same_without_fpn_det(files, shapes_dataset, tmp_path):
    checkpoint, file, _ = files
    text = (ROOT / "docs" / "export.md").read_text()
    (program,) = re.findall(r"```python\n(import json.*?)```", text, re.DOTALL)
    assert len(program.splitlines()) <= 30
    for name, content in {"consumer.py": program, "import_torch.py": "import torch"}.items():
        (tmp_path / name).write_text(content)
    command = only_with(tmp_path / "packages", "onnxruntime", "flatbuffers", "packaging", "protobuf", "numpy", "pillow")
    ended = subprocess.run([*command, str(tmp_path / "import_torch.py")], capture_output=True, text=True)
    assert "No module named 'torch'" in ended.stderr
    # of the size of evaluation, so that neither side resizes: PIL does it otherwise than OpenCV
    picture = Image.open(pictures_of(shapes_dataset)[0]).convert("RGB").resize((170, 128))
    picture.save(tmp_path / "picture.png")
    arguments = [str(tmp_path / "consumer.py"), str(file), str(tmp_path / "picture.png")]
    ended = subprocess.run([*command, *arguments], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    (expected,) = api.load(checkpoint, device="cpu").predict(picture)
    lines = [re.fullmatch(r"(.+) (\d\S+) (\[.+\])", line) for line in ended.stdout.splitlines()]
    assert all(lines) and len(lines) == len(expected) > 5
    assert [line[1] for line in lines] == list(expected.names)
    scores, boxes = (torch.tensor([json.loads(line[column]) for line in lines]) for column in (2, 3))
    torch.testing.assert_close(scores, expected.scores, atol=6e-4, rtol=0)  # printed with three digits
    torch.testing.assert_close(boxes, expected.boxes, atol=0.11, rtol=0)  # with one


def test_small_pictures_are_predicted_and_a_canvas_has_a_limit(files):
    _, file, _ = files
    predictor = api.load(file)
    (found,) = predictor.predict(Image.new("RGB", (1, 1)))
    assert found.boxes.shape == (len(found), 4)
    assert np.isfinite(found.scores.numpy()).all()


def test_a_file_that_differs_is_not_left(files, monkeypatch):
    checkpoint, _, _ = files
    from fpn_det.export import proof

    monkeypatch.setattr(proof, "SCORE_TOLERANCE", -1.0)
    output = checkpoint.parent / "other.onnx"
    with pytest.raises(ValueError, match="export: expected the detections of torch, got others"):
        export(export_config(checkpoint, "size=[192,192]", f"output={output}"), lambda line: None)
    assert not output.exists()


def test_a_file_takes_images_of_exactly_its_size_and_has_the_settings_of_its_export(shapes_dataset, tmp_path):
    checkpoint = make_checkpoint(shapes_dataset, tmp_path / "run")
    words = ["format=torch", "size=[90,120]", "model.roi_head.test_filter.max_detections=20", "verify=ap"]
    resize = RESIZE.replace("[128]", "[90]").replace(
        "192", "120"
    )  # of 96 x 128 to 90 x 120, which a loader pads to 96 x 128
    predictor = api.load(export(export_config(checkpoint, *words, resize), lambda line: None))
    assert predictor.batch_of([Image.new("RGB", (128, 96))]).sizes.tolist() == [[90, 120]]
    (found,) = predictor.predict(pictures_of(shapes_dataset)[0], score=0.0)
    assert len(found) == predictor.model.max_detections == 20
