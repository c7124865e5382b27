"""accelerate's FSDP2 without a GPU."""

from typing import Any

import accelerate.state
from accelerate.utils import DistributedType


def shard_on_cpus() -> None:
    """Have accelerate take its path for FSDP where it would make DDP of it."""
    make = accelerate.state.AcceleratorState.__init__

    def told(self: Any, *args: Any, fsdp_plugin: Any = None, **more: Any) -> None:
        make(self, *args, fsdp_plugin=fsdp_plugin, **more)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            accelerate.state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    accelerate.state.AcceleratorState.__init__ = told
