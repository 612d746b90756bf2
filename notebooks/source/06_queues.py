# %% [markdown] id="title"
# # Queues: your turn on a shared machine
#
# **You will** start a real Slurm of your own; submit scripts, an array, and a dozen jobs, first come first served and
# then with backfill; watch who waits for whom; train a network on two nodes, and kill one.
#
# | | |
# |---|---|
# | objectives | write a job script and an array; read the queue and a Gantt chart; say why a job waits, and what makes it start sooner; run a training on a queue as you would on your laptop |
# | prerequisites | the notebooks *start* and *cnn* |
# | minutes | 45 to read and do, 20 of them for the exercises; under 3 to run |
# | needs | Linux with Slurm's programs (Debian, Ubuntu: `apt install slurm-wlm munge libnss-wrapper`; Binder has them; elsewhere recorded rows are shown), 2 CPUs, 1.5 GB of memory, no network, no root |
#
# New terms are defined in the [glossary](glossary.md#backfill), in English and in Chinese.

# %% id="parameters" tags=["parameters"]
import hpclab

SIZE = hpclab.size()  # how much to do: "small", "class" or "cluster", as the variable HPCLAB_SIZE says

# %% id="imports"
import functools
import sys
import time
from pathlib import Path

from IPython.display import display

from hpclab import plots, slurm, views
from hpclab.course.recorded import notice, on_slurm
from hpclab.course.waiting import compare

STEPS = {"small": 100, "class": 200, "cluster": 2000}[SIZE]
print(notice())

# %% [markdown] id="up"
# ## A Slurm of your own
#
# On a supercomputer hundreds of people share thousands of nodes, and a *job queue* decides who runs when. Most sites
# use Slurm. So does this notebook: the same daemons and commands, with you as administrator, user and victim. Its
# *nodes* are virtual: they share this machine's CPUs, so jobs that compute would slow each other down. (Ours mostly
# sleep.) `mine.run("sinfo")` runs `sinfo` on it; in a terminal, `hpclab slurm up` and `hpclab slurm shell` let you use
# one by hand.
#
# Cells that need Slurm define a function and pass it to `on_slurm`. Without Slurm, that shows what the function gave on
# a machine that has it, and when.


# %% id="up-do"
def start():
    global mine
    mine = slurm.start(nodes=2, cpus=2)
    print(mine.run("sinfo"))


on_slurm(start)

# %% [markdown] id="script"
# ## A script
#
# A job is a shell script. Its `#SBATCH` lines say what it needs: a name, nodes, CPUs, often memory, and a time limit. You
# submit it and leave; its output goes to a file.
#
# On a site a script would also load software (`module load python/3.11`), name the account that pays (`--account`), and
# choose a queue (`--partition`). The site's documentation gives the details.

# %% id="script-do"
hello = """#!/bin/bash
#SBATCH --job-name=hello
#SBATCH --nodes=2 --ntasks=4
#SBATCH --time=00:01:00
#SBATCH --output=hello.out
echo "the script runs once, on $SLURMD_NODENAME, the first node of $SLURM_JOB_NODELIST"
srun bash -c 'echo "task $SLURM_PROCID of $SLURM_NTASKS runs on $SLURMD_NODENAME"'
"""


def script():
    print(mine.run("sbatch", "--wait", input=hello))
    print(Path("hello.out").read_text())


on_slurm(script)

# %% [markdown] id="array"
# ## An array
#
# To run the same script on many inputs, submit an *array*: one script, one job for each number. `%3` lets at most three
# run at once.


# %% id="array-do"
def array():
    square = "sleep 1; echo $((SLURM_ARRAY_TASK_ID * SLURM_ARRAY_TASK_ID))"
    print(mine.run("sbatch", "--wait", "--job-name=array", "--array=1-8%3", "--output=square-%a.out", "--wrap", square))
    print([Path(f"square-{number}.out").read_text().strip() for number in range(1, 9)])
    jobs = mine.jobs()[1:]
    mine.stop()
    return jobs


ax = plots.gantt(on_slurm(array))

# %% [markdown] id="array-explain"
# **Explain.** A thin line shows a job waiting, a bar shows it running, with its node. Never more than three run at
# once, and the next starts a moment after one ends: our scheduler looks about once a second.
#
# ## Who goes first?
#
# A dozen jobs arrive at once. The first takes half of the machine. The second, *wide*, needs all of it. Then come eight
# short ones, a *greedy* one, and another wide one.
#
# **Predict**: first come, first served. The short jobs need one CPU, and two are idle. After how many seconds does the
# first of them start? (*long* takes 8 seconds, *wide* 2.)

