"""Weights that travel: the format against its own package, and an exported run against the run."""
import json
import os
import shutil

import pytest
import torch

import train
from cli import BadInput
from config import load, load_checkpoint, open_run
from conftest import run, write
from tools.convert.export import use
from weights import load_safetensors, save_safetensors

TENSORS = {"a": torch.randn(3, 5), "b": torch.randn(2, 2).bfloat16(),
           "c": torch.arange(6).view(2, 3),
           "d": torch.tensor(1.5, dtype=torch.float64), "e": torch.zeros(0, 4),
           "f": torch.tensor([True, False])}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype
                                        for k in a)


def test_a_file_gives_back_what_was_written(tmp_path):
    path = f"{tmp_path}/w.safetensors"
    save_safetensors(path, TENSORS, {"key": "text ä"})
    tensors, metadata = load_safetensors(path)
    assert equal(tensors, TENSORS) and metadata == {"key": "text ä"}


def test_the_package_of_the_format_reads_and_writes_the_same(tmp_path):
    package = pytest.importorskip("safetensors.torch")
    ours, theirs = f"{tmp_path}/ours.safetensors", f"{tmp_path}/theirs.safetensors"
    save_safetensors(ours, TENSORS, {"key": "text"})
    package.save_file(TENSORS, theirs, {"key": "text"})
    assert equal(package.load_file(ours), TENSORS)
    assert equal(load_safetensors(theirs)[0], TENSORS)


def test_a_header_that_does_not_describe_its_bytes_is_one_line(tmp_path):
    path = f"{tmp_path}/w.safetensors"
    save_safetensors(path, TENSORS, {})
    with open(path, "rb") as f:
        good = f.read()
    length = int.from_bytes(good[:8], "little")
    header = json.loads(good[8:8 + length])

    def with_header(change):
        changed = json.loads(json.dumps(header))
        change(changed)
        text = json.dumps(changed).encode()
        return len(text).to_bytes(8, "little") + text + good[8 + length:]

    damaged = [b"", good[:4], good[:20], good[:-1], good + b"x",
               (10 ** 12).to_bytes(8, "little") + good[8:],
               with_header(lambda h: h["a"].update(shape=[10 ** 9, 10 ** 9])),
               with_header(lambda h: h["a"].update(shape=[-3, -5])),
               with_header(lambda h: h["a"].update(dtype="C64")),
               with_header(lambda h: h["a"].update(data_offsets=[0, 10 ** 15])),
               with_header(lambda h: h["a"].pop("shape")),
               with_header(lambda h: h.update(a=5)),
               b"\x08" + bytes(7) + b"[1,2,3] "]
    for data in damaged:
        with open(path, "wb") as f:
            f.write(data)
        with pytest.raises(BadInput, match="w.safetensors: not a readable"):
            load_safetensors(path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A tiny run of a VAE and a language model."""
    folder = str(tmp_path_factory.mktemp("run"))
    done = run("train.py", "--config", write(folder), "--stages", '["vae","lm"]')
    assert done.returncode == 0, done.stderr
    return f"{folder}/run"


def export(source, out, *options):
    done = run("-m", "tools.convert", "export", source, "--out", out, *options)
    assert done.returncode == 0, done.stderr


@pytest.mark.long
def test_an_export_in_fp32_generates_the_same_bytes_as_the_run(finished, tmp_path):
    export(finished, f"{tmp_path}/model", "--dtype", "fp32")
    assert sorted(os.listdir(f"{tmp_path}/model")) == [
        "README.md", "config.toml", "lm.safetensors", "vae.safetensors"]
    wavs = []
    for source in (finished, f"{tmp_path}/model"):
        wavs.append(f"{tmp_path}/{len(wavs)}.wav")
        done = run("sample.py", "--run", source, "--text", "one two", "--out", wavs[-1],
                   "--no-comment")
        assert done.returncode == 0, done.stderr
    with open(wavs[0], "rb") as a, open(wavs[1], "rb") as b:
        assert a.read() == b.read()


def test_the_config_of_an_export_trains_on_from_it(finished, tmp_path):
    """Fault: it named checkpoints and held-out clips of the machine that had trained it, and no
    VAE among its stages.
    """
    export(finished, f"{tmp_path}/model")
    cfg = train.start_from(load(f"{tmp_path}/model/config.toml", ["--out", f"{tmp_path}/mine"]),
                           f"{tmp_path}/model")
    assert cfg.stages == ["vae", "lm"] and cfg.data.valid == ""
    assert cfg.train.vae.init == f"{tmp_path}/model/vae.pt"
    assert cfg.train.lm.init == f"{tmp_path}/model/lm.pt"
    assert load(f"{tmp_path}/model/config.toml", []).out == "out/run"


def test_an_export_in_bf16_rounds_matrices_and_keeps_vectors(finished, tmp_path):
    export(finished, f"{tmp_path}/model", "--stage", "lm")
    expected = load_checkpoint(f"{finished}/lm.pt")["ema"]
    found = load_checkpoint(f"{tmp_path}/model/lm.pt")
    assert found["done"] and found["stage"] == "lm"
    assert load_checkpoint(f"{tmp_path}/model/lm.safetensors")["ema"].keys() == expected.keys()
    for name, w in expected.items():
        rounded = w.bfloat16().float() if w.dim() > 1 else w
        assert torch.equal(found["ema"][name], rounded), name
    assert open_run(f"{tmp_path}/model")[3] == "lm"


def test_the_card_tells_of_data_licence_use_and_synthetic_audio(finished, tmp_path):
    (tmp_path / "notes").write_text("- Figures: none.")
    export(finished, f"{tmp_path}/model", "--licence", "cc0-1.0", "--card", f"{tmp_path}/notes")
    card = (tmp_path / "model" / "README.md").read_text()
    for line in ("license: cc0-1.0", "pipeline_tag: text-to-audio", "audio is synthetic",
                 "- Intended use: ", "- Data: the procedural corpus", "- Figures: none."):
        assert line in card


@pytest.mark.parametrize("last, kinds, letters, what, task, command", [
    ("vae", [], None, "audio to latents and back", "audio-to-audio",
     "evaluate.py --run 'my run' --what vae --manifest clips.jsonl"),
    ("lm", ["speech"], None, "audio from text", "text-to-speech",
     "sample.py --run 'my run' --text \"...\""),
    ("lm", ["sound", "music"], {"sound": "ab", "music": ""}, "audio from text", "text-to-audio",
     "sample.py --run 'my run' --kind sound --text \"...\""),
    ("lm", ["music"], {"music": ""}, "audio that goes on from audio", "audio-to-audio",
     "sample.py --run 'my run' --kind music --prompt some.wav")])
def test_the_card_names_a_command_that_this_model_can_run(last, kinds, letters, what, task,
                                                          command):
    """Fault: a model of music alone was to speak, one without texts was "audio from text"."""
    assert use("my run", last, kinds, letters) == (what, task, f"python {command}")


def test_a_run_that_is_not_finished_does_not_travel(finished, tmp_path):
    shutil.copytree(finished, f"{tmp_path}/run")
    state = torch.load(f"{tmp_path}/run/lm.pt", weights_only=True)
    torch.save({**state, "done": False}, f"{tmp_path}/run/lm.pt")
    done = run("-m", "tools.convert", "export", f"{tmp_path}/run", "--out", f"{tmp_path}/model")
    assert done.returncode == 2 and "not finished" in done.stderr
    assert not os.path.exists(f"{tmp_path}/model")
