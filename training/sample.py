r"""
Draw images with a pipeline, into a folder that can be trained on.

    dae-diffusers sample runs/mine --num_images 5000 --output_dir samples
    dae-diffusers sample runs/mine --class_labels cat dog --guidance_scale 1.5 --output_dir cats-and-dogs
    dae-diffusers sample runs/text --prompts "a red apple" "a clock" --output_dir from-texts

The first argument is a pipeline, in a folder or on the Hub, or the output folder of its training. Images of a class go into a folder
called like it, so that `--train_data_dir samples` finds the classes. `metadata.jsonl` says for each image what it was drawn from and how.
An image depends only on its number, the seed, and what it is drawn from. Give the same command again to continue an interrupted one, and
with more `--num_images` to add some.
"""

import logging
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from dae_diffusers.cli import parse_config
from dae_diffusers.data.encodings import decode_text
from dae_diffusers.engine.distributed import measuring_accelerator
from dae_diffusers.errors import UserError, in_full, one_line
from dae_diffusers.locks import take_folder
from dae_diffusers.metrics.sample_folder import METADATA, check_is_free, class_folders, encode, prepare, suffix_of
from dae_diffusers.metrics.sampling import (
    CALL_OPTIONS,
    Sampler,
    SampleSettings,
    autoencoder_of,
    find_pipeline,
    generation_inputs,
    image_batches,
    image_pixels,
    image_seed,
    load_pipeline,
    options_in_words,
    options_of_call,
    takes_text,
)
from dae_diffusers.metrics.statistics import padded_size
from dae_diffusers.pipelines.dae_dit import autoencoder_shape
from dae_diffusers.script import run_script
from dae_diffusers.store import write_bytes
from dae_diffusers.training.settings import SampleConfig, with_flags

logger = logging.getLogger(__name__)


def main(config: SampleConfig) -> None:
    accelerator = measuring_accelerator(config.samples.mixed_precision)
    folder = Path(config.samples.output_dir)
    check_is_free(folder)
    prompts = read_prompts(config.samples.prompts)
    name = find_pipeline(config.samples.pipeline)
    pipeline = load_pipeline(name, accelerator.device)
    settings = choose_settings(config, pipeline, prompts)
    rows = describe(pipeline, settings)
    lock = take_folder(folder, accelerator)
    missing = find_missing(folder, rows, lambda: inputs_of(name, pipeline, settings, accelerator), accelerator)
    drawn_with = options_in_words(settings.call_kwargs())
    logger.info(
        "%d images of %s%s%s",
        len(rows),
        name,
        f", drawn with {drawn_with}" if drawn_with else "",
        f"; {len(rows) - len(missing)} of them are there already" if len(missing) < len(rows) else "",
    )
    draw(folder, pipeline, settings, rows, missing, accelerator, config.samples.batch_size)
    if accelerator.is_main_process:
        if not all((folder / row["file_name"]).exists() for row in rows):
            raise UserError(f"{folder} is not the same on all machines. Choose a folder that they share.")
        logger.info("written to %s; how to draw each image again is in %s", folder, METADATA)
    accelerator.end_training()
    lock.release()


def read_prompts(given: list[str] | None) -> tuple[str, ...] | None:
    """The texts, or those in the lines of the one file that is named."""
    if given is None or len(given) > 1:
        return None if given is None else tuple(given)
    (name,) = given
    if not os.path.isfile(name):
        if name.endswith(".txt"):
            raise UserError(f"`prompts` {name} does not exist{in_full(name)}. Give a file, or one or more texts.")
        return (name,)
    try:
        lines = decode_text(Path(name).read_bytes()).splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"`prompts` {name} cannot be read: {one_line(error)}.") from None
    texts = tuple(line.strip() for line in lines if line.strip())
    if not texts:
        raise UserError(f"`prompts` {name} holds no texts. Write one into each line.")
    return texts


