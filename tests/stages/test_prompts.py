import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, Features, Image, List, Value
from PIL import Image as PILImage
from tiny import random_image

from trl_diffusion_rank.data import download
from trl_diffusion_rank.data.images import decode_image
from trl_diffusion_rank.data.loading import load_splits, undecoded
from trl_diffusion_rank.data.parts import Parts
from trl_diffusion_rank.data.prompts import Candidate, split_order, split_prompts
from trl_diffusion_rank.data.ranked_rows import check_rows, to_ranked
from trl_diffusion_rank.digits import digits_model_path
from trl_diffusion_rank.digits.data import parse_caption
from trl_diffusion_rank.stages.prompts import IMAGES_PER_PART, PromptsArguments, main


ANIMALS = [f"an animal of kind {i}" for i in range(20)]


def run(tmp_path: Path, **options) -> DatasetDict:
    """The stage's dataset, its images as their bytes."""
    main(PromptsArguments(**({"output_dir": str(tmp_path / "out"), "num_test_prompts": 5} | options)))
    return DatasetDict({name: undecoded(split) for name, split in load_splits(str(tmp_path / "out")).items()})


def all_rows(splits: DatasetDict) -> list[dict]:
    return [row for split in splits.values() for row in split]


def card(tmp_path: Path) -> str:
    return (tmp_path / "out" / "README.md").read_text()


def split(prompts: list[str], *args, **kwargs) -> tuple[list[str], list[str]]:
    of = split_prompts([Candidate(index, prompt, prompt, {}) for index, prompt in enumerate(prompts)], *args, **kwargs)
    return tuple([candidate.prompt for candidate in part] for part in of)


def write(tmp_path: Path, ending: str, prompts: list[str]) -> str:
    path = tmp_path / f"prompts{ending}"
    data = Dataset.from_dict({"caption": prompts, "number": list(range(len(prompts)))})
    if ending == ".txt":
        path.write_text("\n".join(prompts) + "\n")
    elif ending == ".json":
        path.write_text(json.dumps(data.to_list()))
    elif ending == "":
        data.save_to_disk(path)
    else:
        {".parquet": data.to_parquet, ".csv": data.to_csv, ".jsonl": data.to_json}[ending](path)
    return str(path)


def encoded(seed: int, format: str = "JPEG", size: tuple[int, int] = (16, 16)) -> bytes:
    buffer = io.BytesIO()
    random_image(np.random.default_rng(seed), size).save(buffer, format)
    return buffer.getvalue()


# Captions


@pytest.mark.parametrize("ending", [".txt", ".json", ".jsonl", ".csv", ".parquet", ""])
def test_every_kind_of_file_gives_the_same_splits(ending, tmp_path):
    splits = run(tmp_path, dataset_name=write(tmp_path, ending, ANIMALS), prompt_column="caption")
    train, test = split(ANIMALS, None, 5, seed=0)
    assert list(splits["train"]["prompt"]) == train and len(train) == 15
    assert list(splits["test"]["prompt"]) == test
    assert [*splits["train"]["row"], *splits["test"]["row"]] == list(range(20))
    assert splits["train"].column_names == ["prompt", "row"]


@pytest.mark.parametrize("ending", [".txt", ".json", ".jsonl", ".csv", ".parquet", ""])
def test_streaming_reads_only_what_is_needed(ending, tmp_path):
    path = write(tmp_path, ending, ANIMALS)
    splits = run(tmp_path, dataset_name=path, prompt_column="caption", num_prompts=6, streaming=True)
    train, test = split(ANIMALS[:11], 6, 5, seed=0)
    assert list(splits["train"]["prompt"]) == train
    assert list(splits["test"]["prompt"]) == test


def test_the_known_columns_are_found_in_their_order(tmp_path):
    data = Dataset.from_dict({"text": ["x"], "caption": ["y"], "prompt": ["z"]})
    for column in ("prompt", "caption", "text"):
        data.to_parquet(tmp_path / f"{column}.parquet")
        options = {"dataset_name": str(tmp_path / f"{column}.parquet"), "num_test_prompts": 0}
        assert all_rows(run(tmp_path / column, **options))[0]["prompt"] == data[0][column]
        data = data.remove_columns(column)


def test_empty_and_repeated_prompts_are_left_out_and_counted(tmp_path, capsys):
    path = write(tmp_path, ".jsonl", [*ANIMALS, "  ", "", None, f"  {ANIMALS[3]} ", ANIMALS[4]])
    splits = run(tmp_path, dataset_name=path, prompt_column="caption")
    assert len(splits["train"]) + len(splits["test"]) == 20
    assert "Left out: 3 empty, 2 repeated." in capsys.readouterr().out
    assert "## Left out\n\nLeft out: 3 empty, 2 repeated." in card(tmp_path)


def test_no_test_split_on_request(tmp_path):
    splits = run(tmp_path, dataset_name=write(tmp_path, ".txt", ANIMALS), num_test_prompts=0)
    assert list(splits) == ["train"]


def test_the_prompts_of_another_run_of_the_stage(tmp_path):
    run(tmp_path, dataset_name=write(tmp_path, ".txt", ANIMALS))
    splits = run(tmp_path / "again", dataset_name=str(tmp_path / "out"), dataset_split="test", num_test_prompts=2)
    assert {row["prompt"] for row in all_rows(splits)} == set(split(ANIMALS, None, 5, seed=0)[1])


@pytest.mark.parametrize(("ending", "streaming"), [(".parquet", False), (".parquet", True), (".csv", True)])
def test_columns_are_kept_with_what_is_missing_in_them(ending, streaming, tmp_path):
    """A stream of csv doesn't know its types; the only value of `note` is the last."""
    notes = [None] * 150 + ["rare"]
    data = Dataset.from_dict(
        {"caption": [f"cat {i}" for i in range(151)], "note": notes, "number": [*range(150), None]}
    )
    path = tmp_path / f"data{ending}"
    (data.to_csv if ending == ".csv" else data.to_parquet)(path)
    options = {"keep_columns": ["note", "number"], "num_prompts": 146, "streaming": streaming}
    splits = run(tmp_path, dataset_name=str(path), **options)
    rows = {row["prompt"]: (row["note"], row["number"]) for row in all_rows(splits)}
    assert rows == {row["caption"]: (row["note"], row["number"]) for row in data}
    assert splits["train"].column_names == ["prompt", "row", "note", "number"]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_finished_artefact_is_left_alone_until_something_changes(streaming, tmp_path, capsys):
    path = Path(write(tmp_path, ".jsonl", ANIMALS))
    options = {"dataset_name": str(path), "num_prompts": 6, "streaming": streaming}
    first = all_rows(run(tmp_path, **options))
    card_path = tmp_path / "out" / "README.md"
    card_path.write_text("mine")
    capsys.readouterr()
    assert all_rows(run(tmp_path, **options, download_workers=2)) == first
    assert card_path.read_text() == "mine" and "are finished" in capsys.readouterr().out

    options["num_prompts"] = 7
    assert len(run(tmp_path, **options)["train"]) == 7
    assert card_path.read_text() != "mine"
    path.write_text("".join(json.dumps({"caption": f"a plant {i}"}) + "\n" for i in range(20)))
    os.utime(path, (1, 1))
    assert all("plant" in row["prompt"] for row in all_rows(run(tmp_path, **options)))


