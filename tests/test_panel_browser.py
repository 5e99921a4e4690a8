"""The panel in a real browser: headless Chromium on a page of `eva9_panel` and on JupyterLab, judged by pixels and words.

What the screen must show is computed here, by an `Explorer` of the same model and images. Nothing waits for a fixed time.
EVA9_CIFAR10=ROOT EVA9_SCREENSHOT=nbs/images/panel.png pytest tests/test_panel_browser.py -k cifar10 takes the docs' picture."""
import os
import re
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from eva_session9.cli import _sets, _write_page
from eva_session9.data import shapes
from eva_session9.engine import Evaluation
from eva_session9.models.resnet import resnet18
from eva_session9.panel import Explorer, View, changed, logits_file, select, sprite, stored_logits
from eva_session9.preprocessing import loader, test_transforms as transforms
from eva_session9.save_load import load_model, pretrained, save_model

playwright = pytest.importorskip('playwright.sync_api', reason='playwright is not installed: pip install playwright')
pytest.importorskip('voila', reason='Voila is not installed: it comes with the extra app')

COMMAND = Path(sys.executable).parent/'eva9_panel'
if not COMMAND.exists(): pytest.skip('eva9_panel is not installed: pip install -e .', allow_module_level=True)

IMAGES = shapes(60, seed=1)  # as `--data shapes --limit 60` has them
STAR = IMAGES.classes.index('star')
LONG = 180_000  # milliseconds: the longest wait for a kernel that starts cold on a busy machine
playwright.expect.set_options(timeout=LONG)


# Servers

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A folder with a model of random weights, as `eva9_train` would have left it."
    folder, (mean, std) = tmp_path_factory.mktemp('home'), IMAGES.stats()
    torch.manual_seed(0)
    model = resnet18()
    with torch.no_grad(): model(next(iter(loader(IMAGES, transforms(mean, std), batch_size=60)))[0])  # batch statistics
    save_model(model, folder/'run'/'model.safetensors', dict(
        architecture='resnet18', classes=list(IMAGES.classes), mean=mean, std=std, size=32, command='eva9_train --data shapes'))
    return folder


def start(home, *command):
    "A server whose files all stay in `home`, and for which Ctrl-C is what it is in a terminal."
    names = ('XDG_CACHE_HOME', 'IPYTHONDIR', 'JUPYTER_CONFIG_DIR', 'JUPYTER_DATA_DIR', 'JUPYTER_RUNTIME_DIR',
             'JUPYTERLAB_SETTINGS_DIR', 'JUPYTERLAB_WORKSPACES_DIR')
    places, interruptible = {name: str(home/name.lower()) for name in names}, partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with open(home/'errors.txt', 'w') as errors:
        return subprocess.Popen(command, cwd=home, env=os.environ | places, text=True, stdout=subprocess.PIPE, stderr=errors,
                                preexec_fn=interruptible)


def panel_command(port=0): return COMMAND, '--data', 'shapes', '--limit', '60', '--port', str(port), '--no-browser'


def free_port():
    with socket.create_server(('127.0.0.1', 0)) as taken: return taken.getsockname()[1]


def wait_for(port, server, seconds=LONG / 1000):
    "Wait until the port is listened to."
    last = time.monotonic() + seconds
    while server.poll() is None and time.monotonic() < last:
        try: return socket.create_connection(('127.0.0.1', port), timeout=1).close()
        except OSError: time.sleep(0.1)
    raise AssertionError(f'nothing listens at port {port}; the server ended with {server.poll()}')


def end(server):
    if server.poll() is None: server.terminate()
    try: server.communicate(timeout=20)
    except subprocess.TimeoutExpired: server.kill()


@pytest.fixture(scope='module')
def voila(home):
    server = start(home, *panel_command())
    yield re.search(r'http://127\.0\.0\.1:\d+/', server.stdout.readline())[0]
    end(server)


@pytest.fixture(scope='module')
def lab(home):
    folder, port = home/'notebooks', free_port()
    folder.mkdir()
    here = os.getcwd()
    os.chdir(home)
    try: _write_page(folder, data='shapes', root=None, weights='run/model.safetensors', limit=60)
    finally: os.chdir(here)
    server = start(home, sys.executable, '-m', 'jupyterlab', '--no-browser', '--allow-root', '--ip=127.0.0.1', f'--port={port}',
                   '--ServerApp.port_retries=0', '--IdentityProvider.token=', f'--ServerApp.root_dir={folder}',
                   '--log-level=CRITICAL')
    wait_for(port, server)
    yield f'http://127.0.0.1:{port}/lab/tree/heatmaps.ipynb'
    end(server)


# The page

