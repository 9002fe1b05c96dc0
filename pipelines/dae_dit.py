"""
Sampling from a diffusion transformer in the latent space of an autoencoder.

The whole pipeline is this one file, which needs torch and diffusers only: `save_pretrained` puts it into the model's
folder as `pipeline.py`, so that what we publish runs without our package. The pipelines that are made from it (`dae_dit_*.py`)
are put beside it.
"""

import copy
import difflib
import functools
import importlib
import importlib.util
import inspect
import math
import operator
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, DiTTransformer2DModel, ImagePipelineOutput, ModelMixin, SchedulerMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import load_image
from diffusers.utils.torch_utils import randn_tensor, unwrap_module

# diffusers loads the code of every local folder into one module, and expects one class of pipelines there. So the other kind's class
# goes, and what differs between the kinds is kept on the class.
globals().pop("DAEVQGANPipeline", None)

PACKAGE = "dae_diffusers"
PIPELINE_FILE = "pipeline.py"  # the name diffusers looks for
FAMILY = "dae_dit"  # this file's name in our package; pipelines made from it lie beside it and begin with it
MADE_FROM_IT = ("img2img", "inpaint", "interpolate")
DYNAMIC_MODULES = "diffusers_modules.local."  # where diffusers puts code that came with a model
ASYMMETRIC = "autoencoder_dae_asymmetric"  # module of autoencoders whose decoder has a size of its own
TRANSFORMERS = ("transformer", "guidance_transformer")  # parts of a pipeline
TRANSFORMER = "DAEDiTTransformer2DModel"  # predicts the velocity of flow matching at timestep 1000 sigma
FLOW_SETTINGS = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
FLOW_SCHEDULERS = (
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
)
FLOW_MAP_SCHEDULER = "FlowMapEulerDiscreteScheduler"
# What a column's entry in `conditions` has by its kind, and the transformer's argument: classes, numbers, an image.
CONDITION_KINDS = {"labels": "attribute_labels", "mean": "continuous", "channels": "condition_image"}
# What a transformer and the one that guides it must have in common.
_SHARED_BY_GUIDANCE = (
    "in_channels",
    "out_channels",
    "num_classes",
    "num_embeds_ada_norm",
    "cross_attention_dim",
    "num_attribute_classes",
    "num_continuous",
    "condition_channels",
)
FEW_VALUES = 16  # up to which an image counts as a mask, whose values must not be mixed
DEFAULT_TOKENS = 512  # of a text, for an encoder that takes any number


