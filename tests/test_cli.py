import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import fake_stages
import pytest
import torch
from accelerate.commands import config
from accelerate.commands import launch as accelerate_launch
from torch.distributed.elastic.multiprocessing.api import ProcessFailure
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from trl_diffusion_rank import cli
from trl_diffusion_rank.launch import flag_groups, launch, launch_argv, quiet_defaults


@pytest.fixture(autouse=True)
def stages(tmp_path, monkeypatch):
    fake_stages.install(tmp_path, monkeypatch)


def driver(*argv):
    return subprocess.run([sys.executable, "driver.py", *argv], capture_output=True, text=True)


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--help"], "the stage grow"),
        (["run", "--help"], "--only STAGE"),
        (["grow", "--help"], "--number NUMBER"),
        (["heavy", "--help"], "Strength of the pull, 5% more. (default: 2.5)"),
    ],
)
def test_help_imports_nothing_heavy(argv, text):
    start = time.monotonic()
    done = driver(*argv)
    assert done.returncode == 0, done.stderr
    assert text in done.stdout
    if "imported:" in done.stdout:  # argparse's own --help has left before
        assert done.stdout.endswith("imported:\n")
    assert time.monotonic() - start < 2  # about 0.3 s; importing torch takes longer


def test_second_run_imports_nothing_heavy():
    Path("r.yaml").write_text("shared: {seed: 1, beta: 3}\ngrow: {}\ncount: {}\nheavy: {}\n")
    first = driver("run", "--recipe", "r.yaml")
    assert first.returncode == 0, first.stderr
    assert '"beta": 3.0' in Path("runs/r/heavy/options.json").read_text()
    second = driver("run", "--recipe", "r.yaml")
    assert second.stdout.count("unchanged, skipped") == 3
    assert second.stdout.endswith("imported:\n")
    # an option of `shared` that the heavy stage does not have doesn't concern it
    third = driver("run", "--recipe", "r.yaml", "--only", "heavy")
    assert "[1/1] heavy: unchanged, skipped" in third.stdout


def test_static_help_names_what_brings_the_rest():
    text = cli.static_help("heavy")
    assert "--beta (float)" in text
    assert "Some of LOSSES. (default: ['ipo'])" in text
    assert "The rest comes from fake_stages.HeavyArguments, DPOConfig." in text
    assert "--help_all" in text


