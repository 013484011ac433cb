"""One pack through the model: embeddings, image features in their places, language layers, segments kept apart.

This calls the parts of the transformers class directly rather than its own `forward`, for three reasons: the segments
of vision and language are different and transformers would mix their keyword arguments; the text-only guard sits
between the parts; and logits of the whole pack (151,680 columns) must never exist. That it computes the same is a
test, not a claim.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids, get_vision_window_index

from terrace.errors import DamagedData
from terrace.models.batch import DeviceBatch
from terrace.models.guard import blank_image, count_as_zero
from terrace.models.sequence_parallel import with_features


def vision_layout(grids: torch.Tensor, config: Any, device: torch.device) -> dict[str, Any]:
    """Everything the vision tower derives from the image grids, computed on the host and copied once.

    `grids` is int64 [I, 3] on the host. transformers would compute the same on the device and wait for it several
    times.
    """
    merge = config.spatial_merge_size
    images = get_vision_cu_seqlens(grids)
    layout: dict[str, Any] = {
        "position_ids": get_vision_position_ids(grids, merge).to(device, non_blocking=True),
        "cu_seqlens": images.to(device, non_blocking=True),
        "max_seqlen": int(images.diff().max()),
    }
    if hasattr(config, "window_size"):  # Qwen2.5-VL; Qwen2-VL attends over whole images in every block
        index, windows = get_vision_window_index(
            grids, spatial_merge_size=merge, window_size=config.window_size, patch_size=config.patch_size
        )
        layout["window_index"] = index.to(device, non_blocking=True)
        layout["cu_window_seqlens"] = windows.to(device, non_blocking=True)
        layout["max_window_seqlen"] = int(windows.diff().max())
    return layout


def image_features(model: Any, pixel_values: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
    """Pixel values [P, 1176] and grids [I, 3] -> visual tokens [P / 4, hidden] in token order (vision, then
    projector)."""
    visual = model.model.visual
    layout = vision_layout(grids, visual.config, pixel_values.device)
    return visual(pixel_values, grid_thw=grids.to(pixel_values.device), **layout).pooler_output


def check_placeholders(batch: DeviceBatch, config: Any) -> None:
    """Raise DamagedData if the image tokens of the pack are not as many as its grids say."""
    example = batch.example
    ids = example.input_ids
    tokens = int(((ids == config.image_token_id) | (ids == config.video_token_id)).sum())
    merge = config.vision_config.spatial_merge_size**2
    expected = int(example.image_grids.astype("int64").prod(axis=1).sum()) // merge if len(example.image_grids) else 0
    if tokens != expected:
        raise DamagedData(
            f"pack {example.pack} has {tokens} image tokens and images for {expected} "
            f"(samples {', '.join(example.sample_ids)}): index and shards disagree, ingest this source again"
        )


def pack_hidden(model: Any, batch: DeviceBatch) -> torch.Tensor:
    """Hidden states [L, hidden] of a pack after the final norm (with sequence parallelism: of this rank's tokens).

    `model` is the transformers class itself, not a wrapper.
    """
    config = model.config
    check_placeholders(batch, config)
    embeddings = model.model.language_model.embed_tokens(batch.input_ids)
    options: dict[str, Any] = {}
    has_images = batch.pixel_values is not None and batch.image_grids is not None
    if has_images:
        features = image_features(model, batch.pixel_values, batch.image_grids)
    else:
        dtype = next(model.model.visual.patch_embed.parameters()).dtype
        features = image_features(model, *blank_image(batch.device, dtype))
    if batch.sequence is not None:
        embeddings = with_features(embeddings, features, batch, config)
        options["sequence_group"] = batch.sequence.group
    elif has_images:
        places = (batch.input_ids == config.image_token_id) | (batch.input_ids == config.video_token_id)
        embeddings = embeddings.masked_scatter(places.unsqueeze(-1), features.to(embeddings.dtype))
    else:
        embeddings = count_as_zero(embeddings, features)
    output = model.model.language_model(
        inputs_embeds=embeddings,
        position_ids=batch.position_ids,
        attention_mask=None,
        use_cache=False,
        cu_seq_lens_q=batch.cu_seqlens,
        cu_seq_lens_k=batch.cu_seqlens,
        max_length_q=batch.longest,
        max_length_k=batch.longest,
        segment_boundaries=batch.boundaries,
        **options,
    )
    return output.last_hidden_state[0]


def pack_logits_hidden(model: Any, batch: DeviceBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits [L, vocabulary], hidden [L, hidden]) of a pack. For tests and small evaluations: all logits exist at
    once."""
    hidden = pack_hidden(model, batch)
    return model.lm_head(hidden), hidden
