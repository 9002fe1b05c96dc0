"""Feature extractors, statistics, distances and image quality: each against its definition written the slow way."""

import importlib.machinery
import importlib.util
import json
import logging
import math
import sys
import types
import urllib.error

import numpy as np
import pytest
import scipy.linalg
import torch
from accelerate.state import AcceleratorState
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure
from torchmetrics.image.kid import poly_mmd
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    ResNetConfig,
    ResNetForImageClassification,
    ResNetModel,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTModel,
)

import dae_diffusers.metrics.distances as distances
from dae_diffusers.cli import parse_config
from dae_diffusers.data import DataConfig, load_images
from dae_diffusers.errors import UserError
from dae_diffusers.metrics.distances import (
    density_coverage,
    frechet_distance,
    inception_score,
    kernel_distance,
    nearest_neighbors,
    precision_recall,
)
from dae_diffusers.metrics.features import load_feature_extractor, prepare_images
from dae_diffusers.metrics.image_quality import (
    image_measures,
    load_lpips,
    peak_signal_to_noise_ratio,
    structural_similarity,
)
from dae_diffusers.metrics.interpolation import interpolate_to_neighbors
from dae_diffusers.metrics.statistics import FeatureStatistics, reference_statistics
from dae_diffusers.script import run_script
from dae_diffusers.store import inputs_of_cached
from dae_diffusers.training import train_classifier
from dae_diffusers.training.settings import TrainClassifierConfig
from dae_diffusers.vision import load_backbone

PREPROCESSING = {"size": (16, 16), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
VIT = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def save_model(folder, model, **processor):
    model.save_pretrained(folder)
    defaults = {"size": {"height": 16, "width": 16}, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
    (folder / "preprocessor_config.json").write_text(json.dumps(defaults | processor))
    return str(folder)


def tiny_resnet(cls=ResNetForImageClassification):
    config = ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 6], depths=[1, 1], layer_type="basic", num_labels=5, hidden_act="silu"
    )
    model = cls(config)
    for module in model.modules():  # statistics of a trained network, so that eval mode differs from train mode
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model


def random_images(num=5, channels=3, size=10):
    return torch.rand(num, channels, size, size) * 2 - 1


def saved_images(size):
    """Rounded to 8 bit, as from a file."""
    return (random_images(size=size) * 127.5 + 127.5).round() / 127.5 - 1


# Feature extractors


@pytest.fixture
def resnet_folder(tmp_path):
    (tmp_path / "My-ResNet").mkdir()
    return save_model(tmp_path / "My-ResNet", tiny_resnet())


@pytest.mark.parametrize("name", ["pixels", "spectrum"])
def test_images_from_memory_and_from_files_have_the_same_features(name):
    """Else what lies in files, such as samples, would differ from real images by the rounding to 8 bits alone."""
    rows, columns = torch.linspace(-0.9, 0.9, 32)[:, None], torch.linspace(0, 0.01, 32)
    smooth = torch.stack([(rows + columns * number).expand(3, 32, 32) for number in range(8)])
    from_files = ((smooth + 1) * 127.5).round().to(torch.uint8) / 127.5 - 1
    extractor = load_feature_extractor(name)
    assert torch.equal(extractor(smooth), extractor(from_files))


def test_features_do_not_depend_on_the_batch(resnet_folder):
    extractor, images = load_feature_extractor(resnet_folder), random_images()
    features = extractor(images)
    assert features.shape == (5, extractor.feature_dim) and features.dtype == torch.float32
    assert not features.requires_grad
    torch.testing.assert_close(torch.cat([extractor(image[None]) for image in images]), features, rtol=0, atol=1e-5)


def test_classifier_gives_the_logits_of_its_own_forward(resnet_folder):
    extractor, images = load_feature_extractor(resnet_folder), random_images()
    features, logits = extractor.features_and_logits(images)
    model = ResNetForImageClassification.from_pretrained(resnet_folder).eval()
    with torch.no_grad():
        inputs = prepare_images(images, **PREPROCESSING)
        expected, expected_features = model(inputs).logits, model.resnet(inputs).pooler_output[:, :, 0, 0]
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(features, expected_features)
    torch.testing.assert_close(extractor(images), features)
    assert (extractor.feature_dim, extractor.num_classes) == (6, 5)
    assert extractor.name == "my_resnet" and extractor.distance_name("r") == "rfd_my_resnet"


@pytest.mark.parametrize(
    "model_class, config",
    [
        (ViTModel, ViTConfig(**VIT, intermediate_size=16)),
        (ViTForImageClassification, ViTConfig(**VIT, intermediate_size=16, num_labels=3)),
        (Dinov2Model, Dinov2Config(**VIT, mlp_ratio=2)),
        # Its `base_model` is its encoder, whose output is not normalised.
        (DINOv3ViTModel, DINOv3ViTConfig(**VIT | {"hidden_size": 8}, intermediate_size=16, num_register_tokens=2)),
    ],
)
def test_vision_transformers_give_their_class_token(tmp_path, model_class, config):
    model, images = model_class(config), random_images()
    extractor = load_feature_extractor(save_model(tmp_path, model))
    backbone = model.eval().vit if hasattr(model, "classifier") else model.eval()
    with torch.no_grad():
        outputs = backbone(pixel_values=prepare_images(images, **PREPROCESSING))
    torch.testing.assert_close(extractor(images), outputs.last_hidden_state[:, 0])
    assert extractor.num_classes == (3 if hasattr(model, "classifier") else None)
    assert load_backbone(str(tmp_path)).patch_features(images).shape == (5, config.hidden_size, 2, 2)


