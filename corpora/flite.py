"""A regular speech corpus without a download: sentences from a grammar, spoken by Debian's `flite`.

    python -m corpora.flite OUT [--hours 4] [--voices slt,rms,awb,kal16] [--seed 0]

    grammar ─► "the old farmer quietly opened the green box" ─► libflite ─► OUT/slt/000017.wav
                                                                   └─► words with start and end

Writes OUT/train.jsonl and OUT/valid.jsonl (100 sentences a voice that training never has), every
line with text, speaker and words [[word, start, end], ...] in seconds: what text to speech and the
inner monologue of calm.py need. Sentences are all different, of 3 to 12 words out of some 450; each
is spoken by one voice. About 40 times faster than real time on one core.

Why: recordings that a CPU can learn to speak from in an hour. Every voice says the same phone in
nearly the same way (statistical voices of the CMU Arctic speakers slt, rms and awb; kal16 is
diphones), so that what is missing in generated speech is the model's fault. It is not natural
speech. Needs the package: apt install flite. Exit status: 0 done, 2 your mistake.
"""
import argparse
import ctypes
import os
import random
from concurrent.futures import ProcessPoolExecutor

import numpy as np
from tqdm import tqdm

from cli import BadInput, Parser, cli
from data import Clip, save_audio, write_manifest

VOICES = {"slt": "cmu_us_slt", "rms": "cmu_us_rms", "awb": "cmu_us_awb", "kal16": "cmu_us_kal16"}
HELD_OUT = 100                                       # sentences a voice

# Words that English spells in one way only, so that a speech recogniser can be exact about them.
WHO = """farmer teacher doctor singer sailor painter driver soldier baker student captain nurse
    lawyer writer hunter gardener doorman neighbor dancer player manager officer stranger traveler
    artist builder cook guard judge king queen prince girl boy woman child mother father brother
    sister uncle grandmother boss friend visitor guest cousin dog cat horse monkey rabbit tiger
    elephant robot""".split()
WHAT = """box door window table chair bottle basket letter book newspaper picture camera machine
    engine bicycle wagon boat ship ladder hammer blanket jacket coat hat shirt button mirror lamp
    candle kettle spoon plate cup glass apple orange banana carrot potato cake sandwich pencil
    ticket suitcase umbrella piano guitar violin drum radio telephone computer clock map wallet
    package envelope curtain carpet pillow bucket shovel rope barrel coin necklace""".split()
LIKE = """old young small large little tiny heavy green yellow black white brown purple silver
    golden broken empty dirty clean dusty wooden plastic expensive simple ancient modern beautiful
    ugly strange famous quiet noisy hungry angry happy lonely clever foolish gentle careful lazy
    busy friendly curious nervous patient brave tired""".split()
DID = """opened closed carried dropped lifted moved pushed pulled cleaned painted repaired washed
    found lost bought sold borrowed returned stole hid forgot remembered noticed watched followed
    touched covered wrapped broke built finished ordered collected delivered examined inspected
    described admired ignored wanted needed loved hated kept took brought held""".split()
WENT = """walked traveled hurried returned wandered jumped climbed marched stumbled drove moved ran
    slept waited worked danced laughed shouted whispered listened smiled rested""".split()
HOW = """quietly slowly quickly carefully suddenly gently happily angrily secretly finally usually
    often never always almost nearly proudly calmly nervously eagerly gladly patiently""".split()
WHERE = """garden kitchen forest village city market station hospital library castle school church
    office factory museum theater harbor river mountain valley island desert beach bridge tunnel
    tower farm stable cellar attic bedroom bathroom corridor hotel restaurant bakery prison palace
    playground street corner""".split()
AT = "in behind near inside outside beyond across from around under above beside".split()
WHEN = """yesterday, today, tomorrow, tonight, later, again, before breakfast, after dinner, in the
    morning, in the evening, at midnight, last summer, last winter, last week, every day, every
    winter, on monday, on friday, on sunday, during the storm, after the game, before the party"""
WHEN = [" ".join(phrase.split()) for phrase in WHEN.split(",")]
BE = "is was seems became looked remained".split()
ASK = ["why did", "when did", "how did", "where did"]
DO = """open close carry drop lift move push pull clean paint repair wash find lose buy sell borrow
    return steal hide forget remember notice watch follow touch cover wrap break build finish order
    collect deliver examine inspect describe admire ignore want need love hate keep take bring
    hold""".split()
CAN = "can will should could would must".split()
THE = "the a my your our their this that every another".split()


def sentence(rng):
    """One sentence of the grammar: lower case, no punctuation."""
    def a(words):
        return rng.choice(words)

    def thing(nouns):
        noun = f"{a(LIKE)} {a(nouns)}" if rng.random() < 0.4 else a(nouns)
        the = a(THE) if rng.random() < 0.5 else "the"
        return f"{'an' if the == 'a' and noun[0] in 'aeiou' else the} {noun}"

    parts = rng.choice((
        lambda: [thing(WHO), a(DID), thing(WHAT)],
        lambda: [thing(WHO), a(HOW), a(DID), thing(WHAT)],
        lambda: [thing(WHO), a(DID), thing(WHAT), a(WHEN)],
        lambda: [thing(WHO), a(DID), thing(WHAT), a(AT), thing(WHERE)],
        lambda: [thing(WHO), a(WENT), a(AT), thing(WHERE)],
        lambda: [thing(WHO), a(HOW), a(WENT), a(AT), thing(WHERE)],
        lambda: [thing(WHO), "and", thing(WHO), a(WENT), a(WHEN)],
        lambda: [thing(WHAT), a(AT), thing(WHERE), a(BE), a(LIKE)],
        lambda: [thing(WHO), a(BE), a(LIKE), "and", a(LIKE)],
        lambda: [a(ASK), thing(WHO), a(DO), thing(WHAT)],
        lambda: [thing(WHO), a(CAN), a(DO), thing(WHAT)],
        lambda: ["please", a(DO), thing(WHAT)],
        lambda: ["please", a(DO), thing(WHAT), a(AT), thing(WHERE)],
        lambda: ["there was", thing(WHO), a(AT), thing(WHERE)]))()
    return " ".join(parts)


