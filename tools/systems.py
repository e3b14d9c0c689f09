"""What a study or a listening test compares: models, each with its way of sampling, on the same
held-out clips.

    "out/quickstart,stage=lm,steps=20" ─► parse ─► System ─► open ─► Contestant ─┐
    "reference"                        ─► the recordings themselves              ├─► wavs, one
                                                   held-out clips ─► choose ─────┘   per clip

A system is a run folder and, after commas, what is set differently: stage, steps, temperature, cfg,
noise, and name, which tables print. Three tasks:
  text      the clip's text is spoken or its caption turned into sound
  continue  the clip's first seconds (sample.prompt_seconds) are continued without text (CALM 5)
  free      nothing is given but the kind (CALM Fig. 3)

Errors: BadInput where a system cannot be read or opened, or no clip is left to compare on.
"""
from argparse import ArgumentTypeError
from dataclasses import dataclass, field

import torch

from cli import BadInput, number
from config import Config, open_run
from data import KINDS, encode_text, seconds_of
from evaluate import find_stages, held_out_clips, open_stage
from generate import refuse_steps, render, sampling_options
from generations import choose_targets, generate_texts, voice_prompt
from intervals import drawn_evenly
from prompts import encode_prompt
from reconstruction import load_clip

TASKS = ("text", "continue", "free")
BATCH = 32                              # clips continued at once
# setting of a system -> type of its value
SETTINGS = {"name": str, "stage": str, "steps": number(int, 1), "temperature": number(float, 0),
            "cfg": number(float), "noise": number(float, 0, 1)}


@dataclass
class System:
    """One row of a comparison; run "" = the recordings themselves."""
    name: str
    run: str = ""
    stage: str = ""
    # steps, temperature, guidance, noise: those that differ from the run's own
    options: dict = field(default_factory=dict)


@dataclass
class Contestant:
    """A system whose model is open. lm None = the recordings themselves."""
    system: System
    cfg: Config
    vae: torch.nn.Module
    lm: torch.nn.Module | None
    # what lm.generate gets: steps, temperature, guidance, noise, ...
    options: dict


REFERENCE = System("reference")


def parse(text):
    """ "out/quickstart,stage=lm,steps=20" -> System."""
    if text == REFERENCE.name:
        return REFERENCE
    run, *settings = text.split(",")
    values = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if key not in SETTINGS or not equals:
            raise BadInput(f"{text}: '{setting}' is no setting; valid after the run: "
                           f"{', '.join(f'{key}=...' for key in SETTINGS)}")
        try:
            values[key] = SETTINGS[key](value)
        except ArgumentTypeError as e:
            raise BadInput(f"{text}: {key}: {e}") from None

    name = values.pop("name", text.rstrip("/").removeprefix("out/"))
    stage = values.pop("stage", "")
    if "cfg" in values:
        values["guidance"] = values.pop("cfg")
    return System(name, run, stage, values)


def parse_all(texts):
    """Systems of different names from the words of a command line."""
    systems = [parse(text) for text in texts]
    names = [system.name for system in systems]
    for name in names:
        if names.count(name) > 1:
            raise BadInput(f"{name}: is named twice; add name=... to one of the systems")
    return systems


def open_system(system):
    """The Contestant of a system that has a run."""
    cfg, vae, _, _ = open_run(system.run)
    stages = find_stages(system.run, system.stage)
    if not stages:
        raise BadInput(f"{system.run}: has no language model to generate with")
    lm = open_stage(system.run, stages[-1])
    refuse_steps(lm, system.options.get("steps"), f"{system.name}: steps")
    options = sampling_options(cfg.sample) | {"steps": lm.cfg.head.sample_steps} | system.options
    return Contestant(system, cfg, vae, lm, options)


def open_all(systems):
    """A Contestant for each system; the recordings are read as the first run would read them."""
    models = {system.name: open_system(system) for system in systems if system.run}
    if not models:
        raise BadInput("reference: is no run; give at least one run folder beside it")
    first = next(iter(models.values()))
    recordings = Contestant(REFERENCE, first.cfg, first.vae, None, {})
    return [models.get(system.name, recordings) for system in systems]


def choose_clips(contestants, kind, task, limit, manifest=None):
    """At most `limit` held-out clips of one kind, on which every contestant can be compared.

    limit None: all of them. manifest: where they are; default: the held-out clips of the first run.
    """
    first = contestants[0]
    models = [c for c in contestants if c.lm is not None]
    clips = held_out_clips(models[0].system.run, manifest, first.cfg)
    clips = [clip for clip in clips if clip.kind == kind]

    # what a text, or a continuation, needs
    if task == "text":
        for model in models:
            clips = list(choose_targets(clips, kind, model.cfg.data, len(clips)).values())
        needed = "with a text that fits the models"
    else:
        seconds = first.cfg.sample.prompt_seconds if task == "continue" else 0
        clips = [clip for clip in clips if seconds_of(clip) > seconds]
        needed = f"longer than {seconds:g} s (sample.prompt_seconds)" if seconds else ""

    if not clips:
        raise BadInput(f"{kind}: no held-out clip {needed}; give --manifest or another --kind")
    return clips if limit is None else drawn_evenly(clips, limit)


@torch.no_grad()
def generate(contestant, clips, kind, task, seed=0):
    """One waveform (ch, S) of a contestant for each clip of a kind, in their order. Equal seeds
    give equal waveforms.
    """
    if contestant.lm is None:
        return recordings(contestant, clips, task)
    if task == "text":
        return speak_texts(contestant, clips, kind, seed)
    wavs = []
    for i in range(0, len(clips), BATCH):
        wavs += continue_clips(contestant, clips[i:i + BATCH], kind, task, seed + i)
    return wavs


def recordings(contestant, clips, task):
    """The clips themselves, as long as a generation may get."""
    cfg = contestant.cfg
    seconds = cfg.sample.seconds + cfg.sample.prompt_seconds * (task == "continue")
    return [load_clip(clip, cfg.vae, seconds) for clip in clips]


def speak_texts(contestant, clips, kind, seed):
    """Generations from the clips' texts: with seed s those of evaluate.py's repeat s."""
    cfg = contestant.cfg
    voices = {clip.text: voice_prompt(clip, clips, contestant.lm, contestant.vae, cfg)
              for clip in clips}
    found = generate_texts(contestant.lm, contestant.vae, cfg, kind, list(voices), voices, 1,
                           contestant.options, first=seed)
    wavs = {text: wav for text, _, wav in found}
    return [wavs[clip.text] for clip in clips]


def continue_clips(contestant, clips, kind, task, seed):
    """Continuations of the clips' first seconds, behind the prompt's reconstruction; task "free":
    as many generations from nothing.
    """
    cfg = contestant.cfg
    vae = contestant.vae
    lm = contestant.lm
    history = None
    if task == "continue":
        prompts = [load_clip(clip, vae.cfg, cfg.sample.prompt_seconds)[None] for clip in clips]
        history = torch.cat([encode_prompt(lm, vae, prompt) for prompt in prompts])  # (B, P, D)

    tokens = torch.tensor([encode_text("", kind, cfg.data)] * len(clips), dtype=torch.long)
    return render(lm, vae, tokens, kind=KINDS.index(kind), seconds=cfg.sample.seconds,
                  history=history, generator=torch.Generator().manual_seed(seed),
                  **contestant.options)
