"""Figures have their definitions."""
import json
import math
import sys
import types

import numpy as np
import pytest
import soundfile as sf
import torch

import evaluate
from config import Config, build
from cli import BadInput
from data import Clip, DataConfig
from judges import METRICS, Judges, split_words, word_errors
from vae import VAE, VAEConfig


def test_si_sdr_ignores_gain_and_offset_and_is_the_ratio_of_powers():
    t = torch.arange(1600.0)[None] / 1600
    x, n = torch.sin(2 * math.pi * 5 * t), torch.cos(2 * math.pi * 9 * t)       # orthogonal
    assert evaluate.si_sdr(x, x + 0.1 * n) == pytest.approx(20.0, abs=1e-6)
    assert evaluate.si_sdr(x, 3 * (x + 0.1 * n) + 0.5) == pytest.approx(20.0, abs=1e-6)
    assert evaluate.si_sdr(x, n) < -100


@pytest.mark.parametrize("reference, hypothesis, errors", [
    ("a b c", "a b c", 0), ("a b c", "", 3), ("", "a b", 2), ("a b c", "a c", 1),
    ("a b c d", "b c x d", 2), ("Don't stop!", "dont stop", 0)])
def test_word_errors_are_the_fewest_edits_between_words(reference, hypothesis, errors):
    assert word_errors(split_words(reference), split_words(hypothesis)) == errors


def test_the_rate_counts_bits_of_codes_and_nats_of_gaussians():
    small = dict(encoder="conv", decoder="conv", sample_rate=24000, latent_dim=4,
                 ratios=[6, 5, 4, 4, 4], width=2, width_max=4,
                 dim=8, heads=2, encoder_layers=0, decoder_layers=0)
    rvq = VAE(VAEConfig(**small, bottleneck="rvq", codebooks=8, codebook_size=2048))
    assert evaluate.information_rate(rvq, None, None) == 12.5 * 8 * 11          # Mimi: 1.1 kbit/s
    mean, logvar = torch.zeros(1, 3, 4), torch.full((1, 3, 4), -2.0)
    nats = 0.5 * (math.exp(-2) - 1 + 2)
    assert evaluate.information_rate(VAE(VAEConfig(**small)), mean, logvar) == pytest.approx(
        nats * 4 * 12.5)


@pytest.mark.parametrize("extra, right", [(0, 1.0), (2, 1.0), (-2, 1.0), (3, 0.0), (-3, 0.0)])
def test_lengths_are_compared_in_whole_latents(tmp_path, monkeypatch, extra, right):
    """A clip of 10.3 latents is coded, and ends, as 11."""
    cfg = build(Config, {"vae": {"sample_rate": 16000, "ratios": [4, 10, 4, 4]}})
    sf.write(tmp_path / "a.wav", 0.1 * np.random.default_rng(0).standard_normal(6592), 16000)
    clip = Clip(str(tmp_path / "a.wav"), "two six", "speech")
    model = types.SimpleNamespace(monologue=False)
    monkeypatch.setattr(evaluate, "render", lambda lm, vae, tokens, **options: [
        torch.zeros(1, (11 + extra) * 640) for _ in tokens])
    vae = types.SimpleNamespace(cfg=cfg.vae)
    found = evaluate.judge_lm(model, vae, cfg, [clip], {}, repeats=1, limit=1)
    assert found["length"] == {"speech": right}


def test_judges_compare_with_the_transcript_and_not_with_its_description(tmp_path, monkeypatch):
    """Bug: the WER of a described corpus counted "Speaker a says" as words that were not said."""
    cfg = build(Config, {"vae": {"sample_rate": 16000, "ratios": [4, 10, 4, 4]}})
    sf.write(tmp_path / "a.wav", 0.1 * np.random.default_rng(0).standard_normal(6400), 16000)
    clip = Clip(str(tmp_path / "a.wav"), 'Speaker a says: "two six"', "speech",
                transcript="two six")
    model = types.SimpleNamespace(monologue=False)
    monkeypatch.setattr(evaluate, "render", lambda lm, vae, tokens, **options: [
        torch.zeros(1, 6400) for _ in tokens])
    texts = []
    judges = types.SimpleNamespace(judge=lambda name, wav, rate, text, voice: texts.append(text))
    evaluate.judge_lm(model, types.SimpleNamespace(cfg=cfg.vae), cfg, [clip], {}, 1, 1,
                      str(tmp_path / "out"), judges)
    assert texts == ["two six"]
    with open(tmp_path / "out" / "speech.jsonl") as f:
        assert json.loads(f.read())["text"] == "two six"


class Fake:
    """Stands in for a metric's package; a test sets the function that it needs."""


def fake_judges(*metrics):
    j = Judges(())
    j.metrics = metrics or METRICS
    j.no_speech = (KeyError,)
    j.stoi = lambda x, y, rate: 0.5
    j.dnsmos = Fake()
    j.dnsmos.run = lambda w, rate: {"ovrl_mos": float(len(w) == 16000) + 1}
    j.visqol = Fake()
    j.visqol.measure_from_arrays = lambda x, y, sample_rate: types.SimpleNamespace(moslqo=4.0)
    j.whisper = Fake()
    segments = [types.SimpleNamespace(text="one three")]
    j.whisper.transcribe = lambda w, **options: (segments, None)
    return j


