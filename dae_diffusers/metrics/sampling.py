"""Draws images from any pipeline, so that each image depends only on its number."""

import inspect
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline, ModelMixin

from dae_diffusers.autoencoders.loading import check_finite, check_has_weights, spatial_factor, takes_images
from dae_diffusers.caching import CachedRows, cached_rows
from dae_diffusers.data import ImageDataset
from dae_diffusers.data.classes import class_name
from dae_diffusers.data.condition_values import ConditionValues, as_call
from dae_diffusers.duration import duration
from dae_diffusers.errors import UserError, in_full, one_line
from dae_diffusers.metrics.schedulers import drawing_by
from dae_diffusers.metrics.statistics import padded_size
from dae_diffusers.pipelines.dae_dit import DAEDiTPipeline
from dae_diffusers.pipelines.dae_vqgan import DAEVQGANPipeline
from dae_diffusers.randomness import Stream, derived_seed
from dae_diffusers.weights import model_fingerprint

logger = logging.getLogger(__name__)

# Arguments of a pipeline's call that are the same for every image.
CALL_OPTIONS = (
    "guidance_scale",
    "guidance_interval",
    "num_inference_steps",
    "temperature",
    "top_k",
    "top_p",
    "velocity_scale",
)
_OF_GUIDANCE = {"guidance_scale", "guidance_interval"}

_TRIED_STEPS = (2, 2, 4)


@dataclass(frozen=True)
class SampleSettings:
    r"""
    How images are drawn. Image `n` depends only on `(seed, n)` and its label, not on batches or processes.

    Attributes:
        num_images (`int`): Number of images.
        guidance_scale (`float` or `None`): Classifier-free guidance; 1 is none. None for a pipeline that has none.
        num_inference_steps (`int` or `None`): Denoising steps; None for a pipeline that has none.
        label_sampling (`str`): `data` (each class as often as `class_counts` say), `balanced` (each class equally often) or `random`
            (uniformly). In the first two, any number of first samples has the right shares, up to one image.
        seed (`int`): Seed of labels and noise.
        temperature, top_k, top_p (*optional*): For a pipeline that draws codes; None is its default.
        velocity_scale (`float`, *optional*): For a pipeline of flow matching; None is its default.
        guidance_interval (pair of `float`, *optional*): Noise levels with guidance; None is the pipeline's default.
        scheduler (`str`, *optional*): Class of the scheduler, see [`~dae_diffusers.metrics.schedulers.drawing_by`]; None is the pipeline's
            own.
        prompts (`tuple[str, ...]`, *optional*): For a text-to-image pipeline: a text for each class, or a single one without
            classes; or the captions of images.
        classes (`tuple[int, ...]`, *optional*): The class of each prompt or condition, for a pipeline that also has classes.
        conditions ([`~dae_diffusers.data.condition_values.ConditionValues`], *optional*): What else images are drawn from, as
            many as prompts.
        class_counts (`tuple[int, ...]`, *optional*): For `data`: how many training images each class has, see [`class_counts`]. Without
            them `data` is `balanced`.
    """

    num_images: int
    guidance_scale: float | None = None
    num_inference_steps: int | None = None
    label_sampling: Literal["data", "balanced", "random"] = "data"
    seed: int = 0
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    velocity_scale: float | None = None
    guidance_interval: tuple[float, float] | None = None
    scheduler: str | None = None
    prompts: tuple[str, ...] | None = None
    classes: tuple[int, ...] | None = None
    conditions: ConditionValues | None = None
    class_counts: tuple[int, ...] | None = None

    def given(self) -> dict[str, Any]:
        r"""Every setting that is not None, by name, as JSON can hold it."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        return given if self.conditions is None else {**given, "conditions": self.conditions.fingerprint}

    def call_kwargs(self) -> dict[str, Any]:
        r"""The arguments of the pipeline's call that are the same for every image."""
        return {name: value for name, value in self.given().items() if name in CALL_OPTIONS}

    def labels(self, num_classes: int | None) -> torch.Tensor | None:
        r"""The label of each image, `(num_images,)` int64; None without classes."""
        if num_classes is None:
            return None
        if self.label_sampling != "random":
            counts = self.class_counts if self.label_sampling == "data" else None
            return in_proportion(counts or (1,) * num_classes, self.num_images)
        generator = torch.Generator().manual_seed(derived_seed(self.seed, Stream.SAMPLE_LABELS))
        return torch.randint(num_classes, (self.num_images,), generator=generator)


