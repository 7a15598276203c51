"""EfficientNet-Lite0: inverted residuals without squeeze-and-excitation, ReLU6, padding as TensorFlow's "same"."""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from temper.systems.network_names import MODEL_TYPE

__all__ = ["NAME", "Block", "EfficientNetLite0", "SameConv"]

NAME = "efficientnet-lite0"
"""Its `network` in config.json."""
STAGES = (
    # blocks, kernel, stride of the first, expansion, channels
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
STEM, HEAD = 32, 1280
DROPOUT = 0.2


class SameConv(nn.Conv2d):
    """A convolution whose output is the input's size over the stride, rounded up; odd padding goes right and below."""

    def forward(self, hidden_BCHW: Tensor) -> Tensor:
        """Pads with zeros, then convolves."""
        sides: list[int] = []
        for size, kernel, stride in zip(hidden_BCHW.shape[:1:-1], self.kernel_size, self.stride, strict=True):
            total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
            sides += [total // 2, total - total // 2]
        return super().forward(F.pad(hidden_BCHW, sides))


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


class Block(nn.Module):
    """Widen, convolve each channel, project; added to its input where the shape stays."""

    def __init__(self, num_in: int, num_out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = num_in * expansion
        self.expand = expansion > 1
        self.keeps_shape = stride == 1 and num_in == num_out
        if self.expand:
            self.expand_conv, self.bn0 = SameConv(num_in, inner, 1, bias=False), _norm(inner)
        self.depthwise_conv = SameConv(inner, inner, kernel, stride, groups=inner, bias=False)
        self.bn1 = _norm(inner)
        self.project_conv, self.bn2 = SameConv(inner, num_out, 1, bias=False), _norm(num_out)

    def forward(self, hidden_BCHW: Tensor) -> Tensor:
        """The projection is linear: no ReLU after it."""
        inner = F.relu6(self.bn0(self.expand_conv(hidden_BCHW))) if self.expand else hidden_BCHW
        inner = F.relu6(self.bn1(self.depthwise_conv(inner)))
        out: Tensor = self.bn2(self.project_conv(inner))
        return out + hidden_BCHW if self.keeps_shape else out


class EfficientNetLite0(nn.Module):
    """1000 class scores by default, from normalised pixels of any size from 32 up (trained at 224)."""

    def __init__(self, num_classes: int = 1000, shape: tuple[int, ...] = (3, 224, 224)) -> None:
        super().__init__()
        self.settings: dict[str, Any] = {
            "model_type": MODEL_TYPE, "network": NAME, "shape": list(shape), "num_classes": num_classes,
        }  # fmt: skip
        self.conv_stem, self.bn0 = SameConv(shape[0], STEM, 3, 2, bias=False), _norm(STEM)
        blocks, width = [], STEM
        for num, kernel, stride, expansion, channels in STAGES:
            for place in range(num):
                blocks.append(Block(width, channels, kernel, stride if place == 0 else 1, expansion))
                width = channels
        self.blocks = nn.ModuleList(blocks)
        self.conv_head, self.bn1 = SameConv(width, HEAD, 1, bias=False), _norm(HEAD)
        self.dropout, self.fc = nn.Dropout(DROPOUT), nn.Linear(HEAD, num_classes)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Logits, (B, C)."""
        hidden = F.relu6(self.bn0(self.conv_stem(pixels_BCHW)))
        for block in self.blocks:
            hidden = block(hidden)
        pooled_BD = F.relu6(self.bn1(self.conv_head(hidden))).mean((2, 3))
        logits_BC: Tensor = self.fc(self.dropout(pooled_BD))
        return logits_BC
