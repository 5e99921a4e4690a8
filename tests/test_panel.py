"The panel, driven from Python: what a person chooses arrives, as the right pixels and words, and nothing breaks it."
import re
from base64 import b64decode
from dataclasses import fields
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from eva_session9.data import ImageSet, shapes
from eva_session9.engine import Evaluation
from eva_session9.gradcam import METHODS
from eva_session9.panel import HeatmapPanel, View
from eva_session9.preprocessing import loader, test_transforms as transforms
from eva_session9.visual import overlay

IMAGES = shapes(40, seed=3)
MEAN, STD = IMAGES.stats()


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


def decode(blob): return np.asarray(Image.open(BytesIO(blob)).convert('RGB'))
def on_screen(panel): return [decode(box.children[0].value) for box in panel.row.children]
def captions(panel): return [box.children[1].value for box in panel.row.children]
def small(picture): return picture[3::7, 3::7]


@pytest.fixture
def model(): return convolutional()

@pytest.fixture
def panel(model): return HeatmapPanel(model, IMAGES)


def test_opens_on_the_surest_mistake(panel, model):
    evaluation = evaluate(model)
    surest = evaluation.misclassified[0]
    assert panel.view == View(layers=('layer1', 'layer2', 'layer3'))
    assert torch.allclose(panel.evaluation.logits, evaluation.logits, atol=1e-5)
    assert (small(on_screen(panel)[0]) == IMAGES.images[surest]).all()
    assert f'image {surest}<' in captions(panel)[0]
    assert f'of {len(evaluation.misclassified)}' == panel.count.value


@pytest.mark.parametrize('method', ['GradCAM', 'GradCAM++', 'LayerCAM', 'EigenCAM'])
def test_the_screen_shows_what_was_chosen(panel, model, method):
    chosen = {'method': method, 'explain': 4, 'alpha': 0.35, 'show': 'all', 'place': 6}
    for name, value in chosen.items(): panel.controls[name].value = value
    panel.controls['layers']['layer1'].value = False
    assert panel.view == View(**chosen, layers=('layer2', 'layer3'))
    heatmaps = METHODS[method](model, ['layer2', 'layer3'])(inputs()[5:6], 4)
    image, *shown = on_screen(panel)
    assert (small(image) == IMAGES.images[5]).all()
    for picture, heatmap, caption, name in zip(shown, heatmaps.maps[0], captions(panel)[1:], heatmaps.layers, strict=True):
        expected = overlay(IMAGES.images[5], heatmap, 0.35).astype(int)
        assert abs(small(picture) - expected).max() <= 1  # a class alone and all together may differ in the last bit
        assert name in caption and '{} x {} cells'.format(*heatmaps.grid[name]) in caption
        assert f'raw maximum {heatmaps.raw[name].max():.3g}' in caption


def test_class_and_opacity_need_no_pass_through_the_network(panel, model):
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    before = on_screen(panel)
    for name, value in [('explain', 3), ('alpha', 0.9), ('explain', 'true'), ('alpha', 0.1)]: panel.controls[name].value = value
    assert not passes
    assert all((a != b).any() for a, b in zip(before[1:], on_screen(panel)[1:]))
    panel.next.click()
    assert len(passes) == 1
    panel.previous.click()
    assert len(passes) == 1


@pytest.mark.parametrize('method', METHODS)
def test_no_method_breaks_the_panel(panel, method):
    panel.controls['method'].value = method
    assert panel.message.value if method == 'CAM' else len(on_screen(panel)) == 4
    panel.controls['method'].value = 'GradCAM'
    assert len(on_screen(panel)) == 4 and not panel.message.value


def test_another_list_begins_at_its_first_image_and_ends_at_its_last(panel):
    panel.controls['show'].value = 'all'
    panel.controls['place'].value = 40
    panel.next.click()
    assert panel.view.place == 40
    panel.controls['label'].value = 7
    members = np.flatnonzero(IMAGES.labels == 7)
    assert panel.view.place == 1 and panel.controls['place'].max == len(members)
    panel.previous.click()
    assert panel.view.place == panel.controls['place'].value == 1
    for index in members:
        assert (small(on_screen(panel)[0]) == IMAGES.images[index]).all()
        panel.next.click()
    assert panel.view.place == len(members)


def test_a_choice_draws_once(panel, monkeypatch):
    panel.next.click()
    pages, page = [], panel.page
    monkeypatch.setattr(panel, 'page', lambda: pages.append(page()) or pages[-1])
    panel.controls['label'].value = 3
    assert len(pages) == 1


def test_a_class_without_images_is_said_and_left_again(model):
    images = IMAGES.subset(IMAGES.labels != 2)
    panel = HeatmapPanel(model, images)
    panel.controls['show'].value = 'all'
    panel.controls['label'].value = 2
    assert f'No image of class {images.classes[2]}' in panel.message.value
    assert panel.row.children == () and panel.count.value == 'of 0'
    panel.next.click()
    panel.controls['alpha'].value = 1
    panel.controls['label'].value = 'any'
    assert len(on_screen(panel)) == 4 and not panel.message.value


