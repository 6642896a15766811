"""What a checkpoint holds and who loads it: empty groups, entries that belong to no
parameter, names with prefixes, torch's form of a dictionary, hooks, failed loads."""
import copy
import io
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch import nn

from optimizers_explained import callback, composer, optim
from optimizers_explained.contract import workbench
from optimizers_explained.steps import adam
from optimizers_explained.checkpoint import as_count, as_number, convert_state
from optimizers_explained.contract import exercised
from optimizers_explained.core import StepOptimizer
from optimizers_explained.steps import l2, momentum, sgd
from optimizers_explained.contract.workbench import (
    agree, leaves, same, train, trained, twins)
from optimizers_explained.problems import max_diff
from optimizers_explained.callback.wrapper import OptimWrapper

WAYS = dict(loop=dict(foreach=False), foreach=dict(foreach=True),
            fused=dict(fused=True))
TORCHS = 'SGD', 'Adam', 'AdamW'
NAMES = list(optim.__all__)

def make_of(name, **more): return exercised(getattr(optim, name), **more)

def without(sd, key): return {k: v for k, v in sd.items() if k != key}
def elsewhere(sd): return {k: sd[k] for k in ('state', 'param_groups')}    # as torch's

def via_file(sd):
    file = io.BytesIO()
    torch.save(sd, file)
    file.seek(0)
    return torch.load(file, weights_only=True)

def on_copies(make, ps):
    "A new optimizer, and its parameters: copies of `ps`."
    qs = twins(ps)
    return make(qs), qs

def params_of(opt): return [p for g in opt.param_groups for p in g['params']]
def states(opt, ps): return [opt.state[p] for p in ps]
def counts(entries): return [s['step'] for s in entries]
def are(these, those): return list(map(id, these)) == list(map(id, those))

def all_of(opt): return opt.state_dict(), [p.detach() for p in params_of(opt)]

def refuses(opt, sd, words, error=ValueError):
    "Whether a load fails with these words and leaves everything as it was."
    before = copy.deepcopy(all_of(opt))
    hooks = dict(opt._optimizer_load_state_dict_pre_hooks)
    with pytest.raises(error) as e: opt.load_state_dict(sd)
    assert words in str(e.value)
    assert opt._optimizer_load_state_dict_pre_hooks == hooks
    return same(all_of(opt), before)


# --- empty groups
def with_empty(ps): return [{'params': ps}, {'params': [], 'weight_decay': 0.}]

@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('name', NAMES)
def test_an_empty_group_changes_nothing(name, way):
    make, ps, qs = make_of(name, **WAYS[way]), leaves(), leaves()
    opt, late = make(with_empty(ps)), make(qs)
    late.add_param_group({'params': [], 'weight_decay': 0.})
    want = trained(make_of(name, **WAYS[way]))[1]
    train(opt, ps), train(late, qs)
    assert max_diff(ps, want) == max_diff(qs, want) == 0.
    rs = twins(ps)
    other = make(with_empty(rs), lr=0.5)
    other.load_state_dict(via_file(opt.state_dict()))
    clone, cs = pickle.loads(pickle.dumps((opt, ps)))
    for o, xs in ((opt, ps), (other, rs), (clone, cs)): train(o, xs, range(5, 10))
    assert max_diff(ps, rs) == max_diff(ps, cs) == 0.
    assert same(opt.state_dict(), other.state_dict())
    opt.add_param_group({'params': leaves((5,))})
    assert len(opt.param_groups) == 3 and 'Parameter Group 1' in repr(opt)

@pytest.mark.parametrize('name', workbench.SCHEDULERS)
def test_a_scheduler_drives_an_empty_group(name):
    def rates(groups):
        ps = leaves()
        opt = make_of('SGD')(groups(ps))
        sched, seen = workbench.SCHEDULERS[name](opt), []
        for t in range(8):
            train(opt, ps, [t])
            if name == 'ReduceLROnPlateau': sched.step(1.)
            else: sched.step()
            seen.append([g['lr'] for g in opt.param_groups])
        return seen, ps
    (seen, ps), (want, qs) = rates(with_empty), rates(lambda ps: [{'params': ps}])
    assert max_diff(ps, qs) == 0. and [s[:1] for s in seen] == want
    assert [s[1] for s in seen] == [s[0] for s in seen]

@pytest.mark.parametrize('name', TORCHS)
def test_checkpoints_with_an_empty_group_move_between_torch_and_ours(name):
    ours, theirs = getattr(optim, name), getattr(torch.optim, name)
    for a, b in (ours, theirs), (theirs, ours):
        ps = leaves()
        opt = a(with_empty(ps), lr=0.05)
        train(opt, ps)
        qs = twins(ps)
        other = b(with_empty(qs), lr=0.5)
        other.load_state_dict(copy.deepcopy(opt.state_dict()))
        train(opt, ps, range(5, 10)), train(other, qs, range(5, 10))
        agree(ps, qs, f'{name} after loading')
        assert [len(g['params']) for g in other.param_groups] == [2, 0]

