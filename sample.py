"""Listen to a trained run: text, a prompt, or both -> wav.

    python sample.py --run out/quickstart --text "three seven"              speech from text
    python sample.py --run out/quickstart --text "two low beeps" --kind sound
    python sample.py --run out/real_small --prompt ref.wav --kind music     continue a recording
    python sample.py --run out/flite_tts --prompt ref.wav --text "hello"    text in the voice of
                                                                            ref.wav
    python sample.py --run out/flite_tts --prompt ref.wav --prompt-text "what ref says" \\
                     --text "hello"

       text ─► tokens ──────────────┐
       prompt ─► VAE encoder ─► latents ─► CALM, one latent at a time ─► VAE decoder ─► wav
                                                  └── --stream: written as it comes ──┘

A text longer than those of training is spoken in pieces: as many sentences as fit (one that does
not fit is cut at commas, then between words; Chinese or Japanese between letters), in the voice of
--prompt or else of the first piece. A run that was trained without voice prompts speaks each piece
in a voice of its own.
--prompt alone is continued: the wav holds prompt and continuation. --prompt with --text lends its
voice: the stretch with the most speech, as long as the voice prompts of training. With
--prompt-text as well, the clip is continued with the new words, and only these are kept.
--out - --stream writes to a player: python sample.py ... --stream --out - | ffplay -i -
Exit status: 0 done, 2 your mistake, 1 the model gives no finite audio or nobody listens any more
(one line says which).
"""
import argparse
import math
import os
import re
import time
import unicodedata
import warnings

from audio import WavStream, limit, load_audio, refuse_poison, save_audio, say_limited
from cli import check_packages

if __name__ == "__main__":
    check_packages()                # before the imports that need them

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from cli import (BadInput, Failure, Parser, check_writable, cli, is_stream, number, print_to_stderr,
                 threads)
from config import LM_STAGES, load_checkpoint, open_run
from data import KINDS, encode_text
from decoder import seconds_in_file
from replay import HOW, Fast

PROGRESS_FRAMES = 24                # latents between two lines of progress
INT8_WEIGHTS = 1 << 16              # of a matrix from which int8 is faster (one thread, batch 1)
PIECE_SECONDS = 30.0                # of a recording that is read or encoded at a time
SILENCE = -80.0                     # dB, mean power; digital silence lies below
SPEECH_RANGE = 30.0                 # dB between loud speech and the faintest that counts


@torch.no_grad()
def encode_prompt(lm, vae, wav):
    """wav (B, ch, S) -> x as the model sees it: normalised latents (B, T, D) or codes (B, T, K);
    vae.denormalize takes either back.

    A long wav is encoded in pieces, each behind the state of the one before: the same latents, and
    memory that does not grow.
    """
    wav = F.pad(wav, (0, -wav.shape[-1] % vae.cfg.hop))
    piece = round(PIECE_SECONDS * vae.cfg.frame_rate) * vae.cfg.hop         # samples
    state = {} if wav.shape[-1] > piece else None
    if lm.codes:
        return torch.cat([vae.encode_codes(part, state) for part in wav.split(piece, -1)], 1)
    means = [vae.encode(part, state)[0] for part in wav.split(piece, -1)]
    return vae.normalize(torch.cat(means, 1))


@torch.no_grad()
def render(lm, vae, text, *, seconds, history=None, **options):
    """lm.generate(text, **options), decoded: a list of B waveforms (ch, S), each cut where its row
    ended.

    history (B, n, D), as `encode_prompt` gives it, is continued and stands at the front of each
    waveform. Errors: Failure where audio is not finite.
    """
    max_frames = max(1, round(seconds * vae.cfg.frame_rate))
    generated = list(lm.generate(text, max_frames=max_frames, history=history, **options))
    x = torch.stack([latent for latent, _ in generated], 1)                 # (B, T, D)
    if history is not None:
        x = torch.cat([history, x], 1)                                      # (B, n + T, D)
    wav = vae.decode(vae.denormalize(x))                                    # (B, ch, (n + T) · hop)

    # each row up to the frame at which it ended
    history_frames = x.shape[1] - len(generated)
    frames = history_frames + sum((~ended).long() for _, ended in generated)            # (B,)
    wavs = [w[:, :n * vae.cfg.hop] for w, n in zip(wav, frames.tolist())]
    for row in wavs:
        refuse_poison(row, vae.cfg.sample_rate, "generated audio")
    return wavs


