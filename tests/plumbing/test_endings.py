"""How a training ends: by a signal at any moment, by a failure, by numbers that are not finite; and
what the next start finds. Nothing is lost, and one line says what happened.

Trainings run in forks of this process, where a test may wrap any function of the program: a signal
then comes at exactly that call. Pictures are stubs, but where a test is about them.
"""
import contextlib
import errno
import fcntl
import glob
import math
import os
import re
import signal
import socket
import sys
import time
import types

import pytest
import torch

import cli
import locks
import runs
import signals
import stages
import train
from cli import BadInput
from config import load, load_checkpoint
from conftest import TINY, logged, write
from corpora import toy
from forks import before, no_picture, training

SMALL = (TINY.replace("clips = 24", "clips = 6").replace("valid_clips = 8", "valid_clips = 3")
         .replace('"lm", "consistency"', '"lm"').replace("steps = 12", "steps = 6")
         .replace("disc_start = 3", "disc_start = 1")
         .replace("save_every = 4", "save_every = 4\nvalid_every = 3"))


def signal_me(number=signal.SIGTERM):
    os.kill(os.getpid(), number)


def fail(*_, **__):
    raise OSError(errno.EIO, "the disk is on fire")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A small run, both stages -> its folder, which holds the run folder."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (status, _, errors), = training(folder, "--config", write(folder, SMALL))
    assert status == 0, errors
    return folder


def vae_only(folder, *arguments):
    """Arguments of a training of the VAE alone."""
    return ("--config", write(folder, SMALL), "--stages", "vae", *arguments)


# ---------------------------------------------------------------- signals

# (when, owner of the function, its name, which of its calls in that start), in the order in which
# one run meets them
MOMENTS = [
    ("while the corpus is made", toy, "write_clip", 3),
    ("while held-out clips are opened", stages, "load_audio", 1),
    ("before the first step", runs.Run, "resume", 1),
    ("in a step of the VAE", train, "gradients", 2),
    ("during a validation", stages.VAEStage, "reconstruct", 1),
    ("while a checkpoint is written", runs, "save_checkpoint", 1),
    ("in the last step", train, "gradients", 1),
    ("while the latents' statistics are measured", stages.VAEStage, "load_clip", 2),
    ("while the finished VAE is written", runs, "save_checkpoint", 1),
    ("during the last validation", stages.VAEStage, "reconstruct", 1),
    ("while a sample is written", stages, "save_audio", 3),
    ("while loss.png is drawn", runs, "draw_losses", 1),
    ("between two stages", stages.LMStage, "load_vae", 1),
    ("while the latents are made", stages.LMStage, "cache_latents", 2),
    ("in a step of the language model", train, "gradients", 4),
    ("while the language model generates", stages, "render", 2),
]


@pytest.fixture(scope="module")
def disturbed(tmp_path_factory):
    """One run that is stopped at each of MOMENTS and started again -> its folder, the ends."""
    folder = tmp_path_factory.mktemp("disturbed")
    config = write(folder, SMALL)
    ends = {}
    for i, (when, owner, name, call) in enumerate(MOMENTS):
        number = (signal.SIGTERM, signal.SIGINT)[i % 2]
        ends[when], = training(
            folder, "--config", config,
            prepare=lambda rank: before(owner, name, call, lambda: signal_me(number)))
    ends["end"], = training(folder, "--config", config)
    return folder, ends


@pytest.mark.parametrize("when", [moment[0] for moment in MOMENTS])
def test_a_signal_is_answered(disturbed, when):
    """Fault: signals behind the last step, between stages and while data are made were swallowed,
    or cost what was done since the last checkpoint.
    """
    status, printed, errors = disturbed[1][when]
    assert status == 130, errors
    assert "Traceback" not in errors
    assert len(re.findall("interrupted[,;] .*the same command goes on", printed + errors)) == 1


