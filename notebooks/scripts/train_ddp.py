"""Train a CNN on Fashion-MNIST with plain torch on any number of ranks: what `hpclab.train` does, without hpclab.

torchrun --nproc-per-node=2 train_ddp.py FOLDER_OF_DATA
sbatch train_ddp.sh FOLDER_OF_DATA
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

FOLDER, STEPS, BATCH, SEED, LR = Path(sys.argv[1]), int(os.environ.get("STEPS", 40)), 64, 0, 0.05  # BATCH is a rank's


def load(kind):
    stems = json.loads((FOLDER / "dataset.json").read_text())["splits"]["train"]
    return torch.from_numpy(np.concatenate([np.load(FOLDER / f"{stem}-{kind}.npy") for stem in stems]))


def cnn():
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.MaxPool2d(2), nn.ReLU()),  # (B, 32, 14, 14)
        *(nn.Conv2d(32, 64, 3, padding=1), nn.MaxPool2d(2), nn.ReLU()),  # (B, 64, 7, 7)
        *(nn.Flatten(), nn.Linear(64 * 7 * 7, 10)),
    )


def main():
    dist.init_process_group("gloo")  # reads RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(SEED)  # the same first weights on every rank
    model = DistributedDataParallel(cnn())
    images = load("images")[:, None].float() / 255
    dataset = TensorDataset((images - 0.286) / 0.353, load("labels").long())
    sampler = DistributedSampler(dataset, ranks, rank, seed=SEED, drop_last=True)  # each rank has its share
    loader = DataLoader(dataset, BATCH, sampler=sampler, drop_last=True)
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9)
    rise = min(0.3, 6 / (STEPS + 1))  # share of the steps over which the learning rate rises: 5 of them
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, STEPS + 1, pct_start=rise, cycle_momentum=False)
    step = 0
    while step < STEPS:
        sampler.set_epoch(step // len(loader))  # another order in each epoch
        for inputs, labels in loader:
            loss = nn.functional.cross_entropy(model(inputs), labels)
            optimizer.zero_grad()
            loss.backward()  # DDP averages the gradients of all ranks here
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            dist.all_reduce(mean := loss.detach() / ranks)  # only for the print
            if rank == 0:
                print(f"step {step} loss {mean.item():.6f}", flush=True)
            step += 1
            if step == STEPS:
                break
    if rank == 0:
        torch.save(model.module.state_dict(), "weights.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
