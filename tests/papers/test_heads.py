"""
The head and its objectives, mostly against exact answers: for data N(m, s²) the flow's F, the
consistency function and its tangent have closed forms, compared in float64.

    pytest tests/papers/test_heads.py      35 s on one idle thread, of which two trainings take 25 s
"""

import math

import pytest
import torch

import adaln
import heads
from cli import BadInput
from heads import (HALF_PI, HEADS, LSD, AdaLNMLP, Consistency, HeadConfig, RectifiedFlow,
                   TrigFlow)
from schema import build

NAMES = list(HEADS)


@pytest.fixture(autouse=True)
def one_thread_one_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


class Net:
    """A network that is a formula."""
    def __init__(self, formula, dim):
        self.formula = formula
        self.dim = dim

    def __call__(self, x_t, t, z, *s):                          # s: LSD's second time
        return self.formula(x_t, t[..., None], *(time[..., None] for time in s))

    def jvp(self, x_t, t, z, dx, dt):
        F, dF = torch.func.jvp(lambda x, t: self(x, t, z), (x_t, t), (dx, dt))
        return F, dF.detach()

    def jvp_s(self, x_t, t, z, s):
        return torch.func.jvp(lambda s: self(x_t, t, z, s), (s,), (torch.ones_like(s),))


M, S = 0.7, 0.3                                                 # the data N(M, S²)


def trig_var(t):
    return S**2 * t.cos()**2 + t.sin()**2


def trig_F(x, t):                                               # dx/dt of the probability flow
    return -M * t.sin() + t.cos() * t.sin() * (1 - S**2) / trig_var(t) * (x - M * t.cos())


def rf_F(x, t):
    return -M + (t - S**2 * (1 - t)) / (S**2 * (1 - t)**2 + t**2) * (x - M * (1 - t))


def consistency_f(x, t):                                        # the end of the flow from (x, t)
    return M + S * (x - M * t.cos()) / trig_var(t).sqrt()


def consistency_F(x, t):                                       # f = cos t x - sin t F, solved for F
    return (t.cos() * x - consistency_f(x, t)) / t.sin()


def lsd_F(x, t, s):                         # f = x + (s-t) F: the flow from (x, t) at time s
    sd = lambda t: (S**2 * (1 - t)**2 + t**2).sqrt()
    f = M * (1 - s) + sd(s) / sd(t) * (x - M * (1 - t))
    same = s == t
    return torch.where(same, rf_F(x, t), (f - x) / torch.where(same, 1.0, s - t))


def tiny(name, dim=4, cond=6, perturb=True, **kw):
    """A small head; perturb: random weights, because a new head outputs zero everywhere."""
    cfg = HeadConfig(objective=name, **(dict(width=32, blocks=2, multiplier=2) | kw))
    head = HEADS[name](dim, cond, cfg)
    if perturb:
        for p in head.net.parameters():
            p.data += 0.1 * torch.randn_like(p)
    return head


def energy(x, y):
    """Energy distance of samples (.., n, D), unbiased; 0 = same distribution. Mean over (..)."""
    n, m = x.shape[-2], y.shape[-2]
    return (2 * torch.cdist(x, y).mean((-1, -2)) - torch.cdist(x, x).sum((-1, -2)) / (n * (n - 1))
            - torch.cdist(y, y).sum((-1, -2)) / (m * (m - 1))).mean().item()


def train(head, batch, steps, lr):
    """AdamW, gradients clipped to norm 1, short warm-up, cosine decay."""
    opt = torch.optim.AdamW(head.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0)
    for i in range(steps):
        opt.param_groups[0]["lr"] = lr * min(1, (i + 1) / 20) * (0.51 + 0.49 * math.cos(
            math.pi * i / steps))
        loss, _ = head.loss(*batch())
        opt.zero_grad()
        loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        opt.step()
    return head.eval()


# ------------------------------------------------------------------------------------------ network

@pytest.mark.parametrize("dim, cond, width, blocks, millions", [
    (128, 1536, 3072, 12, 601.1),                               # music, Table 9: 601M
    (32, 2560, 512, 6, 10.15)])                                 # speech, Table 9: 10M
def test_parameter_counts_are_those_of_table_9(dim, cond, width, blocks, millions):
    with torch.device("meta"):
        net = AdaLNMLP(dim, cond, width, blocks)
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, rel=1e-3)


