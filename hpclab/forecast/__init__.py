"""Forecasts: of a training step on more ranks than you measured, and of large models on many GPUs.

`Workload`, `parts` and `calibrate` forecast the step of a model that you train data-parallel. `Transformer` and
`Layout` describe a large model and how it is spread over GPUs; `Memory` and `Throughput` forecast a rank's bytes and a
step's seconds, and `plan` ranks the layouts that fit. Needs only numpy and scipy.
"""

from hpclab.forecast.layout import Layout as Layout
from hpclab.forecast.memory import Memory as Memory
from hpclab.forecast.planner import plan as plan
from hpclab.forecast.steps import BUCKET_BYTES as BUCKET_BYTES
from hpclab.forecast.steps import FITTED as FITTED
from hpclab.forecast.steps import Forecast as Forecast
from hpclab.forecast.steps import Workload as Workload
from hpclab.forecast.steps import calibrate as calibrate
from hpclab.forecast.steps import parts as parts
from hpclab.forecast.steps import slowest as slowest
from hpclab.forecast.steps import step_s as step_s
from hpclab.forecast.throughput import A100 as A100
from hpclab.forecast.throughput import H100 as H100
from hpclab.forecast.throughput import Accelerator as Accelerator
from hpclab.forecast.throughput import Throughput as Throughput
from hpclab.forecast.throughput import hfu as hfu
from hpclab.forecast.throughput import mfu as mfu
from hpclab.forecast.transformer import Transformer as Transformer
