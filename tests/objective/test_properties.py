"""Properties over random shapes, types and options."""

import pytest
import torch
from cases import assert_close, make, relative, run, truth

from ngd_fast.objective import backends

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

pytestmark = pytest.mark.skipif(bool(backends.why_not("cpu")), reason=backends.why_not("cpu"))

cases_ = st.builds(
    make,
    st.integers(1, 70),
    st.integers(2, 90),
    st.integers(1, 12),
    st.integers(1, 40),
    seed=st.integers(0, 10_000),
    soft=st.booleans(),
    prior_per_row=st.booleans(),
    kd_mode=st.sampled_from(["mse", "kl", "logitstd"]),
    kd_scale_by_t2=st.booleans(),
    kd_temperature=st.sampled_from([0.5, 1.0, 5.0]),
    proto_temperature=st.sampled_from([0.1, 0.9]),
    label_smoothing=st.sampled_from([0.0, 0.055, 0.9]),
    var_cap=st.sampled_from([0.0, 0.2, 2.0]),
    margin=st.sampled_from([0.0, 0.5, 1.5]),
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cases_)
def test_cpu_is_the_reference(case):
    assert_close(run(case, "cpu"), truth(case), 2e-5)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(cases_, st.randoms(use_true_random=False))
def test_the_order_of_rows_does_not_matter(case, random):
    rows = list(range(len(case["logits"])))
    random.shuffle(rows)
    first = run(case, "cpu")
    by_row = ("features", "logits", "target", "teacher_logits", "labels") + (
        ("prior",) if case["prior"].ndim == 2 else ()
    )
    shuffled = {name: value[rows] if name in by_row else value for name, value in case.items()}
    second = run(shuffled, "cpu")
    assert relative(second.terms, first.terms) <= 1e-5
    assert relative(second.features, first.features[rows]) <= 2e-5
    assert relative(second.logits, first.logits[rows]) <= 2e-5


@settings(max_examples=25, deadline=None, derandomize=True)
@given(cases_)
def test_gradients_of_normalised_rows_are_tangent(case):
    """The loss does not change along a row, so its gradient has no component along it."""
    gradient = run(case, "cpu").features.double()
    along = (gradient * case["features"].double()).sum(1)
    assert (along.abs() <= 1e-5 * gradient.norm() * case["features"].norm(dim=1) + 1e-9).all()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(cases_)
def test_terms_are_not_negative(case):
    terms = run({**case, "label_smoothing": 0.0}, "cpu").terms
    assert (terms >= -1e-6).all() and terms.isfinite().all()
    assert torch.isclose(
        terms[0],
        terms[1]
        + 0.30 * terms[2]
        + 0.12 * terms[3]
        + case["geo_weight"] * (case["var_weight"] * terms[4] + case["margin_weight"] * terms[5]),
        rtol=1e-5,
    )
