"""The papers' tables and figures, ours beside theirs. Commands of tools/studies.py:

    python -m tools.studies table2 --calm RUN --rq RUN [--whisper base] [--text-model NAME]
    python -m tools.studies table3 RUN RUN ...           any VAEs and RVQ codecs
    python -m tools.studies table4 --calm RUN --rq RUN --rq16 RUN --delay RUN --kind music
    python -m tools.studies table6 --calm RUN --kind music --steps 1,4,10,25,50,100
    python -m tools.studies table8                       sizes of the configs, on no memory
    python -m tools.studies fig3   --calm RUN --rq RUN --kind speech
    python -m tools.studies audiocalm --calm RUN

    held-out clips ─┬─► a row's run, with the row's settings ─► figures ─► ours  ─┐
                    └─► the others, or --reference ─► yardstick ──┘               ├─► table
                                                  paper_tables.py ─► paper ───────┘
    tables 5 and 7, Fig. 2: ablation_tables.py

A row without a run shows the paper alone. Ours: value [95 % interval over clips]. Speed-ups are
relative to --rq where it is given, else to the first row with a run; they are of seconds per
second of audio, without the decoder. FAD and MMD² are in the embedding of --embedding (the papers:
VGGish) and cannot be compared with the paper's numbers, only their order can. --answers takes the
answers of a listening test (tools/listen.py), whose systems have the names of the rows' labels.
"""
from dataclasses import replace

import torch
from tqdm import tqdm

from cli import BadInput, check_writable
from config import load, make_model, open_run
from data import KINDS, load_manifest, split_off
from embeddings import embed_clip, log_mel, open_embedding, resample
from evaluate import held_out_clips
from figures import write_json
from intervals import Figure, bootstrap, drawn_evenly
from judges import opening
from reconstruction import load_clip, si_sdr
from report import pyplot, save_picture
from speech_metrics import AUDIO_RATE, SPEECH_RATE, Visqol, open_speaker
from tools import listen, systems
from tools.measure import (Listener, Yardstick, facts, mean_similarity, split_reference,
                           time_generations, unit_vectors)
from tools.paper_tables import TABLES
from tools.systems import Contestant, System

PAPER_CONFIGS = "configs/paper"
# head that a row's run must have
OBJECTIVES = {"calm": "consistency", "flow": "trigflow", "rq": "rq", "rq16": "rq",
              "delay": "delay"}
# how numbers of a column are printed, others with three digits
FORMATS = {"overall": "x{:.1f}", "sampler": "x{:.1f}", "share": "{:.1%}"}


# ---------------------------------------------------------------------------- rows to systems


def run_of(role, a):
    """(run, stage) of a row's role on the command line; ("", "") where it is not given.

    TrigFlow is the stage lm of --flow, or of --calm where a stage went on from it.
    """
    if role != "flow":
        return (vars(a).get(role) or "", "")
    if a.flow:
        return (a.flow, "lm")
    stages = systems.find_stages(a.calm) if a.calm else []
    return (a.calm, "lm") if "lm" in stages and stages[-1] != "lm" else ("", "")


def open_role(role, system):
    """The Contestant of a row's system; BadInput where its head is not what the row says."""
    contestant = systems.open_system(system)
    objective = contestant.lm.cfg.head.objective
    if objective != OBJECTIVES[role]:
        raise BadInput(f"--{role} {system.run}: its last stage has a head of {objective}, and the "
                       f"row '{system.name}' is of {OBJECTIVES[role]}")
    return contestant


def system_of(row, a):
    """The System of a row of a table, None where no run stands for it."""
    if row.role == "reference":
        return systems.REFERENCE
    run, stage = run_of(row.role, a)
    return System(row.label, run, stage, dict(row.options)) if run else None


def open_rows(rows, a):
    """{label: Contestant} of the rows that have a run."""
    found = {}
    for row in rows:
        system = system_of(row, a)
        if system and system.run:
            found[row.label] = open_role(row.role, system)
    if not found:
        raise BadInput("no run is given; name at least one, e.g. --calm out/quickstart")

    first = next(iter(found.values()))
    for row in rows:
        if row.role == "reference":
            found[row.label] = Contestant(systems.REFERENCE, first.cfg, first.vae, None, {})
    return {row.label: found[row.label] for row in rows if row.label in found}


