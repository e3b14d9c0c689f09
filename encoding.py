"""All clips of a corpus, encoded once by all processes of a training.

    lengths of the files ─► plan: shards of batches of clips, the same in every process
                              │
        process 0: shards 0, 2, 4, ...        process 1: shards 1, 3, 5, ...
          shard_00000.npy, .json                shard_00001.npy, .json          one after the other
                              │
        process 0, at the end: index.json of all, the .json of the single shards go (shards.py)

The plan depends on the lengths of the audio files only, so that a shard holds the same bytes
whoever makes it, and whatever was killed before: a shard whose .json is there is kept. A shard is
verified by the process whose number it has, and made again where it is damaged.

Memory does not grow with the corpus or with the length of a clip: a clip longer than batch_seconds
is read and encoded in pieces of that length. What the processes tell each other stands in files;
they meet four times (wait) and never inside the work.
"""
import math
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from audio import audio_pieces, load_audio
from cli import BadInput, atomic, write_file
from decoder import seconds_in_file
from prefetch import Prefetch
from shards import (damaged_shards, index_of_files, read_parts, remove_parts, write_index,
                    write_shard)


class Job:
    """What is to be encoded, how, and which of several processes this one is.

    clips: Clips; encode: see LatentCache.build; names: the digest of the files; wait(): until all
    processes are here.
    """

    def __init__(self, path, clips, encode, names, *, sample_rate, channels, hop, dim, levels,
                 batch_seconds, shard_seconds, workers, show, rank, world, wait):
        self.path = Path(path)
        self.clips = clips
        self.encode = encode
        self.names = names
        self.sample_rate = sample_rate
        self.channels = channels
        self.hop = hop
        self.dim = dim
        self.levels = levels
        self.batch_seconds = batch_seconds
        self.shard_seconds = shard_seconds
        self.workers = workers
        self.show = show
        self.rank = rank
        self.world = world
        self.wait = wait

    def mine(self, k):
        """Whether shard k is this process's."""
        return k % self.world == self.rank

    def run(self):
        """Encode what is missing; at the end the folder has its index. Errors: see build."""
        # what is there: a whole cache, shards of an unfinished one, or nothing
        index = index_of_files(self.path, self.names, self.show and self.rank == 0)
        if index is None:
            index = {"names": self.names, "n": len(self.clips), "dim": self.dim,
                     "levels": self.levels, "shards": []}
        finished = dict(enumerate(index["shards"])) | read_parts(self.path, self.names)
        tell_progress(self.path, self.rank, 0.0)
        self.wait()

        # this process's share: shards that are missing, or damaged
        todo, finished = self.missing_shards(finished)
        seconds = sum(batch.seconds for shard in todo.values() for batch in shard)
        own = {k: shard for k, shard in todo.items() if self.mine(k)}
        mine = {k: shard for k, shard in finished.items() if self.mine(k)}
        for k in damaged_shards(self.path, index, mine, self.clips, self.show):
            own[k] = self.shard_again(mine[k])
            seconds += sum(batch.seconds for batch in own[k])
        self.encode_shards(own, seconds)
        self.wait()

        # one index
        if self.rank == 0:
            parts = read_parts(self.path, self.names)
            if parts:
                self.write_index(index, finished | parts)
            remove_parts(self.path)
        self.wait()

    def missing_shards(self, finished):
        """{number: its batches} of the shards that lack, and the finished ones that are kept."""
        if sum(len(shard["clips"]) for shard in finished.values()) == len(self.clips) \
                and sorted(finished) == [*range(len(finished))]:
            return {}, finished
        seconds = self.lengths()
        plan = Plan(seconds, np.arange(len(seconds)), self.batch_seconds, self.shard_seconds)
        if all(k < len(plan) and np.array_equal(plan.clips(k), shard["clips"])
               for k, shard in finished.items()):
            return {k: plan.shard(k) for k in range(len(plan)) if k not in finished}, finished

        # made by another plan: those from the first on are kept, the others are planned anew
        kept = {}
        while len(kept) in finished:
            kept[len(kept)] = finished[len(kept)]
        rest = np.ones(len(seconds), bool)
        for shard in kept.values():
            rest[shard["clips"]] = False
        plan = Plan(seconds, np.flatnonzero(rest), self.batch_seconds, self.shard_seconds)
        return {len(kept) + k: plan.shard(k) for k in range(len(plan))}, kept

    def shard_again(self, shard):
        """The batches of a finished shard."""
        clips = np.asarray(shard["clips"])
        seconds = np.zeros(len(self.clips))
        seconds[clips] = [seconds_in_file(self.clips.path(i)) for i in clips]
        return Plan(seconds, clips, self.batch_seconds, math.inf).shard(0)

    def lengths(self):
        """The seconds of all audio files (n,), each measured by one process, whatever the manifest
        says.
        """
        def file_of(rank):
            return self.path / f"seconds_{self.names}_{rank}_of_{self.world}.npy"

        if not file_of(self.rank).exists():
            with atomic(file_of(self.rank), sync=False) as temp, open(temp, "wb") as out:
                np.save(out, self.own_lengths())
        self.wait()
        seconds = np.zeros(len(self.clips))
        for rank in range(self.world):
            seconds[rank::self.world] = np.load(file_of(rank))
        return seconds

    def own_lengths(self):
        """The seconds of every world-th file, from number `rank` on."""
        own = range(self.rank, len(self.clips), self.world)
        lengths = []
        bar = tqdm(total=len(own), desc="lengths", unit=" files", delay=5,
                   disable=not self.show or self.rank > 0)
        with bar, ThreadPoolExecutor(self.workers) as pool:
            for first in range(0, len(own), 1000):
                paths = [self.clips.path(i) for i in own[first:first + 1000]]
                lengths += pool.map(seconds_in_file, paths)
                bar.update(len(paths))
        return np.array(lengths)

    def encode_shards(self, shards, total):
        """Encode and write {number: its batches}. total: seconds of all processes."""
        batches = [batch for shard in shards.values() for batch in shard]
        pool = ThreadPoolExecutor(self.workers)
        bar = tqdm(total=round(total), desc="latents", unit=" s of audio",
                   disable=not self.show or self.rank > 0 or total == 0)
        done = 0.0
        told = time.monotonic()

        # a thread loads the next batches
        loaded = Prefetch(lambda b: self.load(batches[b], pool), 0, stop=len(batches))
        with bar, pool, closing(loaded):
            for k, shard in shards.items():
                latents = []
                for batch in shard:
                    paths = [self.clips.path(i) for i in batch.clips]
                    latents += encode_batch(self.encode, next(loaded), self.hop, self.dim,
                                            self.levels, paths)

                    # once a second: what all processes have done
                    done += batch.seconds
                    if time.monotonic() > told + 1 or batch is batches[-1]:
                        told = time.monotonic()
                        tell_progress(self.path, self.rank, done)
                        if not bar.disable:
                            bar.update(round(progress(self.path, self.world)) - bar.n)
                clips = [i for batch in shard for i in batch.clips.tolist()]
                write_shard(self.path, self.names, k, clips, latents)

    def load(self, batch, pool):
        """Read the audio of a batch: the pieces for encode_batch."""
        paths = [self.clips.path(i) for i in batch.clips]
        if batch.longest > self.batch_seconds:
            piece = max(1, round(self.batch_seconds * self.sample_rate / self.hop)) * self.hop
            return load_long_clip(paths[0], self.sample_rate, self.channels, self.hop, piece)
        return load_batch(paths, pool, self.sample_rate, self.channels, self.hop)

    def write_index(self, index, shards):
        """The index of all shards {number: shard}."""
        numbers = np.concatenate([shard["clips"] for shard in shards.values()])
        if sorted(shards) != [*range(len(shards))] \
                or len(numbers) != len(self.clips) or len(np.unique(numbers)) != len(numbers):
            raise BadInput(f"{self.path}: some shards are missing or of other audio files, which "
                           "changed meanwhile; the same command goes on from there")
        write_index(self.path, index | {"shards": [shards[k] for k in range(len(shards))]})


