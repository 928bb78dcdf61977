"""The kernels' every load and store: in bounds, aligned, of written memory, free of races (emulator/checks.cpp), with
the launches of two calls in a row on the same buffers, as the allocator and a CUDA graph hand them out.

A choice of cases that takes each path through each kernel; NGD_FAST_EMULATOR=checked runs all of test_kernels.py so.
"""

import pytest
import torch
from emulated import describe, make

# Of one launch; of launches that overlap; of launches one after the other. Two multiprocessors: two or more blocks.
CLUSTER16, CLUSTER8 = {"capability": 90}, {"capability": 90, "max_cluster": 8}
OVERLAP, NO_OVERLAP = {"capability": 90, "max_cluster": 1, "multiprocessors": 2}, {"capability": 80}


@pytest.fixture
def twice(checked_emulator):
    checked_emulator.repeat = 2
    yield checked_emulator
    checked_emulator.repeat = 1
    checked_emulator.machine()


@pytest.mark.parametrize(
    ("machine", "rows", "sizes"),
    [
        (CLUSTER16, 20, {}),  # blocks without rows
        (CLUSTER8, 70, {"prior_rows": True, "soft": True}),  # two chunks a block, the last not full
        (CLUSTER16, 9, {"dtype": torch.bfloat16, "classes": 3, "prototypes": 32}),
        (OVERLAP, 70, {}),
        (OVERLAP, 70, {"dtype": torch.bfloat16}),
        (OVERLAP, 37, {"dtype": torch.float16, "prior_rows": True, "classes": 5}),
        (OVERLAP, 21, {"dim": 72, "dtype": torch.bfloat16}),
        (OVERLAP, 0, {"dim": 72}),
        (OVERLAP, 13, {"dim": 65, "classes": 40, "prototypes": 40, "dtype": torch.float64}),
        (NO_OVERLAP, 300, {"dtype": torch.bfloat16}),
    ],
    ids=str,
)
@pytest.mark.parametrize("seed", [0, 1])
def test_objective(twice, machine, rows, sizes, seed):
    twice.machine(**machine, seed=seed)
    twice.objective(**make(rows, **sizes), num_classes=sizes.get("classes", 8), kd_mode="kl" if seed else "mse")


def test_code_compiled_for_an_older_architecture(twice):
    """As the driver compiles from PTX where the extension was built for 8.0+PTX: no clusters, no overlap."""
    for compiled in (90, 80):
        twice.machine(compiled=compiled)
        size = twice.workspace_bytes(rows=64, dim=256, classes=8, features=describe(torch.empty(64, 256)))
        assert (size == 0) == (compiled == 90)  # one cluster needs none
        twice.objective(**make(20))


@pytest.mark.parametrize("machine", [CLUSTER16, OVERLAP], ids=["cluster", "overlap"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given", ["features prototypes prior", "features labels geo_weight", "logits target"])
def test_terms_alone(twice, machine, dtype, given):
    case = make(19, dtype=dtype)
    twice.machine(**machine, seed=2)
    twice.objective(**{name: case[name] for name in given.split()})


@pytest.mark.parametrize("machine", [CLUSTER16, OVERLAP], ids=["cluster", "overlap"])
def test_bad_input_and_sums_given(twice, machine):
    case = make(9, dtype=torch.bfloat16)
    case["labels"][3], case["target"][5], case["features"][7, 9] = 8, 2**40, float("nan")
    twice.machine(**machine, seed=3)
    twice.objective(**case)
    twice.objective(**case, class_sums=twice.geo_sums(case["features"], case["labels"], 8))
    twice.objective(**case, want_grad=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_scale(twice, dtype):
    values = torch.ones(1001, dtype=dtype)
    twice.scale(values, torch.tensor(2.0))
    twice.scale(values[1:], torch.tensor(0.5))
    assert values[0] == 4 and (values[1:] == 1).all()
