"""Captions of the prompts' own images, as a vision-language model sees them, and cleaned up to be prompts.

    trl-diffusion-rank caption --dataset_name runs/mine/prompts --output_dir runs/mine/caption

Adds to rows with an `image` the columns `caption`, as the model wrote it, and `caption_clean`: without "The image
shows", in whole sentences, no longer than the text encoder reads. `generate` can draw from either (`prompt_column`).
Every finished batch is on disk; processes share the rows.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

from trl_diffusion_rank.options import DTYPES, check_at_least, check_choice
from trl_diffusion_rank.processes import process_state
from trl_diffusion_rank.stages._common import PublishingOptions, require


if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from datasets import Dataset

    from trl_diffusion_rank.captions import Captioner
    from trl_diffusion_rank.data.parts import Parts


HELP = "caption the images of the prompts"
INPUTS = {"dataset_name": "prompts"}

# What is added to the rows
NEW_COLUMNS = ("caption", "caption_clean")
# So many images about which a model says nothing are no accident: it would go on like this for hours.
FIRST_IMAGES = 16
# Rows that are in memory at once while the dataset is put together.
ROWS_AT_ONCE = 32


@dataclass
class CaptionArguments(PublishingOptions):
    """
    Arguments of the stage `caption`.

    Args:
        dataset_name (`str`, *optional*):
            Dataset with the columns `prompt` and `image`; in a run what `prompts` has kept.
        model (`str`, *optional*, defaults to `"llava-hf/llava-1.5-7b-hf"`):
            Hub id or folder of an image-text-to-text model of transformers.
        instruction (`str`, *optional*):
            What it is asked; a description in a few sentences, subject first, when unset.
        max_new_tokens (`int`, *optional*, defaults to `128`):
            A caption's greatest length, in the model's tokens.
        tokenizer (`str`, *optional*, defaults to `"openai/clip-vit-large-patch14"`):
            Hub id or folder of the tokenizer, or of the diffusers pipeline, whose limit `caption_clean` is held to.
        max_tokens (`int`, *optional*):
            That limit; the tokenizer's own when unset.
        batch_size (`int`, *optional*, defaults to `8`):
            Images captioned, and written, at once.
        dtype (`str`, *optional*, defaults to `"auto"`):
            `float32`, `bfloat16`, `float16`, or `auto`: bfloat16 on an accelerator, float32 on a CPU.
        revision (`str`, *optional*):
            Branch, tag or commit of the model.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Run the code that the model brings along.
        output_dir (`str`, *optional*):
            Folder of the captioned prompts.
    """

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Dataset with columns `prompt` and `image`; in a run the output of `prompts`."},
    )
    model: str = field(
        default="llava-hf/llava-1.5-7b-hf", metadata={"help": "Hub id or folder of an image-text-to-text model."}
    )
    instruction: str | None = field(
        default=None, metadata={"help": "What the model is asked; a description, subject first, when unset."}
    )
    max_new_tokens: int = field(default=128, metadata={"help": "A caption's greatest length, in the model's tokens."})
    tokenizer: str = field(
        default="openai/clip-vit-large-patch14",
        metadata={"help": "Tokenizer, or pipeline, whose limit `caption_clean` is held to: Hub id or folder."},
    )
    max_tokens: int | None = field(default=None, metadata={"help": "That limit; the tokenizer's own when unset."})
    batch_size: int = field(default=8, metadata={"help": "Images captioned at once."})
    dtype: str = field(
        default="auto", metadata={"help": "float32, bfloat16, float16, or auto (bfloat16 on an accelerator)."}
    )
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the model."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the code that the model brings along."})
    output_dir: str | None = field(default=None, metadata={"help": "Folder of the captioned prompts."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("dtype", self.dtype, DTYPES)
        check_at_least(1, max_new_tokens=self.max_new_tokens, batch_size=self.batch_size)
        check_at_least(3, max_tokens=self.max_tokens)  # begin, end and something between


def argument_classes() -> tuple[type, ...]:
    return (CaptionArguments,)


def check_images(data: Dataset, split: str) -> None:
    """Refuse a split that can't be captioned, before a model is loaded."""
    from datasets import Image

    for column in ("prompt", "image"):
        if column not in data.column_names:
            hint = " The stage `prompts` keeps images with `keep_images: true`." if column == "image" else ""
            raise ValueError(
                f"There is no column {column!r} in the split {split!r}; its columns are "
                f"{', '.join(data.column_names)}.{hint}"
            )
    if not isinstance(data.features["image"], Image):
        raise ValueError(
            f"The column 'image' of the split {split!r} holds {data.features['image']}, not images: use "
            "`data.cast_column('image', datasets.Image())` and save the dataset."
        )


def limited_cleaner(tokenizer_name: str, max_tokens: int | None) -> Callable[[str], str]:
    """`clean_caption`, held to what the text encoder reads."""
    from trl_diffusion_rank.captions import clean_caption, token_counter
    from trl_diffusion_rank.diffusion.loading import load_tokenizer

    tokenizer = load_tokenizer(tokenizer_name)
    max_tokens = max_tokens or tokenizer.model_max_length
    if max_tokens > 1_000_000:  # what transformers writes where nobody knows
        raise ValueError(f"The tokenizer {tokenizer_name!r} doesn't say how much is read: set `max_tokens`.")
    count_tokens = token_counter(tokenizer)
    return lambda caption: clean_caption(caption, count_tokens, max_tokens)


