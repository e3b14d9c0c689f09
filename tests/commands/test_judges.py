"""Judges: which clip goes to which metric, how often it counts, what is refused."""
import json
import sys
import types
import warnings

import numpy as np
import pytest
import soundfile as sf
import torch

from cli import BadInput
from data import Clip
from intervals import Figure
from judges import (Judges, match_sources, read_sources, refuse_unjudged,
                    refuse_without_material)
from speech_metrics import Ecapa, Pesq, Resemblyzer, Stoi, Utmos, Visqol, is_audible
from transcripts import Recogniser

SPEECH = Clip("a.wav", "one two three")
WAV = torch.full((1, 24000), 0.1)


def judges_of(metrics, **models):
    """Judges whose models are given: name = function score(...)."""
    judges = Judges(metrics, models=False)
    for name, score in models.items():
        judges.models[name.replace("_", " ")] = types.SimpleNamespace(rate=16000, score=score)
    return judges


def test_clips_that_a_metric_refuses_are_not_counted():
    scores = iter([None, 3.0])
    judges = judges_of(["pesq", "stoi"], pesq=lambda x, y: next(scores), stoi=lambda x, y: 0.5)
    judges.compare(WAV, WAV, 24000, SPEECH)
    judges.compare(WAV, WAV, 24000, Clip("b.wav", "one"))
    found = judges.pop()
    assert found["pesq"]["speech"] == Figure(3.0, clips=1)
    assert found["stoi"]["speech"] == Figure(0.5, 0.5, 0.5, 2)
    assert judges.pop() == {}                                               # starts anew


def test_a_metric_that_hears_nothing_at_all_says_so():
    judges = judges_of(["pesq"], pesq=lambda x, y: None)
    judges.compare(WAV, WAV, 24000, SPEECH)
    judges.compare(WAV, WAV, 24000, Clip("b.wav", "one"))
    assert judges.pop() == {}
    assert judges.refused[0].startswith("--metrics pesq: heard nothing in any of 2 clips")


def test_clips_that_a_metric_leaves_out_are_counted_in_one_line(capsys):
    scores = iter([None, 3.0, None])
    judges = judges_of(["pesq"], pesq=lambda x, y: next(scores))
    for name in "abc":
        judges.compare(WAV, WAV, 24000, Clip(f"{name}.wav", "one"))
    judges.pop()
    assert capsys.readouterr().out == "pesq: 2 clips left out, silent or too short\n"
    assert judges.refused == []


def test_stoi_of_too_few_frames_or_of_silence_is_no_score(monkeypatch):
    """Fault: pystoi's 1e-5, which stands for "too short", and its 0 of a silent original counted
    as scores; below 256 samples it ended in an AxisError.
    """
    package = types.ModuleType("pystoi")
    def stoi(x, y, rate):
        if len(x) < 6800:
            warnings.warn("Not enough STFT frames to compute ...", RuntimeWarning)
            return 1e-5
        return 0.9 if y.any() else 0.0
    package.stoi = stoi
    monkeypatch.setitem(sys.modules, "pystoi", package)
    model, wav = Stoi(), np.full(8000, 0.1, np.float32)
    assert model.score(wav, wav) == 0.9 and model.score(wav, 0 * wav) == 0.0
    assert model.score(0 * wav, wav) is None
    assert [model.score(wav[:n], wav[:n]) for n in (100, 1600, 6000)] == [None] * 3


def test_the_real_stoi_gives_no_score_where_it_has_too_few_frames():
    pytest.importorskip("pystoi", reason="pystoi (extra eval) is not installed")
    wav = noise(0)[0].numpy()
    model = Stoi()
    assert [model.score(wav[:n], wav[:n]) for n in (0, 100, 1600, 6000)] == [None] * 4
    assert model.score(0 * wav, wav) is None
    assert model.score(wav, wav) == pytest.approx(1, abs=1e-6)
    assert model.score(wav, 0 * wav) == 0


