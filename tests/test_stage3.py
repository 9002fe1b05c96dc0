"""Stage 3: a decoder is fitted to the latents that a generator draws, and nothing else changes."""

import json
import math
import os
import shutil
import signal
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, VQModel
from models import (
    make_autoencoder,
    make_plain_vq_model,
    make_prior_pipeline,
    make_random_transformer,
    save_backbone,
    save_run,
)
from safetensors.torch import load_file
from scipy.stats import binomtest
from scripts import (
    TINY_DIT,
    assert_same_weights,
    in_both_processes,
    in_child,
    load_benchmark,
    log_of,
    run,
    start,
    weights,
)

from dae_diffusers import DAEAutoencoderKL, DAEDiTPipeline, DAEVQGANPipeline
from dae_diffusers.autoencoders.loading import load_autoencoder
from dae_diffusers.autoencoders.settings import GeneratedConfig
from dae_diffusers.data import DataConfig, load_images
from dae_diffusers.errors import UserError
from dae_diffusers.fit_record import read_fit
from dae_diffusers.fitting.decoder_fit import KEPT_VAE, as_the_pipeline_draws, draw_latents
from dae_diffusers.fitting.image_statistics import ImageStatistics, RunningMoments, Whitening
from dae_diffusers.fitting.side_by_side import BEFORE
from dae_diffusers.hub.card import repository_files
from dae_diffusers.hub.results import read_result
from dae_diffusers.image_spectrum import log_spectrum
from dae_diffusers.losses.moments import moment_distance
from dae_diffusers.metrics.checks import check_judge
from dae_diffusers.metrics.distances import frechet_distance
from dae_diffusers.metrics.features import load_feature_extractor
from dae_diffusers.metrics.statistics import FeatureStatistics, reference_statistics
from dae_diffusers.training import train_dae, train_dit

pytestmark = pytest.mark.filterwarnings("ignore:.*larger than the data set")

FIT = (
    "--stage 3 --resolution 16 --train_batch_size 4 --stage3_steps 4 --logging_steps 2 --validation_steps 4 "
    "--checkpointing_steps 2 --checkpoints_total_limit 9 --pool_size 12 --pool_inference_steps 2 --max_psnr_drop 99 "
    "--learning_rate 1e-3 --stage3_learning_rate 1e-3"
)
GENERATORS = {DAEDiTPipeline: "transformer", DAEVQGANPipeline: "prior"}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return save_backbone(tmp_path_factory.mktemp("backbone"), "resnet")


@pytest.fixture(scope="module")
def generators(tmp_path_factory) -> dict[type, Path]:
    """An output folder with an untrained pipeline of each kind."""
    folders = {kind: tmp_path_factory.mktemp(kind.__name__) for kind in GENERATORS}
    save_run(folders[DAEDiTPipeline], {0: "cat", 1: "dog"})
    make_prior_pipeline(num_classes=2, id2label={0: "cat", 1: "dog"}, grid_size=(8, 8)).save_pretrained(
        folders[DAEVQGANPipeline] / "pipeline"
    )
    return folders


@pytest.fixture(scope="module")
def fitted(generators, image_folder, backbone, tmp_path_factory) -> dict[type, Path]:
    """The same folders after stage 3."""
    folders = {}
    for kind, folder in generators.items():
        folders[kind] = tmp_path_factory.mktemp("fitted") / kind.__name__
        shutil.copytree(folder, folders[kind])
        run(train_dae, FIT, **flags_of(folders[kind], image_folder), feature_model=backbone)
    return folders


def flags_of(folder: Path, image_folder: Path) -> dict[str, Path]:
    return {"pipeline": folder / "pipeline", "output_dir": folder, "train_data_dir": image_folder}


