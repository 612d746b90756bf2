# %% [markdown] id="title"
# # CNN: the same loss, sooner
#
# **You will** train a convolutional network with a plain loop, then with two ranks; show that both take the *same*
# steps; measure the speed-up, with repeats; and avoid two bugs that almost everybody writes once. Parts headed
# *For later* can wait.
#
# | | |
# |---|---|
# | objectives | write a serial training loop; explain why data parallelism changes nothing but the time; measure a speed-up with its spread; share out the data anew in each epoch, and scale the learning rate |
# | prerequisites | the notebook *start*; what a gradient is |
# | minutes | 30 to read and do, 15 of them for the exercises; 50 with the parts *for later*; under 3 to run |
# | needs | 1 CPU (2 to see a speed-up), 1.5 GB of memory, 2 ranks, no network |
#
# New terms are defined in the [glossary](glossary.md#data-parallelism), in English and in Chinese.

# %% id="parameters" tags=["parameters"]
import hpclab

SIZE = hpclab.size()  # how much to do: "small", "class" or "cluster", as the variable HPCLAB_SIZE says

# %% id="imports"
import numpy as np
import torch
from torch.nn.functional import cross_entropy

from hpclab.course.plots import pictures

EPOCHS, REPEATS, STEPS = {"small": (1, 3, 10), "class": (2, 5, 20), "cluster": (10, 5, 200)}[SIZE]

# %% [markdown] id="data"
# ## The pictures
#
# Fashion-MNIST: grey pictures of clothes, 28 by 28 pixels, in ten classes. hpclab ships a part of it: 10,000 pictures for
# training and 2,000 for testing. They are stored as a few plain arrays that are *mapped* into memory, so a batch is
# read only when you ask for it.

# %% id="data-look"
images = hpclab.data.load("fashion_mnist", "train")
batch, labels = images[list(range(8))]
pictures(batch, [images.classes[label] for label in labels])

# %% [markdown] id="serial"
# ## Correct and serial first
#
# A convolution looks at each pixel's neighbourhood with the same few weights, everywhere in the picture. Our network is
# two of them, each followed by pooling to half the size, and one linear layer. This is all that training is: take a batch,
# compute the loss, compute the gradient, take a step.

# %% id="serial-do"
torch.manual_seed(0)
model = hpclab.models.CNN()
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
order = torch.randperm(len(images))

for step, chosen in enumerate(order[: 20 * 128].split(128)):
    inputs, targets = (torch.from_numpy(part) for part in images[chosen.numpy()])
    loss = cross_entropy(model(inputs), targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 5 == 4:
        print(f"step {step + 1}: loss {loss.item():.3f}")

# %% [markdown] id="idea"
# ## The idea of data parallelism
#
# The loss of a batch is the *mean* over its pictures, and so is its gradient. Let each of two ranks compute the gradient of
# half a batch, and average the two: that is the gradient of the whole batch. If both ranks start with the same weights and
# take the same step with that average, they *keep* the same weights without ever sending them.
#
# torch's `DistributedDataParallel` does the averaging. `hpclab.train` wraps it around your model, deals out the pictures,
# and sends the measurements back as rows.
#
# "The same gradient" holds on four conditions: the halves are equally large, the loss is a *mean* over the pictures, no
# layer looks at the batch as a whole, and none draws random numbers (dropout). Below are four cases: equal halves; 96 pictures and 32; a loss that is a *sum*;
# batch norm. **Predict**: how many of the four differ from the whole batch's gradient by more than rounding?

# %% id="conditions-predict"
hpclab.predict("cnn.conditions", ..., "of the four")

# %% id="conditions-do"
inputs, targets = (torch.from_numpy(part) for part in images[list(range(128))])


def gradient(net, part, reduction="mean"):
    net.zero_grad()
    cross_entropy(net(inputs[part]), targets[part], reduction=reduction).backward()
    return torch.cat([weight.grad.flatten() for weight in net.parameters()])


def distance(net, cut, reduction="mean"):
    """How far the mean of two parts' gradients is from the whole batch's, relative to the latter."""
    whole, *parts = (gradient(net, part, reduction) for part in (slice(None), slice(0, cut), slice(cut, None)))
    return float((sum(parts) / 2 - whole).norm() / whole.norm())


normed = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.BatchNorm1d(784), torch.nn.Linear(784, 10))
apart = {
    "equal halves": distance(hpclab.models.CNN(), 64),
    "96 pictures and 32": distance(hpclab.models.CNN(), 96),
    "equal halves, a loss that is a sum": distance(hpclab.models.CNN(), 64, "sum"),
    "equal halves, batch norm": distance(normed, 64),
}
hpclab.tables.Table({"case": case, "relative difference": f"{found:.1g}"} for case, found in apart.items())

