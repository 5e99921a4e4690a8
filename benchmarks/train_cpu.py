"""Images per second of `fit` against a plain training loop, on this machine's CPU.

Both train the course's ResNet-18 by the course's recipe (batches of 32, Rotate, HorizontalFlip, Cutout, Normalize)
on the same drawn images, end to end. The plain loop is what a tutorial writes: float32, contiguous tensors, transforms
image by image in the main process, and `.item()` after every step. The two take turns in one process.
"""
import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

from eva_session9.config import Config, hardware, pick_device, seed_everything, versions
from eva_session9.data import shapes
from eva_session9.engine import fit
from eva_session9.models.resnet import resnet18
from eva_session9.preprocessing import loader, train_transforms


class PlainDataset(Dataset):
    def __init__(self, images, transform): self.images, self.transform = images, transform
    def __len__(self): return len(self.images)
    def __getitem__(self, i): return self.transform(image=self.images.images[i])['image'], int(self.images.labels[i])


def plain_loop(images, transform, config):
    "One epoch as a tutorial writes it."
    model = resnet18()
    optimizer = torch.optim.SGD(model.parameters(), config.lr, config.momentum)
    model.train()
    total, correct = 0.0, 0
    for x, y in DataLoader(PlainDataset(images, transform), config.batch_size, shuffle=True):
        optimizer.zero_grad()
        logits = model(x)
        loss = F.cross_entropy(logits, y)
        loss.backward()
        optimizer.step()
        total += loss.item()
        correct += (logits.argmax(1) == y).sum().item()


def timed(work):
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--images', type=int, default=320, help='training images an epoch (default 320, ten steps)')
    parser.add_argument('--rounds', type=int, default=5, help='epochs of each loop; the median counts (default 5)')
    parser.add_argument('--out', type=Path, help='also write the result to this .json file')
    args = parser.parse_args()
    images, config = shapes(args.images), Config(epochs=1)
    transform = train_transforms(*images.stats(), config)
    seed_everything(config.seed)
    batches = loader(images, transform, config.batch_size)
    config = replace(config, precision=fit(resnet18(), batches, None, config, 'cpu').precision)  # warms up, and settles 'auto'
    plain_loop(images, transform, config)
    seconds = {'plain loop': [], 'fit': []}
    for _ in range(args.rounds):
        seconds['plain loop'].append(timed(lambda: plain_loop(images, transform, config)))
        seconds['fit'].append(timed(lambda: fit(resnet18(), batches, None, config, 'cpu')))
    rates = {name: args.images / statistics.median(times) for name, times in seconds.items()}
    result = {
        'images_per_second': {name: round(rate, 1) for name, rate in rates.items()},
        'ratio': round(rates['fit'] / rates['plain loop'], 3), 'precision': config.precision, 'rounds': args.rounds,
        'seconds': {name: [round(t, 3) for t in times] for name, times in seconds.items()}, 'hardware': hardware(pick_device('cpu')),
        'versions': versions(), 'command': f'python benchmarks/train_cpu.py --images {args.images} --rounds {args.rounds}'}
    print(json.dumps(result, indent=1))
    print(f"fit against the plain loop: {result['ratio']} times, target 1.7: {'reached' if result['ratio'] >= 1.7 else 'MISSED'}")
    if args.out: args.out.write_text(json.dumps(result, indent=1) + '\n')


if __name__ == '__main__': main()
