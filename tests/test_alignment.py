"""Alignment with a frozen vision model: its laws, and what it changes in the two training scripts."""

import logging

import pytest
import torch
from accelerate import Accelerator
from models import make_autoencoder, save_backbone
from safetensors.torch import load_file
from scripts import BARE_DIT, TINY_DAE, assert_same_weights, launch, log_of, resume, run, succeed, weights
from torch.testing import assert_close

from dae_diffusers import DAEDiTPipeline, DAEDiTTransformer2DModel
from dae_diffusers.autoencoders.alignment import LatentAlignment
from dae_diffusers.autoencoders.settings import RegularizationConfig
from dae_diffusers.errors import ConfigError
from dae_diffusers.generators.repa import RepresentationAlignment, make_projector
from dae_diffusers.losses.alignment import (
    marginal_cosine_loss,
    marginal_distance_matrix_loss,
    representation_alignment_loss,
)
from dae_diffusers.losses.resizing import resize
from dae_diffusers.settings import compose
from dae_diffusers.training import cache_latents, train_dae, train_dit
from dae_diffusers.training.settings import TrainDAEConfig, TrainDiTConfig
from dae_diffusers.vision import load_backbone

pytestmark = pytest.mark.filterwarnings("ignore:.*larger than the data set")


@pytest.fixture(scope="module", params=["vit", "resnet"])
def any_backbone_folder(request, tmp_path_factory):
    return save_backbone(tmp_path_factory.mktemp("backbone"), request.param)


@pytest.fixture(scope="module")
def backbone_folder(tmp_path_factory):
    return save_backbone(tmp_path_factory.mktemp("backbone"), "vit")


@pytest.fixture(scope="module")
def vf_flags(backbone_folder):
    return TINY_DAE + f" --vf_model {backbone_folder} --vf_cosine_margin 0 --vf_distance_margin 0"


@pytest.fixture(scope="module")
def trained_autoencoder(tmp_path_factory, image_folder, vf_flags):
    folder = tmp_path_factory.mktemp("vf")
    run(train_dae, vf_flags, train_data_dir=image_folder, output_dir=folder)
    return folder


def checkpoint(folder, script: str, step: int, number: int) -> dict[str, torch.Tensor]:
    """The models of a checkpoint lie in the order in which they were prepared; the aligning one is the first."""
    name = "model.safetensors" if number == 0 else f"model_{number}.safetensors"
    return load_file(folder / script / "checkpoints" / f"checkpoint-{step:08d}" / name)


def test_losses_equal_their_formulas():
    torch.manual_seed(0)
    projected, features = torch.randn(2, 5, 2, 3), torch.randn(2, 5, 2, 3)
    cosine, distance, direct = [], [], []
    for z, f in zip(projected.flatten(2).mT, features.flatten(2).mT, strict=True):  # (N, D)
        z, f = z / z.norm(dim=1, keepdim=True), f / f.norm(dim=1, keepdim=True)
        for i in range(6):
            direct.append(-(z[i] @ f[i]))
            cosine.append(max(0.0, 1 - 0.5 - (z[i] @ f[i]).item()))
            distance += [max(0.0, abs((z[i] @ z[j] - f[i] @ f[j]).item()) - 0.25) for j in range(6)]
    assert_close(marginal_cosine_loss(projected, features), torch.tensor(cosine).mean())
    assert_close(marginal_distance_matrix_loss(projected, features), torch.tensor(distance).mean())
    assert_close(representation_alignment_loss(projected, features), torch.stack(direct).mean())


def test_scale_is_free_and_a_rotation_of_all_positions_keeps_the_distances():
    torch.manual_seed(0)
    features = torch.randn(2, 8, 3, 3)
    scaled = features * torch.rand(2, 1, 3, 3).add(0.1)
    rotation = torch.linalg.qr(torch.randn(8, 8)).Q
    rotated = torch.einsum("ij,bjhw->bihw", rotation, features)
    for margin in (0.0, 0.3):
        assert_close(marginal_cosine_loss(scaled, features, margin), torch.tensor(0.0), atol=1e-6, rtol=0)
        assert_close(marginal_distance_matrix_loss(rotated, features, margin), torch.tensor(0.0), atol=1e-6, rtol=0)
    assert marginal_cosine_loss(rotated, features, 0.0) > 0.5
    assert marginal_distance_matrix_loss(torch.randn(2, 3, 3, 3), features, 0.0) > 0  # widths may differ
    assert_close(representation_alignment_loss(scaled, features), torch.tensor(-1.0))


