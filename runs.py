"""One stage's training as the run folder sees it: checkpoint, log, validation, samples, pictures.

    step ─► take ────► optimizers, then EMA                 a step that is not finite: undo
            save ────► NAME.pt, if all of it is finite      the last complete step
            log ─────► a row of log.jsonl, a line
            show ────► held-out figures, samples, page      may fail: costs a line
    end ──► finish ──► NAME.pt with done = true, and NAME.todo
            complete ► show, loss.png, and NAME.todo is removed; else the next start does it

What cannot be made again is written first: weights before figures, figures before samples, samples
before pictures.
"""
import contextlib
import dataclasses
import json
import os
import shutil
import time

import torch
from torch.distributed.tensor import DTensor

import checks
import signals
from checkpoint import (check_optimizer, exported_file, load_checkpoint, load_weights,
                        named_tensors, shards_folder, stage_file)
from cli import BadInput, append_line, write_file
from config import (dump, initial_weights, read_log, refuse_other_encoder, save_checkpoint,
                    saved_config, table_changes)
from optim import make_optimizers
from page import note_hardware, write_page
from parallel import (fill, is_sharded, load_shards, make_moments, save_shards, whole_state, wrap)
from plan import measure, peak_flops
from prefetch import Prefetch, Workers
from report import draw_losses, draw_spectrograms
from trackers import open_tracker


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
    try:
        with torch.no_grad():
            yield module
    finally:
        module.train()
        if state is not None:
            module.load_state_dict(own)


class RunningState:
    """What a model learns outside of its optimizer: buffers of its checkpoint, such as an RVQ's
    counts and sums and the balancer's norms, as the last complete step left them. They move in
    the forward pass, before anybody knows whether the step is finite.
    """

    def __init__(self, model):
        saved = model.state_dict().keys()
        self.buffers = [buffer for name, buffer in model.named_buffers() if name in saved]
        self.copies = [buffer.clone() for buffer in self.buffers]

    @torch.no_grad()
    def keep(self):
        """Remember the buffers: a step is complete."""
        for copy, buffer in zip(self.copies, self.buffers):
            copy.copy_(buffer)

    @torch.no_grad()
    def undo(self):
        """The buffers as keep() found them."""
        for copy, buffer in zip(self.copies, self.buffers):
            buffer.copy_(copy)


