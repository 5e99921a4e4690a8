"The panel, driven from Python: what a person chooses arrives, as the right pixels and words, and nothing breaks it."
import os
import re
import struct
import time
import zlib
from base64 import b64decode
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import fields, replace
from datetime import datetime
from functools import partial
from io import BytesIO
from threading import Event

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from eva_session9.data import ImageSet, shapes
from eva_session9.engine import Evaluation
from eva_session9.gradcam import METHODS, Heatmaps
from eva_session9.models.resnet import resnet18
from eva_session9.panel import (
    ORDERS, Explorer, HeatmapPanel, Page, View, _class_options, default_model_and_images, default_source, png, probe, select,
    takes_many_passes, view_png, watched)
from eva_session9.preprocessing import loader, test_transforms as transforms
from eva_session9.save_load import save_model
from eva_session9.visual import overlay

IMAGES = shapes(60, seed=3)
MEAN, STD = IMAGES.stats()
SLOW = [name for name in METHODS if takes_many_passes(name)]
QUICK = [name for name in METHODS if name not in SLOW and name != 'CAM']


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    "Classifications are kept in the user's cache folder, which tests must not fill."
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'cache'))
    return tmp_path/'cache'


def convolutional():
    "Three stages of random weights: 32, 16 and 8 cells a side."
    torch.manual_seed(0)
    model, widths = nn.Sequential(), (3, 8, 16, 32)
    for i, stride in enumerate((1, 2, 2)):
        stage = nn.Sequential(nn.Conv2d(widths[i], widths[i + 1], 3, stride, 1), nn.BatchNorm2d(widths[i + 1]), nn.ReLU())
        model.add_module(f'layer{i + 1}', stage)
    model.add_module('head', nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)))
    model.card = {'mean': MEAN, 'std': STD}
    return model.eval()


def inputs(images=IMAGES):
    "The set as a model takes it."
    return next(iter(loader(images, transforms(MEAN, STD), batch_size=len(images), shuffle=False)))[0]


def evaluate(model, images=IMAGES):
    "The model's own evaluation, by a plain forward pass."
    with torch.no_grad(): return Evaluation(model(inputs(images)), torch.from_numpy(images.labels))


def opened(*arguments, **options):
    "A panel that has classified its images."
    panel = HeatmapPanel(*arguments, **options)
    panel.wait()
    return panel


def decode(blob): return np.asarray(Image.open(BytesIO(blob)).convert('RGB'))
def on_screen(panel): return [decode(box.children[0].value) for box in panel.row.children]
def captions(panel): return [box.children[1].value for box in panel.row.children]
def said(panel): return panel.message.value


def choose(panel, **choices):
    for name, value in choices.items(): panel.controls[name].value = value
    panel.wait()


def upload(panel, name, content):
    file = {'name': name, 'content': memoryview(content), 'type': '', 'size': len(content), 'last_modified': datetime.now()}
    panel.controls['own'].value = (file,)


@contextmanager
def held(model, most=0):
    "Passes of more than `most` images wait for the second event, two minutes at most; the first says that one has begun."
    begun, go_on = Event(), Event()
    def slow(module, args):
        if len(args[0]) > most:
            begun.set()
            go_on.wait(120)
            go_on.set()
    with model.register_forward_pre_hook(slow):
        try: yield begun, go_on
        finally: go_on.set()


@pytest.fixture
def model(): return convolutional()

@pytest.fixture
def panel(model): return opened(model, IMAGES)


# Lists

def random_table(n=500):
    "An explorer of random logits, some not finite: lists need no network."
    images, logits = shapes(n, seed=0, size=16), torch.randn(n, 10, generator=torch.Generator().manual_seed(0))
    logits[::50] = float('nan')
    flat = nn.Sequential(nn.Flatten(), nn.Linear(768, 10))
    return Explorer(flat, images, Evaluation(logits, torch.from_numpy(images.labels)), (0.5,) * 3, (0.5,) * 3)


FIRST = {  # what an order says comes first -> what is then smallest
    'most confident first': lambda t: -t.confidence, 'least confident first': lambda t: t.confidence,
    'largest loss first': lambda t: -t.loss, 'smallest loss first': lambda t: t.loss,
    'smallest margin first': lambda t: t.margin, 'largest margin first': lambda t: -t.margin,
    'as in the set': lambda t: t.index}


@pytest.mark.parametrize('show', ['wrong', 'right', 'all'])
@pytest.mark.parametrize('order', ORDERS)
def test_lists_hold_what_was_asked_in_the_order_asked(show, order):
    table, whole = random_table().table, View(show=show, order=order)
    verdict = {'wrong': table.predicted != table.true, 'right': table.predicted == table.true, 'all': table.index >= 0}[show]
    inside = (table.true == 3) & (table.confidence >= 0.25) & (table.confidence <= 0.4)
    for view, listed in [(whole, verdict), (replace(whole, true=3, confidence=(0.25, 0.4)), verdict & inside)]:
        asked = np.flatnonzero(listed)
        assert len(asked) and (select(view, table) == asked[np.argsort(FIRST[order](table)[asked], kind='stable')]).all()


