"""Train: python train.py --config FILE [--section.key value ...] [--fresh] [--print] [--plan]

One loop for all stages. A config names its stages in order; finished ones are skipped, an
interrupted one resumes where its last checkpoint was, with the same numbers as if it had never
stopped: a step is a pure function of (weights, optimizer, step number), because data and noise of a
row are drawn from (seed, step, row).

    clips ─► [vae]  waveform crops ─► VAE-GAN ─► vae.pt
                                                   │ encode all clips once ─► latents/
             [lm]   latents + text ─► CALM with a flow head ─► lm.pt
    [consistency]   the same weights, one-step objective ─► consistency.pt   (consistency if lm
                    was TrigFlow, which can also be the teacher; LSD if it was rectified_flow)
        [distill]   another run's model with guidance ─► a smaller backbone, distill.pt
      [audiocalm]   latents + text ─► AudioCALM, all kinds, block by block ─► audiocalm.pt
  [audiocalm_lsd]   the same weights, a block in 1 to 4 passes ─► audiocalm_lsd.pt

Several GPUs: torchrun --standalone --nproc_per_node=8 train.py --config ...
`batch` is the global batch: every process takes its share of the same rows, and the result is the
same for any number of processes (tests/plumbing/test_parallel.py). Gradients meet in torch's DDP,
or in FSDP2 with train.shard (parallel.py). How many rows all processes take in one forward pass
(micro_batch times processes) does matter a little: positions of a pass count equally, and
gan.balance and the RVQ move their running means once per pass.

    --out DIR               run folder (else the config's)
    --data.manifest M       train on your own audio: a manifest.jsonl or a folder
                            (python -m corpora.scan -h)
    --train.lm.steps 500    any other value of the config
    --from RUN              every stage begins with the weights of another run's (fine-tuning)
    --fresh                 start over: delete this run's checkpoints, latents and log; with
                            --stages lm those of that stage alone
    --print                 show the resolved config and stop
    --plan --gpus 16        what it needs on so many GPUs (memory, time, disk) and stop (plan.py);
                            --fit 80 chooses micro-batches and sharding for GPUs of 80 GB;
                            --measure times three steps of every stage on this machine

A run folder: config.toml, log.jsonl, report.html (to listen and look), loss.png, vae.pt, lm.pt,
consistency.pt, latents/, samples/.
Ctrl-C and SIGTERM save a checkpoint first. Exit status: 0 done, 1 the training diverged, 2 your
mistake (one line says which), 130 interrupted.
"""
import argparse
import contextlib
import datetime
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import replace

import signals
from cli import check_packages

if __name__ == "__main__":
    signals.listen()
    check_packages()                # before the imports that need them

import torch
import torch.distributed as dist

import checks
import stages
from checkpoint import exported_file, shards_folder, stage_file
from cli import BadInput, Parser, clean_temps, cli, number, write_file
from config import STAGES, dump, load, read_log, stage_seed
from corpora import toy
from data import load_clips, load_manifest
from locks import owned
from noise import Rows
from optim import make_optimizers, schedule
from parallel import Losses, clean_shards, last_pass
from plan import RandomRows, plan
from processes import whole
from runs import EMA, Run, todo_file, write_log
from trackers import open_tracker