def test_masked_autoencoders_see_the_whole_image(tmp_path):
    """Their own class hides three quarters of the patches, others in each call."""
    config = ViTMAEConfig(**VIT, intermediate_size=16, decoder_hidden_size=8, decoder_num_attention_heads=1)
    extractor, images = load_feature_extractor(save_model(tmp_path, ViTMAEForPreTraining(config))), random_images()
    assert torch.equal(extractor(images), extractor(images))
    assert load_feature_extractor(str(tmp_path)).fingerprint == extractor.fingerprint
    assert load_backbone(str(tmp_path)).patch_features(images).shape == (5, config.hidden_size, 2, 2)


def test_models_that_are_no_ruler_are_refused(tmp_path, monkeypatch):
    save_model(tmp_path, ViTModel(ViTConfig(**VIT, intermediate_size=16)))
    with monkeypatch.context() as patch, pytest.raises(UserError, match="ViTModel, whose features .* differ from call"):
        patch.setattr(ViTModel, "forward", lambda self, pixel_values: (torch.rand(1, 5, 8),))
        load_feature_extractor(str(tmp_path))
    with monkeypatch.context() as patch, pytest.raises(UserError, match="does not work with images alone: .*no_mask"):
        patch.setattr(ViTModel, "forward", lambda self, pixel_values, no_mask: None)
        load_backbone(str(tmp_path))
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"do_flip_channel_order": True}))
    with pytest.raises(UserError, match="swaps red and blue"):
        load_feature_extractor(str(tmp_path))


def test_only_the_vision_half_of_clip_is_used(tmp_path):
    half = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(text_config=half | {"vocab_size": 10}, vision_config=half | {"image_size": 16, "patch_size": 8})
    model, images = CLIPModel(config).eval(), random_images()
    extractor = load_feature_extractor(save_model(tmp_path, model))
    with torch.no_grad():
        expected = model.vision_model(prepare_images(images, **PREPROCESSING)).pooler_output
    torch.testing.assert_close(extractor(images), expected)


def test_features_do_not_depend_on_train_mode_or_autocast(resnet_folder):
    extractor, images = load_feature_extractor(resnet_folder), random_images()
    features = extractor(images)
    extractor.train()
    assert torch.equal(extractor(images), features)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(extractor(images), features)


def test_grayscale_equals_its_repetition(resnet_folder):
    extractor, gray = load_feature_extractor(resnet_folder), random_images(channels=1)
    assert torch.equal(extractor(gray), extractor(gray.expand(-1, 3, -1, -1)))


def test_features_are_those_of_the_saved_image(resnet_folder):
    images = random_images() * 1.1  # a decoder overshoots
    saved = (images.clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)
    from_file = saved.float() / 127.5 - 1
    extractor = load_feature_extractor(resnet_folder)
    assert torch.equal(extractor(images), extractor(from_file))
    assert not torch.equal(extractor(from_file + 2 / 255), extractor(from_file))


def test_fingerprint_tells_weights_apart(tmp_path, resnet_folder):
    extractor = load_feature_extractor(resnet_folder)
    assert extractor.fingerprint == load_feature_extractor(resnet_folder).fingerprint
    assert extractor.fingerprint != load_feature_extractor(save_model(tmp_path, tiny_resnet())).fingerprint


def test_normalisation_is_that_of_images_in_0_1():
    images = saved_images(size=16)
    prepared = prepare_images(images, **PREPROCESSING)
    mean, std = (torch.tensor(PREPROCESSING[name]).view(3, 1, 1) for name in ("mean", "std"))
    torch.testing.assert_close(prepared, ((images + 1) / 2 - mean) / std)


def test_resizing_a_constant_image_leaves_it_constant_and_large_images_do_not_alias():
    constant = prepare_images(torch.full((1, 1, 8, 8), 0.2), size=(16, 12), mean=(0,) * 3, std=(1,) * 3)
    torch.testing.assert_close(constant, torch.full((1, 3, 16, 12), 153 / 255))
    wave = torch.cos(2 * math.pi * 9 * torch.arange(64) / 64).expand(1, 1, 64, 64)  # every 8th pixel sees one cycle
    shrunk = prepare_images(wave, size=(8, 8), mean=(0,) * 3, std=(1,) * 3)
    torch.testing.assert_close(shrunk[..., 1:-1], torch.full((1, 3, 8, 6), 0.5), rtol=0, atol=0.05)


