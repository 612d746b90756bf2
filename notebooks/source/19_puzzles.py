# %% [markdown] id="title"
# # Puzzles: communicate by the step
#
# **You will** write six programs for a simulated cluster on which every step and every byte is counted: each has to be
# right, and to keep to limits that the obvious program breaks.
#
# | | |
# |---|---|
# | objectives | write the communication of distributed training with send and receive only; count steps and bytes before you run; read a schedule and find the rank that waits |
# | prerequisites | the notebook *ddp-from-scratch*; NumPy |
# | minutes | 60 to read and do three of the six puzzles, 10 to 20 minutes each; under 1 to run |
# | needs | 1 CPU, 0.5 GB of memory, no ranks (they are simulated), no network |
#
# They are a set to choose from: do those that you need, or all. New terms are defined in the [glossary](glossary.md#all-reduce), in English and in Chinese.

# %% id="parameters" tags=["parameters"]
import hpclab

SIZE = hpclab.size()  # nothing here is larger on a larger machine

# %% id="imports"
import numpy as np

from hpclab.course import plots, puzzles, simulated

# %% [markdown] id="machine"
# ## The machine
#
# Your program is a function that runs on every rank. Its first argument is the rank's *device*:
#
# | | |
# |---|---|
# | `device.rank`, `device.ranks` | this rank, and how many there are |
# | `device.send(to, array)` | sends a copy, and returns at once: the program goes on while the message travels |
# | `device.recv(source)` | returns the next message from that rank, and waits until it is there |
# | `device.compute(steps)` | computes; messages travel meanwhile |
#
# Time goes in whole steps. A message of $n$ numbers (8 bytes each) takes $1 + n$ steps: one of latency, then one a number. In
# one step a rank can compute, send one message *and* receive one; further messages queue, and leave when sender and
# receiver are both free. Adding arrays is free.
#
# ## An example, solved
#
# Four ranks have a vector of four numbers each, and rank 0 wants the sum. The obvious program:
#
# **Predict**: how many steps does it take, and which rank is the last to be free?

# %% id="example-predict"
hpclab.predict("puzzles.example", ..., "steps")


# %% id="example-do"
def total(device, vector):
    if device.rank > 0:
        device.send(0, vector)
    else:
        for source in range(1, device.ranks):
            vector = vector + device.recv(source)
    return vector


run = simulated.run(lambda device: total(device, np.full(4, 10.0**device.rank)), ranks=4)
plots.schedule(run.rows)
print(f"{run.steps} steps; rank 0 has {run.results[0]}")

# %% id="example-came"
hpclab.came("puzzles.example", run.steps)

# %% [markdown] id="example-explain"
# **Explain.** Each rank has a row with three tracks: on top what it computes or waits for, below that what it sends, at the
# bottom what it receives. All three ranks call `send` in step 0, yet the messages arrive one after the other, since rank 0
# receives one at a time: $(p - 1)(1 + n) = 15$ steps. The message of rank 3 queues until step 10. With a thousand ranks this
# program takes 4,995 steps, and in each of them just one rank sends: rank 0 is the bottleneck.
#
# Sending never waits here, but receiving does. When every rank waits first, nobody ever sends; the machine sees that nothing
# can move any more, and says who waits for whom:


# %% id="deadlock-do"
def turn(device, vector):
    arrived = device.recv((device.rank - 1) % device.ranks)
    device.send((device.rank + 1) % device.ranks, vector)
    return arrived


print(simulated.run(lambda device: turn(device, np.ones(4)), ranks=4).fault)

# %% [markdown] id="ring"
# ## How to play
#
# Write a puzzle's function; the next cell draws what it does with the sizes given in the text, and prints what it takes beside
# the limits. Change it until you like the picture (if it loops forever, ■ in the toolbar stops it). The check tries your
# function with these sizes, and then on clusters of other sizes: each time the results must be right, and within the limits.
# Any algorithm that achieves both passes. The puzzles are independent of each other: begin with the one that you like.
#
# ## Puzzle 1: ring
#
# Each of $p$ ranks has a vector of $N$ numbers, and *all* want the sum. But each can send through one cable only, and it leads
# **left**, from rank $r$ to $r - 1$ (from 0 to $p - 1$). Write `ring(device, vector)`, which returns the sum. $N$ need not be
# a multiple of $p$.
#
# | limit | | with 4 ranks and 8 numbers |
# |---|---|---|
# | steps | $2 (p - 1)(1 + \lceil N / p \rceil)$ | 18 |
# | bytes sent by any rank | $8 \cdot 2 (p - 1) \lceil N / p \rceil$ | 96 |
#
# **Count first**: send the whole vector around the ring, and add on the way. What does that take?
#
# <details><summary>Hint</summary>
#
# `np.array_split(vector, p)` cuts it. Follow one part on paper: through which ranks must it go until its sum is whole, and then
# through which again? All ranks should do the same in each step, each with another part.
#
# </details>


