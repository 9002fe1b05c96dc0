"""A run of several processes that stands still says for which process it waits."""

import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from scripts import in_two_processes

from dae_diffusers.engine.heartbeat import Heartbeat


def exchange(accelerator, steps, heartbeat, before=lambda step: None):
    for step in range(1, steps + 1):
        before(step)
        accelerator.reduce(torch.ones(1))
        heartbeat.beat(step)


@pytest.mark.parametrize("fault", ["stopped", "busy"])
def test_process_that_is_waited_for_is_named(fault, tmp_path):
    def rest(step):
        if step == 3 and os.environ["RANK"] == "1":
            if fault == "busy":
                return time.sleep(2)
            helper = os.fork()
            if helper == 0:
                time.sleep(2)
                os.kill(os.getppid(), signal.SIGCONT)
                os._exit(0)
            os.kill(os.getpid(), signal.SIGSTOP)
            os.waitpid(helper, 0)

    def action():
        accelerator = Accelerator(cpu=True)
        with Heartbeat(accelerator, tmp_path, patience=0.4) as heartbeat:
            exchange(accelerator, 4, heartbeat, rest)
        print("process", os.getpid())

    (code, text), (second_code, second) = in_two_processes(action)
    assert code == second_code == 0, text + second
    lines = [line for line in text.splitlines() if "no step has ended" in line]
    number = second.split()[-1]
    assert 1 <= len(lines) <= 3 and "wait for process 1 (" + number in lines[0] and "last one: 2" in lines[0], text
    assert ("has not answered for" if fault == "stopped" else "which is in test_heartbeat.py:") in lines[0]
    assert "no step has ended" not in second
    assert not list(tmp_path.glob(".process-*"))


def test_run_that_goes_on_and_a_single_process_say_nothing(tmp_path, caplog):
    with Heartbeat(SimpleNamespace(process_index=0, num_processes=1), tmp_path, patience=0.01) as heartbeat:
        time.sleep(0.05)
        heartbeat.beat(1)
    assert not list(tmp_path.iterdir())

    def steady():
        accelerator = Accelerator(cpu=True)
        with Heartbeat(accelerator, tmp_path, patience=5) as heartbeat:
            exchange(accelerator, 20, heartbeat)

    for code, text in in_two_processes(steady):
        assert code == 0 and "no step" not in text, text
    assert not caplog.text
