"""Import every module of the installed wheel. Fails where one of the optional libraries
can be imported too: only without them does the check mean something."""
import importlib, pkgutil, sys, time
from importlib.util import find_spec
from pathlib import Path

OPTIONAL = ['timm', 'torchvision', 'matplotlib', 'sklearn', 'fastprogress', 'fastai',
            'optimi', 'nbdev', 'IPython', 'pytest']

def timed(name):
    start = time.perf_counter()
    module = importlib.import_module(name)
    return module, time.perf_counter() - start

present = [name for name in OPTIONAL if find_spec(name)]
if present: sys.exit(f'not a bare environment: {", ".join(present)} can be imported')
_, torch_took = timed('torch')
package, package_took = timed('optimizers_explained')
where = Path(package.__path__[0])
if where.parent.name != 'site-packages':
    sys.exit(f'imported from {where}, not from the wheel')
took = {}
prefix = f'{package.__name__}.'
for module in pkgutil.walk_packages(package.__path__, prefix):
    name = module.name.removeprefix(prefix)
    _, took[name] = timed(module.name)
if len(took) < 2: sys.exit(f'no modules in {where}')
if not (where/'py.typed').is_file():
    sys.exit('type checkers would not read the annotations: py.typed is missing')
total = package_took + sum(took.values())
print(f'{package.__name__} {package.__version__} imports in {total:.2f}s '
      f'after torch ({torch_took:.2f}s):',
      ', '.join(f'{name} {seconds:.3f}s' for name, seconds in took.items()))
