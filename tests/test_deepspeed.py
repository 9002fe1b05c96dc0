"""DeepSpeed trains what ordinary data parallelism does, and resumes exactly. Where it is not installed, only refusals are tested."""

import importlib.util
import math
import os
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env
from models import save_autoencoder
from safetensors.torch import load_file
from scripts import (
    BARE_DIT,
    TRANSFORMER,
    arguments_of,
    assert_goes_on_exactly,
    assert_same_weights,
    in_both_processes,
    start,
)

from dae_diffusers.engine.distributed import settle_deepspeed
from dae_diffusers.engine.guard import NonFiniteGuard
from dae_diffusers.errors import ConfigError, UserError
from dae_diffusers.training import train_dit

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")


def under_deepspeed(action) -> tuple[int, str]:
    """Both under DeepSpeed as `deepspeed_zero2.yaml` says it, but on the CPU, for which accelerate does not offer it."""
    arguments = arguments_of("deepspeed_zero2")
    arguments.deepspeed_fields_from_accelerate_config = ""  # the launcher's own
    _, environment = prepare_deepspeed_cmd_env(arguments)

    def in_process():
        os.environ.update({name: value for name, value in environment.items() if "DEEPSPEED" in name})
        os.environ.update(DS_ACCELERATOR="cpu", ACCELERATE_USE_CPU="false")
        PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_CPU)
        PartialState().distributed_type = DistributedType.DEEPSPEED
        action()

    return in_both_processes(in_process)


@needs_deepspeed
@pytest.mark.parametrize(
    ("more", "tolerance"), [("", 1e-5), (" --gradient_accumulation_steps 2", 1e-5), (" --mixed_precision bf16", 1e-2)]
)
def test_deepspeed_equals_data_parallelism_and_resumes_exactly(more, tolerance, image_folder, tmp_path):
    options = {"script": train_dit, "train_data_dir": image_folder, "vae": save_autoencoder(tmp_path / "vae")}
    flags = BARE_DIT + " --max_grad_norm 0.1" + more
    code, text = in_both_processes(lambda: start(flags, output_dir=tmp_path / "ddp", **options))
    assert code == 0, text
    code, text = under_deepspeed(lambda: start(flags, output_dir=tmp_path / "two", **options))
    assert code == 0, text
    expected, trained = (load_file(tmp_path / name / TRANSFORMER) for name in ("ddp", "two"))
    assert_same_weights(expected, trained, rtol=tolerance, atol=tolerance)
    assert_goes_on_exactly(under_deepspeed, flags=flags, folder=tmp_path / "two", step=4, result=TRANSFORMER, **options)


@pytest.mark.parametrize(
    ("kind", "precision", "says", "says_not"),
    [
        (DistributedType.DEEPSPEED, "bf16", ["the weights are lost"], ["left as they were", "skip_nonfinite", "bf16"]),
        (DistributedType.NO, "fp16", ["left as they were", "`mixed_precision bf16`"], ["skip_nonfinite"]),
        (DistributedType.NO, "no", ["left as they were", "`skip_nonfinite N`"], ["mixed_precision"]),
    ],
)
def test_loss_that_is_not_finite_gets_advice_that_the_run_can_follow(kind, precision, says, says_not, tmp_path):
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), num_processes=1, mixed_precision=precision, distributed_type=kind
    )
    guard = NonFiniteGuard(accelerator, 0, tmp_path)
    guard.watch(torch.tensor(math.nan), 3, 5)
    with pytest.raises(UserError, match="`loss` became nan at step 3, in micro-batch 5; .* latest`") as error:
        guard.allows(torch.tensor(1.0))
    assert all(words in str(error.value) for words in says) and not any(words in str(error.value) for words in says_not)


@pytest.mark.parametrize(
    ("zero_stage", "mixed_precision", "is_one_model", "words"),
    [
        (2, "no", False, "train_x does not run under DeepSpeed; use training/configs/accelerate/ddp.yaml"),
        (3, "no", True, "does not run with `zero_stage: 3`; use 2"),
        (2, "fp16", True, "use `mixed_precision bf16`"),
        (2, "bf16", True, "`skip_nonfinite` does not go with DeepSpeed"),
    ],
)
def test_what_does_not_go_with_deepspeed_is_refused(zero_stage, mixed_precision, is_one_model, words):
    plugin = SimpleNamespace(zero_stage=zero_stage, deepspeed_config={})
    accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin), mixed_precision=mixed_precision)
    config = SimpleNamespace(run=SimpleNamespace(skip_nonfinite=1))
    with pytest.raises(ConfigError, match=words):
        settle_deepspeed("train_x", config, accelerator, is_one_model)