# %% id="ring-answer" exercise=true
def ring(device, vector):
    """Sum of the vectors of all ranks, on all ranks; each sends to its left neighbour only."""
    ...
    ### BEGIN SOLUTION
    rank, ranks = device.rank, device.ranks
    parts = np.array_split(vector, ranks)
    for step in range(2 * (ranks - 1)):
        device.send((rank - 1) % ranks, parts[(rank + step) % ranks])
        arrived, place = device.recv((rank + 1) % ranks), (rank + step + 1) % ranks
        parts[place] = arrived + (parts[place] if step < ranks - 1 else 0)
    return np.concatenate(parts)
    ### END SOLUTION


# %% id="ring-draw"
puzzles.draw("ring", ring)

# %% id="ring-check" points=2
hpclab.check("puzzles.ring", ring)

# %% [markdown] id="broadcast"
# In the picture of a good answer no cable is ever idle. For long vectors nothing needs fewer bytes; for short ones, all those
# latencies hurt, and the next puzzle has the cure.
#
# ## Puzzle 2: broadcast
#
# Rank `root` has a vector of $n$ numbers (new weights, say), and all others need it. Every rank can send to every other
# one. Write `broadcast(device, vector, root)`; `vector` is `None` on all ranks but the root, and all return it.
#
# | limit | | with 8 ranks and 3 numbers |
# |---|---|---|
# | steps | $\lceil \log_2 p \rceil (1 + n)$ | 12 |
# | bytes sent by any rank | $8 \lceil \log_2 p \rceil n$ | 72 |
#
# **Count first**: the root sends to one rank after another. How many steps are that for 8 ranks, and for 1024?
#
# <details><summary>Hint</summary>
#
# After the first message two ranks have the vector. How many can have it after the second round, if nobody who has it
# is idle? Let the root be rank 0 first; then count ranks from the root on, $(r - root) \bmod p$.
#
# </details>


# %% id="broadcast-answer" exercise=true
def broadcast(device, vector, root):
    """The root's vector, on all ranks."""
    ...
    ### BEGIN SOLUTION
    place, reach = (device.rank - root) % device.ranks, 1
    while reach < device.ranks:
        if place < reach and place + reach < device.ranks:
            device.send((place + reach + root) % device.ranks, vector)
        elif reach <= place < 2 * reach:
            vector = device.recv((place - reach + root) % device.ranks)
        reach *= 2
    return vector
    ### END SOLUTION


# %% id="broadcast-draw"
puzzles.draw("broadcast", broadcast)

# %% id="broadcast-check" points=2
hpclab.check("puzzles.broadcast", broadcast)

# %% [markdown] id="overlap"
# ## Puzzle 3: overlap
#
# Two ranks train one model on two halves of a batch. Write `overlap(device, layers, backward, update)`:
#
# - `backward(layer)` computes for $b$ steps and returns the rank's gradient of that layer, $n$ numbers. It goes from
#   the last layer, `layers - 1`, to layer 0.
# - `update(layer, gradient)` computes for $u$ steps and returns the layer's new weights. Give it the *mean* gradient of both ranks.
#
# Return the list of the new weights, layer 0 first. A message takes at least as long as the computing for a layer: $1 + n \geq b + u$.
#
# | limit | | with 6 layers of 3 numbers, $b = 2$, $u = 1$ |
# |---|---|---|
# | steps | $b + L (1 + n) + u$ | 27 |
# | bytes sent by any rank | $8 L n$ | 144 |
#
# **Count first**: compute all gradients, then exchange them, then update. How many steps, and how long is the network idle?
#
# <details><summary>Hint</summary>
#
# The formula says it: only the first `backward` and the last `update` are seen; everything else hides behind the messages.
# What is the earliest moment at which a gradient can leave? And the latest at which you must have the other rank's?
#
# </details>


# %% id="overlap-answer" exercise=true
def overlap(device, layers, backward, update):
    """New weights of all layers, after a step with the mean gradient of both ranks."""
    ...
    ### BEGIN SOLUTION
    other, own, weights = 1 - device.rank, {}, [None] * layers
    for layer in reversed(range(layers)):
        own[layer] = backward(layer)
        device.send(other, own[layer])
    for layer in reversed(range(layers)):
        weights[layer] = update(layer, (own[layer] + device.recv(other)) / 2)
    return weights
    ### END SOLUTION


