"""Where random numbers come from: a generator, a row of the batch, or a tape.

    normal(shape, source, device) ─┬─ None              torch's global generator
    uniform, exponential           ├─ torch.Generator   of a generation, seeded by the user
                                   ├─ Rows              of training: each row has its own generator
                                   └─ Tape              of a recorded step, drawn before it

A training step is a pure function of the weights and the step number for any number of processes
and micro-batches. So noise belongs to a row of the global batch, wherever and beside whichever
rows it is computed: its generator is seeded by (seed, step, row).
"""
import copy

import torch


def normal(shape, source, device, dtype=None):
    """N(0, 1), as torch.randn."""
    if isinstance(source, (Rows, Tape)):
        return source.take(torch.Tensor.normal_, shape, device, dtype)
    if source is None:                          # dynamo traces no argument `generator`
        return torch.randn(shape, device=device, dtype=dtype)
    return torch.randn(shape, generator=source, device=device, dtype=dtype)


def uniform(shape, source, device, dtype=None):
    """U(0, 1), as torch.rand."""
    if isinstance(source, (Rows, Tape)):
        return source.take(torch.Tensor.uniform_, shape, device, dtype)
    if source is None:
        return torch.rand(shape, device=device, dtype=dtype)
    return torch.rand(shape, generator=source, device=device, dtype=dtype)


def exponential(shape, source, device, dtype=None):
    """Exponential with mean 1."""
    if isinstance(source, (Rows, Tape)):
        return source.take(torch.Tensor.exponential_, shape, device, dtype)
    return torch.empty(shape, device=device, dtype=dtype).exponential_(generator=source)


def shared(source):
    """The torch.Generator on the CPU for a choice that all rows of a step have in common, such as a
    crop's place; None = the global one.
    """
    return source.of_step if isinstance(source, Rows) else source


class Rows:
    """The random numbers of a micro-batch: each row's own.

    seeds: one int per row. step_seed: of what all rows have in common. A tensor of numbers has the
    rows along one axis, the first unless `along` says otherwise.
    """

    def __init__(self, seeds, step_seed, device):
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self.of_step = torch.Generator().manual_seed(step_seed)
        self.axis = 0
        self.counts = [1] * len(seeds)
        self.length = None

    def changed(self, **attributes):
        other = copy.copy(self)
        other.__dict__.update(attributes)
        return other

    def take(self, draw, shape, device, dtype):
        """Numbers of `shape`, filled by draw(tensor, generator=...), row by row."""
        rows = []
        for generator, count in zip(self.generators, self.counts, strict=True):
            of_row = list(shape)
            of_row[self.axis] = count
            if self.length is not None:
                of_row[self.axis + 1] = self.length
            rows.append(draw(torch.empty(of_row, device=device, dtype=dtype), generator=generator))
        numbers = torch.cat(rows, self.axis)
        if self.length is not None:
            numbers = numbers.narrow(self.axis + 1, 0, shape[self.axis + 1])
        return numbers


def rows_along(source, axis):
    """For tensors that have the rows along another axis; as the next two, a source that is no
    Rows passes unchanged.
    """
    return source.changed(axis=axis) if isinstance(source, Rows) else source


def rows_at(source, valid):
    """For tensors x[valid] of valid (B, T): row i has as many entries as valid[i]."""
    return source.changed(counts=valid.sum(1).tolist()) if isinstance(source, Rows) else source


def rows_cut(source, length):
    """For tensors whose axis behind the rows is cut from `length` to what the micro-batch needs: a
    row's numbers must not depend on the rows beside it.
    """
    return source.changed(length=length) if isinstance(source, Rows) else source


class Tape:
    """Random numbers that stand ready when a step asks for them.

    The first step draws them one by one and so records how many there are, and which. Before every
    later step `refill` draws them all again, into the same memory and in the same order.
    """

    def __init__(self):
        self.memory = []                # a tensor for each draw of a step
        self.draws = []                 # how each is filled: torch.Tensor.normal_, ...
        self.taken = 0                  # draws that the current step has asked for
        self.generator = None

    def refill(self, generator):
        """Draw the numbers of the next step."""
        self.generator = generator
        self.taken = 0
        for memory, draw in zip(self.memory, self.draws):
            draw(memory, generator=generator)

    def take(self, draw, shape, device, dtype):
        """The next numbers of this step."""
        if self.taken == len(self.memory):
            memory = torch.empty(shape, device=device, dtype=dtype)
            self.memory.append(draw(memory, generator=self.generator))
            self.draws.append(draw)
        self.taken += 1
        return self.memory[self.taken - 1]


if __name__ == "__main__":
    print("noise.py is a library, used by train.py and sample.py")
