"""Prompts to train and to evaluate on, with their dataset's images where those are wanted.

    trl-diffusion-rank prompts --dataset_name prompts.txt --num_test_prompts 100 --output_dir runs/mine/prompts

Reads one column of texts, strips it, drops what is empty, repeated or refused by a filter, cuts what the text encoder
would not read, and splits by the prompt: whether a prompt is in `train` or `test` depends on the prompt and the seed
alone, not on the order of the file. A column `row` numbers the rows over both splits; later stages take it into an
image's seed, so equal prompts in two rows still get different images.

With `keep_images` the images come along. Pick-a-Pic's pairs that share a caption become one ranked list, which `dpo`
can read at once; a dataset of `images` keeps its lists; a column `image` is kept; and where there is only a column
`url`, as in COYO, the images are downloaded, down a list of candidates until there are as many as were asked for:

    prompts:
      dataset_name: kakaobrain/coyo-700m
      streaming: true
      keep_images: true
      aesthetic_min: 6.5
      num_prompts: 20000

`dataset_name: digits` draws from the embedded world instead. There are only 150 captions of trained combinations, so
its rows are *draws* with replacement: a caption may occur in several rows and in both splits, each time with other
seeds. Its test rows ask for new images of known captions.
"""

from __future__ import annotations

import math
from collections import Counter
from contextlib import closing
from dataclasses import asdict, dataclass, field
from itertools import chain, islice, tee
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_diffusion_rank.data.prompts import (
    Candidate,
    Filters,
    TokenLimit,
    candidates,
    check_column,
    prompt_column,
    split_order,
    split_prompts,
)
from trl_diffusion_rank.options import check_at_least, check_choice
from trl_diffusion_rank.processes import is_main_process
from trl_diffusion_rank.stages._common import PublishingOptions, require
from trl_diffusion_rank.tables import format_table


if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    import numpy as np
    from datasets import Dataset, Features, IterableDataset

    from trl_diffusion_rank.data.artefact import Artefact
    from trl_diffusion_rank.data.parts import Parts
    from trl_diffusion_rank.data.ranked_rows import Votes


HELP = "collect prompts and split them into train and test"
INPUTS: dict[str, str] = {}

# What is written, and what rates the images of a list
OWN_COLUMNS, RATINGS = ("prompt", "row", "image", "images"), ("ranks", "scores", "psi")
# Options that say nothing where prompts are drawn instead of read
READING_OPTIONS = (
    *("streaming", "prompt_column", "keep_columns", "tokenizer", "keep"),
    *("aesthetic_min", "nsfw_max", "watermark_max", "min_side"),
)
# Images are large: few of them in memory at a time
ROWS_AT_ONCE = IMAGES_PER_PART = 32