@pytest.mark.parametrize(
    "processor, size",
    [
        ({"size": 20}, "20x20"),
        ({"size": {"shortest_edge": 24}, "crop_pct": 0.875}, "24x24"),
        ({"size": {"shortest_edge": 24}, "do_center_crop": True, "crop_size": {"height": 18, "width": 22}}, "18x22"),
        ({"size": {"shortest_edge": 24}, "do_center_crop": False, "crop_size": 18}, "24x24"),
    ],
)
def test_image_processors_of_any_age_are_read(tmp_path, processor, size):
    description = load_feature_extractor(save_model(tmp_path, tiny_resnet(), **processor)).description
    assert f" {size} " in description


def test_rescaling_and_normalisation_of_the_processor_are_kept(tmp_path):
    images = saved_images(size=16)
    inputs = []
    for processor in ({"rescale_factor": 2 / 255}, {"do_normalize": False}, {"do_rescale": False}):
        extractor = load_feature_extractor(save_model(tmp_path, tiny_resnet(), **processor))
        inputs.append(prepare_images(images, **extractor._preprocessing))
    mean, std = (torch.tensor(PREPROCESSING[name]).view(3, 1, 1) for name in ("mean", "std"))
    torch.testing.assert_close(inputs[0], (images + 1 - mean) / std)
    torch.testing.assert_close(inputs[1], (images + 1) / 2)
    torch.testing.assert_close(inputs[2], ((images + 1) * 127.5 - mean) / std)


@pytest.mark.parametrize(
    "images, message",
    [
        (torch.zeros(2, 5, 8, 8), r"\(2, 5, 8, 8\)"),
        (torch.zeros(3, 8, 8), r"\(B, C, H, W\)"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "uint8"),
        (torch.full((2, 3, 8, 8), math.nan), "NaN"),
    ],
)
def test_unusable_images_are_refused(images, message):
    with pytest.raises(ValueError, match=message):
        prepare_images(images, **PREPROCESSING)


def test_unusable_models_are_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be loaded"):
        load_feature_extractor(str(tmp_path / "nowhere"))
    tiny_resnet().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="cannot be loaded"):  # no image processor
        load_feature_extractor(str(tmp_path))
    with pytest.raises(UserError, match="image_mean"):
        load_feature_extractor(save_model(tmp_path, tiny_resnet(), image_mean=None))
    numbers = load_feature_extractor(
        save_model(tmp_path, tiny_resnet(), image_mean=0.5, image_std=0.2)
    )  # of all colours
    assert "mean (0.5, 0.5, 0.5), std (0.2, 0.2, 0.2)" in numbers.description
    folder = save_model(tmp_path, tiny_resnet())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot be loaded"):
        load_feature_extractor(folder)
    text = BertModel(BertConfig(hidden_size=4, num_hidden_layers=1, num_attention_heads=1, vocab_size=8))
    (tmp_path / "text").mkdir()
    with pytest.raises(UserError, match="takes no images"):
        load_feature_extractor(save_model(tmp_path / "text", text))


def test_models_that_lack_weights_are_refused_unless_the_part_is_unused(tmp_path):
    vit = ViTForImageClassification(ViTConfig(**VIT, intermediate_size=16))
    folder = save_model(tmp_path, vit)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["ViTModel"]}))
    load_feature_extractor(folder)  # ViTModel's pooler is missing in the file, and not used
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(UserError, match="lacks weights"):
        load_feature_extractor(folder)


def test_logits_of_a_backbone_without_a_head_are_refused(tmp_path):
    extractor = load_feature_extractor(save_model(tmp_path, tiny_resnet(ResNetModel)))
    with pytest.raises(ValueError, match="not a classifier"):
        extractor.features_and_logits(random_images())


def test_optional_packages_are_named_when_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    monkeypatch.setitem(sys.modules, "lpips", None)
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.image", None)
    with pytest.raises(ImportError, match="pip install torch-fidelity"):
        load_feature_extractor("inception")
    with pytest.raises(ImportError, match="pip install lpips"):
        load_lpips()
    with pytest.raises(ImportError, match="pip install torchmetrics"):
        structural_similarity(random_images(), random_images())


@pytest.fixture
def lpips_package(monkeypatch):
    """A stand-in with the interface of `lpips`: mean absolute difference, in images of 8 pixels or more."""

    class LPIPS(torch.nn.Module):
        def __init__(self, net, verbose):
            super().__init__()
            if net == "squeeze":
                raise urllib.error.URLError("no route to the weights")

        def forward(self, first, second):
            assert first.shape[1] == 3
            if min(first.shape[2:]) < 8:
                raise RuntimeError("Output size is too small")
            return (first - second).abs().mean(dim=(1, 2, 3), keepdim=True)

    package = types.ModuleType("lpips")
    package.LPIPS, package.__spec__ = LPIPS, importlib.machinery.ModuleSpec("lpips", None)
    monkeypatch.setitem(sys.modules, "lpips", package)


