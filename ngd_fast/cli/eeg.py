"""ngd-fast eeg: recordings or tables of band power to topomaps, and a picture of them."""

from collections.abc import Callable
from pathlib import Path

import click


@click.group("eeg")
def command():
    """Turn EEG recordings or tables of band power into topomaps."""


def _options(function: Callable) -> Callable:
    """The options that all readers share."""
    for option in (
        click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change one setting; repeatable."),
        click.option("--config", "config_path", type=click.Path(dir_okay=False), help="Settings as YAML."),
        click.option("--name", help="Stem of the files written.  [default: the dataset's or the table's name]"),
        click.option("--out", required=True, type=click.Path(file_okay=False), help="Folder to write to."),
    ):
        function = option(function)
    return function


def _recording_options(function: Callable) -> Callable:
    """The options of readers of any recording; they are keywords of ngd_fast.eeg.recordings.open_recordings."""
    for option in (
        click.option("--scale", type=float, default=1.0, show_default=True, help="Factor for signals in a wrong unit."),
        click.option(
            "--bads",
            type=click.Choice(["interpolate", "drop"]),
            default="interpolate",
            show_default=True,
            help="Channels that a file marks as bad: rebuilt, or treated as if the file lacked them.",
        ),
        click.option(
            "--channels",
            type=click.Choice(["common", "all"]),
            default="common",
            show_default=True,
            help="Keep the channels that every file has, or all, rebuilding from its neighbours what a file lacks.",
        ),
        click.option("--rating-range", nargs=2, type=float, metavar="LOW HIGH", help="The scale of the ratings."),
    ):
        function = option(function)
    return function


def _montage(config) -> str | None:
    """The montage where the user has named one; else recordings use their own positions."""
    return config.topomap.montage if "montage" in config.topomap.model_fields_set else None


@command.command()
@click.argument("mat", type=click.Path())
@_options
def dreamer(mat, out, name, config_path, overrides):
    """Topomaps of DREAMER: MAT is the owners' DREAMER.mat (v5, v7 or v7.3)."""
    from ngd_fast.config import load_config
    from ngd_fast.eeg.dreamer import open_dreamer
    from ngd_fast.eeg.pipeline import EegConfig, topomaps_from_recordings

    config = load_config(EegConfig, config_path, overrides)
    source = open_dreamer(mat)
    _save(topomaps_from_recordings(source, config), out, name or source.name)


@command.command()
@click.argument("sessions", type=click.Path())
@click.option("--unlabelled", is_flag=True, help="Leave the ratings out: all of it is unlabelled support.")
@_options
def mahnob(sessions, unlabelled, out, name, config_path, overrides):
    """Topomaps of MAHNOB-HCI: SESSIONS is the folder with one folder (session.xml and BDF) for each session."""
    from ngd_fast.config import load_config
    from ngd_fast.eeg.mahnob import open_mahnob
    from ngd_fast.eeg.pipeline import EegConfig, topomaps_from_recordings

    config = load_config(EegConfig, config_path, [*overrides, *(["use_ratings=false"] if unlabelled else [])])
    source = open_mahnob(sessions)
    _save(topomaps_from_recordings(source, config), out, name or source.name)


@command.command()
@click.argument("folder", type=click.Path())
@click.option("--ratings", type=click.Path(dir_okay=False), help="participant_ratings.csv, for the original BDFs.")
@_options
def deap(folder, ratings, out, name, config_path, overrides):
    """Topomaps of DEAP: FOLDER is data_preprocessed_matlab (s??.mat) or data_original (s??.bdf)."""
    from ngd_fast.config import load_config
    from ngd_fast.eeg.deap import open_deap
    from ngd_fast.eeg.pipeline import EegConfig, topomaps_from_recordings

    config = load_config(EegConfig, config_path, overrides)
    source = open_deap(folder, ratings)
    _save(topomaps_from_recordings(source, config), out, name or source.name)


@command.command()
@click.argument("trials", type=click.Path())
@_recording_options
@_options
def recordings(trials, out, name, config_path, overrides, **options):
    """Topomaps of your own recordings: TRIALS is a CSV with one row a trial.

    Its columns: file (EDF, BDF, FIF, BrainVision, EEGLAB, GDF, CNT ..., epochs in FIF), start and stop (seconds, or
    events: NAME, NAME@3, event:7; +60 counts from the start), subject, trial, and if there are any baseline_start,
    baseline_stop, valence, arousal and events (the file's events.tsv).
    """
    from ngd_fast.config import load_config
    from ngd_fast.eeg.pipeline import EegConfig, topomaps_from_recordings
    from ngd_fast.eeg.recordings import open_recordings

    config = load_config(EegConfig, config_path, overrides)
    source = open_recordings(trials, **options, montage=_montage(config))
    _save(topomaps_from_recordings(source, config), out, name or source.name)


