# %% [markdown] id="title"
# # Start here: the race
#
# **You will** see what this machine really gives you, start a cluster on it, and watch one rank, one process with all
# threads, and two ranks train the same neural network. Then you can say which was fastest, by how much, and how sure you
# are.
#
# | | |
# |---|---|
# | objectives | tell your share of a machine from the host's size; start and close a cluster; read a race |
# | prerequisites | a little Python; no account anywhere |
# | minutes | 25 to read and do, 10 of them for the exercise; under 2 to run |
# | needs | 1 CPU (2 to see a speed-up), 1.5 GB of memory, 2 ranks, no network |
#
# Run the cells one by one with <kbd>Shift</kbd>+<kbd>Enter</kbd>. *Run All* works too.
#
# New terms are defined in the [glossary](glossary.md#rank), in English and in Chinese.

# %% id="parameters" tags=["parameters"]
import hpclab

SIZE = hpclab.size()  # how much to do: "small", "class" or "cluster", as the variable HPCLAB_SIZE says

# %% id="imports"
EPOCHS = {"small": 1, "class": 3, "cluster": 10}[SIZE]

# %% [markdown] id="machine"
# ## What this machine really has
#
# A cloud machine, a container or a batch job often gets only *part* of a host. The usual answers, Python's
# `os.cpu_count()` and the memory that `top` shows, describe the whole host. Your real limit is the smallest of three: the
# CPUs your process may run on (its *affinity*), the CPU time and memory its *cgroup* allows, and its *ulimits*. hpclab
# reads all three.

# %% id="machine-look"
hpclab.doctor.examine()

# %% [markdown] id="gang"
# ## Exercise: how large a gang fits?
#
# In distributed training each process is called a **rank**, and the ranks that work together are a **gang**. Here each
# rank uses one thread. It runs at full speed only with a CPU to itself, and it runs at all only with enough memory: about
# `hpclab.machine.RANK_MEMORY` bytes per rank, on top of `hpclab.machine.BASE_MEMORY` bytes for this notebook and the
# scheduler.
#
# Write `largest_gang(cpus, memory)`. It takes the CPUs and the bytes of memory that you may use on *any* machine, and
# returns the number of ranks in the largest gang that fits there at full speed, or 0 if not even one rank fits. The check
# tries your function on machines that you don't see: large ones, small ones, and some that are short of only one thing.
#
# <details><summary>Hint</summary>
#
# Two limits hold at once: a gang that exceeds either one doesn't fit. What do you get for this machine, with
# `hpclab.machine.cpus()` and `hpclab.machine.memory()`?
#
# </details>


# %% id="gang-answer" exercise=true
def largest_gang(cpus, memory):
    ...
    ### BEGIN SOLUTION
    by_memory = (memory - hpclab.machine.BASE_MEMORY) // hpclab.machine.RANK_MEMORY
    return max(0, min(cpus, by_memory))
    ### END SOLUTION


# %% id="gang-check" points=2
hpclab.check("start.gang", largest_gang)

# %% [markdown] id="connect"
# ## A cluster of your own
#
# `connect` starts a Dask cluster on this machine: a scheduler, and **workers**, processes that wait for work. They let
# in only who has this cluster's certificate, and encrypt what they say: on a shared host every user can connect to a port
# of the loopback network. Later, the same line with another argument starts workers in a supercomputer's queue.
#
# The race needs two ranks. With only one CPU they have to take turns: you must allow that with `oversubscribe=True`, and
# hpclab then marks what it measures as *emulated*.

# %% id="connect-do"
client = hpclab.connect(workers=max(2, hpclab.machine.fits()))
client

# %% [markdown] id="rank"
# ## Two ranks say hello
#
# `launch` runs any function of yours on a gang. Each rank is a process of its own; it knows its number and how many ranks
# there are. `all_reduce` adds up what all ranks hold and gives each of them the sum. Data-parallel training is built on
# this one operation.
#
# **Predict** before you run it: rank 0 holds 1, rank 1 holds 2. What will each of them return? Replace the `...` below
# with your number and run that cell: hpclab keeps your prediction in this folder and shows it beside the result.

# %% id="rank-predict"
hpclab.predict("start.sum", ...)


# %% id="rank-do"
def hello():
    import os

    import torch
    import torch.distributed as dist

    mine = torch.tensor([dist.get_rank() + 1.0])
    dist.all_reduce(mine)
    print(os.getpid())
    return mine.item()


sums = hpclab.launch(client, hello, ranks=2, oversubscribe=True).result()
hpclab.came("start.sum", sums[0])

# %% [markdown] id="predict"
# ## Predict
#
# Three racers train the same small network (a CNN with 50,186 weights) on 10,000 pictures of clothes:
#
# 1. **1 rank**: one process with one thread;
# 2. **1 rank x all threads**: one process, in which torch may use all your CPUs;
# 3. **2 ranks**: two processes with one thread each. In every step each takes *half* of the batch, and they average
#    what they learned.
#
# All take the same steps, on the same pictures, from the same initial weights. They run one after another, because
# together they would compete for CPUs. (With only one CPU, the second racer sits out.)
#
# How many times as fast as the first will the third be? Set the slider *before* you look. (If you don't move it, it
# doesn't count as a prediction.)

# %% id="predict-do"
stage = hpclab.widgets.RaceStage(client, "CNN", "fashion_mnist", epochs=EPOCHS)
stage

# %% [markdown] id="race"
# ## Run
#
# Run this cell and watch. The picture is redrawn every second. To race again, move the slider if you like and press
# *Race again* above: the new race replaces this output. To see a failure, press *Kill a rank* during a race. The process
# dies at once, without a last word, as if memory had run out, and its gang resumes from the newest checkpoint; the curve shows an X, and a grey
# band, often a thin one, until the next step.

