"""`fused=True` and `foreach=True` against the loop.

Numbers, state that moves between the three, fallbacks, processes, sharded parameters,
and Triton's interpreter."""
import os
import re
import socket
import subprocess
import sys
import time
import warnings
import weakref
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from optimizers_explained import optim
from optimizers_explained.speed import compiler, dispatch, memory
from optimizers_explained.steps import adam
from optimizers_explained.checks import takes
from optimizers_explained.contract import exercised
from optimizers_explained.core import StepOptimizer
from optimizers_explained.steps import decay, ema, l2, momentum, sgd
from optimizers_explained.problems import max_diff
from optimizers_explained.steps import lars, trust

ROOT = Path(__file__).resolve().parents[1]
SHAPES = [(3,), (2, 4), (100, 70), (5, 5, 3, 3),
          (7,), (), (0, 3), (40_000,)]
LOOP, LISTS, KERNEL = dict(foreach=False), dict(foreach=True), dict(fused=True)
WAYS = dict(loop=LOOP, foreach=LISTS, fused=KERNEL)
REASON = 'fused=True, and still some parameters are stepped without a kernel: '
HAVE_KERNELS = {None, ''} # reasons against one: none, or that the state is still empty


# --- steps in every style
def functional(p, g, state, *, beta=0.9):
    state['sum'] = state['sum']*beta + g if 'sum' in state else g.clone()
    return state['sum']

def clip_norm(p, g, state, *, longest=0.1):
    return g*(longest/g.norm().clamp(min=longest))

def lookahead(p, g, state, *, k=5, alpha=0.5):
    if 'slow' not in state: state.update(slow=p.detach().clone(), count=0)
    state['count'] += 1
    if state['count'] % k == 0:
        p.copy_(state['slow'].add_(p - state['slow'], alpha=alpha))

def radam(p, g, state, *, lr, betas=(0.9, 0.99), eps=1e-5):
    if 'm' not in state: state.update(m=torch.zeros_like(p), v=torch.zeros_like(p), t=0)
    t, (b1, b2), m, v = state['t'] + 1, betas, state['m'], state['v']
    state['t'] = t
    m.mul_(b1).add_(g, alpha=1 - b1)
    v.mul_(b2).addcmul_(g, g, value=1 - b2)
    longest = 2/(1 - b2) - 1
    r = longest - 2*t*b2**t/(1 - b2**t)
    if r > 5:
        import math
        c = math.sqrt((r - 4)*(r - 2)*longest/((longest - 4)*(longest - 2)*r))
        p.addcdiv_(m, (v/(1 - b2**t)).sqrt() + eps, value=-lr*c/(1 - b1**t))
    else: p.add_(m, alpha=-lr/(1 - b1**t))

def cautious(p, g, state, *, lr):
    m = state['m'] = torch.lerp(state['m'], g, 0.1) if 'm' in state else g*0.1
    mask = (m*g > 0).to(g.dtype)
    u = torch.maximum(m.abs(), g.abs())**2
    step = (m/(u.sqrt() + 1e-3)).clamp(-1, 1)
    p -= lr*step*mask/mask.mean().clamp(min=1e-3)
    p += lr*torch.where((g > 0) & ~(m > 0), g.sign(), torch.zeros_like(g))

def centralized(p, g, state): return g - g.mean() if g.ndim > 1 else g

CHAINS = dict(
    lars=[lars, momentum, sgd], lamb=[adam, l2, trust, sgd],
    lookahead=[decay, adam, sgd, lookahead], radam=[decay, radam],
    functional=[decay, functional, sgd], clip=[clip_norm, decay, momentum, sgd],
    cautious=[cautious], centralized=[centralized, ema, sgd])
HYPERS = dict(lr=0.01, weight_decay=0.01, momentum=0.9, trust_coeff=1.)


def of_steps(steps, ps, **kw):
    "An optimizer with those of `HYPERS` that the steps take."
    known = {k for f in steps for k in takes(f)}
    hypers = {k: v for k, v in HYPERS.items() if k in known}
    return StepOptimizer(ps, steps, **hypers, **kw)


def leaves(dtype=torch.float32, shapes=None):
    gen = torch.Generator().manual_seed(0)
    ps = [torch.randn(s, generator=gen) for s in shapes or SHAPES]
    return [p.to(dtype).requires_grad_() for p in ps]