def test_predicted_and_true_class_can_be_asked_together():
    table = random_table().table
    found = select(View(true=3, predicted=5), table)
    assert len(found) and (table.true[found] == 3).all() and (table.predicted[found] == 5).all()


def test_the_columns_are_those_of_the_logits():
    explorer = random_table()
    logits, table = explorer.set_logits, explorer.table
    i = 7
    shares = np.sort(logits[i].softmax(0).numpy())
    assert np.isclose(table.confidence[i], shares[-1]) and np.isclose(table.margin[i], shares[-1] - shares[-2])
    assert np.isclose(table.loss[i], -logits[i].log_softmax(0)[table.true[i]])
    assert table.predicted[50] == -1 and table.confidence[50] == 0 and table.loss[50] == np.inf


# What is on the screen

def test_opens_on_the_surest_mistake(panel, model):
    evaluation = evaluate(model)
    surest = evaluation.misclassified[0]
    assert panel.view == View(layers=('layer1', 'layer2', 'layer3'))
    assert torch.allclose(panel.explorer.set_logits, evaluation.logits, atol=1e-5)
    assert (on_screen(panel)[0] == IMAGES.images[surest]).all()
    assert f'image {surest}<' in captions(panel)[0]
    assert panel.count.value == f'{len(evaluation.misclassified)} images'


@pytest.mark.parametrize('method', QUICK + SLOW)
def test_the_screen_shows_what_was_chosen(panel, model, method):
    chosen = {'show': 'all', 'order': 'as in the set', 'place': 6, 'method': method, 'explain': 4, 'alpha': 0.35, 'cmap': 'cividis'}
    choose(panel, **chosen)
    panel.controls['layers']['layer1'].value = False
    assert panel.view == View(**chosen, layers=('layer2', 'layer3'))
    heatmaps = METHODS[method](model, ['layer2', 'layer3'])(inputs()[5:6], 4)
    image, *shown = on_screen(panel)
    assert (image == IMAGES.images[5]).all()
    for picture, heatmap, caption, name in zip(shown, heatmaps.maps[0], captions(panel)[1:], heatmaps.layers, strict=True):
        assert name in caption and '{} x {} cells'.format(*heatmaps.grid[name]) in caption
        if 'no positive evidence' in caption: continue
        expected = overlay(IMAGES.images[5], heatmap, 0.35, 'cividis').astype(int)
        assert abs(picture - expected).max() <= 2  # a class alone and all together may differ in the last bits


def test_cells_are_the_cells(panel):
    choose(panel, alpha=1, cmap='gray', cells=True)
    smooth_or_not = on_screen(panel)[3][..., 0]
    assert (smooth_or_not == smooth_or_not[::4, ::4].repeat(4, 0).repeat(4, 1)).all()
    choose(panel, cells=False)
    assert (on_screen(panel)[3][..., 0] != smooth_or_not).any()


def test_the_difference_is_predicted_minus_true(panel, model):
    choose(panel, difference=True, alpha=1)
    picked = panel.explorer.pick(panel.view)
    raw = METHODS['GradCAM'](model, ['layer3'])(inputs()[picked.key:picked.key + 1], 'all').raw['layer3'][0]
    difference = F.interpolate((raw[picked.predicted] - raw[picked.true])[None, None], (32, 32), mode='bilinear')[0, 0]
    heatmap = (1 + difference / difference.abs().max()) / 2  # zero is the middle of the scale
    assert abs(on_screen(panel)[3] - overlay(picked.pixels, heatmap, 1, 'RdBu_r').astype(int)).max() <= 2
    assert 'red is evidence for' in panel.title.value and 'raw from' in captions(panel)[3]
    panel.controls['explain'].value = 2
    assert not panel.controls['difference'].value and panel.title.value.startswith(f'GradCAM for {IMAGES.classes[2]}')


def test_what_only_looks_different_needs_no_pass_through_the_network(panel):
    passes, true = [], panel.explorer.pick(panel.view).true
    with watched(panel.explorer.model, passes.append):
        for name, value in [('explain', true), ('alpha', 0.9), ('cmap', 'viridis'), ('cells', True), ('difference', True)]:
            before = on_screen(panel)
            panel.controls[name].value = value
            assert any((a != b).any() for a, b in zip(before[1:], on_screen(panel)[1:], strict=True)), name
        assert not passes
        panel.controls['place'].value = 2
        assert len(passes) == 1
        panel.controls['place'].value = 1
        assert len(passes) == 1


