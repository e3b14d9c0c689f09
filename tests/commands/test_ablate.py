"""Ablations: means with honest errors, one VAE for all rows, finished runs are kept."""
import json
import os
from dataclasses import replace

import pytest

from tools import ablate
from config import load
from conftest import ROOT, run, write


def test_the_error_is_half_of_students_95_percent_interval():
    mean, error = ablate.mean_and_error([1.0, 3.0])
    assert mean == 2.0 and error == pytest.approx(12.706)        # std sqrt(2), / sqrt(2)
    assert ablate.mean_and_error([1.0, 2.0, 3.0])[1] == pytest.approx(4.303 / 3 ** 0.5)
    assert ablate.mean_and_error([5.0]) == (5.0, None)


def test_two_configs_give_a_table_and_share_a_vae(tmp_path):
    tiny = write(str(tmp_path))
    with open(tiny) as f:
        text = f.read()
    paths = []
    for name in ("a", "b"):
        paths.append(f"{tmp_path}/{name}.toml")
        with open(paths[-1], "w") as f:
            f.write(text)
    done = run("-m", "tools.ablate", *paths, "--out", f"{tmp_path}/runs", "--seeds", "3",
               "--evaluate", "--limit 1 --repeats 1", "--json", f"{tmp_path}/t.json",
               "--picture", f"{tmp_path}/t.png",
               "--train.lm.steps", "2", "--train.vae.steps", "2", "--stages", '["vae", "lm"]')
    assert done.returncode == 0, done.stderr
    with open(f"{tmp_path}/t.json") as f:
        table = json.load(f)
    assert set(table) == {"a", "b"} and len(table["a"]["held-out loss"]["seeds"]) == 1
    assert "energy score speech" in table["a"]
    assert table["a"] == table["b"]                  # the same experiment
    with open(f"{tmp_path}/t.png", "rb") as f:
        assert f.read(8) == b"\x89PNG\r\n\x1a\n"
    assert os.path.samefile(f"{tmp_path}/runs/a_3/vae.pt", f"{tmp_path}/runs/b_3/vae.pt")


@pytest.mark.parametrize("base, name, key, value", [
    ("audiocalm_amome", "block_1", "block", 1), ("audiocalm_amome", "block_2", "block", 2),
    ("audiocalm_amome", "block_8", "block", 8),
    ("audiocalm_amome", "history_0", "history_noise", 0.0),
    ("audiocalm_amome", "history_6", "history_noise", 0.6),
    ("prompt_1", "prompt_0", "prompt_noise", 0.0), ("prompt_1", "prompt_5", "prompt_noise", 0.5)])
def test_a_sweep_of_audiocalm_differs_from_its_base_in_one_value(base, name, key, value):
    base, cfg = (load(f"{ROOT}/configs/ablation/{n}.toml") for n in (base, name))
    assert getattr(base.audiocalm, key) != value and cfg.out == f"out/ablation/{name}"
    assert cfg == replace(base, out=cfg.out, audiocalm=replace(base.audiocalm, **{key: value}))


def test_a_mistake_in_a_run_is_told_in_one_line(tmp_path):
    done = run("-m", "tools.ablate", f"{ROOT}/configs/quickstart.toml", "--out", f"{tmp_path}",
               "--lm.backbone.layers", "two")
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
    assert "lm.backbone.layers" in done.stderr
