"""Figures of a trained run: how well the VAE reconstructs, how well generations say what their text
says.

    python evaluate.py --run out/quickstart [--manifest heldout.jsonl] [--what all|vae|lm]
                       [--json figures.json] [--metrics pesq,stoi,dnsmos,wer]

    held-out clips ─► VAE ─► reconstructions ─┬─► log-mel distance (any corpus)
    held-out texts ─► CALM ─► generations ────┴─► the toy corpus's oracle: digits, counts, pitch,
                                                  tempo right

log-mel distance: mean |log10 mel(x) - log10 mel(x̂)|, 80 bands, n_fft 1024; divided by the same
between a clip and another one: 0 = perfect, 1 = as far as any two clips.
SI-SDR: 10 log10(‖αx‖² / ‖αx - x̂‖²) dB, α = <x, x̂> / ‖x‖² (Le Roux et al. 2019): above 0 only for
codecs that keep the waveform. STFT distance: spectral convergence + log magnitudes at 2048, 1024,
512, 256 (vae.py). Rate: KL in nats a second, or K log2(entries) bits a second.
--metrics, on the speech clips at 16 kHz, with the eval extra: pesq (wide band) and stoi against the
original; dnsmos (overall) and wer (Whisper, --whisper NAME or folder) of original and
reconstruction. The oracle (toy.py)
measures each fact that a text of the toy corpus states; "chance" is what guessing gives. On other
corpora it is left out.
Exit status: 0 done, 2 your mistake (one line says which).
"""
import argparse
import json
import math
import os

import soxr
import torch
from tqdm import tqdm

import toy
from config import load_checkpoint, open_run
from data import (KINDS, BadInput, Parser, cli, draw_spectrograms, encode_text, load_audio,
                  load_clips, load_manifest, save_audio)
from vae import kl_loss, mel_filters, spectral_losses, stft


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


def si_sdr(x, y):
    """x, y (ch, S): original, estimate -> dB."""
    x, y = (w.double() - w.double().mean() for w in (x, y))
    target = (x * y).sum() / x.pow(2).sum() * x
    return (10 * torch.log10(target.pow(2).sum() / (target - y).pow(2).sum())).item()


def words(text):
    return "".join(c if c.isalnum() else " " for c in text.lower().replace("'", "")).split()


def word_errors(said, heard):
    """Insertions + deletions + substitutions that turn one list of words into the other."""
    row = list(range(len(heard) + 1))
    for i, a in enumerate(said, 1):
        last, row[0] = row[0], i
        for j, b in enumerate(heard, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (a != b))
    return row[-1]


METRICS = ("pesq", "stoi", "dnsmos", "wer")


class Judges:
    """Published judges of speech; each call adds one clip, figures() averages."""

    def __init__(self, names, whisper="base"):
        self.names, self.sums = names, {}
        try:
            if "pesq" in names:
                import pesq
                self.pesq, self.no_speech = pesq.pesq, (pesq.NoUtterancesError,
                                                        pesq.BufferTooShortError)
            if "stoi" in names:
                from pystoi import stoi
                self.stoi = stoi
            if "dnsmos" in names:
                from speechmos import dnsmos
                self.dnsmos = dnsmos
            if "wer" in names:
                from faster_whisper import WhisperModel
                self.whisper = WhisperModel(whisper, device="cpu", compute_type="int8")
        except ImportError as e:
            raise BadInput(
                f"--metrics: {e.name} is not installed: pip install -e .[eval]") from None
        except (RuntimeError, OSError, ValueError) as e:
            raise BadInput(f"--whisper {whisper}: cannot be loaded "
                           f"({str(e).splitlines()[0]})") from None

    def add(self, name, value, weight=1):
        total, count = self.sums.get(name, (0.0, 0))
        self.sums[name] = (total + value, count + weight)

    def __call__(self, original, rec, text, rate):
        """original, rec (S,) numpy at `rate` Hz."""
        x, y = (soxr.resample(w, rate, 16000).clip(-1, 1) for w in (original, rec))
        if "pesq" in self.names:
            try:
                self.add("pesq", self.pesq(16000, x, y, "wb"))
            except self.no_speech:                       # PESQ finds no speech in it: not counted
                self.add("pesq", 0.0, 0)
        if "stoi" in self.names:
            self.add("stoi", self.stoi(x, y, 16000))
        for name, w in (("original", x), ("reconstruction", y)):
            if "dnsmos" in self.names:
                self.add(f"dnsmos {name}", self.dnsmos.run(w, 16000)["ovrl_mos"])
            if "wer" in self.names and text:
                segments, _ = self.whisper.transcribe(w, language="en", beam_size=1,
                                                      condition_on_previous_text=False)
                heard = words(" ".join(s.text for s in segments))
                self.add(f"wer {name}", word_errors(words(text), heard), len(words(text)))

    def figures(self):
        return {name: round(float(total / count), 4)
                for name, (total, count) in self.sums.items() if count}


