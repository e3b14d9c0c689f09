"""What train.py checks before it trains, and refuses or prints: hours later it would be too late.

    corpus ─────► announce_data ───────► clips, kinds, word times, voice prompts
    config ─────► refuse_missing_init ─► train.STAGE.init is a checkpoint that is there
                  bring_stages_before ─► the VAE of another run, where a language model alone is
                                         trained
    run folder ─► check_checkpoints ───► another [vae], [gan], [lm] or [audiocalm], another
                                     │   optimizer or VAE: refused
                                     └─► other settings or other clips: said
"""
import dataclasses
import json
import math
import os

import numpy as np
import torch

from calm import CALM
from checkpoint import exported_file, folder_of_checkpoints, load_checkpoint, stage_file
from cli import BadInput
from config import (LM_STAGES, STAGES, encoder_id, initial_weights, load_stage, make_model,
                    refuse_other_encoder, refuse_other_table, save_checkpoint, saved_config,
                    table_changes, vae_weights)
from data import texts_left_out
from latents import digest
from manifest import columns, with_other_file
from schema import shown
from vae import VAE


# ---------------------------------------------------------------- the corpus

def announce_data(cfg, clips, valid, say):
    """Print what the corpus has and what it lacks. Errors: BadInput where it lacks word times."""
    say(f"data: {len(clips)} training clips, {len(valid)} held out")
    if set(cfg.stages) & set(LM_STAGES):
        for sentence in texts_left_out(clips, cfg.data, cfg.lm.monologue):
            say(sentence)
    wanted = {kind for kind, weight in cfg.data.weights.items() if weight > 0}
    missing = wanted - {*columns(clips).kinds()}
    if missing:
        say(f"data: no {' and no '.join(sorted(missing))} there; the others share the "
            "weight of data.weights")

    speech, held_out = (columns(part).of_kind("speech") for part in (clips, valid))
    if cfg.lm.monologue and any(STAGES[name].model is CALM for name in cfg.stages):
        announce_words(cfg, speech, held_out, say)
    if cfg.data.prompt_frames and speech and any(name in LM_STAGES for name in cfg.stages):
        announce_prompts(cfg, speech, say)


def announce_words(cfg, speech, held_out, say):
    """How many clips have an inner monologue. BadInput where no training clip has one."""
    aligned = int(speech.column("has_words").sum())
    where = cfg.data.manifest or "the toy corpus"
    if not speech.column("has_text").any():
        raise BadInput(f"lm.monologue: no speech in {where} has a text, which a monologue speaks; "
                       "add the texts, or set lm.monologue = false")
    if not aligned:
        other = "" if cfg.train.lm.init else "; or set lm.monologue = false"
        raise BadInput(f"lm.monologue: no speech in {where} has word times; `python -m "
                       f"corpora.align {where} --out aligned.jsonl` measures them{other}")
    if aligned < len(speech):
        say(f"data: {aligned} of {len(speech)} clips of speech have word times; the text of the "
            "others stands before the audio, as without a monologue (see corpora.align)")
    if held_out and not held_out.column("has_words").any():
        say("data: no held-out speech has word times; its losses are those without a monologue")


def announce_prompts(cfg, speech, say):
    """How many clips of speech can have a voice prompt (latents.LatentBatches.prompt_source)."""
    shortest = math.ceil(cfg.data.prompt_frames / 2)
    frames = np.ceil(speech.seconds() * cfg.vae.frame_rate)

    # another file of the speaker, or what the row leaves of a long clip
    other = with_other_file(speech, frames >= shortest)
    able = int((other | (frames - cfg.data.frames >= shortest)).sum())
    share = f"{cfg.data.prompt_prob:.0%} of their rows get one"
    if not speech.column("speaker").any():
        share += ("; the manifest names no speakers, `python -m corpora.scan DIR --speaker NAME` "
                  "does" if able < len(speech) else "")
    say(f"data: {able} of {len(speech)} clips of speech can have a voice prompt; {share}")


# ---------------------------------------------------------------- checkpoints

def stages_before(stages):
    """The stages that these go on from and that are not among them: of an lm alone the VAE."""
    before = ("vae", *(STAGES[name].after for name in stages))
    return [name for name in STAGES if name in before and name not in stages]


