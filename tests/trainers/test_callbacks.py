import pytest
import torch
from torch import nn
from transformers import TrainerControl, TrainerState

from trl_diffusion_rank.trainers.callbacks import MovingAverage


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
