"""A campaign of faults against tiny trainings: how many were survived, by kind.

    python -m tests.faults.campaign --seed 0 --minutes 10 [--kind kill ...]

Kinds take turns until the time is up; a trial is named by its kind and seed; `--kind K --seed N
--trials 1 --workers 1` repeats one. What "survived" means:

kill        SIGKILL of a training at a random moment or before or after a random file operation, in
            a random stage; every third time of two processes. The same command then ends with
            weights, averages and optimizers bitwise as uninterrupted, with the same log and no
            temporary file.
signal      SIGINT or SIGTERM at a random moment, half of them at the last step of a stage or later.
            Exit 130 without a traceback (0 where it came too late), no step that was logged is
            lost, and the same command then ends as for kill.
storage     An error of the storage (full, read-only, denied, I/O, too many files) at a random file
            operation, once or from there on, or a limit on the size of files. The command ends with
            one line and exit 2, or goes on; without the fault, it then ends as for kill.
checkpoint  A damaged or hostile vae.pt or lm.pt is refused in one line, or loads the same weights.
shard       A damaged shard or index of latents: training is refused in one line, or ends bitwise.
config      A hostile value in a config is refused in one line, or reads back from its dump.
manifest    A hostile line of a manifest is refused in one line, or loads, written and read again.
nan         A loss that is NaN or infinite for 1 to 14 steps: exit 0 or one line and 1, and no
            checkpoint holds a weight that is not finite. Every other time a latent of sample.py:
            one line and exit 1, and what was written is a whole wav of finite audio, or nothing.

No trial survives with a traceback, a hang (60 s) or a message of more than 600 characters.
"""
import argparse
import contextlib
import errno
import functools
import glob
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from multiprocessing import Process

import soundfile as sf
import torch

import sample
import stages
from calm import CALM
from cli import Parser, atomic, cli, number, write_file
from config import dump, load, open_run
from data import load_manifest, write_manifest
from tests.faults import mutate
from tests.faults.trials import (STAGES, Child, Home, complaint, fail_at, generator, kill_at,
                                 limit_files, rows)

ERRORS = [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO, errno.EMFILE]


# ---------------------------------------------------------------- trainings

def finish(home, stage):
    """The same command again, without a fault -> what is wrong with its end."""
    status, screen = home.train(stage)
    return complaint(status, screen, [0]) or home.difference(stage)


def kill(homes, seed):
    r = generator("kill", seed)
    home = homes(2 if seed % 3 == 2 else 1)
    stage = r.choice(home.stages)
    home.reset(stage)
    if r.random() < 0.5:
        at = some_operation(r, home.operations[stage])
        done = r.random() < 0.5
        children = home.start(stage, lambda: kill_at(home.out, at, done))
        end_all(children, children[0].wait())
    else:
        children = home.start(stage)
        time.sleep(r.uniform(0, home.seconds[stage]))
        end_all(children, None)
    return finish(home, stage)


def some_operation(r, count):
    """The number of a file operation: of all, or of the last ones, since a corpus has many."""
    return r.randint(1 if r.random() < 0.5 else max(1, count - 40), count)


def end_all(children, first):
    """Kill the processes of a training, as torchrun does when one has died; `first`: the status of
    the first, which has ended already, or None.
    """
    for child in children[first is not None:]:
        os.kill(child.pid, signal.SIGKILL)
        child.wait()


def signals(homes, seed):
    r = generator("signal", seed)
    home = homes(2 if seed % 3 == 2 else 1)
    stage = r.choice(home.stages)
    home.reset(stage)
    share = r.uniform(0.6, 1.1) if r.random() < 0.5 else r.uniform(0, 1)
    children = home.start(stage)
    time.sleep(share * home.seconds[stage])
    for child in children:
        os.kill(child.pid, r.choice([signal.SIGINT, signal.SIGTERM]))
    for child in children:
        wrong = complaint(child.wait(), child.screen(), [130, 0])
        if wrong:
            return wrong

    # every step that was logged is in a checkpoint
    log = rows(home.out) if os.path.exists(f"{home.out}/log.jsonl") else []
    steps = [row["step"] for row in log if row["stage"] == stage]
    path = f"{home.out}/{stage}.pt"
    saved = torch.load(path, weights_only=True)["step"] if os.path.exists(path) else 0
    if steps and saved < max(steps):
        return f"{stage}: step {max(steps)} was logged, {saved} is saved"
    return finish(home, stage)


def storage(homes, seed):
    r = generator("storage", seed)
    home = homes(1)
    stage = r.choice(home.stages)
    home.reset(stage)
    if r.random() < 0.7:
        at = some_operation(r, home.operations[stage])
        code = r.choice(ERRORS)
        sticks = r.random() < 0.5
        prepare = lambda: fail_at(home.out, at, code, sticks)
    else:
        sizes = [os.path.getsize(path)
                 for path in glob.glob(f"{home.folder}/stages/{stage}/**/*.*", recursive=True)]
        # not below what the training prints: its screen is a file, too
        size = max(16_000, round(r.choice(sizes) * r.uniform(0, 1)))
        prepare = lambda: limit_files(size)
    status, screen = home.train(stage, prepare)
    return complaint(status, screen, [0, 2]) or finish(home, stage)


