"""A student as one file that runs without this package: uint8 images in, probabilities out, preprocessing inside."""

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ngd_fast.artifacts.files import atomic_path
from ngd_fast.errors import UserError, first_line
from ngd_fast.evaluation.calibration import Calibration

OUTPUTS = ("probabilities", "logits", "features")
TOLERANCE = {False: 1e-4, True: 1e-2}
"""Largest accepted difference of any output between the exported file and PyTorch in float32; by ``half``. Logits are
compared relative to the largest one. float16 carries 11 bits, and errors add up over 20 to 50 layers."""
DEFAULT_OPSET = 18
_LUMA = (0.299, 0.587, 0.114)


class Deployable(nn.Module):
    """images uint8 [N, H, W, 3] (RGB) of any size -> probabilities [N, C], logits [N, C], features [N, D], float32.

    Resizes (bilinear), normalises and, for a student trained on grey faces, takes the luma. ``calibration`` is applied
    to the logits. The student must return
    (features, logits) of normalised images and have ``backbone``, ``projection`` and ``classify``. Images much
    larger than the network's input should be reduced with antialiasing before.
    """

    def __init__(
        self,
        student: nn.Module,
        meta: Mapping[str, Any],
        *,
        half: bool = False,
        calibration: Calibration | None = None,
    ):
        super().__init__()
        scale, bias = (1.0, 0.0) if calibration is None else (calibration.scale, calibration.bias)
        self.register_buffer("logit_scale", torch.as_tensor(scale, dtype=torch.float32).reshape(1, -1))
        self.register_buffer("logit_bias", torch.as_tensor(bias, dtype=torch.float32).reshape(1, -1))
        self.student = student.eval()
        self.size, self.grey = int(meta["image_size"]), bool(meta.get("grey", False))
        for name in ("mean", "std"):
            values = torch.as_tensor(meta[name], dtype=torch.float32).reshape(-1).expand(3)
            self.register_buffer(name, values.reshape(1, 3, 1, 1).clone())
        self.register_buffer("luma", torch.tensor(_LUMA).reshape(1, 3, 1, 1))
        self.dtype = torch.float16 if half else torch.float32
        # the head and the normalisation stay in float32, as in training under autocast
        self.student.backbone.to(self.dtype)
        self.student.projection.to(self.dtype)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        values = images.permute(0, 3, 1, 2).to(torch.float32)
        if self.grey:
            values = torch.round((values * self.luma).sum(dim=1, keepdim=True)).expand(-1, 3, -1, -1)
        values = F.interpolate(values / 255, (self.size, self.size), mode="bilinear", align_corners=False)
        values = ((values - self.mean) / self.std).to(self.dtype)
        features, logits = self.student.classify(self.student.projection(self.student.backbone(values)))
        logits = logits * self.logit_scale + self.logit_bias
        return logits.softmax(dim=1), logits, features


def _example(meta: Mapping[str, Any], batch: int, seed: int) -> torch.Tensor:
    side = int(meta["image_size"])
    pixels = np.random.default_rng(seed).integers(0, 256, (batch, side + 3, side + 5, 3), dtype=np.uint8)
    return torch.from_numpy(pixels)


def _dynamic_shapes() -> dict:
    dim = torch.export.Dim
    return {"images": {0: dim("batch", min=1), 1: dim("height", min=2), 2: dim("width", min=2)}}


