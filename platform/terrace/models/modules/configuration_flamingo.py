"""Configuration of Flamingo: Idefics with learned embeddings of the times of a video's frames."""

from huggingface_hub.dataclasses import strict
from transformers.models.idefics.configuration_idefics import IdeficsConfig


@strict
class FlamingoConfig(IdeficsConfig):
    model_type = "flamingo"

    video_frames: int = 8  # times that have an embedding
