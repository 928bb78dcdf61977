import itertools

import numpy as np
import pytest

from ngd_fast.eeg.dreamer import EMOTIV_CHANNELS as EMOTIV
from ngd_fast.eeg.mahnob import CHANNELS as GENEVA
from ngd_fast.eeg.topomap import (
    TopomapConfig,
    channel_positions,
    make_operator,
    operator_from_positions,
    project,
)
from ngd_fast.errors import UserError

mne = pytest.importorskip("mne")

SPHERES = [(0.0, 0.0, 0.0, 0.095), (0.005, -0.01, 0.01, 0.09)]
MONTAGES = [(EMOTIV, "standard_1020"), (GENEVA, "biosemi32"), (GENEVA, "standard_1020"), (EMOTIV, "biosemi32")]


def mne_info(channels, montage):
    # The name that this version of MNE gives to standard_1020.
    builtin = mne.channels.get_builtin_montages()
    known = mne.channels.make_standard_montage(
        montage if montage in builtin else montage.replace("standard", "colin27")
    )
    lookup = {name.lower(): name for name in known.ch_names}
    names = [lookup[c.lower()] for c in channels]
    return mne.create_info(names, 128, "eeg", verbose="error").set_montage(known, verbose="error")


def mne_map(values, info, config):
    """Image that plot_topomap hands to imshow, NaN where it has none."""
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    image, _ = mne.viz.plot_topomap(
        values, info, axes=axes, show=False, contours=0, sensors=False, sphere=config.sphere, res=config.resolution,
        image_interp=config.method, extrapolate=config.extrapolate, border=config.border,
    )  # fmt: skip
    return np.ma.filled(image.get_array().astype(float), np.nan)


def apply(operator, values):
    return (operator.matrix @ values + operator.offset).reshape(operator.mask.shape)


@pytest.mark.parametrize(("channels", "montage"), MONTAGES)
@pytest.mark.parametrize("sphere", SPHERES)
def test_equals_plot_topomap_in_every_mode(channels, montage, sphere):
    info, rng = mne_info(channels, montage), np.random.default_rng(3)
    for method, extrapolate, border in itertools.product(["cubic", "linear"], ["head", "local", "box"], ["mean", 2.5]):
        config = TopomapConfig(
            montage=montage, method=method, extrapolate=extrapolate, border=border, sphere=sphere, resolution=24
        )
        values = rng.normal(scale=10.0, size=len(channels))  # uV
        expected = mne_map(values, info, config)
        known = np.isfinite(expected)
        error = np.abs(apply(make_operator(channels, config), values) - expected)[known].max()
        assert error <= 1e-6 * np.ptp(values), (method, extrapolate, border)


@pytest.mark.parametrize(("channels", "montage"), MONTAGES)
def test_positions_are_mnes(channels, montage):
    from mne.channels.layout import _find_topomap_coords

    for sphere in SPHERES:
        expected = _find_topomap_coords(mne_info(channels, montage), "all", sphere=np.array(sphere))
        # Bit for bit: the last bit decides between valid triangulations of symmetric sensors.
        np.testing.assert_array_equal(project(channel_positions(channels, montage), sphere), expected)


def test_operator_is_scale_invariant_where_mne_is_not():
    config = TopomapConfig(resolution=24)
    operator, info = make_operator(EMOTIV, config), mne_info(EMOTIV, "standard_1020")
    values = np.random.default_rng(0).normal(scale=10.0, size=14)
    tiny = apply(operator, values * 1e-12)
    assert np.abs(tiny * 1e12 - apply(operator, values)).max() < 1e-12 * np.ptp(values)
    expected = mne_map(values * 1e-12, info, config)
    inside = np.isfinite(expected)
    assert np.abs(tiny - expected)[inside].max() > 1e-2 * np.ptp(values) * 1e-12


def test_render_is_the_operator_in_float32_inside_the_mask():
    operator = make_operator(EMOTIV, TopomapConfig(resolution=16, border=1.5))
    values = np.random.default_rng(0).normal(size=(3, 2, 14))
    images = operator.render(values)
    assert images.shape == (3, 2, 16, 16) and images.dtype == np.float32
    for i, j in itertools.product(range(3), range(2)):
        expected = np.where(operator.mask, apply(operator, values[i, j]), 0)
        np.testing.assert_allclose(images[i, j], expected, atol=3e-6)
    out = np.empty_like(images)
    assert operator.render(values, out=out) is out
    np.testing.assert_array_equal(out, images)


