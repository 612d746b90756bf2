# %% [markdown] id="title"
# # One process first: what you leave on the table
#
# **You will** take one training step apart, see how close each layer comes to this machine's limits, and try what costs
# only a line of code: threads, another memory layout, half the bits, a compiler. Parallelise a slow program and you get a
# slow program on many machines.
#
# | | |
# |---|---|
# | objectives | profile a step; read a roofline; tell compute-bound, memory-bound and data-bound apart by measurement; claim a gain with its interval, or say that none is shown |
# | prerequisites | the notebook *start*; what a gradient is |
# | minutes | 40 to read and do, 15 of them for the exercise; under 3 to run |
# | needs | 1 CPU (2 for threads to help), 1 GB of memory (2 GB for the compiler), no ranks, no network |
#
# New terms are defined in the [glossary](glossary.md#roofline), in English and in Chinese.

# %% id="parameters" tags=["parameters"]
import hpclab

SIZE = hpclab.size()  # how much to do: "small", "class" or "cluster", as the variable HPCLAB_SIZE says

# %% id="imports"
import os
import random
import statistics
import time

import torch
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile, record_function

from hpclab import bottlenecks, figures, plots, ratios, roofline, timeline
from hpclab.course import malloc

PARTS = ("data", "forward", "backward", "optimizer")
ROUNDS, BATCH = {"small": (4, 32), "class": (5, 64), "cluster": (20, 128)}[SIZE]

# %% [markdown] id="step"
# ## One step
#
# This is a step like those of the notebook *cnn*, with its four parts named for the profiler and five switches for later.
# All are off: one thread, torch's defaults, and a `malloc` that gives back every freed block above 128 kB.


# %% id="step-do"
class Step:
    """A training step of one process; each call takes the next batch."""

    def __init__(self, threads=1, channels_last=False, bf16=False, compiled=False, keep_memory=False):
        torch.manual_seed(0)
        self.images = hpclab.data.load("fashion_mnist", "train")
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.model = hpclab.models.CNN().to(memory_format=self.layout)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.02)
        self.forward = torch.compile(self.model) if compiled else self.model
        self.threads, self.bf16, self.keep_memory, self.taken = threads, bf16, keep_memory, 0

    def __call__(self):
        torch.set_num_threads(self.threads)
        malloc.keep(self.keep_memory)
        with record_function("data"):
            first = self.taken * BATCH % 9_000
            inputs, labels = (torch.from_numpy(part) for part in self.images[list(range(first, first + BATCH))])
            inputs = inputs.to(memory_format=self.layout)
        with record_function("forward"), torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            loss = cross_entropy(self.forward(inputs), labels)
        with record_function("backward"):
            self.optimizer.zero_grad()
            loss.backward()
        with record_function("optimizer"):
            self.optimizer.step()
        self.taken += 1
        return loss.item()


plain = Step()
[round(plain(), 2) for _ in range(5)]

# %% [markdown] id="profile"
# ## Where does the time go?
#
# **Predict**: which of the four parts (data, forward, backward, optimizer) takes longest?
#
# A *profiler* notes when each operation begins and ends. *Self time* is what an operation spends itself, excluding the
# operations it calls. We look at shares, because seconds differ from machine to machine and from minute to minute.

# %% id="profile-predict"
hpclab.predict("one-process.part", ..., among=PARTS)


# %% id="profile-do"
def trace(step, steps=3):
    os.environ["KINETO_LOG_LEVEL"] = "6"  # keeps the profiler from announcing itself
    step()
    with profile(activities=[ProfilerActivity.CPU]) as traced:
        for _ in range(steps):
            step()
    return traced


traced = trace(plain)
averages = [row for row in traced.key_averages() if "::" in row.key]  # torch's own operations
total = sum(row.self_cpu_time_total for row in averages)
hpclab.tables.Table(
    {"operation": row.key, "calls": row.count, "share of self time": f"{row.self_cpu_time_total / total:.0%}"}
    for row in sorted(averages, key=lambda row: -row.self_cpu_time_total)[:8]
)

# %% id="profile-came"
parts = {row.key: row.cpu_time_total for row in traced.key_averages() if row.key in PARTS}
hpclab.came("one-process.part", max(parts, key=parts.get))

# %% id="timeline-do"
ax = plots.timeline(timeline.named(traced), figures.subplots(size=(10, 2.2))[1])

