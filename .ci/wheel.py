"""Import every module of the installed wheel. Fails where one of the optional libraries can be imported too:
only without them does the check mean something."""
import importlib, pkgutil, sys, time
from importlib.util import find_spec
from pathlib import Path

OPTIONAL = 'timm torchvision matplotlib sklearn fastprogress fastai optimi nbdev IPython pytest'.split()

def timed(name):
    start = time.perf_counter()
    module = importlib.import_module(name)
    return module, time.perf_counter() - start

if present := [o for o in OPTIONAL if find_spec(o)]: sys.exit(f'not a bare environment: {", ".join(present)} can be imported')
_, t_torch = timed('torch')
package, t_package = timed('optimizers_explained')
where = Path(package.__path__[0])
if where.parent.name != 'site-packages': sys.exit(f'imported from {where}, not from the wheel')
times = {m.name: timed(f'{package.__name__}.{m.name}')[1] for m in pkgutil.iter_modules(package.__path__)}
if len(times) < 2: sys.exit(f'no modules in {where}')
if not (where/'py.typed').is_file(): sys.exit('type checkers would not read the annotations: py.typed is missing')
if not sys.modules['optimizers_explained.bench'].stored_run()['rows']: sys.exit('the stored benchmark is empty')
print(f'{package.__name__} {package.__version__} imports in {t_package + sum(times.values()):.2f}s after torch ({t_torch:.2f}s):',
      ', '.join(f'{n} {t:.3f}s' for n, t in times.items()))