def bring_stages_before(cfg, say):
    """Copy the finished stages that those of cfg go on from, from their train.STAGE.init (--from
    sets it), where the run folder lacks them. Errors: BadInput where they do not fit.
    """
    for name in stages_before(cfg.stages):
        source = getattr(cfg.train, name).init
        path = stage_file(cfg.out, name)
        if os.path.exists(path) or exported_file(path):
            continue
        if not source:
            raise BadInput(f"--stages {','.join(cfg.stages)}: {cfg.out} has no {name} yet; put "
                           f"{name} before them, or name the one to take, --train.{name}.init FILE "
                           "or --from RUN")
        state = load_stage(source, name)
        if not state["done"]:
            raise BadInput(f"{source}: its training is not finished; put \"{name}\" before "
                           f"\"{cfg.stages[0]}\" in stages, it goes on from there")
        refuse_other_table(source, saved_config(state, source), cfg, STAGES[name].table)
        if name != "vae":
            refuse_other_encoder(state, finished_encoder(cfg), source, f"{cfg.out}/vae.pt")
        save_checkpoint(path, state)
        say(f"{name}: copied from {exported_file(source) or source}")


def refuse_missing_init(cfg, fresh):
    """BadInput where a stage that begins now is to start from a checkpoint that is not there."""
    for name in (*stages_before(cfg.stages), *cfg.stages):
        init = getattr(cfg.train, name).init
        begins = fresh and name in cfg.stages or not os.path.exists(stage_file(cfg.out, name))
        if init and begins and not (os.path.exists(init) or exported_file(init)):
            raise BadInput(f"train.{name}.init: {init}: no such checkpoint; train that run first")
        if init and begins and os.path.isdir(init):
            raise BadInput(f"train.{name}.init: {folder_of_checkpoints(init)}")

    teacher = cfg.train.distill.teacher
    if "distill" in cfg.stages and os.path.isdir(teacher):
        raise BadInput(f"train.distill.teacher: {folder_of_checkpoints(teacher)}")


def refuse_other_sizes(cfg, name, path):
    """BadInput where a stage's model has other weights than a checkpoint to begin with, naming the
    first and the settings that differ.
    """
    state = load_checkpoint(path)
    saved = saved_config(state, path)
    weights = initial_weights(state, name)
    with torch.device("meta"):
        model = VAE(cfg.vae) if name == "vae" else make_model(cfg, name)
    here = {key: tuple(weight.shape) for key, weight in model.state_dict().items()}
    there = {key: tuple(weight.shape) for key, weight in weights.items()}
    other = [key for key in {**here, **there} if here.get(key) != there.get(key)]
    if not other:
        return

    key = other[0]
    tables = ("vae",) if name == "vae" else (STAGES[name].table, "vae")
    changes = [f"[{table}] {old}, here {new}" for table in tables
               for old, new in table_changes(saved, cfg, table)]
    if saved.data.tokenizer != cfg.data.tokenizer:
        changes.append(f"[data] tokenizer = \"{saved.data.tokenizer}\", here "
                       f"\"{cfg.data.tokenizer}\"")
    raise BadInput(f"{path}: {len(other)} weights have other sizes than those of this config's "
                   f"{name}, e.g. {key} {there.get(key, 'none')}, here {here.get(key, 'none')}; "
                   f"settings that differ: {'; '.join(changes[:3]) or 'none'}; give --config "
                   f"{os.path.dirname(path)}/config.toml, or another run")


def check_same_model(cfg, path, name, saved):
    """BadInput where a checkpoint's config `saved` has other model tables than the run's."""
    for table in ("vae", "gan") if name == "vae" else ("vae", STAGES[name].table):
        refuse_other_table(path, saved, cfg, table)


def note_changed_training(cfg, path, name, state, saved, clips, say):
    """Print what of its training differs from the checkpoint's: of a finished stage, which will not
    be trained again, and of one that resumes. clips: those of the run, for training.
    """
    if state["done"]:
        sentence = (f"{name}: was trained with {{}}, not {{}}, and is finished; "
                    f"to train on, {to_train_on(cfg, name)}")
        other_clips = f"{name}: was trained on other clips, and is finished"
    else:
        sentence = f"{name}: trained with {{}} to step {state['step']}, and resumes with {{}}"
        other_clips = (f"{name}: resumes on other clips than those of its first {state['step']} "
                       "steps")

    # [train.NAME], what of [data] the batches depend on, and the run's own keys
    for old, new in [*training_changes(saved, cfg, name), *data_changes(saved, cfg),
                     *run_changes(saved, cfg)]:
        say(sentence.format(old, new))
    if not same_clips(state.get("clips", ""), clips):
        say(other_clips)


def to_train_on(cfg, name):
    """The options that train a stage on, and what goes on from it, in another folder."""
    stages = [other for other in cfg.stages if name in ("vae", other, STAGES[other].after)]
    return f"use --out DIR --from {cfg.out} --stages {','.join(stages)}"