def share(pairs):
    pairs = [p for p in pairs if p]
    return round(sum(r for r, _ in pairs) / max(1, sum(t for _, t in pairs)), 4) if pairs else None


def mean_of(values):
    return round(sum(values) / len(values), 4) if values else None


def information(vae, mean, logvar):
    """What a second of latents holds: KL to N(0, 1) in nats, or bits of codes."""
    if vae.quantizer is not None:
        return vae.cfg.frame_rate * vae.cfg.codebooks * math.log2(vae.cfg.codebook_size)
    return kl_loss(mean, logvar).item() * vae.cfg.latent_dim * vae.cfg.frame_rate


@torch.no_grad()
def judge_vae(vae, clips, limit, folder, judges=None):
    """{kind: {log_mel, stft, si_sdr, rate, original, reconstruction}} over the first `limit` clips
    of each kind; `judges` hears the speech.
    """
    out, rate = {}, vae.cfg.sample_rate
    for kind in KINDS:
        own = [c for c in clips if c.kind == kind][:limit]
        near, far, before, after, last = [], [], [], [], None
        spectra, waves, rates = [], [], []
        for clip in tqdm(own, desc=f"reconstruct {kind}", leave=False):
            wav = torch.tensor(load_audio(clip.audio, rate, vae.cfg.channels, seconds=20.0,
                                          allow_silence=True))
            mean, logvar = vae.encode(wav[None])
            rec = vae.decode(mean)[0, :, :wav.shape[-1]]
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
            rates.append(information(vae, mean, logvar))
            if wav.shape[-1] >= 2048 and wav.abs().max() > 1e-3:
                spectra.append(spectral_losses(wav[None], rec[None], vae.cfg,
                                               [2048, 1024, 512, 256], ["stft"])["stft"].item())
                waves.append(si_sdr(wav, rec))
            if judges is not None and kind == "speech":
                judges(wav[0].numpy(), rec[0].numpy(), clip.text, rate)
            if last is not None:
                n = min(last.shape[1], mel.shape[1])
                far.append((mel[:, :n] - last[:, :n]).abs().mean().item())
            last = mel
        if far:
            out[kind] = {"clips": len(own),
                         "log_mel": round(sum(near) / len(near) / (sum(far) / len(far)), 4),
                         "stft": mean_of(spectra), "si_sdr": mean_of(waves),
                         "rate": mean_of(rates), "original": share(before),
                         "reconstruction": share(after)}
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
            lengths.setdefault(len(encode_text(text, kind, cfg.data)), []).append(text)
        for length, group in tqdm(sorted(lengths.items()), desc=f"generate {kind}", leave=False):
            group = [text for text in group for _ in range(repeats)]
            tokens = torch.tensor([encode_text(text, kind, cfg.data) for text in group])
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
            made, = lm.render(vae, torch.tensor([encode_text(clip.text, kind, cfg.data)]),
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
    p.add_argument("--metrics", default="",
                   help=f"any of {','.join(METRICS)}: needs the eval extra")
    p.add_argument("--whisper", default="base", help="faster-whisper model for wer (default base)")
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
    metrics = [m for m in a.metrics.split(",") if m]
    for name in set(metrics) - set(METRICS):
        raise BadInput(f"--metrics: unknown '{name}'; valid: {', '.join(METRICS)}")
    judges = Judges(metrics, a.whisper) if metrics else None
    cfg, vae, _, _ = open_run(a.run)
    manifest = a.manifest or ("" if cfg.data.manifest else f"{a.run}/toy/valid.jsonl")
    clips = load_manifest(manifest) if manifest else load_clips(cfg.data)[1]
    figures, rows, models = {"run": a.run, "clips": len(clips)}, [], {}
    if a.what in ("all", "vae"):
        figures["vae"] = judge_vae(vae, clips, a.limit, a.wavs, judges)
        if judges is not None:
            figures["speech"] = judges.figures()
        rows += [("log-mel distance (0 perfect, 1 another clip)",
                  {k: v["log_mel"] for k, v in figures["vae"].items()})]
        unit = "nats" if vae.quantizer is None else "bits"
        rows += [(name, {k: v[key] for k, v in figures["vae"].items()})
                 for name, key in (("STFT distance", "stft"), ("SI-SDR, dB", "si_sdr"),
                                   (f"rate, {unit} a second", "rate"))]
        rows += [(name, {"speech": value}) for name, value in figures.get("speech", {}).items()]
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
        steps = lm.cfg.head.sample_steps
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
