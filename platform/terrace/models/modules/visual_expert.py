"""CogVLM's visual expert: in every layer image tokens have matrices of their own, for attention and feed-forward, beside the text's.

Both kinds of tokens attend to each other as before; only which matrix a token is multiplied by depends on its kind. Since a feed-forward
works token by token, an own matrix for each of its linear layers is an own feed-forward. The text's matrices keep their names, so a
language model's checkpoint fits, and a model without images computes what it did.
"""

from typing import Any

import torch
from torch import nn

LAYERS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


class Places:
    """Where the image tokens of the present call are: rows of its tokens, one after another; None where there are none."""

    def __init__(self) -> None:
        self.image: torch.Tensor | None = None
        self.text: torch.Tensor | None = None
        self.back: torch.Tensor | None = None  # where each token stands when those of the text are followed by those of images

    def set(self, places: torch.Tensor | None) -> None:
        """`places` is bool [batch, tokens]."""
        flat = None if places is None else places.reshape(-1)
        self.image, self.text = (None, None) if flat is None else (flat.nonzero()[:, 0], (~flat).nonzero()[:, 0])
        self.back = None if flat is None else torch.cat([self.text, self.image]).argsort()  # type: ignore[list-item]


class VisualExpertLinear(nn.Linear):
    """The text's linear layer, with `image` beside it for image tokens."""

    def __init__(self, text: nn.Linear, places: Places) -> None:
        super().__init__(text.in_features, text.out_features, bias=text.bias is not None)
        self.image = nn.Linear(text.in_features, text.out_features, bias=text.bias is not None)
        self.places = places

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        image, text = self.places.image, self.places.text
        if image is None or text is None:  # the other matrix still takes part, with nothing: every rank has the same gradients
            return super().forward(input) + self.image(input.reshape(-1, input.shape[-1])[:0]).sum()
        tokens = input.reshape(-1, input.shape[-1])
        out = torch.cat([super().forward(tokens[text]), self.image(tokens[image])])[self.places.back]
        return out.view(*input.shape[:-1], self.out_features)


def add_visual_experts(language_model: Any) -> None:
    """Give every layer of a language model its visual expert. Its forward then takes `image_places`, bool [batch, tokens]."""
    places = Places()
    for layer in language_model.layers:
        for name in LAYERS:
            owner, leaf = getattr(layer, name.partition(".")[0]), name.partition(".")[2]
            setattr(owner, leaf, VisualExpertLinear(getattr(owner, leaf), places))
    language_model.register_forward_pre_hook(_tell_places, with_kwargs=True)


def _tell_places(language_model: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    language_model.layers[0].self_attn.q_proj.places.set(options.pop("image_places", None))
    return arguments, options
