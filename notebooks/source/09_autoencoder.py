# %% [markdown] id="title"
# # Autoencoder: fewer bytes
#
# **You will** train an autoencoder with four ways to send its gradients, over two emulated links, and compare them by the
# bytes and by the seconds that they need to the same loss. Then you write the compression that sends 1 % of the
# numbers and loses none.
#
# | | |
# |---|---|
# | objectives | count the bytes of compressed gradients; say on which link they help, and when fewer bytes take longer; write top-k with error feedback |
# | prerequisites | the notebooks *start*, *ddp-from-scratch* and *cnn* |
# | minutes | 35 to read and do, 15 of them for the exercise; under 2 to run |
# | needs | 2 CPUs, 1.5 GB of memory, 2 ranks, no network |
#
# New terms are defined in the [glossary](glossary.md#compressed-gradient), in English and in Chinese.

# %% id="parameters" tags=["parameters"]
import hpclab

SIZE = hpclab.size()  # how much to do: "small", "class" or "cluster", as the variable HPCLAB_SIZE says

# %% id="imports"
import functools
import statistics

import numpy as np
import torch

from hpclab import live
from hpclab.course import links
from hpclab.course.plots import pictures, progress
from hpclab.training.strategies.kinds import named
from hpclab.training.strategies.wire import Sizes, wire

STEPS = {"small": 25, "class": 200, "cluster": 2000}[SIZE]
WAYS = ("ddp", "bf16", "powersgd", "topk")

# %% [markdown] id="model"
# ## An autoencoder
#
# Its *encoder* squeezes a picture of 784 pixels through a *code* of 16 numbers, and its *decoder* rebuilds the picture from
# them. No labels are needed: the loss is the mean squared error of the pixels. What it rebuilds badly is often unlike what
# it has seen, so autoencoders are used to find anomalies. Here we are interested in its 65,025 weights, whose gradients must be
# averaged in each step.
#
# There are four ways to send them:
#
# - **ddp**: all of them, 4 bytes each, in a ring;
# - **bf16**: all, in 2 bytes each;
# - **powersgd**: each matrix as the product of two thin ones. That takes three exchanges, one after the other: biases, then each thin one;
# - **topk**: of each rank the 1 % that are furthest from 0 (gradient and what was left before), with their places. Ranks choose different places, so nothing
#   can be added up on the way: each rank sends its part to all others.
#
# The last two remember what they didn't send, and add it to the next gradient (*error feedback*).
#
# **Predict**: topk sends 1 % of the numbers. How many times fewer bytes than ddp does a rank send, of two?

# %% id="bytes-predict"
hpclab.predict("autoencoder.bytes", ..., "times fewer bytes")

# %% id="bytes-do"
sizes = Sizes.of(hpclab.models.Autoencoder())
step_bytes = {way: wire(named(way), 2, sizes)["gloo"] for way in WAYS}
hpclab.tables.Table({"strategy": way, "kB a rank and step": round(step_bytes[way] / 1e3, 1)} for way in WAYS)

# %% id="bytes-came"
hpclab.came("autoencoder.bytes", step_bytes["ddp"] / step_bytes["topk"])

# %% [markdown] id="links"
# **Explain.** A number alone is no use: its place takes 4 bytes more.
#
# ## Two links
#
# Now send them over two links, which are *emulated*: the ranks, their training and their compressing are real, and every
# average is held back until the link would have delivered it. The **narrow** link has 5 ms of latency, and 25 Mb/s,
# as at home. The **far** one leads to a data centre in another country: 20 ms, but 1 Gb/s.
#
# **Predict**: on the far link, how many times as long as ddp's is a step of powersgd, which sends a twelfth of the bytes?

# %% id="far-predict"
hpclab.predict("autoencoder.far", ..., "times as long")

# %% [markdown] id="narrow"
# **Predict**: on the narrow link, which of the four is the first to reach the same loss?

# %% id="narrow-predict"
hpclab.predict("autoencoder.narrow", ..., among=("ddp", "bf16", "powersgd", "topk"))

# %% id="connect"
client = hpclab.connect(workers=max(2, hpclab.machine.fits()))
LINKS = {"narrow": hpclab.Network(5e-3, 25e6), "far": hpclab.Network(20e-3, 1e9)}


def train(way, **settings):
    return hpclab.train(
        client,
        hpclab.models.Autoencoder,
        "fashion_mnist",
        ranks=2,
        strategy=way,
        optimizer=functools.partial(torch.optim.Adam, lr=2e-3),
        oversubscribe=True,
        progress=False,
        **settings,
    ).result()


