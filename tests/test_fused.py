"""`fused=True` and `foreach=True` against the loop: numbers, state that moves between the three, fallbacks, processes, sharded parameters, and Triton's interpreter."""
import os
import re
import subprocess
import sys
import time
import warnings
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch

from optimizers_explained import build, fused, layout, optim
from optimizers_explained.adam import adam
from optimizers_explained.checks import takes
from optimizers_explained.contract import exercised
from optimizers_explained.core import StepOptimizer, decay, ema, l2, momentum, sgd
from optimizers_explained.problems import max_diff
from optimizers_explained.trust import lars, trust

ROOT = Path(__file__).resolve().parents[1]
SHAPES = (3,), (2, 4), (100, 70), (5, 5, 3, 3), (7,), (), (0, 3), (40_000,)
WAYS = dict(loop=dict(foreach=False), foreach=dict(foreach=True), fused=dict(fused=True))
REASON = 'fused=True, and still some parameters are stepped without a kernel: '


# --- steps in every style
def functional(p, g, state, *, beta=0.9):
    state['sum'] = state['sum']*beta + g if 'sum' in state else g.clone()
    return state['sum']

def clip_norm(p, g, state, *, longest=0.1): return g*(longest/g.norm().clamp(min=longest))

def lookahead(p, g, state, *, k=5, alpha=0.5):
    if 'slow' not in state: state.update(slow=p.detach().clone(), count=0)
    state['count'] += 1
    if state['count'] % k == 0: p.copy_(state['slow'].add_(p - state['slow'], alpha=alpha))

def radam(p, g, state, *, lr, betas=(0.9, 0.99), eps=1e-5):
    if 'm' not in state: state.update(m=torch.zeros_like(p), v=torch.zeros_like(p), t=0)
    t, (b1, b2), m, v = state['t'] + 1, betas, state['m'], state['v']
    state['t'] = t
    m.mul_(b1).add_(g, alpha=1 - b1), v.mul_(b2).addcmul_(g, g, value=1 - b2)
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
    p -= lr*(m/(u.sqrt() + 1e-3)).clamp(-1, 1)*mask/mask.mean().clamp(min=1e-3)
    p += lr*torch.where((g > 0) & ~(m > 0), g.sign(), torch.zeros_like(g))

def centralized(p, g, state): return g - g.mean() if g.ndim > 1 else g

CHAINS = dict(lars=[lars, momentum, sgd], lamb=[adam, l2, trust, sgd], lookahead=[decay, adam, sgd, lookahead], radam=[decay, radam], functional=[decay, functional, sgd],
              clip=[clip_norm, decay, momentum, sgd], cautious=[cautious], centralized=[centralized, ema, sgd])


def of_steps(steps, ps, **kw):
    known = {k for f in steps for k in takes(f)}
    return StepOptimizer(ps, steps, **{k: v for k, v in dict(lr=0.01, weight_decay=0.01, momentum=0.9, trust_coeff=1.).items() if k in known}, **kw)


def leaves(dtype=torch.float32, shapes=None):
    gen = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=gen).to(dtype).requires_grad_() for s in shapes or SHAPES]


def train(make, steps=14, dtype=torch.float32, at=None, switch=None):
    "A run with a schedule of lr and momentum, one parameter that joins late and one that skips steps; `switch(opt)` at step `at`."
    ps, gen = leaves(dtype), torch.Generator().manual_seed(2)
    opt = make(ps)
    for t in range(steps):
        if t == at: opt = switch(opt, ps) or opt
        for g in opt.param_groups:
            g['lr'] = 0.01/(t + 1)
            if g.get('momentum'): g['momentum'] = 0.9 - 0.02*t
            if 'betas' in g: g['betas'] = (0.9 - 0.02*t, *g['betas'][1:])
        for i, p in enumerate(ps): p.grad = None if (i == 0 and t < 3) or (i == 4 and t % 3 == 1) else torch.randn(p.shape, generator=gen).to(dtype)
        opt.step()
    opt.ps = ps
    return opt


@pytest.fixture(params=['C++', 'Python'])
def asking(request, monkeypatch):
    "Tensors tell where they are through DLPack, or, as with older versions of torch, one by one."
    if request.param == 'Python': monkeypatch.setattr(layout, 'looker', tuple)
    elif not layout.looker(): pytest.skip('this torch has no table of DLPack functions')


