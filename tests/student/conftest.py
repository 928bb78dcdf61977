"""Small faces, a bank and a configuration that trains in a second."""

import numpy as np
import pytest
import torch

from ngd_fast.prototypes.bank import PrototypeBank
from ngd_fast.student.config import StudentConfig, load_student_config
from ngd_fast.synthetic.faces import make_faces


@pytest.fixture(autouse=True)
def _one_thread():
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
    make_bank(256).save(folder / "bank.npz")
    return {name: str(folder / f"{name}.npz") for name in ("train", "valid", "bank")}


def make_bank(dim: int) -> PrototypeBank:
    rng = np.random.default_rng(0)
    features = rng.standard_normal((200, dim)).astype(np.float32)
    return PrototypeBank.build(features, rng.uniform(-1, 1, 200), rng.uniform(-1, 1, 200))


SMALL = (
    "model.arch=resnet18-w4",
    "data.image_size=24",
    "train.precision=fp32",
    "train.batch_size=16",
    "train.epochs=2",
    "train.log_every=4",
    "train.bootstrap=20",
    "train.valid_batch_size=32",
    "optimizer.lr=1e-3",
    "device=cpu",
    "feed.kind=torch",
)


def small_config(files: dict[str, str], name: str = "B0", *overrides: str) -> StudentConfig:
    """The packaged configuration ``name`` shrunk to two epochs of six steps."""
    paths = (f"data.train={files['train']}", f"data.valid={files['valid']}", f"objective.proto.bank={files['bank']}")
    return load_student_config(name, [*SMALL, *paths, *overrides])


@pytest.fixture(scope="session")
def teacher(files, tmp_path_factory) -> str:
    """The run folder of a small vision teacher."""
    from ngd_fast.student.run import train_student

    folder = tmp_path_factory.mktemp("runs") / "teacher"
    train_student(small_config(files, "teacher", "model.arch=resnet18-w4", "train.epochs=1"), folder)
    return str(folder)
