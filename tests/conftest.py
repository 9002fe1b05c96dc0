"""Fixtures of all tests; nothing here needs a network."""

import os
import shutil
import sys
import tempfile

# diffusers copies the code of any local pipeline to one file there: of two processes, one would find the other's.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="modules-")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from models import make_autoencoder
from PIL import Image

from dae_diffusers import DAEAutoencoderKL

torch.set_num_threads(1)  # the tests run on as many processes as there are cores


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=16, help="interruptions in test_faults_slow.py, over all its cases")


def pytest_unconfigure(config):
    shutil.rmtree(os.environ["HF_MODULES_CACHE"], ignore_errors=True)


@pytest.fixture(autouse=True)
def fresh_code_of_pipelines():
    """Local pipelines of all kinds are one module to diffusers; one process seldom loads several."""
    sys.modules.pop("diffusers_modules.local.pipeline", None)


@pytest.fixture(autouse=True)
def fresh_accelerator_state():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


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


@pytest.fixture
def fresh_compiler():
    """Compiled code is kept by function, for all models of a process."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()
