"""Manifests and text on their way to the models, and batches of audio.

    manifest.jsonl ── load_manifest ──> Clips          {"audio": "a/b.flac", "text": "...", ...}
    or a folder        (manifest.py)       │
                ┌──────────────────────────┴──────────────────┐
                v  stage "vae"                                v  once, after the VAE
          AudioBatches(step, rows)                      latents.py: LatentCache.build(clips, encode)
          "audio" (B, channels, S)                            │  shards of [mean | log-variance]
          random crops, gain                                  v  stages "lm", "audiocalm", ...
                                                        latents.py: LatentBatches(step, rows)
                                                        "text", "prompt", "x", ...

    text   encode_text(text, kind)                  [KIND h e l l o]         bytes and one special

Every batch is a pure function of (seed, step, rows). The position in the data is therefore only a
step number: resuming is exact, and 1 or 8 processes see the same global batch, each its own rows.

Papers: CALM (arXiv 2509.06926), text and audio; AudioCALM (arXiv 2606.23080), one model for speech,
sound and music.
Where this differs from the papers: text is bytes with one special token for the kind, not
SentencePiece tokens or T5 embeddings, so that nothing is downloaded.
Precision: audio float32 in a batch, int16 in memory.
manifest.py reads manifests, audio.py and decoder.py the files; corpora/scan.py makes manifests.
"""
import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated

import numpy as np
import torch

from audio import load_audio
from cli import BadInput
from decoder import seconds_in_file
from manifest import KINDS, Clip, columns, load_manifest, plain, write_manifest      # noqa: F401
from schema import Kind, Range, shown

PAD = 256                                           # ids 0..255 are UTF-8 bytes
# held-out clips at most: all of them are opened before a training begins
HELD_OUT = 10_000
# of a longer file only the crop is read, even where the corpus fits into memory
WHOLE_FILE_SECONDS = 60.0


@dataclass
class DataConfig:
    """The [data] table."""
    # training manifest (.jsonl) or folder of audio; "" = the toy corpus
    manifest: str = ""
    # held-out manifest; "" = max(2 %, 8) random clips of `manifest`, at most a fifth of them or
    # 10,000
    valid: str = ""
    # folder or address (s3://...) of the encoded clips; "" = latents/ of the run. One for several
    # runs saves encoding; at an address they must be whole: a copy of such a folder
    latents: str = ""
    # share of each kind in a batch, {speech = 0.5, sound = 0.25, music = 0.25}; {} = natural
    # shares. Corpora differ a hundredfold in size, and a small kind would hardly be seen
    weights: dict[Kind, Annotated[float, Range(0)]] = field(default_factory=dict)
    # seconds of a VAE training crop; 1 s covers the discriminators' windows, and more rows teach
    # more than longer ones
    crop_seconds: Annotated[float, Range(above=0, high=3600)] = 1.0
    # "" = UTF-8 bytes; else the vocabulary of a published text model, for a pretrained backbone:
    # a tokenizer.json, a folder that holds one, or a name on the Hugging Face hub (hf extra)
    tokenizer: str = ""
    # text begins with its kind's token; false for weights trained without (Pocket TTS: speech only)
    kind_token: bool = True
    # bytes (or tokens) of text per row; a longer transcript is left out, since it would not match
    # the audio, and a longer caption is cut
    text_len: Annotated[int, Range(1, 1_000_000)] = 64
    # latent frames per row, 2.6 s at the default 25 Hz; speech with text should fit whole, since
    # only then is its end seen together with its text
    frames: Annotated[int, Range(1, 1_000_000)] = 64
    # share of the rows of speech that begin where their clip begins, where the clip has text and is
    # longer than `frames`: only those have the text. All other rows begin anywhere, evenly: music,
    # sound, speech without text
    beginning_prob: Annotated[float, Range(0, 1)] = 0.5
    # latent frames kept for the voice prompt; 0 = no voice prompts
    prompt_frames: Annotated[int, Range(0, 1_000_000)] = 0
    # share of speech rows with a voice prompt; from the others the model learns to do without
    prompt_prob: Annotated[float, Range(0, 1)] = 0.5
    # dB, loudness augmentation of the VAE: uniform in +- gain_db, never above full scale
    gain_db: Annotated[float, Range(0, 200)] = 0.0
    # GB of decoded int16 audio that each process keeps (2 GB hold 17 h at 16 kHz); of a larger
    # corpus only the crops are read
    ram_gb: Annotated[float, Range(0, 1_000_000)] = 3.0
    # threads that decode audio; the batches do not depend on it
    workers: Annotated[int, Range(1, 1024)] = 4
    # processes that make batches, beside each training process; 0 = one thread of it, which is
    # enough where a step takes longer than its batch; a GPU needs several
    processes: Annotated[int, Range(0, 256)] = 0
    # random seed of order, crops, gains, windows, prompts and the held-out split
    seed: Annotated[int, Range(0, below=2 ** 63)] = 0

    def __post_init__(self):
        if self.valid and not self.manifest:
            raise ValueError("valid: needs data.manifest, whose held-out clips it names; "
                             "without a manifest the corpus is the toy's")
        if self.weights and not sum(self.weights.values()) > 0:
            raise ValueError("weights: must not all be zero; {} means the natural shares")