# ---------------------------------------------------------------------------- the plan

class Batch:
    """Clips that are encoded together: their numbers, seconds in all, seconds of the longest."""

    def __init__(self, clips, seconds):
        self.clips = clips
        self.seconds = float(seconds.sum())
        self.longest = float(seconds[0])


class Plan:
    """Shards of batches of the clips `numbers`; seconds (n,): of every clip.

    Clips of similar length share a batch of about batch_seconds of audio, longest first; a clip
    that is longer than that is a batch by itself. A shard is complete when its batches hold
    shard_seconds.
    """

    def __init__(self, seconds, numbers, batch_seconds, shard_seconds):
        self.order = numbers[np.lexsort((numbers, -seconds[numbers]))]
        self.seconds = seconds

        # the first clip of every batch, and the first batch of every shard
        sorted_seconds = seconds[self.order]
        self.batches = []
        self.shards = []
        length = math.inf                    # no shard is open: the first batch opens one
        first = 0
        while first < len(self.order):
            if length >= shard_seconds:
                self.shards.append(len(self.batches))
                length = 0.0
            end = first + max(1, int(batch_seconds / sorted_seconds[first] + 1e-9))
            self.batches.append(first)
            length += float(sorted_seconds[first:end].sum())
            first = end
        self.batches.append(len(self.order))
        self.shards.append(len(self.batches) - 1)

    def __len__(self):
        return len(self.shards) - 1

    def clips(self, k):
        """The numbers of the clips of shard k, in its order."""
        return self.order[self.batches[self.shards[k]]:self.batches[self.shards[k + 1]]]

    def shard(self, k):
        """The batches of shard k."""
        starts = self.batches[self.shards[k]:self.shards[k + 1] + 1]
        members = [self.order[first:end] for first, end in zip(starts, starts[1:])]
        return [Batch(clips, self.seconds[clips]) for clips in members]


