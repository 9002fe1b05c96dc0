"""
How fast training and sampling are, beside diffusers' own classes and the plainest PyTorch, in one run.

    python benchmarks/speed.py --output_dir runs/speed
    python benchmarks/speed.py --output_dir runs/speed --sections transformer sampling --repetitions 9
    python benchmarks/speed.py --output_dir runs/speed-gpu --device cuda --mixed_precision bf16

The compared rows take turns, repetition by repetition, so that other work on the machine affects all of them equally. Tables show
medians, the spread (half the distance between the quartiles), and ratios to the first row. FLOPs are counted in matrix products
and convolutions, and compared with the rate of one large product in the same run. The limit is the time of these FLOPs at that
rate, plus the time to move the bytes that do not fit into a cache (weights, gradients and moments in AdamW, weights of
every sampling step, cached latents) at the bandwidth of one large copy. Writes `speed.md`, `speed.json` and `growth.png`.
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from diffusers.training_utils import EMAModel
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dae_diffusers import DAEAsymmetricAutoencoderKL, DAEAutoencoderKL, DAEDiTPipeline, DAEDiTTransformer2DModel
from dae_diffusers.autoencoders.building import make_autoencoder
from dae_diffusers.autoencoders.settings import AutoencoderConfig
from dae_diffusers.cli import parse_config
from dae_diffusers.data import DataConfig, ImageDataset, MicrobatchSampler, load_images, make_training_loader
from dae_diffusers.latents.cache import CachedLatents, write_latent_cache
from dae_diffusers.store import write_atomically, write_json
from dae_diffusers.training import train_dae, train_dit
from dae_diffusers.training.settings import TrainDAEConfig, TrainDiTConfig
from dae_diffusers.transformer_dae_dit import DIT_SIZES


@dataclass
class Row:
    """One line of a table."""

    name: str
    seconds: float
    spread: float
    ratio: float  # of the first row's time to this one's: above 1 is faster
    share_of_rate: float | None = None
    share_of_limit: float | None = None
    note: str = ""


@dataclass
class Setting:
    device: torch.device
    repetitions: int
    models: tuple[str, ...] = ()
    mixed_precision: str = "no"
    matmul_rate: float = 0.0  # FLOP/s, in that precision
    bandwidth: float = 0.0  # byte/s

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.mixed_precision == "bf16" else torch.float32

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.mixed_precision == "bf16")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--models", nargs="+", choices=list(DIT_SIZES), help="sizes of the transformers whose steps are timed"
    )
    parser.add_argument("--mixed_precision", choices=["no", "bf16"], default="no", help="of the steps and of sampling")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    models = arguments.models or (["DiT-B", "DiT-XL"] if device.type == "cuda" else ["DiT-S"])
    setting = Setting(device, arguments.repetitions, tuple(models), arguments.mixed_precision)
    setting.matmul_rate = measure_matmul_rate(setting)
    setting.bandwidth = measure_bandwidth(setting)
    lines = [
        f"{describe_machine(setting)}; {str(setting.dtype)[6:]} matrix product {setting.matmul_rate / 1e9:.0f} GFLOP/s, copy "
        f"{setting.bandwidth / 1e9:.1f} GB/s read and written; medians of {arguments.repetitions} repetitions.",
        "",
    ]
    results = {}
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    for name in arguments.sections:
        for title, rows in SECTIONS[name](setting).items():
            results[title] = [asdict(row) for row in rows]
            lines += to_table(title, rows)
            print("\n".join(to_table(title, rows)), flush=True)
        write_json(arguments.output_dir / "speed.json", results)
        write_atomically(arguments.output_dir / "speed.md", "\n".join(lines))
    grown = {title: rows for title, rows in results.items() if title.startswith("Growth with")}
    if grown:
        plot_growth(grown, arguments.output_dir / "growth.png")


# What is measured -------------------------------------------------------------------------------------------------


class PlainDiTBlock(nn.Module):
    """Self-attention and a GELU network, each with adaptive layer norm and a gate."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = (nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6) for _ in range(2))
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(approximate="tanh"), nn.Linear(4 * dim, dim))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(conditioning)[:, None].chunk(6, dim=2)
        q, k, v = self.qkv(self.norm1(x) * (1 + scale1) + shift1).unflatten(2, (3, self.num_heads, -1)).unbind(2)
        attended = F.scaled_dot_product_attention(*(tensor.transpose(1, 2) for tensor in (q, k, v)))
        x = x + gate1 * self.out(attended.transpose(1, 2).flatten(2))
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class PlainDiT(nn.Module):
    """The plainest PyTorch of the architecture that https://huggingface.co/papers/2212.09748 describes."""

    def __init__(self, sample_size: int, channels: int, patch_size: int, dim: int, depth: int, num_heads: int):
        super().__init__()
        self.patch_size = patch_size
        self.patch_embed = nn.Conv2d(channels, dim, patch_size, stride=patch_size)
        self.positions = nn.Parameter(torch.randn((sample_size // patch_size) ** 2, dim) * 0.02, requires_grad=False)
        self.time_embed = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.label_embed = nn.Embedding(11, dim)
        self.blocks = nn.ModuleList(PlainDiTBlock(dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))
        self.out = nn.Linear(dim, patch_size**2 * channels)

    def forward(self, latents: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed(latents)
        height = x.shape[2]
        x = x.flatten(2).transpose(1, 2) + self.positions
        frequencies = torch.exp(-torch.arange(128, device=x.device) * (9.21 / 128)) * timestep[:, None]
        conditioning = self.time_embed(torch.cat([frequencies.cos(), frequencies.sin()], dim=1))
        conditioning = conditioning + self.label_embed(class_labels)
        for block in self.blocks:
            x = block(x, conditioning)
        shift, scale = self.modulation(conditioning)[:, None].chunk(2, dim=2)
        x = self.out(self.norm(x) * (1 + scale) + shift).transpose(1, 2).unflatten(2, (height, -1))
        return F.pixel_shuffle(x, self.patch_size)


def make_transformer(name: str, side: int, dim: int, depth: int, heads: int) -> nn.Module:
    if name.startswith("diffusers"):
        return diffusers_transformer(side, dim, depth, heads)
    if name.startswith("plain"):
        return PlainDiT(side, 4, 2, dim, depth, heads)
    model = DAEDiTTransformer2DModel(
        sample_size=side, in_channels=4, num_layers=depth, num_attention_heads=heads, attention_head_dim=dim // heads,
        num_classes=10,
    )  # fmt: skip
    if "checkpointing" in name:
        model.enable_gradient_checkpointing()
    if "compiled" in name:
        model.compile_repeated_blocks()
    return model


TRANSFORMERS = ("diffusers DiTTransformer2DModel", "plain PyTorch DiT", "DAEDiTTransformer2DModel")


def transformer_shape(setting: Setting, model: str | None = None) -> tuple[int, int, int, int]:
    """Width, depth, heads and batch of a model, by default of the largest."""
    size = DAEDiTTransformer2DModel.size_kwargs(f"{model or setting.models[-1]}/2")
    heads = size["num_attention_heads"]
    return heads * size["attention_head_dim"], size["num_layers"], heads, 32 if setting.is_gpu else 8


def transformer_steps(setting: Setting) -> dict[str, list[Row]]:
    """A training step (forward, backward, AdamW) of equal depth, width and tokens."""
    tables = {}
    for model, tokens in itertools.product(setting.models, (64, 256)):
        dim, depth, heads, batch = transformer_shape(setting, model)
        calls, flops, moved, notes = {}, {}, {}, {}
        for name in (*TRANSFORMERS, "DAEDiTTransformer2DModel, compiled blocks"):
            side = 2 * int(tokens**0.5)
            transformer = make_transformer(name, side, dim, depth, heads).to(setting.device).train()
            calls[name] = make_transformer_step(setting, transformer, batch, side)
            # The counter does not see into compiled code.
            flops[name] = flops[TRANSFORMERS[-1]] if "compiled" in name else count_flops(calls[name])
            moved[name] = bytes_of_adamw(transformer.parameters())
            notes[name] = f"{sum(p.numel() for p in transformer.parameters()) / 1e6:.1f} M parameters"
        title = f"Training step, width {dim}, depth {depth}, {tokens} tokens, batch {batch}"
        rows = compare(setting, calls, flops, moved, notes)
        for row in rows:
            row.note += f", {batch / row.seconds:.1f} images/s"
        tables[title] = rows
    return tables


def make_transformer_step(setting: Setting, model: nn.Module, batch: int, side: int) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    device = next(model.parameters()).device
    latents = torch.randn(batch, 4, side, side, device=device)
    timestep, labels = (torch.randint(high, (batch,), device=device) for high in (1000, 10))
    timestep = timestep.float() if isinstance(model, DAEDiTTransformer2DModel) else timestep

    def step():
        with setting.autocast():
            output = model(latents, timestep, class_labels=labels)
        output = output if isinstance(output, torch.Tensor) else output.sample
        output[:, :4].float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def sampling(setting: Setting) -> dict[str, list[Row]]:
    """Guidance 4, 25 steps, 8 images; the first two rows use the same weights and must give the same images."""
    dim, depth, heads, _ = transformer_shape(setting)
    torch.manual_seed(0)
    vae = make_vae(AutoencoderKL, (32, 64, 64), device=setting.device).eval()
    stock = diffusers_transformer(16, dim, depth, heads, num_classes=1000).to(setting.device).eval()
    own = DAEDiTTransformer2DModel(
        sample_size=16, in_channels=4, num_layers=depth, num_attention_heads=heads, attention_head_dim=dim // heads,
        num_classes=1000,
    ).to(setting.device).eval()  # fmt: skip
    for model in (stock, own):  # both start at zero
        nn.init.normal_((model.proj_out_2 if model is stock else model.proj_out).weight, std=0.02)
    scheduler = DDIMScheduler()
    pipelines = {
        "DiTPipeline, stock transformer": DiTPipeline(stock, vae, scheduler),
        "DAEDiTPipeline, the same transformer": DAEDiTPipeline(stock, vae, scheduler),
        "the same, guidance in [0.2, 0.8]": DAEDiTPipeline(stock, vae, scheduler),
        "DAEDiTPipeline, our transformer": DAEDiTPipeline(own, vae, scheduler),
    }
    images, calls, flops, moved = {}, {}, {}, {}
    for name, pipeline in pipelines.items():
        pipeline.set_progress_bar_config(disable=True)
        interval = {"guidance_interval": (0.2, 0.8)} if "guidance in" in name else {}

        def draw(name=name, pipeline=pipeline, interval=interval):
            generator = torch.Generator(setting.device).manual_seed(0)
            with torch.no_grad(), setting.autocast():
                images[name] = pipeline(
                    class_labels=list(range(8)), guidance_scale=4.0, num_inference_steps=25, generator=generator,
                    output_type="np", **interval,
                ).images  # fmt: skip

        calls[name] = draw
        flops[name] = count_flops(draw)
        moved[name] = 25 * sum(p.numel() * p.element_size() for p in pipeline.transformer.parameters())
    rows_of = compare(setting, calls, flops, moved)
    first, second = list(pipelines)[:2]
    difference = np.abs(images[first] - images[second]).max()
    rows_of[1].note = f"largest difference of a pixel {difference:.1e} of 1"
    return {f"Sampling, width {dim}, depth {depth}, 64 tokens, 8 images, 25 steps, guidance 4": rows_of}


AUTOENCODERS = {  # kind of auxiliary decoder, stage
    "joint step": ("none", 1),
    "stage 1, dropout": ("dropout", 1),
    "stage 1, narrow": ("narrow", 1),
    "stage 1, linear": ("linear", 1),
    "stage 2": ("dropout", 2),
    "stage 2, cached latents": ("dropout", 2),
}


def autoencoder_shape(setting: Setting) -> tuple[tuple[int, ...], int, int]:
    """Channels, batch and side of the images."""
    return ((128, 256, 512, 512), 8, 256) if setting.is_gpu else ((32, 64, 64), 16, 32)


def make_autoencoder_step(
    setting: Setting, name: str, pixel_values: torch.Tensor, widths: tuple[int, ...]
) -> tuple[Callable[[], None], int]:
    """A training step, and the bytes that its optimiser moves."""
    kind, stage = AUTOENCODERS[name]
    model = make_vae(DAEAutoencoderKL, widths, device=pixel_values.device, auxiliary_decoder_type=kind).train()
    model.set_stage(stage)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
    moments = None
    if "cached" in name:
        with torch.no_grad():
            posterior = model.encode(pixel_values).latent_dist
        moments = (posterior.mean, posterior.std)

    def step():
        with setting.autocast():
            reconstruction = model(pixel_values, sample_posterior=True, moments=moments).sample
        (reconstruction - pixel_values).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, bytes_of_adamw(parameters)


def autoencoder_steps(setting: Setting) -> dict[str, list[Row]]:
    """Training steps of one configuration, encoding and decoding, and what that makes of a whole run."""
    widths, batch, side = autoencoder_shape(setting)
    pixel_values = torch.rand(batch, 3, side, side, device=setting.device) * 2 - 1
    made = {name: make_autoencoder_step(setting, name, pixel_values, widths) for name in AUTOENCODERS}
    calls = {name: step for name, (step, _) in made.items()}
    flops = {name: count_flops(call) for name, call in calls.items()}
    steps = compare(setting, calls, flops, {name: moved for name, (_, moved) in made.items()})
    for row in steps:
        row.note = f"{batch / row.seconds:.0f} images/s"
    seconds = {row.name: row.seconds for row in steps}
    runs = [Row("joint, 6000 steps", 6000 * seconds["joint step"], 0.0, 1.0)]
    for kind in ("dropout", "narrow", "linear"):
        for stage2 in ("stage 2", "stage 2, cached latents"):
            total = 2000 * seconds[f"stage 1, {kind}"] + 4000 * seconds[stage2]
            name = f"{kind}, 2000 + 4000 steps{stage2[7:]}"
            runs.append(Row(name, total, 0.0, runs[0].seconds / total, note="from the steps above"))

    plain = make_vae(AutoencoderKL, widths, device=setting.device).eval()
    with torch.no_grad():
        latents = plain.encode(pixel_values).latent_dist.mean

        def encode():
            with torch.no_grad(), setting.autocast():
                plain.encode(pixel_values).latent_dist.mode()

        def decode():
            with torch.no_grad(), setting.autocast():
                plain.decode(latents)

    throughput = compare(
        setting, {"encode": encode, "decode": decode}, {"encode": count_flops(encode), "decode": count_flops(decode)}
    )
    for row in throughput:
        row.note = f"{batch / row.seconds:.0f} images/s"
    title = f"channels {widths}, {side}x{side} pixels, batch {batch}"
    return {
        f"Autoencoder training step, {title}": steps,
        "A whole run of equal steps": runs,
        f"Autoencoder throughput, {title}": throughput,
        "Decoding, channels (64, 128, 128), 64x64 pixels, batch 4": decoders(setting, (64, 128, 128), side=16, batch=4),
    }


def decoders(setting: Setting, widths: tuple[int, ...], *, side: int, batch: int) -> list[Row]:
    """The decoders that `--decoder` makes for latents of one encoder."""
    latents, calls = torch.randn(batch, 4, side, side, device=setting.device), {}
    for kind in ("mirror", "small", "tiny"):
        sizes = AutoencoderConfig(decoder=kind).decoder_sizes(widths)
        vae = make_vae(DAEAsymmetricAutoencoderKL, widths, device=setting.device, **sizes).eval()

        def decode(vae=vae):
            with torch.no_grad(), setting.autocast():
                vae.decode(latents)

        calls[f"--decoder {kind}"] = decode
    return compare(setting, calls, {name: count_flops(call) for name, call in calls.items()})


def script_overhead(setting: Setting) -> dict[str, list[Row]]:
    """Steps of the training scripts beside a bare loop over tensors that lie ready, same model and optimiser, in turns."""
    seconds: dict[str, list[float]] = {}
    for _ in range(3):
        with tempfile.TemporaryDirectory() as folder, quiet():
            for name, values in steps_in_turn(setting, Path(folder)).items():
                seconds[name] = seconds.get(name, []) + values
    tables = {}
    for script, bare in (("train_dae.py, stage 1", "bare loop, stage 1"), ("train_dit.py", "bare loop, transformer")):
        rows = [to_row(name, seconds[name], statistics.median(seconds[bare])) for name in (bare, script)]
        rows[1].note = f"overhead {rows[1].seconds / rows[0].seconds - 1:+.1%}"
        tables[f"The script's own time: {script}"] = rows
    return tables


def steps_in_turn(setting: Setting, folder: Path) -> dict[str, list[float]]:
    """Each script, and the bare loop that belongs to it right after."""
    data = f"--dataset_name digits --image_channels 1 --resolution 32 --output_dir {folder}"
    never = "--validation_steps 100000 --checkpointing_steps 100000 --logging_steps 50"
    dae_flags = f"{data} {never} --block_out_channels 16 32 32 --stage1_steps 40 --stage2_steps 2 --train_batch_size 16"
    seconds = {"train_dae.py, stage 1": steps_of_script(train_dae, TrainDAEConfig, dae_flags, first=40)}
    model = make_autoencoder(parse_config(TrainDAEConfig, dae_flags.split())).to(setting.device).train()
    model.set_stage(1)
    pixel_values = torch.rand(16, 1, 32, 32, device=setting.device) * 2 - 1
    seconds["bare loop, stage 1"] = bare_loop(
        [p for p in model.parameters() if p.requires_grad],
        lambda: (model(pixel_values, sample_posterior=True).sample - pixel_values).abs().mean(),
    )

    vae = AutoencoderKL.from_pretrained(folder / "vae").to(setting.device).eval()
    splits = load_images(DataConfig("digits", image_channels=1))
    for split, images in zip(("train", "validation"), splits, strict=True):
        write_latent_cache(folder / "latents" / split, vae, images, Accelerator(), batch_size=64)
    dit_flags = (
        f"{data} {never} --vae {folder}/vae --latent_cache {folder}/latents --model DiT-Ti/2 --max_train_steps 40 "
        "--train_batch_size 32 --num_sample_images 1 --sample_steps 1"
    )
    seconds["train_dit.py"] = steps_of_script(train_dit, TrainDiTConfig, dit_flags, first=40)
    transformer = DAEDiTPipeline.from_pretrained(folder / "pipeline").transformer.to(setting.device).train()
    latents = torch.randn(32, 4, 8, 8, device=setting.device)
    timestep = torch.rand(32, device=setting.device) * 1000
    labels = torch.randint(10, (32,), device=setting.device)
    seconds["bare loop, transformer"] = bare_loop(
        list(transformer.parameters()),
        lambda: (transformer(latents, timestep, labels).sample - latents).square().mean(),
    )
    return seconds


def data_loading(setting: Setting) -> dict[str, list[Row]]:
    """Images a second from files to tensors, and latents from the cache beside encoding."""
    workers = min(2, os.cpu_count() or 1)
    tables = {}
    with tempfile.TemporaryDirectory() as folder, quiet():
        random = np.random.default_rng(0)
        photo = Image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8)).resize((512, 512))
        (Path(folder) / "jpeg").mkdir()
        for number in range(64):
            photo.rotate(number).save(Path(folder) / "jpeg" / f"{number}.jpg", quality=90)
        config = DataConfig(train_data_dir=f"{folder}/jpeg", resolution=256, random_crop=True)
        photos, _ = load_images(config)
        digits, _ = load_images(DataConfig(dataset_name="digits", image_channels=1))
        rows = []
        for name, images, count in (("512x512 JPEG to 256x256", photos, 16), ("digits, kept in memory", digits, 64)):
            for num_workers in (0, workers):
                seconds = time_loader(images, count, num_workers, setting.repetitions)
                row = to_row(f"{name}, {num_workers} workers", seconds, None)
                row.note = f"{count / row.seconds:.0f} images/s"
                rows.append(row)
        tables["Reading images, per batch"] = rows

        vae = make_vae(AutoencoderKL, (32, 64, 64), channels=1, device=setting.device).eval()
        write_latent_cache(Path(folder) / "latents", vae, digits, Accelerator(), batch_size=64)
        cached = CachedLatents(Path(folder) / "latents")
        items = [(int(n), int(n)) for n in random.integers(0, len(cached), 64)]
        pixel_values = torch.stack([digits[n]["pixel_values"] for n, _ in items]).to(setting.device)

        def encode():
            with torch.no_grad():
                vae.encode(pixel_values).latent_dist.sample()

        batch = cached.__getitems__(items)
        moved = 2 * sum(value.numel() * value.element_size() for value in batch.values())  # read and written
        tables["A batch of 64 latents (4x8x8)"] = compare(
            setting,
            {"encoded on the fly": encode, "from the cache": lambda: cached.__getitems__(items)},
            {"encoded on the fly": count_flops(encode)},
            {"from the cache": moved},
        )
        tables["Share of the training time that the model waits for data"] = waiting(Path(folder), workers)
    return tables


def waiting(folder: Path, workers: int) -> list[Row]:
    """As `run.json` reports it, in the first pass, in which every image is decoded."""
    random = np.random.default_rng(0)
    (folder / "small").mkdir()
    content = []
    for number in range(5000):
        path = folder / "small" / f"{number}.png"
        Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((32, 32)).save(path)
        content.append({"image": {"bytes": path.read_bytes(), "path": path.name}})
    features = datasets.Features({"image": datasets.Image()})
    (folder / "parquet").mkdir()
    datasets.Dataset.from_list(content, features=features).to_parquet(folder / "parquet" / "train.parquet")
    flags = "--stage 1 --auxiliary_decoder dropout --random_flip --validation_steps 100000 --checkpointing_steps 100000 --max_validation_samples 8"  # noqa: E501
    kinds = {
        "32x32 PNG in Parquet, channels (16, 32, 32), batch 64": f"--dataset_name {folder}/parquet --resolution 32 "
        "--block_out_channels 16 32 32 --train_batch_size 64 --stage1_steps 60",
        "512x512 JPEG to 256x256, channels (16, 32, 32), batch 4": f"--train_data_dir {folder}/jpeg --resolution 256 "
        "--random_crop --block_out_channels 16 32 32 --train_batch_size 4 --stage1_steps 12",
    }
    rows = []
    for kind, more in kinds.items():
        for num_workers in (0, workers):
            output = folder / f"waiting-{len(rows)}"
            argv = f"{flags} {more} --dataloader_num_workers {num_workers} --output_dir {output}".split()
            AcceleratorState._reset_state(reset_partial_state=True)
            train_dae.main(parse_config(TrainDAEConfig, argv))
            share = json.loads((output / "train_dae" / "run.json").read_text())["data_wait_share"]
            rows.append(Row(f"{kind}, {num_workers} workers", 0.0, 0.0, 1.0, note=f"{share:.1%}"))
    AcceleratorState._reset_state(reset_partial_state=True)
    return rows


def memory(setting: Setting) -> dict[str, list[Row]]:
    """Peak of two training steps, above what the process held before, each in a process of its own."""
    dim, depth, heads, batch = transformer_shape(setting)
    widths, images, side = autoencoder_shape(setting)
    rows = []
    for name in (*TRANSFORMERS, "DAEDiTTransformer2DModel, gradient checkpointing", *AUTOENCODERS):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            peak = pool.submit(peak_of_steps, name, setting).result()
        rows.append(Row(name, 0.0, 0.0, 1.0, note=f"{peak / 2**20:.0f} MiB"))
    title = (
        f"Peak memory: transformer of 256 tokens, batch {batch}; autoencoder of {side}x{side} pixels, batch {images}"
    )
    return {title: rows}


def peak_of_steps(name: str, setting: Setting) -> int:
    """Bytes. Run in a new process."""
    nn.Conv2d(4, 8, 3)(torch.rand(1, 4, 8, 8)).square().mean().backward()  # loads the libraries
    before = 0 if setting.is_gpu else peak_of_process()
    if name in AUTOENCODERS:
        widths, batch, side = autoencoder_shape(setting)
        pixel_values = torch.rand(batch, 3, side, side, device=setting.device) * 2 - 1
        step, _ = make_autoencoder_step(setting, name, pixel_values, widths)
    else:
        dim, depth, heads, batch = transformer_shape(setting)
        model = make_transformer(name, 32, dim, depth, heads).to(setting.device).train()
        step = make_transformer_step(setting, model, batch, 32)
    for _ in range(2):
        step()
    if setting.is_gpu:
        return torch.cuda.max_memory_allocated(setting.device)
    return peak_of_process() - before


def peak_of_process() -> int:
    """Bytes. Not `ru_maxrss`, which a process takes over from the one that started it."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def growth(setting: Setting) -> dict[str, list[Row]]:
    """How the cost of a step grows with tokens, batch, resolution and images; drawn in `growth.png`."""
    dim, depth, heads, batch = transformer_shape(setting)
    widths, images, _ = autoencoder_shape(setting)
    tables = {}
    for title, values, make in (
        ("tokens", (16, 64, 256, 1024), lambda n: transformer_step_of(setting, n, max(1, batch // 4))),
        ("batch", (1, 2, 4, 8), lambda n: transformer_step_of(setting, 64, n)),
        (
            "pixels of a side",
            (16, 32, 64, 128),
            lambda n: make_autoencoder_step(
                setting, "joint step", torch.rand(2, 3, n, n, device=setting.device), widths
            )[0],
        ),
        ("images in the data set", (10**3, 10**4, 10**5, 10**6), batches_of),
    ):
        calls = {str(value): make(value) for value in values}
        tables[f"Growth with {title}"] = compare(setting, calls)
    tables["Growth with processes"] = step_in_processes(setting)
    return tables


def step_in_processes(setting: Setting) -> list[Row]:
    """A step of `train_dae.py` with 16 digits a process: the time of 60 steps less that of 20, so without start and end."""
    available = torch.cuda.device_count() if setting.is_gpu else os.cpu_count() or 1
    launch = "accelerate.commands.launch" + (
        " --num_machines 1" if setting.is_gpu else " --cpu --num_cpu_threads_per_process 1"
    )
    script = (
        "-m dae_diffusers.training.train_dae --dataset_name digits --image_channels 1 --block_out_channels 16 32 32"
    )
    never = "--train_batch_size 16 --stage 1 --validation_steps 100000 --checkpointing_steps 100000"
    rows: list[Row] = []
    for number in (n for n in (1, 2, 4, 8) if n <= available):
        seconds = []
        for steps in (20, 60):
            with tempfile.TemporaryDirectory() as folder:
                kind = "--multi_gpu " if setting.is_gpu and number > 1 else ""
                command = f"-m {launch} {kind}--num_processes {number} {script} {never} --stage1_steps {steps} --output_dir {folder}"
                subprocess.run([sys.executable, *command.split()], check=True, capture_output=True)
                seconds.append(json.loads((Path(folder) / "train_dae" / "run.json").read_text())["seconds"])
        rows.append(to_row(str(number), [(seconds[1] - seconds[0]) / 40], rows[0].seconds if rows else None))
        rows[-1].note = f"{16 * number / rows[-1].seconds:.0f} images/s"
    return rows


def transformer_step_of(setting: Setting, tokens: int, batch: int) -> Callable[[], None]:
    dim, depth, heads, _ = transformer_shape(setting)
    side = 2 * int(tokens**0.5)
    model = make_transformer(TRANSFORMERS[-1], side, dim, depth, heads).to(setting.device).train()
    return make_transformer_step(setting, model, batch, side)


def batches_of(num_images: int) -> Callable[[], None]:
    """A hundred micro-batches of 64 numbers from somewhere in a pass."""
    return lambda: [*itertools.islice(iter(MicrobatchSampler(num_images, 64, seed=0, start=7)), 100)]


def plot_growth(tables: dict[str, list[dict]], path: Path) -> None:
    figure = Figure(figsize=(12, 3), layout="constrained")
    for axis, (title, rows) in zip(figure.subplots(1, len(tables)), tables.items(), strict=True):
        values = [int(row["name"]) for row in rows]
        axis.semilogx(values, [row["seconds"] for row in rows], marker="o")
        axis.set_xticks(values, [EngFormatter(sep="")(value) for value in values])
        axis.minorticks_off()
        axis.set_ylim(bottom=0)
        axis.set_xlabel(title.removeprefix("Growth with "))
    figure.axes[0].set_ylabel("seconds")
    figure.savefig(path, dpi=120)


SECTIONS: dict[str, Callable[[Setting], dict[str, list[Row]]]] = {
    "transformer": transformer_steps,
    "sampling": sampling,
    "autoencoder": autoencoder_steps,
    "scripts": script_overhead,
    "data": data_loading,
    "memory": memory,
    "growth": growth,
}


# How it is measured -----------------------------------------------------------------------------------------------


def compare(
    setting: Setting,
    calls: dict[str, Callable[[], None]],
    flops: dict[str, int] | None = None,
    moved: dict[str, int] | None = None,
    notes: dict[str, str] | None = None,
) -> list[Row]:
    """Times the calls in turns. `moved`: bytes."""
    for call in calls.values():
        call()  # warm up
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(setting.repetitions):
        for name, call in calls.items():
            seconds[name].append(timed(setting, call))
    first = statistics.median(next(iter(seconds.values())))
    rows = [to_row(name, values, first) for name, values in seconds.items()]
    for row in rows:
        computing = (flops or {}).get(row.name, 0) / setting.matmul_rate
        limit = computing + (moved or {}).get(row.name, 0) / setting.bandwidth
        row.share_of_rate = computing / row.seconds or None
        row.share_of_limit = limit / row.seconds or None
        row.note = (notes or {}).get(row.name, row.note)
    return rows


def to_row(name: str, seconds: list[float], first: float | None) -> Row:
    median = statistics.median(seconds)
    low, _, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else (median,) * 3
    return Row(name, median, (high - low) / 2, median and (first or median) / median)


def to_table(title: str, rows: list[Row]) -> list[str]:
    lines = [
        f"### {title}",
        "",
        "| | ms | ± | speed-up | share of the matrix-product rate | share of the limit | |",
        "|---|---|---|---|---|---|---|",
    ]
    if all(row.seconds == 0 for row in rows):  # no times were taken
        lines[2:] = ["| | |", "|---|---|", *(f"| {row.name} | {row.note} |" for row in rows)]
        rows = []
    for row in rows:
        shares = " | ".join("" if x is None else f"{x:.0%}" for x in (row.share_of_rate, row.share_of_limit))
        lines.append(
            f"| {row.name} | {1e3 * row.seconds:.4g} | {1e3 * row.spread:.2g} | {row.ratio:.2f} | {shares} | {row.note} |"
        )
    return [*lines, ""]


def measure_matmul_rate(setting: Setting) -> float:
    """FLOP/s of a large product."""
    size = 8192 if setting.is_gpu else 1536
    a, b = (torch.randn(size, size, device=setting.device, dtype=setting.dtype) for _ in range(2))
    return 2 * size**3 / fastest(setting, lambda: a @ b)


def measure_bandwidth(setting: Setting) -> float:
    """Bytes read and written a second by a copy of 256 MiB."""
    source = torch.ones(2**26, device=setting.device)
    target = torch.empty_like(source)
    return 2 * source.numel() * source.element_size() / fastest(setting, lambda: target.copy_(source))


def fastest(setting: Setting, call: Callable[[], object]) -> float:
    """Seconds of the fastest of ten."""
    return min(timed(setting, call) for _ in range(10))


def timed(setting: Setting, call: Callable[[], object]) -> float:
    """Seconds."""
    synchronize(setting)
    start = time.perf_counter()
    call()
    synchronize(setting)
    return time.perf_counter() - start


def bytes_of_adamw(parameters: Iterable[torch.Tensor]) -> int:
    """It reads weight, gradient and two moments, and writes all but the gradient."""
    return 7 * sum(p.numel() * p.element_size() for p in parameters)


def count_flops(call: Callable[[], None]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def steps_of_script(script, config_class: type, flags: str, first: int) -> list[float]:
    """Seconds between optimiser steps while the script's `main` runs, after a warm-up of ten."""
    times: list[float] = []
    original = torch.optim.AdamW.step

    def timed_step(self, *args, **kwargs):
        times.append(time.perf_counter())
        return original(self, *args, **kwargs)

    torch.optim.AdamW.step = timed_step
    try:
        AcceleratorState._reset_state(reset_partial_state=True)
        script.main(parse_config(config_class, flags.split()))
    finally:
        torch.optim.AdamW.step = original
        AcceleratorState._reset_state(reset_partial_state=True)
    times = times[:first]
    return [later - earlier for earlier, later in zip(times[10:-1], times[11:], strict=True)]


def bare_loop(parameters: list[nn.Parameter], loss: Callable[[], torch.Tensor], steps: int = 40) -> list[float]:
    """The same optimiser, clipping and average, and nothing else."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
    ema = EMAModel(parameters, decay=0.999, foreach=True)
    times = []
    for _ in range(steps):
        loss().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        times.append(time.perf_counter())
        optimizer.zero_grad(set_to_none=True)
        ema.step(parameters)
    return [later - earlier for earlier, later in zip(times[10:-1], times[11:], strict=True)]


def time_loader(images: ImageDataset, batch_size: int, num_workers: int, repetitions: int) -> list[float]:
    batches = iter(make_training_loader(images, batch_size=batch_size, seed=0, num_workers=num_workers))
    for _ in range(2 + 2 * num_workers):
        next(batches)
    seconds = []
    for _ in range(max(8, repetitions)):
        start = time.perf_counter()
        next(batches)
        seconds.append(time.perf_counter() - start)
    return seconds


def make_vae(cls: type, widths: tuple[int, ...], *, device: torch.device, channels: int = 3, **options):
    return cls(
        in_channels=channels, out_channels=channels, down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths), block_out_channels=widths, layers_per_block=1,
        latent_channels=4, norm_num_groups=8, mid_block_add_attention=False, **options,
    ).to(device)  # fmt: skip


def diffusers_transformer(side: int, dim: int, depth: int, heads: int, num_classes: int = 10) -> DiTTransformer2DModel:
    return DiTTransformer2DModel(
        sample_size=side, in_channels=4, out_channels=4, num_layers=depth, num_attention_heads=heads,
        attention_head_dim=dim // heads, num_embeds_ada_norm=num_classes,
    )  # fmt: skip


@contextlib.contextmanager
def quiet():
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def synchronize(setting: Setting) -> None:
    if setting.is_gpu:
        torch.cuda.synchronize(setting.device)


def describe_machine(setting: Setting) -> str:
    if setting.is_gpu:
        return torch.cuda.get_device_name(setting.device)
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return (
        f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )


if __name__ == "__main__":
    main()