def test_thumbnails_are_the_page_of_the_list(panel):
    choose(panel, show='all', order='as in the set')
    panel.next.click()
    assert panel.view.place == 26 and panel.page_number.value == 2 and panel.thumbs.value == 26
    page = decode(panel.sprite.value)
    assert page.shape == (5 * 110, 5 * 76, 3)
    for cell, index in [(0, 25), (7, 32), (24, 49)]:
        y, x = 110 * (cell // 5), 76 * (cell % 5) + 6
        assert (page[y:y + 64:2, x:x + 64:2] == IMAGES.images[index]).all()
        assert panel.thumbs.options[cell][0].startswith(f'#{index} ')
    panel.page_number.value = 3
    assert len(panel.thumbs.options) == 10 and panel.view.place == 51
    panel.next.click()
    assert panel.view.place == 51
    panel.thumbs.value = 60
    assert (on_screen(panel)[0] == IMAGES.images[59]).all() and panel.controls['place'].value == 60
    panel.previous.click()
    assert panel.view.place == 26


def test_another_list_begins_at_its_first_image(panel):
    choose(panel, show='all', order='as in the set', place=40)
    panel.controls['true'].value = 7
    members = np.flatnonzero(IMAGES.labels == 7)
    assert panel.view.place == 1 and panel.controls['place'].max == len(members) == len(panel.thumbs.options)
    assert (on_screen(panel)[0] == IMAGES.images[members[0]]).all()


def test_a_choice_draws_once(panel, monkeypatch):
    panel.controls['place'].value = 2
    pages, page = [], panel.explorer.page
    monkeypatch.setattr(panel.explorer, 'page', lambda view: pages.append(page(view)) or pages[-1])
    panel.controls['true'].value = 3
    assert len(pages) == 1


def test_a_layer_that_a_method_cannot_explain_is_said_and_left_again(panel):
    choose(panel, method='CAM')
    assert len(on_screen(panel)) == 4
    assert 'is not followed by' in captions(panel)[1] and 'raw maximum' in captions(panel)[3]
    choose(panel, method='GradCAM')
    assert len(on_screen(panel)) == 4 and 'cells' in captions(panel)[1]


def test_every_choice_has_a_control_that_shows_it(panel):
    assert {field.name for field in fields(View)} == set(panel.controls)
    panel._choose(show='all', order='smallest loss first', method='LayerCAM', cells=True, layers=('layer2',))
    for name in ('show', 'order', 'method', 'cells'): assert panel.controls[name].value == getattr(panel.view, name)
    assert [name for name, box in panel.controls['layers'].items() if box.value] == ['layer2']


def test_names_are_escaped(model):
    classes = ('<img src=x onerror=alert(1)>', '"&\'', *IMAGES.classes[2:])
    panel = opened(model, ImageSet(IMAGES.images, IMAGES.labels, classes))
    upload(panel, '<script>.png', b'no image')
    html = said(panel)
    for label in (0, 1):
        choose(panel, show='all', true=label, explain=label)
        panel.save.click()
        html += ''.join([panel.snapshot(), said(panel), panel.title.value, panel.bars.value, panel.saved.value, *captions(panel)])
    choose(panel, confidence=(0, 0.01))
    html += said(panel)
    assert '&lt;script&gt;' in html and '&lt;img src=x' in html
    assert '<img src=x' not in html and '<script' not in html and '"&\'' not in html


def test_a_snapshot_holds_what_the_screen_shows(panel):
    snapshot = panel.snapshot()
    stored = [decode(b64decode(blob)) for blob in re.findall(r'data:image/png;base64,([^"]+)"', snapshot)]
    assert all((a == b).all() for a, b in zip(stored, on_screen(panel), strict=True))
    assert panel.title.value in snapshot and snapshot._repr_html_() == snapshot and 'probability of each class' in snapshot
    assert not re.search(r'<script|https?:|<link', snapshot)
    assert 'application/vnd.jupyter.widget-view+json' in panel._repr_mimebundle_()


def test_the_saved_view_is_what_the_screen_shows(panel):
    panel.save.click()
    name, blob = re.search(r'download="(.+?)" href="data:image/png;base64,(.+?)"', panel.saved.value).groups()
    assert name == f'image-{panel.explorer.pick(panel.view).key}-GradCAM.png'
    saved = decode(b64decode(blob))
    for i, picture in enumerate(on_screen(panel)):
        assert (saved[34 + 3:34 + 224:7, 12 + 236 * i + 3:12 + 236 * i + 224:7] == picture).all()
    panel.controls['alpha'].value = 0.1
    assert not panel.saved.value  # the link was to another view


# Classification, and what is kept of it

def test_an_unclassified_set_can_be_browsed_and_is_classified_once(model, cache):
    with held(model, most=1) as (_, go_on):
        panel = HeatmapPanel(model, IMAGES)
        assert panel.progress.layout.display is None and panel.count.value == '60 images'
        assert 'are being classified' in said(panel)
        assert (on_screen(panel)[0] == IMAGES.images[0]).all()
        go_on.set()
        panel.wait()
    assert panel.progress.layout.display == 'none' and panel.progress.value == 60 and 'classified' not in said(panel)
    assert panel.explorer.pick(panel.view).key == evaluate(model).misclassified[0]
    assert len(list(cache.rglob('*.npy'))) == 1
    batches = []
    with watched(model, batches.append): again = HeatmapPanel(model, IMAGES)
    assert set(batches) == {1} and again.classifying is None
    assert torch.equal(again.explorer.set_logits, panel.explorer.set_logits)


def test_a_classification_that_was_stopped_is_no_failure(model):
    with held(model, most=1) as (begun, go_on):
        panel = HeatmapPanel(model, IMAGES)
        assert begun.wait(120)
        panel.classifying.stop()
        go_on.set()
        panel.wait()
    assert panel.notice == '' and panel.explorer.set_logits is None


def test_other_weights_are_classified_anew(model, panel, cache):
    with torch.no_grad(): model.head[2].bias[4] += 1
    again = opened(model, IMAGES)
    assert len(list(cache.rglob('*.npy'))) == 2
    assert (again.explorer.set_logits - panel.explorer.set_logits)[:, 4].allclose(torch.ones(60), atol=1e-4)


def test_a_damaged_file_of_logits_is_made_again(model, panel, cache):
    file, = cache.rglob('*.npy')
    file.write_bytes(b'\x93NUMPY')
    again = opened(model, IMAGES)
    assert torch.equal(again.explorer.set_logits, panel.explorer.set_logits)


def test_logits_that_cannot_be_kept_are_used_all_the_same(model, cache):
    cache.write_text('a file where the folder should be')
    panel = opened(model, IMAGES)
    assert 'could not be kept' in said(panel) and panel.explorer.set_logits is not None
    panel.controls['place'].value = 2
    assert 'could not be kept' not in said(panel)


def test_a_given_evaluation_is_not_made_again(model, cache):
    evaluation, batches = evaluate(model), []
    with watched(model, batches.append): assert HeatmapPanel(model, IMAGES, evaluation).explorer.set_logits is evaluation.logits
    assert set(batches) == {1} and not cache.exists()


def test_the_model_is_left_as_it_was(model):
    model.layer2.train()
    flags = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    panel = opened(model, IMAGES)
    choose(panel, place=2)
    choose(panel, method='ScoreCAM')
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


# Methods of many passes

@pytest.mark.parametrize('method', SLOW)
def test_many_passes_are_told_cancelled_and_taken_up_again(panel, method):
    with held(panel.explorer.model) as (begun, go_on):
        panel.controls['method'].value = method
        assert begun.wait(120)
        assert 'once for every channel, about 56 times' in said(panel) and len(on_screen(panel)) == 1
        assert panel.cancel.layout.display is None and panel.cancel.description == 'Cancel'
        work = panel.computing
        panel.cancel.click()
        go_on.set()
        work.join(120)
    assert panel.cancel.description == 'Compute' and len(on_screen(panel)) == 1
    assert not any(made == method for _, made, _, _ in panel.explorer.made)
    panel.controls['alpha'].value = 0.2
    assert panel.computing is None
    panel.cancel.click()
    panel.wait()
    assert len(on_screen(panel)) == 4 and panel.cancel.layout.display == 'none' and 'raw maximum' in captions(panel)[1]


def test_another_choice_does_not_wait_for_many_passes(panel):
    model, passes = panel.explorer.model, []
    with held(model) as (begun, go_on), watched(model, passes.append):
        panel.controls['method'].value = 'ScoreCAM'
        assert begun.wait(120)
        work = panel.computing
        panel.controls['method'].value = 'GradCAM'
        assert work.is_alive() and len(on_screen(panel)) == 4 and panel.title.value.startswith('GradCAM')
        go_on.set()
        work.join(120)
    assert not work.is_alive() and panel.computing is None and len(on_screen(panel)) == 4
    assert len(passes) <= 2  # of the 7 that ScoreCAM makes


@pytest.mark.parametrize('error', [IndexError, torch.OutOfMemoryError])
def test_a_method_that_fails_in_the_background_is_said_and_can_be_tried_again(panel, error):
    def fails(module, args): raise error('no')
    with panel.explorer.model.register_forward_pre_hook(fails):
        panel.controls['method'].value = 'ScoreCAM'
        panel.wait()
    assert f'ScoreCAM failed with {error.__name__}: no' in said(panel) and len(on_screen(panel)) == 1
    assert panel.cancel.description == 'Compute' and panel.passes.layout.display == 'none' and panel.computing is None
    assert not any(method == 'ScoreCAM' for _, method, _, _ in panel.explorer.made)
    panel.cancel.click()
    panel.wait()
    assert 'failed' not in said(panel) and len(on_screen(panel)) == 4 and 'raw maximum' in captions(panel)[1]


@pytest.mark.parametrize('error', [IndexError, torch.OutOfMemoryError])
def test_a_method_that_fails_at_once_is_said_and_not_kept(panel, error):
    def fails(module, args): raise error('no')
    with panel.explorer.model.register_forward_pre_hook(fails): panel.controls['method'].value = 'EigenCAM'
    assert f'EigenCAM failed with {error.__name__}: no' in said(panel) and len(on_screen(panel)) == 1
    panel.controls['alpha'].value = 0.3
    assert 'failed' not in said(panel) and len(on_screen(panel)) == 4 and 'raw maximum' in captions(panel)[1]


def test_a_model_that_takes_one_image_at_a_time_is_explained(model):
    class OneImage(nn.Module):
        def forward(self, x):
            assert len(x) == 1
            return x
    expected = METHODS['GradCAM'](model, ['layer3'])(inputs()[:1], 'all').raw['layer3']
    model.head.insert(0, OneImage())
    panel = opened(model, IMAGES)
    picked = panel.explorer.pick(View(show='all', order='as in the set'))
    assert len(on_screen(panel)) == 4 and 'raw maximum' in captions(panel)[3]
    assert torch.allclose(panel.explorer.heatmaps(picked, 'GradCAM', ['layer3'])['layer3'].raw['layer3'], expected, atol=1e-6)


# A model of the panel's own

def test_two_panels_and_the_caller_use_one_model_at_the_same_time(model):
    first, second = opened(model, IMAGES), opened(model, IMAGES)
    model.train()
    expected = METHODS['LayerCAM'](model, ['layer3'])(inputs()[:1], 2).raw['layer3']
    with held(first.explorer.model) as (begun, go_on):
        first.controls['method'].value = 'ScoreCAM'
        assert begun.wait(120)
        choose(second, method='LayerCAM', place=2)
        assert len(on_screen(second)) == 4 and all(module.training for module in model.modules())
        assert torch.equal(METHODS['LayerCAM'](model, ['layer3'])(inputs()[:1], 2).raw['layer3'], expected)
        go_on.set()
        first.wait()
    assert len(on_screen(first)) == 4 and all(module.training for module in model.modules())


def test_training_on_while_the_set_is_classified_changes_nothing(model):
    expected = evaluate(model).logits
    with held(model, most=1) as (begun, go_on):
        panel = HeatmapPanel(model, IMAGES)
        assert begun.wait(120)
        with torch.no_grad(): model.head[2].bias[4] += 1
        model.train()
        go_on.set()
        panel.wait()
    assert torch.allclose(panel.explorer.set_logits, expected, atol=1e-5)


def test_a_model_that_cannot_be_copied_is_refused(model):
    model.last = [model.head[2].weight * 2]  # a result with a graph
    with pytest.raises(ValueError, match='the model cannot be copied'): HeatmapPanel(model, IMAGES)


# Models of other kinds

def test_layers_that_run_in_another_order_than_offered():
    class Hourglass(nn.Module):
        "Its last layer of the first grid runs after all others."
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.enter, self.down = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 16, 3, 2, 1)
            self.up, self.linear = nn.Conv2d(24, 8, 3, 1, 1), nn.Linear(8, 10)

        def forward(self, x):
            x = self.enter(x).relu()
            deep = F.interpolate(self.down(x).relu(), scale_factor=2)
            return self.linear(self.up(torch.cat([x, deep], 1)).relu().mean((2, 3)))
    model = Hourglass()
    panel = opened(model, IMAGES, mean=MEAN, std=STD)
    assert panel.view.layers == ('up', 'down')
    picked = panel.explorer.pick(View(show='all', order='as in the set'))
    made = panel.explorer.heatmaps(picked, 'GradCAM', ('up', 'down'))
    expected = METHODS['GradCAM'](model, ['up', 'down'])(inputs()[:1], 'all').raw
    for name in expected: assert torch.allclose(made[name].raw[name], expected[name], atol=1e-6)


