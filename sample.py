"""Listen to a trained run: text, a prompt, or both -> wav.

    python sample.py --run out/quickstart --text "three seven"              speech from text
    python sample.py --run out/quickstart --text "two low beeps" --kind sound
    python sample.py --run out/real_small --prompt ref.wav --kind music     continue a recording
    python sample.py --run out/real_small --prompt ref.wav --text "hello"   text in the voice of
                                                                            ref.wav
    python sample.py --run out/real_small --prompt ref.wav --prompt-text "what ref says" \\
                     --text "hello"

       text ─► tokens ──────────────┐
       prompt ─► VAE encoder ─► latents ─► CALM, one latent at a time ─► VAE decoder ─► wav
                                                  └── --stream: written as it comes ──┘

A text longer than the run was trained on is spoken sentence by sentence (then at commas, then
between words), in the voice of --prompt, else of the first sentence (where the run was trained
without voice prompts, each in its own).
--prompt alone is continued (the wav holds prompt and continuation). --prompt with --text lends its
voice; with --prompt-text too, the clip is continued with the new words and only these are kept.
Exit status: 0 done, 2 your mistake (one line says which).
"""
import argparse
import math
import re
import time
import warnings

import soundfile as sf
import torch
import torch.nn as nn

from cli import BadInput, Parser, cli, threads
from config import LM_STAGES, open_run
from data import KINDS, encode_text, load_audio, save_audio


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
    drawn = list(lm.generate(text, max_frames=max_frames, history=history, **options))
    past = [] if history is None else [history]
    x = torch.cat([*past, torch.stack([x for x, _ in drawn], 1)], 1)        # (B, n + T, D)
    wav = vae.decode(vae.denormalize(x))                                    # (B, ch, (n + T) · hop)
    frames = sum((~ended).long() for _, ended in drawn) + (x.shape[1] - len(drawn))     # (B,)
    return [w[:, :n * vae.cfg.hop] for w, n in zip(wav, frames.tolist())]


def to_int8(lm, vae=None):
    """Round the big matrices of sampling to int8, in place: backbone, head, decoder's transformer
    (not what touches latents: lm.latent, the head's first and last layers and its condition).

    Weights are rounded once, one scale a matrix, activations at each call (PyTorch's dynamic
    quantisation). One latent reads every weight once, so a quarter of the bytes is up to 2.8 times
    the speed. The convolutions of a conv decoder compute more than they read: they go to bf16 where
    the CPU has bf16 matrix units (AMX), 1.7 times the speed of Mimi's decoder, its audio 47 dB
    above the difference. CPU only; cannot be trained or saved any more.
    """
    parts = lm.matrices() + ([vae.decoder.transformer] if vae else [])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                     # it will move to torchao one day
        for part in parts:
            torch.ao.quantization.quantize_dynamic(part, {nn.Linear}, dtype=torch.qint8,
                                                   inplace=True)
    if vae and vae.cfg.decoder == "conv" and torch.cpu._is_amx_tile_supported():
        conv = vae.decoder.conv.bfloat16()
        conv.register_forward_pre_hook(lambda _, args: (args[0].bfloat16(), *args[1:]))