# %% id="fifo-predict"
hpclab.predict("queues.fifo", ..., "seconds")

# %% id="jobs"
#        name  nodes  CPUs  minutes requested  seconds taken
DOZEN = [("long", 1, 2, 3, 8), ("wide", 2, 4, 2, 2)]
DOZEN += [("short", 1, 1, 1, 2)] * 8
DOZEN += [("greedy", 1, 1, 10, 2), ("wide", 2, 4, 1, 1)]


def run_dozen(queue):
    """Submit them all, wait for the last, and return what happened to each."""
    for name, nodes, cpus, minutes, seconds in DOZEN:
        asks = f"--job-name={name}", f"--nodes={nodes}", f"--ntasks={cpus}", f"--time={minutes}"
        queue.run("sbatch", *asks, "--output=/dev/null", "--wrap", f"sleep {seconds}")
    while any(job["ended_s"] is None for job in queue.jobs()):
        time.sleep(0.5)
    time.sleep(1)  # so that the live view shows the end
    return queue.jobs()


# %% id="fifo-do"
def first_come():
    with slurm.start(nodes=2, cpus=2, scheduler="builtin") as queue:
        display(queue)  # live
        return run_dozen(queue)


fifo = on_slurm(first_come, show=plots.gantt)

# %% id="fifo-came"
hpclab.came("queues.fifo", min(job["started_s"] - job["submitted_s"] for job in fifo if job["name"] == "short"))

# %% [markdown] id="backfill"
# **Explain.** *wide* is next and can't start. So no job behind it may start, though two CPUs are idle.
#
# Now the same dozen with *backfill*: a job may overtake if, by all jobs' stated time limits, it delays none ahead of
# it. (Where a job ends before its limit, it may delay one after all.)
#
# Which jobs overtake *wide* now? **Predict** the one that doesn't, though it takes just as little time.

# %% id="backfill-predict"
hpclab.predict("queues.left_behind", ..., among=("short", "greedy"))


# %% id="backfill-do"
def backfill():
    with slurm.start(nodes=2, cpus=2, scheduler="backfill") as queue:
        display(queue)
        return run_dozen(queue)


filled = on_slurm(backfill, show=plots.gantt)

# %% id="backfill-came"
behind = max(filled[2:-1], key=lambda job: (job["started_s"], job["job"]))
hpclab.came("queues.left_behind", behind["name"])

# %% id="compare-do"
compare({"first come, first served": fifo, "backfill": filled}, cpus=4)

# %% [markdown] id="compare-explain"
# **Explain.** The short jobs fill the hole beside *long*: they asked for one minute, and *long* holds its CPUs for up
# to three. *greedy* also takes two seconds, but asked for ten minutes. The scheduler must believe it, and ten minutes
# don't fit before *wide*. (The last of the short ones may come too late as well: once *long* has ended, *wide* has its
# turn.) **Ask for less and you start sooner.** Ask for too little, though, and your job is killed
# when its time is up.
#
# (Slurm counts whole seconds, and ours looks at its queue about once a second: read the differences, not the digits.)
#
# ## The same cell on a queue
#
# To get a cluster of workers on a queue, change one word. Each worker is a job; the training doesn't notice. On a site
# with Slurm, call `hpclab.connect("slurm", workers=2, walltime="00:30:00", account=...)`; here we pass our own Slurm,
# with three nodes, one of them a spare.

# %% id="connect-do"
model = functools.partial(hpclab.models.CNN, channels=(8, 16))
print(hpclab.queues.script("slurm", workers=2, memory="1GB", walltime="00:10:00"))


def train(**settings):
    settings = {"ranks": 2, "batch_size": 32, "steps": STEPS, "oversubscribe": True, "progress": False} | settings
    return hpclab.train(client, model, "fashion_mnist", **settings)


def connect():
    global site, client, undisturbed
    site = slurm.start(nodes=3, cpus=1)
    client = hpclab.connect(site, workers=2, memory="1GB", walltime="00:10:00")
    undisturbed = train().result()
    print(site.run("sinfo", "--Node"))


on_slurm(connect)

# %% [markdown] id="kill"
# ## A node dies
#
# One worker's node loses power in the middle of the training, which writes a checkpoint every 20 steps. **Predict**:
# how many steps must be redone? (And what do you have to do?)

