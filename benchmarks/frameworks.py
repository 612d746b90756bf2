"""What was written for torchrun runs under `hpclab.launch(init=False)` as it is: a tutorial, Accelerate, Lightning.

Run it with ``make bench``, in the environment of the other launchers. Each program returns its world size, and the sum
of its weights: equal on both ranks, or it fails.
"""

import os
import tempfile
import time

import hpclab


def tutorial() -> tuple[int, float]:
    """`demo_basic` of PyTorch's DistributedDataParallel tutorial, as torchrun starts it."""
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo")
    model = DistributedDataParallel(nn.Sequential(nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 5)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
    optimizer.zero_grad()
    nn.MSELoss()(model(torch.randn(20, 10)), torch.randn(20, 5)).backward()
    optimizer.step()
    ranks = dist.get_world_size()
    dist.destroy_process_group()
    return ranks, total(model)


def accelerate() -> tuple[int, float]:
    """A loop as Accelerate's documentation writes it."""
    import torch
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    model, optimizer, loader = accelerator.prepare(model, optimizer, data())
    for inputs, targets in loader:
        optimizer.zero_grad()
        accelerator.backward(torch.nn.functional.mse_loss(model(inputs), targets))
        optimizer.step()
    return accelerator.num_processes, total(model)


def lightning() -> tuple[int, float]:
    """A LightningModule and `Trainer.fit`."""
    import torch
    from lightning import LightningModule, Trainer

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 1)

        def training_step(self, batch, number):
            inputs, targets = batch
            return torch.nn.functional.mse_loss(self.layer(inputs), targets)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.01)

    module = Module()
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(max_epochs=1, accelerator="cpu", devices=2, strategy="ddp", **quiet)
    trainer.fit(module, data())
    return trainer.world_size, total(module)


def data():
    """Loader of 64 random samples, shape (8, 4) a batch."""
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    inputs = torch.randn(64, 4)
    return DataLoader(TensorDataset(inputs, inputs.sum(1, keepdim=True)), batch_size=8)


def total(model) -> float:
    """Sum of all weights."""
    return sum(weight.detach().sum().item() for weight in model.parameters())


def main() -> None:
    """Run each program on two ranks."""
    with tempfile.TemporaryDirectory() as folder, hpclab.connect(workers=2) as client:
        os.chdir(folder)
        for program in (tutorial, accelerate, lightning):
            started = time.monotonic()
            first, second = hpclab.launch(client, program, ranks=2, init=False).result()
            assert first == second and first[0] == 2, (first, second)
            print(f"{program.__name__}: 2 ranks, equal weights, {time.monotonic() - started:.1f} s")
        os.chdir("/")


if __name__ == "__main__":
    main()
