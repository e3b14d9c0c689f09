"""latents.py: the cache on disk and the rows that are read from it."""
import dataclasses
import json
import os
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import latents
import shards
from audio import load_audio
from cli import BadInput
from clips import RATE, corpus, decode_text, same, tone
from data import PAD, AudioBatches, Clip, DataConfig
from latents import LatentBatches, LatentCache
from monologue import word_stream
from stages import LMStage
from vae import VAE, VAEConfig

HOP = 400
D = 3


def encode(audio):
    """Stands in for the VAE: rms, mean and peak of each frame, and a log-variance of -2."""
    x = audio.mean(1).unflatten(-1, (-1, HOP))                              # (B, T, HOP)
    mean = torch.stack([x.square().mean(-1).sqrt(), x.mean(-1), x.amax(-1)], -1)
    return torch.cat([mean, torch.full_like(mean, -2.0)], -1)


def build(clips, folder, fn=encode, batch_seconds=3.0):
    return LatentCache.build(clips, fn, folder=folder, key="k", sample_rate=RATE, channels=1,
                             hop=HOP, dim=D, batch_seconds=batch_seconds, shard_seconds=3.0,
                             show=False)


class Numbered:
    """A cache whose frames hold their own numbers: [clip + 1, frame, 0 | 0, 0, 0]."""

    def __init__(self, lengths):
        self.frames = np.array(lengths)
        self.dim = D
        self.levels = 0

    def __len__(self):
        return len(self.frames)

    def get(self, i):
        out = np.zeros((self.frames[i], 2 * D), np.float16)
        out[:, 0] = i + 1
        out[:, 1] = np.arange(self.frames[i])
        return out


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
    clips = corpus(tmp_path, 9)
    folder = tmp_path / "latents"
    calls = []

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
    part, = {json.loads(p.read_text())["names"] for p in (folder / "k").glob("shard_*.json")}
    saved = sum(len(s["clips"]) for s in shards.read_parts(folder / "k", part).values())
    assert done and 0 < saved < 9
    with pytest.raises(BadInput, match="unfinished"):
        LatentCache(folder / "k")

    calls.clear()
    cache = build(clips, folder, counts, batch_seconds=2.0)                 # may change meanwhile
    assert sum(calls) == 9 - saved
    assert all(p.stat().st_mtime_ns == t for p, t in done.items())
    fresh = build(clips, tmp_path / "fresh")
    assert all((cache.get(i) == fresh.get(i)).all() for i in range(9))

    calls.clear()
    build(clips, folder, counts)
    assert calls == []                                                      # nothing left to do
    build(clips[:8], folder, counts)
    assert sum(calls) == 8                                                  # other clips: afresh


def test_a_file_that_changed_is_encoded_again_though_its_size_is_the_same(tmp_path, capsys):
    """Fault: caches were keyed by path and size: another sound kept the latents of the old one."""
    clips = corpus(tmp_path, 3)
    before = build(clips, tmp_path / "latents").get(1).copy()
    tone(tmp_path / "speech1.wav", 0.3 + 1.7 / 3, hz=900)
    size = os.path.getsize(clips[1].audio)
    os.utime(clips[1].audio, ns=(1, 10 ** 18))
    cache = LatentCache.build(clips, encode, folder=tmp_path / "latents", key="k", hop=HOP, dim=D,
                              sample_rate=RATE, channels=1)
    assert os.path.getsize(clips[1].audio) == size and before.shape == cache.get(1).shape
    assert (cache.get(1) == build(clips, tmp_path / "fresh").get(1)).all()
    assert not (cache.get(1) == before).all()
    assert "audio files have changed" in capsys.readouterr().out


def tiny_vae(**config):
    small = {"latent_dim": D, "ratios": [5, 4, 4, 5], "stft_hop": 20, "width": 2, "width_max": 8,
             "dim": 16, "heads": 2, "context": 0.4}
    torch.manual_seed(0)
    return VAE(VAEConfig(sample_rate=RATE, **small | config)).eval()


@pytest.mark.parametrize("levels, config", [
    (0, {"encoder": "conv", "decoder": "conv"}),
    (0, {"inner": 2, "ratios": [5, 4, 2, 5], "stft_hop": 10}),
    (2, {"bottleneck": "rvq", "codebooks": 2})])
