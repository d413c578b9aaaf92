"""From a model's prose about an image to a prompt. English, the language LLaVA and BLIP answer in.

    >>> clean_caption("The image captures a serene scene of a small, rusted watchtower. Overall, it conveys calm.")
    'a small, rusted watchtower.'

What is taken away and what stays:

* Lead-ins go, in every sentence: "The image shows", "In this picture, we can see", "There is", "a serene scene of".
* The medium stays where it says something: "A photograph of a cat" is left alone, "The painting portrays a woman"
  becomes "a painting of a woman", "The black and white image shows a man" becomes "a black and white image of a man".
  Without such a word, "image", "picture", "photo" and "scene" are only ways to begin ("The photo shows a cat").
* Chatter ("Sure! Here is a description:"), markdown and lists go, and so do sentences about an effect instead of the
  image ("Overall, ...", "The scene conveys a sense of calm.").
* Whole sentences are kept, in order, up to the text encoder's limit. One that a limit on new tokens cut off goes.

Where a pattern is in doubt it leaves a text as it is: some needless words do less harm to a prompt than wrong ones.
"""

from __future__ import annotations

import re
from itertools import takewhile
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedTokenizerBase


# ---- Words. All patterns are matched without regard to case, unless they say so. ----

# Nouns by which a model names what it looks at, whatever it is.
IMAGE = r"(?:images?|pictures?|photos?|photographs?|scenes?)"

# Nouns that say how something was made or framed.
MEDIUM = (
    r"(?:painting|drawing|sketch|illustration|cartoon|comic|poster|rendering|render|artwork|collage|mural|mosaic|"
    r"watercolou?r|engraving|etching|print|screenshot|advertisement|graphic|portrait|close-up|selfie|still life)"
)

# Adjectives before IMAGE that praise it or point at it. Others ("black and white", "aerial") belong to the medium.
EMPTY = (
    r"(?:provided|given|above|following|attached|uploaded|first|main|entire|whole|actual|overall|particular|beautiful|"
    r"stunning|striking|captivating|breathtaking|picturesque|charming|delightful|lovely|fascinating|intriguing|"
    r"remarkable|serene|peaceful|tranquil|calm|quiet|idyllic|lively|vibrant|bustling|busy|dynamic|energetic|cozy|"
    r"heartwarming|joyful|cheerful|playful|whimsical|dramatic|moody|mesmerizing|enchanting|simple|typical|vivid|"
    r"detailed|very|rather)"
)
EMPTIES = rf"(?:{EMPTY}(?:, | and | ))*"

# Up to three words in front of a noun, none of which could begin another phrase ("the woman in the image").
QUALIFIERS = r"(?:black and white |(?!(?:in|of|on|at|to|by|from|with|the|this|an?|and|or|is|are)\b)[\w-]+,? ){0,3}"

YOU_GAVE = r"(?:that )?you(?:['’]ve| have)? (?:provided|shared|sent|uploaded)"
SHOWS = (
    r"(?:also |mainly |primarily |prominently |predominantly |vividly |beautifully |clearly |simply |appears? to |"
    r"seems? to )?(?:shows?|showcas(?:es?|ing)|depicts?|depicting|features?|captures?|displays?|presents?|portrays?|"
    r"illustrates?|contains?|includes?|exhibits?|consists? of|is of|focus(?:es)? on|"
    r"(?:offers|provides|gives) (?:us )?a glimpse (?:of|into))"
    r" (?!(?:that|how|what|where|why|signs|no)\b)"
)

THERE_ARE = r"there(?:['’]s| is| are| appears? to be| seems? to be)(?: also)?"

# What a noun phrase begins with.
DETERMINER = r"(?=(?:an?|the|some|several|many|various|numerous|two|three|four|five|people)\b)"

# ---- Lead-ins, at the beginning of a sentence. They are taken away as long as one fits. ----

