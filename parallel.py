"""One model on several processes, by torch: DistributedDataParallel, or FSDP2 with train.shard.

              what a process keeps             what it does in a step
    alone     everything                       losses(batch) ─► loss ─► backward
    DDP       everything                       ... and gradients are averaged as they come
    FSDP2     1/N of each weight, gradient,    gathers a layer's weights before it runs, and sums
              moment and average               and scatters its gradients behind it

What differs between the three stands in this file; the loop (train.py) asks for `wrap` and
`last_pass`. State that stays is 16 bytes per parameter (weights, AdamW's moments, average): 31 GB
for calm_speech, 52 GB for 3.2B parameters; train.py --plan says when it does not fit.

A sharded checkpoint is a folder per step, which every process writes its part of:

    lm.shards/step00001000/   .metadata, __0_0.distcp, __1_0.distcp ...   (torch's format)
                              crc.json    of these files
                              state.pt    what else a checkpoint holds: config, step, clips

The format is torch.distributed.checkpoint's. A folder has its name only when it is whole. It
resumes on any number of processes. A finished stage is one plain NAME.pt as ever, with the weights
and their average.

Precision: weights, gradients and their sums in fp32; layers cast to bf16 under autocast.
"""
import contextlib
import glob
import io
import json
import os
import pickle
import shutil
import warnings

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from adaln import AdaLNMLP
from adaln import Block as AdaLNBlock
from backbone import Transformer
from checkpoint import (DAMAGED, FLOATS, WHOLE, load_checkpoint, named_tensors, newest_shards,
                        shards_folder)
from cli import BadInput, write_file
from moe import Experts
from processes import rank, whole, world
from shards import crc_of


# ---------------------------------------------------------------- a step

class Losses(nn.Module):
    """All losses of a stage as one forward pass, which is what DDP and FSDP wrap."""

    def __init__(self, trainer):
        super().__init__()
        self.model = trainer.model
        self.losses = trainer.losses
        if trainer.some_unused:
            # DDP looks for weights without gradient, and would print a warning in steps that have
            # none
            self.never_used = nn.Parameter(torch.zeros(1))

    def forward(self, batch, step, source):
        """The sum of the losses, and {metric: value}. The optimizers' weights are disjoint, and no
        loss has a gradient for another's, so one backward pass serves all.
        """
        total = 0.0
        metrics = {}
        for name, loss, more in self.losses(batch, step, source):
            total = total + loss
            metrics |= {name: loss.detach()} | more
        return total, metrics


def wrap(trainer, device, shard):
    """The trainer's Losses, for one process or as a part of several."""
    losses = Losses(trainer)
    if world() == 1:
        return losses
    if shard:
        shard_layers(losses)
        return losses

    with warnings.catch_warnings():
        # torch 2.13 has another word for broadcast_buffers, which 2.11 does not know
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(
            losses, device_ids=[torch.device(device)] if device.startswith("cuda") else None,
            broadcast_buffers=False, gradient_as_bucket_view=True,
            find_unused_parameters=trainer.some_unused)


def layers_of(model):
    """The layers that are gathered one by one: those of transformers, heads and experts."""
    for module in model.modules():
        if isinstance(module, (Transformer, AdaLNMLP)):
            yield from module.blocks
        elif isinstance(module, Experts):
            for experts in module.of.values():
                yield from experts


def shard_layers(losses):
    """FSDP2: each layer is gathered by itself, what is left once per pass."""
    for layer in list(layers_of(losses)):
        fully_shard(layer)
        if isinstance(layer, AdaLNBlock):
            # a consistency loss calls the layer's derivative instead of its forward
            register_fsdp_forward_method(layer, "jvp")
    fully_shard(losses)


@contextlib.contextmanager
def last_pass(losses, last):
    """A forward and backward pass; gradients meet in the last one of a step only."""
    if isinstance(losses, FSDPModule):
        losses.set_requires_gradient_sync(last)
        yield
    elif isinstance(losses, DistributedDataParallel) and not last:
        with losses.no_sync():
            yield
    else:
        yield


def is_sharded(losses):
    return isinstance(losses, FSDPModule)


def make_moments(optimizers, parameters):
    """Let the optimizers allocate their state, as their first step does; no weight moves."""
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        optimizer.step()
        optimizer.zero_grad()


# ---------------------------------------------------------------- checkpoints

