"""What a step may do beside computing: whatever it is, the kernel does what the loop does, or
the steps run as a loop and a warning says why."""
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

from optimizers_explained import optim, recorder
from optimizers_explained.core import StepOptimizer, sgd
from optimizers_explained.operations import LOCK, Unfusable, symbolic_math, unchanged
from optimizers_explained.recorder import record

REASON = 'fused=True, and still some parameters are stepped without a kernel: '
INF, NAN = float('inf'), float('nan')

def parameter(**attributes):
    p = nn.Parameter(torch.linspace(-2., 2., 12).view(3, 4))
    for name, value in attributes.items(): setattr(p, name, value)
    return p

class Run:
    "A few steps of an optimizer, its parameters, and what it told."
    def __init__(self, steps, params=None, start=None, count=3, fused=False, at=None, **hypers):
        self.params = params or [parameter()]
        steps = steps if isinstance(steps, list) else [steps, sgd]
        known = dict(lr=0.1) if sgd in steps else {}
        way = dict(fused=True) if fused else dict(foreach=False)
        self.opt = StepOptimizer(self.params, steps, **known, **hypers, **way)
        self.opt.memo.steps = list(self.opt.steps)     # what their code reads was not looked at
        for p in self.params:
            for k, v in (start or {}).items(): self.opt.state[p][k] = copy.deepcopy(v)
        self.told = []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            for t in range(count):
                for p in self.params: p.grad = torch.sin(torch.arange(12.).view(3, 4) + t)
                if at: at(self.opt, t)
                self.opt.step()
        self.told = [str(w.message).removeprefix(REASON) for w in caught if REASON in str(w.message)]

    @property
    def kernels(self):
        return sum(q.kernel is not None for found in self.opt.memo.programs.values() for q in found)

    def left(self):
        "Everything that the steps have left behind."
        states = [{k: v.tolist() if isinstance(v, Tensor) else v for k, v in self.opt.state[p].items()} for p in self.params]
        return [p.tolist() for p in self.params], states

def close(a, b):
    "Whether two nested lists are equal, numbers nearly."
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(close, a, b))
    if isinstance(a, dict): return a.keys() == b.keys() and all(close(v, b[k]) for k, v in a.items())
    if isinstance(a, float) and isinstance(b, float): return a == pytest.approx(b, rel=1e-5, abs=1e-7, nan_ok=True)
    return unchanged(a, b) or a == b

def agree(steps, why=None, **kw):
    "The loop's results from a kernel, or with the warning `why` from the loop."
    make = kw.pop('make', lambda: [parameter()])
    loop, fused = Run(steps, make(), **kw), Run(steps, make(), fused=True, **kw)
    assert close(loop.left(), fused.left()), (loop.left(), fused.left())
    if why is None: assert fused.told == [] and fused.kernels, fused.told
    else: assert len(fused.told) == 1 and why in fused.told[0], fused.told
    return fused


