"""All feeds give the same samples, labels and views in the same order, resume at any step, and name what is wrong."""

import numpy as np
import pytest
import torch
from PIL import Image

from ngd_fast.errors import UserError
from ngd_fast.faces import feeds
from ngd_fast.faces.dataset import Faces
from ngd_fast.faces.feeds import AugmentConfig, _choose, make_feed
from ngd_fast.faces.pixels import source_shape
from ngd_fast.synthetic.face_files import write_affectnet_like
from ngd_fast.synthetic.faces import make_faces

OTHERS = ("resident", "dali")


def _feed(faces, kind="torch", **options):
    if kind == "dali":
        pytest.importorskip("nvidia.dali")
    defaults = {"batch_size": 16, "image_size": 40, "train": True, "seed": 1, "device": "cpu"}
    return make_feed(faces, kind=kind, **{**defaults, **options})


def _assert_same(first, second, atol):
    batches = list(first), list(second)
    assert len(batches[0]) == len(batches[1]) > 0
    for a, b in zip(*batches):
        for name in ("target_dist", "labels", "index"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name
        assert a.images.shape == b.images.shape
        assert a.images.dtype == b.images.dtype
        assert b.images.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(a.images.float(), b.images.float(), atol=atol, rtol=0)


@pytest.fixture(scope="module")
def faces():
    return make_faces(52, 3)


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    folder = write_affectnet_like(tmp_path_factory.mktemp("mini"), {"test": 24}, size=48)
    return Faces.load(folder / "labels_test.csv")


CASES = {
    "default": {},
    "strong": {"augment": AugmentConfig.strong()},
    "enlarged": {"image_size": 64, "drop_last": False},
    "reduced": {"image_size": 20},
    "evaluation": {"train": False, "image_size": 56},
    "one channel": {"channels": 1},
    "drawn labels": {"draw_labels": True},
    "second of three ranks": {"rank": 1, "world_size": 3, "drop_last": False},
    "evaluation, last of three ranks": {"rank": 2, "world_size": 3, "train": False},
    "half": {"dtype": torch.float16},
    "bfloat16": {"dtype": torch.bfloat16},
    "mean and std by channel": {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3], "augment": AugmentConfig(erase=1.0)},
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("case", CASES)
def test_feeds_agree_in_memory(faces, kind, case):
    options = CASES[case]
    # Normalised units. Float32: coordinates to 1e-5 pixels, times contrast over std; halves: two units in the last
    # place at up to 4, which is 2^-8 and 2^-5.
    atol = {torch.float16: 2**-7, torch.bfloat16: 2**-4}.get(options.get("dtype"), 1e-3)
    first, second = _feed(faces, **options), _feed(faces, kind, **options)
    for epoch in (0, 3):
        _assert_same(first.epoch(epoch), second.epoch(epoch), atol)
    second.close()


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("options", [{}, {"grey": True, "train": False, "image_size": 64}])
def test_feeds_agree_on_files(mini, kind, options):
    # DALI's JPEG decoder and its resize round differently from PIL: up to 4 grey levels over a std of 0.25.
    atol = 1e-3 if kind == "resident" else 4 / 255 / 0.25 + 1e-3
    first, second = _feed(mini, **options, batch_size=8), _feed(mini, kind, **options, batch_size=8)
    _assert_same(first.epoch(1), second.epoch(1), atol)
    second.close()


@pytest.mark.parametrize("kind", ["torch", *OTHERS])
def test_an_epoch_resumes_at_any_step_bit_for_bit(faces, kind):
    feed = _feed(faces, kind)
    whole = list(feed.epoch(2))
    # An epoch that is left early must leave nothing behind.
    abandoned = feed.epoch(1)
    next(abandoned)
    abandoned.close()
    fresh = _feed(faces, kind)
    for again in (feed.epoch(2, 1), fresh.epoch(2, 1)):
        for expected, batch in zip(whole[1:], again, strict=True):
            assert torch.equal(expected.images, batch.images)
            assert torch.equal(expected.index, batch.index)
    assert list(feed.epoch(2, feed.steps_per_epoch)) == []
    assert not torch.equal(whole[0].index, next(feed.epoch(3)).index)


@pytest.mark.parametrize("kind", ["torch", *OTHERS])
@pytest.mark.parametrize("data", ["faces", "mini"])
def test_views_of_another_size_are_those_of_a_feed_of_that_size(kind, data, request):
    """32 to 64 px are cut from the same pixels of 48; for 20 px these are reduced first."""
    source = request.getfixturevalue(data)
    feed = _feed(source, kind, batch_size=8)
    for epoch, size in enumerate((20, 32, 64, 20)):
        feed.set_image_size(size)
        fresh = _feed(source, kind, batch_size=8, image_size=size)
        _assert_same(fresh.epoch(epoch), feed.epoch(epoch), 0)
        fresh.close()
    feed.close()


def test_dali_batches_stay_valid(faces):
    feed = _feed(faces, "dali", train=False, image_size=48)
    batches = feed.epoch(0)
    first = next(batches).images
    before = first.clone()
    list(batches)
    assert torch.equal(first, before)


def test_worker_threads_change_nothing(mini):
    with_threads = _feed(mini, num_workers=3, batch_size=4)
    _assert_same(_feed(mini, batch_size=4).epoch(0), with_threads.epoch(0), 0)
    with_threads.close()


def test_a_gpu_is_fed_by_more_than_one_thread(monkeypatch):
    monkeypatch.setattr(feeds.os, "cpu_count", lambda: 16)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    threads = [feeds._threads(torch.device(device), ranks) for device, ranks in (("cpu", 1), ("cuda", 1), ("cuda", 4))]
    assert threads == [0, 8, 4]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # as torchrun says on each of two machines
    assert feeds._threads(torch.device("cuda"), 4) == 8


def test_order_and_views_follow_the_contract(faces):
    feed = _feed(faces)
    batches = list(feed.epoch(4))
    expected = np.random.default_rng((1, 4)).permutation(52)[:48]
    assert torch.cat([batch.index for batch in batches]).tolist() == expected.tolist()
    assert feed.steps_per_epoch == 3
    for batch in batches:
        np.testing.assert_array_equal(batch.target_dist, faces.label_dist[batch.index])
        np.testing.assert_array_equal(batch.labels, faces.labels[batch.index])
    # A sample's view does not depend on who else is in its batch.
    other = {int(i): image for b in _feed(faces, batch_size=8).epoch(4) for i, image in zip(b.index, b.images)}
    torch.testing.assert_close(batches[1].images[5], other[int(batches[1].index[5])])


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("drop_last", [True, False])
def test_ranks_share_the_dataset(faces, train, drop_last):
    world = 3
    feeds = [
        _feed(faces, rank=r, world_size=world, train=train, drop_last=drop_last, batch_size=8) for r in range(world)
    ]
    seen = [np.concatenate([batch.index for batch in feed.epoch(0)]) for feed in feeds]
    if train:
        assert len({feed.steps_per_epoch for feed in feeds}) == 1
    if not drop_last:
        assert set(np.concatenate(seen).tolist()) == set(range(52))
    if not train and not drop_last:
        assert sum(map(len, seen)) == 52
    if train and drop_last:
        # The ranks' batches together are one batch of the whole.
        whole = next(_feed(faces, batch_size=24).epoch(0)).index
        first = np.stack([rows[:8] for rows in seen], axis=1).ravel()
        assert first.tolist() == whole.tolist()


def test_whole_images_are_the_images(faces):
    batch = next(_feed(faces, train=False, image_size=48, mean=0.0, std=1.0).epoch(0))
    expected = torch.from_numpy(faces.images[:16]).float() / 255
    for channel in range(3):
        torch.testing.assert_close(batch.images[:, channel], expected)


def test_capturable_steps_of_the_resident_feed(faces):
    feed = _feed(faces, "resident")
    expected = list(feed.epoch(0))
    feed.begin_epoch(0, 1)
    batch = feed.empty_batch()
    address = batch.images.data_ptr()
    for step in (1, 2):
        feed.capturable_step(batch)
        assert torch.equal(batch.images, expected[step].images)
        assert torch.equal(batch.index, expected[step].index)
    assert batch.images.data_ptr() == address
    assert feed.clock.tolist() == [0, 3]
    with pytest.raises(ValueError, match="start_step"):
        feed.begin_epoch(0, 4)


def test_auto_says_what_it_took(faces, capsys):
    feed = _feed(faces, "auto")
    assert feed.kind == "torch"
    assert "feed: torch (the device is cpu)" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["torch", *OTHERS])
