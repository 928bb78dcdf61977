"""From recordings, or from rows of band power, to topomaps."""

import contextlib
import ctypes
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from threading import Lock
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from ngd_fast.config import Config
from ngd_fast.console import progress, say
from ngd_fast.devices import pick_device
from ngd_fast.eeg.bandpower import PowerConfig, features_of_power, split_windows, window_power
from ngd_fast.eeg.channels import channel_positions
from ngd_fast.eeg.cleaning import CleaningConfig, clean, find_bad_channels, interpolation_weights
from ngd_fast.eeg.manifest import Topomaps
from ngd_fast.eeg.normalise import NormaliseConfig, z_score
from ngd_fast.eeg.quality import Quality, mean_spectrum
from ngd_fast.eeg.topomap import TopomapConfig, TopomapOperator, make_operator
from ngd_fast.eeg.trials import ROW, Exclusions, Trial, TrialFault, TrialSource
from ngd_fast.errors import UserError

# Centre of the head in MNE's head coordinates (metres), as in its default sphere model.
_HEAD_CENTRE = (0.0, 0.0, 0.04)
_KEPT_DETAILS = 500  # lines on what was left out that the file keeps
_HELD_BYTES = 64 << 20  # of signals that are being worked on


class MapConfig(Config):
    """From band power to topomaps: all that a table of band power needs."""

    bad_channels: Literal["interpolate", "exclude", "error"] = Field(
        "interpolate",
        description="what becomes of a NaN or flat channel: rebuilt by spherical splines; its trial (or row) left out",
    )
    max_bad_fraction: float = Field(0.25, ge=0, lt=1, description="with more bad channels the trial is left out anyway")
    exclude_channels: tuple[str, ...] = ()
    topomap: TopomapConfig = TopomapConfig()
    normalise: NormaliseConfig = NormaliseConfig()
    use_ratings: bool = Field(True, description="false: keep every window as unlabelled support")


class EegConfig(MapConfig):
    """From recordings to topomaps."""

    window_seconds: float = Field(2.0, gt=0, le=86_400)
    window_overlap: float = Field(0.0, ge=0, lt=1, description="fraction of a window that the next one shares")
    last_seconds: float | None = Field(None, gt=0, le=86_400, description="use only the end of each stimulus")
    cleaning: CleaningConfig = CleaningConfig()
    power: PowerConfig = PowerConfig()
    device: str = Field("auto", description="where spectra are computed: auto, cpu, cuda, cuda:1")

    @model_validator(mode="after")
    def _check(self):
        if self.last_seconds is not None and self.last_seconds < self.window_seconds:
            raise ValueError("last_seconds must be at least window_seconds")
        return self


def topomaps_from_recordings(source: TrialSource, config: EegConfig) -> Topomaps:
    """All trials of a source to topomaps: one is read while others are worked on, as many as fit into 64 MB or one.

    What cannot be used is left out, printed and counted in ``meta["exclusions"]``. Raises UserError where nothing is
    left or the configuration does not fit the recordings.
    """
    reader = _FeatureReader(source, config)
    # A montage that does not fit is told before the work, not after it.
    operator = make_operator(reader.channels, config.topomap, reader.mender.positions)
    source.with_baseline = config.power.baseline != "none"
    source.with_eog = config.cleaning.ocular.method is not None
    exclusions, quality = Exclusions(), Quality()
    features, rows = [], []
    trials = progress(source.trials(exclusions), desc="band power", total=source.count, unit="trial")
    for trial, result in _in_parallel(reader.features, trials):
        try:
            feature, marked, done = result()
        except TrialFault as fault:
            exclusions.add(fault.reason, str(fault))
            continue
        usable = np.isfinite(feature).all(axis=(1, 2)) & ~marked
        if marked.any():
            lost = int(marked.sum())
            exclusions.add("windows in bad spans", f"{trial.where}: {lost} windows touch a span marked as bad", lost)
        if not (usable | marked).all():
            lost = int((~usable & ~marked).sum())
            exclusions.add("windows without power", f"{trial.where}: {lost} windows hold a band without power", lost)
        quality.add(trial, windows=int(usable.sum()), cut=int((~usable).sum()), **done)
        row = np.empty(int(usable.sum()), ROW)
        row["subject"], row["trial"], row["window"] = trial.subject, trial.trial, np.flatnonzero(usable)
        row["valence"], row["arousal"] = trial.valence, trial.arousal
        features.append(feature[usable].astype(np.float32))
        rows.append(row)
    if not sum(map(len, rows)):
        raise UserError(f"{source.name}: no usable window; left out: {exclusions}")
    features, rows = np.concatenate(features), np.concatenate(rows)
    _return_freed_memory()
    bands, meta = list(config.power.bands), {**source.meta, "quality": quality.meta()}
    return draw(features, rows, reader.channels, bands, config, meta, exclusions, reader.mender, operator)


