"""What ``python -m ngd_fast.bench.fuzz`` throws bytes at: every reader of the package, each with inputs to start from.

A target takes an empty folder and bytes. It may raise :class:`~ngd_fast.errors.UserError` and nothing else, must not
give NaN or infinity away, and writes nowhere else. Containers that guard their content by checksums (ZIP, the bank) are
made around the bytes, so that the reader behind them is reached.
"""

import io
import json
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from ngd_fast.artifacts.files import save_npz
from ngd_fast.faces.classes import CLASS_NAMES

_MARK = b"\x00--member--\x00"


@dataclass(frozen=True)
class Target:
    """``run(folder, data)`` reads ``data``; ``seeds()`` are inputs that it accepts."""

    run: Callable[[Path, bytes], None]
    seeds: Callable[[], list[bytes]]


def finite(*arrays) -> None:
    for array in arrays:
        if array is not None and not np.isfinite(array).all():
            raise AssertionError("NaN or infinity was let through")


def _npy(array) -> bytes:
    file = io.BytesIO()
    np.save(file, np.asarray(array))
    return file.getvalue()


def _members(**arrays) -> bytes:
    return _MARK.join(name.encode() + b"\x00" + _npy(array) for name, array in arrays.items())


def _zip(path: Path, data: bytes) -> None:
    """The members as an NPZ with right checksums."""
    with zipfile.ZipFile(path, "w") as file:
        for part in data.split(_MARK):
            name, _, content = part.partition(b"\x00")
            name = "".join(c for c in name.decode("latin1") if c.isalnum() or c == "_")
            file.writestr(f"{name}.npy", content)


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def texts(*texts: str) -> Callable[[], list[bytes]]:
    return lambda: [text.encode() for text in texts]


# -- arrays -----------------------------------------------------------------------------------------------------------


def _face_arrays() -> dict:
    images = np.arange(3 * 9 * 9, dtype=np.uint8).reshape(3, 9, 9)
    dist = np.eye(8, dtype=np.float32)[[0, 3, 5]]
    return {"images": images, "label_dist": dist, "labels": np.array([0, 3, 5]), "names": np.array([b"a", b"b", b"c"])}


def _faces_raw(folder: Path, data: bytes) -> None:
    from ngd_fast.faces.dataset import Faces

    faces = Faces.load(write(folder / "faces.npz", data))
    finite(faces.label_dist)
    _ = faces.checksum


def _faces_members(folder: Path, data: bytes) -> None:
    from ngd_fast.faces.dataset import Faces

    _zip(folder / "faces.npz", data)
    faces = Faces.load(folder / "faces.npz")
    finite(faces.label_dist)
    json.dumps(faces.names).encode()


def _faces_seeds() -> list[bytes]:
    files = [io.BytesIO(), io.BytesIO()]
    np.savez(files[0], **_face_arrays())
    np.savez_compressed(files[1], **_face_arrays())
    return [file.getvalue() for file in files]


