"""Files made to harm: what they promise is judged before they are read, nothing that they name is run or followed."""

import io
import json
import os
import re
import struct
import subprocess
import sys
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from ngd_fast.artifacts import files, headers, html, model_card
from ngd_fast.artifacts.verify import verify
from ngd_fast.config import load_config, parse_yaml
from ngd_fast.eeg.dreamer import open_dreamer
from ngd_fast.eeg.mat5 import Mat5Reader
from ngd_fast.errors import UserError
from ngd_fast.evaluation import latex
from ngd_fast.evaluation.figures_training import read_log
from ngd_fast.faces.classes import LabelMap
from ngd_fast.faces.dataset import Faces
from ngd_fast.faces.images import decode_image, longest_side
from ngd_fast.faces.table import find_column
from ngd_fast.student.checkpoint import load_checkpoint, progress_of
from ngd_fast.student.config import StudentConfig
from ngd_fast.student.networks import build_student
from ngd_fast.student.resnet import ResNet
from ngd_fast.student.weights import load_backbone_weights, load_student, save_student


def npy_header(shape, descr="|u1") -> bytes:
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def npy(array) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def write_npz(path, method=zipfile.ZIP_STORED, **members):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content if isinstance(content, bytes) else npy(content))
    return path


LABELS = np.full((10, 8), 1 / 8, np.float32)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (npy_header((10**9, 48, 48)) + bytes(100), r"images: its header promises uint8 \[1000000000, 48, 48\]"),
        (npy_header((10, -1)), "promises"),
        (npy_header((10**12,), "<U0"), "promises"),
        (npy(np.zeros((9, 8, 8), np.uint8)), "has 9 images and 10 label_dist"),
        (npy(np.zeros(10, "datetime64[s]")), "must hold numbers or texts"),
        (npy(np.zeros((10, 8, 8), np.complex64)), "must hold numbers or texts"),
        (b"no array", "not a readable NPZ file"),
        (npy_header("(" * 3000), "not a readable NPZ file"),
    ],
)
def test_arrays_are_judged_by_their_headers(images, message, tmp_path):
    path = write_npz(tmp_path / "a.npz", images=images, label_dist=LABELS)
    with pytest.raises(UserError, match=message):
        Faces.load(path)


def test_an_archive_that_swells_is_not_read(tmp_path):
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("label_dist.npy", npy(LABELS))
        with archive.open("images.npy", "w") as file:
            file.write(npy_header((10, 2 << 11, 2 << 11)))
            for _ in range(10):
                file.write(bytes(1 << 24))
    with pytest.raises(UserError, match=r"a.npz: 168 MB would come out of 0\.16 MB"):
        Faces.load(path)
    # what is as empty but stored as it is costs its own size
    write_npz(path, images=npy_header((10, 2 << 11, 2 << 11)) + bytes(10 << 24), label_dist=LABELS)
    assert files.npz_shapes(path)["images"] == (10, 4096, 4096)


def test_texts_that_are_none_and_arrays_twice(tmp_path):
    images = np.zeros((10, 8, 8), np.uint8)
    for code in (0xD800, 0x7FFFFFFF):
        names = npy_header((10,), "<U1") + struct.pack("<10I", *[code] * 10)
        with pytest.raises(UserError, match="not a readable NPZ file"):
            Faces.load(write_npz(tmp_path / "a.npz", images=images, label_dist=LABELS, names=names))
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(tmp_path / "a.npz", "a") as archive:
        archive.writestr("images.npy", npy(images))
    with pytest.raises(UserError, match="holds images twice"):
        files.load_npz(tmp_path / "a.npz")


def test_a_file_larger_than_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(headers.os, "sysconf", lambda name: 1 << 12)
    with pytest.raises(UserError, match=r"takes 0\.0 GB to read, this machine has 0\.0 GB"):
        files.load_npz(write_npz(tmp_path / "a.npz", x=np.zeros(1 << 22)))


def test_npy_files(tmp_path):
    for content in (npy_header((10**9,)), b"PK\x03\x04", b"", npy(np.array([{}], object))):
        (tmp_path / "a.npy").write_bytes(content)
        with pytest.raises(UserError, match=r"a\.npy"):
            headers.load_npy(tmp_path / "a.npy")
    (tmp_path / "a.npy").write_bytes(npy(np.array("3")))
    assert headers.load_npy(tmp_path / "a.npy").item() == "3"


# -- images -----------------------------------------------------------------------------------------------------------


