"""One of two processes is killed: the command says so and ends; given again it comes to what it would have come to."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file
from tiny import ranked_dataset

from trl_diffusion_rank.stages._common import last_whole_checkpoint


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def command(output: Path, model: str, data: Path) -> list[str]:
    options = {
        "output_dir": output,
        "model_name_or_path": model,
        "dataset_name": data,
        "num_processes": 2,
        "main_process_port": free_port(),  # other tests may run beside
        "max_steps": 30,
        "save_steps": 5,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "beta": 100,
        "bf16": "false",
        "gradient_checkpointing": "false",
        "report_to": "none",
        "use_peft": "true",
        "lora_r": 4,
    }
    flags = [str(token) for name, value in options.items() for token in (f"--{name}", value)]
    return [sys.executable, "-m", "trl_diffusion_rank.cli", "dpo", *flags]


def worker(process: subprocess.Popen, rank: str) -> psutil.Process:
    """The launched process of that rank."""
    for child in psutil.Process(process.pid).children(recursive=True):
        if child.environ().get("RANK") == rank:
            return child
    raise AssertionError(f"no process has the rank {rank}")


@pytest.mark.slow
def test_a_killed_process_ends_the_run_which_resumes(tmp_path, sdxl_folder):
    data = tmp_path / "data.parquet"
    ranked_dataset((4, 3, 2, 4, 3, 2, 4, 4)).to_parquet(data)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command(tmp_path / "whole", sdxl_folder, data), check=True, env=environment, timeout=300)

    killed = command(tmp_path / "killed", sdxl_folder, data)
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(killed, stdout=log, stderr=subprocess.STDOUT, env=environment)
        while not (tmp_path / "killed" / "checkpoint-10").is_dir():
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.02)
        worker(process, "1").send_signal(signal.SIGKILL)
        assert process.wait(timeout=60) == 128 + signal.SIGKILL
    log = (tmp_path / "log").read_text()
    assert "the process of rank 1, and with it the others, was ended by SIGKILL" in log
    assert "the same command continues here" in log
    assert not (tmp_path / "killed" / "pytorch_lora_weights.safetensors").exists()

    done = subprocess.run(killed, check=True, env=environment, timeout=300, capture_output=True, text=True)
    assert "Resuming from" in done.stdout
    whole, resumed = (load_file(tmp_path / run / "pytorch_lora_weights.safetensors") for run in ("whole", "killed"))
    assert whole.keys() == resumed.keys()
    assert all((whole[name] == resumed[name]).all() for name in whole)


def test_half_a_checkpoint_is_left_alone(tmp_path, capsys):
    assert last_whole_checkpoint(str(tmp_path / "none")) is None
    for step, state in ((5, '{"global_step": 5}'), (10, '{"global_step": 10}'), (15, '{"global_'), (20, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert last_whole_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-10")
    assert capsys.readouterr().out.count("was not written to its end") == 2
