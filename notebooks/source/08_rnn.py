# %% [markdown] id="title"
# # RNN: stragglers
#
# **You will** train a recurrent network on talks of very different lengths, see two ranks with equally many of them wait
# for each other, make it worse with a well-known trick, and write the sampler that mends it.
#
# | | |
# |---|---|
# | objectives | say why equal samples aren't equal work; tell padding from waiting; deal out samples so that the ranks are done at the same time; weigh the ranks' means so that their mean is the right one |
# | prerequisites | the notebooks *start* and *cnn* |
# | minutes | 35 to read and do, 20 of them for the exercise; under 2 to run |
# | needs | 1 CPU, 1.5 GB of memory, 2 ranks, no network |
#
# New terms are defined in the [glossary](glossary.md#straggler), in English and in Chinese.

# %% id="parameters" tags=["parameters"]
import hpclab

SIZE = hpclab.size()  # how much to do: "small", "class" or "cluster", as the variable HPCLAB_SIZE says

# %% id="imports"
import numpy as np
import torch
from torch.nn.functional import cross_entropy

from hpclab import live
from hpclab.course import ragged
from hpclab.course.plots import waits
from hpclab.training.strategies.shares import weights

EPOCHS = {"small": 2, "class": 8, "cluster": 40}[SIZE]
RANKS, BATCH = 2, 8

# %% [markdown] id="data"
# ## The talks
#
# Nine men said two Japanese vowels, /ae/, again and again; the data set *JapaneseVowels* holds each recording as 7 to 29 frames of
# twelve numbers. The network's task is to say who speaks. To have lengths as real speech and text have them, with a long
# tail, we join recordings of one speaker to *talks*: the shortest has one recording, the longest twelve.

# %% id="data-do"
talks = ragged.Talks()
lengths = talks.lengths
names = ("least", "a quarter below", "half below", "three quarters below", "most")
print(f"{len(talks)} talks by {len(talks.classes)} speakers; of frames:")
for name, frames in zip(names, np.quantile(lengths, [0, 0.25, 0.5, 0.75, 1]), strict=True):
    print(f"{name} {frames:.0f}")

# %% [markdown] id="recurrent"
# A recurrent network (RNN) reads a talk frame by frame, and keeps a *state*: some numbers, which each frame changes. After
# the last frame, a linear layer turns the state into a score for each speaker. A batch must be one array, so shorter talks
# get *padding* at their end. torch can skip it (`pack_padded_sequence`, as our RNN does); a transformer's plain
# attention computes it, and throws it away.
#
# Deal them out as in the notebook *cnn*: shuffle, give each rank every second talk, cut into batches of 8. The function
# returns a *plan*: for each rank, its list of batches.