# %% id="kill-predict"
hpclab.predict("queues.steps_lost", ..., "steps")


# %% id="kill-do"
def kill():
    run = train(checkpoint_every=20, max_restarts=3)
    while len(run.rows) < STEPS:
        time.sleep(0.05)
    node = next(job["nodes"] for job in site.jobs() if job["state"] == "RUNNING")
    site.kill(node)
    weights = run.result().weights
    same = all(bool((weights[name] == value).all()) for name, value in undisturbed.weights.items())
    print(f"{node} was killed; every weight equals that of the undisturbed training: {same}")
    return {"rows": run.rows, "jobs": site.jobs(), "now": time.time()}


killed = on_slurm(kill)
views.recovery(killed["rows"])

# %% id="kill-show-do"
ax = plots.gantt(killed["jobs"], now=killed["now"])

# %% id="kill-came"
lost = [row["last"] + 1 - row["first"] - row["kept"] for row in hpclab.rows.attempts(killed["rows"])]
hpclab.came("queues.steps_lost", sum(lost))

# %% [markdown] id="kill-explain"
# **Explain.** You do nothing. Slurm was told that its node is down (by itself it would notice after a timeout, of minutes
# on most sites), and the job on it failed. hpclab asked for another worker,
# Slurm placed it on the spare node, and both ranks resumed, one of them there, from the last checkpoint: its weights are equal to the
# last bit, as if nothing had happened. When a job's *walltime* is about to end, the same happens, after one more
# checkpoint.
#
# ## Without hpclab
#
# Most sites have Slurm and torch, but not hpclab. `train_ddp.py` trains as `hpclab.train` does, as a standalone script:
# open it in the file browser, folder *scripts*. From its environment it must read what `launch` tells each rank: its
# number, how many ranks there are, and where they meet. This job script takes them from Slurm:

# %% id="without-look"
scripts = hpclab.data.share() / "notebooks" / "scripts"
for name in ("train_ddp.py", "train_ddp.sh"):
    Path(name).write_text((scripts / name).read_text())
print(Path("train_ddp.sh").read_text())

# %% [markdown] id="without-predict"
# **Predict**: the same network, data, seed, batch and ranks, once by `hpclab.train` and once by `sbatch`. In how many
# of six decimal digits will their losses agree?

# %% id="without-predict-do"
hpclab.predict("queues.digits", ..., "digits")


# %% id="without-do"
def without():
    settings = {"ranks": 2, "batch_size": 64, "steps": 20, "oversubscribe": True, "progress": False}
    rows = hpclab.train(client, hpclab.models.CNN, "fashion_mnist", **settings).result().rows
    client.close()
    ours = sum(row["loss"] for row in rows if row.get("step") == 19) / 2
    variables = f"--export=ALL,PYTHON={sys.executable},STEPS=20"
    files = ["train_ddp.sh", str(hpclab.data.find("fashion_mnist"))]
    print(site.run("sbatch", "--wait", variables, "--output=ddp.out", *files))
    site.stop()
    said = Path("ddp.out").read_text().splitlines()[-1]
    print(said, f"by sbatch; {ours:.6f} by hpclab.train")
    return round(ours, 6), float(said.split()[-1])


ours, theirs = on_slurm(without)

# %% id="without-came"
hpclab.came("queues.digits", sum(round(ours, digits) == round(theirs, digits) for digits in range(1, 7)))

# %% [markdown] id="without-explain"
# **Explain.** The mathematics is the same, so at most the rounding differs. hpclab adds what surrounds it: the start,
# rows and plots, errors that name the failed rank, checkpoints and restarts. On a machine without Slurm, run the script
# with `torchrun --nproc-per-node=2 train_ddp.py DATA`. The documentation's page *What is below each call* lists the
# counterparts of hpclab's calls, and tells how to get from your laptop to a site: ssh, modules, transfer, accounting.

