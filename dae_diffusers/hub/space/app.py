"""
An app to try a model: draw by class, look at its latent space, read its numbers.

The model is the environment variable `MODEL`, or else the first of `models:` in README.md: a Hub repository or a folder.
"""

import inspect
import math
import os
import random
import re
import tempfile
from collections import deque
from contextlib import contextmanager
from pathlib import Path

import gradio as gr
import torch
from diffusers import AutoModel, DiffusionPipeline
from huggingface_hub import ModelCard, RepoCard, snapshot_download
from PIL import Image, ImageOps

MODEL = os.environ.get("MODEL") or RepoCard.load(Path(__file__).with_name("README.md")).data.models[0]
MAX_IMAGES = 64  # in one grid
MAX_STEPS = 100
INTERPOLATION_STEPS = 8
GRID_PIXELS = 1024  # about the width of a grid; small pictures are enlarged by whole factors
MAX_SEED = 2**31 - 1
EACH_CLASS = "every class"
HEADLINES = ("psnr", "class_agreement", "clip_score", "gfid", "gfd", "rfid", "rfd")  # numbers under the title
Image.MAX_IMAGE_PIXELS = 20_000_000  # pillow refuses pictures of twice as many

CSS = """
.gradio-container {width: 100%; max-width: 1080px !important; margin: 0 auto !important}
#title h1 {margin-bottom: .2em; font-size: 1.9em} #title p {margin: .2em 0; opacity: .8}
.pixels img {image-rendering: pixelated}
.above .icon-button-wrapper {position: static; width: fit-content; margin: 0 0 4px auto}  /* buttons cover no picture */
#samples .grid-wrap {height: auto; min-height: 0; max-height: none; overflow: visible}
#samples .grid-container {grid-template: none / repeat(var(--grid-cols), minmax(0, 1fr)); grid-auto-rows: auto; gap: 6px}
#samples .thumbnail-lg {aspect-ratio: auto; height: auto} #samples .thumbnail-lg > img {height: auto; max-height: 78vh; border-radius: 0}
#samples .caption-label {position: static; max-width: 100%; padding: 1px 2px; border: 0; background: none; text-align: center; opacity: 1}
#samples .gallery-container:has(.preview) {min-height: 480px} #samples .media-button {height: calc(100% - 130px) !important}  /* above caption and thumbnails */
.numbers {overflow-x: auto} .numbers :is(td, th) {overflow-wrap: normal; word-break: normal} .numbers table {width: 100%; font-size: .95em} .numbers pre {overflow-x: auto}
.caption p {margin: .6em 0 0; font-weight: 600; opacity: .75}
footer {opacity: .6}
@media (max-width: 640px) {.result {order: -1}}
"""


def load():
    """The folder of the model, its pipeline (None for an autoencoder alone) and its autoencoder."""
    folder = MODEL if os.path.isdir(MODEL) else snapshot_download(MODEL, ignore_patterns=["*.fp16.*"])
    if not (Path(folder) / "model_index.json").exists():
        has_code = "auto_map" in AutoModel.load_config(folder, subfolder="vae")
        return Path(folder), None, AutoModel.from_pretrained(folder, subfolder="vae", trust_remote_code=has_code)
    pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu").set_progress_bar_config(disable=True)
    return Path(folder), pipe, pipe.vae


FOLDER, PIPE, VAE = load()
CARD = ModelCard.load(FOLDER / "README.md", ignore_metadata_errors=True) if (FOLDER / "README.md").exists() else None
OPTIONS = inspect.signature(PIPE.__call__).parameters if PIPE is not None else {}
IS_FLOW_MAP = getattr(PIPE, "is_flow_map", False)  # draws in few steps
IS_AUTOGUIDED = getattr(PIPE, "guidance_transformer", None) is not None  # guidance without classes
TAKES_TEXT = getattr(PIPE, "takes_text", False) and getattr(PIPE, "text_encoder", None) is not None
CONDITIONS = dict(sorted((getattr(PIPE, "conditions", None) or {}).items()))
CLASSES = {int(key): str(name) for key, name in (getattr(PIPE, "id2label", None) or {}).items()}