def programs(opt): return [p for found in opt.memo.programs.values() for p in found]


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize('name', CHAINS)
def test_steps_in_any_style(name, dtype):
    "Loop and foreach have the same bits, the kernel the same numbers, and a kernel it is."
    loop, lists, kernel = (train(partial(of_steps, CHAINS[name], **way), dtype=dtype) for way in WAYS.values())
    assert max_diff(loop.ps, lists.ps) == 0.
    assert max_diff(loop.ps, kernel.ps) <= {torch.float32: 1e-6, torch.float64: 1e-13, torch.bfloat16: 0.02}[dtype]
    assert {p.reason for p in programs(kernel)} <= {None, ''} and None in {p.reason for p in programs(kernel)}
    assert max_diff(loop.ps, leaves(dtype)) > 1e-3                                 # they moved
    with pytest.raises(AssertionError): assert max_diff(kernel.ps, train(partial(of_steps, CHAINS[name], fused=True), steps=13, dtype=dtype).ps) <= 1e-6


@pytest.mark.parametrize('name', optim.__all__)
def test_every_optimizer(name, asking):
    make = exercised(getattr(optim, name))
    loop, lists, kernel = (train(partial(make, **way)) for way in WAYS.values())
    assert max_diff(loop.ps, lists.ps) == 0. and max_diff(loop.ps, kernel.ps) <= 1e-6
    assert {p.reason for p in programs(kernel)} <= {None, ''} and None in {p.reason for p in programs(kernel)}
    assert max_diff(loop.ps, train(partial(make, weight_decay=0.2, fused=True)).ps) > 1e-5


@pytest.mark.parametrize('how', ['attributes', 'checkpoint'])
@pytest.mark.parametrize('after', WAYS)
@pytest.mark.parametrize('before', WAYS)
@pytest.mark.parametrize('name', ['SGD', 'AdamW', 'LAMB'])
def test_switching_mid_run(name, before, after, how):
    make = exercised(getattr(optim, name))
    def by_attributes(opt, ps): opt.foreach, opt.fused = WAYS[after].get('foreach'), WAYS[after].get('fused')
    def by_checkpoint(opt, ps):
        new = make(ps, **WAYS[after])
        new.load_state_dict(opt.state_dict())
        return new
    tol = 0. if 'fused' not in (before, after) else 1e-6
    switched = train(partial(make, **WAYS[before]), at=7, switch=by_attributes if how == 'attributes' else by_checkpoint)
    assert max_diff(switched.ps, train(make).ps) <= tol
    assert {k for s in switched.state.values() for k in s} == {k for s in train(make).state.values() for k in s}
    def loses(opt, ps): return make(ps, **WAYS[after])
    assert max_diff(train(partial(make, **WAYS[before]), at=7, switch=loses).ps, train(make).ps) > 1e-5


def test_mixed_dtypes_and_layouts(asking):
    "One group with three dtypes, a channels-last weight and a transposed one: all in kernels."
    def run(**way):
        gen = torch.Generator().manual_seed(0)
        ps = [torch.randn(4, 3, generator=gen), torch.randn(4, 3, generator=gen).double(), torch.randn(4, 3, generator=gen).bfloat16(),
              torch.randn(4, 3, 2, 2, generator=gen).to(memory_format=torch.channels_last), torch.randn(3, 4, generator=gen).T]
        ps = [p.requires_grad_() for p in ps]
        opt = optim.AdamW(ps, lr=0.01, **way)
        for _ in range(4):
            for p in ps: p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=gen))
            opt.step()
        return ps, opt
    (a, _), (b, opt) = run(), run(fused=True)
    assert max_diff(a[:2] + a[3:], b[:2] + b[3:]) < 1e-6 and max_diff(a[2:3], b[2:3]) < 0.01
    assert {p.reason for p in programs(opt)} == {None, ''} and not opt.memo.told - {''}


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
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        for _ in range(steps): opt.step()
    return [str(w.message).removeprefix(REASON) for w in caught]


def with_grads(n=3):
    ps = leaves(shapes=[(4, 4)]*n)
    for p in ps: p.grad = torch.ones_like(p)
    return ps


def unique(p, g, state, *, scale=1.):                                              # a kernel that nothing else builds
    return g*scale*scale*scale*scale*scale