def test_digits(tmp_path, capsys):
    """400 and 240 draws from 150 captions: rows, not captions, tell images apart."""
    options = {"dataset_name": "digits", "num_prompts": 400, "num_test_prompts": 240}
    splits = run(tmp_path, **options)
    assert {name: len(split) for name, split in splits.items()} == {"train": 400, "test": 240}
    for prompt in splits["test"]["prompt"]:
        parse_caption(prompt)
    rows = [*splits["train"]["row"], *splits["test"]["row"]]
    assert len(set(rows)) == 640
    again = run(tmp_path / "again", **options)
    assert list(again["train"]["prompt"]) == list(splits["train"]["prompt"])
    assert list(again["test"]["prompt"]) == list(splits["test"]["prompt"]) != list(splits["train"]["prompt"])[:240]
    capsys.readouterr()
    run(tmp_path, **options)
    assert "are finished" in capsys.readouterr().out
    assert list(run(tmp_path / "none", **options | {"num_test_prompts": 0})) == ["train"]


@pytest.mark.slow
def test_digits_with_clean_scans(tmp_path, judge):
    rows = run(tmp_path, dataset_name="digits", num_prompts=40, num_test_prompts=10, keep_images=True)["train"]
    wanted = run(tmp_path / "plain", dataset_name="digits", num_prompts=40, num_test_prompts=10)["train"]
    assert list(rows["prompt"]) == list(wanted["prompt"])
    assert judge.judge([*map(decode_image, rows["image"])], list(rows["prompt"]))["good"].mean() > 0.95
    again = run(tmp_path / "again", dataset_name="digits", num_prompts=40, num_test_prompts=10, keep_images=True)
    assert list(again["train"]["image"]) == list(rows["image"])


# What the text encoder reads

LONG = [f"a red five and a blue {word} on paper with a brown dog beside a green house" for word in ("six", "nine")]


def test_prompts_are_cut_to_what_the_text_encoder_reads(tmp_path, capsys):
    path = write(tmp_path, ".jsonl", ["a red five", *LONG, f"{LONG[0]} again", "x" * 500])
    splits = run(tmp_path, dataset_name=path, tokenizer="digits", num_test_prompts=0)
    assert set(splits["train"]["prompt"]) == {
        "a red five",
        "a red five and a blue six on",
        "a red five and a blue nine on",
    }
    said = "2 prompts were cut to what the text encoder of `digits` reads."
    out = capsys.readouterr().out
    assert said in out and said in card(tmp_path)
    assert "Left out: 1 repeated, 1 too long." in out


def test_the_card_names_only_the_last_part_of_local_paths(tmp_path):
    (tmp_path / "mine").mkdir()
    path, tokenizer = write(tmp_path / "mine", ".jsonl", ["a red five", *LONG]), tmp_path / "models" / "sdxl"
    shutil.copytree(Path(digits_model_path(), "tokenizer"), tokenizer)
    run(tmp_path, dataset_name=path, tokenizer=str(tokenizer), num_test_prompts=0)
    text = card(tmp_path)
    assert "Prompts from `prompts.jsonl`," in text and "the text encoder of `sdxl` reads" in text
    assert str(tmp_path) not in text


def test_prompts_that_are_too_long_are_left_out_on_request(tmp_path, capsys):
    path = write(tmp_path, ".jsonl", ["a red five", "a blue six and", *LONG])
    options = {"tokenizer": "digits", "on_long_prompt": "skip", "num_test_prompts": 0}
    assert len(run(tmp_path, dataset_name=path, **options)["train"]) == 2
    assert "Left out: 2 too long." in capsys.readouterr().out
    splits = run(tmp_path, dataset_name=path, **options, max_tokens=5)
    assert list(splits["train"]["prompt"]) == ["a red five"]


# Pick-a-Pic

# Of https://huggingface.co/datasets/yuvalkirstain/pickapic_v1, and of v2, which has the same
PICKAPIC = pa.schema(
    {
        "are_different": pa.bool_(),
        "best_image_uid": pa.string(),
        "caption": pa.string(),
        "created_at": pa.timestamp("ns"),
        "has_label": pa.bool_(),
        "image_0_uid": pa.string(),
        "image_0_url": pa.string(),
        "image_1_uid": pa.string(),
        "image_1_url": pa.string(),
        "jpg_0": pa.binary(),
        "jpg_1": pa.binary(),
        "label_0": pa.float64(),
        "label_1": pa.float64(),
        "model_0": pa.string(),
        "model_1": pa.string(),
        "ranking_id": pa.int64(),
        "user_id": pa.int64(),
        "num_example_per_prompt": pa.int64(),
        "__index_level_0__": pa.int64(),
    }
)
# Caption, the numbers of its images, the vote for the first, and whether there was one
PAIRS = [
    ("a cat", 1, 2, 1.0),
    ("a dog", 7, 8, 0.0),
    (" a cat\n", 2, 3, 0.5),
    ("a cat", 1, 3, 1.0),
    ("a cat", 2, 1, 1.0),
    ("a sun", 5, 6, 0.5, False),
    ("a cat", 4, 1, 0.0),
    (None, 9, 10, 1.0),
    ("a cat", 4, 4, 0.5),
    ("a hen", 11, 12, 0.5),
]
# cat: 1 won 3 of 4; 2 lost, tied and won; 3 tied and lost; 4 lost its one
LISTS = {
    "a cat": ([1, 2, 3, 4], [1, 2, 3, 4], [0.75, 0.5, 0.25, 0.0]),
    "a dog": ([7, 8], [2, 1], [0.0, 1.0]),
    "a hen": ([11, 12], [1, 1], [0.5, 0.5]),
}
SAID = (
    "7 pairs of 3 captions; 2 votes are ties, 1 pairs have votes for both sides; left out: 1 pairs of an image with "
    "itself, 1 pairs without a caption, 1 pairs without a vote."
)


