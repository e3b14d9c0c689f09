"""The toy corpus: speech, sounds and music made by rule; everything runs without a download.

    ToyConfig ─► random texts ─► synth.py ─► DIR/wav/*.wav, DIR/train.jsonl, DIR/valid.jsonl
                      ▲                         │
                 share right ◄── oracle.py ◄────┘      or any other wav, such as a model's

A small formant synthesiser speaks digits and a few words in six voices; simple generators make
sounds and musical phrases whose captions state measurable attributes.

Held-out speech: 15 of the 100 ordered pairs of digits never stand next to each other in training,
and every validation string contains one. A model that only memorised strings cannot score there.

    python -m corpora.toy --out data/toy --clips 1000            # wav/, train.jsonl, valid.jsonl
    python -m corpora.toy --say "seven three" --voice 1 --out x.wav
    python -m corpora.toy --say "two clicks" --kind sound --out x.wav
    python -m corpora.toy --check 100                            # accuracy of the oracle, a table

Neither paper has such a corpus; it replaces none of theirs. Same seed, same bytes, on the same
build of numpy. Files are 16-bit PCM.
"""
import argparse
import json
import math
import re
import shutil
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Annotated

import numpy as np
import soundfile as sf
from tqdm import tqdm

from cli import BadInput, Parser, cli, sync_all, write_file
from corpora import oracle
from corpora.synth import CAPTIONS, DIGITS, KINDS, RATES, VOICES, WORDS, attributes, synthesise
from locks import owned
from schema import Kind, Range, build

# longest clip of each kind in s: fixed part, part per word
LONGEST = {"speech": (0.05, 0.6), "sound": (1.3, 0), "music": (1.6, 0)}

# latents of quickstart.toml per second, and how many of them evaluate.py lets an end be off
FRAME_RATE = 25
END_TOLERANCE = 2

# ordered pairs of digits never spoken in training; every digit is a first and a second somewhere
HELD_OUT = {(a, (a + 3) % 10) for a in range(10)} | {(a, (3 * a + 2) % 10) for a in range(0, 10, 2)}


@dataclass
class ToyConfig:
    """The [toy] table. Two equal tables make the same files, byte for byte."""

    # training clips; 1000 are 20 minutes of audio, made in 15 s
    clips: Annotated[int, Range(1, 10_000_000)] = 1200
    # held-out clips; speech among them uses only unseen digit pairs
    valid_clips: Annotated[int, Range(1, 10_000_000)] = 120
    # the first 1 to 6 voices; more make speaker identity a real task
    voices: Annotated[int, Range(1, 6)] = 1
    # words in a training string, at least
    digits_min: Annotated[int, Range(1, 1000)] = 2
    # words in a training string, at most; a spoken digit lasts about a third of a second
    digits_max: Annotated[int, Range(1, 1000)] = 2
    # a quarter of the strings also carry a word such as "yes" or "stop"
    words: bool = False
    # kinds of clips in the corpus
    kinds: list[Kind] = field(default_factory=lambda: list(KINDS))
    # share of each of `kinds`; they sum to 1
    shares: list[Annotated[float, Range(0)]] = field(default_factory=lambda: [0.5, 0.25, 0.25])
    # longest clip in seconds, which the loader relies on; clips keep their natural length below
    max_seconds: Annotated[float, Range(above=0, high=3600)] = 2.5
    # seed of every random choice
    seed: Annotated[int, Range(0, below=2 ** 63)] = 0

    def __post_init__(self):
        if self.digits_max < self.digits_min:
            raise ValueError(f"digits_max: {self.digits_max} is below digits_min, raise it")
        if not self.kinds or len(set(self.kinds)) < len(self.kinds):
            raise ValueError(f"kinds: {self.kinds} must be some of {', '.join(KINDS)}, each once")

        if len(self.shares) != len(self.kinds) or abs(sum(self.shares) - 1) > 1e-6:
            raise ValueError(f"shares: {self.shares} must be one share for each of kinds, sum 1")

        need = max(LONGEST[kind][0] + LONGEST[kind][1] * self.digits_max for kind in self.kinds)
        if self.max_seconds < need - 1e-9:
            raise ValueError(f"max_seconds: {self.max_seconds} is too short for these clips, use "
                             f"at least {need:.2f} or lower digits_max")


