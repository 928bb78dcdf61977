"""Several files of topomaps as one: common bands and channels, one grid, subjects kept apart."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ngd_fast.artifacts.files import sha256
from ngd_fast.console import say
from ngd_fast.eeg.channels import plain_name
from ngd_fast.eeg.manifest import SUFFIX, Topomaps
from ngd_fast.errors import UserError


def load_maps(paths: str | Path | Sequence[str | Path]) -> tuple[Topomaps, str, dict[str, np.ndarray]]:
    """The windows of one file or of several joined; a checksum; the rows of each file by its dataset's name.

    Of several files the bands and channels that all have are kept. Their subjects are numbered on: those of the second
    file begin above a round number (``meta["joined"]``), so that nobody is mistaken for someone else. The checksum is
    the file's SHA-256, or that of the files' in a row.

    Raises UserError for files that cannot be read, that share no band or channel, or whose maps differ in size.
    """
    paths = [paths] if isinstance(paths, (str, Path)) else list(paths)
    loaded = [Topomaps.load(path) for path in paths]
    sums = [sha256(path) for path in paths]
    names = [Path(path).name.removesuffix(SUFFIX) for path in paths]
    if len(set(names)) < len(names):
        names = [f"{name}_{i}" for i, name in enumerate(names, 1)]
    if len(set(sums)) < len(sums):
        raise UserError(f"--maps: {paths[0]} and another are the same file; its subjects would count twice")
    if len(loaded) == 1:
        return loaded[0], sums[0], {names[0]: np.arange(len(loaded[0]))}
    bands = [band for band in loaded[0].bands if all(band in maps.bands for maps in loaded)]
    plain = [[plain_name(c).lower() for c in maps.channels] for maps in loaded]
    channels = [name for name in plain[0] if all(name in other for other in plain)]
    sizes = {maps.maps.shape[2:] for maps in loaded}
    if not bands or not channels:
        what = "band" if not bands else "channel"
        raise UserError(f"--maps: {', '.join(map(str, paths))} have no {what} in common")
    if len(sizes) > 1:
        said = ", ".join(f"{p} {m.maps.shape[2]}x{m.maps.shape[3]}" for p, m in zip(paths, loaded))
        raise UserError(f"--maps: {said}; draw all with the same topomap.resolution")
    for what, kept, had in (("bands", bands, [m.bands for m in loaded]), ("channels", channels, plain)):
        if any(len(kept) < len(h) for h in had):
            say(f"{what} that all {len(paths)} files have: {', '.join(kept)}")
    picks = [[list(maps.bands).index(band) for band in bands] for maps in loaded]
    rows = [[own.index(name) for name in channels] for own in plain]
    step = 10 ** len(str(max(int(maps.subject.max(initial=0)) for maps in loaded)))
    if any(maps.subject.min(initial=0) < 0 for maps in loaded):
        raise UserError("--maps: subjects of joined files must not be negative")
    ends = np.cumsum([0, *map(len, loaded)])
    whole = {
        name: np.concatenate([getattr(maps, name) for maps in loaded])
        for name in ("trial", "window", "valence", "arousal")
    }
    joined = Topomaps(
        maps=np.concatenate([maps.maps[:, pick] for maps, pick in zip(loaded, picks)]),
        power=np.concatenate([maps.power[:, row][:, :, pick] for maps, row, pick in zip(loaded, rows, picks)]),
        subject=np.concatenate([maps.subject + i * step for i, maps in enumerate(loaded)]),
        **whole,
        bands=np.array(bands),
        channels=loaded[0].channels[rows[0]],
        mask=np.logical_and.reduce([maps.mask for maps in loaded]),
        meta={
            "joined": {name: {"sha256": s, "first_subject": i * step} for i, (name, s) in enumerate(zip(names, sums))}
        },
    )
    checksum = hashlib.sha256("".join(sums).encode()).hexdigest()
    return joined, checksum, {name: np.arange(*ends[i : i + 2]) for i, name in enumerate(names)}
