"""The papers' ablations, ours beside theirs: trained by tools/ablate.py, then judged.

    python -m tools.studies table5 --vae out/quickstart [--seeds 0,1] [--train "--train.lm.lr 5e-3"]
    python -m tools.studies table7 --vae out/quickstart
    python -m tools.studies fig2   --vae out/quickstart --picture fig2.png

    family consistency of configs/ablation.toml ─► ablate ─► ROW_SEED/study.json ─► mean of seeds,
    (rows, seeds)                                            ROW_SEED/log.jsonl     less base row

table5: without head batch multiplier, noise, short context, or all three. table7: the length of the
short context. A cell is the mean over seeds ± half of its 95 % interval (Student's t; none for one
seed); "less full" is the difference to the base row, seed by seed. An interval that holds 0 finds
no effect, and says how large one could be.

fig2: held-out energy score of the next latent in 4 steps (heads.energy_score) against the training
step, for multipliers 1, 2, 4, 8. The paper has FAD there, of checkpoints that we do not keep; the
energy score is of single latents.

Finished runs are not trained again. Another family with the same rows: --family.
"""
import json
import os

from cli import BadInput
from config import read_log
from intervals import Figure
from report import pyplot, save_picture
from tools import ablate
from tools.paper_tables import TABLES
from tools.tables import draw_figures, print_rows, value_of

FILE = "configs/ablation.toml"
BASE = "full"
# multiplier -> row
MULTIPLIERS = {1: "no_multiplier", 2: "m2", 4: "m4", 8: "full"}
# figures of a row: name in a run's files -> heading; {} is the kind
COLUMNS = {"fad {}": "FAD", "mmd {}": "MMD²", "energy score {}": "energy score",
           "facts {}": "facts right"}


def plan_rows(rows, a):
    """(runs of rows of the family, how they are judged) for the command line."""
    families = ablate.read_families(FILE)
    ablate.check_names([a.family], families, "--family")
    family = families[a.family]
    ablate.check_names(rows, family.rows, f"family {a.family}, row")
    overrides = ablate.split_options(a.train, "--train")
    study = ablate.split_options(a.study or family.study, "--study")
    shared = ["--threads", str(a.threads)] if a.threads else []
    overrides = [*shared, *overrides]
    if study:
        clips = ["--manifest", a.manifest] if a.manifest else []
        study = [study[0], *shared, *clips, *study[1:]]

    runs = ablate.plan(a.family, family, rows, ablate.parse_seeds(a.seeds), os.path.abspath(a.out),
                       overrides, a.vae)
    return runs, study


def compare_rows(name, a):
    """Tables 5 and 7: the mean over seeds of every row, and its difference to the base row."""
    table = TABLES[name]
    rows = [row.label for row in table.rows]
    runs, study = plan_rows(rows, a)
    figures = ablate.measure(runs, [], study, a.vae)
    means = ablate.summarize(figures)
    less = ablate.differences(figures, BASE)

    # FAD is the paper's column; of ours, what the runs have
    columns = {"fad": f"FAD {a.kind}"}
    ours = {row: {} for row in rows}
    for pattern, heading in COLUMNS.items():
        found = pattern.format(a.kind)
        for row in rows:
            if found not in means[row]:
                continue
            key = "fad" if heading == "FAD" else heading
            columns.setdefault(key, f"{heading} {a.kind}")
            columns.setdefault(f"{key} less", f"less {BASE}")
            ours[row][key] = ablate.format_cell(means[row][found])
            if row != BASE:
                ours[row][f"{key} less"] = ablate.format_cell(less[row].get(found))

    print(f"family {a.family}, seeds {a.seeds}")
    print_rows(table, columns, ours)
    return {name: {"means": means, f"less {BASE}": less}}


def table5(a):
    return compare_rows("table5", a)


def table7(a):
    return compare_rows("table7", a)


# ---------------------------------------------------------------------------- figure 2


def energy_curve(folder, kind):
    """[(step, held-out energy score)] of the language model of a run."""
    rows = [json.loads(line) for line in read_log(folder)]
    name = f"valid_energy_{kind}"
    return [(row["step"], row[name]) for row in rows if row["stage"] == "lm" and name in row]


def figure_of(values):
    """Figures of several seeds -> their mean with its 95 % interval, a Figure."""
    mean, error = ablate.mean_and_error(values)
    if error is None:
        return Figure(mean)
    return Figure(mean, mean - error, mean + error, len(values))


def mean_curve(curves):
    """Curves of the same steps, one per seed -> [(step, Figure)]."""
    return [(points[0][0], figure_of([value for _, value in points])) for points in zip(*curves)]


def ends_less(curves, base):
    """{multiplier: [curve of each seed]} -> {multiplier: the last value less that of `base`, seed
    by seed, a Figure}.
    """
    return {multiplier: figure_of([curve[-1][1] - other[-1][1]
                                   for curve, other in zip(by_seed, curves[base])])
            for multiplier, by_seed in curves.items() if multiplier != base}


def fig2(a):
    """The head batch multiplier: energy score over the training steps."""
    chosen = {multiplier: MULTIPLIERS[multiplier] for multiplier in a.multipliers}
    runs, _ = plan_rows(list(chosen.values()), a)
    runs = list(ablate.train_all(runs, a.vae))
    curves = {}
    for multiplier, row in chosen.items():
        curves[multiplier] = [energy_curve(run.folder, a.kind) for run in runs if run.row == row]
    if not all(all(by_seed) for by_seed in curves.values()):
        raise BadInput(f"fig2: the runs have no held-out energy score of {a.kind}; train them with "
                       "--train \"--train.lm.valid_every 100\"")

    print(f"CALM Fig. 2: energy score of {a.kind}, held out; multiplier, then by step")
    means = {multiplier: mean_curve(by_seed) for multiplier, by_seed in curves.items()}
    for multiplier, curve in means.items():
        print(f"x{multiplier:<5d}" + "".join(f"{step:>7d}: {figure}" for step, figure in curve))
    most = max(curves)
    less = ends_less(curves, most)
    for multiplier, figure in less.items():
        print(f"x{multiplier} less x{most} at the end, seed by seed: {figure}")
    if a.picture:
        draw_multipliers(a.picture, means, a.kind)
    return {"fig2": {f"x{multiplier}": [(step, value_of(figure)) for step, figure in curve]
                     for multiplier, curve in means.items()},
            f"less x{most}": {f"x{m}": value_of(figure) for m, figure in less.items()}}


def draw_multipliers(path, curves, kind):
    """Fig. 2: a curve per multiplier, [(step, Figure)] -> a png."""
    fig, ax = pyplot().subplots(figsize=(5, 3.2), layout="constrained")
    for multiplier, curve in curves.items():
        draw_figures(ax, curve, f"x{multiplier}")
    ax.set_xlabel("training step")
    ax.set_ylabel(f"energy score, {kind}")
    ax.legend(title="head batch multiplier", fontsize=8, title_fontsize=8)
    save_picture(fig, path, dpi=100)