# ---- texts ---------------------------------------------------------------------------------------

def clips(cfg, split):
    """Yield {text, kind, voice, seed} of each clip of "train" or "valid"; no audio yet."""
    count = cfg.clips if split == "train" else cfg.valid_clips
    part = 0 if split == "train" else 1

    # kinds in their shares, shuffled
    edges = np.round(np.cumsum(cfg.shares) * count)
    kinds = np.searchsorted(edges, np.arange(count), side="right").clip(max=len(cfg.kinds) - 1)
    kinds = np.random.default_rng([cfg.seed, part]).permutation(kinds)

    for i, k in enumerate(kinds):
        rng = np.random.default_rng([cfg.seed, part, i])
        kind = cfg.kinds[k]
        if kind == "speech":
            text = random_words(cfg, rng, split == "valid")
        else:
            text = random_caption(kind, rng)
        yield dict(text=text, kind=kind, voice=int(rng.integers(cfg.voices)),
                   seed=int(rng.integers(2 ** 31)))


def random_caption(kind, rng):
    """A caption of a random group: rare sorts of sound are as frequent as others."""
    group = list(CAPTIONS[kind][rng.integers(len(CAPTIONS[kind]))])
    return group[rng.integers(len(group))]


def random_words(cfg, rng, held_out):
    """A string of digits, sometimes with a word in the place of one.

    A training string never has a held-out pair side by side; a validation string always has one
    (when digits_max is 1, strings are single digits and have no pairs).
    """
    digits = random_digits(cfg, rng, held_out)
    words = [DIGITS[digit] for digit in digits]

    if cfg.words and rng.random() < 0.25:
        positions = range(len(digits))
        if held_out and len(digits) > 1:
            positions = [i for i in positions if still_held_out(digits, i)]
        if positions:
            word = WORDS[rng.integers(len(WORDS))]
            words[positions[rng.integers(len(positions))]] = word
    return " ".join(words)


def random_digits(cfg, rng, held_out):
    """Digits (numbers) with a held-out pair or without any."""
    n = int(rng.integers(cfg.digits_min, cfg.digits_max + 1))
    if held_out:
        n = min(max(n, 2), cfg.digits_max)

    while True:
        digits = rng.integers(10, size=n).tolist()
        has_held_out = any(pair in HELD_OUT for pair in zip(digits, digits[1:]))
        if has_held_out == held_out or n == 1:
            return digits

        # plant a pair where one is needed; else try again
        if held_out:
            i = int(rng.integers(n - 1))
            digits[i:i + 2] = sorted(HELD_OUT)[rng.integers(len(HELD_OUT))]
            return digits


def still_held_out(digits, i):
    """Whether a held-out pair remains when digit i is replaced."""
    return any(pair in HELD_OUT for j, pair in enumerate(zip(digits, digits[1:]))
               if i not in (j, j + 1))


# ---- the corpus ----------------------------------------------------------------------------------

def make(cfg, out_dir, rate=16000):
    """Write out_dir/wav/*.wav, train.jsonl and valid.jsonl; return the paths of both manifests.

    toy.json marks a finished corpus: with the same settings nothing is done again, with others the
    corpus is made anew. Manifests appear only when complete; a second process waits for the first.
    Errors: BadInput where out_dir holds files of these names that are not a toy corpus.
    """
    out = Path(out_dir)
    mark = out / "toy.json"
    manifests = (out / "train.jsonl", out / "valid.jsonl")
    recipe = dict(asdict(cfg), sample_rate=rate, version=2)

    def finished():
        return (read_mark(mark) == dict(recipe, finished=True)
                and all(path.exists() for path in manifests))

    # finished before, or somebody else's files
    if finished():
        return manifests
    for path in (*manifests, out / "wav"):
        if read_mark(mark) is None and path.exists():
            raise BadInput(f"{path} exists and toy.py did not write it, choose another folder")

    # by one process; who waited for another finds it finished
    try:
        out.mkdir(parents=True, exist_ok=True)
        with owned(out, "the toy corpus is being made", wait=True):
            if not finished():
                write_corpus(cfg, out, manifests, recipe, rate)
    except OSError as e:
        raise BadInput(f"cannot write the toy corpus to {out}: {e}") from None
    return manifests


