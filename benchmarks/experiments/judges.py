"""Judges samples by feature extractors."""

import torch
from diffusers import AutoencoderKL

from dae_diffusers.data import DataConfig, load_images
from dae_diffusers.engine.distributed import measuring_accelerator
from dae_diffusers.fitting.decoder_fit import draw_latents
from dae_diffusers.metrics.distances import frechet_distance
from dae_diffusers.metrics.features import load_feature_extractor
from dae_diffusers.metrics.sampling import SampleSettings, class_counts
from dae_diffusers.metrics.statistics import FeatureStatistics, reference_statistics
from dae_diffusers.pipelines.dae_dit import DAEDiTPipeline
from dae_diffusers.randomness import Stream
from dae_diffusers.store import read_json, write_json
from experiments.trial import Trial


def judge_samples(trial: Trial, generators: list[str]) -> None:
    r"""Fréchet distances of samples to the training images by each judge and at each guidance, into `judged.json`."""
    experiment, folder, origin = trial.experiment, trial.folder, trial.origin.folder
    names = [experiment["features"], *experiment.get("judges", [])]
    scales = [str(float(scale)) for scale in experiment.get("guidance_scales", [])]
    for generator in generators:
        path = folder / generator / "judged.json"
        judged = read_json(path) if path.exists() else {}
        if all(set(names) <= judged.get(scale, {}).keys() for scale in scales):
            continue
        accelerator = measuring_accelerator("no")
        train = load_images(DataConfig(**experiment["data"]))[0]
        channels = train.config.image_channels
        judges = {name: load_feature_extractor(name, channels=channels) for name in names}
        references = {
            name: reference_statistics(judge, train, cache_dir=trial.output_dir / "reference")
            for name, judge in judges.items()
        }
        fitted = folder / generator / "pipeline" / "vae"
        vae = AutoencoderKL.from_pretrained(fitted if fitted.exists() else folder / "vae").eval()
        pipeline = DAEDiTPipeline.from_pretrained(origin / generator / "pipeline").to(accelerator.device)
        counts = class_counts(pipeline, train, pipeline.null_class)
        labels = SampleSettings(experiment["num_images"], None, None, class_counts=counts).labels(pipeline.null_class)
        for scale in scales:
            latents = draw_latents(
                pipeline, labels, experiment["num_images"], origin / generator / "drawn", accelerator,
                guidance_scale=float(scale), num_inference_steps=experiment["num_inference_steps"],
                seed=1000 + trial.seed, stream=Stream.SAMPLES,
            )  # fmt: skip
            statistics = {name: FeatureStatistics.empty(judge.feature_dim) for name, judge in judges.items()}
            with torch.no_grad():
                for part in latents.split(64):
                    images = vae.decode(part.to(accelerator.device)).sample.float().clamp(-1, 1)
                    for name, judge in judges.items():
                        statistics[name].add(judge(images))
            judged[scale] = {name: frechet_distance(each, references[name]) for name, each in statistics.items()}
            write_json(path, judged)
