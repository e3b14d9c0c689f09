"""Discrete heads: likelihoods are exact, samples follow them, the delay pattern loses nothing."""
import itertools
import math

import pytest
import torch

from cli import BadInput
from discrete import (DISCRETE, MISSING, CodeEmbedding, DepthTransformer, cross_entropy,
                      delay_codes, sample_codes, undelay_codes)
from heads import HeadConfig
from schema import build


@pytest.fixture(autouse=True)
def one_thread_one_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def tiny(name="rq", levels=4, codes=7, cond=6, perturb=True, **kw):
    """A small head; perturb: as after some training; a fresh head is uniform."""
    cfg = HeadConfig(objective=name, **(dict(width=16, blocks=2, depth_heads=2) | kw))
    head = DISCRETE[name](levels, codes, cond, cfg)
    if perturb:
        for p in head.parameters():
            p.data += 0.3 * torch.randn_like(p)
    return head


def joint(head, z, levels, codes, temperature=1.0):
    """Every frame of codes and its log-probability given z (1, C), teacher-forced."""
    frames = torch.tensor(list(itertools.product(range(codes), repeat=levels)))
    logits = head.net(z.expand(len(frames), -1), frames) / temperature
    return frames, logits.log_softmax(-1).gather(2, frames[..., None]).sum((1, 2))


# ------------------------------------------------------------------------------------ rq

@pytest.mark.parametrize("levels, channels, sets, millions", [
    (8, 2560, 0, 656.4),                                        # speech
    (32, 1536, 8, 748.7)])                                      # music
def test_parameter_counts_lie_within_7_percent_of_table_9(levels, channels, sets, millions):
    with torch.device("meta"):
        net = DepthTransformer(levels, 2048, channels, 1024, 6, 16, sets)
    count = sum(p.numel() for p in net.parameters()) / 1e6
    assert count == pytest.approx(millions, abs=0.1) and count == pytest.approx(701, rel=0.07)
    blocks = sum(p.numel() for p in net.blocks.parameters()) / 1e6
    assert blocks == pytest.approx(8 * 75.5, rel=1e-3)


@pytest.mark.parametrize("sets", [0, 1, 3])
def test_sampling_level_by_level_with_a_cache_has_the_teacher_forced_probabilities(sets):
    head, z, seen = tiny(sets=sets).double(), torch.randn(9, 6, dtype=torch.float64), []

    def choose(logits):
        seen.append(logits)
        return sample_codes(logits, 1.0, 0, None)
    x = head.net.sample(z, choose)
    logits = head.net(z, x)
    torch.testing.assert_close(torch.stack(seen, 1), logits)
    assert logits.std() > 0.1
    step = sum(l.log_softmax(-1).gather(1, x[:, k:k + 1])[:, 0] for k, l in enumerate(seen))
    torch.testing.assert_close(head.loss(z, x)[0], -step / 4)          # the likelihood factorises


def test_a_level_sees_z_and_the_codes_before_it_and_no_others():
    head, z = tiny(), torch.randn(1, 6, requires_grad=True)
    x = torch.randint(0, 7, (1, 4))
    base = head.net(z, x)
    for k in range(4):
        grad, = torch.autograd.grad(base[:, k].square().sum(), z, retain_graph=True)
        assert grad.abs().min() > 0
        other = x.clone()
        other[:, k] = (x[:, k] + 1) % 7
        moved = (head.net(z, other) - base).abs().amax((0, 2)) > 1e-6
        assert moved.tolist() == [later > k for later in range(4)]


@pytest.mark.parametrize("sets, moved", [(0, [0, 0, 1, 1]), (3, [0, 0, 1, 1]), (2, [0, 1, 1, 1]),
                                         (1, [1, 1, 1, 1])])
def test_each_level_has_weights_of_its_own_and_those_beyond_the_sets_share_the_last(sets, moved):
    """Levels behind the changed one move too: they attend to it."""
    head, z, x = tiny(sets=sets), torch.randn(3, 6), torch.randint(0, 7, (3, 4))
    base = head.net(z, x)
    last = head.net.blocks[0].up.each
    last[min(2, len(last) - 1)].weight.data += 1.0
    assert ((head.net(z, x) - base).abs().amax((0, 2)) > 1e-6).tolist() == [m == 1 for m in moved]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_have_the_joint_distribution_of_the_network(temperature):
    head, z, n = tiny(levels=2, codes=3), torch.randn(1, 6), 20000
    frames, logp = joint(head, z, 2, 3, temperature)
    assert logp.exp().sum().item() == pytest.approx(1, abs=1e-5)
    x = head.sample(z.expand(n, 6), temperature=temperature)
    share = (x[:, None] == frames).all(-1).float().mean(0)
    assert (share - logp.exp()).abs().max() < 5 * math.sqrt(0.25 / n)
    assert logp.exp().max() < 0.8                                       # not a trivial one