def schedule(opt, t):
    "Another lr, momentum and beta at every step."
    for group in opt.param_groups:
        group['lr'] = 0.01/(t + 1)
        if group.get('momentum'): group['momentum'] = 0.9 - 0.02*t
        if 'betas' in group: group['betas'] = (0.9 - 0.02*t, *group['betas'][1:])


def train(make, steps=14, dtype=torch.float32, at=None, switch=None):
    """A run with a schedule; the first parameter joins late, the fifth skips steps.

    `switch(opt, ps)` is called before step `at`. The optimizer comes back with its
    parameters as `ps`."""
    ps, gen = leaves(dtype), torch.Generator().manual_seed(2)
    opt = make(ps)
    for t in range(steps):
        if t == at: opt = switch(opt, ps) or opt
        schedule(opt, t)
        for i, p in enumerate(ps):
            joins_late, skips = i == 0 and t < 3, i == 4 and t % 3 == 1
            if joins_late or skips: p.grad = None
            else: p.grad = torch.randn(p.shape, generator=gen).to(dtype)
        opt.step()
    opt.ps = ps
    return opt


@pytest.fixture(params=['C++', 'Python'])
def asking(request, monkeypatch):
    "Tensors tell where they are through DLPack, or one by one, as in older torch."
    if request.param == 'Python': monkeypatch.setattr(memory, 'looker', lambda: None)
    elif not memory.looker(): pytest.skip('this torch has no table of DLPack functions')


def programs(opt): return [p for found in opt.memo.programs.values() for p in found]
def reasons(opt): return {p.reason for p in programs(opt)}

def has_kernels(opt):
    "Whether all that was recorded became a kernel, and something did."
    return reasons(opt) <= HAVE_KERNELS and None in reasons(opt)


TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-13, torch.bfloat16: 0.02}

@pytest.mark.parametrize('dtype', TOLERANCE)
@pytest.mark.parametrize('name', CHAINS)
def test_steps_in_any_style(name, dtype):
    "Loop and foreach have the same bits, the kernel the same numbers; it is a kernel."
    def run(way, steps=14):
        return train(partial(of_steps, CHAINS[name], **way), steps, dtype)
    loop, lists, kernel = run(LOOP), run(LISTS), run(KERNEL)
    assert max_diff(loop.ps, lists.ps) == 0.
    assert max_diff(loop.ps, kernel.ps) <= TOLERANCE[dtype]
    assert has_kernels(kernel)
    assert max_diff(loop.ps, leaves(dtype)) > 1e-3                    # they moved
    assert max_diff(kernel.ps, run(KERNEL, steps=13).ps) > 1e-6


@pytest.mark.parametrize('name', optim.__all__)
def test_every_optimizer(name, asking):
    make = exercised(getattr(optim, name))
    loop, lists, kernel = (train(partial(make, **way)) for way in WAYS.values())
    assert max_diff(loop.ps, lists.ps) == 0. and max_diff(loop.ps, kernel.ps) <= 1e-6
    assert has_kernels(kernel)
    other = train(partial(make, weight_decay=0.2, fused=True))
    assert max_diff(loop.ps, other.ps) > 1e-5


def names_in_states(opt): return {k for state in opt.state.values() for k in state}

@pytest.mark.parametrize('how', ['attributes', 'checkpoint'])
@pytest.mark.parametrize('after', WAYS)
@pytest.mark.parametrize('before', WAYS)
@pytest.mark.parametrize('name', ['SGD', 'AdamW', 'LAMB'])
def test_switching_mid_run(name, before, after, how):
    make = exercised(getattr(optim, name))
    way = WAYS[after]
    def by_attributes(opt, ps):
        opt.foreach, opt.fused = way.get('foreach'), way.get('fused')
    def by_checkpoint(opt, ps):
        new = make(ps, **way)
        new.load_state_dict(opt.state_dict())
        return new
    def loses(opt, ps): return make(ps, **way)
    def run(switch): return train(partial(make, **WAYS[before]), at=7, switch=switch)
    switched = run(by_attributes if how == 'attributes' else by_checkpoint)
    loop = train(make)
    tolerance = 1e-6 if 'fused' in (before, after) else 0.
    assert max_diff(switched.ps, loop.ps) <= tolerance
    assert names_in_states(switched) == names_in_states(loop)
    assert max_diff(run(loses).ps, loop.ps) > 1e-5


