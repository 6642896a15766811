import re
from typing import NamedTuple

import torch
from .recorder import HALF, Unfusable

# %%
class Phase(NamedTuple):
    "One pass over the elements, as numbers of nodes: computed once per tensor, computed per element, summed, stored."
    tensor:list
    element:list
    sums:list
    stores:dict # `{argument: node}`

def phases(
    recording, # from `record`
) -> list: # of `Phase`s: more than one where elements change by a sum over their tensor
    "Cut a recording at its sums. A later phase computes again what it needs, and only the last one stores."
    nodes, stores, depth, out = recording.nodes, recording.stores, [], []
    for n in nodes: depth.append(max((depth[i] for i in n.needs), default=0) + bool(n.total))
    live, last = reach(nodes, stores.values(), behind=True), max((depth[j] for j in stores.values()), default=0)
    for k in range(last + 1):
        sums, ends = [i for i in live if nodes[i].total and depth[i] == k + 1], stores if k == last else {}
        used = reach(nodes, [*(j for i in sums for j in nodes[i].needs), *ends.values()])
        out.append(Phase(*([i for i in used if nodes[i].per == per] for per in ('tensor', 'element')), sums, ends))
    return out

def reach(
    nodes, # of a recording
    wanted, # numbers of nodes
    behind=False, # go on behind a sum, to what was summed
) -> list: # of numbers, in order
    "The nodes that `wanted` need, themselves included."
    found, todo = set(), list(wanted)
    while todo:
        if (i := todo.pop()) in found: continue
        found.add(i)
        if behind or not nodes[i].total: todo += nodes[i].needs
    return sorted(found)

def traffic(
    recording, # from `record`
) -> int: # times the bytes of an element, what a step moves for it
    "How often a kernel reads or writes memory for each element, over all its phases."
    return sum(sum(i < len(recording.names) for i in ph.element) + len(ph.stores) for ph in phases(recording))

# %%
class Writer:
    "Writes the source of a kernel; each language adds what its lines look like."
    def __init__(self,
        recording, # from `record`
        dtype, # of the parameters
    ):
        if dtype not in self.types: raise Unfusable(f'{dtype} has no fused form on this device')
        self.nodes, self.coefs, self.phases, self.dtype = recording.nodes, recording.coefs, phases(recording), dtype
        self.names = [re.sub(r'\W', '_', n) for n in recording.names]
        self.sums = [i for ph in self.phases for i in ph.sums]

    def line(self, i):
        "The line that computes node `i`."
        n = self.nodes[i]
        if i < len(self.names): return self.load(i)
        if n.total: return self.let(i, n.total.format(total=self.total(i, 'i'), size='size'))
        return self.flag(i, n.code) if n.logical else self.let(i, n.code)

    def lines(self, ph):
        "The lines of a phase, in three parts: before the elements, for each element, after them."
        used = sorted({*ph.stores, *(i for i in ph.element if i < len(self.names))})
        return ([*map(self.pointer, used), *map(self.line, ph.tensor), *map(self.start, ph.sums)],
                [*map(self.line, ph.element), *map(self.add, ph.sums), *(self.store(a, i) for a, i in ph.stores.items())], [*map(self.end, ph.sums)])

    def slot(self, i, row): return f'{len(self.sums)}*{row} + {self.sums.index(i)}'

# %%
CHUNK = 32768 # elements that a thread takes at a time
CPP = """#include <algorithm>
#include <cmath>
#include <cstdint>
using std::abs, std::exp, std::fma, std::log, std::pow, std::sqrt, std::tanh;
typedef {T} T;
typedef {S} S;
template <class A, class B> static inline T where(bool c, A a, B b) {{ return c ? T(a) : T(b); }}
{convert}
extern "C" void run(S*** args, const int64_t* sizes, int64_t chunks, const int64_t* tensor, const int64_t* first, const double* c, double* part, double* totals, int64_t threads) {{
  {coefs}
{phases}}}
"""
CPP_PHASE = """  #pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t k = 0; k < chunks; k++) {{
    const int64_t i = tensor[k], size = sizes[i], n = std::min(int64_t({chunk}), size - first[k]);
    {before}
    #pragma omp simd{reduction}
    for (int64_t j = 0; j < n; j++) {{
      {loop}
    }}
    {after}
  }}
"""
PLAIN = 'static inline T get(S x) { return x; }\nstatic inline S put(T x) { return x; }\n#define R(x) (x)\n'
BFLOAT16 = """static inline T get(S x) { union { uint32_t i; T f; } u; u.i = uint32_t(x) << 16; return u.f; }
static inline S put(T x) { union { T f; uint32_t i; } u; u.f = x; return x != x ? 0x7fc0 : (u.i + 0x7fff + ((u.i >> 16) & 1)) >> 16; }
#define R(x) get(put(x))
"""

