"""A signal lets a run finish what is under way; the next one does not. Processes with bounds."""

from __future__ import annotations

import json
import signal
import threading

import pytest

from pumice import stopping
from pumice.stopping import at_signal, run_bounded, signals_wait


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_told_and_the_second_interrupts(number: signal.Signals) -> None:
    received: list[int] = []
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), at_signal(received.append):
        signal.raise_signal(number)
        assert received == [number]
        signal.raise_signal(number)
    assert received == [number]
    assert signal.getsignal(number) is before


def test_the_first_signal_may_interrupt() -> None:
    with pytest.raises(KeyboardInterrupt), at_signal():
        signal.raise_signal(signal.SIGTERM)


def test_what_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    received: list[int] = []
    try:
        with at_signal(received.append):
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert received == []


def test_signals_may_wait_until_the_work_is_done() -> None:
    done: list[str] = []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), signals_wait():
            with signals_wait():
                signal.raise_signal(signal.SIGINT)
                done.append("inner")
            done.append("outer")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert done == ["inner", "outer"]


def test_other_threads_handle_no_signals() -> None:
    seen: list[bool] = []

    def work() -> None:
        before = signal.getsignal(signal.SIGTERM)
        with at_signal(print):
            seen.append(signal.getsignal(signal.SIGTERM) is before)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [True]


def test_a_large_request_reaches_a_slow_process_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe holds 64 KB, and no process reads it within a thousandth of a second."""
    monkeypatch.setattr(stopping, "_PAUSE", 0.001)
    request = ["x" * (1 << 20)]
    output, ended = run_bounded("json.tool", request, 60)
    assert ended and json.loads(output) == request


def test_a_process_that_reads_nothing_ends() -> None:
    assert run_bounded("this", ["x" * (1 << 20)], 60)[1]  # prints a poem
    assert run_bounded("no.such.module", ["x" * (1 << 20)], 60) == (b"", False)
