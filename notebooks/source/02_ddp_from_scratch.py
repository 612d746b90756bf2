# %% [markdown] id="title"
# # Data parallel from scratch
#
# **You will** build distributed training from nothing: the layers, the loss and the gradient by hand; then a ring that
# sums the gradients of four ranks using only *send* and *receive*. You count its bytes, time it, and end with the same
# weights as torch's own `DistributedDataParallel`.
#
# | | |
# |---|---|
# | objectives | derive a gradient and check it; pass messages between ranks without a deadlock; write a ring all-reduce and say what it costs; take the step of the whole batch |
# | prerequisites | the notebook *start*; the chain rule |
# | minutes | 45 to read and do, 25 of them for the exercises; under 2 to run |
# | needs | 1 CPU (four ranks take turns on fewer than four, and rows say *emulated*), 1.5 GB of memory, 4 ranks, no network |
#
# New terms are defined in the [glossary](glossary.md#reduce-scatter), in English and in Chinese.

# %% id="parameters" tags=["parameters"]
import hpclab

SIZE = hpclab.size()  # how much to do: "small", "class" or "cluster", as the variable HPCLAB_SIZE says

# %% id="imports"
import torch

RANKS = 4
STEPS, REPEATS = {"small": (5, 5), "class": (20, 10), "cluster": (70, 50)}[SIZE]

# %% [markdown] id="by-hand"
# ## Layers, loss and gradient by hand
#
# A two-layer perceptron turns 784 pixels into 64 numbers, sets the negative ones to zero, and turns the result into ten
# scores, one per class. The loss is the mean of $-\log p$ of the true class, where $p$ is the softmax of the scores.
#
# Backwards, the chain rule begins with a surprise: the derivative of that loss with respect to the scores is just *softmax
# minus truth*, divided by the batch size. Each layer then needs two matrix products: one with its input gives the gradient
# of its weights, one with its weights passes the rest on to the layer below (the first layer has none below).
#
# All parameters lie in one long vector, because a vector is easy to send.


# %% id="by-hand-do"
def loss_and_gradient(weights, x, y):
    """Loss on images x (N, 784) with labels y (N,), and its gradient, a vector as long as the weights."""
    w1, b1, w2, b2 = weights.split([64 * 784, 64, 10 * 64, 10])
    w1, w2 = w1.view(64, 784), w2.view(10, 64)
    above = x @ w1.T + b1  # (N, 64)
    hidden = above.clamp(min=0)
    scores = hidden @ w2.T + b2  # (N, 10)
    log_p, truth = scores.log_softmax(1), torch.eye(10)[y]
    d_scores = (log_p.exp() - truth) / len(y)  # (N, 10)
    d_above = (d_scores @ w2) * (above > 0)  # (N, 64)
    parts = d_above.T @ x, d_above.sum(0), d_scores.T @ hidden, d_scores.sum(0)
    return -(truth * log_p).sum() / len(y), torch.cat([part.flatten() for part in parts])


def batch(images, numbers):
    pictures, labels = images[list(numbers)]
    return torch.from_numpy(pictures).flatten(1), torch.from_numpy(labels)


torch.manual_seed(0)
start = 0.05 * torch.randn(64 * 784 + 64 + 10 * 64 + 10)
images = hpclab.data.load("fashion_mnist", "train")

# %% [markdown] id="autograd"
# **Predict**: torch's autograd gets the same loss. How far will its gradient be from ours, as a share of the largest
# number in it? (`1e-3` is a thousandth.)

# %% id="autograd-predict"
hpclab.predict("ddp-from-scratch.gradient", ..., "of the largest number")

# %% id="autograd-do"
x, y = batch(images, range(128))
loss, gradient = loss_and_gradient(start, x, y)
judged = start.clone().requires_grad_()
loss_and_gradient(judged, x, y)[0].backward()
apart = (gradient - judged.grad).abs().max()
print(f"{len(gradient):,} numbers up to {gradient.abs().max():.2f} differ by at most {apart:.0e}")

# %% id="autograd-came"
hpclab.came("ddp-from-scratch.gradient", apart / gradient.abs().max())

# %% [markdown] id="idea"
# ## The idea of data parallelism
#
# The loss of a batch is the *mean* over its pictures, and so is its gradient. So cut the batch into equal parts, let each
# rank compute the gradient of one part, and average: the result is the gradient of the whole batch.

# %% id="idea-do"
halves = [loss_and_gradient(start, x[half], y[half])[1] for half in (slice(64), slice(64, 128))]
print(f"the mean of the halves' gradients differs from the batch's by {(sum(halves) / 2 - gradient).abs().max():.0e}")

