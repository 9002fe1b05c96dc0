"""Tiny real models and images for all tests; nothing here needs a network."""

import logging
import os
import socket
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from dae_diffusers import DAEAutoencoderKL

torch.set_num_threads(1)  # the tests run on as many processes as there are cores


def make_autoencoder(auxiliary_decoder_type: str = "dropout", **config) -> DAEAutoencoderKL:
    torch.manual_seed(0)
    defaults = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (8, 8),
        "norm_num_groups": 4,
        "latent_channels": 3,
        "sample_size": 16,
        "mid_block_add_attention": False,
    }
    return DAEAutoencoderKL(**{**defaults, **config}, auxiliary_decoder_type=auxiliary_decoder_type)


@pytest.fixture
def autoencoder() -> DAEAutoencoderKL:
    return make_autoencoder()


@pytest.fixture
def pixel_values() -> torch.Tensor:
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """24 photographs' stand-ins of several sizes and modes in two class folders."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for number in range(24):
        size = (int(random.integers(17, 40)), int(random.integers(17, 40)))
        mode = ("RGB", "L", "RGBA", "P")[number % 4]
        image = Image.fromarray(random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).convert(mode)
        folder = root / ("cat", "dog")[number % 2]
        folder.mkdir(exist_ok=True)
        image.save(folder / f"{number:02d}.png")
    return root


def launch(script: str, flags: str, *, processes: int = 1, **more) -> subprocess.Popen:
    """Starts a training script in processes of its own, which talk through gloo."""
    argv = flags.split() + [word for name, value in more.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m"]
    if processes > 1:
        command += ["torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", free_port(), "-m"]
    return subprocess.Popen(
        [*command, f"dae_diffusers.training.{script}", *argv],
        cwd="/",
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def succeed(process: subprocess.Popen) -> None:
    output = process.communicate()[0]
    assert process.returncode == 0, output


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def in_child(action: Callable[[], None], *, wait: bool = True) -> tuple[int, str] | int:
    """
    Runs `action` in a copy of this process: what it patches, breaks or kills stays there, and nothing is imported anew.

    Returns its exit code (negative: the signal that killed it) and everything it wrote; or, with `wait=False`, its number.
    """
    output = tempfile.TemporaryFile("w+")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads at a fork; the copy uses none of them
        process = os.fork()
    if process == 0:
        code = 1
        try:
            for descriptor in (1, 2):
                os.dup2(output.fileno(), descriptor)
            sys.stdout = sys.stderr = open(1, "w", buffering=1, closefd=False)
            logging.basicConfig(format="%(message)s", level=logging.INFO, force=True)
            AcceleratorState._reset_state(reset_partial_state=True)
            warnings.simplefilter("default")  # as in a process of its own
            logging.captureWarnings(True)
            action()
            code = 0
        except SystemExit as error:
            code = error.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    if not wait:
        output.close()
        return process
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    with output:
        output.seek(0)
        return code, output.read()
