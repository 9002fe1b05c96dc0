r"""
The complexity distance of a latent space: how far a small generator stays from the images, given the latents.

`D(P_z, P_x) = min over g of limited capacity of d(g(P_z), P_x)`: small if little needs to be added to the latents to get
images. The idea is that of DAE, https://huggingface.co/papers/2307.08283. Its own formula was not at hand: the exact
form measured here, both divergences `d`, the generators and their budget, is ours, and so are the numbers.

Two forms, each over a ladder of generators, from a linear one on, over seeds:

- `paired`: `d` is the squared error of `g(E(x))` against `x`. The linear generator is solved exactly; a wider one starts
  there. This mostly repeats the reconstruction error: what the encoder threw away, no generator brings back. Compare it
  with what the autoencoder's own decoder leaves (the rows of capacity `None`). If that decoder is the conditional mean of
  the images, the difference is `mean((g(z) - decoder(z))^2)`: what the capacity costs, without what the encoder lost.
- `unpaired`: `d` is the 1-Wasserstein distance between the two distributions, under the root-mean-square distance of
  images, trained as a GAN: `g` sees latents, a small critic sees images, and nobody sees which belong together. After
  that a *fresh* critic is trained with `g` fixed, and what it tells apart on held-out images is reported.

Why this estimator: a Jensen-Shannon bound was tried first. On 32x32 images of a small autoencoder the discriminator
separates nearly every pair of distributions perfectly, so that the bound sits at log 2 and orders nothing. The Wasserstein
distance is graded however far the distributions are apart, has the unit of the paired form's root (and for the same `g`
never exceeds it), and is 0 for the images themselves.
"""

import copy
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from matplotlib.figure import Figure
from torch import nn
from tqdm.auto import tqdm

from dae_diffusers.metrics.distances import frechet_distance
from dae_diffusers.metrics.statistics import FeatureStatistics, pad_batch
from dae_diffusers.randomness import derived_seed
from dae_diffusers.store import fingerprint, fingerprint_of_json, keep_row, kept_rows

ComplexityForm = Literal["paired", "unpaired"]

# What each form is ranked by, as a share of the data's variance and of its root.
HEADLINES = {"paired": "variance_left", "unpaired": "std_left"}

# Part of every row's key. Raise it when the same inputs give other numbers.
_VERSION = 1

# Hidden layers of generators wider than this learn more slowly, in proportion: Adam moves every weight equally far,
# and the output by the sum over the width.
_BASE_WIDTH = 16

# Weight of the past in the average of a GAN's generators, which is what is measured.
_EMA_DECAY = 0.98

# Principal components of the latent channels with less of the largest variance than this are rounding.
_MIN_VARIANCE = 1e-10

# Images that one pass without gradients takes.
_CHUNK = 256
# What the distance is measured with at most; more changes it little.
MAX_TRAIN_IMAGES, MAX_EVAL_IMAGES = 8192, 2048