def parse():
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--run", required=True, help="a run folder written by train.py")
    p.add_argument("--stage", default="", choices=["", *LM_STAGES],
                   metavar="STAGE", help=f"which model, of {', '.join(LM_STAGES)}; default: the last "
                                         "of these that the run has")
    p.add_argument("--text", help="what is said or heard")
    p.add_argument("--kind", default="speech", choices=KINDS)
    p.add_argument("--prompt", help="audio to continue, or whose voice to take")
    p.add_argument("--prompt-text", help="what the prompt says")
    p.add_argument("--seconds", type=float,
                   help="longest new audio, of a long text that of each sentence; "
                        "default: the config's")
    p.add_argument("--prompt-seconds", type=float,
                   help="of a prompt to continue, its last so many seconds")
    p.add_argument("--steps", type=int,
                   help="steps a latent (audiocalm: a block); default: 1 for consistency and lsd, "
                        "20 for flows")
    p.add_argument("--temperature", type=float,
                   help="variance of the noise, 0 .. 1; default: the config's")
    p.add_argument("--cfg", type=float, help="latent guidance, 1 = off; default: the config's")
    p.add_argument("--noise", type=float,
                   help="share of the training's noise on what the model hears of its own past, "
                        "0 .. 1; default: the config's")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--stream", action="store_true", help="write audio while it is generated")
    p.add_argument("--device", default="cpu", help="cpu, cuda, mps")
    p.add_argument("--threads", type=threads, default=0, help="CPU threads; 0 = torch's choice")
    p.add_argument("--int8", action="store_true",
                   help="CPU: round the big matrices to 8 bits, a conv decoder to bf16 (AMX)")
    p.add_argument("--parallel", action="store_true",
                   help="decode in a second thread (with --threads 1 on two free cores)")
    p.add_argument("--out", default="sample.wav", help="default: sample.wav")
    a = p.parse_args()
    if a.text is not None and not a.text.strip():
        raise BadInput("--text: is empty; say something")
    if not a.out.lower().endswith(".wav"):
        raise BadInput(f"--out {a.out}: only .wav is written")
    if a.prompt_text and not (a.prompt and a.text):
        raise BadInput("--prompt-text: needs --prompt (the audio it transcribes) "
                       "and --text (what comes next)")
    if a.text is None and not a.prompt:
        raise BadInput("give --text, --prompt or both (see -h)")
    if not 0 <= a.seed < 2 ** 63:
        raise BadInput(f"--seed: {a.seed} does not lie in 0 .. 2^63 - 1")
    if not 0 <= (a.noise or 0) <= 1:
        raise BadInput(f"--noise: {a.noise} does not lie in 0 .. 1")
    for name, low in (("seconds", 0), ("prompt_seconds", 0), ("steps", 0), ("cfg", -math.inf),
                      ("temperature", -1e-9)):
        value = getattr(a, name)
        if value is not None and not (low < value < math.inf):
            raise BadInput(f"--{name.replace('_', '-')}: {value} is not possible; "
                           "use a larger, finite number")
    try:
        torch.zeros(1, device=a.device)
    except (RuntimeError, AssertionError) as e:
        raise BadInput(
            f"--device {a.device}: not available here ({str(e).splitlines()[0]})") from None
    return a


def sentences(text, fits):
    """Pieces of text that fit, in order: cut behind sentences, else behind commas, else in halves.
    """
    if fits(text):
        return [text]
    parts = next((parts for cut in (r"(?<=[.!?;:])\s+", r"(?<=,)\s+")
                  if len(parts := re.split(cut, text)) > 1), None)
    if parts is None:
        words = text.split()
        if len(words) == 1:
            raise BadInput(f"--text: '{text[:40]}' (behind --prompt-text, if any) is longer than "
                           "this run was trained on (data.text_len)")
        half = len(words) // 2
        parts = [" ".join(words[:half]), " ".join(words[half:])]
    return [piece for part in parts for piece in sentences(part, fits)]


def noted(drawn, heard):
    """The same latents, kept in the list `heard` as they pass."""
    for x, ended in drawn:
        heard.append(x)
        yield x, ended