def test_mixed_dtypes_and_layouts(asking):
    "Three dtypes, a channels-last weight and a transposed one: all in kernels."
    def run(**way):
        gen = torch.Generator().manual_seed(0)
        def draw(*shape): return torch.randn(shape, generator=gen)
        ps = [draw(4, 3), draw(4, 3).double(), draw(4, 3).bfloat16(),
              draw(4, 3, 2, 2).to(memory_format=torch.channels_last), draw(3, 4).T]
        for p in ps: p.requires_grad_()
        opt = optim.AdamW(ps, lr=0.01, **way)
        for _ in range(4):
            for p in ps: p.grad = torch.empty_like(p).copy_(draw(*p.shape))
            opt.step()
        return ps, opt
    (a, _), (b, opt) = run(), run(fused=True)
    assert max_diff(a[:2] + a[3:], b[:2] + b[3:]) < 1e-6
    assert max_diff(a[2:3], b[2:3]) < 0.01
    assert reasons(opt) == HAVE_KERNELS and not opt.memo.told - {''}


def test_moved_and_replaced_memory(asking):
    "`p.data = ...`, a replaced state and new gradients are noticed."
    def run(**way):
        ps = leaves()
        opt = optim.SGD(ps, lr=0.1, momentum=0.9, **way)
        for t in range(6):
            for p in ps: p.grad = torch.full_like(p, t + 1.)
            if t == 3: ps[1].data = ps[1].data.clone()*2
            if t == 4: opt.state[ps[2]]['momentum_buffer'] = torch.ones_like(ps[2])
            opt.step()
        return ps
    assert max_diff(run(), run(fused=True)) == 0. == max_diff(run(), run(foreach=True))


def warned(opt, steps=3):
    "The reasons that some steps warn of."
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        for _ in range(steps): opt.step()
    return [str(w.message).removeprefix(REASON) for w in caught]


def with_grads(n=3):
    ps = leaves(shapes=[(4, 4)]*n)
    for p in ps: p.grad = torch.ones_like(p)
    return ps


def unique(p, g, state, *, scale=1.):                # a kernel that nothing else builds
    return g*scale*scale*scale*scale*scale


# --- what is missing: each returns what the warning says
def no_compiler(folder, monkeypatch):
    monkeypatch.setenv('PATH', str(folder))
    monkeypatch.delenv('CXX', raising=False)
    return 'there is no C++ compiler'

def folder_cannot_be_made(folder, monkeypatch):
    (folder/'file').touch()
    monkeypatch.setenv('OPTIMIZERS_EXPLAINED_CACHE', str(folder/'file'/'kernels'))
    return 'cannot be made'

def folder_is_open(folder, monkeypatch):
    (folder/'kernels').mkdir(mode=0o777)
    (folder/'kernels').chmod(0o777)
    return 'is open to others'

def compiler_fails(folder, monkeypatch):
    (folder/'bad').write_text('#!/bin/sh\nexit 1\n')
    (folder/'bad').chmod(0o755)
    monkeypatch.setenv('CXX', str(folder/'bad'))
    return 'cannot build it'

def another_system(folder, monkeypatch):
    monkeypatch.setattr(compiler, 'FLAGS', (*compiler.FLAGS, '--no-such-flag'))
    return 'cannot build it'

MISSING = [no_compiler, folder_cannot_be_made, folder_is_open, compiler_fails,
           another_system]

@pytest.mark.parametrize('what', MISSING, ids=lambda what: what.__name__)
def test_what_is_missing(what, tmp_path, monkeypatch):
    "The steps run as a loop, with one warning, and no file is left."
    compiler.compiler.cache_clear()
    monkeypatch.setattr(compiler, 'KERNELS', {})
    monkeypatch.setenv('OPTIMIZERS_EXPLAINED_CACHE', str(tmp_path/'kernels'))
    reason = what(tmp_path, monkeypatch)
    a, b = with_grads(), with_grads()
    def make(ps, **way):
        steps = [unique, momentum, sgd]
        return StepOptimizer(ps, steps, lr=0.1, momentum=0.9, **way)
    told = warned(make(a, fused=True))
    other = make(b)
    for _ in range(3): other.step()
    compiler.compiler.cache_clear()
    assert len(told) == 1 and reason in told[0]
    assert max_diff(a, b) == 0.
    assert not list(tmp_path.glob('kernels/*'))


