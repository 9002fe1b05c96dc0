"""What a user can get wrong, through the scripts as they run: an exit code, one clear line, and nothing damaged or executed."""

import hashlib
import json
import os
import pickle
import random
import re
import shutil
import warnings
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import make_autoencoder, make_vq_model, save_backbone
from PIL import Image
from scripts import BARE_DAE, BARE_DIT, CONFIG_CLASSES, checkpoints, in_child, in_two_processes, start

from dae_diffusers.autoencoders.loading import load_autoencoder
from dae_diffusers.cli import parse_config
from dae_diffusers.data import DataConfig, load_images
from dae_diffusers.engine.checkpointing import Checkpointer
from dae_diffusers.engine.log import RunLog
from dae_diffusers.errors import UserError
from dae_diffusers.latents.cache import CachedLatents, write_latent_cache
from dae_diffusers.locks import take_folder
from dae_diffusers.training import cache_latents, evaluate, train_dae, train_dit, train_vqgan_prior
from dae_diffusers.training.settings import TrainDAEConfig

BARE_PRIOR = (
    "--resolution 16 --num_layers 1 --num_attention_heads 2 --attention_head_dim 8 --max_train_steps 2 "
    "--train_batch_size 4 --num_sample_images 1"
)
SCRIPTS = {
    "train_dae": (train_dae, BARE_DAE),
    "train_dit": (train_dit, BARE_DIT),
    "train_vqgan_prior": (train_vqgan_prior, BARE_PRIOR),
    "cache_latents": (cache_latents, "--resolution 16"),
    "evaluate": (evaluate, "--resolution 16"),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory, image_folder):
    """Everything that the table's flags point to."""
    root = tmp_path_factory.mktemp("places")
    (root / "empty").mkdir()
    for name in ("truncated", "zero_bytes", "not_an_image"):
        shutil.copytree(image_folder, root / name)
    for name, content in (
        ("truncated", (image_folder / "cat" / "00.png").read_bytes()[:200]),
        ("zero_bytes", b""),
        ("not_an_image", b"#!/bin/sh\ntouch hacked\n"),
    ):
        for path in (root / name / "cat").iterdir():
            path.write_bytes(content)
    (root / "two").mkdir()
    for number in range(2):
        Image.new("RGB", (20, 20), (number, 0, 0)).save(root / "two" / f"{number}.png")
    autoencoder = make_autoencoder()
    autoencoder.register_to_config(latents_mean=[0.0] * 3, latents_std=[1.0] * 3)
    autoencoder.to_diffusers().save_pretrained(root / "vae")
    make_autoencoder(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    ).save_pretrained(root / "stage1_of_three_levels")
    shutil.copytree(root / "vae", root / "truncated_vae")
    os.truncate(root / "truncated_vae" / "diffusion_pytorch_model.safetensors", 2000)
    shutil.copytree(root / "vae", root / "vae_without_weights")
    (root / "vae_without_weights" / "diffusion_pytorch_model.safetensors").unlink()
    shutil.copytree(root / "vae", root / "vae_of_a_pickle")
    (root / "vae_of_a_pickle" / "diffusion_pytorch_model.safetensors").unlink()
    (root / "vae_of_a_pickle" / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Malicious()))
    torch.nn.init.constant_(autoencoder.encoder.conv_in.weight, torch.nan)
    autoencoder.register_to_config(latents_mean=None, latents_std=None)  # they are measured
    autoencoder.to_diffusers().save_pretrained(root / "vae_of_nan")
    vq_model = make_vq_model("vq")
    vq_model.to_diffusers().save_pretrained(root / "vq")
    torch.nn.init.constant_(vq_model.encoder.conv_in.weight, torch.nan)
    vq_model.to_diffusers().save_pretrained(root / "vq_of_nan")
    save_backbone(root / "features", "classifier")
    options = {"vae": root / "vae", "train_data_dir": image_folder, "output_dir": root / "cache"}
    code, text = in_child(lambda: start("--resolution 16", script=cache_latents, **options))
    assert code == 0, text
    (root / "file").touch()
    save_labelled(root / "labels", [0, 1, 0, 1], [0, 1])
    save_labelled(root / "negative_label", [0, 1, 0, -1], [0, 1])
    save_labelled(root / "no_label", [0, 1, 0, None], [0, 1])
    save_labelled(root / "empty_train", [], [0, 1])
    save_labelled(root / "empty_validation", [0, 1, 0, 1], [])
    (root / "loader").mkdir()
    (root / "loader" / "loader.py").write_text("open('hacked', 'w')\n")
    (root / "images").symlink_to(image_folder)
    return root