@dataclass
class PromptsArguments(PublishingOptions):
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
            datasets that are too large to download, or carry images beside their captions.
        prompt_column (`str`, *optional*):
            Column of the prompts; by default the first of `prompt`, `Prompt`, `caption` and `text` that there is.
        keep_columns (`list[str]`, *optional*):
            Other columns to keep, a category say.
        num_prompts (`int`, *optional*):
            Prompts in `train`; all that are left when unset.
        num_test_prompts (`int`, *optional*, defaults to `100`):
            Prompts in `test`.
        tokenizer (`str`, *optional*):
            Hub id or folder of a tokenizer or of a diffusers pipeline, or `digits`; texts longer than its text encoder
            reads are then cut or left out. Without it lengths aren't looked at.
        max_tokens (`int`, *optional*):
            The most tokens of a prompt, with those of begin and end; the tokenizer's own limit when unset.
        on_long_prompt (`str`, *optional*, defaults to `"cut"`):
            `cut` cuts a longer text after a word, `skip` leaves it out; both are counted.
        aesthetic_min (`float`, *optional*), nsfw_max (`float`, *optional*), watermark_max (`float`, *optional*):
            Limits on COYO's columns `aesthetic_score_laion_v2`, `nsfw_score_*` and `watermark_score`.
        min_side (`int`, *optional*):
            Least width and height of an image in pixels, by the columns `width` and `height` and by the images.
        keep_images (`bool`, *optional*, defaults to `False`):
            Keep, or download, the dataset's own images.
        image_column (`str`, *optional*, defaults to `"image"`), url_column (`str`, *optional*, defaults to `"url"`):
            Where they are.
        keep (`int`, *optional*):
            Of a list of ranked images so many: the best, the worst and those between that are spread best. All of a
            list that has fewer.
        download_workers (`int`, *optional*, defaults to `32`):
            Images downloaded at once.
        download_timeout (`float`, *optional*, defaults to `20.0`), download_retries (`int`, *optional*, defaults to
            `2`): Seconds for one attempt, and further attempts after what may pass.
        download_max_megabytes (`float`, *optional*, defaults to `20.0`):
            Largest file, in MiB.
        download_max_megapixels (`float`, *optional*, defaults to `64.0`):
            Largest image, in 1024 x 1024 pixels.
        allow_private_hosts (`bool`, *optional*, defaults to `False`):
            Also download from addresses that are not on the open Internet. For URLs of your own alone.
        seed (`int`, *optional*, defaults to `0`):
            Decides which prompts are taken and which of them are for the test.
        output_dir (`str`, *optional*):
            Folder of the prompts.
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
    prompt_column: str | None = field(
        default=None, metadata={"help": "Column of the prompts; by default prompt, caption or text."}
    )
    keep_columns: list[str] | None = field(default=None, metadata={"help": "Other columns to keep, a category say."})
    num_prompts: int | None = field(
        default=None, metadata={"help": "Prompts in `train`; all that are left when unset."}
    )
    num_test_prompts: int = field(default=100, metadata={"help": "Prompts in `test`."})
    tokenizer: str | None = field(
        default=None,
        metadata={
            "help": "Hub id or folder of a tokenizer or a diffusers pipeline, whose limit prompts are held to; when "
            "unset lengths aren't looked at."
        },
    )
    max_tokens: int | None = field(
        default=None, metadata={"help": "Most tokens of a prompt; the tokenizer's own limit when unset."}
    )
    on_long_prompt: str = field(
        default="cut", metadata={"help": "What happens to a longer one.", "choices": ["cut", "skip"]}
    )
    aesthetic_min: float | None = field(default=None, metadata={"help": "Least aesthetic_score_laion_v2 (COYO)."})
    nsfw_max: float | None = field(default=None, metadata={"help": "Most of every nsfw_score_* (COYO)."})
    watermark_max: float | None = field(default=None, metadata={"help": "Most watermark_score (COYO)."})
    min_side: int | None = field(default=None, metadata={"help": "Least width and height in pixels."})
    keep_images: bool = field(default=False, metadata={"help": "Keep, or download, the dataset's own images."})
    image_column: str = field(default="image", metadata={"help": "Column of one image a row."})
    url_column: str = field(default="url", metadata={"help": "Column of URLs, read where there is no image."})
    keep: int | None = field(
        default=None, metadata={"help": "Images kept of a ranked list, those spread best; all when unset."}
    )
    download_workers: int = field(default=32, metadata={"help": "Images downloaded at once."})
    download_timeout: float = field(default=20.0, metadata={"help": "Seconds for one attempt."})
    download_retries: int = field(default=2, metadata={"help": "Further attempts after what may pass."})
    download_max_megabytes: float = field(default=20.0, metadata={"help": "Largest file, in MiB."})
    download_max_megapixels: float = field(default=64.0, metadata={"help": "Largest image, in 2**20 pixels."})
    allow_private_hosts: bool = field(
        default=False, metadata={"help": "Also download from addresses that are not on the open Internet."}
    )
    seed: int = field(default=0, metadata={"help": "Decides which prompts are taken and which are for the test."})
    output_dir: str | None = field(default=None, metadata={"help": "Folder of the prompts."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(1, num_prompts=self.num_prompts, max_tokens=self.max_tokens, min_side=self.min_side)
        check_at_least(1, download_workers=self.download_workers)
        check_at_least(0, num_test_prompts=self.num_test_prompts, download_retries=self.download_retries)
        check_at_least(2, keep=self.keep)
        check_choice("on_long_prompt", self.on_long_prompt, ("cut", "skip"))
        for name in ("download_timeout", "download_max_megabytes", "download_max_megapixels"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it must be a number above 0.")
        if self.download_max_megapixels > 256:  # `MAX_PIXELS` of data/images.py, which imports torch
            raise ValueError(
                f"`download_max_megapixels` is {self.download_max_megapixels}; it must be at most 256, more are never "
                "decoded."
            )
        if self.max_tokens is not None and self.tokenizer is None:
            raise ValueError("`max_tokens` is set and `tokenizer` is not; name the one that counts them.")
        if self.keep is not None and not self.keep_images:
            raise ValueError("`keep` is set and `keep_images` is not: there are no lists of images to choose from.")
        if self.dataset_name == "digits" and self.num_prompts is None:
            raise ValueError("`num_prompts` is not set; prompts of `digits` are drawn, so say how many (e.g. 400).")
        if self.dataset_name == "digits":
            for name in READING_OPTIONS:
                if getattr(self, name) is not None and getattr(self, name) is not False:
                    raise ValueError(f"`{name}` is set; prompts of `digits` are drawn and not read. Leave it out.")
        if self.streaming and self.num_prompts is None:
            raise ValueError("`streaming` is set and `num_prompts` is not; say how many prompts to read.")

    @property
    def filters(self) -> Filters:
        return Filters(self.aesthetic_min, self.nsfw_max, self.watermark_max, self.min_side)

    @property
    def needed(self) -> int | None:
        return None if self.num_prompts is None else self.num_prompts + self.num_test_prompts


def argument_classes() -> tuple[type, ...]:
    return (PromptsArguments,)


def main(args: PromptsArguments) -> None:
    require("prompts", dataset_name=args.dataset_name, output_dir=args.output_dir)
    if not is_main_process():
        return
    from datasets import Features, Value

    options = {
        name: value
        for name, value in asdict(args).items()
        if name not in ("output_dir", "download_workers", *asdict(PublishingOptions()))
    }
    features = Features({"prompt": Value("string"), "row": Value("int64")})
    (draw if args.dataset_name == "digits" else collect)(args, options, features)
    args.publish(args.output_dir)


def draw(args: PromptsArguments, options: dict[str, Any], features: Features) -> None:
    """Prompts of the embedded world, with a clean scan of what they ask for where images are wanted."""
    from datasets import Image
    from PIL.Image import fromarray

    from trl_diffusion_rank.data.images import as_png
    from trl_diffusion_rank.digits.data import make_clean_images, make_prompts

    if (artefact := unfinished(args, options)) is None:
        return
    prompts = make_prompts(args.num_prompts + args.num_test_prompts, seed=args.seed)
    columns = []
    if args.keep_images:
        features["image"] = Image()
        columns = ["image"]
        images = [as_png(fromarray(image)) for image in make_clean_images(prompts, seed=args.seed)]
    drawn = [
        Candidate(index, prompt, prompt, {"image": images[index]} if columns else {})
        for index, prompt in enumerate(prompts)
    ]
    train, test = drawn[: args.num_prompts], drawn[args.num_prompts :]
    splits = {"train": plain_rows(train, 0, columns), "test": plain_rows(test, len(train), columns)}
    save(artefact, args, splits, features)


def collect(args: PromptsArguments, options: dict[str, Any], features: Features) -> None:
    """Prompts of a dataset, from its rows to the artefact."""
    from datasets import Features, Image, List, Value

    from trl_diffusion_rank.data.artefact import public
    from trl_diffusion_rank.data.loading import load_rows, stream_columns, undecoded
    from trl_diffusion_rank.data.ranked_rows import IMAGES, merge_votes, read_votes

    rows = undecoded(load_rows(args.dataset_name, args.dataset_split, args.dataset_config, streaming=args.streaming))
    names = rows.column_names or list(next(iter(rows), {}))  # a stream may not know them before its first row
    column = prompt_column(args.prompt_column, names, args.dataset_name)
    source = image_source(args, names, rows.features)
    check_kept_columns(args, names, rows.features)
    limits = args.filters.columns(names, with_images=source in ("image", "url"))
    if (artefact := unfinished(args, options | {"input": fingerprint(args, rows)})) is None:
        return

    # which prompts
    counts, summary, sections = Counter(), {}, {}
    if source == "pairs":
        votes = read_votes(rows, args.dataset_split)
        summary["Votes"] = f"{votes}."
        texts = ({column: caption} for caption in votes.images)
    else:
        if source == "images":
            rows, summary["Unusable lists"] = usable_lists(rows, column, args.dataset_split)
        beside = {"url": [args.url_column], "image": [args.image_column] if args.streaming else []}.get(source, [])
        read = dict.fromkeys([column, *(args.keep_columns or []), *chain(*limits.values()), *beside])
        if args.streaming:
            rows = undecoded(stream_columns(rows, args.dataset_name, args.dataset_split, args.dataset_config, [*read]))
        texts = read_rows(rows, list(read))
    found = candidates(texts, column, counts, lambda row: args.filters.refuse(row, limits), token_limit(args))
    if source in ("image", "url"):
        kind = Features({"index": Value("int64"), "image": Image(), "status": Value("string")})
        parts = artefact.parts("images", ("index",), kind)
        if not args.streaming:
            found = sorted(found, key=lambda candidate: split_order(candidate.prompt, args.seed))
        chosen, reasons = gather_images(found, rows, source, args, parts, counts)
        summary["Images"] = f"Images looked at: {_listed(reasons)}."
        sections["Images"] = format_table(["image", "count"], [[name, f"{n}"] for name, n in _ordered(reasons)])
    else:
        chosen = list(islice(found, args.needed) if args.streaming else found)
    if cut := counts.pop("cut", 0):
        summary["Cut"] = f"{cut} prompts were cut to what the text encoder of `{public(args.tokenizer)}` reads."
    if counts:
        summary["Left out"] = f"Left out: {_listed(counts)}."
    summary = {heading: text for heading, text in summary.items() if text}
    sections = summary | sections
    for text in sections.values():
        print(text)
    others = " ".join(summary.values())
    train, test = split_prompts(chosen, args.num_prompts, args.num_test_prompts, args.seed, others)

    # what is written of them
    keep_columns = args.keep_columns or []
    features.update({name: _feature(rows, name, chosen) for name in keep_columns})
    splits = {"train": plain_rows(train, 0, keep_columns), "test": plain_rows(test, len(train), keep_columns)}
    if source in ("image", "url"):
        features["image"] = Image()
        splits = {name: with_gathered(splits[name], of, parts) for name, of in (("train", train), ("test", test))}
    elif source is not None:
        chosen = [*train, *test]
        places = [candidate.index for candidate in chosen]
        if source == "pairs":
            rows = merge_votes(rows, _of_captions(votes, [candidate.caption for candidate in chosen]))
            rows, places = rows.rename_column(IMAGES, "images"), range(len(chosen))
        features.update({name: rows.features[name] for name in RATINGS if name in rows.column_names})
        features["images"] = List(Image())
        splits = {
            "train": with_lists(splits["train"], places[: len(train)], rows, args.keep),
            "test": with_lists(splits["test"], places[len(train) :], rows, args.keep),
        }
    save(artefact, args, splits, features, sections)


def unfinished(args: PromptsArguments, made_of: dict[str, Any]) -> Artefact | None:
    """The artefact, None if it is there already."""
    from trl_diffusion_rank.data.artefact import Artefact

    artefact = Artefact(args.output_dir, made_of)
    if artefact.finished:
        print(f"The prompts in {args.output_dir} are finished.")
        return None
    return artefact


def _ordered(counts: Counter) -> list[tuple[str, int]]:
    """The most frequent first; which came first says nothing."""
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _listed(counts: Counter) -> str:
    return ", ".join(f"{n} {reason}" for reason, n in _ordered(counts)) or "none"


def save(
    artefact: Artefact,
    args: PromptsArguments,
    splits: dict[str, Iterator[dict[str, list[Any]]]],
    features: Features,
    sections: dict[str, str] | None = None,
) -> None:
    from trl_diffusion_rank.data.artefact import Card, public

    card = Card(
        title="Prompts",
        text=f"Prompts from `{public(args.dataset_name)}`, to train on and to evaluate on.",
        columns={
            "row": "number over both splits, part of the seeds of images",
            "image": "of the dataset, as its bytes came",
            "images": "of the dataset, as their bytes came",
            "ranks": "1 is the best, ties are equal",
            "psi": "share of its votes that each image won",
        },
        stage="prompts",
        options=asdict(args),
        sections=sections or {},
        tags=["text-to-image"],
    )
    counts = artefact.save(splits, features, card)
    train, test = (counts.get(split, 0) for split in ("train", "test"))
    print(f"{train} prompts to train on and {test} to evaluate on, in {args.output_dir}")


# what is read ----------------------------------------------------------


def image_source(args: PromptsArguments, names: list[str], features: Features | None) -> str | None:
    """Which images it has: `pairs` (Pick-a-Pic's), `images` (lists), `image` or `url`; None where none are wanted."""
    from trl_diffusion_rank.data.ranked_rows import PICKAPIC_COLUMNS

    if not args.keep_images:
        return None

    def has(name: str, in_lists: bool = False) -> bool:
        return name in names and (features is None or _holds_images(features[name], in_lists))

    source = "pairs" if set(names) >= PICKAPIC_COLUMNS else "images" if has("images", in_lists=True) else None
    if source is not None and args.streaming:
        raise ValueError(
            "`keep_images` needs the whole dataset where a row has several images, and where pairs of a caption are "
            "merged that stand anywhere in it: leave `streaming` unset, or `keep_images`."
        )
    if source == "pairs" and (args.keep_columns or args.filters != Filters()):
        raise ValueError(
            "`keep_images` merges Pick-a-Pic's pairs to one row a caption: `keep_columns` and filters, which look at "
            "single pairs, can't be used with it."
        )
    if source == "pairs" and args.prompt_column not in (None, "caption"):
        raise ValueError(
            f"`prompt_column` is {args.prompt_column!r}, and `keep_images` merges Pick-a-Pic's pairs by their "
            "`caption`. Leave it out."
        )
    if source == "images" and args.min_side is not None:
        raise ValueError(
            "`min_side` is set, and the sizes of images in lists aren't looked at. Leave it out; `generate` and `dpo` "
            "fit images to their resolution."
        )
    if source is not None:
        return source
    if has(args.image_column):
        source = "image"
    elif args.url_column in names:
        source = "url"
    else:
        raise ValueError(
            f"`keep_images` is set, and {args.dataset_name!r} has none: there is no column of images "
            f"{args.image_column!r} (`image_column`), of addresses {args.url_column!r} (`url_column`) or of lists of "
            f"images 'images'. Its columns are {', '.join(names)}."
        )
    if args.keep is not None:
        raise ValueError(f"`keep` is {args.keep}, and {args.dataset_name!r} has one image a row. Leave it out.")
    return source


def check_kept_columns(args: PromptsArguments, names: list[str], features: Features | None) -> None:
    for name in args.keep_columns or []:
        check_column("keep_columns", name, names, args.dataset_name)
        if name in (*OWN_COLUMNS, *RATINGS):
            raise ValueError(
                f"`keep_columns` has {name!r}, a name that the stage itself writes. Leave it out, or rename that "
                "column; images and their ranks are kept by `keep_images`."
            )
        if features is not None and (_holds_images(features[name]) or _holds_images(features[name], in_lists=True)):
            raise ValueError(
                f"`keep_columns` has {name!r}, whose values are as large as images: all of them would be in memory. "
                "Images are kept by `keep_images`."
            )


def _holds_images(feature: Any, in_lists: bool = False) -> bool:
    """Images of `datasets`, their parquet without its metadata, or plain bytes, as Pick-a-Pic has them."""
    from datasets import Image, List, Value

    if in_lists:
        return isinstance(feature, List) and _holds_images(feature.feature)
    if isinstance(feature, dict):
        return {"bytes", "path"} <= set(feature)
    return isinstance(feature, Image) or feature in (Value("binary"), Value("large_binary"))


def fingerprint(args: PromptsArguments, rows: Dataset | IterableDataset) -> str:
    """Of the data: another file or revision under the same name makes other prompts."""
    from datasets import Dataset, load_dataset_builder

    from trl_diffusion_rank.data.loading import FILE_BUILDERS

    if isinstance(rows, Dataset):
        return rows._fingerprint
    path = Path(args.dataset_name)  # a stream doesn't know what it reads, but its builder does
    if path.is_file():
        builder = load_dataset_builder(FILE_BUILDERS[path.suffix], data_files=str(path))
    else:
        builder = load_dataset_builder(args.dataset_name, args.dataset_config)
    return f"{builder.config_id}-{builder.hash}"


def read_rows(rows: Dataset | IterableDataset, columns: list[str]) -> Iterator[dict[str, Any]]:
    """Rows one by one, read in batches, which is much faster."""
    for batch in rows.select_columns(columns).iter(batch_size=ROWS_AT_ONCE):
        for values in zip(*(batch[name] for name in columns), strict=True):
            yield dict(zip(columns, values, strict=True))


def usable_lists(rows: Dataset, column: str, name: str) -> tuple[Dataset, str]:
    """The rows whose lists can be trained on, and what is to be said of the others."""
    from trl_diffusion_rank.data.ranked_rows import IMAGES, BadRowError, image_counts, read_row

    ratings = [rating for rating in RATINGS if rating in rows.column_names]
    usable, bad = [], []
    lengths = image_counts(rows, "images")
    for index, (row, length) in enumerate(zip(read_rows(rows, [column, *ratings]), lengths, strict=True)):
        row |= {"prompt": "", IMAGES: [None] * length}
        try:
            read_row(row, f"Row {index} of the {name} dataset")
            usable.append(index)
        except BadRowError as error:
            bad.append(error)
    if not bad:
        return rows, ""
    return rows.select(usable), f"Left out: {len(bad)} unusable lists of images. First: {bad[0]}"


def token_limit(args: PromptsArguments) -> Callable[[str], str | None]:
    if args.tokenizer is None:
        return lambda text: text
    from trl_diffusion_rank.diffusion.loading import load_tokenizer

    return TokenLimit(load_tokenizer(args.tokenizer), args.max_tokens, cut=args.on_long_prompt == "cut")


# the images, one a prompt ----------------------------------------------


def gather_images(
    found: Iterable[Candidate],
    rows: Dataset | IterableDataset,
    source: str,
    args: PromptsArguments,
    parts: Parts,
    counts: Counter,
) -> tuple[list[Candidate], Counter]:
    """
    Go down the candidates until as many as are needed have an image, writing images as they come. What an earlier
    attempt has looked at, with whatever result, is not looked at again.

    Downloads run ahead, as far as the network allows: `counts`, of what was left out between the candidates, is set
    back to what it was at the last one that was needed, so that it doesn't depend on their pace.

    Returns the candidates with an image, and how many images ended for which reason.
    """
    from tqdm import tqdm

    keys = sorted(parts.scan())
    done = {index: had["status"] for (index,), had in zip(keys, parts.read(keys, ["status"]), strict=True)}
    found, ahead = tee((candidate, counts.copy()) for candidate in found)
    missing = (candidate for candidate, _ in ahead if candidate.index not in done)
    looked_at = _download(missing, args) if source == "url" else _look_at(missing, rows, args)
    usable, reasons, unwritten = [], Counter(), []

    def write() -> None:
        if unwritten:
            parts.write(dict(zip(("index", "image", "status"), map(list, zip(*unwritten, strict=True)), strict=True)))
            unwritten.clear()

    with closing(looked_at), tqdm(total=args.needed, desc="images", unit="image") as bar:
        for candidate, left_out in found:
            status = done.get(candidate.index)
            if status is None:
                image, status = next(looked_at)
                unwritten.append((candidate.index, image, status))
                if len(unwritten) == IMAGES_PER_PART:
                    write()
            reasons[status] += 1
            if status == "ok":
                kept = {name: candidate.row[name] for name in args.keep_columns or []}  # a row may hold its image
                usable.append(candidate._replace(row=kept))
                bar.update()
            if len(usable) == args.needed:
                counts.clear()
                counts.update(left_out)
                break
    write()
    parts.scan()
    return usable, reasons


def _download(missing: Iterable[Candidate], args: PromptsArguments) -> Iterator[tuple[dict | None, str]]:
    """(image, status) of the candidates' URLs."""
    from trl_diffusion_rank.data.download import DownloadLimits, download_images

    limits = DownloadLimits(
        max_bytes=math.ceil(args.download_max_megabytes * 2**20),
        max_pixels=math.ceil(args.download_max_megapixels * 2**20),
        min_side=args.min_side or 0,
        timeout=args.download_timeout,
        retries=args.download_retries,
        allow_private_hosts=args.allow_private_hosts,
    )
    urls = (candidate.row[args.url_column] for candidate in missing)
    with closing(download_images(urls, limits, args.download_workers)) as results:
        for result in results:
            yield None if result.image is None else _encoded(result.image), result.reason


def _look_at(
    missing: Iterable[Candidate], rows: Dataset | IterableDataset, args: PromptsArguments
) -> Iterator[tuple[dict | None, str]]:
    """(image, status) of images that the dataset holds."""
    from trl_diffusion_rank.data.images import decode_image
    from trl_diffusion_rank.data.loading import embedded

    missing = iter(missing)
    while batch := list(islice(missing, ROWS_AT_ONCE)):
        if args.streaming:
            values = [candidate.row[args.image_column] for candidate in batch]
        else:
            values = rows.select_columns([args.image_column])[[candidate.index for candidate in batch]]
            values = values[args.image_column]
        for value in values:
            try:
                image = embedded(_encoded(value))
            except (OSError, TypeError):  # no such file, or neither bytes nor a file
                yield None, "no_image"
                continue
            try:
                small = min(decode_image(image).size) < (args.min_side or 0)
            except ValueError:
                yield None, "not_an_image"
                continue
            yield (None, "too_small") if small else (image, "ok")


def _encoded(value: Any) -> dict[str, Any]:
    """An image as `datasets` stores it: it has them as plain bytes too."""
    return value if isinstance(value, dict) else {"bytes": value, "path": None}


# what is written -------------------------------------------------------


def plain_rows(chosen: list[Candidate], first_row: int, keep_columns: list[str]) -> Iterator[dict[str, list[Any]]]:
    """Prompts, their row numbers and the columns that are kept."""
    for start in range(0, len(chosen), ROWS_AT_ONCE):
        batch = chosen[start : start + ROWS_AT_ONCE]
        yield {
            "prompt": [candidate.prompt for candidate in batch],
            "row": list(range(first_row + start, first_row + start + len(batch))),
            **{name: [candidate.row[name] for candidate in batch] for name in keep_columns},
        }


def with_gathered(
    batches: Iterator[dict[str, list[Any]]], chosen: list[Candidate], parts: Parts
) -> Iterator[dict[str, list[Any]]]:
    """... and the image of each."""
    keys = iter([(candidate.index,) for candidate in chosen])
    for batch in batches:
        results = parts.read(list(islice(keys, len(batch["prompt"]))), columns=["image"])
        yield batch | {"image": [result["image"] for result in results]}


def with_lists(
    batches: Iterator[dict[str, list[Any]]], places: Iterable[int], lists: Dataset, keep: int | None
) -> Iterator[dict[str, list[Any]]]:
    """
    ... and the ranked list of each.

    Args:
        places: where in `lists` the list of each prompt is.
        lists: its columns `images`, undecoded, and those of `RATINGS` that it has.
        keep: images of each list, all when None.
    """
    names = ["images", *(name for name in RATINGS if name in lists.column_names)]
    lists, places = lists.select_columns(names), iter(places)
    for batch in batches:
        rows = lists[list(islice(places, len(batch["prompt"])))]
        if keep is not None:
            rows = _spread(rows, keep)
        images = [_all_embedded(*of_prompt) for of_prompt in zip(rows["images"], batch["prompt"], strict=True)]
        yield batch | rows | {"images": images}


def _all_embedded(images: list[Any], prompt: str) -> list[dict[str, Any]]:
    from trl_diffusion_rank.data.loading import embedded

    try:
        return [embedded(_encoded(image)) for image in images]
    except (OSError, TypeError) as error:
        raise ValueError(
            f"An image of the prompt {prompt!r} has neither bytes nor a file that can be read ({error}). Remove that "
            "row, or leave `keep_images` out."
        ) from error


def _spread(rows: dict[str, list[list[Any]]], keep: int) -> dict[str, list[list[Any]]]:
    """Of each list the `keep` images that are spread best."""
    import numpy as np

    from trl_diffusion_rank.data.ranked_rows import dense_ranks
    from trl_diffusion_rank.scorers.aggregate import spread_best

    def rating(row: int) -> np.ndarray:
        """Either way up: what is spread best is so from both ends."""
        for name in ("psi", "scores", "ranks"):
            if name in rows and rows[name][row] is not None:
                return np.array(rows[name][row], dtype=float)
        return np.arange(len(rows["images"][row]), dtype=float)  # they stand from best to worst

    kept = [spread_best(rating(row), keep).tolist() for row in range(len(rows["images"]))]
    rows = {
        name: [None if value is None else [value[i] for i in own] for value, own in zip(values, kept, strict=True)]
        for name, values in rows.items()
    }
    if "ranks" in rows:
        rows["ranks"] = [ranks and dense_ranks([-rank for rank in ranks]) for ranks in rows["ranks"]]
    return rows


def _of_captions(votes: Votes, captions: list[str]) -> Votes:
    from trl_diffusion_rank.data.ranked_rows import Votes

    return Votes(
        {caption: votes.images[caption] for caption in captions},
        {caption: votes.pairs[caption] for caption in captions},
    )


def _feature(rows: Dataset | IterableDataset, name: str, chosen: list[Candidate]) -> Any:
    """The feature of a column that is kept; a stream that doesn't know gives it by its values."""
    from datasets import Dataset

    if rows.features is not None:
        return rows.features[name]
    return Dataset.from_dict({name: [candidate.row[name] for candidate in chosen]}).features[name]


if __name__ == "__main__":
    from trl_diffusion_rank.recipe import run_stage

    run_stage("prompts")