READ_ONLY = '''
import os, pathlib, sys, torch, warnings
from optimizers_explained import optim
folder = sys.argv[1]
p = torch.ones(3, requires_grad=True)
p.grad = torch.ones(3)
opt = optim.SGD([p], lr=0.5)
opt.step()                  # torch imports much at the first step, as the user who may
p.data.fill_(1.)
os.environ['OPTIMIZERS_EXPLAINED_CACHE'] = folder
os.mkdir(folder, 0o500)
if os.getuid() == 0:
    for d in list(pathlib.Path(folder).parents)[:-1]:
        os.chmod(d, os.stat(d).st_mode | 0o011)
    os.chown(folder, 65534, 65534)
    os.setuid(65534)
opt.fused = True
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    opt.step()
    opt.step()
print(p.tolist(), len(caught), caught[0].message)
'''

def test_a_read_only_folder(tmp_path):
    "As another user than root, who may write anywhere."
    command = [sys.executable, '-c', READ_ONLY, str(tmp_path/'kernels')]
    out = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert out.stdout.startswith('[0.0, 0.0, 0.0] 1'), out.stderr
    assert 'Permission denied' in out.stdout, out.stderr


UNKNOWN = 'the value of a tensor is not known'
FOREIGN = 'neither p, g nor in the state'
CHANGING = 'gives something else at every call'

@pytest.mark.parametrize('step, reason', [
    (lambda p, g, state: g.sort(-1).values, 'sort has no fused form'),
    (lambda p, g, state: g.mm(g), 'mm has no fused form'),
    (lambda p, g, state: g*g.norm().item(), 'item has no fused form'),
    (lambda p, g, state: -g if g.sum() > 0 else g, UNKNOWN),
    (lambda p, g, state: g/len(g), UNKNOWN),
    (lambda p, g, state: g*p.shape[0], '.shape is not known'),
    (lambda p, g, state: g*torch.ones(4, 4), FOREIGN),
    (lambda p, g, state: g*torch.rand(()).item(), FOREIGN),
    (lambda p, g, state: g*time.perf_counter(), CHANGING),
    (lambda p, g, state: torch.stack([g, g])[0], 'stack has no fused form'),
    (lambda p, g, state: state.update(old=g), 'is a second name of another tensor'),
])
def test_what_has_no_kernel(step, reason):
    a, b = with_grads(), with_grads()
    torch.manual_seed(0)
    told = warned(StepOptimizer(a, [step, sgd], lr=0.1, fused=True))
    assert len(told) == 1 and reason in told[0]
    of_the_state = reason.startswith('is')           # all others are of the step
    assert ('step <lambda>' in told[0]) != of_the_state
    torch.manual_seed(0)
    other = StepOptimizer(b, [step, sgd], lr=0.1)
    for _ in range(3): other.step()
    if reason != CHANGING: assert max_diff(a, b) == 0.


def asks_type(p, g, state, *, weight_decay=0.1):
    return g + weight_decay*p if isinstance(weight_decay, float) else g

def alternating(p, g, state):
    state['t'] = t = state.get('t', 0) + 1
    return g*(-1)**t*(1 - (-0.5)**t)

def paired(p, g, state, *, lr):
    a, b = state.get('pair', (0., 1))
    state['pair'] = 0.9*a + 0.1*lr, b + 1
    return g*(1 + a)*b

def formats(p, g, state):
    state['t'] = t = state.get('t', 0) + 1
    return -g if f'{t}'[-1] == '3' else g

def counts_masks(p, g, state): return g*((g > 0) + (p > 0))

def in_place_mask(p, g, state):
    if 'b' in state: b = state['b'].copy_(g).gt_(0)
    else: b = g.clone()
    state['b'] = b
    return g*(b + 1)

def catches(p, g, state):
    state['t'] = t = state.get('t', 0) + 1
    try: return g*(1/(t - 2))
    except ZeroDivisionError: return g*5.

def divides(p, g, state):
    state['t'] = t = state.get('t', 0) + 1
    return g*(1/(t % 3)) if t % 3 else g

def old_signature(p, g, state, *, lr):
    m = g*2
    p.addcdiv_(m, g.abs() + 1, value=-lr)

