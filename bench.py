"""Speed: how long the parts take, as ratios measured in one run.

    python bench.py --what vae [--config configs/paper/vae_music.toml] [--peer moshi|pocket-tts]
                    [--seconds 10] [--repeats 7] [--threads 1] [--json figures.json]

    vae   encode and decode `seconds` of audio offline, decode latent by latent as a stream, one
          training step (forward, backward) of 1-second crops; all as milliseconds a second of audio
          --config   a VAE of a config, with random weights; beside it the same VAE with its other
                     decoder (conv or iSTFT) where the config allows one
          --peer     Mimi as PyPI `moshi` or `pocket-tts` build it, random weights, against the same
                     weights in vae.py: the outputs are compared first, then timed in turn

Contestants take turns within each repeat, so that a noisy machine slows both; the figure is the
median, ratios are medians of the repeats' ratios. fp32 on a CPU, bf16 autocast and (--compile)
torch.compile on CUDA.
Exit status: 0 done, 2 your mistake (one line says which).
"""
import argparse
import contextlib
import dataclasses
import json
import math
import statistics
import time

import torch
from tqdm import tqdm

import convert
from config import load
from data import BadInput, Parser, cli
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


def main():
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--what", default="vae", choices=["vae"])
    p.add_argument("--config", default="configs/quickstart.toml")
    p.add_argument("--peer", choices=["moshi", "pocket-tts"], help="race against this package")
    p.add_argument("--seconds", type=float, default=10.0, help="of audio (default 10)")
    p.add_argument("--repeats", type=int, default=7, help="default 7")
    p.add_argument("--threads", type=int, default=0, help="CPU threads; 0 = torch's choice")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                   choices=["cpu", "cuda"])
    p.add_argument("--compile", action="store_true", help="torch.compile encoder and decoder")
    p.add_argument("--json", help="write the figures here")
    a = p.parse_args()
    if a.repeats < 1 or not a.seconds > 0:
        raise BadInput("--repeats, --seconds: must be positive")
    if a.device == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device cuda: there is none here")
    torch.manual_seed(0)
    torch.set_flush_denormal(True)
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
    if a.json:
        try:
            with open(a.json, "w") as f:
                json.dump(figures, f, indent=1)
        except OSError as e:
            raise BadInput(f"--json {a.json}: cannot be written ({e.strerror})") from None


if __name__ == "__main__":
    cli(main)