def test_a_fresh_network_outputs_zero_and_every_parameter_can_move_it():
    net = AdaLNMLP(4, 6, 16, 2)
    assert net(torch.randn(5, 4), torch.rand(5), torch.randn(5, 6)).abs().max() == 0
    for p in net.parameters():
        p.data += 0.1 * torch.randn_like(p)
    net(torch.randn(5, 4), torch.rand(5), torch.randn(5, 6)).sum().backward()
    assert all(p.grad.abs().max() > 0 for p in net.parameters())


def test_the_time_embedding_has_rms_one_and_moves_slowly():
    t = torch.linspace(0, HALF_PI, 50, dtype=torch.float64)
    emb, slope = torch.func.jvp(heads.sinusoid, (t,), (torch.ones_like(t),))
    assert torch.allclose(emb.square().mean(-1), torch.ones_like(t))
    assert slope.square().mean(-1).sqrt().max() < 0.5           # t * 1000 gives 240


@pytest.mark.parametrize("name", NAMES)
def test_any_leading_dims_work_and_positions_do_not_mix(name):
    head = tiny(name)
    for lead in ((7,), (2, 3), (2, 3, 2)):
        loss, metrics = head.loss(torch.randn(*lead, 6), torch.randn(*lead, 4))
        assert loss.shape == lead and all(m.isfinite() and m.ndim == 0 for m in metrics.values())
        assert head.sample(torch.randn(*lead, 6), steps=3).shape == (*lead, 4)
    z, x, t = torch.randn(6, 6), torch.randn(6, 4), torch.rand(6)
    assert torch.allclose(head.net(x, t, z)[:3], head.net(x[:3], t[:3], z[:3]), atol=1e-6)


def test_a_wrong_value_is_one_line_that_names_the_key_and_the_valid_ones():
    with pytest.raises(BadInput, match="head.objective: unknown 'flow'; valid: rectified_flow, "):
        build(HeadConfig, {"objective": "flow"}, "head")
    for bad in (dict(width=0), dict(p_std=0), dict(solver="rk4"), dict(steps=-1), dict(warmup=-1)):
        with pytest.raises(BadInput, match=f"head.{next(iter(bad))}: "):
            build(HeadConfig, bad, "head")
    with pytest.raises(ValueError, match="steps"):
        tiny("trigflow").sample(torch.randn(2, 6), steps=-2)


# -------------------------------------------------------------------------------------------- flows

