"""The command itself: fast help, one message per mistake, T5X's flags."""

import json
import shutil
import subprocess
import sys

import pytest

from mtjax.launch import flags, main
from mtjax.launch import train as launch_train


def parse(*arguments):
    return main.parse(arguments)


def error_of(capsys, *arguments):
    code = main.main(arguments)
    return code, capsys.readouterr().err


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from mtjax.launch import main\n"
        "try: main.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'jax', 'numpy', 'tensorflow', 'gin', 'flax'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for command in main.COMMANDS:
        assert command in done.stdout


@pytest.mark.parametrize("command", main.COMMANDS)
def test_every_command_has_help_and_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main.main([command, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert f"mtjax {command}" in out.partition("example")[2]


def test_unknown_command_and_flag_get_the_nearest(capsys):
    with pytest.raises(SystemExit) as stop:
        main.main(["trian"])
    assert stop.value.code == 2
    assert "did you mean train?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main.main(["train", "--gin_fle=x"])
    assert "did you mean --gin_file" in capsys.readouterr().err


def test_t5x_flags():
    args = parse(
        "train",
        "--gin_file=a.gin",
        "--gin_file=b.gin",
        "--gin.TRAIN_STEPS=5",
        "--gin_bindings=MODEL_DIR = '/x'",
        "--gin_search_paths=p,q",
        "--seqio_additional_cache_dirs=/c,/d",
        "--tfds_data_dir=/t",
        "--module=m",
        "--module=n",
    )
    assert args.gin_file == ["a.gin", "b.gin"]
    assert args.gin_bindings == ["TRAIN_STEPS=5", "MODEL_DIR = '/x'"]
    assert args.gin_search_paths == [["p", "q"]]
    assert flags.cache_dirs(args)[1:] == ["/c", "/d"]
    assert (args.tfds_data_dir, args.module) == ("/t", ["m", "n"])


def test_cache_dir_comes_from_the_flag_the_environment_or_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("MTJAX_CACHE", raising=False)
    assert flags.cache_dirs(parse("train")) == [str(tmp_path / ".cache" / "mtjax")]
    monkeypatch.setenv("MTJAX_CACHE", "/somewhere")
    assert flags.cache_dirs(parse("train")) == ["/somewhere"]
    monkeypatch.chdir(tmp_path)
    assert flags.cache_dirs(parse("train", "--cache_dir=here")) == [str(tmp_path / "here")]


def test_gin_flag_needs_a_value():
    with pytest.raises(SystemExit, match=r"--gin.TRAIN_STEPS=VALUE"):
        parse("train", "--gin.TRAIN_STEPS", "5")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "Give a --gin_file. Shipped: "),
        (["train", "--gin_file=runs/pretrian.gin"], "Did you mean runs/pretrain.gin?"),
        (["train", "--gin_file=runs/python_docs.gin"], "MODEL_DIR is required: set it with --gin.MODEL_DIR="),
        (
            ["train", "--gin_file=runs/python_docs.gin", "--gin.MODEL_DIR=m", "--gin.TRIAN_STEPS=5"],
            "nothing uses TRIAN_STEPS. Did you mean TRAIN_STEPS",
        ),
        (["tasks", "show"], "needs the name of a task"),
        (["cache", "--mixture=x", "--workers=0"], "--workers must be at least 1"),
        (["bench", "train", "--steps=0", "--gin_file=runs/python_docs.gin"], "must be at least 1"),
    ],
)
def test_mistakes_are_one_message(capsys, arguments, message):
    code, err = error_of(capsys, *arguments)
    assert code == 2
    assert message in err
    assert "Traceback" not in err


def test_debug_shows_the_traceback():
    with pytest.raises(ValueError, match="Give a --gin_file"):
        main.main(["train", "--debug"])


def test_a_closed_pipe_is_no_error():
    done = subprocess.run(
        f"{sys.executable} -m mtjax.launch.main train --gin_file=runs/python_docs.gin --gin.MODEL_DIR=m --dry_run "
        "--cache_dir=none | head -c 10",
        shell=True,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


def test_model_directories_of_others_are_refused(tmp_path, capsys):
    text = "A = 1\nTRAIN_STEPS = 5\ntrain.Saving.every = 3\nNAME = 'x'\n"
    launch_train.check_model_dir(tmp_path / "new", text)
    (tmp_path / "config.gin").write_text(text)
    launch_train.check_model_dir(
        tmp_path, text.replace("A = 1", "A = 2")
    )  # it never saved: any run may start
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    launch_train.check_model_dir(tmp_path, text)
    longer = text.replace("5", "50").replace("every = 3", "every = 7")
    launch_train.check_model_dir(tmp_path, longer)
    with pytest.raises(ValueError, match=r"(?s)another run, which differs in\n  A: 1 -> 2\nResume it"):
        launch_train.check_model_dir(tmp_path, text.replace("A = 1", "A = 2"))
    scheduled = (
        text + "optim.learning_rate.steps_per_cycle = %TRAIN_STEPS\ntrain.fit.train_steps = %TRAIN_STEPS\n"
    )
    (tmp_path / "config.gin").write_text(scheduled)
    capsys.readouterr()
    launch_train.check_model_dir(tmp_path, scheduled.replace("= 5", "= 6"))
    assert "optim.learning_rate.steps_per_cycle" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "config.gin").rename(tmp_path / "holiday.txt")
    with pytest.raises(ValueError, match="is not empty and holds no run"):
        launch_train.check_model_dir(tmp_path, text)
    with pytest.raises(ValueError, match="is a file"):
        launch_train.check_model_dir(tmp_path / "holiday.txt", text)


@pytest.mark.slow
def test_bench_prints_the_agreed_keys(capsys):
    size = ["--gin.BATCH_SIZE=2", "--gin.TASK_FEATURE_LENGTHS={'inputs': 32, 'targets': 16}"]
    size += ["--gin.t5.T5Config.num_encoder_layers=1", "--gin.t5.T5Config.num_decoder_layers=1"]
    command = ["bench", "train", "--gin_file=runs/python_docs.gin", "--json", "--steps=2", "--num_tasks=3"]
    assert main.main([*command, *size]) == 0
    result = json.loads(capsys.readouterr().out)
    keys = (
        "import_s init_s compile_s first_step_s steps_per_s tokens_per_s peak_rss_mb flops_compiled flops_model "
        "recompiles task_loss_overhead"
    )
    assert " ".join(result) == keys
    assert result["recompiles"] == 0
    assert result["tokens_per_s"] == pytest.approx(result["steps_per_s"] * 2 * 48)
    assert 0.9 < result["flops_compiled"] / result["flops_model"] < 1.5
