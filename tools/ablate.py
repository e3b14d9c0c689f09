"""Run an ablation study: train every row with several seeds, evaluate, print mean ± error.

    python -m tools.ablate configs/ablation.toml toy [--rows full,no_noise] [--seeds 0,1]
                     [--out out/ablation] [--vae RUN] [--own-vae] [--evaluate "--limit 20"]
                     [--study "continue --limit 16"] [--json table.json] [--picture table.png]
                     [--train.lm.steps 300]
    python -m tools.ablate configs/ablation.toml --list

    family toy ─► row full     ─┬─ seed 0 ─► train.py ─► out/ablation/toy_full_0 ─► evaluate.py ─┐
    (config,      (options)     └─ seed 1 ─► ...                                                 │
     common)   ─► row no_noise ─┬─ ...                                                           │
                                                                                     table ◄─────┘

A family is a shipped config with options that all rows share; a row adds the options that one would
type after `train.py --config`. Options on the command line come last and apply to every row.

Evaluation: evaluate.py with the options of --evaluate, or with --study a study of tools/studies.py
in its place, or both where both are given. A family may have a default for either.
A row of the table is a row of the family, a column one figure: share of facts right (toy corpus),
share of clips that end on time, held-out loss, energy score of samples of the next latent (one unit
for all continuous heads, heads.py), and what --evaluate "--metrics wer,dnsmos" adds. --study
continue adds, for the first and the last three seconds of continuations, the level relative to the
prompt (dB) and the distance to real seconds (MMD²): their difference is drift. --study distance
adds the distance of generations to real clips (FAD, MMD²).
The error is half of the 95 % confidence interval of the mean over seeds (Student's t). With two
seeds it is 12.7 standard errors, so two seeds establish few differences. A second table has the
differences to the first row, seed by seed.

Runs with the same manifest and equal [vae], [gan], [toy] and [train.vae] tables share one VAE and
its latents: the first trains it, the others link to it. Seeds and rows then differ in the language
model alone; --own-vae trains one VAE per run. With --vae RUN all rows take the VAE of that run and
its [vae] and [gan] in place of the family's; what that changes is printed.
Finished trainings are not repeated (choose another --out for other settings), interrupted ones
resume; a run is judged again where the words of --evaluate or --study are others.
Exit status: 0 done, 2 the user's mistake.
"""
import argparse
import dataclasses
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import tomllib
from dataclasses import dataclass, field

from tqdm import tqdm

from checkpoint import load_checkpoint
from cli import BadInput, Parser, check_writable, cli, write_file
from config import LM_STAGES, Config, dump, load, read_log, saved_config
from report import draw_ablation
from schema import build

HOME = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# two-sided 95 % points of Student's t for n - 1 degrees of freedom, n = 2, 3, ...
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179,
           2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086)
# of the studies in tools/studies.py, those that give the table a column
STUDIES = ("continue", "distance")


# ---------------------------------------------------------------- families and rows

@dataclass
class Family:
    """One table of the ablation file."""
    # the question in one sentence, printed by --list
    about: str = ""
    # the config that the rows start from, a path as for train.py --config
    config: str = ""
    # options of train.py that all rows share
    common: str = ""
    # defaults of --evaluate and --study
    evaluate: str = ""
    study: str = ""
    # name of the row -> its options, after the common ones
    rows: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        if not self.config:
            raise ValueError("config: missing; give the config that the rows start from")
        if not self.rows:
            raise ValueError("rows: missing; give at least one, e.g. full = \"\"")


@dataclass(frozen=True)
class Run:
    """One row trained with one seed."""
    row: str
    seed: int
    # absolute path of the run folder
    folder: str
    # path of the family's config
    config: str
    # options of train.py after --config: common, row, command line
    options: list[str]
    # the same, resolved
    resolved: Config


def read_families(path):
    """{name: Family} of an ablation file; strict. Errors: BadInput names the key."""
    try:
        with open(path, "rb") as f:
            table = tomllib.load(f)
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file; see configs/ablation.toml") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, IsADirectoryError) as e:
        raise BadInput(f"{path}: not readable as TOML: {e}") from None
    return {name: build(Family, family, name) for name, family in table.items()}


def split_options(text, source):
    """The words of a line of options, as a shell splits them."""
    try:
        return shlex.split(text)
    except ValueError as e:
        raise BadInput(f"{source}: {e} in {text!r}") from None


def check_names(names, valid, option):
    """Raise BadInput, which lists the valid names, if one of `names` is not valid."""
    for name in names:
        if name not in valid:
            raise BadInput(f"{option} {name}: unknown; valid: {', '.join(valid)}")


