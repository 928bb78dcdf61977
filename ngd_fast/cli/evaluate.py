"""``ngd-fast evaluate``: a student on a dataset, tables over several runs, and the choice among checkpoints."""

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

import click
from click.core import ParameterSource

from ngd_fast.cli.checkpoints import Checkpoint, device_option, load_faces
from ngd_fast.console import print_table, say
from ngd_fast.errors import UserError


@click.group("evaluate", invoke_without_command=True, context_settings={"max_content_width": 110})
@click.option("--ckpt", type=click.Path(), help="A run's folder or a student_best.safetensors file.")
@click.option("--npz", type=click.Path(), help="Faces as NPZ.")
@click.option("--csv", type=click.Path(), help="Faces as CSV list of image paths and labels.")
@click.option("--folder", type=click.Path(), help="Faces as folder of class folders.")
@click.option("--predictions", type=click.Path(), help="Saved predictions instead of a student and faces.")
@click.option("--class-map", type=click.Path(), help='JSON {"neutral": 0, ...}: the dataset\'s own labels.')
@click.option("--image-root", type=click.Path(), help="Folder that a CSV's paths start from.")
@click.option("--img-size", type=click.IntRange(8), help="Side of the network's input.  [default: as trained]")
@click.option(
    "--out",
    "--outs-dir",
    "outs_dir",
    type=click.Path(file_okay=False),
    help="Folder to write.  [default: outs/xval_DATASET_RUN]",
)
@click.option("--dataset", help="The dataset's name in tables.  [default: its file's name]")
@click.option("--batch-size", type=click.IntRange(1), default=256, show_default=True)
@click.option(
    "--workers", type=click.IntRange(0), help="Threads that decode images; default: 0 on a CPU, up to 8 for a GPU."
)
@click.option("--flip-tta", is_flag=True, help="Average with the mirror image.")
@click.option("--skip-bad", is_flag=True, help="Leave out images that cannot be read instead of stopping.")
@click.option("--bootstrap", type=click.IntRange(0), default=1000, show_default=True, help="Resamples; 0: none.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of the resamples.")
@device_option
@click.pass_context
def command(ctx, **options):
    """Evaluate a student: 8-way and present-only, with 95% confidence intervals.

    Give --ckpt and one of --npz, --csv and --folder, or --predictions. Writes metrics.json, predictions.npz,
    per_class.csv, confmat.png, confmat_present.png and SHA256SUMS.txt.
    """
    if ctx.invoked_subcommand is not None:
        _refuse(ctx, options, f"stands before {ctx.invoked_subcommand}, which does not evaluate anything")
        return
    if options["predictions"] is not None:
        _refuse(ctx, options.keys() - _FOR_PREDICTIONS, "says how faces are predicted; leave it out with --predictions")
    if options["image_root"] is not None and options["csv"] is None:
        raise UserError("--image-root is where a CSV's paths start from; give --csv with it")
    if options["outs_dir"] is not None:
        _require_no_run(Path(options["outs_dir"]))
    identity, predict = _source(**options)
    folder = Path(options["outs_dir"] or f"outs/xval_{_slug(identity['dataset'])}_{_slug(identity['run'])}")
    if options["outs_dir"] is None:
        _require_no_run(folder, identity)
    metrics = write_evaluation(folder, predict(), identity, bootstrap=options["bootstrap"], seed=options["seed"])
    print_evaluation(metrics)
    say(f"wrote {folder}")


_FOR_PREDICTIONS = {"predictions", "outs_dir", "dataset", "bootstrap", "seed"}


def _refuse(ctx: click.Context, names: Iterable[str], why: str) -> None:
    """Raise UserError where one of the options ``names`` was typed, which would have no effect."""
    for option in ctx.command.params:
        if option.name in names and ctx.get_parameter_source(option.name) == ParameterSource.COMMANDLINE:
            raise UserError(f"{option.opts[0]}: {why}")


def _require_no_run(folder: Path, identity: Mapping | None = None) -> None:
    """Raise UserError where the evaluation would take the place of a training's metrics and sums; with ``identity``
    also of an evaluation of another student or on other faces."""
    from ngd_fast.artifacts.files import read_json

    path = folder / "metrics.json"
    if not path.exists():
        return
    there = read_json(path)
    if "eight_way" not in there:
        raise UserError(f"--out {folder}: holds the metrics of a training, not of an evaluation; name another folder")
    if identity is None:
        return
    if any(there.get(key) != identity.get(key) for key in ("run", "variant", "seed", "dataset")):
        raise UserError(f"{folder}: holds the evaluation of another student or dataset; give --out")
    if "data" in there and "data" in identity and there["data"]["sha256"] != identity["data"]["sha256"]:
        raise UserError(f"{folder}: holds the evaluation on other faces of the same name; give --dataset or --out")


