"""``ngd-fast export``."""

from pathlib import Path

import click

from ngd_fast.cli.checkpoints import Checkpoint, raw_option
from ngd_fast.console import say
from ngd_fast.errors import UserError


@click.command("export")
@click.argument("run", type=click.Path())
@click.option("--onnx", type=click.Path(dir_okay=False), help="ONNX file to write.")
@click.option("--torch-export", type=click.Path(dir_okay=False), help="torch.export program (.pt2) to write.")
@click.option("--model-card", type=click.Path(dir_okay=False), help="Model card (Markdown) to write.")
@click.option(
    "--int8", type=click.Path(), metavar="FACES",
    help="Convolutions of the --onnx file in 8 bits, fitted on these faces (NPZ, CSV list or folder of classes).",
)  # fmt: skip
@click.option("--half", is_flag=True, help="float16 weights; inputs and outputs keep their types.")
@click.option("--opset", type=click.IntRange(7), default=18, show_default=True, help="ONNX opset.")
@click.option("--img-size", type=click.IntRange(8), help="Side of the network's input.  [default: as trained]")
@click.option(
    "--with", "others", multiple=True, type=click.Path(),
    help="For the model card: another run, or an evaluation (outs/xval_*); repeatable.",
)  # fmt: skip
@raw_option
def command(run, onnx, torch_export, model_card, int8, half, opset, img_size, others, raw):
    """Export the student of RUN (a run's folder or a .safetensors file).

    The exported file takes uint8 [batch, height, width, 3] RGB faces of any size and gives probabilities, logits
    (calibrated, where the student has a calibration) and features; it is run and compared with PyTorch before it is put
    in place.
    """
    if not (onnx or torch_export or model_card):
        raise UserError("nothing to write: give --onnx, --torch-export or --model-card")
    if int8 and (not onnx or torch_export or half):
        raise UserError("--int8 goes with --onnx alone, without --half and --torch-export")
    if model_card:
        _write_card(Path(run), others, model_card)
    if int8:
        _write_int8(run, onnx, int8, opset, img_size, raw)
    elif onnx or torch_export:
        from ngd_fast.artifacts.export import export_onnx, export_torch

        for path, export, options in (
            (onnx, export_onnx, {"opset": opset}),
            (torch_export, export_torch, {}),
        ):
            if path:
                # read anew for each: half precision changes the module
                student = Checkpoint.open(run, image_size=img_size, raw=raw)
                if export is export_onnx:
                    options["info"] = {"weights_sha256": student.sha256, "run": student.run}
                options["calibration"] = student.calibration
                difference = export(student.module, student.meta, path, half=half, **options)
                say(f"wrote {path}; it differs from PyTorch in float32 by at most {difference:.1e}")


def _write_int8(run, path, faces, opset, img_size, raw):
    from ngd_fast.artifacts.quantise import export_int8
    from ngd_fast.cli.checkpoints import load_faces

    student = Checkpoint.open(run, image_size=img_size, raw=raw)
    loaded = load_faces(faces, class_names=student.meta["class_names"])
    made = export_int8(
        student.module, student.meta, path, loaded, opset=opset, calibration=student.calibration,
        info={"weights_sha256": student.sha256, "run": student.run},
    )  # fmt: skip
    say(
        f"wrote {path}; int8 fitted on {made['calibrated_on']} faces; on the {made['faces']} others it chooses the "
        f"class of float32 for {100 * made['agreement']:.1f} %"
    )
    if "accuracy" in made:
        accuracy = made["accuracy"]
        low, high = (f"{100 * value:+.2f}" for value in accuracy["ci"])
        say(
            f"accuracy {100 * accuracy['float32']:.2f} % in float32, {100 * accuracy['int8']:.2f} % in int8: "
            f"{100 * accuracy['difference']:+.2f} points, 95 % interval [{low}, {high}]"
        )


def _write_card(run: Path, others, path):
    from ngd_fast.artifacts.files import write_text
    from ngd_fast.artifacts.model_card import model_card
    from ngd_fast.evaluation.results import load_results

    folder = run.parent if run.is_file() else run
    own = [result for result in load_results([folder]) if result.split == "valid"]
    if len(own) != 1:
        raise UserError(f"{folder}: a model card needs one run's folder, this holds {len(own)}")
    write_text(path, model_card(own[0], load_results(others) if others else []))
    say(f"wrote {path}")