# %% id="overlap-draw"
puzzles.draw("overlap", overlap)

# %% id="overlap-check" points=2
hpclab.check("puzzles.overlap", overlap)

# %% [markdown] id="pipeline"
# torch's DDP sends gradients early too, with one more trick: it gathers small ones into buckets, since each message pays its
# latency.
#
# ## Puzzle 4: pipeline
#
# A model of $p$ layers is too large for one device, so each rank has one layer. Rank 0 has the batch, and the last rank
# computes the loss. Write `pipeline(device, stage, batch, parts)`, which returns the gradient of the rank's own layer for the
# whole batch. `batch` is an array of rows on rank 0, and `None` elsewhere. `parts` divides the number of rows.
#
# - `stage.forward(part, x)` returns what the layer makes of the rows x. It takes a step a row, and remembers what
#   `backward` needs, under the number `part`, which you choose.
# - `stage.loss(y)`, on the last rank, returns the derivative of the loss by y. It is free.
# - `stage.backward(part, derivative)` takes two steps a row and returns a pair: the derivative to hand to the rank
#   below, and the gradient of this layer for those rows. The gradient of the batch is the *sum* over its rows.
#
# Here each message takes one step, whatever its size.
#
# | limit | | with 4 ranks, 4 parts of 1 row |
# |---|---|---|
# | steps | $(m + p - 1)(f + b) + 2 (p - 1)$ | 27 |
#
# with $m$ parts, each of which takes $f$ steps forward and $b = 2 f$ back. The share $(p - 1) / (m + p - 1)$ of the computing
# time is the *bubble*, in which a rank has nothing to do.
#
# **Count first**: pass the batch on as one piece. How many ranks compute at a time, and how many steps are that?
#
# <details><summary>Hint</summary>
#
# Write it for one piece first: `batch` goes up rank by rank, and the derivative comes back down. Then cut the batch with `np.split`. In
# what order can a rank do its $2 m$ computations so that the next rank can begin soon?
#
# </details>


# %% id="pipeline-answer" exercise=true
def pipeline(device, stage, batch, parts):
    """Gradient of this rank's layer, for the whole batch."""
    ...
    ### BEGIN SOLUTION
    below, above, gradient = device.rank - 1, device.rank + 1, 0
    pieces, derivatives = np.split(batch, parts) if below < 0 else [], []
    for part in range(parts):
        y = stage.forward(part, pieces[part] if below < 0 else device.recv(below))
        if above < device.ranks:
            device.send(above, y)
        else:
            derivatives.append(stage.loss(y))
    for part in range(parts):
        arrived = derivatives[part] if above == device.ranks else device.recv(above)
        derivative, more = stage.backward(part, arrived)
        if below >= 0:
            device.send(below, derivative)
        gradient = gradient + more
    return gradient
    ### END SOLUTION


# %% id="pipeline-draw"
puzzles.draw("pipeline", pipeline)

# %% id="pipeline-check" points=3
hpclab.check("puzzles.pipeline", pipeline)

# %% [markdown] id="optimizer"
# Does your rank 0 do all its forward passes first? Then it has to remember all parts at once. Real pipelines go backward as
# soon as they can (*1F1B*): rank $r$ makes $p - 1 - r$ forward passes ahead, and never remembers more than $p - r$ parts,
# however many there are. (Here there are as many as ranks, so rank 0 gains nothing; the later ones do.) Where messages are
# free, the bubble is the same; here, where each takes a step, 1F1B takes 31 steps and is over the limit.
#
# ## Puzzle 5: sharded optimiser
#
# Gradient descent with momentum keeps a velocity for every weight: $v \leftarrow \mu v + g$, then $w \leftarrow w - \eta v$,
# where $g$ is the mean of the ranks' gradients and $v$ begins at zero. In data parallel training every rank keeps the same $v$: $p$
# copies of one thing. Write `optimizer(device, weights, gradient, state, rate, momentum)`, one step of training. It returns a pair:
# the new weights, all $N$ of them and equal on all ranks, and a state of your own making. The next step gets that state
# back; in the first step it is `None`. $N$ is a multiple of $p$. Steps are not limited here, but memory is: what a
# rank returns is what it keeps.
#
# | limit | | with 4 ranks and 8 weights, in two steps of training |
# |---|---|---|
# | bytes sent by any rank, a step of training | $8 \cdot 2 (p - 1) N / p$ | 2 x 96 |
# | bytes kept: weights and state | $8 (N + N / p)$ | 80 |
#
# **Count first**: sum the gradients as in puzzle 1, and let all ranks update all weights. Which limit does that break?
#
# <details><summary>Hint</summary>
#
# If each weight has one rank that keeps its velocity, who needs which gradients? And who needs what afterwards?
#
# </details>


