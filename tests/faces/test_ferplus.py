"""FER+'s label modes against a second writing of its rules, its file formats, and the real sample."""

import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ngd_fast.cli import main
from ngd_fast.errors import UserError
from ngd_fast.faces import ferplus
from ngd_fast.faces.dataset import Faces
from ngd_fast.faces.ferplus import LABEL_MODES, convert_ferplus, label_distribution
from ngd_fast.synthetic.face_files import write_fer2013


def _reference(votes, mode):
    """arXiv 1608.01041 and FER+'s reader, told by levels of equal counts instead of a loop over maxima."""
    v = np.where(np.asarray(votes) > 1, votes, 0).astype(float)
    total, best = v.sum(), int(v.argmax())
    if total == 0:
        return None
    if mode == "plurality":
        return v[:8] / v[:8].sum() if best < 8 else None
    if mode == "majority":
        return np.eye(8)[best] if best < 8 and 2 * v[best] > total else None
    if mode == "multi_target":
        chosen = v >= 0.3 * total
        if best >= 8 or 2 * v[chosen].sum() <= total:
            return None
        return chosen[:8] / chosen[:8].sum()
    chosen = np.zeros(10, bool)
    for level in np.unique(v)[::-1]:
        if v[chosen].sum() >= 0.75 * total or chosen.sum() >= 3:
            break
        here = v == level
        chosen |= here & (np.arange(10) < 8)
        if here[8:].any():
            break
    if 2 * v[chosen].sum() <= total or chosen.sum() > 3:
        return None
    return np.where(chosen, v, 0)[:8] / v[chosen].sum()


@settings(max_examples=600, deadline=None)
@given(votes=st.lists(st.integers(0, 10), min_size=10, max_size=10), mode=st.sampled_from(LABEL_MODES))
def test_rules_agree_with_a_second_writing(votes, mode):
    expected, result = _reference(votes, mode), label_distribution(votes, mode)
    assert (expected is None) == (result is None)
    if result is not None:
        np.testing.assert_allclose(result[0], expected, atol=1e-6)
        assert result[0][result[1]] > 0


@pytest.mark.parametrize(
    ("votes", "mode", "kept"),
    [
        # Single votes are outliers.
        ([5, 1, 1, 1, 1, 1, 0, 0, 0, 0], "plurality", [1, 0, 0, 0, 0, 0, 0, 0]),
        # Exactly half is no majority.
        ([5, 5, 0, 0, 0, 0, 0, 0, 0, 0], "majority", None),
        ([6, 4, 0, 0, 0, 0, 0, 0, 0, 0], "majority", [1, 0, 0, 0, 0, 0, 0, 0]),
        # "unknown" first, and "unknown" after the emotions that hold most votes.
        ([4, 0, 0, 0, 0, 0, 0, 0, 6, 0], "crossentropy", None),
        ([6, 0, 0, 0, 0, 0, 0, 0, 4, 0], "crossentropy", [1, 0, 0, 0, 0, 0, 0, 0]),
        # Four emotions tie for the last places.
        ([4, 2, 2, 2, 0, 0, 0, 0, 0, 0], "crossentropy", None),
        ([4, 3, 3, 0, 0, 0, 0, 0, 0, 0], "probability", [0.4, 0.3, 0.3, 0, 0, 0, 0, 0]),
        # Equal weights, whatever the votes.
        ([6, 4, 0, 0, 0, 0, 0, 0, 0, 0], "multi_target", [0.5, 0.5, 0, 0, 0, 0, 0, 0]),
        ([0, 0, 0, 0, 0, 0, 0, 0, 0, 10], "plurality", None),
        ([1, 1, 1, 1, 1, 1, 1, 1, 1, 1], "multi_target", None),
    ],
)
def test_rules_by_hand(votes, mode, kept):
    result = label_distribution(votes, mode)
    if kept is None:
        assert result is None
    else:
        np.testing.assert_allclose(result[0], kept, atol=1e-6)


def test_real_sample_equals_the_published_arrays(shared_data):
    folder = shared_data / "ferplus"
    splits, remarks = convert_ferplus([folder / "fer2013new_sample.csv"], folder / "fer2013_sample.csv")
    assert [len(faces) for faces in splits.values()] == [396, 100]
    assert [("not the full official file" in remark) for remark in remarks] == [True, False] * 2
    for split, faces in splits.items():
        published = Faces.load(folder / f"ferplus_{split}.npz")
        rows = [published.names.index(name) for name in faces.names]
        np.testing.assert_array_equal(faces.images, published.images[rows])
        np.testing.assert_allclose(faces.label_dist, published.label_dist[rows], atol=1e-7)


