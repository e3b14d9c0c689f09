"""A text in pieces that a run can speak: none longer than the texts that it was trained on.

    "One. Two, three. Four ..." ─► behind sentences ─► behind commas ─► between words
                                                       (or letters, in scripts without spaces)

As many sentences as fit stay together. Nothing is cut that fits.
"""
import re
import unicodedata

from cli import BadInput
from data import encode_text

# where a text may be cut, the best place first
SENTENCE_END = re.compile(r"""[.!?;:…]+["')\]”’»]*\s+|[。！？；：…]+[」』”’）]*\s*""")
COMMA = re.compile(r",\s+|[，、]\s*")
SPACE = re.compile(r"\s+")

# full stops that end no sentence, before the next character: "Mr. S", "J. S", "U.S. A", "No. 5"
TITLES = "mr|mrs|ms|dr|prof|st|jr|sr|vs|fig|vol|approx|capt|gen|col|lt|sgt|rev"
ABBREVIATION = re.compile(r"""(?:^|[\s("'])(?:no\.\s+\d|(?:""" + TITLES +
                          r"|[^\W\dI]|\w(?:\.\w)+)\.\s+.)$", re.IGNORECASE)
# letters of scripts without spaces: Thai, Lao, Burmese, Khmer, Japanese, Chinese
UNSPACED = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
                      r"\uf900-\ufaff\U00020000-\U0003ffff]")


def sentences(text, fits):
    """Pieces of the text for which fits(piece) is true, in order, as few as go: cut behind
    sentences; a sentence that does not fit behind commas, else in halves between words, else, in a
    script without spaces, between letters. Errors: BadInput for a word that does not fit.
    """
    if fits(text):
        return [text]
    parts = cut_best(text)
    if len(parts) == 1:
        raise BadInput(f"--text: '{text[:40]}' is longer than this run was trained on "
                       "(data.text_len)")

    # neighbours that fit together stay together; a part that does not fit is cut further
    pieces = []
    joined = ""
    for part in parts:
        if joined and fits((joined + part).strip()):
            joined += part
            continue
        if joined:
            pieces += sentences(joined.strip(), fits)
        joined = part
    return pieces + sentences(joined.strip(), fits)


def cut_best(text):
    """The text cut at its best kind of place -> parts that join to it again; one part where it has
    no such place.
    """
    ends = [match.end() for match in SENTENCE_END.finditer(text)
            if not ABBREVIATION.search(text[max(0, match.end() - 24):match.end() + 1])]
    for ends in (ends, [match.end() for match in COMMA.finditer(text)]):
        parts = [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)]) if text[a:b].strip()]
        if len(parts) > 1:
            return parts

    # halves
    places = [match.end() for match in SPACE.finditer(text)]
    places = places or [i for i in range(1, len(text)) if between_letters(text, i)]
    if not places:
        return [text]
    middle = places[(len(places) - 1) // 2]
    return [text[:middle], text[middle:]]


def between_letters(text, i):
    """May a text without spaces be cut before character i? Not before a mark or punctuation."""
    return bool(UNSPACED.match(text[i - 1])) and unicodedata.category(text[i])[0] == "L"


def texts_to_generate(text, kind, cfg, lm, prompt_text=None):
    """The pieces of a text, each short enough for the run (cfg: DataConfig); the first behind
    prompt_text, the words of a prompt that is continued, if there are any.

    Errors: BadInput naming the option of sample.py that is too long.
    """
    limit = cfg.text_len
    unit = "tokens" if cfg.tokenizer else "bytes"

    def tokens(text):
        """Text tokens, without the one that names the kind."""
        return len(encode_text(text, kind, cfg)) - int(cfg.kind_token)

    def too_long(option, text):
        return BadInput(f"{option}: {tokens(text)} {unit} are more than this run was trained on "
                        f"(data.text_len = {limit})")

    # a monologue's words run on from the prompt's end, a prefix holds the prompt's words too
    text = " ".join((text or "").split())
    before = f"{prompt_text} " if prompt_text and not lm.monologue else ""
    if tokens(before) > limit:
        raise too_long("--prompt-text", before)

    # a caption is not cut
    if kind != "speech":
        if tokens(before + text) > limit:
            raise too_long("--prompt-text and --text" if before else "--text", before + text)
        return [before + text]

    # the prompt's words take room from the first piece alone
    pieces = sentences(text, lambda piece: tokens(piece) <= limit)
    if not before:
        return pieces
    try:
        first, *rest = sentences(text, lambda piece: tokens(before + piece) <= limit)
    except BadInput:
        raise BadInput(f"--prompt-text: {tokens(before)} {unit} leave too little room for --text "
                       f"(data.text_len = {limit})") from None
    if rest:
        rest = sentences(text[len(first):].strip(), lambda piece: tokens(piece) <= limit)
    return [before + first, *rest]
