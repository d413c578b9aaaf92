import base64
import io

import numpy as np
import pytest
import tiny_run
from PIL import Image

from trl_diffusion_rank.report import pairs as module
from trl_diffusion_rank.report.pairs import choose_rung, read_images, read_pairs, thumbnails
from trl_diffusion_rank.report.pictures import LADDER, encode, encode_picture, evenly
from trl_diffusion_rank.report.run import read_run


def decoded(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


@pytest.fixture
def make_pairs(tmp_path):
    def make(images, num_prompts=10, **options):
        tiny_run.write_evaluate(tmp_path, [f"prompt {row}" for row in range(num_prompts)], images, **options)
        return read_pairs(read_run(tmp_path).stages["evaluate"])

    return make


def test_pairs_are_put_together_from_single_images(make_pairs):
    images = [tiny_run.noise(16, seed) for seed in range(3)]
    pairs = make_pairs(images, num_prompts=6, adapters=("dpo", "cpo"), steps=(4, 20), categories=("Animals", None))
    assert pairs.models == ["base", "dpo", "cpo"]
    assert len(pairs.entries) == 6 * 2 * 2
    # By prompt, then steps, then seed: the order says nothing about gains
    keys = [(entry["row"], entry["steps"], entry["index"]) for entry in pairs.entries]
    assert keys == sorted(keys)
    # The judge's headline metric first
    assert [metric["label"] for metric in pairs.metrics] == ["digits good", "digits clean"]
    entry = pairs.entries[4 * 5]
    assert entry == {
        "prompt": "prompt 5",
        "row": 5,
        "category": None,
        "index": 0,
        "seed": 2**62 + 10,
        "steps": 4,
        "scores": [[0.25, pytest.approx(0.3), pytest.approx(0.35)], [0.5, 0.5, 0.5]],
    }
    found = [next(read_images(pairs.files, [row])) for row in pairs.rows[4 * 5]]
    assert found == [images[5 % 3], images[6 % 3], images[7 % 3]]


def test_tiny_images_are_kept_pixel_by_pixel(make_pairs):
    images = [tiny_run.noise(16, seed) for seed in range(4)]
    pairs = make_pairs(images, num_prompts=4, seeds=1, adapters=("dpo",), steps=(4,))
    shown, encoded = thumbnails(pairs, 10**6)
    assert shown.num_shown == 4
    for row, (base, tuned) in enumerate(encoded):
        for text, image in ((base, images[row]), (tuned, images[(row + 1) % 4])):
            assert np.array_equal(np.asarray(decoded(text).convert("RGB")), np.asarray(Image.open(io.BytesIO(image))))


@pytest.mark.parametrize("max_bytes", [1_000_000, 150_000])
def test_thumbnails_fit_at_the_finest_rung_that_does(make_pairs, max_bytes):
    pairs = make_pairs([tiny_run.noise(200, seed, block=2) for seed in range(3)], num_prompts=3, seeds=1)
    count = (pairs.rows >= 0).sum()
    rung, share = choose_rung(pairs, max_bytes)
    shown, encoded = thumbnails(pairs, max_bytes)
    size = sum(len(base64.b64decode(image)) for images in encoded for image in images)
    assert size <= max_bytes
    assert share == 1
    assert shown.num_shown == 3
    finer = LADDER.index(rung) - 1
    if finer >= 0:
        sizes = [
            len(encode(Image.open(io.BytesIO(image)), LADDER[finer])) for image in read_images(pairs.files, range(3))
        ]
        assert np.mean(sizes) * count > 0.9 * max_bytes


def test_an_even_part_of_the_prompts_when_even_the_coarsest_do_not_fit(make_pairs):
    images = [tiny_run.noise(112, seed) for seed in range(2)]
    pairs = make_pairs(images, num_prompts=20, seeds=1, adapters=("dpo",), steps=(4,))
    coarsest = len(encode(Image.open(io.BytesIO(images[0])), LADDER[-1]))
    shown, encoded = thumbnails(pairs, 20 * coarsest)  # half of 2 x 20
    assert 8 <= shown.num_shown <= 10
    assert shown.num_prompts == 20
    rows = [entry["row"] for entry in shown.entries]
    assert (rows[0], rows[-1]) == (0, 19)
    assert max(np.diff(rows)) <= 3
    assert sum(len(base64.b64decode(image)) for images in encoded for image in images) <= 20 * coarsest


def test_a_sample_that_was_easier_than_the_whole(make_pairs, monkeypatch):
    pairs = make_pairs([tiny_run.noise(200, seed) for seed in range(3)], num_prompts=4, seeds=1)
    monkeypatch.setattr(module, "choose_rung", lambda pairs, max_bytes: (LADDER[0], 1.0))
    _, encoded = thumbnails(pairs, 300_000)
    assert sum(len(base64.b64decode(image)) for images in encoded for image in images) <= 300_000
    assert max(decoded(encoded[0][0]).size) < 200


def test_an_image_that_is_not_there(make_pairs):
    pairs = make_pairs([tiny_run.noise(16, 0)], num_prompts=2, seeds=1, adapters=("dpo",), steps=(4,))
    pairs.rows[1, 1] = -1
    _, encoded = thumbnails(pairs, 10**6)
    assert encoded[1][1] == ""
    assert encoded[1][0]


def test_files_that_go_away_meanwhile(make_pairs):
    pairs = make_pairs([tiny_run.noise(16, 0)], num_prompts=2)
    pairs.files[0].unlink()
    assert thumbnails(pairs, 10**6) is None


def test_images_of_a_model_that_the_metrics_do_not_know(tmp_path):
    tiny_run.write_evaluate(tmp_path, ["a", "b"], [tiny_run.noise(16, 0)], adapters=("dpo", "cpo"))
    stage = read_run(tmp_path).stages["evaluate"]
    stage.metrics["adapters"] = ["dpo"]
    assert read_pairs(stage).models == ["base", "dpo"]


def test_a_picture_within_its_bytes(tmp_path):
    (tmp_path / "noise.png").write_bytes(tiny_run.noise(600, 0))
    assert len(encode_picture(tmp_path / "noise.png", 100_000)) <= 100_000
    assert encode_picture(tmp_path / "none.png", 100_000) is None
    (tmp_path / "half.png").write_bytes(tiny_run.noise(600, 0)[:1000])
    assert encode_picture(tmp_path / "half.png", 100_000) is None


def test_evenly():
    assert evenly(3, 5) == [0, 1, 2]
    assert evenly(0, 5) == []
    assert evenly(10, 4) == [0, 3, 6, 9]
    assert evenly(10, 1) == [0]
