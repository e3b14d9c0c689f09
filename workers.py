"""Clips shared by processes: every core or GPU judges its own.

    python evaluate.py --run ... --jobs 4                          4 processes of this machine
    torchrun --nproc_per_node=8 evaluate.py --run ...              one per GPU, any machines

    process 0   clips 0, 4, 8, ... ─┐
    process 1   clips 1, 5, 9, ... ─┼─► gather ─► the same figures in every process; 0 prints
    process 2, 3 ...               ─┘

Figures do not depend on the number of processes: every clip has its own seed, and sums are taken in
the order of clips. Processes meet through torch.distributed (gloo): what they exchange are figures.
"""
import datetime
import os
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from cli import BadInput, Failure

# a process may wait long for the one with the longest clips
PATIENCE = datetime.timedelta(hours=12)


def rank():
    """The number of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def mine(items):
    """The items of a list that this process has to do."""
    processes = dist.get_world_size() if dist.is_initialized() else 1
    return items[rank()::processes]


def my_block(count):
    """The numbers of this process's share of `count` items in a row."""
    processes = dist.get_world_size() if dist.is_initialized() else 1
    return range(rank() * count // processes, (rank() + 1) * count // processes)


def gather(value):
    """The values of all processes, in their order."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def gather_dict(values):
    """One dict of the dicts of all processes, sorted by key."""
    merged = {}
    for of_process in gather(values):
        merged |= of_process
    return dict(sorted(merged.items()))


# ---------------------------------------------------------------------------- starting


def choose_device(name):
    """--device: auto, cpu, mps, cuda, cuda:1 -> a device that is there; of several processes on
    GPUs each gets its own.
    """
    if name == "auto":
        name = ("cuda" if torch.cuda.is_available() else
                "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as e:
        reason = str(e).splitlines()[0]
        raise BadInput(f"--device {name}: not available here ({reason}); use auto or cpu") from None
    if name == "cuda":
        local = int(os.environ.get("LOCAL_RANK", 0))
        name = f"cuda:{local % torch.cuda.device_count()}"
    return name


@dataclass(frozen=True)
class Place:
    """Where the models that are judged run, and whether in bf16. Figures and the models that judge
    stay in fp32.
    """
    device: str = "cpu"
    bf16: bool = False

    def autocast(self):
        return torch.autocast(self.device.split(":")[0], torch.bfloat16, enabled=self.bf16)


def choose_place(device, dtype):
    """--device and --dtype -> Place. auto = bf16 on NVIDIA GPUs from Ampere on, else fp32."""
    device = choose_device(device)
    if dtype == "auto":
        return Place(device, device.startswith("cuda")
                     and torch.cuda.get_device_capability()[0] >= 8)
    return Place(device, dtype == "bf16")


@contextmanager
def shared(jobs):
    """Within the block this command runs in `jobs` processes, or in those that torchrun started.
    Only process 0 prints. Failure names what stopped another one.
    """
    if "RANK" in os.environ:                         # of torchrun, or started below
        with member(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]),
                    os.environ.get("CALM_MEETING")):
            yield
    elif jobs == 1:
        yield
    else:
        with tempfile.TemporaryDirectory() as folder:
            yield from with_children(jobs, folder)


def with_children(jobs, folder):
    """Start the same command jobs - 1 times more, and be process 0 of all."""
    meeting = f"{folder}/meeting"
    children = []
    for i in range(1, jobs):
        env = {**os.environ, "RANK": str(i), "LOCAL_RANK": str(i), "WORLD_SIZE": str(jobs),
               "CALM_MEETING": meeting}
        with open(f"{folder}/{i}", "w") as said:
            children.append(subprocess.Popen([sys.executable, *sys.argv], env=env, stderr=said))
    try:
        with member(0, jobs, meeting):
            yield
    except RuntimeError as e:
        # a process that ends closes its connections; the first to end has another reason than that
        if not lost_connection(f"{type(e).__name__}: {e}"):
            raise
        for i, child in enumerate(children, 1):
            child.wait()
            last = last_line(f"{folder}/{i}")
            if last and not lost_connection(last):
                raise Failure(f"process {i} of {jobs} ended: {last}") from e
        raise Failure(f"one of {jobs} processes ended without a word; use fewer --jobs") from e
    finally:
        for child in children:
            if sys.exc_info()[0] is not None:
                child.terminate()
            child.wait()


def lost_connection(message):
    """Whether an error is about another process, in gloo or at the meeting."""
    return "gloo" in message or "DistStoreError" in message


def last_line(path):
    """The last line of a text file, without "error: "; "" for an empty one."""
    with open(path, errors="replace") as file:
        lines = file.read().strip().splitlines()
    return lines[-1].removeprefix("error: ") if lines else ""


@contextmanager
def member(number, processes, meeting):
    """One process of several. meeting: the file where they find each other (five minutes), None:
    torchrun's way.
    """
    store = dist.FileStore(meeting, processes) if meeting else None
    dist.init_process_group("gloo", store=store, rank=number, world_size=processes,
                            timeout=PATIENCE)
    screen = sys.stdout
    if number:
        sys.stdout = open(os.devnull, "w")
    try:
        yield
    finally:
        sys.stdout = screen
        dist.destroy_process_group()
