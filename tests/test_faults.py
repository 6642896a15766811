"""Seeded faults: each is a small change to a good optimizer, and the row named beside
it must see it, while the good one passes.

`python tests/test_faults.py` prints for every fault all the rows that notice."""
import copy
import inspect
import math
import warnings
from collections import defaultdict
from functools import partial
from typing import NamedTuple

import pytest
import torch

from optimizers_explained import optim
from optimizers_explained.steps import adam
from optimizers_explained.contract import ROWS, contract
from optimizers_explained.core import StepOptimizer
from optimizers_explained.steps import decay, flip, l2, momentum, sgd
from optimizers_explained.contract.workbench import leaves


class Kind(NamedTuple):
    good: partial                  # one of ours, with its hyperparameters
    reference: partial | None      # torch's

    @property
    def steps(self): return self.good(leaves()).steps
    def of(self, cls, steps): # the same hyperparameters for another class or list
        return partial(cls, steps=steps, **self.good.keywords)


T, LR = torch.optim, 0.05
SGD = dict(lr=LR, momentum=0.9, dampening=0.3, weight_decay=0.1)
NESTEROV = dict(lr=LR, momentum=0.9, weight_decay=0.1, nesterov=True)
MAXIMIZE = SGD | dict(maximize=True)
ADAM = dict(lr=LR, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.1)
AMSGRAD = ADAM | dict(amsgrad=True)
KINDS = dict(
    SGD=Kind(partial(optim.SGD, **SGD), partial(T.SGD, **SGD)),
    NESTEROV=Kind(partial(optim.SGD, **NESTEROV), partial(T.SGD, **NESTEROV)),
    MAXIMIZE=Kind(partial(optim.SGD, **MAXIMIZE), partial(T.SGD, **MAXIMIZE)),
    ADAM=Kind(partial(optim.Adam, **ADAM), partial(T.Adam, **ADAM)),
    ADAMW=Kind(partial(optim.AdamW, **ADAM), partial(T.AdamW, **ADAM)),
    AMSGRAD=Kind(partial(optim.AdamW, **AMSGRAD), partial(T.AdamW, **AMSGRAD)),
    REL=Kind(partial(optim.DecoupledSGDW, **SGD), None),
    LION=Kind(partial(optim.Lion, lr=LR, weight_decay=0.1), None))


class Fault(NamedTuple):
    kind: str          # of the good optimizer
    row: str           # that must see it
    make: object       # makes the broken one


FAULTS = {}            # by name


def fault(kind, row, steps=None):
    """A decorator: of a step, with a function that makes the list of steps around it;
    of a class, which gets the steps of the good optimizer."""
    def add(broken):
        if steps is None: make = KINDS[kind].of(broken, KINDS[kind].steps)
        else: make = KINDS[kind].of(StepOptimizer, steps(broken))
        FAULTS[broken.__name__.replace('_', ' ')] = Fault(kind, row, make)
        return broken
    return add


NUMBERS = 'has the reference numbers'


# --- the update itself
@fault('SGD', NUMBERS, steps=lambda f: [flip, f, momentum, sgd])
def decay_dropped(p, g, state, *, weight_decay=0.): return None

@fault('SGD', NUMBERS, steps=lambda f: [flip, f, momentum, sgd])
def decay_rule_swapped(p, g, state, *, lr, weight_decay=0.): p.mul_(1 - lr*weight_decay)

@fault('ADAMW', NUMBERS, steps=lambda f: [flip, f, adam, sgd])
def decay_through_the_gradient(p, g, state, *, weight_decay=0.):
    return g + weight_decay*p

@fault('ADAMW', NUMBERS, steps=lambda f: [flip, adam, sgd, f])
def decay_after_the_step(p, g, state, *, lr, weight_decay=0.):
    p.mul_(1 - lr*weight_decay)