@pytest.mark.parametrize('what', ['no compiler', 'folder cannot be made', 'folder is open', 'compiler fails', 'another system'])
def test_what_is_missing(what, tmp_path, monkeypatch):
    "The steps run as a loop, with one warning, and no file is left."
    build.compiler.cache_clear()
    monkeypatch.setattr(build, 'KERNELS', {})
    monkeypatch.setenv('OPTIMIZERS_EXPLAINED_CACHE', str(tmp_path/'kernels'))
    if what == 'no compiler': monkeypatch.setenv('PATH', str(tmp_path)); monkeypatch.delenv('CXX', raising=False)
    if what == 'folder cannot be made': (tmp_path/'file').touch(); monkeypatch.setenv('OPTIMIZERS_EXPLAINED_CACHE', str(tmp_path/'file'/'kernels'))
    if what == 'folder is open': (tmp_path/'kernels').mkdir(mode=0o777); (tmp_path/'kernels').chmod(0o777)
    if what == 'compiler fails': (tmp_path/'bad').write_text('#!/bin/sh\nexit 1\n'); (tmp_path/'bad').chmod(0o755); monkeypatch.setenv('CXX', str(tmp_path/'bad'))
    if what == 'another system': monkeypatch.setattr(build, 'FLAGS', (*build.FLAGS, '--no-such-flag'))
    a, b = with_grads(), with_grads()
    told = warned(StepOptimizer(a, [unique, momentum, sgd], lr=0.1, momentum=0.9, fused=True))
    other = StepOptimizer(b, [unique, momentum, sgd], lr=0.1, momentum=0.9)
    for _ in range(3): other.step()
    build.compiler.cache_clear()
    assert len(told) == 1 and {'no compiler': 'there is no C++ compiler', 'folder cannot be made': 'cannot be made', 'folder is open': 'is open to others'}.get(what, 'cannot build it') in told[0]
    assert max_diff(a, b) == 0.
    assert not list(tmp_path.glob('kernels/*'))


def test_a_read_only_folder(tmp_path):
    "As another user than root, who may write anywhere."
    code = f'''
import os, torch, warnings
from optimizers_explained import optim
folder = {str(tmp_path/'kernels')!r}
p = torch.ones(3, requires_grad=True); p.grad = torch.ones(3)
opt = optim.SGD([p], lr=0.5)
opt.step(), p.data.fill_(1.)                                # torch imports much at the first step, as the user who may
os.environ['OPTIMIZERS_EXPLAINED_CACHE'] = folder
os.mkdir(folder, 0o500)
if os.getuid() == 0:
    for d in list(__import__('pathlib').Path(folder).parents)[:-1]: os.chmod(d, os.stat(d).st_mode | 0o011)
    os.chown(folder, 65534, 65534); os.setuid(65534)
opt.fused = True
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    opt.step(), opt.step()
print(p.tolist(), len(caught), caught[0].message)
'''
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)
    assert out.stdout.startswith('[0.0, 0.0, 0.0] 1') and 'Permission denied' in out.stdout, out.stderr


@pytest.mark.parametrize('step,reason', [
    (lambda p, g, state: g.sort(-1).values, 'sort has no fused form'), (lambda p, g, state: g.mm(g), 'mm has no fused form'),
    (lambda p, g, state: g*g.norm().item(), 'item has no fused form'), (lambda p, g, state: -g if g.sum() > 0 else g, 'the value of a tensor is not known'),
    (lambda p, g, state: g/len(g), 'the value of a tensor is not known'), (lambda p, g, state: g*p.shape[0], '.shape is not known'),
    (lambda p, g, state: g*torch.ones(4, 4), 'neither p, g nor in the state'), (lambda p, g, state: g*torch.rand(()).item(), 'neither p, g nor in the state'),
    (lambda p, g, state: g*time.perf_counter(), 'gives something else at every call'),
    (lambda p, g, state: torch.stack([g, g])[0], 'stack has no fused form'), (lambda p, g, state: state.__setitem__('old', g), 'is a second name of another tensor')])
def test_what_has_no_kernel(step, reason):
    a, b = with_grads(), with_grads()
    torch.manual_seed(0)
    told = warned(StepOptimizer(a, [step, sgd], lr=0.1, fused=True))
    assert len(told) == 1 and reason in told[0] and ('step <lambda>' in told[0]) == (not reason.startswith('is'))
    torch.manual_seed(0)
    other = StepOptimizer(b, [step, sgd], lr=0.1)
    for _ in range(3): other.step()
    if 'at every call' not in reason: assert max_diff(a, b) == 0.


