"""Which part of a recording lends its voice, or is continued; what a prompt without it is told."""
import dataclasses
import sys
import types

import numpy as np
import pytest
import soundfile as sf
import torch

import calm
import evaluate
import generations
import prompts
import sample
from audio import load_audio
from cli import BadInput
from config import build, open_run
from data import Clip, DataConfig
from latents import LatentBatches
from untrained import untrained_run

RATE = 16000
HOP = 640


def tone(seconds, level=0.3, frequency=300):
    return level * np.sin(2 * np.pi * frequency * np.arange(round(seconds * RATE)) / RATE)


def silence(seconds):
    return np.zeros(round(seconds * RATE))


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """A run folder with random weights whose voice prompts have 4 latents (0.16 s)."""
    folder = tmp_path_factory.mktemp("untrained")
    untrained_run(folder)
    return folder


def speak(folder, monkeypatch, *arguments):
    """sample.py in this process -> the options of every call of generate()."""
    calls = []
    generate = calm.CALM.generate

    def spy(self, text, **options):
        calls.append(options)
        return generate(self, text, **options)
    monkeypatch.setattr(calm.CALM, "generate", spy)
    monkeypatch.setattr(sys, "argv", ["sample.py", "--run", f"{folder}/run", "--seconds", "0.4",
                                      "--threads", "1", "--out", f"{folder}/x.wav", *arguments])
    sample.main()
    return calls


def encoded(folder, wav):
    """Normalised latents (1, T, D) of a numpy waveform, by the run's VAE."""
    _, vae, lm, _ = open_run(f"{folder}/run")
    return prompts.encode_prompt(lm, vae, torch.tensor(wav, dtype=torch.float32)[None, None])


def test_the_window_with_the_most_speech_is_the_first_of_the_loudest_full_ones():
    quiet, soft, loud = -90.0, -35.0, -15.0
    assert prompts.speech_window(np.array([quiet] * 5 + [loud] * 3 + [quiet] * 2), 3) == (5, 3)
    assert prompts.speech_window(np.array([soft] * 3 + [loud] * 3), 3) == (3, 3)
    assert prompts.speech_window(np.array([loud, quiet, loud, loud, quiet]), 3) == (0, 2)
    assert prompts.speech_window(np.array([loud] * 9), 4) == (0, 4)
    assert prompts.speech_window(np.array([quiet, loud]), 4) == (0, 1)      # a short recording
    assert prompts.speech_window(np.array([quiet] * 6), 3) == (0, 0)
    # noise 45 dB below the voice is not speech; a click is not all that counts
    assert prompts.speech_window(np.array([-60.0] * 8 + [loud] * 4 + [-60.0] * 8), 4) == (8, 4)
    assert prompts.speech_window(np.array([0.0] + [-60.0] * 5 + [loud] * 20), 4)[0] == 6


def test_a_voice_prompt_is_the_speech_of_a_recording_and_not_its_silence(untrained, monkeypatch):
    """Fault: the prompt was the first prompt_frames latents; behind 1.5 s of silence it held no
    voice, and two voices gave the same audio.
    """
    wav = np.concatenate([silence(1.6), tone(0.8), silence(1)])
    sf.write(untrained / "late.wav", wav, RATE, subtype="FLOAT")
    call, = speak(untrained, monkeypatch, "--text", "two", "--prompt", f"{untrained}/late.wav")
    start = 40 * HOP                                      # 1.6 s are 40 latents
    torch.testing.assert_close(call["prompt"], encoded(untrained, wav[start:start + 4 * HOP]))


def test_evaluation_takes_the_same_window_as_sampling_and_passes_over_silent_clips(untrained):
    """Fault: evaluate.py took the middle of a clip, sample.py its beginning."""
    cfg, vae, lm, _ = open_run(f"{untrained}/run")
    sf.write(untrained / "mute.wav", silence(2), RATE)
    sf.write(untrained / "half.wav", np.concatenate([tone(1), silence(2)]), RATE, subtype="FLOAT")
    clips = [Clip(f"{untrained}/{name}.wav", "one", "speech", "anna")
             for name in ("target", "mute", "half")]
    latents, wav = generations.voice_prompt(clips[0], clips, lm, vae, cfg)
    torch.testing.assert_close(latents, encoded(untrained, tone(1)[:4 * HOP]))
    assert wav.shape == (1, 3 * RATE)                     # the whole clip, to compare voices with
    assert generations.voice_prompt(clips[0], clips[:2], lm, vae, cfg) is None


def test_later_sentences_take_the_voice_where_the_first_one_speaks():
    """Fault: the voice handed on was the first latents of a sentence, silent or not."""
    cfg = types.SimpleNamespace(vae=types.SimpleNamespace(hop=10),
                                data=types.SimpleNamespace(prompt_frames=2))
    latents = torch.arange(6.0).view(1, 6, 1)
    wav = torch.cat([torch.zeros(1, 30), torch.full((1, 20), 0.2), torch.zeros(1, 6)], 1)
    assert prompts.best_voice(latents, wav, cfg).flatten().tolist() == [3, 4]
    assert prompts.best_voice(latents, 0 * wav, cfg) is None