def use_own_compiler_cache(rank):
    """A folder for this process's compiled kernels. In a common one a process may load a library
    that another is still writing: "file too short" (torch 2.13, on CPUs).
    """
    common = f"{tempfile.gettempdir()}/torchinductor_{os.getuid()}"
    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR", common)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/rank{rank}"


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
        if self.compile and self.world > 1 and device == "cpu":
            use_own_compiler_cache(self.rank)

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
        # a day: the others wait for the one that has the longest clips to encode
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
        """A batch on the device; what is no tensor stays on the host."""
        return {k: v.to(self.device, non_blocking=True) if torch.is_tensor(v) else v
                for k, v in batch.items()}

    def meet(self):
        """Until all processes are here, whatever signal comes."""
        if self.world > 1:
            dist.barrier()

    def wait(self):
        """Until all processes are here, for as long as one of them works; a signal ends it."""
        if self.world == 1:
            return
        work = dist.barrier(async_op=True)
        try:
            while not work.is_completed():
                if signals.asked():
                    raise signals.Interrupted(signals.STATUS)
                time.sleep(0.005)
            work.wait()
        except signals.Interrupted:
            signals.tell()
            sys.stdout.flush()
            os._exit(signals.STATUS)        # an orderly exit would wait for the barrier
        except RuntimeError:                # the connection to a process is closed
            if signals.asked():
                raise signals.Interrupted(signals.STATUS) from None
            raise SystemExit("another process of this training has ended, and this one with it"
                             ) from None

    def any_of(self, *flags):
        """For each flag, a bool or a tensor, whether it is true in any process; one wait for the
        device.
        """
        flags = torch.stack([torch.as_tensor(flag, device=self.device).float() for flag in flags])
        if self.world > 1:
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        found = [bool(flag) for flag in flags.tolist()]
        return found if len(found) > 1 else found[0]

    def over_processes(self, figures):
        """Metrics of all processes: their sums; what is named ..._max or grad_... is of all rows
        already, or the largest counts.
        """
        if self.world == 1:
            return figures
        largest = {k: v for k, v in figures.items() if k.endswith("_max") or k.startswith("grad_")}
        summed = {k: v for k, v in figures.items() if k not in largest}
        for group, operation in ((summed, dist.ReduceOp.SUM), (largest, dist.ReduceOp.MAX)):
            if group:
                values = torch.stack([v.float().to(self.device) for v in group.values()])
                dist.all_reduce(values, operation)
                figures = figures | dict(zip(group, values))
        return figures


# ---------------------------------------------------------------- the loop

def train(trainer, name, cfg, runtime):
    """Run one stage to its end; resume from cfg.out/<name>.pt if it is there."""
    run = Run(trainer, name, cfg, runtime)
    stage_cfg = run.stage_cfg
    seed = stage_seed(cfg.seed, name)
    first = run.resume()
    steps = first if run.done else stage_cfg.steps
    skipped = 0                                        # steps in a row that were not finite
    runtime.wait()
    if run.lacks_figures():
        run.show(first)

    # a signal stops all processes behind the same step
    with (signals.held(), contextlib.closing(run.feed(first)) as feed, run.kept_on_error()):
        for step in range(first, steps):
            # learning rate: linear warm-up, cosine decay
            for key, optimizer in run.optimizers.items():
                peak = stage_cfg.lr
                if key == "disc" and stage_cfg.disc_lr:
                    peak = stage_cfg.disc_lr
                for group in optimizer.param_groups:
                    group["lr"] = peak * schedule(stage_cfg, step)
                optimizer.zero_grad(set_to_none=True)

            # forward and backward over this process's micro-batches; gradients meet in DDP or FSDP
            batches = list(zip(run.parts, next(feed), strict=True))
            figures = gradients(run.losses, batches, step, runtime, seed, stage_cfg.batch)
            figures |= clip_gradients(trainer, run.optimizers, stage_cfg.grad_clip)
            run.meter.heard(runtime.world * sum(trainer.seconds(batch) for _, batch in batches))

            # a step that is not finite is skipped, ten in a row stop the run
            broken, stop = runtime.any_of(not_finite(figures, runtime.device), signals.asked())
            if broken:
                skipped += 1
                run.running.undo()
                report_skip(run, step, skipped, runtime.over_processes(figures))
            else:
                skipped = 0
                run.take(step)

            # once in a while: log, save, validate
            done = step + 1
            last = done == steps
            if last or done % stage_cfg.log_every == 0:
                run.log(done, runtime.over_processes(figures))
            if done % stage_cfg.save_every == 0:
                run.save()
            if stage_cfg.valid_every and done % stage_cfg.valid_every == 0 and not (last or stop):
                run.show(done)
                stop = runtime.any_of(signals.asked())
            if stop:
                run.save()
                runtime.say(f"{name}: interrupted, {run.path} holds step {run.step}; "
                            "the same command goes on from there")
                sys.exit(signals.STATUS)

        # the weights first, whatever comes
        run.save()
        if skipped:
            raise FloatingPointError(f"{name}: the last {skipped} steps were not finite; "
                                     + run.advice())

    if not run.done:
        run.finish()
    run.complete()


