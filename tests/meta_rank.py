"""Parameters of rank 0 as megatron-core builds them, on no device, in a world that is not there.

Run by test_plan.py: `python meta_rank.py qwen3-8b '{"processes": 16, "tensor": 2}'`.
"""

import json
import sys

from q3mega import device  # noqa: F401

# isort: split
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from q3mega.engine import parallel
from q3mega.model import QWEN3
from q3mega.model.attention import Positions
from q3mega.model.megatron import build_model, transformer_config
from q3mega.recipe import Layout

name, layout = sys.argv[1], Layout(**json.loads(sys.argv[2]))
shape = QWEN3[name]
dist.init_process_group("fake", rank=0, world_size=layout.processes, store=FakeStore())
parallel.initialise(layout, 0)
fields = parallel.config_fields(layout, shape.layers)
config = transformer_config(shape, dtype=torch.bfloat16, **fields)
chunks = range(layout.virtual_pipeline) if layout.virtual_pipeline > 1 else (None,)
with torch.device("meta"):
    models = [build_model(shape, config, Positions(1e6), chunk) for chunk in chunks]
found = [(n, p.numel()) for model in models for n, p in model.named_parameters()]
experts = sum(size for n, size in found if ".experts." in n)
print(json.dumps([sum(size for _, size in found) - experts, experts]))
