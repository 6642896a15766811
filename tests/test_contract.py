"""The contract on every optimizer that `optim` exports: each row of it, each optimizer
in several settings, against torch, timm, fastai, optimi and what Composer recorded."""
import inspect
import warnings
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from optimizers_explained import contract, optim
from optimizers_explained.contract import table, tensors, training, workbench
from optimizers_explained.steps import adam
from optimizers_explained.contract import ROWS, exercised
from optimizers_explained.core import StepOptimizer
from optimizers_explained.steps import decay, sgd
from optimizers_explained.contract.workbench import (
    leaves, refused, train, trained, twins)
from optimizers_explained.problems import max_diff
from optimizers_explained.steps import lars, trust
from recorded import RUNS, replay

pytestmark = [
    pytest.mark.filterwarnings('ignore:You are using weight_decay'),      # optimi's
    pytest.mark.filterwarnings('ignore:lr=.* is above lr0'),    # some schedules climb
    # some rows ask for what has no kernel; which, is tested in test_fused
    pytest.mark.filterwarnings('ignore:fused=True, and still')]
SKIP = 'is not installed: its optimizers are no reference'
timm = pytest.importorskip('timm.optim', reason=f'timm {SKIP}')
LR = 0.05


class Fastai:
    "A fastai optimizer whose rate is read from `param_groups`, as torch's is."
    def __init__(self, name, ps, lr, **kw):
        fastai = pytest.importorskip('fastai.optimizer', reason=f'fastai {SKIP}')
        self.opt = getattr(fastai, name)(ps, lr=lr, **kw)
        self.param_groups = [dict(params=ps, lr=lr)]

    def step(self):
        self.opt.set_hyper('lr', self.param_groups[0]['lr'])
        self.opt.step()


def fastai(name, **kw): return partial(Fastai, name, **{**dict(lr=LR), **kw})


def optimi(name, **kw):
    def make(ps, **more):
        library = pytest.importorskip('optimi', reason=f'optimi {SKIP}')
        return getattr(library, name)(ps, **{**dict(lr=LR), **kw, **more})
    return make


def apart(make): return partial(workbench.Apart, make)   # counts steps of a whole group
def of(cls, **kw): return partial(cls, **{**dict(lr=LR), **kw})


class Case(NamedTuple):
    factory: str                # an optimizer of `optim`
    hypers: dict
    references: dict = {}       # the independent implementations it must equal

    def make(self, **more):
        return of(getattr(optim, self.factory), **self.hypers, **more)