@pytest.mark.parametrize("cls, F", [(TrigFlow, trig_F), (RectifiedFlow, rf_F)])
def test_the_sampler_with_the_exact_flow_of_a_gaussian_ends_on_that_gaussian(cls, F):
    z = torch.zeros(500, 1, dtype=torch.float64)
    eps = torch.randn(500, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def error(solver, steps):
        x = cls(Net(F, 2), HeadConfig(solver=solver)).sample(
            z, steps=steps, generator=torch.Generator().manual_seed(1))
        return (x - (M + S * eps)).abs().max().item()           # the flow maps eps to M + S eps
    assert error("euler", 2000) < 2e-3
    assert error("heun", 500) < 1e-4
    assert error("euler", 100) / error("euler", 200) == pytest.approx(2, rel=0.1)   # first order
    assert error("heun", 100) / error("heun", 200) == pytest.approx(4, rel=0.2)     # second order


@pytest.mark.parametrize("cls, F", [
    (RectifiedFlow, lambda x, t: (x - M) / t),
    (TrigFlow, lambda x, t: (t.cos() * x - M) / t.sin()),
    (Consistency, lambda x, t: (t.cos() * x - M) / t.sin())])
def test_on_a_point_mass_the_exact_network_has_loss_zero_and_samples_exactly_in_one_step(cls, F):
    head = cls(Net(F, 3), HeadConfig(multiplier=4))
    x = torch.full((200, 3), M, dtype=torch.float64)
    assert head.loss(x, x)[0].max() < 1e-18
    for steps in (1, 3):
        assert (head.sample(x, steps=steps) - M).abs().max() < 1e-12


# -------------------------------------------------------------------------------------- consistency

def gaussian_points():
    t = torch.linspace(0.05, 1.55, 400, dtype=torch.float64)
    xi = torch.randn(400, 2, dtype=torch.float64)
    x = M * t.cos()[:, None] + trig_var(t).sqrt()[:, None] * xi
    return x, t, trig_F(x, t[:, None])


def test_the_true_consistency_function_has_tangent_zero_and_wrong_derivatives_do_not():
    x, t, dxdt = gaussian_points()
    size = lambda formula, dxdt=dxdt, **kw: heads.consistency_tangent(
        Net(formula, 2), x, t, dxdt, None, **kw)[1].abs().max().item()
    assert size(consistency_F) < 1e-10
    assert size(lambda x, t: consistency_F(x.detach(), t)) > 0.1         # frozen x_t: dx/dt dropped
    assert size(lambda x, t: consistency_F(x, t.detach())) > 0.1          # no derivative by t
    assert size(consistency_F, -dxdt) > 0.1                               # time reversed
    assert size(lambda x, t: -consistency_F(x, t)) > 0.1                  # F of the other sign
    assert size(trig_F) > 0.1                                           # the flow is not consistent
    assert size(consistency_F, r=0.0) > 0.1                               # warm-up: not yet


def test_the_tangent_is_cos_t_times_the_derivative_of_f_by_finite_differences():
    net = AdaLNMLP(3, 2, 16, 2).double()
    for p in net.parameters():
        p.data += 0.3 * torch.randn_like(p)
    x, eps, z = (torch.randn(50, d, dtype=torch.float64) for d in (3, 3, 2))
    t, h = torch.linspace(0.1, 1.5, 50, dtype=torch.float64), 1e-5
    path = lambda t: t.cos()[:, None] * x + t.sin()[:, None] * eps
    f = lambda t: Consistency(net, HeadConfig()).f(path(t), t, z)
    dxdt = t.cos()[:, None] * eps - t.sin()[:, None] * x
    with torch.no_grad():
        expected = t.cos()[:, None] * (f(t + h) - f(t - h)) / (2 * h)
    F, g = heads.consistency_tangent(net, path(t), t, dxdt, z)
    assert torch.equal(F, net(path(t), t, z))
    assert (g - expected).abs().max() < 1e-6 and expected.abs().max() > 0.1
    _, g0 = heads.consistency_tangent(net, path(t), t, dxdt, z, r=0.0)      # r = 0: flow matching
    assert torch.allclose(g0, -t.cos()[:, None]**2 * (net(path(t), t, z) - dxdt))


def test_taught_by_the_exact_flow_the_true_consistency_function_has_loss_zero():
    x = M + S * torch.randn(500, 2, dtype=torch.float64)
    alone = Consistency(Net(consistency_F, 2), HeadConfig(multiplier=4))
    assert alone.loss(x, x)[0].mean() > 0.01                    # the pairs disagree
    alone.teacher = [Net(trig_F, 2)]
    assert alone.loss(x, x)[0].max() < 1e-16


def test_the_teacher_is_the_flow_that_was_loaded_and_does_not_learn():
    flow, head = tiny("trigflow"), tiny("consistency")
    head.load_flow(flow.state_dict())
    head.teach()
    x, t, z = torch.randn(5, 4), torch.rand(5), torch.randn(5, 6)
    head.loss(z, x)[0].mean().backward()
    assert not any(p.grad is not None for p in head.teacher[0].parameters())
    torch.optim.SGD(head.parameters(), 0.1).step()
    assert torch.equal(head.teacher[0](x, t, z), flow.net(x, t, z))
    assert not torch.equal(head.net(x, t, z), flow.net(x, t, z))
    assert not any("teacher" in name for name in head.state_dict())         # lm.pt has it


def test_f_at_time_zero_is_the_identity():
    head, x = tiny("consistency"), torch.randn(5, 4)
    assert torch.equal(head.f(x, torch.zeros(5), torch.randn(5, 6)), x)


def spy(monkeypatch):
    """Record the arguments and results of consistency_tangent."""
    calls = []
    original = heads.consistency_tangent

    def recorded(net, x_t, t, dxdt, z, r=1.0):
        F, g = original(net, x_t, t, dxdt, z, r)
        calls.append(dict(x_t=x_t, t=t, dxdt=dxdt, r=float(r), g=g))
        return F, g
    monkeypatch.setattr(heads, "consistency_tangent", recorded)
    return calls


def test_the_loss_moves_along_the_path_of_its_own_pair_at_times_up_to_half_pi(monkeypatch):
    calls, head = spy(monkeypatch), tiny("consistency", multiplier=8)
    x = torch.randn(500, 4)
    head.loss(torch.randn(500, 6), x)
    x_t, t, dxdt = (calls[0][k] for k in ("x_t", "t", "dxdt"))
    cos, sin = t.cos()[..., None], t.sin()[..., None]
    eps = sin * x_t + cos * dxdt
    assert torch.allclose(cos * x_t - sin * dxdt, x.expand(8, 500, 4), atol=1e-5)
    assert abs(eps.mean()) < 0.03 and abs(eps.std() - 1) < 0.03
    u = t.tan().log()
    assert abs(u.mean() + 0.4) < 0.1 and abs(u.std() - 1.4) < 0.1
    assert 0 < t.min() and 1.4 < t.max() < HALF_PI
    assert t.unique().numel() > 3900                            # a t for each position and repeat
    assert eps.flatten(0, 1)[:, 0].unique().numel() > 3900      # and an eps
    assert abs(torch.corrcoef(u)[0, 1:]).max() < 0.2


def test_gradients_flow_through_the_plain_forward_and_not_through_the_target(monkeypatch):
    calls = spy(monkeypatch)
    head = tiny("consistency", multiplier=1, tangent_c=0.1).double()
    z = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    x = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    inputs = [z, *head.net.parameters()]
    loss, _ = head.loss(z, x)
    got = torch.autograd.grad(loss.sum(), inputs, retain_graph=True)
    assert torch.autograd.grad(loss.sum(), x)[0] is not None    # x_t carries x into the plain F
    c = calls[0]
    g = c["g"] / (c["g"].norm(dim=-1, keepdim=True) + 0.1)
    assert torch.allclose(loss, g.square().mean(-1))
    F = head.net(c["x_t"].detach(), c["t"], z)
    expected = torch.autograd.grad(F, inputs, grad_outputs=-2 * g / 4)    # by hand: -2/D g dF
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(got, expected))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_z_and_every_parameter(name):
    head = tiny(name, adaptive=True)
    z = torch.randn(9, 6, requires_grad=True)
    head.loss(z, torch.randn(9, 4))[0].sum().backward()
    assert (z.grad.abs().amax(-1) > 0).all()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in head.parameters())