@pytest.mark.parametrize("kind", GENERATORS)
def test_only_the_decoder_of_a_plain_autoencoder_changes(fitted, generators, kind):
    before, after = generators[kind] / "pipeline", fitted[kind] / "pipeline"
    first, second = weights(before / "vae"), weights(after / "vae")
    changed = {name.split(".")[0] for name in first if not torch.equal(first[name], second[name])}
    assert changed == {"decoder", "post_quant_conv"}
    for path in sorted(before.rglob("*")):
        if path.is_file() and "vae" not in path.parts and path.name != "model_index.json":
            assert (after / path.relative_to(before)).read_bytes() == path.read_bytes()
    pipeline = kind.from_pretrained(after)
    assert type(pipeline.vae) is (VQModel if kind is DAEVQGANPipeline else AutoencoderKL)
    assert not any(name.startswith("auxiliary") for name in pipeline.vae.config)
    assert_same_weights(first, weights(fitted[kind] / KEPT_VAE))
    fit = read_fit(after)
    assert (
        fit["generated_loss"] == "moments" and {"psnr", "generated_fd"} == fit["before"].keys() == fit["after"].keys()
    )


def test_log_and_pictures_tell_how_it_went(fitted):
    folder = fitted[DAEDiTPipeline]
    rows = log_of(folder, "train_dae_stage3")
    assert all(row["train/generated_distance"] > 0 for row in rows if "train/reconstruction_loss" in row)
    assert rows[-1]["validation/generated_fd"] == read_fit(folder / "pipeline")["after"]["generated_fd"]
    assert (folder / "train_dae_stage3" / "grids" / "generated-stage3-00000004.png").exists()


@pytest.mark.filterwarnings("ignore:.*covariance is singular")
def test_decoder_of_a_codebook_is_fitted_to_what_the_pipeline_decodes(generators, image_folder, tmp_path):
    """A DiT's latents are quantised before they are decoded."""
    given = DAEDiTPipeline.from_pretrained(generators[DAEDiTPipeline] / "pipeline")
    pipeline = DAEDiTPipeline(given.transformer, make_plain_vq_model(), given.scheduler, id2label=given.id2label)
    pipeline.save_pretrained(tmp_path / "given")
    flags = {"pipeline": tmp_path / "given", "output_dir": tmp_path / "run", "train_data_dir": image_folder}
    run(train_dae, FIT.replace("steps 4", "steps 1"), **flags)
    (path,) = (tmp_path / "run" / "train_dae_stage3" / "pool").rglob("*.safetensors")
    statistics = ImageStatistics(3)
    images = load_images(DataConfig(train_data_dir=str(image_folder), resolution=16))[0]
    with torch.no_grad():
        drawn = statistics(pipeline.vae.decode(load_file(path)["latents"]).sample.clamp(-1, 1))
        expected = frechet_distance(FeatureStatistics.of(drawn), reference_statistics(statistics, images))
    assert read_fit(tmp_path / "run" / "pipeline")["before"]["generated_fd"] == pytest.approx(expected, rel=1e-4)


def test_features_that_trained_a_decoder_do_not_judge_it(fitted, generators, backbone, tmp_path):
    for kind in GENERATORS:
        check_judge(generators[kind] / "pipeline", load_feature_extractor(backbone))
        for path in (fitted[kind] / "pipeline", fitted[kind] / "pipeline" / "vae"):
            with pytest.raises(UserError, match=r"\(stage 3\), which cannot judge it"):
                check_judge(path, load_feature_extractor(backbone))
            check_judge(path, load_feature_extractor(save_backbone(tmp_path / "other", "vit")))


def test_blind_sheet_shows_both_decoders_and_counts_answers(fitted, tmp_path, capsys):
    script = load_benchmark("blind_pairs")
    options = {"pipeline": fitted[DAEDiTPipeline] / "pipeline", "folder": tmp_path, "seed": 0}
    options |= {"number": 6, "guidance_scale": 1.5}
    pairs = script.draw_pairs(options["pipeline"], 6, 1.5, 0)
    assert pairs.shape == (6, 2, 3, 16, 16) and not torch.equal(pairs[:, 0], pairs[:, 1])
    script.main(Namespace(**options, answers=None))
    swapped = json.loads((tmp_path / "key.json").read_text())
    right = "".join("L" if each else "R" for each in swapped[:5]) + "."
    script.main(Namespace(**options, answers=right))
    script.main(Namespace(**options, answers=right.translate(str.maketrans("LR", "RL"))))
    told = capsys.readouterr().out.splitlines()[1:]
    assert "of 6 pairs 5 were told apart; 5 times" in told[0] and "5 were told apart; 0 times" in told[1]
    assert all(line.endswith("p = 0.062 (two-sided)") for line in told)  # 2 / 2^5
    assert all(math.isclose(script.sign_test(k, 9), binomtest(k, 9).pvalue) for k in range(10))
    with pytest.raises(SystemExit, match="give 6 answers"):
        script.main(Namespace(**options, answers="LL"))


