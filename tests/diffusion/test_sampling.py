import numpy as np
import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from tiny import tiny_sd_pipeline

from trl_diffusion_rank.diffusion.sampling import is_black, load_tuned, sample_images


@pytest.fixture
def pipe():
    pipe = tiny_sd_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe, prompts, seeds, **options):
    options = {"num_inference_steps": 2, "guidance_scale": 2.0, "progress": None} | options
    return [np.asarray(image).astype(int) for image in sample_images(pipe, prompts, seeds, **options)]


PROMPTS = ["a cat", "a dog", "a hen", "a cow", "a pig"]
SEEDS = [11, 12, 13, 14, 15]


def test_an_image_does_not_depend_on_batch_size_or_neighbours(pipe):
    one_by_one = sample(pipe, PROMPTS, SEEDS, batch_size=1)
    for batch_size in (2, 5, 8):
        together = sample(pipe, PROMPTS, SEEDS, batch_size=batch_size)
        # kernels may round differently at another batch size: at most one of 255 levels
        assert max(np.abs(a - b).max() for a, b in zip(one_by_one, together, strict=True)) <= 1
    reordered = sample(pipe, PROMPTS[::-1], SEEDS[::-1], batch_size=2)
    assert max(np.abs(a - b).max() for a, b in zip(one_by_one, reordered[::-1], strict=True)) <= 1


def test_an_image_depends_on_its_seed_prompt_steps_and_guidance(pipe):
    (image,) = sample(pipe, ["a cat"], [1])
    for other in (
        sample(pipe, ["a cat"], [2]),
        sample(pipe, ["a dog"], [1], guidance_scale=50.0),
        sample(pipe, ["a cat"], [1], num_inference_steps=3),
    ):
        assert np.abs(image - other[0]).max() > 1


def test_size(pipe):
    assert sample_images(pipe, ["a cat"], [1], num_inference_steps=1, height=16, width=8)[0].size == (8, 16)
    assert sample_images(pipe, [], [], num_inference_steps=1) == []


def test_progress_bar_counts_images(pipe, capsys):
    sample_images(pipe, PROMPTS, SEEDS, num_inference_steps=1, batch_size=2, progress="drawing")
    shown = capsys.readouterr().err
    assert "drawing" in shown and "5/5" in shown and "image/s" in shown


def test_guards(pipe):
    with pytest.raises(ValueError, match="2 prompts and 1 seeds"):
        sample_images(pipe, ["a", "b"], [1], num_inference_steps=1)
    with pytest.raises(ValueError, match="`batch_size` is 0"):
        sample_images(pipe, ["a"], [1], num_inference_steps=1, batch_size=0)


def test_is_black():
    image = Image.new("RGB", (4, 4))
    assert is_black(image)
    image.putpixel((1, 2), (0, 0, 9))
    assert not is_black(image)
    assert not is_black(Image.new("RGB", (4, 4), "white"))


def test_load_tuned_loads_a_lora(pipe, tmp_path):
    before = sample(pipe, ["a cat"], [1])[0]
    lora = LoraConfig(r=2, lora_alpha=8, target_modules=["to_q", "to_v"], init_lora_weights=False)
    pipe.unet.add_adapter(lora)
    inside = sample(pipe, ["a cat"], [1])[0]
    pipe.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(pipe.unet),
        unet_lora_adapter_metadata=pipe.unet.peft_config["default"].to_dict(),  # alpha is lost without it
    )
    pipe.unet.delete_adapters("default")
    assert (sample(pipe, ["a cat"], [1])[0] == before).all()

    load_tuned(pipe, str(tmp_path))
    after = sample(pipe, ["a cat"], [1])[0]
    assert np.abs(after - inside).max() <= 1 and np.abs(after - before).max() > 1


def test_a_loaded_lora_draws_without_its_dropout(pipe, tmp_path):
    lora = LoraConfig(r=2, lora_alpha=8, target_modules=["to_q"], init_lora_weights=False, lora_dropout=0.5)
    pipe.unet.add_adapter(lora)
    pipe.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(pipe.unet),
        unet_lora_adapter_metadata=pipe.unet.peft_config["default"].to_dict(),
    )
    pipe.unet.delete_adapters("default")
    pipe.to(torch.bfloat16)  # in float32 it would be fused
    load_tuned(pipe, str(tmp_path))
    assert pipe.get_list_adapters() == {"unet": ["lora"]}
    assert (sample(pipe, ["a cat"], [1])[0] == sample(pipe, ["a cat"], [1])[0]).all()


def test_load_tuned_loads_full_weights(pipe, tmp_path):
    before = sample(pipe, ["a cat"], [1])[0]
    original = {name: parameter.clone() for name, parameter in pipe.unet.state_dict().items()}
    with torch.no_grad():
        pipe.unet.conv_out.bias += 1
    pipe.unet.save_pretrained(tmp_path / "unet")
    pipe.unet.load_state_dict(original)

    load_tuned(pipe, str(tmp_path))
    assert torch.equal(pipe.unet.conv_out.bias, original["conv_out.bias"] + 1)
    assert np.abs(sample(pipe, ["a cat"], [1])[0] - before).max() > 1


def test_load_tuned_refuses_a_folder_without_weights(pipe, tmp_path):
    with pytest.raises(ValueError, match=r"`adapters` is .* no weights could be loaded"):
        load_tuned(pipe, str(tmp_path))


def test_load_tuned_refuses_a_lora_of_another_model(pipe, tmp_path):
    from safetensors.torch import save_file

    weights = {"unet.elsewhere.lora_A.weight": torch.ones(2, 3), "unet.elsewhere.lora_B.weight": torch.ones(3, 2)}
    save_file(weights, tmp_path / "pytorch_lora_weights.safetensors")
    with pytest.raises(ValueError, match="`adapters` is"):
        load_tuned(pipe, str(tmp_path))
