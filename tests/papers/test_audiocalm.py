"""One mask for training and generation: nothing leaks, nothing differs, every clip has its length.
"""
import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from cli import BadInput
import backbone
from audiocalm import ARFlow, AudioCALM, AudioCALMConfig, FlowConfig, ar_flow_mask
from report import draw_mask
from backbone import BackboneConfig, Transformer
from vae import VAE, VAEConfig
from generate import render
from schema import build

KINDS = ("speech", "sound", "music")
D, VOCAB = 3, 20


def model(block=2, multiplier=1, objective="rectified_flow", only=None, layers=2, **changes):
    torch.manual_seed(0)
    cfg = AudioCALMConfig(
        backbone=BackboneConfig(dim=32, layers=layers, heads=2), block=block, expert_dim=16,
        head=FlowConfig(objective=objective, width=16, multiplier=multiplier), **changes)
    net = AudioCALM(cfg, D, VOCAB, KINDS, only)
    for p in net.parameters():                       # zero-initialised layers would hide everything
        p.data += 0.1 * torch.randn_like(p)
    return net.double().eval()


def batch(T=8):
    """Rows: full, ended inside a block, not ended, ended on a block's edge; kinds unsorted."""
    torch.manual_seed(1)
    return {"x": torch.randn(4, T, D).double(), "frames": torch.tensor([T, 5, T - 1, 4]),
            "ended": torch.tensor([True, True, False, True]),
            "text": torch.randint(0, VOCAB, (4, 5)), "text_len": torch.tensor([5, 2, 1, 3]),
            "prompt": torch.randn(4, 3, D).double(), "prompt_len": torch.tensor([0, 3, 1, 2]),
            "kind": torch.tensor([0, 0, 1, 2])}


def context(net, b, keep=(True,) * 4):
    return net.context(b["x"], b["text"], b["text_len"], b["prompt"], b["prompt_len"],
                       torch.tensor(keep), torch.bincount(b["kind"], minlength=3).tolist())


def row(b, r):
    """Row r alone, without padding."""
    return {"x": b["x"][r:r + 1], "text": b["text"][r:r + 1, :b["text_len"][r]],
            "text_len": b["text_len"][r:r + 1],
            "prompt": b["prompt"][r:r + 1, :b["prompt_len"][r]],
            "prompt_len": b["prompt_len"][r:r + 1], "kind": b["kind"][r:r + 1]}


# ---------------------------------------------------------------- one mask

@pytest.mark.parametrize("block", [1, 2, 4, 8])
@pytest.mark.parametrize("window", [0, 8])
def test_the_training_pass_equals_cached_generation_block_by_block(block, window):
    """Velocities of noisy blocks and stop logits of clean ones, with text, prompt and padding."""
    net, b = model(block, window=window), batch(T=24)
    n = 24 // block
    x_t, t = torch.randn(4, n, block * D).double(), torch.rand(4, n).double()
    z = context(net, b)
    F = net.head.net(x_t, t, z)                                             # (4, n, block · D)
    stop = net.stop(z.hidden[:, 5 + 3:])[..., 0]                            # (4, 24)
    read = net.stop.forward
    for r in range(4):
        alone, velocities, logits = row(b, r), [], []

        def sample(z, **options):
            j = len(velocities)
            velocities.append(net.head.net(x_t[r:r + 1, j:j + 1], t[r:r + 1, j:j + 1], z))
            return alone["x"].view(1, n, -1)[:, j:j + 1]

        net.head.sample = sample
        net.stop.forward = lambda h: logits.append(read(h)) or torch.full_like(logits[-1], -1.0)
        list(net.generate(alone["text"], kind=int(alone["kind"]), max_frames=24,
                          prompt=alone["prompt"]))
        torch.testing.assert_close(torch.cat(velocities, 1)[0], F[r], atol=1e-10, rtol=0)
        torch.testing.assert_close(torch.cat(logits, 1)[0, :, 0], stop[r], atol=1e-10, rtol=0)