# %% [markdown] id="backfill-exercise"
# ## Exercise: slip through
#
# A machine has 2 nodes with 4 CPUs each, and backfill. This is what `squeue` shows when you arrive:
#
# | job | state | time used | time limit | nodes | CPUs | node list (reason) |
# |---|---|---|---|---|---|---|
# | long | running | 0:02 | 5:00 | 1 | 4 | n1 |
# | side | running | 0:01 | 2:00 | 1 | 1 | n2 |
# | wide | pending | 0:00 | 2:00 | 2 | 8 | (Resources) |
#
# Your job runs `simulate`. For one minute it reads its input, with one CPU; then it divides 9 CPU-minutes of work
# evenly among all the CPUs that its job has on one node. Write the `sbatch` options with which your job finishes before
# *wide* starts and isn't killed at its time limit, a whole number of minutes. You may not set priorities.
#
# The check submits these jobs to a real Slurm, which decides who starts. Only the clock is faster: no job really takes
# minutes, starting takes no time, a job may use its limit to the full, and whether yours would have been killed is computed from what it asked for and got.
#
# <details><summary>Hint</summary>
#
# A hole has a width and a length. Which CPUs are idle *now*, and until when can you borrow them? How long does
# `simulate` take with one CPU, with two, with more?
#
# </details>

# %% id="backfill-answer" exercise=true
options = ...
### BEGIN SOLUTION
options = "--ntasks=3 --time=4"
### END SOLUTION

# %% id="backfill-check" points=2
hpclab.check("queues.backfill", options)

# %% [markdown] id="array-exercise"
# ## Exercise: an array that is a good neighbour
#
# The job's folder holds a program, `./square`, which takes a number and writes its square to `out-<number>`. Write a
# job script that runs it for the numbers 3 to 8 as an array, at most two at the same time: one script, submitted once.
#
# <details><summary>Hint</summary>
#
# `#SBATCH` lines take every option of `sbatch`. Which variable tells a job of an array its number?
#
# </details>

# %% id="array-answer" exercise=true
script = ...
### BEGIN SOLUTION
script = """#!/bin/bash
#SBATCH --array=3-8%2
#SBATCH --ntasks=1 --time=1
./square $SLURM_ARRAY_TASK_ID
"""
### END SOLUTION

# %% id="array-check" points=2
hpclab.check("queues.array", script)

# %% [markdown] id="quiz-gantt"
# ## Quiz
#
# ### Read a Gantt chart
#
# Two nodes with 2 CPUs each, and backfill. Which statements are true? Set `gantt_answer` to the set of their letters.
#
# - a: Each *short* one overtook *wide*: it came later, and started sooner.
# - b: Without the short ones *wide* would have started sooner.
# - c: At 60 seconds two CPUs are idle.
# - d: When the short ones had ended, *greedy* still had to wait for *wide*: by its time limit it could have delayed
#   *wide*.
# - e: *greedy* ran longer than *short*.
# - f: *wide* could have started beside *long*.

# %% id="quiz-gantt-show"
from hpclab.course import quizzes

quizzes.show("queues.quiz_gantt")

# %% id="quiz-gantt-answer" exercise=true
gantt_answer = ...
### BEGIN SOLUTION
gantt_answer = {"a", "c", "d"}
### END SOLUTION

# %% id="quiz-gantt-check" points=1
hpclab.check("queues.quiz_gantt", gantt_answer)

# %% [markdown] id="quiz-array"
# ### An array's time
#
# You submit a script with `#SBATCH --array=0-20:5%2` to an empty machine; each of its jobs takes 10 minutes. How many
# jobs are there, and after how many minutes is the last one done? Set `array_answer` to the pair.

# %% id="quiz-array-answer" exercise=true
array_answer = ...
### BEGIN SOLUTION
array_answer = (5, 30)
### END SOLUTION

# %% id="quiz-array-check" points=1
hpclab.check("queues.quiz_array", array_answer)

# %% [markdown] id="end"
# ## Summary
#
# - A job says what it needs and sets a time limit; the queue decides when it runs.
# - First come, first served leaves holes. Backfill fills them with jobs that are short *and say so*.
# - Submit many small jobs as one array, with a limit that leaves room for others.
# - To train on a queue, run the same cell, or a script of under 70 lines that reads its rank from the environment. If a
#   node dies, the cell loses what was done since its last checkpoint; our script, which writes none, loses everything.
#
# ### What breaks at scale
#
# Real queues don't go by arrival: they weigh waiting, size, and how much your group has used lately (*fair share*). A
# wide job may wait for days while its nodes drain, idle. Ten thousand tiny jobs are an attack on the scheduler: bundle
# them.
#
# ### References
#
# - Slurm's documentation: `man sbatch`, and slurm.schedmd.com (*Scheduling Configuration Guide*).
# - Mu'alem and Feitelson (2001): *Utilization, predictability, workloads, and user runtime estimates in scheduling the
#   IBM SP2 with backfilling*. IEEE TPDS 12(6).
