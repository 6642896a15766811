"""Every row of the operations table against torch: each is called in every way that
torch has, on numbers and masks, and gives torch's value or is refused in words."""
import inspect
import itertools
import operator
import os
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from optimizers_explained.speed import dispatch, operations
from optimizers_explained.core import StepOptimizer
from optimizers_explained.steps import sgd
from optimizers_explained.speed.cpp import Cpp
from optimizers_explained.speed.operations import (
    OPS, SAME, Function, Missing, Row, Unfusable, functions, row_of)
from optimizers_explained.speed.recorder import record
from optimizers_explained.speed.triton import Triton

ROOT = Path(__file__).resolve().parents[1]
INF, NAN = float('inf'), float('nan')
SPECIAL = (NAN, INF, -INF, 0., -0., 1., -1., 0.5,
           0.3, 2., 3., -2.5, 1e-40, -1e-40, 1e30, -1e30)
FLOATS = (0.3, -2.5, 0.5, 1., 0., -0., INF, -INF, NAN, 1e-40)

# --- what the operations are called with: x, y, z are numbers, m, n masks, s and o
# a number and a mask for the whole tensor, k a number that comes as a hyperparameter

def tensors(dtype):
    "Each special value beside each other, and as many ordinary ones."
    gen = torch.Generator().manual_seed(0)
    special = torch.tensor(SPECIAL, dtype=torch.float64)
    def plain(): return torch.randn(256, generator=gen)
    x = torch.cat([special.repeat_interleave(16), plain()])
    y = torch.cat([special.repeat(16), plain()])
    z = torch.cat([special.roll(5).repeat(16).roll(3), plain()])
    w = torch.zeros(512)
    w[7], w[300] = 3., 4.                 # its norm is 5
    return [t.to(dtype) for t in (x, y, z, w)]

def names(p, g, z, w, k):
    s = w.norm()
    masks = dict(m=p > 0, n=g < 2, o=s > 1.)
    return dict(x=p, y=g, z=z, s=s, k=k, **masks)


class Case(NamedTuple):
    "One way of calling an operation."
    label:str
    run:object # of the names above, to the result
    row:str # of the table
    has_k:bool=False # whether k is among its arguments

INPUTS = ('x', 'm', 's', 'k')
OTHERS = ('y', 'n', 'o', 'k', 0.5, 2, True)
CHOICES = dict( # where fewer do
    condition=('m', 'x', 'o'), tensor1=('y', 'n'), tensor2=('z', 'n'),
    value=(None, 'k', 's', True), alpha=(None, 'k', 's', 2, True),
    end=('y', 'n', 's'), weight=('k', 'z', 'n', 's', True),
    min=(None, 'k', 'y', 'n', 's', 0.5), max=(None, 'k', 'z', 'n', 1),
    fill_value=('k', 's', 'o', True), dtype=(None,),
    p=(None, 1, 2, 'fro', INF, 3), ord=(None, 1, 2, INF),
    exponent=('k', 'y', 'n', 's', 0, 1, 2, 3, 0.5, -0.5, -1, -2, -2., 1.5, True))
OPERATORS = dict(add='add', sub='sub', mul='mul', div='truediv', pow='pow',
                 bitwise_and='and_', bitwise_or='or_', bitwise_not='invert',
                 neg='neg', abs='abs', lt='lt', le='le', gt='gt', ge='ge',
                 eq='eq', ne='ne')

def arguments(row):
    "Every choice of arguments for a row: `{parameter: what}`."
    first, *rest = inspect.signature(OPS[row].write).parameters
    choices = [CHOICES.get(first, INPUTS), *(CHOICES.get(q, OTHERS) for q in rest)]
    for chosen in itertools.product(*choices):
        given = zip([first, *rest], chosen)
        yield {q: c for q, c in given if c is not None}

def has_tensor(chosen): # beside those that torch reads as numbers
    for parameter, c in chosen.items():
        is_operand = parameter not in ('alpha', 'value', 'p')
        if is_operand and c in list('xyzmnso'): return True
    return False

def look_up(what, env): return env.get(what, what) if isinstance(what, str) else what

def call(f, chosen, env, by_name=()):
    args, named = [], {}
    for parameter, c in chosen.items():
        if parameter in by_name: named[parameter] = look_up(c, env)
        else: args.append(look_up(c, env))
    return f(*args, **named)

