"""The port of fastai's Optimizer and the installed fastai: equal to the last bit in
float64, and where they differ on purpose."""
import copy
import importlib
import pickle
import warnings
from functools import partial
from itertools import product
from typing import Callable, NamedTuple

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from optimizers_explained import callback as ours
from optimizers_explained.problems import max_diff

STEPS = 30
LRS = dict(value=0.05, list=[0.01, 0.02, 0.05], slice_end=slice(0.05),
           slice=slice(1e-3, 0.05))

class Case(NamedTuple):
    "A training run: the optimizer, and what happens to it on the way"
    mom:float = 0.9
    decay:str = 'decoupled' # or none, l2
    dampening:bool = False
    lrs:str = 'value' # a key of `LRS`
    frozen:bool = False # freeze after 8 and 14 steps, unfreeze after 22
    schedule:bool = False # set lr, mom and wd before each step
    reload:bool = False # into a new optimizer after 17 steps

OPTIMIZERS = list(product(
    (0., 0.9), ('none', 'decoupled', 'l2'), (False, True), LRS))
EVENTS = list(product((False, True), (False, True), (False, True)))

@pytest.fixture(scope='module')
def fai():
    "fastai's optimizer module; without fastai the comparisons are skipped, and say so"
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        pytest.importorskip('fastai', reason=
            'fastai is not installed (extra `test`): the comparison with it is skipped')
        return importlib.import_module('fastai.optimizer')

class Net:
    """Three groups of two parameters, with gradients as autograd leaves them: added up
    where `requires_grad`, else as they were"""
    def __init__(self, seed=0):
        gen = torch.Generator().manual_seed(seed)
        self.groups = []
        for _ in range(3):
            matrix = torch.randn(3, 3, generator=gen, dtype=torch.float64)
            vector = torch.randn(3, generator=gen, dtype=torch.float64)
            self.groups.append([matrix.requires_grad_(), vector.requires_grad_()])

    @property
    def params(self): return [p for group in self.groups for p in group]

    @property
    def values(self): return [p.detach().clone() for p in self.params]

    @property
    def training(self): return [p.requires_grad for p in self.params]

    @torch.no_grad()
    def backward(self, i): # another slope at each step
        for p in self.params:
            if not p.requires_grad: continue
            g = (2*p + 0.3*i).sin_()
            p.grad = g if p.grad is None else p.grad.add_(g)

    def train_step(self, opt, i, **kw):
        self.backward(i)
        opt.step()
        opt.zero_grad(**kw)

def hypers(opt): return [dict(hyper) for hyper in opt.hypers]

def build(lib, groups, case, lr):
    wd = 0. if case.decay == 'none' else 0.1
    kw = dict(lr=lr, mom=case.mom, wd=wd)
    if not case.dampening: return lib.SGD(groups, decouple_wd=case.decay != 'l2', **kw)
    decay = lib.l2_reg if case.decay == 'l2' else lib.weight_decay
    cbs = [decay, lib.average_grad, lib.momentum_step]
    return lib.Optimizer(groups, cbs, dampening=True, **kw)

def scaled(lr, factor):
    if isinstance(lr, slice): return slice(lr.start, lr.stop*factor)
    return [o*factor for o in lr] if isinstance(lr, list) else lr*factor

class Trained(NamedTuple):
    values:list
    hypers:list

def run(lib, case):
    net, lr = Net(), LRS[case.lrs]
    opt = build(lib, net.groups, case, lr)
    for i in range(STEPS):
        if case.frozen and i == 8: opt.freeze()
        if case.frozen and i == 14: opt.freeze_to(-2)
        if case.frozen and i == 22: opt.unfreeze()
        if case.reload and i == 17:
            saved = opt.state_dict()
            opt = build(lib, net.groups, case, LRS['value'])
            opt.load_state_dict(saved)
        if case.schedule:
            opt.set_hyper('lr', scaled(lr, 1/(1 + 0.1*i)))
            opt.set_hypers(mom=0.95 - 0.01*i, wd=0.02*(i % 7))
        net.train_step(opt, i)
    return Trained(net.values, hypers(opt))

# ---- the numbers

@pytest.mark.parametrize('mom,decay,dampening,lrs', OPTIMIZERS)
def test_equal_to_fastai(fai, mom, decay, dampening, lrs):
    for frozen, schedule, reload in EVENTS:
        case = Case(mom, decay, dampening, lrs, frozen, schedule, reload)
        port, fastais = run(ours, case), run(fai, case)
        assert max_diff(port.values, fastais.values) == 0., case
        assert port.hypers == fastais.hypers, case
        assert max_diff(port.values, Net().values) > 1e-2, 'nothing moved'

# had the option been ignored, the runs compared above would have come out alike
CHANGES = [
    dict(mom=0.), dict(mom=0.899), dict(decay='none'), dict(decay='l2'),
    dict(dampening=True), dict(lrs='list'), dict(lrs='slice_end'), dict(lrs='slice'),
    dict(frozen=True), dict(schedule=True)]

@pytest.mark.parametrize('change', CHANGES, ids=str)
def test_each_option_changes_the_numbers(change):
    assert max_diff(run(ours, Case()).values, run(ours, Case(**change)).values) > 1e-4

def test_losing_the_state_midway_changes_the_numbers(monkeypatch):
    kept = run(ours, Case(reload=True)).values
    assert max_diff(kept, run(ours, Case()).values) == 0.
    monkeypatch.setattr(ours.Optimizer, 'load_state_dict', lambda self, sd: None)
    assert max_diff(kept, run(ours, Case(reload=True)).values) > 1e-4