def test_several_noise_samples_in_one_pass_equal_passes_of_one():
    net, b = model(4, 3), batch()
    x_t, t = torch.randn(3, 4, 2, 4 * D).double(), torch.rand(3, 4, 2).double()
    F = net.head.net(x_t, t, context(net, b))
    net.cfg.head.multiplier = 1
    for m in range(3):
        torch.testing.assert_close(net.head.net(x_t[m], t[m], context(net, b)), F[m],
                                   atol=1e-10, rtol=0)


def context_of(net, alone):
    return net.context(alone["x"], alone["text"], alone["text_len"], alone["prompt"],
                       alone["prompt_len"], torch.tensor([True]),
                       torch.bincount(alone["kind"], minlength=3).tolist())


def test_every_position_sees_what_is_clean_and_earlier_and_its_own_block_and_nothing_else():
    """The gradient of every output position with respect to every input position."""
    for block, window in ((1, 0), (2, 0), (2, 2), (3, 0)):
        net = model(block, 2, window=window, layers=1)       # one layer: seen = seen directly
        L, P, T = 3, 2, 6
        x, prompt, x_t = (torch.randn(*s).double().requires_grad_() for s in
                          ((1, T, D), (1, P, D), (2, 1, T // block, block * D)))
        embedded = []
        net.head.net.text.register_forward_hook(
            lambda m, i, y: embedded.append(y.retain_grad() or y))
        z = net.context(x, torch.tensor([[1, 2, 3]]), torch.tensor([L]), prompt, torch.tensor([P]),
                        torch.tensor([True]), [0, 1, 0])
        F = net.head.net(x_t, torch.rand(2, 1, T // block).double(), z)
        outputs = ([z.hidden[0, i] for i in range(L + P + T)]
                   + [F.view(2, T, D)[m, i] for m in range(2) for i in range(T)])
        for q, y in enumerate(outputs):
            weights = torch.randn(len(y)).double()           # a norm's outputs sum to nothing
            grads = torch.autograd.grad((y * weights).sum(), (embedded[0], prompt, x, x_t),
                                        retain_graph=True, allow_unused=True)
            seen = torch.cat([torch.zeros(n) if g is None else g.reshape(n, -1).abs().sum(1)
                              for g, n in zip(grads, (L, P, T, 2 * T))]) > 1e-12
            for k in range(L + P + 3 * T):
                part = lambda i: (("prefix", i) if i < L + P else
                                  (("clean", "noisy 1", "noisy 2")[(i - L - P) // T],
                                   (i - L - P) % T // block))
                (at, i), (of, j) = part(q), part(k)
                if of == "prefix":
                    expected = at != "prefix" or j <= i
                elif of == "clean" and at != "prefix":
                    near = not window or i - j <= window // block
                    expected = j < i and near or at == of and i == j
                else:
                    expected = at == of and i == j
                assert bool(seen[k]) == expected, (block, window, at, i, of, j)


def test_two_layers_do_not_carry_the_future_or_another_noisy_block_around_a_corner():
    net = model(2, 2)
    x, x_t = (torch.randn(*s).double().requires_grad_() for s in ((1, 8, D), (2, 1, 4, 2 * D)))
    empty = torch.zeros(1, 0, D).double()
    z = net.context(x, torch.tensor([[1]]), torch.tensor([1]), empty, torch.tensor([0]),
                    torch.tensor([True]), [1, 0, 0])
    F = net.head.net(x_t, torch.rand(2, 1, 4).double(), z)
    for m in range(2):
        for j in range(4):
            of_x, of_t = torch.autograd.grad(F[m, 0, j].sum(), (x, x_t), retain_graph=True)
            assert (of_x[0].abs().sum(1) > 0).tolist() == [i < 2 * j for i in range(8)]
            seen = (of_t[:, 0].abs().sum(2) > 0).nonzero().tolist()
            assert seen == [[m, j]]


def test_blocks_of_one_are_a_causal_model_frame_by_frame():
    net, b = model(block=1), batch()
    z = context(net, b)
    net.head.net(torch.randn(4, 8, D).double(), torch.rand(4, 8).double(), z)
    plain = Transformer(BackboneConfig(dim=32, layers=2, heads=2)).double()
    plain.load_state_dict(net.backbone.state_dict())
    r = 0                                            # five tokens of text, no prompt, no padding
    clean = torch.cat([z.clean[r, :5], z.clean[r, 8:]])
    y = plain(clean[None], experts=net.experts.per_layer([1, 0, 0]))[0]
    torch.testing.assert_close(torch.cat([z.hidden[r, :5], z.hidden[r, 8:]]), y, atol=1e-10, rtol=0)


@torch.no_grad()                                     # flex_attention has no backward on CPU
@pytest.mark.parametrize("window", [0, 4])
def test_flex_attention_gives_the_pass_that_the_dense_mask_gives(window):
    net, b = model(2, 2, window=window), batch()
    x_t, t = torch.randn(2, 4, 4, 2 * D).double(), torch.rand(2, 4, 4).double()
    z = context(net, b)
    dense = net.head.net(x_t, t, z)
    S = z.positions.shape[1]
    order = torch.cat([torch.arange(-8, 0)] + [torch.arange(8) // 2] * 3)
    copy = torch.cat([torch.zeros(16, dtype=torch.long), torch.full((8,), 1), torch.full((8,), 2)])
    valid = torch.cat([torch.arange(5) < b["text_len"][:, None],
                       torch.arange(3) < b["prompt_len"][:, None],
                       torch.ones(4, 24, dtype=torch.bool)], 1)
    mask = create_block_mask(ar_flow_mask(order, copy, valid, window // 2), 4, None, S, S,
                             device="cpu")
    z.masks = {S: mask}
    torch.testing.assert_close(net.head.net(x_t, t, z), dense, atol=1e-10, rtol=0)


def test_padding_of_text_and_prompt_changes_nothing():
    net, b = model(), batch()
    x_t, t = torch.randn(4, 4, 2 * D).double(), torch.rand(4, 4).double()
    whole = net.head.net(x_t, t, context(net, b))
    for r in range(4):
        alone = net.head.net(x_t[r:r + 1], t[r:r + 1], context_of(net, row(b, r)))
        torch.testing.assert_close(alone[0], whole[r], atol=1e-10, rtol=0)


# ---------------------------------------------------------------- training

def test_frames_behind_the_end_of_a_clip_do_not_reach_the_loss():
    net, b = model(), batch()
    torch.manual_seed(5)
    first = net.loss(b)[0]
    b["x"] = torch.where(torch.arange(8)[:, None] < b["frames"][:, None, None], b["x"],
                         100 * torch.randn(4, 8, D).double())
    torch.manual_seed(5)
    torch.testing.assert_close(net.loss(b)[0], first, atol=0, rtol=0)


def test_the_flow_learns_whole_blocks_with_zeros_behind_the_end():
    net, b, seen = model(block=4, text_dropout=0.0), batch(), []
    flow = net.head.loss
    net.head.loss = lambda z, x, weight, draws: seen.append(x) or flow(z, x)
    net.loss(b)
    x = seen[0].view(4, 8, D)                        # rows are sorted by kind already
    torch.testing.assert_close(x[0], b["x"][0])
    torch.testing.assert_close(x[1, :5], b["x"][1, :5])
    assert not x[1, 5:].any() and not x[3, 4:].any()


def test_stop_targets_are_on_from_the_last_frame_to_the_end_of_its_block():
    net, b = model(block=4, text_dropout=0.0, stop_weight=1.0), batch()
    flow, logits = net.head.loss, torch.zeros(4, 8, 1, requires_grad=True)
    net.head.loss = lambda z, x, weight, draws: (flow(z, x)[0].detach() * 0, {})
    net.stop.forward = lambda h: logits
    net.loss(b)[0].backward()
    # frames 8, ended | 5, ended | 7, goes on: one whole block valid | 4, ended: on a block's edge
    over = [[0] * 7 + [1], [0] * 4 + [1] * 4, [0] * 4 + [None] * 4, [0, 0, 0, 1] + [None] * 4]
    expected = torch.tensor([[0.0 if v is None else 0.5 - v for v in line] for line in over])
    torch.testing.assert_close(logits.grad[..., 0], expected / (expected != 0).sum())


def test_noise_on_the_clean_half_and_on_the_prompt_are_separate_settings():
    b = batch()
    got = lambda **noise: [v.detach() for v in inputs(model(text_dropout=0.0, **noise), b)]
    x, prompt = got(history_noise=0.0, prompt_noise=0.0)
    torch.testing.assert_close(x[0], b["x"][0])      # exact: nothing is added
    torch.testing.assert_close(prompt, b["prompt"])
    x, prompt = got(history_noise=0.5, prompt_noise=0.0)
    assert (x - b["x"])[0].abs().mean() > 0.05
    torch.testing.assert_close(prompt, b["prompt"])
    x, prompt = got(history_noise=0.0, prompt_noise=0.5)
    torch.testing.assert_close(x[0], b["x"][0])
    assert (prompt - b["prompt"]).abs().mean() > 0.05


def inputs(net, b):
    """What reaches the linear layers of the clean half and of the prompt."""
    seen = {}
    for name in ("latent", "prompt"):
        getattr(net.head.net, name).register_forward_hook(
            lambda m, i, y, name=name: seen.update({name: i[0]}))
    net.loss(b)
    return seen["latent"], seen["prompt"]


def test_a_block_of_history_shares_one_share_of_noise():
    """x̃ = (1-s) x + s ε: with x = 0 the std of a block is s, uniform up to history_noise."""
    net = model(block=50, history_noise=0.4)
    b = {k: v.repeat(64, *[1] * (v.dim() - 1)) for k, v in batch(T=100).items()}
    b["x"], b["frames"] = torch.zeros(256, 100, D).double(), torch.full((256,), 100)
    with torch.no_grad():
        s = inputs(net, b)[0].view(256, 2, 50 * D).std(-1)
    assert s.max() < 0.46 and s.mean().item() == pytest.approx(0.2, abs=0.02)
    assert s.std().item() == pytest.approx(0.4 / 12 ** 0.5, abs=0.02)


def test_dropped_rows_do_not_see_text_and_prompt_and_are_as_long():
    net, b = model(), batch()
    x_t, t = torch.randn(4, 4, 2 * D).double(), torch.rand(4, 4).double()
    null = net.head.net(x_t, t, context(net, b, (False,) * 4))
    other = {**b, "text": (b["text"] + 1) % VOCAB, "prompt": b["prompt"] + 1}
    torch.testing.assert_close(net.head.net(x_t, t, context(net, other, (False,) * 4)), null)
    assert (net.head.net(x_t, t, context(net, b)) - null).abs().amax((1, 2)).min() > 1e-3


@pytest.mark.parametrize("objective", ["rectified_flow", "trigflow", "lsd"])
@pytest.mark.parametrize("experts", ["speech", "all"])
def test_every_part_learns_from_every_objective(objective, experts):
    net = model(2, 2, objective, experts=experts, text_dropout=0.5).train()
    torch.manual_seed(3)
    net.loss(batch())[0].backward()
    silent = [name for name, p in net.named_parameters()
              if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []


def test_an_lsd_model_starts_as_the_flow_it_goes_on_from():
    """Jumps of length 0, from all of a flow's weights; the slope by s agrees with differences."""
    flow, lsd, b = model(2), model(2, objective="lsd"), batch()
    flow_weights = flow.head.state_dict()
    lsd.head.load_flow(flow_weights)
    lsd.experts.load_state_dict(flow.experts.state_dict())
    x_t, t = torch.randn(4, 4, 2 * D).double(), torch.rand(4, 4).double()
    torch.testing.assert_close(lsd.head.net(x_t, t, context(lsd, b), t),
                               flow.head.net(x_t, t, context(flow, b)), atol=1e-10, rtol=0)
    s, z = 0.5 * t, context(lsd, b)
    F = lambda s: lsd.head.net(x_t, t, z, s)
    velocity, slope = lsd.head.net.jvp_s(x_t, t, z, s)
    assert torch.equal(velocity, F(s))
    torch.testing.assert_close(slope, (F(s + 1e-6) - F(s - 1e-6)) / 2e-6, atol=1e-8, rtol=0)


def test_a_model_learns_what_its_text_says_and_how_long_it_is():
    """Text k = latents of value ±1 by k and 3 + k frames: with blocks of 4."""
    torch.manual_seed(0)
    net = AudioCALM(AudioCALMConfig(backbone=BackboneConfig(dim=32, layers=2, heads=2),
                                    head=FlowConfig(width=32, multiplier=2), expert_dim=16,
                                    stop_weight=0.5), 2, 4, KINDS)
    optimizer = torch.optim.AdamW(net.parameters(), lr=5e-3)
    length, value = torch.tensor([3, 4, 5, 6]), torch.tensor([1.0, -1.0, 1.0, -1.0])
    for step in range(250):
        k = torch.randint(0, 4, (16,))
        x = value[k].view(16, 1, 1) + 0.1 * torch.randn(16, 6, 2)
        loss, _ = net.loss({"x": x, "frames": length[k], "ended": torch.ones(16, dtype=torch.bool),
                            "text": k[:, None], "text_len": torch.ones_like(k),
                            "prompt": torch.zeros(16, 0, 2), "prompt_len": torch.zeros_like(k),
                            "kind": k % 3})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    net.eval()
    for k in range(4):
        xs = list(net.generate(torch.tensor([[k]]).expand(8, 1), kind=k % 3, max_frames=10,
                               steps=8, generator=torch.Generator().manual_seed(k)))
        lengths = sum((~ended).long() for _, ended in xs)
        assert ((lengths - length[k]).abs() <= 1).float().mean() >= 0.75
        sampled = torch.stack([x for x, _ in xs[:3]], 1)
        assert (sampled.sign() == value[k]).float().mean() > 0.95


# ---------------------------------------------------------------- generation

def run(net, seed=0, text=None, **options):
    text = torch.tensor([[1, 2, 3]]) if text is None else text
    options = {"kind": 0, "max_frames": 5, "steps": 2} | options
    return torch.stack([x for x, _ in net.generate(
        text, generator=torch.Generator().manual_seed(seed), **options)], 1)


def endless(net):
    net.stop.bias.data.fill_(-1e3)
    return net


def test_the_same_seed_gives_the_same_latents_and_another_seed_others():
    net = endless(model())
    assert torch.equal(run(net, 3), run(net, 3)) and not torch.equal(run(net, 3), run(net, 4))


def test_guidance_of_one_is_the_plain_model_and_other_values_extrapolate():
    net = endless(model())
    one, near = run(net), run(net, guidance=1 + 1e-9)
    torch.testing.assert_close(one, near, atol=1e-6, rtol=0)
    first = lambda a: run(net, guidance=a, steps=1, max_frames=2)           # x = ε - F: linear in a
    torch.testing.assert_close(first(3.0), first(0.0) + 3 * (first(1.0) - first(0.0)))
    assert (first(1.0) - first(0.0)).abs().max() > 1e-3


def test_guidance_of_zero_ignores_text_and_prompt():
    net = endless(model())
    torch.testing.assert_close(run(net, guidance=0.0), run(net, guidance=0.0,
                                                           text=torch.tensor([[7, 8, 9]])))
    assert not torch.allclose(run(net), run(net, text=torch.tensor([[7, 8, 9]])))


def test_history_continues_as_if_it_had_been_generated():
    net = endless(model())
    sample, queue = net.head.sample, []
    net.head.sample = lambda z, **o: sample(z, **(o | {"generator": queue.pop(0)}))
    fresh = lambda first: [torch.Generator().manual_seed(j) for j in range(first, 6)]
    queue = fresh(0)
    whole = run(net, max_frames=8)
    queue = fresh(2)
    rest = run(net, max_frames=4, history=whole[:, :4])
    torch.testing.assert_close(rest, whole[:, 4:], atol=1e-10, rtol=0)
    queue = fresh(2)                                 # one latent too many: the oldest is left out
    odd = run(net, max_frames=4, history=torch.cat([whole[:, :1], whole[:, :4]], 1))
    torch.testing.assert_close(odd, rest)


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_blocks_are_read_with_the_given_share_of_the_training_noise(noise):
    net, read = endless(model(block=4)), []
    net.cfg.history_noise = 0.5
    layer = net.head.net.latent
    layer.forward = lambda x, f=layer.forward: read.append(x) or f(x)
    history = torch.randn(200, 8, D).double()
    next(net.generate(torch.zeros(200, 1, dtype=torch.long), kind=0, max_frames=4, history=history,
                      noise=noise, steps=1, generator=torch.Generator().manual_seed(0)))
    first = read[0]                                                         # (200, 4, D)
    share = (first * history[:, :4]).sum() / history[:, :4].square().sum()  # E (1 - s)
    assert share.item() == pytest.approx(0.75 if noise else 1.0, abs=0.03 * noise + 1e-12)


def test_rows_end_at_the_first_positive_stop_logit_also_inside_a_block():
    net, vae = model(block=4), VAE(VAEConfig(
        encoder="conv", decoder="conv", block="seanet",
        sample_rate=800, ratios=[4, 2], width=4, dim=16, heads=1, encoder_layers=0,
        decoder_layers=0, latent_dim=D)).double().eval()
    ends = iter([[[-1, -1, 1, 1], [-1, -1, -1, -1], [-1, -1, -1, -1]],
                 [[-1, -1, -1, -1], [1, -1, -1, 1], [-1, -1, -1, 1]]])
    net.stop.forward = lambda h: torch.tensor(next(ends)).double()[..., None]
    wavs = render(net, vae, torch.zeros(3, 1, dtype=torch.long), kind=0, seconds=1.0)
    assert [w.shape[-1] // 8 for w in wavs] == [3, 5, 8]


def test_no_more_frames_come_than_asked_for():
    assert run(endless(model(block=4)), max_frames=6).shape == (1, 6, D)


def test_a_window_keeps_memory_constant_for_any_length():
    net, sizes = endless(model(block=2, window=4)), []
    forward = net.backbone.forward

    def watch(x, cache=None, **options):
        y = forward(x, cache, **options)
        sizes.append(cache.kv[0][0].shape[2])
        return y
    net.backbone.forward = watch
    run(net, max_frames=40)
    assert max(sizes) == 3 + 4 + 2                   # text, window, the block itself


def test_sound_and_music_are_bitwise_the_same_without_the_speech_expert_loaded():
    net = endless(model())
    for kind in (1, 2):
        small = AudioCALM(net.cfg, D, VOCAB, KINDS, only=KINDS[kind]).double().eval()
        assert not list(small.experts.parameters())
        small.load_state_dict(small.wanted(net.state_dict()))               # strict
        assert torch.equal(run(small, kind=kind), run(net, kind=kind))
    speech = AudioCALM(net.cfg, D, VOCAB, KINDS, only="speech").double().eval()
    speech.load_state_dict(speech.wanted(net.state_dict()))
    assert torch.equal(run(speech), run(net)) and not torch.equal(run(small), run(net))


# ---------------------------------------------------------------- sizes

def test_qwen3_sizes_give_qwen3s_parameter_count():
    """Qwen3-1.7B: 1.72B with its tied 151936-token embedding, 1.409B without."""
    cfg = AudioCALMConfig(backbone=BackboneConfig(dim=2048, layers=28, heads=16, kv_heads=8,
                                                  mlp_dim=6144, qk_norm=True, rope_base=1e6))
    with torch.device("meta"):
        net = ARFlow(cfg, 64, 260)
    backbone = sum(p.numel() for p in net.backbone.parameters())
    assert backbone == 1_409_410_048 and backbone + 151936 * 2048 == 1_720_574_976


@pytest.mark.parametrize("changes, word", [
    (dict(block=0), "block"), (dict(experts="two"), "experts"), (dict(window=3), "window"),
    (dict(history_noise=1.5), "history_noise"),
    (dict(backbone=dict(window=8)), "backbone.window"),
    (dict(head=dict(objective="consistency")), "objective")], ids=str)
def test_impossible_values_are_refused_by_name(changes, word):
    with pytest.raises(BadInput, match=word):
        build(AudioCALMConfig, changes, "audiocalm")


def test_the_mask_can_be_drawn(tmp_path):
    draw_mask(tmp_path / "mask.png")
    assert (tmp_path / "mask.png").stat().st_size > 1000


def test_bf16_autocast_gives_the_loss_of_fp32_to_its_precision():
    net, b, found = model(2, 2).float(), batch(), []
    b = {k: v.float() if v.is_floating_point() else v for k, v in b.items()}
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found.append(net.loss(b)[0])
    assert found[1].dtype == torch.float32 and not torch.equal(*found)
    torch.testing.assert_close(found[1], found[0], atol=0.02, rtol=0.02)


def test_attention_never_runs_inside_the_jvp_of_lsd():
    """flex_attention, as on CUDA, fails inside torch.func.jvp; once the whole net was in it."""
    net, levels = model(2, objective="lsd").train(), []
    forward = net.backbone.forward

    def watched(*args, **options):
        levels.append(torch._C._functorch.peek_interpreter_stack())
        return forward(*args, **options)
    net.backbone.forward = watched
    net.loss(batch())[0].backward()
    assert len(levels) == 3 and levels == [None] * 3          # diagonal, jump, target


@pytest.mark.parametrize("objective", ["rectified_flow", "lsd"])
def test_no_figure_of_training_depends_on_blocks_that_do_not_count(objective):
    """Fault: the objective's own figures averaged over padding and were thrown away."""
    net = model(objective=objective, multiplier=2).train()
    b = batch()
    figures = []
    for value in (0.0, 50.0):
        b["x"][2, 6] = value                             # the unfinished block of a clip that goes on
        torch.manual_seed(2)
        loss, metrics = net.loss(b)
        figures.append({"loss": loss, **metrics})
    assert "loss_mid" in figures[0]
    for key in figures[0]:
        torch.testing.assert_close(figures[0][key], figures[1][key])


@pytest.mark.parametrize("window", [0, 8])
def test_the_storage_of_the_cache_does_not_grow_with_solver_steps(window, monkeypatch):
    """Fault: with a window, and whenever the room was used up, each step moved the whole cache."""
    made = []
    buffer = backbone.Buffer
    monkeypatch.setattr(backbone, "Buffer", lambda *a, **k: made.append(1) or buffer(*a, **k))
    net = model(4, window=window)
    text = torch.randint(0, VOCAB, (1, 100))
    counts = {}
    for steps in (1, 6):
        made.clear()
        net.stop.bias.data.fill_(-100.0)
        list(net.generate(text, kind=0, max_frames=400, steps=steps,
                          generator=torch.Generator().manual_seed(0)))
        counts[steps] = len(made)
    assert counts[1] == counts[6] <= 2 * 2                   # 2 layers, grown at most twice
