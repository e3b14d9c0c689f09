"""Published tensors: read, renamed by rules, reordered for our rotary embedding, checked.

    *.safetensors ─► read ─► {name: fp32 tensor} ─► rename, halves ... ─► state dict ─► check_shapes
                                                    └─► what no rule uses ─► refuse_leftovers
"""
import glob
import json
import os
import re

import torch
from einops import rearrange

from cli import BadInput

# what a weight may be stored as; anything else is a code that needs scales, e.g. 8-bit weights
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def read(path):
    """Read a .safetensors file -> {name: tensor in fp32}. Errors: BadInput if it is quantised."""
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise BadInput("convert: safetensors is not installed: pip install -e .[hf]") from None
    try:
        tensors = load_file(path)
    except Exception as e:                       # the library's own errors have no common class
        raise BadInput(f"{path}: not a readable .safetensors file ({e})") from None
    refuse_quantised(path, tensors)
    return {name: tensor.float() for name, tensor in tensors.items()}


def refuse_quantised(path, tensors):
    """BadInput where weights are codes: without their scales they are other numbers."""
    codes = [name for name, tensor in tensors.items() if tensor.dtype not in FLOATS
             and (tensor.is_floating_point() or name.endswith("weight"))]
    if codes:
        dtype = str(tensors[codes[0]].dtype).removeprefix("torch.")
        raise BadInput(f"{path}: {len(codes)} tensors are quantised ({dtype}), e.g. {codes[0]}; "
                       "take the model's bf16 weights")


def refuse_leftovers(where, what, names):
    """BadInput that counts and names what of a model would be left out, if anything."""
    names = sorted(names)
    if names:
        shown = ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
        raise BadInput(f"{where}: {len(names)} {what} not understood: {shown}; "
                       "without them it would be another model")


def read_folder(folder):
    """Read all shards of a Hugging Face folder -> {name: tensor in fp32}.

    Errors: BadInput where a tensor that the index names is missing.
    """
    tensors = {}
    for path in sorted(glob.glob(f"{folder}/*.safetensors")):
        tensors |= read(path)

    index = f"{folder}/model.safetensors.index.json"
    if os.path.isfile(index):
        with open(index) as f:
            shards = json.load(f)["weight_map"]
        for name in shards.keys() - tensors.keys():
            raise BadInput(f"{folder}/{shards[name]}: missing; the index lists it for {name}")

    if not tensors:
        raise BadInput(f"{folder}: no .safetensors file in it")
    return tensors


def below(tensors, prefix):
    """The tensors under a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()
            if name.startswith(prefix)}


def rename(name, rules):
    """Apply rules (regular expression, replacement) to a tensor's name, one after the other."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def count(names, pattern):
    """1 + the largest index; pattern captures it in names of numbered layers."""
    matches = (re.match(pattern, name) for name in names)
    return 1 + max(int(match[1]) for match in matches if match)


def halves(weight, heads):
    """Reorder rows of q or k (H d, C): channels (2i, 2i + 1) of each head -> (i, i + d/2)."""
    return rearrange(weight, "(h i pair) ... -> (h pair i) ...", h=heads, pair=2)


def check_shapes(expected, found, model):
    """Raise BadInput unless `found` has every name and shape of `expected`, and nothing else."""
    refuse_leftovers(model, "tensors are", found.keys() - expected.keys())
    missing = sorted(expected.keys() - found.keys())
    if missing:
        raise BadInput(f"{model}: {len(missing)} tensors are missing, the first: {missing[0]}; "
                       "is this another version of it?")

    for name, tensor in expected.items():
        if tensor.shape != found[name].shape:
            raise BadInput(f"{model}: {name} is {tuple(found[name].shape)}, the sizes read from "
                           f"the other tensors require {tuple(tensor.shape)}")
