"`eva9_explain` on photographs: those that matplotlib ships, in the formats and modes that people have."
import json, os, shutil, subprocess, sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from eva_session9.cli import eva9_explain
from eva_session9.data import read_image, shapes
from eva_session9.engine import Evaluation
from eva_session9.models.resnet import resnet18
from eva_session9.save_load import save_model
from eva_session9.visual import plot_heatmaps

SAMPLES = matplotlib.get_data_path()
PHOTOGRAPH, DRAWING = f'{SAMPLES}/sample_data/grace_hopper.jpg', f'{SAMPLES}/sample_data/Minduka_Present_Blue_Pack.png'


def explained(folder): return json.loads((folder / 'heatmaps.json').read_text())


def close(a, b):
    "The same prediction, the probability within half a percent."
    return a['predicted'] == b['predicted'] and abs(a['probability'] - b['probability']) < 0.005


@pytest.mark.parametrize('arguments, said', [(['a.png', 'b.png'], 'files tried: 2'), (['--data', 'nowhere'], "--data: found 'nowhere'")])
def test_the_command_takes_many_files_or_none(arguments, said, tmp_path):
    done = subprocess.run([Path(sys.executable).parent / 'eva9_explain', *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and said in done.stderr


def test_photograph_by_several_methods(tmp_path):
    for method, layers in [('GradCAM', 'layer2,layer3,layer4'), ('LayerCAM', 'layer3'), ('EigenCAM', 'layer2,layer4')]:
        assert not eva9_explain(PHOTOGRAPH, DRAWING, method=method, layers=layers, out=str(tmp_path / method))
        hopper, present = explained(tmp_path / method)
        assert hopper['image'] == PHOTOGRAPH and present['image'] == DRAWING
        assert list(hopper['layers']) == layers.split(',') and 0.1 <= hopper['probability'] <= 1
        assert {found['status'] for found in hopper['layers'].values()} <= {'ok', 'no positive evidence'}
        with Image.open(tmp_path / method / 'heatmaps.png') as sheet: assert min(sheet.size) > 200


def test_two_methods_side_by_side(tmp_path):
    for method in ('GradCAM', 'EigenCAM', 'GradCAM,EigenCAM'):
        assert not eva9_explain(PHOTOGRAPH, method=method, layers='layer3,layer4', out=str(tmp_path / method))
    grad, eigen, both = (explained(tmp_path / method)[0]['layers'] for method in ('GradCAM', 'EigenCAM', 'GradCAM,EigenCAM'))
    assert both == {f'{name} {layer}': value for name, one in (('GradCAM', grad), ('EigenCAM', eigen)) for layer, value in one.items()}


def test_every_mode_says_the_same(tmp_path, capsys):
    photograph = Image.open(PHOTOGRAPH)
    folder = tmp_path / 'photographs'
    folder.mkdir()
    photograph.save(folder / 'a.png')
    photograph.save(folder / 'b.webp', lossless=True)
    photograph.convert('RGBA').save(folder / 'c.png')
    photograph.convert('CMYK').save(folder / 'd.jpg', quality=100, subsampling=0)
    turned, exif = photograph.transpose(Image.Transpose.ROTATE_90), Image.Exif()
    exif[0x0112] = 6  # what a camera held upright writes: turn by 90 degrees clockwise to see it
    turned.save(folder / 'e.png', exif=exif)
    assert not eva9_explain(str(folder), out=str(tmp_path / 'out'))
    plain, webp, transparent, cmyk, turned = explained(tmp_path / 'out')
    assert all(close(plain, other) for other in (webp, transparent, turned)), [plain, webp, transparent, turned]
    apart = abs(read_image(cmyk['image']).astype(int) - read_image(plain['image']))
    assert apart.mean() < 3, apart.mean()  # JPEG loses a little, which may turn a doubtful answer
    assert 'shorter side resized to 32 pixels and cropped to the centre' in capsys.readouterr().err


def test_gray_and_palette_photographs(tmp_path):
    photograph = Image.open(PHOTOGRAPH)
    photograph.convert('L').save(tmp_path / 'gray.png')
    photograph.convert('P').save(tmp_path / 'palette.png')
    photograph.convert('1').save(tmp_path / 'bits.png')
    assert not eva9_explain(*map(str, sorted(tmp_path.glob('*.png'))), layers='layer4', out=str(tmp_path / 'out'))
    assert [entry['image'].split('/')[-1] for entry in explained(tmp_path / 'out')] == ['bits.png', 'gray.png', 'palette.png']
    for name, mode in (('gray', 'L'), ('palette', 'P'), ('bits', '1')):
        assert (read_image(tmp_path / f'{name}.png') == np.asarray(photograph.convert(mode).convert('RGB'))).all(), name


def test_bad_files_are_named_and_the_rest_goes_on(tmp_path, capsys):
    whole = open(PHOTOGRAPH, 'rb').read()
    (tmp_path / 'cut.jpg').write_bytes(whole[:len(whole) // 2])
    (tmp_path / 'text.png').write_text('not an image')
    (tmp_path / 'vector.svg').write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
    (tmp_path / '.hidden').write_text('not looked at')
    (tmp_path / 'whole.jpg').write_bytes(whole)
    with Image.new('1', (5000, 5000)) as large: large.save(tmp_path / 'large.png')
    unnameable = str(tmp_path / ('a' * 300))
    assert eva9_explain(str(tmp_path), str(tmp_path / 'absent.png'), unnameable, layers='layer4', out=str(tmp_path / 'out')) == 1
    said = capsys.readouterr().err
    for name in ('cut.jpg', 'text.png', 'vector.svg', 'large.png', 'absent.png', unnameable):
        assert f'{name}' in said, name
    assert '.hidden' not in said and said.count('skipped') == 6
    assert [entry['image'] for entry in explained(tmp_path / 'out')] == [str(tmp_path / 'whole.jpg')]


def test_a_folder_with_many_becomes_several_sheets(tmp_path):
    with Image.open(PHOTOGRAPH) as photograph:
        for i in range(21): photograph.crop((5 * i, 5 * i, 5 * i + 400, 5 * i + 400)).resize((40, 40)).save(tmp_path / f'{i:02}.png')
    assert not eva9_explain(str(tmp_path), layers='layer4', out=str(tmp_path / 'out'))
    assert len(explained(tmp_path / 'out')) == 21
    (tmp_path / 'out' / 'heatmaps-mine.png').touch()
    assert sorted(path.name for path in (tmp_path / 'out').glob('*.png')) == ['heatmaps-2.png', 'heatmaps-mine.png', 'heatmaps.png']
    assert not eva9_explain(str(tmp_path / '00.png'), layers='layer4', out=str(tmp_path / 'out'))
    assert sorted(path.name for path in (tmp_path / 'out').glob('*.png')) == ['heatmaps-mine.png', 'heatmaps.png']


def test_a_sheet_of_many_methods_and_layers_has_fewer_rows(tmp_path):
    methods = 'GradCAM,HiResCAM,XGradCAM'
    layers = ','.join(f'layer{i}.{j}.conv{k}' for i in (2, 3, 4) for j in (0, 1) for k in (1, 2))
    with Image.open(PHOTOGRAPH) as photograph:
        for i in range(11): photograph.resize((40, 40)).save(tmp_path / f'{i:02}.png')
    assert not eva9_explain(str(tmp_path), method=methods, layers=layers, out=str(tmp_path / 'out'))
    assert len(explained(tmp_path / 'out')) == 11  # 36 maps an image, so ten images a figure
    assert sorted(path.name for path in (tmp_path / 'out').glob('*.png')) == ['heatmaps-2.png', 'heatmaps.png']


@pytest.mark.parametrize('bias', [[torch.nan] * 10, [-torch.inf] + [0] * 9])
def test_a_model_that_says_nothing_is_not_quoted(bias, tmp_path):
    model = resnet18()
    with torch.no_grad(): model.fc.bias.copy_(torch.tensor(bias))
    card = dict(architecture='resnet18', classes=list('abcdefghij'), mean=[0.5] * 3, std=[0.2] * 3, size=32)
    save_model(model, tmp_path / 'model.safetensors', card)
    assert not eva9_explain(PHOTOGRAPH, weights=str(tmp_path / 'model.safetensors'), layers='layer4', out=str(tmp_path / 'out'))
    entry, = json.loads((tmp_path / 'out' / 'heatmaps.json').read_text(), parse_constant=pytest.fail)
    assert entry['predicted'] is None and entry['probability'] is None


@pytest.mark.skipif(sys.platform != 'linux', reason='file names of arbitrary bytes')
def test_a_file_name_that_is_no_text(tmp_path):
    name = os.fsdecode(os.fsencode(tmp_path) + b'/caf\xe9.jpg')
    shutil.copy(PHOTOGRAPH, name)
    assert not eva9_explain(name, layers='layer3, layer4', out=str(tmp_path / 'out'))
    entry, = explained(tmp_path / 'out')
    assert entry['image'] == name and list(entry['layers']) == ['layer3', 'layer4']


def test_a_folder_of_class_folders_is_sent_elsewhere(tmp_path, capsys):
    (tmp_path / 'photographs' / 'cat').mkdir(parents=True)
    with pytest.raises(SystemExit): eva9_explain(str(tmp_path / 'photographs'), out=str(tmp_path / 'out'))
    assert 'for a folder with one subfolder per class: --data' in capsys.readouterr().err


@pytest.mark.parametrize('flags, said', [
    ({'method': 'GradCam'}, "found 'GradCam', expected one of CAM, GradCAM"),
    ({'layers': 'layer9'}, "no layer 'layer9'; choose one of its layers, such as layer"),
    ({'method': 'CAM', 'layers': 'layer2'}, 'not followed by a spatial mean')])
def test_wrong_flags_are_one_line(flags, said, capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped: eva9_explain(PHOTOGRAPH, out=str(tmp_path / 'out'), **flags)
    assert stopped.value.code == 2 and not (tmp_path / 'out').exists()
    lines = capsys.readouterr().err.strip().splitlines()
    assert said in lines[-1] and lines[-1].startswith('eva9_explain: ')


def test_the_photograph_is_read_as_it_is():
    pixels = read_image(PHOTOGRAPH)
    assert pixels.shape == (600, 512, 3) and pixels[300, 256].tolist() == list(Image.open(PHOTOGRAPH).getpixel((256, 300)))


@pytest.mark.parametrize('mistakes', [0, 3])
def test_a_model_without_mistakes_is_explained_too(mistakes, tmp_path, monkeypatch, capsys):
    images = shapes(12, seed=1)
    mean, std = images.stats()
    card = dict(architecture='resnet18', classes=images.classes, mean=mean, std=std, size=32)
    save_model(resnet18(), tmp_path / 'model.safetensors', card)
    labels = torch.from_numpy(images.labels)
    said = torch.where(torch.arange(12) < mistakes, (labels + 1) % 10, labels)
    evaluation = Evaluation(torch.arange(1, 13)[:, None] * torch.eye(10)[said], labels)
    monkeypatch.setattr('eva_session9.engine.test', lambda model, batches: evaluation)
    beside = []
    monkeypatch.setattr('eva_session9.visual.plot_heatmaps', lambda *given: beside.extend(given[2]) or plot_heatmaps(*given))
    assert not eva9_explain(weights=str(tmp_path / 'model.safetensors'), data='shapes', limit=12, out=str(tmp_path / 'out'))
    entries = explained(tmp_path / 'out')
    assert [entry['image'] for entry in entries] == [f'test image {i}' for i in (range(8) if not mistakes else (2, 1, 0))]
    assert [label.split('\n')[0] for label in beside] == [f"true: {entry['true']}" for entry in entries]
    assert f'misclassified: {mistakes} of 12 test images' in capsys.readouterr().err