def test_a_compiled_model_that_has_run_offers_its_layers(model):
    x = inputs()[:1]
    layers = probe(model, x)[1]
    model.compile(backend='eager')
    with torch.inference_mode(): model(x)
    assert probe(model, x)[1] == layers
    assert len(on_screen(opened(model, IMAGES))) == 4


# More classes than fit a list

@pytest.fixture
def thousand():
    "A panel for a model of 1,000 classes, of which the set has ten."
    model = convolutional()
    model.head[2] = nn.Linear(32, 1000)
    model.card |= {'classes': [*IMAGES.classes, *(f'class {k}' for k in range(10, 1000))]}
    panel = opened(model, IMAGES)
    choose(panel, show='all', order='as in the set', place=6)
    return panel


@pytest.mark.parametrize('method', QUICK + SLOW)
def test_any_of_many_classes_can_be_explained(thousand, method):
    choose(thousand, method=method, alpha=0.35)
    thousand.any_class.value = 700
    thousand.wait()
    asked = METHODS[method](deepcopy(thousand.explorer.model), list(thousand.view.layers))(inputs()[5:6], 700)
    for picture, heatmap, caption in zip(on_screen(thousand)[1:], asked.maps[0], captions(thousand)[1:], strict=True):
        if 'no positive evidence' not in caption:
            assert abs(picture - overlay(IMAGES.images[5], heatmap, 0.35).astype(int)).max() <= 2
    assert thousand.title.value.startswith(f'{method} for class 700')


