"""Starts a transformer from given weights: what fits is taken over, and what is new begins so that it changes nothing."""

import json
import logging
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers import (
    DiffusionPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    ModelMixin,
    SchedulerMixin,
)
from diffusers.models.embeddings import LabelEmbedding

from dae_diffusers.autoencoders.loading import check_has_weights
from dae_diffusers.errors import UserError, one_line
from dae_diffusers.latents.cache import autoencoder_fingerprint
from dae_diffusers.pipelines.dae_dit import DAEDiTPipeline
from dae_diffusers.transformer_dae_dit import DAEDiTTransformer2DModel

logger = logging.getLogger(__name__)

_SIZES = ("patch_size", "num_layers", "num_attention_heads", "attention_head_dim")
_NORMALISATION = ("latents_mean", "latents_std", "scaling_factor", "shift_factor")
_INDEX = "model_index.json"


class _Layout(NamedTuple):
    """A class of transformers, and where it keeps what depends on the latents and on the classes."""

    model_class: type[ModelMixin]
    first: str  # layer
    last: str
    labels: str  # end of the name of a label table
    classes: str  # their number, in the config


_LAYOUTS = {
    layout.model_class.__name__: layout
    for layout in (
        _Layout(DAEDiTTransformer2DModel, "patch_embed", "proj_out", "label_embed.weight", "num_classes"),
        _Layout(DiTTransformer2DModel, "pos_embed.proj", "proj_out_2", "embedding_table.weight", "num_embeds_ada_norm"),
    )
}


