"""The three commands: every word is understood or refused, and every kind of ending
has its own exit code.

What the system does is real where that is quick: a limit on the size of files,
/dev/full, a pipe without a reader, a signal."""
import errno
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from matplotlib.figure import Figure

from optimizers_explained import bench, commands, race, rosetta
from optimizers_explained.rosetta import optimizers

MAINS = {'oe-translate': rosetta.main, 'oe-race': race.main, 'oe-bench': bench.main}
QUICK = ['--quick', '--sets', 'small', '--optimizers', 'Lion', '--dtypes', 'float32',
         '--only', 'ours loop']


class Ended(NamedTuple):
    "What a command left behind."
    code: int
    out: str
    err: str


def strict(text):
    "JSON as its standard has it"
    def refuse(constant): raise AssertionError(f'{constant} is not JSON')
    return json.loads(text, parse_constant=refuse)


@pytest.fixture
def ran(capfd):
    "Run a command in this process."
    def run(name, *words):
        try: code = MAINS[name]([str(o) for o in words])
        except SystemExit as e: code = e.code
        return Ended(code, *capfd.readouterr())
    return run


def start(name, *words, **settings):
    "A command as a process of its own."
    code = f'import sys; from {MAINS[name].__module__} import main; sys.exit(main())'
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    call = [sys.executable, '-c', code, *words]
    return subprocess.Popen(call, **{**pipes, **settings})


def ended(process):
    out, err = process.communicate(timeout=120)
    return Ended(process.returncode, out, err)


def check_one_line(end, code, name, message=''):
    "The command ended with `code` and one line, which says `message`"
    assert end.code == code and end.err.startswith(f'{name}: '), end
    assert end.err.count('\n') == 1 and message in end.err, end


def check_refused(end, name, message=''):
    check_one_line(end, 2, name, message)
    assert end.out == ''


# ---- oe-translate: every word

@pytest.mark.parametrize('line', [
    'torch.SGD composer.DecoupledSGDW --lr .02 --momentum .9 --weight_decay .01',
    'torch.SGD composer.DecoupledSGDW --lr=.02 --momentum=.9 --weight_decay=.01',
    '--lr .02 --momentum .9 --weight-decay .01 torch.SGD composer.DecoupledSGDW',
    '--lr .02 torch.SGD --momentum .9 composer.DecoupledSGDW --weight_decay 1e-2',
    '--nesterov=False torch.SGD composer.DecoupledSGDW --lr .02 --momentum .9 '
    '--weight_decay .01'])
def test_a_recipe_in_other_spellings(line, ran):
    recipe = ('torch.SGD composer.DecoupledSGDW '
              '--lr .02 --momentum .9 --weight-decay .01')
    assert ran('oe-translate', *line.split()) == ran('oe-translate', *recipe.split())


@pytest.mark.parametrize('line', [
    'torch.SGD optim.SGD --momentum .9 --nesterov',
    '--nesterov torch.SGD optim.SGD --momentum .9',
    '--momentum .9 --nesterov torch.SGD optim.SGD',
    'torch.SGD --nesterov optim.SGD --momentum .9',
    'torch.SGD --nesterov true optim.SGD --momentum .9'])
def test_a_bare_switch_may_stand_anywhere(line, ran):
    end = ran('oe-translate', *line.split(), '--json')
    assert end.code == 0 and not end.err
    assert strict(end.out)['args']['nesterov'] is True


def another(name, default):
    "A value that differs from the default, where that alone makes a recipe"
    if name == 'nesterov': return False
    if isinstance(default, bool): return not default
    return [.8, .95] if isinstance(default, tuple) else .5


@pytest.mark.parametrize('src', optimizers)
@pytest.mark.parametrize('mark', '_-')
def test_each_argument_of_each_optimizer_is_understood(src, mark, ran):
    defaults = optimizers[src].defaults
    given = {k: another(k, default) for k, default in defaults.items()}
    words = []
    for k, v in given.items():
        words.append('--' + k.replace('_', mark))
        words.extend(v if k == 'betas' else [v])
    end = ran('oe-translate', src, src, *words, '--json')
    assert end.code == 0 and not end.err
    found = strict(end.out)['args']
    assert found == {k: given[k] for k in found}
    assert all(given[k] is defaults[k] for k in given.keys() - found.keys())


