"""Nothing damaged or hostile is used silently: refused in one line, repaired, or harmless."""
import dataclasses
import errno
import json
import sys
import zipfile

import numpy as np
import pytest
import torch

import checkpoint
import checks
import config
from cli import BadInput
from clips import RATE, corpus
from config import (Config, StageConfig, build_saved, dump, load, load_checkpoint, make_model,
                    open_run, read_log, resolve, save_checkpoint)
from conftest import ROOT, write
from data import load_manifest
from latents import LatentCache
from optim import make_optimizers
from report import read_curves
from vae import VAE

sys.path.insert(0, f"{ROOT}/tests/faults")
import mutate  # noqa: E402


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A run folder of two untrained stages -> (folder, its checkpoints)."""
    folder = str(tmp_path_factory.mktemp("tiny"))
    cfg = load(write(folder), ["--out", folder])
    torch.manual_seed(0)
    vae = VAE(cfg.vae).state_dict()
    state = {"step": 1, "done": True, "config": dataclasses.asdict(cfg), "optimizers": {},
             "seen": {"kinds": ["speech"], "voice_prompts": True, "letters": {"speech": " ab"}}}
    save_checkpoint(f"{folder}/vae.pt", {**state, "stage": "vae", "ema": vae,
                                         "model": {f"vae.{k}": v for k, v in vae.items()}})
    save_checkpoint(f"{folder}/lm.pt", {**state, "stage": "lm", "ema": None,
                                        "encoder": config.encoder_id(vae),
                                        "model": make_model(cfg, "lm").state_dict()})
    return folder, {stage: load_checkpoint(f"{folder}/{stage}.pt") for stage in ("vae", "lm")}


def bytes_of(path):
    with open(path, "rb") as f:
        return f.read()


def put(folder, target, data):
    """A run folder like `folder` whose checkpoint `target` holds the bytes -> its path."""
    for stage in ("vae", "lm"):
        (folder / f"{stage}.pt").write_bytes(data[stage])
    return str(folder / f"{target}.pt")


def fault_of(tiny, tmp_path, stage, mutated):
    """The outcome of opening a run whose checkpoint of a stage has the mutated bytes."""
    folder, whole = tiny
    data = {name: bytes_of(f"{folder}/{name}.pt") for name in ("vae", "lm")} | {stage: mutated}
    path = put(tmp_path, stage, data)

    def read():
        open_run(str(tmp_path), "lm")
        return load_checkpoint(path)

    return mutate.outcome(read, lambda state: mutate.same_state(state, whole[stage]))


# ---------------------------------------------------------------- checkpoints

@pytest.mark.parametrize("stage", ["vae", "lm"])
def test_damaged_bytes_of_a_checkpoint_are_refused_or_harmless(tiny, tmp_path, stage):
    """Fault: 308 of 520 damaged checkpoints were used without a word."""
    data = bytes_of(f"{tiny[0]}/{stage}.pt")
    refused = 0
    for seed in range(24):
        name, mutated = mutate.mutate_bytes(data, seed)
        found, text = fault_of(tiny, tmp_path, stage, mutated)
        assert found in ("refused", "harmless"), f"{name}, seed {seed}: {found} {text}"
        refused += found == "refused"
    assert refused >= 16


@pytest.mark.parametrize("stage", ["vae", "lm"])
def test_hostile_contents_of_a_whole_archive_are_refused(tiny, tmp_path, stage, monkeypatch):
    """Fault: a checkpoint of a few bytes could ask for 10^7 layers, terabytes, or a download."""
    import tokenizers

    def download(name):
        raise AssertionError(f"{name} would be downloaded")

    monkeypatch.setattr(tokenizers.Tokenizer, "from_pretrained", download)
    for seed in range(32):
        name, mutated = mutate.mutate_checkpoint(f"{tiny[0]}/{stage}.pt", seed)
        found, text = fault_of(tiny, tmp_path, stage, mutated)
        assert found == "refused", f"{name}, seed {seed}: {found} {text}"


def test_a_damaged_record_is_named(tiny, tmp_path):
    """Fault: a flipped bit in a weight was played."""
    path = f"{tiny[0]}/lm.pt"
    data = bytearray(bytes_of(path))
    with zipfile.ZipFile(path) as archive:
        record = max(archive.infolist(), key=lambda info: info.file_size)
    data[record.header_offset + 200 + record.file_size // 2] ^= 1
    (tmp_path / "lm.pt").write_bytes(data)
    with pytest.raises(BadInput, match=f"lm.pt: damaged .record {record.filename}.; restore"):
        load_checkpoint(str(tmp_path / "lm.pt"))


def test_a_weight_that_is_not_a_number_is_named(tiny, tmp_path):
    state = load_checkpoint(f"{tiny[0]}/vae.pt")
    state["ema"]["latent_mean"][1] = float("nan")
    save_checkpoint(str(tmp_path / "vae.pt"), state)
    with pytest.raises(BadInput, match="vae.pt: ema.latent_mean is not finite"):
        load_checkpoint(str(tmp_path / "vae.pt"))


@pytest.mark.parametrize("error, message", [
    (MemoryError(), "does not fit into memory"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "does not fit into memory"),
    (OSError(errno.EIO, "Input/output error"), "cannot be read .Input/output error."),
    (OSError(errno.EMFILE, "Too many open files"), "cannot be read .Too many open files."),
    (PermissionError(errno.EACCES, "Permission denied"), "may not be read; correct its perm")])
def test_a_file_that_could_not_be_read_is_not_called_damaged(
        tiny, monkeypatch, error, message):
    """Fault: out of memory and denied permissions were answered with "delete it"."""
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(BadInput, match=message) as found:
        load_checkpoint(f"{tiny[0]}/vae.pt")
    assert "delete" not in str(found.value) and "damaged" not in str(found.value)


def test_a_model_larger_than_its_file_is_refused_before_it_is_built(tiny):
    cfg = resolve({**load_checkpoint(f"{tiny[0]}/lm.pt")["config"]})
    cfg.lm.backbone.layers = 10 ** 7
    weights = tiny[1]["lm"]["model"]
    with pytest.raises(BadInput, match="x.pt: its config asks for a larger model than the file"):
        build_saved(cfg, "lm", weights, "x.pt")
    cfg.lm.backbone.layers = 1
    assert build_saved(cfg, "lm", weights, "x.pt").state_dict().keys() == weights.keys()


def test_a_language_model_is_not_used_with_another_encoder_than_its_latents_had(tiny, tmp_path):
    """Fault: after vae.pt was deleted and trained anew, lm.pt went on with its latents."""
    vae, lm = (load_checkpoint(f"{tiny[0]}/{stage}.pt") for stage in ("vae", "lm"))
    save_checkpoint(str(tmp_path / "lm.pt"), lm)

    # another decoder: the latents are the same
    vae["ema"] = {k: v + 0.5 if k.startswith("decoder.") else v for k, v in vae["ema"].items()}
    save_checkpoint(str(tmp_path / "vae.pt"), vae)
    assert open_run(str(tmp_path))[3] == "lm"

    # another encoder
    vae["ema"] = {k: v + 0.5 for k, v in vae["ema"].items()}
    save_checkpoint(str(tmp_path / "vae.pt"), vae)
    with pytest.raises(BadInput, match="lm.pt: was trained on the latents of another VAE"):
        open_run(str(tmp_path))


def test_a_checkpoint_under_another_stages_name_is_refused(tiny, tmp_path):
    for stage in ("vae", "consistency"):
        save_checkpoint(str(tmp_path / f"{stage}.pt"), load_checkpoint(f"{tiny[0]}/vae.pt"))
    with pytest.raises(BadInput, match="consistency.pt: holds stage 'vae', not \"consistency\""):
        open_run(str(tmp_path))


def test_what_a_checkpoint_names_is_not_downloaded_but_a_local_tokenizer_is_read(tmp_path):
    import data
    with pytest.raises(BadInput, match="x.pt: its data.tokenizer = 'nobody/none' is not on this"):
        data.refuse_download("nobody/none", "x.pt")
    (tmp_path / "tokenizer.json").write_text("{}")
    data.refuse_download(str(tmp_path), "x.pt")
    data.refuse_download("", "x.pt")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_optimizer_state_of_other_shapes_is_refused(optimizer):
    """Fault: it was a traceback in the middle of the first step."""
    class Trainer:
        optimized = {"lm": torch.nn.Linear(3, 2)}

    made = make_optimizers(Trainer, StageConfig(optimizer=optimizer), "cpu", key="k")["lm"]
    Trainer.optimized["lm"](torch.ones(1, 3)).sum().backward()
    made.step()
    checkpoint.check_optimizer(made, "lm.pt")
    next(iter(made.state.values()))[
        "momentum_buffer" if optimizer == "muon" else "exp_avg"] = torch.zeros(7)
    with pytest.raises(BadInput, match="lm.pt: .* of the optimizer has shape .7,. for weights"):
        checkpoint.check_optimizer(made, "lm.pt")


# ---------------------------------------------------------------- latents

HOP = 80


def encode(audio, state=None):
    """(B, 1, S) -> (B, T, 4): a mean and a level of each frame, twice."""
    frames = audio.unflatten(-1, (-1, HOP))[:, 0]
    return torch.stack([frames.mean(-1), frames.abs().mean(-1)] * 2, -1)


def build_cache(clips, folder, fn=encode):
    # 12 clips in batches of about two, two batches a shard
    return LatentCache.build(clips, fn, folder=folder, key="k", sample_rate=RATE, channels=1,
                             hop=HOP, dim=2, batch_seconds=2.0, shard_seconds=3.0)


def test_damaged_latents_are_encoded_again_to_the_same_values(tmp_path, capsys):
    """Fault: nine of ten damaged shards were used without a word."""
    clips = corpus(tmp_path, 12)
    cache = build_cache(clips, tmp_path)
    whole = [np.array(cache.get(i)) for i in range(12)]
    files = sorted(cache.path.iterdir())
    assert len(files) >= 4                                   # the index and several shards
    data = {file: file.read_bytes() for file in files}

    said = 0
    for seed in range(20):
        file = files[seed % len(files)]
        name, mutated = mutate.mutate_bytes(data[file], seed)
        file.write_bytes(mutated)
        capsys.readouterr()
        again = build_cache(clips, tmp_path)
        for i in range(12):
            assert np.array_equal(again.get(i), whole[i]), f"{name} of {file}, seed {seed}"
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == (mutated != data[file]) or file.name == "index.json", lines
        said += len(lines)
    assert said >= 15


def test_a_header_that_is_no_python_is_a_damaged_shard(tmp_path):
    """Fault: tokenize.TokenError with its traceback, for one flipped bit of the header."""
    clips = corpus(tmp_path, 12)
    cache = build_cache(clips, tmp_path)
    whole = np.array(cache.get(0))
    file = cache.path / f"shard_{cache.shard_of[0]:05d}.npy"
    file.write_bytes(file.read_bytes().replace(b"}", b"{", 1))
    assert np.array_equal(build_cache(clips, tmp_path).get(0), whole)


def test_only_the_clips_of_a_damaged_shard_are_encoded_again(tmp_path):
    clips = corpus(tmp_path, 12)
    cache = build_cache(clips, tmp_path)
    shards = json.loads((cache.path / "index.json").read_text())["shards"]
    file = cache.path / "shard_00001.npy"
    file.write_bytes(file.read_bytes()[:-1])

    rows = []
    build_cache(clips, tmp_path, lambda audio: rows.append(len(audio)) or encode(audio))
    assert sum(rows) == len(shards[1]["clips"]) < 12
    assert json.loads((cache.path / "index.json").read_text())["shards"] == shards


def test_a_latent_that_is_not_finite_names_its_clip(tmp_path, capsys):
    """The checksum is right, as where a NaN was written, or not known, as in an older cache."""
    clips = corpus(tmp_path, 12)
    cache = build_cache(clips, tmp_path)
    index = json.loads((cache.path / "index.json").read_text())
    del index["crc32"], index["shards"][0]["crc32"]
    (cache.path / "index.json").write_text(json.dumps(index))
    member = index["shards"][0]["clips"][1]
    rows = np.load(cache.path / "shard_00000.npy")
    rows[index["shards"][0]["frames"][0], 1] = np.inf                    # the second clip's first
    np.save(cache.path / "shard_00000.npy", rows)
    build_cache(clips, tmp_path)
    assert f"{clips[member].audio} is not finite" in capsys.readouterr().out


def test_a_shard_that_may_not_be_read_is_not_encoded_again(tmp_path, monkeypatch):
    clips = corpus(tmp_path, 12)
    build_cache(clips, tmp_path)

    def fail(*_, **__):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(np, "load", fail)
    with pytest.raises(BadInput, match="shard_00000.npy: cannot be read .Too many open files"):
        build_cache(clips, tmp_path)


# ---------------------------------------------------------------- configs, logs, manifests

def test_a_hostile_value_in_a_config_is_refused_by_name_or_reads_back_equal(tmp_path):
    """Fault: inf, 10^400, 5,000 digits and nested lists were tracebacks; DEL did not read back."""
    path = tmp_path / "a.toml"
    accepted = 0
    for seed in range(300):
        text = mutate.mutate_config(Config(), seed)
        path.write_text(text)

        def read():
            cfg = load(path)
            path.write_text(dump(cfg), encoding="utf-8")
            return cfg, load(path)

        found, message = mutate.outcome(read, lambda pair: pair[0] == pair[1])
        assert found in ("refused", "harmless"), f"seed {seed}, {text[:99]}: {found} {message}"
        accepted += found == "harmless"
    assert 30 < accepted < 270


@pytest.mark.parametrize("value, message", [
    ("1000000000", "train.lm.batch: must lie in 1 .. 1000000, got 1000000000"),
    ("9" * 400, "train.lm.batch: must lie in -9223372036854775807 .. 9223372036854775807, got"),
    ("9" * 5000, "--train.lm.batch: '9+...: not readable as TOML"),
    ("[" * 5000, "--train.lm.batch: '.+ not readable as TOML|expected int, got"),
    ("inf", "train.lm.batch: expected int, got inf"),
    ("\udce9", "train.lm.batch: expected int, got ")])
def test_an_extreme_override_is_one_line_with_its_key_and_bounds(tmp_path, value, message):
    (tmp_path / "a.toml").write_text("")
    with pytest.raises(BadInput, match=message) as found:
        load(tmp_path / "a.toml", ["--train.lm.batch", value])
    assert len(str(found.value)) < 300


@pytest.mark.parametrize("name", ["a\0b", "a\udce9"])
def test_a_name_that_no_config_can_hold_is_refused_at_the_start(tmp_path, name):
    """Fault: config.toml of the run folder could not be written."""
    (tmp_path / "a.toml").write_text("")
    with pytest.raises(BadInput, match="data.manifest: holds "):
        load(tmp_path / "a.toml", [f"--data.manifest={name}"])


def test_a_damaged_log_is_read_to_its_last_whole_row_or_named_by_line(tmp_path):
    rows = "".join(json.dumps({"stage": "vae", "step": i, "loss": 0.5}) + "\n" for i in range(9))
    whole = rows.splitlines(keepends=True)
    for seed in range(40):
        (tmp_path / "log.jsonl").write_bytes(mutate.mutate_log(rows.encode(), seed))

        def read():
            return read_log(tmp_path), read_curves(tmp_path)

        found, text = mutate.outcome(read, lambda value: value[0] == whole[:len(value[0])])
        assert found in ("refused", "harmless"), f"seed {seed}: {found} {text}"

    (tmp_path / "log.jsonl").write_bytes(rows.encode() + b'{"stage": "va' + bytes(20))
    assert read_log(tmp_path) == whole
    (tmp_path / "log.jsonl").write_bytes(b"\xff\n" + rows.encode())
    with pytest.raises(BadInput, match="log.jsonl, line 1: damaged"):
        read_log(tmp_path)


def test_a_hostile_line_of_a_manifest_is_refused_or_can_be_written_again(tmp_path):
    (tmp_path / "a.wav").write_bytes(b"")
    for seed in range(120):
        line = mutate.mutate_manifest(seed)
        (tmp_path / "m.jsonl").write_text(line)

        def read():
            [clip] = load_manifest(tmp_path / "m.jsonl")
            for word in (clip.text, clip.speaker, clip.transcript):
                word.encode("utf-8")
            times = [seconds for _, *pair in clip.words or [] for seconds in pair]
            assert all(np.isfinite(float(t)) for t in [*times, clip.duration or 1])
            return clip

        found, text = mutate.outcome(read, lambda clip: clip.audio == str(tmp_path / "a.wav"))
        assert found in ("refused", "harmless"), f"seed {seed}, {line[:99]}: {found} {text}"


# ---------------------------------------------------------------- resuming

def resumed(tiny, tmp_path, key, value, done=False):
    """What check_checkpoints says where vae.pt was saved by a config with another value of a key.
    """
    state = load_checkpoint(f"{tiny[0]}/vae.pt")
    table = state["config"] | {"out": str(tmp_path), "stages": ["vae"]}
    save_checkpoint(str(tmp_path / "vae.pt"), state | {"done": done, "config": table})
    said = []
    changed = json.loads(json.dumps(table))
    config.set_value(changed, key, value)
    checks.check_checkpoints(resolve(changed), [], said.append)
    return said


@pytest.mark.parametrize("key, value", [
    ("seed", 5), ("dtype", "bf16"), ("data.seed", 3), ("data.frames", 17), ("toy.seed", 9),
    ("data.gain_db", 3.0), ("train.vae.batch", 2), ("train.vae.micro_batch", 2),
    ("train.vae.ema", 0.5), ("train.vae.freeze", ["encoder"]), ("train.vae.steps", 99),
    ("train.vae.lr", 0.5), ("train.vae.lr_end", 0.5), ("train.vae.warmup", 3),
    ("train.vae.weight_decay", 0.5), ("train.vae.grad_clip", 0.5), ("train.vae.betas", [0.1, 0.2])])
def test_what_decides_a_result_is_said_where_it_changed_before_a_resume(
        tiny, tmp_path, key, value):
    """Fault: another seed, dtype or toy corpus was mixed in silently."""
    [sentence] = resumed(tiny, tmp_path, key, value)
    assert f"{key.removeprefix('train.vae.')} = " in sentence and str(value) in sentence
    assert "to step 1, and resumes with" in sentence


def test_nothing_is_said_where_nothing_that_decides_changed(tiny, tmp_path):
    for key, value in (("train.vae.log_every", 7), ("data.workers", 2), ("sample.count", 2),
                       ("threads", 2)):
        assert resumed(tiny, tmp_path, key, value) == []


def test_a_stage_does_not_resume_with_another_optimizer(tiny, tmp_path):
    """Fault: muon's state for adamw was a KeyError with its traceback."""
    with pytest.raises(BadInput, match="vae.pt: trained with train.vae.optimizer = muon to step 1"):
        resumed(tiny, tmp_path, "train.vae.optimizer", "adamw")
    [sentence] = resumed(tiny, tmp_path, "train.vae.optimizer", "adamw", done=True)
    assert "was trained with optimizer = muon, not adamw, and is finished" in sentence


