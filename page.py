"""The listening page: one report.html beside a run, to hear, see and judge it in any browser.

    python report.py page out/quickstart [--embed]

    samples/*.wav, evaluation.json ─► rows: one clip, its original, reconstruction, generations
    log.jsonl ──────────────────────► curves, each with a sentence on what is normal
    config.toml, hardware.json ─────► what was trained, on what
                                          └─► page.html with all of it ─► report.html

A row's sounds share one time axis, whose end is that of the longest. Pictures are part of the page;
sounds are files beside it, or with `embed` part of it too: one file to send. No package, nothing
from elsewhere, file:// is enough. train.py writes it at each validation, evaluate.py at its end.

A folder without log.jsonl (assets/wavs) gives a page of its wavs, whose names are their texts.
"""
import base64
import functools
import glob
import html
import json
import math
import os
import platform
import re
import struct
import time
import urllib.parse
import zlib
from io import BytesIO

import numpy as np
import soundfile as sf
import torch

from audio import load_audio
from cli import BadInput, write_file
from config import LM_STAGES, STAGES, WALL_CLOCK, read_log
from data import KINDS
from decoder import audio_info

TEXT = "text: "                     # in the comment of a sample's wav: what follows is its text
CLIPS_OF_KIND = 4                   # rows of evaluate.py's wavs that are shown, per kind
FLOOR, CEILING = -60, 35            # dB of the darkest and brightest colour, as in report.py
SECONDS = 30                        # of a sound that are drawn, and embedded
SHADES = 48                         # colours of a spectrogram
HEIGHT = 128                        # pixels of a spectrogram

# figures whose value at validation is another measure than in training: no dots on their panel
OWN_SCALE = {"mel"}

# how the name of a figure begins -> what is normal; the first that fits, stages before others
NORMAL = {
    "consistency:valid_energy": "Scores samples in the unit of the stage before. A little above "
                                "it is normal: one step instead of twenty.",
    "consistency:valid_": "As its curve in training: it says nothing about quality.",
    "consistency:consistency": "Hovers or rises, and says nothing about quality. Watch "
                               "valid_energy.",
    "consistency:head": "Hovers or rises, and says nothing about quality. Watch valid_energy.",
    "consistency:loss_": "Hovers or rises; a spike that stays is not normal.",
    "tangent": "Level, without spikes that grow.",
    "valid_energy": "The one to watch: scores samples of the next latent, in one unit for all "
                    "continuous heads. Falls, then flattens; lower is better.",
    "valid_mel": "Held-out distance of spectra. Falls, then flattens; a rise is overfitting.",
    "valid_head": "Per kind of audio. Falls, then flattens; a rise is overfitting.",
    "vae:vae": "The weighted sum. Falls, then flattens; it steps up where discriminators start.",
    "vae:kl": "Rises while the latents learn to say something, then settles; near 0 they say "
              "nothing.",
    "vae:distill": "Distance to the teacher's features. Falls, then flattens.",
    "explained": "Share of the teacher's Z. Rises towards 1.",
    "mel": "Falls steeply, then slowly; noisy from batch to batch.",
    "stft": "Falls steeply, then slowly.",
    "disc": "Settles; a fall to 0 means that the discriminators have won.",
    "adv": "Settles after a while, and need not fall.",
    "feat": "Settles after a while, and need not fall.",
    "head": "Falls fast, then slowly, never to 0: what comes next is not certain. Dots far above "
            "the curve are overfitting.",
    "eos": "Falls to a few hundredths within some hundred steps.",
    "stop": "Falls to a few hundredths within some hundred steps.",
    "loss_low": "Little noise: the highest of the three thirds, and the slowest to fall.",
    "loss_mid": "Middle noise: between the other thirds.",
    "loss_high": "Much noise: falls most, as the past and the text tell what comes.",
    "grad": "Norm before clipping. Noisy; a steady rise is not normal.",
    "text": "Falls as the monologue learns the words' order.",
    "lm:lm": "The weighted sum: falls fast, then slowly.",
    "audiocalm:audiocalm": "The weighted sum: falls fast, then slowly.",
}


# ---------------------------------------------------------------- the log