# %% id="conditions-came"
hpclab.came("cnn.conditions", sum(found > 1e-5 for found in apart.values()))

# %% [markdown] id="conditions-explain"
# **Explain.** The mean of two means is the overall mean only if both parts have the same size. A *sum* over the whole batch
# is twice the mean of the two sums. And batch norm subtracts the mean of *its* batch: half a batch has another mean, so
# each rank computes another function. (On GPUs, `torch.nn.SyncBatchNorm` makes the ranks agree on mean and variance first.) `hpclab.train`
# deals out equal parts and leaves out the remainder; the course's CNN has no batch norm.

# %% [markdown] id="connect-explain"
# Now a cluster, and a function that trains on it:

# %% id="connect"
client = hpclab.connect(workers=max(2, hpclab.machine.fits()))


def train(client, ranks, threads=1, **settings):
    return hpclab.train(
        client,
        hpclab.models.CNN,
        "fashion_mnist",
        ranks=ranks,
        threads=threads,
        oversubscribe=True,
        batch_size=256 // ranks,
        **settings,
    )


# %% [markdown] id="same"
# ## The same loss
#
# **Predict**: one rank with batches of 256 against two ranks with 128 each, the same seed, a small learning rate. By how
# much will their losses differ after 30 steps: a tenth, a thousandth (`1e-3`), a millionth?

# %% id="same-predict"
hpclab.predict("cnn.same_loss", ..., "apart")


# %% id="same-do"
def losses(rows):
    steps = {}
    for row in rows:
        if row["kind"] == "step":
            steps.setdefault(row["step"], []).append(row["loss"])
    return torch.tensor([sum(at) / len(at) for _, at in sorted(steps.items())])


one = train(client, ranks=1, steps=30, lr=0.005).result()
two = train(client, ranks=2, steps=30, lr=0.005).result()
difference = (losses(one.rows) - losses(two.rows)).abs()
hpclab.tables.Table(
    {"step": step + 1, "1 rank": f"{a:.6f}", "2 ranks": f"{b:.6f}", "difference": f"{d:.1e}"}
    for step, (a, b, d) in enumerate(zip(losses(one.rows), losses(two.rows), difference, strict=True))
    if step == 0 or step % 5 == 4
)

# %% id="same-came"
hpclab.came("cnn.same_loss", difference[-1])

# %% [markdown] id="same-explain"
# **Explain.** Single precision keeps about seven digits, and a sum taken in another order rounds differently. Under the
# four conditions above nothing else differs. Data parallelism isn't to blame: one process with another number of threads
# can show the same. (A large learning rate *amplifies* such differences in the early steps, as weather does: two correct runs
# diverge visibly, and end equally good.)

# %% [markdown] id="sooner"
# ## Sooner
#
# Now the race, with a learning rate that learns: one rank; one process with all threads; two ranks. All three keep freed
# memory for their next step, as every rank here does.

# %% id="sooner-do"
race = hpclab.race(client, hpclab.models.CNN, "fashion_mnist", epochs=EPOCHS)
race.table()

# %% id="sooner-verdict"
race.verdict()

