"""What a run's images are drawn from: a class, a text and further conditions, on their way from the data to the pipeline."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from dae_diffusers.data.batches import BatchDataset
from dae_diffusers.generators.conditions import CONDITION_ARGUMENTS, Conditions
from dae_diffusers.generators.text import TEXT_ARGUMENTS, Captions

# Names in batches, and arguments of the transformer.
DRAWN_FROM = ("class_labels", *TEXT_ARGUMENTS, *CONDITION_ARGUMENTS)
Batch = Mapping[str, torch.Tensor]


@dataclass
class Conditioning:
    r"""
    What a run's images are drawn from.

    Attributes:
        null_class (`int`): Stands for no class: the number of classes.
        dropout (`float`): Share of the samples that training draws from nothing, so that they can be guided.
        captions ([`Captions`], *optional*), conditions ([`Conditions`], *optional*): Texts, and what is neither class nor text.
    """

    null_class: int
    dropout: float
    captions: Captions | None = None
    conditions: Conditions | None = None

    @property
    def parts(self) -> list[Captions | Conditions]:
        r"""Those that there are."""
        return [part for part in (self.captions, self.conditions) if part is not None]

    @property
    def text_encoder(self) -> torch.nn.Module | None:
        r"""What encodes the texts; None without texts."""
        return None if self.captions is None else self.captions.model

    @property
    def fingerprints(self) -> dict[str, str]:
        r"""Of what is encoded or read, by what a message calls it."""
        names = {"the captions or their encoder": self.captions, "the conditions of the images": self.conditions}
        return {name: part.fingerprint for name, part in names.items() if part is not None}

    def transformer_kwargs(self) -> dict[str, Any]:
        r"""Arguments of the constructor of [`DAEDiTTransformer2DModel`]."""
        more = {} if self.conditions is None else self.conditions.transformer_kwargs()
        return {"cross_attention_dim": None if self.captions is None else self.captions.width, **more}

    def pipeline_kwargs(self) -> dict[str, Any]:
        r"""Arguments of the constructor of [`DAEDiTPipeline`]."""
        kwargs = {}
        if self.captions is not None:
            kwargs |= {"tokenizer": self.captions.tokenizer, "text_encoder": self.captions.model}
        if self.conditions is not None:
            kwargs |= {"conditions": self.conditions.config, "label_column": self.conditions.label_column}
        return kwargs

    def add_to(self, *data: BatchDataset) -> list[BatchDataset]:
        r"""Training and validation data, images or latents, with texts and conditions of each."""
        for part in self.parts:
            data = part.add_to(*data)
        return list(data)

    def example(self) -> dict[str, Any]:
        r"""A text and conditions of a validation image, for the model card."""
        found = {}
        if self.captions is not None:
            found["prompt"] = self.captions.images[1].captions[0][0]
        if self.conditions is not None:
            found["conditions"] = self.conditions.example()
        return found

    def with_dropout(self, batch: Batch, latents: torch.Tensor) -> dict[str, torch.Tensor]:
        r"""
        What a batch is drawn from, as arguments of the transformer: nothing for a share of the samples, which is drawn here. Where texts
        stand beside classes or conditions, the same share has no text, and another has no class, so that a call may name one alone.
        """
        if not any(name in batch for name in DRAWN_FROM):
            return {}

        def chosen() -> torch.Tensor:
            return torch.rand(len(latents), device=latents.device) < self.dropout

        everything = chosen()
        has_others = "class_labels" in batch or self.conditions is not None
        if self.captions is None or not has_others:
            return self._without(batch, everything)
        return self._without(batch, everything, no_class=chosen(), no_text=chosen())

    def nothing(self, batch: Batch, latents: torch.Tensor) -> dict[str, torch.Tensor]:
        r"""What stands for nothing, for all samples of a batch."""
        return self._without(batch, torch.ones(len(latents), dtype=torch.bool, device=latents.device))

    def _without(
        self,
        batch: Batch,
        is_dropped: torch.Tensor,
        *,
        no_class: torch.Tensor | Literal[False] = False,
        no_text: torch.Tensor | Literal[False] = False,
    ) -> dict[str, torch.Tensor]:
        given = {}
        if "class_labels" in batch:
            given["class_labels"] = torch.where(is_dropped | no_class, self.null_class, batch["class_labels"])
        if self.captions is not None:
            given |= self.captions.dropped(batch, is_dropped | no_text)
        if self.conditions is not None:
            given |= self.conditions.dropped(batch, is_dropped, self.dropout)
        return given
