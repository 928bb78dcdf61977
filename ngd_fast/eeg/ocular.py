"""Blinks and eye movements taken out of a trial: by MNE's ICA, or by regression on EOG channels."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import Field

from ngd_fast.config import Config
from ngd_fast.eeg.channels import import_mne, plain_name
from ngd_fast.eeg.trials import TrialFault
from ngd_fast.errors import UserError

_FRONTAL = ("fp1", "fpz", "fp2", "af7", "af3", "af4", "af8")


class OcularConfig(Config):
    """``ica`` leaves out the components that go with the eyes; ``regression`` subtracts what EOG channels predict.

    ICA takes the recording's EOG channels, and where it has none the frontal EEG channels, which see the eyes best.
    """

    method: Literal["ica", "regression"] | None = None
    correlation: float = Field(0.7, gt=0, lt=1, description="of a component with an EOG or frontal channel, 1 to 10 Hz")
    seed: int = Field(0, ge=0, lt=2**32, description="of the ICA's start")


def remove_ocular(
    signals: np.ndarray, eog: np.ndarray | None, rate: float, channels: Sequence[str], config: OcularConfig, where: str
) -> tuple[np.ndarray, int]:
    """Signals float64 [channels, samples] (uV, filtered, not yet re-referenced) without what the eyes put there.

    eog [k, samples], filtered alike, or None. Returns the number of components (or EOG channels) taken out too.
    Raises UserError where there is no channel to know the eyes by, TrialFault where the ICA fails.
    """
    if eog is not None and not np.ptp(eog, axis=1).all():
        eog = eog[np.ptp(eog, axis=1) > 0]
    if config.method == "regression":
        if eog is None or not len(eog):
            raise UserError(
                f"{where}: ocular.method=regression needs EOG channels, and there are none; ica does without"
            )
        centred = eog - eog.mean(axis=1, keepdims=True)
        weights, *_ = np.linalg.lstsq(centred.T, signals.T, rcond=None)
        return signals - weights.T @ centred, len(eog)
    mne = import_mne()
    frontal = [name for name in channels if plain_name(name).lower() in _FRONTAL]
    eyes = [f"EOG {i}" for i in range(len(eog))] if eog is not None and len(eog) else frontal
    if not eyes:
        raise UserError(f"{where}: ocular.method=ica needs EOG or frontal channels; there are {', '.join(channels)}")
    names, kinds, rows = list(channels), ["eeg"] * len(channels), signals
    if eyes is not frontal:
        names, kinds, rows = [*names, *eyes], [*kinds, *["eog"] * len(eyes)], np.vstack([signals, eog])
    raw = mne.io.RawArray(rows * 1e-6, mne.create_info(names, rate, kinds, verbose="error"), verbose="error")
    ica = mne.preprocessing.ICA(n_components=0.999999, random_state=config.seed, max_iter=500, verbose="error")
    try:
        # Slow drift would fill the components; the ones found are then taken out of the signals as they are.
        ica.fit(raw.copy().filter(1.0, None, picks="all", verbose="error"), picks="eeg", verbose="error")
        found, _ = ica.find_bads_eog(
            raw, ch_name=eyes, measure="correlation", threshold=config.correlation, verbose="error"
        )
        ica.apply(raw, exclude=found, verbose="error")
    except (ValueError, RuntimeError, np.linalg.LinAlgError) as error:
        raise TrialFault(
            "trials without an ICA", f"{where}: the ICA failed ({' '.join(str(error).split())[:100]})"
        ) from None
    return raw.get_data(picks="eeg") * 1e6, len(found)