def test_an_empty_group_is_converted_to_fastai_and_back():
    ps = leaves()
    opt = make_of('SGDW', lr=0.01)(with_empty(ps))
    train(opt, ps)
    qs = twins(ps)
    other = callback.SGD([qs, []], lr=0.3, mom=0.9, wd=0.1)
    other.load_state_dict(convert_state(opt.state_dict(), other))
    rs = twins(ps)
    back = make_of('SGDW', lr=0.3)(with_empty(rs))
    back.load_state_dict(convert_state(other.state_dict(), back))
    assert same(back.state_dict()['state'], opt.state_dict()['state'])
    assert [g['lr'] for g in back.param_groups] == [0.01, 0.01]

@pytest.mark.parametrize('way', WAYS)
def test_nothing_but_empty_groups_as_in_torch(way):
    "`ZeroRedundancyOptimizer` builds this where a process owns nothing."
    for make in partial(torch.optim.AdamW), partial(optim.AdamW, **WAYS[way]):
        opt = make([{'params': []}])
        opt.step(), opt.zero_grad()
        opt.load_state_dict(opt.state_dict())
        p = torch.ones(2, requires_grad=True)
        opt.add_param_group({'params': [p]})
        p.grad = torch.ones(2)
        opt.step()
        assert p[0] < 1

@pytest.mark.parametrize('name', NAMES)
def test_no_groups_are_refused_in_torchs_words(name):
    for nothing in [], (), iter([]):
        with pytest.raises(ValueError, match='params is empty .optimizer got an empty '
                           'parameter list.: pass at least one'):
            make_of(name)(nothing)
    with pytest.raises(ValueError, match='optimizer got an empty parameter list'):
        torch.optim.SGD([])


# --- entries that belong to no parameter
def foreign(ps):
    return {'tokens': 512, 'rate': 0.5, 'who': 'me', 'sum': torch.arange(3.),
            'nested': {'a': {'b': [torch.ones(2), {'c': 1}]}},
            'averages': {p: p.detach().clone() for p in ps}, 'slow': {ps[0]},
            'pairs': {(ps[0], 'x'): torch.zeros(1)}}

def put(opt, entries):
    for k, v in entries.items(): opt.state[k] = v

def strings(opt): return {k: v for k, v in opt.state.items() if isinstance(k, str)}

@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('name', NAMES)
def test_foreign_entries_survive(name, way):
    make = make_of(name, **WAYS[way])
    opt, ps = trained(make)
    put(opt, foreign(ps))
    before = dict(strings(opt))
    train(opt, ps, [5])
    opt.load_state_dict(opt.state_dict())
    train(opt, ps, [6])
    after = strings(opt)
    plain = 'tokens', 'rate', 'who', 'sum', 'nested'
    for k in plain: assert same(after[k], before[k])
    assert are(after['averages'], ps)
    assert same(list(after['averages'].values()), list(before['averages'].values()))
    assert next(iter(after['slow'])) is ps[0] and next(iter(after['pairs']))[0] is ps[0]
    qs = leaves()
    train(opt, ps, range(7, 10)), train(make(qs), qs, range(10))
    agree(ps, qs, 'with entries and without', 0.)

def test_foreign_entries_are_copied():
    opt, ps = trained(make_of('AdamW'))
    put(opt, foreign(ps))
    sd, other = opt.state_dict(), make_of('AdamW')(leaves())
    other.load_state_dict(sd)
    sd['state']['sum'].zero_()
    sd['state']['nested']['a']['b'][0].zero_()
    for average in sd['state']['averages'].values(): average.zero_()
    sd['state']['nested']['new'] = 1
    kept = strings(other)
    assert kept['sum'].tolist() == [0., 1., 2.] and kept['nested'].keys() == {'a'}
    assert kept['nested']['a']['b'][0].tolist() == [1., 1.]
    for average in kept['averages'].values(): assert average.abs().sum() > 0
    assert are(kept['averages'], ps)                            # the same, as in torch

def test_a_parameter_of_its_own_is_not_copied():
    opt, ps = trained(make_of('AdamW'))
    opt.state['leader'] = {'is': ps[0], 'was': ps[0].detach().clone().requires_grad_()}
    was = opt.state['leader']['was']
    opt.load_state_dict(opt.state_dict())
    assert opt.state['leader']['is'] is ps[0]
    assert opt.state['leader']['was'] is not was

def pickled(o): return pickle.loads(pickle.dumps(o))

