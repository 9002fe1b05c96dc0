"""Frozen vision models that judge images: how to load them, and their hidden states as a function of images."""

import math
import pickle
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoTokenizer,
    ImageProcessingMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ViTModel,
)
from transformers.utils import ModelOutput

from dae_diffusers.errors import UserError, one_line
from dae_diffusers.losses.resizing import resize

LPIPSNet = Literal["alex", "vgg", "squeeze"]


class AlwaysEval(nn.Module):
    r"""A module that stays in eval mode, also inside one that is trained."""

    def train(self, mode: bool = True) -> "AlwaysEval":
        r"""Does nothing but stay in eval mode, whatever `mode` is."""
        return super().train(False)


class FrozenBackbone(AlwaysEval):
    r"""
    The hidden states of a frozen vision model, as a differentiable function of images.

    Images are resized to the size that the model's image processor names (bilinear with antialiasing) and normalised
    with its mean and std. A single channel is repeated. Nothing is clamped or rounded, so the gradient reaches every pixel.

    Args:
        model (`PreTrainedModel`): A model with or without head; it is frozen here.
        size (`tuple[int, int]`): Height and width of its inputs.
        mean, std (`Sequence[float]`): Normalisation of the three colours, for images in [0, 1].
    """

    def __init__(self, model: PreTrainedModel, *, size: tuple[int, int], mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.model = backbone_of(model).eval().requires_grad_(False)
        self.size = size
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        r"""
        Args:
            images (`torch.Tensor` of shape `(B, C, H, W)`): Images in about [-1, 1]; `C` 1 or 3.

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
        The last layer's features as a grid over the image, without class token and registers, and without gradient.

        Args:
            images (`torch.Tensor` of shape `(B, C, H, W)`): As in [`forward`].

        Returns:
            `torch.Tensor` of shape `(B, D, h, w)`: Features on the grid of the backbone.

        Raises:
            UserError: If the backbone's output is not a grid.
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
            f"the output of the vision model, a {type(self.model).__name__}, has the shape {tuple(hidden.shape)}, which is not a "
            "grid of features. Use a model such as DINOv2, a ViT, ResNet or ConvNeXt."
        )

    @property
    def patch_feature_dim(self) -> int:
        r"""`D` of [`patch_features`]."""
        return self.patch_features(torch.zeros(1, 3, *self.size, device=self.mean.device)).shape[1]

    def _run(self, images: torch.Tensor, **options) -> ModelOutput:
        images = resize(as_rgb(images), tuple(self.size))
        return self.model(pixel_values=((images + 1) / 2 - self.mean) / self.std, **options)


def as_rgb(images: torch.Tensor) -> torch.Tensor:
    r"""
    Pictures as RGB: gray ones repeated, RGBA ones on white.

    Args:
        images (`torch.Tensor` of shape `(B, C, H, W)`): In [-1, 1]; `C` 1, 3 or 4.

    Returns:
        `torch.Tensor` of shape `(B, 3, H, W)`: In [-1, 1].

    Raises:
        ValueError: For another number of channels.
    """
    channels = images.shape[1]
    if channels == 4:
        opacity = (images[:, 3:].clamp(-1, 1) + 1) / 2
        return opacity * images[:, :3] + 1 - opacity
    if channels not in (1, 3):
        raise ValueError(
            f"images have {channels} channels, but a vision model takes 1 (gray, repeated), 3 (RGB) or 4 (RGBA, on white)."
        )
    return images.expand(-1, 3, -1, -1)


def short_name(name_or_path: str) -> str:
    r"""The last part of a model's name or path in snake_case, for logs and the names of metrics."""
    return re.sub(r"[^a-z0-9]+", "_", Path(name_or_path).resolve().name.lower()).strip("_")


def load_backbone(name_or_path: str) -> FrozenBackbone:
    r"""
    Loads a frozen vision model from the Hub or a local folder.

    Raises:
        UserError: If it does not exist, is no vision model, or lacks weights.
    """
    model, preprocessing = load_vision_model(name_or_path)
    return FrozenBackbone(model, **preprocessing)


def load_vision_model(name_or_path: str) -> tuple[PreTrainedModel, dict[str, Any]]:
    r"""
    Loads a vision model of `transformers` and the settings of its image processor.

    Args:
        name_or_path (`str`): A model on the Hub or in a local folder, with a `preprocessor_config.json`.

    Returns:
        `tuple[PreTrainedModel, dict]`: The model in float32, with its classification head if it has one; and `size`
        `(height, width)`, `mean` and `std` for images in [0, 1].

    Raises:
        UserError: If the model or its image processor does not exist, is no vision model, or lacks weights.
    """
    with _loading(f"the vision model {name_or_path!r}", "vision models with a preprocessor_config.json"):
        # Without the flag, transformers would ask on a terminal.
        config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
        architectures = config.architectures or []
        processor, _ = ImageProcessingMixin.get_image_processor_dict(name_or_path)
        is_classifier = any(architecture.endswith("ForImageClassification") for architecture in architectures)
        model_class, more = AutoModelForImageClassification if is_classifier else AutoModel, {}
        if config.model_type == "vit_mae":  # a ViT whose own class hides patches at random, and without a pooler
            model_class, more = ViTModel, {"add_pooling_layer": False}
        model, loading = model_class.from_pretrained(
            name_or_path, output_loading_info=True, dtype=torch.float32, trust_remote_code=False, **more
        )
    model = getattr(model, "vision_model", model)  # of CLIP and similar models, only the vision half
    if getattr(model, "main_input_name", None) != "pixel_values":
        raise UserError(f"{name_or_path!r} is a {type(model).__name__}, which takes no images.")
    # A pooler that is not used may lack weights, as in ViT's classifiers; anything else would be random.
    missing = [key for key in loading["missing_keys"] if not (has_class_token(model) and "pooler" in key)]
    if missing:
        raise UserError(f"{name_or_path!r} lacks weights, so its features would be random: {sorted(missing)[:5]}.")
    preprocessing = _preprocessing_of(processor)
    _check_features(name_or_path, model, preprocessing["size"])
    return model, preprocessing


@contextmanager
def _loading(what: str, allowed: str) -> Iterator[None]:
    """Inside the `with` block, what goes wrong with files becomes a `UserError` of one line."""
    try:
        yield
    except UserError:
        raise
    except pickle.UnpicklingError:
        raise UserError(
            f"{what} cannot be loaded: its weights are a pickle with more in it than tensors. Code in it is not run. Use a model whose "
            "weights are safetensors."
        ) from None
    except (OSError, ValueError, EOFError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" in str(error):
            raise
        raise UserError(
            f"{what} cannot be loaded: {one_line(error, 300)} (Allowed are {allowed} on the Hub or in a local folder.)"
        ) from None


def load_image_text_model(
    name_or_path: str,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, dict[str, Any]]:
    r"""
    Loads a model of `transformers` that compares images with texts, as CLIP and SigLIP do.

    Args:
        name_or_path (`str`): A model on the Hub or in a local folder, with its tokenizer and a `preprocessor_config.json`.

    Returns:
        `tuple`: The model in float32, its tokenizer, and `size`, `mean` and `std` as in [`load_vision_model`].

    Raises:
        UserError: If a part does not exist, or lacks weights or words, or if the model is of another kind.
    """
    what = f"`clip_model` {name_or_path}"
    advice = "Give a CLIP or SigLIP of transformers, such as openai/clip-vit-base-patch32."
    with _loading(what, "a CLIP or SigLIP with its tokenizer and a preprocessor_config.json"):
        model, loading = AutoModel.from_pretrained(
            name_or_path, output_loading_info=True, dtype=torch.float32, trust_remote_code=False
        )
        if not (hasattr(model, "get_image_features") and hasattr(model, "get_text_features")):
            raise UserError(f"{what} is a {type(model).__name__}, which does not compare images with texts. {advice}")
        if loading["missing_keys"]:
            raise UserError(f"{what} lacks weights, such as {min(loading['missing_keys'])}. {advice}")
        processor, _ = ImageProcessingMixin.get_image_processor_dict(name_or_path)
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
    if not has_words(tokenizer):
        raise UserError(f"{what} has no tokenizer in its folder. Save it there, too.")
    return model.eval().requires_grad_(False), tokenizer, _preprocessing_of(processor)


def has_words(tokenizer: PreTrainedTokenizerBase) -> bool:
    r"""Whether a tokenizer knows words. Where a folder has none, transformers makes one without."""
    return len(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)) > 1


def backbone_of(model: PreTrainedModel) -> PreTrainedModel:
    r"""A vision model without its classification head, if it has one."""
    # Elsewhere `base_model` may be a part of the backbone, such as the encoder of DINOv3.
    return model.base_model if type(model).__name__.endswith("ForImageClassification") else model


@torch.no_grad()
def _check_features(name: str, model: PreTrainedModel, size: tuple[int, int]) -> None:
    """Raises `UserError` for a model that needs more than pixels, or whose features are random."""
    images = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
    try:
        first, second = (model.eval()(pixel_values=images)[0] for _ in range(2))
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError) as error:
        if "memory" in str(error):
            raise
        raise UserError(
            f"{name!r} is a {type(model).__name__}, which does not work with images alone: {one_line(error, 200)}. Choose another vision "
            "model, such as facebook/dinov2-base."
        ) from None
    if not torch.allclose(first, second, equal_nan=True):
        raise UserError(
            f"{name!r} is a {type(model).__name__}, whose features of the same image differ from call to call. Choose another "
            "vision model, such as facebook/dinov2-base."
        )