def choose(contestants, kind, a):
    """(clips to generate, the Yardstick of the others or of --reference)."""
    models = [contestant for contestant in contestants.values() if contestant.lm is not None]
    clips = systems.choose_clips(models, kind, a.task, None, a.manifest)
    chosen, rest = split_with_reference(clips, models[0].system.run, models[0].cfg, kind, a)
    return chosen, Yardstick(a.embedding, rest, models[0].vae.cfg, a.fad_dims)


def split_with_reference(clips, run, cfg, kind, a):
    """Clips to judge, and real ones to compare with: the others, or those of --reference."""
    chosen, rest = split_reference(clips, a.samples)
    if not chosen:
        raise BadInput(f"{run}: no held-out clips of {kind}; give --manifest, or another --kind")
    if a.reference:
        rest = reference_clips(a.reference, run, cfg, kind, a.reference_limit)
    if len(rest) < 4:
        raise BadInput(f"{kind}: {len(rest)} held-out clips are left to compare with; lower "
                       "--samples or give --reference")
    return chosen, rest


def reference_clips(reference, run, cfg, kind, limit):
    """Clips of a kind of a manifest; "train": those that a run was trained on."""
    if reference == "train":
        clips = load_manifest(cfg.data.manifest or f"{run}/toy/train.jsonl")
    else:
        clips = load_manifest(reference)
    if reference == "train" and cfg.data.manifest and not cfg.data.valid:
        clips, _ = split_off(clips, cfg.data.seed)
    return drawn_evenly([clip for clip in clips if clip.kind == kind], limit)


# ---------------------------------------------------------------------------- figures of one row


def judge(contestant, clips, yardstick, kind, a, listener=None):
    """Figures of one row's generations -> {column: Figure}."""
    wavs = systems.generate(contestant, clips, kind, a.task, a.seed)
    rate = contestant.vae.cfg.sample_rate
    found = yardstick.distances(wavs, rate)
    if a.task == "text":
        right = facts(wavs, clips, rate)
        found |= {"facts": right} if right else {}
    if listener:
        found |= listener.judge(wavs, clips, rate, a.task == "text")
    return found


def speed_columns(speeds, baseline):
    """{label: {"overall", "sampler", "share"}}: speed-ups of Speeds to that of `baseline`."""
    base = speeds[baseline]
    found = {}
    for label, speed in speeds.items():
        per_second = speed.total * speed.frame_rate
        head = speed.sampler * speed.frame_rate
        found[label] = {"overall": base.total * base.frame_rate / per_second,
                        "sampler": base.sampler * base.frame_rate / head,
                        "share": head / per_second}
    return found


def heard_columns(paths, labels):
    """{row: {"quality", "elo", "rank"}} of the answers of a listening test, whose systems are named
    as rows of the table; commas, which a system's name cannot have, and capitals do not count.
    """
    if not paths:
        return {}
    scores = listen.score_answers(listen.read_answers(paths))
    rows = {label.replace(",", "").lower(): label for label in labels}
    unknown = [name for name in scores if name.lower() not in rows]
    if unknown:
        raise BadInput(f"--answers: no row of the table is named {', '.join(unknown)}; in the test, "
                       f"name=... is one of {', '.join(rows)}")

    found = {}
    for name, row in scores.items():
        points = [round(value) for value in row["elo"]]
        found[rows[name.lower()]] = {"elo": Figure(*points, row["comparisons"]),
                                     "quality": row["quality"], "rank": row["rank"]}
    return found


def compare(name, a, with_words=False):
    """Tables 2 and 4: figures, seconds and votes of every row that has a run."""
    table = TABLES[name]
    if a.text_model and not a.whisper:
        raise BadInput("--text-model: PPX is that of transcripts; give --whisper as well")
    heard = heard_columns(a.answers, [row.label for row in table.rows])
    contestants = open_rows(table.rows, a)
    clips, yardstick = choose(contestants, a.kind, a)
    listener = Listener(a.whisper, a.text_model) if with_words and a.whisper else None

    ours = {}
    for label, contestant in tqdm(contestants.items(), desc=name, leave=False):
        ours[label] = judge(contestant, clips, yardstick, a.kind, a, listener)
    models = {label: c for label, c in contestants.items() if c.lm is not None}
    speeds = time_generations(models, a.kind, a.seconds, a.repeats)

    # speed-ups to the paper's baseline, where there is one
    baseline = next((row.label for row in table.rows if row.role == "rq" and row.label in speeds),
                    next(iter(speeds)))
    for label, columns in speed_columns(speeds, baseline).items():
        ours[label] |= columns
    for label in ours:
        ours[label] |= heard.get(label, {})
    print(f"{len(clips)} generations of {a.kind} per row ({a.task}); {len(yardstick.vectors)} real "
          f"clips, {a.embedding}; speed relative to {baseline}, {a.seconds:g} s of audio")
    return finish(name, ours, a)