@pytest.mark.parametrize('copier', [copy.deepcopy, pickled])
def test_a_copied_optimizer_keeps_foreign_entries(copier):
    opt, ps = trained(make_of('AdamW'))
    put(opt, foreign(ps))
    twin, qs = copier((opt, ps))
    assert are(twin.state['averages'], qs)
    assert twin.state['averages'][qs[0]] is not opt.state['averages'][ps[0]]
    assert same(twin.state['nested'], opt.state['nested'])
    assert twin.state['tokens'] == 512
    twin.load_state_dict(twin.state_dict())
    agree(train(opt, ps, range(5, 9)), train(twin, qs, range(5, 9)), 'copy', 0.)

def test_foreign_entries_go_through_a_file_and_to_torch():
    opt, ps = trained(optim.AdamW)
    put(opt, {'tokens': 512, 'nested': {'a': torch.ones(2)}})
    other, qs = on_copies(torch.optim.AdamW, ps)
    other.load_state_dict(via_file(opt.state_dict()))
    assert same(strings(other), {'tokens': 512, 'nested': {'a': torch.ones(2)}})
    back, rs = on_copies(optim.AdamW, ps)
    back.load_state_dict(via_file(other.state_dict()))
    assert same(strings(back), strings(opt))
    for o, xs in ((opt, ps), (other, qs), (back, rs)): train(o, xs, range(5, 9))
    agree(ps, qs, "torch's"), agree(ps, rs, 'ours', 0.)

def test_foreign_entries_through_convert_state():
    opt, ps = trained(make_of('DecoupledAdamW'))
    put(opt, foreign(ps))
    port = composer.DecoupledAdamW(twins(ps))
    converted = convert_state(opt.state_dict(), port)
    assert are(converted['state']['averages'], ps)
    port.load_state_dict(converted)
    assert port.state['tokens'] == 512
    fastais = callback.SGD(leaves(), lr=0.1, mom=0.9)
    opt, ps = trained(make_of('SGDW'))
    put(opt, foreign(ps))
    assert len(convert_state(opt.state_dict(), fastais)['state']) == len(ps)

@pytest.mark.parametrize('library', [optim, torch.optim], ids=['ours', "torch's"])
def test_the_wrapper_carries_foreign_entries(library):
    ps, cls = leaves(), library.AdamW
    wrapped = OptimWrapper(ps, cls, lr=0.1)
    train(wrapped.opt, ps)
    put(wrapped.opt, foreign(ps))
    sd = wrapped.state_dict()
    other = OptimWrapper(leaves(), cls, lr=0.1)
    other.load_state_dict(convert_state(sd, other))
    assert other.opt.state['tokens'] == 512
    assert same(other.opt.state_dict()['state'][0], sd['state'][0])
    wrapped.load_state_dict(sd)
    sd['state']['averages'][ps[0]].zero_()
    averages = wrapped.opt.state['averages']
    assert are(averages, ps) and averages[ps[0]].abs().sum() > 0

def test_an_entry_of_a_tensor_in_no_group():
    "torch raises `KeyError: 139...`; an empty entry, which reading makes, is no harm."
    opt, ps = trained(make_of('AdamW'))
    loose = torch.ones(3)
    assert not opt.state[loose] and len(opt.state_dict()['state']) == 2
    opt.state[loose]['mine'] = 1
    with pytest.raises(ValueError, match=r'tensor of shape \(3,\) that is in no'):
        opt.state_dict()
    assert opt.state[loose] == {'mine': 1}
    theirs = torch.optim.SGD(ps, lr=0.1)
    theirs.state[loose]['mine'] = 1
    with pytest.raises(KeyError): theirs.state_dict()

def test_a_number_as_a_key():
    opt, _ = trained(make_of('SGD'))
    opt.state[7] = 'mine'                                 # no parameter has this number
    opt.load_state_dict(opt.state_dict())
    assert opt.state[7] == 'mine'
    opt.state[1] = 'mine'
    with pytest.raises(ValueError, match='key 1, the number of a parameter'):
        opt.state_dict()

def test_an_entry_that_cannot_be_copied():
    opt, ps = trained(make_of('SGD'))
    opt.state['loss'] = (ps[0]*2).sum()                   # deepcopy refuses a result
    with pytest.raises(TypeError, match="entry 'loss' of the checkpoint's state"):
        opt.load_state_dict(opt.state_dict())


# --- names
def net():
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    return nn.Sequential(nn.Linear(2, 3), inner)

def compiled(m): return torch.compile(m)
def parallel(m): return nn.DataParallel(m)
def inside(m):
    m[1] = torch.compile(m[1])
    return m
def checkpointed(m):
    wrappers = pytest.importorskip(
        'torch.distributed.algorithms._checkpoint.checkpoint_wrapper')
    m[1][0] = wrappers.CheckpointWrapper(m[1][0])
    return m
def nested(m): return parallel(compiled(inside(m)))
def sharded(m): # FSDP's wrapper puts this word into the names
    holder = nn.Module()
    holder._fsdp_wrapped_module = m
    return holder

