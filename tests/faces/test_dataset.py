"""Faces from NPZ, CSV and folders, and everything that can be wrong with them."""

import json
import tracemalloc

import numpy as np
import pytest
from PIL import Image, features

from ngd_fast.artifacts.files import save_npz
from ngd_fast.errors import UserError
from ngd_fast.faces.classes import AFFECTNET_IDS, CLASS_NAMES, LabelMap, class_index
from ngd_fast.faces.dataset import Faces
from ngd_fast.faces.images import decode_image, resize_images, to_grey
from ngd_fast.faces.pixels import SourcePixels, drop_unreadable


def _images(count, channels=1, side=8, seed=0):
    shape = (count, side, side) + ((3,) if channels == 3 else ())
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def _arrays(count=5):
    dist = np.eye(8, dtype=np.float32)[np.arange(count) % 8]
    return {"images": _images(count), "label_dist": dist, "names": np.array([b"a%d.png" % i for i in range(count)])}


def _write_images(folder, names):
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(_images(1, seed=i)[0]).save(folder / name)


def _csv(path, header, rows):
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def test_synonyms_name_the_same_class():
    assert [class_index(name) for name in ("Happy", " sad ", "ANGRY", "contempt")] == [1, 3, 4, 7]
    assert class_index("sleepy") is None


@pytest.mark.parametrize(
    ("mapping", "message"),
    [({}, "empty"), ({"sleepy": 0}, "sleepy"), ({"happy": 1, "sad": 1}, "two classes"), ({"happy": "x"}, "integer id")],
)
def test_class_map_faults(mapping, message):
    with pytest.raises(UserError, match=message):
        LabelMap(mapping)


def test_class_map_reads_both_directions():
    forward, backward = LabelMap({"happy": 1, "sad": 2}), LabelMap({"1": "happy", "2": "sad"})
    assert forward.by_id == backward.by_id == {1: 1, 2: 3}
    assert forward.index_of_id("2.0") == 3
    assert forward.index_of_id("2.5") is None
    assert forward.index_of_name("fear") is None


def test_npz_round_trip(tmp_path):
    faces = Faces(
        images=_images(6, 3), label_dist=_arrays(6)["label_dist"], subjects=list("aabbcc"), names=list("uvwxyz")
    )
    faces.save(tmp_path / "f.npz")
    back = Faces.load(tmp_path / "f.npz")
    np.testing.assert_array_equal(back.images, faces.images)
    assert back.names == faces.names
    assert back.subjects == faces.subjects
    assert back.checksum == faces.checksum
    changed = _images(6, 3)
    changed[0, 0, 0, 0] ^= 1
    assert Faces(images=changed, label_dist=faces.label_dist).checksum != faces.checksum


def test_unlabelled_rows_and_subset():
    dist = _arrays(4)["label_dist"]
    dist[2] = 0
    faces = Faces(images=_images(4), label_dist=dist)
    assert faces.labels.tolist() == [0, 1, -1, 3]
    part = faces.subset(np.array([False, True, True, False]))
    assert part.labels.tolist() == [1, -1]
    np.testing.assert_array_equal(part.images, faces.images[1:3])
    assert faces.class_counts.tolist() == [1, 1, 0, 1, 0, 0, 0, 0]


def test_npz_labels_keep_the_winner_of_a_tie(tmp_path):
    arrays = _arrays(1) | {"label_dist": np.full((1, 8), 1 / 8, np.float32), "labels": np.array([6])}
    save_npz(tmp_path / "f.npz", arrays)
    assert Faces.load(tmp_path / "f.npz").labels.tolist() == [6]


