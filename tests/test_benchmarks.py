"What the benchmarks compute, without what takes them hours."
import builtins, dis, json, shlex, sys
from dataclasses import asdict, replace
from pathlib import Path
from runpy import run_path
from types import CodeType

import pytest
import torch
from torch import nn

from eva_session9.config import Config, config_from
from eva_session9.data import shapes

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / 'benchmarks'))

import ablate
from ablate import COURSE, WHOLE, asked_for, compared, halved, variants
from cam_study import keep
import networks
import reproduce
from reproduce import changed, held_out, looks, summary


def code_in(code):
    "The code and all that is defined in it."
    yield code
    for part in code.co_consts:
        if isinstance(part, CodeType): yield from code_in(part)


@pytest.mark.parametrize('path', sorted((ROOT / 'benchmarks').glob('*.py')), ids=lambda path: path.name)
def test_every_name_that_a_benchmark_uses_is_defined(path):
    known = run_path(path) | vars(builtins)  # by its path, as tools/ has a docs.py too
    found = {step.argval for code in code_in(compile(path.read_text(), path.name, 'exec'))
             for step in dis.get_instructions(code) if step.opname == 'LOAD_GLOBAL'}
    assert found <= known.keys(), found - known.keys()


def test_no_image_is_both_trained_on_and_held_out():
    images = shapes(50)
    kept, out = held_out(images, 10)
    assert (len(kept), len(out)) == (40, 10)
    assert {image.tobytes() for part in (kept, out) for image in part.images} == {image.tobytes() for image in images.images}
    with pytest.raises(SystemExit, match='expected 1 to 49'): held_out(images, 50)


def test_the_interval_is_that_of_students_t():
    found = summary([0.90, 0.92, 0.94])
    assert (found['mean'], found['sd'], found['min'], found['n']) == (0.92, 0.02, 0.90, 3)
    assert found['interval95'] == pytest.approx([0.92 - 4.3027 * 0.02 / 3**0.5, 0.92 + 4.3027 * 0.02 / 3**0.5], abs=1e-4)
    assert 'interval95' not in summary([0.9])


def test_two_and_six_views_are_the_means_they_say():
    x = torch.rand(1, 1, 8, 8)
    found = {way: logits.view(8, 8) for way, logits in looks(nn.Flatten(), x, 'fp32').items()}
    pixel = x[0, 0]
    def both(row, column, mirrored): return (pixel[row, column] + pixel[row, mirrored]) / 2
    assert found['flip'][3, 4] == both(3, 4, 3)
    assert torch.isclose(found['six views'][3, 4], both(3, 4, 3) / 2 + both(2, 3, 2) / 4 + both(4, 5, 4) / 4)


def test_differences_come_with_the_spread_of_all_and_hold_together():
    runs = {WHOLE: (0.90, 0.92), 'x': (0.80, 0.82), 'y': (0.91, 0.93)}
    found = compared({name: [{'accuracy': value} for value in values] for name, values in runs.items()})['variants']
    assert (found['x']['difference'], found['y']['difference']) == pytest.approx((-0.10, 0.01))
    assert found['x']['half_width'] == pytest.approx(4.1765 * 0.0002**0.5, abs=1e-4)  # t at 0.05 / 2 for two differences, 3 degrees
    diverged = compared({WHOLE: [{'accuracy': 0.9}], 'x': [{'accuracy': None}]})
    assert diverged['always_diverged'] == ['x'] and 'half_width' not in diverged['variants'][WHOLE]


def test_a_series_that_is_cut_keeps_its_seeds_and_the_command_that_repeats_them(tmp_path, monkeypatch):
    def one_run(config, *_):
        if config.seed == 44: raise KeyboardInterrupt
        return {'accuracy': {'plain': 0.5}, 'seconds': 1.0, 'seconds_to_test': 0.1, 'hardware': 'none'}
    monkeypatch.setattr(reproduce, 'one_run', one_run)
    monkeypatch.setattr(sys, 'argv', f'reproduce.py --data shapes --limit 20 --seeds 5 --out {tmp_path}/seeds.json'.split())
    with pytest.raises(KeyboardInterrupt): reproduce.main()
    part, = tmp_path.iterdir()
    kept = json.loads(part.read_text())
    assert part.name == 'seeds.json.part' and kept['n'] == len(kept['runs']) == 2 and '--seeds 2' in kept['command']


