"""A checkpoint file is verified before anything in it is used.

    vae.pt ─► check_archive ─► torch.load ─────► check_state ───────────► state
              CRC of every     weights_only:     every tensor: its dtype, finite, as many bytes
              record           tensors, no code  as the file has, the checksum of save_checkpoint

    state ─► build_within ─► load_weights        the config inside may ask for no more parameters
                                                 than the file holds

A file is a zip archive of torch.save, its records stored without compression. What is wrong is one
line, a BadInput, that says whether the file is damaged (a copy, or training the stage again, helps)
or could not be read (memory, permissions, the disk: deleting it would not help).
"""
import contextlib
import errno
import glob
import json
import os
import zipfile
import zlib

import torch
from torch.nn.modules import module as nn_module

from cli import BadInput
from weights import load_safetensors

DAMAGED = "restore a copy, or delete it and run again: its stage is then trained anew"
# what a checkpoint holds, and the types of it
REQUIRED = {"stage": str, "step": int, "done": bool, "config": dict, "model": dict,
            "ema": (dict, type(None)), "optimizers": dict}
OPTIONAL = {"clips": str, "seen": dict, "encoder": str, "runtime": dict}
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
# errors of the file's contents that reach us as OSError: a place to read from that cannot be
CONTENTS = (None, errno.EINVAL)


# ---------------------------------------------------------------- reading

def load_checkpoint(path, device="cpu"):
    """The dict that save_checkpoint wrote, verified; tensors only, no code (weights_only)."""
    if os.path.isdir(path):
        raise BadInput(folder_of_checkpoints(path))
    exported = path if path.endswith(".safetensors") else exported_file(path)
    if exported:
        return moved(load_exported(exported), device)
    try:
        with open(path, "rb") as file:
            check_archive(file, path)
            state = torch.load(file, map_location="cpu", weights_only=True)
        check_state(state, path, os.path.getsize(path))
        return moved(state, device)
    except BadInput:
        raise
    except FileNotFoundError:
        shards = newest_shards(os.path.dirname(path), os.path.basename(path).removesuffix(".pt"))
        if shards:
            raise BadInput(f"{path}: its stage is still in training, {shards} is the last step; "
                           f"python -m tools.convert gather {os.path.dirname(path)} --out DIR "
                           "makes a plain run of it") from None
        raise BadInput(f"{path}: no such checkpoint; "
                       "train it first: python train.py --config ...") from None
    except PermissionError:
        raise BadInput(f"{path}: may not be read; correct its permissions") from None
    except Exception as e:                    # whatever zipfile, torch and pickle raise
        raise BadInput(f"{path}: {why_unreadable(e, path)}") from None


def exported_file(path):
    """The .safetensors file in place of the checkpoint `path` (tools.convert export), or None."""
    other = path.removesuffix(".pt") + ".safetensors"
    return other if not os.path.exists(path) and os.path.exists(other) else None


def shards_folder(out, name):
    """Where a stage that is trained with train.shard keeps its checkpoints (parallel.py)."""
    return f"{out}/{name}.shards"


def newest_shards(out, name):
    """The folder of a stage's last sharded checkpoint, or None."""
    folders = glob.glob(f"{glob.escape(shards_folder(out, name))}/step????????")
    return max(folders, default=None)


def stage_file(out, name):
    """The file that says how far a stage has come: its checkpoint, or a sharded one's state.pt; the
    later one where a kill has left both.
    """
    plain = f"{out}/{name}.pt"
    sharded = f"{newest_shards(out, name)}/state.pt"
    return max(filter(os.path.exists, (plain, sharded)), key=os.path.getmtime, default=plain)


def load_exported(path):
    """An exported stage as load_checkpoint gives it: averaged weights in fp32, no optimizers."""
    tensors, metadata = load_safetensors(path)
    try:
        state = json.loads(metadata["nanocalm"])
    except (KeyError, TypeError, ValueError, RecursionError):
        raise BadInput(f"{path}: not written by tools.convert export; "
                       "python -m tools.convert -h names what else can be read") from None
    if isinstance(state, dict):
        weights = {name: w.float() if w.is_floating_point() else w for name, w in tensors.items()}
        state = {**state, "model": {}, "ema": weights, "optimizers": {}}
    check_state(state, path, 4 * os.path.getsize(path))
    return state


