"`DecoupledSGDW` and `DecoupledAdamW` against Composer's recorded numbers, fastai and torch; and the five repairs."
import copy
import io
import json
import logging
import math
from pathlib import Path

import pytest
import torch
from torch.optim import lr_scheduler

from optimizers_explained.composer import DecoupledAdamW, DecoupledSGDW
from optimizers_explained.problems import max_diff

CASES = json.loads((Path(__file__).parent/'composer.json').read_text())['cases']
CLASSES = dict(DecoupledSGDW=DecoupledSGDW, DecoupledAdamW=DecoupledAdamW)
BOTH = [DecoupledSGDW, DecoupledAdamW]


def replay(case, **changed):
    "Largest difference from the recorded parameters, over all steps."
    f64 = lambda xs: [torch.tensor(x, dtype=torch.float64).reshape(s) for x, s in zip(xs, case['shapes'])]
    ps = [p.requires_grad_() for p in f64(case['params'])]
    groups = [{'params': [p], **g} for p, g in zip(ps, case['groups'])] if case['groups'] else ps
    opt = CLASSES[case['optimizer']](groups, **{**case['kwargs'], **changed})
    diffs = []
    for t, (grads, want) in enumerate(zip(case['grads'], case['expected'])):
        if case['lr_factors']:
            for g in opt.param_groups: g['lr'] = g['lr0']*case['lr_factors'][t]
        for i, (p, g) in enumerate(zip(ps, f64(grads))): p.grad = None if [t, i] in case['missing_grads'] else g
        opt.step()
        diffs.append(max_diff(ps, f64(want)))
    return max(diffs)


@pytest.mark.parametrize('case', CASES, ids=lambda c: c['name'])
def test_recorded_numbers(case): assert replay(case) < 1e-12


@pytest.mark.parametrize('case', CASES, ids=lambda c: c['name'])
def test_recorded_numbers_notice_a_fault(case):
    assert replay(case, weight_decay=case['kwargs'].get('weight_decay', 0.) + 1e-3) > 1e-6
    assert replay(case, lr=case['kwargs']['lr']*1.001) > 1e-6


def steps(opt, p, n=10, sched=None, seed=0):
    "`n` steps of `opt` on random gradients."
    gen = torch.Generator().manual_seed(seed)
    for _ in range(n):
        p.grad = torch.randn(p.shape, generator=gen, dtype=p.dtype)
        opt.step()
        if sched: sched.step()
    return p.detach().clone()


def param(): return torch.tensor([1., -2., 3.], dtype=torch.float64, requires_grad=True)


SCHEDULES = {'constant': lambda o: lr_scheduler.ConstantLR(o, factor=1.), 'cosine': lambda o: lr_scheduler.CosineAnnealingLR(o, 30),
             'one cycle': lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.05, total_steps=40, cycle_momentum=False)}


@pytest.mark.parametrize('name', SCHEDULES)
def test_equals_fastai_under_translation(name):
    fastai = pytest.importorskip('fastai.optimizer', reason='fastai is not installed: DecoupledSGDW is not compared with it')
    def run(wd):
        a, b, gen = param(), param(), torch.Generator().manual_seed(0)
        ours, theirs = DecoupledSGDW([a], lr=0.05, momentum=0.9, weight_decay=wd), fastai.SGD([b], lr=0.05, mom=0.9, wd=0.01)
        sched = SCHEDULES[name](ours)
        for _ in range(30):
            a.grad = torch.randn(3, generator=gen, dtype=torch.float64)
            b.grad = a.grad.clone()
            theirs.set_hyper('lr', ours.param_groups[0]['lr'])
            ours.step(), theirs.step(), sched.step()
        return max_diff(a, b)
    assert run(0.05*0.01) < 1e-12
    assert run(0.01) > 1e-3