def nan(homes, seed):
    if seed % 2:
        return nan_in_a_sample(homes, seed)
    r = generator("nan", seed)
    home = homes(1)
    stage = r.choice(home.stages)
    home.reset(stage)
    first = r.randint(0, 11)
    value = r.choice([float("nan"), float("inf")])
    bad = range(first, first + r.choice([1, 3, 14]))
    status, screen = home.train(stage, lambda: poison_losses(bad, value))
    wrong = complaint(status, screen, [0, 1])
    return wrong or poisoned_weight(f"{home.out}/{stage}.pt")


def poison_losses(steps, value):
    """The losses of these steps are not finite in this process."""
    for trainer in (stages.VAEStage, stages.LMStage, stages.ConsistencyStage):
        original = trainer.__dict__.get("losses")
        if original is not None:
            trainer.losses = poisoned(original, steps, value)


def poisoned(losses, steps, value):
    def wrapped(self, batch, step, source):
        for name, loss, metrics in losses(self, batch, step, source):
            yield name, loss * value if step in steps else loss, metrics
    return wrapped


def poisoned_weight(path):
    """The first number of a checkpoint that is not finite, in words."""
    if not os.path.exists(path):
        return ""
    for name, tensor in tensors(torch.load(path, weights_only=True)):
        if tensor.is_floating_point() and not tensor.isfinite().all():
            return f"{path}: {name} is not finite"
    return ""


def tensors(value, name=""):
    """(name, tensor) of everything in a nested state."""
    if torch.is_tensor(value):
        yield name, value
    elif isinstance(value, dict):
        for key in value:
            yield from tensors(value[key], f"{name}.{key}")
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from tensors(item, f"{name}.{i}")


def nan_in_a_sample(homes, seed):
    r = generator("nan", seed)
    home = homes(1)
    home.reset("lm", finished=True)
    at = r.randint(0, 9)
    value = r.choice([float("nan"), float("inf")])
    path = f"{home.folder}/work/sample.wav"
    if os.path.exists(path):
        os.remove(path)
    stream = r.random() < 0.5
    arguments = ["sample.py", "--run", home.out, "--stage", "lm", "--text", "two", "--seconds",
                 "0.4", "--out", path] + ["--stream"] * stream
    child = Child(sample.main, arguments, f"{home.folder}/screen0",
                  lambda: poison_latents(at, value))
    wrong = complaint(child.wait(), child.screen(), [1])
    if wrong or not os.path.exists(path):
        return wrong
    wav, _ = sf.read(path)
    return "" if stream and len(wav) <= 640 * at and abs(wav).max(initial=0) < 0.9 else \
        f"{len(wav)} samples, peak {abs(wav).max(initial=0)}"


def poison_latents(at, value):
    """Latent number `at` that CALM generates in this process is not finite."""
    original = CALM.generate

    def generate(self, *arguments, **options):
        for i, (x, ended) in enumerate(original(self, *arguments, **options)):
            yield x * value if i == at else x, torch.zeros_like(ended)

    CALM.generate = generate


# ---------------------------------------------------------------- what is read

def checkpoint(homes, seed):
    r = generator("checkpoint", seed)
    home = homes(1)
    stage = r.choice(["vae", "lm"])
    path = f"{home.out}/{stage}.pt"
    home.reset("lm", finished=True)
    whole = weights(home.out)

    # its bytes, or its contents
    if r.random() < 0.5:
        with open(path, "rb") as f:
            _, data = mutate.mutate_bytes(f.read(), seed)
    else:
        _, data = mutate.mutate_checkpoint(path, seed)
    with open(path, "wb") as f:
        f.write(data)
    return read_in_child(home, lambda: weights(home.out),
                         lambda found: mutate.same_state(found, whole))


def weights(out):
    """The weights of a run's VAE and language model, as sample.py opens them."""
    _, vae, lm, _ = open_run(out, "lm")
    return {"vae": vae.state_dict(), "lm": lm.state_dict()}


def read_in_child(home, read, same):
    """mutate.outcome in a forked process, for what hangs or fills the memory -> what is wrong."""
    def main():
        outcome, text = mutate.outcome(read, same)
        print(outcome, text)

    child = Child(main, [], f"{home.folder}/screen0")
    status = child.wait()
    outcome = child.screen()
    if status == 0 and outcome.split()[-1:] and outcome.startswith(("refused", "harmless")):
        return ""
    return f"exit status {status}: {outcome[-300:]!r}"