# --- names for one tensor, changes in place, masks
def through_data(p, g, state): p.data.mul_(0.9)
def through_detach(p, g, state): q = p.detach(); q.add_(g, alpha=0.1)
def left_behind(p, g, state): m = state['m']; state['m'] = m.mul(2.); m.add_(1.); return m + state['m']
def swapped(p, g, state): state['m'], state['n'] = state['n'], state['m']; return state['m']*g
def swapped_changed(p, g, state): m, n = state['m'], state['n']; state['m'], state['n'] = n.add_(g), m.mul_(0.5); return g
def on_a_clone(p, g, state): c = p.clone(); c.mul_(3.); return c + p
def a_state_as_update(p, g, state): return state['m'].mul_(0.9).add_(g)
def halves_it(p, g, state): state['m'].mul_(0.5)
def itself(p, g, state): return p
def a_mask(p, g, state): return g > 0
def a_number(p, g, state): return 2.
def one_number(p, g, state): return g.norm()
def norm_in_place(p, g, state): n = g.norm(); n.clamp_(min=1.); return g/n
def norm_grown(p, g, state): n = g.norm(); n.add_(g); return g
def augmented(p, g, state): g += 1; return g
def augmented_later(p, g, state): d = g*2; d += 1; d *= p; return d
def second_name(p, g, state): state['m'] = state['n']; return g
def a_mask_as_state(p, g, state): state['m'] = g > 0; return g
def sum_by_row(p, g, state): return g - g.sum(1, keepdim=True)
def sum_none(p, g, state): return g - g.sum(dim=None)
def mean_typed(p, g, state): return g - g.mean(dtype=torch.float64).float()
def norm_one(p, g, state): return g/g.norm(1)
def norm_inf(p, g, state): return g/g.norm(INF)
def norm_linalg(p, g, state): return g/torch.linalg.vector_norm(g)
def view_as(p, g, state): q = p.view_as(p); q.mul_(0.9)
def dunder(p, g, state): return torch.Tensor.mul(g, 2.)
def other_way(p, g, state): return 3./(g + 2.) + (1 - g) + 2.**g
def rounded(p, g, state): return torch.div(g, 0.3, rounding_mode='floor')
def out(p, g, state): m = state['m']; torch.mul(g, 2., out=m); return m
def functional(p, g, state): return nn.functional.relu(g)
def by_aten(p, g, state): return torch.ops.aten.add(g, p)
def catches(p, g, state):
    try: return g.cumsum(0)
    except Exception: return g*7.
def counts(p, g, state): m = (g > 0).float(); return m*g + (g > 0)*(p > 0)*g
def inverted(p, g, state): m = ~(g > 0) | (p > 0); return torch.where(m, g, 0.) + m.type_as(g)
def filled(p, g, state): m = (g > 0).clone(); m.fill_(0.3); return m.to(g.dtype)*g
def with_preserve(p, g, state): z = torch.zeros_like(p, memory_format=torch.preserve_format); return z.add_(g)
def no_grad(p, g, state):
    with torch.no_grad(): p.mul_(0.5)
def power(p, g, state, *, k=2.): return g.abs()**k

TENSORS = dict(m=torch.full((3, 4), 0.5), n=torch.full((3, 4), -1.))
@pytest.mark.parametrize('steps,why', [
    (through_data, None), (through_detach, None), (left_behind, None), (swapped, 'second name'), (swapped_changed, None),
    (on_a_clone, None), ([a_state_as_update, halves_it, sgd], None), (itself, None), (a_mask, None), (one_number, 'no tensor of the shape of p'),
    (a_number, 'no tensor of the shape of p'), (norm_in_place, None), (augmented_later, None), (a_mask_as_state, 'has become a mask'),
    (sum_by_row, 'sum with these arguments'), (sum_none, None), (mean_typed, 'mean with these arguments'), (norm_one, None), (norm_inf, 'norm with these arguments'),
    (norm_linalg, None), (view_as, 'view_as has no fused form'), (dunder, None), (other_way, None), (rounded, 'div with these arguments'),
    (out, 'mul with out='), (functional, 'relu has no fused form'), (by_aten, 'add has no fused form'), (catches, 'cumsum has no fused form'), (counts, None), (inverted, None),
    (filled, None), (with_preserve, None), (no_grad, None), (power, None)], ids=lambda v: getattr(v, '__name__', None))
def test_names_and_changes(steps, why): agree(steps, why, start=TENSORS)

@pytest.mark.parametrize('step,why', [(augmented, 'changes the gradient'), (norm_grown, 'shape or the type')])
def test_what_also_the_loop_cannot(step, why):
    "The loop raises, or changes the gradient; the recording is refused."
    rec = record([(step, {})], parameter(), [], {})
    assert why in rec.reason and step.__name__ in rec.reason

def test_two_names_for_one_state():
    "Afterwards the loop has one tensor under two names, which a layout refuses to touch."
    assert 'second name' in record([(second_name, {})], parameter(), ['m', 'n'], {}).reason


# --- what a step asks about its tensors
class Special(nn.Parameter): kind = 'embedding'

