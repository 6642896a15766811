"""Random parameters, groups, gradients, schedules and interruptions: what torch does,
ours does, and nothing is lost on the way.

A *story* is a run of an optimizer over random tensors, some without a gradient at some
steps, with a rate that moves, and an interruption at a random moment: a checkpoint,
a copy, a new group."""
import copy
import io
import pickle
from collections import Counter
from functools import partial
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from optimizers_explained import optim
from optimizers_explained.contract import exercised
from optimizers_explained.core import StepOptimizer
from optimizers_explained.steps import flip, l2, sgd
from optimizers_explained.contract.workbench import same, twins

COUNT = Counter()
BUDGET = dict(equals_torch=300, interrupted=300, from_torch_and_back=200, misfits=200)

QUIET = dict(derandomize=True, deadline=None, database=None,
             suppress_health_check=list(HealthCheck))

def examples(name): return settings(max_examples=BUDGET[name], **QUIET)

rates = st.sampled_from([0., 1e-3, 0.01, 0.05, 0.3])
decays = st.sampled_from([0., 0.01, 0.5])
shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
dtypes = st.sampled_from([torch.float64, torch.float64, torch.float32])
seeds = st.integers(0, 2**32 - 1)

common = dict(lr=rates, weight_decay=decays, maximize=st.booleans())
sgds = st.fixed_dictionaries(dict(
    momentum=st.sampled_from([0., 0.5, 0.9]),
    dampening=st.sampled_from([0., 0.4]),
    **common))
adams = st.fixed_dictionaries(dict(
    betas=st.sampled_from([(0.9, 0.999), (0.5, 0.9), (0., 0.95)]),
    eps=st.sampled_from([1e-8, 1e-3]),
    amsgrad=st.booleans(),
    **common))

def nesterov(kw):
    return {**kw, 'nesterov': True, 'dampening': 0.} if kw['momentum'] else kw

# of optimizers that torch has as well
HYPERS = {'SGD': sgds | sgds.map(nesterov), 'Adam': adams, 'AdamW': adams}


class Story(NamedTuple):
    name: str            # of the optimizer
    hypers: dict
    groups: list         # of lists of (shape, dtype)
    seed: int
    steps: int
    moment: int          # the step before which it is interrupted
    own: list            # hyperparameters of each group
    missing: set         # (step, parameter): no gradient
    factors: list        # on the rates, for each step
    scale: float         # of the gradients
    late: bool           # the last group is added half way
    foreach: bool


@st.composite
def stories(draw, names=tuple(HYPERS)):
    name = draw(st.sampled_from(names))
    group = st.lists(st.tuples(shapes, dtypes), min_size=1, max_size=3)
    groups = draw(st.lists(group, min_size=1, max_size=3))
    n, total = draw(st.integers(2, 10)), sum(map(len, groups))
    hypers = draw(HYPERS[name]) if name in HYPERS else {}
    seed, moment = draw(seeds), draw(st.integers(0, n))
    own = st.fixed_dictionaries({}, optional=dict(lr=rates, weight_decay=decays))
    places = st.tuples(st.integers(0, n - 1), st.integers(0, total - 1))
    factors = st.sampled_from([0., 0.1, 1., 1.])
    return Story(
        name, hypers, groups, seed, n, moment,
        own=[draw(own) for _ in groups],
        missing=draw(st.sets(places, max_size=8)),
        factors=draw(st.lists(factors, min_size=n, max_size=n)),
        scale=draw(st.sampled_from([1e-3, 1., 100.])),
        late=draw(st.booleans()),
        foreach=draw(st.booleans()))


def normal(gen, shape): return torch.randn(shape, generator=gen, dtype=torch.float64)


