"""Every fused backend against the float64 reference on fresh random inputs, and the fixed list of edge cases."""

import cases
import pytest
import torch
from cases import BACKENDS, assert_close, make, relative, run, truth

from ngd_fast.objective import backends, functional

pytestmark = pytest.mark.skipif(bool(backends.why_not("cpu")), reason=backends.why_not("cpu"))

SHAPES = [
    (128, 256, 8, 25),  # the paper's
    (1, 256, 8, 25),
    (17, 100, 5, 7),  # no size fits a vector
    (16, 64, 1, 1),
    (15, 63, 8, 33),  # one below, and one above
    (33, 65, 9, 31),
    (65, 2, 2, 2),  # D = 1 would have no gradient but rounding
    (300, 33, 64, 256),  # most classes and prototypes
    (40, 2048, 3, 5),  # longest features
    (1030, 256, 8, 25),  # several chunks of class sums
]
OPTIONS = {
    "paper": {},
    "kl": {"kd_mode": "kl"},
    "kl T^2": {"kd_mode": "kl", "kd_scale_by_t2": True},
    "logitstd": {"kd_mode": "logitstd", "kd_temperature": 2.0, "kd_scale_by_t2": True},
    "mse T^2": {"kd_scale_by_t2": True},
    "soft": {"soft": True},
    "prior per row": {"prior_per_row": True},
    "no teacher": {"teacher_logits": None},
    "no weights": {"class_weight": None},
    "no smoothing": {"label_smoothing": 0.0},
    "no prototypes": {"prototypes": None, "prior": None},
    "no d-geo": {"geo_weight": None},
    "logits alone": {"features": None, "prototypes": None, "prior": None, "geo_weight": None},
    "weight on the device": {"geo_weight": torch.tensor(0.7)},
    "cold": {"kd_temperature": 0.2, "proto_temperature": 0.01, "kd_mode": "kl"},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(backend, shape):
    case = make(*shape, seed=sum(shape))
    assert_close(run(case, backend), truth(case))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("rows", [37, 600])
def test_options(backend, options, rows):
    case = make(rows, seed=3, **options)
    assert_close(run(case, backend), truth(case))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(128, 256, 8, 25), (37, 100, 5, 7)], ids=str)
def test_half_types(backend, dtype, shape):
    """The error may be twice that of plain PyTorch in this dtype, which is the rounding of the gradient."""
    case = make(*shape, dtype=dtype, soft=True)
    actual, plain, expected = run(case, backend), run(case, "reference"), truth(case)
    assert relative(actual.terms, expected.terms) <= 1e-5
    for name in ("features", "logits"):
        gradient = getattr(actual, name)
        assert gradient.dtype == dtype
        bound = 2 * relative(getattr(plain, name), getattr(expected, name))
        assert 0 < relative(gradient, getattr(expected, name)) <= bound