# ---------------------------------------------------------------------------- one batch

def load_batch(paths, pool, sample_rate, channels, hop):
    """Read files in the threads of pool -> [(audio (B, channels, S), frames per clip, None)].

    Clips are padded with zeros at the end; S is a multiple of hop; frames = ceil(samples / hop).
    """
    wavs = list(pool.map(lambda path: load_audio(path, sample_rate, channels,
                                                 allow_silence=True), paths))
    frames = [math.ceil(wav.shape[1] / hop) for wav in wavs]
    S = max(frames) * hop
    audio = np.stack([np.pad(wav, ((0, 0), (0, S - wav.shape[1]))) for wav in wavs])
    return [(torch.from_numpy(audio), frames, None)]


def load_long_clip(path, sample_rate, channels, hop, piece):
    """Yield one clip in pieces of `piece` samples, as load_batch's (audio, frames, state)."""
    state = {}
    for wav in audio_pieces(path, sample_rate, channels, piece):
        frames = math.ceil(wav.shape[1] / hop)
        wav = np.pad(wav, ((0, 0), (0, frames * hop - wav.shape[1])))
        yield torch.from_numpy(wav)[None], [frames], state


def encode_batch(encode, pieces, hop, dim, levels, paths):
    """Encode the pieces of B clips -> B arrays (frames, 2D) float16, or (frames, K) int16.

    pieces: of load_batch or load_long_clip. paths: of the audio files, for the error message.
    Errors: ValueError, see LatentCache.build.
    """
    parts = []
    for audio, frames, state in pieces:
        latents = encode(audio) if state is None else encode(audio, state)
        latents = latents.detach().cpu()                                    # (B, T, 2D or K)
        width = levels or 2 * dim
        if latents.shape != (len(frames), audio.shape[-1] // hop, width):
            raise ValueError(f"encode gave {tuple(latents.shape)} for {tuple(audio.shape)},"
                             f" not (B, S / {hop}, {width})")
        if levels and latents.max() >= 1 << 15:
            raise ValueError("encode: codes do not fit into int16")
        latents = latents.short() if levels else latents.half()
        parts.append([x[:T].numpy() for x, T in zip(latents, frames)])

    arrays = [np.concatenate(clip_parts) for clip_parts in zip(*parts)]
    for path, array in zip(paths, arrays):
        if not np.isfinite(array).all():
            raise ValueError(f"encode: latents of {path} are not finite")
    return arrays


# ---------------------------------------------------------------------------- progress

def tell_progress(path, rank, seconds):
    """Leave word of the seconds that a process has encoded."""
    write_file(path / f"progress_{rank}", f"{seconds:.3f}", sync=False)


def progress(path, world):
    """The seconds that all processes have encoded."""
    return sum(float((path / f"progress_{rank}").read_text()) for rank in range(world))


if __name__ == "__main__":
    print("encoding.py is a library, used by latents.py")