def why_unreadable(error, path):
    """What an error while reading a checkpoint means, and what to do."""
    if isinstance(error, MemoryError) or "allocate memory" in str(error) \
            or isinstance(error, torch.OutOfMemoryError):
        size = os.path.getsize(path) / 1e9
        return f"does not fit into memory ({size:.2f} GB); free some, the file may well be whole"
    if isinstance(error, OSError) and error.errno not in CONTENTS:
        return (f"cannot be read ({error.strerror}); the file may be whole: "
                "look after the disk or the limits of the system first")
    if isinstance(error, RecursionError):
        return "not a readable checkpoint (nested too deeply); " + DAMAGED
    return f"not a readable checkpoint ({type(error).__name__}), damaged or none; {DAMAGED}"


def folder_of_checkpoints(path):
    """What to say where a folder was given for a checkpoint."""
    names = sorted(name for name in os.listdir(path) if name.endswith(".pt"))
    inside = f"give one of its checkpoints: {', '.join(names)}" if names else "it has no checkpoint"
    return f"{path} is a folder; {inside}"


def check_archive(file, path):
    """BadInput where a record of the archive is not what was written. One read of the file."""
    archive = zipfile.ZipFile(file)
    records = archive.infolist()

    # no compression: a few bytes cannot become gigabytes
    size = file.seek(0, os.SEEK_END)
    stored = all(record.compress_type == zipfile.ZIP_STORED for record in records)
    if not stored or sum(record.file_size for record in records) > size:
        raise BadInput(f"{path}: its records are packed or overlap, torch.save writes no such "
                       f"archive; {DAMAGED}")
    names = [record.filename for record in records]
    if len(set(names)) < len(names):
        raise BadInput(f"{path}: damaged (two records have the same name); {DAMAGED}")

    # the archive ends where the file ends
    file.seek(-22, os.SEEK_END)
    if file.read(4) != b"PK\5\6":
        raise BadInput(f"{path}: damaged (something follows its end); {DAMAGED}")

    # the CRC of every record
    record = archive.testzip()
    if record:
        raise BadInput(f"{path}: damaged (record {record}); {DAMAGED}")
    file.seek(0)


def moved(value, device):
    """A (nested) state with its tensors on a device; its dicts and lists are the same ones."""
    if torch.is_tensor(value):
        return value.to(device)
    if isinstance(value, dict):
        value |= {key: moved(item, device) for key, item in value.items()}
    elif isinstance(value, list):
        value[:] = [moved(item, device) for item in value]
    return value


# ---------------------------------------------------------------- what is in it

def check_state(state, path, size):
    """BadInput where a loaded state is no checkpoint of `size` bytes that can be used.

    "checksum" is taken out: whoever changes the state and saves it gets a new one.
    """
    # what it holds is of the right kinds
    if not isinstance(state, dict) or not REQUIRED.keys() <= state.keys():
        raise BadInput(f"{path}: not a nanoCALM checkpoint; expected {', '.join(REQUIRED)}")
    for name, kind in (REQUIRED | OPTIONAL).items():
        if name in state and not is_a(state[name], kind):
            raise BadInput(f"{path}: damaged ({name} is a {type(state[name]).__name__}); {DAMAGED}")

    # names of kinds and of weights
    kinds = state.get("seen", {}).get("kinds", [])
    if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
        raise BadInput(f"{path}: damaged (seen.kinds is no list of names); {DAMAGED}")
    letters = state.get("seen", {}).get("letters", {})
    if not isinstance(letters, dict) or not all(isinstance(part, str) for part in letters.values()):
        raise BadInput(f"{path}: damaged (seen.letters is no text for each kind); {DAMAGED}")
    for name, weight in [*state["model"].items(), *(state["ema"] or {}).items()]:
        if not isinstance(name, str) or not torch.is_tensor(weight):
            raise BadInput(f"{path}: damaged (weight {str(name)[:60]} is no tensor); {DAMAGED}")

    # bytes first: a view of one number can be a terabyte
    tensors = list(named_tensors(state))
    for name, tensor in tensors:
        if tensor.dtype not in FLOATS + WHOLE or tensor.layout != torch.strided \
                or tensor.device.type != "cpu":
            raise BadInput(f"{path}: {name} holds {tensor.dtype} ({tensor.layout}), which no "
                           f"weights are; {DAMAGED}")

    # then their numbers
    if sum(tensor.nbytes for _, tensor in tensors) > 2 * size + 2 ** 16:
        raise BadInput(f"{path}: damaged (its tensors claim more numbers than the file holds); "
                       f"{DAMAGED}")
    for name, tensor in tensors:
        if tensor.dtype in FLOATS and not is_finite(tensor):
            raise BadInput(f"{path}: {name} is not finite (NaN or infinite), which no training "
                           f"goes on from and nothing can be heard of; {DAMAGED}")

    # and all of it is what was saved
    saved = state.pop("checksum", None)
    if saved is not None and saved != checksum(state):
        raise BadInput(f"{path}: damaged (its tensors are not those that were saved); {DAMAGED}")


