"""Listen to a trained run: text, a prompt, or both -> wav; in Python, on the command line, in a
browser.

    model = load("out/quickstart")                  model.say("three seven") -> numpy (S,)

    python sample.py --run out/quickstart --text "three seven"              speech from text
    python sample.py --run out/quickstart --text "two low beeps" --kind sound
    python sample.py --run out/real_small --prompt ref.wav --kind music     continue a recording
    python sample.py --run out/flite_tts --prompt ref.wav --text "hello"    text in the voice of
                                                                            ref.wav
    python sample.py --run out/flite_tts --prompt ref.wav --prompt-text "what ref says" \\
                     --text "hello"
    python sample.py --run out/flite_tts --texts lines.txt --out a.flac     a_1.flac, a_2.flac, ...
    python sample.py --run out/quickstart --serve                           a page to type in

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
A run is a folder of train.py or of tools.convert, or hf://user/repo@revision.
Exit status: 0 done, 2 your mistake, 1 the model gives no finite audio or nobody listens any more
(one line says which).
"""
import argparse
import math
import os
import textwrap
import time

from cli import check_packages

if __name__ == "__main__":
    check_packages()                # before the imports that need them

import torch

from audio import FORMATS, format_of
from cli import (BadInput, Parser, check_writable, cli, is_stream, number, print_to_stderr,
                 threads)
from config import LM_STAGES
from data import KINDS
from generate import INT8_WEIGHTS, choose_device, load, refuse_steps, to_int8
from output import Output, free_names, numbered_names, play
from replay import HOW

PROGRESS_FRAMES = 24                # latents between two lines of progress


def parse():
    """The arguments, checked as far as that goes before a model is loaded."""
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_what(p)
    add_sampling(p)
    add_output(p)
    add_machine(p)
    a = p.parse_args()
    check_arguments(a)
    return a


def add_what(p):
    """Options: the run, the text and the recording."""
    p.add_argument("--run", required=True, help="a run folder written by train.py or exported, or "
                                               "hf://user/repo@revision")
    p.add_argument("--stage", default="", choices=["", *LM_STAGES], metavar="STAGE",
                   help=f"which model, of {', '.join(LM_STAGES)}; default: the last of these that "
                        "the run has")

    # what
    p.add_argument("--text", help="what is spoken, or the caption of what is played")
    p.add_argument("--texts", metavar="FILE",
                   help="a text file: each of its lines becomes a file of its own")
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


def add_sampling(p):
    """Options: how it is sampled."""
    p.add_argument("--steps", type=number(int, 1),
                   help="steps per latent (audiocalm: per block); default: 1 for consistency and "
                        "lsd, 20 for flows")
    p.add_argument("--temperature", type=number(float, 0),
                   help="variance of the noise, 0 or more; default: the config's")
    p.add_argument("--cfg", type=number(float),
                   help="classifier-free guidance of the latents, 1 = off; default: the config's")
    p.add_argument("--noise", type=number(float, 0, 1),
                   help="share of the training's noise on the past that the model conditions on, "
                        "0 .. 1; default: the config's")
    p.add_argument("--seed", type=number(int, 0, 2 ** 63 - 1), default=0,
                   help="of the random numbers; default 0")


def add_output(p):
    """Options: where the audio goes."""
    p.add_argument("--out",
                   help=f"a .{', .'.join(FORMATS)}, a FIFO, or - for stdout; default: sample.wav, "
                        "or where that exists sample1.wav, ...")
    p.add_argument("--format", choices=FORMATS,
                   help="of the audio; default: as the file is named, wav into a pipe; raw: 16-bit "
                        "little-endian samples alone")
    p.add_argument("--stream", action="store_true",
                   help="write audio while it is generated (wav or raw)")
    p.add_argument("--play", action="store_true", help="and play the file")
    p.add_argument("--no-comment", action="store_true",
                   help="do not name the model in the file's header")

    # or a page to type in
    p.add_argument("--serve", action="store_true", help="serve a page to type in (serve.py)")
    p.add_argument("--port", type=number(int, 0, 65535), default=8000,
                   help="of --serve; 0 = a free one; default 8000")
    p.add_argument("--host", default="127.0.0.1",
                   help="address that --serve listens on; default: this machine alone; 0.0.0.0 = "
                        "everybody who reaches it")


def add_machine(p):
    """Options: where it runs, and how fast."""
    p.add_argument("--device", default="auto",
                   help="cpu, cuda, mps or auto, the best that is here; default auto")
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


