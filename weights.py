"""Weights that travel: the safetensors format, read and written without running anything in them.

    8 bytes    N, the length of the header, little-endian
    N bytes    JSON {"__metadata__": {key: text}, name: {"dtype", "shape", "data_offsets"}, ...}
    the rest   the tensors one after the other, little-endian, contiguous

An exported model (tools.convert export) is a folder with one such file per stage in place of the
run's checkpoints: the averaged weights alone, rounded to bf16 if asked, and under the metadata key
"nanocalm" what a checkpoint knows besides. config.load_checkpoint reads either. On the Hugging Face
hub such a folder is a repository: local_folder("hf://user/repo@revision") fetches it.

Source: the format's description in github.com/huggingface/safetensors. The package of that name
reads these files too (tests/plumbing/test_weights.py); sixty lines here spare sampling a package.
"""
import json
import math
import os
import re

import torch

from cli import BadInput, atomic

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
          "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16,
          "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
LARGEST_HEADER = 100_000_000                    # bytes, the format's own limit


def save_safetensors(path, tensors, metadata):
    """Write {name: tensor} and {key: text} to a .safetensors file, atomically."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header = {"__metadata__": metadata}
    parts = []
    end = 0
    for name, tensor in tensors.items():
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [end, end + len(data)]}
        end += len(data)
        parts.append(data)

    # spaces behind the header, so that the tensors begin at a multiple of 8
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic(path) as temp, open(temp, "wb") as f:
        f.write(len(text).to_bytes(8, "little"))
        f.write(text)
        f.writelines(parts)


def load_safetensors(path):
    """Read a .safetensors file -> ({name: tensor}, {key: text}).

    Errors: BadInput where the header does not describe exactly the bytes that follow it.
    """
    try:
        # a header, which says where every tensor lies, and their bytes
        with open(path, "rb") as f:
            size = os.fstat(f.fileno()).st_size
            length = int.from_bytes(f.read(8), "little")
            if length > min(size - 8, LARGEST_HEADER):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(f.read(length))
            data = bytearray(f.read())

        # the tensors in their order, each beginning where the last one ends
        metadata = header.pop("__metadata__", {})
        tensors = {}
        end = 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            tensors[name] = one_tensor(name, entry, data, end)
            end = entry["data_offsets"][1]
        if end != len(data):
            raise ValueError(f"{len(data) - end} bytes behind the last tensor")

    except OSError as e:
        raise BadInput(f"{path}: cannot be read ({e.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise BadInput(f"{path}: not a readable .safetensors file ({e}); get it again") from None
    return tensors, metadata


def one_tensor(name, entry, data, begin):
    """The tensor of one header entry, whose bytes must begin at `begin`."""
    dtype = DTYPES[entry["dtype"]]
    shape = entry["shape"]
    if not all(isinstance(n, int) and n >= 0 for n in shape):
        raise ValueError(f"{name} has the shape {shape}")
    first, last = entry["data_offsets"]
    if first != begin or last - first != math.prod(shape) * dtype.itemsize or last > len(data):
        raise ValueError(f"{name}: its bytes {first} to {last} do not fit its shape {shape}")
    if first == last:
        return torch.zeros(shape, dtype=dtype)
    values = torch.frombuffer(data, dtype=torch.uint8, count=last - first, offset=first)
    return values.clone().view(dtype).reshape(shape)


def local_folder(run):
    """The folder of a run: `run` itself, or of hf://user/repo[@revision] the copy in the cache of
    huggingface_hub, which is fetched where it is not there (weights, config and card; no code).

    Errors: BadInput where the name is none, the package is missing or nothing can be fetched.
    """
    if not run.startswith("hf://"):
        return run
    match = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", run)
    if not match:
        raise BadInput(f"{run}: is no name of a model; write hf://user/repo or "
                       "hf://user/repo@revision")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise BadInput(f"{run}: needs the package huggingface_hub; "
                       "pip install -e .[hf]") from None
    try:
        return snapshot_download(match[1], revision=match[2],
                                 allow_patterns=["*.safetensors", "*.toml", "*.md"])
    except (OSError, ValueError) as e:
        why = " ".join(str(e).split())[:200]
        raise BadInput(f"{run}: cannot be fetched ({why}); correct the name, or connect and try "
                       "again") from None


if __name__ == "__main__":
    print("weights.py is a library, used by config.py and tools.convert")