def png(width, height, *, rows=0) -> bytes:
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    pixels = zlib.compress(bytes((width + 1) * rows))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("width", "height"), [(60_000, 60_000), (2_000_000_000, 1), (10_000, 10_000)])
def test_an_image_that_promises_more_than_it_holds(width, height, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png(width, height))
    with pytest.raises(UserError, match=r"a\.png: not a readable image"):
        decode_image(path, side=8)
    assert longest_side([str(path)], 224) == 1


def test_the_largest_photographs_are_read(tmp_path):
    """200 million pixels of a camera's noise: a byte for less than 30 of them. Only the header counts here."""
    path = tmp_path / "a.png"
    path.write_bytes(png(16_320, 12_240) + bytes(16_320 * 12_240 // 150))
    assert longest_side([str(path)], 10**6) == 16_320


def test_no_program_is_started_for_a_picture(tmp_path):
    """Pillow hands PostScript to Ghostscript, whatever the file is called."""
    path = tmp_path / "a.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n")
    with pytest.raises(UserError, match="not a readable image"):
        decode_image(path)


def test_a_box_far_larger_than_its_picture(tmp_path):
    Image.new("L", (9, 9)).save(tmp_path / "a.png")
    for box in ((0, 0, 1e9, 1e9), (0, 0, float("nan"), 1), (5, 5, 5, 5)):
        with pytest.raises(UserError, match=r"a\.png: not a readable image"):
            decode_image(tmp_path / "a.png", side=8, box=box)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_is_not_waited_for(tmp_path):
    for name in ("a.png", "metrics.json", "a.npz", "log.jsonl", "a.ckpt", "SHA256SUMS.txt"):
        os.mkfifo(tmp_path / name)
    for read in (
        lambda: decode_image(tmp_path / "a.png"),
        lambda: files.read_json(tmp_path / "metrics.json"),
        lambda: files.load_npz(tmp_path / "a.npz"),
        lambda: read_log(tmp_path / "log.jsonl"),
        lambda: progress_of(tmp_path / "a.ckpt"),
        lambda: verify(tmp_path),
    ):
        with pytest.raises(UserError):
            read()


# -- texts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"a": NaN}', '{"a": -Infinity}', '{"a": 1e999}', '{"a": ' + "9" * 5000 + "}", '{"a": "\\ud800"}',
     '{"a": 1, "a": 2}', "[1]", "", "\ufeff{}"],
)  # fmt: skip
def test_json_that_no_one_writes(text, tmp_path):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=r"a\.json"):
        files.read_json(tmp_path / "a.json")


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi")
)
MERGED = "a: &a {x: 1}\n" + "".join(
    f"{b}: &{b} {{<<: [{', '.join([f'*{a}'] * 9)}]}}\n" for a, b in zip("abcdefgh", "bcdefghi")
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "aliases"), (MERGED, "aliases"), ("a: &a [*a]", "aliases"), ("[" * 5000, "not valid YAML"),
        ("a: !!python/object/apply:os.system ['true']", "not valid YAML"), ("a: 1\na: 2", "the key a stands twice"),
        ("a: 2001-99-99", "not valid YAML"), ("x" * 200_000, "more than any configuration"),
    ],
)  # fmt: skip
def test_yaml_that_swells_or_runs(text, message, tmp_path):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        load_config(StudentConfig, tmp_path / "a.yaml")


def test_yaml_may_name_a_section_twice_by_an_alias():
    assert parse_yaml("a: &a {lr: 1}\nb: {<<: *a, x: 2}", "s") == {"a": {"lr": 1}, "b": {"lr": 1, "x": 2}}


@pytest.mark.parametrize(
    "override",
    ["name=../../x", "name=/tmp/x", "name=", "name=.x", "model.arch=resnet" + "9" * 5000, "x" * 99_999 + "=1",
     "model.embedding_dim=1000000000000", "train.bootstrap=1000000000", "seed=" + "9" * 9999, "a.b" * 3000 + "=1"],
)  # fmt: skip
def test_settings_that_no_run_can_have(override):
    with pytest.raises(UserError) as caught:
        build_student(load_config(StudentConfig, None, [override]).model.arch)
    assert len(str(caught.value)) < 2000