def names_of(model): return [n for n, _ in model.named_parameters()]

WRAPPED = [compiled, parallel, inside, checkpointed, nested, sharded]

@pytest.mark.parametrize('name', ['SGD', 'AdamW'])
@pytest.mark.parametrize('wrap', WRAPPED, ids=lambda f: f.__name__)
def test_wrapped_names_are_the_same_names(wrap, name):
    make, plain, wrapped = make_of(name), net(), wrap(net())
    assert names_of(plain) != names_of(wrapped)
    for a, b in (plain, wrapped), (wrapped, plain):
        opt = make(list(a.named_parameters()))
        other = make(list(b.named_parameters()))
        ps, qs = list(a.parameters()), list(b.parameters())
        train(opt, ps)
        own = other.param_groups[0]['param_names']
        other.load_state_dict(via_file(opt.state_dict()))
        assert same(states(opt, ps), states(other, qs))
        assert other.param_groups[0]['param_names'] == own

@pytest.mark.parametrize('wrap', WRAPPED, ids=lambda f: f.__name__)
def test_wrapped_names_in_another_order_are_refused(wrap):
    opt = make_of('SGD')(list(net().named_parameters()))
    other = make_of('SGD')(list(wrap(net()).named_parameters())[::-1])
    train(opt, opt.param_groups[0]['params'])
    assert refuses(other, opt.state_dict(), "'0.weight' in the checkpoint and ")
    assert refuses(other, opt.state_dict(), 'in the order they were saved')

def by_names(*groups):
    def group(names): return {'params': list(zip(names, leaves(*[(3,)]*len(names))))}
    return make_of('SGD')(list(map(group, groups)))

OTHER_NAMES = [
    ([['a', 'b']], [['a', 'c']], "'b' only there, 'c' only here"),
    ([['a'], ['b']], [['b'], ['c']], "'a' only there, 'c' only here"),
    ([list('abcdef')], [list('uvwxyz')], "'a', 'b', 'c' and 3 more only there, 'u'"),
    ([['modules.a']], [['a']], "'modules.a' only there"),
    ([['a.module']], [['a']], "'a.module' only there")]
OTHER_ORDER = [
    ([['a', 'b']], [['b', 'a']], "of group 0 is 'a' in the checkpoint and 'b' here"),
    ([['a'], ['b']], [['b'], ['a']], "parameter 0 of group 0 is 'a' in the checkpoint"),
    ([['a', 'b'], ['c']], [['a', 'c'], ['b']], "parameter 1 of group 0 is 'b' in the"),
    ([['w', 'module.w']], [['module.w', 'w']], "parameter 0 of group 0 is 'w' in the"),
    ([['module.a', 'module.b']], [['b', 'a']], "'module.a' in the checkpoint and 'b'")]

@pytest.mark.parametrize('saved, own, words', OTHER_NAMES + OTHER_ORDER)
def test_other_names_and_another_order_are_told_apart(saved, own, words):
    opt, other = by_names(*saved), by_names(*own)
    train(opt, params_of(opt))
    assert refuses(other, opt.state_dict(), words)
    kind = 'in the order' if (saved, own, words) in OTHER_ORDER else 'other names'
    assert refuses(other, opt.state_dict(), kind)

def test_names_on_one_side_only():
    opt, ps = trained(make_of('SGD'))
    qs = twins(ps)
    with_names = make_of('SGD')([('a', qs[0]), ('b', qs[1])])
    with_names.load_state_dict(opt.state_dict())
    assert with_names.param_groups[0]['param_names'] == ['a', 'b']
    assert same(states(opt, ps), states(with_names, qs))
    train(with_names, qs, [5])
    opt.load_state_dict(with_names.state_dict())
    assert same(states(opt, ps), states(with_names, qs))


# --- the dictionary is torch's
@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('name', TORCHS)
def test_a_state_dict_is_what_torchs_would_be(name, way):
    kw = dict(lr=0.05)
    if name == 'SGD': kw['momentum'] = 0.9
    else: kw['amsgrad'] = True
    opt, _ = trained(partial(getattr(optim, name), **kw, **WAYS[way]))
    theirs, _ = trained(partial(getattr(torch.optim, name), **kw))
    a, b = opt.state_dict(), theirs.state_dict()
    assert a.keys() - b.keys() == {'steps', 'shapes'}
    for mine, want in zip(a['param_groups'], b['param_groups']):
        assert mine.keys() == want.keys()
        assert {k: mine[k] for k in want} == want
    assert a['state'].keys() == b['state'].keys()
    for k, want in b['state'].items():
        assert a['state'][k].keys() == want.keys()
        for key, v in want.items():
            mine = a['state'][k][key]
            assert (mine.dtype, mine.shape, mine.device) == (v.dtype, v.shape, v.device)
            if key == 'step': assert torch.equal(mine, v)

