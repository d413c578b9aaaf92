import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import random_image, tiny_text_encoder, tiny_tokenizer
from tiny_vlm import tiny_blip, tiny_florence2, tiny_llava
from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPTextModel
from transformers.utils import logging as transformers_logging

from trl_diffusion_rank.captions import Captioner
from trl_diffusion_rank.captions.captioner import INSTRUCTION, prompt_length


SENTENCE = "a red house under the blue sky"

# How a model is built, and what it is asked.
MODELS = {
    "llava": (tiny_llava, None),
    "llava_next": (lambda folder: tiny_llava(folder, next_=True), None),
    "blip": (tiny_blip, None),
    "blip_with_text": (tiny_blip, "a small"),
    "florence2": (tiny_florence2, "the cat"),
}


@pytest.fixture
def images() -> list[Image.Image]:
    """Of several shapes, so that the prompts of LLaVA-NeXT differ in length."""
    generator = np.random.default_rng(0)
    return [random_image(generator, size) for size in ((8, 8), (20, 6), (6, 20), (16, 16), (30, 7))]


@pytest.fixture
def log(caplog):
    """What transformers would print."""
    transformers_logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        yield caplog
    transformers_logging.disable_propagation()


@pytest.mark.parametrize("kind", MODELS)
def test_a_batch_gives_what_single_images_give(kind, tmp_path, images):
    build, instruction = MODELS[kind]
    captioner = Captioner(build(tmp_path), instruction=instruction, max_new_tokens=8)
    together = captioner.caption(images)
    assert together == [captioner.caption([image])[0] for image in images]
    assert len(set(together)) > 2  # it looks at the images


def test_prompts_of_llava_next_need_padding(tmp_path, images):
    """Else the test above would say nothing about it."""
    captioner = Captioner(tiny_llava(tmp_path, next_=True))
    assert captioner.processor.tokenizer.padding_side == "left"
    lengths = {captioner._prepare([image])["input_ids"].shape[1] for image in images}
    assert len(lengths) > 1


def test_only_the_answer_is_returned(tmp_path, images):
    captioner = Captioner(tiny_llava(tmp_path, sentence=SENTENCE), max_new_tokens=30)
    assert captioner.caption(images) == [SENTENCE] * 5


def test_max_new_tokens_cuts_a_caption(tmp_path, images):
    assert Captioner(tiny_llava(tmp_path, sentence=SENTENCE), max_new_tokens=3).caption(images[:1]) == ["a red house"]


def test_captions_end_where_each_ends(tmp_path, images):
    """Columns after a caption's end token are padding, which is no part of it."""
    captioner = Captioner(tiny_llava(tmp_path), max_new_tokens=8)
    captions = captioner.caption(images)
    assert len({len(caption.split()) for caption in captions}) > 1
    assert not any("<" in caption for caption in captions)


def test_the_instruction_goes_through_the_chat_template(tmp_path, images):
    asked = Captioner(tiny_llava(tmp_path / "chat"), instruction="the cat", max_new_tokens=8).caption(images)
    # The same weights without a template, given by hand what the template would make.
    by_hand = Captioner(
        tiny_llava(tmp_path / "plain", template=False),
        instruction="USER: <image> the cat ASSISTANT:",
        max_new_tokens=8,
    ).caption(images)
    other = Captioner(str(tmp_path / "chat"), instruction="under the tree", max_new_tokens=8).caption(images)
    assert asked == by_hand != other


def test_the_default_instruction_is_for_chat_models(tmp_path):
    assert Captioner(tiny_llava(tmp_path / "llava")).instruction == INSTRUCTION
    assert Captioner(tiny_blip(tmp_path / "blip")).instruction is None


def test_a_plain_text_is_no_part_of_the_caption(tmp_path, images):
    """BLIP continues it: what its own `generate` gives is the text and the caption."""
    folder = tiny_blip(tmp_path)
    captions = Captioner(folder, instruction="a small", max_new_tokens=8).caption(images)
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    inputs = processor(images=images, text=["a small"] * 5, return_tensors="pt")
    whole = processor.batch_decode(model.generate(**inputs, max_new_tokens=8), skip_special_tokens=True)
    assert [f"a small {caption}" for caption in captions] == whole