def to_int8(lm, vae=None):
    """Round the large matrices of sampling to int8, in place: backbone, head, the decoder's
    transformer -> their number. Layers that touch latents stay as they are: lm.latent, the head's
    first and last layers and its condition. So do matrices below INT8_WEIGHTS, which rounding the
    activations makes slower: 0.92 times the speed at 192 x 192, 1.4 at 256 x 256.

    PyTorch's dynamic quantisation: weights are rounded once, one scale per matrix, activations at
    each call. Every latent reads every weight once, so a quarter of the bytes gives up to 2.8 times
    the speed. The convolutions of a conv decoder compute more than they read: they go to bf16 where
    the CPU has bf16 matrix units (AMX), which decodes Mimi 1.7 times as fast; the difference lies
    47 dB below the audio. CPU only; the models cannot be trained or saved afterwards.
    """
    parts = lm.matrices() + ([vae.decoder.transformer] if vae else [])
    count = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                   # torch says it will move to torchao
        for part in parts:
            large = {name for name, module in part.named_modules()
                     if isinstance(module, nn.Linear) and module.weight.numel() >= INT8_WEIGHTS}
            count += len(large)
            if large:
                torch.ao.quantization.quantize_dynamic(part, large, dtype=torch.qint8, inplace=True)
    if vae and vae.cfg.decoder == "conv" and torch.cpu._is_amx_tile_supported():
        conv = vae.decoder.conv.bfloat16()
        conv.register_forward_pre_hook(lambda _, args: (args[0].bfloat16(), *args[1:]))
    return count


def parse():
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--run", required=True, help="a run folder written by train.py")
    p.add_argument("--stage", default="", choices=["", *LM_STAGES], metavar="STAGE",
                   help=f"which model, of {', '.join(LM_STAGES)}; default: the last of these that "
                        "the run has")

    # what
    p.add_argument("--text", help="what is spoken, or the caption of what is played")
    p.add_argument("--kind", default="speech", choices=KINDS)

    # a recording to begin with, and lengths
    p.add_argument("--prompt", help="audio to continue, or whose voice to take")
    p.add_argument("--prompt-text", help="the words of the prompt")
    p.add_argument("--seconds", type=number(float, above=0),
                   help="most seconds of new audio, per sentence of a long text; "
                        "default: the config's")
    p.add_argument("--prompt-seconds", type=number(float, above=0),
                   help="of a prompt to continue, use its last so many seconds; of one that lends "
                        "its voice, so many of its most spoken")

    # how it is sampled
    p.add_argument("--steps", type=number(int, 1),
                   help="steps per latent (audiocalm: per block); default: 1 for consistency and "
                        "lsd, 20 for flows")
    p.add_argument("--temperature", type=number(float, 0),
                   help="variance of the noise, 0 or more; default: the config's")
    p.add_argument("--cfg", type=number(float),
                   help="classifier-free guidance of the latents, 1 = off; default: the config's")

    # randomness
    p.add_argument("--noise", type=number(float, 0, 1),
                   help="share of the training's noise on the past that the model conditions on, "
                        "0 .. 1; default: the config's")
    p.add_argument("--seed", type=number(int, 0, 2 ** 63 - 1), default=0,
                   help="of the random numbers; default 0")

    # where it goes
    p.add_argument("--out", default="sample.wav",
                   help="a .wav, a FIFO, or - for stdout; default: sample.wav")
    p.add_argument("--stream", action="store_true", help="write audio while it is generated")

    # where it runs, and how fast
    p.add_argument("--device", default="cpu", help="cpu, cuda or mps")
    p.add_argument("--fast", choices=["auto", "no", *HOW], default="auto",
                   help="how latents follow each other: no = in a cache that grows; static = in "
                        "fixed memory; graph = there, each as a CUDA graph; compile = compiled as "
                        "well, which takes a minute to start; default: graph on cuda, else no")
    p.add_argument("--threads", type=threads, default=0, help="CPU threads; 0 = torch's choice")
    p.add_argument("--int8", action="store_true",
                   help="CPU: round the large matrices (where that is faster) to 8 bits, a conv "
                        "decoder to bf16 (AMX)")
    p.add_argument("--parallel", action="store_true",
                   help="decode in a second thread (with --threads 1 on two free cores)")

    a = p.parse_args()
    check_arguments(a)
    return a


