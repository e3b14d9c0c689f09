"""Generation in fixed memory, compiled or as a CUDA graph, gives what generation in a growing cache
gives; and a batch of texts of different lengths gives what each text gives alone."""
import pytest
import torch

from audiocalm import AudioCALM, AudioCALMConfig, FlowConfig
from backbone import BackboneConfig, KVCache, StaticCache, Transformer
from calm import CALM, CALMConfig
from discrete import sample_codes
from heads import HeadConfig
from replay import Fast, Replay, until_all_ended

KINDS = ("speech", "sound", "music")
D, VOCAB, FRAMES = 5, 260, 40
OBJECTIVES = ("rectified_flow", "trigflow", "consistency", "lsd", "rq", "delay")
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def model(objective="consistency", backbone=None, device="cpu", **changes):
    torch.manual_seed(0)
    head = HeadConfig(objective=objective, width=16, blocks=2, depth_heads=2)
    sizes = {"dim": 32, "layers": 2, "heads": 4} | (backbone or {})
    cfg = CALMConfig(backbone=BackboneConfig(**sizes),
                     **({"head": head, "short_layers": 2, "short_context": 3} | changes))
    net = CALM(cfg, D, VOCAB, KINDS, codes=(3, 11))
    for p in net.parameters():                       # zero-initialised layers would hide everything
        p.data += 0.1 * torch.randn_like(p)
    net.eos.bias.data.fill_(-100.0)
    return net.eval().to(device)


def past(net, n, B=2):
    """Latents or codes (B, n, .), a voice prompt or a history."""
    torch.manual_seed(7)
    device = net.bos.device
    return (torch.randint(0, 11, (B, n, 3), device=device) if net.codes else
            torch.randn(B, n, D, device=device))


def sampled(net, text, fast=None, frames=FRAMES, **options):
    """Latents or codes of one call of generate (B, T, .), and the rows that had ended (B, T)."""
    options = {"kind": 2, "max_frames": frames,
               "generator": torch.Generator(text.device).manual_seed(3)} | options
    pairs = list(net.generate(text, fast=fast, **options))
    return torch.stack([x for x, _ in pairs], 1), torch.stack([ended for _, ended in pairs], 1)


def assert_same(net, text, fast, atol=1e-12, **options):
    expected, _ = sampled(net, text, **options)
    found, _ = sampled(net, text, fast, **options)
    assert expected.double().std() > 0.1             # the latents differ from each other
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


TEXT = torch.tensor([[1, 97, 98, 99], [1, 100, 101, 102]])


# ---------------------------------------------------------------- fixed memory

@pytest.mark.parametrize("objective", OBJECTIVES)
def test_in_fixed_memory_every_head_generates_the_same(objective):
    net = model(objective)
    assert_same(net, TEXT, Fast("static"), steps=3)


@pytest.mark.parametrize("options", [
    {"prompt": 6}, {"history": 7}, {"guidance": 1.7}, {"noise": 0.6, "history": 2},
    {"kind": 0, "prompt": 2, "guidance": 0.5, "noise": 1.0}], ids=str)
def test_with_prompts_guidance_and_noise_it_generates_the_same(options):
    net = model(short_noise=0.5)
    options = {name: past(net, n) if name in ("prompt", "history") else n
               for name, n in options.items()}
    assert_same(net, TEXT, Fast("static"), **options)


@pytest.mark.parametrize("objective", ["consistency", "rq"])
def test_beside_a_monologue_it_generates_the_same(objective):
    net = model(objective, monologue=True, monologue_tokens=2)
    text = torch.tensor([[257, *b"ab cd e"], [257, *b"fgh ij "]])
    assert_same(net, text, Fast("static"), kind=0, prompt=past(net, 3), guidance=1.5)


@pytest.mark.parametrize("backbone", [
    {"kv_heads": 2, "qk_norm": True}, {"window": 4}, {"window": 300},
    {"norm": "layer", "mlp": "gelu", "layer_scale": 0.3}], ids=str)
