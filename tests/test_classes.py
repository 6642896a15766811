"""Optimizers are classes, and clients treat them so: they ask, extend, copy, inspect
and compile them, hand them tensors as `lr`, sequences as `betas`, drive the rates."""
import copy
import functools
import inspect
import io
import pickle
import shutil
import subprocess
import sys
import timeit
import warnings
from collections import deque

import numpy as np
import pytest
import torch
from torch.optim import lr_scheduler

from optimizers_explained import optim
from optimizers_explained.steps import adam
from optimizers_explained.basic import fit
from optimizers_explained.contract import exercised
from optimizers_explained.core import StepOptimizer
from optimizers_explained.steps import decay, decay_rel, lion, sgd
from optimizers_explained.core import untraced
from optimizers_explained.contract.workbench import (
    SCHEDULERS, feed, leaves, refused, train, twins)
from optimizers_explained.problems import max_diff

SPEEDS = dict(
    loop=dict(foreach=False), foreach=dict(foreach=True), fused=dict(fused=True))
NAMES = list(optim.__all__)
every_name = pytest.mark.parametrize('name', NAMES)
every_speed = pytest.mark.parametrize('speed', SPEEDS)
above_lr0 = pytest.mark.filterwarnings('ignore:lr=.* is above lr0')
no_kernel = pytest.mark.filterwarnings('ignore:fused=True, and still')


def make_of(name, speed='loop', **more):
    return exercised(getattr(optim, name), **SPEEDS[speed], **more)


# ---- classes

@every_name
def test_each_is_a_class(name):
    cls = getattr(optim, name)
    opt = cls(leaves(), lr=0.1)
    assert inspect.isclass(cls) and issubclass(cls, StepOptimizer)
    assert type(opt) is cls and isinstance(opt, torch.optim.Optimizer)
    assert [n for n in NAMES if isinstance(opt, getattr(optim, n))] == [name]
    assert cls.__name__ == name and cls.__module__.startswith('optimizers_explained.')
    steps = ', '.join(opt.state_dict()['steps'])
    assert repr(opt).startswith(f'{name} [{steps}] (\nParameter Group 0')


@every_name
@no_kernel
@every_speed
def test_copies_are_of_the_same_class_and_go_on_alike(name, speed):
    ps = leaves()
    opt = make_of(name, speed)(ps)
    train(opt, ps, range(3))
    for copier in copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o)):
        one, other = copier((opt, ps)), copier((opt, ps))
        assert type(one[0]) is type(opt) and repr(one[0]) == repr(opt)
        train(*one, range(3, 6)), train(*other, range(3, 6))
        assert max_diff(one[1], other[1]) == 0. < max_diff(one[1], ps)


def double(p, g, state, *, factor=2.): return g*factor


class Doubled(StepOptimizer):
    "Steps and a signature of one's own."
    def __init__(self, params, lr=1e-3, *, factor=2.):
        super().__init__(params, [double, sgd], lr=lr, factor=factor)


class Hotter(optim.AdamW):
    "Another default."
    def __init__(self, params, lr=0.5, **more): super().__init__(params, lr=lr, **more)


class Named(optim.AdamW):
    "Nothing of its own."


@no_kernel
@every_speed
def test_subclasses(speed):
    def run(make, **kw):
        ps = leaves()
        opt = make(ps, **kw)
        return opt, train(opt, ps)
    opt, got = run(Doubled, lr=0.1)
    want = run(torch.optim.SGD, lr=0.2)[1]
    assert type(opt).__name__ == 'Doubled' and max_diff(got, want) < 1e-12
    for cls, lr in ((Hotter, 0.5), (Named, 1e-3)):
        opt, got = run(cls, **SPEEDS[speed])
        assert isinstance(opt, optim.AdamW) and repr(opt).startswith(cls.__name__)
        assert max_diff(got, run(optim.AdamW, lr=lr, **SPEEDS[speed])[1]) == 0.
        assert type(pickle.loads(pickle.dumps(opt))) is cls
    assert inspect.signature(Named) == inspect.signature(optim.AdamW)


