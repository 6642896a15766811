"The command `oe-bench` on tiny tensors: its files, its tables, what it says about those who are missing, its one-line errors. No time is ever asserted."
import gc
import json
import subprocess
import sys

import pytest
import torch

from optimizers_explained import bench, comparison, contenders as who, stopwatch

KEYS = {'set', 'optimizer', 'dtype', 'contender', 'median', 'low', 'high', 'ratio', 'to_loop', 'copy', 'extra'}
QUICK = ['--quick', '--sets', 'small,large', '--optimizers', 'SGD,Lion', '--only', 'ours loop,ours foreach,optimi,fastai']


def command(*args, cwd):
    return subprocess.run([sys.executable, '-c', 'import sys; from optimizers_explained.bench import main; sys.exit(main())', *args],
                          cwd=cwd, capture_output=True, text=True)


def test_quick_run_from_a_terminal(tmp_path):
    done = command(*QUICK, '--dtypes', 'float32', '--out', 'deep/er', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (tmp_path/'deep/er').iterdir()) == ['bench.json', 'bench.png']
    assert (tmp_path/'deep/er/bench.png').read_bytes().startswith(b'\x89PNG')
    run = json.loads((tmp_path/'deep/er/bench.json').read_text())
    assert run['quick'] and run['reps'] == 3 and run['device'] == 'cpu'
    check_schema(run)
    assert {(r['set'], r['optimizer']) for r in run['rows']} == {(s, o) for s in ('small', 'large') for o in ('SGD', 'Lion')}
    assert {r['contender'] for r in run['rows']} >= {'ours loop', 'ours foreach', 'torch fused', 'torch AdamW fused'}
    for words in ('| ours loop |', 'ratio to torch AdamW fused', 'of copy speed', 'extra memory', 'cold, s', 'built later', 'fastai.optimizer has no Lion'): assert words in done.stdout
    if 'fastai' not in who.present(): assert 'not installed: pip install fastai' in done.stdout


def check_schema(run):
    "Everything a reader of the JSON may rely on"
    assert {'date', 'minutes', 'device', 'reps', 'quick', 'machine', 'copy_gb_per_s', 'rows', 'starts', 'absent'} == run.keys()
    assert {'processor', 'cores', 'threads', 'system', 'gpu', 'python', 'versions'} == run['machine'].keys() and 'torch' in run['machine']['versions']
    for r in run['rows']:
        assert KEYS <= r.keys() <= KEYS | {'note'} and 0 < r['low'] <= r['median'] <= r['high'] and r['ratio'] > 0 and r['extra'] >= 0 and r['copy'] > 0
    assert all({'contender', 'optimizer', 'set', 'cold', 'warm', 'first', 'later'} == s.keys() for s in run['starts'])
    assert all(a['reason'] and {'set', 'optimizer', 'dtype', 'contender', 'reason'} == a.keys() for a in run['absent'])


def test_the_stored_run():
    run = bench.stored_run()
    check_schema(run)
    assert not run['quick'] and {r['set'] for r in run['rows']} == set(who.sets) and {r['dtype'] for r in run['rows']} == {'float32', 'bfloat16'}
    seen = {(r['contender'], r['optimizer']) for r in run['rows']} | {(a['contender'], a['optimizer']) for a in run['absent']}
    assert seen >= {(c.name, o) for c in who.contenders.values() for o in c.only}, 'everybody is measured or has a reason'
    text = json.dumps(run)
    assert '/home' not in text and '/tmp' not in text and 'site-packages' not in text


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, 'optimi', None)
    rows, absent = comparison.measure('small', 'SGD', names=('optimi', 'torch fused', 'callback port'), reps=2, quick=True)
    assert [r['contender'] for r in rows] == ['torch fused', 'callback port']
    assert [a['reason'] for a in absent] == ['not installed: pip install torch-optimi']
    table = bench.absent_table(dict(absent=absent + [dict(absent[0], set='large')]))
    assert '| optimi | SGD | small, large | float32 | not installed: pip install torch-optimi |' in table


def test_without_timm_the_other_sets_run(monkeypatch):
    monkeypatch.setitem(sys.modules, 'timm', None)
    run = comparison.run_bench(('resnet50', 'small'), ('Lion',), ('float32',), ('ours loop',), reps=2, quick=True)
    assert {r['set'] for r in run['rows']} == {'small'}
    assert [(a['set'], a['contender'], a['reason']) for a in run['absent'] if a['set'] == 'resnet50'] == [('resnet50', 'everybody', 'not installed: pip install timm')]


