# %% [markdown] id="title"
# # Faults: what a failure costs
#
# **You will** kill ranks and workers of a running training, and watch it recover; see which steps were lost, redone and
# kept; check that not a bit of the result differs; and find out how often to write a checkpoint.
#
# | | |
# |---|---|
# | objectives | say what a checkpoint must hold; read a timeline of lost and repeated work; choose a checkpoint interval from what a checkpoint costs and how often the machine fails |
# | prerequisites | the notebooks *start* and *cnn* |
# | minutes | 40 to read and do, 15 of them for the exercises; under 3 to run |
# | needs | 2 CPUs (with one, rows say *emulated*), 1.5 GB of memory, 2 ranks, no network |
#
# New terms are defined in the [glossary](glossary.md#checkpoint), in English and in Chinese.

# %% id="parameters" tags=["parameters"]
import hpclab

SIZE = hpclab.size()  # how much to do: "small", "class" or "cluster", as the variable HPCLAB_SIZE says

# %% id="imports"
import functools
import itertools

import numpy as np
import torch

from hpclab import chaos, live, plots, rows, views
from hpclab.course.plots import intervals

STEPS = {"small": 200, "class": 400, "cluster": 4000}[SIZE]
model = functools.partial(hpclab.models.CNN, channels=(8, 16))

# %% id="connect"
client = hpclab.connect(workers=max(2, hpclab.machine.fits()))


def train(**settings):
    settings = {"ranks": 2, "batch_size": 32, "steps": STEPS, "oversubscribe": True, "progress": False} | settings
    return hpclab.train(client, model, "fashion_mnist", **settings)


undisturbed = train().result()
[whole] = rows.attempts(undisturbed.rows)
work = whole["end_s"] - whole["start_s"]
step_s = work / STEPS  # from one to the next
MTBF = max(0.5, work / 4)  # seconds: a few failures per training, on slow machines and fast ones

# %% [markdown] id="die"
# ## A rank dies
#
# A process is killed: memory ran out, a machine lost power, or a more important job needed the node.
#
# **Predict**: two ranks train, and one is killed. After how many seconds does your notebook say so? (And what happens
# to the other rank?)

# %% id="die-predict"
hpclab.predict("faults.told", ..., "seconds")

# %% id="die-do"
run = train()
run.watch(lambda run, found: len(run.rows) > 50 and run.kill(1))
try:
    run.result()
except hpclab.RankError as error:
    print(error)

# %% id="die-came"
hpclab.came("faults.told", run.rows[-1]["time_s"] - rows.span(run.rows)[1])

# %% [markdown] id="die-explain"
# **Explain.** The surviving rank can't go on: its next all-reduce needs its peer. (If the process was killed, it gets an
# error soon; if a machine lost power, it may wait very long.) So the first failure ends the gang, and you see its cause, not the "connection closed by peer" of the ranks that failed after it.
#
# ## And goes on
#
# But all work was lost. **Checkpoints** prevent that: with `max_restarts` the gang restarts, and resumes from the
# newest one. Below, failures come at random, about one in `MTBF` seconds (the *mean time between failures*). On
# Linux ranks start in about a tenth of a second here, because they are forked from a process that has already imported torch; with most
# tools the import alone takes seconds.
#
# While it runs, press *Kill this rank* too.

# %% id="go-on-do"
run = train(max_restarts=100, checkpoint_every=20)
wild = chaos.Chaos(run, mtbf=MTBF, seed=11)
run

# %% id="went-on-do"
fit = run.result()
print(f"{len(wild.rows)} kills; weights equal to the last bit:", end=" ")
print(all(torch.equal(fit.weights[name], weight) for name, weight in undisturbed.weights.items()))
killed = run.rows
ax = plots.recovery(killed)

# %% [markdown] id="go-on-explain"
# **Explain.** Steps on a thick orange line came after the last checkpoint: they were lost, and done again. Grey is the
# time from when a failure was noticed to the next step; the white gap before it is the time until then. Everything that counts is blue, and each step appears there once.
# (An attempt that was killed before its first step has no line.)
#
# **Not a bit differs** from the training without failures. Saving the weights isn't enough for that. It also takes:
#
# - the optimiser's momentum, and the position in the learning-rate schedule;
# - the position in the epoch, so that no image is seen twice in an epoch;
# - the random state of each rank;
# - and the *order* in which gradients are added up. Floating-point sums depend on it, and DDP by itself rearranges its
#   buckets after the first step: with three ranks or more, the last bits of a resumed run would differ. hpclab's ranks
#   arrange the buckets once, when the model is wrapped.
#
# ## A worker dies
#
# If a whole worker dies, for instance with its machine, so do its ranks. Its place stays empty until another worker
# comes. With `min_ranks` the gang would go on with fewer ranks, each taking more samples.

