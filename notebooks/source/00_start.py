# %% [markdown] id="title"
# # Start here: the race
#
# **You will** see what this machine really gives you, start a cluster on it, and watch the same neural network being
# trained by one rank, by one process with all threads, and by two ranks. Then you can say which was sooner, by how
# much, and how sure you are.
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
# Words that are new to you stand in the [glossary](glossary.md#rank), in English and in Chinese.

# %% id="parameters" tags=["parameters"]
import hpclab

SIZE = hpclab.size()  # "small", "class" or "cluster"

# %% id="imports"
EPOCHS = {"small": 1, "class": 3, "cluster": 10}[SIZE]

# %% [markdown] id="machine"
# ## What this machine really has
#
# A cloud machine, a container or a batch job often gets a *part* of a host. Python's usual answers, `os.cpu_count()`
# and the memory that `top` shows, are those of the host. What binds you is the smallest of three things: the CPUs
# that your process may run on (its *affinity*), the CPU time and memory that its *cgroup* allows, and its *ulimits*.
# hpclab reads all three.

# %% id="machine-look"
hpclab.doctor.examine()

# %% [markdown] id="gang"
# ## Exercise: how large a gang fits?
#
# In distributed training each process is called a **rank**, and the ranks that work together are a **gang**. Here each
# rank uses one thread. It runs at full speed if it has a CPU for itself, and it runs at all if it has memory: about
# `hpclab.machine.RANK_MEMORY` bytes a rank, beside `hpclab.machine.BASE_MEMORY` bytes for this notebook and the
# scheduler.
#
# Write `largest_gang(cpus, memory)`. It returns the number of ranks of the largest gang that fits at full speed on *any*
# machine, by the CPUs and the bytes of memory that you may use there; 0 where not even one rank fits. Your function is tried
# on machines that you don't see: large and small ones, and some that are short of one thing only.
#
# <details><summary>Hint</summary>
#
# Two limits hold at once: a rank too many for either of them is a rank too many. What do you get for this machine, with
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
# `connect` starts a Dask cluster on this machine: a scheduler, and **workers**, which are processes that wait for
# work. All that they say to each other is encrypted, because on a shared host the loopback network is not private.
# The very same line, with another argument, will later start workers in the queue of a supercomputer.
#
# The race needs two ranks. On a machine with one CPU they will have to take turns: only `oversubscribe=True` allows that,
# and hpclab then marks what it measures as *emulated*.

# %% id="connect-do"
client = hpclab.connect(workers=max(2, hpclab.machine.fits()))
client

# %% [markdown] id="rank"
# ## Two ranks say hello
#
# `launch` runs any function of yours on a gang. Each rank is a process of its own, and knows its number and how many
# they are. `all_reduce` adds up what all ranks hold, and gives each the sum: it is the one operation that
# data-parallel training stands on.
#
# **Predict** before you run it: rank 0 holds 1, rank 1 holds 2. What will each of them return? Write your number in place
# of the `...` below and run that cell: your prediction is kept in this folder, and shown beside the result.

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
# 2. **1 rank x all threads**: one process, in which torch may use every CPU of yours;
# 3. **2 ranks**: two processes with one thread each. In every step each takes *half* of the batch, and they average
#    what they learned.
#
# All take the same steps, on the same pictures, from the same first weights. They start one after the other, because
# together they would take each other's CPUs. (With one CPU, the second racer stays at home.)
#
# How many times as fast as the first will the third be? Say so with the slider, *before* you look. (A slider that you
# leave alone predicts nothing.)

# %% id="predict-do"
stage = hpclab.widgets.RaceStage(client, "CNN", "fashion_mnist", epochs=EPOCHS)
stage

# %% [markdown] id="race"
# ## Run
#
# Run this cell, and watch. The picture is drawn anew each second. To race again, move the slider if you like and press
# *Race* above: this output is then replaced. And if you like to see a failure, press *Kill a rank* while they race: the
# process dies, as on a machine whose power fails, its gang goes on from the newest checkpoint, and the line has a gap.

