"""Which rows of a dataset become prompts: filtered, each text once, no longer than the text encoder reads, split."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple


# Columns of the prompts in the datasets that we know; PartiPrompts writes its own with a capital
PROMPT_COLUMNS = ("prompt", "Prompt", "caption", "text")


def check_column(option: str, column: str, names: list[str], dataset: str) -> None:
    """Refuse a `column` that the dataset with the columns `names` doesn't have."""
    if column not in names:
        raise ValueError(
            f"`{option}` is {column!r}, and {dataset!r} has no such column; its columns are {', '.join(names)}."
        )


def prompt_column(given: str | None, names: list[str], dataset: str) -> str:
    """The column of the prompts: the one that is `given`, or a known one."""
    if dataset.endswith(".txt"):
        return "text"  # a text file has no header; `datasets` calls its only column so
    if given is not None:
        check_column("prompt_column", given, names, dataset)
        return given
    known = [name for name in PROMPT_COLUMNS if name in names]
    if not known:
        raise ValueError(
            f"{dataset!r} has none of the columns {', '.join(PROMPT_COLUMNS)}: say with `prompt_column` which of its "
            f"columns holds the prompts: {', '.join(names)}."
        )
    return known[0]


def check_row_numbers(rows: list[Any], dataset: str) -> None:
    """Refuse a column `row` that doesn't number the rows: the seeds of images are made of it."""
    counts = Counter(rows)
    wrong = next((row for row in rows if type(row) is not int or counts[row] > 1), None)
    if wrong is not None or None in counts:
        raise ValueError(
            f"The column 'row' of {dataset!r} holds {wrong!r}{' twice' if counts[wrong] > 1 else ''}. It numbers the "
            "rows, and the images' seeds are made of it: rename the column, or number the rows."
        )


@dataclass(frozen=True)
class Filters:
    """
    Limits on the columns of COYO-700M (https://github.com/kakaobrain/coyo-dataset); unset ones let everything pass.

    Args:
        aesthetic_min (`float`, *optional*): least `aesthetic_score_laion_v2`, from 1 to 10.
        nsfw_max (`float`, *optional*): most of every column `nsfw_score_*`, from 0 to 1.
        watermark_max (`float`, *optional*): most `watermark_score`, from 0 to 1.
        min_side (`int`, *optional*): least `width` and `height`, in pixels.
    """

    aesthetic_min: float | None = None
    nsfw_max: float | None = None
    watermark_max: float | None = None
    min_side: int | None = None

    def columns(self, names: Iterable[str], with_images: bool = False) -> dict[str, tuple[str, ...]]:
        """
        Option -> the columns that it reads, of those called `names`; an option without its column is refused. Sizes
        may be missing where the images are looked at themselves (`with_images`).
        """
        names = list(names)
        nsfw = tuple(name for name in names if name.startswith("nsfw_score"))
        columns = {
            "aesthetic_min": ("aesthetic_score_laion_v2",),
            "nsfw_max": nsfw or ("nsfw_score_*",),
            "watermark_max": ("watermark_score",),
            "min_side": ("width", "height"),
        }
        columns = {option: read for option, read in columns.items() if getattr(self, option) is not None}
        for option, read in columns.items():
            for column in read:
                if column not in names and not (with_images and option == "min_side"):
                    raise ValueError(
                        f"`{option}` reads the column {column!r}, which the dataset doesn't have. Leave the option "
                        f"out; the columns are {', '.join(names)}."
                    )
        return {option: tuple(name for name in read if name in names) for option, read in columns.items()}

    def refuse(self, row: dict[str, Any], columns: dict[str, tuple[str, ...]]) -> str | None:
        """The option that refuses a row, None when it passes. What isn't known, None or NaN, passes nothing."""
        for option, read in columns.items():
            limit = getattr(self, option)
            for name in read:
                value = row[name]
                if value is None or not (value <= limit if option.endswith("_max") else value >= limit):
                    return option
        return None


