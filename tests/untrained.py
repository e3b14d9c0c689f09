"""A run folder with random weights, made in a moment: what it says is noise, but it speaks."""
import dataclasses

import torch

from config import load, make_model
from conftest import write
from vae import VAE


def untrained_run(folder, overrides=()):
    """Makes folder/run, a VAE and a language model of the tiny config -> its path."""
    cfg = load(write(str(folder)), list(overrides))
    torch.manual_seed(0)
    models = {"vae": VAE(cfg.vae), "lm": make_model(cfg, "lm")}
    (folder / "run").mkdir()
    for stage, model in models.items():
        torch.save({"stage": stage, "step": 1, "done": True, "config": dataclasses.asdict(cfg),
                    "model": {}, "ema": model.state_dict(), "optimizers": {}},
                   folder / "run" / f"{stage}.pt")
    return f"{folder}/run"
