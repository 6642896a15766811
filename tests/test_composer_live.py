"""Composer's own classes beside the ports, in float64: weights, states and metrics.

Composer asks for torch below 2.7.1, and its optimizers run with a current one. How to
install it stands in the sentence of the skip below."""
import copy
import inspect
import logging

import pytest
import torch
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

from optimizers_explained import composer as ours
from optimizers_explained.problems import max_diff

try:
    from composer import Trainer, callbacks, loggers, models
    from composer import optim as live
except ImportError as e:
    pytest.skip(
        f"Composer does not import ({e}): only its recorded numbers are compared."
        " To install it: pip install torchvision torchmetrics torch_optimizer"
        " mosaicml-cli coolname py-cpuinfo importlib-metadata psutil tqdm,"
        " then pip install --no-deps mosaicml", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings('ignore:::composer')
NAMES = ['DecoupledSGDW', 'DecoupledAdamW']
STEPS, SHAPES = 50, [(3,), (2, 2), ()]


@pytest.fixture(autouse=True)
def quiet(): logging.getLogger('composer').setLevel('ERROR')


def tensors(seed=0):
    gen = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=gen, dtype=torch.float64) for s in SHAPES]


def leaves(): return [p.requires_grad_() for p in tensors()]


def backward(ps, t, missing=()):
    "Gradients that depend on the parameters and the step; none where `missing`"
    for i, p in enumerate(ps):
        if not p.requires_grad: continue                # autograd leaves it as it was
        p.grad = None if (t, i) in missing else (2*p.detach() + 0.3*t + i).sin()


SCHEDULES = dict(
    constant=lambda o: lr_scheduler.ConstantLR(o, factor=1.),
    cosine=lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS),
    steps=lambda o: lr_scheduler.StepLR(o, 10),
    warm_up=lambda o: lr_scheduler.LambdaLR(o, lambda t: min(1, (t + 1)/10)))
GROUPS = dict(
    one=lambda ps: ps,
    three=lambda ps: [
        {'params': ps[:1], 'lr': 0.02}, {'params': ps[1:2], 'weight_decay': 0.},
        {'params': ps[2:], 'lr': 0.005, 'weight_decay': 0.02}],
    empty=lambda ps: [{'params': []}, {'params': ps}])
RECIPES = dict(
    DecoupledSGDW=[
        dict(lr=0.05), dict(lr=0.05, momentum=0.9),
        dict(lr=0.05, momentum=0.9, dampening=0.3),
        dict(lr=0.05, momentum=0.9, nesterov=True),
        dict(lr=0.05, momentum=0.9, weight_decay=1e-2),
        dict(lr=0.05, momentum=0.9, weight_decay=1e-2, nesterov=True)],
    DecoupledAdamW=[
        dict(), dict(lr=0.05, weight_decay=1e-2),
        dict(lr=0.05, betas=(0.8, 0.9), eps=1e-4),
        dict(lr=0.05, weight_decay=1e-2, amsgrad=True)])
CASES = [(name, kw) for name in NAMES for kw in RECIPES[name]]
MISSING = {(t, i) for t in range(STEPS) for i in range(3) if (t + 2*i) % 7 == 0}


def train(lib, name, kw, groups='one', schedule='constant', missing=()):
    ps = leaves()
    opt = getattr(lib, name)(GROUPS[groups](ps), **kw)
    sched = SCHEDULES[schedule](opt)
    for t in range(STEPS):
        backward(ps, t, missing)
        opt.step()
        sched.step()
    return ps, opt


def states(opt, ps):
    "The tensors in the state of each parameter, by name"
    return [{k: v for k, v in opt.state[p].items() if v is not None} for p in ps]


def state_diff(a, b):
    assert [set(s) for s in a] == [set(s) for s in b]
    return max((max_diff(s[k], r[k]) for s, r in zip(a, b) for k in s), default=0.)


@pytest.mark.parametrize('groups', GROUPS)
@pytest.mark.parametrize('schedule', SCHEDULES)
@pytest.mark.parametrize('name,kw', CASES, ids=str)
def test_same_weights_and_states(name, kw, schedule, groups):
    for missing in ((), MISSING):
        a, opt = train(ours, name, kw, groups, schedule, missing)
        b, ref = train(live, name, kw, groups, schedule, missing)
        assert max_diff(a, b) < 1e-12
        assert state_diff(states(opt, a), states(ref, b)) < 1e-12
        assert max_diff(a, leaves()) > 1e-3


