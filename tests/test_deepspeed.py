"""DeepSpeed trains what ordinary data parallelism does, and resumes exactly. Where it is not installed, only refusals are tested."""

import importlib.util
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env
from models import save_autoencoder
from safetensors.torch import load_file
from scripts import BARE_DIT, assert_same_weights, free_port, in_child, in_two_processes, start
from test_launch_configs import arguments_of

from dae_diffusers.cli import ConfigError
from dae_diffusers.run import settle_deepspeed
from dae_diffusers.training import train_dit

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")


def under_deepspeed(action) -> tuple[int, str]:
    """Both under DeepSpeed as `deepspeed_zero2.yaml` says it, but on the CPU, for which accelerate does not offer it."""
    arguments = arguments_of("deepspeed_zero2")
    arguments.deepspeed_fields_from_accelerate_config = ""  # the launcher's own
    port, (_, environment) = free_port(), prepare_deepspeed_cmd_env(arguments)

    def in_process(rank: int):
        settings = {name: value for name, value in environment.items() if "DEEPSPEED" in name}
        os.environ.update(settings, DS_ACCELERATOR="cpu")
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port
        )
        PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_CPU)
        PartialState().distributed_type = DistributedType.DEEPSPEED
        action()

    second = in_child(lambda: in_process(1), wait=False)
    code, text = in_child(lambda: in_process(0))
    assert os.waitstatus_to_exitcode(os.waitpid(second, 0)[1]) == code, text
    return code, text


def weights(folder: Path):
    return load_file(folder / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")


@needs_deepspeed
@pytest.mark.parametrize(
    ("more", "tolerance"), [("", 1e-5), (" --gradient_accumulation_steps 2", 1e-5), (" --mixed_precision bf16", 1e-2)]
)
def test_deepspeed_equals_data_parallelism_and_resumes_exactly(more, tolerance, image_folder, tmp_path):
    options = {"script": train_dit, "train_data_dir": image_folder, "vae": save_autoencoder(tmp_path / "vae")}
    flags = BARE_DIT + " --max_grad_norm 0.1" + more
    for code, text in in_two_processes(lambda: start(flags, output_dir=tmp_path / "ddp", **options)):
        assert code == 0, text
    code, text = under_deepspeed(lambda: start(flags, output_dir=tmp_path / "two", **options))
    assert code == 0, text
    trained = weights(tmp_path / "two")
    assert_same_weights(weights(tmp_path / "ddp"), trained, rtol=tolerance, atol=tolerance)

    shutil.copytree(tmp_path / "two", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "pipeline")
    chosen = tmp_path / "again" / "train_dit" / "checkpoints" / "checkpoint-00000004"
    code, text = under_deepspeed(
        lambda: start(flags, output_dir=tmp_path / "again", resume_from_checkpoint=chosen, **options)
    )
    assert code == 0, text
    assert_same_weights(trained, weights(tmp_path / "again"))
    logs = [(tmp_path / name / "train_dit" / "log.jsonl").read_text() for name in ("two", "again")]
    assert logs[0] == logs[1]


@pytest.mark.parametrize(
    ("zero_stage", "mixed_precision", "is_one_model", "words"),
    [
        (2, "no", False, "train_x does not run under DeepSpeed; use training/configs/accelerate/ddp.yaml"),
        (3, "no", True, "does not run with `zero_stage: 3`; use 2"),
        (2, "fp16", True, "use `--mixed_precision bf16`"),
    ],
)
def test_what_does_not_go_with_deepspeed_is_refused(zero_stage, mixed_precision, is_one_model, words):
    plugin = SimpleNamespace(zero_stage=zero_stage, deepspeed_config={})
    accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin), mixed_precision=mixed_precision)
    with pytest.raises(ConfigError, match=words):
        settle_deepspeed("train_x", None, accelerator, is_one_model)
