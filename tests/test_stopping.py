"""A signal lets a run finish what is under way; the next one does not."""

from __future__ import annotations

import signal
import threading

import pytest

from pumice.stopping import at_signal


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


def test_what_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    received: list[int] = []
    try:
        with at_signal(received.append):
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert received == []


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
