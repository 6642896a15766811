"""The contract on every optimizer that `optim` exports: each row of it, each optimizer in several settings, against torch, timm, fastai,
optimi and the recorded Composer runs."""
import inspect
import json
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from optimizers_explained import contract, judge, kinds, manners, optim
from optimizers_explained.adam import adam
from optimizers_explained.core import StepOptimizer, decay, sgd
from optimizers_explained.judge import ROWS, leaves, refused, train, trained
from optimizers_explained.problems import max_diff
from optimizers_explained.trust import lars, trust

pytestmark = [pytest.mark.filterwarnings('ignore:You are using weight_decay'),     # optimi's
              pytest.mark.filterwarnings('ignore:lr=.* is above lr0'),              # some schedules climb
              pytest.mark.filterwarnings('ignore:fused=True, and still')]           # some rows ask for what has no kernel; which, is tested in test_fused
SKIP = 'is not installed: its optimizers are no reference'
timm = pytest.importorskip('timm.optim', reason=f'timm {SKIP}')
LR = 0.05


class Fastai:
    "A fastai optimizer whose rate is read from `param_groups`, as torch's is."
    def __init__(self, name, ps, lr, **kw):
        fastai = pytest.importorskip('fastai.optimizer', reason=f'fastai {SKIP}')
        self.opt, self.param_groups = getattr(fastai, name)(ps, lr=lr, **kw), [dict(params=ps, lr=lr)]
    def step(self):
        self.opt.set_hyper('lr', self.param_groups[0]['lr'])
        self.opt.step()


def fastai(name, **kw): return lambda ps, **more: Fastai(name, ps, **{**dict(lr=LR), **kw, **more})
def optimi(name, **kw):
    def make(ps, **more):
        return getattr(pytest.importorskip('optimi', reason=f'optimi {SKIP}'), name)(ps, **{**dict(lr=LR), **kw, **more})
    return make
def apart(make): return partial(judge.Apart, make)            # for a reference that counts the steps of a whole group
def of(cls, **kw): return partial(cls, **{**dict(lr=LR), **kw})


