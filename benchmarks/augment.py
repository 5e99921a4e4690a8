"""Images per second of the two augmentation methods, on this machine.

`loader` transforms image by image in worker processes, `Batches` whole batches on the device. Both apply the augmentation of
a recipe to the same random 32 x 32 images and give normalised float batches. Timing starts after one pass of each, with the
workers running; then the two take turns. On a GPU, the time of `Batches` is also given as a share of the time of a
training epoch with it; give more --images there, so that an epoch takes some seconds.
"""
import argparse
import json
import shlex
import statistics
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from eva_session9.cli import _config
from eva_session9.config import hardware, pick_device, versions
from eva_session9.data import ImageSet
from eva_session9.engine import fit
from eva_session9.models.resnet import make_model
from eva_session9.preprocessing import Batches, loader, train_transforms
from eva_session9.save_load import write_atomically


def random_images(n):
    "Noise with random labels."
    rng = np.random.default_rng(0)
    return ImageSet(rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8), rng.integers(0, 10, n), tuple('0123456789'))


def read(batches):
    "Seconds of one pass."
    start = time.perf_counter()
    for x, y in batches: pass
    if x.is_cuda: torch.cuda.synchronize()
    return time.perf_counter() - start


def share_of_training(images, transform, config, rounds):
    "Median seconds of augmentation by those of training with the same batches, after an epoch that compiles."
    batches = Batches(images, transform, config.batch_size, drop_last=True)
    history = fit(make_model(config.architecture, 10), batches, None, replace(config, epochs=1 + rounds, sizes=(), precision='bf16'))
    augmenting = statistics.median(read(batches) for _ in range(rounds))
    return augmenting / statistics.median(epoch['seconds'] for epoch in history.epochs[1:])


def compared(name, args):
    "Both roads for one recipe."
    config, images = _config(name), random_images(args.images)
    transform = train_transforms(*images.stats(), config, size=32)
    roads = {'loader': loader(images, transform, config.batch_size, num_workers=args.workers, persistent_workers=args.workers > 0),
             'Batches': Batches(images, transform, config.batch_size)}
    for batches in roads.values(): read(batches)
    seconds = {road: [] for road in roads}
    for _ in range(args.rounds):
        for road, batches in roads.items(): seconds[road].append(round(read(batches), 6))
    rates = {road: args.images / statistics.median(times) for road, times in seconds.items()}
    result = {'images_per_second': {road: round(rate) for road, rate in rates.items()},
              'ratio': round(rates['Batches'] / rates['loader'], 1), 'seconds': seconds}
    if pick_device().type == 'cuda':
        result['share_of_training'] = round(share_of_training(images, transform, config, args.rounds), 3)
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('recipes', nargs='*', default=['session9', 'fast'], help='recipes to measure (default: session9 fast)')
    parser.add_argument('--images', type=int, default=10_000, help='images per pass (default 10000)')
    parser.add_argument('--workers', type=int, default=2, help='worker processes of the loader (default 2)')
    parser.add_argument('--rounds', type=int, default=5, help='timed passes of each method, of which the median is reported (default 5)')
    parser.add_argument('--out', type=Path, help='also write the result to this .json file')
    args, start = parser.parse_args(), time.perf_counter()
    result = {'recipes': {name: compared(name, args) for name in args.recipes}, 'workers': args.workers,
              'seconds': round(time.perf_counter() - start, 1), 'hardware': hardware(pick_device()), 'versions': versions(),
              'command': shlex.join(['python', 'benchmarks/augment.py', *args.recipes, '--images', str(args.images),
                                     '--workers', str(args.workers), '--rounds', str(args.rounds)])}
    text = json.dumps(result, indent=1)
    print(text)
    if args.out: write_atomically(args.out, text.encode() + b'\n')


if __name__ == '__main__': main()
