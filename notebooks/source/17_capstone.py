# %% [markdown] id="title"
# # Capstone: predict, then measure
#
# **You will** say in numbers, with intervals, how a training scales before you have seen it; measure it; and be scored
# by a rule that rewards neither a huge interval nor a bold one. You end with one page that you can hand in.
#
# | | |
# |---|---|
# | objectives | predict from causes; say how sure you are; write a score that rewards honesty; measure scaling, another network and a failure, on workers that a queue started; report it so that others can check it |
# | prerequisites | the notebooks *start*, *cnn*, *scaling*, *queues* and *faults* |
# | minutes | 45 to read and do, 15 of them for the exercise; under 3 to run |
# | needs | 2 CPUs (with one, rows say *emulated*), 2 GB of memory, 2 ranks, no network; Slurm's programs for the queue, else the workers are started without one |
#
# New terms are defined in the [glossary](glossary.md#forecast), in English and in Chinese.

# %% id="parameters" tags=["parameters"]
import hpclab

SIZE = hpclab.size()  # how much to do: "small", "class" or "cluster", as the variable HPCLAB_SIZE says

# %% id="imports"
import functools
import time
from pathlib import Path

import numpy as np
from IPython.display import FileLink

from hpclab import predictions, scaling, slurm, study

REPEATS, STEPS, LONG = {"small": (2, 12, 40), "class": (3, 12, 80), "cluster": (10, 100, 1000)}[SIZE]
BATCH = 96

# %% [markdown] id="score"
# ## Exercise: a score that rewards honesty
#
# A prediction without an interval doesn't say how far to trust it; an interval from zero to infinity is never wrong,
# and useless. So an interval has a price: **its width**, plus, if the value lies outside, something **for each unit by
# which it missed**. How much should a miss cost?
#
# You claim that your interval holds with probability `level`, for instance 0.9. Suppose that you widen it at one end by
# a small $d$. That costs $d$, and saves $d$ times the price of a miss whenever the value lies beyond that end. If your
# interval is right, with equal chances beyond each end, neither widening nor narrowing should pay.
#
# Write `score(low, high, value, level)`: what the interval costs once the value is known. Less is better.
#
# <details><summary>Hint</summary>
#
# Of ten values, an interval of level 0.9 misses one: half of the time below, half of the time above.
#
# </details>


# %% id="score-answer" exercise=true
def score(low, high, value, level):
    ...
    ### BEGIN SOLUTION
    return high - low + 2 / (1 - level) * max(low - value, value - high, 0)
    ### END SOLUTION


# %% id="score-check" points=2
hpclab.check("capstone.score", score)

# %% [markdown] id="honest"
# ## Does honesty pay?
#
# Try it: the cell below draws ten thousand values from a bell curve of spread 1, and scores intervals of level 0.9 of
# several widths by the package's own `interval_score`. **Predict**: which half-width costs least? (Nine of ten values
# of a bell curve lie within 1.64 of its middle.)

# %% id="honest-predict"
hpclab.predict("capstone.honest", ..., "half-width")

# %% id="honest-do"
values = np.random.default_rng(0).standard_normal(10_000)
costs = {
    half: np.mean([predictions.interval_score(-half, half, value) for value in values])
    for half in (0.2, 0.8, 1.3, 1.64, 2.0, 3.0, 10.0)
}
hpclab.tables.Table(
    {"half-width": half, "held": f"{np.mean(np.abs(values) <= half):.0%}", "mean score": f"{cost:.2f}"}
    for half, cost in costs.items()
)

# %% id="honest-came"
hpclab.came("capstone.honest", min(costs, key=costs.get))

# %% [markdown] id="honest-explain"
# **Explain.** Bold intervals pay for misses, cautious ones for width, and the honest one costs least. A score with this
# property is called *proper*: to win, say what you believe.
#
# To add up scores of different things, such as a speed-up and a share, we score the *logarithms* below. Then an
# interval from 1.0 to 1.2 costs as much as one from 0.50 to 0.60, and an interval that is about a
# fifth wide and held scores 0.2.

