# %% [markdown] id="title"
# # Security: who else can run code here?
#
# **You will** let a stranger run code on your worker, then shut it out; measure what encryption costs; load a file that
# runs its sender's code; find a secret where others can see it; and add up gradients that only their owners have seen.
#
# | | |
# |---|---|
# | objectives | say who can reach a Dask cluster, and what stops them; measure what TLS costs; load only what can't run; keep a secret out of scripts, command lines and logs; mask gradients so that only their sum shows |
# | prerequisites | the notebooks *start* and *ddp-from-scratch* |
# | minutes | 40 to read and do, 20 of them for the exercises; under 2 to run |
# | needs | 1 CPU, 1.5 GB of memory, 4 ranks that take turns, no network; Linux, to see file modes |
#
# New terms are defined in the [glossary](glossary.md#handshake), in English and in Chinese.

# %% id="parameters" tags=["parameters"]
import hpclab

SIZE = hpclab.size()  # how much to do: "small", "class" or "cluster", as the variable HPCLAB_SIZE says

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
os.environ["STORE_TOKEN"] = "tok-not-a-real-one"  # for a data store, say; what we start inherits it by default

# %% [markdown] id="loopback"
# ## Loopback is not private
#
# The cluster below listens on 127.0.0.1 only, so no other machine can reach it. But a login node has hundreds of users,
# and the kernel accepts a connection from any of them: a file's owner and mode are checked, but nobody checks who connects
# to a port.
#
# The *stranger* is a second program. It gets the address and a variable's name: no password, no file, nothing of
# our environment but `PATH`.
#
# **Predict**: the cluster is started with `security=False`. What will the stranger do: nothing, list our workers, or
# run code on them?

# %% id="loopback-predict"
hpclab.predict("security.stranger", ..., among=("nothing", "list workers", "run code"))

# %% id="loopback-do"
plain = hpclab.connect(workers=1, security=False)
found = security.stranger(plain.scheduler.address, "STORE_TOKEN")
[worker] = plain.run(os.getpid).values()
print(f"our worker is process {worker}; the stranger {found}")

# %% id="loopback-came"
hpclab.came("security.stranger", "run code" if found.startswith("ran code") else "nothing")

# %% [markdown] id="loopback-explain"
# **Explain.** The stranger ran its own function in *our* worker, as *our* user, with all our rights: to read our files,
# submit our jobs, use our token. That is no bug in Dask. Running what a client sends is what a scheduler is *for*:
# remote code execution, by design. So the door is the only defence: **who is let in**. (The stranger here has our user
# id, but nothing checked that. One of hpclab's tests does the same as another user.)
#
# ## The door
#
# By default `hpclab.connect` makes a fresh certificate and private key for each cluster. Scheduler, workers and client
# hold both in memory, and each proves to the other that it has the key.
#
# **Predict**: four come to the door. One speaks no TLS; one speaks TLS without a certificate; one has made its own, as
# good as ours; the last has ours. How many get in?

# %% id="door-predict"
hpclab.predict("security.door", ..., "of four")

# %% id="door-do"
client = hpclab.connect(workers=1)
(knocked := security.knock(client))

# %% id="door-came"
hpclab.came("security.door", sum(not row["what it gets"].startswith("refused") for row in knocked))

# %% [markdown] id="handshake"
# The red text is our scheduler's log of those it refused: look for such lines in your own logs.
#
# All this happens in a *handshake*, before the first byte of Dask's own. Ours agreed on this:

# %% id="handshake-do"
security.handshake(client)

# %% [markdown] id="cost"
# ## What it costs
#
# **Predict**: with TLS, how many times as long do 32 MiB take from a worker to us, by way of the scheduler? (And hundreds of tiny tasks? How many more bytes are
# sent? How much longer does the cluster take to start?)
#
# A machine's speed drifts, so plain and TLS take turns; each round gives one ratio, and all rounds give an interval.

# %% id="cost-predict"
hpclab.predict("security.cost", ..., "times as long")

# %% id="cost-do"
cost = security.cost(plain, client, ROUNDS, TASKS)
plots.ratios(cost, "TLS over plain")
tables.Table(cost)

# %% id="cost-came"
hpclab.came("security.cost", cost[1]["ratio"])