@fault('SGD', NUMBERS, steps=lambda f: [flip, l2, f, sgd])
def dampening_on_the_first_step(p, g, state, *, momentum=0., dampening=0.,
                                nesterov=False):
    b = state.get('momentum_buffer', 0*g)
    state['momentum_buffer'] = b = b*momentum + (1 - dampening)*g
    return b

@fault('NESTEROV', NUMBERS, steps=lambda f: [flip, l2, f, sgd])
def nesterov_dropped(p, g, state, *, momentum=0., dampening=0., nesterov=False):
    b = state.get('momentum_buffer', 0*g)
    state['momentum_buffer'] = b = b*momentum + g
    return b

@fault('MAXIMIZE', NUMBERS, steps=lambda f: [l2, f, momentum, sgd])
def maximize_flips_the_decay(p, g, state, *, maximize=False):
    return -g if maximize else g

@fault('ADAM', NUMBERS, steps=lambda f: [flip, l2, f, sgd])
def betas_swapped(p, g, state, *, betas=(0.9, 0.999), eps=1e-8, amsgrad=False):
    return adam(p, g, state, betas=betas[::-1], eps=eps)

@fault('ADAM', NUMBERS, steps=lambda f: [flip, l2, f, sgd])
def eps_inside_the_root(p, g, state, *, betas=(0.9, 0.999), eps=1e-8, amsgrad=False):
    adam(p, g, state, betas=betas, eps=eps)
    t = state['step']
    m, v = state['exp_avg']/(1 - betas[0]**t), state['exp_avg_sq']/(1 - betas[1]**t)
    return m/(v + eps).sqrt()

@fault('ADAM', NUMBERS, steps=lambda f: [flip, l2, f, sgd])
def no_debiasing(p, g, state, *, betas=(0.9, 0.999), eps=1e-8, amsgrad=False):
    adam(p, g, state, betas=betas, eps=eps)
    return state['exp_avg']/(state['exp_avg_sq'].sqrt() + eps)

@fault('AMSGRAD', NUMBERS, steps=lambda f: [flip, decay, f, sgd])
def amsgrad_forgotten(p, g, state, *, betas=(0.9, 0.999), eps=1e-8, amsgrad=False):
    return adam(p, g, state, betas=betas, eps=eps)

@fault('SGD', NUMBERS, steps=lambda f: [flip, l2, f, sgd])
def buffer_in_float32(p, g, state, *, momentum=0., dampening=0., nesterov=False):
    b, g32 = state.get('momentum_buffer'), g.float()
    if b is None: b = g32
    else: b = b.float()*momentum + (1 - dampening)*g32
    state['momentum_buffer'] = b
    return b.to(g.dtype)

@fault('ADAM', 'treats each parameter alone')
class step_count_shared_between_parameters(StepOptimizer):
    def run(self, group, params, grads):
        super().run(group, params, grads)
        most = max((s.get('step', 0) for s in self.state.values()), default=0)
        for p in params: self.state[p]['step'] = most


# --- parameters and gradients
@fault('SGD', 'leaves gradients alone', steps=lambda f: [flip, f, momentum, sgd])
def gradient_mutated(p, g, state, *, weight_decay=0.):
    return g.add_(p, alpha=weight_decay)

@fault('SGD', 'leaves gradients alone', steps=lambda f: [f, sgd])
def buffer_is_the_gradient(p, g, state, *, momentum=0., dampening=0., weight_decay=0.,
                           nesterov=False, maximize=False):
    b = state.get('momentum_buffer')
    state['momentum_buffer'] = b = g if b is None else b.mul_(momentum).add_(g)
    return b

@fault('SGD', 'skips missing gradients')
class none_treated_as_zero(StepOptimizer):
    def run(self, group, params, grads):
        late = [p for p in group['params'] if p.grad is None]
        for p in late: p.grad = torch.zeros_like(p)
        super().run(group, group['params'], [p.grad for p in group['params']])
        for p in late: p.grad = None