# %% [markdown] id="profile-explain"
# **Explain.** The forward pass computes one result; the backward pass computes two gradients, of the weights and of the
# input: about twice the arithmetic. It may still take less than twice as long, or even less than the forward pass: on the
# way forward pooling compares all its inputs, on the way back it only clears its gradient and writes one number for
# each window; and the first layer's input needs no gradient. Within both, a few operations take nearly all the time: convolutions, pooling and
# their gradients. Doubling the optimiser's speed gains almost nothing. That is Amdahl's law within one step.
#
# The profile says *where* the time goes, not how much faster it could go: for that, we must know what the machine can do.

# %% [markdown] id="roof"
# ## The roof
#
# A core has a maximum rate of floating-point operations, and memory a maximum rate of bytes. An operation that does few
# floating-point operations per byte waits for memory, however fast the core is. Its operations per byte are its
# **intensity**, and its rate can't exceed
#
# $$\min(\text{peak},\ \text{bandwidth} \times \text{intensity}).$$
#
# That is the *roofline*: a slope, where memory is the limit, up to a *ridge*, then a flat roof, where arithmetic is. We
# measure both ceilings here: the peak by multiplying matrices, the bandwidth by streaming through arrays too large for the
# caches. The operations and bytes of each layer are *counted*.
#
# **Predict**: how many operations does the second convolution do per byte? On which side of the ridge is that?

# %% id="roof-predict"
hpclab.predict("one-process.intensity", ..., "operations a byte")

# %% id="roof-do"
torch.set_num_threads(1)
ceiling = roofline.ceilings()
flowing = torch.from_numpy(plain.images[list(range(BATCH))][0])
rows = []
with torch.no_grad():
    for place, layer in enumerate(plain.model.features):
        name = f"{('1st', '2nd')[place // 3]} {type(layer).__name__}"
        rows.append(roofline.measure(name, layer, flowing))
        flowing = layer(flowing)
    rows.append(roofline.measure("Linear", plain.model.classifier, flowing.flatten(1)))
rows.append(roofline.measure("a whole step", plain, repeats=5))
ax = plots.roofline(rows, ceiling)

# %% id="roof-table"
hpclab.tables.Table(roofline.against(rows, ceiling))

# %% id="roof-came"
hpclab.came("one-process.intensity", rows[3]["intensity"])

# %% [markdown] id="roof-explain"
# **Explain.** The second convolution does about a hundred operations per byte: far right of the ridge, so arithmetic
# limits it. ReLU touches each number once: far left. At its roof a faster core wouldn't help it; *fusing* it with its
# neighbour would, because its bytes then never go to memory. The first convolution has one input channel, so it
# does only 9 multiplications for each number that it writes, the second 288.
#
# Four things to keep in mind:
#
# - Something else limits a point far below *both* roofs: fresh memory that the system must clear and map for each result
#   (ReLU and the first convolution here; see *keep memory* below), the overhead of calling an operation, a kernel that
#   uses no vector instructions (pooling, often), or other programs on this machine.
# - A point can lie *above* the slope: its arrays fit into a cache, which is faster than the memory that we measured.
# - It can lie above the flat roof too: we count operations by the definition, and a library may need fewer.
# - The ceilings are what *we* reached, not what the data sheet says; the machine may have been busy while we measured.

# %% [markdown] id="levers"
# ## Five switches
#
# | switch | what changes |
# |---|---|
# | threads | each operation is cut into pieces, one for each CPU |
# | channels last | a pixel's channels lie side by side in memory, a layout that fast kernels use |
# | bf16 | layers take and pass on 16-bit numbers: half the bytes, and faster arithmetic if the CPU has instructions for it |
# | keep memory | `malloc` keeps what one step has freed for the next, instead of returning it to the system |
# | compile | torch writes C++ for the network, fuses what it can, and compiles it |
#
# **Predict**: with all threads, how many times as fast as the plain step? (And is any of the others *slower*?)
#
# We alternate each switch with the plain step and take the ratio in each turn, so that a slow minute affects both. If the
# interval contains 1, we say so: **no difference shown**.

# %% id="levers-predict"
hpclab.predict("one-process.threads", ..., "times as fast")

# %% id="levers-do"
threads = hpclab.machine.cpus()
switches = {
    f"{threads} threads": {"threads": threads},
    "channels last": {"channels_last": True},
    "bf16": {"bf16": True},
    "keep memory": {"keep_memory": True},
}
gains = ratios.sooner({name: Step(**switch) for name, switch in switches.items()}, plain, ROUNDS, calls=2)


# %% [markdown] id="compile"
# The compiler works for half a minute and needs a lot of memory, so it gets its own process, which gives all of it back.
# It needs a C++ compiler; without one, the row is left out. (At the size *small* it is left out too.)