def test_of_many_classes_the_likeliest_are_listed_and_the_one_explained(thousand):
    picked = thousand.explorer.pick(thousand.view)
    likeliest = picked.logits.topk(10).indices.tolist()
    control = thousand.controls['explain']
    assert [value for _, value in control.options] == ['predicted', 'true', *likeliest]
    other = int(picked.logits.argmin())
    thousand.any_class.value = other
    assert [value for _, value in control.options] == ['predicted', 'true', *likeliest, other] and control.value == other
    share = picked.logits.softmax(0)[other]
    assert f'{share:.1%}' in control.options[-1][0] and thousand.bars.value.count('{background') == 11
    control.value = likeliest[3]
    assert thousand.any_class.value == likeliest[3] == thousand.view.explain and len(control.options) == 12
    control.value = 'true'
    assert thousand.any_class.value is None and thousand.view.explain == 'true'
    assert thousand.snapshot().count('<tr>') == 11 and 'of the likeliest classes' in thousand.snapshot()


def test_one_of_many_classes_costs_one_pass(thousand):
    passes = []
    with watched(thousand.explorer.model, passes.append):
        thousand.any_class.value = 700
        choose(thousand, method='LayerCAM')
        choose(thousand, difference=True)
        assert passes == [1, 1, 1]  # 700 by two methods, the predicted class, and the true one
        thousand.any_class.value = 700
        assert passes == [1, 1, 1]  # kept from before
    choose(thousand, method='EigenCAM')
    with watched(thousand.explorer.model, passes.append): thousand.any_class.value = 3
    assert passes == [1, 1, 1]  # without gradients, every class comes from the same pass


