"""Images to feature vectors: any Hugging Face vision backbone, or Inception, behind one contract."""

import itertools
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    ImageProcessingMixin,
    PreTrainedModel,
)

from dae_diffusers.errors import UserError
from dae_diffusers.store import fingerprint


class FeatureExtractor(torch.nn.Module):
    r"""
    A fixed network that turns images into feature vectors.

    Called with images `(B, C, H, W)`, floats in [-1, 1], `C` 1 (repeated) or 3, it returns features of the shape
    `(B, feature_dim)`, float32, without gradients. It stays in eval mode and in float32 whatever surrounds it, autocast
    included: an image's features depend on nothing but the image.

    Attributes:
        name (`str`): Short name in snake_case, part of [`distance_name`].
        feature_dim (`int`): Length of a feature vector.
        num_classes (`int` or `None`): Length of the logits; None if the network is no classifier.
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
        Features, and what the Inception score needs beside them, from one pass.

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
                f"{self.name!r} is no classifier and has no logits. Use a network with an image-classification head."
            )
        return self._run(images)

    def train(self, mode: bool = True) -> "FeatureExtractor":
        r"""Does nothing: the network stays in eval mode."""
        return super().train(False)

    def distance_name(self, prefix: Literal["r", "g"]) -> str:
        r"""
        What a Fréchet distance of these features is called in logs and cards: `rfd_<name>` for reconstructions,
        `gfd_<name>` for generated images. Only Inception's is called `rfid` and `gfid`.
        """
        return f"{prefix}fd_{self.name}"

    @property
    def device(self) -> torch.device:
        r"""Where the weights lie; images are brought there."""
        return next(self.parameters()).device

    @cached_property
    def fingerprint(self) -> str:
        r"""Of the weights and of the preprocessing, for caches."""
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
        round_to_8_bit (`bool`, *optional*, defaults to `True`): See [`prepare_images`].
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        name: str,
        size: tuple[int, int],
        mean: Sequence[float],
        std: Sequence[float],
        round_to_8_bit: bool = True,
    ):
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.name = name
        self._preprocessing = {"size": size, "mean": tuple(mean), "std": tuple(std), "round_to_8_bit": round_to_8_bit}
        self.description = (
            f"{'8-bit, ' if round_to_8_bit else ''}bicubic with antialiasing to {size[0]}x{size[1]} without cropping, "
            f"mean {tuple(mean)}, std {tuple(std)}"
        )
        features, logits = self._run(torch.zeros(1, 3, *size))
        self.feature_dim = features.shape[1]
        self.num_classes = None if logits is None else logits.shape[1]

    def _features_and_logits(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        backbone_outputs = []
        # Heads differ in what they take from the backbone: the hook gives both from the model's own forward.
        hook = self.model.base_model.register_forward_hook(lambda *call: backbone_outputs.append(call[-1]))
        try:
            output = self.model(pixel_values=prepare_images(images, **self._preprocessing))
        finally:
            hook.remove()
        logits = getattr(output, "logits", None)
        features = _pooled(self.model.base_model, backbone_outputs[0])
        # Cloned, so that kept class tokens do not keep all hidden states alive.
        return features.float().clone(), None if logits is None else logits.float()


class InceptionFeatureExtractor(FeatureExtractor):
    r"""
    The Inception-v3 of the FID and of the Inception score, from `torch-fidelity`: 2048 features, 1008 logits (without
    bias, as the score is defined), the weights and the resizing of the original TensorFlow graph. Always 8-bit.

    Needs the package `torch-fidelity` and, the first time, the network: it downloads the weights.
    """

    def __init__(self):
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError:
            raise ImportError(
                "Inception features need the package torch-fidelity: `pip install torch-fidelity`. Or use features of "
                "any vision backbone, such as facebook/dinov2-base."
            ) from None
        super().__init__()
        self.model = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"]).eval()
        self.model.requires_grad_(False)
        self.name = "inception"
        self.feature_dim = 2048
        self.num_classes = 1008
        self.description = "8-bit, bilinear as in TensorFlow 1 to 299x299 without cropping, (x - 128) / 128"

    def distance_name(self, prefix: Literal["r", "g"]) -> str:
        return f"{prefix}fid"

    def _features_and_logits(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.model(_to_rgb_levels(images, round_to_8_bit=True).to(torch.uint8))


def load_feature_extractor(
    name_or_path: str, device: torch.device | str = "cpu", *, round_to_8_bit: bool = True
) -> FeatureExtractor:
    r"""
    Loads a feature extractor.

    Size, mean and std come from the model's `preprocessor_config.json`. The whole image is resized to what the network
    takes, with bicubic antialiasing: centre crops, which would hide the border, and other filters are not used, even
    if the file asks for them.

    Args:
        name_or_path (`str`): `inception`, or a vision backbone on the Hub, such as `facebook/dinov2-base`, or in a
            local folder.
        device (`torch.device`, *optional*): Where it computes.
        round_to_8_bit (`bool`, *optional*, defaults to `True`): Round images to 8 bit first, as saving them would, so
            that images from memory and from files give the same features.

    Returns:
        [`FeatureExtractor`]: In eval mode, float32.

    Raises:
        UserError: If the model or its image processor does not exist, is no vision model, or lacks weights.
        ImportError: For `inception` without `torch-fidelity`.
    """
    if name_or_path == "inception":
        if not round_to_8_bit:
            raise UserError("`inception` takes 8-bit images only: leave `round_to_8_bit` at True.")
        return InceptionFeatureExtractor().to(device)
    model, preprocessing = load_vision_model(name_or_path)
    return BackboneFeatureExtractor(
        model.to(device), name=_short_name(name_or_path), round_to_8_bit=round_to_8_bit, **preprocessing
    )


def load_vision_model(name_or_path: str) -> tuple[PreTrainedModel, dict[str, Any]]:
    r"""
    Loads a vision model of `transformers` and what its image processor says.

    Args:
        name_or_path (`str`): On the Hub or in a local folder, with a `preprocessor_config.json`.

    Returns:
        `tuple[PreTrainedModel, dict]`: The model in float32, with its classification head if it has one; and `size`
        `(height, width)`, `mean` and `std` for images in [0, 1].

    Raises:
        UserError: If the model or its image processor does not exist, is no vision model, or lacks weights.
    """
    try:
        # Without the flag, transformers would ask on a terminal.
        architectures = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False).architectures or []
        processor, _ = ImageProcessingMixin.get_image_processor_dict(name_or_path)
        is_classifier = any(architecture.endswith("ForImageClassification") for architecture in architectures)
        model, loading = (AutoModelForImageClassification if is_classifier else AutoModel).from_pretrained(
            name_or_path, output_loading_info=True, dtype=torch.float32, trust_remote_code=False
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"the vision model {name_or_path!r} cannot be loaded: {' '.join(str(error).split())[:300]} (Allowed "
            "are vision models with a preprocessor_config.json on the Hub or in a local folder.)"
        ) from None
    model = getattr(model, "vision_model", model)  # of CLIP and its kin, only the half that sees
    if getattr(model, "main_input_name", None) != "pixel_values":
        raise UserError(f"{name_or_path!r} is a {type(model).__name__}, which takes no images.")
    # A pooler that is not used may lack weights, as in ViT's classifiers; anything else would be random.
    missing = [key for key in loading["missing_keys"] if not (_has_class_token(model) and "pooler" in key)]
    if missing:
        raise UserError(f"{name_or_path!r} lacks weights, its features would be random: {sorted(missing)[:5]}.")
    return model, _preprocessing_of(processor)


def prepare_images(
    images: torch.Tensor,
    *,
    size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    round_to_8_bit: bool = True,
) -> torch.Tensor:
    r"""
    Images to what a vision network takes.

    Args:
        images (`torch.Tensor` of shape `(B, C, H, W)`): Floats in [-1, 1], clamped to it; `C` 1 (repeated) or 3.
        size (`tuple[int, int]`): Height and width of the result: bicubic with antialiasing, overshoots clamped.
        mean, std (`Sequence[float]`): Normalisation of each colour, for images in [0, 1].
        round_to_8_bit (`bool`, *optional*, defaults to `True`): Round to 8 bit before resizing, as saving would.

    Returns:
        `torch.Tensor` of shape `(B, 3, *size)`: Normalised, float32.

    Raises:
        ValueError: For another number of channels or dimensions, integers, and values that are not finite.
    """
    levels = _to_rgb_levels(images, round_to_8_bit=round_to_8_bit)
    if levels.shape[2:] != size:
        levels = F.interpolate(levels, size=size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 255)
    mean = torch.tensor(mean, device=levels.device).view(1, 3, 1, 1)
    std = torch.tensor(std, device=levels.device).view(1, 3, 1, 1)
    return (levels / 255 - mean) / std


def _to_rgb_levels(images: torch.Tensor, *, round_to_8_bit: bool) -> torch.Tensor:
    """Images in [-1, 1] to three channels in [0, 255], float32."""
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(
            f"images have the shape {tuple(images.shape)}, but must be (B, C, H, W) with 1 (gray, repeated) or 3 "
            "(RGB) channels. Choose three of them for images of another kind."
        )
    if not images.is_floating_point():
        raise ValueError(f"images are {images.dtype}, but must be floats in [-1, 1]: `images / 127.5 - 1` for uint8.")
    if not torch.isfinite(images).all():
        raise ValueError("images hold NaN or infinite values, which have no features. Find the model that made them.")
    levels = (images.float().clamp(-1, 1) + 1) * 127.5
    return (levels.round() if round_to_8_bit else levels).expand(-1, 3, -1, -1)


def _pooled(backbone: PreTrainedModel, output: Any) -> torch.Tensor:
    hidden, pooled = output.last_hidden_state, getattr(output, "pooler_output", None)
    if _has_class_token(backbone):
        return hidden[:, 0]  # (B, N, D) -> (B, D). ViT's pooler is often untrained
    if pooled is not None:
        return pooled.flatten(1)  # (B, D, 1, 1) or (B, D) -> (B, D)
    return hidden.flatten(2).mean(2) if hidden.ndim == 4 else hidden.mean(1)  # (B, D, h, w) or (B, N, D) -> (B, D)


def _has_class_token(model: PreTrainedModel) -> bool:
    return any(name.endswith("cls_token") for name, _ in model.named_parameters())


def _preprocessing_of(processor: dict[str, Any]) -> dict[str, Any]:
    """Size, mean and std from a `preprocessor_config.json` of any age."""
    crops = processor.get("do_center_crop", False) and "crop_size" in processor
    size = processor.get("crop_size" if crops else "size")
    if isinstance(size, dict):
        side = size.get("shortest_edge")
        size = (size.get("height", side), size.get("width", side))
    elif isinstance(size, int):
        size = (size, size)
    mean, std = processor.get("image_mean"), processor.get("image_std")
    if not processor.get("do_normalize", True):
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if size is None or None in size or len(mean or ()) != 3 or len(std or ()) != 3:
        raise UserError(
            "the image processor must name `size`, and `image_mean` and `image_std` of three colours, but has "
            f"{processor.get('size')}, {mean} and {std}. Add them to its preprocessor_config.json."
        )
    # Processors rescale levels 0..255 by 1/255; another factor moves the normalisation.
    scale = 255 * (processor.get("rescale_factor", 1 / 255) if processor.get("do_rescale", True) else 1.0)
    return {"size": size, "mean": [value / scale for value in mean], "std": [value / scale for value in std]}


def _short_name(name_or_path: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", Path(name_or_path).resolve().name.lower()).strip("_")