T, WD, BOTH = torch.optim, dict(weight_decay=0.1), dict(betas=(0.8, 0.95), eps=1e-3)
M, MW = dict(momentum=0.9), dict(momentum=0.9, weight_decay=0.1)
MAX, NESTEROV = dict(maximize=True), dict(nesterov=True)
AMSGRAD, DAMPED = dict(amsgrad=True), dict(dampening=0.9)
FAST = dict(mom=0.8, sqr_mom=0.95, eps=1e-3, wd=0.1)
FAST_SHORT = dict(mom=0.5, sqr_mom=0.95, eps=1e-3, wd=0.)
REL = dict(weight_decay=0.1/LR)                    # lambda*lr/lr0 is lr*(lambda/lr0)
LION = dict(betas=(0.8, 0.95), **WD)
TRUST, LAYERS = dict(trust_coeff=0.5), dict(always_adapt=True)
UNCLIPPED = dict(always_adapt=True, max_grad_norm=None)
# under which LAMB's ratio stays below 10, where fastai's ends
SHORT = dict(betas=(0.5, 0.95), eps=1e-3)
FREE = dict(weight_decay=0.1, decouple_lr=True, max_lr=LR)
CASES = {
    'SGD, plain': Case('SGD', {}, dict(
        torch=of(T.SGD),
        fastai=fastai('SGD', mom=0.),
        optimi=optimi('SGD'))),
    'SGD': Case('SGD', MW, dict(
        torch=of(T.SGD, **MW),
        optimi=optimi('SGD', **MW),
        fastai=fastai('SGD', mom=0.9, wd=0.1, decouple_wd=False))),
    'SGD, dampening': Case('SGD', MW | DAMPED, dict(
        torch=of(T.SGD, **MW, **DAMPED),
        optimi=optimi('SGD', dampening=True, torch_init=True, **MW))),
    'SGD, Nesterov': Case('SGD', MW | NESTEROV, dict(
        torch=of(T.SGD, **MW, **NESTEROV))),
    'SGD, Nesterov without decay': Case('SGD', M | NESTEROV, dict(
        torch=of(T.SGD, foreach=False, **M, **NESTEROV))),
    'SGD, maximize': Case('SGD', MW | MAX, dict(
        torch=of(T.SGD, **MW, **MAX))),
    'SGDW': Case('SGDW', MW, dict(
        timm=of(timm.SGDW, **MW),
        fastai=fastai('SGD', mom=0.9, wd=0.1),
        optimi=optimi('SGD', decouple_wd=True, **MW))),
    'SGDW, Nesterov': Case('SGDW', MW | NESTEROV, dict(
        timm=of(timm.SGDW, **MW, **NESTEROV))),
    'SGDW, dampening, maximize': Case('SGDW', MW | MAX | dict(dampening=0.3), dict(
        timm=of(timm.SGDW, dampening=0.3, **MW, **MAX))),
    'DecoupledSGDW': Case('DecoupledSGDW', MW, dict(
        timm=of(timm.SGDW, **M, **REL),
        optimi=optimi('SGD', **M, **FREE))),
    'DecoupledSGDW, Nesterov': Case('DecoupledSGDW', MW | NESTEROV, dict(
        timm=of(timm.SGDW, **M, **REL, **NESTEROV))),
    'Lion': Case('Lion', LION, dict(
        timm=of(timm.Lion, **LION),
        optimi=optimi('Lion', **LION))),
    'Lion, maximize': Case('Lion', WD | MAX, dict(
        timm=of(timm.Lion, **WD, **MAX))),
    'Adam': Case('Adam', BOTH | WD, dict(
        torch=of(T.Adam, **BOTH, **WD),
        fastai=fastai('Adam', decouple_wd=False, **FAST))),
    'Adam, amsgrad': Case('Adam', BOTH | AMSGRAD, dict(
        torch=of(T.Adam, **BOTH, **AMSGRAD))),
    'Adam, maximize': Case('Adam', BOTH | WD | MAX, dict(
        torch=of(T.Adam, **BOTH, **WD, **MAX))),
    'AdamW': Case('AdamW', BOTH | WD, dict(
        torch=of(T.AdamW, **BOTH, **WD),
        fastai=fastai('Adam', **FAST),
        timm=of(timm.AdamWLegacy, **BOTH, **WD))),
    'AdamW, amsgrad, maximize': Case('AdamW', BOTH | WD | AMSGRAD | MAX, dict(
        torch=of(T.AdamW, **BOTH, **WD, **AMSGRAD, **MAX))),
    'DecoupledAdamW': Case('DecoupledAdamW', BOTH | WD, dict(
        torch=of(T.AdamW, **BOTH, **REL))),
    'DecoupledAdamW, amsgrad': Case('DecoupledAdamW', BOTH | WD | AMSGRAD, dict(
        torch=of(T.AdamW, **BOTH, **REL, **AMSGRAD))),
    'LARS, plain': Case('LARS', TRUST, dict(
        timm=of(timm.Lars, **TRUST, **LAYERS),
        fastai=fastai('Larc', mom=0., clip=False, **TRUST))),
    'LARS': Case('LARS', MW | TRUST | dict(eps=1e-3), dict(
        timm=of(timm.Lars, eps=1e-3, **MW, **TRUST, **LAYERS))),
    'LARS, the default trust_coeff': Case('LARS', MW | dict(lr=5., dampening=0.3), dict(
        timm=of(timm.Lars, lr=5., dampening=0.3, **MW, **LAYERS))),
    'LARS, Nesterov': Case('LARS', MW | TRUST | NESTEROV, dict(
        timm=of(timm.Lars, **MW, **TRUST, **NESTEROV, **LAYERS))),
    'LAMB': Case('LAMB', BOTH | WD, dict(
        timm=apart(of(timm.Lamb, **BOTH, **WD, **UNCLIPPED)))),
    'LAMB, the defaults': Case('LAMB', {}, dict(
        timm=apart(of(timm.Lamb, **UNCLIPPED)))),
    'LAMB, no decay': Case('LAMB', SHORT | dict(weight_decay=0.), dict(
        timm=apart(of(timm.Lamb, weight_decay=0., **SHORT, **UNCLIPPED)),
        fastai=fastai('Lamb', **FAST_SHORT))),
}
NO_REFERENCE = {}               # name of an exported optimizer: why nobody else has it
# a newly exported optimizer runs every row that needs no reference by itself
EXERCISED = {name: exercised(getattr(optim, name)) for name in optim.__all__}
CASED = {case.factory for case in CASES.values()}
for name in optim.__all__:
    if name not in CASED: CASES[name] = Case(name, EXERCISED[name].keywords)