def test_a_contender_that_fails_does_not_stop_the_rest(monkeypatch):
    def broken(cls, params, values): raise TypeError("unexpected 'fused'\nand more")
    monkeypatch.setitem(who.contenders, 'ours fused', who.Contender('ours fused', 'torch.optim', {'SGD': 'SGD'}, broken))
    rows, absent = comparison.measure('small', 'SGD', names=('ours fused', 'ours loop'), reps=2, quick=True)
    assert [r['contender'] for r in rows] == ['ours loop'] and rows[0]['ratio'] is None and rows[0]['to_loop'] == 1
    assert absent[0]['reason'] == "TypeError: unexpected 'fused'"


@pytest.mark.parametrize('args,message', [
    (['--sets', 'resnet51'], "sets must be some of resnet50, vit_small, small, large, separated by commas, got 'resnet51'"),
    (['--optimizers', 'SGD,Sgd'], "optimizers must be some of SGD, AdamW, Lion, LAMB, LARS, separated by commas, got 'Sgd'"),
    (['--dtypes', 'float64'], "dtypes must be some of float32, bfloat16, separated by commas, got 'float64'"),
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
    for option in ('sets', 'optimizers', 'dtypes', 'only', 'reps', 'device', 'out', 'quick', 'full'): assert f'--{option} ' in text


# ---- the instruments, on numbers made by hand

def test_spread():
    assert stopwatch.spread([4., 1., 3., 2., 5.]) == dict(median=3., low=2., high=4.)
    assert stopwatch.spread([1., 2.]) == dict(median=1.5, low=1.25, high=1.75)


def test_share_of_the_copy_speed():
    assert stopwatch.share(20., 'SGD', 4, 1.) == 1 and stopwatch.share(28., 'AdamW', 4, 1.) == 1 and stopwatch.share(40., 'LAMB', 4, 2.) == 0.5


def test_ratios():
    rows = comparison.compared([dict(contender='torch AdamW fused', median=4.), dict(contender='ours loop', median=2.), dict(contender='ours fused', median=1.)])
    assert [(r['ratio'], r['to_loop']) for r in rows] == [(1, 2), (0.5, 1), (0.25, 0.5)]


def test_everybody_begins_a_round_once():
    order = []
    class Step:
        device = torch.device('cpu')
        def __init__(self, name): self.name = name
        def prepare(self): assert not gc.isenabled()
        def step(self): order.append(self.name)
    stopwatch.alternate({k: Step(k) for k in 'abc'}, 6)
    rounds = [''.join(order[i:i + 3]) for i in range(0, 18, 3)]
    assert {''.join(sorted(r)) for r in rounds} == {'abc'} and len({*rounds}) > 2 and gc.isenabled()


def test_the_collector_is_back_after_an_error():
    class Breaks:
        device = torch.device('cpu')
        def prepare(self): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): stopwatch.alternate({'a': Breaks()}, 2)
    assert gc.isenabled()


def test_memory_of_a_known_step():
    "torch's list AdamW makes one list as large as all parameters; a step that allocates nothing reports (nearly) nothing"
    class Nothing(torch.optim.SGD):
        def step(self): pass
    params, grads = (who.tensors([(100, 1000)]*5, seed=i) for i in (0, 1))
    quiet = stopwatch.Runner(who.Contender('none', 'torch.optim', {'SGD': 'SGD'}, lambda cls, ps, v: Nothing(ps, **v)), 'SGD', params, grads)
    loud = stopwatch.Runner(who.contenders['torch foreach'], 'AdamW', params, grads)
    for r in (quiet, loud): r.first()
    assert stopwatch.peak_extra(quiet) < 0.01 and stopwatch.peak_extra(loud) == pytest.approx(1, abs=0.05)


def test_gradients_are_the_same_for_everybody():
    params, grads = (who.tensors([(3, 4)], seed=i) for i in (0, 1))
    class Drops(torch.optim.SGD):
        def step(self):
            for g in self.param_groups:
                for p in g['params']: p.grad.zero_(); p.grad = None
    r = stopwatch.Runner(who.Contender('drops', 'torch.optim', {'SGD': 'SGD'}, lambda cls, ps, v: Drops(ps, **v)), 'SGD', params, grads)
    r.first()
    r.prepare()
    r.step()
    r.prepare()
    assert r.spoils and torch.equal(grads[0], who.tensors([(3, 4)], seed=1)[0]) and torch.equal(r.params[0].grad, grads[0])


@pytest.mark.parametrize('name', ['torch loop', 'ours loop', 'composer port', 'callback port'])
def test_rates_reach_everybody(name):
    p = torch.ones(2, requires_grad=True)
    opt = who.contenders[name].make('SGD', [p])
    before = p.detach().clone()
    who.set_rates(opt, 0.5, 0.)
    p.grad = torch.ones(2)
    opt.step()
    assert (before - p).detach()[0] == pytest.approx(0.5, abs=0.01)


def test_a_new_process_that_fails_says_why():
    with pytest.raises(LookupError, match='in a new process: .*torch.optim has no LAMB'): stopwatch.cold_and_warm('torch fused', 'LAMB', 'small', 'cpu', True)