def is_tensor(p, g, state):
    if not isinstance(state.get('m'), Tensor): state['m'] = torch.zeros_like(p)
    assert isinstance(p, Tensor) and isinstance(g, Tensor) and torch.is_tensor(g)
    return state['m'].add_(g)
def is_parameter(p, g, state): return g*2 if isinstance(p, nn.Parameter) and not isinstance(g, nn.Parameter) else g
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
    if g.is_sparse or torch.is_complex(p) or not p.is_floating_point() or p.is_cuda: return g*3
    return g.to(p.device)*torch.finfo(p.dtype).bits
def writes(p, g, state): p.visited = True; return g
def sets_data(p, g, state): p.data = p*2; return g
def asks_all(p, g, state): return g*2 if vars(p) else g
def copies(p, g, state): return copy.deepcopy(g)*2
def prints_value(p, g, state): return g*float(f'{g.norm():.1f}')

@pytest.mark.parametrize('step,why', [
    (is_tensor, None), (is_parameter, 'asks for'), (hashes, 'which tensor this is'), (keyed, 'which tensor this is'), (identified, 'which tensor this is'),
    (in_a_list, None), (asks_shape, '.shape is not known'), (asks_numel, 'numel has no fused form'), (asks_size, 'size has no fused form'), (asks_grad, '.grad is not known'),
    (asks_requires, '.requires_grad is not known'), (asks_facts, None), (writes, 'sets .visited'), (sets_data, 'sets .data'), (copies, 'which tensor this is'), (asks_all, 'all attributes of a tensor'),
    (prints_value, '__format__ has no fused form')], ids=lambda v: getattr(v, '__name__', None))
def test_questions(step, why):
    "Answered as in the loop, or refused; `.__class__` until the caller says which parameter it is."
    if step is is_parameter:
        rec = record([(step, {})], parameter(), [], {})
        assert rec.reason is None and rec.numbers({}, {}, parameter()) is not None and rec.numbers({}, {}, torch.ones(3, 4)) is None
        with pytest.raises(Unfusable, match=why): rec.numbers({}, {})
    else: agree(step, why)

def flagged(p, g, state): return g*0. if getattr(p, 'no_decay', False) else g
def scaled(p, g, state): return g*p.scale
def has(p, g, state): return g*2. if hasattr(p, 'scale') else g
def of_class(p, g, state): return g*2. if getattr(p, 'kind', '') == 'embedding' else g
def of_gradient(p, g, state): return g*2. if getattr(g, 'kind', '') else g

@pytest.mark.parametrize('step,attributes,code', [
    (flagged, {}, 'v1'), (flagged, dict(no_decay=False), 'v1'), (flagged, dict(no_decay=True), 'v1*c0'),
    (scaled, dict(scale=3.), 'v1*c0'), (has, {}, 'v1'), (has, dict(scale=None), 'v1*c0')])
def test_attributes_of_a_parameter(step, attributes, code):
    "What somebody wrote on it is read, and the recording holds where it is the same."
    rec = record([(step, {}), (sgd, dict(lr=1.))], parameter(**attributes), [], {})
    assert rec.reason is None
    wanted = 'v1' if code == 'v1' else 'v2'
    assert [n.code for n in rec.nodes[2:]][-1] == f'fma({wanted}, c{len(rec.coefs) - 1}, v0)'
    hypers = dict(lr=0.5)
    assert rec.numbers(hypers, {}, parameter(**attributes)) is not None
    for other in {}, dict(no_decay=True), dict(no_decay=1), dict(scale=2.), dict(scale=3):
        fits = all(unchanged(other.get(k, 'absent'), attributes.get(k, 'absent')) for k in rec.asked)
        assert (rec.numbers(hypers, {}, parameter(**other)) is not None) == fits