# %% [markdown] id="cost-explain"
# **Explain.** A tiny task is a few messages of some hundred bytes, and nearly all of its time goes into Python, on both
# sides; beside that the cipher is quick. A large array is little Python and many bytes, each of which passes through
# the cipher. TLS adds almost nothing on the wire, some 20 bytes a record of up to 16 kB. Starting takes more steps:
# a key, its certificate, and a handshake for each connection. If an interval contains 1, these rounds show no difference. (When this was written,
# on two shared cores, four intervals lay between 0.92 and 1.06 for tiny tasks, and between 1.25 and 2.33 for 32 MiB.)
#
# Gradients don't go this way at all: ranks exchange them over gloo, which doesn't encrypt as torch ships it (see the table at the end).
#
# ## What a file can do
#
# A pickle is a program, and loading it runs it: `__reduce__` says which function to call, with which arguments. The one
# below only prints.
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
    "writing a row of hpclab's": lambda: hpclab.rows.line({"loss": 0.1, "extra": Gift()}),
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
# **Explain.** `weights_only=True` builds tensors and a short list of plain types; it refuses any class or function that
# isn't on its list. JSON can't name any. So in hpclab:
#
# - a checkpoint is read with `weights_only=True`, and what couldn't be read that way is refused when it is *written*
#   (of a sharded one, the list of what is where is a pickle, which hpclab reads with a short list of classes of its own);
# - a rank reports to its worker in JSON; your function and its result pass through the worker's code as bytes. Only the
#   rank unpickles the function, which is yours, and only your notebook unpickles the result, which is your rank's.
#   (Ranks also unpickle objects that other ranks send over gloo: who can change that can run code, too.)
#
# Dask's own messages are msgpack, a format like JSON, but they *carry* pickles: your functions, their arguments and
# their results. Anyone who can send a scheduler a task can run code. So its door must be shut before the first message.
#
# ## Where secrets leak
#
# The stranger is out, but secrets also leak by themselves. Two programs get the same token: one on its command line,
# the other in a file.
#
# **Predict**: there are six places: both command lines, both environments, and two files. In how many can another user
# of this machine read the token?

# %% id="leaks-predict"
hpclab.predict("security.leaks", ..., "of six places")

# %% id="leaks-do"
token, folder = os.environ["STORE_TOKEN"], tempfile.TemporaryDirectory()
os.chmod(folder.name, 0o755)  # others may enter it, as many home folders
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
hpclab.came("security.leaks", sum(row["others can read it"] == row["secret in it"] == "yes" for row in places))