def test_a_run_that_signals_stopped_at_every_moment_ends_like_one_that_none_did(
        disturbed, undisturbed):
    folder, ends = disturbed
    assert ends["end"][0] == 0, ends["end"]
    assert logged(f"{folder}/run") == logged(f"{undisturbed}/run")
    for name in ("vae", "lm"):
        one, other = (load_checkpoint(f"{f}/run/{name}.pt") for f in (folder, undisturbed))
        assert one["done"] and other["done"]
        for part in ("model", "ema"):
            assert all(torch.equal(one[part][k], other[part][k]) for k in one[part]), (name, part)
    assert not glob.glob(f"{folder}/run/*.todo")
    samples = [sorted(os.listdir(f"{f}/run/samples")) for f in (folder, undisturbed)]
    assert samples[0] == samples[1]


def test_no_step_is_lost_to_a_signal(tmp_path):
    """The third step is under way: it is finished, and saved."""
    training(tmp_path, *vae_only(tmp_path),
             prepare=lambda rank: before(train, "gradients", 3, signal_me))
    assert load_checkpoint(f"{tmp_path}/run/vae.pt")["step"] == 3


def test_a_second_signal_ends_the_process_at_once(tmp_path):
    def prepare(rank):
        before(train, "gradients", 3, lambda: (signal_me(signal.SIGINT), signal_me()))
    (status, *_), = training(tmp_path, *vae_only(tmp_path), prepare=prepare)
    assert status == -signal.SIGTERM
    assert not os.path.exists(f"{tmp_path}/run/vae.pt")


def test_a_signal_to_one_of_two_processes_stops_both_behind_the_same_step(tmp_path):
    """Fault: one process stopped, and the other died of its closed connection."""
    def prepare(rank):
        if rank == 1:
            before(train, "gradients", 2, signal_me)
    ends = training(tmp_path, *vae_only(tmp_path), prepare=prepare, world=2)
    assert [status for status, *_ in ends] == [130, 130], ends
    assert "Traceback" not in ends[0][2] + ends[1][2]
    assert load_checkpoint(f"{tmp_path}/run/vae.pt")["step"] == 2


@pytest.mark.parametrize("owner, name", [(stages.VAEStage, "reconstruct"), (toy, "write_clip")])
def test_two_processes_are_stopped_while_one_works_and_the_other_waits(tmp_path, owner, name):
    """As torchrun does it: both get the signal."""
    pids = f"{tmp_path}/pids"

    def signal_both():
        [other] = set(open(pids).read().split()) - {str(os.getpid())}
        os.kill(int(other), signal.SIGTERM)
        time.sleep(0.2)                                 # it may leave first
        signal_me()

    def prepare(rank):
        with open(pids, "a") as f:
            f.write(f"{os.getpid()} ")
        if rank == 0:
            before(owner, name, 2, signal_both)
    ends = training(tmp_path, *vae_only(tmp_path, "--train.vae.valid_every", "0"),
                    prepare=prepare, world=2)
    assert [status for status, *_ in ends] == [130, 130], ends
    assert ends[1][2] == "" and "Traceback" not in ends[0][2]


def test_a_process_whose_neighbour_has_ended_says_so_in_a_line(tmp_path):
    """Fault: a traceback of gloo."""
    def prepare(rank):
        if rank == 0:
            before(toy, "write_clip", 2, lambda: os._exit(9))
    _, (status, _, errors) = training(tmp_path, *vae_only(tmp_path), prepare=prepare, world=2)
    assert status == 1
    assert errors == "another process of this training has ended, and this one with it\n"


# ---------------------------------------------------------------- failures