def test_card_says_what_stage_three_did(fitted):
    result = read_result(fitted[DAEDiTPipeline])
    files = repository_files(result, "user/name")
    assert {"vae/stage3.json", "training/train_dae_stage3.yaml", "images/stage3.png"} <= files.keys()
    assert not any(KEPT_VAE in name for name in files)
    card = files["README.md"].decode()
    assert "![Drawn latents, decoded before stage 3 and after it](images/stage3.png)" in card
    assert (
        "fitted to 12 latents that the generator sampled with guidance 1.5" in card
        and "must not evaluate this model" in card
    )


def test_record_of_other_weights_says_nothing(fitted, generators, backbone, tmp_path):
    """As after a generator was trained again into the same folder: the record stays, the decoder does not."""
    folder = tmp_path / "run"
    shutil.copytree(fitted[DAEDiTPipeline], folder)
    DAEDiTPipeline.from_pretrained(generators[DAEDiTPipeline] / "pipeline").save_pretrained(folder / "pipeline")
    assert (folder / "pipeline" / "vae" / "stage3.json").exists() and read_fit(folder / "pipeline") == {}
    check_judge(folder / "pipeline", load_feature_extractor(backbone))
    files = repository_files(read_result(folder), "user/name")
    assert "vae/stage3.json" not in files and "fitted to" not in files["README.md"].decode()


def test_what_changed_a_pipeline_is_not_lost_when_the_generator_trains_on(fitted, image_folder, tmp_path, caplog):
    """Neither the record of a decoder that was fitted elsewhere, nor what came after the training."""
    caplog.set_level("INFO")
    options = {"vae": fitted[DAEDiTPipeline] / "pipeline", "train_data_dir": image_folder, "output_dir": tmp_path}
    run(train_dit, TINY_DIT, **options)
    pipeline = tmp_path / "pipeline"
    assert read_fit(pipeline)["pool_size"] == 12
    saved = DAEDiTPipeline.from_pretrained(pipeline)
    saved.register_to_config(default_guidance_scale=7.5)
    for parameter in saved.transformer.parameters():  # as `ema` does
        parameter.data += 1
    saved.save_pretrained(pipeline)
    before = {path: path.read_bytes() for path in pipeline.rglob("*") if path.is_file()}
    options["resume_from_checkpoint"] = "latest"
    run(train_dit, TINY_DIT, **options)  # the same command again
    assert before == {path: path.read_bytes() for path in pipeline.rglob("*") if path.is_file()}
    assert "no step was left, so" in caplog.text and not (tmp_path / BEFORE).exists()
    run(train_dit, TINY_DIT.replace("--max_train_steps 6", "--max_train_steps 7"), **options)
    assert "had changed its transformer since the last training" in caplog.text
    assert before == {
        pipeline / path.relative_to(tmp_path / BEFORE): path.read_bytes()
        for path in (tmp_path / BEFORE).rglob("*")
        if path.is_file()
    }
    assert read_fit(pipeline)["pool_size"] == 12