# %% id="links-do"
cases = live.tracked([(way, link) for link in LINKS for way in WAYS], "links", "run")
fits = {(way, link): train(way, steps=STEPS, network=LINKS[link]) for way, link in cases}
first = {"powersgd": [step_bytes["ddp"]] * 2}  # it begins with two steps of ddp, the fewest that torch allows
runs = {
    (way, link): links.progress(fit.rows, way, link, step_bytes[way], first.get(way, []))
    for (way, link), fit in fits.items()
}
progress([*runs.values()])

# %% id="reached-do"
loss = links.common_loss([*runs.values()])
first = {run: links.reached(rows, loss) for run, rows in runs.items()}
print(f"to a loss of {loss:.4f}:")
hpclab.tables.Table(
    {"strategy": way, "steps": first[way, "narrow"]["step"], "MB": round(first[way, "narrow"]["sent_mb"], 2)}
    | {f"seconds, {link}": round(first[way, link]["seconds"], 2) for link in LINKS}
    for way in WAYS
)

# %% id="far-came"
step_s = {way: statistics.median(np.diff([row["seconds"] for row in runs[way, "far"]])) for way in WAYS}
hpclab.came("autoencoder.far", step_s["powersgd"] / step_s["ddp"])

# %% id="narrow-came"
hpclab.came("autoencoder.narrow", min(WAYS, key=lambda way: first[way, "narrow"]["seconds"]))

# %% [markdown] id="links-explain"
# **Explain.** The left panel has bytes: there, whatever compresses most is far ahead. But you wait in seconds. A step takes
#
# $$\text{computing} + \text{compressing} + \text{messages} \times \alpha + \text{bytes} \times \beta.$$
#
# - On the narrow link ddp's bytes are most of a step: its 260 kB take 83 ms, topk's 5 kB less than 2.
# - On the far link ddp's bytes take 2 ms, and its two latencies 40. Fewer bytes can save only the 2. powersgd pays three
#   exchanges of two latencies each, 120 ms: *fewer bytes, later*. bf16 gains a millisecond, topk one latency, as it only
#   gathers.
# - Then comes the price in *steps*: what isn't sent now arrives later, or coarser. Compare the steps in the table: a way
#   that is sooner by the step may be later by the loss.
#
# Which loss matters too. With few steps a method that sends little is still filling its residual. Set `STEPS` higher to see
# more.
#
# ## Exercise: top-k with error feedback
#
# Write `top_k(gradient, residual, k)` for one rank. Both tensors have shape (n,); the residual is what earlier steps didn't
# send. Return the `k` values to send, their `k` places, and the new residual, such that
#
# - of gradient and residual together, the `k` numbers furthest from 0 are sent;
# - sent + new residual = gradient + old residual, in each place: nothing is lost, nothing is sent twice.
#
# <details><summary>Hint</summary>
#
# Add first, then choose. `tensor.topk(k)` finds the largest *numbers*; -5 is further from 0 than 3. The residual is what is
# left when the chosen places are set to 0.
#
# </details>


# %% id="top-k-answer" exercise=true
def top_k(gradient, residual, k):
    ...
    ### BEGIN SOLUTION
    total = gradient + residual
    places = total.abs().topk(k).indices
    values = total[places]
    total[places] = 0
    return values, places, total
    ### END SOLUTION


# %% id="top-k-check" points=2
hpclab.check("autoencoder.top_k", top_k)

# %% [markdown] id="arrive"
# ## What arrives
#
# Let one process train, and hand each of its gradients to your function, twice: once with the residual, and once with zeros in
# its place, as if nothing were remembered. **Predict**: of the sum of all gradients (by its length, as a vector), which
# part has *not* been sent in the end if nothing is remembered, in percent?

# %% id="arrive-predict"
hpclab.predict("autoencoder.forgotten", ..., "percent")

