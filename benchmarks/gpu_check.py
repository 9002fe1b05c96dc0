r"""
What a GPU shows in ten minutes: the tests that need one, steps beside those of diffusers, and a model trained as far as it goes.

    python benchmarks/gpu_check.py --output_dir runs/gpu
    python benchmarks/gpu_check.py --output_dir runs/gpu --wheels wheels --recipe cifar10 --flags dataset_name=my/cifar10

Writes `check.md`, which says how each part ended, `tests.txt`, `speed.md`, `speed.json`, `training.txt` and the newest pictures. The run
itself lies in `--run_dir`: give the same command again, and its training goes on. A part that fails does not stop the others; the exit
code is 1 then. `--device cpu` tries the script without a GPU.

Needs nothing but Python and torch to start: `--wheels` is a folder with wheels of the packages that a machine without network lacks.
"""

import argparse
import importlib.metadata
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHARES = {"tests": 0.35, "speed": 0.5}  # of the time that is left when each begins; training gets the rest
PIP = ["-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
GRACE = 30.0  # seconds for a script that is asked to stop
FLAGS = {"flags": "both trainings, such as the images'", "dae_flags": "train_dae.py", "dit_flags": "train_dit.py"}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--run_dir", type=Path, help="folder of the training; default: `run` in the output folder")
    parser.add_argument("--minutes", type=float, default=10.0, help="for everything")
    parser.add_argument(
        "--parts", nargs="+", choices=["tests", "speed", "training"], default=["tests", "speed", "training"]
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--wheels", type=Path, help="folder with wheels to install")
    parser.add_argument("--models", nargs="+", default=["DiT-B", "DiT-XL"], help="transformers whose steps are timed")
    parser.add_argument("--sections", nargs="+", default=["transformer", "autoencoder", "sampling"], help="of speed.py")
    parser.add_argument("--repetitions", type=int, default=5, help="of what is timed")
    parser.add_argument("--recipe", default="cifar10_small", help="packaged recipes of autoencoder and generator")
    for name, whose in FLAGS.items():
        parser.add_argument(f"--{name}", nargs="+", default=[], metavar="FLAG=VALUE", help=f"more flags of {whose}")
    arguments = parser.parse_args()
    for name in FLAGS:
        given = getattr(arguments, name)
        wrong = [word for word in given if not word.partition("=")[2]]
        if wrong:
            parser.error(f"`--{name}` {wrong[0]} is not FLAG=VALUE.")
        setattr(arguments, name, [f"--{word}" for word in given])
    return arguments


class Check:
    """The parts of a check, each within its time. `failed` is set by the first that fails."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments, self.failed = arguments, False
        self.folder = arguments.output_dir.resolve()
        self.run_dir = (arguments.run_dir or self.folder / "run").resolve()
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.end = time.monotonic() + 60 * arguments.minutes
        self.environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        (self.folder / "check.md").write_text("")

    def left(self) -> float:
        """Seconds, less those that a script may take to stop."""
        return self.end - time.monotonic() - GRACE

    def note(self, text: str) -> None:
        print(text, flush=True)
        with (self.folder / "check.md").open("a") as file:
            file.write(f"- {text}\n")

    def run(self, name: str, words: list[str | Path], *, log: str, seconds: float) -> bool:
        """Runs Python with these words, and asks it to stop when its time is up. Returns whether it ended by itself and well."""
        if seconds < 1:
            self.note(f"{name}: no time left")
            return False
        begin = time.monotonic()
        with (self.folder / log).open("a") as file:
            process = subprocess.Popen(
                [sys.executable, *map(str, words)],
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=self.environment,
            )
            is_over = self._wait(process, seconds)
        took = f"{time.monotonic() - begin:.0f} s"
        if not is_over:
            self.note(f"{name}: stopped when its time was up, {took}")
        elif process.returncode:
            self.failed = True
            self.note(f"{name}: failed with {process.returncode}, {took}: see {log}")
        else:
            self.note(f"{name}: done, {took}")
        return is_over and process.returncode == 0

    def _wait(self, process: subprocess.Popen, seconds: float) -> bool:
        try:
            process.wait(seconds)
            return True
        except subprocess.TimeoutExpired:
            process.terminate()  # a training saves; a job in the background of a shell would not hear Ctrl-C
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        return False

    def install(self) -> None:
        """The wheels, beside the run, and this package if it is not there."""
        if self.arguments.wheels is not None:
            site = self.run_dir / "site"
            wheels = sorted(self.arguments.wheels.glob("*.whl"))
            if not wheels:
                raise SystemExit(f"`--wheels` {self.arguments.wheels} has no wheels.")
            pip = [*PIP, "--upgrade", "--target", site, *wheels]
            self.environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
            self.run("wheels", pip, log="install.txt", seconds=self.left())
        try:
            importlib.metadata.distribution("dae-diffusers")
        except importlib.metadata.PackageNotFoundError:
            pip = [*PIP, "--no-build-isolation", "--editable", "."]
            self.run("this package", pip, log="install.txt", seconds=self.left())

    def tests(self) -> None:
        words = ["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/test_gpu.py"]
        self.run("tests", words, log="tests.txt", seconds=SHARES["tests"] * self.left())

    def speed(self) -> None:
        words = [
            "benchmarks/speed.py",
            "--device",
            self.arguments.device,
            "--repetitions",
            self.arguments.repetitions,
            "--output_dir",
            self.folder,
        ]
        words += ["--sections", *self.arguments.sections, "--models", *self.arguments.models]
        if self.arguments.device == "cuda":
            words += ["--mixed_precision", "bf16"]
        self.run("speed", words, log="speed.txt", seconds=SHARES["speed"] * self.left())

    def training(self) -> None:
        """Autoencoder, then generator; each goes on where it was."""
        common = [f"--output_dir={self.run_dir}", "--resume_from_checkpoint=latest"]
        if self.arguments.device == "cuda":
            common += ["--mixed_precision=bf16", "--compile"]
        for script, more in (("train_dae", []), ("train_dit", [f"--vae={self.run_dir / 'vae'}"])):
            name = script.removeprefix("train_")
            words = ["-m", f"dae_diffusers.training.{script}", "--config", f"{self.arguments.recipe}_{name}", *common]
            words += [*more, *self.arguments.flags, *getattr(self.arguments, f"{name}_flags")]
            if not self.run(script, words, log="training.txt", seconds=self.left()):
                break
        for script in ("train_dae", "train_dit"):
            for path in [
                *(self.run_dir / script).glob("curves.png"),
                *newest((self.run_dir / script).glob("grids/*.png")),
            ]:
                shutil.copy(path, self.folder / f"{script}_{path.name}")


def newest(paths: Iterable[Path]) -> list[Path]:
    """The file that was changed last, if there is one."""
    return sorted(paths, key=lambda path: path.stat().st_mtime)[-1:]


def main() -> None:
    arguments = parse_arguments()
    check = Check(arguments)
    check.install()
    for part in arguments.parts:
        getattr(check, part)()
    raise SystemExit(int(check.failed))


if __name__ == "__main__":
    main()
