"""What can go wrong between source and call: compilers, the folder, children."""
import ctypes
import errno
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

from optimizers_explained.speed import compiler
from optimizers_explained.core import StepOptimizer
from optimizers_explained.steps import lars, momentum, sgd
from optimizers_explained.speed.operations import Unfusable
from optimizers_explained.speed.recorder import record
from optimizers_explained.problems import max_diff

ROOT = Path(__file__).resolve().parents[1]
CXX = next(filter(shutil.which, ('g++', 'c++', 'clang++')), None)
SOURCE = 'extern "C" int run() { return 42; }'
NAMES = 'CXX', 'XDG_CACHE_HOME', 'OPTIMIZERS_EXPLAINED_TIMEOUT'

pytestmark = [
    pytest.mark.skipif(os.name != 'posix', reason='its programs are shell scripts'),
    pytest.mark.skipif(CXX is None, reason='there is no C++ compiler')]


@pytest.fixture(autouse=True)
def kernels(tmp_path, monkeypatch):
    "A process that has built nothing, and the folder that it will use."
    for name in NAMES: monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('OPTIMIZERS_EXPLAINED_CACHE', str(tmp_path/'kernels'))
    monkeypatch.setattr(compiler, 'KERNELS', {})
    monkeypatch.setattr(compiler, 'HUNG', {}, raising=False)
    compiler.compiler.cache_clear()
    yield tmp_path/'kernels'
    compiler.compiler.cache_clear()


def twice(p, g, state, *, scale=1.): return g*scale + g
def thrice(p, g, state, *, scale=1.): return g*scale + g + g


def trained(step=twice, **way):
    "Three steps: the parameters, and what was told."
    ps = [torch.linspace(-1, 1, 12).view(3, 4), torch.ones(5)]
    for p in ps: p.requires_grad_().grad = torch.full_like(p, 0.5)
    opt = StepOptimizer(ps, [step, momentum, sgd], lr=0.1, momentum=0.9, **way)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        for _ in range(3): opt.step()
    return ps, [str(w.message) for w in caught]


def falls_back(reason, step=twice):
    "One warning of one sentence, and the numbers of the loop."
    ps, told = trained(step, fused=True)
    assert len(told) == 1 and reason in told[0] and '\n' not in told[0], told
    assert max_diff(ps, trained(step)[0]) == 0.


def is_fused(step=twice):
    "A kernel has run without a warning, and its numbers are right."
    before = len(compiler.KERNELS)
    ps, told = trained(step, fused=True)
    assert told == [] and len(compiler.KERNELS) > before
    assert max_diff(ps, trained(step)[0]) < 1e-6
    assert max_diff(ps, trained(twice if step is thrice else thrice)[0]) > 0.01


def script(path, text, mode=0o755):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)
    return path


def fake(tmp_path, monkeypatch, body):
    "A compiler that does what `body` says: `$out` is what it is to write."
    text = ('#!/bin/sh\n[ "$1" = --version ] && echo fake 1.0 && exit 0\n'
            f'for out; do :; done\n{body}\n')
    path = script(tmp_path/'fake', text)
    monkeypatch.setenv('CXX', str(path))
    return path


def python(code, **env):
    "What a process of its own prints."
    command, env = [sys.executable, '-c', code], {**os.environ, **env}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True,
                          timeout=500)


def ends(ticks):
    "Whether something that writes to a file twenty times a second has stopped."
    size = ticks.stat().st_size
    time.sleep(0.5)
    return size > 0 and ticks.stat().st_size == size


# --- the compiler
HALF = f'{CXX} "$@" && head -c %d "$out" > half && mv half "$out"'
OTHER = f'echo "int f() {{ return 0; }}" > f.cpp; {CXX} -shared -fPIC f.cpp -o "$out"'
BODIES = dict(
    fails=('exit 3', 'cannot build it (exit code 3)'),
    complains=("echo 'no such file' >&2; echo 'or folder' >&2; exit 1",
               'cannot build it (no such file or folder)'),
    complains_in_bytes=(r"printf 'caf\351 \377' >&2; exit 1",
                        r'cannot build it (caf\xe9 \xff)'),
    is_killed=('kill -9 $$', 'cannot build it (killed by signal 9)'),
    writes_nothing=('exit 0', 'cannot build it (it wrote nothing)'),
    writes_an_empty_file=(': > "$out"', 'cannot build it (it wrote nothing)'),
    makes_a_folder=('mkdir -p "$out"', 'cannot build it (it wrote nothing)'),
    writes_text=('echo hello > "$out"', 'a kernel cannot be loaded'),
    writes_half=(HALF % 9000, 'cannot build it (it wrote half a file)'),
    writes_a_start=(HALF % 40, 'cannot build it (it wrote half a file)'),
    writes_another_library=(OTHER, 'a kernel has no function run'))