def test_measures_are_what_the_machine_and_the_images_allow(lpips_package, caplog):
    caplog.set_level("INFO")
    assert list(image_measures((3, 16, 16))) == ["psnr", "ssim"]
    measures = image_measures((1, 16, 16), lpips_net="alex")
    assert list(measures) == ["psnr", "ssim", "lpips_alex"]
    reconstruction, pixel_values = torch.full((2, 1, 16, 16), 3.0), torch.zeros(2, 1, 16, 16)
    assert measures["lpips_alex"](reconstruction, pixel_values).tolist() == [1, 1]  # clamped to 1
    assert not caplog.records
    assert list(image_measures((3, 7, 7), lpips_net="alex")) == ["psnr", "ssim"]
    assert list(image_measures((3, 5, 5))) == ["psnr"]
    assert list(image_measures((3, 16, 16), lpips_net="squeeze")) == ["psnr", "ssim"]
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        "LPIPS is left out", "SSIM is left out", "LPIPS is left out"
    ]  # fmt: skip


def test_measures_do_without_optional_packages(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.image", None)
    assert list(image_measures((3, 16, 16), lpips_net="alex")) == ["psnr"]


# The script that trains one


def fresh_accelerator_state():
    AcceleratorState._reset_state(reset_partial_state=True)


def test_trained_extractor_is_what_its_folder_loads(tmp_path):
    flags = (
        "--dataset_name digits --image_channels 1 --resolution 8 --max_validation_samples 40 --hidden_sizes 4 6 "
        f"--depths 1 1 --train_steps 2 --train_batch_size 8 --output_dir {tmp_path}/my-digits"
    )
    config = parse_config(TrainClassifierConfig, flags.split())
    fresh_accelerator_state()
    train_classifier.main(config)
    fresh_accelerator_state()
    extractor = load_feature_extractor(str(tmp_path / "my-digits"))
    assert (extractor.name, extractor.feature_dim, extractor.num_classes) == ("my_digits", 6, 10)
    assert " 16x16 " in extractor.description  # twice the resolution
    results = json.loads((tmp_path / "my-digits" / "results.json").read_text())
    accuracy = train_classifier.accuracy(extractor, load_digits(resolution=8, num_images=40), batch_size=7)
    assert results["test_accuracy"] == pytest.approx(accuracy) and results["num_test_images"] == 40
    with pytest.raises(UserError, match="holds a model already"):
        train_classifier.main(config)


@pytest.mark.parametrize("rate", ["1e37", "1e38"])  # the loss overflows, or already a setting of AdamW
def test_extractor_that_diverges_is_not_saved(rate, tmp_path, capsys):
    flags = (
        "--dataset_name digits --image_channels 1 --resolution 8 --max_validation_samples 40 --hidden_sizes 4 6 "
        f"--depths 1 1 --train_steps 2 --train_batch_size 8 --output_dir {tmp_path} --learning_rate {rate}"
    )
    fresh_accelerator_state()
    with pytest.raises(SystemExit) as exit_info:
        run_script(train_classifier.main, parse_config(TrainClassifierConfig, flags.split()))
    assert exit_info.value.code == 1
    assert "Lower `--learning_rate`" in capsys.readouterr().err.splitlines()[-1]
    assert {path.name for path in tmp_path.iterdir()} == {".lock", ".owner"}


def test_extractor_that_cannot_be_saved_is_not_trained(tmp_path):
    (tmp_path / "file").touch()
    flags = f"--dataset_name digits --image_channels 1 --output_dir {tmp_path}/file/model"
    fresh_accelerator_state()
    with pytest.raises(UserError, match="`output_dir`: .*model cannot be written: Not a directory"):
        train_classifier.main(parse_config(TrainClassifierConfig, flags.split()))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "give one of `--dataset_name`"),
        ("--dataset_name uoft-cs/cifar10 --streaming", "`--streaming` does not go with this script"),
        ("--dataset_name digits --image_channels 5", "`--image_channels` is 5"),
    ],
)
def test_what_no_extractor_can_be_trained_on_is_refused(flags, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse_config(TrainClassifierConfig, flags.split())
    assert exit_info.value.code == 2 and message in capsys.readouterr().err


def test_random_shift_moves_whole_images():
    images = random_images(20, size=6)
    shifted = train_classifier.random_shift(images, 2)
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2), mode="reflect")
    places = []
    for image, surround in zip(shifted, padded, strict=True):
        crops = {(y, x): surround[:, y : y + 6, x : x + 6] for y in range(5) for x in range(5)}
        places += [place for place, crop in crops.items() if torch.equal(crop, image)]
    assert len(places) == 20 and len(set(places)) > 5
    assert torch.equal(train_classifier.random_shift(images, 0), images)


# Statistics


@pytest.mark.parametrize("sizes", [[40], [1] * 40, [13, 0, 26, 1], [39, 1]])
def test_statistics_do_not_depend_on_batches_order_or_processes(sizes):
    features = torch.randn(40, 6) @ torch.randn(6, 6) + 1000  # a large mean, which naive sums of squares lose
    merged = FeatureStatistics.empty(6)
    for batch in features[torch.randperm(40)].split(sizes):
        merged.add(batch)
    processes = [FeatureStatistics.of(features[rank::3]) for rank in range(3)]
    expected = torch.from_numpy(np.cov(features.double().numpy(), rowvar=False))
    for statistics in (merged, sum(processes, start=FeatureStatistics.empty(6))):
        assert statistics.count == 40
        torch.testing.assert_close(statistics.mean, features.double().mean(0), rtol=1e-12, atol=0)
        torch.testing.assert_close(statistics.covariance, expected, rtol=1e-10, atol=1e-10)


