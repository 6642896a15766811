"""Each packaging fact stands in one place and reaches the installed package; modules
are light to import and fully documented."""
import dataclasses
import importlib
import inspect
import json
import os
import pkgutil
import re
import stat
import subprocess
import sys
from configparser import ConfigParser
from importlib.metadata import distribution, entry_points

import pytest
import yaml
from fastcore.docments import docments
from fastcore.nbio import read_nb
from nbdev.config import get_config
from packaging.requirements import Requirement

import optimizers_explained as pkg
from optimizers_explained.contract import ROWS

DOORS = {'rosetta', 'wrapper'}      # names that lead to another module

def names_of_modules():
    "Modules that pages export, and packages of them, by their names below the package"
    modules, packages = [], []
    for found in pkgutil.walk_packages(pkg.__path__, f'{pkg.__name__}.'):
        name = found.name.removeprefix(f'{pkg.__name__}.')
        if name[0] == '_' or name in DOORS: continue
        if found.ispkg: packages.append(name)
        else: modules.append(name)
    return sorted(modules), sorted(packages)

MODULES, PACKAGES = names_of_modules()
GENERATED = re.compile(
    r'nbs/(nbdev\.yml|llms\.txt)|README\.md|optimizers_explained/.*\.py')
OPTIONAL = ['timm', 'torchvision', 'matplotlib', 'sklearn', 'fastprogress', 'fastai',
            'optimi', 'heavyball', 'pytorch_optimizer', 'nbdev', 'IPython']

def module(name): return importlib.import_module(f'{pkg.__name__}.{name}')

# ---- one place for each fact

def written_text(path):
    "A file as people wrote it: of a notebook, the sources without the outputs"
    if path.suffix == '.ipynb': return '\n'.join(c.source for c in read_nb(path).cells)
    return path.read_text(encoding='utf-8', errors='ignore')

def naming(owner, root):
    "Files that people wrote and that name the owner"
    command = ['git', 'ls-files', '-co', '--exclude-standard']
    found = []
    for name in subprocess.check_output(command, cwd=root, text=True).splitlines():
        if GENERATED.fullmatch(name) or not (root/name).is_file(): continue
        if owner in written_text(root/name): found.append(name)
    return found

def test_the_owner_is_named_once(root):
    owner = get_config(root).user
    assert owner and naming(owner, root) == ['pyproject.toml']
    settings = (root/'pyproject.toml').read_text()
    urls = re.search(r'^\[project\.urls\]\n(.*?)(?=^\[)', settings, re.M | re.S)[0]
    assert owner not in settings.replace(urls, '')

def test_a_second_owner_would_be_found(tmp_path):
    subprocess.check_call(['git', 'init', '-q'], cwd=tmp_path)
    source = ['See https://github.com/someone/lib']
    cell = dict(cell_type='markdown', metadata={}, source=source)
    nb = dict(cells=[cell], metadata={}, nbformat=4, nbformat_minor=5)
    (tmp_path/'a.ipynb').write_text(json.dumps(nb))
    (tmp_path/'b.yml').write_text('url: nothing here')
    assert naming('someone', tmp_path) == ['a.ipynb']

def stated_settings(root):
    cfg = ConfigParser(delimiters=['='])
    cfg.read(root/'settings.ini')
    return cfg

def test_the_version_is_written_once(root):
    assert distribution(pkg.__name__).version == pkg.__version__
    assert get_config(root).version == pkg.__version__
    assert 'version' not in stated_settings(root).defaults()
    pyproject = (root/'pyproject.toml').read_text()
    assert not re.search(r'^version\s*=\s*["\']', pyproject, re.M)
    assert 'version' not in (root/'setup.py').read_text().split('setup(')[1]

def full_lines(text): return [line for line in text.splitlines() if line.strip()]

def own(section, facts):
    "A section of settings.ini without what [DEFAULT] adds to every section"
    return {k: value for k, value in section.items() if k not in facts}

def test_settings_reach_the_metadata(root):
    facts, meta = stated_settings(root).defaults(), distribution(pkg.__name__).metadata
    licence = meta['License-Expression'] or meta['License']
    assert licence == facts['license'], 'reinstall: pip install -e .'
    assert meta['Author'] == facts['author']
    assert meta['Keywords'].split(',') == facts['keywords'].split()
    assert set(full_lines(facts['classifiers'])) <= set(meta.get_all('Classifier'))

def test_requirements_reach_the_metadata(root):
    cfg, dist = stated_settings(root), distribution(pkg.__name__)
    extras = own(cfg['extras'], cfg.defaults())
    assert set(extras) == {'notebooks', 'bench', 'test', 'dev'}
    assert set(extras) == set(dist.metadata.get_all('Provides-Extra'))
    stated = set()      # pairs of a requirement and its extra
    for line in full_lines(cfg['requirements']['runtime']):
        stated.add((str(Requirement(line)), None))
    for extra, lines in extras.items():
        for line in full_lines(lines): stated.add((str(Requirement(line)), extra))
    installed = set()
    for line in dist.requires:
        name, _, marker = line.partition(';')
        extra = re.search(r'extra == ["\'](\w+)["\']', marker)
        installed.add((str(Requirement(name)), extra[1] if extra else None))
    assert installed == stated