@pytest.mark.parametrize('what', BODIES)
def test_a_compiler_that(what, tmp_path, monkeypatch, kernels):
    body, reason = BODIES[what]
    compiler = fake(tmp_path, monkeypatch, body)
    falls_back(reason)
    assert os.listdir(kernels) == []
    script(compiler, f'#!/bin/sh\nexec {CXX} "$@"\n')
    is_fused()                                                     # it was mended


NO_SUCH = 'there is no such program'
NO_PROGRAMS = dict(
    text=(lambda path: script(path, 'hello\n'), 'cannot be run'),
    no_interpreter=(lambda path: script(path, '#!/no/such/program\n'), 'cannot be run'),
    not_executable=(lambda path: script(path, '#!/bin/sh\n', 0o644), NO_SUCH),
    folder=(Path.mkdir, NO_SUCH),
    broken_link=(lambda path: path.symlink_to('nowhere'), NO_SUCH),
    nothing=(lambda path: None, NO_SUCH))

@pytest.mark.parametrize('what', NO_PROGRAMS)
def test_what_is_no_compiler(what, tmp_path, monkeypatch, kernels):
    make, reason = NO_PROGRAMS[what]
    make(tmp_path/'cxx')
    monkeypatch.setenv('CXX', str(tmp_path/'cxx'))
    falls_back(reason)
    monkeypatch.setenv('CXX', '')                                  # as if not set
    is_fused()


HANGS = dict(at_once='', at_work='[ "$1" = --version ] && exit 0\n')

def ticking(tmp_path, before):
    "A compiler that waits for ever for another program, which writes to `ticks`."
    go, ticks = tmp_path/'go', tmp_path/'ticks'
    go.touch()
    loop = f'while [ -e "{go}" ]; do echo tick >> "{ticks}"; sleep 0.05; done'
    return script(tmp_path/'slow', f'#!/bin/sh\n{before}({loop}) &\nwait\n'), ticks

@pytest.mark.parametrize('at', HANGS)
def test_a_compiler_that_hangs(at, tmp_path, monkeypatch, kernels):
    "It is killed with all that it has started, and not waited for again."
    calls = tmp_path/'calls'
    compiler, ticks = ticking(tmp_path, f'{HANGS[at]}echo call >> "{calls}"\n')
    monkeypatch.setenv('CXX', str(compiler))
    monkeypatch.setenv('OPTIMIZERS_EXPLAINED_TIMEOUT', '2')
    falls_back('is not done after 2 seconds, '
               'the limit that OPTIMIZERS_EXPLAINED_TIMEOUT sets')
    falls_back('is not done after 2 seconds', thrice)
    assert calls.read_text() == 'call\n' and ends(ticks)
    assert not kernels.exists() or os.listdir(kernels) == []
    monkeypatch.setenv('OPTIMIZERS_EXPLAINED_TIMEOUT', '2.5')
    falls_back('is not done after 2.5 seconds')                    # a new chance
    assert calls.read_text() == 'call\n'*2 and ends(ticks)
    monkeypatch.setenv('CXX', CXX)
    monkeypatch.setenv('OPTIMIZERS_EXPLAINED_TIMEOUT', '600')
    is_fused()


def test_a_compiler_that_prints_without_end(tmp_path, monkeypatch):
    fake(tmp_path, monkeypatch, 'exec yes "an error, and another one" >&2')
    start = time.monotonic()
    falls_back('prints without end')
    assert time.monotonic() - start < 60


def test_a_compiler_that_leaves_a_server(tmp_path, monkeypatch):
    "Something that keeps what was printed open does not keep the step waiting."
    fake(tmp_path, monkeypatch, f'(sleep 60 &)\nexec {CXX} "$@"')
    start = time.monotonic()
    is_fused()
    assert time.monotonic() - start < 50


LIMITS = 'soon', '-1', '0', 'nan', 'inf', '3601', '1e999', '12 s'

