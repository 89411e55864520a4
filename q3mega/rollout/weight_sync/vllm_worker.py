"""What a vLLM has in its worker processes to take weights by broadcast.

`--worker-extension-cls q3mega.rollout.weight_sync.vllm_worker.Receiver` mixes it into
them; `servers.vllm` calls its methods by name.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from q3mega.rollout.weight_sync import transfer_group


class Receiver:
    """An update is open_weights, receive_weights for each bucket, close_weights."""

    vllm_config: Any  # these four are the worker's
    model_runner: Any
    device: torch.device
    rank: int
    trainer: dist.ProcessGroup | None = None
    receiving = False

    def join_trainer(
        self, address: str, port: int, first: int, world: int, name: str, backend: str
    ) -> None:
        """first: the rank in the group of this server's first process."""
        self.leave_trainer()
        config = self.vllm_config.parallel_config
        rank = first + config.data_parallel_index * config.world_size + self.rank
        store = dist.TCPStore(address, port, world, False, transfer_group.TRANSFER_TIMEOUT)
        self.trainer = transfer_group.join(store, rank, world, name, backend)

    def leave_trainer(self) -> None:
        group, self.trainer = self.trainer, None
        if group is not None:
            dist.destroy_process_group(group)

    def open_weights(self) -> None:
        """Also after an update that was cut, whose parts the layers still hold."""
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        if self.receiving:
            self.close_weights()
        self.receiving = True
        model = self.model_runner.get_model()
        if self.device.type == "cpu":  # there 0.32 packs experts with a new kernel only
            for module in model.modules():
                method = getattr(module, "quant_method", None)
                if method is not None and hasattr(method, "moe_kernel"):
                    method.moe_kernel = None
        initialize_layerwise_reload(model)

    def receive_weights(
        self, names: Sequence[str], dtypes: Sequence[str], shapes: Sequence[Sequence[int]]
    ) -> None:
        if self.trainer is None or not self.receiving:
            raise RuntimeError("no trainer's group was joined, or no update is open")
        tensors = transfer_group.receive(self.trainer, dtypes, shapes, self.device)
        self.model_runner.get_model().load_weights(zip(names, tensors, strict=True))

    def close_weights(self) -> None:
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        self.receiving = False
        model = self.model_runner.get_model()
        with set_current_vllm_config(self.vllm_config):
            finalize_layerwise_reload(model, self.vllm_config.model_config)
            head = getattr(model, "lm_head", None)  # None: on another stage
            if head is not None and hasattr(head, "cpu_linear"):  # tied, it packs no new weights
                head.quant_method.process_weights_after_loading(head)