def test_live_counts_are_numbers_and_stored_ones_are_tensors():
    opt, ps = trained(make_of('AdamW'))
    for _ in range(2):
        assert list(map(type, counts(states(opt, ps)))) == [int, int]
        stored = counts(opt.state_dict()['state'].values())
        assert len(stored) == 2
        for s in stored: assert (s.dtype, s.ndim, s.item()) == (torch.float32, 0, 5.)
        assert stored[0] is not stored[1]        # torch counts up in place
        opt.load_state_dict(via_file(opt.state_dict()))

@pytest.mark.parametrize('count', [0, 2**24 - 1, 2**24, 2**24 + 1, 10**10 + 1])
def test_no_count_is_rounded(count):
    assert as_number(as_count(count)) == count
    opt, ps = trained(make_of('AdamW'))
    for p in ps: opt.state[p]['step'] = count
    other, qs = trained(make_of('AdamW'), [])
    other.load_state_dict(via_file(opt.state_dict()))
    assert counts(states(other, qs)) == [count]*2

def test_default_tensor_type_and_device_do_not_matter():
    opt, _ = trained(make_of('AdamW'))
    try:
        torch.set_default_dtype(torch.bfloat16)
        torch.set_default_device('meta')
        step = opt.state_dict()['state'][0]['step']
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert (step.dtype, step.device.type, step.item()) == (torch.float32, 'cpu', 5.)

@pytest.mark.parametrize('name', NAMES)
def test_old_checkpoints_with_plain_counts_load(name):
    opt, ps = trained(make_of(name))
    old = opt.state_dict()
    for entry in old['state'].values():
        if 'step' in entry: entry['step'] = int(entry['step'])
    other, qs = on_copies(make_of(name, lr=0.5), ps)
    other.load_state_dict(via_file(old))
    agree(train(opt, ps, range(5, 15)), train(other, qs, range(5, 15)), 'resumed', 0.)

def test_converted_counts_are_tensors_for_torch_and_numbers_for_fastai():
    opt, ps = trained(make_of('DecoupledAdamW'))
    sd, old = opt.state_dict(), opt.state_dict()
    for entry in old['state'].values(): entry['step'] = 5
    for checkpoint in sd, old:
        port, qs = on_copies(partial(composer.DecoupledAdamW, lr=0.5), ps)
        port.load_state_dict(convert_state(checkpoint, port))
        assert all(map(torch.is_tensor, counts(states(port, qs))))
        port.step()
    fastai = pytest.importorskip('fastai.optimizer', reason='fastai is not installed')
    theirs = fastai.Adam(twins(ps), lr=0.1)
    converted = convert_state(trained(make_of('AdamW'))[0].state_dict(), theirs)
    assert counts(converted['state']) == [5, 5]
    assert list(map(type, counts(converted['state']))) == [int, int]
    back = convert_state(converted, opt)
    for step in counts(back['state'].values()): assert step.dtype is torch.float32

@pytest.mark.parametrize('name', TORCHS)
def test_torchs_switches_do_not_stay_in_our_groups(name):
    theirs, _ = trained(partial(getattr(torch.optim, name), lr=0.05, foreach=True))
    sd = theirs.state_dict()
    sd['param_groups'][0]['note'] = sd['param_groups'][0]['initial_lr'] = 0.25
    ours = getattr(optim, name)
    unnamed = partial(StepOptimizer, steps=ours(leaves()).steps, lr=0.1)
    for make in ours, unnamed:
        opt = make(leaves())
        keys = opt.param_groups[0].keys() | {'note', 'initial_lr'}
        opt.load_state_dict(sd)
        assert opt.param_groups[0].keys() == keys
        assert opt.param_groups[0]['note'] == 0.25
        opt.load_state_dict(opt.state_dict())
        assert opt.param_groups[0].keys() == keys
    assert 'foreach' in theirs.param_groups[0]

def test_a_key_of_ones_own_stays_whatever_its_name():
    "`alpha` is a hyperparameter of torch's RMSprop, and here somebody's note."
    ps = leaves()
    opt = make_of('SGD')([{'params': ps, 'alpha': 3, 'capturable': 'mine'}])
    train(opt, ps)
    other = make_of('SGD')(leaves())
    other.load_state_dict(opt.state_dict())
    group, = other.param_groups
    assert (group['alpha'], group['capturable']) == (3, 'mine')

def test_torchs_maximize_is_refused_where_no_step_climbs():
    def make(ps): return StepOptimizer(ps, [l2, momentum, sgd], lr=0.1, momentum=0.9)
    for climbs in False, True:
        theirs = partial(torch.optim.SGD, lr=0.1, momentum=0.9, maximize=climbs)
        opt, sd = make(leaves()), trained(theirs)[0].state_dict()
        if climbs: assert refuses(opt, sd, 'maximize=True, which no step here takes')
        else: opt.load_state_dict(sd)

