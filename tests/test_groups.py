"`discriminative` against fastai's slices, and our optimizers through timm's factory."
import builtins
import copy
import logging
from itertools import combinations
from typing import NamedTuple

import pytest
import torch

from optimizers_explained import optim
from optimizers_explained.groups import (
    AS_TIMM, TIMM_NAMES, TimmLamb, discriminative, plot_groups, register_timm, treemap)
from optimizers_explained.problems import convnet, max_diff, mlp


def parts(n=4):
    weights = torch.ones(n, 2, dtype=torch.float64)
    return [[w.clone().requires_grad_()] for w in weights]


def rates(lr, n=4): return [g['lr'] for g in discriminative(parts(n), lr)]


def weight(): return torch.ones(1, requires_grad=True)


SLICES = [0.1, [0.1, 0.2, 0.3, 0.4], slice(0.1), slice(1e-3, 0.1), slice(0.1, 1e-3)]


@pytest.mark.parametrize('lr', SLICES, ids=str)
@pytest.mark.parametrize('n', [1, 2, 4])
def test_discriminative_equals_fastai(lr, n):
    fastai = pytest.importorskip('fastai.optimizer', reason=
        'fastai is not installed: discriminative is not compared with it')
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
    def ours(ps, lr):
        return optim.SGDW(discriminative(ps, lr, weight_decay=0.01), momentum=0.9)
    want = run(lr, theirs, 10)
    assert max_diff(run(lr, ours, 10), want) < 1e-12
    assert max_diff(run(0.03, ours, 10), want) > 1e-3


def test_discriminative_groups():
    model = mlp()
    parts = [model[1], list(model[3].parameters())]
    groups = discriminative(parts, slice(1e-3, 1e-1), weight_decay=0.5, momentum=0.9)
    for group, layer in zip(groups, (model[1], model[3])):
        weight, bias = group['params']
        assert weight is layer.weight and bias is layer.bias
        assert group['weight_decay'] == 0.5 and group['momentum'] == 0.9
    for make in (torch.optim.SGD, optim.SGD):
        assert [g['lr'] for g in make(groups).param_groups] == [1e-3, 1e-1]
    groups = discriminative(iter(model[1].parameters()), 0.1)
    assert [len(g['params']) for g in groups] == [1, 1]


BAD_RATES = [
    ([0.1, 0.2], 'got 2 numbers for 4 parts'),
    ((0.1,)*5, 'got 5 numbers for 4 parts'),
    (slice(None), 'lr must be slice'),
    (slice(1e-3, None), 'lr must be slice'),
    (slice(1e-3, 1e-1, 2), 'lr must be slice'),
    (slice(0., 0.1), 'between numbers > 0'),
    (slice(-0.1, 0.1), 'between numbers > 0'),
    (slice(0.1, 0.), 'between numbers > 0'),
    (-0.1, 'lr must be a finite number >= 0, got -0.1'),
    (slice(-0.1), 'lr must be a finite number >= 0'),
    (float('nan'), 'lr must be a finite number >= 0, got nan'),
    ([0.1, 0.1, -1, 0.1], 'lr must be a finite number >= 0, got -1')]


@pytest.mark.parametrize('lr, message', BAD_RATES)
def test_discriminative_refuses_rates(lr, message):
    with pytest.raises(ValueError) as e: rates(lr)
    assert message in str(e.value)


def test_discriminative_refuses_parts():
    model = mlp()
    with pytest.raises(ValueError, match='parts is empty'): discriminative([], 0.1)
    with pytest.raises(ValueError, match=r'parts\[1\] of 2 has no parameters'):
        discriminative([model[1], model[2]], 0.1)
    repeats = r'parts\[1\] repeats a parameter of parts\[0\], of shape \(32, 64\)'
    with pytest.raises(ValueError, match=repeats):
        discriminative([model, model[1]], 0.1)


SIZES = [
    [1], [1, 1, 1, 1],
    [5, 1, 100, 3, 7, 7], [1]*50 + [1000]]


class Box(NamedTuple):
    left:float
    bottom:float
    width:float
    height:float

    @property
    def right(self): return self.left + self.width

    @property
    def top(self): return self.bottom + self.height

    @property
    def area(self): return self.width*self.height


def overlap(a, b):
    "Width and height of what two boxes share; at most 0 in one of them if nothing"
    width = min(a.right, b.right) - max(a.left, b.left)
    return width, min(a.top, b.top) - max(a.bottom, b.bottom)


@pytest.mark.parametrize('sizes', SIZES, ids=str)
def test_treemap_fills_the_box(sizes):
    boxes = [Box(*box) for box in treemap(sizes, (1., 2., 3., 4.))]
    want = [12*size/sum(sizes) for size in sizes]
    assert [box.area for box in boxes] == pytest.approx(want)
    for box in boxes:
        assert min(box.left - 1, 4 - box.right) >= -1e-9
        assert min(box.bottom - 2, 6 - box.top) >= -1e-9
    for a, b in combinations(boxes, 2): assert min(overlap(a, b)) < 1e-9


def test_plot_groups():
    plt = pytest.importorskip('matplotlib.pyplot', reason=
        'matplotlib is not installed: plot_groups is not tested')
    plt.switch_backend('agg')
    opt = optim.SGDW(discriminative([mlp()[1], mlp()[3]], slice(0.1)))
    legend = plot_groups(opt, 'lr').get_legend()
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels == ['0.01: 86.31%', '0.1: 13.69%']
    with pytest.raises(ValueError, match="key='nope' must stand in every group"):
        plot_groups(opt, 'nope')
    plt.close('all')


# -- timm's factory