def refuse_other_optimizer(cfg, path, name, state, saved):
    """BadInput where a stage would resume with an optimizer that cannot read the saved state."""
    old, new = (getattr(c.train, name).optimizer for c in (saved, cfg))
    if old != new and not state["done"]:
        raise BadInput(f"{path}: trained with train.{name}.optimizer = {old} to step "
                       f"{state['step']}, whose state {new} cannot go on with; set it back, use "
                       f"--fresh, or {to_train_on(cfg, name)}")


def note_changed_runtime(name, state, how, say):
    """Print what differs between the processes that saved a checkpoint and those that resume:
    positions of a forward pass count equally. how: {"dtype": "fp32", "rows of a forward pass": 8,
    ...}.
    """
    for key, old in state.get("runtime", {}).items():
        if key in how and old != how[key]:
            say(f"{name}: trained with {key} = {shown(old)} to step {state['step']}, and resumes "
                f"with {how[key]}: another rounding from here on")


def run_changes(saved, cfg):
    """[("seed = 0", 1), ...] of the keys that stand in no table, and of the toy corpus."""
    changes = [(f"{key} = {getattr(saved, key)}", getattr(cfg, key))
               for key in ("seed", "dtype") if getattr(saved, key) != getattr(cfg, key)]
    if not (saved.data.manifest or cfg.data.manifest):
        old, new = (dataclasses.asdict(c.toy) for c in (saved, cfg))
        changes += [(f"toy.{key} = {old[key]}", new[key]) for key in old if old[key] != new[key]]
    return changes


def training_changes(saved, cfg, name):
    """[("lr = 0.01", 0.02), ...] of [train.NAME], without what does not change the weights."""
    old, new = (dataclasses.asdict(getattr(c.train, name)) for c in (saved, cfg))
    # without --from the second time, a run goes on from its own weights
    ignored = {"init"} if not new["init"] else set()
    return [(f"{key} = {old[key]}", new[key]) for key in old
            if old[key] != new[key] and key not in ignored and not key.endswith("_every")]


def data_changes(saved, cfg):
    """[("data.frames = 64", 80), ...], without paths, which digest_of sees, and speed. ram_gb
    decides whether a crop is cut before or after it is resampled.
    """
    ignored = ("manifest", "valid", "latents", "workers", "processes")
    old, new = (dataclasses.asdict(c.data) for c in (saved, cfg))
    return [(f"data.{key} = {old[key]}", new[key]) for key in old
            if old[key] != new[key] and key not in ignored]


def digest_of(clips):
    """What names the training clips, without their place on the disk: "crc", 16 hex digits of the
    manifest's fields, and 16 of the sizes of the audio files.
    """
    clips = columns(clips)
    columns_of = (clips.column(name).view(np.uint8) for name in ("fields", "bytes"))
    return " ".join(("crc", *(digest(torch.from_numpy(column)) for column in columns_of)))


def earlier_digest_of(clips):
    """digest_of as checkpoints of 2026-11-27 and before have it: clip by clip."""
    fields = digest(json.dumps([[c.id, c.text, c.kind, c.speaker, c.words] for c in clips]))
    return f"{fields} {digest(columns(clips).column('bytes').tolist())}"


def same_clips(old, clips):
    """Whether the digest that a checkpoint has names these clips; the oldest lack the sizes."""
    new = digest_of(clips) if old.startswith("crc ") else earlier_digest_of(clips)
    return all(a == b for a, b in zip(old.split(), new.split()))


def check_checkpoints(cfg, clips, say):
    """Compare the checkpoints in the run folder with the config -> {stage: whether finished}."""
    encoder = finished_encoder(cfg)
    done = {}
    for name in cfg.stages:
        path = stage_file(cfg.out, name)
        done[name] = False
        if os.path.exists(path):
            state = load_stage(path, name)
            saved = saved_config(state, path)
            check_same_model(cfg, path, name, saved)
            refuse_other_optimizer(cfg, path, name, state, saved)
            if name in LM_STAGES and encoder:
                refuse_other_encoder(state, encoder, path, f"{cfg.out}/vae.pt")
            note_changed_training(cfg, path, name, state, saved, clips, say)
            done[name] = state["done"]
    return done


def finished_encoder(cfg):
    """encoder_id of the run's VAE, "" while it is not there or not finished."""
    path = f"{cfg.out}/vae.pt"
    state = load_stage(path, "vae") if os.path.exists(path) else {"done": False}
    return encoder_id(vae_weights(state)) if state["done"] else ""