def test_adding_statistics_changes_neither():
    a, b = FeatureStatistics.of(torch.randn(5, 3)), FeatureStatistics.of(torch.randn(4, 3))
    mean, scatter = a.mean.clone(), a.scatter.clone()
    a + b
    assert a.count == 5 and torch.equal(a.mean, mean) and torch.equal(a.scatter, scatter)


def test_unusable_features_are_refused():
    statistics = FeatureStatistics.empty(3)
    with pytest.raises(ValueError, match=r"\(B, 3\)"):
        statistics.add(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="NaN"):
        statistics.add(torch.tensor([[0.0, math.inf, 0.0]]))
    with pytest.raises(ValueError, match="do not add up"):
        statistics + FeatureStatistics.empty(4)
    with pytest.raises(ValueError, match="at least 2"):
        _ = statistics.covariance


def test_saved_statistics_are_loaded_bit_for_bit(tmp_path):
    statistics = FeatureStatistics.of(torch.randn(9, 4))
    statistics.save(tmp_path / "new" / "a.safetensors", {"extractor": "x"})
    loaded, metadata = FeatureStatistics.load(tmp_path / "new" / "a.safetensors")
    assert metadata == {"extractor": "x"} and loaded.count == 9
    assert torch.equal(loaded.mean, statistics.mean) and torch.equal(loaded.scatter, statistics.scatter)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.safetensors"]


def test_failed_save_leaves_the_file_before(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    FeatureStatistics.of(torch.randn(9, 4)).save(path)
    before = path.read_bytes()

    def disk_full(descriptor):
        raise OSError("No space left on device")

    monkeypatch.setattr("os.fsync", disk_full)
    with pytest.raises(OSError, match="No space"):
        FeatureStatistics.of(torch.randn(8, 4)).save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def load_digits(resolution=16, num_images=30, **more):
    config = DataConfig(
        dataset_name="digits", image_channels=1, resolution=resolution, max_validation_samples=num_images, **more
    )
    return load_images(config)[1]


def test_reference_statistics_are_cached(tmp_path, resnet_folder, caplog):
    extractor, images, cache = load_feature_extractor(resnet_folder), load_digits(), tmp_path / "cache"
    first = reference_statistics(extractor, images, cache_dir=cache, batch_size=7)
    assert first.count == 30
    torch.testing.assert_close(first.scatter, reference_statistics(extractor, images).scatter, rtol=1e-6, atol=1e-6)
    (path,) = cache.iterdir()
    assert path.name.startswith("my_resnet-")

    marked = FeatureStatistics(first.count, first.mean + 1, first.scatter)
    marked.save(path, inputs_of_cached(path))  # what is read back shows that nothing was computed
    assert torch.equal(reference_statistics(extractor, images, cache_dir=cache).mean, marked.mean)

    whole = path.read_bytes()
    flipped = whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:]
    for content in (whole[:-100], flipped, b""):
        path.write_bytes(content)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            again = reference_statistics(extractor, images, cache_dir=cache, batch_size=7)
        assert "damaged" in caplog.text and len(caplog.messages) == 1
        assert torch.equal(again.mean, first.mean)
        assert torch.equal(FeatureStatistics.load(path)[0].mean, first.mean)
    first.save(path, {"extractor": "another"})
    with caplog.at_level(logging.WARNING):
        assert torch.equal(reference_statistics(extractor, images, cache_dir=cache, batch_size=7).mean, first.mean)
    assert "made from something else" in caplog.text


def test_reference_statistics_survive_a_cache_that_cannot_be_written(tmp_path, resnet_folder, caplog):
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING):
        extractor, images = load_feature_extractor(resnet_folder), load_digits()
        assert reference_statistics(extractor, images, cache_dir=tmp_path / "file" / "cache").count == 30
    assert "cannot be written" in caplog.text


