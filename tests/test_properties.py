"""Random parameters, groups, gradients, schedules and interruptions: what torch does, ours does, and nothing is lost on the way.

A *story* is a run of an optimizer over random tensors, some without a gradient at some steps, with a rate that moves, and an interruption
at a random moment: a checkpoint, a copy, a new group."""
import copy
import io
import pickle
from collections import Counter
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from optimizers_explained import optim
from optimizers_explained.contract import exercised
from optimizers_explained.core import StepOptimizer, flip, l2, sgd
from optimizers_explained.judge import same

COUNT = Counter()
BUDGET = dict(equals_torch=300, interrupted=300, from_torch_and_back=200, misfits=200)

QUIET = dict(derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))

def examples(name): return settings(max_examples=BUDGET[name], **QUIET)

rates = st.sampled_from([0., 1e-3, 0.01, 0.05, 0.3])
decays = st.sampled_from([0., 0.01, 0.5])
shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
dtypes = st.sampled_from([torch.float64, torch.float64, torch.float32])
seeds = st.integers(0, 2**32 - 1)

common = dict(lr=rates, weight_decay=decays, maximize=st.booleans())
sgds = st.fixed_dictionaries(dict(momentum=st.sampled_from([0., 0.5, 0.9]), dampening=st.sampled_from([0., 0.4]), **common))
adams = st.fixed_dictionaries(dict(betas=st.sampled_from([(0.9, 0.999), (0.5, 0.9), (0., 0.95)]), eps=st.sampled_from([1e-8, 1e-3]),
                                   amsgrad=st.booleans(), **common))
def nesterov(kw): return {**kw, 'nesterov': True, 'dampening': 0.} if kw['momentum'] else kw

HYPERS = {'SGD': sgds | sgds.map(nesterov), 'Adam': adams, 'AdamW': adams}


@st.composite
def stories(draw, names=('SGD', 'Adam', 'AdamW')):
    name = draw(st.sampled_from(names))
    groups = draw(st.lists(st.lists(st.tuples(shapes, dtypes), min_size=1, max_size=3), min_size=1, max_size=3))
    n, total = draw(st.integers(2, 10)), sum(map(len, groups))
    return dict(name=name, hypers=draw(HYPERS[name]) if name in HYPERS else {}, groups=groups,
                seed=draw(seeds), steps=n, moment=draw(st.integers(0, n)),
                own=[draw(st.fixed_dictionaries({}, optional=dict(lr=rates, weight_decay=decays))) for _ in groups],
                missing=draw(st.sets(st.tuples(st.integers(0, n - 1), st.integers(0, total - 1)), max_size=8)),
                factors=draw(st.lists(st.sampled_from([0., 0.1, 1., 1.]), min_size=n, max_size=n)),
                scale=draw(st.sampled_from([1e-3, 1., 100.])), late=draw(st.booleans()), foreach=draw(st.booleans()))


