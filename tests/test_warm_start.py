"""Training from given weights: what is taken over, what is new, and that new parts change nothing at first."""

import json
import logging
import shutil
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
)
from models import TINY_TRANSFORMER, make_autoencoder, make_prior_pipeline, make_random_transformer, randomize
from scripts import BARE_DIT, TRANSFORMER, resume, run

from dae_diffusers import DAEDiTPipeline
from dae_diffusers.errors import UserError
from dae_diffusers.generators.denoising import Diffusion, FlowMatching
from dae_diffusers.generators.repa import make_representation_alignment
from dae_diffusers.generators.warm_start import WarmStart
from dae_diffusers.metrics.sampling import load_pipeline
from dae_diffusers.settings import compose
from dae_diffusers.training import train_dit
from dae_diffusers.training.settings import TrainDiTConfig

pytestmark = pytest.mark.filterwarnings("ignore:.*larger than the data set")

STOCK = {**TINY_TRANSFORMER, "out_channels": 6, "attention_head_dim": 8}
NAMES = {0: "cat", 1: "crane, hoist", 2: "dog"}
# Too small to change a weight.
STILL = "--resolution 16 --max_train_steps 1 --train_batch_size 4 --learning_rate 1e-30 --num_sample_images 2 --sample_steps 1"


def make_transformer(kind, names=NAMES, **config):
    num_classes = None if names is None else len(names)
    if kind == "ours":
        return make_random_transformer(**{"num_classes": num_classes, **config})
    return randomize(DiTTransformer2DModel(**{**STOCK, "num_embeds_ada_norm": num_classes, **config}))


def make_pipeline(kind, names=NAMES, **config):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0) if kind == "ours" else DDIMScheduler(clip_sample=False)
    vae = make_autoencoder(sample_size=16).to_diffusers()
    return DAEDiTPipeline(make_transformer(kind, names, **config), vae, scheduler, id2label=names)


def make_start(kind, names=NAMES, **config):
    return WarmStart.from_pipeline("old", make_pipeline(kind, names, **config))


def predict(model, labels=None, size=8, channels=3):
    inputs = torch.randn(1, channels, size, size, generator=torch.Generator().manual_seed(0))
    labels = None if labels is None else torch.tensor([labels])
    with torch.no_grad():
        return model.eval()(inputs, timestep=torch.tensor([300]), class_labels=labels).sample[:, :channels]


def draw(pipeline, labels=None, **options):
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(n) for n in range(2)]
    count = {"num_images_per_label": 2} if labels is None else {"class_labels": labels}
    return pipeline(**count, generator=generators, num_inference_steps=3, output_type="pt", **options).images


@pytest.mark.parametrize("kind", ["ours", "stock"])
def test_classes_of_the_same_name_keep_their_rows_and_new_ones_begin_as_no_class(kind, caplog):
    caplog.set_level(logging.INFO)
    start = make_start(kind)
    old = start.transformer
    new = start.continued(8, 3, 2, {0: "owl", 1: "Dog", 2: "hoist", 3: "tit"})
    before = [3, 2, 1, 3, 3]  # "no class" is the last
    for label, was in enumerate(before):
        assert torch.equal(predict(new, label), predict(old, was))
    tables = [name for name, value in new.state_dict().items() if len(value) == len(before)]
    assert len(tables) == (1 if kind == "ours" else TINY_TRANSFORMER["num_layers"])
    assert (
        "2 of 4 classes are new and begin as the null class (owl, tit); 1 of its 3 classes are left out" in caplog.text
    )


@pytest.mark.parametrize("kind", ["ours", "stock"])
def test_same_latents_and_classes_keep_every_weight(kind):
    start = make_start(kind)
    old = start.transformer.state_dict()
    new = start.continued(8, 3, 2, NAMES).state_dict()
    assert old.keys() == new.keys()
    for name, value in new.items():
        is_last = kind == "stock" and name.startswith("proj_out_2")  # loses its variance
        assert is_last or torch.equal(value, old[name]), name


