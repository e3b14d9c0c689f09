"""What a converted model becomes: a run folder that train.py, sample.py and evaluate.py open.

    RUN/config.toml, RUN/<stage>.pt, for models with a tokenizer RUN/tokenizer.json
"""
import dataclasses
import os
import shutil

from cli import BadInput
from config import dump, save_checkpoint


def save_run(out, cfg, stage, state):
    """Write config.toml and <stage>.pt of a run -> (path of the checkpoint, its size in millions).

    Stage "text" is a start for training, not a model.
    """
    path = f"{out}/{stage}.pt"
    os.makedirs(out, exist_ok=True)
    with open(f"{out}/config.toml", "w") as f:
        f.write(dump(cfg))
    save_checkpoint(path, {"stage": stage, "step": 0, "done": True,
                           "config": dataclasses.asdict(cfg), "model": state, "ema": None,
                           "optimizers": {}})
    return path, sum(tensor.numel() for tensor in state.values()) / 1e6


def vae_checkpoint(state):
    """The state dict of a VAE as vae.pt has it, without discriminators."""
    return {f"vae.{name}": tensor for name, tensor in state.items()}


def keep_tokenizer(source, out):
    """Copy tokenizer.json into the run, which then needs nothing else -> its path there."""
    if not os.path.isfile(source):
        raise BadInput(f"{source}: no such file; the rows of the text embedding need their "
                       "tokenizer")
    os.makedirs(out, exist_ok=True)
    shutil.copyfile(source, f"{out}/tokenizer.json")
    return f"{out}/tokenizer.json"