def test_npz_in_another_class_order(tmp_path):
    save_npz(tmp_path / "f.npz", _arrays(8))
    faces = Faces.load(tmp_path / "f.npz", class_map={name: number for number, name in AFFECTNET_IDS.items()})
    assert [CLASS_NAMES[label] for label in faces.labels] == list(AFFECTNET_IDS.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": _images(5).astype(np.float32)}, "images must be uint8"),
        ({"images": _images(5).reshape(5, 64)}, "images must be uint8"),
        ({"images": _images(0).reshape(0, 8, 8)}, "has 0 images and 5 label_dist"),
        ({"label_dist": np.full((5, 8), 0.2, np.float32)}, "5 rows of label_dist.*row 0 sums to 1.6"),
        ({"label_dist": np.eye(7, dtype=np.float32)[:5]}, "label_dist must be float"),
        ({"label_dist": np.eye(8, dtype=np.float32)[:4]}, "has 5 images and 4 label_dist"),
        ({"label_dist": np.eye(8, dtype=np.int64)[:5]}, "label_dist must be float"),
        ({"labels": np.array([0, 1, 2, 3, 8])}, "labels must lie in"),
        ({"labels": np.array([0, 1, 2, 3])}, "has 5 images and 4 labels"),
        ({"labels": np.array([0, 1, 2, 3, 255], np.uint8), "label_dist": None}, "labels must lie in"),
        ({"labels": np.array([0, 1, 2, 1.7, np.nan]), "label_dist": None}, r"must be integers \[N\], are float64"),
        ({"labels": np.array(["happy"] * 5), "label_dist": None}, r"labels must be integers \[N\], are <U5 \[5\]"),
        ({"labels": np.zeros((5, 1), np.int64)}, r"labels must be integers \[N\], are int64 \[5, 1\]"),
        ({"names": np.array([b"a"])}, "has 5 images and 1 names"),
        ({"names": np.array(list("abcde"), object)}, "array of Python objects.*array.astype"),
    ],
)
def test_npz_faults(tmp_path, change, message):
    np.savez(tmp_path / "f.npz", **{k: v for k, v in (_arrays() | change).items() if v is not None})
    with pytest.raises(UserError, match=message):
        Faces.load(tmp_path / "f.npz")


def test_npz_labels_that_are_none_with_a_class_map(tmp_path):
    save_npz(tmp_path / "f.npz", _arrays() | {"labels": np.zeros((5, 1), np.int64)})
    with pytest.raises(UserError, match=r"labels must be integers \[N\], are int64 \[5, 1\]"):
        Faces.load(tmp_path / "f.npz", class_map=dict(zip(CLASS_NAMES, range(8))))


def test_npz_names_and_subjects_are_texts(tmp_path):
    save_npz(tmp_path / "f.npz", _arrays(1) | {"names": np.array([b"caf\xe9.png"]), "subjects": np.array([b"S005"])})
    faces = Faces.load(tmp_path / "f.npz")
    assert faces.names == ["caf\ufffd.png"]
    assert faces.subjects == ["S005"]


def test_a_file_of_another_kind_is_named(tmp_path):
    (tmp_path / "list.tsv").write_text("path\tlabel_name\n")
    with pytest.raises(UserError, match=r"list\.tsv: wanted an NPZ \(\.npz\), a list \(\.csv\) or a folder"):
        Faces.load(tmp_path / "list.tsv")


def test_npz_with_nan_in_a_label_is_refused(tmp_path):
    arrays = _arrays()
    arrays["label_dist"][3, 0] = np.nan
    save_npz(tmp_path / "f.npz", arrays)
    with pytest.raises(UserError, match="row 3"):
        Faces.load(tmp_path / "f.npz")


def test_truncated_or_incomplete_npz(tmp_path):
    path = tmp_path / "f.npz"
    save_npz(path, {"images": _images(5)})
    with pytest.raises(UserError, match="lacks label_dist"):
        Faces.load(path)
    save_npz(path, _arrays())
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(UserError, match="truncated"):
        Faces.load(path)
    with pytest.raises(UserError, match="no such file"):
        Faces.load(tmp_path / "other.npz")


@pytest.mark.parametrize("header", ["image_path,label_name", "img,label_str", " FilePath ,Class_Name", "file,label"])
def test_csv_headers_of_the_authors(tmp_path, header):
    _write_images(tmp_path, ["a.png", "b/c.png"])
    faces = Faces.load(_csv(tmp_path / "l.csv", header, ["a.png,happy", "b/c.png,Contempt"]))
    assert faces.labels.tolist() == [1, 7]
    assert decode_image(faces.paths[1], grey=True).shape == (8, 8)


def test_csv_ids_need_a_class_map(tmp_path):
    _write_images(tmp_path, ["a.png"])
    path = _csv(tmp_path / "l.csv", "path,label_id", ["a.png,2"])
    with pytest.raises(UserError, match="--class-map"):
        Faces.load(path)
    (tmp_path / "class_map.json").write_text(json.dumps({"sad": 2}))
    assert Faces.load(path).labels.tolist() == [3]
    with pytest.raises(UserError, match=r"line 2: label '2' is not in the class map"):
        Faces.load(path, class_map={"sad": 3})
    (tmp_path / "class_map.json").write_text("{}")
    with pytest.raises(UserError, match="empty"):
        Faces.load(path)


