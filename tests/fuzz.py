"""Random lists of steps, run in every speed and compared.

    python tests/fuzz.py --minutes 60            # new programs until the time is up
    python tests/fuzz.py --seed 7 --programs 1   # program 7 once more

A program is the text of a script that needs torch and this package only. One that fails
is printed, without the statements that the failure does not need."""
import argparse
import ast
import ctypes
import itertools
import multiprocessing
import os
import random
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch

from optimizers_explained.core import StepOptimizer
from optimizers_explained.steps import sgd

HEAD = '''import inspect, math, random, torch
from array import array
from collections import defaultdict, namedtuple
from functools import partial
from torch import inf, nan
from unittest import mock
from optimizers_explained.speed.compiler import CppKernel
from optimizers_explained.core import StepOptimizer

class Plain:
    "What a list of steps means."
    def __init__(self, groups, steps):
        self.param_groups, self.steps, self.state = groups, steps, defaultdict(dict)
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in [p for p in group['params'] if p.grad is not None]:
                g, state = p.grad, self.state[p]
                for f in self.steps:
                    takes = inspect.signature(f).parameters.values()
                    d = f(p, g, state, **{k.name: group.get(k.name, k.default)
                                          for k in takes if k.kind == k.KEYWORD_ONLY})
                    g = g if d is None else d

def values(seed, shape, dtype):
    gen = torch.Generator().manual_seed(seed)
    return torch.randint(-16, 17, shape, generator=gen).to(dtype)/8

def gradient(t, i, p): return values(100*t + i + 50, p.shape, p.dtype)

def move(ps, t, i, data):
    ps[i].grad, ps[i].data = None, data
    ps[i].grad = gradient(t, i, ps[i])

def cast(state, dtype):
    for v in state.values():
        if isinstance(v, torch.Tensor): v.data = v.to(dtype)

def replace(ps, opt, i, keep):
    old, ps[i] = ps[i], torch.nn.Parameter(ps[i].detach().clone())
    ps[i].grad, state = old.grad, opt.state.pop(old, {})
    for group in opt.param_groups:
        group['params'] = [ps[i] if p is old else p for p in group['params']]
    if keep: opt.state[ps[i]] = state

def copied(x):
    if isinstance(x, torch.Tensor): return x.detach().clone()
    if isinstance(x, dict): return {k: copied(v) for k, v in x.items()}
    return type(x)(map(copied, x)) if isinstance(x, (list, tuple)) else x

def interrupt(opt):
    "Ctrl-C before the first kernel of the next step, which is then taken again."
    def step():
        del opt.step
        with mock.patch.object(CppKernel, '__call__', side_effect=KeyboardInterrupt):
            try: return type(opt).step(opt)
            except KeyboardInterrupt: pass
        type(opt).step(opt)
    opt.step = step

class Tensor(torch.Tensor): pass

def plainly(x):
    if isinstance(x, Minus): return -x.as_subclass(torch.Tensor)
    return type(x)(map(plainly, x)) if isinstance(x, (list, tuple)) else x

class Minus(torch.Tensor):
    "A tensor of what it has in memory, times -1."
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = {k: plainly(v) for k, v in (kwargs or {}).items()}
        return func(*plainly(args), **kwargs)

Pair = namedtuple('Pair', 'x y')
KNOB, SPARED, ID = 1., set(), 0

'''
TAIL = '''
def run(way):
    torch.set_num_threads(THREADS), torch.manual_seed(0), random.seed(0)
    ps = [torch.nn.Parameter(values(i, *s)) for i, s in enumerate(SHAPES)]
    ps[1].no_decay = True
    SPARED.clear(), SPARED.add(ps[1])
    globals().update(ID=id(ps[1]))
    groups = [{**g, 'params': [ps[i] for i in g['params']]} for g in GROUPS]
    trace = []
    try:
        if way == 'plain': opt = Plain(groups, STEPS)
        else: opt = StepOptimizer(groups, STEPS, foreach=way == 'foreach',
                                  fused=way == 'fused')
        for t in range(TIMES):
            for i, p in enumerate(ps): p.grad = gradient(t, i, p)
            before(t, ps, opt)
            opt.step()
            trace.append(copied([(p, p.grad, dict(opt.state.get(p, {}))) for p in ps]))
    except Exception as e: return trace, e
    return trace, None

if __name__ == '__main__':
    for way in ('plain', 'loop', *WAYS):
        trace, error = run(way)
        print(way, len(trace), 'steps', repr(error or ''), *trace[-1:], sep='\\n  ')
'''

# --- templates: what may fill a hole {T}, with weights in front. Where holes are nested
# deeply, the first one is taken. 'exact' programs compute the same bits in every speed;
# 'rough' ones, with roots and logarithms, compare nothing but raw gradients.
def table(text):
    "`{name: [(weight, template), ...]}`"
    lines = re.sub(r'/\n +', '/ ', text.strip()).splitlines()
    rows = dict(re.split(r'  +', line, maxsplit=1) for line in lines)
    def weighted(template):
        weight, rest = re.fullmatch(r'(?:(\d+) )?(.+)', template).groups()
        return int(weight or 1), rest
    return {name: list(map(weighted, row.split(' / '))) for name, row in rows.items()}