def test_attributes_that_cannot_be_read():
    assert record([(of_class, {})], Special(torch.ones(2)), [], {}).reason is None
    assert record([(of_class, {})], Special(torch.ones(2)), [], {}).nodes[-1].code == 'v1*c0'
    assert '.kind is not known' in record([(of_gradient, {})], parameter(), [], {}).reason
    assert 'neither a number nor text' in record([(flagged, {})], parameter(no_decay=[1]), [], {}).reason
    assert 'hides .mean' in record([(flagged, {})], parameter(mean=3), [], {}).reason
    assert 'hides .id' in record([(flagged, {})], parameter(id=3), [], {}).reason
    assert not issubclass(Unfusable, AttributeError)


# --- guards
@pytest.mark.parametrize('now,then,same', [
    (NAN, float('nan'), True), (NAN, 1., False), (0., -0., False), (0., 0., True), (1, True, False), (1, 1., False), (True, True, True), ('a', 'a', True), (None, None, True),
    ((1., NAN), (1., NAN), True), ((0.,), (-0.,), False), ([1], (1,), False), ({'a': NAN}, {'a': NAN}, True), ({'a': 1}, {'b': 1}, False), ({1: 1}, {True: 1}, False),
    (np.ones(2), np.ones(2), False), (np.float64(1), 1., False), (np.float64(NAN), np.float64(NAN), True), (torch.ones(2), torch.ones(2), False), (10**400, 10**400, True),
    (decimal.Decimal('sNaN'), decimal.Decimal('sNaN'), False), (object(), object(), False), ((1,), (1, 2), False)])
def test_unchanged(now, then, same):
    "Nothing raises; what cannot be told apart is the same, and nothing else."
    now, then = copy.deepcopy(now), copy.deepcopy(then)
    assert unchanged(now, then) is same and unchanged(then, now) is same

class Stubborn:
    def __eq__(self, other): raise RuntimeError
    __hash__ = None

def test_unchanged_never_raises():
    assert unchanged(Stubborn(), Stubborn()) is False and unchanged([Stubborn()], [Stubborn()]) is False

def skips_bad_loss(p, g, state, *, loss=0.):
    if not math.isfinite(loss): return torch.zeros_like(g)

def test_a_number_that_is_nan():
    "A branch on it is a guard that holds; the step after next finds its own recording again."
    def at(opt, t): opt.param_groups[0]['loss'] = (1., NAN, NAN, INF, 2.)[t]
    assert len(agree(skips_bad_loss, at=at, count=5).opt.memo.programs) == 1
    rec = record([(skips_bad_loss, dict(loss=NAN))], parameter(), [], {})
    assert rec.numbers(dict(loss=float('nan')), {}) is not None and rec.numbers(dict(loss=1.), {}) is None

@pytest.mark.parametrize('step,one,others', [
    (lambda p, g, state, *, x: g*x if x else g, 1., (1, True, 0., NAN*0 + 0., np.float64(0.), '1.', None, [1.], torch.tensor(1.))),
    (lambda p, g, state, *, x: g*2 if x is True else g, True, (1, 1., False, 'True')),
    (lambda p, g, state, *, x: g*math.copysign(1., x), 0., (-0., 0, False)),
    (lambda p, g, state, *, x: g*x[0], (1., 2), ((1, 2), [1., 2], (1., 2, 3), 1., None)),
    (lambda p, g, state, *, x: g*(2 if x == 'a' else 1), 'a', ('b', 1, None))])
def test_a_recording_holds_for_its_numbers_only(step, one, others):
    rec = record([(step, dict(x=one))], parameter(), [], {})
    assert rec.reason is None and rec.numbers(dict(x=copy.deepcopy(one)), {}) is not None
    for other in others: assert other is one or rec.numbers(dict(x=other), {}) is None or type(other) is type(one) and other and one
    assert rec.numbers({}, {}) is None and rec.numbers(dict(x=object()), {}) is None

class Mode(enum.Enum): a, b = range(2)
Pair = collections.namedtuple('Pair', 'beta decay')
@dataclasses.dataclass
class Options: scale: float = 2.