def test_what_is_twice_is_named_twice(tmp_path):
    with pytest.raises(UserError, match="columns 2 and 3 are both called label"):
        find_column(tmp_path / "a.csv", ["path", "label", "label"], ("class", "label"))
    with pytest.raises(UserError, match="id 1 stands for two classes, happiness and sad"):
        LabelMap({"happy": 1, "sad": 1})
    joys = {"happy": 0, "joy": 1, "surprise": 2, "sad": 3, "anger": 4, "disgust": 5, "fear": 6, "neutral": 7}
    path = write_npz(tmp_path / "a.npz", images=np.zeros((10, 8, 8), np.uint8), label_dist=LABELS)
    with pytest.raises(UserError, match="columns 0 and 1 are both happiness"):
        Faces.load(path, class_map=joys)
    (tmp_path / files.SUMS_NAME).write_text(f"{'0' * 64}  a\n{'1' * 64}  a\n")
    with pytest.raises(UserError, match="names a twice"):
        files.read_sums(tmp_path)


# -- recordings and weights -------------------------------------------------------------------------------------------


def element(kind: int, content: bytes) -> bytes:
    return struct.pack("<II", kind, len(content)) + content + bytes(-len(content) % 8)


def mat5(*elements: bytes) -> bytes:
    return b"MATLAB 5.0".ljust(124) + struct.pack("<H", 0x100) + b"IM" + b"".join(elements)


def cells(count: int) -> bytes:
    """A cell in a cell in a cell: each is 48 bytes and what is in it."""
    sizes = [48 * depth + 40 for depth in range(count)]
    flags = element(6, struct.pack("<II", 1, 0)) + element(5, struct.pack("<ii", 1, 1))
    return b"".join(struct.pack("<II", 14, size) + flags + element(1, b"") for size in reversed(sizes))


def test_cells_in_cells_do_not_end_the_process(tmp_path):
    """scipy's reader calls itself for each, until the stack ends."""
    (tmp_path / "DREAMER.mat").write_bytes(mat5(cells(20_000)))
    with pytest.raises(UserError, match="values in values, 50 deep"):
        Mat5Reader(tmp_path / "DREAMER.mat", "").value()


def test_a_compressed_variable_that_swells(tmp_path):
    """A text of 200 MB of zeros in 0.2 MB."""
    flags, shape = element(6, struct.pack("<II", 4, 0)), element(5, struct.pack("<ii", 1, 200 << 20))
    header = flags + shape + element(1, b"DREAMER")
    inside = header + struct.pack("<II", 16, 200 << 20)
    content = zlib.compress(struct.pack("<II", 14, len(inside) + (200 << 20)) + inside + bytes(200 << 20), 9)
    (tmp_path / "DREAMER.mat").write_bytes(mat5(struct.pack("<II", 15, len(content)) + content))
    with pytest.raises(UserError, match=r"MB would come out of 0\.20 MB"):
        Mat5Reader(tmp_path / "DREAMER.mat", "DREAMER").value()


def test_hdf5_that_leads_elsewhere_or_swells(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = [[128.0]]
    path = tmp_path / "DREAMER.mat"
    for write in (
        lambda group: group.__setitem__("EEG_SamplingRate", h5py.ExternalLink("other.h5", "x")),
        lambda group: group.create_dataset("EEG_SamplingRate", (1,), "f8", external=[("/etc/passwd", 0, 8)]),
        lambda group: group.create_dataset("EEG_SamplingRate", (1 << 20, 1 << 20), "f8", chunks=(1, 1 << 10)),
    ):
        with h5py.File(path, "w") as file:
            write(file.create_group("DREAMER"))
        with pytest.raises(UserError, match="EEG_SamplingRate"):
            open_dreamer(path)


def student_meta(**changes):
    meta = {"arch": "resnet18-w1", "class_names": ["a", "b"], "image_size": 32, "mean": 0.5, "std": 0.25}
    return {**meta, "embedding_dim": 4, **changes}


@pytest.mark.parametrize(
    "changes",
    [{"embedding_dim": 10**12}, {"embedding_dim": 60_000}, {"arch": "resnet50-w1024"}, {"class_names": ["a", "a\x1b"]},
     {"image_size": 10**9}, {"std": 0}, {"mean": "0.5x"}, {"logit_scale": -1}, {"arch": 7}, {"class_names": "ab"}],
)  # fmt: skip
def test_a_students_metadata_is_judged_before_it_is_built(changes, tmp_path):
    state = build_student("resnet18-w1", num_classes=2, embedding_dim=4).state_dict()
    save_student(tmp_path / "a.safetensors", state, student_meta())
    load_student(tmp_path / "a.safetensors")
    save_student(tmp_path / "a.safetensors", state, student_meta(**changes))
    with pytest.raises(UserError, match=r"a\.safetensors"):
        load_student(tmp_path / "a.safetensors")


def test_weights_that_are_no_numbers(tmp_path):
    state = build_student("resnet18-w1", num_classes=2, embedding_dim=4).state_dict()
    state["head.bias"] = torch.tensor([0.0, float("nan")])
    save_student(tmp_path / "a.safetensors", state, student_meta())
    with pytest.raises(UserError, match=r"head\.bias holds NaN"):
        load_student(tmp_path / "a.safetensors")
    infinite, nowhere = torch.tensor([torch.inf]), torch.ones(1).to("meta")
    for weights in ({"bn1.weight": infinite}, {1: torch.ones(1)}, {"bn1.weight": nowhere}):
        torch.save(weights, tmp_path / "a.pth")
        with pytest.raises(UserError, match=r"a\.pth"):
            load_backbone_weights(ResNet(18, 1), tmp_path / "a.pth")


class _Runs:
    def __reduce__(self):
        return os.system, ("touch it_ran",)


def test_nothing_is_unpickled_or_inflated(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"format": 1, "state": _Runs()}, "a.ckpt")
    with zipfile.ZipFile("b.ckpt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("b/data.pkl", b"\x80\x02}.")
        archive.writestr("b/data/0", bytes(100 << 20))
    for name in ("a.ckpt", "b.ckpt"):
        with pytest.raises(UserError, match=name):
            load_checkpoint(name, config={}, checksums={})
        with pytest.raises(UserError, match=name):
            load_backbone_weights(ResNet(18, 1), name)
    assert not (tmp_path / "it_ran").exists()