def test_a_small_image_does_not_shrink_the_others(tmp_path, kind):
    rng = np.random.default_rng(0)
    paths = []
    for side in (12, 48):
        paths.append(str(tmp_path / f"{side}.png"))
        Image.fromarray(rng.integers(0, 256, (side, side), dtype=np.uint8)).save(paths[-1])
    options = {"batch_size": 2, "image_size": 48, "train": False}
    both, alone = (next(_feed(Faces(paths=p), kind, **options).epoch(0)).images for p in (paths, paths[1:]))
    assert torch.equal(both[1], alone[0])


def test_the_size_of_the_pixels_is_found_without_decoding(damaged):
    """The first file is unreadable: with --skip-bad it is left out only later."""
    with open(damaged.paths[0], "wb") as file:
        file.write(b"")
    assert source_shape(damaged, 224) == (32, 32, 3)
    assert source_shape(damaged, 21, grey=True) == (24, 24, 1)


@pytest.fixture
def damaged(tmp_path):
    write_affectnet_like(tmp_path, {"test": 24}, size=32)
    faces = Faces.load(tmp_path / "labels_test.csv")
    for row, content in ((5, b""), (17, b"\xff\xd8 no image" * 9)):
        with open(faces.paths[row], "wb") as file:
            file.write(content)
    return faces