def test_render_refuses_arrays_that_do_not_fit():
    operator = make_operator(EMOTIV, TopomapConfig(resolution=8))
    with pytest.raises(ValueError, match="values: must be"):
        operator.render(np.zeros((3, 13)))
    with pytest.raises(ValueError, match="out: must be contiguous float32"):
        operator.render(np.zeros((3, 14)), out=np.empty((3, 8, 8)))


def test_constant_values_give_a_constant_map():
    for method, extrapolate in itertools.product(["cubic", "linear"], ["head", "local", "box"]):
        operator = make_operator(GENEVA, TopomapConfig(method=method, extrapolate=extrapolate))
        image = operator.render(np.full(32, 7.0))
        np.testing.assert_allclose(image[operator.mask], 7.0, rtol=1e-5)
        assert not image[~operator.mask].any()


def test_left_stays_left_and_front_stays_front():
    operator = make_operator(EMOTIV, TopomapConfig(resolution=32))
    left_front = np.array([1.0 if c in ("F7", "F3", "AF3", "FC5") else 0.0 for c in EMOTIV])
    image = operator.render(left_front)
    assert image[16:, :16].sum() > 10 * np.abs(image[:16, 16:]).sum()  # row 0 is the back, column 0 the left


def test_channel_names_match_in_any_case_and_under_their_old_names():
    a = channel_positions(["t7", "FP1", "p8", "OZ"])
    np.testing.assert_array_equal(a, channel_positions(["T7", "Fp1", "P8", "Oz"]))
    np.testing.assert_array_equal(channel_positions(["T3"], "biosemi32"), channel_positions(["T7"], "biosemi32"))


def test_both_of_mnes_names_for_one_montage_work():
    np.testing.assert_array_equal(channel_positions(EMOTIV, "colin27_1020"), channel_positions(EMOTIV, "standard_1020"))


def test_montage_from_a_file(tmp_path):
    file = tmp_path / "cap.sfp"
    file.write_text(
        "fidnz 0 9.2 0\nfidt9 -7.4 0 0\nfidt10 7.4 0 0\n"
        "F3 -4 6 6\nF4 4 6 6\nO1 -3 -8 5\nO2 3 -8 5\nCz 0 0 11\n"
    )  # fmt: skip
    operator = make_operator(["F3", "F4", "O1", "O2", "Cz"], TopomapConfig(montage=str(file), resolution=16))
    assert operator.mask.any() and operator.positions[0, 0] < 0 < operator.positions[1, 0]


@pytest.mark.parametrize(
    ("channels", "config", "message"),
    [
        (["F3", "F4", "Cz"], {}, "3 channels cannot be interpolated .* at least 4"),
        (["Fz", "Cz", "Pz", "Oz"], {}, "on one line"),
        ([*EMOTIV, "ECG"], {}, "no position for ECG"),
        (["T7", "T3", "F3", "F4", "O1"], {}, "channels T7 and T3 have the same position"),
        (EMOTIV, {"montage": "biosemi31"}, "such as biosemi32"),
    ],
)
def test_what_cannot_be_interpolated_is_said(channels, config, message):
    with pytest.raises(UserError, match=message):
        make_operator(channels, TopomapConfig(**config))


def test_caps_share_one_frame():
    """A place on the head is the same pixel for 14 and for 32 channels: one teacher sees both."""
    maps = []
    for channels in (EMOTIV, GENEVA):
        operator = make_operator(channels, TopomapConfig(method="linear", resolution=32))
        maps.append(apply(operator, operator.positions[:, 0]))  # metres to the right: linear, so interpolated exactly
    middle = slice(10, 22)
    np.testing.assert_allclose(maps[0][middle, middle], maps[1][middle, middle], atol=1e-9)
    assert np.ptp(maps[0][middle, middle]) > 0.05


def test_sensors_outside_a_small_head_widen_the_picture_as_in_mne():
    small = TopomapConfig(sphere=SPHERES[0])
    positions = project(channel_positions(GENEVA, "standard_1020"), small.sphere)
    assert np.linalg.norm(positions, axis=1).max() > 0.1
    assert operator_from_positions(positions, small).mask.mean() > 0.7
