"""What an optimizer remembers between steps is asked before it is trusted.

Every test runs the same story as loop, in lists and in kernels, and beside torch's own
class where there is one. A kernel that trusts too much reads or writes beyond its
tensors, so these stories once ended in garbage or in a crash."""
import gc
import threading
import warnings
import weakref
from functools import partial

import numpy as np
import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

from optimizers_explained import optim
from optimizers_explained.speed import dispatch, memory
from optimizers_explained.core import StepOptimizer
from optimizers_explained.steps import decay, momentum, sgd

FAST = dict(foreach=dict(foreach=True), fused=dict(fused=True))
WAYS = dict(loop=dict(foreach=False), **FAST)

pytestmark = pytest.mark.filterwarnings('ignore:fused=True, and still')


@pytest.fixture(params=['C++', 'Python'], autouse=True)
def asking(request, monkeypatch):
    "Tensors tell where they are through DLPack, or one by one, as in older torch."
    if request.param == 'Python': monkeypatch.setattr(memory, 'looker', lambda: None)
    elif not memory.looker(): pytest.skip('this torch has no table of DLPack functions')


def ones(*shapes, dtype=torch.float32):
    return [torch.nn.Parameter(torch.ones(s, dtype=dtype)) for s in shapes]


def with_grads(ps, value=1.):
    for p in ps: p.grad = torch.full_like(p, value)
    return ps


def tell(opt, steps=1):
    "The warnings of some steps."
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        for _ in range(steps): opt.step()
    return [str(w.message) for w in caught]


# --- a tensor changes between two steps
def retype(dtype):
    def change(opt, p): p.data = p.data.to(dtype)
    return change

def reshape(p_shape):
    def change(opt, p): p.data = p.data.reshape(p_shape)
    return change

def shorten(opt, p): p.data = p.data[:2].clone()
def transpose(opt, p): p.data = p.data.t()
def spread(opt, p): p.data = torch.ones(*p.shape, 2)[..., 0]
def move(opt, p): p.data = p.data.clone()
def negate(opt, p): p.data = torch._neg_view(p.data.clone())

CHANGES = dict(
    half=retype(torch.float16), double=retype(torch.float64),
    bfloat16=retype(torch.bfloat16), dimensions=reshape(-1), longer=reshape((2, 8)),
    rows=shorten, transposed=transpose, gaps=spread, moved=move, negative=negate)

def after_a_change(make, change, others=3):
    "Four steps; before the third, one of the parameters changes."
    ps = ones((4, 4), *[(4, 4)]*others)
    opt = make(ps)
    for t in range(4):
        if t == 2:
            for p in ps: p.grad = None
            change(opt, ps[1])
        with_grads(ps, 1. + t)
        opt.step()
    return ps

@pytest.mark.parametrize('way', FAST)
@pytest.mark.parametrize('what', CHANGES)
def test_a_parameter_that_changes(what, way):
    "Its dtype, shape, strides, address or sign: the numbers are torch's."
    theirs = partial(torch.optim.SGD, lr=0.25, foreach=False)
    ours = partial(optim.SGD, lr=0.25, **WAYS[way])
    want = after_a_change(theirs, CHANGES[what])
    got = after_a_change(ours, CHANGES[what])
    for p, q in zip(want, got): torch.testing.assert_close(p, q, rtol=0, atol=0)
    assert got[0].tolist() == [[1 - 0.25*(1 + 2 + 3 + 4)]*4]*4


def test_part_of_a_model_in_half_precision():
    "Large tensors: a kernel that went on in float32 would write beyond the end."
    a, b = ones(300_000, 300_000)
    opt = optim.SGD([a, b], lr=0.25, fused=True)
    for dtype in torch.float32, torch.float16:
        b.data = b.data.to(dtype)
        with_grads([a, b])
        opt.step()
        opt.zero_grad()
    assert b.dtype == torch.float16 and (b == 0.5).all() and (a == 0.5).all()


class Marked(torch.Tensor): pass

