"""`torch.distributed.checkpoint` between torch's optimizers and ours, both ways: in one
process, in two that hold copies or shards (FSDP2), from two to one; and with
`ZeroRedundancyOptimizer`. Two processes run this file as a script, once for all."""
import copy
import json
import os
import subprocess
import sys
import time
import warnings
from datetime import timedelta
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.state_dict as by_name
from torch import distributed as dist
from torch import nn

from optimizers_explained import optim
from optimizers_explained.core import StepOptimizer

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 240        # seconds for two processes to import torch and do all cases
KW = dict(SGD=dict(lr=0.05, momentum=0.9, dampening=0.1, weight_decay=0.01),
          Adam=dict(lr=0.01, amsgrad=True), AdamW=dict(lr=0.01), Lion=dict(lr=1e-3),
          SGDW=dict(lr=0.05, momentum=0.9), LARS=dict(lr=0.1, momentum=0.9),
          DecoupledSGDW=dict(lr=0.05, momentum=0.9, weight_decay=1e-4),
          DecoupledAdamW=dict(lr=0.01, weight_decay=1e-4), LAMB=dict(lr=0.01))
TORCHS, OURS = ('SGD', 'Adam', 'AdamW'), tuple(optim.__all__)
WAYS = 'torch->ours', 'ours->torch', 'ours->ours'
pytestmark = pytest.mark.filterwarnings('ignore::UserWarning:torch',
                                         'ignore::FutureWarning')

def of(name, side):
    where = torch.optim if side == 'torch' else optim
    return partial(getattr(where, name), **KW[name])

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()

def more(model, opt, steps, seed):
    gen = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(8, 3, generator=gen, dtype=torch.float64)
        opt.zero_grad()
        model(x).pow(2).sum().backward()
        opt.step()

def whole(p): return p.full_tensor() if hasattr(p, 'full_tensor') else p.detach()
def values(model): return [whole(p) for p in model.parameters()]
def gap(a, b):
    return max((x - y).abs().max().item() for x, y in zip(values(a), values(b)))
def flattened(yes): return by_name.StateDictOptions(flatten_optimizer_state_dict=yes)

def save(model, opt, folder, options=None):
    state = dict(model=by_name.get_model_state_dict(model),
                 opt=by_name.get_optimizer_state_dict(model, opt, options=options))
    dcp.save(state, checkpoint_id=folder)

def load(model, opt, folder, options=None):
    state = dict(model=by_name.get_model_state_dict(model),
                 opt=by_name.get_optimizer_state_dict(model, opt, options=options))
    dcp.load(state, checkpoint_id=folder)
    by_name.set_model_state_dict(model, state['model'])
    by_name.set_optimizer_state_dict(model, opt, state['opt'], options=options)

def params_of(model): return model.parameters()

def resumed(src, dst, folder, options=None, build=net, groups=params_of, after=None):
    "How far eight steps are from three, a checkpoint into another optimizer, and five."
    model, twin = build(), build()
    opt, other = src(groups(model)), dst(groups(twin), lr=1e-5)
    more(model, opt, 3, 1)
    save(model, opt, folder, options)
    load(twin, other, folder, options)
    if after: after(other)
    more(model, opt, 5, 2), more(twin, other, 5, 2)
    return gap(model, twin)

def is_right(way, distance):
    assert distance == 0. if way in ('ours->ours', 'torch->torch') else distance < 1e-12


# --- one process
@pytest.mark.parametrize('flat', [False, True], ids=['nested', 'flat'])
@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('name', TORCHS)
def test_one_process(name, way, flat, tmp_path):
    src, dst = (of(name, side) for side in way.split('->'))
    is_right(way, resumed(src, dst, tmp_path, flattened(flat)))

@pytest.mark.parametrize('flat', [False, True], ids=['nested', 'flat'])
@pytest.mark.parametrize('name', [n for n in OURS if n not in TORCHS])
def test_one_process_among_our_own(name, flat, tmp_path):
    is_right('ours->ours', resumed(of(name, 'ours'), of(name, 'ours'), tmp_path,
                                   flattened(flat)))

def forgets(opt): opt.state.clear()

@pytest.mark.parametrize('name', OURS)
def test_the_comparison_notices_a_lost_state(name, tmp_path):
    assert resumed(of(name, 'ours'), of(name, 'ours'), tmp_path, after=forgets) > 1e-5

