"""Trackers: what they are sent, and that one which is missing or fails ends nothing."""
import sys
import types
from types import SimpleNamespace

import pytest
import torch

import trackers
from cli import BadInput
from config import Config, dump, load
from conftest import write
from runs import Run

CONFIG = 'out = "x"\n[lm]\nnoise = 0.5\n'
SOUND = ("original", torch.zeros(1, 100), 16000)


@pytest.fixture
def fake(monkeypatch):
    """A package in place of wandb -> what its functions were called with."""
    calls = []
    package = types.ModuleType("wandb")

    def record(function):
        return lambda *a, **k: calls.append((function, a, k)) or function

    for function in ("init", "log", "Audio", "Image"):
        setattr(package, function, record(function))
    monkeypatch.setitem(sys.modules, "wandb", package)
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: object())
    trackers.open_tracker.cache_clear()
    yield calls
    trackers.open_tracker.cache_clear()


def test_without_a_tracker_nothing_is_imported():
    trackers.open_tracker("", "out/x", CONFIG)("lm", 1, {"head": 1.0})
    assert not {"wandb", "trackio", "tensorboard"} & set(sys.modules)


def test_a_tracker_that_is_not_installed_is_one_line_that_names_the_package(monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match="log.tracker: trackio is not installed; pip install trackio"):
        trackers.open_tracker("trackio", "out/x", CONFIG)


def test_a_tracker_that_does_not_open_is_one_line(fake, monkeypatch):
    def no_key(**_):
        raise RuntimeError("no API key")
    monkeypatch.setattr(sys.modules["wandb"], "init", no_key)
    with pytest.raises(BadInput, match="wandb cannot be opened .no API key.; mend"):
        trackers.open_tracker("wandb", "out/x", CONFIG)


def test_figures_sounds_and_pictures_arrive_under_their_stage(fake):
    """A sample's name has no step, so that the tracker shows its steps one after the other."""
    send = trackers.open_tracker("wandb", "out/x", CONFIG)
    send("lm", 7, {"head": 0.5})
    send("lm", 7, {}, [SOUND], "out/x/samples/step00000007_lm_speech1.png")
    (_, _, opened), figures, audio, image, media = fake
    assert (opened["project"], opened["name"]) == ("nanocalm", "x")
    assert opened["config"]["lm"] == {"noise": 0.5}
    assert figures == ("log", ({"lm/head": 0.5, "lm/step": 7},), {})
    assert audio[2] == {"caption": "original", "sample_rate": 16000}
    assert image[1] == ("out/x/samples/step00000007_lm_speech1.png",)
    assert media[1] == ({"lm/speech1_1": "Audio", "lm/speech1": "Image", "lm/step": 7},)


def test_all_stages_of_a_training_share_one_run_and_a_resumed_one_goes_on_in_it(fake):
    for _ in range(2):
        trackers.open_tracker("wandb", "out/x", CONFIG)
    assert len(fake) == 1
    trackers.open_tracker.cache_clear()
    trackers.open_tracker("wandb", "out/x", CONFIG)
    assert fake[0][2]["id"] == fake[1][2]["id"] and fake[1][2]["resume"] == "allow"


def test_a_tracker_that_fails_costs_a_line_and_no_row_of_the_log(fake, monkeypatch, tmp_path):
    def offline(_):
        raise OSError("no network")
    monkeypatch.setattr(sys.modules["wandb"], "log", offline)
    cfg = Config(out=str(tmp_path))
    cfg.log.tracker = "wandb"
    said = []
    run = Run.__new__(Run)
    vars(run).update(name="lm", cfg=cfg, unwritten=[],
                     runtime=SimpleNamespace(rank=0, say=said.append))
    run.write(3, {"head": 0.5})
    assert (tmp_path / "log.jsonl").read_text() == '{"stage": "lm", "step": 3, "head": 0.5}\n'
    assert said == ["lm: log.tracker wandb failed (OSError: no network)"]


def test_the_config_knows_the_trackers_by_name(tmp_path):
    path = write(str(tmp_path))
    assert 'tracker = "trackio"' in dump(load(path, ["--log.tracker", "trackio"]))
    with pytest.raises(BadInput, match="log.tracker: .*tensorboard"):
        load(path, ["--log.tracker", "mlflow"])


def test_tensorboard_gets_curves_sounds_and_pictures(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from report import draw_spectrograms
    picture = f"{tmp_path}/step00000007_lm_speech1.png"
    draw_spectrograms(picture, [SOUND[:2]], 16000)
    send = trackers.to_tensorboard(tmp_path)
    send("lm", 6, {"head": 0.5})
    send("lm", 7, {"head": 0.25}, [SOUND], picture)
    events = EventAccumulator(f"{tmp_path}/tensorboard").Reload()
    assert [(e.step, e.value) for e in events.Scalars("lm/head")] == [(6, 0.5), (7, 0.25)]
    assert events.Audio("lm/speech1_1")[0].sample_rate == 16000
    assert events.Images("lm/speech1")[0].step == 7
