"""Figures as a person reads them, a table with a column per kind, and as --json writes them.

    {kind: figures of reconstruction.py, generations.py} ─┬─► rows ─► print_table
    {metric: {kind: Figure}} of judges.py ────────────────┴─► merged with their intervals ─► json
"""
import json

from cli import write_file
from data import KINDS
from discrete import DISCRETE
from intervals import Figure
from reconstruction import with_interval


# ---------------------------------------------------------------------------- the table


def vae_rows(figures, published, unit):
    """Rows of print_table: judge_vae's figures and the published metrics. unit: nats or bits."""
    def row(name, key):
        return name, {kind: with_interval(values, key, values["clips"])
                      for kind, values in figures.items()}

    return [row("log-mel distance (0 perfect, 1 another clip)", "log_mel"),
            row("STFT distance", "stft"),
            row("SI-SDR, dB", "si_sdr"),
            row(f"rate, {unit} per second", "rate"),
            *published.items(),
            row("original: facts right", "original"),
            row("reconstruction: facts right", "reconstruction")]


def lm_rows(name, figures, published):
    """Rows of print_table: judge_lm's figures of one model and the published metrics."""
    return [(f"generation, {name}: facts right", joined(figures, "facts")),
            (f"generation, {name}: length right", joined(figures, "length")),
            *[(f"{key}, {name}", row) for key, row in published.items()]]


def count_steps(steps):
    """1 -> "1 step", 4 -> "4 steps"."""
    return f"{steps} step{'s' * (steps > 1)}"


def model_name(stage, figures):
    """"lm: trigflow, 20 steps"; heads of codes have no steps."""
    name = f"{stage}: {figures['objective']}"
    return name if figures["objective"] in DISCRETE else f"{name}, {count_steps(figures['steps'])}"


def joined(figures, name):
    """{kind: Figure} of judge_lm's figures."""
    ends = figures["intervals"].get(name, {})
    return {kind: Figure(value, *(ends[kind] or (None, None)))
            for kind, value in figures[name].items()}


def print_table(rows, seed=0):
    """Print [(name, {kind: number, Figure or None})], a column per kind that has any; rows without
    numbers are left out. seed: of the intervals.
    """
    # what has figures
    rows = [(name, row) for name, row in rows if any(v is not None for v in row.values())]
    kinds = [kind for kind in KINDS if any(row.get(kind) is not None for _, row in rows)]
    cells = [[shown(row.get(kind)) for kind in kinds] for _, row in rows]

    # how wide the columns are
    left = max((len(name) for name, _ in rows), default=0)
    width = 2 + max((len(cell) for line in cells for cell in line), default=0)
    width = max(width, 9)

    # kinds, rows, and what the brackets are
    if rows:
        print(" " * left + "".join(f"{kind:>{width}s}" for kind in kinds))
    for (name, _), line in zip(rows, cells):
        print(f"{name:{left}s}" + "".join(f"{cell:>{width}s}" for cell in line))
    if any("[" in cell for line in cells for cell in line):
        print(f"[low, high]: 95 % bootstrap interval over clips, seed {seed}")


def shown(value):
    """A cell of the table."""
    if value is None:
        return "-"
    return str(value) if isinstance(value, Figure) else f"{value:.3f}"


# ---------------------------------------------------------------------------- the file


def write_json(path, figures):
    """Write the figures as JSON, whole or not at all."""
    write_file(path, json.dumps(figures, indent=1))


def by_kind(published):
    """{figure: {kind: Figure}} -> {"speech": {figure: number}, ..., "intervals": {kind: {figure:
    [low, high]}}}, for --json; kinds without figures are left out.
    """
    found = {}
    for name, row in published.items():
        for kind, figure in row.items():
            found.setdefault(kind, {})[name] = round(figure.value, 4)
            found.setdefault("intervals", {}).setdefault(kind, {})[name] = figure.ends()
    return found


def published_json(published, judges):
    """The published figures for --json: "speech" is there wherever judges were asked."""
    return {"speech": {}} | by_kind(published) if judges else {}


def merge_intervals(figures, published):
    """Add published figures, their intervals to those that are there."""
    ends = published.pop("intervals", {})
    figures |= published
    figures["intervals"] |= ends