@every_name
def test_wrong_arguments_are_named(name):
    cls, w = getattr(optim, name), leaves()
    takes = list(inspect.signature(cls).parameters)
    refused([f'momentun=0.9 is no argument of {name}', ', '.join(takes)],
            cls, w, lr=0.1, momentun=0.9)
    refused([f'capturable=1 is no argument of {name}'], cls, w, lr=1., capturable=1)
    refused([f'params is missing: {name} has no default for it'], cls)
    if name in ('LARS', 'DecoupledSGDW'): refused([f'lr is missing: {name}'], cls, w)
    else: cls(w)


def test_wrong_arguments_of_ones_own_class_are_named():
    w = leaves()
    refused(['largets=2 is no argument of Doubled; it takes params, lr, factor'],
            Doubled, w, largets=2)
    refused(['momentun=0.9 is no argument of AdamW'], Hotter, w, momentun=0.9)
    refused(['momentun=0.9', 'none of the steps', 'lr'],
            StepOptimizer, w, [sgd], lr=0.1, momentun=0.9)
    with pytest.raises(TypeError, match='positional'): optim.SGD(w, *[0.1]*6)


@pytest.mark.parametrize('name', ['SGD', 'Adam', 'AdamW'])
def test_names_order_and_defaults_are_torchs(name):
    classes = getattr(optim, name), getattr(torch.optim, name)
    ours, theirs = (inspect.signature(cls).parameters for cls in classes)
    where = [k for k, p in theirs.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert where == [k for k, p in ours.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert {k: p.default for k, p in ours.items() if k != 'debug'} == \
        {k: theirs[k].default for k in ours if k != 'debug'}


@every_name
def test_every_argument_is_annotated(name):
    takes = inspect.signature(getattr(optim, name)).parameters
    assert [k for k, p in takes.items() if p.annotation is p.empty] == []


def test_parameters_in_every_form():
    def groups(ps): return [dict(params=ps[:1], lr=0.2, tag='a'), dict(params=ps[1:])]
    def pairs(ps): return [(f'p{i}', p) for i, p in enumerate(ps)]
    forms = dict(
        generator=lambda ps: (p for p in ps), names=pairs,
        groups=lambda ps: iter(groups(ps)), tuples=tuple,
        values=lambda ps: dict(pairs(ps)).values())
    for form, wrap in forms.items():
        ps, qs = leaves(), leaves()
        opt = optim.SGD(wrap(ps), lr=0.1, momentum=0.9)
        reference = torch.optim.SGD(wrap(qs), lr=0.1, momentum=0.9)
        assert max_diff(train(opt, ps), train(reference, qs)) < 1e-12, form
    ps = leaves()
    first, second = optim.SGD(groups(ps)).param_groups
    assert (first['lr'], first['tag']) == (0.2, 'a')
    assert second['lr'] == 1e-3 and 'tag' not in second


# ---- clients

def test_the_trainer_of_transformers(tmp_path):
    tf = pytest.importorskip('transformers', reason='transformers is not installed')
    config = tf.GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=1,
                           n_head=2, bos_token_id=0, eos_token_id=0)
    rows = torch.randint(0, 32, (8, 8), generator=torch.Generator().manual_seed(0))
    data = [dict(input_ids=r, labels=r) for r in rows]
    def trained(cls):
        torch.manual_seed(0)
        model = tf.GPT2LMHeadModel(config)
        args = tf.TrainingArguments(
            str(tmp_path), max_steps=3, use_cpu=True, report_to=[], save_strategy='no',
            disable_tqdm=True, seed=0)
        trainer = tf.Trainer(model, args, train_dataset=data,
                             optimizer_cls_and_kwargs=(cls, dict(lr=1e-2)))
        trainer.train()
        assert isinstance(trainer.optimizer.optimizer, cls)
        return list(model.parameters())
    assert max_diff(trained(optim.AdamW), trained(torch.optim.AdamW)) < 1e-5


def lit(make):
    "A lightning module that is given what makes its optimizer."
    lightning = pytest.importorskip('lightning', reason='lightning is not installed')
    class Net(lightning.LightningModule):
        def __init__(self, optimizer=make):
            super().__init__()
            self.net, self.optimizer = torch.nn.Linear(2, 1), optimizer
        def training_step(self, batch, i): return self.net(batch).pow(2).mean()
        def configure_optimizers(self):
            opt = self.optimizer(self.parameters())
            sched = lr_scheduler.CosineAnnealingLR(opt, 4)
            by_step = dict(scheduler=sched, interval='step')
            return dict(optimizer=opt, lr_scheduler=by_step)
    return lightning, Net


@pytest.mark.filterwarnings('ignore')
def test_lightning(tmp_path):
    data = torch.utils.data.DataLoader(torch.eye(2))
    def trained(cls):
        lightning, net = lit(functools.partial(cls, lr=0.1))
        torch.manual_seed(0)
        module = net()
        trainer = lightning.Trainer(
            max_steps=4, accelerator='cpu', logger=False, default_root_dir=tmp_path,
            enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False)
        trainer.fit(module, data)
        assert isinstance(trainer.optimizers[0], cls)
        return list(module.parameters())
    assert max_diff(trained(optim.AdamW), trained(torch.optim.AdamW)) < 1e-6


@pytest.mark.parametrize('name', NAMES)
def test_the_command_line_of_lightning(name):
    "A class in a configuration, with arguments of its own; parameters come later."
    missing = 'is not installed: no command line of lightning'
    args = pytest.importorskip('jsonargparse', reason=f'jsonargparse {missing}')
    cli = pytest.importorskip('lightning.pytorch.cli', reason=f'lightning {missing}')
    parser = args.ArgumentParser(exit_on_error=False)
    parser.add_argument('--opt', type=cli.OptimizerCallable)
    path = f'optimizers_explained.optim.{name}'
    config = parser.parse_args([f'--opt={path}', '--opt.lr=0.25', '--opt.foreach=true'])
    instantiate = getattr(parser, 'instantiate', None) or parser.instantiate_classes
    opt = instantiate(config).opt(leaves())
    assert type(opt) is getattr(optim, name)
    assert opt.param_groups[0]['lr'] == 0.25 and opt.foreach is True
    for wrong in '--opt.lr=a', '--opt.momentun=1':
        with pytest.raises(args.ArgumentError):
            parser.parse_args([f'--opt={path}', wrong])


def test_zero_redundancy_and_backward_hooks(tmp_path):
    if not torch.distributed.is_available(): pytest.skip('torch without distributed')
    code = f'''
import torch, torch.distributed as dist
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.optim import _apply_optimizer_in_backward
from optimizers_explained import optim
meet = 'file://{tmp_path}/rendezvous'
dist.init_process_group('gloo', init_method=meet, rank=0, world_size=1)
def sharded(cls):
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 2)
    opt = ZeroRedundancyOptimizer(net.parameters(), optimizer_class=cls, lr=0.1)
    for _ in range(3):
        opt.zero_grad()
        net(torch.ones(3)).pow(2).sum().backward()
        opt.step()
    opt.consolidate_state_dict()
    return opt, list(net.parameters())
def in_backward(cls):
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 2)
    _apply_optimizer_in_backward(cls, net.parameters(), dict(lr=0.1))
    for _ in range(3): net(torch.ones(3)).pow(2).sum().backward()
    return None, list(net.parameters())
for way in sharded, in_backward:
    (opt, ours), (_, theirs) = way(optim.AdamW), way(torch.optim.AdamW)
    assert max((a - b).abs().max().item() for a, b in zip(ours, theirs)) < 1e-6, way
    if opt: assert type(opt.optim) is optim.AdamW
dist.destroy_process_group()
'''
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_stochastic_weight_averaging():
    def run(cls):
        torch.manual_seed(0)
        net = torch.nn.Linear(3, 2)
        opt = cls(net.parameters(), lr=0.1)
        mean = torch.optim.swa_utils.AveragedModel(net)
        sched = torch.optim.swa_utils.SWALR(opt, swa_lr=0.02, anneal_epochs=3)
        for _ in range(5):
            opt.zero_grad()
            net(torch.ones(3)).pow(2).sum().backward()
            opt.step(), mean.update_parameters(net), sched.step()
        return list(mean.module.parameters()), opt.param_groups[0]['lr']
    (ours, lr), (theirs, want) = run(optim.AdamW), run(torch.optim.AdamW)
    assert max_diff(ours, theirs) < 1e-6 and lr == want


# ---- a tensor as lr

def scheduled(make, schedule, lr, steps=8):
    ps, rates = leaves(), []
    opt = make(ps, lr=lr)
    sched = schedule(opt)
    plateau = isinstance(sched, lr_scheduler.ReduceLROnPlateau)
    for t in range(steps):
        rates.append(float(opt.param_groups[0]['lr']))
        train(opt, ps, [t])
        sched.step(*[1.] if plateau else [])
    return opt, ps, rates


@above_lr0
@no_kernel
@every_speed
@every_name
def test_a_tensor_is_the_number_in_it(name, speed):
    "Bit for bit, for a tensor of either size and kind, at the lr and in the betas."
    for rate in torch.tensor(0.05), torch.tensor([0.05], dtype=torch.float64):
        ps, qs = leaves(), leaves()
        opt = make_of(name, speed, lr=rate)(ps)
        other = make_of(name, speed, lr=rate.item())(qs)
        assert max_diff(train(opt, ps), train(other, qs)) == 0.
        assert opt.param_groups[0]['lr'] is rate
        rate.fill_(0.03)                                   # by its owner, in place
        old, rs = copy.deepcopy((other, qs))
        other.param_groups[0]['lr'] = rate.item()
        moved = train(opt, ps)
        assert max_diff(moved, train(other, qs)) == 0. < max_diff(moved, train(old, rs))
    if 'betas' not in opt.defaults: return
    ps, qs = leaves(), leaves()
    pair = torch.tensor(0.5), torch.tensor(0.75)
    opt = make_of(name, speed, betas=pair)(ps)
    want = train(make_of(name, speed, betas=(0.5, 0.75))(qs), qs)
    assert max_diff(train(opt, ps), want) == 0.
    assert all(a is b for a, b in zip(opt.param_groups[0]['betas'], pair))


@above_lr0
@no_kernel
@every_speed
@pytest.mark.parametrize('kind', SCHEDULERS)
def test_schedulers_change_the_tensor_as_in_torch(kind, speed):
    "In place, which older versions of torch do not do in every scheduler."
    def run(make):
        rate = torch.tensor(0.05, dtype=torch.float64)
        opt, ps, rates = scheduled(make, SCHEDULERS[kind], rate)
        return ps, rates, opt.param_groups[0]['lr'] is rate
    got, rates, in_place = run(make_of('AdamW', speed))
    want, theirs, kept = run(exercised(torch.optim.AdamW, foreach=False))
    assert rates == theirs and in_place == kept and len(set(rates)) > 1
    assert max_diff(got, want) < 1e-12


@no_kernel
@every_speed
@pytest.mark.parametrize('name', ['SGD', 'Adam', 'AdamW'])
def test_a_tensor_as_torch_takes_it(name, speed):
    "torch rounds some products to the tensor's own type, ours are of float64."
    falling = SCHEDULERS['ExponentialLR']
    for dtype, near in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        rate = torch.tensor(0.05, dtype=dtype)
        ours = scheduled(make_of(name, speed), falling, rate.clone())[1]
        make = exercised(getattr(torch.optim, name), foreach=False)
        assert max_diff(ours, scheduled(make, falling, rate)[1]) < near


@above_lr0
@no_kernel
@every_speed
@pytest.mark.parametrize('name', ['SGD', 'AdamW', 'DecoupledAdamW'])
def test_a_tensor_is_kept_by_checkpoints_and_copies(name, speed):
    ps, rate = leaves(), torch.tensor(0.05)
    opt = make_of(name, speed, lr=rate)(ps)
    train(opt, ps)
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    qs = twins(ps)
    other = make_of(name, speed, lr=0.9)(qs)
    other.load_state_dict(torch.load(file, weights_only=True))
    copied, rs = copy.deepcopy((opt, ps))
    reread, ss = pickle.loads(pickle.dumps((opt, ps)))
    for again in other, copied, reread:
        kept = again.param_groups[0]['lr']
        assert torch.equal(kept, rate) and kept is not rate
    want = train(opt, ps, range(5, 9))
    for again, xs in (other, qs), (copied, rs), (reread, ss):
        assert max_diff(train(again, xs, range(5, 9)), want) == 0.


def test_a_tensor_in_one_group_and_shared():
    a, b = leaves()
    rate = torch.tensor(0.5)
    opt = optim.SGD([dict(params=[a]), dict(params=[b], lr=rate)], lr=0.25)
    assert opt.param_groups[0]['lr'] == 0.25 and opt.param_groups[1]['lr'] is rate
    shared = optim.SGD([dict(params=[a]), dict(params=[b])], lr=rate)    # as in torch
    assert all(g['lr'] is rate for g in shared.param_groups)


def test_lr0_is_a_number():
    for lr in torch.tensor(0.5), np.float32(0.5), 0.5:
        opt = optim.DecoupledSGDW(leaves(), lr=lr, weight_decay=0.1)
        assert type(opt.param_groups[0]['lr0']) is float
        opt.param_groups[0]['lr'] *= 0.5                   # in place, if a tensor
        assert opt.param_groups[0]['lr0'] == 0.5


def seen_by(**hypers):
    "What the steps get."
    seen = []
    def look(p, g, state, *, lr, betas=(0.9, 0.99), mask=None):
        seen.append((lr, betas, mask))
    p = leaves()[0]
    p.grad = torch.ones_like(p)
    opt = StepOptimizer([p], [look, sgd], **hypers)
    opt.step()
    return seen[0]


def test_steps_get_plain_numbers():
    rate, mask = torch.tensor(0.5), torch.tensor(2.)
    lr, betas, given = seen_by(lr=rate, betas=[rate, 0.5], mask=mask)
    assert (lr, betas) == (0.5, (0.5, 0.5)) and type(lr) is type(betas[0]) is float
    assert given is mask             # a name that means nothing to this package
    assert type(seen_by(lr=np.float64(0.5))[0]) is float


@pytest.mark.parametrize('lr,words', [
    (torch.tensor(-1.), ['lr', '>= 0', 'tensor(-1.)']),
    (torch.tensor(float('nan')), ['lr', 'tensor(nan)']),
    (torch.tensor(float('inf')), ['lr', 'finite', 'tensor(inf)']),
    (torch.tensor([0.1, 0.2]), ['lr', 'a tensor of one', 'tensor([0.1000, 0.2000])']),
    (torch.tensor([]), ['lr', 'a tensor of one', 'tensor([])']),
    (torch.ones((), device='meta'), ['lr', 'a tensor of one', 'meta']),
    (torch.tensor(0.1 + 1j), ['lr', 'a tensor of one', '1.j']),
    (np.array([0.1, 0.2]), ['lr', 'array([0.1, 0.2])']),
    (1j, ['lr', '1j'])])
def test_tensors_that_are_no_rate(lr, words):
    w, _ = leaves()
    refused(words, optim.SGD, [w], lr=lr)
    refused(words, optim.SGD, [dict(params=[w], lr=lr)])


# ---- betas

PAIRS = dict(
    list=[0.5, 0.75], tuple=(0.5, 0.75), deque=deque([0.5, 0.75]),
    array=np.array([0.5, 0.75]), float32=np.array([0.5, 0.75], dtype=np.float32),
    numpy=(np.float64(0.5), np.float32(0.75)), mixed=[0.5, np.float64(0.75)],
    tensor=torch.tensor([0.5, 0.75]))


@no_kernel
@every_speed
@pytest.mark.parametrize('kind', PAIRS)
@pytest.mark.parametrize('where', ['argument', 'group'])
def test_betas_are_any_sequence_of_two_numbers(kind, where, speed):
    def made(betas, ps):
        if where == 'argument': return make_of('AdamW', speed, betas=betas)(ps)
        return make_of('AdamW', speed)([dict(params=ps, betas=betas)])
    ps, qs = leaves(), leaves()
    opt = made(PAIRS[kind], ps)
    kept = opt.param_groups[0]['betas']
    assert kept == (0.5, 0.75) and type(kept) is tuple
    assert {type(b) for b in kept} == {float}
    assert max_diff(train(opt, ps), train(made((0.5, 0.75), qs), qs)) == 0.
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    opt.load_state_dict(torch.load(file, weights_only=True))     # no array in there


@pytest.mark.parametrize('betas', [
    0.9, '99', None, (0.9,), (0.9, 0.9, 0.9), [], (0.9, 1.), (-0.1, 0.9),
    (0.9, float('nan')), ('a', 'b'), {0.5, 0.9}, {0.5: 1, 0.9: 2},
    iter([0.5, 0.9]), (b for b in (0.5, 0.9)), torch.tensor([0.9, 1.]),
    torch.tensor(0.9), torch.ones(2, device='meta'), np.ones((2, 2))],
    ids=lambda b: type(b).__name__)
@pytest.mark.parametrize('name', ['Adam', 'DecoupledAdamW', 'Lion', 'LAMB'])
def test_other_betas_are_refused(name, betas):
    w, _ = leaves()
    words = ['betas must be two numbers in [0, 1), got', repr(betas)]
    refused(words, getattr(optim, name), [w], betas=betas)
    refused(words, getattr(optim, name), [dict(params=[w], betas=betas)])


def blur(p, g, state, *, weights=(1., 2., 1.)):
    return g*(weights[1]/sum(weights))


@no_kernel
@every_speed
def test_tuples_of_ones_own(speed):
    def run(weights):
        ps = leaves()
        opt = StepOptimizer(ps, [blur, sgd], lr=0.1, weights=weights, **SPEEDS[speed])
        return opt.param_groups[0]['weights'], train(opt, ps)
    kept, got = run([2, 3, 3])
    assert kept == (2, 3, 3) and max_diff(got, run((2, 3, 3))[1]) == 0.
    assert run(np.array([2., 3., 3.]))[0] == (2., 3., 3.)
    for bad in ([1, 2], 'abc', iter([1, 2, 3])):
        refused(['weights must be 3 values in an order', repr(bad)],
                StepOptimizer, leaves(), [blur, sgd], lr=0.1, weights=bad)


def test_numbers_of_numpy_are_stored_as_pythons():
    given = dict(lr=np.float64(0.1), momentum=np.float32(0.5), nesterov=np.bool_(True))
    opt = optim.SGD(leaves(), **given)
    group = opt.param_groups[0]
    assert [type(group[k]) for k in given] == [float, float, bool]
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    assert torch.load(file, weights_only=True)['param_groups'][0]['lr'] == 0.1


def test_speeds_and_switches_are_checked():
    w = leaves()
    for k, bad in dict(foreach=np.array([1, 2]), fused='auto', debug='yes').items():
        refused([f'{k} must be True', repr(bad)], optim.SGD, w, **{k: bad})
    refused(['nesterov must be True or False', '[1]'],
            optim.SGD, w, momentum=0.9, nesterov=[1])


# ---- torch.compile

X = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))


