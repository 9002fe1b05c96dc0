"""Given weights that the training of a transformer starts from, and what their samples depend on besides."""

import json
import logging
import warnings
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    DiffusionPipeline,
    DiTTransformer2DModel,
    ModelMixin,
    SchedulerMixin,
)

from dae_diffusers.autoencoders.loading import check_has_weights
from dae_diffusers.data.classes import class_name
from dae_diffusers.errors import UserError, one_line
from dae_diffusers.generators.denoising import flow_scheduler
from dae_diffusers.generators.take_over import (
    LAYOUTS,
    NEW_INTERVAL,
    OldConditions,
    layout_of,
    take_over,
    without_label_dropout,
)
from dae_diffusers.guidance import ALL_LEVELS
from dae_diffusers.latents.statistics import set_statistics
from dae_diffusers.pipelines.dae_dit import DAEDiTPipeline, columns_of
from dae_diffusers.settings import without_paths
from dae_diffusers.transformer_dae_dit import DAEDiTTransformer2DModel
from dae_diffusers.weights import STATISTICS, autoencoder_fingerprint, weights_fingerprint

logger = logging.getLogger(__name__)

_SIZES = ("patch_size", "num_layers", "num_attention_heads", "attention_head_dim")
_INDEX = DiffusionPipeline.config_name