def check_arguments(a):
    """BadInput for what cannot be generated or written, before anything is loaded. Afterwards
    a.texts are the texts to generate ([None]: none is given) and a.paths their files.
    """
    for option, text in (("text", a.text), ("prompt-text", a.prompt_text), ("out", a.out)):
        check_unicode(option, text or "")
    if a.text is not None and not a.text.strip():
        raise BadInput("--text: is empty; say something")
    check_device(a)
    if a.serve:
        refuse_beside_serve(a)
        return

    # what
    if a.texts and a.text is not None:
        raise BadInput("--texts: give it or --text, not both")
    a.texts_file = a.texts
    a.texts = read_texts(a.texts) if a.texts else [a.text]
    check_prompt(a)
    choose_paths(a)


def refuse_beside_serve(a):
    """BadInput where an option asks for a file: the page asks for these things itself."""
    for option in ("text", "texts", "prompt", "prompt_text", "prompt_seconds", "seconds", "out",
                   "format", "stream", "play", "parallel"):
        if getattr(a, option):
            raise BadInput(f"--{option.replace('_', '-')}: is not for --serve, whose page asks for "
                           "what it needs; leave it out")


def read_texts(path):
    """The lines of a text file that are not empty."""
    try:
        with open(path, encoding="utf-8-sig") as f:         # Windows may write a mark first
            texts = [line.strip() for line in f if line.strip()]
    except OSError as e:
        raise BadInput(f"--texts {path}: cannot be read ({e.strerror})") from None
    except UnicodeDecodeError as e:
        raise BadInput(f"--texts {path}: is not UTF-8 ({e.reason} at byte {e.start}); save it as "
                       "such") from None
    if not texts:
        raise BadInput(f"--texts {path}: has no line of text")
    return texts


def choose_paths(a):
    """The files to write, a.paths, and their format."""
    a.paths = None
    if a.out is None:
        a.paths = free_names(f"sample.{a.format or 'wav'}", len(a.texts))
        a.out = a.paths[0]
    if os.path.isdir(a.out):
        raise BadInput(f"--out {a.out}: is a folder; name a .wav in it")
    if a.out == "-":
        a.out = print_to_stderr()
    a.format = a.format or format_of(a.out)

    # what a pipe or a growing file cannot be
    if a.stream and a.format not in ("wav", "raw"):
        raise BadInput(f"--stream: writes wav or raw, not {a.format}; leave --stream out")
    if (len(a.texts) > 1 or a.play) and is_stream(a.out):
        option = "--play" if a.play else "--texts"
        raise BadInput(f"{option}: needs files; give --out the name of one")
    a.paths = a.paths or numbered_names(a.out, len(a.texts))
    check_writable(a.paths[0])


def check_prompt(a):
    """BadInput for options that need each other."""
    has_text = a.texts != [None]
    if a.prompt_text and not (a.prompt and has_text):
        raise BadInput("--prompt-text: needs --prompt (the audio it transcribes) "
                       "and --text (what comes next)")
    if not has_text and not a.prompt:
        raise BadInput("give --text, --prompt or both (see -h)")
    if a.prompt_seconds and (a.prompt_text or not a.prompt):
        raise BadInput("--prompt-seconds: is for a --prompt without --prompt-text, which "
                       "transcribes the whole of it")


def check_device(a):
    """The device that a.device asks for; BadInput where it is not here or cannot do it."""
    if a.int8 and a.device == "auto":
        a.device = "cpu"
    a.device = choose_device(a.device)
    if a.int8 and a.device != "cpu":
        raise BadInput("--int8: is for --device cpu")
    if a.int8 and a.fast == "compile":
        raise BadInput("--int8: its matrices cannot be compiled; use --fast no")
    if a.fast == "graph" and not a.device.startswith("cuda"):
        raise BadInput(f"--fast graph: is for --device cuda, not {a.device}; use --fast no")


