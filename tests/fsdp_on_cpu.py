"""orion on CPUs with the two choices that are made for GPUs only: python tests/fsdp_on_cpu.py fine-tune ...

accelerate shards nothing over CPU processes, so it is told that its processes have GPUs while it looks whether to. And
orion trains in float32 on a CPU; here in bfloat16, as on a GPU. Everything behind the two, from sharding the layers to
gathering the adapter, is accelerate's, torch's and transformers' own, over gloo.
"""

import runpy
import sys
from typing import Any

from accelerate import state
from accelerate.utils import DistributedType

from orion_triage.train import fine_tune
from orion_triage.train.device import Device

choose = state.AcceleratorState.__init__


def choose_as_for_gpus(self: Any, *arguments: Any, **options: Any) -> None:
    if state.PartialState().distributed_type == DistributedType.MULTI_CPU:
        state.PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    choose(self, *arguments, **options)


if __name__ == "__main__":
    state.AcceleratorState.__init__ = choose_as_for_gpus
    fine_tune.choose_device = lambda settings, parameters: Device("cpu", "bfloat16")
    sys.argv[0] = "orion"
    runpy.run_module("orion_triage.cli", run_name="__main__")
