"""``ngd-fast evaluate``: a student on a dataset, tables over several runs, and the choice among checkpoints."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import click

from ngd_fast.artifacts.files import file_stem
from ngd_fast.cli import refuse
from ngd_fast.cli.checkpoints import Checkpoint, device_option, load_faces, raw_option
from ngd_fast.cli.evaluate_runs import calibrate, geometry, select, table
from ngd_fast.cli.evaluation_output import print_corruptions, print_evaluation, print_slices, write_evaluation
from ngd_fast.console import say
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
@click.option("--bootstrap", type=click.IntRange(0, 10**5), default=1000, show_default=True, help="Resamples; 0: none.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of the resamples.")
@click.option("--slices", type=click.Path(), help="CSV of faces and their groups: each group's metrics, and the gaps.")
@click.option("--corruptions", is_flag=True, help="Also under blur, noise, JPEG, occlusion, ... at five severities.")
@click.option(
    "--versus", type=click.Path(), help="With --corruptions: the evaluation (of B0) that corruption errors are over."
)
@raw_option
@device_option
@click.pass_context
def command(ctx, **options):
    """Evaluate a student: 8-way and present-only, with 95% confidence intervals.

    Give --ckpt and one of --npz, --csv and --folder, or --predictions. Writes metrics.json, predictions.npz,
    per_class.csv, confmat.png, confmat_present.png and SHA256SUMS.txt; with --slices slices.json and slices.png, with
    --corruptions corruptions.json and corruptions.png.
    """
    if ctx.invoked_subcommand is not None:
        refuse(ctx, options, f"stands before {ctx.invoked_subcommand}, which does not evaluate anything")
        return
    if options["predictions"] is not None:
        refuse(ctx, options.keys() - _FOR_PREDICTIONS, "says how faces are predicted; leave it out with --predictions")
    if options["image_root"] is not None and options["csv"] is None:
        raise UserError("--image-root is where a CSV's paths start from; give --csv with it")
    if options["outs_dir"] is not None:
        _require_no_run(Path(options["outs_dir"]))
    if options["versus"] is not None and not options["corruptions"]:
        raise UserError("--versus is what corruption errors are compared with; give --corruptions with it")
    groups, baseline = _read_groups(options["slices"]), _read_corruptions(options["versus"])
    identity, predict, corrupted = _source(**options)
    names = (file_stem(identity[key]) for key in ("dataset", "run"))
    folder = Path(options["outs_dir"] or f"outs/xval_{'_'.join(names)}")
    if options["outs_dir"] is None:
        _require_no_run(folder, identity)
    metrics = write_evaluation(
        folder,
        predict(),
        identity,
        bootstrap=options["bootstrap"],
        seed=options["seed"],
        groups=groups,
        corrupted=corrupted if options["corruptions"] else None,
        baseline=baseline,
    )
    print_evaluation(metrics)
    if groups:
        print_slices(metrics["slices"])
    if options["corruptions"]:
        print_corruptions(metrics["corruptions"])
    say(f"wrote {folder}")


_FOR_PREDICTIONS = {"predictions", "outs_dir", "dataset", "bootstrap", "seed", "slices"}


def _read_groups(path: str | None) -> dict | None:
    if path is None:
        return None
    from ngd_fast.faces.table import read_groups

    return read_groups(Path(path))


def _read_corruptions(path: str | None) -> dict | None:
    """(label, scores) of an evaluation's corruptions.json."""
    if path is None:
        return None
    from ngd_fast.artifacts.files import read_json, require_untouched
    from ngd_fast.student.robustness import CORRUPTIONS_NAME

    file = Path(path) / CORRUPTIONS_NAME if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise UserError(f"--versus {path}: holds no {CORRUPTIONS_NAME}; evaluate that student with --corruptions first")
    require_untouched(file)
    scores = read_json(file)
    if not isinstance(scores, dict) or not {"run", "n", "clean", "corruptions", "data"} <= scores.keys():
        raise UserError(f"{file}: is not as `ngd-fast evaluate --corruptions` writes it")
    return scores


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
    if "data" in there and "data" in identity and there["data"].get("sha256") != identity["data"]["sha256"]:
        raise UserError(f"{folder}: holds the evaluation on other faces of the same name; give --dataset or --out")


def _source(*, ckpt, npz, csv, folder, predictions, class_map, image_root, img_size, dataset, device, raw, **options):
    """(What metrics.json says about the predictions' origin, a call that makes them: it may take minutes, and one that
    makes those of corrupted faces: it takes many more)."""
    if predictions is not None:
        return *_saved(Path(predictions), dataset), None
    sources = [path for path in (npz, csv, folder) if path]
    if ckpt is None or len(sources) != 1:
        raise UserError("give --ckpt and one of --npz, --csv and --folder (or --predictions); --help shows all options")
    (source,) = sources
    from ngd_fast.devices import pick_device
    from ngd_fast.student.inference import predict
    from ngd_fast.student.robustness import corrupted_logits

    student = Checkpoint.open(ckpt, image_size=img_size, raw=raw)
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
    if student.calibration is not None:
        identity["calibration"] = student.calibration.method
        say(f"logits are calibrated ({student.calibration.method}); --raw leaves that out")
    settings = {name: options[name] for name in ("batch_size", "workers", "skip_bad")} | {"device": pick_device(device)}
    asked = (student.module, student.meta, faces)
    made = partial(
        predict, *asked, **settings, flip_tta=options["flip_tta"], dataset=name, calibration=student.calibration
    )
    return identity, made, partial(corrupted_logits, *asked, **settings, seed=options["seed"])


def _saved(path: Path, dataset: str | None):
    """As :func:`_source`, of a file: whose it is where a run's or an evaluation's metrics.json lies beside it."""
    from ngd_fast.artifacts.files import read_json, require_untouched
    from ngd_fast.evaluation.predictions import Predictions, is_name

    loaded = Predictions.load(path)
    require_untouched(path)
    metrics = path.parent / "metrics.json"
    known = read_json(metrics) if metrics.exists() else {}
    identity = {key: known[key] for key in ("run", "variant", "seed") if key in known}
    for key in ("run", "variant"):
        if not is_name(identity.get(key, "-")):
            raise UserError(f"{metrics}: {key} is no name")
    return {"run": path.stem, **identity, "dataset": dataset or loaded.dataset}, lambda: loaded


for _command in (calibrate, geometry, select, table):
    command.add_command(_command)