@pytest.mark.parametrize('limit', LIMITS)
def test_a_limit_that_is_none(limit, monkeypatch):
    monkeypatch.setenv('OPTIMIZERS_EXPLAINED_TIMEOUT', limit)
    falls_back('OPTIMIZERS_EXPLAINED_TIMEOUT must be a number of seconds, more than 0 '
               f'and at most 3600, got {limit!r}')


def test_a_version_in_bytes(tmp_path, monkeypatch):
    version = '[ "$1" = --version ] && printf "caf\\351" && exit 0'
    text = f'#!/bin/sh\n{version}\nexec {CXX} "$@"\n'
    monkeypatch.setenv('CXX', str(script(tmp_path/'cxx', text)))
    is_fused()


INTERRUPTED = '''
import signal, torch
from optimizers_explained import optim
signal.signal(signal.SIGINT, signal.default_int_handler)   # if we run in the background
p = torch.ones(3, requires_grad=True)
p.grad = torch.ones(3)
opt = optim.SGD([p], lr=0.5, fused=True)
try: opt.step()
except KeyboardInterrupt: print('interrupted', p.tolist())
'''

def start_hanging(tmp_path):
    "A process whose compiler does not end, and the file that the compiler writes to."
    compiler, ticks = ticking(tmp_path, HANGS['at_work'])
    env = {**os.environ, 'CXX': str(compiler)}
    process = subprocess.Popen([sys.executable, '-c', INTERRUPTED], env=env, cwd=ROOT,
                               stdout=subprocess.PIPE, text=True)
    while not ticks.exists() and process.poll() is None: time.sleep(0.05)
    return process, ticks


def test_an_interruption_ends_the_compiler(tmp_path, kernels):
    process, ticks = start_hanging(tmp_path)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert out == 'interrupted [1.0, 1.0, 1.0]\n' and ends(ticks)
    assert os.listdir(kernels) == []


def test_a_killed_build_is_swept_up_later(tmp_path, kernels, monkeypatch):
    process, ticks = start_hanging(tmp_path)
    process.kill()
    process.communicate(timeout=60)
    (tmp_path/'go').unlink()                                       # its compiler lives
    left, = kernels.iterdir()
    script(tmp_path/'slow', '#!/bin/sh\nexit 1\n')
    (kernels/'tmp').mkdir()                                        # not ours
    compiler.library(SOURCE)
    assert left.is_dir()                                           # perhaps in use
    for path in left, kernels/'tmp': os.utime(path, (0, 0))
    compiler.library(SOURCE.replace('42', '43'))
    assert sorted(p.suffix or p.name for p in kernels.iterdir()) == 2*['.so'] + ['tmp']


# --- how it is called
def logged(path):
    "A program that runs what it is given, and leaves a note."
    return script(path, f'#!/bin/sh\necho "$1" >> "{path}.log"\nexec "$@"\n')

COMMANDS = '{cache} {cxx}', '"{cache}" {cxx} -DX=1', '  {cache} {cxx}  '

@pytest.mark.parametrize('command', COMMANDS)
def test_a_compiler_with_arguments(command, tmp_path, monkeypatch):
    cache = logged(tmp_path/'fakecache')
    monkeypatch.setenv('CXX', command.format(cache=cache, cxx=CXX))
    is_fused()
    assert Path(f'{cache}.log').read_text() == f'{CXX}\n'*2         # version, kernel


def test_a_compiler_in_a_folder_with_spaces(tmp_path, monkeypatch):
    text = f'#!/bin/sh\ntouch "{tmp_path}/used"\nexec {CXX} "$@"\n'
    monkeypatch.setenv('CXX', str(script(tmp_path/'my compilers'/'c++', text)))
    is_fused()
    assert (tmp_path/'used').exists()


