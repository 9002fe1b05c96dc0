"""The moments of images' statistics and features over many images, as a loss for a decoder."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from dae_diffusers.image_spectrum import log_spectrum
from dae_diffusers.losses.moments import moment_distance, moment_surrogate
from dae_diffusers.losses.processes import mean_over_processes
from dae_diffusers.metrics.statistics import FeatureStatistics
from dae_diffusers.randomness import derived_seed
from dae_diffusers.store import fingerprint
from dae_diffusers.vision import AlwaysEval, FrozenBackbone, load_backbone, short_name
from dae_diffusers.weights import weights_of

# Longer feature vectors are projected: their covariance would be too large, and need more images than there are.
MAX_FEATURES = 1024
# Added to the eigenvalues of the correlations, whose mean is 1: directions in which images hardly differ count less. With 0.01 the
# loss pursued them, and other judges found the images worse.
RIDGE = 0.3
# Sides of the shrunk image, and rings of spatial frequency.
PIXELS, RINGS = 8, 8


class ImageStatistics(AlwaysEval):
    r"""
    One vector of statistics per image: the image shrunk to 8x8 pixels, the logarithm of its power in 8 rings of spatial frequency, both
    for each channel, and, with a vision model, mean and standard deviation over the positions of each of its layers.

    Vectors above `MAX_FEATURES` numbers are projected to as many by a fixed random matrix. Without `torch.no_grad` the gradient
    reaches the images.

    Args:
        channels (`int`): Channels of the images.
        backbone ([`~dae_diffusers.vision.FrozenBackbone`], *optional*): The vision model, for pictures: gray, RGB or RGBA.
        name (`str`, *optional*): Its short name in snake_case.

    Attributes:
        feature_dim (`int`): Length of a vector.
        fingerprint (`str`): Fingerprint of what the vectors depend on, besides the images.
    """

    def __init__(self, channels: int, backbone: FrozenBackbone | None = None, name: str = "pixels"):
        super().__init__()
        self.backbone, self.name = backbone, name
        self.register_buffer("projection", None, persistent=False)
        parts: list = [f"{PIXELS} {RINGS} {MAX_FEATURES}"]
        size = (2 * PIXELS, 2 * PIXELS)
        if backbone is not None:
            size = tuple(backbone.size)
            parts += [str([size, backbone.mean.tolist(), backbone.std.tolist()]), *weights_of(backbone.model)]
        self.fingerprint = fingerprint(parts)
        device = "cpu" if backbone is None else backbone.mean.device
        with torch.no_grad():
            num_features = self(torch.zeros(1, channels, *size, device=device)).shape[1]
        if num_features > MAX_FEATURES:
            generator = torch.Generator().manual_seed(derived_seed(0, num_features))
            projection = torch.randn(num_features, MAX_FEATURES, generator=generator) / num_features**0.5
            self.projection = projection.to(device)
        self.feature_dim = min(num_features, MAX_FEATURES)

    @classmethod
    def load(cls, name_or_path: str | None, channels: int = 3, device: torch.device | str = "cpu") -> "ImageStatistics":
        r"""With a vision model of the Hub or a local folder, or without one; errors as in [`~dae_diffusers.vision.load_backbone`]."""
        if name_or_path is None:
            return cls(channels)
        return cls(channels, load_backbone(name_or_path).to(device), short_name(name_or_path))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        r"""
        Args:
            images (`torch.Tensor` of shape `(B, channels, H, W)`): Around [-1, 1].

        Returns:
            `torch.Tensor` of shape `(B, feature_dim)`: float32.
        """
        images = images if self.backbone is None else images.to(self.backbone.mean.device)
        parts = [F.adaptive_avg_pool2d(images.float(), PIXELS).flatten(1), log_spectrum(images, RINGS).flatten(1)]
        for hidden in () if self.backbone is None else self.backbone(images):
            hidden = hidden.flatten(2).float()
            parts += [hidden.mean(dim=2), (hidden.var(dim=2, correction=0) + 1e-6).sqrt()]
        features = torch.cat(parts, dim=1)
        if self.projection is None:
            return features
        with torch.autocast(features.device.type, enabled=False):
            return features @ self.projection.to(features.device)


@dataclass(frozen=True)
class Whitening:
    r"""
    An affine map after which the features of some images have mean 0, no correlations, and variances near 1.

    Attributes:
        mean (`torch.Tensor` of shape `(D,)`): Of the features.
        matrix (`torch.Tensor` of shape `(D, D)`): Takes `features - mean` to whitened features, `(features - mean) @ matrix`.
        variances (`torch.Tensor` of shape `(D,)`): Of the whitened features: 1, less where the images hardly differ.
    """

    mean: torch.Tensor
    matrix: torch.Tensor
    variances: torch.Tensor

    @classmethod
    def of(cls, statistics: FeatureStatistics, device: torch.device | str = "cpu") -> "Whitening":
        r"""From the statistics of features; computed on the CPU in float64."""
        covariance = statistics.covariance
        scales = covariance.diagonal().clamp(min=1e-12).sqrt()
        eigenvalues, vectors = torch.linalg.eigh(covariance / scales.outer(scales))
        eigenvalues = eigenvalues.clamp(min=0)
        roots = (eigenvalues + RIDGE).sqrt()
        matrix = vectors / roots / scales[:, None]
        parts = (statistics.mean, matrix, eigenvalues / (eigenvalues + RIDGE))
        return cls(*(part.float().to(device) for part in parts))

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        r"""Features `(B, D)` to whitened features `(B, D)`."""
        return (features - self.mean) @ self.matrix


class RunningMoments(nn.Module):
    r"""
    Mean and second moment of the whitened features of the images that a decoder makes, over a long row of batches.

    Each step replaces a share of them. So the distance is that of thousands of images, and only the last batch has a
    gradient. The moments are buffers: a checkpoint holds them.

    Args:
        whitening ([`Whitening`]): After which the images to resemble have mean 0 and the variances `whitening.variances`.
        share (`float`): What a step replaces, in (0, 1]. Of 128 images with 0.02 the moments are those of about 12,700.
    """

    def __init__(self, whitening: Whitening, share: float):
        super().__init__()
        self.whitening, self.share = whitening, share
        self.register_buffer("mean", torch.zeros_like(whitening.mean))
        self.register_buffer("second", torch.zeros_like(whitening.matrix))
        self._step: int | None = None

    @torch.no_grad()
    def start(self, features: torch.Tensor) -> None:
        r"""Takes the moments of raw features, `(N, D)`, instead of those so far."""
        whitened = self.whitening(features.to(self.mean))
        self.mean.copy_(whitened.mean(dim=0))
        self.second.copy_(whitened.T @ whitened / len(whitened))

    def forward(self, features: torch.Tensor, step: int | None = None) -> torch.Tensor:
        r"""
        Counts a micro-batch, of which every process has an equal part, unless a part of it is not finite. All processes call it.

        Args:
            features (`torch.Tensor` of shape `(B, D)`): Raw features of this process's images, with their graph.
            step (`int`, *optional*): The step that it belongs to: the micro-batches of a step replace as much as a large one would.
                Default: a step of its own.

        Returns:
            `torch.Tensor`: Scalar, the [`~dae_diffusers.losses.moments.moment_distance`] of all images so far. Averaged over the
            processes, its gradient is that of the batch of all of them.
        """
        with torch.autocast(features.device.type, enabled=False):
            whitened = self.whitening(features.float())
            detached = whitened.detach()
            mean = mean_over_processes(detached.mean(dim=0))
            second = mean_over_processes(detached.T @ detached / len(detached))
            self._count(mean, second, step)
            target = self.whitening.variances
            surrogate = moment_surrogate(whitened, self.mean, self.second, target)
            return moment_distance(self.mean, self.second, target) + surrogate - surrogate.detach()

    def _count(self, mean: torch.Tensor, second: torch.Tensor, step: int | None) -> None:
        """Replaces a share of the moments before this step with those of its micro-batches so far."""
        kept = (self.mean, self.second)
        if step is None or step != self._step:
            self._step, self._before, self._number = step, [each.clone() for each in kept], 0
            self._sums = [torch.zeros_like(each) for each in kept]
        is_finite = mean.isfinite().all() & second.isfinite().all()  # the same everywhere; `skip_nonfinite` goes on
        self._number = self._number + is_finite
        for each, before, total, new in zip(kept, self._before, self._sums, (mean, second), strict=True):
            total += torch.where(is_finite, new, 0)
            moved = before.lerp(total / self._number.clamp(min=1), self.share)
            each.copy_(torch.where(self._number > 0, moved, before))
