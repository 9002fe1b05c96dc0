"""Aligns latents of an autoencoder (VF loss) or hidden states of a transformer (REPA) with the features of a frozen vision model."""

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from dae_diffusers.engine.precision import loss_scale
from dae_diffusers.errors import ConfigError, UserError
from dae_diffusers.losses.adaptive_weight import adaptive_weight
from dae_diffusers.losses.alignment import (
    marginal_cosine_loss,
    marginal_distance_matrix_loss,
    representation_alignment_loss,
)
from dae_diffusers.losses.resizing import resize
from dae_diffusers.randomness import derived_seed
from dae_diffusers.vision import FrozenBackbone, load_backbone


@dataclass(frozen=True)
class LatentAlignmentSettings:
    r"""
    Settings of the VF loss. The defaults come from public re-implementations, except the cap.

    Attributes:
        weight (`float`): Weight of the term, multiplied by the adaptive weight.
        cosine_margin, distance_margin (`float`): Margins of the two losses.
        adaptive_weight_cap (`float`): Upper bound of the adaptive weight, the ratio of the gradients' norms at the encoder's
            last layer; 0: no adaptive weight.
    """

    weight: float = 0.1
    cosine_margin: float = 0.5
    distance_margin: float = 0.25
    adaptive_weight_cap: float = 100.0