T, WD, BOTH = torch.optim, dict(weight_decay=0.1), dict(betas=(0.8, 0.95), eps=1e-3)
M, MW = dict(momentum=0.9), dict(momentum=0.9, weight_decay=0.1)
FAST = dict(mom=0.8, sqr_mom=0.95, eps=1e-3, wd=0.1)
REL = dict(weight_decay=0.1/LR)                     # lambda*lr/lr0 is lr*(lambda/lr0)
LION = dict(betas=(0.8, 0.95), **WD)
TRUST, LAYERS, UNCLIPPED = dict(trust_coeff=0.5), dict(always_adapt=True), dict(always_adapt=True, max_grad_norm=None)
SHORT = dict(betas=(0.5, 0.95), eps=1e-3)            # under which LAMB's ratio stays below 10, where fastai's ends
FREE = dict(weight_decay=0.1, decouple_lr=True, max_lr=LR)
# name: factory, its hyperparameters, the independent implementations it must equal
CASES = {
    'SGD, plain': ('SGD', {}, dict(torch=of(T.SGD), fastai=fastai('SGD', mom=0.), optimi=optimi('SGD'))),
    'SGD': ('SGD', MW, dict(torch=of(T.SGD, **MW), optimi=optimi('SGD', **MW), fastai=fastai('SGD', mom=0.9, wd=0.1, decouple_wd=False))),
    'SGD, dampening': ('SGD', dict(dampening=0.9, **MW), dict(torch=of(T.SGD, dampening=0.9, **MW),
                                                             optimi=optimi('SGD', dampening=True, torch_init=True, **MW))),
    'SGD, Nesterov': ('SGD', dict(nesterov=True, **MW), dict(torch=of(T.SGD, nesterov=True, **MW))),
    'SGD, Nesterov without decay': ('SGD', dict(nesterov=True, **M), dict(torch=of(T.SGD, nesterov=True, foreach=False, **M))),
    'SGD, maximize': ('SGD', dict(maximize=True, **MW), dict(torch=of(T.SGD, maximize=True, **MW))),
    'SGDW': ('SGDW', MW, dict(timm=of(timm.SGDW, **MW), fastai=fastai('SGD', mom=0.9, wd=0.1),
                              optimi=optimi('SGD', decouple_wd=True, **MW))),
    'SGDW, Nesterov': ('SGDW', dict(nesterov=True, **MW), dict(timm=of(timm.SGDW, nesterov=True, **MW))),
    'SGDW, dampening, maximize': ('SGDW', MW | dict(dampening=0.3, maximize=True),
                                  dict(timm=of(timm.SGDW, dampening=0.3, maximize=True, **MW))),
    'DecoupledSGDW': ('DecoupledSGDW', MW, dict(timm=of(timm.SGDW, **M, **REL), optimi=optimi('SGD', **M, **FREE))),
    'DecoupledSGDW, Nesterov': ('DecoupledSGDW', dict(nesterov=True, **MW), dict(timm=of(timm.SGDW, nesterov=True, **M, **REL))),
    'Lion': ('Lion', LION, dict(timm=of(timm.Lion, **LION), optimi=optimi('Lion', **LION))),
    'Lion, maximize': ('Lion', dict(maximize=True, **WD), dict(timm=of(timm.Lion, maximize=True, **WD))),
    'Adam': ('Adam', BOTH | WD, dict(torch=of(T.Adam, **BOTH, **WD), fastai=fastai('Adam', decouple_wd=False, **FAST))),
    'Adam, amsgrad': ('Adam', BOTH | dict(amsgrad=True), dict(torch=of(T.Adam, amsgrad=True, **BOTH))),
    'Adam, maximize': ('Adam', BOTH | WD | dict(maximize=True), dict(torch=of(T.Adam, maximize=True, **BOTH, **WD))),
    'AdamW': ('AdamW', BOTH | WD, dict(torch=of(T.AdamW, **BOTH, **WD), fastai=fastai('Adam', **FAST),
                                       timm=of(timm.AdamWLegacy, **BOTH, **WD))),
    'AdamW, amsgrad, maximize': ('AdamW', BOTH | WD | dict(amsgrad=True, maximize=True),
                                 dict(torch=of(T.AdamW, amsgrad=True, maximize=True, **BOTH, **WD))),
    'DecoupledAdamW': ('DecoupledAdamW', BOTH | WD, dict(torch=of(T.AdamW, **BOTH, **REL))),
    'LARS, plain': ('LARS', TRUST, dict(timm=of(timm.Lars, **TRUST, **LAYERS), fastai=fastai('Larc', mom=0., clip=False, **TRUST))),
    'LARS': ('LARS', MW | TRUST | dict(eps=1e-3), dict(timm=of(timm.Lars, eps=1e-3, **MW, **TRUST, **LAYERS))),
    'LARS, the default trust_coeff': ('LARS', dict(lr=5., dampening=0.3, **MW), dict(timm=of(timm.Lars, lr=5., dampening=0.3, **MW, **LAYERS))),
    'LARS, Nesterov': ('LARS', MW | TRUST | dict(nesterov=True), dict(timm=of(timm.Lars, nesterov=True, **MW, **TRUST, **LAYERS))),
    'LAMB': ('LAMB', BOTH | WD, dict(timm=apart(of(timm.Lamb, **BOTH, **WD, **UNCLIPPED)))),
    'LAMB, the defaults': ('LAMB', {}, dict(timm=apart(of(timm.Lamb, **UNCLIPPED)))),
    'LAMB, no decay': ('LAMB', SHORT | dict(weight_decay=0.), dict(timm=apart(of(timm.Lamb, **SHORT, weight_decay=0., **UNCLIPPED)),
                                                                   fastai=fastai('Lamb', **FAST | dict(mom=0.5, wd=0.)))),
    'DecoupledAdamW, amsgrad': ('DecoupledAdamW', BOTH | WD | dict(amsgrad=True), dict(torch=of(T.AdamW, amsgrad=True, **BOTH, **REL))),
}
NO_REFERENCE = {}                                   # name of an exported optimizer: why nobody else has it
# a newly exported optimizer runs every row that needs no reference by itself
CASES |= {name: (name, contract.exercised(getattr(optim, name)).keywords, {})
          for name in optim.__all__ if name not in {c[0] for c in CASES.values()}}
ALONE = [r for r in ROWS if 'reference' not in inspect.signature(ROWS[r]).parameters]


SPEEDS = dict(loop=dict(foreach=False), foreach=dict(foreach=True), fused=dict(fused=True))      # one definition, run in several ways: every row for each
PAIRS = [(c, lib) for c in CASES for lib in CASES[c][2]]


