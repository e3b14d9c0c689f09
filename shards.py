"""The files of a cache of latents: each is written with a checksum and verified when it is opened.

    KEY/index.json       {"names", "n", "dim", "levels", "shards": [{"clips", "frames", "crc32"},
                          ...], "crc32": of the index without this key}
    KEY/shard_00000.npy  one clip after the other (latents.py has the picture)

    damaged_shards ─► form, checksum and finite numbers of every shard, read once per process
                      (1.4 s per GB) ─► LatentCache.build encodes those that fail again

An index from before 2026-11-28 has no checksums: its shards are checked for form and finite
numbers.
"""
import json
import os
import zlib
from functools import cache
from pathlib import Path

import numpy as np

from cli import BadInput, atomic


def write_shard(path, index, k, clips, latents):
    """Write the latents of clips (numbers) as shard k, then the index that names it."""
    with atomic(shard_file(path, k)) as temp:
        with open(temp, "wb") as out:
            np.save(out, np.concatenate(latents))
        crc = crc_of(temp)
    shard = {"clips": clips, "frames": [len(x) for x in latents], "crc32": crc}
    index["shards"][k:k + 1] = [shard]
    with atomic(path / "index.json") as temp:
        Path(temp).write_text(json.dumps(index | {"crc32": crc_of_index(index)}))


def shard_file(path, k):
    """The file of shard k."""
    return Path(path) / f"shard_{k:05d}.npy"


def crc_of(file):
    """CRC-32 of a file, read in pieces of 16 MB."""
    crc = 0
    with open(file, "rb") as data:
        while piece := data.read(1 << 24):
            crc = zlib.crc32(piece, crc)
    return crc


def crc_of_index(index):
    """CRC-32 of an index without its own."""
    rest = {name: value for name, value in index.items() if name != "crc32"}
    return zlib.crc32(json.dumps(rest).encode())


def read_index(path):
    """The index of a cache folder, or None where there is none.

    Errors: ValueError saying what is wrong with it, BadInput where it cannot be read.
    """
    file = Path(path) / "index.json"
    try:
        index = json.loads(file.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as e:
        raise BadInput(f"{file}: cannot be read ({e.strerror}); correct that first") from None
    except (ValueError, RecursionError):
        raise ValueError("not JSON") from None
    if not is_index(index):
        raise ValueError("not an index")
    if "crc32" in index and index["crc32"] != crc_of_index(index):
        raise ValueError("its checksum is another")
    return index


def is_index(index):
    """Whether a value from JSON has the form of an index: whole numbers, every clip once."""
    if not isinstance(index, dict) or not isinstance(index.get("names"), str) \
            or not isinstance(index.get("shards"), list):
        return False
    sizes = [index.get("n"), index.get("dim"), index.get("levels", 0)]
    if not all(type(size) is int and size >= 0 for size in sizes):
        return False

    seen = set()
    for shard in index["shards"]:
        lists = [shard.get(name) if isinstance(shard, dict) else None
                 for name in ("clips", "frames")]
        if not all(isinstance(numbers, list) and numbers for numbers in lists):
            return False
        clips, frames = lists
        if not all(type(number) is int for number in clips + frames):
            return False
        if len(clips) != len(frames) or min(frames) < 0 or min(clips) < 0:
            return False
        if max(clips) >= index["n"] or len(set(clips)) < len(clips) or seen & set(clips):
            return False
        seen |= set(clips)
    return True


def index_of_files(path, files_digest, show):
    """The index of a cache of these files, or None, said where another one is given up."""
    try:
        index = read_index(path)
    except ValueError as e:
        why = f"{path}/index.json is damaged ({e})"
    else:
        if index is None or index["names"] == files_digest:
            return index
        why = f"audio files have changed since {path} was encoded"
    if show:
        print(f"latents: {why}; encoding again")
    return None


def open_shard(path, index, k):
    """Shard k by memory map. Errors: ValueError where its file is not as the index says, BadInput
    where it cannot be read."""
    file = shard_file(path, k)
    try:
        shard = np.load(file, mmap_mode="r")
    except FileNotFoundError:
        raise ValueError("it is missing") from None
    except OSError as e:
        raise BadInput(f"{file}: cannot be read ({e.strerror}); correct that first") from None
    except MemoryError:
        raise
    except Exception as e:                       # whatever numpy raises at a header's text
        raise ValueError(f"no array: {type(e).__name__}") from None

    width = index.get("levels", 0) or 2 * index["dim"]
    dtype = np.int16 if index.get("levels", 0) else np.float16
    if shard.shape != (sum(index["shards"][k]["frames"]), width) or shard.dtype != dtype:
        raise ValueError(f"it holds {shard.dtype} {shard.shape}")
    return shard


def damaged_shards(path, index, clips, show):
    """The numbers of the shards whose files are not what was written, each said in a line."""
    damaged = []
    for k, shard in enumerate(index["shards"]):
        file = shard_file(path, k)
        try:
            open_shard(path, index, k)
            status = os.stat(file)
            row = row_not_finite(file, shard.get("crc32"), status.st_size, status.st_mtime_ns)
            if row >= 0:
                member = int(np.searchsorted(np.cumsum(shard["frames"]), row, side="right"))
                raise ValueError(f"{clips[shard['clips'][member]].audio} is not finite in it")
        except ValueError as e:
            damaged.append(k)
            if show:
                print(f"latents: {file} is damaged ({e}); its {len(shard['clips'])} clips are "
                      "encoded again")
    return damaged


@cache
def row_not_finite(file, crc, size, mtime_ns):
    """The first row of a shard that holds a NaN or infinity, -1 where none does; once per process
    and state of the file. Errors: ValueError where its checksum is not crc (None: not known).
    """
    if crc is not None and crc_of(file) != crc:
        raise ValueError("its checksum is another")
    rows = np.load(file, mmap_mode="r")
    if rows.dtype != np.float16:                             # codes
        return -1

    # the exponent's bits of a NaN or infinity are all 1: five times as fast as isfinite
    step = max(1, (1 << 22) // max(1, rows.shape[1]))
    for first in range(0, len(rows), step):
        part = rows[first:first + step]
        if part.size and (part.view(np.uint16) & 0x7C00).max() == 0x7C00:
            return first + int(np.argmin(np.isfinite(part).all(1)))
    return -1