def test_every_kind_of_backbone_generates_the_same(backbone):
    assert_same(model(backbone=backbone), TEXT, Fast("static"), prompt=past(model(), 6))


def test_a_call_after_another_finds_nothing_of_it():
    """The second call uses the memory of the first: shorter prefix, other text, other history."""
    net, fast = model(), Fast("static")
    sampled(net, TEXT, fast, prompt=past(net, 9), history=past(net, 5))
    step, = fast.idle.values()
    assert_same(net, TEXT[:, :2], fast)
    assert list(fast.idle.values()) == [step]


def test_two_generators_at_once_do_not_share_their_memory():
    net, fast = model(), Fast("static")
    options = {"kind": 2, "max_frames": 6}
    runs = [net.generate(TEXT[:, i:i + 2], fast=fast, **options,
                         generator=torch.Generator().manual_seed(3)) for i in (0, 1)]
    pairs = list(zip(*runs))
    for i in (0, 1):
        expected, _ = sampled(net, TEXT[:, i:i + 2], frames=6)
        torch.testing.assert_close(torch.stack([pair[i][0] for pair in pairs], 1), expected)


def test_a_ring_holds_exactly_the_window():
    """Step by step against one pass over all positions; the ring turns over ten times."""
    torch.manual_seed(0)
    net = Transformer(BackboneConfig(dim=32, layers=2, heads=2, window=4))
    x = torch.randn(1, 47, 32)
    with torch.no_grad():
        cache = KVCache()
        net(x[:, :7], cache)
        ring = StaticCache.beside(cache, 4)
        ring.load(cache)
        y = torch.cat([net(x[:, i:i + 1], ring) for i in range(7, 47)], 1)
        torch.testing.assert_close(y, net(x)[:, 7:], atol=1e-12, rtol=0)


def test_pinned_positions_stay_while_the_ring_turns():
    """AudioCALM's cache: the prefix and a window of whole blocks."""
    torch.manual_seed(0)
    net = Transformer(BackboneConfig(dim=32, layers=2, heads=2, causal=False))
    x = torch.randn(1, 45, 32)
    with torch.no_grad():
        growing = KVCache()
        net(x[:, :5], growing)
        fixed = StaticCache.beside(growing, 5 + 8 + 4, pinned=5)
        fixed.load(growing)
        for block in x[:, 5:].split(4, 1):
            torch.testing.assert_close(net(block, fixed.copy()), net(block, growing.copy()),
                                       atol=1e-12, rtol=0)
            torch.testing.assert_close(net(block, fixed), net(block, growing), atol=1e-12, rtol=0)
            growing.trim(5, 8)


# ---------------------------------------------------------------- random numbers

def test_the_race_draws_what_multinomial_draws():
    logits = torch.randn(50, 4, 30)
    codes = sample_codes(logits, 0.8, 0, torch.Generator().manual_seed(1))
    p = (logits / 0.8).softmax(-1).flatten(0, 1)
    drawn = torch.multinomial(p, 1, generator=torch.Generator().manual_seed(1))
    assert torch.equal(codes, drawn.view(50, 4))


def test_a_step_takes_the_numbers_that_the_generator_would_have_given_it():
    draw = model("rq").head.sample
    z = torch.randn(2, 32)
    step = Replay(lambda z, tape: (draw(z, generator=tape),), "static")
    one, other = (torch.Generator().manual_seed(5) for _ in range(2))
    for _ in range(4):
        assert torch.equal(step(z, generator=one)[0], draw(z, generator=other))
    assert torch.equal(one.get_state(), other.get_state())


# ---------------------------------------------------------------- the end of clips

def ending(net, when):
    """Row r ends with the frame when[r]: its EOS logit is positive from there on."""
    read = iter(range(1, 1000))
    when = torch.tensor(when)
    net.eos.forward = lambda z: torch.where(when <= next(read), 1.0, -1.0)[:, None]
    return net