def make_of(case, speed='loop'): return of(getattr(optim, CASES[case][0]), **CASES[case][1], **SPEEDS[speed])


@pytest.mark.parametrize('speed', SPEEDS)
@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('row', ALONE)
def test_row(row, case, speed): ROWS[row](make_of(case, speed))


@pytest.mark.parametrize('speed', SPEEDS)
@pytest.mark.parametrize('case,library', PAIRS)
def test_numbers(case, library, speed): judge.has_the_reference_numbers(make_of(case, speed), CASES[case][2][library])


OPTIMIS = dict(Adam=optimi('Adam', **BOTH, **WD), AdamW=optimi('AdamW', **BOTH, **WD), DecoupledAdamW=optimi('AdamW', **BOTH, **FREE))

@pytest.mark.parametrize('name,reference', OPTIMIS.items())
def test_numbers_of_optimi(name, reference):
    "optimi's Adam counts the steps of a whole group, so it is a reference only where no gradient is missing."
    def run(make):
        ps, path = leaves(), []
        opt = make(ps)
        for t in range(50):
            opt.param_groups[0]['lr'] = LR*judge.warm_up_cosine(t)
            path += train(opt, ps, [t])
        return path
    assert max_diff(run(of(getattr(optim, name), **BOTH, **WD)), run(reference)) < 1e-12
    with pytest.raises(AssertionError): judge.has_the_reference_numbers(of(getattr(optim, name), **BOTH, **WD), reference)


def test_lamb_of_fastai():
    "Its decay stands before Adam, outside of the ratio: the same steps in another order. And it caps the ratio at 10."
    def make(ps, **kw): return StepOptimizer(ps, [decay, adam, trust, sgd], **{**dict(lr=LR), **SHORT, **WD, **kw})
    judge.has_the_reference_numbers(make, fastai('Lamb', **FAST | dict(mom=0.5)))
    with pytest.raises(AssertionError): judge.has_the_reference_numbers(of(optim.LAMB, **SHORT, **WD), fastai('Lamb', **FAST | dict(mom=0.5)))
    with pytest.raises(AssertionError): judge.has_the_reference_numbers(partial(make, betas=(0.8, 0.95)), fastai('Lamb', **FAST))
    def capped(p, g, state): return g*torch.minimum(p.norm()/g.norm(), torch.tensor(10.))
    def with_cap(ps, **kw): return StepOptimizer(ps, [decay, adam, capped, sgd], **{**dict(lr=LR), **BOTH, **WD, **kw})
    judge.has_the_reference_numbers(with_cap, fastai('Lamb', **FAST))


def of_zeros(make, dtype=torch.float64):
    "Steps with weights of 0, gradients of 0, both, and neither."
    ps = [p.requires_grad_() for p in (torch.zeros(3, dtype=dtype), leaves(dtype=dtype)[0].detach(), torch.zeros(3, dtype=dtype), leaves(dtype=dtype)[1].detach())]
    opt = make(ps)
    for t in range(5):
        judge.feed(ps, t)
        for p in ps[1:3]: p.grad.zero_()
        opt.step()
    return ps

@pytest.mark.parametrize('speed', SPEEDS)
@pytest.mark.parametrize('case', ['LARS', 'LARS, plain', 'LAMB', 'LAMB, no decay'])
def test_layers_of_zeros(case, speed):
    "The factor is 1 where weights or update are 0, as in timm; a list of tensors has the bits of the loop, a kernel its numbers."
    make, reference = make_of(case, speed), CASES[case][2]['timm']
    assert max_diff(of_zeros(make), of_zeros(reference)) < 1e-12
    assert max_diff(of_zeros(make, torch.float32), of_zeros(make_of(case), torch.float32)) <= (1e-6 if speed == 'fused' else 0.)
    def bare(p, g, state): return g*(p.norm()/g.norm())
    assert not max_diff(of_zeros(partial(StepOptimizer, steps=[adam, bare, sgd], lr=LR)), of_zeros(reference)) < 1e-6       # NaN


def test_the_ratios_can_be_recorded():
    "No step of theirs asks a tensor for its value, its shape or its length: a recorder of operations runs it."
    for step in lars, trust:
        recorded = torch.fx.symbolic_trace(lambda p, g: step(p, g, {}))
        p, g = leaves((3,), (3,))
        assert torch.equal(recorded(p, 2*g), step(p, 2*g, {}))
    def branches(p, g): return g if p.norm() > 0 else p
    with pytest.raises(torch.fx.proxy.TraceError): torch.fx.symbolic_trace(branches)


