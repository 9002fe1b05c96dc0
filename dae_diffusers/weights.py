"""What identifies the weights of models: fingerprints of those in memory and of those in files."""

import itertools
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dae_diffusers.store import fingerprint, fingerprint_of_json

if TYPE_CHECKING:  # torch takes seconds to import; code that only reads and writes text should not wait for it
    import torch
    from diffusers import ModelMixin

# The children of an autoencoder that make latents, and with its codebook the codes, that a generator learns.
ENCODER = ("encoder", "quant_conv")
LATENT_PARTS = (*ENCODER, "quantize")
# What an autoencoder's config says of its latents, for generators.
STATISTICS = ("latents_mean", "latents_std", "scaling_factor", "shift_factor")


def weights_of(model: "torch.nn.Module", children: tuple[str, ...] | None = None) -> Iterator[Any]:
    r"""Names and float32 values of a model's weights, or of the named children's weights, for [`fingerprint`]."""
    for name, value in sorted(model.state_dict().items()):
        if children is None or name.split(".")[0] in children:
            yield name
            yield value.float()


def weights_fingerprint(weights: Iterable["torch.Tensor"]) -> str:
    r"""
    A fingerprint of a model's weights that ignores names, order and precision: a model in memory, its files and its half-precision
    copy have the same one. Integer tensors are skipped.
    """
    return fingerprint(sorted({fingerprint([value.half()]) for value in weights if value.is_floating_point()}))


def weights_fingerprint_of(folder: Path, children: tuple[str, ...] | None = None) -> str | None:
    r"""
    [`weights_fingerprint`] of the weights that `from_pretrained` reads in the folder of a model, or of its named children's weights;
    None if there are none in safetensors files, or damaged ones.
    """
    for name in ("diffusion_pytorch_model", "model"):  # of diffusers, of transformers
        is_sharded = (folder / f"{name}.safetensors.index.json").is_file()
        patterns = [f"{name}-*.safetensors"] if is_sharded else [f"{name}.safetensors", f"{name}.*.safetensors"]
        files = next((found for each in patterns if (found := sorted(folder.glob(each)))), [])
        if files:
            states = tuple((path, path.stat().st_mtime_ns, path.stat().st_size) for path in files)
            return _fingerprint_of_files(states, children)
    return None


def have_other_encoders(first: Path, second: Path, parts: tuple[str, ...] = LATENT_PARTS) -> bool:
    r"""
    Whether the autoencoders in two folders make other latents or codes; False where one is missing or cannot be read.

    Args:
        first, second (`Path`): The folders.
        parts (`tuple[str, ...]`, *optional*): What is compared: [`ENCODER`] if one is still in training, because its codebook holds more.
    """
    found = [weights_fingerprint_of(folder, parts) for folder in (first, second)]
    return None not in found and found[0] != found[1]


def model_fingerprint(model: "torch.nn.Module") -> str:
    r"""Fingerprint of a model's weights and config, without the place that it was loaded from."""
    config = model.config if isinstance(model.config, dict) else model.config.to_dict()
    described = fingerprint_of_json({key: value for key, value in config.items() if key[0] != "_"})
    return fingerprint(itertools.chain([described], weights_of(model)))


def autoencoder_fingerprint(vae: "ModelMixin", parts: tuple[str, ...] = ENCODER) -> str:
    r"""The fingerprint of the weights that make latents. The decoder may change: the cache stays valid."""
    return fingerprint(weights_of(vae, parts))


def latents_fingerprint(vae: "ModelMixin") -> str:
    r"""As [`autoencoder_fingerprint`], of what makes codes too."""
    return autoencoder_fingerprint(vae, LATENT_PARTS)


@lru_cache(maxsize=32)  # a push reads the same large files a few times
def _fingerprint_of_files(files: tuple[tuple[Path, int, int], ...], children: tuple[str, ...] | None) -> str | None:
    from safetensors import SafetensorError, safe_open

    def weights() -> Iterator["torch.Tensor"]:
        for path, _, _ in files:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    if children is None or name.split(".")[0] in children:
                        yield file.get_tensor(name)

    try:
        return weights_fingerprint(weights())
    except (SafetensorError, OSError):
        return None
