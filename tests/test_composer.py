"""`DecoupledSGDW` and `DecoupledAdamW` against Composer's recorded numbers, fastai and
torch; and the five repairs."""
import copy
import io
import json
import logging
import math
import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch.optim import lr_scheduler

from optimizers_explained.composer import DecoupledAdamW, DecoupledSGDW
from optimizers_explained.problems import max_diff

ROOT = Path(__file__).resolve().parents[1]
CASES = json.loads((Path(__file__).parent/'composer.json').read_text())['cases']
CLASSES = dict(DecoupledSGDW=DecoupledSGDW, DecoupledAdamW=DecoupledAdamW)
BOTH = [DecoupledSGDW, DecoupledAdamW]
MOMENTUM = {DecoupledSGDW: dict(momentum=0.9), DecoupledAdamW: {}}


def name_of(case): return case['name']


def tensors(case, values):
    shaped = zip(values, case['shapes'])
    return [torch.tensor(v, dtype=torch.float64).reshape(shape) for v, shape in shaped]


def replay(case, **changed):
    "Largest difference from the recorded parameters, over all steps."
    params = [p.requires_grad_() for p in tensors(case, case['params'])]
    groups = [{'params': [p]} for p in params]
    if case['groups']:
        for group, own in zip(groups, case['groups']): group.update(own)
    cls, kwargs = CLASSES[case['optimizer']], {**case['kwargs'], **changed}
    opt = cls(groups if case['groups'] else params, **kwargs)
    worst = 0.
    for t, (grads, want) in enumerate(zip(case['grads'], case['expected'])):
        if case['lr_factors']:
            for g in opt.param_groups: g['lr'] = g['lr0']*case['lr_factors'][t]
        for i, (p, g) in enumerate(zip(params, tensors(case, grads))):
            is_missing = [t, i] in case['missing_grads']
            p.grad = None if is_missing else g
        opt.step()
        worst = max(worst, max_diff(params, tensors(case, want)))
    return worst


@pytest.mark.parametrize('case', CASES, ids=name_of)
def test_recorded_numbers(case): assert replay(case) < 1e-12


@pytest.mark.parametrize('case', CASES, ids=name_of)
def test_recorded_numbers_notice_a_fault(case):
    weight_decay = case['kwargs'].get('weight_decay', 0.) + 1e-3
    assert replay(case, weight_decay=weight_decay) > 1e-6
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


def constant(opt): return lr_scheduler.ConstantLR(opt, factor=1.)
def cosine(opt): return lr_scheduler.CosineAnnealingLR(opt, 30)
def one_cycle(opt):
    return lr_scheduler.OneCycleLR(
        opt, max_lr=0.05, total_steps=40, cycle_momentum=False)


SCHEDULES = {'constant': constant, 'cosine': cosine, 'one cycle': one_cycle}


@pytest.mark.parametrize('name', SCHEDULES)
def test_equals_fastai_under_translation(name):
    fastai = pytest.importorskip('fastai.optimizer', reason=
        'fastai is not installed: DecoupledSGDW is not compared with it')
    def run(wd):
        a, b, gen = param(), param(), torch.Generator().manual_seed(0)
        ours = DecoupledSGDW([a], lr=0.05, momentum=0.9, weight_decay=wd)
        theirs = fastai.SGD([b], lr=0.05, mom=0.9, wd=0.01)
        sched = SCHEDULES[name](ours)
        for _ in range(30):
            a.grad = torch.randn(3, generator=gen, dtype=torch.float64)
            b.grad = a.grad.clone()
            theirs.set_hyper('lr', ours.param_groups[0]['lr'])
            ours.step()
            theirs.step()
            sched.step()
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


MOMENTA = [dict(), dict(momentum=0.9), dict(momentum=0.9, dampening=0.3),
           dict(momentum=0.9, nesterov=True)]


