"The promises that hold for the project as a whole: layers, dependencies, light notebooks, honest results."
import ast, base64, hashlib, json, os, re, subprocess, sys
from configparser import ConfigParser
from importlib.metadata import packages_distributions
from pathlib import Path
from runpy import run_path

import pytest
from nbdev.config import get_config

import eva_session9
from eva_session9.config import Config, config_from
from eva_session9.save_load import pretrained

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / 'eva_session9'
NOTEBOOKS = sorted(p for p in (ROOT / 'nbs').glob('*.ipynb') if not p.name.startswith('_'))
RESULTS = sorted((ROOT / 'results').glob('*.json'))
SOURCES = sorted(PACKAGE.rglob('*.py'))
SCRIPTS = [ROOT / 'setup.py', *(path for name in ('tests', 'benchmarks', 'tools') for path in sorted((ROOT / name).glob('*.py')))]
TREES = {path: ast.parse(path.read_text(encoding='utf-8')) for path in SOURCES}

OWNERS = {'albumentations': 'preprocessing', 'cv2': 'preprocessing', 'matplotlib': 'visual', 'ipywidgets': 'panel'}
TOP_LEVEL = set('''nbs eva_session9 settings.ini setup.py README.md pyproject.toml MANIFEST.in LICENSE CONTRIBUTING.md
    CHANGELOG.md SECURITY.md tests benchmarks results tools .ci .github .gitattributes .gitignore'''.split())
DIRECTIVES = set('''default_exp export exports exporti exportd hide echo output eval exec_doc slow cuda
    label fig-cap fig-alt warning code-fold code-summary filter_stream'''.split())
BEFORE = 'bf51e36b3a7ac3821985a17926d0559e45fe4dc70c60d09a784227808eeb31e4'  # the weights of 15 epochs of the course's recipe
COURSE = 'a10c4460b7f7aa4f38f66b6dee33bb69d4d27ac4609d5995477bcf63ac8e16d6'  # the weights of the course's recipe, which are not shipped
EARLIER = {'feacd2b6a51db8857423e5893e173a9ffde7232cec3e15416f692b83604ff427',  # the weights of the fast recipe with SGD, at commit 0c1a9ee
           'f98ad2434408dc011815c1499afd34a9b8cc321a69982bf9d2aeffe5db376698'}  # and of the one in batches of 512, at df8f190
SHORT = {'3788a5ccf1694e7fb05eeb6585b962c5edaaecf912f16072319fe2ca2b9b941e',
         '728f2cd797a3536ef610c5b9dbcb0448d22c9e853ee14e1cfbef082caa9abbfd',
         '38789f5290ec18e2bc2533f614627dcc38d2f4f5f551a2ace1ec6394bc85ffa7',
         '304e2d41816f771bd00befa387cfa9fd5d6747822989c4462bc6de910b507df3'}  # of the shorter trainings, never shipped
REGULARISED = '5f74f512a0e0270c88ee76bda7ee93348366bffd71d54084825a9f1803308f3e'  # of a variant of the fast recipe, never shipped
OTHER_WEIGHTS = {'session9.json': {COURSE}, 'networks.json': EARLIER, 'networks_short.json': SHORT,
                 'networks_regularised.json': {REGULARISED}, 'cam_study_course.json': {BEFORE}}  # BEFORE: were shipped then


def module_name(path):
    "`models.resnet` for eva_session9/models/resnet.py, `gradcam` for eva_session9/gradcam/__init__.py."
    return '.'.join(path.relative_to(PACKAGE).with_suffix('').parts).removesuffix('__init__').rstrip('.')


def imported(path):
    "The dotted names that the file imports, at the top or inside functions; relative ones made absolute."
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import): yield from (alias.name for alias in node.names)
        if not isinstance(node, ast.ImportFrom): continue
        package = path.relative_to(ROOT).parent.parts
        base = package[:len(package) - node.level + 1] if node.level else ()
        yield from ('.'.join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names)


def cells(path): return json.loads(path.read_text(encoding='utf-8'))['cells']
def code_cells(path): return [cell for cell in cells(path) if cell['cell_type'] == 'code']
def outputs(path): return [output for cell in code_cells(path) for output in cell['outputs']]
def directives(cell): return re.findall(r'^#\| *([\w-]+)', ''.join(cell['source']), re.M)