def seed_for(seed, step, row):
    """Noise of a row: a function of the step and of its place in the global batch; -1 for what all
    rows of a step share.
    """
    return ((seed * 1_000_003 + step) * 1_000_003 + row) & 0x7FFF_FFFF_FFFF_FFFF


def gradients(losses, batches, step, runtime, seed, total):
    """Fill .grad with the gradient of the mean loss over the global batch; return this process's
    part of the metrics: means over the batch, or the largest value where the name ends in _max.

    losses: parallel.wrap of the trainer; batches: this process's micro-batches,
    [(rows, batch), ...]; total: rows of the global batch. The loss of a micro-batch weighs as its
    rows do.
    """
    sums = {}
    maxima = {}                                          # of metrics named ..._max
    for i, (rows, batch) in enumerate(batches):
        source = Rows([seed_for(seed, step, row) for row in rows], seed_for(seed, step, -1),
                      runtime.device)
        share = len(rows) / total
        with last_pass(losses, i == len(batches) - 1):
            with runtime.autocast():
                loss, metrics = losses(runtime.to(batch), step, source)

            # outside of autocast: what is fp32 forward stays so backward. DDP and FSDP average
            (loss * (share * runtime.world)).backward()

        for key, value in metrics.items():
            if key.endswith("_max"):
                maxima[key] = torch.maximum(maxima.get(key, value), value)
            else:
                sums[key] = sums.get(key, 0.0) + value * share
    return sums | maxima


def clip_gradients(trainer, optimizers, largest):
    """Scale each optimizer's gradient down to the norm `largest` -> {"grad_NAME": norm before}."""
    norms = {}
    for key in optimizers:
        parameters = [p for p in trainer.optimized[key].parameters() if p.grad is not None]
        norms[f"grad_{key}"] = (whole(torch.nn.utils.clip_grad_norm_(parameters, largest))
                                if parameters else torch.zeros(()))
    return norms


def not_finite(figures, device):
    """Whether a figure is NaN or infinite, as a tensor."""
    return ~torch.stack([v.float().to(device) for v in figures.values()]).isfinite().all()


def report_skip(run, step, skipped, figures):
    """Say that a step was skipped. At the tenth in a row save the last one that was not, and raise
    FloatingPointError with the figures.
    """
    if skipped < 10:
        run.runtime.say(f"{run.name} {step}: loss or gradient is not finite, step skipped "
                        f"({skipped} in a row)")
        return
    run.keep()
    bad = [f"{k} {float(v):.3g}" for k, v in figures.items() if not v.isfinite()]
    raise FloatingPointError(f"{run.name}: ten steps in a row were not finite at step {step}: "
                             f"{', '.join(bad[:6])}; {run.advice()}")


# ---------------------------------------------------------------- how long a step takes here

def random_step(trainer, stage_cfg, runtime, rows, passes=1):
    """The function of one whole step on a stage's random rows (plan.RandomRows), `passes` times
    `rows` of them: losses, backward, clipping, optimizer, averaged weights.
    """
    optimizers = make_optimizers(trainer, stage_cfg, runtime.device)
    ema = EMA(trainer.averaged, stage_cfg.ema) if stage_cfg.ema else None
    losses = Losses(trainer)
    batches = [(range(i * rows, (i + 1) * rows), trainer.batch) for i in range(passes)]

    def step():
        for optimizer in optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        gradients(losses, batches, 0, runtime, 0, rows * passes)
        clip_gradients(trainer, optimizers, stage_cfg.grad_clip)
        for optimizer in optimizers.values():
            optimizer.step()
        if ema:
            ema.update(0)

    return step