def test_pool_is_drawn_with_the_guidance_that_there_is_and_the_record_says_so(image_folder, tmp_path):
    """Without classes: by a weaker transformer, or none."""
    guide, vae = make_random_transformer(num_layers=1), make_autoencoder(sample_size=16).to_diffusers()
    vae.register_to_config(latents_mean=[0.0] * 3, latents_std=[1.0] * 3)
    scheduler, flags = FlowMatchEulerDiscreteScheduler(), FIT.replace("steps 4", "steps 1")
    flags += " --label_column none --pool_guidance_scale 3"
    drawn, folders = {}, {name: tmp_path / name for name in ("none", "never", "guided")}
    for name, folder in folders.items():
        parts = {} if name == "none" else {"guidance_transformer": guide}
        parts |= {"default_guidance_interval": (0, 0)} if name == "never" else {}
        pipeline = DAEDiTPipeline(make_random_transformer(), vae, scheduler, **parts)
        pipeline.save_pretrained(folder / "pipeline")
        run(train_dae, flags, **flags_of(folder, image_folder))
        (path,) = (folder / "train_dae_stage3" / "pool").rglob("*.safetensors")
        drawn[name] = load_file(path)["latents"]
    options = {"num_inference_steps": 2, "seed": 0, "batch_size": 4}
    for name, scale in (("none", 1.0), ("guided", 3.0)):
        expected = draw_latents(pipeline, None, 12, None, Accelerator(), guidance_scale=scale, **options)
        assert torch.equal(drawn[name], expected)
    assert not torch.equal(drawn["none"], drawn["guided"]) and torch.equal(drawn["none"], drawn["never"])
    fits = [read_fit(folder / "pipeline").get("pool_guidance_scale") for folder in folders.values()]
    assert fits == [None, 3.0, 3.0]
    intervals = [read_fit(folder / "pipeline").get("guidance_interval") for folder in folders.values()]
    assert intervals == [None, [0, 0], None]
    cards = [repository_files(read_result(folder), "user/name")["README.md"].decode() for folder in folders.values()]
    assert ["the generator sampled, by" in card for card in cards] == [True, False, False]
    make_random_transformer(num_layers=2).save_pretrained(folder / "pipeline" / "guidance_transformer")
    with pytest.raises(UserError, match="the `guidance_transformer` of `--pipeline` changed since"):
        run(train_dae, flags, **flags_of(folder, image_folder), resume_from_checkpoint="latest")