def test_sound_is_above_80_db_below_full_scale_for_a_tenth_of_a_second():
    wav = np.full(1600, 2e-4, np.float32)
    assert is_audible(wav, 16000)
    assert not is_audible(wav / 4, 16000) and not is_audible(wav[:1599], 16000)
    assert not is_audible(wav[:0], 16000)


@pytest.mark.parametrize("wav", [torch.zeros(1, 16000), torch.full((1, 800), 0.1)])
def test_a_generation_without_sound_has_the_lowest_opinion_score(wav):
    """Fault: silence was 1.84 to DNSMOS and 1.97 to DistillMOS, more than poor speech."""
    judges = judges_of(["dnsmos", "utmos"], dnsmos=lambda wav: 3.0, utmos=lambda wav: 2.0)
    judges.judge("generation", wav, 16000, SPEECH)
    judges.judge("generation", WAV, 24000, Clip("b.wav", "one"))
    assert judges.pop_figures() == {"dnsmos generation": 2.0, "utmos generation": 1.5}


def test_a_recording_without_sound_has_no_opinion_score_and_neither_has_its_reconstruction(capsys):
    judges = judges_of(["dnsmos"], dnsmos=lambda wav: 3.0)
    judges.compare(0 * WAV, WAV, 24000, SPEECH)
    judges.compare(WAV, WAV, 24000, Clip("b.wav", "one"))
    judges.compare(WAV, 0 * WAV, 24000, Clip("c.wav", "one"))      # the VAE lost it: that counts
    found = {name: row["speech"] for name, row in judges.pop().items()}
    assert found["dnsmos original"].value == 3.0 and found["dnsmos original"].clips == 2
    assert found["dnsmos reconstruction"].value == 2.0
    assert capsys.readouterr().out == "dnsmos: 1 clip left out, silent or too short\n"

    judges.compare(0 * WAV, WAV, 24000, SPEECH)
    assert judges.pop() == {}
    assert judges.refused[0].startswith("--metrics dnsmos: heard nothing in any of 1 clip")


def test_word_errors_are_counted_over_all_words():
    judges = judges_of(["wer"])
    judges.models["whisper"] = types.SimpleNamespace(transcribe=lambda wav: "one three")
    judges.models["words"] = types.SimpleNamespace(
        errors=lambda text, transcript: (1, len(text.split())))
    judges.judge("generation", WAV, 24000, SPEECH)
    judges.judge("generation", WAV, 24000, Clip("b.wav", "one"))
    judges.judge("generation", WAV, 24000, Clip("c.wav", "a bell", "sound"))
    assert judges.pop_figures() == {"wer generation": 0.5}                  # (1 + 1) / 4 words


def test_visqol_hears_sound_and_music_in_its_audio_mode():
    judges = judges_of(["visqol"], visqol_speech=lambda x, y: 2.0, visqol_audio=lambda x, y: 4.0)
    judges.compare(WAV, WAV, 24000, SPEECH)
    judges.compare(WAV, WAV, 24000, Clip("b.wav", "a bell", "sound"))
    found = judges.pop()
    assert {kind: figure.value for kind, figure in found["visqol"].items()} == {
        "speech": 2.0, "sound": 4.0}


def test_visqol_is_for_audible_clips_of_enough_length_and_rates_lost_ones_as_bad():
    """Guards a NaN for a silent reconstruction, which made the whole mean NaN."""
    visqol = object.__new__(Visqol)
    visqol.rate = 16000
    scores = iter([4.0, float("nan")])
    visqol.visqol = types.SimpleNamespace(measure_from_arrays=lambda x, y, sample_rate:
                                          types.SimpleNamespace(moslqo=next(scores)))
    wav = np.full(16000, 0.1)
    assert visqol.score(wav, wav) == 4.0
    assert visqol.score(wav, 0 * wav) == 1.0
    assert visqol.score(0 * wav, wav) is None
    assert visqol.score(wav[:8000], wav) is None


