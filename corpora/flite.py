"""A regular speech corpus without a download: sentences of a grammar, spoken by Debian's `flite`.

    python -m corpora.flite OUT [--hours 4] [--voices slt,rms,awb,kal16] [--seed 0]

    grammar ─► "the old farmer quietly opened the green box" ─► libflite ─► OUT/slt/000017.wav
                                                                   └─► words with start and end

Writes OUT/train.jsonl and OUT/valid.jsonl (100 held-out sentences per voice). Every line has text,
speaker and words [[word, start, end], ...] in seconds, which is what text to speech and the inner
monologue of calm.py need. All sentences differ; each has 4 to 11 words of a vocabulary of about 410
and is spoken by one voice. Synthesis is about 40 times faster than real time on one core.

Why: recordings from which a CPU can learn to speak in an hour. A voice pronounces a phone nearly
the same way every time (slt, rms and awb are statistical voices of CMU Arctic speakers; kal16 is
made of diphones), so whatever is missing in generated speech is the fault of the model. It is not
natural speech. Needs the Debian package: apt install flite.
Exit status: 0 done, 2 the user's mistake.
"""
import argparse
import bisect
import ctypes
import functools
import os
import random
import re
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

import numpy as np
from tqdm import tqdm

from audio import save_audio
from cli import BadInput, Parser, cli
from data import Clip, write_manifest

# name of a voice -> its library
VOICES = {"slt": "cmu_us_slt", "rms": "cmu_us_rms", "awb": "cmu_us_awb", "kal16": "cmu_us_kal16"}
# how typographers write what flite knows in ASCII
QUOTES = str.maketrans("\u2018\u2019\u201c\u201d\u2013\u2014", "''\"\"--")
# sentences per voice in valid.jsonl
HELD_OUT = 100
# mean duration of a sentence in seconds, to turn --hours into a number of sentences
SECONDS = 2.4


# ---------------------------------------------------------------- the grammar

# One sentence per line. A word in capitals is a slot, named by an example: a noun phrase with a
# noun of NOUNS, or a word of WORDS.
TEMPLATES = [line.split() for line in """\
    ACTOR OPENED OBJECT
    ACTOR QUIETLY OPENED OBJECT
    ACTOR OPENED OBJECT TODAY
    ACTOR OPENED OBJECT IN PLACE
    ACTOR WALKED IN PLACE
    ACTOR QUIETLY WALKED IN PLACE
    ACTOR and ACTOR WALKED TODAY
    OBJECT IN PLACE IS OLD
    ACTOR IS OLD and OLD
    WHY_DID ACTOR OPEN OBJECT
    ACTOR CAN OPEN OBJECT
    please OPEN OBJECT
    please OPEN OBJECT IN PLACE
    there was ACTOR IN PLACE""".splitlines()]

# Words with only one English spelling, so that a speech recogniser can be scored exactly.
NOUNS = {
    "ACTOR": """farmer teacher doctor singer sailor painter driver soldier baker student captain
        nurse lawyer writer hunter gardener doorman neighbor dancer player manager officer stranger
        traveler artist builder cook guard judge king queen prince girl boy woman child mother
        father brother sister uncle grandmother boss friend visitor guest cousin dog cat horse
        monkey rabbit tiger elephant robot""".split(),
    "OBJECT": """box door window table chair bottle basket letter book newspaper picture camera
        machine engine bicycle wagon boat ship ladder hammer blanket jacket coat hat shirt button
        mirror lamp candle kettle spoon plate cup glass apple orange banana carrot potato cake
        sandwich pencil ticket suitcase umbrella piano guitar violin drum radio telephone computer
        clock map wallet package envelope curtain carpet pillow bucket shovel rope barrel coin
        necklace""".split(),
    "PLACE": """garden kitchen forest village city market station hospital library castle school
        church office factory museum theater harbor river mountain valley island desert beach bridge
        tunnel tower farm stable cellar attic bedroom bathroom corridor hotel restaurant bakery
        prison palace playground street corner""".split(),
}
WORDS = {
    "OLD": """old young small large little tiny heavy green yellow black white brown purple silver
        golden broken empty dirty clean dusty wooden plastic expensive simple ancient modern
        beautiful ugly strange famous quiet noisy hungry angry happy lonely clever foolish gentle
        careful lazy busy friendly curious nervous patient brave tired""".split(),
    "OPENED": """opened closed carried dropped lifted moved pushed pulled cleaned painted repaired
        washed found lost bought sold borrowed returned stole hid forgot remembered noticed watched
        followed touched covered wrapped broke built finished ordered collected delivered examined
        inspected described admired ignored wanted needed loved hated kept took brought
        held""".split(),
    "OPEN": """open close carry drop lift move push pull clean paint repair wash find lose buy sell
        borrow return steal hide forget remember notice watch follow touch cover wrap break build
        finish order collect deliver examine inspect describe admire ignore want need love hate keep
        take bring hold""".split(),
    "WALKED": """walked traveled hurried returned wandered jumped climbed marched stumbled drove
        moved ran slept waited worked danced laughed shouted whispered listened smiled
        rested""".split(),
    "QUIETLY": """quietly slowly quickly carefully suddenly gently happily angrily secretly finally
        usually often never always almost nearly proudly calmly nervously eagerly gladly
        patiently""".split(),
    "IN": "in behind near inside outside beyond across from around under above beside".split(),
    "TODAY": ["yesterday", "today", "tomorrow", "tonight", "later", "again", "before breakfast",
              "after dinner", "in the morning", "in the evening", "at midnight", "last summer",
              "last winter", "last week", "every day", "every winter", "on monday", "on friday",
              "on sunday", "during the storm", "after the game", "before the party"],
    "IS": "is was seems became looked remained".split(),
    "CAN": "can will should could would must".split(),
    "WHY_DID": ["why did", "when did", "how did", "where did"],
}
DETERMINERS = "the a my your our their this that every another".split()