def test_the_keys_of_the_groups_matter(tmp_path):
    "Without torch's switches in the groups, torch's own optimizer cannot be filled."
    def nameless(params, **kw): return StepOptimizer(
        params, of('AdamW', 'ours')(net().parameters()).steps, **{**KW['AdamW'], **kw})
    is_right('ours->ours', resumed(nameless, nameless, tmp_path/'a'))
    is_right('torch->ours', resumed(of('AdamW', 'torch'), nameless, tmp_path/'b'))
    with pytest.raises(BaseException, match='param_groups.0.foreach'):
        resumed(nameless, of('AdamW', 'torch'), tmp_path/'c')

@pytest.mark.parametrize('speed', ['foreach', 'fused'])
@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('name', TORCHS)
def test_other_speeds(name, way, speed, tmp_path):
    src, dst = (of(name, side) for side in way.split('->'))
    if way.endswith('ours'): dst = partial(dst, **{speed: True})
    else: src = partial(src, **{speed: True})
    assert resumed(src, dst, tmp_path) < 1e-12

@pytest.mark.parametrize('way', WAYS)
def test_without_momentum(way, tmp_path):
    "An optimizer that has no state."
    sides = dict(torch=torch.optim.SGD, ours=optim.SGD)
    src, dst = (partial(sides[side], lr=0.1) for side in way.split('->'))
    model = net()
    opt = dst(model.parameters())
    more(model, opt, 2, 0)
    assert by_name.get_optimizer_state_dict(model, opt)['state'] == {}
    is_right(way, resumed(src, dst, tmp_path))

def two_groups(model):
    return [{'params': list(model[0].named_parameters())},
            {'params': list(model[2].named_parameters()), 'weight_decay': 0.}]

def with_empty(model):
    return [{'params': list(model.parameters())}, {'params': [], 'weight_decay': 0.}]

def frozen(model):
    model[0].bias.requires_grad_(False)
    return model.parameters()

@pytest.mark.parametrize('groups', [two_groups, with_empty, frozen])
@pytest.mark.parametrize('way', WAYS)
def test_groups(groups, way, tmp_path):
    src, dst = (of('AdamW', side) for side in way.split('->'))
    if groups is with_empty and way == 'ours->torch':
        try: resumed(of('AdamW', 'torch'), dst, tmp_path/'torch', groups=groups)
        except KeyError: pytest.skip('this torch loses the rates of empty groups')
    is_right(way, resumed(src, dst, tmp_path/'ours', groups=groups))

@pytest.mark.parametrize('way', WAYS)
def test_compiled_names(way, tmp_path):
    def groups(model): return list(model.named_parameters())
    src, dst = (of('AdamW', side) for side in way.split('->'))
    model, twin = torch.compile(net()), net()
    opt, other = src(groups(model)), dst(groups(twin))
    for p in model.parameters(): p.grad = torch.ones_like(p)
    opt.step()
    save(model, opt, tmp_path)
    load(twin, other, tmp_path)
    for p in (*model.parameters(), *twin.parameters()): p.grad = torch.ones_like(p)
    opt.step(), other.step()
    is_right(way, gap(model, twin))


# --- how torch starts an optimizer without a state: a step with lr 0 and gradients of 0
def rates_of(opt):
    return [{k: g[k] for k in ('lr', 'lr0') if k in g} for g in opt.param_groups]

@pytest.mark.parametrize('speed', ['foreach', 'fused', 'debug'])
@pytest.mark.parametrize('name', OURS)
def test_the_start_moves_nothing(name, speed):
    model = net()
    before = [p.detach().clone() for p in model.parameters()]
    opt = of(name, 'ours')([{'params': list(model[0].parameters())},
                            {'params': list(model[2].parameters()), 'lr': 0.03}],
                           weight_decay=0.1, **{speed: True})
    rates = rates_of(opt)
    sd = by_name.get_optimizer_state_dict(model, opt)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))
    assert rates_of(opt) == rates
    assert set(sd['state']) == {n for n, _ in model.named_parameters()}
    for state in sd['state'].values():
        assert all(torch.isfinite(v).all() for v in state.values())
    more(model, opt, 2, 1)
    assert all(p.isfinite().all() and not torch.equal(p, q)
               for p, q in zip(model.parameters(), before))

