import io
import json

import numpy as np
import pytest
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage
from sklearn.metrics import roc_auc_score

from trl_diffusion_rank.data.caption_groups import Equalizer, read_groups
from trl_diffusion_rank.evaluation.discrimination import (
    ImageFacts,
    ScoredGroups,
    area_under_curve,
    baselines,
    closed_shortcuts,
    discrimination,
    measured,
    other_paths,
    pair_share,
    picture,
    save_report,
    sentence,
    tables,
    top1,
    top_share,
    wilson_interval,
)


def scored(rows, captions=None, sources=("real", "a", "b")) -> ScoredGroups:
    """Rows of scores, the first of each the real image's."""
    return ScoredGroups(
        captions=captions or [f"caption {i}" for i in range(len(rows))],
        sources=[list(sources[: len(row)]) for row in rows],
        ranks=[np.array([1] + [2] * (len(row) - 1)) for row in rows],
        scores=[np.array(row, dtype=float) for row in rows],
    )


# Numbers


def test_shares_of_one_row_count_ties_by_halves():
    real = np.array([True, False, False])
    assert top_share(np.array([2.0, 1, 0]), real) == 1
    assert top_share(np.array([2.0, 3, 0]), real) == 0
    assert top_share(np.array([2.0, 2, 2]), real) == pytest.approx(1 / 3)  # a constant scorer has chance
    # 3 > 1, 3 = 3, 0 < 1, 0 < 3
    assert pair_share(np.array([3.0, 0]), np.array([1.0, 3])) == (1 + 0.5 + 0 + 0) / 4


def test_auc_is_scikit_learns_with_ties():
    generator = np.random.default_rng(0)
    scores, labels = generator.integers(0, 5, 60), generator.integers(0, 2, 60)
    expected = roc_auc_score(labels, scores)
    assert area_under_curve(np.stack([scores, labels], axis=1)) == pytest.approx(expected)


def test_wilson_interval_by_hand():
    # 8 of 10, z = 1.96: centre (0.8 + z^2/20) / (1 + z^2/10) = 0.7168, half-width 0.2267
    assert wilson_interval(0.8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)


