"""What most jobs of the pool import, so that each worker need not.

Nothing here may start threads or touch a GPU: workers are forked after it.
"""

from __future__ import annotations

import gc
import importlib
import warnings

HEAVY = (
    "lightning.pytorch",
    "megatron.core.pipeline_parallel.schedules",
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "transformers.models.llama.modeling_llama",
    "nemo2",
    "tests.pool",
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of optional kernels that no CPU machine has
    for name in HEAVY:
        importlib.import_module(name)
gc.collect()
gc.freeze()  # so that workers collect after each job, at little cost