def test_reference_cache_tells_extractors_data_and_resolutions_apart(tmp_path, resnet_folder):
    namesake = tmp_path / "other" / "My-ResNet"
    namesake.mkdir(parents=True)
    other = save_model(namesake, tiny_resnet())
    for folder, digits in [
        (resnet_folder, {}),
        (other, {}),
        (resnet_folder, {"resolution": 8}),
        (resnet_folder, {"num_images": 20}),
    ]:
        reference_statistics(load_feature_extractor(folder), load_digits(**digits), cache_dir=tmp_path / "cache")
    images = load_digits(value_range=[0.0, 1000.0])
    reference_statistics(load_feature_extractor(resnet_folder), images, cache_dir=tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 5


# Fréchet distance


def test_frechet_distance_equals_the_matrix_root():
    a = torch.randn(300, 20) @ torch.randn(20, 20)
    b = torch.randn(200, 20) @ torch.randn(20, 20) + 0.5
    a, b = FeatureStatistics.of(a), FeatureStatistics.of(b)
    root = scipy.linalg.sqrtm((a.covariance @ b.covariance).numpy())
    assert np.abs(root.imag).max() < 1e-6
    expected = (a.mean - b.mean).square().sum() + (a.covariance + b.covariance).trace() - 2 * root.trace().real
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(expected.item(), rel=1e-9)


def test_frechet_distance_of_commuting_gaussians_has_its_closed_form():
    std_a, std_b = torch.rand(8, dtype=torch.float64) + 0.1, torch.rand(8, dtype=torch.float64) + 0.1
    rotation, _ = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))
    mean = torch.randn(8, dtype=torch.float64)

    def gaussian(mean, std):
        return FeatureStatistics(1000, mean, 999 * rotation @ std.square().diag() @ rotation.T)

    distance = frechet_distance(gaussian(mean, std_a), gaussian(torch.zeros_like(mean), std_b))
    assert distance == pytest.approx((mean.square().sum() + (std_a - std_b).square().sum()).item(), rel=1e-10)


def test_frechet_distance_of_a_set_to_itself_is_0():
    a = FeatureStatistics.of(torch.randn(100, 30) @ torch.randn(30, 30))
    assert 0 <= frechet_distance(a, a) < 1e-10 * a.covariance.trace()


def test_frechet_distance_takes_singular_covariances():
    features = torch.randn(100, 5)
    dead = torch.cat([features, torch.zeros(100, 7)], dim=1)  # features that a ReLU has switched off
    a, b = FeatureStatistics.of(dead), FeatureStatistics.of(2 * dead + 1)
    full = frechet_distance(FeatureStatistics.of(features), FeatureStatistics.of(2 * features + 1))
    assert frechet_distance(a, b) == pytest.approx(full + 7, rel=1e-7)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    point = FeatureStatistics(100, torch.zeros(12, dtype=torch.float64), torch.zeros(12, 12, dtype=torch.float64))
    assert frechet_distance(point, point) == 0


@pytest.mark.filterwarnings("ignore:.*covariance is singular")
@pytest.mark.parametrize("difference", [0.1, 0.001])
def test_frechet_distance_of_fewer_images_than_features_is_exact(difference):
    """Against the nuclear norm of the product of the centred features, which needs no root of a matrix."""
    random = np.random.default_rng(0)
    a = random.normal(size=(60, 200))
    b = a + difference * random.normal(size=a.shape)
    centered = [features - features.mean(axis=0) for features in (a, b)]
    expected = ((a - b).mean(axis=0) ** 2).sum() + sum((features**2).sum() for features in centered) / 59
    expected -= 2 * np.linalg.norm(centered[0] @ centered[1].T, "nuc") / 59
    distance = frechet_distance(*(FeatureStatistics.of(torch.tensor(features)) for features in (a, b)))
    assert distance == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_takes_covariances_without_a_common_direction():
    rotation, _ = torch.linalg.qr(torch.randn(40, 40, dtype=torch.float64))
    spread = torch.rand(20, dtype=torch.float64) * 10.0 ** torch.arange(-10, 10)
    zeros = torch.zeros(20, dtype=torch.float64)
    a, b = (
        FeatureStatistics(101, torch.zeros(40, dtype=torch.float64), 100 * rotation @ torch.cat(x).diag() @ rotation.T)
        for x in ((spread, zeros), (zeros, spread))
    )
    assert frechet_distance(a, b) == pytest.approx(2 * spread.sum().item(), rel=1e-6)


def test_frechet_distance_warns_of_too_few_images():
    few, many = FeatureStatistics.of(torch.randn(6, 6)), FeatureStatistics.of(torch.randn(60, 6))
    with pytest.warns(UserWarning, match="6 images for 6 features"):
        frechet_distance(many, few)


def test_what_is_no_covariance_is_refused():
    scatter = torch.tensor([1.0, 1.0, -0.1], dtype=torch.float64).diag()
    broken = FeatureStatistics(100, torch.zeros(3, dtype=torch.float64), scatter)
    good = FeatureStatistics.of(torch.randn(100, 3))
    for pair in ((broken, good), (good, broken)):
        with pytest.raises(ValueError, match="a covariance has none below 0"):
            frechet_distance(*pair)
    with pytest.raises(ValueError, match="two extractors"):
        frechet_distance(good, FeatureStatistics.of(torch.randn(100, 4)))


# Kernel distance


