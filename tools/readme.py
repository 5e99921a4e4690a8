"Write README.md from nbs/index.ipynb; with --check, only say whether it is current."
import posixpath, re, sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

root = Path(__file__).resolve().parent.parent
directive = re.compile(r'^#\| *(\w+):? *(.*)\n?', re.M)
relative_link = re.compile(r'(\]\()(?![a-z]+:|#|/)([^)\s]+)')


def visible(notebook):
    "Yield the cells that a reader sees, without nbdev's directives."
    for cell in notebook.cells:
        flags = dict(directive.findall(cell.source)) if cell.cell_type == 'code' else {}
        if cell.cell_type == 'raw' or 'hide' in flags: continue
        if cell.cell_type == 'code':
            cell.source = directive.sub('', cell.source)
            cell.metadata['transient'] = {'remove_source': flags.get('echo') == 'false'}
            if flags.get('output') == 'false': cell.outputs = []
        yield cell


def render():
    "The files that make up the README: path -> bytes."
    notebook = nbformat.read(root / 'nbs/index.ipynb', 4)
    notebook.metadata['language_info'] = {'name': 'python'}
    notebook.cells = list(visible(notebook))
    names = {'output_files_dir': 'index_files', 'unique_key': 'index'}
    text, resources = MarkdownExporter().from_notebook_node(notebook, names)
    text = relative_link.sub(lambda m: m[1] + posixpath.normpath(f'nbs/{m[2]}'), text)
    text = re.sub(r'\n(?: *\n)+', '\n\n', text).strip() + '\n'
    figures = {root / 'nbs' / name: data for name, data in resources['outputs'].items()}
    return {root / 'README.md': text.encode(), **figures}


if sys.argv[1:] not in ([], ['--check']): sys.exit(f'found {" ".join(sys.argv[1:])}, expected nothing or --check: {__doc__}')
files = render()
if '--check' in sys.argv[1:]:
    for path, data in files.items():
        if path.exists() and path.read_bytes() == data: continue
        sys.exit(f'{path.relative_to(root)} is not what nbs/index.ipynb says; run `python tools/readme.py`')
else:
    for path, data in files.items():
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