# %% id="race-do"
stage.run()

# %% [markdown] id="explain"
# ## Explain
#
# **The same loss.** Two ranks with half a batch each, whose gradients are averaged, take the same step as one rank
# with the whole batch. The curves differ in their seconds, not in their heights. (The small ripples differ, because
# sums are rounded in another order. That nothing else differs takes three conditions: equal halves, a loss that is a
# mean, and a network without batch norm. The notebook *cnn* shows what happens without them.)
#
# **Sooner, but not twice.** If you have two CPUs, look at *times as fast*. What keeps it below 2?
#
# - In each step the ranks wait for each other, and exchange 201 kB of gradients.
# - Two busy CPUs share caches and memory, and also run this notebook, the scheduler and your browser.
# - Your two "CPUs" may be one core. Cloud machines usually sell *hardware threads*: two of them share one core's arithmetic
#   units, so both together are far from twice as fast as one. `hpclab.doctor.examine()` says so where the machine shows it.
# - *Start-up* isn't counted in *training*. Look at its column, and compare it with the training. The first launch after
#   `connect` is the slowest; later ones start from processes that have already loaded torch. No number of ranks makes
#   start-up shorter, so its share grows as training gets faster: that is Amdahl's law at work.
#
# **One process with all threads** is the racer that many tutorials leave out. On a single machine, threads can be just
# as good as ranks, and simpler. Ranks win when there is more than one machine, when Python itself is the bottleneck,
# or when a step is too small to be cut into threads. Be honest with your readers: show both.
#
# **If you have one CPU**, the ranks took turns. The line marked *a CPU each* counts only the seconds in which a rank
# was running: what two CPUs would show if talking cost nothing. It is *emulated*, and says so.
#
# **How sure are you?** Press *Race* twice more and compare the ratios. If they differ by 10 %, you cannot claim differences
# below 10 %. The notebook *scaling* teaches how to claim more.

# %% [markdown] id="quiz-race"
# ## Quiz
#
# ### Read a race
#
# Three racers train the same network until their loss is 0.4, on a machine with 8 CPUs. They raced once. Which of these
# statements are true? Set `race_answer` to the set of their letters, such as `{"a", "f"}`.
#
# - a: The 4 ranks are 3 times as fast as 1 rank.
# - b: The efficiency of the 4 ranks is 75 %.
# - c: The 4 ranks are 3 times as fast as one process that may use the same CPUs.
# - d: One process with 4 threads is more efficient than 4 ranks.
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
# The workers hold memory until you close them. After this cell no process of the cluster remains.

# %% id="close-do"
client.close()

# %% [markdown] id="end"
# ## Summary
#
# - What you may use is bounded by affinity, cgroup and ulimits, not by the size of the host.
# - A rank is a process; a gang is the ranks that train together; a worker is what starts and watches a rank.
# - Two ranks reach the same loss in fewer seconds, *if* they have two CPUs.
# - A speed-up is a ratio of two measurements: say what was measured, on what, and how often.
#
# ### What breaks at scale
#
# With a thousand ranks someone is always late, somebody's process dies each day, and the exchange of gradients takes
# longer than the step. The notebooks *scaling* and *faults* take these up.
#
# ### Next
#
# Open the notebook **cnn**: the same loss, sooner. There you look inside the step, and mend two classic bugs.
#
# ### References
#
# - H. Xiao, K. Rasul, R. Vollgraf, *Fashion-MNIST*, 2017, arXiv:1708.07747 (the pictures; MIT licence).
# - P. Goyal and others, *Accurate, Large Minibatch SGD*, 2017, arXiv:1706.02677 (why batches can be shared out).
# - S. Li and others, *PyTorch Distributed*, 2020, arXiv:2006.15704 (how DDP averages gradients).
# - G. Amdahl, *Validity of the single processor approach*, AFIPS 1967.
