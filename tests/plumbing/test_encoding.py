"""encoding.py, shards.py, remote.py: one corpus, several processes, caches that lie elsewhere."""
import os
import socket
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

import encoding
import latents
import signals
from cli import BadInput
from clips import RATE, corpus, same, tone
from data import AudioBatches, Clip, DataConfig, load_manifest, write_manifest
from latents import LatentBatches, LatentCache
from manifest import columns
from train import Runtime

HOP = 400
D = 3


def encode(audio, state=None):
    """Stands in for the VAE: rms, mean and peak of each frame, and a log-variance of -2."""
    x = audio.mean(1).unflatten(-1, (-1, HOP))                              # (B, T, HOP)
    mean = torch.stack([x.square().mean(-1).sqrt(), x.mean(-1), x.amax(-1)], -1)
    return torch.cat([mean, torch.full_like(mean, -2.0)], -1)


def build(clips, folder, fn=encode, **how):
    how = {"batch_seconds": 2.0, "shard_seconds": 1.5} | how
    return LatentCache.build(clips, fn, folder=folder, key="k", sample_rate=RATE, channels=1,
                             hop=HOP, dim=D, show=False, **how)


def together(world, clips, folder, fn=lambda rank, audio: encode(audio), **how):
    """build by `world` threads that wait for each other -> what each raised, or None."""
    barrier = threading.Barrier(world)
    ends = [None] * world

    def one(rank):
        try:
            build(clips, folder, lambda audio, state=None: fn(rank, audio), rank=rank, world=world,
                  wait=lambda: barrier.wait(30), **how)
        except BaseException as e:
            ends[rank] = e
            barrier.abort()

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ends


