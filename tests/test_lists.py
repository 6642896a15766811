"""A list means what each of its tensors means, or a step is refused in words."""
import copy
import gc
import inspect
import math
import operator
import random
import sys
import time
import weakref
from dataclasses import dataclass
from functools import lru_cache, partial, wraps
from random import random as draw
from types import ModuleType

import numpy as np
import pytest
import torch

from optimizers_explained.steps import adam
from optimizers_explained.checks import Ambiguous, Checked, name_of, takes
from optimizers_explained.core import StepOptimizer
from optimizers_explained.steps import decay, decay_rel, ema, flip, l2
from optimizers_explained.steps import lion, momentum, sgd
from optimizers_explained.speed.lists import TensorList
from optimizers_explained.speed.outside import Alone, Outside, Together
from optimizers_explained.speed.outside import alone, flags, watched
from optimizers_explained.steps import lars, trust

INF, NAN = math.inf, math.nan
SPECIAL = [INF, -INF, NAN, 0., -0., 1e-40, -1e-40, 1., -1., 2.5, -0.3, 1e4]
NUMBERS = [0, 2, -1, 0.5, 0.1, -0., INF, NAN, 1e-40, 1/3, True, False]
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
DTYPES = [*FLOATS, torch.int64, torch.bool]
START = '_foreach_'
NAMES = {n[len(START):].rstrip('_') for n in dir(torch) if n.startswith(START)}


def values(dtype, seed):
    "Three tensors of different layouts, with special values in different places."
    gen = torch.Generator().manual_seed(seed)
    flat = torch.cat([torch.randn(24, generator=gen), torch.tensor(SPECIAL)])
    if not dtype.is_floating_point: flat = flat.nan_to_num(0, 9, 9).clamp(0, 9)
    mixed = [flat[torch.randperm(36, generator=gen)] for _ in range(3)]
    a, b, c = [m.reshape(6, 6).to(dtype) for m in mixed]
    return [a, b.t(), c]


def same(a, b):
    "Equal to the bit; a NaN is a NaN."
    if type(a) is not type(b): return False
    if isinstance(a, (tuple, list)): return len(a) == len(b) and all(map(same, a, b))
    if not isinstance(a, torch.Tensor): return a == b or a != a and b != b
    if (a.dtype, a.shape, a.stride()) != (b.dtype, b.shape, b.stride()): return False
    if not a.dtype.is_floating_point: return bool((a == b).all())
    numbers = (a == b) & (a.signbit() == b.signbit())
    return bool((numbers | a.isnan() & b.isnan()).all())


def of_row(x, i):
    "What the i-th tensor has of what a list was given or gave."
    if type(x) is TensorList: return x.tensors[i]
    if isinstance(x, (tuple, list)):
        parts = [of_row(y, i) for y in x]
        return type(x)(parts)
    return x


def attempt(f, *args, **kwargs):
    "What `f` gives, or the type of what it raises."
    try: return f(*args, **kwargs)
    except Exception as e: return type(e)


def against_the_loop(func, make, args, kwargs):
    "Whether `func` on lists gives, and leaves behind, what it does tensor by tensor."
    lists, singly = make(), make()
    def fill(inputs, wrap):
        def one(x): return wrap(inputs[x]) if isinstance(x, str) and x in inputs else x
        return [one(x) for x in args], {k: one(v) for k, v in kwargs.items()}
    a, k = fill({name: TensorList(ts) for name, ts in lists.items()}, lambda x: x)
    together = attempt(func, *a, **k)
    for i in range(3):
        a, k = fill({name: ts[i] for name, ts in singly.items()}, lambda x: x)
        alone = attempt(func, *a, **k)
        if isinstance(alone, type): return isinstance(together, type)
        if isinstance(together, type): return False
        if not same(of_row(together, i), alone): return False
    return all(same(x, y) for name in lists for x, y in zip(lists[name], singly[name]))


def method(name):
    def call(first, *args, **kwargs): return getattr(first, name)(*args, **kwargs)
    call.__name__ = f'Tensor.{name}'
    return call


OPERATORS = dict(add='add', sub='sub', mul='mul', div='truediv', pow='pow', neg='neg',
                 abs='abs', mm='matmul')