def test_interval_knows_that_rows_of_one_caption_are_no_independent_evidence():
    hits = [1.0] * 40 + [0.0] * 40
    apart = measured(hits, [str(i) for i in range(80)], is_share=True)
    together = measured(hits, [str(i // 20) for i in range(80)], is_share=True)
    assert apart["interval"] == pytest.approx(wilson_interval(0.5, 80))
    assert together["value"] == apart["value"] == 0.5
    assert np.ptp(together["interval"]) > 2 * np.ptp(apart["interval"])
    # All hits would be all hits in every resample: four captions count as four cases
    sure = measured([1.0] * 80, [str(i // 20) for i in range(80)], is_share=True)
    assert sure["interval"] == pytest.approx(wilson_interval(1.0, 4))


def test_discrimination_by_hand():
    metrics = discrimination(scored([[3, 1, 2], [0, 1, -1], [5, 5, 1], [2, 0]]))
    assert (metrics["rows"], metrics["captions"], metrics["images"]) == (4, 4, [2, 3])
    assert metrics["chance"] == pytest.approx((3 / 3 + 1 / 2) / 4)
    assert metrics["top1"]["value"] == (1 + 0 + 0.5 + 1) / 4
    assert metrics["auc"]["value"] == pytest.approx(
        roc_auc_score([1, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0], [3, 1, 2, 0, 1, -1, 5, 5, 1, 2, 0])
    )
    a, b, real = (metrics["sources"][source] for source in ("a", "b", "real"))
    assert a["real_above"]["value"] == (1 + 0 + 0.5 + 1) / 4 and a["rows"] == 4
    assert b["real_above"]["value"] == 1 and b["rows"] == 3
    assert "real_above" not in real
    assert a["wins"]["value"] == (0 + 1 + 0.5 + 0) / 4
    assert real["mean_score"]["value"] == 2.5
    assert "kendall_tau" not in metrics
    json.dumps(metrics, allow_nan=False)


def test_several_images_of_one_source_are_one_row_of_it():
    metrics = discrimination(scored([[3, 1, 4], [3, 4, 5]], sources=("real", "a", "a")))
    assert metrics["sources"]["a"]["real_above"]["value"] == (0.5 + 0) / 2
    assert metrics["sources"]["a"]["wins"]["value"] == 1


def test_kendall_tau_where_there_is_an_order():
    groups = scored([[3, 2, 1], [1, 2, 3], [0, 0, 0]])
    groups.ranks = [np.array([1, 2, 3])] * 3
    assert discrimination(groups)["kendall_tau"]["value"] == pytest.approx((1 - 1 + 0) / 3)


def test_the_sentence():
    metrics = discrimination(scored([[3, 1, 2]] * 8 + [[0, 1, 2]] * 2))
    assert sentence(metrics) == "picks the real image in 80 % of cases [49, 94] among 3 (chance 33 %)"


# Shortcuts


def encoded(pixels, codec="PNG", **options):
    buffer = io.BytesIO()
    PILImage.fromarray(pixels).save(buffer, codec, **options)
    return {"bytes": buffer.getvalue(), "path": None}


def rows_where_real_differs_by(real, generated, count=60, seed=0) -> Dataset:
    """Rows of a real image and two generated ones, each made by a function of a random generator."""
    generator = np.random.default_rng(seed)
    features = Features({"prompt": Value("string"), "images": List(Image()), "sources": List(Value("string"))})
    rows = {
        "prompt": [f"caption {seed} {i}" for i in range(count)],
        "images": [[generated(generator), real(generator), generated(generator)] for _ in range(count)],
        "sources": [["a", "real", "b"]] * count,
    }
    return read_groups(Dataset.from_dict(rows, features=features), "train")


def noise(generator, side=16, low=0, high=256):
    return generator.integers(low, high, (side, side, 3), dtype=np.uint8)


NO_PATH = Equalizer()


def baselines_of(real, generated, path=NO_PATH):
    train, test = (rows_where_real_differs_by(real, generated, seed=seed) for seed in (0, 1))
    return {name: measure["value"] for name, measure in baselines(train, test, path, "real").items()}


def test_baselines_find_a_codec_and_lose_it_behind_the_path():
    found = baselines_of(lambda g: encoded(noise(g), "JPEG"), lambda g: encoded(noise(g)))
    assert found["dimensions and codec of the files"] == 1
    assert found["dimensions as equalised"] == pytest.approx(1 / 3)


def test_baselines_find_a_size_and_lose_it_behind_the_path():
    def real(g):
        return encoded(noise(g, side=int(g.integers(20, 30))))

    found = baselines_of(real, lambda g: encoded(noise(g)))
    assert found["dimensions and codec of the files"] == 1
    assert found["dimensions as equalised"] == 1  # nothing equalises
    found = baselines_of(real, lambda g: encoded(noise(g)), Equalizer(size=16))
    assert found["dimensions as equalised"] == pytest.approx(1 / 3)


def test_baselines_find_how_much_a_file_was_compressed_and_lose_it_behind_the_path():
    found = baselines_of(
        lambda g: encoded(noise(g), "JPEG", quality=95), lambda g: encoded(noise(g), "JPEG", quality=40)
    )
    assert found["dimensions and codec of the files"] == pytest.approx(1 / 3)
    assert found["dimensions, codec and bytes of the files"] == 1
    assert found["dimensions as equalised"] == pytest.approx(1 / 3)


def test_baselines_find_colour_and_sharpness():
    def flat(g):
        return encoded(np.full((16, 16, 3), 128, dtype=np.uint8) + noise(g, high=8))

    found = baselines_of(flat, lambda g: encoded(noise(g)))
    assert found["mean colour and sharpness as equalised"] == 1
    assert found["dimensions and codec of the files"] == pytest.approx(1 / 3)


def test_baselines_have_chance_where_nothing_differs():
    found = baselines_of(lambda g: encoded(noise(g)), lambda g: encoded(noise(g)), Equalizer(16, 80))
    assert set(found) == {
        "dimensions and codec of the files",
        "dimensions, codec and bytes of the files",
        "dimensions and bytes as equalised",
        "mean colour and sharpness as equalised",
    }
    for name, value in found.items():
        assert value == pytest.approx(1 / 3, abs=0.2), name  # 60 rows: a standard deviation is 0.06


def test_facts_of_an_image():
    gradient = np.zeros((8, 12, 3), dtype=np.uint8)
    gradient[..., 0] = 255
    data = rows_where_real_differs_by(lambda g: encoded(gradient), lambda g: encoded(noise(g)), count=1)
    facts = ImageFacts.of(data, Equalizer(8, 75))
    assert facts.files[0][1].tolist() == [12, 8, 1]
    assert facts.sizes[0][1] == len(data[0]["images"][1]["bytes"])
    assert facts.equalized[0][1][:2].tolist() == [8, 8] and facts.equalized[0].shape == (3, 3)
    assert facts.looks[0][1][:3] == pytest.approx([1, 0, 0], abs=0.02)
    assert facts.looks[0][1][3] < facts.looks[0][0][3]  # one colour is less sharp than noise


def test_other_paths_are_not_the_trained_one():
    assert other_paths(Equalizer(512, 80), shorter_side=999) == {
        "all at another size": Equalizer(384, 80),
        "all through another codec": Equalizer(512, 55),
        "both": Equalizer(384, 55),
    }
    assert other_paths(Equalizer(), shorter_side=16)["both"] == Equalizer(12, 90)


def test_closed_shortcuts_ask_for_scores_by_every_path():
    data = rows_where_real_differs_by(lambda g: encoded(noise(g)), lambda g: encoded(noise(g)), count=4)
    asked = []

    def score(rows, path):
        asked.append(path)
        return [np.array([0.0, 1.0 if path.jpeg is None else -1.0, 0.0])] * len(rows)

    found = closed_shortcuts(data, Equalizer(), score, "real")
    assert asked == [Equalizer(12), Equalizer(None, 90), Equalizer(12, 90)]
    assert [measure["value"] for measure in found.values()] == [1, 0, 0]


# Report


def test_report_has_the_numbers_in_words_and_a_picture(tmp_path):
    data = rows_where_real_differs_by(lambda g: encoded(noise(g)), lambda g: encoded(noise(g)), count=3)
    scores = [np.array([0.0, 2.0, -1.5])] * 3
    groups = ScoredGroups.of(data, scores, "real")
    metrics = discrimination(groups) | {"closed": {"all small": top1(groups)}, "baselines": {"sizes": top1(groups)}}
    save_report(tmp_path, metrics, picture(data, scores))
    text = (tmp_path / "table.md").read_text()
    assert sentence(metrics) in text
    for name in ("| real ", "| a ", "| b ", "the discriminator, all small", "baseline: sizes"):
        assert name in text
    assert json.loads((tmp_path / "metrics.json").read_text())["top1"]["value"] == 1
    assert list(tables(metrics)) == ["Held-out captions", "Shortcuts"]


def test_picture_has_the_highest_score_at_the_left():
    def plain(value):
        return lambda g: encoded(np.full((16, 16, 3), value, dtype=np.uint8))

    data = rows_where_real_differs_by(plain(250), plain(60), count=2)
    image = np.asarray(picture(data, [np.array([0.0, 2.0, -1.5]), np.array([3.0, 2.0, 1.0])]))
    middle = image.shape[0] // 4 + 10  # in the first row
    shown = [image[middle, 120 + column * (96 + 6) + 48, 0] for column in range(3)]
    assert shown == [250, 60, 60]
