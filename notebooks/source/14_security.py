# %% [markdown] id="title"
# # Security: who else can run code here?
#
# **You will** let a stranger run code on your worker, and then shut it out; measure what encryption costs; load a file that
# runs its sender's code; find a secret where others see it; and add up gradients that nobody but their owners have seen.
#
# | | |
# |---|---|
# | objectives | say who can reach a Dask cluster, and what stops them; measure what TLS costs; load only what can't run; keep a secret out of scripts, command lines and logs; mask gradients so that only their sum shows |
# | prerequisites | the notebooks *start* and *ddp-from-scratch* |
# | minutes | 40 to read and do, 20 of them for the exercises; under 2 to run |
# | needs | 1 CPU, 1.5 GB of memory, 4 ranks that take turns, no network; for the modes of files Linux |
#
# Words that are new to you stand in the [glossary](glossary.md#handshake), in English and in Chinese.

# %% id="parameters" tags=["parameters"]
import hpclab

SIZE = hpclab.size()  # "small", "class" or "cluster"

# %% id="imports"
import io
import os
import pickle
import tempfile
from pathlib import Path

import numpy as np
import torch
from distributed import Security

from hpclab import plots, security, tables
from hpclab.course.plots import spread

ROUNDS, TASKS, RANKS = {"small": (4, 100, 4), "class": (15, 200, 4), "cluster": (20, 1000, 8)}[SIZE]
os.environ["STORE_TOKEN"] = "tok-not-a-real-one"  # of a data store, say; what we start inherits it

# %% [markdown] id="loopback"
# ## Loopback is not private
#
# The cluster below listens on 127.0.0.1 only, so nobody gets there from another machine. But a login node has hundreds of
# users, and to the kernel a connection is a connection, whoever makes it: a file has an owner and a mode, a port has
# neither.
#
# The *stranger* is a second program. It is told the address and nothing else: no password, no file, nothing of our
# environment.
#
# **Predict**: the cluster is started with `security=False`. What will the stranger do: nothing, list our workers, or run code
# on them?

# %% id="loopback-predict"
hpclab.predict("security.stranger", ..., among=("nothing", "list workers", "run code"))

# %% id="loopback-do"
plain = hpclab.connect(workers=1, security=False)
found = security.stranger(plain.scheduler.address, "STORE_TOKEN")
print(f"our worker is process {[*plain.run(os.getpid).values()]}; the stranger {found}")

# %% id="loopback-came"
hpclab.came("security.stranger", "run code" if found.startswith("ran code") else "nothing")

# %% [markdown] id="loopback-explain"
# **Explain.** The stranger ran a function of its own in *our* worker, as *our* user, with all that we may do: read our
# files, submit our jobs, use our token. That is no hole in Dask. To run what a client sends is what a scheduler is *for*:
# remote code execution, by design. So the only fence is the door: **who is let in**. (The stranger here has our user id,
# but nothing asked for it. One of this package's tests does the same as another user.)
#
# ## The door
#
# By default `hpclab.connect` makes a fresh certificate for each cluster. Scheduler, workers and client have it in memory,
# with its private key, and each proves to the other that it does.
#
# **Predict**: four come to the door. One speaks no TLS; one speaks TLS, and has no certificate; one has made its own, as
# good as ours; the last has ours. How many are let in?

# %% id="door-predict"
hpclab.predict("security.door", ..., "of four")

# %% id="door-do"
client = hpclab.connect(workers=1)
(knocked := security.knock(client))

# %% id="door-came"
hpclab.came("security.door", sum(not row["what it gets"].startswith("refused") for row in knocked))

# %% [markdown] id="handshake"
# What stands there in red is the log of our scheduler, about those that it refused: look for such lines in yours.
#
# All this happens in a *handshake*, before the first byte of Dask's own. In ours, this was agreed:

# %% id="handshake-do"
security.handshake(client)

# %% [markdown] id="cost"
# ## What it costs
#
# **Predict**: with TLS, how many times as long do 32 MiB take? (And hundreds of tiny tasks? How many more bytes are sent? How
# much later is the cluster up?)
#
# Machines drift, so plain and TLS take turns; each round gives one ratio, and all of them an interval.

# %% id="cost-predict"
hpclab.predict("security.cost", ..., "times as long")

# %% id="cost-do"
cost = security.cost(plain, client, ROUNDS, TASKS)
plots.ratios(cost, "TLS over plain")
tables.Table(cost)

# %% id="cost-came"
hpclab.came("security.cost", cost[1]["ratio"])

