"""FSDP2 trains the transformer that one process does, in whole checkpoints, and resumes exactly."""

import os

import pytest
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from models import make_vq_model, save_autoencoder, save_backbone
from safetensors.torch import load_file
from scripts import (
    BARE_DIT,
    PRIOR,
    TRANSFORMER,
    arguments_of,
    assert_goes_on_exactly,
    assert_same_weights,
    in_both_processes,
    in_child,
    start,
)

from dae_diffusers import DAEVQGANPipeline
from dae_diffusers.training import train_dae, train_dit, train_vqgan_prior


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return save_autoencoder(tmp_path_factory.mktemp("vae"))


def under_fsdp(action) -> tuple[int, str]:
    """Both under FSDP2 as `fsdp2.yaml` says it, but on the CPU, for which accelerate does not offer it by itself."""
    environment = prepare_multi_gpu_env(arguments_of("fsdp2"))

    def in_process():
        os.environ.update({name: value for name, value in environment.items() if name.startswith("FSDP_")})
        os.environ.update(ACCELERATE_USE_FSDP="true")
        PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU
        action()

    return in_both_processes(in_process)


def test_fsdp_equals_one_process_and_resumes_exactly(vae, image_folder, tmp_path):
    options = {"script": train_dit, "train_data_dir": image_folder, "vae": vae}
    flags = BARE_DIT + " --post_hoc_ema"
    one = flags + " --gradient_accumulation_steps 2"
    code, text = in_child(lambda: start(one, output_dir=tmp_path / "one", **options))
    assert code == 0, text
    code, text = under_fsdp(lambda: start(flags, output_dir=tmp_path / "two", **options))
    assert code == 0, text
    snapshot = "train_dit/post_hoc_ema/step-00000006.safetensors"
    for result in (TRANSFORMER, snapshot):
        first, second = (load_file(tmp_path / name / result) for name in ("one", "two"))
        assert_same_weights(first, second, rtol=1e-3, atol=1e-4)
    assert_goes_on_exactly(under_fsdp, flags=flags, folder=tmp_path / "two", step=4, result=TRANSFORMER, **options)
    first, second = (load_file(tmp_path / name / snapshot) for name in ("two", "again"))
    assert_same_weights(first, second)


def test_prior_under_fsdp_equals_one_process_and_resumes_exactly(image_folder, tmp_path):
    make_vq_model("vq").to_diffusers().save_pretrained(tmp_path / "vq")
    flags = (
        "--resolution 16 --num_layers 2 --num_attention_heads 2 --attention_head_dim 8 --max_train_steps 6 "
        "--train_batch_size 4 --logging_steps 1 --validation_steps 4 --checkpointing_steps 2 --num_sample_images 2 "
    )
    options = {"script": train_vqgan_prior, "train_data_dir": image_folder, "vae": tmp_path / "vq"}
    one = flags + " --gradient_accumulation_steps 2"
    code, text = in_child(lambda: start(one, output_dir=tmp_path / "one", **options))
    assert code == 0, text
    code, text = under_fsdp(lambda: start(flags, output_dir=tmp_path / "two", **options))
    assert code == 0, text
    first, second = (load_file(tmp_path / name / PRIOR) for name in ("one", "two"))
    assert_same_weights(first, second, rtol=1e-3, atol=1e-4)
    pipeline = DAEVQGANPipeline.from_pretrained(tmp_path / "two" / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    assert len(pipeline("cat").images) == 1

    assert_goes_on_exactly(under_fsdp, flags=flags, folder=tmp_path / "two", step=4, result=PRIOR, **options)


def test_autoencoder_is_refused_under_fsdp(image_folder, tmp_path):
    code, text = under_fsdp(
        lambda: start("--resolution 16", script=train_dae, train_data_dir=image_folder, output_dir=tmp_path)
    )
    assert code == 2 and "error: train_dae does not run under FSDP; use" in text
    assert not list(tmp_path.iterdir())


def test_second_model_is_refused_under_fsdp(vae, image_folder, tmp_path):
    flags = BARE_DIT + f" --repa_model {save_backbone(tmp_path, 'vit')}"
    code, text = under_fsdp(
        lambda: start(flags, script=train_dit, train_data_dir=image_folder, output_dir=tmp_path / "run", vae=vae)
    )
    assert code == 2 and "FSDP and DeepSpeed do not take; use DDP" in text
