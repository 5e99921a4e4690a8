"""Response time of the heatmap panel, on this machine.

In the kernel: a ResNet-18 and 10,000 images of 32 x 32 pixels, with the default layers. Random actions, one kind after
another, set a control as a click does; the time runs until the new images and texts are sent to the browser.
For the kinds marked 'new', cached heatmaps are deleted first. The images are CIFAR-10 from the folder in the environment
variable EVA9_CIFAR10, or else drawn shapes. With --browser also the time from a click to new pixels in headless Chromium, on a
page of `eva9_panel` with 1,000 drawn shapes.
"""
import argparse
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from eva_session9.config import hardware, pick_device, versions
from eva_session9.data import cifar10, shapes
from eva_session9.engine import Evaluation
from eva_session9.gradcam import METHODS
from eva_session9.panel import COLUMNS, ORDERS, ROWS, HeatmapPanel, logits_file, store_logits, uses_gradients
from eva_session9.save_load import pretrained, write_atomically

QUICK = [name for name in METHODS if uses_gradients(name)] + ['EigenCAM']
TARGETS = {  # p95, milliseconds
    'opacity, colour map, cells or smooth': 30, 'another class': 30, 'another method, new': 60,
    'another image, new': 150, 'filter or sort': 100, 'opening': 1000, 'click to new pixels': 400}


def test_images(n):
    "The images to browse, and what they are."
    if os.environ.get('EVA9_CIFAR10'): return cifar10(os.environ['EVA9_CIFAR10'])[1].subset(slice(n)), 'CIFAR-10 test images'
    drawn = shapes(min(n, 1000))
    return drawn.subset(np.resize(np.arange(len(drawn)), n)), 'drawn shapes, each several times'


def said_of(images):
    "Logits that are right for about three images in four; to make them by the model would tell nothing of the panel."
    draw = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(len(images), 10, generator=draw), torch.from_numpy(images.labels)
    logits[torch.arange(len(images)), labels] += 2.5
    return Evaluation(logits, labels)


def timed(action):
    start = time.perf_counter()
    action()
    return 1000 * (time.perf_counter() - start)


def other(control, values):
    "One of the values at random, but not the one that is set."
    return random.choice([value for value in values if value != control.value])


def setting(panel, name, values):
    "An action: set a control to another of these values."
    control = panel.controls[name]
    value = other(control, values)
    return lambda: setattr(control, 'value', value)


def look(panel):
    values = {'alpha': [i / 20 for i in range(21)], 'cmap': ['inferno', 'viridis', 'cividis', 'magma'], 'cells': [False, True]}
    name = random.choice(list(values))
    return setting(panel, name, values[name])


def list_of(panel):
    values = {'show': ['wrong', 'right', 'all'], 'true': ['any', *range(10)], 'predicted': ['any', *range(10)],
              'order': list(ORDERS), 'confidence': [(0, 1), (0.2, 0.6), (0.5, 1)]}
    for name, (first, *_) in values.items(): panel.controls[name].value = first  # or filters would add up to an empty list
    name = random.choice(list(values))
    return setting(panel, name, values[name])


def new_image(panel):
    forget(panel)
    return setting(panel, 'place', range(1, panel.controls['place'].max + 1))


def new_method(panel):
    panel.explorer.made.clear()
    return setting(panel, 'method', QUICK)


def forget(panel):
    panel.explorer.made.clear()
    panel.explorer.evidence = None, {}, None


KINDS = {
    'opacity, colour map, cells or smooth': look, 'another class': lambda panel: setting(panel, 'explain', range(10)),
    'another method, new': new_method, 'another image, new': new_image, 'filter or sort': list_of}


def row(what, times):
    p95 = statistics.quantiles(times, n=20, method='inclusive')[-1] if len(times) > 1 else times[0]
    verdict = 'reached' if p95 <= TARGETS[what] else 'MISSED'
    return {'what': what, 'n': len(times), 'median ms': round(statistics.median(times), 1), 'p95 ms': round(p95, 1),
            'target': f'<= {TARGETS[what]} ms: {verdict}'}


def show(rows):
    for r in rows: print('   '.join(f'{key} {value}' for key, value in r.items()), flush=True)
    return rows