@pytest.mark.parametrize('name', TORCHS)
def test_after_that_start_ours_goes_on_as_torchs(name):
    models = net(), net()
    for model, side in zip(models, ('torch', 'ours')):
        opt = of(name, side)(model.parameters())
        by_name.get_optimizer_state_dict(model, opt)
        more(model, opt, 5, 1)
    assert gap(*models) < 1e-12

@pytest.mark.parametrize('name', OURS)
def test_a_rate_that_is_a_tensor(name):
    "torch sets it to a tensor of 0 for that step, and puts it back."
    model, rate = net(), torch.tensor(0.01)
    before = [p.detach().clone() for p in model.parameters()]
    opt = of(name, 'ours')(model.parameters(), lr=rate, weight_decay=0.1)
    group, = opt.param_groups
    lr0 = group.get('lr0')
    sd = by_name.get_optimizer_state_dict(model, opt)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))
    assert group['lr'] is rate and rate.item() == pytest.approx(0.01)
    assert group.get('lr0') == lr0 and sd['param_groups'][0]['lr'] == rate
    rate.fill_(0.02)
    assert group.get('lr0') == lr0       # not the tensor that a schedule fills

@pytest.mark.parametrize('flat', [False, True], ids=['nested', 'flat'])
@pytest.mark.parametrize('way', WAYS)
def test_a_tensor_rate_moves_with_the_checkpoint(way, flat, tmp_path):
    sides = dict(torch=torch.optim.AdamW, ours=optim.AdamW)
    def rated(side):
        def make(params, lr=0.01):
            rate = torch.tensor(lr, dtype=torch.float64)
            return sides[side](params, lr=rate, foreach=False)
        return make
    src, dst = map(rated, way.split('->'))
    is_right(way, resumed(src, dst, tmp_path, flattened(flat)))


# --- two processes
def sharded():
    from torch.distributed.fsdp import fully_shard
    model = net()
    fully_shard(model[0])
    return fully_shard(model) or model

def full_options(**kw): return by_name.StateDictOptions(full_state_dict=True, **kw)

def case_of(build, name, way, options):
    def run(folder):
        src, dst = (of(name, side) for side in way.split('->'))
        return resumed(src, dst, folder, options, build)
    return run

def gathered(way):
    "The whole state on rank 0, and broadcast from there."
    def run(folder):
        src, dst = (of('AdamW', side) for side in way.split('->'))
        model, twin = sharded(), sharded()
        opt, other = src(model.parameters()), dst(twin.parameters(), lr=1e-5)
        more(model, opt, 3, 1)
        options = full_options(cpu_offload=True, broadcast_from_rank0=True)
        saved = copy.deepcopy(by_name.get_model_state_dict(model, options=options))
        by_name.set_model_state_dict(twin, saved, options=options)
        saved = by_name.get_optimizer_state_dict(model, opt, options=options)
        saved = copy.deepcopy(saved)
        by_name.set_optimizer_state_dict(twin, other, saved, options=options)
        more(model, opt, 5, 2), more(twin, other, 5, 2)
        return gap(model, twin)
    return run