# %% id="compile-do"
def compiled(rounds):
    return ratios.sooner({"compile": Step(compiled=True)}, Step(), rounds, calls=2)


trouble = "At this size the compiler is left out." if SIZE == "small" else hpclab.compiler.missing()
if trouble is None:
    try:
        gains += hpclab.compiler.apart(compiled, ROUNDS)
    except RuntimeError as error:
        trouble = str(error)
print(trouble or "compiled")

# %% id="levers-look"
plots.ratios(gains, "times as fast as the plain step")
hpclab.tables.Table({"switch": row["measure"], "times as fast": ratios.told(row)} for row in gains)

# %% id="levers-came"
hpclab.came("one-process.threads", gains[0]["ratio"])

# %% [markdown] id="levers-explain"
# **Explain** *your* table; another machine gives another.
#
# - *Threads*: ideally, as many times as fast as you have CPUs. What gets in the way: operations too small to split, and
#   memory, which all CPUs share. On one CPU there is no difference. And if others use this machine, then after each
#   operation all threads wait for the one that got no CPU: two threads can be *several times slower* than one.
# - *Channels last*: pooling can work on many channels with one vector instruction, and the convolutions need not
#   rearrange their arrays on the way in and out.
# - *bf16*: without instructions for it (look for `bf16` among the flags that `lscpu` shows) a CPU must convert each number
#   to 32 bits and back, and may be many times *slower*. On a recent server the same line is often a gain, and on a
#   GPU the same line with `"cuda"`. A switch that helps elsewhere can hurt here: measure.
# - *keep memory* (shows no difference unless the C library is glibc): a step allocates some megabytes for its results and
#   frees them. Here *off* means that `malloc` returns blocks above 128 kB to the system (glibc begins so, and then adapts
#   its limits); in the next step the system must clear and map each page again. That can take as long as the arithmetic.
#   A process that sets nothing lies somewhere between off and on. hpclab sets `MALLOC_TRIM_THRESHOLD_` and
#   `MALLOC_MMAP_THRESHOLD_` in every rank, also in a single one, so in the other notebooks ranks have this switch on: none of
#   their speed-up comes from it. A script of your own doesn't have it unless you set them.
# - *compile*: fusing saves the bytes of small operations. If large library operations take all the time, there is little
#   to save.

# %% [markdown] id="together"
# ## What you left on the table
#
# Now combine all switches whose interval lies above 1, except the compiler. **Predict**: do their gains multiply, and what
# does that give? The picture shows the plain step above the tuned one, on the same scale; a single process is rank 0.

# %% id="together-predict"
hpclab.predict("one-process.together", ..., "times as fast")

# %% id="together-do"
helped = [row["measure"] for row in gains if row["low"] > 1 and row["measure"] in switches]
settings = {key: value for name in helped for key, value in switches[name].items()}
tuned = Step(**settings)
(together,) = ratios.sooner({" + ".join(helped) or "none": tuned}, plain, ROUNDS, calls=2)
print(f"{together['measure']}: {ratios.told(together)}")
plots.timelines([timeline.named(trace(step)) for step in (plain, tuned)])

# %% id="together-came"
hpclab.came("one-process.together", together["ratio"])

# %% [markdown] id="same"
# Faster is worth nothing if the network learns less. From the same initial weights, over the same batches:

# %% id="same-do"
learners = {"plain": Step(), "bf16": Step(bf16=True), "all that helped": Step(**settings)}
learned = {name: [step() for _ in range(15)][-1] for name, step in learners.items()}
hpclab.tables.Table({"step": name, "loss after 15 steps": f"{loss:.4f}"} for name, loss in learned.items())

# %% [markdown] id="same-explain"
# A float32 has 24 significant bits, a bf16 only 8: about two decimal digits. So the losses agree only in their first
# digits. The weights themselves stay in 32 bits; the products, and all that the layers pass on, use 16.

# %% [markdown] id="bottleneck"
# ## Exercise: name the bottleneck
#
# A program loads a batch, `batch = program.load()`, and works on it, `program.work(batch)`; `program.batches` says how
# often. Each program here has one bottleneck:
#
# - `"data"`: loading takes most of a step;
# - `"compute"`: arithmetic is the limit, right of the ridge;
# - `"memory"`: the bytes that its operations move are the limit, left of it.
#
# Write `diagnose(programs)`, which returns a list with the name for each program. The check runs it on programs that you
# haven't seen, of other lengths and sizes. Look at shares and counts, not at seconds: the machine may be busy during the
# check.
#
# <details><summary>Hint 1</summary>
#
# First ask whether the work is what takes the time. One measurement can be unlucky: take the median of several.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# `roofline.count(program.work, batch)` gives the operations and the bytes. You have measured the ridge above.
#
# </details>