def compiled(backend, speed, steps=5):
    "Parameters, losses and frames compiled after each step of a scheduled training."
    from torch._dynamo.utils import counters
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    layers = torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)
    net = torch.nn.Sequential(*layers)
    opt = optim.AdamW(net.parameters(), lr=0.1, **SPEEDS[speed])
    sched = lr_scheduler.CosineAnnealingLR(opt, steps)
    def step():
        opt.zero_grad()
        loss = net(X).pow(2).mean()
        loss.backward()
        opt.step()
        return loss
    if backend: step = torch.compile(step, backend=backend)
    losses, frames = [], []
    for _ in range(steps):
        losses.append(step().item())
        sched.step()
        frames.append(counters['frames']['ok'])
    return list(net.parameters()), losses, frames


@no_kernel
@every_speed
@pytest.mark.parametrize('backend', ['eager', 'aot_eager'])
def test_a_compiled_train_step(backend, speed):
    want, losses, _ = compiled(None, speed)
    got, seen, frames = compiled(backend, speed)
    assert max_diff(got, want) == 0. and seen == losses
    assert frames[0] > 0 and len(set(frames)) == 1, f'compiled again: {frames}'


@pytest.mark.skipif(not shutil.which('g++'), reason='inductor needs a C++ compiler')
def test_a_train_step_in_inductor():
    got, _, frames = compiled('inductor', 'fused')
    assert max_diff(got, compiled(None, 'fused')[0]) < 1e-5 and len(set(frames)) == 1


