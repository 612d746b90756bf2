# %% [markdown] id="title"
# # Too big: a model that doesn't fit
#
# **You will** count the bytes that training needs, then train a GPT in many ways that spread it over ranks, and compare
# what each rank held with what you counted. You see the bubbles of a pipeline, and plan a model of 80 billion parameters.
#
# | | |
# |---|---|
# | objectives | write down the memory of a training step before you run it; say what each strategy shards, and what it sends; choose the cheapest one that fits |
# | prerequisites | the notebook *cnn*; *ddp-from-scratch* helps |
# | minutes | 45 to read and do, 15 of them for the exercise; under 3 to run |
# | needs | 2 CPUs (with one, rows say *emulated*), 1.5 GB of memory, 2 ranks, no network |
#
# New terms are defined in the [glossary](glossary.md#pipeline-parallelism), in English and in Chinese.

# %% id="parameters" tags=["parameters"]
import hpclab

SIZE = hpclab.size()  # how much to do: "small", "class" or "cluster", as the variable HPCLAB_SIZE says

# %% id="imports"
import functools

import torch

from hpclab import forecast, live, plots, timeline
from hpclab.course import malloc, needs, pipelines, widgets
from hpclab.course import plots as figures
from hpclab.training import strategies
from hpclab.training.strategies.wire import Sizes, wire

BATCH = {"small": 2, "class": 4, "cluster": 8}[SIZE]  # windows of 128 characters, on each rank

# %% [markdown] id="arithmetic"
# ## What fills the memory
#
# A training step holds, for each parameter:
#
# | | mixed precision | here: 32 bits |
# |---|---|---|
# | weight | 2 bytes | 4 bytes |
# | gradient | 2 | 4 |
# | AdamW: mean, mean square, and in mixed precision the weight in 32 bits | 4 + 4 + 4 | 4 + 4 |
# | **together** | **16** | **16** |
#
# It also holds **activations**: what the forward pass keeps for the backward pass. Each block of our GPT keeps 16 numbers
# for each character and unit of width: its input and the stream in its middle, the outputs of both norms, $q$, $k$, $v$, what
# attention mixes, and twice four of the perceptron. With 4 bytes a number, $L$ blocks of width $h$, and $t$ characters (windows
# times their length):
#
# $$A = 64\, L\, h\, t$$
#
# Parameters don't depend on the batch, but activations grow with it, and with the sequence. (An attention that stores its
# scores would add a term with the *square* of the sequence's length; torch's fused attention doesn't store them.)
#
# Our GPT has 8 blocks of width 256. Its text is the King James Bible, in windows of 128 characters.

# %% id="arithmetic-do"
model = hpclab.models.GPT(width=256, layers=8)
parameters = model.counts().parameters
print(f"{parameters:,} parameters: weights {4 * parameters / 1e6:.0f} MB, 16 bytes each {16 * parameters / 1e6:.0f} MB")
print(f"activations of {BATCH} windows: {64 * 8 * 256 * BATCH * 128 / 1e6:.0f} MB")

# %% [markdown] id="ddp"
# **Predict**: two ranks train it with `DistributedDataParallel`, each with the windows above. How many MB does a rank hold at
# its peak?

# %% id="ddp-predict"
hpclab.predict("too-big.ddp", ..., "MB")

# %% [markdown] id="measure"
# ## How it is measured
#
# Linux notes the most memory that a process has held (`VmHWM`). A rank sets that mark back before it makes its model, and each row
# of a step says how far it has risen since (`peak_mb`). Two things would blur it:
#
# - libraries load parts of themselves when they are first used: a tiny GPT, trained in the same way, shows how much, and we
#   subtract that;
# - the C library keeps freed memory for later (*one-process* shows why): here each rank gives it back, which makes steps slower.

# %% id="connect"
client = hpclab.connect(workers=2)


def gpt(width=256):
    malloc.keep(False)
    return hpclab.models.GPT(width=width, layers=8)


def train(strategy, make=gpt, **settings):
    return hpclab.train(
        client,
        make,
        "kjv",
        ranks=2,
        oversubscribe=True,
        progress=False,
        optimizer=functools.partial(torch.optim.AdamW, lr=1e-3),
        strategy=strategy,
        **{"batch_size": BATCH, "steps": 3} | settings,
    ).result()


