"""-m tools.bench audiocalm counts the passes it times, and its window bounds the cache."""
import json
import math
import os
import sys

import pytest

from tools.bench import __main__ as bench

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
CONFIG = """
[vae]
sample_rate = 16000
latent_dim = 4
ratios = [4, 10, 4, 4]
[audiocalm]
block = 4
expert_dim = 8
[audiocalm.backbone]
dim = 32
layers = 2
heads = 2
kv_heads = 1
[audiocalm.head]
width = 8
"""                                     # 25 latents a second; a position is 2 · 2 · 16 fp32 = 256 B


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    place = tmp_path_factory.mktemp("bench")
    (place / "tiny.toml").write_text(CONFIG)
    argv = sys.argv
    sys.argv = ["tools.bench", "audiocalm", "--config", f"{place}/tiny.toml", "--seconds",
                "0.3", "--repeats", "1", "--lengths", "4", "0.32", "0.96", "--window", "0.16",
                "--json", f"{place}/b.json"]
    try:
        bench.main()
    finally:
        sys.argv = argv
    return json.loads((place / "b.json").read_text())


def test_a_block_takes_its_steps_and_a_clean_pass_and_a_latent_of_calm_one(figures):
    blocks, seconds = 2, 0.32
    expected = {"CALM consistency, 1 step": 8, "CALM TrigFlow, 20 steps": 8}
    for name, steps in (("", (32, 16, 8, 4)), (" LSD", (4, 1))):
        for n in steps:                                      # and a pass for the text
            expected[f"AudioCALM{name}, {n} step{'s' * (n > 1)}"] = 1 + blocks * (n + 1)
    rows = figures["contestants"]
    assert {k: round(row["passes"] * seconds) for k, row in rows.items()} == expected
    assert list(rows) == list(expected) and rows["CALM consistency, 1 step"]["ratio"] == 1
    for row in rows.values():
        assert 0 < row["first_ms"] <= row["ms"] * seconds
        assert row["real_time"] == pytest.approx(1000 / row["ms"], rel=1e-2)


def test_the_cache_grows_with_the_clip_unless_it_has_a_window(figures):
    whole, window = figures["growth"]["whole history"], figures["growth"]["last 0.16 s"]
    seconds = [0.32, 0.96, 4.0]                                        # sorted, whole blocks
    assert [row["seconds"] for row in whole] == [row["seconds"] for row in window] == seconds
    assert [row["positions"] for row in whole] == [24 + round(25 * s) for s in seconds]
    assert [row["positions"] for row in window] == [24 + 4] * 3
    # one buffer, which trimming keeps: twice the text and a block, and 64 more
    assert [row["bytes"] for row in window] == [256 * (2 * (24 + 4) + 64)] * 3
    for row in whole:                                         # a buffer: twice its start
        assert 256 * row["positions"] <= row["bytes"] <= 256 * (2 * row["positions"] + 64)
    for rows in (whole, window):
        each = [rows[0]["seconds"], *(b["seconds"] - a["seconds"] for a, b in zip(rows, rows[1:]))]
        total = [sum(row["ms"] * s for row, s in zip(rows[:n], each)) for n in range(1, 4)]
        assert all(math.isclose(t, 1000 * row["total"], rel_tol=1e-2, abs_tol=0.2)
                   for t, row in zip(total, rows))