def read_curves(run):
    """log.jsonl -> {(stage, name): [(step, value), ...]}, and the default panels of draw_losses, in
    the order of the stages.
    """
    # everything but the speed
    rows = [json.loads(line) for line in read_log(run)]
    curves = {}
    for row in rows:
        for name in row:
            if name not in ("stage", "step", *WALL_CLOCK):
                curves.setdefault((row["stage"], name), []).append((row["step"], row[name]))

    # per stage: figures of training, then those of validation alone
    panels = []
    for stage in dict.fromkeys(row["stage"] for row in rows):
        names = sorted(name for of_stage, name in curves if of_stage == stage)
        trained = [name for name in names if not name.startswith("valid_")]
        twins = {f"valid_{name}" for name in trained if name not in OWN_SCALE}
        panels += [f"{stage}:{name}" for name in trained]
        panels += dict.fromkeys(f"{stage}:{without_kind(name)}" for name in names
                                if name not in trained and name not in twins)
    return curves, panels


def without_kind(name):
    """"valid_energy_speech" -> "valid_energy_", how the figures of all kinds begin."""
    kind = name.rpartition("_")[2]
    return name.removesuffix(kind) if kind in KINDS else name


def panel_lines(curves, panel):
    """The lines of a panel "lm:valid_energy_" -> {label: [(step, value), ...]}, and the held-out
    dots of a single line.
    """
    stage, _, prefix = panel.partition(":")
    names = [name for of_stage, name in curves if of_stage == stage and name == prefix]
    names = names or [name for of_stage, name in curves
                      if of_stage == stage and name.startswith(prefix)]
    dots = []
    if len(names) == 1 and prefix not in OWN_SCALE:
        dots = curves.get((stage, f"valid_{prefix}"), [])
    return {name.removeprefix(prefix).strip("_"): curves[stage, name] for name in names}, dots


def what_is_normal(panel):
    """The sentence of a panel; "" for a figure that is not known here."""
    _, _, name = panel.partition(":")
    return next((sentence for start, sentence in NORMAL.items()
                 if (panel if ":" in start else name).startswith(start)), "")


# ---------------------------------------------------------------- what there is to hear

def comment(text, origin):
    """The comment of a sample's wav, from which the page has its text."""
    return f"{origin}; {TEXT}{text}"


def text_of(path):
    """The text that the comment of a wav holds; "" where there is none."""
    try:
        with sf.SoundFile(path) as file:
            return file.comment.partition(TEXT)[2]
    except sf.LibsndfileError as e:
        raise BadInput(f"{path}: cannot be read ({e.error_string}); delete it") from None


SAMPLE = re.compile(rf"step(\d+)_({'|'.join(sorted(STAGES, key=len, reverse=True))})_"
                    rf"({'|'.join(KINDS)})(_continued)?(\d+)(?:_(original|reconstruction))?\.wav")


def find_samples(run):
    """The newest samples/*.wav of each stage -> {(kind, title): {label: path}}."""
    # those behind the log's end are of a run before --fresh
    reached = {row["stage"]: row["step"] for row in map(json.loads, read_log(run))}
    found = [(match, path) for path in sorted(glob.glob(f"{glob.escape(run)}/samples/step*.wav"))
             if (match := SAMPLE.fullmatch(os.path.basename(path)))
             and int(match[1]) <= reached.get(match[2], -1)]
    newest = {match[2]: match[1] for match, _ in found}          # sorted: the last step stays

    rows = {}
    for match, path in sorted(found, key=lambda pair: list(STAGES).index(pair[0][2])):
        step, stage, kind, continued, number, part = match.groups()
        if step != newest[stage]:
            continue
        # clips without a text are told apart by what made them
        family = "clip" if stage == "vae" else "continued" if continued else "text"
        title = text_of(path) or f"{family} {number}"
        label = part or f"{stage}, step {int(step)}"
        rows.setdefault((kind, title), {})[label] = path
    return rows


def find_named(folder):
    """The wavs of a folder and its folders -> {(folder, text): {label: path}}: a name is
    STAGE_KIND_TEXT.wav, or in a folder the text alone.
    """
    stages = "|".join(sorted(LM_STAGES, key=len, reverse=True))
    name = re.compile(rf"({stages})_({'|'.join(KINDS)})_(.*)")
    rows = {}
    paths = sorted(glob.glob(f"{glob.escape(folder)}/**/*.wav", recursive=True))
    for path in sorted(paths, key=lambda path: order_of(path, LM_STAGES)):
        place = os.path.relpath(os.path.dirname(path), folder)
        stem = os.path.splitext(os.path.basename(path))[0]
        match = name.fullmatch(stem)
        if match:
            label, place, stem = match.groups()
        else:
            label = place
        rows.setdefault((place, stem.replace("_", " ")), {})[label] = path
    return dict(sorted(rows.items(), key=lambda row: order_of(row[0][0], KINDS)))


