"""Figures of a trained run: how well the VAE reconstructs, how well generations say what their text
says.

    python evaluate.py --run out/quickstart [--manifest heldout.jsonl] [--what all|vae|lm]
                       [--json figures.json] [--metrics pesq,stoi,visqol,dnsmos,wer,sim]
    python evaluate.py --run out/quickstart --what lm --sweep steps [--values 1,2,4,10]
    python evaluate.py --run out/real_small --what continue [--wavs DIR]
    python evaluate.py --run out/quickstart --what draws [--repeats 24]

    held-out clips ─► VAE ─► reconstructions ─┬─► log-mel distance (any corpus)
    held-out texts ─► CALM ─► generations ────┴─► the toy corpus's oracle: digits, counts, pitch,
                                                  tempo right

log-mel distance: mean |log10 mel(x) - log10 mel(x̂)|, 80 bands, n_fft 1024; divided by the same
between a clip and another one: 0 = perfect, 1 = as far as any two clips.
SI-SDR: 10 log10(‖αx‖² / ‖αx - x̂‖²) dB, α = <x, x̂> / ‖x‖² (Le Roux et al. 2019): above 0 only for
codecs that keep the waveform. STFT distance: spectral convergence + log magnitudes at 2048, 1024,
512, 256 (vae.py). Rate: KL in nats a second, or K log2(entries) bits a second.
--metrics, on the speech clips at 16 kHz, with the eval extra: pesq (wide band), stoi and visqol
(speech mode, lattice; originals from .75 s, not silent) against the original; dnsmos (overall),
wer (Whisper, --whisper NAME or folder) of original, reconstruction and generations; sim, the cosine
of d-vectors (Resemblyzer) of a generation and the clip that lent its voice. The oracle (toy.py)
measures each fact that a text of the toy corpus states; "chance" is what guessing gives. On other
corpora it is left out. Length: share of generations that end within two latent frames of the
held-out clip's end (two clips of one text differ too).
Generations: every held-out text, in the voice of another held-out clip of its speaker where the run
was trained with voice prompts.
--sweep generates with one setting at several values (the last stage, or --stage): steps of the head
(CALM Table 6), temperature (its Fig. 3), cfg, noise; a table, and with --wavs a picture of the
curves.
--what continue: held-out clips' first seconds (sample.prompt_seconds) continued for sample.seconds,
without text; for each second of the new audio the share of clips that have not ended, their median
level against the prompt in dB, and their distance to real seconds of the same kind: squared MMD
(Gretton et al. 2012, unbiased) of log-mel means and deviations. "prompt" is the figure of the
prompts' reconstructions. A fade, a drift to noise or an early end show as curves, in a picture too
(CALM section 5 has none of this; Table 5's distances are over whole clips).
--what draws: what a few-step stage loses against the flow that it goes on from, where words and
facts are too easy to show it: `--repeats` draws of the first latents of each held-out text, at
temperature 1, without guidance and noise; their energy distance to as many draws of the flow in 32
steps (0 = the same distribution; unbiased, so a little below 0 at times), and their spread
(deviation from draw to draw) relative to it.
Exit status: 0 done, 2 your mistake (one line says which).
"""
import argparse
import json
import math
import os

import soxr
import torch
from tqdm import tqdm

from cli import BadInput, Parser, atomic, check_writable, cli, threads
from config import LM_STAGES, STAGES, load_checkpoint, open_run
from corpora import toy
from data import (KINDS, encode_text, load_audio, load_clips, load_manifest, save_audio, seconds_of)
from discrete import DISCRETE
from gan import mel_filters, spectral_losses, stft
from report import draw_spectrograms
from sample import encode_prompt, render
from vae import kl_loss


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


