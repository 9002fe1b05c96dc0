"""An evaluation counts each image once and depends on no batch and no process."""

import json
import logging
import math
from dataclasses import replace
from functools import wraps
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import (
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from matplotlib.figure import Figure
from models import make_autoencoder, make_prior_pipeline, make_random_transformer, make_video_autoencoder, save_backbone
from PIL import Image
from scripts import launch, run, succeed

from dae_diffusers import DAEDiTPipeline, DAEDiTTransformer2DModel
from dae_diffusers.autoencoders.loading import load_autoencoder
from dae_diffusers.caching import CachedRows, cached_rows, cached_values
from dae_diffusers.compared_runs.pictures import side_by_side
from dae_diffusers.compared_runs.reading import read_runs
from dae_diffusers.compared_runs.tables import write_tables
from dae_diffusers.data import DataConfig, load_images
from dae_diffusers.errors import UserError
from dae_diffusers.evaluation_record import name_of_setting
from dae_diffusers.latents.statistics import normalize_latents
from dae_diffusers.metrics import drawings
from dae_diffusers.metrics.agreement import class_agreement, share_by_class
from dae_diffusers.metrics.checks import check_options
from dae_diffusers.metrics.defaults import set_defaults
from dae_diffusers.metrics.distances import (
    density_coverage,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from dae_diffusers.metrics.drawings import measure_drawings
from dae_diffusers.metrics.evaluation import (
    TrainingFeatures,
    encode_images,
    evaluation_inputs,
    feature_metrics,
    latent_metrics,
    reconstruction_metrics,
    sample_metrics,
    training_features,
)
from dae_diffusers.metrics.features import load_feature_extractor
from dae_diffusers.metrics.given_samples import load_samples
from dae_diffusers.metrics.interpolation import interpolate_to_neighbors
from dae_diffusers.metrics.report import copies_lines, few_images_lines, plot_sweep, sample_grid
from dae_diffusers.metrics.sampling import (
    Sampler,
    SampleSettings,
    autoencoder_of,
    class_counts,
    draw_samples,
    generation_inputs,
    ids_in_pipeline,
    image_batches,
    prompts_of,
    prompts_of_images,
    say_duration,
)
from dae_diffusers.metrics.schedulers import drawing_by
from dae_diffusers.metrics.settings import SamplingConfig
from dae_diffusers.metrics.statistics import FeatureStatistics
from dae_diffusers.metrics.sweep import swept_settings, what_to_draw
from dae_diffusers.metrics.yardstick import as_in_training
from dae_diffusers.store import fingerprint_of_json, finite_or_none
from dae_diffusers.training import evaluate
from dae_diffusers.weights import weights_fingerprint_of


@pytest.fixture(scope="module")
def extractor_folder(tmp_path_factory):
    return save_backbone(tmp_path_factory.mktemp("extractor"), "classifier")


@pytest.fixture
def extractor(extractor_folder):
    return load_feature_extractor(str(extractor_folder))


@pytest.fixture
def images(image_folder):
    config = DataConfig(train_data_dir=str(image_folder), resolution=16, validation_fraction=0.5)
    return load_images(config)[0]


@pytest.fixture
def pipeline():
    vae = make_autoencoder("none").to_diffusers()
    torch.manual_seed(1)
    transformer = DAEDiTTransformer2DModel(
        sample_size=8, in_channels=3, num_layers=1, num_attention_heads=2, attention_head_dim=8, num_classes=2
    )
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.1)
    return DAEDiTPipeline(transformer.eval(), vae, FlowMatchEulerDiscreteScheduler(), id2label={0: "cat", 1: "dog"})


@pytest.mark.filterwarnings("ignore:.*covariance is singular")
def test_metrics_stand_under_their_own_names(images, extractor, pipeline):
    accelerator = Accelerator()
    encoded = encode_images(pipeline.vae, images, accelerator, extractor=extractor)
    pixels = torch.stack([images[n]["pixel_values"] for n in range(len(images))])
    brighter = ((0.3 * pixels + 1.6) * 127.5).clamp(0, 255)
    noise = 40 * torch.randn(brighter.shape, generator=torch.Generator().manual_seed(0))
    samples = torch.where(torch.rand(len(pixels), 1, 1, 1) < 0.5, brighter, (pixels + 1) * 127.5 + noise)
    samples = samples.clamp(0, 255).round().to(torch.uint8)
    with torch.no_grad():
        features, logits = extractor.features_and_logits(samples.float() / 127.5 - 1)
    metrics, nearest = sample_metrics(
        samples,
        extractor,
        TrainingFeatures(FeatureStatistics.of(encoded.features), encoded.features, encoded.reconstruction_features),
        accelerator,
    )
    real = encoded.features
    between, among = torch.cdist(features, real), torch.cdist(real, real).fill_diagonal_(torch.inf)
    closest = between.argmin(dim=1)
    authentic = between.amin(dim=1) > among.amin(dim=1)[closest]
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))
    expected = {
        extractor.distance_name("g"): frechet_distance(FeatureStatistics.of(features), FeatureStatistics.of(real)),
        "gap": frechet_distance(FeatureStatistics.of(features), FeatureStatistics.of(encoded.reconstruction_features)),
        "kernel_distance": kernel_distance(features, real),
        **dict(zip(("precision", "recall"), precision_recall(real, features), strict=True)),
        **dict(zip(("density", "coverage"), density_coverage(real, features), strict=True)),
        "authenticity": authentic.double().mean().item(),
        f"classifier_score_{extractor.name}": inception_score(logits[order].softmax(dim=1))[0],
    }
    assert metrics == pytest.approx(expected, rel=1e-4)
    assert len({round(value, 6) for value in expected.values()}) >= 6  # else a mix-up would not show
    assert 0 < expected["authenticity"] < 1
    assert nearest.indices.tolist() == closest.tolist()
    assert [sample for sample, _ in nearest.most_alike(3)] == nearest.ratios.argsort()[:3].tolist()

    between = interpolate_to_neighbors(encoded.latents, normalize_latents(encoded.latents, pipeline.vae))
    with torch.no_grad():
        decoded = extractor(pipeline.vae.decode(between).sample.clamp(-1, 1))
    latent = latent_metrics(pipeline.vae, encoded, extractor, accelerator)
    distance = frechet_distance(FeatureStatistics.of(decoded), FeatureStatistics.of(real))
    assert latent["i" + extractor.distance_name("r")[1:]] == pytest.approx(distance, rel=1e-3)
    assert distance != pytest.approx(reconstruction_metrics(encoded, extractor)[extractor.distance_name("r")], rel=0.05)


