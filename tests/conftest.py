"""Shared settings and fixtures: CPU, one device a process, commands and many devices in subprocesses."""

import os
import pathlib
import subprocess
import sys

# Before anything imports JAX or TensorFlow; subprocesses inherit it.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
os.environ["COLUMNS"] = "200"  # of printed tables; xdist's workers have 80
# Many tests compile the same little programs, in several processes.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parent.parent / ".pytest_cache" / "jax")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import hypothesis
import pytest

# Nothing is timed in a test, and what CI runs is the same every time.
hypothesis.settings.register_profile(
    "mtjax",
    deadline=None,
    derandomize="CI" in os.environ,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("mtjax")


def _python(arguments, *, timeout, env=None, cwd=None, check=True):
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **(env or {})},
        cwd=cwd,
    )
    if check and done.returncode:
        pytest.fail(f"{arguments} exited {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
    return done


@pytest.fixture
def eight_devices():
    """Return run(code): execute Python source on eight fake CPU devices and return what it printed."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    return lambda code, timeout=900: _python(["-c", code], timeout=timeout, env={"XLA_FLAGS": flags}).stdout


@pytest.fixture
def mtjax(tmp_path):
    """Return run(*arguments): the real command in a process of its own, in an empty folder."""
    elsewhere = tmp_path / "working_folder"
    elsewhere.mkdir()

    def run(*arguments, timeout=240, check=True, cwd=elsewhere, env=None):
        command = ["-m", "mtjax.launch.main", *map(str, arguments)]
        return _python(command, timeout=timeout, check=check, cwd=cwd, env=env)

    return run


@pytest.fixture(scope="session")
def real_data():
    """Return the folder of jsonl tasks that the environment variable MTJAX_DATA names; skip where it is unset."""
    folder = os.environ.get("MTJAX_DATA")
    if not folder:
        pytest.skip("MTJAX_DATA is not set")
    return pathlib.Path(folder)
