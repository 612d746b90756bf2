# %% [markdown] id="title"
# # Scaling laws: what a measurement proves
#
# **You will** measure how training scales on this machine, see where a step's time goes, and find out how little two CPUs
# prove. Then you emulate a slower network, and forecast machines that you don't have, next to what others measured on them.
# The parts headed *For later* come after the exercise, and can wait.
#
# | | |
# |---|---|
# | objectives | split a step into computing, communication, waiting and data; fit a law with intervals; say when the data can't tell; forecast from a cause instead of a curve |
# | prerequisites | the notebooks *start* and *cnn* |
# | minutes | 35 to read and do, 15 of them for the exercise; 60 with the parts *for later*; under 3 to run |
# | needs | 2 CPUs (with one, rows say *emulated*), 1.5 GB of memory, 2 ranks, no network |
#
# New terms are defined in the [glossary](glossary.md#strong-scaling), in English and in Chinese.

# %% id="parameters" tags=["parameters"]
import hpclab

SIZE = hpclab.size()  # how much to do: "small", "class" or "cluster", as the variable HPCLAB_SIZE says

# %% id="imports"
import numpy as np
from IPython.display import display

from hpclab import forecast, laws, plots, scaling, timeline
from hpclab.course import daint, diagrams
from hpclab.pages import Prose

REPEATS, STEPS = {"small": (3, 10), "class": (6, 15), "cluster": (10, 100)}[SIZE]
BATCH = 96

# %% id="connect"
client = hpclab.connect(workers=max(2, hpclab.machine.fits()))


def train(client, ranks, **settings):
    return hpclab.train(
        client,
        hpclab.models.CNN,
        "fashion_mnist",
        ranks=ranks,
        oversubscribe=True,
        progress=False,
        **{"batch_size": BATCH, "steps": STEPS} | settings,
    )


# %% [markdown] id="measure"
# ## Measure
#
# *Strong* scaling keeps the global batch fixed, so each rank computes less. *Weak* scaling keeps the batch of each rank
# fixed, so together they do more. Here is weak scaling, with interleaved repeats.
#
# **Predict**: with one rank a step takes some time. Two ranks, with the same batch *each*: how many times as long?

# %% id="measure-predict"
hpclab.predict("scaling.weak_step", ..., "times as long")

# %% id="measure-do"
rows = scaling.sweep(client, train, ranks=[1, 2], repeats=REPEATS)
hpclab.tables.Table(
    {"ranks": row["ranks"], "samples a second": round(row["samples_per_s"])}
    | {f"{name} (ms)": round(1e3 * row[f"{name}_s"], 1) for name in ("step", "compute", "comm", "straggle", "data")}
    for row in sorted(rows, key=lambda row: row["ranks"])
)

# %% id="measure-came"
hpclab.came("scaling.weak_step", 1 / scaling.summary(rows)[1]["efficiency"])

# %% [markdown] id="measure-explain"
# **Explain.** With two ranks a step takes longer, and the columns tell where the time goes. *compute* is CPU time: if it
# grows, two busy CPUs share caches and memory, or even one core. *straggle* is the wait for the slower rank; for a rank by itself it is the
# wait for a CPU. *comm* is what even the last rank waits for: the averaging of gradients that no computing hides. For
# 201 kB this network alone takes about a millisecond (the part *the network* measures it). The rest of *comm* is the wait
# for threads to wake and for a CPU, and grows if others use this machine too. The first steps don't
# count; the run itself determines how many (`warm_up` in the rows).

# %% [markdown] id="remarks"
# Two more functions check the rows for you: is this sweep strong or weak, and is anything odd about it?

# %% id="remarks-do"
print(scaling.regime(rows), "scaling")
Prose(" ".join(scaling.remarks(rows)) or "nothing to remark")

# %% [markdown] id="laws"
# ## Three laws
#
# **Amdahl**: in a job of fixed size (strong scaling), a share $\sigma$ can't be divided. One worker takes time 1, and $n$
# workers take $\sigma + (1 - \sigma)/n$. So the speed-up is
#
# $$S(n) = \frac{1}{\sigma + (1 - \sigma)/n} = \frac{n}{1 + \sigma (n - 1)}, \quad\text{never more than } 1/\sigma.$$
#
# **Gustafson**: the job grows with the workers (weak scaling), and $\sigma$ is the serial share of the time on $n$ of them:
# $S(n) = n - \sigma (n - 1)$. The same $\sigma$ costs much less: it is a share of the time on $n$ workers, whose
# divided part has grown.
#
# **The universal scalability law** (USL, Gunther) adds one more effect to Amdahl's:
#
# $$S(n) = \frac{n}{1 + \sigma (n - 1) + \kappa\, n (n - 1)}$$
#
# - $\sigma$, *contention*: the share of the work that one worker does while the others wait, as at a single till. Each
#   worker waits for the $n - 1$ others. Here: the one link, the one memory.
# - $\kappa$, *coherency*: what each *pair* of workers spends on agreeing, and there are about $n^2/2$ pairs. It gives the
#   curve a peak, beyond which more workers are slower.