HOLES = table("""
T  5 {V} / 6 {C}
C  2 {V}.clone() / 4 ({T} + {Y}) / 2 ({T} - {T}) / ({N} - {T}) / 3 ({T}*{N}) /
   ({N}*{V}) / ({V}*{S}) / ({V}*{M}) / ({V}/({S} + 3)) / 2 ({T}/{P}) / {root} /
   {ratio} / (-{T}) / ({V}**2) / abs({T}) / ({M}*0.5) / ({M}/2) / ({M} + 0.25) /
   14 {call_T}
P  4 ({V}.abs() + 1) / ({V}.square() + 0.5) / {V}.abs().clamp(min=0.25) / {Z}
Y  2 {V} / 2 {T} / 2 {N}
W  3 {V} / 2 {N} / {M}
M  4 ({K} > {N}) / ({K} <= {K}) / ({M} & {M}) / ({M} | {M}) / (~{M}) / 2 {mask} /
   6 {call_M}
I  {K} / {M}
S  raw.sum() / raw.mean() / raw.norm() / raw.norm(1) / raw.norm(p='fro') / 2 {call_S}
K exact  {T}
K rough  raw
Z exact  {T}
Z rough  ({V}.abs() + 2)
root exact  ({T}*0.5)
root rough  ({P}**0.5)
ratio exact  ({N} - {P})
ratio rough  ({N}/{P})
N  6 {L} / 6 {number} / ({N}*{N}) / (1 - {N}) / ({N} + {N}) / ({N}/{number}) /
   math.sqrt(abs({N})) / max({N}, {N}) / ({N} if {Q} else {N}) / 2 {O}
L  0.5 / 0.25 / 2 / 1.5 / -0.5 / 1 / 0.125 / -1
E  3 / 0.5 / 1.5 / -1 / 2. / -0.5 / -2 / 0 / 1
odd  2 nan / inf / -inf / 0 / -0. / 2 False / 2 True
tiny  1e-40 / -1e-310 / -0. / nan / inf / -inf
Q  4 {number} > {L} / 3 state['t'] % 2 == 0 / 3 state['t'] < 3 / 2 on / p.ndim > 1 /
   isinstance({number}, float) / 2 math.isfinite({number}) / p.dtype == torch.float32 /
   {number} != {number}
asks  3 getattr(p, 'no_decay', False) / hasattr(p, 'no_decay') / 3 p in SPARED /
   id(p) in [id(q) for q in SPARED] / any(p is q for q in SPARED) / p.size() == (2, 3) /
   p.shape == (3,) / p.shape[-1:] == (3,) / p.numel() > 3 / type(p) == torch.Tensor /
   type(p) == torch.nn.Parameter / 2 id(p) == ID / isinstance(p, torch.nn.Parameter) /
   torch.is_tensor(p) / isinstance(g, torch.nn.Parameter)
start  if 'm' not in state: state.update(m=torch.zeros_like(p), v=g.clone(), t=0) /
   if not state: state.update(m=torch.full_like(p, 2), v=p.detach().clone(), t=0) /
   if len(state) == 0: state.update(t=0, v=g*2, m=torch.ones_like(p))
inner  3 {update} / 2 {moment} / {masking} / {counting}
update  3 g = {C} / 2 p.add_({T}.clamp(-1, 1), alpha=-{N}) / p.sub_({T}.clamp(-1, 1)) /
   p -= {T}.clamp(-1, 1)*{N} / p.mul_({N}) / p.copy_({C}.clamp(-4, 4)) /
   p.lerp_({T}.clamp(-2, 2), 0.25) / p.data.add_({T}.clamp(-1, 1))
local  4 {new_V} = {C} / {new_V} = {state} / 4 {change_V}.clamp_(-8, 8)
moment  3 {state}.mul_(0.5).add_({T}.clamp(-4, 4), alpha={N}) / {state} *= {N} /
   2 {state} = {C}.clamp(-4, 4) / {state}.lerp_({T}.clamp(-4, 4), {N}) /
   g = {state}.mul_(0.5).add_({T}.clamp(-4, 4)) + 0 / 2 {change_V}.clamp_(-8, 8)
masking  4 {new_mask} = {M}.clone() / 2 {mask}.{logic}_({M}) / {mask}.bitwise_not_() /
   {mask} &= {M} / g = g + {M} / 2 g = g*{M}.to(g.dtype) / 3 g = {C}.where({M}, {Y}) /
   3 g = torch.where({M}, {T}, {Y}) / 2 g = g*({M}.clone() + {mask}) /
   2 g = g*({mask}.where({M}, {M}) + {mask})
logic  logical_and / logical_or / bitwise_and / bitwise_or / add / mul
counting  2 {new_number} = {N} / state['n'] = state.get('n', 0) + 1 /
   state['f'] = 0.5*state.get('f', 1.) + {number}
branch  2 if {Q}: {block} / if not {Q}: {block}
""")
ORDINARY = dict(update=4, local=3, moment=4, masking=3, counting=2, branch=1)
IN_STEPS = table("""
flag  2 if {asks}: {update} / if not {asks}: return g*0.5 / g = g*(0.5 if {asks} else 1)
swap  state['m'], state['v'] = state['v'], state['m']
late  2 if state['t'] == 3: state['late'] = {C} / state['late'] = g*2 if n > 1 else 0 /
   if state['t'] == 3: state.update(late={C}) /
   state['late'] = {C} if state['t'] > 2 else 0
delete  if state['t'] == 4: state.pop('v', None) / if state['t'] == 4: del state['v'] /
   if state['t'] == 4: state['v'] = 2.
odd_state  state['w'] = not state.get('w', False) / state['w'] = torch.tensor(2.) /
   state['w'] = 1 if state['t'] % 2 else 0.5 /
   state['w'] = state.get('w', 0) + ({number} > 0) / state['w'] = {N} / state['w'] = g /
   state['w'] = state['v'] / state['w'] = {M} / state['w'] = raw.sum()
odd_number  3 if math.isfinite(a): {update} / if a > 1: {update} / if a == a: {update} /
   if a: {update} / p.addcmul_({V}, {V}, value={O}) / g = g.clamp({O}, 1) /
   g = g.clamp({O}, {O}) / g = g.clamp(max={O}) / g = g*{O} / g = g + {O}
object  state.setdefault('last', []).append({C}) / state['last'] = [1., 2.] /
   state.setdefault('last', dict())[state['t']] = {C} / state['last'] = ({C}, 1) /
   state['last'] = str(state['t'])
random  2 state['draws'] = state.get('draws', 0) + int(random.random() < 0.5) /
   state['draws'] = state.get('draws', 0) + int(torch.rand(()) < 0.5) /
   state['draws'] = state.get('draws', 0) + random.choice([0, 1])
global  g = g*KNOB / if KNOB > 2: {update} / p.mul_(KNOB/4)
unknown  g = g.sort(-1).values if g.ndim else g / g = g.masked_fill({M}, {L}) /
   g = torch.relu(g) / m0.copy_({M}) / g = g*torch.tensor(0.5) /
   g = g*{M}.float() / g = g + {M}.double() / m0 = {K}.bool() /
   g = g*raw.norm().item() / if raw.sum() > 0: g = -g / torch.mul(g, 2, out={state}) /
   g = torch.stack([g, p]).mean(0) / torch.add(g, p, alpha={L}, out={state})
""")
BETWEEN = table("""
schedule  3 opt.param_groups[0]['{hyper}'] = {L} / opt.param_groups[-1]['on'] = False /
   opt.param_groups[0]['pair'] = ({L}, {L})
odd_number  3 opt.param_groups[0]['a'] = {O} / opt.param_groups[0]['pair'] = [{O}, {L}]
special  3 ps[{i}].grad.reshape(-1)[:1] = {tiny} / ps[{i}].grad.zero_().neg_() /
   ps[{i}].data.reshape(-1)[-1:] = {tiny}
dtype  2 move(ps, t, {i}, ps[{i}].data.{to}()) / cast(opt.state[ps[{i}]], torch.{to}) /
   3 move(ps, t, {i}, ps[{i}].data.{to}()), cast(opt.state[ps[{i}]], torch.{to})
odd_type  opt.param_groups[0]['pair'] = array('d', [{L}, {L}]) /
   opt.param_groups[0]['pair'] = Pair({L}, {L}) /
   opt.param_groups[0]['n'] = torch.tensor({L}) /
   opt.param_groups[0]['pair'] = dict(enumerate([{L}, {L}])) /
   opt.param_groups[0]['pair'] = torch.tensor([{L}, {L}])
tie  move(ps, t, 1, ps[0].data)
move  move(ps, t, {i}, ps[{i}].data.clone()) /
   move(ps, t, {i}, torch.stack([ps[{i}].data]*2, -1)[..., 0]) /
   opt.state[ps[{i}]]['m'].data = torch.ones_like(ps[{i}])
replace  replace(ps, opt, {i}, True) / replace(ps, opt, {i}, False)
negative  3 ps[{i}].grad = torch._neg_view(-ps[{i}].grad) /
   ps[{i}].grad = torch.complex(ps[{i}].grad, -ps[{i}].grad).conj().imag /
   opt.state[ps[{i}]]['m'] = torch._neg_view(torch.ones_like(ps[{i}]))
strided  ps[{i}].grad = ps[{i}].grad.mT.contiguous().mT if ps[{i}].ndim > 1 else None /
   ps[{i}].grad = torch.stack([ps[{i}].grad]*2, -1)[..., 0] /
   ps[{i}].grad = ps[{i}].detach() /
   ps[{i}].grad = torch.ones((), dtype=ps[{i}].dtype).expand(ps[{i}].shape) /
   ps[{i}].grad = ps[{i}].grad.as_subclass(Tensor) /
   2 ps[{i}].grad = ps[{i}].grad.as_subclass(Minus)
interrupt  interrupt(opt)
outside  opt.state[ps[{i}]]['t'] = 7 / opt.state[ps[{i}]]['t'] = 2.5 /
   opt.state[ps[{i}]]['m'] = torch.ones_like(ps[{i}]) / opt.state[ps[{i}]].clear() /
   opt.state.pop(ps[{i}], None)
skip  ps[{i}].grad = None
flag  ps[{i}].no_decay = True / ps[{i}].no_decay = False /
   vars(ps[{i}]).pop('no_decay', None)
""")
OF_ALL = {'partial', 'groups', 'large', 'mixed', 'keywords'}
ALONE = 'object', 'partial', 'random', 'unknown' # mostly refused, or without a kernel
USUAL = dict(schedule=0.4, skip=0.4, odd_number=0.15)    # shares of all programs
RARE = sorted({*IN_STEPS, *BETWEEN, *OF_ALL} - {*ALONE, 'skip'})