PIXELS = '''(image) => {
  if (!image || !image.complete || !image.naturalWidth) return null
  const canvas = document.createElement('canvas')
  canvas.width = image.naturalWidth
  canvas.height = image.naturalHeight
  const context = canvas.getContext('2d')
  context.drawImage(image, 0, 0)
  return context.getImageData(0, 0, canvas.width, canvas.height).data
}'''


SAME = '''([selector, index, expected]) => {
  const found = (PIXELS)(document.querySelectorAll(selector)[index])
  return found && found.length === expected.length && found.every((value, i) => Math.abs(value - expected[i]) <= 3)
}'''.replace('PIXELS', PIXELS)


SUM = '''([selector, expected]) => {
  const found = (PIXELS)(document.querySelector(selector))
  return found && found.reduce((sum, x, i) => sum + x * (i % 9973), 0) === expected
}'''.replace('PIXELS', PIXELS)


class Person:
    "Someone at the page, who knows what has been chosen and what must be seen."
    def __init__(self, page, explorer):
        self.page, self.explorer = page, explorer
        self.view = View(layers=('layer2', 'layer3', 'layer4'))

    def sees(self, **choices):
        "After these choices, the screen shows what an explorer would."
        self.view = changed(self.view, **choices)
        page = self.explorer.page(self.view)
        for i, (blob, caption) in enumerate(page.pictures):
            self.sees_picture(i, blob)
            for line in caption.split('\n')[:2]:
                playwright.expect(self.page.locator('.eva9-pictures > *').nth(i)).to_contain_text(line)
        playwright.expect(self.page.locator('.eva9-pictures img')).to_have_count(len(page.pictures))
        if page.title: playwright.expect(self.page.get_by_text(page.title, exact=True)).to_be_visible()
        return page

    def sees_picture(self, i, blob):
        "A picture of the row; maps made by another process may differ in the last bits."
        expected = np.asarray(Image.open(BytesIO(blob)).convert('RGBA')).ravel().tolist()
        self.page.wait_for_function(SAME, arg=['.eva9-pictures img', i, expected], timeout=LONG)

    def sees_thumbnails(self):
        "The sprite is that of the page of the list."
        listed, first = select(self.view, self.explorer.table), (self.view.place - 1) // 25 * 25
        page = np.asarray(Image.open(BytesIO(sprite(IMAGES.images[listed[first:first + 25]]))).convert('RGBA')).ravel().astype(np.int64)
        expected = int((page * (np.arange(page.size) % 9973)).sum())
        self.page.wait_for_function(SUM, arg=['.eva9-grid img', expected], timeout=LONG)

    def reads(self, text): playwright.expect(self.page.locator('.eva9 [role=status]')).to_contain_text(text, timeout=LONG)

    def chooses(self, label, value, **choices):
        self.page.get_by_label(label, exact=True).select_option(value=value)
        return self.sees(**choices)

    def presses(self, label, key, **choices):
        "An arrow key in a number."
        self.page.get_by_label(label, exact=True).press(key)
        return self.sees(**choices)

    def slides(self, label, value, **choices):
        "A slider, by the number beside it."
        readout = self.page.locator('.eva9 .widget-slider', has_text=label).locator('.widget-readout')
        readout.fill(value)
        readout.press('Enter')
        return self.sees(**choices)

    def opens(self, name, content):
        "A file, by the button."
        with self.page.expect_file_chooser() as chooser: self.page.get_by_role('button', name='Open an image').click()
        chooser.value.set_files({'name': name, 'mimeType': 'image/png', 'buffer': content})

    def begins_again(self):
        "All images in the order of the set, by GradCAM for the predicted class."
        for label, value in [('Order', 'smallest loss first'), ('Order', 'as in the set'), ('Show', 'all'), ('True class', 'any'),
                             ('Predicted class', 'any'), ('Method', 'GradCAM')]:
            self.page.get_by_label(label, exact=True).select_option(value=value)
        self.page.locator('.eva9-classes .widget-radio-box label').first.click()
        self.view = View(show='all', order='as in the set', layers=('layer2', 'layer3', 'layer4'))
        self.sees()


def run_all_cells(page):
    "By the menu. The notebook's own sign says idle before there is a kernel too, and cells run then are silently not run."
    page.get_by_text('(ipykernel) | Idle').first.wait_for(timeout=LONG)
    page.get_by_role('menuitem', name='Run', exact=True).click()
    page.get_by_role('menuitem', name='Run All Cells', exact=True).click()


@pytest.fixture(scope='module', params=['voila', 'lab'])
def person(request, browser, home):
    "A page on either server, with the panel open."
    page = browser.new_page(viewport={'width': 1600, 'height': 1200})
    page.goto(request.getfixturevalue(request.param), timeout=LONG)
    if request.param == 'lab': run_all_cells(page)
    page.locator(CLASSIFIED).first.wait_for(timeout=LONG)
    yield Person(page, explorer_of(load_model(home/'run'/'model.safetensors'), IMAGES, home))
    page.close()