def contents(folder):
    """{name: bytes} of a cache."""
    return {path.name: path.read_bytes() for path in (folder / "k").iterdir()}


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Ten clips, of which the last is longer than a batch."""
    folder = tmp_path_factory.mktemp("corpus")
    return [*corpus(folder, 9), Clip(tone(folder / "long.wav", 3.3))]


@pytest.fixture(scope="module")
def alone(clips, tmp_path_factory):
    """The folder of the cache that one process makes."""
    folder = tmp_path_factory.mktemp("alone")
    build(clips, folder)
    return folder


# ---------------------------------------------------------------------------- several processes

@pytest.mark.parametrize("world", [2, 3, 20])
def test_several_processes_write_the_bytes_that_one_writes(clips, alone, tmp_path, world):
    """With 20 most have no shard at all."""
    rows = [0] * world

    def count(rank, audio):
        rows[rank] += len(audio)
        return encode(audio)

    assert together(world, clips, tmp_path, count) == [None] * world
    assert contents(tmp_path) == contents(alone)
    assert len(contents(alone)) > 4 and sum(rows) == 9 + 2
    assert min(rows[:2]) > 0


def test_the_seconds_of_all_processes_add_up_to_the_corpus(clips, tmp_path, monkeypatch):
    # read when both have encoded everything, before the files are removed
    sums = []
    real = encoding.remove_parts
    monkeypatch.setattr(encoding, "remove_parts", lambda path: (
        sums.append(encoding.progress(path, 2)), real(path)))
    assert together(2, clips, tmp_path) == [None, None]
    total = columns(clips).seconds().sum()
    # told in milliseconds
    assert abs(sums[0] - total) < 2e-3 and len(sums) == 1


@pytest.mark.parametrize("world", [1, 2, 3])
def test_shards_of_a_run_that_was_stopped_anywhere_are_kept_by_any_number_of_processes(
        clips, alone, tmp_path, world):
    calls = []

    def stops(rank, audio):
        if rank == 1:
            raise KeyboardInterrupt
        calls.append(len(audio))
        return encode(audio)

    first = together(2, clips, tmp_path, stops)
    assert isinstance(first[1], KeyboardInterrupt)
    kept = sorted((tmp_path / "k").glob("shard_*.npy"))
    assert kept and all(int(path.stem[-5:]) % 2 == 0 for path in kept)
    with pytest.raises(BadInput, match="unfinished"):
        LatentCache(tmp_path / "k")

    made = {path: path.stat().st_mtime_ns for path in kept}
    assert together(world, clips, tmp_path) == [None] * world
    assert all(path.stat().st_mtime_ns == time for path, time in made.items())
    assert contents(tmp_path) == contents(alone)


def test_with_other_batches_the_shards_up_to_the_first_gap_are_kept(clips, alone, tmp_path):
    """Shards 0, 2, 4 are there; only 0 stands where a shard of the new plan need not."""
    def stops(rank, audio):
        if rank == 1:
            raise KeyboardInterrupt
        return encode(audio)

    together(2, clips, tmp_path, stops)
    before = contents(tmp_path)
    cache = build(clips, tmp_path, batch_seconds=4.0)
    expected = LatentCache(alone / "k")
    assert all(np.array_equal(cache.get(i), expected.get(i)) for i in range(9))
    assert contents(tmp_path)["shard_00000.npy"] == before["shard_00000.npy"]


def test_a_damaged_shard_is_made_again_by_the_process_whose_number_it_has(clips, alone, tmp_path):
    assert together(2, clips, tmp_path) == [None, None]
    file = tmp_path / "k" / "shard_00001.npy"
    file.write_bytes(file.read_bytes()[:-3])
    rows = [0, 0]

    def count(rank, audio):
        rows[rank] += len(audio)
        return encode(audio)

    assert together(2, clips, tmp_path, count) == [None, None]
    assert rows[0] == 0 and rows[1] > 0 and contents(tmp_path) == contents(alone)


def process(rank, port, clips, folder, dies):
    """A fork that encodes with gloo's wait, as train.py does -> never. dies: at its second call."""
    calls = []

    def fn(audio, state=None):
        calls.append(1)
        if dies and len(calls) == 2:
            os._exit(9)
        return encode(audio)

    status = 1
    try:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        dist.init_process_group("gloo", rank=rank, world_size=2)
        signals.asked = lambda: False
        runtime = SimpleNamespace(world=2)
        build(clips, folder, fn, rank=rank, world=2, wait=lambda: Runtime.wait(runtime))
        status = 0
    except SystemExit as e:
        status = 3 if "another process" in str(e) else 4
    os._exit(status)


