"""What real images reach in the place of reconstructions and samples, and how good the judge is."""

import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from dae_diffusers.data import ImageDataset
from dae_diffusers.data.dataset import choose_indices
from dae_diffusers.latents.diagnostics import linear_probe_accuracy
from dae_diffusers.metrics.distances import frechet_distance
from dae_diffusers.metrics.evaluation import EncodedImages, TrainingFeatures, feature_metrics, image_features
from dae_diffusers.metrics.features import FeatureExtractor
from dae_diffusers.metrics.sampling import in_proportion
from dae_diffusers.metrics.statistics import FeatureStatistics

_FEWEST = 6  # density looks at the fifth neighbour


class Yardstick:
    r"""
    Held-out real images, measured as if they were reconstructions or samples. A distance below that of real images is as good as
    it can be told. All processes call its methods.

    Args:
        extractor ([`~dae_diffusers.metrics.features.FeatureExtractor`]): The judge.
        train, validation ([`~dae_diffusers.data.ImageDataset`]): Training images and held-out ones.
        accelerator ([`~accelerate.Accelerator`]): The run's accelerator.
        held_out ([`~dae_diffusers.metrics.evaluation.EncodedImages`], *optional*): With features of the held-out images, if known.
        folder (`Path`): Where to keep features.
        work: `batch_size` and `num_workers`.
    """

    def __init__(
        self,
        extractor: FeatureExtractor,
        train: ImageDataset,
        validation: ImageDataset,
        accelerator: Accelerator,
        *,
        held_out: EncodedImages | None,
        folder: Path,
        **work: int,
    ):
        self.extractor, self.train, self.validation = extractor, train, validation
        chosen = train.choose(len(validation))
        kept = {"folder": folder, "description": "Features of real images", **work}
        self.held_out = (
            image_features(validation, extractor, accelerator, **kept) if held_out is None else held_out.features
        )
        self.trained_on = image_features(chosen, extractor, accelerator, **kept)
        self._labels = chosen.labels

    def judge(self) -> dict[str, Any]:
        r"""
        How often a linear classifier on the judge's features, fitted on as many training images, finds the class of a held-out
        image; and how often chance does. Empty without classes.
        """
        if self._labels is None or len(self.train.id2label) < 2:
            return {}
        labels = (torch.tensor(self._labels), torch.tensor(self.validation.labels))
        accuracy = linear_probe_accuracy(self.trained_on, labels[0], self.held_out, labels[1])
        return {"judge_accuracy": accuracy, "chance": torch.bincount(labels[1]).max().item() / len(self.validation)}

    def of_reconstructions(self) -> dict[str, float]:
        r"""The distance between held-out images and as many training images, under the names of the distances it is for."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the report says that the images are few
            floor = frechet_distance(FeatureStatistics.of(self.held_out), FeatureStatistics.of(self.trained_on))
        name = self.extractor.distance_name("r")
        return {"num_images": len(self.held_out), name: floor, "i" + name[1:]: floor}

    def of_samples(self, samples: list[torch.Tensor], training: TrainingFeatures) -> dict[str, Any]:
        r"""
        The metrics of held-out images in the place of samples (`real`), and of equally many samples (`samples`, a row for each
        setting). Empty if there are too few. Real images have no `gap`: it would count what the autoencoder loses.

        Args:
            samples (`list[torch.Tensor]` of shape `(N, D)`): Features of the samples of each setting.
            training ([`~dae_diffusers.metrics.evaluation.TrainingFeatures`]): What they were compared with.
        """
        limit = min(len(training.images), *map(len, samples))
        sets = self._of_one_size(samples, limit)
        number = len(sets[0])
        if number < _FEWEST:
            return {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            real, *rows = (feature_metrics(each, self.extractor, training)[0] for each in sets)
        real.pop("gap", None)
        return {"num_images": number, "real": real, "samples": rows}

    def distances(
        self, samples: list[torch.Tensor], reference: FeatureStatistics, limit: int
    ) -> tuple[float, list[float]]:
        r"""
        The Fréchet distances to the training images, of at most `limit` held-out images and of equally many samples of each
        setting.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            real, *rows = (
                frechet_distance(FeatureStatistics.of(each), reference) for each in self._of_one_size(samples, limit)
            )
        return real, rows

    def _of_one_size(self, samples: list[torch.Tensor], limit: int) -> list[torch.Tensor]:
        """Features of held-out images, with the classes in training's proportion, and of equally many samples of each setting."""
        chosen = as_in_training(self.train, self.validation, min(limit, len(self.held_out)))
        return [self.held_out[chosen], *(features[: len(chosen)] for features in samples)]


def as_in_training(train: ImageDataset, held_out: ImageDataset, limit: int) -> list[int]:
    r"""
    The numbers of at most `limit` held-out images, each class as often as in training, as samples have them. Without classes, or if that
    leaves less than half, any `limit` images.
    """
    plain = choose_indices(len(held_out), limit).tolist()
    if train.labels is None or len(train.id2label) < 2:
        return plain
    labels, num_classes = torch.tensor(held_out.labels), len(train.id2label)
    shares = torch.tensor(train.labels).bincount(minlength=num_classes)
    there = labels.bincount(minlength=num_classes)
    number = min(limit, int((there / shares)[shares > 0].min() * shares.sum()) + 1)
    while number >= max(1, limit / 2):
        wanted = in_proportion(shares.tolist(), number).bincount(minlength=num_classes)
        if (wanted <= there).all():
            places = [(labels == label).nonzero().flatten() for label in range(num_classes)]
            chosen = [of[choose_indices(len(of), count)] for of, count in zip(places, wanted.tolist(), strict=True)]
            return torch.cat(chosen).sort().values.tolist()
        number -= 1
    return plain