def test_the_adaptive_weight_is_that_of_equation_1_and_starts_at_zero():
    head, plain = tiny("consistency", adaptive=True), tiny("consistency")
    plain.net.load_state_dict(head.net.state_dict())
    z, x = torch.randn(9, 6), torch.randn(9, 4)

    def run(h):
        torch.manual_seed(3)
        return h.loss(z, x)[0]
    base = run(plain)
    assert torch.allclose(run(head), base)
    head.psi.bias.data.fill_(0.7)
    assert torch.allclose(run(head), math.exp(0.7) * base - 0.7)


def test_the_warm_up_is_at_the_step_that_the_loop_sets_however_many_micro_batches(monkeypatch):
    """Bug: every call counted, so one GPU with 16 micro-batches warmed up 16 times as fast
    as 16 GPUs.
    """
    calls, head = spy(monkeypatch), tiny("consistency", warmup=4)
    z, x = torch.randn(3, 6), torch.randn(3, 4)
    for step in (0, 1, 1, 3, 4, 9):
        head.it.fill_(step)
        head.loss(z, x)
    assert [c["r"] for c in calls] == [0, 0.25, 0.25, 0.75, 1, 1]


def test_trigflow_weights_load_into_consistency_and_nothing_is_forgotten_silently():
    flow = tiny("trigflow")
    for adaptive in (False, True):
        head = tiny("consistency", adaptive=adaptive)
        head.load_flow(flow.state_dict())
        x, t, z = torch.randn(5, 4), torch.rand(5), torch.randn(5, 6)
        assert torch.equal(head.net(x, t, z), flow.net(x, t, z))
    broken = flow.state_dict()
    broken.pop("net.input.weight")
    with pytest.raises(RuntimeError, match="net.input.weight"):
        head.load_flow(broken)
    with pytest.raises(RuntimeError, match="net.extra"):
        head.load_flow(flow.state_dict() | {"net.extra": torch.zeros(1)})
    with pytest.raises(RuntimeError, match="size mismatch"):
        head.load_flow(tiny("trigflow", width=16).state_dict())