BASE = dict(DecoupledSGDW=dict(lr=0.05, weight_decay=0.01, momentum=0.9),
            DecoupledAdamW=dict(lr=0.05, weight_decay=0.01))
CHANGES = [
    ('DecoupledSGDW', dict(lr=0.0501)), ('DecoupledSGDW', dict(weight_decay=0.011)),
    ('DecoupledSGDW', dict(momentum=0.901)), ('DecoupledSGDW', dict(dampening=0.01)),
    ('DecoupledSGDW', dict(nesterov=True)), ('DecoupledAdamW', dict(lr=0.0501)),
    ('DecoupledAdamW', dict(weight_decay=0.011)),
    ('DecoupledAdamW', dict(betas=(0.9, 0.951))),
    ('DecoupledAdamW', dict(betas=(0.901, 0.95))),
    ('DecoupledAdamW', dict(eps=1e-4)), ('DecoupledAdamW', dict(amsgrad=True))]


@pytest.mark.parametrize('name,change', CHANGES, ids=str)
def test_another_number_shows(name, change):
    "The comparison above would have seen it"
    a, _ = train(ours, name, {**BASE[name], **change}, missing=MISSING)
    assert max_diff(a, train(live, name, BASE[name], missing=MISSING)[0]) > 1e-6


@pytest.mark.parametrize('name', NAMES)
def test_one_cycle_is_the_known_difference(name):
    "OneCycleLR overwrites Composer's initial_lr; put back for the steps, the two agree"
    def run(lib, mend):
        ps = leaves()
        opt = getattr(lib, name)(ps, lr=0.05, weight_decay=1e-3)
        group = opt.param_groups[0]
        sched = lr_scheduler.OneCycleLR(
            opt, 0.05, total_steps=STEPS + 1, cycle_momentum='betas' in group)
        overwritten = group['initial_lr']
        for t in range(STEPS):
            backward(ps, t)
            if mend: group['initial_lr'] = 0.05
            opt.step()
            group['initial_lr'] = overwritten           # the scheduler reads it, too
            sched.step()
        return ps
    assert max_diff(run(ours, False), run(live, True)) < 1e-12
    assert max_diff(run(ours, False), run(live, False)) > 1e-3


@pytest.mark.parametrize('name', NAMES)
def test_frozen_with_a_gradient_left_over(name):
    def run(lib, frozen=True):
        ps = leaves()
        opt = getattr(lib, name)(ps, lr=0.05, weight_decay=1e-3)
        for t in range(30):
            if frozen and t in (10, 20): ps[0].requires_grad_(t == 20)
            backward(ps, t)
            opt.step()
        return ps, states(opt, ps)
    (a, mine), (b, theirs) = run(ours), run(live)
    assert max_diff(a, b) < 1e-12 and state_diff(mine, theirs) < 1e-12
    assert max_diff(a[0], run(ours, frozen=False)[0][0]) > 1e-3


@pytest.mark.parametrize('name', NAMES)
def test_group_added_later(name):
    "Composer's SGDW needs the new group's initial_lr from its user"
    def run(lib, late=True):
        ps = leaves()
        opt = getattr(lib, name)(ps[:2], lr=0.05, weight_decay=1e-3)
        for t in range(STEPS):
            if late and t == 5:
                opt.add_param_group(dict(params=ps[2:], lr=0.02, initial_lr=0.02))
            for g in opt.param_groups: g['lr'] *= 0.99
            backward(ps, t)
            opt.step()
        return ps
    assert max_diff(run(ours), run(live)) < 1e-12
    assert max_diff(run(ours)[2], run(ours, late=False)[2]) > 1e-3


def continued(first, then, name, kw, groups, load=True):
    "Twenty steps in one library, the checkpoint, twenty steps in the other"
    ps = leaves()
    opt = getattr(first, name)(GROUPS[groups](ps), **kw)
    for t in range(20): backward(ps, t); opt.step()
    new = getattr(then, name)(GROUPS[groups](ps), **kw)
    if load: new.load_state_dict(copy.deepcopy(opt.state_dict()))
    if first is ours and then is live:                  # the line that Composer needs
        for g in new.param_groups: g['initial_lr'] = g.get('lr0', g['lr'])
    for t in range(20, 40): backward(ps, t); new.step()
    return ps


