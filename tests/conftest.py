import pytest
import torch
from tiny import tiny_sdxl_pipeline

from trl_diffusion_rank.digits.classifiers import DigitsClassifier, DigitsJudge, fit_clean_classifier


torch.set_num_threads(1)  # the models are so small that threads cost more than they bring


@pytest.fixture(scope="session", autouse=True)
def cache_in_tmp(tmp_path_factory):
    """Encoded tables of tests stay out of the user's cache."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="session")
def judge() -> DigitsJudge:
    """Fitted once for all tests: it takes seconds."""
    return DigitsJudge.fit()


@pytest.fixture(scope="session")
def scorer() -> DigitsClassifier:
    return fit_clean_classifier()


@pytest.fixture(scope="session")
def sdxl_folder(tmp_path_factory) -> str:
    """A saved tiny SDXL pipeline, to be loaded by name like one from the Hub."""
    folder = tmp_path_factory.mktemp("tiny-sdxl")
    tiny_sdxl_pipeline().save_pretrained(folder)
    return str(folder)
