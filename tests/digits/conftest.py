import pytest

from trl_diffusion_rank.digits.classifiers import DigitsClassifier, DigitsJudge, fit_clean_classifier


@pytest.fixture(scope="session")
def judge() -> DigitsJudge:
    return DigitsJudge.fit()


@pytest.fixture(scope="session")
def scorer() -> DigitsClassifier:
    return fit_clean_classifier()
