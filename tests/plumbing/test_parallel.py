"""Several processes train what one trains: DDP and FSDP2 on two gloo processes, every stage.

Forks of this process (forks.py). Rows of a forward pass over all processes are the same in each
comparison; noise belongs to the rows.
"""
import io
import os
import resource
import shutil
import signal
import types

import pytest
import torch

import parallel
import train
from checkpoint import load_checkpoint, newest_shards, stage_file
from cli import BadInput
from conftest import TINY, logged, write
from forks import before, training
from tools.convert import gather

ALL = TINY.replace('"consistency"]', '"consistency", "audiocalm", "audiocalm_lsd"]') \
    .replace("[train.vae]\n", "[train.vae]\noptimizer = \"adamw\"\n") \
    .replace("valid_clips = 8", "valid_clips = 3").replace("save_every = 4\n", "save_every = 3\n") \
    + "[train.audiocalm_lsd]\noptimizer = \"adamw\"\nsteps = 3\nbatch = 4\nlog_every = 1\n"
STAGES = ("vae", "lm", "consistency", "audiocalm", "audiocalm_lsd")


def run_all(folder, name, *options, world=1, text=ALL):
    """Train all stages in a run folder of this name -> the folder."""
    folder = f"{folder}/{name}"
    os.makedirs(folder, exist_ok=True)
    ends = training(folder, "--config", write(folder, text), *options, world=world)
    assert [status for status, *_ in ends] == [0] * world, ends
    return f"{folder}/run"


def difference(a, b, stage):
    """Largest differences of a stage's losses, which are logged with five digits, and of its last
    weights.
    """
    losses = [[row[stage] for row in logged(out) if row["stage"] == stage and stage in row]
              for out in (a, b)]
    assert len(losses[0]) == len(losses[1]) > 1
    weights = []
    for out in (a, b):
        state = load_checkpoint(f"{out}/{stage}.pt")
        weights.append(state["ema"] or state["model"])
    assert weights[0].keys() == weights[1].keys()
    apart = max((weights[0][k].double() - weights[1][k].double()).abs().max().item()
                for k in weights[0])
    return max(abs(a - b) for a, b in zip(*losses)), apart


def alike(a, b, stage, weights=1e-6):
    """Whether losses differ by at most a unit of the last digit in the log, and weights by less."""
    of_losses, of_weights = difference(a, b, stage)
    return of_losses < 1.5e-5 and of_weights < weights


def stages_after(base, folder, name):
    """A run folder `name` that has the VAE of another, and none of its language models."""
    ours = shutil.ignore_patterns("lm*", "consistency*", "audiocalm*", "log.jsonl")
    shutil.copytree(base, f"{folder}/{name}/run", ignore=ours)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process: all stages."""
    folder = str(tmp_path_factory.mktemp("alone"))
    return run_all(folder, "one")


def test_two_processes_under_ddp_train_what_one_trains(alone, tmp_path):
    """Faults: noise belonged to the micro-batch, and a mean over positions to a process."""
    vae = run_all(tmp_path, "vae", "--stages", '["vae"]', world=2)
    assert alike(alone, vae, "vae", weights=3e-5)
    stages_after(alone, tmp_path, "lm")
    lm = run_all(tmp_path, "lm", world=2)
    for stage in STAGES[1:]:
        assert alike(alone, lm, stage), stage


def test_two_processes_with_sharded_weights_train_what_one_trains(alone, tmp_path):
    """FSDP2, layers recomputed, two micro-batches per step and process, resumed twice."""
    micro = [word for stage in STAGES[1:] for word in (f"--train.{stage}.micro_batch", "2")]
    stages_after(alone, tmp_path, "one")
    one = run_all(tmp_path, "one", *micro, "--stages", '["lm", "audiocalm"]')

    stages_after(alone, tmp_path, "two")
    half = [word for word in micro]
    half[1::2] = ["1"] * (len(micro) // 2)
    recompute = ["--train.lm.checkpoint", "true", "--train.audiocalm.checkpoint", "true"]
    two = run_all(tmp_path, "two", *half, *recompute, "--train.shard", "true",
                  "--stages", '["lm", "audiocalm"]', world=2)
    for stage in ("lm", "audiocalm"):
        assert alike(one, two, stage), stage


# ---------------------------------------------------------------- sharded checkpoints

SHARDED = ["--stages", '["lm"]', "--train.shard", "true", "--sample.count", "0",
           "--train.lm.steps", "8"]


WHOLE = [word for word in SHARDED if word not in ("--train.shard", "true")]


def shards(out):
    return newest_shards(out, "lm")


def test_codebooks_and_balancer_are_those_of_all_processes(tmp_path):
    """Faults: the loss per level in use, and that of features, were ratios of a process's means."""
    options = ["--stages", '["vae"]', "--vae.bottleneck", "rvq", "--vae.codebooks", "3",
               "--vae.codebook_size", "16", "--gan.loss_weights.kl", "0",
               "--gan.loss_weights.commit", "0.25", "--gan.balance", "0.9",
               "--train.vae.steps", "8", "--sample.count", "0"]
    one = run_all(tmp_path, "one", *options)
    two = run_all(tmp_path, "two", *options, world=2)
    assert alike(one, two, "vae", weights=3e-5)


@pytest.fixture(scope="module")
def sharded(alone, tmp_path_factory):
    """Two processes that train the language model, sharded and never interrupted."""
    folder = str(tmp_path_factory.mktemp("sharded"))
    stages_after(alone, folder, "whole")
    return run_all(folder, "whole", *SHARDED, world=2)