# torch's operations: in which programs, what comes out, names (.method, torch.function,
# or without a dot either), and arguments, those with a star by keyword only
CALLS = [[field.split() for field in line.split('|')] for line in """
all T | add sub subtract | input:T other:T alpha*:N
all T | add sub | input:T other:Y
rough T | add sub | input:T other:N alpha*:N
all T | mul multiply | input:V other:W
all T | div divide true_divide | input:T other:P
all T | neg negative abs absolute clone zeros_like ones_like zero | input:T
all T | square | input:V
all T | reciprocal | input:P
exact T | sign | input:T
rough T | exp | input:T
rough T | sqrt rsqrt log | input:P
all T | pow | input:V exponent:2
rough T | pow | input:P exponent:E
all T | addcmul | input:T tensor1:V tensor2:V value*:N
all T | addcdiv | input:T tensor1:T tensor2:P value*:N
all T | lerp | input:T end:T weight:N
all T | lerp | input:T end:T weight:V
all T | clamp clip | input:T min:N max:N
all T | clamp clip | input:T max*:N
all T | clamp clip clamp_min | input:T min:N
all T | clamp_max | input:T max:N
all T | maximum minimum | input:T other:T
all T | torch.where | condition:M input:Y other:T
all T | .where | input:T condition:M other:Y
all T | full_like | input:T fill_value:N
all T | fill | input:T value:N
all T | copy | input:T src:T
all T | .to | input:M dtype:g.dtype
all T | .type_as | input:M other:V
all M | lt le gt ge eq ne | input:K other:N
all M | greater less greater_equal less_equal not_equal | input:K other:N
exact M | lt le gt ge eq ne greater less | input:K other:T
all M | logical_and logical_or | input:I other:I
all M | logical_not | input:I
all M | bitwise_and bitwise_or | input:M other:M
all M | bitwise_not clone | input:M
all M | add mul multiply maximum minimum | input:M other:M
all M | torch.where | condition:M input:M other:M
all M | .where | input:M condition:M other:M
all S | sum mean norm torch.linalg.vector_norm | input:raw
""".strip().splitlines()]


