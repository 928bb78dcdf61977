"""ngd-fast doctor, as it is called."""

import json
import re
import subprocess
import sys
from types import SimpleNamespace

from ngd_fast import selfcheck
from ngd_fast.cli.doctor import _cuda_build, collect
from ngd_fast.objective import backends


def doctor(*options, **environment):
    import os

    run = subprocess.run(
        [sys.executable, "-m", "ngd_fast", "doctor", *options],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=True,
    )
    return run.stdout


def test_json_agrees_with_the_package():
    report = json.loads(doctor("--json"))
    assert set(report["backends"]) == set(backends.NAMES)
    for name, text in report["backends"].items():
        assert text == (backends.why_not(name) or "available")
    assert report["fastest"] == backends.available()[0]
    assert report["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))


def test_the_instruction_set_of_the_environment():
    report = json.loads(doctor("--json", NGD_FAST_CPU_ISA="baseline"))
    assert report["devices"]["instruction set of the C++ backend"] == "baseline (held to it by NGD_FAST_CPU_ISA)"
    report = json.loads(doctor("--json", NGD_FAST_CPU_ISA="avx9"))
    assert report["fastest"] != "cpu"
    assert re.fullmatch(r"NGD_FAST_CPU_ISA=avx9: this machine has .*baseline", report["backends"]["cpu"])


def test_tables_name_every_backend_and_the_reason():
    text = doctor(CUDA_VISIBLE_DEVICES="")
    for name in backends.NAMES:
        assert name in text
    assert "none visible" in text
    assert "no CUDA device" in text or "not built" in text


def test_what_is_absent_names_extras_that_exist(repository, monkeypatch):
    monkeypatch.setattr("ngd_fast.cli.doctor._version", lambda *_: None)
    monkeypatch.setattr(backends, "why_not_interpret", lambda: "")  # of a Triton that is there
    project = (repository / "pyproject.toml").read_text()
    optional = collect()["optional"]
    assert {"onnx", "onnxruntime", "onnxscript"} < optional.keys(), "each is asked for by export --onnx"
    for text in optional.values():
        assert re.fullmatch(r"absent: pip install 'ngd-fast\[[\w-]+\]'( or 'ngd-fast\[[\w-]+\]')*", text)
        assert all(f"\n{extra} = [" in project for extra in re.findall(r"\[([\w-]+)\]", text))


def test_the_build_says_for_which_gpus_or_why_for_none():
    built = SimpleNamespace(WHY_NO_CUDA="", CUDA_VERSION="13.0", CUDA_ARCH_LIST="8.0;9.0+PTX")
    assert _cuda_build(built) == "13.0, architectures 8.0;9.0+PTX"
    assert _cuda_build(SimpleNamespace(WHY_NO_CUDA="nvcc was not found")) == "no: nvcc was not found"


def test_an_interpreter_that_cannot_run_is_a_line_and_no_failure(monkeypatch):
    assert "Triton's interpreter" not in collect()["optional"] or backends.why_not_interpret()
    monkeypatch.setattr(backends, "why_not_interpret", lambda: "Triton 3.6.0 cannot interpret kernels")
    assert collect()["optional"]["Triton's interpreter"] == "Triton 3.6.0 cannot interpret kernels"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert [finding.what for finding in selfcheck.check() if "triton" in finding.what] == []