def test_another_precision_or_size_of_a_forward_pass_is_said():
    said = []
    saved = {"step": 7, "runtime": {"dtype": "fp32", "rows of a forward pass": 4}}
    checks.note_changed_runtime("lm", saved, {"dtype": "bf16", "rows of a forward pass": 2},
                                said.append)
    assert [line.split(",")[0] for line in said] == [
        "lm: trained with dtype = 'fp32' to step 7",
        "lm: trained with rows of a forward pass = 4 to step 7"]
    checks.note_changed_runtime("lm", saved, saved["runtime"], said.append)
    checks.note_changed_runtime("lm", {"step": 7}, saved["runtime"], said.append)
    assert len(said) == 2


def test_clips_are_the_same_elsewhere_on_the_disk_but_not_with_another_recording(tmp_path):
    one, other = (corpus(tmp_path / name, 3) for name in ("a", "b"))
    saved = checks.digest_of(one)
    before = checks.earlier_digest_of(one)
    assert checks.same_clips(saved, other) and checks.same_clips(before, other)
    assert not checks.same_clips(saved, other[::-1]) and not checks.same_clips(before, other[::-1])

    # a longer recording under the same name
    with open(other[1].audio, "ab") as f:
        f.write(bytes(100))
    assert not checks.same_clips(saved, other) and not checks.same_clips(before, other)

    # checkpoints of before sizes were kept
    assert checks.same_clips(before.split()[0], other)
    assert checks.same_clips("", one) and not checks.same_clips("0" * 16, one)
