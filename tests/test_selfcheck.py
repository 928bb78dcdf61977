"""ngd-fast doctor --check: it passes here, and a kernel that is wrong does not pass."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner

from ngd_fast import selfcheck
from ngd_fast.cli.doctor import command
from ngd_fast.objective import backends

CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(bool(backends.why_not("cpu")), reason=backends.why_not("cpu"))


def layers(images, conv, norm):
    """The grey stem as plain layers, rounded once."""
    out = norm(conv(images.float().expand(-1, 3, -1, -1)))
    return F.max_pool2d(F.relu(out), 3, 2, 1).to(images.dtype)


def test_every_kernel_here_passes():
    result = CliRunner().invoke(command, ["--check", "--json"])
    assert result.exit_code == 0
    findings = json.loads(result.stdout)["check"]
    assert {f["what"] for f in findings} >= {"objective, cpu"}
    assert all(f["ok"] and f["repeats"] and 0 < f["error"] <= f["bound"] for f in findings)


def test_a_wrong_gradient_is_named_and_fails(monkeypatch):
    right = selfcheck._objective_run

    def wrong(case, backend):
        terms, features, logits = right(case, backend)
        return [terms, features * (1 if backend == "reference" else 1.01), logits]

    monkeypatch.setattr(selfcheck, "_objective_run", wrong)
    result = CliRunner().invoke(command, ["--check"])
    assert result.exit_code != 0
    assert "WRONG" in result.stdout
    assert "objective, cpu (float32 37 x 256)" in str(result.exception)


def test_a_nan_in_one_gradient_is_the_error_that_is_shown(monkeypatch):
    right = selfcheck._objective_run

    def wrong(case, backend):
        terms, features, logits = right(case, backend)
        return [terms, features, logits * (1 if backend == "reference" else float("nan"))]

    monkeypatch.setattr(selfcheck, "_objective_run", wrong)
    assert math.isnan(next(selfcheck.check()).error)


def test_a_kernel_that_does_not_run_is_named_beside_the_others(monkeypatch):
    right = selfcheck._objective_run

    def broken(case, backend):
        if case["features"].dtype == torch.bfloat16:
            raise RuntimeError("out of resources: shared memory")
        return right(case, backend)

    monkeypatch.setattr(selfcheck, "_objective_run", broken)
    result = CliRunner().invoke(command, ["--check", "--json"])
    findings = json.loads(result.stdout, parse_constant=pytest.fail)["check"]
    assert {f["ok"] for f in findings if "float32" in f["case"]} == {True}
    assert {f["fault"] for f in findings if not f["ok"]} == {"out of resources: shared memory"}
    assert "objective, cpu (bfloat16 37 x 256: out of resources: shared memory)" in str(result.exception)


def test_nan_and_changing_bits_are_no_pass():
    assert selfcheck.Finding("", "", 0.0, 1e-5, True).ok
    assert not selfcheck.Finding("", "", float("nan"), 1e-5, True).ok
    assert not selfcheck.Finding("", "", 0.0, 1e-5, False).ok


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_stem_check(monkeypatch, dtype):
    monkeypatch.setattr(selfcheck.stem, "grey_stem", layers)
    assert selfcheck._stem(CPU, dtype).ok
    monkeypatch.setattr(selfcheck.stem, "grey_stem", lambda images, *rest: layers(images.flip(-1), *rest))
    assert not selfcheck._stem(CPU, dtype).ok


def test_the_views_check(monkeypatch):
    from ngd_fast.faces.resident import ResidentFeed

    assert selfcheck._views(CPU).ok  # here by the kernel's twin
    monkeypatch.setattr(ResidentFeed, "capturable_step", lambda self, out: out.images.zero_())
    assert not selfcheck._views(CPU).ok
