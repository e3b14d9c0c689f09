"""Batches made ahead of the step that needs them: by a thread, or by processes.

    fn(step) ─► Prefetch    a thread, for what waits for files or takes less time than a step
             └► Workers     processes, for a GPU whose step is shorter than the batch's making

Both give fn(first), fn(first + 1), ... in order, whatever the number of workers: a batch depends on
its step only, so that a resumed run sees the same ones. An error of fn is raised where its batch
would have come.
"""
import os
import signal
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import torch
from torch.utils.data import DataLoader, Dataset

from cli import BadInput


class Prefetch:
    """for batch in Prefetch(fn, first_step): a thread calls fn(step) `ahead` steps early.

    Steps are consecutive, in order, until `stop` (exclusive; None: endless). close() waits for the
    thread.
    """

    def __init__(self, fn, first_step=0, ahead=2, stop=None):
        self.fn = fn
        self.step = first_step
        self.stop = stop
        self.queue = deque()
        self.pool = ThreadPoolExecutor(1, "prefetch")
        for _ in range(max(1, ahead)):
            self.submit()

    def submit(self):
        """Start the call for the next step, if there is one."""
        if self.pool and (self.stop is None or self.step < self.stop):
            self.queue.append(self.pool.submit(self.fn, self.step))
            self.step += 1

    def __iter__(self):
        return self

    def __next__(self):
        if not self.queue:
            raise StopIteration
        future = self.queue.popleft()
        self.submit()
        return future.result()

    def close(self):
        if self.pool:
            self.pool.shutdown(wait=True, cancel_futures=True)
        self.pool = None
        self.queue.clear()


class Workers:
    """for batch in Workers(fn, first, stop, processes, pin): processes call fn(step) early.

    Each process makes every `processes`-th batch and keeps two waiting. pin: page-locked memory,
    from which copies to a CUDA device overlap with its work. close() ends the processes.
    """

    def __init__(self, fn, first, stop, processes, pin):
        loader = DataLoader(Steps(fn), batch_size=None, sampler=range(first, stop),
                            num_workers=processes, pin_memory=pin, worker_init_fn=leave_signals)
        # without DataLoader's own answer to the end of a process: an error wherever the training
        # is, in the middle of an optimizer's step too
        posix = os.name == "posix"
        on_end = posix and signal.getsignal(signal.SIGCHLD)
        self.batches = iter(loader)
        if posix:
            signal.signal(signal.SIGCHLD, on_end)

    def __iter__(self):
        return self

    def __next__(self):
        try:
            made = next(self.batches)
        except RuntimeError as e:                       # of DataLoader: a process was ended
            raise BadInput("data.processes: a process that makes batches has ended "
                           f"({str(e).splitlines()[0]}); for want of memory use fewer") from e
        if isinstance(made, Exception):
            raise made
        return made

    def close(self):
        self.batches = None


class Steps(Dataset):
    """fn as a dataset whose item is a step; an error is the item, to be raised by the reader."""

    def __init__(self, fn):
        self.fn = fn

    def __getitem__(self, step):
        try:
            return self.fn(step)
        except Exception as e:
            return e


def leave_signals(worker):
    """In a worker: signals are the training process's to answer, which saves first.

    Ctrl-C, timeout and job schedulers signal all processes of a group; a worker that ended at once
    would end the training before its checkpoint. A worker ends when its parent has.
    """
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


if __name__ == "__main__":
    print("prefetch.py is a library, used by train.py")