@pytest.mark.parametrize('case,library', PAIRS)
def test_numbers_notice_a_fault(case, library):
    for wrong in dict(lr=LR*1.000001), dict(weight_decay=CASES[case][1].get('weight_decay', 0.) + 1e-5):
        with pytest.raises(AssertionError, match='50 steps'):
            judge.has_the_reference_numbers(partial(make_of(case), **wrong), CASES[case][2][library])


@pytest.mark.parametrize('case', [c for c in CASES if 'torch' in CASES[c][2]])
def test_torch_checkpoints(case):
    want = 'no reference' if case.startswith('Decoupled') else None           # translated: their weight_decay is another number
    assert contract.exchanges_checkpoints_with_torch(make_of(case), CASES[case][2]['torch']) == want


def test_every_export_has_a_reference():
    compared = {factory for factory, _, refs in CASES.values() if refs}
    lacking = set(optim.__all__) - set(NO_REFERENCE) - compared
    assert not lacking, f'{lacking}: add a case with an independent implementation, or the reason to NO_REFERENCE'


def test_every_row_is_registered():
    functions = [f for mod in (judge, kinds, manners, contract) for f in vars(mod).values()
                 if inspect.isfunction(f) and f.__module__ == mod.__name__]
    rows = {f for f in functions if list(inspect.signature(f).parameters)[:1] == ['make'] and not f.__name__.startswith('_')}
    assert rows - set(ROWS.values()) <= {judge.trained, contract.contract}
    assert len(ROWS) >= 28


def test_every_scheduler_has_a_recipe():
    found = [(n, c) for n, c in vars(lr_scheduler).items() if inspect.isclass(c) and not n.startswith('_')]
    classes = {n for n, c in found if issubclass(c, lr_scheduler.LRScheduler)}
    assert classes - {'LRScheduler'} == set(manners.SCHEDULERS)


@pytest.mark.filterwarnings('ignore:optimizer contains a parameter group with duplicate')
def test_the_table():
    table = contract.contract_table({n: contract.exercised(getattr(optim, n)) for n in optim.__all__})
    assert not table.failures()
    bad = contract.contract_table({'torch': partial(T.SGD, lr=0.1, momentum=0.9)})
    assert '✗' in bad._repr_markdown_() and ('torch', 'copies what it loads') in bad.failures()


RECORDED = json.loads((Path(__file__).parent/'composer.json').read_text())['cases']

def replay(case, **changed):
    def f64(xs): return [torch.tensor(x, dtype=torch.float64).reshape(s) for x, s in zip(xs, case['shapes'])]
    ps = [p.requires_grad_() for p in f64(case['params'])]
    groups = [{'params': [p], **g} for p, g in zip(ps, case['groups'])] if case['groups'] else ps
    opt = getattr(optim, case['optimizer'])(groups, **{**case['kwargs'], **changed})
    diffs, lrs = [], [g['lr'] for g in opt.param_groups]
    for t, (grads, want) in enumerate(zip(case['grads'], case['expected'])):
        if case['lr_factors']:
            for g, lr in zip(opt.param_groups, lrs): g['lr'] = lr*case['lr_factors'][t]
        for i, (p, g) in enumerate(zip(ps, f64(grads))): p.grad = None if [t, i] in case['missing_grads'] else g
        opt.step()
        diffs.append(max_diff(ps, f64(want)))
    return max(diffs)


@pytest.mark.parametrize('case', RECORDED, ids=lambda c: c['name'])
def test_recorded_composer_runs(case):
    assert replay(case) < 1e-12
    assert replay(case, weight_decay=case['kwargs'].get('weight_decay', 0.) + 1e-3) > 1e-6


@pytest.mark.parametrize('case', CASES)
def test_sparse_and_complex_are_refused(case):
    "The rows let an optimizer handle them; ours refuse."
    p, q = leaves((3,), (4, 2))
    opt = make_of(case)([p, q])
    p.grad, q.grad = torch.ones_like(p), torch.eye(4, 2, dtype=p.dtype).to_sparse()
    refused(['sparse', 'params[1]', '(4, 2)'], opt.step)
    refused(['complex64', 'params[0]'], make_of(case), [torch.ones(2, dtype=torch.complex64, requires_grad=True)])


