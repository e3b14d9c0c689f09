"""A table of experiments: train several configs with several seeds, judge each, print mean ± error.

    python -m tools.ablate configs/ablation/toy_*.toml [--seeds 0,1] [--out out/ablation] [--vae RUN]
                     [--evaluate "--limit 20 --repeats 2"] [--json table.json]
                     [--picture table.png] [--train.lm.steps 300]

    config A ─┬─ seed 0 ─► train.py ─► out/ablation/A_0 ─► evaluate.py ─► figures.json ─┐
              └─ seed 1 ─► ...                                                          ├─► table
    config B ─┬─ ...                                                                    ┘

Configs with equal [vae], [train.vae] and [toy] tables and the same manifest share one VAE and its
latents: the first run trains it (or --vae RUN has it), all others link to it. Seeds and rows then
differ in the language model alone; --own-vae turns that off. A row is a config, a column a figure:
share of facts right (toy corpus), clips that end on time, the held-out loss, CALM's energy score of
the next latent's draws (heads.py; one unit for all continuous heads), and whatever --evaluate
adds ("--metrics wer,dnsmos"); "--what continue" gives, for the first and the last three
seconds of continuations, their level against the prompt (dB) and distance to real seconds (MMD²),
so configs/ablation/music_*.toml show drift. The error is half of the 95 % confidence interval of
the mean over seeds (Student's t: with two seeds 12.7 standard errors, so that few differences are
ever shown by two).
Runs that are finished are not run again (for other settings choose another --out); an interrupted
one goes on. Other options go to train.py.
Exit status: 0 done, 2 your mistake.
"""
import argparse
import json
import math
import os
import shlex
import statistics
import subprocess
import sys

from tqdm import tqdm

from cli import BadInput, Parser, atomic, check_writable, cli
from config import LM_STAGES, dump, load

HOME = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# two-sided 95 % points of Student's t for n - 1 degrees of freedom, n = 2, 3, ...
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179,
           2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086)


def mean_and_error(values):
    """Mean and half of its 95 % confidence interval; error None for a single value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None
    t = STUDENT[len(values) - 2] if len(values) < 2 + len(STUDENT) else 2.08
    return mean, t * statistics.stdev(values) / math.sqrt(len(values))


def show(mean, error):
    return f"{mean:.3f}" if error is None else f"{mean:.3f} ± {error:.3f}"


def run(*command):
    """A command of ours; its last line of stderr when it fails."""
    done = subprocess.run([sys.executable, f"{HOME}/{command[0]}", *command[1:]],
                          capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise BadInput(f"{command[0]} {' '.join(command[1:])}: {last.removeprefix('error: ')}")


def read(folder):
    """{figure: number} of a judged run: the last stage's figures and its held-out loss."""
    with open(f"{folder}/figures.json") as f:
        figures = json.load(f)
    stage = next((s for s in reversed(LM_STAGES) if s in figures or f"continue {s}" in figures), None)
    if stage is None:
        raise BadInput(f"{folder}: no figures of a language model; the config needs such a stage, "
                       "and --evaluate must not ask for --what vae or a --sweep")
    judged = figures.get(stage, {})
    found = {f"{name} {kind}": v for name in ("facts", "length")
             for kind, v in judged.get(name, {}).items()} | judged.get("speech", {})
    for kind, rows in figures.get(f"continue {stage}", {}).items():
        for name in ("level", "mmd"):                   # a second each; the first is the prompt's
            seconds = [v for v in rows[name][1:] if v is not None]
            for when, part in (("first", seconds[:3]), ("last", seconds[-3:])):
                if part:
                    found[f"{name} {kind} {when}"] = statistics.fmean(part)
    with open(f"{folder}/log.jsonl") as f:
        rows = [json.loads(line) for line in f]
    for row in rows:
        if row["stage"] == stage:
            for key, name in (("valid_head", "held-out loss"), ("valid_energy", "energy score")):
                found |= {k.replace(key, name).replace("_", " "): v
                          for k, v in row.items() if k.startswith(key)}
    return found


def link_vae(source, folder):
    """A finished VAE, its latents and toy corpus as symbolic links, where there are none yet."""
    if not os.path.exists(f"{source}/vae.pt"):
        raise BadInput(f"{source}: has no vae.pt; train it first, or leave --vae out")
    os.makedirs(folder, exist_ok=True)
    for name in ("vae.pt", "latents", "toy"):
        if os.path.exists(f"{source}/{name}") and not os.path.lexists(f"{folder}/{name}"):
            os.symlink(os.path.abspath(f"{source}/{name}"), f"{folder}/{name}")