@pytest.mark.parametrize('form', ['hyper', 'partial', 'state'])
def test_dampening_reaches_the_stepper_every_way(fai, form):
    def go(lib):
        net, average, kw = Net(), lib.average_grad, dict(lr=0.05, mom=0.9, wd=0.1)
        if form == 'hyper': kw['dampening'] = True
        if form == 'partial': average = partial(average, dampening=True)
        cbs = [lib.weight_decay, average, lib.momentum_step]
        opt = lib.Optimizer(net.groups, cbs, **kw)
        if form == 'state': opt.state[net.groups[1][0]]['dampening'] = True
        for i in range(STEPS): net.train_step(opt, i)
        return net.values
    assert max_diff(go(ours), go(fai)) == 0.
    assert max_diff(go(ours), run(ours, Case()).values) > 1e-4

def test_flags_in_the_state(fai):
    def go(lib, flags=True):
        net = Net()
        opt = lib.SGD(net.groups, lr=0.05, mom=0.9, wd=0.1)
        if flags: opt.state[net.groups[0][0]].update(do_wd=False, force_train=True)
        for i in range(STEPS):
            if i == 10:
                opt.freeze()
                opt.clear_state()
            net.train_step(opt, i)
        return net, opt.state_dict()['state']
    (net, states), (other, other_states) = go(ours), go(fai)
    assert max_diff(net.values, other.values) == 0.
    assert net.training == other.training == [True, False, False, False, True, True]
    assert [set(s) for s in states] == [set(s) for s in other_states]
    assert states[0]['do_wd'] is False
    assert max_diff(net.values, go(ours, flags=False)[0].values) > 1e-4

def rates(lib, n, lr):
    groups = [[torch.zeros(1)] for _ in range(n)]
    return [hyper['lr'] for hyper in lib.SGD(groups, lr=lr).hypers]

FOR_ANY_NUMBER = [
    0.3, [0.3], slice(0.1), slice(1e-3, 0.1), slice(3e-4, 2.), slice(0.7, 0.01),
    slice(-1., -0.1), slice(0., 0.1)]
FITTING = [*product(FOR_ANY_NUMBER, (1, 2, 3, 7)),
           ([0.1, 0.2, 0.3], 3), ((0.1, 0.2, 0.3), 3), (range(3), 3)]

@pytest.mark.parametrize('v,n', FITTING, ids=str)
def test_values_per_group(fai, v, n): assert rates(ours, n, v) == rates(fai, n, v)

def test_a_generator_of_values(): assert rates(ours, 2, iter([1., 2.])) == [1., 2.]

STEPPERS = ['sgd_step', 'weight_decay', 'l2_reg', 'average_grad', 'momentum_step']

@pytest.mark.parametrize('name', STEPPERS)
def test_steppers(fai, name):
    def go(lib, wd=0.2, dampening=True, **kw):
        p = torch.tensor([1., -2.], dtype=torch.float64, requires_grad=True)
        p.grad = torch.tensor([0.3, 0.7], dtype=torch.float64)
        avg = torch.tensor([0.5, 1.5], dtype=torch.float64)
        out = getattr(lib, name)(p, lr=0.1, mom=0.9, wd=wd, dampening=dampening,
                                 grad_avg=avg, other=1, **kw)
        return [p.detach(), p.grad, *(out or {}).values()]
    f, g = getattr(ours, name), getattr(fai, name)
    assert getattr(f, 'defaults', None) == getattr(g, 'defaults', None)
    assert max_diff(go(ours), go(fai)) == 0.
    assert max_diff(go(ours, do_wd=False), go(fai, do_wd=False)) == 0.
    if name in ('weight_decay', 'l2_reg'):
        assert max_diff(go(ours), go(ours, wd=0.1)) > 1e-3
    if name == 'average_grad':
        assert max_diff(go(ours), go(ours, dampening=False)) > 1e-3

def test_only_l2_writes_into_the_gradient():
    def change(decay):
        net = Net()
        net.backward(0)
        before = [p.grad.clone() for p in net.params]
        build(ours, net.groups, Case(decay=decay), lr=0.05).step()
        return max_diff(before, [p.grad for p in net.params])
    assert change('decoupled') == 0.
    assert change('l2') > 0.

# ---- the merge

def with_gradient():
    p = torch.ones(1, dtype=torch.float64, requires_grad=True)
    p.grad = torch.ones_like(p)
    return p

def test_group_beats_state_beats_signature(fai):
    seen = {}
    def probe(p, a=0, b=0, c=0, **kw): seen.update(a=a, b=b, c=c)
    probe.defaults = dict(a=1)
    for lib in (ours, fai):
        p = with_gradient()
        opt = lib.Optimizer([p], probe)
        opt.state[p].update(a=2, b=2)
        opt.step()
        assert seen == dict(a=1, b=2, c=0)
    def later(p, **kw): pass
    later.defaults = dict(a=5)
    for lib in (ours, fai):
        assert hypers(lib.Optimizer([p], [probe, later])) == [{'a': 5}]
        assert hypers(lib.Optimizer([p], [probe, later], a=9)) == [{'a': 9}]

def test_what_a_callback_returns(fai):
    """A dictionary is stored, also under a hyperparameter's name, which then never
    arrives; anything else is ignored"""
    def go(lib, ret):
        p = with_gradient()
        opt = lib.Optimizer([p], [lambda p, **kw: ret, lib.sgd_step], lr=0.1)
        for _ in range(2): opt.step()
        return p.item(), dict(opt.state[p])
    for ret in ({'lr': 9.}, {'n': 3}, None, torch.ones(2)):
        assert go(ours, ret) == go(fai, ret)
    assert go(ours, {'lr': 9.})[1] == {'lr': 9.}

