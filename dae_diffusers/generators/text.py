"""Captions of images: a frozen text encoder, the hidden states of every text, computed once, and batches that hold them."""

import logging
import pickle
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file

from dae_diffusers.autoencoders.loading import check_finite
from dae_diffusers.caching import cached_rows
from dae_diffusers.data import ImageDataset, split_items
from dae_diffusers.data.batches import BatchDataset, ExtendedDataset
from dae_diffusers.errors import UserError, one_line
from dae_diffusers.pipelines.dae_dit import encode_texts, token_limit
from dae_diffusers.randomness import Stream, derived_seed
from dae_diffusers.store import fingerprint_of_json
from dae_diffusers.vision import has_words
from dae_diffusers.weights import model_fingerprint

logger = logging.getLogger(__name__)

CHUNK_SIZE = 1024  # texts in a shard
_WIDTH = 8  # batches are padded to multiples of it, so that compiled code meets few shapes
TEXT_ARGUMENTS = ("encoder_hidden_states", "encoder_attention_mask")


def load_text_encoder(
    name: str, dtype: torch.dtype = torch.float32
) -> tuple[transformers.PreTrainedTokenizerBase, transformers.PreTrainedModel]:
    r"""
    Loads a frozen text encoder of `transformers` with its tokenizer.

    Args:
        name (`str`): Folder or Hub id of a text encoder (CLIP, T5, BERT...), or of a diffusers pipeline with `text_encoder/`.
        dtype (`torch.dtype`, *optional*): Of its weights and of its hidden states.

    Raises:
        UserError: If there is none, it lacks weights or a tokenizer, or gives no hidden states.
    """
    reasons, verbosity = [], transformers.logging.get_verbosity()
    for folders in (("", ""), ("tokenizer", "text_encoder")):
        transformers.logging.set_verbosity_error()  # half of a model lacks the weights of the other half
        try:
            tokenizer, model = _load(name, *folders, dtype)
            break
        except pickle.UnpicklingError:
            reasons.append("its weights are a pickle with more in it than tensors, whose code is not run.")
        except (OSError, ValueError, EOFError, KeyError, AttributeError, SafetensorError, RuntimeError) as error:
            reasons.append(one_line(error, 300))
        finally:
            transformers.logging.set_verbosity(verbosity)
    else:
        raise UserError(
            f"`text_encoder` {name} cannot be loaded: {reasons[0]} Give the folder or Hub id of a text encoder of transformers with "
            "its tokenizer, such as openai/clip-vit-base-patch32."
        )
    _check_hidden_states(name, tokenizer, model)
    return tokenizer, model


def _load(name: str, tokenizer_folder: str, model_folder: str, dtype: torch.dtype) -> tuple:
    config = transformers.AutoConfig.from_pretrained(name, subfolder=model_folder, trust_remote_code=False)
    model, loading = _class_of(config).from_pretrained(
        name, subfolder=model_folder, dtype=dtype, output_loading_info=True, trust_remote_code=False
    )
    missing = sorted(loading["missing_keys"])
    for key in missing:
        if "pooler" not in key:
            raise ValueError(f"it lacks {len(missing)} weights, such as {key}.")
        torch.nn.init.zeros_(
            model.get_parameter(key)
        )  # unused, and random ones would give each run another fingerprint
    tokenizer = transformers.AutoTokenizer.from_pretrained(name, subfolder=tokenizer_folder, trust_remote_code=False)
    return tokenizer, model.eval().requires_grad_(False)


def _class_of(config: transformers.PretrainedConfig) -> type[transformers.PreTrainedModel]:
    """The class of the encoder alone: of CLIP and the like the half for text, of T5 the encoder."""
    half = getattr(transformers, type(config).__name__.removesuffix("Config") + "TextModel", None)
    if hasattr(config, "text_config") and half is not None:
        return half
    encoders = transformers.AutoModelForTextEncoding._model_mapping
    return encoders[type(config)] if type(config) in encoders else transformers.AutoModel


