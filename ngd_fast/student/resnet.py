"""ResNet-18/34/50, written once, with torchvision's parameter names, so that its weights load."""

import re

import torch
from torch import nn

from ngd_fast.errors import UserError
from ngd_fast.student import stem


def _conv(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut (He et al., 2016)."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.conv1 = _conv(inputs, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = _conv(width, width, 3)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(inputs, width, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(x)) + shortcut)


class Bottleneck(nn.Module):
    """1x1, 3x3 (which carries the stride, as in torchvision) and 1x1 convolutions beside a shortcut."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.conv1 = _conv(inputs, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv(width, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = _conv(width, width * self.expansion, 1)
        self.bn3 = nn.BatchNorm2d(width * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(inputs, width * self.expansion, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return self.relu(self.bn3(self.conv3(x)) + shortcut)


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(_conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))


_DEPTHS: dict[int, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
}


class ResNet(nn.Module):
    """images [B, 3, H, W] -> pooled features [B, out_features]; torchvision's network without its ``fc``.

    Images [B, 1, H, W] stand for three equal channels, and take the fused stem where that runs.

    ``width`` is the number of channels of the first stage: 64 as published, fewer for small machines.
    """

    def __init__(self, depth: int = 18, width: int = 64):
        super().__init__()
        block, layers = _DEPTHS[depth]
        self.conv1 = _conv(3, width, 7, stride=2)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        inputs = width
        for stage, count in enumerate(layers):
            planes = width << stage
            blocks = []
            for i in range(count):
                blocks.append(block(inputs, planes, stride=2 if stage > 0 and i == 0 else 1))
                inputs = planes * block.expansion
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.out_features = inputs
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def stem(self, images: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] -> [B, width, H/4, W/4]. A method of its own: the most memory traffic of a step lies here."""
        if images.shape[1] == 1:
            if not stem.why_not(images, self.conv1, self.bn1):
                return stem.grey_stem(images, self.conv1, self.bn1)
            images = images.expand(-1, 3, -1, -1)
        return self.maxpool(self.relu(self.bn1(self.conv1(images))))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.stem(images)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return x.mean(dim=(2, 3))


def parse_arch(arch: str) -> tuple[int, int] | None:
    """(depth, width) of "resnet18", "resnet50", "resnet18-w16" (first stage of 16 channels); None for other names."""
    match = re.fullmatch(r"resnet([0-9]{1,4})(?:-w([0-9]{1,4}))?", arch)
    if match is None:
        return None
    depth, width = int(match[1]), int(match[2] or 64)
    if depth not in _DEPTHS or not 1 <= width <= 1024:
        raise UserError(f"arch {arch}: ResNets here have depth {', '.join(map(str, _DEPTHS))} and width 1 to 1024")
    return depth, width