# ---------------------------------------------------------------------------------------------- lsd

def test_the_exact_flow_map_of_a_gaussian_makes_the_jump_loss_zero_and_wrong_maps_do_not():
    x = M + S * torch.randn(4000, 2, dtype=torch.float64)

    def jump(formula):
        torch.manual_seed(3)
        return LSD(Net(formula, 2), HeadConfig(multiplier=4)).loss(x, x)[1]["lsd"].item()
    assert jump(lsd_F) < 1e-20
    assert jump(lambda x, t, s: lsd_F(x, t, t)) > 0.01         # the flow at t, whatever s
    assert jump(lambda x, t, s: lsd_F(x, t, s.detach())) > 0.01         # no derivative by s
    assert jump(lambda x, t, s: lsd_F(x, s, t)) > 0.01         # the times the other way round
    assert jump(lambda x, t, s: -lsd_F(x, t, s)) > 0.01


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_with_the_exact_flow_map_any_number_of_steps_ends_on_the_same_sample(steps):
    z = torch.zeros(500, 1, dtype=torch.float64)
    generator = lambda: torch.Generator().manual_seed(1)
    eps = torch.randn(500, 2, dtype=torch.float64, generator=generator())
    x = LSD(Net(lsd_F, 2), HeadConfig()).sample(z, steps=steps, generator=generator())
    assert (x - (M + S * eps)).abs().max() < 1e-12


def test_the_diagonal_of_lsd_is_the_loss_of_rectified_flow():
    flow, head = tiny("rectified_flow", multiplier=8), tiny("lsd", multiplier=8)
    head.load_flow(flow.state_dict())
    x, t, z = torch.randn(5, 4), torch.rand(5), torch.randn(5, 6)
    torch.testing.assert_close(head.net(x, t, z, t), flow.net(x, t, z))
    z, x = torch.randn(9, 6), torch.randn(9, 4)

    def run(h):
        torch.manual_seed(3)
        return h.loss(z, x)
    (expected, plain), (loss, metrics) = run(flow), run(head)
    for k in plain:
        torch.testing.assert_close(metrics[k], plain[k])
    torch.testing.assert_close(loss.mean(), 0.75 * expected.mean() + 0.25 * metrics["lsd"])


def listen(net):
    """Record the arguments of net and net.jvp_s."""
    calls = []
    for name in ("forward", "jvp_s"):
        method = getattr(net, name)
        setattr(net, name, lambda *a, method=method: calls.append(a) or method(*a))
    return calls


def test_the_jumps_of_lsd_go_from_more_noise_to_less_along_the_path_of_their_pair():
    head = tiny("lsd", multiplier=8)
    calls = listen(head.net)
    x = torch.randn(500, 4)
    head.loss(torch.randn(500, 6), x)
    (x_t, t, _, same), (x_far, far, _, s), (_, near, _, end) = calls
    assert torch.equal(t, same) and torch.equal(near, end) and t.shape == (8, 500)
    assert far.shape == s.shape == (2, 500) and (s < far).all()         # a quarter of the draws
    assert torch.equal(s, near)
    pair = lambda x_t, t: (x_t - (1 - t[..., None]) * x[:len(t[0])]) / t[..., None]       # eps
    # the first draws share eps with the diagonal's
    torch.testing.assert_close(pair(x_far, far), pair(x_t, t)[:2], atol=2e-3, rtol=1e-2)
    u = torch.logit(torch.stack([far, s])).double()
    assert abs(u.mean() + 0.4) < 0.1 and abs(u.std() - 1.4) < 0.1


def test_gradients_flow_through_f_and_its_derivative_and_not_through_lsds_target():
    head = tiny("lsd", multiplier=1, blocks=1, width=8).double()
    z = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    x = torch.randn(9, 4, dtype=torch.float64)
    inputs = [z, *head.net.parameters()]

    def run():
        torch.manual_seed(3)
        return head.loss(z, x)[0].sum()
    got = torch.autograd.grad(run(), inputs)

    # what the loss evaluates the network at
    net = head.net.forward
    calls = listen(head.net)
    run()
    head.net.forward = net
    (x_t, t, _, _), (x_far, far, _, _), (end, s, _, _) = calls

    # the same loss, with df/ds by finite differences
    target = net(end, s, z, s).detach()
    f = lambda s: head.f(x_far, far, s, z)
    h = 1e-5
    df = (f(s + h) - f(s - h)) / (2 * h)
    v = (x_t - x) / t[:, None]
    loss = (0.75 * (net(x_t, t, z, t) - v).square().mean(-1)
            + 0.25 * (df - target).square().mean(-1)).sum()
    expected = torch.autograd.grad(loss, inputs)
    assert all(torch.allclose(a, b, atol=1e-7, rtol=1e-6) for a, b in zip(got, expected))


