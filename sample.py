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

A text longer than those of training is spoken sentence by sentence (split at sentences, then at
commas, then between words), in the voice of --prompt or else of the first sentence. A run that was
trained without voice prompts speaks each sentence in a voice of its own.
--prompt alone is continued: the wav holds prompt and continuation. --prompt with --text lends its
voice. With --prompt-text as well, the clip is continued with the new words, and only these are kept.
Exit status: 0 done, 2 your mistake (one line says which).
"""
import argparse
import re
import time
import warnings

import soundfile as sf
import torch
import torch.nn as nn

from cli import BadInput, Parser, cli, number, threads
from config import LM_STAGES, open_run
from data import KINDS, encode_text, load_audio, save_audio

PROGRESS_FRAMES = 24                # latents between two lines of progress


@torch.no_grad()
def encode_prompt(lm, vae, wav):
    """wav (B, ch, S) -> x as the model sees it: normalised latents (B, T, D) or codes (B, T, K);
    vae.denormalize takes either back.
    """
    return vae.encode_codes(wav) if lm.codes else vae.normalize(vae.encode(wav)[0])


@torch.no_grad()
def render(lm, vae, text, *, seconds, history=None, **options):
    """lm.generate(text, **options), decoded: a list of B waveforms (ch, S), each cut where its row
    ended.

    history (B, n, D), as `encode_prompt` gives it, is continued and stands at the front of each
    waveform.
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
    return [w[:, :n * vae.cfg.hop] for w, n in zip(wav, frames.tolist())]


def to_int8(lm, vae=None):
    """Round the large matrices of sampling to int8, in place: backbone, head, the decoder's
    transformer. Layers that touch latents stay as they are: lm.latent, the head's first and last
    layers and its condition.

    PyTorch's dynamic quantisation: weights are rounded once, one scale per matrix, activations at
    each call. Every latent reads every weight once, so a quarter of the bytes gives up to 2.8 times
    the speed. The convolutions of a conv decoder compute more than they read: they go to bf16 where
    the CPU has bf16 matrix units (AMX), which decodes Mimi 1.7 times as fast; the difference lies
    47 dB below the audio. CPU only; the models cannot be trained or saved afterwards.
    """
    parts = lm.matrices() + ([vae.decoder.transformer] if vae else [])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                   # torch says it will move to torchao
        for part in parts:
            torch.ao.quantization.quantize_dynamic(part, {nn.Linear}, dtype=torch.qint8,
                                                   inplace=True)
    if vae and vae.cfg.decoder == "conv" and torch.cpu._is_amx_tile_supported():
        conv = vae.decoder.conv.bfloat16()
        conv.register_forward_pre_hook(lambda _, args: (args[0].bfloat16(), *args[1:]))


def parse():
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--run", required=True, help="a run folder written by train.py")
    p.add_argument("--stage", default="", choices=["", *LM_STAGES], metavar="STAGE",
                   help=f"which model, of {', '.join(LM_STAGES)}; default: the last of these that "
                        "the run has")

    # what
    p.add_argument("--text", help="what is spoken, or the caption of what is played")
    p.add_argument("--kind", default="speech", choices=KINDS)
    p.add_argument("--prompt", help="audio to continue, or whose voice to take")
    p.add_argument("--prompt-text", help="the words of the prompt")
    p.add_argument("--seconds", type=number(float, above=0),
                   help="most seconds of new audio, per sentence of a long text; "
                        "default: the config's")
    p.add_argument("--prompt-seconds", type=number(float, above=0),
                   help="of a prompt to continue, use its last so many seconds")

    # how it is sampled
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

    # where and how fast
    p.add_argument("--stream", action="store_true", help="write audio while it is generated")
    p.add_argument("--device", default="cpu", help="cpu, cuda or mps")
    p.add_argument("--threads", type=threads, default=0, help="CPU threads; 0 = torch's choice")
    p.add_argument("--int8", action="store_true",
                   help="CPU: round the large matrices to 8 bits, a conv decoder to bf16 (AMX)")
    p.add_argument("--parallel", action="store_true",
                   help="decode in a second thread (with --threads 1 on two free cores)")
    p.add_argument("--out", default="sample.wav", help="default: sample.wav")
    a = p.parse_args()
    check_arguments(a)
    return a