def in_proportion(counts: Sequence[int], number: int) -> torch.Tensor:
    r"""
    `number` labels, int64: each class in proportion to its count, up to one, and evenly mixed, so that the same holds for every beginning.
    Equal counts give 0, 1, ..., C-1, 0, 1, ...
    """
    total = sum(counts)
    shares = [count * number / total for count in counts]
    numbers = [int(share) for share in shares]
    by_remainder = sorted(range(len(counts)), key=lambda label: numbers[label] - shares[label])
    for label in by_remainder[: number - sum(numbers)]:
        numbers[label] += 1
    places = sorted(((n + 0.5) / of_label, label) for label, of_label in enumerate(numbers) for n in range(of_label))
    return torch.tensor([label for _, label in places], dtype=torch.int64)


def ids_in_pipeline(pipeline: DiffusionPipeline, images: ImageDataset) -> list[int]:
    r"""
    The images' labels as the generator numbers its classes: by their names, if it knows all of them. If it does not, a warning is
    logged once.

    Raises:
        UserError: If the generator has fewer classes.
    """
    known = {class_name(name): number for number, name in (getattr(pipeline, "id2label", None) or {}).items()}
    labels, names = images.labels, {number: class_name(name) for number, name in images.id2label.items()}
    unknown = sorted(set(names.values()) - known.keys())
    if not unknown:
        labels = [known[names[label]] for label in labels]
    elif known:
        _warn_of_unknown_class(unknown[0])
    num_classes = getattr(pipeline, "null_class", None)
    if num_classes is not None and max(labels, default=0) >= num_classes:
        raise UserError(
            f"the generator knows {num_classes} classes, but the images have a label {max(labels)}. Give the images that it "
            "was trained on."
        )
    return labels


@cache  # once
def _warn_of_unknown_class(name: str) -> None:
    logger.warning(
        "the images have a class %r that the pipeline does not know, so their labels count by number, not by name: some classes may "
        "be taken for others. Give the images that it was trained on.",
        name,
    )


def class_counts(
    pipeline: DiffusionPipeline | None, images: ImageDataset, num_classes: int | None
) -> tuple[int, ...] | None:
    r"""
    How many of the images are of each class, as the pipeline numbers its classes; None if either has no classes, or the pipeline does
    not know those of the images.
    """
    if num_classes is None or not images.labels:
        return None
    try:
        labels = images.labels if pipeline is None else ids_in_pipeline(pipeline, images)
    except UserError:
        return None
    if max(labels) >= num_classes:
        return None
    return tuple(torch.bincount(torch.tensor(labels), minlength=num_classes).tolist())


