"""Speed of the VAE: encoding, decoding, streaming and training.

    python -m tools.bench vae [--config configs/paper/calm_music.toml | --peer moshi|pocket-tts]
                              [--seconds 10] [--repeats 7] [--threads 1] [--json figures.json]

    part            what is timed                                    compared
    encode          wav (1, channels, S) ─► latents, at once         ours with the peer
    decode          latents (1, T, D) ─► wav, at once                iSTFT and conv decoder, or peer
    stream decode   latents ─► wav, one latent at a time             iSTFT and conv decoder
    training step   all losses of 1-second crops, batch 4,           iSTFT and conv decoder
                    forward and backward

All figures are milliseconds per second of audio, with random weights. --config takes the VAE of a
config, and beside it the same VAE with its other decoder, where the config allows one. --peer takes
Mimi as PyPI `moshi` or `pocket-tts` builds it, loads the same weights into vae.py, compares the
outputs first and then times both in turn.
"""
import contextlib
import dataclasses
import math
import statistics

import torch

from cli import number
from config import load
from gan import VAEGAN
from tools.bench import peers
from tools.bench.timing import (inference, median_ratio, processor, race, set_threads)
from tools.convert import mimi
from vae import VAE


def add_options(parser):
    parser.add_argument("--config", default="configs/quickstart.toml",
                        help="the experiment whose VAE is timed (default configs/quickstart.toml)")
    parser.add_argument("--peer", choices=["moshi", "pocket-tts"],
                        help="time Mimi in this package and in vae.py instead")
    parser.add_argument("--seconds", type=number(float, above=0), default=10.0,
                        help="length of the audio (default 10)")
    parser.add_argument("--compile", action="store_true",
                        help="torch.compile encoder and decoder")


def run(args):
    """Time every part -> {part: {name: {"ms": per second of audio, "ratio": to the first}}}."""
    if args.peer:
        parts, lengths = peer_parts(args.peer, args.seconds)
    else:
        parts, lengths = config_parts(load(args.config), args.seconds, args.device, args.compile)

    set_threads(args.threads)            # only now: pocket-tts sets one thread when it is imported
    print(f"{args.peer or args.config}: ms per second of audio, torch {torch.__version__}, "
          f"{processor(args.device)}")

    figures = {}
    for part, contestants in parts.items():
        times = race(contestants, args.repeats, args.device)
        reference = next(iter(times.values()))
        figures[part] = {}
        for name, seconds in times.items():
            ms = 1000 * statistics.median(seconds) / lengths[part]
            ratio = median_ratio(seconds, reference)
            figures[part][name] = {"ms": round(ms, 3), "ratio": round(ratio, 3)}
            print(f"{part:14s} {name:16s} {ms:9.2f} ms   {ratio:6.2f} x", flush=True)
    return figures


# ---------------------------------------------------------------- the VAE of a config

def config_parts(config, seconds, device, compiled):
    """The contestants {part: {name: function}}, and the seconds of audio of each part.

    config: of an experiment; its VAE and that VAE with the other decoder are timed.
    """
    cfg = config.vae
    autocast = contextlib.nullcontext
    if device == "cuda":
        autocast = lambda: torch.autocast("cuda", torch.bfloat16)

    frames = round(seconds * cfg.frame_rate)
    wav = 0.1 * torch.randn(1, cfg.channels, frames * cfg.hop, device=device)  # (1, channels, S)
    z = torch.randn(1, frames, cfg.latent_dim, device=device)                  # (1, T, D)

    variants = [cfg]
    other = other_decoder(cfg)
    if other is not None:
        variants.append(other)

    parts = {"encode": {}, "decode": {}, "stream decode": {}, "training step": {}}
    lengths = dict.fromkeys(parts, seconds)
    for variant in variants:
        name = f"{variant.decoder} decoder"
        vae = VAE(variant).to(device).eval()
        if compiled:
            vae.encoder.compile()
            vae.decoder.compile()

        # the encoder is the same in both
        if variant is cfg:
            parts["encode"]["encoder"] = inference(vae.encode, wav, precision=autocast)

        parts["decode"][name] = inference(vae.decode, z, precision=autocast)
        parts["stream decode"][name] = inference(stream_decode, vae, z, precision=autocast)
        step, lengths["training step"] = training_step(variant, config.gan, device, autocast)
        parts["training step"][name] = step
    return parts, lengths


def other_decoder(cfg):
    """The same VAE with the other decoder, or None where the config allows none.

    The iSTFT gets the hop nearest to 10 ms, in log, that the ratios allow.
    """
    if cfg.decoder == "istft":
        return dataclasses.replace(cfg, decoder="conv")

    hops = [math.prod(cfg.ratios[i:]) for i in range(1, len(cfg.ratios))]
    if cfg.encoder == "stft" or not hops:
        return None
    hop = min(hops, key=lambda h: abs(math.log(h / cfg.sample_rate / 0.01)))
    return dataclasses.replace(cfg, decoder="istft", stft_hop=hop)


def stream_decode(vae, z):
    """Decode z (1, T, D) one latent at a time."""
    state = {}
    for i in range(z.shape[1]):
        vae.decode(z[:, i:i + 1], state)


def training_step(vae_cfg, gan_cfg, device, autocast):
    """A function for forward and backward of all losses, and the seconds of audio in its batch.

    The batch is 4 crops of 1 second; the discriminators take part from the start, a WavLM teacher
    does not.
    """
    weights = {name: weight for name, weight in gan_cfg.loss_weights.items() if name != "distill"}
    gan_cfg = dataclasses.replace(gan_cfg, disc_start=0, disc_warmup=0, loss_weights=weights)
    model = VAEGAN(vae_cfg, gan_cfg).to(device)
    samples = max(1, round(vae_cfg.frame_rate)) * vae_cfg.hop
    wav = 0.1 * torch.randn(4, vae_cfg.channels, samples, device=device)       # (4, channels, S)

    def step():
        with torch.enable_grad(), autocast():
            for _, loss, _ in model.losses(wav, 0):
                loss.backward()
        model.zero_grad(set_to_none=True)
    return step, 4 * samples / vae_cfg.sample_rate


# ---------------------------------------------------------------- Mimi in another package

def peer_parts(package, seconds):
    """Contestants as config_parts gives them: Mimi in `package`, and its weights in vae.py."""
    with peers.installed(package):
        peer, encode, decode = peers.MIMI[package]()

    # the same weights in vae.py
    cfg, state = mimi.to_vae(peer.state_dict())
    ours = VAE(cfg).eval()
    ours.load_state_dict(state)

    # equal outputs, or the times compare nothing
    wav = 0.1 * torch.randn(1, 1, round(seconds * cfg.frame_rate) * cfg.hop)   # (1, 1, S)
    with torch.no_grad():
        z = encode(wav)                                                        # (1, T, D)
        latent_error = (ours.encode(wav)[0] - z).abs().max().item()
        audio_error = (ours.decode(z) - decode(z)).abs().max().item()
    print(f"largest difference: latents {latent_error:.1e}, audio {audio_error:.1e}")

    parts = {
        "encode": {"nanoCALM": inference(ours.encode, wav), package: inference(encode, wav)},
        "decode": {"nanoCALM": inference(ours.decode, z), package: inference(decode, z)},
    }
    return parts, dict.fromkeys(parts, seconds)
