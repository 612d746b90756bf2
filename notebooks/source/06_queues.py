# %% [markdown] id="title"
# # Queues: your turn on a shared machine
#
# **You will** start a real Slurm that is yours alone; give it scripts, an array, and a dozen jobs, first come first served
# and then with backfill; watch who waits for whom; train a network over two of its nodes, and kill one of them.
#
# | | |
# |---|---|
# | objectives | write a job script and an array; read the queue and a Gantt chart; say why a job waits, and what makes it start sooner; run a training on a queue as you would on your laptop |
# | prerequisites | the notebooks *start* and *cnn* |
# | minutes | 45 to read and do, 20 of them for the exercises; under 3 to run |
# | needs | Linux with Slurm's programs (Debian, Ubuntu: `apt install slurm-wlm munge libnss-wrapper`; Binder has them; elsewhere recorded rows are shown), 2 CPUs, 1.5 GB of memory, no network, no root |
#
# Words that are new to you stand in the [glossary](glossary.md#backfill), in English and in Chinese.

# %% id="parameters" tags=["parameters"]
import hpclab

SIZE = hpclab.size()  # "small", "class" or "cluster"

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
# On a supercomputer hundreds of people share thousands of nodes, and a *job queue* says who runs when. Most use Slurm. So
# does this notebook: the same daemons and the same commands, of which you are root, user and victim. Its *nodes* are
# virtual: they share this machine's CPUs, so jobs that compute would slow each other down. (Ours mostly sleep.) `mine.run("sinfo")` runs the
# command `sinfo` on it; in a terminal `hpclab slurm up` and `hpclab slurm shell` give you one to type at.
#
# Cells that need Slurm define a function and call it by `on_slurm`. Where there is no Slurm, that shows what the function gave on
# a machine that has one, and when.


# %% id="up-do"
def start():
    global mine
    mine = slurm.start(nodes=2, cpus=2)
    print(mine.run("sinfo"))


on_slurm(start)

# %% [markdown] id="script"
# ## A script
#
# A job is a shell script. Its `#SBATCH` lines say what it needs: **n**ame, **n**odes, CPUs, memory, and how long at most.
# You hand it in and go; what it prints goes to a file.
#
# On a site a script would also load software (`module load python/3.11`), name who pays (`--account`), and choose a queue
# (`--partition`). What exactly, its documentation tells.

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
# The same script for many inputs is an *array*: one script, a job a number, and `%3` lets at most three run at once.


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
# **Explain.** A thin line is waiting, a bar is running, with its node. Never more than three run at once, and the next
# starts a moment after one has ended: the scheduler looks about once a second.
#
# ## Who goes first?
#
# A dozen jobs come at once. The first takes half of the machine. The second, *wide*, needs all of it. Then come eight
# short ones, a *greedy* one, and one that is wide again.
#
# **Predict**: first come, first served. The short jobs need one CPU, and two are idle. After how many seconds does the first of
# them start? (*long* takes 8 seconds, *wide* 2.)

# %% id="fifo-predict"
hpclab.predict("queues.fifo", ..., "seconds")

# %% id="jobs"
#        name  nodes  CPUs  minutes asked for  seconds taken
DOZEN = [("long", 1, 2, 3, 8), ("wide", 2, 4, 2, 2)]
DOZEN += [("short", 1, 1, 1, 2)] * 8
DOZEN += [("greedy", 1, 1, 10, 2), ("wide", 2, 4, 1, 1)]


def run_dozen(queue):
    """Hand them all in, wait for the last, and return what became of each."""
    for name, nodes, cpus, minutes, seconds in DOZEN:
        asks = f"--job-name={name}", f"--nodes={nodes}", f"--ntasks={cpus}", f"--time={minutes}"
        queue.run("sbatch", *asks, "--output=/dev/null", "--wrap", f"sleep {seconds}")
    while any(job["ended_s"] is None for job in queue.jobs()):
        time.sleep(0.5)
    time.sleep(1)  # for a last look
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
# **Explain.** *wide* is next, and can't start. So nobody behind it may, though two CPUs have nothing to do.
#
# Now the same dozen with *backfill*: a job may overtake if that delays nobody before it. The scheduler can know only if each
# job has said how long it takes at most.
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
# **Explain.** The short jobs fill the hole beside *long*: they asked for one minute, and *long* holds its CPUs for up to
# three. *greedy* takes two seconds as they do, but asked for ten minutes: the scheduler must believe it, and ten minutes
# don't fit before *wide*. **To ask for less is to start sooner.** Ask for too little, though, and your job is killed when
# its time is over.
#
# (Slurm's clock counts whole seconds, and it looks at its queue about once a second: read the differences, not the digits.)
#
# ## The same cell on a queue
#
# A cluster of workers on a queue is one word away. Each worker is a job; the training doesn't know. On a site with Slurm it
# is `hpclab.connect("slurm", workers=2, walltime="00:30:00", account=...)`; here we hand over our own Slurm, with three
# nodes, one of them to spare.

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
    print(site.status())