@torch.no_grad()
def test_a_long_clip_is_encoded_in_pieces_and_has_the_latents_of_the_whole(
        tmp_path, levels, config):
    """Fault: the whole clip went through the encoder at once: 9.3 GB for 20 minutes."""
    vae = tiny_vae(**config)
    clips = [Clip(tone(tmp_path / "long.wav", 5.33, rate=11025)), Clip(tone(tmp_path / "a.wav"))]
    longest = []

    def encode(audio, state=None):
        longest.append(audio.shape[-1])
        if levels:
            return vae.encode_codes(audio, state)
        return torch.cat(vae.encode(audio, state), -1)

    cache = LatentCache.build(clips, encode, folder=tmp_path / "latents", key="k", levels=levels,
                              sample_rate=RATE, channels=1, hop=HOP, dim=D, batch_seconds=1.0)
    assert max(longest) == RATE and len(longest) == 7
    whole = torch.from_numpy(load_audio(clips[0].audio, RATE))[None]
    direct = encode(whole)[0]
    assert cache.get(0).shape == direct.shape
    assert np.allclose(cache.get(0), direct, atol=2e-3)


def test_a_wrong_duration_in_the_manifest_does_not_make_a_long_clip_a_batch(tmp_path):
    """Fault: batches were planned by the manifest's durations: 1 s said, an hour read."""
    clips = corpus(tmp_path, 2)
    clips.append(Clip(tone(tmp_path / "long.wav", 5.0), duration=0.1))
    longest = []

    def counts(audio, state=None):
        longest.append(audio.shape[0] * audio.shape[-1])
        return encode(audio)

    cache = build(clips, tmp_path / "latents", counts, batch_seconds=1.0)
    assert cache.frames[2] == 100 and max(longest) <= 3 * RATE


@pytest.mark.parametrize("change", ["nothing", "vae", "precision", "weights", "levels"])
def test_a_cache_is_used_again_only_if_all_that_decides_its_latents_is_the_same(tmp_path, change):
    """Fault: the key left out [vae] and the precision."""
    clips = corpus(tmp_path, 2)
    vae = tiny_vae(bottleneck="rvq", codebooks=2)

    def key(cfg, weights, bf16=False, levels=0):
        runtime = SimpleNamespace(bf16=bf16, device="cpu", rank=0, world=1, wait=lambda: None,
                                  autocast=lambda: torch.autocast("cpu", torch.bfloat16, bf16))
        stage = SimpleNamespace(
            cfg=SimpleNamespace(out=str(tmp_path), vae=cfg, data=DataConfig()),
            runtime=runtime, code_levels=levels, vae=vae)
        return LMStage.cache_latents(stage, clips, weights).path.name

    weights = vae.state_dict()
    other = {"nothing": lambda: key(vae.cfg, weights),
             "vae": lambda: key(dataclasses.replace(vae.cfg, heads=4), weights),
             "precision": lambda: key(vae.cfg, weights, bf16=True),
             "weights": lambda: key(vae.cfg, {k: v + 1 for k, v in weights.items()}),
             "levels": lambda: key(vae.cfg, weights, levels=2)}[change]
    assert (key(vae.cfg, weights) == other()) == (change == "nothing")


def test_two_runs_share_the_caches_of_data_latents(tmp_path):
    clips = corpus(tmp_path, 2)
    vae = tiny_vae()
    paths = set()
    for out in ("one", "two"):
        runtime = SimpleNamespace(bf16=False, device="cpu", rank=0, world=1, wait=lambda: None,
                                  autocast=lambda: torch.autocast("cpu", enabled=False))
        cfg = SimpleNamespace(out=str(tmp_path / out), vae=vae.cfg,
                              data=DataConfig(latents=str(tmp_path / "shared")))
        stage = SimpleNamespace(cfg=cfg, runtime=runtime, code_levels=0, vae=vae)
        paths.add(LMStage.cache_latents(stage, clips, vae.state_dict()).path)
    [path] = paths
    assert path.parent == tmp_path / "shared" and not (tmp_path / "one").exists()


def test_latents_of_a_wrong_shape_or_not_finite_are_refused(tmp_path):
    clips = corpus(tmp_path, 2)
    with pytest.raises(ValueError, match="encode gave"):
        build(clips, tmp_path / "a", lambda x: encode(x)[:, :-1])
    with pytest.raises(ValueError, match="not finite"):
        build(clips, tmp_path / "b", lambda x: encode(x) * 1e9)


