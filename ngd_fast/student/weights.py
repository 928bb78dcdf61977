"""Weights on disk: a student with its metadata as safetensors, and backbone weights from elsewhere."""

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import ConfigDict, Field
from safetensors.torch import save
from torch import nn

from ngd_fast.artifacts.files import atomic_path, is_plain, load_safetensors, parse_json
from ngd_fast.artifacts.headers import require_zip_proportion
from ngd_fast.config import Config, build_config
from ngd_fast.errors import UserError, first_line
from ngd_fast.evaluation.predictions import MAX_CLASSES
from ngd_fast.evaluation.schema import Name
from ngd_fast.student.config import MAX_EMBEDDING
from ngd_fast.student.networks import Student, build_student

BEST_NAME = "student_best.safetensors"
_METADATA_KEY = "ngd_fast"


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
    state, metadata = load_safetensors(path)
    if _METADATA_KEY not in metadata:
        raise UserError(f"{path}: is no student of ngd_fast (it lacks the metadata)")
    meta = parse_json(metadata[_METADATA_KEY], f"{path}: metadata")
    if not isinstance(meta, dict):
        raise UserError(f"{path}: is no student of ngd_fast (its metadata is a {type(meta).__name__})")
    checked = build_config(_Meta, meta, source=f"{path}: metadata")
    build = partial(
        build_student,
        checked.arch,
        num_classes=len(checked.class_names),
        embedding_dim=checked.embedding_dim,
        logit_scale=checked.logit_scale,
        image_size=checked.image_size,
    )
    try:
        with torch.device("meta"):  # without memory, which a small file must not ask for
            sketch = build()
        sketch.load_state_dict(state, assign=True)
        student = build()
        student.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise UserError(f"{path}: does not hold the weights of {checked.arch}: {reason}") from None
    require_finite(student.state_dict(), path)
    return student.eval(), meta


_Positive = Annotated[float, Field(gt=0)]


class _Meta(Config):
    """What must be right before a network is built from a file's metadata."""

    model_config = ConfigDict(extra="allow")

    arch: Annotated[str, Field(max_length=200)]
    class_names: Annotated[tuple[Name, ...], Field(min_length=1, max_length=MAX_CLASSES)]
    image_size: Annotated[int, Field(ge=8, le=2048)]
    mean: float | tuple[float, float, float]
    std: _Positive | tuple[_Positive, _Positive, _Positive]
    embedding_dim: Annotated[int, Field(ge=1, le=MAX_EMBEDDING)]
    logit_scale: _Positive = 1.0
    grey: bool = False
    seed: Annotated[int, Field(ge=0, lt=2**64)] | None = None
    config_name: Name | None = None


def require_finite(state: Mapping[str, torch.Tensor], path: Path) -> None:
    """Raise UserError naming ``path`` where a tensor holds NaN or infinity."""
    for name, tensor in state.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(f"{path}: {name} holds NaN or infinite values")


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
    try:
        backbone.load_state_dict({key: found[key] for key in loaded}, strict=False)
    except (RuntimeError, NotImplementedError) as error:
        raise UserError(f"{path}: cannot be taken as the backbone's weights ({first_line(error)})") from None
    require_finite({key: own[key] for key in loaded}, path)
    return LoadReport(
        tuple(loaded), tuple(key for key in own if key not in found), tuple(key for key in found if key not in own)
    )


def load_torch(path: Path, fault: str) -> Any:
    """What torch.save wrote, on the CPU, without unpickling; UserError with ``fault`` for anything else."""
    if not is_plain(path):
        raise UserError(f"{path}: {fault} (it is no file)")
    require_zip_proportion(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about storages of older releases, which nobody here can change
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises half a dozen kinds for files it cannot or must not read
        raise UserError(f"{path}: {fault} ({first_line(error)})") from None


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors or torch file, without unpickling. Raises UserError for anything else."""
    if not path.is_file():
        raise UserError(f"{path}: no such file of weights")
    if path.suffix == ".safetensors":
        return load_safetensors(path)[0]
    content = load_torch(path, "cannot be read as weights without unpickling")
    for wrapper in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    pairs = content.items() if isinstance(content, dict) else [(None, None)]
    if not all(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in pairs):
        raise UserError(f"{path}: holds no state dict (names and tensors)")
    return content


def _strip(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    for prefix in ("module.", "backbone."):
        if any(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return dict(state)