class Text(NamedTuple):
    "A program; its body can be shrunk."
    seed: int
    body: str
    tail: str
    kinds: tuple
    plant: tuple = ()       # a fault: a pattern and its replacement, see `check`
    def __str__(self): return f'# seed {self.seed}\n{HEAD}{self.body}\n{self.tail}'
    def alone(self, way):
        "Without the other ways."
        tail = re.sub(r'WAYS, KINDS = \[.*?\]', f'WAYS, KINDS = [{way!r}]', self.tail)
        return self._replace(tail=tail)

LARGE = [(2**19 + 3,), (3, 2**18)]

class Writer:
    "Writes the program of a seed."
    def __init__(self, seed, kinds=()):
        self.seed, self.rng = seed, random.Random(seed)
        self.mode = self.rng.choice(['exact', 'exact', 'exact', 'rough'])
        rare = self.rng.sample(RARE, self.rng.randint(0, 3))
        if self.rng.random() < 0.15: rare = [self.rng.choice(ALONE)]
        usual = [kind for kind, part in USUAL.items() if self.rng.random() < part]
        self.kinds = sorted({*(kinds or rare), *usual})
        self.names = (f'x{i}' for i in itertools.count())
        self.scope = dict(hyper='abn')         # what a hole may be filled with by now

    def pick(self, rows):
        weights, templates = zip(*rows)
        return self.rng.choices(templates, weights)[0]

    def fill(self, template, depth=0):
        "The template with its holes filled."
        return re.sub(r'\{(\w+)\}', lambda hole: self.part(hole[1], depth), template)

    def part(self, name, depth=0):
        "What fills a hole."
        how, _, of = name.partition('_')
        if how == 'call': return self.call(of, depth)
        if how == 'change': return self.change(depth)
        if how == 'new': return self.new(of)
        if how == 'block': return self.block()
        if name in self.scope: return self.rng.choice(self.scope[name])
        if name == 'S' and not self.sums: name = 'L'
        if name == 'O': name = 'odd' if 'odd_number' in self.kinds else 'L'
        rows = HOLES.get(name) or HOLES[f'{name} {self.mode}']
        return self.fill(rows[0][1] if depth > 3 else self.pick(rows), depth + 1)

    def new(self, of):
        "A new name, to be used after this statement."
        self.pending.append((of, name := next(self.names)))
        return name

    def block(self):
        "A statement whose new names are forgotten."
        scope, self.scope = self.scope, {k: list(v) for k, v in self.scope.items()}
        text = self.statement(HOLES['inner'])
        self.scope = scope
        return text

    def statement(self, rows):
        pending = self.pending = []
        text = self.fill(self.pick(rows))
        for of, name in pending: self.scope[of].append(name)
        return text

    def change(self, depth):
        "An operation in place."
        target = self.rng.choice([v for v in self.scope['V'] if v != 'g'])
        result = 'T' if self.mode == 'rough' else self.rng.choice('TTTM')
        return self.call(result, depth, target)

    def call(self, result, depth, target=None):
        "A call of torch; in place if there is a target."
        rows = [c for c in CALLS if c[0][0] in ('all', self.mode) and c[0][1] == result]
        _, names, arguments = self.rng.choice(rows)
        full, (first, *rest) = self.rng.choice(names), [a.split(':') for a in arguments]
        name = full.removeprefix('torch.').removeprefix('.')
        styles = self.styles(full, name, target)
        if not styles: return self.call(result, depth, target)
        style, by_name = self.rng.choice(styles), ''
        if 'keywords' in self.kinds and name not in ('copy', 'type_as'):
            by_name = self.rng.choice(['', 'rest', 'all'])
        words = [target or self.argument(first[1], depth)]
        if by_name == 'all' and style == 'function': words = [f'{first[0]}={words[0]}']
        for word, kind in rest:
            by_name = by_name or '*' in word
            value = self.argument(kind, depth)
            words.append(f"{word.strip('*')}={value}" if by_name else value)
        if style == 'function': return f"torch.{name}({', '.join(words)})"
        if target: name = f'{name}_'
        return f"{words[0]}.{name}({', '.join(words[1:])})"

    def styles(self, full, name, target):
        "The ways to call an operation."
        if target:
            in_place = hasattr(torch.Tensor, f'{name}_') and 'bitwise' not in name
            return ['in place'] if in_place else []
        known = dict(method=hasattr(torch.Tensor, name), function=hasattr(torch, name))
        if full.startswith('torch.'): known = dict(function=True)
        if full.startswith('.'): known = dict(method=True)
        if name == 'copy': known = {}           # torch's module of that name
        return [style for style, is_one in known.items() if is_one]

    def argument(self, kind, depth):
        return self.part(kind, depth + 1) if kind.isalpha() and kind.isupper() else kind

    def step(self, number):
        "A function of a few statements."
        size, states = self.rng.randint(3, 6), ["state['m']", "state['v']"]
        kinds = self.rng.choices(list(ORDINARY), ORDINARY.values(), k=size)
        if 'delete' in self.kinds: states.pop()
        self.scope.update(V=['g', 'g', 'p', *states], state=states, mask=['m0'],
                          number=['a', 'b', 'n', 'pair[0]', 'pair[1]', "state['t']"])
        self.sums = number == 0 and 'large' not in self.kinds     # exact: raw gradients
        rows, lines = [HOLES[kind] for kind in kinds], ['m0 = p > 0']
        if number == 0:
            counted = "state['t'] += 1"
            # with `+=` on an item, a step that reads SPARED would never be run on lists
            if 'flag' in self.kinds: counted = "state['t'] = state['t'] + 1"
            lines = [self.part('start'), counted, 'raw, m0 = g, g > 0']
            for kind in [kind for kind in IN_STEPS if kind in self.kinds]:
                rows.insert(self.rng.randrange(len(rows)), IN_STEPS[kind])
        lines += map(self.statement, rows)
        for name in ('late', 'w'):
            written = any(f"'{name}'] =" in line for line in lines)
            if written and self.rng.random() < 0.7:
                lines.append(f"if '{name}' in state: g = g + state['{name}']")
        ends = [self.fill('return {T}')], ['return g'], ['return g'], []
        lines += self.rng.choice(ends)
        takes = 'a=0.5, b=0.25, n=2, on=True, pair=(0.5, 2)'
        return '\n    '.join([f'def step{number}(p, g, state, *, {takes}):', *lines])

    def shapes(self):
        "Shapes with the same number of dimensions, or any."
        vectors = [(3,), (5,), (70,), (0,), (1,)]
        matrices = [(2, 3), (3, 2), (4, 4), (0, 3), (40, 30)]
        alike = self.rng.choice([[()], vectors, matrices])
        shapes = self.rng.choices(alike, k=self.rng.randint(2, 4))
        if 'mixed' in self.kinds: shapes = self.rng.sample([(), *vectors, *matrices], 5)
        if 'large' in self.kinds: shapes[0] = self.rng.choice(LARGE)
        if 'tie' in self.kinds: shapes[1] = shapes[0]
        return shapes

    def event(self, kind, i):
        "A change before a step; where it may need a state, not before the first."
        first = 0 if kind in ('schedule', 'skip', 'special', 'interrupt') else 1
        time = self.rng.randrange(first, self.times)
        self.scope.update(i=[str(i)])
        return f'if t == {time}: {self.statement(BETWEEN[kind])}'

    def program(self):
        rng, kinds, shapes = self.rng, self.kinds, self.shapes()
        self.times = 40 if 'random' in kinds else 3 if 'large' in kinds else 6
        dtypes = rng.sample(['float32', 'float64'], 2 if 'mixed' in kinds else 1)
        self.scope['to'] = ['double' if dtypes[0] == 'float32' else 'float']
        leaves = ', '.join(f'({shape}, torch.{rng.choice(dtypes)})' for shape in shapes)
        count = 1 if self.mode == 'rough' else rng.choice([1, 2])
        steps = [self.step(i) for i in range(count)]
        names = [f'step{i}' for i in range(count)] + ['descend']
        if 'partial' in kinds: names[:1] = [f'partial(step0, a={a})' for a in (2, 0.25)]
        every = list(range(len(shapes)))
        groups = f'dict(params={every})'
        if 'groups' in kinds: groups = (f'dict(params={every[::2]}, a=0.125, n=3), '
                                        f'dict(params={every[1::2]}, pair=(2, 0.5))')
        alone = ('schedule', 'odd_number') if 'partial' in kinds else ()
        between = [kind for kind in BETWEEN if kind in kinds and kind not in alone]
        events = [self.event(kind, rng.choice(every)) for kind in between
                  for _ in range(rng.randint(1, 3))]
        if 'global' in kinds: events = ['global KNOB', 'KNOB = 1 + t % 3', *events]
        body = '\n\n'.join([
            *steps, 'def descend(p, g, state, *, lr=0.25):\n'
            '    p.add_(g.clamp(-1, 1), alpha=-lr)\n    p.clamp_(-8, 8)',
            '\n    '.join(['def before(t, ps, opt):', *(events or ['pass'])]),
            f"STEPS = [{', '.join(names)}]\nSHAPES = [{leaves}]\nGROUPS = [{groups}]"])
        facts = (f"TIMES, THREADS, ROUGH = {self.times}, {rng.choice([1, 1, 1, 2])}, "
                 f"{self.mode == 'rough'}\n"
                 f"WAYS, KINDS = ['foreach', 'fused'], {kinds}\n")
        return Text(self.seed, body, facts + TAIL, tuple(kinds))


