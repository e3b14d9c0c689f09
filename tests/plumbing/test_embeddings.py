"""Models of transformers as embeddings, taggers, speakers: small random ones saved to disk."""
import numpy as np
import pytest
import torch

from cli import BadInput
from data import Clip
from embeddings import Clap, HubModel, Tagger, embed_clip, open_embedding
from judges import Judges
from speech_metrics import XVector
from transcripts import TextModel

transformers = pytest.importorskip("transformers", reason="transformers (extra hf) is missing")

SMALL = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
WAV = 0.1 * torch.randn(1, 40000, generator=torch.Generator().manual_seed(0))


def save_tokenizer(folder):
    """Letters as tokens, as a Roberta tokenizer file."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    vocabulary = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
    for letter in "abcdefghijklmnopqrstuvwxyz":
        vocabulary[letter] = len(vocabulary)
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        unk_token="<unk>", model_max_length=20).save_pretrained(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{kind of model: folder}."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("models")
    found = {name: str(root / name) for name in ("wav2vec2", "clap", "tags", "speaker", "text")}
    raw = transformers.Wav2Vec2FeatureExtractor(sampling_rate=16000)
    convolutions = dict(conv_dim=[8, 8], conv_stride=[160, 2], conv_kernel=[320, 2],
                        num_feat_extract_layers=2, num_conv_pos_embeddings=4,
                        num_conv_pos_embedding_groups=2, **SMALL)

    config = transformers.Wav2Vec2Config(**convolutions)
    transformers.Wav2Vec2Model(config).save_pretrained(found["wav2vec2"])
    raw.save_pretrained(found["wav2vec2"])
    config = transformers.WavLMConfig(**convolutions, tdnn_dim=[16] * 2, tdnn_dilation=[1, 1],
                                      tdnn_kernel=[3, 1], xvector_output_dim=8)
    transformers.WavLMForXVector(config).save_pretrained(found["speaker"])
    raw.save_pretrained(found["speaker"])
    config = transformers.Wav2Vec2Config(**convolutions, num_labels=5)
    transformers.Wav2Vec2ForSequenceClassification(config).save_pretrained(found["tags"])
    raw.save_pretrained(found["tags"])

    # CLAP: one small HTS-AT, one small RoBERTa
    audio = dict(window_size=8, num_mel_bins=64, spec_size=256, patch_size=4, patch_stride=[4, 4],
                 depths=[1, 1], num_attention_heads=[2, 2], patch_embeds_hidden_size=16,
                 hidden_size=32, num_hidden_layers=2, enable_fusion=False)
    text = dict(vocab_size=30, max_position_embeddings=32, **SMALL)
    config = transformers.ClapConfig(text_config=text, audio_config=audio, projection_dim=12)
    transformers.ClapModel(config).eval().save_pretrained(found["clap"])
    transformers.ClapFeatureExtractor(feature_size=64, truncation="rand_trunc").save_pretrained(
        found["clap"])
    save_tokenizer(found["clap"])
    config = transformers.GPT2Config(vocab_size=30, n_embd=16, n_layer=1, n_head=2, n_positions=64)
    transformers.GPT2LMHeadModel(config).save_pretrained(found["text"])
    save_tokenizer(found["text"])
    return found


def test_a_hub_model_embeds_windows_of_ten_seconds_by_their_mean_state(folders):
    model = open_embedding(folders["wav2vec2"])
    long = torch.cat([WAV] * 5, 1)                                          # 12.5 s
    vectors = embed_clip(model, long, 16000)
    assert vectors.shape == (1, 16)
    features = model.extractor(long[0, :160000].numpy(), sampling_rate=16000, return_tensors="pt")
    with torch.no_grad():
        states = model.model(**features).last_hidden_state[0]
    assert vectors[0] == pytest.approx(states.mean(0).numpy(), abs=1e-6)
    assert embed_clip(model, WAV[:, :50], 16000).shape == (1, 16)           # 3 ms are padded


def test_claps_audio_embedding_is_that_of_its_own_forward_pass(folders):
    model = HubModel(folders["clap"])
    wav = WAV[0].numpy()
    vector = model.embed(wav)
    features = model.extractor(wav, sampling_rate=model.rate, return_tensors="pt")
    with torch.no_grad():
        out = model.model(input_ids=torch.tensor([[0, 4, 2]]), **features)
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)
    assert vector == pytest.approx(out.audio_embeds[0].numpy(), abs=1e-5)


def test_the_clap_score_is_the_cosine_of_its_forward_pass(folders):
    clap = Clap(folders["clap"])
    score = clap.score(WAV, 48000, "a bell")
    tokens = clap.tokenizer(["a bell"], return_tensors="pt")
    features = clap.audio.extractor(WAV[0].numpy(), sampling_rate=48000, return_tensors="pt")
    with torch.no_grad():
        out = clap.audio.model(**tokens, **features)
    assert score == pytest.approx(float(out.audio_embeds[0] @ out.text_embeds[0]), abs=1e-5)


def test_a_tagger_gives_the_softmax_of_its_logits(folders):
    tagger = Tagger(folders["tags"])
    probabilities = tagger.tag(WAV, 16000)
    assert probabilities.shape == (5,) and probabilities.sum() == pytest.approx(1)


def test_an_x_vector_is_a_unit_vector_also_of_a_moment(folders):
    speaker = XVector(folders["speaker"])
    assert np.linalg.norm(speaker.embed(WAV[0].numpy())) == pytest.approx(1, abs=1e-5)
    assert np.linalg.norm(speaker.embed(WAV[0, :100].numpy())) == pytest.approx(1, abs=1e-5)


def test_perplexity_is_the_models_own_loss(folders):
    model = TextModel(folders["text"])
    nats, count = model.surprise("abcab")
    ids = torch.tensor([[0, *[ord(c) - 97 + 4 for c in "abcab"]]])
    with torch.no_grad():
        loss = model.model(ids, labels=ids).loss.item()
    assert count == 5 and nats / count == pytest.approx(loss, abs=1e-4)


def test_judges_take_all_of_them(folders):
    """Originals judged as their own reconstructions: no distance, the same score twice."""
    judges = Judges(["sim", "fad", "mmd", "kld", "clap"], sim=folders["speaker"],
                    embedding=folders["wav2vec2"], fad_dims=2, tags=folders["tags"],
                    clap=folders["clap"])
    generator = torch.Generator().manual_seed(0)
    for i in range(4):
        wav = 0.1 * torch.randn(1, 16000, generator=generator) * (i + 1)
        clip = Clip(f"{i}.wav", "a bell", "sound")
        judges.compare(wav, wav, 16000, clip)
        judges.judge("generation", wav, 16000, clip, voice=wav)
    found = judges.pop()
    assert judges.refused == []
    assert found["kld reconstruction"]["sound"].value == pytest.approx(0, abs=1e-9)
    assert found["sim generation"]["sound"].value == pytest.approx(1, abs=1e-5)
    assert found["fad wav2vec2 2d reconstruction"]["sound"].value == pytest.approx(0, abs=1e-6)
    assert found["mmd wav2vec2 reconstruction"]["sound"].value == pytest.approx(0, abs=1e-6)
    assert found["clap original"] == found["clap reconstruction"]


def test_a_model_that_is_not_there_is_named_with_its_option(tmp_path, folders):
    (tmp_path / "empty").mkdir()
    missing = str(tmp_path / "empty")
    with pytest.raises(BadInput, match="--embedding .*empty: cannot be loaded"):
        Judges(["fad"], embedding=missing)
    with pytest.raises(BadInput, match="--clap .*wav2vec2: cannot be loaded .it is no CLAP model"):
        Judges(["clap"], clap=folders["wav2vec2"])
    with pytest.raises(BadInput, match="--metrics kld: needs a model; name one with --tags"):
        Judges(["kld"])
