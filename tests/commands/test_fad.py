"""tools/fad.py: distances order damaged clips by their damage, and refuse in one line."""
import json
import sys

import numpy as np
import pytest
import soundfile as sf

from cli import BadInput
from tools import fad


def corpus(folder, name, clips, seed):
    """A manifest of clips of two seconds: a harmonic tone in noise of a falling spectrum."""
    rng = np.random.default_rng(seed)
    folder.mkdir(exist_ok=True)
    t = np.arange(2 * fad.RATE) / fad.RATE
    rows = []
    for i in range(clips):
        pitch = rng.uniform(100, 300)
        tone = sum(np.sin(2 * np.pi * k * pitch * t) / k for k in range(1, int(7500 / pitch)))
        swell = 1 + 0.8 * np.sin(2 * np.pi * rng.uniform(1, 4) * t)
        path = folder / f"{name}{i}.wav"
        sf.write(path, 0.1 * tone * swell + 1e-4 * rng.standard_normal(len(t)), fad.RATE)
        rows.append({"audio": str(path), "kind": "sound"})
    manifest = folder / f"{name}.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(manifest)


def damaged(folder, monkeypatch, *arguments):
    """Distances of 10 clips to 20 others, {"fad mel": {damage: [value, low, high]}, ...}."""
    judged, reference = corpus(folder, "a", 10, 0), corpus(folder, "b", 20, 1)
    monkeypatch.setattr(sys, "argv", ["fad", judged, "--reference", reference, "--dims", "4",
                                      "--json", str(folder / "fad.json"), *arguments])
    fad.main()
    return json.loads((folder / "fad.json").read_text())


def test_the_more_a_clip_is_damaged_the_larger_is_every_distance(tmp_path, monkeypatch):
    found = damaged(tmp_path, monkeypatch)
    for name in ("fad mel", "mmd mel", "fad_inf mel"):
        value = {damage: figure[0] for damage, figure in found[name].items()}
        low_passed = [value[f"below {hz} kHz"] for hz in (4, 2, 1)]
        noised = [value[f"noise -{decibels} dB"] for decibels in (30, 20, 10)]
        assert value["real"] < low_passed[0] < low_passed[1] < low_passed[2], name
        assert value["real"] < noised[0] < noised[1] < noised[2], name
    assert abs(found["mmd mel"]["real"][0]) < 0.1 < found["mmd mel"]["below 4 kHz"][0]


def test_clips_that_are_enough_for_fad_alone_have_it(tmp_path, monkeypatch, capsys):
    found = damaged(tmp_path, monkeypatch, "--limit", "6")
    assert found["fad_inf mel"]["real"] is None and found["fad mel"]["real"][0] >= 0
    assert "fad_inf: needs 15 windows for subsets of at least 5" in capsys.readouterr().out


def test_an_embedding_that_cannot_be_loaded_is_refused_in_one_line(tmp_path, monkeypatch):
    with pytest.raises(BadInput, match="--embedding ./no/such/model: cannot be loaded") as error:
        damaged(tmp_path, monkeypatch, "--embedding", "./no/such/model")
    assert "\n" not in str(error.value)