# %% [markdown] id="predict"
# ## Predict
#
# You will train the course's CNN on one rank and on two, with a batch of 96 pictures: in all (*strong*), or on each
# rank (*weak*). Then two ranks will run on the emulated network of a cluster that isn't here, eight ranks in a ring,
# with 5 ms a message and 1 Gb/s; train a CNN with half the channels; and lose a rank halfway. Six numbers will come
# out:
#
# - **strong**: how many times as fast two ranks are as one, with the same batch in all;
# - **weak**: the pictures a second of two ranks over those of one, with the same batch each, divided by 2;
# - **computing**: the share of a two-rank step (weak) in which a rank computes, rather than waits or fetches data;
# - **far**: the speed of two ranks on that network over their speed on this machine's;
# - **narrow**: the pictures a second of two ranks with half the channels, over those with all. (The second convolution
#   then does a quarter of the operations.)
# - **failure**: how many times as long a training takes if one of its two ranks is killed halfway. Every tenth step
#   writes a checkpoint.
#
# For each, write down an interval that holds with probability 0.9. Use what you know: your results from *cnn*,
# *scaling* and *faults*, a look at how busy this machine is, and for *far* some arithmetic. A ring of eight ranks sends
# 14 messages, one after the other, in each step, and a step of two ranks takes some tens of milliseconds. **The
# intervals below are ours, and not very good. Change them**, then run the cell: it adds them to a file, with the time
# and a hash over them and everything before. `begin`, below, notes in the same file that a measurement starts, so that
# everybody sees what was written before what.

# %% id="predict-do"
predicted = {
    "strong": (1.0, 1.9),
    "weak": (0.5, 1.0),
    "computing": (0.5, 0.95),
    "far": (0.1, 0.6),
    "narrow": (2.0, 4.0),
    "failure": (1.0, 1.5),
}
book = Path("predictions.jsonl")
written = predictions.write(book, predicted)
print(f"written at {written['written']}; its hash begins with {written['sha256'][:12]}")

# %% [markdown] id="measure"
# ## Measure
#
# The workers are jobs of a private Slurm, if its programs are installed. On a site call
# `hpclab.connect("slurm", workers=2, memory="1GB")` without the `if`, and add what the site asks for, such as `account` and
# `queue`; nothing else changes. The cases of a sweep run in turns, round after round, so that a drift of the
# machine affects all of them alike.

# %% id="connect"
if slurm.missing():
    client = hpclab.connect(workers=max(2, hpclab.machine.fits()))
else:
    client = hpclab.connect("slurm", private=True, workers=2, memory="1GB")

# %% id="measure-do"
folder = Path("results", time.strftime("%Y%m%d-%H%M%S") + "-capstone")
predictions.begin(book, folder)
page = study.measure(client, [2], folder, batch_size=BATCH, steps=STEPS, repeats=REPEATS, oversubscribe=True)
rows = study.read(page)


# %% id="settings-do"
def train(client, ranks=2, channels=(32, 64), **settings):
    model = functools.partial(hpclab.models.CNN, channels=channels)
    fixed = {"batch_size": BATCH, "steps": STEPS, "oversubscribe": True, "progress": False}
    return hpclab.train(client, model, "fashion_mnist", ranks=ranks, **fixed | settings)


far = hpclab.Network(latency=5e-3, bandwidth=1e9, ranks=8)
cases = [{"ranks": 2}, {"ranks": 2, "network": far}, {"ranks": 2, "channels": (16, 32)}]
trials = scaling.sweep(client, train, cases=cases, repeats=REPEATS)
rows += [row | {"regime": "setting"} for row in trials]


# %% id="failure-do"
def seconds(kill):
    """From the first step to the last, with or without a rank killed halfway."""
    run = train(client, steps=LONG, checkpoint_every=10, max_restarts=3)
    while kill and len(run.rows) < LONG:  # half of the rows of two ranks
        time.sleep(0.02)
    if kill:
        run.kill(1)
    attempts = hpclab.rows.attempts(run.result().rows)
    return attempts[-1]["end_s"] - attempts[0]["start_s"]


slower = [seconds(kill=True) / seconds(kill=False) for _ in range(REPEATS)]

# %% [markdown] id="judge"
# ## Be judged
#
# The ratios are medians over the rounds. Only predictions from before the measurement count, and of these only the
# newest.

# %% id="judge-do"
trials = {regime: [row for row in rows if row.get("regime") == regime] for regime in ("strong", "weak", "setting")}
both = [row for row in trials["weak"] if row["ranks"] == 2]
measured = {
    "strong": scaling.summary(trials["strong"])[1]["speedup"],
    "weak": scaling.summary(trials["weak"])[1]["efficiency"],
    "computing": float(np.median([row["compute_s"] / row["step_s"] for row in both])),
    "far": scaling.summary(trials["setting"])[1]["speedup"],
    "narrow": scaling.summary(trials["setting"])[2]["speedup"],
    "failure": float(np.median(slower)),
}
entries = predictions.read(book)
entry = predictions.before(entries, trials["strong"] + trials["weak"])
scores = predictions.score(entry, measured)
predictions.figure(scores, rows)

# %% id="judge-table"
predictions.table(scores)

# %% [markdown] id="judge-explain"
# **Explain** each miss, and each needlessly wide interval: what did you not know, or not use? Then compare yourself
# with three others: one is never wrong; one trusts the textbook (twice as fast, nothing lost, a quarter of the
# operations in a quarter of the time, and for the network a flat tenth); one knew the answer to
# within 10 %.

