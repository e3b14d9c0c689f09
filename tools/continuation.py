"""How continuations of held-out clips hold up, second by second.

    the first seconds of a clip ─► its continuation (ch, S) ─┬─► alive   share of the clips that
                                                             │           have not ended
                                                             ├─► level   against the prompt, dB
                                                             ├─► mmd     to real seconds
                                                             └─► beat    strength of the pulse

level: median over clips of a second's mean power.
mmd: squared MMD (distances.py) between the clips' seconds and real seconds of the same kind, over
  means and deviations of log-mel spectra.
beat: median over clips of the pulse in the last three seconds: the largest autocorrelation of the
  onset strength at lags of 0.25 to 1 s (240 to 60 beats a minute), the maximum pulse clarity of
  Lartillot et al. (2008). Onset strength: mean over mel bands of how much the log-spectrum rises
  (spectral flux, Böck & Widmer 2013 without their maximum filter). 1 = every beat like the one
  before, a steady tone 0. Medians: white noise 0.20, recorded speech 0.26, the music of three games
  0.47 to 0.60.

tools.studies continue prints the curves, tools.ablate compares them between rows.
"""
import torch
from tqdm import tqdm

from audio import save_audio
from data import KINDS, seconds_of
from distances import mmd
from embeddings import log_mel
from intervals import drawn_evenly
from reconstruction import clip_name, load_clip
from tools.systems import generate

# clips that a figure over clips needs
MIN_CLIPS = 4
# of audio in which a beat is looked for, and its periods, in seconds
BEAT_SECONDS = 3
BEAT_PERIODS = (0.25, 1.0)
# samples between the frames of log_mel
MEL_HOP = 256
CURVES = ("alive", "level", "mmd", "beat")


# ---------------------------------------------------------------------------- measures


def decibels(wav):
    """Mean power of wav in dB, at least -100."""
    return wav.square().mean().clamp(min=1e-10).log10() * 10


def features_by_second(wav, rate):
    """(ch, S) -> list of (160,): mean and standard deviation over time of the log-mel spectrum of
    each whole second.
    """
    mels = [log_mel(second, rate) for second in wav.split(rate, -1) if second.shape[-1] == rate]
    return [torch.cat([mel.mean(1), mel.std(1)]) for mel in mels]


def onset_strength(wav, rate):
    """(ch, S) -> (frames,): mean over mel bands of the rise of the log10 spectrum from frame to
    frame, in decades. What lies 60 dB below the loudest band of wav is silent, and a rise of 0.2 dB
    is none: a steady tone has no onsets. The frames that reach over the ends of wav are left out.
    """
    mel = log_mel(wav, rate)                                                    # (80, frames)
    mel = mel.clamp(min=mel.max() - 3)[:, 2:-2]
    return (mel.diff(dim=1) - 0.01).clamp(min=0).mean(0)


