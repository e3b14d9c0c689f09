"""data.py: each test's name is the property it checks. Clips are made with numpy in tmp_path."""
import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch

import cli
import data
import latents
from cli import BadInput
from corpora import scan as scan_module
from corpora.scan import scan
from data import (PAD, AudioBatches, Clip, DataConfig, LatentBatches, Order, Prefetch, decode_text,
                  encode_text, load_audio, load_clips, load_manifest, save_audio, word_stream,
                  write_manifest)
from latents import LatentCache
import schema

RATE, HOP, D = 8000, 400, 3


def tone(path, seconds=0.5, rate=RATE, hz=440.0, channels=1):
    """A sine, the second channel silent; makes parent folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    wav = np.zeros((int(seconds * rate), channels))
    wav[:, 0] = 0.5 * np.sin(2 * np.pi * hz * np.arange(len(wav)) / rate)
    sf.write(path, wav, rate)
    return str(path)


def corpus(folder, n=12, kind="speech", longest=2.0):
    """n clips of growing length, two speakers; the number of the clip is in its text and pitch."""
    return [Clip(tone(folder / f"{kind}{i}.wav", 0.3 + (longest - 0.3) * i / n, hz=200 + 50 * i),
                 f"text {i}", kind, speaker=f"voice{i % 2}" if kind == "speech" else "",
                 id=f"{kind}{i}") for i in range(n)]


def encode(audio):
    """Stands in for the VAE: rms, mean and peak of each frame, and a log-variance of -2."""
    x = audio.mean(1).unflatten(-1, (-1, HOP))                              # (B, T, HOP)
    mean = torch.stack([x.square().mean(-1).sqrt(), x.mean(-1), x.amax(-1)], -1)
    return torch.cat([mean, torch.full_like(mean, -2.0)], -1)


def build(clips, folder, fn=encode, **over):
    how = dict(folder=folder, key="k", sample_rate=RATE, channels=1, hop=HOP, dim=D,
               batch_seconds=3.0, shard_seconds=3.0, show=False)
    return LatentCache.build(clips, fn, **{**how, **over})


class Numbered:
    """A cache whose every frame says which clip and which frame it is: [clip, frame, 0 | ...]."""

    def __init__(self, lengths):
        self.frames, self.dim, self.levels = np.array(lengths), D, 0

    def __len__(self):
        return len(self.frames)

    def get(self, i):
        out = np.zeros((self.frames[i], 2 * D), np.float16)
        out[:, 0], out[:, 1] = i + 1, np.arange(self.frames[i])
        return out


# ---------------------------------------------------------------------------- audio

@pytest.mark.parametrize("rate", [8000, 11025, 44100])
def test_resampling_keeps_the_frequency_and_stereo_is_averaged(tmp_path, rate):
    wav = load_audio(tone(tmp_path / "a.wav", 1.0, rate, 440, channels=2), 16000)
    assert wav.shape == (1, 16000) and wav.dtype == np.float32
    assert np.argmax(np.abs(np.fft.rfft(wav[0]))) == 440
    assert abs(wav[:, 1000:-1000].max() - 0.25) < 0.01                      # (0.5 + 0) / 2
    two = load_audio(tone(tmp_path / "b.wav", 1.0, rate), 16000, channels=2)
    assert two.shape == (2, 16000) and (two[0] == two[1]).all()


def test_a_part_is_the_same_samples_as_the_whole(tmp_path):
    path = tone(tmp_path / "a.flac", 2.0)
    part = load_audio(path, RATE, start=0.5, seconds=0.25)
    assert part.shape == (1, 2000)
    assert (part == load_audio(path, RATE)[:, 4000:6000]).all()


@pytest.mark.parametrize("what", ["missing", "bytes", "text", "samples", "nan", "silent", "raw"])
def test_bad_audio_is_refused_in_one_line_that_names_the_file(tmp_path, what):
    path = tmp_path / ("bad.raw" if what == "raw" else "bad.wav")
    if what == "bytes":
        path.write_bytes(b"")
    elif what in ("text", "raw"):
        path.write_text("this is not audio\n" * 50)
    elif what != "missing":
        wav = {"samples": np.zeros(0), "nan": np.full(800, np.nan), "silent": np.zeros(800)}[what]
        sf.write(path, wav, RATE, subtype="FLOAT")
    with pytest.raises(BadInput) as e:
        load_audio(path, RATE)
    assert str(path) in str(e.value) and "\n" not in str(e.value)


def test_silence_is_read_when_asked_for(tmp_path):
    sf.write(tmp_path / "a.wav", np.zeros(800), RATE)
    assert load_audio(tmp_path / "a.wav", RATE, allow_silence=True).shape == (1, 800)


def test_saved_audio_reads_back_clipped_and_makes_its_folder(tmp_path):
    path = tmp_path / "new" / "a.wav"
    save_audio(path, torch.tensor([[0.0, 0.5, 2.0, -2.0]]), RATE)
    assert np.allclose(load_audio(path, RATE), [[0, 0.5, 1, -1]], atol=1e-4)
    assert [p.name for p in path.parent.iterdir()] == ["a.wav"]
    with pytest.raises(BadInput, match="only .wav"):
        save_audio(tmp_path / "a.mp3", np.zeros(9), RATE)
    with pytest.raises(ValueError, match="finite"):
        save_audio(path, np.full(9, np.nan), RATE)


# ---------------------------------------------------------------------------- manifests

def test_a_manifest_round_trips_and_its_paths_are_relative(tmp_path):
    clips = corpus(tmp_path / "wavs", 3)
    clips[1].words, clips[1].duration, clips[1].text = [["ünï", 0.1, 0.2]], 0.5, 'a "b" \u2028 c'
    outside = Clip(tone(tmp_path.parent / f"{tmp_path.name}-far.wav"), id="far", kind="music")
    write_manifest(tmp_path / "m.jsonl", [*clips, outside])
    assert load_manifest(tmp_path / "m.jsonl") == [*clips, outside]
    lines = [json.loads(line) for line in (tmp_path / "m.jsonl").open(encoding="utf-8")]
    assert lines[0]["audio"] == "wavs/speech0.wav" and lines[3]["audio"] == outside.audio


@pytest.mark.parametrize("line, says", [
    ("{nonsense", "not JSON"), ('["a.wav"]', "needs"), ('{"adio": "a.wav"}', "needs"),
    ('{"audio": "a.wav", "kind": "noise"}', "unknown kind 'noise'; use speech, sound, music"),
    ('{"audio": "a.wav", "text": 3}', "text must be a string"),
    ('{"audio": "a.wav", "duration": "long"}', "duration"),
    ('{"audio": "a.wav", "words": [["a", 0]]}', "words must be"),
    ('{"audio": "b.wav"}', "b.wav is missing (1 of 2 are)")])
def test_a_bad_manifest_line_is_named_by_file_and_number(tmp_path, line, says):
    tone(tmp_path / "a.wav")
    (tmp_path / "m.jsonl").write_text('{"audio": "a.wav", "text": null, "extra": 1}\n' + line)
    with pytest.raises(BadInput) as e:
        load_manifest(tmp_path / "m.jsonl")
    assert f"{tmp_path / 'm.jsonl'}, line 2" in str(e.value) and says in str(e.value)


def test_absent_and_empty_manifests_are_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    for path in (tmp_path / "none.jsonl", tmp_path / "empty.jsonl", tmp_path):
        with pytest.raises(BadInput, match=path.name):
            load_manifest(path)


def test_the_held_out_clips_are_split_off_and_no_clip_is_on_both_sides(tmp_path):
    corpus(tmp_path, 20)
    train, valid = load_clips(DataConfig(manifest=str(tmp_path)))
    assert len(train) == 12 and len(valid) == 8
    assert not {c.audio for c in train} & {c.audio for c in valid}
    assert (train, valid) == load_clips(DataConfig(manifest=str(tmp_path)))


def test_a_manifest_of_one_kind_trains_with_the_weights_of_three_but_not_without_its_own(tmp_path):
    """Bug: the README's folder of recordings was refused by the config that the README trains."""
    corpus(tmp_path, 20)
    weights = {"speech": 0.6, "sound": 0.1, "music": 0.3}
    train, _ = load_clips(DataConfig(manifest=str(tmp_path), weights=weights))
    assert len(train) == 12
    assert {train[Order([c.kind for c in train], weights).index(i)].kind
            for i in range(20)} == {"speech"}
    with pytest.raises(BadInput, match="asks for music, .* has only speech"):
        load_clips(DataConfig(manifest=str(tmp_path), weights={"music": 1.0, "speech": 0.0}))


