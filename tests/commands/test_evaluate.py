"""Figures have their definitions."""
import json
import math
import types

import numpy as np
import pytest
import soundfile as sf
import torch

import evaluate
from config import Config, build
from data import Clip, DataConfig
from intervals import Figure
from judges import Judges
from reconstruction import information_rate, si_sdr
from vae import VAE, VAEConfig


def test_si_sdr_ignores_gain_and_offset_and_is_the_ratio_of_powers():
    t = torch.arange(1600.0)[None] / 1600
    x, n = torch.sin(2 * math.pi * 5 * t), torch.cos(2 * math.pi * 9 * t)       # orthogonal
    assert si_sdr(x, x + 0.1 * n) == pytest.approx(20.0, abs=1e-6)
    assert si_sdr(x, 3 * (x + 0.1 * n) + 0.5) == pytest.approx(20.0, abs=1e-6)
    assert si_sdr(x, n) < -100


def test_the_rate_counts_bits_of_codes_and_nats_of_gaussians():
    small = dict(encoder="conv", decoder="conv", sample_rate=24000, latent_dim=4,
                 ratios=[6, 5, 4, 4, 4], width=2, width_max=4,
                 dim=8, heads=2, encoder_layers=0, decoder_layers=0)
    rvq = VAE(VAEConfig(**small, bottleneck="rvq", codebooks=8, codebook_size=2048))
    assert information_rate(rvq, None, None) == 12.5 * 8 * 11          # Mimi: 1.1 kbit/s
    mean, logvar = torch.zeros(1, 3, 4), torch.full((1, 3, 4), -2.0)
    nats = 0.5 * (math.exp(-2) - 1 + 2)
    assert information_rate(VAE(VAEConfig(**small)), mean, logvar) == pytest.approx(
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
    judges = Judges(["wer"], models=False)
    judges.models["whisper"] = types.SimpleNamespace(transcribe=lambda wav: "two")
    judges.models["words"] = types.SimpleNamespace(
        errors=lambda text, transcript: texts.append(text) or (1, 2))
    evaluate.judge_lm(model, types.SimpleNamespace(cfg=cfg.vae), cfg, [clip], {}, 1, 1,
                      str(tmp_path / "out"), judges)
    assert texts == ["two six"]
    assert judges.pop_figures() == {"wer generation": 0.5}
    with open(tmp_path / "out" / "speech.jsonl") as f:
        assert json.loads(f.read())["text"] == "two six"


@pytest.mark.parametrize("kind_token", [True, False])
def test_texts_are_as_long_as_those_of_training_with_a_kind_token_or_without(kind_token):
    """Fault: without the token a text of text_len + 1 was generated from."""
    cfg = build(DataConfig, {"text_len": 4, "kind_token": kind_token})
    clips = [Clip(f"{text}.wav", text) for text in ("four", "fives")]
    assert list(evaluate.choose_targets(clips, "speech", cfg, 9)) == ["four"]




def test_the_table_prints_intervals_beside_figures(capsys):
    evaluate.print_table([("wer", {"speech": Figure(0.161, 0.118, 0.207, 40)}),
                          ("facts", {"speech": 0.5, "sound": None}),
                          ("nothing", {"music": None})])
    assert capsys.readouterr().out.splitlines() == [
        "                     speech",
        "wer    0.161 [0.118, 0.207]",
        "facts                 0.500",
        "[low, high]: 95 % bootstrap interval over clips"]