def test_pictures_that_cannot_be_drawn_cost_neither_training_nor_sounds(tmp_path):
    """Fault: without matplotlib the last steps of every stage were lost, with a traceback."""
    def prepare(rank):
        before(runs, "draw_spectrograms", 1, lambda: fail())
        runs.draw_losses = fail
    arguments = vae_only(tmp_path, "--train.vae.valid_every", "0")
    out = f"{tmp_path}/run"
    (status, printed, errors), = training(tmp_path, *arguments, prepare=prepare)
    assert (status, errors.count("Traceback")) == (0, 0)
    assert "vae: samples failed (OSError: [Errno 5] the disk is on fire)" in printed
    assert load_checkpoint(f"{out}/vae.pt")["done"]
    assert len(glob.glob(f"{out}/samples/*_reconstruction.wav")) == 2
    assert not glob.glob(f"{out}/samples/*.png")

    # the next start makes them up, once
    rows = logged(out)
    (status, printed, _), = training(tmp_path, *arguments)
    assert status == 0 and "which are made now" in printed
    assert len(glob.glob(f"{out}/samples/*.png")) == 2 and os.path.exists(f"{out}/loss.png")
    assert logged(out) == rows
    (_, printed, _), = training(tmp_path, *arguments)
    assert "vae: finished before, skipped" in printed


def test_a_validation_that_fails_does_not_end_the_training(undisturbed, tmp_path):
    def prepare(rank):
        stages.VAEStage.validate = fail
    (status, printed, _), = training(tmp_path, *vae_only(tmp_path), prepare=prepare)
    assert status == 0 and printed.count("vae: validation failed") == 2
    one, other = (load_checkpoint(f"{f}/run/vae.pt")["model"] for f in (tmp_path, undisturbed))
    assert all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("killed", [False, True])
def test_an_error_in_a_process_that_makes_batches_costs_no_step(tmp_path, killed):
    """Step 2 cannot be read, or its process is killed for want of memory: step 1 is saved."""
    def prepare(rank):
        real = runs.Run.batches

        def batches(run, step):
            if step == 2 and killed:
                os.kill(os.getpid(), signal.SIGKILL)
            if step == 2:
                raise BadInput("gone.wav: no such audio file")
            return real(run, step)
        runs.Run.batches = batches
        torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.2
    (status, _, errors), = training(tmp_path, *vae_only(tmp_path, "--data.processes", "1"),
                                    prepare=prepare)
    assert (status, errors.count("\n")) == (2, 1), errors
    assert ("a process that makes batches has ended" if killed else "gone.wav") in errors
    assert load_checkpoint(f"{tmp_path}/run/vae.pt")["step"] >= 1


def test_a_held_out_file_that_cannot_be_read_is_named_before_anything_is_trained(tmp_path):
    """Fault: the first validation found it, hours later."""
    toy.make(load(write(tmp_path, SMALL)).toy, tmp_path / "run" / "toy")
    [broken, *_] = sorted(glob.glob(f"{tmp_path}/run/toy/wav/valid*"))
    with open(broken, "wb") as f:
        f.write(b"RIFF")
    (status, printed, errors), = training(tmp_path, *vae_only(tmp_path))
    assert status == 2 and os.path.basename(broken) in errors and "vae 1/" not in printed


def test_a_checkpoint_that_cannot_be_written_is_tried_once_and_one_line(tmp_path):
    def prepare(rank):
        def full(*_):
            raise BadInput("vae.pt: could not be written")
        runs.save_checkpoint = full
    (status, printed, errors), = training(tmp_path, *vae_only(tmp_path), prepare=prepare)
    assert (status, errors) == (2, "error: vae.pt: could not be written\n")
    assert "failed" not in printed


# ---------------------------------------------------------------- what is not finite

def opened(folder, *overrides):
    """A Run of the VAE with its trainer, not yet begun, in this process."""
    cfg = load(write(folder, SMALL), ["--stages", "vae", *overrides])
    os.makedirs(f"{cfg.out}/samples", exist_ok=True)
    runtime = train.Runtime(cfg)
    clips, valid = train.corpus(cfg, runtime)
    torch.manual_seed(0)
    return runs.Run(stages.VAEStage(cfg, runtime, clips, valid, "vae"), "vae", cfg, runtime)