def whole_state(state, keep):
    """A (nested) state with its tensors whole and on the CPU; all processes take part, those
    without `keep` drop what they get.
    """
    if torch.is_tensor(state):
        full = whole(state.detach())
        return full.cpu() if keep else None
    if isinstance(state, dict):
        return {key: whole_state(value, keep) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [whole_state(value, keep) for value in state]
    return state


@torch.no_grad()
def fill(state, full):
    """Copy the tensors of a plain state into those of a sharded one of the same names."""
    source = dict(named_tensors(full))
    for name, tensor in named_tensors(state):
        if name not in source:                  # moments of weights that had no gradient
            tensor.zero_()
            continue
        value = source[name].to(tensor.device)
        if isinstance(tensor, DTensor):
            value = distribute_tensor(value, tensor.device_mesh, tensor.placements,
                                      src_data_rank=None)
        tensor.copy_(value)


def save_shards(out, name, state, rest, write_rest):
    """Write a sharded checkpoint of a step; all processes take part.

    state: (nested) dict with the sharded tensors; rest: what else a checkpoint holds, written by
    write_rest(path, rest) of the first process.
    """
    folder = f"{shards_folder(out, name)}/step{rest['step']:08d}"
    making = f"{folder}.making"
    if rank() == 0:
        shutil.rmtree(making, ignore_errors=True)
        os.makedirs(making)
    dist.barrier()
    try:
        dcp.save(dict(named_tensors(state)), checkpoint_id=making)
    except CheckpointException as e:            # every process gets the errors of all
        error, _ = next(iter(e.failures.values()))
        raise BadInput(f"{making}: cannot be written ({' '.join(str(error).split())[:100]}); the "
                       "checkpoint before it is untouched; free some space, or use --out") from None

    # every process knows what it wrote
    mine = sorted(glob.glob(f"{glob.escape(making)}/__{rank()}_*.distcp"))
    parts = [None] * world()
    dist.all_gather_object(parts, {os.path.basename(path): crc_of(path) for path in mine})
    if rank() == 0:
        crc = {key: value for part in parts for key, value in part.items()}
        crc[".metadata"] = crc_of(f"{making}/.metadata")
        write_file(f"{making}/crc.json", json.dumps(crc))
        write_rest(f"{making}/state.pt", rest)

        # whole: it takes its name, and the one before it goes
        before = newest_shards(out, name)
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(making, folder)
        if before not in (None, folder):
            shutil.rmtree(before)
    dist.barrier()


def clean_shards(out):
    """Remove what a killed process left of a sharded checkpoint that it was writing."""
    for making in glob.glob(f"{glob.escape(out)}/*.shards/*.making"):
        shutil.rmtree(making, ignore_errors=True)


def load_shards(folder, state):
    """Read a sharded checkpoint into the tensors of `state`, on any number of processes.

    Moments of weights that had no gradient are in no file: they are 0. Errors: BadInput where a
    file is damaged or a tensor is missing.
    """
    check_crc(folder)
    reader = Reader(folder)
    found = reader.read_metadata().state_dict_metadata
    tensors = dict(named_tensors(state))
    for name in [n for n in tensors if n.startswith("optimizers.") and n not in found]:
        tensors.pop(name).detach().zero_()
    for name, tensor in tensors.items():
        entry = found.get(name)
        if not isinstance(entry, TensorStorageMetadata) or entry.size != tensor.shape:
            raise BadInput(f"{folder}: does not fit this config's model: {name}")
    dcp.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())


def gather_shards(folder):
    """A sharded checkpoint as the state of one plain file, read by one process."""
    check_crc(folder)
    reader = Reader(folder)
    tensors = {}
    for name, entry in reader.read_metadata().state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise BadInput(f"{folder}: {name} is no tensor; {DAMAGED}")
        tensors[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
    dcp.load(tensors, storage_reader=reader, no_dist=True)

    state = load_checkpoint(f"{folder}/state.pt")
    for part in ("model", "ema"):
        weights = {name.removeprefix(f"{part}."): tensor for name, tensor in tensors.items()
                   if name.startswith(f"{part}.")}
        state[part] = weights or state[part]
    return state


def check_crc(folder):
    """BadInput where a file is not as it was written. Every process checks its share."""
    try:
        with open(f"{folder}/crc.json") as file:
            expected = json.load(file)
        names = sorted(expected)[rank()::world()]
        bad = [name for name in names if crc_of(f"{folder}/{name}") != expected[name]]
    except (OSError, ValueError, TypeError) as e:
        bad = [str(e)]
    if dist.is_initialized():
        parts = [None] * world()
        dist.all_gather_object(parts, bad)
        bad = [name for part in parts for name in part]
    if bad:
        raise BadInput(f"{folder}: damaged ({bad[0]}); restore a copy, or delete the folder and "
                       "run again: its stage is then trained anew")


class Reader(dcp.FileSystemReader):
    """A reader of torch.distributed.checkpoint whose metadata, a pickle, can make nothing but the
    descriptions of tensors.
    """

    def read_metadata(self, *arguments, **options):
        with open(os.path.join(self.path, ".metadata"), "rb") as file:
            metadata = Descriptions(io.BytesIO(file.read())).load()
        if not isinstance(metadata, Metadata):
            raise BadInput(f"{self.path}/.metadata: no description of a checkpoint; {DAMAGED}")
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = dcp.metadata.StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


# all that a description of float and integer tensors is made of
CLASSES = {("torch", "Size"), ("torch.serialization", "_get_layout"), ("pathlib", "PosixPath"),
           ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
           *(("torch", str(dtype).removeprefix("torch.")) for dtype in FLOATS + WHOLE),
           *(("torch.distributed.checkpoint.metadata", name) for name in (
               "Metadata", "TensorStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING",
               "ChunkStorageMetadata", "MetadataIndex", "StorageMeta"))}


class Descriptions(pickle.Unpickler):
    """Unpickles torch's descriptions of tensors, and no other class or function."""

    def find_class(self, module, name):
        if (module, name) not in CLASSES:
            raise BadInput(f"a sharded checkpoint's .metadata asks for {module}.{name}, which "
                           f"describes no tensor; {DAMAGED}")
        return super().find_class(module, name)


if __name__ == "__main__":
    print("parallel.py is a library, used by train.py")