ALONE = [r for r in ROWS if 'reference' not in inspect.signature(ROWS[r]).parameters]
TORCHS = [name for name in optim.__all__ if hasattr(T, name)]      # torch has them too

# one definition, run in several ways: every row for each
SPEEDS = dict(loop=dict(foreach=False), foreach=dict(foreach=True),
              fused=dict(fused=True))
PAIRS = [(name, library) for name, case in CASES.items() for library in case.references]


def make_of(name, speed='loop'): return CASES[name].make(**SPEEDS[speed])


@pytest.mark.parametrize('speed', SPEEDS)
@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('row', ALONE)
def test_row(row, case, speed): ROWS[row](make_of(case, speed))


@pytest.mark.parametrize('speed', SPEEDS)
@pytest.mark.parametrize('case,library', PAIRS)
def test_numbers(case, library, speed):
    reference = CASES[case].references[library]
    workbench.has_the_reference_numbers(make_of(case, speed), reference)


OPTIMIS = dict(Adam=optimi('Adam', **BOTH, **WD), AdamW=optimi('AdamW', **BOTH, **WD),
               DecoupledAdamW=optimi('AdamW', **BOTH, **FREE))

@pytest.mark.parametrize('name,reference', OPTIMIS.items())
def test_numbers_of_optimi(name, reference):
    """optimi's Adam counts the steps of a whole group,
    so it is a reference only where no gradient is missing."""
    def run(make):
        ps, path = leaves(), []
        opt = make(ps)
        for t in range(50):
            opt.param_groups[0]['lr'] = LR*workbench.warm_up_cosine(t)
            path += train(opt, ps, [t])
        return path
    make = of(getattr(optim, name), **BOTH, **WD)
    assert max_diff(run(make), run(reference)) < 1e-12
    with pytest.raises(AssertionError):
        workbench.has_the_reference_numbers(make, reference)


def test_lamb_of_fastai():
    """Its decay stands before Adam, outside of the ratio: the same steps
    in another order. And it caps the ratio at 10."""
    equal, fast = workbench.has_the_reference_numbers, partial(fastai, 'Lamb', **FAST)
    def make(ps, **kw):
        hypers = {**dict(lr=LR), **SHORT, **WD, **kw}
        return StepOptimizer(ps, [decay, adam, trust, sgd], **hypers)
    equal(make, fast(mom=0.5))
    with pytest.raises(AssertionError):
        equal(of(optim.LAMB, **SHORT, **WD), fast(mom=0.5))
    with pytest.raises(AssertionError):
        equal(partial(make, betas=(0.8, 0.95)), fast())
    def capped(p, g, state): return g*(p.norm()/g.norm()).clamp(max=10)
    def with_cap(ps, **kw):
        hypers = {**dict(lr=LR), **BOTH, **WD, **kw}
        return StepOptimizer(ps, [decay, adam, capped, sgd], **hypers)
    equal(with_cap, fast())


def of_zeros(make, dtype=torch.float64):
    "Steps with weights of 0, gradients of 0, both, and neither."
    a, b = leaves(dtype=dtype)
    zeros = torch.zeros(3, dtype=dtype)
    ps = twins([zeros, a, zeros, b])
    opt = make(ps)
    for t in range(5):
        workbench.feed(ps, t)
        for p in ps[1:3]: p.grad.zero_()
        opt.step()
    return ps

