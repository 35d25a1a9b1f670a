"""One rank that opens the three roles and prints by how many bytes its peak rose: `memory_probe.py CONFIG SMALL`.

Under torchrun; SMALL is opened before, for all that is loaded once.
"""

import json
import os
import resource
import sys
from pathlib import Path

import torch.distributed as dist

from common.options import resolve_config
from stage2_distill.build import build_roles
from stage2_distill.config import DistillConfig
from stage2_distill.distributed.dtensor import local_tensor
from stage2_distill.distributed.process_group import start_process_group

config = resolve_config(DistillConfig, {"config": sys.argv[1]})
ranks = start_process_group("cpu")
build_roles(config, ranks, Path(sys.argv[2]))
dist.barrier()
pages = int(Path("/proc/self/statm").read_text().split()[1])
roles = build_roles(config, ranks, Path(config.model))
peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
kept = [p for net in (roles.student.net, roles.teacher, roles.critic.net) for p in net.parameters()]
kept += () if roles.ema.offload else roles.ema.weights.values()  # an offloaded average has no memory yet
for role in (roles.student, roles.critic):
    kept += [value for state in role.optimizer.state.values() for name, value in state.items() if name != "step"]
own = sum(local_tensor(value).nbytes for value in kept)
figures = {"grown": peak - resource.getpagesize() * pages, "own": own}
Path(f"{sys.argv[1]}.{ranks.rank}").write_text(json.dumps(figures))
dist.destroy_process_group()
os._exit(0)  # a thread of torch's may still run, and would abort the process
