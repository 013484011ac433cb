"""What vLLM's worker process takes from Terrace: a loader that waits for weights, and the method that receives them.

vLLM imports this file in its worker, before the model is made; the trainer names it (`LOADER`, `EXTENSION` in `vllm`) and never imports it.
vLLM's own loader for models without weights (`dummy`) is not used: it fills every tensor of the model with random numbers, also those
that no checkpoint brings, such as mean and deviation of the pictures' pixels, and they stay so.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import torch
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from terrace.generation.vllm_weights import received

LOADER = "terrace_awaits_weights"  # vllm.LOADER


@register_model_loader(LOADER)
class AwaitsWeights(BaseModelLoader):
    """Zeros for the time being, which vLLM's first run of the model can take; what the model computes for itself stays as it is."""

    def download_model(self, model_config: Any) -> None:
        """There is nothing to fetch."""

    def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()


class TakesWeights:
    """vLLM's `worker_extension_cls`: methods beside the worker's own, whose `reload_weights` is that of 0.30 to 0.32."""

    reload_weights: Callable[..., None]

    def take_streamed_weights(self, address: str) -> None:
        """Replace all weights by those that come from the trainer's end of the socket."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.connect(address)
            self.reload_weights(weights_iterator=received(connection))