def list_families(families):
    """Print every family with its rows and their options."""
    for name, family in families.items():
        print(f"{name}: {family.about} ({family.config})")
        for row, options in family.rows.items():
            print(f"    {row:20s}{' '.join(options.split())}".rstrip())
        print()


# ---------------------------------------------------------------- what is to be run

def plan(name, family, rows, seeds, out, overrides, vae=None):
    """The Run of every row and seed, in the order in which they are trained.

    vae: a run whose [vae] and [gan] replace the family's, unless a row or the command line sets
    them. All configs are resolved here, so that a mistake in one stops the study before it trains.
    """
    common = split_options(family.common, f"{name}.common")
    if vae:
        common += options_of_vae(vae, load(family.config, common))
    options = {}
    resolved = {}
    for row in rows:
        row_options = split_options(family.rows[row], f"{name}.rows.{row}")
        options[row] = [*common, *row_options, *overrides]
        try:
            resolved[row] = load(family.config, options[row])
        except BadInput as e:
            raise BadInput(f"{name}, row {row}: {e}") from None

    return [Run(row, seed, f"{out}/{name}_{row}_{seed}", family.config, options[row], resolved[row])
            for seed in seeds for row in rows]


def options_of_vae(source, cfg):
    """Options that give a config the [vae] and [gan] of a trained run; prints what they change."""
    saved = config_of_vae(source)
    options = []
    changes = []
    for table in ("vae", "gan"):
        old, new = (dataclasses.asdict(getattr(c, table)) for c in (cfg, saved))
        for key in old:
            if old[key] != new[key]:
                options += [f"--{table}.{key}", toml(new[key])]
                changes.append(f"{table}.{key} = {toml(new[key])} instead of {toml(old[key])}")
    if changes:
        print(f"rows take the VAE of {source}: {'; '.join(changes)}", file=sys.stderr)
    return options


def config_of_vae(source):
    """The config of a run's VAE."""
    if not os.path.exists(f"{source}/vae.pt"):
        raise BadInput(f"--vae {source}: has no vae.pt; train it first, or leave --vae out")
    path = f"{source}/vae.pt"
    return saved_config(load_checkpoint(path), path)


def toml(value):
    """A value of a config, also a table, in one line of TOML."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml(v)}" for key, v in value.items()) + "}"
    return json.dumps(value)


def vae_settings(cfg):
    """What a VAE and its latents depend on: runs with equal settings share them."""
    return cfg.data.manifest, dump(cfg.vae), dump(cfg.gan), dump(cfg.toy), dump(cfg.train.vae)


# ---------------------------------------------------------------- one run

def run_command(*command):
    """Run a Python command; BadInput with the last line of its stderr if it fails."""
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        name = " ".join(command).removeprefix(f"{HOME}/").removeprefix("-m ")
        raise BadInput(f"{name}: {last.removeprefix('error: ')}")


def link_vae(source, folder, cfg):
    """Link a finished VAE, its latents and toy corpus into a run folder that has none yet.

    A toy corpus of other settings than those of cfg is left where it is: train.py would make it
    anew through the link.
    """
    saved = config_of_vae(source)
    names = ["vae.pt", "latents"]
    if dump(saved.toy) == dump(cfg.toy) and saved.vae.sample_rate == cfg.vae.sample_rate:
        names.append("toy")
    os.makedirs(folder, exist_ok=True)
    for name in names:
        if os.path.exists(f"{source}/{name}") and not os.path.lexists(f"{folder}/{name}"):
            os.symlink(os.path.abspath(f"{source}/{name}"), f"{folder}/{name}")


def train(run):
    """Train one run with train.py; a finished one returns at once."""
    run_command(f"{HOME}/train.py", "--config", os.path.abspath(run.config), *run.options,
                "--seed", str(run.seed), "--out", run.folder)


def evaluate(run, evaluate_options, study):
    """Write figures.json, study.json or both into the run folder, unless they are there, judged
    with the same words.

    evaluate_options, study: lists of words. A study takes the place of evaluate.py, unless there
    are options for evaluate.py too.
    """
    if evaluate_options or not study:
        judge(run.folder, "figures", evaluate_options, f"{HOME}/evaluate.py", "--what", "lm")
    if study:
        judge(run.folder, "study", study[1:], "-m", "tools.studies", study[0])


def judge(folder, name, options, *command):
    """Let a command write folder/NAME.json, and keep its words beside, in NAME.words."""
    figures = f"{folder}/{name}.json"
    words = shlex.join([*command[1:], *options])
    if os.path.exists(figures) and read_words(f"{folder}/{name}.words") == words:
        return
    run_command(*command, "--run", folder, "--json", figures, *options)
    os.makedirs(folder, exist_ok=True)
    write_file(f"{folder}/{name}.words", words)


def read_words(path):
    """The words of an earlier command; None where they were not kept."""
    if not os.path.exists(path):
        return None
    with open(path) as f:
        return f.read()


def train_all(runs, vae=None, own_vae=False):
    """Train the runs that are not finished; yields each when it is.

    The first run with some VAE settings trains it for all others; vae: a run that has it already.
    """
    trained = {}
    for run in tqdm(runs, unit="run"):
        settings = vae_settings(run.resolved)
        if vae:
            trained[settings] = vae
        if settings in trained and not own_vae:
            link_vae(trained[settings], run.folder, run.resolved)
        train(run)
        trained.setdefault(settings, run.folder)
        yield run


def measure(runs, evaluate_options, study, vae=None, own_vae=False):
    """Train and evaluate runs that are not finished -> {row: [{column: number} per seed]}."""
    figures = {}
    for run in train_all(runs, vae, own_vae):
        evaluate(run, evaluate_options, study)
        figures.setdefault(run.row, []).append(read(run.folder))
    return figures


# ---------------------------------------------------------------- figures of one run

def read(folder):
    """{column: number} of an evaluated run: figures and held-out losses of its last stage."""
    figures = {}
    for name in ("figures.json", "study.json"):
        if os.path.exists(f"{folder}/{name}"):
            with open(f"{folder}/{name}") as f:
                figures |= json.load(f)

    # the last language-model stage that was evaluated
    stages = [s for s in LM_STAGES if s in figures
              or any(f"{study} {s}" in figures for study in STUDIES)]
    if not stages:
        raise BadInput(f"{folder}: no figures of a language model; the config needs such a stage, "
                       "and --evaluate must not contain --what vae")
    stage = stages[-1]

    return (generation_figures(figures.get(stage, {}))
            | continuation_figures(figures.get(f"continue {stage}", {}))
            | distance_figures(figures.get(f"distance {stage}", {}))
            | held_out_losses(f"{folder}/log.jsonl", stage))


def generation_figures(figures):
    """evaluate.py's figures of one stage -> {"facts speech": share, ..., "wer": ...}."""
    found = {}
    for name in ("facts", "length"):
        for kind, value in figures.get(name, {}).items():
            found[f"{name} {kind}"] = value
    return found | figures.get("speech", {})


