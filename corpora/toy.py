"""A corpus made by rule, and an oracle that measures whether audio says what its text says.

So that everything runs with nothing downloaded: a small formant synthesiser speaks digits and a
few words in six voices, and simple generators make sounds and musical phrases whose captions are
measurable facts. The oracle reads the facts back from any waveform, without learning: it is how
the quick runs tell a model that obeys its text from one that only sounds plausible.

    "seven three" --> facts {0: seven, 1: three} --> phonemes --> tracks of F1..F3, voice, hiss
                                                                         |
      pulses (f0) --STFT-- x source x cascade of formants ---(+)--OLA--> wav (S,) in [-1, 1]
      noise       --STFT-- x breath x formants + hiss band ---/           |
                                                                         v
    {right: 2, total: 2, heard: "seven three"} <-- DTW against every word in every voice (oracle)

    "two low beeps"                       --> {type: beep, count: 2, pitch: low}       sound
    "a fast rising scale, high, flute"    --> {shape, tempo, register, timbre}         music

Speech held out for validation: 15 of the 100 ordered pairs of digits never stand next to each
other in training, and every validation string contains one. A model that only memorised
strings cannot score there.

    python -m corpora.toy --out data/toy --clips 1000             # wav/, train.jsonl, valid.jsonl
    python -m corpora.toy --say "seven three" --voice 1 --out x.wav
    python -m corpora.toy --say "two clicks" --kind sound --out x.wav
    python -m corpora.toy --check 100                             # the oracle's own accuracy, as a table

Neither paper has such a corpus; it replaces none of theirs. Same seed, same bytes (on the same
build of numpy). Precision: float32 throughout, float64 for phases; files are 16-bit PCM.
"""

import argparse
import functools
import json
import os
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import soundfile as sf
from tqdm import tqdm

from cli import BadInput, cli
from schema import Kind, Range, build

DIGITS = "zero one two three four five six seven eight nine".split()
WORDS = "yes no go stop up down left right".split()
KINDS = ("speech", "sound", "music")
RATES = (16000, 24000)
LONGEST = {"speech": (0.05, 0.6), "sound": (1.3, 0), "music": (1.6, 0)}  # s: fixed, per word

# Ordered pairs of digits never spoken in training; every digit is a first and a second somewhere.
HELD_OUT = {(a, (a + 3) % 10) for a in range(10)} | {(a, (3 * a + 2) % 10) for a in range(0, 10, 2)}


@dataclass
class ToyConfig:
    """The [toy] table. Two equal tables make the same files, byte for byte."""

    # training clips; 1000 are 20 minutes of audio, made in 15 s
    clips: Annotated[int, Range(1)] = 1000
    # held-out clips; speech among them uses only unseen digit pairs
    valid_clips: Annotated[int, Range(1)] = 90
    # the first 1 to 6 voices; more make speaker identity a real task
    voices: Annotated[int, Range(1, 6)] = 4
    # words in a training string, at least
    digits_min: Annotated[int, Range(1)] = 1
    # and at most; a spoken digit lasts about a third of a second
    digits_max: int = 4
    # a quarter of the strings also carry a word such as "yes" or "stop"
    words: bool = True
    kinds: list[Kind] = field(default_factory=lambda: list(KINDS))
    # share of each of `kinds`, sum 1
    shares: list[Annotated[float, Range(0)]] = field(default_factory=lambda: [0.5, 0.25, 0.25])
    # seconds; a promise to the loader: clips keep their natural length below
    max_seconds: float = 2.5
    # of every random choice
    seed: Annotated[int, Range(0)] = 0

    def __post_init__(self):
        if self.digits_max < self.digits_min:
            raise ValueError(f"digits_max: {self.digits_max} is below digits_min, raise it")
        if not self.kinds or len(set(self.kinds)) < len(self.kinds):
            raise ValueError(f"kinds: {self.kinds} must be some of {', '.join(KINDS)}, each once")
        if len(self.shares) != len(self.kinds) or abs(sum(self.shares) - 1) > 1e-6:
            raise ValueError(f"shares: {self.shares} must be one share for each of kinds, sum 1")
        need = max(LONGEST[k][0] + LONGEST[k][1] * self.digits_max for k in self.kinds)
        if self.max_seconds < need - 1e-9:
            raise ValueError(f"max_seconds: {self.max_seconds} is too short for these clips, use "
                             f"at least {need:.2f} or lower digits_max")


# ---- what a text claims --------------------------------------------------------------------------

COUNTS = ("one", "two", "three", "four")
CAPTIONS = {  # {caption: facts}; a group is drawn with equal chance, then one of its captions
    "sound": [
        {f"{n} {p} beep{'s' * (n != 'one')}": dict(type="beep", count=n, pitch=p)
         for n in COUNTS for p in ("low", "middle", "high")},
        {f"{n} click{'s' * (n != 'one')}": dict(type="click", count=n) for n in COUNTS},
        {f"{n} noise burst{'s' * (n != 'one')}": dict(type="noise", count=n, length="short")
         for n in COUNTS} | {"a long noise burst": dict(type="noise", count="one", length="long")},
        {f"a {v} {d} chirp": dict(type="chirp", speed=v, direction=d)
         for v in ("slow", "fast") for d in ("rising", "falling")}],
    "music": [
        {f"a {v} {s}, {r}, {t}": dict(tempo=v, shape=s, register=r, timbre=t)
         for v in ("slow", "fast") for r in ("low", "high") for t in ("flute", "organ", "pluck")}
        for s in ("rising scale", "falling scale", "arpeggio", "repeated note")],
}


