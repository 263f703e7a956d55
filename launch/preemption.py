"""Preemption: SIGTERM ends training with a checkpoint and an exit code that launchers retry."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import NoReturn

from mtjax.launch.roll_call import EXIT_CODE
from mtjax.train import Stopped


class Notice:
    """Whether SIGTERM has come. Before the first step it raises Stopped at once: there is nothing to save.

    grace_time: seconds that saving may then take; 0 is as long as it takes.
    """

    def __init__(self, *, grace_time: float = 0.0) -> None:
        self.is_training = self.has_come = False
        self._grace_time = grace_time
        self._calls = 0

    def receive(self, number: int, frame: object) -> None:
        """Take the signal; the next one kills."""
        del number, frame
        self._come()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if not self.is_training:
            raise Stopped("Stopped before the first step; the same command starts again.")

    def _come(self) -> None:
        self.has_come = True
        if self._grace_time:
            timer = threading.Timer(self._grace_time, self._give_up)
            timer.daemon = True
            timer.start()

    def _give_up(self) -> NoReturn:
        print(
            f"Stopped: saving took longer than --grace_time={self._grace_time:g} s; the same command goes on from "
            "the last whole checkpoint.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(EXIT_CODE)

    def asked(self, step: int) -> bool:
        """Tell whether to stop at a step; several processes, which ask equally often, agree."""
        del step  # evaluations ask many times in one
        import jax

        self.is_training = True
        self._calls += 1
        if jax.process_count() > 1 and not self.has_come:
            from jax.experimental import multihost_utils

            if multihost_utils.reached_preemption_sync_point(self._calls):
                self._come()
        return self.has_come


@contextlib.contextmanager
def notice(*, grace_time: float = 0.0) -> Iterator[Notice]:
    """Catch SIGTERM in the body. With several processes JAX's own service, once started, catches it instead."""
    found = Notice(grace_time=grace_time)
    before = signal.signal(signal.SIGTERM, found.receive)
    try:
        yield found
    finally:
        if signal.getsignal(signal.SIGTERM) == found.receive:
            signal.signal(signal.SIGTERM, before)
