"""decoder.py, audio.py: whatever a header says, what the decoder gives is what is read."""
import shutil
import struct
import subprocess

import numpy as np
import pytest
import soundfile as sf

import decoder
from audio import audio_pieces, inspect, load_audio
from cli import BadInput
from clips import RATE, tone
from corpora import scan
from data import AudioBatches, Clip, DataConfig, load_manifest, write_manifest
from decoder import seconds_in_file

MP3_RATE = 44100


def wave(seconds, rate):
    """Silence and a rising tone with noise in turn, so that the bits of a VBR encoder vary."""
    t = np.arange(round(seconds * rate)) / rate
    g = np.random.default_rng(0)
    loud = np.sin(2 * np.pi * t / 3) > -0.5
    return loud * (0.3 * np.sin(2 * np.pi * (200 + 40 * t) * t) + 0.1 * g.standard_normal(len(t)))


def mp3(path, seconds=20.0):
    """A VBR MP3 with a Xing header -> its bytes, those behind the header, its number of frames."""
    wav = wave(seconds, MP3_RATE)
    sf.write(path, wav, MP3_RATE, format="MP3", bitrate_mode="VARIABLE", compression_level=0.4)
    data = path.read_bytes()
    frames, = struct.unpack(">I", data[data.index(b"Xing") + 8:][:4])
    first, has_header = decoder.mp3_sound(data)
    assert has_header
    return data, data[first:], frames


needs_ffmpeg = pytest.mark.skipif(not shutil.which("ffmpeg"), reason="ffmpeg is not installed")


def without_ffmpeg(monkeypatch):
    """A machine that has no ffmpeg."""
    monkeypatch.setenv("PATH", "")
    decoder.measured_info.cache_clear()


def test_an_mp3_without_a_length_in_its_header_is_read_to_its_end(tmp_path):
    """Fault: libsndfile guesses the length from the first bit rate: 15 of 90 s were read."""
    _, sound, frames = mp3(tmp_path / "whole.mp3")
    (tmp_path / "bare.mp3").write_bytes(sound)
    whole = load_audio(tmp_path / "whole.mp3", MP3_RATE)
    bare = load_audio(tmp_path / "bare.mp3", MP3_RATE)

    assert bare.shape == (1, 1152 * frames)
    assert seconds_in_file(tmp_path / "bare.mp3") == 1152 * frames / MP3_RATE
    # without the header nobody takes off the encoder's and the decoder's delay
    delay = 576 + 529
    assert np.abs(bare[:, delay:delay + whole.shape[1]] - whole).max() < 1e-5


def test_joined_mp3s_are_read_to_the_end_of_the_last(tmp_path):
    """Fault: the header of the first file was believed: 90 of 180 s were read."""
    data, sound, frames = mp3(tmp_path / "one.mp3")
    (tmp_path / "bare.mp3").write_bytes(sound)
    (tmp_path / "joined.mp3").write_bytes(data + b"ID3\x03\0\0\0\0\0\x05\xff\xfb\x90\0\0" + data)
    one = load_audio(tmp_path / "bare.mp3", MP3_RATE)
    joined = load_audio(tmp_path / "joined.mp3", MP3_RATE)

    # the header of the second is a frame of silence
    n = one.shape[1]
    assert joined.shape == (1, 2 * n + 1152)
    assert np.abs(joined[:, :n] - one).max() < 1e-5
    assert np.abs(joined[:, n + 5 * 1152:] - one[:, 4 * 1152:]).max() < 1e-5


def mp3_of_two_rates(path):
    """20 s at 44.1 kHz and 3 s at 48 kHz."""
    data, _, _ = mp3(path)
    sf.write(path, wave(3.0, 48000), 48000, format="MP3")
    path.write_bytes(data + path.read_bytes())


