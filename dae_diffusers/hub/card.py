"""The model card: what a model is, how it was made and measured, and how to load it."""

import json
import logging
import math
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from dae_diffusers.data import EMBEDDED
from dae_diffusers.directions import with_arrow
from dae_diffusers.duration import duration
from dae_diffusers.errors import UserError, one_line
from dae_diffusers.evaluation_record import best_row, is_deviation
from dae_diffusers.fit_record import FIT_FILE
from dae_diffusers.hub.results import DATA_PICTURES, Result, Script, components_of, is_leftover
from dae_diffusers.pipelines.dae_dit import FLOW_MAP_SCHEDULER, autoencoder_shape, is_representation_autoencoder
from dae_diffusers.sizes import height_and_width, words_of_size
from dae_diffusers.store import read_json

logger = logging.getLogger(__name__)

# What a pipeline is loaded from: settings, code, weights, and the files of tokenizers. Other files may be anybody's.
_PUBLISHED = re.compile(r"\.(json|py|safetensors|txt|model|jinja|vocab|bpe|tiktoken)$")
PAPER = "2307.08283"  # Hu et al., Complexity Matters, NeurIPS 2023
TASK = "unconditional-image-generation"  # the Hub's task for images by class or without, too
TEXT_TASK = "text-to-image"

# Pipelines by `_class_name`. The card of any other pipeline does not describe the generator.
GENERATORS = {
    "DAEDiTPipeline": {
        "what": "A Diffusion Transformer (flow matching)",
        "tags": ["dit", "flow-matching"],
        "script": "train_dit",
    },
    "DAEVQGANPipeline": {
        "what": "An autoregressive transformer over codes",
        "tags": ["vqgan", "autoregressive"],
        "script": "train_vqgan_prior",
        "draws_codes": True,
    },
}

# Metric, without the name of a feature extractor, to its name and meaning.
METRICS = {
    "psnr": ("PSNR", "reconstructions, in dB, higher is better"),
    "ssim": ("SSIM", "reconstructions, at most 1, higher is better"),
    "lpips": ("LPIPS", "reconstructions, lower is better"),
    "rfid": ("rFID", "reconstructions, lower is better"),
    "rfd": ("rFD", "Fréchet distance of reconstructions, lower is better"),
    "probe_accuracy": ("Linear probe", "accuracy of a linear classifier on the latents"),
    "effective_rank": ("Effective rank", "effective number of directions in which the latents vary"),
    "high_frequency_share": ("High frequencies", "share of the latents' variance at high spatial frequencies"),
    "ifid": ("iFID", "images decoded between neighbouring latents, lower is better"),
    "ifd": ("iFD", "images decoded between neighbouring latents, lower is better"),
    "gfid": ("gFID", "samples, lower is better"),
    "gfd": ("gFD", "Fréchet distance of samples, lower is better"),
    "gap": ("Gap", "Fréchet distance of samples to reconstructed training images, lower is better"),
    "kernel_distance": ("Kernel distance", "samples, about 0 is best"),
    "precision": ("Precision", "share of samples near training images"),
    "recall": ("Recall", "share of training images near samples"),
    "density": ("Density", "samples, higher is better"),
    "coverage": ("Coverage", "samples, at most 1"),
    "authenticity": ("Authenticity", "share of samples that are no near copies; compare with that of real images"),
    "inception_score": ("Inception score", "samples, higher is better"),
    "class_agreement": ("Class agreement", "share of samples that a classifier assigns to the requested class"),
    "clip_score": (
        "CLIP score",
        "how well samples follow their texts, higher is better; compare with that of real images",
    ),
}


# Metrics in the metadata, which the Hub's pages and leaderboards read; the table of the card has the rest.
HEADLINES = ("psnr", "ssim", "rfid", "rfd", "gfid", "gfd", "precision", "recall", "class_agreement", "clip_score")
MAX_METADATA_ROWS = 10
EARLY_STEPS = 10_000  # of a generator