# --- a program runs in every speed
class Outcome(NamedTuple):
    "What came of a program."
    failure: str = ''         # what is wrong, if anything
    raised: bool = False      # the loop raised
    refused: bool = False     # foreach=True refused the steps in words
    told: str = ''            # why fused=True ran them without a kernel
    finite: float = 1.        # share of finite elements in the end
    kinds: tuple = ()         # of the program

def same_tensor(x, y, tolerance):
    if (x.dtype, x.shape) != (y.dtype, y.shape): return False
    x, y = x.as_subclass(torch.Tensor), y.as_subclass(torch.Tensor)
    if not x.is_floating_point(): return torch.equal(x, y)
    x, y = x.double(), y.double()
    largest = x[x.isfinite()].abs().max() if x.isfinite().any() else 0.
    equal = (x == y) & (x.signbit() == y.signbit()) | x.isnan() & y.isnan()
    if tolerance: equal |= (x == y) | ((x - y).abs() <= tolerance*largest)
    return bool(equal.all())

def same(x, y, tolerance=0):
    "Whether two values have the same types, keys and (nearly) the same numbers."
    if type(x).__name__ != type(y).__name__: return False
    if isinstance(x, torch.Tensor): return same_tensor(x, y, tolerance)
    if isinstance(x, dict):
        return x.keys() == y.keys() and all(same(x[k], y[k], tolerance) for k in x)
    if isinstance(x, (list, tuple)):
        return len(x) == len(y) and all(same(a, b, tolerance) for a, b in zip(x, y))
    return repr(x) == repr(y)

