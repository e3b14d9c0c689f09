"""The files of a cache of latents: each is written with a checksum and verified when it is opened.

    KEY/index.json       {"names", "n", "dim", "levels", "shards": [{"clips", "frames", "crc32"},
                          ...], "crc32": of the index without this key}
    KEY/shard_00000.npy  one clip after the other (latents.py has the picture)

    damaged_shards ─► form, checksum and finite numbers of every shard, read once per process
                      (1.4 s per GB) ─► LatentCache.build encodes those that fail again

An index of 2026-11-27 or before has no checksums: its shards are checked for form and finite
numbers.
"""
import json
import os
import zlib
from functools import cache
from pathlib import Path

import numpy as np

from cli import BadInput, atomic, write_file
from remote import is_remote, local

# what stands before the checksum of an index, its last value
END_OF_INDEX = b', "crc32": '


def write_shard(path, names, k, clips, latents):
    """Write the latents of clips (numbers) as shard k, then the .json that describes it. names: the
    digest of the corpus' files.
    """
    with atomic(shard_file(path, k)) as temp:
        with open(temp, "wb") as out:
            np.save(out, np.concatenate(latents))
        crc = crc_of(temp)
    part = {"names": names, "clips": clips, "frames": [len(x) for x in latents], "crc32": crc}
    write_file(shard_file(path, k).with_suffix(".json"), json.dumps(part))


def read_parts(path, names):
    """The shards of an unfinished cache of these files -> {number: shard}."""
    parts = {}
    for file in sorted(Path(path).glob("shard_*.json")):
        try:
            part = json.loads(file.read_bytes(), object_hook=with_arrays)
        except (ValueError, RecursionError):
            continue                                     # damaged: the shard is encoded again
        if isinstance(part, dict) and part.get("names") == names and is_shard(part):
            del part["names"]
            parts[int(file.stem.removeprefix("shard_"))] = part
    return parts


def remove_parts(path):
    """Remove what only an unfinished cache needs."""
    for pattern in ("shard_*.json", "seconds_*.npy", "progress_*"):
        for file in Path(path).glob(pattern):
            file.unlink()


def write_index(path, index):
    """Write the index of all shards; it ends the work on a cache."""
    index = {name: value for name, value in index.items() if name != "crc32"}
    index["shards"] = [{name: value.tolist() if isinstance(value, np.ndarray) else value
                        for name, value in shard.items()} for shard in index["shards"]]
    text = json.dumps(index)
    crc = zlib.crc32(text.encode())
    write_file(path / "index.json", f'{text[:-1]}{END_OF_INDEX.decode()}{crc}}}')


def shard_file(path, k):
    """The file of shard k, as Path; an address of it where path is one."""
    name = f"shard_{k:05d}.npy"
    return f"{path}/{name}" if is_remote(path) else Path(path) / name


def crc_of(file):
    """CRC-32 of a file, read in pieces of 16 MB."""
    crc = 0
    with open(file, "rb") as data:
        while piece := data.read(1 << 24):
            crc = zlib.crc32(piece, crc)
    return crc


def read_index(path):
    """The index of a cache folder, or None where there is none. The lists of its shards are arrays.

    Errors: ValueError saying what is wrong with it, BadInput where it cannot be read.
    """
    file = f"{path}/index.json"
    try:
        with open(local(file), "rb") as data:
            text = data.read()
        index = json.loads(text, object_hook=with_arrays)
    except FileNotFoundError:
        return None
    except OSError as e:
        raise BadInput(f"{file}: cannot be read ({e.strerror}); correct that first") from None
    except (ValueError, RecursionError):
        raise ValueError("not JSON") from None
    if not is_index(index):
        raise ValueError("not an index")

    # its own checksum stands last
    if "crc32" in index:
        rest = text.rpartition(END_OF_INDEX)[0] + b"}"
        if index["crc32"] != zlib.crc32(rest):
            raise ValueError("its checksum is another")
    return index


def with_arrays(values):
    """An object from JSON, whose lists of whole numbers become arrays at once: ten million clips
    are 1 GB of Python's numbers.
    """
    for name in ("clips", "frames"):
        numbers = values.get(name)
        if isinstance(numbers, list) and all(type(number) is int for number in numbers) \
                and all(0 <= number < 1 << 31 for number in numbers):
            values[name] = np.array(numbers, np.int32)
    return values


def is_shard(shard):
    """Whether a value from JSON describes a shard: one number of frames for every clip."""
    if not isinstance(shard, dict):
        return False
    clips, frames = shard.get("clips"), shard.get("frames")
    return isinstance(clips, np.ndarray) and isinstance(frames, np.ndarray) \
        and 0 < len(clips) == len(frames)


def is_index(index):
    """Whether a value from JSON has the form of an index: whole numbers, every clip once."""
    if not isinstance(index, dict) or not isinstance(index.get("names"), str) \
            or not isinstance(index.get("shards"), list):
        return False
    sizes = [index.get("n"), index.get("dim"), index.get("levels", 0)]
    if not all(type(size) is int and size >= 0 for size in sizes):
        return False
    if not all(is_shard(shard) for shard in index["shards"]):
        return False
    if not index["shards"]:
        return True
    clips = np.concatenate([shard["clips"] for shard in index["shards"]])
    return int(clips.max()) < index["n"] and len(np.unique(clips)) == len(clips)


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


def check_size(path, dim, levels, k, rows):
    """ValueError where the file of a shard has another size than so many rows; an address is not
    asked.
    """
    file = shard_file(path, k)
    if is_remote(file):
        return
    try:
        size = os.stat(file).st_size
    except FileNotFoundError:
        raise ValueError("it is missing") from None
    except OSError as e:
        raise BadInput(f"{file}: cannot be read ({e.strerror}); correct that first") from None
    header = size - 2 * rows * (levels or 2 * dim)
    if not 64 <= header <= 1024:
        raise ValueError(f"its size is {size}")


def open_shard(path, dim, levels, k, rows):
    """Shard k by memory map. Errors: ValueError where its file is not as the index says, BadInput
    where it cannot be read."""
    file = shard_file(path, k)
    try:
        shard = np.load(local(file), mmap_mode="r")
    except FileNotFoundError:
        raise ValueError("it is missing") from None
    except OSError as e:
        raise BadInput(f"{file}: cannot be read ({e.strerror}); correct that first") from None
    except (MemoryError, BadInput):
        raise
    except Exception as e:                       # whatever numpy raises at a header's text
        raise ValueError(f"no array: {type(e).__name__}") from None

    dtype = np.int16 if levels else np.float16
    if shard.shape != (rows, levels or 2 * dim) or shard.dtype != dtype:
        raise ValueError(f"it holds {shard.dtype} {shard.shape}")
    return shard


def damaged_shards(path, index, shards, clips, show):
    """Which of the shards {number: shard} have files that are not what was written, each said in a
    line.
    """
    damaged = []
    for k, shard in shards.items():
        file = shard_file(path, k)
        try:
            rows = int(shard["frames"].sum())
            open_shard(path, index["dim"], index.get("levels", 0), k, rows)
            status = os.stat(file)
            row = row_not_finite(file, shard.get("crc32"), status.st_size, status.st_mtime_ns)
            if row >= 0:
                member = int(np.searchsorted(np.cumsum(shard["frames"]), row, side="right"))
                raise ValueError(f"{clips.path(shard['clips'][member])} is not finite in it")
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