@pytest.mark.parametrize('kw', MOMENTA)
def test_equals_torch_sgd_without_decay(kw):
    def run(cls, **kw):
        p = param()
        return steps(cls([p], lr=0.05, **kw), p)
    another = {**kw, 'momentum': 0.8, 'nesterov': False}
    assert max_diff(run(DecoupledSGDW, **kw), run(torch.optim.SGD, **kw)) == 0
    assert max_diff(run(DecoupledSGDW, **kw), run(torch.optim.SGD, **another)) > 1e-3


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


class Pair(NamedTuple):
    ours:type
    torchs:type
    buffer:str


PAIRS = [Pair(DecoupledSGDW, torch.optim.SGD, 'momentum_buffer'),
         Pair(DecoupledAdamW, torch.optim.AdamW, 'exp_avg')]


@pytest.mark.parametrize('pair', PAIRS)
def test_torch_checkpoint(pair, caplog):
    p = param()
    old = pair.torchs([p], lr=0.03, weight_decay=0.3, **MOMENTUM[pair.ours])
    one_cycle(old)                                     # leaves an initial_lr behind
    steps(old, p, 3)
    opt = pair.ours([p], lr=0.1, weight_decay=1e-4, **MOMENTUM[pair.ours])
    opt.load_state_dict(old.state_dict())
    group = opt.param_groups[0]
    assert group['lr0'] == 0.1 and group['weight_decay'] == 1e-4
    assert group['lr'] == old.param_groups[0]['lr']
    assert torch.equal(opt.state[p][pair.buffer], old.state[p][pair.buffer])
    assert 'knows no lr0' in caplog.text
    assert steps(opt, p, 3).isfinite().all()


@pytest.mark.parametrize('cls', BOTH)
def test_own_checkpoint_continues_bit_for_bit(cls):
    kw = dict(momentum=0.9) if cls is DecoupledSGDW else dict(amsgrad=True)
    a = param()
    opt = cls([a], lr=0.1, weight_decay=1e-4, **kw)
    steps(opt, a, 5)
    b = a.detach().clone().requires_grad_()
    opt.param_groups[0]['lr'] = 0.05
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
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
    message = 'lr0 of group 0 is 0.*weight_decay=0.0001.*peak lr'
    with pytest.raises(ValueError, match=message): opt.step()
    assert torch.equal(p, before) and str(opt.state_dict()['state']) == str(state)
    opt.param_groups[0]['weight_decay'] = 0.           # nothing has to be relative then
    opt.step()
    assert not torch.equal(p, before)


@pytest.mark.parametrize('cls', BOTH)
def test_one_cycle_keeps_the_decay(cls):
    """Without gradients, the weights shrink by `1 - wd*lr/lr0` with the constructor's
    `lr`, whatever `initial_lr` says."""
    p = param()
    before, want = p.detach().clone(), 1.
    opt = cls([p], lr=0.1, weight_decay=1e-3)
    sched = lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=21,
                                    cycle_momentum=cls is DecoupledAdamW)
    assert opt.param_groups[0]['initial_lr'] == pytest.approx(0.1/25)
    for _ in range(20):
        want *= 1 - 1e-3*opt.param_groups[0]['lr']/0.1
        p.grad = torch.zeros_like(p)
        opt.step()
        sched.step()
    assert max_diff(p, before*want) < 1e-15
    # relative to initial_lr it would be (1 - 25e-3) at the top
    assert want > (1 - 1e-3)**20


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


class Refused(NamedTuple):
    cls:type
    hypers:dict
    message:str
    of_group:dict = {}


REFUSED = [
    Refused(DecoupledSGDW, dict(lr=-1), 'lr must be a finite number >= 0, got -1'),
    Refused(DecoupledSGDW, dict(lr=0.1, momentum=math.nan),
            'momentum must be a finite number >= 0, got nan'),
    Refused(DecoupledSGDW, dict(lr=0.1, nesterov=True),
            'nesterov needs a momentum > 0'),
    Refused(DecoupledSGDW, dict(lr=0.1, momentum=0.9, dampening=0.1, nesterov=True),
            'dampening=0.1'),
    Refused(DecoupledSGDW, dict(lr=0.1), of_group=dict(weight_decay=-1.),
            message='weight_decay must be a finite number >= 0, got -1.0'),
    Refused(DecoupledSGDW, dict(lr=0.1), of_group=dict(momentum=-1.),
            message='momentum must be a finite number >= 0, got -1.0'),
    Refused(DecoupledAdamW, dict(betas=(0.9, 1.)),
            r'betas must be two numbers in \[0, 1\)'),
    Refused(DecoupledAdamW, dict(eps=-1.), 'eps must be a finite number >= 0, got -1.')]


