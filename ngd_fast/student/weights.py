"""Weights on disk: a student with its metadata as safetensors, and backbone weights from elsewhere."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from ngd_fast.artifacts.files import atomic_path
from ngd_fast.errors import UserError, first_line
from ngd_fast.student.networks import Student, build_student

BEST_NAME = "student_best.safetensors"
_METADATA_KEY = "ngd_fast"
_REQUIRED = ("arch", "class_names", "image_size", "mean", "std", "embedding_dim")


def save_student(path: str | Path, state: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> None:
    """Write ``state`` (a Student's state_dict) and ``meta`` as one safetensors file; equal input gives equal bytes."""
    tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in state.items()}
    with atomic_path(path) as temporary:
        # not save_file, whose error for a full disk is no OSError
        temporary.write_bytes(save(tensors, metadata={_METADATA_KEY: json.dumps(dict(meta), sort_keys=True)}))


def student_file(path: str | Path) -> Path:
    """``path`` itself, or the best student in the run folder ``path``. Raises UserError where there is none."""
    path = Path(path)
    file = path / BEST_NAME if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{file}: no such student; give a run's folder or its {BEST_NAME}")
    return file


def load_student(path: str | Path) -> tuple[Student, dict[str, Any]]:
    """Read a student (file or run folder): (network in eval mode on the CPU, its metadata).

    meta: arch, class_names, image_size, mean, std, embedding_dim, logit_scale, epoch, config_name, seed.
    Raises UserError for a missing, truncated or foreign file.
    """
    path = student_file(path)
    state, metadata = _read_safetensors(path)
    try:
        meta = json.loads(metadata[_METADATA_KEY])
    except (KeyError, json.JSONDecodeError):
        raise UserError(f"{path}: is no student of ngd_fast (it lacks the metadata)") from None
    missing = [key for key in _REQUIRED if key not in meta]
    if missing:
        raise UserError(f"{path}: its metadata lacks {', '.join(missing)}")
    student = build_student(
        meta["arch"],
        num_classes=len(meta["class_names"]),
        embedding_dim=meta["embedding_dim"],
        logit_scale=meta.get("logit_scale", 1.0),
        image_size=meta["image_size"],
    )
    try:
        student.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise UserError(f"{path}: does not hold the weights of {meta['arch']}: {reason}") from None
    return student.eval(), meta


def _read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error}); is it truncated?") from None


@dataclass(frozen=True)
class LoadReport:
    """What became of a file of weights."""

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    """In the backbone, but not in the file: left as initialised."""
    unexpected: tuple[str, ...]
    """In the file, but not in the backbone, such as torchvision's ``fc``."""

    def __str__(self) -> str:
        text = f"{len(self.loaded)} tensors loaded"
        for name, keys in (("missing", self.missing), ("not used", self.unexpected)):
            text += f", {len(keys)} {name} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})" if keys else ""
        return text


def load_backbone_weights(backbone: nn.Module, path: str | Path) -> LoadReport:
    """Load a state dict with the backbone's names (torchvision's, for our ResNets) into ``backbone``.

    Reads .safetensors, or .pth/.pt/.ckpt with weights_only. Prefixes "module." and "backbone." and the wrappers
    {"state_dict": ...}, {"model": ...} are taken off. Raises UserError where a tensor's shape differs or none fits.
    """
    path = Path(path)
    found = _strip(read_state_dict(path))
    own = backbone.state_dict()
    loaded = [key for key in own if key in found]
    for key in loaded:
        if found[key].shape != own[key].shape:
            raise UserError(f"{path}: {key} is {list(found[key].shape)}, the backbone's is {list(own[key].shape)}")
    if not loaded:
        raise UserError(f"{path}: none of its {len(found)} tensors is one of the backbone's (conv1.weight, ...)")
    backbone.load_state_dict({key: found[key] for key in loaded}, strict=False)
    return LoadReport(
        tuple(loaded), tuple(key for key in own if key not in found), tuple(key for key in found if key not in own)
    )


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors or torch file, without unpickling. Raises UserError for anything else."""
    if not path.is_file():
        raise UserError(f"{path}: no such file of weights")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)[0]
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises half a dozen kinds for files it cannot or must not read
        reason = first_line(error)
        raise UserError(f"{path}: cannot be read as weights without unpickling ({reason})") from None
    for wrapper in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise UserError(f"{path}: holds no state dict (names and tensors)")
    return content


def _strip(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    for prefix in ("module.", "backbone."):
        if any(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return dict(state)
