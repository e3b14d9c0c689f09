"""-m tools.bench heads times what a frame really does, and its ratios are what they say."""
import contextlib
import os
import types

import pytest
import torch

import heads
from config import load
from tools.bench import heads as bench

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
TINY = ["--lm.backbone.dim", "32", "--lm.backbone.heads", "2", "--lm.backbone.layers", "2",
        "--lm.backbone.mlp_dim", "64", "--lm.head.width", "32", "--lm.head.blocks", "2",
        "--vae.codebook_size", "16"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_part_of_a_frame_runs_and_calls_its_network_as_often_as_its_steps(
        dtype, monkeypatch):
    calm, rq = (load(f"{ROOT}/configs/paper/{kind}_music.toml", TINY) for kind in ("calm", "rq"))
    parts = bench.frame_parts(calm, rq, "cpu", dtype)
    assert list(parts) == ["backbone", "short context", "consistency 1 step",
                           "consistency 4 steps", "trigflow 10 steps", "trigflow 100 steps",
                           "rq 8 levels", "rq 16 levels", "rq 32 levels"]
    calls = []
    head = heads.AdaLNMLP.forward
    monkeypatch.setattr(heads.AdaLNMLP, "forward",
                        lambda self, *a: calls.append("head") or head(self, *a))
    block = bench.Transformer.forward
    monkeypatch.setattr(bench.Transformer, "forward", lambda self, x, cache: calls.append(
        (len(self.blocks), cache.pos, cache.kv[0][0].dtype)) or block(self, x, cache))
    import discrete
    level = discrete.DepthTransformer.run
    monkeypatch.setattr(discrete.DepthTransformer, "run",
                        lambda self, *a: calls.append("level") or level(self, *a))
    counts = {}
    for name, run in parts.items():
        calls.clear()
        run()
        counts[name] = list(calls)
    assert counts["backbone"] == [(2, 375, dtype)] and counts["short context"] == [(4, 9, dtype)]
    for name, steps in (("consistency 1 step", 1), ("consistency 4 steps", 4),
                        ("trigflow 10 steps", 10), ("trigflow 100 steps", 100)):
        assert counts[name] == ["head"] * steps
    for levels in (8, 16, 32):
        assert counts[f"rq {levels} levels"] == ["level"] * levels
    parts["backbone"]()                              # its cache does not grow from call to call
    assert calls[-1] == (2, 375, dtype)


def test_every_part_runs_in_fixed_memory_too_and_a_position_stays_the_same():
    calm, rq = (load(f"{ROOT}/configs/paper/{kind}_music.toml", TINY) for kind in ("calm", "rq"))
    for run in bench.frame_parts(calm, rq, "cpu", torch.float32, "static").values():
        run()
    torch.manual_seed(0)
    z = torch.randn(1, 32)
    found = []
    for how in (None, "static"):
        torch.manual_seed(1)
        position = bench.one_position(calm.lm.backbone, 375, "cpu", torch.float32,
                                      contextlib.nullcontext, how)
        with torch.no_grad():
            found += [position(z, None), position(z, None)]
    for y in found[1:]:
        torch.testing.assert_close(y, found[0])


def test_a_timed_position_appends_to_a_buffer_that_has_room(monkeypatch):
    """Fault: "backbone" timed a move of the whole cache to a new buffer in every call (69.9 against
    64.3 ms), which a generation does once in hundreds of latents.
    """
    calm, rq = (load(f"{ROOT}/configs/paper/{kind}_music.toml", TINY) for kind in ("calm", "rq"))
    parts = bench.frame_parts(calm, rq, "cpu", torch.float32)
    moved = []
    forward = bench.Transformer.forward

    def spy(self, x, cache):
        before = [cache.buffers[i].keys.data_ptr() for i in cache.kv]
        y = forward(self, x, cache)
        moved.append(before != [cache.buffers[i].keys.data_ptr() for i in cache.kv])
        return y
    monkeypatch.setattr(bench.Transformer, "forward", spy)
    for _ in range(3):
        parts["backbone"]()
        parts["short context"]()
    assert moved == [False] * 6


def test_figures_are_ratios_of_the_same_repeats_and_only_calm_pays_for_the_short_context():
    times = {"backbone": [0.004, 0.008], "short context": [0.001, 0.002],
             "consistency 1 step": [0.001, 0.002], "rq 8 levels": [0.012, 0.024]}
    figures = bench.head_figures(times, "rq 8 levels", 12.5)
    one, rq = figures["consistency 1 step"], figures["rq 8 levels"]
    assert one["sampler_speedup"] == 12
    assert one["overall_speedup"] == pytest.approx(16 / 6, abs=1e-3)
    assert rq["sampler_share"] == 0.75 and one["sampler_share"] == pytest.approx(1 / 6, abs=1e-3)
    assert rq["overall_speedup"] == rq["sampler_speedup"] == 1
    assert one["head_ms"] == pytest.approx(12.5 * 1.5)            # a second of audio
    assert rq["whole_ms"] == pytest.approx(12.5 * 24)
    assert rq["seconds_for_30"] == pytest.approx(9) and rq["real_time"] == pytest.approx(1 / 0.3,
                                                                                      abs=1e-3)


def test_the_delay_pattern_pays_for_its_frame_rate_with_the_backbone():
    """50 frames per second beside 25: a second has twice the backbone, and no short context."""
    times = {"backbone": [0.004], "short context": [0.001], "consistency 1 step": [0.002],
             "rq 32 levels": [0.012], bench.DELAY: [0.001]}
    figures = bench.head_figures(times, "rq 32 levels", 25.0, {bench.DELAY: 50.0})
    delay = figures[bench.DELAY]
    assert delay["head_ms"] == pytest.approx(50) and delay["whole_ms"] == pytest.approx(50 * 5)
    assert delay["overall_speedup"] == pytest.approx(16 / 10)
    assert delay["sampler_speedup"] == pytest.approx(6)
    assert delay["sampler_share"] == pytest.approx(0.2)
    assert figures["consistency 1 step"]["overall_speedup"] == pytest.approx(16 / 7, abs=1e-3)


def test_the_table_of_each_domain_is_printed_and_returned(monkeypatch, capsys):
    monkeypatch.setattr(bench, "load", lambda path: load(f"{ROOT}/{path}", TINY))
    figures = bench.run(types.SimpleNamespace(domain=["speech", "music"], repeats=1, fast=None,
                                              threads=0, device="cpu"))
    lines = capsys.readouterr().out.splitlines()
    assert list(figures) == ["speech", "music"] and len(lines) == 1 + 2 * (2 + 7) + 1
    assert list(figures["music"]) == [*figures["speech"], bench.DELAY]
    for domain, baseline in bench.BASELINE.items():
        assert figures[domain][baseline]["overall_speedup"] == 1


def test_random_weights_fill_every_parameter():
    module = bench.filled(lambda: torch.nn.Linear(30, 40), "cpu", torch.float32)
    assert all(0.01 < p.std() < 0.03 for p in module.parameters())
