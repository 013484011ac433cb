"""The short decoding step as one call of compiled C (`decode_step.c`), for models in float32 on a CPU.

`decode_step.DecodeStep` asks PyTorch for some twenty operations a layer; on a small model each costs more than its arithmetic. Here a
step is one call, which reads weights and cache where they lie, computes only the rows that decode, and holds no lock of Python's, so a
model that trains in another thread goes on meanwhile. Both agree within rounding.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from terrace.models.decode_step import DecodeStep
from terrace.models.native_code import NotCompiled, compiled

SOURCE = Path(__file__).with_name("decode_step.c")
ACTIVATIONS = {"SiLU", "SiLUActivation"}

Block = tuple[torch.Tensor, torch.Tensor]  # keys and values


class BlocksCache(Protocol):
    """A cache of contiguous blocks, with room for one more token of each row."""

    prompt_of_row: np.ndarray  # int64 [R]: places in the prompts' blocks
    prompt_lengths: np.ndarray  # int64 [B]

    def with_room(self, layer: int, kv_heads: int, size: int) -> tuple[Block, Block]:
        """Prompts [B, K, P, D] and answers [R, K, T, D] of a layer."""

    @property
    def lengths(self) -> np.ndarray:
        """int64 [R]: tokens of each answer."""


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in (
            "query", "query_bias", "key", "key_bias", "value", "value_bias", "out", "out_bias", "query_norm", "key_norm", "before", "after",
            "gate", "up", "down", "prompt_keys", "prompt_values", "own_keys", "own_values",
        )),
        *((name, ctypes.c_int64) for name in ("prompt_room", "own_room", "window")),
    ]  # fmt: skip


class _Step(ctypes.Structure):
    _fields_ = [
        ("gemm", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("rows", "layers", "hidden", "inner", "heads", "kv_heads", "vocabulary")),
        ("epsilon", ctypes.c_float), ("scale", ctypes.c_float), ("layer", ctypes.POINTER(_Layer)),
        *((name, ctypes.c_void_p) for name in (
            "embeddings", "norm", "head", "head_bias", "cosines", "sines", "tokens", "positions", "place", "lengths", "prompt",
            "prompt_length", "states", "read", "wide", "heads_out", "scores",
        )),
        ("score_room", ctypes.c_int64), ("logits", ctypes.c_void_p), ("order", ctypes.c_void_p),
    ]  # fmt: skip


class CompiledStep(DecodeStep):
    """The step of a model for which `decode_step.usual` holds. Raises NotCompiled where it cannot be had."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        attention, perceptron = self._layers[0].self_attn, self._layers[0].mlp
        self._size = attention.head_dim
        heads, kv_heads = (module.weight.shape[0] // self._size for module in (attention.q_proj, attention.k_proj))
        self._check(heads // kv_heads * kv_heads == heads)
        self._code = compiled(SOURCE, {"HEAD": self._size, "SHARE": heads // kv_heads})
        self._code.decode_step.argtypes, self._code.decode_step.restype = [ctypes.POINTER(_Step)], None
        self._blocks = (_Layer * len(self._layers))()
        vocabulary, hidden = self._head.weight.shape
        self._call = _Step(
            gemm=_gemm(), layers=len(self._layers), hidden=hidden, inner=perceptron.gate_proj.weight.shape[0],
            heads=heads, kv_heads=kv_heads, vocabulary=vocabulary,
            epsilon=self._language.norm.variance_epsilon, scale=attention.scaling, layer=self._blocks,
        )  # fmt: skip
        self.begin()

    def begin(self) -> None:
        """Before a generation: weights may have moved since the last one."""
        call = self._call
        call.embeddings, call.norm = _address(self._language.embed_tokens.weight), _address(self._language.norm.weight)
        call.head, call.head_bias = _address(self._head.weight), _address(getattr(self._head, "bias", None))
        for place, layer in enumerate(self._layers):
            attention, perceptron, block = layer.self_attn, layer.mlp, self._blocks[place]
            for name, module in (
                ("query", attention.q_proj), ("key", attention.k_proj), ("value", attention.v_proj), ("out", attention.o_proj),
            ):  # fmt: skip
                setattr(block, name, _address(module.weight))
                setattr(block, f"{name}_bias", _address(module.bias))
            for name, module in (("query_norm", getattr(attention, "q_norm", None)), ("key_norm", getattr(attention, "k_norm", None))):
                setattr(block, name, _address(None if module is None else module.weight))
            block.before, block.after = _address(layer.input_layernorm.weight), _address(layer.post_attention_layernorm.weight)
            block.gate, block.up, block.down = (
                _address(module.weight) for module in (perceptron.gate_proj, perceptron.up_proj, perceptron.down_proj)
            )
            block.window = getattr(attention, "sliding_window", None) or 0

    def logits_of(self, rows: np.ndarray, tokens: np.ndarray, positions: np.ndarray, cache: BlocksCache) -> torch.Tensor:
        """float32 [A, V] after one more token of these rows. All int64 [A]; `tokens` and `positions` are those of `rows`."""
        call, count = self._call, len(rows)
        self._grow_table(int(positions.max()), self._language.embed_tokens.weight)
        assert self._table is not None
        cosines, sines = self._table
        longest = int(cache.lengths[rows].max()) + 1
        for place in range(len(self._layers)):
            (prompt_keys, prompt_values), (own_keys, own_values) = cache.with_room(place, call.kv_heads, self._size)
            block = self._blocks[place]
            for tensor in (prompt_keys, prompt_values, own_keys, own_values):  # C reads them by their addresses
                assert tensor.dtype == torch.float32, "the compiled step reads a cache in float32"
                assert tensor.is_contiguous()
            block.prompt_keys, block.prompt_values = prompt_keys.data_ptr(), prompt_values.data_ptr()
            block.own_keys, block.own_values = own_keys.data_ptr(), own_values.data_ptr()
            block.prompt_room, block.own_room = prompt_keys.shape[2], own_keys.shape[2]
        by_prompt = np.argsort(cache.prompt_of_row[rows], kind="stable")
        place, order = rows[by_prompt], np.argsort(by_prompt)
        prompt = cache.prompt_of_row[place]
        held = [tokens[by_prompt], positions[by_prompt], place, cache.lengths[place], prompt, cache.prompt_lengths[prompt], order]
        held = [np.ascontiguousarray(one, np.int64) for one in held]
        call.tokens, call.positions, call.place, call.lengths, call.prompt, call.prompt_length, call.order = (
            one.ctypes.data for one in held
        )
        call.rows, call.score_room = count, prompt_keys.shape[2] + longest
        queries, pairs, share = call.heads * self._size, call.kv_heads * self._size, call.heads // call.kv_heads
        widest = int(np.bincount(prompt).max()) * share
        sizes = [
            count * call.hidden, count * call.hidden, count * max(2 * call.inner, queries + 2 * pairs), count * queries,
            widest * (call.score_room + 2 * self._size),
        ]  # fmt: skip
        room = torch.empty(sum(sizes), dtype=torch.float32)
        call.states, call.read, call.wide, call.heads_out, call.scores = (
            room.data_ptr() + 4 * offset for offset in np.cumsum([0, *sizes[:-1]]).tolist()
        )
        logits = torch.empty(count, call.vocabulary, dtype=torch.float32)
        call.logits, call.cosines, call.sines = logits.data_ptr(), cosines.data_ptr(), sines.data_ptr()
        self._code.decode_step(ctypes.byref(call))
        return logits

    def _check(self, heads_divide: bool) -> None:
        """That the model is what the C code computes."""
        norms = [module for module in self._language.modules() if hasattr(module, "variance_epsilon")]
        tensors = [*(parameter for layer in self._layers for parameter in layer.parameters()), self._head.weight]
        activations = {type(layer.mlp.act_fn).__name__ for layer in self._layers}
        wanted = [
            (all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors), "weights in float32 on a CPU"),
            (all(tensor.is_contiguous() for tensor in tensors), "contiguous weights"),
            (len({module.variance_epsilon for module in norms}) == 1, "one epsilon"),
            (heads_divide and self._size % 2 == 0, "heads that divide"),
            (activations <= ACTIVATIONS, "SiLU"),
        ]  # fmt: skip
        for holds, what in wanted:
            if not holds:
                raise NotCompiled(f"the compiled step wants {what}")


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _gemm() -> int:
    """The address of the matrix product of the BLAS that PyTorch brings."""
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        path = Path(torch.__file__).parent / "lib" / name
        if path.exists():
            found = getattr(ctypes.CDLL(str(path)), "sgemm_", None)
            if found is not None:
                return ctypes.cast(found, ctypes.c_void_p).value or 0
    raise NotCompiled("this PyTorch offers no sgemm")