# %% [markdown] id="idea-explain"
# If all ranks start with the same weights and take the same step with that mean, they *keep* the same weights without ever
# sending them. Only gradients travel. What's missing is the mean over ranks; the rest of this notebook builds it.

# %% [markdown] id="gang"
# ## Four ranks that stay
#
# A *gang* is a group of processes. This one stays alive between cells: a cell that begins with `%%ranks` runs on every
# rank, and each rank keeps its own variables. `rank`, `ranks`, `torch` and `dist` (torch.distributed) are predefined. Each
# rank's output appears under its number; output that is the same on all ranks appears once.

# %% id="gang-do"
client = hpclab.connect()
gang = hpclab.gang(client, ranks=RANKS, oversubscribe=True)

# %% id="hello-do"
# %%ranks
print("one of", ranks, "ranks")
mine = 10.0**rank
mine

# %% [markdown] id="shift"
# ## Send and receive
#
# Each rank knows only its two neighbours, in a ring. `shift` sends to the right and returns what arrives from the left.
# `isend` starts to send and returns at once. Why not receive first? Every rank would wait for a message that nobody has
# sent: a *deadlock*. Try it in a cell of your own, then interrupt it (■ in the toolbar). You see the line at which each
# rank was waiting; the ranks keep their variables, and the next cell works.

# %% id="shift-do"
# %%ranks
right, left = (rank + 1) % ranks, (rank - 1) % ranks
sent = 0


def shift(outgoing):
    global sent
    incoming = torch.empty_like(outgoing)
    message = dist.isend(outgoing, right)
    dist.recv(incoming, left)
    message.wait()
    sent += outgoing.nbytes
    return incoming


shift(torch.tensor([mine])).item()

# %% [markdown] id="gather"
# ### All-gather
#
# Each rank starts with its own part of a vector; in the end every rank needs all of it. In every step each rank passes on
# what it got last: first its own part, then its left neighbour's, and so on. After `ranks - 1` steps every rank has every
# part.


# %% id="gather-do"
# %%ranks
def all_gather(parts):
    for step in range(ranks - 1):
        parts[(rank - step - 1) % ranks] = shift(parts[(rank - step) % ranks])
    return torch.cat(parts)


all_gather([torch.full((2,), mine if part == rank else 0.0) for part in range(ranks)]).tolist()

# %% [markdown] id="scatter"
# ## Exercise: reduce-scatter
#
# Now the other half. Each rank has a *whole* vector, its own gradient, cut into `ranks` parts. In the end, rank `r` must
# return the sum over all ranks of part `r`, and only that.
#
# Write `reduce_scatter(parts, shift, rank, ranks)`. `parts` is a list of tensors, which you may change; `shift(tensor)`
# sends a tensor to the right and returns what arrives from the left, and all ranks must call it equally often. Return the
# sum of part `rank`. No rank may send more than `ranks - 1` parts.
#
# <details><summary>Hint</summary>
#
# Draw three ranks and three parts on paper, and work backwards: where must part `r` be one step before the end? What
# travels is a sum that grows on its way.
#
# </details>


# %% id="scatter-answer" exercise=true
def reduce_scatter(parts, shift, rank, ranks):
    ...
    ### BEGIN SOLUTION
    for step in range(ranks - 1):
        arrived = shift(parts[(rank - step - 1) % ranks])
        parts[(rank - step - 2) % ranks] += arrived
    return parts[rank]
    ### END SOLUTION


# %% id="scatter-check" points=2
hpclab.check("ddp-from-scratch.reduce_scatter", reduce_scatter)

# %% [markdown] id="reduce"
# ## All-reduce
#
# A reduce-scatter followed by an all-gather gives every rank the whole sum. (Until you have written yours, torch's own
# all-reduce replaces it below, and no bytes are counted.)
#
# **Predict**: how many times the bytes of the vector does each of the four ranks send? (And each of a thousand?)

# %% id="reduce-predict"
hpclab.predict("ddp-from-scratch.bytes", ..., "times the vector")

# %% id="reduce-push"
gang.push(reduce_scatter=reduce_scatter, loss_and_gradient=loss_and_gradient, batch=batch, start=start)


# %% id="reduce-do"
# %%ranks
def all_reduce(x):
    padded = torch.cat([x, torch.zeros(-len(x) % ranks)])  # so that all parts are equal
    parts = list(padded.chunk(ranks))
    parts[rank] = reduce_scatter(parts, shift, rank, ranks)
    if parts[rank] is None:  # not written yet
        dist.all_reduce(x)
        return x
    return all_gather(parts)[: len(x)]