def uid(number: int) -> str:
    return f"00000000-0000-4000-8000-{number:012}"


def pickapic(tmp_path: Path, pairs: list[tuple] = PAIRS) -> str:
    rows = []
    for index, (caption, first, second, label, *labelled) in enumerate(pairs):
        has_label = labelled == []
        best = {1.0: uid(first), 0.0: uid(second)}.get(label, "tie") if has_label else None
        rows.append(
            {
                "are_different": first != second,
                "best_image_uid": best,
                "caption": caption,
                "created_at": 1_680_000_000_000_000_000 + index,
                "has_label": has_label,
                **{f"image_{i}_uid": uid(number) for i, number in enumerate((first, second))},
                **{f"image_{i}_url": f"https://text-to-image.invalid/{n}.png" for i, n in enumerate((first, second))},
                **{f"jpg_{i}": encoded(number) for i, number in enumerate((first, second))},
                "label_0": label,
                "label_1": 1.0 - label,
                "model_0": "stabilityai/stable-diffusion-2-1",
                "model_1": "dreamlike-art/dreamlike-photoreal-2.0",
                "ranking_id": index,
                "user_id": 7,
                "num_example_per_prompt": 1,
                "__index_level_0__": index,
            }
        )
    pq.write_table(pa.Table.from_pylist(rows, PICKAPIC), tmp_path / "pickapic.parquet", row_group_size=4)
    return str(tmp_path / "pickapic.parquet")


@pytest.mark.parametrize("streaming", [False, True])
def test_pickapic_captions_alone(streaming, tmp_path, capsys):
    """Without the images a caption is a caption, whether it was voted on or not."""
    options = {"num_prompts": 3, "num_test_prompts": 1, "streaming": streaming}
    splits = run(tmp_path, dataset_name=pickapic(tmp_path), **options)
    assert splits["train"].column_names == ["prompt", "row"]
    assert {row["prompt"] for row in all_rows(splits)} == {"a cat", "a dog", "a sun", "a hen"}
    assert "Left out: 5 repeated, 1 empty." in capsys.readouterr().out


def test_pickapic_pairs_become_ranked_lists(tmp_path, capsys):
    splits = run(tmp_path, dataset_name=pickapic(tmp_path), keep_images=True, num_test_prompts=1)
    assert splits["train"].features == Features(
        {
            "prompt": Value("string"),
            "row": Value("int64"),
            "ranks": List(Value("int32")),
            "psi": List(Value("float32")),
            "images": List(Image(decode=False)),
        }
    )
    rows = all_rows(splits)
    assert {row["prompt"] for row in rows} == set(LISTS) and [row["row"] for row in rows] == [0, 1, 2]
    for row in rows:
        numbers, ranks, psi = LISTS[row["prompt"]]
        assert [image["bytes"] for image in row["images"]] == [encoded(number) for number in numbers]
        assert (row["ranks"], row["psi"]) == (ranks, psi)
    assert SAID in capsys.readouterr().out
    assert f"## Votes\n\n{SAID}" in card(tmp_path)
    train, test = split(list(LISTS), None, 1, seed=0)
    assert (list(splits["train"]["prompt"]), list(splits["test"]["prompt"])) == (train, test)


def test_what_pickapic_became_can_be_trained_on(tmp_path):
    run(tmp_path, dataset_name=pickapic(tmp_path), keep_images=True, num_test_prompts=0)
    ranked = to_ranked(load_splits(str(tmp_path / "out"))["train"], "train")
    kept = check_rows(ranked, "train")
    assert {ranked[index]["prompt"] for index in kept} == {"a cat", "a dog"}  # one has nothing but a tie
    for row in ranked:
        assert [image["bytes"] for image in row["ranked_images"]] == [encoded(n) for n in LISTS[row["prompt"]][0]]


def test_pickapic_mirror_of_images_without_ids(tmp_path):
    """The same image is known by its bytes then."""
    data = Dataset.from_parquet(pickapic(tmp_path)).remove_columns(["image_0_uid", "image_1_uid"])
    data = data.cast_column("jpg_0", Image()).cast_column("jpg_1", Image())
    data.save_to_disk(tmp_path / "mirror")
    rows = all_rows(run(tmp_path, dataset_name=str(tmp_path / "mirror"), keep_images=True, num_test_prompts=1))
    for row in rows:
        numbers, ranks, psi = LISTS[row["prompt"]]
        assert [image["bytes"] for image in row["images"]] == [encoded(number) for number in numbers]
        assert (row["ranks"], row["psi"]) == (ranks, psi)


def test_of_pickapic_lists_those_images_are_kept_that_are_spread_best(tmp_path):
    options = {"dataset_name": pickapic(tmp_path), "keep_images": True, "num_test_prompts": 1}
    for keep, numbers, ranks, psi in (
        (2, [1, 4], [1, 2], [0.75, 0.0]),
        (3, [1, 2, 4], [1, 2, 3], [0.75, 0.5, 0.0]),
        (9, *LISTS["a cat"]),
    ):
        rows = {row["prompt"]: row for row in all_rows(run(tmp_path, **options, keep=keep))}
        assert [image["bytes"] for image in rows["a cat"]["images"]] == [encoded(number) for number in numbers]
        assert (rows["a cat"]["ranks"], rows["a cat"]["psi"]) == (ranks, psi)
        assert rows["a dog"]["ranks"] == [2, 1] and len(rows["a hen"]["images"]) == 2


def test_a_cut_caption_keeps_its_list(tmp_path):
    pairs = [(LONG[0], 1, 2, 1.0), ("a red five", 3, 4, 0.0), (LONG[0], 3, 1, 1.0)]
    path = pickapic(tmp_path, pairs)
    rows = all_rows(run(tmp_path, dataset_name=path, keep_images=True, num_test_prompts=1, tokenizer="digits"))
    rows = {row["prompt"]: row["ranks"] for row in rows}
    assert rows == {"a red five": [2, 1], "a red five and a blue six on": [2, 3, 1]}


# Lists of images


def lists_of_images(tmp_path: Path, **columns: list) -> str:
    """Parquet of four, three, two, one and no images, with `columns`."""
    images = [[{"bytes": encoded(10 * row + i), "path": None} for i in range(n)] for row, n in enumerate([4, 3, 2, 1])]
    data = {"prompt": [f"cat {row}" for row in range(5)], "images": [*images, None], **columns}
    Dataset.from_dict(data).cast_column("images", List(Image())).to_parquet(tmp_path / "lists.parquet")
    return str(tmp_path / "lists.parquet")