@pytest.mark.parametrize("name, taught", [("consistency", False), ("consistency", True),
                                          ("lsd", False)])
def test_a_loss_with_a_jvp_is_one_compiled_graph_of_the_same_gradient(name, taught):
    """Bug: with only the network compiled, dynamo silently gave up on it at the jvp."""
    head = tiny(name, blocks=1)
    if taught:
        head.teach()
    z, x = torch.randn(3, 6), torch.randn(3, 4)

    def grads(loss):
        torch.manual_seed(3)
        head.zero_grad()
        loss(z, x)[0].sum().backward()
        return [p.grad.clone() for p in head.parameters() if p.grad is not None]
    compiled = torch.compile(head.loss, backend="aot_eager", fullgraph=True)
    for a, b in zip(grads(head.loss), grads(compiled), strict=True):
        torch.testing.assert_close(b, a, atol=1e-5, rtol=1e-4)


# ------------------------------------------------------------------------------ sampling, precision

@pytest.mark.parametrize("tau", [1.0, 0.64, 0.0])
def test_temperature_multiplies_the_std_of_the_noise_by_its_square_root(tau):
    z, cfg = torch.zeros(20000, 1), HeadConfig()
    zero, minus = Net(lambda x, t: 0 * x, 1), Net(lambda x, t: -x, 1)
    std = lambda head, steps: head.sample(z, steps=steps, temperature=tau).std().item()
    near = lambda value: pytest.approx(value, rel=0.03, abs=1e-6)
    assert std(RectifiedFlow(zero, cfg), 5) == near(math.sqrt(tau))
    assert std(TrigFlow(zero, cfg), 5) == near(math.cos(HALF_PI / 5)**5 * math.sqrt(tau))
    assert std(LSD(Net(lambda x, t, s: 0 * x, 1), cfg), 3) == near(math.sqrt(tau))
    assert std(Consistency(minus, cfg), 1) == near(math.sqrt(tau))
    assert std(Consistency(minus, cfg), 2) == near(math.sqrt(2 * tau))  # the re-noise is scaled too


@pytest.mark.parametrize("name", NAMES)
def test_a_generator_makes_sampling_repeatable_and_leaves_the_global_state_alone(name):
    head, z = tiny(name), torch.randn(5, 6)
    sample = lambda seed: head.sample(
        z, steps=3, generator=torch.Generator().manual_seed(seed))
    before = torch.get_rng_state()
    a, b, c = sample(1), sample(1), sample(2)
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_energy_score_is_least_for_the_true_distribution_and_exact_for_a_constant():
    class Gaussian:
        def __init__(self, mean, std):
            self.mean = mean
            self.std = std

        def sample(self, z):
            return self.mean + self.std * torch.randn_like(z)
    x = M + S * torch.randn(20000, 4, dtype=torch.float64)
    score = lambda mean, std: heads.energy_score(Gaussian(mean, std), x, x).mean().item()
    assert score(0.0, 0.0) == pytest.approx((x.norm(dim=-1) / 2).mean().item(), rel=1e-12)
    best = score(M, S)
    assert all(score(*wrong) > best + 0.005 for wrong in (
        (M, 0.0), (M, 0.5 * S), (M, 1.6 * S), (M + 0.2, S)))


def test_default_steps_are_one_for_consistency_twenty_for_flows_or_the_config():
    calls = []
    net = Net(lambda x, t: calls.append(1) or 0 * x, 1)
    count = lambda head, **kw: (calls.clear(), head.sample(torch.zeros(2, 1), **kw), len(calls))[-1]
    defaults = [count(c(net, HeadConfig())) for c in (RectifiedFlow, TrigFlow, Consistency)]
    assert defaults == [20, 20, 1]
    assert [HeadConfig(objective=name).sample_steps for name in NAMES] == [20, 20, 1, 1]
    assert count(Consistency(net, HeadConfig(steps=3))) == 3
    assert count(TrigFlow(net, HeadConfig(steps=3)), steps=5) == 5
    assert count(TrigFlow(net, HeadConfig(solver="heun")), steps=5) == 9