def test_encoding_is_independent_of_the_batch_size(images, extractor, pipeline):
    one, many = (
        encode_images(pipeline.vae, images, Accelerator(), extractor=extractor, batch_size=size) for size in (1, 64)
    )
    assert len(one.latents) == len(images) == one.diagnostics.num_images
    for name in ("latents", "features", "reconstruction_features"):
        torch.testing.assert_close(getattr(one, name), getattr(many, name), rtol=1e-4, atol=1e-5)
    assert set(one.quality) == {"psnr", "ssim"}
    torch.testing.assert_close(one.quality, many.quality, rtol=1e-4, atol=1e-5)
    first, second = reconstruction_metrics(one, extractor), reconstruction_metrics(many, extractor)
    assert first.keys() == second.keys() and any(name.startswith("rfd_") for name in first)
    assert first["psnr"] == pytest.approx(second["psnr"], rel=1e-6)


def test_latent_metrics_have_a_probe_and_an_interpolation_distance(images, extractor, pipeline):
    encoded = encode_images(pipeline.vae, images, Accelerator(), extractor=extractor)
    labels = torch.tensor(images.labels)
    metrics = latent_metrics(pipeline.vae, encoded, extractor, Accelerator(), probe=(encoded.latents, labels, labels))
    assert metrics["effective_rank"] is None  # fewer images than latent elements
    assert any(name.startswith("ifd_") for name in metrics) and 0 <= metrics["probe_accuracy"] <= 1


def test_samples_depend_on_their_number_alone(pipeline, tmp_path):
    settings = SampleSettings(10, 2.0, 2)
    accelerator = Accelerator()
    whole = draw_samples(pipeline, settings, tmp_path / "a", accelerator, batch_size=10)[:]
    parts = draw_samples(pipeline, settings, tmp_path / "b", accelerator, batch_size=3, chunk_size=4)[:]
    assert whole.shape == (10, 3, 16, 16) and whole.dtype == torch.uint8
    assert (whole.int() - parts.int()).abs().max() <= 1  # rounding of other batch sizes
    with pytest.raises(UserError, match=r"draws images of the shape \(3, 16, 16\), .* have \(3, 8, 8\)"):
        draw_samples(pipeline, settings, tmp_path / "a", accelerator, batch_size=10, image_shape=(3, 8, 8))


def test_small_batches_are_drawn_in_one_call(pipeline, monkeypatch, tmp_path):
    """Rounding makes sixteen of each batch, of which all count."""
    original, counts = DAEDiTPipeline.__call__, []
    counted = wraps(original)(lambda self, **k: counts.append(len(k["class_labels"])) or original(self, **k))
    monkeypatch.setattr(DAEDiTPipeline, "__call__", counted)
    draw_samples(pipeline, SampleSettings(32, 1.0, 1), tmp_path, Accelerator(), batch_size=4)
    assert counts == [16, 16]


def test_classes_of_a_grid_have_their_own_names(tmp_path):
    """Pipelines may name some of their classes only."""
    samples, labels = torch.zeros(6, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 4, 7] * 2)
    grids = [sample_grid(samples, labels, names) for names in ({4: "dog", 7: "elk"}, {0: "0", 4: "dog", 7: "elk"}, {})]
    assert grids[0].tobytes() == grids[1].tobytes() != grids[2].tobytes()


def test_samples_do_not_depend_on_the_range_that_images_are_given_back_in(pipeline, tmp_path):
    settings = SampleSettings(4, 1.0, 1)
    plain = draw_samples(pipeline, settings, tmp_path / "plain", Accelerator())[:]
    parts = {name: pipeline.components[name] for name in ("transformer", "vae", "scheduler")}
    pipeline = DAEDiTPipeline(**parts, id2label=dict(pipeline.id2label), value_range=[-1000.0, 3000.0])
    scaled = draw_samples(pipeline, settings, tmp_path / "scaled", Accelerator())[:]
    assert plain.float().std() > 1 and (plain.int() - scaled.int()).abs().max() <= 1


def test_interrupted_drawing_goes_on(pipeline, tmp_path, monkeypatch):
    settings = SampleSettings(8, 1.0, 1)
    whole = draw_samples(pipeline, settings, tmp_path, Accelerator(), chunk_size=4)[:]
    (lost, kept) = sorted(tmp_path.rglob("*.safetensors"))
    lost.write_bytes(b"cut short")
    calls = []
    original = DAEDiTPipeline.__call__
    counted = wraps(original)(lambda self, *a, **k: calls.append(1) or original(self, *a, **k))
    monkeypatch.setattr(DAEDiTPipeline, "__call__", counted)
    again = draw_samples(pipeline, settings, tmp_path, Accelerator(), chunk_size=4)[:]
    assert torch.equal(whole, again) and len(calls) == 1


def test_drawn_images_are_read_from_their_files_by_slices(tmp_path):
    rows = torch.randint(256, (10, 3, 2, 2), dtype=torch.uint8)
    kept = cached_rows(
        lambda chunk: {"images": rows[chunk.start : chunk.stop]}, 10, Accelerator(), folder=tmp_path, of="x", chunk_size=4,
        load=False,
    )["images"]  # fmt: skip
    assert isinstance(kept, CachedRows) and len(kept) == 10 and len(list(tmp_path.rglob("*.safetensors"))) == 3
    for part in (slice(None), slice(0, 4), slice(3, 9), slice(8, 20), slice(-3, -1)):
        assert torch.equal(kept[part], rows[part])
    for nothing in (slice(4, 4), slice(10, 12), slice(0, 8, 2)):
        with pytest.raises(ValueError, match="only consecutive rows can be read"):
            kept[nothing]