class LatentAlignment:
    r"""
    The VF loss of VA-VAE: [`marginal_cosine_loss`] plus [`marginal_distance_matrix_loss`] between linearly projected latents
    and the features of the same images in a frozen vision model.

    Both losses see the projected latents. The projection trains with the autoencoder: put its
    parameters into the same optimiser, and both models into `accelerator.accumulate`.

    Args:
        accelerator ([`~accelerate.Accelerator`]): The run's accelerator.
        backbone ([`~dae_diffusers.vision.FrozenBackbone`]): The vision model, on the accelerator's device.
        projection (`nn.Module`): Latents `(B, C, h, w)` to `(B, D, h, w)`, prepared by `accelerator`.
        settings ([`LatentAlignmentSettings`]): Weights and margins.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        backbone: FrozenBackbone,
        projection: nn.Module,
        settings: LatentAlignmentSettings,
    ):
        self.accelerator = accelerator
        self.backbone = backbone
        self.projection = projection
        self.settings = settings

    def term(
        self, latents: torch.Tensor, pixel_values: torch.Tensor, other_loss: torch.Tensor, last_layer: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        r"""
        Computes the weighted term of the autoencoder's loss.

        It costs a forward pass of the backbone, a 1x1 convolution and the distance matrices; with the adaptive weight also a
        second backward pass through these and through the decoder, which leads from `other_loss` to the encoder.

        Args:
            latents (`torch.Tensor` of shape `(B, C, h, w)`): Latents with their graph.
            pixel_values (`torch.Tensor` of shape `(B, 1 or 3, H, W)`): The images that they encode, unmasked, in [-1, 1].
            other_loss (`torch.Tensor`): Scalar: the reconstruction loss that the term is balanced with.
            last_layer (`torch.Tensor`): The encoder's last weight.

        Returns:
            The term, and what to log.
        """
        with self.accelerator.autocast():
            features = self.backbone.patch_features(pixel_values)
        features = resize(features, tuple(latents.shape[2:]))
        projected = self.projection(latents)
        cosine = marginal_cosine_loss(projected, features, self.settings.cosine_margin)
        distance = marginal_distance_matrix_loss(projected, features, self.settings.distance_margin)
        loss = cosine + distance
        logs = {"vf_cosine_loss": cosine, "vf_distance_loss": distance}
        if self.settings.adaptive_weight_cap > 0:
            cap, scale = self.settings.adaptive_weight_cap, loss_scale(self.accelerator)
            adaptive = adaptive_weight(other_loss, loss, last_layer, cap=cap, scale=scale)
            logs["vf_adaptive_weight"] = adaptive
            loss = adaptive * loss
        return self.settings.weight * loss, logs


class RepresentationAlignment:
    r"""
    REPA: [`representation_alignment_loss`] between the projected output of one of a transformer's blocks and the features of
    the clean images in a frozen vision model.

    A hook on the block takes its output, so the transformer, its wrappers and the exported model do not change. The
    projector trains with the transformer: put its parameters into the same optimiser, and both models into
    `accelerator.accumulate`.

    Args:
        accelerator ([`~accelerate.Accelerator`]): The run's accelerator.
        backbone ([`~dae_diffusers.vision.FrozenBackbone`]): The vision model, on the accelerator's device.
        projector (`nn.Module`): Maps hidden states `(B, N, dim)` to `(B, N, D)`, prepared by `accelerator`.
        block (`nn.Module`): Returns hidden states `(B, N, dim)`, the positions row by row.
        weight (`float`): Weight of the term.
    """

    def __init__(
        self, accelerator: Accelerator, backbone: FrozenBackbone, projector: nn.Module, block: nn.Module, weight: float
    ):
        self.accelerator = accelerator
        self.backbone = backbone
        self.projector = projector
        self.weight = weight
        self._hidden_states: torch.Tensor | None = None
        block.register_forward_hook(self._record)

    def _record(self, block: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        if torch.is_grad_enabled():  # not when samples are drawn
            self._hidden_states = output

    def term(self, pixel_values: torch.Tensor, grid: tuple[int, int]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        r"""
        Computes the weighted term of the transformer's loss. Call it after the transformer.

        It costs a forward pass of the backbone, and a forward and backward pass of the projector. The transformer costs no more.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, 1 or 3, H, W)`): The images behind the latents, in [-1, 1].
            grid (`tuple[int, int]`): Rows and columns of the transformer's positions.

        Returns:
            The term, and what to log.
        """
        hidden_states, self._hidden_states = self._hidden_states, None
        with self.accelerator.autocast():
            features = self.backbone.patch_features(pixel_values)
        projected = self.projector(hidden_states).transpose(1, 2).unflatten(2, grid)
        loss = representation_alignment_loss(projected, resize(features, grid))
        return self.weight * loss, {"repa_loss": loss}


def make_projector(hidden_dim: int, projector_dim: int, feature_dim: int) -> nn.Sequential:
    r"""REPA's projector: three linear layers with SiLU between them, for hidden states `(..., hidden_dim)`."""
    return nn.Sequential(
        nn.Linear(hidden_dim, projector_dim),
        nn.SiLU(),
        nn.Linear(projector_dim, projector_dim),
        nn.SiLU(),
        nn.Linear(projector_dim, feature_dim),
    )


def make_representation_alignment(
    config: Any, transformer: nn.Module, accelerator: Accelerator, seed: int
) -> RepresentationAlignment | None:
    r"""
    Makes REPA with its projector, prepared by `accelerator`; None without `repa_model`.

    Args:
        config: Settings with `repa_model`, `repa_weight`, `repa_layer` and `repa_projector_dim`.
        transformer ([`~dae_diffusers.DAEDiTTransformer2DModel`]): The transformer, not prepared yet.
        accelerator ([`~accelerate.Accelerator`]): The run's accelerator.
        seed (`int`): Seed of the run.

    Raises:
        ConfigError: Under FSDP and DeepSpeed, which train only one model.
        UserError: If the vision model cannot be used.
    """
    if config.repa_model is None:
        return None
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ConfigError("`repa_model` trains a second model, which FSDP and DeepSpeed do not take; use DDP.")
    blocks = transformer.transformer_blocks
    layer = max(1, len(blocks) // 3) if config.repa_layer is None else config.repa_layer
    if not 1 <= layer <= len(blocks):
        raise UserError(f"`repa_layer` is {layer}, but the transformer has blocks 1 to {len(blocks)}.")
    backbone = load_backbone(config.repa_model).to(accelerator.device)
    torch.manual_seed(derived_seed(seed, 9))
    dim = transformer.config.num_attention_heads * transformer.config.attention_head_dim
    projector = make_projector(dim, config.repa_projector_dim, backbone.patch_feature_dim)
    return RepresentationAlignment(
        accelerator, backbone, accelerator.prepare(projector), blocks[layer - 1], config.repa_weight
    )
