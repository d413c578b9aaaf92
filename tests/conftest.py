import pytest
import torch
from datasets import Dataset
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from tiny import ranked_dataset, tiny_sd_pipeline, tiny_sdxl_pipeline


torch.set_num_threads(1)  # the models are so small that threads cost more than they bring


@pytest.fixture(scope="session", autouse=True)
def cache_in_tmp(tmp_path_factory):
    """Encoded tables of tests stay out of the user's cache."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture
def sd_pipeline() -> StableDiffusionPipeline:
    return tiny_sd_pipeline()


@pytest.fixture
def sdxl_pipeline() -> StableDiffusionXLPipeline:
    return tiny_sdxl_pipeline()


@pytest.fixture(scope="session")
def sdxl_folder(tmp_path_factory) -> str:
    """A saved tiny SDXL pipeline, to be loaded by name like one from the Hub."""
    folder = tmp_path_factory.mktemp("tiny-sdxl")
    tiny_sdxl_pipeline().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def dataset() -> Dataset:
    return ranked_dataset()