def double_state(m): return m.double()
def half_state(m): return m.half()
def short_state(m): return m[:2].clone()
def number_state(m): return 1.
def subclass_state(m): return m.as_subclass(Marked)
def parameter_state(m): return torch.nn.Parameter(m, requires_grad=False)
def negative_state(m): return torch._neg_view(m.neg())
def transposed_state(m): return m.t()
def expanded_state(m): return m[:1].expand(4, 4)
STATES = [double_state, half_state, short_state, number_state, subclass_state,
          parameter_state, negative_state, transposed_state, expanded_state]

@pytest.mark.parametrize('way', FAST)
@pytest.mark.parametrize('change', STATES, ids=lambda f: f.__name__)
def test_a_state_that_changes(change, way):
    "What the loop does then, the others do, an error included."
    def run(**way):
        ps = ones((4, 4), (4, 4), (4, 4))
        opt = StepOptimizer(ps, [momentum, sgd], lr=0.25, momentum=0.5, **way)
        for t in range(5):
            if t == 2:
                state = opt.state[ps[1]]
                state['momentum_buffer'] = change(state['momentum_buffer'])
            with_grads(ps, 1. + t)
            try: opt.step()
            except Exception as e: return type(e)
        return [p.tolist() for p in ps]
    want = run(**WAYS['loop'])
    got = run(**WAYS[way])
    if isinstance(want, type): assert isinstance(got, type)
    else: assert got == want


@pytest.mark.parametrize('way', FAST)
def test_a_gradient_with_the_negative_bit(way):
    "As autograd makes one for an imaginary part, in the first step or later."
    def run(make):
        p = torch.nn.Parameter(torch.tensor(0.5))
        opt = make([p])
        for t in range(4):
            opt.zero_grad()
            z = torch.complex(torch.tensor(1.), p)
            (z.conj()*(1 + 2j)).real.backward() if t else p.mul(2).backward()
            opt.step()
        assert p.grad.is_neg()
        return p.item()
    for name, more in (('SGD', dict(momentum=0.5)), ('AdamW', {})):
        want = run(partial(getattr(torch.optim, name), lr=0.1, foreach=False, **more))
        got = run(partial(getattr(optim, name), lr=0.1, **more, **WAYS[way]))
        assert got == pytest.approx(want, rel=1e-6) and got < 0.5


def two_tensors(t): return TwoTensor(t, t.clone())
def marked(t): return t.as_subclass(Marked)
def zero_tensor(t): return torch._efficientzerotensor(t.shape)

@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('make', [two_tensors, marked, zero_tensor])
def test_a_state_or_gradient_that_is_no_plain_tensor(make, way):
    "It is stepped in Python, or refused there."
    def keeps(p, g, state):
        if 'm' not in state: state['m'] = make(torch.zeros(p.shape))
        state['m'] = state['m']*0.5 + g
    p, = with_grads(ones(5))
    opt = StepOptimizer([p], [keeps, sgd], lr=1., **WAYS[way])
    try:
        for _ in range(3): opt.step()
    except Exception: assert make is not marked or way == 'foreach'
    else: assert p.tolist() == [-2.]*5
    q, = ones(5)
    q.grad = torch.ones(5).as_subclass(Marked)
    opt = optim.SGD([q], lr=1., **WAYS[way])
    for _ in range(3): opt.step()
    assert q.tolist() == [-2.]*5


# --- tensors in the same memory
def tie(a, b): b.data = a.data
def lap(a, b): b.data = a.data[1:]
def contain(a, b): b.data = a.data[2:4]
OVERLAPS = [tie, lap, contain]

def decayed_momentum(ps, **way):
    steps = [decay, momentum, sgd]
    return StepOptimizer(ps, steps, lr=0.25, momentum=0.5, weight_decay=0.5, **way)

@pytest.mark.parametrize('way', FAST)
@pytest.mark.parametrize('at', [0, 1, 3])
@pytest.mark.parametrize('meet', OVERLAPS)
def test_weights_in_the_same_memory(meet, at, way):
    "From the start or later: one is stepped after the other, as in the loop."
    def run(**way):
        a, b, c = ones(6, 6, 6)
        opt = decayed_momentum([a, b, c], **way)
        for t in range(6):
            if t == at:
                for p in (a, b, c): p.grad = None
                meet(a, b)
                for s in opt.state.values(): s.clear()
            with_grads([a, b, c], 1. + t)
            opt.step()
        return [p.tolist() for p in (a, b, c)]
    assert run(**WAYS[way]) == run(**WAYS['loop'])
    def stay(a, b): pass
    untied, meet = run(**WAYS[way]), stay
    assert run(**WAYS[way]) != untied


