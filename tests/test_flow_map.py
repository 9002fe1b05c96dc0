"""Distillation into a flow map: the law of its loss, what a step of it is, and the way from a pipeline to one of few steps."""

import json
import shutil

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DiTTransformer2DModel,
    FlowMapEulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from models import TINY_TRANSFORMER, make_autoencoder, make_random_transformer
from scripts import TRANSFORMER, log_of, resume, run

from dae_diffusers import DAEDiTImg2ImgPipeline, DAEDiTInterpolationPipeline, DAEDiTPipeline, DAEDiTTransformer2DModel
from dae_diffusers.errors import UserError
from dae_diffusers.generators.flow_map import FlowMap
from dae_diffusers.generators.take_over import take_over
from dae_diffusers.generators.warm_start import WarmStart
from dae_diffusers.hub.card import make_card
from dae_diffusers.hub.results import read_result
from dae_diffusers.training import evaluate, train_dit

pytestmark = pytest.mark.filterwarnings("ignore:.*larger than the data set")

NAMES = {0: "cat", 1: "dog"}  # the classes of the images
FLAGS = "--resolution 16 --max_train_steps 6 --train_batch_size 4 --logging_steps 1 --validation_steps 9 --checkpointing_steps 2"
FLAGS += " --num_sample_images 2 --sample_steps 1 --distill_guidance_scale 1.5"


def make_transformer(**config) -> DAEDiTTransformer2DModel:
    return make_random_transformer(**{"num_classes": 2, **config})


def make_pipeline(
    scheduler=None, transformer=None, conditions=None, names=NAMES, guide=None, **config
) -> DAEDiTPipeline:
    vae = make_autoencoder(sample_size=16).to_diffusers()
    vae.register_to_config(latents_mean=[0.1] * 3, latents_std=[0.7] * 3)
    pipeline = DAEDiTPipeline(
        transformer or make_transformer(**config),
        vae,
        scheduler or FlowMatchEulerDiscreteScheduler(),
        id2label=names,
        conditions=conditions,
        guidance_transformer=guide,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: DAEDiTPipeline, **options) -> torch.Tensor:
    generators = [torch.Generator().manual_seed(n) for n in range(2)]
    options = {"num_inference_steps": 3, "output_type": "pt", "generator": generators, **options}
    return pipeline(class_labels=["cat", "dog"], **options).images


@torch.no_grad()
def predict(model: DAEDiTTransformer2DModel, start: float, end: float | None = None) -> torch.Tensor:
    noisy = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    interval = {} if end is None else {"r_timestep": torch.tensor([end])}
    return model(noisy, torch.tensor([start]), class_labels=torch.tensor([0, 1]), **interval).sample


def flow_of_normal_data(noisy, timestep, r_timestep=None, **_):
    """The flow from data with standard deviation 0.5, by its formula: latents keep their place in a distribution of this deviation."""
    start, end = (None if t is None else (t / 1000).view(-1, 1, 1, 1) for t in (timestep, r_timestep))

    def deviation(level):
        return ((1 - level) ** 2 * 0.25 + level**2).sqrt()

    velocity = noisy * (start - (1 - start) * 0.25) / deviation(start) ** 2
    if end is None:
        return (velocity,)
    mean = noisy * (1 - deviation(end) / deviation(start)) / (start - end).clamp(min=1e-6)
    return (torch.where(start == end, velocity, mean),)


def test_the_true_flow_has_no_loss_and_one_that_ignores_where_steps_end_has():
    objective = FlowMap(flow_of_normal_data)
    latents, noise = torch.randn(2, 64, 3, 4, 4, generator=torch.Generator().manual_seed(0)).unbind()
    torch.manual_seed(0)
    for levels in (objective.draw(64, torch.device("cpu")), objective.spread((torch.arange(64) + 0.5) / 64)):
        assert (levels[:, 0] >= levels[:, 1]).all() and 0 <= levels.min() and levels.max() <= 1
        losses = objective.loss(flow_of_normal_data, latents, noise, levels, unconditional={})
        assert losses.shape == (64,) and losses.max() < 1e-8
        shortsighted = objective.loss(
            lambda noisy, timestep, **_: flow_of_normal_data(noisy, timestep), latents, noise, levels, unconditional={}
        )
        assert not shortsighted[:32].any() and shortsighted[32:].mean() > 1e-3