LEAD_INS = [
    # BLIP-large's made-up word, also "araffe"
    r"araff?ed? ",
    # In this image, | From the picture we ... | As seen in the photo,
    rf"(?:in|from|as (?:seen|shown|depicted|we can see) in) (?:the|this|these) {EMPTIES}{IMAGE}"
    r"(?:, ?| (?=(?:we|you|one|i|there)\b))",
    # we can see ... but not "one can see for miles"
    r"(?:we|you|one|i) (?:see|(?:can|could) (?:also |clearly )?(?:see|observe|notice|spot)) "
    r"(?!(?:that|how|what|why|if|it|for|from|through|into|beyond)\b)",
    # there is | there are also
    rf"{THERE_ARE} ",
    # The image shows | This beautiful photo also captures the essence of a ... | The image you shared depicts
    rf"(?:the|this|these) {EMPTIES}{IMAGE} (?:provided |above |here |{YOU_GAVE} )?{SHOWS}"
    rf"(?:the (?:essence|beauty|spirit|charm|majesty|grandeur|tranquility|serenity) of {DETERMINER})?",
    # The image is a black and white photograph of | It is a painting of ... but not "The image is a bit blurry"
    rf"(?:(?:the|this) {EMPTIES}{IMAGE}|it) (?:is|appears to be|seems to be) "
    rf"(?=an? (?:\w[\w-]*,? ){{0,5}}(?:{MEDIUM}|{IMAGE}|view|shot|still)\b)",
    # The scene is set in a busy airport
    rf"(?:the|this) {EMPTIES}{IMAGE} (?:is set|takes place|unfolds) (?:in|on|at|inside) {DETERMINER}",
    # This is a ...
    r"this is (?=an? )",
    # Captured in this image is a ...
    rf"(?:captured|depicted|shown|pictured|seen) in (?:the|this) {EMPTIES}{IMAGE},? (?:is|are) ",
    # The main focus of the image is a large clock tower
    rf"the (?:main |central |primary )?(?:subject|focus|focal point)(?: (?:of|in) (?:the|this) {IMAGE})? "
    rf"(?:is|are|appears to be) (?:on )?{DETERMINER}",
    # An image of | picture showing ... but not a picture that is itself in the picture, and never "the image of"
    rf"(?:an? )?{EMPTIES}(?:image|picture) (?:of|showing|depicting|featuring) "
    r"(?!.*\b(?:hangs?|hanging|hung|framed|printed|painted|displayed|projected|mounted|adorns?)\b)",
]
LEAD_IN = re.compile("|".join(LEAD_INS), re.IGNORECASE)

# In the background, there is a wall | On the left, we can see a wall
THERE_IS = re.compile(
    r"^((?:in|on|at|to|behind|above|below|under|next to|near|around|beside|beyond|inside)\b[^,.;]{0,60}, )"
    rf"(?:(?:we|you|one|i) can (?:also )?see|{THERE_ARE}) ",
    re.IGNORECASE,
)

# a serene scene of | a lively moment when two ...: goes with the lead-in before it, alone it stays.
WRAPPER = re.compile(
    rf"^an? {EMPTIES}(?:scene (?:of|with|featuring|where|in which) |moment (?:of|where|when|in which) {DETERMINER})",
    re.IGNORECASE,
)

# The oil painting portrays | This black and white photo shows: in the first sentence, a later one may mean a painting
# on the wall.
MEDIUM_SHOWS = re.compile(
    rf"(?:the|this) (?P<medium>{QUALIFIERS}(?:{MEDIUM}|image|picture|photo|photograph|scene)) {SHOWS}",
    re.IGNORECASE,
)

# ---- Chatter, at the beginning of the whole text. ----