@pytest.mark.parametrize('name', SCHEDULES)
@pytest.mark.parametrize('amsgrad', [False, True])
def test_equals_torch_adamw_under_translation(name, amsgrad):
    def run(cls, wd, betas=(0.9, 0.95)):
        p = param()
        opt = cls([p], lr=0.05, betas=betas, weight_decay=wd, amsgrad=amsgrad)
        return steps(opt, p, 30, SCHEDULES[name](opt))
    want = run(torch.optim.AdamW, 0.1)
    assert max_diff(run(DecoupledAdamW, 0.05*0.1), want) < 1e-12
    assert max_diff(run(DecoupledAdamW, 0.1), want) > 1e-3
    assert max_diff(run(DecoupledAdamW, 0.05*0.1, (0.9, 0.951)), want) > 1e-6


@pytest.mark.parametrize('kw', [dict(), dict(momentum=0.9), dict(momentum=0.9, dampening=0.3), dict(momentum=0.9, nesterov=True)])
def test_equals_torch_sgd_without_decay(kw):
    def run(cls, **kw): p = param(); return steps(cls([p], lr=0.05, **kw), p)
    assert max_diff(run(DecoupledSGDW, **kw), run(torch.optim.SGD, **kw)) == 0
    assert max_diff(run(DecoupledSGDW, **kw), run(torch.optim.SGD, **{**kw, 'momentum': 0.8, 'nesterov': False})) > 1e-3


@pytest.mark.parametrize('cls', BOTH)
def test_group_added_later_decays_by_its_own_rate(cls):
    a, b = param(), param()
    opt = cls([a], lr=0.1, weight_decay=1e-4)
    steps(opt, a, 3)
    opt.add_param_group(dict(params=[b], lr=0.02))
    assert [g['lr0'] for g in opt.param_groups] == [0.1, 0.02]
    before, b.grad, a.grad = b.detach().clone(), torch.zeros_like(b), None
    opt.step()
    assert max_diff(b, before*(1 - 1e-4)) < 1e-15


@pytest.mark.parametrize('cls,theirs,buffer', [(DecoupledSGDW, torch.optim.SGD, 'momentum_buffer'),
                                                (DecoupledAdamW, torch.optim.AdamW, 'exp_avg')])
def test_torch_checkpoint(cls, theirs, buffer, caplog):
    p = param()
    kw = dict(momentum=0.9) if cls is DecoupledSGDW else {}
    old = theirs([p], lr=0.03, weight_decay=0.3, **kw)
    lr_scheduler.OneCycleLR(old, max_lr=0.03, total_steps=10, cycle_momentum=False)    # leaves an initial_lr behind
    steps(old, p, 3)
    opt = cls([p], lr=0.1, weight_decay=1e-4, **kw)
    opt.load_state_dict(old.state_dict())
    group = opt.param_groups[0]
    assert (group['lr0'], group['weight_decay'], group['lr']) == (0.1, 1e-4, old.param_groups[0]['lr'])
    assert torch.equal(opt.state[p][buffer], old.state[p][buffer])
    assert 'knows no lr0' in caplog.text
    assert steps(opt, p, 3).isfinite().all()


@pytest.mark.parametrize('cls', BOTH)
def test_own_checkpoint_continues_bit_for_bit(cls):
    def fresh(p): return cls([p], lr=0.1, weight_decay=1e-4, **(dict(momentum=0.9) if cls is DecoupledSGDW else dict(amsgrad=True)))
    a = param(); opt = fresh(a); steps(opt, a, 5)
    b = a.detach().clone().requires_grad_()
    opt.param_groups[0]['lr'] = 0.05
    file = io.BytesIO(); torch.save(opt.state_dict(), file); file.seek(0)
    other = cls([b], lr=0.7, weight_decay=0.5)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.param_groups[0]['lr0'] == 0.1 and other.param_groups[0]['lr'] == 0.05
    assert torch.equal(steps(opt, a, seed=1), steps(other, b, seed=1))


def test_missing_lr():
    with pytest.raises(TypeError, match='lr'): DecoupledSGDW([param()])


