"Two processes that torchrun starts end alike: weights, running statistics and records, whatever each was seeded with."
import subprocess
import sys

import pytest
import torch

SCRIPT = '''
import os, sys
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from eva_session9.config import Config, seed_everything
from eva_session9.engine import distributed, fit

seed_everything(0)
images, labels = torch.randn(24, 3, 8, 8), torch.arange(24) % 4

def run(name, *layers, **changes):
    seed_everything(int(os.environ.get('RANK', 0)))
    model = nn.Sequential(nn.Conv2d(3, 4, 3), *layers, nn.ReLU(), nn.Flatten(), nn.Linear(144, 4))
    batches = DataLoader(TensorDataset(images, labels), 8, shuffle=True)  # by the global generator
    recipe = Config(epochs=2, batch_size=8, lr=0.05, **{'precision': 'fp32', **changes})
    history = fit(model, batches, None, recipe, 'cpu', f'{sys.argv[1]}/{name}')
    return {'state': model.state_dict(), 'losses': [epoch['train_loss'] for epoch in history.epochs], 'precision': history.precision}

with distributed():
    found = {'plain': run('plain'), 'norm': run('norm', nn.BatchNorm2d(4), lookahead=2, muon_lr=0.02), 'auto': run('auto', precision='auto')}
torch.save(found, f"{sys.argv[1]}/{os.environ.get('RANK', 'alone')}.pt")
'''


def ended(folder, *launcher):
    "What each process found, by its number."
    folder.mkdir()
    script = folder / 'train.py'
    script.write_text(SCRIPT)
    done = subprocess.run([sys.executable, *launcher, script, folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {path.stem: torch.load(path) for path in folder.glob('*.pt')}


@pytest.fixture(scope='module')
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp('distributed')
    launcher = '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2'
    return ended(folder / 'one') | ended(folder / 'two', *launcher)


@pytest.mark.parametrize('run', ['plain', 'norm', 'auto'])
def test_both_processes_end_alike(found, run):
    first, second = found['0'][run], found['1'][run]
    assert first['losses'] == second['losses'] and first['precision'] == second['precision'] in ('fp32', 'bf16')
    for name, value in first['state'].items(): assert torch.equal(value, second['state'][name]), name


def test_they_end_as_one_process_does(found):
    alone, together = found['alone']['plain'], found['0']['plain']
    assert together['losses'] == pytest.approx(alone['losses'], rel=1e-5)
    for name, value in alone['state'].items(): torch.testing.assert_close(together['state'][name], value, rtol=1e-4, atol=1e-6)


def test_running_statistics_are_those_of_the_first_share(found):
    alone, together = (found[who]['norm']['state']['1.running_var'] for who in ('alone', '0'))
    assert not torch.allclose(together, alone, rtol=1e-6)
    assert together == pytest.approx(alone, rel=0.5)
