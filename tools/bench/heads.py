"""Speed of the heads: one latent of CALM, of the RQ-Transformer and of the delay pattern, at the
papers' sizes.

    python -m tools.bench heads [--domain speech music] [--fast graph] [--repeats 3] [--threads 1]
                                [--json ...]

    backbone, KV cache of 15 s ─► z ─► short context (CALM, music) ─► head ─► next latent or codes

"head" in the table is the last step alone (consistency, TrigFlow or RQ-Transformer), "whole" is all
three. Embeddings of the latent and the VAE are left out. Sizes are those of configs/paper (Table
9), weights are random, and the batch is one row. The table is laid out as Tables 2, 4 and 6 of CALM
(arXiv 2509.06926); speed-ups are relative to the paper's baseline, RQ with 8 levels for speech and
32 for music. The RQ-Transformers share 8 sets of weights, whatever their number of levels: a set is
75M parameters, more than any cache holds, so that each level reads its weights from memory either
way. The delay pattern (MusicGen, music only) has a linear head for 4 codebooks and 50 frames per
second, so twice the backbone. Without --fast a GPU mostly waits for the host to start kernels; with
it (replay.py) the table compares what the heads compute.

Precision: fp32 on a CPU, bf16 weights, caches and autocast on CUDA.
"""
import copy
import dataclasses
import statistics

import torch

from backbone import BackboneConfig, KVCache, StaticCache, Transformer
from cli import BadInput
from config import load
from discrete import RQ, Delay, sample_codes
from heads import HEADS, TrigFlow
from replay import HOW, WARM_UP, Replay, rounded
from tools.bench.timing import inference, median_ratio, processor, race, set_threads

HEAD_STEPS = (("consistency", 1), ("consistency", 4), ("trigflow", 10), ("trigflow", 100))
RQ_LEVELS = (8, 16, 32)
RQ_SETS = 8
BASELINE = {"speech": "rq 8 levels", "music": "rq 32 levels"}       # of Tables 2 and 4
HISTORY = 15                                                        # seconds in the KV cache
DELAY = "delay 4 levels"                                            # MusicGen, in Table 4


def add_options(parser):
    parser.add_argument("--domain", nargs="+", default=["speech", "music"],
                        choices=["speech", "music"],
                        help="default both; in fp32 music needs 12 GB, speech 11 GB")
    parser.add_argument("--fast", choices=HOW,
                        help="run every part in fixed memory: static, graph (cuda) or compile")


def run(args):
    """Time the heads of each domain -> {domain: {head: figures}}."""
    if args.fast == "graph" and args.device != "cuda":
        raise BadInput("--fast graph: is for --device cuda; leave it out on a CPU")
    set_threads(args.threads)
    print(f"one latent of CALM and RQ, torch {torch.__version__}, {processor(args.device)}"
          + (f", {args.fast}" if args.fast else ""))

    figures = {}
    for domain in args.domain:
        calm = load(f"configs/paper/calm_{domain}.toml")
        rq = load(f"configs/paper/rq_{domain}.toml")
        frame_rate = calm.vae.frame_rate
        dtype = torch.bfloat16 if args.device == "cuda" else torch.float32

        parts = frame_parts(calm, rq, args.device, dtype, args.fast)
        rates = {}
        if domain == "music":
            delay = load("configs/paper/delay_music.toml")
            parts[DELAY] = delay_part(delay, args.device, dtype, args.fast)
            rates[DELAY] = delay.vae.frame_rate
        times = race(parts, args.repeats, args.device)
        figures[domain] = head_figures(times, BASELINE[domain], frame_rate, rates)

        backbone_ms = 1000 * statistics.median(times["backbone"]) * frame_rate
        print(f"{domain}: {frame_rate:g} latents and {backbone_ms:.0f} ms of backbone per second")
        print_table(figures[domain])
    return figures


def print_table(figures):
    """One row per head; times are per second of audio."""
    print(f"{'':20s}{'head, ms':>10s}{'whole, ms':>10s}{'sampler':>9s}{'overall':>9s}"
          f"{'in sampler':>12s}{'30 s take':>11s}{'real time':>11s}")
    for name, row in figures.items():
        print(f"{name:20s}{row['head_ms']:10.1f}{row['whole_ms']:10.1f}"
              f"{row['sampler_speedup']:8.2f}x{row['overall_speedup']:8.2f}x"
              f"{100 * row['sampler_share']:11.1f}%{row['seconds_for_30']:9.1f} s"
              f"{row['real_time']:10.2f}x", flush=True)


def head_figures(times, baseline, frame_rate, rates=None):
    """The table's figures {head: row} from times {part: [seconds per latent, of each repeat]}.

    baseline: the head that speed-ups are relative to; frame_rate: latents per second; rates: {head:
    latents per second} of those that have others.
    """
    heads = [part for part in times if part not in ("backbone", "short context")]
    pace = {name: (rates or {}).get(name, frame_rate) / frame_rate for name in heads}
    spent = {name: [pace[name] * seconds for seconds in times[name]] for name in heads}

    # what runs before the head; only CALM has the short context
    before = {}
    for name in heads:
        before[name] = [pace[name] * seconds for seconds in times["backbone"]]
        if "short context" in times and not name.startswith(("rq", "delay")):
            before[name] = [sum(pair) for pair in zip(times["backbone"], times["short context"])]
    whole = {name: [b + h for b, h in zip(before[name], spent[name])] for name in heads}

    figures = {}
    for name in heads:
        head_seconds = statistics.median(spent[name])
        whole_seconds = statistics.median(whole[name])
        row = {
            "head_ms": 1000 * head_seconds * frame_rate,
            "whole_ms": 1000 * whole_seconds * frame_rate,
            "sampler_speedup": median_ratio(spent[baseline], spent[name]),
            "overall_speedup": median_ratio(whole[baseline], whole[name]),
            "sampler_share": median_ratio(spent[name], whole[name]),
            "seconds_for_30": 30 * whole_seconds * frame_rate,
            "real_time": 1 / (whole_seconds * frame_rate),
        }
        figures[name] = {key: round(value, 4) for key, value in row.items()}
    return figures