class Cpp(Writer):
    "A loop per phase over chunks of all tensors, shared among threads; bfloat16 is rounded after every operation, as torch does."
    types = {torch.float32: dict(T='float', S='float', convert=PLAIN), torch.float64: dict(T='double', S='double', convert=PLAIN),
             torch.bfloat16: dict(T='float', S='uint16_t', convert=BFLOAT16),
             torch.float16: dict(T='float', S='_Float16', convert=PLAIN.replace('(x)\n', 'get(put(x))\n'))}
    def pointer(self, a): return f'S* __restrict__ {self.names[a]} = args[{a}][i] + first[k];'
    def load(self, i): return f'const T v{i} = get({self.names[i]}[j]);'
    def let(self, i, code): return f'const T v{i} = R({code});' if self.dtype in HALF else f'const T v{i} = {code};'
    def flag(self, i, code): return f'const bool v{i} = {code};'
    def store(self, a, i): return f'{self.names[a]}[j] = put(v{i});'
    def start(self, i): return f'T sum{i} = 0;'
    def add(self, i): return f'sum{i} += {self.nodes[i].code};'
    def end(self, i): return f'part[{self.slot(i, "k")}] = sum{i};'
    def total(self, i, row): return f'totals[{self.slot(i, row)}]'
    def gather(self, i): return f'  for (int64_t k = 0; k < chunks; k++) {self.total(i, "tensor[k]")} += part[{self.slot(i, "k")}];\n'

    def phase(self, ph):
        before, loop, after = self.lines(ph)
        reduction = f" reduction(+:{', '.join(f'sum{i}' for i in ph.sums)})" if ph.sums else ''
        text = CPP_PHASE.format(chunk=CHUNK, before='\n    '.join(before), loop='\n      '.join(loop), after='\n    '.join(after), reduction=reduction)
        return text.replace('    \n', '') + ''.join(map(self.gather, ph.sums))

    def source(self):
        "The whole file."
        coefs = ' '.join(f'const T c{i} = c[{i}];' for i in range(len(self.coefs)))
        return CPP.format(**self.types[self.dtype], coefs=coefs, phases=''.join(map(self.phase, self.phases)))

# %%
BLOCK = 1024 # elements of one program on a GPU
TRITON = """import triton
import triton.language as tl
{functions}{phases}"""
FUNCTIONS = dict(T=('x', 'tl.full((), x, tl.{T})'), R=('x', 'x.to(tl.{S}).to(tl.{T})'), abs=('x', 'tl.abs(x)'), exp=('x', 'tl.exp(x)'), log=('x', 'tl.log(x)'),
    sqrt=('x', 'tl.{sqrt}(x)'), fma=('x, y, z', 'tl.fma(x, y, z)'), where=('c, x, y', 'tl.where(c, x, y)')) # what the expressions call, in Triton
FUNCTION = """
@triton.jit
def {name}({args}): return {code}
"""
TRITON_PHASE = """
@triton.jit(do_not_specialize=['n'])
def phase{number}(args, n, sizes, tensor, first, c, part, totals, BLOCK: tl.constexpr):
    k = tl.program_id(0)
    i = tl.load(tensor + k)
    size = tl.load(sizes + i)
    j = tl.load(first + k) + tl.arange(0, BLOCK)
    inside = j < size
    {lines}
"""

class Triton(Writer):
    "The same for a GPU: a function per phase, run once for every block of every tensor."
    types = {torch.float32: dict(T='float32', S='float32', sqrt='sqrt_rn'), torch.float64: dict(T='float64', S='float64', sqrt='sqrt'),
             torch.bfloat16: dict(T='float32', S='bfloat16', sqrt='sqrt_rn'), torch.float16: dict(T='float32', S='float16', sqrt='sqrt_rn')}
    def pointer(self, a): return f'{self.names[a]} = tl.load(args + {a}*n + i).to(tl.pointer_type(tl.{self.types[self.dtype]["S"]})) + j'
    def load(self, i): return f'v{i} = tl.load({self.names[i]}, inside, other=0).to(tl.{self.types[self.dtype]["T"]})'
    def let(self, i, code): return f'v{i} = R({code})' if self.dtype in HALF else f'v{i} = {code}'
    def flag(self, i, code): return f'v{i} = {code}'
    def store(self, a, i): return f'tl.store({self.names[a]}, v{i}, inside)'
    def start(self, i): return ''
    def add(self, i): return f'tl.store(part + {self.slot(i, "k")}, tl.sum(tl.where(inside, {self.nodes[i].code}, 0)))'
    def end(self, i): return ''
    def total(self, i, row): return f'tl.load(totals + {self.slot(i, row)})'

    def phase(self, number, ph):
        coefs = [f'c{i} = tl.load(c + {i}).to(tl.{self.types[self.dtype]["T"]})' for i in range(len(self.coefs))]
        lines = [x for part in ([coefs], self.lines(ph)) for xs in part for x in xs if x]
        return TRITON_PHASE.format(number=number, lines='\n    '.join(lines))

    def source(self):
        "The whole file."
        body = ''.join(self.phase(i, ph) for i, ph in enumerate(self.phases))
        called = sorted({*re.findall(r'(?<![.\w])(\w+)\(', body)} - {f'phase{i}' for i in range(len(self.phases))})
        if missing := [f for f in called if f not in FUNCTIONS]: raise Unfusable(f'{missing[0]} has no fused form on this device')
        functions = ''.join(FUNCTION.format(name=f, args=FUNCTIONS[f][0], code=FUNCTIONS[f][1].format(**self.types[self.dtype])) for f in called)
        return TRITON.format(functions=functions, phases=body)