# %% id="bottleneck-answer" exercise=true
def diagnose(programs):
    ...
    ### BEGIN SOLUTION
    names = []
    for program in programs:
        loads, works = [], []
        for _ in range(5):
            begun = time.perf_counter()
            batch = program.load()
            loaded = time.perf_counter()
            program.work(batch)
            loads.append(loaded - begun)
            works.append(time.perf_counter() - loaded)
        flops, nbytes = roofline.count(program.work, batch)
        work = "compute" if flops / nbytes > ceiling["ridge"] else "memory"
        names.append("data" if statistics.median(loads) > statistics.median(works) else work)
    return names
    ### END SOLUTION


# %% [markdown] id="bottleneck-try"
# Try it first on three programs whose kinds are known. The names need not be in the order of `KINDS`.

# %% id="bottleneck-try-do"
torch.set_num_threads(1)  # as the check does
kinds = random.Random(1).sample(bottlenecks.KINDS, 3)
print("yours:  ", diagnose([bottlenecks.planted(kind, random.Random(place)) for place, kind in enumerate(kinds)]))
print("planted:", kinds)

# %% id="bottleneck-check" points=2
hpclab.check("one-process.bottleneck", diagnose)

# %% [markdown] id="quiz-roofline"
# ## Quiz
#
# ### Read a roofline
#
# The figure shows four programs on one machine, below its two ceilings. Which statements are true? Set `roofline_answer`
# to the set of their letters.
#
# - a: The bandwidth of memory limits A, and A has reached more than 80 % of what it allows.
# - b: Memory that is twice as fast would raise A's ceiling to twice its height.
# - c: Memory that is twice as fast would raise B's ceiling.
# - d: The bandwidth of memory limits C.
# - e: A does fewer operations a second than C, so A is further below its own ceiling.
# - f: Of all four, C has reached the smallest share of its ceiling.

# %% id="quiz-roofline-show"
from hpclab.course import quizzes

quizzes.show("one-process.quiz_roofline")

# %% id="quiz-roofline-answer" exercise=true
roofline_answer = ...
### BEGIN SOLUTION
roofline_answer = {"a", "b", "f"}
### END SOLUTION

# %% id="quiz-roofline-check" points=1
hpclab.check("one-process.quiz_roofline", roofline_answer)

# %% [markdown] id="quiz-split"
# ### Split a step
#
# The parts of a step run one after another. Now two things change: data loading is fully hidden behind the previous step,
# and a new kernel makes the backward pass twice as fast. How many times as fast is the step? Set `split_answer` to the
# number, within 1 %.

# %% id="quiz-split-show"
quizzes.show("one-process.quiz_split")

# %% id="quiz-split-answer" exercise=true
split_answer = ...
### BEGIN SOLUTION
split_answer = 100 / (30 + 25 + 10)
### END SOLUTION

# %% id="quiz-split-check" points=1
hpclab.check("one-process.quiz_split", split_answer)

# %% [markdown] id="end"
# ## Summary
#
# - A profile says where the time goes; a roofline says how much faster it could go.
# - For a program at its roof: left of the ridge extra arithmetic is free, and only fewer bytes help; right of it, the
#   other way round. Below its roof, first ask what else limits it.
# - One process has switches that cost a line each. Which ones help depends on the machine: alternate them with the plain
#   step, give the interval, and say "no difference shown" if it contains 1.
# - In the other notebooks each rank keeps memory, and one racer also uses all threads; their other switches are off. If one of those helped above, say so beside any speed-up that you claim.
#
# ### What breaks at scale
#
# With a hundred ranks you pay for a slow step a hundred times. And things that didn't matter begin to: one process's
# loader keeps up, but a hundred reading the same disk don't; a step made three times as fast hides less communication, so
# communication takes a larger share of it. The notebook *scaling* shows that share.
#
# ### References
#
# - S. Williams, A. Waterman, D. Patterson, *Roofline: an insightful visual performance model for multicore
#   architectures*, Communications of the ACM 52(4), 2009.
# - J. McCalpin, *Memory bandwidth and machine balance in current high performance computers*, 1995 (STREAM's triad).
# - P. Micikevicius and others, *Mixed Precision Training*, 2017, arXiv:1710.03740.
# - J. Ansel and others, *PyTorch 2: Faster Machine Learning Through Dynamic Python Bytecode Transformation and Graph
#   Compilation*, ASPLOS 2024.
# - G. Amdahl, *Validity of the single processor approach*, AFIPS 1967.