# %% [markdown] id="measure"
# ## How sure?
#
# A race is one measurement, on a machine that others use too. A **sweep** runs each case several times, interleaved and in
# shuffled order, so that a slow minute affects all cases alike. Each speed-up divides two runs of the *same* round: what
# slowed both alike cancels. The interval is Student's, at 95 %, over the rounds: of many such sweeps, 95 in a hundred would give
# an interval that contains the true ratio. The first steps don't count: they allocate
# memory, and prepare what later steps use again.

# %% id="measure-do"
rows = hpclab.scaling.sweep(
    client,
    lambda client, ranks, threads, **_: train(client, ranks, threads, steps=STEPS, progress=False),
    cases=hpclab.racing.racers(),
    repeats=REPEATS,
)
gains = hpclab.scaling.paired(rows)
hpclab.plots.ratios(gains, "times as fast as 1 rank")
hpclab.tables.Table({"case": row["measure"], "times as fast as 1 rank": hpclab.ratios.told(row)} for row in gains)

# %% [markdown] id="measure-explain"
# **Why wasn't it twice as fast?** Go through the suspects in order:
#
# - *Waiting for data*: its share of the step's time is in the rows (`data_share`).
# - *Communication*: 201 kB of gradients a step. DDP packs gradients into *buckets*, and sends each when it is full. These
#   all fit into one, which is full only when the backward pass ends, so none of it is hidden. (*scaling* shows how smaller buckets hide some.)
# - *Sharing*: two busy CPUs share memory and caches, and also run this notebook's kernel, which draws. Hardware threads of
#   one core even share its arithmetic units.
# - *Smaller batches*: half a batch doesn't always take half the time.
#
# An interval that contains 1 shows no difference. Few rounds make it wide, and so do other programs on this machine. To claim more,
# measure more rounds: raise `repeats` above. With one
# CPU, nothing here can be faster: the rows say *emulated*.

# %% id="data-share"
shares = {row["label"]: [other["data_share"] for other in rows if other["label"] == row["label"]] for row in rows}
hpclab.tables.Table({"case": case, "waiting for data": f"{np.median(of_case):.1%}"} for case, of_case in shares.items())

# %% [markdown] id="order"
# ## Exercise: the order of the data
#
# Before each epoch the pictures are shuffled and dealt out to the ranks. No rank asks another: each works out its own
# share alone. Much can go wrong here without any error. If every rank shuffles with its own dice, some pictures are seen
# twice and others never. If the dice ignore the epoch, the model sees the same batches in the same order again and again.
# If one rank has a picture more than the others, it may take a step more than they do, and then nobody answers its last
# all-reduce.
#
# Write `epoch_order(length, rank, ranks, seed, epoch)`. It returns the list of pictures (numbers below `length`) that this
# rank visits in that epoch, such that
#
# - all ranks share out *one* shuffled order; it changes with the epoch, and with the seed;
# - called again with the same arguments it returns the same list, in any process;
# - every picture is visited, and all ranks get equally many: if `ranks` doesn't divide `length`, a few pictures are
#   visited twice, fewer than there are ranks.
#
# <details><summary>Hint</summary>
#
# What do all ranks know alike? A `torch.Generator` or a `random.Random` can be seeded, and nothing else draws from it.
#
# </details>


# %% id="order-answer" exercise=true
def epoch_order(length, rank, ranks, seed, epoch):
    ...
    ### BEGIN SOLUTION
    generator = torch.Generator().manual_seed(seed + epoch)
    order = torch.randperm(length, generator=generator).tolist()
    order += order[: -length % ranks]
    return order[rank::ranks]
    ### END SOLUTION


# %% id="order-check" points=2
hpclab.check("cnn.order", epoch_order)