def test_every_layout_is_scanned(tmp_path, capsys):
    def text(path, words):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(words, encoding="utf-8")

    def found(name, layout):
        return [(Path(c.audio).name, c.text, c.kind, c.speaker) for c in scan(name, layout)]

    a = tmp_path / "folder"
    tone(a / "x" / "one.flac"), text(a / "x" / "one.txt", " hello\nyou "), tone(a / "two.WAV")
    assert found(a, "folder") == [("two.WAV", "", "speech", ""),
                                  ("one.flac", "hello you", "speech", "")]
    a = tmp_path / "lj"
    tone(a / "wavs" / "LJ1.wav")
    text(a / "metadata.csv", 'LJ1|In 5 "days|In five "days\nLJ2|gone|gone\n')
    assert found(a, "ljspeech") == [("LJ1.wav", 'In five "days', "speech", "lj")]
    assert "1 texts have no audio" in capsys.readouterr().err
    a = tmp_path / "libri"
    tone(a / "84" / "121" / "84_121_0_0.wav")
    text(a / "84" / "121" / "84_121_0_0.normalized.txt", "A word.")
    assert found(a, "libritts") == [("84_121_0_0.wav", "A word.", "speech", "84")]
    a = tmp_path / "vctk"
    for n in "12":
        tone(a / "wav48_silence_trimmed" / "p225" / f"p225_001_mic{n}.flac")
    text(a / "txt" / "p225" / "p225_001.txt", "Please.\n")
    assert found(a, "vctk") == [("p225_001_mic1.flac", "Please.", "speech", "p225")]
    a = tmp_path / "caps"
    tone(a / "audio" / "Yabc.wav"), tone(a / "audio" / "77.wav")
    text(a / "train.csv", "audiocap_id,youtube_id,start_time,caption\n"
         '1,abc,30,"Rain, then wind"\n77,zzz,0,A dog\n78,gone,0,A cat\n')
    assert found(a, "audiocaps") == [("Yabc.wav", "Rain, then wind", "sound", ""),
                                     ("77.wav", "A dog", "sound", "")]
    text(a / "test.csv", "audiocap_id,youtube_id,start_time,caption\n77,zzz,0,A dog\n")
    with pytest.raises(BadInput, match="splits stay apart"):
        scan(a, "audiocaps")
    assert len(scan(a / "test.csv", "audiocaps")) == 1
    for layout in scan_module.LAYOUTS:
        (tmp_path / "nothing").mkdir(exist_ok=True)
        with pytest.raises(BadInput, match="nothing"):
            scan(tmp_path / "nothing", layout)


