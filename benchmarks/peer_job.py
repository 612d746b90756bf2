"""The job that every launcher in `launch.py` runs: data-parallel training of a small CNN, in plain torch.

As a script it is torchrun's; with the name of another launcher it is a server that runs the job once for each line of
its standard input, since a notebook too keeps its launcher between two cells.
"""

import itertools
import json
import os
import sys
import time


def job(out: str, steps: int) -> None:
    """Train some steps on two ranks, and have rank 0 write when the first one ended, and how long each took."""
    import torch
    import torch.distributed as dist
    from torch import nn

    started = time.time()
    torch.set_num_threads(1)
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()]
    module = nn.Sequential(*layers, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32 * 7 * 7, 10))
    model = nn.parallel.DistributedDataParallel(module)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    inputs, labels = torch.rand(128, 1, 28, 28), torch.randint(10, (128,))
    ends = [time.time()]
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
        ends.append(time.time())
    if dist.get_rank() == 0:
        seconds = [end - begin for begin, end in itertools.pairwise(ends)]
        with open(out + ".part", "w") as file:
            json.dump({"started": started, "first": ends[1], "step_s": seconds}, file)
        os.replace(out + ".part", out)


def accelerate(out: str, steps: int) -> None:
    """By Accelerate's `notebook_launcher`, which forks."""
    from accelerate import notebook_launcher

    notebook_launcher(job, (out, steps), num_processes=2)


def torchrunx(out: str, steps: int) -> None:
    """By torchrunx."""
    import torchrunx

    torchrunx.Launcher(hostnames=["localhost"], workers_per_host=2, backend="gloo").run(job, out, steps)


def ray(out: str, steps: int) -> None:
    """By Ray Train, whose cluster is up already."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    TorchTrainer(
        lambda: job(out, steps),
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(storage_path=os.path.dirname(out)),
    ).fit()


def main() -> None:
    """Run as torchrun's script, or serve another launcher."""
    name, *rest = sys.argv[1:]
    if name == "torchrun":
        job(rest[0], int(rest[1]))
        import torch.distributed as dist

        dist.destroy_process_group()
        os._exit(0)  # in some runs torch's threads abort an interpreter that ends by itself
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what launchers print
    if name == "ray":
        import ray as cluster

        cluster.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        out, steps = json.loads(line)
        launched = time.time()
        globals()[name](out, steps)
        print(json.dumps(launched), file=answers, flush=True)


if __name__ == "__main__":
    main()
