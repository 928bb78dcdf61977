"""Made-up EEG whose band power depends on valence and arousal in a physiologically flavoured way.

Each channel is noise shaped to 1/f with a bump for every rhythm. The bumps' heights (in log power) are

- of the place: alpha strongest at the back, beta and gamma at the front and the temples;
- of valence: frontal alpha asymmetry (pleasant: less alpha on the left, that is, more activity there), the opposite in
  beta; and frontal theta up, gamma down;
- of arousal: beta and gamma up, most at the temples, and alpha down at the back;
- of a slow state of the head, which shows as theta and alpha everywhere and on which it depends how strong asymmetry
  and arousal show: a model that is linear in band power sees only a part of them;
- of the subject: large gains of each rhythm (as between real heads, so that power means little before each subject is
  normalised by itself), small ones of each channel, its alpha frequency; of the trial and of the moment.
"""

from collections.abc import Sequence

import numpy as np

# BioSemi's own order, which is not the one that readers of MAHNOB-HCI use.
BIOSEMI_CHANNELS = (
    *("Fp1", "AF3", "F7", "F3", "FC1", "FC5", "T7", "C3", "CP1", "CP5", "P7", "P3", "Pz", "PO3", "O1", "Oz"),
    *("O2", "PO4", "P4", "P8", "CP6", "CP2", "C4", "T8", "FC6", "FC2", "F4", "F8", "AF4", "Fp2", "Fz", "Cz"),
)

_RHYTHMS = 5  # delta, theta, alpha, beta, gamma
_CENTRES = np.array([2.2, 6.0, 10.2, 20.0, 37.0])  # Hz
_WIDTHS = np.array([0.9, 1.1, 1.3, 4.5, 4.5])  # Hz
_HEIGHTS = np.array([9.0, 5.0, 9.0, 1.2, 0.5])  # uV^2/Hz at the peak
_BLOCK_SECONDS = 2.0  # over which the state of the moment stays the same


class Subject:
    """One made-up head: fixed gains of every channel and rhythm, drawn from ``rng``."""

    def __init__(self, channels: Sequence[str], rng: np.random.Generator, noise: float = 1.0):
        self.place, self.valence, self.asymmetry, self.arousal, self.state = _topographies(channels)
        self.rng, self.noise = rng, noise
        self.gain = 1.2 * rng.normal(size=_RHYTHMS) + 0.25 * rng.normal(size=self.place.shape)
        self.centres = _CENTRES + np.array([0, 0, 0.7, 0, 0]) * rng.normal()
        self.strength = rng.uniform(0.8, 1.2)

    def record(self, seconds: float, rate: float, valence: float, arousal: float) -> np.ndarray:
        """EEG float64 [channels, samples] in uV, without an offset, while the subject feels so (both in [-1, 1])."""
        rng, noise = self.rng, self.noise
        samples, block = round(seconds * rate), round(_BLOCK_SECONDS * rate)
        blocks = samples // block + 2
        trial = noise * (0.10 * rng.normal(size=_RHYTHMS) + 0.08 * rng.normal(size=self.place.shape))
        moment = noise * (
            0.15 * rng.normal(size=(blocks, 1, _RHYTHMS)) + 0.15 * rng.normal(size=(blocks, *self.place.shape))
        )
        state = rng.uniform(-1, 1, size=(blocks, 1, 1))
        felt = valence * (self.valence + (0.3 + state) * self.asymmetry) + arousal * (1 + 0.9 * state) * self.arousal
        log_gain = self.place + self.gain + trial + moment + state * self.state + self.strength * felt

        # Blocks of shaped noise, each twice as long as its step, faded into the next with constant power.
        frequency = np.fft.rfftfreq(2 * block, 1 / rate)
        bumps = _HEIGHTS * np.exp(-0.5 * ((frequency[:, None] - self.centres) / _WIDTHS) ** 2)
        density = np.exp(log_gain) @ bumps.T + 12.0 / (frequency + 0.5) ** 1.2 * (frequency > 0.1)
        shape = (blocks, len(self.place), len(frequency))
        spectrum = (rng.normal(size=shape) + 1j * rng.normal(size=shape)) * np.sqrt(density * rate * block / 2)
        pieces = np.fft.irfft(spectrum, 2 * block, axis=-1) * np.sin(np.pi * (np.arange(2 * block) + 0.5) / (2 * block))
        out = np.zeros((len(self.place), (blocks + 1) * block))
        for i, piece in enumerate(pieces):
            out[:, i * block : (i + 2) * block] += piece
        return out[:, block : block + samples]


def draw_ratings(rng: np.random.Generator, subjects: int, clips: int) -> tuple[np.ndarray, np.ndarray]:
    """Valence and arousal felt, float64 [subjects, clips] in [-1, 1].

    Clips spread over the valence/arousal plane (calm ones of strong valence are rare, as in film clips); each subject
    feels a clip in its own way.
    """
    spread = np.stack([(np.arange(clips) + 0.5) / clips, ((np.arange(clips) + 0.5) * 0.618034) % 1.0]) * 2 - 1
    clip_valence, clip_arousal = spread
    valence = clip_valence + 0.35 * rng.normal(size=(subjects, clips))
    arousal = clip_arousal + 0.35 * rng.normal(size=(subjects, clips))
    calm = arousal < -0.6
    valence = np.where(calm, valence * 0.75, valence)
    return valence.clip(-1, 1), arousal.clip(-1, 1)


def _topographies(channels: Sequence[str]):
    """Five float64 [channels, rhythms]: place, and effects of valence (steady, asymmetry), arousal and the state."""
    front, back, temple, side = (np.zeros(len(channels)) for _ in range(4))
    for i, name in enumerate(channels):
        letters, number = name.rstrip("0123456789zZ").upper(), name.lstrip("AFCPTOfcptoZz")
        front[i] = {"FP": 1.0, "AF": 1.0, "F": 1.0, "FC": 0.6, "C": 0.2, "T": 0.2}.get(letters, 0.0)
        back[i] = {"O": 1.0, "PO": 0.9, "P": 0.7, "CP": 0.3}.get(letters, 0.0)
        temple[i] = {"T": 1.0, "F": 0.4, "FC": 0.5, "P": 0.4, "CP": 0.3}.get(letters, 0.1)
        side[i] = 0.0 if not number else (1.0 if int(number) % 2 == 0 else -1.0)
    zero = np.zeros(len(channels))
    columns = (
        (0.6 * front, 0.2 * front, 1.3 * back, 0.4 * front + 0.4 * temple, 0.3 * front + 0.6 * temple),
        (zero, 0.4 * front + 0.08, zero, zero, 0.12 * front - 0.24),
        (zero, zero, 1.6 * side * front, -0.95 * side * front, zero),
        (zero, zero, -0.4 * back, 0.16 + 0.28 * temple, 0.2 + 0.4 * temple),
        (zero, zero + 0.6, zero + 0.4, zero, zero),
    )
    return tuple(np.column_stack(column) for column in columns)
