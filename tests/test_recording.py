"""What a step may do beside computing: whatever it is, the kernel does what the loop
does, or the steps run as a loop and a warning says why."""
import builtins
import collections
import copy
import dataclasses
import decimal
import enum
import fractions
import math
import random
import threading
import time
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from optimizers_explained import optim
from optimizers_explained.speed import dispatch, recorder
from optimizers_explained.core import StepOptimizer
from optimizers_explained.steps import sgd
from optimizers_explained.speed.operations import (
    LOCK, Unfusable, symbolic_math, unchanged)
from optimizers_explained.speed.recorder import record

REASON = 'fused=True, and still some parameters are stepped without a kernel: '
FOREIGN = 'a tensor that is neither p, g nor in the state'
INF, NAN = float('inf'), float('nan')

def parameter(**attributes):
    p = nn.Parameter(torch.linspace(-2., 2., 12).view(3, 4))
    for name, value in attributes.items(): setattr(p, name, value)
    return p

class Run:
    "A few steps of an optimizer on one parameter, and what it told."
    def __init__(self, steps, start=None, count=3, at=None, fused=False):
        steps = steps if isinstance(steps, list) else [steps, sgd]
        self.p, known = parameter(), dict(lr=0.1) if sgd in steps else {}
        self.opt = StepOptimizer([self.p], steps, **known, foreach=False, fused=fused)
        self.opt.memo = dispatch.Memo()
        self.opt.memo.steps = list(self.opt.steps)  # their code was not looked at
        self.state = self.opt.state[self.p]
        self.state.update(copy.deepcopy(start or {}))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            for t in range(count):
                self.p.grad = torch.sin(torch.arange(12.).view(3, 4) + t)
                if at: at(self.opt.param_groups[0], t)
                self.opt.step()
        texts = [str(w.message) for w in caught]
        self.told = [text.removeprefix(REASON) for text in texts if REASON in text]

    @property
    def programs(self):
        return [q for found in self.opt.memo.programs.values() for q in found]

    def left(self):
        "Everything that the steps have left behind."
        plain = lambda v: v.tolist() if isinstance(v, Tensor) else v
        return [self.p.tolist(), {k: plain(v) for k, v in self.state.items()}]

def close(a, b):
    "Whether two nested lists are equal, floats nearly."
    if isinstance(a, list): return len(a) == len(b) and all(map(close, a, b))
    if isinstance(a, dict): return [*a] == [*b] and close([*a.values()], [*b.values()])
    if isinstance(a, float): return a == pytest.approx(b, 1e-5, 1e-7, nan_ok=True)
    return unchanged(a, b) or a == b

def agree(steps, why=None, **kw):
    "The loop's results, from a kernel; or from the loop, with the warning `why`."
    loop, fused = Run(steps, **kw), Run(steps, fused=True, **kw)
    assert close(loop.left(), fused.left()), (loop.left(), fused.left())
    if why: assert len(fused.told) == 1 and why in fused.told[0], fused.told
    else: assert fused.told == [] and any(q.kernel for q in fused.programs), fused.told
    return fused

def recorded(step, like=None, tensors=(), numbers=None, **hypers):
    like = parameter() if like is None else like
    return record([(step, hypers)], like, tensors, numbers or {})

def name(v): return getattr(v, '__name__', None)
def named(table): return pytest.mark.parametrize('step,why', table, ids=name)


# --- names for one tensor, changes in place, masks
def through_data(p, g, state): p.data.mul_(0.9)
def through_detach(p, g, state): p.detach().add_(g, alpha=0.1)
def through_float(p, g, state): p.float().mul_(0.9)
def on_a_clone(p, g, state):
    c = p.clone()
    c.mul_(3.)
    return c + p
def left_behind(p, g, state):
    m = state['m']
    state['m'] = m.mul(2.)
    m.add_(1.)
    return m + state['m']
def swapped(p, g, state):
    state['m'], state['n'] = state['n'], state['m']
    return state['m']*g