def test_pesq_that_finds_no_speech_gives_no_score():
    pesq = pytest.importorskip("pesq", reason="pesq (extra eval) is not installed")
    model = Pesq()
    assert pesq.NoUtterancesError in model.no_speech
    assert model.score(np.zeros(16000, np.float32), np.zeros(16000, np.float32)) is None


def test_a_silent_reconstruction_has_the_lowest_pesq(monkeypatch):
    """Fault: the package ended in "ValueError: cannot convert float NaN to integer"."""
    package = types.ModuleType("pesq")
    package.NoUtterancesError = package.BufferTooShortError = RuntimeError
    package.pesq = lambda rate, x, y, band: int(float("nan")) if not (x.any() and y.any()) else 3.0
    monkeypatch.setitem(sys.modules, "pesq", package)
    wav = np.full(16000, 0.1, np.float32)
    assert Pesq().score(wav, wav) == 3.0 and Pesq().score(wav, 0 * wav) == 1.0
    assert Pesq().score(0 * wav, wav) is None


def test_a_generation_louder_than_full_scale_is_judged_as_it_would_be_played():
    """Guards a sweep that ended in DNSMOS's complaint about samples above 1."""
    wavs = []
    judges = judges_of(["dnsmos"], dnsmos=lambda wav: wavs.append(wav) or 2.0)
    judges.judge("generation", torch.tensor([[-1.5, 0.5, 1.01] * 600]), 16000, SPEECH)
    assert wavs[0][:3].tolist() == [-1.0, 0.5, 1.0]


def test_a_generation_is_compared_with_the_voice_that_it_was_given():
    judges = judges_of(["sim"])
    judges.models["sim"] = types.SimpleNamespace(
        embed=lambda w: np.array([1.0, 0.0]) if w[0] == 0 else np.array([0.6, 0.8]))
    wav = torch.zeros(1, 16000)
    judges.judge("generation", wav, 16000, SPEECH, voice=wav + 1)
    judges.judge("generation", wav, 16000, Clip("b.wav", "one"))
    assert judges.pop_figures() == {"sim generation": 0.6}


def test_voices_are_compared_after_the_preprocessing_of_their_encoder(monkeypatch):
    """Fault: d-vectors were taken of raw wavs; Resemblyzer's encoder knows normalised levels and no
    long silence. A silent generation resembles nobody: 0, not NaN.
    """
    embedded = []
    package = types.ModuleType("resemblyzer")
    package.VoiceEncoder = lambda device, verbose: types.SimpleNamespace(
        embed_utterance=lambda wav: embedded.append(wav) or np.array([0.6, 0.8]))
    package.preprocess_wav = lambda wav: wav[wav != 0] / 2
    monkeypatch.setitem(sys.modules, "resemblyzer", package)
    model = Resemblyzer()
    assert model.embed(np.array([0.5, 0.0, 0.5, 0.0])).tolist() == [0.6, 0.8]
    assert embedded[0].tolist() == [0.25, 0.25]
    assert not model.embed(np.zeros(16000)).any()


def test_ecapa_and_utmos_are_asked_as_their_packages_want(tmp_path, monkeypatch):
    package = types.ModuleType("speechbrain.inference.speaker")
    encoder = types.SimpleNamespace(encode_batch=lambda wavs: torch.tensor([[[3.0, 4.0]]]))
    package.EncoderClassifier = types.SimpleNamespace(
        from_hparams=lambda source, run_opts: encoder)
    for name in ("speechbrain", "speechbrain.inference"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "speechbrain.inference.speaker", package)
    found = Ecapa("speechbrain/spkrec-ecapa-voxceleb").embed(np.zeros(100, np.float32))
    assert found == pytest.approx([0.6, 0.8])

    (tmp_path / "hubconf.py").write_text(
        "import torch\n"
        "class Level(torch.nn.Module):\n"
        "    def forward(self, wav, rate):\n"
        "        return wav.abs().mean(1) * rate\n"
        "def utmos22_strong():\n"
        "    return Level()\n")
    assert Utmos(str(tmp_path)).score(np.full(10, 0.5, np.float32)) == 8000
    with pytest.raises(BadInput, match="--utmos nowhere: has no hubconf.py"):
        Judges(["utmos"], utmos="nowhere")


