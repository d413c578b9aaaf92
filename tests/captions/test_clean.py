import itertools
import re

import pytest
from tiny import tiny_t5_tokenizer, tiny_tokenizer
from transformers import CLIPTokenizer

from trl_diffusion_rank.captions import clean_caption, token_counter


# What models write, and the prompt that a person would make of it by taking away alone.
CAPTIONS = {
    # LLaVA
    "deck": (
        "The image captures a serene scene of a small, rusted watchtower standing in the middle of a field. The sky "
        "is overcast. Overall, the image conveys a sense of solitude and quiet.",
        "a small, rusted watchtower standing in the middle of a field. The sky is overcast.",
    ),
    "surfer": (
        "The image features a man riding a wave on a surfboard. He is wearing a wetsuit and appears to be enjoying "
        "the ride. There are several other people in the water, some of them on surfboards.\n\nThe scene captures the "
        "excitement of surfing.",
        "a man riding a wave on a surfboard. He is wearing a wetsuit and appears to be enjoying the ride. Several "
        "other people in the water, some of them on surfboards.",
    ),
    "cut off": (
        "The main focus of the image is a large clock tower, which is part of a building. The clock is visible on the "
        "front of the tower. There are a few",
        "a large clock tower, which is part of a building. The clock is visible on the front of the tower.",
    ),
    "cut off in the first sentence": (
        "The image shows a narrow street in an old town, with laundry hanging between",
        "a narrow street in an old town, with laundry hanging between",
    ),
    "we can see": (
        "In this image, we can see a woman standing on the stage and holding a mic. In the background, we can see a "
        "wall and there are two lamps.",
        "a woman standing on the stage and holding a mic. In the background, a wall and there are two lamps.",
    ),
    "in the image": (
        "In the image, there is a wooden table with a bowl of fruit. On the left side of the image, there are two "
        "candles. A cat is visible in the picture.",
        "a wooden table with a bowl of fruit. On the left side, two candles. A cat is visible.",
    ),
    "scene": (
        "The scene takes place in a busy airport, with travelers walking through the terminal. The scene also "
        "includes a row of parked luggage carts.",
        "a busy airport, with travelers walking through the terminal. A row of parked luggage carts.",
    ),
    "creating": (
        "The photo depicts a red fox in fresh snow, its fur glowing in the light, creating a sense of warmth and "
        "calm. Snow covers the trees, adding to the peaceful atmosphere of the scene.",
        "a red fox in fresh snow, its fur glowing in the light. Snow covers the trees.",
    ),
    "mood": (
        "This captivating photograph captures the essence of a bustling Tokyo street at night. Neon signs glow above "
        "the crowd. The overall mood is energetic. The composition draws the viewer's attention to the lights.",
        "a bustling Tokyo street at night. Neon signs glow above the crowd.",
    ),
    "captured": (
        "Captured in this image is a hummingbird near a red flower. The scene has a peaceful atmosphere. The mood of "
        "the picture is light. It is a testament to nature. Its wings are a blur, inviting viewers to look closer.",
        "a hummingbird near a red flower.",
    ),
    "glimpse": (
        "This image offers a glimpse into a blacksmith's workshop. In the picture there is an anvil. Sparks fly.",
        "a blacksmith's workshop. An anvil. Sparks fly.",
    ),
    "stutter": (
        "The image shows two dogs on a beach. The dogs are running. The dogs are running. The dogs are running. The "
        "dogs are",
        "two dogs on a beach. The dogs are running.",
    ),
    "proper noun": (
        "The image presents Mount Fuji at sunrise. In the foreground of the image, there are cherry trees in bloom.",
        "Mount Fuji at sunrise. In the foreground, cherry trees in bloom.",
    ),
    "role": (
        "ASSISTANT: The image depicts Big Ben standing tall over London.",
        "Big Ben standing tall over London.",
    ),
    # Qwen-VL, Gemma and the like
    "chatter": (
        "Sure! Here is a detailed description of the image:\n\nThe image shows a cozy reading corner with a green "
        "armchair. A floor lamp stands beside it.",
        "a cozy reading corner with a green armchair. A floor lamp stands beside it.",
    ),
    "headings": (
        "### Image Description\n\n**Foreground:** A red bicycle leans against a brick wall.\n\n**Background:** Ivy "
        "covers the windows.\n\n---\n\nOverall, the scene feels nostalgic.",
        "a red bicycle leans against a brick wall. Ivy covers the windows.",
    ),
    "list": (
        "The image shows the following elements:\n\n1. **Cat**: An *orange* tabby on a windowsill\n2. **Plant**: A "
        "potted fern\n3. **Light**: Soft morning sun from the left",
        "an orange tabby on a windowsill. A potted fern. Soft morning sun from the left.",
    ),
    "list with labels": (
        "- Subject: A knight in dented armor,\n- Setting: A ruined chapel at dusk.",
        "a knight in dented armor. A ruined chapel at dusk.",
    ),
    "quotation marks": (
        '"A cozy cabin in the snow, warm light in the windows, photorealistic."',
        "a cozy cabin in the snow, warm light in the windows, photorealistic.",
    ),
    "wrapped lines": (
        "Okay, here's a prompt for the image: a lone tree\non a hill,  under a stormy sky.",
        "a lone tree on a hill, under a stormy sky.",
    ),
    "questions": (
        "The image you've provided shows a lighthouse. In the distance, there's a ferry. Let me know if you need more "
        "details!",
        "a lighthouse. In the distance, a ferry.",
    ),
    "close-up": (
        "This is a close-up of a bee on a lavender flower. The image does not contain any text.",
        "a close-up of a bee on a lavender flower.",
    ),
    # The medium
    "photograph of": (
        "A photograph of an old lighthouse at dusk, taken from the sea.",
        "a photograph of an old lighthouse at dusk, taken from the sea.",
    ),
    "painting": (
        "The painting portrays a young woman in a blue dress. The painting also includes a small dog.",
        "a painting of a young woman in a blue dress. The painting also includes a small dog.",
    ),
    "illustration": (
        "This digital illustration depicts a serene scene of a koi pond. The colors are muted.",
        "a digital illustration of a koi pond. The colors are muted.",
    ),
    "it is": ("It is a painting of a ship at sea.", "a painting of a ship at sea."),
    "etching": ("The etching contains a ship and a whale.", "an etching with a ship and a whale."),
    "black and white": (
        "The black and white photo shows a group of men in suits. There is a clock on the wall.",
        "a black and white photo of a group of men in suits. A clock on the wall.",
    ),
    "image is": (
        "The image is a black-and-white photograph of a pianist. She wears a dark coat.",
        "a black-and-white photograph of a pianist. She wears a dark coat.",
    ),
    # BLIP, GIT
    "blip": ("a dog wearing a hat", "a dog wearing a hat"),
    "blip image of": ("an image of a dog wearing a hat", "a dog wearing a hat"),
    "blip there is": (
        "there is a cat that is sitting on a table with a plate of food",
        "a cat that is sitting on a table with a plate of food",
    ),
    "blip araffe": (
        "arafed man in a suit and tie standing in front of a building",
        "man in a suit and tie standing in front of a building",
    ),
    # Where a pattern that looks no further would do harm
    "the image of": (
        "The image of a saint hangs on a wall above an altar.",
        "the image of a saint hangs on a wall above an altar.",
    ),
    "a picture of": (
        "A picture of a saint hangs on a wall above an altar.",
        "a picture of a saint hangs on a wall above an altar.",
    ),
    "photo booth": ("Photo booth with a red curtain", "Photo booth with a red curtain"),
    "in this kitchen": (
        "In this kitchen, a woman prepares vegetables at a wooden counter.",
        "in this kitchen, a woman prepares vegetables at a wooden counter.",
    ),
    "picture frame": (
        "The picture frame contains a photo of a family. In the picture frame, a crack runs through the glass.",
        "the picture frame contains a photo of a family. In the picture frame, a crack runs through the glass.",
    ),
    "woman in the image": (
        "The woman in the image shows her ring to a friend.",
        "the woman in the image shows her ring to a friend.",
    ),
    "shows that": (
        "The image shows that the road is wet. The image is a bit blurry.",
        "the image shows that the road is wet. The image is a bit blurry.",
    ),
    "overalls": (
        "Blue jeans dry in the sun. Overalls hang beside them.",
        "Blue jeans dry in the sun. Overalls hang beside them.",
    ),
    "sure-footed": ("Sure-footed goats on a cliff.", "Sure-footed goats on a cliff."),
    "looks at the viewer": (
        "A knight stands at a gate. He looks at the viewer with a grin.",
        "a knight stands at a gate. He looks at the viewer with a grin.",
    ),
    "caption on a poster": (
        "A poster with the caption: Sure. Here is a list of details: tea, bread.",
        "a poster with the caption: Sure. Here is a list of details: tea, bread.",
    ),
    "label inside a line": (
        "- A board that says Today: soup",
        "a board that says Today: soup",
    ),
    "arafat": ("Arafat waves from a car.", "Arafat waves from a car."),
    "one spot": ("One spot on the wall is dry.", "one spot on the wall is dry."),
    "winter scene": ("A winter scene of a village square.", "a winter scene of a village square."),
    "see for miles": ("One can see for miles from this hilltop.", "one can see for miles from this hilltop."),
    "abbreviations": (
        "The image shows St. Paul's Cathedral, 3.5 meters from Dr. Who's police box in the U.S. Embassy garden. Mr. "
        "and Mrs. Smith walk by, approx. five steps behind J. R. R. Tolkien. It is 5 p.m. The sun is low.",
        "St. Paul's Cathedral, 3.5 meters from Dr. Who's police box in the U.S. Embassy garden. Mr. and Mrs. Smith "
        "walk by, approx. five steps behind J. R. R. Tolkien. It is 5 p.m. The sun is low.",
    ),
    "signs": (
        'A sign that reads "STOP!" stands at the corner. "Open" is written on the door.',
        'a sign that reads "STOP!" stands at the corner. "Open" is written on the door.',
    ),
    "acronym": ("NASA astronauts float inside the station.", "NASA astronauts float inside the station."),
    "only sentence": (
        "The image conveys a sense of adventure as a man climbs a cliff.",
        "the image conveys a sense of adventure as a man climbs a cliff.",
    ),
    "no words": ("***", "***"),
    "only chatter": ("Sure! Here is a description of the image:", "Here is a description of the image:"),
    "nothing": (" \n", ""),
}
LONG = (
    "The image shows a small fishing village built on stilts over a green lagoon, with narrow wooden walkways between "
    "the houses and long boats tied below, while a woman in a straw hat sorts silver fish into baskets."
)