CHATTERS = [
    # ASSISTANT: | Caption: | Image description:
    r"(?:assistant|answer|caption|prompt|(?:image |detailed )?description)\s*:\s+",
    # Sure! | Certainly, ... but not "Sure-footed goats"
    r"(?:sure|certainly|of course|absolutely|okay|ok|yes)(?: thing)?[!.,:]+\s+",
    # Here is a detailed description of the image:
    r"here(?:'s|’s| is| are) [^.:!?]*\b(?:description|caption|prompt|details|summary|overview)\b[^.:!?]*:\s+",
]
CHATTER = re.compile(rf"^(?:{'|'.join(CHATTERS)})", re.IGNORECASE)

# ---- Sentences that say nothing about the picture. Not the first: that names the subject, however it does so. ----

EFFECT = r"(?:sense|feeling|impression|atmosphere|mood|ambiance|ambience|vibe)"
HEDGES = [
    r"(?:overall|in summary|in conclusion|to summarize|in essence|all in all),? ",
    # The overall mood of the image is ...
    r"the overall (?:mood|atmosphere|ambiance|ambience|vibe|tone|impression|feeling|feel|effect|composition)\b",
    rf"the (?:mood|atmosphere|ambiance|ambience|vibe|tone|impression|feeling) of (?:the|this) (?:{IMAGE}|{MEDIUM})\b",
    # The image conveys ... | The photo does not contain any text.
    rf"(?:the|this) (?:{IMAGE}|{MEDIUM}) (?:\w+ )?(?:conveys?|evokes?|exudes?|suggests?|invites?|implies|imply|"
    r"elicits?|reflects?|tells?|does not|do not|doesn't)\b",
    # The scene has a peaceful atmosphere. | The image gives the viewer a sense of ...
    rf"(?:the|this) (?:{IMAGE}|{MEDIUM}) (?:\w+ )?(?:gives?|creates?|provides?|has|brings?|adds?|offers?|radiates?) "
    rf".*\b{EFFECT}\b",
    # The scene captures the excitement of surfing. ... but not "the beauty of a lake"
    rf"(?:the|this) (?:{IMAGE}|{MEDIUM}) (?:\w+ )?captures? the (?:essence|spirit|beauty|feeling|excitement|thrill|"
    rf"joy|energy) of (?!{DETERMINER})",
    # ... draws the viewer's attention | ... inviting viewers to ...; a woman who looks at the viewer stays
    r".*\bviewers?['’]s? (?:attention|eye|eyes|gaze|imagination|focus)\b",
    r".*\b(?:invit|transport|allow|encourag|captivat|engag|immers|remind|leav)\w* (?:the )?viewers?\b",
    # Let me know if you need more details!
    r"(?:let me know|feel free|i hope)\b",
    # It is a perfect example of ... | This image could be used for ...
    rf"(?:it|this|the {IMAGE}|this {IMAGE}) (?:could be used|is a (?:testament|reminder|perfect example))\b",
]
HEDGE = re.compile("|".join(HEDGES), re.IGNORECASE)

# ", creating a serene atmosphere" at the end of a sentence
HEDGING_CLAUSE = re.compile(
    rf", (?:creating|adding to|contributing to|enhancing|evoking|conveying|giving|lending)\b[^,;.]*\b{EFFECT}\b[^,;.]*"
    r"(?=[.!?]?$)",
    re.IGNORECASE,
)

# "On the left side of the image, a man" | "Two cars are visible in the image."
IN_THE_IMAGE = re.compile(rf" (?:of|in|within) (?:the|this) {IMAGE}(?=[,.;]|$)", re.IGNORECASE)

# ---- Markdown, line by line. ----

# "# Title" | "**Title**" | "---"
HEADING = re.compile(r"#{1,6}\s.*|\*\*[^*]{1,60}\*\*:?|\W*")
BULLET = re.compile(r"(?:[-*+•>]|\d{1,2}[.)])\s+")
# "**Background:** ..." | "**Background**: ...", and in a list also "Background: ..."
BOLD_LABEL = re.compile(r"^\*\*[^*]{1,40}(?::\*\*|\*\*:)\s*")
LABEL = re.compile(r"^[A-Z][\w&/'’-]*(?: [\w&/'’-]+){0,2}:\s+")
EMPHASIS = re.compile(r"\*\*|__|`|(?<!\w)\*(?=\S)|(?<=\S)\*(?!\w)")
IN_QUOTES = re.compile(r"""(["“])([^"“”]*)["”]""")