def test_nothing_pulls_inside_the_margins():
    features = torch.randn(1, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    projected = (features + 0.1).requires_grad_()
    loss = marginal_cosine_loss(projected, features, 0.5) + marginal_distance_matrix_loss(projected, features, 1.0)
    loss.backward()
    assert loss == 0 and not projected.grad.any()


def test_features_lie_where_their_patches_lie(any_backbone_folder):
    backbone = load_backbone(any_backbone_folder)
    image = torch.zeros(1, 3, 32, 32)
    marked = image.clone()
    marked[..., :8, -8:] = 1
    features = backbone.patch_features(torch.cat([image, marked]))
    assert features.shape[1] == backbone.patch_feature_dim and not features.requires_grad
    change = (features[1] - features[0]).norm(dim=0)
    rows, columns = change.shape
    assert change.argmax() == columns - 1
    quarter = resize(features, (2, 2))
    assert quarter.shape == (2, features.shape[1], 2, 2)
    assert (quarter[1] - quarter[0]).norm(dim=0).argmax() == 1


@pytest.fixture
def alignment(backbone_folder):
    torch.manual_seed(0)
    backbone = load_backbone(backbone_folder)
    projection = torch.nn.Conv2d(3, backbone.patch_feature_dim, 1, bias=False)
    settings = RegularizationConfig(vf_weight=0.5, vf_cosine_margin=0, vf_distance_margin=0, vf_adaptive_weight_cap=1e4)
    accelerator = Accelerator()
    return LatentAlignment(accelerator, backbone, accelerator.prepare(projection), settings)


@pytest.mark.parametrize("cap", [0.0, 1e-4, 1e4])
def test_vf_weight_is_the_capped_ratio_of_the_gradients(alignment, pixel_values, cap):
    alignment.settings.vf_adaptive_weight_cap = cap
    model = make_autoencoder()
    model.set_stage(1)
    reconstruction, posterior = model(pixel_values, return_dict=False)
    other = (reconstruction - pixel_values).abs().mean()
    term, logs = alignment.term(posterior.mean, pixel_values, other, model.encoder_last_layer)
    loss = logs["vf_cosine_loss"] + logs["vf_distance_loss"]
    layer = model.encoder.conv_out.weight
    norms = [torch.autograd.grad(value, layer, retain_graph=True)[0].norm() for value in (other, loss)]
    expected = min(cap, (norms[0] / norms[1]).item()) if cap else 1.0
    assert_close(term.item(), 0.5 * expected * loss.item(), rtol=1e-4, atol=1e-7)
    assert logs["vf_adaptive_weight"] == pytest.approx(expected, rel=1e-4)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_vf_gradient_reaches_the_encoder_and_the_projection_only(alignment, pixel_values):
    model = make_autoencoder()
    model.set_stage(1)
    reconstruction, posterior = model(pixel_values, return_dict=False)
    term, _ = alignment.term(posterior.mean, pixel_values, reconstruction.mean(), model.encoder_last_layer)
    term.backward()
    reached = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert reached == {"encoder", "quant_conv"}
    assert alignment.projection.weight.grad.any()
    assert all(parameter.grad is None for parameter in alignment.backbone.parameters())


def test_vf_loss_falls_and_belongs_to_stage_one(image_folder, tmp_path, vf_flags):
    flags = vf_flags + " --vf_weight 1 --stage1_steps 60 --stage2_steps 2 --learning_rate 3e-3 --lr_warmup_steps 0"
    run(
        train_dae,
        flags + " --logging_steps 1 --validation_steps 99 --checkpointing_steps 60",
        train_data_dir=image_folder,
        output_dir=tmp_path,
    )
    rows = [row for row in log_of(tmp_path, "train_dae") if "train/reconstruction_loss" in row]
    losses = [row["train/vf_cosine_loss"] + row["train/vf_distance_loss"] for row in rows[:60]]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    assert all(0 < row["train/vf_adaptive_weight"] <= 100 for row in rows[:60])
    assert not any("vf_" in name for row in rows[60:] for name in row)
    assert not any("projection" in name for folder in ("stage1", "vae") for name in weights(tmp_path / folder))


def test_vf_changes_the_encoder_only(image_folder, tmp_path, vf_flags):
    """In one step; afterwards the decoder has other latents to decode."""
    more = " --stage 1 --stage1_steps 1 --lr_warmup_steps 0 --max_grad_norm 1e9 --checkpointing_steps 1"
    run(train_dae, TINY_DAE + more, train_data_dir=image_folder, output_dir=tmp_path / "without")
    run(train_dae, vf_flags + more, train_data_dir=image_folder, output_dir=tmp_path / "with")
    without = checkpoint(tmp_path / "without", "train_dae", 1, 0)
    aligned = checkpoint(tmp_path / "with", "train_dae", 1, 1)
    assert checkpoint(tmp_path / "with", "train_dae", 1, 0).keys() == {"weight"}  # the projection
    assert without.keys() == aligned.keys()
    changed = {name.split(".")[0] for name in without if not torch.equal(without[name], aligned[name])}
    assert changed == {"encoder", "quant_conv"}


@pytest.mark.parametrize("step", [3, 6])
def test_resume_restores_the_vf_projection(trained_autoencoder, image_folder, tmp_path, vf_flags, step):
    folder = tmp_path / "run"
    resume(train_dae, vf_flags, trained_autoencoder, folder, step, ("vae", "stage1"), train_data_dir=image_folder)
    assert_same_weights(weights(trained_autoencoder / "vae"), weights(folder / "vae"))
    if step == 3:
        assert_same_weights(*(checkpoint(run, "train_dae", 4, 0) for run in (trained_autoencoder, folder)))
    assert log_of(trained_autoencoder, "train_dae") == log_of(folder, "train_dae")


def test_vf_in_two_processes_equals_one_that_accumulates(image_folder, tmp_path, vf_flags):
    """With a fixed weight: an adaptive one is of the micro-batch in one case and of both in the other."""
    flags = vf_flags + " --vf_adaptive_weight_cap 0 --vf_weight 0.5 --stage 1 --stage1_steps 3"
    run(train_dae, flags + " --gradient_accumulation_steps 2", train_data_dir=image_folder, output_dir=tmp_path / "1")
    succeed(launch("train_dae", flags, processes=2, train_data_dir=image_folder, output_dir=tmp_path / "2"))
    for number in (0, 1):
        first, second = (checkpoint(tmp_path / name, "train_dae", 3, number) for name in "12")
        assert_same_weights(first, second, rtol=2e-3, atol=2e-4)


def test_adaptive_vf_in_two_processes_equals_one_with_the_whole_batch(image_folder, tmp_path, vf_flags):
    """Without draws, that is without quantisation, and without dropout."""
    more = " --autoencoder vq --codebook_warmup_steps 2 --auxiliary_decoder same --stage 1 --stage1_steps 3"
    flags = vf_flags + more + " --checkpointing_steps 2"
    run(train_dae, flags + " --train_batch_size 8", train_data_dir=image_folder, output_dir=tmp_path / "1")
    succeed(launch("train_dae", flags, processes=2, train_data_dir=image_folder, output_dir=tmp_path / "2"))
    for number in (0, 1):
        first, second = (checkpoint(tmp_path / name, "train_dae", 2, number) for name in "12")
        learnt = [name for name in first if not name.startswith("quantize.")]  # the codebook is set by k-means of draws
        first, second = ({name: values[name] for name in learnt} for values in (first, second))
        assert_same_weights(first, second, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize(
    "more",
    [
        " --mixed_precision bf16 --gradient_checkpointing",
        " --autoencoder vq --codebook_size 16 --codebook_warmup_steps 1",
        " --auxiliary_decoder none",
        " --mask_ratio 0.3 --latent_denoising 1 --equivariance 0.5",
    ],
)
def test_vf_goes_with_everything_else(image_folder, tmp_path, vf_flags, more):
    run(train_dae, vf_flags + more, train_data_dir=image_folder, output_dir=tmp_path)
    assert all(value.isfinite().all() for value in weights(tmp_path / "vae").values())
    assert any("train/vf_adaptive_weight" in row for row in log_of(tmp_path, "train_dae"))


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"vf_weight": 0.0}, "`vf_weight` is 0.0"),
        ({"vf_cosine_margin": 2.0}, "below 2"),
        ({"vf_distance_margin": -0.1}, "at least 0"),
        ({"vf_adaptive_weight_cap": -1.0}, "0 or more"),
        ({"vf_model": "x", "image_channels": 5}, "`vf_model` takes pictures"),
    ],
)
def test_bad_flags_of_the_vf_loss_are_refused_with_a_sentence(flags, sentence):
    with pytest.raises(ConfigError, match=sentence):
        compose(TrainDAEConfig, **{"dataset_name": "digits", "resolution": 32, **flags})


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    vae = make_autoencoder().to_diffusers()
    vae.register_to_config(latents_mean=[0.0] * 3, latents_std=[1.0] * 3, scaling_factor=1.0)
    vae.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def repa_flags(backbone_folder, vae_folder):
    return BARE_DIT + f" --vae {vae_folder} --repa_model {backbone_folder} --repa_projector_dim 16 --repa_layer 1"