def shard(homes, seed):
    r = generator("shard", seed)
    home = homes(1)
    home.reset("lm", finished=True)
    os.remove(f"{home.out}/lm.pt")
    files = sorted(glob.glob(f"{home.out}/latents/*/*"))
    path = r.choice(files)
    with open(path, "rb") as f:
        _, data = mutate.mutate_bytes(f.read(), seed)
    with open(path, "wb") as f:
        f.write(data)
    status, screen = home.train("lm")
    if status == 2:
        return complaint(status, screen, [2])
    return complaint(status, screen, [0]) or home.difference("lm")


def config(homes, seed):
    home = homes(1)
    path = f"{home.folder}/work/hostile.toml"
    with open(path, "w") as f:
        f.write(mutate.mutate_config(load(home.config), seed))

    def reads_back(cfg):
        with atomic(path) as temp, open(temp, "w") as f:
            f.write(dump(cfg))
        return repr(load(path)) == repr(cfg)

    return read_in_child(home, lambda: load(path), reads_back)


def manifest(homes, seed):
    home = homes(1)
    path = f"{home.folder}/work/hostile.jsonl"
    shutil.copy(sorted(glob.glob(f"{home.folder}/stages/vae/toy/wav/*"))[0],
                f"{home.folder}/work/a.wav")
    with open(path, "w") as f:
        f.write(mutate.mutate_manifest(seed) + "\n")

    def reads_back(clips):
        write_manifest(path, clips)
        return repr(load_manifest(path)) == repr(clips)

    return read_in_child(home, lambda: load_manifest(path), reads_back)


# ---------------------------------------------------------------- the campaign

KINDS = {"kill": kill, "signal": signals, "storage": storage, "nan": nan, "shard": shard,
         "checkpoint": checkpoint, "config": config, "manifest": manifest}
# trials of a kind in each round: what takes milliseconds comes more often
SHARE = {"kill": 5, "shard": 3, "checkpoint": 12, "config": 14, "manifest": 6}


def homes_in(folder, names):
    """The Home of 1 or 2 processes with these stages, made when it is first asked for."""
    @functools.cache
    def homes(processes):
        return Home(f"{folder}/{processes}", names, processes)
    return homes


@contextlib.contextmanager
def own_folder():
    """A temporary folder that only the process that made it removes: a child that is interrupted
    before it has let go of its parent's frames took the folder of all trials with it.
    """
    owner = os.getpid()
    folder = tempfile.mkdtemp()
    try:
        yield folder
    finally:
        if os.getpid() == owner:
            shutil.rmtree(folder, ignore_errors=True)


def campaign(a, seed):
    """Run trials of all kinds in turn, from `seed` on in steps of a.workers.

    -> {kind: [what was wrong with each trial, "" = survived]}.
    """
    end = time.monotonic() + 60 * a.minutes
    found = {kind: [] for kind in a.kind}
    with own_folder() as folder:
        homes = homes_in(folder, a.stages)
        while time.monotonic() < end and any(len(wrong) < a.trials for wrong in found.values()):
            for kind in a.kind:
                for _ in range(min(SHARE.get(kind, 1), a.trials - len(found[kind]))):
                    one = seed + a.workers * len(found[kind])
                    wrong = KINDS[kind](homes, one)
                    found[kind].append(wrong)
                    if wrong:
                        print(f"{kind} {one}: {wrong}", flush=True)
    return found


def work(a, seed, path):
    """A worker's campaign, its findings in a file."""
    write_file(path, json.dumps(campaign(a, seed)))


def read(path):
    with open(path) as file:
        return file.read()


def parse():
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seed", type=number(int, 0), default=0, help="of the first trial of each kind")
    p.add_argument("--minutes", type=number(float, above=0), default=10.0, help="default: 10")
    p.add_argument("--trials", type=number(int, 1), default=10 ** 9,
                   help="of a kind and worker, at most")
    p.add_argument("--workers", type=number(int, 1, 64), default=2, help="processes; default: 2")
    p.add_argument("--kind", nargs="+", choices=KINDS, default=list(KINDS), help="default: all")
    p.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES,
                   help="of the trainings, in order; default: all")
    return p.parse_args()


def main():
    a = parse()
    torch.set_num_threads(1)
    with own_folder() as folder:
        # results in files: a pool's queue does not survive what happens to a worker's children
        files = [f"{folder}/{seed}.json" for seed in range(a.seed, a.seed + a.workers)]
        workers = [Process(target=work, args=(a, a.seed + i, path)) for i, path in enumerate(files)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        parts = [json.loads(read(path)) for path in files]

    print(f"{'':12s}{'tried':>8s}{'survived':>10s}")
    found = {kind: [text for part in parts for text in part[kind]] for kind in a.kind}
    for kind, wrong in found.items():
        print(f"{kind:12s}{len(wrong):8d}{wrong.count(''):10d}")
    if any(text for wrong in found.values() for text in wrong):
        sys.exit(1)


if __name__ == "__main__":
    cli(main)