def continuation_figures(figures):
    """{kind: {"level": [per second], "mmd": [...], "beat": [...]}} -> means of the first and last 3
    seconds. Runs that were judged before there was a beat have none.
    """
    found = {}
    for kind, by_second in figures.items():
        for name in ("level", "mmd", "beat"):
            # the first value is the prompt's; seconds without a figure are None
            seconds = [v for v in by_second.get(name, [])[1:] if v is not None]
            if seconds:
                found[f"{name} {kind} first"] = statistics.fmean(seconds[:3])
                found[f"{name} {kind} last"] = statistics.fmean(seconds[-3:])
    return found


def distance_figures(figures):
    """{kind: {"fad": [value, low, high], ...}} -> {"fad music": value, ...}."""
    return {f"{name} {kind}": interval[0] for kind, row in figures.items()
            for name, interval in row.items()}


def held_out_losses(log, stage):
    """The last validation of a stage in log.jsonl: held-out loss and energy score, per kind."""
    rows = [json.loads(line) for line in read_log(os.path.dirname(log))]

    found = {}
    for row in rows:
        if row["stage"] != stage:
            continue
        for key, name in (("valid_head", "held-out loss"), ("valid_energy", "energy score")):
            for k, value in row.items():
                if k.startswith(key):
                    found[k.replace(key, name).replace("_", " ")] = value
    return found


# ---------------------------------------------------------------- the table