@command.command()
@click.argument("root", type=click.Path())
@click.option("--task", required=True, help="The dataset's name of the task.")
@click.option("--event", "events", multiple=True, help="trial_type of a trial; repeatable.  [default: rated events]")
@click.option("--ratings", type=click.Path(dir_okay=False), help="Table of ratings, such as phenotype/sam.tsv.")
@click.option("--stop", help="Where a trial ends: an event, or +60.  [default: with its event]")
@click.option(
    "--baseline", type=click.FloatRange(0, min_open=True), help="Seconds before a trial that are its baseline."
)
@_recording_options
@_options
def bids(root, task, out, name, config_path, overrides, **options):
    """Topomaps of a BIDS dataset: trials and ratings from the events.tsv of every EEG recording of a task."""
    from ngd_fast.config import load_config
    from ngd_fast.eeg.bids import open_bids
    from ngd_fast.eeg.pipeline import EegConfig, topomaps_from_recordings

    config = load_config(EegConfig, config_path, overrides)
    source = open_bids(root, task, **options, montage=_montage(config))
    _save(topomaps_from_recordings(source, config), out, name or source.name)


@command.command()
@click.argument("csv", type=click.Path())
@click.option("--mapping", type=click.Path(dir_okay=False), help="YAML that says which columns hold what.")
@click.option(
    "--ratings",
    type=click.Path(dir_okay=False),
    help="CSV of valence and arousal by subject and trial; on a scale from 1 to 9, or the mapping's rating_range.",
)
@_options
def table(csv, mapping, ratings, out, name, config_path, overrides):
    """Topomaps of a CSV of band power: one row a window, one column for each channel and band."""
    from ngd_fast.config import load_config
    from ngd_fast.eeg.pipeline import MapConfig
    from ngd_fast.eeg.table import TableMapping, topomaps_from_table

    config = load_config(MapConfig, config_path, overrides)
    topomaps = topomaps_from_table(csv, config, load_config(TableMapping, mapping), ratings)
    _save(topomaps, out, name or Path(csv).stem)


@command.command()
@click.argument("maps", type=click.Path())
@click.option(
    "--out", default="topomaps", show_default=True, help="Picture to write; .png and .pdf unless it says one."
)
@click.option("--subject", type=int, help="Only this subject's windows.")
def show(maps, out, subject):
    """Draw the mean topomaps of the corners and the middle of the valence/arousal plane, band by band."""
    from ngd_fast.eeg.figure import draw_topomaps
    from ngd_fast.eeg.manifest import Topomaps

    for path in draw_topomaps(Topomaps.load(maps), out, subject=subject):
        click.echo(path)


@command.command()
@click.argument("maps", type=click.Path())
@click.option("--out", type=click.Path(dir_okay=False), help="Page to write.  [default: MAPS with .html]")
def report(maps, out):
    """A page on the quality of MAPS: what was cut, spectra, topomaps, ratings, and the grid that they will fill."""
    from ngd_fast.eeg.manifest import SUFFIX, Topomaps
    from ngd_fast.eeg.report import write_report

    name = Path(maps).name.removesuffix(SUFFIX)
    out = out or Path(maps).with_name(f"{name}_quality.html")
    click.echo(write_report(Topomaps.load(maps), out, f"EEG quality: {name}"))


def _save(topomaps, out: str, name: str) -> None:
    import numpy as np

    path = topomaps.save(out, name)
    labelled = int(topomaps.labelled.sum())
    excluded = topomaps.meta["exclusions"]
    click.echo(
        f"{len(topomaps)} windows ({labelled} labelled, {len(topomaps) - labelled} unlabelled) of "
        f"{len(np.unique(topomaps.subject))} subjects, {len(topomaps.channels)} channels, "
        f"bands {', '.join(topomaps.bands)}; left out: "
        + ("; ".join(f"{count} {reason}" for reason, count in sorted(excluded.items())) or "nothing")
    )
    click.echo(path)