def test_unset_hypers_and_typos(fai):
    for lib in (ours, fai):
        p = with_gradient()
        no_lr = lib.Optimizer([p], lib.sgd_step)
        with pytest.raises(TypeError, match='lr'): no_lr.step()
        opt = lib.SGD([p], lr=0.1)
        opt.set_hypers(learning_rate=9., mom=0.9)         # stored, never read
        opt.step()
        assert p.item() == pytest.approx(0.9) and not opt.state[p]

# ---- gradients, freezing

def test_no_gradient_no_change():
    net = Net()
    opt, before = ours.SGD(net.groups, lr=0.1, mom=0.9, wd=0.1), net.values
    opt.step()
    assert max_diff(net.values, before) == 0. and opt.state_dict()['state'] == [{}]*6

@pytest.mark.parametrize('none', [False, True])
def test_frozen_after_training_still_shrinks(none):
    net = Net()
    opt = ours.SGD(net.groups, lr=0.1, wd=0.1)
    net.train_step(opt, 0)
    opt.freeze()
    if none: opt.zero_grad(set_to_none=True)
    before = net.values
    for i in range(30): net.train_step(opt, i, set_to_none=none)
    left = 1 if none else 0.99**30
    for a, b in zip(net.values[:4], before[:4]):
        torch.testing.assert_close(a, b*left, rtol=1e-12, atol=0)
    assert max_diff(net.values[4:], before[4:]) > 1e-3

@pytest.mark.parametrize('n', [0, 1, 2, 3, 5, -1, -2, -3, -5])
def test_freeze_to(fai, n):
    def go(lib):
        net = Net()
        opt = lib.SGD(net.groups, lr=0.1)
        opt.state[net.groups[0][0]]['force_train'] = True
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            opt.freeze_to(n)
        return net.training, len(caught), max(opt.frozen_idx, 0)
    assert go(ours) == go(fai)
    _, warned, _ = go(ours)
    assert warned == (1 if n >= 3 else 0)

def test_zero_grad_and_closure(fai):
    for lib in (ours, fai):
        net = Net()
        net.backward(0)
        opt = lib.SGD(net.groups, lr=0.1)
        opt.zero_grad()
        for p, *_ in opt.all_params():
            assert (p.grad == 0).all() and not p.grad.requires_grad
        with pytest.raises(NotImplementedError, match='closure'): opt.step(lambda: 0.)
        with pytest.raises(TypeError, match='not an Optimizer'):
            lr_scheduler.StepLR(opt, 1)

# ---- all_params, param_groups

def test_all_params(fai):
    net = Net()
    first = net.groups[0][0]
    first.grad = torch.zeros(3, 3, dtype=torch.float64)
    opt = ours.SGD(net.groups, lr=slice(0.1), mom=0.9)
    ref = fai.SGD(net.groups, lr=slice(0.1), mom=0.9)
    choices = [{}, dict(with_grad=True), dict(n=slice(1)), dict(n=slice(-1, None)),
               dict(n=slice(1, None), with_grad=True)]
    for kw in choices:
        rows, refs = opt.all_params(**kw), ref.all_params(**kw)
        assert len(rows) == len(refs)
        for (p, _, _, hyper), (q, _, _, ref_hyper) in zip(rows, refs):
            assert p is q and dict(hyper) == dict(ref_hyper)
    assert [p for p, *_ in opt.all_params(-1)] == net.groups[2]
    _, _, state, _ = opt.all_params()[0]
    assert state is opt.state[first]

def test_param_groups_both_ways(fai):
    def go(lib):
        net = Net()
        opt = lib.SGD(net.groups, lr=0.1, mom=0.9)
        opt.param_groups[0]['lr'] = 9.
        read = own_keys(opt)
        groups = opt.param_groups
        for i, g in enumerate(groups): g.update(lr=i, new=3)
        opt.param_groups = groups
        return read, hypers(opt), [len(g['params']) for g in opt.param_groups]
    assert go(ours) == go(fai)
    read, written, _ = go(ours)
    assert read[0]['lr'] == 0.1 and written[2]['lr'] == 2

def test_param_groups_replaces_parameters():
    net, new = Net(), Net(seed=1)
    opt = ours.SGD(net.groups, lr=0.1)
    opt.param_groups = [{'params': g, 'lr': 0.2} for g in new.groups]
    new.backward(0)
    net.backward(0)
    before = net.values
    opt.step()
    assert max_diff(net.values, before) == 0.
    assert max_diff(new.values, Net(seed=1).values) > 1e-3
    groups = opt.param_groups
    for wrong, n in ((groups[:2], 2), (groups + groups[:1], 4)):
        with pytest.raises(ValueError, match=f'{n} groups, the optimizer has 3'):
            opt.param_groups = wrong

# ---- saving and loading

def trained():
    net = Net()
    opt = ours.SGD(net.groups, lr=slice(0.01, 0.1), mom=0.9, wd=0.1)
    for i in range(3): net.train_step(opt, i)
    return net, opt

def buffers(opt): return [state['grad_avg'] for state in opt.state_dict()['state']]

def test_loaded_state_is_a_copy():
    _, a = trained()
    b, sd = ours.SGD(Net().groups, lr=0.5, mom=0.9), a.state_dict()
    b.load_state_dict(sd)
    before, buffers_before = copy.deepcopy((b.state_dict(), buffers(b)))
    sd['state'][0]['grad_avg'].fill_(99.)
    sd['state'][1].clear()
    sd['hypers'][0]['lr'] = 99.
    sd['hypers'].pop()
    a.set_hyper('lr', 7.)
    a.clear_state()
    assert hypers(b) == before['hypers']
    assert len(b.hypers) == 3 and b.hypers[0]['lr'] == 0.01
    assert max_diff(buffers(b), buffers_before) == 0.
    b.set_hyper('lr', 1.)
    assert before['hypers'][0]['lr'] == 0.01

