# %% [markdown] id="title"
# # hpclab: the course
#
# **Real clusters, real training, real measurements, in a notebook cell.** In each notebook you predict, run, and explain.
# Unless it is labelled otherwise, what you see is measured while you watch, on the machine you are using. Exercises check
# themselves.
#
# | | |
# |---|---|
# | objectives | find the notebook to begin with, and what you have done so far |
# | prerequisites | a little Python; no account anywhere |
# | minutes | 5 to read; under 1 to run |
# | needs | 1 CPU, 0.3 GB of memory, no network |
#
# Run the cells one by one with <kbd>Shift</kbd>+<kbd>Enter</kbd>, here and in every notebook.

# %% [markdown] id="progress"
# ## Where you are
#
# When a check says *pass*, hpclab writes the exercise and the date to `.hpclab-progress.jsonl` in this folder. Your
# predictions and their outcomes go there too, and nothing is sent anywhere. Once you have made some predictions, a table
# shows how good they are. Run this cell again whenever you come back.

# %% id="progress-do"
import hpclab

hpclab.progress()

# %% [markdown] id="short"
# ## 90 minutes
#
# The shortest path: find out what your machine gives you, train on it, and say what the measurement proves. The minutes
# cover reading and exercises, but not the parts headed *For later*.
#
# | notebook | minutes | needs |
# |---|---|---|
# | [Start here: the race](00_start.ipynb) | 25 | 1 CPU, 1.5 GB, 2 ranks |
# | [CNN: the same loss, sooner](03_cnn.ipynb) | 30 | 1 CPU, 1.5 GB, 2 ranks |
# | [Scaling laws: what a measurement proves](04_scaling.ipynb) | 35 | 2 CPUs, 1.5 GB, 2 ranks |

# %% [markdown] id="day"
# ## One day
#
# The three above with their parts *for later*, plus a single process, gradients by hand, a queue, and failures.
#
# | notebook | minutes | needs |
# |---|---|---|
# | [One process first: what you leave on the table](01_one_process.ipynb) | 40 | 1 CPU, 1 GB, no ranks |
# | [Data parallel from scratch](02_ddp_from_scratch.ipynb) | 45 | 1 CPU, 1.5 GB, 4 ranks |
# | [Queues: your turn on a shared machine](06_queues.ipynb) | 45 | Linux with Slurm's programs, 2 CPUs, 1.5 GB |
# | [Faults: what a failure costs](13_faults.ipynb) | 40 | 2 CPUs, 1.5 GB, 2 ranks |

# %% [markdown] id="term"
# ## A term
#
# All notebooks. Keep the capstone for the end, though its number comes earlier.
#
# | notebook | minutes | needs |
# |---|---|---|
# | [Dask, two ways](05_dask.ipynb) | 40 | 2 CPUs, 2 GB, 2 ranks |
# | [RNN: stragglers](08_rnn.ipynb) | 35 | 1 CPU, 1.5 GB, 2 ranks |
# | [Autoencoder: fewer bytes](09_autoencoder.ipynb) | 35 | 2 CPUs, 1.5 GB, 2 ranks |
# | [Too big: a model that doesn't fit](10_too_big.ipynb) | 45 | 2 CPUs, 1.5 GB, 2 ranks |
# | [Security: who else can run code here?](14_security.ipynb) | 40 | 1 CPU, 1.5 GB, 4 ranks |
# | [Puzzles: communicate by the step](19_puzzles.ipynb) | 60 | 1 CPU, 0.5 GB, no ranks |
# | [Debugging: six programs that train wrong](20_debugging.ipynb) | 60 | 1 CPU, 1.5 GB, 2 ranks |
# | [Capstone: predict, then measure](17_capstone.ipynb) | 45 | 2 CPUs, 2 GB, 2 ranks |

# %% [markdown] id="machine"
# ## What this machine has
#
# A cloud machine or a container is only part of a host. The limits below are yours; next to anything *missing* is the
# line that installs it, where there is one. Every notebook also works with fewer CPUs than ranks: the ranks then take turns, and their rows
# say *emulated*.

# %% id="machine-do"
print(hpclab.doctor.advice())
hpclab.doctor.examine(quick=True)

# %% [markdown] id="more"
# ## More
#
# - The terms of the field, in English and Chinese: the [glossary](glossary.md#gang).
# - A cluster holds memory until you close it. Each notebook closes its own at the end; if you left one open,
#   *Kernel*, *Shut Down All Kernels* ends it.
# - `hpclab lab` brings a newer course into this folder but never overwrites what you changed: it puts the new notebook
#   beside yours, as `03_cnn.new.ipynb`.
