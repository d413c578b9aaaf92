"""Peak memory in the log, and the batch size that fits into it."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from tiny import ranked_dataset, tiny_sdxl_pipeline
from tiny_discriminator import tiny_discriminator, tiny_processor
from training import adapter, launch, make

from trl_diffusion_rank import (
    AestheticDiscriminatorTrainer,
    AestheticDiscriminatorTrainerConfig,
    DiffusionCPOConfig,
    DiffusionCPOTrainer,
    RankedDiffusionDPOConfig,
    RankedDiffusionDPOTrainer,
)
from trl_diffusion_rank.diffusion.denoiser import DenoiserModel


COUNTS = (2, 3, 2, 4, 3, 2, 4, 4)
CLASSES = {
    "dpo": (RankedDiffusionDPOTrainer, RankedDiffusionDPOConfig),
    "cpo": (DiffusionCPOTrainer, DiffusionCPOConfig),
}


def make_trainer(folder, method="dpo", **options):
    options = {"per_device_train_batch_size": 4, "beta": 100.0, "learning_rate": 1e-3, "use_cpu": True} | options
    return make(*CLASSES[method], folder, tiny_sdxl_pipeline(), ranked_dataset(COUNTS), **options)


def make_discriminator_trainer(folder, **options):
    return make(
        AestheticDiscriminatorTrainer,
        AestheticDiscriminatorTrainerConfig,
        folder,
        tiny_discriminator("clip", patch_layer=1),
        ranked_dataset(COUNTS),
        processing_class=tiny_processor("clip"),
        peft_config=None,
        **({"per_device_train_batch_size": 4, "use_cpu": True} | options),
    )


@pytest.fixture
def seen(monkeypatch) -> list[int]:
    """A device that takes no more than 11 images: how many each forward pass of a denoiser has."""
    return limit_memory(monkeypatch.setattr)


def limit_memory(replace) -> list[int]:
    seen, forward = [], DenoiserModel.forward

    def limited(self, noisy_latents, *args):
        seen.append(len(noisy_latents))
        if len(noisy_latents) > 11:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 PiB")
        return forward(self, noisy_latents, *args)

    replace(DenoiserModel, "forward", limited)
    return seen


class TestPeakMemory:
    @pytest.mark.parametrize("make_one", [make_trainer, make_discriminator_trainer])
    def test_each_log_has_it(self, tmp_path, make_one):
        trainer = make_one(tmp_path, logging_steps=1, max_steps=2)
        trainer.train()
        logs = [log["memory/peak_rss_gb"] for log in trainer.state.log_history]
        assert len(logs) == 3
        assert 0.1 < logs[0] <= logs[1] <= logs[2] < 1000

    def test_of_a_gpu(self, monkeypatch, tmp_path):
        trainer = make_trainer(tmp_path)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 1_234_500_000)
        trainer.log({"loss": 1.0})
        assert trainer.state.log_history[-1]["memory/peak_gb"] == 1.234


class TestFindBatchSize:
    @pytest.mark.parametrize("method", CLASSES)
    def test_a_step_keeps_its_rows(self, tmp_path, capsys, seen, method):
        found = make_trainer(tmp_path / "found", method, auto_find_batch_size=True)
        before = adapter(found)
        found.train()
        # The four rows of most images have 15; two have 8. Four rows at random would have shown only later
        assert seen[0] == 15 and max(seen[1:]) <= 8
        assert "2 of 4 rows fit on a device at a time; with `gradient_accumulation_steps=2`" in capsys.readouterr().out
        by_hand = make_trainer(tmp_path / "hand", method, per_device_train_batch_size=2, gradient_accumulation_steps=2)
        assert all(torch.equal(before[name], weight) for name, weight in adapter(by_hand).items())
        by_hand.train()
        assert found.state.global_step == by_hand.state.global_step == 2
        for name, weight in adapter(by_hand).items():
            torch.testing.assert_close(adapter(found)[name], weight, rtol=0, atol=0)
        losses = [[log["loss"] for log in t.state.log_history if "loss" in log] for t in (found, by_hand)]
        assert losses[0] == losses[1]

    def test_of_a_discriminator(self, tmp_path, capsys):
        trainer = make_discriminator_trainer(tmp_path, auto_find_batch_size=True, gradient_accumulation_steps=3)
        trainer.train()
        assert "4 of 4 rows fit on a device at a time; with `gradient_accumulation_steps=3`" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("error", "message"),
        [
            (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 PiB"), "not even one row, of"),
            (RuntimeError("shapes don't match"), "shapes don't match"),
        ],
    )
    def test_errors(self, tmp_path, monkeypatch, error, message):
        def fail(*args):
            raise error

        monkeypatch.setattr(DenoiserModel, "forward", fail)
        trainer = make_trainer(tmp_path, auto_find_batch_size=True)
        with pytest.raises(RuntimeError, match=message):
            trainer.train()

    def test_a_stream_has_no_largest_row(self, tmp_path):
        options = {"auto_find_batch_size": True, "beta": 100.0}
        data = ranked_dataset(COUNTS).to_iterable_dataset()
        with pytest.raises(ValueError, match=r"`auto_find_batch_size=True` can't be used with a stream"):
            make(*CLASSES["dpo"], tmp_path, tiny_sdxl_pipeline(), data, **options)

    def test_not_with_a_discriminator_in_the_loss(self, tmp_path):
        with pytest.raises(ValueError, match=r"can't be used with `adversarial_mode='frozen'`"):
            make_trainer(
                tmp_path, auto_find_batch_size=True, adversarial_mode="frozen", adversarial_discriminator="some"
            )

    @pytest.mark.slow
    def test_processes_agree(self, tmp_path):
        launch(__file__, 2, tmp_path)
        first, second = (json.loads((tmp_path / f"{index}.json").read_text()) for index in range(2))
        assert first == [15, 2, 2] and second[1:] == [2, 2]  # the second had memory for all four


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    asked = limit_memory(setattr) if os.environ["RANK"] == "0" else [None]
    trainer = make_trainer(folder, auto_find_batch_size=True)
    trainer.train()
    result = [asked[0], trainer.args.per_device_train_batch_size, trainer.args.gradient_accumulation_steps]
    (folder / f"{trainer.accelerator.process_index}.json").write_text(json.dumps(result))
