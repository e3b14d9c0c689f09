"""Published metrics of single clips of audio, none of them ours: one class each, at its own rate.

    original, reconstruction ─► pesq, stoi, visqol          score(x, y) -> number or None: left out
    any wav ──────────────────► dnsmos, distillmos, utmos   score(x)    -> a number
    generation, voice clip ───► sim                         embed(x)    -> a unit vector

pesq: ITU-T P.862.2, wide band, 1 .. 4.64 (package pesq); None for originals that are
  silent or in which it finds no speech; a silent reconstruction is 1.
stoi: short-time objective intelligibility, 0 .. 1 (Taal et al. 2011; pystoi). None for originals
  that are silent, or have less than 30 frames of 25.6 ms, half overlapping, within 40 dB of their
  loudest one (some 0.42 s of speech); a silent reconstruction is 0.
visqol: ViSQOL v3 (Chinen et al. 2020; visqol-python), MOS-LQO 1 .. 5: speech mode with the lattice
  at 16 kHz, audio mode at 48 kHz for sound and music (CALM Table 3). None for originals below
  0.75 s or silent; a silent reconstruction is 1.
dnsmos: DNSMOS P.835, overall (Reddy et al. 2022; speechmos), 1 .. 5.
distillmos: DistillMOS (Stahl & Gamper 2025; extra mos, weights in its package), 1 .. 5.
utmos: UTMOS22 strong (Saeki et al. 2022), 1 .. 5, from a checkout of github.com/tarepan/SpeechMOS.
  These two stand for CALM Table 1's MOSNet, whose weights are in no package. None of the three
  knows silence: all zeros are 1.84 to DNSMOS and 1.97 to DistillMOS, more than poor speech; so
  what is_audible() denies is not shown to them (judges.py).
sim: cosine of speaker embeddings of a generation and of the clip that gave its voice (AudioCALM's
  SIM; CALM Fig. 3 is the mean over pairs of generations). resemblyzer: d-vectors (Wan et al. 2018),
  after its own preprocessing, weights in the package. Or a model of transformers with an x-vector
  head, as microsoft/wavlm-base-plus-sv (Chen et al. 2022), or speechbrain/spkrec-ecapa-voxceleb
  (Desplanques et al. 2020; package speechbrain, in none of our extras: pip install speechbrain).
  Different embeddings cannot be compared.

All on the first channel, of wavs in +-1. A package is imported when its metric is asked for.
"""
import math
import os
import sys
import warnings
from types import ModuleType

import numpy as np
import torch

from cli import BadInput

SPEECH_RATE = 16000                 # Hz
AUDIO_RATE = 48000                  # Hz, ViSQOL's audio mode
SILENCE = 1e-4                      # -80 dB of full scale
SHORTEST = 0.1                      # seconds; no word is shorter


def is_audible(wav, rate):
    """Whether a wav (S,) lasts 0.1 s and has a sample above -80 dB of full scale."""
    return len(wav) >= SHORTEST * rate and bool(abs(wav).max() > SILENCE)


# ---------------------------------------------------------------------------- against an original


class Pesq:
    rate = SPEECH_RATE

    def __init__(self):
        import pesq
        self.pesq = pesq.pesq
        self.no_speech = (pesq.NoUtterancesError, pesq.BufferTooShortError)

    def score(self, x, y):
        if not is_audible(x, self.rate):
            return None
        if not y.any():
            return 1.0                               # the package ends in a NaN
        try:
            return self.pesq(self.rate, x, y, "wb")
        except self.no_speech:
            return None


class Stoi:
    rate = SPEECH_RATE

    def __init__(self):
        from pystoi import stoi
        self.stoi = stoi

    def score(self, x, y):
        if not is_audible(x, self.rate):
            return None

        # with too few frames it warns, and returns 1e-5
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Not enough STFT frames", RuntimeWarning)
            try:
                return self.stoi(x, y, self.rate)
            except RuntimeWarning:
                return None


