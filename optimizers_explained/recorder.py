import math
import operator
import re
import threading
from contextlib import contextmanager
from numbers import Real
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor
from .checks import name_of
from .multi_tensor import TensorLike

# %%
class Unfusable(Exception):
    "A step does something that no kernel can do here; the message names it."

class Number(torch.SymFloat): # torch's stand-in for a number, so that `alpha=` of a torch function takes it
    "A number that remembers how it was computed."
    def __init__(self,
        tape, # the `Tape` on which it is written
        code:str, # Python source that computes it
        value, # what that gives now, an int or a float
    ): self.tape, self.code, self.value = tape, code, value
    def __repr__(self): return self.code
    def __neg__(self): return self.tape.number(f'-{self.code}', -self.value)
    def __abs__(self): return self.tape.number(f'abs({self.code})', abs(self.value))
    def __bool__(self): return self.tape.guard(f'bool({self.code})', bool(self.value))
    def __int__(self): return int(self.known())
    def __float__(self): return float(self.known())
    def __hash__(self): return hash(self.known())
    __index__ = __int__
    def known(self):
        "The value itself, for Python code that needs it; from here on the recording holds for this value only."
        return self.tape.guard(self.code, self.value)

def value_of(x): return x.value if isinstance(x, Number) else x
def code_of(x): return x.code if isinstance(x, Number) else repr(x if type(x) is int else float(x))

def _arithmetic(op, sign, method, reverse=False):
    def act(self, other):
        if not isinstance(other, (Real, Number)): return NotImplemented
        a, b = (other, self) if reverse else (self, other)
        return getattr(self.tape, method)(f'({code_of(a)} {sign} {code_of(b)})', op(value_of(a), value_of(b)))
    return act

for _name, _sign in dict(add='+', sub='-', mul='*', truediv='/', pow='**', mod='%', floordiv='//').items():
    setattr(Number, f'__{_name}__', _arithmetic(getattr(operator, _name), _sign, 'number'))
    setattr(Number, f'__r{_name}__', _arithmetic(getattr(operator, _name), _sign, 'number', reverse=True))
for _name, _sign in dict(lt='<', le='<=', gt='>', ge='>=', eq='==', ne='!=').items():
    setattr(Number, f'__{_name}__', _arithmetic(getattr(operator, _name), _sign, 'guard'))

# %%
def _on_numbers(f): # a function of `math` that also takes a Number
    def act(x, *more):
        if not isinstance(x, Number) or more: return f(x, *more)
        return x.tape.number(f'math.{f.__name__}({x.code})', f(x.value))
    return act

MATH, LOCK = {n: _on_numbers(getattr(math, n)) for n in ('sqrt', 'exp', 'log', 'log2', 'log1p', 'expm1', 'cos', 'sin', 'tanh')}, threading.Lock()

@contextmanager
def symbolic_math():
    "Let `math.sqrt` and its like take a `Number`, while steps are recorded."
    with LOCK, mock.patch.multiple(math, **MATH): yield

# %%
def _clamp(a, min=None, max=None):
    if min is not None: a = f'where({a} < {min}, {min}, {a})'
    return a if max is None else f'where({a} > {max}, {max}, {a})'

