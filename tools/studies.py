"""Studies of trained models on held-out clips, and the papers' tables and figures.

    python -m tools.studies sweep --run out/quickstart --setting steps [--values 1,2,4,10]
    python -m tools.studies continue --run out/real_small [--wavs DIR]
    python -m tools.studies draws --run out/quickstart [--repeats 24]
    python -m tools.studies distance --run out/quickstart [--reference train]
    python -m tools.studies table2|table3|table4|table6|table8|fig3|audiocalm ...     (tables.py)
    python -m tools.studies table5|table7|fig2 ...                           (ablation_tables.py)

    sweep     held-out texts ─► generations at every value of one setting ─► evaluate.py's figures
    continue  first seconds ──► continuations ──► level, distance to real audio, beat, by second
    draws     held-out texts ─► samples of the first latents ◄─ energy distance ─► the flow's
    distance  held-out texts ─► generations ─► FAD, MMD² to other real clips, facts right
    table4 .. every row's generations ─► its figures, beside those that the paper prints

sweep: generates with the last stage (or --stage) at several values of one setting: steps of the
head (CALM Table 6), temperature (CALM Fig. 3), cfg, noise. Prints a table; --wavs gets a picture of
the curves.

continue: continues the first seconds of held-out clips (sample.prompt_seconds) for sample.seconds,
without text. For each second of new audio: the share of clips that go on, their level, their
distance to real seconds, their beat (continuation.py). The first column holds the figures of the
prompts' reconstructions. A fade, a drift to noise, a lost beat or an early end show as curves;
--wavs gets the audio and a picture. CALM section 5 has none of this; the distances of its Table 5
are over whole clips.

draws: what a few-step stage loses against the flow that it starts from (or that flow itself in few
steps), where words and facts are too easy to show it. Compares `--repeats` samples of the first
latents of each held-out text, at temperature 1 without guidance and noise, with as many samples of
the flow in 32 steps:
  energy distance: 0 = the same distribution; unbiased, so sometimes a little below 0.
  spread: standard deviation over the samples, relative to the flow's.

distance: generations from held-out texts (of clips without text: continuations) against other real
clips of their kind, which is what tools/ablate.py asks of the rows of Tables 5 and 7.

AudioCALM's sweeps (its Tables 5 to 7 and Fig. 2, whose numbers are not public): steps and guidance
with `sweep`, block size and the two noises with tools.ablate, families audiocalm and prompt.
Exit status: 0 done, 2 your mistake (one line says which).
"""
import argparse

import torch
from tqdm import tqdm

from cli import BadInput, Parser, cli, number
from config import STAGES, open_run
from data import KINDS, encode_text
from discrete import DISCRETE
from evaluate import (chosen_sampling, find_stages, held_out_clips, judging_arguments,
                      of_trained_kinds, open_judges, open_stage, prepare, run_arguments,
                      sampling_arguments)
from figures import count_steps, print_table, write_json
from generate import refuse_steps
from generations import judge_lm
from intervals import drawn_evenly
from report import draw_continuation, draw_sweep
from tools import tables
from tools.continuation import MIN_CLIPS, judge_continuation, print_continuation
from tools.systems import Contestant, System
from tools.table_options import (add_ablations, add_tables, reference_arguments,
                                 seed_argument)

# setting -> (type of its values, the values of a sweep by default)
SETTINGS = {"steps": (number(int, 1), (1, 2, 4, 10, 20)),
            "temperature": (number(float, 0), (0.3, 0.5, 0.7, 0.9, 1.0)),
            "cfg": (number(float, 0), (1.0, 1.5, 2.0, 3.0)),
            "noise": (number(float, 0, 1), (0.0, 0.5, 1.0))}


# ---------------------------------------------------------------------------- sweep


def sweep(a, cfg, vae, clips, stages):
    """Judge generations at several values of a setting -> {"sweep steps": {value: figures}}."""
    values = sweep_values(a.setting, a.values)
    judges = open_judges(a, cfg)
    lm = open_stage(a.run, stages[-1])
    option = "guidance" if a.setting == "cfg" else a.setting
    if vars(a)[a.setting] != (0 if a.setting == "steps" else None):
        raise BadInput(f"--{a.setting}: is what the sweep varies; give --values")
    if a.setting == "steps":
        refuse_steps(lm, values[0], "--setting steps")

    rows = {}
    intervals = {}
    for value in tqdm(values, desc=f"sweep {a.setting}", leave=False):
        options = chosen_sampling(a, cfg, lm) | {option: value}
        found = judge_lm(lm, vae, cfg, clips, options, a.repeats, a.limit, judges=judges,
                         seed=a.seed)
        intervals[value] = found["intervals"]
        rows[value] = {f"{name} {kind}": figure for name in ("facts", "length")
                       for kind, figure in found[name].items()}
        if judges is not None:
            rows[value] |= judges.pop_figures()

    print_sweep(a.setting, rows)
    if a.wavs and any(rows.values()):
        draw_sweep(f"{a.wavs}/sweep_{a.setting}.png", a.setting, rows)
    return {f"sweep {a.setting}": {str(value): row for value, row in rows.items()},
            "intervals": {str(value): row for value, row in intervals.items()}}