def numbers_of(row: dict) -> list[int]:
    known = {encoded(10 * row + i): 10 * row + i for row in range(4) for i in range(4)}
    return [known[image["bytes"]] for image in row["images"]]


def test_lists_keep_their_ratings_and_single_images_are_left_out(tmp_path, capsys):
    columns = {
        "scores": [[1.0, 4.0, 2.0, 3.0], [1.0, 3.0, 2.0], [0.0, 0.5], [1.0], []],
        "kind": ["tabby", None, "tiger", "lion", "lynx"],
        "aesthetic_score_laion_v2": [6.0, 6.5, 7.0, 8.0, 9.0],
    }
    path = lists_of_images(tmp_path, **columns)
    options = {"dataset_name": path, "keep_images": True, "num_test_prompts": 1, "keep_columns": ["kind"]}
    rows = sorted(all_rows(run(tmp_path, **options)), key=lambda row: row["prompt"])
    assert [row["prompt"] for row in rows] == ["cat 0", "cat 1", "cat 2"]
    assert [numbers_of(row) for row in rows] == [[0, 1, 2, 3], [10, 11, 12], [20, 21]]
    assert [row["scores"] for row in rows] == columns["scores"][:3]
    assert [row["kind"] for row in rows] == ["tabby", None, "tiger"]
    said = "Left out: 2 unusable lists of images. First: Row 3 of the train dataset: a ranking needs at least two"
    assert said in capsys.readouterr().out and said in card(tmp_path)

    rows = all_rows(run(tmp_path, **options, aesthetic_min=6.5, keep=2))
    assert {row["prompt"]: (numbers_of(row), row["scores"]) for row in rows} == {
        "cat 1": ([10, 11], [1.0, 3.0]),
        "cat 2": ([20, 21], [0.0, 0.5]),
    }


def test_lists_without_ratings_stand_in_their_order(tmp_path):
    rows = all_rows(
        run(tmp_path, dataset_name=lists_of_images(tmp_path), keep_images=True, num_test_prompts=0, keep=3)
    )
    assert {row["prompt"]: numbers_of(row) for row in rows} == {
        "cat 0": [0, 1, 3],  # of 0 1 2 3 the ends, and the earlier of those between
        "cat 1": [10, 11, 12],
        "cat 2": [20, 21],
    }
    assert set(rows[0]) == {"prompt", "row", "images"}


def test_ratings_that_some_lists_lack(tmp_path):
    """Where there are none, the order of the images counts; ties share a rank after the choice too."""
    ranks = [[2, 1, 2, 3], None, [1, 2], None, None]
    path = lists_of_images(tmp_path, ranks=ranks)
    rows = all_rows(run(tmp_path, dataset_name=path, keep_images=True, num_test_prompts=0, keep=2))
    assert {row["prompt"]: (numbers_of(row), row["ranks"]) for row in rows} == {
        "cat 0": ([1, 3], [1, 2]),
        "cat 1": ([10, 12], None),
        "cat 2": ([20, 21], [1, 2]),
    }


def test_lists_of_another_stage(tmp_path):
    """As a folder, and as a parquet file that has lost what `datasets` writes beside the columns."""
    path = lists_of_images(tmp_path, psi=[[1.0, 0.5, 0.5, 0.0], [0.0, 0.5, 1.0], [0.0, 1.0], [0.5], []])
    rows = all_rows(run(tmp_path, dataset_name=path, keep_images=True, num_test_prompts=1))
    again = run(tmp_path / "again", dataset_name=str(tmp_path / "out"), keep_images=True, num_test_prompts=0)
    assert list(again["train"]) == rows[:2]
    pq.write_table(pq.read_table(path).replace_schema_metadata(), path)
    assert all_rows(run(tmp_path, dataset_name=path, keep_images=True, num_test_prompts=1)) == rows


def test_lists_of_plain_bytes(tmp_path):
    data = {"prompt": ["cat 0"], "images": [[encoded(1), encoded(0)]]}
    features = Features({"prompt": Value("string"), "images": List(Value("binary"))})
    Dataset.from_dict(data, features).to_parquet(tmp_path / "lists.parquet")
    options = {"dataset_name": str(tmp_path / "lists.parquet"), "keep_images": True, "num_test_prompts": 0}
    assert numbers_of(run(tmp_path, **options)["train"][0]) == [1, 0]