@dataclass
class Measurement:
    r"""
    One number, the settings it depends on, the images and the split that it is compared with (None if unknown), and what real
    images reach in the same place (None if unknown).
    """

    metric: str
    value: float
    name: str
    meaning: str
    setting: dict[str, Any]
    images: Script | None
    split: str | None
    floor: float | None = None


def measurements(result: Result) -> list[Measurement]:
    r"""
    One number for each metric of `result.metrics` that the card can name. Numbers of an evaluation come before those that training
    logged. If several sampling settings were tried, the one with the smallest distance counts.
    """
    found: dict[str, Measurement] = {}

    def add(
        values: dict[str, Any],
        setting: dict[str, Any],
        images: Script | None,
        split: str,
        floor: dict[str, Any] | None = None,
    ):
        split = None if images is None else images.config.get(split)
        for metric, value in values.items():
            base = next((each for each in METRICS if metric == each or metric.startswith(f"{each}_")), None)
            if (
                base is None
                or not isinstance(value, (int, float))
                or not math.isfinite(value)
                or is_deviation(metric, values)
            ):
                continue
            name, meaning = METRICS[base]
            extractor = metric.removeprefix(base).removeprefix("_")
            name = f"{name} ({extractor})" if extractor else name
            floor_value = (floor or {}).get(metric)
            deviation = values.get(f"{metric}_sd")
            of = setting if deviation is None else {**setting, "sd": round(deviation, 5)}
            found.setdefault(metric, Measurement(metric, value, name, meaning, of, images, split, floor_value))

    evaluation = result.metrics.get("evaluation", {})
    number = evaluation.get("setting", {}).get("validation_images", {}).get("number")
    floor = evaluation.get("floor", {})
    for part in ("reconstruction", "latent_space"):
        setting = {"num_images": number} if number else {}
        add(evaluation.get(part, {}), setting, result.evaluation, "validation_split", floor.get("reconstruction"))
    row = best_row(evaluation.get("generation", []))
    add(row, _setting_of(row), result.evaluation, "train_split", floor.get("generation", {}).get("real"))
    check = result.metrics.get("check", {})
    add(check, _setting_of(check), result.data_script, "train_split")
    for name, script in result.scripts.items():
        values = result.metrics.get(name, {})
        add(values, {"logged_by": name, "step": values.get("step")}, script, "validation_split")
    return list(found.values())