def sweep_values(setting, text):
    """The values of --values, "1,2,4", else the setting's default ones."""
    parse_value, values = SETTINGS[setting]
    if not text:
        return values
    try:
        return [parse_value(value) for value in text.split(",")]
    except argparse.ArgumentTypeError as e:
        raise BadInput(f"--values {text}: {e}; give numbers separated by commas") from None


def print_sweep(setting, rows):
    """A table of rows {value: {figure: number}}."""
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    print(f"{setting:>12s}" + "".join(f"{name:>26s}" for name in names))
    for value, row in rows.items():
        cells = [f"{row[name]:26.4f}" if name in row else " " * 26 for name in names]
        print(f"{value:12g}" + "".join(cells))


# ---------------------------------------------------------------------------- continue


def continue_(a, cfg, vae, clips, stages):
    """Continue held-out clips with every stage -> {"continue lm": judge_continuation's, ...}."""
    if cfg.sample.seconds < 1:
        raise BadInput(f"continue: judges whole seconds of new audio, and this run's "
                       f"sample.seconds is {cfg.sample.seconds:g}; use a run with 1 or more")
    figures = {}
    for stage in stages:
        folder = f"{a.wavs}/continue_{stage}" if a.wavs else ""
        found = judge_continuation(open_contestant(a, cfg, vae, stage), clips, a.limit, folder)
        if not found:
            raise BadInput(f"continue: needs {MIN_CLIPS} held-out clips of a kind of at least "
                           f"{cfg.sample.prompt_seconds:g} s (sample.prompt_seconds)")

        figures[f"continue {stage}"] = found
        print_continuation(stage, found)
        if a.wavs:
            draw_continuation(f"{folder}.png", found)
    return figures


# ---------------------------------------------------------------------------- draws