def test_the_difference_of_two_of_many_classes(thousand):
    picked = thousand.explorer.pick(thousand.view)
    def margin(logits): return logits[:, picked.predicted] - logits[:, picked.true]
    for method in ('GradCAM', 'AblationCAM'):
        choose(thousand, method=method, difference=True, alpha=1)
        cam = METHODS[method](deepcopy(thousand.explorer.model), 'layer3')
        raw = cam(inputs()[5:6], margin).raw['layer3'][0]
        drawn = F.interpolate(raw[None, None], (32, 32), mode='bilinear')[0, 0]
        expected = overlay(picked.pixels, (1 + drawn / drawn.abs().max()) / 2, 1, 'RdBu_r').astype(int)
        assert abs(on_screen(thousand)[3] - expected).max() <= 2


def test_the_oldest_heatmaps_make_room(panel):
    explorer, layers = panel.explorer, ('layer3',)
    large = Heatmaps({'layer3': torch.zeros(1).expand(1, 10, 1000, 3000)}, (32, 32), torch.zeros(1, 10), None)  # of 120 MB
    first, second = (explorer.pick(replace(panel.view, place=place)) for place in (1, 2))
    explorer.made = {(key, 'GradCAM', 'layer3', 'all'): large for key in (first.key, 7, 8)}
    explorer.heatmaps(first, 'GradCAM', ('layer2', 'layer3'))
    assert [key for key, *_ in explorer.made] == [first.key, 8, first.key]  # what was asked for stays, though it is older
    explorer.heatmaps(second, 'GradCAM', layers)
    assert {key for key, *_ in explorer.made} == {8, first.key, second.key}


# Bad input

