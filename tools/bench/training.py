"""One training step at any size: time, FLOPs, utilisation and memory.

    python -m tools.bench train [--config configs/paper/calm_music.toml] [--stage lm] [--rows 3]
                                [--checkpoint] [--compile] [--repeats 7] [--json figures.json]
                                [--set KEY VALUE]

    random rows ─► losses ─► backward ─► clip the gradient ─► optimizer ─► averaged weights (EMA)

The code of a step is train.py's; the rows are random numbers, all as long as the config allows, and
stand on the device already. The VAE's discriminators take part from the start; a WavLM teacher does
not.

    FLOPs      of the forward and backward pass as torch counts them: matrix products, attention
               (but flex_attention) and convolutions, 2 per multiplication and addition; what
               --checkpoint computes again is not counted
    MFU        FLOPs per second over the 989 TFLOP/s of bf16 on an H100 (NVIDIA's figure without
               sparsity); on other devices it is not given
    peak       most memory that torch held on the device, with weights, gradients, both moments of
               AdamW and averaged weights; CUDA only

Precision: fp32 on a CPU, bf16 autocast on CUDA, as in training.
"""
import statistics

import torch
from torch.utils.flop_counter import FlopCounterMode

from cli import number
from config import STAGES, load
from parallel import Losses
from plan import RandomRows, first_row, peak_flops
from stages import recompute_activations
from tools.bench.timing import clock, processor, set_threads
from train import Runtime, gradients, random_step


def add_options(parser):
    parser.add_argument("--config", default="configs/paper/calm_music.toml",
                        help="the experiment (default configs/paper/calm_music.toml)")
    parser.add_argument("--stage", choices=[s for s in STAGES if s != "distill"], default="lm",
                        help="the stage of training (default lm)")
    parser.add_argument("--rows", type=number(int, 1), default=0,
                        help="rows of one pass (default: the stage's micro_batch, else its batch)")
    parser.add_argument("--checkpoint", action="store_true",
                        help="recompute activations, as train.STAGE.checkpoint does")
    parser.add_argument("--compile", action="store_true", help="torch.compile as train.py does")
    parser.add_argument("--set", nargs=2, action="append", default=[], metavar=("KEY", "VALUE"),
                        help="another value of the config, such as --set lm.head.multiplier 1")


def run(args):
    """Time the step -> {"ms", "gflops", "mfu", "peak_gb", "first_seconds", "rows", "parameters"}.

    mfu and peak_gb are None where they are not given.
    """
    # the experiment, its model and one micro-batch
    overrides = [word for key, value in args.set for word in (f"--{key}", value)]
    cfg = load(args.config, [*overrides, "--device", args.device])
    stage_cfg = getattr(cfg.train, args.stage)
    rows = args.rows or stage_cfg.micro_batch or stage_cfg.batch
    set_threads(args.threads)
    runtime = Runtime(cfg)
    trainer = RandomRows(cfg, args.stage, rows, runtime.device)
    flops = rows * flops_of_a_row(trainer, runtime)
    if args.checkpoint or stage_cfg.checkpoint:
        recompute_activations(trainer.model)

    step = random_step(trainer, stage_cfg, runtime, rows)
    if args.compile:
        trainer.compile()
    if runtime.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = clock(runtime.device)
    step()
    first = clock(runtime.device) - start
    seconds = measure(step, args.repeats, runtime.device)

    parameters = sum(p.numel() for p in trainer.model.parameters())
    figures = {"device": processor(runtime.device), "rows": rows, "parameters": parameters,
               "ms": round(1000 * seconds, 2), "gflops": round(flops / 1e9, 2),
               "mfu": utilisation(flops / seconds, runtime),
               "peak_gb": peak_gigabytes(runtime.device), "first_seconds": round(first, 1)}
    report(args, figures)
    return figures


def flops_of_a_row(trainer, runtime):
    """FLOPs of one row, forward and backward: eager, since kernels of inductor are not counted, and
    before activations are recomputed.
    """
    row = first_row(trainer.batch)
    with FlopCounterMode(display=False) as counter:
        gradients(Losses(trainer), [(range(1), row)], 0, runtime, 0, 1)
    trainer.model.zero_grad(set_to_none=True)
    return counter.get_total_flops()


def measure(step, repeats, device):
    """Median seconds of a step, after two that are not measured."""
    for _ in range(2):
        step()
    times = []
    for _ in range(repeats):
        start = clock(device)
        step()
        times.append(clock(device) - start)
    return statistics.median(times)


def utilisation(flops_per_second, runtime):
    """Percent of the device's bf16 peak, or None where the peak is not known here."""
    peak = peak_flops(runtime.device, runtime.bf16)
    return round(100 * flops_per_second / peak, 1) if peak else None


def peak_gigabytes(device):
    """Most memory allocated on a CUDA device so far, in 10⁹ bytes, or None."""
    return round(torch.cuda.max_memory_allocated() / 1e9, 2) if device == "cuda" else None


def report(args, figures):
    """One line per measurement."""
    how = ("compiled" if args.compile else "eager") + (", recomputed" if args.checkpoint else "")
    teraflops = figures["gflops"] / figures["ms"]
    mfu = "" if figures["mfu"] is None else f", MFU {figures['mfu']} %"
    peak = "" if figures["peak_gb"] is None else f", peak {figures['peak_gb']} GB"
    print(f"{args.config} {args.stage}, {how}: {figures['parameters'] / 1e6:.1f}M parameters, "
          f"{figures['rows']} rows: {figures['ms']:.1f} ms, {teraflops:.2f} TFLOP/s{mfu}{peak}, "
          f"first step {figures['first_seconds']:.0f} s", flush=True)
