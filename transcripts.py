"""What a recogniser heard: word errors, diversity and plausibility of transcripts.

    wav ─► Whisper ─► "He paid Mr. Smith $2." ─► normalize ─► he paid mister smith 2 dollars
                           │                                    │
                           └─► ppx (a text model)               ├─► wer (against the text spoken)
                                                                └─► vert (against one another)

wer: word errors / words of the text. Errors are substitutions + deletions + insertions of the best
  alignment (jiwer). Both sides pass Whisper's normaliser first (Radford et al. 2022, appendix C):
  "2" and "two", "Mr." and "mister", "colour" and "color" are no errors. English has its own,
  other languages lose punctuation only; where a language is written without spaces, letters take
  the place of words (a character error rate, as there). CALM (v3) and AudioCALM report WER.
vert: √(self-BLEU · auto-BLEU) in percent (Lakhotia et al. 2021, section 4.2; CALM Table 2), over
  words, uni- and bigrams with equal weights, as fairseq's script has it: lower = more diverse.
  self-BLEU: BLEU of one transcript against all others, without length penalty. auto-BLEU: geometric
  mean over n = 1, 2 of the share of a transcript's n-grams that it also has elsewhere, where
  elsewhere is left or right of the n-gram and does not overlap it.
ppx: exp(-Σ log p(token | tokens before) / tokens) of the transcripts under a causal text model
  (CALM Table 2 takes Mistral 7B); every transcript by itself, not normalised, since the text model
  knows capitals and commas.

Packages, imported where they are used: faster-whisper, jiwer and whisper-normalizer of the extra
eval, transformers of the extra hf.
"""
import math
from collections import Counter, defaultdict

import torch

from cli import BadInput

# written without spaces (Radford et al. 2022, appendix C)
LETTERS = ("zh", "ja", "th", "lo", "my", "yue")


# ---------------------------------------------------------------------------- words


class Words:
    """Normalised words and their errors, of one language ("en", "fr", ...)."""

    def __init__(self, language="en"):
        import jiwer
        from whisper_normalizer.basic import BasicTextNormalizer
        from whisper_normalizer.english import EnglishTextNormalizer
        self.jiwer = jiwer
        if language == "en":
            self.normalizer = EnglishTextNormalizer()
        else:
            self.normalizer = BasicTextNormalizer(split_letters=language in LETTERS)

    def normalize(self, text):
        """A text -> words, separated by one space. Whisper's normaliser leaves a dot of "..."."""
        return " ".join(word for word in self.normalizer(text).split()
                        if any(map(str.isalnum, word)))

    def errors(self, text, transcript):
        """(word errors, words of the text); (0, 0) where the text has no words."""
        reference = self.normalize(text)
        if not reference:
            return 0, 0
        found = self.jiwer.process_words(reference, self.normalize(transcript))
        errors = found.substitutions + found.deletions + found.insertions
        return errors, found.hits + found.substitutions + found.deletions


class Recogniser:
    """Whisper in CTranslate2, greedy: wav (S,) at 16 kHz -> transcript."""

    def __init__(self, model="base", language="en", device="cpu"):
        """model: name or folder of a faster-whisper model."""
        from faster_whisper import WhisperModel
        name, _, index = device.partition(":")
        on_gpu = name == "cuda"
        self.model = WhisperModel(model, device=name if on_gpu else "cpu",
                                  device_index=int(index or 0),
                                  compute_type="float16" if on_gpu else "int8")
        if language not in self.model.supported_languages:
            raise BadInput(f"--language {language}: {model} knows "
                           f"{', '.join(self.model.supported_languages)}")
        self.language = language

    def transcribe(self, wav):
        segments, _ = self.model.transcribe(wav, language=self.language, beam_size=1,
                                            condition_on_previous_text=False)
        return " ".join(segment.text.strip() for segment in segments)


# ---------------------------------------------------------------------------- VERT


def ngrams(words, n):
    return [tuple(words[i:i + n]) for i in range(len(words) - n + 1)]


def auto_bleu(words):
    """Repetition inside one transcript, 0 .. 1; 0 for fewer than two words."""
    if len(words) < 2:
        return 0.0
    shares = []
    for n in (1, 2):
        grams = ngrams(words, n)
        repeated = sum(gram in ngrams(words[:i], n) or gram in ngrams(words[i + n:], n)
                       for i, gram in enumerate(grams))
        shares.append(repeated / len(grams))
    return math.sqrt(shares[0] * shares[1])


def self_bleu(transcripts):
    """For each list of words: its BLEU-2 against all others, 0 .. 1: the geometric mean of the
    modified n-gram precisions (Papineni et al. 2002), the share of its n-grams that the others
    have too, each counted at most as often as in the one that has it most often.
    """
    precisions = []                                  # per n: one per transcript
    for n in (1, 2):
        counts = [Counter(ngrams(words, n)) for words in transcripts]
        numbers = defaultdict(list)                  # n-gram -> its counts, of who has it
        for of_one in counts:
            for gram, count in of_one.items():
                numbers[gram].append(count)
        most = {gram: sorted(found)[-2:] for gram, found in numbers.items()}

        # the highest count of the others: the second, where the highest is one's own
        shares = []
        for of_one in counts:
            matched = 0
            for gram, count in of_one.items():
                lower, highest = [0, *most[gram]][-2:]
                matched += min(count, lower if count == highest else highest)
            shares.append(matched / max(1, of_one.total()))
        precisions.append(shares)
    return [math.sqrt(one * two) for one, two in zip(*precisions)]


# ---------------------------------------------------------------------------- perplexity


class TextModel:
    """A causal language model of transformers: hub name or folder."""

    def __init__(self, name, device="cpu"):
        from transformers import AutoModelForCausalLM, AutoTokenizer
        self.tokenizer = AutoTokenizer.from_pretrained(name)
        self.model = AutoModelForCausalLM.from_pretrained(name).to(device).eval()
        self.device = device

    @torch.no_grad()
    def surprise(self, text):
        """(-Σ log p in nats, number of tokens predicted). A begin token, where the model has one,
        is given; else the first token is, and is not counted.
        """
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if self.tokenizer.bos_token_id is not None:
            ids = [self.tokenizer.bos_token_id, *ids]
        if len(ids) < 2:
            return 0.0, 0
        tokens = torch.tensor([ids], device=self.device)
        logits = self.model(tokens).logits[0, :-1].double()                 # (tokens - 1, V)
        nats = torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum")
        return nats.item(), len(ids) - 1