@pytest.mark.parametrize(
    ("missing", "reason"), [({"bytes": None, "path": "/gone.png"}, "No such file"), (None, "NoneType")]
)
def test_an_image_of_a_list_that_is_not_there(missing, reason, tmp_path):
    rows = [{"prompt": "a cat", "images": [{"bytes": encoded(1), "path": None}, missing]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "lists.parquet")
    with pytest.raises(ValueError, match=rf"An image of the prompt 'a cat' has neither .*{reason}.* `keep_images`"):
        run(tmp_path, dataset_name=str(tmp_path / "lists.parquet"), keep_images=True, num_test_prompts=0)


# One image a row


def single_images(tmp_path: Path, count: int = 40, content: Callable[[int], bytes] = encoded) -> str:
    """Of every ten rows the third is damaged, the fifth too small and the seventh has no image."""
    images = [{"bytes": content(i), "path": None} for i in range(count)]
    for i in range(count):
        if i % 10 == 3:
            images[i]["bytes"] = images[i]["bytes"][:100]
        if i % 10 == 5:
            images[i]["bytes"] = encoded(i, size=(16, 8))
        if i % 10 == 7:
            images[i] = None
    data = {"caption": [f"cat {i}" for i in range(count)], "image": images, "number": list(range(count))}
    Dataset.from_dict(data).cast_column("image", Image()).to_parquet(tmp_path / "images.parquet", batch_size=16)
    return str(tmp_path / "images.parquet")


def usable(numbers: list[int]) -> list[int]:
    return [number for number in numbers if number % 10 not in (3, 5, 7)]


@pytest.mark.parametrize("streaming", [False, True])
def test_images_come_along_as_they_are(streaming, tmp_path, capsys):
    """Of 40 rows 28 are good; the first 14 good ones of a stream are among its first 20 rows."""
    order = list(range(40)) if streaming else sorted(range(40), key=lambda i: split_order(f"cat {i}", 0))
    expected = usable(order)[:14]
    options = {"keep_images": True, "keep_columns": ["number"], "min_side": 16, "num_prompts": 9}
    splits = run(tmp_path, dataset_name=single_images(tmp_path), streaming=streaming, **options)
    rows = all_rows(splits)
    assert {row["number"] for row in rows} == set(expected)
    train, test = split([f"cat {i}" for i in expected], 9, 5, seed=0)
    assert [row["prompt"] for row in rows] == train + test
    assert all(row["image"]["bytes"] == encoded(row["number"]) for row in rows)
    assert isinstance(splits["train"].features["image"], Image)

    seen = order[: order.index(expected[-1]) + 1]
    table = {"ok": 14} | {
        name: sum(i % 10 == last for i in seen)
        for name, last in (("not_an_image", 3), ("too_small", 5), ("no_image", 7))
    }
    for text in (capsys.readouterr().out, card(tmp_path)):
        assert {name: int(n) for name, n in re.findall(r"^\| (\w+) +\| +(\d+) \|$", text, re.M)} == table


def test_image_column_by_another_name_and_as_bytes(tmp_path):
    data = {"text": ["cat 0", "cat 1"], "photo": [encoded(0), encoded(1)]}
    Dataset.from_dict(data, Features({"text": Value("string"), "photo": Value("binary")})).to_parquet(
        tmp_path / "p.parquet"
    )
    options = {"dataset_name": str(tmp_path / "p.parquet"), "keep_images": True, "image_column": "photo"}
    for streaming in (False, True):
        rows = all_rows(run(tmp_path, **options, streaming=streaming, num_prompts=1, num_test_prompts=1))
        assert {row["prompt"]: row["image"]["bytes"] for row in rows} == {f"cat {i}": encoded(i) for i in range(2)}


@pytest.mark.parametrize("streaming", [False, True])
def test_what_was_looked_at_is_not_looked_at_again(streaming, tmp_path, monkeypatch):
    path = single_images(tmp_path, count=3 * IMAGES_PER_PART)
    options = {"dataset_name": path, "keep_images": True, "streaming": streaming, "num_prompts": 50}
    expected = all_rows(run(tmp_path / "undisturbed", **options))
    looked_at = []
    write = Parts.write

    def write_one(self, columns):
        if looked_at:
            raise KeyboardInterrupt
        looked_at.extend(columns["index"])
        write(self, columns)

    monkeypatch.setattr(Parts, "write", write_one)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, **options)
    again = []
    monkeypatch.setattr(Parts, "write", lambda self, columns: again.extend(columns["index"]) or write(self, columns))
    assert all_rows(run(tmp_path, **options)) == expected
    assert len(looked_at) == IMAGES_PER_PART and again and not set(looked_at) & set(again)
    assert not list((tmp_path / "out").glob("partial-*"))


def large(seed: int) -> bytes:
    return encoded(seed) + bytes(64 * 1024)


@pytest.mark.parametrize("source", ["image", "pairs"])
def test_images_are_never_all_in_memory(source, tmp_path):
    """600 images of 40 MB together; a hundred or two are in memory while they are moved from file to file."""
    if source == "image":
        data = Dataset.from_parquet(single_images(tmp_path, 600, large))
    else:
        columns = {"caption": [f"cat {i}" for i in range(300)], "label_0": [1.0] * 300}
        columns |= {f"image_{side}_uid": [str(2 * i + side) for i in range(300)] for side in range(2)}
        columns |= {f"jpg_{side}": [large(2 * i + side) for i in range(300)] for side in range(2)}
        data = Dataset.from_dict(columns)
        del columns
    data.save_to_disk(tmp_path / "data")  # which is read without `datasets` converting it first
    del data
    tracemalloc.start()
    splits = run(tmp_path, dataset_name=str(tmp_path / "data"), keep_images=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(splits["train"]) > 290
    assert peak < 25e6, peak


def test_images_of_a_stream_are_let_go_once_they_are_written(tmp_path, monkeypatch):
    """What `datasets` itself reads ahead is not counted: it comes without a place in Python."""
    in_memory = []

    def write_and_count(self, columns):
        write(self, columns)
        traces = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(False, "<unknown>")])
        in_memory.append(sum(trace.size for trace in traces.statistics("filename")))

    write = Parts.write
    monkeypatch.setattr(Parts, "write", write_and_count)
    path = single_images(tmp_path, 600, large)
    tracemalloc.start()
    run(tmp_path, dataset_name=path, keep_images=True, streaming=True, num_prompts=400)
    tracemalloc.stop()
    assert len(in_memory) > 10
    assert max(in_memory) < 12e6, in_memory


# Images by their URLs

# https://github.com/kakaobrain/coyo-dataset
COYO = pa.schema(
    {
        "id": pa.int64(),
        "url": pa.string(),
        "text": pa.string(),
        "width": pa.int32(),
        "height": pa.int32(),
        "image_phash": pa.string(),
        "text_length": pa.int32(),
        "word_count": pa.int32(),
        "num_tokens_bert": pa.int32(),
        "num_tokens_gpt": pa.int32(),
        "num_faces": pa.int32(),
        "clip_similarity_vitb32": pa.float32(),
        "clip_similarity_vitl14": pa.float32(),
        "nsfw_score_opennsfw2": pa.float32(),
        "nsfw_score_gantman": pa.float32(),
        "watermark_score": pa.float32(),
        "aesthetic_score_laion_v2": pa.float32(),
    }
)


def coyo(tmp_path: Path, urls: list[str | None], changes: dict[int, dict] | None = None) -> str:
    """Rows of these addresses; `changes` of rows by their number."""
    rows = []
    for index, url in enumerate(urls):
        text = f"picture {index}"
        row = {"id": 841814333321 + index, "url": url, "text": text, "width": 512, "height": 640}
        row |= {"image_phash": "c9b6a7d8469c1959", "text_length": len(text), "word_count": 2, "num_tokens_bert": 4}
        row |= {"num_tokens_gpt": 3, "num_faces": 0, "clip_similarity_vitb32": 0.3, "clip_similarity_vitl14": 0.3}
        row |= {"nsfw_score_opennsfw2": 0.01, "nsfw_score_gantman": 0.02, "watermark_score": 0.1}
        rows.append(row | {"aesthetic_score_laion_v2": 6.75} | (changes or {}).get(index, {}))
    pq.write_table(pa.Table.from_pylist(rows, COYO), tmp_path / "coyo.parquet", row_group_size=16)
    return str(tmp_path / "coyo.parquet")