@pytest.mark.parametrize('case', REFUSED)
def test_bad_input(case):
    group = dict(params=[param()], **case.of_group)
    with pytest.raises(ValueError, match=case.message):
        case.cls([group], **case.hypers)


BAD_HYPERS = [
    (dict(lr=math.inf), ValueError, 'lr must be a finite number >= 0, got inf'),
    (dict(lr=math.nan), ValueError, 'lr must be a finite number >= 0, got nan'),
    (dict(lr='0.1'), TypeError, "must be a number >= 0, or a tensor of one, got '0.1'"),
    (dict(lr=None), TypeError, 'must be a number >= 0, or a tensor of one, got None'),
    (dict(lr=torch.ones(2)), TypeError, 'lr must be a number >= 0, or a tensor of one'),
    (dict(lr=torch.tensor(-1.)), ValueError, 'lr must be a finite number >= 0'),
    (dict(weight_decay=math.inf), ValueError, 'weight_decay must be a finite number')]


@pytest.mark.parametrize('cls', BOTH)
@pytest.mark.parametrize('hypers,error,message', BAD_HYPERS, ids=str)
def test_bad_hypers_of_all_and_of_one_group(cls, hypers, error, message, caplog):
    with pytest.raises(error, match=message): cls([param()], **{'lr': 0.1, **hypers})
    assert not caplog.records               # refused before any warning about its decay
    opt = cls([param()], lr=0.1)
    group = {'params': [param()], **hypers}
    with pytest.raises(error, match=message): opt.add_param_group(group)
    assert len(opt.param_groups) == 1


NOT_BETAS = [
    0.9, (0.9,), (0.9, 0.95, 0.99), 'ab', None, (0.9, math.nan), {0.9, 0.95},
    (b for b in (0.9, 0.95)), torch.tensor(0.9)]


@pytest.mark.parametrize('betas', NOT_BETAS, ids=lambda b: type(b).__name__)
def test_betas_are_two_numbers(betas):
    message, p = r'betas must be two numbers in \[0, 1\), got ', param()
    with pytest.raises(ValueError, match=message): DecoupledAdamW([p], betas=betas)
    group = dict(params=[p], betas=betas)
    with pytest.raises(ValueError, match=message): DecoupledAdamW([group])


def as_tensor(pair): return torch.tensor(pair, dtype=torch.float64)


@pytest.mark.parametrize('kind', [list, as_tensor])
def test_any_sequence_of_two_betas(kind):
    betas = kind((0.9, 0.95))
    def run(betas):
        p = param()
        return steps(DecoupledAdamW([p], betas=betas), p)
    assert max_diff(run(betas), run((0.9, 0.95))) == 0.
    assert max_diff(run(betas), run((0.9, 0.951))) > 1e-6


@pytest.mark.parametrize('cls', BOTH)
def test_nothing_to_optimize(cls):
    for nothing in ([], iter([])):
        with pytest.raises(ValueError, match='optimizer got an empty parameter list'):
            cls(nothing, lr=0.1)
    cls([{'params': []}, {'params': [param()]}], lr=0.1).step()     # empty group: fine