def makes_and_deletes(p, g, state):
    if 'x' in state: del state['x']
    else: state['x'] = 1

PYTHON = [asks_type, alternating, paired, formats, counts_masks, in_place_mask, catches,
          divides, old_signature, makes_and_deletes]

@pytest.mark.parametrize('step', PYTHON)
def test_python_in_steps(step):
    "What steps do with numbers and masks comes out as in the loop, in a kernel or not."
    def run(way): return train(partial(of_steps, [step, sgd], **way), steps=9)
    loop, kernel = run(LOOP), run(KERNEL)
    assert max_diff(loop.ps, kernel.ps) < 1e-6 and max_diff(loop.ps, leaves()) > 1e-3
    def state(opt): return str(sorted(opt.state[opt.ps[1]].items(), key=str))
    assert state(loop) == state(kernel)

@pytest.mark.filterwarnings('ignore:This overload:UserWarning')
def test_arguments_in_torchs_old_order_are_not_recorded():
    def step(p, g, state, *, lr): p.addcdiv_(-lr, g, g.abs() + 1)
    opt = train(partial(of_steps, [step], fused=True), steps=3)
    reason = 'step step: addcdiv with these arguments has no fused form'
    assert reasons(opt) == {reason}

def cut(t): return t[:3]
def reshaped(t): return t.reshape(2, 4)
def doubled(t): return torch.cat([t, t])

@pytest.mark.parametrize('swap', [cut, reshaped, doubled])
def test_a_parameter_that_changes_its_shape(swap, asking):
    "Same object, perhaps the same address, other elements: never the old layout."
    def run(**way):
        p = torch.ones(8).requires_grad_()
        beyond = p.data
        p.grad = torch.ones(8)
        opt = of_steps([sgd], [p], **way)
        opt.step()
        opt.step()
        p.grad, p.data = None, swap(p.data)
        p.grad = torch.ones_like(p)
        opt.step()
        return [p, beyond]
    assert max_diff(run(), run(fused=True)) == 0.

def transposed(p): return p.data.t()
def transposed_anew(p): return p.data.t().contiguous()
def viewed(p): return p.data.view(4, 16)

@pytest.mark.parametrize('how', [transposed, transposed_anew, viewed])
def test_a_parameter_that_keeps_its_memory_in_another_order(how, asking):
    def run(**way):
        p = torch.arange(64.).view(8, 8).requires_grad_()
        p.grad = torch.arange(64.).view(8, 8)
        opt = of_steps([momentum, sgd], [p], **way)
        opt.step()
        opt.step()
        p.grad, p.data = None, how(p)
        p.grad = torch.arange(64.).view(p.shape)
        for s in opt.state.values(): s['momentum_buffer'] = torch.zeros_like(p)
        opt.step()
        return [p]
    assert max_diff(run(), run(fused=True)) == 0.
    p, = run()
    assert max_diff([p], [p.t().contiguous().view(p.shape)]) > 0.1

def test_a_gradient_that_was_cut_is_not_read_beyond_its_end(asking):
    ps = with_grads()
    opt = of_steps([sgd], ps, fused=True)
    opt.step()
    opt.step()
    ps[0].grad.data = ps[0].grad.data[:3]
    with (pytest.warns(UserWarning, match='another shape than its parameter'),
          pytest.raises(RuntimeError, match='size of tensor')):      # from the loop
        opt.step()

@pytest.mark.parametrize('name', ['lars', 'lamb', 'clip'])
def test_waves(name, monkeypatch):
    """Small tensors dealt out whole, large ones stepped by all threads.

    The numbers are the loop's, and the same bits with any number of threads."""
    monkeypatch.setattr(memory, 'WAVE', 2000)
    shapes = [(30, 30)]*20 + [(700, 700)] + [(40, 10)]*20 + [(3, 2)]
    def stepped(scale, way):
        ps, gen = leaves(shapes=shapes), torch.Generator().manual_seed(1)
        opt = of_steps(CHAINS[name], ps, **way)
        for _ in range(4):
            for p in ps: p.grad = scale*torch.randn(p.shape, generator=gen)
            opt.step()
        return opt, ps
    def run(threads=2, scale=1., **way):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try: return stepped(scale, way)
        finally: torch.set_num_threads(before)
    opt, kernel = run(fused=True)
    plan = next(iter(opt.memo.plans.values()))
    waves = plan.buckets[0].layout.waves
    assert [len(starts) > 2 for starts in waves] == [True, False, True]
    def differs(**kw): return max_diff(kernel, run(**kw)[1])
    assert differs() < 1e-6 and max_diff(kernel, leaves(shapes=shapes)) > 1e-3
    for n in (1, 2, 3): assert differs(threads=n, fused=True) == 0.
    assert differs(scale=-1., fused=True) > 1e-3