OPS = dict( # torch's operation: its arguments, and the expression for one element; rounded where torch's own CPU kernels round
    add=lambda a, b, alpha=None: f'{a} + {b}' if alpha is None else f'fma({b}, {alpha}, {a})',
    sub=lambda a, b, alpha=None: f'{a} - {b}' if alpha is None else f'fma(-{b}, {alpha}, {a})',
    mul=lambda a, b: f'{a}*{b}', div=lambda a, b: f'{a}/{b}', neg=lambda a: f'-{a}', square=lambda a: f'{a}*{a}', reciprocal=lambda a: f'1/{a}',
    abs=lambda a: f'abs({a})', sqrt=lambda a: f'sqrt({a})', rsqrt=lambda a: f'1/sqrt({a})', exp=lambda a: f'exp({a})', log=lambda a: f'log({a})',
    pow=lambda a, b: f'pow({a}, {b})', sign=lambda a: f'where({a} > 0, T(1), where({a} < 0, T(-1), T(0)))',
    addcmul=lambda a, b, c, value=None: f'fma({b}, {c}, {a})' if value is None else f'fma({value}*{b}, {c}, {a})',
    addcdiv=lambda a, b, c, value=None: f'{a} + {b}/{c}' if value is None else f'{a} + {value}*{b}/{c}',
    lerp=lambda a, b, weight: f'where(abs({weight}) < T(0.5), fma({weight}, {b} - {a}, {a}), fma({weight} - 1, {b} - {a}, {b}))',
    where=lambda c, a, b: f'where({c}, {a}, {b})', clamp=_clamp, clamp_min=lambda a, min: _clamp(a, min), clamp_max=lambda a, max: _clamp(a, None, max),
    maximum=lambda a, b: f'where(({a} > {b}) | ({a} != {a}), {a}, {b})', minimum=lambda a, b: f'where(({a} < {b}) | ({a} != {a}), {a}, {b})',
    clone=lambda a: f'{a}', copy=lambda a, b: f'{b}', zero=lambda a: 'T(0)', zeros_like=lambda a: 'T(0)', ones_like=lambda a: 'T(1)', full_like=lambda a, b: f'{b}', fill=lambda a, b: f'{b}')
LOGICAL = dict(lt=lambda a, b: f'{a} < {b}', le=lambda a, b: f'{a} <= {b}', gt=lambda a, b: f'{a} > {b}', ge=lambda a, b: f'{a} >= {b}',
    eq=lambda a, b: f'{a} == {b}', ne=lambda a, b: f'{a} != {b}', logical_and=lambda a, b: f'({a} != 0) & ({b} != 0)',
    logical_or=lambda a, b: f'({a} != 0) | ({b} != 0)', logical_not=lambda a: f'{a} == 0')
SUMS = dict( # one number for each tensor: what is summed over its elements, and what the sum becomes
    sum=lambda a: (a, '{total}'), mean=lambda a: (a, '{total}/{size}'), norm=lambda a, p=2: (f'{a}*{a}', 'sqrt({total})') if p in (2, 'fro') else None)
SAME = dict(true_divide='div', divide='div', multiply='mul', subtract='sub', negative='neg', absolute='abs', linalg_vector_norm='norm',
    greater='gt', less='lt', clip='clamp', bitwise_and='logical_and', bitwise_or='logical_or', bitwise_not='logical_not')

# %%
HALF = torch.bfloat16, torch.float16

class Node(NamedTuple):
    "One line of a recording."
    code:str # the expression; of a sum, what is summed
    needs:tuple=() # numbers of the nodes it is computed from
    per:str='element' # one value per 'element', or one per 'tensor'
    logical:bool=False # true or false
    total:str='' # of a sum only: what becomes of the `{total}` over a tensor of `{size}` elements

class Value(TensorLike):
    "A tensor that is only written down: every operation on it becomes a node of its tape."
    __slots__ = 'tape', 'id'
    def __init__(self,
        tape, # the `Tape`
        id:int, # number of the node; an in-place operation changes it
    ): self.tape, self.id = tape, id
    def __getattr__(self, name):
        if name in ('dtype', 'device', 'ndim', 'is_cuda'): return getattr(self.tape.like, name)
        if name == 'data': return self
        if not callable(getattr(Tensor, name, None)): raise Unfusable(f'.{name} is not known while a kernel is made')
        return lambda *args, **kwargs: self.call(name, None, (self, *args), kwargs)
    def _refuse(self, *_): raise Unfusable('the value of a tensor is not known while a kernel is made')
    __bool__ = __float__ = __int__ = __index__ = __len__ = __iter__ = __getitem__ = __setitem__ = _refuse
    __hash__ = object.__hash__

    @staticmethod
    def call(name, func, args, kwargs):
        tape = next((a.tape for a in (*args, *kwargs.values()) if isinstance(a, Value)), None)
        if tape is None: raise Unfusable(f'{name} has no fused form')
        return tape.operation(name, args, kwargs)