def time_on_this_machine(cfg, runtime):
    """A line per stage: seconds of a step, the median of three behind one that is not counted, and
    of all its steps.
    """
    wait = {"cuda": torch.cuda.synchronize,
            "mps": torch.mps.synchronize}.get(runtime.device, lambda: None)
    lines = []
    together = 0.0
    for name in cfg.stages:
        # one micro-batch as often as a step has it
        stage_cfg = getattr(cfg.train, name)
        rows = stage_cfg.micro_batch or stage_cfg.batch
        trainer = RandomRows(cfg, name, rows, runtime.device)
        if stage_cfg.checkpoint:
            stages.recompute_activations(trainer.model)
        if runtime.compile:
            trainer.compile()
        step = random_step(trainer, stage_cfg, runtime, rows, -(-stage_cfg.batch // rows))

        times = []
        for _ in range(4):
            start = time.perf_counter()
            step()
            wait()
            times.append(time.perf_counter() - start)
        seconds = statistics.median(times[1:])
        together += seconds * stage_cfg.steps
        lines.append(f"{name}: {seconds:.3g} s per step, {stage_cfg.steps} steps in "
                     f"{spoken_time(seconds * stage_cfg.steps)}")
    lines.append(f"on this machine, rows of full length: {spoken_time(together)} of training; "
                 "encoding, validation and samples come on top")
    return "\n".join(lines)


def spoken_time(seconds):
    """"50 s", "8 min", "3.2 h", "12 days"."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:,.{1 if seconds < 10 * size else 0}f} {unit}"
    return f"{seconds:.0f} s"


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
    # backwards: what is left after a kill has what it was trained on
    for name in reversed(names):
        for path in (f"{out}/{name}.pt", todo_file(out, name), f"{out}/evaluation.json"):
            if os.path.exists(path):
                os.remove(path)
        shutil.rmtree(shards_folder(out, name), ignore_errors=True)
    rows = [json.loads(line) for line in read_log(out)]
    write_log(out, [row for row in rows if row["stage"] not in names])
    if "vae" in names:
        shutil.rmtree(f"{out}/latents", ignore_errors=True)


def parse():
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
               allow_abbrev=False,
               usage="train.py --config FILE [--section.key value ...] [--from RUN] [--fresh] "
                 "[--print] [--plan [--gpus N] [--fit GB] [--measure]]")
    p.add_argument("--config", required=True, help="an experiment: configs/*.toml")
    p.add_argument("--from", dest="source", metavar="RUN",
                   help="begin every stage with the weights of this run's: sets train.STAGE.init; a "
                        "VAE that is not among the stages is taken as it is")
    p.add_argument("--fresh", action="store_true", help="start this run over")
    p.add_argument("--print", action="store_true", help="show the resolved config and stop")
    p.add_argument("--plan", action="store_true",
                   help="say what the training needs (memory, time, disk) and stop")
    p.add_argument("--gpus", type=number(int, 1), default=1, help="of a plan (default 1)")
    p.add_argument("--fit", type=number(float, above=0), metavar="GB",
                   help="of a plan: micro_batch, checkpoint and shard for GPUs of so many GB")
    p.add_argument("--measure", action="store_true",
                   help="of a plan: time three steps of every stage on this machine")
    return p.parse_known_args()


def start_from(cfg, run, fresh=False):
    """The config with train.STAGE.init = the checkpoint of `run`, for every stage that has one, and
    for those that they go on from.

    Not for what goes on from a stage of this run, as consistency does from lm: what lm learned
    would be lost. A run without lm.pt gives consistency.pt in its place.
    Errors: BadInput where `run` has none of them, is this run, or has a model of other sizes than
    a stage that begins now.
    """
    if not os.path.isdir(run):
        raise BadInput(f"--from {run}: no such folder; give the run folder of a trained model")
    if os.path.realpath(run) == os.path.realpath(cfg.out):
        raise BadInput(f"--from {run}: is the run itself; name another folder, --out DIR")

    stages_of_run = {}
    for name in cfg.stages:
        path = checkpoint_to_begin(run, name)
        if not path or STAGES[name].after in cfg.stages:
            continue
        stage_cfg = getattr(cfg.train, name)
        stages_of_run[name] = replace(stage_cfg, init=stage_cfg.init or path)
        begins = fresh or not os.path.exists(stage_file(cfg.out, name))
        if begins and not stage_cfg.init:
            checks.refuse_other_sizes(cfg, name, path)

    # what they go on from is taken as it is
    for name in checks.stages_before(cfg.stages):
        path = f"{run}/{name}.pt"
        stage_cfg = getattr(cfg.train, name)
        if os.path.exists(path) or exported_file(path):
            stages_of_run[name] = replace(stage_cfg, init=stage_cfg.init or path)

    # a VAE that is only taken as it is begins no language model
    begins_something = [name for name in stages_of_run if name != "vae" or name in cfg.stages]
    if not begins_something:
        raise BadInput(f"--from {run}: has no checkpoint of {', '.join(cfg.stages)}; give the run "
                       "folder of a trained model")
    return replace(cfg, train=replace(cfg.train, **stages_of_run))


def checkpoint_to_begin(run, name):
    """The checkpoint of a run that has weights for a stage: its own, or that of a stage that went
    on from it; None without. It may be an exported one.
    """
    for stage in (name, *(after for after in STAGES if STAGES[after].after == name)):
        path = f"{run}/{stage}.pt"
        if os.path.exists(path) or exported_file(path):
            return path
    return None


def run_stages(cfg, runtime, fresh):
    """Check the corpus and what is in the run folder, then train what is not finished."""
    if runtime.rank == 0:
        open_tracker(cfg.log.tracker, cfg.out, dump(cfg))

    # data first: a mistake in it must not cost what --fresh deletes
    clips, valid = corpus(cfg, runtime)
    checks.announce_data(cfg, clips, valid, runtime.say)
    checks.refuse_missing_init(cfg, fresh)
    if fresh and runtime.rank == 0:
        with signals.held():
            start_over(cfg.out, cfg.stages)
    if runtime.rank == 0:
        checks.bring_stages_before(cfg, runtime.say)
    runtime.wait()                                     # nobody looks before the old ones are gone

    # what is there already must fit the config
    done = checks.check_checkpoints(cfg, clips, runtime.say)
    if runtime.rank == 0:
        write_file(f"{cfg.out}/config.toml", dump(cfg))

    if not all(done.values()):
        stages.open_held_out(valid, cfg)
    for name in cfg.stages:
        if done[name] and not os.path.exists(todo_file(cfg.out, name)):
            runtime.say(f"{name}: finished before, skipped")
            continue
        torch.manual_seed(cfg.seed)
        trainer_class = getattr(stages, STAGES[name].trainer)
        train(trainer_class(cfg, runtime, clips, valid, name), name, cfg, runtime)


def main():
    arguments, overrides = parse()
    cfg = load(arguments.config, overrides)
    if arguments.source:
        cfg = start_from(cfg, arguments.source, arguments.fresh)
    if arguments.print:
        print(dump(cfg), end="")
        return
    if arguments.plan:
        signals.stop_listening()
        print(plan(cfg, arguments.gpus, arguments.fit or 80.0, bool(arguments.fit)))
        if arguments.measure:
            print(time_on_this_machine(cfg, Runtime(cfg)))
        return
    try:
        train_all(cfg, arguments.fresh)
    except signals.Interrupted:
        signals.tell()
        raise
    except FloatingPointError as e:
        # diverged; every process says the same
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {e}", file=sys.stderr)
        sys.exit(1)
    except RuntimeError:
        # after a signal another process may have left in the middle of a collective
        if not signals.asked() or "RANK" not in os.environ:
            raise
        sys.exit(signals.STATUS)


def train_all(cfg, fresh):
    """Open the run folder, as its only owner, and train what is not finished."""
    runtime = Runtime(cfg)
    try:
        os.makedirs(f"{cfg.out}/samples", exist_ok=True)
    except OSError as e:
        raise BadInput(f"out: {cfg.out} cannot be made ({e.strerror}); use --out") from None

    # the first process asks for all
    lock = contextlib.nullcontext()
    if runtime.rank == 0:
        lock = owned(cfg.out, "another training writes to it", say=runtime.say)
    with lock:
        if runtime.rank == 0:
            for folder, _, _ in os.walk(cfg.out):
                clean_temps(folder)
            clean_shards(cfg.out)
        run_stages(cfg, runtime, fresh)

    runtime.say(f"done: listen and look at {cfg.out}/report.html")
    if runtime.world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    cli(main, outlives_screen=True)