def swapped_and_changed(p, g, state):
    m, n = state['m'], state['n']
    state['m'], state['n'] = n.add_(g), m.mul_(0.5)
    return g
def a_state_as_update(p, g, state): return state['m'].mul_(0.9).add_(g)
def halves_it(p, g, state): state['m'].mul_(0.5)
def itself(p, g, state): return p
def a_mask(p, g, state): return g > 0
def a_number(p, g, state): return 2.
def one_number(p, g, state): return g.norm()
def norm_in_place(p, g, state):
    n = g.norm()
    n.clamp_(min=1.)
    return g/n
def augmented_later(p, g, state):
    d = g*2
    d += 1
    d *= p
    return d
def a_mask_as_state(p, g, state): state['m'] = g > 0
def sum_by_row(p, g, state): return g - g.sum(1, keepdim=True)
def sum_none(p, g, state): return g - g.sum(dim=None)
def mean_typed(p, g, state): return g - g.mean(dtype=torch.float64).float()
def norm_one(p, g, state): return g/g.norm(1)
def norm_inf(p, g, state): return g/g.norm(INF)
def norm_linalg(p, g, state): return g/torch.linalg.vector_norm(g)
def view_as(p, g, state): p.view_as(p).mul_(0.9)
def unbound(p, g, state): return Tensor.mul(g, 2.)
def other_way(p, g, state): return 3./(g + 2.) + (1 - g) + 2.**g
def rounded(p, g, state): return torch.div(g, 0.3, rounding_mode='floor')
def out(p, g, state): return torch.mul(g, 2., out=state['m'])
def functional(p, g, state): return nn.functional.relu(g)
def by_aten(p, g, state): return torch.ops.aten.add(g, p)
def catches(p, g, state):
    try: return g.cumsum(0)
    except Exception: return g*7.
def counts(p, g, state): return (g > 0).float()*g + (g > 0)*(p > 0)*g
def inverted(p, g, state):
    m = ~(g > 0) | (p > 0)
    return torch.where(m, g, 0.) + m.type_as(g)
def filled(p, g, state): return (g > 0).clone().fill_(0.3).to(g.dtype)*g
def preserved(p, g, state):
    return torch.zeros_like(p, memory_format=torch.preserve_format).add_(g)
def no_grad(p, g, state):
    with torch.no_grad(): p.mul_(0.5)
def in_grad(p, g, state):
    with torch.enable_grad(): return g*2.
def power(p, g, state, *, k=2.): return g.abs()**k

@named([
    (through_data, None), (through_detach, None), (through_float, None),
    (on_a_clone, None), (left_behind, None), (swapped, 'second name'),
    (swapped_and_changed, None), ([a_state_as_update, halves_it, sgd], None),
    (itself, None), (a_mask, None), (one_number, 'no tensor of the shape of p'),
    (a_number, 'no tensor of the shape of p'), (norm_in_place, None),
    (augmented_later, None), (a_mask_as_state, 'has become a mask'),
    (sum_by_row, 'sum with these arguments'), (sum_none, None), (norm_one, None),
    (mean_typed, 'mean with these arguments'), (norm_inf, 'norm with these arguments'),
    (norm_linalg, None), (view_as, 'view_as has no fused form'), (unbound, None),
    (other_way, None), (rounded, 'div with these arguments'), (out, 'mul with out='),
    (functional, 'relu has no fused form'), (by_aten, 'add has no fused form'),
    (catches, 'cumsum has no fused form'), (counts, None), (inverted, None),
    (filled, None), (preserved, None), (no_grad, None), (power, None),
    (in_grad, 'autograd is switched on')])
def test_names_and_changes(step, why):
    start = dict(m=torch.full((3, 4), 0.5), n=torch.full((3, 4), -1.))
    agree(step, why, start=start)

def augmented(p, g, state):
    g += 1
    return g
def norm_grown(p, g, state): g.norm().add_(g)
def second_name(p, g, state): state['m'] = state['n']

