"""A student on a CPU, images a second: frozen (as ``predict`` runs it) and exported, against plain PyTorch eager.

    pytest bench/bench_predict.py -s

Plain is the same ResNet-18 in float32 and PyTorch's default layout. All get images on the network's grid: preprocessing
is not measured, but for ONNX, which holds it. Two threads; medians of calls taken in turns.
"""

import numpy as np
import pytest
import torch
from ngd_fast.bench import _timing

from ngd_fast.faces.classes import CLASS_NAMES
from ngd_fast.faces.dataset import Faces
from ngd_fast.student.frozen import FrozenStudent
from ngd_fast.student.networks import build_student

THREADS = 2


@pytest.fixture(scope="module", params=[48, 112, 224])
def networks(request, tmp_path_factory):
    size = request.param
    torch.manual_seed(0)
    torch.set_num_threads(THREADS)
    student = build_student("resnet18").eval()
    calls = {
        "plain PyTorch": torch.inference_mode()(student),
        "frozen, float32": FrozenStudent(student, "fp32"),
        "frozen, auto": FrozenStudent(student, "auto"),
    }
    return size, calls, _onnx(size, tmp_path_factory.mktemp("onnx"))


def _onnx(size, folder):
    onnxruntime = pytest.importorskip("onnxruntime")
    from ngd_fast.artifacts.export import export_onnx
    from ngd_fast.artifacts.quantise import export_int8

    meta = {"class_names": CLASS_NAMES, "image_size": size, "mean": 0.5, "std": 0.25}
    images = np.random.default_rng(0).integers(0, 256, (64, size, size), dtype=np.uint8)
    torch.manual_seed(0)
    export_onnx(build_student("resnet18"), meta, folder / "fp32.onnx")
    export_int8(build_student("resnet18"), meta, folder / "int8.onnx", Faces(images=images), opset=18)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = THREADS, 3
    providers = ["CPUExecutionProvider"]
    return {
        f"ONNX {name}": onnxruntime.InferenceSession(folder / f"{name}.onnx", options, providers=providers)
        for name in ("fp32", "int8")
    }


@pytest.mark.parametrize("batch", [1, 64])
def test_predict(benchmark, networks, batch):
    size, networks, sessions = networks
    images = torch.randn(batch, 3, size, size)
    pixels = np.random.default_rng(0).integers(0, 256, (batch, size, size, 3), dtype=np.uint8)
    calls = {name: (lambda network=network: network(images)) for name, network in networks.items()}
    calls |= {name: (lambda s=session: s.run(["logits"], {"images": pixels})) for name, session in sessions.items()}
    times = _timing.median_us(calls, torch.device("cpu"), seconds=1.0)
    rates = {name: batch / us * 1e6 for name, us in times.items()}
    benchmark.extra_info.update(machine=_timing.machine(torch.device("cpu")), images_per_second=rates)
    print(f"\n{size} px, batch {batch}: " + ", ".join(
        f"{name} {rate:,.0f} ({rate / rates['plain PyTorch']:.2f}x)" for name, rate in rates.items()))  # fmt: skip
    benchmark(calls["frozen, auto"])