def asks_type(p, g, state, *, weight_decay=0.1): return g + weight_decay*p if isinstance(weight_decay, float) else g
def alternating(p, g, state): state['t'] = t = state.get('t', 0) + 1; return g*(-1)**t*(1 - (-0.5)**t)
def paired(p, g, state, *, lr): a, b = state.get('pair', (0., 1)); state['pair'] = 0.9*a + 0.1*lr, b + 1; return g*(1 + a)*b
def formats(p, g, state): state['t'] = t = state.get('t', 0) + 1; return -g if f'{t}'[-1] == '3' else g
def counts_masks(p, g, state): return g*((g > 0) + (p > 0))
def in_place_mask(p, g, state): b = state['b'] = state['b'].copy_(g).gt_(0) if 'b' in state else g.clone(); return g*(b + 1)
def catches(p, g, state):
    state['t'] = t = state.get('t', 0) + 1
    try: return g*(1/(t - 2))
    except ZeroDivisionError: return g*5.
def divides(p, g, state): state['t'] = t = state.get('t', 0) + 1; return g*(1/(t % 3)) if t % 3 else g
def old_signature(p, g, state, *, lr): m = g*2; p.addcdiv_(m, g.abs() + 1, value=-lr)
def makes_and_deletes(p, g, state):
    if 'x' in state: del state['x']
    else: state['x'] = 1

@pytest.mark.parametrize('step', [asks_type, alternating, paired, formats, counts_masks, in_place_mask, catches, divides, old_signature, makes_and_deletes])
def test_python_in_steps(step):
    "What steps may do with numbers and masks comes out as in the loop, by a kernel or without one."
    loop, kernel = (train(partial(of_steps, [step, sgd], **way), steps=9) for way in (dict(foreach=False), dict(fused=True)))
    assert max_diff(loop.ps, kernel.ps) < 1e-6 and max_diff(loop.ps, leaves()) > 1e-3
    assert str(sorted(loop.state[loop.ps[1]].items(), key=str)) == str(sorted(kernel.state[kernel.ps[1]].items(), key=str))

@pytest.mark.filterwarnings('ignore:This overload:UserWarning')
def test_arguments_in_torchs_old_order_are_not_recorded():
    def step(p, g, state, *, lr): p.addcdiv_(-lr, g, g.abs() + 1)
    opt = train(partial(of_steps, [step], fused=True), steps=3)
    assert {p.reason for p in programs(opt)} == {'step step: addcdiv with these arguments has no fused form'}

@pytest.mark.parametrize('swap', [lambda t: t[:3], lambda t: t.reshape(2, 4), lambda t: torch.cat([t, t])])
def test_a_parameter_that_changes_its_shape(swap, asking):
    "Same object, perhaps the same address, other elements: never the old layout."
    def run(**way):
        p = torch.ones(8).requires_grad_(); beyond = p.data
        p.grad = torch.ones(8)
        opt = of_steps([sgd], [p], **way)
        opt.step(), opt.step()
        p.grad, p.data = None, swap(p.data)
        p.grad = torch.ones_like(p)
        opt.step()
        return [p, beyond]
    assert max_diff(run(), run(fused=True)) == 0.

@pytest.mark.parametrize('how', [lambda p: p.data.t(), lambda p: p.data.t().contiguous(), lambda p: p.data.view(4, 16)])
def test_a_parameter_that_keeps_its_memory_in_another_order(how, asking):
    def run(**way):
        p = torch.arange(64.).view(8, 8).requires_grad_()
        p.grad = torch.arange(64.).view(8, 8)
        opt = of_steps([momentum, sgd], [p], **way)
        opt.step(), opt.step()
        p.grad, p.data = None, how(p)
        p.grad = torch.arange(64.).view(p.shape)
        for s in opt.state.values(): s['momentum_buffer'] = torch.zeros_like(p)
        opt.step()
        return [p]
    assert max_diff(run(), run(fused=True)) == 0. and max_diff(run(), [p.t().contiguous().view(p.shape) for p in run()]) > 0.1

