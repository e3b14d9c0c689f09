"""Judge a trained run: how well its VAE reconstructs held-out clips, and how well its generations
match their text.

    python evaluate.py --run out/quickstart [--manifest heldout.jsonl] [--what all|vae|lm]
                       [--json figures.json] [--metrics pesq,stoi,visqol,dnsmos,wer,sim]

    held-out clips ─► VAE ──► reconstructions ─┬─► log-mel, STFT, SI-SDR; information rate
                                               ├─► facts right (the toy corpus has an oracle)
                                               ├─► --metrics (speech)
    held-out texts ─► CALM ─► generations ─────┴─► length right

Figures of the VAE
  log-mel distance: mean |log10 mel(x) - log10 mel(x̂)|, 80 bands, n_fft 1024, divided by the same
    distance between a clip and another one of its kind: 0 = perfect, 1 = as far as two clips are.
  STFT distance: spectral convergence + log magnitudes at 2048, 1024, 512, 256 (gan.py). Magnitudes
    have the run's gan.loss_floor: compare only runs with the same floor.
  SI-SDR: 10 log10(‖αx‖² / ‖αx - x̂‖²) dB, α = <x, x̂> / ‖x‖² (Le Roux et al. 2019); above 0
    only for codecs that keep the waveform.
  rate: information in the latents: frame rate · D · mean KL, in nats per second; of RVQ codes
    frame rate · K · log2(entries), in bits per second.

Figures of the language models, over every held-out text, in the voice of another held-out clip of
its speaker where the run was trained with voice prompts
  facts right: share of the facts stated by a text of the toy corpus (digits, counts, pitch, tempo)
    that its oracle measures in the audio (corpora/oracle.py). "chance" is what guessing gives. Left
    out on other corpora.
  length right: share of generations that end within two latent frames of the held-out clip's end
    (two clips of one text differ too).

--metrics: published metrics of the speech clips; they need the eval extra (judges.py)

Sweeps of a sampling setting, continuations of audio and the diversity of samples: tools/studies.py.
Exit status: 0 done, 2 your mistake (one line says which).
"""
import argparse
import json
import math
import os

from audio import load_audio, refuse_poison, save_audio
from cli import check_packages

if __name__ == "__main__":
    check_packages()                # before the imports that need them

import torch
from tqdm import tqdm

from cli import BadInput, Parser, check_writable, cli, number, threads, write_file
from config import load_checkpoint, open_run, trained_stages
from corpora import oracle
from data import KINDS, encode_text, fits, load_clips, load_manifest, pad_id, seconds_of
from discrete import DISCRETE
from gan import mel_filters, spectral_losses, stft
from generate import render, sampling_options, what_was_seen
from judges import METRICS, Judges
from page import keep_evaluation
from prompts import encode_voice
from report import draw_spectrograms
from vae import kl_loss

BATCH = 32                          # texts generated at once
LENGTH_TOLERANCE = 2                # latent frames


# ---------------------------------------------------------------------------- one clip


def clip_name(clip):
    """A clip's id, else its file name without extension: the name of the wavs made from it."""
    return clip.id or os.path.splitext(os.path.basename(clip.audio))[0]


def load_clip(clip, cfg, seconds):
    """The first `seconds` of a Clip at the VAE's sample rate (cfg: VAEConfig) -> tensor (ch, S)."""
    return torch.tensor(load_audio(clip.audio, cfg.sample_rate, cfg.channels, seconds=seconds,
                                   allow_silence=True))


def log_mel(wav, rate):
    """(ch, S) -> log10 of the 80-band mel spectrum (80, frames), floor 1e-5."""
    magnitudes = stft(wav[:1], 1024)[0].abs() / 32
    return (mel_filters(rate, 1024, 80) @ magnitudes).clamp(min=1e-5).log10()


def si_sdr(original, estimate):
    """Scale-invariant signal-to-distortion ratio in dB of two waveforms (ch, S)."""
    x = original.double() - original.double().mean()
    y = estimate.double() - estimate.double().mean()
    target = (x * y).sum() / x.pow(2).sum() * x
    return (10 * torch.log10(target.pow(2).sum() / (target - y).pow(2).sum())).item()


