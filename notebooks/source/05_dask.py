# %% [markdown] id="title"
# # Dask, two ways
#
# **You will** use one cluster in two ways: as a scheduler that hands out *tasks*, and as a place for a *gang* of
# processes that start together and communicate. You will see that nothing runs until it must, watch who works when,
# measure what a task costs and choose its size, send data once instead of a thousand times, and find the same costs on
# a job queue.
#
# | | |
# |---|---|
# | objectives | say when tasks and when a gang; predict a run's time from the size of its tasks; know what threads share and what processes must be sent; count the bytes and the work of a graph |
# | prerequisites | the notebook *start* |
# | minutes | 40 to read and do, 15 of them for the exercises; under 3 to run |
# | needs | 2 CPUs (with one, workers take turns, and nothing gets faster), 2 GB of memory, 2 ranks, no network; Slurm's programs for one part, which is skipped without them |
#
# New terms are defined in the [glossary](glossary.md#granularity), in English and in Chinese.

# %% id="parameters" tags=["parameters"]
import hpclab

SIZE = hpclab.size()  # how much to do: "small", "class" or "cluster", as the variable HPCLAB_SIZE says

# %% id="imports"
import operator
import pickle
import time
import zlib

import dask
import dask.array as da
import numpy as np
import torch
from distributed import Client, get_task_stream, get_worker

from hpclab import figures, laws, plots, tasks
from hpclab.tables import Table

MOST, REPEATS = {"small": (1000, 3), "class": (3000, 3), "cluster": (10_000, 10)}[SIZE]

# %% id="connect"
begin = time.perf_counter()
client = hpclab.connect(workers=max(2, hpclab.machine.fits()))
connect_s = {"local": time.perf_counter() - begin}
workers = len(client.scheduler_info(n_workers=-1)["workers"])
images = hpclab.data.load("fashion_mnist", "train")
print(
    f"{workers} workers; the dashboard: {client.dashboard_link if hpclab.machine.installed('bokeh') else 'needs bokeh'}"
)

# %% [markdown] id="lazy"
# ## Tasks, and when they run
#
# A disk holds 10,000 images. We cut them into ten pieces, each read by one task, and ask for the mean and the standard
# deviation of their pixels. Dask's arrays look like numpy's.
#
# **Predict**: we ask for the mean, then for the deviation, then for both at once. How many pieces will have been read
# by then? (And how many when the first line is printed?)

# %% id="lazy-predict"
hpclab.predict("dask.reads", ..., "pieces read")


# %% id="lazy-do"
def read(start, stop):
    get_worker().log_event("reads", start)  # for the scheduler to count
    return raw(images, start, stop)


def raw(images, start, stop):
    return (images[start:stop][0] * 255).astype(np.uint8)  # (N, 1, 28, 28), as on disk


def reads():
    return len(client.get_events("reads"))


# %% id="lazy-run"
pieces = [dask.delayed(read)(start, start + 1000) for start in range(0, 10_000, 1000)]
pixels = da.concatenate([da.from_delayed(piece, (1000, 1, 28, 28), np.uint8) for piece in pieces])
mean, deviation = pixels.mean(axis=0), pixels.std()
print(f"the graph of the mean has {len(mean.dask)} tasks; pieces read so far: {reads()}")
read_by = [reads() for _ in map(dask.compute, (mean, deviation))]
found, spread = dask.compute(mean, deviation)
print(f"after the mean {read_by[0]}, after the deviation {read_by[1]}, after both at once {reads()}")
whole = raw(images, 0, 10_000)
print("the mean equals numpy's to the last bit:", np.array_equal(found, whole.mean(axis=0)))
print(f"the deviation: {spread:.12f}, numpy's {whole.std():.12f}")

# %% id="lazy-came"
hpclab.came("dask.reads", reads())

