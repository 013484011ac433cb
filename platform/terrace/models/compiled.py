"""Transformer blocks through torch.compile, one by one (`parallel.compile`): norms, rotations and gates run as few fused kernels.

A block's `forward` is compiled, not the block: hooks of strategies (FSDP gathers, ZeRO fetches) stay around it, as do the names of its
parameters. Blocks of one kind share their graphs. All sizes are symbolic from the first call on, so that packs of other lengths
compile nothing anew; an input of one row or another set of trained tensors does so once, and a pass without gradients is not compiled.
Attention over segments, which depends on the lengths themselves, and feed-forwards that send tokens to experts run as they are: graphs
end before them and begin after them. Blocks with hooks of their own inside (window adapters), which graphs would lose, run as they are.
Activation checkpointing stands around the compiled block.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import sysconfig
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from terrace.errors import InputError, TerraceError
from terrace.models.decode_step import IDLE_HOOKS
from terrace.models.families.registry import family_of_model
from terrace.models.parts import transformer_blocks

log = logging.getLogger(__name__)

OURS = "terrace_flash_"  # registered names of attention functions that read the boundaries of segments
ATTENTION_OPTIONS = (
    "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "segment_boundaries", "sequence_group", "bidirectional_groups",
    "crossing", "prompt_units", "keep",
)  # fmt: skip
LIMIT = 64  # graphs of one function; torch's own limit of 8 is for functions that one model has once
Backend = Callable[[Any, Any], Callable[..., Any]]


class Graphs:
    """The compiler, counting: what torch.compile is given as backend. One for the process, so that stages share graphs."""

    def __init__(self) -> None:
        self.count, self.seconds = 0, 0.0
        self._said = 0

    def __call__(self, graph: Any, inputs: Any) -> Callable[..., Any]:
        from torch._inductor.compile_fx import compile_fx

        begun = time.perf_counter()
        compiled = compile_fx(graph, inputs)
        self.count += 1
        self.seconds += time.perf_counter() - begun
        return compiled

    def news(self) -> str | None:
        """What was compiled since it was last asked; None if nothing was."""
        new, self._said = self.count - self._said, self.count
        return f"{new} graphs of transformer blocks compiled ({self.count} so far, {self.seconds:.3g} s)" if new else None


GRAPHS = Graphs()


def check_compiler(device_type: str) -> None:
    """Raises InputError, naming what is missing, where torch.compile cannot make kernels for a device."""
    missing = missing_for_cuda() if device_type == "cuda" else missing_for_cpu()
    if missing:
        raise InputError(f"parallel.compile: true needs {missing} on every worker; install it, or set parallel.compile: false")


def missing_for_cpu() -> str | None:
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception:  # torch raises another class from version to version
        return "a C++ compiler (apt install g++)"
    if not Path(sysconfig.get_paths()["include"], "Python.h").is_file():
        return "the headers of Python (apt install python3-dev)"
    return None


def missing_for_cuda() -> str | None:
    from torch.utils._triton import has_triton

    if importlib.util.find_spec("triton") is None:
        return "the package triton (pip install triton)"
    return None if has_triton() else "a GPU that Triton knows (compute capability 7.0 or newer) and a C compiler (apt install gcc)"


class Held:
    """What attention alone is told, as one object that graphs pass on without looking at it: boundaries differ from pack to pack."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options


def compile_blocks(model: Any, backend: Backend = GRAPHS) -> int:
    """Compile the forward pass of every block of vision and language that has no hooks inside; how many. None is yet compiled."""
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, LIMIT)
    dynamo.skip_nnmodule_hook_guards = False  # a hook that comes later is heard
    torch.fx.experimental._config.use_duck_shape = False  # two lengths that are equal in one pack are not in the next
    for name in [name for name in ALL_ATTENTION_FUNCTIONS if name.startswith(OURS)]:
        ALL_ATTENTION_FUNCTIONS.register(name, _attention_as_it_is(ALL_ATTENTION_FUNCTIONS[name]))
    modules = dict(model.named_modules())
    names = {id(module): name for name, module in modules.items()}
    for router in family_of_model(model).routers(model):
        mixture = modules[names[id(router)].rpartition(".")[0]]
        mixture.forward = _as_it_is(mixture.forward)
    blocks = [block for block in transformer_blocks(model) if not _hooked(block)]
    for block in blocks:
        _compile(block, backend)
    return len(blocks)


def _hooked(block: Any) -> bool:
    hooks = [hook for module in block.modules() for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())]
    return any(getattr(hook, "__module__", "") != IDLE_HOOKS for hook in hooks)


def _as_it_is(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, left out of graphs."""
    return torch.compiler.disable(function, reason="depends on numbers that are known only when it runs")


def _attention_as_it_is(function: Callable[..., Any]) -> Callable[..., Any]:
    """A registered attention function, left out of graphs, that takes what it is told from `Held` as well."""
    if hasattr(function, "left_out"):
        return function

    def attend(*args: Any, held: Held | None = None, **named: Any) -> Any:
        return function(*args, **named, **(held.options if held is not None else {}))

    left_out = _as_it_is(attend)
    left_out.left_out = True  # type: ignore[attr-defined]
    return left_out


def _own_forward(block: Any) -> Callable[..., Any]:
    """A block's forward, bound, without the wrapper that transformers puts around it for activation checkpointing."""
    function = type(block).forward
    while function.__code__.co_name == "forward_with_checkpointing":
        function = function.__wrapped__
    return types.MethodType(function, block)


def _compile(block: Any, backend: Backend) -> None:
    plain = _own_forward(block)
    compiled = torch.compile(plain, backend=backend, dynamic=True)

    @functools.wraps(plain)
    def forward(*args: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return plain(*args, **named)
        if args and args[0]._is_view():  # as the first block's input often is: the others would be compiled for a second time
            args = (args[0].clone(), *args[1:])
        options = {name: named.pop(name) for name in ATTENTION_OPTIONS if name in named}
        if options:
            named["held"] = Held(options)
        try:
            if getattr(block, "gradient_checkpointing", False) and block.training:
                return block._gradient_checkpointing_func(functools.partial(compiled, **named), *args)
            return compiled(*args, **named)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            words = " ".join(str(error).split())
            raise TerraceError(f"parallel.compile: torch could not compile a block; set parallel.compile: false ({words})") from error

    block.forward = forward
