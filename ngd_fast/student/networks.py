"""The students: a backbone, a 256-D projection, the L2-norm, and a linear head of eight (paper, section 4.1).

The head is a plain linear layer on unit features, as the paper writes it: its logits grow only with its weights. A
fixed factor ``logit_scale`` (1 = the paper) lets short trainings reach confident logits sooner.
"""

from collections.abc import Collection, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ngd_fast.devices import torch_compile
from ngd_fast.errors import UserError
from ngd_fast.student.resnet import ResNet, parse_arch
from ngd_fast.student.strided import protect


class Student(nn.Module):
    """images [B, 3, S, S] -> (features [B, embedding_dim] of norm 1, logits [B, num_classes]), both float32."""

    def __init__(self, backbone: nn.Module, in_features: int, embedding_dim: int, num_classes: int, logit_scale: float):
        super().__init__()
        self.backbone = backbone
        self.projection = nn.Linear(in_features, embedding_dim)
        self.head = nn.Linear(embedding_dim, num_classes)
        self.logit_scale = logit_scale

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.classify(self.projection(self.backbone(images)))

    def classify(self, projected: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Projected features [B, embedding_dim] -> (unit features, logits), in float32 also under autocast."""
        with torch.autocast(projected.device.type, enabled=False):
            features = F.normalize(projected.float(), dim=1)
            logits = self.head(features)
            return features, logits * self.logit_scale if self.logit_scale != 1.0 else logits


def build_student(
    arch: str,
    *,
    num_classes: int = 8,
    embedding_dim: int = 256,
    logit_scale: float = 1.0,
    pretrained: bool = False,
    image_size: int | None = None,
) -> Student:
    """A freshly initialised student (from torch's global random numbers: seed them first).

    arch         "resnet18", "resnet34", "resnet50", "resnet18-w16" (16 channels wide); "torchvision:NAME" or
                 "timm:NAME" for any classifier of those packages, where installed
    pretrained   fetch the package's ImageNet weights (torchvision and timm names only)
    image_size   side in pixels, for those transformers whose position embeddings depend on it
    Raises UserError for an unknown name or a missing package, ValueError for sizes below 1.
    """
    for name, value in (("num_classes", num_classes), ("embedding_dim", embedding_dim)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, is {value}")
    if not logit_scale > 0:
        raise ValueError(f"logit_scale must be above 0, is {logit_scale}")
    backbone, in_features = _build_backbone(arch, pretrained, image_size)
    return Student(protect(backbone), in_features, embedding_dim, num_classes, logit_scale)


def _build_backbone(arch: str, pretrained: bool, image_size: int | None) -> tuple[nn.Module, int]:
    package, separator, name = arch.partition(":")
    if separator and package == "torchvision":
        return _torchvision_backbone(name, pretrained, image_size)
    if separator and package == "timm":
        return _timm_backbone(name, pretrained, image_size)
    shape = None if separator else parse_arch(arch)
    if shape is None:
        raise UserError(f"arch {arch}: unknown; use resnet18, resnet50, resnet18-w16, torchvision:NAME or timm:NAME")
    if pretrained:
        raise UserError(
            f"arch {arch}: pretrained weights are fetched for torchvision:NAME and timm:NAME only; "
            "give a file of weights by model.weights"
        )
    backbone = ResNet(*shape)
    return backbone, backbone.out_features


def _torchvision_backbone(name: str, pretrained: bool, image_size: int | None) -> tuple[nn.Module, int]:
    try:
        from torchvision import models
    except ImportError:
        raise UserError(f"arch torchvision:{name}: needs torchvision: pip install torchvision") from None
    options = {"image_size": image_size} if image_size and name.startswith("vit_") else {}
    try:
        backbone = models.get_model(name, weights="DEFAULT" if pretrained else None, **options)
    except ValueError as error:
        raise UserError(f"arch torchvision:{name}: {error}") from None
    # Every classifier of torchvision ends in one linear layer, whatever its name.
    linears = [key for key, module in backbone.named_modules() if isinstance(module, nn.Linear)]
    if not linears:
        raise UserError(f"arch torchvision:{name}: has no linear classifier to take the features from")
    in_features = backbone.get_submodule(linears[-1]).in_features
    backbone.set_submodule(linears[-1], nn.Identity())
    return backbone, in_features


def _timm_backbone(name: str, pretrained: bool, image_size: int | None) -> tuple[nn.Module, int]:
    try:
        import timm
    except ImportError:
        raise UserError(f"arch timm:{name}: needs timm: pip install timm") from None
    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('_')[0]}*")[:3]
        raise UserError(f"arch timm:{name}: unknown to timm {timm.__version__}; it has {', '.join(near) or 'others'}")
    try:
        backbone = timm.create_model(name, pretrained=pretrained, num_classes=0, img_size=image_size or 224)
    except TypeError:  # a network that takes any size has no such argument
        backbone = timm.create_model(name, pretrained=pretrained, num_classes=0)
    return backbone, getattr(backbone, "head_hidden_size", None) or backbone.num_features


def compile_network(network: nn.Module, *, deterministic: bool) -> nn.Module:
    """torch.compile of a student or a teacher, with code of its own for each size of images.

    ``deterministic``: no kernel is chosen by timing it where the choice decides over bits, as that of a reduction does.
    """
    options = None
    if deterministic:
        from torch._inductor import config

        # Older ones (2.8) know only a switch for all kernels.
        known = hasattr(config, "deterministic")
        options = {"deterministic": True} if known else {"triton.autotune_pointwise": False}
    # Sizes beyond this limit (8 at first) would run uncompiled, with no more than a warning of PyTorch's.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    return torch_compile(network, dynamic=False, options=options)


def weight_decay_groups(
    module: nn.Module, weight_decay: float, *, everything: bool, but_for: Collection[nn.Parameter] = ()
) -> list[dict]:
    """Parameter groups for AdamW: ``everything`` decays all (the paper's plain AdamW), else vectors are spared.

    Vectors are biases and the scales and shifts of normalisation layers. Those in ``but_for`` are left out.
    """
    others = set(but_for)
    parameters = [p for p in module.parameters() if p.requires_grad and p not in others]
    if everything:
        return [{"params": parameters, "weight_decay": weight_decay}]
    groups: Sequence[tuple[bool, float]] = ((True, weight_decay), (False, 0.0))
    return [{"params": [p for p in parameters if (p.ndim > 1) is m], "weight_decay": w} for m, w in groups]
