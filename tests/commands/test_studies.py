"""Studies have their definitions; a sweep, a continuation and a comparison of samples run from the
shell.
"""
import json
import math
import os
import re
import shutil
import sys
import types

import numpy as np
import pytest
import soundfile as sf
import torch

from cli import BadInput
from config import Config, build
from conftest import run, write
from data import Clip
from report import draw_continuation
from tools import continuation, studies, systems
from vae import VAE


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("studies"))
    done = run("train.py", "--config", write(folder), "--stages", '["vae", "lm"]',
               "--train.vae.steps", "2", "--train.lm.steps", "2", "--toy.valid_clips", "36",
               "--toy.digits_max", "4", "--sample.prompt_seconds", "1", "--sample.seconds", "1")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def taught(trained):
    """The same run with a consistency stage."""
    shutil.copytree(f"{trained}/run", f"{trained}/taught")
    done = run("train.py", "--config", f"{trained}/run/config.toml", "--out", f"{trained}/taught",
               "--stages", '["vae", "lm", "consistency"]', "--train.consistency.steps", "2")
    assert done.returncode == 0, done.stderr
    return trained


def study(folder, name, *arguments):
    """Run one study on the trained run -> (its standard output, its figures)."""
    done = run("-m", "tools.studies", name, "--run", f"{folder}/run", "--threads", "1",
               "--json", f"{folder}/{name}.json", *arguments)
    assert done.returncode == 0, done.stderr
    with open(f"{folder}/{name}.json") as f:
        return done.stdout, json.load(f)


def test_a_sweep_prints_a_row_per_value_and_draws_the_curves(trained):
    printed, figures = study(trained, "sweep", "--setting", "steps", "--values", "1,3",
                             "--limit", "1", "--repeats", "1", "--wavs", f"{trained}/sweep")
    assert set(figures["sweep steps"]) == {"1", "3"}
    assert "facts speech" in printed and os.path.exists(f"{trained}/sweep/sweep_steps.png")


def test_a_continuation_writes_wavs_and_a_figure_per_second(trained):
    printed, figures = study(trained, "continue", "--limit", "4", "--wavs", f"{trained}/wavs")
    curves = figures["continue lm"]["music"]
    assert curves["clips"] == 4 and [len(curves[k]) for k in continuation.CURVES] == [2] * 4
    assert "lm           music   alive    1.000" in printed
    assert len([f for f in os.listdir(f"{trained}/wavs/continue_lm") if f.endswith(".wav")]) >= 4
    assert os.path.exists(f"{trained}/wavs/continue_lm.png")


def test_samples_of_few_steps_are_compared_with_those_of_many(trained):
    printed, figures = study(trained, "draws", "--limit", "1", "--repeats", "3")
    assert "lm, 2 steps: energy distance" in printed
    found = figures["draws lm"]
    assert set(found) == {"1", "2", "4", "16"} and found["1"]["speech"][1] > 0


def table(folder, monkeypatch, name, *arguments):
    """One table of the trained run, in this process -> its figures."""
    monkeypatch.setattr(sys, "argv", ["studies", name, *arguments, "--threads", "1", "--fad-dims",
                                      "1", "--json", f"{folder}/{name}.json"])
    studies.main()
    with open(f"{folder}/{name}.json") as f:
        return json.load(f)


def test_generations_are_compared_with_other_real_clips_of_their_kind(trained, monkeypatch):
    found = table(trained, monkeypatch, "distance", "--run", f"{trained}/run", "--limit", "4",
                  "--reference", "train")["distance lm"]
    assert set(found) == {"speech", "sound", "music"}
    for row in found.values():
        assert set(row) == {"fad", "mmd", "facts"} and len(row["fad"]) == 3


def test_equal_seeds_speak_a_text_alike_and_others_do_not(trained):
    contestant = systems.open_system(systems.System("lm", f"{trained}/run"))
    [clip] = systems.choose_clips([contestant], "speech", "text", 1)
    [a, b, c] = [systems.generate(contestant, [clip], "speech", "text", seed)[0]
                 for seed in (0, 0, 1)]
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_a_row_is_refused_a_run_of_another_head(trained, monkeypatch):
    with pytest.raises(BadInput, match="a head of trigflow, and the row 'consistency' is of cons"):
        table(trained, monkeypatch, "table6", "--calm", f"{trained}/run")
    with pytest.raises(BadInput, match="a head of trigflow, and the row .* is of rq"):
        table(trained, monkeypatch, "table4", "--rq", f"{trained}/run")


