"""FSDP2 trains the transformer that one process does, in whole checkpoints, and resumes exactly."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from models import make_vq_model, save_autoencoder, save_backbone
from safetensors.torch import load_file
from scripts import BARE_DIT, assert_same_weights, free_port, in_child, start
from test_launch_configs import arguments_of

from dae_diffusers import DAEVQGANPipeline
from dae_diffusers.training import train_dae, train_dit, train_vqgan_prior


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return save_autoencoder(tmp_path_factory.mktemp("vae"))


def in_two_processes(action) -> tuple[int, str]:
    """Both under FSDP2 as `fsdp2.yaml` says it, but on the CPU, for which accelerate does not offer it by itself."""
    port, environment = free_port(), prepare_multi_gpu_env(arguments_of("fsdp2"))

    def under_fsdp(rank: int):
        os.environ.update({name: value for name, value in environment.items() if name.startswith("FSDP_")})
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
        os.environ.update(MASTER_PORT=port, ACCELERATE_USE_CPU="true", ACCELERATE_USE_FSDP="true")
        PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU
        action()

    second = in_child(lambda: under_fsdp(1), wait=False)
    code, text = in_child(lambda: under_fsdp(0))
    assert os.waitstatus_to_exitcode(os.waitpid(second, 0)[1]) == code, text
    return code, text


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")


def test_fsdp_equals_one_process_and_resumes_exactly(vae, image_folder, tmp_path):
    options = {"script": train_dit, "train_data_dir": image_folder, "vae": vae}
    one = BARE_DIT + " --gradient_accumulation_steps 2"
    code, text = in_child(lambda: start(one, output_dir=tmp_path / "one", **options))
    assert code == 0, text
    code, text = in_two_processes(lambda: start(BARE_DIT, output_dir=tmp_path / "two", **options))
    assert code == 0, text
    first, second = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-3, atol=1e-4)

    shutil.copytree(tmp_path / "two", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "pipeline")
    chosen = tmp_path / "again" / "train_dit" / "checkpoints" / "checkpoint-00000004"
    code, text = in_two_processes(
        lambda: start(BARE_DIT, output_dir=tmp_path / "again", resume_from_checkpoint=chosen, **options)
    )
    assert code == 0, text
    resumed = weights(tmp_path / "again")
    assert all(torch.equal(second[name], resumed[name]) for name in second)
    logs = [(tmp_path / name / "train_dit" / "log.jsonl").read_text() for name in ("two", "again")]
    assert logs[0] == logs[1]


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
    code, text = in_two_processes(lambda: start(flags, output_dir=tmp_path / "two", **options))
    assert code == 0, text
    first, second = (load_file(tmp_path / name / "pipeline" / "prior" / "model.safetensors") for name in ("one", "two"))
    assert_same_weights(first, second, rtol=1e-3, atol=1e-4)
    pipeline = DAEVQGANPipeline.from_pretrained(tmp_path / "two" / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    assert len(pipeline("cat").images) == 1

    shutil.copytree(tmp_path / "two", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "pipeline")
    chosen = tmp_path / "again" / "train_vqgan_prior" / "checkpoints" / "checkpoint-00000004"
    code, text = in_two_processes(
        lambda: start(flags, output_dir=tmp_path / "again", resume_from_checkpoint=chosen, **options)
    )
    assert code == 0, text
    assert_same_weights(second, load_file(tmp_path / "again" / "pipeline" / "prior" / "model.safetensors"))
    logs = [(tmp_path / name / "train_vqgan_prior" / "log.jsonl").read_text() for name in ("two", "again")]
    assert logs[0] == logs[1]


def test_autoencoder_is_refused_under_fsdp(image_folder, tmp_path):
    code, text = in_two_processes(
        lambda: start("--resolution 16", script=train_dae, train_data_dir=image_folder, output_dir=tmp_path)
    )
    assert code == 2 and "error: train_dae does not run under FSDP; use" in text
    assert not list(tmp_path.iterdir())


def test_second_model_is_refused_under_fsdp(vae, image_folder, tmp_path):
    flags = BARE_DIT + f" --repa_model {save_backbone(tmp_path, 'vit')}"
    code, text = in_two_processes(
        lambda: start(flags, script=train_dit, train_data_dir=image_folder, output_dir=tmp_path / "run", vae=vae)
    )
    assert code == 2 and "FSDP and DeepSpeed do not take; use DDP" in text
