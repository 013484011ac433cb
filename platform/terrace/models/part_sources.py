"""A part of one model class as the source of the same part in another: a ViT becomes the tower of CLIP or SigLIP.

The classes of transformers spell one tower in different ways, and a tower that was pre-trained alone has a tensor more or less.
What such a difference means is decided here and said in the log, never guessed from shapes; two towers whose shapes agree and
whose heads or activations do not are different functions, and are refused.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig

from terrace.models.families.interface import FamilyModel
from terrace.models.families.registry import family_model_named
from terrace.models.tensor_files import Directory
from terrace.recipe.schema import PartName

TOWER = "vision_model."  # how CLIP and SigLIP spell theirs, which every family with such a tower reads
# A layer of a ViT, and of CLIP and SigLIP.
LAYER = {
    "attention.q_proj.": "self_attn.q_proj.", "attention.k_proj.": "self_attn.k_proj.", "attention.v_proj.": "self_attn.v_proj.",
    "attention.o_proj.": "self_attn.out_proj.", "layernorm_before.": "layer_norm1.", "layernorm_after.": "layer_norm2.",
    "mlp.fc1.": "mlp.fc1.", "mlp.fc2.": "mlp.fc2.",
}  # fmt: skip
SPELT_LIKE_VIT = ("vit", "vit_mae")
SPECIFICS = {"num_attention_heads": "attention heads", "hidden_act": "activation"}


def part_directory(directory: Directory, family: FamilyModel, skeleton: Any) -> Directory:
    """The directory as the source of a part of another model; itself where its names are ones that the family reads."""
    kind = directory.config.get("model_type")
    if kind in SPELT_LIKE_VIT and family.family.name != kind and not family.reads_vit:
        return VitAsTower(directory, family, {name for name, _ in skeleton.named_parameters()})
    return directory


def differences(config: Any, directory: Directory | None, part: PartName) -> list[str]:
    """What differs between a part of the model and that of a directory although no shape shows it; nothing where a side does not say."""
    if directory is None or part == "projector":
        return []
    ours, theirs = _part_config(config, part), _part_config(_configuration(directory), part)
    found = []
    for field, words in SPECIFICS.items():
        here, there = getattr(ours, field, None), getattr(theirs, field, None)
        if here is not None and there is not None and here != there:
            found.append(f"{words} of the {part} part: {there} in {directory.path}, the model has {here} ({field})")
    return found


def _configuration(directory: Directory) -> Any:
    values = dict(directory.config)
    try:
        return AutoConfig.for_model(values.pop("model_type"), **values)
    except (KeyError, ValueError, TypeError):
        return None  # no class of transformers, or of another form: nothing is known beyond the shapes


def _part_config(config: Any, part: PartName) -> Any:
    return getattr(config, {"vision": "vision_config", "language": "text_config"}[part], config)


class VitAsTower(Directory):
    """The encoder of a ViT (`vit`, `vit_mae`) read as a tower of CLIP or SigLIP, under the names of the family that takes it.

    CLIP's patches have no bias: the ViT's is the same number in every patch, and so part of its positions. CLIP has a norm in front of
    its blocks, which begins with its class's ones and zeros. SigLIP has no class token: it and its position are left behind.
    """

    def __init__(self, source: Directory, family: FamilyModel, wanted: set[str]) -> None:
        self.path, self._source, self._target = source.path, source, family
        self.__dict__["config"] = source.config  # in place of the cached property
        canonical = family_model_named(source.config["model_type"]).canonical_name
        self._stored = {canonical(name).removeprefix("vit."): name for name in source.names}
        self._class_token = family.canonical_name(f"{TOWER}embeddings.class_embedding") in wanted
        self._of = {self._target.canonical_name(TOWER + name): stored for name, stored in self._spelling().items()}

    def _spelling(self) -> dict[str, tuple[str, ...]]:
        """Tensor of the tower -> those of the ViT that it is made from."""
        patches = "embeddings.patch_embeddings.projection"
        names = {
            "embeddings.patch_embedding.weight": (f"{patches}.weight",),
            "embeddings.position_embedding.weight": ("embeddings.position_embeddings", f"{patches}.bias"),
            "post_layernorm.weight": ("layernorm.weight",), "post_layernorm.bias": ("layernorm.bias",),
        }  # fmt: skip
        if self._class_token:
            names["embeddings.class_embedding"] = ("embeddings.cls_token",)
        else:
            names["embeddings.patch_embedding.bias"] = (f"{patches}.bias",)
        for stored in self._stored:
            before, _, rest = stored.partition("layers.")
            number, _, inner = rest.partition(".")
            for vit, tower in LAYER.items() if not before else ():
                if inner.startswith(vit):
                    names[f"encoder.layers.{number}.{tower}{inner.removeprefix(vit)}"] = (stored,)
        return names

    @property
    def names(self) -> set[str]:
        return {name for name, stored in self._of.items() if self._stored.keys() >= set(stored)}

    def begins_new(self, name: str) -> bool:
        return ".pre_layrnorm." in name or name.startswith(self._target.canonical_name(f"{TOWER}head."))

    def notes(self) -> list[str]:
        if self._class_token:
            return [f"the bias of {self.path}'s patches goes into their positions: the tower's patches have none"]
        return [f"the class token of {self.path} and its position are left out: the tower has none"]

    def shape(self, name: str) -> tuple[int, ...]:
        pieces = [torch.empty(self._source.shape(self._stored[stored]), device="meta") for stored in self._of[name]]
        return tuple(self._made(name, pieces).shape)

    def reads_parts(self, name: str) -> bool:
        return False

    def read(self, name: str) -> torch.Tensor:
        return self._made(name, [self._source.read(self._stored[stored]) for stored in self._of[name]])

    def _made(self, name: str, pieces: list[torch.Tensor]) -> torch.Tensor:
        first = pieces[0]
        if "class_embedding" in name:
            return first.flatten()
        if "position_embedding" not in name:
            return first
        rows = first.flatten(0, -2)
        if not self._class_token:
            return rows[1:]
        return torch.cat([rows[:1], rows[1:] + pieces[1]])