def empty_png(width, height):
    "A valid PNG of one colour, made without an image in memory."
    def chunk(kind, data):
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    compressor = zlib.compressobj(1)
    rows = b''.join(compressor.compress(bytes(1 + width)) for _ in range(height)) + compressor.flush()
    header = struct.pack('>IIBBBBB', width, height, 8, 0, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', rows) + chunk(b'IEND', b'')


@pytest.mark.parametrize('name, content, reason', [
    ('big.png', partial(empty_png, 12_000, 12_000), 'big.png: 12000 x 12000 pixels'),
    ('heavy.png', partial(bytes, 32 * 2**20 + 1), 'heavy.png: has more than'),
    ('notes.png', b'dear diary', 'notes.png: is not a PNG, JPEG or WebP image'),
    ('cut.png', empty_png(64, 64)[:60], 'cut.png: is damaged'),
    ('nothing.png', b'', 'nothing.png: is not a PNG, JPEG or WebP image'),
    ('animated.gif', b'GIF89a', 'animated.gif: is not a PNG, JPEG or WebP image')])
def test_a_file_that_is_no_image_is_refused_by_name(panel, name, content, reason):
    before = on_screen(panel)
    upload(panel, name, content if isinstance(content, bytes) else content())
    assert reason in said(panel) and panel.view.own is None
    assert all((a == b).all() for a, b in zip(before, on_screen(panel), strict=True))
    panel.controls['place'].value = 2
    assert reason not in said(panel) and len(on_screen(panel)) == 4


@pytest.mark.parametrize('format', ['PNG', 'JPEG', 'WEBP'])
def test_an_image_of_ones_own_is_explained(panel, model, format):
    buffer = BytesIO()
    Image.fromarray(IMAGES.images[4]).save(buffer, format)
    for _ in range(2): upload(panel, 'mine', buffer.getvalue())  # the same file can be opened again
    expected = decode(buffer.getvalue())
    assert (on_screen(panel)[0] == expected).all() and captions(panel)[0].startswith('<div') and 'mine<' in captions(panel)[0]
    picked = panel.explorer.pick(panel.view)
    with torch.no_grad(): assert torch.allclose(picked.logits, model(panel.explorer.input(expected))[0], atol=1e-5)
    assert len(on_screen(panel)) == 4 and panel.thumbs.value is None
    panel.controls['difference'].value = True
    assert 'the true class is not known' in said(panel)
    panel.controls['difference'].value = False
    panel.thumbs.value = 1
    assert panel.view.own is None and len(on_screen(panel)) == 4


def test_an_empty_list_is_said_and_left_again(panel):
    choose(panel, confidence=(0, 0.01), predicted=2)
    assert 'No misclassified image predicted as' in said(panel) and panel.count.value == '0 images'
    assert panel.row.children == () and panel.thumbs.options == ()
    panel.next.click()
    panel.save.click()
    choose(panel, alpha=1, method='LayerCAM')
    choose(panel, confidence=(0, 1), predicted='any')
    assert len(on_screen(panel)) == 4 and 'No misclassified' not in said(panel)


def test_a_missing_class_shifts_no_other(model):
    model.card['classes'] = list(IMAGES.classes)
    kept = np.flatnonzero(IMAGES.labels != 2)
    labels = IMAGES.labels[kept] - (IMAGES.labels[kept] > 2)
    panel = opened(model, ImageSet(IMAGES.images[kept], labels, [c for i, c in enumerate(IMAGES.classes) if i != 2]))
    assert (panel.explorer.true == IMAGES.labels[kept]).all() and panel.explorer.classes == IMAGES.classes
    choose(panel, show='all', true=2)
    assert f'No image of class {IMAGES.classes[2]}' in said(panel)
    panel.controls['true'].value = 'any'
    assert len(on_screen(panel)) == 4


def test_images_of_classes_that_the_model_does_not_know(model):
    model.card['classes'] = [f'kind {i}' for i in range(10)]
    panel = opened(model, IMAGES)
    assert 'The model has no class bar, crescent, cross, disc, hourglass and 5 others; such images' in said(panel)
    assert panel.count.value == '60 images' and len(on_screen(panel)) == 4
    panel.controls['explain'].value = 'true'
    assert 'the true class is not known' in said(panel)


def test_a_card_from_before_the_last_layer_was_replaced(model):
    model.card['classes'] = list(IMAGES.classes)
    model.head[2] = nn.Linear(32, 4)
    panel = opened(model, IMAGES)
    assert len(on_screen(panel)) == 4 and 'class names for' not in ''.join(captions(panel))
    assert panel.explorer.classes == ('class 0', 'class 1', 'class 2', 'class 3')
    assert model.card['classes'] == list(IMAGES.classes)


def test_images_of_unknown_classes_without_finite_logits_are_not_right(model):
    model.card['classes'] = [f'kind {i}' for i in range(10)]
    with torch.no_grad(): model.head[2].bias.fill_(float('nan'))
    panel = opened(model, IMAGES)
    assert panel.view.show == 'wrong' and panel.count.value == '60 images'
    choose(panel, show='right')
    assert panel.count.value == '0 images'


def test_an_image_of_ones_own_needs_a_set_of_square_images(model):
    panel = opened(model, ImageSet(IMAGES.images[:, :24], IMAGES.labels, IMAGES.classes))
    upload(panel, 'mine.png', png(IMAGES.images[4]))
    assert 'mine.png: cannot be shown beside images of 24 x 32 pixels' in said(panel) and panel.view.own is None


def test_no_layer_is_said_and_left_again(panel):
    for box in panel.controls['layers'].values(): box.value = False
    assert 'at least one layer' in said(panel) and len(on_screen(panel)) == 1
    panel.controls['layers']['layer2'].value = True
    assert 'layer2' in captions(panel)[1] and 'at least' not in said(panel)


def test_an_empty_map_gives_its_reason(model):
    with torch.no_grad(): model.head[2].weight.fill_(-1)
    panel = opened(model, IMAGES)
    assert 'no positive evidence' in captions(panel)[3]
    pale = on_screen(panel)[3]
    assert (pale >= 191).all()


def test_a_model_of_nans_can_be_looked_at(model):
    with torch.no_grad(): model.head[2].bias.fill_(float('nan'))
    panel = opened(model, IMAGES)
    assert 'logits are not finite' in said(panel) and len(on_screen(panel)) == 1
    panel.controls['explain'].value = 3
    assert len(on_screen(panel)) == 4
    with torch.no_grad(): model.layer1[0].bias.fill_(float('nan'))
    panel = opened(model, IMAGES)
    panel.controls['explain'].value = 3
    assert 'non-finite' in captions(panel)[1]


def test_a_model_without_convolutions_still_shows_images_and_probabilities():
    panel = opened(nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)), IMAGES, mean=MEAN, std=STD)
    assert 'no layer with a grid of cells' in said(panel) and len(on_screen(panel)) == 1
    assert '%' in panel.controls['explain'].options[5][0]
    choose(panel, show='all', order='as in the set')
    assert (on_screen(panel)[0] == IMAGES.images[0]).all()


@pytest.mark.parametrize('given', [False, True])
def test_images_of_a_size_the_model_cannot_take_can_be_browsed(given):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 62 * 62, 10))
    evaluation = Evaluation(torch.eye(10)[IMAGES.labels], torch.from_numpy(IMAGES.labels)) if given else None
    panel = opened(model, IMAGES, evaluation, MEAN, STD)
    assert 'cannot take images of 32 x 32 pixels' in said(panel)
    choose(panel, show='all', order='as in the set', place=3)
    assert (on_screen(panel)[0] == IMAGES.images[2]).all()
    assert ('%' in panel.controls['explain'].options[5][0]) == given
    upload(panel, 'mine.png', png(IMAGES.images[4]))
    assert 'cannot take images' in said(panel) and (on_screen(panel)[0] == IMAGES.images[4]).all()


def test_whatever_a_model_raises_is_said():
    class Picky(nn.Module):
        def forward(self, x): assert x.shape[-1] == 64, 'wrong image height'
    panel = opened(Picky(), IMAGES, mean=MEAN, std=STD)
    assert 'cannot take images of 32 x 32 pixels: wrong image height' in said(panel) and len(on_screen(panel)) == 1