@dataclass
class WarmStart:
    r"""
    Given weights of a transformer, and what its samples depend on besides.

    Attributes:
        name (`str`): Folder or Hub id.
        transformer ([`DAEDiTTransformer2DModel`] or [`~diffusers.DiTTransformer2DModel`]): The weights.
        scheduler ([`~diffusers.SchedulerMixin`]): Samples from it.
        is_flow_matching (`bool`): Whether it predicts the velocity of flow matching; if not, it is for diffusion.
        pipeline ([`DAEDiTPipeline`], *optional*): Where it comes from, with the names of its classes; None for a transformer alone.
        encoder (`str`, *optional*): Fingerprint of the encoder of its latents.
        statistics (`dict`, *optional*): What the config of its autoencoder says of the latents' statistics.
        guidance_interval (pair of `float`): The noise levels between which its pipeline guides by default.
        is_resumed (`bool`): Whether a checkpoint holds newer weights.
        changes (`list[str]`): What is not as before, for the log.
        teachers (`list[ModelMixin]`): What a flow map learns from, frozen, once [`continued`] has made it: the given transformer, and
            the weaker one that guides it, if there is one.
    """

    name: str
    transformer: ModelMixin
    scheduler: SchedulerMixin
    is_flow_matching: bool = True
    pipeline: DAEDiTPipeline | None = None
    encoder: str | None = None
    statistics: dict[str, Any] | None = None
    guidance_interval: tuple[float, float] = ALL_LEVELS
    is_resumed: bool = False
    changes: list[str] = field(default_factory=list)
    teachers: list[ModelMixin] = field(default_factory=list)

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
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*local_dir_use_symlinks")  # of diffusers to the Hub's client
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
        if class_name not in LAYOUTS or not {"vae", "scheduler"} <= index.keys():
            raise UserError(
                f"`pretrained_model_name_or_path` {name} is a {index.get('_class_name')}, which has no diffusion transformer that "
                f"training can start from. Give a pipeline with a {' or '.join(LAYOUTS)}."
            )
        pipeline = DAEDiTPipeline.from_pretrained(place)
        check_has_weights(pipeline.vae)
        return cls.from_pipeline(name, pipeline)

    @classmethod
    def from_pipeline(cls, name: str, pipeline: DAEDiTPipeline) -> "WarmStart":
        r"""From a loaded pipeline."""
        return cls(
            name,
            pipeline.transformer,
            _without_variance(pipeline.scheduler),
            pipeline.is_flow_matching,
            pipeline=pipeline,
            encoder=autoencoder_fingerprint(pipeline.vae),
            statistics={name: pipeline.vae.config.get(name) for name in STATISTICS},
            guidance_interval=pipeline.call_defaults["guidance_interval"],
        )

    @classmethod
    def _of_transformer(cls, name: str) -> "WarmStart":
        class_name = DAEDiTTransformer2DModel.load_config(name).get("_class_name")
        if class_name not in LAYOUTS:
            raise UserError(
                f"`pretrained_model_name_or_path` {name} is of class {class_name}, but training starts from a {' or '.join(LAYOUTS)}, "
                "or from a pipeline with one. An autoencoder belongs to `vae`."
            )
        if class_name == DiTTransformer2DModel.__name__:
            raise UserError(
                f"`pretrained_model_name_or_path` {name} is a {class_name} alone, which does not tell what it predicts, and for "
                "which noise levels. Give its pipeline, whose scheduler tells."
            )
        return cls(name, DAEDiTTransformer2DModel.from_pretrained(name), flow_scheduler())

    @classmethod
    def from_state(cls, state: dict[str, Any], name: str | None = None) -> "WarmStart":
        r"""
        What a checkpoint holds of it; the weights follow with the checkpoint. A flow map learns from what lies at `name` now.
        """
        transformer = LAYOUTS[state["transformer"]["_class_name"]].model_class.from_config(state["transformer"])
        scheduler = getattr(diffusers, state["scheduler"]["_class_name"]).from_config(state["scheduler"])
        interval = tuple(state.get("guidance_interval", ALL_LEVELS))
        return cls(
            name or state["name"],
            transformer,
            scheduler,
            state["is_flow_matching"],
            guidance_interval=interval,
            is_resumed=True,
        )

    @property
    def shift(self) -> float:
        r"""The scheduler's shift of the noise levels, for flow matching."""
        return self.scheduler.config.get("shift") or self.scheduler.config.get("flow_shift") or 1.0

    @property
    def conditions(self) -> dict[str, dict[str, Any]] | None:
        r"""What its pipeline draws from besides a class and a text; None if that is not known."""
        return None if self.pipeline is None else self.pipeline.conditions

    @property
    def is_flow_map(self) -> bool:
        r"""Whether it draws in a few steps, with its guidance in it."""
        return bool(self.transformer.config.get("flow_map"))

    @property
    def guide(self) -> ModelMixin | None:
        r"""The weaker transformer that guides the given one in its pipeline."""
        return None if self.pipeline is None else self.pipeline.guidance_transformer

    def check_distillation(self, guidance_scale: float) -> None:
        r"""
        Checks that a flow map can learn from the transformer. That of a resumed run has been checked.

        Args:
            guidance_scale (`float`): Of the transformer.

        Raises:
            UserError: If none can, or nothing guides the transformer.
        """
        what = None
        if self.is_resumed:
            return
        if self.is_flow_map:
            what = "draws in a few steps already"
        elif isinstance(self.transformer, DiTTransformer2DModel):
            what = "is of diffusers' class DiTTransformer2DModel"
        elif self.pipeline is None:
            what = "comes without its pipeline, which knows the names of its classes and its autoencoder"
        if what is not None:
            raise UserError(
                f"`distill_guidance_scale`: the transformer of {self.name} {what}. Give a pipeline that training/train_dit.py "
                "wrote without this flag."
            )
        is_drawn_from = self.pipeline.null_class is not None or self.pipeline.takes_text or self.conditions
        if guidance_scale != 1 and not is_drawn_from and self.guide is None:
            raise UserError(
                f"`distill_guidance_scale` is {guidance_scale:g}, but nothing guides {self.name}: it has neither classes, texts, "
                "conditions nor a `guidance_transformer`. Give 1, or train it with `autoguidance_steps` first."
            )

    def state(self, scheduler: SchedulerMixin) -> dict[str, Any]:
        r"""
        What a checkpoint holds, as JSON can hold it, so that a resumed run needs the given weights no more.

        Args:
            scheduler ([`~diffusers.SchedulerMixin`]): Samples from the trained transformer; a new one after a flow map.
        """
        transformer = json.loads(self.transformer.to_json_string())
        transformer.pop("_name_or_path", None)
        return {
            "name": without_paths(self.name),
            "transformer": transformer,
            "scheduler": json.loads(scheduler.to_json_string()),
            "is_flow_matching": self.is_flow_matching,
            "guidance_interval": list(self.guidance_interval),
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

    def settles_statistics(self, vae: ModelMixin) -> bool:
        r"""
        Gives an autoencoder with the same encoder the statistics of its latents that the transformer knows, or none if it knows none.

        Returns:
            `bool`: Whether the encoder is the same.
        """
        if self.encoder is None:
            return False
        if autoencoder_fingerprint(vae) != self.encoder:
            self.changes.append("the latents are those of another encoder, so its first samples are noise")
            return False
        before = dict(vae.config)
        set_statistics(vae, self.statistics)
        if any(vae.config[name] != before.get(name) for name in self.statistics):
            logger.info("latents are normalised as in %s, not as the config of `--vae` says", self.name)
        return True

    def continued(
        self,
        sample_size: int,
        in_channels: int,
        patch_size: int,
        id2label: dict[int, str] | None,
        text_encoder: torch.nn.Module | None = None,
        conditions: dict[str, dict[str, Any]] | None = None,
        condition_channels: int = 0,
        flow_map: bool = False,
    ) -> ModelMixin:
        r"""
        The transformer to train: for these latents and classes, with the given weights. Says in the log what is not as before.

        Args:
            sample_size, in_channels, patch_size (`int`): As in [`DAEDiTTransformer2DModel`].
            id2label (`dict[int, str]`, *optional*): Names of the classes; None without classes.
            text_encoder (`torch.nn.Module`, *optional*): Encodes the captions; None without captions.
            conditions (`dict`, *optional*): As [`DAEDiTPipeline`] has them; None without conditions.
            condition_channels (`int`, *optional*): As in [`DAEDiTTransformer2DModel`].
            flow_map (`bool`, *optional*): As in [`DAEDiTTransformer2DModel`]: it learns from the given one, for the same latents. That
                one and its guide become `teachers`, with the numbers that classes and conditions have now; a resumed run loads them again.

        Raises:
            UserError: If the transformer cannot do without classes, and there are none; if it takes no text or conditions, and
                there are; or if a flow map would be for other latents, classes or conditions.
        """
        size = {"sample_size": sample_size, "in_channels": in_channels, "patch_size": patch_size}
        drawn_from = (id2label, text_encoder, conditions or {}, condition_channels)
        if self.is_resumed:  # it was made for these latents and classes
            if flow_map:
                given = self.load(self.name)
                self.teachers = given._frozen(**size, **given._drawn_from(*drawn_from))
            return without_label_dropout(self.transformer)
        if id2label is None and isinstance(self.transformer, DiTTransformer2DModel):
            raise UserError(
                f"`pretrained_model_name_or_path` {self.name} has a DiTTransformer2DModel, which needs classes, but the images have "
                "none. Put them into two or more sub-folders, one for each class, or name their `label_column`."
            )
        if text_encoder is not None and isinstance(self.transformer, DiTTransformer2DModel):
            raise UserError(
                f"`pretrained_model_name_or_path` {self.name} has a DiTTransformer2DModel, which takes no text. Leave `caption_column` and "
                "`text_encoder` out, or start from a DAEDiTTransformer2DModel."
            )
        if conditions and isinstance(self.transformer, DiTTransformer2DModel):
            raise UserError(
                f"`pretrained_model_name_or_path` {self.name} has a DiTTransformer2DModel, which draws by one class only. Leave "
                f"`{'`, `'.join(conditions)}` out, or start from a DAEDiTTransformer2DModel."
            )
        taken = {**size, **self._drawn_from(*drawn_from)}
        transformer, changes = take_over(self.transformer, **taken, flow_map=flow_map)
        if self.guide is not None and not flow_map:
            self.changes.append("its `guidance_transformer` is left out")
        unwanted = [change for change in (*changes, *self.changes) if change != NEW_INTERVAL]
        if flow_map and unwanted:
            raise UserError(
                f"`distill_guidance_scale` makes a transformer that draws what {self.name} draws, but {'; '.join(unwanted)}. "
                "Give the autoencoder, the images, the columns and any text encoder that it was trained with."
            )
        logger.info(
            "starting from the weights of %s, for %s: %s",
            self.name,
            "flow matching" if self.is_flow_matching else f"diffusion with its {type(self.scheduler).__name__}",
            "; ".join([*changes, *self.changes, "all else is as before"]),
        )
        if flow_map:
            self.teachers = self._frozen(**taken)
        self.transformer, self.pipeline = transformer, None  # frees the old weights
        return without_label_dropout(transformer)

    def _drawn_from(
        self,
        id2label: dict[int, str] | None,
        text_encoder: torch.nn.Module | None,
        conditions: dict[str, dict[str, Any]],
        condition_channels: int,
    ) -> dict[str, Any]:
        """Where classes, text and conditions were before, as arguments of [`take_over`]."""
        return {
            "rows": self._rows(id2label),
            "cross_attention_dim": self._text_width(text_encoder),
            "conditions": self._old_conditions(conditions, condition_channels),
        }

    def _frozen(self, **taken: Any) -> list[ModelMixin]:
        """The given transformer and its guide, with the numbers that classes and conditions have now."""
        given = [model for model in (self.transformer, self.guide) if model is not None]
        taken = [take_over(each, **taken | {"patch_size": each.config.patch_size})[0] for each in given]
        return [each.requires_grad_(False).eval() for each in taken]

    def _rows(self, id2label: dict[int, str] | None) -> list[int | None] | None:
        """The old number of each class, or None if it is new."""
        num_before = self.transformer.config[layout_of(self.transformer).classes]
        if id2label is None:
            self.changes += [] if num_before is None else ["its classes are left out"]
            return None
        names = [id2label[number] for number in sorted(id2label)]
        if num_before is None:
            self.changes.append("it had no classes, and begins the same for each")
            return [None] * len(names)
        if self.pipeline is not None and self.pipeline.id2label:
            rows = [self._number_of(name, num_before) for name in names]
        else:  # its classes have no names
            rows = list(range(num_before)) if len(names) == num_before else [None] * len(names)
        begun = [name for name, row in zip(names, rows, strict=True) if row is None]
        if begun:
            some = ", ".join(begun[:10]) + (", ..." if len(begun) > 10 else "")
            self.changes.append(f"{len(begun)} of {len(names)} classes are new and begin as the null class ({some})")
        left_out = num_before - len(set(rows) - {None})
        if left_out:
            self.changes.append(f"{left_out} of its {num_before} classes are left out")
        return rows

    def _text_width(self, text_encoder: torch.nn.Module | None) -> int | None:
        """Channels of the text encoder's hidden states; of the same number, those of another one mean something else."""
        if text_encoder is None:
            return None
        width = text_encoder.config.hidden_size
        if self.transformer.config.get("cross_attention_dim") == width:
            old = None if self.pipeline is None else self.pipeline.text_encoder
            if old is None:
                self.changes.append("it does not tell its text encoder")
            elif not _has_weights_of(text_encoder, old):
                self.changes.append("the text encoder is another one")
        return width

    def _old_conditions(self, conditions: dict[str, dict[str, Any]], channels: int) -> OldConditions:
        """Where each condition was, by its name; of a transformer alone none is known."""
        before = {} if self.pipeline is None else self.pipeline.conditions

        def place(name: str, kind: str) -> int | None:
            known = columns_of(before, kind)
            return known.index(name) if name in known else None

        attributes = []
        for name in columns_of(conditions, "labels"):
            old = _class_names(before.get(name, {}))
            rows = [old.index(each) if each in old else None for each in conditions[name]["labels"]]
            attributes.append((place(name, "labels"), rows))
        for name, column in conditions.items():
            old = before.get(name, {})
            if column.keys() != old.keys():
                self.changes.append(f"condition {name} is new")
            elif set(_class_names(column)) != set(_class_names(old)):
                self.changes.append(f"condition {name} has other classes")
            elif column.get("channels") != old.get("channels"):
                self.changes.append(f"condition {name} has other channels")
        self.changes += [f"its condition {name} is left out" for name in before if name not in conditions]
        has_same_image = columns_of(conditions, "channels") == columns_of(before, "channels")
        numbers = [place(name, "mean") for name in columns_of(conditions, "mean")]
        return OldConditions(attributes, numbers, channels, has_same_image)

    def _number_of(self, name: str, num_classes: int) -> int | None:
        same = [number for number, old in self.pipeline.id2label.items() if class_name(old) == class_name(name)]
        try:
            (number,) = same if len(same) == 1 else self.pipeline.get_label_ids(name)
        except ValueError:  # unknown, or a name of several
            return None
        return number if number < num_classes else None


def _class_names(column: dict[str, Any]) -> list[str]:
    """The classes of a condition as they are compared."""
    return [class_name(each) for each in column.get("labels", ())]


def _index_of(place: str) -> dict[str, Any] | None:
    """The index of a pipeline; None for what is none. Raises OSError if it is damaged."""
    try:
        return DiffusionPipeline.load_config(place)
    except OSError:
        if (Path(place) / _INDEX).exists():
            raise
        return None


def _without_variance(scheduler: SchedulerMixin) -> SchedulerMixin:
    """The scheduler for a transformer that predicts no variance."""
    if "learned" not in str(scheduler.config.get("variance_type")):
        return scheduler
    default = signature(type(scheduler).__init__).parameters["variance_type"].default
    return type(scheduler).from_config(scheduler.config, variance_type=default)


def _has_weights_of(model: torch.nn.Module, old: torch.nn.Module) -> bool:
    """Whether its weights are the old ones, in its own precision."""
    of_old = weights_fingerprint(value.to(model.dtype) for value in old.parameters())
    return weights_fingerprint(model.parameters()) == of_old


def _listed(values: dict[str, int], names: list[str]) -> str:
    return ", ".join(f"`{name}` {values[name]}" for name in names)
