"""Figures of a trained run: how well the VAE reconstructs, how well generations say what their text
says.

    python evaluate.py --run out/quickstart [--manifest heldout.jsonl] [--what all|vae|lm]
                       [--json figures.json]

    held-out clips ─► VAE ─► reconstructions ─┬─► log-mel distance (any corpus)
    held-out texts ─► CALM ─► generations ────┴─► the toy corpus's oracle: digits, counts, pitch,
                                                  tempo right

log-mel distance: mean |log10 mel(x) - log10 mel(x̂)|, 80 bands, n_fft 1024; divided by the same
between a clip and another one: 0 = perfect, 1 = as far as any two clips. The oracle (toy.py)
measures each fact that a text of the toy corpus states; "chance" is what guessing gives. On other
corpora it is left out.
Exit status: 0 done, 2 your mistake (one line says which).
"""
import argparse
import json
import os

import torch
from tqdm import tqdm

import toy
from config import load_checkpoint, open_run
from data import (KINDS, BadInput, Parser, cli, draw_spectrograms, encode_text, load_audio,
                  load_clips, load_manifest, save_audio)
from vae import mel_filters, stft


def log_mel(wav, rate):
    """(ch, S) -> (80, frames) log10, floor 1e-5."""
    return (mel_filters(rate, 1024, 80) @ stft(wav[:1], 1024)[0].abs() / 32).clamp(min=1e-5).log10()


def facts(wav, clip, rate):
    """(right, total) of the facts that the clip's text states, heard in wav (ch, S); None if it
    states none.
    """
    try:
        found = toy.oracle(wav[0].numpy(), clip.text, clip.kind, rate)
    except BadInput:
        return None
    return found["right"], found["total"]


def share(pairs):
    pairs = [p for p in pairs if p]
    return round(sum(r for r, _ in pairs) / max(1, sum(t for _, t in pairs)), 4) if pairs else None


@torch.no_grad()
def judge_vae(vae, clips, limit, folder):
    """{kind: {log_mel, original, reconstruction}} over the first `limit` clips of each kind."""
    out, rate = {}, vae.cfg.sample_rate
    for kind in KINDS:
        own = [c for c in clips if c.kind == kind][:limit]
        near, far, before, after, last = [], [], [], [], None
        for clip in tqdm(own, desc=f"reconstruct {kind}", leave=False):
            wav = torch.tensor(load_audio(clip.audio, rate, vae.cfg.channels, seconds=20.0,
                                          allow_silence=True))
            rec = vae.decode(vae.encode(wav[None])[0])[0, :, :wav.shape[-1]]
            if folder:
                save_audio(
                    f"{folder}/reconstruction/"
                    f"{clip.id or os.path.splitext(os.path.basename(clip.audio))[0]}.wav",
                    rec.numpy(), rate)
            before.append(facts(wav, clip, rate))
            after.append(facts(rec, clip, rate))
            if wav.shape[-1] < 1024:
                continue
            mel = log_mel(wav, rate)
            near.append((mel - log_mel(rec, rate)).abs().mean().item())
            if last is not None:
                n = min(last.shape[1], mel.shape[1])
                far.append((mel[:, :n] - last[:, :n]).abs().mean().item())
            last = mel
        if far:
            out[kind] = {"clips": len(own),
                         "log_mel": round(sum(near) / len(near) / (sum(far) / len(far)), 4),
                         "original": share(before), "reconstruction": share(after)}
    return out


def judge_lm(lm, vae, cfg, clips, repeats, limit, steps, folder):
    """{kind: share of facts right} over every distinct held-out text, `repeats` draws of each.

    Texts of equal length share a batch: the model takes no padding when it generates.
    """
    out, chance = {}, {}
    for kind in KINDS:
        held = {c.text: c for c in clips if c.kind == kind and c.text}
        texts, heard, shown = sorted(held)[:limit], [], 0
        lengths = {}
        for text in texts:
            lengths.setdefault(len(encode_text(text, kind)), []).append(text)
        for length, group in tqdm(sorted(lengths.items()), desc=f"generate {kind}", leave=False):
            group = [text for text in group for _ in range(repeats)]
            tokens = torch.tensor([encode_text(text, kind) for text in group])
            wavs = lm.render(vae, tokens, kind=KINDS.index(kind), seconds=cfg.sample.seconds,
                             steps=steps, temperature=cfg.sample.temperature,
                             guidance=cfg.sample.cfg,
                             generator=torch.Generator().manual_seed(length))
            heard += [facts(w, held[t], cfg.vae.sample_rate) for w, t in zip(wavs, group)]
            if folder and shown < 3:
                shown += 1
                name = group[0].replace(" ", "_").replace(",", "")
                save_audio(f"{folder}/{kind}_{name}.wav", wavs[0].numpy(), cfg.vae.sample_rate)
        if share(heard) is not None:
            out[kind] = share(heard)
            chance[kind] = round(sum(toy.chance(t, kind) for t in texts) / len(texts), 4)
    return out, chance


