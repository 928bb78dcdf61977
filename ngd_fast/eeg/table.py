"""Tables of band power: any CSV with one row for each window and one column for each channel and band."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pydantic import Field, model_validator

from ngd_fast.artifacts.files import sha256
from ngd_fast.config import Config
from ngd_fast.console import say
from ngd_fast.eeg.channels import ELECTRODE, without_position
from ngd_fast.eeg.columns import find_column, number_column, numbers_in, read_table, require_column
from ngd_fast.eeg.manifest import Topomaps
from ngd_fast.eeg.pipeline import ChannelMender, MapConfig, draw, pick_channels
from ngd_fast.eeg.topomap import make_operator
from ngd_fast.eeg.trials import ROW, Exclusions, TrialFault, scale_rating
from ngd_fast.errors import UserError

_BANDS = ("delta", "theta", "alpha", "beta", "gamma")


class TableMapping(Config):
    """Which columns hold what. What is not given is looked for under its usual names, in any case.

    Subjects and trials may be numbers or names with a number in them (``S01``, ``G1.pdf``): that number counts, so
    that the table and the file of ratings can name the same thing differently.
    """

    subject: str | None = None
    trial: str | None = None
    window: str | None = Field(None, description="numbered by order within a trial where there is no such column")
    features: str = Field("{channel}_{band}", description="{channel} and {band} stand for names; a rest may follow")
    bands: tuple[str, ...] | None = Field(None, description="in this order; default: delta to gamma, those present")
    ratings_subject: str | None = Field(None, description="the file of ratings' column; default as in the table")
    ratings_trial: str | None = None
    valence: str | None = None
    arousal: str | None = None
    rating_range: tuple[float, float] = (1, 9)
    log: bool = Field(True, description="take 10 log10 of the table's values; false where it holds logarithms already")

    @model_validator(mode="after")
    def _check(self):
        if self.features.count("{channel}") != 1 or self.features.count("{band}") != 1:
            raise ValueError("features must hold {channel} and {band} once each")
        for i, band in enumerate(self.bands or ()):
            twin = next((b for b in self.bands[:i] if b.lower() == band.lower()), None)
            if twin is not None:
                raise ValueError(f"bands {twin} and {band} are the same")
        if not self.rating_range[0] < self.rating_range[1]:
            raise ValueError("rating_range must be [lowest, highest]")
        return self


def topomaps_from_table(
    path: str | Path, config: MapConfig, mapping: TableMapping | None = None, ratings: str | Path | None = None
) -> Topomaps:
    """Topomaps of a CSV of band power; valence and arousal from its own columns or joined from the CSV ``ratings``.

    Cells may be parted by commas, semicolons (numbers then with a point or a decimal comma) or tabs.
    Rows with NaN are mended or left out as ``config.bad_channels`` says; without ratings every window is unlabelled.
    Raises UserError for a table that cannot be read, columns that are not found, duplicate windows, ratings out of
    range, or values that have no logarithm.
    """
    mapping = mapping or TableMapping()
    table = read_table(path)
    columns, bands, channels = _feature_columns(path, table, mapping)
    picks = pick_channels(channels, config.exclude_channels)
    lost = without_position([channels[i] for i in picks], config.topomap.montage)
    if lost and len(picks) - len(lost) >= 4:
        say(f"{path}: left out without a position: {', '.join(lost)}")
        picks = [i for i in picks if channels[i] not in lost]
    channels = [channels[i] for i in picks]
    operator = make_operator(channels, config.topomap)
    rows = _rows(path, table, mapping)
    meta = {"dataset": "table", "files": {Path(path).name: sha256(path)}, "mapping": mapping.model_dump(mode="json")}
    if ratings is not None:
        _join_ratings(rows, path, ratings, mapping)
        meta["files"][Path(ratings).name] = sha256(ratings)
    elif any(getattr(mapping, name) or find_column(path, table, None, name) for name in ("valence", "arousal")):
        for name in ("valence", "arousal"):
            column = number_column(path, table, require_column(path, table, getattr(mapping, name), name))
            rows[name] = [_scaled(r, mapping, f"{path}, row {i + 2}, {name}") for i, r in enumerate(column)]
    else:
        say(f"{path}: holds no ratings, so every window is unlabelled support; --ratings FILE joins some")
    half = np.isnan(rows["valence"]) | np.isnan(rows["arousal"])
    rows["valence"][half] = rows["arousal"][half] = np.nan

    values = np.stack([number_column(path, table, c) for c in columns.ravel()], axis=1)
    features = values.reshape(len(table), *columns.shape)[:, picks]
    _mark_flat(features, rows["subject"])
    if mapping.log:
        if (features <= 0).any():
            row, channel, band = np.argwhere(features <= 0)[0]
            raise UserError(
                f"{path}: row {row + 2}, {channels[channel]} {bands[band]} is {features[row, channel, band]:g}, which "
                "has no logarithm; where the table holds logarithms already, set log: false in the mapping"
            )
        features = 10 * np.log10(features)
    features[np.abs(features) > np.finfo(np.float32).max] = np.nan  # as which they are kept
    exclusions, mender = Exclusions(), ChannelMender(channels, config)
    usable = np.ones(len(features), bool)
    for i in np.flatnonzero(~np.isfinite(features).all(axis=(1, 2))):
        try:
            features[i] = mender.mend(features[i], ~np.isfinite(features[i]).all(axis=1), f"{path}, row {i + 2}")
        except TrialFault as fault:
            exclusions.add(f"rows with {fault.reason}", str(fault))
            usable[i] = False
    if not usable.any():
        raise UserError(f"{path}: no usable row; left out: {exclusions}")
    return draw(features[usable], rows[usable], channels, bands, config, meta, exclusions, mender, operator)


def _feature_columns(path, table, mapping: TableMapping) -> tuple[np.ndarray, list[str], list[str]]:
    """Column names as an array [channels, bands], the bands, and the channels in the table's order."""
    known = mapping.bands or _BANDS
    pattern = re.escape(mapping.features).replace(r"\{channel\}", ELECTRODE)
    pattern = pattern.replace(r"\{band\}", f"(?P<band>{'|'.join(map(re.escape, known))})")
    matcher = re.compile(pattern + r"(?![a-z0-9])(?:[ _.\-].*)?$", re.IGNORECASE)
    found = {}
    for column in table.columns:
        if match := matcher.match(str(column).strip()):
            key = (match["channel"], match["band"].lower())
            if key in found:
                raise UserError(f"{path}: columns {found[key]} and {column} are both {key[0]} {key[1]}")
            found[key] = column
    channels = list(dict.fromkeys(channel for channel, _ in found))
    bands = [band for band in known if any(b == band.lower() for _, b in found)]
    if mapping.bands and len(bands) < len(known):
        raise UserError(f"{path}: no column of band {', '.join(sorted(set(known) - set(bands)))}")
    if not found:
        raise UserError(
            f"{path}: no column looks like {mapping.features} with a band of {', '.join(known)}; "
            "describe the columns in a mapping file (--mapping)"
        )
    missing = [f"{c} {b}" for c in channels for b in bands if (c, b.lower()) not in found]
    if missing:
        raise UserError(f"{path}: no column for {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}")
    return np.array([[found[c, b.lower()] for b in bands] for c in channels], object), bands, channels


