"""Every picture: spectrograms, losses, curves of tools/studies.py, and the mask of AudioCALM; and
the listening page (page.py).

    python report.py page out/quickstart         the run's report.html anew, to listen in a browser
                     [--embed] [--out page.html]     --embed: one file with all sounds
    python report.py losses out/quickstart       draw the run's loss.png anew from its log.jsonl
                     [--panels vae:mel,lm:head,lm:valid_energy] [--out losses.png]
    python report.py mask mask.png               who sees whom in AudioCALM's training pass

matplotlib is imported when the first picture is drawn, always without a screen.
"""
import argparse
import os
from io import BytesIO

import torch

from audiocalm import ar_flow_mask, make_mask
from cli import BadInput, Parser, cli, write_file
from page import OWN_SCALE, read_curves, write_page


def pyplot():
    """matplotlib.pyplot that draws into files."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    return pyplot


def save_picture(fig, path, dpi=80):
    """fig -> a png at path, whole or not at all."""
    png = BytesIO()
    fig.savefig(png, dpi=dpi, format="png")
    write_file(path, png.getvalue())
    pyplot().close(fig)


def draw_spectrograms(path, pictures, sample_rate, columns=1):
    """dB spectrograms (512-point Hann, hop 128, the same scale and time axis for all) of [(title,
    wav (ch, S)), ...] -> a png at path.
    """
    longest = max([512, *(wav.shape[-1] for _, wav in pictures)]) / sample_rate
    rows = -(-len(pictures) // columns)
    fig, axes = pyplot().subplots(rows, columns, figsize=(3 + 4 * columns, 2.1 * rows),
                                  squeeze=False, layout="constrained")
    for ax, (title, wav) in zip(axes.flat, pictures):
        wav = wav[0].float().cpu()
        wav = torch.nn.functional.pad(wav, (0, max(0, 512 - len(wav))))
        spectrum = torch.stft(wav, 512, 128, window=torch.hann_window(512), return_complex=True)
        db = 20 * spectrum.abs().clamp(min=1e-4).log10()
        ax.imshow(db.numpy(), origin="lower", aspect="auto", vmin=-60, vmax=35,
                  extent=(0, len(wav) / sample_rate, 0, sample_rate / 2000))
        ax.set_xlim(0, longest)
        ax.set_title(title[:80], fontsize=8)
        ax.tick_params(labelsize=6)

    for ax in axes[:, 0]:
        ax.set_ylabel("kHz", fontsize=7)
    for ax in axes[-1]:
        ax.set_xlabel("seconds", fontsize=7)
    save_picture(fig, path)


def draw_losses(run, path=None, panels=None):
    """The curves of a run's log.jsonl against the step -> a png at path (run/loss.png).

    panels: ["vae:mel", "lm:valid_energy", ...], a stage and how the names of its figures begin;
    default: one per figure of training, whose held-out values are dots beside it, then one per
    figure that is logged only at validation (valid_energy, valid_head: one curve per kind).
    """
    curves, default = read_curves(run)
    panels = panels or default
    if not panels:
        return

    columns = min(3 if len(panels) <= 6 else 4, len(panels))
    lines = -(-len(panels) // columns)
    fig, axes = pyplot().subplots(lines, columns, squeeze=False, layout="constrained",
                                  figsize=(3 * columns, 2 * lines))
    for ax in axes.flat[len(panels):]:
        ax.set_axis_off()
    for ax, panel in zip(axes.flat, panels):
        stage, _, prefix = panel.partition(":")
        names = [name for of_stage, name in curves if of_stage == stage and name == prefix]
        names = names or [name for of_stage, name in curves
                          if of_stage == stage and name.startswith(prefix)]
        for name in names:
            ax.plot(*zip(*curves[stage, name]), lw=0.9, marker="o" if "valid" in name else "", ms=3,
                    label=name.removeprefix(prefix).strip("_"))
            if (stage, f"valid_{name}") in curves and name not in OWN_SCALE:
                ax.plot(*zip(*curves[stage, f"valid_{name}"]), "o", ms=4)
        if len(names) > 1:
            ax.legend(fontsize=6)
        ax.set_title(f"{stage}: {prefix.rstrip('_')}", fontsize=8)
        ax.tick_params(labelsize=6)
    save_picture(fig, path or f"{run}/loss.png")


def draw_sweep(path, setting, rows):
    """One panel per figure, against the setting -> a png at path.

    rows: {value of the setting: {figure: number}}.
    """
    figures = list(dict.fromkeys(name for row in rows.values() for name in row))
    fig, axes = pyplot().subplots(1, len(figures), squeeze=False, layout="constrained",
                                  figsize=(3 * len(figures), 2.5))
    for ax, name in zip(axes[0], figures):
        points = [(value, row[name]) for value, row in rows.items() if name in row]
        ax.plot(*zip(*points), "o-")
        ax.set_title(name, fontsize=8)
        ax.set_xlabel(setting)
        if name.split()[0] in ("facts", "length"):          # shares: a text more or less is no peak
            ax.set_ylim(0, 1.05)
    save_picture(fig, path, dpi=100)


def draw_continuation(path, curves):
    """Four panels against the second after the prompt, one line per kind -> a png at path.

    curves: {kind: {"alive", "level", "mmd", "beat"}}, each a list of numbers or None; entry 0 is
    the prompts' figure, of "mmd" and "beat" a dotted line.
    """
    titles = {"alive": "share not ended", "level": "level against the prompt, dB",
              "mmd": "MMD² to real seconds (dotted: prompts)",
              "beat": "strength of the pulse (dotted: prompts)"}
    fig, axes = pyplot().subplots(1, 4, layout="constrained", figsize=(13, 2.6))
    for ax, (figure, title) in zip(axes, titles.items()):
        for i, (kind, figures) in enumerate(curves.items()):
            values = figures[figure]
            seconds = [s for s, value in enumerate(values) if s and value is not None]
            ax.plot(seconds, [values[s] for s in seconds], "o-", ms=3, color=f"C{i}", label=kind)
            if figure in ("mmd", "beat") and values[0] is not None:
                ax.axhline(values[0], ls=":", color=f"C{i}")
        ax.set_title(title, fontsize=9)
        ax.set_xlabel("second after the prompt", fontsize=8)
    axes[0].legend(fontsize=8)
    save_picture(fig, path, dpi=100)


def draw_mask(path, prefix=4, blocks=3, block=4):
    """AudioCALM's mask as a png: a row is the position that looks, a column the one it sees."""
    # the mask of a short sequence: [text and prompt | clean | noisy]
    T = blocks * block
    order = torch.cat([torch.arange(-prefix, 0)] + [torch.arange(T) // block] * 2)
    copy = torch.cat([torch.zeros(prefix + T), torch.ones(T)])
    S = len(order)
    valid = torch.ones(1, S, dtype=torch.bool)
    mask = make_mask(ar_flow_mask(order, copy, valid), 1, S, copy.device)[0, 0]

    # coloured by the part that is seen
    key = torch.arange(S)
    part = 1 + (key >= prefix).long() + (key >= prefix + T)
    plt = pyplot()
    fig, ax = plt.subplots(figsize=(5, 5), layout="constrained")
    colors = plt.matplotlib.colors.ListedColormap(["#f4f4f4", "#7a7a7a", "#3b6fb6", "#c8553d"])
    ax.imshow((mask * part).numpy(), cmap=colors, vmin=0, vmax=3)

    # a white line and a name per block
    edges = [0, prefix, *range(prefix + block, S, block)]
    for at in edges:
        ax.axhline(at - 0.5, color="white", lw=1)
        ax.axvline(at - 0.5, color="white", lw=1)
    middle = [(a + b - 1) / 2 for a, b in zip(edges, edges[1:] + [S])]
    names = ["text,\nprompt"] + [f"{half}\n{i + 1}" for half in ("clean", "noisy")
                                 for i in range(blocks)]
    ax.set_xticks(middle, names, fontsize=8)
    ax.set_yticks(middle, names, fontsize=8)
    ax.set_xlabel("is seen")
    ax.set_ylabel("looks")
    ax.tick_params(length=0)
    save_picture(fig, path, dpi=100)


def draw_ablation(path, names, columns, result):
    """The table of tools/ablate.py as a png at path: one panel per column, one line per row.

    names: rows, from top to bottom. result: {name: {column: {"mean": ..., "seeds": [...]}}}; seeds
    are dots, their mean is a vertical line.
    """
    across = min(len(columns), 3)
    down = -(-len(columns) // across)
    size = (3 * across + 1.5, down * (0.28 * len(names) + 0.8))
    fig, axes = pyplot().subplots(down, across, squeeze=False, sharey=True, layout="constrained",
                                  figsize=size)
    for column, ax in zip(columns, axes.flat):
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

    # panels left over are empty; the shared axis runs down, in the order of the table
    for ax in axes.flat[len(columns):]:
        ax.axis("off")
    axes[0, 0].invert_yaxis()
    save_picture(fig, path, dpi=100)


def main():
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=["page", "losses", "mask"])
    p.add_argument("path", help="page, losses: a run folder (page: or one with wavs); mask: the "
                                "png to write")
    p.add_argument("--embed", action="store_true", help="page: with the sounds inside, one file")
    p.add_argument("--panels", help="losses: only these, stage:name, separated by commas; a name "
                                    "may be the beginning of several")
    p.add_argument("--out", help="the file to write; default: report.html or loss.png there")
    a = p.parse_args()
    if a.what == "mask":
        draw_mask(a.path)
        return
    if a.what == "page":
        write_page(a.path, a.out, a.embed)
        print(a.out or f"{a.path}/report.html")
        return
    if not os.path.exists(f"{a.path}/log.jsonl"):
        raise BadInput(f"{a.path}: no log.jsonl in it; give a run folder")
    draw_losses(a.path, a.out, a.panels and a.panels.split(","))


if __name__ == "__main__":
    cli(main)
