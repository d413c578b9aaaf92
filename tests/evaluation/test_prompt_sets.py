"""Prompts by whatever name; PartiPrompts, HPDv2's benchmark and Pick-a-Pic are laid out as they are on the Hub."""

import json

import datasets
import pytest
from datasets import Dataset, DatasetDict

from trl_diffusion_rank.data import loading
from trl_diffusion_rank.evaluation.prompt_sets import read_prompt_set


PARTI = {"Prompt": ["bond", "a cat", "a dog"], "Category": ["Abstract", "Animals", "Animals"], "Note": ["", "", ""]}


def test_a_stages_folder(tmp_path):
    splits = {"train": {"prompt": ["a"], "row": [0]}, "test": {"prompt": ["b", "c"], "row": [7, 9]}}
    DatasetDict({name: Dataset.from_dict(rows) for name, rows in splits.items()}).save_to_disk(tmp_path / "prompts")
    found = read_prompt_set(str(tmp_path / "prompts"))
    assert found == (["b", "c"], [7, 9], [None, None])
    assert read_prompt_set(str(tmp_path / "prompts"), split="train").prompts == ["a"]
    assert read_prompt_set(str(tmp_path / "prompts"), num_prompts=1).rows == [7]
    with pytest.raises(ValueError, match=r"`num_prompts` is 3 and the split 'test' of .* has 2 prompts"):
        read_prompt_set(str(tmp_path / "prompts"), num_prompts=3)
    with pytest.raises(ValueError, match=r"`dataset_split` is 'validation'; .* has the splits train, test"):
        read_prompt_set(str(tmp_path / "prompts"), split="validation")


def test_parti_prompts(tmp_path):
    """One split, called `train`; its columns begin with capitals."""
    Dataset.from_dict(PARTI).to_parquet(tmp_path / "parti.parquet")
    found = read_prompt_set(str(tmp_path / "parti.parquet"))
    assert found.prompts == PARTI["Prompt"] and found.categories == PARTI["Category"] and found.rows == [0, 1, 2]


def test_hpdv2_benchmark(tmp_path):
    """A JSON file that holds a list of texts, one for each style."""
    (tmp_path / "anime.json").write_text(json.dumps(["a girl, 1990s", 'a "boy"', "é"]))
    found = read_prompt_set(str(tmp_path / "anime.json"))
    assert found == (["a girl, 1990s", 'a "boy"', "é"], [0, 1, 2], [None] * 3)


def test_text_and_csv_files(tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    assert read_prompt_set(str(tmp_path / "prompts.txt")).prompts == ["a cat", "a dog"]
    (tmp_path / "prompts.csv").write_text("question,kind\nwhat?,1\nwho?,\n")
    found = read_prompt_set(str(tmp_path / "prompts.csv"), column="question", category="kind")
    assert found.prompts == ["what?", "who?"] and found.categories == ["1.0", None]
    with pytest.raises(ValueError, match=r"none of the columns prompt, Prompt, caption, text: .*: question, kind"):
        read_prompt_set(str(tmp_path / "prompts.csv"))
    with pytest.raises(ValueError, match=r"`category_column` is 'sort', .*its columns are question, kind"):
        read_prompt_set(str(tmp_path / "prompts.csv"), column="question", category="sort")


def test_of_a_hub_dataset_the_texts_alone_are_streamed(tmp_path, monkeypatch):
    """Pick-a-Pic: two images of each row, which would be downloaded for nothing; and `test` is one of its splits."""
    for split, captions in (("train", ["t"] * 2), ("test", ["a cat", "a dog", "a cat"])):
        rows = {"caption": captions, "jpg_0": [b"x" * 1000] * len(captions), "ranking_id": list(range(len(captions)))}
        Dataset.from_dict(rows).to_parquet(tmp_path / "hub" / "data" / f"{split}.parquet")
    asked = []

    def load_dataset(path, *args, **kwargs):
        asked.append((kwargs.get("streaming"), kwargs.get("columns")))
        assert path == "someone/pickapic"
        return datasets.load_dataset(str(tmp_path / "hub"), *args, **kwargs)

    monkeypatch.setattr(loading, "load_dataset", load_dataset)
    found = read_prompt_set("someone/pickapic", num_prompts=3)
    assert found == (["a cat", "a dog", "a cat"], [0, 1, 2], [None] * 3)
    assert asked == [(True, None), (True, ["caption"])]


@pytest.mark.parametrize("empty", ["", "  \n", None])
def test_empty_prompts_are_refused_by_their_row(tmp_path, empty):
    Dataset.from_dict({"prompt": ["a", empty, "b", empty]}).to_parquet(tmp_path / "prompts.parquet")
    with pytest.raises(ValueError, match=r"Row 1 of the split 'train' .* no text in the column 'prompt' \(2 such"):
        read_prompt_set(str(tmp_path / "prompts.parquet"))


@pytest.mark.parametrize(("rows", "wrong"), [([3, 3], "3 twice"), (["a", "b"], "'a'"), ([1, None], "None")])
def test_rows_must_be_numbers_of_their_own(tmp_path, rows, wrong):
    Dataset.from_dict({"prompt": ["a", "b"], "row": rows}).to_parquet(tmp_path / "prompts.parquet")
    with pytest.raises(ValueError, match=f"The column 'row' of .* holds {wrong}"):
        read_prompt_set(str(tmp_path / "prompts.parquet"))


def test_what_is_not_there(monkeypatch):
    def refuse(*args, **kwargs):
        raise FileNotFoundError("no such dataset")

    monkeypatch.setattr(loading, "load_dataset", refuse)
    with pytest.raises(ValueError, match="`dataset_name` is 'no/such', which is neither a file or folder"):
        read_prompt_set("no/such")