def test_scheduler_that_asks_for_a_learned_variance_asks_no_more():
    pipeline = make_pipeline("stock")
    pipeline.scheduler = DDPMScheduler(variance_type="learned_range", clip_sample=False)
    start = WarmStart.from_pipeline("old", pipeline)
    assert (start.scheduler.config.variance_type, start.scheduler.config.clip_sample) == ("fixed_small", False)
    pipeline.transformer, pipeline.scheduler = start.continued(8, 3, 2, NAMES), start.scheduler
    assert pipeline.transformer.config.out_channels == 3
    assert draw(pipeline, ["cat", "dog"]).isfinite().all()


def test_model_without_classes_gets_them_and_loses_them_without_a_change():
    start = make_start("ours", None)
    old = start.transformer
    new = start.continued(8, 3, 2, NAMES)
    for label in range(4):
        assert torch.equal(predict(new, label), predict(old))
    start = make_start("ours")
    old = start.transformer
    torch.testing.assert_close(predict(start.continued(8, 3, 2, None)), predict(old, 3), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["ours", "stock"])
@pytest.mark.parametrize(("channels", "patch_size"), [(4, 2), (3, 1), (12, 1)])
def test_other_latents_make_the_first_and_the_last_layer_new(kind, channels, patch_size):
    start = make_start(kind)
    old = start.transformer
    new = start.continued(8, channels, patch_size, NAMES)
    assert not predict(new, 0, channels=channels).any()
    first, last = ("patch_embed.", "proj_out.") if kind == "ours" else ("pos_embed.", "proj_out_2.")
    for name, value in new.state_dict().items():
        assert name.startswith((first, last)) or torch.equal(value, old.state_dict()[name]), name
    weight = new.state_dict()[f"{first}{'weight' if kind == 'ours' else 'proj.weight'}"]
    assert weight.std() > 0.01 and not any(torch.equal(weight, value) for value in old.state_dict().values())


def test_another_size_continues_the_positions():
    start = make_start("ours")
    old = start.transformer
    new = start.continued(16, 3, 2, NAMES)
    assert new.config.sample_size == 16
    for size in (8, 16):
        assert torch.equal(predict(new, 0, size=size), predict(old, 0, size=size))
    start = make_start("stock")
    before = start.transformer.pos_embed.pos_embed.view(4, 4, -1)
    after = start.continued(16, 3, 2, NAMES).pos_embed.pos_embed.view(8, 8, -1)
    assert torch.equal(after[:4, :4], before)


def test_diffusion_asks_for_what_its_scheduler_needs():
    latents, noise = torch.randn(2, 5, 3, 4, 4, generator=torch.Generator().manual_seed(0)).unbind()
    for kind in ("epsilon", "v_prediction", "sample"):
        scheduler = DDPMScheduler(prediction_type=kind, clip_sample=False)
        objective = Diffusion(scheduler)
        levels = objective.spread(torch.tensor([0.0, 0.3, 0.5, 0.9, 0.999]))
        assert levels.tolist() == [0, 300, 500, 900, 999]
        noisy, timesteps = objective.noised(latents, noise, levels)
        scale = scheduler.alphas_cumprod[levels].sqrt().view(-1, 1, 1, 1)
        torch.testing.assert_close(noisy, scale * latents + (1 - scale**2).sqrt() * noise)
        right = {"epsilon": noise, "sample": latents, "v_prediction": scheduler.get_velocity(latents, noise, levels)}
        assert torch.equal(timesteps, levels)
        for miss in (0.0, 2.0):
            error = objective.loss(lambda *_, answer=right[kind] + miss, **__: (answer,), latents, noise, levels)
            torch.testing.assert_close(error, torch.full((5,), miss**2))
    drawn = objective.draw(4000, torch.device("cpu"))
    assert 0 <= drawn.min() < 5 and 994 < drawn.max() < 1000 and abs(drawn.float().mean() - 499.5) < 30


