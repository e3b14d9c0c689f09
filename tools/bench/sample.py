"""Speed of text to speech: from a text and a voice prompt to audio.

    python -m tools.bench sample [--config configs/quickstart.toml | --peer pocket-tts]
                                 [--prefix 90] [--seconds 10] [--repeats 7] [--threads 1]
                                 [--fast static graph compile] [--device cuda]

    prefix of --prefix positions: 24 of text, the rest voice (its latents are given)
       └─► CALM ─► latents one by one ─► VAE decoder, streaming ─► --seconds of audio

The end-of-clip decision is switched off, so that every contestant generates the same length. The
table has the real-time factor (and its ratio to the first row's), the time to the first audio, the
time per latent without decoding, and CPU seconds per second of audio. "parallel" decodes in a
second thread, "latent by latent" never groups latents for the decoder. "static", "graph" and
"compile" generate in fixed memory (replay.py), all others in a cache that grows.

--config takes a config with random weights, as it is and, on a CPU, rounded to int8. --peer
pocket-tts takes its English model with random weights, as it is and with its quantize=True, against
the same weights in calm.py and vae.py. It generates and decodes in two Python threads, as
"parallel" does here.

Precision: fp32, also on CUDA.
"""
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from tqdm import tqdm

from calm import CALM, CALMConfig
from cli import BadInput, number
from config import load
from data import KINDS, vocabulary
from generate import to_int8
from replay import HOW, Fast
from tools.bench import peers
from tools.bench.timing import clock, median_ratio, set_threads
from tools.convert import mimi, pocket_tts
from tools.convert.tensors import below
from vae import VAE, VAEConfig

TEXT_TOKENS = 24                # of the prefix
TIMED_LATENTS = 25              # behind the figure "per latent"


@dataclass
class Task:
    """What every contestant of ours generates from."""
    text: torch.Tensor                      # (1, L) tokens
    voice: torch.Tensor                     # (1, P, D) latents of the voice prompt
    frames: int                             # latents to generate
    device: str
    fast: Fast | None = None                # None = in a cache that grows


@dataclass
class Contestant:
    """One row of the table: how it makes audio, and how it makes latents alone."""
    audio: Callable                         # () -> yields the samples in each piece of audio
    latents: Callable                       # (n) -> seconds of each of n latents but the first


@dataclass
class Source:
    """Sizes of our models; their weights where a peer gives them, else random ones."""
    lm: CALMConfig
    vae: VAEConfig
    rows: int                               # of the text embedding
    lm_weights: dict | None = None
    vae_weights: dict | None = None


def add_options(parser):
    parser.add_argument("--config", default="configs/quickstart.toml",
                        help="the experiment whose models are timed "
                             "(default configs/quickstart.toml)")
    parser.add_argument("--peer", choices=["pocket-tts"],
                        help="compare with this package instead, on a CPU")
    parser.add_argument("--prefix", type=int, default=90,
                        help=f"positions before the audio, {TEXT_TOKENS} of them text (default 90)")
    parser.add_argument("--seconds", type=number(float, above=0), default=10.0,
                        help="length of the audio (default 10)")
    parser.add_argument("--fast", nargs="*", choices=HOW, metavar="HOW",
                        help=f"generation in fixed memory, some of {', '.join(HOW)}; default: all "
                             "on cuda, static on a CPU, where compile takes minutes and graph does "
                             "not exist")
    parser.add_argument("--compile", action="store_true",
                        help="torch.compile backbone, head and decoder")


def run(args):
    """Time all contestants in turn -> {name: figures}."""
    if args.peer and args.device != "cpu":
        raise BadInput(f"--peer {args.peer}: runs on a CPU only; use --device cpu")
    if args.prefix <= TEXT_TOKENS:
        raise BadInput(f"--prefix: must be above {TEXT_TOKENS}, the positions of text")
    if args.fast is None:
        args.fast = HOW if args.device == "cuda" else ["static"]
    if "graph" in args.fast and args.device != "cuda":
        raise BadInput("--fast graph: is for --device cuda; leave it out on a CPU")

    contestants, sample_rate = make_contestants(args)
    set_threads(args.threads)            # only now: pocket-tts sets one thread when it is imported
    print(f"{args.peer or args.config}: prefix {args.prefix}, {args.seconds:g} s of audio, torch "
          f"{torch.__version__}, {torch.get_num_threads()} threads per operation", flush=True)

    # a first round, which is not measured, warms caches and compiles
    rows = {name: [] for name in contestants}
    for i in tqdm(range(args.repeats + 1), leave=False, desc="timing"):
        for name, contestant in contestants.items():
            row = time_audio(contestant, sample_rate, args.device)
            if i:
                row["latent"] = statistics.mean(contestant.latents(TIMED_LATENTS))
                rows[name].append(row)

    return summary(rows)


def time_audio(contestant, sample_rate, device):
    """Generate once: real-time factor, seconds to the first audio, CPU seconds per second."""
    cpu_start = time.process_time()
    start = clock(device)
    first_audio = None
    samples = 0
    for count in contestant.audio():
        samples += count
        if first_audio is None:
            first_audio = clock(device) - start

    elapsed = clock(device) - start
    cpu = time.process_time() - cpu_start
    seconds = samples / sample_rate
    return {"real_time": seconds / elapsed, "first_audio": first_audio, "cpu": cpu / seconds}