@pytest.mark.parametrize('cls', BOTH)
@pytest.mark.parametrize('shape', [(), (1,)])
def test_a_tensor_as_lr(cls, shape):
    def run(lr):
        p = param()
        opt = cls([p], lr=lr, weight_decay=1e-2)
        sched = lr_scheduler.CosineAnnealingLR(opt, 30)
        return steps(opt, p, 20, sched), opt.param_groups[0]
    a, group = run(torch.full(shape, 0.5, dtype=torch.float64))
    assert max_diff(a, run(0.5)[0]) < 1e-12 and max_diff(a, run(0.499)[0]) > 1e-6
    assert isinstance(group['lr'], torch.Tensor)
    assert group['lr'] < 0.4 and group['lr0'] == 0.5    # Composer's initial_lr follows


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_step_count_whatever_the_default_dtype(dtype):
    "In bfloat16 a count stops at 256, in float16 at 2048"
    p = torch.nn.Parameter(torch.ones(1, dtype=dtype))
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        opt = DecoupledAdamW([p], amsgrad=True)
        for _ in range(300):
            p.grad = torch.ones_like(p)
            opt.step()
    finally: torch.set_default_dtype(before)
    state = opt.state[p]
    assert state['step'].item() == 300. and state['step'].dtype == torch.float32
    averages = 'exp_avg', 'exp_avg_sq', 'max_exp_avg_sq'
    assert {state[k].dtype for k in averages} == {dtype}


@pytest.mark.parametrize('cls', BOTH)
def test_state_stands_beside_the_parameter_whatever_the_default_device(cls):
    before = torch.get_default_device()
    try:
        torch.set_default_device('meta')
        p = param_on('cpu')
        opt = cls([p], lr=0.1, weight_decay=1e-4, **MOMENTUM[cls])
        for _ in range(3):
            p.grad = torch.ones_like(p)
            opt.step()
        opt.load_state_dict(opt.state_dict())
        opt.step()
    finally: torch.set_default_device(before)
    assert {v.device.type for v in opt.state[p].values()} == {'cpu'}
    assert not p.equal(param_on('cpu'))



def param_on(device): return torch.tensor([1., -2.], device=device, requires_grad=True)


HALF = torch.tensor(256., dtype=torch.bfloat16)


@pytest.mark.parametrize('count', [256, 256., torch.tensor(256), HALF], ids=str)
def test_step_count_of_a_checkpoint(count):
    "A number of an old torch or a half-precision tensor goes on counting in float32"
    p = param()
    opt = DecoupledAdamW([p])
    steps(opt, p, 2)
    sd = copy.deepcopy(opt.state_dict())
    sd['state'][0]['step'] = count
    opt.load_state_dict(sd)
    steps(opt, p, 3)
    now = opt.state[p]['step']
    assert now.item() == 259. and now.dtype == torch.float32


def test_frozen_with_a_gradient_left_over():
    "As in Composer: it rests in Adam, and moves in SGD"
    def moved(p): return not torch.equal(p, param())
    def run(cls):
        p, q = param(), param()
        opt = cls([p, q], lr=0.1)
        p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
        p.requires_grad_(False)
        opt.step()
        assert moved(q)
        return opt, p
    _, p = run(DecoupledSGDW)
    assert moved(p)
    opt, p = run(DecoupledAdamW)
    assert not moved(p) and p not in opt.state
    p.requires_grad_()
    opt.step()                                      # thawed: it begins
    assert opt.state[p]['step'] == 1. and moved(p)


def embedding(): return torch.nn.Embedding(4, 2, sparse=True, dtype=torch.float64)


def looked_up(table, *rows):
    table.weight.grad = None
    table(torch.tensor(rows)).square().sum().backward()


KINDS = [dict(), dict(momentum=0.9), dict(momentum=0.9, nesterov=True)]


@pytest.mark.parametrize('kw', KINDS, ids=str)
def test_sparse_gradients_are_the_dense_ones(kw):
    def run(sparse, weight_decay=1e-3):
        torch.manual_seed(0)
        table = embedding()
        opt = DecoupledSGDW(table.parameters(), lr=0.1, weight_decay=weight_decay, **kw)
        for t in range(5):
            looked_up(table, t % 4, 3, 3)
            if not sparse: table.weight.grad = table.weight.grad.to_dense()
            opt.step()
        return table.weight.detach()
    assert max_diff(run(True), run(False)) < 1e-12
    assert max_diff(run(True), run(True, 2e-3)) > 1e-6


