# %% [markdown] id="title"
# # Debugging: six programs that train wrong
#
# **You will** find six bugs that most people who write distributed training meet once. One program hangs. The other five run to
# their end, raise no error, and are wrong. You see each symptom on real ranks, say what you think it is, mend the program, and
# prove the repair.
#
# | | |
# |---|---|
# | objectives | read where each rank of a hanging gang stands; compare ranks with one process that has all samples; keep random numbers apart and repeatable; resume a run to the last bit; debug a distributed program by a method |
# | prerequisites | the notebooks *start*, *ddp-from-scratch* and *cnn* |
# | minutes | 45 to read and do, 35 of them for the exercises; under 2 to run |
# | needs | 1 CPU (2 ranks take turns on it), 1.5 GB of memory, 2 ranks, no network |
#
# New terms are defined in the [glossary](glossary.md#all-reduce), in English and in Chinese.

# %% id="parameters" tags=["parameters"]
import os

SIZE = os.environ.get("HPCLAB_SIZE", "class")

# %% id="imports"
import random

import torch
import torch.distributed as dist
from torch.nn.functional import mse_loss
from torch.nn.utils import parameters_to_vector

import hpclab
from hpclab.course.debugging import Watched, apart, differences, interrupted, losses, mean_over_ranks, samples, show

STEPS = {"small": 20, "class": 20, "cluster": 200}[SIZE]

# %% [markdown] id="method"
# ## How to work here
#
# Each program is a function that runs on every rank, in plain `torch.distributed`. It trains a small network on samples `x`
# with targets `y`, and returns the weights. All ranks are given the same model and the same samples. For each program:
#
# 1. Read it, and **predict** what goes wrong.
# 2. Run it. The cell below it shows the symptom on two real ranks.
# 3. **Diagnose**: write down in one sentence what is wrong, before you change anything.
# 4. Mend the program where it is, and run both cells again, then the check. The check runs your function on two and three real
#    ranks, and compares it with one process.
#
# `show` launches a program and returns the weights of each rank. If the ranks fail, or wait for each other for three seconds,
# it prints hpclab's report instead.

# %% id="method-do"
client = hpclab.connect(workers=2)
torch.manual_seed(0)
x, y = samples()  # every other sample comes from a second sensor, which is off by one, and noisy
model = torch.nn.Linear(3, 1)

# %% [markdown] id="division"
# ## 1. Two ranks learn worse than one
#
# Memory is short, so each rank takes its share of the samples in `parts` pieces, one after the other: `backward()` *adds* to
# the gradients, so that after the last piece they are those of all pieces. Then the ranks add theirs up.
#
# The result should not depend on how the work is shared out. **Predict**: what will the loss be on one rank, on two, and on
# two with four pieces each?


# %% id="division-answer" exercise=true
def train_in_parts(model, x, y, steps, parts):
    rank, ranks = dist.get_rank(), dist.get_world_size()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, weight_decay=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        for piece, target in zip(x[rank::ranks].chunk(parts), y[rank::ranks].chunk(parts), strict=True):
            mse_loss(model(piece), target).backward()
        for weight in model.parameters():
            dist.all_reduce(weight.grad)
            ### BEGIN SOLUTION
            weight.grad /= ranks * parts
            ### END SOLUTION
        optimizer.step()
    return parameters_to_vector(model.parameters()).detach()


# %% id="division-do"
losses(client, train_in_parts, model, x, y, STEPS, cases=[(1, 1), (2, 1), (1, 2), (2, 4)])

# %% [markdown] id="division-hint"
# **Diagnose**, then mend `train_in_parts`. The optimiser has a weight decay, so its rate is not the place for the repair.
#
# <details><summary>Hint</summary>
#
# Print `weight.grad` before `optimizer.step()`, in the first step, for each of the four cases. By what factor do they differ?
#
# </details>

# %% id="division-check" points=1
hpclab.check("debugging.division", train_in_parts)

# %% [markdown] id="collective"
# ## 2. It hangs
#
# From here on one function takes the step, with the mean of the ranks' gradients: `step(model, optimizer, loss)`.
#
# This program stops when it is good enough: when the mean loss over *all* samples is below the target. All ranks have equally
# many. **Predict** what will happen, and what hpclab can tell about it.