def numbering():
    "Module name -> its notebook's number, '03' or '08a', for every notebook that exports a module."
    for path in NOTEBOOKS:
        exported = re.search(r'^#\| *default_exp:? +(\S+)', ''.join(cells(path)[0]['source']), re.M)
        if exported: yield exported[1], path.name.split('_')[0]


NUMBERS = dict(numbering())


def ours(path):
    "The modules of ours that the file imports; a package counts as the highest-numbered module inside."
    for name in imported(path):
        if not name.startswith('eva_session9.'): continue
        parts = name.split('.')[1:]
        prefixes = ['.'.join(parts[:n]) for n in range(len(parts), 0, -1)]
        exact = [p for p in prefixes if p in NUMBERS]
        inside = [module for module in sorted(NUMBERS, key=NUMBERS.get) if module.startswith(parts[0] + '.')]
        yield from (exact or inside[-1:])[:1]


def settings():
    parser = ConfigParser(delimiters=['='])
    parser.read(ROOT / 'settings.ini', encoding='utf-8')
    return parser['DEFAULT']


def canonical(name): return re.sub(r'[-_.]+', '-', name).lower()


def python(code, cwd):
    "Run `code` in a fresh interpreter as a user would, and return what it prints."
    env = {k: v for k, v in os.environ.items() if k != 'NO_ALBUMENTATIONS_UPDATE'}
    done = subprocess.run([sys.executable, '-B', '-c', code], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split('\n')[:-1]


def each(paths):
    "Run the test once a file."
    return pytest.mark.parametrize('path', paths, ids=lambda path: str(path.relative_to(ROOT)))


# Layers and dependencies

@each([path for path in SOURCES if module_name(path) in NUMBERS])
def test_imports_go_down_the_numbering(path):
    me = module_name(path)
    for module in ours(path):
        assert NUMBERS[module] < NUMBERS[me], f'{me} ({NUMBERS[me]}) imports {module} ({NUMBERS[module]})'


@each([path for path in SOURCES if path.parent.name in ('models', 'gradcam')])
def test_networks_and_heatmaps_stand_alone(path):
    assert {module.split('.')[0] for module in ours(path)} <= {path.parent.name}
    assert {name.split('.')[0] for name in imported(path)} - sys.stdlib_module_names <= {'torch', 'eva_session9'}


def test_every_module_has_its_notebook():
    by_hand = {'', '_modidx', 'models', 'gradcam'}
    assert {module_name(path) for path in SOURCES} - by_hand == set(NUMBERS)


@each(SOURCES)
def test_heavy_dependencies_have_one_owner(path):
    for name in imported(path):
        owner = OWNERS.get(name.split('.')[0], module_name(path))
        assert owner == module_name(path), f'only {owner} may import {name}'


@each([path for path in [*SOURCES, *SCRIPTS] if path.name != '_modidx.py'])
def test_no_line_of_code_is_too_long_to_be_read(path):
    assert max(map(len, path.read_text(encoding='utf-8').splitlines()), default=0) <= 140


def test_the_readme_shown_elsewhere_links_to_addresses(monkeypatch):
    found = {}
    monkeypatch.setattr('setuptools.setup', found.update)
    monkeypatch.setattr('setuptools.find_packages', lambda include: include)
    run_path(ROOT / 'setup.py')
    links = re.findall(r'\]\(([^)]+)\)', found['long_description'])
    assert links and all(link.startswith(('https://', '#')) for link in links)


def test_every_import_is_a_declared_requirement():
    wanted = f"{settings()['requirements']} {settings()['app_requirements']}".split()
    declared = {canonical(re.match(r'[\w.-]+', requirement)[0]) for requirement in wanted}
    distributions = packages_distributions()
    for path in SOURCES:
        for top in {name.split('.')[0] for name in imported(path)} - {'eva_session9'} - sys.stdlib_module_names:
            providers = {canonical(name) for name in distributions.get(top, [top])}
            assert providers & declared, f'{module_name(path)} imports {top}, which settings.ini does not require'


def test_gradcam_loads_no_heavy_dependency(tmp_path):
    loaded = python('import eva_session9.gradcam, sys; print(*sys.modules, sep="\\n")', tmp_path)
    assert 'torch' in loaded and not set(OWNERS) & set(loaded)


IMPORT_WATCH = '''
import os, sys, torch
seen, quiet = [], (os.devnull, 'matplotlib')  # matplotlib looks after a font cache of its own

def watch(event, args):
    writes = event == 'open' and (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    changes = writes or event in ('os.mkdir', 'os.rename', 'os.remove', 'os.rmdir')
    allowed = not changes or any(part in str(args[0]) for part in quiet)
    if event.startswith('socket.') or not allowed: seen.append((event, args[0]))

def choosing(name):
    def is_available(): seen.append(('device', name)); return False
    return is_available

torch.cuda.is_available, torch.accelerator.is_available = choosing('cuda'), choosing('accelerator')
torch.backends.mps.is_available = choosing('mps')
sys.addaudithook(watch)
for name in MODULES: __import__(name)
print(*seen, sep='\\n', end='\\n' if seen else '')
'''

def test_import_opens_no_socket_picks_no_device_and_writes_no_file(tmp_path):
    modules = ['eva_session9', *(f'eva_session9.{module}' for module in NUMBERS)]
    assert python(IMPORT_WATCH.replace('MODULES', repr(modules)), tmp_path) == []


# Exported code

def unsafe(tree):
    "Yield what must not stand in exported code, with its line."
    for node in ast.walk(tree):
        names = [alias.name for alias in getattr(node, 'names', []) if isinstance(alias, ast.alias)]
        module = getattr(node, 'module', None)
        if 'pickle' in names or module == 'pickle' and not {*names} <= {'PicklingError', 'UnpicklingError'}: yield node.lineno, 'pickle'
        if isinstance(node, ast.ExceptHandler):
            kinds = {name.id for name in ast.walk(node.type) if isinstance(name, ast.Name)} if node.type else set()
            idle = all(isinstance(line, ast.Pass) or isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant)
                       for line in node.body)
            if node.type is None or idle and kinds & {'Exception', 'BaseException'}: yield node.lineno, 'bare or silent except'
        if not isinstance(node, ast.Call): continue
        called = ast.unparse(node.func)
        given = {k.arg: ast.unparse(k.value) for k in node.keywords}
        if called in ('eval', 'exec', 'builtins.eval', 'builtins.exec'): yield node.lineno, called
        loads = called.rpartition('.')[2] == 'load' and called not in ('json.load', 'np.load')
        if loads and given.get('weights_only') != 'True': yield node.lineno, 'unrestricted load'
        if given.get('weights_only') == 'False' or given.get('allow_pickle') == 'True': yield node.lineno, 'unpickling'