def load_inception() -> nn.Module:
    r"""
    The Inception-v3 of the FID, from `torch-fidelity`: images `(B, 3, H, W)`, uint8, to 2048 features and 1008 logits.

    Raises:
        ImportError: Without the package `torch-fidelity`.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError:
        raise ImportError(
            "Inception features need the package torch-fidelity: `pip install torch-fidelity`. Or use the features of "
            "another vision model, such as facebook/dinov2-base."
        ) from None
    return FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"]).eval().requires_grad_(False)


def load_lpips_network(net: LPIPSNet = "alex") -> nn.Module:
    r"""
    The network of the package `lpips`, version 0.1 of its weights: two batches `(B, 3, H, W)` in [-1, 1] to `(B, 1, 1, 1)`.

    Args:
        net (`str`): `alex` is the usual metric, `vgg` the usual loss.

    Raises:
        ImportError: Without the package `lpips`, which needs `torchvision` too.
        OSError: If the weights are not on the disk and cannot be fetched.
    """
    try:
        import lpips
    except ImportError:
        raise ImportError("LPIPS needs the packages lpips and torchvision: `pip install lpips`.") from None
    return lpips.LPIPS(net=net, verbose=False).eval().requires_grad_(False)


def has_class_token(model: PreTrainedModel) -> bool:
    r"""Whether the first position of the hidden states is a class token, as in ViT and DINOv2."""
    return any(name.endswith("cls_token") for name, _ in model.named_parameters())


def _preprocessing_of(processor: dict[str, Any]) -> dict[str, Any]:
    """Size, mean and std from a `preprocessor_config.json` of any age."""
    if processor.get("do_flip_channel_order"):
        raise UserError("the image processor swaps red and blue (`do_flip_channel_order`), which is not supported.")
    crops = processor.get("do_center_crop", False) and "crop_size" in processor
    size = processor.get("crop_size" if crops else "size")
    if isinstance(size, dict):
        side = size.get("shortest_edge")
        size = (size.get("height", side), size.get("width", side))
    elif isinstance(size, int):
        size = (size, size)
    mean, std = processor.get("image_mean"), processor.get("image_std")
    mean, std = ([value] * 3 if isinstance(value, int | float) else value for value in (mean, std))
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