@cache
def some_maps():
    from ngd_fast.eeg.manifest import Topomaps

    rng = np.random.default_rng(0)
    n = 8
    rows = {name: np.arange(n) // divisor for name, divisor in (("subject", 4), ("trial", 2), ("window", 1))}
    return Topomaps(
        maps=rng.random((n, 2, 8, 8)), power=rng.random((n, 4, 2)), valence=np.linspace(-1, 1, n),
        arousal=np.linspace(1, -1, n), bands=np.array(["alpha", "beta"]), channels=np.array(["F3", "F4", "P3", "P4"]),
        mask=np.ones((8, 8), bool), meta={"dataset": "fuzz"}, **rows,
    )  # fmt: skip


def _topomap_seeds() -> list[bytes]:
    maps = some_maps()
    arrays = {name: value for name, value in vars(maps).items() if name != "meta"}
    return [_members(**arrays, meta=np.array(json.dumps(maps.meta)))]


def _topomaps(folder: Path, data: bytes) -> None:
    from ngd_fast.eeg.manifest import Topomaps
    from ngd_fast.teacher.config import InputConfig
    from ngd_fast.teacher.inputs import prepare_inputs

    _zip(folder / "maps.npz", data)
    maps = Topomaps.load(folder / "maps.npz")
    finite(maps.maps, maps.power, prepare_inputs(maps, InputConfig()))
    maps.save(folder, "again")


@cache
def _bank():
    from ngd_fast.prototypes.bank import PrototypeBank

    rng = np.random.default_rng(0)
    return PrototypeBank.build(rng.normal(size=(30, 4)), *rng.uniform(-1, 1, (2, 30)), grid=2)


def _bank_target(folder: Path, data: bytes) -> None:
    from ngd_fast.artifacts.files import load_npz
    from ngd_fast.prototypes.bank import _ARRAYS, PrototypeBank, _checksum

    _zip(folder / "bank.npz", data)
    arrays = load_npz(folder / "bank.npz", (*_ARRAYS, "meta"))
    sums = {"sha256": np.array(_checksum(arrays, str(arrays["meta"])))}
    save_npz(folder / "bank.npz", arrays | sums)
    bank = PrototypeBank.load(folder / "bank.npz")
    finite(bank.prototypes, bank.prior, bank.class_prior)
    bank.save(folder / "again.npz")


def _bank_seeds() -> list[bytes]:
    from ngd_fast.prototypes.clusters import build_clusters

    rng = np.random.default_rng(0)
    clusters = build_clusters(rng.normal(size=(30, 4)), *rng.uniform(-1, 1, (2, 30)), k=3)
    return [_members(**bank._arrays(), meta=np.array(json.dumps(bank.meta))) for bank in (_bank(), clusters)]


def prediction_arrays() -> dict:
    labels = np.arange(16) % 8
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(16, 8)).astype(np.float32)
    return {
        "logits": logits, "labels": labels, "names": np.array([f"{i}.png" for i in range(16)]),
        "class_names": np.array(CLASS_NAMES), "dataset": np.array("fuzz_valid"), "meta": np.array("{}"),
        "features": logits / np.linalg.norm(logits, axis=1, keepdims=True), "label_dist": np.eye(8)[labels],
    }  # fmt: skip


def _predictions(folder: Path, data: bytes) -> None:
    from ngd_fast.evaluation.metrics import evaluate_predictions, write_per_class
    from ngd_fast.evaluation.predictions import Predictions

    _zip(folder / "predictions.npz", data)
    found = Predictions.load(folder / "predictions.npz")
    finite(found.logits, found.label_dist, found.features, found.probabilities())
    blocks = evaluate_predictions(found, bootstrap=3)
    json.dumps(blocks, allow_nan=False)
    write_per_class(folder / "per_class.csv", blocks)
    found.save(folder / "again.npz")


# -- recordings and tables --------------------------------------------------------------------------------------------


def _recordings_seeds(version: str) -> list[bytes]:
    import tempfile

    from ngd_fast.synthetic.recordings import write_dreamer

    with tempfile.TemporaryDirectory() as folder:
        path = write_dreamer(
            f"{folder}/d.mat", subjects=2, clips=2, seconds=0.5, baseline_seconds=0.25, version=version
        )
        if version == "v5":
            from scipy.io import loadmat, savemat

            whole = path.read_bytes()
            savemat(path, {"DREAMER": loadmat(path)["DREAMER"]}, do_compression=False)
            return [whole, path.read_bytes()]
        return [path.read_bytes()]


def _mat(folder: Path, data: bytes) -> None:
    from ngd_fast.eeg.dreamer import open_dreamer
    from ngd_fast.eeg.pipeline import EegConfig, topomaps_from_recordings

    source = open_dreamer(write(folder / "DREAMER.mat", data))
    config = EegConfig(window_seconds=0.25, power={"segment_seconds": 0.25, "bands": {"beta": (13.0, 30.0)}})
    maps = topomaps_from_recordings(source, config)
    finite(maps.maps, maps.power)


@cache
def _session() -> tuple[bytes, bytes]:
    import tempfile

    from ngd_fast.synthetic.recordings import write_mahnob

    with tempfile.TemporaryDirectory() as folder:
        write_mahnob(folder, subjects=1, sessions=1, seconds=2, around_seconds=1, rate=64, unrated=0)
        (xml,) = Path(folder).glob("*/session.xml")
        (bdf,) = Path(folder).glob("*/*.bdf")
        return xml.read_bytes(), bdf.read_bytes()