# %% id="measure-do"
def measured(name, strategy):
    tiny = functools.partial(gpt, width=16)
    runs = train(strategy), train(strategy, tiny)
    return needs.row(name, strategy, *runs, model, batch=2 * BATCH)


ways = strategies.named
rows = {"ddp": measured("ddp", ways("ddp"))}

# %% id="ddp-came"
hpclab.came("too-big.ddp", rows["ddp"]["peak_mb"])

# %% [markdown] id="ddp-explain"
# **Explain.** The weights are less than a fifth of it. Two details of the sum:
#
# - DDP copies the gradients into *buckets*, which it sends: 4 more bytes a parameter. The figure below calls them buffers.
# - Gradients come as activations go: the backward pass frees the activations of a block once it has its gradient. So with one
#   batch a step, the peak has *either* all activations *or* all gradients, whichever are larger.
#
# ## Three things to share
#
# **ZeRO** shards over data-parallel ranks what DDP has on each: stage 1 the optimiser's state, stage 2 the gradients too, stage 3
# the weights too. (Stages 2 and 3 are PyTorch's *FSDP*, whose stage 2 also puts the weights into shards between steps.) In stage 3 a rank gathers the weights of a block just before it needs them,
# computes the *whole* block on its *own* windows, and drops them.
#
# **Predict**: what share of DDP's peak do two ranks need with stage 3: 0.5?

# %% id="zero-predict"
hpclab.predict("too-big.zero3", ..., "of DDP's peak")

# %% [markdown] id="all"
# ## Every way but one
#
# | | each rank computes | ranks send |
# |---|---|---|
# | `ddp`, `zero1` to `zero3` | the whole model, on its windows | gradients; with ZeRO also weights |
# | `accumulate` | the same, one micro-batch after another | gradients, once for all micro-batches |
# | `bf16`, `powersgd`, `topk` | the same | gradients in fewer bytes |
# | `local-sgd`, `diloco` | the same | weights, every few steps |
# | `tensor`, `sequence` | *parts of each block's matrices*, on all windows | activations and their gradients, summed four times a block (with `sequence` each sum is a reduce-scatter and an all-gather) |
# | `gpipe`, `1f1b`, `interleaved` | *some blocks*, on all windows | activations and their gradients, between blocks on different ranks |
#
# (fp16 is left out: it is bf16 with another kind of 16-bit number.) The next cell trains the others for three steps each, and one with `recompute`: it keeps the blocks' inputs only, and computes
# the rest again in the backward pass.

# %% id="all-do"
names = ["accumulate", "bf16", "powersgd", "topk", "zero1", "zero2", "zero3", "tensor", "sequence"]
every = {name: ways(name) for name in [*names, "gpipe", "1f1b", "interleaved"]}
every["accumulate"] = strategies.Accumulate(2)
every |= {"local-sgd": strategies.LocalSGD(every=2), "diloco": strategies.DiLoCo(every=2)}
every["zero3 + recompute"] = strategies.Zero(3, recompute=True)
rows |= {name: measured(name, every[name]) for name in live.tracked(every, "every way", "run")}
ax = figures.needs([*rows.values()])

# %% id="zero-came"
hpclab.came("too-big.zero3", rows["zero3"]["peak_mb"] / rows["ddp"]["peak_mb"])

# %% [markdown] id="all-explain"
# **Explain.** The bars are the formula, the markers what the ranks held. Stage 3 halves what belongs to parameters (but for two blocks, which are whole at a time), and
# **shards no activations**: each rank keeps those of its own windows, whole, and with larger batches they are
# most of its memory. To cut them, take smaller micro-batches, or compute again. Splitting the *computation* cuts what *one* window costs a rank,
# which helps where not even one fits. At the same batch of all ranks together it need not help: half of every
# window is as much as the whole of half the windows, which `ddp` keeps. Above, `tensor` and `sequence` keep even more: the
# outputs of the norms whole (`tensor` also their inputs), and something more, which we measured and can't name.
#
# **FSDP isn't tensor parallelism.** FSDP shards how weights are *stored*; every rank computes with whole
# matrices. Tensor parallelism splits the *multiplication*: no rank computes with a block's whole matrix, all ranks work on the same
# windows, and partial sums of activations travel. So FSDP's bytes don't depend on the batch, and tensor parallelism's
# grow with it:

# %% id="bytes-do"
hpclab.tables.Table(
    {"windows a step": windows}
    | {f"{name} (MB sent)": round(wire(ways(name), 2, Sizes.of(model, windows, 128))["nccl"] / 1e6) for name in pair}
    for windows in (4, 16, 64)
    for pair in [("zero3", "tensor", "gpipe")]
)

# %% [markdown] id="when"
# ## When to use what
#
# For the runs above: the loss in the third step (the exact strategies agree up to
# rounding; powersgd's first two steps are ddp's, so here its loss is ddp's, too), the fastest step, the bytes that a rank sends in a step on the library that ran here (gloo) and on NVIDIA's (NCCL), by
# formula, and the measured peak. Seconds are of one short run each, within one machine: they rank nothing on a cluster.

# %% id="when-do"
hpclab.tables.Table(
    {
        "strategy": name,
        "loss": f"{row['loss']:.3f}",
        "step (s)": f"{row['step_s']:.2f}",
        "gloo (MB)": round(row["sent_gloo_mb"], 1),
        "NCCL (MB)": round(row["sent_nccl_mb"], 1),
        "peak (MB)": round(row["peak_mb"]),
        "by formula (MB)": round(sum(row[f"{part}_mb"] for part in needs.PARTS)),
        "when": needs.advice(name),
    }
    for name, row in rows.items()
)

# %% [markdown] id="bubble"
# ## Bubbles
#
# In a pipeline, the second stage waits for the first micro-batch, and the first stage waits for its gradient. With $p$ stages and $m$
# micro-batches that each take the same time, ranks idle for a share of
#
# $$\frac{p - 1}{m + p - 1}$$
#
# That is the **bubble**. Two stages with two micro-batches would idle for a third of their time.
#
# The pictures below are in the order of the table: one step of each.
#
# **Predict**: what share is it, measured, with eight micro-batches?

# %% id="bubble-predict"
hpclab.predict("too-big.bubble", ..., "of the time")

# %% id="bubble-do"
cases = [("gpipe", 2), ("gpipe", 8), ("1f1b", 8)]
traced = []
for schedule, micro_batches in live.tracked(cases, "pipelines", "run"):
    pipeline = strategies.Pipeline(schedule=schedule, micro_batches=micro_batches)
    traced.append(timeline.spans(train(pipeline, batch_size=4, steps=6, trace=1).folder))
plots.timelines(traced)
bubbles = [pipelines.bubble(spans) for spans in traced]
hpclab.tables.Table(
    {"schedule": schedule, "micro-batches": m, "idle": f"{idle:.0%}", "(p - 1)/(m + p - 1)": f"{1 / (m + 1):.0%}"}
    for (schedule, m), idle in zip(cases, bubbles, strict=True)
)

# %% id="bubble-came"
hpclab.came("too-big.bubble", bubbles[1])

# %% [markdown] id="bubble-explain"
# **Explain.** Where a rank has no pass, between the step's first pass and its last, is the bubble: the gaps between bars, and
# the wait of the last stage at both ends. It **isn't fixed**: more micro-batches fill the pipeline better,
# and more stages worse. What is measured mostly exceeds the formula, since stages aren't equally long, and a message takes
# time. (On a busy machine, ranks also wait for CPUs.) The all-reduce in the end
# adds up the gradients of the embedding, whose weights the first and the last stage share.
#
# `gpipe` runs all forward passes first; `1f1b` runs one forward pass and one backward pass in turn, as soon as it can. The bubble is
# the same. But with `gpipe` a rank keeps the activations of all $m$ micro-batches, with `1f1b` those of $p$ at most: look at
# their peaks above. `interleaved` gives each rank several shorter stages: the bubble shrinks, and more messages
# travel.
#
# ## Up to 80 billion parameters
#
# The forecasts below are calibrated on 505 configurations that others *ran*, with models of 1 and 3 billion parameters on up to 64 H100s.
# First, the best of these runs beside what the formula says of the same layout, these runs being among those that it is
# calibrated on:

# %% id="recorded-do"
table = [row for row in hpclab.data.tables.table("ultrascale") if row["ok"] and row["nodes"] == 8]
memory, throughput = forecast.ultrascale.fitted()
best = [max((row for row in table if row["model"] == name), key=lambda row: row["tok_s"]) for name in ("1B", "3B")]
hpclab.tables.Table(
    {"model": row["model"], "source": source, "GB": round(gb, 1), "tokens a second": f"{tokens:,.0f}"}
    for row in best
    for case in [forecast.ultrascale.case(row)]
    for source, gb, tokens in [
        ("recorded", row["mem_gb"] * 2**30 / 1e9, row["tok_s"]),
        ("forecast", memory.stage_bytes(*case)[0] / 1e9, 256 * 4096 / throughput.step_s(*case)),
    ]
)

# %% [markdown] id="plan"
# These runs added up gradients in 4 bytes, so a parameter took 18 bytes: 1,440 GB for a model of 80 billion parameters. An H100
# "of 80 GB" has 85.5.
#
# **Predict**: what is the least number of H100s, a power of two, on which some layout of it fits, with sequences of 4,096 tokens, ZeRO 0 or 1, and
# nothing computed again?

# %% id="plan-predict"
hpclab.predict("too-big.gpus", ..., "GPUs")

# %% id="plan-do"
large = widgets.Planner.MODELS["80B"]
plans = {gpus: forecast.plan(large, gpus, batch=256, most=1) for gpus in (8, 16, 32, 64, 128)}
least = min(gpus for gpus, found in plans.items() if found)
figures.memory([row for found in plans.values() for row in found], forecast.H100.memory_bytes)
hpclab.tables.Table(
    {"GPUs": gpus, "source": "forecast"}
    | {"dp x tp x pp": f"{row['dp']} x {row['tp']} x {row['pp']}", "ZeRO": row["zero"]}
    | {"GB": round(row["memory_bytes"] / 1e9), "tokens a second": f"{row['tokens_per_s']:,.0f}"}
    for gpus, found in plans.items()
    for row in found
)

# %% id="plan-came"
hpclab.came("too-big.gpus", least)

# %% [markdown] id="plan-explain"
# **Explain.** On 16 GPUs the 18 bytes alone take 90 GB each, more than a GPU has. (In all, up to 94 GB counts as fitting:
# near the limit, recorded runs, which were full of activations, needed less than forecast.) Set the model to 80B, and move the
# other sliders: what does twice the sequence cost? Which layouts vanish with 40 GB? What becomes possible if blocks may be computed
# again? All rows are forecasts, for a model far larger than those that were recorded: trust their order more than their digits.

# %% id="planner-do"
widgets.Planner()

# %% [markdown] id="choose"
# ## Exercise: the cheapest that fits
#
# Write `choose(budget, ranks, parameters, layers, width, batch, sequence)`. It returns the name of the first of these options
# with which a rank stays within `budget` bytes, or `"none"` if there is no such option. They are in order of cost: with gloo, as here, each sends or
# computes more than the one before. $P$ is the number of parameters, all numbers have 4 bytes, and `batch` counts the sequences of *all* ranks
# together.
#
# | option | weights | gradients | AdamW's state | activations |
# |---|---|---|---|---|
# | `"ddp"` | $4 P$ | $4 P$ | $8 P$ | $A$ |
# | `"zero1"` | whole | whole | sharded | ? |
# | `"zero3"` | sharded | sharded | sharded | ? |
# | `"zero3+recompute"` | sharded | sharded | sharded | the blocks' inputs, $A / 16$, and one block, $A / L$ |
#
# Add up all four columns, to be on the safe side, and leave buffers out. $A = 64\, L\, h\, t$, as above, where $t$ counts the tokens *of one rank*.
#
# <details><summary>Hint</summary>
#
# A dictionary of needs in this order, by name; then `next(..., "none")`. Which parts of a rank's memory does ZeRO divide by the
# number of ranks?
#
# </details>


# %% id="choose-answer" exercise=true
def choose(budget, ranks, parameters, layers, width, batch, sequence):
    ...
    ### BEGIN SOLUTION
    activations = 64 * layers * width * batch * sequence / ranks
    needed = {
        "ddp": 16 * parameters + activations,
        "zero1": (8 + 8 / ranks) * parameters + activations,
        "zero3": 16 * parameters / ranks + activations,
        "zero3+recompute": 16 * parameters / ranks + activations / 16 + activations / layers,
    }
    return next((name for name, count in needed.items() if count <= budget), "none")
    ### END SOLUTION


