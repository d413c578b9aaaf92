import json
import logging
import math
from types import SimpleNamespace

import pytest
import torch
from tiny import ranked_dataset, tiny_sdxl_pipeline
from torch import nn
from training import make
from transformers import TrainerControl, TrainerState

from trl_diffusion_rank import (
    DiffusionCPOConfig,
    DiffusionCPOTrainer,
    RankedDiffusionDPOConfig,
    RankedDiffusionDPOTrainer,
)
from trl_diffusion_rank.trainers.callbacks import LogHistory, MovingAverage


def model_of(value: float) -> nn.Module:
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(value)
    model.register_parameter("frozen", nn.Parameter(torch.ones(1), requires_grad=False))
    return model


def step(average: MovingAverage, model: nn.Module, value: float, number: int) -> None:
    model.weight.data.fill_(value)
    average.on_step_end(None, TrainerState(global_step=number), TrainerControl(), model=model)


def test_average_by_hand_with_the_warm_up_of_diffusers():
    """Steps 1 and 2 decay by 2/11 and 3/12, step 1000 by the .9 that was asked for."""
    model, average = model_of(1.0), MovingAverage(0.9)
    average.on_train_begin(None, TrainerState(), TrainerControl(), model=model)
    step(average, model, 2.0, 1)
    first = 1 * 2 / 11 + 2 * 9 / 11
    assert average.weights[0].item() == pytest.approx(first)
    step(average, model, 4.0, 2)
    second = first * 3 / 12 + 4 * 9 / 12
    assert average.weights[0].item() == pytest.approx(second)
    step(average, model, 10.0, 1000)
    assert average.weights[0].item() == pytest.approx(second * 0.9 + 10 * 0.1)
    assert len(average.weights) == 1, "frozen weights have no average"


def test_average_stands_in_the_models_place_and_leaves():
    model, average = model_of(1.0), MovingAverage(0.9)
    with average.applied(model):
        assert model.weight.item() == 1.0
    average.on_train_begin(None, TrainerState(), TrainerControl(), model=model)
    model.weight.data.fill_(5.0)
    with pytest.raises(RuntimeError, match="on the way"), average.applied(model):
        assert model.weight.item() == 1.0
        raise RuntimeError("on the way")
    assert model.weight.item() == 5.0


def test_checkpoint_without_an_average_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`ema_decay=0.9`, but .* is a checkpoint of a run without a moving average"):
        MovingAverage(0.9).load(tmp_path)


# The log on disk


def entries(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log_history.jsonl").read_text().splitlines()]


def log(history: LogHistory, folder, state: TrainerState, **values) -> None:
    state.log_history.append(values)
    history.on_log(SimpleNamespace(output_dir=str(folder)), state, TrainerControl())


def begun(folder, *known: dict) -> tuple[LogHistory, TrainerState]:
    history, state = LogHistory(), TrainerState(log_history=list(known))
    history.on_train_begin(SimpleNamespace(output_dir=str(folder)), state, TrainerControl())
    return history, state


def test_log_is_appended_to_and_what_is_not_finite_is_null(tmp_path):
    history, state = begun(tmp_path / "new")
    assert entries(tmp_path / "new") == []
    log(history, tmp_path / "new", state, loss=0.5, step=1)
    log(history, tmp_path / "new", state, loss=math.nan, eval_loss=-math.inf, note="odd", step=2)
    assert entries(tmp_path / "new") == [
        {"loss": 0.5, "step": 1},
        {"loss": None, "eval_loss": None, "note": "odd", "step": 2},
    ]


def test_resumed_log_begins_with_what_the_checkpoint_knows(tmp_path):
    """After it there may be entries of steps that are lost, the last of them half written."""
    first, second = {"loss": 0.5, "step": 1}, {"loss": 0.4, "step": 2}
    (tmp_path / "log_history.jsonl").write_text(f'{json.dumps(first)}\n{{"loss": 9.0, "step": 2}}\n{{"loss": ')
    history, state = begun(tmp_path, first)
    log(history, tmp_path, state, **second)
    assert entries(tmp_path) == [first, second]


def test_evaluation_without_training_leaves_the_log_of_an_earlier_run_alone(tmp_path):
    (tmp_path / "log_history.jsonl").write_text('{"loss": 0.5}\n')
    log(LogHistory(), tmp_path, TrainerState(), eval_loss=0.1)
    assert entries(tmp_path) == [{"loss": 0.5}]


def test_other_processes_write_no_log(tmp_path):
    history, state = LogHistory(), TrainerState(is_world_process_zero=False)
    history.on_train_begin(SimpleNamespace(output_dir=str(tmp_path)), state, TrainerControl())
    log(history, tmp_path, state, loss=0.5)
    assert not list(tmp_path.iterdir())


def test_full_disk_is_warned_of_and_the_log_is_whole_again_after_it(tmp_path, monkeypatch, caplog):
    history, state = begun(tmp_path)
    log(history, tmp_path, state, loss=0.5)
    path = tmp_path / "log_history.jsonl"
    path.unlink()
    path.mkdir()  # nothing can be written under this name
    with caplog.at_level(logging.WARNING):
        log(history, tmp_path, state, loss=0.4)
        log(history, tmp_path, state, loss=0.3)
    assert caplog.text.count("can't be written, training goes on") == 2
    path.rmdir()
    log(history, tmp_path, state, loss=0.2)
    log(history, tmp_path, state, loss=0.1)
    assert [entry["loss"] for entry in entries(tmp_path)] == [0.5, 0.4, 0.3, 0.2, 0.1]


@pytest.mark.parametrize(
    ("trainer_class", "config_class"),
    [(RankedDiffusionDPOTrainer, RankedDiffusionDPOConfig), (DiffusionCPOTrainer, DiffusionCPOConfig)],
)
def test_trainers_keep_their_log_on_disk(tmp_path, trainer_class, config_class):
    data = ranked_dataset()
    options = {"eval_dataset": data, "eval_strategy": "steps", "eval_steps": 1}
    trainer = make(trainer_class, config_class, tmp_path, tiny_sdxl_pipeline(), data, **options)
    trainer.train()
    assert entries(tmp_path) == trainer.state.log_history
    assert len(entries(tmp_path)) == 5 and "train_runtime" in entries(tmp_path)[-1]


def test_displacement_is_in_the_entry_at_which_it_is_seen(tmp_path, monkeypatch):
    """By its own numbers, though TRL adds them to the entry only when it is written; an evaluation between is none."""
    deltas = iter([0.04, 0.06, 0.07, 0.08, 0.09])  # of a reference error of 0.1
    options = {"max_steps": 5, "displacement_patience": 3, "eval_strategy": "steps", "eval_steps": 1}
    trainer_class, config_class, data = RankedDiffusionDPOTrainer, RankedDiffusionDPOConfig, ranked_dataset()
    trainer = make(trainer_class, config_class, tmp_path, tiny_sdxl_pipeline(), data, **options, eval_dataset=data)
    store = trainer._store_metrics

    def pretend(mode, *args):
        store(mode, *args)
        trainer._read_metrics()
        if mode == "train":
            delta = next(deltas)
            values = {"error/chosen": 0.1 + delta, "error/chosen_delta": delta, "error/rejected_delta": 2 * delta}
            trainer._metrics[mode].update({name: [value] for name, value in values.items()})

    monkeypatch.setattr(trainer, "_store_metrics", pretend)
    trainer.train()
    seen = [entry for entry in entries(tmp_path) if "displacement" in entry]
    assert [(entry["step"], entry["displacement"]) for entry in seen] == [(3, 1.0)]