# %% id="collective-answer" exercise=true
def step(model, optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    for weight in model.parameters():
        dist.all_reduce(weight.grad)
        weight.grad /= dist.get_world_size()
    optimizer.step()


def train_until(model, x, y, target, longest):
    rank, ranks = dist.get_rank(), dist.get_world_size()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(longest):
        loss = mse_loss(model(x[rank::ranks]), y[rank::ranks])
        reached = loss.detach().clone()
        ### BEGIN SOLUTION
        dist.all_reduce(reached)
        reached /= ranks
        ### END SOLUTION
        if reached < target:
            break
        step(model, optimizer, loss)
    return parameters_to_vector(model.parameters()).detach()


# %% id="collective-do"
show(client, train_until, model, x, y, 0.5, 100)

# %% [markdown] id="collective-hint"
# In the report, read each rank's lines from the top: the innermost call comes first. In which line of *your* program is each
# of them? A rank in hpclab's `rank.py` has left your function: it waits there for the others to end.
#
# **Diagnose**, then mend `train_until`.
#
# <details><summary>Hint</summary>
#
# Every rank must make the same calls in the same order. What does the number of calls depend on here, and is that the same on
# all ranks?
#
# </details>

# %% id="collective-check" points=1
hpclab.check("debugging.collective", train_until)

# %% [markdown] id="last"
# ## 3. What is left over
#
# The ranks share out each batch of `batch_size` samples; the last batch is what is left of the epoch. It isn't dropped: the
# samples were expensive.
#
# **Predict**: for how many of these numbers of samples do two ranks end with the weights of one: 48, 47, 44, 41, with batches
# of 8?


# %% id="last-answer" exercise=true
def train_epoch(model, x, y, batch_size):
    rank, ranks = dist.get_rank(), dist.get_world_size()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for first in range(0, len(x), batch_size):
        batch_x, batch_y = x[first : first + batch_size], y[first : first + batch_size]
        errors = model(batch_x[rank::ranks]) - batch_y[rank::ranks]
        loss = errors.square().mean()
        ### BEGIN SOLUTION
        loss = errors.square().sum() * ranks / len(batch_x)
        ### END SOLUTION
        step(model, optimizer, loss)
    return parameters_to_vector(model.parameters()).detach()


# %% id="last-do"
differences(client, train_epoch, model, x, y, 8, counts=(48, 47, 44, 41))

# %% [markdown] id="last-hint"
# 1e-07 is rounding. **Diagnose** all rows that are above it, and mend `train_epoch`, so that an epoch on any number of ranks
# equals one on one rank, whatever the number of samples.
#
# <details><summary>Hint</summary>
#
# How many samples of the last batch does each rank get, and with what weight does each of them enter the step? With 41 samples,
# what is the mean of rank 1's errors?
#
# </details>

# %% id="last-check" points=1
hpclab.check("debugging.last_batch", train_epoch)

# %% [markdown] id="norm"
# ## 4. A layer that looks at the batch
#
# Between two linear layers lies a batch norm, written out: from each feature its mean over the batch is taken away, and the
# rest is divided by the standard deviation. The gradients are averaged as they should be. **Predict**: is the loss on two ranks
# that on one?
#
# `mean_over_ranks` is a tool that you may need: the mean of a tensor over the ranks, of which autograd knows the gradient.


# %% id="norm-answer" exercise=true
def train_normed(model, x, y, steps):
    rank, ranks = dist.get_rank(), dist.get_world_size()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        features = model[0](x[rank::ranks])  # (B, features)
        mean = features.mean(0)
        ### BEGIN SOLUTION
        mean = mean_over_ranks(mean)
        ### END SOLUTION
        variance = (features - mean).square().mean(0)
        ### BEGIN SOLUTION
        variance = mean_over_ranks(variance)
        ### END SOLUTION
        normed = (features - mean) / (variance + 1e-5).sqrt()
        step(model, optimizer, mse_loss(model[1](normed), y[rank::ranks]))
    return parameters_to_vector(model.parameters()).detach()


# %% id="norm-do"
two_layers = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))
print("weights of 1 rank and of 2 differ by", apart(client, train_normed, two_layers, x, y, STEPS))

# %% [markdown] id="norm-hint"
# **Diagnose**, then mend `train_normed` so that it is still a batch norm, of the *whole* batch. (torch has such a layer,
# `SyncBatchNorm`, for GPUs only.)
#
# <details><summary>Hint</summary>
#
# Every other sample comes from a sensor that is off by one. What does rank 1 take away from its features? The variance of all
# samples is more than the mean of the ranks' own variances: what is missing in that?
#
# </details>

# %% id="norm-check" points=1
hpclab.check("debugging.batchnorm", train_normed)

# %% [markdown] id="seed"
# ## 5. The same dice
#
# To make few samples go further, noise is added to them, new noise in each step. For the run to be repeatable, the program
# sets a seed. **Predict**: how many different noises do two ranks see in two steps?


# %% id="seed-answer" exercise=true
def train_noisy(network, x, y, seed, steps):
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(seed)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ### BEGIN SOLUTION
    torch.manual_seed(1000 * seed + rank)
    ### END SOLUTION
    for _ in range(steps):
        noise = 0.3 * torch.randn(len(x[rank::ranks]), x.shape[1])
        step(model, optimizer, mse_loss(model(x[rank::ranks] + noise), y[rank::ranks]))
    return parameters_to_vector(model.parameters()).detach()


# %% id="seed-do"
show(client, train_noisy, Watched, 0 * x, y, 17, 2)

# %% [markdown] id="seed-hint"
# **Diagnose**, then mend `train_noisy`. In the end
#
# - all ranks begin with the same weights, and keep them equal;
# - no two ranks ever see the same noise;
# - the same seed gives the same run, every time;
# - a run with *any* other seed shares no noise with this one, on no rank: else repeats aren't independent.
#
# <details><summary>Hint</summary>
#
# What must be equal on all ranks, and what must not? A generator of random numbers gives the same numbers wherever it was given the same
# seed. Write down the seeds of three ranks for the seeds 17 and 18.
#
# </details>