@pytest.mark.parametrize("kind", GENERATORS)
def test_resumed_fit_equals_an_uninterrupted_one(fitted, generators, kind, image_folder, backbone, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(fitted[kind], folder)
    shutil.rmtree(folder / "pipeline")  # of a run that was killed before its end
    shutil.rmtree(folder / KEPT_VAE)
    shutil.copytree(generators[kind] / "pipeline", folder / "pipeline")
    checkpoint = folder / "train_dae_stage3" / "checkpoints" / "checkpoint-00000002"
    run(train_dae, FIT, **flags_of(folder, image_folder), feature_model=backbone, resume_from_checkpoint=checkpoint)
    assert_same_weights(weights(fitted[kind] / "pipeline" / "vae"), weights(folder / "pipeline" / "vae"))
    assert log_of(folder, "train_dae_stage3") == log_of(fitted[kind], "train_dae_stage3")
    shutil.copytree(image_folder, tmp_path / "fewer")
    next((tmp_path / "fewer").rglob("*.png")).unlink()
    fewer = {**flags_of(folder, tmp_path / "fewer"), "accept_changed_images": "yes", "resume_from_checkpoint": "latest"}
    with pytest.raises(UserError, match="the training images differ from those that stage 3 began with.*Begin again"):
        run(train_dae, FIT, **fewer, feature_model=backbone)
    index = folder / "pipeline" / "model_index.json"
    before, option = index.read_text(), "velocity_scale" if kind is DAEDiTPipeline else "temperature"
    index.write_text(json.dumps({**json.loads(before), f"default_{option}": 1.25}))
    with pytest.raises(UserError, match="how `--pipeline` draws changed since"):
        run(train_dae, FIT, **flags_of(folder, image_folder), feature_model=backbone, resume_from_checkpoint="latest")
    index.write_text(before)
    add_to_decoder(folder / "pipeline" / "vae")
    with pytest.raises(UserError, match="the autoencoder that stage 3 starts from changed since"):
        run(train_dae, FIT, **flags_of(folder, image_folder), feature_model=backbone, resume_from_checkpoint="latest")
    other = weights(folder / "pipeline" / "vae")
    shutil.rmtree(folder / "train_dae_stage3")
    run(train_dae, FIT, **flags_of(folder, image_folder), feature_model=backbone)
    assert_same_weights(other, weights(folder / KEPT_VAE))


def add_to_decoder(folder: Path) -> None:
    """What a stage 2 that goes on and `assemble` leave there: another decoder of the same encoder."""
    vae = load_autoencoder(str(folder))
    vae.decoder.conv_out.bias.data += 0.5
    vae.save_pretrained(folder)


def test_kill_while_the_decoder_is_put_in_leaves_a_whole_pipeline(generators, fitted, image_folder, backbone, tmp_path):
    """Killed before the first of its files is replaced, and after it."""
    for number, first in enumerate((True, False)):
        folder = tmp_path / str(number)
        shutil.copytree(fitted[DAEDiTPipeline], folder)
        for name in ("pipeline", KEPT_VAE):
            shutil.rmtree(folder / name)
        shutil.copytree(generators[DAEDiTPipeline] / "pipeline", folder / "pipeline")
        flags = {**flags_of(folder, image_folder), "feature_model": backbone, "resume_from_checkpoint": "latest"}

        def run_and_die(flags=flags, folder=folder, first=first) -> None:
            replace = os.replace

            def replace_and_die(source, target):
                if Path(target).parent == folder / "pipeline" / "vae" and Path(target).name != "stage3.json":
                    if not first:
                        replace(source, target)
                    os.kill(os.getpid(), signal.SIGKILL)
                replace(source, target)

            os.replace = replace_and_die
            start(FIT, **flags)

        assert in_child(run_and_die)[0] == -signal.SIGKILL
        DAEDiTPipeline.from_pretrained(folder / "pipeline")
        assert_same_weights(weights(generators[DAEDiTPipeline] / "pipeline" / "vae"), weights(folder / KEPT_VAE))
        run(train_dae, FIT, **flags)
        assert_same_weights(weights(fitted[DAEDiTPipeline] / "pipeline" / "vae"), weights(folder / "pipeline" / "vae"))
        assert_same_weights(weights(generators[DAEDiTPipeline] / "pipeline" / "vae"), weights(folder / KEPT_VAE))


def test_finished_fit_given_again_changes_nothing(fitted, image_folder, backbone):
    folder = fitted[DAEDiTPipeline]
    before = {path: path.read_bytes() for path in (folder / "pipeline").rglob("*") if path.is_file()}
    before |= {path: path.read_bytes() for path in (folder / KEPT_VAE).iterdir()}
    run(
        train_dae, FIT, **flags_of(folder, image_folder), feature_model=backbone, resume_from_checkpoint="latest"
    )  # fmt: skip
    assert {path for path, content in before.items() if path.read_bytes() != content} <= {
        folder / "pipeline" / "vae" / "stage3.json"  # what it says of the end is measured again
    }
    assert read_fit(folder / "pipeline")["before"]["psnr"] != read_fit(folder / "pipeline")["after"]["psnr"]


@pytest.mark.parametrize("kind", GENERATORS)
def test_without_weight_it_is_stage_two_that_goes_on(generators, kind, image_folder, backbone, tmp_path):
    folder = tmp_path / "fit"
    shutil.copytree(generators[kind], folder)
    run(train_dae, FIT + " --generated_weight 0", **flags_of(folder, image_folder), feature_model=backbone)
    stage2 = FIT.replace("--stage 3", "--stage 2").replace(
        "stage3_steps", "stage2_steps"
    )  # both learning rates are the same
    stage2 += f" --autoencoder {'vq' if kind is DAEVQGANPipeline else 'kl'}"
    shutil.copytree(generators[kind] / "pipeline" / "vae", tmp_path / "given")
    flags = {"pretrained_model_name_or_path": tmp_path / "given", "train_data_dir": image_folder}
    run(train_dae, stage2, output_dir=tmp_path / "stage2", **flags)
    assert_same_weights(weights(tmp_path / "stage2" / "vae"), weights(folder / "pipeline" / "vae"))
    add_to_decoder(tmp_path / "given")
    with pytest.raises(UserError, match="the autoencoder of `--pretrained_model_name_or_path` changed since"):
        run(train_dae, stage2, output_dir=tmp_path / "stage2", resume_from_checkpoint="latest", **flags)


def test_adversarial_form_trains_a_discriminator_on_drawn_images(generators, image_folder, tmp_path):
    folder = tmp_path / "fit"
    shutil.copytree(generators[DAEDiTPipeline], folder)
    more = " --generated_loss adversarial --discriminator_channels 8 --discriminator_layers 2"
    run(train_dae, FIT + more, **flags_of(folder, image_folder))
    row = next(row for row in log_of(folder, "train_dae_stage3") if "train/generated_discriminator_accuracy" in row)
    assert 0 <= row["train/generated_discriminator_accuracy"] <= 1 and row["train/generated_adaptive_weight"] > 0
    assert read_fit(folder / "pipeline")["feature_model"] is None


def test_other_decoder_and_other_folder(generators, image_folder, backbone, tmp_path):
    """A decoder that was trained on elsewhere starts, and the pipeline it came with stays as it was."""
    source = generators[DAEDiTPipeline] / "pipeline"
    vae = AutoencoderKL.from_pretrained(source / "vae")
    with torch.no_grad():
        vae.decoder.conv_out.bias.add_(0.5)
    vae.save_pretrained(tmp_path / "other")
    before = {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    flags = {
        "pipeline": source,
        "output_dir": tmp_path / "new",
        "train_data_dir": image_folder,
        "feature_model": backbone,
    }
    run(train_dae, FIT, **flags, pretrained_model_name_or_path=tmp_path / "other")
    assert {path: path.read_bytes() for path in source.rglob("*") if path.is_file()} == before
    assert_same_weights(weights(tmp_path / "other"), weights(tmp_path / "new" / KEPT_VAE))
    DAEDiTPipeline.from_pretrained(tmp_path / "new" / "pipeline")


def test_cached_latents_go_when_the_fit_is_done(generators, image_folder, backbone, tmp_path, monkeypatch):
    folder, write, written = tmp_path / "fit", train_dae.write_latent_cache, []
    shutil.copytree(generators[DAEDiTPipeline], folder)
    monkeypatch.setattr(
        train_dae, "write_latent_cache", lambda *args, **more: written.append(args[0]) or write(*args, **more)
    )
    run(train_dae, FIT + " --max_train_samples 6", **flags_of(folder, image_folder), feature_model=backbone)
    assert written == [folder / "train_dae_stage3" / "latents"] and not written[0].exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--stage3_learning_rate 0.3", "PSNR of reconstructions fell from .* The pipeline is as it was"),
        (
            "--stage3_learning_rate 1e20 --lr_warmup_steps 0 --generated_weight 0",
            "reconstruction at the validation of step 1 became NaN",
        ),
    ],
)
def test_reconstructions_that_fall_too_far_leave_the_pipeline_alone(
    more, message, generators, image_folder, backbone, tmp_path
):
    folder = tmp_path / "fit"
    shutil.copytree(generators[DAEDiTPipeline], folder)
    before = weights(folder / "pipeline" / "vae")
    more = f" --max_psnr_drop 0 --l1_weight 1e-6 --mse_weight 0 --validation_steps 1 {more}"
    with pytest.raises(UserError, match=message):
        run(train_dae, FIT + more, **flags_of(folder, image_folder), feature_model=backbone)
    assert_same_weights(before, weights(folder / "pipeline" / "vae"))
    assert not (folder / KEPT_VAE).exists() and read_fit(folder / "pipeline") == {}