def refused(opt, params, message):
    "`step` raises `message` and changes nothing"
    before = [p.detach().clone() for p in params], str(opt.state_dict())
    with pytest.raises(RuntimeError, match=message): opt.step()
    assert max_diff([p.detach() for p in params], before[0]) == 0.
    assert str(opt.state_dict()) == before[1]


@pytest.mark.parametrize('first', [True, False], ids=['at the first step', 'later'])
def test_a_sparse_gradient_in_adam(first):
    p, table = param(), embedding()
    opt = DecoupledAdamW([{'params': [p]}, {'params': table.parameters()}])
    p.grad = torch.ones_like(p)
    looked_up(table, 1)
    if not first:
        table.weight.grad = table.weight.grad.to_dense()
        opt.step()
        looked_up(table, 1)
    refused(opt, [p, table.weight],
            r'group 1 \(shape \(4, 2\)\) has a sparse gradient.*sparse=False in the')
    table.weight.grad = table.weight.grad.to_dense()
    opt.step()
    assert opt.state[p]['step'] == (1. if first else 2.)


def test_a_sparse_buffer_and_a_dense_gradient():
    p, table = param(), embedding()
    groups = [{'params': [p]}, {'params': table.parameters()}]
    opt = DecoupledSGDW(groups, lr=0.1, momentum=0.9)
    p.grad = torch.ones_like(p)
    looked_up(table, 1)
    opt.step()
    table.weight.grad = table.weight.grad.to_dense()
    refused(opt, [p, table.weight], r'group 1 \(shape \(4, 2\)\) has a torch.strided'
            ' gradient and a torch.sparse_coo buffer')
    other = DecoupledSGDW(table.parameters(), lr=0.1, momentum=0.9)
    other.step()                                    # the other way round a sum exists
    looked_up(table, 2)
    other.step()
    other.param_groups[0]['nesterov'] = True        # but not for Nesterov
    refused(other, [table.weight], 'sparse_coo gradient and a torch.strided buffer')


# ---- what Composer's OptimizerMonitor asks for

METRICS = json.loads((ROOT/'tests/composer_metrics.json').read_text())['cases']


def reported(case, cls=DecoupledAdamW, own=True):
    "What `cls` reports after each step of a recorded run; without `own` at another eps"
    ps = [as_tensor(v).requires_grad_() for v in case['params']]
    groups = [{'params': [p]} for p in ps] if case['groups'] else ps
    kwargs = case['kwargs'] if own else {**case['kwargs'], 'eps': 1e-2}
    opt, rows = cls(groups, **kwargs), []
    assert opt.report_per_parameter_metrics(ps[0], 'p', {}) == {}     # no step so far
    for t, factor in enumerate(case['factors']):
        for g in opt.param_groups: g['lr'] = case['kwargs']['lr']*factor
        for p in ps: p.grad = (2*p.detach() + 0.3*t).sin()
        opt.step()
        row = {}
        for i, p in enumerate(ps):
            assert opt.report_per_parameter_metrics(p, f'p{i}', row) is row
        rows.append({k: v.item() for k, v in row.items()})
    return rows


@pytest.mark.parametrize('case', METRICS, ids=name_of)
def test_recorded_metrics(case):
    rows = reported(case)
    assert [set(r) for r in rows] == [set(r) for r in case['metrics']]
    assert len(rows) == 4 and len(rows[0]) == 8
    def far(rows):
        worst = 0.
        for row, want in zip(rows, case['metrics']):
            for name, value in want.items(): worst = max(worst, abs(row[name] - value))
        return worst
    assert far(rows) < 1e-12
    assert far(reported(case, own=False)) > 1e-6