class Sampler:
    r"""
    Calls any kind of pipeline through one interface.

    | pipeline | drawn for each image | classes |
    |---|---|---|
    | text-to-image, ours or another one | a prompt, and its class for a pipeline that also has classes | the number of prompts |
    | ours, with conditions | a condition, and its class or prompt if the pipeline has such | the number of conditions |
    | with `num_images_per_label` (ours, and stock DiT pipelines loaded as ours) | a class, or none | its own |
    | with `batch_size` (unconditional ones) | nothing | none |

    Args:
        pipeline (`DiffusionPipeline`): The pipeline, on its device.
        prompts (`tuple[str, ...]`), classes (`tuple[int, ...]`), conditions (*optional*): See [`SampleSettings`].

    Raises:
        UserError: For a pipeline of another kind, a text-to-image pipeline without prompts, or other conditions than the pipeline has.

    Attributes:
        accepted (`set[str]`): What changes what this pipeline draws: names of the call's options, and `scheduler`.
        num_classes (`int` or `None`): See the table.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        prompts: tuple[str, ...] | None = None,
        classes: tuple[int, ...] | None = None,
        conditions: ConditionValues | None = None,
    ):
        self.pipeline = pipeline
        self.prompts, self.classes, self.conditions = prompts, classes, conditions
        check_condition_values(getattr(pipeline, "conditions", {}), conditions)
        self.accepted = set(inspect.signature(type(pipeline).__call__).parameters)
        self.num_classes: int | None = None
        self._rows: dict[str, Sequence] = {}  # what differs from image to image, unless that is a class alone
        has_prompt = takes_text(pipeline)
        if not has_prompt:
            self.accepted.discard("prompt")
        if isinstance(pipeline, DAEDiTPipeline) and not pipeline.is_flow_map:  # it checks what suits it
            self.accepted.add("scheduler")
        if not getattr(pipeline, "is_flow_matching", False):
            self.accepted.discard("velocity_scale")
        has_rows = has_prompt or conditions is not None
        has_classes = has_rows and getattr(pipeline, "null_class", None) is not None
        if "num_images_per_label" in self.accepted and not has_rows:
            self.num_classes = pipeline.null_class
            if self.num_classes is None and getattr(pipeline, "guidance_transformer", None) is None:
                self.accepted -= _OF_GUIDANCE  # there is nothing to guide towards
        elif "prompt" in self.accepted or has_rows:
            if prompts is None and has_prompt:
                raise UserError(
                    f"a {type(pipeline).__name__} draws images from a text: give `prompt`, such as 'a photo of a {{label}}', or the "
                    "`caption_column` of the images."
                )
            given = {"prompt": prompts if has_prompt else None, "class_labels": classes if has_classes else None}
            given["conditions"] = conditions
            self._rows = {name: values for name, values in given.items() if values is not None}
            number = max(map(len, self._rows.values()))
            self.num_classes = number if number > 1 else None
        elif "batch_size" not in self.accepted:
            raise UserError(
                f"a {type(pipeline).__name__} cannot be evaluated: its call takes none of `class_labels` with "
                f"`num_images_per_label`, `prompt` and `batch_size`, but {sorted(self.accepted - {'self', 'scheduler'})}."
            )

    def arguments(self, labels: list[int] | None, count: int) -> dict[str, Any]:
        r"""The arguments of the call that differ from image to image, for `count` images with these labels."""
        if self._rows:
            return {name: chosen_of(values, labels or [0] * count) for name, values in self._rows.items()}
        if "num_images_per_label" not in self.accepted:
            return {"batch_size": count}
        return {"num_images_per_label": count} if labels is None else {"class_labels": labels}

    def texts(self, settings: SampleSettings) -> list[str]:
        r"""The text that each image of some settings is drawn from, for a pipeline that takes text."""
        labels = settings.labels(self.num_classes)
        return chosen_of(self.prompts, [0] * settings.num_images if labels is None else labels.tolist())

    def __call__(
        self, labels: list[int] | None, count: int, generators: list[torch.Generator], **options
    ) -> torch.Tensor:
        r"""
        Draws `count` images, `(count, C, H, W)` in [0, 1]. Options that the pipeline does not know are ignored.

        Raises:
            UserError: If an image holds numbers that are not finite.
        """
        try:
            images = self.pipeline(
                **self.arguments(labels, count),
                **{name: value for name, value in options.items() if name in self.accepted},
                generator=generators,
                output_type="np",
            ).images
        except FloatingPointError as error:
            raise UserError(f"no image can be drawn: {error}") from error
        images = torch.as_tensor(images).permute(0, 3, 1, 2)
        if not images.isfinite().all():
            raise UserError(
                "the pipeline has drawn images that hold NaN or infinite numbers. Draw in float32 or bfloat16, or look at "
                "its weights."
            )
        value_range = self.pipeline.config.get("value_range")
        if value_range is not None:  # our pipelines give numbers as the training images had them
            low, high = value_range
            images = (images - low) / (high - low)
        return images


def chosen_of(values: Sequence, numbers: Sequence[int]) -> list | dict[str, list]:
    r"""Some prompts, classes or conditions as an argument of a call; a single one stands for all."""
    chosen = [values[number if len(values) > 1 else 0] for number in numbers]
    return as_call(chosen) if isinstance(values, ConditionValues) else chosen


def check_condition_values(known: dict[str, dict[str, Any]], values: ConditionValues | None) -> None:
    r"""Raises `UserError` if the images' conditions are not those that a pipeline draws from."""
    names = set() if values is None else set(values.names)
    if names != known.keys():
        pairs = ("the pipeline draws from", sorted(known)), ("but the images come with", sorted(names))
        words = ", ".join(f"{text} {', '.join(each) or 'nothing'}" for text, each in pairs)
        raise UserError(
            f"{words} besides their class: name the columns with `label_column`, `continuous_columns`, `condition_column`."
        )
    for name, of_column in {} if values is None else values.labels.items():
        classes = set(map(class_name, known[name].get("labels", ())))
        unknown = [each for each in of_column if class_name(each) not in classes]
        if unknown:
            raise UserError(
                f"the pipeline has no class {unknown[0]!r} of {name}. Give images of the classes that it knows."
            )