@fault('ADAM', 'skips missing gradients')
class steps_counted_without_gradient(StepOptimizer):
    def run(self, group, params, grads):
        super().run(group, params, grads)
        for p in group['params']:
            if p.grad is None and p in self.state: self.state[p]['step'] += 1

@fault('REL', 'lets frozen parameters rest')
class decays_frozen_parameters(StepOptimizer):
    def run(self, group, params, grads):
        super().run(group, params, grads)
        for p in group['params']:
            if p.grad is None: p.mul_(1 - 1e-3)

@fault('SGD', 'rests at lr 0', steps=lambda f: [flip, f, momentum, sgd])
def decay_without_lr(p, g, state, *, weight_decay=0.): p.mul_(1 - 0.01*weight_decay)

@fault('SGD', 'takes any tensor', steps=lambda f: [flip, l2, momentum, f])
def update_goes_into_a_copy(p, g, state, *, lr): p.reshape(-1).sub_(lr*g.reshape(-1))

@fault('SGD', 'keeps low precision', steps=lambda f: [flip, l2, momentum, f])
def becomes_float32(p, g, state, *, lr):
    dtype = torch.float64 if p.dtype is torch.float64 else torch.float32
    p.data = (p - lr*g).to(dtype)

@fault('SGD', 'handles or refuses sparse gradients')
class sparse_gradient_half_way(StepOptimizer):
    def run(self, group, params, grads):
        for p in params:
            if p.grad.layout is not torch.strided:
                raise ValueError('sparse gradients are not supported')
            super().run(group, [p], [p.grad])
    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            live = [p for p in group['params'] if p.grad is not None]
            self.run(group, live, [p.grad for p in live])
        return loss


# --- groups and schedules
@fault('SGD', 'keeps groups apart')
class group_ignored(StepOptimizer):
    def run(self, group, params, grads):
        super().run(self.param_groups[0], params, grads)

@fault('SGD', 'follows every scheduler')
class defaults_instead_of_groups(StepOptimizer):
    def run(self, group, params, grads):
        super().run({**group, 'lr': self.defaults['lr']}, params, grads)

@fault('REL', 'follows every scheduler')
class decay_relative_to_initial_lr(StepOptimizer):
    def run(self, group, params, grads):
        lr0 = group.get('initial_lr', group['lr0'])
        super().run({**group, 'lr0': lr0}, params, grads)

@fault('REL', 'takes new groups')
class lr0_of_the_first_group(StepOptimizer):
    def run(self, group, params, grads):
        super().run({**group, 'lr0': self.param_groups[0]['lr0']}, params, grads)

@fault('SGD', 'takes new groups')
class late_group_forgotten(StepOptimizer):
    def run(self, group, params, grads):
        if not hasattr(self, 'known'): self.known = len(self.param_groups)
        if any(group is g for g in self.param_groups[:self.known]):
            super().run(group, params, grads)

def without_names(params): return [p[1] if isinstance(p, tuple) else p for p in params]

@fault('SGD', 'takes names')
class names_dropped(StepOptimizer):
    def add_param_group(self, group):
        params = group['params']
        if isinstance(params, torch.Tensor): params = [params]
        super().add_param_group({**group, 'params': without_names(params)})

@fault('SGD', 'steps tied weights once')
class duplicates_kept(StepOptimizer):
    def add_param_group(self, group):
        params = group['params']
        if not isinstance(params, list): params = [params]
        super().add_param_group({**group, 'params': list(dict.fromkeys(params))})
        self.param_groups[-1]['params'] = without_names(params)


# --- checkpoints and copies
@fault('SGD', 'copies what it loads')
class state_aliased_on_load(StepOptimizer):
    def load_state_dict(self, sd):
        super().load_state_dict(sd)
        params = [p for g in self.param_groups for p in g['params']]
        for p, s in zip(params, sd['state'].values()): self.state[p] = s