def save_labelled(folder: Path, train: list, validation: list) -> None:
    """Both splits of a data set with a column of whole numbers."""
    folder.mkdir()
    features = datasets.Features({"image": datasets.Image(), "kind": datasets.Value("int64")})
    for split, labels in (("train", train), ("validation", validation)):
        images = [Image.new("RGB", (20, 20), (9 * number, 0, 0)) for number in range(len(labels))]
        rows = datasets.Dataset.from_dict({"image": images, "kind": labels}, features=features)
        rows.to_parquet(str(folder / f"{split}.parquet"))


class Malicious:
    """Leaves a file when it is unpickled."""

    def __reduce__(self):
        return (open, ("hacked", "w"))


TABLE = [
    (
        "train_dae",
        "--train_data_dir {images} --codebook_size 64",
        2,
        "`--codebook_size` needs a codebook. Add `--autoencoder vq`",
    ),
    (
        "train_dae",
        "--train_data_dir {images} --auxiliary_decoder none --stage1_adversarial_weight 0.5",
        2,
        "but joint training has none. Use `--adversarial_weight`",
    ),
    (
        "train_dae",
        "--train_data_dir {images} --stage 3 --pipeline {nowhere} --generated_loss adversarial --adversarial_start 2000",
        2,
        "would begin at `--adversarial_start` 2000, after all `--stage3_steps` 1000",
    ),
    ("train_dae", "--train_data_dir {images} --stage4_steps 4", 2, "unknown flag `--stage4_steps`. Did you mean"),
    ("train_dae", "--train_data_dir {images} --resolution big", 2, "invalid int value: 'big'"),
    ("train_dae", "--train_data_dir {images} --random_flip maybe", 2, "'maybe' is neither yes nor no"),
    ("train_dae", "--train_data_dir {images} --auxiliary_decoder weak", 2, "invalid choice: 'weak'"),
    (
        "train_dae",
        "--train_data_dir {images} --auxiliary_decoder shallow --auxiliary_layers_per_block 1",
        2,
        "must be below the `--layers_per_block` of the real decoder, 1",
    ),
    ("train_dae", "--train_data_dir {images} --skip_nonfinite -1", 2, "must be 0 or more"),
    ("train_dae", "--train_data_dir {images} --resolution 17", 2, "nearest valid ones are 16 and 18"),
    ("train_dae", "--train_data_dir {images} --resolution 40000", 2, "must be in [1, 8192]"),
    ("train_dae", "--train_data_dir {images} --block_out_channels 8000000", 1, "out of memory (["),
    ("train_dae", "", 2, "give one of `--dataset_name`"),
    ("train_dae", "--train_data_dir {nowhere}", 1, "is not a folder"),
    ("train_dae", "--train_data_dir {empty}", 1, "`--train_data_dir`"),
    ("train_dae", "--dataset_name digitz", 1, "Did you mean `digits`?"),
    ("train_dae", "--dataset_name {loader}", 1, "cannot be loaded"),
    ("train_dae", "--dataset_name digits --image_channels 1 --train_split all", 1, "the splits are ['train', 'test']"),
    ("train_dae", "--dataset_name digits --image_channels 1 --image_column picture", 1, "the columns are ['image'"),
    ("train_dae", "--dataset_name digits --image_channels 1 --label_column kind", 1, "is not among the columns"),
    ("train_dae", "--train_data_dir {truncated}", 1, ".png cannot be decoded"),
    ("train_dae", "--train_data_dir {zero_bytes}", 1, "the file has 0 bytes"),
    ("train_dae", "--train_data_dir {not_an_image}", 1, ".png cannot be decoded"),
    (
        "train_dae",
        "--train_data_dir {truncated} --on_bad_image skip",
        1,
        "more than `--max_bad_image_share` 0.01 allows",
    ),
    ("train_dae", "--train_data_dir {images} --resolution 64 --strict_size", 1, "fewer than `--resolution` 64"),
    ("train_dae", "--train_data_dir {images} --push_to_hub", 1, "Hub"),
    ("train_dit", "--train_data_dir {images} --vae {nowhere}", 1, "is not an autoencoder that can be loaded"),
    ("train_dit", "--train_data_dir {images} --vae {truncated_vae}", 1, "is not an autoencoder that can be loaded"),
    ("train_dit", "--train_data_dir {images} --vae {vae_without_weights}", 1, "is not an autoencoder"),
    ("train_dit", "--train_data_dir {images} --vae {vae_of_a_pickle}", 1, "is not an autoencoder"),
    ("train_dit", "--train_data_dir {images} --vae {vae} --image_channels 1", 1, "takes 3 image channels"),
    ("train_dit", "--train_data_dir {images} --vae {vae} --resolution 18", 1, "nearest valid ones are 16 and 20"),
    ("train_dit", "--vae {vae} --latent_cache {empty}", 1, "no latent cache"),
    ("train_dit", "--vae {vae} --latent_cache {cache} --patch_size 3", 1, "is not divisible by 6"),
    ("train_dit", "--train_data_dir {images} --vae {vae} --latent_cache {cache} --random_crop", 2, "give other images"),
    ("train_dae", "--train_data_dir {images} --kl_weight nan", 2, "`--kl_weight` is nan, but must be finite"),
    ("train_dae", "--train_data_dir {images} --value_range 0 inf", 2, "must be finite"),
    ("train_dae", "--train_data_dir {images} --output_dir {file}/run", 1, "cannot be written: Not a directory"),
    ("train_dae", "--train_data_dir {images} --output_dir {images}", 2, "is the folder of the images"),
    ("train_dae", "--train_data_dir {images} --resume_from_checkpoint {nowhere}", 1, "it does not exist"),
    ("train_dae", "--train_data_dir {images} --stage 2", 2, "--pretrained"),
    (
        "train_dae",
        "--train_data_dir {images} --stage 2 --stage1_dir {vae}",
        1,
        "Choose the `--autoencoder`",
    ),
    (
        "train_dae",
        "--train_data_dir {images} --stage 2 --stage1_dir {stage1_of_three_levels} --resolution 18",
        1,
        "nearest valid ones are 16 and 20",
    ),
    (
        "train_dae",
        "--train_data_dir {images} --adversarial_weight 1 --discriminator_model {nowhere}",
        1,
        "cannot be loaded",
    ),
    (
        "train_dae",
        "--train_data_dir {images} --perceptual_model {nowhere} --stage1_perceptual_weight 0",
        1,
        "cannot be loaded",
    ),
    (
        "train_dae",
        "--train_data_dir {images} --auxiliary_decoder none --adversarial_weight 1 --equivariance 1 "
        "--discriminator_layers 1",
        2,
        "or without `--adversarial_weight`",
    ),
    ("train_dae", "--dataset_name {empty_train}", 1, 'Instruction "train" corresponds to no data'),
    ("train_dae", "--dataset_name {empty_validation}", 1, 'Instruction "validation" corresponds to no data'),
    ("train_dae", "--dataset_name {negative_label} --label_column kind", 1, "holds -1, but labels must lie in 0..1"),
    ("train_dae", "--dataset_name {no_label} --label_column kind", 1, "must hold integers or strings without gaps"),
    ("train_dae", "--dataset_name {labels} --image_column kind", 1, "not images; columns with images are ['image']"),
    ("train_dae", "--dataset_name {labels} --validation_split all", 1, "the splits are ['train', 'validation']"),
    ("train_dit", "--train_data_dir {images} --vae {vae} --model DiT-Q/2", 2, "is 'DiT-Q/2', but must be one of"),
    ("train_dit", "--train_data_dir {images} --vae {vae} --attention_head_dim 6", 2, "must be a multiple of 4"),
    (
        "train_dit",
        "--train_data_dir {images} --vae {vae} --pretrained_model_name_or_path {vae}",
        1,
        "is of class AutoencoderKL, but training starts from a",
    ),
    ("train_dit", "--train_data_dir {images} --vae {vae_of_nan}", 1, "hold NaN or infinite values"),
    ("train_vqgan_prior", "--vae {vq}", 2, "give one of `--dataset_name`"),
    (
        "train_dit",
        "--train_data_dir {images} --vae {vae} --validation_prompts cat",
        2,
        "`--validation_prompts` needs `--text_encoder`",
    ),
    ("train_vqgan_prior", "--train_data_dir {images} --vae {vq} --random_crop", 2, "same views"),
    ("train_vqgan_prior", "--train_data_dir {images} --vae {vq} --sample_temperature inf", 2, "must be finite"),
    ("train_vqgan_prior", "--train_data_dir {empty} --vae {vq}", 1, "`--train_data_dir`"),
    ("train_vqgan_prior", "--train_data_dir {zero_bytes} --vae {vq}", 1, "the file has 0 bytes"),
    ("train_vqgan_prior", "--train_data_dir {images} --vae {nowhere}", 1, "is not an autoencoder that can be loaded"),
    ("train_vqgan_prior", "--train_data_dir {images} --vae {vae}", 1, "has no codes"),
    ("train_vqgan_prior", "--train_data_dir {images} --vae {vq_of_nan}", 1, "hold NaN or infinite values"),
    ("train_vqgan_prior", "--train_data_dir {images} --vae {vq} --image_channels 1", 1, "takes 3 image channels"),
    ("train_vqgan_prior", "--train_data_dir {images} --vae {vq} --resolution 17", 1, "valid ones are 16 and 18"),
    ("train_vqgan_prior", "--train_data_dir {images} --vae {vq} --code_cache {file}", 1, "codes cannot be written"),
    ("cache_latents", "--train_data_dir {images} --vae {vae} --batch_size 0", 2, "must be at least 1"),
    ("cache_latents", "--train_data_dir {images} --vae {vae} --dtype int8", 2, "invalid choice: 'int8'"),
    ("cache_latents", "--train_data_dir {images} --vae {vae} --random_crop", 2, "do not go with a cache"),
    ("cache_latents", "--train_data_dir {images} --vae {nowhere}", 1, "is not an autoencoder that can be loaded"),
    ("cache_latents", "--train_data_dir {images} --vae {vae_of_nan}", 1, "hold NaN or infinite values"),
    ("cache_latents", "--train_data_dir {truncated} --vae {vae}", 1, ".png cannot be decoded"),
    ("cache_latents", "--train_data_dir {images} --vae {vae} --output_dir {file}", 1, "cannot be written"),
    ("evaluate", "--train_data_dir {images}", 2, "give `--vae` or `--pipeline`"),
    ("evaluate", "--train_data_dir {images} --pipeline {nowhere}", 2, "`--pipeline` needs `--features`"),
    ("evaluate", "--train_data_dir {images} --vae {vae} --top_p 2", 2, "`--top_p` is 2.0"),
    ("evaluate", "--train_data_dir {images} --vae {vae} --guidance_scales 1 nan", 2, "must be finite"),
    (
        "train_dit",
        "--train_data_dir {images} --vae {vae} --sample_guidance_interval 0 0.6 --autoguidance_steps 2",
        2,
        "`--sample_guidance_interval` does not go with `--autoguidance_steps`, which guides at all noise levels",
    ),
    (
        "evaluate",
        "--pipeline {vae} --features pixels --guidance_intervals 0 1 0.8",
        2,
        "must be pairs of noise levels, the lower one first",
    ),
    ("evaluate", "--train_data_dir {images} --vae {vae} --set_defaults", 2, "`--set_defaults` needs the `--pipeline`"),
    (
        "evaluate",
        "--train_data_dir {images} --pipeline {vae} --features {features}",
        1,
        "holds no pipeline",
    ),
    (
        "evaluate",
        "--train_data_dir {images} --vae {vae} --seed -1",
        2,
        "`--seed` is -1, but must be in [0, 4294967295]",
    ),
    (
        "evaluate",
        "--train_data_dir {images} --vae {vae} --features {features} --image_channels 5",
        2,
        "is 5, but `--features` takes pictures: gray, RGB, or RGBA of 8 bits. The judges `pixels` and `spectrum` take any number",
    ),
    (
        "evaluate",
        "--train_data_dir {images} --vae {vae} --features pixels --more_features spectrum pixels",
        2,
        "each judge of `--features` and `--more_features` counts once",
    ),
    (
        "evaluate",
        "--train_data_dir {images} --vae {vae} --features pixels --more_features runs/no/such",
        1,
        "the vision model 'runs/no/such' cannot be loaded",
    ),
    ("evaluate", "--train_data_dir {images} --vae {vae} --more_features pixels", 2, "`--more_features` adds judges"),
    ("evaluate", "--train_data_dir {images} --vae {vae} --top_k 3", 1, "`--top_k` means nothing to an autoencoder"),
    ("evaluate", "--train_data_dir {images} --vae {vae} --features {vae}", 1, "cannot be loaded"),
    ("evaluate", "--train_data_dir {images} --vae {vae_of_nan}", 1, "hold NaN or infinite values"),
    ("evaluate", "--train_data_dir {zero_bytes} --vae {vae}", 1, "the file has 0 bytes"),
    (
        "evaluate",
        "--train_data_dir {two} --vae {vae} --features {features}",
        1,
        "1 training, 1 validation and `--num_images` 1, but at least 2, 2 and 2 are needed",
    ),
    ("evaluate", "--train_data_dir {images} --vae {vae} --output_dir {file}", 1, "cannot be written"),
]


