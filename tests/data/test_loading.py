import io

import pytest
from datasets import Dataset
from PIL import Image

from trl_diffusion_rank.data.loading import load_rows, stream_columns


def rows() -> Dataset:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    return Dataset.from_dict({"caption": [f"p{i}" for i in range(5)], "jpg_0": [buffer.getvalue()] * 5})


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_of_parquet_only_the_columns_are_read(tmp_path, kind, monkeypatch):
    rows().to_parquet(tmp_path / "data" / "train.parquet")
    name = str(tmp_path / "data" / "train.parquet") if kind == "file" else str(tmp_path)
    stream = load_rows(name, "train", streaming=True)
    monkeypatch.setattr("datasets.IterableDataset.select_columns", None)  # not the slow way
    narrow = stream_columns(stream, name, "train", None, ["caption"])
    assert list(narrow) == [{"caption": f"p{i}"} for i in range(5)]
    assert list(narrow.features) == ["caption"]


def test_of_other_files_the_columns_are_selected(tmp_path):
    rows().remove_columns("jpg_0").add_column("n", list(range(5))).to_json(tmp_path / "rows.jsonl")
    name = str(tmp_path / "rows.jsonl")
    stream = load_rows(name, "train", streaming=True)
    assert list(stream_columns(stream, name, "train", None, ["n"])) == [{"n": i} for i in range(5)]
