"""What the judges say of a comparison's images, and what comes out of it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value
from tqdm import tqdm

from trl_diffusion_rank.data.images import decoded_batches
from trl_diffusion_rank.data.parts import Parts, missing_batches
from trl_diffusion_rank.evaluation.comparison import (
    Distance,
    Result,
    compare_diversity,
    compare_frechet,
    compare_metric,
    frechet,
    verdict,
)
from trl_diffusion_rank.evaluation.drawing import BASE, IMAGE_KEY, JUDGED_AT_ONCE, Comparison, image_kinds, read_images
from trl_diffusion_rank.evaluation.image_features import ImageFeatures, as_bytes, as_features
from trl_diffusion_rank.evaluation.judges import Judge, pixel_features
from trl_diffusion_rank.evaluation.statistics import FrechetReference, group_diversity
from trl_diffusion_rank.processes import free_memory, process_state


# Thumbnails that are in memory at once; those of one prompt always are.
THUMBNAILS_AT_ONCE = 2048

SCORE_KEY = ("judge", *IMAGE_KEY)

# A model by name and a number of steps.
Drawing = tuple[str, int]


def score_kinds() -> Features:
    """Columns of what a judge says of an image: the values of its metrics, and its features as bytes of float32."""
    key = {name: kind for name, kind in image_kinds().items() if name in IMAGE_KEY}
    return Features({"judge": Value("string"), **key, "values": List(Value("float64")), "features": Value("binary")})


# What the judges say ---------------------------------------------------


def embed_real_images(data: Dataset, split: str, model: str, parts: Parts) -> None:
    """Write the features of this process's share of the real images: first of all, so that a bad one is told now."""
    state = process_state()
    rest = missing_batches([(place,) for place in range(len(data))], parts.scan(), JUDGED_AT_ONCE)
    state.wait_for_everyone()  # all have looked before the first one writes
    batches = rest[state.process_index :: state.num_processes]
    if batches:
        network = ImageFeatures(model)
        total = sum(map(len, batches))
        with tqdm(total=total, desc="real images", unit="image", disable=not state.is_main_process) as bar:
            for batch, columns in decoded_batches(data, split, batches):
                parts.write({"place": batch, "features": list(map(as_bytes, network(columns["image"])))})
                bar.update(len(batch))
        del network
        free_memory()
    state.wait_for_everyone()
    parts.scan()


def judge_missing(comparison: Comparison, judges: list[Judge]) -> None:
    """Write this process's share of what the judges say and haven't said yet, one judge in memory at a time."""
    state = process_state()
    done = comparison.scores.scan()
    state.wait_for_everyone()  # all have looked before the first one writes
    for judge in judges:
        # Batches of each model and number of steps apart: the same places come together, and kernels round alike
        shares = [
            (name, steps, comparison.shares(comparison.keys(name, steps, judge), done, JUDGED_AT_ONCE))
            for name, steps in comparison.drawings
        ]
        total = sum(len(batch) for *_, batches in shares for batch in batches)
        title = judge.name or "features"
        with tqdm(total=total, desc=title, unit="image", disable=not (total and state.is_main_process)) as bar:
            for name, steps, batches in shares:
                for batch in batches:
                    judge_batch(comparison, judge, name, steps, batch)
                    bar.update(len(batch))
        judge.unload()
        free_memory()
    state.wait_for_everyone()
    comparison.scores.scan()


def judge_batch(comparison: Comparison, judge: Judge, name: str, steps: int, batch: list[int]) -> None:
    """Write what a judge says of a batch of a model's images."""
    images = read_images(comparison, name, steps, batch)
    metrics = judge.judge(images, [comparison.items[i].prompt for i in batch])
    features = judge.features(images)
    keys = zip(*comparison.keys(name, steps, judge, batch), strict=True)
    comparison.scores.write(
        {
            **{column: list(values) for column, values in zip(SCORE_KEY, keys, strict=True)},
            "values": [[float(metrics[metric][i]) for metric in judge.metrics] for i in range(len(batch))],
            "features": [None] * len(batch) if features is None else list(map(as_bytes, features)),
        }
    )


# What is compared ------------------------------------------------------


def read_values(comparison: Comparison, judge: Judge) -> dict[Drawing, np.ndarray]:
    """A judge's metrics `(N, k)` of each model at each number of steps."""
    return {
        drawing: np.array([row["values"] for row in comparison.scores.read(keys, ["values"])]).reshape(len(keys), -1)
        for drawing in comparison.drawings
        for keys in [comparison.keys(*drawing, judge)]
    }