def test_csv_with_distributions(tmp_path):
    _write_images(tmp_path, ["a.png"])
    header = "path," + ",".join(CLASS_NAMES)
    faces = Faces.load(_csv(tmp_path / "l.csv", header, ["a.png,0.25,0.75,0,0,0,0,0,0"]))
    np.testing.assert_allclose(faces.label_dist[0, :2], [0.25, 0.75])
    with_commas = _csv(tmp_path / "l.csv", header.replace(",", ";"), ["a.png;0,25;0,75;0;0;0;0;0;0"])
    np.testing.assert_array_equal(Faces.load(with_commas).label_dist, faces.label_dist)
    with pytest.raises(UserError, match=r"line 2: .* sums to 1.5"):
        Faces.load(_csv(tmp_path / "l.csv", header, ["a.png,0.75,0.75,0,0,0,0,0,0"]))
    with pytest.raises(UserError, match=r"line 3: .* must be eight numbers, is 1,0,0,0,x,0,0,0"):
        Faces.load(_csv(tmp_path / "l.csv", header, ["a.png,0,0,0,0,0,0,0,0", "a.png,1,0,0,0,x,0,0,0"]))


@pytest.mark.parametrize(
    ("header", "rows", "message"),
    [
        ("where,label", ["a.png,happy"], "no column of image paths.*wanted one of image_path"),
        ("path,label_name", ["a.png,sleepy"], "line 2: label 'sleepy'"),
        ("path,label_name", ["a.png,happy", "a.png"], "line 3 has 1 cells.*truncated"),
        ("path,label_name", [], "holds no rows"),
        (
            "path,label_name",
            ["a.png,happy", "x/y.png,sad", "z.png,sad"],
            r"2 of 3 images do not exist, first .*x/y.png",
        ),
    ],
)
def test_csv_faults(tmp_path, header, rows, message):
    _write_images(tmp_path, ["a.png"])
    with pytest.raises(UserError, match=message):
        Faces.load(_csv(tmp_path / "l.csv", header, rows))