def opening(images, model, n):
    "Milliseconds from the constructor to a panel that can be shown, where the logits are kept from before."
    card = model.card
    store_logits(logits_file(model, images, card['mean'], card['std']), said_of(images).logits)
    return [timed(lambda: HeatmapPanel(model, images)) for _ in range(n)]


def kernel(images, actions):
    "Rows for what the kernel does."
    random.seed(0)
    model = pretrained()
    rows = show([row('opening', opening(images, model, 5))])
    panel = HeatmapPanel(model, images)
    for what, kind in KINDS.items():
        forget(panel)
        for _ in range(2): kind(panel)()  # warms up
        times = [timed(kind(panel)) for _ in range(actions)]
        rows += show([row(what, times)])
    return rows


READY = '''before => {
  const image = document.querySelectorAll('.eva9-pictures img')[3];
  return image && image.complete && image.src !== before && new Promise(done => requestAnimationFrame(() => done(true))) }'''


def browser(images_limit, actions):
    "Rows for a page of `eva9_panel` in Chromium: pick a thumbnail that was not picked before, and wait for another last heatmap."
    from playwright.sync_api import sync_playwright
    command = [Path(sys.executable).parent/'eva9_panel', '--data', 'shapes', '--limit', str(images_limit), '--port', '0', '--no-browser']
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        from eva_session9.save_load import save_model
        save_model(pretrained(), Path(folder)/'run'/'model.safetensors', {**pretrained().card, 'classes': list(shapes(1).classes)})
        command += ['--weights', Path(folder)/'run'/'model.safetensors']
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=folder)
        try:
            address = re.search(r'http://\S+', server.stdout.readline())[0]
            chromium = playwright.chromium.launch(executable_path=shutil.which('chromium'), args=['--no-sandbox'])
            page = chromium.new_page(viewport={'width': 1500, 'height': 1100})
            page.goto(address, timeout=120_000)
            page.locator('.eva9-pictures img').nth(3).wait_for(timeout=120_000)
            page.locator('.eva9-grid .widget-radio-box label', has_text='%').first.wait_for(timeout=120_000)  # classified
            return show([row('click to new pixels', [clicked(page, i) for i in range(actions)])])
        finally:
            server.terminate()
            server.wait(20)


def clicked(page, i):
    "Milliseconds from a click on the next thumbnail to another last heatmap; the first of a page is picked by turning to it."
    last = page.locator('.eva9-pictures img').nth(3)
    def answered(button):
        before = last.get_attribute('src')
        def action():
            button.click()
            page.wait_for_function(READY, arg=before, polling='raf', timeout=10_000)
        return action
    place = i % (COLUMNS * ROWS - 1) + 1
    if i and place == 1: answered(page.get_by_role('button', name='Next page'))()
    return timed(answered(page.locator('.eva9-grid .widget-radio-box label').nth(place)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--images', type=int, default=10_000, help='images in the set (default 10000)')
    parser.add_argument('--actions', type=int, default=200, help='random actions of each kind (default 200)')
    parser.add_argument('--browser', action='store_true', help='also measure a page in headless Chromium')
    parser.add_argument('--out', type=Path, help='also write the result to this .json file, such as results/panel.json')
    args = parser.parse_args()
    machine, start = hardware(pick_device('cpu')), time.perf_counter()
    print(f'{machine}; load {os.getloadavg()[0]:.1f}; torch {torch.__version__}')
    with tempfile.TemporaryDirectory() as cache:
        os.environ['XDG_CACHE_HOME'] = cache
        images, what = test_images(args.images)
        rows = kernel(images, args.actions)
        if args.browser: rows += browser(1000, args.actions)
    if args.out:
        command = f'python benchmarks/panel.py --images {args.images} --actions {args.actions}{" --browser" * args.browser}'
        result = {'latency': rows, 'images': what, 'weights_sha256': pretrained().card['sha256'], 'hardware': machine,
                  'versions': versions(), 'seconds': round(time.perf_counter() - start, 1), 'command': command}
        write_atomically(args.out, (json.dumps(result, indent=1) + '\n').encode())


if __name__ == '__main__': main()