# %%
class Tape:
    "What the steps do, written down: Python source for numbers, nodes for tensors."
    def __init__(self,
        like:Tensor, # a parameter, whose dtype, device and number of dimensions the steps may ask for
        names, # of the tensors: 'p', 'g' and the keys of those in the state
    ):
        self.like, self.lines, self.coefs, self.constants = like, [], [], []
        self.names, self.nodes = list(names), [Node(n) for n in names]
        self.values = [Value(self, i) for i in range(len(self.nodes))]

    def number(self, code, value):
        "A new number, on a line of its own."
        self.lines.append(f'n{len(self.lines)} = {code}')
        return Number(self, f'n{len(self.lines) - 1}', value)

    def guard(self, code, value):
        "`value`, which `code` gives now; where it gives another one, this recording does not hold."
        self.lines.append(f'if {code} != {self.constant(value)}: return None')
        return value

    def constant(self, value):
        self.constants.append(value)
        return f'K[{len(self.constants) - 1}]'

    def read(self, code, value):
        "What stands for `value` in the steps: a `Number` if it is one, else itself behind a guard."
        if isinstance(value, Real) and not isinstance(value, bool): return Number(self, code, value)
        if not isinstance(value, (tuple, list)): return self.guard(code, value)
        self.guard(f'len({code})', len(value))
        return type(value)(self.read(f'{code}[{i}]', v) for i, v in enumerate(value))

    def operation(self, name, args, kwargs):
        "Write down torch's operation `name`."
        in_place, name = name.endswith('_') and not name.startswith('__'), name.strip('_')
        name = SAME.get(name, name)
        if name == 'detach' or name in ('to', 'type_as') and self.is_own_type(*args, **kwargs): return args[0]
        if name == 'pow' and type(args[1]) in (int, float) and args[1] in (2, 0.5): name, args = {2: 'square', 0.5: 'sqrt'}[args[1]], args[:1]
        node = self.node(name, args, kwargs)
        if in_place: return self.assign(args[0], node, name)
        self.nodes.append(node)
        return Value(self, len(self.nodes) - 1)

    def is_own_type(self, a, type):
        if type != self.like.dtype and not isinstance(type, Value): raise Unfusable(f'a conversion to {type} has no fused form')
        return not self.nodes[a.id].logical

    def node(self, name, args, kwargs):
        table = next((t for t in (OPS, LOGICAL, SUMS) if name in t), None)
        if table is None: raise Unfusable(f'{name} has no fused form')
        operand = self.rounded if name in ('add', 'sub') else self.operand if table is not SUMS else lambda x: self.operand(x) if isinstance(x, Value) else x
        try: code = table[name](*map(operand, args), **{k: operand(v) for k, v in kwargs.items()})
        except TypeError: code = None
        if code is None: raise Unfusable(f'{name} with these arguments has no fused form')
        per = 'element' if any(self.nodes[a.id].per == 'element' for a in (*args, *kwargs.values()) if isinstance(a, Value)) else 'tensor'
        if table is not SUMS: return Node(code, needs(code), per, table is LOGICAL)
        if per == 'tensor': raise Unfusable(f'{name} of one number has no fused form')
        return Node(code[0], needs(code[0]), 'tensor', total=code[1])

    def operand(self, x):
        if isinstance(x, Value): return f'v{x.id}'
        if isinstance(x, Tensor): raise Unfusable('a tensor that is neither p, g nor in the state has no place in a kernel')
        if isinstance(x, bool) or not isinstance(x, (Real, Number)): return x
        if (code := code_of(x)) not in self.coefs: self.coefs.append(code)
        return f'c{self.coefs.index(code)}'

    def rounded(self, x): # as torch treats the numbers in a sum of half precision on a CPU, and in no other operation
        code = self.operand(x)
        return f'R({code})' if self.like.dtype in HALF and not isinstance(x, Value) and code is not None else code

    def assign(self, target, node, name):
        if not isinstance(target, Value): raise Unfusable(f'{name}_ changes a tensor that is neither p nor in the state')
        if target is self.values[1]: raise Unfusable(f'{name}_ changes the gradient')
        if node.per != self.nodes[target.id].per: raise Unfusable(f'{name}_ changes the shape of a tensor')
        self.nodes.append(node)
        target.id = len(self.nodes) - 1
        return target