def method(name, chosen, env, by_name=(), clone=False):
    first, *rest = chosen
    me = look_up(chosen[first], env)
    me = me.clone() if clone else me
    return call(getattr(me, name), {q: chosen[q] for q in rest}, env, by_name)

def cases_of(name, row, chosen):
    "All the ways to call `name` with these arguments."
    first, *rest = chosen
    positional = [q for q in chosen if not is_keyword(row, q)]
    keywords, is_second = set(chosen) - set(positional), name in SAME
    text = f"{name}({', '.join(f'{q}={c}' for q, c in chosen.items())})"
    def case(how, f, *args, **kwargs):
        run = partial(f, *args, **kwargs)
        return Case(f'{how} {text}', run, row, has_k='k' in chosen.values())
    if row != 'where' and chosen[first] != 'k' and name != 'linalg_vector_norm':
        for ending in '', '_':
            if not hasattr(Tensor, name + ending): continue
            how, clone = 'in-place method' if ending else 'method', ending == '_'
            use = partial(method, name + ending, chosen, clone=clone)
            yield case(how, use, by_name=keywords)
            if len(positional) > 1 and not is_second:
                yield case(f'{how} by name', use, by_name=rest)
    f = getattr(torch, name, None)
    if row == 'linalg_vector_norm': f = torch.linalg.vector_norm
    if f and row != 'Tensor.where':
        yield case('function', call, f, chosen, by_name=keywords)
        if not is_second: yield case('named function', call, f, chosen, by_name=chosen)
    if name in OPERATORS and len(chosen) == len(positional):
        op = getattr(operator, OPERATORS[name])
        yield case('operator', call, op, chosen)
        if len(chosen) == 1: return
        turned = dict(zip(chosen, [*chosen.values()][::-1]))
        yield case('operator turned', call, op, turned)
        augmented = getattr(operator, 'i' + OPERATORS[name].strip('_'), None)
        if augmented and chosen[first] != 'k':
            yield case('augmented', on_a_clone, augmented, chosen)

def is_keyword(row, parameter):
    known = inspect.signature(OPS[row].write).parameters[parameter]
    return known.kind == known.KEYWORD_ONLY

def on_a_clone(op, chosen, env):
    target, other = (look_up(c, env) for c in chosen.values())
    return op(target.clone(), other)

CONVERSIONS = {
    'to(dtype)': lambda t, like: t.to(like.dtype),
    'to(dtype=)': lambda t, like: t.to(dtype=like.dtype),
    'to(other)': lambda t, like: t.to(like),
    'to(bool)': lambda t, like: t.to(torch.bool),
    'to(copy)': lambda t, like: t.to(like.dtype, copy=True),
    'to(device)': lambda t, like: t.to(like.device),
    'to(device, dtype)': lambda t, like: t.to(like.device, like.dtype),
    'to(half)': lambda t, like: t.to(torch.float16),
    'type_as': lambda t, like: t.type_as(like)}

def converted(f, a, b, env): return f(env[a], env[b]).clone()
def called(name, a, b, env): return getattr(env[a], name)().clone()
def made(name, a, b, env):
    f, dtype = getattr(torch, name), env[b].dtype
    return f(env[a], dtype=dtype, memory_format=torch.preserve_format)

def all_cases():
    "Every way to call every row, and every conversion."
    for name in (*OPS, *SAME):
        row = SAME.get(name, name)
        for chosen in filter(has_tensor, arguments(row)):
            yield from cases_of(name.removeprefix('Tensor.'), row, chosen)
    for a, b in itertools.product('xmso', 'ym'):
        for name, f in CONVERSIONS.items():
            yield Case(f'{name} {a} {b}', partial(converted, f, a, b), 'conversion')
        for name in operations.CONVERSIONS:
            yield Case(f'{name}() {a}', partial(called, name, a, b), 'conversion')
        for name in ('zeros_like', 'ones_like'):
            yield Case(f'{name} dtype {a} {b}', partial(made, name, a, b), name)


# --- torch's answer, and the recording's

class Seen(NamedTuple):
    "What came of recording one case."
    reason:object
    key:tuple # equal for recordings that compute the same
    type:tuple # of the result: dtype, and whether it is one number

