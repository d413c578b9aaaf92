import pytest

from trl_diffusion_rank import RankedDiffusionDPOConfig
from trl_diffusion_rank.objectives import LOSS_TYPES


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max_length", 77),
        ("max_length", None),
        ("truncation_mode", "keep_end"),
        ("padding_free", True),
        ("pad_to_multiple_of", 8),
        ("pad_token", "<pad>"),
        ("ld_alpha", 0.5),
        ("f_divergence_type", "forward_kl"),
        ("f_alpha_divergence_coef", 0.7),
        ("use_weighting", True),
        ("discopop_tau", 0.1),
        ("use_liger_kernel", True),
        ("router_aux_loss_coef", 0.01),
        ("neftune_noise_alpha", 5.0),
        ("label_smoothing_factor", 0.1),
        ("include_num_input_tokens_seen", True),
    ],
)
def test_language_model_options_raise_when_set(tmp_path, option, value):
    with pytest.raises(ValueError, match=f"`{option}=.*has no meaning for a diffusion model"):
        RankedDiffusionDPOConfig(str(tmp_path), bf16=False, **{option: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "sigmoid"}, "Unknown `loss_type` 'sigmoid'.*TRL's `sigmoid` is `pairwise` here"),
        ({"loss_type": ["top1", "ipoo"]}, "Unknown `loss_type` 'ipoo': expected one of plackett_luce"),
        ({"loss_type": ["top1", "ipo"], "loss_weights": [1.0]}, "must have the same length"),
        ({"beta": 0.0}, "`beta` must be positive, got 0.0"),
        ({"beta": float("nan")}, "`beta` must be positive, got nan"),
        ({"loss_type": ["linear", "top1"]}, "set `beta` when combining them"),
        ({"label_smoothing": 0.5, "loss_type": "pairwise"}, r"`label_smoothing` must be in \[0, 0.5\), got 0.5"),
        ({"label_smoothing": 0.1}, r"not on `loss_type=\['plackett_luce'\]`"),
        ({"linear_eta": 0.6}, r"`linear_eta` must be in \[0, 0.5\], got 0.6"),
        ({"preserve_mu": 1.5}, r"`preserve_mu` must be in \[0, 1\], got 1.5"),
        ({"ema_decay": 1.0}, r"`ema_decay` must be in \(0, 1\), got 1.0"),
        ({"sft_weight": -1.0}, "`sft_weight` must be at least 0, got -1.0"),
        ({"dpop_lambda": -1.0}, "`dpop_lambda` must be at least 0, got -1.0"),
        ({"max_skipped_steps": 0}, "`max_skipped_steps` must be at least 1, got 0"),
        ({"timestep_weighting": "snr"}, "`timestep_weighting` must be one of constant, min_snr, snr_sqrt, got 'snr'"),
        ({"caption_dropout": 1.0}, r"`caption_dropout` must be in \[0, 1\), got 1.0"),
        ({"num_reference_draws": 0}, "`num_reference_draws` must be at least 1, got 0"),
        ({"stop_on_displacement": True, "displacement_patience": 0}, "needs a `displacement_patience` above 0"),
        ({"displacement_patience": -1}, "`displacement_patience` must be at least 0, got -1"),
        ({"encode_batch_size": 0}, "`encode_batch_size` must be at least 1, got 0"),
        ({"resolution": 0}, "`resolution` must be at least 8, got 0"),
        ({"timestep_sampling": "discrete"}, "`timesteps` is the grid of `timestep_sampling='discrete'`"),
        ({"on_bad_row": "drop"}, "`on_bad_row` must be 'error' or 'skip', got 'drop'"),
    ],
)
def test_bad_values_name_the_option(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        RankedDiffusionDPOConfig(str(tmp_path), bf16=False, **options)


def test_help_names_every_loss_type():
    help_text = RankedDiffusionDPOConfig.__dataclass_fields__["loss_type"].metadata["help"]
    assert f"One or several of {', '.join(LOSS_TYPES)};" in help_text


def test_defaults_are_accepted_and_rate_is_ours(tmp_path):
    config = RankedDiffusionDPOConfig(str(tmp_path), bf16=False)
    assert (config.learning_rate, config.loss_type, config.beta) == (1e-5, ["plackett_luce"], None)
