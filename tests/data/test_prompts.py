from collections import Counter

import pytest

from trl_diffusion_rank.data.prompts import Candidate, Filters, TokenLimit, candidates, split_order, split_prompts
from trl_diffusion_rank.diffusion.loading import load_tokenizer


ANIMALS = [f"an animal of kind {i}" for i in range(20)]
COYO = ["url", "text", "width", "height", "nsfw_score_opennsfw2", "nsfw_score_gantman", "watermark_score"]
COYO += ["aesthetic_score_laion_v2"]
GOOD = {"width": 512, "height": 512, "nsfw_score_opennsfw2": 0.1, "nsfw_score_gantman": 0.2, "watermark_score": 0.3}
GOOD |= {"aesthetic_score_laion_v2": 6.5}


# Filters


@pytest.mark.parametrize(
    ("option", "limit", "column", "just", "beyond"),
    [
        ("aesthetic_min", 6.5, "aesthetic_score_laion_v2", 6.5, 6.499),
        ("nsfw_max", 0.25, "nsfw_score_opennsfw2", 0.25, 0.2501),
        ("nsfw_max", 0.25, "nsfw_score_gantman", 0.25, 0.2501),
        ("watermark_max", 0.5, "watermark_score", 0.5, 0.501),
        ("watermark_max", 0.3, "watermark_score", 0.0, 1.0),
        ("min_side", 512, "width", 512, 511),
        ("min_side", 512, "height", 512, 511),
    ],
)
def test_limits_are_inclusive_and_what_is_not_known_passes_nothing(option, limit, column, just, beyond):
    filters = Filters(**{option: limit})
    columns = filters.columns(COYO)
    assert list(columns) == [option] and column in columns[option]
    assert filters.refuse(GOOD | {column: just}, columns) is None
    for value in (beyond, None, float("nan")):
        assert filters.refuse(GOOD | {column: value}, columns) == option


def test_the_first_limit_that_refuses_is_named():
    filters = Filters(aesthetic_min=6, nsfw_max=0.5, watermark_max=0.5, min_side=100)
    columns = filters.columns(COYO)
    assert filters.refuse(GOOD, columns) is None
    assert filters.refuse(GOOD | {"watermark_score": 0.9, "height": 1}, columns) == "watermark_max"
    assert Filters().columns([]) == {} and Filters().refuse({}, {}) is None


@pytest.mark.parametrize(
    ("option", "column"),
    [
        ("aesthetic_min", "aesthetic_score_laion_v2"),
        ("nsfw_max", r"nsfw_score_\*"),
        ("watermark_max", "watermark_score"),
        ("min_side", "width"),
    ],
)
def test_a_limit_without_its_column_is_refused(option, column):
    with pytest.raises(ValueError, match=rf"`{option}` reads the column '{column}', .*; the columns are text, url\."):
        Filters(**{option: 1}).columns(["text", "url"])


def test_images_that_are_looked_at_have_sizes_themselves():
    assert Filters(min_side=8).columns(["text"], with_images=True) == {"min_side": ()}
    assert Filters(min_side=8).columns(["width"], with_images=True) == {"min_side": ("width",)}
    with pytest.raises(ValueError, match="`watermark_max` reads"):
        Filters(watermark_max=0.5).columns(["text"], with_images=True)


# Candidates


def texts(*values) -> list[dict]:
    return [{"text": value} for value in values]


def test_each_prompt_once_without_the_space_around_it():
    counts = Counter()
    rows = texts("a cat", None, " a cat\n", "", " \t", "a  dog ", "a dog", "A cat")
    found = list(candidates(rows, "text", counts))
    assert [candidate.prompt for candidate in found] == ["a cat", "a  dog", "A cat"]
    assert [candidate.index for candidate in found] == [0, 5, 7]
    assert found[1].row == {"text": "a  dog "}
    assert counts == {"empty": 3, "repeated": 2}


def test_texts_that_are_equal_once_they_are_cut_count_as_repeated():
    counts = Counter()
    rows = texts("a cat on a mat", "a cat on a roof", "a cat", "x", "a dog on a mat")
    found = candidates(rows, "text", counts, shorten=lambda text: " ".join(text.split()[:2]) if " " in text else None)
    assert [(c.prompt, c.caption) for c in found] == [("a cat", "a cat on a mat"), ("a dog", "a dog on a mat")]
    assert +counts == {"repeated": 2, "too long": 1, "cut": 2}


def test_what_is_refused_is_counted_by_its_reason_and_not_tokenized():
    counts, shortened = Counter(), []
    rows = [{"text": f"cat {i}", "score": i} for i in range(4)]
    found = candidates(
        rows,
        "text",
        counts,
        refuse=lambda row: "score_min" if row["score"] < 3 else None,
        shorten=lambda text: shortened.append(text) or text,
    )
    assert [candidate.row["score"] for candidate in found] == [3]
    assert +counts == {"score_min": 3}
    assert shortened == ["cat 3"]


def test_rows_are_read_as_they_are_asked_for():
    read = []
    found = candidates((read.append(i) or {"text": f"cat {i}"} for i in range(100)), "text", Counter())
    next(found)
    assert read == [0]


