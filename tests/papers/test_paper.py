"""The language models of configs/paper have the sizes of Table 9 (meta device: no memory)."""
import dataclasses
import os

import pytest
import torch

from calm import CALM
from config import load
from data import KINDS, vocabulary

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def build(name):
    cfg = load(f"{ROOT}/configs/paper/{name}.toml")
    with torch.device("meta"):
        return cfg, CALM(cfg.lm, cfg.vae.latent_dim, vocabulary(), KINDS, cfg.vae.codes)


def millions(module):
    return sum(p.numel() for p in module.parameters()) / 1e6


@pytest.mark.parametrize("name", ["calm_music", "rq_music"])
def test_the_music_backbone_has_the_1_35_billion_parameters_of_table_9(name):
    cfg, model = build(name)
    assert millions(model.backbone) == pytest.approx(1350, rel=0.01)
    assert cfg.data.frames == 30 * cfg.vae.frame_rate


@pytest.mark.parametrize("name", ["calm_speech", "rq_speech"])
def test_the_speech_backbone_has_2_2_billion_parameters_with_a_vocabulary_of_48000_in_and_out(name):
    cfg, model = build(name)
    assert millions(model.backbone) == pytest.approx(1927, rel=1e-3)
    assert millions(model.backbone) + 2 * 0.048 * 2560 == pytest.approx(2200, rel=0.02)
    assert cfg.data.frames == 300 * cfg.vae.frame_rate and cfg.lm.acoustic_delay == 2


def test_heads_and_short_context_have_the_sizes_of_table_9():
    cfg, model = build("calm_music")
    assert millions(model.head) == pytest.approx(601, rel=1e-3)
    assert millions(model.short) == pytest.approx(113, rel=3e-3)
    assert cfg.lm.head.multiplier == 8 and cfg.lm.short_context == 10
    assert millions(build("calm_speech")[1].head) == pytest.approx(10.15, rel=1e-3)
    for name, levels, near in (("rq_music", 32, 748.7), ("rq_speech", 8, 656.4)):
        cfg, model = build(name)
        assert cfg.vae.codebooks == levels and millions(model.head) == pytest.approx(near, abs=0.1)
        assert millions(model.head) == pytest.approx(701, rel=0.07)


@pytest.mark.parametrize("name", ["music", "speech"])
def test_the_rival_of_a_model_has_the_same_backbone_and_training(name):
    """A config is one complete file: these tables stand in both, and must not drift apart."""
    calm, rq = load(f"{ROOT}/configs/paper/calm_{name}.toml"), load(
        f"{ROOT}/configs/paper/rq_{name}.toml")
    assert calm.lm.backbone == rq.lm.backbone
    assert calm.train.lm == rq.train.lm and calm.train.vae == rq.train.vae


@pytest.mark.parametrize("name, noise", [("calm_music", 1.0), ("calm_speech", 0.0),
                                         ("pocket_tts", 0.0)])
def test_music_is_trained_with_noise_on_the_past_and_speech_without(name, noise):
    """Fault: pocket_tts.toml had noise 1.0; CALM's speech models have none."""
    assert load(f"{ROOT}/configs/paper/{name}.toml").lm.noise == noise


def test_the_3b_models_of_table_8_differ_from_their_rivals_in_the_backbone_alone():
    for small, large in (("calm_music", "calm_3b"), ("rq_music", "rq_3b")):
        cfg, _ = build(small)
        other, model = build(large)
        backbone = other.lm.backbone
        assert (backbone.layers, backbone.dim, backbone.heads) == (48, 2048, 32)
        assert millions(model.backbone) == pytest.approx(48 * 12 * 2.048 ** 2, rel=1e-3)
        assert 3000 < millions(model) < 3500
        assert dataclasses.replace(other.lm, backbone=cfg.lm.backbone) == cfg.lm
        train = dataclasses.replace(cfg.train, shard=True)
        assert (other.vae, other.gan, other.train, other.data) == (cfg.vae, cfg.gan, train, cfg.data)


def test_musicgen_has_4_codebooks_at_50_hertz_and_the_backbone_of_its_rivals():
    cfg, model = build("delay_music")
    assert cfg.lm.backbone == build("calm_music")[0].lm.backbone
    assert (cfg.vae.codes, cfg.vae.frame_rate, cfg.vae.sample_rate) == ((4, 2048), 50, 32000)
    assert cfg.data.frames == 30 * 50 and model.head.code_delay == 3