class DAEDiTPipeline(DiffusionPipeline):
    r"""
    Generates images with a diffusion transformer in the latent space of an autoencoder, by class, from text, or without either.

    It does everything that [`DiTPipeline`] does, and returns the same images for the same weights, DDIM, seed and steps. In
    addition it supports any number of classes or none, class names, prompts, flow matching and the usual schedulers, rectangular images,
    guidance over part of the noise levels, autoencoders with latent statistics, and grayscale. To decode many or large
    images in little memory, call `pipe.vae.enable_slicing()` or `pipe.vae.enable_tiling()` (a `VQModel` has neither).

    Args:
        transformer ([`DAEDiTTransformer2DModel`] or [`DiTTransformer2DModel`]): Predicts from normalised latents.
        vae ([`ModelMixin`]): Decodes latents: [`AutoencoderKL`], [`VQModel`], or any other of diffusers' autoencoders of images.
        scheduler ([`SchedulerMixin`]):
            For flow matching or diffusion, as the transformer was trained. For flow matching, solvers that support it
            ([`DPMSolverMultistepScheduler`], [`UniPCMultistepScheduler`]) are set up for it, with the `shift` of the
            config that they were made from. A scheduler that would ruin the images is refused. The same holds if you assign
            one later, as in `pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config)`.
        id2label (`dict` or `list`, *optional*):
            Class id (or its digits) to name, or the names in order; a name may hold several, separated by commas, as ImageNet's do.
        value_range (`list` of two numbers, *optional*):
            Lowest and highest value of the original images if they were not 8-bit pictures; `output_type="np"` gives
            images in this range.
        is_flow_matching (`bool`, *optional*):
            Whether the transformer predicts the velocity of flow matching, and not noise or the like. Default: true for
            a [`DAEDiTTransformer2DModel`]; for any other transformer the scheduler given here decides.
        tokenizer, text_encoder (*optional*):
            Of transformers, for a transformer that takes text. Without them, give `prompt_embeds`.
        conditions (`dict`, *optional*):
            What else images are drawn from, by name: `{"labels": [...]}` for further classes, with their names; `{"mean": ..., "std":
            ..., "low": ..., "high": ...}` for a number, with the statistics of the training images; `{"channels": ...}` for an image.
        label_column (`str`, *optional*): What the classes of `id2label` are called, beside the classes in `conditions`.
        guidance_transformer ([`ModelMixin`], *optional*):
            A weaker version of the transformer: trained for fewer steps, or smaller. Guidance then leads away from it instead of from
            images without class or text, so that models without either have guidance, too. Source: autoguidance, Karras et al., 2024,
            https://huggingface.co/papers/2406.02507.
        default_guidance_scale (`float`, *optional*), default_guidance_interval (pair of `float`, *optional*),
            default_num_inference_steps (`int`, *optional*), default_velocity_scale (`float`, *optional*):
            How a call draws that says nothing else; default: 4, or 2 with a `guidance_transformer`, at all noise levels, in 50
            steps, and 1.

    Raises:
        `ValueError`: If the transformer and the autoencoder differ in latent channels, the transformer and the text encoder in the
            channels of a token, the transformer takes other conditions, or the scheduler cannot sample what the transformer predicts.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _needed = ("transformer", "vae", "scheduler")
    _output_types = ("pil", "np", "numpy", "pt", "latent")
    _code = Path(__file__).read_text(encoding="utf-8")  # read now: the next model's code replaces the file
    _is_conditional = False  # whether there is more to draw from than what the call is given
    _callback_tensor_inputs = ["latents"]
    _optional_components = ["tokenizer", "text_encoder", "guidance_transformer"]
    _exclude_from_cpu_offload = ["guidance_transformer"]  # it works in turns with the transformer

    def __init__(
        self,
        transformer: ModelMixin,
        vae: ModelMixin,
        scheduler: SchedulerMixin,
        id2label: dict[int, str] | dict[str, str] | list[str] | None = None,
        value_range: list[float] | None = None,
        is_flow_matching: bool | None = None,
        tokenizer: Callable | None = None,
        text_encoder: torch.nn.Module | None = None,
        conditions: dict[str, dict[str, Any]] | None = None,
        label_column: str | None = None,
        guidance_transformer: ModelMixin | None = None,
        default_guidance_scale: float | None = None,
        default_num_inference_steps: int | None = None,
        default_velocity_scale: float | None = None,
        default_guidance_interval: tuple[float, float] | list[float] | None = None,
    ):
        super().__init__()
        known, of_images = _settings_of(transformer), _settings_of(vae)
        kept = {
            "id2label": id2label,
            "value_range": of_images.get("value_range") if value_range is None else value_range,
            "is_flow_matching": is_flow_matching,
            "conditions": conditions,
            "label_column": label_column,
            "default_guidance_scale": default_guidance_scale,
            "default_num_inference_steps": default_num_inference_steps,
            "default_velocity_scale": default_velocity_scale,
            "default_guidance_interval": default_guidance_interval
            and [float(each) for each in default_guidance_interval],
        }
        kept = {
            name: known.get(name) if value is None and name != "value_range" else value for name, value in kept.items()
        }
        if kept["is_flow_matching"] is None:
            kept["is_flow_matching"] = _is_named(transformer, TRANSFORMER) or _is_for_flow_matching(scheduler)
        self.is_flow_matching = kept["is_flow_matching"]
        self.register_modules(
            transformer=transformer,
            vae=vae,
            scheduler=scheduler,
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            guidance_transformer=guidance_transformer,
        )
        _make_tiles_square(vae)
        self.id2label = _names_by_id(kept["id2label"])
        self.value_range, self.label_column = kept["value_range"], kept["label_column"]
        self.conditions = dict(kept["conditions"] or {})
        kept |= {"id2label": self.id2label or None, "conditions": self.conditions or None}
        self.register_to_config(**kept)
        if transformer is not None and vae is not None:  # else left out, to encode prompts alone
            self._check_models()
        known.update(kept)
        of_images.update(value_range=self.value_range)

    def _check_models(self):
        """Raises `ValueError` if the models do not fit each other or the settings."""
        transformer, guidance_transformer = self.transformer, self.guidance_transformer
        if self.null_class is not None and max(self.id2label, default=0) >= self.null_class:
            raise ValueError(
                f"`id2label` names class {max(self.id2label)}, but the transformer has {self.null_class} classes, from 0."
            )
        if self.takes_text and self.text_encoder is not None:
            width = self.text_encoder.config.hidden_size
            if width != transformer.config.cross_attention_dim:
                raise ValueError(
                    f"The text encoder gives {width} channels a token, and the transformer takes "
                    f"{transformer.config.cross_attention_dim}. Use the text encoder that it was trained with."
                )
        if guidance_transformer is not None:
            for name in _SHARED_BY_GUIDANCE:
                values = [model.config.get(name) for model in (transformer, guidance_transformer)]
                ours, other = ([*value] if isinstance(value, list | tuple) else value for value in values)
                if ours != other:
                    raise ValueError(
                        f"`{name}` of the transformer is {ours} and that of `guidance_transformer` {other}. Give a weaker version of "
                        "the transformer, trained on the same latents and classes."
                    )
        self._check_columns(self.vae_scale_factor)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs) -> "DAEDiTPipeline":
        """
        Makes a pipeline from another one's models, like [`DiffusionPipeline.from_pipe`]. They keep their data types.

        Args:
            pipeline ([`DiffusionPipeline`]): A pipeline with the components that this class has.
            kwargs: As in [`DiffusionPipeline.from_pipe`], for example `dtype`; also other components.
        """
        if (
            not hasattr(pipeline, "id2label") and "id2label" not in kwargs
        ):  # [`DiTPipeline`] knows names the other way round
            names: dict[int, list[str]] = {}
            for name, key in getattr(pipeline, "labels", {}).items():
                names.setdefault(key, []).append(name)
            kwargs["id2label"] = {key: ", ".join(each) for key, each in names.items()} or None
        if {"dtype", "torch_dtype", "custom_pipeline"} & kwargs.keys():
            # diffusers passes on models of exactly the annotated classes alone; ours are annotated by a common ancestor.
            return super().from_pipe(pipeline, **{**pipeline.components, **kwargs})
        # diffusers would turn the models, which both pipelines share, into float32.
        taken = inspect.signature(cls.__init__).parameters
        own = {name: value for name, value in {**pipeline.config, **pipeline.components}.items() if name in taken}
        own |= {"value_range": None} if "vae" in kwargs else {}  # that of the other autoencoder
        made = cls(**own | kwargs)
        if "_name_or_path" in pipeline.config:
            made.register_to_config(_name_or_path=pipeline.config["_name_or_path"])
        return made

    def __setattr__(self, name: str, value):
        if name == "scheduler" and value is not None:
            if not isinstance(value, SchedulerMixin):
                raise ValueError(
                    f"`scheduler` is {value!r}, but must be a scheduler of diffusers, made: `DDIMScheduler(...)`."
                )
            value = (_for_flow_matching if self.is_flow_matching else _for_diffusion)(value)
        if name == "vae" and value is not None:
            shape, transformer = autoencoder_shape(value.config), getattr(self, "transformer", None)
            if transformer is not None and shape.latent_channels != transformer.config.in_channels:
                raise ValueError(
                    f"The transformer has {transformer.config.in_channels} latent channels and the autoencoder "
                    f"{shape.latent_channels}. Use the autoencoder that the transformer was trained with."
                )
            if transformer is not None and getattr(self, "conditions", None):
                self._check_columns(shape.factor)
            self.vae_scale_factor = shape.factor
            self.image_processor = VaeImageProcessor(vae_scale_factor=shape.factor)
        super().__setattr__(name, value)

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs):
        """
        Saves like [`DiffusionPipeline.save_pretrained`], and adds the code of this pipeline, of those made from it, and of a
        transformer that is not diffusers' own, so that the folder or repository loads where only diffusers is installed:
        `DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)`.

        Args:
            save_directory (`str` or `os.PathLike`): Folder, created if it does not exist.
            args, kwargs: As in [`DiffusionPipeline.save_pretrained`], for example `push_to_hub=True`.

        Raises:
            `ValueError`: If the code of the autoencoder cannot be saved as one file.
        """
        if hasattr(self.vae, "to_diffusers"):
            raise ValueError(
                f"`vae` is a {type(self.vae).__name__}, whose code cannot be saved in the folder. "
                "Set `pipe.vae = pipe.vae.to_diffusers()` before saving."
            )
        # A model's folder is the same, whichever pipeline saves it.
        if type(self).__module__.rpartition(".")[2].startswith(f"{FAMILY}_"):
            return DAEDiTPipeline.from_pipe(self).save_pretrained(save_directory, *args, **kwargs)
        for part in TRANSFORMERS:
            model = unwrap_module(getattr(self, part))
            if model is not None and not isinstance(model, ModelMixin):
                raise ValueError(
                    f"`{part}` is a {type(model).__name__}, which diffusers cannot save. For one of PEFT, merge the adapter first: "
                    f"`pipe.{part} = pipe.{part}.merge_and_unload()`."
                )
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        save_code(self._code, folder, self.config.get("_name_or_path"))
        for part in TRANSFORMERS:
            transformer_class = type(unwrap_module(getattr(self, part)))
            if transformer_class.__module__.partition(".")[0] in ("diffusers", "__main__", "builtins"):
                continue
            # diffusers looks for the code under the module's full name. Code that came with a model goes back as it came.
            name = transformer_class.__module__.removeprefix(DYNAMIC_MODULES)
            self.register_to_config(**{part: (name, transformer_class.__name__)})
            (folder / part).mkdir(exist_ok=True)
            source = sys.modules[transformer_class.__module__].__file__
            shutil.copyfile(source, folder / part / f"{name}.py")
        _name_code_of(self)
        super().save_pretrained(str(folder), *args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> "DAEDiTPipeline":
        """
        Loads like [`DiffusionPipeline.from_pretrained`], with the transformer's class from the installed package, so
        that no code of the repository runs. (With `quantization_config`, for which diffusers has to load each part
        itself, pass a loaded `transformer` or `trust_remote_code=True`.)

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): Folder or Hub repository.
            kwargs: As in [`DiffusionPipeline.from_pretrained`], for example `dtype` or `revision`.

        Raises:
            `ValueError`: If the folder holds no pipeline, or there is none and it cannot be a repository's name.
        """
        is_balanced = kwargs.get("device_map") == "balanced"
        left_to_diffusers = "quantization_config" in kwargs or {*TRANSFORMERS} <= kwargs.keys()
        left_to_diffusers |= "custom_pipeline" in kwargs and not is_balanced
        if left_to_diffusers or not importlib.util.find_spec(PACKAGE):
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

        name_or_path = str(pretrained_model_name_or_path)
        folder = _folder_of(cls, name_or_path, kwargs)
        own = {}  # transformers of the package's class, and how to load them
        for part in TRANSFORMERS:
            module, class_name = cls.load_config(folder).get(part) or (None, None)
            if part in kwargs or str(module).partition(".")[0] != PACKAGE:
                continue
            # With `balanced`, which device it goes to is known only when diffusers has all parts; and diffusers never asks
            # `trust_remote_code` when it measures them.
            model_kwargs = _loading_options(part, folder, kwargs, *([] if is_balanced else ["device_map"]))
            transformer_class = getattr(importlib.import_module(module), class_name)
            own[part] = functools.partial(transformer_class.from_pretrained, folder, subfolder=part, **model_kwargs)
        kwargs |= {part: load() for part, load in own.items()}
        kwargs |= _own_autoencoder(cls, folder, kwargs)
        pipeline = super().from_pretrained(folder, **kwargs)
        for part, load in own.items():
            device = (getattr(pipeline, "hf_device_map", None) or {}).get(part) if is_balanced else None
            if device is not None:
                setattr(pipeline, part, load(device_map={"": device}))
        pipeline.register_to_config(_name_or_path=name_or_path)
        return pipeline

    @property
    def null_class(self) -> int | None:
        """The transformer's label for "no class": the number of classes, or `None` if it is unconditional."""
        config = self.transformer.config
        return config.get("num_classes", config.get("num_embeds_ada_norm"))

    @property
    def takes_text(self) -> bool:
        """Whether the transformer attends to a text."""
        return self.transformer.config.get("cross_attention_dim") is not None

    @property
    def is_flow_map(self) -> bool:
        """Whether the transformer draws in few steps, with its guidance in it."""
        return bool(self.transformer.config.get("flow_map"))

    @property
    def call_defaults(self) -> dict[str, Any]:
        """What a call draws with that says nothing else, by the names of its arguments."""
        guidance_scale = self.config.default_guidance_scale
        if guidance_scale is None:
            guidance_scale = 4.0 if self.guidance_transformer is None else 2.0
        return {
            "guidance_scale": guidance_scale,
            "guidance_interval": tuple(self.config.default_guidance_interval or (0.0, 1.0)),
            "num_inference_steps": self.config.default_num_inference_steps or 50,
            "velocity_scale": self.config.default_velocity_scale or 1.0,
        }

    @property
    def labels(self) -> dict[str, int]:
        """Every class name and its id, sorted by name. If classes share a name, the last one counts."""
        pairs = ((name.strip(), key) for key, names in self.id2label.items() for name in names.split(","))
        return dict(sorted(pairs, key=operator.itemgetter(0)))

    def get_label_ids(self, label: int | str | Iterable[int | str]) -> list[int]:
        """
        Class ids of names. Ids among the names are returned as they are.

        Args:
            label (`int`, `str` or an iterable of them, nested or not):
                A name is a whole entry of `id2label` or one of its comma-separated names. If none matches exactly, upper and
                lower case are not distinguished.

        Returns:
            `list` of `int`: One id per label.

        Raises:
            `ValueError`: If a name is unknown or names several classes, an id is out of range, or there are no classes.
        """
        if self.null_class is None:
            raise ValueError(
                f"`{label}` is a label, but this model is unconditional. "
                "Leave `class_labels` out, and choose the number of images by `num_images_per_label`."
            )
        if isinstance(label, str) or not isinstance(label, Iterable) or getattr(label, "ndim", 1) == 0:
            return [self._label_id(label)]
        return [label_id for each in label for label_id in self.get_label_ids(each)]

    def _label_id(self, label: int | str) -> int:
        if not isinstance(label, str):
            label_id = whole_number(label)
            if label_id is None:
                raise ValueError(f"`{label}` is no class: give names or ids of classes.")
            if not 0 <= label_id <= self.null_class:
                raise ValueError(
                    f"Class {label_id} is out of range: there are {self.null_class} classes, 0 to "
                    f"{self.null_class - 1}, and {self.null_class} for none."
                )
            return label_id
        for fold in (str.strip, lambda text: text.strip().casefold()):
            for split in (lambda names: [names], lambda names: names.split(",")):
                ids = [key for key, names in self.id2label.items() if fold(label) in map(fold, split(names))]
                if len(ids) > 1:
                    raise ValueError(
                        f"`{label}` names {len(ids)} classes: "
                        + "; ".join(f"{key} ({self.id2label[key]})" for key in ids)
                        + ". Pass the id of the one you mean."
                    )
                if ids:
                    return ids[0]
        if not self.id2label:
            raise ValueError(f"`{label}` is a name, but this pipeline has no `id2label`. Pass class ids.")
        names = {name.casefold(): name for name in self.labels}
        nearest = difflib.get_close_matches(label.strip().casefold(), names, n=5, cutoff=0.5) or sorted(names)[:5]
        raise ValueError(
            f"`{label}` is not one of the {len(self.id2label)} classes. Nearest: "
            f"{', '.join(names[name] for name in nearest)}. All are in `pipe.labels`."
        )

    @torch.no_grad()
    def encode_prompt(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        *,
        num_images_per_prompt: int = 1,
        device: torch.device | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_embeds_mask: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor | None, ...]:
        """
        The hidden states of texts, for the transformer. What is given as embeddings is not encoded.

        Args:
            prompt, negative_prompt (`str` or sequence of `str`, *optional*): Texts; without one, the empty text.
            num_images_per_prompt (`int`, defaults to 1): Each text is repeated so often.
            device (`torch.device`, *optional*): Where the result goes; default: where the pipeline computes.
            prompt_embeds, negative_prompt_embeds (`torch.Tensor` of shape `(B, T, D)`, *optional*): Instead of the texts.
            prompt_embeds_mask, negative_prompt_embeds_mask (`torch.Tensor` of shape `(B, T)`, *optional*):
                1 for a token, 0 for padding; default: all are tokens.

        Returns:
            `tuple` of four: `prompt_embeds` `(B, T, D)` and `prompt_embeds_mask` `(B, T)` bool, and the same of the negative prompt,
            which are `None` without a text encoder.
        """
        device = self._execution_device if device is None else device
        encoded = []
        for text, embeds, mask in (
            (prompt, prompt_embeds, prompt_embeds_mask),
            (negative_prompt, negative_prompt_embeds, negative_prompt_embeds_mask),
        ):
            if mask is not None and (embeds is None or mask.shape != embeds.shape[:2]):
                raise ValueError(
                    f"a mask of a prompt has the shape {tuple(mask.shape)}, but belongs to embeddings of the shape "
                    f"{'none' if embeds is None else tuple(embeds.shape)}. It must be (B, T) for (B, T, D)."
                )
            if embeds is None and self.text_encoder is not None:
                texts = [text or ""] if text is None or isinstance(text, str) else list(text)
                _warn_of_cut(texts, self.tokenizer, self.text_encoder)
                # Offloading moves the encoder for a call; otherwise it may lie on the CPU while the transformer trains on a GPU.
                is_moved = any(hasattr(self.text_encoder, hook) for hook in ("_hf_hook", "_diffusers_hook"))
                where = device if is_moved or self.text_encoder.device.type == "meta" else self.text_encoder.device
                embeds, mask = encode_texts(self.tokenizer, self.text_encoder, texts, where)
            if embeds is not None:
                mask = torch.ones(embeds.shape[:2]) if mask is None else mask
                embeds = embeds.to(device).repeat_interleave(num_images_per_prompt, 0)
                mask = mask.to(device).bool().repeat_interleave(num_images_per_prompt, 0)
            encoded += [embeds, mask]
        return tuple(encoded)

    def encode_conditions(
        self, conditions: Mapping[str, Any] | None = None, *, height: int | None = None, width: int | None = None
    ) -> dict[str, torch.Tensor]:
        """
        Values of `conditions` as arguments of the transformer, on the device where the pipeline computes.

        Args:
            conditions (mapping, *optional*): As in a call; what is missing or `None` is unknown.
            height, width (`int`, *optional*): As in a call; condition images of another size are resized.

        Returns:
            `dict`: `attribute_labels` `(B, A)`, `continuous` `(B, N)` and `condition_image` `(B, C, h, w)`, as far as the transformer
            takes them; B is the number of values, or 1.

        Raises:
            `ValueError`: If a name is unknown, or a value is not one of its column.
        """
        given = conditions or {}
        unknown = [name for name in given if name not in self.conditions]
        if unknown:
            known = f"draws from {', '.join(f'`{name}`' for name in sorted(self.conditions))}"
            raise ValueError(
                f"`conditions` has `{unknown[0]}`, but this pipeline {known if self.conditions else 'has no conditions'}. Leave it out."
            )
        sides = [side * self.vae_scale_factor for side in self._latent_shape(height, width, None)[1:]]
        rows = {}
        for name, column in self.conditions.items():
            value = given.get(name)
            if "channels" in column:
                rows[name] = self._condition_images(name, column, value, *sides)
            else:
                several = isinstance(value, list | tuple) or getattr(value, "ndim", 0) > 0
                values = list(value) if several else [value]
                rows[name] = (_numbers if "mean" in column else _classes)(name, column, values)
        count = max(map(len, rows.values()), default=1)
        for name, row in rows.items():
            if len(row) not in (1, count):
                raise ValueError(
                    f"`conditions` has {len(row)} of `{name}` and {count} of others; give as many of each, or one."
                )
            rows[name] = row.expand(count, *row.shape[1:]).to(self._execution_device)
        return conditions_as_arguments(self.conditions, rows)

    def _condition_images(
        self, name: str, column: Mapping[str, Any], value: Any, height: int, width: int
    ) -> torch.Tensor:
        """Condition images on the latents' grid, see [`on_latents`]; zeros for `None`."""
        channels, factor = column["channels"], self.vae_scale_factor
        found = []
        for each in value if isinstance(value, list | tuple) else [value]:
            if each is None:
                found.append(torch.zeros(1, channels * factor**2 + 1, height // factor, width // factor))
                continue
            (each,) = as_list(each, name)
            pixels = pixels_of(each, name, {3: "RGB"}.get(channels), column.get("value_range"))
            if channels == 1 and pixels.shape[1] == 3 and torch.equal(pixels, pixels[:, :1].expand_as(pixels)):
                pixels = pixels[:, :1]
            if channels == 3 and pixels.shape[1] == 1:
                pixels = pixels.expand(-1, 3, -1, -1)
            if pixels.shape[1] != channels:
                kind = {1: "gray", 3: "in colour"}.get(channels, f"an array of {channels} channels")
                raise ValueError(
                    f"`{name}` has {pixels.shape[1]} channels, but must be {kind}, as in training."
                    + " Convert it with `image.convert('L')`." * (channels == 1)
                )
            found += on_latents(2 * fitted(pixels, height, width) - 1, factor).split(1)
        if not found:
            raise ValueError(f"`{name}` is empty. Give an image, a list of them, or None for none.")
        return torch.cat(found)

    def _check_columns(self, factor: int):
        """Raises `ValueError` if the transformer takes other conditions than the pipeline knows by name, at `factor` pixels a latent."""
        config = self.transformer.config
        takes = [
            config.get("num_attribute_classes") or [],
            config.get("num_continuous") or 0,
            config.get("condition_channels") or 0,
        ]
        known = [
            [len(self.conditions[name]["labels"]) for name in columns_of(self.conditions, "labels")],
            len(columns_of(self.conditions, "mean")),
            sum(self.conditions[name]["channels"] * factor**2 + 1 for name in columns_of(self.conditions, "channels")),
        ]
        if list(takes[0]) != known[0] or takes[1:] != known[1:]:
            raise ValueError(
                f"`conditions` are {known[0]} classes, {known[1]} numbers and {known[2]} channels of an image, but the transformer takes "
                f"{takes[0]}, {takes[1]} and {takes[2]}. Give those that it was trained with. The autoencoder makes "
                f"{factor}x{factor} pixels of a latent, which must be as many as in training."
            )

    @property
    def guidance_scale(self) -> float:
        """Guidance of the call under way."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the call under way runs the transformer twice a step. A flow map has its guidance in it."""
        return self._guidance_scale > 1 and not self.is_flow_map

    @property
    def interrupt(self) -> bool:
        """Whether the call under way leaves out the steps that remain; a callback sets `pipe._interrupt`."""
        return self._interrupt

    @property
    def num_timesteps(self) -> int:
        """Number of times the call under way runs the scheduler."""
        return self._num_timesteps

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | int | Iterable[int | str] | None = None,
        guidance_scale: float | None = None,
        *,
        class_labels: int | str | Iterable[int | str] | Mapping[str, Any] | None = None,
        conditions: Mapping[str, Any] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_embeds_mask: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds_mask: torch.Tensor | None = None,
        guidance_interval: tuple[float, float] | None = None,
        velocity_scale: float | None = None,
        num_inference_steps: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_images_per_label: int = 1,
        num_images_per_prompt: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: Literal["pil", "np", "numpy", "pt", "latent"] = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["DAEDiTPipeline", int, torch.Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        r"""
        Generates images.

        Args:
            prompt (`str` or sequence of `str`, *optional*):
                Texts, for a transformer that takes text; without them, the empty text. For any other transformer the first argument
                is `class_labels`.
            guidance_scale (`float`, *optional*):
                Classifier-free guidance, `unconditional + guidance_scale * (conditional - unconditional)` on all latent
                channels. At 1 and below there is no guidance, which halves the work. A flow map has its guidance in it, and takes none.
                With a `guidance_transformer` its prediction, for the same classes and texts, takes the place of the unconditional one.
                Default: that of the pipeline's config, `default_guidance_scale`; else 4, or 2 with a `guidance_transformer`.
            class_labels (`int`, `str` or an iterable of both, *optional*):
                Class ids and names, see `get_label_ids`. Without them, a model with classes generates with its null class. A model
                without classes takes none. With several kinds of classes also a mapping, `{"shape": "cat", "color": ["red", "blue"]}`.
                With neither labels nor prompts (also negative ones) nor conditions there is no guidance, unless there is a
                `guidance_transformer`.
            conditions (mapping, *optional*):
                What else to draw from, by name, one value for all images or a list of one per image: names or numbers of classes,
                numbers in their own units, and a picture, array or tensor for an image, as in
                [`DAEDiTImg2ImgPipeline`]. Condition images of another size are resized to that of the result, by nearest neighbour if they
                hold at most 16 different values. What is left out or `None` is unknown; an image must be named.
            negative_prompt (`str` or sequence of `str`, *optional*):
                What guidance leads away from; default: the empty text. It does not go with a `guidance_transformer`.
            prompt_embeds, negative_prompt_embeds (`torch.Tensor` of shape `(B, T, D)`, *optional*): As from `encode_prompt`.
            prompt_embeds_mask, negative_prompt_embeds_mask (`torch.Tensor` of shape `(B, T)`, *optional*): As in `encode_prompt`.
            guidance_interval (pair of `float`, *optional*):
                Noise levels with guidance, from 0 (clean) to 1 (noise), bounds included: sigma for flow
                matching, else timestep / number of training timesteps. Source: Kynkäänniemi et al., 2024,
                https://huggingface.co/papers/2404.07724. Default: that of the pipeline's config, `default_guidance_interval`; else (0, 1).
            velocity_scale (`float`, *optional*):
                Multiplies what a transformer of flow matching predicts. With little or no guidance, 1.03 to 1.05 makes samples sharper.
                Default: that of the pipeline's config, `default_velocity_scale`; else 1.
            num_inference_steps (`int`, *optional*):
                Steps of the scheduler. Default: that of the pipeline's config, `default_num_inference_steps`; else 50.
            height, width (`int`, *optional*): Image size in pixels; by default what the transformer was trained on.
            num_images_per_label (`int`, defaults to 1): Images per label or prompt, next to each other in the result.
            num_images_per_prompt (`int`, *optional*): The same, under the name that diffusers has for it.
            generator (`torch.Generator` or `list` of them, *optional*):
                Source of all noise. With a list of one per image, an image does not depend on the others in its batch.
            latents (`torch.Tensor` of shape `(B, C, h, w)`, *optional*): Standard normal noise to start from.
            output_type (`str`, defaults to `"pil"`):
                `"pil"`, `"np"` or `"numpy"` `(B, H, W, C)` and `"pt"` `(B, C, H, W)`, all in [0, 1], or `"latent"`,
                normalised latents `(B, C, h, w)` for `decode_latents`.
            return_dict (`bool`, defaults to `True`): Return an [`ImagePipelineOutput`] rather than a tuple.
            callback_on_step_end (`Callable`, *optional*):
                Called after each step as `callback(pipe, step, timestep, tensors)`; may return changed tensors.
            callback_on_step_end_tensor_inputs (sequence of `str`, defaults to `("latents",)`):
                Names of the tensors it gets, out of `_callback_tensor_inputs`.

        Returns:
            [`ImagePipelineOutput`] or `tuple`: `images`, in the order of the labels or prompts.

        Raises:
            `ValueError`: If an argument does not fit the models or the other arguments.

        Example:
            ```py
            pipe = DAEDiTPipeline.from_pretrained("user/my-model").to("cuda")
            image = pipe("cat", generator=torch.Generator().manual_seed(0)).images[0]  # a class, or from text: "a cat"
            ```
        """
        self._check_parts()
        if num_images_per_prompt is not None:
            num_images_per_label = num_images_per_prompt
        callback_on_step_end_tensor_inputs = tensor_inputs_of(callback_on_step_end, callback_on_step_end_tensor_inputs)
        defaults = self.call_defaults
        guidance_scale = defaults["guidance_scale"] if guidance_scale is None else guidance_scale
        guidance_interval = defaults["guidance_interval"] if guidance_interval is None else guidance_interval
        num_inference_steps = defaults["num_inference_steps"] if num_inference_steps is None else num_inference_steps
        velocity_scale = defaults["velocity_scale"] if velocity_scale is None else velocity_scale
        self._check_choices(guidance_scale, guidance_interval, velocity_scale, callback_on_step_end_tensor_inputs)
        check_counts(num_inference_steps=num_inference_steps, num_images_per_label=num_images_per_label)
        self._check_output(output_type)
        prompt, class_labels = self._told_apart(prompt, class_labels)
        class_labels, conditions = self._by_column(class_labels, conditions)
        texts = {
            "prompt": _listed(prompt),
            "negative_prompt": _listed(negative_prompt),
            "prompt_embeds": prompt_embeds,
            "negative_prompt_embeds": negative_prompt_embeds,
        }
        texts = {name: value for name, value in texts.items() if value is not None}
        masks = {
            "prompt_embeds_mask": prompt_embeds_mask,
            "negative_prompt_embeds_mask": negative_prompt_embeds_mask,
        }
        has_condition = class_labels is not None or bool(texts)
        has_condition |= any(value is not None for value in conditions.values()) or self._is_conditional
        can_guide = has_condition or self.guidance_transformer is not None
        self._guidance_scale, self._interrupt = guidance_scale, False  # a callback may change both
        needs_negative = has_condition and self.do_classifier_free_guidance and self.guidance_transformer is None
        self._check_texts(texts, class_labels, is_guided=needs_negative)

        shape = self._latent_shape(height, width, latents)
        label_ids = self._resolve_labels(class_labels)
        sides = {"height": shape[1] * self.vae_scale_factor, "width": shape[2] * self.vae_scale_factor}
        encoded = self.encode_conditions(conditions, **sides)
        counts = {name: len(value) for name, value in {"class_labels": label_ids, **texts}.items()}
        counts["conditions"] = max(map(len, encoded.values()), default=1)
        if set(counts.values()) - {1, max(counts.values())}:
            raise ValueError(
                f"`{'`, `'.join(counts)}` number {list(counts.values())}; give as many of each, or one for all."
            )
        batch_size = max(counts.values()) * num_images_per_label
        self._check_generators(generator, batch_size)
        latents = self._starting_latents(latents, (batch_size, *shape), generator)
        self.scheduler.set_timesteps(num_inference_steps, device=self._execution_device)
        latents, timesteps = self._begin(latents)
        self._num_timesteps = len(timesteps)
        noise_levels = [level / self.scheduler.config.num_train_timesteps for level in timesteps.tolist()]
        ends = self._ends_of_steps(timesteps, batch_size)
        nothing = self.encode_conditions(**sides) if self.conditions else {}
        arguments = self._with_texts_and_labels(encoded, nothing, texts | masks, label_ids)
        conditional, unconditional = (_repeated(each, batch_size, num_images_per_label) for each in arguments)
        low, high = guidance_interval
        step_kwargs = {}
        if "generator" in inspect.signature(self.scheduler.step).parameters:
            step_kwargs["generator"] = generator

        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for step, (timestep, end, noise_level) in enumerate(zip(timesteps, ends, noise_levels, strict=True)):
                if self.interrupt:
                    break
                model_input = latents
                if hasattr(self.scheduler, "scale_model_input"):
                    model_input = self.scheduler.scale_model_input(latents, timestep)
                if can_guide and self.do_classifier_free_guidance and low <= noise_level <= high:
                    prediction = self._predict_guided(model_input, timestep, conditional, unconditional)
                else:
                    prediction = self._predict(model_input, timestep, conditional | end)
                if velocity_scale != 1:
                    prediction = velocity_scale * prediction
                latents = self.scheduler.step(prediction, timestep, latents, return_dict=False, **step_kwargs)[0]

                if callback_on_step_end is not None:
                    tensors = {"latents": latents} if "latents" in callback_on_step_end_tensor_inputs else {}
                    latents = (callback_on_step_end(self, step, timestep, tensors) or {}).get("latents", latents)
                progress_bar.update()

        _warn_unless_finite(latents, self.transformer.dtype)
        if output_type == "latent":
            images = latents
        else:
            images = self._to_output(self.decode_latents(latents), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @torch.no_grad()
    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """
        Decodes normalised latents into images: `vae.decode` of their `raw_latents`.

        Args:
            latents (`torch.Tensor` of shape `(B, C, h, w)`): Normalised latents, as the transformer predicts them.

        Returns:
            `torch.Tensor` of shape `(B, channels, H, W)`: Images, about [-1, 1].

        Raises:
            `ValueError`: As in `raw_latents`.
        """
        raw = self.raw_latents(latents)
        images = self._in_enough_range(lambda dtype: self.vae.decode(raw.to(dtype)).sample)
        return 2 * images - 1 if is_representation_autoencoder(self.vae.config) else images

    def raw_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """
        Normalised latents as `vae.decode` takes them: `latents * latents_std / scaling_factor + latents_mean` if the
        autoencoder's config has statistics, else `latents / scaling_factor + shift_factor`. An `AutoencoderRAE` does that itself.

        Args:
            latents (`torch.Tensor` of shape `(B, C, h, w)`): As the transformer knows them.

        Returns:
            `torch.Tensor` of the same shape: float32.

        Raises:
            `ValueError`: If the statistics are incomplete or for another number of channels.
        """
        config = self.vae.config
        mean, std = config.get("latents_mean"), config.get("latents_std")
        latents = latents.float()
        if is_representation_autoencoder(config):
            return latents
        if mean is None and std is None:
            return latents / config.get("scaling_factor", 1.0) + (config.get("shift_factor") or 0.0)
        counts = [None if values is None else len(values) for values in (mean, std)]
        if counts != [latents.shape[1]] * 2:
            raise ValueError(
                f"The autoencoder's config has {counts[0]} `latents_mean` and {counts[1]} `latents_std`, but the "
                f"latents have {latents.shape[1]} channels. Measure both again, or set both to `None`."
            )
        mean, std = (latents.new_tensor(values).view(1, -1, 1, 1) for values in (mean, std))
        return latents * std / config.get("scaling_factor", 1.0) + mean

    def _in_enough_range(self, function: Callable[[torch.dtype], torch.Tensor]) -> torch.Tensor:
        """What the autoencoder makes in its data type; in float32 if numbers exceed float16, as those of Stable Diffusion XL's do."""
        found = function(self.vae.dtype)
        if self.vae.dtype != torch.float16 or found.isfinite().all():
            return found
        warnings.warn(
            "numbers inside `vae` exceed the range of float16, so it works in float32. Load it in float32 or bfloat16.",
            stacklevel=4,
        )
        self.vae.to(torch.float32)
        try:
            return function(torch.float32)
        finally:
            self.vae.to(torch.float16)

    def _starting_latents(self, latents: torch.Tensor | None, shape: tuple[int, ...], generator) -> torch.Tensor:
        """Standard normal noise, given or drawn. Like the scheduler's arithmetic, it is float32 whatever the dtype of the models."""
        device = self._execution_device
        if latents is None:
            return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        given = tuple(getattr(latents, "shape", ()))
        if given != shape:
            raise ValueError(f"`latents` has shape {given}, but labels, size and models ask for {shape}.")
        return torch.as_tensor(latents).to(device, torch.float32)

    def _with_texts_and_labels(
        self,
        conditional: dict[str, torch.Tensor],
        unconditional: dict[str, torch.Tensor],
        texts: dict[str, Any],
        label_ids: list[int | None],
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """The transformer's arguments with those of texts and classes, and the same for the null class and the negative texts."""
        device = self._execution_device
        if self.takes_text:
            encoded = self.encode_prompt(**texts, device=device)
            wide = _as_wide(
                *({} if part is None else _text_arguments(part, mask) for part, mask in (encoded[:2], encoded[2:]))
            )
            conditional, unconditional = conditional | wide[0], unconditional | wide[1]
        if self.null_class is not None:
            conditional = conditional | {"class_labels": torch.tensor(label_ids, device=device)}
            unconditional = unconditional | {"class_labels": torch.tensor([self.null_class], device=device)}
        return conditional, unconditional

    def _begin(self, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The latents of the first step, from standard normal noise, and the timesteps that remain; `set_timesteps` came before."""
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(
                0
            )  # many steps can have the same first timestep twice, by which it would be searched
        return noise * getattr(self.scheduler, "init_noise_sigma", 1.0), self.scheduler.timesteps

    def _ends_of_steps(self, timesteps: torch.Tensor, batch_size: int) -> list[dict[str, torch.Tensor]]:
        """For each step the transformer's argument that says where it ends, if it is a flow map and the scheduler takes its long steps."""
        if not (self.is_flow_map and _is_named(self.scheduler, FLOW_MAP_SCHEDULER)):
            return [{}] * len(timesteps)
        if not len(timesteps):
            return []
        return [{"r_timestep": end.expand(batch_size)} for end in (*timesteps[1:], torch.zeros_like(timesteps[-1]))]

    def _guided(self, prediction: torch.Tensor, baseline: torch.Tensor) -> torch.Tensor:
        """A prediction led away from another one; its variance, where the transformer predicts that, stays."""
        channels = self.transformer.config.in_channels
        guided = baseline + self.guidance_scale * (prediction - baseline)
        return torch.cat((guided[:, :channels], prediction[:, channels:]), dim=1)

    def _predict_guided(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        conditional: dict[str, torch.Tensor],
        unconditional: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        """Led away from the prediction of the weaker transformer, or else without condition."""
        if self.guidance_transformer is not None:
            baseline = self._predict(latents, timestep, conditional, self.guidance_transformer)
            return self._guided(self._predict(latents, timestep, conditional), baseline)
        doubled = {name: torch.cat((value, unconditional[name])) for name, value in conditional.items()}
        return self._guided(*self._predict(torch.cat((latents, latents)), timestep, doubled).chunk(2))

    def _predict(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        arguments: dict[str, torch.Tensor],
        transformer: ModelMixin | None = None,
    ) -> torch.Tensor:
        """A transformer's float32 output, with the variance only if the scheduler wants it; default: that of the pipeline."""
        transformer = self.transformer if transformer is None else transformer
        prediction = transformer(
            latents.to(transformer.dtype),
            timestep=timestep.expand(len(latents)),
            **{"class_labels": None, **arguments},
        ).sample.float()
        channels = latents.shape[1]
        learned = self.scheduler.config.get("variance_type") in ("learned", "learned_range")
        return prediction if learned or prediction.shape[1] != 2 * channels else prediction[:, :channels]

    def _to_output(self, images: torch.Tensor, output_type: str):
        """Decoded images in the form of `output_type`; numbers are in the range of the original images."""
        output_type = "np" if output_type == "numpy" else output_type
        images = self.image_processor.postprocess(images, output_type=output_type)
        if output_type == "np" and self.value_range is not None:
            low, high = self.value_range
            images = images * (high - low) + low
        return images

    def _check_output(self, output_type: str):
        if output_type not in self._output_types:
            raise ValueError(f"`output_type` is {output_type!r}, but must be one of {', '.join(self._output_types)}.")
        # Not all classes have either.
        channels = self.vae.config.get("out_channels", self.vae.config.get("in_channels", 3))
        is_rgba = channels == 4 and list(self.value_range or (0, 255)) == [0, 255]
        if output_type == "pil" and channels not in (1, 3) and not is_rgba:
            raise ValueError(
                f"The autoencoder makes images with {channels} channels, but PIL supports only 1 and 3, and 4 of 8-bit pictures. "
                "Pass `output_type='np'` or `'pt'`."
            )

    def _check_generators(self, generator: torch.Generator | list[torch.Generator] | None, batch_size: int):
        for each in generator if isinstance(generator, list) else filter(None, [generator]):
            if not isinstance(each, torch.Generator):
                raise ValueError(
                    f"`generator` is {each!r}, but must be a `torch.Generator` or a list of them: "
                    "`torch.Generator().manual_seed(0)`."
                )
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"`generator` has {len(generator)} generators, but {batch_size} images were asked for. "
                "Pass one per image, or a single one."
            )

    def _check_parts(self):
        missing = [name for name in self._needed if getattr(self, name) is None]
        if missing:
            raise ValueError(
                f"this pipeline was loaded without its `{missing[0]}`, so it cannot draw. Load it with all its parts."
            )

    def _check_choices(
        self,
        guidance_scale: float,
        guidance_interval: tuple[float, float],
        velocity_scale: float,
        tensor_inputs: Sequence[str],
    ):
        levels = list(guidance_interval) if isinstance(guidance_interval, Iterable) else []
        if len(levels) != 2 or not all(map(is_number, levels)) or not 0 <= levels[0] <= levels[1] <= 1:
            raise ValueError(
                f"`guidance_interval` is {guidance_interval}, but must be two noise levels, 0 <= low <= high <= 1."
            )
        if not is_number(guidance_scale):
            raise ValueError(
                f"`guidance_scale` is {guidance_scale!r}, but must be a finite number; 1 turns guidance off."
            )
        if not is_number(velocity_scale) or velocity_scale <= 0:
            raise ValueError(
                f"`velocity_scale` is {velocity_scale!r}, but must be a number above 0; 1 changes nothing."
            )
        if velocity_scale != 1 and not self.is_flow_matching:
            raise ValueError("`velocity_scale` is for flow matching, but this pipeline is for diffusion. Leave it out.")
        unknown = set(tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` has {sorted(unknown)}, but must be out of "
                f"{self._callback_tensor_inputs}."
            )

    def _check_texts(self, texts: dict[str, Sequence], class_labels, *, is_guided: bool):
        """Raises `ValueError` for texts that the models cannot take, or if they need texts that are missing."""
        if not self.takes_text:
            if texts:
                kind = "is unconditional" if self.null_class is None else "draws by class (`class_labels`)"
                raise ValueError(
                    f"`{next(iter(texts))}` was given, but this pipeline {kind}: its transformer takes no text. Leave it out."
                )
            return
        if class_labels is not None and self.null_class is None:
            raise ValueError(
                f"`class_labels` is {class_labels!r}, but this pipeline has no classes. Say it in words: `prompt`."
            )
        against = [name for name in ("negative_prompt", "negative_prompt_embeds") if name in texts]
        if against and self.guidance_transformer is not None:
            raise ValueError(
                f"`{against[0]}` was given, but guidance leads away from what `guidance_transformer` draws. Leave it out."
            )
        for name in ("prompt", "negative_prompt"):
            if name in texts and f"{name}_embeds" in texts:
                raise ValueError(f"`{name}` and `{name}_embeds` were given; leave one of them out.")
            if name in texts and self.text_encoder is None:
                raise ValueError(
                    f"`{name}` was given, but this pipeline has no `text_encoder`. Load it with one, or pass `{name}_embeds`."
                )
            if name in texts and not (texts[name] and all(isinstance(text, str) for text in texts[name])):
                raise ValueError(
                    f"`{name}` is {texts[name]!r}, but must be one or more texts; classes are `class_labels`."
                )
        needed = ["prompt_embeds", *(["negative_prompt_embeds"] if is_guided else [])]
        missing = [name for name in needed if name not in texts and self.text_encoder is None]
        if missing:
            raise ValueError(
                f"this pipeline has no `text_encoder`, so it needs `{'` and `'.join(missing)}`: hidden states of "
                "the text encoder that the transformer was trained with."
            )

    def _told_apart(self, prompt, class_labels) -> tuple:
        """Prompt and class labels: the first argument of a call is one or the other, as the transformer takes text or classes."""
        if class_labels is None and not self.takes_text and self.null_class is not None:
            return None, prompt
        return prompt, class_labels

    def _by_column(self, class_labels: Any, conditions: Mapping[str, Any] | None) -> tuple[Any, dict[str, Any]]:
        """Labels of the first kind of classes, and all conditions, among them the labels of other kinds."""
        if not (conditions is None or isinstance(conditions, Mapping)):
            raise ValueError(
                f"`conditions` is a {type(conditions).__name__}, but must map names to values. This pipeline draws from "
                f"{', '.join(f'`{name}`' for name in self.conditions) or 'none'}."
            )
        conditions = dict(conditions or {})
        if isinstance(class_labels, Mapping):
            known = [*filter(None, [self.label_column]), *self.conditions]
            unknown = [name for name in class_labels if name not in known]
            if unknown:
                kinds = f"draws from {', '.join(f'`{name}`' for name in known)}" if known else "has one kind of classes"
                raise ValueError(f"`class_labels` has `{unknown[0]}`, but this pipeline {kinds}. Leave it out.")
            both = sorted(class_labels.keys() & conditions.keys())
            if both:
                raise ValueError(f"`{both[0]}` is in `class_labels` and in `conditions`; leave one of them out.")
            conditions |= class_labels
            class_labels = conditions.pop(self.label_column, None)
        missing = [name for name in columns_of(self.conditions, "channels") if name not in conditions]
        if missing:
            raise ValueError(
                f"this pipeline draws from an image, `{missing[0]}`: pass `conditions={{'{missing[0]}': image}}`, or None for no image."
            )
        return class_labels, conditions

    def _resolve_labels(self, class_labels: int | str | Iterable[int | str] | None) -> list[int | None]:
        """One id per label; without labels, only the null class (`None` if the transformer is unconditional)."""
        if class_labels is None:
            return [self.null_class]
        label_ids = self.get_label_ids(class_labels)
        if not label_ids:
            raise ValueError("`class_labels` is empty. Pass ids or names, or leave it out for the null class.")
        return label_ids

    def _latent_shape(
        self, height: int | None, width: int | None, latents: torch.Tensor | None
    ) -> tuple[int, int, int]:
        """`(C, h, w)` of the latents for an image of the given size, of given latents, or of the training size."""
        config = self.transformer.config
        factor = self.vae_scale_factor
        sides = (config.sample_size,) * 2 if isinstance(config.sample_size, int) else config.sample_size
        if getattr(latents, "ndim", 0) == 4:
            sides = latents.shape[2:]
        height, width = (
            side * factor if asked is None else asked for asked, side in zip((height, width), sides, strict=True)
        )
        check_counts(height=height, width=width)
        unit = factor * config.patch_size
        for name, size in (("height", height), ("width", width)):
            if size % unit:
                nearest = [max(1, size // unit) * unit, max(1, size // unit) * unit + unit]
                raise ValueError(
                    f"`{name}` is {size}, but must be a multiple of {unit} (the autoencoder's factor {factor} times "
                    f"the transformer's patch size {config.patch_size}). Nearest: {nearest[0]} and {nearest[1]}."
                )
        if height != width and isinstance(unwrap_module(self.transformer), DiTTransformer2DModel):
            raise ValueError(
                f"{height} x {width} was asked for, but `DiTTransformer2DModel` makes only square images. "
                f"Use {min(height, width)} x {min(height, width)}."
            )
        return config.in_channels, height // factor, width // factor


class AutoencoderShape(NamedTuple):
    """
    What an autoencoder takes and gives, whatever its class.

    Attributes:
        image_channels, latent_channels (`int`): For a `VQModel` the dimension of its codes.
        factor (`int`): Pixels of the image per latent pixel, along a side.
        side (`int` or pair, *optional*): Pixels of the images that it was trained on, where its config tells.
    """

    image_channels: int
    latent_channels: int
    factor: int
    side: int | Sequence[int] | None


def autoencoder_shape(config: Mapping) -> AutoencoderShape:
    """The shape of one of diffusers' autoencoders, by its config."""
    if is_representation_autoencoder(config):
        factor = config["patch_size"]  # of the decoder
        side = config["encoder_input_size"] // config["encoder_patch_size"] * factor
        return AutoencoderShape(config.get("num_channels", 3), config["encoder_hidden_size"], factor, side)
    # The decoder first: of twice the sides, it has one width more.
    names = (
        "decoder_block_out_channels",
        "encoder_block_out_channels",
        "down_block_out_channels",
        "block_out_channels",
    )
    widths = next((config[name] for name in names if config.get(name)), ())
    factor = config.get("spatial_compression_ratio") or 2 ** max(0, len(widths) - 1)
    channels = config.get("vq_embed_dim") or config.get("latent_channels")
    return AutoencoderShape(config.get("in_channels"), channels, factor, config.get("sample_size"))


def is_representation_autoencoder(config: Mapping) -> bool:
    """Whether this is the config of an `AutoencoderRAE`: it normalises its latents itself, and its images are in [0, 1]."""
    return "encoder_hidden_size" in config and "encoder_input_size" in config


def encode_texts(
    tokenizer: Callable, text_encoder: torch.nn.Module, texts: Sequence[str], device: torch.device | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    The last hidden states of texts.

    Args:
        tokenizer, text_encoder: Of transformers.
        texts (sequence of `str`): What is longer than the encoder takes is cut off.
        device (`torch.device`, *optional*): Where the encoder computes; default: where its weights lie.

    Returns:
        `tuple`: hidden states `(B, T, D)` and mask `(B, T)` bool, true for tokens; padding is on the right, and each text has a token.
    """
    ids = tokenizer(list(texts), truncation=True, max_length=token_limit(tokenizer, text_encoder)).input_ids
    ids = [torch.tensor(each or [0]) for each in ids]  # a tokenizer without marks makes nothing of the empty text
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(each) for each in ids], batch_first=True)
    ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    device = text_encoder.device if device is None else device
    states = text_encoder(input_ids=ids.to(device), attention_mask=mask.to(device)).last_hidden_state
    return states, mask.to(device).bool()


def _warn_of_cut(texts: Sequence[str], tokenizer: Callable, text_encoder: torch.nn.Module) -> None:
    """Warns about texts that are longer than the encoder takes."""
    limit = token_limit(tokenizer, text_encoder)
    if all(2 * len(text.encode()) < limit for text in texts):  # so short that they need not be counted
        return
    longest = max(len(ids) for ids in tokenizer(list(texts), verbose=False).input_ids)
    if longest > limit:
        warnings.warn(
            f"a prompt has {longest} tokens, and the text encoder takes {limit}: the rest is cut off.", stacklevel=4
        )


def token_limit(tokenizer: Callable, text_encoder: torch.nn.Module) -> int:
    r"""How many tokens of a text count."""
    limits = (tokenizer.model_max_length, text_encoder.config.to_dict().get("max_position_embeddings"))
    known = [limit for limit in limits if limit is not None and limit < 10**6]  # a huge number stands for none
    return min(known, default=DEFAULT_TOKENS)


def as_list(images: Any, name: str) -> list:
    """The images of an argument: of a list, of a tuple, or the only one."""
    found = list(images) if isinstance(images, list | tuple) else [images]
    if not found or not all(hasattr(each, "getbands") or hasattr(each, "__array__") for each in found):
        kind = "empty" if found == [] else f"a {type(found[0]).__name__}"
        raise ValueError(f"`{name}` is {kind}, but must be a picture, an array, a tensor, or a list of them.")
    return found


def pixels_of(
    image: Any, name: str, mode: str | None = None, value_range: list[float] | None = None, *, background: int = 255
) -> torch.Tensor:
    """
    An image, or a batch of them, as a float32 tensor `(B, C, H, W)` in [0, 1]; pictures in a mode if it is given. `background` is the
    gray behind transparent pictures, unless the mode is RGBA.
    """
    if hasattr(image, "getbands"):
        return _of_picture(image, name, mode, background)
    is_array = not isinstance(image, torch.Tensor)
    if is_array:  # torch takes neither mirrored arrays nor foreign byte orders
        image = image.__array__()
        image = torch.from_numpy(image.astype(image.dtype.newbyteorder("="), order="C"))
    pixels = image
    if pixels.ndim not in (2, 3, 4):
        raise ValueError(f"`{name}` has the shape {tuple(pixels.shape)}, which is no image and no batch of images.")
    if is_array and pixels.ndim > 2:
        pixels = pixels.movedim(-1, -3)
    scale = 255 if pixels.dtype == torch.uint8 else 1
    if not pixels.numel():
        raise ValueError(f"`{name}` is empty: its shape is {tuple(pixels.shape)}. Give at least one image.")
    pixels = pixels.float().reshape(-1, *((1,) * (3 - pixels.ndim)), *pixels.shape[-3:]) / scale
    low, high = value_range if is_array and value_range is not None and scale == 1 else (0.0, 1.0)
    least, most = pixels.aminmax()
    if not (low - 0.01 * (high - low) <= least and most <= high + 0.01 * (high - low)):
        raise ValueError(
            f"`{name}` has numbers from {least:.4g} to {most:.4g}, but must lie in [{low:.4g}, {high:.4g}]."
        )
    return ((pixels - low) / (high - low)).clamp(0, 1)


def _of_picture(image: Any, name: str, mode: str | None, background: int) -> torch.Tensor:
    if image.mode[0] in "IF":
        raise ValueError(
            f"`{name}` is a picture of mode {image.mode}, not of 8 bits. Pass an array with numbers in [0, 1]."
        )
    image = load_image(image, convert_method=lambda turned: turned)
    if mode != "RGBA" and ({"A", "a"} & {*image.getbands()} or "transparency" in image.info):
        image = image.convert("RGBA")
        behind = image.copy()
        behind.paste((background, background, background, 255), (0, 0, *image.size))
        behind.alpha_composite(image)
        image = behind.convert("RGB")
    image = image.convert(mode or ("L" if image.mode in ("1", "L") else "RGB"))
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    pixels = pixels.view(1, image.height, image.width, -1).movedim(-1, 1).float() / 255
    if mode == "RGBA":  # as in training, what is wholly transparent is white
        pixels[:, :3] = torch.where(pixels[:, 3:] > 0, pixels[:, :3], 1.0)
    return pixels


def resized(pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Images of another size, in [0, 1]."""
    if pixels.shape[2:] == (height, width):
        return pixels
    options = {"mode": "bicubic", "antialias": True, "align_corners": False}
    return F.interpolate(pixels, (height, width), **options).clamp(0, 1)


def _numbers(name: str, column: Mapping[str, float], values: list) -> torch.Tensor:
    """Normalised numbers, NaN for `None`."""
    numbers = []
    for value in values:
        if isinstance(value, str | bool) or not (value is None or hasattr(value, "__float__")):
            raise ValueError(f"`{name}` is {value!r}, but must be a number, or None for unknown.")
        number = math.nan if value is None else (float(value) - column["mean"]) / column["std"]
        if value is not None and not math.isfinite(number):
            raise ValueError(f"`{name}` is {value}, but must be finite; None stands for unknown.")
        low, high = column.get("low", -math.inf), column.get("high", math.inf)
        if value is not None and not low <= float(value) <= high:
            warnings.warn(
                f"`{name}` is {float(value):g}, but the training images have {low:g} to {high:g}: the model has not seen such values.",
                stacklevel=4,
            )
        numbers.append(number)
    return torch.tensor(numbers)


def _classes(name: str, column: Mapping[str, list[str]], values: list) -> torch.Tensor:
    """Numbers of classes; the number of all classes for `None`."""
    labels, numbers = column["labels"], []
    for value in values:
        if isinstance(value, str):
            found = [n for n, label in enumerate(labels) if label == value]
            found = found or [
                n for n, label in enumerate(labels) if label.strip().casefold() == value.strip().casefold()
            ]
        else:
            number = len(labels) if value is None else whole_number(value)
            found = [number] if number is not None and 0 <= number <= len(labels) else []
        if len(found) != 1:
            nearest = difflib.get_close_matches(str(value), labels, n=5, cutoff=0)
            raise ValueError(
                f"`{value}` is not one of the {len(labels)} classes of `{name}`. Nearest: {', '.join(nearest)}."
            )
        numbers += found
    return torch.tensor(numbers)


def conditions_as_arguments(
    conditions: Mapping[str, Mapping], rows: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    r"""
    Values of columns as arguments of the transformer, which has the columns of a kind in the order of their names.

    Args:
        conditions (mapping): What `DAEDiTPipeline` has of this name.
        rows (mapping of `torch.Tensor`): For each column `(B,)` classes, `(B,)` normalised numbers, or images of [`on_latents`].
    """
    of_kind = {kind: [rows[name] for name in columns_of(conditions, kind)] for kind in CONDITION_KINDS}
    return {
        argument: torch.stack(of_kind[kind], dim=1) if kind != "channels" else of_kind[kind][0]
        for kind, argument in CONDITION_KINDS.items()
        if of_kind[kind]
    }


def columns_of(conditions: Mapping[str, Mapping], kind: str) -> list[str]:
    r"""The columns of a kind, one of `CONDITION_KINDS`, in the transformer's order."""
    return [name for name in sorted(conditions) if kind in conditions[name]]


def on_latents(pixels: torch.Tensor, factor: int) -> torch.Tensor:
    r"""
    An image on the latents' grid: each square of `factor * factor` pixels becomes channels, and one more channel says that there
    is an image.

    Args:
        pixels (`torch.Tensor` of shape `(B, C, H, W)`): In [-1, 1].
        factor (`int`): Pixels per latent pixel, along a side.

    Returns:
        `torch.Tensor` of shape `(B, C * factor**2 + 1, H / factor, W / factor)`; all zeros would stand for no image.
    """
    unshuffled = F.pixel_unshuffle(pixels, factor)
    return torch.cat((unshuffled, torch.ones_like(unshuffled[:, :1])), dim=1)


def fitted(pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
    r"""Condition images of another size: by nearest neighbour if they hold few values, as masks do, else as in [`resized`]."""
    if pixels.shape[2:] == (height, width) or len(pixels.unique()) > FEW_VALUES:
        return resized(pixels, height, width)
    return F.interpolate(pixels, (height, width), mode="nearest-exact")


def _listed(texts: Any) -> Any:
    """Texts as a list; None stays."""
    return texts if texts is None else list(texts) if isinstance(texts, list | tuple) else [texts]


def tensor_inputs_of(callback: Callable | None, given: Iterable[str] | None) -> Iterable[str]:
    """Names of the tensors that a callback gets; one of diffusers says itself what it reads."""
    given = ("latents",) if given is None else given
    return getattr(callback, "tensor_inputs", given)


def _repeated(
    arguments: dict[str, torch.Tensor], batch_size: int, num_images_per_label: int
) -> dict[str, torch.Tensor]:
    """A transformer's arguments for each image of a batch: one for all, or those of each label."""
    return {
        name: value.repeat_interleave(batch_size if len(value) == 1 else num_images_per_label, 0)
        for name, value in arguments.items()
    }


def _text_arguments(embeds: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}


def _as_wide(*arguments: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Texts of the transformer's arguments, padded to the same number of tokens."""
    width = max(each["encoder_attention_mask"].shape[1] for each in arguments if each)
    return [
        {name: F.pad(value, (0, 0) * (value.ndim - 2) + (0, width - value.shape[1])) for name, value in each.items()}
        for each in arguments
    ]


def whole_number(value: Any) -> int | None:
    """A whole number, also one of numpy or torch; `None` for anything else."""
    try:
        return operator.index(value)
    except TypeError:
        return None


def is_number(value: Any) -> bool:
    """Whether a value is a finite number, also one of numpy or torch."""
    try:
        return hasattr(value, "__float__") and math.isfinite(value)
    except (TypeError, ValueError, RuntimeError):  # of an array of several
        return False


def check_counts(**counts: Any) -> None:
    """Raises `ValueError` unless all are whole numbers of at least 1."""
    for name, value in counts.items():
        if (whole_number(value) or 0) < 1:
            raise ValueError(f"`{name}` is {value!r}, but must be a whole number of at least 1.")


def _names_by_id(id2label: Mapping[Any, str] | Sequence[str] | None) -> dict[int, str]:
    """Names by the numbers of their classes. JSON knows no integer keys: a reloaded pipeline gets "0", "1", ..."""
    named = id2label if isinstance(id2label, Mapping) else dict(enumerate(id2label or []))
    wrong = [key for key in named if not str(key).isdecimal()]
    if wrong:
        raise ValueError(f"`id2label` has {wrong[0]!r}, but maps ids to names: {{0: 'cat', 1: 'dog'}}.")
    for name in named.values():
        if not isinstance(name, str):
            raise ValueError(f"`id2label` has the name {name!r}, but names are texts: {{0: 'cat', 1: 'dog'}}.")
    return {int(key): name for key, name in named.items()}


def _settings_of(model: torch.nn.Module) -> dict:
    """The settings of the last pipeline made with this model, so that `Pipeline(**pipe.components)` keeps them. They may be changed."""
    return {} if model is None else vars(unwrap_module(model)).setdefault("_pipeline_settings", {})


def _warn_unless_finite(latents: torch.Tensor, dtype: torch.dtype) -> None:
    if not latents.isfinite().all():
        hint = "Numbers may exceed the range of float16: load the transformer in bfloat16 or float32."
        warnings.warn(
            "the transformer has drawn numbers that are not finite, so images are spoiled. "
            + (hint if dtype == torch.float16 else "Its weights, guidance or the inputs may hold such numbers."),
            stacklevel=3,
        )


def _make_tiles_square(vae: ModelMixin | None) -> None:
    """Gives an autoencoder of images that are no squares tiles that diffusers can work with: squares of the shorter side."""
    sides = getattr(vae, "tile_sample_min_size", None)
    if isinstance(sides, list | tuple):
        factor = sides[0] // vae.tile_latent_min_size
        vae.tile_sample_min_size, vae.tile_latent_min_size = min(sides), min(sides) // factor


def _is_named(model: object, name: str) -> bool:
    """Whether a model's class has this name, whether its code lies in our package or beside the weights."""
    return any(base.__name__ == name for base in type(unwrap_module(model)).__mro__)


def _flow_matching_error(scheduler: SchedulerMixin) -> tuple[float, float]:
    """
    How far a scheduler misses data whose velocity is known: independent normal numbers with standard deviation 0.5 around
    means up to 4. Returns the missing share of the means and of the standard deviation; (0, 0) is right.

    The means reveal a wrong noise schedule or prediction, clipping, noise left at the end, and
    levels that run the wrong way, whatever the scheduler is called. The deviation reveals a scheduler that averages.
    """
    generator = torch.Generator().manual_seed(0)
    means = torch.linspace(-4, 4, 1024).view(1, 4, 16, 16)
    std, steps = 0.5, 50
    scheduler = copy.deepcopy(scheduler)
    # Any shift is right, but a large one would leave too few steps near the image, and a small one hide noise there.
    if hasattr(scheduler, "set_shift"):
        scheduler.set_shift(3.0)
    scheduler.register_to_config(**{name: 3.0 for name in ("shift", "flow_shift") if scheduler.config.get(name)})
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the call warns again
        scheduler.set_timesteps(steps)
        sample = torch.randn(means.shape, generator=generator) * getattr(scheduler, "init_noise_sigma", 1.0)
        has_generator = "generator" in inspect.signature(scheduler.step).parameters
        for timestep in scheduler.timesteps:
            model_input = sample
            if hasattr(scheduler, "scale_model_input"):
                model_input = scheduler.scale_model_input(sample, timestep)
            sigma = float(timestep) / 1000
            # x = (1 - sigma) data + sigma noise is normal, so the expected data and noise given x are linear in x.
            centred = model_input - (1 - sigma) * means
            variance = (1 - sigma) ** 2 * std**2 + sigma**2
            velocity = (sigma - (1 - sigma) * std**2) / max(variance, 1e-12) * centred - means
            options = {"generator": generator} if has_generator else {}
            sample = scheduler.step(velocity, timestep, sample, return_dict=False, **options)[0]
    found = (sample * means).mean() / means.square().mean()
    return float(1 - found), float(1 - (sample - found * means).std() / std)


def _is_for_flow_matching(scheduler: SchedulerMixin) -> bool:
    """Whether a scheduler, as it is, samples from velocities."""
    if scheduler.config.get("use_flow_sigmas") or scheduler.config.get("prediction_type") == "flow_prediction":
        return True
    try:
        return abs(_flow_matching_error(scheduler)[0]) < 0.02
    except Exception:  # of a scheduler that wants other arguments
        return False


def _for_diffusion(scheduler: SchedulerMixin) -> SchedulerMixin:
    if _is_for_flow_matching(scheduler):
        raise ValueError(
            f"`scheduler` is a {type(scheduler).__name__} for flow matching, but the transformer was trained for "
            "diffusion (`is_flow_matching` is False). Use DDIMScheduler, DPMSolverMultistepScheduler or another one "
            "with the settings of the training; for a transformer that does predict velocities, make the pipeline with "
            "`is_flow_matching=True`."
        )
    if not hasattr(scheduler, "alphas_cumprod"):  # such as EDM's, whose timesteps are ln sigma / 4
        raise ValueError(
            f"`scheduler` is a {type(scheduler).__name__}, whose timesteps are not those that a transformer trained for "
            "diffusion knows: it would ruin the images. Use DDIMScheduler, DPMSolverMultistepScheduler or another one with "
            "the settings of the training."
        )
    parameters = inspect.signature(scheduler.step).parameters.values()
    needed = [
        each.name for each in parameters if each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD
    ]
    is_other = needed != ["model_output", "timestep", "sample"]
    if is_other or _adds_noise(scheduler):
        reason = f"whose steps need {', '.join(needed)}" if is_other else "which goes from images to noise"
        raise ValueError(
            f"`scheduler` is a {type(scheduler).__name__}, {reason}: it cannot draw here. Use DDIMScheduler, "
            "DPMSolverMultistepScheduler or another one with the settings of the training."
        )
    return scheduler


def _adds_noise(scheduler: SchedulerMixin) -> bool:
    """Whether a scheduler is for inversion: its timesteps ascend."""
    scheduler = copy.deepcopy(scheduler)
    try:
        scheduler.set_timesteps(20)
    except Exception:  # of one that takes only few steps
        return False
    return bool(scheduler.timesteps[0] < scheduler.timesteps[-1])


def _for_flow_matching(scheduler: SchedulerMixin) -> SchedulerMixin:
    """The scheduler, set up for velocities if it can be."""
    name, config = type(scheduler).__name__, scheduler.config
    known = inspect.signature(type(scheduler).__init__).parameters
    if FLOW_SETTINGS.keys() <= known.keys():
        settings = dict(FLOW_SETTINGS)
        if "flow_shift" in known and not config.use_flow_sigmas and config.get("shift") is not None:
            settings["flow_shift"] = config["shift"]  # of the flow-matching scheduler whose config this was made from
        if "final_sigmas_type" in known:
            settings["final_sigmas_type"] = "zero"  # the other choice leaves noise in the image
        if any(config.get(key) != value for key, value in settings.items()):
            scheduler = type(scheduler).from_config(config, **settings)
    # The shift of the solver whose config this was made from.
    inherited = None if "flow_shift" in known else config.get("flow_shift")
    if inherited is not None and "shift" in known and "shift" in config.get("_use_default_values", ()):
        scheduler = type(scheduler).from_config(config, shift=inherited)
    try:
        (bias, narrowness), reason = _flow_matching_error(scheduler), ""
    except Exception as error:
        bias, reason = float("nan"), f" ({type(error).__name__}: {' '.join(str(error).split())[:120]})"
    if abs(bias) < 0.02 and abs(narrowness) < 0.2:
        return scheduler
    if abs(bias) < 0.02 and 0 < narrowness < 1:
        warnings.warn(
            f"`scheduler` is a {name} that adds fresh noise to the average image in each step, which is right only for "
            "distilled transformers. With any other, its images vary too little; use FlowMatchEulerDiscreteScheduler "
            "without `stochastic_sampling`.",
            stacklevel=3,
        )
        return scheduler
    which = "with these settings" if name in FLOW_SCHEDULERS else "which"
    raise ValueError(
        f"`scheduler` is a {name} {which} cannot sample from a transformer that predicts the velocity of flow matching: "
        f"it would ruin the images{reason}. Use {', '.join(FLOW_SCHEDULERS[:-1])} or {FLOW_SCHEDULERS[-1]} by "
        "`pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config)`, without further options; for a "
        "transformer that was trained for diffusion, make the pipeline with `is_flow_matching=False`."
    )


def save_code(own: str, folder: Path, origin: str | None) -> None:
    """
    Puts this file, `own`, into a model's folder, and the pipelines beside it, which import it there under its name there. Code
    that came with a model, whose folder is `origin`, goes on with it: diffusers copies only what it needs.
    """
    (folder / PIPELINE_FILE).write_text(own, encoding="utf-8")
    places = [Path(__file__).parent, *([Path(origin)] if origin else [])]
    if __name__.startswith(DYNAMIC_MODULES):
        places.reverse()
    for name in MADE_FROM_IT:
        found = [place / f"{FAMILY}_{name}.py" for place in places if (place / f"{FAMILY}_{name}.py").is_file()]
        if not found:
            warnings.warn(
                f"the folder has no {FAMILY}_{name}.py: save it with {PACKAGE} installed to have it.", stacklevel=3
            )
            continue
        code = (
            found[0]
            .read_text(encoding="utf-8")
            .replace(f"from {PACKAGE}.pipelines.{FAMILY} ", f"from .{PIPELINE_FILE[:-3]} ")
        )
        code = code.replace(f"from {PACKAGE}.pipelines.", "from .")
        (folder / f"{FAMILY}_{name}.py").write_text(code, encoding="utf-8")


def _name_code_of(pipeline: DiffusionPipeline) -> None:
    """Names the file beside the autoencoder's weights in the index, if its class is not diffusers' own; the class saves the file."""
    vae_class = type(unwrap_module(pipeline.vae))
    module = vae_class.__module__.rpartition(".")[2]
    if module == ASYMMETRIC:
        pipeline.register_to_config(vae=(module, vae_class.__name__))


def _loading_options(part: str, folder: Path, kwargs: dict, *more: str) -> dict[str, Any]:
    """Those arguments of `from_pretrained` of a pipeline, and `more`, that a part in a folder is loaded with."""
    names = ("dtype", "torch_dtype", "disable_mmap", "low_cpu_mem_usage", "use_safetensors", *more)
    options = {name: kwargs[name] for name in names if name in kwargs}
    for name, value in options.items():
        if isinstance(value, dict):  # a dtype for each component
            options[name] = value.get(part, value.get("default"))
    variant = kwargs.get("variant")
    if variant is not None and any(f".{variant}." in file.name for file in folder.glob(f"{part}/*")):
        options["variant"] = variant
    return options


def _folder_of(pipeline_class: type[DiffusionPipeline], name_or_path: str, kwargs: dict[str, Any]) -> Path:
    """The folder of a pipeline, downloaded from the Hub if it is there. The output folder of a training holds it in `pipeline/`."""
    if os.path.isdir(name_or_path):
        folders = [Path(name_or_path), Path(name_or_path) / "pipeline"]
        found = next((each for each in folders if (each / "model_index.json").is_file()), None)
        if found is None:
            raise ValueError(
                f"`{name_or_path}` holds no pipeline: neither it nor its sub-folder `pipeline` has a `model_index.json`. A training "
                "writes it when it ends. Give its output folder, or a pipeline that was saved."
            )
        return found
    if name_or_path.count("/") > 1:
        raise ValueError(f"`{name_or_path}` is neither a folder nor a Hub repository (`user/name`). Check the path.")
    return Path(pipeline_class.download(name_or_path, **kwargs))


def _own_autoencoder(pipeline_class: type[DiffusionPipeline], folder: Path, kwargs: dict) -> dict[str, ModelMixin]:
    """The autoencoder of a folder, with its class from the installed package, if it is not one of diffusers' own."""
    module, class_name = pipeline_class.load_config(folder).get("vae", (None, None))
    if "vae" in kwargs or module != ASYMMETRIC:
        return {}
    model_kwargs = _loading_options("vae", folder, kwargs)
    own = importlib.import_module(f"{PACKAGE}.{ASYMMETRIC}")
    sys.modules.setdefault(module, own)  # diffusers checks the class of what it gets by the name in the index
    return {"vae": getattr(own, class_name).from_pretrained(folder, subfolder="vae", **model_kwargs)}