def count_words(text: str) -> int:
    """A tokenizer with a token per word, one at the beginning and one at the end."""
    return len(text.split()) + 2


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    """CLIP's, with a token per letter."""
    return tiny_tokenizer()


@pytest.mark.parametrize(("text", "prompt"), CAPTIONS.values(), ids=CAPTIONS)
def test_clean_caption(text, prompt):
    assert clean_caption(text) == prompt


@pytest.mark.parametrize("max_tokens", [3, 5, 8, 12, 20, 30, 77, None])
@pytest.mark.parametrize("text", [text for text, _ in CAPTIONS.values()] + [LONG], ids=[*CAPTIONS, "long"])
def test_what_holds_for_any_caption(text, max_tokens):
    limit = {} if max_tokens is None else {"count_tokens": count_words, "max_tokens": max_tokens}
    prompt = clean_caption(text, **limit)
    assert clean_caption(prompt, **limit) == prompt
    assert bool(prompt) == bool(text.strip())
    assert max_tokens is None or not prompt or count_words(prompt) <= max_tokens
    # nothing is invented, beyond "a ... of" for "The painting portrays", and the order stays
    words = iter(re.findall(r"\w+", text.lower()))
    assert all(word in words for word in re.findall(r"\w+", prompt.lower()) if word not in ("a", "an", "of", "with"))