def type_of(result): return result.dtype, result.ndim == 0

def attempt(case, env):
    "The result of a case, or `None` if torch refuses."
    try: return case.run(env)
    except (RuntimeError, TypeError, NotImplementedError, AttributeError): return None

def stored(result, like):
    "A tensor of floats that tells what `result` is."
    return torch.zeros_like(like).copy_(result)

def step_of(cases, seen):
    "A step that keeps the result of each case in the state."
    def step(p, g, state, *, k):
        env = names(p, g, state['z'], state['w'], k)
        for i, case in enumerate(cases):
            result = case.run(env)
            seen.append(type_of(result))
            state[f'out{i}'] = stored(result, g)
    return step

def recorded(case, like, k):
    seen = []
    rec = record([(step_of([case], seen), dict(k=k))], like, ['z', 'w', 'out0'], {})
    key = *rec.nodes, *rec.coefs, *rec.stores.items()
    return Seen(rec.reason, key, seen[0] if seen else None)

class Fused:
    "Many cases in one kernel."
    def __init__(self, cases, data):
        self.data, self.outs = data, [f'out{i}' for i in range(len(cases))]
        self.p = data[0].clone().requires_grad_()
        steps = [step_of(cases, []), sgd]
        self.opt = StepOptimizer([self.p], steps, lr=1., k=0., fused=True)
        self.opt.memo = dispatch.Memo()
        self.opt.memo.steps = list(self.opt.steps)  # as if read: they only take notes

    def __call__(self, k):
        "The result of each for a value of k."
        x, y, z, w = self.data
        self.p.data.copy_(x)
        self.p.grad = y
        outs = {out: torch.zeros_like(x) for out in self.outs}
        self.opt.state[self.p].update(z=z, w=w, **outs)
        self.opt.param_groups[0]['k'] = k     # NaN would be refused at the start
        self.opt.step()
        for found in self.opt.memo.programs.values():
            for program in found: assert program.reason is None
        return [self.opt.state[self.p][out] for out in self.outs]

class Tolerance(NamedTuple):
    "What may be between a result and torch's."
    relative:float = 0.
    absolute:float = 0.

def differ(want, got, tolerance):
    "Where two tensors are told apart by value, sign of zero or NaN."
    close = (want == got) | torch.isclose(got, want, *tolerance)
    same_sign = want.signbit() == got.signbit()
    return ~(close & same_sign | want.isnan() & got.isnan())

KS = {'float': FLOATS, 'int': (7, 0, -1, 3), 'True': (True,), 'False': (False,)}

def exactness(row, dtype):
    "What the table says; whatever is no row is exact."
    info = torch.finfo(dtype)
    if row not in OPS or row_of(row).exact: return Tolerance()
    return Tolerance(16*info.eps, 16*info.tiny)

REFUSED = { # what torch can do and a kernel does not, by row
    'add': ('add with these arguments',), 'addcdiv': ('addcdiv of masks and numbers',),
    'lerp': ('lerp of masks and numbers',), 'pow': ('pow of masks',),
    'clamp': ('clamp of masks', 'clip of masks'), 'clamp_min': ('clamp_min of masks',),
    'clamp_max': ('clamp_max of masks',), 'sum': ('sum of one number',),
    'mean': ('mean of one number',),
    'norm': ('norm with these arguments', 'norm of one number'),
    'linalg_vector_norm': ('norm with these arguments', 'norm of one number')}

def sort_out(cases, dtype, data, kind):
    "Record each case: what went wrong, and `{key: cases}` of what can be a kernel."
    faults, accepted = [], {}
    k = KS[kind][0]
    env = names(*data, k)
    for case in cases:
        want, seen = attempt(case, env), recorded(case, data[0], k)
        fault = None
        if want is None or want.dtype not in (dtype, torch.bool):
            if seen.reason is None: fault = f'recorded, and torch gives {want}'
        elif seen.reason is None:
            if seen.type != type_of(want): fault = f'{seen.type}, torch {type_of(want)}'
            accepted.setdefault(seen.key, []).append(case)
        elif not any(r in seen.reason for r in REFUSED.get(case.row, ())):
            fault = seen.reason
        if fault: faults.append(f'{case.label}, k={k}: {fault}')
    return faults, accepted