def _rows(path, table, mapping: TableMapping) -> np.ndarray:
    import pandas as pd

    rows = np.empty(len(table), ROW)
    rows["valence"] = rows["arousal"] = np.nan
    for role in ("subject", "trial"):
        rows[role] = numbers_in(path, table, require_column(path, table, getattr(mapping, role), role))
    window = find_column(path, table, mapping.window, "window")
    if window is None and mapping.window is not None:
        require_column(path, table, mapping.window, "window")
    if window is not None:
        rows["window"] = numbers_in(path, table, window)
    else:  # a table of its own: hundreds of columns, as read, cannot take two more without a warning of pandas'
        keys = pd.DataFrame({name: rows[name] for name in ("subject", "trial")})
        rows["window"] = keys.groupby(["subject", "trial"]).cumcount()
    first: dict[tuple, int] = {}
    for i, key in enumerate(rows[["subject", "trial", "window"]].tolist()):
        if first.setdefault(key, i) != i:
            where = "subject {}, trial {}, window {}".format(*key)
            raise UserError(f"{path}: {where} stands in rows {first[key] + 2} and {i + 2}; one was wanted")
    return rows


def _mark_flat(features: np.ndarray, subject: np.ndarray) -> None:
    """Make NaN of each subject's channels that hold the same in all of its windows, in every band: dead electrodes."""
    for number in np.unique(subject):
        own = np.flatnonzero(subject == number)
        if len(own) > 1:
            flat = (np.ptp(features[own], axis=0) == 0).all(axis=1)
            features[np.ix_(own, np.flatnonzero(flat))] = np.nan


def _scaled(rating: float, mapping: TableMapping, where: str) -> float:
    return rating if np.isnan(rating) else scale_rating(rating, *mapping.rating_range, where)


def _join_ratings(rows: np.ndarray, path, ratings: str | Path, mapping: TableMapping) -> None:
    """Fill in valence and arousal by subject and trial; what has no rating stays unlabelled, which is said."""
    table = read_table(ratings)
    subject = numbers_in(ratings, table, require_column(ratings, table, mapping.ratings_subject, "subject"))
    trial_column = require_column(ratings, table, mapping.ratings_trial, "trial")
    trial = numbers_in(ratings, table, trial_column)
    pair = []
    for name in ("valence", "arousal"):
        column = number_column(ratings, table, require_column(ratings, table, getattr(mapping, name), name))
        pair.append([_scaled(r, mapping, f"{ratings}, row {i + 2}, {name}") for i, r in enumerate(column)])
    known: dict[tuple[int, int], Sequence[float]] = {}
    keys = list(zip(subject.tolist(), trial.tolist()))
    for i, (key, felt) in enumerate(zip(keys, zip(*pair))):
        if key in known:
            raise UserError(
                f"{ratings}: subject {key[0]}, trial {key[1]} is rated twice, in rows {keys.index(key) + 2} and {i + 2}"
            )
        known[key] = felt
    wanted = list(zip(rows["subject"].tolist(), rows["trial"].tolist()))
    missing = sorted(set(wanted) - set(known))
    if len(missing) == len(set(wanted)):
        raise UserError(
            f"{ratings}: rates none of the subjects and trials of {path} (which has subject {wanted[0][0]}, trial "
            f"{wanted[0][1]}); do {mapping.ratings_subject or 'subject'} and {trial_column} name them?"
        )
    if missing:
        say(f"{ratings}: no rating for {len(missing)} trials, first subject {missing[0][0]}, trial {missing[0][1]}")
    for name, felt in zip(("valence", "arousal"), np.array([known.get(key, (np.nan, np.nan)) for key in wanted]).T):
        rows[name] = felt