def facts(text, kind):
    """The claims of a text, {fact: value}; {} for "". BadInput if the toy's language lacks it."""
    if kind not in KINDS:
        raise BadInput(f"kind {kind!r} is not one of {', '.join(KINDS)}")
    if kind == "speech":
        for w in text.split():
            if w not in SPELL:
                raise BadInput(f"the toy voice cannot say {w!r}, only {' '.join(SPELL)}")
        return dict(enumerate(text.split()))
    for group in CAPTIONS[kind]:
        if text in group:
            return group[text]
    if text:
        raise BadInput(f"no toy {kind} is called {text!r}; some are: "
                       + "; ".join(list(group)[-1] for group in CAPTIONS[kind]))
    return {}


# ---- speech: text -> waveform --------------------------------------------------------------------

# f0 Hz, formant scale, breath, tempo, glottal tilt Hz (lower is duller)
VOICES = ((106, .93, .04, 1.04, 800), (212, 1.18, .12, 0.98, 900), (130, 1.02, .35, 0.94, 350),
          (176, 1.10, .04, 1.06, 1800), (86, .86, .08, 0.96, 1500), (152, 1.05, .08, 1.0, 600))

# name: ms, voice, breath, F1, F2, F3 Hz (0: whatever the neighbours have), hiss, its centre, width.
# Vowels after Peterson & Barney (1952). cl is a closure; t d k g p are bursts, h the breath after.
SEGMENTS = {name: [float(v) for v in row] + [0., 5000., 2000.][len(row) - 6:] for name, *row in (
    line.split() for line in """
    sil  50  0   0     0    0    0 ;  cl   45  0   0     0    0    0
    IY  150 1.6  0   280 2280 3000 ;  IH   90 1.2  0   400 1980 2550 ;  EH  95 1   0  540 1830 2480
    AH   95 1    0   640 1190 2450 ;  AX   60  .8  0   520 1400 2400 ;  AA 110 1   0  740 1120 2450
    AO  190 1    0   560  850 2420 ;  O1   85 1    0   540  980 2350 ;  UW 110 1.6 0  310  900 2250
    E1  110 1.1  0   480 1950 2550 ;  I2   80 1.3  0   330 2200 2800 ;  U2  80 1.3 0  340  800 2250
    W    65 1.2  0   290  620 2150 ;  Y    65 1.2  0   260 2300 3050 ;  R   75  .8 0  380 1150 1550
    RX   80  .8  0   450 1280 1650 ;  L    70  .7  0   340 1050 2800 ;  N   70  .6 0  240 1550 2600
    V    60  .4  0   260 1050 2250   .1 6000 3500  ;  Z  75 .35  0  270 1750 2550   .6 5800 1200
    S   100 0    0   300 1750 2550  1.4 5800 1200  ;  F  85 0  .03  320 1100 2300   .3 6000 4000
    TH   85 0  .03   320 1350 2500   .2 5200 4500  ;  h  32 0  .5   350 1500 2500  .05 5000 3000
    t    12 0   .1   320 1800 2600  1.0 4500 1800  ;  d  12 .5 .1   300 1750 2600   .8 4000 1800
    k    16 0   .1   320 1900 2300  1.0 2200  700  ;  g  16 .5 .1   300 1500 2200   .8 1700  700
    p    10 0   .1   320 1000 2250   .6 1000  900""".replace(";", "\n").strip().splitlines())}
SPELL = {word: segments for word, *segments in (line.split() for line in """
    zero Z IH R O1 U2  ; one W AH AH N       ; two t h UW UW   ; three TH R IY   ; four F AO RX
    five F AA I2 V     ; six S IH cl k S     ; seven S EH V AX N ; eight E1 I2 cl t h
    nine N AA I2 N     ; yes Y EH S          ; no N O1 U2 U2   ; go g O1 U2 U2
    stop S cl t AA cl p ; up AH AH cl p h    ; down d AA U2 N  ; left L EH F cl t
    right R AA I2 cl t""".replace(";", "\n").strip().splitlines())}


