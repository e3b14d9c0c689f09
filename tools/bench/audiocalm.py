"""Speed of AudioCALM: blocks of latents against CALM's single latents, on the same backbone.

    python -m tools.bench audiocalm [--config configs/audiocalm_quick.toml] [--seconds 10]
                                    [--lengths 5 10 20 30 60] [--window 10] [--repeats 7]

    [audiocalm.backbone] ─┬─► CALM: one latent per pass, head of 3 blocks as wide as the backbone
                          │         consistency 1 step, TrigFlow 20
                          └─► AudioCALM: one block per N + 1 passes
                                    flow 32, 16, 8, 4 steps; few-step LSD 4, 1

First table: time and CPU time per second of audio, time to the first latents, and passes of the
backbone. Second table: AudioCALM with 4 steps up to each of --lengths, with its whole history and
with only the last --window seconds of it: time and CPU time since the previous length, positions in
the KV cache, and the bytes behind them (spare room of its buffers included).

Latents only; `vae` times their decoding. Random weights, one row, no guidance, 24 tokens of text,
kind "sound": no speech expert runs. Precision: fp32 on a CPU, bf16 autocast on CUDA.
"""
import copy
import dataclasses
import statistics
import time
from dataclasses import dataclass

import torch

from audiocalm import AudioCALM
from calm import CALM, CALMConfig
from cli import number
from config import load
from data import KINDS, vocabulary
from heads import HeadConfig
from tools.bench.timing import (clock, median_ratio, processor, race, set_threads)

CALM_STEPS = (("consistency", 1), ("trigflow", 20))
BLOCK_STEPS = (("rectified_flow", 32), ("rectified_flow", 16), ("rectified_flow", 8),
               ("rectified_flow", 4), ("lsd", 4), ("lsd", 1))
NAMES = {"consistency": "CALM consistency", "trigflow": "CALM TrigFlow",
         "rectified_flow": "AudioCALM", "lsd": "AudioCALM LSD"}
GROWTH_STEPS = 4
TEXT_TOKENS = 24


@dataclass
class Mark:
    """The state of a generation when it has reached a certain length."""
    seconds: float                          # since its start
    cpu: float                              # seconds of CPU time since its start
    passes: int                             # of the backbone
    positions: int                          # in its KV cache
    bytes: int                              # of that cache


def add_options(parser):
    parser.add_argument("--config", default="configs/audiocalm_quick.toml",
                        help="the experiment whose [audiocalm] and [vae] give the sizes "
                             "(default configs/audiocalm_quick.toml)")
    parser.add_argument("--seconds", type=number(float, above=0), default=10.0,
                        help="length of the audio in the first table (default 10)")
    parser.add_argument("--lengths", type=number(float, above=0), nargs="+",
                        default=[5, 10, 20, 30, 60],
                        help="seconds, the rows of the second table (default 5 10 20 30 60)")
    parser.add_argument("--window", type=number(float, above=0),
                        help="seconds of history in the second table (default: the config's "
                             "window, else 10)")


def run(args):
    """Both tables: {"contestants": {name: row}, "growth": {name: [row of each length]}}."""
    set_threads(args.threads)
    print(f"{args.config}: torch {torch.__version__}, {processor(args.device)}")

    cfg = load(args.config)
    rows = min(vocabulary(cfg.data), 4000)
    text = torch.randint(0, rows, (1, TEXT_TOKENS), device=args.device)
    models = {name: same_backbone(cfg, name).to(args.device) for name in NAMES}

    def timed(contestants, marks):
        return time_generation(contestants, marks, text, args.repeats, args.device)

    return {"contestants": compare(cfg, models, timed, args.seconds),
            "growth": grow(cfg, models["rectified_flow"], timed, args.lengths, args.window)}


def same_backbone(cfg, objective):
    """A CALM or an AudioCALM with random weights and [audiocalm.backbone]; it never ends a clip."""
    table = cfg.audiocalm
    sizes = cfg.vae.latent_dim, vocabulary(cfg.data), KINDS

    if objective in dict(CALM_STEPS):
        head = HeadConfig(objective=objective, width=table.backbone.dim, blocks=3)
        lm = CALM(CALMConfig(backbone=table.backbone, head=head), *sizes)
        lm.eos.bias.data -= 1e4
        return lm.eval()

    head = dataclasses.replace(table.head, objective=objective)
    lm = AudioCALM(dataclasses.replace(table, head=head), *sizes, only="sound")
    lm.stop.bias.data -= 1e4
    return lm.eval()


def whole_blocks(cfg, seconds):
    """The nearest number of latents that are whole blocks, at least one block."""
    block = cfg.audiocalm.block
    return block * max(1, round(seconds * cfg.vae.frame_rate / block))


# ---------------------------------------------------------------- first table: contestants

