"""Run folders as the stages leave them, with images that nobody drew: what the report is tested on."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image


IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
HARDWARE = {
    "platform": "Linux x86_64",
    "python": "3.11.7",
    "cpu": "Some CPU",
    "cpu_cores": 8,
    "memory_gb": 31.2,
    "gpus": [{"name": "Some GPU", "memory_gb": 80.0}] * 2,
}
# What must neither end the page's data, nor be read as its tags
NASTY = [
    "</script><script>document.title='taken over'</script>",
    "\"quotes\" & 'more' <b>bold</b>",
    "שלום עולם",
    "a 🦊 <!-- x",
]


def write_json(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def png(pixels: np.ndarray) -> bytes:
    target = io.BytesIO()
    Image.fromarray(pixels).save(target, "PNG")
    return target.getvalue()


def noise(side: int, seed: int, block: int = 1) -> bytes:
    """A PNG of noise, the hardest picture to compress; every pixel repeated to a block."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side // block, side // block, 3), dtype=np.uint8)
    return png(np.kron(pixels, np.ones((block, block, 1), dtype=np.uint8)))


def write_table(folder: Path, split: str, columns: dict, types: dict) -> None:
    (folder / "data").mkdir(parents=True, exist_ok=True)
    table = pa.table({name: pa.array(values, types.get(name)) for name, values in columns.items()})
    pq.write_table(table, folder / "data" / f"{split}-00000-of-00001.parquet", row_group_size=32)
    write_json(folder / "artefact.json", {"made_of": "0" * 16, "rows": {split: len(table)}})


def stage(folder: Path, name: str, options=None, seconds=60.0, status="finished") -> Path:
    record = {
        "stage": name,
        "status": status,
        "fingerprint": name,
        "started": "2026-11-23T13:12:11+00:00",
        "seconds": seconds if status == "finished" else None,
        "options": options or {},
        "inputs": {},
        "versions": {"trl": "1.16.0", "torch": "2.13.0"},
        "hardware": HARDWARE,
    }
    write_json(folder / name / "stage.json", record)
    return folder / name


# The stages ------------------------------------------------------------


def write_score(run: Path, rows: int = 6) -> None:
    folder = stage(run, "score", {"scorers": [{"name": "pickscore"}, {"name": "clip"}]})
    draw = np.random.default_rng(0)
    pick = draw.normal(21, 1, (rows, 3))
    columns = {
        "prompt": [f"prompt {row}" for row in range(rows)],
        "images": [[{"bytes": noise(8, row), "path": None}] * 3 for row in range(rows)],
        "sources": [["a<b>", "b", "b"]] * rows,
        "score_pickscore": pick.tolist(),
        "score_clip": (-pick).tolist(),  # the opposite order
        "ranks": (1 + (-pick).argsort(1).argsort(1)).tolist(),
    }
    write_table(folder, "train", columns, {"images": pa.list_(IMAGE)})
    Image.new("RGB", (400, 300), "teal").save(folder / "rows.png")