def test_validation_loss_does_not_depend_on_the_batch():
    latents, noise = torch.randn(2, 5, 3, 4, 4, generator=torch.Generator().manual_seed(0)).unbind()
    objective = FlowMap(flow_of_normal_data)
    levels = objective.spread((torch.arange(5) + 0.5) / 5)

    def losses(size):
        parts = zip(*(each.split(size) for each in (latents, noise, levels)), strict=True)
        model = lambda noisy, timestep, **_: (0 * noisy,)  # noqa: E731
        return torch.cat([objective.loss(model, *part, unconditional={}, in_halves=False) for part in parts])

    torch.testing.assert_close(losses(1), losses(5))
    torch.testing.assert_close(losses(2), losses(5))


def test_levels_of_validation_are_evenly_spread_pairs():
    quantiles = (torch.randperm(400, generator=torch.Generator().manual_seed(0)) + 0.5) / 400
    pairs = FlowMap(flow_of_normal_data).spread(quantiles)
    start, end = pairs.unbind(1)
    # Of two even numbers the larger is 2/3 on average, and the smaller 1/3.
    assert abs(start.mean() - 2 / 3) < 0.02 and abs(end.mean() - 1 / 3) < 0.02
    shifted = FlowMap(flow_of_normal_data, shift=3.0).spread(quantiles)
    torch.testing.assert_close(shifted, 3 * pairs / (1 + 2 * pairs))


def test_teacher_guides_by_what_stands_for_no_class_or_by_a_weaker_one():
    def teacher(noisy, timestep, class_labels, **_):
        return (noisy + class_labels.view(-1, 1, 1, 1),)

    latents, noise = torch.randn(2, 2, 3, 4, 4).unbind()
    labels, null = torch.tensor([3, 4]), torch.tensor([1, 1])
    found = []

    def model(noisy, timestep, class_labels, r_timestep, **_):
        found.append(noisy)
        return (torch.zeros_like(noisy),)

    objective = FlowMap(teacher, guidance_scale=2.0)
    levels = torch.tensor([[0.7, 0.2], [0.7, 0.2]])
    losses = objective.loss(model, latents, noise, levels, unconditional={"class_labels": null}, class_labels=labels)
    target = found[-1][0] + 1 + 2.0 * (3 - 1)  # the first half of the batch
    torch.testing.assert_close(losses[0], target.square().mean())
    for interval, scale in (((0.3, 0.7), 2.0), ((0.0, 0.6), 1.0)):  # bounds belong to it; outside there is no guidance
        objective.guidance_interval = interval
        given = {"unconditional": {"class_labels": null}, "class_labels": labels}
        losses = objective.loss(model, latents, noise, levels, **given)
        torch.testing.assert_close(losses[0], (found[-1][0] + 1 + scale * (3 - 1)).square().mean())
    objective.guidance_interval = (0.0, 1.0)
    objective.guide = lambda *arguments, **given: (3 * teacher(*arguments, **given)[0],)  # also gets the class
    losses = objective.loss(model, latents, noise, levels, unconditional={"class_labels": null}, class_labels=labels)
    target = (found[-1][0] + 3) * (3 + 2.0 * (1 - 3))
    torch.testing.assert_close(losses[0], target.square().mean())


def test_a_new_flow_map_predicts_what_the_old_transformer_does_and_a_plain_one_goes_on_as_at_steps_of_length_0():
    old = make_transformer()
    sizes = {"sample_size": 8, "in_channels": 3, "patch_size": 2, "rows": [0, 1]}
    new, changes = take_over(old, **sizes, flow_map=True)
    assert changes == ["steps have a second noise level"]
    for end in (None, 700.0, 200.0, 0.0):
        assert torch.equal(predict(new, 700.0, end), predict(old, 700.0))
    flow_map = make_transformer(flow_map=True)
    assert torch.equal(predict(flow_map, 700.0), predict(flow_map, 700.0, 700.0))
    assert not torch.allclose(predict(flow_map, 700.0), predict(flow_map, 700.0, 200.0))
    plain, changes = take_over(flow_map, **sizes)
    assert changes == ["its steps' second noise level is left out"] and plain.interval_embed is None
    torch.testing.assert_close(predict(plain, 700.0), predict(flow_map, 700.0), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"no flow map \(`flow_map=False`\)"):
        predict(old, 700.0, 200.0)
    with pytest.raises(ValueError, match=r"`r_timestep` has shape \(3,\), but must be \(2,\)"):
        flow_map(torch.zeros(2, 3, 8, 8), torch.tensor(1.0), r_timestep=torch.zeros(3))


