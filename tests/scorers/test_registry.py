import subprocess
import sys
from importlib.metadata import EntryPoint

import numpy as np
import pytest

from trl_diffusion_rank import scorers


class Constant:
    """A scorer as another package would bring it."""

    name = "constant"

    def __init__(self, value=0.0):
        self.value = value

    def score(self, images, prompts):
        return np.full(len(images), self.value)


@pytest.fixture
def installed(monkeypatch):
    """`Constant` as an entry point."""
    module = sys.modules.setdefault("constant_scorer", sys.modules[__name__])
    point = EntryPoint("constant", f"{module.__name__}:Constant", scorers.ENTRY_POINT_GROUP)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(scorers, "entry_points", lambda group: [point] if group == point.group else [])


def test_a_scorer_of_another_package(installed):
    scorer = scorers.load_scorer("constant", value=3.0)
    assert scorer.score([None, None], ["a", "b"]).tolist() == [3.0, 3.0]
    assert set(scorers.known_scorers()) == {"constant", *scorers.SCORERS}


def test_unknown_scorer():
    with pytest.raises(
        ValueError, match=r"'pick_score' is not known. Did you mean 'pickscore'.*Known: clip, digits_clean"
    ):
        scorers.load_scorer("pick_score")


def test_names_are_those_of_the_classes():
    from importlib import import_module

    for name, path in scorers.SCORERS.items():
        module, _, attribute = path.partition(":")
        assert getattr(import_module(module), attribute).name == name


def test_the_registry_imports_no_library():
    code = (
        "import sys, trl_diffusion_rank.scorers; sys.exit(bool({'torch', 'numpy', 'transformers'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