def test_fastai_aliases_what_we_copy(fai):
    net = Net()
    net.backward(0)
    a = fai.SGD(net.groups, lr=0.1, mom=0.9)
    b = fai.SGD(Net().groups, lr=0.5, mom=0.9)
    a.step()
    b.load_state_dict(a.state_dict())
    a.set_hyper('lr', 7.)
    assert b.hypers[0]['lr'] == 7.

def test_state_dicts_are_interchangeable_with_fastai(fai):
    net, opt = trained()
    ref = fai.SGD(net.groups, lr=0.1, mom=0.9)
    ref.load_state_dict(copy.deepcopy(opt.state_dict()))
    back = ours.SGD(net.groups, lr=0.1, mom=0.9)
    back.load_state_dict(ref.state_dict())
    assert hypers(back) == hypers(opt)
    assert max_diff(buffers(back), buffers(opt)) == 0.

def test_state_dict_survives_a_file(tmp_path):
    _, opt = trained()
    torch.save(opt.state_dict(), tmp_path/'opt.pt')
    sd = torch.load(tmp_path/'opt.pt', weights_only=True)
    assert sd['hypers'] == opt.state_dict()['hypers']
    assert pickle.loads(pickle.dumps(opt)).hypers == opt.hypers
    assert copy.deepcopy(opt).hypers == opt.hypers

def books(opt): return hypers(opt), opt.frozen_idx, [set(s) for s in opt.state.values()]

def unchanged(opt, f, error, match):
    before = copy.deepcopy(books(opt))
    with pytest.raises(error, match=match): f(opt)
    assert before == books(opt)

def test_wrong_state_dicts_are_refused():
    _, opt = trained()
    states, hypers = opt.state_dict()['state'], opt.state_dict()['hypers']
    def refused(sd, match):
        unchanged(opt, lambda o: o.load_state_dict(sd), ValueError, match)
    refused({'state': states, 'hypers': hypers[:2]},
            '2 parameter groups, the optimizer has 3')
    refused({'state': states*2, 'hypers': hypers},
            '12 parameter states, the optimizer has 6')
    refused({'state': states}, 'hypers')
    refused(torch.optim.SGD(Net().groups[0], lr=0.1).state_dict(), 'hypers')

# ---- refusals

def test_wrong_number_of_values():
    _, opt = trained()
    def refused(lr, match):
        unchanged(opt, lambda o: o.set_hypers(wd=5., lr=lr), ValueError, match)
    for n in (0, 2, 4):
        refused([0.1]*n, f'lr has {n} values and there are 3 parameter groups')
    for v in (slice(None), slice(0.1, None), slice(-1., 0.1)): refused(v, 'lr is slice')
    with pytest.raises(ValueError, match='2 values'): rates(ours, 3, [0.1, 0.2])

def test_wrong_params():
    net = Net()
    with pytest.raises(ValueError, match='empty'): ours.SGD([], lr=0.1)
    named = nn.Linear(2, 2).named_parameters()
    for bad in ([{'params': net.groups[0]}], [net.groups[0], ['w']], named):
        with pytest.raises(TypeError, match='must hold tensors'): ours.SGD(bad, lr=0.1)
    with pytest.raises(ValueError, match='just 1'):
        ours.SGD(net.groups[0], lr=0.1).freeze()

def test_forms_of_params():
    def sizes(params): return [len(g) for g in ours.SGD(params, lr=0.1).param_lists]
    a, b = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)
    assert sizes(a) == [1]
    assert sizes([a, b]) == sizes(iter([a, b])) == [2]
    assert sizes(((a,), (b,))) == [1, 1]
    assert sizes([iter([a, b]), iter([a])]) == [2, 1]
    assert sizes([[a], b]) == [1, 1]

def stepped_before_backward(lib):
    p = with_gradient()
    loss = (p*p).sum()
    lib.SGD([p], lr=0.5, mom=0.9, wd=0.1).step()
    loss.backward()

def test_autograd_notices_a_step_before_backward():
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        stepped_before_backward(ours)

# ---- plain numbers in place of parameters, as in the first cells of fastai's notebook

NUMBERS = dict(
    flat=lambda: [1, 2, 3],
    range=lambda: range(3),
    groups=lambda: [[1, 2], [3]],
    generator=lambda: iter([[0, 1], [2, 3]]),
    one=lambda: 7,
    floats=lambda: [[0.5], [], [1.5]])

@pytest.mark.parametrize('form', NUMBERS)
def test_numbers_as_parameters(fai, form):
    def go(lib):
        cbs = [lib.weight_decay, lib.average_grad]
        opt = lib.Optimizer(NUMBERS[form](), cbs, lr=0.1)
        opt.set_hyper('lr', slice(0.1))
        opt.step(), opt.zero_grad(), opt.clear_state()
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
        groups = [[list(g['params']), g['lr']] for g in opt.param_groups]
        live = opt.all_params(with_grad=True)
        return groups, list(opt.state_dict()['state']), list(live)
    assert go(ours) == go(fai)

def test_numbers_beside_tensors_are_left_alone(fai):
    def go(lib, wd=0.1):
        p = torch.ones(2, dtype=torch.float64, requires_grad=True)
        p.grad = torch.full_like(p, 0.5)
        opt = lib.SGD([[p, 3], [4.]], lr=0.1, wd=wd)
        opt.step()
        return p.detach().tolist(), [list(g)[-1] for g in opt.param_lists]
    assert go(ours) == go(fai) and go(ours)[1] == [3, 4.]
    assert go(ours)[0] != go(ours, wd=0.2)[0]

