"""
Trains a model that speaks digits, turns what it draws back into sounds, and checks with a classifier which digits are heard.

    apt-get install espeak-ng && python benchmarks/spoken_digits.py runs/sounds

Needs no network after that: `espeak-ng` speaks the digits in many voices, speeds and pitches. Each sound becomes a logarithmic mel
spectrogram, an array of 80 frequencies and 64 times. The scripts learn these arrays as they learn images. Writes into the folder:
`sounds/` (a drawn sound of each digit), `spectrograms.png` and `metrics.json` (`class_agreement`: the share of drawn sounds in which
the classifier hears the digit that was asked for).
"""

import argparse
import io
import itertools
import json
import shutil
import subprocess
import wave
from pathlib import Path

import numpy as np
import torch
from check_digits import draw
from tqdm.auto import tqdm
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

from dae_diffusers import DAEDiTPipeline
from dae_diffusers.comparison.scripts import launch_script
from dae_diffusers.errors import UserError
from dae_diffusers.evaluation_record import weights_by_part
from dae_diffusers.metrics.features import load_feature_extractor
from dae_diffusers.plots import image_grid
from dae_diffusers.store import read_json, write_json

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ACCENTS = ("en-gb", "en-us", "en-gb-scotland", "en-gb-x-gbclan", "en-gb-x-rp", "en-029")
SPEAKERS = ("", "+m1", "+m3", "+f2", "+f4")
SPEEDS, PITCHES = (135, 165), (35, 50, 65)
TEST_SHARE = 8  # one of so many ways of speaking is held out, with all its digits
SAMPLE_RATE, WINDOW, HOP = 22050, 1024, 256
MELS, TIMES = 80, 64  # 64 times are 0.73 seconds
FILTERS = mel_filter_bank(WINDOW // 2 + 1, MELS, 40, SAMPLE_RATE / 2, SAMPLE_RATE)
QUIETEST = 1e-2  # magnitudes below are silence
PER_DIGIT = 25


def speak(word: str, voice: str, speed: int, pitch: int) -> np.ndarray:
    """The sound of a word, from -1 to 1: without silence around it, equally loud, `(TIMES - 1) * HOP` samples."""
    command = ["espeak-ng", "-v", voice, "-s", str(speed), "-p", str(pitch), "--stdout", word]
    with wave.open(io.BytesIO(subprocess.run(command, check=True, capture_output=True).stdout)) as file:
        if file.getframerate() != SAMPLE_RATE:
            raise UserError(f"espeak-ng speaks {voice} at {file.getframerate()} Hz, but must at {SAMPLE_RATE} Hz.")
        sound = np.frombuffer(file.readframes(2**30), np.int16).astype(np.float32)
    heard = np.flatnonzero(np.abs(sound) > 0.02 * np.abs(sound).max())
    sound = sound[heard[0] : heard[-1]][: (TIMES - 1) * HOP]
    return np.pad(0.9 * sound / np.abs(sound).max(), (0, (TIMES - 1) * HOP - len(sound)))


def log_mel(sound: np.ndarray) -> np.ndarray:
    """The logarithms of magnitudes, `(MELS, TIMES)`, the highest frequency first, as one draws them."""
    window = window_function(WINDOW, "hann")
    mels = spectrogram(sound, window, WINDOW, HOP, mel_filters=FILTERS, mel_floor=QUIETEST, log_mel="log10", power=1.0)
    return np.ascontiguousarray(mels[::-1])


def to_sound(mels: np.ndarray, *, num_iterations: int = 32, momentum: float = 0.99) -> np.ndarray:
    """
    Finds a sound with this [`log_mel`], by Griffin and Lim's method: it changes the unknown phases until a sound has them.

    Source: Perraudin et al., 2013, A fast Griffin-Lim algorithm.
    """
    magnitudes = np.where(mels[::-1] <= np.log10(QUIETEST) + 0.01, 0, 10.0 ** mels[::-1])
    magnitudes = torch.from_numpy(np.linalg.pinv(FILTERS.T) @ magnitudes).clamp(min=0).float()
    options = {"n_fft": WINDOW, "hop_length": HOP, "window": torch.hann_window(WINDOW)}
    angles = 2 * torch.pi * torch.rand(magnitudes.shape, generator=torch.Generator().manual_seed(0))
    phases = torch.polar(torch.ones_like(angles), angles)
    before = torch.zeros_like(phases)
    for _ in range(num_iterations):
        sound = torch.istft(magnitudes * phases, **options)
        now = torch.stft(sound, **options, return_complex=True)
        phases = now + momentum * (now - before)
        phases, before = phases / phases.abs().clamp(min=1e-9), now
    return torch.istft(magnitudes * phases, **options).numpy()


def save_sound(sound: np.ndarray, path: Path) -> None:
    """Writes 16-bit samples, equally loud."""
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, SAMPLE_RATE, 0, "NONE", ""))
        file.writeframes((sound / max(1e-9, np.abs(sound).max()) * 29000).astype("<i2").tobytes())


