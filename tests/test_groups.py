"`discriminative` against fastai's slices, and our optimizers through timm's own factory."
import builtins
import copy
import logging

import pytest
import torch

from optimizers_explained import optim
from optimizers_explained.groups import (
    AS_TIMM, TIMM_NAMES, TimmLamb, discriminative, plot_groups, register_timm, treemap)
from optimizers_explained.problems import convnet, max_diff, mlp


def parts(n=4): return [[torch.ones(2, dtype=torch.float64, requires_grad=True)] for _ in range(n)]


def rates(lr, n=4): return [g['lr'] for g in discriminative(parts(n), lr)]


SLICES = [0.1, [0.1, 0.2, 0.3, 0.4], slice(0.1), slice(1e-3, 0.1), slice(0.1, 1e-3)]


@pytest.mark.parametrize('lr', SLICES, ids=str)
@pytest.mark.parametrize('n', [1, 2, 4])
def test_discriminative_equals_fastai(lr, n):
    fastai = pytest.importorskip('fastai.optimizer', reason='fastai is not installed: discriminative is not compared with it')
    if isinstance(lr, list): lr = lr[:n]
    def run(lr, make, step):
        ps, gen = parts(n), torch.Generator().manual_seed(0)
        opt = make(ps, lr)
        for _ in range(step):
            for (p,) in ps: p.grad = torch.randn(2, generator=gen, dtype=torch.float64)
            opt.step()
        return [p for (p,) in ps]
    def theirs(ps, lr):
        opt = fastai.SGD(ps, lr=1., mom=0.9, wd=0.01)
        opt.set_hyper('lr', lr)
        return opt
    ours = lambda ps, lr: optim.SGDW(discriminative(ps, lr, weight_decay=0.01), momentum=0.9)
    want = run(lr, theirs, 10)
    assert max_diff(run(lr, ours, 10), want) < 1e-12
    assert max_diff(run(0.03, ours, 10), want) > 1e-3


def test_discriminative_groups():
    model = mlp()
    groups = discriminative([model[1], list(model[3].parameters())], slice(1e-3, 1e-1), weight_decay=0.5, momentum=0.9)
    assert [p is q for g, m in zip(groups, (model[1], model[3])) for p, q in zip(g['params'], m.parameters())] == [True]*4
    assert [(g['weight_decay'], g['momentum']) for g in groups] == [(0.5, 0.9)]*2
    for make in (torch.optim.SGD, optim.SGD): assert [g['lr'] for g in make(groups).param_groups] == [1e-3, 1e-1]
    assert [len(g['params']) for g in discriminative(iter(model[1].parameters()), 0.1)] == [1, 1]


@pytest.mark.parametrize('lr, message', [
    ([0.1, 0.2], 'got 2 numbers for 4 parts'), ((0.1,)*5, 'got 5 numbers for 4 parts'),
    (slice(None), 'lr must be slice'), (slice(1e-3, None), 'lr must be slice'),
    (slice(1e-3, 1e-1, 2), 'lr must be slice'), (slice(0., 0.1), 'between numbers > 0'), (slice(-0.1, 0.1), 'between numbers > 0'),
    (slice(0.1, 0.), 'between numbers > 0'), (-0.1, 'lr must be a number >= 0, got -0.1'), (slice(-0.1), 'lr must be a number >= 0'),
    (float('nan'), 'lr must be a number >= 0, got nan'), ([0.1, 0.1, -1, 0.1], 'lr must be a number >= 0, got -1')])
def test_discriminative_refuses_rates(lr, message):
    with pytest.raises(ValueError) as e: rates(lr)
    assert message in str(e.value)


def test_discriminative_refuses_parts():
    model = mlp()
    with pytest.raises(ValueError, match='parts is empty'): discriminative([], 0.1)
    with pytest.raises(ValueError, match=r'parts\[1\] of 2 has no parameters'): discriminative([model[1], model[2]], 0.1)
    with pytest.raises(ValueError, match=r'parts\[1\] repeats a parameter of parts\[0\], of shape \(32, 64\)'):
        discriminative([model, model[1]], 0.1)


@pytest.mark.parametrize('sizes', [[1], [1, 1, 1, 1], [5, 1, 100, 3, 7, 7], [1]*50 + [1000]], ids=str)
def test_treemap_fills_the_box(sizes):
    boxes = treemap(sizes, (1., 2., 3., 4.))
    assert [w*h for _, _, w, h in boxes] == pytest.approx([12*s/sum(sizes) for s in sizes])
    for x, y, w, h in boxes: assert 1 - 1e-9 <= x and x + w <= 4 + 1e-9 and 2 - 1e-9 <= y and y + h <= 6 + 1e-9
    for i, (x, y, w, h) in enumerate(boxes):
        for u, v, s, t in boxes[:i]: assert min(x + w, u + s) - max(x, u) < 1e-9 or min(y + h, v + t) - max(y, v) < 1e-9   # no overlap