def order_of(name, beginnings):
    """The place of the beginning of a file's name in a list; behind it where it has none of them.
    """
    name = os.path.basename(name)
    return next((i for i, start in enumerate(beginnings) if name.startswith(start)),
                len(beginnings))


def read_json(path):
    """The dict of a JSON file; {} where it is not there."""
    if not os.path.exists(path):
        return {}
    try:
        with open(path, encoding="utf8") as f:
            return json.load(f)
    except ValueError as e:
        raise BadInput(f"{path}: damaged ({e}); delete it") from None


def keep_evaluation(run, figures, wavs="", originals=None):
    """What evaluate.py found, for the page: run/evaluation.json, then report.html. A failure costs
    a line. Folders that are no runs (exported weights) get neither.

    figures: {"vae": ..., STAGE: ...}; what an earlier call found of other stages stays. wavs: the
    folder of --wavs, "" = none; originals: {clip's name: path of its audio}.
    """
    if not os.path.exists(f"{run}/log.jsonl"):
        return
    try:
        kept = read_json(f"{run}/evaluation.json") | figures
        if wavs:
            kept["listen"] = evaluated_clips(run, wavs, figures, originals or {})
        write_file(f"{run}/evaluation.json", json.dumps(kept, indent=1))
        write_page(run)
    except (BadInput, OSError, ValueError) as e:
        print(f"{run}/report.html: not written ({e})")
        return
    print(f"listen: {run}/report.html")


def evaluated_clips(run, wavs, figures, originals):
    """Some clips of each kind that evaluate.py wrote to the folder wavs, first those that it also
    reconstructed -> [{"kind", "text", "sounds": {label: path from the run's folder}}, ...].
    """
    def reconstruction(clip):
        return f"{wavs}/reconstruction/{clip['id']}.wav"

    rows = {}
    for stage in (stage for stage in LM_STAGES if stage in figures):
        for kind in KINDS:
            path = f"{wavs}/{stage}/{kind}.jsonl"
            if not os.path.exists(path):
                continue
            with open(path, encoding="utf8") as f:
                clips = [json.loads(line) for line in f]
            clips.sort(key=lambda clip: not os.path.exists(reconstruction(clip)))
            for clip in clips[:CLIPS_OF_KIND]:
                row = rows.setdefault((kind, clip["id"]), {"kind": kind, "text": clip["text"],
                                                           "sounds": {}})
                row["sounds"] |= {"original": originals.get(clip["id"], ""),
                                  "reconstruction": reconstruction(clip),
                                  stage: f"{wavs}/{stage}/{clip['audio']}"}

    # what is there, as it is found from the run's folder
    for row in rows.values():
        row["sounds"] = {label: os.path.relpath(path, run) for label, path in row["sounds"].items()
                         if path and os.path.exists(path)}
    return list(rows.values())


def find_judged(run, evaluation):
    """The clips of evaluation.json whose wavs are still there -> {(kind, text): {label: path}}."""
    rows = {}
    for row in evaluation.get("listen", []):
        sounds = {label: os.path.normpath(f"{run}/{path}") for label, path in row["sounds"].items()}
        sounds = {label: path for label, path in sounds.items() if os.path.exists(path)}
        if sounds:
            rows[row["kind"], row["text"]] = sounds
    return rows


# ---------------------------------------------------------------- pictures

def colours():
    """The SHADES colours of serve.html's spectrogram, dark to bright, (SHADES, 3) bytes."""
    shade = np.linspace(0, 1, SHADES)
    rgb = np.stack([np.minimum(1, 1.6 * shade), shade ** 2,
                    0.15 + 0.45 * np.sin(np.pi * shade)], 1)
    return (255 * rgb).astype(np.uint8)