def read_distances(comparison: Comparison, judge: Judge) -> dict[Drawing, Distance]:
    """The Frechet distances of each model at each number of steps, where the judge has a reference."""
    features = judge.reference_features()
    if features is None:
        return {}
    reference = FrechetReference(features)
    prompts = [item.prompt for item in comparison.items]
    distances = {}
    for drawing in comparison.drawings:
        rows = comparison.scores.read(comparison.keys(*drawing, judge), ["features"])
        drawn = np.stack([as_features(row["features"]) for row in rows])
        distances[drawing] = frechet(drawn, reference, prompts, comparison.args.seed)
    return distances


def read_diversities(comparison: Comparison, groups: list[str]) -> dict[Drawing, np.ndarray]:
    """The diversity `(G,)` within the G groups that have two images, of each model at each number of steps."""
    sizes = Counter(groups)
    order = sorted((place for place, group in enumerate(groups) if sizes[group] > 1), key=lambda place: groups[place])
    chunks: list[list[int]] = []
    for place in order:  # whole groups
        if not chunks or (len(chunks[-1]) >= THUMBNAILS_AT_ONCE and groups[place] != groups[chunks[-1][-1]]):
            chunks.append([])
        chunks[-1].append(place)
    diversities = {}
    for drawing in comparison.drawings:
        of_chunks = [np.empty(0)]
        for chunk in chunks:
            rows = comparison.images.read(comparison.keys(*drawing, places=chunk), ["thumbnail"])
            features = pixel_features([np.frombuffer(row["thumbnail"], dtype=np.uint8) for row in rows])
            of_chunks.append(group_diversity(features, [groups[place] for place in chunk]))
        diversities[drawing] = np.concatenate(of_chunks)
    return diversities


def compare(
    comparison: Comparison, judges: list[Judge], values: dict[str | None, dict[Drawing, np.ndarray]]
) -> tuple[list[Result], list[Result]]:
    """
    The results of each adapter at each number of steps, and those of the headline metrics by category.

    Args:
        values: of each judge by name, see [`read_values`].
    """
    args = comparison.args
    prompts = np.array([item.prompt for item in comparison.items])
    categories = np.array([item.category or "" for item in comparison.items])
    named = [category for category in dict.fromkeys(categories.tolist()) if category]
    distances = {judge.name: read_distances(comparison, judge) for judge in judges}
    diversities = read_diversities(comparison, judges[0].groups(prompts.tolist()))
    results, by_category = [], []
    for name, steps in comparison.drawings:
        if name == BASE:
            continue
        base, tuned = (BASE, steps), (name, steps)
        head = {"adapter": name, "num_inference_steps": steps, "category": None}
        for judge in judges:
            ours = values[judge.name]
            for column, metric in enumerate(judge.metrics):
                head |= {"judge": judge.name, "metric": metric, "decides": metric == judge.headline}
                pair = ours[base][:, column], ours[tuned][:, column]
                results.append({**head, **compare_metric(*pair, prompts, args.seed)})
                for category in named if head["decides"] else []:
                    own = categories == category
                    result = compare_metric(pair[0][own], pair[1][own], prompts[own], args.seed)
                    by_category.append({**head, "category": category, **result})
            if distances[judge.name]:
                result = compare_frechet(distances[judge.name][base], distances[judge.name][tuned])
                results.append({**head, "judge": judge.name, "metric": "frechet", "decides": True, **result})
        diversity = compare_diversity(diversities[base], diversities[tuned], args.seed)
        if diversity is not None:
            results.append({**head, "judge": None, "metric": "diversity", "decides": False, **diversity})
    return results, by_category


def verdicts_of(results: list[Result]) -> list[dict[str, Any]]:
    """What is to be said of each adapter at each number of steps."""
    verdicts = []
    several = len({result["adapter"] for result in results}) > 1
    for name, steps in dict.fromkeys((result["adapter"], result["num_inference_steps"]) for result in results):
        own = [result for result in results if (result["adapter"], result["num_inference_steps"]) == (name, steps)]
        word, sentence = verdict(own)
        text = f"{name}, " * several + f"{steps} steps: {sentence}"
        verdicts.append({"adapter": name, "num_inference_steps": steps, "verdict": word, "text": text})
    return verdicts