def write_corpus(cfg, out, manifests, recipe, rate):
    """Make every clip and both manifests in out, over what toy.py left there."""
    mark = out / "toy.json"
    write_file(mark, json.dumps(dict(recipe, finished=False)))
    for path in manifests:
        path.unlink(missing_ok=True)
    shutil.rmtree(out / "wav", ignore_errors=True)      # ours, since the mark is there
    (out / "wav").mkdir()

    with tqdm(total=cfg.clips + cfg.valid_clips, desc="toy corpus", unit=" clips") as bar:
        for split, path in zip(("train", "valid"), manifests):
            lines = []
            for i, clip in enumerate(clips(cfg, split)):
                lines.append(write_clip(out, f"{split}-{i:06d}", clip, rate))
                bar.update()
            sync_all()                                  # the clips, before what names them
            write_file(path, "\n".join(lines) + "\n")
    write_file(mark, json.dumps(dict(recipe, finished=True)))


def read_mark(path):
    """The settings of the corpus that is there: None without a mark, {} for a broken one."""
    try:
        return json.loads(path.read_text()) if path.exists() else None
    except ValueError:
        return {}


def write_clip(out, name, clip, rate):
    """Write one wav -> its line of the manifest."""
    wav, words = synthesise(**clip, rate=rate)
    write_wav(out / "wav" / f"{name}.wav", wav, rate)

    speaker = f"toy{clip['voice']}" if clip["kind"] == "speech" else ""
    return json.dumps(dict(id=name, audio=f"wav/{name}.wav", text=clip["text"], kind=clip["kind"],
                           speaker=speaker, duration=round(len(wav) / rate, 4), words=words))


# ---- accuracy of the oracle ----------------------------------------------------------------------

def check(n, rate=16000, seed=0):
    """Print the oracle's accuracy on n clips of each kind -> {(kind, column): share right}.

    Columns: clean and degraded clips; then where it must fall to chance: white noise against the
    text ("nothing"), and what it reads from a clip against the other clips' texts. The last is not
    of the oracle: "same end" is how often another rendering of the text ends when this one does,
    within two latent frames, which is what a perfect sampler would reach in evaluate.py.
    """
    shares = {}
    for kind in KINDS:
        cfg = ToyConfig(clips=n, voices=len(VOICES), kinds=[kind], shares=[1.0], seed=seed)
        corpus = list(clips(cfg, "train"))
        rows = [check_clip(i, corpus, rate)
                for i in tqdm(range(n), desc=kind, unit=" clips", leave=False)]
        columns = list(rows[0])
        for column in columns:
            shares[kind, column] = float(np.nanmean([row[column] for row in rows]))

    print(f"{'% right':8}" + "".join(f"{column:>12}" for column in columns))
    for kind in KINDS:
        print(f"{kind:8}" + "".join(f"{100 * shares[kind, column]:12.1f}" for column in columns))
    return shares