@named([(augmented, 'changes the gradient'), (norm_grown, 'shape or the type'),
        (second_name, 'second name')])
def test_what_no_kernel_does(step, why):
    "The loop raises, changes the gradient, or has two names for one tensor afterwards."
    assert why in recorded(step, tensors=['m', 'n']).reason


# --- what a step asks about its tensors
def is_tensor(p, g, state):
    if not isinstance(state.get('m'), Tensor): state['m'] = torch.zeros_like(p)
    assert isinstance(p, Tensor) and isinstance(g, Tensor) and torch.is_tensor(g)
    return state['m'].add_(g)
def hashes(p, g, state): return g*2 if p in {1, 2} else g
def keyed(p, g, state): return g*{p: 2.}[p]
def identified(p, g, state): return g*2 if id(p) in {1} else g
def in_a_list(p, g, state): return g*2 if any(p is q for q in [g]) else g
def asks_shape(p, g, state): return g*p.shape[0]
def asks_numel(p, g, state): return g/p.numel()
def asks_size(p, g, state): return g*2 if p.size() == (3, 4) else g
def asks_grad(p, g, state): return g + p.grad
def asks_requires(p, g, state): return g*2 if p.requires_grad else g
def asks_facts(p, g, state):
    assert p.dim() == p.ndim == 2 and g.norm().ndim == 0 and (g > 0).dtype is torch.bool
    if g.is_sparse or torch.is_complex(p) or p.is_cuda: return g*3
    return g.to(p.device)*torch.finfo(p.dtype).bits
def writes(p, g, state):
    p.visited = True
    return g
def sets_data(p, g, state):
    p.data = p*2
    return g
def asks_all(p, g, state): return g*2 if vars(p) else g
def copies(p, g, state): return copy.deepcopy(g)*2
def formats(p, g, state): return g*float(f'{g.norm():.1f}')

@named([
    (is_tensor, None), (hashes, 'which tensor this is'), (in_a_list, None),
    (keyed, 'which tensor this is'), (identified, 'which tensor this is'),
    (asks_shape, '.shape is not known'), (asks_numel, 'numel has no fused form'),
    (asks_size, 'size has no fused form'), (asks_grad, '.grad is not known'),
    (asks_requires, '.requires_grad is not known'), (asks_facts, None),
    (writes, 'sets .visited'), (sets_data, 'sets .data'),
    (copies, 'which tensor this is'), (asks_all, 'all attributes of a tensor'),
    (formats, '__format__ has no fused form')])
def test_questions(step, why): agree(step, why)

class Special(nn.Parameter): kind = 'embedding'

def flagged(p, g, state): return g*0. if getattr(p, 'no_decay', False) else g
def scaled(p, g, state): return g*p.scale
def has(p, g, state): return g*2. if hasattr(p, 'scale') else g
def of_class(p, g, state): return g*2. if getattr(p, 'kind', '') == 'embedding' else g
def of_gradient(p, g, state): return g*2. if getattr(g, 'kind', '') else g
def is_parameter(p, g, state):
    return g*2 if isinstance(p, nn.Parameter) and not isinstance(g, nn.Parameter) else g

@pytest.mark.parametrize('step,own,count', [
    (flagged, {}, 0), (flagged, dict(no_decay=False), 0),
    (flagged, dict(no_decay=True), 1), (scaled, dict(scale=3.), 1),
    (has, {}, 0), (has, dict(scale=None), 1)])
def test_attributes_of_a_parameter(step, own, count):
    "What somebody wrote on it is read; the recording holds where it is the same."
    rec = recorded(step, parameter(**own))
    assert rec.reason is None and len(rec.nodes) == 2 + count      # multiplied, or not
    assert rec.numbers({}, {}, parameter(**own)) is not None
    for other in {}, dict(no_decay=True), dict(no_decay=1), dict(scale=2.):
        mine, theirs = ([x.get(k, 'absent') for k in rec.asked] for x in (own, other))
        found = rec.numbers({}, {}, parameter(**other))
        assert (found is not None) == unchanged(mine, theirs)
    with pytest.raises(Unfusable, match='asks for .[a-z_]* of its parameter'):
        rec.numbers({}, {})