def table2(a):
    return compare("table2", a, with_words=True)


def table4(a):
    return compare("table4", a)


# ---------------------------------------------------------------------------- table 3


@torch.no_grad()
def reconstruct(vae, clips, visqol=None):
    """Reconstructions of clips -> (their waveforms, {column: Figure} of pairs)."""
    rate = vae.cfg.sample_rate
    wavs = []
    errors = {"si_sdr": [], "log_mel": [], "visqol": []}
    for clip in tqdm(clips, desc="reconstruct", leave=False):
        wav = load_clip(clip, vae.cfg, seconds=20.0)
        rec = vae.decode(vae.encode(wav[None])[0])[0, :, :wav.shape[-1]]        # (ch, S)
        wavs.append(rec)
        if wav.shape[-1] >= 2048 and wav.abs().max() > 1e-3:
            errors["si_sdr"].append((si_sdr(wav, rec), 1))
            errors["log_mel"].append(((log_mel(wav, rate) - log_mel(rec, rate)).abs().mean(), 1))
            score = visqol and visqol.score(resample(wav, rate, AUDIO_RATE),
                                            resample(rec, rate, AUDIO_RATE))
            if score is not None:
                errors["visqol"].append((score, 1))
    return wavs, {name: bootstrap(values) for name, values in errors.items() if values}


def table3(a):
    """Reconstruction by every run's VAE or codec."""
    visqol = open_visqol() if a.visqol else None
    ours = {}
    for run in a.runs:
        cfg, vae, _, _ = open_run(run)
        clips = [clip for clip in held_out_clips(run, a.manifest, cfg) if clip.kind == a.kind]
        chosen, rest = split_with_reference(clips, run, cfg, a.kind, a)
        wavs, found = reconstruct(vae, chosen, visqol)
        yardstick = Yardstick(a.embedding, rest, vae.cfg, a.fad_dims)
        ours[run] = codec_columns(vae.cfg) | found | yardstick.distances(wavs, vae.cfg.sample_rate)
    print(f"{a.samples} clips of {a.kind} at most; log-mel: mean |log10 mel| difference")
    return finish("table3", ours, a)


def open_visqol():
    """ViSQOL in audio mode, the paper's."""
    with opening("--visqol", "eval"):
        return Visqol("audio")


def codec_columns(cfg):
    """What a VAE's or codec's config says: dimensions or levels, frames per second, kbit/s."""
    if cfg.bottleneck != "rvq":
        return {"size": f"{cfg.latent_dim} dims", "frame_rate": f"{cfg.frame_rate:g}"}
    bits = (cfg.codebook_size - 1).bit_length() * cfg.codebooks * cfg.frame_rate
    return {"size": f"{cfg.codebooks} RVQ", "frame_rate": f"{cfg.frame_rate:g}",
            "bitrate": f"{bits / 1000:g}"}


# ---------------------------------------------------------------------------- table 6


def table6(a):
    """Seconds and quality over the steps of the head, of TrigFlow and of consistency."""
    rows = {"calm": System("consistency", *run_of("calm", a)),
            "flow": System("TrigFlow", *run_of("flow", a))}
    opened = {role: open_role(role, s) for role, s in rows.items() if s.run}
    if "calm" not in opened:
        raise BadInput("table6: needs --calm, a run with a consistency stage")
    clips, yardstick = choose(opened, a.kind, a)

    ours = {str(steps): {} for steps in a.steps}
    timed = {}
    for steps in tqdm(a.steps, desc="table6", leave=False):
        for role, contestant in opened.items():
            contestant = replace(contestant, options=contestant.options | {"steps": steps})
            found = judge(contestant, clips, yardstick, a.kind, a)
            ours[str(steps)] |= {f"{role}_{name}": figure for name, figure in found.items()}
            if role == "calm":
                timed[str(steps)] = contestant

    # seconds, of all numbers of steps in turn
    for steps, speed in time_generations(timed, a.kind, a.seconds, a.repeats).items():
        ours[steps] |= {"seconds": speed.seconds_for(30), "rtf": 1 / speed.seconds_for(1)}
    print(f"{len(clips)} generations of {a.kind} per cell ({a.task}); {len(yardstick.vectors)} "
          f"real clips, {a.embedding}; seconds are those of 30 s of audio, measured on "
          f"{a.seconds:g} s")
    if a.picture:
        draw_steps(a.picture, ours)
    return finish("table6", ours, a)