def test_flipped_bits_in_kept_rows_and_values_are_said_once_and_computed_again(tmp_path, caplog):
    rows, calls = torch.randn(10, 3, generator=torch.Generator().manual_seed(0)), []

    def compute(chunk: range) -> dict[str, torch.Tensor]:
        calls.append(chunk.start)
        return {"rows": rows[chunk.start : chunk.stop]}

    def keep_again(load: bool):
        calls.clear()
        caplog.clear()
        options = {"folder": tmp_path / "rows", "of": {"x": (1, 2)}, "chunk_size": 4}
        found = cached_rows(compute, 10, Accelerator(), **options, load=load)["rows"]
        values = cached_values(
            lambda: calls.append("values") or {"psnr": math.inf}, Accelerator(), folder=tmp_path, of=["x", (1, 2)]
        )
        assert torch.equal(found[:], rows) and values == {"psnr": math.inf}
        return list(calls)

    assert keep_again(True) == [0, 4, 8, "values"] and keep_again(True) == keep_again(False) == []
    first, second, third = sorted(tmp_path.rglob("*.safetensors"))
    (kept,) = tmp_path.glob("*.json")
    for path, redone in ((second, 4), (kept, "values")):
        whole = path.read_bytes()
        for content in (
            *(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :] for place in (len(whole) // 2, -2 % len(whole))),
            whole[:-3], b"", b"[]", b"[" * 10**5, b"\xff" * 40,
        ):  # fmt: skip
            path.write_bytes(content)
            assert keep_again(False) == [redone] and path.read_bytes() == whole
            assert len(caplog.messages) == 1 and str(path) in caplog.text
    second.write_bytes(first.read_bytes())  # other rows, and those of something else
    assert keep_again(True) == [4] and "made from something else" in caplog.text
    first.unlink()
    third.write_bytes(b"")
    assert keep_again(True) == [0, 8] and len(caplog.messages) == 1  # what is only missing is not worth a word


def test_samples_of_other_weights_or_settings_are_drawn_anew(pipeline, tmp_path):
    first = draw_samples(pipeline, SampleSettings(4, 1.0, 1), tmp_path, Accelerator())[:]
    draw_samples(pipeline, SampleSettings(4, 1.0, 2), tmp_path, Accelerator())
    with torch.no_grad():
        pipeline.transformer.proj_out.bias += 1
    changed = draw_samples(pipeline, SampleSettings(4, 1.0, 1), tmp_path, Accelerator())[:]
    assert not torch.equal(first, changed)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.filterwarnings("ignore:.*covariance is singular")
def test_each_drawing_has_noise_of_its_own_and_is_measured_once(images, extractor, pipeline, tmp_path, monkeypatch):
    training = training_features(extractor, images, images, Accelerator(), folder=tmp_path)
    given = (pipeline, SampleSettings(12, 1.0, 1), extractor, training, Accelerator())
    options = {"folder": tmp_path, "parts": tmp_path / "parts", "of": ["these images"]}
    one, other = measure_drawings(*given, num_drawings=2, **options)
    assert one.settings == given[1] and not torch.equal(one.samples[:], other.samples[:])
    for drawing in (one, other):
        metrics, nearest = sample_metrics(drawing.samples, extractor, training, Accelerator())
        assert drawing.metrics == pytest.approx(metrics, rel=1e-6)
        assert [tuple(pair) for pair in drawing.most_alike] == nearest.most_alike()
    monkeypatch.setattr(drawings, "sample_metrics", None)
    again = measure_drawings(*given, num_drawings=2, **options)
    assert [drawing.metrics for drawing in again] == [one.metrics, other.metrics]
    monkeypatch.undo()
    assert measure_drawings(*given, folder=tmp_path / "alone")[0].metrics == pytest.approx(one.metrics, rel=1e-6)
    assert [path.name for path in (tmp_path / "alone").iterdir()] == ["samples"]  # nothing else is kept unasked


def test_what_results_are_kept_under_is_the_same_in_every_process_and_names_the_features(images, extractor, pipeline):
    """diffusers notes the options that a scheduler's file did not have, in an order that is another in each process."""
    settings, keys = SampleSettings(1, 1.0, 1), []
    pipeline.scheduler = UniPCMultistepScheduler.from_config({})
    assert len(pipeline.scheduler.config["_use_default_values"]) > 1
    for _ in range(2):
        keys.append(fingerprint_of_json(generation_inputs(pipeline, settings, Accelerator())))
        pipeline.scheduler.register_to_config(
            _use_default_values=pipeline.scheduler.config["_use_default_values"][::-1]
        )
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    keys.append(fingerprint_of_json(generation_inputs(pipeline, settings, Accelerator())))
    assert keys[0] == keys[1] != keys[2]

    before = fingerprint_of_json(evaluation_inputs(pipeline.vae, images, extractor))
    extractor.name = "renamed"
    assert fingerprint_of_json(evaluation_inputs(pipeline.vae, images, extractor)) != before


def test_gap_is_measured_with_the_pipelines_own_autoencoder(extractor_folder, image_folder, pipeline, tmp_path, caplog):
    pipeline.save_pretrained(tmp_path / "pipeline")
    with torch.no_grad():
        pipeline.vae.decoder.conv_out.bias += 0.1
    pipeline.vae.save_pretrained(tmp_path / "vae")
    flags = "--resolution 16 --validation_fraction 0.5 --num_images 12 --num_inference_steps 1"
    folders = {"pipeline": tmp_path / "pipeline", "features": extractor_folder, "train_data_dir": image_folder}
    with pytest.raises(UserError, match="is not the autoencoder that `--pipeline` .* decodes with"):
        run(evaluate, flags, output_dir=tmp_path / "evaluation", vae=tmp_path / "vae", **folders)
    AcceleratorState._reset_state(reset_partial_state=True)
    with caplog.at_level(logging.INFO):
        loaded = load_autoencoder(str(tmp_path / "pipeline"))
    assert evaluate.has_same_weights(loaded, make_autoencoder("none").to_diffusers())
    assert f"the autoencoder is `vae` of {tmp_path / 'pipeline'}" in caplog.messages


def test_results_are_json_whatever_they_hold():
    results = {"psnr": math.inf, "rows": ({"kl": [1.0, math.nan]}, None), "name": "x", "number": 3}
    expected = {"psnr": None, "rows": [{"kl": [1.0, None]}, None], "name": "x", "number": 3}
    assert finite_or_none(results) == expected


def test_sweep_is_drawn_over_what_was_swept(tmp_path, monkeypatch):
    labels = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: labels.append(figure.axes[0].get_xlabel()))
    for scales, steps in (((1.0,), (5, 10)), ((1.0, 2.0), (5,)), ((1.0, 2.0), (5, 10)), ((None,), (5, 10))):
        rows = [
            {"guidance_scale": scale, "num_inference_steps": count, "gfd": 1.0} for scale in scales for count in steps
        ]
        plot_sweep(rows, "gfd", tmp_path / "sweep.png")
    rows = [
        {"guidance_scale": scale, "guidance_interval": levels, "num_inference_steps": 5, "gfd": 1.0}
        for scale in (1.0, 2.0)
        for levels in ((0, 1), (0, 0.8))
    ]
    legends = []
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *_, **__: legends.extend(figure.axes[0].get_legend_handles_labels()[1])
    )
    plot_sweep(rows, "gfd", tmp_path / "sweep.png")
    assert legends == ["from 0 to 1, 5 steps", "from 0 to 0.8, 5 steps"]
    assert labels == ["steps", "guidance scale", "guidance scale", "steps"]


