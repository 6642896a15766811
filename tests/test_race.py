"The command `oe-race`, as a process: its exit codes, its files, its one-line errors."
import json
import subprocess
import sys

import pytest

from optimizers_explained import commands as commands, race
from optimizers_explained.composer import DecoupledSGDW


PROGRAM = 'import sys; from optimizers_explained.race import main; sys.exit(main())'


def command(*args, cwd):
    return subprocess.run([sys.executable, '-c', PROGRAM, *args],
                          cwd=cwd, capture_output=True, text=True)


def test_all_agree(tmp_path):
    done = command('--epochs', '1', '--out', 'deep/er', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert 'All agree' in done.stdout and f'{race.tolerance:g}' in done.stdout
    out = tmp_path/'deep/er'
    result = json.loads((out/'race.json').read_text())
    rows = result['contenders']
    names = [r['name'] for r in rows]
    assert names == ['BasicSGD', 'torch.optim.SGD', 'DecoupledSGDW', 'callback.SGD']
    for name in names: assert name in done.stdout
    assert result['agree'] and result['settings']['epochs'] == 1
    for r in rows: assert r['max_diff'] <= result['tolerance']
    assert (out/'race.png').read_bytes().startswith(b'\x89PNG')
    assert sorted(p.name for p in out.iterdir()) == ['race.json', 'race.png']


def test_a_wrong_translation_exits_1(tmp_path, monkeypatch, capsys):
    def wrong(ps): return DecoupledSGDW(ps, lr=0.1, momentum=0.9, weight_decay=1e-3)
    makes = {**race.contenders(), 'DecoupledSGDW': wrong}
    monkeypatch.setattr(race, 'contenders', lambda *_: makes)
    assert race.main(['--epochs', '1', '--out', str(tmp_path)]) == 1
    assert 'Disagreeing: DecoupledSGDW (' in capsys.readouterr().out
    assert json.loads((tmp_path/'race.json').read_text())['agree'] is False


@pytest.mark.parametrize('args,message', [
    (['--device', 'gpu'], "device must be one of cpu"),
    (['--device', 'cuda:99'], "got 'cuda:99'"),
    (['--lr', '-0.1'], 'lr must be a finite number >= 0, got -0.1'),
    (['--lr', 'nan'], 'lr must be a finite number >= 0, got nan'),
    (['--lr', 'fast'], "argument --lr: invalid float value: 'fast'"),
    (['--momentum', '1'], 'momentum must be below 1, got 1.0'),
    (['--weight-decay', '10'], 'lr*weight_decay must be below 1'),
    (['--epochs', '0'], 'epochs must be at least 1, got 0'),
    (['--nonsense'], 'unrecognized arguments: --nonsense'),
    (['--out', 'file'], "out must be a folder that can be written to, got 'file'")])
def test_bad_input_is_one_line_and_2(tmp_path, args, message, capfd, monkeypatch):
    (tmp_path/'file').write_text('mine')
    monkeypatch.chdir(tmp_path)
    try: code = race.main(args)
    except SystemExit as e: code = e.code
    out, err = capfd.readouterr()
    assert code == 2 and not out and message in err
    assert err.count('\n') == 1 and err.startswith('oe-race: ')
    assert [p.name for p in tmp_path.iterdir()] == ['file']
    assert (tmp_path/'file').read_text() == 'mine'


def test_nothing_is_half_written(tmp_path, monkeypatch, capfd):
    (tmp_path/'race.json').write_text('from before')
    def broken(*_): raise KeyboardInterrupt
    monkeypatch.setattr(commands.os, 'replace', broken)
    assert race.main(['--epochs', '1', '--out', str(tmp_path)]) == 130
    assert capfd.readouterr().err == 'oe-race: interrupted\n'
    assert [p.name for p in tmp_path.iterdir()] == ['race.json']
    assert (tmp_path/'race.json').read_text() == 'from before'


def test_help_explains_each_option(tmp_path):
    text = ' '.join(command('--help', cwd=tmp_path).stdout.split())
    for option in ('epochs', 'lr', 'momentum', 'weight-decay', 'seed', 'device', 'out'):
        assert f'--{option} (' in text
    assert text.count('(default: ') == 6