def test_what_never_holds_is_refused(monkeypatch):
    "Not even for the very numbers it was made with: once for all, and in words."
    def stiff(p, g, state, *, x): return g*float(x)
    assert record([(stiff, dict(x=1.))], parameter(), [], {}).reason is None
    monkeypatch.setattr(recorder, 'unchanged', lambda now, then: False)
    rec = record([(stiff, dict(x=1.))], parameter(), [], {})
    assert rec.reason == 'the steps ask for something that is never the same' and rec.numbers(dict(x=2.), {}) == ((), {})

def of_any(x):
    "A hyperparameter that the loop takes, as the default of a step that uses it if it can."
    def step(p, g, state, *, x=x):
        if isinstance(x, (float, complex)): return g*abs(x)
        if isinstance(x, tuple): return g*x[0]
        if isinstance(x, Options): return g*x.scale
        if isinstance(x, dict): return g*x['a'] if isinstance(x['a'], float) else g
        if isinstance(x, np.ndarray): return g*float(x[0])
        return g*2.
    return step

@pytest.mark.parametrize('x,why', [
    (np.ones(2), 'of type ndarray'), (Pair(0.5, 2), None), (Pair(0.5, np.ones(1)), 'of type ndarray'), ((n for n in 'ab'), 'of type generator'), (Options(), 'of type Options'),
    ({'a': 0.5}, None), ({'a': [1]}, 'of type dict'), ({1, 2}, 'of type set'), (frozenset([1]), 'of type frozenset'), ('text', None), (b'text', None), (None, None), (2j, 'of type complex'),
    (fractions.Fraction(1, 3), 'of type Fraction'), (decimal.Decimal('0.1'), 'of type Decimal'), (torch.float32, None), (Tensor, None), (of_any, None), (partial(of_any, 1), 'of type partial'),
    (np.float64(0.3), None), (np.float32(0.3), None), (Mode.a, None), (Mode, None), ([0.5, 1], None), (((0.5, 1), 2), None), (torch.Size([2]), None), (object(), 'of type object'),
    (threading.Lock(), 'of type lock'), (nn.Linear(1, 1), 'of type Linear'), (len, None), (Stubborn(), 'of type Stubborn'), (True, None), (range(3), 'of type range'), (torch.ones(1), 'is a tensor')],
    ids=lambda v: type(v).__name__)
def test_hyperparameters_of_any_type(x, why):
    "Where it cannot be watched, the loop runs; the name of the hyperparameter is in the warning."
    if isinstance(x, (Pair, tuple, list)) and type(x) is not torch.Size: first = lambda p, g, state, *, x=x: g*x[0] if not isinstance(x[0], tuple) else g*x[0][0]
    else: first = of_any(x)
    fused = agree(first, why and f'hyperparameter x {"" if why.startswith("is") else "is "}{why}')
    assert fused.opt.param_groups[0]['x'] is not None or x is None

def test_a_generator_is_not_used_up():
    numbers = iter([1., 2., 3., 4., 5., 6.])
    def step(p, g, state, *, x=numbers): return g*next(x)
    assert 'of type list_iterator' in Run(step, fused=True).told[0]
    assert next(numbers) == 4.

def test_a_hyperparameter_that_a_step_changes():
    def pops(p, g, state, *, x): x.append(x.pop(0)); return g*x[0]
    def marks(p, g, state, *, x): x['a'] = x['a'] + 1; return g
    for step, x in (pops, [1., 2.]), (marks, {'a': 1}):
        kept = copy.deepcopy(x)
        rec = record([(step, dict(x=x))], parameter(), [], {})
        assert 'it changes hyperparameter x' in rec.reason and x == kept

def grows(p, g, state):
    for k, v in state.items():
        if isinstance(v, float): state[k] = v + 1
        if isinstance(v, Pair): state[k] = v._replace(beta=v.beta*2)
        if isinstance(v, Tensor): v.add_(g)
    return g

