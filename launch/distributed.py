"""Start the processes of one run together: by flags, or as the cluster's scheduler says."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import os
import signal
import socket
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import NoReturn

from mtjax.launch.roll_call import EXIT_CODE, RollCall, end

HEARTBEAT_S = 100  # a process silent for as long is taken for dead, and ends the others


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that name the processes of a run."""
    group = parser.add_argument_group(
        "several processes (found by itself on TPU, Slurm, Open MPI and JobSet)"
    )
    group.add_argument("--coordinator_address", metavar="HOST:PORT", help="of process 0")
    group.add_argument("--process_count", type=int, metavar="N", help="processes in all")
    group.add_argument("--process_index", type=int, metavar="I", help="this one, from 0")
    group.add_argument(
        "--initialization_timeout",
        type=int,
        default=300,
        metavar="SECONDS",
        help="how long to wait for processes that have not started (default: 300)",
    )
    group.add_argument(
        "--heartbeat_timeout",
        type=int,
        default=HEARTBEAT_S,
        metavar="SECONDS",
        help=f"how long a process may be silent before the run ends (default: {HEARTBEAT_S})",
    )


def start(args: argparse.Namespace) -> RollCall | None:
    """Join the other processes of the run, if there are any. To be called before anything uses a device.

    Ends this process with code 75 where another one has not arrived in time, or is lost later on. Raises
    ValueError where the flags do not fit.
    """
    given = (args.coordinator_address, args.process_count, args.process_index)
    if given == (None, None, None) and not is_cluster(os.environ):
        return None
    if any(value is None for value in given) and given != (None, None, None):
        raise ValueError("Give --coordinator_address, --process_count and --process_index together.")
    if args.process_count is not None and not 0 <= args.process_index < args.process_count:
        raise ValueError(
            f"--process_index={args.process_index} is not below --process_count={args.process_count}."
        )
    import jax
    from jax._src import distributed

    watch = _Watch(args.initialization_timeout)
    try:
        with _naming_the_absent(args.initialization_timeout):
            jax.distributed.initialize(
                *given,
                # The coordinator, which knows who is absent, gives up first.
                initialization_timeout=args.initialization_timeout + 5,
                heartbeat_timeout_seconds=args.heartbeat_timeout,
            )
    except RuntimeError as error:
        end(f"{watch.reason()} ({str(error)[:1000]})", EXIT_CODE)
    state = distributed.global_state
    watch.has_joined = True
    watch.coordinator = state.coordinator_address if state.process_id else None
    return RollCall(state.client, index=state.process_id, count=state.num_processes)


def leave(roll_call: RollCall, error: Exception, *, is_users: bool) -> NoReturn:
    """End all processes of the run for an error in this one: code 75 where it is that another one is gone.

    is_users: the error is a mistake in the input, which a message tells; else its traceback is shown.
    """
    import jax

    if absent := roll_call.absent():
        roll_call.leave(
            f"mtjax train: {_named(absent)} died or lost the network, and a collective failed: {str(error)[:300]}\n"
            "Repeat the command on all hosts; it goes on from the last checkpoint.",
            EXIT_CODE,
        )
    if not is_users:
        traceback.print_exception(error)
    reason = (
        f"mtjax train: {error}" if is_users else f"mtjax train: {type(error).__name__}: {str(error)[:1000]}"
    )
    roll_call.leave(
        f"{reason}\n(process {jax.process_index()} of {jax.process_count()})", 2 if is_users else 1
    )


def _named(processes: Sequence[int]) -> str:
    return f"process{'es' if len(processes) > 1 else ''} {', '.join(map(str, processes))}"


@contextlib.contextmanager
def _naming_the_absent(seconds: int) -> Iterator[None]:
    """Let JAX's service wait for processes as long as its clients do: it alone can name those that are absent.

    jax.distributed.initialize leaves this time at an hour.
    """
    from jax._src.lib import _jax

    make = _jax.get_distributed_runtime_service
    _jax.get_distributed_runtime_service = functools.partial(make, cluster_register_timeout=seconds)
    try:
        yield
    finally:
        _jax.get_distributed_runtime_service = make


class _Watch:
    """Turns the abort by which JAX ends a process whose run has lost another one into exit code 75.

    JAX's threads abort natively (absl's FATAL, which names the processes) where a heartbeat is missing or the
    coordinator is gone, and its main thread where some have not arrived. Other aborts of the main thread stay.
    """

    def __init__(self, initialization_timeout: int):
        self.has_joined = False
        self.coordinator: str | None = None  # address of process 0, in another process
        self._timeout = initialization_timeout
        kind = ctypes.CFUNCTYPE(None, ctypes.c_int)
        self._handler = kind(self._receive)
        _kept.append(self)  # native code holds on to the handler
        libc = ctypes.CDLL(None)
        libc.signal.argtypes = [ctypes.c_int, kind]
        libc.signal(signal.SIGABRT, self._handler)

    def _receive(self, number: int) -> None:
        del number
        if self.has_joined and threading.get_ident() in {thread.ident for thread in threading.enumerate()}:
            return  # Python's own thread aborts: no news of others
        end(self.reason(), EXIT_CODE)

    def reason(self) -> str:
        """Say what is known here, beside JAX's message."""
        if not self.has_joined:
            return (
                f"mtjax train: the processes of this run did not come together in {self._timeout} s "
                "(--initialization_timeout). The message above names those that process 0 has not seen; where "
                "it names none, process 0 itself has not arrived."
            )
        lost = "a process of this run died or lost the network; the message above names it."
        if self.coordinator and not _answers(self.coordinator):
            lost = f"process 0, the coordinator at {self.coordinator}, died or lost the network."
        return f"mtjax train: {lost}\nRepeat the command on all hosts; it goes on from the last checkpoint."


_kept: list[_Watch] = []


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
    except OSError:
        return False
    return True


def is_cluster(environment: Mapping[str, str]) -> bool:
    """Tell whether a scheduler started this process as one of several."""

    def count(name: str) -> int:
        value = environment.get(name, "")
        return int(value) if value.isdigit() else 0

    return (
        count("SLURM_STEP_NUM_TASKS") > 1  # srun
        or count("OMPI_COMM_WORLD_SIZE") > 1  # mpirun
        or "," in environment.get("TPU_WORKER_HOSTNAMES", "")  # GKE; TPU VMs of a slice
        or ("JOBSET_NAME" in environment and "JOB_COMPLETION_INDEX" in environment)  # Kubernetes
    )