# %% [markdown] id="lazy-explain"
# **Explain.** `delayed` and `dask.array` only write down what to do: a *graph*. `compute` runs it. Nothing is cached:
# ask twice, and everything is read twice. Ask for both results at once, and they share their common work.
#
# The pieces' sums are whole numbers, which add up exactly in any order, so the mean is numpy's, bit for bit. The
# deviation is combined from fractions, so it may differ in its last digits.
#
# No piece depends on another. So the scheduler can give each to any free worker, and to another if that one dies. This
# first way to use a cluster suits all work that splits into independent pieces: reading, cleaning, searching, trying
# out parameters.
#
# ## A gang, on the same workers
#
# Training doesn't split like that: in every step all ranks average their gradients, so each needs all the others *now*.
# If ranks were tasks and one found no free worker, the others would wait for it, while it waits for one of their
# workers. `hpclab.train` and `hpclab.launch` start a **gang**: all ranks at once, or none. This one trains on the same
# images, with the mean and the deviation that the tasks computed.


# %% id="gang-do"
class Perceptron(torch.nn.Sequential):
    def __init__(self):
        super().__init__(torch.nn.Flatten(), torch.nn.Linear(784, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))

    def forward(self, x):
        return super().forward((x - torch.tensor(found / 255).float()) / (spread / 255))


with get_task_stream() as stream:
    fit = hpclab.train(client, Perceptron, "fashion_mnist", ranks=2, oversubscribe=True).result()
print(f"accuracy {fit.accuracy:.3f} after one epoch, which was {len(stream.data)} tasks for Dask")

# %% [markdown] id="when"
# **Explain.** To Dask the gang was one task a rank, which starts the rank as a process of its own and watches it,
# and takes no worker's thread. The ranks' steps are no tasks: they talk to each other without the scheduler.
#
# | | tasks | a gang |
# |---|---|---|
# | the pieces | are independent | communicate in every step |
# | they start | when a worker is free | all together, or not at all |
# | more than can run at once | normal: it evens out the load | an error, unless you let them take turns (`oversubscribe=True`: *emulated*) |
# | if a worker is lost | its tasks are redone elsewhere, and results that only it held | all stop; with `max_restarts` they resume from a checkpoint |
# | the slowest | delays only the end | delays all, in every step |
# | with Dask | `delayed`, `map`, `dask.array`, `dask.bag` | `hpclab.launch`, `hpclab.train`, `%%ranks` |
#
# ## Who works when
#
# Another job: how well does each image compress? We compress the first fifth eight times over. `scatter` sends the
# data set to the workers *once* (only the name of its folder: each worker maps the files itself); each task then gets
# only the start and the end of its piece.
#
# **Predict**: with 1, 10 or 200 tasks a worker, which finishes first? (Who is idle, and when?)

# %% id="stream-predict"
hpclab.predict("dask.cut", ..., "tasks a worker")


# %% id="stream-do"
def squeeze(images, start, stop, hard=0):
    """Bytes of each compressed image; the first `hard` images take eight times as long."""
    tries = [8 if number < hard else 1 for number in range(start, stop)]
    pictures = zip(raw(images, start, stop), tries, strict=True)
    return [min(len(zlib.compress(picture, 9)) for _ in range(often)) for picture, often in pictures]


def squeeze_all(count, total=MOST, **settings):
    """Seconds to compress `total` images in `count` tasks."""
    edges = np.linspace(0, total, count + 1).astype(int).tolist()
    return tasks.clock(client, squeeze, [held] * count, edges[:-1], edges[1:], **settings)


# %% id="stream-run"
held = client.scatter(images, broadcast=True)
squeeze_all(100, 1000)  # the first tasks open the connections
figure, axes = figures.subplots(3, 1, size=(9, 7))
taken = {}
for ax, each in zip(axes, (1, 10, 200), strict=True):
    ax.sharex(axes[0])
    with get_task_stream() as stream:
        taken[each] = squeeze_all(each * workers, 4000, hard=800)
    plots.tasks(tasks.spans(stream.data), ax)
    ax.set_title(f"tasks a worker: {each}", loc="left", size="small")

# %% id="stream-came"
hpclab.came("dask.cut", min(taken, key=taken.get))