@pytest.mark.parametrize('groups', ['one', 'three'])
@pytest.mark.parametrize('name,kw', CASES, ids=str)
def test_checkpoints_move_both_ways(name, kw, groups):
    want = continued(live, live, name, kw, groups)
    for first, then in ((ours, live), (live, ours), (ours, ours)):
        assert max_diff(continued(first, then, name, kw, groups), want) < 1e-12
    if name == 'DecoupledAdamW' or 'momentum' in kw:    # else there is nothing to lose
        lost = continued(live, ours, name, kw, groups, load=False)
        assert max_diff(lost, want) > 1e-6


BUFFERS = [dict(), dict(momentum=0.9), dict(momentum=0.9, nesterov=True)]


@pytest.mark.parametrize('kw', BUFFERS, ids=str)
def test_sparse_gradients(kw):
    def run(lib, wd=1e-3):
        torch.manual_seed(0)
        table = torch.nn.Embedding(4, 2, sparse=True, dtype=torch.float64)
        opt = lib.DecoupledSGDW(table.parameters(), lr=0.1, weight_decay=wd, **kw)
        for t in range(STEPS):
            opt.zero_grad()
            table(torch.tensor([t % 4, 3, 3])).square().sum().backward()
            opt.step()
        return table.weight.detach()
    assert max_diff(run(ours), run(live)) < 1e-12
    assert max_diff(run(ours), run(ours, 2e-3)) > 1e-6


def test_a_sparse_gradient_in_adam():
    for lib in (ours, live):
        table = torch.nn.Embedding(4, 2, sparse=True)
        opt = lib.DecoupledAdamW(table.parameters())
        table(torch.tensor([1])).sum().backward()
        with pytest.raises(RuntimeError, match='sparse gradient'): opt.step()


@pytest.mark.parametrize('name', NAMES)
def test_a_tensor_as_lr(name):
    "The same steps; under a schedule Composer's initial_lr moves, the same tensor"
    def run(lib, schedule):
        ps = leaves()
        lr = torch.tensor(0.05, dtype=torch.float64)
        opt = getattr(lib, name)(ps, lr=lr, weight_decay=1e-2)
        sched = SCHEDULES[schedule](opt)
        for t in range(STEPS): backward(ps, t); opt.step(); sched.step()
        return ps
    assert max_diff(run(ours, 'constant'), run(live, 'constant')) < 1e-12
    assert max_diff(run(ours, 'cosine'), run(live, 'cosine')) > 1e-3


@pytest.mark.parametrize('name', NAMES)
def test_both_say_the_same(name, caplog):
    "An empty list, a large decay, no lr, a closure, the arguments and their defaults"
    def arguments(lib): return inspect.signature(getattr(lib, name)).parameters
    mine, theirs = arguments(ours), arguments(live)
    assert list(mine) == list(theirs)
    optional = [k for k, p in mine.items() if p.default is not p.empty]
    assert len(optional) == {'DecoupledSGDW': 4, 'DecoupledAdamW': 5}[name]
    assert [mine[k].default for k in optional] == [theirs[k].default for k in optional]
    for lib in (ours, live):
        make = getattr(lib, name)
        with pytest.raises(ValueError, match='optimizer got an empty parameter list'):
            make([], lr=0.1)
        if name == 'DecoupledSGDW':
            with pytest.raises(TypeError): make(leaves())
        logging.getLogger('composer').setLevel('WARNING')
        for wd, said in ((9.9e-4, 0), (1e-3, 1)):
            caplog.clear()
            opt = make(leaves(), lr=0.1, weight_decay=wd)
            assert len(caplog.records) == said
        assert opt.step(lambda: torch.tensor(3.)) == 3.


# ---- OptimizerMonitor

class Log:
    "What the callback hands to its logger"
    def __init__(self): self.rows = []
    def log_metrics(self, metrics): self.rows.append(dict(metrics))


class Stamp: batch = type('Count', (), {'value': 10})