def draw_steps(path, ours):
    """Distances of TrigFlow and consistency against the steps -> a png."""
    fig, axes = pyplot().subplots(1, 2, figsize=(8, 3), layout="constrained")
    for ax, name in zip(axes, ("fad", "mmd")):
        for role, label in (("flow", "TrigFlow"), ("calm", "consistency")):
            points = [(int(steps), row[f"{role}_{name}"]) for steps, row in ours.items()
                      if f"{role}_{name}" in row]
            draw_figures(ax, points, label)
        ax.set_xscale("log")
        ax.set_xlabel("steps")
        ax.set_title({"fad": "FAD", "mmd": "MMD²"}[name], fontsize=9)
    axes[0].legend(fontsize=8)
    save_picture(fig, path, dpi=100)


def draw_figures(ax, points, label):
    """A line through [(x, Figure)] with its intervals as bars."""
    if not points:
        return
    xs, figures = zip(*points)
    middle = [figure.value for figure in figures]
    below = [f.value - f.low if f.low is not None else 0 for f in figures]
    above = [f.high - f.value if f.low is not None else 0 for f in figures]
    ax.errorbar(xs, middle, [below, above], fmt="o-", ms=3, capsize=2, label=label)


# ---------------------------------------------------------------------------- table 8


def table8(a):
    """Parameters of the paper's configs, counted without memory."""
    ours = {}
    for row in TABLES["table8"].rows:
        cfg = load(f"{PAPER_CONFIGS}/{row.label}.toml")
        with torch.device("meta"):
            lm = make_model(cfg, "lm")
        ours[row.label] = {"backbone": f"{count(lm.backbone) / 1e9:.2f}B",
                           "parameters": f"{count(lm) / 1e9:.2f}B"}
    return finish("table8", ours, a)


def count(module):
    return sum(p.numel() for p in module.parameters())


# ---------------------------------------------------------------------------- figure 3


def fig3(a):
    """Similarity of unprompted generations over the temperature (CALM Fig. 3)."""
    labels = {"calm": "CALM", "rq": "RQ-Transformer"}
    opened = {labels[role]: open_role(role, System(labels[role], *run_of(role, a)))
              for role in labels if run_of(role, a)[0]}
    if not opened:
        raise BadInput("fig3: needs --calm, --rq or both")
    first = next(iter(opened.values()))
    real = systems.choose_clips([first], a.kind, "free", a.samples, a.manifest)

    # vectors of the recordings, and what every vector is taken relative to
    embed = open_voice(a.speaker)
    recordings = [load_clip(clip, first.vae.cfg, a.seconds) for clip in real]
    vectors = [embed(wav, first.vae.cfg.sample_rate) for wav in recordings]
    centre = sum(vectors) / len(vectors) if a.speaker == "mel" else 0
    ours = {"recordings": {"-": mean_similarity(unit_vectors(vectors, centre))}}

    # generations from nothing, at each temperature
    for label, contestant in opened.items():
        ours[label] = {}
        contestant.cfg.sample.seconds = a.seconds
        for temperature in tqdm(a.temperatures, desc=label, leave=False):
            contestant.options["temperature"] = temperature
            wavs = [wav for i in range(0, a.samples, systems.BATCH)
                    for wav in systems.continue_clips(
                        contestant, real[:1] * min(systems.BATCH, a.samples - i), a.kind, "free",
                        a.seed + i)]
            found = [embed(wav, contestant.vae.cfg.sample_rate) for wav in wavs]
            ours[label][f"{temperature:g}"] = mean_similarity(unit_vectors(found, centre))

    print(f"CALM Fig. 3: mean similarity over pairs of {a.samples} unprompted generations of "
          f"{a.kind}, at most {a.seconds:g} s, {a.speaker}; {len(real)} recordings")
    print_curves(ours)
    if a.picture:
        draw_similarity(a.picture, ours)
    return {"fig3": {label: {x: value_of(figure) for x, figure in row.items()}
                     for label, row in ours.items()}}