def choose_settings(
    config: SampleConfig, pipeline: DiffusionPipeline, prompts: tuple[str, ...] | None
) -> SampleSettings:
    """What is drawn and how, once it fits the pipeline."""
    of, drawn_from = config.samples, texts_and_classes(pipeline, prompts, config.samples.class_labels)
    sampler = Sampler(pipeline, drawn_from["prompts"], drawn_from["classes"])
    options = options_of_call(sampler, {option: getattr(config.options, option) for option in CALL_OPTIONS})
    number = sum(drawn_from["class_counts"] or ()) or sampler.num_classes or 1
    if of.num_images < number:
        logger.warning(
            "`--num_images` %d of %d %s: some of them are not drawn. Draw more.",
            of.num_images,
            number,
            "classes" if prompts is None else "texts",
        )
    return SampleSettings(of.num_images, seed=of.seed, **drawn_from, **options)


def texts_and_classes(
    pipeline: DiffusionPipeline, prompts: tuple[str, ...] | None, class_labels: list[str] | None
) -> dict[str, Any]:
    """Texts and classes, as `SampleSettings` has them."""
    kind = type(pipeline).__name__
    if conditions := getattr(pipeline, "conditions", None):
        raise UserError(
            f"this {kind} draws from {', '.join(sorted(conditions))} too, which sample.py does not give. Draw in Python: "
            "`pipe(conditions={...})`."
        )
    if prompts is None and takes_text(pipeline):
        raise UserError(f"this {kind} draws from texts: give `prompts`, one or more texts or a file of them.")
    if prompts is not None and not takes_text(pipeline):
        raise UserError(f"`prompts` is given, but this {kind} takes no text: leave it out.")
    ids = class_ids(pipeline, class_labels)
    if prompts is not None:
        if ids is not None and len(ids) != len(prompts) and 1 not in (len(ids), len(prompts)):
            raise UserError(
                f"`class_labels` names {len(ids)} classes, but there are {len(prompts)} texts. Name one, or one for each text."
            )
        return {"prompts": prompts, "classes": ids and tuple(ids), "class_counts": None}
    if ids is not None and len(set(ids)) < len(ids):
        raise UserError(f"`class_labels` names a class twice: {' '.join(class_labels)}. Name each once.")
    counts = None if ids is None else tuple(int(number in ids) for number in range(pipeline.null_class))
    return {"prompts": None, "classes": None, "class_counts": counts if counts and 0 in counts else None}


def class_ids(pipeline: DiffusionPipeline, given: list[str] | None) -> list[int] | None:
    """The numbers of the classes that are named; a name that is a number comes before a number."""
    if given is None:
        return None
    num_classes = getattr(pipeline, "null_class", None)
    if num_classes is None:
        raise UserError("`class_labels` is given, but the pipeline has no classes: leave it out.")
    ids = []
    for name in given:
        try:
            ids += pipeline.get_label_ids(name)
        except ValueError as error:
            if not name.isdecimal():
                raise UserError(f"`class_labels`: {error}") from None
            ids.append(int(name))
            if ids[-1] >= num_classes:
                raise UserError(
                    f"`class_labels` has {name}, but there are {num_classes} classes, 0 to {num_classes - 1}."
                ) from None
    return ids


def class_names(pipeline: DiffusionPipeline) -> list[str | int]:
    """The classes as a call takes them: by name, or by number if some have no name of their own."""
    numbers, names = range(getattr(pipeline, "null_class", None) or 0), getattr(pipeline, "id2label", None) or {}
    known = {names[number].strip() for number in numbers if number in names} - {""}
    return [names[number] if len(known) == len(numbers) else number for number in numbers]


