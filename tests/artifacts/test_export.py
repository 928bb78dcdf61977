"""Exported students against the student itself, fed as the package feeds it."""

import json

import numpy as np
import pytest
import torch

from ngd_fast.artifacts import export
from ngd_fast.cli import main
from ngd_fast.errors import UserError
from ngd_fast.faces.classes import CLASS_NAMES
from ngd_fast.faces.dataset import Faces
from ngd_fast.student.inference import predict
from ngd_fast.student.networks import build_student
from ngd_fast.student.weights import load_student, save_student


@pytest.fixture(scope="module")
def student_file(tmp_path_factory):
    torch.manual_seed(0)
    student = build_student("resnet18-w16", logit_scale=8.0)
    with torch.no_grad():  # statistics unlike the initial ones, or a lost batch-norm would go unseen
        for module in student.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
    meta = {
        "arch": "resnet18-w16", "class_names": CLASS_NAMES, "image_size": 40, "mean": [0.4, 0.5, 0.6], "std": 0.3,
        "embedding_dim": 256, "logit_scale": 8.0, "epoch": 1, "config_name": "B0", "seed": 1,
    }  # fmt: skip
    path = tmp_path_factory.mktemp("student") / "student_best.safetensors"
    save_student(path, student.state_dict(), meta)
    return path


@pytest.fixture(scope="module")
def expected(student_file):
    """uint8 faces [5, 32, 36, 3] and the package's own predictions of them."""
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 36, 3), dtype=np.uint8)
    return images, predict(*load_student(student_file), Faces(images=images))


@pytest.fixture(scope="module")
def onnx_file(student_file):
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    path = student_file.parent / "student.onnx"
    with pytest.raises(SystemExit) as stop:
        main(["export", str(student_file), "--onnx", str(path)])
    assert stop.value.code == 0
    return path


def test_onnx_gives_what_predict_gives(onnx_file, expected):
    import onnxruntime

    images, predictions = expected
    session = onnxruntime.InferenceSession(onnx_file, providers=["CPUExecutionProvider"])
    for rows in (slice(None), slice(0, 1)):
        probabilities, logits, features = session.run(None, {"images": images[rows]})
        np.testing.assert_allclose(probabilities, predictions.probabilities()[rows], atol=1e-4)
        np.testing.assert_allclose(logits, predictions.logits[rows], atol=1e-4)
        np.testing.assert_allclose(features, predictions.features[rows], atol=1e-4)


def test_onnx_carries_its_own_description(onnx_file, student_file):
    import onnx

    from ngd_fast.artifacts.files import sha256

    model = onnx.load(onnx_file)
    properties = {p.key: p.value for p in model.metadata_props}
    assert json.loads(properties["ngd_fast"])["class_names"] == list(CLASS_NAMES)
    assert properties["weights_sha256"] == sha256(student_file)
    shape = model.graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_param for d in shape[:3]] == ["batch", "height", "width"]
    assert model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert [o.name for o in model.graph.output] == ["probabilities", "logits", "features"]


def test_an_opset_that_the_runtime_lacks(student_file, tmp_path, capsys):
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    with pytest.raises(SystemExit) as stop:
        main(["export", str(student_file), "--onnx", str(tmp_path / "x.onnx"), "--opset", "99"])
    assert stop.value.code == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: --opset 99:")
    assert message.endswith("use --opset 18")
    assert list(tmp_path.iterdir()) == []


def test_torch_export_and_half(student_file, expected, tmp_path):
    images, predictions = expected
    student, meta = load_student(student_file)
    difference = export.export_torch(student, meta, tmp_path / "half.pt2", half=True)
    assert 0 < difference < 1e-2, "float16 was used, and is close"
    probabilities = torch.export.load(tmp_path / "half.pt2").module()(torch.from_numpy(images))[0]
    assert probabilities.dtype == torch.float32
    np.testing.assert_allclose(probabilities.detach(), predictions.probabilities(), atol=1e-2)


def test_grey_students_take_the_luma(student_file, expected):
    images, _ = expected
    student, meta = load_student(student_file)
    meta = {**meta, "grey": True}
    want = predict(student, meta, Faces(images=images))
    got = export.Deployable(student, meta)(torch.from_numpy(images))
    # luma is rounded to whole grey values in both; a half may round to either side
    np.testing.assert_allclose(got[0].detach(), want.probabilities(), atol=2e-3)


def test_a_file_that_differs_is_not_written(student_file, tmp_path, monkeypatch):
    monkeypatch.setitem(export.TOLERANCE, True, 1e-9)
    with pytest.raises(UserError, match="not written: its probabilities differ from PyTorch's by"):
        export.export_torch(*load_student(student_file), tmp_path / "x.pt2", half=True)
    assert list(tmp_path.iterdir()) == []


def test_nothing_asked_for(student_file, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["export", str(student_file)])
    assert stop.value.code == 2
    assert "give --onnx, --torch-export or --model-card" in capsys.readouterr().err


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("faces") / "faces.npz"
    images = rng.integers(0, 256, (60, 40, 40), dtype=np.uint8)
    Faces(images=images, labels=np.arange(60) % 8, names=list(map(str, range(60)))).save(path)
    return path


def test_int8_is_close_and_says_what_it_costs(student_file, labelled, onnx_file, tmp_path, capsys):
    import onnx
    import onnxruntime

    path = tmp_path / "int8.onnx"
    with pytest.raises(SystemExit) as stop:
        main(["export", str(student_file), "--onnx", str(path), "--int8", str(labelled)])
    assert stop.value.code == 0
    said = capsys.readouterr().err
    assert "int8 fitted on 30 faces; on the 30 others" in said
    assert "95 % interval" in said
    model = onnx.load(path)
    properties = {p.key: p.value for p in model.metadata_props}
    assert json.loads(properties["ngd_fast"])["precision"] == "int8"
    weights = {i.name: i.data_type for i in model.graph.initializer}
    assert sum(kind == onnx.TensorProto.INT8 for kind in weights.values()) >= 20, "every convolution"
    assert path.stat().st_size < 0.5 * onnx_file.stat().st_size
    images = np.repeat(np.load(labelled)["images"][..., None], 3, axis=3)
    logits = [
        onnxruntime.InferenceSession(f, providers=["CPUExecutionProvider"]).run(["logits"], {"images": images})[0]
        for f in (onnx_file, path)
    ]
    assert 0 < np.abs(logits[0] - logits[1]).max() < 0.2 * np.abs(logits[0]).max()


def test_int8_with_what_it_does_not_go_with(student_file, labelled, tmp_path, capsys):
    out = tmp_path / "x.onnx"
    for extra in (["--half", "--onnx", str(out)], ["--torch-export", str(out)]):
        with pytest.raises(SystemExit) as stop:
            main(["export", str(student_file), "--int8", str(labelled), *extra])
        assert stop.value.code == 2
        assert "--int8 goes with --onnx alone" in capsys.readouterr().err
    few = tmp_path / "few.npz"
    Faces.load(labelled).subset(np.arange(1)).save(few)
    with pytest.raises(SystemExit) as stop:
        main(["export", str(student_file), "--int8", str(few), "--onnx", str(out)])
    assert stop.value.code == 2
    assert "holds 1 faces" in capsys.readouterr().err
    assert not out.exists()