@pytest.mark.parametrize('word', [
    'bogus', 'momentum', 'torch.SGD', '7', '-7', '-1e-3', '', '-', '--', '-x', '-lr',
    '--l', '--lr', '--bogus', '--bogus=7', '--jso', '--json=1', '--weight',
    '--weight_decay=.1'])
def test_one_word_too_many_is_refused_wherever_it_stands(word, ran):
    line = 'torch.SGD fastai.SGD --lr .1 --weight-decay .1 --json'.split()
    assert ran('oe-translate', *line).code == 0
    for i in range(len(line) + 1):
        check_refused(ran('oe-translate', *line[:i], word, *line[i:]), 'oe-translate')


NUMBER = 'must be a number, true, false or none, got '
FINITE = 'must be a finite number, true, false or none, got '
SGD = 'known are lr, momentum, dampening, weight_decay, nesterov, maximize'


@pytest.mark.parametrize('words,message', [
    ('momentum 0.9', "'momentum' is not understood; write --momentum"),
    ('-weight-decay .1', "'-weight-decay' is not understood; write --weight-decay"),
    ('--bogus 7', f"unknown argument of torch.SGD 'bogus'; {SGD}"),
    ('--bogus-word=7', f"unknown argument of torch.SGD 'bogus_word'; {SGD}"),
    ('--wd .1', f"unknown argument of torch.SGD 'wd'; {SGD}"),
    ('--lr .1 --lr .2', '--lr is given twice'),
    ('--weight-decay .1 --weight_decay .1', '--weight-decay is given twice'),
    ('--json --json', '--json is given twice'),
    ('--lr .1 -- --momentum .9', "'--' is not understood"),
    ('--lr=-1', 'lr must be a number > 0, got -1.0'),
    ('--lr -1e-3', 'lr must be a number > 0, got -0.001'),
    ('--lr=', f"argument --lr: {NUMBER}''"),
    ('--lr 0x10', f"argument --lr: {NUMBER}'0x10'"),
    ('--nesterov maybe', f"argument --nesterov: {NUMBER}'maybe'"),
    ('--lr nan', f"argument --lr: {FINITE}'nan'"),
    ('--lr -inf', f"argument --lr: {FINITE}'-inf'"),
    ('--lr 1e400', f"argument --lr: {FINITE}'1e400'")])
def test_what_is_not_understood_is_named(words, message, ran):
    end = ran('oe-translate', 'torch.SGD', 'fastai.SGD', *words.split())
    check_refused(end, 'oe-translate', message)


@pytest.mark.parametrize('words', [
    '.9', '.9 .99 .999', '', '.9 --lr .1', '-1e-3 .9', '.9 nan', '.9 1'])
def test_betas_are_two_numbers_below_1(words, ran):
    end = ran('oe-translate', 'torch.Adam', 'fastai.Adam', '--betas', *words.split())
    check_refused(end, 'oe-translate')


def test_underscores_in_numbers_are_those_of_python(ran):
    end = ran('oe-translate', 'torch.SGD', 'optim.SGD', '--lr', '1_000', '--json')
    assert end.code == 0 and strict(end.out)['args']['lr'] == 1000


@pytest.mark.parametrize('line,message', [
    ('composer.DecoupledSGDW torch.SGD --lr 1e-300 --weight-decay 1e300',
     'torch.SGD cannot take the translation: weight_decay must be a number >= 0'),
    ('optim.SGD optim.SGDW --momentum .9 --dampening 1e200 --weight-decay 1e16',
     'numbers too large or too small')])
def test_a_translation_that_overflows_is_refused(line, message, ran):
    check_refused(ran('oe-translate', *line.split(), '--json'), 'oe-translate', message)


# ---- oe-race and oe-bench: every word

@pytest.fixture
def untouched(tmp_path, monkeypatch):
    "An empty working folder, in which nothing may be trained or measured"
    def never(*_, **__): raise AssertionError('this should have been refused before')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(race, 'run_race', never)
    monkeypatch.setattr(bench.report, 'run_bench', never)
    yield tmp_path
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('name', ['oe-race', 'oe-bench'])
@pytest.mark.parametrize('words,message', [
    ('--pdb', 'unrecognized arguments: --pdb; known are --help'),
    ('--xtra 3', 'unrecognized arguments: --xtra; known are --help'),
    ('--devic cpu', 'unrecognized arguments: --devic; did you mean --device'),
    ('-out .', 'unrecognized arguments: -out; did you mean --out'),
    ('--o .', 'unrecognized arguments: --o; known are --help'),
    ('bogus', 'unrecognized arguments: bogus; known are --help'),
    ('-1', 'unrecognized arguments: -1; known are --help'),
    ('--out . --out .', '--out is given twice'),
    ('--', "'--' is not understood"),
    ('--out', 'argument --out: expected one argument'),
    ('--out=', "out must be a folder that can be written to, got ''"),
    ('--device=', 'device must be one of cpu'),
    ('--device CPU', 'device must be one of cpu')])