def check_clip(i, corpus, rate):
    """The share of right attributes of clip i in every column of check."""
    clip = corpus[i]
    text = clip["text"]
    kind = clip["kind"]
    clean, _ = synthesise(**clip, rate=rate)

    versions = {"clean": clean}
    for damage in ("noise", "phase", "smear"):
        versions[damage] = oracle.degrade(clean, damage, rate)
    versions["nothing"] = np.random.default_rng(i).standard_normal(len(clean)) * 0.1

    verdicts = {column: oracle.judge(wav, text, kind, rate) for column, wav in versions.items()}
    row = {column: verdict["right"] / verdict["total"] for column, verdict in verdicts.items()}

    # against other texts; spoken ones of the same length
    read = attributes(verdicts["clean"]["text"], kind)
    others = [attributes(other["text"], kind) for other in corpus if other is not clip]
    agreement = [len(other.items() & read.items()) / len(other) for other in others
                 if kind != "speech" or len(other) == len(read)]
    row["other text"] = np.mean(agreement or [np.nan])
    row["chance"] = oracle.chance(text, kind)

    # the same text with another pitch, tempo and gaps
    again, _ = synthesise(**clip | {"seed": clip["seed"] + 1}, rate=rate)
    row["same end"] = same_end(len(clean), len(again), rate)
    return row


def same_end(first, second, rate):
    """Do clips of so many samples end within two latents of each other? As evaluate.py asks it."""
    hop = rate // FRAME_RATE
    return abs(math.ceil(first / hop) - math.ceil(second / hop)) <= END_TOLERANCE


# ---- command line --------------------------------------------------------------------------------

def options():
    examples = re.search(r"(    python -m corpora.toy.*?)\n\n", __doc__, re.S)[1]
    parser = Parser(
        description=__doc__.split("\n\n")[0], epilog="examples:\n" + examples,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    default = ToyConfig()

    parser.add_argument("--out", help="folder for the corpus, or with --say the .wav file")
    parser.add_argument("--clips", type=int, default=default.clips,
                        help="training clips (default %(default)s)")
    parser.add_argument("--valid-clips", type=int, default=default.valid_clips,
                        help="held-out clips (default %(default)s)")
    parser.add_argument("--voices", type=int, default=default.voices,
                        help=f"1 to {len(VOICES)} (default %(default)s)")
    parser.add_argument("--sample-rate", type=int, default=16000, choices=RATES,
                        help="Hz (default %(default)s)")
    parser.add_argument("--seed", type=int, default=default.seed,
                        help="of every random choice (default %(default)s)")

    parser.add_argument("--say", metavar="TEXT", help="make one clip instead of a corpus")
    parser.add_argument("--kind", default="speech", choices=KINDS,
                        help="with --say (default %(default)s)")
    parser.add_argument("--voice", type=int, default=0, help="with --say (default %(default)s)")
    parser.add_argument("--check", type=int, metavar="N",
                        help="measure the oracle on N clips of each kind")
    return parser


def write_wav(path, wav, rate):
    """Write (S,) as 16-bit .wav, without waiting for the disk."""
    file = BytesIO()
    sf.write(file, wav, rate, subtype="PCM_16", format="WAV")
    write_file(path, file.getvalue(), sync=False)


def say(args):
    """Write one clip and print what the oracle reads from it."""
    wav, _ = synthesise(args.say, args.kind, voice=args.voice, seed=args.seed,
                        rate=args.sample_rate)
    if not args.out.lower().endswith(".wav"):
        raise BadInput(f"--out {args.out}: only .wav is written")
    write_wav(args.out, wav, args.sample_rate)
    read = oracle.judge(wav, args.say, args.kind, args.sample_rate)["text"]
    print(f"{args.out}: {len(wav) / args.sample_rate:.2f} s, the oracle reads {read!r}")


def main(argv=None):
    args = options().parse_args(argv)
    if args.check is not None:
        if args.check < 2:
            raise BadInput(f"--check {args.check} is too few, use 2 or more")
        check(args.check, args.sample_rate, args.seed)
        return

    if not args.out:
        raise BadInput("nothing to do: give --out DIR, --say TEXT --out FILE.wav, or --check N")
    if args.say is not None:
        say(args)
        return

    cfg = build(ToyConfig, {"clips": args.clips, "valid_clips": args.valid_clips,
                            "voices": args.voices, "seed": args.seed})
    for path in make(cfg, args.out, args.sample_rate):
        print(path)


if __name__ == "__main__":
    cli(main)