def compare(cfg, models, timed, seconds):
    """Time the objectives and numbers of steps in turn; print the table -> {name: row}."""
    frame_rate = cfg.vae.frame_rate
    frames = whole_blocks(cfg, seconds)
    contestants = {}
    for objective, steps in CALM_STEPS + BLOCK_STEPS:
        plural = "s" if steps > 1 else ""
        contestants[f"{NAMES[objective]}, {steps} step{plural}"] = models[objective], steps
    marks = timed(contestants, [1, frames])

    print(f"{frames / frame_rate:g} s of audio, {frame_rate:g} latents of {cfg.vae.latent_dim} per "
          f"second, blocks of {cfg.audiocalm.block}")
    print(f"{'':28s}{'ms / second':>12s}{'ratio':>9s}{'CPU, ms':>9s}{'first, ms':>11s}"
          f"{'passes / second':>17s}{'real time':>11s}")

    per_second = frame_rate / frames
    reference = [last.seconds for _, last in next(iter(marks.values()))]
    figures = {}
    for name, repeats in marks.items():
        total = [last.seconds for _, last in repeats]
        ms = 1000 * statistics.median(total) * per_second
        cpu_ms = 1000 * statistics.median(last.cpu for _, last in repeats) * per_second
        first_ms = 1000 * statistics.median(first.seconds for first, _ in repeats)
        passes = repeats[0][1].passes * per_second

        row = {"ms": round(ms, 3), "ratio": round(median_ratio(total, reference), 3),
               "cpu_ms": round(cpu_ms, 3), "first_ms": round(first_ms, 2),
               "passes": round(passes, 2), "real_time": round(1000 / ms, 3)}
        figures[name] = row
        print(f"{name:28s}{row['ms']:12.2f}{row['ratio']:8.2f}x{row['cpu_ms']:9.2f}"
              f"{row['first_ms']:11.2f}{row['passes']:17.1f}{row['real_time']:10.2f}x", flush=True)
    return figures


# ---------------------------------------------------------------- second table: growth

def grow(cfg, flow, timed, lengths, window):
    """Time AudioCALM up to each length, with and without a window -> {name: [row per length]}."""
    frame_rate = cfg.vae.frame_rate
    if window is not None:
        last = whole_blocks(cfg, window)
    else:
        last = cfg.audiocalm.window or whole_blocks(cfg, 10.0)

    # two views of the same weights
    contestants = {}
    for name, latents in (("whole history", 0), (f"last {last / frame_rate:.4g} s", last)):
        lm = copy.copy(flow)
        lm.cfg = dataclasses.replace(flow.cfg, window=latents)
        contestants[name] = lm, GROWTH_STEPS

    print(f"AudioCALM, {GROWTH_STEPS} steps, with growing length\n{'':16s}{'length':>9s}"
          f"{'total':>10s}{'ms / second':>13s}{'CPU, ms':>9s}{'positions':>11s}{'cache':>12s}")
    frames = sorted({whole_blocks(cfg, seconds) for seconds in lengths})
    figures = {}
    for name, repeats in timed(contestants, frames).items():
        rows = [growth_row(repeats, i, frames, frame_rate) for i in range(len(frames))]
        figures[name] = rows

        for row in rows:
            print(f"{name:16s}{row['seconds']:7.4g} s{row['total']:8.2f} s{row['ms']:13.2f}"
                  f"{row['cpu_ms']:9.2f}{row['positions']:11d}{row['bytes'] / 1e6:9.2f} MB",
                  flush=True)
        print(f"{name:16s}{rows[-1]['total'] / rows[0]['total']:.2f} x the time for "
              f"{frames[-1] / frames[0]:.4g} x the length")
    return figures


def growth_row(repeats, i, frames, frame_rate):
    """Figures of length i: the total, and what it took since length i - 1, per second of audio."""
    start = frames[i - 1] if i else 0
    added = (frames[i] - start) / frame_rate                                   # seconds of audio

    def since_previous(field):
        used = [getattr(marks[i], field) - (getattr(marks[i - 1], field) if i else 0)
                for marks in repeats]
        return round(1000 / added * statistics.median(used), 3)

    return {"seconds": frames[i] / frame_rate,
            "total": round(statistics.median(marks[i].seconds for marks in repeats), 4),
            "ms": since_previous("seconds"), "cpu_ms": since_previous("cpu"),
            "positions": repeats[0][i].positions, "bytes": repeats[0][i].bytes}


# ---------------------------------------------------------------- timing

def time_generation(contestants, frames, text, repeats, device):
    """Generate in turn with contestants {name: (model, steps)} up to frames[-1] latents.

    Returns {name: [[Mark at each of `frames`], of each repeat]}.
    """
    marks = {name: [] for name in contestants}
    runs = {}
    for name, (lm, steps) in contestants.items():
        runs[name] = generation(lm, text, frames, steps, marks[name], device)
    race(runs, repeats, device)
    return {name: rounds[1:] for name, rounds in marks.items()}     # the first only warms up


def generation(lm, text, frames, steps, rounds, device):
    """A function that generates once and appends to `rounds` its Marks at each of `frames`."""
    def run():
        marks = []
        passes = 0
        cache = None

        # every pass of the backbone gets the cache as its second argument
        def count(backbone, inputs):
            nonlocal passes, cache
            passes += 1
            cache = inputs[1]
        hook = lm.backbone.register_forward_pre_hook(count)

        start = clock(device)
        cpu_start = time.process_time()
        with torch.autocast(device, torch.bfloat16, device == "cuda"):
            latents = lm.generate(text, kind=KINDS.index("sound"), max_frames=frames[-1],
                                  steps=steps)
            for i, _ in enumerate(latents, 1):
                if i in frames:
                    seconds = clock(device) - start
                    cpu = time.process_time() - cpu_start
                    marks.append(Mark(seconds, cpu, passes, *cache_size(cache)))

        hook.remove()
        rounds.append(marks)
    return run


def cache_size(cache):
    """Positions in a KVCache, and the bytes behind them; a storage that two share counts once."""
    tensors = [tensor for pair in cache.kv.values() for tensor in pair]
    for buffer in cache.buffers.values():
        if buffer:
            tensors += buffer[:2]

    storages = [tensor.untyped_storage() for tensor in tensors]
    size_of = {storage.data_ptr(): storage.nbytes() for storage in storages}
    return cache.kv[0][0].shape[2], sum(size_of.values())
