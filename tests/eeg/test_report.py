"""The quality page of a file of topomaps."""

import re

import numpy as np
import pytest

from ngd_fast.cli import main
from ngd_fast.eeg.quality import mean_spectrum
from ngd_fast.eeg.report import coverage, write_report

pytest.importorskip("matplotlib")


def test_the_page_of_recordings(dreamer_mat, tmp_path, capsys):
    pytest.importorskip("mne")
    for arguments in (["dreamer", dreamer_mat, "--out", tmp_path], ["report", tmp_path / "dreamer_topomaps_all.npz"]):
        with pytest.raises(SystemExit) as end:
            main(["eeg", *map(str, arguments)])
        assert end.value.code == 0, capsys.readouterr().err
    page = (tmp_path / "dreamer_quality.html").read_text()
    for heading in ("What was cut", "Spectra before", "Topomaps", "Ratings and the grid", "Where it came from"):
        assert heading in page
    assert "all 12 trials" in page and "<script" not in page and "window_seconds" in page
    assert re.search(r"<b>12</b><span class=\"soft\">trials", page)


def test_a_page_of_maps_without_ratings_or_quality_repeats_byte_for_byte(make_topomaps, tmp_path):
    nothing = np.full(6, np.nan)
    meta = {"exclusions": {"bad <channels>": 2}, "left_out": ["S1: <flat>"]}
    maps = make_topomaps(valence=nothing, arousal=nothing, meta=meta)
    pages = [write_report(maps, tmp_path / f"{name}.html", "a title").read_bytes() for name in "ab"]
    text = pages[0].decode()
    assert pages[0] == pages[1] and "No window has ratings" in text and "Spectra" not in text
    assert "bad &lt;channels&gt;" in text and "S1: &lt;flat&gt;" in text


def test_coverage_is_that_of_the_bank():
    from ngd_fast.prototypes.bank import PrototypeBank

    rng = np.random.default_rng(0)
    va = rng.uniform(-1, 1, (200, 2)).astype(np.float32)
    bank = PrototypeBank.build(rng.normal(size=(200, 256)).astype(np.float32), va[:, 0], va[:, 1])
    np.testing.assert_array_equal(coverage(va[:, 0], va[:, 1]), bank.counts)


def test_a_spectrum_is_the_density_of_white_noise_and_of_a_tone():
    rng = np.random.default_rng(0)
    noise = mean_spectrum(3 * rng.normal(size=(8, 30 * 200)), 200)
    np.testing.assert_allclose(noise[5:60], 9 / 100, rtol=0.25)  # variance over half the rate
    tone = mean_spectrum(np.sin(2 * np.pi * 10 * np.arange(2000) / 200)[None], 200)
    assert tone.argmax() == 10 and len(tone) == 65
