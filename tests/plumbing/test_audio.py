"""audio.py: whatever a header says, what the decoder gives is what is read."""
import numpy as np
import pytest
import soundfile as sf

import audio
from audio import audio_pieces, inspect, load_audio, seconds_in_file
from cli import BadInput
from clips import RATE, tone
from corpora import scan
from data import AudioBatches, Clip, DataConfig, load_manifest, write_manifest

MP3_RATE = 44100


def wave(seconds, rate):
    """Silence and a rising tone with noise in turn, so that the bits of a VBR encoder vary."""
    t = np.arange(round(seconds * rate)) / rate
    g = np.random.default_rng(0)
    loud = np.sin(2 * np.pi * t / 3) > -0.5
    return loud * (0.3 * np.sin(2 * np.pi * (200 + 40 * t) * t) + 0.1 * g.standard_normal(len(t)))


def mp3(path, seconds=20.0):
    """A VBR MP3 with a Xing header -> its bytes, and offsets of the frames."""
    wav = wave(seconds, MP3_RATE)
    sf.write(path, wav, MP3_RATE, format="MP3", bitrate_mode="VARIABLE", compression_level=0.4)
    data = path.read_bytes()
    return data, audio.mp3_frames(data)[0]


def test_an_mp3_without_a_length_in_its_header_is_read_to_its_end(tmp_path):
    """Fault: libsndfile guesses the length from the first bit rate: 15 of 90 s were read."""
    data, offsets = mp3(tmp_path / "whole.mp3")
    (tmp_path / "bare.mp3").write_bytes(data[offsets[0, 0]:])
    whole = load_audio(tmp_path / "whole.mp3", MP3_RATE)
    bare = load_audio(tmp_path / "bare.mp3", MP3_RATE)

    assert bare.shape == (1, 1152 * len(offsets))
    assert seconds_in_file(tmp_path / "bare.mp3") == 1152 * len(offsets) / MP3_RATE
    # without the header nobody takes off the encoder's and the decoder's delay
    delay = 576 + 529
    assert np.abs(bare[:, delay:delay + whole.shape[1]] - whole).max() < 1e-5


def test_joined_mp3s_are_read_to_the_end_of_the_last(tmp_path):
    """Fault: the header of the first file was believed: 90 of 180 s were read."""
    data, offsets = mp3(tmp_path / "one.mp3")
    (tmp_path / "bare.mp3").write_bytes(data[offsets[0, 0]:])
    (tmp_path / "joined.mp3").write_bytes(data + b"ID3\x03\0\0\0\0\0\x05\xff\xfb\x90\0\0" + data)
    one = load_audio(tmp_path / "bare.mp3", MP3_RATE)
    joined = load_audio(tmp_path / "joined.mp3", MP3_RATE)
    n = one.shape[1]
    assert joined.shape == (1, 2 * n)
    assert np.abs(joined[:, :n] - one).max() < 1e-5
    assert np.abs(joined[:, n + 4 * 1152:] - one[:, 4 * 1152:]).max() < 1e-5

    # the decoder stops where the sample rate changes
    sf.write(tmp_path / "other.mp3", wave(3.0, 48000), 48000, format="MP3")
    (tmp_path / "joined.mp3").write_bytes(data + (tmp_path / "other.mp3").read_bytes())
    with pytest.raises(BadInput, match="joined.mp3: joined of parts with different sample rates"):
        load_audio(tmp_path / "joined.mp3", MP3_RATE)