@pytest.mark.parametrize("name", NAMES)
def test_the_head_batch_multiplier_keeps_the_expectation_and_shrinks_the_variance(name):
    z, x = torch.randn(1, 6).expand(6000, 6), torch.randn(1, 4).expand(6000, 4)
    one, four = tiny(name, multiplier=1), tiny(name, multiplier=4)
    four.load_state_dict(one.state_dict())
    with torch.no_grad():
        a, b = one.loss(z, x)[0], four.loss(z, x)[0]
    assert a.shape == b.shape == (6000,)
    assert abs(a.mean() - b.mean()) < 5 * (a.var() / 6000 + b.var() / 6000).sqrt()
    assert (a.var() / b.var()).item() == pytest.approx(4, rel=0.25)    # the repeats are independent


@pytest.mark.parametrize("name", NAMES)
def test_under_bf16_autocast_times_and_norms_stay_fp32_and_the_loss_is_close(name):
    head, z, x = tiny(name, adaptive=True), torch.randn(64, 6), torch.randn(64, 4)
    seen = set()
    for module in head.modules():
        if isinstance(module, adaln.LayerNorm):
            module.register_forward_hook(lambda m, args, out: seen.add(out.dtype))
    for module in (head.net.time, head.net.norm):
        module.register_forward_hook(lambda m, args, out: seen.update({args[0].dtype, out.dtype}))
    head.net.register_forward_hook(lambda m, args, out: seen.update({args[0].dtype, args[1].dtype}))

    def run(autocast):
        torch.manual_seed(2)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss, metrics = head.loss(z.bfloat16() if autocast else z.bfloat16().float(), x)
            return loss, metrics, head.sample(z, generator=torch.Generator().manual_seed(0))
    (a, am, ax), (b, bm, bx) = run(False), run(True)
    assert seen == {torch.float32} and b.dtype == bx.dtype == torch.float32
    assert (a - b).abs().max() < 0.02 * a.abs().max() and (ax - bx).abs().max() < 0.1
    if name == "consistency":                                 # its products follow autocast
        assert bm["tangent_max"].dtype == torch.float32
        assert bm["tangent_max"].item() == pytest.approx(am["tangent_max"].item(), rel=0.02)


# ----------------------------------------------------------------------------------------- training

def test_training_with_the_consistency_loss_finds_the_closed_form_of_a_gaussian():
    """Data N(0.8 z, 0.5²). rmse of four seeds: 0.02-0.06 at t = 0.5, 0.06-0.08 at π/2.

    A network trained to predict x0 by MSE instead: 0.15, 0.52.
    """
    s = 0.5

    def batch():
        z = 2 * torch.rand(128, 1) - 1
        return z, 0.8 * z + s * torch.randn(128, 1)
    head = train(tiny("consistency", 1, 1, perturb=False, blocks=1, multiplier=8), batch, 300, 8e-3)
    z, x = [torch.cat(parts) for parts in zip(*[batch() for _ in range(20)])]
    for time, limit in ((0.5, 0.09), (HALF_PI, 0.15)):
        t = torch.full((len(z),), time)
        x_t = math.cos(time) * x + math.sin(time) * torch.randn_like(x)
        sd = math.sqrt(s**2 * math.cos(time)**2 + math.sin(time)**2)
        exact = 0.8 * z + s * (x_t - 0.8 * z * math.cos(time)) / sd
        with torch.no_grad():
            rmse = (head.f(x_t, t, z) - exact).square().mean().sqrt().item()
        print(f"rmse at t = {time:.2f}: {rmse:.4f}")
        assert rmse < limit