@pytest.mark.parametrize("objective", ["consistency", "delay"])
@pytest.mark.parametrize("when", [[3, 17], [1, 1], [15, 15]])
def test_looked_at_rarely_clips_end_at_the_same_frame(objective, when):
    expected, ended = sampled(ending(model(objective), when), TEXT)
    assert expected.shape[1] == max(when)
    net = ending(model(objective), when)
    frames = net.frames

    def never_looks(*arguments, look):
        return frames(*arguments, look=False)        # as on CUDA
    net.frames = never_looks
    found, found_ended = sampled(net, TEXT, Fast("static"))
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    assert torch.equal(found_ended, ended)


def test_the_host_looks_after_1_2_4_and_then_every_8_frames():
    made = []

    def frames():
        for i in range(100):
            made.append(i)
            yield i, torch.tensor([i >= 20, i >= 16])
    taken = []
    for i, _ in until_all_ended(frames()):
        taken.append((i, len(made)))
    assert taken == [(i, 1) for i in range(1)] + [(i, 3) for i in (1, 2)] + [
        (i, 7) for i in range(3, 7)] + [(i, 15) for i in range(7, 15)] + [
        (i, 23) for i in range(15, 20)]


# ---------------------------------------------------------------- texts of different lengths

LENGTHS = {"text_len": torch.tensor([4, 1, 3]), "prompt_len": torch.tensor([0, 6, 2])}


@pytest.mark.parametrize("changes, fast", [
    ({"prompt_bos": True}, None), ({"backbone": {"window": 5}}, None), ({"objective": "rq"}, None),
    ({"prompt_bos": True}, "static"), ({"backbone": {"window": 5}}, "static")], ids=str)
def test_a_batch_of_texts_generates_what_each_generates_alone(changes, fast):
    """Temperature 0, since rows draw from one generator; texts and voice prompts are padded."""
    net = model(**changes)
    text, prompt = torch.randint(0, 256, (3, 4)), past(net, 6, B=3)
    history = past(net, 2, B=3)
    options = dict(temperature=0.0, guidance=1.5, kind=2, frames=12)
    fast = fast and Fast(fast)
    together, _ = sampled(net, text, fast, prompt=prompt, history=history, **LENGTHS, **options)
    for r in range(3):
        L, P = (LENGTHS[name][r] for name in ("text_len", "prompt_len"))
        alone, _ = sampled(net, text[r:r + 1, :L], prompt=prompt[r:r + 1, :P],
                           history=history[r:r + 1], **options)
        torch.testing.assert_close(together[r:r + 1], alone, atol=1e-12, rtol=0)
    assert (together[0] - together[1]).double().abs().max() > 0.1


def test_padded_texts_of_a_monologue_are_spoken_as_alone():
    net = model(monologue=True)
    net.word.bias.data[256] -= 50.0                  # the next word always begins at once
    text = torch.tensor([[257, *b"ab cd"], [257, *b"f", 0, 0, 0, 0]])
    options = dict(temperature=0.0, kind=0, frames=12)
    together, _ = sampled(net, text, text_len=torch.tensor([6, 2]), **options)
    for row, length in ((0, 6), (1, 2)):
        alone, _ = sampled(net, text[row:row + 1, :length], **options)
        torch.testing.assert_close(together[row:row + 1], alone, atol=1e-12, rtol=0)


# ---------------------------------------------------------------- compiled

def compiled_graphs(monkeypatch):
    """torch.compile with the eager backend, which counts the graphs that it is given."""
    torch._dynamo.reset()
    graphs = []
    compile = torch.compile

    def backend(module, inputs):
        graphs.append(module)
        return module.forward
    monkeypatch.setattr(torch, "compile",
                        lambda f, **options: compile(f, backend=backend, **options))
    return graphs


def test_the_step_is_two_graphs_for_all_positions(monkeypatch):
    """No break (fullgraph), and none compiled again while positions advance or in a second call."""
    graphs = compiled_graphs(monkeypatch)
    net = model("trigflow", backbone={"layers": 1}, short_layers=1, short_noise=0.5)
    fast = Fast("compile")
    assert_same(net, TEXT, fast, prompt=past(net, 4), steps=1, noise=0.5)
    assert_same(net, TEXT[:, :3], fast, frames=5, steps=1, noise=0.5)
    assert len(graphs) == 2