def picture_size():
    """Height and width of the model's pictures, in pixels. The generator knows them better than the autoencoder, which may have seen others."""
    latents = getattr(getattr(PIPE, "transformer", None), "config", {}).get("sample_size")
    if latents is None and getattr(PIPE, "prior", None) is not None:
        latents = PIPE.prior.config.grid_size
    size = VAE.config.sample_size if latents is None else latents
    height, width = (size, size) if isinstance(size, int) else size
    factor = 1 if latents is None else PIPE.vae_scale_factor
    return height * factor, width * factor


HEIGHT, WIDTH = picture_size()
SIDE = max(HEIGHT, WIDTH)  # of the square that the autoencoder is tried with
IS_RAE = "encoder_input_size" in VAE.config  # an AutoencoderRAE: its images are in [0, 1]


class StoppedError(Exception):
    """Raised to stop a draw that nobody waits for any more."""


class Visitors:
    """Remembers who waits for a draw. The model serves one visitor at a time, and a draw may take minutes on a free CPU."""

    def __init__(self):
        self.gone = deque(maxlen=1000)
        self.current = None  # whose draw is running
        self.is_stopped = False

    def leave(self, request: gr.Request):
        """Gradio calls this when a tab is closed or reloaded."""
        self.gone.append(request.session_hash)

    def stop(self, request: gr.Request):
        """Stops a visitor's draw before its next step."""
        self.is_stopped = self.current == request.session_hash

    @contextmanager
    def drawing_for(self, request):
        """Inside, the model raises `StoppedError` before its next step once the visitor has gone, or has stopped it."""
        self.current, self.is_stopped = getattr(request, "session_hash", None), False
        model = getattr(PIPE, "transformer", None) or getattr(PIPE, "prior", None)
        hook = model.register_forward_pre_hook(lambda *_: self.check()) if model is not None else None
        try:
            self.check()  # a visitor may also leave while waiting in the queue
            yield
        except StoppedError:
            PIPE.maybe_free_model_hooks()
            gr.Info("Stopped.", duration=3)
            raise
        finally:
            self.current = None
            if hook is not None:
                hook.remove()

    def check(self):
        if self.is_stopped or (self.current is not None and self.current in self.gone):
            raise StoppedError


VISITORS = Visitors()