def compare(cases, got, env, dtype, tolerance):
    "Where a result of a kernel is not torch's."
    faults = []
    for case in cases:
        want = stored(case.run(env), env['x'])
        if (bad := differ(want, got, tolerance or exactness(case.row, dtype))).any():
            at = bad.nonzero()[0].item()
            where = f"k={env['k']}, xyz={[env[name][at].item() for name in 'xyz']}"
            values = f'{got[at].item()}, torch {want[at].item()}'
            faults.append(f'{case.label}, {where}: {values}')
    return faults

def check(cases, dtype, ks=KS, tolerance=None, size=80):
    "Everything that is not as in torch, in words; and the number of results compared."
    data, faults, accepted, count = tensors(dtype), [], {}, 0
    for kind in ks:
        concerned = cases if kind == 'float' else [c for c in cases if c.has_k]
        new, accepted[kind] = sort_out(concerned, dtype, data, kind)
        faults += new
    every, groups = {}, {} # keys, by the kinds of k that record them alike
    for found in accepted.values(): every.update(found)
    for key in every:
        kinds = tuple(kind for kind in ks if key in accepted[kind])
        groups.setdefault(kinds, []).append(key)
    for kinds, keys in groups.items():
        for start in range(0, len(keys), size):
            part = [accepted[kinds[0]][key] for key in keys[start:start + size]]
            kernel = Fused([found[0] for found in part], data)
            for k in itertools.chain(*(ks[kind] for kind in kinds)):
                env = names(*data, k)
                for found, got in zip(part, kernel(k)):
                    faults += compare(found, got, env, dtype, tolerance)
                    count += len(found)
    return faults, count

def no_faults(faults):
    assert not faults, '\n'.join([f'{len(faults)} faults', *faults[:20]])

@pytest.fixture
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')      # torch's about arguments in an old order
        yield

@pytest.fixture(params=[torch.float32, torch.float64])
def dtype(request):
    "Of the parameters, and the one that masks get beside a float."
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)

def test_every_way_of_calling_every_row(dtype, quiet):
    "As method, function and operator, in place and not, by position and by name."
    faults, count = check(list(all_cases()), dtype)
    no_faults(faults)
    assert count > 40_000

@pytest.mark.parametrize('half', [torch.bfloat16, torch.float16])
def test_half_precision(half, quiet):
    "A part of them, to the digits there are; masks become float32 there: refused."
    roots = 'exponent=0.5', 'exponent=-0.5'      # of -inf torch has another in float16
    cases = [c for c in all_cases() if not any(r in c.label for r in roots)][::8]
    ks, tolerance = {'float': (0.3, NAN), 'True': (True,)}, Tolerance(0.02, 0.02)
    faults, count = check(cases, half, ks, tolerance)
    no_faults([f for f in faults if 'which gives torch.float32' not in f])
    assert count > 500

def test_where_as_it_was_recorded_before_is_found(monkeypatch, quiet):
    "`x.where(mask, other)` read as `torch.where(x, mask, other)`."
    old = lambda input, condition, other: f'where({input}, {condition}, {other})'
    monkeypatch.setitem(OPS, 'Tensor.where', OPS['Tensor.where']._replace(write=old))
    cases = [c for c in all_cases() if c.row == 'Tensor.where']
    faults, _ = check(cases, torch.float32)
    assert 'method where(input=x, condition=m, other=y)' in '\n'.join(faults)

def positive(input): return f'where({input} < 0, T(-1), T(1))'
def plain_maximum(input, other): return f'where({input} > {other}, {input}, {other})'
def plain_clamp(input, min=None, max=None):
    return f'where({input} < {min}, {min}, {input})' if min and not max else None

@pytest.mark.parametrize('row,changed', [
    ('sign', dict(write=positive)), ('maximum', dict(write=plain_maximum)),
    ('clamp', dict(write=plain_clamp)), ('add', dict(masks=None)),
    ('sub', dict(beside=True)), ('sub', dict(negates='')), ('pow', dict(cases=())),
    ('bitwise_or', dict(takes='truth')), ('zero', dict(gives='numbers'))])
def test_a_wrong_row_is_found(row, changed, monkeypatch, quiet):
    monkeypatch.setitem(OPS, row, OPS[row]._replace(**changed))
    faults, _ = check([c for c in all_cases() if c.row == row], torch.float32)
    assert faults