# %% id="laws-do"
def usl(n, sigma, kappa):
    return n / (1 + sigma * (n - 1) + kappa * n * (n - 1))


n = np.arange(1, 65)
curves = {"no losses": usl(n, 0, 0), "Gustafson, sigma 0.05": n - 0.05 * (n - 1)}
curves |= {"Amdahl, sigma 0.05": usl(n, 0.05, 0), "USL, sigma 0.05 and kappa 0.001": usl(n, 0.05, 0.001)}
ax = diagrams.speedups(n, curves)

# %% [markdown] id="prove"
# ## What do two CPUs prove?
#
# It is tempting to fit Amdahl's law to two points, and draw it to a thousand CPUs. The points above won't do: they come
# from weak scaling, Amdahl's law is about strong scaling, and `scaling.fit(rows, "amdahl")` refuses them. But suppose that
# you had measured strong scaling. What could two counts of workers tell you? Here are five repeats of each, with 3 % noise,
# from a machine whose serial share we know: 0.1.

# %% id="prove-do"
dice = np.random.default_rng(0)
n = np.repeat([1, 2], 5)
for draw in range(3):
    x = 100 * laws.amdahl(n, 0.1) * (1 + 0.03 * dice.standard_normal(len(n)))
    low, high = laws.fit_amdahl(n, x).intervals["sigma"]
    most = f"{1 / low:.0f}" if low else "any number of"
    print(f"draw {draw}: a serial share of {low:.3f} to {high:.3f}; at most {1 / high:.0f} to {most} times as fast")

# %% id="prove-choose-do"
laws.choose(n, x)

# %% [markdown] id="prove-explain"
# **Not identifiable** is an answer, and often the only honest one. With only one and two workers, Amdahl's law
# fits whatever the truth is, if two are once to twice as fast as one; and so would any other with a parameter to adjust.
#
# Now up to 16 workers, with little noise. The laws diverge, so one can be named. Look at sigma's interval by Amdahl's law,
# which the data don't follow: it is *tight and wrong*. A tight interval is no evidence for its law. (`choose` also compares a
# straight line, *linear*; AICc says how much worse than the law it names each other one is.)

# %% id="prove-more"
n = np.repeat([1, 2, 4, 8, 16], 3)
x = 100 * laws.usl(n, 0.05, 0.005) * (1 + 0.02 * dice.standard_normal(len(n)))
print("truth: usl, sigma 0.05, kappa 0.005")
fits = [laws.fit_amdahl(n, x), laws.fit_usl(n, x)]
display(*fits, laws.choose(n, x))

# %% [markdown] id="curves"
# ## Exercise: 64 planted sweeps
#
# Write `judge(rows)`. It gets a sweep's rows and returns the name of the law ("amdahl" or "usl") and a 95 % interval
# (low, high) of its sigma, as a pair, if the rows can tell; `None, None` if they can't. A row looks like this:
#
# ```python
# {"kind": "trial", "run": 7, "epoch": 2, "ranks": 4, "threads": 1, "batch": 512, "samples_per_s": 731.2,
#  "source": "measured"}
# ```
#
# A `run` is one launch; it reports a row after each epoch. `batch` is the batch of all ranks together. The check runs your
# function on 64 sweeps whose truth is known, and counts its claims: laws where there is one to see, silence where there is
# none, and how many of the intervals contain the planted sigma. A few may miss. How many should?
#
# <details><summary>Hint</summary>
#
# `hpclab.laws.choose(ranks, rates)` gives a verdict: `verdict.law` (None if it can't tell) and `verdict.fit.intervals["sigma"]`.
# It takes every point for an independent measurement, of strong scaling, on a machine. Which rows are that? If a run has a bad start, what happens to its four rows?
#
# </details>