def _read_sessions(folder: Path, xml: bytes, bdf: bytes) -> None:
    from ngd_fast.eeg.mahnob import open_mahnob
    from ngd_fast.eeg.pipeline import EegConfig, topomaps_from_recordings

    write(folder / "130" / "session.xml", xml)
    write(folder / "130" / "a.bdf", bdf)
    config = EegConfig(
        window_seconds=0.5, power={"segment_seconds": 0.5, "bands": {"beta": (13.0, 30.0)}},
        cleaning={"band_pass": (1.0, None)},
    )  # fmt: skip
    maps = topomaps_from_recordings(open_mahnob(folder), config)
    finite(maps.maps, maps.power)


_TABLE = "subject,trial,window,{},valence,arousal\n".format(
    ",".join(f"{c}_{b}" for c in ("Fp1", "F3", "F4", "C3", "C4", "P3") for b in ("alpha", "beta"))
)


def _table_seeds() -> list[bytes]:
    rows = [f"S{s},{t},{w},{','.join(str(1.5 + (7 * s + 5 * t + 3 * w + i * i) % 11) for i in range(12))},{s + 2},{t}"
            for s in (1, 2) for t in (1, 2) for w in (0, 1)]  # fmt: skip
    text = _TABLE + "\n".join(rows) + "\n"
    return [text.encode(), text.replace(",", ";").replace(".5", ",5").encode(), text.encode() + _MARK + text.encode()]


def _table(folder: Path, data: bytes) -> None:
    from ngd_fast.eeg.pipeline import MapConfig
    from ngd_fast.eeg.table import TableMapping, topomaps_from_table

    table, _, ratings = data.partition(_MARK)
    if ratings:
        write(folder / "ratings.csv", ratings)
    for mapping in (TableMapping(), TableMapping(log=False)):
        maps = topomaps_from_table(
            write(folder / "t.csv", table), MapConfig(), mapping, folder / "ratings.csv" if ratings else None
        )
        finite(maps.maps, maps.power)


# -- faces ------------------------------------------------------------------------------------------------------------


def _image_seeds() -> list[bytes]:
    from PIL import Image

    grey = Image.fromarray(np.arange(9 * 7, dtype=np.uint8).reshape(9, 7))
    kinds = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM", "JPEG2000", "AVIF")
    seeds = []
    for kind in kinds:
        for image in (grey, grey.convert("RGB"), grey.convert("P"), grey.convert("I;16")):
            file = io.BytesIO()
            try:
                image.save(file, kind)
            except (OSError, ValueError, KeyError):
                continue
            seeds.append(file.getvalue())
    return seeds


def _image(folder: Path, data: bytes) -> None:
    from ngd_fast.faces.images import decode_image, longest_side

    path = write(folder / "a.png", data)
    longest_side([str(path)], 224)
    image = decode_image(path, side=16)
    if image.shape != (16, 16, 3):
        raise AssertionError(image.shape)
    decode_image(path, grey=True, side=8, box=(-1, -1, 5.5, 5))


def _face_list(folder: Path, data: bytes) -> None:
    from ngd_fast.faces.dataset import Faces

    table, _, class_map = data.partition(_MARK)
    if class_map:
        write(folder / "class_map.json", class_map)
    for name in ("a.png", "b.png"):
        write(folder / name, b"")
    faces = Faces.load(write(folder / "list.csv", table))
    finite(faces.label_dist)


def _class_map(folder: Path, data: bytes) -> None:
    from ngd_fast.faces.classes import LabelMap

    str(LabelMap.load(write(folder / "map.json", data)).names)
    _zip(folder / "faces.npz", _members(**_face_arrays()))
    from ngd_fast.faces.dataset import Faces

    finite(Faces.load(folder / "faces.npz", class_map=folder / "map.json").label_dist)


