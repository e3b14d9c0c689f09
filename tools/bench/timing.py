"""What the benchmarks share: a clock, a race in which contestants take turns, the file of figures.

    contestants {name: function} ─► race ─► {name: [seconds of each repeat]} ─► median, median_ratio
"""
import contextlib
import json
import statistics
import time

import torch
from tqdm import tqdm

from cli import write_file


# ---------------------------------------------------------------- measuring

def clock(device):
    """Seconds on a monotonic clock, read after all work queued on a CUDA device has finished."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def race(contestants, repeats, device):
    """Time contestants {name: function} in turn -> {name: [seconds of each repeat]}.

    A first round, which warms caches and compiles, is run and not measured.
    """
    times = {name: [] for name in contestants}
    for i in tqdm(range(repeats + 1), leave=False, desc="timing"):
        for name, run in contestants.items():
            start = clock(device)
            run()
            if i:
                times[name].append(clock(device) - start)
    return times


def median_ratio(values, reference):
    """The median over repeats of value / reference; both lists have one entry per repeat."""
    return statistics.median(value / base for value, base in zip(values, reference))


def inference(function, *inputs, precision=contextlib.nullcontext):
    """A contestant that calls function(*inputs) without gradients.

    precision: returns the context of the call, such as an autocast.
    """
    def run():
        with torch.no_grad(), precision():
            function(*inputs)
    return run


# ---------------------------------------------------------------- processor

def set_threads(threads):
    """Use so many CPU threads per operation; 0 leaves torch's choice."""
    if threads:
        torch.set_num_threads(threads)


def processor(device):
    """Where the figures come from, for the first line of a table."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"fp32, {torch.get_num_threads()} threads"


# ---------------------------------------------------------------- figures

def write_json(path, figures):
    write_file(path, json.dumps(figures, indent=1))
