"""The CUDA kernels' own code, run by the emulator, against the float64 reference."""

import shutil
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from emulated import Emulator, describe, make

from ngd_fast.objective import reference
from ngd_fast.objective.settings import Settings

OPTIONS = {**asdict(Settings()), "var_cap": 0.5, "margin": 1.0}
INPUTS = (
    "features", "logits", "target", "prototypes", "prior", "labels", "teacher_logits", "class_weight", "geo_weight",
)  # fmt: skip
# One cluster launch; three launches, as devices before compute capability 9.0 and large batches take them.
SMALL, LARGE = {"capability": 90}, {"capability": 80}


def truth(case, options):
    """Terms and gradients by the float64 reference."""
    case = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in case.items()}
    leaves = [case[k].requires_grad_() for k in ("features", "logits") if case.get(k) is not None]
    settings = {**OPTIONS, **options}
    num_classes = settings.pop("num_classes", 8)
    terms = reference.objective(
        *(case.get(name) for name in INPUTS), num_classes=num_classes, settings=Settings(**settings)
    )
    grads = iter(torch.autograd.grad(terms.total, leaves, allow_unused=True))
    grads = [next(grads) if case.get(k) is not None else None for k in ("features", "logits")]
    return torch.stack([t.detach() for t in terms]), *grads


def error(got, want):
    """Relative error of the whole gradient; one that is 0 but for rounding (D = 1, one class) counts as 1e-4 long."""
    return float((got.double() - want).norm() / want.norm().clamp_min(1e-4))


def check(emulator, case, options=None, machine=None, tolerance=1e-5):
    options = dict(options or {}, num_classes=case["logits"].shape[1] if case.get("logits") is not None else 8)
    emulator.machine(**(machine or {}))
    got = emulator.objective(**case, **options)
    want = truth(case, options)
    # float32 sums of terms of order 1, rounded at 6e-8: 1e-6 absolutely, below which a term's own size does not count
    torch.testing.assert_close(got[0].double(), want[0], rtol=tolerance, atol=1e-6, equal_nan=True)
    for mine, theirs in zip(got[1:], want[1:]):
        if theirs is not None:
            assert error(mine, theirs) < tolerance
    return got


@pytest.mark.parametrize("machine", [SMALL, {**SMALL, "max_cluster": 8}, LARGE], ids=["cluster16", "cluster8", "large"])
@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 37, 128, 200, 256, 300])  # a chunk of 8, 16 blocks, two chunks a block
def test_float32(emulator, machine, rows):
    check(emulator, make(rows), machine=machine)


@pytest.mark.parametrize("machine", [SMALL, LARGE], ids=["small", "large"])
def test_targets_that_are_the_labels(emulator, machine):
    """The usual call, in which they are one tensor, and are counted once."""
    case = make(45, seed=6)
    case["target"][::7] = -100
    check(emulator, {**case, "labels": case["target"]}, machine=machine)


