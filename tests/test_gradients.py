"""Gradients, as each optimiser gets them, do not depend on how the work is split, and hardly on the precision."""

import os
from collections.abc import Callable

import pytest
import torch
from accelerate import Accelerator
from models import make_autoencoder, save_backbone
from scripts import BARE_DIT, TINY_DAE, free_port, in_child, start

from dae_diffusers.training import train_dae, train_dit

Gradients = list[list[torch.Tensor]]  # of each call of an optimiser, of each parameter


@pytest.fixture(scope="module", params=["train_dae", "train_dit"])
def gradients_of(request, image_folder, tmp_path_factory) -> Callable[..., list[Gradients]]:
    """
    Runs a script and gives the gradients of each process. `train_dae` has two stages of a step; each has the autoencoder (the
    first with the projection of the VF loss), then the discriminator. `train_dit` has the transformer with REPA's projector.
    """
    backbone = save_backbone(tmp_path_factory.mktemp("backbone"), "vit")
    if request.param == "train_dae":
        script, num_calls = train_dae, 4
        flags = TINY_DAE + (
            f" --vf_model {backbone} --vf_cosine_margin 0 --vf_distance_margin 0 --vf_weight 1 --adversarial_weight 0.5 "
            "--stage1_adversarial_weight 0.5 --discriminator_channels 8 --discriminator_layers 2 --stage1_steps 1 "
            f"--stage2_steps 1 --perceptual_model {backbone} --vf_adaptive_weight_cap 0 --adaptive_weight_cap 0"
        )
    else:
        script, num_calls = train_dit, 1
        vae = tmp_path_factory.mktemp("vae")
        make_autoencoder().to_diffusers().save_pretrained(vae)
        flags = BARE_DIT + f" --vae {vae} --repa_model {backbone} --repa_projector_dim 16 --max_train_steps 1"
    flags += " --learning_rate 1e-6 --no_use_ema"  # the second stage begins with the same weights

    def run(more: str = "", *, processes: int = 1) -> list[Gradients]:
        folder = tmp_path_factory.mktemp("gradients")
        port = free_port()

        def work(rank: int) -> None:
            if processes > 1:
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), MASTER_PORT=port)
                os.environ.update(MASTER_ADDR="127.0.0.1", ACCELERATE_USE_CPU="true")
            calls = []
            clip = Accelerator.clip_grad_norm_

            def record(accelerator, parameters, *args, **kwargs):
                parameters = list(parameters)
                calls.append([parameter.grad.clone() for parameter in parameters])
                torch.save(calls, folder / f"{rank}.pt")
                return clip(accelerator, parameters, *args, **kwargs)

            Accelerator.clip_grad_norm_ = record
            start(flags + more, script, train_data_dir=image_folder, output_dir=folder / "run")

        others = [in_child(lambda rank=rank: work(rank), wait=False) for rank in range(1, processes)]
        code, text = in_child(lambda: work(0))
        assert [code, *(os.waitpid(process, 0)[1] for process in others)] == [0] * processes, text
        gradients = [torch.load(folder / f"{rank}.pt") for rank in range(processes)]
        assert all(len(calls) == num_calls for calls in gradients)
        return gradients

    return run


@pytest.fixture(scope="module")
def accumulated(gradients_of) -> Gradients:
    return gradients_of(" --gradient_accumulation_steps 2")[0]


def relative_difference(first: list[torch.Tensor], second: list[torch.Tensor]) -> float:
    first, second = (torch.cat([value.flatten().double() for value in values]) for values in (first, second))
    assert first.norm() > 0
    return ((first - second).norm() / first.norm()).item()


def test_processes_have_equal_gradients_and_those_of_one_that_accumulates(gradients_of, accumulated):
    first, second = gradients_of(processes=2)
    for one, other, expected in zip(first, second, accumulated, strict=True):
        assert all(map(torch.equal, one, other))
        assert relative_difference(expected, one) < 1e-4


@pytest.mark.parametrize("gradients_of", ["train_dae"], indirect=True)
def test_processes_have_equal_gradients_with_adaptive_weights(gradients_of):
    first, second = gradients_of(" --vf_adaptive_weight_cap 100 --adaptive_weight_cap 100", processes=2)
    for one, other in zip(first, second, strict=True):
        assert all(map(torch.equal, one, other))


def test_gradients_in_bfloat16_are_those_in_float32_up_to_rounding(gradients_of, accumulated):
    (rounded,) = gradients_of(" --gradient_accumulation_steps 2 --mixed_precision bf16")
    for one, expected in zip(rounded, accumulated, strict=True):
        assert {value.dtype for value in one} == {torch.float32}
        assert 0 < relative_difference(expected, one) < 0.15  # a bfloat16 has 8 bits, and there are many layers
