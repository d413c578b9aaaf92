import inspect
import json
import subprocess
import sys
from importlib import import_module
from importlib.metadata import EntryPoint

import numpy as np
import pytest
from PIL import Image
from tiny_scorers import save_tiny_clip

from trl_diffusion_rank import scorers
from trl_diffusion_rank.scorers import ScorerSpec, load_scorer, read_scorers


class Constant:
    """A scorer as another package would bring it."""

    name = "constant"

    def __init__(self, value=0.0):
        self.value = value

    def score(self, images, prompts):
        return np.full(len(images), self.value)


class NoScorer:
    """What another package might register by mistake."""


@pytest.fixture
def installed(monkeypatch):
    """`Constant` and some mistakes as entry points."""
    monkeypatch.setitem(sys.modules, "constant_scorer", sys.modules[__name__])
    points = [
        EntryPoint("constant", "constant_scorer:Constant", scorers.ENTRY_POINT_GROUP),
        EntryPoint("no_scorer", "constant_scorer:NoScorer", scorers.ENTRY_POINT_GROUP),
        EntryPoint("no_class", "constant_scorer:Constnat", scorers.ENTRY_POINT_GROUP),
        EntryPoint("no_module", "no_such_module_anywhere:Constant", scorers.ENTRY_POINT_GROUP),
    ]
    monkeypatch.setattr(scorers, "entry_points", lambda group: points if group == scorers.ENTRY_POINT_GROUP else [])


def test_a_scorer_of_another_package(installed):
    scorer = load_scorer("constant", value=3.0)
    assert scorer.score([None, None], ["a", "b"]).tolist() == [3.0, 3.0]
    assert {"constant", *scorers.SCORERS} <= set(scorers.known_scorers())


def test_options_that_a_scorer_of_another_package_does_not_take(installed):
    with pytest.raises(ValueError, match=r"'constant' can't be built with .*'valeu'.* It takes value\."):
        load_scorer("constant", valeu=3.0)


def test_entry_points_that_lead_nowhere(installed):
    with pytest.raises(TypeError, match=r"'no_scorer' \(constant_scorer:NoScorer\) is a NoScorer without a method"):
        load_scorer("no_scorer")
    with pytest.raises(ImportError, match=r"'no_class' is registered as 'constant_scorer:Constnat', which can't"):
        load_scorer("no_class")
    with pytest.raises(ImportError, match=r"'no_module' is registered as .* No module named 'no_such_mod"):
        load_scorer("no_module")


def test_unknown_scorer():
    with pytest.raises(
        ValueError, match=r"'pick_score' is not known. Did you mean 'pickscore'.*Known: clip, digits_clean"
    ):
        load_scorer("pick_score")


def test_names_and_options_are_those_of_the_classes():
    assert scorers.OPTIONS.keys() == scorers.SCORERS.keys()
    for name, path in scorers.SCORERS.items():
        module, _, attribute = path.partition(":")
        scorer_class = getattr(import_module(module), attribute)
        assert scorer_class.name == name
        assert tuple(inspect.signature(scorer_class).parameters) == scorers.OPTIONS[name]


def test_the_registry_imports_no_library():
    code = (
        "import sys; from trl_diffusion_rank.scorers import read_scorers; "
        "read_scorers(['clip', {'name': 'laion_aesthetic', 'batch_size': 4}]); "
        "sys.exit(bool({'torch', 'numpy', 'transformers', 'PIL'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_names_and_mappings():
    options = {"model": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "dtype": "bfloat16"}
    entries = ["pickscore", "clip", {"name": "clip", "label": "clip_h", "weight": 2, **options}]
    expected = [
        ScorerSpec("pickscore", "pickscore"),
        ScorerSpec("clip", "clip", 1.0, {}),
        ScorerSpec("clip", "clip_h", 2.0, options),
    ]
    assert read_scorers(entries) == expected
    # what was given stays as it was
    assert entries[2]["label"] == "clip_h"
    # a recipe's mappings become JSON on a command line
    assert (
        read_scorers([entry if isinstance(entry, str) else f" {json.dumps(entry)}" for entry in entries]) == expected
    )


def test_a_spec_loads_its_scorer(installed, tmp_path):
    scorer = read_scorers([{"name": "constant", "value": 3.0, "weight": 0.5}])[0].load()
    assert isinstance(scorer, Constant) and scorer.value == 3.0
    clip = read_scorers([{"name": "clip", "model": save_tiny_clip(tmp_path), "batch_size": 3}])[0].load()
    assert clip.batch_size == 3 and np.isfinite(clip.score([Image.new("RGB", (8, 8))], ["a"])).all()


@pytest.mark.parametrize("entries", [None, [], "clip", {"name": "clip"}])
def test_a_list_is_expected(entries):
    with pytest.raises(ValueError, match=r"`scorers` is .*; give a list of at least one, for example"):
        read_scorers(entries)


@pytest.mark.parametrize("entry", [3, {"model": "x"}, {"name": ["clip"]}, ["clip"], '{"label": "x"}'])
def test_an_entry_without_a_name(entry):
    with pytest.raises(ValueError, match=r"An entry of `scorers` is .*; it must be a name or a mapping with"):
        read_scorers([entry])


def test_json_that_is_none():
    with pytest.raises(ValueError, match=r"An entry of `scorers` starts as JSON and is none: \{name: clip\}"):
        read_scorers(["{name: clip}"])


@pytest.mark.parametrize("entry", ["clp", {"name": "clp"}, '{"name": "clp"}'])
def test_an_unknown_name(entry):
    with pytest.raises(ValueError, match=r"'clp' is not known. Did you mean 'clip'"):
        read_scorers(["pickscore", entry])


def test_an_unknown_option():
    with pytest.raises(ValueError, match=r"'clip' has no option 'modle'. Did you mean 'model'\? It takes batch"):
        read_scorers([{"name": "clip", "modle": "x"}])
    with pytest.raises(ValueError, match=r"'digits_clean' has no option 'wieght'. Did you mean 'weight'\?"):
        read_scorers([{"name": "digits_clean", "wieght": 2}])


def test_two_entries_of_one_label():
    with pytest.raises(ValueError, match=r"Several entries of `scorers` are called 'clip'.*\{name: clip, label: "):
        read_scorers(["clip", {"name": "clip", "model": "other"}])
    with pytest.raises(ValueError, match="Several entries of `scorers` are called 'pickscore'"):
        read_scorers(["pickscore", {"name": "clip", "label": "pickscore"}])


@pytest.mark.parametrize("label", ["", "clip h", 3, None])
def test_a_label_that_names_no_column(label):
    with pytest.raises(ValueError, match=r"`label` of the scorer 'clip' is .*; a word of letters, digits"):
        read_scorers([{"name": "clip", "label": label}])


@pytest.mark.parametrize("weight", [0, -1.5, "2", None, True, float("nan"), float("inf")])
def test_a_weight_that_is_none(weight):
    with pytest.raises(ValueError, match=r"`weight` of the scorer 'clip_h' is .*; a finite number above 0"):
        read_scorers([{"name": "clip", "label": "clip_h", "weight": weight}])
