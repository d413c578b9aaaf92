"""Base against tuned: the same prompts and seeds, judged by others than those that ranked.

    trl-diffusion-rank evaluate --model stabilityai/stable-diffusion-xl-base-1.0 --adapter runs/mine/dpo \\
        --dataset_name runs/mine/prompts --judges pickscore --output_dir runs/mine/evaluate

At each number of steps every judge sees both models' images. The report gives each metric's mean for base and tuned,
their difference and the win rate with bootstrap 95 % intervals (resampled by prompt), an effect size (Cohen's h for
shares, the paired d_z for scores) and the p of a sign test; where a judge has a reference, Frechet distances; where
prompts have several images, the diversity within them. A judge that is also the scorer of the ranking says how well
its own taste was learnt, no more.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from trl_diffusion_rank.scorers import check_scorer, known_scorers
from trl_diffusion_rank.stages._common import (
    DTYPES,
    check_at_least,
    check_choice,
    format_table,
    load_for_sampling,
    process_state,
    require,
)


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL.Image import Image

    from trl_diffusion_rank.evaluation.judges import Judge
    from trl_diffusion_rank.evaluation.report import Result


HELP = "compare base and tuned model on the test prompts"
INPUTS = {"adapter": ("dpo", "cpo"), "dataset_name": "prompts"}

# Columns of the picture: what fits a page.
GRID_COLUMNS = 10


@dataclass
class EvaluateArguments:
    """
    Arguments of the stage `evaluate`.

    Args:
        model (`str`, *optional*):
            Hub id or folder of the base model, or `digits` for the one in this package.
        adapter (`str`, *optional*):
            The tuned weights: LoRA folder or Hub id, or a folder with full weights in `unet/` or `transformer/`; in a
            run the output of the training stage, `dpo` or `cpo`.
        dataset_name (`str`, *optional*):
            Dataset with a column `prompt`; in a run the prompts of the stage `prompts`.
        dataset_split (`str`, *optional*, defaults to `"test"`):
            Its split.
        num_prompts (`int`, *optional*):
            The first so many prompts; all when unset.
        images_per_prompt (`int`, *optional*, defaults to `1`):
            Images of each prompt. From 2 on there is a diversity to report.
        num_inference_steps (`list[int]`, *optional*, defaults to `[25]`):
            Numbers of denoising steps. Over-optimisation shows at few steps first.
        guidance_scale (`float`, *optional*):
            Classifier-free guidance; the pipeline's own default when unset.
        judges (`list[str]`, *optional*):
            `digits` for the judges of the embedded world, or names of scorers.
        batch_size (`int`, *optional*, defaults to `8`):
            Images drawn at once.
        dtype (`str`, *optional*, defaults to `"auto"`):
            `float32`, `bfloat16`, `float16`, or `auto`: bfloat16 on an accelerator, float32 on a CPU.
        height (`int`, *optional*), width (`int`, *optional*):
            Size in pixels; the model's own size when unset.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the images and of the resampling.
        output_dir (`str`, *optional*):
            Folder of metrics.json, table.md and grid.png.
    """

    model: str | None = field(
        default=None, metadata={"help": "Hub id or folder of the base model, or `digits` for the one in this package."}
    )
    adapter: str | None = field(
        default=None,
        metadata={"help": "LoRA or full weights of the tuned model; in a run the output of `dpo` or `cpo`."},
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Dataset with a column `prompt`; in a run the output of `prompts`."}
    )
    dataset_split: str = field(default="test", metadata={"help": "Split of the prompts."})
    num_prompts: int | None = field(default=None, metadata={"help": "The first so many prompts; all when unset."})
    images_per_prompt: int = field(default=1, metadata={"help": "Images of each prompt."})
    num_inference_steps: list[int] = field(
        default_factory=lambda: [25], metadata={"help": "Numbers of denoising steps to compare at."}
    )
    guidance_scale: float | None = field(
        default=None, metadata={"help": "Classifier-free guidance; the pipeline's own default when unset."}
    )
    judges: list[str] | None = field(default=None, metadata={"help": "`digits`, or names of scorers."})
    batch_size: int = field(default=8, metadata={"help": "Images drawn at once."})
    dtype: str = field(
        default="auto", metadata={"help": "float32, bfloat16, float16, or auto (bfloat16 on an accelerator)."}
    )
    height: int | None = field(default=None, metadata={"help": "Height in pixels; the model's own when unset."})
    width: int | None = field(default=None, metadata={"help": "Width in pixels; the model's own when unset."})
    seed: int = field(default=0, metadata={"help": "Seed of the images and of the resampling."})
    output_dir: str | None = field(default=None, metadata={"help": "Folder of metrics.json, table.md, grid.png."})

    def __post_init__(self) -> None:
        if not self.judges:
            raise ValueError("`judges` is empty; name `digits` or a scorer, for example --judges pickscore.")
        for name in self.judges:
            check_choice("judges", name, ("digits", *known_scorers()))
            if name != "digits":
                check_scorer(name)  # whose package may not be installed
        if not self.num_inference_steps:
            raise ValueError("`num_inference_steps` is empty; give at least one number of steps.")
        for steps in self.num_inference_steps:
            check_at_least(1, num_inference_steps=steps)
        check_choice("dtype", self.dtype, DTYPES)
        check_at_least(1, num_prompts=self.num_prompts, images_per_prompt=self.images_per_prompt)
        check_at_least(1, batch_size=self.batch_size, height=self.height, width=self.width)


def argument_classes() -> tuple[type, ...]:
    return (EvaluateArguments,)


def sample_all_steps(
    pipe: DiffusionPipeline, title: str, prompts: list[str], seeds: list[int], args: EvaluateArguments
) -> dict[int, list[Image]]:
    """Images of all prompts at every number of steps. Processes share the work, and each gets all of it."""
    from accelerate.utils import gather_object

    from trl_diffusion_rank.diffusion.sampling import is_black, sample_images

    state = process_state()
    mine = range(state.process_index, len(prompts), state.num_processes)
    images = {}
    for steps in args.num_inference_steps:
        own = sample_images(
            pipe,
            [prompts[i] for i in mine],
            [seeds[i] for i in mine],
            num_inference_steps=steps,
            guidance_scale=args.guidance_scale,
            batch_size=args.batch_size,
            height=args.height,
            width=args.width,
            progress=f"{title}, {steps} steps" if state.is_main_process else None,
        )
        gathered = dict(gather_object(list(zip(mine, own, strict=True))))
        images[steps] = [gathered[i] for i in range(len(prompts))]
        black = sum(map(is_black, images[steps]))
        if black == len(prompts):
            raise ValueError(
                f"All images of the {title} model at {steps} steps are black. `dtype` is {args.dtype!r}: a VAE that "
                "overflows in float16 does this (use bfloat16 or float32), and so do weights that are NaN and a "
                "safety checker."
            )
        if black and state.is_main_process:
            print(
                f"{black} of {len(prompts)} images of the {title} model at {steps} steps are black; they are judged."
            )
    return images


def compare(base: list[Image], tuned: list[Image], prompts: list[str], judges: list[Judge], seed: int) -> list[Result]:
    """All results at one number of steps."""
    from trl_diffusion_rank.evaluation.judges import pixel_features
    from trl_diffusion_rank.evaluation.report import compare_diversity, compare_frechet, compare_metric

    results = []
    for judge in judges:
        ours, theirs = judge.judge(tuned, prompts), judge.judge(base, prompts)
        for metric, values in ours.items():
            result = compare_metric(theirs[metric], values, prompts, seed)
            results.append({"judge": judge.name, "metric": metric, "decides": metric == judge.headline, **result})
        reference = judge.reference_features()
        if reference is not None:
            result = compare_frechet(judge.features(base), judge.features(tuned), reference, prompts, seed)
            results.append({"judge": judge.name, "metric": "frechet", "decides": True, **result})
    diversity = compare_diversity(pixel_features(base), pixel_features(tuned), judges[0].groups(prompts), seed)
    if diversity is not None:
        results.append({"judge": None, "metric": "diversity", "decides": False, **diversity})
    return results


def main(args: EvaluateArguments) -> None:
    require(
        "evaluate",
        model=args.model,
        adapter=args.adapter,
        dataset_name=args.dataset_name,
        output_dir=args.output_dir,
    )
    from trl_diffusion_rank.data.loading import load_rows
    from trl_diffusion_rank.evaluation.judges import check_prompts

    data = load_rows(args.dataset_name, args.dataset_split, columns=("prompt",))
    if args.num_prompts is not None and args.num_prompts > len(data):
        raise ValueError(
            f"`num_prompts` is {args.num_prompts} and the split {args.dataset_split!r} has {len(data)} prompts."
        )
    data = data.select(range(args.num_prompts or len(data)))
    for name in args.judges:
        check_prompts(name, list(data["prompt"]))
    rows = list(data["row"]) if "row" in data.column_names else list(range(len(data)))

    from trl_diffusion_rank.diffusion.draws import stable_seed
    from trl_diffusion_rank.diffusion.sampling import load_tuned

    items = [
        (prompt, stable_seed(args.seed, "evaluate", prompt, row, index))
        for prompt, row in zip(data["prompt"], rows, strict=True)
        for index in range(args.images_per_prompt)
    ]
    prompts, seeds = map(list, zip(*items, strict=True))

    pipe = load_for_sampling(args.model, args.dtype)
    base = sample_all_steps(pipe, "base", prompts, seeds, args)
    load_tuned(pipe, args.adapter)
    tuned = sample_all_steps(pipe, "tuned", prompts, seeds, args)
    del pipe  # before the judges are loaded
    if process_state().is_main_process:
        report(base, tuned, prompts, args)


def report(
    base: dict[int, list[Image]], tuned: dict[int, list[Image]], prompts: list[str], args: EvaluateArguments
) -> None:
    """Judge the images; write and print what comes out."""
    from trl_diffusion_rank.evaluation.grid import image_grid
    from trl_diffusion_rank.evaluation.judges import load_judge
    from trl_diffusion_rank.evaluation.report import HEADER, table_rows, verdict

    judges = [load_judge(name) for name in args.judges]
    results: list[Result] = []
    verdicts = {}
    for steps in args.num_inference_steps:
        of_steps = compare(base[steps], tuned[steps], prompts, judges, args.seed)
        results += [{"num_inference_steps": steps, **result} for result in of_steps]
        word, sentence = verdict(of_steps)
        verdicts[steps] = {"verdict": word, "text": f"{steps} steps: {sentence}"}

    table = format_table(HEADER, table_rows(results), names=2)
    notes = (
        f"{len(prompts)} images of {len(set(prompts))} prompts, the same prompts and seeds for both models. Intervals "
        "are bootstrap 95 %, resampled by prompt; effect size h is Cohen's for shares, d_z that of paired differences."
    )
    text = "\n\n".join([table, notes, "\n".join(v["text"] for v in verdicts.values())])
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    metrics = {
        "options": asdict(args),
        "num_images": len(prompts),
        "num_prompts": len(set(prompts)),
        "results": results,
        "verdicts": {str(steps): value for steps, value in verdicts.items()},
    }
    (output / "metrics.json").write_text(json.dumps(metrics, indent=2, allow_nan=False) + "\n")
    (output / "table.md").write_text(text + "\n")

    # Different prompts where there are enough, then others.
    first = {prompt: index for index, prompt in reversed(list(enumerate(prompts)))}
    shown = [*sorted(first.values()), *sorted(set(range(len(prompts))) - set(first.values()))][:GRID_COLUMNS]
    pictures = [
        (f"{name}, {steps} steps", [images[steps][i] for i in shown])
        for steps in args.num_inference_steps
        for name, images in (("base", base), ("tuned", tuned))
    ]
    image_grid(pictures, [prompts[i] for i in shown]).save(output / "grid.png")
    print(f"\n{text}\n\nPicture of the first {len(shown)} prompts: {output / 'grid.png'}")


if __name__ == "__main__":
    from trl_diffusion_rank.recipe import run_stage

    run_stage("evaluate")
