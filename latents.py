"""The latents of every clip, encoded once by a trained VAE and read by memory map ever after.

    [Clip] ─► load_audio ─► encode(wav) ─► out/RUN/latents/KEY/shard_00000.npy ─► data.LatentBatches

Latents are stored as the posterior's mean and log-variance, so that training can draw a fresh
sample each time; an RVQ's as its codes.
Precision: float16 (int16 for codes) on disk.
"""
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import fields, is_dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from cli import BadInput, atomic
from data import Prefetch, load_audio, seconds_of


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
