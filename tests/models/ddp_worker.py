"""One rank of the distributed test: `python -m tests.models.ddp_worker RANK WORLD_SIZE INIT_FILE OUT_FILE JSON`.

For each set of model arguments in a JSON list: trains a tiny model for some steps with DistributedDataParallel as it
comes, and saves its parameters and the pattern of steps that ran the fine branch.
"""
import json
import random
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tests.models.helpers import TINY, build


def train(rank: int, kwargs: dict) -> dict:
    torch.manual_seed(0)
    model = build(TINY, random=False, num_classes=4, **kwargs).train()
    model.set_fine_step(3)
    # from here on every rank has its own randomness, as in a real run
    torch.manual_seed(100 + rank)
    random.seed(100 + rank)
    reads = []
    attn = model.pst.blocks[0].attn
    attn.kv.register_forward_hook(lambda m, args, out: reads.append(tuple(args[0].shape[2:])))
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05, momentum=0.9)
    fine_steps = []
    for _ in range(6):
        reads.clear()
        loss = torch.nn.functional.cross_entropy(ddp(torch.randn(4, 3, 64, 64)), torch.randint(0, 4, (4,)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        fine_steps.append(len(reads) == 2)
    return {
        'parameters': {name: p.detach() for name, p in model.named_parameters()},
        'fine_steps': fine_steps,
    }


def main() -> None:
    rank, world_size, init_file, out_file, kwargs = sys.argv[1:]
    dist.init_process_group('gloo', f'file://{init_file}', rank=int(rank), world_size=int(world_size))
    torch.save([train(int(rank), case) for case in json.loads(kwargs)], out_file)
    dist.destroy_process_group()


if __name__ == '__main__':
    main()
