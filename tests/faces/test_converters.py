"""AffectNet in its three layouts, CK+ in its three, any folder; and drawn faces themselves."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from ngd_fast.cli import main
from ngd_fast.errors import UserError
from ngd_fast.faces.affectnet import convert_affectnet
from ngd_fast.faces.ckplus import convert_ckplus, subject_of
from ngd_fast.faces.classes import AFFECTNET_IDS, CLASS_NAMES
from ngd_fast.faces.dataset import Faces
from ngd_fast.faces.images import decode_image
from ngd_fast.synthetic.face_files import write_affectnet_like, write_ckplus_like, write_ckplus_tree
from ngd_fast.synthetic.faces import STYLES, draw_faces, make_faces, write_ferplus_like


def test_affectnet_mini(tmp_path):
    write_affectnet_like(tmp_path, {"valid": 16, "test": 24}, size=32)
    splits, left_out = convert_affectnet(tmp_path)
    assert {name: len(faces) for name, faces in splits.items()} == {"valid": 16, "test": 24, "all": 40}
    assert left_out == 0
    assert splits["test"].class_counts.tolist() == [3] * 8
    pixels, _ = convert_affectnet(tmp_path / "labels_test.csv", size=20, grey=True)
    assert pixels["test"].images.shape == (24, 20, 20)
    np.testing.assert_array_equal(pixels["test"].labels, splits["test"].labels)


def test_affectnet_official_csv_cuts_the_boxes_out(tmp_path):
    write_affectnet_like(tmp_path, {"train": 20}, size=32, official=True)
    splits, left_out = convert_affectnet(tmp_path / "training.csv", size=32)
    faces = splits["train"]
    assert (len(faces), left_out) == (18, 2)
    whole = decode_image(tmp_path / faces.names[0])
    np.testing.assert_array_equal(faces.images[0], whole[9:41, 7:39])
    with pytest.raises(UserError, match="choose --size"):
        convert_affectnet(tmp_path / "training.csv")
    text = (tmp_path / "training.csv").read_text().replace(",8,0.1", ",11,0.1", 1)
    (tmp_path / "training.csv").write_text(text)
    with pytest.raises(UserError, match=r"line 11: expression '11' is not in AffectNet's codes"):
        convert_affectnet(tmp_path / "training.csv", size=32)


def test_affectnet_csv_without_its_header(tmp_path):
    write_affectnet_like(tmp_path, {"valid": 20}, size=32, official=True)
    (expected,) = convert_affectnet(tmp_path / "training.csv", size=32)[0].values()
    rows = (tmp_path / "training.csv").read_text().partition("\n")[2]
    (tmp_path / "validation.csv").write_text(rows.replace("images/", "Images/", 1))
    (tmp_path / "Images").symlink_to(tmp_path / "images")
    splits, left_out = convert_affectnet(tmp_path / "validation.csv", size=32)
    assert left_out == 2
    assert splits["valid"].checksum == expected.checksum


def test_what_a_layout_has_no_use_for_is_refused(tmp_path):
    write_ckplus_tree(tmp_path / "tree", 1)
    with pytest.raises(UserError, match="--class-map is for folders and lists"):
        convert_ckplus(tmp_path / "tree", class_map={"happy": 1})
    write_ckplus_like(tmp_path / "folders", 7)
    with pytest.raises(UserError, match="--neutral needs the official tree"):
        convert_ckplus(tmp_path / "folders", neutral=True)
    make_faces(8, 1).save(tmp_path / "faces.npz")
    for arguments in (["ckplus"], ["folder", "--size", "32"]):
        with pytest.raises(SystemExit) as stop:
            main(["data", *arguments, str(tmp_path / "faces.npz"), "--out", str(tmp_path / "out")])
        assert stop.value.code == 2


def test_the_map_that_was_used_is_said(tmp_path, capsys):
    write_affectnet_like(tmp_path, {"test": 16}, size=32)
    ids = {name: 7 - number for number, name in AFFECTNET_IDS.items()}
    (tmp_path / "class_map.json").write_text(json.dumps(ids))
    for command, dataset in (("affectnet", "AffectNet"), ("ckplus", "CK+"), ("folder", "faces")):
        source = str(tmp_path / "labels_test.csv")
        with pytest.raises(SystemExit) as stop:
            main(["data", command, source, "--out", str(tmp_path / "out")])
        assert stop.value.code == 0
        assert f"{dataset}'s labels: 0 contempt, 1 anger, 2 disgust" in capsys.readouterr().err


def test_the_same_file_in_two_folders_is_found(tmp_path, capsys):
    for name in ("train/happy/a.png", "train/happy/b.png", "train/fear/c.png", "test/happy/d.png", "test/sad/e.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), ord(name[-5]) % 3, np.uint8)).save(tmp_path / name)
    (tmp_path / "test/sad/f.png").write_bytes(b"no image")
    with pytest.raises(SystemExit) as stop:
        main(["data", "check", str(tmp_path / "train"), str(tmp_path / "test")])
    assert stop.value.code == 0
    shown = capsys.readouterr()
    assert "0 inside, 0 across" in shown.out and "0 inside, 2 across" in shown.out
    assert "left out 1 unreadable images, first " in shown.err and "f.png" in shown.err


def test_names_that_are_not_utf8(tmp_path, capsys):
    """As archives of Windows leave them where they are unpacked."""
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "faces" / "fear").mkdir(parents=True)
    try:
        (tmp_path / "a.png").rename(tmp_path / "faces" / "fear" / "caf\udce9.png")  # the byte E9
    except (OSError, UnicodeError):
        pytest.skip("this file system takes UTF-8 alone")
    command = ["data", "folder", str(tmp_path / "faces"), "--out", str(tmp_path / "out")]
    for size, status in ((["--size", "8"], 0), ([], 2)):
        with pytest.raises(SystemExit) as stop:
            main([*command, *size])
        assert stop.value.code == status
    assert Faces.load(tmp_path / "out" / "faces_all.npz").names == ["fear/caf\ufffd.png"]
    assert r"caf\udce9.png': its name is not UTF-8, so no list can hold it" in capsys.readouterr().err


def test_hidden_files_of_macos_are_no_part_of_ckplus(tmp_path):
    write_ckplus_tree(tmp_path, 2)
    expected = convert_ckplus(tmp_path, neutral=True).checksum
    for file in [*tmp_path.rglob("*.png"), *tmp_path.rglob("*.txt")]:
        file.with_name(f"._{file.name}").write_bytes(b"Mac OS X")
    assert convert_ckplus(tmp_path, neutral=True).checksum == expected


def test_affectnet_annotations(tmp_path):
    part = tmp_path / "val_set"
    (part / "images").mkdir(parents=True)
    (part / "annotations").mkdir()
    for number, code in enumerate([*AFFECTNET_IDS, 8]):
        Image.fromarray(np.full((9, 9, 3), number, np.uint8)).save(part / "images" / f"{number}.jpg")
        np.save(part / "annotations" / f"{number}_exp.npy", np.array(str(code)))
    splits, left_out = convert_affectnet(tmp_path)
    assert [CLASS_NAMES[label] for label in splits["valid"].labels] == list(AFFECTNET_IDS.values())
    assert left_out == 1
    (part / "annotations" / "._3_exp.npy").write_bytes(b"Mac OS X")
    theirs, _ = convert_affectnet(tmp_path, class_map={name: 7 - number for number, name in AFFECTNET_IDS.items()})
    assert [CLASS_NAMES[label] for label in theirs["valid"].labels] == list(AFFECTNET_IDS.values())[::-1]
    np.save(part / "annotations" / "8_exp.npy", np.array("12"))
    with pytest.raises(UserError, match=r"8_exp\.npy: expression '12' is not in AffectNet's codes"):
        convert_affectnet(tmp_path)
    np.save(part / "annotations" / "8_exp.npy", np.array(8.0))
    assert convert_affectnet(tmp_path)[1] == 1
    (part / "images" / "3.jpg").unlink()
    with pytest.raises(UserError, match=r"1 of 8 images do not exist, first .*3\.jpg"):
        convert_affectnet(tmp_path)


def test_ckplus_tree_keeps_labels_and_subjects(tmp_path):
    write_ckplus_tree(tmp_path, 4)
    faces = convert_ckplus(tmp_path)
    # Four subjects, three sequences each, one of them unlabelled; three peak frames.
    assert len(faces) == 11 * 3
    assert faces.images.shape[1:] == (48, 48)
    assert sorted(set(faces.subjects)) == ["S005", "S006", "S007", "S008"]
    assert 0 not in faces.labels
    assert all(name.startswith(subject) for name, subject in zip(faces.names, faces.subjects))
    with_neutral = convert_ckplus(tmp_path, neutral=True)
    assert with_neutral.class_counts[0] == 11
    # The middle square of the camera's frame.
    frame = decode_image(tmp_path / "cohn-kanade-images/S005/001" / faces.names[0], grey=True)
    middle = Image.fromarray(frame[:, 12:76]).resize((48, 48), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(faces.images[0], np.asarray(middle))


def test_ckplus_landmarks_give_the_box(tmp_path):
    write_ckplus_tree(tmp_path, 1)
    plain = convert_ckplus(tmp_path)
    place = tmp_path / "Landmarks/S005/001"
    place.mkdir(parents=True)
    points = np.stack(np.meshgrid([30, 60], [20, 50]), -1).reshape(-1, 2)
    np.savetxt(place / f"{plain.names[0][:-4]}_landmarks.txt", points)
    cut = convert_ckplus(tmp_path)
    assert (cut.images[0] != plain.images[0]).any()
    np.testing.assert_array_equal(cut.images[1], plain.images[1])


def test_ckplus_class_folders(tmp_path):
    write_ckplus_like(tmp_path, 28)
    faces = convert_ckplus(tmp_path)
    assert faces.class_counts.tolist() == [0, 4, 4, 4, 4, 4, 4, 4]
    assert set(faces.subjects) == {"S005", "S006", "S007"}
    assert subject_of("holiday.png") == ""


def test_ckplus_faults(tmp_path):
    write_ckplus_tree(tmp_path, 1)
    label = sorted((tmp_path / "Emotion").rglob("*.txt"))[0]
    label.write_text("9.0")
    with pytest.raises(UserError, match="must hold a code from 0 to 7"):
        convert_ckplus(tmp_path)
    shutil.rmtree(tmp_path / "cohn-kanade-images")
    with pytest.raises(UserError, match="no cohn-kanade-images"):
        convert_ckplus(tmp_path)
    with pytest.raises(UserError, match="no such file"):
        convert_ckplus(tmp_path / "nowhere")


@pytest.mark.parametrize("size", [[], ["--size", "24"]])
def test_commands_write_what_loads_again(tmp_path, size, capsys):
    write_affectnet_like(tmp_path / "mini", {"test": 16}, size=32)
    for arguments in (
        ["affectnet", tmp_path / "mini"],
        ["folder", tmp_path / "mini/labels_test.csv", "--name", "mine"],
    ):
        with pytest.raises(SystemExit) as stop:
            main(["data", *map(str, arguments), "--out", str(tmp_path / "out"), *size])
        assert stop.value.code == 0
    written = (
        ("affectnet_test.npz", "mine_all.npz") if size else ("affectnet_manifest_test.csv", "mine_manifest_all.csv")
    )
    first, second = (Faces.load(tmp_path / "out" / name) for name in written)
    assert first.checksum == second.checksum
    assert first.class_counts.tolist() == [2] * 8
    assert "AffectNet's labels: 0 neutral, 1 happiness, 2 sadness" in capsys.readouterr().err


def test_unreadable_images_are_left_out_only_when_asked(tmp_path, capsys):
    write_affectnet_like(tmp_path, {"test": 16}, size=32)
    (tmp_path / "images" / "test_00003.jpg").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"test_00003\.jpg: not a readable image.*--skip-bad"):
        convert_affectnet(tmp_path, size=24)
    for arguments in (["folder", "--split", "test", "--name", "affectnet"], ["affectnet"], ["ckplus"]):
        source = tmp_path / "labels_test.csv"
        with pytest.raises(SystemExit) as stop:
            main(["data", *arguments, str(source), "--size", "24", "--skip-bad", "--out", str(tmp_path / "out")])
        assert stop.value.code == 0
        assert "left out 1 unreadable images, first" in capsys.readouterr().err
        written = tmp_path / "out" / ("ckplus_all.npz" if arguments == ["ckplus"] else "affectnet_test.npz")
        assert len(Faces.load(written)) == 15


def test_drawn_faces_repeat_and_differ():
    first, again, other = make_faces(96, 1), make_faces(96, 1), make_faces(96, 2)
    assert first.checksum == again.checksum != other.checksum
    assert (first.class_counts > 0).all()
    np.testing.assert_allclose(first.label_dist.sum(axis=1), 1, atol=1e-6)
    # Ten votes, single ones dropped: every share is at least 2/10.
    assert first.label_dist[first.label_dist > 0].min() >= 0.2
    # Some faces are agreed on, some are not.
    assert 0.1 < (first.label_dist.max(axis=1) == 1).mean() < 0.8


@pytest.mark.parametrize("style", STYLES)
def test_the_expression_alone_changes_a_face(style):
    # Equal seeds draw equal heads, poses and noise.
    drawn = [draw_faces(np.full(24, index), 4, style=style)[0].astype(np.float64) for index in range(8)]
    for a in range(8):
        for b in range(a):
            # Grey levels, mean over the image: brows, eyes and mouth are about a tenth of it.
            assert np.abs(drawn[a] - drawn[b]).mean(axis=(1, 2)).min() > 0.3, (a, b)


def test_an_expression_looks_alike_on_other_heads():
    def changes(seed):
        drawn = [draw_faces(np.full(40, i), seed, style="ckplus")[0].astype(np.float64).mean(axis=0) for i in range(8)]
        return np.stack([(image - drawn[0]).ravel() for image in drawn[1:]])

    correlation = np.corrcoef(changes(1), changes(2))[:7, 7:]
    assert (correlation.argmax(axis=1) == np.arange(7)).all()
    assert np.diag(correlation).min() > 0.5


def test_one_identity_keeps_its_head():
    images, _ = draw_faces(np.zeros(6, np.int64), 3, style="ckplus", identities=np.array([0, 0, 0, 1, 1, 1]))
    flat = images.reshape(6, -1).astype(np.float64)
    same = np.corrcoef(flat)
    assert same[0, 1:3].mean() > same[0, 3:].mean()


def test_ferplus_like_files(tmp_path):
    paths = write_ferplus_like(tmp_path, 20, 10, 10, seed=1)
    loaded = {split: Faces.load(path) for split, path in paths.items()}
    assert {split: len(faces) for split, faces in loaded.items()} == {"train": 20, "valid": 10, "test": 10}
    assert len({faces.checksum for faces in loaded.values()}) == 3
    with pytest.raises(ValueError, match="style"):
        draw_faces(np.zeros(1, int), 0, style="cubist")
    with pytest.raises(ValueError, match="expressions"):
        draw_faces(np.array([8]), 0)
