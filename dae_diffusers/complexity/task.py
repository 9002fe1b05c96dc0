"""Trains and measures the generators of one set of latents and images."""

import math
from collections.abc import Callable
from functools import cached_property

import torch
import torch.nn.functional as F
from diffusers.training_utils import EMAModel
from torch import nn

from dae_diffusers.complexity.generators import Critic, Generator
from dae_diffusers.complexity.settings import ComplexityConfig, ComplexityForm
from dae_diffusers.metrics.distances import frechet_distance
from dae_diffusers.metrics.statistics import FeatureStatistics
from dae_diffusers.randomness import derived_seed

# Weight of the past in the average of a GAN's generators, which is what is measured.
_EMA_DECAY = 0.98

# Principal components of the latent channels whose variance is below this share of the largest are rounding errors.
_MIN_VARIANCE = 1e-10

# Images that one pass without gradients takes.
CHUNK = 256


class ComplexityTask:
    """A set of whitened latents and standardised images, on which generators are trained and measured."""

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
        self.data_variance = (pixel_values_eval - self.mean).cpu().double().square().mean().item()
        self.scale = (pixel_values_train - self.mean).cpu().double().square().mean().sqrt().item()
        if self.scale < 1e-6 or self.data_variance < 1e-12:
            raise ValueError("the images are constant: there is nothing to measure a distance to.")
        self.targets_train = (pixel_values_train - self.mean) / self.scale
        self.targets_eval = (pixel_values_eval - self.mean) / self.scale
        self.latents_train, self.latents_eval = _whiten(latents_train, latents_eval)
        self.factor = pixel_values_train.shape[-1] // latents_train.shape[-1]

    @cached_property
    def features(self) -> torch.Tensor | None:
        """Features of the held-out images."""
        return None if self.feature_extractor is None else self._extract(self.pixel_values_eval)

    @cached_property
    def least_squares(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and bias of the linear generator with the smallest squared error over the training part."""
        gram = moment = 0.0
        chunk = max(1, CHUNK * 1024 // self.latents_train[0, 0].numel())
        for latents, targets in zip(self.latents_train.split(chunk), self.targets_train.split(chunk), strict=True):
            patches = F.unfold(latents, 3, padding=1).transpose(0, 1).flatten(1)  # (9 k, B h w)
            patches = torch.cat([patches, torch.ones_like(patches[:1])]).cpu().double()
            pixels = F.pixel_unshuffle(targets, self.factor).transpose(0, 1).flatten(1).cpu().double()
            gram = gram + patches @ patches.T
            moment = moment + patches @ pixels.T
        solution = torch.linalg.pinv(gram, rtol=1e-12, hermitian=True) @ moment  # (9 k + 1, channels * factor^2)
        weight = solution[:-1].T.unflatten(1, (-1, 3, 3))
        return weight.float().to(self.device), solution[-1].float().to(self.device)

    def train(self, form: ComplexityForm, width: int, seed: int) -> Generator:
        """The trained generator of a width, on the device."""
        generator = _seeded(
            derived_seed(seed, 0),
            lambda: Generator(self.latents_train.shape[1], self.targets_train.shape[1], self.factor, width),
        )
        draws = torch.Generator().manual_seed(derived_seed(seed, 1))
        if form == "paired":
            return self._train_paired(generator, draws)
        return self._train_unpaired(generator, draws, seed)

    def _train_paired(self, generator: Generator, draws: torch.Generator) -> Generator:
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

    def _train_unpaired(self, generator: Generator, draws: torch.Generator, seed: int) -> Generator:
        config = self.config
        generator.mix_channels_(draws)
        generator.to(self.device)
        average = EMAModel(generator.parameters(), decay=_EMA_DECAY)
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
            average.step(generator.parameters())
        average.copy_to(generator.parameters())
        return generator

    def measure(
        self, form: ComplexityForm, images_train: torch.Tensor | None, images_eval: torch.Tensor, seed: int
    ) -> dict[str, float]:
        """Measures the distance of images in [-1, 1] to the data; `images_train` is only needed for the unpaired form."""
        if form == "paired":
            mse = (images_eval - self.pixel_values_eval).cpu().double().square().mean().item()
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
        for part in range(0, len(generated_eval), CHUNK):
            real = self.targets_eval[part : part + CHUNK].to(self.device)
            generated = generated_eval[order[part : part + CHUNK]].to(self.device)
            with torch.no_grad():
                differences.append((critic(real) - critic(generated)).cpu().double())
            slopes.append(critic.slope(_between(real, generated, draws), create_graph=False).cpu().double())
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

    def _new_critic(self, seed: int) -> Critic:
        shape = self.targets_train.shape[1:]
        return _seeded(seed, lambda: Critic(*shape, self.config.critic_width)).to(self.device)

    def _draw(self, tensor: torch.Tensor, draws: torch.Generator) -> torch.Tensor:
        return tensor[torch.randint(len(tensor), (self.config.batch_size,), generator=draws)].to(self.device)

    @torch.no_grad()
    def generate(self, generator: Generator, latents: torch.Tensor) -> torch.Tensor:
        """Images in [-1, 1] (not clamped), on the CPU."""
        parts = [generator(part.to(self.device)).cpu() for part in latents.split(CHUNK)]
        return torch.cat(parts) * self.scale + self.mean

    @torch.no_grad()
    def _extract(self, images: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.feature_extractor(part.clamp(-1, 1)).cpu() for part in images.split(CHUNK)])


def _whiten(latents_train: torch.Tensor, latents_eval: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Principal components of the latent channels, each with mean 0 and variance 1 over the training part."""
    flat = latents_train.cpu().double().transpose(0, 1).flatten(1)  # (C, N h w)
    mean = flat.mean(dim=1, keepdim=True)
    flat = flat - mean
    variances, directions = torch.linalg.eigh(flat @ flat.T / flat.shape[1])
    keep = variances > max(_MIN_VARIANCE * variances[-1].item(), 1e-24 + 1e-14 * mean.square().max().item())
    if not keep.any():
        raise ValueError("`latents_train` is constant: the encoder has collapsed and there is nothing to measure.")
    matrix = (directions[:, keep] / variances[keep].sqrt()).T
    mean = mean[None, ..., None]

    def apply(latents: torch.Tensor) -> torch.Tensor:
        parts = [
            torch.einsum("kc,nchw->nkhw", matrix, part.cpu().double() - mean).float() for part in latents.split(CHUNK)
        ]
        return torch.cat(parts).to(latents.device)

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