def test_freezing_numbers_is_refused(fai):
    for lib, error in ((ours, TypeError), (fai, AttributeError)):
        with pytest.raises(error): lib.SGD([[1], [2]], lr=0.1).freeze()
    a = torch.ones(1, requires_grad=True)
    opt = ours.SGD([[a], [2]], lr=0.1)
    unchanged(opt, lambda o: o.freeze(), TypeError,
              'freeze_to needs tensors, one parameter is int 2')
    assert a.requires_grad

NEITHER = [
    'w', None, ['w'], [None],
    [[1], None], [3, 'w'], [nn.Linear(1, 1)]]

@pytest.mark.parametrize('bad', NEITHER, ids=str)
def test_neither_tensors_nor_numbers(bad):
    with pytest.raises(TypeError, match='must hold tensors, or lists of tensors'):
        ours.SGD(bad, lr=0.1)

# ---- odd values and groups

ONE = ['body', b'body', dict(a=1)]

@pytest.mark.parametrize('v', ONE + [torch.tensor([.1, .2, .3])], ids=repr)
def test_what_counts_as_one_value(fai, v):
    def go(lib):
        opt = lib.SGD([[torch.zeros(1)] for _ in range(3)], lr=0.1)
        opt.set_hyper('extra', v)
        return [h['extra'] for h in opt.hypers]
    assert go(ours) == go(fai)

def test_none_is_a_value():
    wrap = ours.OptimWrapper(Net().groups, torch.optim.SGD, lr=0.1, foreach=False)
    wrap.set_hyper('foreach', None)
    assert [g['foreach'] for g in wrap.opt.param_groups] == [None]*3

@pytest.mark.parametrize('n', [0, 1, 2, 3, -1, -2])
def test_freezing_a_shared_parameter(fai, n):
    "A parameter of a frozen and of a training group is frozen"
    def go(lib):
        a, b = (torch.ones(1, requires_grad=True) for _ in range(2))
        opt = lib.SGD([[a], [b], [a]], lr=0.1)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            opt.freeze_to(n)
        return a.requires_grad, b.requires_grad
    assert go(ours) == go(fai)
    assert go(ours)[0] == (n == 0)

def test_param_groups_of_single_tensors():
    a, b = torch.ones(1), torch.ones(2)
    opt = ours.SGD([[torch.zeros(1)], [torch.zeros(1)]], lr=0.1)
    opt.param_groups = [{'params': a, 'lr': 0.2}, {'params': b, 'lr': 0.3}]
    assert opt.param_lists[0][0] is a and opt.param_lists[1][0] is b
    assert [len(g['params']) for g in opt.param_groups] == [1, 1]

# what the page's table says about fastai: should it change, the table is out of date
def test_fastai_does_what_the_page_says(fai):
    a, b = (torch.ones(1, requires_grad=True) for _ in range(2))
    two = fai.SGD([[a], [b]], lr=0.1)
    with pytest.raises(AssertionError): two.set_hyper('lr', [1., 2., 3.])
    with pytest.raises(AssertionError):
        two.load_state_dict({'hypers': [{}], 'state': [{}, {}]})
    with pytest.raises(AssertionError): fai.SGD([a], lr=0.1).freeze()
    three = fai.SGD([[a], [b], [a]], lr=0.1)
    three.freeze_to(-5)
    assert three.frozen_idx == -2
    assert all(p.requires_grad for p, *_ in three.all_params())
    with pytest.raises(TypeError): fai.SGD([{'params': [a]}], lr=0.1).step()
    assert isinstance(fai.SGD([(a,), (b,)], lr=0.1).param_lists[0][0], tuple)
    assert isinstance(rates(fai, 3, slice(-1., 0.1))[1], complex)
    two = fai.SGD([[a], [b]], lr=0.1)
    two.param_groups = [{'params': [torch.zeros(1)], 'lr': 5.}]
    assert two.param_lists[0][0] is a and [h['lr'] for h in two.hypers] == [5., 0.1]
    with pytest.raises(TypeError): two.zero_grad(set_to_none=True)
    stepped_before_backward(fai)
    wrap = fai.OptimWrapper([a], torch.optim.SGD, lr=0.1)
    wrap.param_groups = [{'params': [a], 'lr': 5.}]
    assert wrap.hypers[0]['lr'] == 0.1
    wrap = fai.OptimWrapper(opt=torch.optim.SGD([a], lr=0.1), lr=9.)
    assert wrap.hypers[0]['lr'] == 0.1

def test_fastai_does_what_the_page_says_of_odd_input(fai):
    a = leaf()
    assert len(fai.SGD([a, None, 'w'], lr=0.1).param_lists[0]) == 3
    with pytest.raises(AssertionError): fai.SGD([a], lr=0.1).set_hyper('lr', None)
    with pytest.warns(UserWarning, match='train_bn'):
        assert 'train_bn' not in fai.Optimizer([a], [], train_bn=True).hypers[0]
    opt = two(torch.optim.SGD)
    wrap = fai.OptimWrapper(opt=opt)
    lr_scheduler.StepLR(opt, 1)
    assert wrap.hypers[0]['initial_lr'] == 0.1
    with pytest.raises(KeyError): wrap.set_hyper('initial_lr', 1.)
    opt = TwoKinds()
    wrap = fai.OptimWrapper(opt=opt)
    assert 'mom' not in wrap.hypers[1]
    wrap.set_hyper('mom', 0.5)
    assert opt.param_groups[1]['momentum'] == 0.5
    assert opt.param_groups[1]['betas'] == (0.8, 0.99)
    named = fai.OptimWrapper([('w', a)], torch.optim.SGD, lr=0.1)
    assert named.hypers[0]['param_names__0'] == 'w'
    own = ours.OptimWrapper([('w', a)], torch.optim.SGD, lr=0.1)
    assert not any('param_names' in k for k in own.hypers[0])

# ---- OptimWrapper

