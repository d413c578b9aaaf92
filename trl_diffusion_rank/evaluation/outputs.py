"""What a comparison leaves behind: numbers, a table, a picture, and the dataset of its images."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
from datasets import Features, Value
from datasets import Image as ImageFeature
from PIL.Image import Image

from trl_diffusion_rank.data.artefact import FINISHED, Artefact, Card, public
from trl_diffusion_rank.evaluation.comparison import results_table
from trl_diffusion_rank.evaluation.drawing import BASE, JUDGED_AT_ONCE, Comparison, read_images
from trl_diffusion_rank.evaluation.grid import image_grid
from trl_diffusion_rank.evaluation.judges import Judge
from trl_diffusion_rank.evaluation.judging import Drawing, compare, read_values, verdicts_of
from trl_diffusion_rank.files import replace_file


# Columns of the picture: what fits a page.
GRID_COLUMNS = 10


def save_comparison(comparison: Comparison, judges: list[Judge], artefact: Artefact, warnings: list[str]) -> None:
    """Compare, write and print what comes out."""
    args, items = comparison.args, comparison.items
    values = {judge.name: read_values(comparison, judge) for judge in judges}
    results, by_category = compare(comparison, judges, values)
    verdicts = verdicts_of(results)
    num_prompts = len({item.prompt for item in items})

    texts = [f"> **Warning.** {warning}" for warning in warnings]
    texts.append(results_table(results))
    texts.append(
        f"{len(items)} images of {num_prompts} prompts, the same prompts and seeds for base and tuned. Intervals are "
        "bootstrap 95 %, resampled by prompt; effect size h is Cohen's for shares, d_z that of paired differences."
    )
    if args.real_images is not None:
        texts.append(
            f"`frechet` is the distance to real images in features of {public(args.feature_model)}, not the FID."
        )
    texts.append("\n".join(entry["text"] for entry in verdicts))
    if by_category:
        texts.append(
            "By category. Each interval is of 95 % by itself: of twenty categories without a change one looks changed "
            f"by chance.\n\n{results_table(by_category)}"
        )
    text = "\n\n".join(texts)

    metrics = {
        "options": asdict(args),
        "num_prompts": num_prompts,
        "num_images": len(items),
        "adapters": [name for name in comparison.adapters if name != BASE],
        "judges": [
            {"name": judge.name, "headline": judge.headline, "metrics": list(judge.metrics)}
            for judge in judges
            if judge.name is not None
        ],
        "warnings": warnings,
        "results": results,
        "by_category": by_category,
        "verdicts": verdicts,
        "drawn_by": comparison.drawn_by,
    }
    # Until the images are saved too, it isn't said whose the ones there are
    (artefact.folder / FINISHED).unlink(missing_ok=True)
    replace_file(artefact.folder / "metrics.json", json.dumps(metrics, indent=2, allow_nan=False) + "\n")
    replace_file(artefact.folder / "table.md", text + "\n")
    shown, grid = picture(comparison)
    buffer = io.BytesIO()
    grid.save(buffer, format="PNG")
    replace_file(artefact.folder / "grid.png", buffer.getvalue())
    save_images(comparison, judges, values, artefact, text)
    print(f"\n{text}\n\nPicture of the first {shown} prompts: {artefact.folder / 'grid.png'}")


def picture(comparison: Comparison) -> tuple[int, Image]:
    """How many prompts, different ones where there are enough, are in a picture of all models, and the picture."""
    prompts = [item.prompt for item in comparison.items]
    first = {prompt: place for place, prompt in reversed(list(enumerate(prompts)))}
    shown = [*sorted(first.values()), *sorted(set(range(len(prompts))) - set(first.values()))][:GRID_COLUMNS]
    rows = [
        (f"{name}, {steps} steps", read_images(comparison, name, steps, shown))
        for steps in comparison.args.num_inference_steps
        for name in comparison.adapters
    ]
    return len(shown), image_grid(rows, [prompts[place] for place in shown])


def save_images(
    comparison: Comparison,
    judges: list[Judge],
    values: dict[str | None, dict[Drawing, np.ndarray]],
    artefact: Artefact,
    text: str,
) -> None:
    """All images with their scores as the dataset, a row each."""
    columns = {column: (judge, k) for judge in judges for k, column in enumerate(judge.columns().values())}
    kinds = {"prompt": "string", "row": "int64", "category": "string", "index": "int64", "seed": "int64"}
    features = Features(
        {name: Value(kind) for name, kind in kinds.items()}
        | {"num_inference_steps": Value("int64"), "model": Value("string"), "image": ImageFeature()}
        | {column: Value("float64") for column in columns}
    )

    def batches() -> Iterator[dict[str, list[Any]]]:
        """A few items at a time, the images of each by all models one after another."""
        drawings = [(name, steps) for steps in comparison.args.num_inference_steps for name in comparison.adapters]
        keys = {drawing: comparison.keys(*drawing) for drawing in drawings}
        at_once = max(1, JUDGED_AT_ONCE // len(drawings))
        for start in range(0, len(comparison.items), at_once):
            places = range(start, min(start + at_once, len(comparison.items)))
            cells = [(place, drawing) for place in places for drawing in drawings]
            images = comparison.images.read([keys[drawing][place] for place, drawing in cells], ["image"])
            yield {
                **{name: [getattr(comparison.items[place], name) for place, _ in cells] for name in kinds},
                "num_inference_steps": [steps for _, (_, steps) in cells],
                "model": [name for _, (name, _) in cells],
                "image": [row["image"] for row in images],
                **{
                    column: [float(values[judge.name][drawing][place, k]) for place, drawing in cells]
                    for column, (judge, k) in columns.items()
                },
            }

    card = Card(
        title="Images of a base model and of tuned ones",
        text="Each row is an image of a prompt, drawn by the base model or by a tuned one from the same seed, with "
        "what the judges said of it.",
        columns={
            "prompt": "what the image is of",
            "row": "number of the prompt",
            "category": "of the prompt",
            "index": "which of the prompt's images",
            "seed": "of its noise",
            "num_inference_steps": "denoising steps",
            "model": f"`{BASE}`, or the adapter's name",
            "image": "PNG without loss",
            **{column: f"by the judge `{judge.name}`, higher is better" for column, (judge, _) in columns.items()},
        },
        stage="evaluate",
        options=asdict(comparison.args),
        sections={"Results": text, "A few prompts": "![Base above tuned](grid.png)"},
        tags=["text-to-image", "evaluation"],
    )
    artefact.save({"test": batches()}, features, card)
