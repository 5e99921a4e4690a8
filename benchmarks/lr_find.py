"""What following each rule of the learning-rate finder costs, on this machine.

Small networks are trained at seven learning rates from 0.001 to 1, annealed to zero or held constant, and evaluated on held-out
images. Reported for every rule: its suggestion divided by the best of the seven rates (median), and the loss at the suggestion
minus the loss at the best rate (mean and worst, interpolated between the seven). The two extra rules, `minimum` and `moving
average` (the steepest fall of an exponential moving average, as torch-lr-finder reads it), are for comparison. Takes five minutes.
"""
import argparse
import itertools
import json
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from eva_session9.config import Config, hardware, seed_everything, versions
from eva_session9.data import cifar10, shapes
from eva_session9.engine import test, train_step
from eva_session9.lr_finder import find_lr
from eva_session9.models.resnet import BasicBlock
from eva_session9.save_load import write_atomically

RATES = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0]
SETUPS = [('plain', 32, 0.9), ('residual', 32, 0.9), ('residual', 128, 0.9), ('residual', 32, 0.0)]  # network, batch, momentum


def small_net(kind):
    "Three strided convolutions to 64 channels, each followed by a residual block or not."
    def stage(i, o):
        layers = [nn.Conv2d(i, o, 3, 2, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU()]
        return layers + [BasicBlock(o, o)] if kind == 'residual' else layers
    return nn.Sequential(*stage(3, 16), *stage(16, 32), *stage(32, 64), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def trained_loss(kind, batches, unseen, rate, momentum, annealed, epochs=3):
    "Loss on unseen images after training at `rate`; that of a guess where training fails."
    seed_everything(1)
    model, steps = small_net(kind).train(), epochs * len(batches)
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum)
    order = itertools.chain(*(torch.randperm(len(batches)).tolist() for _ in range(epochs)))
    try:
        for step, batch in enumerate(order):
            if annealed: optimizer.param_groups[0]['lr'] = rate * (1 - step / steps)
            train_step(model, *batches[batch], optimizer)
    except FloatingPointError: return np.log(10)
    return min(test(model, unseen).loss, np.log(10))


def read(curve):
    "Learning rates by rule, with the two extra ones."
    average = [curve.losses[0]]
    for loss in curve.losses[1:]: average.append(0.05 * loss + 0.95 * average[-1])
    lagging = curve.lrs[10:-5][np.gradient(average[10:-5]).argmin()]
    return {**curve.suggestions, 'minimum': 3 * curve.suggestions['minimum/3'], 'moving average': lagging}


def sweeps(kind, batches, momentum, repeats):
    "What each rule reads from sweeps of differently seeded networks; a sweep without a clear fall is left out."
    config, readings = Config(precision='fp32', momentum=momentum), []
    for seed in range(repeats):
        seed_everything(seed)
        curve = find_lr(small_net(kind), batches, config, device='cpu')
        if curve.suggestions: readings.append(read(curve))
    return readings


def rules(args):
    "Excess loss and distance from the best learning rate, by rule and schedule."
    images = cifar10(args.root)[0].subset(np.random.default_rng(0).permutation(50_000)[:5_000]) if args.data == 'cifar10' else shapes(5_000)
    x = (torch.from_numpy(images.images).permute(0, 3, 1, 2).float() / 255 - 0.47) / 0.25
    y = torch.from_numpy(images.labels)
    unseen, found = [(x[3_000:], y[3_000:])], {}
    for kind, batch_size, momentum in SETUPS:
        batches = list(zip(x[:3_000].split(batch_size), y[:3_000].split(batch_size)))
        readings = sweeps(kind, batches, momentum, args.repeats)
        for schedule in ('annealed', 'constant'):
            losses = np.array([trained_loss(kind, batches, unseen, rate, momentum, schedule == 'annealed') for rate in RATES])
            for rule, rate in (item for reading in readings for item in reading.items()):
                excess = np.interp(np.log(rate), np.log(RATES), losses) - losses.min()
                found.setdefault((rule, schedule), []).append((rate / RATES[losses.argmin()], excess))
    return {'data': args.data, 'setups': SETUPS, 'rules': [
        {'rule': rule, 'schedule': schedule, 'n': len(values), 'times_best': round(float(np.median(values, 0)[0]), 2),
         'excess_loss': round(float(np.mean(values, 0)[1]), 3), 'worst': round(float(np.max(values, 0)[1]), 3)}
        for (rule, schedule), values in found.items()]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', choices=('cifar10', 'shapes'), default='cifar10', help='images to train on (default cifar10)')
    parser.add_argument('--root', help='folder of the CIFAR-10 files; your cache folder if not given')
    parser.add_argument('--repeats', type=int, default=3, help='sweeps per set-up (default 3)')
    parser.add_argument('--out', type=Path, help='also write the result to this .json file')
    args, start = parser.parse_args(), time.perf_counter()
    torch.set_num_threads(1)  # the fastest for so little work
    result = {**rules(args), 'seconds': round(time.perf_counter() - start, 1), 'hardware': hardware(torch.device('cpu')),
              'versions': versions(), 'command': f'python benchmarks/lr_find.py --data {args.data} --repeats {args.repeats}'}
    text = json.dumps(result, indent=1)
    print(text)
    if args.out: write_atomically(args.out, text.encode() + b'\n')


if __name__ == '__main__': main()