@pytest.mark.parametrize('flags, said', [('--seeds 0', 'expected 1 or more'), ('--set seed=7', 'choose how many with --seeds')])
def test_seeds_that_would_not_be_those_on_record_are_refused(flags, said, monkeypatch):
    monkeypatch.setattr(sys, 'argv', f'reproduce.py --data shapes --limit 20 {flags}'.split())
    with pytest.raises(SystemExit, match=said): reproduce.main()


def test_each_variant_changes_one_part():
    config = replace(Config.fast(), epochs=4)
    recipes = variants(config)
    assert recipes[WHOLE] == config and len({json.dumps(asdict(recipe)) for recipe in recipes.values()}) == len(recipes)
    assert 'SGD in place of Muon' in recipes and 'Muon as well' not in recipes
    assert 'Muon as well' in variants(replace(config, muon_lr=0.0))
    assert asked_for(config, ['cutout=8,cutout_p=1', 'muon_lr=0'])['cutout=8,cutout_p=1'] == replace(config, cutout=8, cutout_p=1)
    sizes = 'sizes=[16,32],crop=2'
    assert asked_for(config, [sizes])[sizes] == replace(config, sizes=(16, 32), crop=2)
    assert (recipes[COURSE].batch_size, recipes[COURSE].step_size, recipes[COURSE].lr) == (32, 1, 0.01)


def test_images_of_half_the_side_are_means_of_four_pixels():
    images = shapes(3)
    assert halved(images).images.shape == (3, 16, 16, 3)
    assert abs(halved(images).images[1, 2, 3] - images.images[1, 4:6, 6:8].astype(float).mean((0, 1))).max() <= 0.5


def test_a_trained_network_can_be_kept_and_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, 'argv', f"""ablate.py --data shapes --limit 60 --hold-out 20 --seeds 1
        --set epochs=1 --set batch_size=20 --set lookahead=0 --set sizes=[8] --set precision=fp32
        --variant muon_lr=0 --keep {tmp_path}/kept --out {tmp_path}/found.json""".split())
    ablate.main()
    found = json.loads((tmp_path / 'found.json').read_text())
    for name in (WHOLE, 'muon_lr=0'):
        card = networks.loaded(f'{tmp_path}/kept/{name}/seed-42').card
        assert card['accuracy'] == found['trained'][name][0]['accuracy']
        assert card['recipe']['muon_lr'] == found['question']['recipes'][name]['muon_lr']
    with pytest.raises(SystemExit): networks.loaded('no such commit or folder')


def test_a_part_of_the_study_measured_anew_leaves_the_others(tmp_path):
    for name, part in (('shapes', 1), ('cifar10', 2), ('shapes', 3)): keep(tmp_path / 'study.json', name, part)
    assert json.loads((tmp_path / 'study.json').read_text()) == {'shapes': 3, 'cifar10': 2}


@pytest.mark.parametrize('name', sorted(path.stem for path in (ROOT / 'results').glob('*_[cg]pu.json')
                                        if 'reproduce.py' in path.read_text()))
def test_the_recorded_command_gives_the_recorded_recipe(name):
    run = json.loads((ROOT / f'results/{name}.json').read_text())
    words = shlex.split(run['command'])
    given = {word: words[i + 1] for i, word in enumerate(words) if word == '--config'}
    settings = [words[i + 1] for i, word in enumerate(words) if word == '--set']
    assert changed(getattr(Config, given['--config'])(), settings) == config_from(run['config'])


@pytest.mark.parametrize('name', ['ablation', 'tuning', 'tuning_rates', 'tuning_gpu', 'tuning_zero', 'tuning_laptop', 'tuning_laptop_less'])
def test_the_recorded_command_asks_the_recorded_question(name):
    run = json.loads((ROOT / f'results/{name}.json').read_text())
    words = shlex.split(run['command'])
    settings, different = ([words[i + 1] for i, word in enumerate(words) if word == flag] for flag in ('--set', '--variant'))
    recorded = {name: config_from(fields) for name, fields in run['question']['recipes'].items()}
    recipe = getattr(Config, words[words.index('--config') + 1])()
    config = replace(changed(recipe, settings), precision=recorded[WHOLE].precision)
    assert (asked_for(config, different) if different else variants(config)) == recorded
    assert recorded.keys() == run['trained'].keys()


@pytest.mark.parametrize('arguments, reason', [
    (['--variant', 'seed=7'], 'found seed='), (['--set', 'seed=7'], 'found seed='), (['--jobs', '0'], '--jobs: found 0')])
def test_ablate_refuses_what_would_compare_the_recipe_with_itself(monkeypatch, arguments, reason):
    monkeypatch.setattr(sys, 'argv', ['ablate.py', *arguments])
    with pytest.raises(SystemExit, match=reason): ablate.main()
