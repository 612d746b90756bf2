# %% [markdown] id="title"
# # Debugging: six programs that train wrong
#
# **You will** find six bugs that almost everyone who writes distributed training meets once. One program hangs. The other five
# run to the end, raise no error, and are wrong. You see each symptom on real ranks, say what you think it is, mend the program,
# and prove the repair.
#
# | | |
# |---|---|
# | objectives | read where each rank of a hanging gang stands; compare ranks with one process that has all samples; keep random numbers apart and repeatable; resume a run to the last bit; debug a distributed program by a method |
# | prerequisites | the notebooks *start*, *ddp-from-scratch* and *cnn* |
# | minutes | 60 to read and do, best in two sittings of three programs, 45 of them for the exercises; under 2 to run |
# | needs | 1 CPU (2 ranks take turns on it), 1.5 GB of memory, 2 ranks, no network |
#
# New terms are defined in the [glossary](glossary.md#all-reduce), in English and in Chinese.

# %% id="parameters" tags=["parameters"]
import hpclab

SIZE = hpclab.size()

# %% id="imports"
import random

import torch
import torch.distributed as dist
from torch.nn.functional import mse_loss
from torch.nn.utils import parameters_to_vector

from hpclab.course.debugging import Watched, differences, interrupted, losses, mean_over_ranks, samples, show

STEPS = {"small": 20, "class": 20, "cluster": 200}[SIZE]

# %% [markdown] id="method"
# ## How to work here
#
# Each program is a function that runs on every rank, in plain `torch.distributed`. It trains a small network on samples `x`
# with targets `y`, and returns the weights. Every rank is given all samples.
# For each program:
#
# 1. Read it, and **predict** what will go wrong.
# 2. Run it. The next cell shows the symptom on two real ranks.
# 3. **Diagnose** it in one sentence, in writing, before you change anything.
# 4. Mend the program where it is, run both cells again, and then the check. It runs your function on several real ranks, and
#    mostly compares it with one process.
#
# `show` launches a program and returns the weights that each rank ends with. If a rank fails, or the ranks wait for each other
# for three seconds, it prints hpclab's report instead. The other tools (`losses`, `differences`, `interrupted`) use `show`, and
# make a table.

# %% id="method-do"
client = hpclab.connect(workers=2)
torch.manual_seed(0)
x, y = samples()  # every other sample comes from a second sensor, which is off by one, and noisy
model = torch.nn.Linear(3, 1)

# %% [markdown] id="division"
# ## 1. Two ranks learn worse than one
#
# Memory is short, so each rank works through its share of the samples in `parts` pieces. `backward()` *adds* to the gradients:
# after the last piece, all pieces are in them. Then the ranks add up theirs.
#
# The result should not depend on how the work is shared out. **Say first** the loss on one rank, on two, and on two with four
# pieces each.


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

# %% [markdown] id="division-diagnosis"
# **Your diagnosis** (double-click here, and write one sentence):

# %% [markdown] id="division-hint"
# Mend `train_in_parts`. However the work is shared out, each step must be that of one process with all samples. (The optimiser
# has a weight decay, so its learning rate is not the place for the repair.)
#
# <details><summary>Hint</summary>
#
# Print `weight.grad` before `optimizer.step()`, in the first step, for each of the four cases. By what factor do they differ?
#
# </details>

# %% id="division-check" points=2
hpclab.check("debugging.division", train_in_parts)

# %% [markdown] id="collective"
# ## 2. It hangs
#
# From here on `step(model, optimizer, loss)` takes each step, with the mean of the ranks' gradients.
#
# This program should stop as soon as the mean loss over *all* samples is below the target. Each rank has the same number of
# samples. **Say first** what will happen instead.


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

# %% [markdown] id="collective-diagnosis"
# **Your diagnosis** (double-click here, and write one sentence):

# %% [markdown] id="collective-hint"
# hpclab's report has the innermost call of each rank first. Skip the lines of torch's own files: in which line of *your* program
# does each rank wait, and which one has left it?
#
# Mend `train_until`. All ranks must stop after the same step: the one after which one process with all samples would.
#
# <details><summary>Hint</summary>
#
# Every rank must make the same calls in the same order. What decides here how many calls a rank makes, and is it the same on all
# ranks?
#
# </details>

# %% id="collective-check" points=2
hpclab.check("debugging.collective", train_until)

# %% [markdown] id="last"
# ## 3. What is left over
#
# The ranks share out each batch of `batch_size` samples. The last batch is whatever is left; it isn't dropped, because the
# samples were expensive.
#
# **Say first**: with batches of 8, for which of 48, 47, 44 and 41 samples do two ranks end with the weights of one?


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

# %% [markdown] id="last-diagnosis"
# **Your diagnosis** (double-click here, and write one sentence):

# %% [markdown] id="last-hint"
# Around 1e-7 is rounding; the rest is not. Mend `train_epoch`: an epoch on any number of ranks must be that of one process,
# whatever the number of samples.
#
# <details><summary>Hint</summary>
#
# How many samples of the last batch does each rank get, and how much does each of them count in the step? With 41 samples, one
# rank gets none: what does it contribute to the mean over the ranks?
#
# </details>

# %% id="last-check" points=2
hpclab.check("debugging.last_batch", train_epoch)

# %% [markdown] id="norm"
# ## 4. A layer that looks at the batch
#
# Between two linear layers there is a batch norm, written out: each feature has its mean over the batch subtracted, and is divided
# by its standard deviation. The gradients are averaged as they should be, and all shares are equal. **Say first**: do two ranks
# end with the weights of one?
#
# One tool may help: `mean_over_ranks(tensor)` returns the mean of a tensor over the ranks, and autograd knows its gradient.


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
differences(client, train_normed, two_layers, x, y, STEPS, counts=(48, 24))