# %% [markdown] id="quiz-interval"
# ## Quiz
#
# ### State an interval
#
# Three variants of a program, each measured in six rounds beside the same baseline: the mean ratio, with its 95 % interval.
# Which statements are true? Set `interval_answer` to the set of their letters.
#
# - a: At this level, A is faster than the baseline.
# - b: B is exactly as fast as the baseline.
# - c: At this level, C is faster than the baseline.
# - d: The figure alone shows that A is faster than C.
# - e: Of single rounds with C, 95 % have a ratio from 1.05 to 1.6.
# - f: More rounds that scatter as much would, on average, give narrower intervals.

# %% id="quiz-interval-show"
from hpclab.course import quizzes

quizzes.show("cnn.quiz_interval")

# %% id="quiz-interval-answer" exercise=true
interval_answer = ...
### BEGIN SOLUTION
interval_answer = {"a", "c", "f"}
### END SOLUTION

# %% id="quiz-interval-check" points=1
hpclab.check("cnn.quiz_interval", interval_answer)

# %% [markdown] id="rate"
# ## For later: the learning rate
#
# The path of 90 minutes goes on with the *summary* at the end. You found a good learning rate for a batch of `base_batch` pictures on one process. Now `ranks` ranks take
# `batch_size` pictures *each*, so a step sees more pictures, and an epoch has fewer steps. If you leave the rate alone, the
# weights move less far in an epoch: training looks slower, although each second does more.
#
# Write `scaled_lr(base_lr, base_batch, batch_size, ranks)`, so that one large step moves the weights as far as the
# small steps that it replaces. The optimiser is SGD; this *linear* rule is SGD's. (Adam divides by the size of the
# gradient, and is often scaled by the square root instead.)
#
# <details><summary>Hint</summary>
#
# How many of the small batches does one large step replace? Assume that their gradients are about equal.
#
# </details>


# %% id="rate-answer" exercise=true
def scaled_lr(base_lr, base_batch, batch_size, ranks):
    ...
    ### BEGIN SOLUTION
    return base_lr * batch_size * ranks / base_batch
    ### END SOLUTION


# %% id="rate-check" points=2
hpclab.check("cnn.learning_rate", scaled_lr)

# %% [markdown] id="quiz-batch"
# ### Quiz: steps and rate
#
# One process trained well by SGD with batches of 20 pictures and a learning rate of 0.1. Now 4 ranks take batches of 25
# pictures *each*, from 40,000 pictures. How many steps are in an epoch, and which learning rate does the linear rule give?
# Set `batch_answer` to the pair.

# %% id="quiz-batch-answer" exercise=true
batch_answer = ...
### BEGIN SOLUTION
batch_answer = (400, 0.5)
### END SOLUTION

# %% id="quiz-batch-check" points=1
hpclab.check("cnn.quiz_batch", batch_answer)

# %% [markdown] id="play"
# ## For later: play
#
# Each time you move a control below, a real gang trains again; the previous curve stays, in grey. Before each move, ask
# yourself what will happen to the samples a second, and where the time will go,
#
# - if one more rank shares the same samples per step? If there are half as many samples per step?
# - if a slow network lies between the ranks (its waiting is *emulated*, all else is real)? Which batch size helps then?
#
# The second cell makes *Run All* wait for the first run.

# %% id="play-do"
play = hpclab.playground.Playground(client, hpclab.models.CNN, "fashion_mnist", steps=STEPS * 5)
play

# %% id="play-wait"
done = play.wait()

# %% [markdown] id="look"
# ## For later: what it learned
#
# Train two ranks again, load the weights that come back into a model here, and see how it labels pictures that it has
# never seen. Each title is the model's guess; a wrong one also says what it is.

# %% id="look-do"
fit = train(client, ranks=2, epochs=EPOCHS).result()
model.load_state_dict(fit.weights)
test = hpclab.data.load("fashion_mnist", "test")
batch, labels = test[list(range(8))]
with torch.no_grad():
    guesses = model(torch.from_numpy(batch)).argmax(1)
said = zip(guesses, labels, strict=True)
names = [(test.classes[guess], test.classes[label]) for guess, label in said]
pictures(batch, [guess if guess == label else f"{guess},\nnot {label}" for guess, label in names])