def ways(name):
    "The operation as a method, a function and an operator, in place and not."
    yield from [method(n) for n in (name, f'{name}_') if hasattr(torch.Tensor, n)]
    yield from [getattr(torch, n) for n in (name, f'{name}_') if hasattr(torch, n)]
    if name in OPERATORS:
        names = OPERATORS[name], f'i{OPERATORS[name]}'
        yield from [getattr(operator, n) for n in names if hasattr(operator, n)]


def forms():
    "Arguments, right and wrong: a letter is a list."
    small = torch.tensor(0.1)
    yield ('g',), {}
    scalars = [small, small.double(), torch.tensor(3)]
    for x in ['p', 'mask', *scalars, None, [1, 2], *NUMBERS]: yield ('g', x), {}
    for n in [*NUMBERS, small]:
        yield ('g', 'p', n), {}
        yield ('g', n, 'p'), {}
        yield ('g', 'p', 'q', n), {}
        yield ('g', 'p'), dict(alpha=n)
        yield ('g', n), dict(alpha=2)
        yield ('g', 'p', 'q'), dict(value=n)
    for x in ('p', 2.): yield ('g',), dict(other=x)
    for x in (1, 2., math.inf, 0, 'fro'): yield ('g',), dict(p=x)
    for x in (0, 1, -1):
        yield ('g', 2, x), {}
        yield ('g',), dict(dim=x)
    yield ('p', 'g'), {}
    yield ('p', 'p'), {}
    yield ('g', 'p', 'q'), {}
    yield ('g', 'p'), dict(rounding_mode='floor')
    yield ('g', 2), dict(rounding_mode='trunc')
    yield ('g',), dict(decimals=1)
    yield ('g',), dict(memory_format=torch.contiguous_format)
    yield ('g', 'p'), dict(weight='q')
    yield ('g',), dict(end='p', weight=0.3)
    yield ('g',), dict(exponent=2)
    yield ('g',), dict(dtype=torch.float64)
    yield (2, 'g'), {}
    yield (2., 'g'), {}


@pytest.mark.parametrize('name', sorted(NAMES))
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.filterwarnings('ignore')
def test_operations_of_torch_on_lists(name, dtype):
    inputs = {k: values(dtype, seed) for seed, k in enumerate('gpq')}
    inputs['mask'] = values(torch.bool, 3)
    def make(): return {k: [t.clone() for t in ts] for k, ts in inputs.items()}
    wrong = [(func.__name__, args, kwargs)
             for func in ways(name) for args, kwargs in forms()
             if not against_the_loop(func, make, args, kwargs)]
    assert not wrong, wrong[:5]