# %% [markdown] id="leaks-explain"
# **Explain.** A command line is public: on Linux `/proc/PID/cmdline` has the mode `r--r--r--` while the program runs
# (unless the administrator mounts /proc with `hidepid`). Only the same user, and root, can read the environment; but processes
# that we start inherit it by default, and there the stranger found our token. A file is as private as its mode and those of its
# folders, from the first byte on: between `write_text` and a later `chmod` others may open it, and an open file stays open.
#
# Look through these too before you share them: **a notebook's outputs**, which are saved with it, **logs**, **job
# scripts**, which queues keep, and **git's history**. Less well known: a Jupyter kernel talks to its notebook over
# loopback ports, by default unencrypted, and anyone who connects to one of them can read all cells and outputs. (Sending cells
# takes a key.) `hpclab lab --KernelManager.transport=ipc` uses sockets in a private folder instead.
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
# Rewrite both. `certificates(folder)` returns what the scheduler, workers and clients of a cluster get, a
# `distributed.Security`: anyone without the same one is refused, and each cluster has its own. The workers are jobs on
# other nodes, so what they need, private keys too, must be in *files* in the folder. `job(token, folder)` returns the
# text of a job script. It may also write files to its folder. Others can enter both folders. `train` takes its token by
# `--token TOKEN`, by `--token-file FILE`, or from the environment variable `TRAIN_TOKEN`.
#
# The check starts a scheduler and a worker, sends strangers to their ports, reads your script and your files as others
# could, and runs the script.
#
# <details><summary>Hint</summary>
#
# A stranger at the door had made its own certificate. `help(Security)` tells how to make one; that holds texts, but the
# constructor also takes file names, and insists on encryption as soon as it is given any. The cell above shows how to
# keep a file private from its first byte.
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
# Encryption keeps strangers out. But suppose several hospitals train one model, and none trusts the *server* that adds
# up their gradients: from the gradient of a few images one can often reconstruct them (Zhu and others, 2019).
#
# **Secure aggregation** (Bonawitz and others, 2017): each pair of ranks agrees on random numbers, a *mask*. One of the
# two adds it to its gradient, the other subtracts it. What each sends looks random; in the sum all masks cancel.
#
# First, each pair needs a shared secret, agreed over a wire that others can read. Each rank draws a private key and
# publishes the matching public one; from its own private and the other's public key, each of a pair computes the same
# secret (X25519).

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
# Each rank shows a fingerprint of what it shares with each other rank (never the seed itself: outputs are saved). Rank
# 0's for rank 1 equals rank 1's for rank 0.
#
# A seed has 32 bytes, but a mask needs 400,000 here. numpy's generators won't do: they aren't made for secrets, and from
# some numbers of its default one, with much work, the next can be computed. `security.prg(seed, step, count)` uses the stream of a cipher, ChaCha20: the same on both sides, a
# new one in each step. (Never use a mask twice: the difference of the two shares would be that of the gradients.)
#
# ## Exercise: the masks
#
# Gradients first become whole numbers, in units of $2^{-32}$, as `uint64`. These wrap around at $2^{64}$ and lose
# nothing: `numbers + mask - mask` is always `numbers`.
#
# Write `mask(numbers, rank, seeds, step, prg)`, which returns what this rank sends, a `uint64` array of the same
# length. `seeds` is a dict with a seed for each other rank. The sum over all ranks must be exact; a share must reveal
# nothing, not even to another rank, which knows its own mask; and every step needs new masks.
#
# <details><summary>Hint</summary>
#
# In each pair one rank adds, the other subtracts. What do both know that tells them apart?
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
# Now for real: each rank computes a CNN's gradient on its own images, masks it, and sends its share to rank 0, the
# server. (Until you write `mask`, nothing is masked.)

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
dist.all_reduce(plain := torch.from_numpy(numbers.astype(np.int64)))  # only to compare: a real system never would
dist.all_reduce(gradient)
if rank == 0:
    total = sum(one.numpy().view(np.uint64) for one in shares).view(np.int64)  # modulo 2**64
    print("equal to the plain sums, to the last bit:", (total == plain.numpy()).all())
    print(f"equal to the sums of floats within {np.abs(total / 2**32 - gradient.numpy()).max():.0e}, by rounding")

# %% [markdown] id="look"
# **Predict**: what does the histogram of one rank's share look like? (And why not simply add float masks to float
# gradients?)

# %% id="look-predict"
hpclab.predict("security.share", ..., among=("a peak", "a bell", "flat"))

# %% id="look-do"
numbers, share = gang.pull("numbers, share", on=1)[0]
counts = spread({"gradient of rank 1": numbers, "what rank 1 sends": share})

# %% id="look-came"
hpclab.came("security.share", "flat" if counts[1].max() < 2 * counts[1].min() else None)

# %% id="floats-do"
gradients = np.array(gang.pull("numbers.view(np.int64) / 2**32"), dtype=np.float32)  # (ranks, weights)
shares, plains = (np.array(gang.pull(name)) for name in ("share", "numbers"))  # (ranks, weights)
error, total = (numbers.view(np.int64) for numbers in (shares.sum(0) - plains.sum(0), plains.sum(0)))  # modulo 2**64
sent = {"whole numbers": (share.view(np.int64), np.linalg.norm(error) / np.linalg.norm(total))}
sent |= {f"floats, about {size:g}": security.float_masks(gradients, size) for size in (1e-2, 1, 1e2, 1e4)}
tables.Table(
    {
        "masks": masks,
        "correlation with gradient": f"{np.corrcoef(one, gradients[1])[0, 1]:.3f}",
        "sum wrong by": f"{wrong:.0e}",
    }
    for masks, (one, wrong) in sent.items()
)