def test_plot_groups():
    plt = pytest.importorskip('matplotlib.pyplot', reason='matplotlib is not installed: plot_groups is not tested')
    plt.switch_backend('agg')
    opt = optim.SGDW(discriminative([mlp()[1], mlp()[3]], slice(0.1)))
    ax = plot_groups(opt, 'lr')
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ['0.01: 86.31%', '0.1: 13.69%']
    with pytest.raises(ValueError, match="key='nope' must stand in every group"): plot_groups(opt, 'nope')
    plt.close('all')


# -- timm's factory

@pytest.fixture
def timm_optim():
    module = pytest.importorskip('timm.optim', reason='timm is not installed: register_timm is not tested')
    assert register_timm() == list(TIMM_NAMES)
    return module


def run(make_opt, seed=0, sched=None):
    "A convnet after five steps on random gradients."
    model, gen = convnet().double(), torch.Generator().manual_seed(seed)
    opt = make_opt(model)
    if sched: sched(opt)
    for _ in range(5):
        for p in model.parameters(): p.grad = torch.randn(p.shape, generator=gen, dtype=p.dtype)
        opt.step()
    return list(model.parameters())


def filtered(model, weight_decay):
    small = lambda yes: [p for p in model.parameters() if (p.ndim <= 1) == yes]
    return [{'params': small(True), 'weight_decay': 0.}, {'params': small(False), 'weight_decay': weight_decay}]


OURS = {name: cls for name, cls in TIMM_NAMES.items() if not name.startswith('oe_')}


@pytest.mark.parametrize('name', OURS)
def test_by_name_equals_by_hand(timm_optim, name):
    make, kw = TIMM_NAMES[name], dict(lr=0.05)
    if 'sgd' in name or 'lars' in name: kw['momentum'] = 0.8
    by_name = run(lambda m: timm_optim.create_optimizer_v2(m, name, weight_decay=0.02, **kw))
    assert max_diff(by_name, run(lambda m: make(filtered(m, 0.02), **kw))) == 0.
    # the filter matters, and the decay
    least = 1e-8 if 'lars' in name else 1e-4
    all_decay = run(lambda m: make(m.parameters(), weight_decay=0.02, **kw))
    assert max_diff(by_name, all_decay) > least
    assert max_diff(by_name, run(lambda m: make(filtered(m, 0.03), **kw))) > least


SPEEDS = dict(loop=dict(foreach=False), foreach=dict(foreach=True), fused=dict(fused=True))
RECIPES = dict(
    defaults={}, rate=dict(lr=0.02), decay=dict(lr=0.02, weight_decay=0.05),
    momentum=dict(lr=0.02, weight_decay=0.05, momentum=0.5),
    layers=dict(lr=0.02, weight_decay=0.05, layer_decay=0.5))


@pytest.mark.filterwarnings('ignore:fused=True, and still')
@pytest.mark.parametrize('speed', SPEEDS)
@pytest.mark.parametrize('recipe', RECIPES)
@pytest.mark.parametrize('name', AS_TIMM)
def test_oe_names_mean_what_timm_means(timm_optim, name, recipe, speed):
    "Through the factory, defaults included, under timm's own scheduler."
    from timm.scheduler import CosineLRScheduler
    def build(name, **more):
        def make(model):
            model.pretrained_cfg = dict(classifier=f'{len(model) - 1}')
            arguments = {**RECIPES[recipe], **more}
            return timm_optim.create_optimizer_v2(model, name, **arguments)
        return run(make, sched=lambda opt: CosineLRScheduler(opt, t_initial=10))
    want = build(name)
    assert max_diff(build(f'oe_{name}', **SPEEDS[speed]), want) < 1e-12
    assert max_diff(build(f'oe_{name}', lr=0.03), want) > 1e-7


def built(timm_optim, name, **more):
    "The parameters after a run with this name."
    kw = dict(lr=0.02, weight_decay=0.05, **more)
    return run(lambda model: timm_optim.create_optimizer_v2(model, name, **kw))


@pytest.mark.parametrize('name', ['sgd', 'sgdw', 'lars', 'lamb'])
def test_the_two_kinds_of_names_differ(timm_optim, name):
    "What the names of `optim` mean is another thing, so the comparison above can fail."
    assert max_diff(built(timm_optim, f'optim_{name}'), built(timm_optim, name)) > 1e-6


def test_timms_lamb_shortens_the_gradient(timm_optim):
    for limit in (None, 0.5, 1e9):
        names = 'oe_lamb', 'lamb'
        ours, theirs = (built(timm_optim, n, max_grad_norm=limit) for n in names)
        assert max_diff(ours, theirs) < 1e-12
    runs = [built(timm_optim, 'oe_lamb', max_grad_norm=limit) for limit in (None, 0.5)]
    assert max_diff(*runs) > 1e-8


