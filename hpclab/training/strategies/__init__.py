"""Ways to spread training over ranks. Ranks import it, so it imports nothing at its top.

`kinds` holds what a notebook's kernel needs: the strategies as settings, without torch. The other files are each rank's
side, on torch's own implementations; `wire` tells the bytes that each strategy sends.
"""

from hpclab import later

_KINDS = ("DDP", "Accumulate", "Compress", "LocalSGD", "DiLoCo", "Zero", "Tensor", "Pipeline", "Strategy", "named")
__getattr__ = later(__name__, dict.fromkeys(_KINDS, "training.strategies.kinds"))