def test_a_prompt_that_is_no_text_is_named():
    with pytest.raises(TypeError, match="Row 1: the prompt must be a text, got 7; say with `prompt_column`"):
        list(candidates(texts("a cat", 7), "text", Counter()))


# Token limit, with the shipped tokenizer: it reads 16 tokens, two of them begin and end, one a word in its vocabulary


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("digits")


def count(tokenizer, text: str) -> int:
    return len(tokenizer(text)["input_ids"])


def test_what_fits_stays_as_it_is(tokenizer):
    fits = " ".join(["red"] * 14)
    assert count(tokenizer, fits) == 16 and count(tokenizer, f"{fits} red") == 17
    for cut in (True, False):
        limit = TokenLimit(tokenizer, None, cut)
        assert limit(fits) == fits
        assert limit("a  red five ,") == "a  red five ,"
    assert TokenLimit(tokenizer, None, cut=True)(f"{fits} red") == fits
    assert TokenLimit(tokenizer, None, cut=False)(f"{fits} red") is None


def test_a_longer_text_is_cut_after_the_last_word_that_fits(tokenizer):
    words = "a red five and a blue six, written in a xylophonist's hand on old paper from Basel".split()
    text = " ".join(words)
    for most in range(3, count(tokenizer, text)):
        cut = TokenLimit(tokenizer, most, cut=True)(text)
        kept = len(cut.split())
        assert cut == " ".join(words[:kept]).rstrip(",")
        assert count(tokenizer, " ".join(words[:kept])) <= most < count(tokenizer, " ".join(words[: kept + 1]))
    assert TokenLimit(tokenizer, count(tokenizer, text), cut=True)(text) == text


def test_no_punctuation_is_left_at_the_cut(tokenizer):
    assert TokenLimit(tokenizer, 7, cut=True)("a red five , - and a blue six") == "a red five"


def test_a_single_word_that_is_too_long_can_not_be_cut(tokenizer):
    limit = TokenLimit(tokenizer, None, cut=True)
    assert limit("x" * 500) is None
    assert limit("x" * 500 + " red") is None
    assert limit("red " + "x" * 500) == "red"
    assert TokenLimit(tokenizer, 2, cut=True)("red") is None  # only begin and end


def test_spaces_alone_are_no_reason_to_lose_a_word():
    """A tokenizer that counts characters: without its double space the text fits."""
    limit = TokenLimit(lambda text, verbose: {"input_ids": list(text)}, 8, cut=True)
    assert limit("one  five") == "one five"
    assert limit("one  three") == "one"


def test_a_tokenizer_without_a_limit_needs_one(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "model_max_length", int(1e30))
    with pytest.raises(ValueError, match="doesn't say how much its text encoder reads: set `max_tokens`"):
        TokenLimit(tokenizer, None, cut=True)
    assert TokenLimit(tokenizer, 4, cut=True)("a red five") == "a red"


# Split


def split(prompts: list[str], *args, **kwargs) -> tuple[list[str], list[str]]:
    of = split_prompts([Candidate(index, prompt, prompt, {}) for index, prompt in enumerate(prompts)], *args, **kwargs)
    return tuple([candidate.prompt for candidate in part] for part in of)


def test_split_does_not_depend_on_order_and_does_on_seed():
    train, test = split(ANIMALS, 10, 5, seed=0)
    assert (len(train), len(test)) == (10, 5) and not set(train) & set(test)
    assert split(ANIMALS[::-1], 10, 5, seed=0) == (train, test)
    assert split(ANIMALS, 10, 5, seed=1) != (train, test)


def test_prompts_keep_their_order_when_others_come():
    """So that of those for the test few change."""
    order = split(ANIMALS, None, 0, seed=0)[0]
    test = split([f"a plant of kind {i}" for i in range(10)] + ANIMALS, None, 10, seed=0)[1]
    animals = [prompt for prompt in test if prompt in ANIMALS]
    assert animals == order[: len(animals)] and len(animals) >= 4


def test_spaces_do_not_move_a_prompt_to_the_other_split():
    assert split_order("a  cat", 3) == split_order("a cat", 3) != split_order("a cat", 4)


def test_all_that_are_left_are_for_training():
    assert [len(part) for part in split(ANIMALS, None, 5, seed=0)] == [15, 5]
    assert [len(part) for part in split(ANIMALS, None, 0, seed=0)] == [20, 0]
    assert [len(part) for part in split(ANIMALS, 20, 0, seed=0)] == [20, 0]


@pytest.mark.parametrize(("train", "test"), [(16, 5), (None, 20), (21, 0)])
def test_too_few_prompts_are_refused_with_what_became_of_the_others(train, test):
    message = (
        rf"`num_prompts` is {train} and `num_test_prompts` is {test}, but there are only 20 .* Left out: 3 empty\.$"
    )
    with pytest.raises(ValueError, match=message):
        split(ANIMALS, train, test, seed=0, others="Left out: 3 empty.")
    with pytest.raises(ValueError, match=r"takes all that are left\)\.$"):
        split(ANIMALS, train, test, seed=0)
