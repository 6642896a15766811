import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

def load(name):
    "The script `.ci/NAME.py` as a module"
    path = ROOT/'.ci'/f'{name}.py'
    spec = importlib.util.spec_from_file_location(f'ci_{name}', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

def stored_output(out):
    "An output of a code cell: a text was printed, a dictionary was displayed"
    if isinstance(out, str): return dict(output_type='stream', name='stdout', text=out)
    return dict(output_type='display_data', metadata={}, data=out)

def stored_cell(number, cell):
    "A text is Markdown, `{'raw': text}` raw, `(source, *outputs)` code"
    shared = dict(id=f'c{number}', metadata={})
    if isinstance(cell, str): return dict(shared, cell_type='markdown', source=cell)
    if isinstance(cell, dict): return dict(shared, cell_type='raw', source=cell['raw'])
    source, *outputs = cell
    return dict(shared, cell_type='code', source=source, execution_count=None,
                outputs=[stored_output(out) for out in outputs])

def notebook(path, *cells):
    "Write a notebook of cells, each as `stored_cell` takes it"
    kernel = dict(display_name='python3', language='python', name='python3')
    nb = dict(cells=[stored_cell(i, cell) for i, cell in enumerate(cells)],
              metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5)
    path.write_text(json.dumps(nb))
    return path

@pytest.fixture(scope='session')
def root(): return ROOT
@pytest.fixture(scope='session')
def site(): return load('site')
@pytest.fixture(scope='session')
def readme(): return load('readme')