def test_training_lsd_finds_the_flow_map_of_a_gaussian_with_any_number_of_steps():
    """Data N(0.8 z, 0.5²): eps maps to 0.8 z + 0.5 eps. rmse 0.02-0.06; a flow in 1 step: 0.50."""
    def batch():
        z = 2 * torch.rand(128, 1) - 1
        return z, 0.8 * z + 0.5 * torch.randn(128, 1)
    head = train(tiny("lsd", 1, 1, perturb=False, blocks=1, multiplier=8), batch, 200, 8e-3)
    z = torch.cat([batch()[0] for _ in range(20)])
    generator = lambda: torch.Generator().manual_seed(1)
    exact = 0.8 * z + 0.5 * torch.randn(len(z), 1, generator=generator())
    for steps in (1, 2, 4):
        x = head.sample(z, steps=steps, generator=generator())
        rmse = (x - exact).square().mean().sqrt().item()
        print(f"rmse with {steps} steps: {rmse:.4f}")
        assert rmse < 0.12


def test_one_consistency_step_beats_one_flow_step_and_many_flow_steps_are_good():
    """4-d, 8 contexts with 3 modes each. Energy distance: floor -0.002, the wrong context 1.35.

    Four seeds: TrigFlow 0.84 to 0.90 with 1 step, 0.012 to 0.015 with 20; consistency with 1 step
    0.06 to 0.07 from scratch, 0.06 to 0.09 after TrigFlow. With x_t frozen in the derivative: 0.21.
    """
    modes = torch.randn(8, 3, 4, generator=torch.Generator().manual_seed(0))

    def data(c):
        mu = modes[c, torch.randint(0, 3, c.shape)]
        return 0.95 * mu + 0.2 * torch.randn(mu.shape)

    def batch():
        c = torch.randint(0, 8, (128,))
        return torch.eye(8)[c], data(c)

    def score(head, steps):
        torch.manual_seed(5)
        c = torch.arange(8)[:, None].expand(8, 300)
        return energy(head.sample(torch.eye(8)[c], steps=steps), data(c))
    new = lambda name: tiny(name, 4, 8, perturb=False, width=64)
    flow = train(new("trigflow"), batch, 300, 6e-3)
    after = new("consistency")
    after.load_flow(flow.state_dict())
    after = train(after, batch, 100, 3e-3)  # TrigFlow's weights, then consistency
    scratch = train(new("consistency"), batch, 300, 6e-3)
    flow_1, flow_20 = score(flow, 1), score(flow, 20)
    scratch_1, after_1 = score(scratch, 1), score(after, 1)
    print(f"TrigFlow 1 step {flow_1:.3f}, 20 steps {flow_20:.3f}; consistency 1 step from scratch "
          f"{scratch_1:.3f}, after TrigFlow {after_1:.3f}")
    assert flow_1 > 0.6 and flow_20 < 0.05
    assert scratch_1 < flow_1 / 6 and after_1 < flow_1 / 6


def test_the_norm_of_embedded_times_divides_by_the_std_and_learns_through_the_jvp():
    head = tiny("lsd", time_norm=True, distill=0.5)
    h = torch.randn(5, 32, dtype=torch.float64)
    norm = head.net.until[3].double()
    torch.testing.assert_close(norm(h),
                               norm.weight * h / (h.std(-1, keepdim=True)**2 + 1e-5).sqrt())
    head.double().loss(torch.randn(8, 6).double(), torch.randn(8, 4).double())[0].mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in head.net.parameters())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("multiplier", [1, 4])
def test_metrics_of_a_padded_batch_are_those_of_its_valid_positions(name, multiplier, monkeypatch):
    """Fault: on CUDA, where shapes are static, loss_* and tangent_* were means over padding too."""
    head = tiny(name, multiplier=multiplier)
    z = 3 * torch.randn(7, 6)
    x = 3 * torch.randn(7, 4)
    weight = torch.tensor([1, 1, 0, 1, 0, 1, 0]).bool()
    z[~weight] *= 100

    # every position keeps its noise and times
    repeats = (multiplier,) if multiplier > 1 else ()
    eps = torch.randn(*repeats, 7, 4)
    u = torch.randn(*repeats, 7)
    other = torch.randn(7)
    positions = torch.arange(7)

    def sample_noise(x, cfg, source):
        return eps[..., positions, :], u[..., positions]
    monkeypatch.setattr(heads, "sample_noise_and_log_ratio", sample_noise)
    monkeypatch.setattr(heads, "normal", lambda shape, *_: other[positions].expand(shape))

    padded, metrics = head.loss(z, x, weight)
    positions = positions[weight]
    alone, expected = head.loss(z[weight], x[weight])
    torch.testing.assert_close(padded[weight], alone)
    assert metrics.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(metrics[key], expected[key])