def sentence(rng):
    """A random sentence of the grammar: lower case, no punctuation."""
    parts = []
    for slot in rng.choice(TEMPLATES):
        if slot in NOUNS:
            parts.append(noun_phrase(NOUNS[slot], rng))
        elif slot in WORDS:
            parts.append(rng.choice(WORDS[slot]))
        else:
            parts.append(slot)
    return " ".join(parts)


def noun_phrase(nouns, rng):
    """Determiner, sometimes an adjective, noun: "the old farmer", "an apple"."""
    phrase = ""
    if rng.random() < 0.4:
        phrase = rng.choice(WORDS["OLD"]) + " "
    phrase += rng.choice(nouns)

    determiner = "the"
    if rng.random() < 0.5:
        determiner = rng.choice(DETERMINERS)
    if determiner == "a" and phrase[0] in "aeiou":
        determiner = "an"
    return f"{determiner} {phrase}"


def distinct_sentences(count, seed):
    """`count` sentences that all differ; a longer list begins with the shorter one."""
    rng = random.Random(seed)
    texts = {}                                       # a dict keeps the order, a set does not
    while len(texts) < count:
        texts.setdefault(sentence(rng))
    return list(texts)


# ---------------------------------------------------------------- the synthesiser

class Wave(ctypes.Structure):
    """flite's cst_wave."""
    _fields_ = [
        ("type", ctypes.c_char_p),
        ("sample_rate", ctypes.c_int),
        ("num_samples", ctypes.c_int),
        ("num_channels", ctypes.c_int),
        ("samples", ctypes.POINTER(ctypes.c_short)),
    ]


# functions of libflite -> (type of the result, types of the arguments)
POINTER = ctypes.c_void_p
TEXT = ctypes.c_char_p
SIGNATURES = {
    "flite_synth_text": (POINTER, [TEXT, POINTER]),
    "utt_wave": (ctypes.POINTER(Wave), [POINTER]),
    "utt_relation": (POINTER, [POINTER, TEXT]),
    "relation_head": (POINTER, [POINTER]),
    "item_next": (POINTER, [POINTER]),
    "ffeature_float": (ctypes.c_float, [POINTER, TEXT]),
    "ffeature_string": (TEXT, [POINTER, TEXT]),
    "delete_utterance": (None, [POINTER]),
}

# Where a word begins and ends. In the relation SylStructure its syllables hang below a word and its
# segments below a syllable: the word begins where the segment before its first one ends, and ends
# where its last one does.
WORD_START = b"R:SylStructure.daughter1.daughter1.R:Segment.p.end"
WORD_END = b"R:SylStructure.daughtern.daughtern.R:Segment.end"