def make_card(
    result: Result,
    repo_id: str,
    *,
    license: str | None = None,
    step: int | None = None,
    revision: str | None = None,
    space_id: str | None = None,
    data_pictures: bool | None = None,
    fp16: bool = False,
) -> ModelCard:
    r"""
    Writes a model card.

    Args:
        result ([`Result`]): What is published.
        repo_id (`str`): `user/name`.
        license (`str`, *optional*): An identifier that the Hub knows, chosen by the author. The card says if there is none.
        step (`int`, *optional*): During training: the number of steps done.
        revision (`str`, *optional*): The branch that the card is for, and that its code loads; default: `main`.
        space_id (`str`, *optional*): `user/name` of the Space in which the model can be tried.
        data_pictures (`bool`, *optional*): See [`published_pictures`].
        fp16 (`bool`, *optional*): Whether there are half-precision weights, too.

    Returns:
        [`~huggingface_hub.ModelCard`]: With metadata that the Hub accepts.
    """
    result = _with_published_words(result, data_pictures)
    found = measurements(result)
    generator = GENERATORS.get(result.index.get("_class_name", ""), {})
    if result.index.get("is_flow_matching") is False:
        generator = {**generator, "what": "A Diffusion Transformer", "tags": ["dit"]}
    if _is_flow_map(result):
        generator = {**generator, "what": "A Diffusion Transformer, distilled to draw in few steps,"}
    origin = result.autoencoder_origin
    text_encoder = _text_encoder(result)
    task = TEXT_TASK if text_encoder else TASK
    auxiliary_decoder = origin.get("auxiliary_decoder")
    is_decoupled = auxiliary_decoder not in (None, "none", "same")
    data, others = _data_description(result.data_script), _other_data(result)
    ids = [each["id"] for each in (data, *others.values()) if each.get("id")]
    card_data = ModelCardData(
        license=license,
        library_name="diffusers",
        pipeline_tag=task if result.pipeline is not None else None,
        tags=[
            *(generator.get("tags", [])),
            *(["latent-diffusion", "class-conditional"] if result.index.get("id2label") else []),
            *(["decoupled-autoencoder"] if is_decoupled else []),
            "autoencoder",
            "dae-diffusers",
        ],
        datasets=list(dict.fromkeys(ids)) or None,
        model_name=repo_id.split("/")[-1],
        eval_results=[
            EvalResult(
                task_type=task if result.pipeline is not None else "image-to-image",
                dataset_type=images.get("id") or images.get("type", "images"),
                dataset_name=images.get("name", "images"),
                dataset_split=each.split,
                metric_type=each.metric,
                metric_name=each.name,
                metric_value=round(each.value, 5),
                metric_args=each.setting or None,
            )
            for each in found
            if each.metric.startswith(HEADLINES)
            for images in [_data_description(each.images)]
        ][:MAX_METADATA_ROWS]
        or None,
    )
    template = (files("dae_diffusers.hub") / "card_template.md").read_text(encoding="utf-8")
    return ModelCard.from_template(
        card_data,
        template_str=template,
        repo_id=repo_id,
        name=repo_id.split("/")[-1],
        license=license,
        step=step,
        revision=None if revision is None else json.dumps(revision),
        generator=generator,
        pipeline_class=result.index.get("_class_name"),
        has_code=result.pipeline is not None and (result.pipeline / "pipeline.py").exists(),
        call=_example_call(result, generator)
        + ("" if makes_pictures(result) or _makes_rgba(result) else ', output_type="np"'),
        vae_class=result.vae_config.get("_class_name"),
        vae_code=_vae_code(result),
        latent=_latent_description(result),
        auxiliary_decoder=auxiliary_decoder,
        is_decoupled=is_decoupled,
        fine_tuned_from=origin.get("fine_tuned_from"),
        started_from=result.generator_origin,
        fit=result.decoder_fit,
        data=data,
        other_data={name: each["name"] for name, each in others.items()},
        measured_on=_measured_on(result, data),
        classes=_class_names(result),
        text_encoder=text_encoder,
        conditions=_condition_words(result),
        has_condition_image=has_condition_image(result),
        scripts=[_script_description(name, script, result) for name, script in result.scripts.items()],
        early=_early(result, generator, step),
        space_id=space_id,
        fp16=fp16,
        escape=escape,
        looked="nearest.png" in result.pictures,
        num_settings=len(result.metrics.get("evaluation", {}).get("generation", [])),
        measurements=found,
        how=_describe_setting,
        arrow=with_arrow,
        evaluation=result.metrics.get("evaluation", {}),
        pictures={name: caption for name, (_, caption) in published_pictures(result, data_pictures).items()},
        paper=PAPER,
    )


def published_pictures(result: Result, data_pictures: bool | None = None) -> dict[str, tuple[Path, str]]:
    r"""
    Chooses the pictures of a result to publish.

    Args:
        result ([`Result`]): What is published.
        data_pictures (`bool`, *optional*):
            Whether to publish pictures that show the data sets themselves (see [`pictures_of_data`]), and the caption or the conditions
            of a held-out image in the card's example. By default only if all data sets of training and evaluation are public: they come
            with the package, or have names on the Hub.

    Returns:
        `dict`: As `result.pictures`.
    """
    hidden = [] if _shows_data(result, data_pictures) else pictures_of_data(result)
    return {name: each for name, each in result.pictures.items() if name not in hidden}


def pictures_of_data(result: Result) -> list[str]:
    r"""
    The pictures of a result that show its data sets: `DATA_PICTURES`, and samples beside the captions or conditions of held-out images
    that they were drawn from.
    """
    is_drawn_from_data = bool(_text_encoder(result) or result.index.get("conditions"))
    names = (*DATA_PICTURES, *(["samples.png"] if is_drawn_from_data else []))
    return [name for name in names if name in result.pictures]