@pytest.mark.parametrize('speed', SPEEDS)
@pytest.mark.parametrize('case', ['LARS', 'LARS, plain', 'LAMB', 'LAMB, no decay'])
def test_layers_of_zeros(case, speed):
    """The factor is 1 where weights or update are 0, as in timm; a list of tensors
    has the bits of the loop, a kernel its numbers."""
    make, loop, f32 = make_of(case, speed), make_of(case), torch.float32
    wanted = of_zeros(CASES[case].references['timm'])
    assert max_diff(of_zeros(make), wanted) < 1e-12
    tol = 1e-6 if speed == 'fused' else 0.
    assert max_diff(of_zeros(make, f32), of_zeros(loop, f32)) <= tol
    def bare(p, g, state): return g*(p.norm()/g.norm())
    without = partial(StepOptimizer, steps=[adam, bare, sgd], lr=LR)
    assert not max_diff(of_zeros(without), wanted) < 1e-6       # NaN


def test_the_ratios_can_be_recorded():
    """No step of theirs asks a tensor for its value, its shape or its length:
    a recorder of operations runs it."""
    for step in lars, trust:
        recorded = torch.fx.symbolic_trace(lambda p, g: step(p, g, {}))
        p, g = leaves((3,), (3,))
        assert torch.equal(recorded(p, 2*g), step(p, 2*g, {}))
    def branches(p, g): return g if p.norm() > 0 else p
    with pytest.raises(torch.fx.proxy.TraceError): torch.fx.symbolic_trace(branches)


@pytest.mark.parametrize('case,library', PAIRS)
def test_numbers_notice_a_fault(case, library):
    more = CASES[case].hypers.get('weight_decay', 0.) + 1e-5
    for wrong in dict(lr=LR*1.000001), dict(weight_decay=more):
        make = partial(make_of(case), **wrong)
        with pytest.raises(AssertionError, match='50 steps'):
            workbench.has_the_reference_numbers(make, CASES[case].references[library])


@pytest.mark.parametrize('case', [c for c in CASES if 'torch' in CASES[c].references])
def test_torch_checkpoints(case):
    # translated: their weight_decay is another number
    want = 'no reference' if case.startswith('Decoupled') else None
    reference = CASES[case].references['torch']
    assert contract.exchanges_checkpoints_with_torch(make_of(case), reference) == want


def test_every_export_has_a_reference():
    compared = {case.factory for case in CASES.values() if case.references}
    lacking = set(optim.__all__) - set(NO_REFERENCE) - compared
    assert not lacking, (f'{lacking}: add a case with an independent implementation, '
                         'or the reason to NO_REFERENCE')


def promises(module):
    "The public functions of a module that take a `make` first."
    for name, f in vars(module).items():
        if not inspect.isfunction(f) or f.__module__ != module.__name__: continue
        if name.startswith('_'): continue
        if list(inspect.signature(f).parameters)[:1] == ['make']: yield f


def test_every_row_is_in_the_table():
    found = set()
    for module in workbench, tensors, training, table: found |= {*promises(module)}
    assert found - set(ROWS.values()) == {workbench.trained, table.contract}
    for module in workbench, tensors, training:
        assert set(module.ROWS.values()) == {*promises(module)} - {workbench.trained}
        assert module.ROWS.items() <= ROWS.items()
    assert len(ROWS) == len(found) - 2 and len(ROWS) >= 28


def test_a_row_of_ones_own():
    def is_an_optimizer(make): assert isinstance(make(leaves()), torch.optim.Optimizer)
    own = workbench.rows(is_an_optimizer)
    assert contract.contract(of(T.SGD), promises=own) == {'is an optimizer': 'ok'}
    table = contract.contract_table({'none': list}, promises=own)
    assert ('none', 'is an optimizer') in table.failures()
    assert 'is an optimizer' not in ROWS