def test_commands_reach_the_metadata(root):
    cfg, dist = stated_settings(root), distribution(pkg.__name__)
    scripts = {}
    for entry in dist.entry_points:
        if entry.group == 'console_scripts': scripts[entry.name] = entry.value
    assert scripts == own(cfg['commands'], cfg.defaults())
    indices = [entry.value for entry in entry_points(group='nbdev')]
    assert f'{pkg.__name__}._modidx:d' in indices

def test_requires_python_agrees_with_the_workflows(root):
    tests = yaml.safe_load((root/'.github/workflows/tests.yml').read_text())
    pythons = tests['jobs']['test']['strategy']['matrix']['python']
    assert get_config(root).min_python == pythons[0]
    for python in pythons: assert isinstance(python, str)

# ---- importing

PULLED_IN = '''
import sys, importlib, json
loaded = {}
for name in NAMES:
    FIRST
    importlib.import_module(name)
    loaded[name] = sorted(set(OPTIONAL) & set(sys.modules))
print(json.dumps(loaded))
'''

def pulled_in(names, first='pass'):
    """Which optional libraries importing the modules loads, module by module, in a
    fresh process; before each the statement `first` runs"""
    code = PULLED_IN.replace('NAMES', repr(list(names))).replace('FIRST', first)
    code = code.replace('OPTIONAL', repr(OPTIONAL))
    return json.loads(subprocess.check_output([sys.executable, '-c', code], text=True))

def test_modules_import_only_torch_and_fastcore():
    names = [pkg.__name__] + [f'{pkg.__name__}.{m}' for m in MODULES]
    assert pulled_in(names) == {name: [] for name in names}

def test_a_heavy_import_would_be_found():
    assert pulled_in(['json'], 'import IPython')['json'] == ['IPython']

# ---- documentation

STEP = ['p', 'g', 'state']
STAR = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD

def public(module):
    "The functions and classes that a module exports"
    found = {}
    for name in module.__all__:
        obj = getattr(module, name)
        if inspect.isclass(obj) or inspect.isfunction(obj): found[name] = obj
    return found

def methods(cls, module):
    "The public methods of a class, as far as this module wrote them"
    found = {}
    for name, obj in vars(cls).items():
        if name[0] == '_' or not inspect.isfunction(obj): continue
        if obj.__module__ == module.__name__: found[name] = obj
    return found

def parameters(f):
    "Parameters that a caller passes by name or place, with their comments"
    if inspect.isclass(f) and not dataclasses.is_dataclass(f): f = f.__init__
    if not inspect.isfunction(f) and not inspect.isclass(f): return {}
    takes, found = inspect.signature(f).parameters, {}
    for name, comment in docments(f, returns=False).items():
        if name != 'self' and not (name in takes and takes[name].kind in STAR):
            found[name] = comment
    return found

def uncommented(f, elsewhere):
    """Parameters without a comment. A step is called by its optimizer, never by a user:
    what `p`, `g` and `state` are stands once, on the page of the core, and its
    hyperparameters are commented in the optimizers that pass them on (`elsewhere`).
    Likewise the rows of the contract, which `contract` calls."""
    said = set()
    if inspect.isfunction(f) and list(inspect.signature(f).parameters)[:3] == STEP:
        said = {*STEP, *elsewhere}
    elif f in ROWS.values(): said = set(elsewhere)
    found = []
    for name, comment in parameters(f).items():
        if not comment and name not in said: found.append(name)
    return found

def commented(modules):
    "Names of parameters that have a comment somewhere"
    found = set()
    for module in modules:
        for f in public(module).values():
            for name, comment in parameters(f).items():
                if comment: found.add(name)
    return found

def undocumented(module, elsewhere=()):
    """Public functions, classes and methods of a module without a docstring, and
    parameters of the first two without a comment"""
    for name, obj in public(module).items():
        if not (obj.__doc__ or '').strip(): yield f'{name}: no docstring'
        for parameter in uncommented(obj, elsewhere):
            yield f'{name}: {parameter} has no comment'
        if not inspect.isclass(obj): continue
        for method, f in methods(obj, module).items():
            if not (f.__doc__ or '').strip(): yield f'{name}.{method}: no docstring'

@pytest.mark.parametrize('name', MODULES)
def test_everything_public_is_documented(name):
    elsewhere = commented(module(other) for other in MODULES)
    assert list(undocumented(module(name), elsewhere)) == []