def beat(wav, rate):
    """(ch, S) -> (strength of the pulse, its period in seconds); (0, 0) where nothing changes.

    The correlation of the onset strength with itself, lag frames later, over the part that both
    have; a clip shorter than twice the longest lag is asked at shorter lags only.
    """
    onsets = onset_strength(wav, rate).double()                                 # (frames,)
    shortest, longest = (round(period * rate / MEL_HOP) for period in BEAT_PERIODS)
    longest = min(longest, len(onsets) // 2)
    best = (0.0, 0.0)
    for lag in range(shortest, longest + 1):
        earlier = onsets[:-lag] - onsets[:-lag].mean()
        later = onsets[lag:] - onsets[lag:].mean()
        size = (earlier.square().sum() * later.square().sum()).sqrt()
        strength = (earlier @ later / size.clamp(min=1e-12)).item()
        if strength > best[0] + 1e-6:                       # of equal ones the shortest period
            best = (strength, lag * MEL_HOP / rate)
    return best


# ---------------------------------------------------------------------------- curves


def curves_by_second(wavs, prompt, real, seconds, rate):
    """Continuations (ch, S) of prompts of so many samples -> {"alive", "level", "mmd", "beat"}.

    Each is a list: the prompts' figure, then one per second of new audio, None where fewer than 4
    clips go on. real: list of (160,), features of real seconds; mmd is None without 4 of them on
    each side, beat before there are three seconds.
    """
    levels = [decibels(wav[:, :prompt]) for wav in wavs]
    curves = {name: [] for name in CURVES}
    for second in range(seconds + 1):
        end = prompt + second * rate
        begin = end - rate if second else 0
        going_on = [i for i, wav in enumerate(wavs) if wav.shape[1] >= end or not second]
        curves["alive"].append(round(len(going_on) / len(wavs), 3))

        # the other figures, where enough clips have that second
        found = dict.fromkeys(CURVES[1:])
        if len(going_on) >= MIN_CLIPS:
            pieces = [wavs[i][:, begin:end] for i in going_on]
            changes = [decibels(piece) - levels[i] for i, piece in zip(going_on, pieces)]
            found["level"] = round(torch.stack(changes).median().item(), 2)
            found["mmd"] = distance_to_real(pieces, real, rate)
            if not second or second >= BEAT_SECONDS:
                last = [wavs[i][:, max(0, end - BEAT_SECONDS * rate):end] for i in going_on]
                strengths = torch.tensor([beat(wav, rate)[0] for wav in last])
                found["beat"] = round(strengths.median().item(), 3)
        for name, figure in found.items():
            curves[name].append(figure)
    return curves


def distance_to_real(pieces, real, rate):
    """MMD² of the whole seconds of pieces (ch, S) to `real`; None with fewer than 4 on a side."""
    judged = [features_by_second(piece, rate) for piece in pieces]
    judged = [torch.stack(features) for features in judged if features]
    if min(sum(map(len, judged)), len(real)) < MIN_CLIPS:
        return None
    return round(mmd(judged, [torch.stack(real)]).value, 4)


# ---------------------------------------------------------------------------- of held-out clips


def prompt_samples(cfg):
    """Samples of a continuation that are its prompt: whole latents."""
    samples = round(cfg.sample.prompt_seconds * cfg.vae.sample_rate)
    return -(-samples // cfg.vae.hop) * cfg.vae.hop


@torch.no_grad()
def judge_continuation(contestant, clips, limit, folder=""):
    """Continue at most `limit` clips of each kind -> {kind: {"clips", "alive", "level", "mmd",
    "beat"}}, see curves_by_second. Kinds with fewer than 4 clips of sample.prompt_seconds are left
    out.

    folder: for the wavs, "" = none.
    """
    cfg = contestant.cfg
    vae = contestant.vae
    rate = cfg.vae.sample_rate
    found = {}
    for kind in KINDS:
        of_kind = [clip for clip in clips if clip.kind == kind]
        long_enough = [clip for clip in of_kind if seconds_of(clip) >= cfg.sample.prompt_seconds]
        prompts = drawn_evenly(long_enough, limit)
        if len(prompts) < MIN_CLIPS:
            continue

        # real seconds: of other clips, where there are any
        others = [clip for clip in of_kind if clip not in prompts] or long_enough
        real = []
        for clip in tqdm(drawn_evenly(others, 4 * limit), desc=f"real {kind}", leave=False):
            real += features_by_second(load_clip(clip, vae.cfg, seconds=20.0), rate)

        # their continuations
        wavs = generate(contestant, prompts, kind, "continue")
        if folder:
            for clip, wav in zip(prompts, wavs):
                save_audio(f"{folder}/{clip_name(clip)}.wav", wav.numpy(), rate)
        curves = curves_by_second(wavs, prompt_samples(cfg), real, int(cfg.sample.seconds), rate)
        found[kind] = {"clips": len(prompts), **curves}
    return found


def print_continuation(stage, found):
    """One line per kind and curve: the prompts' figure, then one per second."""
    for kind, curves in found.items():
        for name in CURVES:
            cells = ["-" if value is None else f"{value:.3f}" for value in curves[name]]
            print(f"{stage:12s} {kind:7s} {name:6s}" + "".join(f"{cell:>8s}" for cell in cells))
