import pytest
import torch

from trl_diffusion_rank.diffusion.loading import load_pipeline, parse_dtype, sampling_dtype


def test_missing_model_is_one_clear_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"Can't load the model '.*nothing-here' as a diffusers pipeline \(Hub id\)"):
        load_pipeline(str(tmp_path / "nothing-here"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"\(folder\).*must hold a `model_index.json`"):
        load_pipeline(str(tmp_path / "empty"))


def test_dtype_is_float32_as_in_trl_unless_named(sdxl_folder):
    assert load_pipeline(sdxl_folder).unet.dtype == torch.float32
    assert load_pipeline(sdxl_folder, "bfloat16").unet.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="`dtype` must be one of float32, bfloat16, float16; got 'int8'"):
        parse_dtype("int8")


def test_auto_is_bfloat16_but_on_a_cpu():
    assert sampling_dtype("auto", torch.device("cpu")) == "float32"
    assert sampling_dtype("auto", torch.device("cuda")) == "bfloat16"
    assert sampling_dtype("float16", torch.device("cpu")) == "float16"