def test_the_class_of_a_parameter():
    rec = recorded(is_parameter)
    assert rec.reason is None and len(rec.nodes) == 3
    assert rec.numbers({}, {}, parameter()) is not None
    assert rec.numbers({}, {}, torch.ones(3, 4)) is None
    rec = recorded(of_class, Special(torch.ones(2)))
    assert rec.reason is None and len(rec.nodes) == 3
    assert rec.numbers({}, {}, parameter()) is None

def test_attributes_that_cannot_be_read():
    "And none of it is an AttributeError, which `getattr` would hide."
    assert '.kind is not known' in recorded(of_gradient).reason
    listed = parameter(no_decay=[1])
    assert 'neither a number nor text' in recorded(flagged, listed).reason
    assert 'hides .mean' in recorded(flagged, parameter(mean=3)).reason
    assert 'hides .id' in recorded(flagged, parameter(id=3)).reason
    assert not issubclass(Unfusable, AttributeError)


# --- guards
class Stubborn:
    def __eq__(self, other): raise RuntimeError
    __hash__ = None

@pytest.mark.parametrize('now,then,same', [
    (NAN, float('nan'), True), (NAN, 1., False), (0., -0., False), (0., 0., True),
    (1, True, False), (1, 1., False), (True, True, True), ('a', 'a', True),
    (None, None, True), ((1., NAN), (1., NAN), True), ((0.,), (-0.,), False),
    ([1], (1,), False),
    ({'a': NAN}, {'a': NAN}, True), ({'a': 1}, {'b': 1}, False),
    ({1: 1}, {True: 1}, False),
    (np.ones(2), np.ones(2), False), (torch.ones(2), torch.ones(2), False),
    (np.float64(1), 1., False), (np.float64(NAN), np.float64(NAN), True),
    (10**400, 10**400, True), ((1,), (1, 2), False), (object(), object(), False),
    (decimal.Decimal('sNaN'), decimal.Decimal('sNaN'), False),
    (Stubborn(), Stubborn(), False), ([Stubborn()], [Stubborn()], False)])
def test_unchanged(now, then, same):
    "Nothing raises; what cannot be told apart is the same, and nothing else."
    now, then = copy.deepcopy(now), copy.deepcopy(then)
    assert unchanged(now, then) is same and unchanged(then, now) is same

def skips_bad_loss(p, g, state, *, loss=0.):
    if not math.isfinite(loss): return torch.zeros_like(g)

def test_a_number_that_is_nan():
    "A branch on it leaves a guard that holds; later its own recording is found again."
    def at(group, t): group['loss'] = (1., NAN, NAN, INF, 2.)[t]
    assert len(agree(skips_bad_loss, at=at, count=5).programs) == 4
    rec = recorded(skips_bad_loss, loss=NAN)
    assert rec.numbers(dict(loss=float('nan')), {}) is not None
    assert rec.numbers(dict(loss=1.), {}) is None

def is_zero(p, g, state, *, x): return g*x if x else g
def is_switch(p, g, state, *, x): return g*2 if x is True else g
def sign_of_zero(p, g, state, *, x): return g*math.copysign(1., x)
def first_of(p, g, state, *, x): return g*x[0]
def is_text(p, g, state, *, x): return g*(2 if x == 'a' else 1)

@pytest.mark.parametrize('step,one,others', [
    (is_zero, 1., (1, True, 0., np.float64(1), '1.', None, [1.], torch.tensor(1.))),
    (is_switch, True, (1, 1., False, 'True')), (sign_of_zero, 0., (-0., 0, False)),
    (first_of, (1., 2), ((1, 2), [1., 2], (1., 2, 3), 1., None)),
    (is_text, 'a', ('b', 1, None))])