def _check_hidden_states(name: str, tokenizer, model: transformers.PreTrainedModel) -> None:
    if getattr(model, "main_input_name", None) != "input_ids" or not has_words(tokenizer):
        raise UserError(
            f"`text_encoder` {name} is a {type(model).__name__} without a tokenizer of texts. Give a text encoder, and save its "
            "tokenizer in the same folder."
        )
    try:
        states = encode_texts(tokenizer, model, ["a", ""])[0]
        if states.shape[0] != 2 or states.shape[2:] != (model.config.hidden_size,):
            raise ValueError(f"their shape is {tuple(states.shape)}")
    except (AttributeError, TypeError, ValueError, RuntimeError, IndexError) as error:
        raise UserError(
            f"`text_encoder` {name} is a {type(model).__name__}, which gives no hidden states (B, T, D) of a text: {one_line(error, 200)}. "
            "Give a text encoder, such as CLIP, T5 or BERT."
        ) from None


class TextStates:
    r"""
    The hidden states of texts, each text once, read from memory-mapped files.

    Args:
        texts (`list[str]`): All texts, without repetitions.
        files (`dict[range, Path]`): Ranges of texts, in order, and the file of each: `states` `(tokens, D)` of all its texts together,
            and `lengths`, the number of tokens of each.
    """

    def __init__(self, texts: list[str], files: dict[range, Path]):
        self._places = {}  # of each text: its file, and the slice of its tokens
        self._states = []
        for number, (chunk, path) in enumerate(files.items()):
            kept = load_file(path)
            ends = kept["lengths"].cumsum(0).tolist()
            self._states.append(kept["states"])
            self._places |= {
                texts[row]: (number, slice(start, end))
                for row, start, end in zip(chunk, [0, *ends], ends, strict=False)
            }

    def __getitem__(self, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        r"""Hidden states `(B, T, D)` and mask `(B, T)` bool of texts, padded on the right to a multiple of 8."""
        found = [self._states[number][tokens] for number, tokens in (self._places[text] for text in texts)]
        width = -(-max(map(len, found)) // _WIDTH) * _WIDTH
        states = torch.stack([F.pad(each, (0, 0, 0, width - len(each))) for each in found])
        mask = torch.arange(width) < torch.tensor([[len(each)] for each in found])
        return states, mask


@torch.no_grad()
def encode_once(
    tokenizer,
    model: transformers.PreTrainedModel,
    texts: Sequence[str],
    accelerator: Accelerator,
    folder: Path,
    *,
    batch_size: int = 64,
) -> tuple[TextStates, str]:
    r"""
    The hidden states of texts and of the empty text, from the shards in `folder`; what is missing there is computed. All processes call it.

    Args:
        tokenizer, model: From [`load_text_encoder`].
        texts (sequence of `str`): Texts; repetitions count once.
        accelerator ([`~accelerate.Accelerator`]): The run's accelerator. Processes take turns at the shards, on its device.
        folder (`Path`): Shards go to a sub-folder named after a fingerprint of texts and encoder; see [`cached_rows`].
        batch_size (`int`, *optional*): Texts encoded at once.

    Returns:
        `tuple`: [`TextStates`], and the fingerprint of the texts and the encoder.
    """
    texts = ["", *sorted(set(texts) - {""})]
    limit = token_limit(tokenizer, model)
    ids = tokenizer(texts, verbose=False).input_ids
    longer = [len(each) for each in ids if len(each) > limit]
    if longer:
        logger.warning(
            "%d of %d captions are longer than the %d tokens that the text encoder takes (up to %d): the rest is cut off.",
            len(longer), len(texts), limit, max(longer),
        )  # fmt: skip
    of = {
        "kind": "hidden states of texts",
        "texts": texts,
        "ids": ids,
        "limit": limit,
        "encoder": model_fingerprint(model),
    }
    of = fingerprint_of_json([of, str(model.dtype)])

    def compute(chunk: range) -> dict[str, torch.Tensor]:
        model.to(accelerator.device)
        states, lengths = [], []
        for first in range(chunk.start, chunk.stop, batch_size):
            part, mask = encode_texts(tokenizer, model, texts[first : min(first + batch_size, chunk.stop)])
            check_finite(part[mask], "hidden states of the text encoder")
            states.append(part[mask].cpu())
            lengths.append(mask.sum(1).cpu())
        return {"states": torch.cat(states), "lengths": torch.cat(lengths)}

    rows = cached_rows(
        compute,
        len(texts),
        accelerator,
        folder=folder,
        of=of,
        chunk_size=CHUNK_SIZE,
        description="Encoding captions",
        load=False,
    )
    model.to("cpu")  # from here on it is only saved, or encodes a few prompts
    return TextStates(texts, rows["lengths"].files), of


class Captions:
    r"""
    The captions of a run's images, and the text encoder that they are encoded with.

    Args:
        name (`str`), dtype (`torch.dtype`): As in [`load_text_encoder`].
        images (pair of [`~dae_diffusers.data.ImageDataset`]): Training and validation images, with captions.
        accelerator ([`~accelerate.Accelerator`]), folder (`Path`): As in [`encode_once`].

    Attributes:
        images: As given.
        tokenizer, model: The text encoder, on the CPU.
        width (`int`): Channels of its hidden states.
        fingerprint (`str`): Of the captions of each image, and of the encoder.
    """

    def __init__(
        self, name: str, dtype: torch.dtype, images: Sequence[ImageDataset], accelerator: Accelerator, folder: Path
    ):
        self.images = tuple(images)
        with accelerator.main_process_first():
            self.tokenizer, self.model = load_text_encoder(name, dtype)
        self.width = self.model.config.hidden_size
        texts = [text for split in images for captions in split.captions for text in captions]
        self.states, of = encode_once(self.tokenizer, self.model, texts, accelerator, folder)
        self.fingerprint = fingerprint_of_json([of, [split.captions for split in images]])

    def add_to(self, *data: BatchDataset) -> list["WithText"]:
        r"""Training and validation data, images or latents, with the hidden states of a caption of each."""
        return [WithText(each, images.captions, self.states) for each, images in zip(data, self.images, strict=True)]

    def dropped(self, batch: dict[str, torch.Tensor], is_dropped: torch.Tensor) -> dict[str, torch.Tensor]:
        r"""The texts of a batch as arguments of the transformer, with the empty text where `is_dropped` `(B,)` says so."""
        states, mask = (batch[name] for name in TEXT_ARGUMENTS)
        empty, empty_mask = (each.to(states.device) for each in self.states[[""]])
        width = max(states.shape[1], empty.shape[1])
        states, empty = (F.pad(each, (0, 0, 0, width - each.shape[1])) for each in (states, empty))
        mask, empty_mask = (F.pad(each, (0, width - each.shape[1])) for each in (mask, empty_mask))
        states = torch.where(is_dropped[:, None, None], empty, states)
        return dict(zip(TEXT_ARGUMENTS, (states, torch.where(is_dropped[:, None], empty_mask, mask)), strict=True))


class WithText(ExtendedDataset):
    r"""
    Images or latents together with the hidden states of a caption of each, drawn by the same index and draw: `encoder_hidden_states`
    `(B, T, D)` and `encoder_attention_mask` `(B, T)`. Without a draw it is the first caption.

    Args:
        data ([`BatchDataset`]): The images or latents.
        captions (`list[list[str]]`): Texts of each, at least one.
        states ([`TextStates`]): Of all these texts.
    """

    def __init__(self, data: BatchDataset, captions: list[list[str]], states: TextStates):
        super().__init__(data)
        self.captions = captions
        self.states = states

    def __getitems__(self, items: list[int | tuple[int, int]]) -> dict[str, torch.Tensor]:
        texts = [self._text(*item) for item in zip(*split_items(items), strict=True)]
        return {**self.data.__getitems__(items), **dict(zip(TEXT_ARGUMENTS, self.states[texts], strict=True))}

    def _text(self, index: int, draw: int | None) -> str:
        captions = self.captions[index]
        several = draw is not None and len(captions) > 1
        return captions[derived_seed(draw, Stream.CAPTION) % len(captions)] if several else captions[0]