def test_bad_words(name, words, message, untouched, ran):
    check_refused(ran(name, *words.split()), name, message)


SETS = ('sets must be some of resnet50, vit_small, small, large, '
        'separated by commas, got ')


@pytest.mark.parametrize('name,words,message', [
    ('oe-race', '--epo 3', 'unrecognized arguments: --epo; did you mean --epochs'),
    ('oe-race', '--epochs 1.5', "argument --epochs: invalid int value: '1.5'"),
    ('oe-race', '--seed -1', 'seed must be a number from 0 to 2**63-1, got -1'),
    ('oe-race', '--lr nan', 'lr must be a finite number >= 0, got nan'),
    ('oe-race', '--lr -1e-3', 'lr must be a finite number >= 0, got -0.001'),
    ('oe-race', '--weight_decay .1 --weight-decay .1', '--weight-decay is given twice'),
    ('oe-bench', '--rep 3', 'unrecognized arguments: --rep; did you mean --reps'),
    ('oe-bench', '--reps 1', 'reps must be at least 2, got 1'),
    ('oe-bench', '--reps 1 --quick', 'reps must be at least 2, got 1'),
    ('oe-bench', '--quick=1', "argument --quick: ignored explicit argument '1'"),
    ('oe-bench', '--sets=', f"{SETS}''"),
    ('oe-bench', '--sets small,', f"{SETS}''"),
    ('oe-bench', '--sets Small', f"{SETS}'Small'"),
    ('oe-bench', '--only=', 'only must be some of ours loop'),
    ('oe-bench', '--only nobody', 'only must be some of ours loop')])
def test_bad_words_of_one(name, words, message, untouched, ran):
    check_refused(ran(name, *words.split()), name, message)


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
@pytest.mark.parametrize('name', ['oe-race', 'oe-bench'])
def test_no_gpu(name, untouched, ran):
    message = "device must be one of cpu, got 'cuda'"
    check_refused(ran(name, '--device', 'cuda'), name, message)


@pytest.mark.parametrize('name', MAINS)
@pytest.mark.parametrize('word', ['', '--two\nlines', 'a b', '--é'])
def test_odd_words_are_one_line_too(name, word, untouched, ran):
    names = ['torch.SGD', 'fastai.SGD'] if name == 'oe-translate' else []
    check_refused(ran(name, *names, word), name)


@pytest.mark.parametrize('name', MAINS)
def test_help_explains_the_exit_codes(name, ran):
    end = ran(name, '--help')
    text = ' '.join(end.out.split())
    assert end.code == 0 and not end.err and 'exit codes: 0 ' in text
    for words in ('; 2 an argument that', '; 3 a file or the output cannot be written',
                  '; 4 an unexpected error', '; 130 interrupted'): assert words in text
    for hidden in ('--pdb', '--xtra'): assert hidden not in text


def test_a_missing_library_is_named(tmp_path, monkeypatch, ran):
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    end = ran('oe-race', '--out', tmp_path)
    check_refused(end, 'oe-race', 'matplotlib is not installed; pip install')


# ---- results and their files

ONE = '--epochs', '1', '--device', 'cpu', '--out'


@pytest.fixture(scope='module')
def rows(): return race.run_race(race.contenders(), epochs=1, device='cpu')


@pytest.fixture
def raced(rows, monkeypatch): monkeypatch.setattr(race, 'run_race', lambda *_: rows)


def test_underscores_reach_the_run(tmp_path, ran):
    end = ran('oe-race', *ONE, tmp_path, '--weight_decay', .01)
    result = strict((tmp_path/'race.json').read_text())
    assert end.code == 0 and result['settings']['weight_decay'] == .01
    assert result['diverged'] == [] and 'Diverged' not in end.out


@pytest.mark.parametrize('name,file', [
    ('oe-race', 'race.json'), ('oe-race', 'race.png'),
    ('oe-bench', 'bench.json'), ('oe-bench', 'bench.png')])
