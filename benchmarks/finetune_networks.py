"""Small networks of the fine-tuning jobs, written here so that published weights load without their packages.

Each has a submodule ``head``, a linear layer from features to classes, and ``features``, all that comes before.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Inverted", "MobileLower", "MobileUpper", "Network", "RNet", "SentenceLayers", "SpectralNet"]


class Network(nn.Module, ABC):
    head: nn.Linear

    @abstractmethod
    def features(self, *inputs: Tensor) -> Tensor:
        """What the head is given, (n, width)."""

    def forward(self, *inputs: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(*inputs))
        return logits


class SpectralNet(Network):
    """3-D convolutions over bands and a window of 3 × 3 pixels: ``(n, bands, 3, 3)``."""

    def __init__(self, n_classes: int, width: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(1, width, (7, 3, 3), stride=(3, 1, 1), padding=(0, 1, 1))
        self.conv2 = nn.Conv3d(width, 2 * width, (5, 3, 3), stride=(3, 1, 1), padding=(0, 1, 1))
        self.conv3 = nn.Conv3d(2 * width, 4 * width, 3, stride=(2, 1, 1))
        self.dense = nn.LazyLinear(4 * width)
        self.norm1, self.norm2, self.norm3 = (nn.BatchNorm3d(width * k) for k in (1, 2, 4))
        self.head = nn.Linear(4 * width, n_classes)

    def features(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x[:, None])))
        x = F.relu(self.norm2(self.conv2(x)))
        x = F.relu(self.norm3(self.conv3(x)))
        return F.relu(self.dense(x.flatten(1)))


class RNet(Network):
    """The refining network of MTCNN (Zhang et al., 2016), for grey pictures of 24 × 24 pixels from 0 to 255."""

    def __init__(self, n_classes: int) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = nn.Conv2d(3, 28, 3), nn.Conv2d(28, 48, 3), nn.Conv2d(48, 64, 2)
        self.prelu1, self.prelu2, self.prelu3 = nn.PReLU(28), nn.PReLU(48), nn.PReLU(64)
        self.dense4, self.prelu4 = nn.Linear(576, 128), nn.PReLU(128)
        self.head = nn.Linear(128, n_classes)

    def features(self, x: Tensor) -> Tensor:
        x = ((x - 127.5) / 128).expand(-1, 3, -1, -1)
        x = F.max_pool2d(self.prelu1(self.conv1(x)), 3, 2, ceil_mode=True)
        x = F.max_pool2d(self.prelu2(self.conv2(x)), 3, 2, ceil_mode=True)
        x = self.prelu3(self.conv3(x)).permute(0, 3, 2, 1)
        return self.prelu4(self.dense4(x.flatten(1)))


class Inverted(nn.Module):
    """An inverted residual of MobileNetV2 (Sandler et al., 2018): to more channels, a depthwise kernel, to fewer."""

    def __init__(self, width: int, to: int, stride: int, expansion: int = 6) -> None:
        super().__init__()
        inner = expansion * width
        self.kept = stride == 1 and width == to
        self.expand = nn.Conv2d(width, inner, 1, bias=False) if expansion > 1 else None
        self.norm1 = nn.BatchNorm2d(inner) if expansion > 1 else None
        self.depthwise = nn.Conv2d(inner, inner, 3, stride, 1, groups=inner, bias=False)
        self.project = nn.Conv2d(inner, to, 1, bias=False)
        self.norm2, self.norm3 = nn.BatchNorm2d(inner), nn.BatchNorm2d(to)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        if self.expand is not None and self.norm1 is not None:
            y = F.relu6(self.norm1(self.expand(y)))
        y = self.norm3(self.project(F.relu6(self.norm2(self.depthwise(y)))))
        return x + y if self.kept else y


def inverted_blocks() -> list[Inverted]:
    """The 17 of MobileNetV2, of width 1."""
    blocks, width = [], 32
    for expansion, to, count, stride in (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    ):
        for n in range(count):
            blocks.append(Inverted(width, to, stride if n == 0 else 1, expansion))
            width = to
    return blocks


MOBILE_LOWER = 10  # blocks of MobileNetV2 whose outputs are computed once


class MobileLower(nn.Module):
    """The first layer and the lower blocks of MobileNetV2: from pictures ``(n, 3, height, width)``, normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32)
        self.blocks = nn.Sequential(*inverted_blocks()[:MOBILE_LOWER])

    def forward(self, x: Tensor) -> Tensor:
        states: Tensor = self.blocks(F.relu6(self.norm(self.conv(x))))
        return states


class MobileUpper(Network):
    """The upper blocks and the last convolution of MobileNetV2: from outputs of `MobileLower` to means over places."""

    def __init__(self, n_classes: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*inverted_blocks()[MOBILE_LOWER:])
        self.last, self.norm = nn.Conv2d(320, 1280, 1, bias=False), nn.BatchNorm2d(1280)
        self.head = nn.Linear(1280, n_classes)

    def features(self, x: Tensor) -> Tensor:
        return F.relu6(self.norm(self.last(self.blocks(x)))).mean((2, 3))


class Block(nn.Module):
    """A layer of BERT (Devlin et al., 2019)."""

    def __init__(self, width: int, inner: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-12), nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, mask[:, None, None, :])
        x = self.norm1(x + self.out(mixed.transpose(1, 2).flatten(-2)))
        return self.norm2(x + self.down(F.gelu(self.up(x))))


class SentenceLayers(Network):
    """The upper layers of a sentence encoder: from states ``(n, tokens, width)`` and a mask to the mean over tokens."""

    def __init__(self, n_classes: int, layers: int = 3, width: int = 384, inner: int = 1536, heads: int = 12) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(width, inner, heads) for _ in range(layers))
        self.head = nn.Linear(width, n_classes)

    def features(self, x: Tensor, mask: Tensor) -> Tensor:
        length = int(mask.sum(1).max())
        x, mask = x[:, :length], mask[:, :length]
        for layer in self.layers:
            x = layer(x, mask)
        weights = mask.to(x.dtype)[..., None]
        return (x * weights).sum(1) / weights.sum(1)


def sentence_states(tokens: Tensor, embeddings: dict[str, Tensor], lower: nn.ModuleList) -> tuple[Tensor, Tensor]:
    """States below the upper layers, and the mask, of token numbers ``(n, tokens)`` with -1 for none."""
    mask = tokens >= 0
    x = embeddings["words"][tokens.clamp(min=0)] + embeddings["places"][: tokens.shape[1]] + embeddings["kind"]
    x = F.layer_norm(x, x.shape[-1:], embeddings["norm.weight"], embeddings["norm.bias"], 1e-12)
    with torch.no_grad():
        for layer in lower:
            x = layer(x, mask)
    return x, mask