# ---- functions that are no list operation of torch, and what they give
FUNCTIONS = dict(
    where=lambda p, g: torch.where(p > 0, p, g),
    where_method=lambda p, g: g.where(p > 0, p),
    clamp_of_both=lambda p, g: torch.clamp(g, max=0.5) + g.clamp(-p.abs(), p.abs()),
    clamp_nan=lambda p, g: g.clamp(min=math.nan) + g.clamp_min(math.nan),
    norms=lambda p, g: g*torch.norm(p, 1) + p.norm(p=math.inf) + torch.linalg.norm(g),
    norm_of_rows=lambda p, g: p/p.norm(dim=1, keepdim=True) + g.norm('fro'),
    extremes=lambda p, g: g.max(p) + torch.max(p) + g.amax(0) + g.min(),
    largest_of_columns=lambda p, g: torch.max(g, dim=0),
    parts_of_a_float=lambda p, g: torch.frexp(p),
    sorting=lambda p, g: (*g.sort(-1), *torch.topk(p, 2)),
    split=lambda p, g: [a + 1 for a in g.split(2)],
    rows=lambda p, g: p[0] + g[:, 1] + p[p > 0].sum() + g[None].sum(),
    stacked=lambda p, g: torch.stack([p, g, p]).mean(0),
    joined=lambda p, g: torch.cat((p, g))[1:7],
    joined_with_one=lambda p, g: torch.stack([p, torch.ones_like(g)]).amax(0),
    products=lambda p, g: p @ g.T + torch.einsum('ij,ij->', p, g) + torch.mm(p, g),
    operators=lambda p, g: 2**(p % 3) // 1.5 - +g,
    second_names=lambda p, g: torch.multiply(p, 2).subtract(g, alpha=3).true_divide(p),
    rounded=lambda p, g: p.div(g, rounding_mode='floor') + p.round(decimals=1),
    masks=lambda p, g: ((p > 0) & (g < 1)) ^ ~(p == g),
    types=lambda p, g: p.to(torch.float64) + g.double().type_as(p),
    functional=lambda p, g: torch.nn.functional.softplus(p) + torch.special.expit(g),
    out=lambda p, g: torch.add(p, g, out=torch.empty_like(p)),
    out_returned=lambda p, g: torch.mul(g, 2, out=p) is p,
    in_place=lambda p, g: p.mul_(2).addcmul_(g, g, value=0.5).clamp_(-1).copy_(g),
    in_place_given_back=lambda p, g: p.mul_(2) is p,
    set_rows=lambda p, g: operator.setitem(p, 0, g[0]),
    set_masked=lambda p, g: operator.setitem(p, p > 0, 0.),
    augmented_row=lambda p, g: operator.setitem(p, 1, operator.iadd(p[1], g[1])),
    fills=lambda p, g: torch.nn.init.constant_(p, 0.5).fill_(g.new_full((), 2.)),
    lists_in_lists=lambda p, g: torch._foreach_mul([p, g], 2),
    changed_in_lists=lambda p, g: torch._foreach_mul_([p, g], 2),
    answers=lambda p, g: (
        p.size() == (6, 6), p.ndim, p.dtype, p.numel(), p.shape[0],
        len(p.shape), p.device.type, p.is_contiguous()),
    copies=lambda p, g: (copy.copy(p), copy.deepcopy(g)),
    no_gradient=lambda p, g: (p.grad, p == None),           # noqa: E711
    data=lambda p, g: p.data.mul_(3).detach().view(-1),
    equal=lambda p, g: torch.full_like(p, 3).sum().item(),
)