def describe(pipeline: DiffusionPipeline, settings: SampleSettings) -> list[dict[str, Any]]:
    """For each image its file, its number, the seed of its generator, and all other arguments of the call that draws it."""
    sampler = Sampler(pipeline, settings.prompts, settings.classes)
    labels, vae = settings.labels(sampler.num_classes), autoencoder_of(pipeline)
    channels = None if vae is None else autoencoder_shape(vae.config).image_channels
    suffix = suffix_of(channels, pipeline.config.get("value_range"))
    names = class_names(pipeline)
    folders = class_folders(getattr(pipeline, "id2label", None) or {}, len(names))
    rows = []
    for number in range(settings.num_images):
        arguments = sampler.arguments(None if labels is None else [int(labels[number])], 1)
        file_name, drawn_from = f"{number:06d}{suffix}", {}
        if "class_labels" in arguments:
            (label,) = arguments["class_labels"]
            file_name, drawn_from = f"{folders[label]}/{file_name}", {"class_labels": names[label]}
        if "prompt" in arguments:
            (drawn_from["prompt"],) = arguments["prompt"]
        seed = image_seed(settings.seed, number)
        rows.append({"file_name": file_name, "number": number, "seed": seed, **drawn_from, **settings.call_kwargs()})
    return rows


def find_missing(
    folder: Path, rows: list[dict[str, Any]], inputs: Callable[[], dict[str, Any]], accelerator: Accelerator
) -> list[int]:
    """The numbers of the images to draw, the same on every process. The main one checks the folder and writes what is known already."""
    found: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            found = [None, prepare(folder, inputs(), rows)]
        except UserError as error:
            found = [str(error), None]
    broadcast_object_list(found)
    if found[0] is not None:
        raise UserError(found[0])
    return found[1]


def inputs_of(
    name: str, pipeline: DiffusionPipeline, settings: SampleSettings, accelerator: Accelerator
) -> dict[str, Any]:
    """All that the images depend on, and where the pipeline lies."""
    found, names = generation_inputs(pipeline, settings, accelerator), class_names(pipeline)
    chosen = settings.classes or [number for number, count in enumerate(settings.class_counts or ()) if count]
    inputs = {
        "pipeline": name,
        "seed": settings.seed,
        **settings.call_kwargs(),
        "class_labels": [names[label] for label in chosen] or None,
        "classes": None if settings.prompts else list(names) or None,
        "prompts": settings.prompts,
        "mixed_precision": found["mixed_precision"],
        "scheduler": found["scheduler"],
        "weights": found["models"],
    }
    return {key: value for key, value in inputs.items() if value is not None}


def draw(
    folder: Path,
    pipeline: DiffusionPipeline,
    settings: SampleSettings,
    rows: list[dict[str, Any]],
    missing: list[int],
    accelerator: Accelerator,
    batch_size: int,
) -> None:
    """
    Draws missing images in batches that the processes take turns at. A batch is the same whichever of its images are missing, so that
    an interrupted drawing rounds as an uninterrupted one.
    """
    size = padded_size(batch_size, image_pixels(pipeline))
    batches_of = image_batches(pipeline, settings, accelerator, size)
    value_range = pipeline.config.get("value_range")
    wanted, counts = set(missing), Counter(number // size for number in missing)
    order, together = sorted(counts), accelerator.num_processes
    turns = [order[first : first + together] for first in range(0, len(order), together)]
    with tqdm(
        total=len(rows),
        initial=len(rows) - len(missing),
        desc="Drawing",
        unit="image",
        disable=not accelerator.is_main_process,
    ) as bar:
        for batches in turns:
            for batch in batches[accelerator.process_index :][:1]:
                numbers = range(batch * size, min((batch + 1) * size, len(rows)))
                for images, count in batches_of(numbers):
                    for number, image in zip(numbers, images[:count], strict=True):
                        if number in wanted:
                            path = folder / rows[number]["file_name"]
                            write_bytes(path, encode(image, path.suffix, value_range))
            bar.update(sum(counts[batch] for batch in batches))
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    run_script(main, parse_config(SampleConfig, with_flags("sample", sys.argv[1:]), description=__doc__))
