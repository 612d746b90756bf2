# %% [markdown] id="title"
# # Capstone: predict, then measure
#
# **You will** say in numbers, with intervals, how a training scales before you have seen it, measure it, and be scored by a
# rule that rewards neither a huge interval nor a bold one. At the end you have one page, which you can hand in.
#
# | | |
# |---|---|
# | objectives | predict from causes; say how sure you are; write a score that rewards honesty; measure scaling, another network and a failure, on workers that a queue started; report it so that others can check it |
# | prerequisites | the notebooks *start*, *cnn*, *scaling*, *queues* and *faults* |
# | minutes | 45 to read and do, 15 of them for the exercise; under 3 to run |
# | needs | 2 CPUs (with one, rows say *emulated*), 2 GB of memory, 2 ranks, no network; Slurm's programs for the queue, else the workers are started without one |
#
# Words that are new to you stand in the [glossary](glossary.md#forecast), in English and in Chinese.

# %% id="parameters" tags=["parameters"]
import hpclab

SIZE = hpclab.size()  # "small", "class" or "cluster"

# %% id="imports"
import functools
import time
from pathlib import Path

import numpy as np

from hpclab import predictions, scaling, slurm, study

REPEATS, STEPS, LONG = {"small": (2, 12, 40), "class": (3, 12, 80), "cluster": (10, 100, 1000)}[SIZE]
BATCH = 96

# %% [markdown] id="score"
# ## Exercise: a score that rewards honesty
#
# A prediction without an interval says nothing of how far to believe it; one from zero to infinity is never wrong, and
# useless. So an interval has a price: **its width**, and if the value lies outside, also something **for each unit by which
# it missed**. How dear must a miss be?
#
# You claim that your interval holds with probability `level`, for instance 0.9. Suppose that you widen it at one end by a
# little. That costs this little. It saves the price of a miss times this little, in those cases in which the value lies
# beyond that end. If your interval is right, with as many cases beyond each end, neither widening nor narrowing should pay.
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
# Try it. Ten thousand values are drawn from a bell curve of spread 1, and intervals of level 0.9 of several widths are
# scored, by the package's own `interval_score`. **Predict**: which half-width costs least? (Nine of ten values of a bell
# curve lie within 1.64 of its middle.)

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
# **Explain.** The bold ones pay for misses, the cautious ones for width, and what costs least is what is true. A score with
# this property is called *proper*: whoever wants to win says what they believe.
#
# To add up scores of different things, a speed-up and a share, say, the *logarithms* are scored below. Then an interval from
# 1.0 to 1.2 costs as much as one from 0.50 to 0.60, and a score of 0.2 means: about a fifth wide, and it held.

# %% [markdown] id="predict"
# ## Predict
#
# The course's CNN will be trained by one rank and by two, with a batch of 96 pictures: of all ranks together (*strong*), and
# of each (*weak*). Then two ranks will feel the network of a cluster that isn't here, eight ranks in a ring, with 5 ms a
# message and 1 Gb/s; train a CNN with half the channels; and lose a rank in the middle. Six numbers will come out:
#
# - **strong**: how many times as fast two ranks are as one, with the same batch in all;
# - **weak**: how many times as many pictures a second two ranks take in as one does, with the same batch each, divided by 2;
# - **computing**: which share of a two-rank step (weak) a rank computes, rather than waits or fetches data;
# - **far**: how fast two ranks are on that network, over how fast they are on this machine's;
# - **narrow**: how many times as many pictures a second two ranks take in with half the channels. (The second convolution
#   then does a quarter of the operations.)
# - **failure**: how many times as long a training takes if one of its two ranks is killed halfway. Every tenth step writes
#   a checkpoint.
#
# Write down an interval for each that holds with probability 0.9. Take what you know: your results of *cnn*, *scaling* and
# *faults*, a look at how busy this machine is, and for *far* the arithmetic. A ring of eight ranks sends 14 messages, one after
# the other, in each step, and a step of two ranks takes some tens of milliseconds. **The intervals below are ours, and not very good.
# Change them**, then run the cell: it adds them to a file, with the time, and a hash over them and all that came before.
# `begin`, below, adds to the same file that a measurement starts, so that everybody sees what was written before what.

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
predictions.write(book, predicted)

