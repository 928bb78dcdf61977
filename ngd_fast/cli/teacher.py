"""ngd-fast teacher: train the network that regresses valence and arousal from topomaps, and cross-validate it."""

from collections.abc import Callable

import click


@click.group("teacher")
def command():
    """Train the teacher that regresses valence and arousal from topomaps."""


def _options(function: Callable) -> Callable:
    for option in (
        click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:N, or auto."),
        click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change one setting; repeatable."),
        click.option("--config", "config_path", type=click.Path(dir_okay=False), help="Settings as YAML."),
        click.option("--support", type=click.Path(), help="Topomaps without ratings (MAHNOB-HCI): consistency only."),
        click.option(
            "--maps",
            required=True,
            multiple=True,
            type=click.Path(),
            help="Labelled topomaps (*_topomaps_all.npz); repeatable, for several datasets at once.",
        ),
    ):
        function = option(function)
    return function


@command.command()
@_options
@click.option("--out", default="outs/teacher", show_default=True, type=click.Path(file_okay=False), help="Run folder.")
@click.option("--figures/--no-figures", default=True, show_default=True, help="Draw curves into OUT/viz.")
def train(maps, support, out, config_path, overrides, device, figures):
    """Train one teacher; some subjects are set aside to report on and, later, to build the prototypes."""
    from ngd_fast.artifacts.files import alone_in
    from ngd_fast.config import load_config
    from ngd_fast.devices import pick_device
    from ngd_fast.teacher.config import TeacherConfig
    from ngd_fast.teacher.run import run_training

    config = load_config(TeacherConfig, config_path, overrides)
    device = str(pick_device(device))
    with alone_in(out):
        metrics = run_training(maps, out, config, support_path=support, device=device, figures=figures)
    blocks = {"teacher": metrics["validation"], **metrics["baselines"]}
    _print_metrics(blocks, f"Validation subjects, {metrics['windows']['validation']} windows")
    click.echo(out)
    if metrics["interrupted"]:
        click.echo(f"interrupted; {out} holds epoch {metrics['best_epoch']}, the best so far", err=True)
        return 130
    return 0


@command.command()
@_options
@click.option("--folds", default="7", show_default=True, help="Number of folds by subject, or loso.")
@click.option("--seeds", default="1,2,3", show_default=True, help="Seeds of the teacher, with commas.")
@click.option("--out", default="outs/teacher_crossval", show_default=True, type=click.Path(file_okay=False))
@click.option("--figures/--no-figures", default=True, show_default=True, help="Draw curves into OUT/viz.")
def crossval(maps, support, folds, seeds, out, config_path, overrides, device, figures):
    """Train a teacher on every fold and seed; report CCC, Pearson and RMSE on subjects it has never seen."""
    from ngd_fast.artifacts.files import alone_in
    from ngd_fast.config import load_config
    from ngd_fast.devices import pick_device
    from ngd_fast.errors import UserError
    from ngd_fast.teacher.config import TeacherConfig
    from ngd_fast.teacher.crossval import run_crossval

    if folds != "loso" and not folds.isdecimal():
        raise UserError(f"--folds {folds}: must be a number of folds, or loso")
    try:
        seeds = [int(seed) for seed in seeds.split(",")]
    except ValueError:
        raise UserError(f"--seeds {seeds}: must be whole numbers with commas, for example 1,2,3") from None
    config = load_config(TeacherConfig, config_path, overrides)
    with alone_in(out):
        metrics = run_crossval(
            maps,
            out,
            config,
            folds=folds,
            seeds=seeds,
            support_path=support,
            device=str(pick_device(device)),
            figures=figures,
        )
    _print_folds(metrics)
    _print_metrics(metrics["pooled"], "All test windows at once")
    _print_metrics(metrics["by_trial"], "Trials, the predictions of their windows averaged")
    _print_summary(metrics["summary"], len(metrics["seeds"]))
    if "datasets" in metrics:
        _print_datasets(metrics["datasets"])
    click.echo(out)


def _print_metrics(blocks: dict, title: str) -> None:
    from ngd_fast.console import print_table

    rows = []
    for name, block in blocks.items():
        row = [name]
        for dimension in ("valence", "arousal"):
            row += [_cell(block[dimension], metric) for metric in ("ccc", "pearson", "rmse")]
        rows.append(row)
    columns = [f"{d} {m}" for d in ("valence", "arousal") for m in ("CCC", "r", "RMSE")]
    print_table(["", *columns], rows, title=f"{title} (95% interval over subjects)")


def _cell(block: dict, metric: str) -> str:
    if metric not in block:
        return "-"
    interval = block.get("ci", {}).get(metric)
    return f"{block[metric]:.2f}" + (f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else "")


def _print_folds(metrics: dict) -> None:
    from ngd_fast.console import print_table

    names = list(metrics["pooled"])
    rows = [
        [f"{fold['name']} ({len(fold['test'])})"]
        + ["{:.2f} / {:.2f}".format(*(fold["metrics"][n][d]["ccc"] for d in ("valence", "arousal"))) for n in names]
        for fold in metrics["folds"]
    ]
    print_table(["fold (subjects)", *names], rows, title="CCC of valence / arousal on each fold's test subjects")


def _print_datasets(datasets: dict) -> None:
    from ngd_fast.console import print_table

    rows = [
        [f"{name}, {what}", method]
        + ["{:.3f} / {:.3f}".format(*(block[d][metric] for d in ("valence", "arousal"))) for metric in ("ccc", "rmse")]
        for name, parts in datasets.items()
        for what, blocks in parts.items()
        for method, block in blocks.items()
    ]
    print_table(
        ["tested on", "", "CCC v/a", "RMSE v/a"], rows, title="By dataset; the teacher's is the mean over seeds"
    )


def _print_summary(summary: dict, seeds: int) -> None:
    from ngd_fast.console import print_table

    rows = [
        [name]
        + [f"{row[f'{d}_pooled']:.3f}" + (f" ± {row[f'{d}_pooled_sd']:.3f}" if name == "teacher" else "") for d in dims]
        + [f"{row[f'{d}_folds']:.3f}" for d in dims]
        + [f"{row['mean_pooled']:.3f}", f"{row['mean_folds']:.3f}"]
        for dims in [("valence", "arousal")]
        for name, row in summary.items()
    ]
    columns = [
        "",
        "valence pooled",
        "arousal pooled",
        "valence by fold",
        "arousal by fold",
        "mean pooled",
        "mean by fold",
    ]
    print_table(columns, rows, title=f"CCC; the teacher's is the mean of {seeds} seed(s), ± deviation over seeds")