# %% id="worker-do"
run = train(max_restarts=5, checkpoint_every=20)
struck = []
run.watch(lambda run, found: len(run.rows) > 100 and not struck and struck.append(run.kill_worker(0)))
fit = run.result()
views.recovery(run.rows)

# %% [markdown] id="often"
# ## How often to save?
#
# Each checkpoint takes time. Each failure costs a restart and the work since the last checkpoint: half an interval on
# average, if intervals are much shorter than the MTBF. Save often and you pay for checkpoints; save seldom and you pay for failures.
#
# The simulation below rolls the dice a thousand times. Each piece of work but the last ends with a checkpoint; if a failure
# hits it, it is done again.

# %% id="simulate-do"
saves = [row["save_s"] for row in run.rows if row["kind"] == "checkpoint"]
save_s = float(np.median(saves))
breaks = [pair for found in (killed, run.rows) for pair in itertools.pairwise(rows.attempts(found))]
restart_s = float(np.median([after["start_s"] - before["last_s"] for before, after in breaks]))
print(f"here a checkpoint takes {1e3 * save_s:.1f} ms, a restart {restart_s:.2f} s, a step {1e3 * step_s:.1f} ms")
print(f"a failure comes every {MTBF:.1f} s, on average")

# %% id="simulate-define"
dice = np.random.default_rng(0)


def simulate(interval, work, draws=1000):
    """Seconds to finish `work` seconds of work under failures, shape (draws,)."""
    spent = np.zeros(draws)
    whole, rest = divmod(work, interval)
    for piece in [interval + save_s] * int(whole) + [rest]:
        failure = dice.exponential(MTBF, draws)
        while (failed := failure < piece).any():
            spent[failed] += failure[failed] + restart_s
            failure = np.where(failed, dice.exponential(MTBF, draws), np.inf)
        spent += piece
    return spent


# %% id="simulate-run"
every = np.unique(np.geomspace(1, STEPS / 2, 12).round().astype(int))  # steps between checkpoints
simulated = np.array([simulate(count * step_s, work) / work - 1 for count in every])  # (intervals, draws)

# %% [markdown] id="measure"
# Now measure it: the same training under failures, with a checkpoint after every step, at two longer intervals, and
# only after each quarter.
#
# **Predict**, from what a checkpoint and a step take here, and from the MTBF: how many steps between checkpoints does
# the simulation find best? (Does the restart matter?)

# %% id="measure-predict"
hpclab.predict("faults.every", ..., "steps between checkpoints")


# %% id="measure-do"
def typical(rows):
    return np.median([row["step_s"] for row in rows if row["kind"] == "step"])


