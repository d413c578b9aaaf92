"""What the stages read, as the stages before would leave it."""

import pytest
from tiny import tiny_sd_pipeline


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory) -> str:
    """Folder of a pipeline with random weights that draws 16x16 images in milliseconds."""
    folder = tmp_path_factory.mktemp("tiny_pipeline")
    tiny_sd_pipeline().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def black_pipeline(tiny_pipeline, tmp_path) -> str:
    """The same with a VAE that overflows: every image is black."""
    import torch
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline)
    torch.nn.init.constant_(pipe.vae.decoder.conv_out.weight, float("nan"))
    pipe.save_pretrained(tmp_path / "black")
    return str(tmp_path / "black")


@pytest.fixture
def prompts_folder(tmp_path) -> str:
    """What the stage `prompts` leaves: three prompts to train on, two to test."""
    from datasets import Dataset, DatasetDict

    train = Dataset.from_dict({"prompt": ["a cat", "a dog", "a cat"], "row": [0, 1, 2]})
    test = Dataset.from_dict({"prompt": ["a hen", "a cow"], "row": [3, 4]})
    DatasetDict(train=train, test=test).save_to_disk(tmp_path / "prompts")
    return str(tmp_path / "prompts")