def test_table_4_has_figures_and_seconds_of_every_row_with_a_run(taught, monkeypatch):
    found = table(taught, monkeypatch, "table4", "--calm", f"{taught}/taught", "--samples", "4",
                  "--seconds", "0.1", "--repeats", "1", "--task", "text", "--reference", "train")
    assert list(found["table4"]) == ["Reference", "Consistency, 1 step", "Consistency, 4 steps",
                                     "TrigFlow, 100 steps"]
    for label, row in found["table4"].items():
        assert ("overall" in row) == (label != "Reference") and len(row["fad"]) == 3


def test_the_table_of_audiocalm_has_a_row_per_kind_and_needs_a_run(trained, monkeypatch):
    found = table(trained, monkeypatch, "audiocalm", "--calm", f"{trained}/run", "--samples", "4",
                  "--reference", "train")["audiocalm"]
    assert set(found) == {"speech", "sound", "music"}
    with pytest.raises(BadInput, match="needs --calm, a run of AudioCALM"):
        table(trained, monkeypatch, "audiocalm")


@pytest.mark.parametrize("name, arguments, line", [
    ("sweep", ["--run", "run", "--setting", "steps", "--steps", "4"],
     "--steps: is what the sweep varies; give --values"),
    ("distance", ["--run", "run", "--limit", "4", "--embedding", "./no/such/model"],
     "--embedding ./no/such/model: cannot be loaded"),
    ("table2", ["--calm", "run", "--text-model", "no/such"],
     "--text-model: PPX is that of transcripts; give --whisper as well")])
def test_what_a_study_cannot_read_is_refused_in_one_line(trained, monkeypatch, name, arguments,
                                                         line):
    arguments = [f"{trained}/run" if word == "run" else word for word in arguments]
    monkeypatch.setattr(sys, "argv", ["studies", name, *arguments])
    with pytest.raises(BadInput, match=re.escape(line)) as error:
        studies.main()
    assert "\n" not in str(error.value)


def test_the_steps_of_table_6_have_a_row_each_beside_the_papers(taught, monkeypatch, capsys):
    found = table(taught, monkeypatch, "table6", "--calm", f"{taught}/taught", "--task", "text",
                  "--steps", "1,3", "--samples", "4", "--seconds", "0.2", "--repeats", "1",
                  "--reference", "train")["table6"]
    assert list(found) == ["1", "3"]
    for row in found.values():                      # 30 s of audio, one second of audio
        assert row["rtf"] * row["seconds"] == pytest.approx(30, rel=1e-2)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["1", "paper", "16.7", "1.80"] in [line[:4] for line in lines]


def test_figure_3_has_a_similarity_per_temperature_and_that_of_recordings(taught, monkeypatch):
    monkeypatch.setattr(sys, "argv", [
        "studies", "fig3", "--calm", f"{taught}/taught", "--samples", "8", "--seconds", "0.2",
        "--temperatures", "0,1", "--kind", "music", "--json", f"{taught}/fig3.json"])
    studies.main()
    with open(f"{taught}/fig3.json") as f:
        found = json.load(f)["fig3"]
    assert set(found["CALM"]) == {"0", "1"} and found["recordings"]["-"][0] < 1
    assert found["CALM"]["0"][0] == pytest.approx(1)            # no noise: all alike


def test_reconstructions_are_compared_with_the_clips_of_reference(trained, monkeypatch):
    """All nine held-out phrases are judged, so that none would be left to compare with."""
    found = table(trained, monkeypatch, "table3", f"{trained}/run", "--reference", "train")["table3"]
    assert set(found) == {f"{trained}/run"}
    with pytest.raises(BadInput, match="left to compare with; lower --samples or give --reference"):
        table(trained, monkeypatch, "table3", f"{trained}/run")


def test_too_few_real_clips_are_refused_with_what_to_do(taught, monkeypatch):
    with pytest.raises(BadInput, match="left to compare with; lower --samples or give --reference"):
        table(taught, monkeypatch, "table6", "--calm", f"{taught}/taught", "--task", "text",
              "--samples", "40")


@pytest.mark.parametrize("period", [16, 25, 32, 48])
def test_a_train_of_clicks_has_a_beat_of_1_at_its_period(period):
    """Period in frames of 256 samples; every click like the one before."""
    wav = torch.zeros(1, 16000 * 3)
    wav[:, 700::256 * period] = 0.5
    strength, seconds = continuation.beat(wav, 16000)
    assert strength == pytest.approx(1, abs=1e-5) and seconds == period * 256 / 16000