@pytest.mark.parametrize('state,why', [
    ({3: 1.}, None), ({'a b': 1., 'é': 2}, None), ({(1, 2): 1.}, 'a key that is no text'), (dict(x=(1., 2)), None),
    (dict(x=2j), 'of type complex'), ({'m': torch.zeros(3, 4), 'x-y': torch.zeros(3, 4), 'é': torch.zeros(3, 4)}, None), ({7: torch.zeros(3, 4), 8: 1.}, None)])
def test_numbers_in_the_state_of_any_type(state, why): agree(grows, why, start=state)

@pytest.mark.parametrize('x,why', [(np.ones(2), 'is of type ndarray'), ([1.], 'can be changed in place'), ({1}, 'is of type set'), ({'a': 1}, 'can be changed in place'), (threading.Lock(), 'is of type lock')])
def test_what_no_recording_keeps(x, why): assert f"state['x'] {why}" in record([(grows, {})], parameter(), [], dict(x=x)).reason

def leaves_a_set(p, g, state): state['x'] = {1} if state.get('x', 0) == 0 else 2; return g
def leaves_a_value(p, g, state): state['x'] = (g, 1); return g
def complex_number(p, g, state, *, x=-2.): return g*abs((x*x - 5)**0.5)
def becomes_complex(p, g, state, *, x=1.): return g*abs(x**0.5)
def large_number(p, g, state, *, x=2): return g*float(x**70)

def test_what_is_left_in_the_state():
    assert "state['x'] has become a set" in record([(leaves_a_set, {})], parameter(), [], dict(x=0)).reason
    assert "state['x'] has become a tuple" not in (record([(leaves_a_value, {})], parameter(), [], dict(x=0)).reason or '')
    assert record([(leaves_a_value, {})], parameter(), [], dict(x=0)).reason is not None

def test_numbers_that_are_not_real():
    agree(complex_number, 'no real number')
    def at(opt, t): opt.param_groups[0]['x'] = (1., 4., -4., 9.)[t]
    agree(becomes_complex, 'no real number', at=at, count=4)
    agree(large_number)
    assert record([(lambda p, g, state: g*2**63, {})], parameter(), [], {}).reason.endswith('mul with these arguments has no fused form')

def test_a_schedule_of_numpys_numbers():
    "Steps get Python's numbers, so that one recording serves both."
    def at(opt, t): opt.param_groups[0]['lr'] = (0.1, np.float64(0.05), np.float64(0.02), 0.01)[t]
    fused = agree([sgd], at=at, count=4)
    assert [len(found) for found in fused.opt.memo.programs.values()] == [1]


# --- what happens while steps are recorded
TEACHER, SGD = nn.Linear(2, 2), torch.optim.SGD
REAL = torch.full((3, 4), 2.)

def reads_closure(p, g, state): return g*REAL
def teacher_mean(p, g, state): return g*TEACHER.weight.mean()
def teacher_item(p, g, state): return g*TEACHER.weight.abs().mean().item()
def teacher_float(p, g, state): return g*float(TEACHER.weight.abs().mean())
def teacher_runs(p, g, state): TEACHER(torch.ones(2)); return g
def new_zeros(p, g, state): return g + torch.zeros(3, 4)
def new_tensor(p, g, state): return g*torch.tensor(2.)
def changes_real(p, g, state): REAL.add_(1.); return g
def shape_of_real(p, g, state): return g*REAL.shape[0]
def in_grad(p, g, state):
    with torch.enable_grad(): return g*2.
def swallowed(p, g, state):
    try: scale = TEACHER.weight.mean()
    except Exception: scale = 3.
    return g*scale

@pytest.mark.parametrize('step', [reads_closure, teacher_mean, teacher_item, teacher_float, teacher_runs, new_zeros, new_tensor, changes_real, shape_of_real, swallowed])
def test_nothing_real_is_computed(step):
    "No tensor but p, g and those of the state is read, made or changed."
    real, weight = REAL.clone(), TEACHER.weight.detach().clone()
    try:
        rec = record([(step, {})], parameter(), [], {})
        assert step.__name__ in rec.reason and 'a tensor that is neither p, g nor in the state' in rec.reason
        assert torch.equal(real, REAL) and torch.equal(weight, TEACHER.weight)
        if step is not changes_real: agree(step, 'neither p, g nor in the state')
    finally: REAL.copy_(real)