# %% id="choose-draw"
budgets = [144e6, 130e6, 80e6]  # for two ranks with two windows each
choices = [choose(budget, 2, parameters, layers=8, width=256, batch=4, sequence=128) for budget in budgets]
peaks = {name.replace(" ", ""): round(row["peak_mb"]) for name, row in rows.items()}
hpclab.tables.Table(
    {
        "budget (MB)": budget / 1e6,
        "your choice": str(choice),
        f"its peak above, {BATCH} windows (MB)": peaks.get(choice, ""),
    }
    for budget, choice in zip(budgets, choices, strict=True)
)

# %% id="choose-check" points=2
hpclab.check("too-big.cheapest", choose)

# %% [markdown] id="quiz-bubble"
# ## Quiz
#
# ### Read a pipeline
#
# A step of a pipeline: three stages, four micro-batches. Which statements are true? Set `bubble_answer` to the set of their
# letters.
#
# - a: A third of the ranks' time is bubble.
# - b: With twelve micro-batches as long as these, it would be a seventh.
# - c: Rank 0 holds the activations of four micro-batches at once.
# - d: One forward, one backward (`1f1b`) would have a smaller bubble.
# - e: With more stages and as many micro-batches, the bubble's share would shrink.
# - f: The bubble's share is the same for any number of micro-batches.

# %% id="quiz-bubble-show"
from hpclab.course import quizzes

quizzes.show("too-big.quiz_bubble")

# %% id="quiz-bubble-answer" exercise=true
bubble_answer = ...
### BEGIN SOLUTION
bubble_answer = {"a", "b", "c"}
### END SOLUTION

# %% id="quiz-bubble-check" points=1
hpclab.check("too-big.quiz_bubble", bubble_answer)

# %% [markdown] id="quiz-memory"
# ### Count bytes
#
# A model of 12 billion parameters trains in mixed precision, with AdamW, on 8 GPUs; each keeps 20 GB of activations. How many GB
# does a GPU need with data parallelism, and how many with ZeRO-3? Add up everything, and leave buffers out. Set `memory_answer` to the pair.

# %% id="quiz-memory-answer" exercise=true
memory_answer = ...
### BEGIN SOLUTION
memory_answer = (212, 44)
### END SOLUTION

# %% id="quiz-memory-check" points=1
hpclab.check("too-big.quiz_memory", memory_answer)

# %% id="close"
client.close()

# %% [markdown] id="end"
# ## Summary
#
# - Training holds 16 bytes a parameter, and activations, which grow with batch and sequence. Count before you run.
# - ZeRO shards what belongs to parameters, and no activations. FSDP is data parallelism; tensor and pipeline parallelism
#   split the computation.
# - A pipeline's bubble falls with the micro-batches. `1f1b` saves memory, not time.
# - Take the simplest strategy that fits. Each further step costs messages, time, or both.
#
# ### What breaks at scale
#
# Within a node of eight GPUs a link is ten times as fast as between nodes, so tensor parallelism stays inside a node. Data parallelism
# runs out of batch: with 4,096 GPUs and 1,024 sequences something else must split them. Pipelines need many micro-batches, which the
# batch must provide. So large runs combine all three, as the planner does, and checkpoints of shards must be readable by
# another number of ranks.
#
# ### References
#
# - S. Rajbhandari and others, *ZeRO: Memory Optimizations Toward Training Trillion Parameter Models*, 2020, arXiv:1910.02054.
# - M. Shoeybi and others, *Megatron-LM: Training Multi-Billion Parameter Language Models Using Model Parallelism*, 2019, arXiv:1909.08053.
# - Y. Huang and others, *GPipe: Efficient Training of Giant Neural Networks using Pipeline Parallelism*, 2019, arXiv:1811.06965.
# - D. Narayanan and others, *Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM*, 2021, arXiv:2104.04473.
# - V. Korthikanti and others, *Reducing Activation Recomputation in Large Transformer Models*, 2022, arXiv:2205.05198.
# - Hugging Face, *The Ultra-Scale Playbook*, 2025: the recorded runs (Apache-2.0).
