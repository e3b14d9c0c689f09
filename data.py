"""Audio files, text and cached latents on their way to the models.

    manifest.jsonl ── load_manifest ──> [Clip]         {"audio": "a/b.flac", "text": "...", ...}
    or a folder                            │
                ┌──────────────────────────┴──────────────────┐
                v  stage "vae"                                v  once, after the VAE
          AudioBatches(step, rows)                      latents.py: build(encode)
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
Manifests are made by corpora/scan.py.
"""
import json
import math
import os
import unicodedata
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Annotated, get_args

import numpy as np
import soundfile as sf
import soxr
import torch

from cli import BadInput, atomic
from schema import Kind, Range

KINDS = get_args(Kind)                              # speech, sound, music
PAD, SPEECH, SOUND, MUSIC = 256, 257, 258, 259      # ids 0..255 are UTF-8 bytes
END = 10                                            # line feed: the words of a clip are over
AUDIO = (".wav", ".flac", ".ogg", ".opus", ".mp3")
LONG = 60.0     # seconds; a longer file is never kept in memory, only the crop is read from it


@dataclass
class Clip:
    """One line of a manifest."""
    # absolute path
    audio: str
    # transcript (speech) or caption (sound, music), or a description of either
    text: str = ""
    kind: Kind = "speech"
    # "" = unknown
    speaker: str = ""
    # [[word, start, end], ...] in seconds
    words: list | None = None
    # seconds; None = ask the file's header
    duration: float | None = None
    id: str = ""
    # speech: the words spoken, where `text` is a description ("said" in manifests of before)
    transcript: str = ""


@dataclass
class DataConfig:
    """The [data] table."""
    # training manifest (.jsonl) or folder of audio; "" = the toy corpus
    manifest: str = ""
    # held-out manifest; "" = max(2 %, 8) clips drawn from `manifest`
    valid: str = ""
    # share of each kind in a batch, {speech = 0.5, sound = 0.25, music = 0.25}; {} = as they are.
    # Corpora differ a hundredfold in size, and the small kinds would hardly be seen
    weights: dict[Kind, Annotated[float, Range(0)]] = field(default_factory=dict)
    # seconds of a VAE training crop. 1 s holds what the discriminators look at; more rows teach
    # more than longer ones
    crop_seconds: Annotated[float, Range(above=0)] = 1.0
    # "" = UTF-8 bytes. Else the vocabulary of a published text model: a tokenizer.json, a folder
    # that holds one, or a name on the Hugging Face hub (hf extra); for a pretrained backbone
    tokenizer: str = ""
    # text begins with its kind; false for weights that know none (Pocket TTS: speech only)
    kind_token: bool = True
    # bytes (or tokens) of text in a row. A longer transcript is left out (it would not match the
    # audio), a longer caption is cut
    text_len: Annotated[int, Range(1)] = 64
    # latent frames in a row: 5.1 s at 12.5 Hz. Speech with text should fit whole: only then is its
    # end seen together with its text
    frames: Annotated[int, Range(1)] = 64
    # latent frames kept for the voice prompt; 0 = no voice prompts
    prompt_frames: Annotated[int, Range(0)] = 0
    # share of speech rows that get one; the rest learn to do without
    prompt_prob: Annotated[float, Range(0, 1)] = 0.5
    # dB, VAE loudness augmentation, uniform in +- gain_db, never clips
    gain_db: Annotated[float, Range(0)] = 0.0
    # GB of decoded int16 audio kept by each process (17 h at 16 kHz)
    ram_gb: Annotated[float, Range(0)] = 2.0
    # threads that decode audio; the batches do not depend on it
    workers: Annotated[int, Range(1)] = 4
    # of order, crops, gains, cuts and prompts
    seed: Annotated[int, Range(0)] = 0

    def __post_init__(self):
        if self.valid and not self.manifest:
            raise ValueError("valid: held-out clips of a data.manifest; "
                             "without one the corpus is the toy's")
        if self.weights and not sum(self.weights.values()) > 0:
            raise ValueError("weights: must not all be zero; {} means the natural shares")


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


# ---------------------------------------------------------------------------- manifests


def load_manifest(path, must_exist=True):
    """A .jsonl manifest, or a folder of audio (same-stem .txt is the text) -> list[Clip].

    `audio` is required, relative to the manifest; the other fields are Clip's; further keys are
    ignored. Errors: BadInput naming file and line; and, with must_exist, when audio files are
    missing, naming the first and how many."""
    path = Path(path)
    if path.is_dir():
        return clips_in_folder(path)
    if not path.is_file():
        raise BadInput(f"{path}: no such manifest; `python -m corpora.scan DIR --out {path}` "
                       "makes one of a folder of recordings; a config's head says what made its own")
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
        row = {"transcript": row.get("said")} | row                    # its name until 8841065
        row = {f.name: row[f.name] for f in fields(Clip) if row.get(f.name) is not None}
        for name in ("text", "transcript", "kind", "speaker", "id"):
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
                       f"`python -m corpora.scan check {path} --out clean.jsonl` drops those lines")
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


def audio_files(folder):
    """All audio files below a folder, sorted by path; hidden ones are left out."""
    return sorted(p for p in Path(folder).rglob("*")
                  if p.suffix.lower() in AUDIO and not p.name.startswith("."))


def clips_in_folder(folder, kind="speech"):
    """Every audio file below `folder` as a Clip, its text from the same-stem .txt -> list[Clip].

    Errors: BadInput when there is none."""
    clips = []
    for path in audio_files(os.path.abspath(folder)):
        text = path.with_suffix(".txt")
        text = " ".join(read_text(text).split()) if text.is_file() else ""
        clips.append(Clip(str(path), text, kind, id=path.stem))
    if not clips:
        raise BadInput(f"{folder}: no audio in it ({', '.join(AUDIO)}); "
                       "see `python -m corpora.scan -h`")
    return clips


def read_text(path):
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as e:
        raise BadInput(f"{path}: cannot be read ({e.strerror}); correct the path") from e
    except UnicodeDecodeError as e:
        raise BadInput(f"{path}: not UTF-8 text (byte {e.start}); convert it") from e


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


# One interface for the three kinds (AudioCALM, data reformulation): what is heard, in a sentence;
# for speech with who speaks, how, and the transcript word for word. Templates are ours.


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
