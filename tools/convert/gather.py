"""A run whose language model is still in training, sharded -> a plain run to listen to.

    RUN/lm.shards/step00001000/  ─► every tensor whole ─► OUT/lm.pt
    RUN/vae.pt, RUN/config.toml  ─► copied              ─► OUT/

A finished stage needs no such thing: train.py leaves one plain file.
"""
import os
import shutil

from checkpoint import newest_shards
from cli import BadInput, atomic
from config import LM_STAGES, save_checkpoint
from parallel import gather_shards


def run(args):
    """Gather the sharded checkpoints of args.weights, a run folder, into args.out."""
    folders = {stage: newest_shards(args.weights, stage) for stage in LM_STAGES}
    folders = {stage: folder for stage, folder in folders.items() if folder}
    if not folders:
        raise BadInput(f"{args.weights}: no stage in training has sharded checkpoints "
                       "(NAME.shards); a plain run needs no gathering")

    os.makedirs(args.out, exist_ok=True)
    for stage, folder in folders.items():
        state = gather_shards(folder)
        save_checkpoint(f"{args.out}/{stage}.pt", state)
        print(f"{args.out}/{stage}.pt: step {state['step']}, "
              f"{sum(w.numel() for w in state['model'].values()) / 1e6:.2f}M parameters")
    for name in ("vae.pt", "config.toml"):
        with atomic(f"{args.out}/{name}") as temp:
            shutil.copyfile(f"{args.weights}/{name}", temp)