def test_a_model_that_fails_on_a_batch_is_said(model):
    def fails(module, args):
        if len(args[0]) > 1: raise IndexError('only one at a time')
    model.register_forward_pre_hook(fails)
    panel = opened(model, IMAGES)
    assert 'could not be classified: only one at a time' in said(panel) and panel.progress.layout.display == 'none'
    choose(panel, place=2)
    assert panel.explorer.set_logits is None and (on_screen(panel)[0] == IMAGES.images[1]).all()


def test_images_of_another_size_that_the_model_can_take(model):
    images = shapes(10, seed=0, size=64)
    panel = opened(model, images)
    assert [picture.shape for picture in on_screen(panel)] == 4 * [(64, 64, 3)]
    assert '16 x 16 cells' in captions(panel)[3]


def test_a_failure_is_said_and_the_panel_goes_on(panel, monkeypatch):
    page = panel.explorer.page
    monkeypatch.setattr(panel.explorer, 'page', lambda view: 1 / 0)
    with pytest.raises(ZeroDivisionError): panel.controls['alpha'].value = 0.9
    assert 'ZeroDivisionError' in said(panel)
    monkeypatch.setattr(panel.explorer, 'page', page)
    panel.controls['alpha'].value = 0.8
    assert 'ZeroDivisionError' not in said(panel) and len(on_screen(panel)) == 4


def test_a_std_without_a_mean_is_refused(model):
    del model.card
    with pytest.raises(ValueError, match='no card with mean and std'): HeatmapPanel(model, IMAGES, std=STD)


def test_with_nothing_to_show_it_says_what_to_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match='run `eva9_train --data shapes`'): HeatmapPanel()


def trained(folder, days, launcher=''):
    "A model as `eva9_train --data shapes` leaves it, so many days ago."
    file = folder/'model.safetensors'
    save_model(resnet18(), file, dict(architecture='resnet18', classes=list(IMAGES.classes), mean=MEAN, std=STD, size=32,
                                      command=f'{launcher}eva9_train --data shapes'))
    os.utime(file.with_suffix('.json'), (time.time() - 86400 * days,) * 2)
    return file


def test_with_nothing_given_it_takes_cifar10_or_else_the_newest_run(tmp_path, monkeypatch, cache):
    monkeypatch.chdir(tmp_path)
    launched = [('a', 3, ''), ('b', 1, 'torchrun --standalone --nproc-per-node 2 --no-python '), ('c', 2, '')]
    files = [trained(tmp_path/name, days, launcher) for name, days, launcher in launched]
    assert default_source() == ('shapes', files[1].relative_to(tmp_path))
    (cache/'eva_session9'/'cifar-10-batches-py').mkdir(parents=True)
    assert default_source() == ('cifar10', None)


@pytest.mark.skipif('EVA9_CIFAR10' not in os.environ, reason='EVA9_CIFAR10 does not name the folder of CIFAR-10')
def test_with_nothing_given_and_cifar10_there(cache):
    cache.mkdir()
    (cache/'eva_session9').symlink_to(os.environ['EVA9_CIFAR10'], target_is_directory=True)
    model, images = default_model_and_images()
    assert len(images) == 10_000 and model.card['classes'] == list(images.classes)


# Models and images out of the ordinary

def test_images_of_classes_that_the_model_does_not_know_are_classified_too():
    model = convolutional()
    model.head[2] = nn.Linear(32, 2)
    model.card = {'classes': ('ring', 'star'), 'mean': MEAN, 'std': STD}
    panel = opened(model.eval(), IMAGES)
    assert panel.explorer.set_logits.shape == (60, 2) and 'could not be classified' not in said(panel)
    assert (panel.explorer.table.true >= 0).sum() == 12  # six rings and six stars


def test_maps_are_those_of_gradcam_where_batch_norm_looks_at_the_batch():
    model = convolutional()
    for stage in list(model)[:3]: stage[1] = nn.BatchNorm2d(stage[1].num_features, track_running_stats=False)
    explorer, picked = Explorer(model.eval(), IMAGES), None
    view = View(show='all', order='as in the set', layers=('layer1', 'layer2'))
    picked = explorer.pick(view)
    found = explorer.heatmaps(picked, 'GradCAM', view.layers)
    for name, expected in METHODS['GradCAM'](explorer.model, list(view.layers))(inputs()[:1], 'all').raw.items():
        assert torch.allclose(found[name].raw[name], expected, atol=1e-6)


def test_no_class_is_marked_where_two_are_compared(panel, model):
    explorer = panel.explorer
    wrong = replace(panel.view, explain=3)
    assert explorer.page(wrong).explained == 3 and explorer.page(replace(wrong, difference=True)).explained == -1


def test_a_model_whose_card_is_none_is_taken():
    model = convolutional()
    model.card = None
    assert Explorer(model, IMAGES, mean=MEAN, std=STD).classes == IMAGES.classes


def test_long_names_that_shorten_alike_are_told_apart():
    alike = [f"Hound's tongue, form {k}, of the mountains" for k in range(10)]
    assert len({text for text, _ in _class_options(None, alike, [0.1] * 10, range(10))}) == 12


def test_a_view_of_a_very_flat_image_can_be_saved():
    page = Page('', 'flat', ((png(np.zeros((1, 300, 3), np.uint8)), 'a line'),))
    assert decode(view_png(page)).shape[1] > 300
