"""What is synthesised is deterministic, has distinct voices, and has its words where it says."""
import numpy as np
import pytest

from corpora import oracle, synth


@pytest.mark.parametrize("kind,text", [("speech", "seven three"), ("sound", "two noise bursts"),
                                       ("music", "a fast arpeggio, low, pluck")])
@pytest.mark.parametrize("rate", synth.RATES)
def test_same_seed_same_bytes_and_another_seed_differs(kind, text, rate):
    a, b, c = (synth.synthesise(text, kind, seed=s, rate=rate)[0] for s in (5, 5, 6))
    assert a.dtype == np.float32 and a.tobytes() == b.tobytes()
    assert len(a) != len(c) or np.abs(a - c).max() > 0.05


def test_voices_differ_in_pitch_and_in_the_spectrum():
    means, bands = [], []
    for voice in range(len(synth.VOICES)):
        f0, log = [], []
        for seed in range(6):
            wav, ((_, a, b),) = synth.synthesise("nine", "speech", voice=voice, seed=seed)
            ac = np.fft.irfft(np.abs(np.fft.rfft(wav, 2 ** 15)) ** 2)
            f0.append(16000 / (62 + ac[62:240].argmax()))
            log.append(oracle.log_mel(wav, 16000)[round(a * 80):round(b * 80)].mean(0))
        means.append(np.median(f0)), bands.append(np.mean(log, 0))
    assert np.diff(sorted(means)).min() > 5 and max(means) / min(means) > 2
    assert min(np.abs(a - b).max() for i, a in enumerate(bands) for b in bands[:i]) > 0.2    # 2 dB


def test_word_times_cover_the_energy_and_nothing_else_does():
    wav, words = synth.synthesise("seven three stop nine", "speech", voice=2, seed=1)
    assert [w for w, _, _ in words] == "seven three stop nine".split()
    spoken = np.zeros(len(wav), bool)
    for _, a, b in words:
        assert 0 < a < b < len(wav) / 16000 and 0.15 < b - a < 0.6
        spoken[int((a - 0.015) * 16000):int((b + 0.025) * 16000)] = True
    assert np.square(wav[spoken]).mean() > 1e3 * np.square(wav[~spoken]).mean()
    for (_, _, end), (_, start, _) in zip(words, words[1:]):
        assert 0.039 < start - end < 0.121


@pytest.mark.parametrize("register, hz", [("low", 261.63), ("high", 523.25)])
@pytest.mark.parametrize("timbre", ["flute", "organ", "pluck"])
def test_music_is_in_tune_whatever_its_seed(register, hz, timbre):
    """A repeated note stands four semitones above C4 or C5."""
    for seed in (0, 1):
        wav, _ = synth.synthesise(f"a slow repeated note, {register}, {timbre}", "music", seed=seed)
        track = oracle.pitch_track(wav, 16000)
        found = np.median(track.hz[track.power > 0.03 * track.power.max()])
        assert abs(found - hz * 2 ** (4 / 12)) < 4           # bins of 3.9 Hz
