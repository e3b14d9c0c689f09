"""Train: python train.py --config FILE [--section.key value ...] [--fresh] [--print]

One loop for all stages. A config names its stages in order; finished ones are skipped, an
interrupted one resumes where its last checkpoint was, with the same numbers as if it had never
stopped: a step is a pure function of (weights, optimizer, step number), because data are drawn from
(seed, step, row), and noise from (seed, step, first row of the micro-batch).

    clips ─► [vae]  waveform crops ─► VAE-GAN ─► vae.pt
                                                   │ encode all clips once ─► latents/
             [lm]   latents + text ─► CALM with a flow head ─► lm.pt
    [consistency]   the same weights, one-step objective ─► consistency.pt   (consistency if lm
                    was TrigFlow, which can also be the teacher; LSD if it was rectified_flow)
        [distill]   another run's model with guidance ─► a smaller backbone, distill.pt
      [audiocalm]   latents + text ─► AudioCALM, all kinds, block by block ─► audiocalm.pt
  [audiocalm_lsd]   the same weights, a block in 1 to 4 passes ─► audiocalm_lsd.pt

Several GPUs: torchrun --standalone --nproc_per_node=8 train.py --config ...
`batch` is the global batch: every process takes its share of the same rows, gradients are summed
once per step, the result is the same for any number of processes that share the micro-batches
evenly (8 rows in micro-batches of 2: 1, 2 or 4 processes; tests/plumbing/test_train.py).
Exceptions: gan.balance and the RVQ update running means once per micro-batch, so their results
differ a little.

    --out DIR               run folder (else the config's)
    --data.manifest M       train on your own audio: a manifest.jsonl or a folder
                            (python -m corpora.scan -h)
    --train.lm.steps 500    any other value of the config
    --fresh                 start over: delete this run's checkpoints, latents and log; with
                            --stages lm those of that stage alone
    --print                 show the resolved config and stop

A run folder: config.toml, log.jsonl, loss.png, vae.pt, lm.pt, consistency.pt, latents/, samples/.
Ctrl-C saves a checkpoint first. Exit status: 0 done, 2 your mistake (one line says which),
130 interrupted.
"""
import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import shutil
import signal
import sys
import time

from cli import check_packages

if __name__ == "__main__":
    check_packages()                # before the imports that need them

import torch
import torch.distributed as dist

import checks
import stages
from checkpoint import check_optimizer, load_checkpoint, load_weights
from cli import BadInput, Parser, append_line, clean_temps, cli, write_file
from config import (STAGES, dump, load, read_log, refuse_other_encoder, save_checkpoint,
                    saved_config, stage_seed, table_changes, vae_weights)
from corpora import toy
from data import load_clips, load_manifest
from optim import make_optimizers, schedule
from prefetch import Prefetch, Workers
from report import draw_losses


class Runtime:
    """Device, precision, compilation and processes, chosen once and printed."""

    def __init__(self, cfg):
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        device = self.choose_device(cfg)

        # Gradients of near-silent audio are full of denormal numbers, which x86 handles in
        # microcode: a VAE step on recordings took 0.82 s, and 0.32 s without them. Before any
        # worker starts.
        torch.set_flush_denormal(True)
        if cfg.threads:
            torch.set_num_threads(cfg.threads)

        # precision and compilation
        why = "chosen" if cfg.dtype != "auto" else "no bf16 here"
        self.bf16 = cfg.dtype == "bf16"
        if cfg.dtype == "auto" and device == "cuda" and torch.cuda.get_device_capability()[0] >= 8:
            self.bf16 = True
            why = "Ampere or newer"
        if device == "cuda":
            torch.set_float32_matmul_precision("high")       # TF32 in what stays fp32
        self.compile = cfg.compile == "yes" or cfg.compile == "auto" and device == "cuda"

        self.device = device
        if self.world > 1:
            self.join_processes(device)
        self.say(f"device {self.device} "
                 f"({'chosen' if cfg.device != 'auto' else 'best available'}), "
                 f"{'bf16' if self.bf16 else 'fp32'} ({why}), "
                 f"compile {'on' if self.compile else 'off'}, "
                 f"{self.world} process(es), {torch.get_num_threads()} CPU threads")

    def choose_device(self, cfg):
        available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
                     "cpu": True}
        if cfg.device == "auto":
            return next(name for name in available if available[name])
        if not available[cfg.device]:
            raise BadInput(f"device: '{cfg.device}' is not available here; use auto or cpu")
        return cfg.device

    def join_processes(self, device):
        """One process group; each process has a GPU of its own."""
        # a day: the others wait while the first process encodes the corpus
        dist.init_process_group("nccl" if device == "cuda" else "gloo",
                                timeout=datetime.timedelta(days=1))
        if device == "cuda":
            self.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(self.device)

    def say(self, text):
        if self.rank == 0:
            print(text, flush=True)

    def autocast(self):
        return torch.autocast(self.device.split(":")[0], torch.bfloat16, enabled=self.bf16)

    def to(self, batch):
        return {k: v.to(self.device, non_blocking=True) for k, v in batch.items()}

    def wait(self):
        """Until all processes are here."""
        if self.world > 1:
            dist.barrier()


