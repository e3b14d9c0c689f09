"""Figures have their definitions; benchmarks take turns and print what they measured."""
import json
import math
import types

import numpy as np
import pytest
import soundfile as sf
import torch

from tools import bench
import evaluate
from config import Config, build
from cli import BadInput
from data import Clip
from conftest import run, write
from vae import VAE, VAEConfig


def test_si_sdr_ignores_gain_and_offset_and_is_the_ratio_of_powers():
    t = torch.arange(1600.0)[None] / 1600
    x, n = torch.sin(2 * math.pi * 5 * t), torch.cos(2 * math.pi * 9 * t)       # orthogonal
    assert evaluate.si_sdr(x, x + 0.1 * n) == pytest.approx(20.0, abs=1e-6)
    assert evaluate.si_sdr(x, 3 * (x + 0.1 * n) + 0.5) == pytest.approx(20.0, abs=1e-6)
    assert evaluate.si_sdr(x, n) < -100


@pytest.mark.parametrize("said, heard, errors", [
    ("a b c", "a b c", 0), ("a b c", "", 3), ("", "a b", 2), ("a b c", "a c", 1),
    ("a b c d", "b c x d", 2), ("Don't stop!", "dont stop", 0)])
def test_word_errors_are_the_fewest_edits_between_words(said, heard, errors):
    assert evaluate.word_errors(evaluate.words(said), evaluate.words(heard)) == errors


def test_the_rate_counts_bits_of_codes_and_nats_of_gaussians():
    small = dict(sample_rate=24000, latent_dim=4, ratios=[6, 5, 4, 4, 4], width=2, width_max=4,
                 dim=8, heads=2, encoder_layers=0, decoder_layers=0)
    rvq = VAE(VAEConfig(**small, bottleneck="rvq", codebooks=8, codebook_size=2048))
    assert evaluate.information(rvq, None, None) == 12.5 * 8 * 11               # Mimi: 1.1 kbit/s
    mean, logvar = torch.zeros(1, 3, 4), torch.full((1, 3, 4), -2.0)
    nats = 0.5 * (math.exp(-2) - 1 + 2)
    assert evaluate.information(VAE(VAEConfig(**small)), mean, logvar) == pytest.approx(
        nats * 4 * 12.5)


def test_mmd_is_its_formula_and_near_zero_for_equal_distributions():
    x, y = torch.tensor([[0.0], [1.0], [4.0]]), torch.tensor([[0.0], [1.0], [2.0]])
    k = lambda a, b: math.exp(-(a - b) ** 2 / 2)                  # median distance within y: 1
    xx = (k(0, 1) + k(0, 4) + k(1, 4)) / 3
    yy = (k(0, 1) + k(0, 2) + k(1, 2)) / 3
    xy = sum(k(a, b) for a in (0, 1, 4) for b in (0, 1, 2)) / 9
    assert evaluate.mmd(x, y) == pytest.approx(xx + yy - 2 * xy, abs=1e-6)
    torch.manual_seed(0)
    a, b = torch.randn(400, 8), torch.randn(400, 8)
    assert abs(evaluate.mmd(a, b)) < 0.01 < 0.1 < evaluate.mmd(a + 1, b)


def test_the_energy_distance_is_its_formula_and_near_zero_for_equal_distributions():
    x, y = torch.tensor([[0.0], [1.0], [4.0]]), torch.tensor([[0.0], [2.0]])
    cross = (0 + 2 + 1 + 1 + 4 + 2) / 6
    assert evaluate.energy_distance(x, y) == pytest.approx(2 * cross - (1 + 4 + 3) / 3 - 2)
    torch.manual_seed(0)
    a, b = torch.randn(500, 8), torch.randn(500, 8)
    assert abs(evaluate.energy_distance(a, b)) < 0.03 < 0.2 < evaluate.energy_distance(a + 1, b)


def test_draws_that_vary_too_little_show_in_their_spread_and_distance():
    def model(width):
        def generate(ids, *, kind, max_frames, steps, generator):
            for _ in range(5 if kind else max_frames):                         # ends early or late
                yield width / steps * torch.randn(len(ids), 4, generator=generator), None
        return types.SimpleNamespace(generate=generate)
    cfg = build(Config, {})
    clips = [Clip(f"{i}.wav", text, kind, duration=1.0) for i, (text, kind) in
             enumerate([("one", "speech"), ("two", "speech"), ("click", "sound"), ("", "music")])]
    found = evaluate.judge_draws(model(32.0), model(2.0), [1, 2, 4], cfg, clips, 300, 5)
    assert found[2].keys() == {"speech", "sound"}                      # no text, nothing to compare
    for kind in found[2]:
        spreads = [found[s][kind][1] for s in (1, 2, 4)]
        assert spreads == pytest.approx([2, 1, 0.5], rel=0.05)
        distances = [found[s][kind][0] for s in (1, 2, 4)]
        assert abs(distances[1]) < 0.05 < 0.2 < min(distances[0], distances[2])


