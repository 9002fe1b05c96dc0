"""
An app to try a model: draw by class, look at its latent space, read its numbers.

The model is the environment variable `MODEL`, or else the first of `models:` in README.md: a Hub repository or a folder.
"""

import inspect
import math
import os
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
EACH_CLASS = "every class"
Image.MAX_IMAGE_PIXELS = 20_000_000  # pillow refuses pictures of twice as many

CSS = """
.gradio-container {width: 100%; max-width: 1080px !important; margin: 0 auto !important}
#title h1 {margin-bottom: .2em; font-size: 1.9em} #title p {margin-top: 0; opacity: .8}
.pixels img {image-rendering: pixelated}
#samples img {max-height: 78vh; object-fit: contain}
.numbers {overflow-x: auto} .numbers :is(td, th) {overflow-wrap: normal; word-break: normal} .numbers table {width: 100%; font-size: .95em} .numbers pre {overflow-x: auto}
.caption p {margin: .6em 0 0; font-weight: 600; opacity: .75}
footer {opacity: .6}
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
CARD = ModelCard.load(FOLDER / "README.md") if (FOLDER / "README.md").exists() else None
OPTIONS = inspect.signature(PIPE.__call__).parameters if PIPE is not None else {}
CLASSES = {int(key): str(name) for key, name in (getattr(PIPE, "id2label", None) or {}).items()}
SIDE = VAE.config.sample_size if isinstance(VAE.config.sample_size, int) else VAE.config.sample_size[0]


class VisitorHasGoneError(Exception):
    """Raised to stop a draw that nobody waits for."""


class Visitors:
    """Remembers who has closed the page. The model serves one visitor at a time, and a draw may take minutes on a free CPU."""

    def __init__(self):
        self.gone = deque(maxlen=1000)
        self.current = None  # whose draw is running

    def leave(self, request: gr.Request):
        """Gradio calls this when a tab is closed or reloaded."""
        self.gone.append(request.session_hash)

    @contextmanager
    def drawing_for(self, request):
        """Inside, the model stops before its next step once the visitor has gone."""
        self.current = getattr(request, "session_hash", None)
        model = getattr(PIPE, "transformer", None) or getattr(PIPE, "prior", None)
        hook = model.register_forward_pre_hook(lambda *_: self.check()) if model is not None else None
        try:
            self.check()  # a visitor may also leave while waiting in the queue
            yield
        except VisitorHasGoneError:
            PIPE.maybe_free_model_hooks()
            raise gr.Error("The visitor has gone.", print_exception=False) from None
        finally:
            self.current = None
            if hook is not None:
                hook.remove()

    def check(self):
        if self.current is not None and self.current in self.gone:
            raise VisitorHasGoneError


VISITORS = Visitors()


def draw(class_id, count, guidance_scale, steps, seed, request: gr.Request = None, progress=gr.Progress()):  # noqa: B008, this is how gradio passes it
    """A grid of samples."""
    count, steps, seed = int(count), int(steps), int(seed or 0)
    if class_id == EACH_CLASS:
        columns = min(count, max(1, MAX_IMAGES // len(CLASSES)))
        labels = [key for key in CLASSES for _ in range(columns)][:MAX_IMAGES]
        columns = None if columns == 1 else columns
    else:
        columns = None
        labels = [class_id] * count if CLASSES else None
    number = count if labels is None else len(labels)
    generators = [torch.Generator().manual_seed((seed + n) % 2**63) for n in range(number)]

    def on_step(pipe, step, timestep, tensors):
        progress((step + 1, steps), desc="Drawing", unit="steps")
        return tensors

    arguments = {
        "class_labels": labels,
        "num_images_per_label": number if labels is None else 1,
        "guidance_scale": guidance_scale,
        "num_inference_steps": steps,
        "generator": generators,
        "callback_on_step_end": on_step,
        "output_type": "pt",
    }
    with VISITORS.drawing_for(request):
        images = PIPE(**{name: value for name, value in arguments.items() if name in OPTIONS}).images
    return grid(images.float().cpu(), columns)


def draw_one(request: gr.Request = None):
    """A picture to try the autoencoder with."""
    arguments = {"num_inference_steps": 20, "output_type": "pt"}
    if CLASSES:
        arguments["class_labels"] = [int(torch.randint(len(CLASSES), ()))]
    with VISITORS.drawing_for(request):
        images = PIPE(**{name: value for name, value in arguments.items() if name in OPTIONS}).images
    return enlarge(to_pil(images[0].float().cpu()), 256)


@torch.no_grad()
def reconstruct(first, second):
    """The reconstruction of a picture, its latent channels, and an interpolation to a second picture."""
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
    text += f"The latents hold {size} numbers (channels x height x width), {shrunk:.3g} times fewer than the picture."
    channels = (latents[0] - latents[0].mean((1, 2), keepdim=True)) / (6 * latents[0].std((1, 2), keepdim=True) + 1e-6)
    channels = grid((channels + 0.5).clamp(0, 1)[:, None], min(len(channels), 4))
    if second is None:
        return pair, text, channels, None
    weights = torch.linspace(0, 1, INTERPOLATION_STEPS).view(-1, 1, 1, 1)
    between = decode((1 - weights) * latents + weights * encode(to_pixels(second)))
    return pair, text, channels, grid(between / 2 + 0.5, INTERPOLATION_STEPS)


def encode(pixels):
    encoded = VAE.encode(pixels.to(VAE.device, VAE.dtype))
    latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
    return latents.float().cpu()


def decode(latents):
    return VAE.decode(latents.to(VAE.device, VAE.dtype)).sample.float().cpu().clamp(-1, 1)


def to_pixels(image):
    """Any picture to `(1, C, side, side)` in [-1, 1]: its centre square, with white behind transparency."""
    image = ImageOps.exif_transpose(image).convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = ImageOps.fit(image.convert("L" if VAE.config.in_channels == 1 else "RGB"), (SIDE, SIDE), Image.LANCZOS)
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


def grid(images, columns=None):
    """`(N, C, H, W)` in [0, 1] to one picture."""
    if columns is None:  # rows that are full, if that keeps it about square
        square = math.ceil(math.sqrt(len(images)))
        columns = next((n for n in range(square, square + 3) if len(images) % n == 0), square)
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
        caption(path.stem.replace("_", " ").capitalize())
        picture_output(value=str(path), plot=path.stem.endswith(("curves", "sweep")))
    with gr.Accordion("The whole card", open=not rows):
        text = "\n".join(line for line in CARD.text.splitlines() if not line.startswith(("![", "# ")))
        gr.Markdown(text, elem_classes="numbers")


def caption(text):
    gr.Markdown(text, elem_classes="caption")


def picture_output(plot=False, **options):
    return gr.Image(
        format="png",
        interactive=False,
        show_label=False,
        container=False,
        buttons=["download", "fullscreen"],
        elem_classes=None if plot else "pixels",
        **options,
    )


def settings(arguments):
    words = ((name.replace("num_", "").replace("_", " "), value) for name, value in (arguments or {}).items())
    return ", ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in words)


def generate_tab():
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            choices = [(name, key) for key, name in CLASSES.items()]
            if len(CLASSES) > 1:
                choices.insert(0, (EACH_CLASS, EACH_CLASS))
            label = gr.Dropdown(choices, value=choices[0][1] if choices else None, label="Class", visible=bool(CLASSES))
            count = gr.Slider(1, 16, 6, step=1, label="Pictures per class" if len(CLASSES) > 1 else "Pictures")
            guided = "guidance_scale" in OPTIONS and bool(CLASSES)
            guidance = gr.Slider(
                1, 8, 2, step=0.1, label="Guidance", info="1: none; higher: clearer, less varied", visible=guided
            )
            stepped = "num_inference_steps" in OPTIONS
            steps = gr.Slider(1, MAX_STEPS, 25, step=1, label="Steps", info="more: slower, finer", visible=stepped)
            seed = gr.Number(0, precision=0, label="Seed", info="the same seed draws the same pictures")
            button = gr.Button("Draw", variant="primary", elem_id="draw")
        with gr.Column(scale=3, min_width=280):
            first = FOLDER / "images" / "samples.png"
            output = picture_output(value=str(first) if first.exists() else None, elem_id="samples")
    button.click(draw, [label, count, guidance, steps, seed], output, concurrency_id="model")


def reconstruct_tab():
    gr.Markdown(
        "How well does the autoencoder reconstruct a picture? Choose one. Choose a second one to interpolate between them."
    )
    with gr.Row():
        with gr.Column(min_width=240):
            first = picture_input("Picture", "first")
            one = gr.Button("Let the model draw it", size="sm", visible=PIPE is not None)
        with gr.Column(min_width=240):
            second = picture_input("Second picture (optional)", "second")
            two = gr.Button("Let the model draw it", size="sm", visible=PIPE is not None)
    button = gr.Button("Encode and decode", variant="primary", elem_id="reconstruct")
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
    button.click(reconstruct, [first, second], [pair, text, channels, between], concurrency_id="model")


def build():
    name = (CARD.data.model_name if CARD is not None else None) or Path(MODEL).name
    with gr.Blocks(title=name, analytics_enabled=False) as demo:
        kind = "A latent diffusion model" if PIPE is not None else "An autoencoder"
        classes = f" of {len(CLASSES)} classes" if CLASSES else ""
        where = "" if os.path.isdir(MODEL) else f": [{MODEL}](https://huggingface.co/{MODEL})"
        gr.Markdown(f"# {name}\n{kind}{classes}, {SIDE}x{SIDE} pixels{where}", elem_id="title")
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