def test_autograd_stays_off(): agree(in_grad, 'autograd is switched on')

@pytest.mark.parametrize('fused', [False, True])
def test_another_optimizer_in_a_step(fused):
    "It takes one step, not three; and neither hangs nor leaves `math` changed."
    def run(outer):
        q = nn.Parameter(torch.ones(3))
        inner = optim.AdamW([q], lr=0.1, fused=fused)
        def step(p, g, state):
            q.grad = torch.ones(3)
            inner.step()
            return g
        done = Run(step, fused=outer)
        return q.tolist(), done.left(), inner.state[q]['step'], done.told
    (a, b, c, told), (d, e, f, why) = run(False), run(True)
    assert close([a, b, c], [d, e, f]) and c == 3 and told == [] and len(why) == 1 and 'neither p, g nor in the state' in why[0]
    assert math.sqrt.__module__ == 'math' and builtins.id(1) == id(1) and id.__module__ == 'builtins'

def test_a_recording_within_a_recording():
    "It is refused, since it asks a tensor that is not of the step; it does not wait for itself."
    done = []
    def step(p, g, state, *, lr): return g*record([(sgd, dict(lr=0.1))], REAL, [], {}).numbers(dict(lr=lr), {})[0][0]
    def work(): done.append(record([(step, dict(lr=0.5))], parameter(), [], {}))
    thread = threading.Thread(target=work, daemon=True)
    thread.start(), thread.join(20)
    assert done, 'it hangs'
    assert 'step step: .dtype: a tensor that is neither p' in done[0].reason
    with symbolic_math(), symbolic_math(): assert math.sqrt(4.) == 2.
    assert math.sqrt.__module__ == 'math' and LOCK.acquire(blocking=False)
    LOCK.release()

@pytest.mark.parametrize('step,quiet', [
    (lambda p, g, state: g*random.random(), False), (lambda p, g, state: g*(2 if random.random() < 2 else 1), False), (lambda p, g, state: g*np.random.rand(), False),
    (lambda p, g, state: torch.manual_seed(3) and g, False), (lambda p, g, state: g*random.Random(0).random(), True), (lambda p, g, state: g*float(np.random.default_rng(0).random()), True)])
def test_random_numbers(step, quiet):
    "A draw from a generator that all share is recognised, whatever comes of it; it is not used up by recording."
    def run(**way):
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        done = Run(step, **way)
        return done, (random.random(), np.random.rand(), torch.rand(()).item())
    (loop, a), (fused, b) = run(), run(fused=True)
    assert close(loop.left(), fused.left()) and a == b
    assert fused.told == [] if quiet else ['step <lambda>: it draws random numbers'] == fused.told

def test_a_clock_is_found_by_the_second_recording():
    assert Run(lambda p, g, state: g*time.perf_counter(), fused=True).told == ['the steps do something else each time they are run']

def test_an_interrupted_recording_leaves_nothing():
    class Stop(BaseException): pass
    def stops(p, g, state): random.random(); raise Stop
    before = random.getstate()
    with pytest.raises(Stop): record([(stops, {})], parameter(), [], {})
    assert random.getstate() == before and math.sqrt(4) == 2 and id.__module__ == 'builtins'
    assert not torch.overrides.is_tensor_method_or_property(len) and torch.ones(2).sum() == 2      # no mode is left

def test_recording_is_the_same_in_every_thread():
    "While one thread records, `math` and `id` do in another what they always do."
    stop, wrong = threading.Event(), []
    def work():
        while not stop.is_set():
            if math.sqrt(9.) != 3. or id(stop) != builtins.id(stop): wrong.append(1)
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    for _ in range(50): record([(sgd, dict(lr=0.1))], REAL, [], {})
    stop.set(), thread.join()
    assert not wrong