def interrupted(alone, folder, name, step=5, act=lambda: os.kill(os.getpid(), signal.SIGTERM)):
    """The same, ended in the second process before this step -> (run folder, ends)."""
    stages_after(alone, folder, name)

    def prepare(rank):
        if rank == 1:
            before(train, "gradients", step + 1, act)
    folder = f"{folder}/{name}"
    ends = training(folder, "--config", write(folder, ALL), *SHARDED, world=2, prepare=prepare)
    return f"{folder}/run", ends


def test_of_a_plain_and_a_sharded_checkpoint_the_later_one_goes_on(tmp_path):
    """Fault: a kill between writing the shards and removing the plain file lost their steps."""
    (tmp_path / "lm.shards" / "step00000004").mkdir(parents=True)
    plain = tmp_path / "lm.pt"
    sharded = tmp_path / "lm.shards" / "step00000004" / "state.pt"
    assert stage_file(tmp_path, "lm") == str(plain)             # neither is there
    for path, later in ((plain, sharded), (sharded, plain)):
        for seconds, file in enumerate((path, later)):
            file.write_bytes(b"")
            os.utime(file, (seconds, seconds))
        assert stage_file(tmp_path, "lm") == str(later)


def test_a_sharded_training_resumes_exactly_on_as_many_processes(alone, sharded, tmp_path):
    out, ends = interrupted(alone, tmp_path, "run")
    assert [status for status, *_ in ends] == [130, 130], ends
    assert shards(out).endswith("step00000006") and not os.path.exists(f"{out}/lm.pt")
    run_all(tmp_path, "run", *SHARDED, world=2)
    assert difference(sharded, out, "lm") == (0.0, 0.0)
    assert not os.path.exists(f"{out}/lm.shards")               # a finished stage is one file


@pytest.mark.parametrize("world", [1, 4])
def test_a_sharded_training_resumes_on_another_number_of_processes(alone, sharded, tmp_path, world):
    out, _ = interrupted(alone, tmp_path, "run")
    shard = SHARDED if world > 1 else WHOLE
    run_all(tmp_path, "run", *shard, world=world)
    assert alike(sharded, out, "lm")


def test_a_plain_checkpoint_goes_on_sharded(alone, sharded, tmp_path):
    stages_after(alone, tmp_path, "run")

    def prepare(rank):
        before(train, "gradients", 6, lambda: os.kill(os.getpid(), signal.SIGTERM))
    folder = f"{tmp_path}/run"
    training(folder, "--config", write(folder, ALL), *WHOLE, prepare=prepare)
    run_all(tmp_path, "run", *SHARDED, world=2)
    assert alike(sharded, f"{folder}/run", "lm")


def test_a_killed_process_ends_the_others_and_the_last_shards_go_on(alone, sharded, tmp_path):
    out, ends = interrupted(alone, tmp_path, "run", act=lambda: os._exit(9))
    assert [status for status, *_ in ends] == [1, 9], ends
    assert shards(out).endswith("step00000003")
    run_all(tmp_path, "run", *SHARDED, world=2)
    assert difference(sharded, out, "lm") == (0.0, 0.0)


def test_shards_that_cannot_be_written_are_one_line_and_nothing_is_lost(alone, sharded, tmp_path):
    """As on a full disk: no file may grow beyond so many bytes."""
    out, _ = interrupted(alone, tmp_path, "run")
    before = shards(out)

    def prepare(rank):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    folder = f"{tmp_path}/run"
    ends = training(folder, "--config", f"{folder}/tiny.toml", *SHARDED, "--train.lm.save_every",
                    "1", world=2, prepare=prepare)
    assert [status for status, *_ in ends] == [2, 2], ends
    assert "cannot be written" in ends[0][2] and "Traceback" not in ends[0][2] + ends[1][2]
    assert shards(out) == before
    run_all(tmp_path, "run", *SHARDED, world=2)
    assert difference(sharded, out, "lm") == (0.0, 0.0)


def test_shards_that_are_damaged_are_refused_in_a_line(alone, tmp_path):
    out, _ = interrupted(alone, tmp_path, "run")
    path = f"{shards(out)}/__1_0.distcp"
    with open(path, "r+b") as file:
        file.seek(os.path.getsize(path) // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    folder = f"{tmp_path}/run"
    (status, _, errors), _ = training(folder, "--config", f"{folder}/tiny.toml", *SHARDED, world=2)
    assert status == 2 and errors.count("\n") == 1
    assert "damaged (__1_0.distcp)" in errors

    # the same without knowing the sum: a description of something else than tensors
    with pytest.raises(BadInput, match="asks for os.system"):
        parallel.Descriptions(io.BytesIO(b"cos\nsystem\n(S'true'\ntR.")).load()
    with pytest.raises(BadInput, match="asks for torch.distributed.checkpoint.filesystem.os.system"):
        parallel.Descriptions(io.BytesIO(
            b"\x80\x04\x8c\x27torch.distributed.checkpoint.filesystem\x8c\tos.system\x93.")).load()


def test_a_plain_run_can_be_gathered_from_shards(alone, tmp_path):
    out, _ = interrupted(alone, tmp_path, "run")
    with pytest.raises(BadInput, match="tools.convert gather"):
        load_checkpoint(f"{out}/lm.pt")
    gather.run(types.SimpleNamespace(weights=out, out=f"{tmp_path}/plain"))
    state = load_checkpoint(f"{tmp_path}/plain/lm.pt")
    assert (state["stage"], state["step"], state["done"]) == ("lm", 6, False)
    assert state["model"].keys() == state["ema"].keys() and state["model"]


def test_processes_on_a_cpu_compile_in_folders_of_their_own(monkeypatch):
    """Fault: one loaded a library that the other was still writing, "file too short"."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/x")
    train.use_own_compiler_cache(1)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/x/rank1"