def test_the_next_sentence_gets_latents_of_the_sentence_before(untrained, monkeypatch):
    calls = speak(untrained, monkeypatch, "--text", "one two one two. " * 3)
    assert [call["prompt"] is None for call in calls] == [True] + [False] * (len(calls) - 1)
    assert len(calls) > 1 and 1 <= calls[1]["prompt"].shape[1] <= 4


def test_a_recording_of_any_length_is_read_in_pieces_and_only_its_window_is_encoded(
        untrained, monkeypatch):
    """Fault: 10 minutes of reference were read and encoded whole, 2.6 GB."""
    cfg, vae, lm, _ = open_run(f"{untrained}/run")
    sf.write(untrained / "long.wav", np.concatenate([silence(95), tone(1), silence(4)]), RATE)
    read = []

    def spy(path, rate, channels, **options):
        read.append(load_audio(path, rate, channels, **options))
        return read[-1]
    encoded_samples = []
    encode = vae.encode
    vae.encode = lambda wav, state: encoded_samples.append(wav.shape[-1]) or encode(wav, state)
    monkeypatch.setattr(prompts, "load_audio", spy)
    latents, speech = prompts.encode_voice(lm, vae, f"{untrained}/long.wav", 4)
    assert speech == 4 and latents.shape == (1, 4, 4)
    assert max(wav.shape[1] for wav in read) == 30 * RATE and encoded_samples == [4 * HOP]
    assert abs(read[-1]).max() > 0.29                     # the tone


def test_a_long_prompt_is_encoded_in_pieces_to_the_same_latents(untrained, monkeypatch):
    """Fault: 10 minutes behind --prompt-text were encoded at once."""
    _, vae, lm, _ = open_run(f"{untrained}/run")
    wav = torch.randn(1, 1, 10 * HOP + 100, generator=torch.Generator().manual_seed(0))
    whole = vae.normalize(vae.encode(wav)[0])
    lengths = []
    encode = vae.encode
    vae.encode = lambda part, state: lengths.append(part.shape[-1]) or encode(part, state)
    monkeypatch.setattr(prompts, "PIECE_SECONDS", 4 * HOP / RATE)
    torch.testing.assert_close(prompts.encode_prompt(lm, vae, wav), whole, atol=1e-5, rtol=1e-5)
    assert lengths == [4 * HOP, 4 * HOP, 3 * HOP]


def test_prompt_seconds_sets_the_length_of_a_voice(untrained, monkeypatch):
    """Fault: --prompt-seconds was ignored where a prompt lends its voice."""
    sf.write(untrained / "tone.wav", tone(2), RATE)
    prompt = ["--text", "two", "--prompt", f"{untrained}/tone.wav", "--prompt-seconds"]
    call, = speak(untrained, monkeypatch, *prompt, "0.12")
    assert call["prompt"].shape == (1, 3, 4)
    with pytest.raises(BadInput, match="--prompt-seconds: 1 is more than .* 0.16 s"):
        speak(untrained, monkeypatch, *prompt, "1")
    with pytest.raises(BadInput, match="--prompt-seconds: is for a --prompt without"):
        speak(untrained, monkeypatch, *prompt, "0.1", "--prompt-text", "one")


def test_silence_is_judged_on_the_part_that_is_used(untrained, monkeypatch):
    """Fault: a prompt that ends in silence was continued from its silence: the whole was judged."""
    sf.write(untrained / "ends.wav", np.concatenate([tone(2), silence(3)]), RATE)
    sf.write(untrained / "mute.wav", silence(2), RATE)
    go_on = ["--kind", "music", "--prompt", f"{untrained}/ends.wav", "--prompt-seconds"]
    with pytest.raises(BadInput, match="ends.wav: the last 2 s are silent"):
        speak(untrained, monkeypatch, *go_on, "2")
    call, = speak(untrained, monkeypatch, *go_on, "3.2")
    assert call["history"].shape == (1, 80, 4)
    with pytest.raises(BadInput, match="mute.wav: is silent, it has no voice"):
        speak(untrained, monkeypatch, "--text", "two", "--prompt", f"{untrained}/mute.wav")


def test_a_scrap_of_a_voice_is_used_and_said(untrained, monkeypatch, capsys):
    sf.write(untrained / "scrap.wav", np.concatenate([silence(1), tone(0.04), silence(1)]), RATE)
    speak(untrained, monkeypatch, "--text", "two", "--prompt", f"{untrained}/scrap.wav")
    assert "0.04 s with speech; the voice prompts of training had 0.08 s or more" in \
        capsys.readouterr().out


