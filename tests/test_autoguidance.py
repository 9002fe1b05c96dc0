"""Guidance by a weaker version of the transformer: its law, its folders, and the training that keeps its weights."""

import functools

import pytest
import torch
from diffusers import DiffusionPipeline
from models import save_autoencoder, save_backbone
from safetensors.torch import load_file
from scripts import TINY_DIT, assert_same_weights, log_of, resume, run, weights
from test_image_pipelines import draw, make_pipeline
from torch.testing import assert_close

from dae_diffusers import DAEDiTInterpolationPipeline, DAEDiTPipeline, DAEDiTTransformer2DModel
from dae_diffusers.engine.run import TrainingRun
from dae_diffusers.errors import ConfigError, UserError
from dae_diffusers.metrics.sampling import Sampler
from dae_diffusers.settings import compose
from dae_diffusers.training import train_dit
from dae_diffusers.training.settings import TrainDiTConfig

CLOSE = {"atol": 1e-5, "rtol": 0}
WEAKER = "train_dit/guidance_transformer"


def weaker_transformer(**changes):
    torch.manual_seed(1)
    size = {"num_classes": 2, "num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 8, **changes}
    model = DAEDiTTransformer2DModel(8, in_channels=3, **size)
    for module in (model.modulation, model.proj_out):
        torch.nn.init.normal_(module.weight, std=0.2)
    return model.eval()


def guided_pipeline():
    return DAEDiTPipeline(**make_pipeline().components | {"guidance_transformer": weaker_transformer()})


def test_guidance_leads_away_from_the_weaker_prediction():
    pipeline, plain = guided_pipeline(), make_pipeline()
    alone = DAEDiTPipeline(**plain.components | {"transformer": weaker_transformer()})
    start = torch.randn(2, 3, 8, 8)
    options = {"num_inference_steps": 1, "output_type": "latent", "latents": start}
    strong, weak = (draw(each, [0, 1], guidance_scale=1.0, **options) for each in (plain, alone))
    # One step of flow matching from noise is linear in the prediction.
    assert_close(draw(pipeline, [0, 1], guidance_scale=3.0, **options), weak + 3 * (strong - weak), atol=1e-4, rtol=0)
    assert torch.equal(draw(pipeline, "cat"), draw(pipeline, "cat", guidance_scale=2.0))  # its default
    assert torch.equal(draw(pipeline, "cat", guidance_scale=1.0), draw(plain, "cat", guidance_scale=1.0))
    assert not torch.equal(draw(pipeline), draw(plain))  # also without a class
    assert torch.equal(draw(pipeline, guidance_interval=(0, 0)), draw(plain))
    series = DAEDiTInterpolationPipeline.from_pipe(pipeline)
    assert_close(draw(series, ("cat", "dog"), num_images=3)[2:], draw(pipeline, "dog"), atol=1e-5, rtol=0)


def test_a_transformer_that_guides_itself_changes_nothing():
    pipeline = make_pipeline()
    itself = DAEDiTPipeline(**pipeline.components | {"guidance_transformer": pipeline.transformer})
    assert_close(draw(itself, "cat", guidance_scale=5.0), draw(pipeline, "cat", guidance_scale=1.0), atol=1e-4, rtol=0)


def test_transformers_that_do_not_go_together_are_refused():
    with pytest.raises(ValueError, match="`num_classes` of the transformer is 2 and that of `guidance_transformer` 3"):
        DAEDiTPipeline(**make_pipeline().components | {"guidance_transformer": weaker_transformer(num_classes=3)})


def test_folders_hold_both_transformers(tmp_path):
    pipeline = guided_pipeline()
    pipeline.save_pretrained(tmp_path / "saved")
    expected = draw(pipeline, "dog")
    loaded = DAEDiTPipeline.from_pretrained(tmp_path / "saved")
    loaded.set_progress_bar_config(disable=True)
    assert_close(draw(loaded, "dog"), expected, **CLOSE)
    stronger = DAEDiTPipeline.from_pretrained(tmp_path / "saved", transformer=pipeline.transformer)
    stronger.set_progress_bar_config(disable=True)
    assert_close(draw(stronger, "dog"), expected, **CLOSE)
    folder = str(tmp_path / "saved")
    alone = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
    alone.set_progress_bar_config(disable=True)
    assert_close(draw(alone, "dog"), expected, **CLOSE)
    without = DAEDiTPipeline.from_pretrained(tmp_path / "saved", guidance_transformer=None)
    assert without.guidance_transformer is None


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, image_folder):
    vae = save_autoencoder(tmp_path_factory.mktemp("inputs") / "vae")
    return {"train_data_dir": image_folder, "vae": vae, "label_column": "none"}


FLAGS = TINY_DIT + " --autoguidance_steps 2"