def draw(
    class_id,
    count,
    guidance_scale,
    steps,
    seed,
    is_random,
    prompt="",
    request: gr.Request = None,
    progress=gr.Progress(),  # noqa: B008, this is how gradio passes it
    *values,
):
    """Draws images. Returns a gallery, captioned with the prompt or the names of classes, one row for each class, and the seed. `values` are those of `CONDITIONS`."""
    count, steps = int(count), int(steps)
    seed = random.randint(0, MAX_SEED) if is_random else int(seed or 0)
    if class_id == EACH_CLASS:
        columns = min(count, max(1, MAX_IMAGES // len(CLASSES)))
        labels = [key for key in CLASSES for _ in range(columns)][:MAX_IMAGES]
    else:
        columns = 1
        labels = [class_id] * count if CLASSES else None
    number = count if labels is None else len(labels)
    generators = [torch.Generator().manual_seed((seed + n) % 2**63) for n in range(number)]

    def on_step(pipe, step, timestep, tensors):
        progress((step + 1, steps), desc="Drawing", unit="steps")
        return tensors

    arguments = {
        "class_labels": labels,
        "num_images_per_label": number if labels is None else 1,
        "prompt": prompt if TAKES_TEXT and prompt else None,
        "conditions": conditions_of(values),
        "guidance_scale": guidance_scale,
        "num_inference_steps": steps,
        "generator": generators,
        "callback_on_step_end": on_step,
        "output_type": "pt",
    }
    images = images_of(arguments, request)
    if images is None:
        return gr.skip(), gr.skip()
    pictures = [enlarge(to_pil(image), 256) for image in images]
    names = [prompt or None] * number if labels is None else [CLASSES[label] for label in labels]
    columns = columns if columns > 1 else square_columns(number)
    return gr.Gallery(list(zip(pictures, names, strict=True)), columns=columns, selected_index=None), seed


def conditions_of(values=()):
    """The argument `conditions` of a call, from the values of the page's components; nothing stands for unknown."""
    given = dict.fromkeys(CONDITIONS)
    for name, value in zip(CONDITIONS, values, strict=False):
        if isinstance(value, Image.Image):
            value = value.convert("L" if CONDITIONS[name]["channels"] == 1 else "RGB")
        given[name] = None if value == "" else value
    return given


def images_of(arguments, request):
    """What the pipeline draws, `(N, C, H, W)` in [0, 1]; None if the visitor stops it. Arguments that it does not know are left out."""
    try:
        with VISITORS.drawing_for(request):
            return PIPE(**{name: value for name, value in arguments.items() if name in OPTIONS}).images.float().cpu()
    except StoppedError:
        return None


def draw_one(request: gr.Request = None):
    """A picture to try the autoencoder with."""
    arguments = {"num_inference_steps": 4 if IS_FLOW_MAP else 20, "output_type": "pt", "conditions": conditions_of()}
    if CLASSES:
        arguments["class_labels"] = [int(torch.randint(len(CLASSES), ()))]
    images = images_of(arguments, request)
    return gr.skip() if images is None else enlarge(to_pil(images[0]), 256)


@torch.no_grad()
def reconstruct(first, second):
    """The reconstruction of a picture, its latent channels, an interpolation to a second picture; and the place of all, now visible."""
    if first is None:
        raise gr.Error("Choose a picture first.", print_exception=False)
    pixels = to_pixels(first)
    latents = encode(pixels)
    reconstruction = decode(latents)
    error = ((pixels - reconstruction) / 2).square().mean().item()
    psnr = f"{-10 * math.log10(max(error, 1e-12)):.1f} dB"
    pair = grid(torch.cat([pixels, reconstruction]) / 2 + 0.5, 2)
    shrunk = pixels[0].numel() / latents[0].numel()
    size = "x".join(map(str, latents.shape[1:]))
    text = f"**PSNR {psnr}** between the picture (left) and its reconstruction (right), at {SIDE}x{SIDE} pixels. "
    if "num_vq_embeddings" in VAE.config:
        places = "x".join(map(str, latents.shape[2:]))
        text += f"The picture became {places} codes out of {VAE.config.num_vq_embeddings:,}."
    else:
        text += (
            f"The latents hold {size} numbers (channels x height x width), {shrunk:.3g} times fewer than the picture."
        )
    channels = (latents[0] - latents[0].mean((1, 2), keepdim=True)) / (6 * latents[0].std((1, 2), keepdim=True) + 1e-6)
    channels = grid((channels + 0.5).clamp(0, 1)[:, None], min(len(channels), 4))
    if second is None:
        return pair, text, channels, None, gr.Column(visible=True)
    weights = torch.linspace(0, 1, INTERPOLATION_STEPS).view(-1, 1, 1, 1)
    between = decode((1 - weights) * latents + weights * encode(to_pixels(second)))
    return pair, text, channels, grid(between / 2 + 0.5, INTERPOLATION_STEPS), gr.Column(visible=True)


def encode(pixels):
    pixels = pixels / 2 + 0.5 if IS_RAE else pixels
    encoded = VAE.encode(pixels.to(VAE.device, VAE.dtype))
    latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded[0]
    return latents.float().cpu()


def decode(latents):
    images = VAE.decode(latents.to(VAE.device, VAE.dtype)).sample.float().cpu()
    return (2 * images - 1 if IS_RAE else images).clamp(-1, 1)


def to_pixels(image):
    """Any picture to `(1, C, side, side)` in [-1, 1]: its centre square, with white behind transparency."""
    image = ImageOps.exif_transpose(image).convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = ImageOps.fit(
        image.convert("L" if VAE.config.get("in_channels") == 1 else "RGB"), (SIDE, SIDE), Image.LANCZOS
    )
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(1, SIDE, SIDE, -1)
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pil(image):
    """`(C, H, W)` in [0, 1], with 1 or 3 channels."""
    array = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)


def enlarge(image, side):
    """Enlarges by a whole factor, to at most `side` pixels where that is possible."""
    factor = max(1, side // max(image.size))
    return image.resize((image.width * factor, image.height * factor), Image.NEAREST)


def square_columns(count):
    """Columns for about as many rows; those that fill the last row, if there are."""
    square = math.ceil(math.sqrt(count))
    return next((n for n in range(square, square + 3) if count % n == 0), square)


def grid(images, columns=None):
    """`(N, C, H, W)` in [0, 1] to one picture."""
    columns = columns or square_columns(len(images))
    tiles = [enlarge(to_pil(image), min(256, GRID_PIXELS // columns)) for image in images]
    width, height, gap = tiles[0].width + 4, tiles[0].height + 4, 4
    rows = math.ceil(len(tiles) / columns)
    sheet = Image.new(tiles[0].mode, (columns * width - gap, rows * height - gap), "white")
    for number, tile in enumerate(tiles):
        sheet.paste(tile, (number % columns * width, number // columns * height))
    return sheet


def picture_input(label, elem_id):
    """A picture upload that shows an error message for a file that is no picture."""
    component = gr.Image(
        label=label,
        type="pil",
        image_mode=None,
        sources=["upload", "clipboard"],
        height=240,
        elem_id=elem_id,
        elem_classes="pixels",
    )
    read = component.preprocess

    def preprocess(payload):
        try:
            return read(payload)
        except Exception:  # pillow fails in many ways on what is not a picture
            text = "This file cannot be read as a picture. Try a PNG or JPEG of at most 40 megapixels."
            raise gr.Error(text, print_exception=False) from None

    component.preprocess = preprocess
    return component


def card_tab():
    """The numbers of the model card, its pictures, and the card itself."""
    if CARD is None:
        gr.Markdown("This model has no card.")
        return
    rows = [
        f"| {each.metric_name or each.metric_type} | {each.metric_value:.4g} | {settings(each.metric_args)} |"
        for each in CARD.data.eval_results or []
    ]
    if rows:
        table = "\n".join(["| metric | value | measured with |", "|---|---|---|", *rows])
        gr.Markdown(table, elem_classes="numbers", elem_id="numbers")
    for path in sorted((FOLDER / "images").glob("*.png")):
        caption(caption_of(path.name))
        picture_output(value=str(path), plot=path.stem.endswith(("curves", "sweep")))
    with gr.Accordion("The whole card", open=not rows):
        text = "\n".join(line for line in CARD.text.splitlines() if not line.startswith(("![", "# ")))
        gr.Markdown(text, elem_classes="numbers")


def caption_of(name):
    """What the card writes below a picture, in Markdown."""
    found = re.search(rf"^!\[(.*)\]\(images/{re.escape(name)}\)$", CARD.text if CARD is not None else "", re.MULTILINE)
    return found[1] if found else name.removesuffix(".png").replace("_", " ").capitalize()


def description():
    """What the model is, from which data, and how good: the card's words and headline numbers, in Markdown."""
    if CARD is None:
        kind = "A latent diffusion model" if PIPE is not None else "An autoencoder"
        return f"{kind}{f' of {len(CLASSES)} classes' if CLASSES else ''}, {HEIGHT}x{WIDTH} pixels."
    lines = CARD.text.partition("\n## ")[0].splitlines()
    words = [line for line in lines if line and not re.match(r"# |!\[|Try it|\*(?!\*)", line)][:3]
    found = [each for name in HEADLINES for each in CARD.data.eval_results or [] if each.metric_type.startswith(name)]
    numbers = ", ".join(f"{each.metric_name or each.metric_type} {each.metric_value:.4g}" for each in found[:3])
    license = CARD.data.license
    measured = f"Measured: {numbers} (see Numbers)." if numbers else "Nothing was measured yet."
    return "\n\n".join([*words, measured + (f" License: {license}." if license else "")])


def example_pictures():
    """
    Pictures to try the autoencoder with, as files: from the last columns of the first row of the model's own grids, which have 2
    pixels between pictures, names left and above, and pictures of at least 64 pixels along each side.
    """
    factor = max(1, math.ceil(64 / min(HEIGHT, WIDTH)))
    down, right, folder = HEIGHT * factor + 2, WIDTH * factor + 2, Path(tempfile.mkdtemp())
    path = next(
        (path for name in ("reconstructions", "samples") if (path := FOLDER / "images" / f"{name}.png").exists()), None
    )
    if path is None:
        pictures = [Image.radial_gradient("L"), Image.linear_gradient("L")]
    else:
        sheet = Image.open(path)
        rows, columns = (sheet.height + 2) // down, (sheet.width + 2) // right
        lefts = [sheet.width + 2 - right * n for n in range(1, min(columns, 7) + 1, 2)]
        top = sheet.height + 2 - down * rows
        pictures = [sheet.crop((left, top, left + right - 2, top + down - 2)) for left in lefts]
    for number, picture in enumerate(pictures):
        picture.save(folder / f"{number}.png")
    return [str(folder / f"{number}.png") for number in range(len(pictures))]


def caption(text):
    gr.Markdown(text, elem_classes="caption")


def picture_output(plot=False, **options):
    return gr.Image(
        format="png",
        interactive=False,
        show_label=False,
        container=False,
        buttons=["download", "fullscreen"],
        elem_classes=["above"] if plot else ["above", "pixels"],
        **options,
    )


def settings(arguments):
    words = ((name.replace("num_", "").replace("_", " "), value) for name, value in (arguments or {}).items())
    return ", ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in words)


def condition_input(name, column):
    """What a visitor chooses a condition with."""
    if "labels" in column:
        return gr.Dropdown([("any", ""), *column["labels"]], value=column["labels"][0], label=name)
    if "mean" in column:
        return gr.Slider(column["low"], column["high"], column["mean"], label=name)
    return picture_input(name, f"condition-{name}")


def slider_range(option, low, high, usual):
    """Lowest, highest and first value of a slider. The pipeline's default, which may be beyond the usual ones, is within."""
    default = None if PIPE is None else PIPE.config.get(f"default_{option}")
    first = usual if default is None else default
    return min(low, first), max(high, first), first


def generate_tab():
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            prompt = gr.Textbox("", label="Prompt", lines=2, visible=TAKES_TEXT, elem_id="prompt")
            choices = [(name, key) for key, name in CLASSES.items()]
            if len(CLASSES) > 1:
                choices.insert(0, (EACH_CLASS, EACH_CLASS))
            label = gr.Dropdown(choices, value=choices[0][1] if choices else None, label="Class", visible=bool(CLASSES))
            conditions = [condition_input(name, column) for name, column in CONDITIONS.items()]
            count = gr.Slider(
                1,
                16,
                1 if len(CLASSES) > 6 else 6,
                step=1,
                label="Pictures per class" if len(CLASSES) > 1 else "Pictures",
            )
            guided = (
                "guidance_scale" in OPTIONS
                and (bool(CLASSES) or TAKES_TEXT or bool(CONDITIONS) or IS_AUTOGUIDED)
                and not IS_FLOW_MAP
            )
            guidance = gr.Slider(
                *slider_range("guidance_scale", 1, 8, 2),
                step=0.05,
                label="Guidance",
                info="1 turns it off; higher: clearer, less varied",
                visible=guided,
            )
            stepped = "num_inference_steps" in OPTIONS
            steps = gr.Slider(
                *slider_range("num_inference_steps", 1, MAX_STEPS, 4 if IS_FLOW_MAP else 25),
                step=1,
                label="Steps",
                info="more: slower, finer",
                visible=stepped,
            )
            is_random = gr.Checkbox(True, label="A new seed each time")
            seed = gr.Number(0, precision=0, label="Seed", info="the same seed draws the same pictures")
            with gr.Row():
                button = gr.Button("Draw", variant="primary", elem_id="draw", scale=2, min_width=120)
                stop = gr.Button("Stop", elem_id="stop", scale=1, min_width=80)
        with gr.Column(scale=3, min_width=280, elem_classes="result"):
            first = FOLDER / "images" / "samples.png"
            output = gr.Gallery(
                [(str(first), caption_of(first.name))] if first.exists() else None,
                format="png",
                columns=1,
                interactive=False,
                show_label=False,
                object_fit="contain",
                buttons=["download", "download_all", "fullscreen"],
                elem_id="samples",
                elem_classes=["above", "pixels"],
            )
    inputs = [label, count, guidance, steps, seed, is_random, prompt, *conditions]
    button.click(draw, inputs, [output, seed], concurrency_id="model", show_progress_on=output, scroll_to_output=True)
    stop.click(VISITORS.stop, queue=False)


def reconstruct_tab():
    gr.Markdown(
        "How well does the autoencoder reconstruct a picture? Choose one. Choose a second one to interpolate between them."
    )
    with gr.Column():
        with gr.Row():
            with gr.Column(min_width=240):
                first = picture_input("Picture", "first")
                one = gr.Button("Let the model draw it", size="sm", visible=PIPE is not None)
            with gr.Column(min_width=240):
                second = picture_input("Second picture (optional)", "second")
                two = gr.Button("Let the model draw it", size="sm", visible=PIPE is not None)
        button = gr.Button("Encode and decode", variant="primary", elem_id="reconstruct")
        examples = gr.Row(elem_id="examples")
    with gr.Column(visible=False, elem_classes="result") as result:
        text = gr.Markdown(elem_id="psnr")
        with gr.Row():
            with gr.Column(min_width=280):
                caption("Picture and reconstruction")
                pair = picture_output(elem_id="pair")
            with gr.Column(min_width=280):
                caption("Latent channels")
                channels = picture_output(elem_id="channels")
        caption("From the first picture to the second, in latent space")
        between = picture_output(elem_id="between")
    for button_one, picture in ((one, first), (two, second)):
        button_one.click(draw_one, None, picture, concurrency_id="model")
    outputs = [pair, text, channels, between, result]
    button.click(reconstruct, [first, second], outputs, concurrency_id="model", scroll_to_output=True)
    found = example_pictures()
    with examples:
        gr.Examples(
            [[one, two] for one, two in zip(found, found[1:] + found[:1], strict=True)],
            [first, second],
            outputs,
            fn=reconstruct,
            run_on_click=True,
            cache_examples=False,
            label="Examples: click a row",
        )


def build():
    name = (CARD.data.model_name if CARD is not None else None) or Path(MODEL).name
    with gr.Blocks(title=name, analytics_enabled=False) as demo:
        where = "" if os.path.isdir(MODEL) else f"\n\nModel: [{MODEL}](https://huggingface.co/{MODEL})"
        gr.Markdown(f"# {name}\n{description()}{where}", elem_id="title")
        if PIPE is not None:
            with gr.Tab("Draw"):
                generate_tab()
        with gr.Tab("Latent space"):
            reconstruct_tab()
        with gr.Tab("Numbers"):
            card_tab()
        demo.unload(VISITORS.leave)
    return demo.queue(max_size=20, default_concurrency_limit=1)


if __name__ == "__main__":
    build().launch(
        server_name=os.environ.get("GRADIO_SERVER_NAME"),
        theme=gr.themes.Soft(
            primary_hue="indigo", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
        ),
        css=CSS,
        max_file_size="10mb",
        allowed_paths=[str(FOLDER / "images")],
        footer_links=["gradio"],
    )