WRAPPED = {
    'SGD': dict(lr=0.05, momentum=0.9, weight_decay=0.01),
    'Adam': dict(lr=0.01, betas=(0.9, 0.99)),
    'AdamW': dict(lr=0.01, weight_decay=0.1)}

def wrapped(lib, name, change=True):
    kw, net = WRAPPED[name], Net()
    opt = lib.OptimWrapper(net.groups, getattr(torch.optim, name), **kw)
    for i in range(STEPS):
        if i == 8: opt.freeze()
        if i == 16: opt.unfreeze()
        if change:
            opt.set_hyper('lr', slice(1e-3, kw['lr']/(1 + 0.1*i)))
            opt.set_hyper('mom', [0.8, 0.85, 0.9 - 0.01*i])
            opt.set_hyper('wd', 0.01*i)
        net.train_step(opt, i)
    return Trained(net.values, hypers(opt))

def bare(name, change=True):
    kw, net = WRAPPED[name], Net()
    opt = getattr(torch.optim, name)([{'params': g} for g in net.groups], **kw)
    for i in range(STEPS):
        for p in net.groups[0] + net.groups[1]: p.requires_grad_(not 8 <= i < 16)
        if change:
            ratio = (kw['lr']/(1 + 0.1*i)/1e-3)**0.5
            moms = 0.8, 0.85, 0.9 - 0.01*i
            for j, (group, mom) in enumerate(zip(opt.param_groups, moms)):
                group.update(lr=1e-3*ratio**j, weight_decay=0.01*i)
                if 'betas' in group: group['betas'] = (mom, group['betas'][1])
                else: group['momentum'] = mom
        net.train_step(opt, i)
    return net.values

@pytest.mark.parametrize('name', WRAPPED)
def test_wrapper_equals_the_bare_optimizer(name):
    changed, same = bare(name), bare(name, change=False)
    assert max_diff(wrapped(ours, name).values, changed) == 0.
    assert max_diff(wrapped(ours, name, change=False).values, same) == 0.
    assert max_diff(changed, same) > 1e-3

@pytest.mark.parametrize('name', WRAPPED)
def test_wrapper_equals_fastais(fai, name):
    port, fastais = wrapped(ours, name), wrapped(fai, name)
    assert max_diff(port.values, fastais.values) == 0.
    assert port.hypers == fastais.hypers

@pytest.mark.parametrize('name', ['SGD', 'Adam', 'RMSprop', 'Rprop', 'Adadelta'])
def test_names_of_hypers(fai, name):
    opt = getattr(torch.optim, name)([leaf()], lr=0.1)
    port, fastais = ours.OptimWrapper(opt=opt), fai.OptimWrapper(opt=opt)
    assert hypers(port) == hypers(fastais)
    group = opt.param_groups[0]
    assert ours.detuplify_pg(group) == fai.detuplify_pg(group)
    assert ours.pytorch_hp_map == fai.pytorch_hp_map

def test_set_item_pg(fai):
    for k, v in (('lr', 0.5), ('betas__0', 0.5), ('betas__1', 0.5), ('new', 1)):
        a = {'lr': 0.1, 'betas': (0.9, 0.99)}
        b = dict(a)
        assert ours.set_item_pg(a, k, v) == fai.set_item_pg(b, k, v) == a == b
    pair = {'betas': (0.9, 0.99)}
    with pytest.raises(IndexError): ours.set_item_pg(pair, 'betas__2', 1)
    with pytest.raises(KeyError): ours.set_item_pg({}, 'betas__0', 1)

def test_wrapper_constructor(fai):
    p, SGD = torch.ones(1, requires_grad=True), torch.optim.SGD
    adam = partial(torch.optim.Adam, betas=(0.5, 0.9))
    built = SGD([p], lr=0.1)
    for lib in (ours, fai):
        wrapper = lib.OptimWrapper
        assert wrapper([p], adam, lr=0.1).hypers[0]['mom'] == 0.5
        only, = wrapper([dict(params=[p], lr=0.3)], SGD, lr=0.1).hypers
        assert only['lr'] == 0.3
        renamed = wrapper([p], SGD, hp_map={'momentum': 'm'}, lr=0.1, momentum=0.3)
        assert renamed.hypers[0]['m'] == 0.3
        with pytest.raises(TypeError): wrapper([[p]], SGD, lr=0.1, convert_groups=False)
        with pytest.raises(ValueError): wrapper()
        with pytest.raises(ValueError): wrapper([p], built)
    for kw in (dict(params=[p]), dict(opt=SGD), dict(opt=built, lr=0.2)):
        with pytest.raises(ValueError): ours.OptimWrapper(**kw)

def test_wrapper_refuses_unknown_names(fai):
    for lib in (ours, fai):
        opt = lib.OptimWrapper(Net().groups, torch.optim.Adam, lr=0.1)
        for k in ('momentum', 'betas', 'foo'):
            with pytest.raises(KeyError, match=k): opt.set_hyper(k, 0.5)
    opt = ours.OptimWrapper(Net().groups, torch.optim.Adam, lr=0.1)
    unchanged(opt, lambda o: o.set_hypers(lr=9., foo=1.), KeyError,
              'Adam has no hyperparameter')
    unchanged(opt, lambda o: o.set_hyper('lr', [1., 2.]), ValueError,
              'lr has 2 values and there are 3 parameter groups')