def test_the_rq_transformer_and_a_padded_batch_compile_too(monkeypatch):
    graphs = compiled_graphs(monkeypatch)
    head = HeadConfig(objective="rq", width=16, blocks=1, depth_heads=2)
    net = model(head=head, backbone={"layers": 1}, short_layers=0)
    assert_same(net, TEXT, Fast("compile"), frames=5, text_len=torch.tensor([4, 2]))
    assert len(graphs) == 2


@cuda
@pytest.mark.parametrize("how", ["graph", "compile"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_on_a_gpu_recorded_latents_are_the_same(objective, how):
    net = model(objective, device="cuda", short_noise=0.5)
    fast, text = Fast(how), TEXT.cuda()
    options = dict(steps=2, guidance=1.5, noise=0.5)
    assert_same(net, text, fast, prompt=past(net, 4), **options)
    assert_same(net, text[:, :3], fast, text_len=torch.tensor([3, 2], device="cuda"), **options)
    assert_same(net, text[:, :2], fast, history=past(net, 3), **options)


@cuda
def test_on_a_gpu_recorded_steps_outlive_the_autocast_they_were_recorded_under():
    """Fault: autocast frees its cast weights with its context; recordings went on reading them."""
    torch.set_default_dtype(torch.float32)
    net, text, fast = model(device="cuda"), TEXT.cuda(), Fast("graph")
    for _ in range(2):
        with torch.autocast("cuda", torch.bfloat16):
            expected, _ = sampled(net, text, Fast("static"))
            found, _ = sampled(net, text, fast)
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
        freed = [torch.full((64, 64), torch.nan, device="cuda") for _ in range(100)]
        del freed                                    # NaN where freed weights may have been


@cuda
@pytest.mark.parametrize("how", ["graph", "compile"])
@pytest.mark.parametrize("objective", ["rectified_flow", "trigflow", "lsd"])
def test_on_a_gpu_recorded_blocks_are_the_same(objective, how):
    """AudioCALM's times and noise are fp32, where a compiler may round otherwise."""
    net, fast = block_model(objective, device="cuda", window=6), Fast(how)
    for prompt in (None, past(net, 4)):
        assert_same(net, TEXT.cuda(), fast, 1e-4 if how == "compile" else 1e-12, kind=0,
                    guidance=1.5, noise=0.5, steps=2, prompt=prompt)


# ---------------------------------------------------------------- AudioCALM

def block_model(objective="rectified_flow", device="cpu", layers=2, **changes):
    torch.manual_seed(0)
    cfg = AudioCALMConfig(backbone=BackboneConfig(dim=32, layers=layers, heads=2), expert_dim=16,
                          block=3, head=FlowConfig(objective=objective, width=16), **changes)
    net = AudioCALM(cfg, D, VOCAB, KINDS)
    for p in net.parameters():
        p.data += 0.1 * torch.randn_like(p)
    net.stop.bias.data.fill_(-100.0)
    net.codes = None
    net.bos = net.head.net.null                      # where past() looks for the device
    return net.eval().to(device)


@pytest.mark.parametrize("objective", ["rectified_flow", "lsd"])
@pytest.mark.parametrize("options", [
    {"guidance": 1.7}, {"prompt": 4, "history": 7, "noise": 0.8, "kind": 0}], ids=str)
@pytest.mark.parametrize("window", [0, 6])
def test_in_fixed_memory_blocks_are_the_same(objective, options, window):
    net = block_model(objective, window=window)
    options = {name: past(net, n) if name in ("prompt", "history") else n
               for name, n in options.items()}
    assert_same(net, TEXT, Fast("static"), steps=2, **options)


def test_blocks_compile_into_one_graph(monkeypatch):
    graphs = compiled_graphs(monkeypatch)
    net, fast = block_model(layers=1), Fast("compile")
    assert_same(net, TEXT, fast, frames=12, steps=1, noise=0.5)
    assert_same(net, TEXT[:, :3], fast, frames=12, steps=1, noise=0.5)
    assert len(graphs) == 1