# %% [markdown] id="deeper"
# ## For later: a deeper network
#
# Two convolutions see small patterns. More layers see more, but a plain stack of many layers is harder to train: beyond
# some depth even its *training* loss gets worse. A **ResNet** adds each block's input to its output: a block need only
# learn what to change, and the gradient also has a way around it.
#
# **Predict**: by its operations the ResNet should take 2.4 times as long for a step. How many times as long does it take,
# on one rank?

# %% id="deeper-predict"
hpclab.predict("cnn.deeper", ..., "times as long")

# %% id="deeper-do"
networks = {"CNN": hpclab.models.CNN(), "ResNet": hpclab.models.ResNet()}
deeper = hpclab.scaling.sweep(
    client,
    lambda client, network, ranks: hpclab.train(
        *(client, network, "fashion_mnist"), ranks=ranks, oversubscribe=True, steps=STEPS, progress=False
    ),
    cases=[{"network": network, "ranks": ranks} for network in networks for ranks in (1, 2)],
    repeats=REPEATS,
)
one, two, deep_one, deep_two = (
    1e3 * np.median([row["step_s"] for row in deeper if row["case"] == case]) for case in range(4)
)
hpclab.tables.Table(
    {
        "network": name,
        "weights": f"{networks[name].counts().parameters:,}",
        "million operations a picture": round(networks[name].counts().flops / 1e6, 1),
        "step of 1 rank (ms)": round(first, 1),
        "of 2 ranks (ms)": round(second, 1),
    }
    for name, first, second in (("CNN", one, two), ("ResNet", deep_one, deep_two))
)

# %% id="deeper-came"
hpclab.came("cnn.deeper", deep_one / one)

# %% [markdown] id="deeper-explain"
# **Explain.** Operations were a fair guess: on two quiet CPUs we saw 2.1. What takes time but counts as no operation
# differs: the CNN's pooling takes about as long as its large convolution, and the ResNet has no such pooling; but it has
# batch norm and additions, which move much and compute little (*one-process* tells why).
#
# As each rank has 64 pictures in both columns, the second would be as long as the first, but for sharing, waiting and communication. The
# ResNet sends half as many bytes again, for twice the computing. So on a network of low bandwidth it loses a smaller
# share than the CNN. (One of high latency is another matter: DDP also sends batch norm's running averages before each
# forward pass, in small messages.) On one machine most of the loss is sharing: compare theirs.
#
# And batch norm? Each rank takes the means of its *own* pictures, so two ranks no longer train exactly as one does (see
# above). `models.resnet.SyncBatchNorm` takes them over all ranks, for two more messages a layer and pass.

# %% id="close"
client.close()

# %% [markdown] id="end"
# ## Summary
#
# - Data parallelism computes the *same* gradient in parts. Only rounding and the time differ.
# - A speed-up needs a baseline that nobody can call weak: show one process with all threads too.
# - Two bugs raise no error: the order of the data doesn't change between epochs (torch's `DistributedSampler` needs
#   `set_epoch` before each); the learning rate isn't scaled to the global batch.
#
# ### What breaks at scale
#
# With many ranks the global batch becomes so large that a scaled learning rate diverges in the first steps. Goyal and
# others warm it up over a few epochs; beyond some thousands of pictures a step even that fails, and other optimisers
# (LARS, LAMB) take over.
#
# ### References
#
# - P. Goyal and others, *Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour*, 2017, arXiv:1706.02677.
# - K. He and others, *Deep Residual Learning for Image Recognition*, 2015, arXiv:1512.03385.
# - S. Li and others, *PyTorch Distributed: Experiences on Accelerating Data Parallel Training*, 2020, arXiv:2006.15704.
# - L. Smith, N. Topin, *Super-Convergence*, 2018, arXiv:1708.07120 (the one-cycle schedule).
# - H. Xiao, K. Rasul, R. Vollgraf, *Fashion-MNIST*, 2017, arXiv:1708.07747.