class State:
    "The four things that OptimizerMonitor reads of Composer's State"
    fsdp_enabled = False
    timestamp = Stamp
    def __init__(self, model, opt): self.model, self.optimizers = model, [opt]


def monitored(lib, name, fsdp=False, wd=1e-2, groups=False, **kw):
    torch.manual_seed(0)
    layers = torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 1)
    model = torch.nn.Sequential(*layers).double()
    model[0].bias.requires_grad_(False)
    params = list(model.parameters())
    if groups: params = [{'params': params[:2]}, {'params': params[2:], 'lr': 0.3}]
    opt = getattr(lib, name)(params, lr=0.05, weight_decay=wd, **kw)
    monitor, log, state = callbacks.OptimizerMonitor(), Log(), State(model, opt)
    state.fsdp_enabled = fsdp
    for t in range(5):
        opt.param_groups[0]['lr'] = 0.05*(1 + t)/5
        opt.zero_grad()
        x = torch.full((2, 3), 1. + t, dtype=torch.float64)
        model(x).square().mean().backward()
        opt.step()
        monitor.batch_end(state, log)
    return log.rows


def row_diff(a, b):
    assert [set(r) for r in a] == [set(r) for r in b]
    return max(abs(r[k] - s[k]) for r, s in zip(a, b) for k in r)


KINDS = [
    ('DecoupledSGDW', {}), ('DecoupledAdamW', {}),
    ('DecoupledAdamW', dict(amsgrad=True))]


@pytest.mark.parametrize('fsdp', [False, True])
@pytest.mark.parametrize('name,kw', KINDS, ids=str)
def test_optimizer_monitor_logs_the_same(name, kw, fsdp, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'current_device', lambda: 'cpu')    # it always asks
    mine, theirs = monitored(ours, name, fsdp, **kw), monitored(live, name, fsdp, **kw)
    assert row_diff(mine, theirs) < 1e-12
    each = 1 if name == 'DecoupledSGDW' else 4     # of three parameters; and one of all
    assert len(mine) == 5 and len(mine[0]) == 3*each + 1
    assert row_diff(mine, monitored(live, name, fsdp, wd=2e-2, **kw)) > 1e-6


def test_optimizer_monitor_with_two_groups():
    "Only the update of the second group differs: Composer reads the first group's lr"
    mine = monitored(ours, 'DecoupledAdamW', groups=True)
    theirs = monitored(live, 'DecoupledAdamW', groups=True)
    pairs = list(zip(mine, theirs))
    far = {k for row, ref in pairs for k in row if abs(row[k] - ref[k]) > 1e-12}
    assert far == {'l2_norm/update/2.weight', 'l2_norm/update/2.bias'}


class Model(models.ComposerModel):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Linear(3, 1)

    def forward(self, batch): return self.net(batch[0])

    def loss(self, out, batch): return torch.nn.functional.mse_loss(out, batch[1])


def fit(lib, lr=0.05):
    "Composer's own Trainer, two epochs on eight rows: weights, and what was logged"
    gen = torch.Generator().manual_seed(0)
    x, y = torch.randn(8, 3, generator=gen), torch.randn(8, 1, generator=gen)
    rows = DataLoader(TensorDataset(x, y), batch_size=4)
    model, log = Model(), loggers.InMemoryLogger()
    opt = lib.DecoupledAdamW(model.parameters(), lr=lr, weight_decay=1e-2)
    trainer = Trainer(
        model=model, train_dataloader=rows, optimizers=opt, max_duration='2ep',
        callbacks=[callbacks.OptimizerMonitor(batch_log_interval=1)], loggers=[log],
        device='cpu', progress_bar=False)
    trainer.fit()
    lengths = {k: vs for k, vs in log.data.items() if k.startswith('l2_norm')}
    series = {k: [v for _, v in vs] for k, vs in lengths.items()}
    return [p.detach() for p in model.parameters()], series


def test_composers_trainer_cannot_tell():
    (a, mine), (b, theirs) = fit(ours), fit(live)
    assert max_diff(a, b) < 1e-6 and max_diff(a, fit(ours, 0.06)[0]) > 1e-3
    assert set(mine) == set(theirs) and len(mine) == 2*4 + 1
    for k, want in theirs.items():
        assert mine[k] == pytest.approx(want, rel=1e-4, abs=1e-6)