@pytest.mark.parametrize('name', ['SGD', 'AdamW', 'LAMB'])
def test_lists_in_pieces(name, monkeypatch):
    "A long list is cut; the bits are those of the loop."
    make = exercised(getattr(optim, name))
    def run(steps=14): return train(partial(make, foreach=True), steps)
    def count(opt): return max(len(plan.buckets) for plan in opt.memo.plans.values())
    whole = run()
    monkeypatch.setattr(dispatch, 'PIECE', 10)
    pieces = run()
    assert count(pieces) > count(whole)
    assert max_diff(pieces.ps, whole.ps) == max_diff(pieces.ps, train(make).ps) == 0.
    assert max_diff(pieces.ps, run(steps=13).ps) > 1e-6


def tensors_and_numbers(opt):
    "All tensors of the states, and the rest of each state."
    tensors, numbers = [], []
    for state in opt.state.values():
        tensors += [v for v in state.values() if torch.is_tensor(v)]
        numbers.append({k: v for k, v in state.items() if not torch.is_tensor(v)})
    return tensors, numbers

LARGE = {(100, 70), (5, 5, 3, 3), (40_000,)}          # of `SHAPES`, for a piece of 10
SUMMED = dict(                                        # shapes over which steps sum
    lars=LARGE, lamb=LARGE, clip=LARGE, cautious=LARGE,
    centralized={(100, 70), (5, 5, 3, 3)})

@pytest.mark.parametrize('dtype', TOLERANCE)
@pytest.mark.parametrize('name', CHAINS)
def test_large_tensors_in_rows(name, dtype, monkeypatch):
    """A tensor is cut where the steps act by element, and only there.

    The bits are those of the loop."""
    def run(steps=14, **way):
        return train(partial(of_steps, CHAINS[name], **way), steps, dtype)
    whole, cut = run(), []
    monkeypatch.setattr(dispatch, 'PIECE', 10)
    in_rows = dispatch.in_rows
    def watched(run, batch):
        cut.append(batch.params[0].shape)
        in_rows(run, batch)
    monkeypatch.setattr(dispatch, 'in_rows', watched)
    rows = run(foreach=True)
    (tensors, numbers), (want, want_numbers) = map(tensors_and_numbers, (rows, whole))
    assert max_diff(rows.ps, whole.ps) == 0. == max_diff(tensors, want)
    assert numbers == want_numbers
    expected = set() if dtype == torch.bfloat16 else LARGE - SUMMED.get(name, set())
    assert set(cut) == expected
    assert max_diff(rows.ps, run(steps=13, foreach=True).ps) > 0

def test_a_state_of_another_shape_is_not_cut(monkeypatch):
    def counted(p, g, state, *, lr):
        if 't' not in state: state['t'] = torch.tensor(0.)
        state['t'] += 1
        p.sub_(lr*g/state['t'])
    monkeypatch.setattr(dispatch, 'PIECE', 2)
    def run(**way):
        ps = with_grads()
        opt = of_steps([counted], ps, **way)
        for _ in range(4): opt.step()
        return ps + [s['t'] for s in opt.state.values()]
    assert max_diff(run(), run(foreach=True)) == 0. and run()[-1] == 4
    p, = ps = with_grads(1)
    opt = of_steps([sgd], ps, foreach=True)
    p.grad.data = p.grad.data[:, :1]       # is broadcast, as it would be in rows
    before = p.detach().clone()
    opt.step()
    assert torch.allclose(before - p, torch.full((4, 4), 0.01))

def test_a_gradient_in_the_memory_of_its_parameter(asking):
    def run(**way):
        ps = leaves(shapes=[(4, 4)]*3)
        for p in ps: p.grad = torch.ones_like(p)
        ps[1].grad = ps[1].detach()
        opt = of_steps([momentum, sgd], ps, **way)
        return ps, warned(opt)
    (a, quiet), (b, told) = run(), run(fused=True)
    assert max_diff(a, b) == 0. and quiet == []
    assert told == ['a gradient shares its memory with a parameter or a state']

