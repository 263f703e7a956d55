"""How the C library hands memory back: kept for the next step where the CPU is the device.

XLA allocates a step's working memory anew each time, a gigabyte for a small T5. The C library returns it to
the kernel after the step, which then zeroes each page of it again: an eighth of a step's time on two cores.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import sys
import time
from typing import Any

# <malloc.h> of glibc
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8

_kept = False


def keep() -> None:
    """Keep freed memory in this process: one heap, nothing handed back by itself.

    Call it before JAX starts its threads. Does nothing where JAX has an accelerator to run on, or where the C
    library is not glibc.
    """
    global _kept
    if _has_accelerator() or not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return
    for option, value in [(_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1)]:
        libc.mallopt(option, value)
    _kept = True


def settle(result: Any, *, trim: bool = False) -> None:
    """Wait until the step that made `result` has given its memory back; without `keep` do nothing.

    A result is ready a moment before the step's working memory is free. A step that starts in this moment gets
    new memory, and both stay. `trim` hands back what start-up has left: pass it for the first steps.
    """
    if not _kept:
        return
    import jax  # after `keep`, which comes before JAX's threads

    jax.block_until_ready(result)
    time.sleep(0.002)
    if trim:
        ctypes.CDLL(None).malloc_trim(0)


def _has_accelerator() -> bool:
    """Tell without importing JAX whether it has a device plugin."""
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return bool(plugins) or importlib.util.find_spec("libtpu") is not None
