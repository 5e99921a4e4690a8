"""Build the doc site into _docs, without a network: python tools/docs.py

nbdev processes the notebooks (signatures, cross-links, hidden cells), and smalldocs renders what it wrote. Any warning and
any of the faults that faults.py looks for end the build with exit code 1. Three pages are made here: every public
function and class, CONTRIBUTING.md and CHANGELOG.md."""
import inspect
import json
import os
import re
import shutil
import sys
from html.parser import HTMLParser
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import nbformat
import yaml

from faults import Page, faults

ROOT = Path(__file__).resolve().parent.parent
STAGE, SITE = ROOT / '_stage', ROOT / '_docs'
FILES = {  # of the repository -> what its page is about
    'CONTRIBUTING': 'How the library is built, why it has this form, and how to change it.',
    'CHANGELOG': 'What each version brought.'}
# left out of types in signatures
PACKAGES = ('torch', 'collections', 'pathlib', 'numpy', 'albumentations', 'typing', 'torchinfo', 'eva_session9')
NOT_OF_SMALLDOCS = ('output-file', 'jupyter', 'execute')  # keys that nbdev writes into a page's head


def number(name):
    "08a_gradcam.cam.ipynb -> gradcam.cam.ipynb, as nbdev's own links have it."
    return re.sub(r'^\d+[a-z]?_', '', name)


def processed():
    "The folder with the notebooks as nbdev shows them."
    os.chdir(ROOT)
    from nbdev.doclinks import _build_modidx
    from nbdev.quarto import refresh_quarto_yml
    from nbdev.serve import proc_nbs
    refresh_quarto_yml()
    _build_modidx()
    return proc_nbs(n_workers=2, force=True)


def relinked(text, home, source):
    "Links to the published site, to notebooks and to files of the repository, and names of classes, as they are to be inside the site."
    text = re.sub(r'\[\[(`[^`]+`)\]\([^)]*\)\]\(', r'[\1](', text)  # a link in the text of a link: the outer one was written
    text = text.replace(home, '').replace('.html.md', '.html').replace('__main__.', '')
    text = re.sub(r'\]\(([\w.]+\.ipynb)(#[\w-]+)?\)', lambda m: f'](./{number(m[1])}{m[2] or ""})', text)
    text = re.sub(rf"\]\(\.\./({'|'.join(FILES)})\.md\)", lambda m: f'](./{m[1].lower()}.md)', text)
    return re.sub(r'\]\(\.\./([^)]*)\)', lambda m: f']({source}/{m[1]})', text)


def described(cell):
    "A code cell whose picture has a text: its own `fig-alt`, or the title that the figure gives as its text form."
    for output in cell.get('outputs', []):
        data = output.get('data', {})
        title = re.match(r"Picture\((['\"])(.*)\1, \d+ axes\)", data.get('text/plain', ''))
        if 'image/png' in data and title and '#| fig-alt' not in cell.source:
            cell.source = f'#| fig-alt: {title[2]!r}\n{cell.source}'
    return cell


def in_order(cells, module):
    "The cells, with neighbouring signatures in the order of the module; nbdev shows what one cell defines in reverse."
    place = {name: i for i, name in enumerate(getattr(module, '__all__', []))}
    signatures = [re.search(r'^show_doc\((\w+)', cell.source, re.M) for cell in cells]
    ordered, run = list(cells), []
    for i, cell in enumerate([*cells, None]):
        if cell and signatures[i]: run.append(i)
        elif not cell or 'Exported source' not in cell.source:
            for slot, now in zip(run, sorted(run, key=lambda j: place.get(signatures[j][1], -1))): ordered[slot] = cells[now]
            run = []
    return ordered


def shortened(signature):
    "The signature with the last names of classes, as a reader writes them."
    signature = re.sub(rf"\b(?:{'|'.join(PACKAGES)})(?:\.[a-z_]\w*)*\.(?=[A-Z])", '', signature)
    return signature.replace(')->', ') -> ')


def as_read(text, module):
    "Signatures of properties without a call, and of classes with their base where nbdev knows no parameters."
    def of_property(signature):
        heading, kind, name, answer = signature.groups()
        if not isinstance(getattr(getattr(module, kind, None), name, None), property): return signature[0]
        return f'{heading}{kind.lower()}.{name}: {answer}  # a property'

    def of_class(signature):
        kind = getattr(module, signature[1], None)
        if not isinstance(kind, type): return signature[0]
        return f'class {signature[1]}({kind.__base__.__name__}):' if kind.__base__ is not object else f'class {signature[1]}:'
    text = re.sub(r'(### (\w+)\.(\w+)\n\n```python\n)def \3\(\)->(.*):', of_property, text)
    if '```python' in text: text = shortened(text)
    return re.sub(r'def (\w+)\(\n    \*args, \*\*kw(?:args|ds)\n\):', of_class, text)


def staged(path, home, source):
    "A processed notebook as smalldocs reads it."
    notebook = nbformat.reads(nbformat.writes(nbformat.read(path, 4)), 4)
    name = number(path.stem)
    module = import_module(f'eva_session9.{name}') if find_spec(f'eva_session9.{name}') else None
    if module: notebook.cells = in_order(notebook.cells, module)
    for cell in notebook.cells:
        if cell.cell_type == 'code': cell = described(cell)
        else: cell.source = relinked(cell.source, home, source)
        for output in cell.get('outputs', []):
            for kind, text in output.get('data', {}).items():
                if kind in ('text/html', 'text/markdown'): output.data[kind] = as_read(relinked(text, home, source), module)
    notebook.cells.append(nbformat.v4.new_markdown_cell(f'[This page as a notebook]({source}/nbs/{path.name})'))
    head = notebook.cells[0]
    if head.cell_type == 'raw':
        lines = [line for line in head.source.splitlines() if line.split(':')[0] not in NOT_OF_SMALLDOCS]
        head.source = '\n'.join(lines)
    return notebook