def test_a_recording_holds_for_its_numbers_only(step, one, others):
    rec = recorded(step, x=one)
    assert rec.reason is None and rec.numbers(dict(x=copy.deepcopy(one)), {})
    for other in (*others, object()): assert rec.numbers(dict(x=other), {}) is None
    assert rec.numbers({}, {}) is None

def test_what_never_holds_is_refused(monkeypatch):
    "Not even for the very numbers it was made with: once for all, and in words."
    def stiff(p, g, state, *, x): return g*float(x)
    assert recorded(stiff, x=1.).reason is None
    monkeypatch.setattr(recorder, 'unchanged', lambda now, then: False)
    rec = recorded(stiff, x=1.)
    assert rec.reason == 'the steps ask for something that is never the same'
    assert rec.numbers(dict(x=2.), {}) == ((), {})


# --- hyperparameters and states of any type
class Mode(enum.Enum): a, b = range(2)
Pair = collections.namedtuple('Pair', 'beta decay')
@dataclasses.dataclass
class Options: scale: float = 2.

def used(x):
    "A number that a step gets from `x`, whatever it is."
    if isinstance(x, (float, complex)): return abs(x)
    if isinstance(x, Options): return x.scale
    if isinstance(x, dict) and isinstance(x['a'], float): return x['a']
    if isinstance(x, (list, tuple, np.ndarray)): return used(x[0])
    return 2.

@pytest.mark.parametrize('x,why', [
    (np.ones(2), 'ndarray'), (Pair(0.5, 2), None), (Pair(0.5, np.ones(1)), 'ndarray'),
    ((n for n in 'ab'), 'generator'), (Options(), 'Options'), ({'a': 0.5}, None),
    ({'a': [1]}, 'dict'), ({1, 2}, 'set'), (frozenset([1]), 'frozenset'),
    ('text', None), (b'text', None), (None, None), (2j, 'complex'),
    (fractions.Fraction(1, 3), 'Fraction'), (decimal.Decimal('0.1'), 'Decimal'),
    (torch.float32, None), (Tensor, None),
    (used, None), (len, None), (partial(used, 1), 'partial'), (np.float64(0.3), None),
    (np.float32(0.3), None), (Mode.a, None), (Mode, None), ([0.5, 1], None),
    (((0.5, 1), 2), None), (torch.Size([2]), None), (object(), 'object'),
    (threading.Lock(), 'lock'), (nn.Linear(1, 1), 'Linear'), (Stubborn(), 'Stubborn'),
    (True, None), (range(3), 'range')], ids=lambda v: type(v).__name__)
def test_hyperparameters_of_any_type(x, why):
    "Where it cannot be watched, the loop runs, and its name is in the warning."
    def step(p, g, state, *, x=x): return g*used(x)
    agree(step, why and f'hyperparameter x is of type {why}')

def test_a_tensor_as_hyperparameter():
    def step(p, g, state, *, x=torch.tensor(0.5)): return g*x
    agree(step, 'hyperparameter x is a tensor')

def test_a_generator_is_not_used_up():
    numbers = iter([1., 2., 3., 4., 5., 6.])
    def step(p, g, state, *, x=numbers): return g*next(x)
    assert 'of type list_iterator' in Run(step, fused=True).told[0]
    assert next(numbers) == 4.

def turns(p, g, state, *, x): x.append(x.pop(0))
def marks(p, g, state, *, x): x['a'] = x['a'] + 1

@pytest.mark.parametrize('step,x', [(turns, [1., 2.]), (marks, {'a': 1})])
def test_a_hyperparameter_that_a_step_changes(step, x):
    kept = copy.deepcopy(x)
    assert 'it changes hyperparameter x' in recorded(step, x=x).reason and x == kept

def grows(p, g, state):
    for k, v in state.items():
        if isinstance(v, float): state[k] = v + 1
        if isinstance(v, Pair): state[k] = v._replace(beta=v.beta*2)
        if isinstance(v, Tensor): v.add_(g)