@pytest.mark.parametrize('making', ['outside', 'inside'])
def test_the_first_step_of_a_process_is_compiled(making):
    "Nothing has been prepared by an earlier step, or by an earlier optimizer."
    code = f'''
import torch
from optimizers_explained import optim
p = torch.nn.Parameter(torch.ones(3))
def make(): return optim.AdamW([p], lr=0.5, fused=True)
opt = make() if {making == 'outside'} else None
@torch.compile(backend='eager')
def step():
    o = opt or make()
    p.grad = None
    p.pow(2).sum().backward()
    o.step()
step()
assert torch.allclose(p, torch.tensor(0.995 - 0.5)), p
'''
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def in_compiled_code(use, make):
    "What `use(opt, p, q)` returns there and outside."
    def run(compiles):
        torch._dynamo.reset()
        p, q = (torch.ones(3, requires_grad=True) for _ in range(2))
        p.grad, q.grad = torch.full((3,), 2.), torch.ones(3)
        opt = make([p])
        call = torch.compile(use, backend='eager') if compiles else use
        out = call(opt, p, q)
        return str(out), p.detach(), q.detach(), p.grad is None
    return run(True), run(False)


def add_a_group(opt, p, q):
    opt.add_param_group(dict(params=[q], lr=0.5))
    opt.step()


