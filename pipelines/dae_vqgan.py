"""
Sampling from an autoregressive prior over the codes of a vector-quantised autoencoder.

The whole pipeline is this one file, which needs torch, transformers and diffusers only: `save_pretrained` puts it into
the model's folder as `pipeline.py`, so that what we publish runs without our package.
"""

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import math
import operator
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin, VQModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import unwrap_module
from transformers import DynamicCache, PreTrainedModel

# diffusers loads the code of every local folder into one module, and expects one class of pipelines there. So the other kind's class
# goes, and what differs between the kinds is kept on the class.
globals().pop("DAEDiTPipeline", None)

PACKAGE = "dae_diffusers"
PIPELINE_FILE = "pipeline.py"  # the name diffusers looks for
ASYMMETRIC = "autoencoder_dae_asymmetric"  # module of autoencoders whose decoder has a size of its own


class DAEVQGANPipeline(DiffusionPipeline):
    r"""
    Generates images code by code, in rows from the top left, by class or without classes; the `VQModel` decodes them.

    The prior is any causal language model of `transformers` whose tokens are the codes `0 .. num_codes - 1`, then one
    for each class, then one for no class. A sequence is the class's token followed by the codes. Its config also holds
    `num_codes`, `num_classes`, `grid_size` (rows and columns of codes) and `code_fingerprint` (of the `VQModel` whose
    codes it knows, see [`code_fingerprint`]).

    Args:
        prior ([`~transformers.PreTrainedModel`]): For example a `LlamaForCausalLM` from training/train_vqgan_prior.py.
        vae ([`VQModel`]): Decodes codes.
        id2label (`dict` or `list`, *optional*):
            Class id (or its digits) to name, or the names in order; a name may hold several, separated by commas.
        value_range (`list` of two numbers, *optional*):
            Lowest and highest value of the original images if they were not 8-bit pictures; `output_type="np"` gives
            images in this range.
        default_guidance_scale (`float`, *optional*): Guidance of a call that names none; default: 2.
        default_temperature, default_top_k, default_top_p (*optional*): The same for how codes are drawn; default: all codes, at their
            own probabilities.

    Raises:
        `ValueError`: If the prior was trained on the codes of another model.
    """

    model_cpu_offload_seq = "prior->vae"
    _needed = ("prior", "vae")
    _output_types = ("pil", "np", "numpy", "pt", "codes")
    _code = Path(__file__).read_text(encoding="utf-8")  # read now: the next model's code replaces the file

    def __init__(
        self,
        prior: PreTrainedModel,
        vae: VQModel,
        id2label: dict[int, str] | dict[str, str] | list[str] | None = None,
        value_range: list[float] | None = None,
        default_guidance_scale: float | None = None,
        default_temperature: float | None = None,
        default_top_k: int | None = None,
        default_top_p: float | None = None,
    ):
        super().__init__()
        known, of_images = _settings_of(prior), _settings_of(vae)
        id2label = known.get("id2label") if id2label is None else id2label
        value_range = of_images.get("value_range") if value_range is None else value_range
        self.register_modules(prior=prior, vae=vae)
        self.id2label = _names_by_id(id2label)
        self.value_range = value_range
        defaults = {
            "default_guidance_scale": default_guidance_scale,
            "default_temperature": default_temperature,
            "default_top_k": default_top_k,
            "default_top_p": default_top_p,
        }
        defaults = {name: known.get(name) if value is None else value for name, value in defaults.items()}
        kept = {"id2label": self.id2label or None, "value_range": value_range, **defaults}
        self.register_to_config(**kept)
        known.update(kept)
        of_images.update(value_range=value_range)

    def __setattr__(self, name: str, value):
        if name == "vae" and value is not None:
            if (prior := getattr(self, "prior", None)) is not None:
                _check_codes(prior, value)
            widths = value.config.get("decoder_block_out_channels") or value.config.block_out_channels
            self.vae_scale_factor = 2 ** (len(widths) - 1)
            self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        super().__setattr__(name, value)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs) -> "DAEVQGANPipeline":
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

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs):
        """
        Saves like [`DiffusionPipeline.save_pretrained`], and adds the code of this pipeline, so that the folder or
        repository loads where only diffusers and transformers are installed:
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
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / PIPELINE_FILE).write_text(self._code, encoding="utf-8")
        _name_code_of(self)
        super().save_pretrained(str(folder), *args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> "DAEVQGANPipeline":
        """
        Loads like [`DiffusionPipeline.from_pretrained`], with an autoencoder that is not diffusers' own from the installed package, so
        that no code of the repository runs.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): Folder or Hub repository.
            kwargs: As in [`DiffusionPipeline.from_pretrained`], for example `dtype` or `revision`.

        Raises:
            `ValueError`: If the folder holds no pipeline, or there is none and it cannot be a repository's name.
        """
        name_or_path = str(pretrained_model_name_or_path)
        if "custom_pipeline" in kwargs or not importlib.util.find_spec(PACKAGE):
            return super().from_pretrained(name_or_path, **kwargs)
        folder = _folder_of(cls, name_or_path, kwargs)
        pipeline = super().from_pretrained(folder, **{**kwargs, **_own_autoencoder(cls, folder, kwargs)})
        pipeline.register_to_config(_name_or_path=name_or_path)
        return pipeline

    @property
    def null_class(self) -> int | None:
        """The label for "no class": the number of classes, or `None` if the prior is unconditional."""
        return self.prior.config.num_classes or None

    @property
    def call_defaults(self) -> dict[str, float | None]:
        """What a call draws with that says nothing else, by the names of its arguments; `None` for all codes."""
        config = self.config
        return {
            "guidance_scale": 2.0 if config.default_guidance_scale is None else config.default_guidance_scale,
            "temperature": 1.0 if config.default_temperature is None else config.default_temperature,
            "top_k": config.default_top_k,
            "top_p": config.default_top_p,
        }

    @property
    def labels(self) -> dict[str, int]:
        """Every class name and its id, sorted by name. If classes share a name, the last one counts."""
        pairs = ((name.strip(), key) for key, names in self.id2label.items() for name in names.split(","))
        return dict(sorted(pairs, key=operator.itemgetter(0)))

    def _check_parts(self):
        missing = [name for name in self._needed if getattr(self, name) is None]
        if missing:
            raise ValueError(
                f"this pipeline was loaded without its `{missing[0]}`, so it cannot draw. Load it with all its parts."
            )

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
    def __call__(
        self,
        class_labels: int | str | Iterable[int | str] | None = None,
        guidance_scale: float | None = None,
        *,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        num_images_per_label: int = 1,
        num_images_per_prompt: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        use_cache: bool = True,
        output_type: Literal["pil", "np", "numpy", "pt", "codes"] = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        r"""
        Generates images.

        Args:
            class_labels (`int`, `str` or an iterable of both, *optional*):
                Class ids and names, see `get_label_ids`. Without them, a conditional model generates with its null class
                and without guidance. An unconditional model takes none.
            guidance_scale (`float`, *optional*, defaults to that of the pipeline's config, `default_guidance_scale`, else 2.0):
                Classifier-free guidance of the logits, `unconditional + guidance_scale * (conditional -
                unconditional)`. At 1 and below there is no guidance, which halves the work.
            temperature (`float`, *optional*, defaults to `default_temperature` of the config, else 1.0):
                Divides the logits; below 1 safer, above 1 more varied.
            top_k (`int`, *optional*, defaults to `default_top_k` of the config, else all):
                Draw only from this many of the most likely codes.
            top_p (`float`, *optional*, defaults to `default_top_p` of the config, else 1.0):
                Draw only from the most likely codes that together have this probability, in (0, 1].
            num_images_per_label (`int`, defaults to 1): Images per label, next to each other in the result.
            num_images_per_prompt (`int`, *optional*): The same, under the name that diffusers has for it.
            generator (`torch.Generator` or `list` of them, *optional*):
                Source of all draws. With a list of one per image, an image does not depend on the others in its batch.
            use_cache (`bool`, defaults to `True`):
                Keep keys and values of the codes drawn so far; without it the same codes take far longer.
            output_type (`str`, defaults to `"pil"`):
                `"pil"`, `"np"` or `"numpy"` `(B, H, W, C)` and `"pt"` `(B, C, H, W)`, all in [0, 1], or `"codes"`,
                int64 `(B, h, w)`, for `decode_codes`.
            return_dict (`bool`, defaults to `True`): Return an [`ImagePipelineOutput`] rather than a tuple.

        Returns:
            [`ImagePipelineOutput`] or `tuple`: `images`, in the order of the labels.

        Raises:
            `ValueError`: If an argument does not fit the models or the other arguments.
            `FloatingPointError`: If the prior predicts numbers that are not finite.

        Example:
            ```py
            pipe = DAEVQGANPipeline.from_pretrained("user/my-model").to("cuda")
            image = pipe("cat", top_p=0.95, generator=torch.Generator().manual_seed(0)).images[0]
            ```
        """
        self._check_parts()
        num_codes = self.prior.config.num_codes
        defaults = self.call_defaults
        guidance_scale = defaults["guidance_scale"] if guidance_scale is None else guidance_scale
        temperature = defaults["temperature"] if temperature is None else temperature
        top_k = defaults["top_k"] if top_k is None else top_k
        top_p = defaults["top_p"] if top_p is None else top_p
        if num_images_per_prompt is not None:
            num_images_per_label = num_images_per_prompt
        self._check_choices(guidance_scale, temperature, top_k, top_p, num_images_per_label, output_type)
        label_ids = [self.null_class or 0] if class_labels is None else self.get_label_ids(class_labels)
        if not label_ids:
            raise ValueError("`class_labels` is empty. Pass ids or names, or leave it out for the null class.")
        batch_size = len(label_ids) * num_images_per_label
        self._check_generators(generator, batch_size)
        device = self._execution_device
        height, width = self.prior.config.grid_size
        uniform = _draw_uniform(batch_size, height * width, generator).to(device)
        tokens = num_codes + torch.tensor(label_ids, device=device).repeat_interleave(num_images_per_label)
        is_guided = class_labels is not None and guidance_scale > 1
        if is_guided:
            tokens = torch.cat((tokens, torch.full_like(tokens, num_codes + self.null_class)))
        sequence = tokens[:, None]
        cache = DynamicCache() if use_cache else None
        is_finite = torch.ones((), dtype=torch.bool, device=device)
        with self.progress_bar(total=height * width) as progress_bar:
            for position in range(height * width):
                logits = self.prior(
                    input_ids=sequence[:, -1:] if use_cache else sequence, past_key_values=cache, use_cache=use_cache
                ).logits[:, -1, :num_codes].float()  # fmt: skip
                if is_guided:
                    conditional, unconditional = logits.chunk(2)
                    logits = unconditional + guidance_scale * (conditional - unconditional)
                is_finite &= logits.isfinite().all()
                drawn = _draw_codes(logits / temperature, uniform[:, position], top_k, top_p)
                drawn = torch.cat((drawn, drawn)) if is_guided else drawn
                sequence = torch.cat((sequence, drawn[:, None]), dim=1)
                progress_bar.update()

        if not is_finite:
            raise FloatingPointError(
                f"the prior predicts numbers that are not finite (in {self.prior.dtype}), so it cannot draw. If its weights are sound, "
                "load it in float32 or bfloat16."
            )
        images = sequence[:batch_size, 1:].reshape(batch_size, height, width)
        if output_type != "codes":
            images = self._to_output(self.decode_codes(images), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @torch.no_grad()
    def decode_codes(self, codes: torch.Tensor) -> torch.Tensor:
        """
        Decodes codes into images.

        Args:
            codes (`torch.Tensor` of shape `(B, h, w)`): Indices of the codes, int64.

        Returns:
            `torch.Tensor` of shape `(B, channels, H, W)`: Images, about [-1, 1].
        """
        # These are code vectors already; only `lookup_from_codebook` would take them for indices.
        lookup = self.vae.config.lookup_from_codebook
        vectors = self.code_vectors(codes)
        return self._in_enough_range(
            lambda dtype: self.vae.decode(vectors.to(dtype), force_not_quantize=not lookup).sample
        )

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

    @torch.no_grad()
    def code_vectors(self, codes: torch.Tensor) -> torch.Tensor:
        """
        The codebook's vectors of codes, which `vae.decode` takes with `force_not_quantize`.

        Args:
            codes (`torch.Tensor` of shape `(B, h, w)`): int64, numbers of the codes.

        Returns:
            `torch.Tensor` of shape `(B, C, h, w)`: On the pipeline's device.
        """
        codebook = self.vae.quantize.embedding.weight
        codes = codes.to(self._execution_device if codebook.is_meta else codebook.device)
        quantized = self.vae.quantize.get_codebook_entry(codes.flatten(), (*codes.shape, codebook.shape[1]))
        return quantized.to(self._execution_device)

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

    def _check_choices(
        self,
        guidance_scale: float,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        num_images_per_label: int,
        output_type: str,
    ):
        if not is_number(guidance_scale):
            raise ValueError(
                f"`guidance_scale` is {guidance_scale!r}, but must be a finite number; 1 turns guidance off."
            )
        if not is_number(temperature) or temperature <= 0:
            raise ValueError(
                f"`temperature` is {temperature!r}, but must be above 0. For the likeliest codes: `top_k=1`."
            )
        if top_p is not None and not (is_number(top_p) and 0 < top_p <= 1):
            raise ValueError(f"`top_p` is {top_p!r}, but must be above 0 and at most 1.")
        check_counts(num_images_per_label=num_images_per_label, **({} if top_k is None else {"top_k": top_k}))
        self._check_output(output_type)


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


def code_fingerprint(vae: VQModel) -> str:
    """Hash of the weights that turn images into codes: encoder, quant_conv and codebook. The decoder may change."""
    digest = hashlib.sha256()
    for name, value in sorted(vae.state_dict().items()):
        if name.split(".")[0] in ("encoder", "quant_conv", "quantize"):
            digest.update(name.encode())
            digest.update(value.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _check_codes(prior: PreTrainedModel, vae: VQModel) -> None:
    # Only float32 weights have the hash of the training. Weights that were rounded to 16 bits do not, even as float32 again.
    weights = list(vae.state_dict().values())
    is_whole = all(value.dtype == torch.float32 and not value.is_meta for value in weights)
    is_rounded = any(
        all(torch.equal(v, v.to(kind).float()) for v in weights) for kind in (torch.float16, torch.bfloat16)
    )
    if not is_whole or is_rounded:
        same = prior.config.num_codes == vae.config.num_vq_embeddings
    else:
        same = prior.config.code_fingerprint == code_fingerprint(vae)
    if not same:
        raise ValueError(
            f"The prior was trained on {prior.config.num_codes} codes of another VQ model than this one of "
            f"{vae.config.num_vq_embeddings}. Use the autoencoder that the prior was trained with."
        )


def _draw_uniform(num_images: int, num_codes: int, generator) -> torch.Tensor:
    """`(num_images, num_codes)` draws from [0, 1), on the CPU; image by image where there are several generators."""
    if not isinstance(generator, list):
        device = None if generator is None else generator.device
        return torch.rand(num_images, num_codes, generator=generator, device=device).cpu()
    return torch.stack([torch.rand(num_codes, generator=each, device=each.device).cpu() for each in generator])


def _draw_codes(logits: torch.Tensor, uniform: torch.Tensor, top_k: int | None, top_p: float | None) -> torch.Tensor:
    """One code for each row of `(B, K)` logits, by inverting the distribution function at `(B,)` uniform draws."""
    probabilities, codes = logits.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        probabilities[:, top_k:] = 0
    if top_p is not None:  # the likeliest that reach it together; the first always stays
        share = probabilities / probabilities.sum(dim=-1, keepdim=True)
        is_behind = share.cumsum(dim=-1) - share >= top_p
        is_behind[:, 0] = False  # a share may be too small for float32
        probabilities[is_behind] = 0
    reached = probabilities.cumsum(dim=-1)
    # Rounding may put a draw at the very end, behind the last code that is allowed. None is allowed if logits are NaN: that is no index.
    rank = (reached <= uniform[:, None] * reached[:, -1:]).sum(dim=-1).minimum((probabilities > 0).sum(dim=-1) - 1)
    return codes.gather(1, rank.clamp(min=0)[:, None])[:, 0]


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