def test_labels_are_as_in_the_data_balanced_or_random():
    assert SampleSettings(7, 1.0, 1).labels(3).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert SampleSettings(7, 1.0, 1, class_counts=(5, 5, 5)).labels(3).tolist() == [0, 1, 2, 0, 1, 2, 0]
    labels = SampleSettings(1000, 1.0, 1, class_counts=(900, 0, 100)).labels(3)
    assert labels.bincount().tolist() == [900, 0, 100]
    assert labels[:50].bincount().tolist() == [45, 0, 5]  # so is every beginning
    assert SampleSettings(3, 1.0, 1, "balanced", class_counts=(9, 1)).labels(2).tolist() == [0, 1, 0]
    random = SampleSettings(4000, 1.0, 1, "random").labels(4)
    torch.testing.assert_close(random.bincount() / 4000, torch.full((4,), 0.25), atol=0.03, rtol=0)
    assert SampleSettings(7, 1.0, 1).labels(None) is None


def test_sample_metrics_of_the_training_images_themselves(images, extractor, pipeline):
    accelerator = Accelerator()
    encoded = encode_images(pipeline.vae, images, accelerator, extractor=extractor)
    pixels = torch.stack([images[n]["pixel_values"] for n in range(len(images))])
    samples = ((pixels + 1) * 127.5).round().to(torch.uint8)
    reference = FeatureStatistics.of(encoded.features)
    training = TrainingFeatures(reference, encoded.features, encoded.reconstruction_features)
    metrics, nearest = sample_metrics(samples, extractor, training, accelerator)
    expected_gap = frechet_distance(reference, FeatureStatistics.of(encoded.reconstruction_features))
    assert nearest.indices.tolist() == list(range(len(images)))
    assert metrics["authenticity"] == 0
    assert metrics["precision"] == metrics["recall"] == metrics["coverage"] == 1
    distance = next(value for name, value in metrics.items() if name.startswith("gfd_"))
    assert distance == pytest.approx(0, abs=1e-6)
    assert metrics["gap"] == pytest.approx(expected_gap, rel=1e-4)
    # A copy of an image that the other metrics do not look at is a copy too.
    others = TrainingFeatures(reference, encoded.features[:6], copied=encoded.features)
    metrics, nearest = sample_metrics(samples, extractor, others, accelerator)
    assert metrics["authenticity"] == 0 and nearest.indices.tolist() == list(range(len(images)))


