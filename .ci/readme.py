"""README.md is nbs/index.ipynb as Markdown: `readme.py` writes it, `readme.py --check` exits 1 when they differ.

`nbdev-readme` does the same through Quarto, which is not installed everywhere. The rules here are nbdev's: `hide` drops a cell,
`echo: false` its source, `output: false` its outputs; what an `output: asis` cell prints is Markdown; links to notebooks become
links to the documentation site."""
import base64, re, sys
from pathlib import Path
from urllib.parse import urlsplit

from fastcore.nbio import read_nb
from nbdev.config import get_config, nbpath2html

ROOT = Path(__file__).resolve().parents[1]
HEAD = '<!-- Generated from nbs/{nb} by .ci/readme.py: edit the notebook, not this file. -->\n\n'
IMAGES = '.png', '.svg', '.jpg', '.gif'
LINK = re.compile(r'(\]\()([^)\s]+)')
FENCE = re.compile(r'(^(?P<mark>```+|~~~+).*?^(?P=mark)[ \t]*$)', re.M | re.S)

def body(cell):
    "The source of a cell without its directive lines"
    return re.sub(r'\A(\s*#\|.*\n?)+', '', cell.source).strip()

def is_off(cell, name): return cell.directive(name, '').lower() == 'false'
def is_hidden(cell): return cell.has_directive('hide') or is_off(cell, 'include')

def fenced(text, lang=''): return f'```{lang}\n{text.rstrip()}\n```'

def joined(o): return o if isinstance(o, str) else ''.join(o)

def absolute(target, cfg):
    "The address of a link on a page of `nbs`, seen from anywhere: notebooks on the site, other files in the repository"
    url = urlsplit(target)
    if url.scheme or url.netloc or not url.path: return target
    tail = f'#{url.fragment}' if url.fragment else ''
    if url.path.endswith('.ipynb'): return f'{cfg.doc_url.rstrip("/")}/{nbpath2html(url.path)}{tail}'
    path = (cfg.nbs_path/url.path).resolve().relative_to(cfg.config_path.resolve())
    view = 'raw' if path.suffix in IMAGES else 'blob'
    return f'{cfg.git_url}/{view}/{cfg.branch}/{path.as_posix()}{tail}'

def relink(text, cfg):
    "Markdown with its links made absolute; fenced code is left alone"
    parts = re.split(FENCE, text)
    for i in range(0, len(parts), 3): parts[i] = LINK.sub(lambda m: m[1] + absolute(m[2], cfg), parts[i])
    return ''.join(p for i, p in enumerate(parts) if i % 3 < 2)

def picture(cell, data, cfg, files):
    "A stored picture becomes a file beside README.md, with the cell's alt text"
    name = f'README_files/{cell.id}.png'
    files[name] = base64.b64decode(joined(data))
    return f'![{cell.directive("fig-alt", "").strip(chr(34))}]({cfg.git_url}/raw/{cfg.branch}/{name})'

def output(cell, out, cfg, files):
    "One output as Markdown: the richest form GitHub can show"
    data = out.get('data', {})
    if 'text/markdown' in data: return relink(joined(data['text/markdown']), cfg).strip()
    if 'image/png' in data: return picture(cell, data['image/png'], cfg, files)
    text = joined(out.get('text', data.get('text/plain', '')))
    if cell.directive('output') == 'asis': return relink(text, cfg).strip()
    return fenced(text) if text.strip() else ''

def parts(cell, cfg, files):
    "What one cell adds to the README"
    if is_hidden(cell) or cell.cell_type not in ('markdown', 'code'): return
    if cell.cell_type == 'markdown': yield relink(body(cell), cfg)
    elif body(cell) and not is_off(cell, 'echo'): yield fenced(body(cell), 'python')
    if not is_off(cell, 'output'):
        for out in cell.get('outputs', []): yield output(cell, out, cfg, files)

def readme(root=ROOT):
    "All files of the README: `{name: bytes}`"
    cfg, files = get_config(root), {}
    cells = read_nb(cfg.nbs_path/cfg.readme_nb).cells
    text = '\n\n'.join(p for c in cells for p in parts(c, cfg, files) if p)
    return {'README.md': (HEAD.format(nb=cfg.readme_nb) + text + '\n').encode(), **files}

def stale(root=ROOT):
    "Names of the README's files that differ from what the notebook says"
    return [n for n, b in readme(root).items() if not (root/n).exists() or (root/n).read_bytes() != b]

def write(root=ROOT):
    for name, b in readme(root).items():
        (root/name).parent.mkdir(exist_ok=True)
        (root/name).write_bytes(b)

if __name__ == '__main__':
    if '--check' not in sys.argv: write()
    elif names := stale(): sys.exit(f'{", ".join(names)}: not what nbs/index.ipynb says; run `python .ci/readme.py`')