class Wave(ctypes.Structure):
    """flite's cst_wave."""
    _fields_ = [("type", ctypes.c_char_p), ("sample_rate", ctypes.c_int), ("num_samples",
                ctypes.c_int), ("num_channels", ctypes.c_int),
                ("samples", ctypes.POINTER(ctypes.c_short))]


class Flite:
    """libflite by ctypes. speak(text, voice) -> (samples int16 (S,), rate, words).

    The command line cannot tell where words are; the library can: a word's first and last segment
    hang below it in the relation SylStructure.
    """

    def __init__(self):
        P, text = ctypes.c_void_p, ctypes.c_char_p
        try:
            self.lib = ctypes.CDLL("libflite.so.1", mode=ctypes.RTLD_GLOBAL)
            self.lib.flite_init()
            self.voices = {}
            for name, symbol in VOICES.items():
                register = getattr(ctypes.CDLL(f"libflite_{symbol}.so.1"), f"register_{symbol}")
                register.restype, register.argtypes = P, [P]
                self.voices[name] = register(None)
        except OSError as e:
            raise BadInput(f"flite: {e}; install it: apt install flite") from None
        for name, result, takes in (
                ("flite_synth_text", P, [text, P]), ("utt_wave", ctypes.POINTER(Wave), [P]),
                ("utt_relation", P, [P, text]), ("relation_head", P, [P]), ("item_next", P, [P]),
                ("ffeature_float", ctypes.c_float, [P, text]),
                ("ffeature_string", text, [P, text]), ("delete_utterance", None, [P])):
            getattr(self.lib, name).restype = result
            getattr(self.lib, name).argtypes = takes

    def speak(self, text, voice):
        lib = self.lib
        utterance = lib.flite_synth_text(text.encode(), self.voices[voice])
        wave = lib.utt_wave(utterance).contents
        samples = np.ctypeslib.as_array(wave.samples, (wave.num_samples,)).copy()
        rate, words = wave.sample_rate, []
        word = lib.relation_head(lib.utt_relation(utterance, b"Word"))
        below = b"R:SylStructure.%s.%s.R:Segment.%s"
        while word:
            start, end = (lib.ffeature_float(word, below % path) for path in (
                (b"daughter1", b"daughter1", b"p.end"), (b"daughtern", b"daughtern", b"end")))
            words.append([lib.ffeature_string(word, b"name").decode(), round(start, 3),
                          round(end, 3)])
            word = lib.item_next(word)
        lib.delete_utterance(utterance)
        return samples, rate, words


def render(task):
    """Speak one sentence into a file; returns its manifest line."""
    global engine
    path, text, voice = task
    if "engine" not in globals():
        engine = Flite()
    samples, rate, words = engine.speak(text, voice)
    save_audio(path, samples.astype(np.float32)[None] / 32768, rate)
    return Clip(path, text, "speech", voice, words=words, duration=len(samples) / rate,
                id=f"{voice}_{os.path.basename(path)[:-4]}")


def main():
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", help="folder for wav files and manifests")
    p.add_argument("--hours", type=float, default=4.0, help="of training speech (default 4)")
    p.add_argument("--voices", default="slt,rms,awb,kal16", help="default: all four")
    p.add_argument("--seed", type=int, default=0, help="another seed, other sentences")
    p.add_argument("--processes", type=int, default=os.cpu_count(), help="default: all cores")
    a = p.parse_args()
    voices = [v for v in a.voices.split(",") if v]
    for wrong in [v for v in voices if v not in VOICES] or ([] if voices else ['none']):
        raise BadInput(f"--voices: unknown '{wrong}'; valid: {', '.join(VOICES)}")
    if not a.hours > 0 or a.processes < 1:
        raise BadInput("--hours, --processes: must be positive")
    Flite()                                          # says in one line if it is not installed
    for voice in voices:
        try:
            os.makedirs(f"{a.out}/{voice}", exist_ok=True)
        except OSError as e:
            raise BadInput(f"{a.out}: cannot be made ({e.strerror})") from None
    rng, seen = random.Random(a.seed), {}
    # a clip lasts about 2.4 s; held-out sentences come first, so that --hours does not change them
    wanted = HELD_OUT * len(voices) + max(len(voices), round(a.hours * 3600 / 2.4))
    while len(seen) < wanted:
        seen.setdefault(sentence(rng))
    root = os.path.abspath(a.out)
    tasks = [(f"{root}/{voices[i % len(voices)]}/{i:06d}.wav", text, voices[i % len(voices)])
             for i, text in enumerate(seen)]
    with ProcessPoolExecutor(a.processes) as pool:
        clips = list(tqdm(pool.map(render, tasks, chunksize=16), total=len(tasks), unit="clip"))
    held = HELD_OUT * len(voices)
    for name, part in (("valid", clips[:held]), ("train", clips[held:])):
        write_manifest(f"{root}/{name}.jsonl", part)
        print(f"{len(part)} clips, {sum(c.duration for c in part) / 3600:.2f} h -> "
              f"{a.out}/{name}.jsonl")


if __name__ == "__main__":
    cli(main)
