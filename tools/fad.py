"""Does a distance order audio as an ear would? Real clips, and the same clips damaged, against
other real clips of the same sources.

    python -m tools.fad valid.jsonl --reference train.jsonl [--embedding mel,birdnet] [--dims 64]
                        [--run out/quickstart] [--kind speech] [--picture fad.png] [--json f.json]

    valid.jsonl ─► as they are ───────────────────────┐
                 ├► low-passed at 4, 2, 1 kHz ────────┼─► fad, mmd ◄── train.jsonl
                 ├► white noise 30, 20, 10 dB below ──┤
                 └► reconstructed by a run's VAE ─────┘

Real against real should be near 0, and each row of damages should grow. A distance that fails this
on your audio says nothing about your model. All clips are heard at 16 kHz, up to 20 s of each.

Exit status: 0 done, 2 your mistake (one line says which).
"""
import argparse

import numpy as np
import torch
from tqdm import tqdm

from audio import load_audio
from cli import BadInput, Parser, check_writable, cli, number
from config import open_run
from data import KINDS, load_manifest
from distances import fad, fad_inf, mmd
from embeddings import embed_clip, open_embedding
from figures import write_json
from intervals import drawn_evenly
from judges import SECONDS, match_sources, opening, read_sources
from report import pyplot, save_picture

RATE = 16000
LOW_PASS = (4000, 2000, 1000)       # Hz
NOISE = (30, 20, 10)                # dB below the clip


def low_pass(wav, hz):
    """wav (1, S) without what lies above `hz`, a sharp edge in the spectrum."""
    spectrum = torch.fft.rfft(wav)
    frequencies = torch.fft.rfftfreq(wav.shape[-1], 1 / RATE)
    return torch.fft.irfft(spectrum * (frequencies <= hz), wav.shape[-1])


def add_noise(wav, decibels, generator):
    """wav (1, S) with white noise that many dB below it."""
    noise = torch.randn(wav.shape, generator=generator)
    level = wav.square().mean().sqrt() * 10 ** (-decibels / 20)
    return (wav + level * noise).clamp(-1, 1)


@torch.no_grad()
def reconstruct(wav, vae):
    """wav (1, S) at 16 kHz through a VAE of that rate."""
    mean, _ = vae.encode(wav[None])
    return vae.decode(mean)[0, :1, :wav.shape[-1]]


def damages(vae):
    """{name: function of a wav (1, S)}; what is real stands first."""
    generator = torch.Generator().manual_seed(0)
    found = {"real": lambda wav: wav}
    for hz in LOW_PASS:
        found[f"below {hz // 1000} kHz"] = lambda wav, hz=hz: low_pass(wav, hz)
    for decibels in NOISE:
        found[f"noise -{decibels} dB"] = lambda wav, d=decibels: add_noise(wav, d, generator)
    if vae is not None:
        found["reconstructed"] = lambda wav: reconstruct(wav, vae)
    return found


def load(clip):
    return torch.tensor(load_audio(clip.audio, RATE, seconds=SECONDS, allow_silence=True))


def extrapolated(judged, real, dims):
    """fad_inf, or None and a line where the clips are too few for it."""
    try:
        return fad_inf(judged, real, dims)
    except BadInput as e:
        print(e)
        return None


def measure(name, clips, reference, vae, dims):
    """{"fad mel": {damage: Figure}, "fad_inf mel": ..., "mmd mel": ...} of one embedding; fad_inf,
    which needs three times the windows of fad, is None with fewer, and a line says so.
    """
    with opening(f"--embedding {name}", "eval,hf"):
        model = open_embedding(name)
    real = [embed_clip(model, load(clip), RATE)
            for clip in tqdm(reference, desc=f"{name}: reference", leave=False)]
    found = {f"{metric} {name}": {} for metric in ("fad", "fad_inf", "mmd")}
    for damage, apply in damages(vae).items():
        judged = [embed_clip(model, apply(load(clip)), RATE)
                  for clip in tqdm(clips, desc=f"{name}: {damage}", leave=False)]
        figures = fad(judged, real, dims), extrapolated(judged, real, dims), mmd(judged, real)
        for row, figure in zip(found.values(), figures):
            row[damage] = figure
        print(f"{name:10s}{damage:16s}fad {figures[0]}   fad_inf {figures[1]}   mmd {figures[2]}",
              flush=True)
    return found


def draw(path, figures):
    """A panel per distance but fad_inf: bars with intervals -> a png at path."""
    figures = {name: row for name, row in figures.items() if not name.startswith("fad_inf")}
    fig, axes = pyplot().subplots(1, len(figures), figsize=(3 * len(figures), 2.6), squeeze=False,
                                  sharey=True, layout="constrained")
    for ax, (name, row) in zip(axes[0], figures.items()):
        values = np.array([figure.value for figure in row.values()])
        ends = np.array([[figure.low, figure.high] for figure in row.values()]).T
        ax.barh(list(row), values, xerr=np.abs(ends - values), height=0.7,
                color=["C2"] + ["C0"] * 3 + ["C1"] * 3 + ["C3"] * (len(row) - 7),
                error_kw={"lw": 1})
        ax.set_title(name, fontsize=8)
        ax.tick_params(labelsize=7)
        ax.locator_params(axis="x", nbins=5)
    axes[0, 0].invert_yaxis()
    save_picture(fig, path)


def parse():
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("manifest", help="clips that are damaged")
    p.add_argument("--reference", required=True, help="manifest of other real clips")
    p.add_argument("--embedding", default="mel", help="separated by commas (default mel)")
    p.add_argument("--dims", type=number(int, 0), default=64,
                   help="principal axes for fad, 0 = all (default 64)")
    p.add_argument("--run", help="its VAE, of 16 kHz, reconstructs the clips")
    p.add_argument("--kind", choices=KINDS, help="only these clips")
    p.add_argument("--limit", type=number(int, 2), default=1000, help="clips (default 1000)")
    p.add_argument("--times", type=number(int, 1), default=2,
                   help="clips of the reference for each (default 2)")
    p.add_argument("--picture", help="draw bars here")
    p.add_argument("--json", help="write the figures here")
    return p.parse_args()


def main():
    a = parse()
    for path in filter(None, (a.picture, a.json)):
        check_writable(path)
    vae = None
    if a.run:
        _, vae, _, _ = open_run(a.run)
        if vae.cfg.sample_rate != RATE or vae.cfg.channels != 1:
            raise BadInput(f"--run {a.run}: its VAE is not mono at 16 kHz; give another run")

    # clips, and others of the same sources
    kinds = [a.kind] if a.kind else KINDS
    clips = drawn_evenly([c for c in load_manifest(a.manifest) if c.kind in kinds], a.limit)
    there = [c for c in load_manifest(a.reference) if c.kind in kinds]
    sources = read_sources(a.manifest) | read_sources(a.reference)
    names, reference = match_sources([clip.audio for clip in clips], there, sources, a.times)
    clips = [clip for clip in clips if clip.audio in set(names)]
    print(f"{len(clips)} clips against {len(reference)}")

    figures = {}
    for name in a.embedding.split(","):
        figures |= measure(name, clips, reference, vae, a.dims)
    if a.picture:
        draw(a.picture, figures)
    if a.json:
        write_json(a.json, {name: {damage: figure and [figure.value, figure.low, figure.high]
                                   for damage, figure in row.items()}
                            for name, row in figures.items()})


if __name__ == "__main__":
    cli(main)