def test_pipelines_and_flags_that_do_not_fit_are_refused(generators, image_folder, backbone, tmp_path, capsys):
    source = generators[DAEDiTPipeline] / "pipeline"
    flags = {"train_data_dir": image_folder, "output_dir": tmp_path / "run"}
    for more, message in {
        "": "`--stage 3` and `--pipeline`",
        f"--pipeline {source} --feature_model {backbone} --streaming": "`--streaming` does not go with `--stage 3`",
        f"--pipeline {source} --feature_model {backbone} --stage1_dir x": "`--stage1_dir` is for `--stage 2`",
        f"--pipeline {source} --push_to_hub --hub_strategy every_save": "`--hub_strategy every_save` does not go with",
    }.items():
        with pytest.raises(SystemExit):
            run(train_dae, f"{FIT} {more}", **flags)
        assert message in capsys.readouterr().err
    vae = AutoencoderKL.from_pretrained(source / "vae")
    larger = DAEAutoencoderKL.from_diffusers(vae, decoder_block_out_channels=(16, 16))
    larger.to_diffusers().save_pretrained(tmp_path / "larger")
    with torch.no_grad():
        vae.encoder.conv_out.bias.add_(0.5)
    vae.save_pretrained(tmp_path / "other")
    codes = generators[DAEVQGANPipeline] / "pipeline"
    vae = VQModel.from_pretrained(codes / "vae")
    with torch.no_grad():
        vae.quantize.embedding.weight.add_(0.5)
    vae.save_pretrained(tmp_path / "other_codes")
    for more, message in {
        f"--pipeline {codes} --pretrained_model_name_or_path {tmp_path / 'other_codes'}": "another encoder or codebook",
        f"--pipeline {source} --pretrained_model_name_or_path {tmp_path / 'other'}": "has another encoder",
        f"--pipeline {source} --pretrained_model_name_or_path {tmp_path / 'larger'}": "decoder of another size .* assemble`",
        f"--pipeline {source} --output_dir {generators[DAEVQGANPipeline]}": "holds a pipeline already",
        f"--pipeline {source / 'vae'}": "holds no pipeline.* Give the output folder of a finished",
        f"--pipeline {source} --label_column none": "knows 2 classes, but the images have no labels",
        f"--pipeline {source} --resolution 15": "is not divisible by",
    }.items():
        with pytest.raises(UserError, match=message):
            run(train_dae, f"{FIT} --feature_model {backbone} {more}", **{**flags, **parsed(more)})
        assert not (tmp_path / "run" / "train_dae_stage3" / "log.jsonl").exists()