def _in_parallel(function: Callable, trials: Iterable[Trial]) -> Iterator[tuple[Trial, Callable]]:
    """(trial without its signals, what returns or raises as function(trial) does) for each trial, in their order."""
    import torch

    threads = torch.get_num_threads()
    held: deque[tuple[Trial, Future, int]] = deque()

    def oldest():
        trial, future, _ = held.popleft()
        wait([future])
        return trial, future.result

    # NumPy, SciPy and PyTorch let go of the interpreter while they filter and transform.
    pool = ThreadPoolExecutor(max(1, threads), initializer=torch.set_num_threads, initargs=(1,))
    try:
        for trial in trials:
            size = trial.stimulus.nbytes
            while held and sum(held_size for *_, held_size in held) + size > _HELD_BYTES:
                yield oldest()
            held.append((replace(trial, stimulus=None, baseline=None, eog=None), pool.submit(function, trial), size))
            del trial
        while held:
            yield oldest()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def _return_freed_memory() -> None:
    """glibc keeps what the threads freed, a third of a gigabyte, beside which the maps would now be made."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def draw(
    features: np.ndarray,
    rows: np.ndarray,
    channels: Sequence[str],
    bands: Sequence[str],
    config: MapConfig,
    meta: Mapping[str, Any],
    exclusions: Exclusions,
    mender: "ChannelMender",
    operator: TopomapOperator,
) -> Topomaps:
    """Normalise features [N, channels, bands] (all finite) and draw them, subject by subject.

    rows is a structured array of dtype :data:`~ngd_fast.eeg.trials.ROW`; the result is ordered by subject, trial and
    window.
    """
    order = np.lexsort((rows["window"], rows["trial"], rows["subject"]))
    features, rows = np.ascontiguousarray(features[order], np.float32), rows[order]
    if not config.use_ratings:
        rows["valence"] = rows["arousal"] = np.nan
    scores = z_score(features, rows["subject"], list(bands), config.normalise)
    maps = np.empty((len(rows), len(bands), *operator.mask.shape), np.float32)
    subjects, starts = np.unique(rows["subject"], return_index=True)
    ends = np.append(starts[1:], len(rows))
    for start, end in progress(zip(starts, ends), desc="topomaps", total=len(subjects), unit="subject"):
        operator.render_unit(scores[start:end].transpose(0, 2, 1), maps[start:end])
    if mender.rebuilt:
        said = ", ".join(f"{name} {count} times" for name, count in sorted(mender.rebuilt.items()))
        say(f"rebuilt from their neighbours: {said}")
    meta = {
        **meta,
        "config": config.model_dump(mode="json"),
        "normalisation": "per subject and band, from that subject's own windows only",
        "exclusions": dict(exclusions.counts),
        "left_out": exclusions.details[:_KEPT_DETAILS],
        "rebuilt_channels": dict(mender.rebuilt),
    }
    try:
        return Topomaps(
            maps=maps,
            power=features,
            **{name: rows[name] for name in ROW.names},
            bands=np.array(list(bands)),
            channels=np.array(channels),
            mask=operator.mask,
            meta=meta,
        )
    except ValueError as error:  # settings of which numbers come that are none, such as a border beyond all values
        raise UserError(f"no maps can be drawn of these values with these settings ({error})") from None


def pick_channels(channels: Sequence[str], exclude: Sequence[str]) -> list[int]:
    """Indices of the channels that stay. Raises UserError for a name to exclude that is not there."""
    unwanted = {name.lower() for name in exclude}
    unknown = unwanted - {name.lower() for name in channels}
    if unknown:
        raise UserError(f"exclude_channels: no channel {', '.join(sorted(unknown))}; there are {', '.join(channels)}")
    return [i for i, name in enumerate(channels) if name.lower() not in unwanted]


class ChannelMender:
    """Does with bad channels what is configured, and counts by name how often each was rebuilt."""

    def __init__(self, channels: Sequence[str], config: MapConfig, positions: np.ndarray | None = None):
        self.channels, self.config = np.asarray(channels), config
        if positions is None:
            positions = channel_positions(channels, config.topomap.montage)
        self.positions = positions
        self.rebuilt: Counter[str] = Counter()
        self._lock = Lock()

    def mend(self, values: np.ndarray, bad: np.ndarray, where: str) -> np.ndarray:
        """values [channels, ...] with the bad ones (bool [channels]) rebuilt from the others.

        Raises TrialFault where the trial is to be left out, UserError where a bad channel is an error.
        """
        if not bad.any():
            return values
        names = ", ".join(self.channels[bad])
        if self.config.bad_channels == "error":
            raise UserError(
                f"{where}: NaN or flat in {names}; bad_channels=interpolate rebuilds them, exclude leaves the trial out"
            )
        if self.config.bad_channels == "exclude":
            raise TrialFault("bad channels", f"{where}: NaN or flat in {names}")
        if bad.mean() > self.config.max_bad_fraction:
            raise TrialFault("too many bad channels", f"{where}: NaN or flat in {bad.sum()} channels ({names})")
        centred = self.positions - self.config.topomap.sphere[:3] - _HEAD_CENTRE
        mended = np.array(values, np.float64)
        mended[bad] = np.tensordot(interpolation_weights(centred, bad), mended[~bad], axes=1)
        with self._lock:
            self.rebuilt.update(self.channels[bad].tolist())
        return mended


class _FeatureReader:
    """Turns trials of one source into features."""

    def __init__(self, source: TrialSource, config: EegConfig):
        self.config = config
        self.picks = pick_channels(source.channels, config.exclude_channels)
        self.channels = [source.channels[i] for i in self.picks]
        positions = source.positions if source.positions is None else source.positions[self.picks]
        self.mender = ChannelMender(self.channels, config, positions)
        self.device = str(pick_device(config.device))

    def features(self, trial: Trial) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        """Features float64 [windows, channels, bands] of a trial, bool [windows]: which touch a bad span, and what
        :meth:`Quality.add` wants to know.

        Raises TrialFault where there are none.
        """
        power, marked, done = self._power(trial, trial.stimulus, trial.bad, "stimulus", self.config.last_seconds)
        baseline = None
        if self.config.power.baseline != "none":
            if trial.baseline is None:
                raise TrialFault("trials without a baseline", f"{trial.where}: has no baseline")
            windows, dirty, _ = self._power(trial, trial.baseline, trial.baseline_bad, "baseline", None)
            baseline = windows[~dirty].mean(axis=0)
        return features_of_power(power, baseline, self.config.power), marked, done

    def _power(self, trial: Trial, signals: np.ndarray, bad, part: str, last_seconds: float | None):
        """Band power float64 [windows, channels, bands] of a stimulus or a baseline, and with it what features says."""
        where, seconds = f"{trial.where}, {part}", self.config.window_seconds
        if signals.shape[1] < round(seconds * trial.rate):
            length = signals.shape[1] / trial.rate
            raise TrialFault(
                f"{part} shorter than a window", f"{where}: {length:g} s is shorter than a window of {seconds:g} s"
            )
        signals = signals[self.picks]
        broken = find_bad_channels(signals)
        signals = self.mender.mend(signals, broken, where)
        eog = trial.eog if part == "stimulus" else None
        cleaned, rate, eyes = clean(
            signals, trial.rate, self.channels, self.config.cleaning, eog=eog, where=trial.where
        )
        done = {
            "rebuilt": self.mender.channels[broken].tolist(),
            "ocular": eyes,
            "before": mean_spectrum(signals, trial.rate),
            "after": mean_spectrum(cleaned, rate),
        }
        skipped = 0 if last_seconds is None else max(0, cleaned.shape[1] - round(last_seconds * rate))
        cleaned = cleaned[:, skipped:]
        starts = split_windows(cleaned.shape[1], rate, seconds, self.config.window_overlap)
        begin = (skipped + starts) * (trial.rate / rate)  # in samples as they were recorded
        end = begin + seconds * trial.rate
        marked = np.zeros(len(starts), bool)
        for first, last in bad:
            marked |= (begin < last) & (end > first)
        if marked.all():
            raise TrialFault(f"{part} marked as bad", f"{where}: every window touches a span marked as bad")
        return window_power(cleaned, rate, starts, seconds, self.config.power, self.device), marked, done