@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_csv_as_spreadsheets_write_it(tmp_path, mark):
    Image.fromarray(_images(1)[0]).save(tmp_path / "a, b.png")
    rows = [["path", "label_name"], ['"a, b.png"', "fear"], ["", ""]]
    text = "".join(mark.join(cells) + "\r\n" for cells in rows)
    (tmp_path / "list.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    faces = Faces.load(tmp_path / "list.csv")
    assert faces.names == ["a, b.png"] and faces.labels.tolist() == [CLASS_NAMES.index("fear")]


def test_csv_that_is_not_utf8_says_so(tmp_path):
    rows = "".join(f"{i}.png,fear\n" for i in range(3000)) + "\xe9.png,fear\n"
    (tmp_path / "list.csv").write_bytes(("path,label_name\n" + rows).encode("latin-1"))
    with pytest.raises(UserError, match=r"list\.csv: not UTF-8 text .*; save it as CSV in UTF-8"):
        Faces.load(tmp_path / "list.csv")


def test_csv_with_paths_of_windows(tmp_path):
    _write_images(tmp_path, ["a/b.png", "a\\c.png"])
    faces = Faces.load(_csv(tmp_path / "l.csv", "path,label_name", ["a\\b.png,fear", "a\\c.png,fear"]))
    assert faces.paths == [str(tmp_path / "a" / "b.png"), str(tmp_path / "a\\c.png")]


def test_csv_without_labels_says_so(tmp_path, capsys):
    _write_images(tmp_path, ["a.png"])
    faces = Faces.load(_csv(tmp_path / "l.csv", "path,emotion", ["a.png,fear"]))
    assert faces.labels.tolist() == [-1]
    assert "l.csv: has no labels; a column of them is called one of label_name, " in capsys.readouterr().err


def test_csv_without_a_header(tmp_path):
    (tmp_path / "list.csv").write_text("")
    with pytest.raises(UserError, match=r"list\.csv: has no header"):
        Faces.load(tmp_path / "list.csv")


def test_image_root_resolves_paths(tmp_path):
    _write_images(tmp_path / "elsewhere", ["a.png"])
    path = _csv(tmp_path / "l.csv", "path,label_name", ["a.png,happy"])
    with pytest.raises(UserError, match="--image-root"):
        Faces.load(path)
    assert len(Faces.load(path, image_root=tmp_path / "elsewhere")) == 1


def test_folders(tmp_path):
    _write_images(tmp_path / "labelled", ["happy/a.png", "happy/b.png", "fear/c.png"])
    assert Faces.load(tmp_path / "labelled").labels.tolist() == [6, 1, 1]
    _write_images(tmp_path / "plain", ["a.png", "b.jpg"])
    assert Faces.load(tmp_path / "plain").labels.tolist() == [-1, -1]
    _write_images(tmp_path / "odd", ["sleepy/a.png"])
    with pytest.raises(UserError, match="name is no class"):
        Faces.load(tmp_path / "odd")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no images"):
        Faces.load(tmp_path / "empty")


def test_folders_say_what_they_leave_out(tmp_path, capsys):
    _write_images(tmp_path, ["happy/a.png", "happy/deep/b.gif", "fear/c.JPEG", "loose.png", "happy/._a.png"])
    for name in ("happy/a.npy", "fear/b.npy", "fear/notes", ".DS_Store"):
        (tmp_path / name).write_bytes(b"")
    faces = Faces.load(tmp_path)
    assert faces.names == ["fear/c.JPEG", "happy/a.png", "happy/deep/b.gif"]
    assert faces.labels.tolist() == [6, 1, 1]
    said = capsys.readouterr().err
    assert "skipped 3 files that are not read as images (2 .npy, 1 without a suffix)" in said
    assert "left out 1 images that lie in no class folder, first " in said and "loose.png" in said
    (tmp_path / "arrays" / "happy").mkdir(parents=True)
    (tmp_path / "arrays" / "happy" / "a.npy").write_bytes(b"")
    with pytest.raises(UserError, match=r"holds no images.*it has 1 files that are not read as images \(1 \.npy\)"):
        Faces.load(tmp_path / "arrays")


def test_grey_and_resize_agree_with_decoding_files(tmp_path):
    image = _images(1, 3, side=30)[0]
    Image.fromarray(image).save(tmp_path / "a.png")
    np.testing.assert_array_equal(to_grey(image[None])[0], decode_image(tmp_path / "a.png", grey=True))
    np.testing.assert_array_equal(resize_images(image[None], 12)[0], decode_image(tmp_path / "a.png", side=12))


def _peak_bytes(function):
    tracemalloc.start()
    try:
        return function(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_pixels_are_held_once_while_they_are_made(tmp_path):
    images = _images(200, 3, side=64)
    _, peak = _peak_bytes(lambda: to_grey(images))
    assert peak < 2 * images.nbytes, "grey, and some images in 32 bits"
    _write_images(tmp_path, ["a.png"])
    faces = Faces(paths=[str(tmp_path / "a.png")] * 200, source="lists")
    decoded, peak = _peak_bytes(lambda: faces.decoded(128))
    assert peak < 1.5 * decoded.images.nbytes
    source = SourcePixels(Faces(paths=faces.paths), 8)
    source.height = source.width = 128
    pixels, peak = _peak_bytes(source.load_all)
    assert peak < 1.5 * pixels.nbytes
    np.testing.assert_array_equal(pixels, decoded.images)


def test_undecodable_image_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG no more")
    with pytest.raises(UserError, match=r"a\.png: not a readable image.*--skip-bad"):
        decode_image(tmp_path / "a.png")


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_a_damaged_avif_is_named_and_can_be_left_out(tmp_path):
    _write_images(tmp_path, ["happy/a.avif", "happy/b.png"])
    damaged = tmp_path / "happy" / "a.avif"
    damaged.write_bytes(damaged.read_bytes().replace(b"pitm", b"    "))  # which image is the primary one
    with pytest.raises(UserError, match=r"a\.avif: not a readable image.*--skip-bad"):
        decode_image(damaged)
    faces = Faces.load(tmp_path)
    assert faces.longest_side(999) == 8
    assert drop_unreadable(faces).names == ["happy/b.png"]


def test_floating_point_pixels_are_refused(tmp_path):
    Image.fromarray(_images(1)[0].astype(np.float32) / 255).save(tmp_path / "a.tiff")
    with pytest.raises(UserError, match=r"a\.tiff: not a readable image \(pixels are floating-point"):
        decode_image(tmp_path / "a.tiff")


def test_real_ferplus(shared_data):
    faces = Faces.load(shared_data / "ferplus" / "ferplus_valid.npz")
    assert (len(faces), faces.images.shape[1:]) == (3553, (48, 48))
    assert faces.class_counts.tolist() == [1335, 899, 456, 412, 319, 34, 74, 24]


@pytest.mark.parametrize(("orientation", "turned"), [(1, 0), (6, 3), (3, 2), (8, 1)])
def test_photographs_are_turned_upright_as_their_exif_says(tmp_path, orientation, turned):
    stored = _images(1)[0]
    tag = Image.Exif()
    tag[0x0112] = orientation
    Image.fromarray(stored).save(tmp_path / "a.png", exif=tag)
    np.testing.assert_array_equal(decode_image(tmp_path / "a.png", grey=True), np.rot90(stored, turned))
