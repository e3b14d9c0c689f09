"""Speed: how long the parts take, as ratios measured in one run.

    python -m tools.bench --what vae [--config configs/paper/vae_music.toml] [--peer moshi|pocket-tts]
                    [--seconds 10] [--repeats 7] [--threads 1] [--json figures.json]
    python -m tools.bench --what heads [--domain speech music] [--repeats 3] [--threads 1] [--json ...]
    python -m tools.bench --what sample [--config ... | --peer pocket-tts] [--prefix 90] [--seconds 10]
    python -m tools.bench --what audiocalm [--config configs/audiocalm_quick.toml] [--seconds 10]
                    [--lengths 5 10 20 30 60] [--window 10] [--repeats 7] [--threads 1] [--json ...]

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

    audiocalm  latents alone (their decoding is --what vae), random weights, one row, no guidance;
          a backbone of [audiocalm.backbone], 24 tokens of text, a sound: no speech expert runs
          first   CALM latent by latent (consistency 1 step, TrigFlow 20; head: 3 blocks as wide as
                  the backbone) and AudioCALM block by block (32, 16, 8, 4 steps; few-step LSD 4,
                  1): time and CPU time a second of audio, time to the first latents, passes of the
                  backbone
          then    AudioCALM with 4 steps up to each of --lengths, with its whole history and with
                  the last --window seconds of it: the same since the length before,
                  positions in the cache, bytes that it holds (spare room of its buffers included)

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

from audiocalm import AudioCALM
from backbone import BackboneConfig, KVCache, Transformer
from calm import CALM, CALMConfig
from cli import BadInput, Parser, atomic, check_writable, cli, threads
from config import load
from data import KINDS, vocabulary
from discrete import RQ, pick
from heads import HEADS, HeadConfig, TrigFlow
from gan import VAEGAN
from sample import to_int8
from tools import convert
from vae import VAE


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


def training_step(vae, cfg, device, autocast):
    """A function that runs one forward and backward of all losses over 1-second crops, batch 4."""
    weights = {k: v for k, v in cfg.loss_weights.items() if k != "distill"}
    model = VAEGAN(vae, dataclasses.replace(cfg, disc_start=0, disc_warmup=0,
                                            loss_weights=weights)).to(device)
    samples = max(1, round(vae.frame_rate)) * vae.hop
    wav = 0.1 * torch.randn(4, vae.channels, samples, device=device)

    def step():
        with torch.enable_grad(), autocast():
            for _, loss, _ in model.losses(wav, 0):
                loss.backward()
        model.zero_grad(set_to_none=True)
    return step, 4 * samples / vae.sample_rate


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


def own(config, seconds, device, compiled):
    """{part: {name: function}}, seconds of audio of each part."""
    cfg = config.vae
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
        step, length["training step"] = training_step(variant, config.gan, device,
                                                              autocast)
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


# ---------------------------------------------------------------- AudioCALM

CALM_STEPS = (("consistency", 1), ("trigflow", 20))
BLOCK_STEPS = (("rectified_flow", 32), ("rectified_flow", 16), ("rectified_flow", 8),
               ("rectified_flow", 4), ("lsd", 4), ("lsd", 1))
NAMES = {"consistency": "CALM consistency", "trigflow": "CALM TrigFlow",
         "rectified_flow": "AudioCALM", "lsd": "AudioCALM LSD"}


def same_backbone(cfg, objective):
    """A CALM or an AudioCALM with random weights and the backbone of [audiocalm]; never ends."""
    table = cfg.audiocalm
    sizes = cfg.vae.latent_dim, vocabulary(cfg.data), KINDS
    if objective in dict(CALM_STEPS):
        head = HeadConfig(objective=objective, width=table.backbone.dim, blocks=3)
        lm = CALM(CALMConfig(backbone=table.backbone, head=head), *sizes)
        lm.eos.bias.data -= 1e4
    else:
        head = dataclasses.replace(table.head, objective=objective)
        lm = AudioCALM(dataclasses.replace(table, head=head), *sizes, only="sound")
        lm.stop.bias.data -= 1e4
    return lm.eval()


def held(cache):
    """Positions in a KVCache, and the bytes behind them: a storage that two share counts once."""
    pairs = [*cache.kv.values(), *(b[:2] for b in cache.buffers.values() if b)]
    bytes_of = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                for pair in pairs for t in pair}
    return cache.kv[0][0].shape[2], sum(bytes_of.values())


def drawing(lm, text, marks, steps, rows, device):
    """A function that draws max(marks) latents of sound and appends to `rows`, for each of marks,
    {"at": seconds gone by, "cpu": seconds of CPU, "passes": of the backbone, "positions", "bytes":
    of its cache}.
    """
    def run():
        row, seen = [], {"passes": 0}
        hook = lm.backbone.register_forward_pre_hook(
            lambda net, args: seen.update(passes=seen["passes"] + 1, cache=args[1]))
        start, work = clock(device), time.process_time()
        with torch.autocast(device, torch.bfloat16, device == "cuda"):
            drawn = lm.generate(text, kind=KINDS.index("sound"), max_frames=marks[-1], steps=steps)
            for i, _ in enumerate(drawn, 1):
                if i in marks:
                    at, (positions, size) = clock(device) - start, held(seen["cache"])
                    row.append({"at": at, "cpu": time.process_time() - work,
                                "passes": seen["passes"], "positions": positions, "bytes": size})
        hook.remove()
        rows.append(row)
    return run


def bench_audiocalm(a):
    """The two tables: {"contestants": {name: figures}, "growth": {name: [figures of a length]}}."""
    cfg, median = load(a.config), statistics.median
    rate, block = cfg.vae.frame_rate, cfg.audiocalm.block
    whole = lambda seconds: block * max(1, round(seconds * rate / block))    # latents, whole blocks
    text = torch.randint(0, min(vocabulary(cfg.data), 4000), (1, 24), device=a.device)
    models = {o: same_backbone(cfg, o).to(a.device) for o in NAMES}

    def timed(contestants, marks):
        """{name: (model, steps)} -> {name: [a row of marks, one a repeat]}, taking turns."""
        rows = {name: [] for name in contestants}
        race({name: drawing(lm, text, marks, steps, rows[name], a.device)
              for name, (lm, steps) in contestants.items()}, a.repeats, a.device)
        return {name: each[1:] for name, each in rows.items()}              # without the first

    frames, figures = whole(a.seconds), {"contestants": {}, "growth": {}}
    rows = timed({f"{NAMES[o]}, {n} step{'s' * (n > 1)}": (models[o], n)
                  for o, n in CALM_STEPS + BLOCK_STEPS}, [1, frames])
    print(f"{frames / rate:g} s of audio, {rate:g} latents of {cfg.vae.latent_dim} a second, "
          f"blocks of {block}")
    print(f"{'':28s}{'ms a second':>12s}{'ratio':>9s}{'CPU, ms':>9s}{'first, ms':>11s}"
          f"{'passes a second':>17s}{'real time':>11s}")
    lead = next(iter(rows.values()))
    for name, each in rows.items():
        first, last = ([r[i]["at"] for r in each] for i in (0, 1))
        ms = 1000 * median(last) * rate / frames
        ratio = median(t / r[1]["at"] for t, r in zip(last, lead))
        figures["contestants"][name] = f = {
            "ms": round(ms, 3), "ratio": round(ratio, 3),
            "cpu_ms": round(1000 * median(r[1]["cpu"] for r in each) * rate / frames, 3),
            "first_ms": round(1000 * median(first), 2),
            "passes": round(each[0][1]["passes"] * rate / frames, 2),
            "real_time": round(1000 / ms, 3)}
        print(f"{name:28s}{f['ms']:12.2f}{f['ratio']:8.2f}x{f['cpu_ms']:9.2f}"
              f"{f['first_ms']:11.2f}{f['passes']:17.1f}{f['real_time']:10.2f}x", flush=True)

    flow = models["rectified_flow"]
    last = cfg.audiocalm.window if a.window is None and cfg.audiocalm.window else whole(
        10.0 if a.window is None else a.window)
    contestants = {}
    for name, window in (("whole history", 0), (f"last {last / rate:.4g} s", last)):
        lm = copy.copy(flow)                                                # shares the weights
        lm.cfg = dataclasses.replace(flow.cfg, window=window)
        contestants[name] = lm, 4
    marks = sorted({whole(s) for s in a.lengths})
    print(f"AudioCALM, 4 steps, as it gets longer\n{'':16s}{'length':>9s}{'total':>10s}"
          f"{'ms a second':>13s}{'CPU, ms':>9s}{'positions':>11s}{'cache':>12s}")
    for name, each in timed(contestants, marks).items():
        table = figures["growth"][name] = []
        for i, frames in enumerate(marks):
            length = (frames - (marks[i - 1] if i else 0)) / rate
            row = {"seconds": frames / rate, "total": round(median(r[i]["at"] for r in each), 4)}
            for key, clocked in (("ms", "at"), ("cpu_ms", "cpu")):          # since the mark before
                row[key] = round(1000 / length * median(
                    r[i][clocked] - (r[i - 1][clocked] if i else 0) for r in each), 3)
            row |= {key: each[0][i][key] for key in ("positions", "bytes")}
            table.append(row)
            print(f"{name:16s}{row['seconds']:7.4g} s{row['total']:8.2f} s{row['ms']:13.2f}"
                  f"{row['cpu_ms']:9.2f}{row['positions']:11d}{row['bytes'] / 1e6:9.2f} MB",
                  flush=True)
        print(f"{name:16s}{table[-1]['total'] / table[0]['total']:.2f} x the time for "
              f"{marks[-1] / marks[0]:.4g} x the length")
    return figures


def write_json(path, figures):
    if path:
        with atomic(path) as temp, open(temp, "w") as f:
            json.dump(figures, f, indent=1)


def main():
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--what", default="vae", choices=["vae", "heads", "sample", "audiocalm"])
    p.add_argument("--config", help="default configs/quickstart.toml, of audiocalm "
                                    "configs/audiocalm_quick.toml")
    p.add_argument("--domain", nargs="+", default=["speech", "music"], choices=["speech", "music"],
                   help="heads: default both; music wants 12 GB, speech 11 GB in fp32")
    p.add_argument("--peer", choices=["moshi", "pocket-tts"], help="race against this package")
    p.add_argument("--seconds", type=float, default=10.0, help="of audio (default 10)")
    p.add_argument("--repeats", type=int, default=7, help="default 7")
    p.add_argument("--threads", type=threads, default=0, help="CPU threads; 0 = torch's choice")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                   choices=["cpu", "cuda"])
    p.add_argument("--prefix", type=int, default=90, help="sample: positions before the audio")
    p.add_argument("--lengths", type=float, nargs="+", default=[5, 10, 20, 30, 60],
                   help="audiocalm: seconds at which to look (default 5 10 20 30 60)")
    p.add_argument("--window", type=float,
                   help="audiocalm: seconds of history (default: the config's, else 10)")
    p.add_argument("--compile", action="store_true", help="torch.compile the networks")
    p.add_argument("--json", help="write the figures here")
    a = p.parse_args()
    a.config = a.config or (
        f"configs/{'audiocalm_quick' if a.what == 'audiocalm' else 'quickstart'}.toml")
    if a.repeats < 1 or not min(
            a.seconds, *a.lengths, 1 if a.window is None else a.window) > 0:
        raise BadInput("--repeats, --seconds, --lengths, --window: must be positive")
    if a.device == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device cuda: there is none here")
    if a.json:
        check_writable(a.json)
    torch.manual_seed(0)
    torch.set_flush_denormal(True)
    if a.what == "heads":
        torch.set_num_threads(a.threads or torch.get_num_threads())
        where = (torch.cuda.get_device_name() if a.device == "cuda"
                 else f"fp32, {torch.get_num_threads()} threads")
        print(f"one frame of CALM and RQ, torch {torch.__version__}, {where}")
        return write_json(a.json, heads(a.domain, a.repeats, a.device))
    if a.what == "audiocalm":
        if a.peer or a.compile:
            raise BadInput("--what audiocalm: knows no --peer and no --compile")
        torch.set_num_threads(a.threads or torch.get_num_threads())
        where = (torch.cuda.get_device_name() if a.device == "cuda"
                 else f"fp32, {torch.get_num_threads()} threads")
        print(f"{a.config}: torch {torch.__version__}, {where}")
        return write_json(a.json, bench_audiocalm(a))
    if a.what == "sample":
        if a.peer == "moshi" or a.peer and a.device != "cpu":
            raise BadInput("--what sample: races pocket-tts alone, on --device cpu")
        return write_json(a.json, bench_sample(a))
    if a.peer:
        parts, length = peer_race(a.peer, a.seconds)
    else:
        parts, length = own(load(a.config), a.seconds, a.device, a.compile)
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