@pytest.fixture(scope="module")
def trained_transformer(tmp_path_factory, image_folder, repa_flags):
    folder = tmp_path_factory.mktemp("repa")
    run(train_dit, repa_flags, train_data_dir=image_folder, output_dir=folder)
    return folder


def make_transformer() -> DAEDiTTransformer2DModel:
    torch.manual_seed(0)
    transformer = DAEDiTTransformer2DModel(
        sample_size=8, in_channels=3, num_layers=3, num_attention_heads=2, attention_head_dim=8
    )
    for parameter in transformer.modulation.parameters():  # not the identity that a new model is
        torch.nn.init.normal_(parameter, std=0.2)
    return transformer


@pytest.fixture
def representation_alignment(backbone_folder):
    def align(transformer: DAEDiTTransformer2DModel) -> RepresentationAlignment:
        backbone = load_backbone(backbone_folder)
        torch.manual_seed(1)
        projector = make_projector(16, 12, backbone.patch_feature_dim)
        return RepresentationAlignment(Accelerator(), backbone, projector, transformer.transformer_blocks[1], 4, 0.5)

    return align


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of the compiler itself
@pytest.mark.parametrize("variant", ["plain", "checkpointing", "compiled", "compiled blocks"])
def test_repa_is_of_its_block_however_the_transformer_runs(
    fresh_compiler, representation_alignment, pixel_values, variant
):
    transformer = make_transformer()
    alignment = representation_alignment(transformer)
    model = transformer
    if variant == "checkpointing":
        transformer.train().enable_gradient_checkpointing()
    elif variant == "compiled":
        model = torch.compile(transformer, backend="aot_eager")
    elif variant == "compiled blocks":
        transformer.compile_repeated_blocks(backend="aot_eager")
    latents, timestep = (
        torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2)),
        torch.tensor([100.0, 700.0]),
    )
    for _ in range(2):  # a second step sees nothing of the first
        transformer.zero_grad()
        velocity = model(latents, timestep, return_dict=False)[0]
        term, logs = alignment.term(pixel_values)
        (velocity.square().mean() + term).backward()

    reference, outputs = make_transformer(), []
    reference.transformer_blocks[1].register_forward_hook(lambda module, inputs, output: outputs.append(output))
    velocity = reference(latents, timestep, return_dict=False)[0]
    features = resize(alignment.backbone.patch_features(pixel_values), (4, 4))
    expected = representation_alignment_loss(alignment.projector(outputs[0]).mT.reshape(2, -1, 4, 4), features)
    assert_close(logs["repa_loss"], expected)
    assert_close(term, 0.5 * expected)
    (velocity.square().mean() + 0.5 * expected).backward()
    for (name, parameter), other in zip(transformer.named_parameters(), reference.parameters(), strict=True):
        assert_close(parameter.grad, other.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_repa_reaches_the_blocks_up_to_its_own(representation_alignment, pixel_values):
    transformer = make_transformer()
    alignment = representation_alignment(transformer)
    transformer(torch.randn(2, 3, 8, 8), torch.tensor(500.0))
    with torch.no_grad():  # drawing samples in between changes nothing
        transformer(torch.randn(5, 3, 8, 8), torch.tensor(500.0))
    alignment.term(pixel_values)[0].backward()
    reached = [block.ff.down_proj.weight.grad is not None for block in transformer.transformer_blocks]
    assert reached == [True, True, False]
    assert all(parameter.grad.any() for parameter in alignment.projector.parameters())
    assert all(parameter.grad is None for parameter in alignment.backbone.parameters())


def test_repa_loss_falls(image_folder, tmp_path, repa_flags):
    flags = repa_flags + " --max_train_steps 60 --learning_rate 3e-3 --lr_warmup_steps 0 --validation_steps 60"
    run(train_dit, flags, train_data_dir=image_folder, output_dir=tmp_path)
    losses = [row["train/repa_loss"] for row in log_of(tmp_path, "train_dit") if "train/repa_loss" in row]
    assert len(losses) == 60 and sum(losses[-10:]) < sum(losses[:10]) - 10 * 0.2


def test_exported_pipeline_knows_nothing_of_repa(trained_transformer, image_folder, tmp_path, vae_folder):
    run(train_dit, BARE_DIT, train_data_dir=image_folder, output_dir=tmp_path, vae=vae_folder)
    aligned, plain = (folder / "pipeline" / "transformer" for folder in (trained_transformer, tmp_path))
    assert (aligned / "config.json").read_text() == (plain / "config.json").read_text()
    shapes = [{name: value.shape for name, value in weights(folder).items()} for folder in (aligned, plain)]
    assert shapes[0] == shapes[1]
    files = [sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) for folder in (aligned, plain)]
    assert files[0] == files[1]
    pipeline = DAEDiTPipeline.from_pretrained(trained_transformer / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    assert len(pipeline(class_labels=["cat"], num_inference_steps=1).images) == 1


def test_resume_restores_the_repa_projector(trained_transformer, image_folder, tmp_path, repa_flags):
    folder = tmp_path / "run"
    resume(train_dit, repa_flags, trained_transformer, folder, 4, ("pipeline",), train_data_dir=image_folder)
    for number in (0, 1):
        assert_same_weights(*(checkpoint(path, "train_dit", 6, number) for path in (trained_transformer, folder)))
    assert_same_weights(*(weights(path / "pipeline" / "transformer") for path in (trained_transformer, folder)))
    assert log_of(trained_transformer, "train_dit") == log_of(folder, "train_dit")


def test_repa_in_two_processes_equals_one_that_accumulates(image_folder, tmp_path, repa_flags):
    more = " --gradient_accumulation_steps 2"
    run(train_dit, repa_flags + more, train_data_dir=image_folder, output_dir=tmp_path / "1")
    succeed(launch("train_dit", repa_flags, processes=2, train_data_dir=image_folder, output_dir=tmp_path / "2"))
    for number in (0, 1):
        first, second = (checkpoint(tmp_path / name, "train_dit", 6, number) for name in "12")
        assert_same_weights(first, second, rtol=1e-3, atol=1e-4)


def test_repa_takes_the_images_beside_a_latent_cache(image_folder, tmp_path, repa_flags, vae_folder):
    flags = repa_flags + " --random_flip"
    data = {"train_data_dir": image_folder, "vae": vae_folder}
    run(cache_latents, "--resolution 16 --dtype float32 --random_flip", output_dir=tmp_path / "cache", **data)
    run(train_dit, flags, train_data_dir=image_folder, output_dir=tmp_path / "images")
    run(
        train_dit,
        flags,
        train_data_dir=image_folder,
        output_dir=tmp_path / "cached",
        latent_cache=tmp_path / "cache",
    )
    first, second = (weights(tmp_path / name / "pipeline" / "transformer") for name in ("images", "cached"))
    assert_same_weights(first, second, rtol=1e-3, atol=1e-4)


def test_repa_in_bfloat16_without_classes(image_folder, tmp_path, repa_flags):
    flags = repa_flags + " --mixed_precision bf16 --gradient_checkpointing --label_column none"
    run(train_dit, flags, train_data_dir=image_folder, output_dir=tmp_path)
    values = weights(tmp_path / "pipeline" / "transformer").values()
    assert {value.dtype for value in values} == {torch.float32} and all(value.isfinite().all() for value in values)
    rows = [row for row in log_of(tmp_path, "train_dit") if "train/repa_loss" in row]
    assert len(rows) == 6 and all(-1 <= row["train/repa_loss"] <= 1 for row in rows)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"repa_weight": 0.0}, "`repa_weight` is 0.0"),
        ({"repa_projector_dim": 0}, "at least 1"),
        ({"repa_layer": 13}, "blocks 1 to 12"),
        ({"repa_layer": 0}, "blocks 1 to 12"),
        ({"repa_model": "x", "dataset_name": None, "latent_cache": "cache"}, "give them beside"),
        ({"repa_model": "x", "latent_cache": "cache", "random_crop": True}, "other images"),
        ({"repa_model": "x", "image_channels": 5}, "`repa_model` takes pictures"),
    ],
)
def test_bad_flags_of_repa_are_refused_with_a_sentence(flags, sentence):
    with pytest.raises(ConfigError, match=sentence):
        compose(TrainDiTConfig, **{"dataset_name": "digits", "vae": "vae", **flags})


@pytest.fixture(autouse=True)
def quiet_logs():
    yield
    logging.getLogger().setLevel(logging.WARNING)