class Run(NamedTuple):
    "A program in one speed."
    trace: list         # after each step, of each parameter: itself, gradient, state
    error: Exception    # or None
    told: list          # warnings that a kernel did not run
    space: dict         # names of the program

def run(text, way):
    space = dict(__name__='program')
    exec(compile(text, 'program', 'exec'), space)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        trace, error = space['run'](way)
    messages = [str(w.message) for w in caught]
    return Run(trace, error, [m for m in messages if 'fused=True' in m], space)

NEVER = 'cannot build|never the same|does not hold'        # said of no program
NEAR = {torch.float64: 1e-11, torch.float32: 1e-4}       # of the largest element

def difference(want, got, rough):
    "Where two traces part, in words."
    for t, (before, after) in enumerate(zip(want.trace, got.trace)):
        for i, (x, y) in enumerate(zip(before, after)):
            for name, u, v in zip(('parameter', 'gradient', 'state'), x, y):
                if not same(u, v, NEAR[x[0].dtype] if rough else 0):
                    return f'{name} {i} differs after step {t}: {u} and {v}'
    return ''

def frozen(got):
    "Whether the coins that steps have thrown all fell alike, in words."
    if got.error: return ''
    draws = [state.get('draws', 5) for *_, state in got.trace[-1]]
    fair = all(4 < n < len(got.trace) - 4 for n in draws)
    return '' if fair else f'draws are frozen: {draws}'

