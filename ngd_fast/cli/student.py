"""``ngd-fast student``."""

import click


@click.group("student")
def command():
    """Train a student (or the vision teacher) on faces."""


def data_options(function):
    """The options that name a training's files; shared with ``ablation`` and ``sweep``."""
    options = [
        click.option("--train", type=click.Path(), help="Faces to learn from: NPZ, CSV list or folder."),
        click.option("--valid", type=click.Path(), help="Faces to choose the best epoch on."),
        click.option("--bank", type=click.Path(), help="Prototypes (prototypes_5x5.npz); needed by B2 and B3."),
        click.option("--teacher", multiple=True, help="Vision teacher: a run folder; needed by B1 to B3. Repeatable."),
        click.option("--class-map", type=click.Path(), help="JSON {name: id} where labels are not this package's."),
        click.option("--image-root", type=click.Path(), help="Folder that a CSV's paths start from."),
        click.option("--device", help="auto, cpu, cuda or cuda:N.  [default: auto]"),
        click.option("--feed", type=click.Choice(["auto", "dali", "resident", "torch"]), help="How faces are fed."),
        click.option("--workers", type=int, help="Threads that prepare faces; default: 0 on a CPU, up to 8 for a GPU."),
        click.option("--epochs", type=int, help="Epochs to train."),
        click.option("--batch-size", type=int, help="Faces in one forward pass, over all ranks."),
        click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change any key."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


_KEYS = {
    "train": "data.train",
    "valid": "data.valid",
    "bank": "objective.proto.bank",
    "teacher": "objective.kd.teacher",
    "class_map": "data.class_map",
    "image_root": "data.image_root",
    "device": "device",
    "feed": "feed.kind",
    "workers": "feed.workers",
    "epochs": "train.epochs",
    "batch_size": "train.batch_size",
    "acc_steps": "train.accumulation",
    "clip_grad": "train.clip_grad",
    "channels_last": "train.channels_last",
    "best_metric": "train.best_metric",
    "compile": "train.compile",
    "seed": "seed",
}


def overrides_of(options: dict, overrides: tuple[str, ...]) -> list[str]:
    """Command-line options as configuration overrides; ``--set`` comes last and wins."""
    from ngd_fast.config import as_override

    given = {_KEYS[name]: value for name, value in options.items() if value not in (None, ())}
    return [as_override(key, value) for key, value in given.items()] + list(overrides)


@command.command("train")
@click.option("--config", "--cfg", "config", default="B3", show_default=True,
              help="B0, B1, B2, B3, teacher, fast, demo/..., or a YAML file.")  # fmt: skip
@click.option("--out", "--outs-dir", "--runs-dir", "out", type=click.Path(), required=True, help="The run's folder.")
@click.option("--seed", type=int, help="Of the first weights, the order and the views.")
@click.option("--resume", is_flag=True, help="Continue from the last checkpoint, bit for bit, where there is one.")
@click.option("--acc-steps", type=int, help="Forward passes for one step of the optimizer.")
@click.option("--clip-grad", type=float, help="Largest norm of the gradient.")
@click.option("--channels-last/--no-channels-last", default=None, help="Memory format of the images.")
@click.option("--best-metric", type=click.Choice(["accuracy", "macro_f1", "balanced_accuracy"]),
              help="What the best epoch is best in, on valid.")  # fmt: skip
@click.option("--no-ldacc", is_flag=True, expose_value=False,
              help="Taken as in the authors' command, whose README does not explain it; changes nothing.")  # fmt: skip
@click.option("--compile", type=click.Choice(["auto", "on", "off"]), help="torch.compile of the network.")
@data_options
def train(config, out, resume, overrides, **options):
    """Train one student into the folder OUT.

    \b
    ngd-fast student train --config B3 --train ferplus_train.npz --valid ferplus_valid.npz \\
        --bank prototypes_5x5.npz --teacher outs/vision_teacher --out outs/B3_seed1
    """
    from ngd_fast.cli.student_output import print_metrics
    from ngd_fast.student.config import load_student_config
    from ngd_fast.student.run import train_student

    metrics = train_student(load_student_config(config, overrides_of(options, overrides)), out, resume=resume)
    if metrics is not None:
        print_metrics([metrics], title=str(out))
