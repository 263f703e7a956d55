"""A step under every kind of mesh is the step of one device; its collectives are those expected."""

import json
import math
import subprocess
import sys

import parallel_steps
import pytest


@pytest.fixture(scope="module")
def results():
    """Return what tests/parallel_steps.py prints, of a process with eight devices."""
    command = [sys.executable, parallel_steps.__file__]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", parallel_steps.CASES)
def test_eight_devices_take_the_step_of_one(results, case):
    result, mesh = results[case], parallel_steps.CASES[case][3]
    differences = {name: result[name] for name in ("init", "loss", "task_losses", "gradient", "params")}
    assert max(differences.values()) < 1e-5, differences
    assert result["size"] > 0.1  # there is a gradient to compare
    assert result["parts"] == math.prod(mesh.get(axis, 1) for axis in ("fsdp", "model"))


@pytest.mark.parametrize("case", parallel_steps.CASES)
def test_collectives_are_those_expected(results, case):
    golden = json.loads(parallel_steps.GOLDEN.read_text())[case]
    if lines := parallel_steps.differences(results[case]["collectives"], golden):
        pytest.fail(
            f"The step on {parallel_steps.CASES[case][3]} exchanges other arrays than it did:\n"
            + "\n".join(lines)
            + "\nWhere that is meant: python tests/parallel_steps.py --write"
        )