@dataclass(frozen=True)
class ComplexityConfig:
    r"""
    How the distance is measured. Numbers are comparable only if all of this but `forms` and `seeds` is the same, and so
    are the images.

    Attributes:
        forms (`tuple[str, ...]`): Of `paired` and `unpaired`.
        capacities (`tuple[int, ...]`): Widths of the generators' hidden layers; 0 is the linear generator.
        seeds (`tuple[int, ...]`): One generator of each width for each; a seed decides initial weights and batches.
        batch_size (`int`): Images in a batch.
        paired_steps (`int`): Steps of a generator in the paired form. The linear one needs none.
        paired_learning_rate (`float`): Adam's at the start; constant for half of the steps, then linear to 0.
        unpaired_steps (`int`): Steps of a generator in the unpaired form.
        critic_steps (`int`): Steps of the critic for each of them.
        unpaired_learning_rate (`float`): Of generator and critic, on the same schedule.
        critic_width (`int`): Channels of the critic's first layer; later ones have up to four times as many.
        gradient_penalty (`float`): Weight of the penalty on the critic's slope.
        evaluation_steps (`int`): Steps of the fresh critic that judges the generator.
    """

    forms: tuple[ComplexityForm, ...] = ("paired", "unpaired")
    capacities: tuple[int, ...] = (0, 4, 16, 64)
    seeds: tuple[int, ...] = (0, 1, 2)
    batch_size: int = 64
    paired_steps: int = 400
    paired_learning_rate: float = 5e-3
    unpaired_steps: int = 150
    critic_steps: int = 3
    unpaired_learning_rate: float = 2e-3
    critic_width: int = 16
    gradient_penalty: float = 1.0
    evaluation_steps: int = 200

    def __post_init__(self):
        for name in ("forms", "capacities", "seeds"):
            values = getattr(self, name)
            if not isinstance(values, tuple) or not values or len(set(values)) != len(values):
                raise ValueError(f"`{name}` is {values!r}, but must be a tuple of one or more different values.")
        for form in self.forms:
            if form not in HEADLINES:
                raise ValueError(f"`forms` holds {form!r}; known are {sorted(HEADLINES)}.")
        for name in ("capacities", "seeds"):
            for value in getattr(self, name):
                if not isinstance(value, int) or value < 0:
                    raise ValueError(f"`{name}` holds {value!r}, but every one must be an integer of at least 0.")
        for name in (
            "batch_size", "paired_steps", "unpaired_steps", "critic_steps", "critic_width", "evaluation_steps"
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}, but must be at least 1.")
        for name in ("paired_learning_rate", "unpaired_learning_rate", "gradient_penalty"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` is {getattr(self, name)}, but must be above 0.")


@dataclass(frozen=True)
class ComplexityRow:
    r"""
    One generator, trained and measured on the held-out images.

    Attributes:
        form (`str`): `paired` or `unpaired`.
        capacity (`int` or `None`): Width of the generator; `None` is the autoencoder's own decoder, trained by others
            and only measured here.
        seed (`int`): The generator's and the critic's.
        num_parameters (`int` or `None`): Of the generator; None for the autoencoder's decoder.
        seconds (`float`): Wall time of training and measuring.
        values (`dict[str, float]`): For `paired`: `mse`, the mean squared error of a pixel's value, images in [-1, 1];
            `variance_left`, the same divided by the data's variance: 1 for a latent without information. For
            `unpaired`: `wasserstein`, the estimated distance in the unit of `sqrt(mse)`, which may come out slightly
            below 0 if there is nothing to find; `std_left`, the same divided by the root of the data's variance. For
            both, with a feature extractor: `frechet_distance` between the features of the generator's images and of
            the held-out ones.
    """

    form: ComplexityForm
    capacity: int | None
    seed: int
    num_parameters: int | None
    seconds: float
    values: dict[str, float]


@dataclass(frozen=True)
class ComplexityResult:
    r"""
    All rows of a measurement.

    Attributes:
        config ([`ComplexityConfig`]): How it was measured.
        rows (`tuple[ComplexityRow, ...]`): In the order form, capacity (the decoder last), seed.
        data_variance (`float`): Mean squared distance of a held-out pixel's value from the mean of its channel.
        num_train_images, num_eval_images (`int`): Images trained on and held out.
        latent_shape, image_shape (`tuple[int, int, int]`): Channels, height and width.
    """

    config: ComplexityConfig
    rows: tuple[ComplexityRow, ...]
    data_variance: float
    num_train_images: int
    num_eval_images: int
    latent_shape: tuple[int, int, int]
    image_shape: tuple[int, int, int]

    @property
    def summary(self) -> list[dict[str, Any]]:
        r"""
        Statistics over the seeds, a dictionary for each form and capacity.

        For every value of the rows: its mean under its name, `<name>_std` (of a sample; None with one seed) and
        `<name>_min` (a minimum over generators is sought, so that the best seed is the tightest bound). With the
        decoder's rows, for every capacity: `<name>_ratio` and `<name>_difference` of the mean and the decoder's.
        """
        summary = []
        for form in self.config.forms:
            of_form = [row for row in self.rows if row.form == form]
            means = {}
            for capacity in dict.fromkeys(row.capacity for row in of_form):
                rows = [row for row in of_form if row.capacity == capacity]
                entry = {"form": form, "capacity": capacity, "num_parameters": rows[0].num_parameters}
                entry["num_seeds"] = len(rows)
                for name in rows[0].values:
                    values = torch.tensor([row.values[name] for row in rows], dtype=torch.float64)
                    entry[name] = values.mean().item()
                    entry[f"{name}_std"] = values.std().item() if len(rows) > 1 else None
                    entry[f"{name}_min"] = values.min().item()
                means[capacity] = {name: entry[name] for name in rows[0].values}
                summary.append(entry)
            for entry in summary:
                if entry["form"] == form and entry["capacity"] is not None and None in means:
                    for name, reference in means[None].items():
                        entry[f"{name}_ratio"] = entry[name] / reference if reference > 0 else None
                        entry[f"{name}_difference"] = entry[name] - reference
        return summary

    def to_dict(self) -> dict[str, Any]:
        r"""Everything, the summary included, in types that JSON knows."""
        return {**asdict(self), "summary": self.summary}


def complexity_distance(
    vae: ModelMixin,
    loader_train: Iterable[dict[str, torch.Tensor]],
    loader_eval: Iterable[dict[str, torch.Tensor]],
    config: ComplexityConfig | None = None,
    *,
    max_train_images: int = MAX_TRAIN_IMAGES,
    max_eval_images: int = MAX_EVAL_IMAGES,
    compare_decoder: bool = True,
    feature_extractor: Callable[[torch.Tensor], torch.Tensor] | None = None,
    rows_path: str | Path | None = None,
    device: torch.device | str = "cpu",
    disable_progress: bool = False,
) -> ComplexityResult:
    r"""
    Measures the complexity distance of an autoencoder's latents: encodes the images (posterior mean, or quantised
    latents) and calls [`measure_complexity`].

    The posterior mean is taken as it is. What an encoder writes into channels that are far weaker than its posterior's
    noise counts here as information, although a denoiser would not see it.

    Args:
        vae ([`~diffusers.AutoencoderKL`] or [`~diffusers.VQModel`]): Any, ours or not, on `device`, in eval mode.
        loader_train, loader_eval (`Iterable` of `{"pixel_values": (B, C, H, W)}`): Images in [-1, 1], as
            `make_pass_loader` gives them. In a fixed order, or nothing finished can be found in `rows_path`.
        config ([`ComplexityConfig`], *optional*): How to measure.
        max_train_images, max_eval_images (`int`): Take only so many, the first ones; data sorted by class must be shuffled.
        compare_decoder (`bool`): Whether to measure the autoencoder's own decoder beside the generators.
        feature_extractor, rows_path, device, disable_progress: As in [`measure_complexity`].

    Returns:
        [`ComplexityResult`]

    Raises:
        ValueError: For loaders without images and whatever [`measure_complexity`] refuses.
        TypeError: For a model that is no autoencoder of these kinds.
    """
    encoded = [
        _encode(vae, loader, limit, name, compare_decoder, device, disable_progress)
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
    Measures the complexity distance of latents to images; the module's docstring says what that is.

    **Generators.** The latent channels are centred and whitened with the statistics of the training part. A generator
    is `pixel_shuffle(linear(z) + nonlinear(z))`: a 3x3 convolution, plus two hidden 3x3 convolutions of the given width
    with SiLU and a 1x1 convolution, all on the grid of the latents. Its first layers are linear in the latent channels,
    so that an invertible linear map of these leaves the class of generators as it is; the whitening makes the start the
    same too. Every class contains the narrower ones.

    **Paired.** The linear part starts at the least-squares solution, the rest at 0; then Adam on the squared error. For
    width 0 the result is exact and the same for every seed.

    **Unpaired.** The linear part starts as a random mixture of the channels, spread evenly over the pixels that belong
    to a latent. Generator and critic take turns on independently drawn batches of latents and images; the critic is
    held to slope 1 by a one-sided penalty. Then the mean of the generators (EMA) is judged by a fresh critic `f`, trained
    on training images: `(mean f(x) - mean f(g(z))) / max(1, slope)` over the held-out part, where `slope` is the 95 %
    quantile of the length of `f`'s gradient between held-out images and generated ones. This is an estimate of a lower
    bound on the Wasserstein distance of that `g`, found by a small critic in few steps, and the distance of that `g`
    an upper bound on the minimum over all of them, which a GAN need not find: it can end with a negative, say. Look
    at the spread over seeds and at `_min`; do not read much into differences that are not well above it.

    The caller's random state is neither used nor changed; the same inputs give the same rows on the same machine.

    Args:
        latents_train, latents_eval (`torch.Tensor` of shape `(N, C, h, w)`): Latents of the images that generators are
            trained on, and of held-out ones. At any scale.
        pixel_values_train, pixel_values_eval (`torch.Tensor` of shape `(N, channels, H, W)`): The images in the same
            order, in [-1, 1]; `H = factor * h`, `W = factor * w` with a whole factor.
        config ([`ComplexityConfig`], *optional*): How to measure.
        reconstruction_train, reconstruction_eval (`torch.Tensor` of the images' shapes, *optional*): What the
            autoencoder's own decoder makes of the latents, to be measured as the capacity `None`.
        feature_extractor (`Callable`, *optional*): Images `(B, channels, H, W)` in [-1, 1] to features `(B, D)`, for
            `frechet_distance`.
        rows_path (`str` or `Path`, *optional*): A JSON-lines file. Every finished row is appended at once, and a row
            that it holds for these inputs is not computed again.
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

    task = _Task(
        latents_train.detach().cpu(),
        pixel_values_train.detach().cpu().float(),
        latents_eval.detach().cpu(),
        pixel_values_eval.detach().cpu().float(),
        config,
        feature_extractor,
        torch.device(device),
    )
    rows_path = None if rows_path is None else Path(rows_path)
    finished = {} if rows_path is None else _read_rows(rows_path)
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
                keep_row(rows_path, asdict(row), keys[capacity])
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


def plot_complexity(results: dict[str, ComplexityResult], path: str | Path, *, title: str = "Complexity distance"):
    r"""
    Draws the share left over against the capacity, a panel for each form, mean and standard deviation over seeds; the
    autoencoder's own decoder as a dashed line.

    Args:
        results (`dict[str, ComplexityResult]`): Results by the name of the latent space.
        path (`str` or `Path`): The PNG to write.
        title (`str`): Over the panels.
    """
    if not results:
        raise ValueError("`results` is empty: there is nothing to draw.")
    forms = [form for form in HEADLINES if any(form in result.config.forms for result in results.values())]
    capacities = sorted({capacity for result in results.values() for capacity in result.config.capacities})
    labels = {
        "paired": "paired: share of the variance left",
        "unpaired": "unpaired: Wasserstein distance / std of the data",
    }
    figure = Figure(figsize=(5.0 * len(forms), 3.8), layout="constrained")
    figure.suptitle(title)
    for axis, form in zip(figure.subplots(1, len(forms), squeeze=False).flat, forms, strict=True):
        value = HEADLINES[form]
        for number, (name, result) in enumerate(results.items()):
            entries = {entry["capacity"]: entry for entry in result.summary if entry["form"] == form}
            decoder = entries.pop(None, None)
            axis.errorbar(
                [capacities.index(capacity) for capacity in entries],
                [entry[value] for entry in entries.values()],
                yerr=[entry[f"{value}_std"] or 0.0 for entry in entries.values()],
                label=name, color=f"C{number}", marker="o", markersize=4, capsize=3, linewidth=1.2,
            )  # fmt: skip
            if decoder is not None:
                axis.axhline(decoder[value], color=f"C{number}", linestyle="--", linewidth=1, label=f"{name}: decoder")
        axis.set_xticks(range(len(capacities)), ["linear" if width == 0 else str(width) for width in capacities])
        axis.set_ylim(bottom=min(0.0, axis.get_ylim()[0]))
        axis.set_title(labels[form], fontsize=10)
        axis.set_xlabel("width of the generator", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=110)


class _Generator(nn.Module):
    """Whitened latents `(B, k, h, w)` to standardised images `(B, channels, factor * h, factor * w)`."""

    def __init__(self, latent_channels: int, channels: int, factor: int, width: int):
        super().__init__()
        self.factor = factor
        self.linear = nn.Conv2d(latent_channels, channels * factor**2, 3, padding=1)
        self.hidden = nn.ModuleList()
        self.last = None
        if width > 0:
            self.hidden.append(nn.Conv2d(latent_channels, width, 3, padding=1))
            self.hidden.append(nn.Conv2d(width, width, 3, padding=1))
            self.last = nn.Conv2d(width, channels * factor**2, 1)
            nn.init.zeros_(self.last.weight)
            nn.init.zeros_(self.last.bias)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        image = self.linear(latents)
        if self.last is not None:
            hidden = F.silu(self.hidden[0](latents))
            hidden = hidden + F.silu(self.hidden[1](hidden))
            image = image + self.last(hidden)
        return F.pixel_shuffle(image, self.factor)

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        groups = [{"params": self.linear.parameters(), "lr": learning_rate}]
        if self.last is not None:
            groups.append({"params": self.hidden[0].parameters(), "lr": learning_rate})
            wide = [*self.hidden[1].parameters(), *self.last.parameters()]
            groups.append({"params": wide, "lr": learning_rate * min(1.0, _BASE_WIDTH / self.last.in_channels)})
        return groups

    @torch.no_grad()
    def mix_channels_(self, draws: torch.Generator) -> None:
        """Every pixel of a latent's patch gets the same random mixture of that latent's channels."""
        weight = self.linear.weight  # (channels * factor^2, k, 3, 3)
        patch = self.factor**2
        mixture = torch.randn(len(weight) // patch, weight.shape[1], generator=draws)
        nn.init.zeros_(weight)
        nn.init.zeros_(self.linear.bias)
        weight[:, :, 1, 1] = (0.3 / math.sqrt(weight.shape[1]) * mixture).repeat_interleave(patch, dim=0)


class _Critic(nn.Module):
    """Images `(B, channels, H, W)` to one number each: strided convolutions down to 4x4, then two layers."""

    def __init__(self, channels: int, height: int, width: int, num_channels: int):
        super().__init__()
        layers, in_channels, out_channels = [], channels, num_channels
        while min(height, width) > 4:
            layers += [nn.Conv2d(in_channels, out_channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
            in_channels, out_channels = out_channels, min(2 * out_channels, 4 * num_channels)
            height, width = height // 2, width // 2
        layers += [nn.Flatten(), nn.Linear(in_channels * height * width, 4 * num_channels), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Linear(4 * num_channels, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images).flatten()

    def slope(self, images: torch.Tensor, *, create_graph: bool) -> torch.Tensor:
        """Length of the gradient, `(B,)`, for distances that are root mean squares over an image's values."""
        images = images.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(self(images).sum(), images, create_graph=create_graph)
        # The small constant: the root has no finite derivative at a critic that is constant.
        return (gradient.square().sum(dim=(1, 2, 3)) * images[0].numel() + 1e-12).sqrt()


class _Task:
    """One set of latents and images, whitened and standardised, and what is trained and measured on it."""

    def __init__(
        self,
        latents_train: torch.Tensor,
        pixel_values_train: torch.Tensor,
        latents_eval: torch.Tensor,
        pixel_values_eval: torch.Tensor,
        config: ComplexityConfig,
        feature_extractor: Callable[[torch.Tensor], torch.Tensor] | None,
        device: torch.device,
    ):
        self.config = config
        self.feature_extractor = feature_extractor
        self.device = device
        self.pixel_values_eval = pixel_values_eval
        self.mean = pixel_values_train.mean(dim=(0, 2, 3), keepdim=True)
        self.data_variance = (pixel_values_eval - self.mean).double().square().mean().item()
        self.scale = (pixel_values_train - self.mean).double().square().mean().sqrt().item()
        if self.scale < 1e-6 or self.data_variance < 1e-12:
            raise ValueError("the images are constant: there is no variance of which something could be left.")
        self.targets_train = (pixel_values_train - self.mean) / self.scale
        self.targets_eval = (pixel_values_eval - self.mean) / self.scale
        self.latents_train, self.latents_eval = _whiten(latents_train, latents_eval)
        self.factor = pixel_values_train.shape[-1] // latents_train.shape[-1]

    @cached_property
    def features(self) -> torch.Tensor | None:
        """Of the held-out images."""
        return None if self.feature_extractor is None else self._extract(self.pixel_values_eval)

    @cached_property
    def least_squares(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and bias of the linear generator with the smallest squared error over the training part."""
        gram = moment = 0.0
        chunk = max(1, _CHUNK * 1024 // self.latents_train[0, 0].numel())
        for latents, targets in zip(self.latents_train.split(chunk), self.targets_train.split(chunk), strict=True):
            patches = F.unfold(latents, 3, padding=1).transpose(0, 1).flatten(1)  # (9 k, B h w)
            patches = torch.cat([patches, torch.ones_like(patches[:1])]).double()
            pixels = F.pixel_unshuffle(targets, self.factor).transpose(0, 1).flatten(1).double()
            gram = gram + patches @ patches.T
            moment = moment + patches @ pixels.T
        solution = torch.linalg.pinv(gram, rtol=1e-12, hermitian=True) @ moment  # (9 k + 1, channels * factor^2)
        weight = solution[:-1].T.unflatten(1, (-1, 3, 3))
        return weight.float(), solution[-1].float()

    def train(self, form: ComplexityForm, width: int, seed: int) -> _Generator:
        generator = _seeded(
            derived_seed(seed, 0),
            lambda: _Generator(self.latents_train.shape[1], self.targets_train.shape[1], self.factor, width),
        )
        draws = torch.Generator().manual_seed(derived_seed(seed, 1))
        if form == "paired":
            return self._train_paired(generator, draws)
        return self._train_unpaired(generator, draws, seed)

    def _train_paired(self, generator: _Generator, draws: torch.Generator) -> _Generator:
        weight, bias = self.least_squares
        generator.linear.weight.data.copy_(weight)
        generator.linear.bias.data.copy_(bias)
        generator.to(self.device)
        if generator.last is None:
            return generator
        steps = self.config.paired_steps
        optimizer = torch.optim.Adam(generator.parameter_groups(self.config.paired_learning_rate))
        scheduler = _schedule(optimizer, steps)
        for step in range(steps):
            batch = torch.randint(len(self.latents_train), (self.config.batch_size,), generator=draws)
            latents, targets = self.latents_train[batch].to(self.device), self.targets_train[batch].to(self.device)
            loss = (generator(latents) - targets).square().mean()
            _raise_if_not_finite(loss, "paired", step)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
        return generator

    def _train_unpaired(self, generator: _Generator, draws: torch.Generator, seed: int) -> _Generator:
        config = self.config
        generator.mix_channels_(draws)
        generator.to(self.device)
        average = copy.deepcopy(generator).requires_grad_(False)
        critic = self._new_critic(derived_seed(seed, 2))
        steps = config.unpaired_steps
        generator_optimizer = torch.optim.Adam(
            generator.parameter_groups(config.unpaired_learning_rate), betas=(0.0, 0.99)
        )
        critic_optimizer = torch.optim.Adam(critic.parameters(), lr=config.unpaired_learning_rate, betas=(0.0, 0.99))
        schedulers = _schedule(generator_optimizer, steps), _schedule(critic_optimizer, steps)
        for step in range(steps):
            for _ in range(config.critic_steps):
                with torch.no_grad():
                    generated = generator(self._draw(self.latents_train, draws))
                self._step_critic(
                    critic, critic_optimizer, self._draw(self.targets_train, draws), generated, draws, step
                )
            critic.requires_grad_(False)
            loss = -critic(generator(self._draw(self.latents_train, draws))).mean()
            _raise_if_not_finite(loss, "unpaired", step)
            generator_optimizer.zero_grad()
            loss.backward()
            generator_optimizer.step()
            critic.requires_grad_(True)
            for scheduler in schedulers:
                scheduler.step()
            decay = min(_EMA_DECAY, (step + 1) / (step + 10))
            for mean, parameter in zip(average.parameters(), generator.parameters(), strict=True):
                mean.lerp_(parameter.detach(), 1 - decay)
        return average

    def measure(
        self, form: ComplexityForm, images_train: torch.Tensor | None, images_eval: torch.Tensor, seed: int
    ) -> dict[str, float]:
        """What is left between images in [-1, 1] and the data; `images_train` only for the unpaired form."""
        if form == "paired":
            mse = (images_eval - self.pixel_values_eval).double().square().mean().item()
            values = {"mse": mse, "variance_left": mse / self.data_variance}
        else:
            distance = self._wasserstein(images_train, images_eval, seed) * self.scale
            values = {"wasserstein": distance, "std_left": distance / math.sqrt(self.data_variance)}
        if self.features is not None:
            values["frechet_distance"] = frechet_distance(
                *(FeatureStatistics.of(features) for features in (self._extract(images_eval), self.features))
            )
        for name, value in values.items():
            if not math.isfinite(value):
                raise FloatingPointError(f"`{name}` of the {form} form is {value}. Lower the learning rate.")
        return values

    def _wasserstein(self, images_train: torch.Tensor, images_eval: torch.Tensor, seed: int) -> float:
        """A fresh critic's held-out estimate, in standard deviations of the data."""
        config = self.config
        generated_train, generated_eval = [(images - self.mean) / self.scale for images in (images_train, images_eval)]
        draws = torch.Generator().manual_seed(derived_seed(seed, 4))
        critic = self._new_critic(derived_seed(seed, 3))
        optimizer = torch.optim.Adam(critic.parameters(), lr=config.unpaired_learning_rate, betas=(0.5, 0.99))
        scheduler = _schedule(optimizer, config.evaluation_steps)
        for step in range(config.evaluation_steps):
            real, generated = self._draw(self.targets_train, draws), self._draw(generated_train, draws)
            self._step_critic(critic, optimizer, real, generated, draws, step)
            scheduler.step()
        # Paired images lie close to each other; the penalty was on the way between any two.
        order = torch.randperm(len(generated_eval), generator=draws)
        differences, slopes = [], []
        for part in range(0, len(generated_eval), _CHUNK):
            real = self.targets_eval[part : part + _CHUNK].to(self.device)
            generated = generated_eval[order[part : part + _CHUNK]].to(self.device)
            with torch.no_grad():
                differences.append((critic(real) - critic(generated)).double().cpu())
            slopes.append(critic.slope(_between(real, generated, draws), create_graph=False).double().cpu())
        return (torch.cat(differences).mean() / torch.cat(slopes).quantile(0.95).clamp(min=1)).item()

    def _step_critic(self, critic, optimizer, real, generated, draws: torch.Generator, step: int) -> None:
        some = max(1, len(real) // 4)  # the penalty costs three times as much as the rest
        slope = critic.slope(_between(real[:some], generated[:some], draws), create_graph=True)
        penalty = (slope - 1).clamp(min=0).square().mean()
        loss = critic(generated).mean() - critic(real).mean() + self.config.gradient_penalty * penalty
        _raise_if_not_finite(loss, "unpaired", step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def _new_critic(self, seed: int) -> _Critic:
        shape = self.targets_train.shape[1:]
        return _seeded(seed, lambda: _Critic(*shape, self.config.critic_width)).to(self.device)

    def _draw(self, tensor: torch.Tensor, draws: torch.Generator) -> torch.Tensor:
        return tensor[torch.randint(len(tensor), (self.config.batch_size,), generator=draws)].to(self.device)

    @torch.no_grad()
    def generate(self, generator: _Generator, latents: torch.Tensor) -> torch.Tensor:
        """Images in [-1, 1] (not clamped), on the CPU."""
        parts = [generator(part.to(self.device)).cpu() for part in latents.split(_CHUNK)]
        return torch.cat(parts) * self.scale + self.mean

    @torch.no_grad()
    def _extract(self, images: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.feature_extractor(part.clamp(-1, 1)).cpu() for part in images.split(_CHUNK)])


def _encode(vae, loader, limit: int, name: str, decode: bool, device, disable_progress: bool):
    """Latents, images and, if wanted, reconstructions of the first `limit` images, on the CPU."""
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
            reconstructions = vae.decode(latents).sample.float().cpu() if decode else latents
            size = len(pixel_values)
            parts.append((latents[:size].float().cpu(), pixel_values.float().cpu(), reconstructions[:size]))
            count += size
            if count >= limit:
                break
    if count == 0:
        raise ValueError(f"`{name}` gave no images. A loader that was used up must be made anew.")
    latents, pixel_values, reconstructions = zip(*parts, strict=True)
    return torch.cat(latents), torch.cat(pixel_values), torch.cat(reconstructions) if decode else None


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


def _whiten(latents_train: torch.Tensor, latents_eval: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Principal components of the latent channels, each with mean 0 and variance 1 over the training part."""
    flat = latents_train.double().transpose(0, 1).flatten(1)  # (C, N h w)
    mean = flat.mean(dim=1, keepdim=True)
    flat = flat - mean
    variances, directions = torch.linalg.eigh(flat @ flat.T / flat.shape[1])
    keep = variances > max(_MIN_VARIANCE * variances[-1].item(), 1e-24 + 1e-14 * mean.square().max().item())
    if not keep.any():
        raise ValueError("`latents_train` is constant: the encoder has collapsed and there is nothing to measure.")
    matrix = (directions[:, keep] / variances[keep].sqrt()).T
    mean = mean[None, ..., None]

    def apply(latents: torch.Tensor) -> torch.Tensor:
        parts = [torch.einsum("kc,nchw->nkhw", matrix, part.double() - mean).float() for part in latents.split(_CHUNK)]
        return torch.cat(parts)

    return apply(latents_train), apply(latents_eval)


def _between(real: torch.Tensor, generated: torch.Tensor, draws: torch.Generator) -> torch.Tensor:
    share = torch.rand(len(real), 1, 1, 1, generator=draws).to(real.device)
    return share * real + (1 - share) * generated


def _schedule(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 2 * (1 - step / steps)))


def _seeded(seed: int, build: Callable[[], nn.Module]) -> nn.Module:
    """Builds a module on the CPU with initial weights of its own seed; the caller's random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach the accelerators too
        return build()


def _raise_if_not_finite(loss: torch.Tensor, form: ComplexityForm, step: int) -> None:
    if not torch.isfinite(loss):
        raise FloatingPointError(
            f"the loss of the {form} form became {loss.item()} at step {step}. Lower `{form}_learning_rate`."
        )


def _described(tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    """For a fingerprint."""
    return f"{tensor.dtype} {tuple(tensor.shape)}", tensor


def _key(config: ComplexityConfig, *tensors: torch.Tensor | None) -> str:
    """Names everything that a row depends on, beside its form, capacity and seed."""
    budget = {
        field.name: getattr(config, field.name)
        for field in fields(config)
        if field.name not in ("forms", "capacities", "seeds")
    }
    given = [None if tensor is None else fingerprint(_described(tensor)) for tensor in tensors]
    return fingerprint_of_json([_VERSION, budget, given])


def _read_rows(path: Path) -> dict[tuple, ComplexityRow]:
    rows = {}
    for key, values in kept_rows(path):
        row = ComplexityRow(**values)
        rows[key, row.form, row.capacity, row.seed] = row
    return rows