def test_ties_are_counted_and_can_be_left_out(shared_data):
    files = [shared_data / "ferplus" / "fer2013new_sample.csv"], shared_data / "ferplus" / "fer2013_sample.csv"
    whole, said = convert_ferplus(*files)
    cut, said_of_cut = convert_ferplus(*files, drop_ties=True)
    # 21 of the 496 rows that plurality keeps, counted with the csv module alone
    assert sum(len(whole[split]) - len(cut[split]) for split in whole) == 21
    for split, faces in cut.items():
        dist = np.sort(faces.label_dist, axis=1)
        assert (dist[:, -1] > dist[:, -2]).all()
        assert set(faces.names) < set(whole[split].names)
    assert said[0] == said_of_cut[0]  # known numbers of rows are those with ties
    assert "labelled by the first of its classes" in said[1]
    assert "left out" in said_of_cut[1]


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    return write_fer2013(tmp_path_factory.mktemp("fer"), {"train": 60, "valid": 20, "test": 20}, label_folders=True)


def test_both_label_sources_give_the_same_faces(official):
    joined, _ = convert_ferplus([official / "fer2013new.csv"], official / "fer2013.csv", label_mode="crossentropy")
    pngs, _ = convert_ferplus([official], label_mode="crossentropy")
    mixed, _ = convert_ferplus(
        [official / "fer2013new.csv", official / "FER2013Train" / "label.csv"],
        official / "fer2013.csv",
        label_mode="crossentropy",
    )
    assert list(mixed) == ["train"]
    for other in (pngs["train"], mixed["train"]):
        assert other.checksum == joined["train"].checksum
        assert other.names == joined["train"].names


def test_the_last_of_two_rows_with_one_name_is_the_picture(official, tmp_path):
    # In FER+'s folders four PNGs were written twice.
    lines = (official / "fer2013new.csv").read_text().splitlines()
    cells = lines[1].split(",")
    cells[1] = lines[5].split(",")[1]
    (tmp_path / "fer2013new.csv").write_text("\n".join([lines[0], ",".join(cells), *lines[2:]]) + "\n")
    joined, _ = convert_ferplus([official / "fer2013new.csv"], official / "fer2013.csv")
    doubled = ferplus._read_joined(official / "fer2013.csv", tmp_path / "fer2013new.csv")["train"]
    train = tmp_path / "FER2013Train"
    train.mkdir()
    (train / "label.csv").write_text(f"{cells[1]},9,0,0,0,0,0,0,0,0,0\n")
    rows = ferplus._read_folder(train, doubled, None)
    np.testing.assert_array_equal(rows.pixels[0], doubled.pixels[4])
    assert len(joined["train"]) > 0


def test_names_in_label_csv_keep_their_case(official, tmp_path):
    picture = sorted((official / "FER2013Train").glob("*.png"))[0]
    train = tmp_path / "FER2013Train"
    train.mkdir()
    shutil.copy(picture, train / "A.PNG")
    (train / "label.csv").write_text("A.PNG,9,0,0,0,0,0,0,0,0,0\n")
    assert convert_ferplus([train])[0]["train"].names == ["A.PNG"]
    (train / "label.csv").write_text("")
    with pytest.raises(UserError, match=r"label\.csv: holds no rows"):
        convert_ferplus([train])


def test_eval_label_mode(official):
    same, _ = convert_ferplus([official], label_mode="plurality")
    theirs, _ = convert_ferplus([official], label_mode="plurality", eval_label_mode="majority")
    assert theirs["train"].checksum == same["train"].checksum
    assert len(theirs["valid"]) < len(same["valid"])


def test_counts_are_compared_only_with_full_files():
    assert "as known" in ferplus._compare("label.csv", "majority", "test", 3573, 3137)
    assert ferplus._compare("label.csv", "majority", "test", 3573, 3138).startswith("warning")
    assert "not compared" in ferplus._compare("label.csv", "majority", "test", 3572, 3137)
    assert "no known number" in ferplus._compare("label.csv", "plurality", "test", 3573, 3137)


