"""The latents of every clip, encoded once by a trained VAE, and batches of them for the models.

    [Clip] ── load_audio ──> encode(wav) ──> LatentCache on disk ──> LatentBatches(step, rows)

    out/RUN/latents/
      KEY/                    16 hex digits: one VAE (weights, [vae], precision), one list of files
        index.json            {"names": files_digest, "n": clips, "dim": D, "levels": 0 or K,
                               "shards": [{"clips": [7, 2, ...], "frames": [63, 61, ...],
                                           "crc32": of the shard's file}, ...],
                               "crc32": of the index without this key}
        shard_00000.npy       (sum of T, 2D) float16   [mean | log-variance]
          clip 7  f f f f f   one clip after the other, in the order of the index
          clip 2  f f f f
        shard_00001.npy       ...

    a row:  text   [KIND h e l l o PAD PAD]      (B, 1 + text_len)       bytes and one special
            prompt [p p p p 0 0]                 (B, prompt_frames, 2D)  same voice, other frames
            x      [f f f f f f f f 0 0]         (B, frames, 2D)         "ended": has the clip's end

A shard or index that is damaged is encoded again, which is said (shards.py, encoding.py). Shards
are opened when a clip of theirs is wanted, at most 64 at a time, and may lie at an address
(remote.py). With an RVQ of K levels the cache holds its codes instead, (sum of T, K) int16. Batches
are a pure function of (seed, step, rows), as those of data.py.

Paper: CALM (arXiv 2509.06926), voice-prompt prefix. Where this differs: latents are cached as the
posterior's mean and log-variance, so that training can sample them anew at every step.
Precision: float16 (int16 for codes) on disk, float32 (int64 for codes) in a batch.
"""
import hashlib
import math
from dataclasses import fields, is_dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch

from cli import BadInput
from data import (KINDS, Order, encode_text, fits, global_rows, kinds_seen, pad_id, rng,
                  texts_tokens)
from encoding import Job
from manifest import columns, with_other_file
from monologue import WordTokens, late_words, word_stream
from remote import is_remote
from shards import check_size, open_shard, read_index, shard_file

# shards that are open at a time: 100,000 hours have 200,000, and Linux allows 65,530 maps
OPEN_SHARDS = 64


# ---------------------------------------------------------------------------- the cache on disk

class ListOf:
    """A list for digest of n items that are made one by one."""

    def __init__(self, n, items):
        self.n = n
        self.items = items


def digest(*values):
    """16 hex digits that name the values: tensors, state dicts, dataclasses, lists, scalars."""
    h = hashlib.sha256()

    def add(x):
        # scalars first: there are most of them
        if x is None or isinstance(x, (str, bytes, bool, int, float)):
            h.update(f"{type(x).__name__}\0{x!r}\0".encode())
        elif torch.is_tensor(x):
            h.update(type(x).__name__.encode() + b"\0")
            x = x.detach().cpu().contiguous()
            h.update(f"{x.dtype}{tuple(x.shape)}".encode())
            h.update(x.flatten().view(torch.uint8).numpy())

        # containers: name and value of each item
        elif isinstance(x, dict):
            h.update(type(x).__name__.encode() + b"\0")
            for key in sorted(x):
                add(key)
                add(x[key])
        elif is_dataclass(x):
            h.update(type(x).__name__.encode() + b"\0")
            for f in fields(x):
                add(f.name)
                add(getattr(x, f.name))

        # lists: their length, then each item
        elif isinstance(x, ListOf):
            h.update(f"list\0{x.n}".encode())
            for item in x.items:
                add(item)
        elif isinstance(x, (list, tuple)):
            h.update(f"{type(x).__name__}\0{len(x)}".encode())
            for item in x:
                add(item)
        else:
            raise TypeError(f"digest: cannot name a {type(x).__name__}")

    add(values)
    return h.hexdigest()[:16]


