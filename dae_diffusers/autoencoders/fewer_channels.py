"""
Fewer latent channels from one encoder. `quant_conv` and `post_quant_conv` mix all channels at a position, which they cannot do with
fewer: they become the identity, and part of the convolution beside them.
"""

import torch
from torch import nn

from dae_diffusers.autoencoders.autoencoder_kl import DAEAutoencoderKL


@torch.no_grad()
def first_latent_channels(model: DAEAutoencoderKL, count: int) -> DAEAutoencoderKL:
    r"""
    Makes a model whose latents are the first `count` channels of another's. After a stage 1 with the auxiliary decoder `prefix`, which
    orders channels by importance, one encoder serves every number of channels.

    Args:
        model ([`~dae_diffusers.DAEAutoencoderKL`]): After stage 1.
        count (`int`): From 1 to its `latent_channels`.

    Returns:
        [`~dae_diffusers.DAEAutoencoderKL`]: Its latents are the same up to rounding. Its auxiliary decoder makes of them what the other
        made with 0 in the other channels; at the image's border this is not exact. Its real decoder is fresh.

    Raises:
        ValueError: If `count` is out of its range.
    """
    total = model.config.latent_channels
    if not 1 <= count <= total:
        raise ValueError(f"`count` is {count}, but must be from 1 to `latent_channels` {total}.")
    smaller = type(model).from_config(model.config, latent_channels=count, latents_mean=None, latents_std=None)
    smaller = smaller.to(model.device, model.dtype)
    weight, bias = _with_mix_after(model.encoder.conv_out, model.quant_conv)
    kept = [*range(count), *range(total, total + count)]  # means, then logarithms of variances
    _load(smaller.encoder, model.encoder, {"conv_out.weight": weight[kept], "conv_out.bias": bias[kept]})
    _become_identity(smaller.quant_conv)
    if model.auxiliary_decoder is not None:
        before, after = model.auxiliary_decoder, smaller.auxiliary_decoder
        weight, bias = _with_mix_before(before.decoder.conv_in, before.post_quant_conv)
        _load(after.decoder, before.decoder, {"conv_in.weight": weight[:, :count], "conv_in.bias": bias})
        _become_identity(after.post_quant_conv)
    return smaller


def _with_mix_after(convolution: nn.Conv2d, mix: nn.Conv2d | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of a convolution and the 1x1 convolution after it, as one."""
    weight, bias = convolution.weight.double(), convolution.bias.double()
    if mix is None:
        return weight, bias
    matrix = mix.weight.double()[:, :, 0, 0]
    return torch.einsum("om,mihw->oihw", matrix, weight), matrix @ bias + mix.bias.double()


def _with_mix_before(convolution: nn.Conv2d, mix: nn.Conv2d | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of a convolution and the 1x1 convolution before it, as one; at the border the mix's bias is too strong."""
    weight, bias = convolution.weight.double(), convolution.bias.double()
    if mix is None:
        return weight, bias
    matrix = mix.weight.double()[:, :, 0, 0]
    return torch.einsum("omhw,mi->oihw", weight, matrix), bias + weight.sum(dim=(2, 3)) @ mix.bias.double()


def _load(module: nn.Module, source: nn.Module, instead: dict[str, torch.Tensor]) -> None:
    module.load_state_dict({**source.state_dict(), **instead})


def _become_identity(convolution: nn.Conv2d | None) -> None:
    if convolution is not None:
        nn.init.dirac_(convolution.weight)
        nn.init.zeros_(convolution.bias)