def energy_distance(x, y):
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| (Székely & Rizzo 2013), unbiased; x (n, F), y (m, F)."""
    n = len(x)
    m = len(y)
    within_x = torch.cdist(x, x).sum() / (n * (n - 1))
    within_y = torch.cdist(y, y).sum() / (m * (m - 1))
    return (2 * torch.cdist(x, y).mean() - (within_x + within_y)).item()


def sample_latents(lm, tokens, kind, frames, steps, seed):
    """The first latents of a generation for each row of tokens, normalised -> (B, T <= frames, D).
    """
    latents = lm.generate(tokens, kind=KINDS.index(kind), max_frames=frames, steps=steps,
                          generator=torch.Generator().manual_seed(seed))
    return torch.stack([x for x, _ in latents], 1)


@torch.no_grad()
def judge_draws(flow, model, cfg, clips, step_counts, repeats, limit, frames=8):
    """Compare samples of a model, in each number of steps, with those of the flow in 32 -> {steps:
    {kind: (energy distance, spread)}}, means over at most `limit` held-out texts of each kind.

    A sample is one vector: the first `frames` latents of a generation.
    """
    found = {steps: {} for steps in step_counts}
    for kind in KINDS:
        texts = sorted({clip.text for clip in clips if clip.kind == kind and clip.text})
        figures = {steps: [] for steps in step_counts}
        for text in tqdm(drawn_evenly(texts, limit), desc=f"draw {kind}", leave=False):
            tokens = torch.tensor([encode_text(text, kind, cfg.data)] * repeats)
            reference = sample_latents(flow, tokens, kind, frames, 32, seed=0)

            for steps in step_counts:
                latents = sample_latents(model, tokens, kind, frames, steps, seed=1)
                shared = min(latents.shape[1], reference.shape[1])   # all rows may end early
                x = latents[:, :shared].flatten(1)                              # (repeats, T · D)
                y = reference[:, :shared].flatten(1)
                spread = (x.std(0).mean() / y.std(0).mean()).item()
                figures[steps].append((energy_distance(x, y), spread))

        # means over texts
        if texts:
            for steps in step_counts:
                distances, spreads = zip(*figures[steps])
                found[steps][kind] = (round(sum(distances) / len(distances), 4),
                                      round(sum(spreads) / len(spreads), 4))
    return found


def draws(a, cfg, vae, clips, stages):
    """Compare every stage's samples with its flow's -> {"draws lm": judge_draws's, ...}."""
    figures = {}
    rows = []
    for stage in stages:
        lm = open_stage(a.run, stage)
        if lm.cfg.head.objective in DISCRETE:
            raise BadInput(f"draws: needs a flow or few-step head, {a.run}/{stage}.pt has a "
                           f"discrete one ({lm.cfg.head.objective})")
        _, _, flow, _ = open_run(a.run, STAGES[stage].after or stage)
        step_counts = [a.steps] if a.steps else [1, 2, 4, 16]
        found = judge_draws(flow, lm, cfg, clips, step_counts, a.repeats, a.limit)

        figures[f"draws {stage}"] = found
        for steps, by_kind in found.items():
            name = f"{stage}, {count_steps(steps)}"
            rows.append((f"{name}: energy distance", {k: v[0] for k, v in by_kind.items()}))
            rows.append((f"{name}: spread", {k: v[1] for k, v in by_kind.items()}))
    print_table(rows)
    return figures


# ---------------------------------------------------------------------------- distance


def open_contestant(a, cfg, vae, stage):
    """A stage of the run with the sampling options of the command line."""
    lm = open_stage(a.run, stage)
    return Contestant(System(stage, a.run, stage), cfg, vae, lm, chosen_sampling(a, cfg, lm))


def distance(a, cfg, vae, clips, stages):
    """The last stage's generations against other real clips -> {"distance lm": {kind: {"fad",
    "mmd", "facts": [value, low, high]}}}.
    """
    contestant = open_contestant(a, cfg, vae, stages[-1])
    found = {}
    for kind in KINDS:
        # a kind without texts is continued
        of_kind = [clip for clip in clips if clip.kind == kind]
        a.task = "text" if any(clip.text for clip in of_kind) else "continue"
        if not of_kind:
            continue
        a.samples = a.limit
        chosen, yardstick = tables.choose({stages[-1]: contestant}, kind, a)
        figures = tables.judge(contestant, chosen, yardstick, kind, a)
        found[kind] = {name: tables.value_of(figure) for name, figure in figures.items()}
        cells = "   ".join(f"{name} {figure}" for name, figure in figures.items())
        print(f"{stages[-1]:12s} {kind:7s} {cells}")
    return {f"distance {stages[-1]}": found}


# ---------------------------------------------------------------------------- command line


def parse():
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = "sweep|continue|draws|distance|table2 .. table8|fig2|fig3|audiocalm"
    studies = p.add_subparsers(required=True, metavar=names)
    shared = run_arguments()

    s = studies.add_parser("sweep", help="generate with one setting at several values",
                           parents=[shared, sampling_arguments(), judging_arguments()])
    s.add_argument("--setting", required=True, choices=list(SETTINGS))
    s.add_argument("--values", default="", help="separated by commas, e.g. 1,2,4")
    s.set_defaults(study=sweep)

    s = studies.add_parser("continue", help="continue held-out clips, second by second",
                           parents=[shared, sampling_arguments()])
    s.set_defaults(study=continue_)

    s = studies.add_parser("draws", help="compare samples of few steps with the flow's",
                           parents=[run_arguments("0 = each of 1, 2, 4 and 16")])
    s.add_argument("--repeats", type=number(int, 2), default=6, help="samples per text (default 6)")
    s.set_defaults(study=draws, wavs=None)

    s = studies.add_parser("distance", help="distance of generations to real clips",
                           parents=[shared, sampling_arguments(wavs=False),
                                    reference_arguments(), seed_argument()])
    s.set_defaults(study=distance)

    add_tables(studies)
    add_ablations(studies)
    p.set_defaults(run_command=run_study)
    return p.parse_args()


def run_study(a):
    """One of the studies of a run."""
    prepare(a)

    # the run, and clips that it was not trained on
    cfg, vae, _, _ = open_run(a.run)
    stages = find_stages(a.run, a.stage)
    if not stages:
        raise BadInput(f"{a.run}: has no language model to generate with")
    clips = held_out_clips(a.run, a.manifest, cfg)
    clips = of_trained_kinds(clips, a.run, stages, cfg)

    figures = a.study(a, cfg, vae, clips, stages)
    if a.json:
        write_json(a.json, {"run": a.run, "clips": len(clips), **figures})


def main():
    a = parse()
    a.run_command(a)


if __name__ == "__main__":
    cli(main)