def test_a_continuation_that_fades_or_ends_shows_in_its_curves(tmp_path, monkeypatch):
    cfg = build(Config, {"vae": {"sample_rate": 16000, "ratios": [4, 10, 4, 4]},
                         "sample": {"seconds": 3.0, "prompt_seconds": 1.0}})
    rng, clips = np.random.default_rng(0), []
    for i in range(12):
        sf.write(tmp_path / f"{i}.wav", 0.1 * rng.standard_normal(48000), 16000)
        clips.append(Clip(str(tmp_path / f"{i}.wav"), "", "music", duration=3.0))
    gain = torch.tensor([1.0, 1.0, 0.1, 0.1]).repeat_interleave(16000)     # 20 dB down from 2 s on
    length = [64000, 64000, 64000, 64000, 64000, 40000]                    # one of six ends early

    def render(lm, vae, tokens, history, **options):
        noise = torch.randn(6, 1, 64000, generator=torch.Generator().manual_seed(0))
        return [0.1 * w[:, :n] * gain[:n] for w, n in zip(noise, length)]
    monkeypatch.setattr(evaluate, "encode_prompt", lambda lm, vae, w: torch.zeros(1, 25, 32))
    monkeypatch.setattr(evaluate, "render", render)
    found = evaluate.judge_continuation(None, VAE(cfg.vae), cfg, clips, 6, str(tmp_path / "out"))
    rows = found["music"]
    assert rows["alive"] == [1.0, 1.0, 0.833, 0.833]
    assert rows["level"] == pytest.approx([0, 0, -20, -20], abs=0.3)
    assert rows["mmd"][1] < 0.05 < rows["mmd"][2]
    assert len(list((tmp_path / "out").glob("*.wav"))) == 6
    evaluate.draw_continuation(str(tmp_path / "c.png"), found)
    assert (tmp_path / "c.png").stat().st_size > 5000


@pytest.mark.parametrize("extra, right", [(0, 1.0), (2, 1.0), (-2, 1.0), (3, 0.0), (-3, 0.0)])
def test_lengths_are_compared_in_whole_latents(tmp_path, monkeypatch, extra, right):
    """A clip of 10.3 latents is coded, and ends, as 11."""
    cfg = build(Config, {"vae": {"sample_rate": 16000, "ratios": [4, 10, 4, 4]}})
    sf.write(tmp_path / "a.wav", 0.1 * np.random.default_rng(0).standard_normal(6592), 16000)
    clip = Clip(str(tmp_path / "a.wav"), "two six", "speech")
    model = types.SimpleNamespace(monologue=False)
    monkeypatch.setattr(evaluate, "render", lambda lm, vae, tokens, **options: [
        torch.zeros(1, (11 + extra) * 640) for _ in tokens])
    _, _, on_time = evaluate.judge_lm(model, types.SimpleNamespace(cfg=cfg.vae), cfg, [clip], 1, 1)
    assert on_time == {"speech": right}


def test_judges_compare_with_the_transcript_and_not_with_its_description(tmp_path, monkeypatch):
    """Bug: the WER of a described corpus counted "Speaker a says" as words that were not said."""
    cfg = build(Config, {"vae": {"sample_rate": 16000, "ratios": [4, 10, 4, 4]}})
    sf.write(tmp_path / "a.wav", 0.1 * np.random.default_rng(0).standard_normal(6400), 16000)
    clip = Clip(str(tmp_path / "a.wav"), 'Speaker a says: "two six"', "speech", transcript="two six")
    model = types.SimpleNamespace(monologue=False)
    monkeypatch.setattr(evaluate, "render", lambda lm, vae, tokens, **options: [
        torch.zeros(1, 6400) for _ in tokens])
    heard = []
    judge = types.SimpleNamespace(hear=lambda name, wav, text, voice: heard.append(text))
    evaluate.judge_lm(model, types.SimpleNamespace(cfg=cfg.vae), cfg, [clip], 1, 1,
                      str(tmp_path / "out"), judge)
    assert heard == ["two six"]
    with open(tmp_path / "out" / "speech.jsonl") as f:
        assert json.loads(f.read())["text"] == "two six"