def test_every_scheduler_has_a_recipe():
    classes = set()
    for name, c in vars(lr_scheduler).items():
        if not inspect.isclass(c) or name.startswith('_'): continue
        if issubclass(c, lr_scheduler.LRScheduler): classes.add(name)
    assert classes - {'LRScheduler'} == set(workbench.SCHEDULERS)


def averages(p, g, state, *, factors=(0.5, 0.8, 0.9)):
    "A step with three averages: any tuple of numbers is a hyperparameter."
    total = 0
    for i, factor in enumerate(factors):
        old = state.get(f'average_{i}', torch.zeros_like(g))
        state[f'average_{i}'] = old*factor + g*(1 - factor)
        total = total + state[f'average_{i}']
    return total


class FirstFactors(StepOptimizer):
    "All groups take the factors that the optimizer was made with."
    def run(self, group, params, grads):
        super().run({**group, 'factors': self.defaults['factors']}, params, grads)


def test_any_tuple_of_numbers_is_changed():
    tuples = dict(betas=(0.98, 0.92, 0.99), factors=(0.5, 0.8, 0.9))
    wanted = dict(betas=(0.49, 0.46, 0.495), factors=(0.45, 0.9*0.8, 0.81))
    assert training.other_values(tuples) == wanted
    others = dict(names=('a', 'b'), on=(True, False), eps=1.)
    assert training.other_values(others) == dict(eps=10.)
    steps = dict(steps=[averages, sgd], lr=LR)
    training.keeps_groups_apart(partial(StepOptimizer, **steps))
    with pytest.raises(AssertionError, match='a group with factors='):
        training.keeps_groups_apart(partial(FirstFactors, **steps))
    training.keeps_groups_apart(of(timm.Adan))                    # three betas
    training.keeps_groups_apart(partial(T.Rprop, lr=0.01))       # limits out of reach


@pytest.mark.filterwarnings('ignore:optimizer contains a parameter group with dup')
def test_the_table():
    table = contract.contract_table(EXERCISED)
    assert not table.failures()
    bad = contract.contract_table({'torch': partial(T.SGD, lr=0.1, momentum=0.9)})
    assert '✗' in bad._repr_markdown_()
    assert ('torch', 'copies what it loads') in bad.failures()


@pytest.mark.parametrize('run', RUNS, ids=lambda run: run['name'])
def test_recorded_composer_runs(run):
    make = getattr(optim, run['optimizer'])
    assert replay(run, make) < 1e-12
    other = run['kwargs'].get('weight_decay', 0.) + 1e-3
    assert replay(run, make, weight_decay=other) > 1e-6


@pytest.mark.parametrize('case', CASES)
def test_sparse_and_complex_are_refused(case):
    "The rows let an optimizer handle them; ours refuse."
    p, q = leaves((3,), (4, 2))
    opt = make_of(case)([p, q])
    p.grad, q.grad = torch.ones_like(p), torch.eye(4, 2, dtype=p.dtype).to_sparse()
    refused(['sparse', 'params[1]', '(4, 2)'], opt.step)
    z = torch.ones(2, dtype=torch.complex64, requires_grad=True)
    refused(['complex64', 'params[0]'], make_of(case), [z])


def loads_or_refuses(opt, sd, loads):
    "A checkpoint that does not fit is refused, and nothing has changed."
    if loads: return opt.load_state_dict(sd)
    before = str(opt.state_dict())
    with pytest.raises(ValueError, match='checkpoint'): opt.load_state_dict(sd)
    assert str(opt.state_dict()) == before


@pytest.mark.parametrize('saved', optim.__all__)
@pytest.mark.parametrize('name', optim.__all__)
def test_checkpoints_of_other_optimizers_are_refused(name, saved):
    (opt, _), (other, _) = trained(EXERCISED[name]), trained(EXERCISED[saved])
    loads_or_refuses(opt, other.state_dict(), name == saved)


SAVED = ['SGD', 'Adam', 'AdamW', 'Adadelta', 'Adagrad', 'RMSprop', 'Adamax', 'NAdam',
         'RAdam', 'Rprop', 'ASGD']

