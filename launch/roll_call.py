"""Learn which processes of a run are gone, and let all others end together, with one reason and one exit code."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from typing import Any, NoReturn

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again
POLL_S = 2.0
_FOLDER = "mtjax/roll_call"


class RollCall:
    """Speaks with the other processes through JAX's coordination service, in a thread of its own.

    So a process answers, and leaves when another one says so, while its main thread waits in a collective.
    """

    def __init__(self, client: Any, *, index: int, count: int):
        """client: JAX's, connected; index: of this process, of `count`."""
        self._client, self._index, self._count = client, index, count
        self._is_closed = threading.Event()
        threading.Thread(target=self._listen, daemon=True, name="roll call").start()

    def close(self) -> None:
        """Stop listening."""
        self._is_closed.set()

    def absent(self) -> list[int]:
        """Call the roll; return the processes that do not answer: process 0, which keeps it, or others."""
        try:
            self._say("call", "")
            self._say(f"here/{self._index}", "")
            end = time.monotonic() + 3 * POLL_S
            while True:
                said = self._said()
                missing = [i for i in range(self._count) if f"here/{i}" not in said]
                if not missing or time.monotonic() > end:
                    return missing
                time.sleep(POLL_S / 10)
        except Exception:  # jaxlib raises its own kinds
            return [0]

    def leave(self, reason: str, code: int) -> NoReturn:
        """End this process and, telling them the reason, all others; the reason that came first holds."""
        try:
            self._obey(self._said())
            self._say("verdict", json.dumps({"reason": reason, "code": code}))
            time.sleep(2 * POLL_S if self._index == 0 else 0)  # process 0 keeps what the others read
        except Exception:
            pass  # process 0 is gone: they notice by themselves
        end(reason, code)

    def _listen(self) -> None:
        has_answered = False
        while not self._is_closed.wait(POLL_S):
            try:
                said = self._said()
                self._obey(said)
                if "call" in said and not has_answered:
                    self._say(f"here/{self._index}", "")
                    has_answered = True
            except Exception:  # process 0 is gone, which JAX notices too
                return

    def _obey(self, said: dict[str, str]) -> None:
        """End this process where another one has given a reason."""
        if "verdict" in said:
            verdict = json.loads(said["verdict"])
            time.sleep(POLL_S if self._index == 0 else 0)
            end(verdict["reason"], verdict["code"])

    def _say(self, name: str, value: str) -> None:
        self._client.key_value_set(f"{_FOLDER}/{name}", value, allow_overwrite=True)

    def _said(self) -> dict[str, str]:
        found = self._client.key_value_dir_get(f"{_FOLDER}/")
        return {name.removeprefix(f"{_FOLDER}/"): value for name, value in found}


def end(reason: str, code: int) -> NoReturn:
    """End this process at once, without waiting for others at the exit."""
    print(reason, file=sys.stderr, flush=True)
    os._exit(code)