def write_training(run: Path, name: str = "dpo", steps: int = 200, displaced: int | None = None, **record) -> None:
    options = {"model_name_or_path": "/home/somebody/models/tiny", "max_steps": steps, "use_peft": True, "lora_r": 8}
    folder = stage(run, name, options, **record)
    log = []
    for step in range(20, steps + 1, 20):
        entry = {"step": step, "epoch": step / 100, "loss": 1 - step / 400, "grad_norm": 2.0, "learning_rate": 3e-4}
        entry |= {"rewards/chosen": 0.1, "rewards/rejected": -step / 100, "rewards/margins": 0.1 + step / 100}
        entry |= {"rewards/accuracies": 0.7, "rewards/kendall_tau": 0.4, "rewards/saturation": 0.2}
        entry |= {"error/chosen": 0.2, "error/rejected": 0.3}
        entry |= {"error/chosen_delta": step / 2000, "error/rejected_delta": step / 1000}
        if step == displaced:
            entry |= {"displacement": 1.0, "skipped_steps": 3}
        log.append(entry)
    log += [{"step": steps, "epoch": 2.0, "eval_loss": 0.6}, {"step": steps, "epoch": 2.0, "train_runtime": 12.0}]
    lines = "".join(json.dumps(entry) + "\n" for entry in log)
    (folder / "log_history.jsonl").write_text(lines)
    for step in (0, steps // 2, steps):
        (folder / "samples").mkdir(exist_ok=True)
        Image.new("RGB", (300, 100), (step % 256, 80, 80)).save(folder / "samples" / f"step-{step:06d}.png")
    record = {"prompts": ["x"], "seeds": [1], "num_inference_steps": 20, "guidance_scale": None}
    write_json(folder / "samples" / "samples.json", {**record, "steps": [0, steps // 2, steps]})


def write_discriminator(run: Path) -> None:
    folder = stage(run, "discriminator")
    share = {"value": 0.968, "interval": [0.926, 1.0], "n": 93}
    write_json(folder / "metrics.json", {"rows": 93, "chance": 0.2, "top1": share})
    table = "## Held-out captions\n\nOn 93 rows.\n\n| source | rows |\n|--------|-----:|\n| a \\| b | 93 |\n"
    (folder / "table.md").write_text(table)
    Image.new("RGB", (300, 200), "olive").save(folder / "rows.png")


def write_evaluate(
    run: Path,
    prompts: list[str],
    images: list[bytes],
    seeds: int = 2,
    adapters: tuple[str, ...] = ("dpo", "cpo"),
    steps: tuple[int, ...] = (4, 20),
    categories: tuple[str | None, ...] = ("Animals", "People"),
) -> None:
    """
    Every prompt's images are some of `images`. The judge `digits` finds adapter a better than base on all prompts but
    every third, which is a tie, and every fourth, which is worse; the metric `clean` sees no difference.
    """
    folder = stage(run, "evaluate", {"model": "tiny"})
    columns: dict[str, list] = {name: [] for name in ("prompt", "row", "category", "index", "seed")}
    columns |= {name: [] for name in ("num_inference_steps", "model", "image")}
    columns |= {"score_digits_good": [], "score_digits_clean": []}
    for model, name in enumerate(("base", *adapters)):
        for count in steps:
            for row, prompt in enumerate(prompts):
                for index in range(seeds):
                    gain = 0 if row % 3 == 0 else -0.5 if row % 4 == 0 else row / 100
                    columns["prompt"].append(prompt)
                    columns["row"].append(row)
                    columns["category"].append(categories[row % len(categories)])
                    columns["index"].append(index)
                    columns["seed"].append(2**62 + 2 * row + index)
                    columns["num_inference_steps"].append(count)
                    columns["model"].append(name)
                    columns["image"].append({"bytes": images[(row + model) % len(images)], "path": None})
                    columns["score_digits_good"].append(0.25 + gain * model)
                    columns["score_digits_clean"].append(0.5)
    write_table(folder, "test", columns, {"image": IMAGE, "category": pa.string(), "seed": pa.int64()})

    entries = [
        result(adapter, count, metric, decides)
        for adapter in adapters
        for count in steps
        for metric, decides in (("clean", False), ("good", True), ("frechet", True), ("diversity", False))
    ]
    by_category = [
        {**entry, "category": category}
        for entry in entries
        if entry["metric"] == "good"
        for category in categories
        if category
    ]
    verdicts = [
        {"adapter": adapter, "num_inference_steps": count, "verdict": "better", "text": "better"}
        for adapter in adapters
        for count in steps
    ]
    metrics = {
        "options": {"adapters": ["/home/somebody/dpo"]},
        "num_prompts": len(prompts),
        "num_images": len(prompts) * seeds,
        "adapters": list(adapters),
        "judges": [{"name": "digits", "headline": "good", "metrics": ["clean", "good"]}],
        "warnings": ["The only judge labelled the training data."],
        "results": entries,
        "by_category": by_category,
        "verdicts": verdicts,
    }
    write_json(folder / "metrics.json", metrics)


def result(adapter: str, steps: int, metric: str, decides: bool) -> dict:
    entry = {
        "adapter": adapter,
        "num_inference_steps": steps,
        "category": None,
        "judge": None if metric == "diversity" else "digits",
        "metric": metric,
        "decides": decides,
        "higher_is_better": {"frechet": False, "diversity": None}.get(metric, True),
        "base": 0.45,
        "base_interval": [0.4, 0.5],
        "tuned": 0.9,
        "tuned_interval": [0.85, 0.95],
        "difference": 0.45,
        "difference_interval": [0.4, 0.5],
    }
    if metric in ("good", "clean"):
        rate = 0.7 + steps / 1000 if metric == "good" else 0.5
        entry |= {"win_rate": rate, "win_rate_interval": [rate - 0.04, rate + 0.05]}
        entry |= {"effect_size": 1.05, "effect_size_kind": "cohens_h", "sign_test_p": 1e-9}
    return entry


def write_run(run: Path) -> Path:
    """All that a run can hold, small: twelve prompts, some of them nasty, two adapters, two numbers of steps."""
    write_json(stage(run, "prompts") / "artefact.json", {"made_of": "", "rows": {"train": 6, "test": 12}})
    write_score(run)
    write_discriminator(run)
    write_training(run, "dpo")
    write_training(run, "cpo", displaced=100)
    prompts = NASTY + [f"prompt number {row}" for row in range(len(NASTY), 12)]
    write_evaluate(run, prompts, [noise(16, seed) for seed in range(5)])
    push = {"model": {"repo_id": "me/x", "url": "https://huggingface.co/me/x", "commit": "1"}, "dataset": None}
    write_json(stage(run, "push") / "push.json", push)
    recipe = {"shared": {"seed": 0}, "dpo": {"model_name_or_path": "/home/somebody/models/tiny"}, "evaluate": {}}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return run