def is_finite(tensor):
    """Whether no number of a tensor is NaN or infinite: by its smallest and largest, which a NaN
    becomes, in a tenth of isfinite's time.
    """
    if tensor.numel() == 0:
        return True
    low, high = tensor.aminmax()
    return bool(low.isfinite() and high.isfinite())


def is_a(value, kind):
    """isinstance, where a bool is no int."""
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))


def named_tensors(value, name=""):
    """("model.encoder.weight", tensor) of a nested state, in its order."""
    if torch.is_tensor(value):
        yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from named_tensors(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from named_tensors(item, f"{name}.{i}")


def checksum(state):
    """CRC-32 of every tensor with its name: records that changed places are other tensors."""
    crc = 0
    for name, tensor in named_tensors(state):
        numbers = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        crc = zlib.crc32(numbers, zlib.crc32(name.encode(), crc))
    return crc


# ---------------------------------------------------------------- into a model

@contextlib.contextmanager
def at_most(tensors, numbers, path):
    """BadInput as soon as modules that are built here have more parameters and buffers."""
    left = {"tensors": tensors, "numbers": numbers}

    def count(module, name, tensor):
        left["tensors"] -= 1
        left["numbers"] -= tensor.numel() if torch.is_tensor(tensor) else 0
        if min(left.values()) < 0:
            raise BadInput(f"{path}: its config asks for a larger model than the file holds "
                           f"({type(module).__name__}.{name}); {DAMAGED}")

    handles = [nn_module.register_module_parameter_registration_hook(count),
               nn_module.register_module_buffer_registration_hook(count)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def build_within(make, weights, path):
    """make(), a module, after a rehearsal without memory that may register no more than a few times
    what `weights` holds (weight norm registers twice; windows and masks are in no file).
    """
    numbers = sum(weight.numel() for weight in weights.values())
    try:
        with torch.device("meta"), at_most(4 * len(weights) + 1000, 4 * numbers + 10 ** 7, path):
            make()
        return make()
    except (RuntimeError, OverflowError, MemoryError, ValueError, TypeError) as e:
        raise BadInput(f"{path}: its config describes no model ({' '.join(str(e).split())[:100]}); "
                       f"{DAMAGED}") from None


def load_weights(module, state, path):
    """Strict load with one line instead of torch's list of keys."""
    for name, own in module.state_dict().items():
        weight = state.get(name)
        if torch.is_tensor(weight) and weight.dtype != own.dtype \
                and not (weight.dtype in FLOATS and own.dtype in FLOATS):
            raise BadInput(f"{path}: {name} holds {weight.dtype} in place of {own.dtype}; "
                           f"{DAMAGED}")
    try:
        module.load_state_dict(state)
    except RuntimeError as e:
        first = next(line.strip() for line in str(e).splitlines()[1:] if line.strip())
        raise BadInput(f"{path}: does not fit this config's model: {first[:200]}") from None


def check_optimizer(optimizer, path):
    """BadInput where the loaded state of an optimizer has other shapes than its parameters."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if torch.is_tensor(value) and value.dim() and value.shape != parameter.shape:
                raise BadInput(f"{path}: {name} of the optimizer has shape {tuple(value.shape)} "
                               f"for weights {tuple(parameter.shape)}; {DAMAGED}")
