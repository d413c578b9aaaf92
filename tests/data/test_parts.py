import pytest
from datasets import Features, Image, Value

from trl_diffusion_rank.data.parts import Parts


FEATURES = Features({"source": Value("string"), "row": Value("int64"), "image": Image(), "status": Value("string")})


def make_parts(folder) -> Parts:
    return Parts(folder, ("source", "row"), FEATURES)


def columns(source: str, rows: list[int]) -> dict[str, list]:
    return {
        "source": [source] * len(rows),
        "row": rows,
        "image": [{"bytes": f"{source}{row}".encode(), "path": None} for row in rows],
        "status": ["ok"] * len(rows),
    }


def test_results_are_found_again_by_their_keys(tmp_path):
    writer = make_parts(tmp_path / "new")
    assert writer.scan() == set()
    writer.write(columns("a", [3, 1]))
    writer.write(columns("b", [1]))

    reader = make_parts(tmp_path / "new")
    assert reader.scan() == {("a", 3), ("a", 1), ("b", 1)}
    rows = reader.read([("b", 1), ("a", 1), ("a", 3)])
    assert [row["image"]["bytes"] for row in rows] == [b"b1", b"a1", b"a3"]
    assert reader.read([("a", 3)], columns=["status"]) == [{"status": "ok"}]


def test_the_same_results_written_twice_count_once(tmp_path):
    parts = make_parts(tmp_path)
    parts.write(columns("a", [1, 2]))
    parts.write(columns("a", [1, 2]))
    parts.write(columns("a", [2, 3]))
    assert len(list(tmp_path.iterdir())) == 2
    assert parts.scan() == {("a", 1), ("a", 2), ("a", 3)}


def test_an_interrupted_write_leaves_nothing_that_is_read(tmp_path, monkeypatch):
    parts = make_parts(tmp_path)
    parts.write(columns("a", [1]))

    def die(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("pyarrow.parquet.write_table", die)
    with pytest.raises(KeyboardInterrupt):
        parts.write(columns("a", [2]))
    assert make_parts(tmp_path).scan() == {("a", 1)}


def test_a_broken_file_is_removed_and_its_results_are_missing(tmp_path, caplog):
    parts = make_parts(tmp_path)
    parts.write(columns("a", [1]))
    parts.write(columns("a", [2]))
    broken = sorted(tmp_path.iterdir())[0]
    broken.write_bytes(broken.read_bytes()[:-20])
    assert len(parts.scan()) == 1
    assert "made again" in caplog.text
    assert len(list(tmp_path.iterdir())) == 1


def test_a_result_that_is_not_there_is_an_error(tmp_path):
    parts = make_parts(tmp_path)
    parts.scan()
    with pytest.raises(KeyError):
        parts.read([("a", 1)])
