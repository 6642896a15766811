"""README.md is nbs/index.ipynb as Markdown: `readme.py` writes it, and
`readme.py --check` exits 1 when they differ.

`nbdev-readme` does the same through Quarto, which is not installed everywhere. The
rules here are nbdev's: `hide` drops a cell, `echo: false` its source, `output: false`
its outputs; what an `output: asis` cell prints is Markdown; links to notebooks become
links to the documentation site."""
import base64, re, sys
from pathlib import Path
from urllib.parse import urlsplit

from fastcore.nbio import read_nb
from nbdev.config import get_config, nbpath2html

ROOT = Path(__file__).resolve().parents[1]
HEAD = ('<!-- Generated from nbs/{nb} by .ci/readme.py: '
        'edit the notebook, not this file. -->\n\n')
IMAGES = '.png', '.svg', '.jpg', '.gif'
LINK = re.compile(r'(\]\()([^)\s]+)')
FENCE = re.compile(r'^(```+|~~~+).*?^\1[ \t]*$', re.M | re.S)

def body(cell):
    "The source of a cell without its directive lines"
    return re.sub(r'\A(\s*#\|.*\n?)+', '', cell.source).strip()

def is_off(cell, name): return cell.directive(name, '').lower() == 'false'
def is_hidden(cell): return cell.has_directive('hide') or is_off(cell, 'include')

def fenced(text, lang=''): return f'```{lang}\n{text.rstrip()}\n```'

def joined(text): return text if isinstance(text, str) else ''.join(text)

def absolute(target, cfg):
    """The address of a link on a page of `nbs`, seen from anywhere: notebooks on the
    site, other files in the repository"""
    url = urlsplit(target)
    if url.scheme or url.netloc or not url.path: return target
    tail = f'#{url.fragment}' if url.fragment else ''
    if url.path.endswith('.ipynb'):
        return f'{cfg.doc_url.rstrip("/")}/{nbpath2html(url.path)}{tail}'
    path = (cfg.nbs_path/url.path).resolve().relative_to(cfg.config_path.resolve())
    view = 'raw' if path.suffix in IMAGES else 'blob'
    return f'{cfg.git_url}/{view}/{cfg.branch}/{path.as_posix()}{tail}'

def relink(text, cfg):
    "Markdown with its links made absolute; fenced code is left alone"
    def absolute_link(match): return match[1] + absolute(match[2], cfg)
    pieces, end = [], 0
    for fence in FENCE.finditer(text):
        pieces.append(LINK.sub(absolute_link, text[end:fence.start()]))
        pieces.append(fence[0])
        end = fence.end()
    pieces.append(LINK.sub(absolute_link, text[end:]))
    return ''.join(pieces)

def picture(cell, data, cfg, files):
    "A stored picture becomes a file beside README.md, with the cell's alt text"
    name = f'README_files/{cell.id}.png'
    files[name] = base64.b64decode(joined(data))
    alt = cell.directive('fig-alt', '').strip('"')
    return f'![{alt}]({cfg.git_url}/raw/{cfg.branch}/{name})'

def output(cell, out, cfg, files):
    "One output as Markdown: the richest form GitHub can show"
    data = out.get('data', {})
    if 'text/markdown' in data:
        return relink(joined(data['text/markdown']), cfg).strip()
    if 'image/png' in data: return picture(cell, data['image/png'], cfg, files)
    text = joined(out.get('text', data.get('text/plain', '')))
    if cell.directive('output') == 'asis': return relink(text, cfg).strip()
    return fenced(text) if text.strip() else ''

def parts(cell, cfg, files):
    "What one cell adds to the README; pictures are added to `files`"
    if is_hidden(cell): return []
    if cell.cell_type == 'markdown': return [relink(body(cell), cfg)]
    if cell.cell_type != 'code': return []
    source, found = body(cell), []
    if source and not is_off(cell, 'echo'): found.append(fenced(source, 'python'))
    if not is_off(cell, 'output'):
        for out in cell.get('outputs', []): found.append(output(cell, out, cfg, files))
    return [part for part in found if part]

def readme(root=ROOT):
    "All files of the README: `{name: bytes}`"
    cfg, pictures = get_config(root), {}
    found = []
    for cell in read_nb(cfg.nbs_path/cfg.readme_nb).cells:
        found.extend(parts(cell, cfg, pictures))
    text = HEAD.format(nb=cfg.readme_nb) + '\n\n'.join(found) + '\n'
    return {'README.md': text.encode(), **pictures}

def stale(root=ROOT):
    "Names of the README's files that differ from what the notebook says"
    names = []
    for name, content in readme(root).items():
        path = root/name
        if not path.exists() or path.read_bytes() != content: names.append(name)
    return names

def write(root=ROOT):
    for name, content in readme(root).items():
        (root/name).parent.mkdir(exist_ok=True)
        (root/name).write_bytes(content)

def check():
    if names := stale():
        sys.exit(f'{", ".join(names)}: not what nbs/index.ipynb says; '
                 'run `python .ci/readme.py`')

if __name__ == '__main__':
    if '--check' in sys.argv: check()
    else: write()