sent = 0
total = all_reduce(torch.full((len(start),), mine))
print("the sum is right:", bool((total == sum(10.0**other for other in range(ranks))).all()))
print(f"{sent:,} bytes sent; 2 (p - 1) / p N is {2 * (ranks - 1) / ranks * total.nbytes:,.0f}")

# %% id="reduce-came"
hpclab.came("ddp-from-scratch.bytes", gang.pull("sent", on=0)[0] / start.nbytes or None)

# %% [markdown] id="reduce-explain"
# **Explain.** Each half sends $p - 1$ of $p$ parts, so together $2 (p - 1) / p \cdot N$ bytes. That is less than
# $2 N$, *whatever the number of ranks*: the ring's great virtue. If each rank sent its vector to every other rank, it
# would send $(p - 1) N$.
#
# ## The cost of a message
#
# Bytes aren't everything. Every message also has a latency, $\alpha$, however short it is; each byte then costs $\beta$.
# A ring sends $2 (p - 1)$ messages in turn: $T = 2 (p - 1) \alpha + 2 \frac{p - 1}{p} \beta N$. Measure it, and fit both.
# (Yours is in Python: its $\alpha$ also holds Python's time for a message, and its $\beta$ the copying and adding of each
# byte.)

# %% id="time-push"
sizes = [4_000, 40_000, 400_000, 4_000_000] * REPEATS  # bytes
gang.push(sizes=sizes)

# %% id="time-do"
# %%ranks
import time

import hpclab