def export_onnx(
    student: nn.Module,
    meta: Mapping[str, Any],
    path: str | Path,
    *,
    opset: int = DEFAULT_OPSET,
    half: bool = False,
    calibration: Calibration | None = None,
    info: Mapping[str, str] | None = None,
) -> float:
    """Write an ONNX file with dynamic batch, height and width; returns the largest difference to PyTorch.

    The file is run by onnxruntime on several batch and image sizes before it is put in place; class names, image size
    and ``info`` go into its metadata. ``student`` may be changed to half precision. Raises UserError where onnx,
    onnxscript or onnxruntime is missing, the exporter or the runtime lacks ``opset``, or the outputs differ by more
    than :data:`TOLERANCE`.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401 (what torch.onnx exports with)
    except ImportError as error:
        raise UserError(f"--onnx needs {error.name}: pip install 'ngd-fast[export]'") from None
    _check_opset(opset)
    expected = _expected(student, meta, calibration)
    module = Deployable(student, meta, half=half, calibration=calibration)
    with atomic_path(path) as temporary:
        try:
            with _quiet():
                torch.onnx.export(
                    module,
                    (_example(meta, 2, 0),),
                    temporary,
                    input_names=["images"],
                    output_names=list(OUTPUTS),
                    dynamic_shapes=_dynamic_shapes(),
                    opset_version=opset,
                    dynamo=True,
                    external_data=False,
                    verbose=False,
                )
        except OSError:
            raise  # a full disk is no fault of the exporter
        except Exception as error:  # the exporter raises classes of its own and of onnx that share no base
            raise UserError(
                f"--onnx: PyTorch {torch.__version__} cannot export this network with opset {opset} "
                f"({first_line(error)}); --opset {DEFAULT_OPSET} is the default"
            ) from error
        model = onnx.load(temporary)
        made = next(entry.version for entry in model.opset_import if entry.domain == "")
        if made != opset:
            raise UserError(
                f"--opset {opset}: PyTorch {torch.__version__} exports this network with opset {made}; use that"
            )
        onnx.helper.set_model_props(
            model, {"ngd_fast": json.dumps(_description(meta, half, calibration), sort_keys=True), **(info or {})}
        )
        onnx.checker.check_model(model, full_check=True)
        onnx.save(model, temporary)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(temporary, options, providers=["CPUExecutionProvider"])
        return _check_parity(lambda images: session.run(None, {"images": images.numpy()}), expected, half, path)


def export_torch(
    student: nn.Module,
    meta: Mapping[str, Any],
    path: str | Path,
    *,
    half: bool = False,
    calibration: Calibration | None = None,
) -> float:
    """Write a torch.export program (.pt2) with dynamic batch, height and width, checked as in :func:`export_onnx`."""
    expected = _expected(student, meta, calibration)
    module = Deployable(student, meta, half=half, calibration=calibration)
    with _quiet():
        program = torch.export.export(module, (_example(meta, 2, 0),), dynamic_shapes=_dynamic_shapes())
    with atomic_path(path) as temporary:
        description = json.dumps(_description(meta, half, calibration), sort_keys=True)
        with _quiet():
            torch.export.save(program, temporary, extra_files={"ngd_fast.json": description})
            loaded = torch.export.load(temporary).module()
        return _check_parity(lambda images: [o.detach().numpy() for o in loaded(images)], expected, half, path)


def _description(meta: Mapping[str, Any], half: bool, calibration: Calibration | None) -> dict:
    return {
        "class_names": list(meta["class_names"]),
        "image_size": int(meta["image_size"]),
        "input": "uint8 [batch, height, width, 3], RGB, a cropped face",
        "outputs": list(OUTPUTS),
        "precision": "float16" if half else "float32",
        "calibration": "none" if calibration is None else calibration.method,
        "use": "research on facial expressions; not for diagnosis, identification or surveillance",
    }


@torch.no_grad()
def _expected(
    student: nn.Module, meta: Mapping[str, Any], calibration: Calibration | None
) -> list[tuple[torch.Tensor, list[np.ndarray]]]:
    """Inputs of several sizes and what PyTorch gives for them in float32, before anything is made half."""
    module = Deployable(student, meta, calibration=calibration)
    cases = [_example(meta, batch, seed) for seed, batch in enumerate((1, 3), start=1)]
    cases.append(cases[-1][:, : int(meta["image_size"]) // 2, : int(meta["image_size"]) // 2])
    return [(images, [output.numpy() for output in module(images)]) for images in cases]


def _check_parity(run, expected, half: bool, path: str | Path) -> float:
    largest = 0.0
    for images, outputs in expected:
        for name, want, got in zip(OUTPUTS, outputs, run(images.contiguous())):
            scale = max(1.0, float(np.abs(want).max())) if name == "logits" else 1.0
            difference = float(np.abs(want - got).max()) / scale
            largest = max(largest, difference)
            if not difference <= TOLERANCE[half]:
                raise UserError(
                    f"{path}: not written: its {name} differ from PyTorch's by {difference:.2g}, "
                    f"more than {TOLERANCE[half]:g}"
                )
    return largest


def _check_opset(opset: int) -> None:
    """Raise UserError where the installed onnx or onnxruntime lacks ``opset``; it names the newest that they have."""
    import onnx

    known = onnx.defs.onnx_opset_version()
    if opset <= known and _runtime_loads(opset):
        return
    newest = next((version for version in range(known, 6, -1) if _runtime_loads(version)), None)
    import onnxruntime

    raise UserError(
        f"--opset {opset}: onnx {onnx.__version__} with onnxruntime {onnxruntime.__version__} "
        f"supports opsets up to {newest}; use --opset {DEFAULT_OPSET}"
    )


def _runtime_loads(opset: int) -> bool:
    import onnx
    import onnxruntime

    value = lambda name: onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1])  # noqa: E731
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "probe", [value("x")], [value("y")])
    # the oldest file format that the probe fits in, so that only the opset is asked about
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception:  # onnxruntime raises classes of its own that share no base
        return False
    return True


@contextlib.contextmanager
def _quiet():
    """Hold back what the exporters print about their inner steps; an error still comes through as an exception."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