# %% [markdown] id="norm-diagnosis"
# **Your diagnosis** (double-click here, and write one sentence):

# %% [markdown] id="norm-hint"
# Mend `train_normed`: it must remain a batch norm, and on any number of ranks be that of one process with the whole batch.
# (torch has such a layer, `SyncBatchNorm`, but for GPUs only.)
#
# <details><summary>Hint</summary>
#
# Every other sample comes from a sensor that is off by one, and these are rank 1's. What does it subtract? The variance of all
# samples is larger than the mean of the ranks' own variances: what do those leave out?
#
# </details>

# %% id="norm-check" points=2
hpclab.check("debugging.batchnorm", train_normed)

# %% [markdown] id="seed"
# ## 5. The same dice
#
# To make few samples go further, the program adds noise to them, new noise in each step. It sets a seed, so that a run can be
# repeated. **Say first**: two ranks take two steps. How many different noises do they see?
#
# A trick shows the noise alone: give the program samples that are all zero, and a network that prints what it sees.


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
weights = show(client, train_noisy, Watched, 0 * x, y, 17, 2)

# %% [markdown] id="seed-diagnosis"
# **Your diagnosis** (double-click here, and write one sentence):

# %% [markdown] id="seed-hint"
# Mend `train_noisy`, so that
#
# - all ranks begin with the same weights, and keep them equal;
# - no two ranks ever see the same noise;
# - the same seed always gives the same run;
# - a run with any *other* seed shares no noise with this one, on any rank: repeats should be independent.
#
# <details><summary>Hint</summary>
#
# What must be equal on all ranks, and what must not? Write down which seed each of three ranks uses, for runs with the seeds 17
# and 18. Is any of the six there twice?
#
# </details>

# %% id="seed-check" points=2
hpclab.check("debugging.seed", train_noisy)

# %% [markdown] id="resume"
# ## 6. It goes on, but not as it would have
#
# Each rank chooses its own samples (with Python's `random`) and noise (with torch), and has a seed of its own in `seeds`. The
# program trains until step `steps` and writes a checkpoint; launched again, it goes on from there. **Say first**: will ten steps at
# once, and five and then five, end with the same weights?


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

# %% [markdown] id="resume-diagnosis"
# **Your diagnosis** (double-click here, and write one sentence):

# %% [markdown] id="resume-hint"
# Mend `train_on`: a run that goes on must equal one that was never interrupted, to the last bit, on any number of ranks, and
# without taking a step twice.
#
# <details><summary>Hint</summary>
#
# What in this program remembers something from one step to the next? On which ranks? And which rank writes the file?
#
# </details>

# %% id="resume-check" points=2
hpclab.check("debugging.checkpoint", train_on)

# %% [markdown] id="close"
# ## Close

# %% id="close-do"
client.close()

# %% [markdown] id="end"
# ## Summary: how to debug a distributed program
#
# 1. **Make it small.** Take the fewest ranks that show the symptom (mostly two, or three where halves hide it), few samples and
#    few steps.
# 2. **Compare it with one process** that has all samples. If that is wrong too, the bug isn't a distributed one. The gradient of
#    the *first* step tells more than hours of loss curves: is it a multiple of the right one? Is it one rank's? Are samples
#    missing?
# 3. **Fix all seeds**, so that two runs are equal. Then every difference means something.
# 4. **If it hangs, look where each rank stands.** They are in different calls, or one has left, or each waits for a message
#    that nobody sends. Go back to the last `if`, `break`, `continue` or `except` on which the ranks could decide differently.
# 5. **Assert invariants**: equal weights on all ranks; each sample once an epoch; different noise on each rank; a resumed run
#    equal to one that never stopped. Most of these bugs raise no error. An assertion does.
# 6. **Write down the diagnosis before the repair**, change one thing at a time, and keep what showed the bug as a test.
#
# | bug | symptom | what shows it at once |
# |---|---|---|
# | mismatched collectives | it hangs, or adds up the wrong numbers; or, where sizes differ, gloo aborts a rank | where each rank stands; `DETAIL`, below |
# | a missing division | training diverges on more ranks, or "needs another learning rate" | the first gradient, against one process's |
# | an uneven last batch | slightly different weights | the same, with a number of samples that doesn't divide |
# | batch norm by ranks | worse with more ranks, as shares get smaller | the same, with shares that differ |
# | one seed for all ranks | none; the noise varies less than you think, so it helps less | the first noise of each rank |
# | a forgotten random state | a resumed run differs | a comparison with a run that never stopped, bit by bit |
#
# ### What breaks at scale
#
# Nobody reads a thousand stacks. Tools group the ranks by where they stand, and suspect the smallest group. torch helps too:
# `TORCH_DISTRIBUTED_DEBUG=DETAIL` checks that all ranks make the same call, and its flight recorder keeps each rank's
# last calls of NCCL. And a model that fits no single process can't be compared with one: a smaller model of the same kind has to do.
#
# ### References
#
# - S. Li and others, *PyTorch Distributed: Experiences on Accelerating Data Parallel Training*, 2020, arXiv:2006.15704.
# - S. Ioffe, C. Szegedy, *Batch Normalization*, 2015, arXiv:1502.03167.
# - NumPy's documentation, *Parallel random number generation* (why adding the rank to the seed isn't enough).
# - D. Arnold and others, *Stack Trace Analysis for Large Scale Debugging*, IPDPS 2007 (grouping the ranks by their stacks).
# - A. Zeller, *Why Programs Fail*, 2nd edition, 2009.
