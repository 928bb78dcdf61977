"""MAHNOB-HCI (Soleymani et al., 2012): one folder a session with session.xml and a BDF of 32 EEG channels."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from ngd_fast.artifacts.files import sha256
from ngd_fast.console import say
from ngd_fast.eeg.channels import import_mne
from ngd_fast.eeg.raw import Recording, open_file
from ngd_fast.eeg.trials import Exclusions, Trial, TrialFault, TrialSource, scale_rating
from ngd_fast.errors import UserError

# The 32 EEG channels. Their order within the files differs: they are always picked by name.
CHANNELS = (
    *("Fp1", "AF3", "F3", "F7", "FC5", "FC1", "C3", "T7", "CP5", "CP1", "P3", "P7", "PO3", "O1", "Oz", "Pz"),
    *("Fp2", "AF4", "Fz", "F4", "F8", "FC6", "FC2", "Cz", "C4", "T8", "CP6", "CP2", "P4", "P8", "PO4", "O2"),
)
RATING_RANGE = (1, 9)
_BASELINE_SECONDS = 30.0  # recorded before each clip


def open_mahnob(folder: str | Path, channels: Sequence[str] = CHANNELS) -> TrialSource:
    """The sessions below ``folder`` (``ID/session.xml`` and ``ID/*.bdf``); a trial's number is its session's id.

    The stimulus lies between the first two events of the Status channel (after a single event: for the clip's length
    that session.xml names); the baseline is the 30 s before. Felt valence and arousal run from 1 to 9. Sessions without
    them (implicit tagging, "not reported") stay as unlabelled support and are counted in meta["unlabelled_sessions"].

    Raises UserError where there is no session; a session that cannot be used is left out and counted.
    """
    folder = Path(folder)
    import_mne()
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder (wanted MAHNOB-HCI's Sessions)")
    sessions = sorted((p.parent for p in folder.glob("*/session.xml")), key=lambda p: (_number(p.name), p.name))
    if not sessions:
        raise UserError(f"{folder}: holds no session (wanted folders with a session.xml and a .bdf)")
    numbers = [_number(session.name) for session in sessions]
    for i, number in enumerate(numbers):
        if numbers.index(number) != i and number >= 0:
            raise UserError(f"{sessions[numbers.index(number)]} and {sessions[i]} are both session {number}")
    meta = {"dataset": "MAHNOB-HCI", "files": {}, "sampling_rates": [], "unlabelled_sessions": 0}

    def trials(exclusions: Exclusions) -> Iterator[Trial]:
        for session in sessions:
            try:
                trial = _read_session(session, channels, meta)
            except TrialFault as fault:
                exclusions.add(fault.reason, str(fault))
                continue
            yield trial
        if meta["unlabelled_sessions"]:
            say(f"{folder}: {meta['unlabelled_sessions']} sessions have no ratings; kept as unlabelled support")

    return TrialSource("mahnob", tuple(channels), len(sessions), trials, meta)


def _number(name: str) -> int:
    digits = re.search(r"[0-9]{1,18}", name)
    return int(digits.group()) if digits else -1


def _read_session(folder: Path, channels: Sequence[str], meta: dict) -> Trial:
    xml = folder / "session.xml"
    try:
        session = ElementTree.parse(xml).getroot()
    except (ElementTree.ParseError, ValueError, LookupError, OSError) as error:  # LookupError: an unknown encoding
        raise TrialFault("sessions with an unreadable session.xml", f"{xml}: {error}") from None
    subject = session.find("subject")
    number = -1 if subject is None else _number(subject.get("id", ""))
    if number < 0 or _number(folder.name) < 0:
        raise TrialFault("sessions without a subject or id", f"{xml}: names no subject, or its folder no session id")
    # Hidden files: macOS puts a ._NAME.bdf beside every recording.
    recordings = sorted(p for p in folder.iterdir() if p.suffix.lower() == ".bdf" and not p.name.startswith("."))
    if len(recordings) != 1:
        names = f" ({recordings[0].name} and {recordings[1].name})" if recordings else ""
        detail = f"{folder}: holds {len(recordings)} BDF files{names}, wanted one"
        raise TrialFault("sessions without a BDF", detail)
    stimulus, baseline, rate = _read_bdf(recordings[0], channels, session.get("cutLenSec"))
    valence, arousal = _ratings(session, xml)
    meta["unlabelled_sessions"] += int(np.isnan(valence))
    meta["files"][f"{folder.name}/{recordings[0].name}"] = sha256(recordings[0])
    meta["sampling_rates"] = sorted({*meta["sampling_rates"], rate})
    return Trial(number, _number(folder.name), stimulus, baseline, rate, valence, arousal, str(folder))


def _ratings(session, xml: Path) -> tuple[float, float]:
    """Felt valence and arousal in [-1, 1]; NaN for both where one is not a number or out of range (which is said)."""
    try:
        felt = [float(session.get(name, "")) for name in ("feltVlnc", "feltArsl")]
    except ValueError:  # absent, or "not-reported"
        return np.nan, np.nan
    try:
        return tuple(scale_rating(rating, *RATING_RANGE, str(xml)) for rating in felt)
    except UserError as error:
        say(f"{error}; the session stays as unlabelled support")
        return np.nan, np.nan


def _read_bdf(path: Path, channels: Sequence[str], clip_seconds: str | None):
    """Stimulus and baseline float64 [channels, samples] in uV (baseline None where nothing precedes), sampling rate."""
    mne = import_mne()
    try:
        with open(path, "rb") as file:
            count = file.read(256)[252:].strip()
        if count.isdigit() and path.stat().st_size < 256 * (int(count) + 1):
            raise TrialFault("unreadable BDFs", f"{path}: not a readable BDF (a header of {int(count)} signals)")
        recording = open_file(
            path, read=lambda p: mne.io.read_raw_bdf(p, preload=False, stim_channel="Status", verbose="error")
        )
        lookup = {name.lower(): i for i, name in enumerate(recording.data.ch_names)}
        missing = [name for name in channels if name.lower() not in lookup]
        if missing:
            raise TrialFault("BDFs that lack channels", f"{path}: lacks the channels {', '.join(missing)}")
        if "status" not in lookup:
            raise TrialFault("BDFs without a Status channel", f"{path}: has no Status channel, so no stimulus events")
        recording.names = {name: lookup[name.lower()] for name in channels}
        start, stop = _stimulus_span(recording, clip_seconds)
        first = max(0, start - round(_BASELINE_SECONDS * recording.rate))
        signals = recording.read(channels, first, stop, 1.0)
    except TrialFault:
        raise
    except UserError as error:
        raise TrialFault("unreadable BDFs", str(error)) from None
    return signals[:, start - first :], signals[:, : start - first] if start > first else None, recording.rate


def _stimulus_span(recording: Recording, clip_seconds: str | None) -> tuple[int, int]:
    """First sample of the stimulus and the one after its last: the first two rises of the trigger lines."""
    path, rate = recording.path, recording.rate
    rises = [round(event.onset * rate) for event in recording.events if event.code is not None]
    if len(rises) >= 2:
        return rises[0], rises[1]
    try:
        length = float(clip_seconds or "nan")
    except ValueError:
        length = np.nan
    if len(rises) == 0 or not 0 < length < recording.samples / rate:
        raise TrialFault(
            "BDFs without Status events",
            f"{path}: {len(rises)} events in its Status channel, wanted two (start and end of the stimulus)",
        )
    stop = rises[0] + round(length * rate)
    if stop > recording.samples:
        late = (stop - recording.samples) / rate
        raise TrialFault("BDFs that end within the clip", f"{path}: ends {late:g} s too early")
    return rises[0], stop