@pytest.fixture(scope="module")
def kept(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept")
    run(train_dit, FLAGS + " --checkpointing_steps 1", output_dir=folder, **inputs)
    return folder


def test_training_keeps_the_averaged_weights_of_a_step(kept):
    pipeline = DAEDiTPipeline.from_pretrained(kept / "pipeline")
    found = weights(kept / "pipeline" / "guidance_transformer")
    shadow = load_file(kept / "train_dit" / "checkpoints" / "checkpoint-00000002" / "ema.safetensors")
    for number, (name, _) in enumerate(pipeline.transformer.named_parameters()):
        assert torch.equal(found[name], shadow[str(number)]), name
    assert any(not torch.equal(value, found[name]) for name, value in pipeline.transformer.state_dict().items())
    assert "guidance_scale" in Sampler(pipeline).accepted
    assert pipeline.null_class is None  # nothing else could guide


@pytest.mark.parametrize("step", [1, 3])  # before and after its weights are kept
def test_resumed_run_has_the_same_guidance(step, kept, inputs, tmp_path):
    resume(train_dit, FLAGS, kept, tmp_path / "run", step, ("pipeline", *((WEAKER,) if step == 1 else ())), **inputs)
    for name in ("transformer", "guidance_transformer"):
        assert_same_weights(*(weights(folder / "pipeline" / name) for folder in (kept, tmp_path / "run")))


@pytest.mark.filterwarnings("ignore:.*covariance is singular")
def test_only_measurements_with_guidance_count_for_the_best(inputs, tmp_path, monkeypatch):
    drawn, call = [], DAEDiTPipeline.__call__

    @functools.wraps(call)
    def note(self, *args, guidance_scale, **kwargs):
        drawn.append((self.guidance_transformer is not None, guidance_scale))
        return call(self, *args, guidance_scale=guidance_scale, **kwargs)

    monkeypatch.setattr(DAEDiTPipeline, "__call__", note)
    # Weights that stay the same: the first measurement that counts is the best, and patience ends the run two later.
    flags = TINY_DIT + " --max_train_steps 9 --autoguidance_steps 3 --class_dropout_prob 0 --learning_rate 1e-30"
    flags += " --metric_images 12 --metric_steps 1 --validation_steps 1 --early_stopping_patience 2 --export best"
    judge = save_backbone(tmp_path / "judge", "classifier")
    by_class = {name: value for name, value in inputs.items() if name != "label_column"}
    # What `hub_strategy every_save` uploads meanwhile draws as well as it can at that time.
    monkeypatch.setattr(TrainingRun, "push_snapshot", lambda self, step, _, save: save(tmp_path / f"snapshot-{step}"))
    flags += " --checkpointing_steps 2"
    run(train_dit, flags, output_dir=tmp_path / "run", metric_features=judge, **by_class)
    for step, scale in ((2, 1.0), (4, 2.0)):
        snapshot = DAEDiTPipeline.from_pretrained(tmp_path / f"snapshot-{step}")
        assert (snapshot.guidance_transformer is not None) == (step > 3)
        assert snapshot.config.default_guidance_scale == scale
    assert set(drawn) == {(False, 1.0), (True, 2.0)}  # nothing else has learnt to guide
    measured = [row["step"] for row in log_of(tmp_path / "run", "train_dit") if "validation/gfd_judge" in row]
    assert measured == [1, 2, 3, 4, 5, 6]
    assert [path.name for path in (tmp_path / "run" / "train_dit" / "best").iterdir()] == ["step-4"]
    assert DAEDiTPipeline.from_pretrained(tmp_path / "run" / "pipeline").guidance_transformer is not None


def test_impossible_steps_are_named(kept, inputs, tmp_path):
    with pytest.raises(UserError, match="`--autoguidance_steps` 6 must be below the 6 steps of the training"):
        run(train_dit, TINY_DIT + " --autoguidance_steps 6", output_dir=tmp_path / "new", **inputs)
    with pytest.raises(UserError, match="goes on at step 3 and has kept no weights of step 2"):
        resume(train_dit, FLAGS, kept, tmp_path / "run", 3, ("pipeline", WEAKER), **inputs)
    other = TINY_DIT + " --autoguidance_steps 1"  # there are weights, but of another step
    with pytest.raises(UserError, match="`--autoguidance_steps` 1 was given, but the run goes on at step 3"):
        resume(train_dit, other, kept, tmp_path / "other", 3, ("pipeline",), **inputs)
    with pytest.raises(ConfigError, match="`autoguidance_steps` does not go with `distill_guidance_scale`"):
        compose(TrainDiTConfig, vae="v", train_data_dir="d", autoguidance_steps=2, distill_guidance_scale=1.5,
                pretrained_model_name_or_path="x")  # fmt: skip