def check_arguments(a):
    """BadInput for what cannot be generated or written, before anything is loaded."""
    for option, text in (("text", a.text), ("prompt-text", a.prompt_text), ("out", a.out)):
        check_unicode(option, text or "")
    if a.text is not None and not a.text.strip():
        raise BadInput("--text: is empty; say something")

    # the file to write
    if os.path.isdir(a.out):
        raise BadInput(f"--out {a.out}: is a folder; name a .wav in it")
    if a.out == "-":
        a.out = print_to_stderr()
    if not a.out.lower().endswith(".wav") and not is_stream(a.out):
        raise BadInput(f"--out {a.out}: only .wav is written")

    # options that need each other
    if a.prompt_text and not (a.prompt and a.text):
        raise BadInput("--prompt-text: needs --prompt (the audio it transcribes) "
                       "and --text (what comes next)")
    if a.text is None and not a.prompt:
        raise BadInput("give --text, --prompt or both (see -h)")
    if a.prompt_seconds and (a.prompt_text or not a.prompt):
        raise BadInput("--prompt-seconds: is for a --prompt without --prompt-text, which "
                       "transcribes the whole of it")
    if a.int8 and a.device != "cpu":
        raise BadInput("--int8: is for --device cpu")
    if a.int8 and a.fast == "compile":
        raise BadInput("--int8: its matrices cannot be compiled; use --fast no")
    if a.fast == "graph" and not a.device.startswith("cuda"):
        raise BadInput(f"--fast graph: is for --device cuda, not {a.device}; use --fast no")
    try:
        torch.zeros(1, device=a.device)
    except (RuntimeError, AssertionError) as e:
        raise BadInput(
            f"--device {a.device}: not available here ({str(e).splitlines()[0]})") from None
    check_writable(a.out)


def check_unicode(option, text):
    """BadInput where a text of the command line is not UTF-8: its bytes have become surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise BadInput(f"--{option}: is not UTF-8 at character {e.start + 1}; "
                       "type it again in a UTF-8 terminal") from None


# ---------------------------------------------------------------- text

# where a text may be cut, the best place first
SENTENCE_END = re.compile(r"""[.!?;:…]+["')\]”’»]*\s+|[。！？；：…]+[」』”’）]*\s*""")
COMMA = re.compile(r",\s+|[，、]\s*")
SPACE = re.compile(r"\s+")

# full stops that end no sentence, before the next character: "Mr. S", "J. S", "U.S. A", "No. 5"
TITLES = "mr|mrs|ms|dr|prof|st|jr|sr|vs|fig|vol|approx|capt|gen|col|lt|sgt|rev"
ABBREVIATION = re.compile(r"""(?:^|[\s("'])(?:no\.\s+\d|(?:""" + TITLES +
                          r"|[^\W\dI]|\w(?:\.\w)+)\.\s+.)$", re.IGNORECASE)
# letters of scripts without spaces: Thai, Lao, Burmese, Khmer, Japanese, Chinese
UNSPACED = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
                      r"\uf900-\ufaff\U00020000-\U0003ffff]")


def sentences(text, fits):
    """Pieces of the text for which fits(piece) is true, in order, as few as go: cut behind
    sentences; a sentence that does not fit behind commas, else in halves between words, else, in a
    script without spaces, between letters. Errors: BadInput for a word that does not fit.
    """
    if fits(text):
        return [text]
    parts = cut_best(text)
    if len(parts) == 1:
        raise BadInput(f"--text: '{text[:40]}' is longer than this run was trained on "
                       "(data.text_len)")

    # neighbours that fit together stay together; a part that does not fit is cut further
    pieces = []
    joined = ""
    for part in parts:
        if joined and fits((joined + part).strip()):
            joined += part
            continue
        if joined:
            pieces += sentences(joined.strip(), fits)
        joined = part
    return pieces + sentences(joined.strip(), fits)


