"""Feature extractors: any vision model of Hugging Face, Inception, or plain statistics, behind one interface."""

import itertools
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from dae_diffusers.image_spectrum import log_spectrum
from dae_diffusers.store import fingerprint
from dae_diffusers.vision import (
    AlwaysEval,
    as_rgb,
    backbone_of,
    has_class_token,
    load_inception,
    load_vision_model,
    short_name,
)


class FeatureExtractor(AlwaysEval):
    r"""
    A fixed network that turns images into feature vectors.

    Called with images `(B, C, H, W)`, floats in [-1, 1], `C` 1 (repeated) or 3, it returns features of the shape
    `(B, feature_dim)`, float32, without gradients. It always stays in eval mode and in float32, even under
    autocast: an image's features depend only on the image.

    Attributes:
        name (`str`): Short name in snake_case, part of [`distance_name`].
        feature_dim (`int`): Length of a feature vector.
        num_classes (`int` or `None`): Length of the logits; None if the network is not a classifier.
        description (`str`): How images are resized and normalised. Distances are comparable only if this, the weights
            and the number of images are the same.
    """

    name: str
    feature_dim: int
    num_classes: int | None
    description: str

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self._run(images)[0]

    def features_and_logits(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        r"""
        Features and logits (for the Inception score) from one forward pass.

        Args:
            images (`torch.Tensor` of shape `(B, C, H, W)`): In [-1, 1].

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: Features `(B, feature_dim)` and logits `(B, num_classes)`, float32;
            `logits.softmax(dim=1)` are the probabilities.

        Raises:
            ValueError: If the network is no classifier.
        """
        if self.num_classes is None:
            raise ValueError(
                f"{self.name!r} is not a classifier and has no logits. Use a network with an image-classification head."
            )
        return self._run(images)

    def distance_name(self, prefix: Literal["r", "g"]) -> str:
        r"""
        The name of a Fréchet distance in these features, for logs and cards: `rfd_<name>` for reconstructions,
        `gfd_<name>` for generated images. Only Inception's is called `rfid` and `gfid`.
        """
        return f"{prefix}fd_{self.name}"

    @property
    def device(self) -> torch.device:
        r"""Device of the weights; images are moved there."""
        return next(self.parameters()).device

    @cached_property
    def fingerprint(self) -> str:
        r"""Fingerprint of the weights and the preprocessing, for caches."""
        return fingerprint(itertools.chain([self.description], *sorted(self.state_dict().items())))

    @torch.no_grad()
    def _run(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        with torch.autocast(self.device.type, enabled=False):
            return self._features_and_logits(images.to(self.device))

    def _features_and_logits(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        raise NotImplementedError


class BackboneFeatureExtractor(FeatureExtractor):
    r"""
    Pooled features of a vision model of `transformers`.

    Features are the class token after the last normalisation where the model has one (ViT, DINOv2), else its pooled
    output, flattened (ResNet, ConvNeXt, Swin), else the mean over positions. `(B, feature_dim)`.

    Args:
        model (`PreTrainedModel`): A backbone, with or without an image-classification head.
        name (`str`): See [`FeatureExtractor`].
        size (`tuple[int, int]`): Height and width that images are resized to.
        mean, std (`Sequence[float]`): Normalisation of each colour, for images in [0, 1].
    """

    def __init__(
        self, model: PreTrainedModel, *, name: str, size: tuple[int, int], mean: Sequence[float], std: Sequence[float]
    ):
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.name = name
        self._preprocessing = {"size": size, "mean": tuple(mean), "std": tuple(std)}
        self.description = describe_preparation(**self._preprocessing)
        if backbone_of(model) is not model.base_model:
            self.description += ", its own output"  # earlier versions took that of a part of it
        features, logits = self._run(torch.zeros(1, 3, *size))
        self.feature_dim = features.shape[1]
        self.num_classes = None if logits is None else logits.shape[1]

    def _features_and_logits(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        backbone_outputs = []
        # Heads use different outputs of the backbone: the hook takes both from the model's own forward.
        hook = backbone_of(self.model).register_forward_hook(lambda *call: backbone_outputs.append(call[-1]))
        try:
            output = self.model(pixel_values=prepare_images(images, **self._preprocessing))
        finally:
            hook.remove()
        logits = getattr(output, "logits", None)
        features = _pooled(backbone_of(self.model), backbone_outputs[0])
        # Cloned, so that kept class tokens do not keep all hidden states alive.
        return features.float().clone(), None if logits is None else logits.float()


class InceptionFeatureExtractor(FeatureExtractor):
    r"""
    The Inception-v3 of the FID and of the Inception score, from `torch-fidelity`: 2048 features, 1008 logits (without
    bias, as the score is defined), the weights and the resizing of the original TensorFlow graph. Always 8-bit.

    Needs the package `torch-fidelity` and, the first time, the network: it downloads the weights.
    """

    def __init__(self):
        super().__init__()
        self.model = load_inception()
        self.name = "inception"
        self.feature_dim = 2048
        self.num_classes = 1008
        self.description = "8-bit, bilinear as in TensorFlow 1 to 299x299 without cropping, (x - 128) / 128"

    def distance_name(self, prefix: Literal["r", "g"]) -> str:
        return f"{prefix}fid"

    def _features_and_logits(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.model(_to_rgb_levels(images).to(torch.uint8))


class _Statistics(FeatureExtractor):
    """
    Features without a network, for images of any number of channels, on the images' device. Images are rounded to 8 bits, as samples are:
    in smooth images that rounding is most of the power of high frequencies.
    """

    num_classes = None

    def __init__(self, channels: int = 3):
        super().__init__()
        self.feature_dim = self.numbers_per_channel * channels

    fingerprint: str  # these features depend on nothing else
    numbers_per_channel: int

    def _run(self, images: torch.Tensor) -> tuple[torch.Tensor, None]:
        with torch.autocast(images.device.type, enabled=False):
            return self._features_and_logits(((images.float().clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1)


class PixelFeatures(_Statistics):
    r"""An image of `channels` channels, shrunk to 8x8 pixels: sees colours, brightness and where they are."""

    name, fingerprint, numbers_per_channel = "pixels", "pixels-8-of-8-bit", 64
    description = "8-bit, 8x8 pixels, each the mean of its part of the image"

    def _features_and_logits(self, images: torch.Tensor) -> tuple[torch.Tensor, None]:
        return F.adaptive_avg_pool2d(images, 8).flatten(1), None


class SpectrumFeatures(_Statistics):
    r"""The logarithm of an image's power in 8 rings of spatial frequency, for each of `channels` channels: sees sharpness and noise."""

    name, fingerprint, numbers_per_channel = "spectrum", "spectrum-8-ortho-of-8-bit", 8
    description = "8-bit, logarithm of the power in 8 rings of spatial frequency"

    def _features_and_logits(self, images: torch.Tensor) -> tuple[torch.Tensor, None]:
        return log_spectrum(images, 8, floor=1e-3 / images[0, 0].numel()).flatten(1), None


WITHOUT_NETWORK = {extractor.name: extractor for extractor in (PixelFeatures, SpectrumFeatures)}


def load_feature_extractor(
    name_or_path: str, device: torch.device | str = "cpu", *, channels: int = 3
) -> FeatureExtractor:
    r"""
    Loads a feature extractor.

    Size, mean and std come from the model's `preprocessor_config.json`. The whole image is resized to what the network
    takes, with bicubic antialiasing: centre crops, which would hide the border, and other filters are not used, even
    if the file asks for them.

    Args:
        name_or_path (`str`): `inception`, or a vision backbone on the Hub, such as `facebook/dinov2-base`, or in a
            local folder; or `pixels` or `spectrum`, which need no network.
        device (`torch.device`, *optional*): Where it computes.
        channels (`int`, *optional*): Channels of the images, for `pixels` and `spectrum`. The others take 1 or 3.

    Returns:
        [`FeatureExtractor`]: In eval mode, float32.

    Raises:
        UserError: If the model or its image processor does not exist, is no vision model, or lacks weights.
        ImportError: For `inception` without `torch-fidelity`.
    """
    if name_or_path in WITHOUT_NETWORK:
        return WITHOUT_NETWORK[name_or_path](channels)
    if name_or_path == "inception":
        return InceptionFeatureExtractor().to(device)
    model, preprocessing = load_vision_model(name_or_path)
    return BackboneFeatureExtractor(model.to(device), name=short_name(name_or_path), **preprocessing)


def prepare_images(
    images: torch.Tensor, *, size: tuple[int, int], mean: Sequence[float], std: Sequence[float]
) -> torch.Tensor:
    r"""
    Prepares images for a vision network. They are rounded to 8 bits first, as in a file, so images from memory and from files
    give the same features.

    Args:
        images (`torch.Tensor` of shape `(B, C, H, W)`): Floats, clamped to [-1, 1]; `C` 1 (repeated), 3, or 4 (RGBA, on white).
        size (`tuple[int, int]`): Height and width of the result (bicubic with antialiasing; overshoots are clamped).
        mean, std (`Sequence[float]`): Normalisation of each colour, for images in [0, 1].

    Returns:
        `torch.Tensor` of shape `(B, 3, *size)`: Normalised, float32.

    Raises:
        ValueError: For another number of channels or dimensions, integers, and values that are not finite.
    """
    levels = _to_rgb_levels(images)
    if levels.shape[2:] != size:
        levels = F.interpolate(levels, size=size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 255)
    mean = torch.tensor(mean, device=levels.device).view(1, 3, 1, 1)
    std = torch.tensor(std, device=levels.device).view(1, 3, 1, 1)
    return (levels / 255 - mean) / std


def describe_preparation(size: tuple[int, int], mean: Sequence[float], std: Sequence[float]) -> str:
    r"""What [`prepare_images`] does, in words."""
    return f"8-bit, bicubic with antialiasing to {size[0]}x{size[1]} without cropping, mean {tuple(mean)}, std {tuple(std)}"


def _to_rgb_levels(images: torch.Tensor) -> torch.Tensor:
    """Converts images in [-1, 1] to three channels of integer levels in 0..255, float32."""
    if images.ndim != 4 or images.shape[1] not in (1, 3, 4):
        raise ValueError(
            f"images have the shape {tuple(images.shape)}, but must be (B, C, H, W) with 1 (gray, repeated), 3 (RGB) or 4 (RGBA, on "
            "white) channels. Choose three of them for images of another kind."
        )
    if not images.is_floating_point():
        raise ValueError(f"images are {images.dtype}, but must be floats in [-1, 1]: `images / 127.5 - 1` for uint8.")
    if not torch.isfinite(images).all():
        raise ValueError("images hold NaN or infinite values, which have no features. Find the model that made them.")
    levels = ((images.float().clamp(-1, 1) + 1) * 127.5).round()
    return levels.expand(-1, 3, -1, -1) if images.shape[1] != 4 else ((as_rgb(levels / 127.5 - 1) + 1) * 127.5).round()


def _pooled(backbone: PreTrainedModel, output: Any) -> torch.Tensor:
    hidden, pooled = output.last_hidden_state, getattr(output, "pooler_output", None)
    if has_class_token(backbone) and hidden.ndim == 3:
        return hidden[:, 0]  # (B, N, D) -> (B, D). ViT's pooler is often untrained
    if pooled is not None:
        return pooled.flatten(1)  # (B, D, 1, 1) or (B, D) -> (B, D)
    return hidden.flatten(2).mean(2) if hidden.ndim == 4 else hidden.mean(1)  # (B, D, h, w) or (B, N, D) -> (B, D)
