"""Statistics merge, normalisation is undone, and a cache holds exactly what the encoder gives."""

import json
import shutil

import pytest
import torch
from accelerate import Accelerator
from models import make_autoencoder
from safetensors.torch import load_file, save_file

from dae_diffusers.data import DataConfig, load_images, make_pass_loader, make_training_loader
from dae_diffusers.errors import UserError
from dae_diffusers.latents.cache import CachedLatents, open_latent_cache, write_latent_cache
from dae_diffusers.latents.statistics import (
    LatentStatistics,
    compute_latent_statistics,
    has_latent_statistics,
    normalize_latents,
)
from dae_diffusers.store import cache_json, inputs_of_cached
from dae_diffusers.weights import autoencoder_fingerprint


@pytest.fixture
def vae():
    return make_autoencoder("none").to_diffusers()


@pytest.fixture
def images(image_folder):
    config = DataConfig(train_data_dir=str(image_folder), resolution=16, random_flip=True)
    return load_images(config)[0]


def test_statistics_equal_those_of_the_whole_set():
    latents = torch.randn(50, 3, 4, 4) * torch.tensor([0.5, 2.0, 9.0]).view(1, 3, 1, 1) + 7
    parts = [LatentStatistics.empty(3) for _ in range(3)]
    for part, chunk in zip(parts, latents.split([1, 30, 19]), strict=True):
        for batch in chunk.split(7):
            part.add(batch)
    merged = parts[2] + parts[0] + parts[1]
    assert merged.count == 50 * 16
    torch.testing.assert_close(merged.mean, latents.double().mean(dim=(0, 2, 3)))
    torch.testing.assert_close(merged.std, latents.double().std(dim=(0, 2, 3), correction=0))