@pytest.mark.parametrize('numbers,after', [
    ({3: 1.}, {3: 2.}), ({}, {}),
    ({'a b': 1., 'ö': 2}, {'a b': 2., 'ö': 2}),
    (dict(x=Pair(1., 2)), dict(x=Pair(2., 2))),
    (dict(x=(1., True)), dict(x=(1., True)))])
def test_numbers_in_the_state(numbers, after):
    rec = recorded(grows, tensors=['m', 'x-y', 'é', 7], numbers=numbers)
    assert rec.reason is None and set(rec.stores) == {2, 3, 4, 5}
    assert unchanged(rec.numbers({}, numbers), ((), after))
    assert all(name.isascii() and name.isidentifier() for name in rec.names)

@pytest.mark.parametrize('numbers,why', [
    (dict(x=np.ones(2)), "state['x'] is of type ndarray"),
    ({(1, 2): 1.}, 'that is no text'), (dict(x={1}), 'of type set'),
    (dict(x=[1.]), "state['x'] can be changed in place"),
    (dict(x={'a': 1}), 'can be changed in place'), (dict(x=2j), 'of type complex'),
    (dict(x=threading.Lock()), 'of type lock'),
    (dict(x=Stubborn()), 'of type Stubborn')])
def test_what_no_state_may_hold(numbers, why):
    assert why in recorded(grows, numbers=numbers).reason

def leaves_a_set(p, g, state): state['x'] = {1}
def leaves_a_value(p, g, state): state['x'] = g, 1
def complex_number(p, g, state, *, x=-2.): return g*abs((x*x - 5)**0.5)
def becomes_complex(p, g, state, *, x=1.): return g*abs(x**0.5)
def large_number(p, g, state, *, x=2): return g*float(x**70)
def too_large(p, g, state): return g*2**63

def test_what_is_left_in_the_state():
    for step in leaves_a_set, leaves_a_value:
        assert "state['x'] has become a" in recorded(step, numbers=dict(x=0)).reason

def test_numbers_that_are_not_real():
    agree(complex_number, 'no real number')
    def at(group, t): group['x'] = (1., 4., -4., 9.)[t]
    agree(becomes_complex, 'no real number', at=at, count=4)
    agree(large_number)
    assert 'mul with these arguments' in recorded(too_large).reason      # torch raises

def test_a_schedule_of_numpys_numbers():
    "Steps get Python's numbers, so that one recording serves both."
    def at(group, t): group['lr'] = (0.1, np.float64(0.05), np.float64(0.02), 0.01)[t]
    assert len(agree([sgd], at=at, count=4).programs) == 1


# --- what happens while steps are recorded
TEACHER, REAL = nn.Linear(2, 2), torch.full((3, 4), 2.)

def reads_closure(p, g, state): return g*REAL
def teacher_mean(p, g, state): return g*TEACHER.weight.mean()
def teacher_item(p, g, state): return g*TEACHER.weight.abs().mean().item()
def teacher_float(p, g, state): return g*float(TEACHER.weight.abs().mean())
def teacher_runs(p, g, state): TEACHER(torch.ones(2))
def new_zeros(p, g, state): return g + torch.zeros(3, 4)
def new_tensor(p, g, state): return g*torch.tensor(2.)
def changes_real(p, g, state): REAL.add_(1.)
def shape_of_real(p, g, state): return g*REAL.shape[0]
def draws(p, g, state): return g*torch.rand(())
def swallows(p, g, state):
    try: scale = TEACHER.weight.mean()
    except Exception: scale = 3.
    return g*scale

@pytest.mark.parametrize('step', [
    reads_closure, teacher_mean, teacher_item, teacher_float, teacher_runs, new_zeros,
    new_tensor, changes_real, shape_of_real, draws, swallows])