def test_a_digest_changes_with_what_it_names():
    base = {"w": torch.zeros(2, 3), "n": torch.tensor(1)}
    reordered = {"n": torch.tensor(1), "w": torch.zeros(2, 3)}
    names = [latents.digest(x) for x in (
        base, {**base, "w": torch.zeros(3, 2)}, {**base, "w": torch.zeros(2, 3).bfloat16()},
        DataConfig(), DataConfig(seed=1), "a", ["a"], ["a", None], 1, 1.0)]
    assert latents.digest(reordered) == names[0]
    assert len(set(names)) == len(names) and len(names[0]) == 16
    with pytest.raises(TypeError):
        latents.digest(object())


# ---------------------------------------------------------------------------- latent rows

def latent_rows(lengths, steps=40, batch=8, kinds=None, text="abc", speakers="ab", **config):
    clips = [Clip(f"/{i}.wav", text, kinds[i] if kinds else "speech",
                  speakers[i % len(speakers)].strip()) for i in range(len(lengths))]
    batches = LatentBatches(clips, Numbered(lengths), DataConfig(**config), batch, D)
    for step in range(steps):
        out = batches(step, range(batch))
        for r in range(batch):
            row = {k: v[r] for k, v in out.items() if torch.is_tensor(v)}
            row["clip"] = int(row["x"][0, 0]) - 1
            row["start"] = int(row["x"][0, 1])
            yield clips[row["clip"]], row


def test_rows_are_windows_of_their_clip_padded_with_zeros(tmp_path):
    starts = []
    lengths = [5, 20, 8, 30]
    for clip, row in latent_rows(lengths, frames=8, text_len=6):
        n = int(row["frames"])
        T = lengths[row["clip"]]
        assert n == min(8, T) and (row["x"][n:] == 0).all()
        assert (row["x"][:n, 1] == row["start"] + torch.arange(n)).all()
        assert bool(row["ended"]) == (row["start"] + n == T)
        assert row["text"].shape == (7,) and (row["text"][row["text_len"]:] == PAD).all()
        if T > n:
            starts.append(row["start"])
    assert 0.4 < np.mean(np.array(starts) == 0) < 0.6 and max(starts) == 22


@pytest.mark.parametrize("kind, text, rows", [
    ("music", "abc", "even"), ("sound", "", "even"), ("speech", "", "even"),
    ("speech", "abcdefg", "even"), ("speech", "abc", "half")])
def test_rows_of_a_long_clip_begin_anywhere_but_half_of_speech_with_text_at_its_beginning(
        kind, text, rows):
    """Fault: half of the rows of every long clip began at 0: of 200 s songs the first 30 s were
    seen 6.2 times as often as the middle."""
    starts = [row["start"] for _, row in latent_rows([208], steps=1000, kinds=[kind], text=text,
                                                     frames=8, text_len=6)]
    # 201 places; 20 bins of ten of them, 8,000 rows: 398 +- 19.5 each
    counts = np.bincount(starts, minlength=201)
    if rows == "half":
        assert abs(counts[0] - 4000) < 4 * 44.7
        bins = counts[1:].reshape(20, 10).sum(1)
        assert abs(bins - 200).max() < 4 * 14
    else:
        assert counts[0] < 40 + 4 * 6.3
        bins = counts[:200].reshape(20, 10).sum(1)
        assert abs(bins - 398).max() < 4 * 19.5

    always, never = ([row["start"] for _, row in latent_rows(
        [208], kinds=[kind], text=text, frames=8, text_len=6, beginning_prob=p)] for p in (1, 0))
    assert (max(always) == 0) == (rows == "half") and max(never) > 150


def test_speech_whose_end_is_never_seen_with_its_text_is_counted():
    """Fault: clips of speech longer than data.frames lost their ends in silence."""
    lengths = [*range(1, 101), 200, 200]
    kinds = ["speech"] * 101 + ["music"]
    clips = [Clip("a.wav", "abc", kind) for kind in kinds]
    batches = LatentBatches(clips, Numbered(lengths), DataConfig(frames=96), 4, D)
    assert batches.clips_cut().startswith("frames: 5 of 101 clips of speech with text are longer "
                                          "than data.frames = 96,")
    assert batches.clips_cut().endswith("100 holds 99 %")
    batches = LatentBatches(clips, Numbered(lengths), DataConfig(frames=200), 4, D)
    assert batches.clips_cut() is None


def test_speech_that_starts_late_has_no_text_but_captions_stay(tmp_path):
    kinds = ["speech", "sound", "music"]
    late = Counter()
    for clip, row in latent_rows([30, 30, 30], kinds=kinds, frames=8, text_len=6):
        text = decode_text(row["text"])
        assert row["text"][0] == PAD + 1 + kinds.index(clip.kind)
        assert int(row["kind"]) == kinds.index(clip.kind)
        assert text == ("" if clip.kind == "speech" and row["start"] else "abc")
        late[clip.kind, row["start"] > 0] += 1
    assert len(late) == 6