def test_a_language_that_whisper_does_not_know_is_refused_at_the_start(monkeypatch):
    package = types.ModuleType("faster_whisper")
    package.WhisperModel = lambda *arguments, **options: types.SimpleNamespace(
        supported_languages=["en", "fr"])
    monkeypatch.setitem(sys.modules, "faster_whisper", package)
    assert Recogniser("tiny", "fr").language == "fr"
    with pytest.raises(BadInput, match="--language xx: tiny knows en, fr"):
        Recogniser("tiny", "xx")


# ---------------------------------------------------------------------------- distances


def noise(seed, loud=1.0):
    return 0.1 * loud * torch.randn(1, 32000, generator=torch.Generator().manual_seed(seed))


def test_originals_are_the_reference_of_reconstructions():
    judges = Judges(["fad", "mmd"], fad_dims=3)
    for i in range(8):
        clip = Clip(f"{i}.wav", "", "music")
        judges.compare(noise(i), noise(i), 16000, clip)
    found = judges.pop()
    assert set(found) == {"fad mel 3d reconstruction", "mmd mel reconstruction"}
    assert found["fad mel 3d reconstruction"]["music"].value == pytest.approx(0, abs=1e-9)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A manifest of 12 real clips of two sources, loud and quiet, and its Clips."""
    folder = tmp_path_factory.mktemp("real")
    clips = []
    with open(folder / "real.jsonl", "w") as f:
        for i in range(12):
            source = "loud" if i % 3 else "quiet"
            sf.write(folder / f"{i}.wav", noise(100 + i, 2 if i % 3 else 0.1)[0].numpy(), 16000)
            f.write(json.dumps({"audio": f"{i}.wav", "source": source}) + "\n")
            clips.append(Clip(str(folder / f"{i}.wav"), "", "music"))
    return str(folder / "real.jsonl"), clips


def test_real_clips_are_matched_by_source(real):
    manifest, clips = real
    sources = read_sources(manifest)
    assert sources[clips[0].audio] == "quiet" and sources[clips[1].audio] == "loud"
    judged = [f"judged{i}" for i in range(3)]
    sources |= {"judged0": "loud", "judged1": "quiet", "judged2": "loud"}
    names, chosen = match_sources(judged, clips, sources)
    assert names == judged
    assert [sources[clip.audio] for clip in chosen] == ["loud"] * 8 + ["quiet"] * 4
    _, fewer = match_sources(judged, clips, sources, most=2)
    assert [sources[clip.audio] for clip in fewer] == ["loud"] * 4 + ["quiet"] * 2


def test_a_source_without_enough_real_clips_is_left_out_and_said(real, capsys):
    manifest, clips = real
    sources = read_sources(manifest) | {"a": "loud", "b": "radio"}
    names, chosen = match_sources(["a", "b"], clips, sources)
    assert names == ["a"] and len(chosen) == 8
    assert "has 0 clips of source 'radio', 1 were judged" in capsys.readouterr().out
    with pytest.raises(BadInput, match="--reference: has too few clips of every source"):
        match_sources(["b"], clips, sources)


def test_generations_are_compared_with_real_clips_at_their_rate(real):
    """The real clips themselves, as generations, are at no distance; quiet noise is."""
    _, clips = real
    judges = Judges(["fad"], fad_dims=3)
    judges.held_out = clips
    for i, clip in enumerate(clips):
        wav, rate = sf.read(clip.audio, dtype="float32")
        judges.judge("generation", torch.tensor(wav)[None], rate, clip)
        judges.judge("quiet", noise(i, 0.01), rate, clip)
    found = judges.pop()
    assert found["fad mel 3d generation"]["music"].value == pytest.approx(0, abs=1e-6)
    assert found["fad mel 3d quiet"]["music"].low > 1


def test_a_distance_with_too_few_clips_is_refused_and_the_other_figures_stay():
    judges = judges_of(["visqol", "fad"], visqol_audio=lambda x, y: 4.0)
    judges.load("fad")
    judges.compare(noise(0), noise(1), 16000, Clip("a.wav", "", "music"))
    assert judges.pop()["visqol"]["music"].value == 4.0
    assert judges.refused == [
        "--metrics fad: needs 161 windows of each side for 160 dimensions, the judged clips have 2;"
        " give more clips, or fewer dimensions "
        "(reconstruction, music)"]
    with pytest.raises(BadInput, match="needs 161 windows"):
        judges.compare(noise(0), noise(1), 16000, Clip("a.wav", "", "music"))
        judges.pop_figures()


# ---------------------------------------------------------------------------- ABX, VERT


def test_abx_takes_the_latents_of_aligned_clips():
    judges = Judges(["abx"])
    for i in range(2):
        clip = Clip(f"{i}.wav", "bat bit", speaker="s", words=[["bat", 0, 0.2], ["bit", 0.2, 0.4]])
        judges.add_latents(np.array([[1.0, 0], [1, 0], [0, 1], [0, 1]]), 10, clip)
    assert judges.pop_figures() == {"abx within": 0.0}
    judges.add_latents(np.ones((2, 2)), 10, Clip("a.wav", "bat", words=[["bat", 0, 0.2]]))
    assert judges.pop() == {}
    assert judges.refused == ["--metrics abx: no word is said twice beside another word; give a "
                              "--manifest with more speech"]

    judges = Judges(["abx"])
    judges.add_latents(np.ones((4, 2)), 10, Clip("a.wav", "bat bit"))
    assert judges.pop() == {}
    assert judges.refused == ["--metrics abx: no held-out clip has `words` with times; add them "
                              "with python -m corpora.align"]


def test_vert_is_over_all_transcripts_and_one_alone_is_refused():
    judges = judges_of(["vert"])
    texts = iter(["a b a b", "a b c", "a b"])
    judges.models["whisper"] = types.SimpleNamespace(transcribe=lambda wav: next(texts))
    judges.models["words"] = types.SimpleNamespace(normalize=str.lower)
    judges.judge("generation", WAV, 24000, SPEECH)
    judges.judge("generation", WAV, 24000, Clip("b.wav", "one"))
    # self-BLEU: words a b of 4, pair ab of 3; words 2 of 3, pairs 1 of 2. auto-BLEU: 1 and 2 / 3; 0
    against = ((2 / 4 * 1 / 3) ** 0.5 + (2 / 3 * 1 / 2) ** 0.5) / 2
    own = (2 / 3) ** 0.5 / 2
    assert judges.pop()["vert generation"]["speech"].value == pytest.approx(
        100 * (against * own) ** 0.5)
    judges.judge("generation", WAV, 24000, SPEECH)
    assert judges.pop() == {}
    assert "vert: needs 2 clips of speech" in judges.refused[0]


# ---------------------------------------------------------------------------- refusals


def test_metrics_of_speech_need_speech():
    with pytest.raises(BadInput, match="--metrics wer,sim: no held-out clip is speech"):
        refuse_without_material(["wer", "fad", "sim"], [Clip("a.wav", "a bell", "sound")])
    refuse_without_material(["fad", "clap"], [Clip("a.wav", "a bell", "sound")])
    with pytest.raises(BadInput, match="--metrics wer: no held-out clip has a text"):
        refuse_without_material(["wer"], [Clip("a.wav")])


@pytest.mark.parametrize("metrics, what, line", [
    (["sim", "pesq", "abx", "stoi", "visqol"], (False, True, True),
     "--metrics pesq,abx,stoi,visqol: for reconstructions, .*--what vae"),
    (["sim"], (True, False, True), "--metrics sim: .*only the VAE is judged"),
    (["sim"], (True, True, False), "--metrics sim: .*trained without")])
def test_a_metric_that_nothing_judged_can_have_is_refused(metrics, what, line):
    """Fault: --what lm --metrics sim,pesq,abx,stoi,visqol printed none of them, and ended well."""
    with pytest.raises(BadInput, match=line):
        refuse_unjudged(metrics, *what)
    refuse_unjudged(metrics, True, True, True)
    refuse_unjudged(["wer", "fad", "kld"], False, True, False)


def test_voices_need_two_clips_of_a_speaker():
    pair = [Clip("a.wav", "one", speaker="s"), Clip("b.wav", "two", speaker="s")]
    refuse_without_material(["sim"], pair)
    with pytest.raises(BadInput, match="--metrics sim: no two held-out clips of speech"):
        refuse_without_material(["sim"], [*pair[:1], Clip("c.wav", "two", speaker="t")])


def test_a_metric_without_any_figure_is_named_at_the_end():
    judges = judges_of(["sim", "stoi"], stoi=lambda x, y: 0.5)
    judges.compare(WAV, WAV, 24000, SPEECH)
    judges.pop()
    judges.judge("generation", WAV, 24000, SPEECH)                 # without a voice
    judges.pop()
    judges.refuse_missing()
    assert len(judges.refused) == 1
    assert judges.refused[0].startswith("--metrics sim: no text had another clip of its speaker")

    # so it is where a sweep asks
    judges = judges_of(["sim"])
    judges.judge("generation", WAV, 24000, SPEECH)
    with pytest.raises(BadInput, match="--metrics sim: no text had another clip"):
        judges.pop_figures()


def test_a_metric_that_cannot_be_loaded_is_the_one_that_is_named(monkeypatch):
    """Fault: whatever failed, the error line was about --whisper."""
    def fail(*arguments, **options):
        raise RuntimeError("no weights")
    monkeypatch.setattr("judges.open_speaker", fail)
    monkeypatch.setattr("judges.Words", lambda language: None)
    monkeypatch.setattr("judges.Recogniser", fail)
    with pytest.raises(BadInput, match=r"--sim resemblyzer: cannot be loaded \(no weights\)"):
        Judges(["sim"])
    with pytest.raises(BadInput, match=r"--whisper tiny: cannot be loaded \(no weights\)"):
        Judges(["wer"], "tiny")


@pytest.mark.parametrize("metric, package, options, line", [
    ("stoi", "pystoi", {}, r"--metrics stoi: pystoi is not installed: pip install -e .\[eval\]"),
    ("wer", "jiwer", {}, r"--metrics wer: jiwer is not installed: pip install -e .\[eval\]"),
    ("distillmos", "distillmos", {}, r"distillmos is not installed: pip install -e .\[mos\]"),
    ("fad", "ai_edge_litert", {"embedding": "birdnet"}, r"--embedding birdnet: .*\[eval\]"),
    ("fad", "transformers", {"embedding": "laion/clap"}, r"--embedding laion/clap: .*\[hf\]"),
    ("ppx", "transformers", {"text_model": "gpt2"}, r"--text-model gpt2: transf.*\[hf\]"),
    ("clap", "transformers", {"clap": "laion/clap"}, r"--clap laion/clap: transformers .*\[hf\]"),
    ("sim", "speechbrain", {"sim": "speechbrain/x"}, "speechbrain .*pip install speechbrain")])
def test_a_judge_that_is_not_installed_names_the_extra(monkeypatch, metric, package, options, line):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(BadInput, match=line):
        Judges([metric], **options)