# %% [markdown] id="cost-explain"
# **Explain.** A tiny task is a few messages of some hundred bytes, and nearly all of its time goes into Python, on
# either side: next to that a cipher is quick. A large array is little Python and many bytes, and each of them goes through
# the cipher. On the wire next to nothing is added, some 20 bytes for a record of up to 16 kB. And the start has one more
# thing to do, a key and its certificate. Where an interval holds 1, these rounds show no difference. (When this was
# written, on two shared cores, intervals lay between 0.93 and 1.06 for tiny tasks, and between 1.1 and 1.6 for 32 MiB.)
#
# And gradients? They don't go this way at all: ranks send them to each other by gloo, which doesn't encrypt (see the table
# at the end).
#
# ## What a file can do
#
# A pickle is a program, and to load it is to run it: `__reduce__` says which function to call, with what. The one below
# only prints.
#
# **Predict**: how many of these four run the sender's code?

# %% id="pickle-predict"
hpclab.predict("security.pickle", ..., "of four")


# %% id="pickle-do"
class Gift:
    def __reduce__(self):
        return exec, ("import os; print('  the sender runs code here, in process', os.getpid())",)


# %% id="read-do"
checkpoint, refused = io.BytesIO(), 0
torch.save({"weights": torch.ones(3), "extra": Gift()}, checkpoint)
for name, read in {
    "pickle.loads": lambda: pickle.loads(pickle.dumps(Gift())),
    "torch.load(weights_only=False)": lambda: torch.load(checkpoint, weights_only=False),
    "torch.load(weights_only=True)": lambda: torch.load(checkpoint, weights_only=True),
    "a row of hpclab's": lambda: hpclab.rows.line({"loss": 0.1, "extra": Gift()}),
}.items():
    checkpoint.seek(0)
    print(name)
    try:
        read()
    except (pickle.UnpicklingError, TypeError) as error:
        refused += 1
        print(f"  refused, {type(error).__name__}: {str(error).split('. ')[0]}")

# %% id="pickle-came"
hpclab.came("security.pickle", 4 - refused)

# %% [markdown] id="pickle-explain"
# **Explain.** `weights_only=True` builds tensors, numbers, strings, and dicts and lists of them, and refuses any other
# name. JSON has no such names at all. So in hpclab:
#
# - a checkpoint is read with `weights_only=True`, and what couldn't be read so is refused when it is *written*;
# - what a rank reports goes to its worker as JSON; your function, and what it returns, pass through the worker's code as bytes.
#   Only the rank unpickles the function, which is yours, and only your notebook the value, which is your rank's.
#
# Dask's own messages are msgpack, a format like JSON, but they *carry* pickles: your functions, their arguments and their
# results. Whoever may send a scheduler a task may run code. That is why its door must be shut before the first message.
#
# ## Where secrets leak
#
# The stranger is out. But secrets also walk out by themselves. Two programs get the same token: one on its command line,
# the other in a file.
#
# **Predict**: of six places, the command lines and environments of both and two files, in how many can another user of this
# machine read it?

# %% id="leaks-predict"
hpclab.predict("security.leaks", ..., "of six places")

