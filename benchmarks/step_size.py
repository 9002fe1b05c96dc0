"""
How much the guides' recipes compute and remember: `python benchmarks/step_size.py`. It counts on torch's `meta` device, so it takes
seconds and needs no GPU. The hours are estimates: the counted operations at two rates that were measured.
"""

import torch
from diffusers import AutoencoderKL
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from dae_diffusers import DAEDiTTransformer2DModel

RATES = {"2 CPU cores": 0.127e12, "H100": 25e12}  # FLOP/s, from results/speed_cpu.md and results/cifar10_16px_gpu.md
BYTES_PER_PARAMETER = 20  # float32: weights, gradients, two moments of AdamW, moving average

# Name; model (an autoencoder by channels and layers, trained as a whole); shape of an image or its latents; images in a batch; steps.
RECIPES = (
    ("`photos_cpu_dae`", ((32, 64, 64), 1), (3, 64, 64), 32, 3_000),
    ("`photos_cpu_dit`", "DiT-Ti/2", (4, 16, 16), 64, 4_000),
    ("`photos_64_dae`", ((64, 128, 128), 1), (3, 64, 64), 32, 30_000),
    ("`photos_64_dit`", "DiT-S/2", (4, 16, 16), 64, 100_000),
    ("`photos_128_dae`", ((64, 128, 128, 128), 1), (3, 128, 128), 32, 30_000),
    ("`kl_f8_256`", ((128, 256, 512, 512), 2), (3, 256, 256), 12, 150_000),
    ("256 pixels, `DiT-S/2`", "DiT-S/2", (4, 32, 32), 32, 100_000),
    ("256 pixels, `DiT-B/2`", "DiT-B/2", (4, 32, 32), 32, 200_000),
    ("256 pixels, `DiT-L/2`", "DiT-L/2", (4, 32, 32), 64, 200_000),
    ("256 pixels, `DiT-XL/2`", "DiT-XL/2", (4, 32, 32), 64, 200_000),
)
CHECKS = (  # against the measured memory in results/speed_cpu.md
    ("check: 32 pixels, autoencoder", ((32, 64, 64), 1), (3, 32, 32), 16, 1),
    ("check: `DiT-S/2`, 256 tokens", "DiT-S/2", (4, 32, 32), 8, 1),
)


def make(kind: str | tuple[tuple[int, ...], int]) -> torch.nn.Module:
    r"""A transformer by its size, or an autoencoder by its channels and layers."""
    if isinstance(kind, str):
        return DAEDiTTransformer2DModel(sample_size=32, num_classes=10, **DAEDiTTransformer2DModel.size_kwargs(kind))
    channels, layers = kind
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=layers,
        latent_channels=4,
        norm_num_groups=min(32, channels[0]),
        mid_block_add_attention=layers > 1,
    )


def measure(model: torch.nn.Module, sample: torch.Tensor) -> tuple[int, int]:
    r"""FLOPs of a forward and backward pass, and the bytes of activations that it keeps; each storage counts once."""
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    label = (
        ()
        if isinstance(model, AutoencoderKL)
        else (sample.new_zeros(1), torch.zeros(1, dtype=torch.long, device="meta"))
    )
    with FlopCounterMode(display=False) as counter, saved_tensors_hooks(keep, lambda tensor: tensor):
        model(sample, *label).sample.sum().backward()
    return counter.get_total_flops(), sum(kept[n].untyped_storage().nbytes() for n in kept.keys() - own)


def main() -> None:
    print(
        "| what | parameters | GFLOP an image | GiB, float32 | GiB, bf16 | steps x batch | "
        + " | ".join(f"hours, {name}" for name in RATES)
        + " |"
    )
    print("|---" * (6 + len(RATES)) + "|")
    for name, kind, shape, batch, steps in (*RECIPES, *CHECKS):
        with torch.device("meta"):
            model, sample = make(kind), torch.zeros(1, *shape)
            flops, activations = measure(model, sample)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        memory = [(parameters * BYTES_PER_PARAMETER + batch * activations * share) / 2**30 for share in (1, 0.5)]
        hours = [steps * batch * flops / rate / 3600 for rate in RATES.values()]
        cells = [
            f"{parameters / 1e6:.1f} M",
            f"{flops / 1e9:.3g}",
            *(f"{each:.3g}" for each in memory),
            f"{steps:,} x {batch}",
        ]
        print("| " + " | ".join([name, *cells, *(f"{each:.3g}" for each in hours)]) + " |")


if __name__ == "__main__":
    main()