# %% id="race-do"
stage.run()

# %% [markdown] id="explain"
# ## Explain
#
# **The same loss.** Two ranks with half a batch each, whose gradients are averaged, take the same step as one rank with
# the whole batch. The curves differ in time, not in height. (They differ a little, because sums are rounded in another order.
# For nothing else to differ, four conditions must hold: equal halves, a loss that is a mean, and a network without batch
# norm or random numbers. The notebook *cnn* shows what happens when they don't.)
#
# **The same bump.** The loss may rise for some steps before it falls for good. The learning rate (how far a step goes) rises for five steps,
# then falls slowly; near its peak the steps are large. All curves have the bump at the same height: another sign that all take the same steps.
#
# **Sooner, but not twice.** If you have two CPUs, look at *times as fast*. What keeps it below 2?
#
# - In each step the ranks wait for each other, and exchange 201 kB of gradients.
# - If other programs use this machine, the table may show no difference, or threads that are *slower*: they wait for
#   each other in every operation.
# - Two busy CPUs share caches and memory, and also run this notebook, the scheduler and your browser.
# - Your two "CPUs" may be one core. Cloud machines usually sell *hardware threads*: two of them share one core's
#   arithmetic units, so the pair is far from twice as fast as one. `hpclab.doctor.examine()` says so if the machine
#   reveals it.
# - *Start-up* isn't counted in *training*. Compare the two columns. (*Samples a second* leaves out the first, slow steps too.) The first launch after `connect` (here
#   that of `hello`) may have to wait until torch is loaded; later ones start from a process that has loaded it. Adding ranks never shortens start-up, so its share grows as
#   training gets faster: that is Amdahl's law at work.
#
# **One process with all threads** is the racer that many tutorials leave out. On a single machine, threads can be just
# as good as ranks, and simpler. Ranks win when you have several machines, when Python itself is the bottleneck, or when a
# step is too small to split among threads. Be honest with your readers: show both.
#
# **If you have one CPU**, the ranks took turns. The line marked *a CPU each* counts only the seconds in which a rank
# was running: what two CPUs would show if nobody ever waited, and they shared nothing. It is *emulated*, and labelled so.
#
# **How sure are you?** Press *Race again* twice. A second table then holds all races, with the interval of their ratios: three
# races say little, five say more. The notebook *scaling* teaches how to claim more.

# %% [markdown] id="quiz-race"
# ## Quiz
#
# ### Read a race
#
# Three racers trained the same network to a loss of 0.4, on a machine with 8 CPUs. They raced once. Which of these
# statements are true? Set `race_answer` to the set of their letters, such as `{"a", "f"}`.
#
# - a: In this race the 4 ranks were 3 times as fast as 1 rank.
# - b: The efficiency of the 4 ranks was 75 %.
# - c: The 4 ranks were 3 times as fast as one process that may use the same CPUs.
# - d: One process with 4 threads was more efficient than 4 ranks.
# - e: The table shows that 8 ranks would need 10 seconds.
# - f: The table shows by how much the next race will differ from this one.

# %% id="quiz-race-show"
from hpclab.course import quizzes

quizzes.show("start.quiz_race")

# %% id="quiz-race-answer" exercise=true
race_answer = ...
### BEGIN SOLUTION
race_answer = {"a", "b"}
### END SOLUTION

# %% id="quiz-race-check" points=1
hpclab.check("start.quiz_race", race_answer)

# %% [markdown] id="quiz-allreduce"
# ### Two calls
#
# Four ranks run this function. What does each of them return? Set `allreduce_answer` to the number.
#
# ```python
# def twice():
#     mine = torch.tensor([dist.get_rank() + 1.0])
#     dist.all_reduce(mine)
#     dist.all_reduce(mine)
#     return mine.item()
# ```

# %% id="quiz-allreduce-answer" exercise=true
allreduce_answer = ...
### BEGIN SOLUTION
allreduce_answer = 40
### END SOLUTION

# %% id="quiz-allreduce-check" points=1
hpclab.check("start.quiz_allreduce", allreduce_answer)

# %% [markdown] id="close"
# ## Close
#
# The workers hold memory until you close them. This cell ends every process of the cluster.

# %% id="close-do"
client.close()

# %% [markdown] id="end"
# ## Summary
#
# - Affinity, cgroup and ulimits limit what you may use, whatever the size of the host.
# - A rank is a process; a gang is the ranks that train together; a worker starts a rank and watches it.
# - Two ranks can reach the same loss in fewer seconds, but *only* if they have two CPUs.
# - A speed-up is a ratio of two measurements: say what you measured, on what, and how often.
#
# ### What breaks at scale
#
# With a thousand ranks, one is nearly always late, one dies every few days, and exchanging gradients can take longer than
# computing them. The notebooks *scaling* and *faults* take these up.
#
# ### Next
#
# Open the notebook [cnn](03_cnn.ipynb): the same loss, sooner. (In a term, *one-process* comes before it.) There you see the training loop itself, measure the speed-up with
# repeats, and learn to avoid two classic bugs.
#
# ### References
#
# - H. Xiao, K. Rasul, R. Vollgraf, *Fashion-MNIST*, 2017, arXiv:1708.07747 (the pictures; MIT licence).
# - P. Goyal and others, *Accurate, Large Minibatch SGD*, 2017, arXiv:1706.02677 (why batches can be split).
# - S. Li and others, *PyTorch Distributed*, 2020, arXiv:2006.15704 (how DDP averages gradients).
# - G. Amdahl, *Validity of the single processor approach*, AFIPS 1967.