@pytest.mark.parametrize('cls', BOTH)
def test_lr_zero_at_first(cls):
    p = param()
    opt, before = cls([p], lr=0., weight_decay=1e-4), p.detach().clone()
    steps(opt, p, 2)
    assert torch.equal(p, before)                      # lr 0 moves nothing
    opt.param_groups[0]['lr'] = 0.1
    state = copy.deepcopy(opt.state_dict()['state'])
    with pytest.raises(ValueError, match='lr0 of group 0 is 0.*weight_decay=0.0001.*peak lr'): opt.step()
    assert torch.equal(p, before) and str(opt.state_dict()['state']) == str(state)
    opt.param_groups[0]['weight_decay'] = 0.           # without decay there is nothing to be relative to
    opt.step()
    assert not torch.equal(p, before)


@pytest.mark.parametrize('cls', BOTH)
def test_one_cycle_keeps_the_decay(cls):
    "Without gradients, the weights shrink by `1 - wd*lr/lr0` with the constructor's `lr`, whatever `initial_lr` says."
    p = param()
    before, want = p.detach().clone(), 1.
    opt = cls([p], lr=0.1, weight_decay=1e-3)
    sched = lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=21, cycle_momentum=cls is DecoupledAdamW)
    assert opt.param_groups[0]['initial_lr'] == pytest.approx(0.1/25)
    for _ in range(20):
        want *= 1 - 1e-3*opt.param_groups[0]['lr']/0.1
        p.grad = torch.zeros_like(p)
        opt.step(), sched.step()
    assert max_diff(p, before*want) < 1e-15
    assert want > (1 - 1e-3)**20                       # relative to initial_lr it would be (1 - 25e-3) at the top


@pytest.mark.parametrize('cls', BOTH)
def test_closure_frozen_and_untouched_gradients(cls):
    p, frozen = param(), param()
    opt = cls([p, frozen], lr=0.1, weight_decay=1e-4)
    def closure():
        opt.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss
    before = frozen.detach().clone()
    assert opt.step(closure).item() == 14.
    assert torch.equal(frozen, before) and not opt.state[frozen]
    assert torch.equal(p.grad, torch.tensor([2., -4., 6.], dtype=torch.float64))


@pytest.mark.parametrize('make,message', [
    (lambda p: DecoupledSGDW([p], lr=-1), 'lr must be a number >= 0, got -1'),
    (lambda p: DecoupledSGDW([p], lr=0.1, momentum=math.nan), 'momentum must be a number >= 0, got nan'),
    (lambda p: DecoupledSGDW([p], lr=0.1, nesterov=True), 'nesterov needs a momentum > 0'),
    (lambda p: DecoupledSGDW([p], lr=0.1, momentum=0.9, dampening=0.1, nesterov=True), 'dampening=0.1'),
    (lambda p: DecoupledSGDW([dict(params=[p], weight_decay=-1.)], lr=0.1), 'weight_decay must be a number >= 0, got -1.0'),
    (lambda p: DecoupledSGDW([dict(params=[p], momentum=-1.)], lr=0.1), 'momentum must be a number >= 0, got -1.0'),
    (lambda p: DecoupledAdamW([p], betas=(0.9, 1.)), r'betas must be two numbers in \[0, 1\)'),
    (lambda p: DecoupledAdamW([p], eps=-1.), 'eps must be a number >= 0, got -1.0')])
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message): make(param())


def test_warning(caplog):
    with caplog.at_level(logging.WARNING): DecoupledSGDW([param()], lr=0.1, weight_decay=9.9e-4)
    assert not caplog.records
    DecoupledSGDW([param()], lr=0.1, weight_decay=1e-3)
    DecoupledAdamW([param()], weight_decay=0.01)
    assert [r.levelname for r in caplog.records] == ['WARNING', 'WARNING'] and 'weight_decay=0.01' in caplog.text