# %% id="others-do"
others = {
    "you": entry["predicted"],
    "never wrong": dict.fromkeys(measured, (0.01, 100)),
    "sure of the textbook": dict.fromkeys(measured, (0.99, 1.01))
    | {"strong": (1.98, 2.02), "far": (0.1, 0.11), "narrow": (3.9, 4.1)},
    "knew it to 10 %": {name: (value / 1.1, value * 1.1) for name, value in measured.items()},
}
tried = {
    who: predictions.score({"predicted": said, "level": predictions.LEVEL}, measured) for who, said in others.items()
}
hpclab.tables.Table(
    {"who": who, "held": f"{sum(row['held'] for row in found)} of {len(found)}", "mean score": predictions.total(found)}
    for who, found in tried.items()
)

# %% [markdown] id="report"
# ## The report
#
# One page with everything: what you wrote and when, what was measured, on what machine, the figures, the scores, and
# a row for each run of the sweeps (of *failure* only the ratio). It needs no other file and no network: open it from the file browser, or hand it in.
#
# **Can you cheat?** Measure, look, write better intervals, measure again: your score improves, but the page says how
# many measurements had begun before you wrote those intervals, and lists them all. If you change an entry, or remove
# one from the middle, the chain of hashes breaks. You could still measure without `begin` and look, cut entries off the
# *end* of the file, or start it over, with new hashes. No file on your own disk can rule that out. If it matters, give
# the hash of your prediction to someone else before you measure, as clinical trials are registered.

# %% id="report-do"
meaning = {
    "strong": "two ranks over one, the same batch in all",
    "weak": "two ranks over one, the same batch each, divided by 2",
    "computing": "share of a two-rank step that is computing",
    "far": "two ranks on a ring of eight, 5 ms and 1 Gb/s, over this machine's network",
    "narrow": "two ranks, half the channels over all of them",
    "failure": "time of a training that loses a rank halfway, over that of one that loses none",
}
FileLink(predictions.report(folder / "report.html", entry, scores, rows, meaning, entries))

# %% [markdown] id="quiz-score"
# ## Quiz
#
# ### Whose forecasts are best?
#
# A, B and C each forecast four runs, with 90 % intervals. Judge them by the interval score, a penalty: less is better.
# Which statements are true? Set `score_answer` to the set of their letters.
#
# - a: A's intervals hold what was measured in every run.
# - b: A has the best mean score.
# - c: B has the best mean score.
# - d: C has the best mean score.
# - e: B missed one of four, so its claim of 90 % is refuted at the 5 % level.
# - f: None of C's intervals holds what was measured.

# %% id="quiz-score-show"
from hpclab.course import quizzes

quizzes.show("capstone.quiz_score")

# %% id="quiz-score-answer" exercise=true
score_answer = ...
### BEGIN SOLUTION
score_answer = {"a", "c", "f"}
### END SOLUTION

# %% id="quiz-score-check" points=1
hpclab.check("capstone.quiz_score", score_answer)

# %% [markdown] id="quiz-ranks"
# ### How many ranks?
#
# A step computes for 64 ms on one rank, and for 64 / p ms on each of p. Then a ring sends 2 (p - 1) messages one after
# the other. Each takes 0.5 ms, all of it latency, and nothing is hidden. How many ranks make a step shortest, and how
# many milliseconds does it then take? Set `ranks_answer` to the pair.

# %% id="quiz-ranks-answer" exercise=true
ranks_answer = ...
### BEGIN SOLUTION
ranks_answer = (8, 15)
### END SOLUTION

# %% id="quiz-ranks-check" points=1
hpclab.check("capstone.quiz_ranks", ranks_answer)

# %% [markdown] id="close"
# ## Close

# %% id="close-do"
client.close()

# %% [markdown] id="end"
# ## Summary
#
# - A prediction is a number, an interval, a level, and a time before the measurement.
# - The interval score is proper: neither a huge interval nor a bold one wins in the long run.
# - A prediction counts only if others can see that it came before the measurement.
# - A miss is worth more than a hit: it names what you didn't know.
#
# ### What breaks at scale
#
# You ask for a thousand node-hours with a forecast, and get them on the strength of it. If you can't say beforehand
# what a run will show, with an interval, you can't notice that it went wrong.
#
# ### References
#
# - R. Winkler, *A decision-theoretic approach to interval estimation*, 1972.
# - T. Gneiting, A. Raftery, *Strictly proper scoring rules, prediction, and estimation*, 2007 (equation 43).
# - G. Brier, *Verification of forecasts expressed in terms of probability*, 1950.