# ---- Sentences. ----

# Dots after these do not end one, and neither does that of an initial (U.S., J. R. R.). With regard to case.
ABBREVIATION = re.compile(
    r"\b(?:St|Mt|Ft|Dr|Mr|Mrs|Ms|Prof|Gen|Col|Capt|Lt|Sgt|Rev|Sen|Gov|Pres|Jr|Sr|Inc|Ltd|Co|Corp|Vol|Fig|No|vs|approx|"
    r"ca|e\.g|i\.e|[A-Z])\.$"
)
BOUNDARY = re.compile(r"""[.!?]+["'”’)\]]*\s+(?=["'“‘(\[]?[A-ZÀ-Þ0-9])""")
FINISHED = re.compile(r"""[.!?]["'”’)\]]*$""")

# Words that begin no name, and so may lose their capital at the beginning of a prompt.
SMALL_WORDS = frozenset(
    """a an the this these that those some several many various numerous multiple both each one two three four five six
    seven eight nine ten in on at by from under over above below behind beside between inside outside near with within
    without there it he she they his her its their people someone""".split()
)

# Where a sentence that is too long may be cut, and what must not be left at the end.
CLAUSE = re.compile(r"[,;:](?= )| (?=(?:and|with|while|as|where|which|who) )")
DANGLING = re.compile(
    r"(?:[\s,;:–—-]+(?:an?|the|of|with|and|or|in|on|at|to|by|for|from|into|as|is|are|its|his|her|their|while|which))*"
    r"[\s,;:–—-]*$"
)


def clean_caption(text: str, count_tokens: Callable[[str], int] | None = None, max_tokens: int = 77) -> str:
    """
    A model's description of an image as a prompt of whole sentences. Cleaning it once more changes nothing.

    Args:
        text (`str`):
            What the model wrote.
        count_tokens (`Callable[[str], int]`, *optional*):
            Tokens of a text for the text encoder, those at its beginning and end included, as [`token_counter`] gives
            them. There is no limit when unset.
        max_tokens (`int`, *optional*, defaults to `77`):
            Tokens the prompt may have; CLIP's text encoders read 77. Sentences are kept while they fit. If the first
            one alone does not, it is cut: before a clause if that leaves enough of it, else between two words.

    Returns:
        `str`: The prompt; empty only if the text is.
    """
    while True:  # what stood behind a piece that was taken away may be such a piece itself
        cleaned = _clean_once(text, count_tokens, max_tokens)
        if cleaned == text:
            return cleaned
        text = cleaned


def token_counter(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], int]:
    """Counts the tokens of a text, those included that the tokenizer puts at its beginning and end."""
    return lambda text: len(tokenizer(text, truncation=False, verbose=False)["input_ids"])


def _clean_once(text: str, count_tokens: Callable[[str], int] | None, max_tokens: int) -> str:
    sentences = _split_sentences(_plain(text))
    sentences = sentences[:1] + [sentence for sentence in sentences[1:] if not HEDGE.match(sentence)]
    if len(sentences) > 1 and not FINISHED.search(sentences[-1]):
        sentences.pop()
    unique: dict[str, str] = {}  # greedy decoding likes to repeat itself
    for i, sentence in enumerate(sentences):
        sentence = _without_lead_in(sentence, first=i == 0)
        unique.setdefault(sentence.casefold(), sentence)
    sentences = list(unique.values())
    if count_tokens is None or not sentences:
        return " ".join(sentences)
    kept = sentences[0]
    if count_tokens(kept) > max_tokens:
        return _cut(kept, count_tokens, max_tokens)
    for sentence in sentences[1:]:
        longer = f"{kept} {sentence}"
        if count_tokens(longer) > max_tokens:
            break
        kept = longer
    return kept