# %% [markdown] id="measure"
# ## Measure
#
# The workers are jobs of a private Slurm, if its programs are here. On a site leave out `private=True`, and nothing else
# changes. The cases run in turn, again and again, so that a drift of the machine meets all of them alike.

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
    """From the first step to the last, of a training that loses a rank halfway, or none."""
    run = train(client, steps=LONG, checkpoint_every=10, max_restarts=3)
    while kill and len(run.rows) < LONG:  # two ranks: half of their rows
        time.sleep(0.02)
    if kill:
        run.kill(1)
    attempts = hpclab.rows.attempts(run.result().rows)
    return attempts[-1]["end_s"] - attempts[0]["start_s"]


slower = [seconds(kill=True) / seconds(kill=False) for _ in range(REPEATS)]

# %% [markdown] id="judge"
# ## Be judged
#
# The ratios are medians over the rounds. Only predictions from before the measurement count: of several, the newest.

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
# **Explain** each miss, and each interval that was needlessly wide: what did you not know, or not use? Then look at how three
# others would have done: one who is never wrong, one who is sure of the textbook (twice as fast, nothing lost, a quarter of
# the operations in a quarter of the time, and arithmetic that forgets that computing goes on), and one who knew the answer to
# 10 %.

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
# One page with everything: what you wrote and when, what was measured, on what machine, the figures, the scores, and the rows
# themselves. It needs no other file and no network: open it from the file browser, or hand it in.
#
# **Can it be cheated?** Measure, look, write better intervals, measure again: the score improves, but the page says how many
# measurements had begun before those intervals were written, and lists them all. Changing an entry, or leaving one out from
# among the others, breaks the chain of hashes. What remains possible: to measure without `begin` and look, to cut entries off
# the *end* of the file, or to delete it and start over. No file on your own disk can rule that out. If it matters, give the
# hash of your prediction to somebody else before you measure, as clinical trials are registered.

# %% id="report-do"
meaning = {
    "strong": "two ranks over one, the same batch in all",
    "weak": "two ranks over one, the same batch each, divided by 2",
    "computing": "share of a two-rank step that is computing",
    "far": "two ranks on a ring of eight, 5 ms and 1 Gb/s, over this machine's network",
    "narrow": "two ranks, half the channels over all of them",
    "failure": "time of a training that loses a rank halfway, over one that loses none",
}
predictions.report(folder / "report.html", entry, scores, rows, meaning, entries)

# %% [markdown] id="quiz-score"
# ## Quiz
#
# ### Whose forecasts are best?
#
# A, B and C each forecast four runs, by 90 % intervals. Judge them by the interval score, a penalty: the less the better. Which
# statements are true? Set `score_answer` to the set of their letters.
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
# A step computes for 64 ms on one rank, and for 64 / p ms on each of p. Then a ring sends 2 (p - 1) messages one after the other.
# Each takes 0.5 ms, all of it latency, and nothing is hidden. With how many ranks is a step shortest, and how many milliseconds
# does it take? Set `ranks_answer` to the pair.

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
# A thousand node-hours are asked for with a forecast, and granted on it. Who can't say beforehand what a run will show, with
# an interval, has no way to notice that it went wrong.
#
# ### References
#
# - R. Winkler, *A decision-theoretic approach to interval estimation*, 1972.
# - T. Gneiting, A. Raftery, *Strictly proper scoring rules, prediction, and estimation*, 2007 (equation 43).
# - G. Brier, *Verification of forecasts expressed in terms of probability*, 1950.