# %% id="curves-answer" exercise=true
def judge(rows):
    ...
    ### BEGIN SOLUTION
    runs = {}
    for row in rows:
        if row["source"] == "measured":
            runs.setdefault((row["run"], row["ranks"]), []).append(row["samples_per_s"])
    if scaling.regime(rows) != "strong":
        return None, None
    verdict = laws.choose([ranks for run, ranks in runs], [np.mean(rates) for rates in runs.values()])
    if not verdict.identifiable:
        return None, None
    return verdict.law, verdict.fit.intervals["sigma"]
    ### END SOLUTION


# %% id="curves-check" points=2
hpclab.check("scaling.curves", judge)

# %% [markdown] id="quiz-regime"
# ## Quiz
#
# ### Strong or weak?
#
# The table shows the time of a step in a sweep. Which statements are true? Set `regime_answer` to the set of their letters.
#
# - a: This is weak scaling.
# - b: With 8 ranks the efficiency is 62.5 %.
# - c: 8 ranks do 5 times as many samples a second as one.
# - d: With 8 ranks an epoch of the same data takes longer than with one.
# - e: Amdahl's law, fitted to these samples a second, gives the program's serial share.
# - f: The table shows how long a batch of 512 samples takes with 1, 2, 4 and 8 ranks.

# %% id="quiz-regime-show"
from hpclab.course import quizzes

quizzes.show("scaling.quiz_regime")

# %% id="quiz-regime-answer" exercise=true
regime_answer = ...
### BEGIN SOLUTION
regime_answer = {"a", "b", "c"}
### END SOLUTION

# %% id="quiz-regime-check" points=1
hpclab.check("scaling.quiz_regime", regime_answer)

# %% [markdown] id="sweep-open"
# ## For later: what `sweep` does
#
# The path of 90 minutes goes on with *Close* at the end.
#
# In each round it trains every case once, in shuffled order. It keeps one row per run: the samples
# of the steps after the first, slow ones, divided by their seconds. A speed-up then divides two rows of the *same* round.
# By hand, for one more run, and for the rounds of the first part:

# %% id="sweep-open-do"
run = train(client, 2).result()
kept = scaling.trial(run.rows)
steps = [row for row in run.rows if row["kind"] == "step" and row["step"] >= kept["warm_up"]]
seconds = max(sum(row["step_s"] for row in steps if row["rank"] == rank) for rank in (0, 1))
print(
    f"by hand {sum(row['samples'] for row in steps) / seconds:.3f} samples a second, kept {kept['samples_per_s']:.3f}"
)

speed = {(row["repeat"], row["ranks"]): row["samples_per_s"] for row in rows}
gains = [speed[turn, 2] / speed[turn, 1] for turn in range(REPEATS)]
print(f"by hand {np.exp(np.mean(np.log(gains))):.3f} times the samples, paired {scaling.paired(rows)[0]['ratio']:.3f}")

# %% [markdown] id="look"
# ## For later: look inside a step
#
# torch's profiler records what each rank does when. Both ranks use one clock, so you can *see* which waits for which. (A
# traced step is slower.) Three runs: on this machine; on a slow network, 1 ms and 50 Mb/s; and on the same network with
# gradients in *buckets* of 0.1 MB. In one of them a rank sends while it is still computing: which one?

# %% id="thin"
thin = hpclab.Network(latency=1e-3, bandwidth=50e6)

# %% id="look-do"
runs = [train(client, 2, trace=3).result()]
runs += [train(client, 2, trace=3, network=thin, **buckets).result() for buckets in ({}, {"bucket_cap_mb": 0.1})]
plots.timelines([timeline.spans(run.folder) for run in runs], height=3)

# %% [markdown] id="look-explain"
# The narrow bars below each rank are the all-reduces. A bar begins when its rank's bucket of gradients is
# full, and ends on both ranks at once; the slow network's time comes after the bar, because the emulation adds it there.
#
# In the top and middle pictures the bars come *after* the backward pass. DDP can send while it computes, but only full
# buckets, and all of this network's gradients (201 kB) fit into one bucket of its default size (1 MB for the first, then
# 25). The bottom picture has two. The classifier's gradients, which come first, fill one of them; it travels during the
# backward pass through the convolutions. **Predict**: with two buckets, how many times as fast as with one is a step?

# %% id="overlap-predict"
hpclab.predict("scaling.overlap", ..., "times as fast")

# %% id="overlap-do"
cases = [{"ranks": 2, "network": thin}, {"ranks": 2, "network": thin, "bucket_cap_mb": 0.1}]
overlapped = scaling.paired(scaling.sweep(client, train, cases=cases, repeats=REPEATS))
hpclab.tables.Table(
    {"case": row["measure"], "times as fast as one bucket": hpclab.ratios.told(row)} for row in overlapped
)