def test_metrics_of_each_group_and_of_ones_own():
    p, q = param(), param()
    groups = [{'params': [p]}, {'params': [q], 'lr': 0.3}]
    opt = DecoupledAdamW(groups, lr=0.1, weight_decay=0.)
    p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    opt.step()
    row = opt.report_per_parameter_metrics(p, 'p', {})
    opt.report_per_parameter_metrics(q, 'q', row)
    assert row['l2_norm/update/p'].item() == pytest.approx(0.1*3**0.5)
    assert row['l2_norm/update/q'].item() == pytest.approx(0.3*3**0.5)
    class Own(DecoupledAdamW):
        metric_functions = {'largest': lambda param, state, update: update.abs().max()}
    opt.__class__ = Own
    row = opt.report_per_parameter_metrics(q, 'q', {})
    assert {k: round(v.item(), 6) for k, v in row.items()} == {'largest/q': 0.3}
    stray = param()
    opt.state[stray]['step'] = torch.tensor(1.)
    with pytest.raises(ValueError, match='no group holds this parameter'):
        opt.report_per_parameter_metrics(stray, 's', {})


REDUCE = """
import json, sys, torch, torch.distributed as dist
from optimizers_explained.composer import DecoupledAdamW
dist.init_process_group('gloo')
rank = dist.get_rank()
whole, grad = torch.arange(1., 7.), torch.tensor([1., -2., 3., -4., 5., 6.])
def metrics(part):
    p = whole[part].clone().requires_grad_()
    p.grad = grad[part].clone()
    opt = DecoupledAdamW([p], lr=0.1)
    opt.step()
    return opt, opt.report_per_parameter_metrics(p, 'w', {})
opt, mine = metrics(slice(2) if rank == 0 else slice(2, None))
mine['mean'] = torch.tensor(float(rank + 1))
if rank == 1: mine['l2_norm/only'] = torch.tensor(3.)
got = opt.dist_reduce_metrics(opt.pre_reduce_metrics(mine))
want = metrics(slice(None))[1]
want.update({'l2_norm/only': torch.tensor(3.), 'mean': torch.tensor(1.5)})
assert set(got) == set(want), (set(got), set(want))
for k in want: assert abs(got[k].item() - want[k].item()) < 1e-6, (k, got[k], want[k])
part = metrics(slice(2))[1]
assert abs(part['l2_norm/param/w'].item() - got['l2_norm/param/w'].item()) > 1.
dist.destroy_process_group()
print('agreed')
"""


@pytest.mark.skipif(not torch.distributed.is_available(),
                    reason='this torch has no torch.distributed')
def test_lengths_of_a_parameter_in_two_parts():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    env = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), WORLD_SIZE='2')
    def start(rank):
        return subprocess.Popen(
            [sys.executable, '-c', REDUCE], cwd=ROOT, text=True,
            env={**os.environ, **env, 'RANK': str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for run in [start(0), start(1)]:
        out, err = run.communicate(timeout=120)
        assert 'agreed' in out, err[-2000:]


def test_warning(caplog):
    with caplog.at_level(logging.WARNING):
        DecoupledSGDW([param()], lr=0.1, weight_decay=9.9e-4)
    assert not caplog.records
    DecoupledSGDW([param()], lr=0.1, weight_decay=1e-3)
    DecoupledAdamW([param()], weight_decay=0.01)
    assert [r.levelname for r in caplog.records] == ['WARNING', 'WARNING']
    assert 'weight_decay=0.01' in caplog.text


@pytest.mark.parametrize('make', [DecoupledSGDW, DecoupledAdamW])
def test_a_rate_above_lr0_is_said_once(make):
    "OneCycleLR lifts a rate that was never meant, and the decay with it."
    def warned(lr, weight_decay=1e-4):
        p = torch.nn.Parameter(torch.ones(2))
        opt = make([p], lr=lr, weight_decay=weight_decay)
        sched = lr_scheduler.OneCycleLR(opt, 0.3, total_steps=10, cycle_momentum=False)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            for _ in range(9):
                p.grad = torch.ones(2)
                opt.step()
                sched.step()
        return [str(w.message) for w in caught]
    said, = warned(1e-3)
    assert 'is above lr0=0.001' in said and 'give that as lr0' in said
    assert warned(0.3) == [] == warned(1e-3, weight_decay=0)