on_slurm(connect)

# %% [markdown] id="kill"
# ## A node dies
#
# The node of one worker loses its power in the middle of the training, which writes a checkpoint after every 20 steps.
# **Predict**: how many steps must be done again? (And what do you have to do?)

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
# **Explain.** Nothing. Slurm saw its node down, and the job on it failed. hpclab asked for another worker, which Slurm gave
# a place on the spare node, and the gang went on there from its last checkpoint: to the last bit as if nothing had been.
# When a job's *walltime* is about to end, it goes the same way, with a checkpoint just before.
#
# ## Without hpclab
#
# Most sites have Slurm and torch, and no hpclab. `train_ddp.py` is what `hpclab.train` does, as a script of its own: open it in
# the file browser, folder *scripts*. What `launch` told each rank, it must learn from its environment: its number, how many
# ranks there are, and where they meet. This job script takes them from Slurm:

# %% id="without-look"
scripts = hpclab.data.share() / "notebooks" / "scripts"
for name in ("train_ddp.py", "train_ddp.sh"):
    Path(name).write_text((scripts / name).read_text())
print(Path("train_ddp.sh").read_text())

# %% [markdown] id="without-predict"
# **Predict**: the same network, data, seed, batch and ranks, once by `hpclab.train` and once by `sbatch`. In how many of six
# digits after the point will their losses agree?

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
    return ours, float(said.split()[-1])


ours, theirs = on_slurm(without)

# %% id="without-came"
hpclab.came("queues.digits", sum(round(ours, digits) == round(theirs, digits) for digits in range(1, 7)))

# %% [markdown] id="without-explain"
# **Explain.** Nothing in the mathematics changed, so at most the rounding did. What hpclab adds is around it: the start, rows
# and plots, errors with the rank that failed, checkpoints and restarts. With `torchrun --nproc-per-node=2 train_ddp.py DATA` the
# script runs on a machine without Slurm. The page *What is below each call* of the documentation names such a counterpart for
# every call, and tells how to get from your laptop to a site: ssh, modules, transfer, accounting.

# %% [markdown] id="backfill-exercise"
# ## Exercise: slip through
#
# A machine of 2 nodes with 4 CPUs each, and backfill. This is what `squeue` says when you come:
#
# | job | state | time used | time limit | nodes | CPUs | node list (reason) |
# |---|---|---|---|---|---|---|
# | long | running | 0:02 | 5:00 | 1 | 4 | n1 |
# | side | running | 0:01 | 2:00 | 1 | 1 | n2 |
# | wide | pending | 0:00 | 2:00 | 2 | 8 | (Resources) |
#
# Your job runs `simulate`. It reads its input for one minute, with one CPU; then come 9 CPU-minutes of work, which it divides
# evenly among all the CPUs that its job has on one node. Write the options of `sbatch` with which your job is done before *wide*
# starts, and isn't killed at its time limit, a whole number of minutes. You have no right to set priorities.
#
# The check hands these jobs to a real Slurm, which decides who starts. Only the clock is faster: no job really takes minutes, and
# whether yours would have been killed is computed from what it asked for and got.
#
# <details><summary>Hint</summary>
#
# A hole has a width and a length. Which CPUs are idle *now*, and until when may they be lent? How long does `simulate` take with
# one CPU, with two, with more?
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
# In the folder of the job lies a program, `./square`, which takes a number and writes its square to `out-<number>`. Write
# a job script for the numbers 3 to 8 as an array, of which at most two run at the same time: it has to be one script, handed
# in once.
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
# - d: When the short ones had ended, *greedy* still had to wait for *wide*: by its limit it could have delayed it.
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
# A script with `#SBATCH --array=0-20:5%2` is handed in; each of its jobs takes 10 minutes, and the machine is empty. How many jobs
# are there, and after how many minutes is the last one done? Set `array_answer` to the pair.

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
# - A job says what it needs, and for how long at most; the queue decides when it gets it.
# - First come, first served leaves holes. Backfill fills them with jobs that are short *and say so*.
# - Many small things are one array, with a limit that leaves room for others.
# - A training on a queue is the same cell, or a script of 50 lines that reads its rank from the environment; nodes that die and walltimes that end cost what was done since the last
#   checkpoint.
#
# ### What breaks at scale
#
# Real queues don't go by arrival: they weigh waiting, size, and how much your group has used lately (*fair share*). A wide
# job may wait for days while its nodes drain, idle. And ten thousand tiny jobs are an attack on the scheduler: bundle them.
#
# ### References
#
# - Slurm's documentation: `man sbatch`, and slurm.schedmd.com (*Scheduling Configuration Guide*).
# - Mu'alem and Feitelson (2001): *Utilization, predictability, workloads, and user runtime estimates in scheduling the IBM
#   SP2 with backfilling*. IEEE TPDS 12(6).