@pytest.mark.parametrize('saved', SAVED)
@pytest.mark.parametrize('name', TORCHS)
def test_checkpoints_of_torch(name, saved):
    """Only the optimizer of the same name loads,
    whatever it has in common with the others."""
    opt, _ = trained(of(getattr(optim, name)))
    hypers = M if saved in ('SGD', 'RMSprop') else {}
    other, _ = trained(of(getattr(T, saved), **hypers))
    sd = other.state_dict()
    tells = 'decoupled_weight_decay' in sd['param_groups'][0]
    if {name, saved} == {'Adam', 'AdamW'} and not tells:
        pytest.skip('this torch does not write down which of the two it was')
    loads_or_refuses(opt, sd, name == saved)


def signed(p, g, state): return g.sign()

def test_a_step_of_ones_own_refuses_checkpoints_of_strangers():
    """What a step keeps in its state is known for ours alone; a checkpoint that
    does not name its steps cannot be checked against others."""
    make = partial(StepOptimizer, steps=[decay, signed, sgd], lr=LR, weight_decay=0.1)
    contract.refuses_foreign_checkpoints(make)
    contract.resumes_bit_for_bit(make)


@pytest.mark.parametrize('name', TORCHS)
def test_tied_network(name):
    "Two layers that share a weight, through autograd."
    def run(cls):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
        net[2].weight = net[0].weight
        opt = cls(net.parameters(), **EXERCISED[name].keywords)
        for _ in range(5):
            opt.zero_grad()
            net(torch.eye(3, dtype=torch.float64)).pow(2).sum().backward()
            opt.step()
        assert net[2].weight is net[0].weight
        return list(net.parameters())
    assert max_diff(run(getattr(optim, name)), run(getattr(T, name))) < 1e-12


@pytest.mark.parametrize('name', TORCHS)
def test_discriminative_rates(name):
    """fastai's `slice` of rates, as groups under a one-cycle schedule,
    equal to hand-made groups in torch."""
    groups = pytest.importorskip('optimizers_explained.groups')
    def run(cls, groups_of):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)).double()
        opt = cls(groups_of(net), **EXERCISED[name].keywords)
        peaks = [g['lr'] for g in opt.param_groups]
        sched = lr_scheduler.OneCycleLR(opt, max_lr=peaks, total_steps=12)
        for t in range(10):
            train(opt, list(net.parameters()), [t])
            sched.step()
        return list(net.parameters())
    def with_rates(net, rates):
        layers = zip(net, rates)
        return [dict(params=list(layer.parameters()), lr=lr) for layer, lr in layers]
    def by_hand(net): return with_rates(net, (1e-3, 1e-2, 1e-1))
    def one_rate(net): return with_rates(net, (1e-2, 1e-2, 1e-2))
    def helper(net): return groups.discriminative(list(net), lr=slice(1e-3, 1e-1))
    ours, want = getattr(optim, name), run(getattr(T, name), by_hand)
    assert max_diff(run(ours, helper), want) < 1e-12
    assert max_diff(run(ours, one_rate), want) > 1e-3


@pytest.mark.parametrize('name', optim.__all__)
def test_timm_scheduler(name):
    """timm's training script drives the rate with schedulers of its own,
    that write `initial_lr` and read `lr_scale`."""
    timm_sched = pytest.importorskip('timm.scheduler')
    def rates(make):
        a, b = leaves()
        opt = make([dict(params=[a], lr_scale=0.5), dict(params=[b])])
        warm_up = dict(warmup_t=3, warmup_lr_init=1e-4)
        sched = timm_sched.CosineLRScheduler(opt, t_initial=8, **warm_up)
        seen = []
        for t in range(8):
            train(opt, [a, b], [t])
            sched.step(t + 1)
            seen.append([g['lr'] for g in opt.param_groups])
        return seen
    assert rates(EXERCISED[name]) == rates(of(T.SGD))


def step_of(p, g, state): return g.sum()
def list_of(p, g, state): return [g]
def in_place(p, g, state): return g.mul_(2)


@pytest.mark.parametrize('step,words', [
    (step_of, ['step_of', '(3,)', '()']),
    (list_of, ['list_of', 'tensor', 'list'])])
