"""Names of electrodes as devices and files write them, and where those electrodes sit."""

import difflib
import re
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from ngd_fast.errors import UserError

# Names of the first international 10-20 system for electrodes that some devices still use.
_OLD_NAMES = {"t3": "T7", "t4": "T8", "t5": "P7", "t6": "P8"}
# "EEG Fp1-Ref", "EEG F3-A1", "Fc5.", "C3-LE": what stands around an electrode's name in EDF and other files. The
# reference is no part of the name; a pair of electrodes ("F3-C3") is no electrode and keeps its name.
ELECTRODE = r"(?:EEG[\s_:.-]+)?(?P<channel>[A-Za-z]+\d*)(?:\.+|[\s_-]+(?:ref|le|re|avg|av|car|[am]1[am]2|[am][12]))?"
_DRESSED = re.compile(f"^{ELECTRODE}$", re.IGNORECASE)
_EARS = ("a1", "a2", "m1", "m2")


def plain_name(name: str) -> str:
    """An electrode's name without prefix, reference and dots, and the current one of the 10-10 system for old ones.

    ``"EEG T3-Ref"`` is ``"T7"``. Capitals are left alone: montages are searched in any case.
    """
    match = _DRESSED.match(str(name).strip())
    plain = match["channel"] if match else str(name).strip()
    return _OLD_NAMES.get(plain.lower(), plain)


def import_mne():
    """MNE with its log silenced, or a UserError that names the extra."""
    try:
        import mne
    except ImportError:
        raise UserError("electrode positions and recordings need MNE: pip install 'ngd-fast[eeg]'") from None
    mne.set_log_level("ERROR")
    return mne


@lru_cache(maxsize=8)
def montage_positions(montage: str) -> dict[str, tuple[str, np.ndarray]]:
    """{name in lower case: (the montage's own writing, float64 [3])}; see :func:`channel_positions`."""
    mne = import_mne()
    builtin = mne.channels.get_builtin_montages()
    # MNE 1.13 renamed standard_1020 and its like to colin27_1020; both names are good with any version.
    kind = montage.removeprefix("standard_").removeprefix("colin27_")
    name = next((n for n in (montage, f"colin27_{kind}", f"standard_{kind}") if n in builtin), None)
    try:
        if name is not None:
            known = mne.channels.make_standard_montage(name)
        else:
            known = mne.channels.read_custom_montage(montage)
    except Exception:  # MNE meets a file that is none with whatever its parsing runs into
        near = ", ".join(difflib.get_close_matches(montage, builtin, n=3, cutoff=0.0))
        raise UserError(
            f"montage {montage}: neither a readable file of positions nor a name that MNE knows, such as {near}"
        ) from None
    # The whole montage, not only the channels asked for: the head frame comes from its fiducials.
    info = mne.create_info(known.ch_names, 1.0, "eeg", verbose="error").set_montage(known, verbose="error")
    return {c["ch_name"].lower(): (c["ch_name"], np.array(c["loc"][:3], np.float64)) for c in info["chs"]}


def without_position(names: Sequence[str], montage: str) -> list[str]:
    """Those of ``names`` that the montage does not have."""
    known = montage_positions(montage)
    return [name for name in names if name.lower() not in known and plain_name(name).lower() not in known]


def find_channels(names: Sequence[str], montage: str) -> list[str | None]:
    """Each name as the montage writes it, in any case and dress; None where it has no such electrode, and for ears."""
    known = montage_positions(montage)
    found = []
    for name in names:
        written = next((known[n.lower()][0] for n in (name, plain_name(name)) if n.lower() in known), None)
        found.append(None if written is None or written.lower() in _EARS else plain_name(written))
    return found


def channel_positions(channels: Sequence[str], montage: str = "standard_1020") -> np.ndarray:
    """Electrode positions float64 [channels, 3] in metres, in MNE's head coordinates (x right, y front, z up).

    ``montage`` is a name that ``mne.channels.make_standard_montage`` knows or a file ``read_custom_montage`` reads.
    """
    import_mne()  # also where the montage is known already
    known = montage_positions(montage)
    found = [known.get(c.lower(), known.get(plain_name(c).lower())) for c in channels]
    missing = [c for c, position in zip(channels, found) if position is None]
    if missing:
        raise UserError(
            f"montage {montage} has no position for {', '.join(missing)}; "
            "name another montage, or leave these channels out (exclude_channels)"
        )
    positions = np.array([position for _, position in found]).reshape(-1, 3)
    if not np.isfinite(positions).all():
        raise UserError(f"montage {montage}: a position is no number")
    return positions