def test_a_steady_tone_has_no_beat_and_noise_little():
    t = torch.arange(16000 * 3) / 16000
    assert continuation.beat(torch.sin(2 * math.pi * 441.7 * t)[None], 16000) == (0.0, 0.0)
    assert continuation.beat(torch.zeros(1, 16000), 16000) == (0.0, 0.0)
    g = torch.Generator().manual_seed(0)
    noise = [continuation.beat(torch.randn(1, 48000, generator=g), 16000)[0] for _ in range(8)]
    assert 0.1 < sum(noise) / 8 < 0.4


def test_a_beat_is_the_same_at_every_level_and_sample_rate():
    g = torch.Generator().manual_seed(0)
    wav = 0.3 * torch.randn(1, 72000, generator=g)
    wav *= (torch.arange(72000) % 12000 < 2000)                    # 2 bursts a second at 24 kHz
    strength, period = continuation.beat(wav, 24000)
    assert strength > 0.8 and period == pytest.approx(0.5, abs=256 / 24000)
    assert continuation.beat(0.5 * wav, 24000)[1] == period


def test_a_clip_of_less_than_two_periods_is_asked_at_shorter_ones():
    wav = torch.zeros(1, 16000)
    wav[:, 700::4096] = 0.5                                        # 16 frames = 0.256 s
    assert continuation.beat(wav, 16000)[1] == 0.256
    assert continuation.beat(wav[:, :4000], 16000) == (0.0, 0.0)


def test_the_energy_distance_is_its_formula_and_near_zero_for_equal_distributions():
    x, y = torch.tensor([[0.0], [1.0], [4.0]]), torch.tensor([[0.0], [2.0]])
    cross = (0 + 2 + 1 + 1 + 4 + 2) / 6
    assert studies.energy_distance(x, y) == pytest.approx(2 * cross - (1 + 4 + 3) / 3 - 2)
    torch.manual_seed(0)
    a, b = torch.randn(500, 8), torch.randn(500, 8)
    assert abs(studies.energy_distance(a, b)) < 0.03 < 0.2 < studies.energy_distance(a + 1, b)


def test_draws_that_vary_too_little_show_in_their_spread_and_distance():
    def model(width):
        def generate(ids, *, kind, max_frames, steps, generator):
            for _ in range(5 if kind else max_frames):                         # ends early or late
                yield width / steps * torch.randn(len(ids), 4, generator=generator), None
        return types.SimpleNamespace(generate=generate)
    cfg = build(Config, {})
    clips = [Clip(f"{i}.wav", text, kind, duration=1.0) for i, (text, kind) in
             enumerate([("one", "speech"), ("two", "speech"), ("click", "sound"), ("", "music")])]
    found = studies.judge_draws(model(32.0), model(2.0), cfg, clips, [1, 2, 4], 300, 5)
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
    monkeypatch.setattr(systems, "encode_prompt", lambda lm, vae, w: torch.zeros(1, 25, 32))
    monkeypatch.setattr(systems, "render", render)
    model = systems.Contestant(systems.System("lm"), cfg, VAE(cfg.vae), "a model", {})
    found = continuation.judge_continuation(model, clips, 6, str(tmp_path / "out"))
    rows = found["music"]
    assert rows["alive"] == [1.0, 1.0, 0.833, 0.833]
    assert rows["level"] == pytest.approx([0, 0, -20, -20], abs=0.3)
    assert rows["mmd"][1] < 0.05 < rows["mmd"][2]
    assert rows["beat"][:3] == [rows["beat"][0], None, None] and 0 < rows["beat"][3] < 0.6
    assert len(list((tmp_path / "out").glob("*.wav"))) == 6
    draw_continuation(str(tmp_path / "c.png"), found)
    assert (tmp_path / "c.png").stat().st_size > 5000


def test_prompts_or_clips_below_a_second_have_no_distance_but_a_level():
    """Fault: torch.stack of no features was a traceback."""
    g = torch.Generator().manual_seed(0)
    wavs = [0.1 * torch.randn(1, 8000 + 16000, generator=g) for _ in range(5)]
    real = [feature for wav in wavs for feature in continuation.features_by_second(wav, 16000)]
    assert len(real) == 5
    curves = continuation.curves_by_second(wavs, 8000, real, 1, 16000)     # prompts of 0.5 s
    assert curves["alive"] == [1.0, 1.0] and curves["level"] == pytest.approx([0, 0], abs=0.3)
    assert curves["mmd"][0] is None and abs(curves["mmd"][1]) < 0.5

    assert continuation.features_by_second(wavs[0][:, :9000], 16000) == []  # clips of 0.6 s
    assert continuation.curves_by_second(wavs, 8000, [], 1, 16000)["mmd"] == [None, None]
    with pytest.raises(BadInput, match="whole seconds of new audio"):
        cfg = build(Config, {"sample": {"seconds": 0.4}})
        studies.continue_(None, cfg, None, [], ["lm"])