def test_a_step_that_returns_the_wrong_thing(step, words):
    p, _ = leaves()
    opt = StepOptimizer([p], [step, sgd], lr=LR)
    p.grad = torch.ones_like(p)
    refused(words, opt.step)
    assert torch.equal(p, leaves()[0])


def test_a_step_that_changes_the_gradient():
    p, _ = leaves()
    p.grad = torch.ones_like(p)
    debugged = StepOptimizer([p], [in_place, sgd], lr=LR, debug=True)
    refused(['in_place', 'in place'], debugged.step)
    quiet = partial(StepOptimizer, steps=[in_place, sgd], lr=LR)
    quiet([p]).step()                             # it runs, and only the row notices
    with pytest.raises(AssertionError, match='p.grad has changed'):
        training.leaves_gradients_alone(quiet)


class Mistake(NamedTuple):
    words: list               # of the error
    make: object              # a function of a parameter


MISTAKES = [
    Mistake(['lr is missing', 'DecoupledSGDW', 'lr=...'],
            lambda w: optim.DecoupledSGDW([w])),
    Mistake(['lr is missing', 'LARS', 'lr=...'], lambda w: optim.LARS([w])),
    Mistake(['nesterov', 'momentum'], lambda w: optim.LARS([w], lr=1., nesterov=True)),
    Mistake(['trust_coeff', '-1.0'], lambda w: optim.LARS([w], lr=1., trust_coeff=-1.)),
    Mistake(['lr is missing', 'sgd', 'lr=...'], lambda w: StepOptimizer([w], [sgd])),
    Mistake(['betas', '(0.9, 1.0)'], lambda w: optim.AdamW([w], betas=(0.9, 1.))),
    Mistake(['betas', 'nan'], lambda w: optim.AdamW([w], betas=(0.9, float('nan')))),
    Mistake(['betas', '0.9'], lambda w: optim.AdamW([w], betas=0.9)),
    Mistake(['betas', '(0.9,)'], lambda w: optim.AdamW([w], betas=(0.9,))),
    Mistake(['lr', "'0.1'"], lambda w: optim.SGD([w], lr='0.1')),
    Mistake(['lr', 'None'], lambda w: optim.SGD([w], lr=None)),
    Mistake(['momentun', '0.9'], lambda w: optim.SGD([w], momentun=0.9)),
    Mistake(['momentun', 'momentum'],
            lambda w: optim.SGD([dict(params=[w], momentun=0.9)])),
    Mistake(['nesterov', 'momentum'], lambda w: optim.SGD([w], nesterov=True)),
    Mistake(['weight_decay', '-1'],
            lambda w: optim.SGD([dict(params=[w], weight_decay=-1)])),
    Mistake(['params'], lambda w: optim.SGD([dict(lr=0.1)])),
    Mistake(['list', 'set'], lambda w: optim.SGD({w})),
    Mistake(['params[0]', 'str'], lambda w: optim.SGD(['w'])),
    Mistake(['params', 'None'], lambda w: optim.SGD(None)),
    Mistake(['params', 'empty'], lambda w: optim.SGD([])),
    Mistake(['params[0]', 'leaf', 'MulBackward0'], lambda w: optim.SGD([w*2])),
    Mistake(['params[0]', 'group 1', 'another group'],
            lambda w: optim.SGD([dict(params=[w]), dict(params=[w])])),
    Mistake(['params[1]', 'twice'], lambda w: optim.SGD([w, w])),
]


@pytest.mark.parametrize('mistake', MISTAKES, ids=lambda m: ' '.join(m.words))
def test_mistakes(mistake):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        refused(mistake.words, mistake.make, torch.ones(3, requires_grad=True))


@pytest.mark.skipif(not torch.cuda.is_available(),
                    reason='no CUDA: the rows ran on the CPU only')
def test_numbers_on_cuda():
    for case in CASES:
        def on(device):
            ps = [p.detach().to(device).requires_grad_() for p in leaves()]
            train(make_of(case)(ps), ps)
            return [p.cpu() for p in ps]
        assert max_diff(on('cuda'), on('cpu')) < 1e-12, case