def test_pipeline_steps_to_the_next_noise_level_and_has_its_guidance_in_it(tmp_path):
    pipeline = make_pipeline(FlowMapEulerDiscreteScheduler(shift=2.0), flow_map=True)
    generators = [torch.Generator().manual_seed(n) for n in range(2)]
    latents = torch.cat([torch.randn(1, 3, 8, 8, generator=generator) for generator in generators])
    levels = torch.linspace(1, 0, 4, dtype=torch.float64)
    levels = (2 * levels / (1 + levels)).float()
    with torch.no_grad():
        for start, end in zip(levels[:-1], levels[1:], strict=True):
            velocity = pipeline.transformer(
                latents, 1000 * start, class_labels=torch.tensor([0, 1]), r_timestep=1000 * end
            ).sample
            latents = latents - (start - end) * velocity
    drawn = draw(pipeline, output_type="latent")
    torch.testing.assert_close(drawn, latents, rtol=1e-3, atol=1e-3)
    assert torch.equal(draw(pipeline, output_type="latent", guidance_scale=1.0), drawn)
    pipeline.save_pretrained(tmp_path)
    stock = DiffusionPipeline.from_pretrained(tmp_path, custom_pipeline=str(tmp_path), trust_remote_code=True)
    stock.set_progress_bar_config(disable=True)
    assert torch.equal(draw(stock, output_type="latent"), drawn)
    # Any other scheduler asks for velocities, with the guidance in them.
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    plain = take_over(pipeline.transformer, sample_size=8, in_channels=3, patch_size=2, rows=[0, 1])[0]
    expected = draw(make_pipeline(pipeline.scheduler, plain), guidance_scale=1.0, output_type="latent")
    torch.testing.assert_close(draw(pipeline, output_type="latent"), expected, rtol=1e-3, atol=1e-3)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    pipeline = make_pipeline(FlowMatchEulerDiscreteScheduler(shift=2.0))
    pipeline.save_pretrained(folder)
    pipeline.vae.save_pretrained(folder.parent / "vae")
    return folder