# ---------------------------------------------------------------------------- clips

def load_clips(cfg):
    """Read cfg.manifest and cfg.valid -> (train, valid), two Clips.

    Without cfg.valid, the last max(2 %, 8) clips of a seeded shuffle are held out: at most a fifth
    of the clips or HELD_OUT; a speaker may be on both sides; a single clip is on both. Errors:
    BadInput, also when the training manifest has none of the kinds that cfg.weights asks for.
    """
    clips = load_manifest(cfg.manifest)
    wanted = {kind for kind, weight in cfg.weights.items() if weight > 0}
    present = {*clips.kinds()}
    if wanted and not wanted & present:
        raise BadInput(f"data.weights asks for {', '.join(sorted(wanted))}, but {cfg.manifest} has "
                       f"only {', '.join(sorted(present))}; give that kind a weight, or set the "
                       "kind with `python -m corpora.scan DIR --kind`")
    if cfg.valid:
        return clips, load_manifest(cfg.valid)
    return split_off(clips, cfg.seed)


def split_off(clips, seed):
    """load_clips without cfg.valid: Clips -> (train, valid)."""
    order = rng("split", seed).permutation(len(clips))
    held_out = min(max(math.ceil(len(clips) / 50), 8), max(1, len(clips) // 5), len(clips) - 1,
                   HELD_OUT)
    train = clips[order[:len(clips) - held_out]]
    valid = clips[order[len(clips) - held_out:]]
    return train, valid or clips


def seconds_of(clip):
    """Length of a Clip in seconds, from the manifest or else from the file."""
    if clip.duration is not None:
        return clip.duration
    return seconds_in_file(clip.audio)


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
        path = path if os.path.isfile(path) else in_cache_of_hub(name)
        if path:
            return tokenizers.Tokenizer.from_file(path)
        return tokenizers.Tokenizer.from_pretrained(name)
    except Exception as e:                       # the library raises bare Exceptions
        raise BadInput(f"data.tokenizer = \"{name}\": neither a tokenizer.json, a folder with one, "
                       f"nor found on the hub ({' '.join(str(e).split())[:100]})") from None


def in_cache_of_hub(name):
    """The path of a tokenizer.json that was downloaded from the hub before, or ""."""
    try:
        from huggingface_hub import try_to_load_from_cache
        found = try_to_load_from_cache(name, "tokenizer.json")
    except (ImportError, ValueError):                 # no hf extra; no name of the hub
        return ""
    return found if isinstance(found, str) else ""


def refuse_download(name, path):
    """BadInput where the tokenizer that a checkpoint's config names is not on this machine: what a
    checkpoint says must not reach the network.
    """
    if name and not os.path.exists(name) and not in_cache_of_hub(name):
        raise BadInput(f"{path}: its data.tokenizer = {shown(name)} is not on this machine, and "
                       "what a checkpoint names is not downloaded; if you trust it, `hf download "
                       "NAME tokenizer.json` first")


def pad_id(cfg=None):
    """The id of PAD; the kinds' ids follow it. 256 for bytes, else the size of the vocabulary."""
    return load_tokenizer(cfg.tokenizer).get_vocab_size() if cfg and cfg.tokenizer else PAD


def vocabulary(cfg=None):
    """Number of ids that the text embedding needs: text, PAD and the kinds."""
    return pad_id(cfg) + 1 + len(KINDS)


def encode_text(text, kind, cfg=None):
    """Text -> token ids: the kind's special, then the ids of the plain text.

    cfg: DataConfig, whose tokenizer gives the ids (with the specials that it adds by itself, e.g.
    Llama's begin-of-text) and whose kind_token may leave out the kind; None = UTF-8 bytes.
    """
    text = plain(text)
    if cfg and cfg.tokenizer:
        ids = load_tokenizer(cfg.tokenizer).encode(text).ids
    else:
        ids = text.encode("utf-8")
    if cfg and not cfg.kind_token:
        return [*ids]
    return [pad_id(cfg) + 1 + KINDS.index(kind), *ids]


def text_tokens(text, kind, cfg):
    """Number of tokens of a text, without the one that names the kind."""
    return len(encode_text(text, kind, cfg)) - int(cfg.kind_token)


def fits(text, kind, cfg):
    """Whether a text has at most cfg.text_len tokens, without the one that names the kind."""
    return text_tokens(text, kind, cfg) <= cfg.text_len


def texts_tokens(clips, cfg):
    """text_tokens of every clip (n,); a clip without text has those that the tokenizer adds."""
    clips = columns(clips)
    if not cfg.tokenizer:
        return clips.column("text_bytes").astype(np.int64)

    # a thousand texts at a time: the tokenizer shares them among all cores
    lengths = []
    tokenizer = load_tokenizer(cfg.tokenizer)
    for first in range(0, len(clips), 1000):
        texts = [plain(clip.text) for clip in clips[first:first + 1000]]
        lengths += [len(encoding.ids) for encoding in tokenizer.encode_batch(texts)]
    return np.array(lengths, np.int64)


def texts_left_out(clips, cfg, words_beside=False):
    """Sentences that count the texts that are too long for cfg.text_len, by kind.

    words_beside: an inner monologue takes the text of clips with word times, of any length.
    Errors: BadInput when speech has transcripts and none is short enough.
    """
    clips = columns(clips)
    tokens = texts_tokens(clips, cfg)
    sentences = []
    for number, kind in enumerate(KINDS):
        with_text = (clips.column("kind") == number) & clips.column("has_text")
        before_audio = with_text & ~clips.column("has_words") if words_beside else with_text
        lengths = tokens[before_audio]
        too_long = int((lengths > cfg.text_len).sum())
        if too_long == 0:
            continue

        # how many, and which length would do
        texts = "transcripts" if kind == "speech" else f"captions of {kind}"
        last = math.ceil(0.99 * len(lengths)) - 1
        enough = np.partition(lengths, last)[last]
        sentence = (f"text: {too_long:,} of {with_text.sum():,} {texts} exceed data.text_len = "
                    f"{cfg.text_len}; {enough} holds 99 %")
        if kind == "speech" and too_long == with_text.sum():
            raise BadInput(f"{sentence}; none is left to learn from")
        sentences.append(sentence + ("" if kind == "speech" else "; their ends are cut"))
    return sentences


# ---------------------------------------------------------------------------- order and prefetch

def rng(purpose, *numbers):
    """A random generator for one purpose ("crop", "row", ...) and numbers, e.g. (seed, row).

    Generators of different purposes or numbers are independent.
    """
    return np.random.default_rng([int.from_bytes(purpose.encode(), "little"), *numbers])


def kinds_seen(clips, weights):
    """The kinds that have rows, in the order of KINDS. weights: {kind: share}; {} = all kinds."""
    return [kind for kind in columns(clips).kinds() if not weights or weights.get(kind, 0) > 0]


class Order:
    """The endless order of clips: .index(row) -> clip number, row = step * global batch + i.

        speech   2 0 1 | 1 2 0 | ...     shuffled cycles of each kind
        music    4 3 | 3 4 | 4 3 | ...
        epoch    2 4 0 1 3, ...          counts[k] clips of each kind, interleaved evenly

    kinds: the kind of each clip, its number in KINDS. weights: {kind: share}; {} keeps the natural
    shares, and an epoch is then a permutation. Each kind is walked in shuffled cycles that run on
    across epochs, so that no clip is repeated before all clips of its kind have been seen.
    Within an epoch the kinds are spread evenly, so that every batch holds its share (within a row
    or two). Weights of kinds without clips are ignored. A pure function of (seed, row).
    """

    def __init__(self, kinds, weights=None, seed=0):
        kinds = np.asarray(kinds)
        if len(kinds) == 0:
            raise ValueError("Order: no clips")
        names = sorted(KINDS[number] for number in np.unique(kinds))
        total = sum(weights.get(k, 0) for k in names) if weights else 0
        if weights and not total > 0:
            raise ValueError(f"weights: no share for {', '.join(names)}; add one")

        # per kind with a share: the numbers of its clips, and its rows per epoch
        self.members = []
        self.counts = []
        for k in names:
            members = np.flatnonzero(kinds == KINDS.index(k))
            share = weights.get(k, 0) / total if weights else 1
            if share > 0:
                self.members.append(members)
                rows = len(kinds) * share if weights else len(members)
                self.counts.append(max(1, round(rows)))

        self.seed = seed
        self.length = sum(self.counts)                    # rows per epoch
        self.latest = (-1, None)                          # an epoch's number and its clips

    def epoch(self, e):
        """Clip numbers of epoch e, (length,)."""
        clips = []
        positions = []
        for k, (members, count) in enumerate(zip(self.members, self.counts)):
            # the shuffled cycles of this kind that the epoch touches, end to end
            n = len(members)
            first = e * count // n
            last = ((e + 1) * count - 1) // n
            walk = np.concatenate([rng("cycle", self.seed, k, c).permutation(members)
                                   for c in range(first, last + 1)])
            clips.append(walk[e * count - first * n:][:count])

            # each clip at a random position within its slot of the epoch
            jitter = rng("slot", self.seed, k, e).random(count)
            positions.append((np.arange(count) + jitter) / count)
        return np.concatenate(clips)[np.argsort(np.concatenate(positions), kind="stable")]

    def index(self, row):
        """The number of the clip in a row of the run."""
        e, i = divmod(row, self.length)
        latest = self.latest                              # read once: other threads replace it
        if latest[0] != e:
            latest = (e, self.epoch(e))
            self.latest = latest
        return int(latest[1][i])


def global_rows(step, rows, batch):
    """Rows of a step's global batch -> their numbers in the run."""
    return [step * batch + r for r in rows]


# ---------------------------------------------------------------------------- VAE batches

class AudioBatches:
    """(step, rows) -> {"audio": float32 (b, channels, S)}, S = crop_seconds, a multiple of hop.

    `batch` is the size of the global batch; `rows`, a range, selects rows of it. A row is a random
    crop of its clip; a shorter clip is zero-padded at the end. The gain is uniform in +- gain_db,
    and lower where the peak would exceed 1.

    A corpus that fits into ram_gb, or whose durations the manifest lacks, is decoded clip by clip
    and kept; of a larger one every row reads its crop only.
    Errors: BadInput naming an unreadable file.
    """

    def __init__(self, clips, cfg, sample_rate, channels, batch, hop=1):
        self.clips = columns(clips)
        self.cfg = cfg
        self.sample_rate = sample_rate
        self.channels = channels
        self.batch = batch
        self.S = math.ceil(round(cfg.crop_seconds * sample_rate) / hop) * hop
        self.order = Order(self.clips.column("kind"), cfg.weights, cfg.seed)

        self.decoded = {}                                 # clip number -> int16 (channels, samples)
        self.bytes_left = cfg.ram_gb * 1e9
        needed = 2 * channels * sample_rate * self.clips.column("duration").sum()
        self.crops_only = needed > self.bytes_left        # false for NaN
        self.pool = ThreadPoolExecutor(cfg.workers, "decode")

    def __call__(self, step, rows):
        results = list(self.pool.map(self.row, global_rows(step, rows, self.batch)))

        # keep decoded clips while there is room
        for _, i, pcm in results:
            if pcm is not None and i not in self.decoded and pcm.nbytes <= self.bytes_left:
                self.decoded[i] = pcm
                self.bytes_left -= pcm.nbytes
        return {"audio": torch.from_numpy(np.stack([crop for crop, _, _ in results]))}

    @property
    def seen(self):
        """What the rows hold, for the checkpoint: kinds."""
        return {"kinds": kinds_seen(self.clips, self.cfg.weights)}

    def row(self, number):
        """One row of the run -> (crop float32 (channels, S), clip number, its int16 or None)."""
        i = self.order.index(number)
        g = rng("crop", self.cfg.seed, number)
        position = g.random()                             # of the crop in the clip, 0..1
        gain = 10 ** (g.uniform(-self.cfg.gain_db, self.cfg.gain_db) / 20)

        # a long file or a large corpus: read the crop only
        path = self.clips.path(i)
        pcm = self.decoded.get(i)
        if pcm is None:
            seconds = seconds_in_file(path)
            if self.crops_only or seconds > WHOLE_FILE_SECONDS:
                crop_seconds = self.S / self.sample_rate
                start = position * max(0, seconds - crop_seconds)
                crop = load_audio(path, self.sample_rate, self.channels, start=start,
                                  seconds=crop_seconds, allow_silence=True)
            else:
                wav = load_audio(path, self.sample_rate, self.channels, allow_silence=True)
                pcm = np.rint(wav * 32767).astype(np.int16)

        # else cut it from the whole clip: the same samples whether kept or just read
        if pcm is not None:
            start = int(position * max(1, pcm.shape[1] - self.S + 1))
            crop = pcm[:, start:start + self.S].astype(np.float32) / 32767

        crop = crop * min(gain, 1 / max(np.abs(crop).max(), 1e-4))
        return np.pad(crop, ((0, 0), (0, self.S - crop.shape[1]))).astype(np.float32), i, pcm