def check_arguments(a):
    """BadInput for what cannot be generated, before anything is loaded."""
    if a.text is not None and not a.text.strip():
        raise BadInput("--text: is empty; say something")
    if not a.out.lower().endswith(".wav"):
        raise BadInput(f"--out {a.out}: only .wav is written")
    if a.prompt_text and not (a.prompt and a.text):
        raise BadInput("--prompt-text: needs --prompt (the audio it transcribes) "
                       "and --text (what comes next)")
    if a.text is None and not a.prompt:
        raise BadInput("give --text, --prompt or both (see -h)")
    if a.int8 and a.device != "cpu":
        raise BadInput("--int8: is for --device cpu")
    try:
        torch.zeros(1, device=a.device)
    except (RuntimeError, AssertionError) as e:
        raise BadInput(
            f"--device {a.device}: not available here ({str(e).splitlines()[0]})") from None


# ---------------------------------------------------------------- text

def sentences(text, fits):
    """Pieces of the text for which fits(piece) is true, in order: split behind sentences, else
    behind commas, else in halves between words.
    """
    if fits(text):
        return [text]
    for boundary in (r"(?<=[.!?;:])\s+", r"(?<=,)\s+"):
        parts = re.split(boundary, text)
        if len(parts) > 1:
            break
    else:
        words = text.split()
        if len(words) == 1:
            raise BadInput(f"--text: '{text[:40]}' (behind --prompt-text, if any) is longer than "
                           "this run was trained on (data.text_len)")
        half = len(words) // 2
        parts = [" ".join(words[:half]), " ".join(words[half:])]
    return [piece for part in parts for piece in sentences(part, fits)]


def texts_to_generate(a, cfg, lm):
    """The pieces of --text, each short enough for the run; behind --prompt-text, if there is one."""
    limit = cfg.data.text_len

    def tokens(text):
        """Text tokens, without the one that names the kind."""
        return len(encode_text(text, a.kind, cfg.data)) - int(cfg.data.kind_token)

    if a.kind != "speech" and tokens(a.text or "") > limit:
        unit = "tokens" if cfg.data.tokenizer else "bytes"
        raise BadInput(f"--text: {tokens(a.text)} {unit} are more than this run was "
                       f"trained on (data.text_len = {limit})")

    # a monologue's words run on from the prompt's end, a prefix holds the prompt's words too
    before = f"{a.prompt_text} " if a.prompt_text and not lm.monologue else ""
    pieces = sentences((a.text or "").strip(), lambda text: tokens(before + text) <= limit)
    return [before + pieces[0], *pieces[1:]]


# ---------------------------------------------------------------- prompt

def load_prompt(a, cfg, vae, lm):
    """--prompt as latents -> (voice prompt (1, P, D), history to continue (1, n, D)), one of them
    None: with --text alone beside it the prompt lends its voice, else it is continued.
    """
    if not a.prompt:
        return None, None
    wav = torch.tensor(load_audio(a.prompt, cfg.vae.sample_rate, cfg.vae.channels)).to(a.device)
    if a.text is None:
        seconds = a.prompt_seconds or cfg.sample.prompt_seconds
        wav = wav[:, -round(seconds * cfg.vae.sample_rate):]
    latents = encode_prompt(lm, vae, wav[None])                             # (1, T, D) or codes
    if a.text is None or a.prompt_text:
        return None, latents

    if not cfg.data.prompt_frames:
        raise BadInput(f"--prompt: {a.run} was trained without voice prompts "
                       "(data.prompt_frames = 0); add --prompt-text to continue the clip instead")
    return latents[:, :cfg.data.prompt_frames], None


# ---------------------------------------------------------------- audio