def save_and_load(opt, p, q):
    opt.step()
    saved = opt.state_dict()
    opt.load_state_dict(saved)
    return saved


def clear(opt, p, q):
    opt.step()
    opt.zero_grad()
    return repr(opt)


def closure(opt, p, q):
    def loss_of():
        opt.zero_grad()
        loss = p.pow(2).sum()
        loss.backward()
        return loss
    return opt.step(loss_of)


@no_kernel
@every_speed
@pytest.mark.parametrize('use', [add_a_group, save_and_load, clear, closure])
def test_other_methods_in_compiled_code(use, speed):
    make = functools.partial(optim.AdamW, **SPEEDS[speed])
    there, outside = in_compiled_code(use, make)
    assert str(there) == str(outside)


def test_a_closure_may_run_a_compiled_model():
    "Only a step that is traced is hidden: an eager one leaves the compiler on."
    graphs, net = [], torch.nn.Linear(3, 1)
    def backend(graph, _): return graphs.append(graph) or graph
    model = torch.compile(net, backend=backend)
    opt = optim.SGD(net.parameters(), lr=0.1)
    def loss_of():
        opt.zero_grad()
        loss = model(torch.ones(1, 3)).sum()
        loss.backward()
        return loss
    torch._dynamo.reset()
    opt.step(loss_of)
    assert len(graphs) == 1


