"""Transfers a transformer's weights to one for other latents or classes. New parts start without effect."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from diffusers import DiTTransformer2DModel, ModelMixin
from diffusers.models.embeddings import LabelEmbedding

from dae_diffusers.sizes import words_of_size
from dae_diffusers.transformer_dae_dit import DAEDiTTransformer2DModel

_OF_CONDITIONS = ("attribute_embeds.", "continuous_embeds.", "condition_embed.")  # beginnings of those of its weights
_ALWAYS_ADDED = "time_embed.linear_2.bias"  # what a part adds that does not vary any more
_OF_INTERVAL = "interval_embed."
NEW_INTERVAL = "steps have a second noise level"  # what becomes of a transformer that is distilled, in words
_OF_TEXT = ("text_embed.", ".cross_attn.")  # in the names of its weights


class _Layout(NamedTuple):
    """A class of transformers, and where it keeps what depends on latents and classes."""

    model_class: type[ModelMixin]
    first: str  # layer
    last: str
    labels: str  # end of the name of a label table
    classes: str  # their number, in the config


class OldConditions(NamedTuple):
    """
    The place in the old transformer of each condition of the new one.

    Attributes:
        attributes: For each attribute the old one's place, or None if it is new, and for each of its classes the old number or None.
        numbers: For each number its old place, or None if it is new.
        image_channels: Of the condition image on the latents' grid; 0 without one.
        has_same_image: Whether it was there.
    """

    attributes: list[tuple[int | None, list[int | None]]] = []
    numbers: list[int | None] = []
    image_channels: int = 0
    has_same_image: bool = True


LAYOUTS = {
    layout.model_class.__name__: layout
    for layout in (
        _Layout(DAEDiTTransformer2DModel, "patch_embed", "proj_out", "label_embed.weight", "num_classes"),
        _Layout(DiTTransformer2DModel, "pos_embed.proj", "proj_out_2", "embedding_table.weight", "num_embeds_ada_norm"),
    )
}


def layout_of(transformer: ModelMixin) -> _Layout:
    r"""The layout of a [`DAEDiTTransformer2DModel`] or a [`~diffusers.DiTTransformer2DModel`]."""
    return LAYOUTS[type(transformer).__name__]


def take_over(
    old: ModelMixin,
    *,
    sample_size: int,
    in_channels: int,
    patch_size: int,
    rows: list[int | None] | None,
    cross_attention_dim: int | None = None,
    conditions: OldConditions = OldConditions(),  # noqa: B008, it cannot change
    flow_map: bool = False,
) -> tuple[ModelMixin, list[str]]:
    r"""
    Makes a transformer for other latents or classes, with the weights of another one.

    - For the same latents and classes, every weight stays.
    - A known class keeps its row of the label table, as the null class does. A new class begins with the row of the null class. A
      model without classes gets a table of zeros. A model that loses its classes goes on as at its null class.
    - For another number of channels or another patch size, the first and the last layer are new. The last is zero.
    - Positions are numbers of rows and columns, so that another size continues them.
    - Text is new where the model knew none, or hidden states of another width. At the beginning it changes nothing.
    - Attributes, numbers and a condition image that are new change nothing at the beginning. What is left out goes on as unknown.
    - A flow map's second noise level changes nothing at the beginning where it is new. Left out, the model goes on as at a step
      of length 0.
    - A learned variance is dropped: our losses do not train it.

    Args:
        old ([`DAEDiTTransformer2DModel`] or [`~diffusers.DiTTransformer2DModel`]): The weights; they do not change.
        sample_size, in_channels, patch_size (`int`): As in [`DAEDiTTransformer2DModel`].
        rows (`list[int | None]`, *optional*): For each new class its old number, or None if it is new; None without classes, which the
            stock class cannot be.
        cross_attention_dim (`int`, *optional*): As in [`DAEDiTTransformer2DModel`]; None without text. The stock class takes none.
        conditions ([`OldConditions`], *optional*): Attributes, numbers and image; the stock class takes none.
        flow_map (`bool`, *optional*): As in [`DAEDiTTransformer2DModel`]; the stock class can be none.

    Returns:
        `tuple[ModelMixin, list[str]]`: A transformer of the same class, and what is not as before, in words.
    """
    layout, before, is_stock = layout_of(old), old.config, isinstance(old, DiTTransformer2DModel)
    null, outputs = before[layout.classes], _outputs(before)
    ours = {"cross_attention_dim": cross_attention_dim, "flow_map": flow_map, **_counts(conditions)}
    new = layout.model_class.from_config(
        before,
        sample_size=sample_size,
        in_channels=in_channels,
        patch_size=patch_size,
        out_channels=None if before.out_channels is None else in_channels,
        **{layout.classes: None if rows is None else len(rows)},
        **({} if is_stock else ours),
    )
    has_new_text = cross_attention_dim not in (None, before.get("cross_attention_dim"))
    has_new_ends = _has_new_ends(old, new)
    taken, state = old.state_dict(), new.state_dict()
    for name, value in state.items():
        layer = name.rpartition(".")[0]
        if name.endswith(layout.labels):
            numbers = [null if row is None else row for row in (*rows, None)]
            state[name] = torch.zeros_like(value) if null is None else taken[name][numbers]
        elif has_new_text and any(part in name for part in _OF_TEXT):
            state[name] = value
        elif name.startswith(_OF_INTERVAL):
            state[name] = taken.get(name, value)
        elif name.startswith(_OF_CONDITIONS):
            state[name] = _condition_weight(name, value, taken, conditions)
        elif has_new_ends and layer in (layout.first, layout.last):
            state[name] = torch.zeros_like(value) if layer == layout.last else value
        elif is_stock and layer == layout.last:  # its rows: the pixels of a patch, each with its channels
            state[name] = taken[name].unflatten(0, (-1, outputs))[:, :in_channels].flatten(0, 1)
        else:
            state[name] = taken[name]
    if null is not None and rows is None:
        state[_ALWAYS_ADDED] = state[_ALWAYS_ADDED] + taken[layout.labels][null]
    if before.get("flow_map", False) and not flow_map:
        with torch.no_grad():
            state[_ALWAYS_ADDED] = state[_ALWAYS_ADDED] + old.interval_embed(old.time_proj(torch.zeros(1)))[0]
    new.load_state_dict(state)

    return new, _changes(old, new, conditions)


def _changes(old: ModelMixin, new: ModelMixin, conditions: OldConditions) -> list[str]:
    """What is not as before, in words."""
    before, now, changes = old.config, new.config, []
    if _has_new_ends(old, new):
        was, is_now = (f"{each.in_channels} channels in patches of {each.patch_size}" for each in (before, now))
        changes.append(f"first and last layer are new (latents of {is_now}, before: {was})")
    elif _outputs(before) != now.in_channels:
        changes.append("its learned variance is left out")
    layers = [getattr(each, "condition_embed", None) for each in (old, new)]
    shapes = {each.weight.shape for each in layers if each is not None}
    if conditions.has_same_image and len(shapes) > 1:
        changes.append("the layer of its condition image is new")
    width, of_text = before.get("cross_attention_dim"), now.get("cross_attention_dim")
    if of_text not in (None, width):
        changes.append("its text is new" if width else "text is new")
    elif width and of_text is None:
        changes.append("its text is left out")
    was_flow_map = before.get("flow_map", False)
    if was_flow_map != now.get("flow_map", False):
        changes.append("its steps' second noise level is left out" if was_flow_map else NEW_INTERVAL)
    sizes = [words_of_size(each.sample_size) for each in (now, before)]
    if sizes[0] != sizes[1]:
        changes.append("latents are {} (before: {})".format(*sizes))
    return changes


def _has_new_ends(old: ModelMixin, new: ModelMixin) -> bool:
    """Whether the first and the last layer cannot be taken over."""
    before, now = old.config, new.config
    is_new = (before.in_channels, before.patch_size) != (now.in_channels, now.patch_size)
    return is_new or (_outputs(before) != now.in_channels and not isinstance(old, DiTTransformer2DModel))


def _outputs(config: Mapping[str, Any]) -> int:
    return config["out_channels"] or config["in_channels"]


def _counts(conditions: OldConditions) -> dict[str, Any]:
    """Arguments of the constructor."""
    return {
        "num_attribute_classes": [len(rows) for _, rows in conditions.attributes] or None,
        "num_continuous": len(conditions.numbers),
        "condition_channels": conditions.image_channels,
    }


def _condition_weight(
    name: str, value: torch.Tensor, taken: dict[str, torch.Tensor], conditions: OldConditions
) -> torch.Tensor:
    """A weight of the conditions: the old one, or one that adds nothing at first."""
    part, *rest = name.split(".")
    if part == "condition_embed":
        old = taken.get(name) if conditions.has_same_image else None
        return torch.zeros_like(value) if old is None or old.shape != value.shape else old
    number, end = int(rest[0]), ".".join(rest[1:])
    place, rows = conditions.attributes[number] if part == "attribute_embeds" else (conditions.numbers[number], [])
    if place is None:  # a new one adds nothing at first: all its layers but the first are zero
        return value if end.startswith("linear_1") else torch.zeros_like(value)
    old = taken[f"{part}.{place}.{end}"]  # the last row of a table is that of an unknown class, and zero
    return old[[-1 if row is None else row for row in (*rows, None)]] if rows else old


def without_label_dropout(transformer: ModelMixin) -> ModelMixin:
    r"""The stock class would drop labels by itself, in each block others. Ours are dropped once a sample, before it."""
    for module in transformer.modules():
        if isinstance(module, LabelEmbedding):
            module.dropout_prob = 0
    return transformer