def test_wrapper_state():
    net = Net()
    net.backward(0)
    p = net.groups[0][0]
    opt = ours.OptimWrapper(net.groups, torch.optim.Adam, lr=0.1)
    opt.state[p]['force_train'] = True       # among torch's buffers Adam's step fails
    opt.step()
    sd = opt.state_dict()
    opt.load_state_dict(sd)
    sd['state'][0]['exp_avg'].fill_(99.)
    assert (opt.opt.state[p]['exp_avg'] < 99).all()
    opt.freeze()
    assert p.requires_grad and not net.groups[0][1].requires_grad
    opt.clear_state()
    assert not opt.opt.state and opt.state[p] == {'force_train': True}
    opt.step()
    groups = opt.param_groups
    for i, g in enumerate(groups): g.update(lr=0.1*i, mom=0.5)
    opt.param_groups = groups
    for i, (group, params) in enumerate(zip(opt.opt.param_groups, net.groups)):
        assert group['lr'] == 0.1*i and group['betas'][0] == 0.5
        assert [id(p) for p in group['params']] == [id(p) for p in params]
    assert opt.step(lambda: torch.tensor(3.)) == 3.
    opt.zero_grad()
    assert p.grad is None

# ---- groups whose keys differ

def leaf(): return torch.nn.Parameter(torch.ones(2))

def two(cls, first={}, second={}, **kw):
    groups = [{'params': [leaf()], **own} for own in (first, second)]
    return cls(groups, lr=0.1, **kw)

def sgd_with_a_name(): return two(torch.optim.SGD, first=dict(name='body'))

class Ragged(NamedTuple):
    make:Callable # the torch optimizer
    change:Callable = lambda o: None # what happens to it after it was wrapped

RAGGED = {
    'name in the first': Ragged(sgd_with_a_name),
    'more in the second': Ragged(
        lambda: two(torch.optim.Adam, second=dict(name='head', pair=(1, 2)))),
    'group added later': Ragged(
        lambda: torch.optim.Adam([leaf()], lr=0.1),
        lambda o: o.add_param_group(dict(params=[leaf()], betas=(.5, .6), tag=1))),
    'StepLR': Ragged(
        lambda: two(torch.optim.SGD, momentum=0.9),
        lambda o: lr_scheduler.StepLR(o, 1)),
    'OneCycleLR': Ragged(
        lambda: two(torch.optim.AdamW),
        lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=9)),
    'CyclicLR': Ragged(
        lambda: two(torch.optim.SGD, momentum=0.9),
        lambda o: lr_scheduler.CyclicLR(o, .1, .2)),
    'a key removed': Ragged(
        lambda: two(torch.optim.SGD),
        lambda o: o.param_groups[0].pop('fused')),
    'RMSprop': Ragged(
        lambda: two(torch.optim.RMSprop, second=dict(alpha=0.2), momentum=0.3))}

def own_keys(opt):
    return [{k: v for k, v in g.items() if k != 'params'} for g in opt.param_groups]

@pytest.mark.parametrize('case', RAGGED)
def test_every_group_has_its_own_hypers(fai, case):
    make, change = RAGGED[case]
    def go(lib):
        opt = make()
        wrap = lib.OptimWrapper(opt=opt)
        change(opt)
        items = [list(h.items()) for h in wrap.hypers]     # in the same order, too
        return items, [len(g) for g in wrap.param_groups]
    assert go(ours) == go(fai)
    groups = [dict(h) for h in go(ours)[0]]
    late = {'StepLR': 'initial_lr', 'OneCycleLR': 'max_lr', 'CyclicLR': 'base_momentum'}
    if case in late: assert all(late[case] in h for h in groups)
    else: assert len(groups) == 2 and groups[0] != groups[1]

@pytest.mark.parametrize('case', RAGGED)
def test_setting_where_keys_differ(fai, case):
    make, change = RAGGED[case]
    def go(lib):
        opt = make()
        wrap = lib.OptimWrapper(opt=opt)
        change(opt)
        wrap.set_hypers(lr=slice(1e-3, 1e-1), wd=[0.5])
        if 'mom' in wrap.hypers[0]: wrap.set_hyper('mom', 0.7)
        return own_keys(opt)
    assert go(ours) == go(fai)
    assert go(ours)[-1]['lr'] == 0.1 and go(ours)[-1]['weight_decay'] == 0.5

@pytest.mark.parametrize('case', RAGGED)
def test_param_groups_come_back_unchanged(case):
    make, change = RAGGED[case]
    opt = make()
    wrap = ours.OptimWrapper(opt=opt)
    change(opt)
    before = own_keys(opt)
    wrap.param_groups = wrap.param_groups
    assert own_keys(opt) == before

def test_names_that_only_some_groups_have(fai):
    for lib in (ours, fai):                   # known from the first group: set in all
        opt = sgd_with_a_name()
        lib.OptimWrapper(opt=opt).set_hyper('name', ['a', 'b'])
        assert [g['name'] for g in opt.param_groups] == ['a', 'b']
    opt = two(torch.optim.SGD)
    wrap = ours.OptimWrapper(opt=opt)
    lr_scheduler.StepLR(opt, 1)
    wrap.set_hyper('initial_lr', [1., 2.])    # shown in hypers, so it can be set
    assert [g['initial_lr'] for g in opt.param_groups] == [1., 2.]

class TwoKinds(torch.optim.Optimizer):
    "Groups of two kinds: `momentum` in the first, `betas` in the second"
    def __init__(self):
        super().__init__([dict(params=[leaf()], momentum=0.9, weight_decay=0.1),
                          dict(params=[leaf()], betas=(0.8, 0.99))], dict(lr=0.1))

def test_one_name_two_kinds_of_groups():
    opt = TwoKinds()
    wrap = ours.OptimWrapper(opt=opt)
    assert [h['mom'] for h in wrap.hypers] == [0.9, 0.8]
    assert wrap.hypers[1]['sqr_mom'] == 0.99
    wrap.set_hypers(mom=[0.5, 0.6])
    assert opt.param_groups[0]['momentum'] == 0.5
    assert opt.param_groups[1]['betas'] == (0.6, 0.99)
    assert 'momentum' not in opt.param_groups[1]
    before = own_keys(opt)                  # the first group has no tuple for `sqr_mom`
    unchanged(wrap, lambda o: o.set_hypers(lr=9., sqr_mom=0.5), KeyError,
              'TwoKinds has no hyperparameter .sqr_mom.')
    assert own_keys(opt) == before

