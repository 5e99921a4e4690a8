"""Ship a finished run: its model as the package's float16 weights, tested as shipped; with a NAME, its record as results/NAME.json.

    python benchmarks/reproduce.py --config fast --seeds 1 --keep eva9-fast --out results/fast_cpu.json
    python tools/ship_weights.py eva9-fast/seed-42

made the weights that come with the library. A run of `eva9_train`, and its record, would replace them by

    eva9_train --data cifar10 --out eva9-session9
    python tools/ship_weights.py eva9-session9 session9

The accuracy on the card is that of the shipped file, on the 10,000 test images; --root names the folder of CIFAR-10."""
import argparse
import json
from pathlib import Path

import torch

from eva_session9.data import cifar10
from eva_session9.engine import History, test
from eva_session9.preprocessing import loader, test_transforms
from eva_session9.save_load import load_model, save_model

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = ROOT / 'eva_session9/weights/resnet18_cifar10.safetensors'

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument('run', type=Path, help='the folder that holds model.safetensors and history.json')
parser.add_argument('name', nargs='?', help='of the results file')
parser.add_argument('--root', help='folder of the CIFAR-10 files; your cache folder if not given')
args = parser.parse_args()

model, history, images = load_model(args.run / 'model.safetensors'), History.load(args.run / 'history.json'), cifar10(args.root)[1]
if tuple(model.card['classes']) != images.classes: raise SystemExit(f'{args.run}: found a model of other classes, '
                                                                    'expected those of CIFAR-10; train it with --data cifar10')
card = {**model.card, 'hardware': history.hardware}
shipped = args.run / 'shipped.safetensors'
save_model(model, shipped, card, torch.float16)
batches = loader(images, test_transforms(card['mean'], card['std']), 250, shuffle=False)
card |= {'accuracy': test(load_model(shipped), batches, history.precision).accuracy, 'tested_on': len(images)}
history.weights_sha256 = save_model(model, WEIGHTS, card, torch.float16)['sha256']
if args.name: history.save(ROOT / f'results/{args.name}.json')
print(json.dumps({'trained': model.card['accuracy'], 'shipped': card['accuracy'], 'sha256': history.weights_sha256}))