@pytest.mark.parametrize('code', [
    'import pickle', 'from pickle import loads', 'eval(text)', 'builtins.exec(text)', 'torch.load(file)', 'torch.serialization.load(file)',
    'load(file, weights_only=False)', 'np.load(file, allow_pickle=True)', 'try: x()\nexcept: y()', 'try: x()\nexcept Exception: pass',
    'try: x()\nexcept (OSError, BaseException): ...'])
def test_what_is_unsafe_is_found(code): assert list(unsafe(ast.parse(code)))


@each(SOURCES)
def test_no_unsafe_load_and_no_silent_except(path):
    assert list(unsafe(TREES[path])) == []


# Metadata

def test_versions_agree():
    assert settings()['version'] == eva_session9.__version__
    assert f"## {settings()['version']}" in (ROOT / 'CHANGELOG.md').read_text(encoding='utf-8')


def test_commands_are_installed():
    cli = PACKAGE / 'cli.py'
    scripts = dict(line.split('=') for line in settings()['console_scripts'].split('\n'))
    commands = re.findall(r'^def (eva9_\w+)', cli.read_text(encoding='utf-8'), re.M)
    assert scripts == {name: f'eva_session9.cli:{name}' for name in commands}


def test_slow_and_cuda_cells_are_skipped_unless_asked_for():
    flags = get_config(ROOT).tst_flags
    assert set(flags.split() if isinstance(flags, str) else flags) == {'slow', 'cuda'}