def test_importing_does_not_load_the_compiler():
    code = ('import sys, optimizers_explained.optim\n'
            'print("torch._dynamo" in sys.modules)')
    out = subprocess.check_output([sys.executable, '-c', code], text=True)
    assert out == 'False\n'


def test_hiding_a_step_costs_little():
    def bare(): pass
    hidden = untraced(bare)
    hidden()
    def seconds(f): return min(timeit.repeat(f, number=10_000, repeat=9))/10_000
    assert seconds(hidden) - seconds(bare) < 2e-6


# ---- lr0 as a placeholder

def told(call):
    "The warnings about `lr0`."
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        call()
    return [w for w in caught if 'above lr0' in str(w.message)]


def one_cycle(make, steps=10, peak=0.3):
    ps = leaves()
    opt = make(ps)
    sched = lr_scheduler.OneCycleLR(opt, peak, total_steps=steps, cycle_momentum=False)
    for t in range(steps): train(opt, ps, [t]), sched.step()
    return opt, ps


REL = dict(lr=1e-3, weight_decay=1e-3)


@no_kernel
@every_speed
@pytest.mark.parametrize('name', ['DecoupledSGDW', 'DecoupledAdamW'])
def test_a_rate_above_lr0_warns_once(name, speed):
    make = functools.partial(getattr(optim, name), **REL, **SPEEDS[speed])
    (warning,) = told(lambda: one_cycle(make))
    for words in ('of group 0 is above lr0=0.001', 'weight_decay=0.001', 'lr0.'):
        assert words in str(warning.message)
    assert warning.category is UserWarning and warning.filename == __file__


