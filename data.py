"""Audio files, text and cached latents on their way to the models. Imports none of our files.

    manifest.jsonl ── load_manifest ──> [Clip]         {"audio": "a/b.flac", "text": "...", ...}
    or a folder                            │
                ┌──────────────────────────┴──────────────────┐
                v  stage "vae"                                v  once, after the VAE
          AudioBatches(step, rows)                      LatentCache.build(encode)
          "audio" (B, channels, S)                      shard_00000.npy (sum of T, 2D) float16
          random crops, gain                                  │  [mean | log-variance], mapped
                                                              v  stage "lm"
                                                        LatentBatches(step, rows)
      row:  text   [KIND h e l l o PAD PAD]      (B, 1 + text_len)     bytes + one special
            prompt [p p p p 0 0]                 (B, prompt_frames, 2D)  same voice, other frames
            x      [f f f f f f f f 0 0]         (B, frames, 2D)       "ended": the last f ends clip

Everything is a pure function of (seed, step, rows). A data position is therefore only a step
number: resuming is exact, and 1 or 8 processes see the same global batch, each its own rows.

Papers: CALM (arXiv 2509.06926) voice-prompt prefix, text, audio; AudioCALM (arXiv 2606.23080) one
model for speech, sound and music. Where this differs: text is bytes with one special token for the
kind, not SentencePiece or T5 embeddings, so that nothing is downloaded; latents are cached as the
posterior's mean and log-variance, so that training can draw a fresh sample each time.
Precision: audio float32 (int16 in memory), latents float16 on disk, float32 in a batch.

    python data.py scan  DIR --layout libritts --out train.jsonl     make a manifest
    python data.py check train.jsonl --out clean.jsonl               read every file, drop bad ones
    python data.py info  train.jsonl                                 hours, speakers, durations
    python data.py describe train.jsonl --out described.jsonl        texts as descriptions
"""
import argparse
import csv
import hashlib
import json
import math
import os
import sys
import textwrap
import unicodedata
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import soundfile as sf
import soxr
import torch
from tqdm import tqdm

KINDS = ("speech", "sound", "music")
PAD, SPEECH, SOUND, MUSIC = 256, 257, 258, 259      # ids 0..255 are UTF-8 bytes
END = 10                                            # line feed: the words of a clip are over
AUDIO = (".wav", ".flac", ".ogg", ".opus", ".mp3")
LAYOUTS = ("folder", "ljspeech", "libritts", "vctk", "audiocaps")
LONG = 60.0     # seconds; a longer file is never kept in memory, only the crop is read from it


class BadInput(Exception):
    """The user's mistake. One line: what is wrong, where, what to do."""