# %% [markdown] id="stream-explain"
# **Explain.** With one task a worker, the first ones have all the hard images and the rest wait: nobody can take over half
# a task. With ten, a worker that finishes takes the next task, and all end at nearly the same time. With 200 the load is
# even, but gaps appear: between two tasks a worker waits for the scheduler. (Dask's dashboard shows this live, as
# its *task stream*.)
#
# So there are two costs. With too few tasks, workers are idle at the end; with too many, you pay for each one.
#
# ## What a task costs
#
# Now all images are equally hard, and the work is the same however we cut it: into 1, 2, 4, ... tasks. In the simplest
# model, $p$ workers share the work $W$, and $n$ tasks are handed out one after the other, at a cost of $o$ each:
#
# $$t = W/p + n\,o$$
#
# This is the law for a message, alpha + beta times its size, with tasks in place of bytes. We measure up to 200 tasks a
# worker, in turns, fit the model, and let it predict one more run.
#
# **Predict**: what does a task cost: a microsecond, a millisecond, a second? Answer in milliseconds.

# %% id="grain-predict"
hpclab.predict("dask.task", ..., "ms a task")

# %% id="grain-do"
cuts = [1] + [workers * many for many in (1, 2, 5, 15, 50, 200)]
rows = tasks.sweep(squeeze_all, cuts, items=MOST, repeats=REPEATS)
seen = [(row["tasks"], row["duration_s"]) for row in rows if row["tasks"] > 1]
model = laws.fit_alpha_beta(*zip(*seen, strict=True))
cost, ends = model.values["beta"], model.intervals["beta"]
print(f"a task costs {1e3 * cost:.1f} ms ({1e3 * ends[0]:.1f} to {1e3 * ends[1]:.1f}, 95 %)")
unseen = tasks.sweep(squeeze_all, [MOST], items=MOST, repeats=1)
low, high = np.ravel(model.band([MOST], new=True))
print(f"{MOST:,} tasks: {low:.1f} to {high:.1f} s by the model, {unseen[0]['duration_s']:.1f} s measured")
figure = plots.grain(rows, model, unseen).figure

# %% id="grain-came"
hpclab.came("dask.task", 1e3 * cost)

# %% [markdown] id="grain-explain"
# **Explain.** At the right end there is one task, so one worker works. With one task a worker all work, if each has a
# CPU. Further left the line is flat for a while: tasks cost little compared with the work in them. Beyond the knee
# (dotted), where handing out takes as long as the work, it rises: far beyond it ten times as many tasks take nearly ten
# times as long, for the same work. One more measurement should fall into the band, which is wide if others use the machine.
#
# What costs so much? For each task the client describes the work, the scheduler picks a worker, encrypted messages
# travel there and back, and a worker unpacks, packs and reports. (On two CPUs all this takes time from the workers; a scheduler on its
# own machine takes less.)
#
# There is *one* scheduler. If it hands out a task every $o$ seconds, as here, then tasks of $s$ seconds keep $s/o$ workers
# busy, however many there are. (With a scheduler on its own machine there may be more.)

# %% id="reach-do"
Table(
    {
        "a task takes": f"{task_s:g} s",
        "workers kept busy, if a task costs as much there (forecast)": f"{task_s / cost:,.0f}",
    }
    for task_s in (0.01, 0.1, 1, 10, 60)
)

# %% [markdown] id="share"
# ## Threads or processes?
#
# Workers can also be threads of one process. Then nothing needs to be sent: all see the same memory. But in the
# usual Python only one thread at a time can run Python code, the one that holds the *global interpreter lock*, the GIL. C code, such as
# numpy's, can release it while it computes.
#
# **Predict**: a loop in Python runs in as many threads as there are workers. How many times as fast is that as one
# process by itself? (And with processes? And for numpy's sort?)

# %% id="share-predict"
hpclab.predict("dask.threads", ..., "times as fast")


# %% id="share-do"
def loop(piece):
    return sum(number * number % 7 for number in range(1_000_000))


def sort(piece):
    numbers = np.random.default_rng(piece).random(300_000)
    return sum(np.sort(numbers)[0] for _ in range(5))