@torch.no_grad()
def overview(path, vae, models, cfg, clips):
    """One column a kind: a held-out clip, its reconstruction, and each model's generation from the
    same text.
    """
    rate, kinds = cfg.vae.sample_rate, [
        k for k in KINDS if any(c.kind == k and c.text for c in clips)]
    rows = [[] for _ in range(2 + len(models))]
    for kind in kinds:
        clip = min((c for c in clips if c.kind == kind and c.text), key=lambda c: c.text)
        wav = torch.tensor(load_audio(clip.audio, rate, vae.cfg.channels,
                                      seconds=cfg.sample.seconds, allow_silence=True))
        rows[0].append((f"{kind}: {clip.text}", wav))
        rows[1].append(("reconstruction", vae.decode(vae.encode(wav[None])[0])[0]))
        for row, (name, lm) in zip(rows[2:], models.items()):
            made, = lm.render(vae, torch.tensor([encode_text(clip.text, kind)]),
                              kind=KINDS.index(kind), seconds=cfg.sample.seconds,
                              temperature=cfg.sample.temperature, guidance=cfg.sample.cfg,
                              generator=torch.Generator().manual_seed(0))
            row.append((f"generated from the text, {name}", made))
    draw_spectrograms(path, [picture for row in rows for picture in row], rate, columns=len(kinds))


def main():
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--run", required=True, help="a run folder written by train.py")
    p.add_argument("--manifest", help="held-out clips; default: the run's own")
    p.add_argument("--what", default="all", choices=["all", "vae", "lm"])
    p.add_argument("--repeats", type=int, default=6, help="draws of each text (default 6)")
    p.add_argument("--limit", type=int, default=40,
                   help="clips and texts of each kind (default 40)")
    p.add_argument("--wavs", help="folder for all reconstructions, three generations of each kind "
                                  "and model, overview.png")
    p.add_argument("--json", help="write the figures here")
    p.add_argument("--threads", type=int, default=0, help="CPU threads; 0 = torch's choice")
    a = p.parse_args()
    if a.repeats < 1 or a.limit < 1:
        raise BadInput("--repeats, --limit: must be at least 1")
    if a.wavs:
        try:
            os.makedirs(a.wavs, exist_ok=True)
        except OSError as e:
            raise BadInput(f"--wavs {a.wavs}: cannot be made ({e.strerror})") from None
    if a.threads:
        torch.set_num_threads(a.threads)
    cfg, vae, _, _ = open_run(a.run)
    manifest = a.manifest or ("" if cfg.data.manifest else f"{a.run}/toy/valid.jsonl")
    clips = load_manifest(manifest) if manifest else load_clips(cfg.data)[1]
    figures, rows, models = {"run": a.run, "clips": len(clips)}, [], {}
    if a.what in ("all", "vae"):
        figures["vae"] = judge_vae(vae, clips, a.limit, a.wavs)
        rows += [("log-mel distance (0 perfect, 1 another clip)",
                  {k: v["log_mel"] for k, v in figures["vae"].items()})]
        rows += [(f"{name}: facts right", {k: v[name] for k, v in figures["vae"].items()})
                 for name in ("original", "reconstruction")]
    stages = [s for s in ("lm", "consistency")
              if os.path.exists(f"{a.run}/{s}.pt")] if a.what in ("all", "lm") else []
    for stage in stages:
        if not load_checkpoint(f"{a.run}/{stage}.pt")["done"]:
            raise BadInput(f"{a.run}/{stage}.pt: its training is not finished; "
                           "run train.py again, it goes on")
        _, _, lm, _ = open_run(a.run, stage)
        objective = lm.cfg.head.objective
        steps = lm.cfg.head.steps or (1 if objective == "consistency" else 20)
        folder = f"{a.wavs}/{stage}" if a.wavs else ""
        found, chance = judge_lm(lm, vae, cfg, clips, a.repeats, a.limit, steps, folder)
        models[f"{objective}, {steps} step{'s' * (steps > 1)}"] = lm
        figures[stage] = {"objective": objective, "steps": steps, "facts": found, "chance": chance}
        rows.append((f"generation, {list(models)[-1]}: facts right", found))
        if stage == stages[-1]:
            rows.append(("chance", chance))
    print(f"{'':52s}" + "".join(f"{k:>9s}" for k in KINDS))
    for name, row in rows:
        if any(v is not None for v in row.values()):
            print(f"{name:52s}" + "".join(
                f"{row[k]:9.3f}" if row.get(k) is not None else f"{'-':>9s}" for k in KINDS))
    if a.wavs:
        overview(f"{a.wavs}/overview.png", vae, models, cfg, clips)
    if a.json:
        try:
            with open(a.json, "w") as f:
                json.dump(figures, f, indent=1)
        except OSError as e:
            raise BadInput(f"--json {a.json}: cannot be written ({e.strerror})") from None


if __name__ == "__main__":
    cli(main)
