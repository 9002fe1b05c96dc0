"""The perceptual loss of an autoencoder, with the frozen network that it compares images in."""

import torch
from torch import nn

from dae_diffusers.errors import UserError
from dae_diffusers.losses.perceptual import perceptual_distance
from dae_diffusers.vision import AlwaysEval, FrozenBackbone, as_rgb, load_backbone, load_lpips_network


class PerceptualLoss(nn.Module):
    r"""
    [`~dae_diffusers.losses.perceptual.perceptual_distance`] of an image and its reconstruction.

    It is LPIPS without its learnt weights, in any vision model. It costs a forward pass of the model for each of the two images,
    and a backward pass for one.

    Args:
        backbone ([`~dae_diffusers.vision.FrozenBackbone`]): The frozen vision model.
    """

    def __init__(self, backbone: FrozenBackbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, reconstruction: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
        r"""
        Args:
            reconstruction, pixel_values (`torch.Tensor` of shape `(B, C, H, W)`): Images in [-1, 1]; only the first gets a
                gradient.

        Returns:
            `torch.Tensor`: Scalar, float32.
        """
        with torch.no_grad():
            targets = self.backbone(pixel_values)
        return perceptual_distance(self.backbone(reconstruction), targets)


class LPIPSLoss(AlwaysEval):
    r"""LPIPS (VGG) of the package `lpips`, mean over the batch. It downloads its backbone the first time."""

    def __init__(self):
        super().__init__()
        try:
            self.model = load_lpips_network("vgg")
        except ImportError:
            raise UserError(
                "`perceptual_model lpips` needs a package: pip install lpips. Or name a vision model, such as "
                "facebook/convnext-tiny-224."
            ) from None

    def forward(self, reconstruction: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
        r"""As in [`PerceptualLoss`]."""
        return self.model(*(as_rgb(images) for images in (reconstruction, pixel_values))).float().mean()


def load_perceptual_loss(name_or_path: str) -> PerceptualLoss | LPIPSLoss:
    r"""Loads the loss `lpips`, or a [`PerceptualLoss`] in the features of a vision model from the Hub or a local folder."""
    return LPIPSLoss() if name_or_path == "lpips" else PerceptualLoss(load_backbone(name_or_path))