def test_the_top_level_stays_small():
    listed = subprocess.run(['git', 'ls-files', '-co', '--exclude-standard'], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode: pytest.skip('not a git checkout')
    assert {name.split('/')[0] for name in listed.stdout.splitlines()} - TOP_LEVEL == set()


def test_readme_is_short_and_its_links_lead_somewhere():
    text = (ROOT / 'README.md').read_text(encoding='utf-8')
    assert len(text.splitlines()) < 120
    links = re.findall(r'\]\((?![a-z]+:|#)([^)#\s]+)', text)
    assert [link for link in links if not (ROOT / link).exists()] == []


# Notebooks

def test_the_table_in_the_readme_is_what_the_results_say(monkeypatch):
    monkeypatch.chdir(ROOT / 'nbs')
    cells = code_cells(ROOT / 'nbs/index.ipynb')
    source, = (''.join(cell['source']) for cell in cells if 'def result(' in ''.join(cell['source']))
    names = {'model': pretrained(), 'json': json, 'Path': Path, 'Markdown': str}
    exec(source, names)
    assert names['table'].replace('](', '](nbs/') in (ROOT / 'README.md').read_text(encoding='utf-8')


@each(NOTEBOOKS)
def test_notebook_is_whole(path):
    used = {name for cell in code_cells(path) for name in directives(cell)}
    assert used <= DIRECTIVES, f'unknown directives: {used - DIRECTIVES}'
    text = path.read_text(encoding='utf-8')
    assert 'skip_exec' not in text, 'skip_exec skips the whole notebook and reports a pass'
    assert 'fastcore.test import *' not in text
    assert 'nbdev_export()' in ''.join(cells(path)[-1]['source'])


@each(NOTEBOOKS)
def test_notebook_holds_no_widget_state_no_error_and_no_private_path(path):
    assert 'widgets' not in json.loads(path.read_text(encoding='utf-8'))['metadata']
    for output in outputs(path):
        assert output['output_type'] != 'error'
        assert 'vnd.jupyter.widget' not in ' '.join(output.get('data', {})), 'a widget is dead without its kernel'
        assert not re.search(r'/root/|/home/|/Users/', json.dumps(output)), 'the output names a folder of one machine'


@each(NOTEBOOKS)
def test_notebook_outputs_are_light(path):
    stored = [item for output in outputs(path) for item in output.get('data', {}).items()]
    figures = [''.join(data) for mime, data in stored if mime.startswith('image/')]
    sizes = [len(f if f.lstrip().startswith('<') else base64.b64decode(f)) for f in figures]
    assert max(sizes, default=0) <= 40 * 1024
    assert len(json.dumps(outputs(path))) <= (400 if path.stem == 'session9' else 150) * 1024


# Weights and results

def shipped_weights():
    "The weights files in the package."
    return sorted(p for p in (PACKAGE / 'weights').glob('*') if p.suffix != '.json')


def values(tree, key):
    "Every value stored under `key`, at any depth."
    if isinstance(tree, dict):
        if key in tree: yield tree[key]
        tree = list(tree.values())
    if isinstance(tree, list):
        for branch in tree: yield from values(branch, key)


def test_the_package_carries_one_weights_file():
    assert [path.suffix for path in shipped_weights()] == ['.safetensors']


@each(RESULTS)
def test_result_names_the_shipped_weights(path):
    named = {sha for sha in values(json.loads(path.read_text(encoding='utf-8')), 'weights_sha256') if sha}
    if not named: pytest.skip('made without trained weights')
    shipped, = (hashlib.sha256(weights.read_bytes()).hexdigest() for weights in shipped_weights())
    assert named == OTHER_WEIGHTS.get(path.name, {shipped})


def test_the_shipped_weights_are_those_of_the_recipe_run():
    result = json.loads((ROOT / 'results' / 'fast_cpu.json').read_text(encoding='utf-8'))
    card = pretrained().card
    assert card['command'] == result['command'] and card['recipe'] == result['config']


def test_the_assignment_shows_the_run_on_record():
    run = json.loads((ROOT / 'results/session9.json').read_text(encoding='utf-8'))
    assert config_from(run['config']) == Config.session9() and len(run['history']) == 20
    shown = ''.join(''.join(output.get('text', '')) for output in outputs(ROOT / 'nbs/session9.ipynb'))
    assert f"{run['history'][-1]['test_accuracy']:.2%} of 10,000 test images after 20 epochs" in shown


@each(RESULTS)
def test_result_says_how_it_was_made(path):
    def refuse(constant): raise AssertionError(f'{constant} is not JSON')
    result = json.loads(path.read_text(encoding='utf-8'), parse_constant=refuse)
    parts = [result] if 'command' in result else result.values()
    for part in parts:
        for run in part.get('runs') or [part]:
            assert {'hardware', 'versions', 'seconds', 'command'} - {*part, *run} == set()