def processes(clips, folder, who_dies=None):
    """Two forks -> their exit statuses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = []
    for rank in range(2):
        pid = os.fork()
        if pid == 0:
            process(rank, port, clips, folder, rank == who_dies)
        pids.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


@pytest.mark.parametrize("who", [0, 1])
def test_where_one_process_is_killed_the_other_ends_and_the_next_start_goes_on(
        clips, alone, tmp_path, who):
    ends = processes(clips, tmp_path, who_dies=who)
    assert ends[who] == 9 and ends[1 - who] == 3
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "k").glob("shard_*.npy")}
    assert len(kept) > 1 and not (tmp_path / "k" / "index.json").exists()
    assert processes(clips, tmp_path) == [0, 0]
    assert contents(tmp_path) == contents(alone)
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())


# ---------------------------------------------------------------------------- plan, index

def test_batches_hold_what_fits_longest_first_and_shards_have_their_size():
    g = np.random.default_rng(0)
    seconds = np.round(g.uniform(0.5, 80, 2000), 2)
    plan = encoding.Plan(seconds, np.arange(2000), 60.0, 600.0)
    shards = [plan.shard(k) for k in range(len(plan))]
    clips = np.concatenate([batch.clips for shard in shards for batch in shard])
    assert sorted(clips) == [*range(2000)]
    assert (np.diff(seconds[clips]) <= 0).all()
    for shard in shards:
        *others, last = [batch.seconds for batch in shard]
        assert sum(others) < 600 and (sum(others) + last >= 600 or shard is shards[-1])
        for batch in shard:
            assert len(batch.clips) == 1 or len(batch.clips) * batch.longest <= 60 + 1e-6
    assert [plan.clips(k).tolist() for k in range(len(plan))] == [
        [i for batch in shard for i in batch.clips] for shard in shards]


def test_at_most_so_many_shards_are_open(tmp_path, monkeypatch):
    """Fault: every shard stayed open; 100,000 hours would need more maps than Linux gives."""
    monkeypatch.setattr(latents, "OPEN_SHARDS", 3)
    clips = corpus(tmp_path, 12)
    cache = build(clips, tmp_path / "latents", shard_seconds=0.1)
    folder = str(cache.path)

    def open_now():
        with open("/proc/self/maps") as maps:
            return sum(folder in line for line in maps)

    assert len(cache.rows) == 9 and open_now() == 0
    read = []
    for i in range(12):
        read.append(np.array(cache.get(i)))
        assert open_now() <= 3
    assert open_now() == 3
    other = build(clips, tmp_path / "other")
    assert all(np.array_equal(x, other.get(i)) for i, x in enumerate(read))


def test_a_shard_that_lacks_bytes_is_refused_when_the_cache_is_opened(clips, tmp_path):
    build(clips, tmp_path)
    file = tmp_path / "k" / "shard_00001.npy"
    file.write_bytes(file.read_bytes()[:-900])
    with pytest.raises(BadInput, match="shard_00001.npy: damaged .its size is"):
        LatentCache(tmp_path / "k")
    file.unlink()
    with pytest.raises(BadInput, match="shard_00001.npy: damaged .it is missing"):
        LatentCache(tmp_path / "k")


# ---------------------------------------------------------------------------- elsewhere

@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """put(address, bytes) into fsspec's memory; copies lie in tmp_path/copies."""
    fsspec = pytest.importorskip("fsspec")
    monkeypatch.setenv("NANOCALM_CACHE", str(tmp_path / "copies"))

    def put(address, content):
        with fsspec.open(address, "wb") as out:
            out.write(content)
    return put


def test_manifest_audio_and_latents_at_an_address_give_the_batches_of_local_files(
        tmp_path, bucket):
    clips = corpus(tmp_path / "wavs", 4)
    write_manifest(tmp_path / "m.jsonl", clips)
    bucket("memory://b/m.jsonl", (tmp_path / "m.jsonl").read_bytes())
    for clip in clips:
        with open(clip.audio, "rb") as audio:
            bucket(f"memory://b/wavs/{os.path.basename(clip.audio)}", audio.read())
    cache = build(clips, tmp_path / "latents")
    for path in cache.path.iterdir():
        bucket(f"memory://b/k/{path.name}", path.read_bytes())

    there = load_manifest("memory://b/m.jsonl")
    assert [clip.audio for clip in there] == [f"memory://b/wavs/speech{i}.wav" for i in range(4)]
    cfg = DataConfig(crop_seconds=0.2, frames=8, prompt_frames=4)
    assert same(AudioBatches(there, cfg, RATE, 1, 8)(0, range(8)),
                AudioBatches(clips, cfg, RATE, 1, 8)(0, range(8)))
    assert same(LatentBatches(there, LatentCache("memory://b/k"), cfg, 8, D)(0, range(8)),
                LatentBatches(clips, cache, cfg, 8, D)(0, range(8)))


def test_what_cannot_be_fetched_is_named_and_leaves_nothing(tmp_path, bucket, monkeypatch):
    with pytest.raises(BadInput, match="memory://b/none.jsonl: cannot be fetched"):
        load_manifest("memory://b/none.jsonl")
    assert not [path for path in (tmp_path / "copies").rglob("*") if path.is_file()]
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(BadInput, match=r"needs the remote extra: pip install -e .\[remote\]"):
        load_manifest("s3://b/m.jsonl")