@pytest.mark.parametrize('name', MODULES)
def test_modules_explain_themselves(name):
    doc = module(name).__doc__ or ''
    assert len(doc.strip().splitlines()) > 3, 'needs exported prose'
    assert '\nDocs: ' in doc, 'needs an exported example'
    listed = f'`{pkg.__name__}.{name}`' in pkg.__doc__
    assert listed, 'the package docstring lists every module'

BARE_MODULE = '''
__all__ = ["f", "C", "step"]
def f(
    a, # said
    b,
): "Doc"
class C:
    "Doc"
    def __init__(self, n, **kw): pass
    def m(self): pass
def step(p, g, state, *, lr, mom): "Doc"
'''

@pytest.mark.parametrize('name', PACKAGES)
def test_a_package_names_its_modules(name):
    doc = module(name).__doc__
    own = [m for m in MODULES if m.startswith(f'{name}.')]
    assert own and [m for m in own if f'`{pkg.__name__}.{m}`' not in doc] == []

CORE = {'core', 'checks', 'checkpoint'}

def loaded_by(name):
    "The modules of this package that a fresh process has after importing one"
    code = (f'import sys, json, {pkg.__name__}.{name}\n'
            'print(json.dumps(list(sys.modules)))')
    found = json.loads(subprocess.check_output([sys.executable, '-c', code], text=True))
    prefix = f'{pkg.__name__}.'
    return {m.removeprefix(prefix) for m in found if m.startswith(prefix)}

def test_the_core_loads_no_compiler():
    assert loaded_by('core') == CORE
    assert loaded_by('optim') == {*CORE, 'optim', 'steps'}
    assert loaded_by('speed.dispatch') > {'speed.compiler', 'speed.lists'}

def test_names_that_have_moved_are_found_where_they_were():
    from optimizers_explained import core, steps
    from optimizers_explained.callback.wrapper import OptimWrapper
    from optimizers_explained.wrapper import OptimWrapper as by_the_door
    assert by_the_door is OptimWrapper
    assert all(getattr(core, name) is getattr(steps, name) for name in steps.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'sdg'"): core.sdg

def test_a_missing_comment_would_be_found(tmp_path, monkeypatch):
    (tmp_path/'bare_demo.py').write_text(BARE_MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    found = list(undocumented(importlib.import_module('bare_demo'), {'lr'}))
    assert found == ['f: b has no comment', 'C: n has no comment',
                     'C.m: no docstring', 'step: mom has no comment']

# ---- workflows and commands

def workflows(root):
    files = sorted((root/'.github/workflows').glob('*.yml'))
    return {path.stem: yaml.safe_load(path.read_text()) for path in files}

def test_workflows_have_least_permissions(root):
    writes = {}
    for name, flow in workflows(root).items():
        assert flow['permissions'] == {'contents': 'read'}, name
        for label, job in flow['jobs'].items():
            limited = 'uses' in job or job['timeout-minutes'] <= 45
            assert limited, f'{name}: {label} has no time limit'
            if 'permissions' in job: writes[f'{name}/{label}'] = job['permissions']
    assert writes == {'docs/publish': {'pages': 'write', 'id-token': 'write'},
                      'release/publish': {'id-token': 'write'}}

def test_workflows_run_what_they_should(root):
    flows = workflows(root)
    assert set(flows) == {'tests', 'docs', 'release'}
    # YAML reads the key `on` as true
    on = {name: flow[True] for name, flow in flows.items()}
    assert set(on['tests']) == {'push', 'pull_request', 'schedule', 'workflow_call'}
    assert on['release'] == {'push': {'tags': ['v*']}}
    assert 'pull_request' in on['docs']
    assert flows['tests']['jobs']['test']['steps'][-1]['run'] == 'bash .ci/run'
    released_after = flows['release']['jobs']['tests']['uses']
    assert released_after == './.github/workflows/tests.yml'
    assert 'refs/heads/main' in flows['docs']['jobs']['publish']['if']

def test_the_oldest_torch_is_read_from_the_settings(root):
    steps = workflows(root)['tests']['jobs']['test']['steps']
    step = next(step for step in steps if 'oldest' in step.get('if', ''))
    pattern = re.search(r"sed -n '[^']*' settings.ini", step['run'])[0]
    oldest = subprocess.check_output(pattern, shell=True, cwd=root, text=True)
    assert re.fullmatch(r'torch==[\d.]+\n', oldest)

def test_two_lines_of_the_readme_do_everything(root):
    tests, jobs = [], []
    for line in (root/'README.md').read_text().splitlines():
        if not line.startswith('pip install '): continue
        if 'pytest' in line and 'nbdev-test' in line: tests.append(line)
        if 'oe-race' in line: jobs.append(line)
    assert len(tests) == 1, 'one line installs and tests; .ci/run runs it'
    assert len(jobs) == 1, 'one line installs and runs the job'

def test_the_ci_script_can_run(root):
    assert os.stat(root/'.ci/run').st_mode & stat.S_IXUSR
    subprocess.check_call(['bash', '-n', root/'.ci/run'])
