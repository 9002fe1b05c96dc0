"""The example of sounds: what becomes an array becomes the same sound again."""

import wave

import numpy as np
import pytest
from scripts import load_benchmark

from dae_diffusers.errors import UserError

sounds = load_benchmark("spoken_digits")


def test_spectrogram_of_a_drawn_sound_is_what_was_drawn(tmp_path):
    """A voice that glides: many overtones, louder and quieter, with silence after it."""
    time = np.arange(63 * sounds.HOP) / sounds.SAMPLE_RATE
    phase = 2 * np.pi * np.cumsum(120 + 60 * time) / sounds.SAMPLE_RATE
    voice = sum(np.sin(n * phase) / n for n in range(1, 20)) * np.sin(np.pi * time / 0.5).clip(0) * (time < 0.5)
    drawn = sounds.log_mel((0.9 * voice / np.abs(voice).max()).astype(np.float32))
    assert drawn.shape == (sounds.MELS, sounds.TIMES) and drawn.dtype == np.float32
    assert drawn[:, -10:].max() == drawn.min() == pytest.approx(np.log10(sounds.QUIETEST))  # silence
    assert drawn[40:].mean() > drawn[:40].mean()  # low frequencies are below
    sound = sounds.to_sound(drawn)
    assert np.abs(sounds.log_mel(sound) - drawn).mean() < 0.1  # of a range of 4
    sounds.save_sound(sound, tmp_path / "voice.wav")
    with wave.open(str(tmp_path / "voice.wav")) as file:
        assert (file.getframerate(), file.getnframes()) == (sounds.SAMPLE_RATE, len(sound))
        values = np.frombuffer(file.readframes(len(sound)), "<i2")
    assert np.corrcoef(values, sound)[0, 1] > 0.9999


def test_missing_voice_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="`espeak-ng` is not installed"):
        sounds.save_arrays(tmp_path)
