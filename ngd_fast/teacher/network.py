"""The teacher: topomaps in, valence/arousal and a 256-D penultimate layer out (the paper's section 4.2)."""

import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import ConfigDict, Field
from safetensors.torch import save
from torch import nn

from ngd_fast.artifacts.files import atomic_path, load_safetensors, parse_json, sha256
from ngd_fast.config import Config, build_config
from ngd_fast.errors import UserError, first_line
from ngd_fast.teacher.config import InputConfig, NetworkConfig

EMBEDDING_DIM = 256
_METADATA_KEY = "ngd_fast"
# What a file must say beside the network: how its input is prepared, and what it was trained on.
_REQUIRED = ("band_names", "input", "maps_sha256", "train_subjects", "validation_subjects")
WEIGHTS_NAME = "teacher_best.safetensors"


class _CNN(nn.Module):
    """Patches on an 8x8 grid, ``depth`` residual blocks there, one step down to 4x4, where position is kept."""

    def __init__(self, bands: int, resolution: int, width: int, depth: int, dropout: float):
        super().__init__()
        patch = resolution // 8
        self.stem = nn.Sequential(
            nn.Conv2d(bands, width, patch, stride=patch, bias=False), nn.BatchNorm2d(width), nn.GELU()
        )
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.GELU())
            for _ in range(depth)
        )
        self.down = nn.Sequential(
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(2 * width), nn.GELU()
        )
        self.dropout = nn.Dropout(dropout)
        self.out_features = 2 * width * 16

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.dropout(self.down(x).flatten(1))


class _ViT(nn.Module):
    """Sixteen patches (4x4) as tokens, ``depth`` pre-norm encoder layers, mean over tokens."""

    def __init__(self, bands: int, resolution: int, width: int, depth: int, dropout: float):
        super().__init__()
        patch = resolution // 4
        self.embed = nn.Conv2d(bands, width, patch, stride=patch)
        self.position = nn.Parameter(torch.randn(1, 16, width) * 0.02)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, nhead=4, dim_feedforward=4 * width, dropout=dropout, activation="gelu", batch_first=True,
                norm_first=True,
            )
            for _ in range(depth)
        )  # fmt: skip
        self.norm = nn.LayerNorm(width)
        self.out_features = width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2) + self.position
        for layer in self.layers:
            x = layer(x)
        return self.norm(x).mean(dim=1)


