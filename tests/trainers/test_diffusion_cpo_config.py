from types import SimpleNamespace

import pytest

from trl_diffusion_rank import DiffusionCPOConfig
from trl_diffusion_rank.objectives.reference_free import LOSS_TYPES


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max_length", 77),
        ("max_length", None),
        ("max_completion_length", 77),
        ("alpha", 0.1),
        ("generate_during_eval", True),
        ("is_encoder_decoder", False),
        ("dataset_num_proc", 4),
        ("use_liger_kernel", True),
        ("neftune_noise_alpha", 5.0),
        ("label_smoothing_factor", 0.1),
        ("include_num_input_tokens_seen", True),
    ],
)
def test_language_model_options_raise_when_set(tmp_path, option, value):
    with pytest.raises(ValueError, match=f"`{option}=.*has no meaning for a diffusion model"):
        DiffusionCPOConfig(str(tmp_path), bf16=False, **{option: value})


BAD = [
    ({"loss_type": "sigmoid"}, "Unknown `loss_type` 'sigmoid'.*TRL's `sigmoid` is `pairwise` here"),
    ({"loss_type": "linear"}, "Unknown `loss_type` 'linear'.*use the `dpo` trainer"),
    ({"loss_type": "alphapo"}, "Unknown `loss_type` 'alphapo': expected one of plackett_luce"),
    ({"beta": 0.0}, "`beta` must be positive, got 0.0"),
    ({"beta": float("nan")}, "`beta` must be positive, got nan"),
    ({"cpo_alpha": -0.1}, "`cpo_alpha` must be at least 0, got -0.1"),
    ({"cpo_alpha": float("nan")}, "`cpo_alpha` must be at least 0, got nan"),
    ({"label_smoothing": 0.5, "loss_type": "simpo"}, r"`label_smoothing` must be in \[0, 0.5\), got 0.5"),
    ({"label_smoothing": 0.1}, "not on `loss_type='plackett_luce'`"),
    ({"simpo_gamma": 1.0}, "`simpo_gamma=1.0` acts on `simpo` only, not on `loss_type='plackett_luce'`"),
    ({"loss_type": "mapo", "cpo_alpha": 0.0}, "`cpo_alpha=0.0` doesn't act on `mapo`"),
    ({"loss_type": "mapo", "normalize_error": True}, "`normalize_error` can't be used with `loss_type='mapo'`"),
    ({"timestep_weighting": "min_snr", "normalize_error": True}, "both say how much a timestep counts"),
    ({"encode_batch_size": 0}, "`encode_batch_size` must be at least 1, got 0"),
    ({"timestep_sampling": "discrete"}, "`timesteps` is the grid of `timestep_sampling='discrete'`"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_values_name_the_option(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        DiffusionCPOConfig(str(tmp_path), bf16=False, **options)


@pytest.mark.parametrize(("options", "message"), BAD)
def test_parsed_options_are_checked_before_a_config_is_made(tmp_path, options, message):
    parsed = SimpleNamespace(**vars(DiffusionCPOConfig(str(tmp_path), bf16=False)))
    DiffusionCPOConfig.check_options(parsed)
    vars(parsed).update(options)
    with pytest.raises(ValueError, match=message):
        DiffusionCPOConfig.check_options(parsed)


def test_help_names_every_loss_type():
    help_text = DiffusionCPOConfig.__dataclass_fields__["loss_type"].metadata["help"]
    assert help_text == f"One of {', '.join(LOSS_TYPES)}."


def test_defaults_are_accepted_and_ours(tmp_path):
    config = DiffusionCPOConfig(str(tmp_path), bf16=False)
    assert (config.learning_rate, config.loss_type, config.beta) == (1e-5, "plackett_luce", None)
    assert (config.cpo_alpha, config.simpo_gamma, config.normalize_error) == (0.2, 0.5, False)