def test_a_long_transcript_is_dropped_and_a_long_caption_cut_at_a_character():
    for clip, row in latent_rows([4, 4], kinds=["speech", "sound"], text="abcäö", text_len=6):
        assert decode_text(row["text"]) == ("" if clip.kind == "speech" else "abcä")


def test_prompts_are_the_same_voice_and_never_the_rows_own_frames():
    lengths = [30, 12, 30, 3, 9, 7]
    seen = Counter()
    for clip, row in latent_rows(lengths, speakers="abc", steps=80, frames=8, prompt_frames=6,
                                 prompt_prob=0.75):
        n = int(row["prompt_len"])
        seen[n > 0] += 1
        assert (row["prompt"][n:] == 0).all()
        if n:
            other = int(row["prompt"][0, 0]) - 1
            assert 3 <= n <= 6 and other % 3 == row["clip"] % 3 and other != row["clip"]
    assert 0.7 < seen[True] / seen.total() < 0.8

    # without speakers: from the same clip, outside the row
    seen.clear()
    for clip, row in latent_rows([30, 8, 12], speakers=" ", steps=80, frames=8, prompt_frames=6,
                                 prompt_prob=1.0):
        n = int(row["prompt_len"])
        seen[row["clip"], n > 0] += 1
        if n:
            positions = row["prompt"][:n, 1]
            assert (row["prompt"][:n, 0] - 1 == row["clip"]).all()
            assert ((positions < row["start"]) | (positions >= row["start"] + 8)).all()
    assert seen[0, True] and not seen[0, False] and not seen[1, True]       # clip 1 is its row


def test_sounds_have_no_voice_prompt():
    for _, row in latent_rows([30, 30], kinds=["sound", "music"], frames=8, prompt_frames=6,
                              prompt_prob=1.0):
        assert row["prompt_len"] == 0


@pytest.mark.parametrize("which", ["audio", "latents"])
def test_batches_are_the_same_asked_twice_by_halves_or_by_four_processes(tmp_path, which):
    clips = corpus(tmp_path, 10) + corpus(tmp_path, 4, "music", longest=1.0)
    cfg = DataConfig(crop_seconds=0.4, gain_db=6, frames=8, prompt_frames=4,
                     weights={"speech": 0.5, "music": 0.5})

    def make():
        if which == "audio":
            return AudioBatches(clips, cfg, RATE, 1, batch=8)
        return LatentBatches(clips, Numbered(range(3, 17)), cfg, 8, D)

    one = make()
    four = [make() for _ in range(4)]
    for step in (0, 1, 5):
        whole = one(step, range(8))
        assert same(whole, one(step, range(8))) and same(whole, make()(step, range(8)))
        for parts in ([one(step, range(4)), one(step, range(4, 8))],
                      [p(step, range(2 * n, 2 * n + 2)) for n, p in enumerate(four)]):
            joined = {k: torch.cat([p[k] for p in parts]) if torch.is_tensor(whole[k]) else whole[k]
                      for k in whole}
            assert same(whole, joined)
    assert not same(one(0, range(8)), one(1, range(8)))


def test_rows_hold_the_bytes_beside_their_own_frames_and_fast_speech_is_reported():
    """Two bytes per frame; a row that starts later holds the words of its own part."""
    words = [["abc", 0.1 * i, 0.1 * i + 0.1] for i in range(8)]                # 40 bytes per second
    clips = [Clip(f"/{i}.wav", "abc " * 8, "speech", words=words) for i in range(4)]
    cfg = DataConfig(frames=6, kind_token=True)
    fast = LatentBatches(clips, Numbered([20] * 4), cfg, 4, D, frame_rate=10.0, monologue=2)
    assert fast.late_words.startswith("monologue: words fall up to 0.8 s behind the audio")

    whole = word_stream(words, 20, 10.0, 2)                                    # (20, 2)
    starts = set()
    for step in range(10):
        out = fast(step, range(4))
        assert out["words"].shape == (4, 6, 2) and out["aligned"].all()
        for x, row in zip(out["x"], out["words"]):
            start = int(x[0, 1])
            starts.add(start)
            assert row.tolist() == whole[start:start + 6].tolist()
    assert len(starts) > 5

    without = LatentBatches(clips, Numbered([20] * 4), cfg, 4, D)(0, range(4))
    assert without["words"].shape == (4, 6, 0) and not without["aligned"].any()