@pytest.mark.parametrize('way', FAST)
@pytest.mark.parametrize('late', [0, 1])
def test_a_kernel_beside_the_loop(late, way):
    """One of two tied weights joins later, and Python makes its first step.

    They are stepped in the order of the group."""
    def run(**way):
        a, b = ones(4, 4)
        opt = decayed_momentum([a, b], **way)
        for t in range(4):
            a.grad, b.grad = None, None
            b.data = a.data
            with_grads([a, b], 1. + t)
            if t == 0: (a, b)[late].grad = None
            opt.step()
        buffers = [opt.state[p]['momentum_buffer'].tolist() for p in (a, b)]
        return a.tolist(), buffers
    def apart(**way):
        ps = with_grads(ones(4, 4))
        opt = decayed_momentum(ps, **way)
        for _ in range(4): opt.step()
        return ps[0].tolist()
    together = run(**WAYS[way])
    assert together == run(**WAYS['loop']) and together[0] != apart(**WAYS[way])


def test_tied_weights_race_in_no_kernel():
    "Two threads must not step the same memory, in no step after the one that noticed."
    a, b = ones(60_000, 60_000)
    opt = optim.SGD([a, b], lr=1/1024, fused=True)
    for t in range(200):
        if t == 3: b.data = a.data
        with_grads([a, b])
        opt.step()
    assert a.min() == a.max() == 1 - 3/1024 - 2*197/1024


@pytest.mark.parametrize('way', FAST)
def test_a_state_that_all_share(way):
    shared = torch.zeros(4)
    def pooled(p, g, state):
        m = state.setdefault('m', shared)
        return m.mul_(0.5).add_(g)
    def run(**way):
        shared.zero_()
        ps = with_grads(ones(4, 4, 4))
        opt = StepOptimizer(ps, [pooled, sgd], lr=0.25, **way)
        for p in ps: opt.state[p]['m'] = shared
        for _ in range(3): opt.step()
        return [p.tolist() for p in ps]
    assert run(**WAYS[way]) == run(**WAYS['loop'])


@pytest.mark.parametrize('at', [0, 2])
def test_a_gradient_inside_a_parameter(at):
    "It overlaps without beginning where the parameter begins."
    def run(**way):
        base = torch.ones(10)
        a, b = torch.nn.Parameter(base[:6]), torch.nn.Parameter(torch.ones(4))
        opt = StepOptimizer([a, b], [sgd], lr=0.25, **way)
        for t in range(4):
            with_grads([a, b])
            if t >= at: b.grad = base[3:7]
            told = tell(opt)
            if way.get('fused') and t == at: assert 'shares its memory' in told[0]
        return a.tolist(), b.tolist()
    assert run(**WAYS['fused']) == run(**WAYS['loop'])


# --- nothing is kept alive
def replaced(opt, ps, i):
    """Put a smaller parameter in the place of `ps[i]`, as pruning does.

    What comes back are references to what was there: the parameter and its state."""
    old = ps[i]
    tensors = [v for v in opt.state[old].values() if torch.is_tensor(v)]
    held = [weakref.ref(t) for t in (old, *tensors)]
    ps[i] = torch.nn.Parameter(old.detach()[:5].clone())
    opt.param_groups[0]['params'][i] = ps[i]
    opt.state.pop(old)
    return held

@pytest.mark.parametrize('way', WAYS)
def test_replaced_parameters_are_freed(way):
    ps = with_grads(ones((9, 3), (9, 3)))
    opt = optim.Adam(ps, lr=0.1, **WAYS[way])
    opt.step()
    opt.step()
    held = replaced(opt, ps, 0)
    gc.collect()
    assert [ref() for ref in held] == [None]*3             # before any other step
    with_grads(ps)
    opt.step()
    assert torch.allclose(ps[0], ps[1][:5]) and opt.state[ps[0]]['step'] == 1
    kept = weakref.ref(ps[1])
    assert kept() is ps[1]