class Run:
    "One optimizer in a story."
    def __init__(self, make, story, groups=None):
        self.make, self.story = make, story
        self.groups = self.fresh() if groups is None else groups
        self.opt = make(self.as_groups()[:self.at_first()])
        self.lrs = [g['lr'] for g in self.opt.param_groups]

    def fresh(self):
        gen, groups = torch.Generator().manual_seed(self.story.seed), []
        for group in self.story.groups:
            ps = [normal(gen, shape).to(dtype) for shape, dtype in group]
            groups.append([p.requires_grad_() for p in ps])
        return groups

    @property
    def ps(self): return [p for g in self.groups for p in g]
    def as_groups(self):
        return [{'params': g, **own} for g, own in zip(self.groups, self.story.own)]
    def at_first(self):
        waits = self.story.late and len(self.groups) > 1
        return len(self.groups) - 1 if waits else len(self.groups)
    def add(self):
        for g in self.as_groups()[len(self.opt.param_groups):]:
            self.opt.add_param_group(g)
            self.lrs.append(self.opt.param_groups[-1]['lr'])

    def feed(self, t):
        for i, p in enumerate(self.ps):
            gen = torch.Generator().manual_seed(self.story.seed//2 + 1000*i + t)
            g = (normal(gen, p.shape)*self.story.scale).to(p.dtype)
            p.grad = None if (t, i) in self.story.missing else g

    def go(self, ts):
        for t in ts:
            if t == self.story.steps//2: self.add()
            for g, lr in zip(self.opt.param_groups, self.lrs):
                g['lr'] = lr*self.story.factors[t]
            self.feed(t)
            grads = [p.grad for p in self.ps]
            before = copy.deepcopy(grads)
            self.opt.step()
            assert all(p.grad is g for p, g in zip(self.ps, grads)), 'another p.grad'
            assert same(grads, before), 'p.grad has changed'
        return self

    def until(self): return self.go(range(self.story.moment))
    def onward(self): return self.go(range(self.story.moment, self.story.steps))
    def whole(self): return self.go(range(self.story.steps))

    def elsewhere(self, sd, make=None):
        "The same run with copied parameters and a new optimizer that loads `sd`."
        twin = Run(make or self.make, self.story, [twins(g) for g in self.groups])
        if len(self.opt.param_groups) > len(twin.opt.param_groups): twin.add()
        for g in twin.opt.param_groups: g['lr'] = 0.77
        twin.opt.load_state_dict(sd)
        return twin


def close(a, b, tol64=1e-12, tol32=1e-5):
    for p, q in zip(a, b):
        tol = tol64 if p.dtype is torch.float64 else tol32
        if q.numel(): tol *= max(1., q.detach().abs().max().item())
        torch.testing.assert_close(p, q, rtol=0, atol=tol)


def ours_of(story):
    return partial(getattr(optim, story.name), **story.hypers, foreach=story.foreach)
def torchs_of(story): # not foreach, which rewrites gradients
    return partial(getattr(torch.optim, story.name), **story.hypers, foreach=False)


def equals_torch(story, ours=None):
    a, b = Run(ours or ours_of(story), story), Run(torchs_of(story), story)
    close(a.whole().ps, b.whole().ps)


@examples('equals_torch')
@given(stories())
def test_equals_torch(story):
    COUNT['equals_torch'] += 1
    equals_torch(story)


EVERY = {name: exercised(getattr(optim, name)) for name in optim.__all__}

def via_file(sd):
    file = io.BytesIO()
    torch.save(sd, file)
    file.seek(0)
    return torch.load(file, weights_only=True)

def via_copy(run): return copy.deepcopy(run)
def via_pickle(run):
    opt, groups = pickle.loads(pickle.dumps((run.opt, run.groups)))
    twin = copy.copy(run)
    twin.opt, twin.groups, twin.lrs = opt, groups, list(run.lrs)
    return twin
def via_checkpoint(run): return run.elsewhere(via_file(run.opt.state_dict()))
def via_live_state(run): return run.elsewhere(run.opt.state_dict())
WAYS = [via_copy, via_pickle, via_checkpoint, via_live_state]


def interrupted(story, way, make=None):
    make = make or partial(EVERY[story.name], foreach=story.foreach)
    run = Run(make, story).until()
    twin = way(run)
    assert same(twin.opt.state_dict(), run.opt.state_dict()), 'lost on the way'
    run.onward()              # first one, then the other: they must not share anything
    twin.onward()
    assert same(run.ps, twin.ps), 'the two runs part'
    assert same(run.opt.state_dict(), twin.opt.state_dict()), 'the two runs part'


@examples('interrupted')
@given(stories(tuple(optim.__all__)), st.sampled_from(WAYS))
def test_interrupted(story, way):
    COUNT['interrupted'] += 1
    for own in story.own:                                           # lr0=0 is refused
        if story.name.startswith('Decoupled') and own.get('lr') == 0: own['lr'] = 0.05
    interrupted(story, way)


def from_torch_and_back(story, ours=None):
    "torch until the moment, then ours; and the other way round; against torch alone."
    ours, theirs = ours or ours_of(story), torchs_of(story)
    want = Run(theirs, story).whole()
    for first, second in (theirs, ours), (ours, theirs):
        run = Run(first, story).until()
        sd = via_file(run.opt.state_dict())
        close(run.elsewhere(sd, second).onward().ps, want.ps)


@examples('from_torch_and_back')
@given(stories())
def test_from_torch_and_back(story):
    COUNT['from_torch_and_back'] += 1
    from_torch_and_back(story)


MISFITS = ['a group less', 'a group more', 'a parameter more', 'another shape',
           'another optimizer', 'other steps']

def spoiled(run, how):
    "A checkpoint that does not fit, made from one that does."
    sd, story = copy.deepcopy(run.opt.state_dict()), run.story
    def of(make, story=story): return Run(make, story).until().opt.state_dict()
    groups = sd['param_groups']
    if how == 'a group less': del groups[0]
    elif how == 'a group more': groups.append({**groups[-1], 'params': [99]})
    elif how == 'a parameter more': groups[0]['params'].append(99)
    elif how == 'another shape':
        larger = [[((*shape, 5), dtype) for shape, dtype in g] for g in story.groups]
        return of(run.make, story._replace(groups=larger))
    elif how == 'another optimizer': return of(torch.optim.Adadelta)
    elif how == 'other steps':
        return of(partial(StepOptimizer, steps=[flip, l2, sgd], lr=0.1))
    return sd


@examples('misfits')
@given(stories(), st.sampled_from(MISFITS))
def test_misfits(story, how):
    COUNT['misfits'] += 1
    run = Run(ours_of(story), story._replace(late=False)).until()
    def now(): return twins(run.ps), copy.deepcopy(run.opt.state_dict())
    before = now()
    sd = spoiled(run, how)
    with pytest.raises(ValueError, match='checkpoint'): run.opt.load_state_dict(sd)
    assert same(now(), before)


def test_every_example_was_run():
    if not COUNT: pytest.skip('run with the tests above, whose examples it counts')
    for name, count in COUNT.items(): assert count >= BUDGET[name], name
    assert sum(BUDGET.values()) >= 500


# --- negative controls: the properties find what is wrong
def found(prop, strategy):
    "Whether some example of the first hundred breaks `prop`."
    @settings(max_examples=100, phases=[Phase.generate], **QUIET)
    @given(strategy)
    def check(story): prop(story)
    try: check()
    except AssertionError: return True
    return False


class OneCount(StepOptimizer):
    "Counts the steps of all parameters together."
    def run(self, group, params, grads):
        super().run(group, params, grads)
        most = max((s.get('step', 0) for s in self.state.values()), default=0)
        for p in params: self.state[p]['step'] = most

class Forgets(StepOptimizer):
    def load_state_dict(self, sd): super().load_state_dict({**sd, 'state': {}})

def as_class(cls, make): # the same optimizer, of a broken class
    def broken(ps):
        opt = make(ps)
        opt.__class__ = cls
        return opt
    return broken


def test_the_properties_notice():
    def one_count(s): equals_torch(s, as_class(OneCount, ours_of(s)))
    def plain(s):
        hypers = {**s.hypers, 'dampening': 0., 'nesterov': False}
        equals_torch(s, partial(optim.SGD, **hypers))
    def lost(s): interrupted(s, via_checkpoint, as_class(Forgets, exercised(optim.SGD)))
    def lost_by_ours(s): from_torch_and_back(s, as_class(Forgets, ours_of(s)))
    assert found(one_count, stories(('Adam', 'AdamW')))
    assert found(plain, stories(('SGD',)))
    assert found(lost, stories(('SGD',)))
    assert found(lost_by_ours, stories(('SGD', 'Adam')))
    assert not found(equals_torch, stories())