@pytest.fixture(scope="module")
def distilled(teacher, image_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("distilled")
    data = {"train_data_dir": image_folder, "vae": teacher / "vae", "pretrained_model_name_or_path": teacher}
    run(train_dit, FLAGS, output_dir=folder, **data)
    return folder, data


def test_distilled_pipeline_draws_in_few_steps_and_resumes_bit_by_bit(distilled, teacher, tmp_path):
    folder, data = distilled
    pipeline = DAEDiTPipeline.from_pretrained(folder / "pipeline")
    assert type(pipeline.scheduler) is FlowMapEulerDiscreteScheduler and pipeline.scheduler.config.shift == 2.0
    assert pipeline.transformer.config.flow_map and pipeline.is_flow_matching and pipeline.id2label == NAMES
    assert draw(pipeline, num_inference_steps=2).isfinite().all()
    assert log_of(folder, "train_dit")[-1]["validation/loss"] > 0
    resume(train_dit, FLAGS, folder, tmp_path / "again", 4, ("pipeline",), **data)
    for name in (TRANSFORMER, "train_dit/log.jsonl"):
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    other = DAEDiTTransformer2DModel.from_pretrained(teacher / "transformer")
    torch.nn.init.ones_(other.proj_out.bias)
    shutil.copytree(teacher / "transformer", tmp_path / "kept")
    other.save_pretrained(teacher / "transformer")
    with pytest.raises(UserError, match="the distilled transformer"):
        run(train_dit, f"{FLAGS} --resume_from_checkpoint latest", output_dir=tmp_path / "again", **data)
    shutil.copytree(tmp_path / "kept", teacher / "transformer", dirs_exist_ok=True)


def test_classes_in_another_order_make_the_same_flow_map(distilled, teacher, tmp_path):
    folder, data = distilled
    swapped = DAEDiTPipeline.from_pretrained(teacher, id2label={0: "dog", 1: "cat"})
    table = swapped.transformer.label_embed.weight.data
    table.copy_(table[[1, 0, 2]].clone())
    swapped.save_pretrained(tmp_path / "swapped")
    run(
        train_dit, FLAGS, output_dir=tmp_path / "run", **{**data, "pretrained_model_name_or_path": tmp_path / "swapped"}
    )
    for name in (TRANSFORMER, "train_dit/log.jsonl"):
        assert (folder / name).read_bytes() == (tmp_path / "run" / name).read_bytes()


def test_teacher_knows_classes_and_conditions_by_their_numbers_now(tmp_path):
    """Also when a run goes on, whose checkpoint holds the flow map alone."""
    transformer = make_transformer(num_attribute_classes=[2, 3])
    old = {"color": {"labels": ["blue", "red"]}, "shape": {"labels": ["cup", "egg", "pear"]}}
    guide = make_transformer(num_attribute_classes=[2, 3], num_layers=1, patch_size=1)
    make_pipeline(transformer=transformer, conditions=old, guide=guide).save_pretrained(tmp_path / "given")
    wanted = {"color": {"labels": ["red", "blue"]}, "shape": {"labels": ["pear", "cup", "egg"]}}
    start = WarmStart.load(str(tmp_path / "given"))
    student = start.continued(8, 3, 2, {0: "dog", 1: "cat"}, conditions=wanted, flow_map=True)
    torch.nn.init.zeros_(student.proj_out.weight)
    resumed = WarmStart.from_state(json.loads(json.dumps(start.state(start.scheduler))), start.name)
    resumed.continued(8, 3, 2, {0: "dog", 1: "cat"}, conditions=wanted, flow_map=True)
    before = {"class_labels": [0], "attribute_labels": [[1, 2]]}
    now = {"class_labels": [1], "attribute_labels": [[0, 0]]}
    noisy, level = torch.randn(1, 3, 8, 8), torch.tensor([700.0])
    with torch.no_grad():
        for given, *teachers in zip((transformer, guide), start.teachers, resumed.teachers, strict=True):
            expected, *found = (
                model(noisy, level, **{name: torch.tensor(value) for name, value in values.items()}).sample
                for model, values in ((given, before), *((each, now) for each in teachers))
            )
            assert all(torch.equal(each, expected) for each in found)
    with pytest.raises(
        UserError, match="draws, but condition color has other classes; its condition shape is left out"
    ):
        WarmStart.load(str(tmp_path / "given")).continued(
            8, 3, 2, NAMES, conditions={"color": {"labels": ["red", "green"]}}, flow_map=True
        )


def test_run_goes_on_only_as_the_distillation_that_it_was(distilled, teacher, tmp_path):
    folder, data = distilled
    plain, more = FLAGS.replace(" --distill_guidance_scale 1.5", ""), "--resume_from_checkpoint latest"
    message = r"was trained with `distill_guidance_scale` 1.5, but now it is {}\. Continue with 1.5, or train"
    for flags, now in ((plain, "left out"), (f"{FLAGS} --distill_guidance_scale 2", "2.0")):
        with pytest.raises(UserError, match=message.format(now)):
            run(train_dit, f"{flags} {more}", output_dir=folder, **data)
    with pytest.raises(
        UserError, match="with `sample_guidance_interval` 0.0 1.0, but now it is 0.0 0.5. Continue with 0.0 1.0"
    ):
        run(train_dit, f"{FLAGS} --sample_guidance_interval 0 0.5 {more}", output_dir=folder, **data)
    run(train_dit, plain.replace("max_train_steps 6", "max_train_steps 2"), output_dir=tmp_path, **data)
    with pytest.raises(
        UserError, match="trained without `distill_guidance_scale`, but now it is 1.5. Continue without"
    ):
        run(train_dit, f"{FLAGS} {more}", output_dir=tmp_path, **data)
    # Of a checkpoint whose plan does not tell, the inputs do.
    shutil.copytree(folder, tmp_path / "distilled")
    for path, flags, said in ((tmp_path / "distilled", plain, "with .* lacks"), (tmp_path, FLAGS, "without .* has")):
        for manifest in (path / "train_dit").rglob("checkpoint.json"):
            saved = json.loads(manifest.read_text())
            for name in ("distill_guidance_scale", "sample_guidance_interval"):
                del saved["state"]["plan"]["settings"][name]
            manifest.write_text(json.dumps(saved))
        with pytest.raises(
            UserError, match=f"was trained {said.replace('.*', 'the distilled transformer, which this run')}"
        ):
            run(train_dit, f"{flags} {more}", output_dir=path, **data)


def test_card_and_evaluation_know_that_guidance_is_in_it(distilled, tmp_path):
    folder, data = distilled
    text = make_card(read_result(folder), "writer/model").content
    assert 'class_labels="dog", num_inference_steps=1' in text and "distilled to draw in few steps" in text
    flags = {"pipeline": folder / "pipeline", "train_data_dir": data["train_data_dir"], "output_dir": tmp_path}
    with pytest.raises(UserError, match="draws in few steps with its guidance in it"):
        run(evaluate, "--guidance_scales 1 2 --resolution 16 --features inception", **flags)


def test_other_pipelines_take_the_long_steps_too():
    pipeline = make_pipeline(FlowMapEulerDiscreteScheduler(), flow_map=True)
    of_images, between = (kind(**pipeline.components) for kind in (DAEDiTImg2ImgPipeline, DAEDiTInterpolationPipeline))
    for each in (of_images, between):
        each.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 16, 16)
    rebuilt = of_images("cat", image, 0.0, num_inference_steps=3, output_type="pt").images  # no step remains
    assert torch.equal(rebuilt, of_images("dog", image, 0.0, num_inference_steps=5, output_type="pt").images)
    options = {"num_inference_steps": 3, "output_type": "pt"}
    generator = torch.Generator().manual_seed(0)
    image = torch.zeros(1, 3, 16, 16)
    drawn = of_images(image=image, class_labels="cat", strength=1.0, generator=generator, **options).images
    generator = torch.Generator().manual_seed(0)
    torch.testing.assert_close(drawn, pipeline(class_labels="cat", generator=generator, **options).images)
    assert of_images(image=image, class_labels="cat", strength=0.5, **options).images.isfinite().all()
    first, *_, last = between(
        ["cat", "dog"], num_images=3, generator=torch.Generator().manual_seed(0), **options
    ).images
    assert first.isfinite().all() and not torch.equal(first, last)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--train_batch_size 1", "needs `--train_batch_size` of at least 2"),
        ("--repa_model x", "`--repa_model` does not go with `--distill_guidance_scale`"),
        ("--timestep_sampling uniform", "`--timestep_sampling uniform` does not go with `--distill_guidance_scale`"),
        ("--distill_guidance_scale 0.5", "`--distill_guidance_scale` is 0.5, but must be at least 1"),
        ("", "needs a finished transformer to distill"),
    ],
)
def test_settings_that_distillation_cannot_have(flags, message, distilled, tmp_path, capsys):
    data = dict(distilled[1])
    if not flags:
        del data["pretrained_model_name_or_path"]
    with pytest.raises(SystemExit):
        run(train_dit, f"{FLAGS} {flags}", output_dir=tmp_path, **data)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--patch_size 1", "draws, but first and last layer are new"),
        ("--label_column none", "draws, but its classes are left out"),
        ("--resolution 32", r"draws, but latents are 16x16 \(before: 8x8\)\. Give the autoencoder"),
    ],
)
def test_distillation_is_for_the_same_latents_and_classes(flags, message, distilled, tmp_path):
    with pytest.raises(UserError, match=message):
        run(train_dit, f"{FLAGS} {flags}", output_dir=tmp_path, **distilled[1])