def test_the_command_line_scans_checks_and_describes_a_corpus(tmp_path, capsys):
    def run(*args):
        code = 0
        try:
            cli.cli(lambda: scan_module.main([str(a) for a in args]))
        except SystemExit as e:
            code = e.code
        return code, *capsys.readouterr()

    corpus(tmp_path / "c", 3)
    sf.write(tmp_path / "c" / "silent.wav", np.zeros(800), RATE)
    manifest, clean = tmp_path / "m.jsonl", tmp_path / "clean.jsonl"
    assert run("scan", tmp_path / "c", "--out", manifest)[:2] == (0, f"4 clips -> {manifest}\n")
    code, out, err = run("check", manifest)
    assert code == 2 and "silent.wav: silent" in out + err and "Traceback" not in err
    assert err.splitlines()[-1].startswith("error: ")
    assert run("check", manifest, "--out", clean)[0] == 0
    assert [c.duration for c in load_manifest(clean)][0] == 0.3
    code, out, _ = run("info", clean)
    assert code == 0 and "speech        3" in out


# ---------------------------------------------------------------------------- descriptions

def clip(kind="speech", text="hello there", **more):
    return Clip(**{"audio": "x.wav", "text": text, "kind": kind, "duration": 0.8, "id": "a",
                   **more})


