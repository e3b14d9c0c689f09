"""The transformer sees what it should, and feeding it piece by piece changes nothing."""
import pytest
import torch

from backbone import BackboneConfig, KVCache, Transformer, rope, rotations

CASES = [dict(), dict(window=5), dict(kv_heads=2), dict(qk_norm=True), dict(mlp="gelu", window=3),
         dict(head_dim=12, kv_heads=1)]


def model(**changes):
    torch.manual_seed(0)
    net = Transformer(BackboneConfig(dim=32, layers=2, heads=4, **changes)).double()
    for p in net.parameters():              # away from the small initial weights: attention matters
        p.data += 0.2 * torch.randn_like(p)
    return net.eval()


@pytest.mark.parametrize("changes", CASES, ids=str)
def test_output_at_every_prefix_is_the_output_of_the_prefix_alone(changes):
    net, x = model(**changes), torch.randn(2, 14, 32, dtype=torch.float64)
    y = net(x)
    for n in range(1, 15):
        torch.testing.assert_close(net(x[:, :n]), y[:, :n], atol=1e-12, rtol=0)


@pytest.mark.parametrize("changes", CASES, ids=str)
@pytest.mark.parametrize("sizes", [[1] * 14, [3, 1, 6, 4], [13, 1], [1, 12, 1]], ids=str)
@pytest.mark.parametrize("grad", [False, True])
def test_a_cache_fed_in_any_pieces_equals_the_full_forward(changes, sizes, grad):
    net, x, cache = model(**changes), torch.randn(2, 14, 32, dtype=torch.float64), KVCache()
    with torch.set_grad_enabled(grad):
        parts = [net(piece, cache) for piece in x.split(sizes, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), net(x), atol=1e-12, rtol=0)


@pytest.mark.parametrize("window", [0, 5])
@torch.no_grad()
def test_a_cache_survives_its_buffer_filling_up_and_a_choice_of_rows(window):
    net, x, cache = model(window=window), torch.randn(2, 200, 32, dtype=torch.float64), KVCache()
    parts = [net(piece, cache) for piece in x[:, :150].split(1, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), net(x[:, :150]), atol=1e-12, rtol=0)
    kept = [k.clone() for k, _ in cache.kv.values()]
    cache.select(torch.tensor([1, 0, 1]))
    rows = x[torch.tensor([1, 0, 1])]
    parts = [net(piece, cache) for piece in rows[:, 150:].split(1, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), net(rows)[:, 150:], atol=1e-12, rtol=0)
    assert len(kept) == 2 and cache.pos == 200


@torch.no_grad()
def test_a_cached_step_writes_in_place_of_copying_what_is_cached():
    net, cache = model(), KVCache()
    net(torch.randn(1, 10, 32, dtype=torch.float64), cache)
    for i in range(40):
        net(torch.randn(1, 1, 32, dtype=torch.float64), cache)
        where = cache.kv[0][0].data_ptr()
        assert i == 0 or where == first
        first = where


def test_a_window_limits_both_the_view_and_the_cache():
    net, cache = model(window=3), KVCache()
    x = torch.randn(1, 20, 32, dtype=torch.float64, requires_grad=True)
    grad, = torch.autograd.grad(net(x)[0, 19].sum(), x)
    seen = (grad[0].abs().sum(-1) > 0).nonzero().flatten().tolist()
    assert seen == list(range(20 - 1 - 2 * 2, 20))        # two layers, each two positions back
    for i in range(20):
        net(x[:, i:i + 1].detach(), cache)
    assert cache.kv[0][0].shape[2] == 2 and cache.pos == 20


def test_a_model_that_is_not_causal_sees_the_future():
    net, x = model(causal=False), torch.randn(1, 6, 32, dtype=torch.float64, requires_grad=True)
    grad, = torch.autograd.grad(net(x)[0, 0].sum(), x)
    assert (grad[0].abs().sum(-1) > 0).all()


def test_rotary_positions_depend_on_distance_only():
    q, k = (torch.randn(1, 1, 1, 8, dtype=torch.float64),
            torch.randn(1, 1, 1, 8, dtype=torch.float64))
    turn = lambda x, at: rope(x, *rotations(at, 1, 8, 1e4, x))
    score = lambda i, j: (turn(q, i) * turn(k, j)).sum()
    torch.testing.assert_close(score(7, 3), score(104, 100), atol=1e-12, rtol=0)
    assert abs(score(7, 3) - score(7, 4)) > 1e-3


@pytest.mark.parametrize("changes, layers, width, heads, millions", [
    (dict(mlp="gelu", mlp_dim=6144), 48, 1536, 24, 1359), (dict(mlp_dim=4032), 48, 1536, 24, 1345),
    (dict(mlp="gelu", mlp_dim=6144), 4, 1536, 24, 113)], ids=str)
def test_table_9_sizes_give_the_parameter_counts_of_the_paper(
        changes, layers, width, heads, millions):
    with torch.device("meta"):
        net = Transformer(BackboneConfig(dim=width, layers=layers, heads=heads, **changes))
    assert round(sum(p.numel() for p in net.parameters()) / 1e6) == millions


@pytest.mark.parametrize(
    "changes", [dict(heads=3), dict(kv_heads=3), dict(mlp="relu"), dict(window=-1), dict(head_dim=5)], ids=str)
def test_impossible_sizes_are_refused_by_name(changes):
    with pytest.raises(ValueError, match=list(changes)[0]):
        BackboneConfig(**{"dim": 32, "heads": 4, **changes})
