"""Speed: how long the parts take, as ratios measured in one run.

    python bench.py --what vae [--config configs/paper/vae_music.toml] [--peer moshi|pocket-tts]
                    [--seconds 10] [--repeats 7] [--threads 1] [--json figures.json]
    python bench.py --what heads [--domain speech music] [--repeats 3] [--threads 1] [--json ...]
    python bench.py --what sample [--config ... | --peer pocket-tts] [--prefix 90] [--seconds 10]

    vae   encode and decode `seconds` of audio offline, decode latent by latent as a stream, one
          training step (forward, backward) of 1-second crops; all as milliseconds a second of audio
          --config   a VAE of a config, with random weights; beside it the same VAE with its other
                     decoder (conv or iSTFT) where the config allows one
          --peer     Mimi as PyPI `moshi` or `pocket-tts` build it, random weights, against the same
                     weights in vae.py: the outputs are compared first, then timed in turn
    sample  text and voice to audio: a prefix of --prefix positions (24 of text, the rest voice, its
          latents given), then `seconds` of audio whatever the EOS says. Real-time factor, time to
          the first audio, CPU seconds a second of audio; beside it the time of one latent alone.
          fp32, also on CUDA
          --config   a config with random weights, also rounded to int8 (on a CPU)
          --peer     pocket-tts: its English model with random weights, as it is and with its own
                     quantize=True, against the same weights in calm.py and vae.py. It draws and
                     decodes in two Python threads, as `parallel` does here

    heads one frame of CALM at the sizes of configs/paper (random weights, one row): the backbone
          with a cache of 15 s, the short-context transformer, and each head drawing x from z:
          consistency, TrigFlow, the RQ-Transformer; laid out as Tables 2, 4 and 6. "whole" is
          backbone + short context (CALM, music) + head; a frame's embeddings and the VAE are left
          out. The RQ-Transformers share 8 sets of weights, whatever their levels: a set is 75M
          numbers, more than any cache holds, so that a level reads its own from memory either way.

Contestants take turns within each repeat, so that a noisy machine slows both; the figure is the
median, ratios are medians of the repeats' ratios. fp32 on a CPU, bf16 autocast and (--compile)
torch.compile on CUDA.
Exit status: 0 done, 2 your mistake (one line says which).
"""
import argparse
import contextlib
import copy
import dataclasses
import json
import math
import statistics
import tempfile
import threading
import time
import warnings

import torch
from tqdm import tqdm

import convert
from backbone import BackboneConfig, KVCache, Transformer
from calm import CALM, to_int8
from config import load
from data import KINDS, BadInput, Parser, cli, vocabulary
from discrete import RQ, pick
from heads import HEADS, TrigFlow
from vae import VAE, VAEGAN


def clock(device):
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def race(contestants, repeats, device):
    """{name: function} -> {name: [seconds, one a repeat]}, taking turns; one unmeasured round."""
    times = {name: [] for name in contestants}
    for i in tqdm(range(repeats + 1), leave=False, desc="timing"):
        for name, run in contestants.items():
            start = clock(device)
            run()
            if i:
                times[name].append(clock(device) - start)
    return times


def stream(vae, z):
    """Decode z (1, T, D) latent by latent."""
    state = {}
    for t in range(z.shape[1]):
        vae.decode(z[:, t:t + 1], state)


def training_step(cfg, device, autocast):
    """A function that runs one forward and backward of all losses over 1-second crops, batch 4."""
    weights = {k: v for k, v in cfg.loss_weights.items() if k != "distill"}
    model = VAEGAN(dataclasses.replace(cfg, disc_start=0, disc_warmup=0,
                                       loss_weights=weights)).to(device)
    samples = max(1, round(cfg.frame_rate)) * cfg.hop
    wav = 0.1 * torch.randn(4, cfg.channels, samples, device=device)

    def step():
        with torch.enable_grad(), autocast():
            for _, loss, _ in model.losses(wav, 0):
                loss.backward()
        model.zero_grad(set_to_none=True)
    return step, 4 * samples / cfg.sample_rate


