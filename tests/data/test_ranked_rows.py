import io
import json
import logging

import numpy as np
import pytest
from datasets import Dataset, Features, Image, List, Value, load_dataset
from scipy.stats import rankdata
from tiny import random_image, ranked_dataset

from trl_diffusion_rank.data.ranked_rows import IMAGES, BadRowError, check_rows, dense_ranks, read_row, to_ranked


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    random_image(np.random.default_rng(seed)).save(buffer, "PNG")
    return buffer.getvalue()


def row(**columns) -> dict:
    return {"prompt": "a cat", IMAGES: [b"0", b"1", b"2"], **columns}


def test_ranks_from_ranks_scores_and_order():
    assert read_row(row(ranks=[3, 1, 3]), "row").ranks == [2, 1, 2]  # dense, ties equal
    assert read_row(row(scores=[0.1, 0.9, 0.1]), "row").ranks == [2, 1, 2]
    assert read_row(row(), "row").ranks == [1, 2, 3]
    assert read_row({"prompt": "a", "chosen": b"0", "rejected": b"1"}, "row").ranks == [1, 2]


def test_dense_ranks_agree_with_scipy():
    values = np.random.default_rng(0).integers(0, 5, 20).astype(float)
    assert dense_ranks(values.tolist()) == rankdata(-values, method="dense").tolist()
    assert dense_ranks([5.0, 7.0, 5.0, 1.0]) == [2, 1, 2, 3]


def test_psi_is_kept_and_checked():
    assert read_row(row(ranks=[1, 2, 3], psi=[1.0, 0.5, 0.0]), "row").psi == [1.0, 0.5, 0.0]
    with pytest.raises(BadRowError, match="row: 2 `psi` for 3 images"):
        read_row(row(psi=[1.0, 0.5]), "row")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({IMAGES: [b"0"]}, "Row 7: a ranking needs at least two images, got 1"),
        ({IMAGES: None}, "Row 7: a ranking needs at least two images, got 0"),
        ({"ranks": [1, 2]}, "Row 7: 2 `ranks` for 3 images; there must be one for each"),
        ({"ranks": [1.0, 2.0, 3.0]}, r"Row 7: `ranks` must be integers, 1 for the best, got \[1.0, 2.0, 3.0\]"),
        ({"ranks": ["a", "b", "c"]}, "Row 7: `ranks` must be integers"),
        ({"ranks": [0, 1, 2]}, "Row 7: `ranks` start at 1 for the best"),
        ({"scores": [0.1, float("nan"), 0.3]}, r"Row 7: `scores` must be finite, got \[0.1, nan, 0.3\]"),
        ({"scores": [0.1, None, 0.3]}, "Row 7: `scores` must be numbers"),
        ({"scores": [0.1, 0.2]}, "Row 7: 2 `scores` for 3 images"),
        ({"prompt": None}, "Row 7: `prompt` must be a string, got None"),
    ],
)
def test_bad_row_is_named_with_its_fault(columns, message):
    with pytest.raises(BadRowError, match=message):
        read_row(row(**columns), "Row 7")


def test_bad_rows_of_a_dataset_stop_it_or_are_counted(caplog):
    data = ranked_dataset((2, 3, 2))
    ranks = [data[0]["ranks"], [1, 2], data[2]["ranks"]]
    data = to_ranked(data.remove_columns("ranks").add_column("ranks", ranks), "train")
    with pytest.raises(BadRowError, match="Row 1 of the train dataset: 2 `ranks` for 3 images"):
        check_rows(data, "train")
    with caplog.at_level(logging.WARNING):
        assert check_rows(data, "train", skip=True) == [0, 2]
    assert "Skipped 1 bad rows of the train dataset" in caplog.text


def test_rows_of_ties_are_dropped_and_only_ties_are_refused(caplog):
    data = ranked_dataset((2, 2, 3)).remove_columns("ranks")
    some = to_ranked(data.add_column("scores", [[1.0, 1.0], [0.0, 1.0], [2.0, 2.0, 2.0]]), "train")
    with caplog.at_level(logging.WARNING):
        assert check_rows(some, "train") == [1]
    assert "Dropped 2 rows of the train dataset in which all images tie" in caplog.text
    every = to_ranked(data.add_column("ranks", [[1, 1], [2, 2], [1, 1, 1]]), "train")
    with pytest.raises(
        ValueError, match="nothing to learn from the train dataset: of 3 rows, in 3 all images are tied"
    ):
        check_rows(every, "train")


def test_images_stay_undecoded_and_columns_lose_the_name_that_trl_looks_for():
    data = ranked_dataset((2, 3)).add_column("note", ["x", "y"])
    ranked = to_ranked(data, "train")
    assert set(ranked.column_names) == {"prompt", IMAGES, "ranks"}
    assert isinstance(ranked[0][IMAGES][0]["bytes"], bytes)
    assert to_ranked(ranked, "train")[1] == ranked[1]
    assert data[0]["images"][0].size == (16, 16)  # the user's dataset is as it was
    stream = to_ranked(data.to_iterable_dataset(), "train")
    assert next(iter(stream))[IMAGES][0]["bytes"] == ranked[0][IMAGES][0]["bytes"]


def test_unknown_columns_are_refused_with_the_accepted_formats():
    with pytest.raises(
        ValueError, match=r"train dataset has the columns \['question', 'text'\].*`prompt` and `images`"
    ):
        to_ranked(Dataset.from_dict({"text": ["a"], "question": ["b"]}), "train")