def test_flow_matching_spreads_and_draws_by_its_shift():
    shifted, plain = FlowMatching("uniform", 3.0), FlowMatching("uniform")
    levels = torch.linspace(0, 1, 5)
    assert torch.equal(plain.spread(levels), levels)
    torch.testing.assert_close(shifted.spread(levels), 3 * levels / (1 + 2 * levels))
    torch.manual_seed(0)
    assert shifted.draw(2000, torch.device("cpu")).mean() > plain.draw(2000, torch.device("cpu")).mean() + 0.1


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Pipelines and parts of them, in folders."""
    root = tmp_path_factory.mktemp("places")
    names = {0: "cat", 1: "dog"}  # the classes of the images
    for kind in ("ours", "stock"):
        pipeline = make_pipeline(kind, names)
        pipeline.vae.register_to_config(latents_mean=[0.1] * 3, latents_std=[0.7] * 3)
        pipeline.save_pretrained(root / kind)
    vae = make_autoencoder().to_diffusers()
    vae.register_to_config(latents_mean=[0.0] * 3, latents_std=[1.0] * 3)
    vae.save_pretrained(root / "vae")
    make_prior_pipeline().save_pretrained(root / "prior")
    return root


@pytest.mark.parametrize("kind", ["ours", "stock"])
def test_samples_before_the_first_step_are_those_of_the_given_pipeline(kind, places, image_folder, tmp_path, caplog):
    """However the given autoencoder says that its latents are normalised: the transformer knows them in one way."""
    caplog.set_level(logging.INFO)
    data = {"train_data_dir": image_folder, "vae": places / "vae", "output_dir": tmp_path}
    run(train_dit, STILL, pretrained_model_name_or_path=places / kind, **data)
    pipeline, old = (load_pipeline(str(folder), "cpu") for folder in (tmp_path / "pipeline", places / kind))
    levels = {"guidance_interval": (0, 1)}  # a new pipeline has another default
    drawn = [draw(each, ["cat", "dog"], guidance_scale=4.0, **levels) for each in (pipeline, old)]
    assert torch.equal(*drawn)
    assert type(pipeline.transformer) is type(old.transformer)
    assert "latents are normalised as in" in caplog.text
    if kind == "ours":
        assert pipeline.scheduler.config.shift == 2.0
    else:  # and so for whoever has diffusers alone
        old, stock = (DiTPipeline.from_pretrained(folder) for folder in (places / kind, tmp_path / "pipeline"))
        images = []
        for pipe in (old, stock):
            pipe.set_progress_bar_config(disable=True)
            options = {"guidance_scale": 1, "num_inference_steps": 3, "output_type": "np"}
            images.append(pipe([0, 1], generator=torch.Generator().manual_seed(0), **options).images)
        assert (images[0] == images[1]).all()


@pytest.mark.parametrize("kind", ["ours", "stock"])
def test_checkpoint_holds_all_but_the_weights(kind):
    start = make_start(kind)
    model = start.continued(8, 3, 1, {0: "dog", 1: "owl"})
    again = WarmStart.from_state(json.loads(json.dumps(start.state(start.scheduler))))
    pairs = ((again.continued(8, 3, 1, {0: "dog", 1: "owl"}), model), (again.scheduler, start.scheduler))
    for one, other in pairs:
        assert type(one) is type(other)
        settings = [{k: v for k, v in each.config.items() if k[0] != "_"} for each in (one, other)]
        assert settings[0] == settings[1]
    assert (again.is_flow_matching, again.shift) == (start.is_flow_matching, start.shift)


def test_latents_are_normalised_as_before_if_the_encoder_is_the_same():
    start = make_start("stock")  # whose autoencoder has a scaling factor, and no statistics
    vae, other = (make_autoencoder(latent_channels=channels).to_diffusers() for channels in (3, 4))
    for each in (vae, other):
        each.register_to_config(latents_mean=[0.1], latents_std=[0.7], scaling_factor=1.0)
    assert start.settles_statistics(vae) and not start.settles_statistics(other)
    assert (vae.config.latents_mean, vae.config.scaling_factor) == (None, 0.18215)
    assert (other.config.latents_mean, other.config.scaling_factor) == ([0.1], 1.0)


def test_resumed_run_equals_an_uninterrupted_one_and_needs_the_given_weights_no_more(places, image_folder, tmp_path):
    flags = BARE_DIT.replace("--model DiT-Ti/2 --num_layers 2 --num_attention_heads 2 --attention_head_dim 16", "")
    shutil.copytree(places / "stock", tmp_path / "given")
    data = {"train_data_dir": image_folder, "vae": places / "vae"}
    run(train_dit, flags, pretrained_model_name_or_path=tmp_path / "given", output_dir=tmp_path / "run", **data)
    shutil.rmtree(tmp_path / "given")
    resume(train_dit, flags, tmp_path / "run", tmp_path / "again", 4, ("pipeline",), **data)
    for name in (TRANSFORMER, "pipeline/model_index.json", "train_dit/log.jsonl"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    for change, message in (
        ("--patch_size 1", "was trained with `patch_size` 2, but now it is 1"),
        (f"--pretrained_model_name_or_path {places / 'ours'}", "was trained with `pretrained_model_name_or_path`"),
    ):
        with pytest.raises(UserError, match=message):
            run(train_dit, f"{flags} {change} --resume_from_checkpoint latest", output_dir=tmp_path / "again", **data)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("prior", "is a DAEVQGANPipeline, which has no diffusion transformer"),
        ("vae", "is of class AutoencoderKL, but .* An autoencoder belongs to `vae`"),
        ("nowhere", "cannot be loaded: .* Give the folder or Hub id of a pipeline"),
        ("user/nothing", "user/nothing cannot be loaded: "),
        ("damaged", "damaged cannot be loaded: .* Give the folder"),
        ("damaged_index", "damaged_index cannot be loaded: .*model_index.json"),
        ("alone", "a DiTTransformer2DModel alone, which does not tell what it predicts"),
    ],
)
def test_what_is_no_transformer_to_start_from_is_named(given, message, places, tmp_path):
    shutil.copytree(places / "ours", tmp_path / "damaged")
    with (tmp_path / "damaged" / "transformer" / "diffusion_pytorch_model.safetensors").open("r+b") as file:
        file.truncate(100)
    shutil.copytree(places / "stock", tmp_path / "damaged_index")
    (tmp_path / "damaged_index" / "model_index.json").write_text("{")
    shutil.copytree(places / "stock" / "transformer", tmp_path / "alone")
    name = next((str(root / given) for root in (places, tmp_path) if (root / given).exists()), given)
    with pytest.raises(UserError, match=message) as error:
        WarmStart.load(name)
    assert "\n" not in str(error.value)


def test_what_does_not_fit_the_weights_is_named(places):
    with pytest.raises(UserError, match="has `num_layers` 2, but `num_layers` 3 was asked for"):
        make_start("ours").architecture({"num_layers": 3, "num_attention_heads": 2})
    with pytest.raises(UserError, match="has a DiTTransformer2DModel, which needs classes, but the images have none"):
        make_start("stock").continued(8, 3, 2, None)
    config = compose(TrainDiTConfig, dataset_name="digits", vae="x", timestep_shift=2.0)
    with pytest.raises(UserError, match="`timestep_shift` is for flow matching, but .* its DDIMScheduler"):
        train_dit.make_objective(SimpleNamespace(config=config), make_start("stock"))
    data = {"dataset_name": "digits", "image_channels": 1, "vae": "x", "pretrained_model_name_or_path": "y"}
    config = compose(TrainDiTConfig, **data, repa_model="z", repa_layer=3)
    with pytest.raises(UserError, match="`repa_layer` is 3, but the transformer has blocks 1 to 2"):
        make_representation_alignment(config.alignment, make_transformer("stock"), 4, Accelerator(cpu=True), 0)


def test_folder_of_a_transformer_counts_as_its_pipeline_and_a_folder_alone_has_numbers_for_names(places, tmp_path):
    assert WarmStart.load(str(places / "stock" / "transformer")).pipeline.id2label == {0: "cat", 1: "dog"}
    shutil.copytree(places / "ours" / "transformer", tmp_path / "alone")
    start = WarmStart.load(str(tmp_path / "alone"))
    old = start.transformer
    assert torch.equal(predict(start.continued(8, 3, 2, {0: "owl", 1: "tit"}), 1), predict(old, 1))
    start.transformer = old
    assert torch.equal(predict(start.continued(8, 3, 2, NAMES), 1), predict(old, 2))