@pytest.mark.parametrize('way', WAYS)
def test_gradients_are_not_held(way, asking):
    "`zero_grad()` frees them."
    ps = with_grads()
    opt = of_steps([momentum, sgd], ps, **WAYS[way])
    opt.step()
    opt.step()
    grad, p = weakref.ref(ps[0].grad), weakref.ref(ps[0])
    opt.zero_grad()
    assert grad() is None and p() is ps[0]

def test_tensors_that_overlap_run_in_python(asking):
    base = torch.ones(10)
    ps = [base[:6].requires_grad_(), base[4:].detach().requires_grad_()]
    for p in ps: p.grad = torch.ones_like(p)
    told = warned(of_steps([sgd], ps, fused=True))
    assert told == ['two tensors share their memory']

def test_hyperparameters_changed_in_place_are_noticed():
    def step(p, g, state, *, lr, options=None): p.add_(g, alpha=-lr*options['a'])
    ps = with_grads()
    opt = StepOptimizer(ps, [step], lr=0.1, options={'a': 1.}, fused=True)
    opt.step()
    opt.step()
    opt.param_groups[0]['options']['a'] = 3.
    before = ps[0].detach().clone()
    opt.step()
    assert torch.allclose(before - ps[0], torch.full((4, 4), 0.3))


class Model(NamedTuple):
    "What a kernel should not depend on."
    shapes:list
    lr:float

def test_kernels_do_not_depend_on_numbers_or_shapes(monkeypatch):
    monkeypatch.setattr(compiler, 'KERNELS', {})
    models = [Model(SHAPES, lr=0.1), Model([(9, 9)], lr=0.2),
              Model([(2,), (5, 5, 5)], lr=0.3)]
    for model in models:
        ps = leaves(shapes=model.shapes)
        opt = optim.AdamW(ps, lr=model.lr, fused=True)
        sched = torch.optim.lr_scheduler.OneCycleLR(opt, model.lr, total_steps=101)
        for _ in range(100):
            for p in ps: p.grad = torch.ones_like(p)
            opt.step()
            sched.step()
    assert len(compiler.KERNELS) == 1


RACE = '''
import sys, torch
from optimizers_explained import optim
from optimizers_explained.speed import compiler
p = torch.ones(1000, requires_grad=True)
p.grad = torch.ones(1000)
opt = optim.AdamW([p], lr=0.5, fused=True)
for _ in range(3): opt.step()
print(p.sum().item(), len(compiler.KERNELS), opt.memo.told - {''})
'''