class Output:
    """The generated audio on its way to --out: collected, and with --stream written at once.

    skip: samples to drop from the front (the end of a prompt that is not kept).
    """

    def __init__(self, a, vae, skip):
        self.path = a.out
        self.sample_rate = vae.cfg.sample_rate
        self.skip = skip
        self.pieces = []
        self.file = None
        if a.stream:
            try:
                self.file = sf.SoundFile(a.out, "w", self.sample_rate, vae.cfg.channels, "PCM_16",
                                         format="WAV")
            except (OSError, sf.LibsndfileError) as e:
                raise BadInput(f"--out {a.out}: cannot be written ({e})") from None

    def write(self, wav):
        """wav (1, ch, n)."""
        skipped = min(self.skip, wav.shape[-1])
        self.skip -= skipped
        wav = wav[0, :, skipped:].cpu()
        self.pieces.append(wav)
        if self.file is not None:
            self.file.write(wav.T.numpy())
            self.file.flush()

    def close(self):
        wav = torch.cat(self.pieces, -1)
        if self.file is not None:
            self.file.close()
        else:
            save_audio(self.path, wav.numpy(), self.sample_rate)


def keep_latents(generated, latents):
    """The same (latent, ended) pairs; the latents are also appended to the list as they pass."""
    for x, ended in generated:
        latents.append(x)
        yield x, ended


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


@torch.no_grad()
def generate(a, cfg, vae, lm, texts):
    """All texts, one after the other, into --out.

    -> (seconds of new audio, seconds of work until the first of it, seconds of work).
    """
    options = sampling_options(cfg.sample, a.steps, a.temperature, a.cfg, a.noise)
    generator = torch.Generator(a.device).manual_seed(a.seed)
    seconds = a.seconds or cfg.sample.seconds
    max_frames = max(1, round(seconds * cfg.vae.frame_rate))
    voice, history = load_prompt(a, cfg, vae, lm)

    # the history is decoded first: the new audio then joins it without a seam
    start = time.perf_counter()
    decoder_state = {}
    keep_history = history is not None and a.text is None
    output = Output(a, vae, skip=vae.latency if history is not None and not keep_history else 0)
    if history is not None:
        lead = vae.decode(vae.denormalize(history), decoder_state)
        if keep_history:
            output.write(lead)

    new_frames = 0
    first_audio = None
    for text in texts:
        tokens = torch.tensor([encode_text(text, a.kind, cfg.data)], dtype=torch.long,
                              device=a.device)
        latents = []
        generated = lm.generate(tokens, kind=KINDS.index(a.kind), max_frames=max_frames,
                                prompt=voice, history=history, generator=generator, **options)
        generated = keep_latents(generated, latents)
        for wav, n, _ in vae.decode_stream(generated, decoder_state, a.parallel):
            output.write(wav)
            new_frames += n
            first_audio = first_audio or time.perf_counter() - start
            if not a.stream and new_frames % PROGRESS_FRAMES < n:
                print(f"{new_frames / cfg.vae.frame_rate:.1f} of at most "
                      f"{seconds * len(texts):.1f} s", flush=True)

        # the next sentence takes the voice of the prompt, or else of this one
        if cfg.data.prompt_frames and voice is None:
            spoken = torch.stack(latents, 1) if history is None else history
            voice = spoken[:, :cfg.data.prompt_frames]
        history = None
    output.write(vae.flush(decoder_state))
    output.close()
    return new_frames / cfg.vae.frame_rate, first_audio, time.perf_counter() - start


def main():
    a = parse()
    if a.threads:
        torch.set_num_threads(a.threads)
    cfg, vae, lm, stage = open_run(a.run, a.stage, a.device, a.kind)
    if lm is None:
        raise BadInput(f"{a.run}: has no language model yet; train it with \"lm\" in stages")
    if a.int8:
        to_int8(lm, vae)

    texts = texts_to_generate(a, cfg, lm)
    new, first, took = generate(a, cfg, vae, lm, texts)
    print(f"{a.out}: {new:.2f} s from {stage}, {took:.2f} s of work = {new / took:.1f} x real "
          f"time, first audio after {1000 * first:.0f} ms")


if __name__ == "__main__":
    cli(main)
