"""What takes long is said before it is over."""

import pytest
import torch

from dae_diffusers import duration as module
from dae_diffusers.duration import Forecast, duration
from dae_diffusers.optimization import make_lr_scheduler
from dae_diffusers.run_settings import OptimizationConfig


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "1 second"),
        (40, "40 seconds"),
        (900, "15 minutes"),
        (5400, "1.5 hours"),
        (54000, "15 hours"),
        (7e5, "8.1 days"),
    ],
)
def test_durations_are_round_words(seconds, words):
    assert duration(seconds) == words


def test_forecast_is_said_once_if_hours_are_left(monkeypatch):
    now = iter(range(0, 10**6, 4))  # four seconds a step
    monkeypatch.setattr(module.time, "monotonic", lambda: next(now))
    forecast = Forecast(10_001)
    said = [text for text in map(forecast.after, range(1, 40)) if text]
    assert len(said) == 1 and "4 seconds a step, the 9,995 steps that are left take about 11 hours" in said[0]


def test_forecast_of_a_short_run_is_silent(monkeypatch):
    now = iter(range(0, 10**6, 4))
    monkeypatch.setattr(module.time, "monotonic", lambda: next(now))
    forecast = Forecast(100)
    assert not any(map(forecast.after, range(1, 101)))


def test_warm_up_that_does_not_end_is_said(caplog):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    make_lr_scheduler(OptimizationConfig(lr_warmup_steps=10), optimizer, 11)
    make_lr_scheduler(OptimizationConfig(lr_warmup_steps=10, lr_scheduler="constant"), optimizer, 5)
    assert caplog.text == ""
    make_lr_scheduler(OptimizationConfig(lr_warmup_steps=10), optimizer, 10)
    assert "`--lr_warmup_steps` 10 does not end within 10 steps" in caplog.text