def test_a_description_keeps_every_word_of_its_text_and_depends_on_seed_and_id_only():
    for kind in data.KINDS:
        found = {scan_module.describe(clip(kind, id=str(i))) for i in range(40)}
        assert len(found) >= 5 and all("hello there" in t.lower() for t in found)
        assert [scan_module.describe(clip(kind), s) for s in range(9)] == [
            scan_module.describe(clip(kind), s) for s in range(9)]
        assert len({scan_module.describe(clip(kind), s) for s in range(40)}) >= 5
    assert scan_module.describe(clip(text="")) == ""


def test_speech_says_who_and_how_fast_and_quotes_word_for_word():
    said = lambda **more: {scan_module.describe(clip(id=str(i), **more)) for i in range(30)}
    assert all("speaker anna" in t.lower() and '"hello there"' in t for t in said(speaker="anna"))
    slow = lambda t: "slow" in t
    fast = lambda t: "quickly" in t or "fast" in t
    assert all(map(slow, said(duration=2.0))) and all(map(fast, said(duration=0.4)))
    assert not any(slow(t) or fast(t) for t in said(duration=0.8))


def test_a_manifest_is_described_and_another_tools_sentences_come_first(tmp_path, capsys):
    corpus(tmp_path / "c", 3)
    manifest, out, other = (tmp_path / n for n in ("m.jsonl", "d.jsonl", "r.jsonl"))
    scan_module.main(["scan", str(tmp_path / "c"), "--out", str(manifest)])
    clips = load_manifest(manifest)
    data.write_manifest(manifest, [replace(c, text=f"word {i}") for i, c in enumerate(clips)])
    other.write_text(json.dumps({"id": clips[1].id, "text": "a new sentence"}) + "\n")
    scan_module.main(["describe", str(manifest), "--out", str(out), "--rewritten", str(other)])
    found = [c.text for c in load_manifest(out)]
    assert '"word 0"' in found[0] and found[1] == "a new sentence" and '"word 2"' in found[2]
    assert [c.transcript for c in load_manifest(out)] == ["word 0", "word 1", "word 2"]   # for judges
    other.write_text("{}\n")
    with pytest.raises(BadInput, match="line 1: needs"):
        scan_module.main(["describe", str(manifest), "--out", str(out), "--rewritten", str(other)])


# ---------------------------------------------------------------------------- text, config, digest

def test_the_tokenizer_round_trips_unicode_and_normalises_space():
    for kind, special in zip(data.KINDS, (data.SPEECH, data.SOUND, data.MUSIC)):
        ids = encode_text("  Grüße,\n 日本 \t🎵 ", kind)
        assert ids[0] == special and max(ids) < data.vocabulary()
        assert decode_text(torch.tensor(ids + [PAD, PAD])) == "Grüße, 日本 🎵"
    assert decode_text(encode_text("ﬁne e\u0301", "speech")) == "fine é"


@pytest.mark.parametrize("name, value", [
    ("frames", 0), ("prompt_prob", 2), ("weights", {"noise": 1}), ("weights", {"speech": 0.0}),
    ("crop_seconds", 0), ("seed", -1), ("gain_db", -3)])
def test_an_impossible_setting_is_refused_by_name(name, value):
    with pytest.raises(BadInput, match=f"^data.{name}: "):
        schema.build(DataConfig, {name: value}, "data")


def test_a_digest_changes_with_what_it_names():
    base = {"w": torch.zeros(2, 3), "n": torch.tensor(1)}
    same = {"n": torch.tensor(1), "w": torch.zeros(2, 3)}
    names = [latents.digest(x) for x in (
        base, {**base, "w": torch.zeros(3, 2)}, {**base, "w": torch.zeros(2, 3).bfloat16()},
        DataConfig(), DataConfig(seed=1), "a", ["a"], ["a", None], 1, 1.0)]
    assert latents.digest(same) == names[0] and len(set(names)) == len(names) and len(names[0]) == 16
    with pytest.raises(TypeError):
        latents.digest(object())


