"""Base against tuned: the same prompts and seeds, judged by others than those that ranked.

    trl-diffusion-rank evaluate --model stabilityai/stable-diffusion-xl-base-1.0 --adapters runs/mine/dpo \\
        --dataset_name nateraw/parti-prompts --judges imscore_hpsv2 --output_dir runs/mine/evaluate

At each number of steps every judge sees the images of the base model and of every adapter. The report gives each
metric's mean for base and tuned, their difference and the win rate with bootstrap 95 % intervals (resampled by
prompt), an effect size (Cohen's h for shares, the paired d_z for scores) and the p of a sign test; where prompts have
several images, the diversity within them; where they have categories, the headline metrics by category. A judge that
also ranked the training images says how well its own taste was learnt, no more: the stage warns where all do. In a
recipe:

    evaluate:
      adapters: [runs/mine/dpo, {name: dpo_step_500, path: runs/mine/dpo/checkpoint-500}]  # unset: the run's own
      num_inference_steps: [4, 25]
      images_per_prompt: 4
      judges: [pickscore, {name: discriminator, model: runs/other/discriminator}]
      real_images: runs/mine/prompts

`real_images` adds a Frechet distance to real images. It is measured on the features of a CLIP and is not the FID,
whose Inception features say less about what generated images lack today (https://huggingface.co/papers/2401.09603).

One model is in memory at a time. Every finished batch is on disk: a stage that was interrupted makes what is missing,
and several processes share the work without changing the result. Images that an earlier evaluation of the run has
drawn with the same weights and options, and other judges or adapters say, are taken over from it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from trl_diffusion_rank.options import DTYPES, NameOrMapping, check_at_least, check_choice
from trl_diffusion_rank.processes import process_state
from trl_diffusion_rank.stages._common import require


if TYPE_CHECKING:
    from datasets import Dataset

    from trl_diffusion_rank.evaluation.drawing import Item
    from trl_diffusion_rank.evaluation.judges import Judge


HELP = "compare base and tuned models on the test prompts"
INPUTS = {"adapters": ["dpo", "cpo"], "dataset_name": "prompts"}


class PathOrMapping(NameOrMapping):
    """An entry of `adapters`."""

    key = "path"


@dataclass
class EvaluateArguments:
    """
    Arguments of the stage `evaluate`.

    Args:
        model (`str`, *optional*):
            Hub id or folder of the base model, or `digits` for the one in this package.
        adapters (`list`, *optional*):
            The tuned weights, one or more: LoRA folders or Hub ids, folders with full weights in `unet/` or
            `transformer/`, or mappings with the keys `path` and `name` (what tables call it, by default the last part
            of the path). On the command line a mapping is a piece of JSON. In a run the outputs of `dpo` and `cpo`.
        dataset_name (`str`, *optional*):
            The prompts: a folder, a parquet, json, jsonl, csv or txt file, or a dataset on the Hub; in a run those of
            the stage `prompts`.
        dataset_config (`str`, *optional*):
            Configuration of a Hub dataset.
        dataset_split (`str`, *optional*):
            Its split; `test` when unset, or the only one.
        prompt_column (`str`, *optional*):
            Column of the prompts; by default the first of `prompt`, `Prompt`, `caption` and `text` that there is.
        category_column (`str`, *optional*):
            Column of the prompts' categories; by default `category` or `Category` where there is one.
        num_prompts (`int`, *optional*):
            The first so many prompts; all when unset.
        images_per_prompt (`int`, *optional*, defaults to `1`):
            Images of each prompt, each from a seed of its own. From 2 on there is a diversity to report.
        num_inference_steps (`list[int]`, *optional*, defaults to `[25]`):
            Numbers of denoising steps. Over-optimisation shows at few steps first.
        guidance_scale (`float`, *optional*):
            Classifier-free guidance; the pipeline's own default when unset.
        judges (`list`, *optional*):
            `digits` for the judges of the embedded world, names of scorers, or mappings with the keys `name`, `label`
            (what tables call it) and the scorer's own options, such as the `model` of a `discriminator`. On the
            command line a mapping is a piece of JSON.
        real_images (`str`, *optional*):
            Dataset with a column `image`, by folder or Hub id: Frechet distances to its images are reported.
        real_split (`str`, *optional*):
            Its split; `test` when unset, or the only one.
        feature_model (`str`, *optional*, defaults to `"openai/clip-vit-large-patch14"`):
            Vision model of transformers whose pooled features these distances are measured on.
        batch_size (`int`, *optional*, defaults to `8`):
            Images drawn at once.
        dtype (`str`, *optional*, defaults to `"auto"`):
            `float32`, `bfloat16`, `float16`, or `auto`: bfloat16 on an accelerator, float32 on a CPU.
        height (`int`, *optional*), width (`int`, *optional*):
            Size in pixels; the model's own size when unset.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the images and of the resampling.
        output_dir (`str`, *optional*):
            Folder of metrics.json, table.md, grid.png and the dataset of all images with their scores.
    """

    model: str | None = field(
        default=None, metadata={"help": "Hub id or folder of the base model, or `digits` for the one in this package."}
    )
    adapters: list[PathOrMapping] | None = field(
        default=None,
        metadata={
            "help": "LoRAs or full weights of the tuned models: folders, Hub ids, or mappings (JSON on the command "
            "line) with the keys path and name; in a run the outputs of `dpo` and `cpo`."
        },
    )
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Hub id, folder or parquet/json/jsonl/csv/txt file of the prompts; in a run the output of "
            "`prompts`."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    dataset_split: str | None = field(
        default=None, metadata={"help": "Split of the prompts; test when unset, or the only one."}
    )
    prompt_column: str | None = field(
        default=None, metadata={"help": "Column of the prompts; by default prompt, Prompt, caption or text."}
    )
    category_column: str | None = field(
        default=None, metadata={"help": "Column of their categories; by default category or Category, if there."}
    )
    num_prompts: int | None = field(default=None, metadata={"help": "The first so many prompts; all when unset."})
    images_per_prompt: int = field(default=1, metadata={"help": "Images of each prompt, each from a seed of its own."})
    num_inference_steps: list[int] = field(
        default_factory=lambda: [25], metadata={"help": "Numbers of denoising steps to compare at."}
    )
    guidance_scale: float | None = field(
        default=None, metadata={"help": "Classifier-free guidance; the pipeline's own default when unset."}
    )
    judges: list[NameOrMapping] | None = field(
        default=None,
        metadata={
            "help": "`digits`, names of scorers, or mappings (JSON on the command line) with the keys name, label and "
            "the scorer's own options."
        },
    )
    real_images: str | None = field(
        default=None,
        metadata={"help": "Dataset with a column `image`: Frechet distances to its images are reported."},
    )
    real_split: str | None = field(
        default=None, metadata={"help": "Split of the real images; test when unset, or the only one."}
    )
    feature_model: str = field(
        default="openai/clip-vit-large-patch14",
        metadata={"help": "Vision model of transformers whose features these distances are measured on."},
    )
    batch_size: int = field(default=8, metadata={"help": "Images drawn at once."})
    dtype: str = field(
        default="auto", metadata={"help": "float32, bfloat16, float16, or auto (bfloat16 on an accelerator)."}
    )
    height: int | None = field(default=None, metadata={"help": "Height in pixels; the model's own when unset."})
    width: int | None = field(default=None, metadata={"help": "Width in pixels; the model's own when unset."})
    seed: int = field(default=0, metadata={"help": "Seed of the images and of the resampling."})
    output_dir: str | None = field(
        default=None, metadata={"help": "Folder of metrics.json, table.md, grid.png and the images."}
    )

    def __post_init__(self) -> None:
        # Here and not in `main`: a run refuses them before its first stage
        if not self.judges:
            raise ValueError("`judges` is empty; name `digits` or a scorer, for example --judges pickscore.")
        self.read_judges()
        if self.adapters is not None:
            self.read_adapters()
        if not self.num_inference_steps:
            raise ValueError("`num_inference_steps` is empty; give at least one number of steps.")
        for steps in self.num_inference_steps:
            check_at_least(1, num_inference_steps=steps)
        if len(set(self.num_inference_steps)) < len(self.num_inference_steps):
            raise ValueError(f"`num_inference_steps` is {self.num_inference_steps}; name each number once.")
        check_choice("dtype", self.dtype, DTYPES)
        check_at_least(1, num_prompts=self.num_prompts, images_per_prompt=self.images_per_prompt)
        check_at_least(1, batch_size=self.batch_size, height=self.height, width=self.width)
        if self.real_split is not None and self.real_images is None:
            raise ValueError("`real_split` is set and `real_images` is not: name the dataset of real images.")

    def read_judges(self) -> list[Judge]:
        """`judges`, checked; nothing is loaded."""
        from trl_diffusion_rank.evaluation.judges import read_judges

        return read_judges([NameOrMapping(entry) for entry in self.judges])

    def read_adapters(self) -> dict[str, str]:
        """`adapters`, checked: name -> path."""
        from trl_diffusion_rank.evaluation.provenance import name_adapters

        if not self.adapters:
            raise ValueError("`adapters` is empty; name at least one, for example --adapters runs/mine/dpo.")
        return name_adapters([PathOrMapping(entry) for entry in self.adapters])


def argument_classes() -> tuple[type, ...]:
    return (EvaluateArguments,)


# What is read ----------------------------------------------------------


def read_items(args: EvaluateArguments, judges: list[Judge]) -> list[Item]:
    """The images to draw."""
    from trl_diffusion_rank.diffusion.draws import stable_seed
    from trl_diffusion_rank.evaluation.drawing import Item
    from trl_diffusion_rank.evaluation.prompt_sets import read_prompt_set

    names = (args.dataset_config, args.dataset_split, args.prompt_column, args.category_column)
    found = read_prompt_set(args.dataset_name, *names, args.num_prompts)
    for judge in judges:
        judge.check_prompts(found.prompts)
    return [
        Item(prompt, row, category, index, stable_seed(args.seed, "evaluate", prompt, row, index))
        for prompt, row, category in zip(*found, strict=True)
        for index in range(args.images_per_prompt)
    ]


def read_real_images(args: EvaluateArguments) -> tuple[Dataset, str] | None:
    """The real images, undecoded, and their split; None where there are none."""
    from datasets import Image as ImageFeature

    from trl_diffusion_rank.data.loading import evaluation_split, load_splits, undecoded

    if args.real_images is None:
        return None
    splits = load_splits(args.real_images, option="real_images")
    split = evaluation_split(splits, args.real_split, args.real_images, "real_split")
    data = splits[split]
    if not isinstance(data.features.get("image"), ImageFeature) or len(data) < 2:
        raise ValueError(
            f"`real_images` is {args.real_images!r}, and its split {split!r} has {len(data)} rows with the columns "
            f"{', '.join(data.column_names)}; at least two with images in a column `image` are needed."
        )
    return undecoded(data.select_columns(["image"])), split


def main(args: EvaluateArguments) -> None:
    require(
        "evaluate",
        model=args.model,
        adapters=args.adapters,
        dataset_name=args.dataset_name,
        output_dir=args.output_dir,
    )
    from datasets import Features, Value

    from trl_diffusion_rank.data.artefact import Artefact
    from trl_diffusion_rank.evaluation import drawing, judging
    from trl_diffusion_rank.evaluation.image_features import RealImagesJudge
    from trl_diffusion_rank.evaluation.outputs import save_comparison
    from trl_diffusion_rank.evaluation.provenance import check_adapter, partial_judges

    # All that can be wrong is told before the first image
    judges, adapters = args.read_judges(), args.read_adapters()
    for path in adapters.values():
        check_adapter(path)
    items = read_items(args, judges)
    real = read_real_images(args)
    warnings = partial_judges(judges, adapters)

    state = process_state()
    models = {drawing.BASE: None, **adapters}
    hashes = {name: drawing.drawn_by(args, path) for name, path in models.items()}
    made_of = {
        "drawn_by": hashes,
        "items": items,
        "num_inference_steps": args.num_inference_steps,
        "judges": [judge.made_of for judge in judges],
        "real_images": None if real is None else (real[0]._fingerprint, args.feature_model),
        "seed": args.seed,
    }
    artefact = Artefact(args.output_dir, made_of)
    if artefact.finished:
        if state.is_main_process:
            print(f"The comparison in {args.output_dir} is finished.")
        return
    if state.is_main_process:
        for warning in warnings:
            print(f"Warning: {warning}")

    if real is not None:
        kinds = Features({"place": Value("int64"), "features": Value("binary")})  # float32
        references = artefact.parts("real_images", ("place",), kinds)
        judging.embed_real_images(*real, args.feature_model, references)
        places = [(place,) for place in range(len(real[0]))]
        judges.append(RealImagesJudge(args.feature_model, references, places))
    images = artefact.parts("images", drawing.IMAGE_KEY, drawing.image_kinds())
    scores = artefact.parts("scores", judging.SCORE_KEY, judging.score_kinds())
    comparison = drawing.Comparison(args, items, models, hashes, images, scores)

    if state.is_main_process:
        put_away = artefact.folder.parent / ".superseded"  # by the runner: made with other options
        drawing.take_over(
            comparison, [artefact.folder, *sorted(put_away.glob(f"{artefact.folder.name}-*"))], images.scan()
        )
    state.wait_for_everyone()
    done = images.scan()
    state.wait_for_everyone()  # all have looked before the first one writes
    if done and state.is_main_process:
        print(f"{len(done)} of {len(items) * len(list(comparison.drawings))} images are there already.")
    drawing.draw_missing(comparison, done)
    state.wait_for_everyone()
    images.scan()
    drawing.check_black(comparison)
    judging.judge_missing(comparison, judges)
    if state.is_main_process:
        save_comparison(comparison, judges, artefact, warnings)


if __name__ == "__main__":
    from trl_diffusion_rank.recipe import run_stage

    run_stage("evaluate")