def test_assigned_groups_are_checked_first():
    opt = two(torch.optim.SGD)
    wrap, before = ours.OptimWrapper(opt=opt), own_keys(opt)
    groups = wrap.param_groups
    groups[0]['lr'], groups[1]['nope'] = 9., 1
    unchanged(wrap, lambda o: setattr(o, 'param_groups', groups), KeyError, 'nope')
    assert own_keys(opt) == before

def test_names_with_underscores():
    assert ours.set_item_pg({'my__key': 1}, 'my__key', 2) == {'my__key': 2}
    assert ours.set_item_pg({}, 'my__key', 2) == {'my__key': 2}

LINEAR = dict(
    flat=lambda m: m.parameters(),
    single=lambda m: m.weight,
    named=lambda m: m.named_parameters(),
    named_groups=lambda m: [[('w', m.weight)], [('b', m.bias)]],
    one_dict=lambda m: {'params': m.parameters()},
    groups=lambda m: [[m.weight], [m.bias]],
    empty_group=lambda m: [[], [m.weight, m.bias]],
    lists_and_dicts=lambda m: [[m.weight], {'params': [m.bias], 'lr': 3.}],
    dicts=lambda m: ({'params': [p], 'lr': 3.} for p in m.parameters()))

@pytest.mark.parametrize('form', LINEAR)
def test_forms_of_params_for_a_torch_class(fai, form):
    def go(lib):
        torch.manual_seed(0)
        model = nn.Linear(2, 3, dtype=torch.float64)
        params = LINEAR[form](model)
        opt = lib.OptimWrapper(params, torch.optim.SGD, lr=0.1, momentum=0.9)
        model(torch.ones(1, 2, dtype=torch.float64)).square().sum().backward()
        opt.step()
        values = [p.tolist() for p in model.parameters()]
        return values, [len(g) for g in opt.param_lists], own_keys(opt.opt)
    assert go(ours) == go(fai)
    after = go(ours)[0][0]
    torch.manual_seed(0)
    assert after != nn.Linear(2, 3, dtype=torch.float64).weight.tolist()

def test_nothing_to_wrap():
    with pytest.raises(ValueError, match='optimizer got an empty parameter list'):
        ours.OptimWrapper([], torch.optim.SGD, lr=0.1)
    for bad in ([None], ['w'], [[leaf()], None]):
        with pytest.raises(TypeError, match='params must hold tensors'):
            ours.OptimWrapper(bad, torch.optim.SGD, lr=0.1)
    with pytest.raises(TypeError, match='can only optimize Tensors'):
        ours.OptimWrapper([1, 2], torch.optim.SGD, lr=0.1)

# ---- inside fastai

def learner(net, opt_func, layers, **kw):
    "fastai's Learner on 64 random rows, with a parameter group for each of `layers`"
    basics = importlib.import_module('fastai.basics')
    importlib.import_module('fastai.callback.all')
    gen = torch.Generator().manual_seed(0)
    x, y = torch.randn(64, 4, generator=gen), torch.randn(64, 1, generator=gen)
    dl = basics.DataLoader(torch.utils.data.TensorDataset(x, y), bs=16)
    def splitter(net): return [list(net[i].parameters()) for i in layers]
    return basics.Learner(
        basics.DataLoaders(dl, dl, device='cpu'), net, loss_func=nn.MSELoss(),
        opt_func=opt_func, splitter=splitter, **kw)

@pytest.mark.filterwarnings('ignore')
def test_fastais_learner_cannot_tell(fai):
    """One-cycle training, freezing and fine-tuning by fastai's own Learner, with its
    optimizer and with ours"""
    def go(lib, **kw):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
        learn = learner(net, partial(lib.SGD, mom=0.9, **kw), layers=(0, 1, 2), wd=0.1)
        with learn.no_bar(), learn.no_logging():
            learn.fit_one_cycle(3, slice(1e-3, 0.1))
            learn.freeze_to(2)
            learn.fit_one_cycle(3, slice(1e-3, 0.1))
            learn.unfreeze()
            learn.fit_one_cycle(2, slice(1e-4, 0.05))
        assert isinstance(learn.opt, lib.Optimizer)
        return [p.detach() for p in net.parameters()]
    assert max_diff(go(ours), go(fai)) == 0.
    assert max_diff(go(ours), go(ours, decouple_wd=False)) > 1e-4

@pytest.mark.filterwarnings('ignore')
def test_the_learner_drives_a_wrapped_optimizer(fai):
    "fit_one_cycle sets `lr` and `mom` of a torch optimizer whose groups differ in keys"
    def go(lib, **kw):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        def make(groups, lr):
            named = [{'params': list(g), 'name': str(i)} for i, g in enumerate(groups)]
            del named[1]['name']
            return lib.OptimWrapper(named, torch.optim.AdamW, lr=lr, **kw)
        learn = learner(net, make, layers=(0, 2))
        with learn.no_bar(), learn.no_logging():
            learn.fit_one_cycle(2, slice(1e-3, 0.1))
            learn.freeze()
            learn.fit_one_cycle(2, slice(1e-3, 0.1))
        return Trained([p.detach() for p in net.parameters()], hypers(learn.opt))
    port, fastais = go(ours), go(fai)
    assert max_diff(port.values, fastais.values) == 0.
    assert port.hypers == fastais.hypers and port.hypers[0]['name'] == '0'
    assert max_diff(port.values, go(ours, weight_decay=0.5).values) > 1e-4