# %% [markdown] id="look-explain"
# **Explain.** On this scale, in units of $2^{64}$, every gradient lies close to 0, or, if negative, wraps around to
# just below 1. The share is spread evenly. (In the table, *wrong* is the length of the error over that of the
# sum.) With truly random masks that would be exact: if you add a number that takes *any* value with
# equal chance, so does the result. As far as anyone knows, ChaCha20's stream can't be told from true randomness in any
# practical time.
#
# Floats can't do that. Small masks hide little, and large ones destroy the gradient's last digits, which don't come
# back when the masks cancel: $(g + m) - m \ne g$. Whole numbers lose only the rounding at the start, and cost twice the bytes of
# 32-bit floats.
#
# ### What it doesn't do
#
# - **Drop-outs**: a rank that drops out leaves masks that nobody cancels. Bonawitz and others hand out parts of each
#   rank's private key beforehand, from which enough survivors can work out its seeds (and give each rank a second mask of
#   its own, so that a share that only arrives late stays hidden).
# - **Collusion**: if all the others combine what they know, they are left with your gradient. (No masking helps: they
#   could also subtract their own gradients from the sum.)
# - **A rank that lies**: the server can't see that a gradient is absurd, because it sees none.
# - **A man in the middle**, who hands each side his own public key. Our keys came over gloo, which doesn't say who sent
#   them; a real system has each one signed by someone they all know.
# - **The sum itself** reveals something. Adding noise to it (*differential privacy*) helps, and costs accuracy.
#
# ## What is protected from whom
#
# | from | scheduler and workers | where ranks meet | gradients in transit | dashboard |
# |---|---|---|---|---|
# | another user of this host | TLS, certificates | a file in a folder of mode 0700 | **gloo on loopback: no encryption, no authentication** | **can be read** |
# | other machines, to a cluster on this machine | listen on loopback only | a file | listen on loopback only | loopback only |
# | other machines, to a cluster on several | TLS, certificates | over Dask's TLS | **gloo: no encryption, no authentication** | loopback only |
# | your own user id, and root | **not at all** | **not at all** | **not at all** | **not at all** |
#
# Gloo, as torch ships it, trusts its network, as do NCCL and most MPI. Sites protect traffic *below* it: a private interconnect that only
# compute nodes are on, nodes that run one job at a time, or an encrypted network over the open one (WireGuard, IPsec),
# which costs some of its speed. `docs/security.md` in hpclab's repository has all of this, with the test behind most
# claims.

# %% [markdown] id="quiz-modes"
# ## Quiz
#
# ### What can a stranger read?
#
# Another ordinary user of the host, in none of your groups, knows all of these names. Which files can they read?
# Everybody can enter all folders above these. Set `modes_answer` to the set of the letters.

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
# Three ranks have whole numbers from 0 to 99, and mask them so that all masks cancel modulo 100. Each mask is any
# number from 0 to 99 with equal chance. The server sees the shares 37, 85 and 12. What is the sum of the ranks' numbers
# modulo 100? And from the share 37 alone, how many numbers are still possible for rank 0? Set `mask_answer` to the
# pair.

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
# - Nobody checks who connects to a port: on a shared host loopback is public. A program that runs its clients' code must
#   check who they are.
# - Encryption costs time for large data and at the start, and hardly any otherwise; measure how much, in turns, with an interval.
# - Loading a pickle runs it. Load tensors with `weights_only=True`, and rows from JSON.
# - A secret belongs in a file of mode 0600, from its first byte; scripts and command lines hold the file's *name*.
# - Masks that cancel hide each gradient from those who add them up; modulo $2^{64}$ the sum is exact.
#
# ### What breaks at scale
#
# Each of a thousand ranks would draw 999 masks in every step, and some rank always drops out: real systems mask with
# few neighbours, in a sparse graph, and recover seeds. And the more people share a network, the less private it is.
#
# ### References
#
# - E. Rescorla, *The Transport Layer Security (TLS) Protocol Version 1.3*, RFC 8446, 2018.
# - K. Bonawitz and others, *Practical Secure Aggregation for Privacy-Preserving Machine Learning*, CCS 2017.
# - L. Zhu, Z. Liu, S. Han, *Deep Leakage from Gradients*, NeurIPS 2019, arXiv:1906.08935.
# - A. Langley, M. Hamburg, S. Turner, *Elliptic Curves for Security*, RFC 7748, 2016 (X25519).
# - Y. Nir, A. Langley, *ChaCha20 and Poly1305 for IETF Protocols*, RFC 8439, 2018.
# - CVE-2025-32434: before torch 2.6 a file could run code in spite of `weights_only=True`. CVE-2026-24747: before 2.10 one
#   could still corrupt memory, and perhaps run code.
