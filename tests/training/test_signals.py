from __future__ import annotations

import os
import signal

import pytest

from fpn_det.training import signals
from fpn_det.training.signals import StopRequest


def test_signal_is_noted_once_and_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopRequest() as stop:
        assert stop.agreed() == 0
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert stop.agreed() == signal.SIGTERM
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_second_interrupt_is_obeyed_after_a_while(monkeypatch):
    monkeypatch.setattr(signals, "REPEAT_S", 0.0)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.agreed() == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_death_of_the_launcher_asks_to_stop(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    with StopRequest() as stop:
        assert stop.agreed() == 0
        monkeypatch.setattr(os, "getppid", lambda: 1)
        assert stop.agreed() == signal.SIGTERM


def test_death_of_a_shell_does_not(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with StopRequest() as stop:
        monkeypatch.setattr(os, "getppid", lambda: 1)
        assert stop.agreed() == 0