def parsed(words: str) -> dict[str, str]:
    names = words.split()
    return {"output_dir": names[names.index("--output_dir") + 1]} if "--output_dir" in names else {}


def features_of(seed: int, count: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 5, generator=generator) @ torch.randn(5, 5, generator=generator) + seed


def test_whitened_features_have_no_mean_and_no_correlation():
    features = features_of(3, 512)
    whitening = Whitening.of(FeatureStatistics.of(features))
    whitened = FeatureStatistics.of(whitening(features))
    torch.testing.assert_close(whitened.mean, torch.zeros(5).double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(whitened.covariance, whitening.variances.double().diag(), atol=1e-4, rtol=0)
    assert whitening.variances.max() > 0.8 and (whitening.variances < 1).all()


def test_gradient_of_a_batch_that_is_everything_is_that_of_the_distance():
    whitening = Whitening.of(FeatureStatistics.of(features_of(0, 512)))
    features = features_of(1).requires_grad_()
    moments = RunningMoments(whitening, share=1.0)
    (gradient,) = torch.autograd.grad(moments(features), features)
    whitened = whitening(features)
    second = whitened.T @ whitened / len(whitened)
    distance = moment_distance(whitened.mean(dim=0), second, whitening.variances)
    torch.testing.assert_close(gradient, torch.autograd.grad(distance, features)[0])
    assert distance.item() == pytest.approx(moments(features).item())


def test_moments_forget_slowly_and_start_anywhere():
    whitening = Whitening.of(FeatureStatistics.of(features_of(0, 512)))
    moments = RunningMoments(whitening, share=0.25)
    moments.start(features_of(0, 512))
    assert moment_distance(moments.mean, moments.second, whitening.variances) < 1e-5
    moments(features_of(1))
    torch.testing.assert_close(moments.mean, 0.25 * whitening(features_of(1)).mean(dim=0), atol=1e-4, rtol=1e-4)


def test_micro_batches_of_a_step_count_as_one_large_batch():
    whitening = Whitening.of(FeatureStatistics.of(features_of(0, 512)))
    whole, parts = RunningMoments(whitening, share=0.25), RunningMoments(whitening, share=0.25)
    for step in range(2):
        features = features_of(step)
        losses = [whole(features, step), *(parts(part, step) for part in features.chunk(4))]
        torch.testing.assert_close((parts.mean, parts.second, losses[-1]), (whole.mean, whole.second, losses[0]))


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])  # whose square is infinite
def test_a_batch_that_is_not_finite_leaves_the_moments_as_they_were(value):
    whitening = Whitening.of(FeatureStatistics.of(features_of(0, 512)))
    moments = RunningMoments(whitening, share=0.25)
    moments(features_of(1))
    before = [moments.mean.clone(), moments.second.clone()]
    features = features_of(2)
    features[3, 1] = value
    assert not moments(features).isfinite()  # the guard sees it
    assert all(map(torch.equal, (moments.mean, moments.second), before))