METRICS = ("pesq", "stoi", "visqol", "dnsmos", "wer", "sim")
SWEEPS = {"steps": (1, 2, 4, 10, 20), "temperature": (0.3, 0.5, 0.7, 0.9, 1.0),
          "cfg": (1.0, 1.5, 2.0, 3.0), "noise": (0.0, 0.5, 1.0)}


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
            if "visqol" in names:
                import ai_edge_litert.interpreter        # without it another, laxer mapping is used
                from visqol import VisqolApi
                self.visqol = VisqolApi()
                self.visqol.create(mode="speech")
            if "dnsmos" in names:
                from speechmos import dnsmos
                self.dnsmos = dnsmos
            if "wer" in names:
                from faster_whisper import WhisperModel
                self.whisper = WhisperModel(whisper, device="cpu", compute_type="int8")
            if "sim" in names:
                from resemblyzer import VoiceEncoder
                self.voice = VoiceEncoder("cpu", verbose=False).embed_utterance
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
        if "visqol" in self.names and len(x) >= 12000 and abs(x).max() > 1e-3:
            score = self.visqol.measure_from_arrays(x, y, sample_rate=16000).moslqo
            self.add("visqol", score if math.isfinite(score) else 1.0)      # nan: y is silent
        for name, w in (("original", x), ("reconstruction", y)):
            self.hear(name, w, text)

    def hear(self, name, w, text, voice=None):
        """w (S,) numpy at 16 kHz: dnsmos and wer of it, sim to voice (S',)."""
        w = w.clip(-1, 1)                                # DNSMOS refuses what is louder
        if "dnsmos" in self.names:
            self.add(f"dnsmos {name}", self.dnsmos.run(w, 16000)["ovrl_mos"])
        if "wer" in self.names and text:
            segments, _ = self.whisper.transcribe(w, language="en", beam_size=1,
                                                  condition_on_previous_text=False)
            heard = words(" ".join(s.text for s in segments))
            self.add(f"wer {name}", word_errors(words(text), heard), len(words(text)))
        if "sim" in self.names and voice is not None:
            self.add(f"sim {name}", float(self.voice(w) @ self.voice(voice)))    # unit vectors

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
def judge_vae(vae, clips, limit, folder, judges=None, floor=1e-5):
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
                spectra.append(spectral_losses(wav[None], rec[None], rate,
                                               [2048, 1024, 512, 256], ["stft"], floor)["stft"].item())
                waves.append(si_sdr(wav, rec))
            if judges is not None and kind == "speech":
                judges(wav[0].numpy(), rec[0].numpy(), clip.transcript or clip.text, rate)
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