class TokenLimit:
    """
    Texts as long as a text encoder reads.

    Args:
        tokenizer: of the text encoder, from transformers.
        max_tokens (`int`, *optional*): with the tokens of begin and end; by default the tokenizer's own limit.
        cut (`bool`): whether a longer text is cut after a word, or refused.
    """

    def __init__(self, tokenizer: Callable, max_tokens: int | None, cut: bool):
        self.tokenizer, self.cut = tokenizer, cut
        self.max_tokens = max_tokens or tokenizer.model_max_length
        if self.max_tokens > 1_000_000:  # what transformers writes where nobody knows
            raise ValueError("The tokenizer doesn't say how much its text encoder reads: set `max_tokens`.")

    def __call__(self, text: str) -> str | None:
        """The text, or what is left of it; None when it is refused."""
        if self._fits(text):
            return text
        if not self.cut:
            return None
        words = text.split()
        # Words that fit, and that may: all of them, for it may have been the space between them that was too much
        least, most = 0, len(words)
        while least < most:
            middle = (least + most + 1) // 2
            if self._fits(" ".join(words[:middle])):
                least = middle
            else:
                most = middle - 1
        return " ".join(words[:least]).rstrip(" ,;:-") or None

    def _fits(self, text: str) -> bool:
        return len(self.tokenizer(text, verbose=False)["input_ids"]) <= self.max_tokens


class Candidate(NamedTuple):
    """
    A row that may become a prompt.

    `index` is the row's in the dataset, `caption` its text there without space around it, `row` the columns that were
    read.
    """

    index: int
    prompt: str
    caption: str
    row: dict[str, Any]


def candidates(
    rows: Iterable[dict[str, Any]],
    column: str,
    counts: Counter,
    refuse: Callable[[dict[str, Any]], str | None] = lambda row: None,
    shorten: Callable[[str], str | None] = lambda text: text,
) -> Iterator[Candidate]:
    """
    The rows that pass, each prompt once, in their order. Texts that differ by their spaces alone are the same to a
    text encoder: one of them in `train` and one in `test` would be a leak.

    Args:
        rows: with at least `column`, the texts.
        counts: is told how many rows were left out, by reason, and how many prompts were `cut`.
        refuse: the name of what a row fails by, None when it passes.
        shorten: a text that is short enough, None when there is none.
    """
    seen: set[str] = set()
    for index, row in enumerate(rows):
        text = row[column]
        if text is not None and not isinstance(text, str):
            raise TypeError(
                f"Row {index}: the prompt must be a text, got {text!r}; say with `prompt_column` which column holds "
                f"the prompts instead of {column!r}."
            )
        caption = (text or "").strip()
        if not caption:
            counts["empty"] += 1
        elif (reason := refuse(row)) is not None:
            counts[reason] += 1
        elif (prompt := shorten(caption)) is None:
            counts["too long"] += 1
        elif (spaced := _evenly_spaced(prompt)) in seen:
            counts["repeated"] += 1
        else:
            seen.add(spaced)
            if prompt != caption:
                counts["cut"] += 1
            yield Candidate(index, prompt, caption, row)


def _evenly_spaced(text: str) -> str:
    return " ".join(text.split())


def split_order(prompt: str, seed: int) -> bytes:
    """By which prompts are sorted before they are divided: the same in whatever order they come."""
    return hashlib.sha256(f"{seed}\x1f{_evenly_spaced(prompt)}".encode()).digest()


def split_prompts(
    prompts: list[Candidate], num_prompts: int | None, num_test_prompts: int, seed: int, others: str = ""
) -> tuple[list[Candidate], list[Candidate]]:
    """
    Candidates into `(train, test)`, by the order of a hash of seed and prompt: the same prompts give the same split in
    whatever order they come.

    Raises:
        `ValueError`: where there are too few, with what became of the `others`.
    """
    needed = num_test_prompts + (1 if num_prompts is None else num_prompts)
    if len(prompts) < needed:
        raise ValueError(
            f"`num_prompts` is {num_prompts} and `num_test_prompts` is {num_test_prompts}, but there are only "
            f"{len(prompts)} distinct prompts. Ask for fewer (unset `num_prompts` takes all that are left)."
            f"{' ' * bool(others)}{others}"
        )
    ordered = sorted(prompts, key=lambda candidate: split_order(candidate.prompt, seed))
    stop = None if num_prompts is None else num_test_prompts + num_prompts
    return ordered[num_test_prompts:stop], ordered[:num_test_prompts]