def _ferplus(folder: Path, data: bytes) -> None:
    from ngd_fast.faces.ferplus import convert_ferplus

    votes, _, pixels = data.partition(_MARK)
    splits, _ = convert_ferplus([write(folder / "new.csv", votes)], write(folder / "fer2013.csv", pixels))
    finite(*(faces.label_dist for faces in splits.values()))


def _ferplus_seeds() -> list[bytes]:
    votes = "Usage,Image name,neutral,happiness,surprise,sadness,anger,disgust,fear,contempt,unknown,NF\n"
    usages = ("Training", "PublicTest", "PrivateTest")
    rows = "".join(f"{usage},a{i}.png,4,0,0,1,3,2,0,0,0,0\n" for i, usage in enumerate(usages))
    pixels = "emotion,pixels,Usage\n" + "".join(f"0,{'7 ' * 2304},{usage}\n" for usage in usages)
    return [(votes + rows).encode() + _MARK + pixels.encode()]


def _affectnet(folder: Path, data: bytes) -> None:
    from ngd_fast.faces.affectnet import convert_affectnet

    write(folder / "images" / "0.jpg", _image_seeds()[2])
    if data.startswith((b"\x93NUMPY", b"PK")):
        write(folder / "annotations" / "0_exp.npy", data)
        convert_affectnet(folder)
    else:
        splits, _ = convert_affectnet(write(folder / "list.csv", data), image_root=folder / "images", size=16)
        finite(*(faces.label_dist for faces in splits.values()))


def _ckplus(folder: Path, data: bytes) -> None:
    from ngd_fast.faces.ckplus import convert_ckplus

    label, _, landmarks = data.partition(_MARK)
    write(folder / "cohn-kanade-images" / "S005" / "001" / "S005_001_00000011.png", _image_seeds()[0])
    write(folder / "Emotion" / "S005" / "001" / "S005_001_00000011_emotion.txt", label)
    write(folder / "Landmarks" / "S005" / "001" / "S005_001_00000011_landmarks.txt", landmarks)
    convert_ckplus(folder)


def _bdf_seeds() -> list[bytes]:
    return [_session()[1], _session()[1].replace(struct.pack("8s", b"4       "), struct.pack("8s", b"99999999"), 1)]


DATA = {
    "faces_npz": Target(_faces_raw, _faces_seeds),
    "faces_arrays": Target(_faces_members, lambda: [_members(**_face_arrays())]),
    "topomaps": Target(_topomaps, _topomap_seeds),
    "bank": Target(_bank_target, _bank_seeds),
    "predictions": Target(_predictions, lambda: [_members(**prediction_arrays())]),
    "mat_v5": Target(_mat, lambda: _recordings_seeds("v5")),
    "mat_v73": Target(_mat, lambda: _recordings_seeds("v7.3")),
    "session_xml": Target(lambda folder, data: _read_sessions(folder, data, _session()[1]), lambda: [_session()[0]]),
    "bdf": Target(lambda folder, data: _read_sessions(folder, _session()[0], data), _bdf_seeds),
    "eeg_table": Target(_table, _table_seeds),
    "image": Target(_image, _image_seeds),
    "face_list": Target(
        _face_list,
        lambda: [
            b"path,label\na.png,happy\nb.png,fear\n", b"filepath;label_id\na.png;1\n" + _MARK + b'{"happy": 1}',
            ("path," + ",".join(CLASS_NAMES) + "\na.png,1,0,0,0,0,0,0,0\n").encode(),
        ],
    ),
    "class_map": Target(_class_map, texts(json.dumps({n: i for i, n in enumerate(CLASS_NAMES)}), '{"1": "joy"}')),
    "ferplus": Target(_ferplus, _ferplus_seeds),
    "affectnet": Target(
        _affectnet,
        lambda: [_npy(np.array("3")), _npy(np.array(1)),
                 b"subDirectory_filePath,face_x,face_y,face_width,face_height,expression\n0.jpg,1,1,5,5,3\n"],
    ),
    "ckplus": Target(_ckplus, lambda: [b"3.0" + _MARK + b"1 2\n5 6\n", b"1.0" + _MARK + b"1.5e0 2\n5 6e0\n"]),
}  # fmt: skip
"""Readers of arrays, recordings, tables and faces."""
