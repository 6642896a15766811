import operator
import warnings
from array import array

import torch
from torch import Tensor
from .build import CppKernel, TritonKernel
from .multi_tensor import in_lists, plan
from .recorder import Unfusable, record

# %%
BACKENDS = dict(cpu=CppKernel, cuda=TritonKernel) # the kernels of each kind of device
LIMIT = 16 # recordings of the same steps, after which they are run in Python

class Program:
    "A recording and, if one can be made, its kernel; `reason` says why there is none, '' if only this once."
    def __init__(self, calls, like, tensors, numbers):
        one, two = (record(calls, like, tensors, numbers) for _ in range(2))
        self.numbers, self.reason, self.recording = one.numbers, one.reason, one
        if one != two: self.reason = 'the steps do something else each time they are run'
        try: self.kernel = BACKENDS[like.device.type](one, like.dtype) if self.reason is None else None
        except KeyError: self.reason = f'there is no kernel for the device {like.device.type}'
        except Unfusable as e: self.reason = str(e)

class Memo:
    "What an optimizer need not find out again at the next step: buckets, programs, and which reasons it has told."
    def __init__(self): self.plans, self.programs, self.told = {}, {}, set()

    def program(self,
        calls, # pairs of a step and its hyperparameters
        like:Tensor, # a parameter of the bucket
        columns:dict, # of the bucket
    ) -> tuple: # the `Program` that holds now, the numbers its kernel takes, and the numbers that come into the state
        "Find the program whose guards hold, or record another one."
        tensors = [k for k, c in columns.items() if isinstance(c[0], Tensor)]
        hypers, numbers = {k: v for _, h in calls for k, v in h.items()}, {k: c[0] for k, c in columns.items() if k not in tensors}
        found = self.programs.setdefault((*(f for f, _ in calls), like.device, like.dtype, like.ndim, *tensors, None, *numbers), [])
        for program in found:
            if (out := program.numbers(hypers, numbers)) is not None: return program, *out
        if len(found) >= LIMIT: raise Unfusable('the steps take another path each time, by a number that keeps changing')
        found.insert(0, program := Program(calls, like, tensors, numbers))
        return program, *(program.numbers(hypers, numbers) or ((), {}))

    def tell(self, reason):
        "Say once why steps do not run in a kernel."
        if not reason or reason in self.told: return
        self.told.add(reason)
        warnings.warn(f'fused=True steps some parameters without a kernel: {reason}', stacklevel=7)

# %%
def strides(t): return tuple((s, n) for s, n in zip(t.stride(), t.shape) if n != 1)

def is_dense(
    t:Tensor, # any
) -> bool:
    "Whether the elements fill their memory without gaps, in whatever order."
    expected = 1
    for stride, size in sorted(strides(t)):
        if stride != expected: return t.numel() == 0
        expected *= size
    return True

def local(tensors):
    "The shards that this process holds, of DTensors; other tensors are their own."
    return [t.to_local() for t in tensors] if hasattr(tensors[0], 'to_local') else tensors

def addresses(tensors): return array('q', map(Tensor.data_ptr, local(tensors)))

class Layout:
    "Where the elements of a bucket are: checked once, so that a kernel can trust it."
    def __init__(self,
        columns, # the parameters, and for each tensor of the state a list
        chunk:int, # elements that are taken at a time
    ):
        self.columns, self.uploaded, ps = columns, None, local(columns[0])
        self.device, self.dtype, self.placements = ps[0].device, ps[0].dtype, getattr(columns[0][0], 'placements', None)
        self.strides, self.geometry = list(map(Tensor.stride, ps)), list(map(strides, ps))
        if type(ps[0]) not in (Tensor, torch.nn.Parameter): raise Unfusable(f'a parameter is a {type(ps[0]).__name__}')
        if not all(map(is_dense, ps)): raise Unfusable('a parameter has gaps in memory')
        for c in columns:
            self.check(c)
            if [t.shape for t in c] != [p.shape for p in columns[0]] or {t.device for t in c} != {self.device}: raise Unfusable('a tensor of the state has another shape or device than its parameter')
        self.pointers, self.sizes = list(map(addresses, columns)), array('q', [p.numel() for p in ps])
        self.taken = {a for c in self.pointers for a in c} - {0}
        if len(self.taken) < sum(n > 0 for n in self.sizes)*len(columns): raise Unfusable('two tensors share their memory')
        self.chunks = array('q', [-(-n//chunk) for n in self.sizes])
        self.tensor = array('q', [i for i, n in enumerate(self.chunks) for _ in range(n)])
        self.first = array('q', [k*chunk for n in self.chunks for k in range(n)])

    def check(self,
        tensors, # one for each parameter
    ):
        "Raise `Unfusable` unless the tensors have the dtype and the memory layout of the parameters."
        ts = local(tensors)
        if {t.dtype for t in ts} != {self.dtype}: raise Unfusable('a gradient or a state has another dtype than its parameter')
        if list(map(Tensor.stride, ts)) != self.strides and list(map(strides, ts)) != self.geometry: raise Unfusable('a gradient or a state has another memory layout than its parameter')
        if self.placements and any(getattr(t, 'placements', None) != self.placements for t in tensors): raise Unfusable('a gradient or a state is sharded differently than its parameter')

    def fits(self, columns):
        "Whether these are the tensors that were checked, at the same addresses."
        return all(map(operator.is_, columns, self.columns)) and list(map(addresses, columns)) == self.pointers

# %%
def fuse(
    memo:Memo, # of the optimizer
    calls, # pairs of a step and its hyperparameters
    bucket, # a `multi_tensor.Bucket`
) -> None: # `Unfusable` if there is no kernel for it, with nothing changed
    "One step of a bucket in one kernel."
    program, coefs, numbers = memo.program(calls, bucket.params[0], bucket.columns)
    if program.reason is not None: raise Unfusable(program.reason)
    columns, grads = [bucket.params, *(c for c in bucket.columns.values() if isinstance(c[0], Tensor))], [p.grad for p in bucket.params]
    if bucket.layout is None or not bucket.layout.fits(columns): bucket.layout = Layout(columns, program.kernel.chunk)
    layout, pointers = bucket.layout, addresses(grads)
    layout.check(grads)
    if layout.placements and program.kernel.sums: raise Unfusable('a sum over a tensor that is sharded has no fused form')
    if not layout.taken.isdisjoint(pointers): raise Unfusable('a gradient shares its memory with a parameter or a state')
    program.kernel([layout.pointers[0], pointers, *layout.pointers[1:]], layout, coefs)
    torch.autograd.graph.increment_version(bucket.params)
    bucket.set_numbers(numbers)

def arrange(
    opt, # a `StepOptimizer`
    calls, # pairs of a step and its hyperparameters
    params, # parameters of one group that have a gradient
): # yields `(p, g, state)`
    "The arguments of every call of the steps that is left to Python: one parameter at a time, a list at a time, or none after a kernel."
    lists = all(p.is_cuda for p in params) if opt.foreach is None else opt.foreach
    if not (lists or opt.fused):
        for p in params: yield p, p.grad, opt.state[p]
        return
    for bucket in plan(opt.memo.plans, params, opt.state):
        try:
            if opt.fused: fuse(opt.memo, calls, bucket); continue
        except Unfusable as e: opt.memo.tell(str(e))
        if lists or hasattr(bucket.params[0], 'to_local'): yield from in_lists(bucket)
        else: yield from zip(bucket.params, [p.grad for p in bucket.params], bucket.states)
