"""Discriminators: networks that tell images from reconstructions."""

import torch
from torch import nn

from dae_diffusers.vision import FrozenBackbone


class PatchDiscriminator(nn.Module):
    r"""
    A convolutional discriminator that judges overlapping patches: 70x70 pixels with three strided layers.

    It uses group normalisation instead of the original's batch normalisation. Group normalisation has no state, so gradient
    accumulation, several processes and several passes in a step do not change the result.

    Args:
        in_channels (`int`, *optional*, defaults to 3): Channels of the images.
        num_channels (`int`, *optional*, defaults to 64): Channels after the first layer, a multiple of 8; doubled by
            each strided layer up to eight times that.
        num_layers (`int`, *optional*, defaults to 3): Strided layers. Images must have at least `3 * 2**num_layers`
            pixels a side.

    Source: Isola et al., 2017, https://huggingface.co/papers/1611.07004.
    """

    def __init__(self, in_channels: int = 3, num_channels: int = 64, num_layers: int = 3):
        super().__init__()
        layers = [nn.Conv2d(in_channels, num_channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = num_channels
        for number in range(1, num_layers + 1):
            next_width = num_channels * min(2**number, 8)
            layers += [
                nn.Conv2d(width, next_width, 4, stride=2 if number < num_layers else 1, padding=1),
                nn.GroupNorm(8, next_width),
                nn.LeakyReLU(0.2),
            ]
            width = next_width
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, 1, 4, padding=1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        r"""Maps images `(B, in_channels, H, W)` to logits `(B, 1, h, w)`, which are high for real images."""
        return self.layers(images)


class BackboneDiscriminator(nn.Module):
    r"""
    Small heads on the hidden states of a frozen vision model; only the heads train.

    Args:
        backbone ([`~dae_diffusers.vision.FrozenBackbone`]): The frozen vision model.
        num_channels (`int`, *optional*, defaults to 64): Width of the heads, a multiple of 8.

    Source: Sauer et al., 2021, https://huggingface.co/papers/2111.01007.
    """

    def __init__(self, backbone: FrozenBackbone, num_channels: int = 64):
        super().__init__()
        self.backbone = backbone
        with torch.no_grad():
            widths = [hidden.shape[1] for hidden in backbone(torch.zeros(1, 3, *backbone.size))]
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.Conv1d(width, num_channels, 1),
                nn.GroupNorm(8, num_channels),
                nn.LeakyReLU(0.2),
                nn.Conv1d(num_channels, 1, 1),
            )
            for width in widths
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        r"""Maps images `(B, C, H, W)` to logits `(B, 1, N)` of all layers and positions, which are high for real images."""
        layers = self.backbone(images)
        return torch.cat([head(hidden.flatten(2)) for head, hidden in zip(self.heads, layers, strict=True)], dim=2)
