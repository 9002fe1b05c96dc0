"""Windows and Macs, simulated: every module can be imported without what only POSIX has."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import dae_diffusers

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
