"What the commands say before they work, and when they cannot."
import io, json, os, re, subprocess, sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

from eva_session9.cli import (_command, _config, _draw, _launcher, _panel, _panel_source, _print, _sets,
                              eva9_explain, eva9_find_lr, eva9_summary, eva9_train)
from eva_session9.lr_finder import LRCurve
from eva_session9.models.resnet import resnet18
from eva_session9.save_load import load_model, pretrained, save_model

COMMANDS = 'eva9_train', 'eva9_find_lr', 'eva9_explain', 'eva9_summary', 'eva9_panel'


def test_the_commands_load_without_torch():
    code = 'import sys, eva_session9.cli; print("torch" in sys.modules)'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.stdout.strip() == 'False', done.stderr


@pytest.mark.parametrize('command', COMMANDS)
def test_help_says_what_each_flag_is_for(command):
    done = subprocess.run([Path(sys.executable).parent / command, '--help'], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    flags = [line for line in done.stdout.splitlines() if line.strip().startswith('--')]
    assert flags and all(re.sub(r'--\S+|\(\w+\)|\(default:.*', '', line).strip() for line in flags), done.stdout


@pytest.mark.parametrize('text, said', [
    ('{"lr": 0.1', 'Expecting'), ('[]', 'found list, expected an object'), ('{"learning_rate": 0.1}', 'learning_rate'),
    ('{"lr": -1}', 'Config.lr: found -1')])
def test_a_bad_recipe_is_named(text, said, tmp_path, capsys):
    recipe = tmp_path / 'mine.json'
    recipe.write_text(text)
    with pytest.raises(SystemExit) as stopped: eva9_train(config=str(recipe), out=str(tmp_path / 'out'))
    line, = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and line.startswith(f'eva9_train: --config {recipe}: ') and said in line


@pytest.mark.parametrize('size', [0, -1])
def test_an_impossible_size_is_one_line(size, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped: eva9_summary(size=size, out=str(tmp_path))
    assert stopped.value.code == 2 and f'found (3, {size}, {size})' in capsys.readouterr().err


def test_two_processes_train_as_one(tmp_path):
    (tmp_path / 'mine.json').write_text('{"batch_size": 8, "epochs": 1, "precision": "fp32", "sizes": [16]}')
    command = ['eva9_train', '--data', 'shapes', '--config', 'mine.json', '--limit', '32']
    launcher = ['torchrun', '--standalone', '--nproc-per-node', '2', '--no-python']
    scripts = Path(sys.executable).parent
    done = subprocess.run([scripts / launcher[0], *launcher[1:], scripts / command[0], *command[1:]],
                          cwd=tmp_path, capture_output=True, text=True, env={**os.environ, 'CUDA_VISIBLE_DEVICES': ''})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('test accuracy') == 1
    record = json.loads((tmp_path / 'eva9-train' / 'history.json').read_text())
    assert record['command'].split() == launcher + command and record['hardware'].startswith('2 x ')


def test_fewer_epochs_than_sizes_use_the_last_sizes():
    with pytest.warns(UserWarning, match='of the 3 sizes of images, only the last 2 are used'): recipe = _config('laptop', 2)
    assert (recipe.epochs, recipe.sizes) == (2, (24, 32))
    assert _config('laptop', 9).sizes == (16, 24, 32)
    with pytest.raises(ValueError, match='Config.epochs: found 0'): _config('laptop', 0)


@pytest.mark.parametrize('hardware, launcher', [
    ('2 x AMD EPYC, 1 threads', 'torchrun --standalone --nproc-per-node 2 --no-python '), ('AMD EPYC, 2 threads', '')])
def test_the_command_starts_as_many_processes_as_the_record_has(hardware, launcher): assert _launcher(hardware) == launcher


def test_what_a_terminal_cannot_show_is_a_question_mark(tmp_path, monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(written, 'ascii', write_through=True))
    _print('bl\u00fcmchen \udce4')
    _draw([('first', Mock()), ('second', Mock())], tmp_path / '\u00fc')
    assert written.getvalue().splitlines() == [b'bl?mchen ?', *(f'{tmp_path}/?/{name}.png'.encode() for name in ('first', 'second'))]


def test_training_can_begin_with_the_librarys_own_model(tmp_path, capsys):
    (tmp_path / 'mine.json').write_text('{"batch_size": 8, "epochs": 1, "precision": "fp32", "lr": 1e-12}')
    eva9_train(config=str(tmp_path / 'mine.json'), limit=16, pretrained=True, resume=True, out=str(tmp_path / 'run'))
    said = capsys.readouterr().err
    assert 'run holds no run yet, so a new one begins' in said and 'training steps in all' not in said
    trained = load_model(tmp_path / 'run' / 'model.safetensors')
    torch.testing.assert_close(trained.layer4[1].conv2.weight, pretrained().layer4[1].conv2.weight)
    assert trained.card['command'].endswith('--pretrained --limit 16')
    (tmp_path / 'mine.json').write_text('{"architecture": "resnet34"}')
    with pytest.raises(SystemExit): eva9_train(config=str(tmp_path / 'mine.json'), limit=16, pretrained=True, out=str(tmp_path / 'other'))
    assert "Config.pretrained: found architecture 'resnet34', expected 'resnet18'" in capsys.readouterr().err
    (tmp_path / 'mine.json').write_text('{"batch_size": 8, "epochs": 1, "precision": "fp32", "lr": 1e-12}')
    with pytest.raises(SystemExit): eva9_train(config=str(tmp_path / 'mine.json'), limit=16, resume=True, out=str(tmp_path / 'run'))
    assert 'pretrained was True, is False' in capsys.readouterr().err


@pytest.fixture
def swept(monkeypatch):
    "What each sweep was given; a curve that falls and rises takes its place."
    calls, lrs = [], np.geomspace(1e-5, 1, 100)
    def sweep(*given, **options):
        calls.append(given)
        return LRCurve(lrs.tolist(), ((np.log10(lrs) + 2) ** 2).tolist(), config=given[2])
    monkeypatch.setattr('eva_session9.lr_finder.find_lr', sweep)
    return calls


def test_the_suggested_command_repeats_the_data(tmp_path, capsys, swept):
    out = tmp_path / 'two words'
    eva9_find_lr(data='shapes', limit=32, out=str(out))
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.endswith(f"eva9_train --data shapes --config '{out}/recipe.json' --limit 32")


def test_a_sweep_can_begin_with_the_librarys_own_model(tmp_path, swept):
    eva9_find_lr(data='shapes', pretrained=True, limit=32, out=str(tmp_path))
    (model, _, recipe), = swept
    assert recipe.pretrained and torch.equal(model.conv1.weight, pretrained().conv1.weight)
    assert json.loads((tmp_path / 'recipe.json').read_text())['pretrained']
    command = json.loads((tmp_path / 'find_lr.json').read_text())['command']
    assert command.endswith('--pretrained --start 1e-05 --end 1.0 --steps 100 --limit 32')


@pytest.mark.parametrize('config, hinted', [('session9', False), ('laptop', True)])
def test_where_the_rate_falls_to_zero_a_higher_one_is_hinted_at(config, hinted, tmp_path, capsys, swept):
    eva9_find_lr(data='shapes', config=config, limit=32, out=str(tmp_path))
    assert ('up to three times the suggested one' in capsys.readouterr().out) == hinted


def test_rates_that_are_swept_together_are_suggested_together(tmp_path, swept):
    recipe = tmp_path / 'mine.json'
    recipe.write_text('{"lr": 0.1, "muon_lr": 0.05}')
    eva9_find_lr(data='shapes', config=str(recipe), limit=32, out=str(tmp_path))
    found = json.loads((tmp_path / 'recipe.json').read_text())
    assert found['lr'] != 0.1 and found['muon_lr'] == pytest.approx(found['lr'] / 2)


def test_a_folder_is_read_as_the_model_was_trained(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))  # where the panel keeps logits
    folder, weights = tmp_path / 'two words', tmp_path / 'model.safetensors'
    for name in ('one', 'two'):
        (folder / name).mkdir(parents=True)
        for i in range(5): Image.fromarray(np.full((48, 48, 3), 40 * i, np.uint8)).save(folder / name / f'{i}.png')
    assert {images.images.shape[1:3] for images in _sets(str(folder), size=48)} == {(48, 48)}
    card = {'architecture': 'resnet18', 'classes': ['one', 'two'], 'mean': [0.5] * 3, 'std': [0.2] * 3, 'size': 48,
            'command': _command('eva9_train', str(folder), 'fast')}
    save_model(resnet18(2), weights, card)
    assert _panel_source(None, str(weights)) == (str(folder), str(weights))
    panel = _panel(str(folder), None, str(weights), None)
    panel.wait()
    assert panel.explorer.images.images.shape[1:3] == (48, 48)
    eva9_explain(data=str(folder), weights=str(weights), out=str(tmp_path / 'out'))
    assert json.loads((tmp_path / 'out' / 'heatmaps.json').read_text())
    folder.rename(tmp_path / 'elsewhere')
    with pytest.raises(ValueError, match='there is no such folder here; give --data'): _panel_source(None, str(weights))
