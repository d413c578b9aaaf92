"""What the benchmarks on the embedded world share: training a LoRA on its ranked lists, and judging it."""

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from transformers.utils import logging as transformers_logging

from trl_diffusion_rank import RankedDiffusionDPOConfig, RankedDiffusionDPOTrainer, load_pipeline
from trl_diffusion_rank.data.loading import load_splits
from trl_diffusion_rank.data.ranked_rows import IMAGES, to_ranked
from trl_diffusion_rank.diffusion.draws import stable_seed
from trl_diffusion_rank.diffusion.sampling import load_tuned, sample_images
from trl_diffusion_rank.evaluation.judges import DigitsWorldJudge, Judge, pixel_features, thumbnail
from trl_diffusion_rank.evaluation.statistics import bootstrap_interval, diversity, frechet_distance
from trl_diffusion_rank.objectives.ranking import extremes
from trl_diffusion_rank.scorers import Scorer


FORWARDS = 40  # images a step
STEPS_OF_SAMPLING = (4, 20)
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"]
LORA_TARGETS += ["conv1", "conv2", "conv_shortcut"]


class BestOnlyTrainer(RankedDiffusionDPOTrainer):
    """Supervised fine-tuning: the best images' denoising error, and nothing else is forwarded."""

    def _compute_loss(self, model, inputs, return_outputs) -> Tensor:
        best, _ = extremes(inputs["ranks"], inputs["mask"])
        error, _, _ = self._errors(model, {**inputs, "mask": best}, "train")
        return error.sum() / best.sum()


def training_data(lists: Dataset, kind: str, seed: int) -> Dataset:
    """The lists as they are, with shuffled ranks, or cut down to their best and worst image."""
    generator = np.random.default_rng(seed)

    def change(row):
        if kind == "shuffled":
            row["ranks"] = generator.permutation(row["ranks"]).tolist()
        else:
            places = [int(np.argmin(row["ranks"])), int(np.argmax(row["ranks"]))]
            row = {"prompt": row["prompt"], IMAGES: [row[IMAGES][i] for i in places], "ranks": [1, 2]}
        return row

    lists = to_ranked(lists, "train").select_columns(["prompt", IMAGES, "ranks"])
    return lists if kind == "lists" else lists.map(change, load_from_cache_file=False)


def train(
    lists: Dataset,
    folder: str,
    *,
    seed: int,
    kind: str = "lists",
    trainer_class: type = RankedDiffusionDPOTrainer,
    config_class: type = RankedDiffusionDPOConfig,
    **options: Any,
) -> dict[str, float]:
    """Train a LoRA into `folder`, 200 steps of 40 image-forwards unless told otherwise; returns TRL's last metrics."""
    images_per_row = 1 if trainer_class is BestOnlyTrainer else 2 if kind == "pairs" else 4
    defaults = {
        "learning_rate": 3e-4,
        "lr_scheduler_type": "constant",
        "max_steps": 200,
        "per_device_train_batch_size": FORWARDS // images_per_row,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "encode_batch_size": 200,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    trainer = trainer_class(
        model="digits",
        args=config_class(folder, seed=seed, **(defaults | options)),
        train_dataset=training_data(lists, kind, seed),
        peft_config=LoraConfig(r=8, lora_alpha=8, target_modules=LORA_TARGETS),
    )
    metrics = trainer.train().metrics
    trainer.save_model()
    return {"seconds": metrics["train_runtime"], "steps": trainer.state.global_step}


def evaluate(
    adapter: str | None, prompts: list[str], judge: Judge, second: Scorer | None = None
) -> dict[str, float | list[float]]:
    """
    Shares, Frechet distance and diversity of one image a prompt at each number of steps, seeds fixed; and the mean
    score of a `second` scorer.
    """
    pipeline = load_pipeline("digits")
    pipeline.set_progress_bar_config(disable=True)
    if adapter:
        load_tuned(pipeline, adapter)
    seeds = [stable_seed("listwise_vs_pairwise", row) for row in range(len(prompts))]
    numbers = {}
    for steps in STEPS_OF_SAMPLING:
        images = sample_images(
            pipeline, prompts, seeds, num_inference_steps=steps, guidance_scale=2.0, batch_size=120, progress=None
        )
        judged = judge.judge(images, prompts)
        numbers[f"clean@{steps}"] = float(judged["clean"].mean())
        numbers[f"good@{steps}"] = float(judged["good"].mean())
        numbers[f"good@{steps} per image"] = judged["good"].tolist()
        numbers[f"frechet@{steps}"] = frechet_distance(judge.features(images), judge.reference_features())
        numbers[f"diversity@{steps}"] = diversity(
            pixel_features([thumbnail(image) for image in images]), judge.groups(prompts)
        )
        if second is not None:
            numbers[f"second@{steps}"] = float(np.mean(second.score(images, prompts)))
    return numbers