def test_channels_in_opposite_phase_are_heard(tmp_path):
    """Fault: their average is zero, and a loud stereo file was refused as silent."""
    wav = tone(0.5)
    sf.write(tmp_path / "opposite.wav", np.stack([wav, -wav], 1), RATE, subtype="FLOAT")
    sf.write(tmp_path / "other.wav", np.stack([wav, 0 * wav], 1), RATE, subtype="FLOAT")
    np.testing.assert_allclose(load_audio(str(tmp_path / "opposite.wav"), RATE)[0], wav, atol=1e-6)
    np.testing.assert_allclose(load_audio(str(tmp_path / "other.wav"), RATE)[0], wav / 2, atol=1e-6)


def with_seen(folder, **seen):
    """The run's language model with what its rows held."""
    path = folder / "run" / "lm.pt"
    torch.save(torch.load(path) | {"seen": seen}, path)


def test_a_kind_that_training_never_had_is_refused_and_a_voice_prompt_is_commented(
        untrained, monkeypatch, capsys):
    """Fault: a run of music spoke, and a run without a single voice prompt took --prompt; neither
    said a word.
    """
    sf.write(untrained / "tone.wav", tone(2), RATE)
    voice = ["--text", "two", "--prompt", f"{untrained}/tone.wav"]
    with_seen(untrained, kinds=["sound", "speech"], voice_prompts=False)
    with pytest.raises(BadInput, match="--kind music: .* was trained on sound, speech alone"):
        speak(untrained, monkeypatch, "--text", "two", "--kind", "music")
    says = f"--prompt: no training row of {untrained}/run had a voice prompt"
    speak(untrained, monkeypatch, *voice)
    assert says in capsys.readouterr().out
    speak(untrained, monkeypatch, *voice, "--prompt-text", "one")
    with_seen(untrained, kinds=["speech"], voice_prompts=True)
    speak(untrained, monkeypatch, *voice)
    assert says not in capsys.readouterr().out


def test_characters_that_no_text_of_training_had_are_named(untrained, monkeypatch, capsys):
    """Fault: "25" was spoken as anything, without a line."""
    with_seen(untrained, kinds=["speech", "sound"], voice_prompts=True,
              letters={"speech": " abcdefghinotwé", "sound": " 25abcdefghinotw"})
    speak(untrained, monkeypatch, "--text", "the 25th e\u0301tat & the 2nd")
    assert ('note: "the 25th e\u0301tat & the 2nd": no text of training had 2 5 &: write it as it '
            "is spoken") in capsys.readouterr().out
    speak(untrained, monkeypatch, "--text", "the 25th", "--kind", "sound")
    with_seen(untrained, kinds=["speech"], voice_prompts=True)               # an older run
    speak(untrained, monkeypatch, "--text", "the 25th")
    assert "no text of training" not in capsys.readouterr().out


def test_a_text_for_a_kind_that_had_none_in_training_is_commented(untrained, monkeypatch, capsys):
    """Fault: it was taken, and changed nothing."""
    with_seen(untrained, kinds=["speech", "music"], voice_prompts=True,
              letters={"speech": "a", "music": ""})
    speak(untrained, monkeypatch, "--text", "dark ambient", "--kind", "music")
    says = 'note: "dark ambient": no music had a text in training: a text changes little'
    assert says in capsys.readouterr().out


def test_evaluation_leaves_out_kinds_that_training_never_had(untrained, capsys):
    """Fault: a kind of weight 0 was generated from and counted as if it had been learned."""
    cfg, _, _, _ = open_run(f"{untrained}/run")
    with_seen(untrained, kinds=["speech"], voice_prompts=True)
    clips = [Clip(f"{kind}.wav", "one", kind) for kind in ("speech", "music")]
    assert evaluate.of_trained_kinds(clips, f"{untrained}/run", ["lm"], cfg) == clips[:1]
    assert "music: not generated" in capsys.readouterr().out


def test_a_checkpoint_says_which_kinds_and_voice_prompts_its_rows_had(tmp_path):
    cfg = build(DataConfig, {"frames": 8, "prompt_frames": 4, "weights": {"speech": 1.0}})

    class Cache(types.SimpleNamespace):
        def __len__(self):
            return len(self.frames)

    def seen(clips, frames, **more):
        frames = np.array(frames)
        cache = Cache(dim=1, levels=0, frames=frames, get=lambda i: np.zeros((frames[i], 2)))
        return LatentBatches(clips, cache, dataclasses.replace(cfg, **more), 2, 1).seen

    anna = [Clip(f"{i}.wav", "a", "speech", "anna") for i in range(2)]
    nobody = [Clip(f"{i}.wav", "a", "speech") for i in range(2)]
    music = [Clip("m.wav", "a 2-bar riff", "music")]
    assert seen(anna + music, [8, 8, 8]) == {"kinds": ["speech"], "voice_prompts": True,
                                             "letters": {"speech": "a"}}
    both = seen(anna + music, [8, 8, 8], weights={})
    assert both["kinds"] == ["speech", "music"] and both["letters"]["music"] == " -2abfir"
    assert not seen(nobody, [8, 9])["voice_prompts"]      # each clip fills its row
    assert seen(nobody, [8, 10])["voice_prompts"]         # two frames are left: half a prompt
    assert not seen(anna, [8, 8], prompt_prob=0.0)["voice_prompts"]