def cli(main):
    """Runs main(). BadInput: one "error: ..." line on stderr, exit 2. Ctrl-C: exit 130."""
    try:
        main()
    except BadInput as e:
        print("error: " + " ".join(str(e).split()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


class Parser(argparse.ArgumentParser):
    """argparse whose errors are BadInput: one line instead of a usage text and a line."""

    def error(self, message):
        raise BadInput(f"{message} (see {self.prog} -h)")


def threads(text):
    """argparse type of --threads: 0 = torch's choice."""
    if not text.isdecimal() or int(text) > 1024:
        raise argparse.ArgumentTypeError(f"{text} is no number of CPU threads, use 0 to 1024")
    return int(text)


@dataclass
class Clip:
    """One line of a manifest."""
    audio: str                      # absolute path
    text: str = ""                  # transcript (speech) or caption (sound, music), or description
    kind: str = "speech"            # one of KINDS
    speaker: str = ""               # "" = unknown
    words: list | None = None       # [[word, start, end], ...] in seconds
    duration: float | None = None   # seconds; None = ask the file's header
    id: str = ""
    said: str = ""                  # speech: the transcript where text is a description (describe)


@dataclass
class DataConfig:
    """The [data] table."""
    manifest: str = ""          # training manifest (.jsonl) or folder of audio; "" = the toy corpus
    valid: str = ""             # held-out manifest; "" = max(2 %, 8) clips drawn from `manifest`
    weights: dict[str, float] = field(default_factory=dict)
    # ^ share of each kind in a batch, {speech = 0.5, sound = 0.25, music = 0.25}; {} as they are.
    #   Why: corpora differ a hundredfold in size, and the small kinds would hardly be seen.
    crop_seconds: float = 1.0   # s, a VAE training crop. 1 s holds what the discriminators look at;
    #                             more rows teach more than longer ones
    # "" = UTF-8 bytes. Else the vocabulary of a published text model: a tokenizer.json, a folder
    # that holds one, or a name on the Hugging Face hub (hf extra); for a pretrained backbone
    tokenizer: str = ""
    kind_token: bool = True     # text begins with its kind; false for weights that know none
    #                             (Pocket TTS: speech only)
    text_len: int = 64          # bytes (or tokens) of text in a row. A longer transcript is left
    #                             out (it would not match the audio), a longer caption is cut
    frames: int = 64            # latent frames in a row: 5.1 s at 12.5 Hz. Speech with text should
    #                             fit whole: only then is its end seen together with its text
    prompt_frames: int = 0      # latent frames kept for the voice prompt, 0 = no voice prompts
    prompt_prob: float = 0.5    # share of speech rows that get one; the rest learn to do without
    gain_db: float = 0.0        # dB, VAE loudness augmentation, uniform in +- gain_db, never clips
    ram_gb: float = 2.0         # GB of decoded int16 audio kept by each process (17 h at 16 kHz)
    workers: int = 4            # threads that decode audio; the batches do not depend on it
    seed: int = 0               # of order, crops, gains, cuts and prompts

    def __post_init__(self):
        def need(ok, name, what):
            if not ok:
                raise ValueError(f"{name}: {what} (it is {getattr(self, name)!r})")
        need(self.crop_seconds > 0, "crop_seconds", "must be positive; 1.0 is a good start")
        for name in ("text_len", "frames", "workers"):
            need(getattr(self, name) >= 1, name, "must be at least 1; set a positive number")
        need(self.manifest or not self.valid, "valid",
             "held-out clips of a data.manifest; without one the corpus is the toy's")
        for name in ("prompt_frames", "gain_db", "ram_gb", "seed"):
            need(getattr(self, name) >= 0, name, "cannot be negative; set 0 or more")
        need(0 <= self.prompt_prob <= 1, "prompt_prob", "is a probability; set a value in 0..1")
        need(set(self.weights) <= set(KINDS), "weights", f"unknown kind; use {', '.join(KINDS)}")
        need(all(w >= 0 for w in self.weights.values()) and
             (not self.weights or sum(self.weights.values()) > 0),
             "weights", "no weight can be negative, nor all zero; {} means the natural shares")


# ---------------------------------------------------------------------------- audio in and out

def open_audio(path):
    """A sf.SoundFile opened for reading. BadInput when missing, unreadable or without samples."""
    if not os.path.isfile(path):
        raise BadInput(f"{path}: no such audio file; correct the path")
    try:
        f = sf.SoundFile(path)
    except (RuntimeError, TypeError, OSError) as e:
        why = getattr(e, "error_string", str(e)).strip().rstrip(".")
        raise BadInput(f"{path}: cannot be read as audio ({why}); convert or remove it") from e
    if f.frames <= 0 or f.frames > 1 << 40:     # a damaged Ogg reports 2^63 - 1
        f.close()
        raise BadInput(f"{path}: holds 0 samples or is damaged; remove it")
    return f


def seconds_of(clip):
    """Length of a Clip in seconds: as the manifest says, else from the file's header."""
    if clip.duration is not None:
        return clip.duration
    with open_audio(clip.audio) as f:
        return f.frames / f.samplerate


def load_audio(path, sample_rate, channels=1, *, start=0.0, seconds=None, allow_silence=False):
    """Reads `seconds` (None: all) from `start`, any format and rate -> float32 (channels, S).

    Other channel counts are averaged to mono and repeated. At most round(seconds * sample_rate)
    samples come back, fewer at the end of the file.
    Errors: BadInput naming the file when it is missing, unreadable, empty, silent (peak < 1e-4;
    unless allow_silence) or holds NaN or infinity."""
    with open_audio(path) as f:
        rate = f.samplerate
        try:
            f.seek(min(int(start * rate), f.frames))
            wav = f.read(-1 if seconds is None else math.ceil(seconds * rate),
                         dtype="float32", always_2d=True)                   # (S, channels of file)
        except RuntimeError as e:
            raise BadInput(f"{path}: damaged audio ({e}); remove it") from e
    if not np.isfinite(wav).all():
        raise BadInput(f"{path}: holds NaN or infinite samples; export it again or remove it")
    if wav.shape[1] != channels:
        wav = wav.mean(1, keepdims=True)                                    # (S, 1)
    if rate != sample_rate and len(wav):
        wav = soxr.resample(wav, rate, sample_rate)
    if seconds is not None:
        wav = wav[:round(seconds * sample_rate)]
    if len(wav) == 0:
        where = f" after {start:g} s" if start else ""
        raise BadInput(f"{path}: 0 samples{where}; remove it or start earlier")
    if not allow_silence and np.abs(wav).max() < 1e-4:
        raise BadInput(f"{path}: silent (peak below 0.0001); remove it")
    return np.ascontiguousarray(np.broadcast_to(wav.T, (channels, len(wav))), dtype=np.float32)


def save_audio(path, wav, sample_rate):
    """Writes wav, (channels, S) or (S,), tensor or array, as 16-bit .wav, clipped at +-1.

    Atomic (temporary file, then rename); makes parent folders. Errors: BadInput when `path` is
    not a .wav or cannot be written, ValueError when wav is not finite."""
    path = Path(path)
    if path.suffix.lower() != ".wav":
        raise BadInput(f"{path}: only .wav is written; name the file {path.stem}.wav")
    if torch.is_tensor(wav):
        wav = wav.detach().float().cpu().numpy()
    wav = np.atleast_2d(np.asarray(wav, dtype=np.float32))
    if not np.isfinite(wav).all():
        raise ValueError(f"save_audio({path}): the audio is not finite")
    with atomic(path) as temp:
        sf.write(temp, np.clip(wav.T, -1, 1), sample_rate, subtype="PCM_16", format="WAV")


@contextmanager
def atomic(path):
    """`with atomic(path) as temp:` write temp; it becomes path only when nothing went wrong."""
    temp = f"{path}.{os.getpid()}.tmp"
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        open(temp, "wb").close()
    except OSError as e:
        raise BadInput(f"{path}: cannot be written ({e.strerror}); choose another place") from e
    try:
        yield temp
        os.replace(temp, path)
    finally:
        if os.path.exists(temp):
            os.remove(temp)


# ---------------------------------------------------------------------------- manifests

def check_writable(path):
    """BadInput at the start, not after hours of work, where the file `path` cannot be written."""
    new = not os.path.exists(path)
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        open(path, "ab").close()
    except OSError as e:
        raise BadInput(f"{path}: cannot be written ({e.strerror}); choose another place") from e
    if new:
        os.remove(path)


def load_manifest(path, must_exist=True):
    """A .jsonl manifest, or a folder of audio (same-stem .txt is the text) -> list[Clip].

    `audio` is required, relative to the manifest; the other fields are Clip's; further keys are
    ignored. Errors: BadInput naming file and line; and, with must_exist, when audio files are
    missing, naming the first and how many."""
    path = Path(path)
    if path.is_dir():
        return scan(path, "folder")
    if not path.is_file():
        raise BadInput(f"{path}: no such manifest; `python data.py scan DIR --out {path}` makes "
                       "one of a folder of recordings; a config's head says what made its own")
    home, clips, gone = os.path.dirname(os.path.abspath(path)), [], []
    for n, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {n}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as e:
            raise BadInput(f"{where}: not JSON ({e.msg} at column {e.colno}); correct it") from e
        if not isinstance(row, dict) or not isinstance(row.get("audio"), str) or not row["audio"]:
            raise BadInput(f'{where}: needs {{"audio": "path", ...}}; it is {line.strip()[:60]}')
        row = {f.name: row[f.name] for f in fields(Clip) if row.get(f.name) is not None}
        for name in ("text", "said", "kind", "speaker", "id"):
            if not isinstance(row.get(name, ""), str):
                raise BadInput(f"{where}: {name} must be a string; it is {row[name]!r}")
        if row.get("kind", "speech") not in KINDS:
            raise BadInput(f"{where}: unknown kind {row['kind']!r}; use {', '.join(KINDS)}")
        seconds = row.get("duration", 1)
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not seconds > 0:
            raise BadInput(f"{where}: duration must be positive seconds; it is {seconds!r}")
        if not isinstance(row.get("words", []), list):
            raise BadInput(f"{where}: words must be [[word, start, end], ...]; "
                           f"it is {row['words']!r}")
        for word in row.get("words", []):
            if not (isinstance(word, list) and len(word) == 3 and isinstance(word[0], str)
                    and all(isinstance(t, (int, float)) for t in word[1:])):
                raise BadInput(f"{where}: words must be [[word, start, end], ...]; one is {word!r}")
        starts = [start for _, start, _ in row.get("words", [])]        # aligners may overlap words
        if starts != sorted(starts) or any(end < start for _, start, end in row.get("words", [])):
            raise BadInput(f"{where}: the times of words must not go backwards")
        row["audio"] = os.path.normpath(os.path.join(home, row["audio"]))
        if must_exist and not os.path.isfile(row["audio"]):
            gone.append(f"{where}: audio file {row['audio']} is missing")
        clips.append(Clip(**{"id": Path(row["audio"]).stem, **row}))
    if gone:
        raise BadInput(f"{gone[0]} ({len(gone)} of {len(clips)} are); correct the paths, or "
                       f"`python data.py check {path} --out clean.jsonl` drops those lines")
    if not clips:
        raise BadInput(f"{path}: holds no clips; each line is {{\"audio\": \"a/b.flac\", ...}}")
    return clips


def write_manifest(path, clips):
    """Writes Clips as .jsonl, atomically. Audio below the manifest's folder becomes relative."""
    home = os.path.dirname(os.path.abspath(path))
    with atomic(path) as temp, open(temp, "w", encoding="utf-8") as out:
        for c in clips:
            row = {f.name: getattr(c, f.name) for f in fields(Clip)
                   if getattr(c, f.name) not in ("", None)}
            if os.path.commonprefix([c.audio, home + os.sep]) == home + os.sep:
                row["audio"] = os.path.relpath(c.audio, home)
            out.write(json.dumps(row, ensure_ascii=False) + "\n")


def load_clips(cfg):
    """cfg.manifest, cfg.valid -> (train, valid), two list[Clip].

    Without cfg.valid the last max(2 %, 8) clips of a seeded shuffle are held out (at most half;
    speakers may stand on both sides; a single clip is both). Errors: BadInput, also when the
    training manifest has none of the kinds that cfg.weights asks for."""
    clips = load_manifest(cfg.manifest)
    wanted, there = {k for k, w in cfg.weights.items() if w > 0}, {c.kind for c in clips}
    if wanted and not wanted & there:
        raise BadInput(f"data.weights asks for {', '.join(sorted(wanted))}, but {cfg.manifest} has "
                       f"only {', '.join(sorted(there))}; give its kind a weight, or `scan --kind`")
    if cfg.valid:
        return clips, load_manifest(cfg.valid)
    order = rng("split", cfg.seed).permutation(len(clips))
    keep = len(clips) - min(max(math.ceil(len(clips) / 50), 8), len(clips) // 2)
    return [clips[i] for i in order[:keep]], [clips[i] for i in order[keep:]] or list(clips)


def read_text(path):
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as e:
        raise BadInput(f"{path}: cannot be read ({e.strerror}); correct the path") from e
    except UnicodeDecodeError as e:
        raise BadInput(f"{path}: not UTF-8 text (byte {e.start}); convert it") from e


def scan(folder, layout="folder", kind="speech"):
    """Finds the clips of a corpus on disk -> list[Clip], in the order of their paths.

    folder     any tree of audio files, the text in the same-stem .txt; `kind` for all of them
    ljspeech   metadata.csv (id|text|normalised text), wavs/
    libritts   speaker/chapter/*.normalized.txt beside the audio
    vctk       txt/speaker/*.txt, wav48*/speaker/ (microphone 1 where there are two)
    audiocaps  a .csv with audiocap_id, youtube_id, start_time, caption, and audio files below it
               named by either id; give the .csv itself where there are several; kind "sound"

    Texts without audio are skipped and counted. Errors: BadInput when nothing is found."""
    root, found, skipped = Path(os.path.abspath(folder)), [], 0
    if layout not in LAYOUTS:
        raise BadInput(f"unknown layout {layout!r}; use {', '.join(LAYOUTS)}")
    if not root.exists():
        raise BadInput(f"{folder}: no such folder; correct the path")

    def tree(base):
        return sorted(p for p in base.rglob("*")
                      if p.suffix.lower() in AUDIO and not p.name.startswith("."))

    if layout == "folder":
        for p in tree(root):
            text = p.with_suffix(".txt")
            found.append((p, read_text(text) if text.is_file() else "", ""))
    elif layout == "ljspeech":
        if not (root / "metadata.csv").is_file():
            raise BadInput(f"{folder}: no metadata.csv in it; give LJSpeech's top folder")
        for line in read_text(root / "metadata.csv").splitlines():
            if line.strip():
                name, *texts = line.split("|")
                found.append((root / "wavs" / f"{name}.wav", texts[-1] if texts else "", "lj"))
    elif layout == "libritts":
        for p in sorted(root.rglob("*.normalized.txt")):
            stem = p.name.removesuffix(".normalized.txt")
            audio = [a for a in (p.with_name(stem + s) for s in AUDIO) if a.is_file()]
            found.append(((audio or [p.with_name(stem + ".wav")])[0], read_text(p),
                          p.parent.parent.name))
    elif layout == "vctk":
        for p in sorted(root.glob("txt/*/*.txt")):
            audio = [a for end in ("_mic1.flac", ".flac", ".wav", "_mic2.flac")
                     for a in sorted(root.glob(f"wav48*/{p.parent.name}/{p.stem}{end}"))]
            found.append(((audio or [p])[0], read_text(p), p.parent.name))
    else:
        tables = [root] if root.is_file() else sorted(root.glob("*.csv"))
        if len(tables) != 1:
            raise BadInput(f"{folder}: needs one .csv, it has {len(tables)}; give the one you want,"
                           f" e.g. {Path(folder) / 'train.csv'}, so that splits stay apart")
        by_name = {p.stem: p for p in tree(tables[0].parent)}
        for row in csv.DictReader(read_text(tables[0]).splitlines()):
            if not {"audiocap_id", "youtube_id", "caption"} <= set(row):
                raise BadInput(f"{tables[0]}: needs columns audiocap_id, youtube_id, caption")
            tube = row["youtube_id"]
            names = (tube, "Y" + tube, f"{tube}_{row.get('start_time')}", row["audiocap_id"])
            found.append((next((by_name[n] for n in names if n in by_name), tables[0]),
                          row["caption"], ""))
        kind = "sound"
    clips = [Clip(str(p), " ".join(text.split()), kind, who, id=p.stem)
             for p, text, who in found if p.suffix.lower() in AUDIO and p.is_file()]
    if not clips:
        raise BadInput(f"{folder}: no clips in the {layout} layout; see `python data.py scan -h`")
    if len(clips) < len(found):
        print(f"{len(found) - len(clips)} texts have no audio file: skipped", file=sys.stderr)
    return clips


# ---------------------------------------------------------------------------- text

@cache
def load_tokenizer(name):
    """A tokenizers.Tokenizer from a tokenizer.json, a folder that holds one, or the hub."""
    try:
        import tokenizers
    except ImportError:
        raise BadInput(f"data.tokenizer = \"{name}\": needs the hf extra: "
                       "pip install -e .[hf]") from None
    path = os.path.join(name, "tokenizer.json") if os.path.isdir(name) else name
    try:
        if os.path.isfile(path):
            return tokenizers.Tokenizer.from_file(path)
        return tokenizers.Tokenizer.from_pretrained(name)
    except Exception as e:                       # the library raises bare Exceptions
        raise BadInput(f"data.tokenizer = \"{name}\": neither a tokenizer.json, a folder with one, "
                       f"nor found on the hub ({' '.join(str(e).split())[:100]})") from None


def first_special(cfg=None):
    """The id of PAD; the kinds follow it. 256 for bytes, else the size of the vocabulary."""
    return load_tokenizer(cfg.tokenizer).get_vocab_size() if cfg and cfg.tokenizer else PAD


def vocabulary(cfg=None):
    """How many ids the text embedding needs: text, PAD and the kinds."""
    return first_special(cfg) + 1 + len(KINDS)


def encode_text(text, kind, cfg=None):
    """[kind's special] + ids of the text (NFKC, white space made single spaces).

    cfg: DataConfig, whose tokenizer gives the ids (with the specials that it adds by itself, e.g.
    Llama's begin-of-text); None = UTF-8 bytes.
    """
    text = " ".join(unicodedata.normalize("NFKC", text).split())
    ids = (load_tokenizer(cfg.tokenizer).encode(text).ids if cfg and cfg.tokenizer
           else text.encode("utf-8"))
    special = [first_special(cfg) + 1 + KINDS.index(kind)]
    return [*(special if cfg is None or cfg.kind_token else []), *ids]


def decode_text(ids, cfg=None):
    """The text of token ids (list or tensor); specials are dropped, broken bytes become U+FFFD."""
    ids = [i for i in map(int, ids) if i < first_special(cfg)]
    if cfg and cfg.tokenizer:
        return load_tokenizer(cfg.tokenizer).decode(ids)
    return bytes(ids).decode("utf-8", "replace")


# ---------------------------------------------------------------------------- descriptions

# One interface for the three kinds (AudioCALM, data reformulation): what is heard, in a sentence;
# for speech with who speaks, how, and the transcript word for word. Templates are ours.
DESCRIPTIONS = {
    "speech": ('{who} says{how}: "{text}"', 'Speech by {who}{how}. The words are: "{text}"',
               'A recording of {who} speaking{how}: "{text}"', '{who}, speaking{how}: "{text}"',
               'One hears {who} say{how}: "{text}"'),
    "sound": ("{text}", "The sound of {text}", "{text} can be heard", "A recording of {text}",
              "One hears {text}"),
    "music": ("Music: {text}", "A piece of music, {text}", "The music is {text}",
              "A recording of music: {text}", "One hears music: {text}")}
PACES = ((11.0, ("slowly", "at a slow pace")), (18.0, ("",)),       # below so many characters a
         (math.inf, ("quickly", "at a fast pace")))                 # second; read English: 14 to 15


def describe(clip, seed=0):
    """The clip's text as a description, "" stays "". A function of (seed, clip.id) and the clip.

    Who: the speaker's name, or a paraphrase of "someone". How: the pace, measured as characters of
    transcript a second, named only where it is unusual."""
    if not clip.text:
        return ""
    name = hashlib.sha256(clip.id.encode()).digest()[:8]
    g = rng("describe", seed, int.from_bytes(name, "little"))

    def pick(options):
        return options[int(g.integers(len(options)))]

    who, how = pick(("someone", "a voice", "a person")), ""
    if clip.kind == "speech":
        who = f"speaker {clip.speaker}" if clip.speaker else who
        pace = len(clip.text) / max(seconds_of(clip), 0.1)
        how = pick(next(names for limit, names in PACES if pace < limit))
    text = pick(DESCRIPTIONS[clip.kind]).format(who=who, how=" " + how if how else "",
                                                text=clip.text.strip())
    return text[0].upper() + text[1:]


def read_rewritten(path):
    """{"id": ..., "text": ...} a line, from any external tool -> {id: text}."""
    rewritten = {}
    for n, line in enumerate(read_text(path).split("\n"), 1):
        try:
            row = json.loads(line or "{}")
        except json.JSONDecodeError as e:
            raise BadInput(f"{path}, line {n}: not JSON ({e.msg}); correct it") from e
        if line.strip() and not (isinstance(row, dict) and isinstance(row.get("id"), str)
                                 and isinstance(row.get("text"), str)):
            raise BadInput(f'{path}, line {n}: needs {{"id": "...", "text": "..."}}')
        rewritten |= {row["id"]: row["text"]} if line.strip() else {}
    return rewritten


# ---------------------------------------------------------------------------- order and prefetch

def rng(purpose, *numbers):
    """A generator for one purpose ("crop", "row", ...) at (seed, row): independent streams."""
    return np.random.default_rng([int.from_bytes(purpose.encode(), "little"), *numbers])


def word_stream(words, frames, rate):
    """[[word, start, end], ...] in seconds -> (frames,) int64: the bytes of each word and a space
    in consecutive frames from the one where it starts (or where the word before is through), a
    line feed where the last word ends, PAD elsewhere; what does not fit before the end is cut.
    rate: frames a second.

    The line feed says that nothing more will be said: without it "no word yet" and "no word any
    more" would be the same, and a text half said could stop for seconds.
    """
    stream, free = np.full(frames, PAD), 0
    ids = [[*word.encode("utf-8"), 32] for word, _, _ in words] + [[END]]
    starts = [start for _, start, _ in words] + [words[-1][2]]
    for ids, start in zip(ids, starts):
        at = max(int(start * rate), free)
        free = at + len(ids)
        stream[at:free] = ids[:max(0, frames - at)]
    return stream


class Order:
    """The endless order of clips: .index(row) -> clip number, row = step * global batch + i.

    clips: a number of clips, or one kind name a clip. weights: {kind: share}; {} keeps the natural
    shares, and an epoch is then a permutation. Each kind is walked in shuffled cycles that run on
    across epochs, so no clip comes again before all of its kind have been seen; within an epoch the
    kinds are spread evenly, so every batch holds its share (within a row or two).
    Kinds that are not among the clips are left out of the shares. Pure function of (seed, row)."""

    def __init__(self, clips, weights=None, seed=0):
        kinds = np.zeros(clips, int) if isinstance(clips, int) else np.array(clips)
        if len(kinds) == 0:
            raise ValueError("Order: no clips")
        self.seed, self.members, self.counts = seed, [], []
        names = sorted(set(kinds.tolist()))
        total = sum(weights.get(k, 0) for k in names) if weights else 0
        if weights and not total > 0:
            raise ValueError(f"weights: no share for {', '.join(map(str, names))}; add one")
        for k in names:
            share = weights.get(k, 0) / total if weights else 1
            if share > 0:
                self.members.append(np.flatnonzero(kinds == k))
                n = len(kinds) * share if weights else len(self.members[-1])
                self.counts.append(max(1, round(n)))
        self.length = sum(self.counts)                    # rows in an epoch
        self.last = (-1, None)

    def epoch(self, e):
        """Clip numbers of epoch e, (length,)."""
        slots, clips = [], []
        for k, (members, count) in enumerate(zip(self.members, self.counts)):
            n = len(members)
            first, end = e * count // n, ((e + 1) * count - 1) // n + 1     # cycles it touches
            walk = np.concatenate([rng("cycle", self.seed, k, c).permutation(members)
                                   for c in range(first, end)])
            clips.append(walk[e * count - first * n:][:count])
            slots.append((np.arange(count) + rng("slot", self.seed, k, e).random(count)) / count)
        return np.concatenate(clips)[np.argsort(np.concatenate(slots), kind="stable")]

    def index(self, row):
        e, i = divmod(row, self.length)
        last = self.last
        if last[0] != e:
            last = self.last = (e, self.epoch(e))
        return int(last[1][i])


def global_rows(step, rows, batch):
    """Rows (range, slice or None = all) of step's global batch -> their numbers in the run."""
    rows = range(batch) if rows is None else range(batch)[rows] if isinstance(rows, slice) else rows
    return [step * batch + r for r in rows]


class Prefetch:
    """for batch in Prefetch(fn, first_step): a thread calls fn(step) `ahead` steps early.

    Steps are consecutive, in order, until `stop` (exclusive; None: endless). An error of fn is
    raised where its batch would have come. close() waits for the thread."""

    def __init__(self, fn, first_step=0, ahead=2, stop=None):
        self.fn, self.step, self.stop, self.queue = fn, first_step, stop, deque()
        self.pool = ThreadPoolExecutor(1, "prefetch")
        for _ in range(max(1, ahead)):
            self.submit()

    def submit(self):
        if self.pool and (self.stop is None or self.step < self.stop):
            self.queue.append(self.pool.submit(self.fn, self.step))
            self.step += 1

    def __iter__(self):
        return self

    def __next__(self):
        if not self.queue:
            raise StopIteration
        future = self.queue.popleft()
        self.submit()
        return future.result()

    def close(self):
        if self.pool:
            self.pool.shutdown(wait=True, cancel_futures=True)
        self.pool = None
        self.queue.clear()


# ---------------------------------------------------------------------------- VAE batches

class AudioBatches:
    """(step, rows) -> {"audio": float32 (b, channels, S)}, S = crop_seconds, a multiple of hop.

    `batch` is the global batch; rows (range, slice, None = all) says which of it are wanted. A row
    is a random crop of its clip; a shorter clip is zero-padded at the end. Gain is uniform in
    +- gain_db, held back where it would clip. Errors: BadInput naming an unreadable file."""

    def __init__(self, clips, cfg, sample_rate, channels, batch, hop=1):
        self.clips, self.cfg, self.rate, self.channels = clips, cfg, sample_rate, channels
        self.batch = batch
        self.S = math.ceil(round(cfg.crop_seconds * sample_rate) / hop) * hop
        self.order = Order([c.kind for c in clips], cfg.weights, cfg.seed)
        self.kept, self.room = {}, cfg.ram_gb * 1e9       # clip number -> int16 (channels, samples)
        self.pool = ThreadPoolExecutor(cfg.workers, "decode")

    def __call__(self, step, rows=None):
        out = list(self.pool.map(self.row, global_rows(step, rows, self.batch)))
        for _, i, pcm in out:
            if pcm is not None and i not in self.kept and pcm.nbytes <= self.room:
                self.kept[i] = pcm
                self.room -= pcm.nbytes
        return {"audio": torch.from_numpy(np.stack([crop for crop, _, _ in out]))}

    def row(self, row):
        """One row -> (crop float32 (channels, S), clip number, whole clip int16 or None)."""
        i, g = self.order.index(row), rng("crop", self.cfg.seed, row)
        u, gain = g.random(), 10 ** (g.uniform(-self.cfg.gain_db, self.cfg.gain_db) / 20)
        path, pcm = self.clips[i].audio, self.kept.get(i)
        if pcm is None:
            with open_audio(path) as f:
                seconds = f.frames / f.samplerate
            if seconds > LONG:
                start = u * max(0, seconds - self.S / self.rate)
                crop = load_audio(path, self.rate, self.channels, start=start,
                                  seconds=self.S / self.rate, allow_silence=True)
            else:
                crop = load_audio(path, self.rate, self.channels, allow_silence=True)
                pcm = np.rint(crop.clip(-1, 1) * 32767).astype(np.int16)
        if pcm is not None:                               # kept or just read: the same samples
            start = int(u * max(1, pcm.shape[1] - self.S + 1))
            crop = pcm[:, start:start + self.S].astype(np.float32) / 32767
        crop = crop * min(gain, 1 / max(np.abs(crop).max(), 1e-4))
        return np.pad(crop, ((0, 0), (0, self.S - crop.shape[1]))).astype(np.float32), i, pcm


def draw_spectrograms(path, pictures, sample_rate, columns=1):
    """dB spectrograms (512-point Hann, hop 128, the same scale for all) of [(title, wav
    (ch, S)), ...] -> path.
    """
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    rows = -(-len(pictures) // columns)
    fig, axes = plt.subplots(rows, columns, figsize=(3 + 4 * columns, 2.1 * rows), squeeze=False,
                             layout="constrained")
    for ax, (title, wav) in zip(axes.flat, pictures):
        wav = torch.nn.functional.pad(wav[0].float().cpu(), (0, max(0, 512 - wav.shape[-1])))
        s = torch.stft(wav, 512, 128, window=torch.hann_window(512),
                       return_complex=True).abs().clamp(min=1e-4)
        ax.imshow(20 * s.log10().numpy(), origin="lower", aspect="auto", vmin=-60, vmax=35,
                  extent=(0, wav.shape[-1] / sample_rate, 0, sample_rate / 2000))
        ax.set_title(title[:80], fontsize=8)
        ax.tick_params(labelsize=6)
    for ax in axes[:, 0]:
        ax.set_ylabel("kHz", fontsize=7)
    for ax in axes[-1]:
        ax.set_xlabel("seconds", fontsize=7)
    fig.savefig(path, dpi=80)
    plt.close(fig)


# ---------------------------------------------------------------------------- latent cache

def digest(*things):
    """16 hex digits that name these things: tensors, state dicts, dataclasses, lists, scalars."""
    h = hashlib.sha256()

    def add(x):
        h.update(type(x).__name__.encode() + b"\0")
        if torch.is_tensor(x):
            x = x.detach().cpu().contiguous()
            h.update(f"{x.dtype}{tuple(x.shape)}".encode())
            h.update(x.flatten().view(torch.uint8).numpy())
        elif isinstance(x, dict):
            for k in sorted(x):
                add(k)
                add(x[k])
        elif isinstance(x, (list, tuple)):
            h.update(str(len(x)).encode())
            for y in x:
                add(y)
        elif is_dataclass(x):
            for f in fields(x):
                add(f.name)
                add(getattr(x, f.name))
        elif x is None or isinstance(x, (str, bytes, bool, int, float)):
            h.update(repr(x).encode() + b"\0")
        else:
            raise TypeError(f"digest: cannot name a {type(x).__name__}")

    add(things)
    return h.hexdigest()[:16]


class LatentCache:
    """The latents of every clip of a manifest, read by memory map.

    folder/key/index.json        which clips lie in which shard, and their frames
    folder/key/shard_00000.npy   (sum of T, 2D) float16, [posterior mean | log-variance], or
                                 (sum of T, K) int16, codes of an RVQ with K levels

    len(cache); cache.frames[i] = T of clip i; cache.get(i) -> np.memmap (T, 2D or K);
    cache.dim = D; cache.levels = K, 0 for latents."""

    def __init__(self, path):
        """Opens a finished cache, folder/key. Errors: BadInput when it is missing or unfinished."""
        self.path = Path(path)
        index = read_index(self.path)
        if index is None or sum(len(s["clips"]) for s in index["shards"]) < index["n"]:
            raise BadInput(f"{path}: the latent cache is unfinished; build it first")
        self.dim, self.frames = index["dim"], np.zeros(index["n"], np.int64)
        self.levels = index.get("levels", 0)
        self.place = np.zeros((index["n"], 2), np.int64)                # shard, first frame
        self.clips_of, self.shards = [], []
        for k, shard in enumerate(index["shards"]):
            clips, T = np.array(shard["clips"]), np.array(shard["frames"])
            self.frames[clips], self.place[clips, 0] = T, k
            self.place[clips, 1] = np.cumsum(T) - T
            self.clips_of.append(clips)
            self.shards.append(np.load(shard_file(self.path, k), mmap_mode="r"))

    def __len__(self):
        return len(self.frames)

    def get(self, i):
        """Clip i, np.memmap: latents float16 (T, 2D), [mean | log-variance], or codes int16 (T, K).
        """
        k, first = self.place[i]
        return self.shards[k][first:first + self.frames[i]]

    @classmethod
    def build(cls, clips, encode, *, folder, key, sample_rate, channels, hop, dim,
              levels=0, batch_seconds=60.0, shard_seconds=1800.0, workers=4, show=True):
        """Encodes every clip once -> LatentCache. Run again after an interruption: it goes on.

        encode: float32 (B, channels, S), S a multiple of hop -> (B, S / hop, 2D), [mean | log-var];
        with levels = K > 0 codes instead, (B, S / hop, K), below 2^15.
        Clips of like length share a batch of about batch_seconds of audio, longest first, padded
        with zeros at the end; of each, ceil(S / hop) frames are kept. A clip longer than that is a
        batch of its own. key names encoder and data (see digest); another list of clips under
        the same key starts over.
        Errors: BadInput naming an unreadable file, ValueError when the latents have another shape
        than dim says or are not finite in float16."""
        path = Path(folder) / key
        names = digest([[c.audio, os.path.getsize(c.audio)] for c in clips], sample_rate, channels,
                       hop, dim, *([levels] if levels else []))
        index, width = read_index(path), levels or 2 * dim
        if index is None or index["names"] != names:
            index = {"names": names, "n": len(clips), "dim": dim, "levels": levels, "shards": []}
        seconds = [seconds_of(c) for c in clips]
        done = {i for shard in index["shards"] for i in shard["clips"]}
        todo = sorted(set(range(len(clips))) - done, key=lambda i: (-seconds[i], i))
        batches = []
        for i in todo:
            if batches and (len(batches[-1]) + 1) * seconds[batches[-1][0]] <= batch_seconds:
                batches[-1].append(i)
            else:
                batches.append([i])
        shard_seconds = max(shard_seconds, sum(seconds) / 256)              # few open files

        def load(b):                                                        # -> (B, channels, S)
            wavs = list(pool.map(lambda i: load_audio(clips[i].audio, sample_rate, channels,
                                                      allow_silence=True), batches[b]))
            S = -(-max(w.shape[1] for w in wavs) // hop) * hop
            audio = np.stack([np.pad(w, ((0, 0), (0, S - w.shape[1]))) for w in wavs])
            return torch.from_numpy(audio), [-(-w.shape[1] // hop) for w in wavs]

        pool, parts, shard, held = ThreadPoolExecutor(workers), [], {"clips": [], "frames": []}, 0.0
        passed = sum(seconds[i] for i in done)
        bar = tqdm(total=round(sum(seconds)), initial=round(passed), desc="latents",
                   unit=" s of audio", disable=not (show and todo))
        with bar, pool, closing(Prefetch(load, 0, stop=len(batches))) as loaded:
            for b, (audio, frames) in enumerate(loaded):
                latents = encode(audio).detach().cpu()                      # (B, T, 2D or K)
                if latents.shape != (len(frames), audio.shape[-1] // hop, width):
                    raise ValueError(f"encode gave {tuple(latents.shape)} for {tuple(audio.shape)},"
                                     f" not (B, S / {hop}, {width})")
                if levels and latents.max() >= 1 << 15:
                    raise ValueError("encode: codes do not fit into int16")
                latents = latents.short() if levels else latents.half()
                parts += [x[:T].numpy() for x, T in zip(latents, frames)]
                for i, x in zip(batches[b], parts[-len(frames):]):
                    if not np.isfinite(x).all():
                        raise ValueError(f"encode: latents of {clips[i].audio} are not finite")
                shard["clips"] += batches[b]
                shard["frames"] += frames
                held += sum(seconds[i] for i in batches[b])
                passed += sum(seconds[i] for i in batches[b])
                bar.update(round(passed) - bar.n)
                if held >= shard_seconds or b + 1 == len(batches):
                    with atomic(shard_file(path, len(index["shards"]))) as temp, \
                            open(temp, "wb") as out:
                        np.save(out, np.concatenate(parts))
                    index["shards"].append(shard)
                    with atomic(path / "index.json") as temp:
                        Path(temp).write_text(json.dumps(index))
                    parts, shard, held = [], {"clips": [], "frames": []}, 0.0
        return cls(path)


def shard_file(path, k):
    return Path(path) / f"shard_{k:05d}.npy"


def read_index(path):
    file = Path(path) / "index.json"
    return json.loads(file.read_text()) if file.is_file() else None


# ---------------------------------------------------------------------------- LM batches

class LatentBatches:
    """(step, rows) -> dict of tensors, b rows, static shapes, zeros (PAD in text) at the end:

        x       (b, frames, 2D)         float32, [mean | log-variance]; codes: (b, frames, K) int64
        frames  (b,)  int64             valid frames of x
        ended   (b,)  bool              the clip's last frame is in the row: it has an end
        text    (b, 1 + text_len) int64, text_len (b,) int64     [kind, ids...], valid tokens
        kind    (b,)  int64             number in KINDS
        prompt  (b, prompt_frames, 2D)  as x, prompt_len (b,) int64
        with word_rate (frames a second; the inner monologue of calm.py):
        words   (b, frames) int64       bytes beside the frames (word_stream); text is then [kind]
        aligned (b,)  bool              the manifest has words for the clip

    A clip longer than `frames` starts at 0 with probability 1/2, else anywhere. Speech that starts
    later has no text (it is not aligned), nor has speech whose text exceeds text_len; captions
    describe any part and stay, cut at a whole character.
    Voice prompt, for a share prompt_prob of speech rows: n frames, n uniform in prompt_frames / 2
    .. prompt_frames, from another clip of the speaker; else from the same clip outside the row;
    else none."""

    def __init__(self, clips, cache, cfg, batch, dim, word_rate=0.0):
        if cache.dim != dim or len(cache) != len(clips):
            raise ValueError(f"the cache has {len(cache)} clips of {cache.dim} channels, not "
                             f"{len(clips)} of {dim}; build it for these clips")
        self.clips, self.cache, self.cfg, self.batch, self.dim = clips, cache, cfg, batch, dim
        self.word_rate = word_rate
        self.order = Order([c.kind for c in clips], cfg.weights, cfg.seed)
        self.half = -(-cfg.prompt_frames // 2)            # fewest frames of a prompt
        self.voices = {}                                  # speaker -> clips long enough for one
        for i, c in enumerate(clips):
            if c.kind == "speech" and c.speaker and cache.frames[i] >= self.half:
                self.voices.setdefault(c.speaker, []).append(i)

    def __call__(self, step, rows=None):
        rows, c = global_rows(step, rows, self.batch), self.cfg
        b, levels = len(rows), self.cache.levels
        width, kind = (levels, np.int64) if levels else (2 * self.dim, np.float32)
        x, prompt = (torch.from_numpy(np.zeros((b, n, width), kind))
                     for n in (c.frames, c.prompt_frames))
        text = torch.full((b, 1 + c.text_len), first_special(c))
        words = torch.full((b, c.frames), PAD)
        small = {k: torch.zeros(b, dtype=torch.int64)
                 for k in ("frames", "ended", "text_len", "kind", "prompt_len", "aligned")}
        for r, row in enumerate(rows):
            i, g = self.order.index(row), rng("row", c.seed, row)
            clip, latents = self.clips[i], self.cache.get(i)
            T, n = len(latents), min(len(latents), c.frames)
            late, place = g.random() >= 0.5, g.random()
            start = 1 + int(place * (T - n)) if late and T > n else 0
            ids = self.tokens(clip, start)
            if self.word_rate and clip.words:
                ids = ids[:1]
                stream = word_stream(clip.words, T, self.word_rate)
                words[r, :n] = torch.from_numpy(stream[start:start + n])
            voice = self.prompt(i, start, start + n, g)
            x[r, :n] = torch.from_numpy(latents[start:start + n].astype(kind))
            prompt[r, :len(voice)] = torch.from_numpy(voice.astype(kind))
            text[r, :len(ids)] = torch.tensor(ids)
            for k, v in (("frames", n), ("ended", start + n == T), ("text_len", len(ids)),
                         ("kind", KINDS.index(clip.kind)), ("prompt_len", len(voice)),
                         ("aligned", bool(self.word_rate and clip.words))):
                small[k][r] = int(v)
        small["ended"], small["aligned"] = small["ended"].bool(), small["aligned"].bool()
        return {"x": x, "text": text, "words": words, "prompt": prompt, **small}

    def tokens(self, clip, start):
        cfg, special = self.cfg, int(self.cfg.kind_token)
        ids = encode_text(clip.text, clip.kind, cfg)
        if clip.kind == "speech":
            return ids if start == 0 and len(ids) <= special + cfg.text_len else ids[:special]
        ids = ids[:special + cfg.text_len]
        if cfg.tokenizer:
            return ids
        whole = bytes(ids[special:]).decode("utf-8", "ignore")              # no half character
        return [*ids[:special], *whole.encode("utf-8")]

    def prompt(self, i, start, end, g):
        """Frames (n, 2D) of the voice of clip i, never those of its row [start, end)."""
        clip, P = self.clips[i], self.cfg.prompt_frames
        none = np.zeros((0, self.cache.levels or 2 * self.dim), np.float16)
        wanted, n, who, where = g.random(), g.integers(self.half, P + 1), g.random(), g.random()
        if clip.kind != "speech" or P == 0 or wanted >= self.cfg.prompt_prob:
            return none
        same = self.voices.get(clip.speaker, [])
        same = same[int(who * len(same)):] + same[:int(who * len(same))]
        other = next((j for j in same if self.clips[j].audio != clip.audio), None)
        if other is not None:
            source = self.cache.get(other)
        else:
            latents = self.cache.get(i)
            sides = [s for s in (latents[:start], latents[end:]) if len(s) >= self.half]
            if not sides:
                return none
            source = sides[int(who * len(sides))]
        n = min(int(n), len(source))
        first = int(where * (len(source) - n + 1))
        return source[first:first + n]


# ---------------------------------------------------------------------------- command line

def main(argv=None):
    p = Parser(description="Make, check and describe manifests of audio clips.")
    sub = p.add_subparsers(dest="command", required=True)

    def command(name, about):
        return sub.add_parser(name, help=about.split(".")[0], description=about,
                              formatter_class=argparse.RawDescriptionHelpFormatter)

    s = command("scan", "Find the clips of a corpus on disk and write a manifest.\n\n"
                + textwrap.dedent(scan.__doc__.split("\n\n", 1)[1]))
    s.add_argument("dir", help="the corpus's top folder (audiocaps: or its .csv)")
    s.add_argument("--layout", choices=LAYOUTS, default="folder", help="default: folder")
    s.add_argument("--kind", choices=KINDS, default="speech", help="for all, default: speech")
    s.add_argument("--out", required=True, help="the manifest to write, .jsonl")
    s = command("check", "Read every file of a manifest and list the bad ones. Exit 2 if there are "
                "any and no --out is given.")
    s.add_argument("manifest", help=".jsonl or a folder of audio")
    s.add_argument("--out", help="write the good clips here, with their durations")
    s = command("info", "Clips, hours, speakers and durations, by kind.")
    s.add_argument("manifest", help=".jsonl or a folder of audio")
    s = command("describe", "Write a manifest whose texts are descriptions, for all kinds alike: "
                "templates with paraphrases, or sentences from another tool. Train on it, and "
                "write such sentences to sample.py.")
    s.add_argument("manifest", help=".jsonl or a folder of audio")
    s.add_argument("--out", required=True, help="the manifest to write, .jsonl")
    s.add_argument("--seed", type=int, default=0, help="of the paraphrases, default: 0")
    s.add_argument("--rewritten", help='.jsonl of {"id", "text"}: used in place of the templates')
    a = p.parse_args(argv)

    if a.command == "describe":
        clips = load_manifest(a.manifest)
        given = read_rewritten(a.rewritten) if a.rewritten else {}
        if a.rewritten and not set(given) & {c.id for c in clips}:
            raise BadInput(f"{a.rewritten}: no id of it is in {a.manifest}")
        if a.seed < 0:
            raise BadInput("--seed: cannot be negative; set 0 or more")
        write_manifest(a.out, [replace(c, text=given.get(c.id) or describe(c, a.seed),
                                       said=c.said or (c.text if c.kind == "speech" else ""))
                               for c in clips])
        print(f"{len(clips)} clips -> {a.out}")
    elif a.command == "scan":
        clips = scan(a.dir, a.layout, a.kind)
        write_manifest(a.out, clips)
        print(f"{len(clips)} clips -> {a.out}")
    elif a.command == "check":
        def read(clip):
            try:
                with open_audio(clip.audio) as f:
                    rate = f.samplerate
                return replace(clip, duration=load_audio(clip.audio, rate).shape[1] / rate), None
            except BadInput as e:
                return clip, str(e)

        clips, good = load_manifest(a.manifest, must_exist=False), []
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for clip, bad in tqdm(pool.map(read, clips), total=len(clips), unit="clip"):
                if bad:
                    tqdm.write(f"bad: {bad}")
                else:
                    good.append(clip)
        print(f"{len(good)} of {len(clips)} clips are good")
        if a.out and good:
            write_manifest(a.out, good)
            print(f"good clips -> {a.out}")
        elif len(good) < len(clips):
            raise BadInput(f"{a.manifest}: {len(clips) - len(good)} bad clips; " + (
                "`--out clean.jsonl` writes a manifest without them" if good else "no good one"))
    else:
        clips = load_manifest(a.manifest)
        seconds = np.array([seconds_of(c) for c in clips])
        counts = Counter(c.kind for c in clips)
        print("kind      clips   hours  speakers  seconds min/median/95%/max  with text  bytes max")
        for kind in [k for k in KINDS if counts[k]]:
            these = [c for c in clips if c.kind == kind]
            t = seconds[[c.kind == kind for c in clips]]
            span = "/".join(f"{v:.1f}" for v in np.quantile(t, (0, .5, .95, 1)))
            texts = [len(encode_text(c.text, kind)) - 1 for c in these]
            print(f"{kind:7s} {len(these):7d} {t.sum() / 3600:7.2f} "
                  f"{len({c.speaker for c in these} - {''}):9d}  {span:>26s} "
                  f"{np.mean(np.array(texts) > 0):9.0%} {max(texts):10d}")


if __name__ == "__main__":
    cli(main)