def test_rq_learns_a_joint_distribution_that_independent_heads_cannot():
    """z says one of 3 shifts; q1 is uniform over 4, q2 = q1 + shift with probability 0.9.

    Entropies given z: q1 ln 4 = 1.386, q2 given q1 0.9 ln (1/0.9) + 0.1 ln (3/0.1) = 0.435.
    Without delay, linear heads see q1 nowhere: ln 4 for both.
    """
    def batch():
        shift, q1 = torch.randint(0, 3, (256,)), torch.randint(0, 4, (256,))
        jump = torch.where(torch.rand(256) < 0.9, 0, torch.randint(1, 4, (256,)))
        return torch.eye(3)[shift], torch.stack([q1, (q1 + shift + jump) % 4], -1)
    found = {}
    for name in DISCRETE:
        head = tiny(name, 2, 4, 3, perturb=False)
        assert head.loss(*batch())[0].mean().item() == pytest.approx(math.log(4), abs=1e-6)
        opt = torch.optim.AdamW(head.parameters(), lr=1e-2, weight_decay=0)
        for step in range(150):
            opt.param_groups[0]["lr"] = 1e-2 * (1 - step / 150)
            loss, _ = head.loss(*batch())
            opt.zero_grad()
            loss.mean().backward()
            opt.step()
        with torch.no_grad():
            metrics = [head.loss(*batch())[1] for _ in range(40)]
        found[name] = [torch.stack([m[f"loss_{k}"] for m in metrics]).mean().item()
                       for k in ("first", "last")]
    assert found["rq"] == pytest.approx([1.386, 0.435], abs=0.03)
    assert found["delay"] == pytest.approx([1.386, 1.386], abs=0.03)


# ------------------------------------------------------------------------------------ both

@pytest.mark.parametrize("name", list(DISCRETE))
def test_shapes_follow_z_and_every_parameter_learns(name):
    head = tiny(name)
    for lead in ((5,), (2, 3)):
        z, x = torch.randn(*lead, 6, requires_grad=True), torch.randint(0, 7, (*lead, 4))
        loss, metrics = head.loss(z, x)
        assert loss.shape == lead and all(m.isfinite() and m.ndim == 0 for m in metrics.values())
        sampled = head.sample(z)
        assert sampled.shape == (*lead, 4) and sampled.dtype == torch.int64
        assert 0 <= sampled.min() and sampled.max() < 7
    loss.sum().backward()
    assert z.grad.abs().amax(-1).min() > 0
    assert all(p.grad.abs().max() > 0 for p in head.parameters())


@pytest.mark.parametrize("name", list(DISCRETE))
def test_a_generator_makes_samples_repeatable_and_leaves_the_global_state_alone(name):
    head, z = tiny(name), torch.randn(20, 6)
    run = lambda seed, **kw: head.sample(z, generator=torch.Generator().manual_seed(seed), **kw)
    before = torch.get_rng_state()
    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))
    assert torch.equal(run(1, temperature=0), run(2, temperature=0))
    assert torch.equal(torch.get_rng_state(), before)
    head.cfg.top_k = 1                                                  # one choice: the likeliest
    assert torch.equal(run(1), run(1, temperature=0))


def test_top_k_keeps_the_k_likeliest_in_their_proportion_and_temperature_sharpens():
    logits = torch.tensor([0.1, 2.0, -1.0, 1.0]).expand(20000, 4)
    share = lambda **kw: torch.bincount(
        sample_codes(logits, **({"temperature": 1.0, "top_k": 0, "generator": None} | kw)),
        minlength=4) / 20000
    near = lambda p: pytest.approx(p.tolist(), abs=0.02)
    assert share().tolist() == near(logits[0].softmax(0))
    assert share(temperature=0.5).tolist() == near((2 * logits[0]).softmax(0))
    two = torch.tensor([0.0, math.e, 0.0, 1.0])
    assert share(top_k=2).tolist() == near(two / two.sum())
    assert share(top_k=2)[0] == share(top_k=2)[2] == 0
    assert share(temperature=0).tolist() == [0, 1, 0, 0]
    assert share(top_k=9).tolist() == near(logits[0].softmax(0))
    with pytest.raises(ValueError, match="temperature: must be at least 0, got -1"):
        share(temperature=-1)


