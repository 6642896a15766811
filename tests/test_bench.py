"""The command `oe-bench` on tiny tensors: its files, its tables, what it says about
those who are missing, its one-line errors. No time is ever asserted."""
import gc
import json
import subprocess
import sys

import pytest
import torch

from optimizers_explained import bench
from optimizers_explained.bench import comparison, contenders as who, stopwatch

PROGRAM = 'import sys; from optimizers_explained.bench import main; sys.exit(main())'
QUICK = ['--quick', '--sets', 'small,large', '--optimizers', 'SGD,Lion',
         '--dtypes', 'float32', '--only', 'ours loop,ours foreach,optimi,fastai']
RUN = {'date', 'minutes', 'device', 'reps', 'quick', 'machine', 'rows', 'starts',
       'absent'}
MACHINE = {'processor', 'cores', 'threads', 'system', 'gpu', 'python', 'versions'}
ROW = {'set', 'optimizer', 'dtype', 'contender', 'median', 'low', 'high', 'ratio',
       'to_loop', 'extra'}
START = {'contender', 'optimizer', 'set', 'cold', 'warm', 'first', 'later'}
ABSENT = {'set', 'optimizer', 'dtype', 'contender', 'reason'}


def command(*args, cwd):
    return subprocess.run([sys.executable, '-c', PROGRAM, *args],
                          cwd=cwd, capture_output=True, text=True)


def made_of(cls, name='made here'):
    "A contender whose SGD is `cls`"
    def call(_, params, values): return cls(params, **values)
    return who.Contender(name, 'torch.optim', {'SGD': 'SGD'}, call)


def test_quick_run_from_a_terminal(tmp_path):
    done = command(*QUICK, '--out', 'deep/er', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    out = tmp_path/'deep/er'
    assert sorted(p.name for p in out.iterdir()) == ['bench.json', 'bench.png']
    assert (out/'bench.png').read_bytes().startswith(b'\x89PNG')
    run = json.loads((out/'bench.json').read_text())
    assert run['quick'] and run['reps'] == 3 and run['device'] == 'cpu'
    check_schema(run)
    assert {(r['set'], r['optimizer']) for r in run['rows']} == {
        ('small', 'SGD'), ('small', 'Lion'), ('large', 'SGD'), ('large', 'Lion')}
    assert {r['contender'] for r in run['rows']} >= {
        'ours loop', 'ours foreach', 'torch fused', 'torch AdamW fused'}
    for words in ('| ours loop ', 'ratio to torch AdamW fused', 'extra memory',
                  'cold, s', 'built later', 'fastai.optimizer has no Lion'):
        assert words in done.stdout
    if 'fastai' not in who.present():
        assert 'not installed: pip install fastai' in done.stdout


def check_schema(run):
    "Everything a reader of the JSON may rely on"
    assert run.keys() == RUN and run['machine'].keys() == MACHINE
    assert 'torch' in run['machine']['versions']
    for row in run['rows']:
        assert ROW <= row.keys() <= ROW | {'note'}
        assert 0 < row['low'] <= row['median'] <= row['high']
        assert row['ratio'] > 0 and row['extra'] >= 0
    for start in run['starts']: assert start.keys() == START
    for entry in run['absent']: assert entry.keys() == ABSENT and entry['reason']


def test_the_stored_run(root):
    run = bench.stored_run(root/'nbs'/'bench.json')
    text = json.dumps(run)
    assert '/home' not in text and '/tmp' not in text and 'site-packages' not in text
    del run['copy_gb_per_s']                # it was made when the benchmark measured
    for row in run['rows']: del row['copy'] # the share of the speed of a copy as well
    check_schema(run)
    assert not run['quick'] and {r['set'] for r in run['rows']} == set(who.sets)
    assert {r['dtype'] for r in run['rows']} == {'float32', 'bfloat16'}
    seen = {(r['contender'], r['optimizer']) for r in run['rows'] + run['absent']}
    for contender in who.contenders.values():
        for optimizer in contender.only:
            assert (contender.name, optimizer) in seen, 'measured, or with a reason'


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, 'optimi', None)
    names = 'optimi', 'torch fused', 'callback port'
    rows, absent = comparison.measure('small', 'SGD', names=names, reps=2, quick=True)
    assert [r['contender'] for r in rows] == ['torch fused', 'callback port']
    assert [a['reason'] for a in absent] == ['not installed: pip install torch-optimi']
    table = bench.absent_table(dict(absent=absent + [dict(absent[0], set='large')]))
    line = ('| optimi | SGD | small, large | float32 '
            '| not installed: pip install torch-optimi |')
    assert line in ' '.join(table.split())


def test_without_timm_the_other_sets_run(monkeypatch):
    monkeypatch.setitem(sys.modules, 'timm', None)
    run = comparison.run_bench(('resnet50', 'small'), ('Lion',), ('float32',),
                               ('ours loop',), reps=2, quick=True)
    assert {r['set'] for r in run['rows']} == {'small'}
    (missing,) = [a for a in run['absent'] if a['set'] == 'resnet50']
    assert missing['contender'] == 'everybody'
    assert missing['reason'] == 'not installed: pip install timm'


def test_a_contender_that_fails_does_not_stop_the_rest(monkeypatch):
    def broken(params, **values): raise TypeError("unexpected 'fused'\nand more")
    monkeypatch.setitem(who.contenders, 'ours fused', made_of(broken, 'ours fused'))
    names = 'ours fused', 'ours loop'
    rows, absent = comparison.measure('small', 'SGD', names=names, reps=2, quick=True)
    assert [r['contender'] for r in rows] == ['ours loop']
    assert rows[0]['ratio'] is None and rows[0]['to_loop'] == 1
    assert absent[0]['reason'] == "TypeError: unexpected 'fused'"


