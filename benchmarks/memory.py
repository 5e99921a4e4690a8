"""Training speed on a CPU with and without glibc keeping the memory that a training step frees, as `fit` makes it do.

    python benchmarks/memory.py --out results/memory.json

The setting cannot be undone within a process, so each measurement runs in a process of its own: a few training steps of the
ResNet-18 on random images in float32, of which the fastest is reported. The two settings take turns.
"""
import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from eva_session9.config import hardware, pick_device, versions
from eva_session9.engine import _keep_memory, train_step
from eva_session9.models.resnet import resnet18
from eva_session9.save_load import write_atomically


def fastest_step(batch_size, steps=4):
    "Seconds of the fastest of some training steps."
    model, (x, y) = resnet18().train(), (torch.randn(batch_size, 3, 32, 32), torch.randint(10, (batch_size,)))
    optimizer, seconds = torch.optim.SGD(model.parameters(), 0.01), []
    for _ in range(steps):
        start = time.perf_counter()
        train_step(model, x, y, optimizer)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def in_process(kind, batch_size):
    "The same in a new process."
    command = [sys.executable, __file__, '--one', kind, '--batches', str(batch_size)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def compared(batch_size, rounds):
    "Images per second of both kinds at one batch size."
    seconds = {'given back': [], 'kept': []}
    for _ in range(rounds):
        for kind, times in seconds.items(): times.append(round(in_process(kind, batch_size), 3))
    rates = {kind: batch_size / statistics.median(times) for kind, times in seconds.items()}
    return {'batch_size': batch_size, 'images_per_second': {kind: round(rate, 1) for kind, rate in rates.items()},
            'ratio': round(rates['kept'] / rates['given back'], 2), 'seconds': seconds}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--batches', type=int, nargs='+', default=[32, 128, 512], help='batch sizes (default 32 128 512)')
    parser.add_argument('--rounds', type=int, default=3,
                        help='processes per setting and batch size, of which the median is reported (default 3)')
    parser.add_argument('--out', type=Path, help='also write the result to this .json file')
    parser.add_argument('--one', choices=('kept', 'given back'), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one == 'kept': _keep_memory()
    if args.one: return print(fastest_step(*args.batches))
    began = time.perf_counter()
    steps = [compared(batch_size, args.rounds) for batch_size in args.batches]
    result = {'steps': steps, 'seconds': round(time.perf_counter() - began), 'hardware': hardware(pick_device('cpu')),
              'versions': versions(),
              'command': f"python benchmarks/memory.py --batches {' '.join(map(str, args.batches))} --rounds {args.rounds}"}
    print(json.dumps(result, indent=1))
    if args.out: write_atomically(args.out, (json.dumps(result, indent=1) + '\n').encode())


if __name__ == '__main__': main()
