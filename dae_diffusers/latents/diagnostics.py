"""Diagnostics of a latent space: numbers that describe how hard it may be to model."""

import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dae_diffusers.store import finite_or_none

# Up to this many latent elements (134 MB of float64) the covariance is over whole latents, above it over channels.
MAX_COVARIANCE_DIM = 4096

# A channel is dead if no more than this share of its variance comes from the image, the rest being posterior noise.
DEAD_CHANNEL_SHARE = 0.01

# Cycles per latent pixel above which a frequency is high: half of what the grid can hold along an axis.
HIGH_FREQUENCY = 0.25


@dataclass
class LatentDiagnostics:
    r"""
    Running sums over posteriors `q(z|x) = N(mean, std^2)` of raw latents. The sum of two instances describes both sets.

    "Latents" are draws from the posteriors, in expectation: their variance is the variance of the posterior
    means plus the mean of `std^2`, as in [`~dae_diffusers.latents.statistics.LatentStatistics`]. "Normalised" means
    divided by that standard deviation, per channel. So nothing here depends on the unit of a channel, except `mean`,
    `std` and `kl`.

    Example:
        ```python
        diagnostics = LatentDiagnostics.empty((4, 8, 8))
        for batch in loader:
            posterior = vae.encode(batch["pixel_values"]).latent_dist
            diagnostics.add(posterior.mean, posterior.std)
        diagnostics = sum(gather_object([diagnostics]), start=LatentDiagnostics.empty((4, 8, 8)))
        print(diagnostics.summary())
        ```

    Attributes:
        shape (`tuple[int, int, int]`): `(C, h, w)` of one latent.
        num_images, num_with_std (`int`): Latents seen, and how many of them with a posterior standard deviation.
        powers (`torch.Tensor` of shape `(4, C)`): Sums of the posterior means to the powers 1 to 4.
        variance (`torch.Tensor` of shape `(C, h, w)`): Sum of `std^2`.
        kl_total (`torch.Tensor` of shape `(C,)`): Sum of the divergences from N(0, 1).
        spectrum (`torch.Tensor` of shape `(C, h, w)`): Sum of the squared moduli of the means' Fourier transforms.
        total, outer (`torch.Tensor` of shapes `(D,)` and `(D, D)`): Sums of the vectors of [`covariance_of`] and of
            their outer products.
    """

    shape: tuple[int, int, int]
    num_images: int
    num_with_std: int
    powers: torch.Tensor
    variance: torch.Tensor
    kl_total: torch.Tensor
    spectrum: torch.Tensor
    total: torch.Tensor
    outer: torch.Tensor

    @classmethod
    def empty(cls, shape: tuple[int, int, int]) -> "LatentDiagnostics":
        r"""Diagnostics of nothing."""
        channels, height, width = shape
        num_elements = channels * height * width
        dim = num_elements if num_elements <= MAX_COVARIANCE_DIM else channels

        def zeros(*size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=torch.float64)

        return cls(
            (channels, height, width), 0, 0, zeros(4, channels), zeros(*shape), zeros(channels), zeros(*shape),
            zeros(dim), zeros(dim, dim),
        )  # fmt: skip

    def add(self, mean: torch.Tensor, std: torch.Tensor | None = None) -> None:
        r"""
        Counts a batch of posteriors.

        Args:
            mean (`torch.Tensor` of shape `(B, C, h, w)`): Posterior means, or the latents of a deterministic encoder.
            std (`torch.Tensor` of the same shape, *optional*): Posterior standard deviations; 0 if absent.

        Raises:
            ValueError: For another shape, values that are not finite, and if some batches have `std` and others not.
        """
        if mean.shape[1:] != self.shape or (std is not None and std.shape != mean.shape):
            raise ValueError(
                f"`mean` has the shape {tuple(mean.shape)} and `std` {None if std is None else tuple(std.shape)}, but "
                f"both must be {('B', *self.shape)}."
            )
        if not torch.isfinite(mean).all() or (std is not None and not torch.isfinite(std).all()):
            raise ValueError("the latents hold NaN or infinite values: the autoencoder is broken.")
        mean = mean.detach().cpu().double()
        self.num_images += len(mean)
        self.powers += torch.stack([mean.pow(power).sum(dim=(0, 2, 3)) for power in (1, 2, 3, 4)])
        self.spectrum += torch.fft.fft2(mean).abs().square().sum(dim=0)
        vectors = mean.flatten(1) if self.covariance_of == "latent" else mean.movedim(1, 3).flatten(0, 2)
        self.total += vectors.sum(dim=0)
        self.outer.addmm_(vectors.T, vectors)
        if std is not None:
            variance = std.detach().cpu().double().square()
            self.num_with_std += len(mean)
            self.variance += variance.sum(dim=0)
            self.kl_total += 0.5 * (mean.square() + variance - 1 - variance.log()).sum(dim=(0, 2, 3))
        self._check_std()

    def __add__(self, other: "LatentDiagnostics") -> "LatentDiagnostics":
        if self.shape != other.shape:
            raise ValueError(f"latents of the shapes {self.shape} and {other.shape} do not add up.")
        result = LatentDiagnostics(
            self.shape,
            self.num_images + other.num_images,
            self.num_with_std + other.num_with_std,
            self.powers + other.powers,
            self.variance + other.variance,
            self.kl_total + other.kl_total,
            self.spectrum + other.spectrum,
            self.total + other.total,
            self.outer + other.outer,
        )
        result._check_std()
        return result

    @property
    def covariance_of(self) -> str:
        r"""
        The vectors whose covariance `effective_rank` and `gaussian_entropy` use: `"latent"`, whole latents of `C * h * w` elements,
        if these are at most 4096; else `"channels"`, the `C` channels at one position, which ignores neighbours.
        """
        return "latent" if len(self.total) == math.prod(self.shape) else "channels"

    @property
    def has_full_covariance(self) -> bool:
        r"""Whether more vectors were seen than they have elements; with fewer the covariance is singular."""
        return self._num_vectors > len(self.total)

    @property
    def mean(self) -> torch.Tensor:
        r"""Mean of each channel, `(C,)`, float64, raw."""
        return self.powers[0] / self._num_elements

    @property
    def std(self) -> torch.Tensor:
        r"""Standard deviation of each channel of the latents, `(C,)`, float64, raw: the config's `latents_std`."""
        return (self._variance_of_means + self._mean_variance).sqrt()

    @property
    def kl(self) -> torch.Tensor | None:
        r"""KL divergence from N(0, 1) of each channel, in nats per latent element, `(C,)`; None without `std`."""
        return self.kl_total / self._num_elements if self.num_with_std else None

    @property
    def posterior_std_ratio(self) -> torch.Tensor:
        r"""Root mean square of the posterior's std, divided by the latents' std, per channel, `(C,)`. 1 means only noise."""
        return self._mean_variance.sqrt() / self._std_or_one

    @property
    def dead_channels(self) -> torch.Tensor:
        r"""
        Channels whose posterior means hold at most 1 % of their variance, `(C,)`, bool: they hold no information about the
        image. They are the "inactive units" of Burda et al., 2015, https://huggingface.co/papers/1509.00519, relative to the
        variance.
        """
        return self._variance_of_means <= DEAD_CHANNEL_SHARE * (self._variance_of_means + self._mean_variance)

    @property
    def excess_kurtosis(self) -> torch.Tensor:
        r"""Excess kurtosis of the posterior means of each channel, `(C,)`: 0 for a Gaussian, NaN where constant."""
        first, second, third, fourth = self.powers / self._num_elements
        fourth_central = fourth - 4 * first * third + 6 * first.square() * second - 3 * first.pow(4)
        variance = self._variance_of_means
        return torch.where(variance > 0, fourth_central / variance.square() - 3, math.nan)

    @property
    def high_frequency_share(self) -> float:
        r"""
        Share of the power of the normalised posterior means at spatial frequencies above a quarter cycle per latent
        pixel.

        Power is the squared modulus of the 2-D discrete Fourier transform over `(h, w)`, summed over images and
        channels, after the mean of each channel over the data is taken away (each latent's own mean stays, as
        frequency 0). A frequency counts as high if `(fy^2 + fx^2)^(1/2) > 0.25`. White noise has about 0.8, a 1x1
        latent 0.
        """
        power, frequency = self._power()
        return (power[:, frequency > HIGH_FREQUENCY].sum() / power.sum()).item()

    @property
    def radial_spectrum(self) -> torch.Tensor:
        r"""
        Shares of that power by spatial frequency, `(K,)`, float64, summing to 1: bin `k` holds the frequencies
        `(fy^2 + fx^2)^(1/2)` that round to `k / max(h, w)` cycles per latent pixel; bin 0 is each latent's mean.
        """
        power, frequency = self._power()
        bins = (frequency * max(self.shape[1:])).round().long()
        shares = torch.zeros(int(bins.max()) + 1, dtype=torch.float64)
        return shares.index_add_(0, bins.flatten(), power.sum(dim=0).flatten() / power.sum())

    @property
    def effective_rank(self) -> float:
        r"""
        `exp(entropy of p)`, where `p` are the eigenvalues of the covariance of normalised posterior means, divided by
        their sum: the number of directions that would hold the same variance evenly. In [1, D]; see [`covariance_of`].

        Source: Roy and Vetterli, 2007, https://ieeexplore.ieee.org/document/7098875.
        """
        return _effective_rank(_eigenvalues(self._covariance_of_means()))

    @property
    def gaussian_entropy(self) -> float:
        r"""
        Entropy of the Gaussian with the normalised latents' covariance (posterior noise included), in nats per
        dimension.

        It is an upper bound of what a latent element can hold: 1.42 for white noise, less if elements predict
        each other, `-inf` for a singular covariance, such as that of a deterministic encoder with a constant channel.
        """
        noise = self.variance / self.num_images
        if self.covariance_of == "channels":
            noise = noise.mean(dim=(1, 2), keepdim=True)
        noise = noise / self._std_or_one.square().view(-1, 1, 1)
        eigenvalues = _eigenvalues(self._covariance_of_means() + noise.flatten().diag())
        return 0.5 * (math.log(2 * math.pi * math.e) + eigenvalues.log().mean().item())

    def summary(self) -> dict[str, float | int | str | list[float] | None]:
        r"""
        All diagnostics as plain numbers, for JSON. Lists have one entry per channel, the spectrum one per frequency. Undefined
        values are None: `effective_rank` and `gaussian_entropy` if there are too few images for the covariance, a
        logarithm of 0, the spectrum of latents that are all equal.
        """
        values = {
            "num_images": self.num_images,
            "mean": self.mean.tolist(),
            "std": self.std.tolist(),
            "kl": None if self.kl is None else self.kl.tolist(),
            "posterior_std_ratio": self.posterior_std_ratio.tolist(),
            "dead_channel_share": self.dead_channels.double().mean().item(),
            "excess_kurtosis": self.excess_kurtosis.nanmean().item(),
            "high_frequency_share": self.high_frequency_share,
            "radial_spectrum": self.radial_spectrum.tolist(),
            "effective_rank": self.effective_rank if self.has_full_covariance else None,
            "gaussian_entropy": self.gaussian_entropy if self.has_full_covariance else None,
            "covariance_of": self.covariance_of,
        }
        return finite_or_none(values)

    def scalars(self) -> dict[str, float]:
        r"""
        The scalars of [`summary`], for a log during training; those of the covariance only if there are enough
        images. If there is a posterior, also the means over channels of `kl` and `posterior_std_ratio`.
        """
        scalars = {
            "dead_channel_share": self.dead_channels.double().mean().item(),
            "excess_kurtosis": self.excess_kurtosis.nanmean().item(),
            "high_frequency_share": self.high_frequency_share,
            "std": self.std.mean().item(),
        }
        if self.kl is not None:
            scalars["kl"] = self.kl.mean().item()
            scalars["posterior_std_ratio"] = self.posterior_std_ratio.mean().item()
        if self.has_full_covariance:
            scalars |= {"effective_rank": self.effective_rank, "gaussian_entropy": self.gaussian_entropy}
        return scalars

    @property
    def _num_elements(self) -> int:
        """Latent elements of each channel seen."""
        if self.num_images == 0:
            raise ValueError("no latents were added yet.")
        return self.num_images * self.shape[1] * self.shape[2]

    @property
    def _num_vectors(self) -> int:
        """Number of vectors seen, of the kind that [`covariance_of`] names."""
        return self.num_images if self.covariance_of == "latent" else self._num_elements

    @property
    def _variance_of_means(self) -> torch.Tensor:
        first, second = self.powers[:2] / self._num_elements
        variance = second - first.square()
        # The difference cancels for a constant channel: a value within its rounding error is 0.
        return torch.where(variance > 1e-13 * second, variance, 0)

    @property
    def _mean_variance(self) -> torch.Tensor:
        return self.variance.sum(dim=(1, 2)) / self._num_elements

    @property
    def _std_or_one(self) -> torch.Tensor:
        return torch.where(self.std > 0, self.std, 1)

    def _power(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Power of the normalised means, `(C, h, w)`, and the frequency of each place, `(h, w)`."""
        _, height, width = self.shape
        power = self.spectrum.clone()
        power[:, 0, 0] -= self.num_images * (self.mean * height * width).square()
        power = power.clamp(min=0) / self._std_or_one.square().view(-1, 1, 1)
        rows, columns = torch.fft.fftfreq(height, dtype=torch.float64), torch.fft.fftfreq(width, dtype=torch.float64)
        return power, torch.hypot(rows[:, None], columns)

    def _covariance_of_means(self) -> torch.Tensor:
        """Covariance of the normalised posterior means."""
        dim, height_width = len(self.total), self.shape[1] * self.shape[2]
        of_latents = self.covariance_of == "latent"
        count = self._num_vectors
        if not self.has_full_covariance:
            warnings.warn(
                f"{count} images for {dim} latent elements: the covariance is singular, effective rank and Gaussian "
                "entropy are far too low. Add more images.",
                stacklevel=3,
            )
        mean = self.total / count
        scale = self._std_or_one.repeat_interleave(height_width) if of_latents else self._std_or_one
        return (self.outer / count - torch.outer(mean, mean)) / torch.outer(scale, scale)

    def _check_std(self) -> None:
        if self.num_with_std not in (0, self.num_images):
            raise ValueError(
                f"{self.num_with_std} of {self.num_images} latents came with `std`. Give it with all batches or none."
            )


def plot_latent_space(diagnostics: LatentDiagnostics, path: str | Path) -> None:
    r"""
    Draws the standard deviation and the share of posterior noise of each channel, the power by spatial frequency, and how
    many directions hold the variance.

    Args:
        diagnostics ([`LatentDiagnostics`]): The diagnostics to draw.
        path (`str` or `Path`): The PNG to write.
    """
    figure_of_latent_space(diagnostics).savefig(path, dpi=110)


def figure_of_latent_space(diagnostics: LatentDiagnostics) -> Figure:
    r"""Makes the figure that [`plot_latent_space`] saves."""
    figure = Figure(figsize=(15, 3.4), layout="constrained")
    channels, power, directions = figure.subplots(1, 3)
    numbers = range(diagnostics.shape[0])
    channels.bar(numbers, diagnostics.std.tolist(), color="C0", label="all")
    noise = diagnostics.posterior_std_ratio * diagnostics.std
    channels.bar(numbers, noise.tolist(), color="C1", label="the posterior's noise")
    channels.set_title("standard deviation", fontsize=10)
    channels.set_xlabel("channel", fontsize=8)
    channels.legend(fontsize=7, frameon=False)
    spectrum = diagnostics.radial_spectrum
    frequencies = [number / max(diagnostics.shape[1:]) for number in range(len(spectrum))]
    power.plot(frequencies, spectrum.tolist(), marker=".")
    power.axvline(HIGH_FREQUENCY, color="0.7", linestyle=":", label="counts as high above this")
    power.set_title("share of the power", fontsize=10)
    power.set_xlabel("cycles per latent pixel", fontsize=8)
    power.legend(fontsize=7, frameon=False)
    eigenvalues = _eigenvalues(diagnostics._covariance_of_means()).flip(0)
    directions.plot(range(1, len(eigenvalues) + 1), (eigenvalues.cumsum(0) / eigenvalues.sum()).tolist())
    if diagnostics.has_full_covariance:
        rank = _effective_rank(eigenvalues)
        directions.axvline(rank, color="0.7", linestyle=":", label=f"effective rank {rank:.1f}")
        directions.legend(fontsize=7, frameon=False)
    directions.set_title("share of the variance in the first directions", fontsize=10)
    directions.set_xlabel("principal components", fontsize=8)
    for axis in (channels, power, directions):
        axis.tick_params(labelsize=8)
        axis.set_ylim(bottom=0)
    for axis in (channels, directions):
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return figure


def linear_probe_accuracy(
    train_latents: torch.Tensor,
    train_labels: torch.Tensor,
    test_latents: torch.Tensor,
    test_labels: torch.Tensor,
    *,
    ridge: float = 0.1,
) -> float:
    r"""
    Share of latents whose class a linear classifier finds, in [0, 1]; see [`linear_probe`].

    Args:
        train_latents, train_labels, test_latents, ridge: As in [`linear_probe`].
        test_labels (`torch.Tensor` of shape `(M,)`): Integers from 0.
    """
    _check_labels(test_latents, test_labels)
    found = linear_probe(train_latents, train_labels, test_latents, ridge=ridge)
    return (found == test_labels.cpu()).double().mean().item()


def linear_probe(
    train_latents: torch.Tensor, train_labels: torch.Tensor, test_latents: torch.Tensor, *, ridge: float = 0.1
) -> torch.Tensor:
    r"""
    The classes that a linear classifier on flattened latents, or other features, predicts.

    Least squares on one-hot labels with an intercept and an L2 penalty, solved exactly in float64. Each latent element
    is first divided by its standard deviation over the training set, so the unit of a channel does not matter.

    Args:
        train_latents, test_latents (`torch.Tensor` of shapes `(N, ...)` and `(M, ...)`): Posterior means.
        train_labels (`torch.Tensor` of shape `(N,)`): Integers from 0.
        ridge (`float`, *optional*, defaults to 0.1): Weight of the penalty on squared weights, relative to the mean squared error.

    Returns:
        `torch.Tensor` of shape `(M,)`: int64, on the CPU.
    """
    _check_labels(train_latents, train_labels)
    if not ridge > 0:
        raise ValueError(f"`ridge` is {ridge}, but must be above 0.")
    train, test = train_latents.flatten(1).cpu().double(), test_latents.flatten(1).cpu().double()
    center, scale = train.mean(dim=0), train.std(dim=0, correction=0)
    scale = torch.where(scale > 1e-12 * center.abs(), scale, math.inf)  # a constant element, which says nothing, to 0
    train, test = (train - center) / scale, (test - center) / scale
    targets = torch.nn.functional.one_hot(train_labels.cpu().long()).to(train)
    centered = targets - targets.mean(dim=0)
    if train.shape[1] <= len(train):
        weights = _ridge_solve(train.T @ train, train.T @ centered, ridge * len(train))  # (D, K)
    else:  # the same solution from the smaller system
        weights = train.T @ _ridge_solve(train @ train.T, centered, ridge * len(train))
    return (test @ weights + targets.mean(dim=0)).argmax(dim=1)


def _check_labels(latents: torch.Tensor, labels: torch.Tensor) -> None:
    if len(latents) != len(labels) or len(latents) == 0 or labels.ndim != 1 or labels.is_floating_point():
        raise ValueError(
            f"latents {tuple(latents.shape)} need as many integer labels, (N,), but they are {labels.dtype} of the shape "
            f"{tuple(labels.shape)}."
        )


def _eigenvalues(covariance: torch.Tensor) -> torch.Tensor:
    """Eigenvalues of a covariance; those within rounding of 0 are 0."""
    eigenvalues = torch.linalg.eigvalsh(covariance)
    rounding = len(eigenvalues) * torch.finfo(eigenvalues.dtype).eps * eigenvalues[-1]
    return torch.where(eigenvalues > rounding, eigenvalues, 0)


def _effective_rank(eigenvalues: torch.Tensor) -> float:
    return torch.special.entr(eigenvalues / eigenvalues.sum()).sum().exp().item()


def _ridge_solve(gram: torch.Tensor, right: torch.Tensor, ridge: float) -> torch.Tensor:
    gram.diagonal().add_(ridge)
    return torch.cholesky_solve(right, torch.linalg.cholesky(gram))