def test_statistics_are_those_of_draws_from_the_posterior():
    mean, std = torch.randn(20, 2, 3, 3), torch.rand(20, 2, 3, 3)
    statistics = LatentStatistics.empty(2)
    statistics.add(mean, std)
    draws = mean + std * torch.randn(4000, 20, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(statistics.mean, draws.double().mean(dim=(0, 1, 3, 4)), atol=3e-3, rtol=0)
    torch.testing.assert_close(statistics.std, draws.double().std(dim=(0, 1, 3, 4)), atol=3e-3, rtol=0)


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_normalised_latents_have_mean_zero_and_std_one(vae, images, batch_size):
    statistics = compute_latent_statistics(vae, make_pass_loader(images, batch_size=batch_size))
    statistics.write_to_config(vae)
    assert has_latent_statistics(vae) and vae.config.scaling_factor == 1.0
    with torch.no_grad():
        posteriors = [vae.encode(images[n]["pixel_values"][None]).latent_dist for n in range(len(images))]
    after = LatentStatistics.empty(3)
    for posterior in posteriors:
        std = posterior.std / torch.tensor(vae.config.latents_std).view(1, 3, 1, 1)
        after.add(normalize_latents(posterior.mean, vae), std)
    torch.testing.assert_close(after.mean, torch.zeros(3, dtype=torch.float64), atol=1e-5, rtol=0)
    torch.testing.assert_close(after.std, torch.ones(3, dtype=torch.float64), atol=1e-5, rtol=0)


def test_normalisation_without_statistics_is_the_old_scaling(vae):
    latents = torch.randn(2, 3, 4, 4)
    assert not has_latent_statistics(vae)
    torch.testing.assert_close(normalize_latents(latents, vae), latents * 0.18215)
    vae.register_to_config(shift_factor=0.5)
    torch.testing.assert_close(normalize_latents(latents, vae), (latents - 0.5) * 0.18215)


def test_statistics_survive_saving(vae, images, tmp_path):
    compute_latent_statistics(vae, make_pass_loader(images, batch_size=8)).write_to_config(vae)
    vae.save_pretrained(tmp_path)
    assert type(vae).from_pretrained(tmp_path).config.latents_std == vae.config.latents_std


def test_constant_channel_is_refused(vae):
    statistics = LatentStatistics.empty(3)
    latents = torch.randn(4, 3, 2, 2)
    latents[:, 1] = 3
    statistics.add(latents)
    with pytest.raises(ValueError, match=r"channels \[1\]"):
        statistics.write_to_config(vae)


@pytest.fixture
def cache(vae, images, tmp_path):
    write_latent_cache(tmp_path / "c", vae, images, Accelerator(), batch_size=4, dtype="float32", shard_size=7)
    return CachedLatents(tmp_path / "c")


def test_cache_holds_what_the_encoder_gives(cache, vae, images):
    items = [(n, draw) for n in range(len(images)) for draw in (0, 1)]  # plain and mirrored
    batch = cache.__getitems__(items)
    with torch.no_grad():
        posterior = vae.encode(torch.stack([images[item]["pixel_values"] for item in items])).latent_dist
    torch.testing.assert_close(batch["latents_mean"], posterior.mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(batch["latents_std"], posterior.std, atol=1e-5, rtol=1e-5)
    assert batch["class_labels"].tolist() == [images.labels[n] for n, _ in items]
    assert cache.id2label == images.id2label


def test_statistics_of_cached_latents_are_those_of_the_images(cache, vae, images):
    cached, encoded = (compute_latent_statistics(vae, make_pass_loader(data, batch_size=5)) for data in (cache, images))
    torch.testing.assert_close(cached.mean, encoded.mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cached.std, encoded.std, rtol=1e-5, atol=1e-5)


def test_cache_and_images_are_drawn_in_the_same_order(cache, images):
    cached, read = (next(iter(make_training_loader(data, batch_size=9, seed=2))) for data in (cache, images))
    assert torch.equal(cached["class_labels"], read["class_labels"])


def test_interrupted_cache_goes_on_where_it_stopped(cache, vae, images):
    manifest = json.loads((cache.folder / "manifest.json").read_text())
    begun = {k: manifest["values"][k] for k in ("identity", "id2label", "shard_size")} | {"complete": False}
    cache_json(cache.folder / "manifest.json", begun, manifest["of"])
    with pytest.raises(UserError, match="unfinished"):
        CachedLatents(cache.folder)
    (cache.folder / "shard-00001.safetensors").unlink()
    kept = (cache.folder / "shard-00000.safetensors").stat().st_mtime_ns
    write_latent_cache(cache.folder, vae, images, Accelerator(), batch_size=4, dtype="float32", shard_size=7)
    assert (cache.folder / "shard-00000.safetensors").stat().st_mtime_ns == kept
    again = CachedLatents(cache.folder)
    assert torch.equal(again.__getitems__([8])["latents_mean"], cache.__getitems__([8])["latents_mean"])


def test_cache_of_another_autoencoder_or_of_other_images_is_refused(cache, vae, images, image_folder):
    own = autoencoder_fingerprint(vae)
    cache.check(autoencoder=own, images=images)
    with pytest.raises(UserError, match="autoencoder"):
        cache.check(autoencoder=autoencoder_fingerprint(make_autoencoder("none", latent_channels=4)), images=None)
    for change, name in (({"resolution": 32}, "resolution"), ({"random_flip": False}, "flips")):
        other = DataConfig(**{"train_data_dir": str(image_folder), "resolution": 16, "random_flip": True, **change})
        with pytest.raises(UserError, match=name):
            cache.check(autoencoder=own, images=load_images(other)[0])
    with pytest.raises(UserError, match="holds another latent cache"):
        write_latent_cache(cache.folder, vae, images, Accelerator(), batch_size=4, dtype="float16", shard_size=7)


def test_names_of_classes_are_those_of_the_images_given(cache, vae, images, image_folder, tmp_path):
    """Renamed folders in the same order have the same labels."""
    for folder in image_folder.iterdir():
        shutil.copytree(folder, tmp_path / "renamed" / f"new {folder.name}")
    renamed = load_images(DataConfig(train_data_dir=str(tmp_path / "renamed"), resolution=16, random_flip=True))[0]
    cache.check(autoencoder=autoencoder_fingerprint(vae), images=renamed)
    assert cache.id2label == renamed.id2label == {label: f"new {name}" for label, name in images.id2label.items()}
    assert write_again(cache, vae, renamed).id2label == renamed.id2label


def test_fingerprint_ignores_the_decoder(vae):
    before = autoencoder_fingerprint(vae)
    with torch.no_grad():
        vae.decoder.conv_out.bias += 1
    assert autoencoder_fingerprint(vae) == before
    with torch.no_grad():
        vae.encoder.conv_out.bias += 1
    assert autoencoder_fingerprint(vae) != before


@pytest.mark.parametrize("damage", ["truncated", "missing", "garbled", "manifest"])
def test_damaged_cache_is_reported(cache, damage):
    shard = cache.folder / "shard-00001.safetensors"
    if damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:-5])
    elif damage == "missing":
        shard.unlink()
    elif damage == "garbled":
        shard.write_bytes(b"\xff" * shard.stat().st_size)
    else:
        (cache.folder / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="cache"):
        CachedLatents(cache.folder)


def test_missing_cache_says_how_to_make_it(tmp_path):
    with pytest.raises(UserError, match="cache-latents"):
        CachedLatents(tmp_path)


def another_vae():
    """Of the same shape, with other weights."""
    vae = make_autoencoder("none").to_diffusers()
    with torch.no_grad():
        vae.encoder.conv_in.weight.mul_(-1)
    return vae


def write_again(cache, vae, images, **options):
    options = {"batch_size": 4, "dtype": "float32", "shard_size": 7} | options
    return write_latent_cache(cache.folder, vae, images, Accelerator(), **options)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("cleared", ["manifest", "manifest and a shard"])
