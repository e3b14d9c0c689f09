"""What a converted model becomes: a run folder that train.py, sample.py and evaluate.py open.

    RUN/config.toml, RUN/<stage>.pt, for models with a tokenizer RUN/tokenizer.json
"""
import dataclasses
import os
from pathlib import Path

from cli import BadInput, write_file
from config import dump, save_checkpoint


def save_run(out, cfg, stage, state):
    """Write config.toml and <stage>.pt of a run -> (path of the checkpoint, its size in millions).

    Stage "text" is a start for training, not a model.
    """
    path = f"{out}/{stage}.pt"
    write_file(f"{out}/config.toml", dump(cfg))
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
    write_file(f"{out}/tokenizer.json", Path(source).read_bytes())
    return f"{out}/tokenizer.json"