def test_missing_codes_neither_count_nor_teach():
    logits = torch.randn(3, 2, 5, requires_grad=True)
    x = torch.tensor([[1, 4], [2, MISSING], [MISSING, MISSING]])
    loss, metrics = cross_entropy(logits, x)
    nats = -logits.log_softmax(-1)
    expected = torch.stack([(nats[0, 0, 1] + nats[0, 1, 4]) / 2, nats[1, 0, 2], torch.zeros(())])
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(metrics["loss_last"], nats[0, 1, 4].detach())
    loss.sum().backward()
    assert logits.grad[1, 1].abs().max() == 0 and logits.grad[2].abs().max() == 0


# ------------------------------------------------------------------------------------ delay

def test_delaying_shifts_each_level_by_its_number_and_comes_back():
    x = torch.arange(24).view(2, 4, 3)
    steps = delay_codes(x)
    assert steps.shape == (2, 6, 3) and torch.equal(undelay_codes(steps), x)
    for s, k in itertools.product(range(6), range(3)):
        expected = x[0, s - k, k].item() if 0 <= s - k < 4 else MISSING
        assert steps[0, s, k].item() == expected
    assert torch.equal(delay_codes(x[..., :1]), x[..., :1])                   # one level: no delay


def test_a_step_holds_no_code_of_a_later_frame_and_of_its_first_levels_frame_no_other_level():
    """Predicting step s from the steps before it, level k has seen levels 0 .. k-1 of its frame."""
    frame = torch.arange(10)[None, :, None].expand(1, 10, 4)
    steps = delay_codes(frame)
    for s in range(13):
        before = steps[0, :s]
        for k in range(4):
            if steps[0, s, k] != MISSING:
                seen = (before == steps[0, s, k]).any(0)                # levels of the same frame
                assert seen.tolist() == [level < k for level in range(4)]


def test_the_embedding_of_a_frame_is_the_sum_of_its_codes_and_missing_ones_add_nothing():
    embed = CodeEmbedding(3, 5, 4)
    table = embed.bag.weight
    x = torch.tensor([[[1, 4, 0], [2, MISSING, 3]], [[MISSING] * 3, [0, 0, 0]]])
    y = embed(x)
    assert y.shape == (2, 2, 4)
    torch.testing.assert_close(y[0, 0], table[1] + table[5 + 4] + table[10])
    torch.testing.assert_close(y[0, 1], table[2] + table[13])
    assert y[1, 0].abs().max() == 0
    y.sum().backward()
    assert embed.bag.weight.grad[-1].abs().max() == 0                   # nothing to learn there
    big = CodeEmbedding(8, 64, 500)(torch.randint(0, 64, (200, 8)))
    assert big.std().item() == pytest.approx(0.5, rel=0.05)


def test_an_empty_voice_prompt_has_no_embedding_instead_of_an_error():
    """Guards a crash of runs without voice prompts: (B, 0, K) could not be reshaped."""
    assert CodeEmbedding(3, 5, 4)(torch.zeros(2, 0, 3, dtype=torch.long)).shape == (2, 0, 4)


def test_impossible_values_are_one_line():
    for bad in (dict(objective="rq", width=10, depth_heads=4), dict(sets=-1), dict(top_k=-1)):
        key = "depth_heads" if "objective" in bad else next(iter(bad))
        with pytest.raises(BadInput, match=f"head.{key}: "):
            build(HeadConfig, bad, "head")


@pytest.mark.parametrize("name", ["rq", "delay"])
def test_metrics_leave_out_positions_of_weight_0(name):
    head = tiny(name)
    z = torch.randn(6, 6)
    x = torch.randint(7, (6, 4))
    weight = torch.tensor([1, 0, 1, 1, 0, 0]).bool()
    _, metrics = head.loss(z, x, weight)
    _, expected = head.loss(z[weight], x[weight])
    for key in expected:
        torch.testing.assert_close(metrics[key], expected[key])