def cut_best(text):
    """The text cut at its best kind of place -> parts that join to it again; one part where it has
    no such place.
    """
    ends = [match.end() for match in SENTENCE_END.finditer(text)
            if not ABBREVIATION.search(text[max(0, match.end() - 24):match.end() + 1])]
    for ends in (ends, [match.end() for match in COMMA.finditer(text)]):
        parts = [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)]) if text[a:b].strip()]
        if len(parts) > 1:
            return parts

    # halves
    places = [match.end() for match in SPACE.finditer(text)]
    places = places or [i for i in range(1, len(text)) if between_letters(text, i)]
    if not places:
        return [text]
    middle = places[(len(places) - 1) // 2]
    return [text[:middle], text[middle:]]


def between_letters(text, i):
    """May a text without spaces be cut before character i? Not before a mark or punctuation."""
    return bool(UNSPACED.match(text[i - 1])) and unicodedata.category(text[i])[0] == "L"


def texts_to_generate(a, cfg, lm):
    """The pieces of --text, each short enough for the run; the first behind --prompt-text, if there
    is one.
    """
    limit = cfg.data.text_len
    unit = "tokens" if cfg.data.tokenizer else "bytes"

    def tokens(text):
        """Text tokens, without the one that names the kind."""
        return len(encode_text(text, a.kind, cfg.data)) - int(cfg.data.kind_token)

    def too_long(option, text):
        return BadInput(f"{option}: {tokens(text)} {unit} are more than this run was trained on "
                        f"(data.text_len = {limit})")

    # a monologue's words run on from the prompt's end, a prefix holds the prompt's words too
    text = " ".join((a.text or "").split())
    before = f"{a.prompt_text} " if a.prompt_text and not lm.monologue else ""
    if tokens(before) > limit:
        raise too_long("--prompt-text", before)

    # a caption is not cut
    if a.kind != "speech":
        if tokens(before + text) > limit:
            raise too_long("--prompt-text and --text" if before else "--text", before + text)
        return [before + text]

    # the prompt's words take room from the first piece alone
    pieces = sentences(text, lambda piece: tokens(piece) <= limit)
    if not before:
        return pieces
    try:
        first, *rest = sentences(text, lambda piece: tokens(before + piece) <= limit)
    except BadInput:
        raise BadInput(f"--prompt-text: {tokens(before)} {unit} leave too little room for --text "
                       f"(data.text_len = {limit})") from None
    if rest:
        rest = sentences(text[len(first):].strip(), lambda piece: tokens(piece) <= limit)
    return [before + first, *rest]


# ---------------------------------------------------------------- where a recording speaks

def frame_levels(wav, hop):
    """Level of the audio behind each latent: wav (ch, S) -> numpy (ceil(S / hop),), dB, at least
    -100.
    """
    wav = F.pad(wav, (0, -wav.shape[-1] % hop))
    power = wav.square().mean(0).unflatten(0, (-1, hop)).mean(1)            # (T,)
    return (10 * power.clamp(min=1e-10).log10()).cpu().numpy()


def file_levels(path, cfg):
    """frame_levels of a whole file (cfg: VAEConfig), read in pieces, so that its length costs no
    memory.
    """
    piece = round(PIECE_SECONDS * cfg.frame_rate) * cfg.hop / cfg.sample_rate       # seconds
    levels = []
    for i in range(math.ceil(seconds_in_file(path) / piece)):
        wav = load_audio(path, cfg.sample_rate, cfg.channels, start=i * piece, seconds=piece,
                         allow_silence=True)
        levels.append(frame_levels(torch.tensor(wav), cfg.hop))
    return np.concatenate(levels)


def speech_window(levels, frames):
    """The window of at most `frames` latents that holds the most speech -> (its first latent, how
    many of its latents have speech; 0 = silence).

    Speech is what lies at most 30 dB below the loud parts: the level that one in ten of the latents
    that are not silent exceeds. Among equal windows the louder one (mean of dB), then the first.
    """
    audible = levels > SILENCE
    if not audible.any():
        return 0, 0
    floor = np.quantile(levels[audible], 0.9) - SPEECH_RANGE
    speech = audible & (levels > floor)

    # every window: its latents with speech, and its level in whole dB
    windows = np.lib.stride_tricks.sliding_window_view
    n = min(frames, len(levels))
    counts = windows(speech, n).sum(1)
    loudness = windows(levels, n).mean(1).round()
    first = int(np.lexsort((-loudness, -counts))[0])
    return first, int(counts[first])


def best_voice(latents, wav, cfg):
    """The voice prompt (1, P, D) in latents (1, T, D) whose audio is wav (ch, S), or None where it
    is silent.
    """
    first, speech = speech_window(frame_levels(wav, cfg.vae.hop), cfg.data.prompt_frames)
    return latents[:, first:first + cfg.data.prompt_frames] if speech else None


def encode_voice(lm, vae, path, frames):
    """A recording -> the voice prompt it lends: the latents (1, n <= frames, D) of its window with
    the most speech, or codes; and how many of them have speech. (None, 0) where all is silent.

    Only that window is encoded.
    """
    cfg = vae.cfg
    first, speech = speech_window(file_levels(path, cfg), frames)
    if not speech:
        return None, 0
    wav = load_audio(path, cfg.sample_rate, cfg.channels, start=first * cfg.hop / cfg.sample_rate,
                     seconds=frames * cfg.hop / cfg.sample_rate, allow_silence=True)
    wav = torch.tensor(wav)[None].to(vae.latent_mean.device)            # (1, ch, S)
    return encode_prompt(lm, vae, wav), speech


# ---------------------------------------------------------------- prompt

def load_prompt(a, cfg, vae, lm):
    """--prompt as latents -> (voice prompt (1, P, D), history to continue (1, n, D)), one of them
    None: with --text alone beside it the prompt lends its voice, else it is continued.
    """
    if not a.prompt:
        return None, None
    if a.text is not None and not a.prompt_text:
        return load_voice(a, cfg, vae, lm), None
    return None, load_history(a, cfg, vae, lm)


def load_voice(a, cfg, vae, lm):
    """The voice prompt (1, P, D) that --prompt lends: of --prompt-seconds, else as long as the
    longest of training.
    """
    most = cfg.data.prompt_frames
    frames = most
    if a.prompt_seconds:
        frames = max(1, round(a.prompt_seconds * cfg.vae.frame_rate))
    if frames > most:
        raise BadInput(f"--prompt-seconds: {a.prompt_seconds:g} is more than this run's voice "
                       f"prompts have, {most / cfg.vae.frame_rate:g} s (data.prompt_frames)")

    # silence is refused, a scrap of speech is said
    voice, speech = encode_voice(lm, vae, a.prompt, frames)
    if voice is None:
        raise BadInput(f"--prompt {a.prompt}: is silent, it has no voice; give another recording")
    least = math.ceil(most / 2)
    if speech < least:
        print(f"--prompt {a.prompt}: {speech / cfg.vae.frame_rate:.2f} s with speech; the voice "
              f"prompts of training had {least / cfg.vae.frame_rate:.2f} s or more")
    return voice


def load_history(a, cfg, vae, lm):
    """The latents (1, n, D) to continue: all of --prompt where --prompt-text transcribes it, else
    its end.
    """
    # what is continued without a text is the end of the file
    start = 0.0
    if a.text is None:
        seconds = a.prompt_seconds or cfg.sample.prompt_seconds
        start = max(0.0, seconds_in_file(a.prompt) - seconds)
    # exactly so many samples
    wav = load_audio(a.prompt, cfg.vae.sample_rate, cfg.vae.channels, start=start,
                     allow_silence=True)
    if a.text is None:
        wav = wav[:, -round(seconds * cfg.vae.sample_rate):]

    # silence is judged on what is used
    if abs(wav).max() < 1e-4:
        part = f"the last {wav.shape[1] / cfg.vae.sample_rate:g} s are silent" if start else \
            "is silent"
        raise BadInput(f"--prompt {a.prompt}: {part}, there is nothing to continue; cut the file "
                       "where its sound ends")
    return encode_prompt(lm, vae, torch.tensor(wav)[None].to(a.device))


# ---------------------------------------------------------------- audio

class Output:
    """The generated audio on its way to --out: collected, or with --stream written at once. Not a
    sample that is not finite is written; peaks are limited to full scale, which is said.

    skip: samples to drop from the front (the end of a prompt that is not kept).
    """

    def __init__(self, a, vae, skip):
        self.path = a.out
        self.sample_rate = vae.cfg.sample_rate
        self.skip = skip
        self.pieces = []
        self.samples = 0
        self.loud = 0                                   # samples that were limited
        self.peak = 0.0
        self.file = None
        if a.stream:
            self.file = WavStream(a.out, vae.cfg.channels, self.sample_rate)

    def write(self, wav):
        """wav (1, ch, n)."""
        skipped = min(self.skip, wav.shape[-1])
        self.skip -= skipped
        wav = wav[0, :, skipped:].float().cpu()
        refuse_poison(wav, self.sample_rate, "the VAE's decoder", self.samples)

        # to full scale
        wav, loud, peak = limit(wav)
        self.loud += loud
        self.peak = max(self.peak, peak)
        self.samples += wav.shape[-1]
        if self.file is None:
            self.pieces.append(wav)
            return
        try:
            self.file.write(wav)
        except BrokenPipeError:
            raise Failure(f"{self.path}: its reader has gone after "
                          f"{self.samples / self.sample_rate:.2f} s; stopped") from None

    def close(self):
        if self.file is not None:
            self.file.close()
        else:
            save_audio(self.path, torch.cat(self.pieces, -1), self.sample_rate)
        say_limited(self.path, self.loud, self.peak)


def keep_latents(generated, latents):
    """The same (latent, ended) pairs; the latents are also appended to the list as they pass."""
    for x, ended in generated:
        latents.append(x)
        yield x, ended


def refuse_poisoned_latent(latents, stage, frame_rate):
    """Failure naming the first of the latents, [(1, D), ...], that is not finite."""
    for i, x in enumerate(latents):
        if not torch.isfinite(x).all():
            raise Failure(f"{stage}: latent {i} ({i / frame_rate:.2f} s) is not finite, nothing "
                          "from there on is written; use an earlier checkpoint")


def sampling_options(cfg, steps=None, temperature=None, guidance=None, noise=None):
    """Options of lm.generate: those given, else the config's (cfg: SampleConfig). Steps None: the
    objective's own number.
    """
    return {"steps": steps or cfg.steps or None,
            "temperature": cfg.temperature if temperature is None else temperature,
            "guidance": cfg.cfg if guidance is None else guidance,
            "noise": cfg.noise if noise is None else noise,
            "text_temperature": cfg.text_temperature,
            "text_top_k": cfg.text_top_k}


def choose_fast(a):
    """--fast, which says how generate() runs, as the option of that name: a Fast, or None."""
    how = a.fast
    if how == "auto":
        how = "graph" if a.device.startswith("cuda") else "no"
    return None if how == "no" else Fast(how)


@torch.no_grad()
def generate(a, cfg, vae, lm, texts, stage):
    """All texts, one after the other, into --out.

    -> (seconds of new audio, seconds of work until the first of it, seconds of work).
    """
    options = sampling_options(cfg.sample, a.steps, a.temperature, a.cfg, a.noise)
    options["fast"] = choose_fast(a)
    seconds = a.seconds or cfg.sample.seconds
    max_frames = max(1, round(seconds * cfg.vae.frame_rate))
    voice, history = load_prompt(a, cfg, vae, lm)

    # the history is decoded first: the new audio then joins it without a seam
    start = time.perf_counter()
    decoder_state = {}
    keep_history = history is not None and a.text is None
    output = Output(a, vae, skip=vae.latency if history is not None and not keep_history else 0)
    if history is not None:
        parts = vae.denormalize(history).split(round(PIECE_SECONDS * cfg.vae.frame_rate), 1)
        lead = torch.cat([vae.decode(part, decoder_state) for part in parts], -1)
        if keep_history:
            output.write(lead)

    new_frames = 0
    first_audio = None
    for i, text in enumerate(texts):
        tokens = torch.tensor([encode_text(text, a.kind, cfg.data)], dtype=torch.long,
                              device=a.device)
        # a seed for each, whatever the one before has drawn
        generator = torch.Generator(a.device).manual_seed(a.seed + i)
        latents = []
        wavs = []
        generated = lm.generate(tokens, kind=KINDS.index(a.kind), max_frames=max_frames,
                                prompt=voice, history=history, generator=generator, **options)
        generated = keep_latents(generated, latents)
        for wav, n, _ in vae.decode_stream(generated, decoder_state, a.parallel):
            if not torch.isfinite(wav).all():
                refuse_poisoned_latent(latents, stage, cfg.vae.frame_rate)
            output.write(wav)
            wavs.append(wav)
            new_frames += n
            first_audio = first_audio or time.perf_counter() - start
            if not a.stream and new_frames % PROGRESS_FRAMES < n:
                print(f"{new_frames / cfg.vae.frame_rate:.1f} of at most "
                      f"{seconds * len(texts):.1f} s", flush=True)

        # the next sentence takes the voice of the prompt, or else of this one
        if cfg.data.prompt_frames and voice is None:
            if history is None:
                voice = best_voice(torch.stack(latents, 1), torch.cat(wavs, -1)[0], cfg)
            else:
                voice = best_voice(history, lead[0], cfg)
        history = None
    output.write(vae.flush(decoder_state))
    output.close()
    return new_frames / cfg.vae.frame_rate, first_audio, time.perf_counter() - start


def what_was_seen(run, stage, cfg):
    """What the training rows of a stage held -> {"kinds", "voice_prompts"}, from its checkpoint.

    A checkpoint from before 2026-11-27 does not say so: the config is asked for the kinds.
    """
    state = load_checkpoint(f"{run}/{stage}.pt")
    weighted = [kind for kind in KINDS if cfg.data.weights.get(kind, 0) > 0]
    kinds = weighted or (KINDS if cfg.data.manifest else cfg.toy.kinds)
    return {"kinds": kinds, "voice_prompts": True} | state.get("seen", {})


def check_trained(a, cfg, stage):
    """BadInput where the run never saw the kind in training; a line where it never saw a voice
    prompt.
    """
    seen = what_was_seen(a.run, stage, cfg)
    kinds = seen["kinds"]
    if a.kind not in kinds:
        raise BadInput(f"--kind {a.kind}: {a.run} was trained on {', '.join(kinds)} alone; use "
                       f"--kind {kinds[0]}")
    lends_voice = a.prompt and a.text is not None and not a.prompt_text
    if lends_voice and not cfg.data.prompt_frames:
        raise BadInput(f"--prompt: {a.run} was trained without voice prompts "
                       "(data.prompt_frames = 0); add --prompt-text to continue the clip instead")
    if lends_voice and not seen["voice_prompts"]:
        print(f"--prompt: no training row of {a.run} had a voice prompt (no speaker in its "
              "manifest has two clips), so this one changes little; --prompt-text would continue "
              "the clip", flush=True)


def main():
    a = parse()
    if a.threads:
        torch.set_num_threads(a.threads)
    cfg, vae, lm, stage = open_run(a.run, a.stage, a.device, a.kind)
    if lm is None:
        raise BadInput(f"{a.run}: has no language model yet; train it with \"lm\" in stages")
    check_trained(a, cfg, stage)
    if a.int8:
        count = to_int8(lm, vae)
        print(f"--int8: {count} matrices rounded" if count else
              f"--int8: no matrix has {INT8_WEIGHTS} weights, from which 8 bits are faster; "
              "none is rounded")

    texts = texts_to_generate(a, cfg, lm)
    new, first, took = generate(a, cfg, vae, lm, texts, stage)
    print(f"{a.out}: {new:.2f} s from {stage}, {took:.2f} s of work = {new / took:.1f} x real "
          f"time, first audio after {1000 * first:.0f} ms")


if __name__ == "__main__":
    cli(main)