def zero(way):
    "`ZeroRedundancyOptimizer`: each process steps its share, rank 0 gathers the state."
    def run(folder):
        from torch.distributed.optim import ZeroRedundancyOptimizer
        model, twin = net(), net()
        src, dst = (of('AdamW', side) for side in way.split('->'))
        opt = ZeroRedundancyOptimizer(model.parameters(), src)
        more(model, opt, 3, 1)
        opt.consolidate_state_dict(to=0)
        found = [opt.state_dict() if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(found)
        twin.load_state_dict(model.state_dict())
        other = ZeroRedundancyOptimizer(twin.parameters(), dst)
        other.load_state_dict(copy.deepcopy(found[0]))
        more(model, opt, 5, 2), more(twin, other, 5, 2)
        kinds = {type(s['step']).__name__ for s in other.optim.state.values()}
        assert kinds == {'int' if way.endswith('ours') else 'Tensor'}
        return gap(model, twin)
    return run

def owns_nothing(folder):
    "One parameter, two processes: how many each of them has, and where it ends."
    from torch.distributed.optim import ZeroRedundancyOptimizer
    p = nn.Parameter(torch.ones(2))
    opt = ZeroRedundancyOptimizer([p], of('AdamW', 'ours'))
    for _ in range(3):
        p.grad = torch.ones(2)
        opt.step()
    opt.consolidate_state_dict(to=0)
    counts = [None, None]
    dist.all_gather_object(counts, [len(g['params']) for g in opt.optim.param_groups])
    return counts, p.tolist()

def for_one(folder):
    "A checkpoint of two shards, and where five steps more lead."
    model = sharded()
    opt = of('AdamW', 'ours')(model.parameters())
    more(model, opt, 3, 1)
    save(model, opt, folder)
    more(model, opt, 5, 2)
    return [p.tolist() for p in values(model)]

BUILDS = dict(copies=net, shards=sharded)
ZEROS = {f'zero {way}': zero(way) for way in WAYS}
GATHERED = {f'gathered {way}': gathered(way) for way in WAYS}
TWO = {f'{build} {name} {way} {kind}':
       case_of(BUILDS[build], name, way, flattened(kind == 'flat'))
       for build, name, way, kind in product(BUILDS, TORCHS, WAYS, ('nested', 'flat'))
       if name == 'AdamW' or (build, kind) == ('shards', 'flat')}
OWN = {f'shards {name} ours->ours':
       case_of(sharded, name, 'ours->ours', flattened(False))
       for name in OURS if name not in TORCHS}
EXTRA = {'owns nothing': owns_nothing, 'for one': for_one}
CASES = {**TWO, **OWN, **GATHERED, **ZEROS, **EXTRA}

def work(rank, folder):
    "What each of the two processes does: every case, one after the other."
    warnings.simplefilter('ignore')
    torch.set_num_threads(1)
    store = f'file://{folder}/store'
    dist.init_process_group('gloo', init_method=store, rank=rank, world_size=2,
                            timeout=timedelta(seconds=30))
    results = {}
    for i, (name, case) in enumerate(CASES.items()):
        try: results[name] = case(f'{folder}/{i}')
        except Exception as e:
            needs_gpu = 'record_event' in str(e)       # of a stream, in torch 2.6
            results[name] = None if needs_gpu else f'{type(e).__name__}: {e}'
        dist.barrier()
    Path(folder, f'{rank}.json').write_text(json.dumps(results))
    dist.destroy_process_group()

@pytest.fixture(scope='module')
def two(tmp_path_factory):
    "The results of all cases, from rank 0."
    folder = tmp_path_factory.mktemp('two')
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    command = [sys.executable, __file__]
    logs = [folder/f'{rank}.log' for rank in range(2)]
    runs = [subprocess.Popen([*command, str(rank), str(folder)], cwd=ROOT, env=env,
                             stdout=log.open('w'), stderr=subprocess.STDOUT)
            for rank, log in enumerate(logs)]
    end = time.monotonic() + PATIENCE
    try: codes = [run.wait(max(1, end - time.monotonic())) for run in runs]
    finally:
        for run in runs: run.kill()
    assert codes == [0, 0], '\n'.join(log.read_text()[-2000:] for log in logs)
    return {**json.loads((folder/'0.json').read_text()), 'folder': folder}

@pytest.mark.parametrize('case', [*TWO, *OWN, *GATHERED, *ZEROS])
def test_two_processes(two, case):
    if two[case] is None: pytest.skip('FSDP2 of this torch needs a GPU')
    assert isinstance(two[case], float), two[case]
    is_right(next(way for way in WAYS if way in case), two[case])

def test_a_process_that_owns_nothing(two):
    counts, p = two['owns nothing']
    assert sorted(counts) == [[0], [1]] and p == pytest.approx([0.97, 0.97], abs=1e-3)

def test_saved_on_two_and_loaded_on_one(two):
    if two['for one'] is None: pytest.skip('FSDP2 of this torch needs a GPU')
    folder = two['folder']/str(list(CASES).index('for one'))
    for side in 'ours', 'torch':
        model = net()
        opt = of('AdamW', side)(model.parameters(), lr=1e-5)
        load(model, opt, folder)
        more(model, opt, 5, 2)
        want = [torch.tensor(p, dtype=torch.float64) for p in two['for one']]
        assert max((a - b).abs().max() for a, b in zip(values(model), want)) < 1e-12


if __name__ == '__main__':
    work(int(sys.argv[1]), sys.argv[2])
    # all is written; a thread of gloo that still runs would abort an ordinary exit
    os._exit(0)