def main():
    a = parse()
    if a.threads:
        torch.set_num_threads(a.threads)
    cfg, vae, lm, stage = open_run(a.run, a.stage, a.device, a.kind)
    if lm is None:
        raise BadInput(f"{a.run}: has no language model yet; train it with \"lm\" in stages")
    if a.int8:
        if a.device != "cpu":
            raise BadInput("--int8: is for --device cpu")
        to_int8(lm, vae)
    rate, hop, limit = cfg.vae.sample_rate, cfg.vae.hop, cfg.data.text_len
    # a monologue's words run on from the prompt's end
    said = f"{a.prompt_text} " if a.prompt_text and not lm.monologue else ""

    def encode(text):
        return encode_text(text, a.kind, cfg.data)

    if a.kind != "speech" and len(encode(a.text or "")) > 1 + limit:
        unit = "tokens" if cfg.data.tokenizer else "bytes"
        raise BadInput(f"--text: {len(encode(a.text)) - 1} {unit} are more than this run was "
                       f"trained on (data.text_len = {limit})")
    texts = sentences((a.text or "").strip(), lambda text: len(encode(said + text)) <= 1 + limit)
    texts[0] = said + texts[0]
    options = {"kind": KINDS.index(a.kind), "steps": a.steps or cfg.sample.steps or None,
               "temperature": cfg.sample.temperature if a.temperature is None else a.temperature,
               "guidance": cfg.sample.cfg if a.cfg is None else a.cfg,
               "noise": cfg.sample.noise if a.noise is None else a.noise,
               "generator": torch.Generator(a.device).manual_seed(a.seed)}
    history = None
    if a.prompt:
        seconds = (a.prompt_seconds or cfg.sample.prompt_seconds) if a.text is None else None
        wav = torch.tensor(load_audio(a.prompt, rate, cfg.vae.channels)).to(a.device)
        wav = wav[:, -round(seconds * rate):] if seconds else wav
        with torch.no_grad():
            latents = encode_prompt(lm, vae, wav[None])                              # (1, T, D) or codes
        if a.text is not None and not a.prompt_text:
            if not cfg.data.prompt_frames:
                raise BadInput(f"--prompt: {a.run} was trained without voice prompts "
                               "(data.prompt_frames = 0); "
                               "add --prompt-text to continue the clip instead")
            options["prompt"] = latents[:, :cfg.data.prompt_frames]
        else:
            history = latents

    seconds = a.seconds or cfg.sample.seconds
    frames = max(1, round(seconds * vae.cfg.frame_rate))
    keep_prompt = history is not None and a.text is None
    begin, first, state, pieces, new = time.perf_counter(), None, {}, [], 0
    # the decoder hears the history first: the new audio then joins it without a seam
    lead = vae.decode(vae.denormalize(history), state).detach() if history is not None else None
    sink = None
    if a.stream:
        try:
            sink = sf.SoundFile(a.out, "w", rate, cfg.vae.channels, "PCM_16", format="WAV")
        except (OSError, sf.LibsndfileError) as e:
            raise BadInput(f"--out {a.out}: cannot be written ({e})") from None

    # the prompt's last samples
    owed = vae.latency if history is not None and not keep_prompt else 0

    def emit(wav):                                                              # (1, ch, n)
        nonlocal owed
        wav, owed = wav[..., owed:], owed - min(owed, wav.shape[-1])
        pieces.append(wav[0].cpu())
        if sink is not None:
            sink.write(wav[0].T.cpu().numpy())
            sink.flush()

    if keep_prompt:
        emit(lead)
    with torch.no_grad():
        for text in texts:
            tokens, heard = torch.tensor([encode(text)], dtype=torch.long, device=a.device), []
            drawn = noted(lm.generate(tokens, max_frames=frames, history=history, **options), heard)
            for wav, n, _ in vae.decode_stream(drawn, state, a.parallel):
                emit(wav)
                new += n
                first = first or time.perf_counter() - begin
                if not a.stream and new % 24 < n:
                    print(f"{new * hop / rate:.1f} of at most {seconds * len(texts):.1f} s",
                          flush=True)
            voice = torch.stack(heard, 1) if history is None else history
            if cfg.data.prompt_frames and "prompt" not in options:
                options["prompt"] = voice[:, :cfg.data.prompt_frames]
            history = None
        emit(vae.flush(state))
    wav = torch.cat(pieces, -1)
    took = time.perf_counter() - begin
    if sink is not None:
        sink.close()
    else:
        save_audio(a.out, wav.numpy(), rate)
    print(f"{a.out}: {new * hop / rate:.2f} s from {stage}, {took:.2f} s of work = "
          f"{new * hop / rate / took:.1f} x real time, "
          f"first audio after {1000 * first:.0f} ms")


if __name__ == "__main__":
    cli(main)