def test_latents_of_another_encoder_are_refused_and_a_plain_start_says_so(distilled, teacher, tmp_path, caplog):
    other = DAEDiTPipeline.from_pretrained(teacher).vae
    torch.nn.init.ones_(other.encoder.conv_out.bias)
    other.save_pretrained(tmp_path / "vae")
    with pytest.raises(UserError, match="draws, but the latents are those of another encoder, .* Give the autoencoder"):
        run(train_dit, FLAGS, output_dir=tmp_path, **{**distilled[1], "vae": tmp_path / "vae"})
    caplog.set_level("INFO")
    start = WarmStart.load(str(teacher))
    assert not start.settles_statistics(other)
    start.continued(8, 3, 2, NAMES)
    assert "the latents are those of another encoder, so its first samples are noise; all else" in caplog.text


def test_weaker_transformer_guides_where_there_are_no_classes(distilled, tmp_path, caplog):
    data = {**distilled[1], "pretrained_model_name_or_path": tmp_path / "given", "label_column": "none"}
    parts = {"num_classes": None, "names": None}
    make_pipeline(guide=make_transformer(num_classes=None, num_layers=1), **parts).save_pretrained(tmp_path / "given")
    flags, losses = FLAGS.replace("max_train_steps 6", "max_train_steps 1"), []
    for scale in (1.0, 3.0):
        folder = tmp_path / f"{scale}"
        run(train_dit, f"{flags} --distill_guidance_scale {scale}", output_dir=folder, **data)
        losses.append(log_of(folder, "train_dit")[-1]["validation/loss"])
    # The new flow map is the teacher without guidance, so only the half of steps has a loss.
    assert losses[1] > 10 * losses[0]
    assert DAEDiTPipeline.from_pretrained(folder / "pipeline").guidance_transformer is None
    caplog.set_level("INFO")
    WarmStart.load(str(tmp_path / "given")).continued(8, 3, 2, None)
    assert "its `guidance_transformer` is left out; all else is as before" in caplog.text
    start = WarmStart.from_pipeline("old", make_pipeline(**parts))
    start.check_distillation(1.0)
    with pytest.raises(UserError, match="`distill_guidance_scale` is 3, but nothing guides old"):
        start.check_distillation(3.0)