def _plain(text: str) -> str:
    """The text on one line, without chatter, markdown and quotation marks around all of it."""
    text = CHATTER.sub("", text.strip())
    blocks = [""]  # paragraphs and items of lists
    for line in text.splitlines():
        line = line.strip()
        if HEADING.fullmatch(line):
            blocks.append("")
        elif bullet := BULLET.match(line):
            item = line[bullet.end() :]
            blocks.append(LABEL.sub("", BOLD_LABEL.sub("", item)))
        else:
            blocks[-1] += " " + BOLD_LABEL.sub("", line)
    blocks = [" ".join(EMPHASIS.sub("", block).split()) for block in blocks]
    blocks = [block for block in blocks if block]
    if not blocks:
        return " ".join(text.split())
    # What ends with a colon announced a list, and its items now stand for themselves. They often end without a dot:
    # the last one's lack of it then does not mean that it was cut off.
    *others, last = blocks
    others = [" ".join(_split_sentences(block)[:-1]) if block.endswith(":") else block for block in others]
    others = [block for block in others if block]
    ended = [block if FINISHED.search(block) else block.rstrip(",; ") + "." for block in others]
    if ended != others and not FINISHED.search(last):
        last = last.rstrip(",; ") + "."
    plain = " ".join([*ended, last])
    quoted = IN_QUOTES.fullmatch(plain)
    return quoted[2].strip() if quoted and quoted[2].strip() else plain


def _split_sentences(text: str) -> list[str]:
    sentences, start = [], 0
    for boundary in BOUNDARY.finditer(text):
        if not ABBREVIATION.search(text[start : boundary.start() + 1]):
            sentences.append(text[start : boundary.end()].strip())
            start = boundary.end()
    rest = text[start:].strip()
    return [*sentences, rest] if rest else sentences


def _without_lead_in(sentence: str, first: bool) -> str:
    """The sentence from where it begins to describe; `first` is the one that the prompt begins with."""
    sentence = IN_THE_IMAGE.sub("", HEDGING_CLAUSE.sub("", sentence))
    rest = sentence
    while lead_in := LEAD_IN.match(rest):
        rest = WRAPPER.sub("", rest[lead_in.end() :])
    rest = THERE_IS.sub(r"\1", rest)
    if first and rest == sentence and (match := MEDIUM_SHOWS.match(rest)):
        medium = match["medium"]
        article = "an" if medium[0].lower() in "aeiou" else "a"
        joint = "with" if re.search("contain|includ", match[0]) else "of"
        rest = f"{article} {medium} {joint} {WRAPPER.sub('', rest[match.end() :])}"
    if not re.search(r"\w", rest):
        return sentence
    if not first:
        return rest if rest == sentence else rest[0].upper() + rest[1:]
    word = rest.split(maxsplit=1)[0].rstrip(",")
    return rest[0].lower() + rest[1:] if word.istitle() and word.lower() in SMALL_WORDS else rest


def _cut(sentence: str, count_tokens: Callable[[str], int], max_tokens: int) -> str:
    """As much of a sentence as fits."""

    def longest(ends: list[int]) -> str:
        pieces = (DANGLING.sub("", sentence[:end]) for end in ends)
        return max(takewhile(lambda piece: count_tokens(piece) <= max_tokens, pieces), key=len, default="")

    clauses = longest([clause.start() for clause in CLAUSE.finditer(sentence)])
    words = longest([word.end() for word in re.finditer(r"\S+", sentence)])
    if 2 * len(clauses) >= len(words) > 0:
        return clauses
    # A single word can be too long as well: an address on the web, or a model that stutters.
    piece = words or longest(list(range(1, len(sentence) + 1)))
    if not piece:
        raise ValueError(
            f"`max_tokens` is {max_tokens} and not one letter of {sentence[:40]!r} fits into it; set it to the text "
            "encoder's limit, such as 77."
        )
    return piece