# %% id="overlap-came"
hpclab.came("scaling.overlap", overlapped[0]["ratio"])

# %% [markdown] id="overlap-explain"
# A second bucket costs two more messages, 2 ms here, and hides what the first one takes, up to the length of the backward
# pass. On a network whose extra messages take longer than the backward pass can hide, small buckets would lose. (If no
# difference is shown, there were too few rounds for this machine's noise; other programs make it larger.)
#
# `timeline.merge(runs[0].folder)` writes the first picture, with every operation in it, as a file for Perfetto.

# %% [markdown] id="quiz-timeline"
# ### Quiz: read a timeline
#
# One step of two ranks, with two buckets of gradients. DDP packs gradients into buckets, and
# averages each by an all-reduce: a narrow bar, which begins once its rank has the bucket ready and the one before is done,
# and ends on both ranks at once. Which statements are true? Set `timeline_answer` to the set of their letters.
#
# - a: Rank 1 computes longer than rank 0 (forward and backward together).
# - b: Communication that nothing hides takes 25 ms of this step.
# - c: Rank 1's all-reduce of the first bucket is hidden by its backward pass.
# - d: With a network that takes no time this step would be about 5 ms shorter.
# - e: If rank 0 alone computed faster, the step would be shorter.
# - f: Rank 0 sends more bytes than rank 1, as its bars are longer.

# %% id="quiz-timeline-show"
quizzes.show("scaling.quiz_timeline")

# %% id="quiz-timeline-answer" exercise=true
timeline_answer = ...
### BEGIN SOLUTION
timeline_answer = {"a", "c", "d"}
### END SOLUTION

# %% id="quiz-timeline-check" points=1
hpclab.check("scaling.quiz_timeline", timeline_answer)

# %% [markdown] id="network"
# ## For later: the network
#
# How long does averaging take by itself? A message of $m$ bytes takes a latency $\alpha$, however short it is, plus a time
# $\beta$ for each byte:
#
# $$T(m) = \alpha + \beta m$$
#
# $1/\beta$ is the *bandwidth*. We time the averaging of arrays of many sizes, and fit both. (On two ranks an average is two
# messages in turn, so the line's $\alpha$ is two latencies; `scaling.network` halves it.)

# %% id="network-do"
messages = scaling.allreduce(client, ranks=2, oversubscribe=True)
line = laws.fit_alpha_beta([row["nbytes"] for row in messages], [row["duration_s"] for row in messages])
line

# %% id="network-show-do"
own = scaling.network(messages)
ax = plots.allreduce(messages, line)
own

# %% [markdown] id="choose-open"
# ## For later: what `choose` does
#
# A law with an extra parameter always fits at least as well, so the parameter must earn its place.
# The AICc adds the misfit that a law leaves and the price of its $p$ parameters (the last is the size of the noise).
# `choose` names the smaller law unless the larger one's AICc is lower by more than 2. By hand, for the two laws fitted to 16 workers,
# beside the package's:

# %% id="choose-open-do"
k = len(n)
for fit, p in zip(fits, (3, 4), strict=True):  # the speed of one worker, sigma, (kappa,) the noise
    left = np.log(x / fit(n))
    aicc = k * np.log(np.mean(left**2)) + 2 * p + 2 * p * (p + 1) / (k - p - 1)
    print(f"{fit.law}: AICc by hand {aicc:.3f}, by the package {fit.aicc:.3f}")

# %% [markdown] id="choose-open-explain"
# Also, it names a law only if the data can tell: they need five different counts and eight measurements, no bend that the law
# can't explain, and a band of no more than 25 % either way at twice the largest count.

# %% [markdown] id="dial"
# ## For later: a cause instead of a curve
#
# A fitted curve knows nothing of machines that it hasn't seen. A *cause* may: how long a rank computes, how much that
# varies (all wait for the slowest), how many bytes travel, over which network, and what hides behind the backward pass.
# A step on $p$ ranks takes
#
# $$T(p) = c + s\, z(p) + v(p), \qquad v(p) = \max\bigl(V_{\text{last}}(p),\ V(p) - o\, c\bigr)$$
#
# - $c$: seconds of computing; $s$: their standard deviation; $z(p)$: how many standard deviations the slowest of $p$ ranks
#   is behind the mean (0.6 for two ranks, 1.8 for sixteen);
# - $v(p)$: the visible communication. $V(p)$ is all of it; it can hide behind a share $o$ of the computing, the backward
#   pass, except for the last bucket, which takes $V_{\text{last}}(p)$. This model has one bucket, so nothing is hidden.
# - $V(p) = 2 (p - 1)\, \alpha + 2 \frac{p - 1}{p}\, \beta N$ for $N$ bytes in a ring.
#
# `calibrate` takes $s$, $N$ and the network as given, and finds the $c$ for which the equation gives the measured steps of
# two ranks, with both CPUs as busy as they will be. By hand:

# %% id="calibrate-do"
both = [row for row in rows if row["ranks"] == 2]
steps = [row["step_s"] for row in both]
jitter = sum(row["jitter_s"] for row in both) / len(both)
work = forecast.Workload.of(hpclab.models.CNN(), compute_s=both[0]["compute_s"], samples=BATCH, jitter_s=jitter)
known = forecast.calibrate(work, own, [2] * len(both), steps, ["compute_s"])

# %% id="calibrate-open-do"
alpha, beta, size = own.latency, 8 / own.bandwidth, work.gradient_bytes
ring = 2 * (2 - 1) * alpha + 2 * (2 - 1) / 2 * beta * size
by_hand = np.exp(np.mean(np.log(steps))) - jitter * forecast.slowest(2) - ring
print(f"computing: {1e3 * by_hand:.2f} ms by hand, {1e3 * known.workload.compute_s:.2f} ms by calibrate")

# %% [markdown] id="dial-it"
# Now forecast how a slow network would affect up to 16 ranks. Then measure it: two real ranks that pay what averaging over
# that many would cost.

# %% id="dial-do"
slow = {count: hpclab.Network(latency=5e-3, bandwidth=1e9, ranks=count) for count in (2, 4, 8, 16)}
emulated = {count: scaling.trial(train(client, 2, network=link).result().rows) for count, link in slow.items()}
ahead = {row["ranks"]: row for row in known.rows(list(slow), network=slow[2])}
hpclab.tables.Table(
    {
        "ranks": count,
        "forecast (ms)": f"{1e3 * ahead[count]['step_s']:.1f}",
        "its band": f"{1e3 * ahead[count]['step_low_s']:.0f} to {1e3 * ahead[count]['step_high_s']:.0f}",
        "emulated (ms)": f"{1e3 * emulated[count]['step_s']:.1f}",
    }
    for count in slow
)

# %% [markdown] id="dial-explain"
# The forecast's wait for the slowest grows with the ranks; the emulation has only two ranks, so it lacks that part. They
# share everything else. Try another network: double the latency, or take `topology="tree"`. (hpclab refuses a network less
# than twice as slow as this machine itself: an emulation can only add time.) The band is for a single measurement, from
# how the repeats of the first part differ: a handful of repeats on a busy machine makes it wide.
#
# ## For later: a ring or a tree?
#
# Gradients can be summed in several ways. In a **ring** each rank sends a $p$-th of the bytes to its neighbour, $2 (p - 1)$
# times; all links are always busy. In a **tree** ranks add up in pairs, then the pairs in pairs, and the sum goes back down:
# only $2 \log_2 p$ messages in turn, but each is the whole vector. (Libraries such as NCCL cut the vector into pieces that
# follow each other through the tree; then it costs hardly more bytes in turn than a ring.) Time runs downwards:

# %% id="tree-do"
diagrams.collectives()

# %% [markdown] id="tree-explain"
# | | seconds for $N$ bytes on $p$ ranks |
# |---|---|
# | ring | $2 (p - 1)\, \alpha + 2 \frac{p - 1}{p}\, \beta N$ |
# | tree | $2 \log_2 p\; (\alpha + \beta N)$ |
# | halving-doubling: in each step all ranks swap with a partner; messages halve, then double again | $2 \log_2 p\; \alpha + 2 \frac{p - 1}{p}\, \beta N$ |
# | parameter server: all send to one, and get the sum back, both at the same time | $2 \alpha + p\, \beta N$ |
#
# To explore faster than you can measure, move these sliders: the same forecast for up to 1,024 ranks, for each way of
# summing. Stars mark what was measured here; the whiskers at the right are the bands. When does a tree beat a ring?

# %% id="explore-do"
hpclab.widgets.Explorer(known, scaling.summary(rows))