@fault('ADAM', 'resumes bit for bit')
class step_count_not_saved(StepOptimizer):
    def state_dict(self):
        sd = super().state_dict()
        return {**sd, 'state': {k: {**s, 'step': 1} for k, s in sd['state'].items()}}

@fault('ADAM', 'resumes bit for bit')
class state_loaded_in_float32(StepOptimizer):
    def load_state_dict(self, sd):
        super().load_state_dict(sd)
        for s in self.state.values():
            for k, v in s.items():
                if isinstance(v, torch.Tensor): s[k] = v.float().double()

@fault('SGD', 'resumes bit for bit')
class rates_not_loaded(StepOptimizer):
    def load_state_dict(self, sd):
        own = [g['lr'] for g in self.param_groups]
        super().load_state_dict(sd)
        for g, lr in zip(self.param_groups, own): g['lr'] = lr

@fault('SGD', 'refuses foreign checkpoints')
class loads_before_it_checks(StepOptimizer):
    def load_state_dict(self, sd):
        pairs = list(zip(self.param_groups, sd['param_groups']))
        for g, s in pairs: g['lr'] = s['lr']/2
        super().load_state_dict(sd)
        for g, s in pairs: g['lr'] = s['lr']

@fault('SGD', 'notices swapped names')
class checkpoint_not_checked(StepOptimizer):
    def load_state_dict(self, sd):
        torch.optim.Optimizer.load_state_dict(self, copy.deepcopy(sd))

@fault('ADAM', 'exchanges checkpoints with torch')
class state_in_other_units(StepOptimizer):
    """Twice the average is saved, and halved when loaded:
    exact, but not what torch means by it."""
    def state_dict(self): return self.scaled(super().state_dict(), 2)
    def load_state_dict(self, sd): super().load_state_dict(self.scaled(sd, 0.5))
    def scaled(self, sd, k):
        state = {i: {**s} for i, s in sd['state'].items()}
        for s in state.values():
            if s: s['exp_avg'] = k*s['exp_avg']
        return {**sd, 'state': state}

@fault('SGD', 'survives copying')
class copy_without_state(StepOptimizer):
    def __getstate__(self):
        return {**super().__getstate__(), 'state': defaultdict(dict)}

@fault('SGD', 'runs hooks')
class load_without_hooks(StepOptimizer):
    def load_state_dict(self, sd):
        hooks = self._optimizer_load_state_dict_post_hooks
        self._optimizer_load_state_dict_post_hooks = {}
        super().load_state_dict(sd)
        self._optimizer_load_state_dict_post_hooks = hooks


# --- around the step
@fault('SGD', 'runs closures')
class closure_without_its_loss(StepOptimizer):
    def step(self, closure=None): super().step(closure)

@fault('SGD', 'clears gradients')
class gradients_kept(StepOptimizer):
    def zero_grad(self, set_to_none=False): super().zero_grad(set_to_none=False)

@fault('SGD', 'obeys the grad scaler')
class promises_to_look_for_infinities(StepOptimizer):
    _step_supports_amp_scaling = True

@fault('SGD', 'takes accumulated and clipped gradients')
class update_inside_backward(StepOptimizer):
    "Gradient release, for a loop that does not know of it."
    def add_param_group(self, group):
        super().add_param_group(group)
        for p in self.param_groups[-1]['params']:
            p.register_post_accumulate_grad_hook(self.now)
    @torch.no_grad()
    def now(self, p): self.run(self.param_groups[0], [p], [p.grad])
    def step(self, closure=None): pass

@fault('SGD', 'explains mistakes')
class nan_accepted(StepOptimizer):
    def add_param_group(self, group):
        good, bad = {}, {}
        for k, v in group.items():
            if isinstance(v, float) and math.isnan(v): bad[k] = v
            else: good[k] = v
        super().add_param_group(good)
        self.param_groups[-1].update(bad)