class LatentCache:
    """The latents of every clip of a manifest, read by memory map.

    len(cache)           number of clips
    cache.frames[i]      T of clip i
    cache.get(i)         np.memmap (T, 2D) float16, [mean | log-variance], or codes (T, K) int16
    cache.dim            D
    cache.levels         K, 0 for latents
    cache.path           its folder
    """

    def __init__(self, path):
        """Open a complete cache, folder/key. Errors: BadInput when it is missing, unfinished or
        damaged.
        """
        self.path = path if is_remote(path) else Path(path)
        try:
            index = read_index(path)
        except ValueError as e:
            raise BadInput(f"{path}/index.json: damaged ({e}); train.py encodes it again") from None
        if index is None or sum(len(s["clips"]) for s in index["shards"]) < index["n"]:
            raise BadInput(f"{path}: the latent cache is unfinished; build it first")
        self.dim = index["dim"]
        self.levels = index.get("levels", 0)

        # per clip: its frames, its shard, and its first frame there
        self.frames = np.zeros(index["n"], np.int64)
        self.shard_of = np.zeros(index["n"], np.int32)
        self.first_frame = np.zeros(index["n"], np.int32)
        self.rows = []
        for k, shard in enumerate(index["shards"]):
            clips = shard["clips"]
            frames = shard["frames"]
            self.frames[clips] = frames
            self.shard_of[clips] = k
            self.first_frame[clips] = np.cumsum(frames) - frames
            self.rows.append(int(frames.sum()))
            self.whole(k, check_size)
        self.shard = lru_cache(OPEN_SHARDS)(lambda k: self.whole(k, open_shard))

    def __len__(self):
        return len(self.frames)

    def whole(self, k, look):
        """look(path, dim, levels, k, rows), of shards.py. Errors: BadInput for a damaged shard."""
        try:
            return look(self.path, self.dim, self.levels, k, self.rows[k])
        except ValueError as e:
            raise BadInput(f"{shard_file(self.path, k)}: damaged ({e}); "
                           "train.py encodes it again") from None

    def get(self, i):
        """Clip i as np.memmap: latents float16 (T, 2D) or codes int16 (T, K)."""
        first = self.first_frame[i]
        return self.shard(int(self.shard_of[i]))[first:first + self.frames[i]]

    @classmethod
    def build(cls, clips, encode, *, folder, key, sample_rate, channels, hop, dim,
              levels=0, batch_seconds=60.0, shard_seconds=1800.0, workers=4, show=True,
              rank=0, world=1, wait=lambda: None):
        """Encode every clip once -> LatentCache. After an interruption it continues.

        encode(audio): float32 (B, channels, S), S a multiple of hop -> (B, S / hop, 2D),
        [mean | log-var]; with levels = K > 0 codes instead, (B, S / hop, K), below 2^15.
        A clip longer than batch_seconds is read and encoded in pieces of that length, with
        encode(audio, state), state as for VAE.encode: memory does not grow with its length.

        rank of world processes call this with the same arguments; each encodes its share, and
        wait() returns when all have called it (encoding.py).

        key names the encoder and the list of files (see digest). Files that have changed since
        (size or time) and a damaged index start the cache over, which is said; a damaged shard is
        encoded again, to the same latents. Every shard that is written is kept.
        Errors: BadInput naming an unreadable file, ValueError when the latents have another shape
        than dim says or are not finite in float16.
        """
        clips = columns(clips)
        path = Path(folder) / key
        names = digest(state_of_files(clips), sample_rate, channels, hop, dim, levels)
        Job(path, clips, encode, names, sample_rate=sample_rate, channels=channels, hop=hop,
            dim=dim, levels=levels, batch_seconds=batch_seconds, shard_seconds=shard_seconds,
            workers=workers, show=show, rank=rank, world=world, wait=wait).run()
        return cls(path)


def state_of_files(clips):
    """[[path, size, time of the last change in ns], ...] for digest: what tells that an audio file
    is new. Errors: BadInput where one is missing.
    """
    for i in np.flatnonzero(clips.column("bytes") < 0):
        if not is_remote(clips.path(i)):
            raise BadInput(f"{clips.path(i)}: no such audio file; correct the path")
    states = zip(clips.paths(), clips.column("bytes"), clips.column("changed"))
    return ListOf(len(clips), ([path, int(size), int(changed)] for path, size, changed in states))


# ---------------------------------------------------------------------------- batches