# %% [markdown] id="beyond"
# ## For later: beyond this machine
#
# Nobody here has a hundred GPUs. Others measured on them, and published it: InceptionV3 on 1 to 128 nodes of Piz Daint,
# with gradients summed by parameter servers (1, 1, 3, 2, 4, 12, 40 and 116 of them). We give the first six points
# to a law, and to a forecast that knows the number of servers, and that they can't split the last layer's 8 MB of weights.
# Nobody recorded what each server's *link* carried: what its process, its operating system and its network together bring
# to it. (Daint's cables carry far more.) Users of later versions saw TensorFlow's gRPC carry 500 MB a second, which is
# 4 Gb/s, and 800, 6.4 Gb/s: that gives an order of magnitude. We guess 10, and also try 4, 6.4, 8, 12, and 10 with an
# uncertainty of 30 %. Figure and tables have images a second, with their bands; each node is a rank.

# %% id="beyond-do"
law = laws.fit_usl(daint.NODES[: daint.KNOWN], daint.RATES[: daint.KNOWN])
display(laws.choose(law.n, law.x))
unsure = daint.forecast(10, link_error=0.3)
ax = plots.law(daint.RECORDED, law, unsure)

# %% id="beyond-table-do"
display(daint.table({"10 Gb/s": daint.forecast(10)}, law), daint.table({"10 Gb/s, unsure": unsure}))
for speeds in ((4, 6.4), (8, 12)):
    display(daint.table({f"{speed} Gb/s": daint.forecast(speed) for speed in speeds}))

# %% [markdown] id="beyond-explain"
# All were given the points up to 32 nodes, but neither of the last two.
#
# The *law* says that it doesn't know: `choose` names none from six measurements, and at 128 nodes the band of the USL
# reaches from hundreds to hundreds of thousands. (Its line is 4 % off at 64 nodes and 23 % at 128: up to 32 nothing
# shows that one server's link will fill up.)
#
# The *forecast* is sharp, 4 % either way, but only as good as the link speed it is given. With 10 Gb/s it is 3 % off at 128
# nodes; at 64, where the link is four fifths full, it is 8 % off, outside its band. With 8 it would be 21 % too low at 128, with
# 12 it would be 14 % too high. Told that the link speed is uncertain by 30 %, it gives bands that contain both records; at
# 128 nodes the band reaches from 5,200 to 15,400.
#
# And with the speeds that users saw elsewhere? With 4 Gb/s it is 45 % too low at 64 nodes, and 58 % at 128. But look at 8 and 16
# nodes, which the forecast *was* given: there it is a third too low as well. No choice of the other numbers brings its line
# near the six measured points: it misses them by 19 % (root mean square), and its bands are so wide that they contain them
# all the same. With 6.4 it misses by 1.6 %, nearly twice as much as with 10 (0.9), and is 19 % too low at 64, and 35 % at
# 128. So the points refute 4, speak against 6.4, and can't tell 8 from 12: compare a forecast with what you have measured
# before you believe the rest of it, and don't believe it beyond what that can tell.
#
# A cause beats a curve because it says *what to measure next*: here what a server carries, on a few nodes, in a minute. That is why
# `plots.law` ends a law where the figure's measurements end, unless a forecast stands beside it.

# %% [markdown] id="close"
# ## Close

# %% id="close-do"
client.close()

# %% [markdown] id="end"
# ## Summary
#
# - A step is computing, communication that nothing hides, waiting for the slowest, and data. Each is in the rows.
# - Two CPUs identify no law; *not identifiable* is an honest answer, and says what to measure next.
# - A law describes what you measured. To go further, forecast from causes, calibrated on your points, with a band that
#   includes how well you know the network.
# - Score a forecast on points that it hasn't seen.
#
# ### What breaks at scale
#
# The slowest of a thousand ranks is about three standard deviations late in every step, if they vary like a bell curve; a
# ring of a thousand ranks pays two
# thousand latencies; and one full link slows them all down. The notebook *faults* shows what happens when one of them dies.
#
# ### References
#
# - G. Amdahl, *Validity of the single processor approach to achieving large scale computing capabilities*, 1967.
# - N. Gunther, *Guerrilla Capacity Planning*, 2007 (the universal scalability law).
# - R. Thakur, R. Rabenseifner, W. Gropp, *Optimization of collective communication operations in MPICH*, 2005.
# - E. Bugliarello, *Distributed TensorFlow: a performance evaluation*, CSCS, 2017 (the recorded table).
# - TensorFlow, [issue 6116](https://github.com/tensorflow/tensorflow/issues/6116), 2017 (what gRPC reached).
# - K. Burnham, D. Anderson, *Model Selection and Multimodel Inference*, 2002.
