"""Figures have their definitions."""
import json
import math
import types

import numpy as np
import pytest
import soundfile as sf
import torch

import checks
import evaluate
import figures
import generations
from cli import BadInput
from clips import corpus
from config import Config, build, open_run
from conftest import run
from data import Clip, DataConfig, load_manifest, split_off, write_manifest
from intervals import Figure
from judges import Judges
from reconstruction import information_rate, si_sdr
from tools import studies
from untrained import untrained_run
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
    monkeypatch.setattr(generations, "render", lambda lm, vae, tokens, **options: [
        torch.zeros(1, (11 + extra) * 640) for _ in tokens])
    vae = types.SimpleNamespace(cfg=cfg.vae)
    found = generations.judge_lm(model, vae, cfg, [clip], {}, repeats=1, limit=1)
    assert found["length"] == {"speech": right}


def test_judges_compare_with_the_transcript_and_not_with_its_description(tmp_path, monkeypatch):
    """Bug: the WER of a described corpus counted "Speaker a says" as words that were not said."""
    cfg = build(Config, {"vae": {"sample_rate": 16000, "ratios": [4, 10, 4, 4]}})
    sf.write(tmp_path / "a.wav", 0.1 * np.random.default_rng(0).standard_normal(6400), 16000)
    clip = Clip(str(tmp_path / "a.wav"), 'Speaker a says: "two six"', "speech",
                transcript="two six")
    model = types.SimpleNamespace(monologue=False)
    monkeypatch.setattr(generations, "render", lambda lm, vae, tokens, **options: [
        torch.zeros(1, 6400) for _ in tokens])
    texts = []
    judges = Judges(["wer"], models=False)
    judges.models["whisper"] = types.SimpleNamespace(transcribe=lambda wav: "two")
    judges.models["words"] = types.SimpleNamespace(
        errors=lambda text, transcript: texts.append(text) or (1, 2))
    generations.judge_lm(model, types.SimpleNamespace(cfg=cfg.vae), cfg, [clip], {}, 1, 1,
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
    assert list(generations.choose_targets(clips, "speech", cfg, 9)) == ["four"]


@pytest.mark.parametrize("trained_on, judged, says", [
    ("a part", 3, "was trained on all but 3 of its clips; these are judged"),
    ("all", 16, "was trained on these very clips; expect better figures"), ("others", 16, "")])
def test_a_manifest_that_the_training_split_is_split_again(tmp_path, capsys, trained_on, judged,
                                                           says):
    """Fault: given by --manifest, as a moved run asks for, clips of training were judged without a
    word.
    """
    folder = untrained_run(tmp_path)
    write_manifest(tmp_path / "clips.jsonl", corpus(tmp_path, 16))
    clips = load_manifest(tmp_path / "clips.jsonl")
    part = {"a part": split_off(clips, 0)[0], "all": clips, "others": clips[:5]}[trained_on]
    state = torch.load(f"{folder}/lm.pt")
    torch.save(state | {"clips": checks.digest_of(part)}, f"{folder}/lm.pt")

    cfg, *_ = open_run(folder)
    found = evaluate.held_out_clips(folder, f"{tmp_path}/clips.jsonl", cfg)
    assert len(found) == judged and not {clip.id for clip in found} & (
        {clip.id for clip in part} if trained_on == "a part" else set())
    assert says in (printed := capsys.readouterr().out) and bool(says) == bool(printed)


def test_held_out_texts_that_are_too_long_are_counted(capsys):
    """Fault: where all were, a command that succeeded printed nothing; where some were, nobody
    knew of how many texts the figures spoke.
    """
    cfg = build(DataConfig, {"text_len": 4})
    clips = [Clip(f"{text}.wav", text) for text in ("four", "fives", "sevens", "")]
    asked = types.SimpleNamespace(what="lm")
    assert evaluate.has_texts(asked, clips, cfg)
    assert capsys.readouterr().out == ("texts: 2 of 3 held-out ones are not generated, they are "
                                       "longer than those of training (data.text_len = 4)\n")
    with pytest.raises(BadInput, match="all texts of held-out clips are longer .* = 4.*--what vae"):
        evaluate.has_texts(asked, clips[1:], cfg)
    asked.what = "all"
    assert not evaluate.has_texts(asked, clips[1:], cfg)
    assert "none is generated" in capsys.readouterr().out


def test_one_clip_is_too_few_for_the_log_mel_distance_and_limit_is_named(monkeypatch):
    """Fault: with --limit 1 the line advised another manifest."""
    monkeypatch.setattr(evaluate, "judge_vae", lambda *_: {})
    cfg = types.SimpleNamespace(gan=types.SimpleNamespace(loss_floor=0.0))
    asked = types.SimpleNamespace(what="vae", limit=1, wavs="", seed=0)
    with pytest.raises(BadInput, match="give --limit 2 or more"):
        evaluate.vae_figures(asked, cfg, None, [None] * 9, None, None)


def test_the_table_prints_intervals_beside_figures(capsys):
    figures.print_table([("wer", {"speech": Figure(0.161, 0.118, 0.207, 40)}),
                          ("facts", {"speech": 0.5, "sound": None}),
                          ("nothing", {"music": None})])
    assert capsys.readouterr().out.splitlines() == [
        "                     speech",
        "wer    0.161 [0.118, 0.207]",
        "facts                 0.500",
        "[low, high]: 95 % bootstrap interval over clips, seed 0"]
    figures.print_table([("wer", {"speech": Figure(0.161, 0.118, 0.207, 40)})], seed=3)
    assert capsys.readouterr().out.endswith("over clips, seed 3\n")


# ---------------------------------------------------------------------------- the command line


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with an untrained run, and a manifest of six clips of speech, five of sound."""
    folder = tmp_path_factory.mktemp("evaluate")
    untrained_run(folder)
    clips = corpus(folder, 6) + corpus(folder, 5, "sound")
    rows = [{"audio": clip.audio, "text": clip.text, "kind": clip.kind, "speaker": clip.speaker}
            for clip in clips]
    (folder / "clips.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def command(place, *arguments):
    return ["evaluate.py", "--run", f"{place}/run", "--manifest", f"{place}/clips.jsonl",
            "--threads", "1", "--repeats", "1", *arguments]


def evaluated(place, monkeypatch, *arguments):
    """evaluate.py in this process -> what it writes with --json."""
    monkeypatch.setattr("sys.argv", command(place, "--json", f"{place}/f.json", *arguments))
    evaluate.main()
    with open(f"{place}/f.json") as f:
        return json.load(f)


def test_metrics_of_reconstructions_are_refused_before_generations_are_made(place, monkeypatch):
    """Fault: five metrics were asked for, none was printed, and the exit status was 0."""
    monkeypatch.setattr(evaluate, "judge_lm", None)
    with pytest.raises(BadInput, match="--metrics pesq,abx,stoi,visqol: for reconstructions"):
        evaluated(place, monkeypatch, "--what", "lm", "--metrics", "sim,pesq,abx,stoi,visqol")

    # so they are in a sweep
    monkeypatch.setattr("sys.argv", ["studies.py", "sweep", "--setting", "steps", "--metrics",
                                     "pesq", *command(place)[1:]])
    with pytest.raises(BadInput, match="--metrics pesq: for reconstructions"):
        studies.main()


@pytest.mark.parametrize("option", sorted(evaluate.READERS))
def test_an_option_that_no_metric_reads_is_refused(option, monkeypatch):
    """Fault: --clap without --metrics clap was taken, and nothing came of it. Also where the value
    is the default.
    """
    value = {"whisper": "base", "language": "en", "sim": "resemblyzer", "embedding": "mel",
             "fad_dims": "0"}.get(option, "x")
    flag = f"--{option.replace('_', '-')}"
    monkeypatch.setattr("sys.argv", ["evaluate.py", "--run", "r", "--metrics", "stoi", flag, value])
    with pytest.raises(BadInput, match=f"{flag}: is for --metrics {evaluate.READERS[option][0]}"):
        evaluate.options_of_metrics(evaluate.parse())

    metrics = evaluate.READERS[option][-1]
    monkeypatch.setattr("sys.argv", ["evaluate.py", "--run", "r", "--metrics", metrics, flag,
                                     value])
    assert list(evaluate.options_of_metrics(evaluate.parse())) == [option]


@pytest.mark.parametrize("option, value", [("stage", "lm"), ("steps", "0"), ("temperature", "1"),
                                           ("cfg", "1"), ("noise", "0"), ("repeats", "6")])
def test_an_option_of_generating_is_refused_where_only_the_vae_is_judged(
        place, option, value, monkeypatch):
    arguments = ["evaluate.py", "--run", f"{place}/run", "--manifest", f"{place}/clips.jsonl",
                 "--what", "vae", f"--{option}", value]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(BadInput, match=f"--{option}: is for generations, and only the VAE"):
        evaluate.main()


def test_options_that_are_not_given_have_the_defaults_of_the_judges(place, monkeypatch):
    monkeypatch.setattr("sys.argv", ["evaluate.py", "--run", "r", "--metrics", "fad,mmd"])
    judges = evaluate.open_judges(evaluate.parse(), build(Config, {}), reconstructed=True)
    assert (judges.embedding, judges.fad_dims, judges.language) == ("mel", 0, "en")


def test_the_seed_of_the_intervals_is_printed_and_written(place, monkeypatch, capsys):
    figures = evaluated(place, monkeypatch, "--what", "lm", "--limit", "2", "--seed", "5")
    assert figures["seed"] == 5
    assert "bootstrap interval over clips, seed 5" in capsys.readouterr().out


def test_two_processes_find_the_figures_of_one(place, monkeypatch):
    """Texts and repeats, and a distance whose windows come from both."""
    more = ["--metrics", "mmd", "--limit", "5", "--repeats", "2"]
    one = evaluated(place, monkeypatch, *more)
    done = run(*command(place, "--json", f"{place}/two.json", "--jobs", "2", *more))
    assert done.returncode == 0, done.stderr
    with open(f"{place}/two.json") as f:
        assert json.load(f) == one
    assert "mmd mel generation" in one["lm"]["speech"] and "log_mel" in one["vae"]["sound"]