def autoencoder_of(pipeline: DiffusionPipeline) -> ModelMixin | None:
    r"""The autoencoder of a pipeline; None for a pipeline without latents, or with an autoencoder that is not for images."""
    parts = (pipeline.components.get(name) for name in ("vae", "vqvae"))
    return next((part for part in parts if part is not None and takes_images(part)), None)


def draw_samples(
    pipeline: DiffusionPipeline,
    settings: SampleSettings,
    folder: Path,
    accelerator: Accelerator,
    *,
    image_shape: tuple[int, int, int] | None = None,
    batch_size: int = 64,
    chunk_size: int = 256,
) -> CachedRows:
    r"""
    Draws images in chunks that are kept in `folder`, so that an interrupted evaluation draws none twice.

    Args:
        pipeline (`DiffusionPipeline`): A pipeline of a kind that [`Sampler`] knows.
        settings ([`SampleSettings`]): What to draw.
        folder (`Path`): Chunks go to a sub-folder named after a fingerprint of the pipeline, the settings and the precision.
        accelerator ([`~accelerate.Accelerator`]): Processes take turns at the chunks, and draw in its precision.
        image_shape (`tuple[int, int, int]`, *optional*): Channels, height and width that images must have.
        batch_size (`int`, *optional*): Images at once; changes images only by float rounding.
        chunk_size (`int`, *optional*): Images in a chunk.

    Returns:
        [`~dae_diffusers.caching.CachedRows`] of shape `(num_images, C, H, W)`: uint8, the same on every process; slicing
        gives a tensor.

    Raises:
        UserError: If images have another shape, or NaN or infinite values.
    """
    batches = image_batches(pipeline, settings, accelerator, batch_size)

    def check_shape(shape: torch.Size) -> None:
        if image_shape is not None and tuple(shape) != tuple(image_shape):
            raise UserError(
                f"the pipeline draws images of the shape {tuple(shape)}, but the images to compare with have {tuple(image_shape)}. Set "
                "`image_channels` and `resolution` to those of the pipeline."
            )

    def draw(chunk: range) -> dict[str, torch.Tensor]:
        parts = []
        for output, count in batches(chunk):
            check_shape(output.shape[1:])
            parts.append((output[:count].float().cpu() * 255).round().to(torch.uint8))
        return {"images": torch.cat(parts)}

    images = cached_rows(
        draw,
        settings.num_images,
        accelerator,
        folder=folder,
        of=generation_inputs(pipeline, settings, accelerator),
        chunk_size=chunk_size,
        description="Drawing",
        load=False,
    )["images"]
    check_shape(images[:1].shape[1:])  # of those that were kept
    return images