def test_timms_lamb_with_a_closure_and_a_copy():
    "The norm is that of the gradients which the closure computed; a copy goes on alike."
    def norm_of(opt, p):
        def closure():
            p.grad = torch.full_like(p, 3.)
            return p.sum()
        opt.step(closure)
        return opt.param_groups[0]['grad_norm']
    p = torch.ones(4, dtype=torch.float64, requires_grad=True)
    opt = TimmLamb([p])
    assert norm_of(opt, p) == 6.
    other, q = copy.deepcopy((opt, p))
    norm_of(opt, p), norm_of(other, q)
    assert torch.equal(p, q)


def test_every_class_of_optim_is_registered(timm_optim):
    "A class that is new in `optim` needs no entry anywhere."
    assert set(OURS.values()) == {getattr(optim, name) for name in optim.__all__}
    for name, cls in TIMM_NAMES.items():
        w = torch.ones(1, requires_grad=True)
        assert type(timm_optim.create_optimizer_v2([w], name, lr=0.1)) is cls
        registered = timm_optim.get_optimizer_info(name).opt_class
        assert issubclass(registered, torch.optim.Optimizer)


@pytest.mark.parametrize('name', TIMM_NAMES)
def test_layer_decay(timm_optim, name):
    from timm.scheduler import CosineLRScheduler
    model = convnet()
    model.pretrained_cfg = dict(classifier=f'{len(model) - 1}')
    opt = timm_optim.create_optimizer_v2(model, name, lr=0.05, weight_decay=0.02, layer_decay=0.5)
    assert {g['lr'] for g in opt.param_groups} == {0.05} and len({g['lr_scale'] for g in opt.param_groups}) > 1
    CosineLRScheduler(opt, t_initial=10)
    assert all(g['lr'] == 0.05*g['lr_scale'] for g in opt.param_groups)
    for p in model.parameters(): p.grad = torch.ones_like(p)
    opt.step()


def test_arguments_reach_the_optimizer(timm_optim):
    ps = lambda: [torch.ones(1, requires_grad=True)]
    build = lambda name, **kw: timm_optim.create_optimizer_v2(ps(), name, **kw).defaults
    assert build('decoupled_sgdw', lr=0.1, momentum=0.7, nesterov=True)['momentum'] == 0.7
    assert build('decoupled_sgdw', lr=0.1)['momentum'] == 0.9                  # timm's default momentum
    nesterov = {n: build(n)['nesterov'] for n in ('oe_sgd', 'oe_momentum', 'optim_sgd')}
    assert nesterov == dict(oe_sgd=True, oe_momentum=False, optim_sgd=False)
    assert build('oe_adamw', betas=(0.8, 0.9), eps=1e-5)['betas'] == (0.8, 0.9)
    assert build('OE_Lion', lr=0.5)['lr'] == 0.5
    for name in 'decoupled_sgdw', 'optim_lars':
        words = 'lr is missing: .* has no default for it; pass lr=...'
        with pytest.raises(TypeError, match=words): build(name)
    assert timm_optim.create_optimizer_v2(ps(), 'oe_sgd', foreach=True).foreach is True
    assert timm_optim.create_optimizer_v2(ps(), 'oe_sgd', fused=True).fused is True
    with pytest.raises(TypeError, match='capturable'): build('oe_sgd', capturable=True)
    with pytest.raises(TypeError, match='momentun'): build('oe_sgd', momentun=0.9)


def test_registry(timm_optim, caplog):
    before = timm_optim.list_optimizers()
    with caplog.at_level(logging.WARNING): assert register_timm() == list(TIMM_NAMES)
    assert timm_optim.list_optimizers() == before and not caplog.records            # the second time changes nothing, silently
    assert set(TIMM_NAMES) <= set(before)
    assert dict(timm_optim.list_optimizers(with_description=True))['decoupled_sgdw'] == optim.DecoupledSGDW.__doc__
    ps = [torch.ones(1, requires_grad=True)]
    assert type(timm_optim.create_optimizer_v2(ps, 'lookahead_decoupled_sgdw', lr=0.1)).__name__ == 'Lookahead'
    assert type(timm_optim.create_optimizer_v2(ps, 'sgdw', lr=0.1)).__module__.startswith('timm')       # timm's own names stay its own
    assert type(timm_optim.create_optimizer_v2(ps, 'sgd', lr=0.1)) is torch.optim.SGD
    with pytest.raises(ValueError): timm_optim.create_optimizer_v2(ps, 'no_such_name', lr=0.1)


def test_timm_missing(monkeypatch):
    real = builtins.__import__
    def no_timm(name, *args, **kwargs):
        if name.split('.')[0] == 'timm': raise ModuleNotFoundError("No module named 'timm'")
        return real(name, *args, **kwargs)
    monkeypatch.setattr(builtins, '__import__', no_timm)
    with pytest.raises(ImportError, match='timm >= 1.0.12'): register_timm()