def judge(want, got, refusal, rough=False):
    "What is wrong with a run, if another one is right."
    is_random, steps = 'random' in want.space['KINDS'], len(got.trace)
    apart = frozen(got) if is_random else difference(want, got, rough)
    if apart or got.error and refusal(got.error): return apart
    if type(want.error) is type(got.error) and len(want.trace) == steps: return ''
    return (f'raises {got.error!r} after {steps} steps, '
            f'not {want.error!r} after {len(want.trace)}')

def never(error): return False
def names_the_way_out(error): return 'foreach=False' in str(error)
def in_words(error):
    return isinstance(error, (TypeError, ValueError)) and len(str(error)) > 40

def check(text):
    "Run a program in all speeds: they do what its steps mean, or say that they cannot."
    plain, loop = run(str(text), 'plain'), run(str(text), 'loop')
    refusable = {'object', 'partial'} & {*text.kinds}
    wrong = [('loop', judge(plain, loop, in_words if refusable else never))]
    refused, told = False, ''
    if text.plant:
        planted = run(re.sub(*text.plant, str(text)), 'loop')
        wrong.append(('plant', judge(loop, planted, never)))
    for way in [] if text.plant else loop.space['WAYS']:
        got, rough = run(str(text), way), way == 'fused' and loop.space['ROUGH']
        refusal = names_the_way_out if way == 'foreach' else never
        wrong.append((way, judge(loop, got, refusal, rough)))
        refused = refused or got.error is not None and loop.error is None
        told += '; '.join(got.told)
    if re.search(NEVER, told): wrong.append(('fused', told))
    failure = next((f'{way} {what}' for way, what in wrong if what), '')
    last = [p for p, *_ in loop.trace[-1]] if loop.trace else []
    size = sum(p.numel() for p in last)
    finite = sum(int(p.isfinite().sum()) for p in last)/max(1, size)
    return Outcome(failure, loop.error is not None, refused, told, finite)


# --- in a process of its own, so that one that dies or hangs is known
FORK, LIMIT = multiprocessing.get_context('fork'), 180

def warm_up():
    "Import what torch imports at its first step; start no threads, a child has none."
    p = torch.ones(1, requires_grad=True)
    p.grad = torch.ones(1)
    StepOptimizer([p], [sgd], lr=0.1).step()

def answer(pipe, text):
    "What a child does."
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    perturb = -6
    ctypes.CDLL(None).mallopt(perturb, 165)         # freed memory is overwritten
    try: pipe.send(check(text))
    except Exception: pipe.send(Outcome(f'program broken: {traceback.format_exc()}'))

class Child:
    "A process that checks a program."
    def __init__(self, text):
        self.pipe, there = FORK.Pipe(duplex=False)
        self.text, self.until = text, time.monotonic() + LIMIT
        self.process = FORK.Process(target=answer, args=(there, text), daemon=True)
        self.process.start()
        there.close()

    def is_done(self): return self.pipe.poll() or time.monotonic() > self.until

    def outcome(self):
        if answered := self.pipe.poll():
            try: outcome = self.pipe.recv()
            except EOFError: outcome = None
        else: self.process.kill()
        self.process.join()
        self.pipe.close()
        if not answered: outcome = Outcome(f'hangs for {LIMIT} seconds')
        outcome = outcome or Outcome(f'died with exit code {self.process.exitcode}')
        return outcome._replace(kinds=self.text.kinds)

def outcomes(texts, jobs=1):
    "Pairs of a program and what came of it."
    texts, running = iter(texts), []
    try:
        running += map(Child, itertools.islice(texts, jobs))
        while running:
            wait([child.pipe for child in running], timeout=1)
            for child in [child for child in running if child.is_done()]:
                running.remove(child)
                yield child.text, child.outcome()
                running += map(Child, itertools.islice(texts, 1))
    finally:
        for child in running: child.process.kill()


# --- smaller programs that fail in the same way
def operands(node):
    "The expressions that a larger one is made of."
    if isinstance(node, ast.Call):
        target = [node.func.value] if isinstance(node.func, ast.Attribute) else []
        return target + node.args + [k.value for k in node.keywords]
    if not isinstance(node, (ast.BinOp, ast.Compare, ast.UnaryOp, ast.IfExp)): return []
    return [part for part in ast.iter_child_nodes(node) if isinstance(part, ast.expr)]