@pytest.mark.parametrize("kind", ["torch", *OTHERS])
def test_undecodable_images_are_named_or_left_out(damaged, kind, capsys):
    with pytest.raises(UserError, match=r"test_000(05|17)\.jpg: not a readable image"):
        list(_feed(damaged, kind, batch_size=8).epoch(0))
    feed = _feed(damaged, kind, batch_size=8, skip_bad=True, drop_last=False)
    assert sum(len(batch.labels) for batch in feed.epoch(0)) == len(feed.faces) == 22
    assert "left out 2 unreadable images, first" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["torch", "dali"])
def test_a_file_that_vanishes_in_training_is_named(mini, kind, tmp_path):
    write_affectnet_like(tmp_path, {"test": 48}, size=32)
    faces = Faces.load(tmp_path / "labels_test.csv")
    feed = _feed(faces, kind, batch_size=4)
    batches = feed.epoch(0)
    next(batches)
    victim = faces.paths[feed.order(0)[40]]
    (tmp_path / victim).unlink()
    with pytest.raises(UserError, match=f"{victim}: .*image"):
        list(batches)


@pytest.mark.parametrize("grey", [False, True])
def test_dali_shows_what_only_pillow_decodes(mini, tmp_path, grey):
    paths = [str(tmp_path / name) for name in ("a.gif", "b.gif", "c.tiff", "d.pgm")]
    for source, path, mode in zip(mini.paths, paths[:3], ("RGB", "RGB", "1")):
        with Image.open(source) as image:
            image.convert(mode).save(path)
    (tmp_path / "d.pgm").write_bytes(b"P5 48 48 15 " + bytes(range(16)) * (48 * 48 // 16))
    options = {"batch_size": 2, "image_size": 48, "train": False, "grey": grey}
    feeds = [_feed(Faces(paths=paths), kind, **options) for kind in ("torch", "dali")]
    _assert_same(*(feed.epoch(0) for feed in feeds), 1e-3)


def test_dali_tells_what_went_wrong_and_not_where(faces):
    error = _feed(faces, "dali")._explain(RuntimeError("Critical error\n  File\nencountered:\n\nout of it\nBye"), 3)
    assert str(error) == "DALI stopped in epoch 0, step 3: out of it; try --feed torch"


def test_dali_that_cannot_start_says_why(faces, monkeypatch):
    feed = _feed(faces, "dali")
    monkeypatch.setattr(feed, "_device_id", lambda: 99)  # no machine has as many GPUs
    with pytest.raises(UserError, match=r"^DALI cannot start: .+; try --feed torch$"):
        next(feed.epoch(0))


def test_dali_fault_without_a_culprit_is_one_line(faces, monkeypatch):
    feed = _feed(faces, "dali")
    monkeypatch.setattr(feed, "_inputs", lambda rows: 1 / 0)
    with pytest.raises(UserError, match=r"DALI stopped in epoch 0, step 0: .*; try --feed torch") as caught:
        list(feed.epoch(0))
    assert "\n" not in str(caught.value)


def test_missing_dali_names_the_extra(faces, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "nvidia.dali", None)
    with pytest.raises(UserError, match=r"needs nvidia-dali \(import of nvidia.*\): .*ngd-fast\[dali-cuda13\]"):
        make_feed(faces, kind="dali", batch_size=4, image_size=8, train=True, seed=0)


@pytest.mark.parametrize("kind", ["torch", "resident", "dali"])
def test_a_dataset_smaller_than_a_batch(faces, kind):
    with pytest.raises(UserError, match="52 faces do not fill one batch of 128; choose a batch size of at most 52"):
        _feed(faces, kind, batch_size=128)
    with pytest.raises(UserError, match=r"one batch of 60 \(3 ranks of 20\); choose a batch size of at most 51"):
        _feed(faces, kind, batch_size=20, world_size=3)
    small = _feed(faces, kind, batch_size=128, drop_last=False)
    assert [len(batch.labels) for batch in small.epoch(0)] == [52]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "ffcv"}, "kind: must be one of auto, dali, resident, torch, is 'ffcv'"),
        ({"batch_size": 0}, "batch_size: must be a positive integer, is 0"),
        ({"image_size": 4.5}, "image_size"),
        ({"rank": 2, "world_size": 2}, r"rank: must lie in \[0, 2\), is 2"),
        ({"channels": 2}, "channels"),
        ({"std": 0.0}, "std: must be positive"),
        ({"mean": [0.5, 0.5]}, "mean: must be one number or 3, are 2"),
    ],
)
def test_bad_arguments(faces, options, message):
    with pytest.raises(ValueError, match=message):
        _feed(faces, **{"kind": "torch", **options})