@pytest.mark.parametrize("backend", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("options", [{}, {"kd_mode": "kl", "soft": True, "prior_per_row": True}], ids=["index", "soft"])
def test_float64(backend, options):
    case = make(41, 70, 6, 9, dtype=torch.float64, **options)
    assert_close(run(case, backend), truth(case), 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_features_and_logits_of_different_dtypes(backend):
    case = make()
    case["logits"] = case["logits"].bfloat16()  # as under autocast, where the normalisation stays float32
    actual, expected = run(case, backend), truth(case)
    assert actual.features.dtype == torch.float32 and actual.logits.dtype == torch.bfloat16
    assert relative(actual.features, expected.features) <= 1e-5
    assert relative(actual.terms, expected.terms) <= 1e-5


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_empty_batch(backend):
    result = run(make(0), backend)
    assert result.terms[[0, 1, 2, 3]].isnan().all() and (result.terms[4:] == 0).all()
    assert result.features.shape == (0, 256) and result.logits.shape == (0, 8)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "labels",
    [[1, 1, 1, 1, 1, 1], [2, 1, 1, 1, 1, 1], [-1, -1, -1, -1, -1, -1], [-1, 0, -1, 3, 3, -100], [0, 1, 2, 3, 4, 5]],
    ids=["one class", "a class with one row", "all left out", "some left out", "a row each"],
)
def test_labels(backend, labels):
    case = make(6, labels=torch.tensor(labels))
    assert_close(run(case, backend), truth(case))


@pytest.mark.parametrize("backend", BACKENDS)
def test_targets_left_out(backend):
    case = make(20)
    case["target"][::3] = -100
    actual, expected = run(case, backend), truth(case)
    assert_close(actual, expected)
    case["target"][:] = -100
    result = run(case, backend)
    assert result.terms[0].isnan() and result.terms[1].isnan()  # the mean over nothing, as F.cross_entropy has it
    assert result.terms[4] == 0 and result.terms[5] == 0  # no target, no label


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_rows(backend):
    case = make(20)
    case["features"][3] = 0
    case["features"][7] = 1e-20
    case["prototypes"][2] = 0
    actual = run(case, backend)
    assert_close(actual, truth(case))
    assert (actual.features[[3, 7]] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_identical_features(backend):
    """Distance 0 between means and no variance: values stay, the gradient of D-Geo is 0 and not NaN."""
    case = make(12, prototypes=None, prior=None)
    case["features"] = torch.zeros(12, 256)
    case["features"][:, 0] = 2.0
    result = run(case, backend)
    present = len(case["target"].unique())
    assert result.terms[5].item() == pytest.approx(present * (present - 1) * case["margin"], rel=1e-6)
    assert result.terms[4] == 0 and (result.features == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_huge_and_infinite_logits(backend, smoothing):
    case = make(9, teacher_logits=None, label_smoothing=smoothing)
    case["logits"][0] = 1e30 * torch.arange(8)
    case["logits"][1] = -3e38
    case["logits"][2, (case["target"][2] + 1) % 8] = -torch.inf
    actual, expected = run(case, backend), truth(case)
    same = (actual.terms.cpu().double() == expected.terms) | (
        (actual.terms.cpu().double() - expected.terms).abs() <= 1e-5 * expected.terms.abs().clamp_min(1)
    )
    assert same.all(), (actual.terms, expected.terms)
    assert actual.terms[1].isinf() if smoothing else actual.terms[1].isfinite()
    assert relative(actual.logits, expected.logits) <= 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_logits_in_kd(backend):
    case = make(9, kd_mode="kl", label_smoothing=0.0)
    case["target"].fill_(1)
    case["logits"][:, 5] = case["teacher_logits"][:, 5] = -torch.inf  # a class that neither has
    actual, expected = run(case, backend), truth(case)
    assert expected.terms.isfinite().all()
    assert_close(actual, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_and_broadcast_inputs(backend):
    base = make(24, 64, 8, 5)
    case = dict(base)
    case["features"] = torch.stack([base["features"], torch.zeros(24, 64)], dim=2)[..., 0]  # columns 2 apart
    case["logits"] = torch.cat([base["logits"], torch.zeros(24, 3)], dim=1)[:, :8]  # rows 11 apart
    case["teacher_logits"] = base["teacher_logits"][:1].expand(24, 8)
    case["target"] = torch.stack([base["target"]] * 2, dim=1)[:, 0]
    case["prototypes"] = base["prototypes"].t().contiguous().t()
    case["prior"] = base["prior"].expand(24, 5)
    case["class_weight"] = torch.ones(1).expand(8)
    assert_close(run(case, backend), truth(case))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [128, 700])
def test_bit_identical(backend, rows):
    case = make(rows, seed=9)
    first = run(case, backend)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            again = run(case, backend)
            assert all(torch.equal(a, b) for a, b in zip(first, again))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scale_of_features_does_not_matter(backend):
    case = make(50)
    first = run(case, backend)
    for factor in (1e-9, 3.0, 1e9):
        scaled = run({**case, "features": case["features"] * factor}, backend)
        assert relative(scaled.terms, first.terms) <= 1e-5
        assert relative(scaled.features * factor, first.features) <= 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_terms_alone(backend):
    case = cases.mapped(make(60), lambda t: t.to(cases.device_of(backend)))
    everything = functional.ngd_objective(**case, backend=backend)
    features = case["features"]
    proto = functional.proto_kd(features, case["prototypes"], case["prior"], backend=backend)
    # A GPU's compiler may contract the products of a kernel without the other terms in another way.
    tolerance = 1e-6 if backend == "cpu" else 1e-5
    assert float(proto) == pytest.approx(float(everything.proto), rel=tolerance)
    geo = {name: case[name] for name in ("var_cap", "margin", "var_weight", "margin_weight")}
    alone = functional.d_geo(features, case["target"], **geo, backend=backend)
    together = geo["var_weight"] * everything.geo_var + geo["margin_weight"] * everything.geo_margin
    assert float(alone) == pytest.approx(float(together), rel=tolerance)


@pytest.mark.parametrize("instructions", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(instructions):
    from ngd_fast import _C

    best = _C.instruction_set()
    try:
        try:
            _C.use_instruction_set(instructions)
        except ValueError as error:
            pytest.skip(str(error))
        for case in (make(37), make(33, 65, 9, 31, dtype=torch.float16, soft=True, kd_mode="kl", prior_per_row=True)):
            tolerance = 1e-5 if case["features"].dtype == torch.float32 else 1e-3
            assert_close(run(case, "cpu"), truth(case), tolerance)
    finally:
        _C.use_instruction_set(best)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_half_number_survives_conversion(dtype):
    """All 65,536 bit patterns pass through the teacher's logits into the gradient of mse, which here is minus them."""
    teacher = torch.arange(-32768, 32768, dtype=torch.int16).view(dtype).view(-1, 8)
    logits = torch.zeros_like(teacher, requires_grad=True)
    no_target = torch.full((len(teacher),), -100)
    settings = {"kd_weight": teacher.numel() / 2, "kd_temperature": 1.0, "geo_weight": None}
    out = functional.ngd_objective(None, logits, no_target, teacher_logits=teacher, backend="cpu", **settings)
    out.total.backward()
    assert logits.grad.dtype == dtype
    assert torch.equal(logits.grad.isnan(), teacher.isnan())
    assert torch.equal(logits.grad.nan_to_num(0, 7, -7), (-teacher).nan_to_num(0, 7, -7))