NAMES = [n for n in optim.__all__]

@pytest.mark.parametrize('saved', NAMES)
@pytest.mark.parametrize('name', NAMES)
def test_checkpoints_of_other_optimizers_are_refused(name, saved):
    opt, _ = trained(contract.exercised(getattr(optim, name)))
    before, sd = str(opt.state_dict()), trained(contract.exercised(getattr(optim, saved)))[0].state_dict()
    if name == saved: return opt.load_state_dict(sd)
    with pytest.raises(ValueError, match='checkpoint'): opt.load_state_dict(sd)
    assert str(opt.state_dict()) == before


@pytest.mark.parametrize('saved', ['SGD', 'Adam', 'AdamW', 'Adadelta', 'Adagrad', 'RMSprop', 'Adamax', 'NAdam', 'RAdam', 'Rprop', 'ASGD'])
@pytest.mark.parametrize('name', ['SGD', 'Adam', 'AdamW'])
def test_checkpoints_of_torch(name, saved):
    "Only the optimizer of the same name loads, whatever it has in common with the others."
    opt, _ = trained(of(getattr(optim, name)))
    other = getattr(T, saved)
    theirs, before = trained(of(other, **(M if saved in ('SGD', 'RMSprop') else {})))[0].state_dict(), str(opt.state_dict())
    if name == saved: return opt.load_state_dict(theirs)
    if {name, saved} == {'Adam', 'AdamW'} and 'decoupled_weight_decay' not in theirs['param_groups'][0]: pytest.skip('this torch does not write down which of the two it was')
    with pytest.raises(ValueError, match='checkpoint'): opt.load_state_dict(theirs)
    assert str(opt.state_dict()) == before


def signed(p, g, state): return g.sign()

def test_a_step_of_ones_own_refuses_checkpoints_of_strangers():
    "What a step keeps in its state is known for ours alone; a checkpoint that does not name its steps cannot be checked against others."
    make = partial(StepOptimizer, steps=[decay, signed, sgd], lr=LR, weight_decay=0.1)
    contract.refuses_foreign_checkpoints(make), contract.resumes_bit_for_bit(make)


def test_tied_network():
    "Two layers that share a weight, through autograd."
    def run(make):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
        net[2].weight = net[0].weight
        opt = make(net.parameters())
        for _ in range(5):
            opt.zero_grad()
            net(torch.eye(3, dtype=torch.float64)).pow(2).sum().backward()
            opt.step()
        assert net[2].weight is net[0].weight
        return list(net.parameters())
    for name in 'SGD', 'AdamW':
        kw = contract.exercised(getattr(optim, name)).keywords
        assert max_diff(run(of(getattr(optim, name), **kw)), run(of(getattr(T, name), **kw))) < 1e-12


def test_discriminative_rates():
    "fastai's `slice` of rates, as groups under a one-cycle schedule, equal to hand-made groups in torch."
    groups = pytest.importorskip('optimizers_explained.groups')
    def run(make, groups_of):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)).double()
        opt = make(groups_of(net))
        sched = lr_scheduler.OneCycleLR(opt, max_lr=[g['lr'] for g in opt.param_groups], total_steps=12)
        for t in range(10): train(opt, list(net.parameters()), [t]), sched.step()
        return list(net.parameters())
    def by_hand(net): return [dict(params=list(layer.parameters()), lr=lr) for layer, lr in zip(net, (1e-3, 1e-2, 1e-1))]
    def one_rate(net): return [dict(params=list(layer.parameters()), lr=1e-2) for layer in net]
    def helper(net): return groups.discriminative(list(net), lr=slice(1e-3, 1e-1))
    for name in 'SGD', 'AdamW':
        kw = contract.exercised(getattr(optim, name)).keywords
        want = run(partial(getattr(T, name), **kw), by_hand)
        assert max_diff(run(partial(getattr(optim, name), **kw), helper), want) < 1e-12
        assert max_diff(run(partial(getattr(optim, name), **kw), one_rate), want) > 1e-3