measured = {}
for count in live.tracked((1, 5, 20, STEPS // 4), "under failures", "run"):
    run = train(max_restarts=100, checkpoint_every=count)
    with chaos.Chaos(run, mtbf=MTBF, seed=4):
        run.result()
    attempts = rows.attempts(run.rows)
    calm = work * typical(run.rows) / typical(undisturbed.rows)  # in this minute
    measured[count] = (attempts[-1]["end_s"] - attempts[0]["start_s"]) / calm - 1

# %% id="measure-show-do"
middle = np.median(simulated, axis=1)
intervals(every, simulated, measured, young=np.sqrt(2 * save_s * MTBF) / step_s)
hpclab.tables.Table(
    {
        "steps between checkpoints": count,
        "simulated": f"{np.interp(count, every, middle):.0%}",
        "measured": f"{share:.0%}",
    }
    for count, share in measured.items()
)

# %% id="measure-came"
hpclab.came("faults.every", every[middle.argmin()])

# %% [markdown] id="measure-explain"
# **Explain.** The left end pays for saving, the right end for failures (each costs a restart, too, but as much at any
# interval, so it moves no minimum), and the valley between is wide: half or twice
# the best interval costs little more. The four measurements share one roll of the dice (`seed=4`), so don't expect
# them on the line. If they lie above the band, that is bad luck, one draw in twenty, or something took time that the simulation leaves out, such
# as a busy disk, or the slower first steps after a restart. Young's formula (1974) gives the bottom: `sqrt(2 * save * MTBF)`. Daly (2006) adds terms that
# matter when saving takes a good part of the MTBF.
#
# The MTBF of a gang is that of one machine, *divided by the number of machines*: a thousand machines that each fail
# once in three years together fail about once a day.
#
# ## Exercise: the interval
#
# Nobody hands you a save time and an MTBF: a cluster keeps a log. Write `interval(log, machines)`, which reads the log
# of a finished run and returns the seconds of work between two checkpoints for the *next* job, the same program on
# `machines` machines. Near the best will do: losing a tenth more than necessary passes. The log is a list of rows of
# two kinds (times in seconds):
#
# ```python
# {"kind": "attempt", "attempt": 0, "machines": 64, "submitted_s": 0.0, "started_s": 9100.0, "ended_s": 20350.0,
#  "cause": "preempted"}  # or "time limit", or "node failure"
# {"kind": "checkpoint", "attempt": 0, "rank": 3, "save_s": 2.7}  # one row a rank
# ```
#
# All ranks wait until a checkpoint is complete. The next job runs on the same kind of machine: a checkpoint takes as
# long, and each machine fails as often.
#
# <details><summary>Hint</summary>
#
# An MTBF is a time divided by a number of failures. Which time, and which failures? And what does a rank do between its
# own save and the last rank's?
#
# </details>


# %% id="interval-answer" exercise=true
def interval(log, machines):
    ...
    ### BEGIN SOLUTION
    attempts = [row for row in log if row["kind"] == "attempt"]
    uptime = sum(row["machines"] * (row["ended_s"] - row["started_s"]) for row in attempts)
    failures = sum(row["cause"] == "node failure" for row in attempts)
    slowest = {}
    for row in log:
        if row["kind"] == "checkpoint":
            slowest[row["attempt"]] = max(row["save_s"], slowest.get(row["attempt"], 0))
    return (2 * np.median(list(slowest.values())) * uptime / failures / machines) ** 0.5
    ### END SOLUTION


# %% id="interval-check" points=2
hpclab.check("faults.interval", interval)

# %% [markdown] id="state"
# ## Exercise: what a checkpoint holds
#
# Write `pack(model, optimizer, schedule, step)`, which returns a dict to write, and
# `unpack(state, model, optimizer, schedule)`, which loads it into fresh objects and returns the step to go on with. The
# model has dropout. A resumed training must equal an undisturbed one, to the last bit.
#
# <details><summary>Hint</summary>
#
# What in a training remembers something? `state_dict()` gives the memory of most; random numbers have
# `torch.get_rng_state()`.
#
# </details>


# %% id="state-answer" exercise=true
def pack(model, optimizer, schedule, step):
    ...
    ### BEGIN SOLUTION
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    held = {name: part.state_dict() for name, part in parts.items()}
    return held | {"step": step, "random": torch.get_rng_state()}
    ### END SOLUTION


def unpack(state, model, optimizer, schedule):
    ...
    ### BEGIN SOLUTION
    for name, part in {"model": model, "optimizer": optimizer, "schedule": schedule}.items():
        part.load_state_dict(state[name])
    torch.set_rng_state(state["random"])
    return state["step"]
    ### END SOLUTION


# %% id="state-check" points=2
hpclab.check("faults.state", (pack, unpack))

# %% [markdown] id="quiz-recovery"
# ## Quiz
#
# ### Read a recovery
#
# How many steps did this run do twice? And how many seconds passed from the failure to the next attempt's first step?
# Set `recovery_answer` to the pair, within 15 %.

# %% id="quiz-recovery-show"
from hpclab.course import quizzes

quizzes.show("faults.quiz_recovery")

# %% id="quiz-recovery-answer" exercise=true
recovery_answer = ...
### BEGIN SOLUTION
recovery_answer = (15, 3)
### END SOLUTION

# %% id="quiz-recovery-check" points=1
hpclab.check("faults.quiz_recovery", recovery_answer)

# %% [markdown] id="quiz-mtbf"
# ### Will it last?
#
# A job needs 500 machines for 4 days. Each machine has a mean time between failures of 1,000 days; failures are
# independent and equally likely at any time. Without checkpoints, what is the chance, in percent, that the job finishes
# undisturbed? Set `mtbf_answer` to the number, within 5 %.

# %% id="quiz-mtbf-answer" exercise=true
mtbf_answer = ...
### BEGIN SOLUTION
mtbf_answer = 100 * np.exp(-500 * 4 / 1000)
### END SOLUTION

# %% id="quiz-mtbf-check" points=1
hpclab.check("faults.quiz_mtbf", mtbf_answer)

# %% [markdown] id="close"
# ## Close

# %% id="close-do"
client.close()

# %% [markdown] id="end"
# ## Summary
#
# - The first failure ends a gang; checkpoints decide how much that costs.
# - A resumed run can equal an undisturbed one, bit for bit, if you save everything that has a memory.
# - The best interval grows with the square roots of a checkpoint's cost and of the time between failures.
#
# ### What breaks at scale
#
# With ten thousand machines a failure comes every few hours, and a checkpoint of a large model takes minutes. So all
# ranks write it at once, in the background, or to a neighbour's memory first. Worst of all are failures that raise no
# error: a wrong bit in a sum, a machine that is only slow.
#
# ### References
#
# - J. Young, *A first order approximation to the optimum checkpoint interval*, CACM 17(9), 1974.
# - J. Daly, *A higher order estimate of the optimum checkpoint interval for restart dumps*, FGCS 22(3), 2006.
# - A. Kokolis and others, *Revisiting Reliability in Large-Scale Machine Learning Research Clusters*, 2024,
#   arXiv:2410.21680 (how often real machines fail).