class Silence:
    """Stands for PESQ where it finds no speech, and for its siblings."""


def judges():
    j = evaluate.Judges(())
    j.names, j.no_speech = evaluate.METRICS, (KeyError,)
    j.stoi, j.dnsmos, j.whisper = lambda x, y, rate: 0.5, Silence(), Silence()
    j.dnsmos.run = lambda w, rate: {"ovrl_mos": float(len(w) == 16000) + 1}
    j.visqol = Silence()
    j.visqol.measure_from_arrays = lambda x, y, sample_rate: types.SimpleNamespace(moslqo=4.0)
    j.whisper.transcribe = lambda w, **o: ([type("S", (), {"text": "one three"})], None)
    return j


def test_judges_average_over_clips_and_leave_out_what_they_cannot_hear():
    j, w = judges(), np.full(24000, .1, dtype=np.float32)

    def pesq(rate, x, y, band):
        j.calls = getattr(j, "calls", 0) + 1
        if j.calls == 1:
            raise KeyError
        return 3.0
    j.pesq = pesq
    j(w, w, "one two three", 24000)
    j(w, w, "one", 24000)
    found = j.figures()
    assert found["pesq"] == 3.0 and found["stoi"] == 0.5
    assert found["dnsmos original"] == 2.0
    assert found["wer original"] == found["wer reconstruction"] == 0.5          # (1 + 1) / 4 words


def test_visqol_is_for_audible_clips_of_enough_length_and_hears_lost_ones_as_bad():
    """Guards a NaN for a silent reconstruction, which made the whole mean NaN."""
    j, w = judges(), np.full(24000, 0.1, dtype=np.float32)
    j.names = ("visqol",)
    j(w, w, "", 24000)
    j(w * 0, w, "", 24000)
    j(w[:12000], w[:12000], "", 24000)                   # half a second
    j.visqol.measure_from_arrays = lambda x, y, sample_rate: types.SimpleNamespace(moslqo=math.nan)
    j(w, w * 0, "", 24000)
    assert j.figures() == {"visqol": 2.5}                # (4 + 1) / 2


def test_a_generation_louder_than_full_scale_is_judged_as_it_would_be_played():
    """Guards a sweep that ended in DNSMOS's complaint about samples above 1."""
    j, heard = judges(), []
    j.names, j.dnsmos.run = ("dnsmos",), lambda w, rate: heard.append(w) or {"ovrl_mos": 2.0}
    j.hear("generation", np.array([-1.5, 0.5, 1.01]), "")
    assert heard[0].tolist() == [-1.0, 0.5, 1.0]


def test_a_generation_is_compared_with_the_voice_that_it_was_given():
    j, w = judges(), np.zeros(16000, dtype=np.float32)
    j.voice = lambda w: np.array([1.0, 0.0]) if w[0] == 0 else np.array([0.6, 0.8])
    j.hear("generation", w, "one three", w + 1)
    j.hear("generation", w, "one two", None)
    found = j.figures()
    assert found["sim generation"] == pytest.approx(0.6) and found["wer generation"] == 0.25


def test_a_sample_of_texts_is_spread_evenly():
    assert evaluate.spread(list(range(10)), 4) == [0, 2, 5, 7]
    assert evaluate.spread([1, 2], 9) == [1, 2]


def test_contestants_take_turns_after_an_unmeasured_round():
    order = []
    times = bench.race({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3, "cpu")
    assert "".join(order) == "abababab" and [len(t) for t in times.values()] == [3, 3]


def test_a_benchmark_prints_and_writes_every_part(tmp_path):
    done = run("-m", "tools.bench", "--config", write(str(tmp_path)), "--seconds", "0.4", "--repeats", "1",
               "--json", f"{tmp_path}/b.json")
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "b.json") as f:
        figures = json.load(f)
    assert set(figures) == {"encode", "decode", "stream decode", "training step"}
    assert set(figures["decode"]) == {"istft decoder", "conv decoder"}
    assert figures["decode"]["istft decoder"]["ratio"] == 1.0
    assert all(v["ms"] > 0 for part in figures.values() for v in part.values())


def test_a_judge_that_is_not_installed_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pystoi", None)
    with pytest.raises(BadInput, match=r"pystoi is not installed: pip install -e .\[eval\]"):
        evaluate.Judges(["stoi"])