def _shows_data(result: Result, data_pictures: bool | None) -> bool:
    return not result.has_private_data if data_pictures is None else data_pictures


# What `run.json` records of a held-out image, as an example for the card.
EXAMPLES = ("prompt", "conditions")


def has_example(result: Result) -> bool:
    r"""Whether a script recorded the caption or the conditions of a held-out image."""
    return any(name in script.record for script in result.scripts.values() for name in EXAMPLES)


def _with_published_words(result: Result, data_pictures: bool | None) -> Result:
    """The result without the captions and conditions of held-out images, unless the data may be shown."""
    if _shows_data(result, data_pictures):
        return result
    scripts = {
        name: replace(script, record={key: value for key, value in script.record.items() if key not in EXAMPLES})
        for name, script in result.scripts.items()
    }
    return replace(result, scripts=scripts)


def has_condition_image(result: Result) -> bool:
    r"""Whether samples are drawn from images, which then stand beside them."""
    return any("channels" in column for column in (result.index.get("conditions") or {}).values())


def escape(text: Any) -> str:
    r"""Escapes a user's text, such as the name of a class, so that one line of Markdown shows it literally."""
    text = one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~$#!])", r"\\\1", text)


def repository_files(
    result: Result,
    repo_id: str,
    *,
    license: str | None = None,
    step: int | None = None,
    revision: str | None = None,
    card: bool = True,
    space_id: str | None = None,
    data_pictures: bool | None = None,
    fp16: bool = False,
) -> dict[str, Path | bytes]:
    r"""
    Collects all files to publish, by their path in the repository.

    Args:
        result ([`Result`]): What is published.
        repo_id, license, step, revision, space_id, data_pictures, fp16: As in [`make_card`].
        card (`bool`, *optional*, defaults to `True`): Whether to write `README.md`.

    Returns:
        `dict`: Path in the repository to a file on disk or to content.

    Raises:
        UserError: If a component of the pipeline has no file.
    """
    result = _with_published_words(result, data_pictures)
    found: dict[str, Path | bytes] = {}
    root, prefix = (result.vae, "vae/") if result.pipeline is None else (result.pipeline, "")
    # The folder may hold components of another pipeline that was saved there before.
    parts = components_of(result.index)
    has_fit = bool(result.decoder_fit)
    # A component may be a link to a folder, which a search from above would not enter.
    inside = [each for top in root.iterdir() for each in (top, *top.rglob("*"))]
    for path in sorted(inside):
        relative = path.relative_to(root)
        hidden = any(part.startswith(".") or part == "__pycache__" for part in relative.parts)
        hidden = hidden or any(map(is_leftover, (relative, *relative.parents)))
        foreign = result.pipeline is not None and len(relative.parts) > 1 and relative.parts[0] not in parts
        hidden = hidden or (relative.name == FIT_FILE and not has_fit)  # the record of other weights
        if not path.is_file() or hidden or foreign or relative.name == "README.md":
            continue
        if not _PUBLISHED.search(relative.name):
            logger.warning("%s is not published: a model does not need it.", path)
        else:
            found[f"{prefix}{relative.as_posix()}"] = without_origin(path) if path.suffix == ".json" else path
    _check_components(result, found)
    for name, (path, _) in published_pictures(result, data_pictures).items():
        found[f"images/{name}"] = path
    for name, script in result.scripts.items():
        found[f"training/{name}.yaml"] = yaml.safe_dump(script.config, sort_keys=False, allow_unicode=True).encode()
        if script.record:
            found[f"training/{name}.json"] = json.dumps(script.record, indent=2).encode()
    if result.metrics:
        found["metrics.json"] = json.dumps(result.metrics, indent=2).encode()
    if card:
        fp16 = fp16 or any(name.endswith(".fp16.safetensors") for name in found)
        options = {"license": license, "step": step, "revision": revision, "space_id": space_id, "fp16": fp16}
        found["README.md"] = str(make_card(result, repo_id, data_pictures=data_pictures, **options)).encode()
    return found