def test_torchs_keys_are_read_from_the_class():
    class AdamW(StepOptimizer): pass
    class Mine(AdamW): pass
    class Adagrad(StepOptimizer): pass
    class Muon2(StepOptimizer): pass
    def extra(opt): return opt.state_dict()['param_groups'][0]
    steps = optim.AdamW(leaves()).steps
    want = torch.optim.AdamW(leaves()).defaults.keys() | {'params'}
    for cls in AdamW, Mine: assert extra(cls(leaves(), steps, lr=0.1)).keys() == want
    for cls in Adagrad, Muon2, StepOptimizer:              # torch has none with betas
        opt = cls(leaves(), steps, lr=0.1)
        assert extra(opt).keys() == opt.defaults.keys() | {'params'}


# --- counts that a step keeps in its own way
def counts_in_a_tensor(p, g, state):
    if 'step' not in state: state['step'] = torch.zeros(())
    return g/state['step'].add_(1)

def counts_each_element(p, g, state):
    if 'step' not in state: state['step'] = torch.zeros_like(p)
    return g/state['step'].add_((g > 0).to(p.dtype)).add(1)

def counts_in_halves(p, g, state):
    state['step'] = state.get('step', 0.) + 0.5
    return g/state['step']

OWN_COUNTS = [counts_in_a_tensor, counts_each_element, counts_in_halves]

@pytest.mark.parametrize('count', OWN_COUNTS, ids=lambda f: f.__name__)
def test_a_count_keeps_its_type(count):
    make = partial(StepOptimizer, steps=[count, sgd], lr=0.1)
    opt, ps = trained(make)
    kind = type(opt.state[ps[0]]['step'])
    other, qs = on_copies(make, ps)
    other.load_state_dict(via_file(opt.state_dict()))
    assert type(other.state[qs[0]]['step']) is kind
    agree(train(opt, ps, range(5, 9)), train(other, qs, range(5, 9)), 'resumed', 0.)
    opt.load_state_dict(without(opt.state_dict(), 'counts'))
    assert type(opt.state[ps[0]]['step']) is kind           # as its own state has it
    train(opt, ps, [9])

def test_a_count_for_every_element_from_other_hands():
    make = partial(StepOptimizer, steps=[counts_each_element, sgd], lr=0.1)
    opt, ps = trained(make)
    other, qs = on_copies(make, ps)
    other.load_state_dict(elsewhere(opt.state_dict()))
    agree(train(opt, ps, range(5, 9)), train(other, qs, range(5, 9)), 'resumed', 0.)

def test_no_state_is_no_entry():
    opt, _ = trained(make_of('SGD', momentum=0., dampening=0.))
    theirs, _ = trained(partial(torch.optim.SGD, lr=0.05))
    assert opt.state_dict()['state'] == theirs.state_dict()['state'] == {}

@pytest.mark.parametrize('way', WAYS)
def test_counts_written_into_the_state_as_tensors(way):
    "`ZeroRedundancyOptimizer` and some people write into `opt.state` what torch has."
    make = make_of('AdamW', **WAYS[way])
    (opt, ps), (other, qs) = trained(make), trained(make, [])
    sd = opt.state_dict()
    for when in 'fresh', 'running':
        for p, q, s in zip(ps, qs, sd['state'].values()):
            other.state[q] = copy.deepcopy(s)
            with torch.no_grad(): q.copy_(p)
        train(opt, ps, range(5, 10)), train(other, qs, range(5, 10))
        assert max_diff(ps, qs) == 0., when
        assert list(map(type, counts(states(other, qs)))) == [int, int]
        sd = opt.state_dict()


# --- hooks
def test_hooks_see_the_whole_dictionary_and_have_the_last_word():
    opt, _ = trained(make_of('AdamW'))
    seen = []
    opt.register_state_dict_pre_hook(lambda o: seen.append(o))
    opt.register_state_dict_post_hook(lambda o, sd: seen.append(sd))
    sd = opt.state_dict()
    assert seen == [opt, seen[1]] and seen[1] is sd
    assert torch.is_tensor(sd['state'][0]['step']) and 'steps' in sd and 'shapes' in sd
    opt.register_state_dict_post_hook(lambda o, sd: {'only': len(sd['state'])})
    assert opt.state_dict() == {'only': 2}

def test_a_hook_before_ours_may_make_what_it_likes():
    opt, _ = trained(make_of('AdamW'))
    opt.register_state_dict_post_hook(lambda o, sd: {'mine': 1}, prepend=True)
    assert opt.state_dict() == {'mine': 1}