def test_a_folder_in_place_of_a_file_is_found_at_once(name, file, untouched, ran):
    (untouched/file).mkdir()
    end = ran(name)
    (untouched/file).rmdir()
    check_one_line(end, 3, name, f"cannot write '{file}': it is a folder")
    assert end.out == ''


def disk_is_full(*_, **__): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
def may_not(*_, **__): raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


@pytest.mark.parametrize('owner,name,broken,reason', [
    (Path, 'write_text', disk_is_full, "race.json': No space left on device"),
    (Figure, 'savefig', disk_is_full, "race.png': No space left on device"),
    (os, 'fsync', disk_is_full, "race.json': No space left on device"),
    (os, 'replace', may_not, "race.json': Permission denied")])
def test_a_file_that_cannot_be_written(
        owner, name, broken, reason, raced, tmp_path, monkeypatch, ran):
    before = {'race.json': 'old table', 'race.png': 'old picture'}
    for k, v in before.items(): (tmp_path/k).write_text(v)
    with monkeypatch.context() as m:
        m.setattr(owner, name, broken)
        end = ran('oe-race', '--out', tmp_path)
    check_one_line(end, 3, 'oe-race', reason)
    assert '| callback.SGD ' in end.out and 'All agree' in end.out
    assert 'Wrote' not in end.out
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == before


def test_a_disagreement_without_files_says_both(rows, tmp_path, monkeypatch, ran):
    two = [rows[0], {**rows[1], 'max_diff': 1.}]
    monkeypatch.setattr(race, 'run_race', lambda *_: two)
    monkeypatch.setattr(os, 'replace', may_not)
    end = ran('oe-race', '--out', tmp_path)
    check_one_line(end, 3, 'oe-race', 'Permission denied')
    assert 'Disagreeing: torch.optim.SGD (' in end.out


def removed(out): shutil.rmtree(out)
def became_a_file(out):
    shutil.rmtree(out)
    out.write_text('mine')
def got_a_folder(out): (out/'race.png').mkdir()


@pytest.mark.parametrize('change,reason', [
    (removed, 'No such file or directory'), (became_a_file, 'Not a directory'),
    (got_a_folder, 'it is a folder')])
def test_a_folder_that_changes_during_the_run(
        change, reason, rows, tmp_path, monkeypatch, ran):
    out = tmp_path/'out'
    def changing(*_):
        change(out)
        return rows
    monkeypatch.setattr(race, 'run_race', changing)
    end = ran('oe-race', '--out', out)
    check_one_line(end, 3, 'oe-race', reason)
    assert 'All agree' in end.out and not (out/'race.json').exists()


def test_a_limit_on_files_is_met_in_words(tmp_path):
    subprocess.check_call([sys.executable, '-c', 'import matplotlib.font_manager'])
    def limit(): resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    end = ended(start('oe-race', *ONE, str(tmp_path), preexec_fn=limit))
    check_one_line(end, 3, 'oe-race', "race.json': File too large")
    assert 'All agree' in end.out and list(tmp_path.iterdir()) == []


def test_a_full_disk_at_the_start(tmp_path, monkeypatch, ran):
    monkeypatch.setattr(commands.tempfile, 'TemporaryFile', disk_is_full)
    end = ran('oe-race', '--out', tmp_path)
    check_one_line(end, 3, 'oe-race', 'No space left on device')
    assert end.out == ''


def test_a_diverged_run_says_so_in_json_too(tmp_path, ran):
    end = ran('oe-race', *ONE, tmp_path, '--lr', 1e300, '--weight-decay', 0)
    result = strict((tmp_path/'race.json').read_text())
    names = ['BasicSGD', 'torch.optim.SGD', 'DecoupledSGDW', 'callback.SGD']
    assert end.code == 1 and f"Diverged: {', '.join(names)}." in end.out
    assert not result['agree'] and result['diverged'] == names
    for row in result['contenders']: assert row['final_loss'] is row['max_diff'] is None


def test_an_error_of_ours_is_no_disagreement(tmp_path, monkeypatch, ran):
    def broken(*_): raise RuntimeError('out of memory')
    monkeypatch.setattr(race, 'run_race', broken)
    end = ran('oe-race', '--out', tmp_path)
    assert end.code == 4 and 'Traceback' in end.err
    assert 'RuntimeError: out of memory' in end.err


