import copy
import operator

import torch
from torch import Tensor

# %%
class TensorLike:
    "Stands in for a tensor in a step: its methods, its operators and torch's functions all arrive at `call`."
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None): return cls.call(func.__name__, func, args, kwargs or {})

def _operator(name, op, reverse=False):
    if reverse: return lambda self, other: self.call(name, op, (other, self), {})
    return lambda self, *other: self.call(name, op, (self, *other), {})

def _add_operators(cls):
    for name, python in dict(add='add', sub='sub', mul='mul', div='truediv', pow='pow', bitwise_and='and_', bitwise_or='or_').items():
        dunder, op = python.rstrip('_'), getattr(operator, python)
        setattr(cls, f'__{dunder}__', _operator(name, op))
        setattr(cls, f'__r{dunder}__', _operator(name, op, reverse=True))
        setattr(cls, f'__i{dunder}__', _operator(f'{name}_', getattr(Tensor, f'{name}_')))
    for name in ('lt', 'le', 'gt', 'ge', 'eq', 'ne', 'neg', 'abs'): setattr(cls, f'__{name}__', _operator(name, getattr(operator, name)))
    cls.__invert__ = _operator('bitwise_not', operator.invert)

_add_operators(TensorLike)

# %%
class TensorList(TensorLike):
    "Tensors that answer together: methods, operators and torch functions act on all, through `torch._foreach_*` where it exists."
    def __init__(self,
        tensors # an iterable of tensors
    ): self.tensors = list(tensors)
    def __iter__(self): return iter(self.tensors)
    def __repr__(self): return f'TensorList({self.tensors})'
    def __len__(self): raise TypeError("a step asks for the length of a tensor, and a list of tensors has many: pass foreach=False")
    def __bool__(self): raise TypeError("a step branches on the value of a tensor, and a list of tensors has many: pass foreach=False")

    @property
    def shapes(self): return [t.shape for t in self.tensors]
    @property
    def _version(self): return sum(t._version for t in self)

    def __getattr__(self, name):
        first = getattr(self.tensors[0], name)
        if isinstance(first, Tensor): return TensorList(getattr(t, name) for t in self)
        if callable(first): return lambda *args, **kwargs: together(name, getattr(Tensor, name), (self, *args), kwargs)
        if all(getattr(t, name) == first for t in self): return first
        raise AttributeError(f"a step reads .{name}, which differs between the tensors of a list: pass foreach=False")

    @staticmethod
    def call(name, func, args, kwargs): return together(name, func, args, kwargs)

def each(
    func, # called once per tensor
    args, # its arguments; a `TensorList` stands for one tensor each
    kwargs:dict, # the same, by name
): # a `TensorList` if the results are tensors
    "Call `func` on the tensors one after the other."
    n = next((len(a.tensors) for a in (*args, *kwargs.values()) if isinstance(a, TensorList)), None)
    if n is None: raise TypeError(f"{func.__name__} joins tensors, which a list of them cannot answer one by one: pass foreach=False")
    pick = lambda a, i: a.tensors[i] if isinstance(a, TensorList) else a
    out = [func(*(pick(a, i) for a in args), **{k: pick(v, i) for k, v in kwargs.items()}) for i in range(n)]
    return TensorList(out) if isinstance(out[0], Tensor) else _same(out, func)

def _same(out, func):
    if all(o == out[0] for o in out): return out[0]
    raise TypeError(f"{func.__name__} gives a different result for each tensor of a list ({out[0]!r}, ...): pass foreach=False")

def together(
    name:str, # of the operation, such as `mul_`
    func, # the operation on one tensor
    args, # its arguments
    kwargs:dict, # the same, by name
): # a `TensorList`; the first argument itself for an in-place operation
    "Do one operation on all tensors: with `torch._foreach_{name}` if that exists and takes these arguments, else one by one."
    in_place, is_list = name.endswith('_') and not name.startswith('__'), isinstance(args[0], TensorList)
    if in_place and not is_list: raise TypeError(f"a step changes one tensor by a list of tensors in {name}: pass foreach=False")
    fast, out = getattr(torch, f'_foreach_{name}', None), NotImplemented
    if fast and is_list and _takes_lists(args):
        plain = lambda a: a.tensors if isinstance(a, TensorList) else a
        try: out = fast(*map(plain, args), **{k: plain(v) for k, v in kwargs.items()})
        except TypeError: pass                              # it exists, but not for these arguments
    if out is NotImplemented: out = each(func, args, kwargs)
    if in_place: return args[0]
    return TensorList(out) if isinstance(out, (list, tuple)) else out