@pytest.mark.parametrize("machine", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize(
    "options",
    [
        {"kd_mode": "kl"},
        {"kd_mode": "kl", "kd_scale_by_t2": True, "kd_temperature": 3.0},
        {"kd_mode": "logitstd", "kd_temperature": 2.0},
        {"kd_scale_by_t2": True, "label_smoothing": 0.0},
        {"proto_temperature": 0.07, "proto_weight": 2.0},
        {"var_cap": 0.0, "margin": 0.3, "var_weight": 3.0, "margin_weight": 0.5, "high_valence": (0, 3, 7)},
        {"high_valence": ()},
    ],
    ids=str,
)
def test_options(emulator, machine, options):
    check(emulator, make(41, seed=1), options, machine)


@pytest.mark.parametrize("machine", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize(
    "left_out",
    [
        "teacher_logits",
        "class_weight",
        "prototypes",
        "labels",
        "logits",
        "features",
        "labels prototypes",
        "logits labels",
    ],
)
def test_terms_that_are_off(emulator, machine, left_out):
    case = make(19, seed=2)
    for name in left_out.split():
        case[name] = None
    if case["prototypes"] is None:
        case["prior"] = None
    if case["logits"] is None:
        case.update(target=None, teacher_logits=None, class_weight=None)
    if case["features"] is None:
        case.update(prototypes=None, prior=None, labels=None)
    check(emulator, case, machine=machine)


@pytest.mark.parametrize("machine", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize(("soft", "prior_rows"), [(True, False), (False, True), (True, True)])
def test_soft_targets_and_a_prior_for_each_row(emulator, machine, soft, prior_rows):
    check(emulator, make(27, soft=soft, prior_rows=prior_rows), {"kd_mode": "kl"}, machine)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("dim", "classes", "prototypes"),
    [(1, 1, 1), (40, 5, 7), (256, 9, 25), (256, 8, 33), (300, 64, 70), (2048, 3, 256), (63, 33, 2)],
)
def test_every_shape(emulator, dim, classes, prototypes, dtype):
    case = make(13, dim, classes, prototypes, dtype, prior_rows=prototypes == 7)
    options = {"high_valence": (0,), "kd_mode": "kl"}
    # the float64 bound is that of sums in 62-bit fixed point and of the reference's own order of sums
    check(emulator, case, options, tolerance=1e-5 if dtype == torch.float32 else 1e-8)


@pytest.mark.parametrize("classes", [3, 8])
@pytest.mark.parametrize("prototypes", [1, 32])
def test_ends_of_the_fast_shapes(emulator, classes, prototypes):
    for machine in (SMALL, LARGE):
        check(emulator, make(21, 256, classes, prototypes), {"high_valence": (1,)}, machine)


def plain(case, options):
    """Gradients by features and logits of the terms as one writes them in PyTorch, in the inputs' own dtype."""
    x, z = (case[k].clone().requires_grad_() for k in ("features", "logits"))
    dtype = x.dtype
    f = F.normalize(x, dim=1)
    p = F.normalize(case["prototypes"].to(dtype), dim=1)
    ce = F.cross_entropy(z, case["target"], case["class_weight"].to(dtype), label_smoothing=options["label_smoothing"])
    kd = ((z - case["teacher_logits"]) / options["kd_temperature"]).square().mean()
    log_q = F.log_softmax(f @ p.t() / options["proto_temperature"], 1)
    proto = F.kl_div(log_q, case["prior"].to(dtype).expand_as(log_q), reduction="batchmean")
    mean = torch.stack([f[case["labels"] == c].mean(0) for c in range(8)])
    sigma2 = [(f[case["labels"] == c] - mean[c]).square().sum(1).mean() for c in options["high_valence"]]
    var = sum(F.relu(one - options["var_cap"]) for one in sigma2)
    gap = F.relu(options["margin"] - torch.cdist(mean.float(), mean.float()).to(dtype))
    repel = gap.sum() - gap.diagonal().sum()
    total = ce + options["kd_weight"] * kd + options["proto_weight"] * proto + case["geo_weight"] * (var + repel)
    return torch.autograd.grad(total, (x, z))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("machine", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("alone", ["proto", "geo", "all"])
def test_halves_are_no_worse_than_plain_pytorch(emulator, dtype, machine, alone):
    case = make(144, dtype=dtype, seed=3)
    if alone == "proto":
        case["geo_weight"] = 0.0
    options = {"proto_weight": 0.0} if alone == "geo" else {}
    emulator.machine(**machine)
    got, want = emulator.objective(**case, **options), truth(case, options)
    theirs = plain(case, {**OPTIONS, **options})
    # terms are sums in float32 of exact products, but for prototypes that the tensor cores take rounded to the dtype
    torch.testing.assert_close(got[0].double(), want[0], rtol=1e-4, atol=1e-6)
    for mine, plain_one, exact in zip(got[1:], theirs, want[1:]):
        assert mine.dtype == dtype
        assert error(mine, exact) <= 2 * error(plain_one, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 33, 100, 500])  # around the tensor cores' 16 rows; at 500, some warps
def test_halves_at_every_tile_edge(emulator, dtype, rows):  # of a single block take more tiles and logits than others
    for machine in (SMALL, {**LARGE, "multiprocessors": 1}):
        emulator.machine(**machine)
        case = make(rows, dtype=dtype, prior_rows=rows == 33)
        got, want = emulator.objective(**case), truth(case, {})
        rounding, smallest = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        torch.testing.assert_close(got[0].double(), want[0], rtol=1e-3 * rounding / 2**-10, atol=1e-6)
        for mine, exact, bound in zip(got[1:], want[1:], (2 * rounding, rounding)):
            below_normal = smallest * exact.numel() ** 0.5  # float16 has few digits there
            assert (mine.double() - exact).norm() < bound * exact.norm() + below_normal


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("machine", [SMALL, LARGE, {**LARGE, "dim": 72}], ids=["small", "large", "general"])
def test_same_bits_in_any_order_of_threads(emulator, dtype, machine):
    machine = dict(machine)
    case = make(70, machine.pop("dim", 256), dtype=dtype)
    results = []
    for seed in (0, 1, 2):  # the emulator runs threads and blocks in another order with each seed
        emulator.machine(**machine, seed=seed)
        results.append(emulator.objective(**case))
    for other in results[1:]:
        for a, b in zip(results[0], other):
            assert torch.equal(a, b)


@pytest.mark.parametrize("machine", [SMALL, LARGE, {**LARGE, "dim": 72}], ids=["small", "large", "general"])
class TestEdges:
    def run(self, emulator, machine, change, options=None, **kwargs):
        machine = dict(machine)
        case = make(24, machine.pop("dim", 256), **kwargs)
        change(case)
        return check(emulator, case, options, machine)

    def test_no_gradient_wanted(self, emulator, machine):
        machine = dict(machine)
        case = make(24, machine.pop("dim", 256))
        emulator.machine(**machine)
        terms, *grads = emulator.objective(**case, want_grad=False)
        assert grads == [None, None]
        assert torch.equal(terms, emulator.objective(**case)[0])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    def test_no_rows(self, emulator, machine, dtype):
        machine = dict(machine)
        case = make(0, machine.pop("dim", 256), dtype=dtype)
        check(emulator, case, machine=machine)
        alone = {name: case[name] for name in ("features", "labels", "geo_weight")}
        assert (emulator.objective(**alone)[0] == 0).all()
        sums = emulator.geo_sums(case["features"], case["labels"], 8)
        assert (sums == 0).all()
        # Where the other ranks of a global batch have rows, D-Geo is theirs.
        sums[:2, 0], sums[:2, -2:] = torch.tensor([1.0, 1.5]), torch.tensor([[1.0, 1.0], [2.0, 2.0]])
        terms = emulator.objective(**alone, class_sums=sums)[0]
        torch.testing.assert_close(terms[5].double(), torch.tensor(1.5, dtype=torch.float64))

    def test_zero_rows(self, emulator, machine):
        got = self.run(emulator, machine, lambda case: case["features"][3:5].zero_())
        assert (got[1][3:5] == 0).all()

    def test_zero_prototype(self, emulator, machine):
        self.run(emulator, machine, lambda case: case["prototypes"][2].zero_())

    def test_one_class_only(self, emulator, machine):
        self.run(emulator, machine, lambda case: case["labels"].fill_(2))

    def test_no_row_has_a_class(self, emulator, machine):
        got = self.run(emulator, machine, lambda case: case["labels"].fill_(-1))
        assert (got[0][4:] == 0).all()

    def test_class_means_that_coincide(self, emulator, machine):
        def change(case):  # two rows a class: their mean is exact, and so is the distance of 0
            case["features"][:] = case["features"][0]
            case["labels"][:] = torch.tensor(list(range(8)) * 2 + [-1] * 8)

        self.run(emulator, machine, change)

    def test_ignored_targets(self, emulator, machine):
        self.run(emulator, machine, lambda case: case["target"][::3].fill_(-100))

    def test_only_ignored_targets(self, emulator, machine):
        machine = dict(machine)
        case = make(24, machine.pop("dim", 256))
        case["target"].fill_(-100)
        emulator.machine(**machine)
        terms = emulator.objective(**case)[0]
        assert terms[:2].isnan().all() and not terms[2:].isnan().any()

    def test_huge_and_infinite_logits(self, emulator, machine):
        def change(case):
            case["logits"] *= 1e4
            case["logits"][0, 3] = -float("inf")
            case["target"][0] = 1
            case["teacher_logits"] = None

        self.run(emulator, machine, change, {"label_smoothing": 0.0})

    def test_scaled_features_give_the_same_loss(self, emulator, machine):
        machine = dict(machine)
        case = make(24, machine.pop("dim", 256))
        emulator.machine(**machine)
        terms = emulator.objective(**case)[0]
        case["features"] = case["features"] * 2.0**20
        assert torch.equal(emulator.objective(**case)[0], terms)

    @pytest.mark.parametrize(
        ("name", "value"), [("labels", 8), ("labels", -2), ("target", 8), ("target", -1), ("target", 2**40)]
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_index_out_of_range_is_nan_and_reads_nothing(self, emulator, machine, name, value, dtype):
        machine = dict(machine)
        case = make(24, machine.pop("dim", 256), dtype=dtype)
        case[name][7] = value
        emulator.machine(**machine)
        terms = emulator.objective(**case)[0]
        concerned = [4, 5] if name == "labels" else [1]
        assert terms[0].isnan() and terms[concerned].isnan().all()
        assert not terms[[i for i in range(1, 6) if i not in concerned]].isnan().any()

    def test_nan_feature(self, emulator, machine):
        machine = dict(machine)
        case = make(24, machine.pop("dim", 256))
        case["features"][0, 0] = float("nan")  # row 0 has a label
        emulator.machine(**machine)
        terms = emulator.objective(**case)[0]
        assert terms[[0, 3, 4, 5]].isnan().all() and not terms[[1, 2]].isnan().any()

    def test_geo_weight_on_the_device(self, emulator, machine):
        machine = dict(machine)
        case = make(24, machine.pop("dim", 256))
        emulator.machine(**machine)
        by_value = emulator.objective(**case)
        by_tensor = emulator.objective(**{**case, "geo_weight": torch.tensor(0.05)})
        for a, b in zip(by_value, by_tensor):
            assert torch.equal(a, b)

    def test_class_sums_of_a_global_batch(self, emulator, machine):
        """Two halves of a batch, each with the sums of the whole: D-Geo's gradient is that of the whole batch."""
        machine = dict(machine)
        case = make(24, machine.pop("dim", 256))
        for name in ("logits", "target", "prototypes", "prior", "teacher_logits", "class_weight"):
            case[name] = None
        want = truth(case, {})
        emulator.machine(**machine)
        sums = emulator.geo_sums(case["features"], case["labels"], 8)
        halves = [
            emulator.objective(
                features=case["features"][part].contiguous(),
                labels=case["labels"][part].contiguous(),
                geo_weight=0.05,
                class_sums=sums,
            )
            for part in (slice(0, 10), slice(10, 24))
        ]
        for terms, *_ in halves:
            torch.testing.assert_close(terms.double(), want[0], rtol=1e-5, atol=1e-6)
        assert error(torch.cat([grad for _, grad, _ in halves]), want[1]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("rows", "dim"), [(1, 256), (333, 256), (50, 65)])
def test_geo_sums(emulator, dtype, rows, dim):
    case = make(rows, dim, dtype=dtype)
    emulator.machine(seed=5)
    got = emulator.geo_sums(case["features"], case["labels"], 8)
    want = reference.geo_sums(case["features"].double(), case["labels"], 8)
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)
    assert torch.equal(got[:, dim].double(), want[:, dim])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("count", [1, 8, 1000, 3001])
def test_scale(emulator, dtype, count):
    values = torch.randn(count + 1, generator=torch.Generator().manual_seed(1)).to(dtype)
    for start in (0, 1):  # 1: not aligned to 16 bytes
        for factor in (1.0, -2.5):
            tensor = values.clone()
            emulator.scale(tensor[start : start + count], torch.tensor(factor))
            want = values.clone()
            want[start : start + count] = (want[start : start + count].double() * factor).to(dtype)
            assert torch.equal(tensor, want)


def test_the_workspace_is_small(emulator):
    emulator.machine(multiprocessors=132, capability=80)
    assert emulator.workspace_bytes(rows=262_144, dim=256, classes=8, prototype_count=25) < 200_000


@pytest.mark.parametrize(
    ("largest", "one_launch"), [("", [1, 128, 256]), ("16", [1, 128, 256]), ("8", [1, 128]), ("0", [])]
)
def test_the_cluster_is_chosen_by_the_environment(emulator, tmp_path, monkeypatch, largest, one_launch):
    """So that a GPU's owner can measure which is fastest. It is read once: a copy of the library reads it again."""
    monkeypatch.setenv("NGD_FAST_CUDA_CLUSTER", largest)
    monkeypatch.setenv("NGD_FAST_CUDA_OVERLAP", "0")
    copy = Emulator(shutil.copy(emulator.path, tmp_path / "copy.so"))
    sizes = dict(dim=256, classes=8, prototype_count=25, features=describe(torch.empty(64, 256)))
    assert [rows for rows in (1, 128, 256, 257) if copy.workspace_bytes(rows=rows, **sizes) == 0] == one_launch
    check(copy, make(37), machine=SMALL)