# %% id="seed-check" points=1
hpclab.check("debugging.seed", train_noisy)

# %% [markdown] id="resume"
# ## 6. It goes on, but not as it would have
#
# Each rank draws its own samples (with Python's `random`) and noise (with torch's), from a seed of its own in `seeds`. The
# program trains up to `steps` steps, and writes a checkpoint; launched again, it goes on from there. **Predict**: ten steps at
# once, or five and five: which weights are equal?


# %% id="resume-answer" exercise=true
def train_on(model, x, y, seeds, steps, file):
    rank, ranks = dist.get_rank(), dist.get_world_size()
    random.seed(seeds[rank])
    torch.manual_seed(seeds[rank])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    done = 0
    if file.exists():
        state = torch.load(file)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["done"]
        ### BEGIN SOLUTION
        of_python, of_torch = state["random"][rank]
        random.setstate(of_python)
        torch.set_rng_state(of_torch)
        ### END SOLUTION
    for _ in range(done, steps):
        chosen = random.sample(range(len(x)), 8)
        noise = 0.1 * torch.randn(8, x.shape[1])
        step(model, optimizer, mse_loss(model(x[chosen] + noise), y[chosen]))
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "done": steps}
    ### BEGIN SOLUTION
    state["random"] = [None] * ranks
    dist.all_gather_object(state["random"], (random.getstate(), torch.get_rng_state()))
    ### END SOLUTION
    if rank == 0:
        torch.save(state, file)
    return parameters_to_vector(model.parameters()).detach()


# %% id="resume-do"
interrupted(client, train_on, model, x, y, [5, 6], stops=(5, 10))

# %% [markdown] id="resume-hint"
# **Diagnose**, then mend `train_on`: a run that goes on must equal one that was never interrupted, to the last bit, on any number
# of ranks, and without doing a step twice.
#
# <details><summary>Hint</summary>
#
# What in this program remembers something from step to step? On how many ranks, and who writes the file?
#
# </details>

# %% id="resume-check" points=1
hpclab.check("debugging.checkpoint", train_on)

# %% [markdown] id="close"
# ## Close

# %% id="close-do"
client.close()

# %% [markdown] id="end"
# ## Summary: how to debug a distributed program
#
# 1. **Make it small.** The smallest number of ranks that shows it (mostly two; three if two halves hide it), the fewest
#    samples and steps. Most bugs of a thousand ranks are there on two.
# 2. **Compare with one process** that has all samples. If one process is wrong too, it isn't a distributed bug. The gradient
#    of the *first* step tells more than a loss curve of an hour: is it a multiple? Of one rank only? Of some samples?
# 3. **Fix the seeds**, and switch off what draws random numbers. Then two runs are equal, and a difference is a finding.
# 4. **It hangs? Look where each rank stands.** They wait in different calls, or one has left. Go back to the last `if`, `break`,
#    `continue` or `except` that ranks may have decided differently.
# 5. **Check invariants**, while it runs: weights equal on all ranks, every sample once an epoch, noise different on ranks,
#    a resumed run equal to one that never stopped. Most of these bugs raise no error. An assertion does.
# 6. Write down the diagnosis *before* the repair, and make one change at a time.
#
# | bug | what you see | what shows it at once |
# |---|---|---|
# | collectives don't match | it hangs | where each rank stands |
# | a division is missing | the loss grows with more ranks, or "the learning rate needs tuning" | the first gradient against one process's |
# | the last batch is uneven | a small difference, or nan | the same, on a number of samples that doesn't divide |
# | batch norm on each rank | worse with more ranks and smaller shares | the same |
# | one seed for all ranks | nothing, only a worse model | print the first noise on each rank |
# | random state not saved | a resumed run differs | compare bits with a run that never stopped |
#
# ### What breaks at scale
#
# On a thousand ranks nobody reads a thousand stacks: tools group the ranks that stand in the same line, and the odd one out is
# the suspect. torch helps: `TORCH_DISTRIBUTED_DEBUG=DETAIL` checks that ranks make the same calls and names those that don't, and
# NCCL's flight recorder keeps each rank's last collectives. Comparing with one process is no longer possible when the model
# fits no single one: then a small model takes its place.
#
# ### References
#
# - S. Li and others, *PyTorch Distributed: Experiences on Accelerating Data Parallel Training*, 2020, arXiv:2006.15704.
# - S. Ioffe, C. Szegedy, *Batch Normalization*, 2015, arXiv:1502.03167.
# - NumPy, *Parallel random number generation* (why adding the rank to the seed isn't enough).
# - D. Arnold and others, *Stack Trace Analysis for Large Scale Debugging*, IPDPS 2007 (grouping the ranks by their stacks).
# - A. Zeller, *Why Programs Fail*, 2nd edition, 2009.
