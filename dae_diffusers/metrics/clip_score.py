"""How well images follow their texts, as a model sees it that compares both: the CLIP score."""

import inspect
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dae_diffusers.caching import cached_rows
from dae_diffusers.errors import UserError, one_line
from dae_diffusers.metrics.features import FeatureExtractor, describe_preparation, prepare_images
from dae_diffusers.metrics.statistics import pad_batch
from dae_diffusers.pipelines.dae_dit import token_limit
from dae_diffusers.vision import load_image_text_model, short_name

logger = logging.getLogger(__name__)


class ImageTextModel(FeatureExtractor):
    r"""
    A model that puts images and texts into one space, as CLIP and SigLIP do. Features have the length 1.

    Args:
        model (`PreTrainedModel`): With `get_image_features` and `get_text_features`.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        name (`str`), size (`tuple[int, int]`), mean, std (`Sequence[float]`): As in
            [`~dae_diffusers.metrics.features.BackboneFeatureExtractor`].
    """

    num_classes = None

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str,
        size: tuple[int, int],
        mean: Sequence[float],
        std: Sequence[float],
    ):
        super().__init__()
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.limit = token_limit(tokenizer, model.text_model)
        self._preprocessing = {"size": size, "mean": tuple(mean), "std": tuple(std)}
        self.description = describe_preparation(**self._preprocessing)
        self.feature_dim = self._run(torch.zeros(1, 3, *size))[0].shape[1]

    def tokens(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        r"""
        What the model takes of texts, each tensor `(N, limit)`. All are padded to the limit: a SigLIP takes its features from the last
        position, and knows no mask; a CLIP looks at nothing behind the end of the text.
        """
        options = {"padding": "max_length", "truncation": True, "max_length": self.limit, "return_tensors": "pt"}
        taken = {*inspect.signature(self.model.get_text_features).parameters}
        if "siglip" in self.model.config.model_type:
            taken.discard("attention_mask")
        return {name: value for name, value in self.tokenizer([*texts], **options).items() if name in taken}

    @torch.no_grad()
    def text_features(self, **tokens: torch.Tensor) -> torch.Tensor:
        r"""Features `(N, feature_dim)` of what [`tokens`] gives."""
        with torch.autocast(self.device.type, enabled=False):
            output = self.model.get_text_features(**{name: each.to(self.device) for name, each in tokens.items()})
        return _of_length_one(output)

    def _features_and_logits(self, images: torch.Tensor) -> tuple[torch.Tensor, None]:
        output = self.model.get_image_features(pixel_values=prepare_images(images, **self._preprocessing))
        return _of_length_one(output), None


def load_clip(name_or_path: str, device: torch.device | str = "cpu") -> ImageTextModel:
    r"""
    Loads a CLIP or SigLIP.

    Raises:
        UserError: If there is none, it lacks a part, or it needs more than pixels and tokens.
    """
    model, tokenizer, preprocessing = load_image_text_model(name_or_path)
    try:
        clip = ImageTextModel(model, tokenizer, name=short_name(name_or_path), **preprocessing)
        width = clip.text_features(**clip.tokens(["a"])).shape[1]
        if width != clip.feature_dim:
            raise ValueError(f"of an image it gives {clip.feature_dim} numbers, of a text {width}")
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if "memory" in str(error):
            raise
        raise UserError(
            f"`clip_model` {name_or_path} is a {type(model).__name__}, which gives no features of an image and of a text that could be "
            f"compared: {one_line(error, 200)}. Give a CLIP or SigLIP, such as openai/clip-vit-base-patch32."
        ) from None
    return clip.to(device)


def text_features(
    texts: Sequence[str],
    clip: ImageTextModel,
    accelerator: Accelerator,
    *,
    batch_size: int = 64,
    folder: Path | None = None,
) -> torch.Tensor:
    r"""
    Features of texts, `(N, D)`. Each text is computed once. The processes share the work, and all call it.

    Args:
        texts (`list[str]`): Texts. What is longer than the model takes is cut off, with one warning.
        clip ([`ImageTextModel`]): The model.
        accelerator ([`~accelerate.Accelerator`]): The run's accelerator.
        batch_size (`int`, *optional*): Texts at once, per process.
        folder (`Path`, *optional*): Where to keep features, so that an interrupted evaluation can continue.
    """
    different = sorted(set(texts))
    lengths = [len(ids) for ids in clip.tokenizer(different, verbose=False).input_ids]
    longer = [length for length in lengths if length > clip.limit]
    if longer:
        logger.warning(
            "%d of %d texts are longer than the %d tokens that %s takes (up to %d): the rest is cut off.",
            len(longer), len(different), clip.limit, clip.name, max(longer),
        )  # fmt: skip
    tokens = clip.tokens(different)

    def encode(chunk: range) -> dict[str, torch.Tensor]:
        features = []
        for first in range(chunk.start, chunk.stop, batch_size):
            part = {name: each[first : min(first + batch_size, chunk.stop)] for name, each in tokens.items()}
            padded = {name: pad_batch(each, clip.limit) for name, each in part.items()}
            features.append(clip.text_features(**padded)[: len(part["input_ids"])].cpu())
        return {"features": torch.cat(features)}

    of = {"texts": {name: each.tolist() for name, each in tokens.items()}, "model": clip.fingerprint}
    rows = cached_rows(encode, len(different), accelerator, folder=folder, of=of, description="Features of texts")
    places = {text: number for number, text in enumerate(different)}
    return rows["features"][[places[text] for text in texts]]


def clip_scores(images: torch.Tensor, texts: torch.Tensor) -> tuple[float, float]:
    r"""
    The CLIP score, the mean of `100 max(cos, 0)` over images with their texts, and its mean over each image with each text, which is what
    texts in random order would reach.

    Args:
        images, texts (`torch.Tensor` of shape `(N, D)`): Features of length 1.

    Returns:
        `tuple[float, float]`: In [0, 100]; NaN without images.

    Source: Hessel et al., 2021, https://huggingface.co/papers/2104.08718, with the factor 100 instead of 2.5.
    """
    own = (images * texts).sum(dim=1).clamp(min=0)
    any_text = torch.cat([(part @ texts.T).clamp(min=0).double().mean(dim=1) for part in images.split(1024)])
    return 100 * own.double().mean().item(), 100 * any_text.mean().item()


def _of_length_one(output) -> torch.Tensor:
    """Features of a model's output, which is a tensor in early versions of transformers 5."""
    return F.normalize(getattr(output, "pooler_output", output).float(), dim=1)