# %% id="random-define"
def random_plan(lengths, ranks, batch_size, seed, epoch):
    order = np.random.default_rng([seed, epoch]).permutation(len(lengths))
    steps = -(-len(lengths) // (ranks * batch_size))  # rounded up
    return [np.array_split(order[rank::ranks], steps) for rank in range(ranks)]


# %% [markdown] id="frames"
# Each rank has 8 talks a step (7 in the last, as 270 isn't a multiple of 16). **Predict**: how many times as many
# frames has the rank with more as the rank with fewer, in a typical step?

# %% id="frames-predict"
hpclab.predict("rnn.frames", ..., "times as many frames")

# %% id="frames-do"
plan = random_plan(lengths, RANKS, BATCH, seed=0, epoch=0)
frames = np.array([[lengths[batch].sum() for batch in batches] for batches in plan])  # (ranks, steps)
hpclab.tables.Table(
    {"step": step, "frames of rank 0": a, "of rank 1": b} for step, (a, b) in enumerate(frames.T[:6], 1)
)

# %% id="frames-came"
hpclab.came("rnn.frames", np.median(frames.max(0) / frames.min(0)))

# %% [markdown] id="bucket"
# ## Less padding, and more waiting?
#
# The usual remedy for padding is *bucketing*: sort by length, and batch neighbours. In this version, which is easily
# written, each rank sorts its own talks, cuts them into batches, and shuffles the batches.


# %% id="bucket-define"
def bucketed(lengths, ranks, batch_size, seed, epoch):
    plan = []
    for rank, batches in enumerate(random_plan(lengths, ranks, batch_size, seed, epoch)):
        own = np.concatenate(batches)
        batches = np.array_split(own[np.argsort(lengths[own])], len(batches))
        dice = np.random.default_rng([seed, epoch, rank])
        plan.append([batches[place] for place in dice.permutation(len(batches))])
    return plan


for way in (random_plan, bucketed):
    print(f"{way.__name__}: {ragged.padding(lengths, way(lengths, RANKS, BATCH, 0, 0)):.0%} of the frames are padding")

# %% [markdown] id="wait"
# Now train by both, on two ranks. In each step a rank computes the gradient of its batch, then waits at a *barrier* until
# the other has its own; then both average and take the step. The two ways take turns, an epoch each.
#
# **Predict**: the share of the time that a rank waits, with buckets: how many times that of random batches?

# %% id="wait-predict"
hpclab.predict("rnn.bucketed", ..., "times the share")

# %% id="connect"
client = hpclab.connect(workers=max(2, hpclab.machine.fits()))


def measure(**ways):
    plans = {name: [way(lengths, RANKS, BATCH, 0, epoch) for epoch in range(EPOCHS)] for name, way in ways.items()}
    steps = sum(len(plan[0]) for epochs in plans.values() for plan in epochs)
    run = hpclab.launch(client, ragged.follow, plans, ranks=RANKS, oversubscribe=True)
    run.watch(live.StepBar(steps, ", ".join(plans)))
    run.result()
    return run.rows


def shares(rows):
    """Share of the time that the ranks wait, by the way they were dealt their talks."""
    sums = {}
    for row in ragged.waits(rows):
        sums[row["case"]] = sums.get(row["case"], 0) + np.array([row["wait_s"], row["compute_s"]])
    return {case: wait / (wait + compute) for case, (wait, compute) in sums.items()}


# %% id="wait-do"
rows = measure(random=random_plan, bucketed=bucketed)
ax = waits(ragged.waits(rows))

# %% id="wait-came"
hpclab.came("rnn.bucketed", shares(rows)["bucketed"] / shares(rows)["random"])

# %% [markdown] id="wait-explain"
# **Explain.** Both ranks had about equally many talks. But a rank's work grows with its *frames*, and with its longest
# talk, not with its number of talks; and every step takes as long as the rank with more work. In a random batch long and
# short talks partly make up for each other. A bucket has talks of about one length: in one step a rank has eight long ones,
# and the other eight short ones. Bucketing removed most of the padding, and computing became cheaper: the network no longer
# goes on for some fifty frames, at times more than a hundred, with one or two talks left. But of that cheaper time, the
# ranks wait a larger share.
#
# The bars are CPU time, and a wait is what the other rank computes longer. A clock shows more: below is what the ranks
# spent at the barrier. It includes the barrier's own messages and, on a busy machine, the wait for a CPU, which is nobody's
# plan's fault.

# %% id="clock-do"
hpclab.tables.Table(
    {"case": row["case"], "rank": row["rank"], "waits, by CPU time (ms)": round(1e3 * row["wait_s"], 1)}
    | {"at the barrier, by the clock (ms)": round(1e3 * row["barrier_s"], 1)}
    for row in ragged.waits(rows)
)

# %% [markdown] id="mean"
# ## The mean of the means
#
# Unequal ranks are not only slower. Speech recognisers and language models have a loss for *every frame*, or token, and
# take its mean over the batch. Each rank takes the mean over its own frames, and DDP averages the ranks. Here the loss asks
# after each frame who speaks. The two ranks' batches come from the step in which the buckets differ most.
#
# **Predict**: how far is the mean of the two ranks' gradients from the gradient of the mean over all frames, relative to
# the latter's size? (A thousandth is `1e-3`.)

# %% id="mean-predict"
hpclab.predict("rnn.mean", ..., "of its size")

# %% id="mean-do"
torch.manual_seed(0)
model = hpclab.models.RNN()


def gradient(numbers):
    """Gradient of the mean loss over all frames of some talks."""
    model.zero_grad()
    padded, lengths, labels = talks.batch(numbers)
    scores = model.classifier(model.cell(padded)[0])  # (B, T, speakers)
    there = torch.arange(scores.shape[1]) < lengths[:, None]  # (B, T)
    cross_entropy(scores[there], labels[:, None].expand(there.shape)[there]).backward()
    return torch.cat([weight.grad.flatten() for weight in model.parameters()])


# %% id="mean-show-do"
both = zip(*bucketed(lengths, RANKS, BATCH, 0, 0), strict=True)
pair = max(both, key=lambda pair: abs(lengths[pair[0]].sum() - lengths[pair[1]].sum()))
own, whole = [gradient(batch) for batch in pair], gradient(np.concatenate(pair))
counts = [int(lengths[batch].sum()) for batch in pair]
means = {"each rank counts the same": [1, 1], "each frame counts the same": weights(counts)}
apart = {}
for name, (first, second) in means.items():
    apart[name] = float(((first * own[0] + second * own[1]) / RANKS - whole).norm() / whole.norm())
    print(f"{name}: weights {first:.3f} and {second:.3f} for {counts} frames, relative difference {apart[name]:.0e}")

# %% id="mean-came"
hpclab.came("rnn.mean", apart["each rank counts the same"])

# %% [markdown] id="mean-explain"
# **Explain.** DDP adds up the ranks' gradients and divides by their number: a rank with few frames counts as much as one
# with many, so each frame of a *short* talk counts more. No error is raised, and the loss still falls. The remedy: each
# rank multiplies its loss by `ranks * own frames / all frames`, which needs one all-reduce of a number, and the mean is
# exact again. What must be counted is what the loss is a mean *of*: frames here, talks in the training above, whose
# ranks sometimes have 7 and 8 talks, and are weighed so.
#
# ## Exercise: equal frames
#
# Write `plan(lengths, ranks, batch_size, seed, epoch)`, a plan by which
#
# - the ranks have nearly equal numbers of *frames* in each step (they wait for less than 6 % of the time), equally many
#   batches, and in each batch from one to `batch_size` talks;
# - an epoch sees every talk once, in as few steps as that takes;
# - talks of one batch are about equally long: of the padded frames, less than 37 % are padding (random batches have more
#   than half);
# - the next epoch mixes the talks anew: not only other steps, other *batches*, in no order of length; the same arguments
#   give the same plan on every rank, another seed another one.
#
# `lengths` is an array of whole numbers. Return a list of batches (lists of talks' numbers) for each rank.
#
# <details><summary>Hint</summary>
#
# Bucket *before* you deal: choose the talks of a whole step, of all ranks together. Then give the longest to a rank, and
# each next one to the rank that has the fewest frames so far. To meet other talks in each epoch, sort by lengths that
# you first changed a little, by chance.
#
# </details>


# %% id="plan-answer" exercise=true
def plan(lengths, ranks, batch_size, seed, epoch):
    ...
    ### BEGIN SOLUTION
    dice = np.random.default_rng([seed, epoch])
    steps = -(-len(lengths) // (ranks * batch_size))
    near = np.argsort(lengths * dice.uniform(0.9, 1.1, len(lengths)))  # about by length
    plan = [[[] for _ in range(steps)] for _ in range(ranks)]
    for step, chosen in zip(dice.permutation(steps), np.array_split(near, steps), strict=True):
        for talk in chosen[::-1]:
            free = [batches[step] for batches in plan if len(batches[step]) < batch_size]
            min(free, key=lambda batch: sum(lengths[other] for other in batch)).append(talk)
    return plan
    ### END SOLUTION


# %% id="plan-check" points=2
hpclab.check("rnn.plan", plan)

# %% [markdown] id="yours"
# ## Your plan at work
#
# **Predict**: two ranks train by your plan. Which share of the time do they wait, in percent? (With a good plan they would
# wait for about 2 % by its frames alone.)

# %% id="yours-predict"
hpclab.predict("rnn.balanced", ..., "percent")

# %% id="yours-do"
ways = {"random": random_plan, "bucketed": bucketed}
if plan(lengths, RANKS, BATCH, 0, 0):  # it's written
    ways["yours"] = plan
rows = measure(**ways)
ax = waits(ragged.waits(rows))

# %% id="yours-came"
hpclab.came("rnn.balanced", 100 * shares(rows).get("yours", np.nan))

# %% id="yours-learn"
hpclab.tables.Table(
    {"case": row["case"], "speakers named right": f"{row['test_accuracy']:.0%}"}
    for row in rows
    if "test_accuracy" in row
)

# %% [markdown] id="yours-explain"
# **Explain.** Each step now has talks of about one length, shared out so that both ranks get about equally many
# frames. Little is padded, and little is waited for. Frames don't tell everything: a step also costs something for each
# frame of its *longest* talk, and CPUs aren't equally fast all the time.
#
# Does it learn as well? After so few epochs the accuracies differ by chance as much as by plan. But a batch of similar
# talks *is* a less random sample: its gradient varies more from step to step. That is why buckets shouldn't be finer
# than they need be, and why the exercise wants the talks mixed anew.

# %% [markdown] id="quiz-waits"
# ## Quiz
#
# ### Who waits?
#
# The frames of two ranks in four steps; they average their gradients in each. A frame takes a millisecond, and messages take
# no time. Which statements are true? Set `waits_answer` to the set of their letters.
#
# - a: Over the four steps both ranks have equally many frames.
# - b: The four steps take 280 ms.
# - c: Each rank waits for 60 ms in all.
# - d: If each rank took its own batches in order of length, the four steps would take less time.
# - e: A faster network would shorten the waits.

# %% id="quiz-waits-show"
from hpclab.course import quizzes

quizzes.show("rnn.quiz_waits")

# %% id="quiz-waits-answer" exercise=true
waits_answer = ...
### BEGIN SOLUTION
waits_answer = {"a", "c", "d"}
### END SOLUTION

# %% id="quiz-waits-check" points=1
hpclab.check("rnn.quiz_waits", waits_answer)

# %% [markdown] id="quiz-mean"
# ### Which mean?
#
# Rank 0 has 300 tokens, and their mean loss is 1.0. Rank 1 has 100, with a mean loss of 3.0. What is the mean of the two
# ranks' means, what is the mean over all tokens, and by what must rank 0 multiply its loss so that the mean over the ranks
# becomes the latter? Set `mean_answer` to the three numbers.

# %% id="quiz-mean-answer" exercise=true
mean_answer = ...
### BEGIN SOLUTION
mean_answer = (2.0, 1.5, 1.5)
### END SOLUTION

# %% id="quiz-mean-check" points=1
hpclab.check("rnn.quiz_mean", mean_answer)

# %% [markdown] id="close"
# ## Close

# %% id="close-do"
client.close()

# %% [markdown] id="end"
# ## Summary
#
# - A step takes as long as its slowest rank. Work grows with tokens (or frames), not with samples.
# - Padding and waiting are two different losses. Bucketing on each rank by itself removes most of the first and adds
#   to the second.
# - Choose the samples of a step for all ranks together, then deal them out by length.
# - The mean of the ranks' means is right only if all ranks count equally many of what the loss is a mean of; otherwise
#   weigh them.
#
# ### What breaks at scale
#
# The slowest of a thousand ranks is much slower than the slower of two: the wait grows with every rank, at the same spread of
# lengths. Large language models avoid the question by *packing*: documents are joined and cut into windows of
# one length, often with masks between documents. Attention that skips what is masked brings it back: its work grows with
# the square of a document's length.
#
# ### References
#
# - M. Kudo, J. Toyama, M. Shimbo, *Multidimensional curve classification using passing-through regions*, 1999 (the
#   JapaneseVowels data).
# - K. Cho and others, *Learning Phrase Representations using RNN Encoder-Decoder*, 2014, arXiv:1406.1078 (the GRU).
# - R. Graham, *Bounds on multiprocessing timing anomalies*, 1969 (the longest first, to whoever has least).
# - V. Khomenko and others, *Accelerating recurrent neural network training using sequence bucketing and multi-GPU data
#   parallelization*, 2016.