def test_bench_writes_strict_json(tmp_path, monkeypatch, ran):
    real = bench.report.run_bench
    def infinite(**kw): return dict(real(**kw), copy_gb_per_s=float('inf'))
    monkeypatch.setattr(bench.report, 'run_bench', infinite)
    assert ran('oe-bench', *QUICK, '--reps', 2, '--out', tmp_path).code == 0
    run = strict((tmp_path/'bench.json').read_text())
    assert run['copy_gb_per_s'] is None
    assert run['reps'] == 2, '--quick does not overrule --reps'


def test_bench_keeps_its_numbers_when_files_fail(tmp_path, monkeypatch, ran):
    monkeypatch.setattr(os, 'replace', may_not)
    end = ran('oe-bench', *QUICK, '--out', tmp_path)
    check_one_line(end, 3, 'oe-bench', "bench.json': Permission denied")
    assert '| ours loop ' in end.out and list(tmp_path.iterdir()) == []


def test_bench_without_anything_to_measure(tmp_path, monkeypatch, ran):
    monkeypatch.setitem(sys.modules, 'timm', None)
    (tmp_path/'bench.json').write_text('from before')
    words = ['resnet50' if o == 'small' else o for o in QUICK]
    end = ran('oe-bench', *words, '--out', tmp_path)
    assert end.code == 1 and not end.err and 'Nothing could be measured' in end.out
    assert 'not installed: pip install timm' in end.out
    assert [p.name for p in tmp_path.iterdir()] == ['bench.json']
    assert (tmp_path/'bench.json').read_text() == 'from before'


# ---- readers that go, outputs that are full or closed, Ctrl-C

@pytest.fixture
def no_reader():
    "The writing end of a pipe that nobody reads"
    reading, writing = os.pipe()
    os.close(reading)
    yield writing
    os.close(writing)


def test_a_reader_that_has_gone_ends_the_printing_only(no_reader, tmp_path):
    end = ended(start('oe-race', *ONE, str(tmp_path), stdout=no_reader))
    assert end.code == 0 and end.err == ''
    assert sorted(p.name for p in tmp_path.iterdir()) == ['race.json', 'race.png']


@pytest.mark.parametrize('words', [['--help'], ['torch.SGD', 'fastai.SGD']])
def test_nobody_reads_the_translation(words, no_reader):
    end = ended(start('oe-translate', *words, stdout=no_reader))
    assert end.code == 0 and end.err == ''


def test_nobody_reads_the_error(no_reader):
    end = ended(start('oe-translate', 'torch.SGD', stderr=no_reader))
    assert end.code == 2 and end.out == ''


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='no /dev/full here')
@pytest.mark.parametrize('words', [['--help'], ['torch.SGD', 'fastai.SGD']])
def test_an_output_that_is_full(words):
    with open('/dev/full', 'w') as full:
        end = ended(start('oe-translate', *words, stdout=full))
    message = 'cannot write the output: No space left on device'
    check_one_line(end, 3, 'oe-translate', message)


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='no /dev/full here')
def test_files_are_written_when_the_output_is_full(raced, tmp_path, monkeypatch, ran):
    with open('/dev/full', 'w') as full:
        monkeypatch.setattr(sys, 'stdout', full)
        end = ran('oe-race', '--out', tmp_path)
    check_one_line(end, 3, 'oe-race', 'cannot write the output')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['race.json', 'race.png']


@pytest.mark.parametrize('closed', ['stdout', 'stderr'])
def test_outputs_that_are_closed(closed, tmp_path, monkeypatch, ran):
    monkeypatch.setattr(sys, closed, None)         # as after `>&-`
    end = ran('oe-race', *ONE, tmp_path)
    assert end.code == 0 and (tmp_path/'race.json').exists()
    assert ('All agree' in end.out) == (closed == 'stderr')
    end = ran('oe-translate', 'torch.SGD')
    assert end.code == 2 and end.out == '', 'an error is never printed as an answer'
    assert bool(end.err) == (closed == 'stdout')


def test_an_interruption_is_one_line(tmp_path):
    out = tmp_path/'made before training'
    process = start('oe-race', '--epochs', '100000', '--out', str(out))
    until = time.monotonic() + 60
    while not out.exists() and time.monotonic() < until: time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert ended(process) == (130, '', 'oe-race: interrupted\n')
    assert list(out.iterdir()) == []


def test_a_name_that_the_terminal_cannot_show(raced, tmp_path, monkeypatch):
    shown = io.BytesIO()
    monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(shown, encoding='ascii'))
    assert race.main(['--out', str(tmp_path/'é')]) == 0
    assert b'\\xe9' in shown.getvalue() and (tmp_path/'é'/'race.json').exists()
