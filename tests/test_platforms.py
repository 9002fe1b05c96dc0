"""Windows and Macs, simulated: every module can be imported without what only POSIX has."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from device import DEVICE, OnDevice, WithoutFloat64

import dae_diffusers
from dae_diffusers.latents.diagnostics import LatentDiagnostics, linear_probe_accuracy
from dae_diffusers.latents.statistics import LatentStatistics
from dae_diffusers.losses.codebook import codebook_perplexity, codebook_usage
from dae_diffusers.metrics.distances import (
    density_coverage,
    inception_score,
    kernel_distance,
    nearest_neighbors,
    precision_recall,
)
from dae_diffusers.metrics.interpolation import interpolate_to_neighbors
from dae_diffusers.metrics.statistics import FeatureStatistics

_CODE = """
import importlib, os, signal, sys

# Loaded with what they need of this system; ours, which come after, find none of it.
import accelerate, datasets, diffusers, filelock, matplotlib.pyplot, multiprocessing.util, psutil, torch, transformers  # noqa
import torch.distributed.fsdp, torch.distributed.tensor, torch.utils.data  # noqa
import accelerate.tracking, diffusers.training_utils, diffusers.optimization  # noqa
for library in {warm}:
    importlib.import_module(library)


class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name in {blocked}:
            raise ImportError(f"{{name}} does not exist on Windows")


for name in {blocked}:
    sys.modules.pop(name, None)
sys.meta_path.insert(0, Blocked())
for name in ("fork", "register_at_fork", "sched_getaffinity", "setsid", "killpg", "getuid"):
    delattr(os, name)
for name in ("SIGHUP", "SIGKILL", "sigtimedwait", "pthread_sigmask"):
    delattr(signal, name)
for module in {modules}:
    importlib.import_module(module)
from pathlib import Path
from dae_diffusers import locks, signals
from dae_diffusers.data.loaders import prepare_worker
with signals.StopSignal(accelerate.Accelerator(cpu=True)) as stop:
    assert not stop.requested() and len(signals.STOPPING) == 2
prepare_worker(0)
lock = locks.FolderLock(Path(sys.argv[1]))
lock.release()
"""
_BLOCKED = ["fcntl", "resource", "grp", "pwd", "termios", "tty", "pty", "syslog", "readline"]
_WARM = ["diffusers.models.autoencoders.autoencoder_kl", "diffusers.models.autoencoders.vq_model", "torch.optim"]


def modules() -> list[str]:
    """All of ours, without the page of a Space, which runs on the Hub's machines."""
    root = Path(dae_diffusers.__file__).parent
    found = [".".join(path.relative_to(root.parent).with_suffix("").parts) for path in root.rglob("*.py")]
    for package in ("pipelines", "training"):
        found += [f"dae_diffusers.{package}.{path.stem}" for path in (root.parent / package).glob("*.py")]
    names = {name.removesuffix(".__init__") for name in found if ".space." not in name}
    return sorted(name for name in names if find_spec(name))


def test_every_module_is_imported_and_used_without_what_only_posix_has(tmp_path):
    code = _CODE.format(blocked=_BLOCKED, warm=_WARM, modules=modules())
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    assert len(modules()) > 40


def _gathered(kind, shape, *tensors) -> dict:
    statistics = kind.empty(shape)
    statistics.add(*tensors)
    return vars(statistics)


MEASURES = {
    "codebook_usage": lambda latents, features, labels: codebook_usage(labels),
    "codebook_perplexity": lambda latents, features, labels: codebook_perplexity(labels),
    "latent_diagnostics": lambda latents, features, labels: _gathered(
        LatentDiagnostics, (3, 4, 4), latents, latents.exp()
    ),
    "latent_statistics": lambda latents, features, labels: _gathered(LatentStatistics, 3, latents),
    "feature_statistics": lambda latents, features, labels: _gathered(FeatureStatistics, 5, features),
    "kernel_distance": lambda latents, features, labels: kernel_distance(features, features[:20]),
    "precision_recall": lambda latents, features, labels: precision_recall(features, features[:20] + 0.1),
    "density_coverage": lambda latents, features, labels: density_coverage(features, features[:20] + 0.1),
    "inception_score": lambda latents, features, labels: inception_score(features.softmax(dim=1), splits=3),
    "nearest_neighbors": lambda latents, features, labels: nearest_neighbors(features),
    "interpolate_to_neighbors": lambda latents, features, labels: interpolate_to_neighbors(latents, latents),
    "linear_probe": lambda latents, features, labels: linear_probe_accuracy(latents, labels, latents[:9], labels[:9]),
}


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
def test_measures_of_tensors_on_a_device_without_float64_are_those_of_the_cpu(measure):
    random = torch.Generator().manual_seed(0)
    tensors = torch.randn(32, 3, 4, 4, generator=random), torch.randn(32, 5, generator=random), torch.arange(32) % 4
    with WithoutFloat64():
        found = measure(*(tensor.to(DEVICE) for tensor in tensors))
        found = torch.utils._pytree.tree_map(lambda value: value.cpu() if isinstance(value, OnDevice) else value, found)
    torch.testing.assert_close(found, measure(*tensors))


def test_simulated_device_refuses_float64():
    with WithoutFloat64(), pytest.raises(AssertionError, match="no float64"):
        torch.zeros(2, device=DEVICE).double()