def spoil(trainer, steps):
    """Let the loss be NaN at these steps, after the forward pass has run."""
    real = trainer.losses
    trainer.losses = lambda batch, step, source: (
        (name, loss * (math.nan if step in steps else 1), metrics)
        for name, loss, metrics in real(batch, step, source))


def test_codebooks_and_balancer_do_not_take_a_skipped_step(tmp_path):
    """Fault: the forward pass of a step that was then skipped had moved both."""
    ends = []
    for steps in ("2", "3"):
        os.mkdir(tmp_path / steps)
        run = opened(tmp_path / steps, "--vae.bottleneck", "rvq", "--gan.balance", "0.9",
                     "--gan.loss_weights", "{mel = 1.0, time = 1.0, commit = 0.1}",
                     "--train.vae.steps", steps)
        spoil(run.trainer, {2})
        with contextlib.suppress(FloatingPointError):
            train.train(run.trainer, "vae", run.cfg, run.runtime)
        ends.append(load_checkpoint(run.path))
    assert [end["step"] for end in ends] == [2, 2]
    assert sum(k.endswith((".counts", "balancer.norms")) for k in ends[0]["model"]) == 2
    for part in ("model", "ema"):
        changed = [k for k in ends[0][part] if not torch.equal(ends[0][part][k], ends[1][part][k])
                   and "latent_" not in k]
        assert changed == []


def test_a_stage_whose_last_steps_were_skipped_is_not_done(tmp_path):
    """Fault: it was, and the next stage was trained on it."""
    run = opened(tmp_path)
    spoil(run.trainer, {4, 5})
    with pytest.raises(FloatingPointError, match="last 2 steps were not finite.*holds step 4"):
        train.train(run.trainer, "vae", run.cfg, run.runtime)
    state = load_checkpoint(run.path)
    assert (state["step"], state["done"]) == (4, False)


def test_a_run_that_diverges_keeps_its_last_good_step_and_goes_on_with_a_lower_rate(tmp_path):
    """Fault: the steps after the last checkpoint were lost, with a traceback."""
    arguments = vae_only(tmp_path, "--train.vae.steps", "14", "--train.vae.valid_every", "0")

    def prepare(rank):
        real = stages.VAEStage.losses
        stages.VAEStage.losses = lambda self, batch, step, source: (
            (name, loss * (math.nan if step >= 3 else 1), metrics)
            for name, loss, metrics in real(self, batch, step, source))
    (status, _, errors), = training(tmp_path, *arguments, prepare=prepare)
    assert (status, errors.count("\n")) == (1, 1), errors
    assert "ten steps in a row" in errors and "holds step 3" in errors
    assert "--train.vae.lr 0.0005" in errors
    assert load_checkpoint(f"{tmp_path}/run/vae.pt")["step"] == 3

    (status, printed, errors), = training(tmp_path, *arguments, "--train.vae.lr", "0.0005")
    assert status == 0, errors
    assert "trained with lr = 0.001 to step 3, and resumes with 0.0005" in printed
    assert "resuming at step 3" in printed
    assert load_checkpoint(f"{tmp_path}/run/vae.pt")["done"]


@pytest.mark.parametrize("part", ["weights", "average", "moments", "balancer"])
def test_what_is_not_finite_never_replaces_a_good_checkpoint(tmp_path, part):
    """Fault: a diverging run overwrote its last good checkpoint."""
    run = opened(tmp_path, "--gan.balance", "0.9")
    run.step = 4
    for p in run.trainer.model.parameters():
        p.grad = torch.zeros_like(p)
    for optimizer in run.optimizers.values():
        optimizer.step()
    run.save()
    good = open(run.path, "rb").read()

    poisoned = {"weights": next(run.trainer.model.vae.parameters()),
                "average": next(iter(run.ema.state.values())),
                "moments": next(t for _, t in runs.named_tensors(run.tensors()["optimizers"])
                                if t.dim() > 1),
                "balancer": run.trainer.model.balancer.norms}[part]
    run.step = 5
    with torch.no_grad():
        poisoned.view(-1)[-1] = math.inf if part == "balancer" else math.nan
    with pytest.raises(FloatingPointError, match="is not finite after step 5.*holds step 4"):
        run.save()
    run.keep()
    assert open(run.path, "rb").read() == good


