"""Images per second of `fit` against a plain training loop, on this machine's CPU.

Both train the course's ResNet-18 by the course's recipe (batches of 32, Rotate, HorizontalFlip, Cutout, Normalize)
on the same random images, end to end. The plain loop is what a tutorial writes: float32, contiguous tensors, transforms
image by image in the main process, and `.item()` after every step. A third run is `fit` with
batches of 128 that are augmented as a whole. The three take turns in one process, in which `fit` has set glibc to keep freed
memory; this speeds up the plain loop as well. The arithmetic throughput of the third (convolutions and linear layer, forward
and backward) is given as a share of that of the fastest convolution in the same precision and process.
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
from eva_session9.engine import fit
from eva_session9.models.resnet import resnet18
from eva_session9.preprocessing import Batches, loader, train_transforms
from eva_session9.save_load import write_atomically
from augment import random_images
from train_gpu import OPERATIONS


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


@torch.inference_mode()
def convolution_peak(precision, repeats=20):
    "Operations per second of the fastest of some 3 x 3 convolutions with 128 channels, in the type that `fit` trains in."
    dtype = torch.bfloat16 if precision == 'bf16' else torch.float32
    x, weight = (torch.randn(128, 128, side, side, dtype=dtype).contiguous(memory_format=torch.channels_last) for side in (16, 3))
    return 2 * 128 * 16**2 * 128 * 128 * 9 / min(timed(lambda: F.conv2d(x, weight, padding=1)) for _ in range(repeats))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--images', type=int, default=640, help='training images per epoch (default 640)')
    parser.add_argument('--rounds', type=int, default=5, help='timed epochs of each loop, of which the median is reported (default 5)')
    parser.add_argument('--out', type=Path, help='also write the result to this .json file')
    args = parser.parse_args()
    images, config = random_images(args.images), Config(epochs=1)
    transform = train_transforms(*images.stats(), config)
    seed_everything(config.seed)
    batches, large = loader(images, transform, config.batch_size), Batches(images, transform, 128, device='cpu')
    config = replace(config, precision=fit(resnet18(), batches, None, config, 'cpu').precision)  # warms up, and settles 'auto'
    contestants = {
        'plain loop': lambda: plain_loop(images, transform, config),
        'fit': lambda: fit(resnet18(), batches, None, config, 'cpu'),
        'fit, whole batches of 128': lambda: fit(resnet18(), large, None, replace(config, batch_size=128), 'cpu')}
    for work in contestants.values(): work()
    seconds = {name: [] for name in contestants}
    for _ in range(args.rounds):
        for name, work in contestants.items(): seconds[name].append(timed(work))
    rates = {name: args.images / statistics.median(times) for name, times in seconds.items()}
    ratios = {name: round(rate / rates['plain loop'], 3) for name, rate in rates.items()}
    share = rates['fit, whole batches of 128'] * OPERATIONS / convolution_peak(config.precision)
    result = {
        'images_per_second': {name: round(rate, 1) for name, rate in rates.items()},
        'ratio': ratios['fit'], 'ratio_whole_batches': ratios['fit, whole batches of 128'], 'share_of_convolution_peak': round(share, 3),
        'precision': config.precision, 'rounds': args.rounds,
        'seconds': {name: [round(t, 3) for t in times] for name, times in seconds.items()}, 'hardware': hardware(pick_device('cpu')),
        'versions': versions(), 'command': f'python benchmarks/train_cpu.py --images {args.images} --rounds {args.rounds}'}
    print(json.dumps(result, indent=1))
    for name, value, target in (('fit against the plain loop', result['ratio'], 1.7),
                                ('whole batches against the plain loop', result['ratio_whole_batches'], 1.9),
                                ('share of the convolution peak', result['share_of_convolution_peak'], 0.6)):
        print(f"{name}: {value}, target on a CPU with bf16 {target}: {'reached' if value >= target else 'MISSED'}")
    if args.out: write_atomically(args.out, (json.dumps(result, indent=1) + '\n').encode())


if __name__ == '__main__': main()