def test_an_mp3_in_which_the_decoder_stops_midway_is_refused_without_ffmpeg(tmp_path, monkeypatch):
    without_ffmpeg(monkeypatch)
    path = tmp_path / "joined.mp3"
    mp3_of_two_rates(path)
    with pytest.raises(BadInput, match="joined.mp3: of its sound only the first 20.0 s can be "
                                       "decoded; .* install ffmpeg"):
        load_audio(path, MP3_RATE)
    data, _, _ = mp3(path)
    path.write_bytes(data[:len(data) // 2])
    with pytest.raises(BadInput, match="joined.mp3: damaged audio .* install ffmpeg"):
        load_audio(path, MP3_RATE)


@needs_ffmpeg
def test_an_mp3_in_which_the_decoder_stops_midway_goes_through_ffmpeg(tmp_path):
    """Fault: 20 of 23 s were read; with 2 kB of other bytes within it, those before them."""
    path = tmp_path / "joined.mp3"
    mp3_of_two_rates(path)
    assert abs(seconds_in_file(path) - 23.1) < 0.1
    data, _, _ = mp3(path)
    path.write_bytes(data + bytes(2000) + data)
    assert abs(seconds_in_file(path) - 40.1) < 0.1
    assert load_audio(path, MP3_RATE, start=39.0, seconds=0.5).shape == (1, MP3_RATE // 2)

    # behind a whole file they do no harm
    path.write_bytes(data + bytes(20000))
    assert inspect(path) == (20.0, [])


@needs_ffmpeg
def test_a_truncated_mp3_is_as_long_as_what_is_there_and_check_says_so(tmp_path):
    """Fault: its length was the header's, and a crop behind the end stopped the training."""
    data, _, frames = mp3(tmp_path / "one.mp3")
    (tmp_path / "half.mp3").write_bytes(data[:len(data) // 2])
    seconds = seconds_in_file(tmp_path / "half.mp3")
    assert 0.3 * 20 < seconds < 0.7 * 20                # of a VBR file, half of the bytes
    assert load_audio(tmp_path / "half.mp3", MP3_RATE).shape == (1, round(seconds * MP3_RATE))
    with pytest.raises(BadInput, match=r"half.mp3: is not whole, .* of 20\.0. s are there"):
        inspect(tmp_path / "half.mp3")
    inspect(tmp_path / "one.mp3")


@pytest.mark.parametrize("frames", [0, 20, 3000])
def test_a_wrong_number_of_frames_in_the_header_of_an_mp3_is_not_believed(tmp_path, frames):
    """Fault: the header's word was the length."""
    data, sound, right = mp3(tmp_path / "a.mp3", 5.0)
    place = data.index(b"Xing") + 8
    (tmp_path / "a.mp3").write_bytes(data[:place] + struct.pack(">I", frames) + data[place + 4:])
    assert load_audio(tmp_path / "a.mp3", MP3_RATE).shape == (1, 1152 * right)


@needs_ffmpeg
@pytest.mark.parametrize("ending, codec", [("m4a", "alac"), ("m4a", "aac"), ("webm", "libopus"),
                                           ("wma", "wmav2"), ("mka", "flac")])
def test_what_libsndfile_does_not_read_goes_through_ffmpeg(tmp_path, ending, codec):
    """Fault: "Format not recognised; convert or remove it"."""
    t = np.arange(2 * 48000) / 48000
    wav = np.stack([0.5 * np.sin(2 * np.pi * 440 * t), 0.25 * np.sin(2 * np.pi * 440 * t)], 1)
    sf.write(tmp_path / "a.wav", wav, 48000)
    path = tmp_path / f"-a: {codec}.{ending}"           # no option and no protocol of ffmpeg
    subprocess.run(["ffmpeg", "-v", "error", "-i", tmp_path / "a.wav", "-c:a", codec, path],
                   check=True)

    heard = load_audio(path, 48000, 2)
    assert abs(heard.shape[1] - len(wav)) < 0.05 * 48000
    if codec in ("alac", "flac"):                       # lossless
        assert np.abs(heard - wav.T).max() < 2 ** -15
    level = np.sqrt(2 * np.mean(heard[:, 12000:84000] ** 2, 1))
    assert np.abs(level - [0.5, 0.25]).max() < 0.02
    part = load_audio(path, 48000, 2, start=1.0, seconds=0.5)
    assert (part == heard[:, 48000:72000]).all()
    assert inspect(path)[1] == []
    assert scan.find_clips(tmp_path)[0].audio == str(path)


def test_without_ffmpeg_one_line_names_it(tmp_path, monkeypatch, capsys):
    without_ffmpeg(monkeypatch)
    (tmp_path / "a.m4a").write_bytes(b"\0\0\0 ftypM4A ")
    with pytest.raises(BadInput, match="a.m4a: cannot be read .* install ffmpeg"):
        load_audio(tmp_path / "a.m4a", RATE)
    tone(tmp_path / "b.wav")
    assert len(scan.find_clips(tmp_path)) == 1
    assert "1 files .m4a, which only ffmpeg reads; install it" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"abc", b"ID3", b"RIFF", b"fLaC", b"OggS",
                                     b"\xff\xfb\x90", b"no audio, but text", b"<html>404</html>" * 100])
def test_what_is_no_audio_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "a.wav").write_bytes(content)
    for read in (inspect, lambda path: load_audio(path, RATE)):
        with pytest.raises(BadInput, match="a.wav: ") as e:
            read(tmp_path / "a.wav")
        assert len(str(e.value).splitlines()) == 1 and "remove it" in str(e.value)


@pytest.mark.parametrize("header", ["right", "none"])
def test_a_part_of_a_vbr_mp3_is_the_same_samples_as_the_whole(tmp_path, header):
    """Fault: behind a seek the first 0.1 s were wrong, without the bits of the frames before; and
    soundfile seeks after every read."""
    _, sound, _ = mp3(tmp_path / "a.mp3")
    if header == "none":
        (tmp_path / "a.mp3").write_bytes(sound)
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


def test_joined_flacs_and_joined_wavs_are_read_to_the_end_of_the_last(tmp_path):
    """Fault: libsndfile reads the first FLAC, and refuses the WAV, of which ffmpeg reads the first.
    """
    for name in ("a.wav", "a.flac"):
        path = tmp_path / name
        sf.write(path, wave(2.0, RATE), RATE)
        one = load_audio(path, RATE)
        path.write_bytes(path.read_bytes() * 3)
        assert inspect(path) == (6.0, [])
        assert (load_audio(path, RATE) == np.tile(one, 3)).all()
        part = load_audio(path, RATE, start=3.5, seconds=1.0)
        assert (part == np.tile(one, 3)[:, 28000:36000]).all()

        # parts that no one file can be
        sf.write(tmp_path / f"other_{name}", wave(1.0, 16000), 16000)
        path.write_bytes(path.read_bytes() + (tmp_path / f"other_{name}").read_bytes())
        with pytest.raises(BadInput, match=f"{name}: joined of parts with different sample rates"):
            load_audio(path, RATE)


def test_a_wav_whose_header_is_wrong_about_its_length_is_not_whole(tmp_path):
    """Fault: `check` called them good."""
    path = tmp_path / "a.wav"
    sf.write(path, wave(2.0, RATE), RATE)
    data = path.read_bytes()
    size = data.index(b"data") + 4

    path.write_bytes(data[:len(data) // 2])
    with pytest.raises(BadInput, match="a.wav: is not whole, 1.00 of 2.00 s are there"):
        inspect(path)
    path.write_bytes(data[:size] + struct.pack("<I", 2 * RATE) + data[size + 4:])
    with pytest.raises(BadInput, match="a.wav: is not whole, behind its 1.00 s is more sound"):
        inspect(path)
    path.write_bytes(data + b"LIST\x04\0\0\0abcd")
    assert inspect(path) == (2.0, [])


@needs_ffmpeg
def test_a_wav_of_a_recorder_that_was_stopped_is_read(tmp_path):
    """Fault: with a size of 0 in the header it was "damaged; remove it"."""
    path = tmp_path / "a.wav"
    sf.write(path, wave(2.0, RATE), RATE)
    whole = load_audio(path, RATE)
    data = path.read_bytes()
    size = data.index(b"data") + 4
    path.write_bytes(data[:size] + bytes(4) + data[size + 4:])
    assert inspect(path) == (2.0, []) and (load_audio(path, RATE) == whole).all()


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
    _, sound, frames = mp3(tmp_path / "bare.mp3")
    (tmp_path / "bare.mp3").write_bytes(sound)
    write_manifest(tmp_path / "m.jsonl", [Clip(str(tmp_path / name), duration=5.0)
                                          for name in ("good.wav", "half.wav", "bare.mp3")])
    with pytest.raises(BadInput, match="1 bad clips"):
        scan.main(["check", str(tmp_path / "m.jsonl")])
    scan.main(["check", str(tmp_path / "m.jsonl"), "--out", str(tmp_path / "clean.jsonl")])
    out = capsys.readouterr()
    assert "half.wav: is not whole, 1.00 of 2.00 s are there" in out.out + out.err
    assert "good.wav: lasts 2.00 s, the manifest says 5.00" in out.out + out.err
    assert [clip.duration for clip in load_manifest(tmp_path / "clean.jsonl")] == [
        2.0, 1152 * frames / MP3_RATE]


@pytest.mark.parametrize("rate", [RATE, 11025, 44100])
def test_pieces_joined_equal_the_whole(tmp_path, rate, monkeypatch):
    monkeypatch.setattr(decoder, "BLOCK", 5000)
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