def test_moments_over_two_processes_are_those_of_one(tmp_path):
    whitening = Whitening.of(FeatureStatistics.of(features_of(0, 512)))

    def count(features: torch.Tensor, path: Path) -> None:
        features.requires_grad_()
        moments = RunningMoments(whitening, share=0.5)
        loss = moments(features)
        loss.backward()
        torch.save((moments.mean, moments.second, loss.detach(), features.grad), path)

    def of_rank() -> None:
        from accelerate import Accelerator

        rank = Accelerator().process_index
        count(features_of(1)[32 * rank : 32 * (rank + 1)].clone(), tmp_path / f"{rank}.pt")

    count(features_of(1), tmp_path / "one.pt")
    code, text = in_both_processes(of_rank)
    assert code == 0, text
    one, *parts = (torch.load(tmp_path / f"{name}.pt") for name in ("one", 0, 1))
    for part in parts:
        for first, second in zip(one[:3], part[:3], strict=True):
            torch.testing.assert_close(first, second)
    torch.testing.assert_close(one[3], torch.cat([part[3] for part in parts]) / 2)


@pytest.mark.parametrize(("kind", "channels"), [("resnet", 1), ("vit", 3), (None, 5)])
def test_statistics_reach_the_images(kind, channels, tmp_path):
    statistics = ImageStatistics.load(None if kind is None else save_backbone(tmp_path / kind, kind), channels)
    images = (torch.rand(3, channels, 16, 16) * 2 - 1).requires_grad_()
    vectors = statistics(images)
    assert vectors.shape == (3, statistics.feature_dim)
    vectors.sum().backward()
    assert (images.grad != 0).any(dim=(2, 3)).all()
    torch.testing.assert_close(statistics(images)[:1], statistics(images[:1]))


def test_spectrum_tells_frequencies_apart():
    """A wave's power lies in the ring of its frequency, whatever its phase and direction."""
    position = torch.arange(32) / 32
    for cycles, ring in ((0, 0), (3, 1), (9, 4), (15, 7)):
        wave = torch.cos(2 * torch.pi * (cycles * position + 0.1)).expand(1, 1, 32, 32)
        for image in (wave, wave.transpose(2, 3), wave.roll(5, dims=3)):
            assert log_spectrum(image, 8)[0, 0].argmax() == ring
    noise = torch.randn(500, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(log_spectrum(noise, 8).exp().mean(dim=(0, 1)), torch.ones(8), atol=0.1, rtol=0)
    with torch.autocast("cpu", torch.float16):  # its mean alone has more power than float16 holds
        assert log_spectrum(torch.ones(1, 1, 512, 512), 8).isfinite().all()


def test_long_vectors_are_projected_always_the_same(tmp_path, monkeypatch):
    folder = save_backbone(tmp_path / "resnet", "resnet")
    whole = ImageStatistics.load(folder)
    monkeypatch.setattr("dae_diffusers.fitting.image_statistics.MAX_FEATURES", 8)
    first, second = ImageStatistics.load(folder), ImageStatistics.load(folder)
    images = torch.rand(3, 3, 16, 16)
    assert whole.feature_dim > first.feature_dim == 8 and first.fingerprint != whole.fingerprint
    assert torch.equal(first(images), second(images))


def test_two_processes_fit_together(generators, image_folder, backbone, tmp_path):
    folder = tmp_path / "fit"
    shutil.copytree(generators[DAEDiTPipeline], folder)
    code, text = in_both_processes(
        lambda: start(FIT, **flags_of(folder, image_folder), feature_model=backbone)
    )  # fmt: skip
    assert code == 0, text
    moments = load_file(folder / "train_dae_stage3" / "checkpoints" / "checkpoint-00000004" / "model.safetensors")
    assert moments["second"].abs().sum() > 0
    assert read_fit(folder / "pipeline")["after"]["psnr"] > 0


def test_pool_is_drawn_as_the_pipeline_draws():
    pipeline = SimpleNamespace(config={"default_guidance_scale": 1.0, "default_num_inference_steps": None})
    drawn = as_the_pipeline_draws(GeneratedConfig(), pipeline)
    assert (drawn.pool_guidance_scale, drawn.pool_inference_steps) == (1.0, 25)
    given = as_the_pipeline_draws(GeneratedConfig(pool_guidance_scale=3.0, pool_inference_steps=4), pipeline)
    assert (given.pool_guidance_scale, given.pool_inference_steps) == (3.0, 4)
    assert as_the_pipeline_draws(GeneratedConfig(), SimpleNamespace(config={})).pool_guidance_scale == 1.5