def page(name, title, description, text):
    "Write a page that has no notebook."
    (STAGE / f'{name}.md').write_text(f'---\ntitle: {title}\ndescription: {description}\n---\n\n{text}')


def api(modules):
    "Every public function and class with the first line of its docstring, by module."
    for name in modules:
        module = import_module(f'eva_session9.{name}')
        yield f'\n## [{name}]({name}.ipynb)\n'
        for symbol in (getattr(module, symbol) for symbol in module.__all__):
            if not inspect.isroutine(symbol) and not inspect.isclass(symbol): continue
            said = inspect.getdoc(symbol).partition('\n')[0]
            yield f'- [`{symbol.__name__}`]({name}.ipynb#{symbol.__name__.lower()}): {said}'


def made_pages(cache):
    "The pages that have no notebook, and their places in the sidebar."
    modules = [number(path.name).removesuffix('.ipynb') for path in sorted(cache.glob('[0-9]*.ipynb'))]
    page('api', 'API', 'Every public function and class of the library, by module, and what it is.', '\n'.join(api(modules)))
    for name, description in FILES.items():
        title, _, text = (ROOT / f'{name}.md').read_text().removeprefix('# ').partition('\n')
        page(name.lower(), title, description, text)
    return [{'section': 'Reference', 'contents': ['api.md']}, {'section': 'Project', 'contents': [f'{name.lower()}.md' for name in FILES]}]


def stage(cache):
    "Everything that smalldocs needs in one folder."
    shutil.rmtree(STAGE, ignore_errors=True)
    shutil.copytree(cache, STAGE, ignore=shutil.ignore_patterns('*.ipynb', '.*'))
    nbdev, quarto = (yaml.safe_load((STAGE / name).read_text()) for name in ('nbdev.yml', '_quarto.yml'))
    for options, key in ((nbdev, 'format-links'), (quarto['format'], 'commonmark')): options.pop(key, None)  # for Quarto alone
    for name, options in (('nbdev.yml', nbdev), ('_quarto.yml', quarto)): (STAGE / name).write_text(yaml.safe_dump(options))
    site = nbdev['website']
    for path in sorted(cache.glob('*.ipynb')):
        notebook = staged(path, f"{site['site-url']}/", f"{site['repo-url']}/blob/{site['repo-branch']}")
        nbformat.write(notebook, STAGE / number(path.name))
    sidebar = yaml.safe_load(re.sub(r'[\w.]+\.ipynb', lambda m: number(m[0]), (STAGE / 'sidebar.yml').read_text()))
    sidebar['website']['sidebar']['contents'] += made_pages(cache)
    (STAGE / 'sidebar.yml').write_text(yaml.safe_dump(sidebar))


def without_network():
    "Drop what the themes would fetch from elsewhere; the fonts of the reader's machine take its place."
    for path in SITE.rglob('*.css'):
        text = path.read_text()
        local = re.sub(r'@import url\([^)]*\);?|@import "[^"]*";?', '', text)
        if local != text: path.write_text(local)


class Prose(HTMLParser):
    "The words below each heading of a page, by its anchor, without code."
    code = {'pre', 'script', 'style', 'nav', 'button', 'summary'}

    def __init__(self, path):
        super().__init__()
        self.anchor, self.silent, self.words = '', 1, {}
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        self.silent += (tag in self.code) - (tag == 'main')
        if tag in ('section', 'h2', 'h3', 'h4') and dict(attrs).get('id'): self.anchor = dict(attrs)['id']

    def handle_endtag(self, tag): self.silent -= (tag in self.code) - (tag == 'main')

    def handle_data(self, data):
        if not self.silent: self.words.setdefault(self.anchor, []).extend(data.split())


def quick_search():
    "Search names and prose, not code, and without waiting for more letters: half of the text is code, and slows each answer."
    pages, index, script = {}, SITE / 'search.json', SITE / 'site_libs/smalldocs.js'
    entries = json.loads(index.read_text())
    for entry in entries:
        name, _, anchor = entry['href'].partition('#')
        if name not in pages: pages[name] = Prose(SITE / name).words
        entry['text'] = ' '.join(pages[name].get(anchor, [])) or entry['text']
    index.write_text(json.dumps(entries, ensure_ascii=False))
    script.write_text(script.read_text().replace('setTimeout(run, 120)', 'setTimeout(run, 20)'))


def nearest_anchors():
    "Lead a link to a method without a heading of its own to the heading of its class."
    anchors = {path.name: Page(path).ids for path in SITE.glob('*.html')}

    def nearest(match):
        page, method, name = match.groups()
        return match[0] if method in anchors.get(page, [method]) else f'href="{page}#{name}"'

    for path in SITE.glob('*.html'):
        text = path.read_text()
        path.write_text(re.sub(r'href="([\w.]+\.html)#((\w+)\.\w+)"', nearest, text))


def main():
    stage(processed())
    from smalldocs.site import build
    warnings = [*build(STAGE, quiet=True).warnings]
    shutil.rmtree(SITE, ignore_errors=True)
    shutil.move(STAGE / SITE.name, SITE)
    without_network()
    nearest_anchors()
    quick_search()
    problems = [*warnings, *faults(SITE)]
    for problem in problems: print(problem, file=sys.stderr)
    print(f'{len(list(SITE.glob("*.html")))} pages in {SITE.relative_to(ROOT)}, {len(problems)} problem{"s" * (len(problems) != 1)}')
    return int(bool(problems))


if __name__ == '__main__': sys.exit(main())