@pytest.mark.parametrize("rest", [{}, {"config": {}, "checksums": {}, "state": {}}, {"config": [], "state": None}])
def test_checkpoints_of_another_shape(rest, tmp_path):
    torch.save({"format": 1, **rest}, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match=r"a\.ckpt"):
        progress_of(tmp_path / "a.ckpt")


# -- the command line -------------------------------------------------------------------------------------------------


def test_no_librarys_warning_reaches_the_screen():
    """Whoever asks for them (python -W) still sees them."""
    code = "import warnings, ngd_fast.cli as c; c._quiet_libraries(); warnings.warn('of a library')"
    for options, said in (([], False), (["-W", "default"], True)):
        done = subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True, check=True)
        assert ("of a library" in done.stderr) is said


def test_an_error_cannot_steer_the_terminal(tmp_path):
    (tmp_path / "a.csv").write_text("\x1b[2Jx,y\n1,2\n" + "z" * 9000)
    run = [sys.executable, "-m", "ngd_fast", "data", "check", str(tmp_path / "a.csv")]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 2 and "\x1b" not in done.stderr and "\\x1b[2jx" in done.stderr
    assert json.dumps(done.stderr)


# -- names in pages, tables and files ---------------------------------------------------------------------------------

NAME = '<script>"x" \\input{y}\\write18{z} 100% $a$ [b] *c* a|b &'


def test_names_are_plain_in_latex():
    text = latex.escape(NAME)
    assert "\\input" not in text and "\\write18" not in text and not re.search(r"(?<!\\)[%$&]|\||\"", text)
    assert latex.escape("[2cm]").startswith("{[}") and latex.escape("*").startswith("{*}")  # after a row's \\


def test_names_are_plain_in_html_and_markdown():
    page = html.page(NAME, "", [("a", NAME, html.table([NAME], [[html.Best("1")]], caption=NAME))])
    page += html.figure(b"", "png", NAME) + html.facts([(NAME, NAME)]) + html.details(NAME, "")
    assert "<script" not in page and page.count("<td class=best>1</td>") == 1
    assert "class=best" not in html.table(["a"], [["*1"]])
    text = model_card._plain(NAME)
    assert "<" not in text and "\\|" in text and "\\[b\\]" in text


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", ".hidden", "a\\b", "a" * 300, "a\x00b"])
def test_names_lead_nowhere(name, tmp_path):
    stem = files.file_stem(name)
    assert (tmp_path / stem).parent == tmp_path and not stem.startswith(".") and len(stem) <= 60
    (tmp_path / stem).touch()


def test_links_that_lead_out_of_a_run_are_not_written_through(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tb").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="tb is a link that leads out of it"):
        files.require_free(tmp_path / "run", resume=True)


def test_sums_that_name_files_elsewhere(tmp_path):
    (tmp_path / "secret").write_text("x")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "link").symlink_to(tmp_path / "secret")
    lines = [f"{'0' * 64}  {name}" for name in ("../secret", str(tmp_path / "secret"), "link", "/dev/zero")]
    (tmp_path / "run" / files.SUMS_NAME).write_text("".join(f"{line}\n" for line in lines))
    assert files.check_sums(tmp_path / "run") == [f"{line[66:]}: lies outside the folder" for line in lines]
