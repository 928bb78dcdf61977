"""The files that a student's configuration names, read and checked."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ngd_fast.artifacts.files import sha256
from ngd_fast.console import say
from ngd_fast.errors import UserError
from ngd_fast.faces.dataset import Faces
from ngd_fast.faces.label_noise import with_label_noise
from ngd_fast.prototypes.bank import PrototypeBank
from ngd_fast.student.config import StudentConfig
from ngd_fast.student.kd_teacher import teacher_file


@dataclass(frozen=True)
class Inputs:
    """The files that a configuration names, read and checked."""

    train: Faces
    valid: Faces
    bank: PrototypeBank | None
    checksums: Mapping[str, str]
    """Of the content: what a checkpoint must have been trained with."""
    files: Mapping[str, str]
    """Single files, for the fingerprint."""


def load_inputs(config: StudentConfig, faces: tuple[Faces, Faces] | None = None) -> Inputs:
    """Read what ``config`` names; ``faces`` are its (train, valid) where another has read them.

    Raises UserError for anything missing or unfit.
    """
    data = config.data
    for name, flag in (("train", "--train"), ("valid", "--valid")):
        if getattr(data, name) is None:
            raise UserError(f"no {name} faces: give {flag} (an NPZ, a CSV list or a folder) or data.{name}")
    bank, checksums, files = load_bank_and_weights(config)
    train, valid = faces or _load_faces(config)
    checksums = {"train data": train.checksum, "valid data": valid.checksum, **checksums}
    files = {"data_train": data.train, "data_valid": data.valid, **files}
    return Inputs(train, valid, bank, checksums, {k: v for k, v in files.items() if Path(v).is_file()})


def load_bank_and_weights(config: StudentConfig) -> tuple[PrototypeBank | None, dict[str, str], dict[str, str]]:
    """What ``config`` names beside faces: the bank; checksums and paths of bank, teachers and first weights.

    Raises UserError for anything missing or unfit.
    """
    kd, weights = config.objective.kd, config.model.weights
    bank, files = None, {}
    if config.objective.proto.weight > 0:
        bank = _load_bank(config)
        files["bank"] = config.objective.proto.bank
    if kd.weight > 0:
        files |= {name: str(teacher_file(*teacher)) for name, teacher in kd.teachers().items()}
    if weights is not None:
        if not Path(weights).is_file():
            raise UserError(f"model.weights {weights}: no such file")
        files["initial_weights"] = weights
    return bank, {name.replace("_", " "): sha256(path) for name, path in files.items()}, files


def _load_faces(config: StudentConfig) -> tuple[Faces, Faces]:
    data = config.data
    load = lambda path: Faces.load(path, class_map=data.class_map, image_root=data.image_root)  # noqa: E731
    train, valid = load(data.train), load(data.valid)
    for path, faces in ((data.train, train), (data.valid, valid)):
        if (faces.labels < 0).all():
            raise UserError(f"{path}: none of its {len(faces)} faces has a label")
    train = with_label_noise(train, data.label_noise, config.seed)
    unlabelled = int((train.labels < 0).sum())
    if unlabelled:
        say(f"{data.train}: left out {unlabelled} faces without a label")
        train = train.subset(train.labels >= 0)
    return train, valid


def _load_bank(config: StudentConfig) -> PrototypeBank:
    path = config.objective.proto.bank
    if path is None:
        raise UserError("objective.proto.weight is above 0 but there are no prototypes: give --bank prototypes_5x5.npz")
    bank = PrototypeBank.load(path)
    if bank.embedding_dim != config.model.embedding_dim:
        raise UserError(
            f"{path}: its prototypes are {bank.embedding_dim}-D, the student's features "
            f"{config.model.embedding_dim}-D; set model.embedding_dim={bank.embedding_dim} or build another bank"
        )
    if config.objective.proto.prior == "class" and bank.class_prior is None:
        raise UserError(f"{path}: has no prior for each class; use objective.proto.prior=global")
    return bank