def test_hooks_of_a_copy():
    "Copies have no hooks of others, as in torch, and save what the original saves."
    opt, _ = trained(make_of('AdamW'))
    opt.register_state_dict_post_hook(lambda o, sd: {'only': 1})
    for twin in copy.deepcopy(opt), copy.copy(opt), pickled(opt):
        sd = twin.state_dict()
        assert sd['steps'] and torch.is_tensor(sd['state'][0]['step'])
        twin.load_state_dict(sd)
        assert same(twin.state_dict(), sd)

def test_many_threads_may_save():
    opt, _ = trained(make_of('AdamW'))
    want = opt.state_dict()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda _: opt.state_dict(), range(400)))
    finally: sys.setswitchinterval(interval)
    for sd in found: assert same(sd, want)

def test_hooks_are_gone_after_a_failure():
    opt, _ = trained(make_of('AdamW'))
    opt.state[torch.ones(3)]['mine'] = 1
    with pytest.raises(ValueError): opt.state_dict()
    with pytest.raises(ValueError): opt.load_state_dict({})
    assert not opt._optimizer_state_dict_pre_hooks
    assert not opt._optimizer_load_state_dict_pre_hooks

def test_a_hook_may_make_a_form_of_its_own_fit():
    opt, ps = trained(make_of('SGDW', lr=0.01))
    fastais, qs = on_copies(partial(callback.SGD, lr=0.01, mom=0.9, wd=0.1), ps)
    fastais.load_state_dict(convert_state(opt.state_dict(), fastais))
    other = make_of('SGDW')(qs)
    other.register_load_state_dict_pre_hook(lambda o, sd: convert_state(sd, o))
    other.load_state_dict(fastais.state_dict())
    assert same(other.state_dict(), opt.state_dict())


# --- what is loaded, and where
@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_floating_state_takes_the_dtype_of_the_parameter(name, dtype):
    opt, _ = trained(make_of(name))
    qs = leaves(dtype=dtype)
    other = make_of(name)(qs)
    other.load_state_dict(opt.state_dict())
    for q, s in zip(qs, opt.state_dict()['state'].values()):
        kept = other.state[q]
        assert kept.keys() == s.keys()
        for k, v in kept.items():
            if k == 'step': assert v == 5 and type(v) is int
            else: assert torch.equal(v, s[k].to(dtype)) and v.dtype is dtype
    train(other, qs, [5])

def test_whole_numbers_and_masks_keep_their_dtype():
    "torch makes floats of them, which no longer count or select."
    def sparsified(p, g, state):
        if 'mask' not in state:
            state.update(mask=g > 0, seen=torch.zeros(3, dtype=torch.int64))
        state['seen'] += 1
        return torch.where(state['mask'], g, 0.)
    make = partial(StepOptimizer, steps=[sparsified, sgd], lr=0.1)
    opt, ps = trained(make)
    other, qs = on_copies(make, ps)
    other.load_state_dict(via_file(opt.state_dict()))
    kept = other.state[qs[0]]
    assert (kept['mask'].dtype, kept['seen'].dtype) == (torch.bool, torch.int64)
    agree(train(opt, ps, range(5, 9)), train(other, qs, range(5, 9)), 'resumed', 0.)

@pytest.mark.parametrize('saved', WAYS)
@pytest.mark.parametrize('loads', WAYS)
@pytest.mark.parametrize('name', ['SGD', 'AdamW'])
def test_loading_while_running_in_any_speed(name, saved, loads):
    opt, ps = trained(make_of(name, **WAYS[saved]))
    other, qs = trained(make_of(name, **WAYS[loads]), range(7))
    other.load_state_dict(opt.state_dict())
    with torch.no_grad():
        for p, q in zip(ps, qs): q.copy_(p)
    rs = twins(ps)
    fresh = make_of(name, **WAYS[loads])(rs)
    fresh.load_state_dict(opt.state_dict())
    train(other, qs, range(5, 12)), train(fresh, rs, range(5, 12))
    assert max_diff(qs, rs) == 0. and same(other.state_dict(), fresh.state_dict())
    agree(train(opt, ps, range(5, 12)), qs, f'{saved}, {loads}')

@pytest.mark.parametrize('name', NAMES)
def test_a_parameter_that_had_no_gradient_yet(name):
    def late(t, i): return i == 1 and t < 7
    make = make_of(name)
    opt, ps = trained(make, [])
    train(opt, ps, missing=late)
    assert list(opt.state_dict()['state']) in ([0], [])
    other, qs = on_copies(make, ps)
    other.load_state_dict(via_file(opt.state_dict()))
    for o, xs in ((opt, ps), (other, qs)): train(o, xs, range(5, 12), missing=late)
    assert max_diff(ps, qs) == 0. and same(opt.state_dict(), other.state_dict())

