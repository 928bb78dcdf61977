"""Small faces, a bank and a configuration that trains in a second."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from ngd_fast.faces.feeds import Batch
from ngd_fast.prototypes.bank import PrototypeBank
from ngd_fast.student.config import StudentConfig, load_student_config
from ngd_fast.student.networks import build_student
from ngd_fast.student.run import train_student
from ngd_fast.student.schedule import schedule_table
from ngd_fast.student.step import StudentStep
from ngd_fast.synthetic.faces import make_faces

sys.path.insert(0, str(Path(__file__).parent))  # makes ``runs`` importable from the tests of this folder
from runs import RAMP


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Bits depend on the number of threads: it must be the same in the fixtures that live long and in the tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> dict[str, str]:
    """Paths of drawn faces ("train" 96, "valid" 40) and of a bank ("bank")."""
    folder = tmp_path_factory.mktemp("files")
    for name, count, seed in (("train", 96, 1), ("valid", 40, 2)):
        make_faces(count, seed).save(folder / f"{name}.npz")
    bank_of(256).save(folder / "bank.npz")
    return {name: str(folder / f"{name}.npz") for name in ("train", "valid", "bank")}


def bank_of(dim: int, grid: int = 5) -> PrototypeBank:
    rng = np.random.default_rng(0)
    features = rng.standard_normal((200, dim)).astype(np.float32)
    return PrototypeBank.build(features, rng.uniform(-1, 1, 200), rng.uniform(-1, 1, 200), grid=grid)


@pytest.fixture
def make_bank():
    return bank_of


SMALL = (
    "model.arch=resnet18-w4",
    "data.image_size=24",
    "train.precision=fp32",
    "train.batch_size=16",
    "train.epochs=2",
    "train.log_every=4",
    "train.bootstrap=20",
    "train.checkpoint_seconds=0",
    "train.valid_batch_size=32",
    "optimizer.lr=1e-3",
    "device=cpu",
    "feed.kind=torch",
)


@pytest.fixture(scope="session")
def small_overrides() -> tuple[str, ...]:
    return SMALL


@pytest.fixture(scope="session")
def small_config(files) -> Callable[..., StudentConfig]:
    """(name, *overrides) -> that packaged configuration, shrunk to two epochs of six steps."""
    paths = (f"data.train={files['train']}", f"data.valid={files['valid']}", f"objective.proto.bank={files['bank']}")

    def load(name: str = "B0", *overrides: str) -> StudentConfig:
        return load_student_config(name, [*SMALL, *paths, *overrides])

    return load


@pytest.fixture(scope="session")
def teacher(small_config, tmp_path_factory) -> str:
    """The run folder of a small vision teacher."""
    folder = tmp_path_factory.mktemp("runs") / "teacher"
    train_student(small_config("teacher", "model.arch=resnet18-w4", "train.epochs=1"), folder)
    return str(folder)


@pytest.fixture
def make_step(small_config, files) -> Callable[..., tuple[StudentStep, PrototypeBank]]:
    """(name, *overrides) -> a step of that configuration whose weights come from its seed, and its bank."""
    bank = PrototypeBank.load(files["bank"])

    def make(name: str, *overrides: str, device: torch.device = torch.device("cpu")):  # noqa: B008
        config = small_config(name, *overrides)
        torch.manual_seed(config.seed)
        student = build_student(config.model.arch).to(device, memory_format=torch.channels_last)
        table = schedule_table(config, steps_per_epoch=6)
        counts = [40, 20, 10, 9, 8, 3, 4, 2]
        return StudentStep(student, config, schedule=table, class_counts=counts, bank=bank, device=device), bank

    return make


@pytest.fixture
def make_batches() -> Callable[..., list[Batch]]:
    """(count, size) -> batches of noise with labels and distributions, always the same."""

    def make(count: int, size: int, device: torch.device = torch.device("cpu")) -> list[Batch]:  # noqa: B008
        generator = torch.Generator().manual_seed(5)
        batches = []
        for _ in range(count):
            images = torch.randn(size, 3, 24, 24, generator=generator)
            dist = torch.rand(size, 8, generator=generator).softmax(1)
            labels = torch.randint(8, (size,), generator=generator)
            batch = Batch(images.contiguous(memory_format=torch.channels_last), dist, labels, torch.arange(size))
            batches.append(Batch(*(tensor.to(device) for tensor in vars(batch).values())))
        return batches

    return make


@pytest.fixture(scope="session")
def finished(small_config, teacher, tmp_path_factory):
    """A B3 run, and the configuration it was made from."""
    config = small_config("B3", f"objective.kd.teacher={teacher}", *RAMP)
    folder = tmp_path_factory.mktemp("finished") / "B3_seed1"
    return config, folder, train_student(config, folder)