# ---------------------------------------------------------------------------- order

def test_without_weights_every_epoch_is_another_permutation():
    order = Order(10, {}, seed=3)
    epochs = [[order.index(e * 10 + i) for i in range(10)] for e in range(3)]
    assert all(sorted(e) == list(range(10)) for e in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [Order(10, {}, seed=3).index(25)] == [epochs[2][5]]              # no history needed
    assert epochs[0] != [Order(10, {}, seed=4).index(i) for i in range(10)]


def test_weights_set_the_shares_of_every_batch_and_each_kind_is_walked_in_cycles():
    kinds = ["speech"] * 70 + ["sound"] * 25 + ["music"] * 5
    order = Order(kinds, {"speech": 0.5, "sound": 0.25, "music": 0.25}, seed=0)
    rows = [order.index(r) for r in range(2000)]
    for b in range(0, 2000, 40):
        count = Counter(kinds[i] for i in rows[b:b + 40])
        assert abs(count["speech"] - 20) <= 2 and abs(count["music"] - 10) <= 2
    seen = Counter(rows)
    for k in ("speech", "sound", "music"):
        times = [seen[i] for i in range(100) if kinds[i] == k]
        assert max(times) - min(times) <= 2
    only = Order(kinds, {"music": 1.0}, seed=0)
    assert {kinds[only.index(r)] for r in range(50)} == {"music"}
    with pytest.raises(ValueError, match="no share"):
        Order(["speech"], {"music": 1.0})


# ---------------------------------------------------------------------------- batches

def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("which", ["audio", "latents"])
def test_batches_are_the_same_asked_twice_by_halves_or_by_four_processes(tmp_path, which):
    clips = corpus(tmp_path, 10) + corpus(tmp_path, 4, "music", longest=1.0)
    cfg = DataConfig(crop_seconds=0.4, gain_db=6, frames=8, prompt_frames=4,
                     weights={"speech": 0.5, "music": 0.5})

    def make():
        if which == "audio":
            return AudioBatches(clips, cfg, RATE, 1, batch=8)
        return LatentBatches(clips, Numbered(range(3, 17)), cfg, 8, D)

    one, four = make(), [make() for _ in range(4)]
    for step in (0, 1, 5):
        whole = one(step)
        assert same(whole, one(step)) and same(whole, make()(step, range(8)))
        for parts in ([one(step, slice(0, 4)), one(step, slice(4, None))],
                      [p(step, range(2 * n, 2 * n + 2)) for n, p in enumerate(four)]):
            assert same(whole, {k: torch.cat([p[k] for p in parts]) for k in whole})
    assert not same(one(0), one(1))


def test_crops_come_from_their_clip_with_gain_and_are_padded_at_the_end(tmp_path):
    short = Clip(tone(tmp_path / "short.wav", 0.25))
    x = AudioBatches([short], DataConfig(crop_seconds=0.5), RATE, 2, 3, hop=300)(0)["audio"]
    assert x.shape == (3, 2, 4200) and x.dtype == torch.float32             # 4000 up to 14 * 300
    assert np.allclose(x[0, 0, :2000], load_audio(short.audio, RATE)[0], atol=1e-4)
    assert (x[..., 2000:] == 0).all()
    x = AudioBatches([short], DataConfig(crop_seconds=0.25, gain_db=20), RATE, 1, 64)(0)["audio"]
    peaks = x.abs().amax((1, 2))
    assert 0.05 <= peaks.min() < 0.1 and 0.99 < peaks.max() <= 1.0001       # held back at 1


def test_memory_does_not_change_the_crops_and_long_files_are_read_in_part(tmp_path, monkeypatch):
    clips = corpus(tmp_path, 6)
    few, many = (AudioBatches(clips, DataConfig(crop_seconds=0.2, ram_gb=gb), RATE, 1, 16)
                 for gb in (0, 1))
    assert same(few(0), many(0)) and same(few(1), many(1)) and same(few(0), many(0))
    assert not few.kept and many.kept
    monkeypatch.setattr(data, "LONG", 0.1)
    part = AudioBatches(clips, DataConfig(crop_seconds=0.2), RATE, 1, 16)
    assert part(0)["audio"].shape == (16, 1, 1600) and not part.kept
    assert (part(0)["audio"].abs().amax((1, 2)) > 0.4).all()


# ---------------------------------------------------------------------------- latent cache

def test_the_cache_is_memory_mapped_and_equals_the_direct_encode(tmp_path):
    clips = corpus(tmp_path, 7)
    cache = build(clips, tmp_path / "latents")
    assert len(list((tmp_path / "latents" / "k").glob("shard_*.npy"))) > 1
    for i, c in enumerate(clips):
        wav = load_audio(c.audio, RATE)
        wav = np.pad(wav, ((0, 0), (0, -wav.shape[1] % HOP)))
        direct = encode(torch.from_numpy(wav)[None])[0]
        got = cache.get(i)
        assert isinstance(got, np.memmap) and got.dtype == np.float16
        assert got.shape == direct.shape and cache.frames[i] == len(direct)
        assert np.allclose(got, direct, atol=1e-3)
    assert not list((tmp_path / "latents" / "k").glob("*.tmp"))


def test_an_interrupted_cache_goes_on_without_encoding_finished_shards_again(tmp_path):
    clips, calls, folder = corpus(tmp_path, 9), [], tmp_path / "latents"

    def stops(audio):
        if len(calls) == 4:
            raise KeyboardInterrupt
        calls.append(len(audio))
        return encode(audio)

    def counts(audio):
        calls.append(len(audio))
        return encode(audio)

    with pytest.raises(KeyboardInterrupt):
        build(clips, folder, stops)
    done = {p: p.stat().st_mtime_ns for p in (folder / "k").glob("shard_*.npy")}
    held = sum(len(s["clips"]) for s in latents.read_index(folder / "k")["shards"])
    assert done and 0 < held < 9
    with pytest.raises(BadInput, match="unfinished"):
        LatentCache(folder / "k")
    calls.clear()
    cache = build(clips, folder, counts, batch_seconds=2.0)                 # may change meanwhile
    assert sum(calls) == 9 - held
    assert all(p.stat().st_mtime_ns == t for p, t in done.items())
    fresh = build(clips, tmp_path / "fresh")
    assert all((cache.get(i) == fresh.get(i)).all() for i in range(9))
    calls.clear()
    build(clips, folder, counts)
    assert calls == []                                                      # nothing left to do
    build(clips[:8], folder, counts)
    assert sum(calls) == 8                                                  # other clips: afresh


def test_latents_of_a_wrong_shape_or_not_finite_are_refused(tmp_path):
    clips = corpus(tmp_path, 2)
    with pytest.raises(ValueError, match="encode gave"):
        build(clips, tmp_path / "a", lambda x: encode(x)[:, :-1])
    with pytest.raises(ValueError, match="not finite"):
        build(clips, tmp_path / "b", lambda x: encode(x) * 1e9)


# ---------------------------------------------------------------------------- latent rows

def latent_rows(lengths, steps=40, batch=8, kinds=None, text="abc", speakers="ab", **config):
    clips = [Clip(f"/{i}.wav", text, kinds[i] if kinds else "speech",
                  speakers[i % len(speakers)].strip()) for i in range(len(lengths))]
    batches = LatentBatches(clips, Numbered(lengths), DataConfig(**config), batch, D)
    for step in range(steps):
        out = batches(step)
        for r in range(batch):
            row = {k: v[r] for k, v in out.items()}
            row["clip"], row["start"] = int(row["x"][0, 0]) - 1, int(row["x"][0, 1])
            yield clips[row["clip"]], row


def test_rows_are_windows_of_their_clip_padded_with_zeros(tmp_path):
    starts, lengths = [], [5, 20, 8, 30]
    for clip, row in latent_rows(lengths, frames=8, text_len=6):
        n, T = int(row["frames"]), lengths[row["clip"]]
        assert n == min(8, T) and (row["x"][n:] == 0).all()
        assert (row["x"][:n, 1] == row["start"] + torch.arange(n)).all()
        assert bool(row["ended"]) == (row["start"] + n == T)
        assert row["text"].shape == (7,) and (row["text"][row["text_len"]:] == PAD).all()
        if T > n:
            starts.append(row["start"])
    assert 0.4 < np.mean(np.array(starts) == 0) < 0.6 and max(starts) == 22


def test_speech_that_starts_late_has_no_text_but_captions_stay(tmp_path):
    kinds, late = ["speech", "sound", "music"], Counter()
    for clip, row in latent_rows([30, 30, 30], kinds=kinds, frames=8, text_len=6):
        says = decode_text(row["text"])
        assert row["text"][0] == data.SPEECH + kinds.index(clip.kind)
        assert int(row["kind"]) == kinds.index(clip.kind)
        assert says == ("" if clip.kind == "speech" and row["start"] else "abc")
        late[clip.kind, row["start"] > 0] += 1
    assert len(late) == 6


def test_a_long_transcript_is_dropped_and_a_long_caption_cut_at_a_character():
    for clip, row in latent_rows([4, 4], kinds=["speech", "sound"], text="abcäö", text_len=6):
        assert decode_text(row["text"]) == ("" if clip.kind == "speech" else "abcä")


def test_prompts_are_the_same_voice_and_never_the_rows_own_frames():
    lengths, seen = [30, 12, 30, 3, 9, 7], Counter()
    for clip, row in latent_rows(lengths, speakers="abc", steps=80, frames=8, prompt_frames=6,
                                 prompt_prob=0.75):
        n = int(row["prompt_len"])
        seen[n > 0] += 1
        assert (row["prompt"][n:] == 0).all()
        if n:
            other = int(row["prompt"][0, 0]) - 1
            assert 3 <= n <= 6 and other % 3 == row["clip"] % 3 and other != row["clip"]
    assert 0.7 < seen[True] / seen.total() < 0.8
    seen.clear()
    for clip, row in latent_rows([30, 8, 12], speakers=" ", steps=80, frames=8, prompt_frames=6,
                                 prompt_prob=1.0):                          # nobody is known
        n = int(row["prompt_len"])
        seen[row["clip"], n > 0] += 1
        if n:
            at = row["prompt"][:n, 1]
            assert (row["prompt"][:n, 0] - 1 == row["clip"]).all()
            assert ((at < row["start"]) | (at >= row["start"] + 8)).all()
    assert seen[0, True] and not seen[0, False] and not seen[1, True]       # clip 1: all in its row


def test_sounds_have_no_voice_prompt():
    for _, row in latent_rows([30, 30], kinds=["sound", "music"], frames=8, prompt_frames=6,
                              prompt_prob=1.0):
        assert row["prompt_len"] == 0


# ---------------------------------------------------------------------------- prefetch

def test_prefetch_yields_in_order_raises_what_its_function_raises_and_stops():
    def fn(step):
        if step == 7:
            raise BadInput("seven")
        return step * 10

    ahead = Prefetch(fn, 3, ahead=2)
    assert [next(ahead) for _ in range(4)] == [30, 40, 50, 60]
    with pytest.raises(BadInput, match="seven"):
        next(ahead)
    ahead.close()
    ahead.close()
    assert list(ahead) == []
    assert list(Prefetch(fn, 0, ahead=3, stop=5)) == [0, 10, 20, 30, 40]


def test_a_mistake_of_the_user_is_one_line_and_exit_two(capsys):
    def main():
        raise BadInput("a.wav: is\n bad")
    with pytest.raises(SystemExit) as e:
        cli.cli(main)
    assert e.value.code == 2 and capsys.readouterr().err == "error: a.wav: is bad\n"


def test_words_stand_at_the_frame_where_they_begin_or_behind_the_word_before():
    words = [["ab", 0.2, 0.3], ["c", 0.3, 0.4], ["de", 1.0, 1.2]]
    stream = word_stream(words, 15, 10.0).tolist()
    assert stream == [PAD, PAD, ord("a"), ord("b"), 32, ord("c"), 32, PAD, PAD, PAD,
                      ord("d"), ord("e"), 32, 10, PAD]          # 10: the last word is over
    assert word_stream(words, 11, 10.0).tolist() == stream[:11]
    assert word_stream(words, 4, 10.0).tolist() == stream[:4]
