"""A step of generation in memory that never moves: run as it is, compiled, or as one CUDA graph.

    random numbers, drawn outside ─► tape ─┐
    inputs ─ copied into fixed memory ─────┴─► function ─► outputs, cloned
                                               │  ▲
                                   keys and values, position: written in place (StaticCache)

Generation of one latent is thousands of small kernels, and starting one takes the host longer than
the GPU needs to run it. If every call runs the same kernels on the same memory, CUDA records them
once and starts all of them together. Two things change between calls and must not be part of the
recording: the position, which is a tensor of the cache (backbone.StaticCache), and the random
numbers, which a Tape draws before the step, in the order in which the step asks for them. The
same seed therefore gives the same latents as without a recording.

HOW a step runs:
    static      operation by operation, in fixed memory
    graph       the same operations as a CUDA graph; recording takes about a second
    compile     compiled by torch.compile, on CUDA also recorded; compiling takes about a minute

Source: gpt-fast (github.com/pytorch-labs/gpt-fast) for fixed memory and a position that is a
tensor; PyTorch's notes on CUDA graphs for the recording.
Precision: that of the function.
"""
from itertools import islice

import torch

from noise import Tape

HOW = ("static", "graph", "compile")
WARM_UP = 2                         # calls before the recording: one eager, one as it is recorded
ROUND_TO = 256                      # positions of fixed memory: few sizes, so few recordings
MOST_UNSEEN = 8                     # frames between two looks at whether all rows have ended


# ---------------------------------------------------------------- a step, again and again

class Replay:
    """function(*inputs, tape) -> tensors, called again and again with inputs of the same shapes.

    how: one of HOW. The function may change tensors in place (a StaticCache), and nothing else that
    a later call depends on. Its weights must stay where they are. Outputs are the caller's to keep.
    """

    def __init__(self, function, how):
        self.how = how
        self.tape = Tape()
        self.first = function
        self.function = function
        if how == "compile":
            self.function = torch.compile(function, fullgraph=True, dynamic=False)
        self.calls = 0
        self.graph = None               # once recorded, a torch.cuda.CUDAGraph
        self.inputs = ()                # its inputs and outputs, in fixed memory
        self.outputs = ()

    def __call__(self, *inputs, generator):
        self.tape.refill(generator)
        self.calls += 1

        # the first call records the tape
        if self.calls == 1:
            return self.first(*inputs, self.tape)
        if self.how == "static":
            return self.function(*inputs, self.tape)

        # the same strides in every call, or it would be compiled again
        if self.graph is None:
            inputs = tuple(x.clone(memory_format=torch.contiguous_format) for x in inputs)
        if not inputs_on_cuda(self.tape, inputs):
            return self.function(*inputs, self.tape)

        # CUDA: another call that runs, then record, then replay
        if self.calls <= WARM_UP:
            with uncached_autocast():
                return on_side_stream(self.function, *inputs, self.tape)
        if self.graph is None:
            self.inputs = inputs
            self.record()
        for memory, new in zip(self.inputs, inputs):
            memory.copy_(new)
        self.graph.replay()
        return tuple(y.clone() for y in self.outputs)

    def record(self):
        """Record the function as a CUDA graph, without running it.

        Other threads may go on using the GPU (a decoder of audio, for example).
        """
        graph = torch.cuda.CUDAGraph()
        with uncached_autocast(), torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self.outputs = self.function(*self.inputs, self.tape)
        self.graph = graph


def inputs_on_cuda(tape, inputs):
    """Whether a step's tensors are on a GPU."""
    return any(x.is_cuda for x in (*inputs, *tape.memory))


def uncached_autocast():
    """The autocast that holds here, without its cache of weights.

    Cached weights are freed with the context, and a recording would go on reading them; here they
    are cast in every step.
    """
    return torch.autocast("cuda", torch.get_autocast_dtype("cuda"),
                          torch.is_autocast_enabled("cuda"), cache_enabled=False)


def on_side_stream(function, *inputs):
    """Run the function on a stream of its own, as PyTorch asks for before a recording."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        outputs = function(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    return outputs


class Fast:
    """How generate() runs behind the prefix; keeps what it recorded for the next call.

    One step is kept, the last one given back. A step in use belongs to its generator alone.
    """

    def __init__(self, how):
        if how not in HOW:
            raise ValueError(f"how: must be one of {', '.join(HOW)}, got {how}")
        self.how = how
        self.idle = {}                  # {key: step}, at most one

    def take(self, key, make):
        """The idle step of this key, or make(); an idle one of another key is dropped."""
        step = self.idle.pop(key, None)
        self.idle.clear()
        return make() if step is None else step

    def give_back(self, key, step):
        self.idle = {key: step}


def rounded(positions):
    """The size of fixed memory for at least so many positions."""
    return -(-positions // ROUND_TO) * ROUND_TO


def until_all_ended(frames):
    """The pairs (x, ended (B,)) of `frames` before the first at which all rows have ended.

    The host looks after 1, 2, 4, then every MOST_UNSEEN frames, because it waits for the GPU
    whenever it looks; frames behind the end are dropped.
    """
    size = 1
    while group := list(islice(frames, size)):
        all_ended = torch.stack([ended for _, ended in group]).all(1).tolist()
        for pair, over in zip(group, all_ended):
            if over:
                return
            yield pair
        size = min(2 * size, MOST_UNSEEN)


if __name__ == "__main__":
    print("replay.py is a library, used by sample.py, through calm.py and audiocalm.py")