def draw(path, names, columns, result):
    """One panel a figure, one row a config: its seeds as dots, their mean as a line."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    wide = min(len(columns), 3)
    high = math.ceil(len(columns) / wide)
    fig, grid = plt.subplots(high, wide, squeeze=False, sharey=True, layout="constrained",
                             figsize=(3 * wide + 1.5, high * (0.28 * len(names) + 0.8)))
    for column, ax in zip(columns, grid.flat):
        for y, name in enumerate(names):
            if column in result[name]:
                cell = result[name][column]
                ax.plot([cell["mean"]] * 2, [y - 0.35, y + 0.35], "k")
                ax.plot(cell["seeds"], [y] * len(cell["seeds"]), "C0o", alpha=0.6)
        ax.set_title(column, fontsize=9)
        ax.set_yticks(range(len(names)), names, fontsize=8)
        ax.locator_params(axis="x", nbins=5)
        ax.tick_params(axis="x", labelsize=8)
        ax.grid(axis="x", alpha=0.3)
    for ax in list(grid.flat)[len(columns):]:
        ax.axis("off")
    grid[0, 0].invert_yaxis()                                   # the table's order, for all of them
    with atomic(path) as temp:
        fig.savefig(temp, dpi=100, format="png")
    plt.close(fig)


def main():
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
               allow_abbrev=False)
    p.add_argument("configs", nargs="+", help="one experiment each")
    p.add_argument("--seeds", default="0,1", help="default: 0,1")
    p.add_argument("--out", default="out/ablation", help="folder of run folders")
    p.add_argument("--evaluate", default="", help="options for evaluate.py, in quotes")
    p.add_argument("--vae", help="a run whose VAE all of them use")
    p.add_argument("--own-vae", action="store_true", help="train the VAE anew in each run")
    p.add_argument("--json", help="write the table here")
    p.add_argument("--picture", help="draw the table here (png)")
    a, overrides = p.parse_known_args()
    for path in filter(None, (a.json, a.picture)):
        check_writable(path)
    try:
        seeds = sorted({int(s) for s in a.seeds.split(",")})
    except ValueError:
        raise BadInput(f"--seeds {a.seeds}: whole numbers parted by commas") from None
    names = [os.path.splitext(os.path.basename(c))[0] for c in a.configs]
    if len(set(names)) < len(names):
        raise BadInput("two configs have the same name; rename one")
    out, table, trained = os.path.abspath(a.out), {name: {} for name in names}, {}
    loaded = [load(path, overrides) for path in a.configs]         # mistakes first, not after hours
    jobs = [(seed, *job) for seed in seeds for job in zip(names, a.configs, loaded)]
    for seed, name, path, cfg in tqdm(jobs, unit="run"):
        folder = f"{out}/{name}_{seed}"
        same = (cfg.data.manifest, *map(dump, (cfg.vae, cfg.gan, cfg.toy, cfg.train.vae)))
        if a.vae:
            trained.setdefault(same, a.vae)
        if same in trained and not a.own_vae:
            link_vae(trained[same], folder)
        options = ("--seed", str(seed), "--out", folder)
        run("train.py", "--config", os.path.abspath(path), *options, *overrides)
        trained.setdefault(same, folder)
        if not os.path.exists(f"{folder}/figures.json"):
            run("evaluate.py", "--run", folder, "--what", "lm", "--json", f"{folder}/figures.json",
                *shlex.split(a.evaluate))
        for figure, value in read(folder).items():
            table[name].setdefault(figure, []).append(value)
    columns = list(dict.fromkeys(f for row in table.values() for f in row))
    wide = max(map(len, names)) + 2
    print(" " * wide + "".join(f"{c:>20s}" for c in columns))
    result = {}
    for name, row in table.items():
        cells = {c: mean_and_error(row[c]) for c in columns if c in row}
        result[name] = {c: {"mean": m, "error": e, "seeds": row[c]} for c, (m, e) in cells.items()}
        print(f"{name:{wide}s}" + "".join(
            f"{show(*cells[c]) if c in cells else '-':>20s}" for c in columns))
    if a.json:
        with atomic(a.json) as temp, open(temp, "w") as f:
            json.dump(result, f, indent=1)
    if a.picture:
        draw(a.picture, names, columns, result)


if __name__ == "__main__":
    cli(main)