def test_the_warning_says_how_much():
    p, _ = leaves()
    opt = optim.DecoupledSGDW([p], lr=1e-3, weight_decay=1e-3)
    feed([p], 0)
    opt.param_groups[0]['lr'] = 0.3
    (warning,) = told(opt.step)
    assert 'lr=0.3 of group 0' in str(warning.message)
    assert 'takes 30% off every weight' in str(warning.message)


@pytest.mark.parametrize('make', [
    functools.partial(optim.DecoupledSGDW, lr0=0.3, **REL),
    functools.partial(optim.DecoupledAdamW, lr0=0.3, **REL),
    functools.partial(optim.DecoupledSGDW, lr=0.3, weight_decay=1e-3),
    functools.partial(optim.DecoupledSGDW, lr=torch.tensor(0.3), weight_decay=1e-3),
    functools.partial(optim.DecoupledSGDW, lr=1e-3),
    functools.partial(optim.AdamW, **REL),
    lambda ps: optim.AdamW([dict(params=ps, lr0=1e-3)], **REL),      # nobody's key
    lambda ps: optim.DecoupledSGDW([dict(params=ps, lr0=0.3)], **REL)])
def test_no_warning_where_the_rate_was_meant(make):
    assert told(lambda: one_cycle(make)) == []


def test_lr0_as_an_argument_is_lr0_in_the_group():
    def run(groups=lambda ps: ps, **more):
        kw = {**REL, **more}
        return one_cycle(lambda ps: optim.DecoupledSGDW(groups(ps), **kw))[1]
    ours = run(lr0=0.3)
    by_group = run(lambda ps: [dict(params=ps, lr0=0.3)])
    assert max_diff(ours, by_group) == max_diff(ours, run(lr=0.3)) == 0.
    assert max_diff(ours, run(lr0=0.4)) > 0.
    refused(['relative to lr0', 'lr0=0'], optim.DecoupledSGDW, leaves(), lr0=0., **REL)
    refused(['lr0', '-1'], optim.DecoupledSGDW, leaves(), lr0=-1, **REL)


