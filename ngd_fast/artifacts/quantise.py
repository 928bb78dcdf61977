"""A student as an int8 ONNX file: convolutions in 8 bits, calibrated on faces, with the accuracy that it costs."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ngd_fast.artifacts.export import _quiet, export_onnx
from ngd_fast.artifacts.files import atomic_path
from ngd_fast.errors import UserError
from ngd_fast.evaluation.calibration import Calibration
from ngd_fast.evaluation.comparison import paired_bootstrap
from ngd_fast.evaluation.predictions import Predictions
from ngd_fast.faces.dataset import Faces
from ngd_fast.faces.pixels import SourcePixels

CALIBRATION_FACES = 512
_BATCH = 64


def export_int8(
    student: nn.Module,
    meta: Mapping[str, Any],
    path: str | Path,
    faces: Faces,
    *,
    opset: int,
    calibration: Calibration | None = None,
    info: Mapping[str, str] | None = None,
    seed: int = 0,
) -> dict:
    """Write an ONNX file whose convolutions are int8 (weights by channel, activations by layer) and measure its loss.

    The ranges of activations come from up to 512 of ``faces``; float32 and int8 are then compared on the others.
    Weights keep 7 bits: processors with AVX2 but without VNNI add pairs of products in 16 bits, which 8 would overflow.
    Returns {"accuracy": {"float32", "int8", "difference", "ci", "p"}, "agreement", "faces", "calibrated_on"}; accuracy
    is absent where no other face has a label. Raises UserError as export_onnx does, and for fewer than two faces.
    """
    if len(faces) < 2:
        raise UserError(f"--int8 {faces.source}: holds {len(faces)} faces; some fit the ranges, others measure")
    order = np.random.default_rng(seed).permutation(len(faces))
    fitted = min(CALIBRATION_FACES, len(faces) // 2)
    pixels = SourcePixels(faces, int(meta["image_size"]))

    def batches(rows):
        for start in range(0, len(rows), _BATCH):
            images = pixels.take(rows[start : start + _BATCH])
            yield np.ascontiguousarray(np.broadcast_to(images, (*images.shape[:3], 3)))

    with atomic_path(path) as temporary:
        plain = temporary.with_suffix(".float32.onnx")
        try:
            export_onnx(student, meta, plain, opset=opset, calibration=calibration, info=info)
            _quantise(plain, temporary, batches(order[:fitted]))
            logits = [_run(file, batches(order[fitted:])) for file in (plain, temporary)]
        finally:
            plain.unlink(missing_ok=True)
        _describe(temporary)
    measured = _compare(logits, faces, order[fitted:], meta, seed)
    return {"faces": len(faces) - fitted, "calibrated_on": fitted, **measured}


def _quantise(source: Path, target: Path, batches) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def get_next(self):
            images = next(batches, None)
            return None if images is None else {"images": images}

    with _quiet():
        quantize_static(
            source,
            target,
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "Add", "MaxPool", "Relu"],
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            extra_options={"ActivationSymmetric": False, "CalibMovingAverage": False},
        )


def _run(file: Path, batches) -> np.ndarray:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(["logits"], {"images": images})[0] for images in batches])


def _describe(file: Path) -> None:
    """Say int8 in the metadata, which quantisation has copied from the float32 file."""
    import onnx

    model = onnx.load(file)
    properties = {entry.key: entry.value for entry in model.metadata_props}
    properties["ngd_fast"] = json.dumps(json.loads(properties["ngd_fast"]) | {"precision": "int8"}, sort_keys=True)
    onnx.helper.set_model_props(model, properties)
    onnx.save(model, file)


def _compare(logits, faces: Faces, rows: np.ndarray, meta: Mapping, seed: int) -> dict:
    agreement = float((logits[0].argmax(1) == logits[1].argmax(1)).mean())
    labels = faces.labels[rows]
    if not (labels >= 0).any():
        return {"agreement": agreement}
    names = [faces.names[row] for row in rows]
    made = [Predictions(values, labels, names, tuple(meta["class_names"]), faces.source) for values in logits]
    accuracy = [float((p.logits.argmax(1) == labels)[labels >= 0].mean()) for p in made]
    loss = paired_bootstrap(*made, seed=seed)["accuracy"]
    return {"agreement": agreement, "accuracy": {"float32": accuracy[0], "int8": accuracy[1], **loss}}
