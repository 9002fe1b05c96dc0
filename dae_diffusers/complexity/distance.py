r"""
The complexity distance of a latent space: how well small generators turn the latents into images.

`D(P_z, P_x) = min over g of limited capacity of d(g(P_z), P_x)`: it is small if simple generators suffice. The idea is from DAE,
https://huggingface.co/papers/2307.08283, whose formula was not available to us. The exact form here is ours: the two divergences
`d`, the generators and their training budget. So the numbers cannot be compared with those of the paper.

There are two forms. Each is measured with generators of growing capacity, from a linear one on, and over seeds:

- `paired`: `d` is the squared error of `g(E(x))` against `x`. The linear generator is solved exactly; a wider one starts
  from it. This form mostly repeats the reconstruction error, because no generator recovers what the encoder discarded. Compare
  it with the error of the autoencoder's own decoder (the rows of capacity `None`). If that decoder is the conditional mean of
  the images, the difference is `mean((g(z) - decoder(z))^2)`: the cost of the capacity, without what the encoder discarded.
- `unpaired`: `d` is the 1-Wasserstein distance between the two distributions, under the root-mean-square distance of
  images. `g` is trained as a GAN: it sees latents, a small critic sees images, and neither sees which of them belong together.
  Then a *fresh* critic is trained with `g` fixed, and its estimate on held-out images is reported.

Why this estimator: a Jensen-Shannon bound was tried first. On 32x32 images of a small autoencoder the discriminator
separates nearly every pair of distributions perfectly, so the bound is always log 2 and ranks nothing. The Wasserstein
distance still differs for distributions far apart, has the unit of the root of the paired form (and for the same `g`
never exceeds it), and is 0 for the images themselves.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path

import torch
from diffusers import ModelMixin
from tqdm.auto import tqdm

from dae_diffusers.complexity.rows import ComplexityResult, ComplexityRow, append_row, read_rows
from dae_diffusers.complexity.settings import ComplexityConfig
from dae_diffusers.complexity.task import ComplexityTask
from dae_diffusers.metrics.statistics import pad_batch
from dae_diffusers.store import fingerprint, fingerprint_of_json

# Part of every row's key. Raise it when the same inputs give other numbers.
_VERSION = 2

# Maximum numbers of images; more change the distance little.
MAX_TRAIN_IMAGES, MAX_EVAL_IMAGES = 8192, 2048


def complexity_distance(
    vae: ModelMixin,
    loader_train: Iterable[dict[str, torch.Tensor]],
    loader_eval: Iterable[dict[str, torch.Tensor]],
    config: ComplexityConfig | None = None,
    *,
    max_train_images: int = MAX_TRAIN_IMAGES,
    max_eval_images: int = MAX_EVAL_IMAGES,
    feature_extractor: Callable[[torch.Tensor], torch.Tensor] | None = None,
    rows_path: str | Path | None = None,
    device: torch.device | str = "cpu",
    disable_progress: bool = False,
) -> ComplexityResult:
    r"""
    Measures the complexity distance of an autoencoder's latents. It encodes the images (posterior mean, or quantised
    latents) and calls [`measure_complexity`], which also measures the autoencoder's own decoder.

    The posterior mean is used as it is. Information in channels far weaker than the posterior's noise counts here, although a
    denoiser would not see it.

    Args:
        vae ([`~diffusers.AutoencoderKL`] or [`~diffusers.VQModel`]): Any autoencoder of these classes, on `device`, in eval mode.
        loader_train, loader_eval (`Iterable` of `{"pixel_values": (B, C, H, W)}`): Images in [-1, 1], as from
            `make_pass_loader`. Their order must be fixed: otherwise finished rows in `rows_path` are not found.
        config ([`ComplexityConfig`], *optional*): How to measure.
        max_train_images, max_eval_images (`int`): Use only this many of the first images; shuffle data sorted by class.
        feature_extractor, rows_path, device, disable_progress: As in [`measure_complexity`].

    Returns:
        [`ComplexityResult`]

    Raises:
        ValueError: For loaders without images and whatever [`measure_complexity`] refuses.
        TypeError: For a model that is no autoencoder of these kinds.
    """
    encoded = [
        encode(vae, loader, limit, name, device, disable_progress)
        for loader, limit, name in (
            (loader_train, max_train_images, "loader_train"),
            (loader_eval, max_eval_images, "loader_eval"),
        )
    ]
    (latents_train, pixel_values_train, decoded_train), (latents_eval, pixel_values_eval, decoded_eval) = encoded
    return measure_complexity(
        latents_train,
        pixel_values_train,
        latents_eval,
        pixel_values_eval,
        config,
        reconstruction_train=decoded_train,
        reconstruction_eval=decoded_eval,
        feature_extractor=feature_extractor,
        rows_path=rows_path,
        device=device,
        disable_progress=disable_progress,
    )


@torch.enable_grad()
def measure_complexity(
    latents_train: torch.Tensor,
    pixel_values_train: torch.Tensor,
    latents_eval: torch.Tensor,
    pixel_values_eval: torch.Tensor,
    config: ComplexityConfig | None = None,
    *,
    reconstruction_train: torch.Tensor | None = None,
    reconstruction_eval: torch.Tensor | None = None,
    feature_extractor: Callable[[torch.Tensor], torch.Tensor] | None = None,
    rows_path: str | Path | None = None,
    device: torch.device | str = "cpu",
    disable_progress: bool = False,
) -> ComplexityResult:
    r"""
    Measures the complexity distance of latents to images; the module's docstring explains it.

    **Generators.** The latent channels are centred and whitened with the statistics of the training part. A generator
    is `pixel_shuffle(linear(z) + nonlinear(z))`: a 3x3 convolution, plus two hidden 3x3 convolutions of the given width
    with SiLU and a 1x1 convolution, all on the grid of the latents. Its first layers are linear in the latent channels,
    so an invertible linear map of these does not change the class of generators. Because of the whitening, it does not
    change the start either. Every class contains the narrower ones.

    **Paired.** The linear part starts at the least-squares solution, the rest at 0; then Adam on the squared error. For
    width 0 the result is exact and the same for every seed.

    **Unpaired.** The linear part starts as a random mixture of the channels, spread evenly over the pixels that belong
    to a latent. Generator and critic take turns on independently drawn batches of latents and images; the critic is
    held to slope 1 by a one-sided penalty. Then the mean of the generators (EMA) is judged by a fresh critic `f`, trained
    on training images: `(mean f(x) - mean f(g(z))) / max(1, slope)` over the held-out part, where `slope` is the 95 %
    quantile of the length of `f`'s gradient between held-out images and generated ones. This is an estimate of a lower
    bound on the Wasserstein distance of that `g`, found by a small critic in few steps. The distance of that `g` is an
    upper bound on the minimum over all generators, which a GAN need not find: it may draw negatives of the images, for
    example. Look at the spread over seeds and at `_min`, and ignore differences that are not well above the spread.

    The caller's random state is neither used nor changed. The same inputs give the same rows on the same machine.

    Args:
        latents_train, latents_eval (`torch.Tensor` of shape `(N, C, h, w)`): Latents of the images that generators are
            trained on, and of held-out images. Their scale does not matter.
        pixel_values_train, pixel_values_eval (`torch.Tensor` of shape `(N, channels, H, W)`): The images in the same
            order, in [-1, 1]; `H = factor * h`, `W = factor * w` with a whole factor.
        config ([`ComplexityConfig`], *optional*): How to measure.
        reconstruction_train, reconstruction_eval (`torch.Tensor` of the images' shapes, *optional*): The reconstructions by the
            autoencoder's own decoder, measured as the capacity `None`.
        feature_extractor (`Callable`, *optional*): Images `(B, channels, H, W)` in [-1, 1] to features `(B, D)`, for
            `frechet_distance`.
        rows_path (`str` or `Path`, *optional*): A JSON-lines file. Every finished row is appended to it at once. Rows that
            it already holds for these inputs are not computed again.
        device (`torch.device`, *optional*): Where to train.
        disable_progress (`bool`, *optional*): Whether to hide the progress bar.

    Returns:
        [`ComplexityResult`]

    Raises:
        ValueError: For tensors that do not fit each other, are not finite, constant or out of range, and for a
            damaged `rows_path`.
        FloatingPointError: If training diverges.
    """
    config = config or ComplexityConfig()
    _check_images("train", latents_train, pixel_values_train, reconstruction_train)
    _check_images("eval", latents_eval, pixel_values_eval, reconstruction_eval)
    _check_factor(latents_train, pixel_values_train)
    if latents_train.shape[1:] != latents_eval.shape[1:] or pixel_values_train.shape[1:] != pixel_values_eval.shape[1:]:
        raise ValueError(
            f"the training part has latents {tuple(latents_train.shape[1:])} and images "
            f"{tuple(pixel_values_train.shape[1:])}, the held-out part {tuple(latents_eval.shape[1:])} and "
            f"{tuple(pixel_values_eval.shape[1:])}: they must be the same."
        )
    if (reconstruction_train is None) != (reconstruction_eval is None):
        raise ValueError("give both of `reconstruction_train` and `reconstruction_eval`, or neither.")
    if reconstruction_train is not None:
        reconstruction_train = reconstruction_train.detach().cpu().float()
        reconstruction_eval = reconstruction_eval.detach().cpu().float()

    task = ComplexityTask(
        latents_train.detach().cpu(),
        pixel_values_train.detach().cpu().float(),
        latents_eval.detach().cpu(),
        pixel_values_eval.detach().cpu().float(),
        config,
        feature_extractor,
        torch.device(device),
    )
    rows_path = None if rows_path is None else Path(rows_path)
    finished = {} if rows_path is None else read_rows(rows_path)
    keys = {}
    if rows_path is not None:
        key = _key(config, latents_train, pixel_values_train, latents_eval, pixel_values_eval, task.features)
        keys = dict.fromkeys(config.capacities, key)
        if reconstruction_train is not None:
            keys[None] = fingerprint([key, *_described(reconstruction_train), *_described(reconstruction_eval)])

    capacities = [*config.capacities, *([] if reconstruction_train is None else [None])]
    plan = [(form, capacity, seed) for form in config.forms for capacity in capacities for seed in config.seeds]
    rows = {entry: finished[(keys[entry[1]], *entry)] for entry in plan if (keys.get(entry[1]), *entry) in finished}
    missing = [entry for entry in plan if entry not in rows]
    with tqdm(total=len(missing), desc="Complexity distance", unit="row", disable=disable_progress) as progress:
        for form, capacity, seed in missing:
            name = "decoder" if capacity is None else f"width {capacity}"
            progress.set_postfix_str(f"{form}, {name}, seed {seed}")
            start = time.perf_counter()
            if capacity is None:
                num_parameters = None
                values = task.measure(form, reconstruction_train, reconstruction_eval, seed)
            else:
                generator = task.train(form, capacity, seed)
                num_parameters = sum(parameter.numel() for parameter in generator.parameters())
                values = task.measure(
                    form, task.generate(generator, task.latents_train) if form == "unpaired" else None,
                    task.generate(generator, task.latents_eval), seed,
                )  # fmt: skip
            row = ComplexityRow(form, capacity, seed, num_parameters, time.perf_counter() - start, values)
            rows[form, capacity, seed] = row
            if rows_path is not None:
                append_row(rows_path, keys[capacity], row)
            progress.update()
    return ComplexityResult(
        config=config,
        rows=tuple(rows[entry] for entry in plan),
        data_variance=task.data_variance,
        num_train_images=len(latents_train),
        num_eval_images=len(latents_eval),
        latent_shape=tuple(latents_train.shape[1:]),
        image_shape=tuple(pixel_values_train.shape[1:]),
    )


def encode(
    vae: ModelMixin,
    loader: Iterable[dict[str, torch.Tensor]],
    limit: int,
    name: str,
    device: torch.device | str,
    disable_progress: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    r"""Latents, images and reconstructions of the first `limit` images of a loader, whose name errors tell, on the CPU."""
    parts, count = [], 0
    with torch.no_grad():
        for batch in tqdm(loader, desc=f"Encoding {name}", disable=disable_progress, leave=False):
            pixel_values = batch["pixel_values"][: limit - count]
            encoded = vae.encode(pad_batch(pixel_values.to(device, vae.dtype)))
            if hasattr(encoded, "latent_dist"):
                latents = encoded.latent_dist.mean
            elif hasattr(encoded, "latents") and hasattr(vae, "quantize"):
                latents = vae.quantize(encoded.latents)[0]
            else:
                raise TypeError(
                    f"{type(vae).__name__} gives neither a posterior nor latents to quantise. Use an `AutoencoderKL` "
                    "or `VQModel`, or call `measure_complexity` with latents of your own."
                )
            reconstructions = vae.decode(latents).sample.float().cpu()
            size = len(pixel_values)
            parts.append((latents[:size].float().cpu(), pixel_values.float().cpu(), reconstructions[:size]))
            count += size
            if count >= limit:
                break
    if count == 0:
        raise ValueError(f"`{name}` gave no images. If it is a loader that was already used up, create it again.")
    latents, pixel_values, reconstructions = zip(*parts, strict=True)
    return torch.cat(latents), torch.cat(pixel_values), torch.cat(reconstructions)


def _check_images(part: str, latents: torch.Tensor, pixel_values: torch.Tensor, reconstruction: torch.Tensor | None):
    named = {f"latents_{part}": latents, f"pixel_values_{part}": pixel_values}
    if reconstruction is not None:
        named[f"reconstruction_{part}"] = reconstruction
    for name, tensor in named.items():
        if tensor.ndim != 4 or not tensor.is_floating_point():
            raise ValueError(
                f"`{name}` is {tensor.dtype} of the shape {tuple(tensor.shape)}, but must be floats of the shape "
                "(images, channels, height, width)."
            )
        if not torch.isfinite(tensor).all():
            raise ValueError(f"`{name}` holds NaN or infinite values.")
    if len(latents) != len(pixel_values) or len(latents) < 2:
        raise ValueError(
            f"`latents_{part}` has {len(latents)} rows and `pixel_values_{part}` {len(pixel_values)}: both must have "
            "the same number, at least 2."
        )
    if pixel_values.abs().max() > 1.001:
        raise ValueError(
            f"`pixel_values_{part}` lies in [{pixel_values.min():.3g}, {pixel_values.max():.3g}], but must lie in "
            "[-1, 1]. Scale it first."
        )
    if reconstruction is not None and reconstruction.shape != pixel_values.shape:
        raise ValueError(
            f"`reconstruction_{part}` has the shape {tuple(reconstruction.shape)}, its images have "
            f"{tuple(pixel_values.shape)}."
        )


def _check_factor(latents: torch.Tensor, pixel_values: torch.Tensor) -> None:
    (height, width), (image_height, image_width) = latents.shape[2:], pixel_values.shape[2:]
    if image_height % height or image_width % width or image_height // height != image_width // width:
        raise ValueError(
            f"images are {image_height}x{image_width} and latents {height}x{width}: images must be larger by the same "
            "whole factor in both directions. Crop or pad the images before encoding."
        )


def _described(tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    """The dtype, shape and values of a tensor, for a fingerprint."""
    return f"{tensor.dtype} {tuple(tensor.shape)}", tensor


def _key(config: ComplexityConfig, *tensors: torch.Tensor | None) -> str:
    """A key for everything that a row depends on, except its form, capacity and seed."""
    budget = {
        field.name: getattr(config, field.name)
        for field in fields(config)
        if field.name not in ("forms", "capacities", "seeds")
    }
    given = [None if tensor is None else fingerprint(_described(tensor)) for tensor in tensors]
    return fingerprint_of_json([_VERSION, budget, given])