for number, nbytes in enumerate(sizes):
    x = torch.zeros(nbytes // 4)
    dist.barrier()
    begun = time.perf_counter()
    all_reduce(x)
    hpclab.report(kind="allreduce", step=number, nbytes=nbytes, duration_s=time.perf_counter() - begun)

# %% id="time-fit"
rows = hpclab.scaling.by_slowest(gang.rows)
line = hpclab.laws.fit_alpha_beta([row["nbytes"] for row in rows], [row["duration_s"] for row in rows])
hpclab.plots.allreduce(rows, line)
alpha, beta = line.values["alpha"] / (2 * (RANKS - 1)), line.values["beta"] / (2 * (RANKS - 1) / RANKS)
print(f"a message: alpha {1e6 * alpha:.0f} microseconds, 1 / beta {1e-9 / beta:.2f} GB a second")

# %% [markdown] id="time-explain"
# **Explain.** Short vectors cost the latency, $2 (p - 1)$ times; that grows with the ranks, and more *bandwidth* doesn't
# help. A network with lower latency does, and so do fewer messages: DDP gathers many small gradients into *buckets* of
# about 25 MB (the first of about 1 MB) before it sends them. With fewer CPUs than ranks (the figure then says *emulated*), most of $\alpha$ is
# waiting for a turn, and the points scatter. Set `RANKS` to your number of CPUs (at least 2), and run again: how much
# of it is left?
#
# ## Exercise: the step
#
# Each rank has the same weights, and the gradient of the mean loss on *its* part of the batch. Write
# `step(weights, gradient, all_reduce, ranks, lr)`: it returns the weights after the step that one process would take
# with the whole batch. `all_reduce(tensor)` returns the sum over the ranks.
#
# <details><summary>Hint</summary>
#
# All parts are equally large. How do you get the mean of a batch from the means of its parts?
#
# </details>


# %% id="step-answer" exercise=true
def step(weights, gradient, all_reduce, ranks, lr):
    ...
    ### BEGIN SOLUTION
    return weights - lr * all_reduce(gradient) / ranks
    ### END SOLUTION


# %% id="step-check" points=2
hpclab.check("ddp-from-scratch.step", step)

# %% [markdown] id="ddp"
# ## The same as torch's
#
# Now run your gradient, ring and step beside torch's layers, autograd and DDP, from the same weights, on the same pictures.
# **Predict**: at the end, how far is any weight of ours from torch's, at most? (And are ours *equal* on all ranks?)

# %% id="ddp-predict"
hpclab.predict("ddp-from-scratch.weights", ..., "apart")

# %% id="ddp-push"
gang.push(step=step, STEPS=STEPS)

# %% id="ddp-do"
# %%ranks
from torch.nn.parallel import DistributedDataParallel

images = hpclab.data.load("fashion_mnist", "train")
model = torch.nn.Sequential(torch.nn.Linear(784, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
torch.nn.utils.vector_to_parameters(start, model.parameters())
ddp, weights, apart = DistributedDataParallel(model), start.clone(), None
optimizer = torch.optim.SGD(ddp.parameters(), lr=0.2)
for number in range(STEPS):
    x, y = batch(images, range(128 * number + rank, 128 * (number + 1), ranks))
    weights = step(weights, loss_and_gradient(weights, x, y)[1], all_reduce, ranks, lr=0.2)
    if weights is None:
        print("you haven't written the step yet")
        break
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(ddp(x), y).backward()
    optimizer.step()
else:
    apart = (weights - torch.nn.utils.parameters_to_vector(model.parameters())).abs().max().item()
    print(f"{STEPS} steps: at most {apart:.1e} from torch's")
    print("ours add up to", weights.double().sum().item())

# %% id="ddp-came"
hpclab.came("ddp-from-scratch.weights", gang.pull("apart", on=0)[0])

# %% [markdown] id="ddp-explain"
# **Explain.** The difference is rounding: sums taken in another order. But between the ranks there is *none*: each part
# was summed once, on its way around the ring, and all have that sum. If every rank summed for itself, in its own order, the weights would
# drift apart, a little more with every step, and nobody would notice.
#
# Unlike us, DDP needn't wait for all gradients: it can send the last layers' gradients while it still computes those of
# the first. *Can*: it sends only full buckets, and all gradients of this small network fit into one, so here DDP sends as
# late as we do. The notebook *scaling* makes the buckets smaller, and shows the overlap on a timeline.

# %% [markdown] id="quiz-deadlock"
# ## Quiz
#
# ### Who waits for whom?
#
# Four ranks run `exchange`, each with its own number. A `send` waits until the other rank receives the message, a `receive`
# until the other sends it. At which line is each rank in the end? Set `deadlock_answer` to a list of four line numbers, in
# rank order, with 0 for a rank that returns.
#
# ```text
#  1  def exchange(rank):
#  2      if rank == 0:
#  3          receive(3)
#  4          send(1)
#  5      elif rank == 1:
#  6          send(2)
#  7          receive(0)
#  8      elif rank == 2:
#  9          receive(1)
# 10          receive(3)
# 11      else:
# 12          receive(2)
# 13          send(0)
# ```

# %% id="quiz-deadlock-answer" exercise=true
deadlock_answer = ...
### BEGIN SOLUTION
deadlock_answer = [3, 7, 10, 12]
### END SOLUTION

# %% id="quiz-deadlock-check" points=1
hpclab.check("ddp-from-scratch.quiz_deadlock", deadlock_answer)

# %% [markdown] id="quiz-line"
# ### Alpha and beta
#
# Suppose that all-reduces on another network took these times, which follow `alpha + beta x bytes`. Read off alpha, in microseconds,
# and the bandwidth 1 / beta, in megabytes a second (1 MB is $10^6$ bytes). Set `line_answer` to the pair. Within 30 % is near
# enough: both axes are logarithmic.

# %% id="quiz-line-show"
from hpclab.course import quizzes

quizzes.show("ddp-from-scratch.quiz_line")

# %% id="quiz-line-answer" exercise=true
line_answer = ...
### BEGIN SOLUTION
line_answer = (200, 500)
### END SOLUTION

# %% id="quiz-line-check" points=1
hpclab.check("ddp-from-scratch.quiz_line", line_answer)

# %% id="close"
gang.close()
client.close()

# %% [markdown] id="end"
# ## Summary
#
# - A gradient by hand is a few matrix products, and autograd checks it.
# - Sends and receives must match on all ranks; otherwise they wait, by torch's default half an hour
#   with gloo, ten minutes with NCCL.
# - Ring all-reduce = reduce-scatter + all-gather: $2 (p - 1) / p \cdot N$ bytes a rank, below $2 N$ for any $p$;
#   $2 (p - 1)$ latencies, which grow with $p$.
# - The mean of the parts' gradients is the whole batch's. If you sum without dividing, the step is $p$ times too long.
#
# ### What breaks at scale
#
# A ring of a thousand ranks pays two thousand latencies a bucket: there, trees and hierarchies (rings of a few hosts,
# inside which ranks share memory) take over. And reduce-scatter *alone* is a building block of ZeRO and FSDP: why should
# every rank keep the whole optimiser state if each could own one part?
#
# ### References
#
# - P. Patarasuk, X. Yuan, *Bandwidth optimal all-reduce algorithms for clusters of workstations*, 2009.
# - A. Gibiansky, *Bringing HPC techniques to deep learning*, 2017 (the ring, for neural networks).
# - S. Li and others, *PyTorch Distributed: Experiences on Accelerating Data Parallel Training*, 2020, arXiv:2006.15704.
# - R. Thakur, R. Rabenseifner, W. Gropp, *Optimization of collective communication operations in MPICH*, 2005.
