"""A recording as what a model generates from: latents to continue, or the voice that it lends.

    path or wav ─► encode_prompt ──────────────────► latents (1, T, D), continued
                └► level of each latent's audio ─► the window with the most speech
                                                     └─► encode_prompt ─► voice prompt (1, P, D)

A recording is the path of an audio file, or a waveform (channels, S) at the VAE's sample rate. A
file is read in pieces: its length costs no memory.
Precision: that of the VAE.
"""
import math

import numpy as np
import torch
import torch.nn.functional as F

from audio import load_audio
from decoder import seconds_in_file

PIECE_SECONDS = 30.0                # of a recording that is read or encoded at a time
SILENCE = -80.0                     # dB, mean power; digital silence lies below
SPEECH_RANGE = 30.0                 # dB between loud speech and the faintest that counts


@torch.no_grad()
def encode_prompt(lm, vae, wav):
    """wav (B, ch, S) -> x as the model sees it: normalised latents (B, T, D) or codes (B, T, K);
    vae.denormalize takes either back.

    A long wav is encoded in pieces, each behind the state of the one before: the same latents, and
    memory that does not grow.
    """
    wav = F.pad(wav, (0, -wav.shape[-1] % vae.cfg.hop))
    piece = round(PIECE_SECONDS * vae.cfg.frame_rate) * vae.cfg.hop         # samples
    state = {} if wav.shape[-1] > piece else None
    if lm.codes:
        return torch.cat([vae.encode_codes(part, state) for part in wav.split(piece, -1)], 1)
    means = [vae.encode(part, state)[0] for part in wav.split(piece, -1)]
    return vae.normalize(torch.cat(means, 1))


# ---------------------------------------------------------------- reading

def length(recording, cfg):
    """Seconds of a recording (cfg: VAEConfig)."""
    if torch.is_tensor(recording):
        return recording.shape[-1] / cfg.sample_rate
    return seconds_in_file(recording)


def read(recording, cfg, start=0.0, seconds=None):
    """`seconds` (None: all) of a recording from `start` -> tensor (channels, S)."""
    if not torch.is_tensor(recording):
        return torch.tensor(load_audio(recording, cfg.sample_rate, cfg.channels, start=start,
                                       seconds=seconds, allow_silence=True))
    first = round(start * cfg.sample_rate)
    last = None if seconds is None else first + round(seconds * cfg.sample_rate)
    return recording[:, first:last]


# ---------------------------------------------------------------- where it speaks

def frame_levels(wav, hop):
    """Level of the audio behind each latent: wav (ch, S) -> numpy (ceil(S / hop),), dB, at least
    -100.
    """
    wav = F.pad(wav, (0, -wav.shape[-1] % hop))
    power = wav.square().mean(0).unflatten(0, (-1, hop)).mean(1)            # (T,)
    return (10 * power.clamp(min=1e-10).log10()).cpu().numpy()


def recording_levels(recording, cfg):
    """frame_levels of a whole recording (cfg: VAEConfig), read in pieces."""
    piece = round(PIECE_SECONDS * cfg.frame_rate) * cfg.hop / cfg.sample_rate       # seconds
    levels = []
    for i in range(math.ceil(length(recording, cfg) / piece)):
        levels.append(frame_levels(read(recording, cfg, i * piece, piece), cfg.hop))
    return np.concatenate(levels)


def speech_window(levels, frames):
    """The window of at most `frames` latents that holds the most speech -> (its first latent, how
    many of its latents have speech; 0 = silence).

    Speech is what lies at most 30 dB below the loud parts: the level that one in ten of the latents
    that are not silent exceeds. Among equal windows the louder one (mean of dB), then the first.
    """
    audible = levels > SILENCE
    if not audible.any():
        return 0, 0
    floor = np.quantile(levels[audible], 0.9) - SPEECH_RANGE
    speech = audible & (levels > floor)

    # every window: its latents with speech, and its level in whole dB
    windows = np.lib.stride_tricks.sliding_window_view
    n = min(frames, len(levels))
    counts = windows(speech, n).sum(1)
    loudness = windows(levels, n).mean(1).round()
    first = int(np.lexsort((-loudness, -counts))[0])
    return first, int(counts[first])


def best_voice(latents, wav, cfg):
    """The voice prompt (1, P, D) in latents (1, T, D) whose audio is wav (ch, S), or None where it
    is silent.
    """
    first, speech = speech_window(frame_levels(wav, cfg.vae.hop), cfg.data.prompt_frames)
    return latents[:, first:first + cfg.data.prompt_frames] if speech else None


def encode_voice(lm, vae, recording, frames):
    """A recording -> the voice prompt it lends: the latents (1, n <= frames, D) of its window with
    the most speech, or codes; and how many of them have speech. (None, 0) where all is silent.

    Only that window is encoded.
    """
    cfg = vae.cfg
    first, speech = speech_window(recording_levels(recording, cfg), frames)
    if not speech:
        return None, 0
    frame = cfg.hop / cfg.sample_rate                                       # seconds
    wav = read(recording, cfg, first * frame, frames * frame)
    return encode_prompt(lm, vae, wav[None].to(vae.latent_mean.device)), speech