def other_decoder(cfg):
    """The same VAE with the other decoder, or None. iSTFT: the hop that the ratios give nearest to
    10 ms.
    """
    if cfg.decoder == "istft":
        return dataclasses.replace(cfg, decoder="conv")
    hops = [math.prod(cfg.ratios[i:]) for i in range(1, len(cfg.ratios))]
    if cfg.encoder == "stft" or not hops:
        return None
    hop = min(hops, key=lambda h: abs(math.log(h / cfg.sample_rate / 0.01)))
    return dataclasses.replace(cfg, decoder="istft", stft_hop=hop)


def own(cfg, seconds, device, compiled):
    """{part: {name: function}}, seconds of audio of each part."""
    wav = 0.1 * torch.randn(1, cfg.channels, round(seconds * cfg.frame_rate) * cfg.hop,
                            device=device)
    z = torch.randn(1, wav.shape[-1] // cfg.hop, cfg.latent_dim, device=device)
    autocast = (lambda: torch.autocast("cuda", torch.bfloat16)) if device == "cuda" else (
        contextlib.nullcontext)
    parts, length = {}, dict.fromkeys(("encode", "decode", "stream decode"), seconds)
    for variant in filter(None, (cfg, other_decoder(cfg))):
        vae, name = VAE(variant).to(device).eval(), f"{variant.decoder} decoder"
        if compiled:
            vae.encoder.compile(), vae.decoder.compile()

        def timed(run, vae=vae):
            def call():
                with torch.no_grad(), autocast():
                    run(vae)
            return call
        if variant is cfg:
            parts["encode"] = {"encoder": timed(lambda vae: vae.encode(wav))}
        parts.setdefault("decode", {})[name] = timed(lambda vae: vae.decode(z))
        parts.setdefault("stream decode", {})[name] = timed(lambda vae: stream(vae, z))
        step, length["training step"] = training_step(variant, device, autocast)
        parts.setdefault("training step", {})[name] = step
    return parts, length


def moshi_peer():
    from moshi.models.loaders import get_mimi
    peer = get_mimi(None, device="cpu").eval()
    decode = lambda z: peer.decoder(
        peer.decoder_transformer(peer._to_encoder_framerate(z.mT.contiguous()))[0])
    return peer, lambda x: peer.encode_to_latent(x, quantize=False).mT, decode


def pocket_peer():
    import importlib.resources

    import yaml
    from pocket_tts.models.mimi import build_mimi
    from pocket_tts.modules.stateful_module import init_states
    from pocket_tts.utils.config import MimiConfig
    text = (importlib.resources.files("pocket_tts") / "config" / "english.yaml").read_text()
    peer = build_mimi(MimiConfig(**yaml.safe_load(text)["mimi"])).eval()
    for name, module in peer.named_modules():
        module._module_absolute_name = name
    decode = lambda z: peer.decode_from_latent(
        z, init_states(peer, batch_size=1, sequence_length=16 * z.shape[1]))
    return peer, peer.encode_to_latent, decode


def peer_race(name, seconds):
    try:
        peer, encode, decode = (moshi_peer if name == "moshi" else pocket_peer)()
    except ImportError as e:
        raise BadInput(f"--peer {name}: {e.name} is not installed: pip install {name}") from None
    cfg, state = convert.mimi(peer.state_dict())
    ours = VAE(cfg).eval()
    ours.load_state_dict(state)
    wav = 0.1 * torch.randn(1, 1, round(seconds * cfg.frame_rate) * cfg.hop)
    with torch.no_grad():
        z = encode(wav)
        errors = ((ours.encode(wav)[0] - z).abs().max().item(),
                  (ours.decode(z) - decode(z)).abs().max().item())
    print(f"largest difference: latents {errors[0]:.1e}, audio {errors[1]:.1e}")

    def timed(run):
        def call():
            with torch.no_grad():
                run()
        return call
    parts = {"encode": {"nanoCALM": timed(lambda: ours.encode(wav)),
                        name: timed(lambda: encode(wav))},
             "decode": {"nanoCALM": timed(lambda: ours.decode(z)), name: timed(lambda: decode(z))}}
    return parts, dict.fromkeys(parts, seconds)


# ---------------------------------------------------------------- heads

HEAD_STEPS = (("consistency", 1), ("consistency", 4), ("trigflow", 10), ("trigflow", 100))
RQ_LEVELS = (8, 16, 32)
BASELINE = {"speech": "rq 8 levels", "music": "rq 32 levels"}       # of Tables 2 and 4


def filled(make, device, dtype):
    """make(), with weights that nobody waits for: uniform in ±.03 instead of its initialisation."""
    with torch.device("meta"):
        module = make()
    module = module.to(dtype).to_empty(device=device).eval()
    for p in module.parameters():
        p.data.uniform_(-0.03, 0.03)
    return module


def frame_parts(calm, rq, device, dtype):
    """Configs of a CALM and an RQ model of the same backbone -> {part: function that does its work
    for one frame}. dtype of weights and caches; bf16 also turns autocast on, for the fp32 islands.
    """
    backbone, head = calm.lm.backbone, calm.lm.head
    z = torch.randn(1, backbone.dim, device=device, dtype=dtype)

    def timed(run):
        def call():
            with torch.no_grad(), torch.autocast(device, dtype, dtype == torch.bfloat16):
                run()
        return call

    def one_position(cfg, seen):
        net, width = filled(lambda: Transformer(cfg), device, dtype), cfg.dim // cfg.heads
        shape = (1, cfg.kv_heads or cfg.heads, seen, width)
        past = {i: tuple(torch.randn(2, *shape, device=device, dtype=dtype).unbind())
                for i in range(cfg.layers)}

        def run():
            cache = KVCache()
            cache.kv, cache.pos = dict(past), seen
            net(z[:, None], cache)
        return timed(run)

    parts = {"backbone": one_position(backbone, max(1, round(15 * calm.vae.frame_rate)))}
    if calm.lm.short_layers:
        parts["short context"] = one_position(
            BackboneConfig(**{**vars(backbone), "layers": calm.lm.short_layers,
                              "window": calm.lm.short_context}), calm.lm.short_context - 1)
    one_step = filled(lambda: HEADS["consistency"](calm.vae.latent_dim, backbone.dim, head),
                      device, dtype)
    flow = TrigFlow(one_step.net, head)                              # the same network: memory
    for name, steps in HEAD_STEPS:
        objective = one_step if name == "consistency" else flow
        parts[f"{name} {steps} step{'s' * (steps > 1)}"] = timed(
            lambda objective=objective, steps=steps: objective.sample(z, steps=steps))
    deepest = filled(lambda: RQ(max(RQ_LEVELS), rq.vae.codebook_size, backbone.dim,
                                dataclasses.replace(rq.lm.head, sets=8)).net, device, dtype)
    for levels in RQ_LEVELS:
        net = copy.copy(deepest)                                     # shares the weights
        net.levels = levels
        parts[f"rq {levels} levels"] = timed(
            lambda net=net: net.draw(z, lambda logits: pick(logits, 1.0, 0, None)))
    return parts


def head_figures(times, baseline, rate):
    """{part: [seconds a frame, one a repeat]} -> {head: figures}; `baseline` is what the speed-ups
    are of, `rate` frames a second.
    """
    before = {name: [sum(t) for t in zip(times["backbone"], *(
        [times["short context"]] if "short context" in times and "rq" not in name else []))]
        for name in times if name not in ("backbone", "short context")}
    whole = {name: [b + h for b, h in zip(before[name], times[name])] for name in before}
    median = statistics.median
    figures = {}
    for name in before:
        head, all_of_it = median(times[name]), median(whole[name])
        figures[name] = {
            "head_ms": 1000 * head * rate, "whole_ms": 1000 * all_of_it * rate,
            "sampler_speedup": median(b / t for b, t in zip(times[baseline], times[name])),
            "overall_speedup": median(b / t for b, t in zip(whole[baseline], whole[name])),
            "sampler_share": median(h / w for h, w in zip(times[name], whole[name])),
            "seconds_for_30": 30 * all_of_it * rate, "real_time": 1 / (all_of_it * rate)}
    return {name: {k: round(v, 4) for k, v in row.items()} for name, row in figures.items()}


def heads(domains, repeats, device):
    """The tables of both domains, printed as they come: {domain: {head: figures}}."""
    out = {}
    for domain in domains:
        calm, rq = (load(f"configs/paper/{kind}_{domain}.toml") for kind in ("calm", "rq"))
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        times = race(frame_parts(calm, rq, device, dtype), repeats, device)
        out[domain] = head_figures(times, BASELINE[domain], calm.vae.frame_rate)
        backbone = 1000 * statistics.median(times["backbone"]) * calm.vae.frame_rate
        print(f"{domain}: {calm.vae.frame_rate:g} frames, {backbone:.0f} ms of backbone a second")
        print(f"{'':20s}{'head, ms':>10s}{'whole, ms':>10s}{'sampler':>9s}{'overall':>9s}"
              f"{'in sampler':>12s}{'30 s take':>11s}{'real time':>11s}")
        for name, f in out[domain].items():
            print(f"{name:20s}{f['head_ms']:10.1f}{f['whole_ms']:10.1f}"
                  f"{f['sampler_speedup']:8.2f}x{f['overall_speedup']:8.2f}x"
                  f"{100 * f['sampler_share']:11.1f}%{f['seconds_for_30']:9.1f} s"
                  f"{f['real_time']:10.2f}x", flush=True)
    return out



# ---------------------------------------------------------------- sampling

def pocket_tts_model(frames):
    """Pocket TTS's English model with random weights, made to draw so many latents."""
    import importlib.resources

    import tokenizers
    import yaml
    from pocket_tts.models.tts_model import TTSModel
    from pocket_tts.utils.config import Config
    text = (importlib.resources.files("pocket_tts") / "config" / "english.yaml").read_text()
    table = yaml.safe_load(text)
    table["weights_path"] = table["weights_path_without_voice_cloning"] = None
    with tempfile.TemporaryDirectory() as folder:                # its words: w0 w1 ... w3999
        path = table["flow_lm"]["lookup_table"]["tokenizer_path"] = f"{folder}/tokenizer.json"
        words = tokenizers.Tokenizer(tokenizers.models.WordLevel(
            {f"w{i}": i for i in range(4000)}, "w0"))
        words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        words.save(path)
        peer = TTSModel._from_pydantic_config_with_weights(
            Config(**table), 0.7, 1, None, float("inf"))         # EOS never
    peer._estimate_max_gen_len = lambda tokens: frames
    return peer.eval()


def peer_runs(peer, text, voice, frames):
    """(whole(), latents(n)): audio to the end, yielding its pieces; n latents without audio."""
    from pocket_tts.modules.stateful_module import init_states
    words = " ".join(f"w{i}" for i in text[0].tolist())

    def prefix(room):
        state = init_states(peer.flow_lm, 1, room)
        peer._run_flow_lm_and_increment_step(state, audio_conditioning=voice)
        return state

    @torch.no_grad()
    def whole():
        for wav in peer._generate_audio_stream_short_text(
                prefix(voice.shape[1]), words, 2, False, threading.Event()):
            yield wav.shape[-1]

    @torch.no_grad()
    def latents(n):
        state = prefix(voice.shape[1] + text.shape[1] + n)
        peer._run_flow_lm_and_increment_step(state, text_tokens=text)
        x, times = torch.full((1, 1, peer.flow_lm.ldim), math.nan), []
        for _ in range(n):
            start = time.perf_counter()
            x, _ = peer._run_flow_lm_and_increment_step(state, backbone_input_latents=x)
            times.append(time.perf_counter() - start)
        return times[1:]
    return whole, latents


def own_runs(lm, vae, text, voice, frames, device, parallel=False, alone=False):
    options = {"kind": 0, "prompt": voice, "temperature": 0.7}

    def whole():
        if not alone:
            drawn = lm.generate(text, max_frames=frames, **options)
            for wav, _, _ in vae.decode_stream(drawn, parallel=parallel):
                yield wav.shape[-1]
            return
        state = {}
        for x, _ in lm.generate(text, max_frames=frames, **options):
            with torch.no_grad():
                yield vae.decode(vae.denormalize(x)[:, None], state).shape[-1]

    def latents(n):
        times, start = [], 0.0
        for _ in lm.generate(text, max_frames=n, **options):
            now = clock(device)
            times.append(now - start)
            start = now
        return times[1:]
    return whole, latents


def sample_contestants(a):
    """{name: (whole, latents)}, samples a second."""
    tokens = 24
    if a.prefix <= tokens:
        raise BadInput(f"--prefix: must be above {tokens}, its tokens of text")
    if a.peer:
        try:
            frames = round(a.seconds * 12.5)
            peer = pocket_tts_model(frames)
        except ImportError as e:
            raise BadInput(f"--peer {a.peer}: {e.name} is not installed: pip install {a.peer}"
                           ) from None
        state = peer.state_dict()
        part = lambda name: {k.removeprefix(name): v for k, v in state.items()
                             if k.startswith(name)}
        vae_cfg, codec = convert.mimi(part("mimi."))
        lm_cfg, weights, codec["latent_mean"], codec["latent_std"] = convert.pocket_tts(
            part("flow_lm."))
        rows = len(weights["text.weight"])
    else:
        cfg = load(a.config)
        lm_cfg, vae_cfg, rows = cfg.lm, cfg.vae, vocabulary(cfg.data)
        frames = max(3, round(a.seconds * vae_cfg.frame_rate))
    text = torch.randint(0, min(rows, 4000), (1, tokens), device=a.device)
    voice = torch.randn(1, a.prefix - tokens - lm_cfg.prompt_bos, vae_cfg.latent_dim,
                        device=a.device)

    def pair():
        lm, vae = CALM(lm_cfg, vae_cfg.latent_dim, rows, KINDS), VAE(vae_cfg)
        if a.peer:
            lm.load_state_dict(weights)
            vae.load_state_dict(codec)
        lm.eos.bias.data -= 1e4                                              # EOS never
        if a.compile:
            lm.backbone.compile(), lm.head.net.compile(), vae.decoder.compile()
        return lm.to(a.device).eval(), vae.to(a.device).eval()
    lm, vae = pair()
    runs = lambda *models, **how: own_runs(*models, text, voice, frames, a.device, **how)
    found = {"nanoCALM": runs(lm, vae), "nanoCALM, parallel": runs(lm, vae, parallel=True)}
    if not a.peer:
        found["latent by latent"] = runs(lm, vae, alone=True)
    if a.device == "cpu":
        small = pair()
        to_int8(*small)
        found |= {"nanoCALM int8": runs(*small),
                  "nanoCALM int8, parallel": runs(*small, parallel=True)}
    if a.peer:
        from pocket_tts.quantization import RECOMMENDED_CONFIG, apply_dynamic_int8
        voice = torch.randn(1, a.prefix - tokens, lm_cfg.backbone.dim)
        found[a.peer] = peer_runs(peer, text, voice, frames)
        small = copy.deepcopy(peer)
        small._estimate_max_gen_len = peer._estimate_max_gen_len
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            apply_dynamic_int8(small.flow_lm, RECOMMENDED_CONFIG)
        found[f"{a.peer} int8"] = peer_runs(small, text, voice, frames)
    return found, vae_cfg.sample_rate


def bench_sample(a):
    """Contestants take turns; medians; ratios of real-time factors to the first's, turn by turn."""
    contestants, rate = sample_contestants(a)
    if a.threads:                                # last: pocket-tts sets one thread when imported
        torch.set_num_threads(a.threads)
    print(f"{a.peer or a.config}: prefix {a.prefix}, {a.seconds:g} s of audio, torch "
          f"{torch.__version__}, {torch.get_num_threads()} threads an operation", flush=True)
    rows = {name: [] for name in contestants}
    for i in tqdm(range(a.repeats + 1), leave=False, desc="timing"):
        for name, (whole, latents) in contestants.items():
            start, work, first, samples = clock(a.device), time.process_time(), None, 0
            for n in whole():
                samples, first = samples + n, first or clock(a.device) - start
            took, work = clock(a.device) - start, time.process_time() - work
            seconds = samples / rate
            if i:
                rows[name].append((seconds / took, first, work / seconds,
                                   statistics.median(latents(25))))
    figures, lead = {}, rows[next(iter(rows))]
    for name, row in rows.items():
        rtf, first, work, latent = map(statistics.median, zip(*row))
        ratio = statistics.median(r[0] / f[0] for r, f in zip(row, lead))
        figures[name] = {"real_time_factor": round(rtf, 3), "ratio": round(ratio, 3),
                         "first_audio_ms": round(1000 * first, 1),
                         "latent_ms": round(1000 * latent, 2), "cpu": round(work, 4)}
        print(f"{name:26s} {rtf:7.2f} x real time ({ratio:.2f})   "
              f"first audio {1000 * first:6.0f} ms   a latent {1000 * latent:6.1f} ms   "
              f"CPU {work:.3f} s a second", flush=True)
    return figures


def write_json(path, figures):
    if path:
        try:
            with open(path, "w") as f:
                json.dump(figures, f, indent=1)
        except OSError as e:
            raise BadInput(f"--json {path}: cannot be written ({e.strerror})") from None


def main():
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--what", default="vae", choices=["vae", "heads", "sample"])
    p.add_argument("--config", default="configs/quickstart.toml")
    p.add_argument("--domain", nargs="+", default=["speech", "music"], choices=["speech", "music"],
                   help="heads: default both; music wants 12 GB, speech 11 GB in fp32")
    p.add_argument("--peer", choices=["moshi", "pocket-tts"], help="race against this package")
    p.add_argument("--seconds", type=float, default=10.0, help="of audio (default 10)")
    p.add_argument("--repeats", type=int, default=7, help="default 7")
    p.add_argument("--threads", type=int, default=0, help="CPU threads; 0 = torch's choice")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                   choices=["cpu", "cuda"])
    p.add_argument("--prefix", type=int, default=90, help="sample: positions before the audio")
    p.add_argument("--compile", action="store_true", help="torch.compile the networks")
    p.add_argument("--json", help="write the figures here")
    a = p.parse_args()
    if a.repeats < 1 or not a.seconds > 0:
        raise BadInput("--repeats, --seconds: must be positive")
    if a.device == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device cuda: there is none here")
    torch.manual_seed(0)
    torch.set_flush_denormal(True)
    if a.what == "heads":
        torch.set_num_threads(a.threads or torch.get_num_threads())
        where = (torch.cuda.get_device_name() if a.device == "cuda"
                 else f"fp32, {torch.get_num_threads()} threads")
        print(f"one frame of CALM and RQ, torch {torch.__version__}, {where}")
        return write_json(a.json, heads(a.domain, a.repeats, a.device))
    if a.what == "sample":
        if a.peer == "moshi" or a.peer and a.device != "cpu":
            raise BadInput("--what sample: races pocket-tts alone, on --device cpu")
        return write_json(a.json, bench_sample(a))
    if a.peer:
        parts, length = peer_race(a.peer, a.seconds)
    else:
        parts, length = own(load(a.config).vae, a.seconds, a.device, a.compile)
    if a.threads:                                # last: pocket-tts sets one thread when imported
        torch.set_num_threads(a.threads)
    where = (torch.cuda.get_device_name() if a.device == "cuda"
             else f"{torch.get_num_threads()} threads")
    print(f"{a.peer or a.config}: ms a second of audio, torch {torch.__version__}, {where}")
    figures = {}
    for part, contestants in parts.items():
        times = race(contestants, a.repeats, a.device)
        first = times[next(iter(times))]
        for name, each in times.items():
            ms = 1000 * statistics.median(each) / length[part]
            ratio = statistics.median(t / f for t, f in zip(each, first))
            figures.setdefault(part, {})[name] = {"ms": round(ms, 3), "ratio": round(ratio, 3)}
            print(f"{part:14s} {name:16s} {ms:9.2f} ms   {ratio:6.2f} x", flush=True)
    write_json(a.json, figures)


if __name__ == "__main__":
    cli(main)