class Server(ThreadingHTTPServer):
    """
    Serves `/good/<n>` and images with faults. `requests` are the paths that were asked for; those that are `held` are
    answered once they no longer are.
    """

    daemon_threads = True
    request_queue_size = 128  # of the usual 5, other connections wait a second before they try again

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[str] = []
        self.held: set[str] = set()

    def urls(self, *paths: str) -> list[str]:
        return [f"http://127.0.0.1:{self.server_port}/{path}" for path in paths]


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        kind, _, number = self.path[1:].partition("/")
        while self.path in self.server.held:
            time.sleep(0.01)
        try:
            if kind == "good":
                self.answer(200, encoded(int(number), size=(24, 16)))
            elif kind == "small":
                self.answer(200, encoded(0, size=(24, 15)))
            elif kind == "broken":
                self.answer(200, encoded(0, size=(24, 16))[:200])
            elif kind == "huge":
                self.answer(200, encoded(0) + bytes(1_000_000))
            elif kind == "pixels":
                self.answer(200, encoded(0, "PNG", size=(400, 400)))
            elif kind == "redirect":
                self.answer(302, b"", Location=f"/good/{number}")
            elif kind == "loop":
                self.answer(302, b"", Location=self.path)
            elif kind == "slow":
                time.sleep(1.5)
            else:
                self.answer(int(kind), b"")
        except ConnectionError:
            pass  # the client has had enough, or was killed

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.held.clear()
        server.shutdown()


WITH_IMAGES = {
    "keep_images": True,
    "allow_private_hosts": True,
    "min_side": 16,
    "download_timeout": 1.0,
    "download_retries": 1,
    "download_max_megabytes": 0.5,
    "download_max_megapixels": 0.1,
}
FAULTS = ["slow", "huge", "404", "broken", "503", "loop", "small", "pixels"]
REASONS = ["timeout", "too_large", "http_404", "not_an_image", "http_503", "too_many_redirects", "too_small"]
REASONS += ["too_many_pixels"]


@pytest.mark.parametrize("streaming", [False, True])
def test_coyo_ends_with_the_good_images_and_a_table_of_reasons(streaming, server, tmp_path, capsys, monkeypatch):
    """Seven good ones, the last two redirected; between them one of each fault and two addresses that are none."""
    monkeypatch.setattr(download, "BACKOFF", 0.001)
    good = [f"good/{i}" for i in range(5)] + ["redirect/5", "redirect/6"]
    urls = server.urls(*good[:3], *FAULTS, *good[3:-1])
    urls += [None, "ftp://127.0.0.1/a.jpg", *server.urls(good[-1])]
    path = coyo(tmp_path, urls)
    options = WITH_IMAGES | {"num_test_prompts": 2, "streaming": streaming, "num_prompts": 5 if streaming else None}
    splits = run(tmp_path, dataset_name=path, **options)

    rows = all_rows(splits)
    number_of = {f"picture {urls.index(url)}": i for i, url in enumerate(server.urls(*good))}
    train, test = split(list(number_of), 5, 2, seed=0)
    assert [row["prompt"] for row in rows] == train + test
    for row in rows:
        assert row["image"]["bytes"] == encoded(number_of[row["prompt"]], size=(24, 16))
    assert isinstance(load_splits(str(tmp_path / "out"))["test"][0]["image"], PILImage.Image)
    table = {"ok": 7, "bad_url": 2} | dict.fromkeys(REASONS, 1)
    for text in (capsys.readouterr().out, card(tmp_path)):
        assert {name: int(n) for name, n in re.findall(r"^\| (\w+) +\| +(\d+) \|$", text, re.M)} == table
    assert server.requests.count("/503") == 2 and server.requests.count("/404") == 1


def test_candidates_are_gone_down_until_there_are_enough(server, tmp_path, capsys):
    """The first 100 of the list are gone; what is asked for after the sixth good one is little and is not counted."""
    order = sorted(range(600), key=lambda i: split_order(f"picture {i}", 0))
    paths = [""] * 600
    for place, index in enumerate(order):
        paths[index] = "404" if place < 100 else f"good/{index}"
    path = coyo(tmp_path, server.urls(*paths))
    options = {"num_prompts": 4, "num_test_prompts": 2, "download_workers": 4}
    splits = run(tmp_path, dataset_name=path, **WITH_IMAGES | options)
    assert list(splits["test"]["prompt"]) == [f"picture {i}" for i in order[100:102]]
    assert list(splits["train"]["prompt"]) == [f"picture {i}" for i in order[102:106]]
    out = capsys.readouterr().out
    assert re.search(r"\| http_404 \| +100 \|\n\| ok +\| +6 \|", out)
    assert len(server.requests) < 400


def test_counts_do_not_depend_on_how_far_downloads_ran_ahead(server, tmp_path, capsys):
    """A stream of which the first, third and fifth row are enough, while rows long after them are asked for."""
    changes = {i: {"text": ""} for i in (1, *range(5, 50))}
    path = coyo(tmp_path, server.urls(*(f"good/{i}" for i in range(60))), changes)
    server.held = {"/good/4"}
    threading.Timer(0.5, server.held.clear).start()
    run(tmp_path, dataset_name=path, **WITH_IMAGES, streaming=True, num_prompts=3, num_test_prompts=1)
    assert "Left out: 1 empty." in capsys.readouterr().out
    assert "/good/50" in server.requests


def test_private_addresses_are_not_asked(server, tmp_path, capsys):
    path = coyo(tmp_path, server.urls("good/0", "good/1"))
    message = r"only 0 distinct prompts.* Images looked at: 2 private_address\."
    with pytest.raises(ValueError, match=message):
        run(tmp_path, dataset_name=path, **WITH_IMAGES | {"allow_private_hosts": False})
    assert re.search(r"\| private_address \| +2 \|", capsys.readouterr().out)
    assert server.requests == []


def test_too_few_images_are_refused_with_what_became_of_them(server, tmp_path):
    urls = server.urls("good/0", "404", "404", "good/1", "good/2")
    path = coyo(tmp_path, urls, {4: {"aesthetic_score_laion_v2": 6.25}})
    message = (
        r"`num_prompts` is 3 .* only 2 distinct .* Images looked at: 2 http_404, 2 ok\. Left out: 1 aesthetic_min\."
    )
    with pytest.raises(ValueError, match=message) as raised:
        run(tmp_path, dataset_name=path, **WITH_IMAGES, num_prompts=3, num_test_prompts=0, aesthetic_min=6.5)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("streaming", [False, True])
