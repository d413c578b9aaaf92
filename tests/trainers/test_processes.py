"""A run does not change with the number of processes: noise and timesteps belong to the row."""

import json
import sys
from pathlib import Path

import pytest
from tiny import ranked_dataset, tiny_sdxl_pipeline
from training import launch

from trl_diffusion_rank import (
    DiffusionCPOConfig,
    DiffusionCPOTrainer,
    RankedDiffusionDPOConfig,
    RankedDiffusionDPOTrainer,
)


def train(folder: str, batch_size: int, method: str) -> None:
    """Four steps of four rows, whatever the number of processes; the losses are written to `folder`."""
    from peft import LoraConfig

    trainer_class, config_class, options = {
        "dpo": (RankedDiffusionDPOTrainer, RankedDiffusionDPOConfig, {}),
        "cpo": (DiffusionCPOTrainer, DiffusionCPOConfig, {"normalize_error": True}),
    }[method]
    trainer = trainer_class(
        model=tiny_sdxl_pipeline(),
        args=config_class(
            folder,
            per_device_train_batch_size=batch_size,
            max_steps=4,
            logging_steps=1,
            learning_rate=1e-3,
            beta=100.0,  # 5000 would show how differently float32 rounds the errors of another batch size
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            **options,
        ),
        train_dataset=ranked_dataset((4, 3, 2, 4, 3, 2, 4, 4)),
        peft_config=LoraConfig(r=4, target_modules=["to_q", "to_v", "conv1"]),
    )
    trainer.train()
    if trainer.accelerator.is_main_process:
        history = [log for log in trainer.state.log_history if "loss" in log]
        Path(folder, "history.json").write_text(json.dumps([trainer.accelerator.num_processes, history]))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dpo", "cpo"])
def test_two_processes_give_the_losses_of_one(tmp_path, method):
    histories = {}
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        launch(__file__, processes, folder, 4 // processes, method)
        seen, histories[processes] = json.loads((folder / "history.json").read_text())
        assert seen == processes
    assert len(histories[1]) == 4
    for one, two in zip(histories[1], histories[2], strict=True):
        for name in ("loss", "rewards/margins", "error/chosen"):
            assert two[name] == pytest.approx(one[name], rel=1e-5, abs=3e-5), name


if __name__ == "__main__":
    train(sys.argv[1], int(sys.argv[2]), sys.argv[3])
