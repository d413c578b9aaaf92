import io
import logging

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, IterableDataset, List, Value
from PIL import Image as PILImage
from tiny import random_image
from tiny_discriminator import tiny_processor

from trl_diffusion_rank.data.caption_groups import (
    CaptionGroupCollator,
    Equalizer,
    group_ranks,
    group_sources,
    is_held_out,
    middle,
    read_groups,
    same_caption,
    split_by_caption,
    without_captions_of,
)


SOURCES = ["real", "a", "b"]


def groups(captions=("cat", "dog"), sources=None, column="sources", size=(16, 16)) -> Dataset:
    generator = np.random.default_rng(0)
    sources = sources or [SOURCES] * len(captions)
    kind = Value("string") if column == "sources" else Value("int64")
    return Dataset.from_dict(
        {
            "prompt": list(captions),
            "images": [[random_image(generator, size) for _ in row] for row in sources],
            column: sources,
            "seeds": [[0] * len(row) for row in sources],
        },
        features=Features(
            {"prompt": Value("string"), "images": List(Image()), column: List(kind), "seeds": List(Value("int64"))}
        ),
    )


def test_real_images_are_those_of_the_real_source_wherever_they_stand():
    row = {"prompt": "cat", "sources": ["a", "photo", "b", "photo"]}
    assert group_ranks(row, "photo") == [2, 1, 2, 1]
    assert group_sources(row) == ["a", "photo", "b", "photo"]


def test_without_sources_the_ranks_are_the_order():
    row = {"prompt": "cat", "ranks": [7, 2, 2, 9]}
    assert group_ranks(row, "real") == [2, 1, 1, 3]
    assert group_sources(row) == ["rank 2", "rank 1", "rank 1", "rank 3"]


def test_rows_of_one_kind_are_left_out_and_counted(caplog):
    data = groups(["cat", "dog", "sun"], [["real", "a"], ["a", "b"], ["real", "real"]])
    with caplog.at_level(logging.WARNING):
        read = read_groups(data, "train")
    assert list(read["prompt"]) == ["cat"]
    assert "2 of 3 rows of the train dataset lack a real or a generated image" in caplog.text
    caplog.clear()
    assert list(read_groups(read, "train")["prompt"]) == ["cat"]  # applied twice
    assert not caplog.text
    assert set(read.column_names) == {"prompt", "images", "sources"}
    assert isinstance(read[0]["images"][0]["bytes"], bytes)  # undecoded


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (groups().remove_columns("sources"), r"no column `ranks` or `sources`; its columns are prompt, images, seeds"),
        (groups().remove_columns("prompt"), "no column `prompt`"),
        (groups(sources=[["a", "b"]] * 2), r"`real_source` is 'real' and the sources are \['a', 'b'\]"),
        (groups(sources=[[1, 1]] * 2, column="ranks"), "all ranks are tied"),
        (groups().to_iterable_dataset(), "is a stream"),
        (
            groups().remove_columns("sources").add_column("sources", [["real"], SOURCES]),
            r"Row 0 of the train dataset: `sources` is \['real'\] for 3 images",
        ),
        (groups(captions=(None, "dog")), "Row 0 of the train dataset: `prompt` must be a string, got None"),
        (
            groups(sources=[[1, None]] * 2, column="ranks"),
            r"Row 0 of the train dataset: `ranks` must be integers, got \[1, None\]",
        ),
    ],
)
def test_what_is_no_group_is_refused(data, message):
    assert isinstance(data, Dataset | IterableDataset)
    with pytest.raises(ValueError, match=message):
        read_groups(data, "train")


# Split


def test_no_caption_is_on_both_sides_and_rows_of_one_go_together():
    captions = [f"{word} {i}" for i in range(100) for word in ("cat", " CAT ")]
    train, test = split_by_caption(groups(captions), test_share=0.2, seed=0)
    sides = [{same_caption(caption) for caption in side["prompt"]} for side in (train, test)]
    assert not sides[0] & sides[1]
    assert len(train) + len(test) == 200 and len(sides[0]) + len(sides[1]) == 100
    assert 8 <= len(sides[1]) <= 35  # 20 of 100; beyond three standard deviations of 4
    assert len(test) == 2 * len(sides[1])


def test_split_follows_the_seed_and_is_not_moved_by_other_rows():
    captions = [f"cat {i}" for i in range(60)]
    first = [caption for caption in captions if is_held_out(caption, 0.3, seed=0)]
    assert list(split_by_caption(groups(captions[::-1]), 0.3, 0)[1]["prompt"]) == first[::-1]
    assert first != [caption for caption in captions if is_held_out(caption, 0.3, seed=1)]
    assert set(first) <= {caption for caption in captions if is_held_out(caption, 0.5, seed=0)}


def test_a_split_without_rows_on_one_side_is_refused():
    with pytest.raises(ValueError, match=r"`test_share=0.2` and `seed=0` \d rows would train and \d test, of 1 capt"):
        split_by_caption(groups(["cat", "Cat"]), 0.2, 0)