def test_latents_of_another_encoder_are_never_taken_over(cache, vae, images, cleared):
    """Two encoders, one after the other, in a folder whose manifest is gone or that a kill was clearing."""
    other = another_vae()
    assert autoencoder_fingerprint(other) != autoencoder_fingerprint(vae)
    (cache.folder / "manifest.json").unlink()
    if cleared != "manifest":
        (cache.folder / "shard-00000.safetensors").unlink()
    (cache.folder / "mine.txt").write_text("mine")
    before = contents(cache.folder)
    with pytest.raises(UserError, match="holds another latent cache: its autoencoder is '"):
        write_again(cache, other, images)
    assert contents(cache.folder) == before
    found = write_again(cache, other, images, replace=True)
    found.check(autoencoder=autoencoder_fingerprint(other), images=images)
    with torch.no_grad():
        mean = other.encode(images[9]["pixel_values"][None]).latent_dist.mean
    torch.testing.assert_close(found.__getitems__([9])["latents_mean"], mean, atol=1e-5, rtol=1e-5)
    assert (cache.folder / "mine.txt").read_text() == "mine"


def test_a_shard_says_what_it_is_and_one_from_elsewhere_is_named_and_made_again(cache, vae, images, tmp_path, caplog):
    first, second = (cache.folder / f"shard-0000{number}.safetensors" for number in (0, 1))
    said = inputs_of_cached(second)
    assert (
        said["shard"] == 1
        and said["autoencoder"] == autoencoder_fingerprint(vae)
        and said["data"] == images.fingerprint
    )
    assert cache.identity.record().items() <= said.items() and cache.identity.buckets == []
    whole = contents(cache.folder)
    other = another_vae()
    write_latent_cache(tmp_path / "b", other, images, Accelerator(), batch_size=4, dtype="float32", shard_size=7)
    for source, sentence in (
        (tmp_path / "b" / second.name, "its autoencoder is"),
        (first, "its shard is 0 instead of 1"),
    ):
        second.write_bytes(source.read_bytes())
        for verify in (True, False):
            with pytest.raises(UserError, match=f"{second.name} is a shard of another latent cache: {sentence}"):
                CachedLatents(cache.folder, verify=verify)
        with pytest.raises(UserError, match=sentence):
            open_latent_cache(cache.folder, Accelerator())
        if source == first:
            write_again(cache, vae, images)
            assert second.name in caplog.text
        else:
            with pytest.raises(UserError, match="holds another latent cache"):
                write_again(cache, vae, images)
    assert contents(cache.folder) == whole


@pytest.mark.parametrize("manifest", ["whole", "begun", "removed", "empty", "a bit"])
def test_flipped_bits_are_found_and_only_what_is_damaged_is_made_again(cache, vae, images, manifest, caplog):
    whole = contents(cache.folder)
    shards = sorted(cache.folder.glob("shard-*"))
    damages = {
        shards[0]: [len(whole[shards[0].name]) // 2, 40, 150, -1, 0], shards[1]: [None],  # None: empty
    }  # fmt: skip
    path = cache.folder / "manifest.json"
    for shard, places in damages.items():
        for place in places:
            content = bytearray(whole[shard.name] if place is not None else b"")
            if place is not None:
                content[place] ^= 4
            shard.write_bytes(content)
            kept = json.loads(whole["manifest.json"])
            if manifest == "begun":
                cache_json(path, {**kept["values"], "complete": False}, kept["of"])
            elif manifest == "a bit":
                path.write_bytes(whole["manifest.json"].replace(b"cat", b"cau"))
            elif manifest != "whole":
                path.unlink() if manifest == "removed" else path.write_bytes(b"")
            with pytest.raises(UserError):
                CachedLatents(cache.folder)
            others = {each: each.stat().st_mtime_ns for each in shards if each != shard}
            caplog.clear()
            write_again(cache, vae, images)
            assert contents(cache.folder) == whole
            assert others == {each: each.stat().st_mtime_ns for each in others}
            assert sum(shard.name in message for message in caplog.messages) == 1
            assert sum("manifest.json is damaged" in message for message in caplog.messages) == (
                manifest in ("empty", "a bit")
            )


def test_a_cache_of_the_first_version_is_refused_with_the_command_and_made_again(cache, vae, images, caplog):
    whole = contents(cache.folder)
    values = json.loads(whole["manifest.json"])["values"]
    (cache.folder / "manifest.json").write_text(json.dumps({**values, "shards": {}}))
    for shard in cache.folder.glob("shard-*"):
        save_file(load_file(shard), shard)
    with pytest.raises(UserError, match="older version.* Run the command that made the cache again"):
        CachedLatents(cache.folder)
    with pytest.raises(UserError, match="holds another latent cache"):
        write_again(cache, another_vae(), images)
    write_again(cache, vae, images)
    assert contents(cache.folder) == whole and "older version" in caplog.text