def test_two_captions_after_one_another():
    """Texts that no model wrote: even then cleaning twice is cleaning once."""
    texts = [text for text, _ in CAPTIONS.values()]
    for first, second in itertools.permutations(texts, 2):
        prompt = clean_caption(f"{first}\n{second}", count_words, 30)
        assert 1 <= len(prompt.split()) <= 28
        assert clean_caption(prompt, count_words, 30) == prompt


def test_whole_sentences_up_to_the_limit():
    """12 words, 4, 6 and 2, and two tokens around them: 14 tokens hold the first sentence, 18 the first two."""
    text = (
        "The image shows a small, rusted watchtower standing in the middle of a wide field. The sky is overcast. Two "
        "crows sit on the roof. It rains."
    )
    first, second = "a small, rusted watchtower standing in the middle of a wide field.", "The sky is overcast."
    assert (len(first.split()), len(second.split())) == (12, 4)
    assert clean_caption(text, count_words, 13) != first  # one too few even for the first
    assert clean_caption(text, count_words, 14) == first
    assert clean_caption(text, count_words, 17) == first
    assert clean_caption(text, count_words, 18) == f"{first} {second}"
    # a short sentence behind one that does not fit is not taken in its place
    assert clean_caption(text, count_words, 20) == f"{first} {second}"


@pytest.mark.parametrize(
    ("max_tokens", "prompt"),
    [
        # the comma's clause has 11 words, "and long boats" begins at the 18th, "while" at the 22nd
        (13, "a small fishing village built on stilts over a green lagoon"),
        (18, "a small fishing village built on stilts over a green lagoon"),
        (
            24,
            "a small fishing village built on stilts over a green lagoon, with narrow wooden walkways between the "
            "houses",
        ),
        # no clause ends within six words: between two words, and "on" is not left behind
        (8, "a small fishing village built"),
    ],
)
def test_a_first_sentence_that_is_too_long(max_tokens, prompt):
    assert clean_caption(LONG, count_words, max_tokens) == prompt


def test_commas_between_adjectives_are_no_place_to_cut():
    """A cut after "a small" would keep two words of the eight that fit."""
    text = "A small, rusted watchtower standing alone above the wide grey marshland"
    assert clean_caption(text, count_words, 8) == "a small, rusted watchtower standing alone"


def test_a_word_that_is_too_long(tokenizer):
    prompt = clean_caption("a" * 50, token_counter(tokenizer), 16)
    assert prompt == "a" * 14


def test_a_limit_that_holds_nothing():
    with pytest.raises(ValueError, match="`max_tokens` is 2 and not one letter of 'a cat' fits"):
        clean_caption("A cat", count_words, 2)


def test_token_counter_counts_what_the_text_encoder_reads(tokenizer):
    assert token_counter(tokenizer)("a cat") == 6  # a, c, a, t, and one on either side
    assert token_counter(tokenizer)("a cat " * 20) == 82  # not cut at the tokenizer's 16
    assert token_counter(tiny_t5_tokenizer())("cat") == 5  # its word mark and only an end


def test_with_the_tokenizer_of_a_text_encoder(tokenizer):
    """The letters of "a red cat" are 7, and of "It sits" 6."""
    count = token_counter(tokenizer)
    assert clean_caption("The image shows a red cat It sits", count, 9) == "a red cat"