def test_a_gradient_that_was_cut_is_not_read_beyond_its_end(asking):
    ps = with_grads()
    opt = of_steps([sgd], ps, fused=True)
    opt.step(), opt.step()
    ps[0].grad.data = ps[0].grad.data[:3]
    with pytest.warns(UserWarning, match='another shape than its parameter'), pytest.raises(RuntimeError, match='size of tensor'): opt.step()      # the second from the loop

@pytest.mark.parametrize('name', ['lars', 'lamb', 'clip'])
def test_waves(name, monkeypatch):
    "Small tensors dealt out whole, large ones stepped by all threads: the numbers of the loop, and the same bits with any number of threads."
    monkeypatch.setattr(layout, 'WAVE', 2000)
    shapes = [(30, 30)]*20 + [(700, 700)] + [(40, 10)]*20 + [(3, 2)]
    def run(threads=2, scale=1., **way):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            ps, gen = leaves(shapes=shapes), torch.Generator().manual_seed(1)
            opt = of_steps(CHAINS[name], ps, **way)
            for _ in range(4):
                for p in ps: p.grad = scale*torch.randn(p.shape, generator=gen)
                opt.step()
        finally: torch.set_num_threads(before)
        return opt, ps
    opt, kernel = run(fused=True)
    runs = next(iter(opt.memo.plans.values())).buckets[0].layout.waves
    assert [len(w) > 2 for w in runs] == [True, False, True]
    assert max_diff(kernel, run()[1]) < 1e-6 and max_diff(kernel, leaves(shapes=shapes)) > 1e-3
    assert all(max_diff(kernel, run(threads=n, fused=True)[1]) == 0. for n in (1, 2, 3))
    assert max_diff(kernel, run(scale=-1., fused=True)[1]) > 1e-3

@pytest.mark.parametrize('name', ['SGD', 'AdamW', 'LAMB'])
def test_lists_in_pieces(name, monkeypatch):
    "A long list is cut; the bits are those of the loop."
    make = exercised(getattr(optim, name))
    whole = train(partial(make, foreach=True))
    monkeypatch.setattr(fused, 'PIECE', 10)
    pieces = train(partial(make, foreach=True))
    count = lambda opt: max(len(plan.buckets) for plan in opt.memo.plans.values())
    assert count(pieces) > count(whole)
    assert max_diff(pieces.ps, whole.ps) == max_diff(pieces.ps, train(make).ps) == 0. and max_diff(pieces.ps, train(partial(make, foreach=True), steps=13).ps) > 1e-6

@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize('name', CHAINS)
def test_large_tensors_in_rows(name, dtype, monkeypatch):
    "A tensor is cut where the steps act by element, and only there; the bits are those of the loop."
    whole, cut = train(partial(of_steps, CHAINS[name]), dtype=dtype), []
    monkeypatch.setattr(fused, 'PIECE', 10)
    in_rows = fused.in_rows
    def watched(run, batch):
        cut.append(batch.params[0].shape)
        in_rows(run, batch)
    monkeypatch.setattr(fused, 'in_rows', watched)
    rows = train(partial(of_steps, CHAINS[name], foreach=True), dtype=dtype)
    assert max_diff(rows.ps, whole.ps) == 0. == max_diff([v for s in rows.state.values() for v in s.values() if torch.is_tensor(v)], [v for s in whole.state.values() for v in s.values() if torch.is_tensor(v)])
    assert [{k: v for k, v in s.items() if not torch.is_tensor(v)} for s in rows.state.values()] == [{k: v for k, v in s.items() if not torch.is_tensor(v)} for s in whole.state.values()]
    large, sums = {(100, 70), (5, 5, 3, 3), (40_000,)}, dict(centralized={(100, 70), (5, 5, 3, 3)}, **dict.fromkeys(('lars', 'lamb', 'clip', 'cautious'), {*map(tuple, SHAPES)}))
    assert set(cut) == (set() if dtype == torch.bfloat16 else large - sums.get(name, set()))
    assert max_diff(rows.ps, train(partial(of_steps, CHAINS[name], foreach=True), steps=13, dtype=dtype).ps) > 0