def explorer_of(model, images, home):
    "What the panel must show, from the logits that it kept."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('XDG_CACHE_HOME', str(home/'xdg_cache_home'))
        logits = stored_logits(logits_file(model, images, model.card['mean'], model.card['std']), len(images), len(model.card['classes']))
    assert logits is not None, 'the panel kept no logits'
    return Explorer(model, images, Evaluation(logits, torch.from_numpy(images.labels)))


def mistakes(person): return Evaluation(person.explorer.set_logits, torch.from_numpy(person.explorer.images.labels)).misclassified


CLASSIFIED = '.eva9-grid .widget-radio-box label:has-text("%")'


# What a person does

def test_it_opens_on_the_surest_mistake(person):
    picked = person.sees().picked
    assert picked.key == mistakes(person)[0]
    person.sees_thumbnails()
    playwright.expect(person.page.locator('.eva9')).to_contain_text(f'{len(mistakes(person))} images')
    playwright.expect(person.page.locator('.eva9-grid .widget-radio-box label').first).to_contain_text(f'#{picked.key}')


def test_filter_and_sort(person):
    person.begins_again()
    person.chooses('True class', 'star', true=STAR)
    person.chooses('Order', 'least confident first', order='least confident first')
    person.sees_thumbnails()
    playwright.expect(person.page.locator('.eva9')).to_contain_text('6 images')
    person.chooses('True class', 'any', true='any')
    person.sees_thumbnails()


def test_pick_by_click_and_by_keyboard(person):
    person.begins_again()
    person.page.locator('.eva9-grid .widget-radio-box label').nth(3).click()
    person.sees(place=4)
    person.presses('Image', 'ArrowUp', place=5)
    person.page.locator('.eva9-grid input').nth(7).focus()
    person.page.keyboard.press('Space')
    person.sees(place=8)
    person.page.get_by_role('button', name='Next page').click()
    person.sees(place=26)
    person.sees_thumbnails()
    person.presses('Page', 'ArrowUp', place=51)
    person.presses('Page', 'ArrowDown', place=26)
    person.page.get_by_role('button', name='Previous page').click()
    person.sees(place=1)


def test_method_layers_and_look(person):
    person.begins_again()
    person.chooses('Method', 'LayerCAM', method='LayerCAM')
    person.chooses('Method', 'EigenCAM', method='EigenCAM')
    person.page.get_by_label('layer1 (32 x 32)').check()
    person.sees(layers=('layer1', 'layer2', 'layer3', 'layer4'))
    person.page.get_by_label('layer1 (32 x 32)').uncheck()
    person.sees(layers=('layer2', 'layer3', 'layer4'))
    person.slides('Opacity', '0.8', alpha=0.8)
    person.slides('Opacity', '0.5', alpha=0.5)
    person.chooses('Colour map', 'viridis', cmap='viridis')
    person.chooses('Colour map', 'inferno', cmap='inferno')
    person.chooses('Drawn', 'as cells', cells=True)
    person.chooses('Drawn', 'smooth', cells=False)


def test_another_class_and_the_difference(person):
    person.begins_again()
    person.page.locator('.eva9-classes .widget-radio-box label', has_text='star').last.click()
    person.sees(explain=STAR)
    wrong = int(np.flatnonzero(person.explorer.table.predicted[:25] != person.explorer.table.true[:25])[0])
    person.page.locator('.eva9-grid .widget-radio-box label').nth(wrong).click()
    person.page.get_by_label('Predicted minus true').check()
    person.sees(place=wrong + 1, difference=True)
    person.page.locator('.eva9-classes .widget-radio-box label').nth(0).click()
    person.sees(explain='predicted')
    assert not person.page.get_by_label('Predicted minus true').is_checked()


def test_many_passes_can_be_cancelled(person):
    person.begins_again()
    person.page.get_by_label('Method', exact=True).select_option(value='ScoreCAM')
    person.reads('once for every channel')
    person.page.get_by_role('button', name='Cancel').click()
    playwright.expect(person.page.get_by_role('button', name='Compute')).to_be_visible()
    person.chooses('Method', 'GradCAM', method='GradCAM')


def test_an_empty_list_is_said_and_left_again(person):
    person.begins_again()
    person.chooses('Show', 'right', show='right')
    table = person.explorer.table
    k = next(k for k in range(10) if not ((table.true == k) & (table.predicted == k)).any())
    person.chooses('True class', IMAGES.classes[k], true=k)
    person.reads(f'No correctly classified image of class {IMAGES.classes[k]}')
    person.begins_again()


