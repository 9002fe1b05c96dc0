"""Perceptual loss: distance between the features of a frozen vision model, with a gradient into the image."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from dae_diffusers.errors import UserError
from dae_diffusers.losses.resizing import resize
from dae_diffusers.metrics.features import load_vision_model


class FrozenBackbone(nn.Module):
    r"""
    The hidden states of a frozen vision model, as a differentiable function of images.

    Images are brought to the size that the model's image processor names (bilinear with antialiasing) and normalised
    with its mean and std. One channel is repeated. Nothing is clamped or rounded, so the gradient reaches every pixel.

    Args:
        model (`PreTrainedModel`): With or without head; frozen here.
        size (`tuple[int, int]`): Height and width of its inputs.
        mean, std (`Sequence[float]`): Of three colours, for images in [0, 1].
    """

    def __init__(self, model: PreTrainedModel, *, size: tuple[int, int], mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.model = model.base_model.eval().requires_grad_(False)
        self.size = size
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> "FrozenBackbone":
        r"""Does nothing: the model stays in eval mode."""
        return super().train(False)

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        r"""
        Args:
            images (`torch.Tensor` of shape `(B, C, H, W)`): Around [-1, 1]; `C` 1 or 3.

        Returns:
            `list[torch.Tensor]`: One for each layer, channels second: `(B, D, h, w)`, or `(B, D, N)` for tokens.

        Raises:
            ValueError: For another number of channels.
        """
        output = self._run(images, output_hidden_states=True)
        return [hidden.transpose(1, 2) if hidden.ndim == 3 else hidden for hidden in output.hidden_states]

    @torch.no_grad()
    def patch_features(self, images: torch.Tensor) -> torch.Tensor:
        r"""
        The last layer's features where they lie in the image, without a class token or registers, and without gradient.

        Args:
            images (`torch.Tensor` of shape `(B, C, H, W)`): As in [`forward`].

        Returns:
            `torch.Tensor` of shape `(B, D, h, w)`: With the grid of the backbone.

        Raises:
            UserError: If the backbone's output has no grid.
        """
        hidden = self._run(images).last_hidden_state
        if hidden.ndim == 4:
            return hidden
        if hidden.ndim == 3:
            patch_size = getattr(self.model.config, "patch_size", 1)
            patch = (patch_size,) * 2 if isinstance(patch_size, int) else patch_size
            grid = self.size[0] // patch[0], self.size[1] // patch[1]
            if grid[0] * grid[1] > hidden.shape[1]:  # patches have been merged, as in Swin
                grid = (math.isqrt(hidden.shape[1]),) * 2
            num_others = hidden.shape[1] - grid[0] * grid[1]  # class token and registers come first
            if num_others <= 8:
                return hidden[:, num_others:].transpose(1, 2).unflatten(2, grid)
        raise UserError(
            f"the output of the vision model, a {type(self.model).__name__}, has the shape {tuple(hidden.shape)}: no grid of "
            "features. Use one such as DINOv2, a ViT, ResNet or ConvNeXt."
        )

    @property
    def patch_feature_dim(self) -> int:
        r"""`D` of [`patch_features`]."""
        return self.patch_features(torch.zeros(1, 3, *self.size, device=self.mean.device)).shape[1]

    def _run(self, images: torch.Tensor, **options) -> ModelOutput:
        if images.shape[1] not in (1, 3):
            raise ValueError(
                f"images have {images.shape[1]} channels, but a vision model takes 1 (gray, repeated) or 3 (RGB)."
            )
        images = resize(images.expand(-1, 3, -1, -1), tuple(self.size))
        return self.model(pixel_values=((images + 1) / 2 - self.mean) / self.std, **options)


class PerceptualLoss(nn.Module):
    r"""
    Layer-wise distance of features of unit length: for each layer the squared distance of the two feature vectors at
    each position, `2 - 2 cos`, averaged over positions; then averaged over layers. From 0 (equal) to 4.

    LPIPS without its learnt weights, in any backbone. Costs a forward pass of the backbone for each of the two images,
    and a backward pass for one.

    Args:
        backbone ([`FrozenBackbone`]): Of the features.

    Source: Zhang et al., 2018, https://huggingface.co/papers/1801.03924.
    """

    def __init__(self, backbone: FrozenBackbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, reconstruction: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
        r"""
        Args:
            reconstruction, pixel_values (`torch.Tensor` of shape `(B, C, H, W)`): In [-1, 1]; the gradient flows into the
                first only.

        Returns:
            `torch.Tensor`: Scalar, float32.
        """
        with torch.no_grad():
            targets = self.backbone(pixel_values)
        layers = [
            (_unit_length(hidden) - _unit_length(target)).square().sum(dim=1).mean()
            for hidden, target in zip(self.backbone(reconstruction), targets, strict=True)
        ]
        return torch.stack(layers).mean()


class LPIPSLoss(nn.Module):
    r"""LPIPS (VGG) of the package `lpips`, mean over the batch. It downloads its backbone the first time."""

    def __init__(self):
        super().__init__()
        try:
            import lpips
        except ImportError:
            raise UserError(
                "`--perceptual_model lpips` needs a package: pip install lpips. Or name a vision model, such as "
                "facebook/convnext-tiny-224."
            ) from None
        self.model = lpips.LPIPS(net="vgg", verbose=False).eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "LPIPSLoss":
        r"""Does nothing: the model stays in eval mode."""
        return super().train(False)

    def forward(self, reconstruction: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
        r"""As in [`PerceptualLoss`]."""
        return self.model(*(images.expand(-1, 3, -1, -1) for images in (reconstruction, pixel_values))).float().mean()


def load_backbone(name_or_path: str) -> FrozenBackbone:
    r"""
    Loads a frozen vision model of the Hub or a local folder.

    Raises:
        UserError: If it does not exist, is no vision model, or lacks weights.
    """
    model, preprocessing = load_vision_model(name_or_path)
    return FrozenBackbone(model, **preprocessing)


def load_perceptual_loss(name_or_path: str) -> PerceptualLoss | LPIPSLoss:
    r"""`lpips`, or a [`PerceptualLoss`] in the features of a vision model on the Hub or in a local folder."""
    return LPIPSLoss() if name_or_path == "lpips" else PerceptualLoss(load_backbone(name_or_path))


def _unit_length(hidden: torch.Tensor) -> torch.Tensor:
    return F.normalize(hidden.float(), dim=1, eps=1e-6)