def test_memory_of_a_former_run_counts_as_free(faces, monkeypatch):
    """PyTorch keeps what a run before has freed, as between the students of an ablation."""
    needed, gpu = faces.images.size, torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (needed // 2, 10 * needed))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * needed)
    monkeypatch.setattr("ngd_fast.faces.feeds.find_spec", lambda name: None if "nvidia" in name else name)
    for allocated, kind in ((needed, "resident"), (3 * needed, "torch")):
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device, allocated=allocated: allocated)
        assert _choose(faces, source_shape(faces, 40, grey=True), gpu)[0] == kind


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_the_kernel_agrees_with_the_portable_feed(faces, case):
    options = CASES[case]
    atol = {torch.float16: 2**-7, torch.bfloat16: 2**-4}.get(options.get("dtype"), 1e-3)
    resident, portable = _feed(faces, "resident", **options, device="cuda"), _feed(faces, **options, device="cuda")
    _assert_same(portable.epoch(1), resident.epoch(1), atol)


@pytest.mark.gpu
def test_a_captured_step_makes_batch_after_batch(faces):
    feed = _feed(faces, "resident", device="cuda")
    expected = list(feed.epoch(0))
    made = feed.empty_batch()
    feed.begin_epoch(0)
    feed.capturable_step(made)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        feed.capturable_step(made)
    feed.begin_epoch(0)
    for batch in expected:
        graph.replay()
        assert torch.equal(made.images, batch.images)
        assert torch.equal(made.index, batch.index)


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["strong", "half", "bfloat16", "evaluation"])
def test_dali_on_the_gpu_agrees(faces, case):
    atol = {torch.float16: 2**-7, torch.bfloat16: 2**-4}.get(CASES[case].get("dtype"), 2e-3)
    dali, portable = _feed(faces, "dali", **CASES[case], device="cuda"), _feed(faces, **CASES[case])
    for expected, batch in zip(portable.epoch(0), dali.epoch(0), strict=True):
        torch.testing.assert_close(batch.images.cpu(), expected.images, atol=atol, rtol=0)
        assert torch.equal(batch.index.cpu(), expected.index)


@pytest.mark.gpu
def test_dali_decodes_files_on_the_gpu(mini):
    options = {"batch_size": 8, "train": False, "image_size": 64, "mean": 0.0, "std": 1 / 255}
    dali, portable = _feed(mini, "dali", **options, device="cuda"), _feed(mini, **options)
    for expected, batch in zip(portable.epoch(0), dali.epoch(0), strict=True):
        error = (batch.images.cpu() - expected.images).abs()
        # Grey levels; the two decoders differ in their inverse DCT and in how they interpolate color.
        assert error.mean() < 1
        assert error.max() < 16
