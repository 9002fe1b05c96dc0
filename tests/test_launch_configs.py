"""The files for `accelerate launch` and SLURM are what accelerate and a shell take them for."""

import os
import subprocess

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from accelerate.utils.launch import prepare_multi_gpu_env
from scripts import CONFIGS, arguments_of
from transformers import LlamaConfig, LlamaForCausalLM

from dae_diffusers import DAEDiTTransformer2DModel

EXPECTED = {
    "single": DistributedType.NO,
    "ddp": DistributedType.MULTI_GPU,
    "multi_node": DistributedType.MULTI_GPU,
    "fsdp2": DistributedType.FSDP,
    "deepspeed_zero2": DistributedType.DEEPSPEED,
}


def test_every_file_is_known_here():
    assert {path.stem for path in (CONFIGS / "accelerate").glob("*.yaml")} == EXPECTED.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_accelerate_reads_the_file(name):
    config = load_config_from_file(str(CONFIGS / "accelerate" / f"{name}.yaml"))
    assert config.distributed_type == EXPECTED[name]
    arguments = arguments_of(name)
    assert arguments.training_script_args == ["--seed", "1"]
    assert arguments.multi_gpu == (EXPECTED[name] == DistributedType.MULTI_GPU)
    assert arguments.use_fsdp == (name == "fsdp2") and arguments.use_deepspeed == (name == "deepspeed_zero2")


def test_processes_of_the_command_line_win():
    arguments = arguments_of("multi_node", "--num_machines", "4", "--num_processes", "32", "--machine_rank", "3")
    assert (arguments.num_machines, arguments.num_processes, arguments.machine_rank) == (4, 32, 3)


def test_fsdp_wraps_the_blocks_of_both_generators_and_writes_whole_checkpoints(monkeypatch):
    environment = prepare_multi_gpu_env(arguments_of("fsdp2"))
    for name, value in environment.items():
        if name.startswith("FSDP_"):
            monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and str(plugin.state_dict_type) == "StateDictType.FULL_STATE_DICT"
    prior = LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2)
    )
    for model in (DAEDiTTransformer2DModel(sample_size=8, num_layers=2), prior):
        is_wrapped = fsdp2_prepare_auto_wrap_policy(plugin, model)
        assert len([module for module in model.modules() if is_wrapped(module)]) == 2


def test_deepspeed_stage_and_clipping_reach_accelerate():
    arguments = arguments_of("deepspeed_zero2")
    assert arguments.zero_stage == 2 and arguments.gradient_clipping == 1.0


def test_slurm_script_starts_one_launcher_on_each_machine(tmp_path):
    stand_ins = {
        "scontrol": 'echo "$3" | tr , "\\n"',
        "srun": 'while [ "${1#--}" != "$1" ]; do shift; done; for n in 0 1; do SLURM_NODEID=$n "$@"; done',
        "accelerate": 'printf "%s|" "$@"; echo',
    }
    for name, text in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": "first,second",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "4",
    }
    script = CONFIGS / "slurm" / "train_dit.sbatch"
    result = subprocess.run(
        ["bash", str(script), "--output_dir", "runs/with space"], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    lines = [line.split("|") for line in result.stdout.splitlines()]
    assert len(lines) == 2
    for rank, words in enumerate(lines):
        flags = " ".join(words)
        assert f"--num_processes 8 --machine_rank {rank} --main_process_ip first" in flags
        assert words[-3:-1] == ["--output_dir", "runs/with space"] and "--resume_from_checkpoint latest" in flags
        launch_command_parser().parse_args(words[1:-1])
