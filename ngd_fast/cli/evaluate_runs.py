"""``ngd-fast evaluate table|select|calibrate|geometry``: what is made of runs that are there already."""

from dataclasses import replace
from pathlib import Path

import click

from ngd_fast.cli.checkpoints import Checkpoint
from ngd_fast.cli.evaluation_output import print_summary
from ngd_fast.console import print_table, say
from ngd_fast.errors import UserError


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path())
@click.option("--out", type=click.Path(file_okay=False), default="viz", show_default=True, help="Folder to write.")
@click.option("--baseline", help="Variant that the others are compared with.  [default: the first by name]")
@click.option(
    "--protocol", type=click.Choice(["eight_way", "present_only"]), default="eight_way", show_default=True,
    help="Of the ablation table.",
)  # fmt: skip
def table(runs, out, baseline, protocol):
    """Write xval_main.tex and ablation_lite.tex from RUNS: run folders, outs/xval_* folders, or folders above them."""
    from ngd_fast.artifacts.files import read_json
    from ngd_fast.evaluation.tables import write_tables

    files = write_tables(runs, out, protocol=protocol, baseline=baseline)
    for file in files:
        if file.suffix == ".json":
            print_summary(read_json(file))
    say(f"wrote {', '.join(str(file) for file in files)}")


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path())
@click.option("--metric", type=click.Choice(["accuracy", "macro_f1", "balanced_accuracy"]), default="macro_f1",
              show_default=True)  # fmt: skip
@click.option(
    "--select-on-test", is_flag=True,
    help="Paper mode: choose by the mean of the present-only metric over the test sets in RUNS (outs/xval_*), the very "
    "numbers that are then reported. They are optimistic; say so where you report them.",
)  # fmt: skip
@click.option("--out", type=click.Path(dir_okay=False), help="Write the choice as JSON.")
def select(runs, metric, select_on_test, out):
    """Choose the best of RUNS on the validation split."""
    from ngd_fast.artifacts.files import write_json
    from ngd_fast.evaluation.latex import percent
    from ngd_fast.evaluation.results import load_results
    from ngd_fast.evaluation.selection import rank_runs

    ranking = rank_runs(load_results(runs), metric=metric, select_on_test=select_on_test)
    columns = list(ranking["runs"][0]["datasets"])
    print_table(
        ["run", "variant", "seed", "mean", *columns],
        [
            [r["run"], r["variant"], r["seed"], percent(r["score"]), *(percent(r["datasets"][c]) for c in columns)]
            for r in ranking["runs"]
        ],
        title=f"{ranking['selected_on']}: {metric}, in %",
    )
    if select_on_test:
        say("chosen on the test sets: their metrics are no longer an unbiased estimate")
    click.echo(ranking["runs"][0]["run"])
    if out:
        write_json(out, ranking)


@click.command()
@click.argument("run", type=click.Path())
@click.option(
    "--method", type=click.Choice(["temperature", "vector"]), default="temperature", show_default=True,
    help="One temperature, which changes no prediction; or a factor and an offset for each class.",
)  # fmt: skip
def calibrate(run, method):
    """Fit the confidence of RUN's student on its validation faces, and keep the fit in the run's folder.

    evaluate, predict and export then apply it, unless --raw is given. Scores "after" are cross-fitted: no face takes
    part in the fit that it is scored with.
    """
    from ngd_fast.artifacts.figure_style import has_matplotlib, save_figure
    from ngd_fast.artifacts.files import add_to_sums, check_sums, sha256
    from ngd_fast.evaluation.calibration import (
        CALIBRATION_NAME,
        SCORES,
        calibration_scores,
        cross_fitted,
        fit_calibration,
    )
    from ngd_fast.evaluation.figures_classes import reliability_figure
    from ngd_fast.evaluation.predictions import Predictions

    student = Checkpoint.open(run, raw=True)
    folder = student.file.parent
    saved = folder / "predictions_valid.npz"
    if not saved.is_file():
        raise UserError(f"{folder}: holds no {saved.name}; wanted a finished run, whose validation faces are fitted")
    problems = [p for p in check_sums(folder) if not p.startswith((CALIBRATION_NAME, "reliability."))]
    if problems:
        raise UserError(f"{folder}: is not as it was written ({problems[0]}); see ngd-fast verify")
    predictions = Predictions.load(saved)
    fitted = fit_calibration(predictions.labels, predictions.logits, method)
    after = replace(predictions, logits=cross_fitted(predictions.labels, predictions.logits, method))
    scores = {
        "before": calibration_scores(predictions.labels, predictions.logits),
        "after": calibration_scores(after.labels, after.logits),
    }
    info = {"weights_sha256": student.sha256, "predictions_sha256": sha256(saved), "dataset": predictions.dataset}
    replace(fitted, info={**info, **scores}).save(folder / CALIBRATION_NAME)
    files = [CALIBRATION_NAME]
    if has_matplotlib():
        figure = reliability_figure({"before": predictions, f"after ({method})": after})
        files += [path.name for path in save_figure(figure, folder / "reliability", kinds=("png",))]
    add_to_sums(folder, *files)
    rows = [[when, *(f"{values[name]:.4f}" for name in SCORES)] for when, values in scores.items()]
    shown = f"temperature {1 / fitted.scale[0]:.3f}" if method == "temperature" else "vector scaling"
    title = f"{student.run} on {predictions.dataset}: {shown}; after: cross-fitted"
    print_table(["", "NLL", "Brier", "ECE", "classwise ECE"], rows, title=title)
    say(f"wrote {', '.join(str(folder / name) for name in files)}")


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path())
@click.option("--bank", type=click.Path(dir_okay=False), help="Bank of prototypes: angles to its span.")
@click.option("--out", type=click.Path(file_okay=False), default="viz", show_default=True, help="Folder to write.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of the probes' folds.")
def geometry(runs, bank, out, seed):
    """Describe the features of RUNS' validation faces: variance, margins, rank, angles to the prototypes, probes.

    Writes feature_geometry.json and feature_geometry.png: whether D-Geo contracts and Proto-KD aligns anything.
    """
    from ngd_fast.artifacts.figure_style import has_matplotlib, save_figure
    from ngd_fast.artifacts.files import write_json
    from ngd_fast.evaluation.figures_features import GEOMETRY_TITLES, feature_figure
    from ngd_fast.evaluation.geometry import describe_runs
    from ngd_fast.evaluation.results import load_results
    from ngd_fast.prototypes.bank import PrototypeBank

    results = [r for r in load_results(runs) if r.split == "valid"]
    prototypes = PrototypeBank.load(bank).prototypes.numpy() if bank else None
    described = describe_runs(results, prototypes, seed=seed)
    rows = []
    for variant, group in described.items():
        for r in group:
            rows.append([f"{variant} seed {r['seed']}", *(f"{r[k]:.4g}" if k in r else "" for k in GEOMETRY_TITLES)])
    print_table(["run", *GEOMETRY_TITLES.values()], rows)
    if prototypes is not None:
        chance = next((r["angle_random"] for group in described.values() for r in group if "angle_random" in r), None)
        if chance is not None:
            say(f"two random subspaces of this size have a mean principal angle of {chance:.1f} degrees")
    out = Path(out)
    write_json(out / "feature_geometry.json", described)
    if has_matplotlib():
        save_figure(feature_figure(described), out / "feature_geometry", kinds=("png", "pdf"))
    say(f"wrote {out / 'feature_geometry.json'}")