def summary(rows):
    """Print medians of rows {name: [one per repeat]}, and return them as {name: figures}."""
    def values(name, key):
        return [row[key] for row in rows[name]]

    reference = values(next(iter(rows)), "real_time")
    figures = {}
    for name in rows:
        real_time = statistics.median(values(name, "real_time"))
        ratio = median_ratio(values(name, "real_time"), reference)
        first_ms = 1000 * statistics.median(values(name, "first_audio"))
        latent_ms = 1000 * statistics.median(values(name, "latent"))
        cpu = statistics.median(values(name, "cpu"))

        figures[name] = {"real_time_factor": round(real_time, 3), "ratio": round(ratio, 3),
                         "first_audio_ms": round(first_ms, 1), "latent_ms": round(latent_ms, 2),
                         "cpu": round(cpu, 4)}
        print(f"{name:26s} {real_time:7.2f} x real time ({ratio:.2f})   "
              f"first audio {first_ms:6.0f} ms   per latent {latent_ms:6.1f} ms   "
              f"CPU {cpu:.3f} s per second", flush=True)
    return figures


# ---------------------------------------------------------------- contestants

def make_contestants(args):
    """{name: Contestant}, and the sample rate of their audio in Hz."""
    if args.peer:
        frames = round(args.seconds * 12.5)
        with peers.installed(args.peer):
            peer = peers.pocket_tts_model(frames)
        source = source_of_peer(peer)
    else:
        source = source_of_config(load(args.config))
        frames = max(3, round(args.seconds * source.vae.frame_rate))

    # what is generated from
    voice_frames = args.prefix - TEXT_TOKENS - source.lm.prompt_bos
    tokens = min(source.rows, peers.PEER_WORDS)
    text = torch.randint(0, tokens, (1, TEXT_TOKENS), device=args.device)
    voice = torch.randn(1, voice_frames, source.vae.latent_dim, device=args.device)
    task = Task(text, voice, frames, args.device)

    # ours in fp32
    lm, vae = make_models(source, args.device, args.compile)
    contestants = {"nanoCALM": ours(lm, vae, task),
                   "nanoCALM, parallel": ours(lm, vae, task, parallel=True)}
    if not args.peer:
        contestants["latent by latent"] = Contestant(lambda: audio_one_by_one(lm, vae, task),
                                                     lambda n: time_latents(lm, task, n))
    for how in args.fast:
        contestants[how] = ours(lm, vae, task, how=how)

    # ours in int8
    if args.device == "cpu":
        small_lm, small_vae = make_models(source, args.device, args.compile)
        to_int8(small_lm, small_vae)
        contestants["nanoCALM int8"] = ours(small_lm, small_vae, task)
        contestants["nanoCALM int8, parallel"] = ours(small_lm, small_vae, task, parallel=True)

    # the peer, whose voice prompt is already as wide as its backbone
    if args.peer:
        embedded = torch.randn(1, args.prefix - TEXT_TOKENS, source.lm.backbone.dim)
        small = peers.pocket_tts_int8(peer)
        contestants[args.peer] = Contestant(*peers.pocket_tts_runs(peer, text, embedded))
        contestants[f"{args.peer} int8"] = Contestant(*peers.pocket_tts_runs(small, text, embedded))
    return contestants, source.vae.sample_rate


def source_of_config(cfg):
    return Source(cfg.lm, cfg.vae, vocabulary(cfg.data))


def source_of_peer(peer):
    """Sizes and weights of Pocket TTS, converted."""
    state = peer.state_dict()
    vae, vae_weights = mimi.to_vae(below(state, "mimi."))
    lm, lm_weights, mean, std = pocket_tts.to_calm(below(state, "flow_lm."))
    vae_weights["latent_mean"] = mean
    vae_weights["latent_std"] = std
    return Source(lm, vae, len(lm_weights["text.weight"]), lm_weights, vae_weights)


def make_models(source, device, compiled):
    """A CALM that never ends a clip, and a VAE."""
    lm = CALM(source.lm, source.vae.latent_dim, source.rows, KINDS)
    vae = VAE(source.vae)
    if source.lm_weights is not None:
        lm.load_state_dict(source.lm_weights)
        vae.load_state_dict(source.vae_weights)
    lm.eos.bias.data -= 1e4

    if compiled:
        lm.backbone.compile()
        lm.head.net.compile()
        vae.decoder.compile()
    return lm.to(device).eval(), vae.to(device).eval()


def ours(lm, vae, task, parallel=False, how=None):
    """Sampling as sample.py does it: the decoder gets 1, 2, then 4 latents at a time.

    how: one of replay.HOW; audio and latents, of different lengths, have memory of their own.
    """
    for_audio = replace(task, fast=Fast(how) if how else None)
    for_latents = replace(task, fast=Fast(how) if how else None)
    return Contestant(lambda: audio_in_groups(lm, vae, for_audio, parallel),
                      lambda n: time_latents(lm, for_latents, n))


def generate(lm, task, frames):
    return lm.generate(task.text, max_frames=frames, kind=0, prompt=task.voice, temperature=0.7,
                       fast=task.fast)


def audio_in_groups(lm, vae, task, parallel):
    """Generate and decode in growing groups; yields the samples of each piece of audio."""
    latents = generate(lm, task, task.frames)
    for wav, _, _ in vae.decode_stream(latents, parallel=parallel):
        yield wav.shape[-1]


def audio_one_by_one(lm, vae, task):
    """Generate and decode one latent at a time; yields the samples of each piece of audio."""
    state = {}
    for x, _ in generate(lm, task, task.frames):
        with torch.no_grad():
            wav = vae.decode(vae.denormalize(x)[:, None], state)               # (1, channels, hop)
        yield wav.shape[-1]


def time_latents(lm, task, count):
    """Generate latents without decoding -> seconds of each, without the first.

    Their mean counts: with task.fast latents come in groups, the first alone (replay.py).
    """
    seconds = []
    before = 0.0
    for _ in generate(lm, task, count):
        now = clock(task.device)
        seconds.append(now - before)
        before = now
    return seconds[1:]