@pytest.mark.parametrize("kind", ["flow map", "stock", "diffusion", "alone"])
def test_transformers_that_cannot_be_distilled(kind, distilled, image_folder, tmp_path):
    folder, data = distilled
    given = folder / "pipeline"
    if kind != "flow map":
        given, stock = tmp_path / "given", {**TINY_TRANSFORMER, "out_channels": 3, "num_embeds_ada_norm": 2}
        transformer = DiTTransformer2DModel(**stock) if kind == "stock" else make_transformer()
        pipeline = make_pipeline(transformer=transformer)
        if kind == "diffusion":
            pipeline = DAEDiTPipeline(
                transformer, pipeline.vae, DDIMScheduler(clip_sample=False), id2label=NAMES, is_flow_matching=False
            )
        pipeline.save_pretrained(given)
    if kind == "alone":
        (given / "model_index.json").unlink()
        given /= "transformer"
    message = {
        "flow map": "draws in a few steps already",
        "stock": "is of diffusers' class DiTTransformer2DModel",
        "diffusion": "`distill_guidance_scale` is for flow matching",
        "alone": "comes without its pipeline",
    }[kind]
    with pytest.raises(UserError, match=message):
        run(train_dit, FLAGS, output_dir=tmp_path / "run", **{**data, "pretrained_model_name_or_path": given})


def test_plain_training_goes_on_from_a_flow_map(distilled, tmp_path):
    folder, data = distilled
    flags = FLAGS.replace(" --distill_guidance_scale 1.5", "").replace("max_train_steps 6", "max_train_steps 3")
    data = {**data, "pretrained_model_name_or_path": folder / "pipeline"}
    run(train_dit, flags, output_dir=tmp_path / "run", **data)
    pipeline = DAEDiTPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert type(pipeline.scheduler) is UniPCMultistepScheduler and not pipeline.transformer.config.flow_map
    resume(train_dit, flags, tmp_path / "run", tmp_path / "again", 2, ("pipeline",), **data)
    for name in (TRANSFORMER, "pipeline/scheduler/scheduler_config.json", "pipeline/model_index.json"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