@pytest.mark.parametrize(("script", "flags", "code", "message"), TABLE)
def test_every_row_of_the_table_is_one_line_and_an_exit_code(
    script, flags, code, message, places, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    module, base = SCRIPTS[script]
    names = {name.name: name for name in places.iterdir()} | {"nowhere": places / "nowhere"}
    output = tmp_path / "run"
    found, text = in_child(lambda: start(f"{base} --output_dir {output} {flags.format(**names)}", script=module))
    errors = [line for line in text.splitlines() if "error:" in line]
    assert found == code and len(errors) == 1 and message in errors[0] and "Traceback" not in text, text
    assert not list(tmp_path.rglob("hacked")) and not list(output.rglob("checkpoint*/*"))
    # Once it is mended, the same folder takes the run.
    if script in ("cache_latents", "evaluate"):
        take_folder(output, Accelerator(cpu=True)).release()
    else:
        mended = "--train_data_dir {images}" + ("" if script == "train_dae" else " --vae {vae}")
        flags = f"{base} {mended.format(**names)} --output_dir {output}".split()
        module.TrainingRun(script, parse_config(CONFIG_CLASSES[module], flags))


@pytest.mark.parametrize(
    ("script", "moment", "removed"),
    [
        ("train_dae", (RunLog, "write"), "run"),
        ("train_dae", (RunLog, "write"), "run/train_dae"),
        ("train_dae", (RunLog, "draw_curves"), "run/train_dae"),
        ("train_dae", (Checkpointer, "save"), "run"),
        ("train_dae", (Accelerator, "save_state"), "run/train_dae"),  # which makes the folder again
        ("train_dit", (Checkpointer, "save"), "run"),
        ("train_vqgan_prior", (Checkpointer, "save"), "run/train_vqgan_prior"),
    ],
)
def test_folder_that_is_removed_meanwhile_is_one_line(script, moment, removed, places, tmp_path):
    module, base = SCRIPTS[script]
    autoencoder = {} if script == "train_dae" else {"vae": places / ("vq" if "vq" in script else "vae")}

    def action():
        owner, name = moment
        original = getattr(owner, name)

        def remove_first(*args, **kwargs):
            shutil.rmtree(tmp_path / removed, ignore_errors=True)
            return original(*args, **kwargs)

        setattr(owner, name, remove_first)
        options = {"train_data_dir": places / "images", "output_dir": tmp_path / "run", "checkpointing_steps": 1}
        start(base, script=module, **options, **autoencoder)

    code, text = in_child(action)
    errors = [line for line in text.splitlines() if "error:" in line]
    assert code == 1 and len(errors) == 1 and "Traceback" not in text, text
    assert f"the output folder {tmp_path / removed}" in errors[0] and "was removed while the script ran" in errors[0]
    assert not list(tmp_path.rglob("checkpoint.json")) and not list(tmp_path.rglob("model_index.json"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_more_processes_than_images_is_no_reason_to_wait_forever(script, places, tmp_path):
    flags = SCRIPTS[script][1].replace("_steps 4", "_steps 1")
    autoencoder = {} if script == "train_dae" else {"vae": places / ("vq" if "vq" in script else "vae")}
    options = {"train_data_dir": places / "two", "output_dir": tmp_path, **autoencoder}
    (code, first), (second_code, second) = in_two_processes(lambda: start(flags, script=SCRIPTS[script][0], **options))
    assert code == second_code == 0, first + second
    for once in (": validation/", "images repeat within a batch"):
        assert (once in first) == script.startswith("train") and once not in second


def test_error_of_one_of_two_processes_ends_both_in_a_line_each(places, tmp_path):
    options = {"train_data_dir": places / "images", "vae": places / "vae_of_nan", "output_dir": tmp_path}
    results = in_two_processes(lambda: start("--resolution 16", script=cache_latents, **options))
    errors = [[line for line in text.splitlines() if line.startswith("error")] for _, text in results]
    assert [code for code, _ in results] == [1, 1] and [len(lines) for lines in errors] == [1, 1], results
    assert "hold NaN or infinite values" in errors[0][0]
    assert "error in process 1: another process of this run ended" in errors[1][0]


def test_batch_larger_than_the_data_trains_and_says_so(places, tmp_path):
    flags = BARE_DAE + " --train_batch_size 64 --stage1_steps 1 --stage2_steps 1"
    code, text = in_child(lambda: start(flags, train_data_dir=places / "two", output_dir=tmp_path))
    assert code == 0 and "larger than the data set (1 images)" in text, text


def test_resuming_with_another_size_is_one_line_and_damages_nothing(places, tmp_path):
    options = {"train_data_dir": places / "images", "output_dir": tmp_path}
    code, text = in_child(lambda: start(BARE_DAE + " --stage 1", **options))
    assert code == 0, text
    before = {path: path.read_bytes() for path in (tmp_path / "train_dae" / "checkpoints").rglob("*.*")}
    options["resume_from_checkpoint"] = "latest"
    code, text = in_child(lambda: start(BARE_DAE + " --stage1_steps 6 --latent_channels 5", **options))
    errors = [line for line in text.splitlines() if "error:" in line]
    assert code == 1 and len(errors) == 1 and "does not fit this run" in errors[0] and "size mismatch" in errors[0], (
        text
    )
    assert before == {path: path.read_bytes() for path in before}


@pytest.mark.parametrize("name", ["optimizer.bin", "random_states_0.pkl", "ema.safetensors"])
def test_pickled_code_in_a_checkpoint_is_not_run(name, places, tmp_path, monkeypatch):
    """Even where the manifest vouches for it."""
    monkeypatch.chdir(tmp_path)
    options = {"train_data_dir": places / "images", "output_dir": tmp_path / "run"}
    code, text = in_child(lambda: start(BARE_DAE + " --stage 1", **options))
    assert code == 0, text
    checkpoint = tmp_path / "run" / "train_dae" / "checkpoints" / checkpoints(tmp_path / "run")[-1]
    (checkpoint / name).write_bytes(pickle.dumps(Malicious()))
    manifest = json.loads((checkpoint / "checkpoint.json").read_text())
    content = (checkpoint / name).read_bytes()
    manifest["files"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (checkpoint / "checkpoint.json").write_text(json.dumps(manifest))
    options["resume_from_checkpoint"] = "latest"
    code, text = in_child(lambda: start(BARE_DAE + " --stage1_steps 6", **options))
    assert not list(tmp_path.rglob("hacked"))
    if name == "random_states_0.pkl":  # accelerate goes on without it, and nothing depends on it
        assert code == 0, text
        return
    errors = [line for line in text.splitlines() if "error:" in line]
    assert code == 1 and len(errors) == 1 and "does not fit this run" in errors[0], text


def test_file_names_are_never_commands_or_lines(places, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "images"
    folder.mkdir()
    for number, name in enumerate(
        ("$(touch hacked).png", "; touch hacked;.png", "a\nerror: b.png", "..%2f..%2fhacked.png")
    ):
        Image.new("RGB", (20, 20), (9 * number, 0, 0)).save(folder / name)
    options = {"train_data_dir": folder, "output_dir": tmp_path / "run"}
    flags = BARE_DAE + " --stage1_steps 1 --stage2_steps 1 --train_batch_size 2"
    code, text = in_child(lambda: start(flags, **options))
    assert code == 0, text
    for path in folder.iterdir():
        path.write_bytes(b"x")
    code, text = in_child(lambda: start(flags, train_data_dir=folder, output_dir=tmp_path / "other"))
    assert code == 1 and len([line for line in text.splitlines() if "error:" in line]) == 1, text
    assert not list(tmp_path.rglob("hacked"))


# What may be said of a run; the values that are refused are few, so that most combinations train.
RUN_FLAGS = {
    "train_batch_size": st.integers(1, 5),
    "gradient_accumulation_steps": st.integers(1, 2),
    "lr_scheduler": st.sampled_from(["constant", "constant_with_warmup", "linear", "cosine", "warmup_stable_decay"]),
    "lr_warmup_steps": st.sampled_from([0, 1, 3, -1]),
    "optimizer": st.sampled_from(["adamw", "adamw", "muon"]),
    "mixed_precision": st.sampled_from(["no", "bf16"]),
    "resolution": st.sampled_from([16, 16, 24, 17]),
    "dataloader_num_workers": st.sampled_from([0, 0, 1]),
    "checkpoints_total_limit": st.sampled_from([1, 2, 0]),
    "skip_nonfinite": st.integers(0, 1),
}
ANY_FLAGS = {
    "train_dae": {
        "autoencoder": st.sampled_from(["kl", "vq"]),
        "auxiliary_decoder": st.sampled_from(["none", "same", "dropout", "narrow", "shallow", "linear"]),
        "stage": st.sampled_from(["1", "all", "all", "all", "2"]),
        "latent_channels": st.integers(1, 4),
        "quantizer": st.sampled_from(["vq", "ema", "fsq --fsq_levels 3 2 2", "fsq"]),
        "codebook_size": st.sampled_from([2, 12, 12, 1]),
        "stage2_cache_gib": st.sampled_from([0, 1]),
        "perceptual_model": st.just("{features}"),
        "adversarial_weight": st.sampled_from([0, 0.1]),
        "stage1_adversarial_weight": st.sampled_from([0, 0.1]),
        "adversarial_loss": st.sampled_from(["hinge", "non_saturating"]),
        "discriminator_channels": st.sampled_from([8, 16, 12]),
        "discriminator_layers": st.sampled_from([1, 2, 0]),
        "adversarial_ramp_steps": st.integers(0, 2),
        "mask_ratio": st.sampled_from([0, 0.5, 1]),
        "latent_denoising": st.sampled_from([0, 0.5]),
        "equivariance": st.sampled_from([0, 1]),
        "noise_tau": st.sampled_from([0, 0.5]),
    },
    "train_dit": {
        "latent_cache": st.just("{cache}"),
        "patch_size": st.sampled_from([1, 2, 4, 3]),
        "class_dropout_prob": st.sampled_from([0, 0.5, 1, 2]),
        "timestep_sampling": st.sampled_from(["uniform", "logit_normal"]),
        "timestep_shift": st.sampled_from([1, 3, 0]),
    },
    "train_vqgan_prior": {
        "num_layers": st.integers(1, 2),
        "attention_head_dim": st.sampled_from([8, 2, 3]),
        "attention_dropout": st.sampled_from([0, 0.5, 1]),
        "class_dropout_prob": st.sampled_from([0, 0.5, 1]),
        "sample_top_k": st.sampled_from([1, 100, 0]),
        "sample_top_p": st.sampled_from([0.5, 1, 0]),
        "sample_guidance_scale": st.sampled_from([0, 1, 3]),
        "code_cache": st.just("{codes}"),
    },
}
SWITCHES = {
    "train_dae": (
        "random_flip",
        "random_crop",
        "no_use_ema",
        "gradient_checkpointing",
        "no_warm_start_decoder",
    ),
    "train_dit": ("random_flip", "random_crop", "no_use_ema", "gradient_checkpointing"),
    "train_vqgan_prior": ("random_flip", "no_use_ema", "gradient_checkpointing"),
}


@pytest.mark.parametrize("script", ANY_FLAGS)
@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
@given(choice=st.data())
def test_any_flags_train_a_step_or_are_refused_in_a_line(script, choice, places, tmp_path_factory):
    values = choice.draw(st.fixed_dictionaries({}, optional={**RUN_FLAGS, **ANY_FLAGS[script]}))
    switches = choice.draw(st.sets(st.sampled_from(SWITCHES[script])))
    module, flags = SCRIPTS[script]
    output = tmp_path_factory.mktemp("any")
    flags = re.sub("steps 4|max_train_steps [0-9]+", lambda match: match[0].split()[0] + " 2", flags)
    flags += " --codebook_warmup_steps 1" if script == "train_dae" else ""
    flags += "".join(f" --{name} {value}" for name, value in values.items()).format(
        features=places / "features", cache=places / "cache", codes=output / "codes"
    )
    flags += "".join(f" --{name}" for name in sorted(switches))
    if script != "train_dae":
        flags += f" --vae {places / ('vae' if script == 'train_dit' else 'vq')}"
    code, text = in_child(lambda: start(flags, script=module, train_data_dir=places / "images", output_dir=output))
    if code == 0:
        assert any((output / name).exists() for name in ("stage1", "vae", "pipeline")), flags
    else:
        errors = [line for line in text.splitlines() if "error:" in line]
        assert code in (1, 2) and len(errors) == 1 and "Traceback" not in text, flags + text
        assert code == 1 or not list(output.iterdir())


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Cut short, bytes changed, a part repeated, or replaced by noise."""
    kind = rng.randrange(4)
    place = rng.randrange(len(data))
    if kind == 0:
        return data[:place]
    if kind == 1:
        data = bytearray(data)
        for _ in range(rng.randint(1, 20)):
            data[rng.randrange(min(len(data), rng.choice((32, 10**9))))] = rng.randrange(256)
        return bytes(data)
    if kind == 2:
        return data[:place] + data[place // 2 :]
    return rng.randbytes(place + 1)


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp", "tiff", "bmp", "npy"])
def test_damaged_images_are_read_or_named(suffix, tmp_path):
    rng = random.Random(suffix)
    array = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    path = tmp_path / f"0.{suffix}"
    np.save(path, array) if suffix == "npy" else Image.fromarray(array).save(path)
    whole = path.read_bytes()
    for number in range(2, 42):
        (tmp_path / f"{number}.{suffix}").write_bytes(damaged(whole, rng))
    (tmp_path / f"1.{suffix}").write_bytes(whole)
    if suffix == "npy":
        (tmp_path / "50.npy").write_bytes(b"\x93NUMPY\x01\x00" + pickle.dumps(Malicious()))
    config = DataConfig(
        train_data_dir=str(tmp_path),
        resolution=16,
        validation_fraction=0.1,
        value_range=[0, 255] if suffix == "npy" else [],
    )
    outcomes = {True: 0, False: 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            splits = load_images(config)
        except UserError as error:
            assert "\n" not in str(error)
            return
        for images in splits:
            for index in range(len(images)):
                try:
                    assert images[index]["pixel_values"].shape == (3, 16, 16)
                    outcomes[True] += 1
                except UserError as error:
                    assert "\n" not in str(error) and "0 bytes" in str(error) or "decoded" in str(error)
                    outcomes[False] += 1
    assert outcomes[True] >= 2 and outcomes[False] >= 10, outcomes


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.safetensors", "config.json"])
def test_damaged_autoencoder_is_loaded_or_refused_in_a_line(name, places, tmp_path):
    rng = random.Random(name)
    whole = (places / "vae" / name).read_bytes()
    shutil.copytree(places / "vae", tmp_path / "vae")
    changes = [damaged(whole, rng) for _ in range(40)]
    if name == "config.json":
        config = json.loads(whole)
        others = (None, -1, 0, "x", [], {}, [[]], 10**12, 1.5, True)
        changes += [json.dumps({**config, key: rng.choice(others)}).encode() for key in config if not key[0] == "_"]
        changes += [b"[]", b"3", b"null", b'"x"', b"{}"]
    refused = 0
    for change in changes:
        (tmp_path / "vae" / name).write_bytes(change)
        try:
            load_autoencoder(str(tmp_path / "vae"))
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > len(changes) // 4


def test_damaged_manifests_of_checkpoints_are_reported(tmp_path):
    rng = random.Random(0)
    accelerator = Accelerator(cpu=True)
    checkpointer = Checkpointer(accelerator, tmp_path)
    for step in (1, 2):
        checkpointer.save(step)
    path = tmp_path / "checkpoint-00000002" / "checkpoint.json"
    whole = path.read_bytes()
    manifest = json.loads(whole)
    changes = [damaged(whole, rng) for _ in range(60)]
    for key in manifest:
        changes += [json.dumps({**manifest, key: value}).encode() for value in (None, "x", [], -1.5, {"x": 1}, [{}])]
    changes += [json.dumps({**manifest, "files": {"../../../etc/passwd": {"size": 1, "sha256": "x"}}}).encode()]
    for change in changes:
        path.write_bytes(change)
        found, read = checkpointer.newest()
        assert read["step"] in (1, 2) or found.name == "checkpoint-00000002"
        assert isinstance(read["step"], int) and isinstance(read["state"], dict)


def test_damaged_manifests_of_caches_are_refused_in_a_line(places, tmp_path):
    rng = random.Random(0)
    config = DataConfig(train_data_dir=str(places / "images"), resolution=16)
    images, _ = load_images(config)
    vae = load_autoencoder(str(places / "vae"))
    write_latent_cache(tmp_path, vae, images, Accelerator(cpu=True), batch_size=8)
    path = tmp_path / "manifest.json"
    whole = path.read_bytes()
    manifest = json.loads(whole)
    changes = [damaged(whole, rng) for _ in range(40)]
    for key in manifest:
        changes += [json.dumps({**manifest, key: value}).encode() for value in (None, "x", [], {"x": 1}, [{}])]
        changes += [json.dumps({name: value for name, value in manifest.items() if name != key}).encode()]
    refused = 0
    for change in changes:
        path.write_bytes(change)
        try:
            CachedLatents(tmp_path)
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > len(changes) // 2


def test_damaged_yaml_is_refused_in_a_line_and_its_tags_do_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rng = random.Random(0)
    whole = yaml.safe_dump({"dataset_name": "digits", "image_channels": 1, "block_out_channels": [8, 8]}).encode()
    changes = [damaged(whole, rng) for _ in range(60)]
    changes += [
        b"!!python/object/apply:builtins.open ['hacked', 'w']",
        b"seed: !!python/object/apply:os.system ['touch hacked']",
        b"output_dir: !!python/name:os.system",
        b"? [1, 2]\n: 3",
        b"1: 2",
        b"seed: {a: 1}",
        b"seed: [[1]]",
        b"a: &a [*a]",
        b"seed: 2020-01-01",
        b"\xff\xfe",
        b"",
    ]
    for change in changes:
        Path("config.yaml").write_bytes(change)
        try:
            parse_config(TrainDAEConfig, ["--config", "config.yaml"])
        except SystemExit as stop:
            assert stop.code == 2
            assert len(capsys.readouterr().err.strip().splitlines()) == 1, change
    assert not Path("hacked").exists()