@pytest.mark.parametrize(
    ("tokens", "length"),
    [
        pytest.param([[0, 5, 6, 7, 8], [4, 5, 6, 9, 9]], 3, id="the prompt and new tokens"),
        pytest.param([[0, 5, 7, 8, 8], [4, 5, 9, 9, 9]], 2, id="without the prompt's last token"),
        pytest.param([[2, 5, 6, 7, 8], [2, 5, 6, 9, 9]], 0, id="new tokens alone"),
        pytest.param([[0], [4]], 1, id="shorter than the prompt"),
    ],
)
def test_prompt_length(tokens, length):
    prompt = torch.tensor([[0, 5, 6], [4, 5, 6]])  # the first is padded on the left
    assert prompt_length(torch.tensor(tokens), prompt) == length


def test_decoding_is_greedy_whatever_the_model_was_published_with(tmp_path, images, log):
    plain = Captioner(tiny_llava(tmp_path / "plain"), max_new_tokens=8).caption(images)
    sampling = {"do_sample": True, "temperature": 5.0, "top_p": 0.9, "top_k": 20, "max_length": 64}
    folder = tiny_llava(tmp_path / "sampling", **sampling)
    published = json.loads(Path(folder, "generation_config.json").read_text())
    assert sampling.items() <= published.items()
    log.clear()  # of the saving
    captioner = Captioner(folder, max_new_tokens=8)
    assert captioner.caption(images) == captioner.caption(images) == plain
    assert log.messages == []


@pytest.mark.parametrize("kind", ["llava", "llava_next", "blip"])
def test_loading_is_silent(kind, tmp_path, log):
    """No advice to install torchvision, which nothing here needs."""
    folder = MODELS[kind][0](tmp_path)
    log.clear()  # of the saving
    Captioner(folder)
    assert log.messages == []


def test_a_tokenizer_without_a_padding_token(tmp_path, images, log):
    folder = tiny_llava(tmp_path, next_=True)
    expected = Captioner(folder, max_new_tokens=8).caption(images)
    for name, key in (("tokenizer_config.json", "pad_token"), ("generation_config.json", "pad_token_id")):
        path = Path(folder, name)
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != key}))
    log.clear()
    assert Captioner(folder, max_new_tokens=8).caption(images) == expected
    assert log.messages == []


def test_images_of_other_modes(tmp_path, images):
    captioner = Captioner(tiny_llava(tmp_path), max_new_tokens=8)
    for mode in ("RGBA", "L", "LA", "P", "1"):
        image = images[3].convert(mode)
        assert captioner.caption([image]) == captioner.caption([image.convert("RGB")])


def test_no_images_give_no_captions(tmp_path):
    assert Captioner(tiny_llava(tmp_path)).caption([]) == []


@pytest.mark.parametrize(("dtype", "expected"), [("auto", torch.float32), ("bfloat16", torch.bfloat16)])
@pytest.mark.parametrize("kind", MODELS)
def test_dtype_on_a_cpu(kind, dtype, expected, tmp_path, images):
    build, instruction = MODELS[kind]
    captioner = Captioner(build(tmp_path), instruction=instruction, max_new_tokens=3, dtype=dtype, device="cpu")
    assert captioner.model.dtype == expected
    assert len(captioner.caption(images)) == 5


def test_the_model_is_in_eval_mode(tmp_path):
    assert not Captioner(tiny_llava(tmp_path)).model.training


def test_a_model_that_does_not_exist(tmp_path):
    with pytest.raises(
        ValueError, match=r"`model` '.*nowhere' can't be loaded as a captioner.*Give the folder or the"
    ):
        Captioner(str(tmp_path / "nowhere"))


def test_a_model_without_images(tmp_path):
    """Its tokenizer is all the processor it has."""
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    CLIPTextModel(tiny_text_encoder(tokenizer).config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"can't be loaded as a captioner: It has no processor of images and text"):
        Captioner(str(tmp_path))


def test_a_model_that_writes_nothing(tmp_path):
    """The processor of a captioner beside the weights of something else."""
    tiny_blip(tmp_path)
    CLIPTextModel(tiny_text_encoder(tiny_tokenizer()).config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"can't be loaded as a captioner: Unrecognized configuration class"):
        Captioner(str(tmp_path))


def test_a_model_that_needs_an_instruction(tmp_path, images):
    captioner = Captioner(tiny_llava(tmp_path, template=False))
    with pytest.raises(ValueError, match=r"has no chat template and does not caption an image alone.*`instruction`"):
        captioner.caption(images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "`max_new_tokens` is 0; a caption needs at least 1"),
        ({"dtype": "int8"}, "`dtype` must be one of .*; got 'int8'"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        Captioner("nowhere", **options)