def test_help_all_lists_everything(capsys):
    assert cli.main(["heavy", "--help_all"]) == 0
    assert "--counts COUNTS" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["grwo"], "unknown command `grwo`; did you mean `grow`?"),
        (["grow", "--output_dir", "o", "--numbr", "1"], "unknown option `--numbr`; did you mean `--number`?"),
        (["grow", "--output_dir", "o", "--mixed_precison", "no"], "did you mean `--mixed_precision`?"),
        (["grow", "--output_dir", "o", "--number", "-1"], "`number` is -1; it must be at least 0"),
        (["grow", "stray"], "unexpected argument `stray`"),
        (["grow", "--config", "x"], "recipes are given with `--recipe FILE`"),
        (["heavy", "--output_dir", "o", "--beta", "x"], "argument --beta: invalid float value: 'x'"),
        (["run"], "the following arguments are required: --recipe"),
        (["run", "--recipe", "none.yaml"], "the recipe `none.yaml` does not exist"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(argv, message, capsys):
    try:
        assert cli.main(argv) == 2
    except SystemExit as end:
        assert end.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not Path("o").exists()


def test_a_heavy_stage_s_section_is_checked(capsys):
    Path("r.yaml").write_text("heavy: {beta: [1]}\n")
    assert cli.main(["heavy", "--recipe", "r.yaml"]) == 2
    assert "`beta` in section `heavy` of r.yaml: got [1] of type list, expected float" in capsys.readouterr().err


def test_launched_stage_gets_its_own_options_and_the_launcher_the_others(capfd):
    argv = ["grow", "--weights", "1", "-2", "--num_processes", "1", "--no_loud", "--mixed-precision=no", "--title=a b"]
    assert cli.main([*argv, "--output_dir", "out"]) == 0
    options = Path("out/options.json").read_text()
    assert '"weights": [1.0, -2.0]' in options
    assert '"loud": false' in options
    assert '"title": "a b"' in options
    assert capfd.readouterr().err == ""


class TestLaunchOptions:
    def test_flag_groups(self):
        assert list(flag_groups(["x", "--a=1", "--b", "2", "-3", "--c"])) == [
            ("x", []),
            ("--a", ["1"]),
            ("--b", ["2", "-3"]),
            ("--c", []),
        ]

    def test_flags_win_over_the_recipe(self):
        argv = launch_argv({"num_processes": 3, "cpu": True, "multi_gpu": False}, {"num_processes": ["2"]}, "r.yaml")
        assert argv == ["--cpu", "--num_processes", "2"]

    @pytest.mark.parametrize(
        ("preset", "kind", "details"),
        [
            ("single_gpu", None, {}),
            ("multi_gpu", "multi_gpu", {}),
            ("zero1", "use_deepspeed", {"zero_stage": 1}),
            ("zero2", "use_deepspeed", {"zero_stage": 2}),
            ("zero3", "use_deepspeed", {"zero_stage": 3, "zero3_save_16bit_model": True}),
            ("fsdp1", "use_fsdp", {"fsdp_version": 1}),
            ("fsdp2", "use_fsdp", {"fsdp_version": 2, "fsdp_state_dict_type": "FULL_STATE_DICT"}),
        ],
    )
    def test_what_accelerate_gets(self, monkeypatch, preset, kind, details):
        """From the recipe's section and from flags, which win; a node of several says which it is."""
        seen = []
        monkeypatch.setattr(accelerate_launch, "launch_command", seen.append)
        nodes = {"num_machines": 2, "main_process_ip": "10.0.0.1", "main_process_port": 29501, "num_processes": 4}
        flags = {"machine_rank": ["1"], "num_processes": ["16"], "accelerate_config": [preset]}
        assert launch("some.module", ["--option", "1"], launch_argv(nodes, flags, "r.yaml")) == 0
        args, _, _ = accelerate_launch._validate_launch_command(seen[0])
        assert (args.num_machines, args.machine_rank, args.num_processes) == (2, 1, 16)
        assert (args.main_process_ip, args.main_process_port) == ("10.0.0.1", 29501)
        assert (args.training_script, args.training_script_args) == ("some.module", ["--option", "1"])
        kinds = ("multi_gpu", "use_deepspeed", "use_fsdp")
        assert [name for name in kinds if getattr(args, name)] == ([kind] if kind else [])
        assert {name: getattr(args, name) for name in details} == details

    def test_several_processes_without_a_preset(self, monkeypatch, tmp_path):
        monkeypatch.setattr(config, "default_config_file", str(tmp_path / "none.yaml"))
        assert quiet_defaults(["--num_processes", "2"])[0] == "--multi_gpu"
        assert "--multi_gpu" not in quiet_defaults(["--num_processes", "2", "--use_deepspeed"])
        assert "--multi_gpu" not in quiet_defaults(["--num_processes", "1"])

    def test_processes_on_a_cpu_know_it(self, monkeypatch):
        seen = {}
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
        monkeypatch.setattr(accelerate_launch, "launch_command", lambda args: seen.update(os.environ))
        launch("some.module", [], ["--multi_gpu", "--num_processes", "2"])
        assert seen["ACCELERATE_USE_CPU"] == "true"
        assert "ACCELERATE_USE_CPU" not in os.environ

    @pytest.mark.parametrize(
        ("exit_code", "code", "message"),
        [
            (-9, 137, "the process of rank 1, and with it the others, was ended by SIGKILL, as the system does when"),
            (-11, 139, "the process of rank 1, and with it the others, was ended by SIGSEGV\n"),
            (3, 3, ""),
        ],
    )
    def test_how_several_processes_ended(self, monkeypatch, capsys, exit_code, code, message):
        def fail(args):
            failure = ProcessFailure(local_rank=1, pid=1, exitcode=exit_code, error_file="none")
            raise ChildFailedError("some.module", {1: failure})

        monkeypatch.setattr(accelerate_launch, "launch_command", fail)
        assert launch("some.module", [], ["--num_processes", "2"]) == code
        assert message in capsys.readouterr().err

    def test_presets_of_trl(self):
        argv = launch_argv({"config_file": "mine.yaml"}, {"accelerate_config": ["fsdp2"]}, "r.yaml")
        assert argv[0] == "--config_file"
        assert argv[1].endswith(os.path.join("accelerate_configs", "fsdp2.yaml"))
        assert len(argv) == 2

    def test_a_configuration_file_decides(self, tmp_path, monkeypatch):
        monkeypatch.setattr(config, "default_config_file", str(tmp_path / "none.yaml"))
        assert quiet_defaults(["--mixed_precision", "bf16"])[2:] == ["--num_machines", "1", "--dynamo_backend", "no"]
        assert quiet_defaults(["--config_file", "mine.yaml"]) == []
        (tmp_path / "none.yaml").write_text("distributed_type: 'NO'")
        assert quiet_defaults([]) == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_stage_too(number, code):
    argv = [sys.executable, "driver.py", "grow", "--output_dir", "out", "--sleep", "60"]
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    while not Path("out/sleeping").exists():  # a signal amid imports may be lost in a library
        assert process.poll() is None
        time.sleep(0.05)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # what a terminal does
    else:
        process.send_signal(number)
    assert process.wait(timeout=20) == code
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # nobody is left in the group


@pytest.mark.parametrize(("stage", "config"), [("dpo", "DPOConfig"), ("cpo", "CPOConfig")])
def test_help_of_a_real_training_stage(stage, config):
    code = (
        "import sys\n"
        "from trl_diffusion_rank import cli\n"
        f"assert cli.main(['{stage}', '--help']) == 0\n"
        "heavy = {'torch', 'transformers', 'diffusers', 'datasets', 'trl'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--beta" in done.stdout
    assert config in done.stdout