def _check_components(result: Result, files: Iterable[str]) -> None:
    folders = {name.partition("/")[0] for name in files if "/" in name}
    if missing := sorted(components_of(result.index).keys() - folders):
        raise UserError(
            f"{result.pipeline} has no files in {' and '.join(missing)}, which its model_index.json names. Put them there, or save "
            "the pipeline again with `save_pretrained`."
        )


def without_origin(path: Path) -> Path | bytes:
    r"""The content of a JSON file without `_name_or_path`, in which diffusers notes the local folder of a model."""
    config = read_json(path, object)
    if not isinstance(config, dict) or config.pop("_name_or_path", None) is None:
        return path
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()


def _data_description(script: Script | None) -> dict[str, Any]:
    """Describes the images: by their id on the Hub if they have one, else without any path."""
    if script is None or not script.names_images:
        return {}
    config = script.config
    name, resolution = config.get("dataset_name"), config.get("resolution")
    size = None if resolution is None else words_of_size(resolution)
    described = {"resolution": size, "channels": config.get("image_channels")}
    if script.has_public_images and name in EMBEDDED:
        return {**described, "type": "digits", "name": "handwritten digits (UCI, doi:10.24432/C50P49, CC BY 4.0)"}
    if script.has_public_images:
        return {**described, "id": name, "name": name}
    folder = Path(name or config["train_data_dir"])
    return {**described, "type": "imagefolder", "name": f"images of the author ({folder.name or folder})"}


def _other_data(result: Result) -> dict[str, dict[str, Any]]:
    """Images that a part of the model was trained on, by the part, where they are others than those of the whole."""
    main = _data_description(result.data_script).get("name")
    parts = {"autoencoder": "train_dae", "decoder (stage 3)": "train_dae_stage3"}
    described = {part: _data_description(result.scripts.get(script)) for part, script in parts.items()}
    return {part: each for part, each in described.items() if each.get("name") not in (None, main)}


def _measured_on(result: Result, data: dict[str, Any]) -> str | None:
    """The images of the evaluation, where they are others than those of the model."""
    name = _data_description(result.evaluation).get("name")
    return name if "evaluation" in result.metrics and name != data.get("name") else None


def _vae_code(result: Result) -> str | None:
    """The file beside the autoencoder's weights that holds its class, where that is not diffusers' own."""
    names = (result.vae_config.get("auto_map") or {}).values()
    return next((f"{name.partition('.')[0]}.py" for name in names), None)


def makes_pictures(result: Result) -> bool:
    r"""Whether the model's images have the channels of pictures: one or three. False without an autoencoder's config."""
    return bool(result.vae_config) and autoencoder_shape(result.vae_config).image_channels in (1, 3)


def _makes_rgba(result: Result) -> bool:
    channels = autoencoder_shape(result.vae_config).image_channels if result.vae_config else None
    return channels == 4 and result.index.get("value_range") in (None, [0, 255])


