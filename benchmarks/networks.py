"""Does the ranking of the CAM methods depend on the network? ROAD on CIFAR-10 for weights of several recipes.

    python benchmarks/networks.py --out networks.json 0c1a9ee df8f190

Each network is given as a commit of this repository, from which git reads the weights and the card (so a clone with its whole
history is needed; over time the library shipped the weights of four recipes), or as a folder that holds a model.safetensors, such
as `ablate.py --keep` writes. Measured as in cam_study.py, all on the same images: the mean difference per image to a centred
Gaussian, with 95% bootstrap intervals. The methods that need a forward pass per channel are left out. A network that is already in
--out is not measured again.
"""
import argparse
import json
import shlex
import subprocess
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

from cam_study import FRACTIONS, SLOW, Fast, controls, explained, explainers, in_batches, rounded, stratified
from eva_session9.config import hardware, pick_device, versions
from eva_session9.data import cifar10
from eva_session9.gradcam import METHODS, bootstrap, road_score
from eva_session9.preprocessing import as_inputs
from eva_session9.save_load import load_model, write_atomically

WEIGHTS = 'eva_session9/weights/resnet18_cifar10'


def at_commit(commit):
    "The model that the library came with at a commit."
    with tempfile.TemporaryDirectory() as folder:
        for ending in ('.safetensors', '.json'):
            found = subprocess.run(['git', 'show', f'{commit}:{WEIGHTS}{ending}'], capture_output=True)
            if found.returncode: raise SystemExit(found.stderr.decode().strip())
            (Path(folder) / f'model{ending}').write_bytes(found.stdout)
        return load_model(Path(folder) / 'model.safetensors')


def loaded(name):
    "The model in a folder, or that of a commit."
    return load_model(Path(name) / 'model.safetensors') if Path(name).is_dir() else at_commit(name)


def measured(model, images, methods):
    "Accuracy on the images, and a row for each method and layer."
    start, x = time.perf_counter(), as_inputs(images.images, model.card['mean'], model.card['std'])
    fast = Fast(model, x[:32])
    target = in_batches(lambda a: {'target': fast(a).argmax(1)}, x)['target']

    def road(maps):
        return in_batches(lambda *batch: {'road': road_score(fast, *batch, FRACTIONS)}, x, maps.round(decimals=4), target)['road']
    centre, rows = road(controls(x)['centre']), []
    for name, layer, cam in tqdm(list(explainers(model)), model.card['sha256'][:8]):
        if name in methods:
            score = road(explained(cam, x, target)[0])
            rows.append({'method': name, 'layer': layer, 'road over centre': rounded(bootstrap(score - centre))})
    return {'accuracy': (target.numpy() == images.labels).mean().item(), 'centre': rounded(bootstrap(centre)), 'rows': rows,
            'precision': 'bf16' if fast.low else 'fp32', 'recipe': model.card['recipe'], 'trained by': model.card.get('command'),
            'test accuracy': model.card['accuracy'], 'tested on': model.card.get('tested_on'), 'weights_sha256': model.card['sha256'],
            'seconds': round(time.perf_counter() - start)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    quick = [name for name in METHODS if name not in SLOW]
    parser.add_argument('networks', nargs='+', metavar='NETWORK', help='commit or folder whose weights to measure; one or more')
    parser.add_argument('--methods', nargs='+', choices=quick, default=quick, metavar='METHOD', help=f"of {', '.join(quick)} (default all)")
    parser.add_argument('--images', type=int, default=500, help='CIFAR-10 test images, a multiple of 10 (default 500)')
    parser.add_argument('--root', help='folder of the CIFAR-10 files; your cache folder if not given')
    parser.add_argument('--out', type=Path, default=Path('networks.json'), help='.json file for the result (default networks.json)')
    args = parser.parse_args()
    asked = {'images': args.images, 'methods': args.methods, 'hardware': hardware(pick_device('cpu')), 'versions': versions()}
    before = {'methods': quick, **json.loads(args.out.read_text())} if args.out.exists() else {**asked, 'networks': {}}
    if args.images < 10 or args.images % 10: raise SystemExit(f'--images: found {args.images}, expected a multiple of 10')
    if {name: before.get(name) for name in asked} != asked:
        raise SystemExit(f'{args.out} holds a measurement with other settings or versions; choose another file')
    networks, images = before['networks'], stratified(cifar10(args.root)[1], args.images)
    for name in args.networks:
        model = loaded(name)
        if networks.get(name, {}).get('weights_sha256') != model.card['sha256']: networks[name] = measured(model, images, args.methods)
        result = {**asked, 'networks': networks, 'seconds': sum(network['seconds'] for network in networks.values()),
                  'command': shlex.join(['python', 'benchmarks/networks.py', *networks, '--images', str(args.images),
                                         '--methods', *args.methods])}
        write_atomically(args.out, json.dumps(result, indent=1).encode() + b'\n')
    print(args.out)


if __name__ == '__main__': main()