def _copy(official, tmp_path, name, change):
    for file in ("fer2013.csv", "fer2013new.csv"):
        shutil.copy(official / file, tmp_path / file)
    path = tmp_path / name
    path.write_text(change(path.read_text()))
    return convert_ferplus([tmp_path / "fer2013new.csv"], tmp_path / "fer2013.csv")


def _edit_line(text, number, edit):
    lines = text.splitlines()
    lines[number - 1] = edit(lines[number - 1])
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("fer2013.csv", lambda t: t[: len(t) // 2], r"fer2013\.csv: line \d+ has 2 cells.*truncated"),
        ("fer2013.csv", lambda t: "\n".join(t.splitlines()[:50]) + "\n", "ends after 49 rows.*truncated"),
        ("fer2013new.csv", lambda t: "\n".join(t.splitlines()[:50]) + "\n", "ends after 49 rows.*truncated"),
        ("fer2013.csv", lambda t: _edit_line(t, 7, lambda line: line.replace(" ", " x", 1)), "line 7: has .* pixels"),
        ("fer2013.csv", lambda t: _edit_line(t, 7, lambda line: "0,300" + line[3:]), "line 7: has"),
        ("fer2013new.csv", lambda t: _edit_line(t, 9, lambda line: line.replace("Training", "PublicTest")), "line 9"),
        (
            "fer2013new.csv",
            lambda t: _edit_line(t, 9, lambda line: line.replace("Training", "Train")),
            "Usage is 'Train'",
        ),
        ("fer2013new.csv", lambda t: _edit_line(t, 9, lambda line: line[:-1] + "x"), "line 9: must hold ten vote"),
        ("fer2013new.csv", lambda t: t.replace("neutral", "calm", 1), "lacks the columns neutral"),
        ("fer2013.csv", lambda t: "", "has no header"),
    ],
)
def test_faulty_files(official, tmp_path, name, change, message):
    with pytest.raises(UserError, match=message):
        _copy(official, tmp_path, name, change)


def test_missing_pictures_are_counted(official, tmp_path):
    shutil.copytree(official / "FER2013Train", tmp_path / "FER2013Train")
    victims = sorted((tmp_path / "FER2013Train").glob("*.png"))[:2]
    for victim in victims:
        victim.unlink()
    with pytest.raises(UserError, match=rf"2 of \d+ images do not exist, first .*{victims[0].name}.*--image-root"):
        convert_ferplus([tmp_path])
    found, _ = convert_ferplus([tmp_path], image_root=official)
    assert len(found["train"]) > 50


def test_labels_that_lack_their_pixels(official):
    with pytest.raises(UserError, match="give --fer2013"):
        convert_ferplus([official / "fer2013new.csv"])
    with pytest.raises(UserError, match="its rows have no names"):
        convert_ferplus([official], official / "fer2013.csv")
    with pytest.raises(ValueError, match="label_mode"):
        convert_ferplus([official], label_mode="vote")


def test_command_writes_what_loads_again(official, tmp_path, capsys):
    arguments = ["--fer2013", official / "fer2013.csv", "--labels", official / "fer2013new.csv", "--out", tmp_path]
    with pytest.raises(SystemExit) as stop:
        main(["data", "ferplus", *map(str, arguments), "--label-mode", "multi_target"])
    assert stop.value.code == 0
    assert "contempt" in capsys.readouterr().out
    expected, _ = convert_ferplus([official / "fer2013new.csv"], official / "fer2013.csv", label_mode="multi_target")
    for split, faces in expected.items():
        assert Faces.load(tmp_path / f"ferplus_{split}.npz").checksum == faces.checksum
        assert (tmp_path / f"ferplus_manifest_{split}.csv").read_text().count("\n") == len(faces) + 1
    assert (tmp_path / "class_map_ferplus.json").exists()
    with pytest.raises(SystemExit) as stop:
        main(["data", "check", str(tmp_path / "ferplus_train.npz"), str(tmp_path / "ferplus_train.npz")])
    assert stop.value.code == 0
    with pytest.raises(SystemExit) as stop:
        main(["data", "ferplus", "--labels", str(tmp_path / "nowhere"), "--out", str(tmp_path / "new")])
    assert stop.value.code == 2
    assert "no such file" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