@pytest.mark.parametrize("times", [2, 3, 20])
def test_images_that_occur_several_times_change_nothing(times, extractor):
    """Neither whether samples count as copies, nor the balls of precision, density and coverage."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(80, 16, generator=generator)
    samples = torch.randn(80, 16, generator=generator)
    samples[:20] = features[:20] + 0.01 * samples[:20]
    rounding = 1 + 1e-7 * torch.randn(80 * times, 1, generator=generator)
    repeated = features.repeat_interleave(times, 0) * rounding
    reference = FeatureStatistics.of(features)
    once, nearest = feature_metrics(samples, extractor, TrainingFeatures(reference, features, copied=features))
    again, found = feature_metrics(samples, extractor, TrainingFeatures(reference, features, copied=repeated))
    assert 0 < once["authenticity"] < 1 and once == again
    torch.testing.assert_close(found.ratios, nearest.ratios, rtol=1e-4, atol=1e-6)
    assert (found.indices // times).tolist() == nearest.indices.tolist()
    all_of_them = feature_metrics(samples.repeat(times, 1), extractor, TrainingFeatures(reference, repeated))[0]
    for name in ("density", "coverage"):
        assert all_of_them[name] == pytest.approx(once[name])


def test_class_agreement_is_the_share_of_images_that_look_like_the_class_that_was_asked_for():
    labels = torch.arange(300) % 3
    features = torch.nn.functional.one_hot(labels).float() + 0.1 * torch.randn(300, 3)
    asked = torch.tensor([0, 0, 1, 2])
    drawn = features[:3][torch.tensor([0, 1, 1, 0])]  # two of the four are of another class
    right, wrong = class_agreement(features, labels, [features, drawn], [labels, asked])
    assert right.all() and wrong.tolist() == [True, False, True, False]
    assert share_by_class(wrong, asked, 4) == [0.5, 1.0, 0.0, None]


def test_two_processes_and_any_batch_size_give_the_same_numbers(extractor_folder, pipeline, tmp_path):
    """The script itself, on 1,797 real digits, to 1e-6."""
    vae = make_autoencoder("none", in_channels=1, out_channels=1).to_diffusers()
    transformer = make_random_transformer(num_classes=10)
    DAEDiTPipeline(transformer, vae, pipeline.scheduler).save_pretrained(tmp_path / "pipeline")
    flags = "--dataset_name digits --num_images 100 --num_inference_steps 2 --num_drawings 2 --more_features pixels"
    results = []
    for processes, batch_size in ((1, 64), (1, 1), (2, 7)):
        folder = tmp_path / f"{processes}-{batch_size}"
        process = launch(
            "evaluate", flags, processes=processes, pipeline=tmp_path / "pipeline", features=extractor_folder,
            batch_size=batch_size, output_dir=folder,
        )  # fmt: skip
        succeed(process)
        results.append(json.loads((folder / "metrics.json").read_text()))
    parts = ("reconstruction", "latent_space", "generation", "floor", "judge", "classes")
    expected = [dict(numbers_in(results[0][part])) for part in parts]
    assert len(expected[0]) >= 3 and len(expected[1]) >= 8 and len(expected[2]) >= 8
    for result in results[1:]:
        assert [dict(numbers_in(result[part])) for part in parts] == [pytest.approx(e, rel=1e-6) for e in expected]
    (row,), floor, classes = (results[0][name] for name in ("generation", "floor", "classes"))
    shares = [each["class_agreement"] for each in classes]
    assert len(classes) == 10
    assert sum(each["training_images"] for each in classes) == results[0]["setting"]["train_images"]["number"]
    assert row["class_agreement"] == pytest.approx(sum(shares) / 10, abs=0.02)  # classes are drawn about equally often
    assert floor["generation"]["real"]["class_agreement"] > 0.3  # by an untrained judge; chance is 0.1
    (distance,) = (
        {name for name in row if name.startswith("gfd_")}
        - {"gfd_pixels", "gfd_pixels_sd"}
        - {name for name in row if name.endswith("_sd")}
    )
    assert row["num_drawings"] == 2 and 0 < row[f"{distance}_sd"] < row[distance] and row["gfd_pixels_sd"] > 0
    # The second judge measures what it measures alone, on the drawing with the given seed and on one more.
    alone = tmp_path / "alone"
    flags = flags.replace("--num_drawings 2 --more_features pixels", "--features pixels")
    succeed(launch("evaluate", flags, pipeline=tmp_path / "pipeline", output_dir=alone))
    alone = json.loads((alone / "metrics.json").read_text())
    first = alone["generation"][0]["gfd_pixels"]
    assert abs(first - row["gfd_pixels"]) == pytest.approx(row["gfd_pixels_sd"] / 2**0.5, rel=1e-4)
    assert floor["generation"]["real"]["gfd_pixels"] == pytest.approx(
        alone["floor"]["generation"]["real"]["gfd_pixels"]
    )
    assert floor["reconstruction"]["rfd_pixels"] == pytest.approx(alone["floor"]["reconstruction"]["rfd_pixels"])
    assert results[0]["reconstruction"]["rfd_pixels"] == pytest.approx(alone["reconstruction"]["rfd_pixels"])
    text = (tmp_path / "1-64" / "metrics.md").read_text()
    assert f"{row[distance]:.4g} ± {row[f'{distance}_sd']:.2g}" in text and "_sd" not in text


def numbers_in(value, path=""):
    if isinstance(value, (int, float)):
        yield path, value
    elif isinstance(value, (list, dict)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from numbers_in(inner, f"{path}/{key}")


class Painter(DiffusionPipeline):
    """Text to image: paints as bright as the text is long, with a little noise."""

    def __init__(self, scheduler):
        super().__init__()
        self.register_modules(scheduler=scheduler)

    def __call__(self, prompt, num_inference_steps=1, generator=None, output_type="pil"):
        assert output_type == "np"
        noise = [torch.rand(4, 4, 3, generator=each) for each in generator]
        images = torch.stack([len(text) / 100 + (each - 0.5) / 50 for text, each in zip(prompt, noise, strict=True)])
        return SimpleNamespace(images=images.numpy())


def test_text_to_image_pipelines_draw_the_prompt_of_each_class(tmp_path):
    settings = SampleSettings(7, 3.0, 2, prompts=("a cat", "a dromedary"))
    samples = draw_samples(Painter(DDPMScheduler()), settings, tmp_path, Accelerator(), batch_size=3)[:]
    assert samples.shape == (7, 3, 4, 4)
    assert samples.float().mean(dim=(1, 2, 3)).tolist() == pytest.approx([12.75, 28.05] * 3 + [12.75], abs=1)
    assert len(samples.flatten(1).unique(dim=0)) == 7
    with pytest.raises(UserError, match="give `prompt`"):
        Sampler(Painter(DDPMScheduler()))
    with pytest.raises(UserError, match=r"\(3, 4, 4\), but the images to compare with have \(3, 8, 8\)"):
        draw_samples(Painter(DDPMScheduler()), settings, tmp_path / "b", Accelerator(), image_shape=(3, 8, 8))


def test_images_that_are_not_finite_are_refused(tmp_path):
    class Spoilt(Painter):
        def __call__(self, prompt, num_inference_steps=1, generator=None, output_type="np"):
            images = super().__call__(prompt, num_inference_steps, generator, output_type).images
            return SimpleNamespace(images=np.where(images > images.mean(), np.nan, images))

    settings = SampleSettings(2, 3.0, 2, prompts=("a cat",))
    with pytest.raises(UserError, match="drawn images that hold NaN or infinite numbers. Draw in float32"):
        draw_samples(Spoilt(DDPMScheduler()), settings, tmp_path, Accelerator())
    prior = make_prior_pipeline()
    with torch.no_grad():
        next(prior.prior.parameters()).fill_(float("nan"))
    with pytest.raises(UserError, match="no image can be drawn: the prior predicts numbers that are not finite"):
        draw_samples(prior, SampleSettings(2, 1.0, 2), tmp_path, Accelerator())


def test_time_of_drawing_is_said_where_that_costs_little(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    sampler = Sampler(Painter(DDPMScheduler()), ("a cat", "a dog"))
    sweep = [SampleSettings(160, scale, 25, prompts=("a cat", "a dog")) for scale in (1.0, 3.0)]
    say_duration(sampler, sweep[:1], tmp_path, Accelerator(), 64)  # 75 steps of a batch
    assert caplog.text == ""
    say_duration(sampler, sweep, tmp_path, Accelerator(), 16)
    assert "drawing 160 images for each of 2 settings takes about 1 second" in caplog.text
    caplog.clear()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "0.safetensors").touch()
    say_duration(sampler, sweep, tmp_path, Accelerator(), 16)
    assert caplog.text == ""


def test_drawn_classes_are_as_frequent_as_those_of_the_images_and_matched_by_name(caplog):
    pipeline = SimpleNamespace(id2label={0: "dog", 1: "ant", 2: "cat"}, null_class=3)
    images = SimpleNamespace(labels=[0, 0, 0, 1], id2label={0: "cat", 1: "dog"})
    assert class_counts(pipeline, images, 3) == (1, 0, 3)
    images.id2label |= {0: "wolf"}  # unknown to it: by number, which every caller says
    assert not caplog.messages
    for _ in range(2):
        assert class_counts(pipeline, images, 3) == (3, 1, 0)
    assert len(caplog.messages) == 1 and "a class 'wolf' that the pipeline does not know" in caplog.text
    assert class_counts(pipeline, images, None) is None
    with pytest.raises(UserError, match="knows 3 classes, but the images have a label 3"):
        ids_in_pipeline(pipeline, SimpleNamespace(labels=[3], id2label={3: "elk"}))


def test_labels_that_the_images_do_not_give_are_recorded_as_balanced(pipeline, caplog):
    sampling = SamplingConfig(num_images=4)
    images = SimpleNamespace(labels=[0, 0, 1], id2label={0: "cat", 1: "dog"}, captions=None)
    (setting,) = swept_settings(sampling, 0, Sampler(pipeline), images)
    assert setting.label_sampling == "data" and setting.class_counts[:2] == (2, 1) and not caplog.messages
    images.labels = None
    (setting,) = swept_settings(sampling, 0, Sampler(pipeline), images)
    assert setting.label_sampling == "balanced" and "each class is generated equally often" in caplog.text


def test_a_pipeline_is_measured_as_it_draws_by_default(pipeline, images, tmp_path):
    def settings(of, **given):
        sampling = SamplingConfig(num_images=4, **given)
        return [
            (each.guidance_scale, each.num_inference_steps) for each in swept_settings(sampling, 0, Sampler(of), images)
        ]

    assert settings(pipeline) == [(1.0, 25)]
    own = DAEDiTPipeline(**pipeline.components, default_guidance_scale=1.5, default_num_inference_steps=7)
    assert settings(own) == [(1.5, 7)]
    assert settings(DAEDiTPipeline(**pipeline.components, default_guidance_scale=0.0)) == [(0.0, 7)]
    assert settings(own, guidance_scales=[1.0, 3.0]) == [(1.0, 7), (3.0, 7)]
    intervals = [0.0, 1.0, 0.0, 0.8]
    sampling = SamplingConfig(num_images=4, guidance_scales=[1.0, 2.0], guidance_intervals=intervals)
    swept = swept_settings(sampling, 0, Sampler(own), images)
    assert [(each.guidance_scale, each.guidance_interval) for each in swept] == [
        (1.0, (0.0, 1.0)),  # once: without guidance its interval changes nothing
        (2.0, (0.0, 1.0)),
        (2.0, (0.0, 0.8)),
    ]
    own.save_pretrained(tmp_path)
    rows = [{"gfd_x": number, **each.given()} for number, each in zip((3.0, 2.0, 1.0), swept, strict=True)]
    (tmp_path / "pipeline.py").write_text("# of an earlier version")
    set_defaults(str(tmp_path), None, rows, "gfd_x")
    assert "default_guidance_interval" in (tmp_path / "pipeline.py").read_text()
    own_code = (tmp_path / "pipeline.py").read_text() + "\n# changed by its user\n"
    (tmp_path / "pipeline.py").write_text(own_code)
    set_defaults(str(tmp_path), None, rows, "gfd_x")
    assert (tmp_path / "pipeline.py").read_text() == own_code  # it knows these defaults
    limited = DAEDiTPipeline.from_pretrained(tmp_path)
    assert limited.call_defaults == {
        "guidance_scale": 2, "guidance_interval": (0, 0.8), "num_inference_steps": 7, "velocity_scale": 1
    }  # fmt: skip
    rows = [{"gfd_x": 0.0, **swept[0].given()}]  # without guidance the interval stays
    set_defaults(str(tmp_path), None, rows, "gfd_x")
    kept = DAEDiTPipeline.from_pretrained(tmp_path).call_defaults
    assert (kept["guidance_scale"], kept["guidance_interval"]) == (1, (0, 0.8))
    (setting,) = swept_settings(SamplingConfig(num_images=4), 0, Sampler(limited), images)
    assert (
        setting.guidance_interval == (0, 0.8) and name_of_setting(setting.given()) == "guidance-2-from-0-to-0.8-steps-7"
    )
    own.save_pretrained(tmp_path)
    row = {"gfd_x": 1.0, "guidance_scale": None, "num_inference_steps": 9}  # as where there is nothing to guide
    set_defaults(str(tmp_path), None, [row], "gfd_x")
    assert settings(DAEDiTPipeline.from_pretrained(tmp_path)) == [(1.5, 9)]


def test_samples_of_arrays_are_in_the_range_of_the_training_images(tmp_path):
    for name, scale in (("train", 1.0), ("drawn", 0.5)):
        (tmp_path / name).mkdir()
        for number in range(12):
            image = np.random.default_rng(number).random((8, 8, 1), dtype=np.float32)
            np.save(tmp_path / name / f"{number}.npy", scale * image)
    data = DataConfig(train_data_dir=str(tmp_path / "train"), resolution=8, image_channels=1)
    train, _ = load_images(data)
    samples = load_samples(str(tmp_path / "drawn"), data, train.value_range, 10)
    assert len(samples) == 10 and samples.max() <= 128


def test_samples_of_all_folders_count_whatever_their_names(tmp_path):
    for name in ("train", "validation", "test"):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "0.npy", np.full((8, 8, 1), 0.5, dtype=np.float32))
    data = DataConfig(train_data_dir=str(tmp_path), resolution=8, image_channels=1)
    assert len(load_samples(str(tmp_path), data, [0.0, 1.0], 10)) == 3


def test_flags_that_choose_nothing_are_named(pipeline, caplog):
    check_options(SamplingConfig(num_images=4, draw_from="validation"), Sampler(pipeline))
    assert "`--draw_from` has no effect" in caplog.text and "`--label_sampling`" not in caplog.text


def test_velocity_scale_is_measured_and_becomes_the_default(pipeline, images, tmp_path):
    sampling = SamplingConfig(num_images=4, velocity_scale=1.1)
    (setting,) = swept_settings(sampling, 0, Sampler(pipeline), images)
    assert setting.call_kwargs()["velocity_scale"] == 1.1
    pipeline.save_pretrained(tmp_path)
    set_defaults(str(tmp_path), None, [{"gfd_x": 1.0, **setting.given()}], "gfd_x")
    again = DAEDiTPipeline.from_pretrained(tmp_path)
    (setting,) = swept_settings(SamplingConfig(num_images=4), 0, Sampler(again), images)
    assert setting.velocity_scale == 1.1  # so that samples which are kept of another scale do not count
    (setting,) = swept_settings(SamplingConfig(num_images=4), 0, Sampler(pipeline), images)
    assert "velocity_scale" not in setting.given()
    check_options(sampling, Sampler(again))
    again.is_flow_matching = False
    with pytest.raises(UserError, match="`velocity_scale` means nothing to DAEDiTPipeline"):
        check_options(sampling, Sampler(again))


def test_captions_mean_nothing_to_a_pipeline_without_text(pipeline):
    given = {
        "labels": [0] * 9 + [1],
        "id2label": {0: "cat", 1: "dog"},
        "captions": [["a cat"]] * 10,
        "conditions": None,
    }
    images = type("Images", (), {"__len__": lambda self: 10, **given})()
    sampling = SamplingConfig(num_images=10)
    sampler = Sampler(pipeline, **what_to_draw(sampling, images, pipeline))
    (setting,) = swept_settings(sampling, 0, sampler, images)
    assert torch.bincount(setting.labels(sampler.num_classes)).tolist() == [9, 1]


def test_captions_are_drawn_in_a_mixed_order_with_the_class_of_their_name():
    labels = [0] * 30 + [1] * 30
    captions = [[f"a {'cat' if label == 0 else 'dog'}"] for label in labels]
    given = {"labels": labels, "id2label": {0: "cat", 1: "dog"}, "captions": captions, "conditions": None}
    images = type("Images", (), {"__len__": lambda self: 60, **given})()
    pipeline = SimpleNamespace(id2label={0: "dog", 1: "cat", 2: "owl"}, null_class=3, takes_text=True)
    found = prompts_of_images(images, 20, pipeline)
    assert {*zip(found["prompts"], found["classes"], strict=True)} == {("a cat", 1), ("a dog", 0)}
    assert 5 < sum(prompt == "a cat" for prompt in found["prompts"]) < 15  # not the first class alone


def test_prompts_name_the_classes_of_the_images(images):
    for prompt, expected in (("a photo of a {label}", ("a photo of a cat", "a photo of a dog")), ("{}", ("{}",))):
        assert prompts_of(prompt, images.id2label) == expected
    assert prompts_of(None, images.id2label) is None
    with pytest.raises(UserError, match="no labels"):
        prompts_of("a {label}", None)


def test_pipelines_that_cannot_be_called_are_named():
    class Upscaler(Painter):
        def __call__(self, image):
            pass

    with pytest.raises(UserError, match=r"a Upscaler cannot be evaluated: .* but \['image'\]"):
        Sampler(Upscaler(DDPMScheduler()))


@pytest.mark.filterwarnings("ignore:.*covariance is singular")
def test_unconditional_pipelines_without_an_autoencoder_are_evaluated(
    extractor_folder, extractor, image_folder, images, tmp_path
):
    unet = UNet2DModel(
        sample_size=16, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    flags = "--validation_fraction 0.5 --guidance_scales 1 2 --num_inference_steps 1 2"
    folders = {"pipeline": tmp_path / "ddpm", "features": extractor_folder, "train_data_dir": image_folder}
    run(evaluate, flags, output_dir=tmp_path / "evaluation", **folders)
    results = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())
    assert "reconstruction" not in results and "latent_space" not in results
    assert [row["num_inference_steps"] for row in results["generation"]] == [1, 2]  # nothing is guided
    assert all("gap" not in row and "guidance_scale" not in row for row in results["generation"])
    assert results["setting"]["weights"] == {"unet": weights_fingerprint_of(tmp_path / "ddpm" / "unet")}
    assert results["setting"]["pipeline"] == "DDPMPipeline" and results["setting"]["features"]["fingerprint"]
    report = (tmp_path / "evaluation" / "metrics.md").read_text()
    assert "DDPMScheduler" in report
    assert {row["num_images"] for row in results["generation"]} == {len(images)}  # as many as training images
    floor, held_out = results["floor"]["generation"], load_images(images.config)[1]
    features = [extractor(torch.stack([each["pixel_values"] for each in split])) for split in (held_out, images)]
    chosen = as_in_training(images, held_out, min(map(len, features)))
    number = len(chosen)
    expected = frechet_distance(*map(FeatureStatistics.of, (features[0][chosen], features[1])))
    assert floor["num_images"] == number
    assert floor["real"][extractor.distance_name("g")] == pytest.approx(expected, rel=1e-5)
    assert [row.keys() for row in floor["samples"]] == [floor["real"].keys()] * 2
    assert "| **real** |" in report and f"{extractor.distance_name('g')} ↓" in report and "precision ↑" in report
    assert 0 <= results["judge"]["judge_accuracy"] <= 1 and "Judge: " in report
    pictures = sorted(path.name for path in (tmp_path / "evaluation").glob("*.png"))
    assert pictures == [
        "nearest-steps-1.png",
        "nearest-steps-2.png",
        "samples-steps-1.png",
        "samples-steps-2.png",
        "sweep.png",
    ]
    (compared,), _ = read_runs([tmp_path / "evaluation"])
    table = write_tables([compared], [])
    best = min(results["generation"], key=lambda row: row[extractor.distance_name("g")])
    words = (
        f"{len(images)} ({images.fingerprint})",
        extractor.fingerprint,
        f"{best['num_inference_steps']} step",
        "best of 2",
    )
    assert all(each in table for each in words) and "reconstruct" not in table
    with Image.open(tmp_path / "evaluation" / f"samples-{name_of_setting(best)}.png") as grid:
        assert side_by_side([compared]).width == grid.width


@pytest.mark.parametrize(
    ("train", "held_out", "limit", "expected"),
    [
        ([0] * 30 + [1] * 10, [0, 1] * 10, 20, [10, 3]),  # three to one, and no more of class 0 than there are
        ([0] * 30 + [1] * 10, [0, 1] * 10, 8, [6, 2]),
        ([0] * 30 + [1] * 10, [0] * 2 + [1] * 20, 22, [2, 20]),  # too few of class 0: as they are
        (None, [0] * 5, 3, [3]),
    ],
)
def test_real_images_have_the_classes_of_training(train, held_out, limit, expected):
    names = {0: "cat", 1: "dog"}
    given, others = (SimpleNamespace(labels=train, id2label=names), MeasuredLabels(held_out))
    chosen = as_in_training(given, others, limit)
    assert torch.tensor(held_out)[chosen].bincount().tolist() == expected and chosen == sorted(set(chosen))


class MeasuredLabels(SimpleNamespace):
    def __init__(self, labels):
        super().__init__(labels=labels)

    def __len__(self):
        return len(self.labels)


@pytest.mark.parametrize(("share", "warns"), [(0.57, False), (0.5, False), (0.34, True)])
def test_a_model_that_copies_is_named(share, warns):
    rows = [{"authenticity": 0.6}, {"authenticity": share}]
    lines = copies_lines(rows, {"num_images": 297, "real": {"authenticity": 0.57}})
    assert bool(lines) == warns and (not warns or "34% of its samples are authentic, but 57%" in lines[0])
    assert copies_lines(rows, {}) == []


def test_autoencoder_of_a_pipeline_is_one_that_can_be_measured(pipeline):
    assert autoencoder_of(pipeline) is pipeline.vae
    assert autoencoder_of(Painter(DDPMScheduler())) is None
    assert autoencoder_of(SimpleNamespace(components={"vae": make_video_autoencoder()})) is None


@pytest.mark.parametrize("subfolder", ["", "vae"])
def test_autoencoders_of_another_class_are_refused(tmp_path, subfolder):
    make_video_autoencoder().save_pretrained(tmp_path / subfolder)
    with pytest.raises(UserError, match="its class AutoencoderKLWan cannot encode and decode images"):
        load_autoencoder(str(tmp_path))


def test_autoencoder_whose_config_names_no_class_is_an_autoencoder_kl(pipeline, tmp_path):
    pipeline.vae.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["_class_name"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert type(load_autoencoder(str(tmp_path))) is type(pipeline.vae)


def test_warning_stands_below_the_tables_where_images_are_few():
    setting = {"features": {"dim": 64}, "validation_images": {"number": 100}, "train_images": {"number": 100}}
    assert few_images_lines(setting, {"generation": [{"num_images": 65}]}) == []
    (line, _) = few_images_lines(setting, {"generation": [{"num_images": 64}, {"num_images": 999}]})
    assert line.startswith("**Warning:** 64 images for 64 features")
    assert few_images_lines({**setting, "features": None}, {}) == []


@pytest.mark.filterwarnings("ignore:.*covariance is singular")
def test_a_folder_of_images_takes_the_place_of_samples(image_folder, tmp_path):
    flags = "--features pixels --more_features spectrum --validation_fraction 0.5"
    folders = {"train_data_dir": image_folder, "samples_dir": image_folder, "output_dir": tmp_path}
    run(evaluate, flags, **folders)
    results = json.loads((tmp_path / "metrics.json").read_text())
    (row,), number = results["generation"], sum(1 for _ in image_folder.rglob("*.png"))
    assert row["num_images"] == number and row["authenticity"] <= 0.5  # half of them are training images
    assert row["gfd_spectrum"] >= 0 and results["floor"]["generation"]["real"]["gfd_pixels"] >= 0
    assert (tmp_path / "nearest-given.png").exists() and "reconstruction" not in results
    run(evaluate, f"{flags} --num_images 8 --resolution 8", **folders)
    assert json.loads((tmp_path / "metrics.json").read_text())["generation"][0]["num_images"] == 8
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds no pictures. Of arrays, give their size as `resolution`"):
        run(evaluate, flags, **folders | {"samples_dir": tmp_path / "empty"})
    with pytest.raises((UserError, SystemExit)):
        run(evaluate, flags, **folders, vae=tmp_path)


def test_schedulers_are_compared_and_the_best_is_kept(pipeline, images, tmp_path):
    """Drawn by a scheduler of its own class, images are the pipeline's own; its scheduler is the same afterwards."""
    own = type(pipeline.scheduler).__name__
    sampling = SamplingConfig(num_images=4, num_inference_steps=[4], schedulers=[own, "UniPCMultistep"])
    sampler = Sampler(pipeline)
    check_options(sampling, sampler)
    same, other = swept_settings(sampling, 0, sampler, images)
    assert [each.scheduler for each in (same, other)] == [own, "UniPCMultistepScheduler"]
    assert name_of_setting(other.given()).endswith("steps-4-by-UniPCMultistep")

    def drawn(settings):
        with drawing_by(pipeline, settings.scheduler):
            assert type(pipeline.scheduler).__name__ == settings.scheduler or settings.scheduler is None
            ((batch, _),) = image_batches(pipeline, settings, Accelerator(), 4)(range(4))
        return batch

    plain = drawn(replace(same, scheduler=None))
    assert torch.equal(drawn(same), plain) and not torch.equal(drawn(other), plain)
    assert type(pipeline.scheduler).__name__ == own
    pipeline.save_pretrained(tmp_path)
    rows = [{"gfd_x": distance, **each.given()} for distance, each in ((2.0, same), (1.0, other))]
    set_defaults(str(tmp_path), pipeline, rows, "gfd_x")
    kept = DAEDiTPipeline.from_pretrained(tmp_path)
    assert type(kept.scheduler).__name__ == "UniPCMultistepScheduler"
    assert kept.call_defaults["num_inference_steps"] == 4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("DDIM", "`schedulers` DDIM does not suit the pipeline: .*flow matching"),
        ("UniPCMultistepp", "no scheduler 'UniPCMultistepp'. Did you mean UniPCMultistep"),
        ("unipc", "^`schedulers`: diffusers has no scheduler 'unipc'. Did you mean UniPCMultistep"),
        ("CosineDPMSolverMultistep", "needs a package that is not installed: .*torchsde"),
        ("qqq", "Such names are"),
        ("ModelMixin", "Such names are"),
    ],
)
def test_schedulers_that_cannot_draw_are_refused(pipeline, name, message):
    with pytest.raises(UserError, match=message):
        check_options(SamplingConfig(num_images=4, schedulers=[name]), Sampler(pipeline))