# ---------------------------------------------------------------- one stage's run on disk

class EMA:
    """Averaged weights w̄ ← d w̄ + (1 - d) w, with d growing to its value over the first steps.

    Buffers are copied: an RVQ's codebooks are running means already, counts must not be averaged.
    """

    def __init__(self, module, decay):
        self.module = module
        self.decay = decay
        self.state = {k: v.detach().clone() for k, v in module.state_dict().items()}

    @torch.no_grad()
    def update(self, step):
        decay = min(self.decay, (1 + step) / (10 + step))
        current = self.module.state_dict()
        weights = [name for name, _ in self.module.named_parameters()]
        torch._foreach_lerp_([self.state[k] for k in weights],
                             [current[k].detach() for k in weights], 1 - decay)
        for k in current.keys() - set(weights):
            self.state[k].copy_(current[k])


@contextlib.contextmanager
def weights_of(module, state):
    """The module with other weights for a while, in eval mode, without gradients."""
    own = {k: v.detach().clone() for k, v in module.state_dict().items()}
    if state is not None:
        module.load_state_dict(state)
    module.eval()
    with torch.no_grad():
        yield module
    module.train()
    if state is not None:
        module.load_state_dict(own)


class Run:
    """One stage's training as the run folder sees it: its checkpoint, its rows of log.jsonl, its
    validation; and which rows of the global batch are this process's.

    trainer: an object of stages.py; name: the stage's, a key of config.STAGES.
    """

    def __init__(self, trainer, name, cfg, runtime):
        self.trainer = trainer
        self.name = name
        self.cfg = cfg
        self.runtime = runtime
        self.stage_cfg = getattr(cfg.train, name)
        self.path = f"{cfg.out}/{name}.pt"
        self.clips = checks.digest_of(trainer.batch.clips)
        self.split_batch()

        trainer.model.to(runtime.device).train()
        self.freeze()
        if self.stage_cfg.checkpoint:
            trainer.recompute_activations()
        self.optimizers = make_optimizers(trainer, self.stage_cfg, runtime.device,
                                          key=f"train.{name}.optimizer")
        self.ema = EMA(trainer.averaged, self.stage_cfg.ema) if self.stage_cfg.ema else None

    def split_batch(self):
        """Rows of a step that are this process's, and rows of one forward pass."""
        batch = self.stage_cfg.batch
        world = self.runtime.world
        if batch % world:
            raise BadInput(f"train.{self.name}.batch: {batch} rows cannot be shared by "
                           f"{world} processes")
        self.rows = batch // world
        self.micro = self.stage_cfg.micro_batch or self.rows
        if self.rows % self.micro:
            raise BadInput(f"train.{self.name}.micro_batch: {self.micro} does not divide the "
                           f"{self.rows} rows of a process")

        # rows of the global batch that each of this process's micro-batches holds
        first = self.runtime.rank * self.rows
        self.parts = [range(s, s + self.micro) for s in range(first, first + self.rows, self.micro)]

    def freeze(self):
        parts = dict(self.trainer.averaged.named_children())
        for part in self.stage_cfg.freeze:
            if part not in parts:
                raise BadInput(f"train.{self.name}.freeze: unknown '{part}'; "
                               f"valid: {', '.join(parts)}")
            parts[part].requires_grad_(False)

    def resume(self):
        """The first step to do: 0, or where the last checkpoint was, whose state is loaded."""
        first = 0
        if os.path.exists(self.path):
            first = self.load(self.path)
        elif self.stage_cfg.init:
            self.load_init(self.stage_cfg.init)
        if self.runtime.compile:
            # layers share one code object, and dynamo keeps at most 8 graphs of it: those of the
            # stage before must not count
            torch._dynamo.reset()
            self.trainer.compile()

        size = sum(p.numel() for p in self.trainer.model.parameters())
        self.runtime.say(
            f"{self.name}: {size / 1e6:.2f}M parameters, "
            f"{self.stage_cfg.steps} steps of {self.stage_cfg.batch} rows = "
            f"{self.runtime.world} process(es) x {self.rows // self.micro} micro-batch(es) "
            f"x {self.micro}" + (f"; resuming at step {first}" if first else ""))

        # what was logged after the checkpoint will come again
        if self.runtime.rank == 0:
            rows = [json.loads(line) for line in read_log(self.cfg.out)]
            write_log(self.cfg.out, [row for row in rows
                                     if row["stage"] != self.name or row["step"] <= first])
        self.logged_step = first
        self.logged_at = time.perf_counter()
        return first

    def load(self, path):
        """Go on from this stage's own checkpoint -> its step."""
        state = load_checkpoint(path, self.runtime.device)
        refuse_other_encoder(state, self.trainer.encoder, path, f"{self.cfg.out}/vae.pt")
        checks.note_changed_runtime(self.name, state, self.how(), self.runtime.say)
        if state["ema"]:
            load_weights(self.trainer.averaged, state["ema"], path)      # do they fit?
        load_weights(self.trainer.model, state["model"], path)
        self.trainer.check_loaded(path)
        for key, optimizer in self.optimizers.items():
            try:
                optimizer.load_state_dict(state["optimizers"][key])
                check_optimizer(optimizer, path)
            except (ValueError, KeyError, TypeError, AttributeError) as e:      # other groups
                raise BadInput(f"{path}: holds the optimizer of another version of this code "
                               f"({e}); finish it with that one, or begin again with --fresh"
                               ) from e
        if self.ema:
            self.ema.state = state["ema"] or EMA(self.trainer.averaged, self.stage_cfg.ema).state
        return state["step"]

    def how(self):
        """What of this run's processes decides its noise and rounding, for the checkpoint."""
        return {"dtype": "bf16" if self.runtime.bf16 else "fp32",
                "rows of a forward pass": self.micro}

    def load_init(self, path):
        """Begin with the weights of another checkpoint (train.STAGE.init)."""
        state = load_checkpoint(path, self.runtime.device)
        weights = vae_weights(state) if self.name == "vae" else state["ema"] or state["model"]
        load_weights(self.trainer.averaged, weights, path)
        self.trainer.check_loaded(path)
        if self.ema:
            self.ema = EMA(self.trainer.averaged, self.stage_cfg.ema)
        self.runtime.say(f"{self.name}: starts from {path} ({state['step']} steps)")

        # the same shapes may mean something else
        for old, new in table_changes(saved_config(state, path), self.cfg, "vae"):
            self.runtime.say(f"{self.name}: {path} was trained with [vae] {old}, here {new}")
        if state.get("encoder", "") not in ("", self.trainer.encoder):
            self.runtime.say(f"{self.name}: {path} was trained on the latents of another VAE")

    def batches(self, step):
        """This process's micro-batches of a step, one for each of self.parts."""
        return [self.trainer.batch(step, rows) for rows in self.parts]

    def feed(self, first):
        """An iterator of the batches from step `first` on, made ahead; to be closed."""
        processes = self.cfg.data.processes
        if processes:
            pin = self.runtime.device.startswith("cuda")
            return Workers(self.batches, first, self.stage_cfg.steps, processes, pin)
        return Prefetch(self.batches, first, stop=self.stage_cfg.steps)

    def log(self, step, figures):
        """One row of log.jsonl and one line on the screen."""
        now = time.perf_counter()
        speed = (step - self.logged_step) / (now - self.logged_at)
        self.logged_step = step
        self.logged_at = now

        figures = {k: round(float(v), 5) for k, v in figures.items()}
        self.write(step, {**figures, "steps_per_second": round(speed, 2)})
        shown = " ".join(f"{k} {v:.3f}" for k, v in figures.items()
                         if "loss_" not in k and "grad" not in k)
        left = (self.stage_cfg.steps - step) / speed
        self.runtime.say(f"{self.name} {step}/{self.stage_cfg.steps} | {shown} | "
                         f"{speed:.1f} steps/s | eta {int(left // 60)}:{int(left % 60):02d}")

    def write(self, step, figures):
        if self.runtime.rank == 0:
            append_line(f"{self.cfg.out}/log.jsonl",
                        json.dumps({"stage": self.name, "step": step, **figures}))

    def validate(self, step):
        """Held-out figures with the averaged weights; the stage renders samples too.

        Eager: every length of a clip or cache would be compiled anew, 10 s each.
        """
        if self.runtime.rank != 0:
            return
        with (weights_of(self.trainer.averaged, self.ema and self.ema.state) as module,
              torch.compiler.set_stance("force_eager")):
            found = self.trainer.validate(module, step)
        self.write(step, {k: round(v, 5) for k, v in found.items()})
        self.runtime.say(f"{self.name} {step}/{self.stage_cfg.steps} | "
                         + " ".join(f"{k} {v:.4f}" for k, v in found.items()))

    def save(self, step, done=False):
        if self.runtime.rank == 0:
            optimizers = {k: optimizer.state_dict() for k, optimizer in self.optimizers.items()}
            save_checkpoint(self.path, {"stage": self.name, "step": step, "done": done,
                                        "clips": self.clips,
                                        "encoder": self.trainer.encoder,
                                        "runtime": self.how(),
                                        "config": dataclasses.asdict(self.cfg),
                                        "seen": self.trainer.batch.seen,
                                        "model": self.trainer.model.state_dict(),
                                        "ema": self.ema.state if self.ema else None,
                                        "optimizers": optimizers})

    def finish(self):
        """The stage's last measurements, validation, checkpoint and picture."""
        with (weights_of(self.trainer.averaged, self.ema and self.ema.state) as module,
              torch.compiler.set_stance("force_eager")):
            self.trainer.finish(module)
            if self.ema:
                self.ema.state = {k: v.detach().clone() for k, v in module.state_dict().items()}
        self.validate(self.stage_cfg.steps)
        self.save(self.stage_cfg.steps, done=True)
        if self.runtime.rank == 0:
            draw_losses(self.cfg.out)
        self.runtime.wait()