def png(pixels):
    """Numbers of colours (rows, columns), the top row first -> the bytes of a .png."""
    def part(name, data):
        crc = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", crc)

    height, width = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)        # 8 bits, palette
    lines = np.pad(pixels.astype(np.uint8), ((0, 0), (1, 0)))             # each: filter 0, pixels
    return (b"\x89PNG\r\n\x1a\n" + part(b"IHDR", header) + part(b"PLTE", colours().tobytes())
            + part(b"IDAT", zlib.compress(lines.tobytes(), 9)) + part(b"IEND", b""))


@functools.lru_cache(512)
def spectrogram(path, changed):
    """A file's seconds (at most SECONDS), its highest kHz and its spectrogram in dB as a .png, 100
    columns per second (fewer beyond 10 s). changed: the file's time, so that a new one is drawn
    anew.
    """
    rate = audio_info(path).sample_rate
    wav = torch.tensor(load_audio(path, rate, 1, seconds=SECONDS, allow_silence=True)[0])
    size = 4 * HEIGHT if rate <= 24000 else 8 * HEIGHT
    hop = max(rate // 100, len(wav) // 1000)
    seconds = len(wav) / rate
    wav = torch.nn.functional.pad(wav, (0, max(0, size - len(wav))))
    magnitude = torch.stft(wav, size, hop, window=torch.hann_window(size),
                           return_complex=True).abs()

    # the loudest of the bins of a row of pixels; low frequencies below
    magnitude = magnitude[:size // 2].unflatten(0, (HEIGHT, -1)).amax(1)      # (HEIGHT, columns)
    db = 20 * magnitude.clamp(min=1e-6).log10().flip(0)
    shade = ((db - FLOOR) / (CEILING - FLOOR)).clamp(0, 1) * (SHADES - 1)
    return seconds, rate / 2000, png(shade.round().numpy())


def data_address(data, mime):
    """Bytes as an address that holds them."""
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def embedded(path):
    """A sound as an address that holds it: the file, or of a long one its first SECONDS."""
    info = audio_info(path)
    if info.frames <= SECONDS * info.sample_rate:
        with open(path, "rb") as f:
            suffix = os.path.splitext(path)[1][1:].lower()
            return data_address(f.read(), "audio/" + {"mp3": "mpeg"}.get(suffix, suffix))
    wav = load_audio(path, info.sample_rate, 1, seconds=SECONDS, allow_silence=True)
    data = BytesIO()
    sf.write(data, wav.T, info.sample_rate, format="WAV")
    return data_address(data.getvalue(), "audio/wav")


def nice_step(span, most):
    """A step of 1, 2 or 5 times a power of ten that divides span into at most `most` parts."""
    raw = span / most
    power = 10 ** math.floor(math.log10(raw))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= raw * (1 - 1e-9))


def curve_svg(lines, dots):
    """Lines {label: [(step, value), ...]} and dots [(step, value), ...] as an svg of 300 x 150."""
    points = [point for line in (*lines.values(), dots) for point in line
              if all(map(math.isfinite, point))]
    if not points:
        return ""

    # the axes, without the first peaks
    last = max(step for step, _ in points)
    values = sorted(value for _, value in points)
    low = values[0]
    high = values[int(0.96 * (len(values) - 1))] if len(values) > 25 else values[-1]
    spread = high - low or abs(high) or 1.0
    low -= 0.05 * spread
    high += 0.08 * spread

    def place(point):
        x = 38 + 256 * point[0] / max(1, last)
        y = 128 - 122 * (min(max(point[1], low), high) - low) / (high - low)
        return f"{x:.1f},{y:.1f}"

    # the grid and its numbers
    parts = []
    step = nice_step(high - low, 4)
    digits = max(0, -math.floor(math.log10(step)))
    for i in range(math.ceil(low / step), math.floor(high / step) + 1):
        y = place((0, i * step)).split(",")[1]
        parts.append(f'<path class="grid" d="M38 {y}H294"/><text x="34" y="{y}" dy="3" '
                     f'text-anchor="end">{i * step:.{digits}f}</text>')
    parts.append(f'<text x="38" y="143">0</text><text x="294" y="143" text-anchor="end">'
                 f'step {last}</text>')

    # the curves; a single point is a dot
    marks = [("c1", point) for point in dots]
    for i, line in enumerate(lines.values()):
        parts.append(f'<polyline class="c{i % 4}" points="{" ".join(map(place, line))}"/>')
        marks += [(f"c{i % 4}", point) for point in line if len(line) == 1]
    for colour, point in marks:
        x, y = place(point).split(",")
        parts.append(f'<circle class="{colour}" cx="{x}" cy="{y}" r="3"/>')
    return f'<svg viewBox="0 0 300 150" role="img">{"".join(parts)}</svg>'


# ---------------------------------------------------------------- parts of the page

def escape(text):
    return html.escape(str(text), quote=True)


def sound_cell(label, path, folder, longest, embed):
    """One sound of a row: its name, player, and spectrogram on the row's axis of `longest` s."""
    seconds, khz, picture = drawn(path)
    address = embedded(path) if embed else urllib.parse.quote(
        os.path.relpath(path, folder).replace(os.sep, "/"))
    step = nice_step(longest, 6)
    ticks = "".join(f'<i style="left:{100 * i * step / longest:.2f}%">{i * step:.3g}</i>'
                    for i in range(int(longest / step * 0.93) + 1))
    return (f'<figure><figcaption>{escape(label)} <small>{seconds:.2f} s</small></figcaption>'
            f'<audio controls preload="none" src="{escape(address)}"></audio>'
            f'<div class="spec" data-seconds="{longest:.4f}"><img alt="spectrogram, up to '
            f'{khz:g} kHz" src="{data_address(picture, "image/png")}" '
            f'style="width:{100 * seconds / longest:.2f}%"><b></b></div>'
            f'<div class="axis">{ticks}</div></figure>')


def drawn(path):
    """spectrogram() of a file as it is now."""
    return spectrogram(path, os.stat(path).st_mtime_ns)


def clip_rows(rows, folder, embed):
    """Rows {(kind, title): {label: path}} as sections of a kind each."""
    parts = []
    kind = None
    for (of_kind, title), sounds in rows.items():
        if of_kind != kind:
            kind = of_kind
            parts.append(f"<h3>{escape(kind)}</h3>")
        longest = max(drawn(path)[0] for path in sounds.values())
        cells = "".join(sound_cell(label, path, folder, longest, embed)
                        for label, path in sounds.items())
        parts.append(f'<article><p class="text">{escape(title)}</p>'
                     f'<div class="cells">{cells}</div></article>')
    return "".join(parts)


def in_kinds(rows):
    """The rows in the order of the kinds, in each as they come."""
    return {key: row for kind in KINDS for key, row in rows.items() if key[0] == kind}


def table(columns, rows):
    """[(name, [cell, ...]), ...] as a table; None is an empty cell."""
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join(f"<tr><th>{escape(name)}</th>" + "".join(
        f"<td>{'' if cell is None else escape(cell)}</td>" for cell in cells) + "</tr>"
        for name, cells in rows)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def evaluation_table(figures):
    """evaluate.py's figures: a row each, a column per kind."""
    rows = []
    for part, found in figures.items():
        if part == "vae":
            names = dict.fromkeys(name for values in found.values() for name in values)
            found = {name: {kind: values.get(name) for kind, values in found.items()}
                     for name in names}
        elif part == "speech":                       # the judges' metrics of reconstructions
            found = {name: {"speech": value} for name, value in found.items()}
            part = "vae"
        elif part not in LM_STAGES:
            continue
        else:
            metrics = {name: {"speech": value} for name, value in found.get("speech", {}).items()}
            found = found | metrics
        for name, values in found.items():
            if isinstance(values, dict) and set(values) & set(KINDS):
                rows.append((f"{part}: {name}", [values.get(kind) for kind in KINDS]))
    return table(["", *KINDS], rows) if rows else ""


def stage_table(run):
    """How far each stage is, how fast it was, and its last held-out figures."""
    rows = {}
    for row in map(json.loads, read_log(run)):
        stage = rows.setdefault(row["stage"], {"steps": 0, "speeds": [], "valid": {}})
        stage["steps"] = max(stage["steps"], row["step"])
        stage["speeds"] += [row["steps_per_second"]] if "steps_per_second" in row else []
        valid = {name: value for name, value in row.items() if name.startswith("valid_")}
        stage["valid"] = valid or stage["valid"]
    lines = []
    for name, stage in rows.items():
        speeds = sorted(stage["speeds"])
        valid = {figure.removeprefix("valid_"): value for figure, value in stage["valid"].items()}
        scores = {figure: value for figure, value in valid.items() if figure.startswith("energy")}
        figures = ", ".join(f"{figure} {value:.3f}" for figure, value in (scores or valid).items())
        lines.append((name, [stage["steps"],
                             f"{speeds[len(speeds) // 2]:.2f}" if speeds else None, figures]))
    return table(["stage", "steps", "steps per second", "last held-out figures"], lines)


def curve_panels(run):
    """Every curve of the log, with what is normal."""
    curves, panels = read_curves(run)
    parts = []
    for panel in panels:
        lines, dots = panel_lines(curves, panel)
        legend = ""
        if len(lines) > 1:
            legend = " ".join(f'<span class="c{i % 4}">{escape(label or panel)}</span>'
                              for i, label in enumerate(lines))
        parts.append(f'<figure class="curve"><figcaption>{escape(panel.rstrip("_"))} {legend}'
                     f"</figcaption>{curve_svg(lines, dots)}<p>{escape(what_is_normal(panel))}</p>"
                     "</figure>")
    return f'<div class="curves">{"".join(parts)}</div>'


def hardware_table(run):
    """What the training ran on; empty where it was not noted."""
    facts = read_json(f"{run}/hardware.json")
    return table(["", ""], [(name, [value]) for name, value in facts.items()]) if facts else ""


def config_details(run):
    """The resolved config, folded."""
    if not os.path.exists(f"{run}/config.toml"):
        return ""
    with open(f"{run}/config.toml", encoding="utf8") as f:
        text = escape(f.read())
    return f"<details><summary>config.toml</summary><pre>{text}</pre></details>"


def note_hardware(out, runtime):
    """out/hardware.json: what a training runs on, for the page."""
    device = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as f:
            names = re.findall(r"model name\s*: (.*)", f.read())
        device = f"{names[0] if names else device}, threads: {torch.get_num_threads()}"
    if runtime.device.startswith("cuda"):
        device = f"{runtime.world} x {torch.cuda.get_device_name()}"
    facts = {"device": device, "precision": "bf16" if runtime.bf16 else "fp32",
             "compiled": "yes" if runtime.compile else "no", "processes": runtime.world,
             "torch": torch.__version__, "python": platform.python_version()}
    write_file(f"{out}/hardware.json", json.dumps(facts, indent=1))


# ---------------------------------------------------------------- the page

def write_page(run, path=None, embed=False):
    """The page of a run's folder, or of any folder with wavs, at path (run/report.html).

    embed: with the sounds inside. Errors: BadInput where there is nothing to show.
    """
    path = path or f"{run}/report.html"
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(run):
        raise BadInput(f"{run}: no such folder; give a run folder, or one with wavs")
    is_run = os.path.exists(f"{run}/log.jsonl")
    sections = run_sections if is_run else wav_sections
    name = os.path.basename(os.path.abspath(run)) if is_run else "nanoCALM"
    with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "page.html"),
              encoding="utf8") as f:
        page = f.read()
    body = "".join(f'<section><h2>{title}</h2>{part}</section>'
                   for title, part in sections(run, folder, embed) if part)
    write_file(path, page.replace("{{title}}", escape(name)).replace("{{body}}", body))