def test_a_state_of_another_shape_is_not_cut(monkeypatch):
    def counted(p, g, state, *, lr):
        if 't' not in state: state['t'] = torch.tensor(0.)
        state['t'] += 1
        p.sub_(lr*g/state['t'])
    monkeypatch.setattr(fused, 'PIECE', 2)
    def run(**way):
        ps = with_grads()
        opt = of_steps([counted], ps, **way)
        for _ in range(4): opt.step()
        return ps + [s['t'] for s in opt.state.values()]
    assert max_diff(run(), run(foreach=True)) == 0. and run()[-1] == 4
    ps = with_grads(1)
    opt = of_steps([sgd], ps, foreach=True)
    ps[0].grad.data = ps[0].grad.data[:, :1]                                       # would be broadcast in rows as it is as a whole
    before = ps[0].detach().clone()
    opt.step()
    assert torch.allclose(before - ps[0], torch.full((4, 4), 0.01))

def test_a_gradient_in_the_memory_of_its_parameter(asking):
    def run(**way):
        ps = leaves(shapes=[(4, 4)]*3)
        for p in ps: p.grad = torch.ones_like(p)
        ps[1].grad = ps[1].detach()
        opt = of_steps([momentum, sgd], ps, **way)
        return ps, warned(opt)
    (a, quiet), (b, told) = run(), run(fused=True)
    assert max_diff(a, b) == 0. and quiet == [] and told == ['a gradient shares its memory with a parameter or a state']

@pytest.mark.parametrize('way', WAYS)
def test_gradients_are_not_held(way, asking):
    "`zero_grad()` frees them."
    ps = with_grads()
    opt = of_steps([momentum, sgd], ps, **WAYS[way])
    opt.step(), opt.step()
    held = weakref.ref(ps[0].grad), weakref.ref(ps[0])
    opt.zero_grad()
    assert held[0]() is None and held[1]() is ps[0]

def test_tensors_that_overlap_run_in_python(asking):
    base = torch.ones(10)
    ps = [base[:6].requires_grad_(), base[4:].detach().requires_grad_()]
    for p in ps: p.grad = torch.ones_like(p)
    assert warned(of_steps([sgd], ps, fused=True)) == ['two tensors share their memory']

def test_hyperparameters_changed_in_place_are_noticed():
    def step(p, g, state, *, lr, options=None): p.add_(g, alpha=-lr*options['a'])
    ps = with_grads()
    opt = StepOptimizer(ps, [step], lr=0.1, options={'a': 1.}, fused=True)
    opt.step(), opt.step()
    opt.param_groups[0]['options']['a'] = 3.
    before = ps[0].detach().clone()
    opt.step()
    assert torch.allclose(before - ps[0], torch.full((4, 4), 0.3))


def test_kernels_do_not_depend_on_numbers_or_shapes(monkeypatch):
    monkeypatch.setattr(build, 'KERNELS', {})
    for shapes, lr in ((SHAPES, 0.1), (((9, 9),), 0.2), (((2,), (5, 5, 5)), 0.3)):
        ps = leaves(shapes=shapes)
        opt = optim.AdamW(ps, lr=lr, fused=True)
        sched = torch.optim.lr_scheduler.OneCycleLR(opt, lr, total_steps=101)
        for _ in range(100):
            for p in ps: p.grad = torch.ones_like(p)
            opt.step(), sched.step()
    assert len(build.KERNELS) == 1


RACE = '''
import sys, torch
from optimizers_explained import build, optim
p = torch.ones(1000, requires_grad=True); p.grad = torch.ones(1000)
opt = optim.AdamW([p], lr=0.5, fused=True)
for _ in range(3): opt.step()
print(p.sum().item(), len(build.KERNELS), opt.memo.told - {''})
'''