def _source(*, ckpt, npz, csv, folder, predictions, class_map, image_root, img_size, dataset, device, **options):
    """(What metrics.json says about the predictions' origin, a call that makes them: it may take minutes)."""
    if predictions is not None:
        return _saved(Path(predictions), dataset)
    sources = [path for path in (npz, csv, folder) if path]
    if ckpt is None or len(sources) != 1:
        raise UserError("give --ckpt and one of --npz, --csv and --folder (or --predictions); --help shows all options")
    (source,) = sources
    from ngd_fast.devices import pick_device
    from ngd_fast.student.inference import predict

    student = Checkpoint.open(ckpt, image_size=img_size)
    faces = load_faces(source, class_map=class_map, image_root=image_root, class_names=student.meta["class_names"])
    place = Path(source).resolve()
    name = dataset or (place.name if place.is_dir() else place.stem)
    identity = {
        "run": student.run,
        "variant": student.variant,
        "seed": student.seed,
        "dataset": name,
        "checkpoint": {"file": student.file.name, "sha256": student.sha256},
        "data": {"source": Path(source).name, "sha256": faces.checksum},
        "image_size": student.meta["image_size"],
        "flip_tta": options["flip_tta"],
    }
    made = partial(
        predict,
        student.module,
        student.meta,
        faces,
        device=pick_device(device),
        batch_size=options["batch_size"],
        workers=options["workers"],
        flip_tta=options["flip_tta"],
        skip_bad=options["skip_bad"],
        dataset=name,
    )
    return identity, made


def _saved(path: Path, dataset: str | None):
    """As :func:`_source`, of a file: whose it is where a run's or an evaluation's metrics.json lies beside it."""
    from ngd_fast.artifacts.files import read_json
    from ngd_fast.artifacts.verify import require_untouched
    from ngd_fast.evaluation.predictions import Predictions

    loaded = Predictions.load(path)
    require_untouched(path)
    metrics = path.parent / "metrics.json"
    known = read_json(metrics) if metrics.exists() else {}
    identity = {key: known[key] for key in ("run", "variant", "seed") if key in known}
    return {"run": path.stem, **identity, "dataset": dataset or loaded.dataset}, lambda: loaded


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name)


def write_evaluation(folder: Path, predictions, identity: dict, *, bootstrap: int, seed: int) -> dict:
    """Write everything that an evaluation leaves into ``folder`` and return its metrics.json."""
    from ngd_fast.artifacts.figure_style import has_matplotlib, save_figure
    from ngd_fast.artifacts.files import write_json, write_sums
    from ngd_fast.evaluation.figures_classes import confusion_figure
    from ngd_fast.evaluation.metrics import evaluate_predictions, write_per_class

    blocks = evaluate_predictions(predictions, bootstrap=bootstrap, seed=seed)
    metrics = {**identity, **blocks}
    predictions.save(folder / "predictions.npz")
    write_json(folder / "metrics.json", metrics)
    write_per_class(folder / "per_class.csv", blocks)
    if has_matplotlib():
        for name, protocol in (("confmat", "eight_way"), ("confmat_present", "present_only")):
            title = f"{identity['dataset']}, {'8-way' if protocol == 'eight_way' else 'present-only'}"
            figure = confusion_figure(blocks[protocol], title=title)
            save_figure(figure, folder / name, kinds=("png", "pdf"))
    else:
        say("no confusion matrices: drawing needs matplotlib (pip install 'ngd-fast[viz]')")
    write_sums(folder)
    return metrics


def print_evaluation(metrics: dict) -> None:
    """Both protocols with their intervals, then the classes."""
    from ngd_fast.evaluation.latex import PROTOCOL_TITLES, TITLES, percent

    rows = []
    for protocol, title in PROTOCOL_TITLES.items():
        block = metrics[protocol]
        cells = []
        for name in TITLES:
            interval = block.get("ci", {}).get(name)
            shown = f" [{percent(interval[0], 1)}, {percent(interval[1], 1)}]" if interval else ""
            cells.append(percent(block[name]) + shown if name in block else "")
        rows.append([title, block["n"], *cells])
    print_table(["protocol", "n", *TITLES.values()], rows, title=f"{metrics['run']} on {metrics['dataset']}, in %")
    block = metrics["eight_way"]
    rows = []
    for name in block["classes"]:
        rates = block["per_class"].get(name)
        keys = ("precision", "recall", "f1", "auroc")
        cells = [percent(rates[key]) if key in rates else "" for key in keys] if rates else [""] * 4
        rows.append([name, rates["support"] if rates else 0, *cells])
    print_table(["class (8-way)", "n", "precision", "recall", "F1", "AUROC"], rows)


@command.command()
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


def print_summary(made: dict) -> None:
    """A table of ngd_fast.evaluation.tables on the terminal."""
    from ngd_fast.evaluation.latex import PROTOCOL_TITLES, TITLES, columns_of, p_value, summary_text

    blocks = made.get("blocks", [made])
    for block in blocks:
        names = columns_of(block["rows"])
        paired = any("versus_baseline" in row for row in block["rows"])
        rows = []
        for row in block["rows"]:
            cells = [row["variant"], len(row["seeds"]), *(summary_text(row[name]) for name in names)]
            if paired:
                versus = row.get("versus_baseline", {}).get("macro_f1")
                cells += [f"{100 * versus['difference']:+.2f}", p_value(versus["p"])] if versus else ["", ""]
            rows.append(cells)
        head = ["variant", "seeds", *(TITLES[name] for name in names)]
        head += [f"macro-F1 vs {made['baseline']}", "p"] if paired else []
        title = f"{made['kind']}: {block['dataset']}, {PROTOCOL_TITLES[block['protocol']]}, n={block['n']}, in %"
        title += ", best epochs by validation"
        print_table(head, rows, title=title)


@command.command()
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