def test_captions_of_a_given_test_split_leave_the_train_split(caplog):
    test = groups(["Dog "])
    with caplog.at_level(logging.WARNING):
        assert list(without_captions_of(groups(["cat", "dog", "sun"]), test)["prompt"]) == ["cat", "sun"]
    assert "1 train rows are left out" in caplog.text
    with pytest.raises(ValueError, match="Every caption of the train split is in the test split"):
        without_captions_of(groups(["dog"]), test)


# Equalising


def test_images_of_any_size_and_codec_leave_the_path_alike():
    image = random_image(np.random.default_rng(0), (40, 24))
    assert Equalizer()(image) is image
    assert Equalizer(size=8)(image).size == (8, 8)
    coarse, fine = (np.asarray(Equalizer(size=16, jpeg=quality)(image), dtype=int) for quality in (10, 95))
    same = np.asarray(Equalizer(size=16)(image), dtype=int)
    assert 0 < abs(fine - same).mean() < abs(coarse - same).mean()
    assert str(Equalizer(16, 75)) == "16 x 16 pixels, JPEG of quality 75"
    assert str(Equalizer()) == "original sizes, no JPEG"
    assert middle((70, 95)) == 82 and middle(None) is None


def test_jpeg_and_png_of_one_picture_are_nearly_the_same_behind_the_path():
    ramp = np.linspace(0, 255, 64, dtype=np.uint8)
    picture = PILImage.fromarray(np.stack([np.tile(ramp, (64, 1))] * 3, axis=2))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=95)
    codec = PILImage.open(io.BytesIO(buffer.getvalue())).convert("RGB")
    path = Equalizer(32, 60)
    assert abs(np.asarray(path(picture), dtype=int) - np.asarray(path(codec), dtype=int)).max() <= 8


# Collating


def collate(captions, sources=None, **options):
    data = read_groups(groups(captions, sources), "train")
    return CaptionGroupCollator(tiny_processor("clip"), **options)([data[i] for i in range(len(data))])


def test_batch_encodes_each_caption_once_and_pads_short_rows():
    batch = collate(["cat", "dog", "Cat"], [["a", "real"], ["real", "a", "b"], ["real", "a"]])
    assert batch["ranks"].tolist() == [[2, 1, 0], [1, 2, 2], [1, 2, 0]]
    assert batch["mask"].tolist() == [[True, True, False], [True] * 3, [True, True, False]]
    assert batch["pixel_values"].shape == (7, 3, 16, 16)
    assert len(batch["input_ids"]) == 2
    assert batch["caption_of"].tolist() == [0, 0, 1, 1, 1, 0, 0]


def test_pixels_are_the_processors_of_the_row_in_order():
    data = groups(["cat", "dog"])
    images = [image for row in data["images"] for image in row]
    expected = tiny_processor("clip")(images=images)["pixel_values"]
    torch.testing.assert_close(collate(["cat", "dog"])["pixel_values"], expected)


def test_random_flip_mirrors_whole_rows_and_is_drawn_from_the_batch_alone():
    captions = [f"cat {'x' * i}" for i in range(12)]
    plain = collate(captions)["pixel_values"].unflatten(0, (12, 3))
    flipped = collate(captions, random_flip=True)["pixel_values"].unflatten(0, (12, 3))
    whole = [torch.equal(new, old.flip(-1)) for new, old in zip(flipped, plain, strict=True)]
    left = [torch.equal(new, old) for new, old in zip(flipped, plain, strict=True)]
    assert [a or b for a, b in zip(whole, left, strict=True)] == [True] * 12
    assert 0 < sum(whole) < 12
    torch.manual_seed(7)
    assert torch.equal(collate(captions, random_flip=True)["pixel_values"], flipped.flatten(0, 1))
    assert not torch.equal(collate(captions, random_flip=True, seed=1)["pixel_values"], flipped.flatten(0, 1))


def test_one_quality_for_a_batch_from_its_range():
    def fixed(quality):
        return collate(["cat", "dog"], jpeg=(quality, quality))["pixel_values"]

    drawn = {seed: collate(["cat", "dog"], jpeg=(60, 63), seed=seed)["pixel_values"] for seed in range(12)}
    found = {q for q in range(60, 64) for batch in drawn.values() if torch.equal(batch, fixed(q))}
    assert all(any(torch.equal(batch, fixed(q)) for q in range(60, 64)) for batch in drawn.values())
    assert len(found) > 1


def test_a_damaged_image_is_an_error_that_names_its_caption():
    row = read_groups(groups(["cat"]), "train")[0]
    row["images"][1] = {"bytes": b"no image", "path": None}
    with pytest.raises(ValueError, match=r"Image 1 of the row with the caption 'cat': the image can't be decoded"):
        CaptionGroupCollator(tiny_processor("clip"))([row])