@pytest.mark.parametrize('name', optim.__all__)
def test_timm_scheduler(name):
    "timm's training script drives the rate with schedulers of its own, that write `initial_lr` and read `lr_scale`."
    timm_sched = pytest.importorskip('timm.scheduler')
    def rates(make):
        a, b = leaves()
        opt = make([dict(params=[a], lr_scale=0.5), dict(params=[b])])
        sched, seen = timm_sched.CosineLRScheduler(opt, t_initial=8, warmup_t=3, warmup_lr_init=1e-4), []
        for t in range(8):
            train(opt, [a, b], [t])
            sched.step(t + 1)
            seen.append([g['lr'] for g in opt.param_groups])
        return seen
    assert rates(contract.exercised(getattr(optim, name))) == rates(of(T.SGD))


def step_of(p, g, state): return g.sum()
def list_of(p, g, state): return [g]
def in_place(p, g, state): return g.mul_(2)


@pytest.mark.parametrize('step,words', [(step_of, ['step_of', '(3,)', '()']), (list_of, ['list_of', 'tensor', 'list'])])
def test_a_step_that_returns_the_wrong_thing(step, words):
    p, _ = leaves()
    opt = StepOptimizer([p], [step, sgd], lr=LR)
    p.grad = torch.ones_like(p)
    refused(words, opt.step)
    assert torch.equal(p, leaves()[0])


def test_a_step_that_changes_the_gradient():
    p, _ = leaves()
    p.grad = torch.ones_like(p)
    refused(['in_place', 'in place'], StepOptimizer([p], [in_place, sgd], lr=LR, debug=True).step)
    StepOptimizer([p], [in_place, sgd], lr=LR).step()                          # without debug it runs, and only the row notices
    with pytest.raises(AssertionError, match='p.grad has changed'):
        manners.leaves_gradients_alone(partial(StepOptimizer, steps=[in_place, sgd], lr=LR))


@pytest.mark.parametrize('make,words', [
    (lambda w: optim.DecoupledSGDW([w]), ['lr is missing', 'DecoupledSGDW', 'lr=...']),
    (lambda w: optim.LARS([w]), ['lr is missing', 'LARS', 'lr=...']),
    (lambda w: optim.LARS([w], lr=1., nesterov=True), ['nesterov', 'momentum']),
    (lambda w: optim.LARS([w], lr=1., trust_coeff=-1.), ['trust_coeff', '-1.0']),
    (lambda w: StepOptimizer([w], [sgd]), ['lr is missing', 'sgd', 'lr=...']),
    (lambda w: optim.AdamW([w], betas=(0.9, 1.)), ['betas', '(0.9, 1.0)']),
    (lambda w: optim.AdamW([w], betas=(0.9, float('nan'))), ['betas', 'nan']),
    (lambda w: optim.AdamW([w], betas=0.9), ['betas', '0.9']),
    (lambda w: optim.AdamW([w], betas=(0.9,)), ['betas', '(0.9,)']),
    (lambda w: optim.SGD([w], lr='0.1'), ['lr', "'0.1'"]),
    (lambda w: optim.SGD([w], lr=None), ['lr', 'None']),
    (lambda w: optim.SGD([w], momentun=0.9), ['momentun', '0.9']),
    (lambda w: optim.SGD([dict(params=[w], momentun=0.9)]), ['momentun', 'momentum']),
    (lambda w: optim.SGD([w], nesterov=True), ['nesterov', 'momentum']),
    (lambda w: optim.SGD([dict(params=[w], weight_decay=-1)]), ['weight_decay', '-1']),
    (lambda w: optim.SGD([dict(lr=0.1)]), ['params']),
    (lambda w: optim.SGD({w}), ['list', 'set']),
    (lambda w: optim.SGD(['w']), ['params[0]', 'str']),
    (lambda w: optim.SGD(None), ['params', 'None']),
    (lambda w: optim.SGD([]), ['params', 'empty']),
    (lambda w: optim.SGD([w*2]), ['params[0]', 'leaf', 'MulBackward0']),
    (lambda w: optim.SGD([dict(params=[w]), dict(params=[w])]), ['params[0]', 'group 1', 'another group']),
    (lambda w: optim.SGD([w, w]), ['params[1]', 'twice']),
])
def test_mistakes(make, words):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        refused(words, make, torch.ones(3, requires_grad=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA: the rows ran on the CPU only')
def test_numbers_on_cuda():
    for case in CASES:
        def on(device):
            ps = [p.detach().to(device).requires_grad_() for p in leaves()]
            train(make_of(case)(ps), ps)
            return [p.cpu() for p in ps]
        assert max_diff(on('cuda'), on('cpu')) < 1e-12, case