def write_log(out, rows):
    """log.jsonl with these rows alone."""
    write_file(f"{out}/log.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


# ---------------------------------------------------------------- the loop

def train(trainer, name, cfg, runtime):
    """Run one stage to its end; resume from cfg.out/<name>.pt if it is there."""
    run = Run(trainer, name, cfg, runtime)
    stage_cfg = run.stage_cfg
    seed = stage_seed(cfg.seed, name)
    first = run.resume()
    skipped = 0                                        # steps in a row that were not finite

    with contextlib.closing(run.feed(first)) as feed, stop_signals() as stop:
        for step in range(first, stage_cfg.steps):
            # learning rate: linear warm-up, cosine decay
            for key, optimizer in run.optimizers.items():
                peak = stage_cfg.lr
                if key == "disc" and stage_cfg.disc_lr:
                    peak = stage_cfg.disc_lr
                for group in optimizer.param_groups:
                    group["lr"] = peak * schedule(stage_cfg, step)
                optimizer.zero_grad(set_to_none=True)

            # a file that can no longer be read must not cost the steps since the last checkpoint
            try:
                batches = list(zip(run.parts, next(feed), strict=True))
            except BadInput:
                if step > first:
                    run.save(step)
                raise

            # forward and backward over this process's micro-batches, summed over processes
            figures = gradients(trainer, batches, step, runtime, seed, stage_cfg.batch)
            figures |= clip_gradients(trainer, run.optimizers, stage_cfg.grad_clip)

            # a step that is not finite is skipped, ten in a row stop the run
            if all_finite(figures, runtime.device):
                skipped = 0
                for optimizer in run.optimizers.values():
                    optimizer.step()
            else:
                skipped += 1
                report_skip(name, step, skipped, figures, runtime)
            if run.ema:
                run.ema.update(step)

            # once in a while: log, validate, save
            done = step + 1
            last = done == stage_cfg.steps
            if last or done % stage_cfg.log_every == 0:
                run.log(done, figures)
            if stage_cfg.valid_every and done % stage_cfg.valid_every == 0 and not last:
                run.validate(done)
            if stop or done % stage_cfg.save_every == 0 and not last:
                run.save(done)
            if stop:
                runtime.say(f"{name}: interrupted, {run.path} holds step {done}; "
                            "the same command goes on from there")
                sys.exit(130)
    run.finish()


@contextlib.contextmanager
def stop_signals():
    """A list that is empty until Ctrl-C or SIGTERM; a second one ends the process at once."""
    stop = []

    def on_signal(number, _):
        stop.append(number)
        signal.signal(number, signal.SIG_DFL)

    before = {s: signal.signal(s, on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def seed_for(seed, step, row):
    """Noise of a micro-batch: a function of the global step and its first global row."""
    return ((seed * 1_000_003 + step) * 1_000_003 + row) & 0x7FFF_FFFF_FFFF_FFFF


def gradients(trainer, batches, step, runtime, seed, total):
    """Fill .grad with the gradient of the mean loss over the global batch; return the metrics:
    means over the batch, or the largest value where the name ends in _max.

    The loss of a micro-batch is a mean over its positions and weighs as its rows do: where rows are
    of different length, positions of a short micro-batch weigh more than those of a long one.
    batches: [(rows, batch), ...] this process's micro-batches; total: rows of the global batch.
    """
    sums = {}
    maxima = {}                                          # of metrics named ..._max
    for rows, batch in batches:
        torch.manual_seed(seed_for(seed, step, rows.start))
        share = len(rows) / total
        with runtime.autocast():
            for name, loss, metrics in trainer.losses(runtime.to(batch), step):
                # what is fp32 in the forward pass stays so in the backward pass
                with torch.autocast(runtime.device.split(":")[0], enabled=False):
                    (loss * share).backward()
                for key, value in ({name: loss.detach()} | metrics).items():
                    if key.endswith("_max"):
                        maxima[key] = torch.maximum(maxima.get(key, value), value)
                    else:
                        sums[key] = sums.get(key, 0.0) + value * share

    # one sum over processes for all gradients and metrics
    if runtime.world > 1:
        grads = [p.grad for p in trainer.model.parameters() if p.grad is not None]
        metrics = torch.stack([sums[k].float() for k in sums])
        flat = torch.cat([g.flatten() for g in grads] + [metrics])
        dist.all_reduce(flat)
        for g in grads:
            g.copy_(flat[:g.numel()].view_as(g))
            flat = flat[g.numel():]
        sums = dict(zip(sums, flat))
        for value in maxima.values():
            dist.all_reduce(value, dist.ReduceOp.MAX)
    return sums | maxima


def clip_gradients(trainer, optimizers, largest):
    """Scale each optimizer's gradient down to the norm `largest` -> {"grad_NAME": norm before}."""
    norms = {}
    for key in optimizers:
        parameters = [p for p in trainer.optimized[key].parameters() if p.grad is not None]
        norms[f"grad_{key}"] = (torch.nn.utils.clip_grad_norm_(parameters, largest)
                                if parameters else torch.zeros(()))
    return norms


def all_finite(figures, device):
    """Whether no figure is NaN or infinite: one wait for the device per step."""
    return bool(torch.stack([v.float().to(device) for v in figures.values()]).isfinite().all())


def report_skip(name, step, skipped, figures, runtime):
    """Say that a step was skipped; FloatingPointError with the figures at the tenth in a row."""
    if skipped == 10:
        raise FloatingPointError(
            f"{name}: ten steps in a row were not finite at step {step}: "
            + ", ".join(f"{k} {float(v):.3g}" for k, v in figures.items()))
    runtime.say(f"{name} {step}: loss or gradient is not finite, step skipped ({skipped} in a row)")


# ---------------------------------------------------------------- a run from its config

def corpus(cfg, runtime):
    """Training and held-out clips: the manifest's, or the toy corpus, made on first use."""
    if cfg.data.manifest:
        return load_clips(cfg.data)
    folder = f"{cfg.out}/toy"
    if runtime.rank == 0:
        toy.make(cfg.toy, folder, cfg.vae.sample_rate)
    runtime.wait()
    return tuple(load_manifest(f"{folder}/{part}.jsonl") for part in ("train", "valid"))


def start_over(out, names):
    """Delete what these stages left in the run folder; without its VAE, nothing there is worth
    anything.
    """
    names = STAGES if "vae" in names else names
    for name in names:
        if os.path.exists(f"{out}/{name}.pt"):
            os.remove(f"{out}/{name}.pt")
    rows = [json.loads(line) for line in read_log(out)]
    write_log(out, [row for row in rows if row["stage"] not in names])
    if "vae" in names:
        shutil.rmtree(f"{out}/latents", ignore_errors=True)


@contextlib.contextmanager
def locked(out, rank=0):
    """Keep other trainings out of the run folder. The first process asks for all."""
    if rank != 0 or os.name != "posix":
        yield
        return
    import fcntl
    with open(f"{out}/.lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(f"out: another training writes to {out}; wait for its end or use --out"
                           ) from None
        yield


def parse():
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
               allow_abbrev=False,
               usage="train.py --config FILE [--section.key value ...] [--fresh] [--print]")
    p.add_argument("--config", required=True, help="an experiment: configs/*.toml")
    p.add_argument("--fresh", action="store_true", help="start this run over")
    p.add_argument("--print", action="store_true", help="show the resolved config and stop")
    return p.parse_known_args()


def run_stages(cfg, runtime, fresh):
    """Check the corpus and what is in the run folder, then train what is not finished."""
    # data first: a mistake in it must not cost what --fresh deletes
    clips, valid = corpus(cfg, runtime)
    checks.announce_data(cfg, clips, valid, runtime.say)
    checks.refuse_missing_init(cfg, fresh)
    if fresh and runtime.rank == 0:
        start_over(cfg.out, cfg.stages)
    runtime.wait()                                     # nobody looks before the old ones are gone

    # what is there already must fit the config
    done = checks.check_checkpoints(cfg, clips, runtime.say)
    if runtime.rank == 0:
        write_file(f"{cfg.out}/config.toml", dump(cfg))

    for name in cfg.stages:
        if done[name]:
            runtime.say(f"{name}: finished before, skipped")
            continue
        torch.manual_seed(cfg.seed)
        trainer_class = getattr(stages, STAGES[name].trainer)
        train(trainer_class(cfg, runtime, clips, valid, name), name, cfg, runtime)


def main():
    arguments, overrides = parse()
    cfg = load(arguments.config, overrides)
    if arguments.print:
        print(dump(cfg), end="")
        return
    runtime = Runtime(cfg)
    try:
        os.makedirs(f"{cfg.out}/samples", exist_ok=True)
    except OSError as e:
        raise BadInput(f"out: {cfg.out} cannot be made ({e.strerror}); use --out") from None

    with locked(cfg.out, runtime.rank):
        if runtime.rank == 0:
            for folder, _, _ in os.walk(cfg.out):
                clean_temps(folder)
        run_stages(cfg, runtime, arguments.fresh)

    runtime.say(f"done: listen to {cfg.out}/samples/, look at {cfg.out}/loss.png")
    if runtime.world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    cli(main, outlives_screen=True)