def test_coyo_filters(streaming, server, tmp_path, capsys):
    changes = {
        1: {"aesthetic_score_laion_v2": 6.49},
        2: {"nsfw_score_gantman": 0.9},
        3: {"watermark_score": 0.9},
        4: {"height": 100},
        5: {"aesthetic_score_laion_v2": None},
        6: {"nsfw_score_opennsfw2": 0.9},
        7: {"aesthetic_score_laion_v2": 6.5, "width": 16, "nsfw_score_gantman": 0.25, "watermark_score": 0.5},
    }
    limits = {"aesthetic_min": 6.5, "nsfw_max": 0.25, "watermark_max": 0.5, "min_side": 16}
    changes[4]["height"] = 15
    path = coyo(tmp_path, server.urls(*(f"good/{i}" for i in range(9))), changes)
    options = {"num_prompts": 2, "num_test_prompts": 1, "streaming": streaming}
    said = "Left out: 2 aesthetic_min, 2 nsfw_max, 1 min_side, 1 watermark_max."
    for images in ({}, WITH_IMAGES):
        splits = run(tmp_path, dataset_name=path, **images | options | limits)
        assert {row["prompt"] for row in all_rows(splits)} == {"picture 0", "picture 7", "picture 8"}
        assert said in capsys.readouterr().out
    assert sorted(server.requests) == ["/good/0", "/good/7", "/good/8"]


@contextmanager
def stage_process(tmp_path: Path, options: dict) -> Iterator[subprocess.Popen]:
    command = [sys.executable, "-m", "trl_diffusion_rank.stages.prompts"]
    command += [text for name, value in options.items() for text in (f"--{name}", str(value))]
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_killed_again_and_again_it_ends_with_the_same_dataset(server, tmp_path):
    """
    The server holds back one image, and the process is killed once those before it are written, as far as parts of 32
    go. What was written, good or not, is not asked for again.
    """
    paths = [f"404/{i}" if i % 7 == 0 else f"good/{i}" for i in range(130)]
    order = sorted(range(130), key=lambda i: split_order(f"picture {i}", 0))
    options = {"dataset_name": coyo(tmp_path, server.urls(*paths)), "num_prompts": 100, "num_test_prompts": 8}
    options |= {"keep_images": True, "allow_private_hosts": True, "min_side": 16, "download_workers": 4}
    undisturbed = all_rows(run(tmp_path / "undisturbed", **options))
    assert len(undisturbed) == 108 and len(server.requests) == len(set(server.requests))
    server.requests.clear()

    def finished() -> set[str]:
        parts = (tmp_path / "out").glob("partial-*/images/*.parquet")
        return {f"/{paths[i]}" for part in parts for i in pq.read_table(part, columns=["index"])["index"].to_pylist()}

    options["output_dir"] = str(tmp_path / "out")
    kills = []
    for place in (40, 72, 104):
        held = f"/{paths[order[place]]}"
        server.held = {held}
        with stage_process(tmp_path, options) as process:
            deadline = time.monotonic() + 60
            while len(finished()) < place // IMAGES_PER_PART * IMAGES_PER_PART or held not in server.requests:
                assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
                time.sleep(0.02)
            process.kill()
            assert process.wait() == -signal.SIGKILL
        kills.append((finished(), len(server.requests)))
        server.held = set()
    assert [len(done) for done, _ in kills] == [32, 64, 96]
    assert not (tmp_path / "out" / "data").exists()
    with stage_process(tmp_path, options) as process:
        assert process.wait(60) == 0, (tmp_path / "log").read_text()

    splits = {name: undecoded(split) for name, split in load_splits(options["output_dir"]).items()}
    assert all_rows(splits) == undisturbed
    assert card(tmp_path) == card(tmp_path / "undisturbed").replace("/undisturbed/out", "/out")
    for done, requests in kills:
        assert not done & set(server.requests[requests:])


# Everything that is refused


def test_missing_columns_list_those_there_are(tmp_path):
    path = write(tmp_path, ".jsonl", ANIMALS)
    message = r"`prompt_column` is 'prompt', and .* has no such column; its columns are caption, number"
    for options in ({}, {"streaming": True, "num_prompts": 3}):
        with pytest.raises(ValueError, match=message):
            run(tmp_path, dataset_name=path, prompt_column="prompt", **options)
    with pytest.raises(ValueError, match="`keep_columns` is 'category', and"):
        run(tmp_path, dataset_name=path, keep_columns=["category"])
    with pytest.raises(ValueError, match="`aesthetic_min` reads the column 'aesthetic_score_laion_v2'"):
        run(tmp_path, dataset_name=path, aesthetic_min=6.5)
    with pytest.raises(ValueError, match=r"`min_side` reads the column 'width', .* the columns are caption, number"):
        run(tmp_path, dataset_name=path, min_side=8)
    Dataset.from_dict({"question": ["why"], "answer": ["so"]}).to_parquet(tmp_path / "qa.parquet")
    with pytest.raises(
        ValueError, match=r"none of the columns prompt, Prompt, caption, text: .*`prompt_column`.*: question, ans"
    ):
        run(tmp_path, dataset_name=str(tmp_path / "qa.parquet"))


def test_a_column_of_numbers_is_no_prompt(tmp_path):
    with pytest.raises(TypeError, match=r"Row 0: the prompt must be a text, got 0; .* instead of 'number'"):
        run(tmp_path, dataset_name=write(tmp_path, ".csv", ANIMALS), prompt_column="number")


def test_no_images_to_keep(tmp_path):
    message = r"`keep_images` is set, and .*none: .* 'image' \(`image_column`\), of addresses 'link' \(`url_column`\)"
    for ending, columns in ((".txt", "text"), (".parquet", "caption, number")):
        with pytest.raises(ValueError, match=rf"{message} .* Its columns are {columns}\."):
            run(tmp_path, dataset_name=write(tmp_path, ending, ANIMALS), keep_images=True, url_column="link")
    data = {"prompt": ["a cat"], "image": ["cat.png"], "images": [["cat.png", "dog.png"]]}  # names, not images
    Dataset.from_dict(data).to_parquet(tmp_path / "names.parquet")
    with pytest.raises(ValueError, match=r"`keep_images` is set, and .*none: .* columns are prompt, image, images"):
        run(tmp_path, dataset_name=str(tmp_path / "names.parquet"), keep_images=True)


def test_several_images_a_row_can_not_be_streamed(tmp_path):
    for path in (pickapic(tmp_path), lists_of_images(tmp_path)):
        with pytest.raises(ValueError, match=r"`keep_images` needs the whole dataset .*leave `streaming` unset"):
            run(tmp_path, dataset_name=path, keep_images=True, streaming=True, num_prompts=2)