where = {"n_workers": 1, "threads_per_worker": workers, "dashboard_address": None, "silence_logs": False}
threads = Client(processes=False, set_as_default=False, **where)
shared = tasks.race([loop, sort], {"threads": threads, "processes": client}, pieces=2 * workers, repeats=REPEATS)
Table(shared)

# %% id="share-came"
hpclab.came("dask.threads", shared[0]["speedup"])

# %% [markdown] id="bytes"
# **Explain.** Threads can't make the loop faster: the one that runs Python holds the GIL, and the others wait. They can
# shorten the sort, which releases it. Each process has its own GIL, so processes help with both. (If all four are
# near 1, there was no second CPU for them: another program had it. *speedup* is the median over the turns, shown with
# the lowest and the highest.) What processes don't share is memory.
#
# **Predict**: a task gets an array of a million numbers. How many bytes travel to a process? (How many to a thread, and
# how many come back, if the task returns the sum?)

# %% id="bytes-predict"
hpclab.predict("dask.bytes_sent", ..., "bytes to a process")

# %% id="bytes-do"
block = np.random.default_rng(0).random(1_000_000)
address, kept = operator.attrgetter("ctypes.data"), client.scatter(block, broadcast=True)
for name, where, given in ("thread", threads, block), ("process", client, block), ("process, scattered", client, kept):
    spent = [tasks.clock(where, np.sum, [given]) for _ in range(5 * REPEATS)]
    same = where.submit(address, given).result() == address(block)
    print(f"{name}: {1e3 * np.median(spent):.0f} ms to sum up", "the same memory" if same else "a copy")
print(f"pickled, the array has {len(pickle.dumps(block)):,} bytes, its sum {len(pickle.dumps(block.sum())):,}")
threads.close()

# %% id="bytes-came"
hpclab.came("dask.bytes_sent", len(pickle.dumps(block)))

# %% [markdown] id="queue"
# **Explain.** So send data once (`scatter`), or better not at all (let the task read it, as `read` above did), and
# return small results. What you give to `submit`, or to `map` by position, is
# sent with *every* task that has it.
#
# ## The same on a job queue
#
# On a supercomputer workers don't start when you like. You submit a *job*, a queue decides when it runs, and only then
# do you have a worker. Here is a real one, your own Slurm. `connect` submits a job for each worker, waits for them, and
# returns a client like any other. On a site, leave out `private=True`.
#
# **Predict**: how many times as long as on the local cluster does it take to connect? (And does each task take longer?)

# %% id="queue-predict"
hpclab.predict("dask.connect", ..., "times as long")

# %% id="queue-do"
clusters = {"local": client}
begin = time.perf_counter()
try:
    clusters["slurm"] = hpclab.connect("slurm", private=True, workers=workers, memory="1GB")
    connect_s["slurm"] = time.perf_counter() - begin
except OSError as error:
    print("Skipped, because there is no Slurm here:", error)
print(*(f"{name}: {seconds:.1f} s to connect" for name, seconds in connect_s.items()), sep="\n")
Table(tasks.overhead(clusters, repeats=REPEATS))

# %% id="queue-came"
hpclab.came("dask.connect", connect_s["slurm"] / connect_s["local"] if "slurm" in connect_s else None)

# %% [markdown] id="queue-explain"
# **Explain.** Once the jobs run, a worker is a worker: scheduler, messages and encryption are the same. Do the two
# intervals of a task's cost overlap? (These tasks do nothing, and have fewer arguments than those above.) A queue's
# cost comes first: submitting, waiting, starting. Here that includes starting Slurm itself; on a site the wait may take
# hours. So connect once, and hand out many tasks.
#
# ## Exercise: choose the chunk
#
# Write `chunks(items, workers, item_s, task_s)`. It cuts the list `items` into a list of lists, each of which becomes a
# task. An item takes `item_s` seconds on average; some take more than twice that, and you don't know which. Handing out a
# task takes `task_s`. The result must equal the serial code's, so each item appears once, in order. The check plans
# four jobs with it, from a laptop to a thousand workers, then races it against a task for each item and a
# task for each worker.
#
# <details><summary>Hint</summary>
#
# Write down both costs for chunks of `k` items: how many tasks are there, and how long may the last one keep the others
# waiting? Where is the sum smallest?
#
# </details>