def table(results: dict[str, list[dict]]) -> str:
    """Means over seeds; `good` with a bootstrap 95 % interval over prompts, the images of all seeds taken together."""
    names = ("clean", "good", "frechet", "diversity", "second")
    columns = [f"{name}@{steps}" for steps in STEPS_OF_SAMPLING for name in names]
    columns = [column for column in columns if all(column in run for runs in results.values() for run in runs)]
    lines = ["| method (beta), trainings | " + " | ".join(columns) + " | seconds |", "|---" * (len(columns) + 2) + "|"]
    for name, runs in results.items():
        cells = [f"{name}, {len(runs)}"]
        for column in columns:
            mean = np.mean([run[column] for run in runs])
            cell = f"{mean:.1f}" if column.startswith(("frechet", "second")) else f"{mean:.2f}"
            if column.startswith("good"):
                per_prompt = np.mean([run[f"{column} per image"] for run in runs], axis=0)
                low, high = bootstrap_interval(per_prompt)
                cell += f" [{low:.2f}, {high:.2f}]"
            cells.append(cell)
        seconds = [run["seconds"] for run in runs if run["seconds"]]
        cells.append(f"{np.mean(seconds):.0f}" if seconds else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def load_run(run_dir: Path, parser: argparse.ArgumentParser) -> tuple[Dataset, list[str], Judge]:
    """The ranked lists and test prompts of a finished run, and the judge. Sets up one quiet thread."""
    if not (run_dir / "score" / "stage.json").exists():
        parser.error(
            f"`{run_dir}` holds no ranked images. First: trl-diffusion-rank run --recipe "
            "recipes/digits_cpo_rank4.yaml --only prompts generate score"
        )
    torch.set_num_threads(1)  # the model is so small that a second thread costs more than it brings
    transformers_logging.set_verbosity_error()
    lists = load_splits(str(run_dir / "score"))["train"]
    prompts = list(load_splits(str(run_dir / "prompts"))["test"]["prompt"])
    return lists, prompts, DigitsWorldJudge()


def run_methods(
    methods: dict[str, dict | None],
    doc: str,
    default_seeds: int,
    output: str,
    run_dir: str = "runs/digits_cpo_rank4",
    second: Callable[[], Scorer] | None = None,
    parents: Sequence[argparse.ArgumentParser] = (),
) -> None:
    """
    The command line of a benchmark: train and judge every method, and print the table as it grows.

    Args:
        methods: name to the arguments of [`train`], or None for the base model.
        doc: the benchmark's docstring, for `--help`.
        default_seeds: trainings of each method.
        output: JSON file of every number of every run; a benchmark that was cut off goes on from it.
        run_dir: where the lists are, unless the command line says otherwise.
        second: loads a scorer that took no part, whose mean score is in the table.
        parents: parsers of the benchmark's own options, which it has read already.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, parents=parents, allow_abbrev=False
    )
    parser.add_argument("--run_dir", default=run_dir, help="finished run with the stages up to `score`")
    parser.add_argument(
        "--seeds", type=int, default=default_seeds, help=f"trainings a method (default: {default_seeds})"
    )
    parser.add_argument("--methods", nargs="+", default=list(methods), choices=list(methods), metavar="METHOD")
    parser.add_argument("--output", default=output, help="every number of every run")
    args = parser.parse_args()
    lists, prompts, judge = load_run(Path(args.run_dir), parser)
    path = Path(args.output)
    results = json.loads(path.read_text()) if path.exists() else {}
    scorer = second() if second is not None else None
    for name in args.methods:
        runs = results.setdefault(name, [])
        for seed in range(len(runs), 1 if methods[name] is None else args.seeds):
            with tempfile.TemporaryDirectory() as folder:
                if methods[name] is None:
                    runs.append({"seconds": None, **evaluate(None, prompts, judge, scorer)})
                else:
                    trained = train(lists, folder, seed=seed, **methods[name])
                    runs.append({**trained, **evaluate(folder, prompts, judge, scorer)})
            path.write_text(json.dumps(results))
            print(table({name: runs}), flush=True)
    print("\n" + table({name: results[name] for name in args.methods}))