@pytest.mark.parametrize('way', FAST)
def test_memory_does_not_grow(way):
    "Parameters replaced before every step: plans are forgotten."
    ps = ones((9, 3), (9, 3))
    opt = optim.Adam(ps, lr=0.1, **WAYS[way])
    for _ in range(30):
        with_grads(ps)
        opt.step()
        old, ps[0] = ps[0], torch.nn.Parameter(torch.ones(9, 3))
        opt.param_groups[0]['params'][0] = ps[0]
        del opt.state[old]
    assert len(opt.memo.plans) <= 4

@pytest.mark.parametrize('way', WAYS)
def test_steps_and_what_they_hold_are_freed(way):
    class Teacher: pass
    def made():
        teacher = Teacher()
        def step(p, g, state, *, lr): return g if teacher else None
        opt = StepOptimizer(with_grads(ones(3)), [step, sgd], lr=0.1, **WAYS[way])
        opt.step()
        return weakref.ref(teacher)
    held = made()
    gc.collect()
    assert held() is None


# --- one step for many parameters
def decay_marked(p, g, state, *, lr):
    if not getattr(p, 'no_decay', False): p.mul_(1 - lr)

def decay_by_share(p, g, state, *, lr):
    if hasattr(p, 'share'): p.mul_(1 - lr*p.share)

@pytest.mark.parametrize('way', WAYS)
def test_flags_on_parameters(way):
    "Each gets its own answer, also when a flag is set, changed or deleted later."
    a, b, c = with_grads(ones(2, 2, 2), 0.)
    b.no_decay, c.share, a.label = True, 0.5, 'a'
    steps = [decay_marked, decay_by_share, sgd]
    opt = StepOptimizer([a, b, c], steps, lr=0.5, **WAYS[way])
    def stepped():
        opt.step()
        return [p[0].item() for p in (a, b, c)]
    assert stepped() == [0.5, 1., 0.375]
    a.no_decay, b.no_decay, c.share = True, False, 1.
    assert stepped() == [0.5, 0.5, 0.09375]
    del a.no_decay, b.no_decay, c.share
    assert stepped() == [0.25, 0.25, 0.046875]

def test_names_on_parameters_do_not_split_them():
    "An attribute that no step asks for makes no bucket of its own."
    ps = with_grads(ones(*[2]*5))
    for i, p in enumerate(ps): p.label = f'layer{i}.weight'
    opt = optim.AdamW(ps, fused=True)
    opt.step()
    opt.step()
    plan, = opt.memo.plans.values()
    assert len(plan.buckets) == 1


@pytest.mark.parametrize('n', [1000, 2**19])
@pytest.mark.parametrize('way', FAST)
def test_swapped_states(n, way):
    def two_buffers(p, g, state):
        if 'a' not in state: state.update(a=torch.zeros_like(p), b=torch.zeros_like(p))
        state['a'], state['b'] = state['b'], state['a']
        state['a'].mul_(0.5)
        state['b'].copy_(g)
        return state['a'] + state['b']
    def run(**way):
        p = torch.zeros(n, requires_grad=True)
        opt = StepOptimizer([p], [two_buffers, sgd], lr=1., **way)
        for t in range(4):
            p.grad = torch.full_like(p, 1. + t)
            opt.step()
        return [t.unique().tolist() for t in (p, opt.state[p]['a'], opt.state[p]['b'])]
    assert run(**WAYS[way]) == run(**WAYS['loop']) == [[-13.], [1.5], [4.]]


# --- what a state may hold
ODD = dict(
    list=list, dict=dict, set=set, array=lambda: np.zeros(2), lock=threading.Lock,
    object=object, number=lambda: np.float64(1.), tuple=lambda: (torch.ones(1),))

def is_untouched(opt, ps):
    "Whether two parameters still hold ones, and nothing has a state."
    return [p.tolist() for p in ps] == [[1.]*2, [1.]*3] and not any(opt.state.values())