def test_pickapic_pairs_are_merged_whole(tmp_path):
    path = pickapic(tmp_path)
    for options in ({"keep_columns": ["model_0"]}, {"aesthetic_min": 6.5}, {"min_side": 8}):
        with pytest.raises(ValueError, match=r"`keep_columns` and filters, .* can't be used with it"):
            run(tmp_path, dataset_name=path, keep_images=True, **options)
    with pytest.raises(
        ValueError, match=r"`prompt_column` is 'model_0', and `keep_images` merges .* by their `caption`"
    ):
        run(tmp_path, dataset_name=path, keep_images=True, prompt_column="model_0")
    with pytest.raises(ValueError, match=r"Row 1 of the train dataset: `label_0` must be 0, 0.5 or 1, got 0.7"):
        run(tmp_path, dataset_name=pickapic(tmp_path, [PAIRS[0], ("a cat", 1, 2, 0.7)]), keep_images=True)


def test_lists_are_not_measured_and_single_images_not_chosen_from(tmp_path):
    with pytest.raises(ValueError, match="`min_side` is set, and the sizes of images in lists aren't looked at"):
        run(tmp_path, dataset_name=lists_of_images(tmp_path), keep_images=True, min_side=8)
    with pytest.raises(ValueError, match=r"`keep` is 3, and .*images.parquet' has one image a row"):
        run(tmp_path, dataset_name=single_images(tmp_path, 10), keep_images=True, keep=3)


def test_columns_that_are_not_kept(tmp_path):
    path = single_images(tmp_path, 10)
    for column in ("prompt", "row", "images", "ranks"):
        data = Dataset.from_dict({"text": ["a cat"], column: [1]})
        data.to_parquet(tmp_path / "own.parquet")
        with pytest.raises(ValueError, match=f"`keep_columns` has '{column}', a name that the stage itself writes"):
            run(tmp_path, dataset_name=str(tmp_path / "own.parquet"), keep_columns=[column], prompt_column="text")
    with pytest.raises(ValueError, match="`keep_columns` has 'jpg_0', whose values are as large as images"):
        run(tmp_path, dataset_name=pickapic(tmp_path), keep_columns=["jpg_0"])
    with pytest.raises(ValueError, match="`keep_columns` has 'photo', whose values are as large as images"):
        Dataset.from_parquet(path).rename_column("image", "photo").to_parquet(tmp_path / "photo.parquet")
        run(tmp_path, dataset_name=str(tmp_path / "photo.parquet"), keep_columns=["photo"])


def test_a_missing_split_lists_those_there_are(tmp_path):
    with pytest.raises(ValueError, match=r"`dataset_split` is 'validation'.*has the splits train"):
        run(tmp_path, dataset_name=write(tmp_path, ".txt", ANIMALS), dataset_split="validation")


def test_a_dataset_that_does_not_exist(tmp_path):
    with pytest.raises(ValueError, match=r"`dataset_name` is .*nowhere', which is neither a file or folder"):
        run(tmp_path, dataset_name=str(tmp_path / "nowhere"))


def test_a_file_of_unknown_kind(tmp_path):
    (tmp_path / "prompts.docx").write_text("a cat")
    with pytest.raises(ValueError, match=r"must end in one of .parquet"):
        run(tmp_path, dataset_name=str(tmp_path / "prompts.docx"))


def test_more_prompts_than_there_are(tmp_path):
    path = write(tmp_path, ".jsonl", [*ANIMALS, "", ANIMALS[0]])
    with pytest.raises(ValueError, match=r"`num_prompts` is 16 .*only 20 distinct prompts.* 1 empty, 1 repeated\.$"):
        run(tmp_path, dataset_name=path, num_prompts=16)
    with pytest.raises(ValueError, match=r"`num_test_prompts` is 20, .*only 20 distinct prompts"):
        run(tmp_path, dataset_name=path, num_test_prompts=20)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_prompts": 0}, "`num_prompts` is 0; it must be at least 1"),
        ({"num_test_prompts": -1}, "`num_test_prompts` is -1; it must be at least 0"),
        ({"max_tokens": 0, "tokenizer": "x"}, "`max_tokens` is 0; it must be at least 1"),
        ({"min_side": 0}, "`min_side` is 0; it must be at least 1"),
        ({"download_workers": 0}, "`download_workers` is 0; it must be at least 1"),
        ({"download_retries": -1}, "`download_retries` is -1; it must be at least 0"),
        ({"download_timeout": 0.0}, "`download_timeout` is 0.0; it must be a number above 0"),
        ({"download_max_megabytes": float("inf")}, "`download_max_megabytes` is inf; it must be a number above 0"),
        ({"download_max_megapixels": float("nan")}, "`download_max_megapixels` is nan; it must be a number above 0"),
        ({"download_max_megapixels": 257.0}, "`download_max_megapixels` is 257.0; it must be at most 256"),
        ({"keep": 1, "keep_images": True}, "`keep` is 1; it must be at least 2"),
        ({"keep": 4}, "`keep` is set and `keep_images` is not"),
        ({"on_long_prompt": "cutt"}, "`on_long_prompt` is 'cutt', which is not known. Did you mean 'cut'"),
        ({"max_tokens": 77}, "`max_tokens` is set and `tokenizer` is not"),
        ({"dataset_name": "digits"}, "prompts of `digits` are drawn, so say how many"),
        ({"streaming": True}, "`streaming` is set and `num_prompts` is not"),
        ({"push_to_hub": True}, "`push_to_hub` is set and `hub_dataset_id` is not"),
        *(
            ({"dataset_name": "digits", "num_prompts": 9, name: value}, f"`{name}` is set; prompts of `digits` are")
            for name, value in (
                *(("streaming", True), ("prompt_column", "x"), ("keep_columns", ["x"]), ("tokenizer", "digits")),
                *(("aesthetic_min", 6.5), ("nsfw_max", 0.0), ("watermark_max", 0.5)),
                ("min_side", 8),
            )
        ),
    ],
)
def test_options_are_checked_before_anything_is_read(options, message):
    with pytest.raises(ValueError, match=message):
        PromptsArguments(**options)


def test_what_a_stage_by_itself_needs():
    with pytest.raises(ValueError, match="`dataset_name` is not set and the stage `prompts` needs it"):
        main(PromptsArguments(output_dir="x"))
    with pytest.raises(ValueError, match="`output_dir` is not set"):
        main(PromptsArguments(dataset_name="x"))


def test_only_the_main_process_works(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    main(PromptsArguments(dataset_name=write(tmp_path, ".txt", ANIMALS), output_dir=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
