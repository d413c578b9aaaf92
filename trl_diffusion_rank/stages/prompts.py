"""Prompts to train and to evaluate on.

    trl-diffusion-rank prompts --dataset_name prompts.txt --num_test_prompts 100 --output_dir runs/mine/prompts

Reads one column of texts, strips it, drops what is empty or repeated, and splits it by the prompt: whether a prompt is
in `train` or `test` depends on the prompt and the seed alone, not on the order of the file. A column `row` numbers the
rows over both splits; later stages take it into an image's seed, so equal prompts in two rows still get different
images.

`dataset_name: digits` draws from the embedded world instead. There are only 150 captions of trained combinations, so
its rows are *draws* with replacement: a caption may occur in several rows and in both splits, each time with other
seeds. Its test rows ask for new images of known captions.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from trl_diffusion_rank.stages._common import check_at_least, is_main_process, require


if TYPE_CHECKING:
    from collections.abc import Iterable


HELP = "collect prompts and split them into train and test"
INPUTS: dict[str, str] = {}


@dataclass
class PromptsArguments:
    """
    Arguments of the stage `prompts`.

    Args:
        dataset_name (`str`, *optional*):
            Where the prompts come from: a dataset on the Hub, a local folder or a parquet, json, jsonl, csv or txt
            file (one prompt a line), or the word `digits` for the embedded world.
        dataset_config (`str`, *optional*):
            Configuration of a Hub dataset.
        dataset_split (`str`, *optional*, defaults to `"train"`):
            Split to read.
        streaming (`bool`, *optional*, defaults to `False`):
            Read the dataset from its beginning only as far as needed for `num_prompts` and `num_test_prompts`. For
            datasets that carry images beside their captions.
        prompt_column (`str`, *optional*, defaults to `"prompt"`):
            Column of the prompts.
        num_prompts (`int`, *optional*):
            Prompts in `train`; all that are left when unset.
        num_test_prompts (`int`, *optional*, defaults to `100`):
            Prompts in `test`.
        seed (`int`, *optional*, defaults to `0`):
            Decides which prompts are taken and which of them are for the test.
        output_dir (`str`, *optional*):
            Folder the prompts are saved to.
    """

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Hub id, local folder, parquet/json/jsonl/csv/txt file, or `digits` for the embedded world."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    dataset_split: str = field(default="train", metadata={"help": "Split to read."})
    streaming: bool = field(
        default=False, metadata={"help": "Read the dataset from its beginning, only as far as needed."}
    )
    prompt_column: str = field(default="prompt", metadata={"help": "Column of the prompts."})
    num_prompts: int | None = field(
        default=None, metadata={"help": "Prompts in `train`; all that are left when unset."}
    )
    num_test_prompts: int = field(default=100, metadata={"help": "Prompts in `test`."})
    seed: int = field(default=0, metadata={"help": "Decides which prompts are taken and which are for the test."})
    output_dir: str | None = field(default=None, metadata={"help": "Folder the prompts are saved to."})

    def __post_init__(self) -> None:
        check_at_least(1, num_prompts=self.num_prompts)
        check_at_least(0, num_test_prompts=self.num_test_prompts)
        if self.dataset_name == "digits" and self.num_prompts is None:
            raise ValueError("`num_prompts` is not set; prompts of `digits` are drawn, so say how many (e.g. 400).")
        if self.streaming and self.num_prompts is None:
            raise ValueError("`streaming` is set and `num_prompts` is not; say how many prompts to read.")


def argument_classes() -> tuple[type, ...]:
    return (PromptsArguments,)


def collect(texts: Iterable[str | None], limit: int | None = None) -> tuple[list[str], int, int]:
    """Distinct stripped prompts in their order, at most `limit`, and how many were empty and how many repeated."""
    prompts: dict[str, None] = {}
    empty = repeated = 0
    for text in texts:
        text = (text or "").strip()
        if not text:
            empty += 1
        elif text in prompts:
            repeated += 1
        else:
            prompts[text] = None
            if len(prompts) == limit:
                break
    return list(prompts), empty, repeated


def split_prompts(
    prompts: list[str], num_prompts: int | None, num_test_prompts: int, seed: int
) -> tuple[list[str], list[str]]:
    """
    Distinct prompts into `(train, test)`, by the order of a hash of seed and prompt: the same prompts give the same
    split in whatever order they come.
    """
    needed = num_test_prompts + (1 if num_prompts is None else num_prompts)
    if len(prompts) < needed:
        raise ValueError(
            f"`num_prompts` is {num_prompts} and `num_test_prompts` is {num_test_prompts}, but there are only "
            f"{len(prompts)} distinct prompts. Ask for fewer (unset `num_prompts` takes all that are left)."
        )
    ordered = sorted(prompts, key=lambda prompt: hashlib.sha256(f"{seed}\x1f{prompt}".encode()).digest())
    stop = None if num_prompts is None else num_test_prompts + num_prompts
    return ordered[num_test_prompts:stop], ordered[:num_test_prompts]


def main(args: PromptsArguments) -> None:
    require("prompts", dataset_name=args.dataset_name, output_dir=args.output_dir)
    if not is_main_process():
        return
    from datasets import Dataset, DatasetDict

    from trl_diffusion_rank.data.loading import load_rows

    if args.dataset_name == "digits":
        from trl_diffusion_rank.digits.data import make_prompts

        drawn = make_prompts(args.num_prompts + args.num_test_prompts, seed=args.seed)
        train, test = drawn[: args.num_prompts], drawn[args.num_prompts :]
    else:
        # A text file has no header; `datasets` calls its only column `text`.
        column = "text" if args.dataset_name.endswith(".txt") else args.prompt_column
        rows = load_rows(args.dataset_name, args.dataset_split, args.dataset_config, (column,), args.streaming)
        rows = rows.select_columns([column])
        limit = args.num_prompts + args.num_test_prompts if args.streaming else None
        prompts, empty, repeated = collect((row[column] for row in rows), limit)
        if empty or repeated:
            print(f"Left out {empty} empty and {repeated} repeated prompts.")
        train, test = split_prompts(prompts, args.num_prompts, args.num_test_prompts, args.seed)

    first_row = {"train": 0, "test": len(train)}
    splits = {
        name: Dataset.from_dict({"prompt": part, "row": list(range(first_row[name], first_row[name] + len(part)))})
        for name, part in (("train", train), ("test", test))
        if part
    }
    DatasetDict(splits).save_to_disk(args.output_dir)
    print(f"{len(train)} prompts to train on and {len(test)} to evaluate on, in {args.output_dir}")


if __name__ == "__main__":
    from trl_diffusion_rank.recipe import run_stage

    run_stage("prompts")