def test_more_keys_than_needed():
    opt, ps = trained(make_of('AdamW'))
    sd = {**opt.state_dict(), 'epoch': 3, 'scheduler': {'last': 7}}
    other, qs = on_copies(make_of('AdamW'), ps)
    other.load_state_dict(sd)
    agree(train(opt, ps, range(5, 9)), train(other, qs, range(5, 9)), 'resumed', 0.)
    assert sd['epoch'] == 3

def test_an_old_torchs_none():
    "torch 1 wrote `momentum_buffer: None` without momentum."
    opt, ps = trained(make_of('SGD'), [])
    sd = torch.optim.SGD(ps, lr=0.1, momentum=0.9).state_dict()
    opt.load_state_dict({**sd, 'state': {0: {'momentum_buffer': None}, 1: None}})
    assert opt.state_dict()['state'] == {}
    other, qs = on_copies(make_of('SGD', lr=0.1, weight_decay=0., dampening=0.), ps)
    agree(train(opt, ps), train(other, qs), 'from the start', 0.)

def with_state(sd, **entries): return {**sd, 'state': {**sd['state'], **entries}}

def no_dictionary(sd): return None
def a_list(sd): return [1]
def empty(sd): return {}
def number_as_state(sd): return {**sd, 'state': {**sd['state'], 1: 5}}
def state_as_list(sd): return {**sd, 'state': list(sd['state'].values())}
def no_params(sd): return {**sd, 'param_groups': [{'lr': 0.1}]}
def few_shapes(sd): return {**sd, 'shapes': [[(3,)]]}
def a_generator(sd): return with_state(sd, x=(i for i in 'ab'))
def no_betas(sd):
    groups = [without(g, 'betas') for g in sd['param_groups']]
    return {**elsewhere(sd), 'param_groups': groups}
def strange_state(sd): return {**elsewhere(sd), 'state': {0: {'banana': torch.ones(3)}}}

MISFITS = {
    no_dictionary: 'the checkpoint must be a dictionary with', a_list: 'something else',
    empty: "must be a dictionary with 'state' and 'param_groups', as torch writes them",
    state_as_list: 'this is something else', no_params: 'this is something else',
    number_as_state: 'the state of parameter 1 in the checkpoint must be a dictionary',
    few_shapes: 'has 2 parameters in its groups, and the shapes of 1',
    a_generator: "the entry 'x' of the checkpoint's state cannot be copied",
    no_betas: 'has no betas', strange_state: 'has banana, which no step here knows'}

@pytest.mark.parametrize('spoil', MISFITS, ids=lambda f: f.__name__)
def test_a_failed_load_changes_nothing(spoil):
    opt, _ = trained(make_of('AdamW'))
    saved = trained(make_of('AdamW', lr=0.9), range(8))[0].state_dict()
    error = TypeError if spoil is a_generator else ValueError
    assert refuses(opt, spoil(saved), MISFITS[spoil], error)

def test_a_failing_hook_changes_nothing():
    opt, _ = trained(make_of('AdamW'))
    def fails(o, sd): raise ValueError('not today')
    opt.register_load_state_dict_pre_hook(fails)
    saved = trained(make_of('AdamW', lr=0.9), range(8))[0].state_dict()
    assert refuses(opt, saved, 'not today')

def test_the_checkpoint_is_left_as_it_was():
    for source in optim.AdamW, torch.optim.AdamW:
        saved = trained(source)[0].state_dict()
        saved['state']['tokens'] = {'a': [1]}
        before = copy.deepcopy(saved)
        opt, ps = trained(optim.AdamW)
        opt.load_state_dict(saved)
        train(opt, ps)
        opt.state['tokens']['a'].append(2)
        for g in opt.param_groups: g['lr'] = 9.
        assert same(saved, before)

def test_groups_that_were_cut_anew():
    "A person may regroup a checkpoint; the shapes go by the order of the parameters."
    opt, ps = trained(make_of('AdamW'))
    sd = opt.state_dict()
    group, = sd['param_groups']
    sd['param_groups'] = [{**group, 'params': [0]}, {**group, 'params': [1]}]
    qs = twins(ps)
    other = make_of('AdamW')([{'params': [q]} for q in qs])
    other.load_state_dict(sd)
    agree(train(opt, ps, range(5, 9)), train(other, qs, range(5, 9)), 'regrouped', 0.)

def test_another_shape_is_refused_without_shapes_too():
    def factored(p, g, state):
        state['rows'] = g.sum(-1) if 'rows' not in state else state['rows'] + g.sum(-1)
        return g
    make = partial(StepOptimizer, steps=[factored, adam, sgd], lr=0.1)
    opt, ps = trained(make)
    sd = elsewhere(opt.state_dict())
    make(leaves()).load_state_dict(sd)                   # rows has a shape of its own
    words = 'parameter 0 of group 0 has shape (4,) here; in the checkpoint, exp_avg has'
    assert refuses(make(leaves((4,), (2, 4))), sd, words)