@pytest.mark.parametrize('name', FUNCTIONS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.filterwarnings('ignore')
def test_functions_of_torch_on_lists(name, dtype):
    def make():
        return dict(p=[t.contiguous() for t in values(dtype, 1)], g=values(dtype, 0))
    assert against_the_loop(FUNCTIONS[name], make, ['p', 'g'], {})


def test_a_random_function_draws_for_each_tensor():
    p = TensorList([torch.zeros(50), torch.zeros(50)])
    dropout = torch.nn.functional.dropout
    for x in (torch.rand_like(p), p.bernoulli_(0.5), dropout(p + 1)):
        assert not torch.equal(*x.tensors)


def test_a_function_of_the_user_with_a_name_of_torch():
    "`_foreach_mul` stands for torch's `mul`, and for no other function of that name."
    @torch.overrides.wrap_torch_function(lambda x: (x,))
    def mul(x): return x + 100
    class Doubled(torch.Tensor):
        def mul(self, x): return self + x
    p = TensorList([torch.ones(2), torch.ones(3)])
    assert mul(p).tensors[1].tolist() == [101.]*3
    p = TensorList([t.as_subclass(Doubled) for t in p.tensors])
    assert p.mul(5).tensors[0].tolist() == [6., 6.]


# ---- what has many answers
class Hook:
    "An object whose == is of no use."
    def __eq__(self, other): raise ArithmeticError
    __hash__ = None


SHARED = torch.zeros(3)
ASKED = dict(
    bool=lambda p: bool(p.sum() > 0), both=lambda p: p and 1, more=lambda p: max(p, p),
    float=lambda p: float(p.sum()), int=lambda p: int(p.sum()),
    index=lambda p: [1][p],
    complex=lambda p: complex(p.sum()), sqrt=lambda p: math.sqrt(p.sum()),
    len=lambda p: len(p), iter=lambda p: list(p), contains=lambda p: 1. in p,
    rows=lambda p: sum(p), reverse=lambda p: list(reversed(p)),
    format=lambda p: f'{p.sum():.2f}',
    hash=lambda p: hash(p), in_set=lambda p: p in {SHARED}, key=lambda p: {0: 1}[p],
    get=lambda p: {}.get(p, 0), as_key=lambda p: {p: 1},
    cached=lambda p: lru_cache(len)(p),
    weak=lambda p: weakref.WeakKeyDictionary()[p],
    flag=lambda p: getattr(p, 'flag', 0), has=lambda p: hasattr(p, 'half_of_them'),
    array=lambda p: p.odd, hook=lambda p: p.hook, vars=lambda p: vars(p),
    dict=lambda p: p.__dict__,
    shape=lambda p: p.shape[0], numel=lambda p: p.numel(),
    size=lambda p: p.size() == (3,),
    ptr=lambda p: p.data_ptr(), item=lambda p: p.sum().item(),
    tolist=lambda p: p.tolist(),
    storage=lambda p: p.untyped_storage(), numpy=lambda p: p.numpy(),
    np_array=lambda p: np.asarray(p), np_sqrt=lambda p: np.sqrt(p),
    chunks=lambda p: p.split(1),
    set_flag=lambda p: setattr(p, 'flag', 1), set_data=lambda p: setattr(p, 'data', p),
    set_grad=lambda p: setattr(p, 'grad', None), delete=lambda p: delattr(p, 'flag'),
    one_by_many=lambda p: SHARED.add_(p), augmented=lambda p: operator.iadd(SHARED, p),
    row_by_many=lambda p: operator.setitem(SHARED, 0, p.sum()),
    out_of_many=lambda p: torch.add(p, 1, out=SHARED),
    list_by_many=lambda p: torch._foreach_add_([SHARED], [p]),
    other_list=lambda p: p + TensorList([torch.ones(1)]),
)


@pytest.mark.parametrize('name', ASKED)
def test_what_has_many_answers_is_refused_in_words(name):
    p = TensorList([torch.ones(2), torch.ones(3)])
    for i, t in enumerate(p.tensors):
        t.flag, t.odd, t.hook = i, np.ones(2), Hook()
    p.tensors[1].half_of_them = True
    before = SHARED.clone()
    with pytest.raises(Ambiguous, match='^a step .*pass foreach=False$'): ASKED[name](p)
    assert torch.equal(SHARED, before)


def test_what_all_have_or_lack_is_answered():
    p = TensorList([torch.ones(2), torch.ones(3)])
    assert getattr(p, 'flag', 'none') == 'none' and not hasattr(p, 'flag')
    with pytest.raises(AttributeError): p.flag
    shared = np.ones(2)
    for flag in (True, 'bias', (1, NAN), NAN, torch.float32, Hook, shared, None):
        for t in p.tensors: t.flag = flag
        assert p.flag is flag
    for t, flag in zip(p.tensors, (math.nan, float('nan'))): t.flag = flag
    assert math.isnan(p.flag)
    copies = shared, shared.copy()
    for pair in ((1, True), (0., -0.), ([1], [1]), copies, (1, 2)):
        for t, flag in zip(p.tensors, pair): t.flag = flag
        with pytest.raises(Ambiguous, match='reads .flag'): p.flag
    for t in p.tensors: t.flag = t*2                        # a tensor for each
    assert p.flag.tensors[1].tolist() == [2.]*3


def test_the_message_takes_the_name_of_the_step():
    with pytest.raises(Ambiguous) as caught: len(TensorList([torch.ones(2)]))
    caught.value.who = 'step tall'
    assert str(caught.value).startswith('step tall asks for the length of a tensor')


# ---- steps in an optimizer
def trained(step, foreach, steps=3):
    gen = torch.Generator().manual_seed(0)
    ps = [torch.randn(4, n, generator=gen).requires_grad_() for n in (2, 3, 3)]
    opt = StepOptimizer(ps, [step, sgd], lr=0.1, foreach=foreach)
    for _ in range(steps):
        for p in ps: p.grad = torch.randn(p.shape, generator=gen)
        opt.step()
    return ps


def first_row(p, g, state): return g - g[0]
def larger(p, g, state): return g.where(g.abs() > 1, p)
def two_halves(p, g, state): return torch.cat([h.sign() for h in g.chunk(2)])
def with_last(p, g, state):
    last = state.get('last', torch.zeros_like(g))
    state['last'] = g.clone()
    return torch.stack([g, last]).amax(0)
def keeps_row(p, g, state): p[0] = 0.
def scaled_rows(p, g, state): return g/g.norm(dim=1, keepdim=True).clamp(min=1e-3)


@pytest.mark.parametrize(
    'step', [first_row, larger, two_halves, with_last, keeps_row, scaled_rows])
def test_steps_in_lists(step):
    for p, q in zip(trained(step, True), trained(step, False)): assert same(p, q)
    assert not same(trained(step, True)[0], trained(lambda p, g, state: None, True)[0])


# ---- what a step reads besides its arguments
RATE, TABLE, NESTED, TENSOR = 0.5, [1., 2.], dict(a=(1, [2])), torch.ones(2)
SPARED, LOG, BIG = {1, 2}, [], list(range(1000))
GENERATOR, NUMBERS_OF = np.random.default_rng(0), iter([1., 2.])


def scale(x): return x*RATE


class Config:
    rate = 0.1
    def __init__(self): self.momentum, self.unread = 0.9, None


CONFIG, FUNCTIONS_OF = Config(), dict(f=scale)


@dataclass
class Scale:
    by: float = 2.
    rng: object = None
    def __call__(self, p, g, state, *, lr=0.1): return g*self.factor()
    def factor(self): return self.by*RATE
    def noisy(self, p, g, state): return g*self.rng.random()


def decorated(f):
    @wraps(f)
    def wrapper(*args, **kwargs): return f(*args, **kwargs)
    return wrapper


def factory(by):
    count = 0
    def reads(p, g, state): return g*by
    def writes(p, g, state):
        nonlocal count
        count += 1
    return reads, writes


def nothing(p, g, state, *, lr, betas=(0.9, 0.99)):
    if p is None or g.dtype is torch.float16: return None
    state['step'] = t = state.get('step', 0) + 1
    state.update(last=t)
    return torch.maximum(p, g)*math.sqrt(t)
def a_number(p, g, state): return g*RATE
def through_a_helper(p, g, state): return scale(g)
def a_list(p, g, state): return g*TABLE[0]
def a_list_and_state(p, g, state): state['m'] = g*TABLE[0]
def nested(p, g, state): return g*NESTED['a'][1][0]
def an_object(p, g, state): return g*CONFIG.momentum
def from_a_table(p, g, state): return FUNCTIONS_OF['f'](g)
def a_class(p, g, state): return g*getattr(Config, 'rate')
def in_a_comprehension(p, g, state): return sum(g*x*RATE for x in (1, 2))
def torchs_draws(p, g, state): return g + torch.randn_like(g)*p.bernoulli(0.5)
def a_tensor(p, g, state): return g + TENSOR
def a_big_list(p, g, state): return g*BIG[-1]
@decorated
def wrapped(p, g, state): return g*RATE
@torch.no_grad()
def in_no_grad(p, g, state): return g*RATE


def asks_id(p, g, state): return g if id(p) in SPARED else None
def asks_inside(p, g, state): return g if any(id(x) in SPARED for x in (p,)) else None
def asks_is(p, g, state): return g if p is TENSOR else None
def asks_is_not(p, g, state): return None if p is not TENSOR else g
def asks_operator(p, g, state): return g if operator.is_(p, g) else None
def asks_type(p, g, state): return g if type(p) is torch.nn.Parameter else None
def asks_isinstance(p, g, state): return g if isinstance(p, torch.Tensor) else None
def asks_class(p, g, state): return g if p.__class__ == torch.Tensor else None
def asks_is_tensor(p, g, state): return g if torch.is_tensor(p) else None
def asks_a_helper(p, g, state): return g if is_parameter(p) else None
def is_parameter(p): return isinstance(p, torch.nn.Parameter)
def draws_one(p, g, state): return g*draw()
def draws_module(p, g, state): return g*random.gauss(0, 1)
def draws_numpy(p, g, state): return g*np.random.rand()
def draws_generator(p, g, state): return g*GENERATOR.normal()
def draws_secretly(p, g, state):
    import secrets
    return g*secrets.randbelow(3)
def draws_default(p, g, state, *, rng=random.Random(0)): return g*rng.random()
def draws_helper(p, g, state): return g*noise()
def noise(): return draw()
def reads_the_clock(p, g, state): return g*time.time()
def takes_the_next(p, g, state): return g*next(NUMBERS_OF)
def sets_global(p, g, state):
    global RATE
    RATE = RATE*1.
def logs(p, g, state): LOG.append(1)
def counts(p, g, state): NESTED['n'] = NESTED.get('n', 0) + 1
def passes_on(p, g, state): add_to(LOG)
def add_to(log):
    log += [1]
    log[0] = 1
def changes_tensor(p, g, state): TENSOR.mul_(1)
def sets_attribute(p, g, state): p.seen = True
def sets_object(p, g, state): CONFIG.momentum = 0.9
def evaluates(p, g, state): return eval('g*RATE')
def put(x, n, table):
    table[n] = 1
    return x
def stores_in_a_default(p, g, state, *, fn=put): return fn(g, 'n', NESTED)
def scaled_by_a_table(x, *, by=TABLE): return x*by[0]
def a_list_by_default(p, g, state, *, fn=scaled_by_a_table): return fn(g)


TOGETHER = [nothing, a_number, through_a_helper, a_list, a_list_and_state, nested,
            an_object, a_class, in_a_comprehension, torchs_draws, a_tensor, a_big_list,
            a_list_by_default, wrapped, in_no_grad, factory(2)[0],
            Scale(), Scale().__call__, partial(a_number), lambda p, g, state: g*RATE,
            flip, l2, decay, decay_rel, sgd, momentum, ema, lion, adam, trust, lars]
ALONE = [asks_id, asks_inside, asks_is, asks_is_not, asks_operator, asks_type,
         asks_isinstance, asks_class, asks_is_tensor, asks_a_helper, draws_one,
         draws_module, draws_numpy, draws_generator, draws_secretly, draws_default,
         draws_helper, reads_the_clock, takes_the_next, sets_global, logs, counts,
         passes_on, changes_tensor, sets_attribute, sets_object, evaluates,
         stores_in_a_default, factory(2)[1],
         Scale(rng=random.Random(0)).noisy, partial(nothing, rng=random.Random(0)),
         decorated(asks_id), torch.no_grad()(draws_one), Checked(asks_id), len]


@pytest.mark.parametrize('step', TOGETHER, ids=name_of)
def test_steps_that_may_run_on_a_list(step): assert alone(step) == Together()


@pytest.mark.parametrize('step', ALONE, ids=name_of)
def test_steps_that_run_on_one_parameter_at_a_time(step):
    answer = alone(step)
    assert isinstance(answer, Alone) and answer.reason.startswith('it')


def test_what_a_stand_in_answers_is_told_apart():
    "Two modules give one name to two functions; a stand-in answers only one of them."
    there = ModuleType('there')
    exec('ask = type\ndef class_of(p): return ask(p)', vars(there))
    def asks_one(p, g, state): return g if ask(p, torch.Tensor) else None
    def asks_both(p, g, state): return g if ask(p, torch.Tensor) else class_of(p)
    ask, class_of = isinstance, there.class_of
    assert Outside(asks_one).unrecordable == Together()
    assert isinstance(Outside(asks_both).unrecordable, Alone)
    assert Outside(asks_one).alone == Outside(asks_both).alone != Together()


def test_torchs_own_draws_are_told_apart():
    assert set(watched(torchs_draws).draws) == {'randn_like', 'bernoulli'}
    assert watched(nothing).draws == ()


@pytest.mark.parametrize('step, names', [
    (nothing, ()), (a_number, ()), (nested, ()), (a_tensor, ('TENSOR',)),
    (a_big_list, ('BIG',)), (draws_one, ('draw',)), (an_object, ()),
    (partial(Scale(rng=TENSOR).noisy), ('noisy.rng',))])
def test_what_cannot_be_watched(step, names): assert watched(step).unwatched == names


def changes(step, monkeypatch, *edits):
    "Whether what a step reads differs after each edit, and is as before without it."
    now = watched(step)
    before = now()
    assert now() == before and hash(before) is not None
    for edit in edits:
        with monkeypatch.context() as m:
            edit(m)
            if now() == before: return False
        assert now() == before
    return True


HERE = sys.modules[__name__]


@pytest.mark.parametrize('step', [
    a_number, through_a_helper, in_a_comprehension, wrapped, in_no_grad, Scale(),
    Scale().__call__, partial(a_number)])
def test_a_changed_number_is_seen(step, monkeypatch):
    values = 0.25, math.nan, True, 1, -0., '0.5', None, torch.ones(1)
    edits = [lambda m, v=v: m.setattr(HERE, 'RATE', v) for v in values]
    assert changes(step, monkeypatch, *edits)
    assert not changes(nothing, monkeypatch, *edits)


def test_a_nan_is_like_itself(monkeypatch):
    now = watched(a_number)
    monkeypatch.setattr(HERE, 'RATE', float('nan'))
    before = now()
    monkeypatch.setattr(HERE, 'RATE', float('nan'))
    assert now() == before
    for pair in ((1, True), (1, 1.), (0., -0.)):
        monkeypatch.setattr(HERE, 'RATE', pair[0])
        before = now()
        monkeypatch.setattr(HERE, 'RATE', pair[1])
        assert now() != before


def test_what_is_inside_is_seen(monkeypatch):
    assert changes(a_list, monkeypatch, lambda m: m.setattr(HERE, 'TABLE', [2., 2.]),
                   lambda m: m.setattr(HERE, 'TABLE', [1.]))
    assert changes(nested, monkeypatch, lambda m: m.setitem(NESTED, 'a', (1, [3])))
    assert changes(an_object, monkeypatch, lambda m: m.setattr(CONFIG, 'momentum', 0.8))
    assert changes(a_class, monkeypatch, lambda m: m.setattr(Config, 'rate', 0.2))
    assert not changes(an_object, monkeypatch, lambda m: m.setattr(CONFIG, 'unread', 1))
    step = Scale()
    assert changes(step, monkeypatch, lambda m: m.setattr(step, 'by', 3.))
    reads, _ = factory(2)
    cell = reads.__closure__[0]
    assert changes(reads, monkeypatch, lambda m: m.setattr(cell, 'cell_contents', 3))
    for step in (a_list, a_list_by_default):
        TABLE.append(3.)
        now = watched(step)
        before = now()
        TABLE[-1] = 4.
        assert now() != before
        TABLE.pop()


def test_a_replaced_function_is_equal_to_nothing(monkeypatch):
    now = watched(through_a_helper)
    before = now()
    with monkeypatch.context() as m:
        m.setattr(HERE, 'scale', lambda x: x)
        assert now() != before and now() != now()
    assert now() == before


def test_a_function_put_into_a_container_is_equal_to_nothing(monkeypatch):
    now = watched(from_a_table)
    before = now()
    with monkeypatch.context() as m:
        m.setitem(FUNCTIONS_OF, 'f', lambda x: x)
        assert now() != before and now() != now()
    assert now() == before
    assert changes(from_a_table, monkeypatch, lambda m: m.setattr(HERE, 'RATE', 2.))


def test_flags_of_parameters():
    def read(p): return flags(p, {'no_decay', 'scale', 'odd', 'values'})
    a, b = torch.nn.Parameter(torch.ones(1)), torch.nn.Parameter(torch.ones(1))
    assert read(a) == read(b) == ()
    a.no_decay, a.scale = True, 1.
    b.scale, b.no_decay = 1., True
    assert read(a) == read(b) and hash(read(a)) == hash(read(b))
    for value in (1, False, None, 'yes', (True,)):
        b.no_decay = value
        assert read(a) != read(b)
    a.no_decay, b.no_decay = float('nan'), math.nan
    assert read(a) == read(b)
    a.odd, b.odd = Hook(), Hook()
    a.values, b.values = np.ones(2), np.zeros(3)
    assert read(a) == read(b) and hash(read(a)) is not None
    assert flags(a, set()) == () != flags(a, {'scale'})      # only what a step asks for


# ---- hyperparameters
class Slotted:
    __slots__ = ()
    def __call__(self, p, g, state, *, by=1): return g*by


def test_hyperparameters_of_anything_that_can_be_called():
    empty = inspect.Parameter.empty
    bound = Scale().__call__
    for step, hypers in [(Scale(), {'lr': 0.1}), (bound, {'lr': 0.1}),
                         (Slotted(), {'by': 1}),
                         (partial(nothing, lr=0.1), {'lr': 0.1, 'betas': (0.9, 0.99)}),
                         (decorated(nothing), {'lr': empty, 'betas': (0.9, 0.99)}),
                         (lambda p, g, state, *, a=1: None, {'a': 1}),
                         (partial(lambda c, p, g, state, *, a: None, 1), {'a': empty})]:
        assert takes(step) == takes(step) == hypers
    for wrong in (3, max, torch.add, lambda p: None):
        with pytest.raises(TypeError, match='must be a function of'): takes(wrong)


def test_no_step_is_kept_alive():
    class Teacher: pass
    def make():
        teacher = Teacher()
        def step(p, g, state, *, lr): return teacher and g
        def other(p, g, state, *, lr, model=teacher): return g
        class Object:
            held = teacher
            def __call__(self, p, g, state): return self.held and g
        def held(p, g, state, *, owner): return g
        teacher.step = partial(held, owner=teacher)  # a circle
        steps = [step, other, Object(), partial(step, lr=1), teacher.step]
        return weakref.ref(teacher), steps
    ref, steps = make()
    p = torch.ones(1, requires_grad=True)
    for step in steps:
        assert takes(step) == takes(step)
        opt = StepOptimizer([p], [step], foreach=False, **{k: 0.1 for k in takes(step)})
        p.grad = torch.ones(1)
        opt.step()
    assert ref() is not None
    del steps, step, opt
    gc.collect()
    assert ref() is None


def by_two(p, g, state, *, by=2): return g*by
def by_one(p, g, state, *, by=1.): return g*by


@pytest.mark.parametrize('steps, words', [
    ([partial(by_two, by=2), partial(by_two, by=3)], 'by=2 is bound .* by=3'),
    ([partial(by_two, by=3), by_two], 'by=3 is bound to step by_two, and .*by=2'),
    ([by_one, partial(by_two, by=5)], 'by=5 .* step by_one has by=1.0'),
    ([partial(partial(by_two, by=2), by=7), by_two], 'by=7'),
    ([Checked(partial(by_two, by=2)), Checked(partial(by_two, by=3))], 'by=2 .*by=3'),
    ([partial(by_two, by=TABLE), partial(by_two, by=TENSOR)], 'by='),
])
def test_partials_that_disagree_are_refused(steps, words):
    p = torch.ones(1, requires_grad=True)
    with pytest.raises(ValueError, match=f'{words}.*pass by=... for all'):
        StepOptimizer([p], steps, foreach=False)
    opt = StepOptimizer([p], steps, foreach=False, by=4)     # for all of them
    assert opt.param_groups[0]['by'] == 4


def test_steps_with_values_of_their_own():
    def scaled(by):
        def step(p, g, state): return g*by
        return step
    def moved(steps, **hypers):
        p = torch.zeros(1, requires_grad=True)
        p.grad = torch.ones(1)
        StepOptimizer([p], [*steps, sgd], lr=1., foreach=False, **hypers).step()
        return -p.item()
    def thrice(c, p, g, state): return g*c
    assert moved([scaled(2), scaled(3)]) == 6
    assert moved([partial(thrice, 2), partial(thrice, 3)]) == 6          # by position
    assert moved([partial(by_two, by=3), partial(by_two, by=3.)]) == 9
    assert moved([by_two, by_two]) == 4       # the same step, twice
    assert moved([partial(by_two, by=2), by_two], by=5) == 25


def test_a_step_twice_in_a_list_shares_its_state():
    def count(p, g, state): state['n'] = state.get('n', 0) + 1
    p = torch.zeros(1, requires_grad=True)
    p.grad = torch.ones(1)
    opt = StepOptimizer([p], [count, count], foreach=False)
    opt.step()
    assert opt.state[p]['n'] == 2