def naive_kernel_distance(x, y):
    def kernel(a, b):
        return (sum(p * q for p, q in zip(a, b, strict=True)) / len(a) + 1) ** 3

    def mean(pairs):
        values = [kernel(a, b) for a, b in pairs]
        return math.fsum(values) / len(values)

    def within(z):
        return mean((a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j)

    return within(x) + within(y) - 2 * mean((a, b) for a in x for b in y)


@pytest.fixture(params=[3, 2048])
def tile(request, monkeypatch):
    monkeypatch.setattr(distances, "_TILE", request.param)


def test_kernel_distance_equals_its_sums(tile):
    x, y = torch.randn(7, 4), torch.randn(9, 4) + 0.3
    assert kernel_distance(x, y) == pytest.approx(naive_kernel_distance(x.tolist(), y.tolist()), rel=1e-10)
    expected = poly_mmd(x.double(), y[:7].double(), 3, None, 1.0)  # torchmetrics takes equal numbers only
    assert kernel_distance(x, y[:7]) == pytest.approx(expected.item(), rel=1e-10)


def test_kernel_distance_has_no_bias():
    values = [kernel_distance(torch.randn(20, 3), torch.randn(20, 3)) for _ in range(400)]
    assert abs(np.mean(values)) < 3 * np.std(values) / 20


# Neighbours


def naive_distances(x, y):
    return np.sqrt(((x.double().numpy()[:, None] - y.double().numpy()[None]) ** 2).sum(-1))


def naive_radii(x, k):
    return np.sort(naive_distances(x, x), axis=1)[:, k]  # place 0 is the vector itself


def test_neighbours_equal_those_of_all_pairs(tile):
    x, y = torch.randn(11, 5) + 10, torch.randn(13, 5) + 10
    squared, indices = nearest_neighbors(x, y, num_neighbors=4)
    np.testing.assert_array_equal(indices, np.argsort(naive_distances(x, y), axis=1)[:, :4])
    np.testing.assert_allclose(squared.sqrt(), np.sort(naive_distances(x, y), axis=1)[:, :4], rtol=1e-10)
    squared, indices = nearest_neighbors(x, num_neighbors=10)
    np.testing.assert_array_equal(indices, np.argsort(naive_distances(x, x), axis=1)[:, 1:])
    with pytest.raises(ValueError, match=r"1\.\.10"):
        nearest_neighbors(x, num_neighbors=11)


def test_duplicates_are_each_others_neighbours(tile):
    x = torch.randn(6, 300).repeat(2, 1) * 100
    squared, indices = nearest_neighbors(x)
    assert torch.equal(squared, torch.zeros(12, 1, dtype=torch.float64))
    assert indices.flatten().tolist() == [*range(6, 12), *range(6)]


@pytest.mark.parametrize("k", [1, 3])
def test_precision_recall_density_coverage_equal_their_definitions(tile, k):
    real, generated = torch.randn(17, 3), torch.randn(12, 3) * 0.7 + 0.4
    between, radii, radii_generated = naive_distances(real, generated), naive_radii(real, k), naive_radii(generated, k)
    precision = (between <= radii[:, None]).any(axis=0).mean()
    recall = (between <= radii_generated[None]).any(axis=1).mean()
    density = (between <= radii[:, None]).sum() / (k * 12)
    coverage = (between.min(axis=1) <= radii).mean()
    assert 0 < recall < 1 and 0 < coverage < 1
    assert precision_recall(real, generated, num_neighbors=k) == pytest.approx((precision, recall))
    assert density_coverage(real, generated, num_neighbors=k) == pytest.approx((density, coverage))


def test_precision_and_recall_are_1_for_a_copy_and_0_for_strangers():
    real = torch.randn(40, 6).repeat_interleave(2, dim=0)  # balls of duplicates have no size
    assert precision_recall(real, real.clone(), num_neighbors=1) == (1, 1)
    assert density_coverage(real, real.clone(), num_neighbors=1)[1] == 1
    assert precision_recall(real, real + 1000) == (0, 0)
    assert density_coverage(real, real + 1000) == (0, 0)


def test_features_of_two_extractors_or_of_too_few_images_are_refused():
    for distance in (kernel_distance, precision_recall, density_coverage):
        with pytest.raises(ValueError, match="same extractor"):
            distance(torch.randn(9, 3), torch.randn(9, 4))
        with pytest.raises(ValueError, match="NaN"):
            distance(torch.randn(9, 3), torch.full((9, 3), math.nan))
        with pytest.raises(ValueError, match="at least|must lie in"):
            distance(torch.randn(1, 3), torch.randn(1, 3))


# Inception score


def test_inception_score_of_hand_made_distributions():
    certain = torch.eye(5).repeat(4, 1)  # every class equally often, each image certain: all 5 classes
    assert inception_score(certain, splits=4) == pytest.approx((5, 0))
    assert inception_score(torch.full((20, 5), 0.2), splits=4) == pytest.approx((1, 0))  # each image undecided
    assert inception_score(torch.eye(5)[:1].repeat(20, 1), splits=4) == pytest.approx((1, 0))  # one class only
    halves = torch.cat([torch.eye(5)[:1].repeat(10, 1), torch.eye(5).repeat(2, 1)])
    assert inception_score(halves, splits=2) == pytest.approx((3, 2))  # parts of score 1 and 5


def test_inception_score_equals_its_formula():
    probabilities = torch.randn(23, 4).softmax(dim=1).double()
    scores = []
    for part in np.array_split(probabilities.numpy(), 3):
        marginal = part.mean(axis=0)
        divergences = [sum(p * np.log(p / q) for p, q in zip(row, marginal, strict=True)) for row in part]
        scores.append(np.exp(np.mean(divergences)))
    assert inception_score(probabilities, splits=3) == pytest.approx((np.mean(scores), np.std(scores)))


def test_what_are_no_probabilities_is_refused():
    with pytest.raises(ValueError, match="softmax"):
        inception_score(torch.randn(20, 4), splits=2)
    with pytest.raises(ValueError, match="at least `splits`"):
        inception_score(torch.full((4, 2), 0.5))


# Image quality


@pytest.mark.parametrize("channels", [1, 3])
def test_psnr_equals_its_formula(channels):
    images = random_images(4, channels)
    reconstruction = (images + 0.1 * torch.randn_like(images)) * 1.05
    clamped = reconstruction.clamp(-1, 1)
    expected = []
    for x, y in zip(clamped.numpy().astype(np.float64), images.numpy().astype(np.float64), strict=True):
        levels_x, levels_y = (x + 1) * 127.5, (y + 1) * 127.5
        expected.append(10 * np.log10(255**2 / np.mean((levels_x - levels_y) ** 2)))
    psnr = peak_signal_to_noise_ratio(reconstruction, images)
    np.testing.assert_allclose(psnr, expected, rtol=1e-5)
    whole = PeakSignalNoiseRatio(data_range=(-1.0, 1.0), dim=(1, 2, 3), reduction="elementwise_mean")
    torch.testing.assert_close(psnr.mean(), whole(reconstruction, images))
    assert torch.isinf(peak_signal_to_noise_ratio(images, images)).all()


def naive_ssim(x, y):
    """In [0, 255], by loops over pixels, the border mirrored."""
    offsets = np.arange(-5, 6)
    window = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = np.outer(window, window) / window.sum() ** 2
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = []
    x_padded, y_padded = (np.pad(z, ((0, 0), (5, 5), (5, 5)), "reflect") for z in (x, y))
    for a, b in zip(x_padded, y_padded, strict=True):
        for i in range(x.shape[1]):
            for j in range(x.shape[2]):
                p, q = a[i : i + 11, j : j + 11], b[i : i + 11, j : j + 11]
                mean_p, mean_q = (window * p).sum(), (window * q).sum()
                var_p, var_q = (window * (p - mean_p) ** 2).sum(), (window * (q - mean_q) ** 2).sum()
                covariance = (window * (p - mean_p) * (q - mean_q)).sum()
                values.append(
                    (2 * mean_p * mean_q + c1)
                    * (2 * covariance + c2)
                    / ((mean_p**2 + mean_q**2 + c1) * (var_p + var_q + c2))
                )
    return np.mean(values)


@pytest.mark.parametrize("size", [6, 14])  # 6: smaller than the window
def test_ssim_equals_its_formula(size):
    images = random_images(2, 3, size)
    reconstruction = (images + 0.3 * torch.randn_like(images)) * 1.05
    ssim = structural_similarity(reconstruction, images)
    levels = [((x.clamp(-1, 1) + 1) * 127.5).double().numpy() for x in (reconstruction, images)]
    np.testing.assert_allclose(ssim, [naive_ssim(x, y) for x, y in zip(*levels, strict=True)], rtol=1e-4)
    torch.testing.assert_close(structural_similarity(images, images), torch.ones(2))
    whole = StructuralSimilarityIndexMeasure(data_range=(0.0, 1.0), reduction="none")
    torch.testing.assert_close(ssim, whole((reconstruction + 1) / 2, (images + 1) / 2), rtol=0, atol=1e-5)


def test_ssim_of_images_too_small_to_mirror_is_refused():
    with pytest.raises(ValueError, match="5x8 pixels"):
        structural_similarity(torch.zeros(1, 1, 5, 8), torch.zeros(1, 1, 5, 8))


# iFID's images


def test_latents_go_halfway_to_their_neighbour_in_the_normalised_space():
    latents = torch.randn(9, 2, 3, 3) * torch.tensor([1.0, 50.0]).view(1, 2, 1, 1) + 7
    normalized = (latents - 7) / torch.tensor([1.0, 50.0]).view(1, 2, 1, 1)
    pairs = naive_distances(normalized.flatten(1), normalized.flatten(1))
    np.fill_diagonal(pairs, np.inf)
    neighbors = latents[pairs.argmin(axis=1)]
    torch.testing.assert_close(interpolate_to_neighbors(latents, normalized), (latents + neighbors) / 2)
    assert torch.equal(interpolate_to_neighbors(latents, normalized, alpha=0), latents)
    torch.testing.assert_close(interpolate_to_neighbors(latents, normalized, alpha=1), neighbors)


def test_unusable_interpolations_are_refused():
    latents = torch.randn(3, 2, 4, 4)
    with pytest.raises(ValueError, match="same shape"):
        interpolate_to_neighbors(latents, latents[:2])
    with pytest.raises(ValueError, match="alpha"):
        interpolate_to_neighbors(latents, latents, alpha=1.5)
    with pytest.raises(ValueError, match="NaN"):
        interpolate_to_neighbors(latents, latents * math.nan)
    with pytest.raises(ValueError, match="num_neighbors"):
        interpolate_to_neighbors(latents[:1], latents[:1])