def _smooth(x, n):
    """Hann-weighted moving average of n rows along axis 0, edges held."""
    w = np.hanning(n + 2)[1:-1]
    pad = np.pad(x, [(n // 2, n - 1 - n // 2)] + [(0, 0)] * (x.ndim - 1), mode="edge")
    return sum(w[i] * pad[i:i + len(x)] for i in range(n)) / w.sum()


def _stft(x, n, hop, nfft=None):
    """Hann windows of n samples centred on multiples of hop: (len(x) // hop + 1, F) complex."""
    x = np.lib.stride_tricks.sliding_window_view(np.pad(x, (n // 2, n)), n)[::hop]
    x = x[:-(n // 2 // hop)] * np.hanning(n + 1)[:-1].astype(np.float32)
    return np.fft.rfft(x, nfft).astype(np.complex64)


def _overlap(frames, hop):
    """Adds frames (T, k hop), one every hop samples, into ((T + k - 1) hop,)."""
    T, k = len(frames), frames.shape[1] // hop
    out = np.zeros((T + k - 1, hop), np.float32)
    for i in range(k):                                  # one hop-wide column at a time
        out[i:i + T] += frames[:, i * hop:(i + 1) * hop]
    return out.reshape(-1)


def _speak(words, voice, rng, sr):
    """Words -> (wav, word times). The source-filter model in the STFT domain: hop 5 ms, each
    20 ms frame of pulses and of noise is multiplied by the complex (hence causal) response of
    five resonators, and the frames overlap-add into the waveform."""
    if not 0 <= voice < len(VOICES):
        raise BadInput(f"voice {voice} does not exist, use 0 to {len(VOICES) - 1}")
    f0, scale, breath, tempo, tilt = VOICES[voice]
    f0, tempo = f0 * (1 + rng.uniform(-.08, .08)), tempo * (1 + rng.uniform(-.1, .1))
    rows, ends, times = [], [], []                      # segments, their ends in s, word times
    def add(name, seconds):
        rows.append(SEGMENTS[name])
        ends.append((ends[-1] if ends else 0.) + seconds)
    add("sil", rng.uniform(.03, .08))
    for i, w in enumerate(words):
        if i:
            add("sil", rng.uniform(.04, .12))
        start = ends[-1]
        for name in SPELL[w]:
            add(name, SEGMENTS[name][0] / 1000 / tempo)
        times.append([w, round(start, 3), round(ends[-1], 3)])
    add("sil", rng.uniform(.03, .06))

    hop, T = sr // 200, int(ends[-1] * 200) + 1         # 5 ms
    track = np.array(rows)[np.searchsorted(ends, np.arange(T) / 200, side="right").clip(
        max=len(rows) - 1)]                             # (T, 9)
    known = np.flatnonzero(track[:, 3])
    formants = np.stack([np.interp(np.arange(T), known, track[known, i]) for i in (3, 4, 5)], 1)
    formants = _smooth(formants, 15) * scale            # coarticulation: about 40 ms
    amp, breathe, hiss, centre, width = _smooth(track[:, [1, 2, 6, 7, 8]], 3).T[..., None] \
        .astype(np.float32)

    sec = np.arange(T * hop) / sr
    pitch = 1.1 - .25 * sec / sec[-1]                   # declination ...
    for _, a, b in times:                               # ... an accent on each word ...
        pitch += .08 * np.exp(-.5 * ((sec - a - .35 * (b - a)) / .07) ** 2)
    knots = np.arange(0, sec[-1] + .05, .03)            # ... and 1 % of flutter
    pitch *= f0 * np.interp(sec, knots, 1 + .01 * rng.standard_normal(len(knots)))
    phase = np.cumsum(pitch / sr)
    n = np.flatnonzero(np.diff(np.floor(phase))) + 1    # a pulse where the phase passes an integer,
    frac = ((phase[n] % 1) * sr / pitch[n]).clip(0, 1)  # between two samples, of unit power
    pulses = np.zeros(len(sec), np.float32)
    pulses[n] += np.sqrt(sr / pitch[n]) * (1 - frac)
    pulses[n - 1] += np.sqrt(sr / pitch[n]) * frac
    noise = rng.standard_normal(len(sec), dtype=np.float32)

    f = np.fft.rfftfreq(8 * hop, 1 / sr).astype(np.float32)
    z = np.exp(-2j * np.pi * f / sr).astype(np.complex64)
    gain, poles = 1, 1                                  # cascade of resonators, gain 1 at 0 Hz
    for hz, bw in zip((*formants.T[..., None], 3500 * scale, 4500 * scale),
                      (80 * scale, 100 * scale, 140 * scale, 250, 350)):
        r = np.float32(np.exp(-np.pi * bw / sr))
        c = (2 * r * np.cos(2 * np.pi * hz / sr)).astype(np.float32)
        gain, poles = gain * (1 - c + r * r), poles * (1 - c * z + r * r * z * z)
    tract = gain / poles                                # (T, F)
    glottis = ((1j * f / 150) / ((1 + 1j * f / 150) * (1 + 1j * f / tilt))).astype(np.complex64)
    airy = 1.2 * f / (f + 1000)
    spec = _stft(pulses, 4 * hop, hop, 8 * hop)[:T] * (tract * (glottis * (2 * amp)))
    spec += _stft(noise, 4 * hop, hop, 8 * hop)[:T] * (
        tract * (airy * (breathe + breath * amp))
        + .5 * hiss * np.exp(-.5 * ((f - centre) / width) ** 2))
    wav = _overlap(np.fft.irfft(spec, 8 * hop).astype(np.float32), hop)
    return wav[2 * hop:2 * hop + len(sec)], times


# ---- sound and music: text -> waveform -----------------------------------------------------------

def _tone(freq, seconds, sr, harmonics=(1,), attack=.008, decay=0.):
    """A note: harmonics of freq (Hz, number or (S,)) with soft ends; decay in 1/s."""
    S = int(seconds * sr)
    t = np.arange(S) / sr
    phase = 2 * np.pi * np.cumsum(np.broadcast_to(freq, S)) / sr
    wav = sum(a * np.sin((k + 1) * phase) for k, a in enumerate(harmonics)
              if a and (k + 1) * np.max(freq) < .47 * sr)
    return wav * np.minimum(1, np.minimum(t, t[-1] - t) / attack) * np.exp(-decay * t)


def _sound(claim, rng, sr):
    """Claims -> ([(start s, wav), ...], length of the clip in s)."""
    lead, kind = rng.uniform(.04, .1), claim["type"]
    if kind == "chirp":
        secs = rng.uniform(.75, .9) if claim["speed"] == "slow" else rng.uniform(.28, .36)
        lo, hi = rng.uniform(300, 500), rng.uniform(1800, 2600)
        a, b = (lo, hi) if claim["direction"] == "rising" else (hi, lo)
        freq = a * (b / a) ** np.linspace(0, 1, int(secs * sr))
        parts = [(lead, _tone(freq, secs, sr, attack=.02))]
    else:
        base = {"low": 280, "middle": 780, "high": 2100}.get(claim.get("pitch"), 0)
        base *= rng.uniform(.88, 1.12)
        step, parts = rng.uniform(.21, .27), []
        secs = {"beep": rng.uniform(.1, .13), "click": .03, "noise": rng.uniform(.09, .12)}[kind]
        if claim.get("length") == "long":
            secs = rng.uniform(.55, .8)
        ring, colour = rng.uniform(1500, 3500), rng.uniform(.3, .7)
        for i in range(COUNTS.index(claim["count"]) + 1):
            n = rng.standard_normal(int(secs * sr))
            t = np.arange(len(n)) / sr
            if kind == "beep":
                x = _tone(base, secs, sr)
            elif kind == "click":
                x = np.exp(-t / .003) * (np.sin(2 * np.pi * ring * t) + .5 * n)
            else:
                n[1:] += colour * n[:-1]                # slightly low-passed
                x = n * .3 * np.minimum(1, np.minimum(t, t[-1] - t) / .006)
            parts.append((lead + i * step, x))
    return parts, min(1.3, max(.8, parts[-1][0] + secs + rng.uniform(.05, .12)))


def _music(claim, rng, sr):
    """Claims -> ([(start s, wav), ...], length of the clip in s)."""
    step = rng.uniform(.26, .3) if claim["tempo"] == "slow" else rng.uniform(.13, .15)
    notes = 5 if claim["tempo"] == "slow" else 8
    scale = [0, 2, 4, 5, 7, 9, 11, 12][:notes]
    shape = {"rising scale": scale, "falling scale": scale[::-1], "repeated note": [4] * notes,
             "arpeggio": [0, 7, 12, 7, 0] if notes == 5 else [0, 4, 7, 12, 7, 4, 0, 4],
             }[claim["shape"]]
    base = (230 if claim["register"] == "low" else 720) * 2 ** (rng.uniform(-2.5, 2.5) / 12)
    tone = {"flute": dict(harmonics=(1, .06), attack=.025), "pluck": dict(
        harmonics=(1, .5, .33, .2, .12, .08), attack=.004, decay=7 / step * .75),
        "organ": dict(harmonics=(1, 0, .6, 0, .4, 0, .25), attack=.012)}[claim["timbre"]]
    lead = rng.uniform(.03, .08)
    parts = [(lead + i * step, _tone(base * 2 ** (s / 12), step * .84, sr, **tone))
             for i, s in enumerate(shape)]
    return parts, min(1.6, max(1., lead + notes * step + rng.uniform(.02, .06)))


def synth(text, kind, *, voice=0, seed=0, sample_rate=16000):
    """Text -> (wav float32 (S,) within +-0.9, words [[word, start s, end s], ...]).

    kind is speech, sound or music; voice matters for speech only; seed varies pitch (+-8 %),
    tempo (+-10 %), gaps and level. Raises BadInput for a text or voice that does not exist."""
    if sample_rate not in RATES:
        raise BadInput(f"sample rate {sample_rate} is not supported, use 16000 or 24000")
    claim, words, rng = facts(text, kind), [], np.random.default_rng(seed)
    if not claim:
        raise BadInput(f"nothing to make: the {kind} text is empty")
    if kind == "speech":
        wav, words = _speak(list(claim.values()), voice, rng, sample_rate)
    else:
        parts, seconds = (_sound if kind == "sound" else _music)(claim, rng, sample_rate)
        wav = np.zeros(int(seconds * sample_rate))
        for a, x in ((int(start * sample_rate), x) for start, x in parts):
            wav[a:a + len(x)] += x[:len(wav) - a]
    wav = wav * (rng.uniform(.6, .9) / np.abs(wav).max())
    wav = wav + 3e-4 * rng.standard_normal(len(wav))    # the room: no clip is digitally silent
    return wav.astype(np.float32), words


# ---- the oracle: waveform -> what it says --------------------------------------------------------

def _power(wav, sr, win, hop, nfft=None):
    """Power spectra (T, F); win and hop in seconds."""
    spec = _stft(wav, int(win * sr), int(hop * sr), nfft)
    return (spec.real ** 2 + spec.imag ** 2).astype(np.float32)


@functools.cache
def _mel(sr, bins, n=18, low=100., high=7600.):
    """Triangles (F, n), equal steps in mel = 2595 log10(1 + f/700)."""
    edges = np.linspace(2595 * np.log10(1 + low / 700), 2595 * np.log10(1 + high / 700), n + 2)
    hz = 700 * (10 ** (edges / 2595) - 1)
    f = np.linspace(0, sr / 2, bins)[:, None]
    up, down = (f - hz[:-2]) / (hz[1:-1] - hz[:-2]), (hz[2:] - f) / (hz[2:] - hz[1:-1])
    return np.maximum(0, np.minimum(up, down)).astype(np.float32)


def _ears(wav, sr):
    """Log-mel (T, 18) at 12.5 ms, in units of 10 dB above a floor 38 dB below the clip's peak."""
    power = _power(wav, sr, .032, .0125)
    power = power @ _mel(sr, power.shape[1])
    loud = power.max(1)
    peak = np.percentile(loud[loud >= 1e-3 * loud.max()], 95)       # however long the silence
    return np.maximum(0, np.log10(power / (peak + 1e-12) + 1e-12) + 3.8)


@functools.cache
def _templates(sr, names):
    """Every word in every voice, end to end: features (S, 18), word of each state (S,), the first
    and the last state of each template. Two states that cannot be heard part the templates."""
    feats, word, first, last = [], [], [], []
    for i, w in enumerate(names):
        for v in range(len(VOICES)):
            wav, ((_, a, b),) = synth(w, "speech", voice=v, seed=v, sample_rate=sr)
            x = _ears(wav, sr)[round(a / .0125):round(b / .0125) + 1]
            feats.append(np.concatenate([np.full_like(x[:2], 1e4), x]))
            first.append(len(word) + 2)
            word.extend([i] * (len(x) + 2))
            last.append(len(word) - 1)
    return np.concatenate(feats), np.array(word), np.array(first), np.array(last)


def _listen(wav, sr, n, names):
    """The best n words: one-pass dynamic time warping (Bridle and Brown 1979; Ney 1984) of the
    frames against all templates at once, level l = the l-th word. In one frame a path goes on by
    one state, or at a price stays or skips one; between words it may rest in silence."""
    feats, word, first, last = _templates(sr, names)
    x = _ears(wav, sr)
    quiet, V = (x ** 2).sum(1), len(names)
    dist = np.sqrt(np.maximum(0, quiet[:, None] + (feats ** 2).sum(1) - 2 * x @ feats.T))
    cost = np.full((n, len(word)), 1e9, np.float32)     # of the best path now in this state
    said = np.zeros((n, len(word)), np.int64)           # its words so far, as digits in base V
    rest, rest_said = np.full(n + 1, 1e9, np.float32), np.zeros(n + 1, np.int64)
    rest[0] = 0                                         # the same for silence after l words
    for d, q in zip(dist, np.sqrt(quiet)):
        best = last[cost[:, last].argmin(1)]            # word l may end now ...
        out, out_said = cost[np.arange(n), best], said[np.arange(n), best]
        enter, enter_said = rest[:-1].copy(), rest_said[:-1].copy()
        np.copyto(enter_said[1:], out_said[:-1], where=out[:-1] < enter[1:])
        np.minimum(enter[1:], out[:-1], out=enter[1:])  # ... and word l + 1 begin, or silence
        np.copyto(rest_said[1:], out_said, where=out < rest[1:])
        rest[1:] = np.minimum(rest[1:], out)
        rest += q
        cost[:, first - 1] = enter[:, None]
        said[:, first - 1] = enter_said[:, None] * V + word[first]
        new, new_said = cost + np.float32(2.5), said.copy()
        for step, price in ((1, 0), (2, 3)):
            move = cost[:, :-step] + np.float32(price)
            better = move < new[:, step:]
            np.copyto(new[:, step:], move, where=better)
            np.copyto(new_said[:, step:], said[:, :-step], where=better)
        cost, said = new + d, new_said
    end = last[cost[-1, last].argmin()]
    code = int(said[-1, end] if cost[-1, end] < rest[n] else rest_said[n])
    return [names[code // V ** i % V] for i in reversed(range(n))]


def _pitch(wav, sr):
    """The strongest partial in 10 ms steps: its Hz (T,), the frame's power (T,), the share of the
    power within 60 Hz of it, and the amplitudes of its 2nd and 3rd harmonic relative to it."""
    power = _power(wav, sr, .04, .01, 4096)
    df = sr / 4096
    lo, hi = int(150 / df), int(3200 / df)
    peak = lo + power[:, lo:hi].argmax(1)
    total = np.concatenate([np.zeros((len(power), 1)), power.cumsum(1, dtype=np.float64)], 1)
    def around(k, w=round(60 / df)):
        k = np.clip(k, w, power.shape[1] - w - 1)
        return np.take_along_axis(total, (k + w)[:, None], 1)[:, 0] \
            - np.take_along_axis(total, (k - w)[:, None], 1)[:, 0]
    main = around(peak) + 1e-12
    return (peak * df, total[:, -1], main / (total[:, -1] + 1e-12),
            np.sqrt(around(2 * peak) / main), np.sqrt(around(3 * peak) / main))


def _hear_sound(wav, sr):
    """Events from the envelope, then noise, chirp or beep from the strongest partial."""
    env = _power(wav, sr, .016, .004).sum(1)
    env = np.sqrt(_smooth(env, 4))
    top = np.percentile(env, 99.5)
    events, start = [], None                            # louder than .3 of the top, until below .15
    for i, e in enumerate(np.append(env, 0)):
        if start is None and e > .3 * top:
            start = i
        elif start is not None and e < .15 * top:
            events, start = events + [(start * .004, i * .004)], None
    joined = []
    for a, b in events:                                 # a gap below 40 ms is no gap
        joined = joined[:-1] + [(joined[-1][0], b)] if joined and a - joined[-1][1] < .04 \
            else joined + [(a, b)]
    hz, power, tonal, _, _ = _pitch(wav, sr)
    loud = power > .05 * power.max()
    length = np.median([b - a for a, b in joined])
    many = COUNTS[min(len(joined), 4) - 1]
    s = "s" * (many != "one")
    if length < .065:
        return f"{many} click{s}"
    if np.average(tonal, weights=power) < .5:
        return "a long noise burst" if length > .3 else f"{many} noise burst{s}"
    way = np.polyfit(np.flatnonzero(loud), np.log2(hz[loud]), 1, w=np.sqrt(power[loud]))[0] \
        * loud.sum()
    if len(joined) == 1 and abs(way) > .8:              # octaves
        return f"a {'slow' if length > .55 else 'fast'} {'rising' if way > 0 else 'falling'} chirp"
    hz = np.median(hz[loud])
    return f"{many} {'low' if hz < 470 else 'middle' if hz < 1280 else 'high'} beep{s}"


def _hear_music(wav, sr):
    """Shape and register from the pitch track, tempo from the envelope's autocorrelation (four
    or seven notes a second), timbre from the 2nd and 3rd harmonics."""
    hz, power, tonal, second, third = _pitch(wav, sr)
    loud = power > .03 * power.max()
    near = np.lib.stride_tricks.sliding_window_view(np.pad(np.log2(hz), 3, mode="edge"), 7)
    t, octave = np.flatnonzero(loud), np.median(near, 1)[loud]      # 70 ms median: no outliers
    slope = np.corrcoef(t, octave)[0, 1] if octave.std() > 0 else 0
    shape = "repeated note" if np.ptp(np.percentile(octave, [15, 85])) < .08 else \
        "rising scale" if slope > .7 else "falling scale" if slope < -.7 else "arpeggio"
    env = np.sqrt(_power(wav, sr, .024, .005).sum(1))
    a, *_, b = np.flatnonzero(env > .1 * env.max()).tolist() * 2    # without silence around
    env = np.pad(env[a:b + 1] - env[a:b + 1].mean(), 40)
    beat = [np.dot(env[:-k], env[k:]) for k in range(24, 34)]    # lags of 120 to 165 ms
    tempo = "fast" if max(beat) > .3 * np.dot(env, env) else "slow"
    h2, h3 = np.median(second[loud]), np.median(third[loud])
    timbre = "organ" if h3 > .25 and h2 < .6 * h3 else "pluck" if h2 > .25 else "flute"
    return f"a {tempo} {shape}, {'low' if np.median(hz[loud]) < 500 else 'high'}, {timbre}"


def oracle(wav, text, kind, sample_rate=16000):
    """Measured facts of mono audio (S,) against the claimed: {"right", "total", "heard"};
    heard is what it says, in the toy's language. Ignores level; deaf to phase. A speech answer
    picks from the ten digits when the text is digits only, else from digits and words together."""
    want, wav = facts(text, kind), np.asarray(wav, np.float32).reshape(-1)
    if not np.isfinite(wav).all() or len(wav) < .1 * sample_rate or np.abs(wav).max() < 1e-4:
        return dict(right=0, total=len(want), heard="")
    if kind == "speech":
        names = tuple(DIGITS if set(want.values()) <= set(DIGITS) else DIGITS + WORDS)
        heard = " ".join(_listen(wav, sample_rate, len(want), names))
    else:
        heard = (_hear_sound if kind == "sound" else _hear_music)(wav, sample_rate)
    got = facts(heard, kind)
    return dict(right=len(want.items() & got.items()), total=len(want), heard=heard)


def chance(text, kind):
    """The share of facts right, on average, for a caption drawn blindly as the corpus draws it."""
    want = facts(text, kind)
    if kind == "speech":
        return 1 / len(DIGITS if set(want.values()) <= set(DIGITS) else DIGITS + WORDS)
    right = [np.mean([len(want.items() & got.items()) for got in group.values()])
             for group in CAPTIONS[kind]]
    return float(np.mean(right)) / len(want)


def degrade(wav, how, sample_rate=16000):
    """What a vocoder may do to a clip: "noise" at 20 dB SNR, "phase" lost and rebuilt by eight
    rounds of Griffin and Lim (1984), "smear" of the magnitudes over 3 x 3 cells (8 ms, 31 Hz)."""
    rng, n, hop = np.random.default_rng(0), sample_rate * 4 // 125, sample_rate // 125
    if how == "noise":
        return (wav + .1 * wav.std() * rng.standard_normal(len(wav))).astype(np.float32)
    spec = _stft(wav, n, hop)
    def resynth(magnitude, angle):                      # 1.5: squared windows at 4x overlap
        x = np.fft.irfft(magnitude * np.exp(1j * angle), n) * np.hanning(n + 1)[:-1] / 1.5
        return _overlap(x, hop)[n // 2:n // 2 + len(wav)]
    if how == "smear":
        return resynth(_smooth(_smooth(np.abs(spec), 3).T, 3).T, np.angle(spec))
    x = resynth(np.abs(spec), 2 * np.pi * rng.random(spec.shape))
    for _ in range(8):
        x = resynth(np.abs(spec), np.angle(_stft(x, n, hop)))
    return x


# ---- the corpus ----------------------------------------------------------------------------------

def _text(kind, cfg, rng, held_out):
    """One text. A training string never has a held-out pair side by side; a validation string of
    digits always has one (strings of a single digit, when digits_max is 1, have no pairs)."""
    if kind != "speech":
        group = list(CAPTIONS[kind][rng.integers(len(CAPTIONS[kind]))])
        return group[rng.integers(len(group))]
    n = int(rng.integers(cfg.digits_min, cfg.digits_max + 1))
    n = min(max(n, 2), cfg.digits_max) if held_out else n
    while True:
        d = rng.integers(10, size=n).tolist()
        pairs = [p in HELD_OUT for p in zip(d, d[1:])]
        if held_out and n > 1 and not any(pairs):
            i = int(rng.integers(n - 1))                # plant one
            d[i], d[i + 1] = sorted(HELD_OUT)[rng.integers(len(HELD_OUT))]
        elif any(pairs) and not held_out:
            continue
        break
    said = [DIGITS[i] for i in d]
    if cfg.words and rng.random() < .25:
        at = [i for i in range(n) if not held_out or n == 1
              or any(p in HELD_OUT for j, p in enumerate(zip(d, d[1:])) if i not in (j, j + 1))]
        if at:                                          # a word takes the place of a digit
            said[at[rng.integers(len(at))]] = WORDS[rng.integers(len(WORDS))]
    return " ".join(said)


def clips(cfg, split):
    """Yields dict(text, kind, voice, seed) for each clip of "train" or "valid"; no audio yet."""
    n, part = (cfg.clips, 0) if split == "train" else (cfg.valid_clips, 1)
    edges = np.round(np.cumsum(cfg.shares) * n)
    kinds = np.searchsorted(edges, np.arange(n), side="right").clip(max=len(cfg.kinds) - 1)
    kinds = np.random.default_rng([cfg.seed, part]).permutation(kinds)
    for i, k in enumerate(kinds):
        rng = np.random.default_rng([cfg.seed, part, i])
        kind = cfg.kinds[k]
        yield dict(text=_text(kind, cfg, rng, split == "valid"), kind=kind,
                   voice=int(rng.integers(cfg.voices)), seed=int(rng.integers(2 ** 31)))


def make(cfg, out_dir, sample_rate=16000):
    """Writes out_dir/wav/*.wav, train.jsonl and valid.jsonl; returns the two manifests' paths.

    toy.json is the mark of a finished corpus: with the same settings nothing is done again, with
    others the corpus is made anew. Manifests appear only when complete. BadInput if out_dir holds
    files of these names that are not a toy corpus. Not for two processes at once."""
    out, recipe = Path(out_dir), dict(asdict(cfg), sample_rate=sample_rate, version=1)
    paths, mark = (out / "train.jsonl", out / "valid.jsonl"), out / "toy.json"
    try:
        before = json.loads(mark.read_text()) if mark.exists() else None
    except ValueError:
        before = {}
    if before == dict(recipe, finished=True) and all(p.exists() for p in paths):
        return paths
    for p in (*paths, out / "wav"):
        if before is None and p.exists():
            raise BadInput(f"{p} exists and toy.py did not write it, choose another folder")

    def write(path, text):
        temp = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        temp.write_text(text)
        os.replace(temp, path)
    try:
        out.mkdir(parents=True, exist_ok=True)
        write(mark, json.dumps(dict(recipe, finished=False)))
        for p in paths:
            p.unlink(missing_ok=True)
        shutil.rmtree(out / "wav", ignore_errors=True)  # ours: the mark says so
        (out / "wav").mkdir()
        bar = tqdm(total=cfg.clips + cfg.valid_clips, desc="toy corpus", unit=" clips")
        for split, path in zip(("train", "valid"), paths):
            lines = []
            for i, c in enumerate(clips(cfg, split)):
                wav, words = synth(**c, sample_rate=sample_rate)
                name = f"{split}-{i:06d}"
                sf.write(out / "wav" / f"{name}.wav", wav, sample_rate, subtype="PCM_16")
                lines.append(json.dumps(dict(
                    id=name, audio=f"wav/{name}.wav", text=c["text"], kind=c["kind"],
                    speaker=f"toy{c['voice']}" if c["kind"] == "speech" else "",
                    duration=round(len(wav) / sample_rate, 4), words=words)))
                bar.update()
            write(path, "\n".join(lines) + "\n")
        bar.close()
        write(mark, json.dumps(dict(recipe, finished=True)))
    except (OSError, sf.SoundFileError) as e:
        raise BadInput(f"cannot write the toy corpus to {out}: {e}") from None
    return paths


def check(n, sample_rate=16000, seed=0):
    """Prints the oracle's accuracy on n clips of each kind: clean, degraded, and where it must
    fall to chance: what was heard against the other clips' texts, and white noise against the
    text. Returns {(kind, column): share right}."""
    share = {}
    for kind in KINDS:
        cfg = ToyConfig(clips=n, voices=len(VOICES), kinds=[kind], shares=[1.], seed=seed)
        todo, rows = list(clips(cfg, "train")), []
        for i, c in enumerate(tqdm(todo, desc=kind, unit=" clips", leave=False)):
            wav, _ = synth(**c, sample_rate=sample_rate)
            noise = np.random.default_rng(i).standard_normal(len(wav)) * .1
            tries = dict(clean=wav, **{h: degrade(wav, h, sample_rate) for h in
                                       ("noise", "phase", "smear")}, nothing=noise)
            row = {how: oracle(x, c["text"], kind, sample_rate) for how, x in tries.items()}
            got, row = facts(row["clean"]["heard"], kind), {
                how: a["right"] / a["total"] for how, a in row.items()}
            others = [facts(o["text"], kind) for o in todo if o is not c]
            row["other text"] = np.mean([len(o.items() & got.items()) / len(o) for o in others
                                         if kind != "speech" or len(o) == len(got)] or [np.nan])
            rows.append(row | dict(chance=chance(c["text"], kind)))
        share |= {(kind, how): float(np.nanmean([row[how] for row in rows])) for how in rows[0]}
    print(f"{'% right':8}" + "".join(f"{how:>12}" for how in rows[0]))
    for kind in KINDS:
        print(f"{kind:8}" + "".join(f"{100 * share[kind, how]:12.1f}" for how in rows[0]))
    return share


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], epilog="examples:\n"
                                + re.search(r"(    python -m corpora.toy.*?)\n\n", __doc__, re.S)[1],
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    d = ToyConfig()
    p.add_argument("--out", help="folder for the corpus, or with --say the .wav file")
    p.add_argument("--clips", type=int, default=d.clips, help="training clips (%(default)s)")
    p.add_argument("--valid-clips", type=int, default=d.valid_clips, help="held out (%(default)s)")
    p.add_argument("--voices", type=int, default=d.voices, help=f"1 to {len(VOICES)} (%(default)s)")
    p.add_argument("--sample-rate", type=int, default=16000, choices=RATES)
    p.add_argument("--seed", type=int, default=d.seed, help="of every choice (%(default)s)")
    p.add_argument("--say", metavar="TEXT", help="make one clip instead of a corpus")
    p.add_argument("--kind", default="speech", choices=KINDS, help="of --say (%(default)s)")
    p.add_argument("--voice", type=int, default=0, help="of --say (%(default)s)")
    p.add_argument("--check", type=int, metavar="N", help="test the oracle on N clips of each kind")
    a = p.parse_args(argv)
    if a.check is not None:
        if a.check < 2:
            raise BadInput(f"--check {a.check} is too few, use 2 or more")
        check(a.check, a.sample_rate, a.seed)
    elif not a.out:
        raise BadInput("nothing to do: give --out DIR, --say TEXT --out FILE.wav, or --check N")
    elif a.say is not None:
        wav, _ = synth(a.say, a.kind, voice=a.voice, seed=a.seed, sample_rate=a.sample_rate)
        try:
            Path(a.out).parent.mkdir(parents=True, exist_ok=True)
            sf.write(a.out, wav, a.sample_rate, subtype="PCM_16")
        except (OSError, sf.SoundFileError, TypeError, ValueError) as e:
            raise BadInput(f"cannot write {a.out}: {e}; it must be a .wav file") from None
        heard = oracle(wav, a.say, a.kind, a.sample_rate)["heard"]
        print(f"{a.out}: {len(wav) / a.sample_rate:.2f} s, the oracle hears {heard!r}")
    else:
        cfg = build(ToyConfig, {"clips": a.clips, "valid_clips": a.valid_clips,
                                "voices": a.voices, "seed": a.seed})
        print("\n".join(str(x) for x in make(cfg, a.out, a.sample_rate)))


if __name__ == "__main__":
    cli(main)