def test_files_good_and_bad(person):
    person.begins_again()
    person.opens('notes.png', b'dear diary')
    person.reads('notes.png: is not a PNG, JPEG or WebP image')
    person.sees()
    large = BytesIO()
    Image.new('1', (12_000, 12_000)).save(large, 'PNG')
    person.opens('large.png', large.getvalue())
    person.reads('large.png: 12000 x 12000 pixels')
    person.sees()
    mine = BytesIO()
    Image.fromarray(shapes(1, seed=9, size=90).images[0]).save(mine, 'PNG')
    person.opens('mine.png', mine.getvalue())
    person.sees(own=person.explorer.add('mine.png', mine.getvalue()))
    person.page.locator('.eva9-grid .widget-radio-box label').nth(2).click()
    person.sees(place=3)


def test_the_view_is_saved_as_it_is(person):
    person.begins_again()
    page = person.sees()
    person.page.get_by_role('button', name='Save view as PNG').click()
    link = person.page.locator('.eva9 a[download]')
    with person.page.expect_download() as download: link.click()
    assert download.value.suggested_filename == f'image-{page.picked.key}-GradCAM.png'
    saved = np.asarray(Image.open(download.value.path()))
    for i, (blob, _) in enumerate(page.pictures):
        shown = np.asarray(Image.open(BytesIO(blob))).astype(int)
        assert abs(saved[37:258:7, 15 + 236 * i:236 + 236 * i:7] - shown).max() <= 3


def test_every_control_has_a_name(person):
    unnamed = '''() => [...document.querySelectorAll('.eva9 select, .eva9 input, .eva9 button')]
      .filter(e => !(e.labels && [...e.labels].some(l => l.textContent.trim())) && !e.textContent.trim()).map(e => e.outerHTML)'''
    assert person.page.evaluate(unnamed) == []


def test_nothing_is_loaded_from_elsewhere(browser, voila):
    "A page of Voila asks for fonts on another server; it is told not to, so that it opens as fast without a network."
    page, failures = browser.new_page(), {}
    page.on('requestfailed', lambda request: failures.update({request.url: request.failure}))
    page.goto(voila, timeout=LONG)
    assert all(failure == 'csp' for url, failure in failures.items() if not url.startswith(voila)), failures
    page.close()


# The command

def test_the_command_serves_this_machine_alone_and_ends_cleanly(home):
    server = start(home, *panel_command())
    try:
        said = server.stdout.readline()
        port = int(re.fullmatch(r'the panel is at http://127\.0\.0\.1:(\d+)/ \(Ctrl-C ends it\)\n', said)[1])
        wait_for(port, server)
        with pytest.raises(OSError): socket.create_connection(('127.0.0.2', port), timeout=2)
        other = subprocess.run(panel_command(port), cwd=home, capture_output=True, text=True)
        assert other.returncode == 2 and other.stderr.count('\n') == 1 and f'cannot serve at 127.0.0.1:{port}' in other.stderr
        server.send_signal(signal.SIGINT)
        rest, _ = server.communicate(timeout=30)
        assert (server.returncode, rest) == (0, '')
        assert 'Traceback' not in (home/'errors.txt').read_text()
    finally: end(server)


@pytest.mark.skipif('EVA9_CIFAR10' not in os.environ, reason='EVA9_CIFAR10 does not name the folder of CIFAR-10')
def test_the_librarys_own_model_on_cifar10(home, browser):
    "The opening view of the mistakes among the test images, all of them where it is for the docs."
    root, picture = os.environ['EVA9_CIFAR10'], os.environ.get('EVA9_SCREENSHOT')
    limit = None if picture else 200
    command = COMMAND, '--data', 'cifar10', '--root', root, '--port', '0', '--no-browser', *(['--limit', str(limit)] if limit else [])
    server = start(home, *command)
    try:
        page = browser.new_page(viewport={'width': 1280, 'height': 900})
        page.goto(re.search(r'http://127\.0\.0\.1:\d+/', server.stdout.readline())[0], timeout=LONG)
        page.locator(CLASSIFIED).first.wait_for(timeout=5 * LONG)
        person = Person(page, explorer_of(pretrained(), _sets('cifar10', root, limit)[1], home))
        shown = person.sees()
        assert shown.picked.key == mistakes(person)[0]
        if picture: store(page.locator('.eva9').screenshot(), picture)
        page.close()
    finally: end(server)


def store(screenshot, path):
    "In steps of 8 of 255, which no eye can tell: light enough for a page, and no colour shifts."
    pixels = np.asarray(Image.open(BytesIO(screenshot)).convert('RGB')) / 255
    Image.fromarray((np.round(pixels * 31) / 31 * 255).round().astype(np.uint8)).save(path, optimize=True)
    assert Path(path).stat().st_size <= 150_000