def save_arrays(folder: Path) -> None:
    """Saves `train/seven/0001.npy` and so on: a folder of arrays, whose sub-folders are classes."""
    if shutil.which("espeak-ng") is None:
        raise UserError("`espeak-ng` is not installed, and speaks the digits. Install it: `apt-get install espeak-ng`.")
    ways = list(itertools.product(ACCENTS, SPEAKERS, SPEEDS, PITCHES))
    held_out = set(np.random.default_rng(0).permutation(len(ways))[: len(ways) // TEST_SHARE].tolist())
    for number, (accent, speaker, speed, pitch) in enumerate(tqdm(ways, desc="Speaking", unit="way")):
        for word in DIGITS:
            path = folder / ("test" if number in held_out else "train") / word / f"{number:04d}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, log_mel(speak(word, accent + speaker, speed, pitch)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where everything goes")
    parser.add_argument("--guidance_scale", type=float, default=2.0)
    parser.add_argument("--num_inference_steps", type=int, default=25)
    parser.add_argument("--max_train_steps", type=int, default=1300, help="of the generator")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder = arguments.folder

    if not (folder / "arrays").exists():
        save_arrays(folder / "speaking")
        (folder / "speaking").rename(folder / "arrays")
    data = {"train_data_dir": folder / "arrays", "resolution": [MELS, TIMES], "image_channels": 1}
    common = {**data, "output_dir": folder, "seed": arguments.seed, "resume_from_checkpoint": "latest"}
    if not (folder / "vae").exists():
        launch_script(
            "train_dae",
            {
                "block_out_channels": [8, 16, 32, 32],
                "norm_num_groups": 4,
                "latent_channels": 8,
                "stage1_steps": 250,
                "stage2_steps": 350,
                "train_batch_size": 16,
                "learning_rate": 2e-3,
                "ema_decay": 0.99,
                "validation_steps": 300,
                **common,
            },
        )
    latents = folder / "latents"
    launch_script("cache_latents", {**data, "vae": folder / "vae", "seed": arguments.seed, "output_dir": latents})
    launch_script(
        "train_dit",
        {
            "vae": folder / "vae",
            "latent_cache": latents,
            "num_layers": 4,
            "num_attention_heads": 4,
            "attention_head_dim": 32,
            "max_train_steps": arguments.max_train_steps,
            "train_batch_size": 32,
            "optimizer": "muon",
            "learning_rate": 8e-3,
            "ema_decay": 0.995,
            "validation_steps": 250,
            "output_dir": folder,
            "seed": arguments.seed,
            "resume_from_checkpoint": "latest",
        },
    )
    listener = folder / "listener"
    if not listener.exists():
        sizes = {"train_steps": 300, "input_size": 64, "hidden_sizes": [16, 32, 64, 96]}
        launch_script("train_classifier", {**data, "output_dir": listener, **sizes})

    asked = [word for word in DIGITS for _ in range(PER_DIGIT)]
    drawn = draw_arrays(folder / "pipeline", asked, arguments)
    sounds = [to_sound(mels) for mels in tqdm(drawn, desc="Griffin-Lim", unit="sound")]
    (folder / "sounds").mkdir(exist_ok=True)
    for digit, word in enumerate(DIGITS):
        save_sound(sounds[digit * PER_DIGIT], folder / "sounds" / f"{word}.wav")

    low, high = read_json(folder / "pipeline" / "model_index.json")["value_range"]
    names, heard_of = load_listener(listener, low, high)
    real = sorted((folder / "arrays" / "test").glob("*/*.npy"))
    spoken, some = [path.parent.name for path in real], slice(None, None, 4)
    metrics = {
        "class_agreement": agreement(heard_of([log_mel(sound) for sound in sounds]), asked, names),
        "num_sounds": len(sounds),
        "class_agreement_of_the_arrays_before_they_are_sounds": agreement(heard_of(drawn), asked, names),
        "classifier_accuracy_on_unseen_sounds": agreement(heard_of([np.load(path) for path in real]), spoken, names),
        "classifier_accuracy_on_unseen_sounds_after_griffin_lim": agreement(
            heard_of([log_mel(to_sound(np.load(path))) for path in real[some]]), spoken[some], names
        ),
        **{name: getattr(arguments, name) for name in ("guidance_scale", "num_inference_steps", "seed")},
        "weights": weights_by_part(DAEDiTPipeline.from_pretrained(folder / "pipeline").components),
    }
    write_json(folder / "metrics.json", metrics)
    print(json.dumps(metrics, indent=2))
    rows = [np.load(folder / "arrays" / "test" / word / path.name) for path in real[:1] for word in DIGITS]
    show = np.stack([*rows, *(drawn[digit * PER_DIGIT + n] for n in range(2) for digit in range(len(DIGITS)))])
    image_grid(
        torch.from_numpy((show - low) / (high - low) * 2 - 1)[:, None],
        columns=len(DIGITS),
        row_names=["espeak-ng", "drawn", "drawn"],
        column_names=list(DIGITS),
    ).save(folder / "spectrograms.png")


def draw_arrays(folder: Path, words: list[str], arguments: argparse.Namespace) -> np.ndarray:
    """A spectrogram of each word, `(N, MELS, TIMES)`, in the values of the arrays."""
    options = {"guidance_scale": arguments.guidance_scale, "num_inference_steps": arguments.num_inference_steps}
    pipeline = DAEDiTPipeline.from_pretrained(folder)
    return np.concatenate(draw(pipeline, words, arguments.seed, output_type="np", **options))[..., 0]


def load_listener(folder: Path, low: float, high: float):
    """The names of the classes, and a function from spectrograms to the numbers of the classes that are heard."""
    extractor = load_feature_extractor(str(folder))

    def heard_of(mels) -> list[int]:
        pixel_values = torch.from_numpy((np.stack(mels) - low) / (high - low) * 2 - 1).float().clamp(-1, 1)[:, None]
        return torch.cat(
            [extractor.features_and_logits(part)[1].argmax(dim=1) for part in pixel_values.split(64)]
        ).tolist()

    return {int(label): name for label, name in read_json(folder / "config.json")["id2label"].items()}, heard_of


def agreement(heard: list[int], words: list[str], names: dict[int, str]) -> float:
    """Share of the sounds in which the asked word is heard."""
    return float(np.mean([names[label] == word for label, word in zip(heard, words, strict=True)]))


if __name__ == "__main__":
    main()