# %% id="arrive-do"
images, model = hpclab.data.load("fashion_mnist"), hpclab.models.Autoencoder()
weights, optimizer = [*model.parameters()], torch.optim.Adam(model.parameters(), lr=2e-3)
summed = torch.zeros(sizes.weights)
sent, residual = {"remembered": summed.clone(), "forgotten": summed.clone()}, summed.clone()
for order in torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[: 64 * STEPS].split(64):
    batch = torch.from_numpy(images[order.numpy()][0])
    optimizer.zero_grad()
    (model(batch) - batch).square().mean().backward()
    optimizer.step()
    gradient = torch.cat([weight.grad.flatten() for weight in weights])
    summed += gradient
    for name, rest in {"remembered": residual, "forgotten": torch.zeros_like(residual)}.items():
        values, places, rest = top_k(gradient, rest, sizes.weights // 100) or ((), (), rest)
        sent[name][list(places)] += torch.as_tensor(values)
        residual = rest if name == "remembered" else residual

# %% id="arrive-show-do"
missing = {name: float((summed - arrived).norm() / summed.norm()) for name, arrived in sent.items()}
hpclab.tables.Table({"residual": name, "not sent so far": f"{share:.0%}"} for name, share in missing.items())

# %% id="arrive-came"
hpclab.came("autoencoder.forgotten", 100 * missing["forgotten"] if sent["forgotten"].any() else None)

# %% [markdown] id="arrive-explain"
# **Explain.** With error feedback, what is missing is exactly the residual: it waits, and a place that is small in every
# step, but always of the same sign, grows there until its turn comes. Without, such a place is *never* sent. A few places
# with large gradients make up most of the sum, which is why the share isn't larger; but what is missing is missing for
# good.
#
# ## What it rebuilds
#
# An epoch by ddp on the machine's own network, and pictures that it hasn't seen; below each, what it makes of it.

# %% id="rebuild-do"
fit = train("ddp", epochs=1)
model.load_state_dict(fit.weights)
batch, _labels = hpclab.data.load("fashion_mnist", "test")[list(range(8))]
with torch.no_grad():
    rebuilt = model.eval()(torch.from_numpy(batch)).numpy()
pictures(np.concatenate([batch, rebuilt.clip(0, 1)], axis=2), [""] * 8)

# %% [markdown] id="quiz-links"
# ## Quiz
#
# ### Near and far
#
# Four strategies on another model, and the steps that each takes to the same loss. Computing takes 20 ms a step; compressing
# takes no time, and nothing overlaps. Link *near* has 1 ms of latency and 100 Mb/s, link *far* 10 ms and 10 Gb/s. Which
# statements are true? Set `links_answer` to the set of their letters.
#
# - a: On *near*, low rank reaches the loss more than ten times as soon as ddp.
# - b: On *far*, low rank reaches it sooner than ddp.
# - c: On *far*, bf16 is the first to reach it.
# - d: The strategy that sends the fewest bytes until then is the first on at least one of the links.
# - e: On *far*, computing twice as fast saves more than halving the bytes, whatever the strategy.

# %% id="quiz-links-show"
from hpclab.course import quizzes

quizzes.show("autoencoder.quiz_links")

# %% id="quiz-links-answer" exercise=true
links_answer = ...
### BEGIN SOLUTION
links_answer = {"a", "c", "e"}
### END SOLUTION

# %% id="quiz-links-check" points=1
hpclab.check("autoencoder.quiz_links", links_answer)

# %% [markdown] id="quiz-bytes"
# ### More ranks
#
# A model has 10 million weights of 4 bytes. How many MB (10^6 bytes) does a rank send in a step: by ddp, in a ring of 4
# ranks; by top-k, 1 % of the numbers with places of 4 bytes, among 4 ranks; and by top-k among 64 ranks? Each rank
# sends its part to every other rank. Set `bytes_answer` to the three numbers.

# %% id="quiz-bytes-answer" exercise=true
bytes_answer = ...
### BEGIN SOLUTION
bytes_answer = (60, 2.4, 50.4)
### END SOLUTION

# %% id="quiz-bytes-check" points=1
hpclab.check("autoencoder.quiz_bytes", bytes_answer)

# %% [markdown] id="close"
# ## Close

# %% id="close-do"
client.close()

# %% [markdown] id="end"
# ## Summary
#
# - Bytes are a means. Compare strategies by the seconds to a loss, on the link that you have.
# - Compressing helps where bytes take most of a step. Where latency or computing does, it can cost more than it saves.
# - Error feedback loses nothing: sent + new residual = gradient + old residual.
#
# ### What breaks at scale
#
# Top-k can't be summed on its way: among many ranks each receives everyone's part, and its bytes grow with their number,
# while a ring's stay below twice the gradients. Inside a data centre, with 100 Gb/s and more, and with gradients sent while
# the backward pass goes on, few compressors beat plain sums in 16 bits. Between data centres and over the internet, sending
# *less often* (DiLoCo) saves latencies as well.
#
# ### References
#
# - S. Stich, J. Cordonnier, M. Jaggi, *Sparsified SGD with Memory*, 2018, arXiv:1809.07599 (top-k with error feedback).
# - T. Vogels, S. Karimireddy, M. Jaggi, *PowerSGD*, 2019, arXiv:1905.13727.
# - S. Agarwal and others, *On the Utility of Gradient Compression in Distributed Training Systems*, 2022, arXiv:2103.00543
#   (where it pays, measured).
# - G. Hinton, R. Salakhutdinov, *Reducing the Dimensionality of Data with Neural Networks*, Science 313, 2006.