def test_the_warning_of_later_groups_steps_of_ones_own_and_copies():
    def high(opt, p):
        feed([p], 0)
        return told(opt.step)
    a, b = leaves()
    groups = [dict(params=[a], lr0=0.1), dict(params=[b])]
    opt = StepOptimizer(groups, [decay_rel, lion, sgd], lr=0.01, weight_decay=0.1)
    assert high(opt, b) == []
    opt.param_groups[1]['lr'] = torch.tensor(0.02)
    copied, (_, d) = copy.deepcopy((opt, [a, b]))
    (warning,) = high(opt, b)
    assert 'of group 1' in str(warning.message)
    assert high(opt, b) == []                              # once
    opt.load_state_dict(opt.state_dict())
    assert high(opt, b) == []                              # it is the same optimizer
    assert len(high(copied, d)) == 1                       # and this is another


def test_the_warning_points_past_this_package():
    net = torch.nn.Linear(2, 1)
    opt = optim.DecoupledSGDW(net.parameters(), lr=1e-3, weight_decay=0.1)
    opt.param_groups[0]['lr'] = 0.1
    data = [(torch.ones(1, 2), torch.ones(1, 1))]
    loss = torch.nn.functional.mse_loss
    (warning,) = told(lambda: fit(1, net, loss, opt, data, data, progress=False))
    assert warning.filename == __file__
    pointed = open(__file__).read().splitlines()[warning.lineno - 1]
    assert 'fit(1, net, loss' in pointed


@pytest.mark.filterwarnings('ignore')
def test_one_cycle_of_fastai():
    fastai = pytest.importorskip('fastai.basics', reason='fastai is not installed')
    from fastai.callback import progress, schedule  # noqa: F401 (patch the learner)
    from fastai.optimizer import OptimWrapper
    def warned(**kw):
        x = torch.randn(32, 2, generator=torch.Generator().manual_seed(0))
        data = torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True))
        dls = fastai.DataLoaders.from_dsets(data, data, bs=8)
        opt_func = functools.partial(OptimWrapper, opt=optim.DecoupledSGDW, **REL, **kw)
        learn = fastai.Learner(dls, torch.nn.Linear(2, 1), loss_func=torch.nn.MSELoss(),
                               opt_func=lambda ps, lr: opt_func(ps))
        def run():
            with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1, 0.3)
        return len(told(run))
    assert warned() == 1 and warned(lr0=0.3) == 0


def test_steps_of_our_own_pages_still_make_an_optimizer():
    ps, qs = leaves(), leaves()
    kw = dict(lr=0.05, weight_decay=0.1)
    by_hand = StepOptimizer(ps, [decay, adam, sgd], **kw)
    assert max_diff(train(by_hand, ps), train(optim.AdamW(qs, **kw), qs)) == 0.
    assert repr(by_hand).startswith('StepOptimizer [decay, adam, sgd] (')