@dataclass
class WarmStart:
    r"""
    Given weights of a transformer, and what its samples depend on besides.

    Attributes:
        name (`str`): Folder or Hub id.
        transformer ([`DAEDiTTransformer2DModel`] or [`~diffusers.DiTTransformer2DModel`]): The weights.
        scheduler ([`~diffusers.SchedulerMixin`]): Samples from it.
        is_flow_matching (`bool`): Whether it predicts the velocity of flow matching; if not, it is for diffusion.
        pipeline ([`DAEDiTPipeline`], *optional*): Where it comes from, with class names and autoencoder; None for a transformer
            alone.
        normalisation (`dict`, *optional*): For a resumed run: the normalisation of its latents, as an autoencoder's config says it.
        changes (`list[str]`): What is not as before, for the log.
    """

    name: str
    transformer: ModelMixin
    scheduler: SchedulerMixin
    is_flow_matching: bool = True
    pipeline: DAEDiTPipeline | None = None
    normalisation: dict[str, Any] | None = None
    changes: list[str] = field(default_factory=list)

    @classmethod
    def load(cls, name: str) -> "WarmStart":
        r"""
        Loads the weights of a transformer, float32.

        Args:
            name (`str`): Folder or Hub id of a pipeline with a diffusion transformer, or of a transformer alone; or the output
                folder of a run.

        Raises:
            UserError: If there is no such transformer, or it is damaged.
        """
        place = Path(name)
        places = [place / "pipeline", place.parent] if place.name == "transformer" else [place / "pipeline"]
        place = next((str(each) for each in places if (each / _INDEX).is_file()), name)  # with the names of its classes
        try:
            index = _index_of(place)
            start = cls._of_transformer(name) if index is None else cls._of_pipeline(name, place, index)
            check_has_weights(start.transformer)
        except UserError:
            raise
        except Exception as error:  # a damaged folder can fail in any way
            raise UserError(
                f"`pretrained_model_name_or_path` {name} cannot be loaded: {one_line(error, 300)} Give the folder or Hub id of a pipeline "
                "with a diffusion transformer, such as the folder `pipeline/` that training/train_dit.py writes."
            ) from None
        start.transformer.float()
        return start

    @classmethod
    def _of_pipeline(cls, name: str, place: str, index: dict[str, Any]) -> "WarmStart":
        class_name = (index.get("transformer") or [None, None])[1]
        if class_name not in _LAYOUTS or not {"vae", "scheduler"} <= index.keys():
            raise UserError(
                f"`pretrained_model_name_or_path` {name} is a {index.get('_class_name')}, which has no diffusion transformer that "
                f"training can start from. Give a pipeline with a {' or '.join(_LAYOUTS)}."
            )
        pipeline = DAEDiTPipeline.from_pretrained(place)
        check_has_weights(pipeline.vae)
        scheduler = _without_variance(pipeline.scheduler)
        return cls(name, pipeline.transformer, scheduler, pipeline.is_flow_matching, pipeline)

    @classmethod
    def _of_transformer(cls, name: str) -> "WarmStart":
        class_name = DAEDiTTransformer2DModel.load_config(name).get("_class_name")
        if class_name not in _LAYOUTS:
            raise UserError(
                f"`pretrained_model_name_or_path` {name} is of class {class_name}, but training starts from a {' or '.join(_LAYOUTS)}, "
                "or from a pipeline with one. An autoencoder belongs to `vae`."
            )
        if class_name == DiTTransformer2DModel.__name__:
            raise UserError(
                f"`pretrained_model_name_or_path` {name} is a {class_name} alone, which does not tell what it predicts, and for "
                "which noise levels. Give its pipeline, whose scheduler tells."
            )
        return cls(name, DAEDiTTransformer2DModel.from_pretrained(name), FlowMatchEulerDiscreteScheduler())

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "WarmStart":
        r"""What a checkpoint holds of it; the weights follow with the checkpoint."""
        transformer = _LAYOUTS[state["transformer"]["_class_name"]].model_class.from_config(state["transformer"])
        scheduler = getattr(diffusers, state["scheduler"]["_class_name"]).from_config(state["scheduler"])
        return cls(
            state["name"], transformer, scheduler, state["is_flow_matching"], normalisation=state["normalisation"]
        )

    @property
    def shift(self) -> float:
        r"""The scheduler's shift of the noise levels, for flow matching."""
        return self.scheduler.config.get("shift") or self.scheduler.config.get("flow_shift") or 1.0

    def state(self, vae: ModelMixin) -> dict[str, Any]:
        r"""What a checkpoint holds, as JSON can hold it, so that a resumed run needs the given weights no more."""
        return {
            "name": self.name,
            "transformer": json.loads(self.transformer.to_json_string()),
            "scheduler": json.loads(self.scheduler.to_json_string()),
            "is_flow_matching": self.is_flow_matching,
            "normalisation": _normalisation_of(vae),
        }

    def architecture(self, given: dict[str, int]) -> dict[str, int]:
        r"""
        The sizes of the transformer, with another `patch_size` if one is given.

        Raises:
            UserError: If another depth or width is given than the weights have.
        """
        sizes = {name: self.transformer.config[name] for name in _SIZES}
        other = [name for name, value in given.items() if name != "patch_size" and value != sizes[name]]
        if other:
            raise UserError(
                f"`pretrained_model_name_or_path` {self.name} has {_listed(sizes, other)}, but {_listed(given, other)} was asked for. "
                "Leave `model` and these settings out: only the patch size may change."
            )
        return {**sizes, **given}

    def normalise(self, vae: ModelMixin) -> bool:
        r"""
        Makes an autoencoder with the same encoder normalise its latents as the transformer knows them.

        Returns:
            `bool`: Whether that settles how the latents are normalised.
        """
        known = self.normalisation
        if known is None and self.pipeline is not None:
            if autoencoder_fingerprint(vae) == autoencoder_fingerprint(self.pipeline.vae):
                known = _normalisation_of(self.pipeline.vae)
            else:
                self.changes.append("its latents came from another encoder")
        if known is None:
            return False
        if known != _normalisation_of(vae):
            vae.register_to_config(**known)
            self.changes.append("latents are normalised as they were, not as in the config of `--vae`")
        return True

    def continued(
        self, sample_size: int, in_channels: int, patch_size: int, id2label: dict[int, str] | None
    ) -> ModelMixin:
        r"""
        The transformer for other latents and other classes.

        - With the same latents and classes, every weight stays.
        - A class of the same name keeps its row of the label table, as the null class does. A new class begins with the row of the
          null class. A model without classes gets a table of zeros. A model that loses its classes goes on as at its null class.
        - For another number of channels or another patch size, the first and the last layer are new; the last is zero.
        - Positions are numbers of rows and columns, so that another size continues them.
        - A learned variance is dropped: the loss does not train it.

        Args:
            sample_size, in_channels, patch_size (`int`): As in [`DAEDiTTransformer2DModel`].
            id2label (`dict[int, str]`, *optional*): Names of the classes; None without classes.

        Raises:
            UserError: If the transformer cannot do without classes, and there are none.
        """
        old, layout = self.transformer, _LAYOUTS[type(self.transformer).__name__]
        if self.normalisation is not None:  # of a checkpoint: it was made for these latents and classes
            return _without_dropout(old)
        before, is_stock = old.config, layout.model_class is DiTTransformer2DModel
        if id2label is None and is_stock:
            raise UserError(
                f"`pretrained_model_name_or_path` {self.name} has a DiTTransformer2DModel, which needs classes, but the images have "
                "none. Put them into a sub-folder, which is a class, or name their `label_column`."
            )
        num_before, outputs = before[layout.classes], before.out_channels or before.in_channels
        self.transformer = new = layout.model_class.from_config(
            before,
            sample_size=sample_size,
            in_channels=in_channels,
            patch_size=patch_size,
            out_channels=None if before.out_channels is None else in_channels,
            **{layout.classes: None if id2label is None else len(id2label)},
        )
        is_new = (before.in_channels, before.patch_size) != (in_channels, patch_size)
        is_new |= outputs != in_channels and not is_stock
        rows = self._rows(num_before, id2label)
        taken, state = old.state_dict(), new.state_dict()
        for name, value in state.items():
            layer = name.rpartition(".")[0]
            if name.endswith(layout.labels):
                state[name] = taken[name][rows] if rows else torch.zeros_like(value)
            elif is_new and layer in (layout.first, layout.last):
                state[name] = torch.zeros_like(value) if layer == layout.last else value
            elif is_stock and layer == layout.last:  # its rows: the pixels of a patch, each with its channels
                state[name] = taken[name].unflatten(0, (-1, outputs))[:, :in_channels].flatten(0, 1)
            else:
                state[name] = taken[name]
        if num_before is not None and id2label is None:
            state["time_embed.linear_2.bias"] = taken["time_embed.linear_2.bias"] + taken[layout.labels][-1]
        new.load_state_dict(state)
        self._tell(before, is_new, outputs)
        self.pipeline = None  # frees the old weights
        return _without_dropout(new)

    def _rows(self, num_before: int | None, id2label: dict[int, str] | None) -> list[int]:
        """The row of the old label table for each new class, and for no class; empty without an old or a new table."""
        if num_before is None or id2label is None:
            if num_before is not None or id2label is not None:
                self.changes.append("it had no classes" if num_before is None else "its classes are left out")
            return []
        names = [id2label[number] for number in sorted(id2label)]
        if self.pipeline is not None and self.pipeline.id2label:
            rows = [self._row_of(name, num_before) for name in names]
        else:  # the classes of the weights have numbers only
            rows = list(range(num_before)) if len(names) == num_before else [None] * len(names)
        begun = [name for name, row in zip(names, rows, strict=True) if row is None]
        if begun:
            some = ", ".join(begun[:10]) + (", ..." if len(begun) > 10 else "")
            self.changes.append(f"{len(begun)} of {len(names)} classes are new and begin as the null class ({some})")
        left_out = num_before - len(set(rows) - {None})
        if left_out:
            self.changes.append(f"{left_out} of its {num_before} classes are left out")
        return [num_before if row is None else row for row in rows] + [num_before]

    def _row_of(self, name: str, num_before: int) -> int | None:
        try:
            (row,) = self.pipeline.get_label_ids(name)
        except ValueError:  # unknown, or a name of several
            return None
        return row if row < num_before else None

    def _tell(self, before: dict[str, Any], is_new: bool, outputs: int) -> None:
        """Logs what was taken over, and what was not."""
        now = self.transformer.config
        if is_new:
            was, is_now = (
                f"{each['in_channels']} channels in patches of {each['patch_size']}" for each in (before, now)
            )
            self.changes.append(f"first and last layer are new (latents of {is_now}, before: {was})")
        elif outputs != now.in_channels:
            self.changes.append("its learned variance is left out")
        if before["sample_size"] != now.sample_size:
            self.changes.append(f"latents are {now.sample_size} wide (before: {before['sample_size']})")
        logger.info(
            "starting from the weights of %s, which predict %s. %s",
            self.name,
            "velocities" if self.is_flow_matching else f"as for its {type(self.scheduler).__name__}",
            f"Not as before: {'; '.join(self.changes)}." if self.changes else "Everything is as before.",
        )


def _index_of(place: str) -> dict[str, Any] | None:
    """The index of a pipeline; None for what is none. Raises OSError if it is damaged."""
    try:
        return DiffusionPipeline.load_config(place)
    except OSError:
        if (Path(place) / _INDEX).exists():
            raise
        return None


def _without_dropout(transformer: ModelMixin) -> ModelMixin:
    """The stock class would drop labels by itself, in each block another one; see `class_dropout_prob`."""
    for module in transformer.modules():
        if isinstance(module, LabelEmbedding):
            module.dropout_prob = 0
    return transformer


def _without_variance(scheduler: SchedulerMixin) -> SchedulerMixin:
    """The scheduler for a transformer that predicts no variance."""
    if "learned" not in str(scheduler.config.get("variance_type")):
        return scheduler
    default = signature(type(scheduler).__init__).parameters["variance_type"].default
    return type(scheduler).from_config(scheduler.config, variance_type=default)


def _normalisation_of(vae: ModelMixin) -> dict[str, Any]:
    return {name: vae.config.get(name) for name in _NORMALISATION}


def _listed(values: dict[str, int], names: list[str]) -> str:
    return ", ".join(f"`{name}` {values[name]}" for name in names)