def check_unicode(option, text):
    """BadInput where a text of the command line is not UTF-8: its bytes have become surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise BadInput(f"--{option}: is not UTF-8 at character {e.start + 1}; "
                       "type it again in a UTF-8 terminal") from None


# ---------------------------------------------------------------- from a recording to a file

def load_prompt(a, model):
    """--prompt -> (Voice, history to continue (1, n, D)), one of them None: with a text alone
    beside it the prompt lends its voice, else it is continued.
    """
    text = a.texts[0]
    if not a.prompt:
        return None, None
    if text is None or a.prompt_text:
        return None, model.history(a.prompt, text, a.prompt_seconds)

    # a scrap of speech, and a run that learned nothing of voices, are said
    voice = model.voice(a.prompt, seconds=a.prompt_seconds)
    if not model.seen["voice_prompts"]:
        print(f"--prompt: no training row of {a.run} had a voice prompt (no speaker in its "
              "manifest has two clips), so this one changes little; --prompt-text would continue "
              "the clip", flush=True)
    least = math.ceil(model.cfg.data.prompt_frames / 2) / model.cfg.vae.frame_rate
    if voice.speech < least:
        print(f"--prompt {a.prompt}: {voice.speech:.2f} s with speech; the voice prompts of "
              f"training had {least:.2f} s or more")
    return voice, None


def pieces_of(a, model, text):
    """Model.pieces of a text, whose errors name the line of --texts."""
    try:
        return model.pieces(text, a.kind, a.prompt_text)
    except BadInput as e:
        if not a.texts_file:
            raise
        mistake = str(e).removeprefix("--text: ")
        raise BadInput(f"--texts {a.texts_file}, text {1 + a.texts.index(text)}: {mistake}") from e


def write_audio(a, model, pieces, path, seconds):
    """pieces, as Model.generate gives them, into a file -> (seconds of new audio, seconds of work
    until the first of it, seconds of work). seconds: the most that can come.
    """
    start = time.perf_counter()
    rate = model.cfg.vae.frame_rate
    comment = "" if a.no_comment else model.comment
    output = Output(path, model.cfg.vae.channels, model.sample_rate, stream=a.stream,
                    format=a.format, comment=comment)
    new_frames = 0
    first_audio = None
    for wav, n in pieces:
        output.write(wav)
        new_frames += n
        if n:
            first_audio = first_audio or time.perf_counter() - start
        if n and not a.stream and new_frames % PROGRESS_FRAMES < n:
            print(f"{new_frames / rate:.1f} of at most {seconds:.1f} s", flush=True)
    output.close()
    return new_frames / rate, first_audio, time.perf_counter() - start


def main():
    a = parse()
    if a.threads:
        torch.set_num_threads(a.threads)

    # the model
    model = load(a.run, a.stage, a.device, kind=None if a.serve else a.kind, fast=a.fast)
    if not a.serve:
        model.check_kind(a.kind)

    # how it generates
    if a.int8:
        count = to_int8(model.lm, model.vae)
        print(f"--int8: {count} matrices rounded" if count else
              f"--int8: no matrix has {INT8_WEIGHTS} weights, from which 8 bits are faster; "
              "none is rounded")
    refuse_steps(model.lm, a.steps, "--steps")
    for name, value in (("steps", a.steps), ("temperature", a.temperature), ("guidance", a.cfg),
                        ("noise", a.noise)):
        if value is not None:
            model.defaults[name] = value

    # as a server
    if a.serve:
        from serve import serve             # here, so that nobody else waits for http
        serve(model, a.host, a.port)
        return

    # every text is checked before the first is generated
    for text in a.texts:
        note = model.note(text, a.kind) if text else ""
        if note:
            print(f'note: "{textwrap.shorten(text, 60)}": {note}', flush=True)
    every = [pieces_of(a, model, text) for text in a.texts]
    voice, history = load_prompt(a, model)

    # each text is a file
    if a.format == "raw":
        print(f"raw: 16-bit little-endian samples, {model.sample_rate} Hz, "
              f"{model.cfg.vae.channels} channel(s)", flush=True)
    for texts, path in zip(every, a.paths):
        pieces = model.generate(texts, kind=a.kind, voice=voice, history=history,
                                keep_history=a.texts == [None], seconds=a.seconds, seed=a.seed,
                                parallel=a.parallel)
        most = (a.seconds or model.cfg.sample.seconds) * len(texts)
        new, first, took = write_audio(a, model, pieces, path, most)
        print(f"{path}: {new:.2f} s from {model.stage}, {took:.2f} s of work = {new / took:.1f} x "
              f"real time, first audio after {1000 * first:.0f} ms", flush=True)
        for text in model.cut_short:
            limit = a.seconds or model.cfg.sample.seconds
            print(f'note: "{textwrap.shorten(text, 60)}" was cut at {limit:g} s; --seconds gives '
                  "it more", flush=True)
        if a.play:
            play(path, a.format)


if __name__ == "__main__":
    cli(main)