def says_nothing(args: CaptionArguments, images: int) -> ValueError:
    return ValueError(
        f"`model` {args.model!r} has said nothing of {images} images: every caption is empty. `instruction` is "
        f"{args.instruction!r} and `dtype` is {args.dtype!r}: set the one to what this model expects, or the other to "
        "a type in which it doesn't overflow."
    )


def caption_images(
    captioner: Captioner,
    clean: Callable[[str], str],
    splits: dict[str, Dataset],
    batches: dict[str, list[list[int]]],
    parts: Parts,
    args: CaptionArguments,
) -> None:
    """Write the captions of all `batches` of rows."""
    from tqdm import tqdm

    from trl_diffusion_rank.data.images import decoded_batches

    seen, said_something = 0, False
    total = sum(len(rows) for of_split in batches.values() for rows in of_split)
    with tqdm(total=total, unit="image", disable=not process_state().is_main_process) as bar:
        for split, of_split in batches.items():
            images = splits[split].select_columns(["image"])  # the other columns needn't be read
            for rows, columns in decoded_batches(images, split, of_split):
                captions = captioner.caption(columns["image"])
                seen += len(captions)
                said_something = said_something or any(captions)
                if seen >= FIRST_IMAGES and not said_something:
                    raise says_nothing(args, seen)
                cleaned = [clean(caption) for caption in captions]
                parts.write({"split": [split] * len(rows), "row": rows, "caption": captions, "caption_clean": cleaned})
                bar.update(len(rows))


def captioned_batches(data: Dataset, results: list[dict[str, str]]) -> Iterator[dict[str, list[Any]]]:
    """The rows with their captions; those of which the model had nothing to say are left out."""
    from datasets import Image

    from trl_diffusion_rank.data.loading import embedded

    images = [name for name, kind in data.features.items() if isinstance(kind, Image)]
    left = iter(results)
    for batch in data.iter(ROWS_AT_ONCE):
        own = list(islice(left, len(batch["prompt"])))
        batch |= {name: [result[name] for result in own] for name in NEW_COLUMNS}
        batch |= {name: [image and embedded(image) for image in batch[name]] for name in images}
        kept = [place for place, result in enumerate(own) if result["caption"]]
        yield {name: [values[place] for place in kept] for name, values in batch.items()}


def main(args: CaptionArguments) -> None:
    require("caption", dataset_name=args.dataset_name, output_dir=args.output_dir)
    from datasets import Features, Image, Value

    from trl_diffusion_rank.captions import Captioner
    from trl_diffusion_rank.data.artefact import Artefact, Card, common_features, public
    from trl_diffusion_rank.data.loading import load_splits, undecoded
    from trl_diffusion_rank.data.parts import missing_batches

    state = process_state()
    loaded = load_splits(args.dataset_name)
    for split, data in loaded.items():
        check_images(data, split)
    new = dict.fromkeys(NEW_COLUMNS, Value("string"))
    features = Features(common_features(loaded) | {"image": Image()} | new)
    splits = {split: undecoded(data) for split, data in loaded.items()}
    # Where the images come from and go to, and how many at once, makes no difference
    made_by = ("dataset_name", "output_dir", "batch_size", *asdict(PublishingOptions()))
    made_of = {name: value for name, value in asdict(args).items() if name not in made_by}
    made_of["input"] = {split: data._fingerprint for split, data in splits.items()}
    artefact = Artefact(args.output_dir, made_of)
    if artefact.finished:
        if state.is_main_process:
            print(f"The captioned prompts in {args.output_dir} are finished.")
            args.publish(args.output_dir)
        return

    kinds = Features({"split": Value("string"), "row": Value("int64")} | new)
    parts = artefact.parts("captions", ("split", "row"), kinds)
    done = parts.scan()
    state.wait_for_everyone()  # all have looked before the first one writes
    keys = {split: [(split, row) for row in range(len(data))] for split, data in splits.items()}
    mine = {
        split: missing_batches(of_split, done, args.batch_size)[state.process_index :: state.num_processes]
        for split, of_split in keys.items()
    }
    if any(mine.values()):
        clean = limited_cleaner(args.tokenizer, args.max_tokens)
        captioner = Captioner(
            args.model,
            instruction=args.instruction,
            max_new_tokens=args.max_new_tokens,
            dtype=args.dtype,
            device=state.device,
            revision=args.revision,
            trust_remote_code=args.trust_remote_code,
        )
        caption_images(captioner, clean, splits, mine, parts, args)
    state.wait_for_everyone()
    if not state.is_main_process:
        return

    parts.scan()
    results = {split: parts.read(of_split, NEW_COLUMNS) for split, of_split in keys.items()}
    captions = [result["caption"] for of_split in results.values() for result in of_split]
    if not any(captions):
        raise says_nothing(args, len(captions))
    sections = {}
    if empty := captions.count(""):
        sections["Left out"] = f"{empty} of {len(captions)} images got an empty caption and are left out."
        print(sections["Left out"])
    card = Card(
        title="Captioned prompts",
        text=f"Prompts and their images, captioned by `{public(args.model)}`.",
        columns={
            "prompt": "as the dataset has it",
            "row": "number over all splits, part of the seeds of images",
            "image": "what is captioned",
            "caption": "as the model wrote it",
            "caption_clean": "in the form of a prompt",
        },
        stage="caption",
        options=asdict(args),
        sections=sections,
        tags=["text-to-image"],
    )
    batches = {split: captioned_batches(data, results[split]) for split, data in splits.items()}
    counts = artefact.save(batches, features, card)
    print(f"{sum(counts.values())} captioned prompts, in {args.output_dir}")
    args.publish(args.output_dir)


if __name__ == "__main__":
    from trl_diffusion_rank.recipe import run_stage

    run_stage("caption")