# %% id="optimizer-answer" exercise=true
def optimizer(device, weights, gradient, state, rate, momentum):
    """New weights, and the state that this rank keeps for the next step."""
    ...
    ### BEGIN SOLUTION
    rank, ranks = device.rank, device.ranks
    others = [(rank + distance) % ranks for distance in range(1, ranks)]
    gradients, parts = np.split(gradient, ranks), np.split(weights, ranks)
    for other in others:
        device.send(other, gradients[other])
    mean = sum([device.recv(other) for other in others], gradients[rank]) / ranks
    state = mean if state is None else momentum * state + mean
    parts[rank] = parts[rank] - rate * state
    for other in others:
        device.send(other, parts[rank])
    for other in others:
        parts[other] = device.recv(other)
    return np.concatenate(parts), state
    ### END SOLUTION


# %% id="optimizer-draw"
puzzles.draw("optimizer", optimizer)

# %% id="optimizer-check" points=3
hpclab.check("puzzles.optimizer", optimizer)

# %% [markdown] id="all-to-all"
# This is stage 1 of ZeRO: as many bytes as an all-reduce, and a $p$-th of the optimiser's memory. Adam keeps *two* numbers for every
# weight, often in higher precision than the weight itself, so there it saves even more.
#
# ## Puzzle 6: all-to-all
#
# In a mixture of experts each rank has an expert, and tokens for all of them. Write `all_to_all(device, blocks)`: `blocks` is a
# list of $p$ arrays of $n$ numbers, and block $j$ is for rank $j$. Return the list of the blocks that are for this rank, in the
# order of the ranks that they come from. Its own block is among them, and doesn't travel.
#
# | limit | | with 4 ranks, blocks of 2 numbers |
# |---|---|---|
# | steps | $(p - 1)(1 + n)$ | 9 |
# | bytes sent by any rank | $8 (p - 1) n$ | 48 |
#
# **Count first**: every rank sends to rank 0 first, then to rank 1, and so on. Which rank's receiver is busy when?
#
# <details><summary>Hint</summary>
#
# A message that queues also holds up those behind it. Draw who sends to whom in the first round: when does no rank get two
# messages?
#
# </details>


# %% id="all-to-all-answer" exercise=true
def all_to_all(device, blocks):
    """The blocks that all ranks have for this one, by rank."""
    ...
    ### BEGIN SOLUTION
    others = [(device.rank + distance) % device.ranks for distance in range(1, device.ranks)]
    for other in others:
        device.send(other, blocks[other])
    for other in others:
        blocks[other] = device.recv(other)
    return blocks
    ### END SOLUTION


# %% id="all-to-all-draw"
puzzles.draw("all_to_all", all_to_all)

# %% id="all-to-all-check" points=2
hpclab.check("puzzles.all_to_all", all_to_all)

# %% [markdown] id="end"
# ## Summary
#
# - Count before you run: latencies and bytes of the *busiest* rank, not of all together.
# - A rank that everybody sends to is a bottleneck, even if every other rank is fast: spread the work (ring, all-to-all), or
#   have those help who have the data already (tree).
# - Send as early as you can, receive as late as you can.
# - Cut the work, and ranks that depend on each other can still compute at the same time. What remains is the bubble.
# - What only one rank needs, only one rank has to keep.
#
# ### What breaks at scale
#
# Here every message has the same price. On a real cluster a neighbour on the same host is nearer than one behind three switches,
# and messages of different pairs share cables: an all-to-all between thousands of ranks is often limited by the network's middle (its
# *bisection*), where that is thinner than all ends together. Ranks are also never equally fast; each receive waits for its sender, so
# in the end all wait for the slowest.
#
# ### References
#
# - S. Rush, *LLM Training Puzzles*, 2023, github.com/srush/LLM-Training-Puzzles (the idea of this notebook; after these, try
#   those).
# - E. Chan, M. Heimlich, A. Purkayastha, R. van de Geijn, *Collective communication: theory, practice, and experience*, 2007.
# - Y. Huang and others, *GPipe: Efficient Training of Giant Neural Networks using Pipeline Parallelism*, 2019,
#   arXiv:1811.06965.
# - S. Rajbhandari and others, *ZeRO: Memory Optimizations Toward Training Trillion Parameter Models*, 2020, arXiv:1910.02054.
# - D. Narayanan and others, *PipeDream: Generalized Pipeline Parallelism for DNN Training*, 2019 (1F1B).
