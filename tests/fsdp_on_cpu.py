"""orion, with FSDP over CPU processes: python tests/fsdp_on_cpu.py fine-tune ...

accelerate chooses FSDP for GPUs only. This makes the one choice that it would make there; everything behind it, from
sharding the layers to gathering the adapter, is accelerate's, torch's and transformers' own, over gloo.
"""

import runpy
import sys
from typing import Any

from accelerate import state
from accelerate.utils import DistributedType

choose = state.AcceleratorState.__init__


def choose_fsdp(self: Any, *arguments: Any, fsdp_plugin: Any = None, **options: Any) -> None:
    choose(self, *arguments, fsdp_plugin=fsdp_plugin, **options)
    if self.distributed_type == DistributedType.MULTI_CPU and fsdp_plugin is not None:
        self.distributed_type = DistributedType.FSDP
        self.fsdp_plugin = fsdp_plugin
        state.PartialState._shared_state["distributed_type"] = self.distributed_type


if __name__ == "__main__":
    state.AcceleratorState.__init__ = choose_fsdp
    sys.argv[0] = "orion"
    runpy.run_module("orion_triage.cli", run_name="__main__")