# ---------------------------------------------------------------- contestants

def frame_parts(calm, rq, device, dtype, how=None):
    """The parts of one latent's work, {part: function}.

    calm, rq: configs with the same backbone; dtype: of weights and caches. bf16 also turns autocast
    on, which the fp32 islands of heads.py need. how: one of replay.HOW, None = as it is.
    """
    backbone = calm.lm.backbone
    z = torch.randn(1, backbone.dim, device=device, dtype=dtype)               # (1, C)
    autocast = lambda: torch.autocast(device, dtype, dtype == torch.bfloat16)
    part = lambda function: make_part(function, z, autocast, how)

    # what makes z
    history = max(1, round(HISTORY * calm.vae.frame_rate))
    parts = {"backbone": part(one_position(backbone, history, device, dtype, autocast, how))}
    if calm.lm.short_layers:
        short = BackboneConfig(**{**vars(backbone), "layers": calm.lm.short_layers,
                                  "window": calm.lm.short_context})
        history = calm.lm.short_context - 1
        parts["short context"] = part(one_position(short, history, device, dtype, autocast, how))

    # continuous heads: TrigFlow shares the network, which saves memory
    consistency = filled(
        lambda: HEADS["consistency"](calm.vae.latent_dim, backbone.dim, calm.lm.head),
        device, dtype)
    objectives = {"consistency": consistency, "trigflow": TrigFlow(consistency.net, calm.lm.head)}
    for name, steps in HEAD_STEPS:
        sample = lambda z, generator, head=objectives[name], steps=steps: head.sample(
            z, steps=steps, generator=generator)
        plural = "s" if steps > 1 else ""
        parts[f"{name} {steps} step{plural}"] = part(sample)

    # RQ-Transformers: copies share the weights of the deepest
    rq_head = dataclasses.replace(rq.lm.head, sets=RQ_SETS)
    deepest = filled(lambda: RQ(max(RQ_LEVELS), rq.vae.codebook_size, backbone.dim, rq_head).net,
                     device, dtype)
    for levels in RQ_LEVELS:
        net = copy.copy(deepest)
        net.levels = levels
        parts[f"rq {levels} levels"] = part(lambda z, generator, net=net: net.sample(
            z, lambda logits: sample_codes(logits, 1.0, 0, generator)))
    return parts


def delay_part(delay, device, dtype, how=None):
    """MusicGen's linear heads on z (1, C), a contestant like those of frame_parts."""
    width = delay.lm.backbone.dim
    z = torch.randn(1, width, device=device, dtype=dtype)                      # (1, C)
    autocast = lambda: torch.autocast(device, dtype, dtype == torch.bfloat16)
    codes = delay.vae.codebooks, delay.vae.codebook_size
    head = filled(lambda: Delay(*codes, width, delay.lm.head), device, dtype)
    return make_part(lambda z, generator: head.sample(z, generator=generator), z, autocast, how)


def make_part(function, z, autocast, how):
    """A contestant that calls function(z, generator); how as in frame_parts, warmed up."""
    if how is None:
        return inference(function, z, None, precision=autocast)
    step = Replay(lambda z, tape: (function(z, tape),), how)
    run = inference(lambda z: step(z, generator=None), z, precision=autocast)
    for _ in range(WARM_UP + 1):
        run()
    return run


def one_position(cfg, history, device, dtype, autocast, how):
    """A function of z (1, C): one position of a Transformer behind `history` cached ones.

    Each call reads a copy of the cache, which shares its buffers: the cache does not grow from
    repeat to repeat, and as in most positions of a generation there is room to append to it.
    """
    net = filled(lambda: Transformer(cfg), device, dtype)
    heads = cfg.kv_heads or cfg.heads
    shape = (2, 1, heads, history - 1, cfg.dim // cfg.heads)
    cache = KVCache()
    cache.kv = {layer: tuple(torch.randn(shape, device=device, dtype=dtype).unbind())
                for layer in range(cfg.layers)}                # k, v (1, heads, history - 1, width)
    cache.pos = history - 1

    # the last position of the history moves the others to buffers with room
    x = torch.randn(1, 1, cfg.dim, device=device, dtype=dtype)
    inference(net, x, cache, precision=autocast)()
    if how is not None:
        growing = cache
        cache = StaticCache.beside(growing, cfg.window or rounded(history + 1))
        cache.load(growing)
    return lambda z, generator: net(z[:, None], cache.copy())


def filled(make, device, dtype):
    """make() with weights uniform in ±0.03: its initialisation would take minutes."""
    with torch.device("meta"):
        module = make()
    module = module.to(dtype).to_empty(device=device).eval()
    for p in module.parameters():
        p.data.uniform_(-0.03, 0.03)
    return module