# Pick-a-Pic


def pickapic(pairs: list[tuple], with_uids: bool = True, as_images: bool = False) -> Dataset:
    """Rows in the schema of pickapic_v2 from (caption, image 0, image 1, label_0[, has_label])."""
    rows = [
        {
            "caption": caption,
            "jpg_0": png(first),
            "jpg_1": png(second),
            "label_0": label,
            "has_label": rest[0] if rest else True,
            **({"image_0_uid": str(first), "image_1_uid": str(second)} if with_uids else {}),
        }
        for caption, first, second, label, *rest in pairs
    ]
    data = Dataset.from_list(rows)
    return data.cast_column("jpg_0", Image()).cast_column("jpg_1", Image()) if as_images else data


PAIRS = [
    ("cat", 1, 2, 1.0),
    ("dog", 7, 8, 0.0),
    ("cat", 2, 3, 0.5),
    ("cat", 1, 3, 1.0),
    ("cat", 4, 1, 0.0),
    ("sun", 5, 6, 1.0, False),
]


@pytest.mark.parametrize("with_uids", [True, False])
@pytest.mark.parametrize("as_images", [True, False])
def test_pickapic_pairs_of_a_caption_become_one_list(with_uids, as_images):
    """cat: 1 won 3 of 3; 2 half of 2 (lost, tied); 3 half of 2; 4 lost its one. sun has no label."""
    ranked = to_ranked(pickapic(PAIRS, with_uids, as_images), "train")
    rows = {example["prompt"]: example for example in ranked}
    assert set(rows) == {"cat", "dog"}
    assert rows["cat"]["ranks"] == [1, 2, 2, 3]
    assert rows["cat"]["psi"] == pytest.approx([1.0, 0.25, 0.25, 0.0])
    assert [image["bytes"] for image in rows["cat"][IMAGES]] == [png(seed) for seed in (1, 2, 3, 4)]
    assert rows["dog"]["ranks"] == [2, 1]


def test_pickapic_contradictions_are_counted(caplog):
    pairs = [("cat", 1, 2, 1.0), ("cat", 2, 1, 1.0), ("cat", 1, 3, 1.0), ("cat", 1, 3, 1.0)]
    with caplog.at_level(logging.INFO):
        ranked = to_ranked(pickapic(pairs), "train")
    assert "1 pairs of the train dataset have votes for both sides" in caplog.text
    assert "train dataset into ranked lists: 4 pairs of 1 captions; 0 votes are ties, 1 pairs have" in caplog.text
    assert ranked[0]["psi"] == pytest.approx([0.75, 0.5, 0.0])


def test_pickapic_bad_label_is_named():
    with pytest.raises(BadRowError, match=r"Row 1 of the train dataset: `label_0` must be 0, 0.5 or 1, got 0.7"):
        to_ranked(pickapic([("cat", 1, 2, 1.0), ("cat", 1, 2, 0.7)]), "train")


def test_pickapic_stream_keeps_pairs():
    rows = list(to_ranked(pickapic(PAIRS[:3]).to_iterable_dataset(), "train"))
    assert [read_row(example, "row").ranks for example in rows] == [[1, 2], [2, 1], [1, 1]]


# A folder of images


def test_folder_with_one_image_a_line(tmp_path):
    lines = []
    for index, (prompt, score) in enumerate([("cat", 0.2), ("dog", 1.0), ("cat", 0.9), ("dog", 3.0), ("cat", 0.5)]):
        (tmp_path / f"{index}.png").write_bytes(png(index))
        lines.append({"file_name": f"{index}.png", "prompt": prompt, "score": score})
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    ranked = to_ranked(load_dataset(str(tmp_path), split="train"), "train")
    rows = {example["prompt"]: example["ranks"] for example in ranked}
    assert rows == {"cat": [3, 1, 2], "dog": [2, 1]}


def test_folder_with_one_list_a_line(tmp_path):
    for index in range(4):
        (tmp_path / f"{index}.png").write_bytes(png(index))
    lines = [
        {"images_file_names": ["0.png", "1.png"], "prompt": "cat", "ranks": [2, 1]},
        {"images_file_names": ["2.png", "3.png"], "prompt": "dog", "ranks": [1, 2]},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    ranked = to_ranked(load_dataset(str(tmp_path), split="train"), "train")
    assert check_rows(ranked, "train") == [0, 1]
    assert ranked[0]["ranks"] == [2, 1]


def test_preference_format_of_trl():
    rows = [{"prompt": "cat", "chosen": random_image(np.random.default_rng(0)), "rejected": png(1)}]
    features = Features({"prompt": Value("string"), "chosen": Image(), "rejected": Image()})
    ranked = to_ranked(
        Dataset.from_list([{**rows[0], "rejected": {"bytes": png(1), "path": None}}], features), "train"
    )
    assert check_rows(ranked, "train") == [0]
    checked = read_row(ranked[0], "row")
    assert checked.ranks == [1, 2]
    assert checked.images[1]["bytes"] == png(1)


def test_lists_of_plain_bytes_are_images_too():
    data = Dataset.from_list(
        [{"prompt": "cat", "images": [png(0), png(1)]}],
        features=Features({"prompt": Value("string"), "images": List(Value("binary"))}),
    )
    assert read_row(to_ranked(data, "train")[0], "row").images == [png(0), png(1)]