def local(tensor):
    """This process's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def first_not_finite(state):
    """The name of the first tensor in a checkpoint's (nested) dict that holds NaN or infinity, or
    "". One pass over memory, and one wait for the device: 0.1 s per 400M numbers on one CPU core.
    """
    tensors = {name: local(tensor.detach()) for name, tensor in named_tensors(state)
               if tensor.is_floating_point() and local(tensor).numel()}
    ends = {}                                   # device -> least and largest of each tensor
    for tensor in tensors.values():
        low, high = tensor.aminmax()            # NaN if there is one
        ends.setdefault(tensor.device, []).append(high.double() - low.double())
    if all(torch.stack(each).isfinite().all() for each in ends.values()):
        return ""
    bad = (name for name, tensor in tensors.items() if not tensor.isfinite().all())
    return next(bad, "")


class Meter:
    """How fast a stage trains, from one line of the log to the next.

    flops: of a step; peak: FLOP/s of all GPUs in bf16, 0 = not known here.
    """

    def __init__(self, step, flops, peak):
        self.flops = flops
        self.peak = peak
        self.begin(step)

    def begin(self, step):
        """Start counting at this step."""
        self.step = step
        self.seconds = 0.0
        self.since = time.perf_counter()

    def heard(self, seconds):
        """Count seconds of audio that were trained on."""
        self.seconds += seconds

    def read(self, step):
        """Figures since the last call: steps and seconds of audio per second; model FLOPs as a
        share of what the GPUs have, where that is known.
        """
        passed = time.perf_counter() - self.since
        speed = (step - self.step) / passed
        figures = {"steps_per_second": speed, "audio_per_second": self.seconds / passed}
        if self.peak:
            figures["mfu"] = speed * self.flops / self.peak
        self.begin(step)
        return figures


class Run:
    """One stage's training: its checkpoint, its rows of log.jsonl, its validation; and which rows
    of the global batch are this process's.

    trainer: an object of stages.py; name: the stage's, a key of config.STAGES.
    step: complete steps that the weights hold; saved: those of the checkpoint; done: whether the
    checkpoint's stage is finished.
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
        if not self.begun() and self.stage_cfg.init:
            self.load_init(self.stage_cfg.init)
        self.compile()

        # on several processes; then nothing of the model is replaced any more
        shard = cfg.train.shard and name != "vae"
        self.losses = wrap(trainer, runtime.device, shard)
        self.sharded = is_sharded(self.losses)
        self.optimizers = make_optimizers(trainer, self.stage_cfg, runtime.device,
                                          key=f"train.{name}.optimizer")
        self.ema = EMA(trainer.averaged, self.stage_cfg.ema) if self.stage_cfg.ema else None
        self.running = RunningState(trainer.model)
        self.step = 0
        self.saved = 0
        self.done = False
        self.whole = True                       # not in the middle of a step or a save
        self.unwritten = []                     # rows that log.jsonl lacks

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

        # rows of the global batch that each of this process's micro-batches holds: all processes
        # together take neighbours, as one process with larger micro-batches would
        first = self.runtime.rank * self.micro
        self.parts = [range(s, s + self.micro) for s in range(first, batch, self.micro * world)]

    def freeze(self):
        """Take the parts of train.STAGE.freeze out of the training."""
        parts = dict(self.trainer.averaged.named_children())
        for part in self.stage_cfg.freeze:
            if part not in parts:
                raise BadInput(f"train.{self.name}.freeze: unknown '{part}'; "
                               f"valid: {', '.join(parts)}")
            parts[part].requires_grad_(False)

    # ------------------------------------------------------------ the beginning

    def begun(self):
        """Whether this stage has a checkpoint of its own."""
        return os.path.exists(stage_file(self.cfg.out, self.name))

    def compile(self):
        """Compile the layers, where asked."""
        if self.runtime.compile:
            # layers share one code object, and dynamo keeps at most 8 graphs of it: those of the
            # stage before must not count
            torch._dynamo.reset()
            self.trainer.compile()

    def resume(self):
        """The first step to do: 0, or where the last checkpoint was, whose state is loaded."""
        path = stage_file(self.cfg.out, self.name)
        if path != self.path:
            shards = os.path.dirname(path)
            self.load(load_checkpoint(path), shards, shards)
        elif os.path.exists(path):
            self.load(load_checkpoint(path, self.runtime.device), path)
        self.running.keep()
        first = self.step
        self.announce()
        if self.runtime.rank == 0:
            self.cut_log()
            self.attempt("hardware.json", note_hardware, self.cfg.out, self.runtime)
        self.meter = self.make_meter(first)
        return first

    def make_meter(self, first):
        """A Meter that knows the FLOPs of a step where the GPU's peak is known."""
        peak = self.runtime.world * peak_flops(self.runtime.device, self.runtime.bf16)
        flops = 0
        if peak and not self.done:
            flops = measure(self.cfg, self.name, 1).flops * self.stage_cfg.batch
        return Meter(first, flops, peak)

    def announce(self):
        """Print the size of the model and how a step's rows are shared."""
        if self.done:
            self.runtime.say(f"{self.name}: finished before, without its last figures, samples or "
                             "loss.png, which are made now")
            return
        size = sum(p.numel() for p in self.trainer.model.parameters())
        self.runtime.say(
            f"{self.name}: {size / 1e6:.2f}M parameters, "
            f"{self.stage_cfg.steps} steps of {self.stage_cfg.batch} rows = "
            f"{self.runtime.world} process(es) x {self.rows // self.micro} micro-batch(es) "
            f"x {self.micro}" + (f"; resuming at step {self.step}" if self.step else ""))

    def cut_log(self):
        """Drop the rows that come again: those behind the checkpoint, and of a finished stage its
        last figures.
        """
        def stays(row):
            again = self.done and row["step"] == self.step and is_validation(row)
            return row["stage"] != self.name or row["step"] <= self.step and not again

        rows = [json.loads(line) for line in read_log(self.cfg.out)]
        write_log(self.cfg.out, [row for row in rows if stays(row)])

    def lacks_figures(self):
        """Whether the checkpoint is of a step whose validation was cut off."""
        every = self.stage_cfg.valid_every
        if not self.step or self.step == self.stage_cfg.steps or not every or self.step % every:
            return False
        rows = (json.loads(line) for line in read_log(self.cfg.out))
        return not any(row["stage"] == self.name and row["step"] == self.step
                       and is_validation(row) for row in rows)

    def load(self, state, path, shards=""):
        """Go on from this stage's own checkpoint: a plain one, or the folder `shards`."""
        refuse_other_encoder(state, self.trainer.encoder, path, f"{self.cfg.out}/vae.pt")
        checks.note_changed_runtime(self.name, state, self.how(), self.runtime.say)
        if shards:
            load_shards(shards, self.all_tensors())
        elif self.sharded:
            fill(self.all_tensors(), state)
        else:
            self.load_plain(state, path)
        self.trainer.check_loaded(path)
        self.step = state["step"]
        self.saved = state["step"]
        self.done = state["done"]

    def all_tensors(self):
        """The (nested) state of this run with everything allocated, to be filled in place."""
        make_moments(self.optimizers, self.trainer.model.parameters())
        return self.tensors()

    def load_plain(self, state, path):
        """The state of a plain checkpoint into a model that is whole."""
        if state["ema"]:
            load_weights(self.trainer.averaged, state["ema"], path)      # do they fit?
        # a finished sharded stage keeps only the average
        load_weights(self.trainer.model, state["model"] or state["ema"], path)
        for key, optimizer in self.optimizers.items():
            if state["done"] and not state["optimizers"]:
                continue
            try:
                optimizer.load_state_dict(state["optimizers"][key])
                check_optimizer(optimizer, path)
            except (ValueError, KeyError, TypeError, AttributeError) as e:      # other groups
                raise BadInput(f"{path}: holds the optimizer of another version of this code "
                               f"({e}); finish it with that one, or begin again with --fresh"
                               ) from e
        if self.ema:
            self.ema.state = state["ema"] or EMA(self.trainer.averaged, self.stage_cfg.ema).state

    def how(self):
        """What of this run's processes decides its rounding, for the checkpoint."""
        return {"dtype": "bf16" if self.runtime.bf16 else "fp32",
                "rows of a forward pass": self.micro * self.runtime.world}

    def load_init(self, path):
        """Begin with the weights of another checkpoint (train.STAGE.init)."""
        state = load_checkpoint(path, self.runtime.device)
        load_weights(self.trainer.averaged, initial_weights(state, self.name), path)
        self.trainer.check_loaded(path)
        self.runtime.say(f"{self.name}: starts from {exported_file(path) or path} "
                         f"({state['step']} steps)")

        # the same shapes may mean something else
        for old, new in table_changes(saved_config(state, path), self.cfg, "vae"):
            self.runtime.say(f"{self.name}: {path} was trained with [vae] {old}, here {new}")
        if state.get("encoder", "") not in ("", self.trainer.encoder):
            self.runtime.say(f"{self.name}: {path} was trained on the latents of another VAE")

    # ------------------------------------------------------------ a step

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

    def take(self, step):
        """Step the optimizers and the average: `step` + 1 steps are complete."""
        self.whole = False
        for optimizer in self.optimizers.values():
            optimizer.step()
        if self.ema:
            self.ema.update(step)
        self.running.keep()
        self.step = step + 1
        self.whole = True

    @contextlib.contextmanager
    def kept_on_error(self):
        """Save the last complete step before an error of the block ends the training: a file that
        is gone, a full GPU, another process that has ended.
        """
        try:
            yield
        except Exception:
            if self.whole:
                self.running.undo()
                self.attempt("saving the last step", self.keep)
            raise

    # ------------------------------------------------------------ checkpoints

    def tensors(self):
        """What a checkpoint holds of the training's state."""
        optimizers = {k: optimizer.state_dict() for k, optimizer in self.optimizers.items()}
        return {"model": self.trainer.model.state_dict(),
                "ema": self.ema.state if self.ema else None, "optimizers": optimizers}

    def facts(self, done=False):
        """What else it holds."""
        return {"stage": self.name, "step": self.step, "done": done, "clips": self.clips,
                "encoder": self.trainer.encoder, "runtime": self.how(),
                "config": dataclasses.asdict(self.cfg), "seen": self.trainer.batch.seen}

    def save(self, done=False):
        """Write the last complete step, unless the checkpoint has it; all processes wait for it.

        Errors: FloatingPointError where any of it is not finite; the checkpoint before is kept.
        """
        if self.step == self.saved and done == self.done:
            return
        tensors = self.tensors()
        bad = first_not_finite(tensors)
        if self.runtime.any_of(bool(bad)):
            raise FloatingPointError(f"{self.name}: {bad or 'a tensor of another process'} is not "
                                     f"finite after step {self.step}, which is not saved; "
                                     + self.advice())
        self.whole = False
        if self.sharded:
            self.save_sharded(tensors, done)
        elif self.runtime.rank == 0:
            save_checkpoint(self.path, self.facts(done) | tensors)
            shutil.rmtree(shards_folder(self.cfg.out, self.name), ignore_errors=True)
        self.whole = True
        self.saved = self.step
        self.done = done
        self.runtime.meet()

    def save_sharded(self, tensors, done):
        """A folder of all processes' parts while the stage is trained, one plain file at its end:
        the weights, which are then those that the average has.
        """
        first = self.runtime.rank == 0
        if not done:
            empty = {"model": {}, "ema": None, "optimizers": {}}
            save_shards(self.cfg.out, self.name, tensors, self.facts() | empty, save_checkpoint)
            if first and os.path.exists(self.path):
                os.remove(self.path)
            return
        weights = whole_state(tensors["ema"] or tensors["model"], first)
        if first:
            save_checkpoint(self.path, self.facts(done) | {"model": {}, "ema": weights,
                                                           "optimizers": {}})
            shutil.rmtree(shards_folder(self.cfg.out, self.name), ignore_errors=True)

    def keep(self):
        """save() on the way to an error: where it is finite, and without waiting for anybody, which
        sharded weights cannot.
        """
        if self.step == self.saved or self.sharded or first_not_finite(self.tensors()):
            return
        if self.runtime.rank == 0:
            self.write_rows()                           # a saved step has its rows
            save_checkpoint(self.path, self.facts() | self.tensors())
        self.saved = self.step

    def advice(self):
        """What is left after steps that were not finite, and what to do."""
        there = f"{self.path} holds step {self.saved}" if self.saved else "there is no checkpoint"
        lr = self.stage_cfg.lr
        return (f"{there}, where the same command goes on; with a lower learning rate, for "
                f"instance --train.{self.name}.lr {lr / 2:.3g} (now {lr:.3g})")

    # ------------------------------------------------------------ figures, samples, pictures

    def log(self, step, figures):
        """One row of log.jsonl and one line on the screen."""
        figures = {k: round(float(v), 5) for k, v in figures.items()}
        rates = self.meter.read(step)
        self.write(step, figures | {k: round(v, 3) for k, v in rates.items()})
        shown = " ".join(f"{k} {v:.3f}" for k, v in figures.items()
                         if "loss_" not in k and "grad" not in k)
        speed = rates["steps_per_second"]
        left = (self.stage_cfg.steps - step) / speed
        mfu = f" | MFU {rates['mfu']:.1%}" if "mfu" in rates else ""
        audio = rates["audio_per_second"]
        self.runtime.say(f"{self.name} {step}/{self.stage_cfg.steps} | {shown} | "
                         f"{speed:.1f} steps/s, {audio:.0f} s of audio/s{mfu} | "
                         f"eta {int(left // 60)}:{int(left % 60):02d}")

    def write(self, step, figures):
        """One row of log.jsonl; where it fails, `keep` tries once more before it saves the step."""
        if self.runtime.rank == 0:
            self.unwritten.append(json.dumps({"stage": self.name, "step": step, **figures}))
            self.write_rows()
            self.track(step, figures)

    def write_rows(self):
        """Append the rows that are not yet in log.jsonl."""
        while self.unwritten:
            append_line(f"{self.cfg.out}/log.jsonl", self.unwritten[0])
            self.unwritten.pop(0)

    def track(self, *what):
        """Send figures, or sounds and their picture, to the tracker of [log]."""
        tracker = open_tracker(self.cfg.log.tracker, self.cfg.out, dump(self.cfg))
        self.attempt(f"log.tracker {self.cfg.log.tracker}", tracker, self.name, *what)

    def show(self, step):
        """Held-out figures and samples with the averaged weights -> whether all were made.

        Eager: every length of a clip or cache would be compiled anew, 10 s each.
        """
        weights = self.averaged()
        if self.runtime.rank != 0:
            return True
        made = False                                    # stays so where a signal cuts it short
        with (signals.cut_short(), weights as module,
              torch.compiler.set_stance("force_eager")):
            found = []
            measured = self.attempt("validation", self.validate, module, found)
            # not under attempt: a log that cannot be written ends the training, and no row is lost
            for figures in found:
                self.log_validation(step, figures)
            made = self.attempt("samples", self.render, module, step) and measured
            self.attempt("report.html", write_page, self.cfg.out)
        return made

    def averaged(self):
        """A context with the averaged weights in a model that is whole, for the first process."""
        if not self.sharded:
            return weights_of(self.trainer.averaged, self.ema and self.ema.state)

        # gathered by all processes, and a model beside the sharded one
        first = self.runtime.rank == 0
        state = self.ema.state if self.ema else self.trainer.averaged.state_dict()
        state = whole_state(state, first)
        return weights_of(self.trainer.plain().to(self.runtime.device), state) if first else None

    def attempt(self, what, job, *arguments):
        """Whether job(*arguments) went well; an error is one line, and ends nothing."""
        try:
            job(*arguments)
        except Exception as e:
            reason = " ".join(str(e).split())[:200]
            self.runtime.say(f"{self.name}: {what} failed ({type(e).__name__}: {reason})")
            return False
        return True

    def validate(self, module, found):
        """Append the held-out figures to `found`."""
        found.append(self.trainer.validate(module))

    def log_validation(self, step, figures):
        """Held-out figures as a row of log.jsonl and a line."""
        self.write(step, {k: round(v, 5) for k, v in figures.items()})
        self.runtime.say(f"{self.name} {step}/{self.stage_cfg.steps} | "
                         + " ".join(f"{k} {v:.4f}" for k, v in figures.items()))

    def render(self, module, step):
        """Samples, then their spectrograms: a picture that fails costs no sound."""
        for path, sounds in list(self.trainer.render(module, step)):
            rate = self.cfg.vae.sample_rate
            draw_spectrograms(path, sounds, rate)
            self.track(step, {}, [(title, wav, rate) for title, wav in sounds], path)

    # ------------------------------------------------------------ the end

    def finish(self):
        """What the stage measures for those after it, then the checkpoint that says done."""
        if not self.sharded:                            # a language model measures nothing
            with (weights_of(self.trainer.averaged, self.ema and self.ema.state) as module,
                  torch.compiler.set_stance("force_eager")):
                self.trainer.finish(module)
                if self.ema:
                    self.ema.state = {k: v.detach().clone()
                                      for k, v in module.state_dict().items()}

        with signals.held():
            if self.runtime.rank == 0:
                write_file(todo_file(self.cfg.out, self.name),
                           "figures, samples, loss.png of the last step: made at the next start\n")
            self.save(done=True)

    def complete(self):
        """The last figures, samples and loss.png; what fails is made at the next start."""
        made = self.show(self.step)
        if self.runtime.rank == 0:
            made = self.attempt("loss.png", draw_losses, self.cfg.out) and made
            if made:
                os.remove(todo_file(self.cfg.out, self.name))
            else:
                self.runtime.say(f"{self.name}: the next start makes what is missing")
        self.runtime.wait()


def todo_file(out, name):
    """Is there as long as the last figures, samples or pictures of a finished stage are missing."""
    return f"{out}/{name}.todo"


def is_validation(row):
    """Whether a row of log.jsonl holds held-out figures."""
    return any(key.startswith("valid_") for key in row)


def write_log(out, rows):
    """log.jsonl with these rows, whole or as it was."""
    write_file(f"{out}/log.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    print("runs.py is a library, used by train.py")