def test_concurrent_processes(tmp_path):
    "Several processes build the same kernel at once: all have it, one file remains, and one for `layout.LOOK`."
    env = {**os.environ, 'OPTIMIZERS_EXPLAINED_CACHE': str(tmp_path/'kernels')}
    runs = [subprocess.Popen([sys.executable, '-c', RACE], env=env, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    outs = {r.communicate()[0] for r in runs}
    assert len(outs) == 1 and outs.pop().endswith('1 set()\n')
    assert [f.suffix for f in (tmp_path/'kernels').iterdir()] == ['.so']*(1 + bool(layout.looker())) and (tmp_path/'kernels').stat().st_mode & 0o777 == 0o700


SHARDED = '''
import os, sys, warnings, torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from optimizers_explained import optim
os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=sys.argv[2], RANK=sys.argv[1], WORLD_SIZE='2')
dist.init_process_group('gloo')
mesh = init_device_mesh('cpu', (2,))
def run(name, sharded, **way):
    gen = torch.Generator().manual_seed(0)
    ps = [torch.randn(s, generator=gen) for s in ((5, 3), (4,), (1, 2), (6, 2))]
    place = (lambda t: distribute_tensor(t, mesh, [Shard(0)])) if sharded else (lambda t: t)
    ps = [place(p).requires_grad_() for p in ps]
    opt = getattr(optim, name)(ps, lr=0.01, weight_decay=0.1, **way)
    for t in range(5):
        for p, s in zip(ps, ((5, 3), (4,), (1, 2), (6, 2))): p.grad = place(torch.randn(s, generator=gen))
        opt.step()
    return [p.full_tensor() if sharded else p for p in ps], opt
for name in 'SGD', 'AdamW', 'Lion', 'LAMB':
    want, _ = run(name, False)
    for way in dict(foreach=False), dict(foreach=True), dict(fused=True):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            got, opt = run(name, True, **way)
        diff = max((a - b).abs().max().item() for a, b in zip(want, got))
        kernels = sum(p.reason is None for found in opt.memo.programs.values() for p in found)
        print(name, list(way)[0], way[list(way)[0]], 'close' if diff < 1e-6 else f'{diff:.1e} apart', 'kernel' if kernels and not opt.memo.told - {''} else '', *(str(w.message)[-60:] for w in caught if 'fused' in str(w.message)))
other = run('SGD', True)[0]
print('control', max((a - b).abs().max().item() for a, b in zip(want, other)) > 1e-3)
dist.destroy_process_group()
'''

def test_sharded_parameters(tmp_path):
    "DTensors on two processes: in kernels where elements stand alone, as lists and with a warning where a norm is needed."
    if not torch.distributed.is_available(): pytest.skip('this torch has no distributed package')
    import socket
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = str(s.getsockname()[1])
    runs = [subprocess.Popen([sys.executable, '-c', SHARDED, str(r), port], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for r in range(2)]
    outs = [r.communicate(timeout=240) for r in runs]
    for out, err in outs:
        lines = out.splitlines()
        assert len(lines) == 13, err
        assert all(' close' in line for line in lines[:12]) and lines[12] == 'control True', out
        assert [line.endswith('kernel') for line in lines[2:12:3]] == [True, True, True, False], out
        assert 'a norm or sum over a sharded tensor has no fused form' in lines[11]


INTERPRETED = '''
import sys, torch
sys.path.insert(0, 'tests')
import test_fused as t
from optimizers_explained import build, fused
fused.BACKENDS['cpu'] = build.TritonKernel
t.SHAPES = (3,), (2, 4), (40, 30), (5, 2, 1, 3), (7,), (), (0, 3)
for name, steps in t.CHAINS.items():
    for dtype, tol in ((torch.float32, 1e-6), (torch.float64, 1e-13)):
        loop, kernel = (t.train(t.partial(t.of_steps, steps, **way), dtype=dtype) for way in (dict(foreach=False), dict(fused=True)))
        diff = t.max_diff(loop.ps, kernel.ps)
        assert diff <= tol, (name, dtype, diff)
        assert {p.reason for p in t.programs(kernel)} == {None, ''}, (name, {p.reason for p in t.programs(kernel)})
        assert t.max_diff(loop.ps, t.train(t.partial(t.of_steps, steps, fused=True), steps=13, dtype=dtype).ps) > tol
print('same numbers')
'''

def test_triton_interpreted():
    "The kernels for a GPU, run by Triton's interpreter on the CPU."
    pytest.importorskip('triton', reason='Triton is not installed: its kernels are not tested')
    out = subprocess.run([sys.executable, '-c', INTERPRETED], cwd=ROOT, env={**os.environ, 'TRITON_INTERPRET': '1'}, capture_output=True, text=True)
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
    assert max_diff(a, b) < 1e-5 and {p.reason for p in programs(opt)} <= {None, ''}


def test_no_number_is_written_into_a_kernel():
    for name in optim.__all__:
        for p in programs(train(partial(exercised(getattr(optim, name)), fused=True), steps=4)):
            if p.reason is None: assert not re.findall(r'\d\.\d', re.sub(r'T\(0\.5\)', '', p.kernel.source))
    assert fused.LIMIT >= 2
