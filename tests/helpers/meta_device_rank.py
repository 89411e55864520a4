"""What one rank holds as megatron-core builds it, on no device, in a world that is not there.

Bytes of weights, of gradients, of the optimizer's master weights and Adam's two moments.

Run by test_plan.py: `python meta_rank.py RANK qwen3-8b '{"processes": 16, "tensor": 2}'`.
"""

import json
import sys

from q3mega import device  # noqa: F401

# isort: split
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.module import Float16Module
from torch.testing._internal.distributed.fake_pg import FakeStore

from q3mega.config.layout import Layout
from q3mega.engine import parallel
from q3mega.engine.optimizer import OptimizerSpec, build_optimizer
from q3mega.model import QWEN3
from q3mega.model.attention import Positions
from q3mega.model.megatron import build_model, transformer_config

rank, name, layout = int(sys.argv[1]), sys.argv[2], Layout(**json.loads(sys.argv[3]))
shape = QWEN3[name]
dist.init_process_group("fake", rank=rank, world_size=layout.processes, store=FakeStore())
parallel.initialise(layout, 0)
fields = parallel.config_fields(layout, shape.layers)
config = transformer_config(shape, dtype=torch.bfloat16, **fields)
chunks = range(layout.virtual_pipeline) if layout.virtual_pipeline > 1 else (None,)
ddp = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
named = torch.Tensor.type


def name_on_a_gpu(x, dtype=None, **options):  # megatron's optimizers ask for it
    given = named(x, dtype, **options)
    return given if dtype is not None else f"torch.cuda.{given.split('.')[-1]}"


torch.Tensor.type = name_on_a_gpu
torch.cuda.current_device = lambda: torch.device("meta")  # where buffers go
with torch.device("meta"):
    models = [build_model(shape, config, Positions(1e6), chunk) for chunk in chunks]
    models = [Float16Module(config, model) for model in models]
    wrapped = [DistributedDataParallel(config, ddp, model) for model in models]
    spec = OptimizerSpec(lr=1.0, steps=1)
    optimizer, _ = build_optimizer(spec, wrapped, distributed=True, dtype=torch.bfloat16)
buffers = [b for m in wrapped for b in (*m.buffers, *m.expert_parallel_buffers)]
master = {id(p): p.numel() for group in optimizer.param_groups for p in group["params"]}
found = {
    "weights": sum(p.numel() * p.element_size() for m in models for p in m.parameters()),
    "gradients": sum(b.grad_data.numel() * b.grad_data.element_size() for b in buffers),
    "optimizer": 12 * sum(master.values()),
}
print(json.dumps(found))