def edits(tree):
    "Make a tree smaller, edit by edit; yields what takes the edit back."
    for node in ast.walk(tree):
        for field, old in ast.iter_fields(node):
            cut = field in ('body', 'orelse', 'keywords') or isinstance(node, ast.List)
            for part in [*old] if cut and isinstance(old, list) else []:
                before, at = [*old], old.index(part)
                old[at:at + 1] = part.body if isinstance(part, ast.If) else []
                if not old and field == 'body': old.append(ast.Pass())
                yield lambda: old.__setitem__(slice(None), before)
            for part in operands(old):
                setattr(node, field, part)
                yield lambda: setattr(node, field, old)
                if getattr(node, field) is part: break

def kind_of(failure): return ' '.join(failure.split()[:2])

def shrink(text, failure, seconds):
    "The program without what its failure does not need."
    until, size = time.monotonic() + seconds, None
    way = failure.split()[0]
    if way in ('foreach', 'fused'): text = text.alone(way)
    while size != len(text.body):
        size, tree = len(text.body), ast.parse(text.body)
        for undo in edits(tree):
            if time.monotonic() > until: return text
            smaller = text._replace(body=ast.unparse(ast.fix_missing_locations(tree)))
            (_, outcome), = outcomes([smaller])
            if kind_of(outcome.failure) == kind_of(failure): text = smaller
            else: undo()
    return text


# --- many programs
SHARES = dict(raised=0.4, refused=0.3, told=0.6)     # of many programs, at most,
HINDERED = dict( # but of these kinds
    raised=['object', 'partial'], refused=['flag', 'unknown'],
    told=['flag', 'unknown', 'random', 'swap', 'tie', 'move', 'negative', 'strided',
          'dtype', 'odd_state', 'odd_type', 'odd_number'])

def share(outcomes, field):
    return sum(bool(getattr(o, field)) for o in outcomes)/len(outcomes)

class Report:
    "What has come of all programs so far."
    def __init__(self): self.outcomes, self.failures, self.kernels = [], [], 0

    def add(self, text, outcome):
        self.outcomes.append(outcome)
        if outcome.failure: self.failures.append((text, outcome.failure))

    def kinds(self):
        "The outcomes of each kind of program."
        kinds = {'all': self.outcomes}
        for kind in sorted({kind for o in self.outcomes for kind in o.kinds}):
            kinds[kind] = [o for o in self.outcomes if kind in o.kinds]
        return kinds

    def blind(self):
        "Kinds of which too many programs did not run as they should."
        many = [(kind, of) for kind, of in self.kinds().items() if len(of) >= 30]
        return [f'{share(of, field):.0%} {field}: {kind}'
                for field, most in SHARES.items() for kind, of in many
                if share(of, field) > most and kind not in HINDERED[field]]

    def __str__(self):
        finite = sum(o.finite for o in self.outcomes)/max(1, len(self.outcomes))
        lines = [f'{len(self.outcomes)} programs, {self.kernels} kernels, '
                 f'{finite:.0%} of the numbers finite, {len(self.failures)} failures',
                 'kind        programs  raise  refused in lists  no kernel  fail']
        for kind, of in self.kinds().items() if self.outcomes else []:
            shares = [share(of, field) for field in (*SHARES, 'failure')]
            row = '{:11} {:8} {:6.0%} {:17.0%} {:10.0%} {:5.0%}'
            lines.append(row.format(kind, len(of), *shares))
        return '\n'.join(lines)

def programs(seed, kinds=()):
    "A program for each seed from this one on."
    return (Writer(s, kinds).program() for s in itertools.count(seed))

def fuzz(texts, seconds, jobs=2):
    "Run programs until the time is up; yields the report after each one."
    until, report = time.monotonic() + seconds, Report()
    warm_up()
    with tempfile.TemporaryDirectory() as cache, \
         mock.patch.dict(os.environ, OPTIMIZERS_EXPLAINED_CACHE=cache):
        in_time = itertools.takewhile(lambda text: time.monotonic() < until, texts)
        for text, outcome in outcomes(in_time, jobs):
            report.add(text, outcome)
            report.kernels = len(list(Path(cache).glob('*.so')))
            yield report

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--minutes', type=float, default=60)
    parser.add_argument('--seed', type=int, default=random.randrange(2**32))
    parser.add_argument('--programs', type=int, help='run so many, in any time')
    parser.add_argument('--jobs', type=int, default=2)
    args = parser.parse_args()
    print('seed', args.seed, flush=True)
    seen, at, texts = Counter(), time.monotonic(), programs(args.seed)
    if args.programs: texts = itertools.islice(texts, args.programs)
    for report in fuzz(texts, 60*args.minutes, args.jobs):
        for text, failure in report.failures[sum(seen.values()):]:
            seen[kind := kind_of(failure)] += 1
            if seen[kind] <= 3: text = shrink(text, failure, 60)
            shown = str(text) if seen[kind] <= 3 else f'seed {text.seed}'
            print(f'--- {failure}', shown, sep='\n', flush=True)
        if time.monotonic() > at + 30:
            at = time.monotonic()
            print(len(report.outcomes), 'programs', dict(seen), flush=True)
    print(report, *report.blind(), sep='\n')
    sys.exit(1 if report.failures else 0)

if __name__ == '__main__': main()