class Teacher(nn.Module):
    """maps float [N, bands, R, R] -> (va [N, 2] valence and arousal, features [N, 256]).

    Inputs are standardised by the training rows' mean and deviation at each pixel (:meth:`set_input_statistics`).
    The features are centred by a batch norm without affine part and feed the linear head directly: features that all
    share one large mean would make every pair of prototypes look alike to a cosine.
    """

    def __init__(self, bands: int, resolution: int, config: NetworkConfig):
        super().__init__()
        if bands < 1:
            raise ValueError(f"bands: must be at least 1, got {bands}")
        if resolution < 8 or resolution % 8:
            raise ValueError(f"resolution: must be a multiple of 8, got {resolution}")
        body = {"cnn": _CNN, "vit": _ViT}[config.arch]
        self.bands, self.resolution, self.config = bands, resolution, config
        self.register_buffer("input_mean", torch.zeros(bands, resolution, resolution))
        self.register_buffer("input_scale", torch.ones(bands, resolution, resolution))
        self.body = body(bands, resolution, config.width, config.depth, config.dropout)
        self.project = nn.Linear(self.body.out_features, EMBEDDING_DIM)
        self.center = nn.BatchNorm1d(EMBEDDING_DIM, affine=False)
        self.head = nn.Linear(EMBEDDING_DIM, 2)
        # Predictions start at the mean of the plane, not at a random spread over it.
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    @torch.no_grad()
    def set_input_statistics(self, maps: torch.Tensor) -> None:
        """Mean and 1/deviation of each pixel over ``maps`` [N, bands, R, R]; pixels that never vary count as 0."""
        deviation, mean = torch.std_mean(maps, dim=0, correction=0)
        self.input_mean.copy_(mean)
        self.input_scale.copy_(torch.where(deviation > 1e-6, 1 / deviation.clamp_min(1e-6), 0))

    def standardize(self, maps: torch.Tensor) -> torch.Tensor:
        return (maps - self.input_mean) * self.input_scale

    def forward_standardized(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As :meth:`forward`, for inputs from :meth:`standardize` (augmentation works on those)."""
        features = self.center(self.project(self.body(x)))
        va = self.head(features)
        return (torch.tanh(va) if self.config.head == "tanh" else va), features

    def forward(self, maps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        expected = (self.bands, self.resolution, self.resolution)
        if maps.ndim != 4 or tuple(maps.shape[1:]) != expected:
            raise ValueError(f"maps: must be [N, {', '.join(map(str, expected))}], has shape {list(maps.shape)}")
        return self.forward_standardized(self.standardize(maps))


def save_teacher(path: str | Path, teacher: Teacher, meta: dict[str, Any]) -> None:
    """Write weights and metadata as safetensors; equal content gives equal bytes.

    ``meta`` must hold band_names, input (an InputConfig as a dict), maps_sha256, train_subjects, validation_subjects.
    """
    missing = [key for key in _REQUIRED if key not in meta]
    if missing:
        raise ValueError(f"meta: lacks {', '.join(missing)}")
    full = {
        **meta,
        "arch": teacher.config.arch,
        "network": teacher.config.model_dump(mode="json"),
        "bands": teacher.bands,
        "resolution": teacher.resolution,
        "embedding_dim": EMBEDDING_DIM,
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in teacher.state_dict().items()}
    with atomic_path(path) as temporary:
        # not save_file, whose error for a full disk is no OSError
        metadata = {_METADATA_KEY: json.dumps(full, sort_keys=True, allow_nan=False)}
        temporary.write_bytes(save(tensors, metadata=metadata))


class _Meta(Config):
    """What must be right before a network is built from a file's metadata, and its input made."""

    model_config = ConfigDict(extra="allow")

    network: NetworkConfig
    bands: Annotated[int, Field(ge=1, le=1000)]
    resolution: Annotated[int, Field(ge=8, le=512)]
    band_names: list[str]
    input: InputConfig
    maps_sha256: str
    train_subjects: list[int]
    validation_subjects: list[int]


def load_teacher(path: str | Path, *, device: str | torch.device = "cpu") -> tuple[Teacher, dict[str, Any]]:
    """Read a run's folder or its safetensors file; returns the module in eval mode and its metadata.

    ``meta["sha256"]`` is the checksum of the weights' file as read. Raises UserError for a file that is missing,
    damaged, or no teacher's.
    """
    path = Path(path)
    path = path / WEIGHTS_NAME if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"{path}: no such file; a teacher is made by 'ngd-fast teacher train'")
    digest = sha256(path)
    tensors, metadata = load_safetensors(path)
    meta = parse_json(metadata.get(_METADATA_KEY, "null"), f"{path}: metadata")
    if not isinstance(meta, dict) or not {"network", "bands", "resolution", *_REQUIRED} <= meta.keys():
        raise UserError(f"{path}: not a teacher of ngd-fast (no such metadata)")
    checked = build_config(_Meta, meta, source=f"{path}: metadata")
    build = partial(Teacher, checked.bands, checked.resolution, checked.network)
    try:
        with torch.device("meta"):  # without memory, which a small file must not ask for
            sketch = build()
        sketch.load_state_dict(tensors, assign=True)
        teacher = build()
        teacher.load_state_dict(tensors)
    except (RuntimeError, ValueError, TypeError) as error:
        raise UserError(f"{path}: weights do not fit the network they name ({first_line(error)})") from None
    if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
        raise UserError(f"{path}: weights hold NaN or infinite values")
    return teacher.to(device).eval().requires_grad_(False), {**meta, "sha256": digest}