class LatentBatches:
    """(step, rows) -> dict of tensors, b rows, padded with zeros (text, words: PAD):

        x           (b, frames, 2D)         float32, [mean | log-variance]; codes: K, int64
        frames      (b,)                    int64, valid frames of x
        ended       (b,)                    bool, the row holds the clip's last frame
        text        (b, 1 + text_len)       int64, [kind, ids...]
        text_len    (b,)                    int64, valid tokens of text
        kind        (b,)                    int64, number in KINDS
        counts      a list                  rows of each of KINDS
        prompt      (b, prompt_frames, 2D)  as x
        prompt_len  (b,)                    int64, valid frames of prompt
        words       (b, frames, n)          int64, tokens beside the frames (monologue.py)
        aligned     (b,)                    bool, words holds the text, and text is only [kind]

    words is for the inner monologue of calm.py: n is monologue, the tokens per frame (0 without
    one; words is then empty), frame_rate the frames per second of the latents; aligned are the
    clips whose manifest has words. late_words: monologue.late_words of the clips.

    Rows of a clip longer than `frames` begin anywhere, evenly; speech with text begins at 0 with
    probability beginning_prob. Speech that begins later has no text, since the text is not aligned,
    and neither has speech whose text exceeds text_len. Captions describe any part of their clip:
    they stay, cut at a whole character.

    Voice prompt, for a share prompt_prob of the speech rows: n frames, n uniform in
    prompt_frames / 2 .. prompt_frames, from another clip of the speaker; else from the same clip
    outside the row; else none.
    """

    def __init__(self, clips, cache, cfg, batch, dim, frame_rate=0.0, monologue=0):
        if cache.dim != dim or len(cache) != len(clips):
            raise ValueError(f"the cache has {len(cache)} clips of {cache.dim} channels, not "
                             f"{len(clips)} of {dim}; build it for these clips")
        self.clips = clips = columns(clips)
        self.cache = cache
        self.cfg = cfg
        self.batch = batch
        self.frame_rate = frame_rate
        self.monologue = monologue
        self.word_tokens = WordTokens(cfg)
        self.late_words = ""
        if monologue:
            self.late_words = late_words(clips, frame_rate, monologue, self.word_tokens)
        self.width = cache.levels or 2 * dim
        self.dtype = np.int64 if cache.levels else np.float32
        self.order = Order(clips.column("kind"), cfg.weights, cfg.seed)

        # clips of which the beginning is needed more than the rest: speech with its text
        self.is_speech = clips.column("kind") == KINDS.index("speech")
        readable = texts_tokens(clips, cfg) <= cfg.text_len
        if monologue:
            readable |= clips.column("has_words")
        self.needs_beginning = self.is_speech & clips.column("has_text") & readable

        # clips that are long enough for a prompt, sorted by speaker; those of speaker s stand at
        # voices_of[s] .. voices_of[s + 1]
        self.prompt_min = math.ceil(cfg.prompt_frames / 2)
        self.gives_prompt = self.is_speech & (cache.frames >= self.prompt_min)
        self.speakers = clips.column("speaker")
        givers = np.flatnonzero(self.gives_prompt & (self.speakers > 0))
        self.voices = givers[np.argsort(self.speakers[givers], kind="stable")]
        self.voices_of = np.searchsorted(self.speakers[self.voices],
                                         np.arange(len(clips.table.speakers) + 1))

    def __call__(self, step, rows):
        made = [self.row(number) for number in global_rows(step, rows, self.batch)]
        batch = {name: torch.stack([row[name] for row in made]) for name in made[0]}
        counts = torch.bincount(batch["kind"], minlength=len(KINDS)).tolist()
        return batch | {"counts": counts}

    @cached_property
    def seen(self):
        """What the rows hold, for the checkpoint: kinds, whether some have a voice prompt, and the
        characters of the texts of each kind.
        """
        cfg = self.cfg
        other = with_other_file(self.clips, self.gives_prompt)
        rest = self.cache.frames - cfg.frames >= self.prompt_min
        has_source = bool((self.is_speech & (other | rest)).any())
        prompts = cfg.prompt_frames > 0 and cfg.prompt_prob > 0 and has_source
        kinds = kinds_seen(self.clips, cfg.weights)
        letters = self.clips.table.letters
        return {"kinds": kinds, "voice_prompts": prompts,
                "letters": {kind: "".join(sorted(letters[kind])) for kind in kinds}}

    def row(self, number):
        """One row of the run -> dict of tensors, as above without the batch axis."""
        cfg = self.cfg
        i = self.order.index(number)
        g = rng("row", cfg.seed, number)
        clip = self.clips[i]
        latents = self.cache.get(i)                                         # (T, 2D or K)

        # the window [start, end) of the clip
        T = len(latents)
        n = min(T, cfg.frames)
        start = self.first_frame(i, T - n, g)
        end = start + n

        # text: before the frames, or beside them where the words are aligned
        ids = self.tokens(clip, start)
        words = np.zeros((0, self.monologue))
        aligned = self.is_aligned(clip)
        if aligned:
            ids = ids[:1]
            words = word_stream(clip.words, T, self.frame_rate, self.monologue,
                                self.word_tokens)[start:end]

        prompt = self.prompt(i, start, end, g)
        return {"x": padded(latents[start:end], cfg.frames, self.dtype),
                "text": padded(ids, 1 + cfg.text_len, np.int64, pad_id(cfg)),
                "words": padded(words, cfg.frames, np.int64, self.word_tokens.pad),
                "prompt": padded(prompt, cfg.prompt_frames, self.dtype),
                "frames": torch.tensor(n),
                "ended": torch.tensor(end == T),
                "text_len": torch.tensor(len(ids)),
                "kind": torch.tensor(KINDS.index(clip.kind)),
                "prompt_len": torch.tensor(len(prompt)),
                "aligned": torch.tensor(aligned)}

    def is_aligned(self, clip):
        """Whether the text of a clip lies beside its frames."""
        return bool(self.monologue and clip.words)

    def first_frame(self, i, spare, g):
        """The first frame of a row of clip i, which may be 0 .. spare."""
        late = g.random() >= self.cfg.beginning_prob
        position = g.random()
        if not self.needs_beginning[i]:
            return int(position * (spare + 1))
        return 1 + int(position * spare) if late and spare > 0 else 0

    def clips_cut(self):
        """A sentence that counts the clips of speech whose end is never seen with their text, or
        None.
        """
        frames = self.cache.frames[np.flatnonzero(self.needs_beginning)]
        longer = int((frames > self.cfg.frames).sum())
        if longer == 0:
            return None
        enough = int(np.quantile(frames, 0.99, method="higher"))
        return (f"frames: {longer:,} of {len(frames):,} clips of speech with text are longer than "
                f"data.frames = {self.cfg.frames}, and their ends are never seen with their text; "
                f"{enough} holds 99 %")

    def tokens(self, clip, start):
        """The ids of a clip's text for a row that starts at frame `start`; at most 1 + text_len."""
        specials = int(self.cfg.kind_token)
        longest = specials + self.cfg.text_len
        ids = encode_text(clip.text, clip.kind, self.cfg)
        if clip.kind == "speech":
            return ids if start == 0 and fits(clip.text, clip.kind, self.cfg) else ids[:specials]

        # a caption: cut, without the half of a character
        ids = ids[:longest]
        if self.cfg.tokenizer:
            return ids
        text = bytes(ids[specials:]).decode("utf-8", "ignore")
        return [*ids[:specials], *text.encode("utf-8")]

    def prompt(self, i, start, end, g):
        """The voice prompt for the row [start, end) of clip i -> (n, 2D or K), n may be 0."""
        longest = self.cfg.prompt_frames

        # four random numbers for every row, with a prompt or without
        chance = g.random()
        n = int(g.integers(self.prompt_min, longest + 1))
        choice = g.random()
        position = g.random()

        source = None
        if self.is_speech[i] and longest > 0 and chance < self.cfg.prompt_prob:
            source = self.prompt_source(i, start, end, choice)
        if source is None:
            return np.zeros((0, self.width), self.dtype)
        n = min(n, len(source))
        first = int(position * (len(source) - n + 1))
        return source[first:first + n]

    def prompt_source(self, i, start, end, choice):
        """Latents with the voice of clip i but none of its frames [start, end), or None.

        choice: a random number in 0..1.
        """
        # another recording of the speaker: the first, from a random place in the list on
        speaker = self.speakers[i]
        same = self.voices[self.voices_of[speaker]:self.voices_of[speaker + 1]]
        first = int(choice * len(same))
        for k in range(len(same)):
            j = same[(first + k) % len(same)]
            if self.clips.path(j) != self.clips.path(i):
                return self.cache.get(j)

        # else the frames of the clip before or after the row
        latents = self.cache.get(i)
        sides = [s for s in (latents[:start], latents[end:]) if len(s) >= self.prompt_min]
        return sides[int(choice * len(sides))] if sides else None


def padded(values, length, dtype, value=0):
    """values (n, ...) as a tensor (length, ...), with `value` behind the first n."""
    values = np.asarray(values, dtype)
    out = np.full((length, *values.shape[1:]), value, dtype)
    out[:len(values)] = values
    return torch.from_numpy(out)