def test_nothing_real_is_computed(step):
    "No tensor but p, g and those of the state is read, made or changed."
    before, dice = REAL.clone(), torch.get_rng_state()
    rec = recorded(step)
    assert step.__name__ in rec.reason and FOREIGN in rec.reason
    assert torch.equal(before, REAL) and torch.equal(dice, torch.get_rng_state())
    if step not in (changes_real, draws): agree(step, FOREIGN)

@pytest.mark.parametrize('fused', [False, True])
def test_another_optimizer_in_a_step(fused):
    "It takes three steps, not nine, and `math` and `id` are what they were."
    def run(outer):
        q = nn.Parameter(torch.ones(3))
        inner = optim.AdamW([q], lr=0.1, fused=fused)
        def step(p, g, state):
            q.grad = torch.ones(3)
            inner.step()
            return g
        done = Run(step, fused=outer)
        return [q.tolist(), done.left(), inner.state[q]['step']], done.told
    (loop, quiet), (kernel, told) = run(False), run(True)
    assert close(loop, kernel) and loop[2] == 3
    assert quiet == [] and len(told) == 1 and FOREIGN in told[0]
    assert math.sqrt.__module__ == 'math' and id.__module__ == 'builtins'

def by_python(p, g, state): return g*random.random()
def by_luck(p, g, state): return g*(2 if random.random() < 2 else 1)
def by_numpy(p, g, state): return g*np.random.rand()
def by_seed(p, g, state):
    torch.manual_seed(3)
    return g
def by_its_own(p, g, state): return g*random.Random(0).random()
def by_numpys_own(p, g, state): return g*float(np.random.default_rng(0).random())

@pytest.mark.parametrize('step,is_quiet', [
    (by_python, False), (by_luck, False), (by_numpy, False), (by_seed, False),
    (by_its_own, True), (by_numpys_own, True)])
def test_random_numbers(step, is_quiet):
    "A draw from what all share is recognised, whatever comes of it, and not used up."
    def run(**way):
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        done = Run(step, **way)
        return done, (random.random(), np.random.rand(), torch.rand(()).item())
    (loop, a), (fused, b) = run(), run(fused=True)
    assert close(loop.left(), fused.left()) and a == b
    want = [] if is_quiet else [f'step {step.__name__}: it draws random numbers']
    assert fused.told == want

def test_a_clock_is_found_by_the_second_recording():
    def clocked(p, g, state): return g*time.perf_counter()
    told = Run(clocked, fused=True).told
    assert told == ['the steps do something else each time they are run']

def test_an_interrupted_recording_leaves_nothing():
    class Stop(BaseException): pass
    def stops(p, g, state):
        random.random()
        raise Stop
    before = random.getstate()
    with pytest.raises(Stop): recorded(stops)
    assert random.getstate() == before and math.sqrt.__module__ == 'math'
    assert id.__module__ == 'builtins' and torch.ones(2).sum() == 2

def test_other_threads_notice_nothing():
    "While one thread records, `math` and `id` do in another what they always do."
    stop, wrong = threading.Event(), []
    def work():
        while not stop.is_set():
            if math.sqrt(9.) != 3. or id(stop) != builtins.id(stop): wrong.append(1)
            if torch.ones(2).sum() != 2.: wrong.append(2)
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    for _ in range(50): recorded(sgd, lr=0.1)
    stop.set()
    thread.join()
    assert not wrong

def test_a_recording_within_a_recording():
    "It is refused, since it asks for a foreign tensor; it does not wait for itself."
    done = []
    def step(p, g, state): return g*len(record([(halves_it, {})], REAL, [], {}).nodes)
    def work():
        done.append(recorded(step).reason)
        with symbolic_math(), symbolic_math(): done.append(math.sqrt(4.))
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(20)
    assert len(done) == 2, 'it hangs'
    assert f'step step: .dtype: {FOREIGN}' in done[0] and done[1] == 2.
    assert math.sqrt.__module__ == 'math' and LOCK.acquire(blocking=False)
    LOCK.release()