def open_voice(name):
    """A function of (wav, rate) to a vector: mel, or a speaker embedding (speech_metrics.py)."""
    if name == "mel":
        model = open_embedding(name)
        return lambda wav, rate: embed_clip(model, wav, rate).mean(0)
    with opening(f"--speaker {name}", "eval,hf"):
        speaker = open_speaker(name)
    return lambda wav, rate: speaker.embed(resample(wav, rate, SPEECH_RATE))


def print_curves(curves):
    """One line per curve, a column per x."""
    for label, row in curves.items():
        print(f"{label:20s}" + "".join(f"{x:>6s}: {figure!s:24s}" for x, figure in row.items()))


def draw_similarity(path, ours):
    """Fig. 3: a curve per model, the recordings as a dotted line -> a png."""
    fig, ax = pyplot().subplots(figsize=(5, 3.2), layout="constrained")
    for label, row in ours.items():
        if label == "recordings":
            ax.axhline(row["-"].value, ls=":", color="k", label=label)
        else:
            draw_figures(ax, [(float(x), figure) for x, figure in row.items()], label)
    ax.set_xlabel("temperature")
    ax.set_ylabel("mean pairwise similarity")
    ax.legend(fontsize=8)
    save_picture(fig, path, dpi=100)


# ---------------------------------------------------------------------------- AudioCALM


def audiocalm(a):
    """AudioCALM's table: speech, sound and music of one run."""
    if not a.calm:
        raise BadInput("audiocalm: needs --calm, a run of AudioCALM")
    ours = {}
    for kind in KINDS:
        contestants = {kind: systems.open_system(System(kind, a.calm))}
        try:
            clips, yardstick = choose(contestants, kind, a)
        except BadInput as e:
            print(f"{kind}: left out, {e}")
            continue
        listener = Listener(a.whisper) if a.whisper and kind == "speech" else None
        ours[kind] = judge(contestants[kind], clips, yardstick, kind, a, listener)
    return finish("audiocalm", ours, a)


# ---------------------------------------------------------------------------- printing


def text_of(column, value):
    """A cell: a Figure with its interval, a number as the paper prints it, a text, "-" for None."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return FORMATS.get(column, "{:.3g}").format(value)
    return str(value)


def value_of(value):
    """A cell for JSON: [value, low, high] of a Figure."""
    return [value.value, value.low, value.high] if isinstance(value, Figure) else value


def print_rows(table, columns, ours):
    """Two lines per row of a table, the paper's and ours; rows that only we have at the end."""
    paper = {row.label: row.paper for row in table.rows}
    labels = list(dict.fromkeys([*paper, *ours]))
    width = max(map(len, labels)) + 2
    cells = {(label, side): [text_of(name, row.get(label, {}).get(name)) for name in columns]
             for label in labels for side, row in (("paper", paper), ("ours", ours))}
    widths = [2 + max(len(heading), *(len(row[i]) for row in cells.values()))
              for i, heading in enumerate(columns.values())]

    print(table.title)
    print(" " * (width + 7) + "".join(f"{h:>{w}s}" for h, w in zip(columns.values(), widths)))
    for label in labels:
        for side, row in (("paper", paper), ("ours", ours)):
            if label in row:
                line = "".join(f"{c:>{w}s}" for c, w in zip(cells[label, side], widths))
                name = label if side == "paper" or label not in paper else ""
                print(f"{name:{width}s}{side:7s}{line}")


def finish(name, ours, a):
    """Print a table, leaving out columns without figures -> what --json writes."""
    table = TABLES[name]
    rows = [*ours.values(), *(row.paper for row in table.rows)]
    columns = {column: heading for column, heading in table.columns.items()
               if any(row.get(column) is not None for row in rows)}
    print_rows(table, columns, ours)
    return {name: {label: {column: value_of(value) for column, value in row.items()}
                   for label, row in ours.items()}}


def run_table(a):
    """A command of tools/studies.py: one table, printed and written."""
    for path in filter(None, (a.json, vars(a).get("picture"))):
        check_writable(path)
    if a.threads:
        torch.set_num_threads(a.threads)
    figures = a.table(a)
    if a.json:
        write_json(a.json, figures)
