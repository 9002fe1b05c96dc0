"""Aligns hidden states of a transformer with the features of a frozen vision model (REPA)."""

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from dae_diffusers.errors import ConfigError, UserError
from dae_diffusers.losses.alignment import representation_alignment_loss
from dae_diffusers.losses.resizing import resize
from dae_diffusers.randomness import Stream, derived_seed
from dae_diffusers.vision import FrozenBackbone, load_backbone


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
        token (`int`): Side of a position, in pixels.
        weight (`float`): Weight of the term.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        backbone: FrozenBackbone,
        projector: nn.Module,
        block: nn.Module,
        token: int,
        weight: float,
    ):
        self.accelerator = accelerator
        self.backbone = backbone
        self.projector = projector
        self.token = token
        self.weight = weight
        self._hidden_states: torch.Tensor | None = None
        block.register_forward_hook(self._record)

    def _record(self, block: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        if torch.is_grad_enabled():  # not when samples are drawn
            self._hidden_states = output

    def term(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        r"""
        Computes the weighted term of the transformer's loss. Call it after the transformer.

        It costs a forward pass of the backbone, and a forward and backward pass of the projector. The transformer costs no more.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, 1 or 3, H, W)`): The images behind the latents, in [-1, 1].

        Returns:
            The term, and what to log.
        """
        hidden_states, self._hidden_states = self._hidden_states, None
        grid = tuple(side // self.token for side in pixel_values.shape[2:])
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
    config: Any, transformer: nn.Module, token: int, accelerator: Accelerator, seed: int
) -> RepresentationAlignment | None:
    r"""
    Makes REPA with its projector, prepared by `accelerator`; None without `repa_model`.

    Args:
        config: Settings with `repa_model`, `repa_weight`, `repa_layer` and `repa_projector_dim`.
        transformer ([`~dae_diffusers.DAEDiTTransformer2DModel`]): The transformer, not prepared yet.
        token (`int`): Side of the transformer's positions, in pixels.
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
    torch.manual_seed(derived_seed(seed, Stream.REPA_PROJECTION))
    dim = transformer.config.num_attention_heads * transformer.config.attention_head_dim
    projector = make_projector(dim, config.repa_projector_dim, backbone.patch_feature_dim)
    return RepresentationAlignment(
        accelerator, backbone, accelerator.prepare(projector), blocks[layer - 1], token, config.repa_weight
    )