@pytest.fixture
def timm_optim():
    module = pytest.importorskip('timm.optim', reason=
        'timm is not installed: register_timm is not tested')
    assert register_timm() == list(TIMM_NAMES)
    return module


def run(make_opt, seed=0, sched=None):
    "A convnet after five steps on random gradients."
    model, gen = convnet().double(), torch.Generator().manual_seed(seed)
    opt = make_opt(model)
    if sched: sched(opt)
    for _ in range(5):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=gen, dtype=p.dtype)
        opt.step()
    return list(model.parameters())


def filtered(model, weight_decay):
    small = [p for p in model.parameters() if p.ndim <= 1]
    large = [p for p in model.parameters() if p.ndim > 1]
    return [{'params': small, 'weight_decay': 0.},
            {'params': large, 'weight_decay': weight_decay}]


OURS = {name: cls for name, cls in TIMM_NAMES.items() if not name.startswith('oe_')}


@pytest.mark.parametrize('name', OURS)
def test_by_name_equals_by_hand(timm_optim, name):
    cls, kw = TIMM_NAMES[name], dict(lr=0.05)
    if 'sgd' in name or 'lars' in name: kw['momentum'] = 0.8
    def by_name(model):
        return timm_optim.create_optimizer_v2(model, name, weight_decay=0.02, **kw)
    def by_hand(model): return cls(filtered(model, 0.02), **kw)
    def more_decay(model): return cls(filtered(model, 0.03), **kw)
    def all_decay(model): return cls(model.parameters(), weight_decay=0.02, **kw)
    weights = run(by_name)
    assert max_diff(weights, run(by_hand)) == 0.
    # the filter matters, and the decay
    least = 1e-8 if 'lars' in name else 1e-4
    assert max_diff(weights, run(all_decay)) > least
    assert max_diff(weights, run(more_decay)) > least


SPEEDS = dict(loop=dict(foreach=False), foreach=dict(foreach=True),
              fused=dict(fused=True))
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
    "The norm is that of the gradients that the closure computed; a copy goes on alike."
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
        assert type(timm_optim.create_optimizer_v2([weight()], name, lr=0.1)) is cls
        registered = timm_optim.get_optimizer_info(name).opt_class
        assert issubclass(registered, torch.optim.Optimizer)


@pytest.mark.parametrize('name', TIMM_NAMES)
def test_layer_decay(timm_optim, name):
    from timm.scheduler import CosineLRScheduler
    model = convnet()
    model.pretrained_cfg = dict(classifier=f'{len(model) - 1}')
    kw = dict(lr=0.05, weight_decay=0.02, layer_decay=0.5)
    opt = timm_optim.create_optimizer_v2(model, name, **kw)
    assert {g['lr'] for g in opt.param_groups} == {0.05}
    assert len({g['lr_scale'] for g in opt.param_groups}) > 1
    CosineLRScheduler(opt, t_initial=10)
    assert all(g['lr'] == 0.05*g['lr_scale'] for g in opt.param_groups)
    for p in model.parameters(): p.grad = torch.ones_like(p)
    opt.step()


def test_arguments_reach_the_optimizer(timm_optim):
    def build(name, **kw):
        return timm_optim.create_optimizer_v2([weight()], name, **kw)
    def defaults(name, **kw): return build(name, **kw).defaults
    given = defaults('decoupled_sgdw', lr=0.1, momentum=0.7, nesterov=True)
    assert given['momentum'] == 0.7
    assert defaults('decoupled_sgdw', lr=0.1)['momentum'] == 0.9      # timm's default
    assert defaults('oe_sgd')['nesterov'] is True
    assert defaults('oe_momentum')['nesterov'] is False
    assert defaults('optim_sgd')['nesterov'] is False
    assert defaults('oe_adamw', betas=(0.8, 0.9), eps=1e-5)['betas'] == (0.8, 0.9)
    assert defaults('OE_Lion', lr=0.5)['lr'] == 0.5
    for name in 'decoupled_sgdw', 'optim_lars':
        words = 'lr is missing: .* has no default for it; pass lr=...'
        with pytest.raises(TypeError, match=words): build(name)
    assert build('oe_sgd', foreach=True).foreach is True
    assert build('oe_sgd', fused=True).fused is True
    with pytest.raises(TypeError, match='capturable'): build('oe_sgd', capturable=True)
    with pytest.raises(TypeError, match='momentun'): build('oe_sgd', momentun=0.9)


def test_registry(timm_optim, caplog):
    before = timm_optim.list_optimizers()
    with caplog.at_level(logging.WARNING): assert register_timm() == list(TIMM_NAMES)
    # the second time changes nothing, silently
    assert timm_optim.list_optimizers() == before and not caplog.records
    assert set(TIMM_NAMES) <= set(before)
    described = dict(timm_optim.list_optimizers(with_description=True))
    assert described['decoupled_sgdw'] == optim.DecoupledSGDW.__doc__
    def built(name):
        return type(timm_optim.create_optimizer_v2([weight()], name, lr=0.1))
    assert built('lookahead_decoupled_sgdw').__name__ == 'Lookahead'
    assert built('sgdw').__module__.startswith('timm')  # timm's own names stay its own
    assert built('sgd') is torch.optim.SGD
    with pytest.raises(ValueError): built('no_such_name')


def test_timm_missing(monkeypatch):
    real = builtins.__import__
    def no_timm(name, *args, **kwargs):
        if name.split('.')[0] != 'timm': return real(name, *args, **kwargs)
        raise ModuleNotFoundError("No module named 'timm'")
    monkeypatch.setattr(builtins, '__import__', no_timm)
    with pytest.raises(ImportError, match='timm >= 1.0.12'): register_timm()