class Flite:
    """libflite by ctypes, since the flite command does not print where the words are.

    Errors: BadInput where the package is not installed.
    """

    def __init__(self):
        try:
            self.lib = ctypes.CDLL("libflite.so.1", mode=ctypes.RTLD_GLOBAL)
            self.lib.flite_init()
            self.voices = {name: load_voice(library) for name, library in VOICES.items()}
        except OSError as e:
            raise BadInput(f"flite: {e}; install it: apt install flite") from None

        for name, (result, arguments) in SIGNATURES.items():
            function = getattr(self.lib, name)
            function.restype = result
            function.argtypes = arguments

    @contextmanager
    def utterance(self, text, voice):
        """Within: (flite's utterance of a text, samples int16 (S,), sample rate in Hz)."""
        utterance = self.lib.flite_synth_text(text.encode(), self.voices[voice])
        wave = self.lib.utt_wave(utterance).contents
        samples = np.ctypeslib.as_array(wave.samples, (wave.num_samples,)).copy()
        yield utterance, samples, wave.sample_rate
        self.lib.delete_utterance(utterance)

    def speak(self, text, voice):
        """text, a name of VOICES -> (samples int16 (S,), sample rate in Hz, words)."""
        with self.utterance(text, voice) as (utterance, samples, rate):
            words = [[self.lib.ffeature_string(item, b"name").decode(), start, end]
                     for item, start, end in self.words(utterance)]
        return samples, rate, words

    def speak_text(self, text, voice):
        """As people write -> (samples int16 (S,) at 16 kHz, [start, end] in seconds of every word
        between blanks, None for those that are not spoken). flite reads numbers and abbreviations;
        characters beyond ASCII are blanks to it.
        """
        text = text.translate(QUOTES)
        begins = [match.start() for match in re.finditer(r"\S+", text)]
        ascii_text = "".join(c if c.isascii() and c.isprintable() else " " for c in text)
        found = [None] * len(begins)
        with self.utterance(ascii_text, voice) as (utterance, samples, _):
            for item, start, end in self.words(utterance):
                # the place in the text behind the token that the word is of
                behind = self.lib.ffeature_float(item, b"R:Token.parent.file_pos")
                k = bisect.bisect_left(begins, behind) - 1
                if end > start and k >= 0:
                    first, _ = found[k] or (start, end)
                    found[k] = [first, end]
        return samples, found

    def words(self, utterance):
        """Yields (flite's word, its start, its end) of an utterance, in seconds."""
        item = self.lib.relation_head(self.lib.utt_relation(utterance, b"Word"))
        while item:
            yield (item, round(self.lib.ffeature_float(item, WORD_START), 3),
                   round(self.lib.ffeature_float(item, WORD_END), 3))
            item = self.lib.item_next(item)


def load_voice(library):
    """The pointer to a voice, e.g. of "cmu_us_slt"."""
    register = getattr(ctypes.CDLL(f"libflite_{library}.so.1"), f"register_{library}")
    register.restype = POINTER
    register.argtypes = [POINTER]
    return register(None)


# ---------------------------------------------------------------- the corpus

@functools.cache
def engine():
    """The Flite of this process: loaded once, not once per sentence."""
    return Flite()


def render(task):
    """(path, text, voice): speak one sentence into a file -> its manifest line."""
    path, text, voice = task
    samples, rate, words = engine().speak(text, voice)
    save_audio(path, samples.astype(np.float32)[None] / 32768, rate, sync=False)
    return Clip(path, text, "speech", voice, words=words, duration=len(samples) / rate,
                id=f"{voice}_{os.path.basename(path)[:-4]}")


def plan(folder, voices, hours, seed):
    """[(path, text, voice), ...]: the held-out sentences first, so that --hours keeps them."""
    training = max(len(voices), round(hours * 3600 / SECONDS))
    texts = distinct_sentences(HELD_OUT * len(voices) + training, seed)

    tasks = []
    for i, text in enumerate(texts):
        voice = voices[i % len(voices)]
        tasks.append((f"{folder}/{voice}/{i:06d}.wav", text, voice))
    return tasks


def parse():
    """The command line, checked -> arguments; .voices is a list."""
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", help="folder for wav files and manifests")
    p.add_argument("--hours", type=float, default=4.0, help="hours of training speech (default 4)")
    p.add_argument("--voices", default="slt,rms,awb,kal16",
                   help="separated by commas (default: all four)")
    p.add_argument("--seed", type=int, default=0, help="seed of the sentences (default 0)")
    p.add_argument("--processes", type=int, default=os.cpu_count(),
                   help="number of processes (default: one per core)")
    arguments = p.parse_args()

    arguments.voices = [voice for voice in arguments.voices.split(",") if voice]
    for voice in arguments.voices:
        if voice not in VOICES:
            raise BadInput(f"--voices: unknown '{voice}'; valid: {', '.join(VOICES)}")
    if not arguments.voices:
        raise BadInput(f"--voices: names none; valid: {', '.join(VOICES)}")
    if not arguments.hours > 0 or arguments.processes < 1:
        raise BadInput("--hours, --processes: must be positive")
    return arguments


def main():
    arguments = parse()
    voices = arguments.voices

    # a missing package or an unwritable folder is found before any work
    Flite()
    for voice in voices:
        try:
            os.makedirs(f"{arguments.out}/{voice}", exist_ok=True)
        except OSError as e:
            raise BadInput(f"{arguments.out}: cannot be made ({e.strerror})") from None

    # synthesis, in the order of the sentences
    folder = os.path.abspath(arguments.out)
    tasks = plan(folder, voices, arguments.hours, arguments.seed)
    with ProcessPoolExecutor(arguments.processes) as pool:
        clips = list(tqdm(pool.map(render, tasks, chunksize=16), total=len(tasks), unit="clip"))

    # the two manifests
    held_out = HELD_OUT * len(voices)
    for name, part in (("valid", clips[:held_out]), ("train", clips[held_out:])):
        write_manifest(f"{folder}/{name}.jsonl", part)
        hours = sum(clip.duration for clip in part) / 3600
        print(f"{len(part)} clips, {hours:.2f} h -> {arguments.out}/{name}.jsonl")


if __name__ == "__main__":
    cli(main)
