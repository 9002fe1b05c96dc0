"""The small generators of the complexity distance, and the critic that judges them."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

# Above this width, hidden layers of generators have a learning rate inversely proportional to the width: Adam moves every
# weight equally far, so the output would move in proportion to the width.
_BASE_WIDTH = 16


class Generator(nn.Module):
    """Maps whitened latents `(B, k, h, w)` to standardised images `(B, channels, factor * h, factor * w)`."""

    def __init__(self, latent_channels: int, channels: int, factor: int, width: int):
        super().__init__()
        self.factor = factor
        self.linear = nn.Conv2d(latent_channels, channels * factor**2, 3, padding=1)
        self.hidden = nn.ModuleList()
        self.last = None
        if width > 0:
            self.hidden.append(nn.Conv2d(latent_channels, width, 3, padding=1))
            self.hidden.append(nn.Conv2d(width, width, 3, padding=1))
            self.last = nn.Conv2d(width, channels * factor**2, 1)
            nn.init.zeros_(self.last.weight)
            nn.init.zeros_(self.last.bias)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        image = self.linear(latents)
        if self.last is not None:
            hidden = F.silu(self.hidden[0](latents))
            hidden = hidden + F.silu(self.hidden[1](hidden))
            image = image + self.last(hidden)
        return F.pixel_shuffle(image, self.factor)

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        groups = [{"params": self.linear.parameters(), "lr": learning_rate}]
        if self.last is not None:
            groups.append({"params": self.hidden[0].parameters(), "lr": learning_rate})
            wide = [*self.hidden[1].parameters(), *self.last.parameters()]
            groups.append({"params": wide, "lr": learning_rate * min(1.0, _BASE_WIDTH / self.last.in_channels)})
        return groups

    @torch.no_grad()
    def mix_channels_(self, draws: torch.Generator) -> None:
        """Sets weights so that every pixel of a latent's patch is the same random mixture of that latent's channels."""
        weight = self.linear.weight  # (channels * factor^2, k, 3, 3)
        patch = self.factor**2
        mixture = torch.randn(len(weight) // patch, weight.shape[1], generator=draws)
        nn.init.zeros_(weight)
        nn.init.zeros_(self.linear.bias)
        weight[:, :, 1, 1] = (0.3 / math.sqrt(weight.shape[1]) * mixture).repeat_interleave(patch, dim=0)


class Critic(nn.Module):
    """Maps each image `(B, channels, H, W)` to one number: strided convolutions down to 4x4, then two layers."""

    def __init__(self, channels: int, height: int, width: int, num_channels: int):
        super().__init__()
        layers, in_channels, out_channels = [], channels, num_channels
        while min(height, width) > 4:
            layers += [nn.Conv2d(in_channels, out_channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
            in_channels, out_channels = out_channels, min(2 * out_channels, 4 * num_channels)
            height, width = height // 2, width // 2
        layers += [nn.Flatten(), nn.Linear(in_channels * height * width, 4 * num_channels), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Linear(4 * num_channels, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images).flatten()

    def slope(self, images: torch.Tensor, *, create_graph: bool) -> torch.Tensor:
        """Length of the gradient, `(B,)`, for distances that are root mean squares over an image's values."""
        images = images.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(self(images).sum(), images, create_graph=create_graph)
        # The small constant: the root has no finite derivative at a critic that is constant.
        return (gradient.square().sum(dim=(1, 2, 3)) * images[0].numel() + 1e-12).sqrt()