def mean_and_error(values):
    """Mean and half of its 95 % confidence interval; error None for a single value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None
    t = STUDENT[len(values) - 2] if len(values) < 2 + len(STUDENT) else 2.08
    return mean, t * statistics.stdev(values) / math.sqrt(len(values))


def summarize(figures):
    """{row: [{column: number} per seed]} -> {row: {column: {"mean", "error", "seeds"}}}."""
    result = {}
    for row, by_seed in figures.items():
        values = {}
        for found in by_seed:
            for column, value in found.items():
                values.setdefault(column, []).append(value)

        result[row] = {}
        for column, seeds in values.items():
            mean, error = mean_and_error(seeds)
            result[row][column] = {"mean": mean, "error": error, "seeds": seeds}
    return result


def differences(figures, base):
    """{row: [{column: number} per seed]} -> summarize() of every row less the row `base`, seed by
    seed: an interval that holds 0 says how large an effect can be at most.
    """
    less = {}
    for row, by_seed in figures.items():
        if row != base:
            less[row] = [{column: found[column] - of_base[column] for column in found
                          if column in of_base} for found, of_base in zip(by_seed, figures[base])]
    return summarize(less)


def columns_of(result):
    """The columns of all rows, in the order of their first appearance."""
    return list(dict.fromkeys(column for cells in result.values() for column in cells))


def format_cell(cell):
    """0.123 ± 0.045, without the error for a single seed; "-" where a row has no such figure."""
    if cell is None:
        return "-"
    if cell["error"] is None:
        return f"{cell['mean']:.3f}"
    return f"{cell['mean']:.3f} ± {cell['error']:.3f}"


def print_table(result):
    """Rows of the family against figures, on stdout."""
    columns = columns_of(result)
    width = max(map(len, result)) + 2
    print(" " * width + "".join(f"{column:>20s}" for column in columns))
    for row, cells in result.items():
        texts = [format_cell(cells.get(column)) for column in columns]
        print(f"{row:{width}s}" + "".join(f"{text:>20s}" for text in texts))


# ---------------------------------------------------------------- the command

def parse():
    """The command line -> (arguments, options for train.py)."""
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
               allow_abbrev=False)
    p.add_argument("file", help="families and rows: configs/ablation.toml")
    p.add_argument("family", nargs="?", help="the family to run")
    p.add_argument("--list", action="store_true", help="print families and rows, and stop")
    p.add_argument("--rows", help="rows to run, separated by commas (default: all)")
    p.add_argument("--seeds", default="0,1", help="separated by commas (default 0,1)")
    p.add_argument("--out", default="out/ablation",
                   help="parent of the run folders FAMILY_ROW_SEED (default out/ablation)")
    p.add_argument("--vae", help="a run with the VAE that all rows use, with its [vae] and [gan]")
    p.add_argument("--own-vae", action="store_true", help="train a VAE in each run")
    p.add_argument("--evaluate", help="options for evaluate.py, in quotes")
    p.add_argument("--study", help="a study of tools.studies with its options, in quotes")
    p.add_argument("--json", help="write the table to this file")
    p.add_argument("--picture", help="draw the table into this file (png)")
    arguments, overrides = p.parse_known_args()

    for path in filter(None, (arguments.json, arguments.picture)):
        check_writable(path)
    return arguments, overrides


def parse_seeds(text):
    """ "1,0" -> [0, 1]."""
    try:
        return sorted({int(seed) for seed in text.split(",")})
    except ValueError:
        raise BadInput(f"--seeds {text}: must be whole numbers separated by commas") from None


def parse_rows(text, family):
    """ "full,no_noise" -> ["full", "no_noise"]; None -> all rows of the family."""
    if text is None:
        return list(family.rows)
    rows = list(dict.fromkeys(text.split(",")))
    check_names(rows, family.rows, "--rows")
    return rows


def parse_evaluation(arguments, family):
    """(options for evaluate.py, study and its options) as words, the family's by default."""
    evaluation = family.evaluate if arguments.evaluate is None else arguments.evaluate
    study = family.study if arguments.study is None else arguments.study
    study = split_options(study, "--study")
    check_names(study[:1], STUDIES, "--study")
    return split_options(evaluation, "--evaluate"), study


def main():
    arguments, overrides = parse()
    families = read_families(arguments.file)
    if arguments.list:
        list_families(families)
        return

    # all mistakes come first, not after hours of training
    if arguments.family is None:
        raise BadInput(f"which family? valid: {', '.join(families)}; --list shows their rows")
    check_names([arguments.family], families, "family")
    family = families[arguments.family]
    rows = parse_rows(arguments.rows, family)
    evaluate_options, study = parse_evaluation(arguments, family)
    if arguments.vae and arguments.own_vae:
        raise BadInput("--own-vae: trains a VAE in each run, and --vae names one for all; leave "
                       "one of them out")
    runs = plan(arguments.family, family, rows, parse_seeds(arguments.seeds),
                os.path.abspath(arguments.out), overrides, arguments.vae)

    figures = measure(runs, evaluate_options, study, arguments.vae, arguments.own_vae)

    # the table: printed, and as json and picture where asked
    result = summarize(figures)
    print_table(result)
    if len(rows) > 1:
        print(f"\nless {rows[0]}, seed by seed")
        print_table(differences(figures, rows[0]))
    if arguments.json:
        write_file(arguments.json, json.dumps(result, indent=1))
    if arguments.picture:
        draw_ablation(arguments.picture, rows, columns_of(result), result)


if __name__ == "__main__":
    cli(main)
