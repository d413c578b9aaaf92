import pytest
import torch
from tiny import tiny_sd3_pipeline, tiny_sd_pipeline

from trl_diffusion_rank.diffusion.denoiser import denoising_error
from trl_diffusion_rank.diffusion.families import recognise_family
from trl_diffusion_rank.diffusion.weighting import timestep_weights


FAMILIES = {
    "epsilon": lambda: recognise_family(tiny_sd_pipeline("epsilon")),
    "v_prediction": lambda: recognise_family(tiny_sd_pipeline("v_prediction")),
    "sample": lambda: recognise_family(tiny_sd_pipeline("sample")),
    "flow": lambda: recognise_family(tiny_sd3_pipeline()),
}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("weighting", ["constant", "min_snr", "snr_sqrt"])
def test_mean_over_the_schedule_is_one(name, weighting):
    family = FAMILIES[name]()
    weights = timestep_weights(family, weighting, family.schedule())
    assert weights.mean() == pytest.approx(1, rel=1e-5)
    assert (weights > 0).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_weight_is_stated_on_the_error_of_the_clean_image(name):
    """min_snr times the prediction's error is min(SNR, 5) times the clean estimate's, up to the normalisation."""
    family = FAMILIES[name]()
    generator = torch.Generator().manual_seed(0)
    channels = 16 if name == "flow" else 4
    latents, noise = torch.randn(2, 3, channels, 8, 8, generator=generator)
    timesteps = torch.tensor([150, 500, 900]) if name != "flow" else torch.tensor([150.0, 500.0, 900.0])
    noisy, target = family.add_noise(latents, noise, timesteps), family.target(latents, noise, timesteps)
    wrong = target + 0.1 * torch.randn(target.shape, generator=generator)
    error = denoising_error(wrong, target)
    clean_error = denoising_error(family.predict_clean(noisy, timesteps, wrong), latents)
    ratio = timestep_weights(family, "min_snr", timesteps) * error / (family.snr(timesteps).clamp(max=5) * clean_error)
    torch.testing.assert_close(ratio, ratio[:1].expand(3), rtol=1e-3, atol=0)


def test_min_snr_of_epsilon_is_the_papers():
    """min(SNR, 5) / SNR: 1 where there is much noise, falling where there is little."""
    family = FAMILIES["epsilon"]()
    timesteps = torch.tensor([5, 990])
    weights = timestep_weights(family, "min_snr", timesteps)
    snr = family.snr(timesteps)
    assert snr[0] > 5 > snr[1]
    assert (weights[0] / weights[1]).item() == pytest.approx((5 / snr[0]).item(), rel=1e-4)