@fault('SGD', 'takes empty groups')
class empty_group_dropped(StepOptimizer):
    def add_param_group(self, group):
        params = group['params']
        if isinstance(params, torch.Tensor) or list(params):
            super().add_param_group(group)

@fault('SGD', 'frees what was replaced')
class parameters_kept_in_a_list(StepOptimizer):
    def run(self, group, params, grads):
        self.seen = [*getattr(self, 'seen', []), *params]
        super().run(group, params, grads)

@fault('SGD', 'leaves flags alone', steps=lambda f: [flip, l2, f, sgd])
def buffer_on_the_parameter(p, g, state, *, momentum=0., dampening=0., nesterov=False):
    if not hasattr(p, 'buffer'): p.buffer = g
    else: p.buffer = momentum*p.buffer + (1 - dampening)*g
    return p.buffer

@fault('SGD', 'takes a tensor as lr')
class rate_of_the_first_step(StepOptimizer):
    def run(self, group, params, grads):
        self.rates = getattr(self, 'rates', {})
        rate = self.rates.setdefault(id(group['lr']), float(group['lr']))
        super().run({**group, 'lr': rate}, params, grads)

@fault('SGD', 'runs compiled')
class no_step_when_compiled(StepOptimizer):
    def step(self, closure=None):
        if not torch.compiler.is_compiling(): return super().step(closure)

@fault('SGD', 'follows a change of dtype')
class dtype_of_the_first_step(StepOptimizer):
    def run(self, group, params, grads):
        if not hasattr(self, 'dtypes'): self.dtypes = {p: p.dtype for p in params}
        super().run(group, params, grads)
        for p in params: p.data = p.data.to(self.dtypes.get(p, p.dtype))

@fault('SGD', 'keeps foreign entries')
class saves_the_state_of_parameters_only(StepOptimizer):
    def load_state_dict(self, sd):
        own = {k: s for k, s in sd['state'].items() if isinstance(k, int)}
        super().load_state_dict({**sd, 'state': own})
        for k in sd['state'].keys() - own.keys(): self.state[k] = None

@fault('SGD', 'prints its hyperparameters')
class silent(StepOptimizer):
    def __repr__(self): return 'SGD (momentum 0.9)'


def result(make, reference, row):
    "What the row returns, or the class and words of its error."
    promise, makes = ROWS[row], [make]
    if 'reference' in inspect.signature(promise).parameters: makes.append(reference)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try: return promise(*makes) or 'ok'
        except Exception as e: return f'{type(e).__name__}: {e}'


@pytest.mark.parametrize('name', FAULTS)
def test_fault_is_caught(name):
    kind, row, make = FAULTS[name]
    said = result(make, KINDS[kind].reference, row)
    assert said.startswith('AssertionError'), f'{row} does not notice'


@pytest.mark.parametrize('kind', KINDS)
def test_the_unmutated_passes(kind):
    results = contract(KINDS[kind].good, KINDS[kind].reference)
    assert set(results.values()) <= {'ok', 'no reference'}


@pytest.mark.parametrize('kind', KINDS)
def test_the_list_itself_is_no_fault(kind):
    "The same list of steps, put together as the faults are."
    make = KINDS[kind].of(StepOptimizer, KINDS[kind].steps)
    results = contract(make, KINDS[kind].reference)
    assert set(results.values()) <= {'ok', 'no reference'}


def test_every_row_catches_something():
    idle = set(ROWS) - {fault.row for fault in FAULTS.values()}
    # its fault is on its page: ours refuse before any step
    assert idle == {'treats complex as pairs or refuses'}
    assert len(FAULTS) >= 40


def noticed(fault):
    "All the rows that see it."
    for row in ROWS:
        said = result(fault.make, KINDS[fault.kind].reference, row)
        if said not in ('ok', 'no reference'): yield row


if __name__ == '__main__':
    for name, one in FAULTS.items(): print(f"{name:36s} {', '.join(noticed(one))}")