def _takes_lists(args): # torch's list kernels round numbers to half precision on a CPU, and want no other tensors beside lists
    first = args[0].tensors[0]
    half = first.device.type == 'cpu' and first.dtype in (torch.bfloat16, torch.float16)
    return not half and not any(isinstance(a, Tensor) and a.ndim for a in args)

# %%
def bucket_key(
    p:Tensor, # a parameter
    state:dict, # its state
) -> tuple: # equal for parameters that can be stepped together
    "What must be equal within a bucket: device, dtype, dimensions, kind and sharding, the names in the state and the numbers among them."
    shards = getattr(p, 'device_mesh', None), getattr(p, 'placements', None)
    return (p.device, p.dtype, p.ndim, type(p), shards, *((k, Tensor if isinstance(v, Tensor) else v) for k, v in sorted(state.items())))

class Bucket:
    "Parameters that are stepped together, with a column for every name in their states."
    def __init__(self,
        params, # parameters with equal `bucket_key`
        states, # the state of each
    ): self.params, self.states, self.columns, self.layout = params, states, {k: [s[k] for s in states] for k in states[0]}, None

    def fits(self): 
        "Whether the states still are what the last step left."
        return all(len(s) == len(self.columns) for s in self.states) and all(_are([s.get(k) for s in self.states], c) for k, c in self.columns.items())

    @property
    def state(self):
        "One state for all: tensors as `TensorList`, numbers as they are."
        return {k: TensorList(c) if isinstance(c[0], Tensor) else c[0] for k, c in self.columns.items()}

    def put(self,
        state:dict, # the names and numbers that all have from now on; a `TensorList` holds one tensor for each
    ):
        "Carry what steps left in a state for all to the state of each parameter."
        for k in self.columns.keys() - state.keys():
            for s in self.states: del s[k]
        self.columns = {k: self._column(k, v) for k, v in state.items()}

    def set_numbers(self,
        numbers:dict, # by name in the state
    ):
        "Give every state the same numbers."
        for k, v in numbers.items():
            for s in self.states: s[k] = v
            self.columns[k] = [v]*len(self.states)

    def _column(self, k, v):
        old = self.columns.get(k)
        if old and (v is old[0] or isinstance(v, TensorList) and _are(v.tensors, old)): return old
        new = v.tensors if isinstance(v, TensorList) else [v, *(copy.deepcopy(v) for _ in self.states[1:])]
        for s, x in zip(self.states, new): s[k] = x
        return new

def _are(xs, ys): return len(xs) == len(ys) and all(map(operator.is_, xs, ys))

# %%
def plan(
    plans:dict, # what was planned before, by the first parameter
    params, # parameters with gradients, all of one group
    states, # `{parameter: state}`
) -> list: # of `Bucket`s
    "Sort parameters into buckets, or keep those of the last step if nothing has changed since."
    states, key = [states[p] for p in params], id(params[0])
    if key in plans:
        old_params, old_states, found = plans[key]
        if _are(params, old_params) and _are(states, old_states) and all(b.fits() for b in found): return found
    found = {}
    for p, s in zip(params, states): found.setdefault(bucket_key(p, s), []).append((p, s))
    found = [Bucket(*map(list, zip(*pairs))) for pairs in found.values()]
    plans[key] = params, states, found
    return found

def in_lists(
    bucket:Bucket, # parameters with gradients
): # yields `(p, g, state)` once, with a `TensorList` in place of each tensor
    "The arguments of steps that run on a whole bucket; what they leave in the state is carried to each parameter."
    state = bucket.state
    yield TensorList(bucket.params), TensorList(p.grad for p in bucket.params), state
    bucket.put(state)
