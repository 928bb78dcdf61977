"""The files that a student's configuration names, read and checked."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ngd_fast.artifacts.files import sha256
from ngd_fast.console import say
from ngd_fast.errors import UserError
from ngd_fast.faces.dataset import Faces
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
    data, objective = config.data, config.objective
    for name, flag in (("train", "--train"), ("valid", "--valid")):
        if getattr(data, name) is None:
            raise UserError(f"no {name} faces: give {flag} (an NPZ, a CSV list or a folder) or data.{name}")
    train, valid = faces or _load_faces(config)
    checksums = {"train data": train.checksum, "valid data": valid.checksum}
    files = {"data_train": data.train, "data_valid": data.valid}
    bank = None
    if objective.proto.weight > 0:
        bank = _load_bank(config)
        files["bank"] = objective.proto.bank
        checksums["bank"] = sha256(objective.proto.bank)
    if objective.kd.weight > 0:
        files["teacher"] = str(teacher_file(objective.kd.teacher, objective.kd.teacher_weights))
        checksums["teacher"] = sha256(files["teacher"])
    if config.model.weights is not None:
        files["initial_weights"] = config.model.weights
    return Inputs(train, valid, bank, checksums, {k: v for k, v in files.items() if Path(v).is_file()})


def _load_faces(config: StudentConfig) -> tuple[Faces, Faces]:
    data = config.data
    load = lambda path: Faces.load(path, class_map=data.class_map, image_root=data.image_root)  # noqa: E731
    train, valid = load(data.train), load(data.valid)
    unlabelled = int((train.labels < 0).sum())
    if unlabelled == len(train):
        raise UserError(f"{data.train}: none of its {len(train)} faces has a label")
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