def _latent_description(result: Result) -> dict[str, Any]:
    config = result.vae_config
    if not config:
        return {}
    shape = autoencoder_shape(config)
    statistics = zip(config.get("latents_mean") or (), config.get("latents_std") or (), strict=True)
    resolution = result.data_script.config.get("resolution") if result.data_script else None
    size = [side * shape.factor for side in _drawn_latents(result)] or resolution or shape.side
    return {
        "channels": shape.latent_channels,
        "factor": shape.factor,
        "image_channels": shape.image_channels,
        "image_size": words_of_size(size) if size else None,
        "size": words_of_size([side // shape.factor for side in height_and_width(size)]) if size else None,
        "statistics": [] if is_representation_autoencoder(config) else list(statistics),
        "codes": config.get("num_vq_embeddings"),
    }


def _drawn_latents(result: Result) -> list[int]:
    """Height and width of the latents that the generator draws; empty without one, or if its config does not tell."""
    for part, name in (("transformer", "sample_size"), ("prior", "grid_size")):
        path = None if result.pipeline is None else result.pipeline / part / "config.json"
        if path is not None and path.exists() and (size := read_json(path).get(name)):
            return list(height_and_width(size))
    return []


def _class_names(result: Result) -> list[str]:
    id2label = result.index.get("id2label") or {}
    return [id2label[key] for key in sorted(id2label, key=int)]


def _text_encoder(result: Result) -> dict[str, str | None]:
    """Class and place on the Hub of the text encoder, and a prompt like those of the training; empty without one."""
    class_name = (result.index.get("text_encoder") or [None, None])[1]
    if class_name is None:
        return {}
    script = result.scripts.get("train_dit")
    name = "" if script is None else str(script.config.get("text_encoder"))
    is_on_hub = re.fullmatch(r"\b[\w.-]+/\b[\w.-]+", name) and not Path(name).exists()
    prompt = None if script is None else script.record.get("prompt")
    return {"class": class_name, "id": name if is_on_hub else None, "prompt": prompt}


def _condition_words(result: Result) -> list[tuple[str, str]]:
    """The name and the meaning of each condition."""
    words = []
    for name, column in sorted((result.index.get("conditions") or {}).items()):
        if "labels" in column:
            labels = ", ".join(column["labels"][:20]) + (", ..." if len(column["labels"]) > 20 else "")
            words.append((name, f"one of {len(column['labels'])} classes: {labels}"))
        elif "mean" in column:
            words.append((name, f"a number, {column['low']:.4g} to {column['high']:.4g} in training"))
        else:
            kind = {1: "a gray image", 3: "an image in colour"}.get(column["channels"])
            words.append((name, kind or f"an array of {column['channels']} channels"))
    return words


def _condition_arguments(result: Result) -> list[str]:
    """The conditions of an example call: those of a validation image, else the first class and the mean."""
    script, columns = result.scripts.get("train_dit"), result.index.get("conditions") or {}
    known = ({} if script is None else script.record.get("conditions")) or {}
    values = []
    for name, column in sorted(columns.items()):
        default = column["labels"][0] if "labels" in column else column.get("mean")
        value = known.get(name, default)
        if value is None and "channels" not in column:  # unknown in that image
            continue
        text = f'load_image("{name}.png")' if "channels" in column else json.dumps(value, ensure_ascii=False)
        values.append(f"{json.dumps(name, ensure_ascii=False)}: {text}")
    return [f"conditions={{{', '.join(values)}}}"] if values else []


def _example_call(result: Result, generator: dict[str, Any]) -> str:
    names, text_encoder = _class_names(result), _text_encoder(result)
    conditions = _condition_arguments(result)
    if not names and not text_encoder and not conditions:
        guidance = _guidance(result) if _is_autoguided(result) else []
        return ", ".join(["num_images_per_label=1", *guidance, *_sampling_options(result, generator)])
    words = [json.dumps(text_encoder["prompt"] or "...", ensure_ascii=False)] if text_encoder else []
    words += [f"class_labels={json.dumps(_name_of_last(names), ensure_ascii=False)}"] if names else []
    words += conditions
    if generator:
        script = result.scripts.get(generator["script"])
        # Guidance needs a model that has learnt to do without the class.
        is_guided = script is None or script.config.get("class_dropout_prob") != 0 or _is_autoguided(result)
        words += [] if _is_flow_map(result) else _guidance(result, otherwise=2.0 if is_guided else 1.0)
    return ", ".join([*words, *_sampling_options(result, generator)])


def _name_of_last(names: list[str]) -> str:
    """What to call the last class: the first of its names, if no other class has that one."""
    first = names[-1].split(",")[0].strip()
    every = [each.strip() for name in names for each in name.split(",")]
    return first if every.count(first) == 1 else names[-1]


def _guidance(result: Result, otherwise: float = 2.0) -> list[str]:
    """The guidance of an example call: the pipeline's default."""
    scale = result.index.get("default_guidance_scale")
    return [f"guidance_scale={otherwise if scale is None else scale}"]


def _sampling_options(result: Result, generator: dict[str, Any]) -> list[str]:
    """The other options of an example call: those of drawing codes, or the pipeline's default number of steps."""
    if not generator:
        return []
    if "draws_codes" in generator:
        options = ("temperature", "top_k", "top_p")
        return [f"{name}={value}" for name in options if (value := result.index.get(f"default_{name}")) is not None]
    steps = result.index.get("default_num_inference_steps") or (4 if _is_flow_map(result) else 25)
    return [f"num_inference_steps={steps}"]


def _is_flow_map(result: Result) -> bool:
    """Whether the generator draws in few steps, with its guidance in it."""
    return (result.index.get("scheduler") or [None, None])[1] == FLOW_MAP_SCHEDULER


def _is_autoguided(result: Result) -> bool:
    """Whether guidance leads away from a weaker version of the transformer."""
    return (result.index.get("guidance_transformer") or [None])[0] is not None


def _script_description(name: str, script: Script, result: Result) -> dict[str, Any]:
    record = script.record
    described = {"name": name, "command": _command(script, result), "versions": record.get("versions")}
    if record.get("seconds"):
        described["time"] = duration(record["seconds"])
    described["hardware"] = record.get("hardware")
    described["counts"] = record.get("counts", {})
    described["exported_step"] = record.get("exported_step")
    described["was_judged"] = script.config.get("metric_features") is not None
    described["images_changed"] = ", ".join(f"{step:,}" for step in record.get("images_changed", []))
    if name in ("train_dit", "train_vqgan_prior"):
        described["average_length"] = result.average_length
    return described


def _command(script: Script, result: Result) -> str | None:
    """
    The command of the run in a form that others can use: with an output folder, and the autoencoder that the first command
    writes there. Placeholders replace the paths of the author's machine.
    """
    command = script.record.get("command")
    if command is None:
        return None
    words, folder = shlex.split(command), f"runs/{result.folder.resolve().name}"
    given = {
        "--vae": f"{folder}/vae" if "train_dae" in result.scripts else "path/to/vae",
        "--train_data_dir": "path/to/images",
        "--pipeline": f"{folder}/pipeline",
        "--text_encoder": "path/to/text_encoder",
    }
    for position, word in enumerate(words[1:], start=1):
        name, before = given.get(words[position - 1]), words[position - 1]
        is_on_hub = before in ("--vae", "--text_encoder") and word.count("/") == 1 and not word.startswith((".", "/"))
        if name is not None and (not is_on_hub or Path(word).exists()):
            words[position] = name
    return shlex.join([*words, "--output_dir", folder])


def _steps(script: Script) -> int | None:
    """The steps of a training: as planned, or fewer if it ended early."""
    steps = [each for each in (script.record.get("steps") or {}).values() if isinstance(each, int)]
    planned = sum(steps) if steps else script.config.get("max_train_steps")
    last = script.validation.get("step")
    return min((each for each in (planned, last) if each), default=None)


def _early(result: Result, generator: dict[str, Any], step: int | None) -> str | None:
    """A sentence for a generator that was trained for fewer than `EARLY_STEPS` steps, else None."""
    script = result.scripts.get(generator.get("script", ""))
    steps = step if script is None or step is not None else _steps(script)
    if steps is None or steps >= EARLY_STEPS:
        return None
    return f"This is an early model: its generator was trained for {steps:,} steps."


def _setting_of(values: dict[str, Any]) -> dict[str, Any]:
    names = (
        "num_images",
        "guidance_scale",
        "guidance_interval",
        "num_inference_steps",
        "scheduler",
        "velocity_scale",
        "temperature",
        "top_k",
        "top_p",
        "label_sampling",
        "seed",
    )
    names += ("num_drawings", "classifier_accuracy_on_real_test_digits")
    return {name: values[name] for name in names if name in values}


def _describe_setting(setting: dict[str, Any]) -> str:
    words = []
    for name, value in setting.items():
        value = f"{value:.4g}" if isinstance(value, float) else value
        value = " to ".join(f"{each:g}" for each in value) if isinstance(value, list) else value
        words.append(f"{name.replace('_', ' ').replace('num ', '')} {value}")
    return ", ".join(words)
