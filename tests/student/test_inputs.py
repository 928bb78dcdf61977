"""What a training takes and refuses: configurations, banks, unlabelled and unreadable faces, first weights."""

import json

import numpy as np
import pytest
import torch
from runs import assert_same_run, kill_at

from ngd_fast.errors import UserError
from ngd_fast.faces.dataset import Faces
from ngd_fast.objective import backends
from ngd_fast.prototypes.clusters import build_clusters
from ngd_fast.student.inputs import load_inputs
from ngd_fast.student.run import train_student
from ngd_fast.student.weights import load_student


def final_step(folder) -> dict:
    return torch.load(folder / "student_last.ckpt", weights_only=True)["state"]["step"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("train.batch_size=97",), "at most 96"),
        (("train.accumulation=7",), "lower train.accumulation"),
        (("data.valid=null",), "no valid faces: give --valid"),
        (("data.train=missing.npz",), "missing.npz"),
        (("train.cuda_graph=on",), "needs a GPU"),
        (("train.sync_bn=true",), "needs GPUs"),
        (("objective.backend=cuda",), "objective.backend: backend 'cuda'"),
        (("device=tpu",), "device tpu"),
        (("device=cuda:99",), "device cuda:99"),
        (("model.arch=resnet7",), "resnet7"),
        (("model.weights=x.pth",), "model.weights x.pth: no such file"),
    ],
)
def test_unfit_configurations_are_refused_and_leave_nothing(small_config, tmp_path, overrides, message):
    with pytest.raises(UserError, match=message):
        train_student(small_config("B0", *overrides), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_it_is_said_where_the_objective_is_not_the_fastest(small_config, tmp_path, monkeypatch, capsys):
    why_not = backends.why_not
    monkeypatch.setattr(backends, "why_not", lambda name: "built with PyTorch 2" if name == "cpu" else why_not(name))
    with pytest.raises(UserError, match=r"lower train\.accumulation"):
        train_student(small_config("B0", "train.accumulation=7"), tmp_path / "run")
    assert "objective: reference (cpu: built with PyTorch 2)\n" in capsys.readouterr().err


def test_it_is_said_that_the_reference_computes_a_kd_mode(small_config, teacher, tmp_path, capsys):
    if reason := backends.why_not("cpu"):
        pytest.skip(reason)
    overrides = ("objective.kd.mode=dkd", "train.accumulation=7", f"objective.kd.teacher={teacher}")
    with pytest.raises(UserError, match=r"lower train\.accumulation"):
        train_student(small_config("B1", *overrides), tmp_path / "run")
    line = "objective: reference (cpu: has no kd_mode 'dkd'; the reference has)\n"
    assert line in capsys.readouterr().err
    with pytest.raises(UserError, match="backend 'cpu' cannot do this: has no kd_mode 'dkd'"):
        train_student(small_config("B1", *overrides, "objective.backend=cpu"), tmp_path / "run")


def test_kd_without_a_teacher_and_proto_without_a_bank_are_refused(small_config, tmp_path):
    with pytest.raises(UserError, match="give --teacher"):
        train_student(small_config("B1", "objective.kd.mode=dist"), tmp_path / "run")
    with pytest.raises(UserError, match="give --teacher"):
        train_student(small_config("B1"), tmp_path / "run")
    (tmp_path / "no_student.safetensors").write_bytes(b"no student")
    with pytest.raises(UserError, match="not a readable safetensors file"):
        train_student(small_config("B1", f"objective.kd.teacher={tmp_path}/no_student.safetensors"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    config = small_config("B2", "objective.kd.weight=0", "objective.proto.bank=null")
    with pytest.raises(UserError, match="give --bank"):
        train_student(config, tmp_path / "run")


def test_bank_that_does_not_fit_is_refused(small_config, files, tmp_path):
    without_kd = ("B2", "objective.kd.weight=0")
    with pytest.raises(UserError, match=r"256-D, the student's features 64-D; set model\.embedding_dim=256"):
        train_student(small_config(*without_kd, "model.embedding_dim=64"), tmp_path / "run")
    with pytest.raises(UserError, match="no prior for each class"):
        train_student(small_config(*without_kd, "objective.proto.prior=class"), tmp_path / "run")
    touched = tmp_path / "bank.npz"
    arrays = dict(np.load(files["bank"]))
    arrays["prototypes"] = arrays["prototypes"] + 1e-3
    np.savez(touched, **arrays)
    with pytest.raises(UserError, match=r"bank\.npz"):
        train_student(small_config(*without_kd, f"objective.proto.bank={touched}"), tmp_path / "run")


@pytest.mark.parametrize("k", [2, 25])
def test_a_bank_of_clusters_trains(small_config, tmp_path, k):
    rng = np.random.default_rng(0)
    bank = build_clusters(rng.normal(size=(200, 256)), *rng.uniform(-1, 1, (2, 200)), k=k)
    bank.save(tmp_path / "k.npz")
    config = small_config("B2", "objective.kd.weight=0", f"objective.proto.bank={tmp_path / 'k.npz'}", "train.epochs=1")
    train_student(config, tmp_path / "run")
    (line,) = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert 0 < json.loads(line)["proto"] < 1


def test_unlabelled_faces_are_left_out(small_config, files, tmp_path, capsys):
    faces = Faces.load(files["train"])
    labels, dist = faces.labels.copy(), faces.label_dist.copy()
    labels[:10], dist[:10] = -1, 0
    Faces(images=faces.images, label_dist=dist, labels=labels, names=faces.names).save(tmp_path / "some.npz")
    config = small_config("B0", f"data.train={tmp_path / 'some.npz'}", "train.epochs=1")
    metrics = train_student(config, tmp_path / "run")
    assert "left out 10 faces" in capsys.readouterr().err
    assert metrics is not None and final_step(tmp_path / "run")["step"] == 86 // 16


def test_label_noise_trains_resumes_and_makes_no_other_cache(
    small_config, files, teacher, tmp_path, monkeypatch, capsys
):
    kd = (f"objective.kd.teacher={teacher}", "objective.kd.cached=true", "train.checkpoint_every=2")
    plain, noisy = small_config("B1", *kd), small_config("B1", *kd, "data.label_noise=0.3")
    assert "label_noise" not in train_student(plain, tmp_path / "plain")["config"]
    assert "label_noise" not in capsys.readouterr().err
    assert train_student(noisy, tmp_path / "whole")["config"]["label_noise"] == 0.3
    inputs = load_inputs(noisy)
    changed = int((inputs.train.labels != Faces.load(files["train"]).labels).sum())
    assert 0 < changed < 96 and f"data.label_noise=0.3: {changed} of 96 training faces" in capsys.readouterr().err
    assert np.array_equal(inputs.valid.labels, Faces.load(files["valid"]).labels)
    assert inputs.checksums == load_inputs(plain).checksums
    assert len(list((tmp_path / "kd_cache").iterdir())) == 1
    weights = [final_step(tmp_path / name)["student"]["head.weight"] for name in ("plain", "whole")]
    assert not torch.equal(*weights)

    kill_at(monkeypatch, 9, noisy, tmp_path / "parts")
    with pytest.raises(UserError, match=r"differs in data\.label_noise \(0\.3 there, 0\.0 here\)"):
        train_student(plain, tmp_path / "parts", resume=True)
    train_student(noisy, tmp_path / "parts", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert "label_noise: 0.3" in (tmp_path / "parts" / "config.yaml").read_text()


def test_label_noise_counts_rows_of_the_file_and_stops_below_one(small_config, files, tmp_path):
    """Faces without a label are left out after the noise: the others' labels do not depend on them."""
    faces = Faces.load(files["train"])
    labels, dist = faces.labels.copy(), faces.label_dist.copy()
    labels[:10], dist[:10] = -1, 0
    Faces(images=faces.images, label_dist=dist, labels=labels).save(tmp_path / "some.npz")
    noise = "data.label_noise=0.3"
    some = load_inputs(small_config("B0", noise, f"data.train={tmp_path / 'some.npz'}")).train
    assert np.array_equal(some.labels, load_inputs(small_config("B0", noise)).train.labels[10:])
    with pytest.raises(UserError, match=r"data\.label_noise"):
        small_config("B0", "data.label_noise=1")


def test_validation_without_labels_is_refused_before_training(small_config, files, tmp_path):
    faces = Faces.load(files["valid"])
    Faces(images=faces.images).save(tmp_path / "unlabelled.npz")
    with pytest.raises(UserError, match=r"unlabelled\.npz: none of its 40 faces has a label"):
        train_student(small_config("B0", f"data.valid={tmp_path / 'unlabelled.npz'}"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_initial_weights_and_cached_teacher_and_averages(small_config, teacher, tmp_path, capsys):
    """The remaining switches together: they train, and the averaged weights are what is saved."""
    config = small_config(
        "B1",
        f"objective.kd.teacher={teacher}",
        "objective.kd.cached=true",
        f"model.weights={teacher}/student_best.safetensors",
        "train.accumulation=2",
        "train.ema=0.9",
        "optimizer.warmup_epochs=1",
    )
    train_student(config, tmp_path / "run")
    assert "not used (head" in capsys.readouterr().err
    state, (best, meta) = final_step(tmp_path / "run"), load_student(tmp_path / "run")
    assert state["step"] == 2 * 3 and len(list((tmp_path / "kd_cache").iterdir())) == 1
    if meta["epoch"] == 2:
        assert torch.equal(best.head.weight, state["average"]["head.weight"])
        assert not torch.equal(best.head.weight, state["student"]["head.weight"])


def test_bad_images_are_left_out_everywhere_if_asked(small_config, files, teacher, tmp_path, capsys):
    """Lists of image files with an undecodable one among train and valid: cached logits must not shift by a row."""
    from PIL import Image

    for name in ("train", "valid"):
        faces = Faces.load(files[name])
        rows = ["path,label_name"]
        for i, image in enumerate(faces.images):
            path = tmp_path / f"{name}{i}.png"
            Image.fromarray(image).save(path)
            rows.append(f"{path},{faces.class_names[faces.labels[i]]}")
        (tmp_path / f"{name}3.png").write_bytes(b"no image")
        (tmp_path / f"{name}.csv").write_text("\n".join(rows) + "\n")
    lists = (f"data.train={tmp_path / 'train.csv'}", f"data.valid={tmp_path / 'valid.csv'}", "train.epochs=1")
    kd = (f"objective.kd.teacher={teacher}", "objective.kd.cached=true")
    with pytest.raises(UserError, match=r"(train|valid)3\.png"):
        train_student(small_config("B1", *lists, *kd), tmp_path / "runs" / "a")
    metrics = train_student(small_config("B1", *lists, *kd, "data.skip_bad=true"), tmp_path / "runs" / "b")
    assert metrics["valid"]["eight_way"]["n"] == 39
    (cache,) = (tmp_path / "runs" / "kd_cache").iterdir()
    assert np.load(cache).shape == (2, 95, 8)
    assert "left out 1 unreadable images" in capsys.readouterr().err