@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('what', ODD)
def test_a_state_that_no_checkpoint_can_give_back(what, way):
    "Refused with the names of step and entry, and nothing has changed."
    thing = ODD[what]()
    def keeps(p, g, state):
        state['last'] = thing
        p.mul_(2)
    ps = with_grads(ones(2, 3))
    opt = StepOptimizer(ps, [momentum, keeps, sgd], lr=0.5, momentum=0.5, **WAYS[way])
    for _ in range(2):
        words = r"step keeps keeps a .* in state\['last'\]"
        with pytest.raises(TypeError, match=words): opt.step()
        assert is_untouched(opt, ps)

@pytest.mark.parametrize('way', WAYS)
def test_an_entry_that_comes_later(way):
    "Of a checkpoint, of the user, of a step that keeps it from its second call on."
    def later(p, g, state):
        state['t'] = t = state.get('t', 0) + 1
        if t > 1: state['old'] = [t]
    ps = with_grads(ones(2, 3))
    opt = StepOptimizer(ps, [later, sgd], lr=0.5, **WAYS[way])
    opt.step()
    with pytest.raises(TypeError, match=r"in state\['old'\]"): opt.step()
    other = StepOptimizer(ps, [sgd], lr=0.5, **WAYS[way])
    other.state[ps[1]]['mine'] = {}
    with pytest.raises(TypeError, match=r"a dict in state\['mine'\]"): other.step()

@pytest.mark.parametrize('way', WAYS)
def test_a_first_step_that_fails_leaves_no_trace(way):
    calls = []
    def fails_once(p, g, state):
        p.add_(1)
        state['m'] = torch.ones_like(p)
        calls.append(1)
        if len(calls) < 4: raise RuntimeError('no')
    ps = with_grads(ones(2, 3))
    opt = StepOptimizer(ps, [fails_once, sgd], lr=0.5, **WAYS[way])
    with pytest.raises(RuntimeError, match='no'): opt.step()
    assert is_untouched(opt, ps)


# --- interruptions
@pytest.mark.parametrize('error', [KeyboardInterrupt, MemoryError])
def test_an_interruption_before_the_launch(error, monkeypatch):
    "No count is ahead of its weights: what was not stepped was not counted."
    ps = with_grads([*ones((4, 4), (4, 4)), *ones((3,), dtype=torch.float64)])
    opt = optim.AdamW(ps, lr=0.1, fused=True)
    opt.step()
    opt.step()
    ran, run = [], dispatch.Launch.run
    def interrupted(launch):
        if ran: raise error
        ran.append(launch)
        run(launch)
    monkeypatch.setattr(dispatch.Launch, 'run', interrupted)
    before = [p.detach().clone() for p in ps]
    with pytest.raises(error): opt.step()
    moved = [not torch.equal(p, q) for p, q in zip(ps, before)]
    assert moved == [True, True, False]
    assert [opt.state[p]['step'] for p in ps] == [3, 3, 2]

def test_an_interruption_in_the_kernel(monkeypatch):
    ps = with_grads(ones((4, 4)))
    opt = optim.AdamW(ps, lr=0.1, fused=True)
    opt.step()
    opt.step()
    class Interrupted:
        n_sums, chunk = 0, 1
        def __call__(self, *args): raise KeyboardInterrupt
    for found in opt.memo.programs.values():
        for program in found:
            if program.kernel: monkeypatch.setattr(program, 'kernel', Interrupted())
    before = ps[0].detach().clone()
    with pytest.raises(KeyboardInterrupt): opt.step()
    assert torch.equal(ps[0], before) and opt.state[ps[0]]['step'] == 2


# --- numbers that are none
@pytest.mark.parametrize('way', WAYS)
def test_a_number_that_is_nan(way):
    import math
    def skip_bad_loss(p, g, state, *, loss=0.):
        if not math.isfinite(loss): return torch.zeros_like(g)
    p, = with_grads(ones(4))
    opt = StepOptimizer([p], [skip_bad_loss, sgd], lr=0.25, **WAYS[way])
    for loss in (1., 2., float('nan'), float('inf'), float('nan'), 3.):
        opt.param_groups[0]['loss'] = loss
        opt.step()
    assert p.tolist() == [0.25]*4
