"""Real processes, of which one dies, hangs, fails or never comes: the others end, name it, and say whether to retry."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]

# Joins as `mtjax train` does, then gathers for ever. FAIL names the process with a mistake of its own.
WORKER = """
import argparse, os
from mtjax.launch import distributed
parser = argparse.ArgumentParser()
distributed.add_arguments(parser)
roll_call = distributed.start(parser.parse_args())
import jax
from mtjax import hosts
try:
    for i in range(10**9):
        hosts.gather(i)
        if i == 2:
            print("ready", flush=True)
        if i > 2 and os.environ.get("FAIL") == str(jax.process_index()):
            raise OSError("no space left on the disk")
except Exception as error:
    distributed.leave(roll_call, error, is_users=isinstance(error, OSError))
"""


class Workers:
    """Processes of one run; those in `absent` are not started."""

    def __init__(self, count, *flags, absent=(), environment=None):
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            address = f"localhost:{probe.getsockname()[1]}"
        together = [f"--coordinator_address={address}", f"--process_count={count}", *flags]
        self.processes = {
            i: subprocess.Popen(
                [sys.executable, "-c", WORKER, *together, f"--process_index={i}"],
                env={**os.environ, "JAX_PLATFORMS": "cpu", **(environment or {})},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for i in range(count)
            if i not in absent
        }

    def wait_until_ready(self):
        for index, process in self.processes.items():
            assert "ready\n" in iter(process.stdout.readline, ""), f"process {index} ended"

    def kill(self, index):
        """Kill a process and forget it."""
        self.processes[index].kill()
        self.processes.pop(index).communicate()

    def ends(self):
        """Return {index: (exit code, what it wrote to stderr)} of processes that end by themselves."""
        return {
            i: (process, process.communicate(timeout=100)[1])[::-1] for i, process in self.processes.items()
        }


def assert_all(ends, code, *texts):
    for index, (said, process) in ends.items():
        assert process.returncode == code, (index, said)
        for text in texts:
            assert text in said, (index, said)


def test_a_killed_process_is_named_by_all_others():
    workers = Workers(3)
    workers.wait_until_ready()
    workers.kill(1)
    assert_all(workers.ends(), 75, "mtjax train: process 1 died or lost the network")


def test_the_coordinators_death_is_seen_by_all_others():
    workers = Workers(3)
    workers.wait_until_ready()
    workers.kill(0)
    assert_all(workers.ends(), 75, "mtjax train: process 0", "died or lost the network")


def test_a_process_that_hangs_ends_the_others_after_the_heartbeat_timeout():
    workers = Workers(2, "--heartbeat_timeout=10")
    workers.wait_until_ready()
    victim = workers.processes.pop(1)
    victim.send_signal(signal.SIGSTOP)
    started = time.monotonic()
    ends = workers.ends()
    victim.kill()
    victim.communicate()
    assert time.monotonic() - started > 4, "it did not wait for a heartbeat"
    assert_all(ends, 75, "stopped sending heartbeats):\n1\n", "the message above names it")


@pytest.mark.parametrize(
    ("absent", "said"), [(2, "timed out task names:\n2\n"), (0, "process 0 itself has not")]
)
def test_a_process_that_never_arrives_ends_the_others(absent, said):
    workers = Workers(3, "--initialization_timeout=6", absent=[absent])
    assert_all(workers.ends(), 75, "did not come together in 6 s (--initialization_timeout)", said)


@pytest.mark.parametrize("index", [0, 1])
def test_a_mistake_in_one_process_ends_all_and_is_not_to_be_retried(index):
    ends = Workers(2, environment={"FAIL": str(index)}).ends()
    assert_all(ends, 2, "mtjax train: no space left on the disk", f"process {index} of 2")