def information_rate(vae, mean, logvar):
    """Information in the latents of one clip: KL to N(0, 1) in nats per second, or bits of codes
    per second.
    """
    if vae.quantizer is not None:
        return vae.cfg.frame_rate * vae.cfg.codebooks * math.log2(vae.cfg.codebook_size)
    return kl_loss(mean, logvar).item() * vae.cfg.latent_dim * vae.cfg.frame_rate


def count_right_facts(wav, clip, rate):
    """Measure the facts stated by the clip's text in wav (ch, S) -> (right, total), or None where
    the text is not from the toy corpus.
    """
    try:
        found = oracle.judge(wav[0].numpy(), clip.text, clip.kind, rate)
    except BadInput:
        return None
    return found["right"], found["total"]


def length_is_right(wav, clip, cfg):
    """Does wav (ch, S) end within two latent frames of the clip's end? cfg: VAEConfig."""
    frames = wav.shape[-1] // cfg.hop
    target = math.ceil(round(seconds_of(clip) * cfg.sample_rate) / cfg.hop)
    return abs(frames - target) <= LENGTH_TOLERANCE


def share_right(counts):
    """Share of all facts that are right, from (right, total) per wav; None where there are
    no facts.
    """
    counts = [count for count in counts if count]
    if not counts:
        return None
    right = sum(r for r, _ in counts)
    total = sum(t for _, t in counts)
    return round(right / max(1, total), 4)


def rounded_mean(values):
    """Mean to four decimals; None for an empty list."""
    return round(sum(values) / len(values), 4) if values else None


# ---------------------------------------------------------------------------- the VAE


@torch.no_grad()
def judge_vae(vae, clips, limit, folder="", judges=None, floor=1e-5):
    """Reconstruct the first `limit` clips of each kind -> {kind: {"clips", "log_mel", "stft",
    "si_sdr", "rate", "original", "reconstruction"}}; the last two are shares of facts right.

    Kinds with fewer than two clips of 1024 samples are left out: log_mel is relative to another
    clip. folder: for the wavs, "" = none. judges: Judges that score the speech too, or None.
    floor: of the STFT distance.
    """
    found = {}
    for kind in KINDS:
        chosen = [clip for clip in clips if clip.kind == kind][:limit]
        figures = judge_reconstructions(vae, kind, chosen, folder, judges, floor)
        if figures is not None:
            found[kind] = figures
    return found


def judge_reconstructions(vae, kind, clips, folder, judges, floor):
    """The figures of judge_vae for the clips of one kind; None where there are too few."""
    rate = vae.cfg.sample_rate
    errors = {"mel": [], "stft": [], "si_sdr": []}   # original against reconstruction
    distances = []                                   # log-mel, a clip against the one before it
    information = []
    facts = {"original": [], "reconstruction": []}
    previous = None                                  # log-mel of the clip before

    for clip in tqdm(clips, desc=f"reconstruct {kind}", leave=False):
        # original and reconstruction
        wav = load_clip(clip, vae.cfg, seconds=20.0)
        mean, logvar = vae.encode(wav[None])
        rec = vae.decode(mean)[0, :, :wav.shape[-1]]                            # (ch, S)
        refuse_poison(rec, rate, f"reconstruction of {clip.audio}")
        if folder:
            save_audio(f"{folder}/reconstruction/{clip_name(clip)}.wav", rec.numpy(), rate)

        # facts that the oracle measures in either
        facts["original"].append(count_right_facts(wav, clip, rate))
        facts["reconstruction"].append(count_right_facts(rec, clip, rate))

        # spectral figures need one window
        if wav.shape[-1] < 1024:
            continue
        information.append(information_rate(vae, mean, logvar))
        mel = log_mel(wav, rate)                                                # (80, frames)
        errors["mel"].append((mel - log_mel(rec, rate)).abs().mean().item())
        if previous is not None:
            frames = min(previous.shape[1], mel.shape[1])
            distances.append((mel[:, :frames] - previous[:, :frames]).abs().mean().item())
        previous = mel

        # waveform and STFT errors are relative: not for silence
        if wav.shape[-1] >= 2048 and wav.abs().max() > 1e-3:
            losses = spectral_losses(wav[None], rec[None], rate, [2048, 1024, 512, 256], ["stft"],
                                     floor)
            errors["stft"].append(losses["stft"].item())
            errors["si_sdr"].append(si_sdr(wav, rec))

        # published metrics
        if judges is not None and kind == "speech":
            judges.compare(wav, rec, rate, clip.transcript or clip.text)

    # the mean distance of two clips is the unit of log_mel
    if not distances:
        return None
    mel_error = sum(errors["mel"]) / len(errors["mel"])
    mel_distance = sum(distances) / len(distances)
    return {"clips": len(clips),
            "log_mel": round(mel_error / mel_distance, 4),
            "stft": rounded_mean(errors["stft"]),
            "si_sdr": rounded_mean(errors["si_sdr"]),
            "rate": rounded_mean(information),
            "original": share_right(facts["original"]),
            "reconstruction": share_right(facts["reconstruction"])}


