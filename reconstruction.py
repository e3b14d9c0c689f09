"""How well does a VAE reconstruct held-out clips? The figures of evaluate.py, whose docstring
defines them.

    clip (ch, S) ─► encode ─► mean, log-variance ─► decode ─► reconstruction (ch, S)
        │                         └─► information rate, ABX            │
        └──────────────► log-mel, STFT, SI-SDR, facts, judges ◄────────┘

Precision: the models in fp32 or bf16 (workers.Place); figures in fp32, SI-SDR in fp64.
"""
import math
import os

import torch
from tqdm import tqdm

from audio import load_audio, refuse_poison, save_audio
from cli import BadInput
from corpora import oracle
from data import KINDS
from embeddings import log_mel
from gan import spectral_losses
from intervals import Figure, Figures, ratio_of_means
from vae import kl_loss
from workers import Place, gather, my_block, rank


# ---------------------------------------------------------------------------- one clip


def clip_name(clip):
    """A clip's id, else its file name without extension: the name of the wavs made from it."""
    return clip.id or os.path.splitext(os.path.basename(clip.audio))[0]


def load_clip(clip, cfg, seconds):
    """The first `seconds` of a Clip at the VAE's sample rate (cfg: VAEConfig) -> tensor (ch, S)."""
    return torch.tensor(load_audio(clip.audio, cfg.sample_rate, cfg.channels, seconds=seconds,
                                   allow_silence=True))


def si_sdr(original, estimate):
    """Scale-invariant signal-to-distortion ratio in dB of two waveforms (ch, S)."""
    x = original.double() - original.double().mean()
    y = estimate.double() - estimate.double().mean()
    target = (x * y).sum() / x.pow(2).sum() * x
    return (10 * torch.log10(target.pow(2).sum() / (target - y).pow(2).sum())).item()


def information_rate(vae, mean, logvar):
    """Information in the latents of one clip: KL to N(0, 1) in nats per second, or bits of codes
    per second.
    """
    if vae.quantizer is not None:
        return vae.cfg.frame_rate * vae.cfg.codebooks * math.log2(vae.cfg.codebook_size)
    return kl_loss(mean, logvar).item() * vae.cfg.latent_dim * vae.cfg.frame_rate


def count_right_facts(wav, clip, rate):
    """Measure the facts stated by the clip's text in wav (ch, S) -> (right, total), or None where
    the text is not from the toy corpus, or states none.
    """
    try:
        found = oracle.judge(wav[0].numpy(), clip.text, clip.kind, rate)
    except BadInput:
        return None
    return (found["right"], found["total"]) if found["total"] else None


# ---------------------------------------------------------------------------- all clips


def judge_vae(vae, clips, limit, folder="", judges=None, floor=1e-5, place=Place(), seed=0):
    """Reconstruct the first `limit` clips of each kind -> {kind: {"clips", "log_mel", "stft",
    "si_sdr", "rate", "original", "reconstruction", "intervals": {name: [low, high]}}}; the last two
    figures are shares of facts right.

    Kinds with fewer than two clips of 1024 samples are left out: log_mel is relative to another
    clip. folder: for the wavs, "" = none. judges: Judges that score the clips too, or None.
    floor: of the STFT distance.
    """
    found = {}
    for kind in KINDS:
        chosen = [clip for clip in clips if clip.kind == kind][:limit]
        own = Figures(seed)
        judge_reconstructions(vae, kind, chosen, own, folder, judges, floor, place)
        figures = Figures(seed)
        figures.merge(gather(own))
        figures = {name: by_kind[kind] for name, by_kind in figures.read().items()}
        if "log_mel" in figures:
            found[kind] = {"clips": len(chosen), **in_order(figures)}
    return found


def in_order(figures):
    """{name: Figure} -> {"log_mel": number, ..., "intervals": {name: [low, high]}}."""
    names = ("log_mel", "stft", "si_sdr", "rate", "original", "reconstruction")
    values = {name: round(figures[name].value, 4) if name in figures else None for name in names}
    return values | {"intervals": {name: figures[name].ends() for name in names if name in figures}}


def with_interval(figures, name, clips):
    """The Figure of one name of judge_vae's or judge_lm's; None where there is none."""
    if figures.get(name) is None:
        return None
    return Figure(figures[name], *(figures["intervals"][name] or (None, None)), clips)


@torch.no_grad()
def judge_reconstructions(vae, kind, clips, figures, folder, judges, floor, place):
    """Add the clips of one kind to Figures, those of this process."""
    rate = vae.cfg.sample_rate
    block = my_block(len(clips))
    previous = mel_before(clips[:block.start], vae.cfg)

    for clip in tqdm([clips[i] for i in block], desc=f"reconstruct {kind}", leave=False,
                     disable=rank() > 0):
        # original and reconstruction
        wav = load_clip(clip, vae.cfg, seconds=20.0)
        with place.autocast():
            mean, logvar = vae.encode(wav[None].to(place.device))
            rec = vae.decode(mean)[0, :, :wav.shape[-1]].float().cpu()          # (ch, S)
        refuse_poison(rec, rate, f"reconstruction of {clip.audio}")
        if folder:
            save_audio(f"{folder}/reconstruction/{clip_name(clip)}.wav", rec.numpy(), rate)

        # facts that the oracle measures in either
        for name, heard in (("original", wav), ("reconstruction", rec)):
            facts = count_right_facts(heard, clip, rate)
            if facts is not None:
                figures.add(name, kind, clip.audio, *facts)

        # spectral figures need one window
        if wav.shape[-1] < 1024:
            continue
        figures.add("rate", kind, clip.audio, information_rate(vae, mean, logvar), 1)
        mel = log_mel(wav, rate)                                                # (80, frames)
        add_log_mel(figures, kind, clip.audio, mel, log_mel(rec, rate), previous)
        previous = mel

        # waveform and STFT errors are relative: not for silence
        if wav.shape[-1] >= 2048 and wav.abs().max() > 1e-3:
            losses = spectral_losses(wav[None], rec[None], rate, [2048, 1024, 512, 256], ["stft"],
                                     floor)
            figures.add("stft", kind, clip.audio, losses["stft"].item(), 1)
            figures.add("si_sdr", kind, clip.audio, si_sdr(wav, rec), 1)

        # published metrics
        if judges is not None:
            judges.compare(wav, rec, rate, clip)
            judges.add_latents(mean[0].float().cpu().numpy(), vae.cfg.frame_rate, clip)


def mel_before(clips, cfg):
    """The log-mel spectrum of the last of the clips that has a window; None: there is none."""
    for clip in reversed(clips):
        wav = load_clip(clip, cfg, seconds=20.0)
        if wav.shape[-1] >= 1024:
            return log_mel(wav, cfg.sample_rate)
    return None


def add_log_mel(figures, kind, name, mel, mel_of_rec, previous):
    """Add the error of a clip's spectrum (80, frames), and its distance to the clip before, whose
    mean is the unit of log_mel.
    """
    error = (mel - mel_of_rec).abs().mean().item()
    distance = 0.0
    if previous is not None:
        frames = min(previous.shape[1], mel.shape[1])
        distance = (mel[:, :frames] - previous[:, :frames]).abs().mean().item()
    figures.add("log_mel", kind, name, error, 1, distance, previous is not None,
                formula=ratio_of_means)