def test_a_compiler_in_the_current_folder(tmp_path, monkeypatch):
    script(tmp_path/'cxx', f'#!/bin/sh\nexec {CXX} "$@"\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('CXX', './cxx')
    is_fused()


def test_an_open_quotation(monkeypatch):
    monkeypatch.setenv('CXX', f'{CXX} "-O2')
    falls_back('CXX is')


def test_the_first_compiler_that_is_there(tmp_path):
    (tmp_path/'g++').symlink_to('nowhere')
    script(tmp_path/'c++', '#!/bin/sh\n', 0o644)
    script(tmp_path/'clang++', '#!/bin/sh\necho clang\n')
    command, version = compiler.compiler(None, str(tmp_path))
    assert command == (str(tmp_path/'clang++'),) and version.startswith('clang\n')


def refusing(*flags):
    "A compiler that does not know some flags."
    test = 'case " $* " in *" {0} "*) echo "unsupported option {0}" >&2; exit 1; esac\n'
    return ''.join(map(test.format, flags)) + f'exec {CXX} "$@"'

LACKS = ['-fopenmp'], ['-march=native'], ['-fopenmp', '-march=native']

@pytest.mark.parametrize('flags', LACKS)
def test_a_compiler_that_lacks_a_flag(flags, tmp_path, monkeypatch):
    "It is asked again with less, and the numbers are the same."
    want = trained(fused=True)[0]
    monkeypatch.setattr(compiler, 'KERNELS', {})
    fake(tmp_path, monkeypatch, refusing(*flags))
    is_fused()
    assert max_diff(trained(fused=True)[0], want) == 0.
    fake(tmp_path, monkeypatch, refusing('-shared'))
    compiler.compiler.cache_clear()
    falls_back('unsupported option -shared', thrice)


def test_a_compiler_whose_openmp_has_no_library(tmp_path, monkeypatch):
    "It builds what cannot be loaded."
    text = 'void nowhere(); void user() { nowhere(); }'
    body = (f'case " $* " in *" -fopenmp "*) echo "{text}" > user.cpp; '
            f'exec {CXX} "$@" user.cpp;; esac\nexec {CXX} "$@"')
    fake(tmp_path, monkeypatch, body)
    is_fused()


# --- where the folder is
HOME = '.cache/optimizers_explained'
PLACES = [
    (dict(), f'home/{HOME}'),
    (dict(OPTIMIZERS_EXPLAINED_CACHE='', XDG_CACHE_HOME=''), f'home/{HOME}'),
    (dict(OPTIMIZERS_EXPLAINED_CACHE='~/my kernels'), 'home/my kernels'),
    (dict(OPTIMIZERS_EXPLAINED_CACHE='~'), 'home'),
    (dict(OPTIMIZERS_EXPLAINED_CACHE='here/kernels'), 'here/kernels'),
    (dict(XDG_CACHE_HOME='relative'), f'home/{HOME}'),
    (dict(XDG_CACHE_HOME='~/caches'), 'home/caches/optimizers_explained')]

@pytest.mark.parametrize('env,place', PLACES)
def test_where_the_folder_is(env, place, tmp_path, monkeypatch):
    "The home is missing, and made; all new folders are for their user alone."
    monkeypatch.delenv('OPTIMIZERS_EXPLAINED_CACHE')
    monkeypatch.setenv('HOME', str(tmp_path/'home'))
    monkeypatch.chdir(tmp_path)
    for name, value in env.items(): monkeypatch.setenv(name, value)
    before = os.umask(0)
    try: found = compiler.cache_dir()
    finally: os.umask(before)
    parts = Path(place).parts
    assert found == tmp_path/place and os.listdir(tmp_path) == [parts[0]]
    for folder in [found, *found.parents][:len(parts)]:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def without_home(monkeypatch):
    "No variable, and no entry in the list of users."
    import pwd
    def unknown(uid): raise KeyError(uid)
    monkeypatch.delenv('HOME', raising=False)
    monkeypatch.setattr(pwd, 'getpwuid', unknown)

@pytest.mark.parametrize('name', ['OPTIMIZERS_EXPLAINED_CACHE', 'XDG_CACHE_HOME'])
def test_no_home_is_needed(name, tmp_path, monkeypatch):
    monkeypatch.delenv('OPTIMIZERS_EXPLAINED_CACHE')
    monkeypatch.setenv(name, str(tmp_path/'elsewhere'))
    without_home(monkeypatch)
    assert compiler.cache_dir().is_relative_to(tmp_path/'elsewhere')
    is_fused()


@pytest.mark.parametrize('own', [None, '', '~/kernels', '~no_such_user_/kernels'])
def test_no_place(own, monkeypatch):
    if own is None: monkeypatch.delenv('OPTIMIZERS_EXPLAINED_CACHE')
    else: monkeypatch.setenv('OPTIMIZERS_EXPLAINED_CACHE', own)
    without_home(monkeypatch)
    falls_back('the folder for kernels cannot be made')


def test_an_empty_home_is_not_the_root(monkeypatch):
    monkeypatch.delenv('OPTIMIZERS_EXPLAINED_CACHE')
    monkeypatch.setenv('HOME', '')
    falls_back('the folder for kernels cannot be made (HOME is empty)')


ODD = ('with spaces', "it's \"quoted\" $HOME `id`", '-O0', 'größe_核',
       os.fsdecode(b'caf\xe9'), 'two\nlines', 'a,b;c', '[ab]*')

@pytest.mark.parametrize('name', ODD)
def test_odd_names(name, tmp_path, monkeypatch):
    monkeypatch.setenv('OPTIMIZERS_EXPLAINED_CACHE', str(tmp_path/name/'kernels'))
    is_fused()
    assert [p.suffix for p in (tmp_path/name/'kernels').iterdir()] == ['.so']


THINGS = dict(
    file=Path.touch, pipe=os.mkfifo, link=lambda path: path.symlink_to('nowhere'),
    circle=lambda path: path.symlink_to(path))

@pytest.mark.parametrize('thing', THINGS)
def test_something_else_in_its_place(thing, kernels):
    THINGS[thing](kernels)
    falls_back('the folder for kernels cannot be made')


def test_a_link_to_a_folder_of_ones_own(tmp_path, kernels):
    (tmp_path/'large disk').mkdir(mode=0o700)
    kernels.symlink_to('large disk')
    is_fused()
    assert [p.suffix for p in (tmp_path/'large disk').iterdir()] == ['.so']


@pytest.mark.skipif(os.geteuid() != 0, reason='only root may give a folder away')
def test_a_folder_of_somebody_else(kernels):
    kernels.mkdir(mode=0o700)
    os.chown(kernels, 65534, 65534)
    falls_back('belongs to somebody else')


@pytest.mark.parametrize('mode', [0o701, 0o710, 0o750, 0o777, 0o1777])
def test_an_open_folder(mode, kernels):
    kernels.mkdir()
    kernels.chmod(mode)
    falls_back('is open to others')


def test_a_folder_that_is_deleted_meanwhile(kernels):
    is_fused()
    shutil.rmtree(kernels)
    is_fused(thrice)
    assert len(os.listdir(kernels)) == 1


@pytest.mark.parametrize('call', ['mkdir', 'fsync', 'replace'])
def test_a_full_disk(call, kernels, monkeypatch):
    "Whatever it is that fails: one sentence with the folder's name, and nothing stays."
    compiler.cache_dir()
    real = getattr(os, call)
    def full(path, *args, **kwargs):
        if path == kernels: return real(path, *args, **kwargs)     # it is there
        raise OSError(errno.ENOSPC, 'No space left on device', 'a name')
    monkeypatch.setattr(os, call, full)
    falls_back(f'a kernel cannot be written to {kernels} (No space left on device)')
    assert os.listdir(kernels) == []


# --- what is in it
def foreign(path):
    other = path.with_name('other.so')
    command = [CXX, '-shared', '-fPIC', '-x', 'c++', '-', '-o', other]
    subprocess.run(command, input=SOURCE.replace('42', '666'), text=True, check=True)
    other.replace(path)

def linked(path):
    path.replace(path.parent.parent/'moved')
    path.symlink_to('../moved')
def given_away(path):
    if os.geteuid(): pytest.skip('only root may give a file away')
    os.chown(path, 65534, 65534)

def size(path): return path.stat().st_size

DAMAGES = dict(
    cut=lambda path: os.truncate(path, 9000),
    cut_short=lambda path: os.truncate(path, 100),
    without_its_last_byte=lambda path: os.truncate(path, size(path) - 1),
    empty=lambda path: os.truncate(path, 0),
    longer=lambda path: path.write_bytes(path.read_bytes() + b'\0'),
    zeros=lambda path: path.write_bytes(bytes(size(path))),
    foreign=foreign, linked=linked, given_away=given_away,
    writable=lambda path: path.chmod(0o666),
    unreadable=lambda path: path.chmod(0))

@pytest.mark.parametrize('what', DAMAGES)
def test_a_damaged_file_is_built_again(what, kernels):
    good = compiler.library(SOURCE)
    content = good.read_bytes()
    assert compiler.library(SOURCE) == good and good.stat().st_mode & 0o022 == 0
    DAMAGES[what](good)
    again = compiler.library(SOURCE)
    assert again.read_bytes() == content and not again.is_symlink()
    assert again.stat().st_uid == os.geteuid() and again.stat().st_mode & 0o022 == 0
    assert list(kernels.iterdir()) == [again] and ctypes.CDLL(str(again)).run() == 42


@pytest.mark.parametrize('make', [os.mkfifo, os.mkdir])
def test_no_file_in_place_of_one(make, kernels):
    "A pipe would be read for ever; a folder cannot be replaced."
    good = compiler.library(SOURCE)
    good.unlink()
    make(good)
    if make is os.mkfifo: assert ctypes.CDLL(str(compiler.library(SOURCE))).run() == 42
    else:
        with pytest.raises(Unfusable, match='cannot be written'):
            compiler.library(SOURCE)


CRASH = '''
import warnings, torch
from optimizers_explained import optim
p = torch.ones(3, requires_grad=True)
p.grad = torch.ones(3)
opt = optim.SGD([p], lr=0.5, fused=True)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    opt.step()
print(p.tolist(), [str(w.message) for w in caught])
'''

def test_cut_files_and_the_next_process(kernels):
    "Every file that a first process has built is cut; the second one has kernels."
    assert python(CRASH).stdout == '[0.5, 0.5, 0.5] []\n'
    sizes = {path: size(path) for path in kernels.iterdir()}
    for path in sizes: os.truncate(path, sizes[path]//3)
    second = python(CRASH)
    assert (second.stdout, second.returncode) == ('[0.5, 0.5, 0.5] []\n', 0)
    assert {path: size(path) for path in kernels.iterdir()} == sizes


def test_umask_zero(kernels):
    "What is kept is for its user alone, and found again."
    before = os.umask(0)
    try: path = compiler.library(SOURCE)
    finally: os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    written = path.stat().st_mtime_ns
    assert compiler.library(SOURCE).stat().st_mtime_ns == written


def test_several_processes_and_a_damaged_file(kernels):
    compiler.library(SOURCE)
    good, = kernels.iterdir()
    content = good.read_bytes()
    os.truncate(good, 5000)
    children = []
    for _ in range(6):
        pid = os.fork()
        if not pid:
            right = False
            try: right = ctypes.CDLL(str(compiler.library(SOURCE))).run() == 42
            finally: os._exit(0 if right else 1)
        children.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0]*6
    assert [p.read_bytes() for p in kernels.iterdir()] == [content]


@pytest.mark.skipif(not Path('/proc/self/fd').is_dir(),
                    reason='this system has no path through an open folder')
def test_a_folder_that_is_renamed_after_the_check(tmp_path, kernels, monkeypatch):
    "What is loaded, and what is written, is in the folder that was checked."
    def swap():
        kernels.rename(tmp_path/'checked')
        (tmp_path/'evil').mkdir(exist_ok=True)
        (tmp_path/'evil').rename(kernels)
    good = compiler.library(SOURCE)
    evil = tmp_path/'evil'/good.name
    evil.parent.mkdir()
    good_content = good.read_bytes()
    evil.write_bytes(good_content)
    foreign(evil)
    def load(path):
        swap()
        return ctypes.CDLL(path)
    assert compiler.load(SOURCE, 'run', load)() == 42
    assert ctypes.CDLL(str(kernels/good.name)).run() == 666        # by its name
    other = SOURCE.replace('42', '43')
    (tmp_path/'evil').mkdir()
    shutil.rmtree(kernels)
    (tmp_path/'checked').rename(kernels)
    real = compiler.run
    def run(*args, **kwargs):
        if kwargs.get('folder'): swap()
        return real(*args, **kwargs)
    monkeypatch.setattr(compiler, 'run', run)
    compiler.library(other)
    assert len(os.listdir(tmp_path/'checked')) == 2 and os.listdir(kernels) == []


def test_a_triton_kernel_needs_no_file(kernels):
    "What Triton reads is the text itself, so nothing can be cut or exchanged."
    pytest.importorskip('triton', reason='Triton is not installed')
    code = '''
import warnings, torch
from optimizers_explained import optim
from optimizers_explained.speed import compiler, dispatch
warnings.simplefilter('error')
dispatch.BACKENDS['cpu'] = compiler.TritonKernel
p = torch.ones(3, requires_grad=True)
p.grad = torch.ones(3)
opt = optim.SGD([p], lr=0.5, fused=True)
opt.step()
print(p.tolist(), any('phase0' in str(k) for k in compiler.KERNELS))
'''
    kernels.touch()                                                # there is no folder
    out = python(code, TRITON_INTERPRET='1', CXX='/no/such')
    assert out.stdout == "[0.5, 0.5, 0.5] True\n", out.stderr[-2000:]


# --- forked children
FORK = '''
import hashlib, os, time, warnings, torch
from optimizers_explained import optim
from optimizers_explained.speed import compiler
warnings.simplefilter('error')                       # all steps have kernels
torch.set_num_threads(2)
def stepped(name, sizes):
    ps = [torch.linspace(1, 2, n).requires_grad_() for n in sizes]
    for p in ps: p.grad = torch.ones_like(p)
    opt = getattr(optim, name)(ps, lr=0.01, fused=True)
    for _ in range(2): opt.step()
    assert compiler.KERNELS
    return opt, ps
def bits(ps):
    content = b''.join(p.detach().numpy().tobytes() for p in ps)
    return hashlib.sha256(content).hexdigest()
def waited(pid, seconds=30):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done: return status
        time.sleep(0.01)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    return 'hangs'
def child(opt, ps, depth=1):
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        if depth > 1: os._exit(0 if child(opt, ps, depth - 1)[0] == 0 else 1)
        # one chunk: a plain loop anyhow
        compiler.FORKED = [p.numel() for p in ps] != [3]
        opt.step()
        os.write(write, bits(ps).encode())
        os._exit(0)
    os.close(write)
    status = waited(pid)
    return status, os.read(read, 64).decode()
for name in 'SGD', 'LAMB':
    stepped(name, [70_000]*4)                       # OpenMP has its threads
    for sizes in [3], [3]*40, [300_000], [700_000] + [30]*40, [0, 5]:
        opt, ps = stepped(name, sizes)
        before = bits(ps)
        status, there = child(opt, ps)
        assert bits(ps) == before
        opt.step()
        print(name, status, there == bits(ps) != before)
    print(name, 'grandchild', child(opt, ps, depth=2)[0])
'''

def test_forked_children():
    "Each steps, on one thread, with the bits that its parent has with two."
    out = python(FORK, OMP_NUM_THREADS='2')
    want = [[f'{name} 0 True']*5 + [f'{name} grandchild 0'] for name in ('SGD', 'LAMB')]
    assert out.stdout.splitlines() == sum(want, []), out.stdout + out.stderr


WORKERS = '''
import multiprocessing, torch
from torch.utils.data import DataLoader, Dataset
from optimizers_explained import optim
from optimizers_explained.speed import compiler
torch.set_num_threads(2)
ps = [torch.ones(70_000, requires_grad=True) for _ in range(4)]
for p in ps: p.grad = torch.ones_like(p)
opt = optim.LAMB(ps, lr=0.01, fused=True)
for _ in range(2): opt.step()
class Data(Dataset):
    def __len__(self): return 2
    def __getitem__(self, i):
        torch.set_num_threads(2)
        opt.step()
        return compiler.threads()
way = dict(num_workers=2, multiprocessing_context='fork', timeout=60)
print([int(n) for n in DataLoader(Data(), **way)])
with multiprocessing.get_context('fork').Pool(1) as pool:
    print(pool.apply_async(opt.step).get(60), compiler.threads())
'''

def test_workers():
    "Those of a DataLoader and of a pool; the parent keeps its threads."
    out = python(WORKERS, OMP_NUM_THREADS='2')
    assert out.stdout.splitlines() == ['[1, 1]', 'None 2'], out.stderr[-2000:]


# ---- what is asked of a kernel before it runs

def recorded(*steps):
    hypers = dict(weight_decay=0.1, trust_coeff=0.1, eps=1e-8)
    known = {lars: hypers, sgd: dict(lr=0.1)}
    return record([(f, known[f]) for f in steps], torch.ones(2), [], {})

@pytest.mark.parametrize('kind', [compiler.CppKernel, compiler.TritonKernel])
def test_a_kernel_counts_its_sums(kind, monkeypatch):
    "A sharded tensor runs in a kernel only if there are none: a list would be true."
    monkeypatch.setattr(compiler, 'load_triton', lambda source, n: [None]*n)
    assert kind(recorded(sgd), torch.float32).n_sums == 0
    assert kind(recorded(lars, sgd), torch.float32).n_sums == 2