# %% id="chunk-answer" exercise=true
def chunks(items, workers, item_s, task_s):
    ...
    ### BEGIN SOLUTION
    size = max(1, round((len(items) * task_s / item_s) ** 0.5))
    return [items[start : start + size] for start in range(0, len(items), size)]
    ### END SOLUTION


# %% id="chunk-check" points=2
hpclab.check("dask.chunk", chunks)

# %% [markdown] id="bytes-exercise"
# ## Exercise: send it once
#
# People often write this:
#
# ```python
# def look_up_all(client, table, queries, look_up):
#     futures = [client.submit(look_up, table, query) for query in queries]
#     return client.gather(futures)
# ```
#
# It is correct, and all workers help. But how often does the table travel? Write a `look_up_all` that returns the same
# list, shares the look-ups among all workers, and sends the table no more often than needed. The check counts.
#
# <details><summary>Hint</summary>
#
# Who has the table after `client.scatter(table, broadcast=True)`, and what does that return?
#
# </details>


# %% id="bytes-answer" exercise=true
def look_up_all(client, table, queries, look_up):
    ...
    ### BEGIN SOLUTION
    held = client.scatter(table, broadcast=True)
    return client.gather([client.submit(look_up, held, query) for query in queries])
    ### END SOLUTION


# %% id="bytes-check" points=2
hpclab.check("dask.bytes", look_up_all)

# %% [markdown] id="quiz-tasks"
# ## Quiz
#
# ### Read a task stream
#
# Two workers, from 0 to 110 ms. For what share of the workers' time do they compute, in percent? And how many
# milliseconds would the same computing take if it were divided evenly and nothing else took any time? Set
# `tasks_answer` to the pair, within 5 %.

# %% id="quiz-tasks-show"
from hpclab.course import quizzes

quizzes.show("dask.quiz_tasks")

# %% id="quiz-tasks-answer" exercise=true
tasks_answer = ...
### BEGIN SOLUTION
tasks_answer = (73, 80)
### END SOLUTION

# %% id="quiz-tasks-check" points=1
hpclab.check("dask.quiz_tasks", tasks_answer)

# %% [markdown] id="quiz-lazy"
# ### How often?
#
# How many times is `load` called in all? Set `lazy_answer` to the number.
#
# ```python
# total = dask.delayed(sum)([dask.delayed(load)(number) for number in range(3)])
# total.compute()
# total.compute()
# kept = total.persist()
# kept.compute()
# kept.compute()
# ```

# %% id="quiz-lazy-answer" exercise=true
lazy_answer = ...
### BEGIN SOLUTION
lazy_answer = 9
### END SOLUTION

# %% id="quiz-lazy-check" points=1
hpclab.check("dask.quiz_lazy", lazy_answer)

# %% [markdown] id="close"
# ## Close

# %% id="close-do"
for where in reversed(clusters.values()):
    where.close()

# %% [markdown] id="end"
# ## Summary
#
# - Independent pieces are *tasks*; ranks that communicate are a *gang*. Both use the same workers.
# - A graph is a plan. If results share work, compute them together.
# - A task costs a fixed time. Make it take many times that, and make many more tasks than workers.
# - Threads share one memory and one GIL. Each process has its own of both, so you must send it what it needs: send it
#   once.
# - A queue makes you wait before the work, and changes little after.
#
# ### What breaks at scale
#
# If a task costs as much there as here, thousands of workers need tasks of ten seconds or more; and at 2 ms a task, a
# million tasks take half an hour to hand out, with any number of workers. Then make the tasks larger, or run the workers as a gang.
#
# ### References
#
# - M. Rocklin, *Dask: parallel computation with blocked algorithms and task scheduling*, SciPy 2015.
# - [Dask: best practices](https://docs.dask.org/en/stable/best-practices.html), on sizes of tasks, and on large data in
#   graphs.
# - D. Beazley, *Understanding the Python GIL*, PyCon 2010.