def test_a_truncated_mp3_is_as_long_as_what_is_there_and_check_says_so(tmp_path):
    """Fault: its length was the header's, and a crop behind the end stopped the training."""
    data, offsets = mp3(tmp_path / "one.mp3")
    (tmp_path / "half.mp3").write_bytes(data[:len(data) // 2])
    there = int((offsets[:, 1] <= len(data) // 2).sum())
    assert seconds_in_file(tmp_path / "half.mp3") == there * 1152 / MP3_RATE
    assert load_audio(tmp_path / "half.mp3", MP3_RATE).shape == (1, there * 1152)
    with pytest.raises(BadInput, match=r"half.mp3: is not whole, .* of 20\.0. s are there"):
        inspect(tmp_path / "half.mp3")
    inspect(tmp_path / "one.mp3")


@pytest.mark.parametrize("header", ["right", "none"])
def test_a_part_of_a_vbr_mp3_is_the_same_samples_as_the_whole(tmp_path, header):
    """Fault: behind a seek the first 0.1 s were wrong, without the bits of the frames before; and
    soundfile seeks after every read."""
    data, offsets = mp3(tmp_path / "a.mp3")
    if header == "none":
        (tmp_path / "a.mp3").write_bytes(data[offsets[0, 0]:])
    whole = load_audio(tmp_path / "a.mp3", MP3_RATE)
    for start in (0.0, 0.013, 0.3, 1.7, 5.25, 9.9, 14.001, 18.9):
        first = int(start * MP3_RATE)
        part = load_audio(tmp_path / "a.mp3", MP3_RATE, start=start, seconds=0.5,
                          allow_silence=True)
        assert part.shape == (1, MP3_RATE // 2)
        assert np.abs(part - whole[:, first:first + part.shape[1]]).max() < 1e-5


@pytest.mark.parametrize("codec", ["VORBIS", "OPUS"])
def test_joined_ogg_files_are_read_to_the_end_of_the_last(tmp_path, codec):
    """Fault: libsndfile reads the first link of a chain: 90 of 180 s."""
    path = tmp_path / "a.ogg"
    sf.write(path, wave(3.0, 48000), 48000, format="OGG", subtype=codec)
    one = load_audio(path, 48000)
    joined = tmp_path / "joined.ogg"
    joined.write_bytes(path.read_bytes() * 2)
    assert seconds_in_file(joined) == 6.0
    assert (load_audio(joined, 48000) == np.concatenate([one, one], 1)).all()
    part = load_audio(joined, 48000, start=2.5, seconds=1.0)
    assert np.abs(part - np.concatenate([one[:, 120000:], one[:, :24000]], 1)).max() < 1e-5

    inspect(joined)
    joined.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(BadInput, match="is not whole"):
        inspect(joined)


def test_a_flac_and_a_gsm_wav_that_cannot_seek_are_read(tmp_path):
    """Fault: good files were "damaged; remove it", or ended in a traceback."""
    path = tmp_path / "a.flac"
    sf.write(path, wave(3.0, 16000), 16000)
    whole = load_audio(path, 16000)
    data = bytearray(path.read_bytes())
    data[21] &= 0xF0
    data[22:26] = bytes(4)                              # samples: unknown, as a pipe writes it
    path.write_bytes(data)
    assert sf.info(path).frames > 1 << 60
    assert seconds_in_file(path) == 3.0 and (load_audio(path, 16000) == whole).all()
    assert (load_audio(path, 16000, start=1.0, seconds=0.5) == whole[:, 16000:24000]).all()

    sf.write(tmp_path / "gsm.wav", wave(3.0, 8000), 8000, subtype="GSM610")
    whole = load_audio(tmp_path / "gsm.wav", 8000)
    assert abs(whole.shape[1] - 24000) <= 320
    part = load_audio(tmp_path / "gsm.wav", 8000, start=1.0, seconds=0.5)
    assert (part == whole[:, 8000:12000]).all()


def test_a_truncated_wav_and_two_flacs_in_one_are_not_whole(tmp_path):
    """Fault: `check` called them good."""
    for name in ("a.wav", "a.flac"):
        sf.write(tmp_path / name, wave(2.0, RATE), RATE)
        assert inspect(tmp_path / name) == (2.0, [])
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[:len(data) // 2] if name == "a.wav" else data * 2)
        with pytest.raises(BadInput, match=f"{name}: is not whole"):
            inspect(tmp_path / name)


def test_a_wav_of_a_pipe_is_whole(tmp_path):
    sf.write(tmp_path / "a.wav", wave(2.0, RATE), RATE)
    data = bytearray((tmp_path / "a.wav").read_bytes())
    size = data.index(b"data") + 4
    data[4:8] = data[size:size + 4] = b"\xff" * 4       # the size that a pipe writes
    (tmp_path / "a.wav").write_bytes(data)
    assert inspect(tmp_path / "a.wav") == (2.0, [])


def test_a_wrong_duration_in_the_manifest_is_named(tmp_path):
    path = tone(tmp_path / "a.wav", 2.0)
    assert inspect(path, 2.0) == (2.0, []) and inspect(path, 2.05)[1] == []
    assert inspect(path, 3.0) == (2.0, [f"{path}: lasts 2.00 s, the manifest says 3.00"])


def test_samples_above_full_scale_are_clipped_alike_in_crops_and_in_what_is_encoded(
        tmp_path, monkeypatch):
    """Fault: crops were clipped, crops of long files scaled, latents and prompts encoded as they
    are: up to three times as loud as what the VAE had learned."""
    t = np.arange(2 * RATE) / RATE
    wav = 3 * np.sin(2 * np.pi * 100 * t)
    sf.write(tmp_path / "loud.wav", wav, RATE, subtype="FLOAT")
    clipped = wav.clip(-1, 1).astype(np.float32)
    whole = load_audio(tmp_path / "loud.wav", RATE)
    assert (whole[0] == clipped).all()
    assert (load_audio(tmp_path / "loud.wav", RATE, start=0.5, seconds=1.0)[0]
            == clipped[RATE // 2:3 * RATE // 2]).all()
    assert (np.concatenate([*audio_pieces(tmp_path / "loud.wav", RATE, 1, 999)], 1) == whole).all()

    # a crop of a whole number of periods has the rms of the clipped sine, from memory and from disk
    rms = np.sqrt(np.mean(clipped ** 2))
    for longest in (60.0, 0.1):
        monkeypatch.setattr("data.WHOLE_FILE_SECONDS", longest)
        batches = AudioBatches([Clip(str(tmp_path / "loud.wav"))], DataConfig(crop_seconds=1.0),
                               RATE, 1, 4)
        crops = batches(0, range(4))["audio"].numpy()
        assert np.allclose(np.sqrt(np.mean(crops ** 2, (1, 2))), rms, atol=1e-3)

    # overshoots after resampling are above full scale too
    square = np.sign(np.sin(2 * np.pi * 100 * t))
    sf.write(tmp_path / "square.wav", square, RATE, subtype="FLOAT")
    assert np.abs(load_audio(tmp_path / "square.wav", 11025)).max() == 1


def test_a_file_far_above_full_scale_is_bad_and_a_spike_is_noted(tmp_path):
    """Fault: `check` named neither."""
    quiet = 0.2 * np.sin(np.arange(RATE))
    sf.write(tmp_path / "int16.wav", 20000 * quiet, RATE, subtype="FLOAT")
    with pytest.raises(BadInput, match=r"100% of its samples are above full scale \(peak 4000\)"):
        inspect(tmp_path / "int16.wav")
    quiet[100] = 1e29
    sf.write(tmp_path / "spike.wav", quiet, RATE, subtype="FLOAT")
    seconds, remarks = inspect(tmp_path / "spike.wav")
    assert seconds == 1.0 and "1 samples above full scale (peak 1e+29)" in remarks[0]


def test_check_names_what_is_wrong_and_writes_the_lengths_that_the_decoder_gives(tmp_path, capsys):
    """Fault: truncated files passed, and wrong durations stayed in the manifest."""
    tone(tmp_path / "good.wav", 2.0)
    data = open(tone(tmp_path / "half.wav", 2.0), "rb").read()
    (tmp_path / "half.wav").write_bytes(data[:len(data) // 2])
    mp3_data, offsets = mp3(tmp_path / "bare.mp3")
    (tmp_path / "bare.mp3").write_bytes(mp3_data[offsets[0, 0]:])
    write_manifest(tmp_path / "m.jsonl", [Clip(str(tmp_path / name), duration=5.0)
                                          for name in ("good.wav", "half.wav", "bare.mp3")])
    with pytest.raises(BadInput, match="1 bad clips"):
        scan.main(["check", str(tmp_path / "m.jsonl")])
    scan.main(["check", str(tmp_path / "m.jsonl"), "--out", str(tmp_path / "clean.jsonl")])
    out = capsys.readouterr()
    assert "half.wav: is not whole, 1.00 of 2.00 s are there" in out.out + out.err
    assert "good.wav: lasts 2.00 s, the manifest says 5.00" in out.out + out.err
    assert [clip.duration for clip in load_manifest(tmp_path / "clean.jsonl")] == [
        2.0, 1152 * len(offsets) / MP3_RATE]


@pytest.mark.parametrize("rate", [RATE, 11025, 44100])
def test_pieces_joined_equal_the_whole(tmp_path, rate, monkeypatch):
    monkeypatch.setattr(audio, "BLOCK", 5000)
    sf.write(tmp_path / "a.wav", np.stack([wave(2.3, rate), 0.5 * wave(2.3, rate)], 1), rate)
    for channels in (1, 2):
        pieces = [*audio_pieces(tmp_path / "a.wav", RATE, channels, 4000)]
        assert [p.shape for p in pieces[:-1]] == [(channels, 4000)] * 4
        whole = load_audio(tmp_path / "a.wav", RATE, channels)
        assert np.abs(np.concatenate(pieces, 1) - whole).max() < 1e-6


def test_a_file_whose_name_is_not_utf8_is_read(tmp_path):
    """Fault: UnicodeEncodeError from within soundfile."""
    path = tmp_path / "a.wav"
    tone(path, 1.0)
    other = path.rename(tmp_path / "caf\udce9.wav")
    assert load_audio(other, RATE).shape == (1, RATE) and inspect(str(other)) == (1.0, [])