def run_sections(run, folder, embed):
    """[(title, html), ...] of a run; empty parts are left out."""
    evaluation = read_json(f"{run}/evaluation.json")
    judged = find_judged(run, evaluation)

    return [("Stages", stage_table(run)
             + f'<p class="quiet">Written {time.strftime("%Y-%m-%d %H:%M")}.</p>'),
            ("Listen: held-out clips of evaluate.py", clip_rows(in_kinds(judged), folder, embed)),
            ("Listen: the newest samples of training",
             clip_rows(in_kinds(find_samples(run)), folder, embed)),
            ("Figures of evaluate.py", evaluation_table(evaluation)),
            ("Curves", "<p>Lines are training, orange dots held-out clips.</p>"
             + curve_panels(run)),
            ("Config and hardware", hardware_table(run) + config_details(run))]


def wav_sections(folder_of_wavs, folder, embed):
    """[(title, html), ...] of a folder with wavs."""
    rows = find_named(folder_of_wavs)
    if not rows:
        raise BadInput(f"{folder_of_wavs}: has neither log.jsonl nor wavs; give a run folder")
    return [("Listen", "<p>All of it is synthetic, generated by models of this repository.</p>"
             + clip_rows(rows, folder, embed))]


if __name__ == "__main__":
    print("page.py is a library, used by report.py, train.py and evaluate.py")