def test_the_first_tensor_that_is_not_finite_is_named():
    state = {"step": 3, "model": {"a": torch.ones(2), "n": torch.ones(2, dtype=torch.long)},
             "optimizers": {"vae": [torch.full((3,), 3e38) * torch.tensor([1, -1, 1])]}}
    assert runs.first_not_finite(state) == ""
    state["optimizers"]["vae"].append(torch.tensor([0.0, -math.inf]))
    assert runs.first_not_finite(state) == "optimizers.vae.1"


# ---------------------------------------------------------------- one owner

def test_the_second_training_says_who_holds_the_run_folder(tmp_path):
    os.makedirs(f"{tmp_path}/run")
    with locks.owned(f"{tmp_path}/run", "another training writes to it"):
        (status, _, errors), = training(tmp_path, *vae_only(tmp_path))
    assert status == 2
    assert re.search(rf"another training writes to it \(process {os.getpid()} on \S+ since 20",
                     errors)


def test_a_lock_whose_process_is_dead_is_taken_over(tmp_path):
    pid = os.fork()
    if pid == 0:
        with locks.owned(tmp_path, "a test writes to it"):
            os._exit(0)
    os.waitpid(pid, 0)
    assert open(tmp_path / ".lock").read().startswith(f"process {pid} on ")
    with locks.owned(tmp_path, "a test writes to it"):
        assert open(tmp_path / ".lock").read().startswith(f"process {os.getpid()} on ")


def test_a_second_process_waits_for_the_corpus_and_finds_it_made(tmp_path):
    """Fault: the second one deleted the wavs of the first."""
    cfg = load(write(tmp_path, SMALL)).toy
    pid = os.fork()
    if pid == 0:
        before(toy, "write_clip", 1, lambda: (open(tmp_path / "begun", "w"), time.sleep(0.3)))
        toy.make(cfg, tmp_path / "toy")
        os._exit(0)
    while not os.path.exists(tmp_path / "begun"):
        time.sleep(0.01)
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "write_corpus", lambda *_: pytest.fail("made twice"))
        patch.setattr(locks, "print", said.append, raising=False)
        toy.make(cfg, tmp_path / "toy")
    assert os.waitpid(pid, 0)[1] == 0
    assert len(glob.glob(f"{tmp_path}/toy/wav/*.wav")) == cfg.clips + cfg.valid_clips


def test_a_file_system_without_locks_is_told_and_used(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(fcntl, "flock", flock)
    said = []
    with locks.owned(tmp_path, "a test writes to it", say=said.append):
        pass
    assert len(said) == 1 and "has no locks (No locks available)" in said[0]


def test_a_row_that_the_log_could_not_take_is_written_before_its_step_is_saved(tmp_path,
                                                                               monkeypatch):
    """Fault: the disk refused one row, the step was saved, and its row was lost for good."""
    run = runs.Run.__new__(runs.Run)
    run.runtime = types.SimpleNamespace(rank=0)
    run.cfg = types.SimpleNamespace(out=str(tmp_path))
    run.name = "lm"
    run.unwritten = []

    def full(path, line):
        raise BadInput("no room")
    with monkeypatch.context() as m:
        m.setattr(runs, "append_line", full)
        with pytest.raises(BadInput):
            run.write(1, {"lm": 0.5})
    run.write_rows()
    assert (tmp_path / "log.jsonl").read_text() == '{"stage": "lm", "step": 1, "lm": 0.5}\n'