class Visqol:
    """mode: "speech" or "audio"."""

    def __init__(self, mode):
        if mode == "speech":
            import ai_edge_litert.interpreter        # without it visqol uses a laxer mapping
        from visqol import VisqolApi
        self.rate = SPEECH_RATE if mode == "speech" else AUDIO_RATE
        self.visqol = VisqolApi()
        self.visqol.create(mode=mode)

    def score(self, x, y):
        if len(x) < 0.75 * self.rate or abs(x).max() <= 1e-3:
            return None
        score = self.visqol.measure_from_arrays(x, y, sample_rate=self.rate).moslqo
        return score if math.isfinite(score) else 1.0


# ---------------------------------------------------------------------------- opinion scores


class Dnsmos:
    rate = SPEECH_RATE

    def __init__(self):
        from speechmos import dnsmos
        self.dnsmos = dnsmos

    def score(self, x):
        return self.dnsmos.run(x, self.rate)["ovrl_mos"]


class DistillMos:
    rate = SPEECH_RATE

    def __init__(self, device="cpu"):
        # the package imports torchaudio for its command line only; where builds of torchaudio and
        # torch do not fit, that ends in an error, so an empty module stands in for it
        empty = ModuleType("torchaudio")
        sys.modules.setdefault("torchaudio", empty)
        try:
            from distillmos import ConvTransformerSQAModel
        finally:
            if sys.modules["torchaudio"] is empty:
                del sys.modules["torchaudio"]
        self.model = ConvTransformerSQAModel().to(device).eval()
        self.device = device

    @torch.no_grad()
    def score(self, x):
        return self.model(torch.tensor(x)[None].to(self.device)).item()


class Utmos:
    """folder: a checkout of SpeechMOS; its hubconf.py is run, and gets the weights."""
    rate = SPEECH_RATE

    def __init__(self, folder, device="cpu"):
        if not os.path.isfile(f"{folder}/hubconf.py"):
            raise BadInput(f"--utmos {folder}: has no hubconf.py; give a checkout of SpeechMOS")
        self.model = torch.hub.load(folder, "utmos22_strong", source="local").to(device).eval()
        self.device = device

    @torch.no_grad()
    def score(self, x):
        return self.model(torch.tensor(x)[None].to(self.device), self.rate).item()


# ---------------------------------------------------------------------------- voices


class Resemblyzer:
    """d-vectors of the speech in a wav; zeros where there is none.

    Its preprocessing comes first, as its encoder was trained: quiet wavs are raised to -30 dB of
    full scale, long silences cut out.
    """

    def __init__(self):
        from resemblyzer import VoiceEncoder, preprocess_wav
        self.encoder = VoiceEncoder("cpu", verbose=False)
        self.preprocess = preprocess_wav

    def embed(self, wav):
        if abs(wav).max() > 1e-3:
            wav = self.preprocess(wav)
            if len(wav):
                return self.encoder.embed_utterance(wav)
        return np.zeros(256)


class XVector:
    """A model of transformers with an x-vector head: WavLM, UniSpeech-SAT, ..."""

    def __init__(self, name, device="cpu"):
        from transformers import AutoFeatureExtractor, AutoModelForAudioXVector
        self.extractor = AutoFeatureExtractor.from_pretrained(name)
        self.model = AutoModelForAudioXVector.from_pretrained(name).to(device).eval()
        self.device = device

    @torch.no_grad()
    def embed(self, wav):
        wav = np.pad(wav, (0, max(0, SPEECH_RATE - len(wav))))      # its convolutions need a second
        inputs = self.extractor(wav, sampling_rate=SPEECH_RATE, return_tensors="pt")
        vector = self.model(**inputs.to(self.device)).embeddings[0].float()
        return torch.nn.functional.normalize(vector, dim=0).cpu().numpy()


class Ecapa:
    """A speaker encoder of SpeechBrain, which is in none of our extras: pip install speechbrain."""

    def __init__(self, name, device="cpu"):
        from speechbrain.inference.speaker import EncoderClassifier
        self.encoder = EncoderClassifier.from_hparams(source=name, run_opts={"device": device})

    def embed(self, wav):
        vector = self.encoder.encode_batch(torch.tensor(wav)[None]).flatten().float()
        return torch.nn.functional.normalize(vector, dim=0).cpu().numpy()


def open_speaker(name, device="cpu"):
    """--sim: resemblyzer, a model of SpeechBrain, or one of transformers."""
    if name == "resemblyzer":
        return Resemblyzer()
    return Ecapa(name, device) if name.startswith("speechbrain/") else XVector(name, device)