def test_concurrent_processes(tmp_path):
    "Several build the same kernel at once: all have it, and one file of it remains."
    kernels = tmp_path/'kernels'
    env = {**os.environ, 'OPTIMIZERS_EXPLAINED_CACHE': str(kernels)}
    def start():
        command = [sys.executable, '-c', RACE]
        return subprocess.Popen(
            command, env=env, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    runs = [start() for _ in range(4)]
    outs = {r.communicate()[0] for r in runs}
    assert len(outs) == 1 and outs.pop().endswith('1 set()\n')
    expected = 2 if memory.looker() else 1           # with `memory.LOOK`
    assert [f.suffix for f in kernels.iterdir()] == ['.so']*expected
    assert kernels.stat().st_mode & 0o777 == 0o700


SHARDED = '''
import os, sys, warnings, torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from optimizers_explained import optim
os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=sys.argv[2], RANK=sys.argv[1],
                  WORLD_SIZE='2')
dist.init_process_group('gloo')
mesh = init_device_mesh('cpu', (2,))
shapes = (5, 3), (4,), (1, 2), (6, 2)
def run(name, sharded, **way):
    gen = torch.Generator().manual_seed(0)
    def draw(shape): return torch.randn(shape, generator=gen)
    def place(t): return distribute_tensor(t, mesh, [Shard(0)]) if sharded else t
    ps = [draw(shape) for shape in shapes]
    ps = [place(p).requires_grad_() for p in ps]
    opt = getattr(optim, name)(ps, lr=0.01, weight_decay=0.1, **way)
    for t in range(5):
        for p, shape in zip(ps, shapes): p.grad = place(draw(shape))
        opt.step()
    return [p.full_tensor() if sharded else p for p in ps], opt
def diff(want, got): return max((a - b).abs().max().item() for a, b in zip(want, got))
for name in 'SGD', 'AdamW', 'Lion', 'LAMB':
    want, _ = run(name, False)
    for way in dict(foreach=False), dict(foreach=True), dict(fused=True):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            got, opt = run(name, True, **way)
        known = opt.memo.programs.values() if opt.memo else ()
        has_kernels = any(p.reason is None for found in known for p in found)
        apart = diff(want, got)
        words = [name, *way, 'close' if apart < 1e-6 else f'{apart:.1e} apart']
        if has_kernels and not opt.memo.told: words.append('kernel')
        words += [str(w.message)[-60:] for w in caught if 'fused' in str(w.message)]
        print(*words)
other = run('SGD', True)[0]
print('control', diff(want, other) > 1e-3)
dist.destroy_process_group()
'''

def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return str(s.getsockname()[1])

@pytest.mark.skipif(not torch.distributed.is_available(),
                    reason='this torch has no distributed package')
def test_sharded_parameters():
    """DTensors on two processes: in kernels where elements stand alone.

    Where a norm is needed they are stepped as lists, with a warning."""
    port = free_port()
    def start(rank):
        command = [sys.executable, '-c', SHARDED, str(rank), port]
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, text=True)
    runs = [start(rank) for rank in range(2)]
    for out, err in [run.communicate(timeout=240) for run in runs]:
        lines = out.splitlines()
        assert len(lines) == 13, err
        assert lines.pop() == 'control True', out
        assert all(' close' in line for line in lines), out
        in_kernels = [line.endswith('kernel') for line in lines[2::3]]
        assert in_kernels == [True, True, True, False], out
        assert 'a norm or sum over a sharded tensor has no fused form' in lines[-1]


INTERPRETED = '''
import sys, torch
sys.path.insert(0, 'tests')
import test_fused as t
from optimizers_explained.speed import compiler, dispatch
dispatch.BACKENDS['cpu'] = compiler.TritonKernel
t.SHAPES = (3,), (2, 4), (40, 30), (5, 2, 1, 3), (7,), (), (0, 3)
for name, steps in t.CHAINS.items():
    for dtype, tol in ((torch.float32, 1e-6), (torch.float64, 1e-13)):
        def run(way, n=14):
            return t.train(t.partial(t.of_steps, steps, **way), n, dtype)
        loop, kernel = run(t.LOOP), run(t.KERNEL)
        diff = t.max_diff(loop.ps, kernel.ps)
        assert diff <= tol, (name, dtype, diff)
        assert t.reasons(kernel) == t.HAVE_KERNELS, (name, t.reasons(kernel))
        assert t.max_diff(loop.ps, run(t.KERNEL, 13).ps) > tol
print('same numbers')
'''

def test_triton_interpreted():
    "The kernels for a GPU, run by Triton's interpreter on the CPU."
    pytest.importorskip('triton', reason='Triton is not installed')
    env = {**os.environ, 'TRITON_INTERPRET': '1'}
    out = subprocess.run([sys.executable, '-c', INTERPRETED], cwd=ROOT, env=env,
                         capture_output=True, text=True)
    assert out.stdout == 'same numbers\n', out.stderr[-2000:]


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('name', optim.__all__)
def test_on_a_gpu(name):
    def run(**way):
        ps = [p.detach().cuda().requires_grad_() for p in leaves()]
        opt = exercised(getattr(optim, name))(ps, **way)
        gen = torch.Generator().manual_seed(2)
        for _ in range(8):
            for p in ps: p.grad = torch.randn(p.shape, generator=gen).cuda()
            opt.step()
        return ps, opt
    (a, _), (b, opt) = run(foreach=False), run(fused=True)
    assert max_diff(a, b) < 1e-5 and reasons(opt) <= HAVE_KERNELS


def test_no_number_is_written_into_a_kernel():
    for name in optim.__all__:
        make = partial(exercised(getattr(optim, name)), fused=True)
        for program in programs(train(make, steps=4)):
            if program.reason is not None: continue
            source = program.kernel.source.replace('T(0.5)', '')
            assert not re.findall(r'\d\.\d', source)
    assert dispatch.LIMIT >= 2
