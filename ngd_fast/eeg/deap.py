"""DEAP (Koelstra et al., 2012): 32 subjects x 40 music videos of 60 s, 32 EEG channels, ratings 1 to 9."""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ngd_fast.artifacts.files import sha256
from ngd_fast.eeg.channels import import_mne
from ngd_fast.eeg.columns import number_column, read_table, require_column
from ngd_fast.eeg.mahnob import CHANNELS  # the same 32, in the same (Geneva) order
from ngd_fast.eeg.mat5 import read_variable
from ngd_fast.eeg.raw import Recording, open_file
from ngd_fast.eeg.recordings import TrialRow, source_of_rows
from ngd_fast.eeg.trials import Exclusions, Trial, TrialSource, scale_rating
from ngd_fast.errors import UserError

RATING_RANGE = (1, 9)
_RATE, _BASELINE_SECONDS, _VIDEO_SECONDS = 128, 3, 60
_VIDEO_STARTS = 4  # code of the Status channel


def open_deap(folder: str | Path, ratings: str | Path | None = None) -> TrialSource:
    """The trials of ``data_preprocessed_matlab`` (s??.mat, one subject in memory at a time), else of
    ``data_original`` (s??.bdf, with participant_ratings.csv as ``ratings`` or in a folder beside it).

    A trial's number is its video's (Experiment_id); its 3 s before the video are its baseline. Raises UserError for a
    folder that holds neither, which the Python ``s??.dat`` alone do not change: pickles can run any code when read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder (wanted DEAP's data_preprocessed_matlab or data_original)")
    files = {kind: _numbered(folder, kind) for kind in ("mat", "bdf", "dat")}
    if files["mat"]:
        return _preprocessed(files["mat"])
    if files["bdf"]:
        return _original(folder, files["bdf"], ratings)
    if files["dat"]:
        raise UserError(
            f"{folder}: its s??.dat are Python pickles, which can run any code when they are read; "
            "data_preprocessed_matlab holds the same signals as s??.mat"
        )
    raise UserError(f"{folder}: holds no s??.mat and no s??.bdf of DEAP")


def _numbered(folder: Path, kind: str) -> dict[int, Path]:
    found = {int(m[1]): p for p in folder.iterdir() if (m := re.fullmatch(rf"s(\d\d)\.{kind}", p.name, re.IGNORECASE))}
    return dict(sorted(found.items()))


def _preprocessed(files: dict[int, Path]) -> TrialSource:
    meta = {"dataset": "DEAP", "files": {}, "sampling_rate": float(_RATE), "version": "data_preprocessed_matlab"}

    def trials(exclusions: Exclusions) -> Iterator[Trial]:
        for subject, path in files.items():
            data, labels = _read_mat(path)
            meta["files"][path.name] = sha256(path)
            for i, (signals, label) in enumerate(zip(data, labels)):
                where = f"{path.name}: video {i + 1}"
                try:
                    valence, arousal = (scale_rating(r, *RATING_RANGE, where) for r in label[:2])
                except UserError as error:
                    exclusions.add("unusable trials", str(error))
                    continue
                eeg, start = signals[: len(CHANNELS)], _BASELINE_SECONDS * _RATE
                yield Trial(subject, i + 1, eeg[:, start:], eeg[:, :start], float(_RATE), valence, arousal, where)

    return TrialSource("deap", CHANNELS, 40 * len(files), trials, meta)


def _read_mat(path: Path) -> tuple[np.ndarray, np.ndarray]:
    data, labels = (read_variable(path, name) for name in ("data", "labels"))
    samples = (_BASELINE_SECONDS + _VIDEO_SECONDS) * _RATE
    if getattr(data, "ndim", 0) != 3 or data.shape[1] < len(CHANNELS) or data.shape[2] != samples:
        raise UserError(f"{path}: data must be videos x 40 channels x {samples}, is {getattr(data, 'shape', 'absent')}")
    if getattr(labels, "ndim", 0) != 2 or len(labels) != len(data) or labels.shape[1] < 2:
        raise UserError(f"{path}: labels must be {len(data)} x 4, is {getattr(labels, 'shape', 'absent')}")
    return data, labels


def _original(folder: Path, files: dict[int, Path], ratings: str | Path | None) -> TrialSource:
    places = [f / sub / "participant_ratings.csv" for f in (folder, folder.parent) for sub in ("", "metadata_csv")]
    path = Path(ratings) if ratings else next((p for p in places if p.is_file()), None)
    if path is None:
        raise UserError(f"{folder}: no participant_ratings.csv there or beside it; name it with --ratings")
    table = read_table(path)
    names = ("Participant_id", "Trial", "Experiment_id", "Valence", "Arousal")
    columns = (number_column(path, table, require_column(path, table, name, name)) for name in names)
    rows = []
    for i, (subject, trial, video, *felt) in enumerate(zip(*columns)):
        if subject in files:
            where = f"{path}, row {i + 2}"
            valence, arousal = (scale_rating(r, *RATING_RANGE, where) for r in felt)
            row = TrialRow(
                file=files[int(subject)].name,
                start=f"event:{_VIDEO_STARTS}@{int(trial)}",
                stop=f"+{_VIDEO_SECONDS}",
                baseline_start=f"-{_BASELINE_SECONDS}",
                subject=int(subject),
                trial=int(video),
                valence=valence,
                arousal=arousal,
                where=where,
            )
            rows.append(row)
    if not rows:
        raise UserError(f"{path}: rates none of the subjects of {folder} ({', '.join(map(str, files))})")
    meta = {"dataset": "DEAP", "files": {path.name: sha256(path)}, "version": "data_original"}
    return source_of_rows("deap", rows, lambda name: _open_bdf(folder / name), meta)


def _open_bdf(path: Path) -> Recording:
    """A subject's BDF with its 32 channels alone. Its last channel is Status, unnamed in those of Geneva."""

    def read(path):
        raw = import_mne().io.read_raw_bdf(path, stim_channel=-1, verbose="error")
        return raw.pick([*CHANNELS, raw.ch_names[-1]])

    # The trigger is a byte; the recordings of Geneva have other bits set above it.
    return open_file(path, read=read, stim_mask=0xFF)