def spread(items, limit):
    """At most `limit` of them, evenly spaced."""
    n = min(limit, len(items))
    return [items[i * len(items) // n] for i in range(n)]


@torch.no_grad()
def voice_of(clip, clips, lm, vae, cfg):
    """(latents (1, P, D), wav (ch, S)) of another held-out clip of the speaker, or None: a voice
    prompt.
    """
    seconds = cfg.data.prompt_frames / vae.cfg.frame_rate
    other = [c for c in clips if c.speaker == clip.speaker != "" and c.audio != clip.audio
             and seconds_of(c) >= seconds]
    if clip.kind != "speech" or not cfg.data.prompt_frames or not other:
        return None
    wav = torch.tensor(load_audio(other[0].audio, vae.cfg.sample_rate, vae.cfg.channels))
    latents = encode_prompt(lm, vae, wav[None])
    first = (latents.shape[1] - cfg.data.prompt_frames) // 2         # its middle: no silence
    return latents[:, first:first + cfg.data.prompt_frames], wav


def judge_lm(lm, vae, cfg, clips, repeats, limit, folder="", judges=None, **options):
    """{kind: share of facts right}, guessing's, {kind: share of clips that end within two frames of
    the true end} over every distinct held-out text, `repeats` draws of each; `judges` hears the
    speech. options: steps, temperature, guidance, noise.

    Texts of equal length share a batch, with an inner monologue all texts: the model takes no
    padding when it generates.
    """
    out, chance, on_time, rate = {}, {}, {}, cfg.vae.sample_rate
    for kind in KINDS:
        held = {c.text: c for c in clips if c.kind == kind and c.text
                and len(encode_text(c.text, kind, cfg.data)) <= 1 + cfg.data.text_len}
        texts, heard, late, groups, manifest = spread(sorted(held), limit), [], [], {}, []
        voices = {t: voice_of(held[t], clips, lm, vae, cfg) for t in texts}
        for text in texts:
            alone = kind == "speech" and lm.monologue
            n = 0 if alone else len(encode_text(text, kind, cfg.data))
            groups.setdefault((n, voices[text] is not None), []).append(text)
        batches = [group[i:i + 32] for _, group in sorted(groups.items())
                   for i in range(0, len(group), 32)]
        for at, group in enumerate(tqdm(batches, desc=f"generate {kind}", leave=False)):
            ids = [encode_text(t, kind, cfg.data) for t in group]
            longest = max(map(len, ids))             # spaces: nothing for a monologue to say
            tokens = torch.tensor([i + [32] * (longest - len(i)) for i in ids], dtype=torch.long)
            prompt = None
            if voices[group[0]] is not None:
                prompt = torch.cat([voices[t][0] for t in group])
            for draw in range(repeats):
                seed = torch.Generator().manual_seed(1000 * draw + at)
                wavs = render(lm, vae, tokens, kind=KINDS.index(kind), seconds=cfg.sample.seconds,
                                 prompt=prompt, generator=seed, **options)
                heard += [facts(w, held[t], rate) for w, t in zip(wavs, group)]
                late += [abs(w.shape[-1] // cfg.vae.hop
                             - math.ceil(round(seconds_of(held[t]) * rate) / cfg.vae.hop))
                         for w, t in zip(wavs, group)]               # in latent frames
                for text, wav in zip(group, wavs):
                    said = held[text].transcript or text
                    if judges is not None and kind == "speech":
                        voice = voices[text]
                        judges.hear("generation", soxr.resample(wav[0].numpy(), rate, 16000), said,
                                    None if voice is None else soxr.resample(voice[1][0].numpy(),
                                                                             rate, 16000))
                    if folder and draw == 0:
                        name = held[text].id or os.path.splitext(
                            os.path.basename(held[text].audio))[0]
                        save_audio(f"{folder}/{name}.wav", wav.numpy(), rate)
                        manifest.append({"id": name, "text": said, "kind": kind,
                                         "audio": f"{name}.wav",
                                         "speaker": held[text].speaker})
        if manifest:
            with open(f"{folder}/{kind}.jsonl", "w") as f:
                f.writelines(json.dumps(row) + "\n" for row in manifest)
        if share(heard) is not None:
            out[kind] = share(heard)
            chance[kind] = round(sum(toy.chance(t, kind) for t in texts) / len(texts), 4)
        if late:
            on_time[kind] = mean_of([n <= 2 for n in late])
    return out, chance, on_time


def seconds_heard(wav, rate):
    """(ch, S) -> list of (160,): mean and standard deviation over time of each whole second's
    log-mel spectrum.
    """
    mels = [log_mel(second, rate) for second in wav.split(rate, -1) if second.shape[-1] == rate]
    return [torch.cat([mel.mean(1), mel.std(1)]) for mel in mels]


def mmd(x, y):
    """Squared maximum mean discrepancy of x (n, F) and y (m, F), unbiased (Gretton et al. 2012, eq.
    3); Gaussian kernel as wide as the median distance within y.
    """
    width = torch.pdist(y).median()
    k = lambda a, b: (-torch.cdist(a, b).square() / (2 * width ** 2)).exp()
    apart = lambda k: (k.sum() - k.trace()) / (len(k) * (len(k) - 1))
    return (apart(k(x, x)) + apart(k(y, y)) - 2 * k(x, y).mean()).item()


@torch.no_grad()
def judge_continuation(lm, vae, cfg, clips, limit, folder="", **options):
    """{kind: {alive, level, mmd}}, each a list: of the prompt's reconstruction, then of each second
    of what is new; None where fewer than 4 clips go on.
    """
    out, rate, lead = {}, cfg.vae.sample_rate, cfg.sample.prompt_seconds
    for kind in KINDS:
        own = [c for c in clips if c.kind == kind and seconds_of(c) >= lead]
        prompts = spread(own, limit)
        if len(prompts) < 4:
            continue
        load = lambda c, seconds: torch.tensor(load_audio(
            c.audio, rate, vae.cfg.channels, seconds=seconds, allow_silence=True))
        others = [c for c in clips if c.kind == kind and c not in prompts] or own
        real = torch.stack([x for c in tqdm(spread(others, 4 * limit), desc=f"real {kind}",
                                            leave=False)
                            for x in seconds_heard(load(c, 20.0), rate)])
        wavs = [load(c, lead)[None] for c in prompts]
        history = torch.cat([encode_prompt(lm, vae, w) for w in wavs])
        tokens = torch.tensor([encode_text("", kind, cfg.data)] * len(prompts), dtype=torch.long)
        made = render(lm, vae, tokens, kind=KINDS.index(kind), seconds=cfg.sample.seconds,
                         history=history, generator=torch.Generator().manual_seed(0), **options)
        start = history.shape[1] * vae.cfg.hop
        if folder:
            for clip, w in zip(prompts, made):
                name = clip.id or os.path.splitext(os.path.basename(clip.audio))[0]
                save_audio(f"{folder}/{name}.wav", w.numpy(), rate)
        before = [w[:, :start] for w in made]
        level = [w.square().mean().clamp(min=1e-10).log10() * 10 for w in before]
        columns = [[(i, w) for i, w in enumerate(before)]] + [
            [(i, w[:, start + s * rate:start + (s + 1) * rate]) for i, w in enumerate(made)
             if w.shape[1] >= start + (s + 1) * rate] for s in range(int(cfg.sample.seconds))]
        rows = {"alive": [], "level": [], "mmd": []}
        for column in columns:
            found = torch.stack([x for _, w in column for x in seconds_heard(w, rate)]) \
                if len(column) >= 4 else None
            power = [w.square().mean().clamp(min=1e-10).log10() * 10 - level[i] for i, w in column]
            rows["alive"].append(round(len(column) / len(prompts), 3))
            rows["level"].append(None if found is None else
                                 round(torch.stack(power).median().item(), 2))
            rows["mmd"].append(None if found is None else round(mmd(found, real), 4))
        out[kind] = {"clips": len(prompts), **rows}
    return out


def draw_continuation(path, found):
    """Three curves a kind over the seconds; dotted: the prompts' distance."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    fig, axes = plt.subplots(1, 3, layout="constrained", figsize=(10, 2.6))
    for color, (kind, rows) in zip(("C0", "C1", "C2"), found.items()):
        for ax, key in zip(axes, ("alive", "level", "mmd")):
            seconds = [s for s, v in enumerate(rows[key]) if s and v is not None]
            ax.plot(seconds, [rows[key][s] for s in seconds], "o-", ms=3, color=color, label=kind)
            if key == "mmd":
                ax.axhline(rows[key][0], ls=":", color=color)
    for ax, title in zip(axes, ("share not ended", "level against the prompt, dB",
                                "MMD² to real seconds (dotted: prompts)")):
        ax.set_title(title, fontsize=9)
        ax.set_xlabel("second after the prompt", fontsize=8)
    axes[0].legend(fontsize=8)
    fig.savefig(path, dpi=100)
    plt.close(fig)


def sweep(name, values, judged, folder):
    """judged(value) -> {figure: number} for each value; a table, and curves.png in `folder`."""
    found = {value: judged(value) for value in tqdm(values, desc=f"sweep {name}", leave=False)}
    keys = list(dict.fromkeys(k for row in found.values() for k in row))
    print(f"{name:>12s}" + "".join(f"{k:>26s}" for k in keys))
    for value, row in found.items():
        print(f"{value:12g}" + "".join(f"{row[k]:26.4f}" if k in row else " " * 26 for k in keys))
    if folder and keys:
        import matplotlib
        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
        fig, axes = plt.subplots(1, len(keys), squeeze=False, layout="constrained",
                                 figsize=(3 * len(keys), 2.5))
        for ax, key in zip(axes[0], keys):
            ax.plot([v for v in found if key in found[v]],
                    [row[key] for row in found.values() if key in row], "o-")
            ax.set_title(key, fontsize=8)
            ax.set_xlabel(name)
        fig.savefig(f"{folder}/sweep_{name}.png", dpi=100)
        plt.close(fig)
    return {str(value): row for value, row in found.items()}


def energy_distance(x, y):
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| (Székely & Rizzo 2013), unbiased, x (n, d), y (m, d)."""
    n, m = len(x), len(y)
    within = (torch.cdist(a, a).sum() / (k * (k - 1)) for a, k in ((x, n), (y, m)))
    return (2 * torch.cdist(x, y).mean() - sum(within)).item()


@torch.no_grad()
def judge_draws(flow, model, steps, cfg, clips, repeats, limit, frames=8):
    """{s: {kind: (energy distance, spread)}} of model's draws in s steps, for each s of `steps`,
    against the flow's in 32: means over held-out texts; a draw is the first `frames` latents,
    normalised, as one vector.
    """
    found = {s: {} for s in steps}
    for kind in KINDS:
        texts = spread(sorted({c.text for c in clips if c.kind == kind and c.text}), limit)
        pairs = {s: [] for s in steps}
        for text in tqdm(texts, desc=f"draw {kind}", leave=False):
            ids = torch.tensor([encode_text(text, kind, cfg.data)] * repeats)

            def draw(lm, s, seed):
                drawn = lm.generate(ids, kind=KINDS.index(kind), max_frames=frames, steps=s,
                                    generator=torch.Generator().manual_seed(seed))
                return torch.stack([x for x, _ in drawn], 1)

            many = draw(flow, 32, 0)
            for s in steps:
                few = draw(model, s, 1)
                n = min(few.shape[1], many.shape[1])             # all rows may end before `frames`
                x, y = few[:, :n].flatten(1), many[:, :n].flatten(1)
                pairs[s].append((energy_distance(x, y), (x.std(0).mean() / y.std(0).mean()).item()))
        for s in steps if texts else ():
            found[s][kind] = tuple(mean_of(column) for column in zip(*pairs[s]))
    return found


@torch.no_grad()
def overview(path, vae, models, cfg, clips):
    """One column a kind: a held-out clip, its reconstruction, and each model's generation from the
    same text. models: name -> (model, its options).
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
        for row, (name, (lm, options)) in zip(rows[2:], models.items()):
            voice = voice_of(clip, clips, lm, vae, cfg)
            made, = render(lm, vae, torch.tensor([encode_text(clip.text, kind, cfg.data)]),
                              kind=KINDS.index(kind), seconds=cfg.sample.seconds,
                              prompt=None if voice is None else voice[0],
                              generator=torch.Generator().manual_seed(0), **options)
            row.append((f"generated from the text, {name}", made))
    draw_spectrograms(path, [picture for row in rows for picture in row], rate, columns=len(kinds))


def main():
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--run", required=True, help="a run folder written by train.py")
    p.add_argument("--manifest", help="held-out clips; default: the run's own")
    p.add_argument("--what", default="all", choices=["all", "vae", "lm", "continue", "draws"])
    p.add_argument("--repeats", type=int, default=6, help="draws of each text (default 6)")
    p.add_argument("--limit", type=int, default=40,
                   help="clips and texts of each kind (default 40)")
    p.add_argument("--wavs", help="folder for all reconstructions and generations, their texts, "
                                  "overview.png")
    p.add_argument("--json", help="write the figures here")
    p.add_argument("--stage", default="", help="of the language models only this, e.g. lm")
    p.add_argument("--steps", type=int, default=0, help="head steps; 0 = the objective's own")
    p.add_argument("--temperature", type=float, help="default: the config's")
    p.add_argument("--cfg", type=float, help="latent guidance; default: the config's")
    p.add_argument("--noise", type=float,
                   help="share of the training's noise on what the model hears of its own past, "
                        "0 .. 1; default: the config's")
    p.add_argument("--sweep", choices=list(SWEEPS), help="generate at several values of this")
    p.add_argument("--values", help="of the sweep, parted by commas")
    p.add_argument("--metrics", default="",
                   help=f"any of {','.join(METRICS)}: needs the eval extra")
    p.add_argument("--whisper", default="base", help="faster-whisper model for wer (default base)")
    p.add_argument("--threads", type=threads, default=0, help="CPU threads; 0 = torch's choice")
    a = p.parse_args()
    if a.repeats < 1 or a.limit < 1 or a.steps < 0 or not 0 <= (a.temperature or 0) < math.inf:
        raise BadInput("--repeats, --limit: must be at least 1; "
                       "--steps, --temperature: not negative")
    if a.cfg is not None and not math.isfinite(a.cfg):
        raise BadInput(f"--cfg: must be a number, got {a.cfg}")
    if not 0 <= (a.noise or 0) <= 1:
        raise BadInput(f"--noise: {a.noise} does not lie in 0 .. 1")
    if a.json:
        check_writable(a.json)
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
    judges = Judges(metrics, a.whisper) if metrics and a.what != "lm" and not a.sweep else None
    try:
        values = [(int if a.sweep == "steps" else float)(v) for v in a.values.split(",")] if (
            a.values) else SWEEPS.get(a.sweep)
        if any(v < (a.sweep == "steps") or v > 1 and a.sweep == "noise" for v in values or ()):
            raise ValueError
    except ValueError:
        raise BadInput(f"--values {a.values}: numbers that are not negative, parted by "
                       "commas; for steps whole ones from 1, for noise at most 1"
                       ) from None
    cfg, vae, _, _ = open_run(a.run)
    stages = [s for s in LM_STAGES
              if os.path.exists(f"{a.run}/{s}.pt")] if a.what != "vae" else []
    if a.stage:
        if a.stage not in stages:
            raise BadInput(f"--stage: {a.run} has no '{a.stage}'; it has {', '.join(stages)}")
        stages = [a.stage]
    if not stages and (a.sweep or a.what not in ("all", "vae")):
        raise BadInput(f"{a.run}: has no language model to generate with")
    manifest = a.manifest or ("" if cfg.data.manifest else f"{a.run}/toy/valid.jsonl")
    clips = load_manifest(manifest) if manifest else load_clips(cfg.data)[1]
    figures, rows, models = {"run": a.run, "clips": len(clips)}, [], {}
    if a.what in ("all", "vae") and not a.sweep:
        figures["vae"] = judge_vae(vae, clips, a.limit, a.wavs, judges, cfg.gan.loss_floor)
        if not figures["vae"] and a.what == "vae":
            raise BadInput(f"{len(clips)} held-out clips: the distance is relative to that of two "
                           "clips of a kind; --manifest needs at least two, of 1024 samples")
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
    for stage in stages[-1:] if a.sweep else stages:
        if not load_checkpoint(f"{a.run}/{stage}.pt")["done"]:
            raise BadInput(f"{a.run}/{stage}.pt: its training is not finished; "
                           "run train.py again, it goes on")
        _, _, lm, _ = open_run(a.run, stage)
        objective = lm.cfg.head.objective
        steps = a.steps or lm.cfg.head.sample_steps
        options = {"steps": steps,
                   "temperature": (cfg.sample.temperature if a.temperature is None
                                   else a.temperature),
                   "guidance": cfg.sample.cfg if a.cfg is None else a.cfg,
                   "noise": cfg.sample.noise if a.noise is None else a.noise}
        if a.sweep:
            def judged(value):
                heard = Judges(metrics, a.whisper) if metrics else None
                name = {"cfg": "guidance"}.get(a.sweep, a.sweep)
                found, _, late = judge_lm(lm, vae, cfg, clips, a.repeats, a.limit, judges=heard,
                                          **options | {name: value})
                return {f"facts {k}": v for k, v in found.items()} | {
                    f"length {k}": v for k, v in late.items()} | (
                    heard.figures() if heard else {})
            figures[f"sweep {a.sweep}"] = sweep(a.sweep, values, judged, a.wavs)
            continue
        if a.what == "draws":
            if objective in DISCRETE or a.repeats < 2:
                raise BadInput("--what draws: needs a flow or few-step head, and --repeats of at "
                               "least 2")
            flow = open_run(a.run, STAGES[stage].after or stage)[2]
            found = judge_draws(flow, lm, [a.steps] if a.steps else [1, 2, 4, 16], cfg, clips,
                                a.repeats, a.limit)
            figures[f"draws {stage}"] = found
            for n, by_kind in found.items():
                name = f"{stage}, {n} step{'s' * (n > 1)}"
                rows += [(f"{name}: energy distance", {k: v[0] for k, v in by_kind.items()}),
                         (f"{name}: spread", {k: v[1] for k, v in by_kind.items()})]
            continue
        if a.what == "continue":
            folder = f"{a.wavs}/continue_{stage}" if a.wavs else ""
            found = judge_continuation(lm, vae, cfg, clips, a.limit, folder, **options)
            if not found:
                raise BadInput("--what continue: needs 4 held-out clips of a kind of at least "
                               f"{cfg.sample.prompt_seconds:g} s (sample.prompt_seconds)")
            figures[f"continue {stage}"] = found
            for kind, by_second in found.items():
                for key in ("alive", "level", "mmd"):
                    print(f"{stage:12s} {kind:7s} {key:6s}" + "".join(
                        f"{'-' if v is None else format(v, '.3f'):>8s}" for v in by_second[key]))
            if a.wavs:
                draw_continuation(f"{folder}.png", found)
            continue
        heard = Judges(metrics, a.whisper) if metrics else None
        found, chance, on_time = judge_lm(lm, vae, cfg, clips, a.repeats, a.limit,
                                          f"{a.wavs}/{stage}" if a.wavs else "", heard, **options)
        name = f"{stage}: {objective}" + (
            "" if objective in DISCRETE else f", {steps} step{'s' * (steps > 1)}")
        models[name] = lm, options
        figures[stage] = {"objective": objective, **options, "facts": found, "chance": chance,
                          "length": on_time}
        rows.append((f"generation, {name}: facts right", found))
        rows.append((f"generation, {name}: length right", on_time))
        if heard is not None:
            figures[stage]["speech"] = heard.figures()
            rows += [(f"{key}, {name}", {"speech": v}) for key, v in heard.figures().items()]
        if stage == stages[-1]:
            rows.append(("chance", chance))
    if rows:
        print(f"{'':52s}" + "".join(f"{k:>9s}" for k in KINDS))
    for name, row in rows:
        if any(v is not None for v in row.values()):
            print(f"{name:52s}" + "".join(
                f"{row[k]:9.3f}" if row.get(k) is not None else f"{'-':>9s}" for k in KINDS))
    if a.wavs and not a.sweep and a.what not in ("continue", "draws"):
        overview(f"{a.wavs}/overview.png", vae, models, cfg, clips)
    if a.json:
        with atomic(a.json) as temp, open(temp, "w") as f:
            json.dump(figures, f, indent=1)


if __name__ == "__main__":
    cli(main)
