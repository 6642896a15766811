"""A list of tensors means what each of its tensors means, or the step is refused in words."""
import itertools
import math
import operator

import pytest
import torch

from optimizers_explained.multi_tensor import TensorList

SPECIAL = [math.inf, -math.inf, math.nan, 0., -0., 1e-40, -1e-40, 1., -1., 2.5, -0.3, 1e4]
NUMBERS = [0, 2, -1, 0.5, 0.1, -0., math.inf, math.nan, 1e-40, 1/3, True, False]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool]
NAMES = sorted({n[len('_foreach_'):].rstrip('_') for n in dir(torch) if n.startswith('_foreach_')})


def values(dtype, seed):
    "Three tensors of different layouts, with special values in different places."
    gen = torch.Generator().manual_seed(seed)
    flat = torch.cat([torch.randn(24, generator=gen), torch.tensor(SPECIAL)])
    if not dtype.is_floating_point: flat = flat.nan_to_num(0, 9, 9).clamp(0, 9)
    a, b, c = (flat[torch.randperm(36, generator=gen)].reshape(6, 6).to(dtype) for _ in range(3))
    return [a, b.t(), c]


def same(a, b):
    "Equal to the bit; a NaN is a NaN."
    if isinstance(a, (tuple, list)): return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if not isinstance(a, torch.Tensor): return type(a) is type(b) and (a == b or a != a and b != b)
    if (a.dtype, a.shape, a.stride()) != (b.dtype, b.shape, b.stride()): return False
    if not a.dtype.is_floating_point: return bool((a == b).all())
    return bool(((a == b) & (a.signbit() == b.signbit()) | a.isnan() & b.isnan()).all())


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
        if isinstance(together, type) or not same(of_row(together, i), alone): return False
    return all(same(x, y) for name in lists for x, y in zip(lists[name], singly[name]))


def method(name):
    def call(first, *args, **kwargs): return getattr(first, name)(*args, **kwargs)
    call.__name__ = f'Tensor.{name}'
    return call


OPERATORS = dict(add='add', sub='sub', mul='mul', div='truediv', pow='pow', neg='neg', abs='abs', mm='matmul')


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
    for x in ['p', 'mask', small, small.double(), torch.tensor(3), None, [1, 2], *NUMBERS]: yield ('g', x), {}
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


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.filterwarnings('ignore')
def test_operations_of_torch_on_lists(name, dtype):
    inputs = dict(g=values(dtype, 0), p=values(dtype, 1), q=values(dtype, 2), mask=values(torch.bool, 3))
    def make(): return {k: [t.clone() for t in ts] for k, ts in inputs.items()}
    wrong = [(func.__name__, args, kwargs) for func, (args, kwargs) in itertools.product(ways(name), forms())
             if not against_the_loop(func, make, args, kwargs)]
    assert not wrong, wrong[:5]