def test_judges_average_over_clips_and_leave_out_those_that_they_refuse():
    j = fake_judges()
    wav = torch.full((1, 24000), 0.1)
    scores = iter([KeyError, 3.0])

    def pesq(rate, x, y, band):
        score = next(scores)
        if score is KeyError:
            raise KeyError
        return score
    j.pesq = pesq
    j.compare(wav, wav, 24000, "one two three")
    j.compare(wav, wav, 24000, "one")
    found = j.pop_figures()
    assert found["pesq"] == 3.0 and found["stoi"] == 0.5
    assert found["dnsmos original"] == 2.0
    assert found["wer original"] == found["wer reconstruction"] == 0.5          # (1 + 1) / 4 words
    assert j.pop_figures() == {}                                                # starts anew


def test_visqol_is_for_audible_clips_of_enough_length_and_rates_lost_ones_as_bad():
    """Guards a NaN for a silent reconstruction, which made the whole mean NaN."""
    j = fake_judges("visqol")
    wav = torch.full((1, 24000), 0.1)
    j.compare(wav, wav, 24000, "")
    j.compare(wav * 0, wav, 24000, "")
    j.compare(wav[:, :12000], wav[:, :12000], 24000, "")     # half a second
    j.visqol.measure_from_arrays = lambda x, y, sample_rate: types.SimpleNamespace(moslqo=math.nan)
    j.compare(wav, wav * 0, 24000, "")
    assert j.pop_figures() == {"visqol": 2.5}                # (4 + 1) / 2


def test_a_generation_louder_than_full_scale_is_judged_as_it_would_be_played():
    """Guards a sweep that ended in DNSMOS's complaint about samples above 1."""
    j = fake_judges("dnsmos")
    wavs = []
    j.dnsmos.run = lambda wav, rate: wavs.append(wav) or {"ovrl_mos": 2.0}
    j.judge("generation", torch.tensor([[-1.5, 0.5, 1.01]]), 16000, "")
    assert wavs[0].tolist() == [-1.0, 0.5, 1.0]


def test_a_generation_is_compared_with_the_voice_that_it_was_given():
    j = fake_judges()
    wav = torch.zeros(1, 16000)
    j.embed_voice = lambda w: np.array([1.0, 0.0]) if w[0] == 0 else np.array([0.6, 0.8])
    j.judge("generation", wav, 16000, "one three", wav + 1)
    j.judge("generation", wav, 16000, "one two", None)
    found = j.pop_figures()
    assert found["sim generation"] == pytest.approx(0.6) and found["wer generation"] == 0.25


def test_voices_are_compared_after_the_preprocessing_of_their_encoder(monkeypatch):
    """Fault: d-vectors were taken of raw wavs; Resemblyzer's encoder knows normalised levels and no
    long silence. A silent generation resembles nobody: 0, not NaN.
    """
    embedded = []

    def embed_utterance(wav):
        embedded.append(wav)
        return np.array([0.6, 0.8])
    package = types.ModuleType("resemblyzer")
    package.VoiceEncoder = lambda device, verbose: types.SimpleNamespace(
        embed_utterance=embed_utterance)
    package.preprocess_wav = lambda wav: wav[wav != 0] / 2
    monkeypatch.setitem(sys.modules, "resemblyzer", package)
    judges = Judges(["sim"])
    wav = torch.tensor([[0.5, 0.0, 0.5, 0.0]])
    judges.judge("generation", wav, 16000, "", wav)
    assert [w.tolist() for w in embedded] == [[0.25, 0.25]] * 2
    assert judges.pop_figures() == {"sim generation": 1.0}

    assert not judges.embed_voice(np.zeros(16000)).any()
    package.VoiceEncoder = lambda device, verbose: types.SimpleNamespace(
        embed_utterance=lambda wav: np.ones(256) / 16)
    judges = Judges(["sim"])
    judges.judge("generation", 0 * wav, 16000, "", wav)
    assert judges.pop_figures() == {"sim generation": 0.0}


def test_a_metric_that_cannot_be_loaded_is_the_one_that_is_named(monkeypatch):
    """Fault: whatever failed, the error line was about --whisper."""
    def fail(*arguments, **options):
        raise RuntimeError("no weights")
    voices = types.ModuleType("resemblyzer")
    voices.VoiceEncoder = fail
    voices.preprocess_wav = None
    whisper = types.ModuleType("faster_whisper")
    whisper.WhisperModel = fail
    monkeypatch.setitem(sys.modules, "resemblyzer", voices)
    monkeypatch.setitem(sys.modules, "faster_whisper", whisper)
    with pytest.raises(BadInput, match=r"--metrics sim: cannot be loaded \(no weights\)"):
        Judges(["sim"])
    with pytest.raises(BadInput, match=r"--whisper tiny: cannot be loaded \(no weights\)"):
        Judges(["wer"], "tiny")


@pytest.mark.parametrize("kind_token", [True, False])
def test_texts_are_as_long_as_those_of_training_with_a_kind_token_or_without(kind_token):
    """Fault: without the token a text of text_len + 1 was generated from."""
    cfg = build(DataConfig, {"text_len": 4, "kind_token": kind_token})
    clips = [Clip(f"{text}.wav", text) for text in ("four", "fives")]
    assert list(evaluate.choose_targets(clips, "speech", cfg, 9)) == ["four"]


def test_a_choice_of_texts_is_evenly_spaced():
    assert evaluate.evenly_spaced(list(range(10)), 4) == [0, 2, 5, 7]
    assert evaluate.evenly_spaced([1, 2], 9) == [1, 2]


def test_a_judge_that_is_not_installed_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pystoi", None)
    with pytest.raises(BadInput, match=r"pystoi is not installed: pip install -e .\[eval\]"):
        Judges(["stoi"])