def needs(code): return tuple(int(i) for i in re.findall(r'\bv(\d+)\b', code))

# %%
class Recording:
    "Steps as a kernel needs them: `numbers` to be run by Python at each step, `nodes` and `stores` to become the kernel."
    def __init__(self, tape, stores, numbers, reason):
        self.names, self.nodes, self.stores, self.coefs, self.reason = tape.names, tape.nodes, stores, tape.coefs, reason
        out = f"({''.join(f'{c}, ' for c in tape.coefs)}), {{{', '.join(f'{k!r}: {v}' for k, v in numbers.items())}}}"
        self.source = '\n    '.join(['def numbers(H, N):', *tape.lines, f'return {out}']) + '\n'
        self.constants, env = tape.constants, dict(math=math, K=tape.constants, inf=math.inf, nan=math.nan)
        exec(self.source, env)
        self.numbers = env['numbers']
    def __eq__(self, other): return vars(self).keys() == vars(other).keys() and self.source == other.source and (self.nodes, self.stores, self.constants) == (other.nodes, other.stores, other.constants)

def record(
    calls, # pairs of a step and its hyperparameters by name
    like:Tensor, # one of the parameters
    tensors, # keys of the tensors in its state
    numbers:dict, # everything else in it
) -> Recording: # its `reason` says why no kernel can be made, '' if only this once; None if one can
    "Run the steps on stand-ins that write down what happens to them; a recording holds as long as its guards do."
    tape, reason, after = Tape(like, ['p', 'g', *(f's{i}_{k}' for i, k in enumerate(tensors))]), None, {}
    p, g, *old = tape.values
    hypers = {k: tape.read(f'H[{k!r}]', v) for _, h in calls for k, v in h.items()}
    state = {**dict(zip(tensors, old)), **{k: tape.read(f'N[{k!r}]', v) for k, v in numbers.items()}}
    try:
        run(calls, hypers, p, g, state)
        after, reason = written(tape, state, tensors, numbers)
    except Unfusable as e: reason = str(e)
    final = [p.id, 1, *(state[k].id for k in tensors)] if reason is None else []
    return Recording(tape, {i: j for i, j in enumerate(final) if i != j}, after, reason)

def run(calls, hypers, p, g, state):
    "The steps, one after the other, on stand-ins."
    with symbolic_math():
        for f, names in calls:
            try:
                d = f(p, g, state, **{k: hypers[k] for k in names})
                if d is not None and not (isinstance(d, Value) and p.tape.nodes[d.id].per == 'element'): raise Unfusable('the update is not a tensor of the shape of p')
            except Exception as e: raise Unfusable(f'step {name_of(f)}: {e}') from e
            g = g if d is None else d

def written(tape, state, tensors, numbers):
    "The source of the numbers that the steps left in the state, and the reason if there is more than a kernel can write back."
    if [k for k in state if isinstance(state[k], Value)] != list(tensors) or state.keys() != {*tensors, *numbers}: return {}, ''
    kept = [tape.values[0], *(state[k] for k in tensors)]
    for i, v in enumerate(kept[1:], 2):
        if any(v is w for w in kept[:i - 1]) or v.id < len(tape.values) and v.id != i: return {}, f"state[{tensors[i - 2]!r}] is another tensor under a second name: keep a clone of it"
        if tape.nodes[v.id].per != 'element': return {}, f'state[{tensors[i - 2]!r}] is not of the shape of p'
    return {k: v.code if isinstance(v := state[k], Number) else tape.constant(v) for k in numbers}, None