# ---------------------------------------------------------------------------- the language models


def evenly_spaced(items, limit):
    """At most `limit` items, evenly spaced in the list."""
    n = min(limit, len(items))
    return [items[i * len(items) // n] for i in range(n)]


@torch.no_grad()
def voice_prompt(clip, clips, lm, vae, cfg):
    """The voice prompt for a clip's text: another held-out clip of its speaker -> (its latents
    (1, P, D), the wav (ch, S)), or None where there is none or the run was trained without.
    """
    seconds = cfg.data.prompt_frames / vae.cfg.frame_rate
    others = [c for c in clips if c.speaker == clip.speaker != "" and c.audio != clip.audio
              and seconds_of(c) >= seconds]
    if clip.kind != "speech" or not cfg.data.prompt_frames or not others:
        return None

    # the first one that is not silent; the same window of it that sample.py would take
    for other in others:
        latents, _ = encode_voice(lm, vae, other.audio, cfg.data.prompt_frames)     # (1, P, D)
        if latents is not None:
            return latents, torch.tensor(load_audio(other.audio, vae.cfg.sample_rate,
                                                    vae.cfg.channels))
    return None


def choose_targets(clips, kind, cfg, limit):
    """At most `limit` distinct held-out texts of a kind -> {text: clip}, in alphabetical order.
    cfg: DataConfig; texts longer than its text_len are left out.
    """
    targets = {clip.text: clip for clip in clips if clip.kind == kind and clip.text
               and fits(clip.text, kind, cfg)}
    return {text: targets[text] for text in evenly_spaced(sorted(targets), limit)}


def batch_texts(texts, voices, kind, lm, cfg):
    """Lists of at most 32 texts that the model can generate together. cfg: DataConfig.

    The model takes no padding when it generates, so a batch has texts of equal length, all with or
    all without a voice prompt; with an inner monologue texts of every length.
    """
    groups = {}
    for text in texts:
        any_length = kind == "speech" and lm.monologue
        length = 0 if any_length else len(encode_text(text, kind, cfg))
        groups.setdefault((length, voices[text] is not None), []).append(text)

    return [group[i:i + BATCH] for _, group in sorted(groups.items())
            for i in range(0, len(group), BATCH)]


def generate_batch(lm, vae, cfg, kind, texts, voices, seed, options):
    """Generate one batch of texts -> list of waveforms (ch, S)."""
    # monologues differ in length: padding at the end adds no words
    ids = [encode_text(text, kind, cfg.data) for text in texts]
    longest = max(map(len, ids))
    pad = pad_id(cfg.data)
    tokens = torch.tensor([row + [pad] * (longest - len(row)) for row in ids], dtype=torch.long)

    prompt = None
    if voices[texts[0]] is not None:
        prompt = torch.cat([voices[text][0] for text in texts])                 # (B, P, D)
    return render(lm, vae, tokens, kind=KINDS.index(kind), seconds=cfg.sample.seconds,
                  prompt=prompt, generator=torch.Generator().manual_seed(seed), **options)


def generate_texts(lm, vae, cfg, kind, texts, voices, repeats, options):
    """Generate every text `repeats` times; yields (text, repeat, waveform (ch, S))."""
    batches = batch_texts(texts, voices, kind, lm, cfg.data)
    for i, batch in enumerate(tqdm(batches, desc=f"generate {kind}", leave=False)):
        for repeat in range(repeats):
            wavs = generate_batch(lm, vae, cfg, kind, batch, voices, 1000 * repeat + i, options)
            for text, wav in zip(batch, wavs):
                yield text, repeat, wav


def save_generation(folder, wav, clip, rate):
    """Write one generation of a clip's text to folder -> its row of a manifest."""
    name = clip_name(clip)
    save_audio(f"{folder}/{name}.wav", wav.numpy(), rate)
    return {"id": name, "text": clip.transcript or clip.text, "kind": clip.kind,
            "audio": f"{name}.wav", "speaker": clip.speaker}


def judge_lm(lm, vae, cfg, clips, options, repeats, limit, folder="", judges=None):
    """Generate at most `limit` held-out texts of each kind, `repeats` times each -> {"facts":
    {kind: share of facts right}, "chance": {kind: the same by guessing}, "length": {kind: share
    that ends on time}}.

    options: steps, temperature, guidance, noise. folder: for the first wav of each text and a
    manifest per kind, "" = none. judges: Judges that score the speech too, or None.
    """
    found = {"facts": {}, "chance": {}, "length": {}}
    rate = cfg.vae.sample_rate
    for kind in KINDS:
        targets = choose_targets(clips, kind, cfg.data, limit)
        voices = {text: voice_prompt(clip, clips, lm, vae, cfg) for text, clip in targets.items()}
        facts = []
        on_time = []
        manifest = []

        # judge wav by wav
        generated = generate_texts(lm, vae, cfg, kind, list(targets), voices, repeats, options)
        for text, repeat, wav in generated:
            clip = targets[text]
            facts.append(count_right_facts(wav, clip, rate))
            on_time.append(length_is_right(wav, clip, cfg.vae))
            if judges is not None and kind == "speech":
                _, voice = voices[text] or (None, None)
                judges.judge("generation", wav, rate, clip.transcript or clip.text, voice)
            if folder and repeat == 0:
                manifest.append(save_generation(folder, wav, clip, rate))

        # the figures of this kind
        if manifest:
            write_file(f"{folder}/{kind}.jsonl",
                       "".join(json.dumps(row) + "\n" for row in manifest))
        if share_right(facts) is not None:
            found["facts"][kind] = share_right(facts)
            found["chance"][kind] = rounded_mean([oracle.chance(text, kind) for text in targets])
        if on_time:
            found["length"][kind] = rounded_mean(on_time)
    return found


@torch.no_grad()
def draw_overview(path, vae, models, cfg, clips):
    """Spectrograms of one text per kind: the held-out clip, its reconstruction, and the generation
    of each model. models: {name: (model, its options)}.
    """
    texts = {kind: [c for c in clips if c.kind == kind and c.text] for kind in KINDS}
    examples = [min(texts[kind], key=lambda clip: clip.text) for kind in KINDS if texts[kind]]
    if not examples:
        return
    wavs = [load_clip(clip, vae.cfg, seconds=cfg.sample.seconds) for clip in examples]

    # one row of pictures after the other
    pictures = [(f"{clip.kind}: {clip.text}", wav) for clip, wav in zip(examples, wavs)]
    pictures += [("reconstruction", vae.decode(vae.encode(wav[None])[0])[0]) for wav in wavs]
    for name, (lm, options) in models.items():
        for clip in examples:
            voices = {clip.text: voice_prompt(clip, clips, lm, vae, cfg)}
            wav, = generate_batch(lm, vae, cfg, clip.kind, [clip.text], voices, 0, options)
            pictures.append((f"generated from the text, {name}", wav))
    draw_spectrograms(path, pictures, cfg.vae.sample_rate, columns=len(examples))


# ---------------------------------------------------------------------------- command line


def metric_names(text):
    """The argparse type of --metrics: "pesq,wer" -> ["pesq", "wer"]."""
    names = [name for name in text.split(",") if name]
    for name in names:
        if name not in METRICS:
            raise argparse.ArgumentTypeError(f"unknown '{name}'; valid: {', '.join(METRICS)}")
    return names


def run_arguments(no_steps="0 = the objective's own"):
    """A parent parser: which run, which clips, where the figures go. no_steps: what `--steps 0`
    means.
    """
    p = Parser(add_help=False)
    p.add_argument("--run", required=True, help="a run folder written by train.py")
    p.add_argument("--manifest", help="held-out clips; default: the run's own")
    p.add_argument("--stage", default="", help="only this language model, e.g. lm")
    p.add_argument("--limit", type=number(int, 1), default=40,
                   help="clips and texts per kind (default 40)")
    p.add_argument("--steps", type=number(int, 0), default=0,
                   help=f"solver steps of the head; {no_steps} (default)")
    p.add_argument("--json", help="write the figures here")
    p.add_argument("--threads", type=threads, default=0, help="CPU threads; 0 = torch's choice")
    return p


def sampling_arguments():
    """A parent parser: how generations are sampled, and where the wavs go."""
    p = Parser(add_help=False)
    p.add_argument("--temperature", type=number(float, 0),
                   help="variance of the sampling noise; default: the config's")
    p.add_argument("--cfg", type=number(float),
                   help="latent guidance, 1 = off; default: the config's")
    p.add_argument("--noise", type=number(float, 0, 1),
                   help="noise on the generated history, as a share of the training noise, "
                        "0 .. 1; default: the config's")
    p.add_argument("--wavs", help="folder for wavs and pictures")
    return p


def judging_arguments():
    """A parent parser: how often texts are generated, and which metrics judge them."""
    p = Parser(add_help=False)
    p.add_argument("--repeats", type=number(int, 1), default=6,
                   help="generations per text (default 6)")
    p.add_argument("--metrics", type=metric_names, default=[],
                   help=f"any of {','.join(METRICS)}: needs the eval extra")
    p.add_argument("--whisper", default="base", help="faster-whisper model for wer (default base)")
    return p


def prepare(a):
    """Set the number of threads; refuse a --json or --wavs that cannot be written, before the work.
    """
    if a.threads:
        torch.set_num_threads(a.threads)
    if a.json:
        check_writable(a.json)
    if a.wavs:
        check_writable(f"{a.wavs}/overview.png")


def find_stages(run, stage=""):
    """The language models that a run has, in order of training; with `stage` only that one."""
    stages = trained_stages(run)
    if not stage:
        return stages
    if stage not in stages:
        raise BadInput(f"--stage: {run} has no '{stage}'; it has {', '.join(stages) or 'none'}")
    return [stage]


def open_stage(run, stage):
    """The language model of a stage whose training is finished."""
    if not load_checkpoint(f"{run}/{stage}.pt")["done"]:
        raise BadInput(f"{run}/{stage}.pt: its training is not finished; "
                       "run train.py again to resume it")
    _, _, lm, _ = open_run(run, stage)
    return lm


def held_out_clips(run, manifest, cfg):
    """The clips of a manifest, else the ones that the run did not train on."""
    if not manifest and not cfg.data.manifest:
        manifest = f"{run}/toy/valid.jsonl"
    if manifest:
        return load_manifest(manifest)
    _, held_out = load_clips(cfg.data)
    return held_out


def of_trained_kinds(clips, run, stages, cfg):
    """The clips of kinds that the language models of `stages` saw in training; a line says which
    are left out.
    """
    trained = {kind for stage in stages for kind in what_was_seen(run, stage, cfg)["kinds"]}
    for kind in sorted({clip.kind for clip in clips} - trained):
        print(f"{kind}: not generated, {run} was not trained on it")
    return [clip for clip in clips if clip.kind in trained]


def chosen_sampling(a, cfg, lm):
    """The sampling options of a model: the command line's, else the config's; steps: the command
    line's, else the objective's own.
    """
    options = sampling_options(cfg.sample, a.steps, a.temperature, a.cfg, a.noise)
    return options | {"steps": a.steps or lm.cfg.head.sample_steps}


def vae_rows(figures, speech, unit):
    """Rows of print_table: judge_vae's figures and the metrics of speech. unit: nats or bits."""
    def row(name, key):
        return name, {kind: values[key] for kind, values in figures.items()}

    return [row("log-mel distance (0 perfect, 1 another clip)", "log_mel"),
            row("STFT distance", "stft"),
            row("SI-SDR, dB", "si_sdr"),
            row(f"rate, {unit} per second", "rate"),
            *[(name, {"speech": value}) for name, value in speech.items()],
            row("original: facts right", "original"),
            row("reconstruction: facts right", "reconstruction")]


def lm_rows(name, figures, speech):
    """Rows of print_table: judge_lm's figures of one model and its metrics of speech."""
    return [(f"generation, {name}: facts right", figures["facts"]),
            (f"generation, {name}: length right", figures["length"]),
            *[(f"{key}, {name}", {"speech": value}) for key, value in speech.items()]]


def count_steps(steps):
    """1 -> "1 step", 4 -> "4 steps"."""
    return f"{steps} step{'s' * (steps > 1)}"


def model_name(stage, figures):
    """"lm: trigflow, 20 steps"; heads of codes have no steps."""
    name = f"{stage}: {figures['objective']}"
    return name if figures["objective"] in DISCRETE else f"{name}, {count_steps(figures['steps'])}"


def print_table(rows):
    """Print [(name, {kind: number or None})], a column per kind; rows without numbers are left
    out.
    """
    if rows:
        print(f"{'':52s}" + "".join(f"{kind:>9s}" for kind in KINDS))
    for name, row in rows:
        cells = [row.get(kind) for kind in KINDS]
        if any(value is not None for value in cells):
            print(f"{name:52s}" + "".join(
                f"{'-':>9s}" if value is None else f"{value:9.3f}" for value in cells))


def write_json(path, figures):
    """Write the figures as JSON, whole or not at all."""
    write_file(path, json.dumps(figures, indent=1))


def parse():
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
               parents=[run_arguments(), sampling_arguments(), judging_arguments()])
    p.add_argument("--what", default="all", choices=["all", "vae", "lm"],
                   help="judge the VAE, the language models, or all (default)")
    return p.parse_args()


def main():
    a = parse()
    prepare(a)
    judges = Judges(a.metrics, a.whisper) if a.metrics else None

    # the run, and clips that it was not trained on
    cfg, vae, _, _ = open_run(a.run)
    stages = [] if a.what == "vae" else find_stages(a.run, a.stage)
    if a.what == "lm" and not stages:
        raise BadInput(f"{a.run}: has no language model to generate with")
    clips = held_out_clips(a.run, a.manifest, cfg)
    figures = {"run": a.run, "clips": len(clips)}
    rows = []

    # the VAE
    if a.what != "lm":
        found = judge_vae(vae, clips, a.limit, a.wavs, judges, cfg.gan.loss_floor)
        if not found and a.what == "vae":
            raise BadInput(f"{len(clips)} held-out clips: the log-mel distance needs two clips of "
                           "a kind, of 1024 samples; give --manifest with more")
        speech = judges.pop_figures() if judges else {}
        figures["vae"] = found
        if judges:
            figures["speech"] = speech
        rows += vae_rows(found, speech, "nats" if vae.quantizer is None else "bits")

    # the language models
    models = {}
    clips = of_trained_kinds(clips, a.run, stages, cfg) if stages else clips
    for stage in stages:
        lm = open_stage(a.run, stage)
        options = chosen_sampling(a, cfg, lm)
        folder = f"{a.wavs}/{stage}" if a.wavs else ""
        found = judge_lm(lm, vae, cfg, clips, options, a.repeats, a.limit, folder, judges)
        speech = judges.pop_figures() if judges else {}

        # what is written, what is printed
        figures[stage] = {"objective": lm.cfg.head.objective, **options, **found}
        if judges:
            figures[stage]["speech"] = speech
        name = model_name(stage, figures[stage])
        models[name] = lm, options
        rows += lm_rows(name, found, speech)
    if stages:                                       # the same for every stage
        rows.append(("chance", found["chance"]))

    print_table(rows)
    if a.wavs:
        draw_overview(f"{a.wavs}/overview.png", vae, models, cfg, clips)
    if a.json:
        write_json(a.json, figures)
    keep_evaluation(a.run, figures, a.wavs, {clip_name(clip): clip.audio for clip in clips})


if __name__ == "__main__":
    cli(main)