class Run:
    "One optimizer in a story."
    def __init__(self, make, story, params=None):
        self.make, self.story = make, story
        gen = torch.Generator().manual_seed(story['seed'])
        def leaf(s, d): return torch.randn(s, generator=gen, dtype=torch.float64).to(d).requires_grad_()
        fresh = [[leaf(s, d) for s, d in g] for g in story['groups']]
        self.groups = fresh if params is None else params
        self.opt = make(self.as_groups()[:self.at_first()])
        self.lrs = [g['lr'] for g in self.opt.param_groups]

    @property
    def ps(self): return [p for g in self.groups for p in g]
    def as_groups(self): return [{'params': g, **own} for g, own in zip(self.groups, self.story['own'])]
    def at_first(self): return len(self.groups) - (self.story['late'] and len(self.groups) > 1)
    def add(self):
        for g in self.as_groups()[len(self.opt.param_groups):]:
            self.opt.add_param_group(g)
            self.lrs.append(self.opt.param_groups[-1]['lr'])

    def go(self, ts):
        s = self.story
        for t in ts:
            if t == s['steps']//2: self.add()
            for g, lr in zip(self.opt.param_groups, self.lrs): g['lr'] = lr*s['factors'][t]
            for i, p in enumerate(self.ps):
                gen = torch.Generator().manual_seed(s['seed']//2 + 1000*i + t)
                g = (torch.randn(p.shape, generator=gen, dtype=torch.float64)*s['scale']).to(p.dtype)
                p.grad = None if (t, i) in s['missing'] else g
            before = [(p.grad, None if p.grad is None else p.grad.clone()) for p in self.ps]
            self.opt.step()
            for p, (g, bits) in zip(self.ps, before): assert p.grad is g and (g is None or torch.equal(g, bits)), 'p.grad has changed'
        return self

    def elsewhere(self, sd, make=None, other_lr=None):
        "The same run with copied parameters and a new optimizer that loads `sd`."
        twin = Run(make or self.make, self.story, [[p.detach().clone().requires_grad_() for p in g] for g in self.groups])
        if len(self.opt.param_groups) > len(twin.opt.param_groups): twin.add()
        for g in twin.opt.param_groups: g['lr'] = 0.77 if other_lr is None else other_lr
        twin.opt.load_state_dict(sd)
        return twin


def close(a, b, tol64=1e-12, tol32=1e-5):
    for p, q in zip(a, b):
        tol = (tol64 if p.dtype is torch.float64 else tol32)*max(1., q.detach().abs().max().item() if q.numel() else 0.)
        torch.testing.assert_close(p, q, rtol=0, atol=tol)


def ours_of(story): return partial(getattr(optim, story['name']), **story['hypers'], foreach=story['foreach'])
def torchs_of(story): return partial(getattr(torch.optim, story['name']), **story['hypers'], foreach=False)  # foreach rewrites gradients


def equals_torch(story, ours=None):
    a = Run(ours or ours_of(story), story).go(range(story['steps']))
    b = Run(torchs_of(story), story).go(range(story['steps']))
    close(a.ps, b.ps)


@examples('equals_torch')
@given(stories())
def test_equals_torch(story):
    COUNT['equals_torch'] += 1
    equals_torch(story)


EVERY = {name: dict(exercised(getattr(optim, name)).keywords) for name in optim.__all__}

def via_file(sd):
    file = io.BytesIO()
    torch.save(sd, file); file.seek(0)
    return torch.load(file, weights_only=True)

def via_copy(run): return copy.deepcopy(run)
def via_pickle(run):
    opt, groups = pickle.loads(pickle.dumps((run.opt, run.groups)))
    twin = copy.copy(run)
    twin.opt, twin.groups, twin.lrs = opt, groups, list(run.lrs)
    return twin
def via_checkpoint(run): return run.elsewhere(via_file(run.opt.state_dict()))
def via_live_state(run): return run.elsewhere(run.opt.state_dict())


def interrupted(story, way, make=None):
    make = make or partial(getattr(optim, story['name']), **EVERY[story['name']], foreach=story['foreach'])
    run = Run(make, story).go(range(story['moment']))
    twin = way(run)
    assert same(twin.opt.state_dict(), run.opt.state_dict()), 'something was lost on the way'
    run.go(range(story['moment'], story['steps']))                            # first one, then the other: they must not share anything
    twin.go(range(story['moment'], story['steps']))
    assert same(run.ps, twin.ps) and same(run.opt.state_dict(), twin.opt.state_dict()), 'the two runs part'


@examples('interrupted')
@given(stories(tuple(optim.__all__)), st.sampled_from([via_copy, via_pickle, via_checkpoint, via_live_state]))
def test_interrupted(story, way):
    COUNT['interrupted'] += 1
    if story['name'].startswith('Decoupled'):                                 # lr0=0 is refused
        story['own'] = [{**o, 'lr': o['lr'] or 0.05} if 'lr' in o else o for o in story['own']]
    interrupted(story, way)


def from_torch_and_back(story, ours=None):
    "torch until the moment, then ours; and the other way round; against torch alone."
    ours, theirs = ours or ours_of(story), torchs_of(story)
    want = Run(theirs, story).go(range(story['steps']))
    for first, second in (theirs, ours), (ours, theirs):
        run = Run(first, story).go(range(story['moment']))
        close(run.elsewhere(copy.deepcopy(via_file(run.opt.state_dict())), second).go(range(story['moment'], story['steps'])).ps, want.ps)


@examples('from_torch_and_back')
@given(stories())
def test_from_torch_and_back(story):
    COUNT['from_torch_and_back'] += 1
    from_torch_and_back(story)


MISFITS = ['a group less', 'a group more', 'a parameter more', 'another shape', 'another optimizer', 'other steps']

def spoiled(run, how):
    "A checkpoint that does not fit, made from one that does."
    sd, story = copy.deepcopy(run.opt.state_dict()), run.story
    def of(make, story=story): return Run(make, story).go(range(story['moment'])).opt.state_dict()
    if how == 'a group less': sd['param_groups'] = sd['param_groups'][1:]
    elif how == 'a group more': sd['param_groups'] = sd['param_groups'] + [{**sd['param_groups'][-1], 'params': [99]}]
    elif how == 'a parameter more': sd['param_groups'][0]['params'] = sd['param_groups'][0]['params'] + [99]
    elif how == 'another shape': return of(run.make, {**story, 'groups': [[((*s, 5), d) for s, d in g] for g in story['groups']]})
    elif how == 'another optimizer': return of(torch.optim.Adadelta)
    elif how == 'other steps': return of(partial(StepOptimizer, steps=[flip, l2, sgd], lr=0.1))
    return sd


@examples('misfits')
@given(stories(), st.sampled_from(MISFITS))
def test_misfits(story, how):
    COUNT['misfits'] += 1
    story['late'] = False
    run = Run(ours_of(story), story).go(range(story['moment']))
    params, before = copy.deepcopy([p.detach() for p in run.ps]), copy.deepcopy(run.opt.state_dict())
    with pytest.raises(ValueError, match='checkpoint'): run.opt.load_state_dict(spoiled(run, how))
    assert same(run.opt.state_dict(), before) and same([p.detach() for p in run.ps], params)


def test_every_example_was_run():
    if not COUNT: pytest.skip('run with the tests above, whose examples it counts')
    assert {k: COUNT[k] >= n for k, n in BUDGET.items() if COUNT[k]} == {k: True for k in BUDGET if COUNT[k]}
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
    assert found(lambda s: equals_torch(s, as_class(OneCount, ours_of(s))), stories(('Adam', 'AdamW')))
    assert found(lambda s: equals_torch(s, partial(optim.SGD, **{**s['hypers'], 'dampening': 0., 'nesterov': False})), stories(('SGD',)))
    assert found(lambda s: interrupted(s, via_checkpoint, as_class(Forgets, exercised(optim.SGD))), stories(('SGD',)))
    assert found(lambda s: from_torch_and_back(s, as_class(Forgets, ours_of(s))), stories(('SGD', 'Adam')))
    assert not found(equals_torch, stories())