@pytest.mark.parametrize('args,message', [
    (['--sets', 'resnet51'],
     "sets must be some of resnet50, vit_small, small, large, separated by commas, "
     "got 'resnet51'"),
    (['--optimizers', 'SGD,Sgd'],
     "optimizers must be some of SGD, AdamW, Lion, LAMB, LARS, separated by commas, "
     "got 'Sgd'"),
    (['--dtypes', 'float64'],
     "dtypes must be some of float32, bfloat16, separated by commas, got 'float64'"),
    (['--only', 'ours quick'], "only must be some of ours loop"),
    (['--reps', '1'], 'reps must be at least 2, got 1'),
    (['--reps', 'many'], "argument --reps: invalid int value: 'many'"),
    (['--device', 'gpu'], "device must be one of cpu"),
    (['--out', 'file'], "out must be a folder that can be written to, got 'file'"),
    (['--nonsense'], 'unrecognized arguments: --nonsense')])
def test_bad_input_is_one_line_and_2(tmp_path, args, message, capfd, monkeypatch):
    (tmp_path/'file').write_text('mine')
    monkeypatch.chdir(tmp_path)
    try: code = bench.main(args)
    except SystemExit as e: code = e.code
    out, err = capfd.readouterr()
    assert code == 2 and not out and message in err
    assert err.count('\n') == 1 and err.startswith('oe-bench: ')
    assert [p.name for p in tmp_path.iterdir()] == ['file']


def test_help_explains_each_option(tmp_path):
    text = ' '.join(command('--help', cwd=tmp_path).stdout.split())
    for option in ('sets', 'optimizers', 'dtypes', 'only', 'reps', 'device', 'out',
                   'quick', 'full'):
        assert f'--{option} ' in text


# ---- the instruments, on numbers made by hand

def test_spread():
    assert stopwatch.spread([4., 1., 3., 2., 5.]) == dict(median=3., low=2., high=4.)
    assert stopwatch.spread([1., 2.]) == dict(median=1.5, low=1.25, high=1.75)


def test_ratios():
    baseline = 'torch AdamW fused'
    rows = comparison.compared([dict(contender=baseline, median=4.),
                                dict(contender='ours loop', median=2.),
                                dict(contender='ours fused', median=1.)], baseline)
    assert [r['ratio'] for r in rows] == [1, 0.5, 0.25]
    assert [r['to_loop'] for r in rows] == [2, 1, 0.5]


def test_everybody_begins_a_round_once():
    order = []
    class Step:
        device = torch.device('cpu')
        def __init__(self, name): self.name = name
        def prepare(self): assert not gc.isenabled()
        def step(self): order.append(self.name)
    stopwatch.alternate({k: Step(k) for k in 'abc'}, 6)
    rounds = [''.join(order[i:i + 3]) for i in range(0, 18, 3)]
    assert {''.join(sorted(r)) for r in rounds} == {'abc'} and len({*rounds}) > 2
    assert gc.isenabled()


def test_the_collector_is_back_after_an_error():
    class Breaks:
        device = torch.device('cpu')
        def prepare(self): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): stopwatch.alternate({'a': Breaks()}, 2)
    assert gc.isenabled()


def test_memory_of_a_known_step():
    """torch's list AdamW makes one list as large as all parameters;
    a step that allocates nothing reports (nearly) nothing"""
    class Nothing(torch.optim.SGD):
        def step(self): pass
    params, grads = who.tensors([(100, 1000)]*5), who.tensors([(100, 1000)]*5, seed=1)
    quiet = stopwatch.Runner(made_of(Nothing), 'SGD', params, grads)
    loud = stopwatch.Runner(who.contenders['torch foreach'], 'AdamW', params, grads)
    quiet.first()
    loud.first()
    assert stopwatch.peak_extra(quiet) < 0.01
    assert stopwatch.peak_extra(loud) == pytest.approx(1, abs=0.05)


def test_gradients_are_the_same_for_everybody():
    class Drops(torch.optim.SGD):
        def step(self):
            for group in self.param_groups:
                for p in group['params']:
                    p.grad.zero_()
                    p.grad = None
    params, grads = who.tensors([(3, 4)]), who.tensors([(3, 4)], seed=1)
    r = stopwatch.Runner(made_of(Drops), 'SGD', params, grads)
    r.first()
    r.prepare()
    r.step()
    r.prepare()
    assert r.spoils and torch.equal(r.params[0].grad, grads[0])
    assert torch.equal(grads[0], who.tensors([(3, 4)], seed=1)[0])


@pytest.mark.parametrize('name', [
    'torch loop', 'ours loop', 'composer port', 'callback port'])
def test_rates_reach_everybody(name):
    p = torch.ones(2, requires_grad=True)
    opt = who.contenders[name].make('SGD', [p])
    before = p.detach().clone()
    who.set_rates(opt, 0.5, 0.)
    p.grad = torch.ones(2)
    opt.step()
    assert (before - p).detach()[0] == pytest.approx(0.5, abs=0.01)


def test_a_new_process_that_fails_says_why():
    why = 'in a new process: .*torch.optim has no LAMB'
    with pytest.raises(LookupError, match=why):
        stopwatch.cold_and_warm('torch fused', 'LAMB', 'small', 'cpu', True)