# --- languages

LANGUAGES = dict(cpp=Cpp, triton=Triton) # columns of the table, and who writes them

def rows_of(name):
    "A row and its cases."
    row = row_of(name)
    return [row, *row.cases.rows.values()] if row.cases else [row]

def gaps(language):
    "Operations that the table declares to have no form: `{name: why}`."
    found = {}
    for name in OPS:
        for row in rows_of(name):
            for entry in *row.functions.values(), row.reduction:
                form = getattr(entry, language, None)
                if type(form) is Missing: found[name] = form.why
    return found

def recordings():
    "For each row a case that can be a kernel, and its recording."
    x, done = torch.ones(3), set()
    env = names(x, x, x, x, 0.3)
    for case in all_cases():
        if case.row in done or attempt(case, env) is None: continue
        rec = record([(step_of([case], []), dict(k=0.3))], x, ['z', 'w', 'out0'], {})
        if rec.reason is not None: continue
        done.add(case.row)
        yield case.row, rec

def lacks(language):
    "Rows that a language cannot print although no column says so, in words."
    faults, known, printed = [], gaps(language), set()
    for row, rec in recordings():
        printed.add(row)
        try: text = LANGUAGES[language](rec, torch.float32).source()
        except Unfusable as e:
            if row not in known or known[row] not in str(e): faults.append(str(e))
        else: assert 'Phase0' in text or 'def phase0' in text
    assert printed >= {*OPS}
    return faults

@pytest.mark.parametrize('language', LANGUAGES)
def test_no_language_lacks_a_row(language):
    "Each is printed, or its column says why not."
    for function in functions().values():
        form = getattr(function, language)
        assert type(form) is Missing and form.why or form and type(form) is str
    assert lacks(language) == []

def expm1(**columns):
    return Row(lambda input: f'expm1({input})', masks='floats', **columns)

def test_a_row_that_a_language_lacks_is_found(monkeypatch):
    "Nothing is said of Triton: a fault. The column says why not: none."
    monkeypatch.setitem(OPS, 'expm1', expm1())
    assert lacks('cpp') == []                # which has it in its library
    assert lacks('triton') == ['expm1 has no fused form on this device']
    form = Function('x', 'std::expm1', Missing('Triton has no expm1'))
    monkeypatch.setitem(OPS, 'expm1', expm1(functions=dict(expm1=form)))
    assert lacks('cpp') == lacks('triton') == []
    assert gaps('triton') == dict(expm1='Triton has no expm1') and gaps('cpp') == {}

INTERPRETED = '''
import sys, warnings, torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
sys.path.insert(0, 'tests')
warnings.simplefilter('ignore')
import test_operations as t
from optimizers_explained.speed import compiler, dispatch
def compared(create): return lambda *args: TensorHandle(create(*args).data, tl.int1)
for name in dir(InterpreterBuilder): # it forgets that a comparison of scalars is a mask
    if name.startswith(('create_fcmp', 'create_icmp')):
        setattr(InterpreterBuilder, name, compared(getattr(InterpreterBuilder, name)))
dispatch.BACKENDS['cpu'] = compiler.TritonKernel
for dtype, close in ((torch.float32, 1e-5), (torch.float64, 1e-11)): # fma rounds twice
    torch.set_default_dtype(dtype)
    ks, tolerance = {'float': (0.3, t.NAN)}, t.Tolerance(close, close/10)
    every = 1 if dtype is torch.float32 else 4
    cases = [case for case in t.all_cases() if case.row not in t.gaps('triton')]
    faults, count = t.check(cases[::every], dtype, ks, tolerance)
    assert not faults, (len(faults), faults[:20])
    assert count > 2000
print('same numbers')
'''

def test_triton_interpreted():
    "The same in the language of a GPU, run by Triton's interpreter on the CPU."
    pytest.importorskip('triton', reason='Triton is not installed: it is not tested')
    run = partial(subprocess.run, cwd=ROOT, capture_output=True, text=True)
    env = {**os.environ, 'TRITON_INTERPRET': '1'}
    out = run([sys.executable, '-c', INTERPRETED], env=env)
    assert out.stdout == 'same numbers\n', out.stderr[-2000:]
