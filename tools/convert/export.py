"""A run as a folder of weights to give away: python -m tools.convert export RUN --out DIR

    RUN/vae.pt, RUN/STAGE.pt ─► averaged weights, rounded ─► DIR/vae.safetensors,
                                                             DIR/STAGE.safetensors
    the config in them       ─────────────────────────────► DIR/config.toml, to go on from it
    and --card               ─────────────────────────────► DIR/README.md, the model card

DIR takes the place of a run folder in sample.py, evaluate.py and config.open_run; optimizers, logs
and samples stay behind. In fp32 nothing changes; bf16 keeps 8 bits of each weight, fp16 11.
Vectors (norms, biases, statistics of the latents) stay fp32: they are few.
"""
import copy
import json
import os
import shlex

import torch

from cli import BadInput, atomic
from config import STAGES, dump, load_checkpoint, resolve, trained_stages, vae_weights
from weights import save_safetensors

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

CARD = """\
---
library_name: nanocalm
pipeline_tag: {task}
license: {licence}
tags: [audio-generation, calm, synthetic-audio]
---
# {title}

A continuous audio language model (CALM, arXiv 2509.06926) trained with nanoCALM.

- What it does: {what}. Its audio is synthetic: say so where you publish it.
- Intended use: to try, study and go on from. Not to speak as somebody who has not agreed to it.
- Weights: {sizes} parameters, {dtype}.
- Audio: {sample_rate} Hz, {channels} channel(s), {frame_rate:g} latents of {dim} numbers a second.
- Training: {steps}; `config.toml` has the settings of the last one. Kinds of audio: {kinds}.
- Data: {data}. Licence of these weights: {licence}.
{notes}
    {command}
"""


def run(args):
    """Write the folder. Errors: BadInput where the run is not finished or DIR holds a model."""
    states = {"vae": finished(args.weights, "vae")}
    last = args.stage or (trained_stages(args.weights) or ["vae"])[-1]
    states[last] = finished(args.weights, last)
    os.makedirs(args.out, exist_ok=True)

    sizes = {}
    for name, state in states.items():
        weights = vae_weights(state) if name == "vae" else state["ema"] or state["model"]
        sizes[name] = save(f"{args.out}/{name}.safetensors", state, weights, args.dtype)
        print(f"{args.out}/{name}.safetensors: {sizes[name] / 1e6:.2f}M parameters, {args.dtype}")

    cfg = resolve(to_go_on_from(without_paths(states[last]["config"])))
    write(f"{args.out}/config.toml", dump(cfg))
    write(f"{args.out}/README.md", card(args, cfg, states, sizes))


def finished(folder, stage):
    state = load_checkpoint(f"{folder}/{stage}.pt")
    if not state["done"]:
        raise BadInput(f"{folder}/{stage}.pt: its training is not finished; train it to its end")
    return state


def save(path, state, weights, dtype):
    """One stage -> its number of parameters and buffers."""
    about = {key: state[key] for key in ("stage", "step", "done", "clips", "seen") if key in state}
    about["config"] = without_paths(state["config"])
    rounded = {name: w.to(DTYPES[dtype]) if w.is_floating_point() and w.dim() > 1 else w
               for name, w in weights.items()}
    save_safetensors(path, rounded, {"format": "pt", "nanocalm": json.dumps(about)})
    return sum(w.numel() for w in weights.values())


def without_paths(config):
    """A copy of a config's dict in which the folders of this machine are names of files alone."""
    config = copy.deepcopy(config)
    config["out"] = os.path.basename(os.path.normpath(config["out"]))
    for key in ("manifest", "valid"):
        config["data"][key] = os.path.basename(config["data"].get(key, ""))
    for stage in STAGES:
        stage = config["train"].get(stage, {})
        for key in ("init", "teacher"):
            if isinstance(stage.get(key), str):
                stage[key] = os.path.basename(stage[key])
    return config


def to_go_on_from(config):
    """The config with which others train on from the folder, --config DIR/config.toml --from DIR:
    every stage, begun with the folder's weights, and held-out clips out of their own manifest.
    """
    config["out"] = f"out/{config['out']}"
    config["stages"] = ["vae", *(stage for stage in config["stages"] if stage != "vae")]
    config["data"]["valid"] = ""
    for stage in STAGES:
        config["train"].get(stage, {}).pop("init", None)
    return config


def card(args, cfg, states, sizes):
    """The text of the model card; --card adds a file's lines: data, licence, figures."""
    notes = ""
    if args.card:
        with open(args.card, encoding="utf8") as f:
            notes = f.read().rstrip() + "\n"

    last = list(states)[-1]                              # "vae" where nothing else was trained
    data = f"`{cfg.data.manifest}`" if cfg.data.manifest else "the procedural corpus of nanoCALM"
    seen = states[last].get("seen") or {}
    kinds = seen.get("kinds", [])
    what, task, command = use(args.out, last, kinds, seen.get("letters"))
    sizes = ", ".join(f"{name} {size / 1e6:.1f}M" for name, size in sizes.items())
    steps = ", ".join(f"{name} {state['step']} steps" for name, state in states.items())
    return CARD.format(
        title=os.path.basename(os.path.normpath(args.out)), dtype=args.dtype, sizes=sizes,
        what=what, command=command,
        sample_rate=cfg.vae.sample_rate, channels=cfg.vae.channels, dim=cfg.vae.latent_dim,
        frame_rate=cfg.vae.frame_rate, steps=steps,
        kinds=", ".join(kinds) or "not recorded", notes=notes, data=data,
        licence=args.licence, task=task)


def use(out, last, kinds, letters):
    """What a model does, its task on the hub, and the command that shows it. letters: {kind: the
    characters of its texts}, None = not known.
    """
    run = shlex.quote(out)
    if last == "vae":
        return ("audio to latents and back", "audio-to-audio",
                f"python evaluate.py --run {run} --what vae --manifest clips.jsonl")

    sample = f"python sample.py --run {run}"
    if kinds and "speech" not in kinds:
        sample += f" --kind {kinds[0]}"
    if letters is not None and not any(letters.values()):
        return "audio that goes on from audio", "audio-to-audio", f"{sample} --prompt some.wav"
    task = "text-to-speech" if kinds == ["speech"] else "text-to-audio"
    return "audio from text", task, f'{sample} --text "..."'


def write(path, text):
    with atomic(path) as temp, open(temp, "w", encoding="utf8") as f:
        f.write(text)
