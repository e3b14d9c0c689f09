"""Files that lie elsewhere: an address such as s3://bucket/a.flac becomes a local copy, made once.

    local("out/a.npy")          out/a.npy
    local("s3://bucket/a.npy")  ~/.cache/nanocalm/0f3a...2b/a.npy       ($NANOCALM_CACHE/0f3a...2b/)

fsspec fetches the file (extra "remote"; s3:// also needs s3fs, hf:// huggingface_hub), under
another name until it is whole, so that a killed fetch leaves nothing and several processes may ask
for one file. The copies stay: an object that changes under its name needs `rm -r` of the folder,
and the disk must hold what a training reads.
"""
import hashlib
import os
import threading

from cli import BadInput, atomic

LOCKS = [threading.Lock() for _ in range(64)]


def is_remote(path):
    """Whether a path is an address."""
    return "://" in str(path)


def local(path):
    """The path of a local file with the contents of `path`. Errors: BadInput naming the address."""
    if not is_remote(path):
        return path
    name = hashlib.sha256(path.encode()).hexdigest()[:32]
    copy = os.path.join(cache_folder(), name, path.rpartition("/")[2])

    # two threads must not fetch one file
    with LOCKS[int(name, 16) % len(LOCKS)]:
        if not os.path.exists(copy):
            fetch(path, copy)
    return copy


def cache_folder():
    """Where the copies lie."""
    return os.environ.get("NANOCALM_CACHE") or os.path.expanduser("~/.cache/nanocalm")


def fetch(address, copy):
    """Write what lies at an address to the file `copy`, whole or not at all."""
    try:
        import fsspec
    except ImportError:
        raise BadInput(f"{address}: needs the remote extra: pip install -e .[remote]") from None

    os.makedirs(os.path.dirname(copy), exist_ok=True)
    with atomic(copy) as temp:
        try:
            files, name = fsspec.url_to_fs(address)
            files.get_file(name, temp)
        except Exception as e:                  # each kind of storage raises its own
            reason = " ".join(str(e).split())[:100] or type(e).__name__
            raise BadInput(f"{address}: cannot be fetched ({reason}); correct the address, or the "
                           "access to it") from e


if __name__ == "__main__":
    print("remote.py is a library, used by manifest.py, audio.py and shards.py")