def say_duration(
    sampler: Sampler, sweep: list[SampleSettings], folder: Path, accelerator: Accelerator, batch_size: int
) -> None:
    r"""
    Logs how long the drawing of all settings takes, from short draws of one batch. Nothing is logged if these would take more than
    a tenth of that, or if some of the images are there, from an interrupted evaluation. The main process alone draws.
    """
    if not accelerator.is_main_process or any(Path(folder).glob("*/*.safetensors")):
        return
    work = sum(
        -(-each.num_images // (batch_size * accelerator.num_processes)) * (each.num_inference_steps or 1)
        for each in sweep
    )
    ways = {_way_of(settings) for settings in sweep}
    if 10 * len(ways) * (1 if sweep[0].num_inference_steps is None else sum(_TRIED_STEPS)) > work:
        return
    total, costs = 0.0, {}
    for settings in sweep:
        way = _way_of(settings)
        if way not in costs:
            costs[way] = _draw_costs(sampler, settings, accelerator, batch_size)
        once, per_step = costs[way]
        batches = -(-settings.num_images // (batch_size * accelerator.num_processes))
        total += batches * (once + per_step * (settings.num_inference_steps or 0))
    logger.info(
        "drawing %d images for each of %d settings takes about %s", sweep[0].num_images, len(sweep), duration(total)
    )


def _way_of(settings: SampleSettings) -> tuple[Any, ...]:
    """What of the settings decides how long a step takes: whether, and between which noise levels, it is guided, and the scheduler."""
    is_guided = settings.guidance_scale not in (None, 1)
    return is_guided, is_guided and settings.guidance_interval, settings.scheduler


def _draw_costs(
    sampler: Sampler, settings: SampleSettings, accelerator: Accelerator, batch_size: int
) -> tuple[float, float]:
    """Seconds that a batch takes beside its denoising steps, and for each step."""
    labels = settings.labels(sampler.num_classes)
    _, numbers, generators = next(draws_of(sampler.pipeline, range(settings.num_images), batch_size, settings.seed))
    chosen = None if labels is None else labels[numbers].tolist()
    sampler.pipeline.set_progress_bar_config(disable=True)

    def seconds(steps: int) -> float:
        start = time.monotonic()
        by_its_scheduler = drawing_by(sampler.pipeline, settings.scheduler)
        with by_its_scheduler, accelerator.autocast(), decoding_in_range(sampler.pipeline, accelerator):
            sampler(chosen, len(numbers), generators, **settings.call_kwargs() | {"num_inference_steps": steps})
        return time.monotonic() - start

    if settings.num_inference_steps is None:
        return seconds(0), 0.0
    _, two, four = map(seconds, _TRIED_STEPS)  # the very first draw warms up
    per_step = max(0.0, four - two) / 2
    return max(0.0, two - 2 * per_step), per_step


@contextmanager
def decoding_in_range(pipeline: DiffusionPipeline, accelerator: Accelerator) -> Iterator[None]:
    r"""
    Inside the `with` block, fp16 computes everything but the decoder: numbers inside Stable Diffusion XL's exceed its range. So does bf16
    in pipelines that are not ours: not all of them turn images of that type into arrays.
    """
    vae, is_ours = autoencoder_of(pipeline), isinstance(pipeline, DAEDiTPipeline | DAEVQGANPipeline)
    if vae is None or accelerator.mixed_precision not in (("fp16",) if is_ours else ("fp16", "bf16")):
        yield
        return
    decode = vae.decode

    def without_autocast(latents: torch.Tensor, *args, **kwargs):  # which autocast may have given another precision
        with torch.autocast(accelerator.device.type, enabled=False):
            return decode(latents.to(vae.dtype), *args, **kwargs)

    vae.decode = without_autocast
    try:
        yield
    finally:
        del vae.decode


def image_batches(
    pipeline: DiffusionPipeline, settings: SampleSettings, accelerator: Accelerator, batch_size: int
) -> Callable[[range], Iterator[tuple[torch.Tensor, int]]]:
    r"""
    Returns a function that draws the images of a range, batch by batch: padded `(B, C, H, W)` in [0, 1], and how many of them count.
    It raises `UserError` for NaN or infinite values.
    """
    sampler = Sampler(pipeline, settings.prompts, settings.classes, settings.conditions)
    labels = settings.labels(sampler.num_classes)
    pipeline.set_progress_bar_config(disable=True)

    def batches(chunk: range) -> Iterator[tuple[torch.Tensor, int]]:
        for count, numbers, generators in draws_of(pipeline, chunk, batch_size, settings.seed):
            chosen = None if labels is None else labels[numbers].tolist()
            with accelerator.autocast(), decoding_in_range(pipeline, accelerator):
                images = sampler(chosen, len(numbers), generators, **settings.call_kwargs())
            check_finite(images, "images that the pipeline draws")
            yield images, count

    return batches


def draws_of(
    pipeline: DiffusionPipeline, chunk: range, batch_size: int, seed: int, stream: Stream = Stream.SAMPLES
) -> Iterator[tuple[int, list[int], list[torch.Generator]]]:
    r"""
    The batches in which a chunk is drawn: how many images to keep, the numbers of those to draw, and a random generator for each, a
    function of `(seed, stream, number)`. The last number is repeated up to [`~dae_diffusers.metrics.statistics.padded_size`].
    """
    pixels = image_pixels(pipeline)
    batch_size = padded_size(batch_size, pixels)  # so many are computed in any case
    for first in range(chunk.start, chunk.stop, batch_size):
        count = min(batch_size, chunk.stop - first)
        numbers = torch.arange(first, first + padded_size(count, pixels)).clamp(max=first + count - 1).tolist()
        yield count, numbers, [torch.Generator().manual_seed(image_seed(seed, n, stream)) for n in numbers]


def image_seed(seed: int, number: int, stream: Stream = Stream.SAMPLES) -> int:
    r"""The seed of one image's random generator."""
    return derived_seed(seed, stream, number)


def options_of_call(sampler: Sampler, given: dict[str, Any]) -> dict[str, Any]:
    r"""
    Every option that a call of the pipeline has, with the given value or else its own default.

    Args:
        sampler ([`Sampler`]): The pipeline.
        given (`dict`): Values of `CALL_OPTIONS` by name; None stands for the default.

    Raises:
        UserError: For an option that changes nothing of what this pipeline draws.
    """
    pipeline = sampler.pipeline
    parameters = inspect.signature(type(pipeline).__call__).parameters
    of_call = {name: each.default for name, each in parameters.items() if name in CALL_OPTIONS}
    defaults = of_call | getattr(pipeline, "call_defaults", {})
    idle = _OF_GUIDANCE if getattr(pipeline, "is_flow_map", False) else set()  # its guidance is in it
    known = (sampler.accepted - idle) & defaults.keys()
    for name, value in given.items():
        if value is not None and name not in known:
            raise UserError(f"`{name}` changes nothing of what this {type(pipeline).__name__} draws: leave it out.")
    return {name: defaults[name] if given.get(name) is None else given[name] for name in CALL_OPTIONS if name in known}


def options_in_words(options: dict[str, Any]) -> str:
    r"""Options of a call, such as "guidance_scale 1.5, guidance_interval 0 to 0.8"."""
    return ", ".join(
        f"{name} {' to '.join(f'{number:g}' for number in np.ravel(value))}" for name, value in options.items()
    )


def generation_inputs(
    pipeline: DiffusionPipeline, settings: SampleSettings, accelerator: Accelerator
) -> dict[str, Any]:
    r"""The inputs that drawn images depend on, for [`~dae_diffusers.store.fingerprint_of_json`]."""
    return {
        "models": {
            name: model_fingerprint(part)
            for name, part in sorted(pipeline.components.items())
            if isinstance(part, torch.nn.Module)
        },
        "scheduler": scheduler_options(pipeline),
        "settings": settings.given(),
        "mixed_precision": accelerator.mixed_precision,
    }


def scheduler_options(pipeline: DiffusionPipeline) -> dict[str, Any] | None:
    r"""
    The class and options of a pipeline's scheduler; None without a scheduler. Private notes of diffusers are left out, because
    the order of `_use_default_values` changes from process to process.
    """
    if not hasattr(pipeline, "scheduler"):
        return None
    return {name: value for name, value in pipeline.scheduler.config.items() if name == "_class_name" or name[0] != "_"}


def image_pixels(pipeline: DiffusionPipeline) -> int:
    r"""Pixels of an image that a pipeline draws; a large number if its components do not tell, so that batches are not made larger."""
    height, width = image_sides(pipeline) or (2**10, 2**10)
    return height * width


def image_sides(pipeline: DiffusionPipeline) -> tuple[int, int] | None:
    r"""Height and width of the images that a pipeline draws; None if its components do not tell."""
    model = next((getattr(pipeline, n) for n in ("transformer", "unet", "prior") if hasattr(pipeline, n)), pipeline)
    config, vae = getattr(model, "config", None), autoencoder_of(pipeline)
    size = getattr(config, "sample_size", None) or getattr(config, "grid_size", None)
    if not size:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    factor = 1 if vae is None else spatial_factor(vae)
    return height * factor, width * factor


def load_pipeline(name_or_path: str, device: torch.device) -> DiffusionPipeline:
    r"""
    Loads a pipeline as ours, if it is, or has a class-conditional transformer and latents; any other as diffusers does.

    Raises:
        UserError: If it cannot be loaded.
    """
    try:
        index = DiffusionPipeline.load_config(name_or_path)
        parts = {name for name, value in index.items() if isinstance(value, list) and value[0] is not None}
        pipeline_class = DiffusionPipeline
        if index.get("_class_name") == "DAEVQGANPipeline":
            pipeline_class = DAEVQGANPipeline
        elif index.get("_class_name") == "DAEDiTPipeline" or parts == {"scheduler", "transformer", "vae"}:
            pipeline_class = DAEDiTPipeline
        pipeline = pipeline_class.from_pretrained(name_or_path)
        for part in pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                check_has_weights(part)
        return pipeline.to(device)
    except Exception as error:  # a damaged folder can fail in any way
        reason = one_line(error, 300)
        raise UserError(f"`pipeline` {name_or_path} cannot be loaded: {reason}") from None


def find_pipeline(name_or_path: str) -> str:
    r"""
    Where a pipeline is: the folder or Hub id that was given, or `pipeline/` in the output folder of its training.

    Raises:
        UserError: For a folder that holds neither.
    """
    folder, index = Path(name_or_path), DiffusionPipeline.config_name
    if not folder.is_dir():
        return name_or_path  # on the Hub
    found = next((each for each in (folder, folder / "pipeline") if (each / index).exists()), None)
    if found is None:
        raise UserError(
            f"`pipeline` {folder} holds no pipeline{in_full(folder)}: neither {index} nor "
            f"pipeline/{index}. Give the output folder of a finished train_dit.py or train_vqgan_prior.py, or a pipeline's folder."
        )
    return str(found)


def prompts_of_images(
    images: ImageDataset, count: int, pipeline: DiffusionPipeline | None = None, *, to_show: bool = False
) -> dict[str, Sequence]:
    r"""
    The fields `prompts`, `classes` and `conditions` of [`SampleSettings`] to draw what the first caption and the conditions of so many
    images say; empty for images with neither.

    Args:
        images ([`~dae_diffusers.data.ImageDataset`]): The images.
        count (`int`): How many of them.
        pipeline (`DiffusionPipeline`, *optional*): The classes are as it numbers them; default: as the images do. If it takes no text,
            captions do not count.
        to_show (`bool`, *optional*): Take them evenly over the classes and in their order, not at random. The random choice is always
            the same, and each beginning of it is one.

    Raises:
        UserError: If the pipeline has fewer classes than the images.
    """
    captions = images.captions if pipeline is None or takes_text(pipeline) else None
    if captions is None and images.conditions is None:
        return {}
    chosen = images.spread(count) if to_show else np.random.default_rng(0).permutation(len(images))[:count].tolist()
    found = {} if captions is None else {"prompts": tuple(captions[n][0] for n in chosen)}
    found |= {} if images.conditions is None else {"conditions": ConditionValues(images, chosen)}
    if images.labels is None:
        return found
    has_classes = getattr(pipeline, "null_class", None) is not None
    labels = ids_in_pipeline(pipeline, images) if has_classes else images.labels
    return found | {"classes": tuple(labels[n] for n in chosen)}


def takes_text(pipeline: DiffusionPipeline) -> bool:
    r"""Whether a pipeline draws from a text."""
    return getattr(pipeline, "takes_text", "prompt" in inspect.signature(type(pipeline).__call__).parameters)


def prompts_of(prompt: str | None, id2label: dict[int, str] | None) -> tuple[str, ...] | None:
    r"""
    Makes a text for each class, or one for all.

    Args:
        prompt (`str` or `None`): The text, in which `{label}` is replaced by a class's name.
        id2label (`dict[int, str]` or `None`): Names of the classes.

    Raises:
        UserError: If the text contains `{label}` but there are no classes.
    """
    if prompt is None or "{label}" not in prompt:
        return None if prompt is None else (prompt,)
    if id2label is None:
        raise UserError("`prompt` uses {label}, but the images have no labels. Name their column, or leave it out.")
    return tuple(prompt.replace("{label}", id2label[label]) for label in sorted(id2label))