def test_no_layer_is_said_and_left_again(panel):
    for box in panel.controls['layers'].values(): box.value = False
    assert 'at least one layer' in panel.message.value and len(on_screen(panel)) == 1
    panel.controls['layers']['layer2'].value = True
    assert 'layer2' in captions(panel)[1] and not panel.message.value


def test_an_empty_map_gives_its_reason(model):
    with torch.no_grad(): model.head[2].weight.fill_(-1)
    assert 'no positive evidence' in captions(HeatmapPanel(model, IMAGES))[3]


def test_a_model_of_nans_can_be_looked_at(model):
    with torch.no_grad(): model.head[2].bias.fill_(float('nan'))
    panel = HeatmapPanel(model, IMAGES)
    assert 'not finite' in panel.bars.value
    with torch.no_grad(): model.layer1[0].bias.fill_(float('nan'))
    assert 'non-finite' in captions(HeatmapPanel(model, IMAGES))[1]


def test_names_are_escaped(model):
    classes = ('<img src=x onerror=alert(1)>', '"&\'', *IMAGES.classes[2:])
    images = ImageSet(IMAGES.images, IMAGES.labels, classes)
    panel = HeatmapPanel(model, images)
    for label in (0, 1):
        panel.controls['explain'].value = label
        panel.controls['show'].value, panel.controls['label'].value = 'all', label
        html = ''.join([panel.snapshot(), panel.message.value, panel.title.value, panel.bars.value, *captions(panel)])
        assert '<img src=x' not in html and '"&\'' not in html and '"&amp;\'' not in panel.snapshot()
        assert '&lt;img src=x onerror' in panel.snapshot()
    panel = HeatmapPanel(model, images.subset(images.labels != 0))
    panel.controls['label'].value = 0
    assert '&lt;img src=x' in panel.message.value and '<img src=x' not in panel.message.value + panel.snapshot()


def test_a_snapshot_holds_what_the_screen_shows(panel):
    snapshot = panel.snapshot()
    stored = [decode(b64decode(blob)) for blob in re.findall(r'data:image/png;base64,([^"]+)"', snapshot)]
    assert all((a == b).all() for a, b in zip(stored, on_screen(panel), strict=True))
    assert panel.bars.value in snapshot and panel.title.value in snapshot and snapshot._repr_html_() == snapshot
    assert not re.search(r'<script|https?:|<link', snapshot)
    assert 'application/vnd.jupyter.widget-view+json' in panel._repr_mimebundle_()


def test_a_given_evaluation_is_not_made_again(model):
    evaluation, batches = evaluate(model), []
    model.register_forward_hook(lambda _, args, __: batches.append(len(args[0])))
    assert HeatmapPanel(model, IMAGES, evaluation).evaluation is evaluation
    assert set(batches) == {1}


def test_the_model_is_left_as_it_was(model):
    model.layer2.train()
    flags = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    panel = HeatmapPanel(model, IMAGES)
    panel.next.click()
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_without_convolutions_still_shows_images_and_probabilities():
    panel = HeatmapPanel(nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)), IMAGES, mean=MEAN, std=STD)
    assert 'no layer with a grid of cells' in panel.message.value and panel.bars.value and len(on_screen(panel)) == 1
    panel.controls['show'].value = 'all'
    assert (small(on_screen(panel)[0]) == IMAGES.images[0]).all()


@pytest.mark.parametrize('given', [False, True])
def test_images_of_a_size_the_model_cannot_take_can_be_browsed(given):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 62 * 62, 10))
    evaluation = Evaluation(torch.eye(10)[IMAGES.labels], torch.from_numpy(IMAGES.labels)) if given else None
    panel = HeatmapPanel(model, IMAGES, evaluation, MEAN, STD)
    assert 'cannot take images of 32 x 32 pixels' in panel.message.value
    panel.controls['show'].value, panel.controls['place'].value = 'all', 3
    assert (small(on_screen(panel)[0]) == IMAGES.images[2]).all() and bool(panel.bars.value) == given


def test_images_of_another_size_that_the_model_can_take(model):
    images = shapes(10, seed=0, size=64)
    panel = HeatmapPanel(model, images)
    assert [picture.shape for picture in on_screen(panel)] == 4 * [(192, 192, 3)]
    assert '16 x 16 cells' in captions(panel)[3]


def test_what_cannot_be_right_is_refused(model):
    with pytest.raises(ValueError, match='of 40 images, the set has 9'):
        HeatmapPanel(model, IMAGES.subset(range(9)), evaluate(model))
    with pytest.raises(ValueError, match='the model has 3 classes, the images have 10'):
        HeatmapPanel(nn.Sequential(nn.Flatten(), nn.Linear(3072, 3)), IMAGES, mean=MEAN, std=STD)
    del model.card
    with pytest.raises(ValueError, match='no card with mean and std'): HeatmapPanel(model, IMAGES, std=STD)


def test_every_choice_has_a_control(panel):
    assert {field.name for field in fields(View)} == set(panel.controls)