# %% id="leaks-do"
token, folder = os.environ["STORE_TOKEN"], tempfile.TemporaryDirectory()
usual, private = Path(folder.name, "usual"), Path(folder.name, "private")
usual.write_text(token)
with open(os.open(private, os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:
    file.write(token)
with security.program("--token", token) as told, security.program("--token-file", str(private), bare=True) as kept:
    print("ps shows everybody:", *security.seen_by_ps(token), sep="\n")
    files = {"a file, by write_text": usual, "a file, made with mode 0600": private}
    places = security.exposure(token, {"--token": told, "--token-file": kept}, files)
folder.cleanup()
places

# %% id="leaks-came"
hpclab.came("security.leaks", sum(row["others read it"] == row["secret in it"] == "yes" for row in places))

# %% [markdown] id="leaks-explain"
# **Explain.** A command line is public: on Linux `/proc/PID/cmdline` has the mode `r--r--r--` for as long as the program
# runs (unless the administrator mounts /proc with `hidepid`). The environment is for the same user only; but all that we
# start inherits it, and it is where the stranger found our token. A file is as private as its mode, and that from the first
# byte: between `write_text` and a later `chmod` there is a moment in which others may open it, and what is open stays open.
#
# Look through these too before you share them: **a notebook's outputs**, which are saved with it, **logs**, **job
# scripts**, which queues keep, **git's history**. And few know this one: a Jupyter kernel talks to its notebook over ports of
# loopback, in the clear, and whoever connects to one of them reads all cells and outputs. (To send cells takes a key.)
# `hpclab lab --KernelManager.transport=ipc` takes sockets in a private folder instead.
#
# ## Exercise: harden
#
# A colleague's training:
#
# ```python
# def certificates(folder):
#     return False  # it's only loopback
#
#
# def job(token, folder):
#     return f"#!/bin/bash\n#SBATCH --job-name=train\ntrain --token {token}\n"
# ```
#
# Write both anew. `certificates(folder)` returns what the scheduler, workers and clients of a cluster get, a
# `distributed.Security`: anyone without the same one is refused, and each cluster has its own. Its workers are jobs on other
# nodes, so what they need is in *files* of the folder, private keys too. `job(token, folder)` returns the text of a job
# script. It may write files to its folder, too. Others can enter both folders. `train` takes its token by `--token TOKEN`, by
# `--token-file FILE`, or from the environment, by the name `TRAIN_TOKEN`.
#
# The check starts a scheduler and a worker, sends strangers to their ports, reads your script and your files as others could,
# and runs the script.
#
# <details><summary>Hint</summary>
#
# A stranger at the door had made a certificate of its own. `help(Security)` tells how one is made; it holds texts, and the
# constructor takes names of files as well. What else must you tell it, so that it insists? The two programs above show how a
# file is private from its first byte.
#
# </details>


# %% id="harden-answer" exercise=true
def certificates(folder):
    ...
    ### BEGIN SOLUTION
    made = Security.temporary()
    kinds = [f"tls_{role}_{kind}" for role in ("client", "scheduler", "worker") for kind in ("key", "cert")]
    files = {name: private_file(folder, name, getattr(made, name)) for name in ("tls_ca_file", *kinds)}
    return Security(require_encryption=True, **files)
    ### END SOLUTION


def job(token, folder):
    ...
    ### BEGIN SOLUTION
    return f"#!/bin/bash\n#SBATCH --job-name=train\ntrain --token-file {private_file(folder, 'token', token)}\n"


def private_file(folder, name, text):
    path = Path(folder, name)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:
        file.write(text)
    return str(path)
    ### END SOLUTION


# %% id="harden-check" points=2
hpclab.check("security.harden", (certificates, job))

# %% [markdown] id="aggregation"
# ## A sum of secrets
#
# Encryption keeps strangers out. But say that some hospitals train one model, and none of them trusts the *server* which
# adds up their gradients: from a gradient one can often rebuild the images that it was computed from (Zhu and others,
# 2019).
#
# **Secure aggregation** (Bonawitz and others, 2017): each pair of ranks agrees on random numbers, a *mask*. One of the two
# adds it to its gradient, the other takes it away. What each sends looks like dice; in the sum all masks cancel.
#
# First, each pair needs a secret, over a wire on which others listen. Each rank draws a private key, and shows everybody
# the public one; from its own private and the other's public key each of a pair computes the same secret (X25519).

# %% id="gang-do"
gang = hpclab.gang(client, ranks=RANKS, oversubscribe=True)

# %% id="agree-do"
# %%ranks
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

key = X25519PrivateKey.generate()
public = torch.tensor(list(key.public_key().public_bytes_raw()), dtype=torch.uint8)
publics = [torch.empty_like(public) for other in range(ranks)]
dist.all_gather(publics, public)
keys = [X25519PublicKey.from_public_bytes(bytes(other.tolist())) for other in publics]
secrets = {other: key.exchange(keys[other]) for other in range(ranks) if other != rank}
seeds = {other: HKDF(SHA256(), 32, None, b"masks").derive(secret) for other, secret in secrets.items()}
{other: HKDF(SHA256(), 3, None, b"fingerprint").derive(secret).hex() for other, secret in secrets.items()}

# %% [markdown] id="prg"
# Each rank shows a fingerprint of what it shares with each other one (never the seed itself: outputs are saved). What rank
# 0 has for 1, rank 1 has for 0.
#
# A seed has 32 bytes, and a mask takes millions. numpy's generators won't do: from some of their numbers the next can be
# computed. `security.prg(seed, step, count)` takes the stream of a cipher, ChaCha20: the same on both sides, another in
# each step. (A mask used twice hides nothing: the difference of two shares would be that of the gradients.)
#
# ## Exercise: the masks
#
# Gradients are turned into whole numbers first, in units of $2^{-32}$, as `uint64`. Those wrap around at $2^{64}$ and lose
# nothing: `numbers + mask - mask` is `numbers`, always.
#
# Write `mask(numbers, rank, seeds, step, prg)`, which returns what this rank sends, an array of `uint64` as long. `seeds` is
# a dict with a seed for each other rank. The sum over all ranks shall be exact; a share shall tell nobody a thing, not even
# another rank, which knows its own mask; and each step shall have new masks.
#
# <details><summary>Hint</summary>
#
# Of each pair one adds, the other takes away. What do both know that tells them apart?
#
# </details>


# %% id="masks-answer" exercise=true
def mask(numbers, rank, seeds, step, prg):
    ...
    ### BEGIN SOLUTION
    for other, seed in seeds.items():
        drawn = prg(seed, step, len(numbers))
        numbers = numbers + drawn if rank < other else numbers - drawn
    return numbers
    ### END SOLUTION


# %% id="masks-check" points=2
hpclab.check("security.masks", mask)

# %% [markdown] id="sum"
# Now in earnest: each rank has the gradient of a CNN on images of its own, masks it, and sends its share to rank 0, the
# server. (Until yours is written, nothing is masked.)

# %% id="sum-push"
gang.push(mask=mask, prg=security.prg, np=np, hpclab=hpclab)

# %% id="sum-do"
# %%ranks
torch.manual_seed(0)
model = hpclab.models.CNN()
x, y = map(torch.from_numpy, hpclab.data.load("fashion_mnist", "train")[list(range(rank, 256, ranks))])
torch.nn.functional.cross_entropy(model(x), y).backward()
gradient = torch.cat([weight.grad.flatten() for weight in model.parameters()]).double()
numbers = (gradient * 2**32).round().long().numpy().view(np.uint64)
share = numbers if (masked := mask(numbers, rank, seeds, 0, prg)) is None else masked
shares = [torch.empty(len(share), dtype=torch.long) for other in range(ranks)]
dist.gather(torch.from_numpy(share.view(np.int64)), shares if rank == 0 else None)
dist.all_reduce(plain := torch.from_numpy(numbers.astype(np.int64)))  # to compare; in earnest nobody would
dist.all_reduce(gradient)
if rank == 0:
    total = sum(one.numpy().view(np.uint64) for one in shares).view(np.int64)  # modulo 2**64
    print("equal to the plain sums, to the last bit:", (total == plain.numpy()).all())
    print(f"equal to the sums of floats within {np.abs(total / 2**32 - gradient.numpy()).max():.0e}, by rounding")

# %% [markdown] id="look"
# **Predict**: how does the histogram of one rank's share look? (And why not simply add float masks to float gradients?)

# %% id="look-predict"
hpclab.predict("security.share", ..., among=("a peak", "a bell", "flat"))

# %% id="look-do"
numbers, share = gang.pull("numbers, share", on=1)[0]
counts = spread({"gradient of rank 1": numbers, "what rank 1 sends": share})

# %% id="look-came"
hpclab.came("security.share", "flat" if counts[1].max() < 2 * counts[1].min() else None)

# %% id="floats-do"
gradients = np.array(gang.pull("numbers.view(np.int64) / 2**32"), dtype=np.float32)  # (ranks, weights)
sent = {"whole numbers": (share.view(np.int64), 0.0)}
sent |= {f"floats, about {size:g}": security.float_masks(gradients, size) for size in (1e-2, 1, 1e2, 1e4)}
tables.Table(
    {"masks": masks, "share like gradient": np.corrcoef(one, gradients[1])[0, 1], "sum wrong by": wrong}
    for masks, (one, wrong) in sent.items()
)

# %% [markdown] id="look-explain"
# **Explain.** In units of $2^{64}$ every gradient lies next to 0, or next to 1, where those below 0 wrap around. The share
# lies everywhere alike. (In the table: *like* is the correlation, *wrong* the length of the error over that of the sum.) With true dice that
# would be exact: add to a number one that may be *any* with equal chance, and the result may be any, with equal chance. A
# cipher's stream can't be told from dice in any time that we have.
#
# Floats can't do that. Small masks hide little, and large ones eat the gradient's last digits, which don't come back when the
# masks cancel: $(g + m) - m \ne g$. Whole numbers cost no more than the rounding before.
#
# ### What it doesn't do
#
# - **Drop-outs**: a rank that is gone leaves masks which nobody cancels. Bonawitz and others hand out parts of each seed
#   beforehand, so that enough of those left can put it together.
# - **Collusion**: if all others put together what they know, what is left is your gradient. (No masking helps: they
#   could also subtract their own gradients from the sum.)
# - **A rank that lies**: the server can't see that a gradient is absurd, as it sees none.
# - **Somebody in between**, who hands each a public key of his own. Ours came by gloo, which doesn't say who sent them; in
#   earnest each is signed by one whom all know.
# - **The sum itself** tells something. Noise in it (*differential privacy*) helps, and costs accuracy.
#
# ## What is protected from whom
#
# | from | scheduler and workers | where ranks meet | gradients on their way | dashboard |
# |---|---|---|---|---|
# | another user of this host | TLS, certificates | a file in a folder of mode 0700 | **gloo on loopback: not encrypted, asks for no name** | **can be read** |
# | other machines, ranks on one host | listen on loopback only | a file | listen on loopback only | loopback only |
# | other machines, ranks on several | TLS, certificates | over Dask's TLS | **gloo: not encrypted, asks for no name** | loopback only |
# | your own user id, and root | **not at all** | **not at all** | **not at all** | **not at all** |
#
# Gloo trusts its network, as do NCCL and most MPI. Sites handle that *below* it: a private interconnect that only compute
# nodes are on, nodes that belong to one job at a time, or an encrypted network laid over the open one (WireGuard, IPsec),
# which costs some of its speed. `docs/security.md` in hpclab's repository has all of this, with the test for each claim.

# %% [markdown] id="quiz-modes"
# ## Quiz
#
# ### What can a stranger read?
#
# Another ordinary user of the host, in none of your groups, knows all of these names. Which files can they read? Every folder above
# these can be entered by everybody. Set `modes_answer` to the set of the letters.

# %% id="quiz-modes-show"
from hpclab.course import quizzes

quizzes.show("security.quiz_modes")

# %% id="quiz-modes-answer" exercise=true
modes_answer = ...
### BEGIN SOLUTION
modes_answer = {"a", "d"}
### END SOLUTION

# %% id="quiz-modes-check" points=1
hpclab.check("security.quiz_modes", modes_answer)

# %% [markdown] id="quiz-mask"
# ### What does the server learn?
#
# Three ranks have whole numbers from 0 to 99, and mask them so that all masks cancel modulo 100. Each mask may be any number from 0
# to 99 with equal chance. The server sees the shares 37, 85 and 12. What is the sum of the ranks' numbers modulo 100? And from
# the share 37 alone, how many numbers are still possible for rank 0? Set `mask_answer` to the pair.

# %% id="quiz-mask-answer" exercise=true
mask_answer = ...
### BEGIN SOLUTION
mask_answer = (34, 100)
### END SOLUTION

# %% id="quiz-mask-check" points=1
hpclab.check("security.quiz_mask", mask_answer)

# %% [markdown] id="close"
# ## Close

# %% id="close-do"
for each in (gang, client, plain):
    each.close()

# %% [markdown] id="end"
# ## Summary
#
# - A port has no owner and no mode: on a shared host loopback is public. What runs its clients' code must ask who they are.
# - Encryption costs where bytes are many, and else hardly; how much is measured in turn, with an interval.
# - Who loads a pickle runs it. Tensors come by `weights_only=True`, rows by JSON.
# - A secret belongs in a file of mode 0600, from its first byte; scripts and command lines hold the file's *name*.
# - Masks that cancel hide each gradient from those who add them up; modulo $2^{64}$ the sum is exact.
#
# ### What breaks at scale
#
# Each of a thousand ranks would draw 999 masks in every step, and some rank always drops out: real systems mask with few
# neighbours, in a sparse graph, and recover seeds. And the more people share a network, the less it is a private one.
#
# ### References
#
# - E. Rescorla, *The Transport Layer Security (TLS) Protocol Version 1.3*, RFC 8446, 2018.
# - K. Bonawitz and others, *Practical Secure Aggregation for Privacy-Preserving Machine Learning*, CCS 2017.
# - L. Zhu, Z. Liu, S. Han, *Deep Leakage from Gradients*, NeurIPS 2019, arXiv:1906.08935.
# - A. Langley, M. Hamburg, S. Turner, *Elliptic Curves for Security*, RFC 7748, 2016 (X25519).
# - Y. Nir, A. Langley, *ChaCha20 and Poly1305 for IETF Protocols*, RFC 8439, 2018.
# - CVE-2025-32434: before torch 2.6 a file could run code in spite of `weights_only=True`.
