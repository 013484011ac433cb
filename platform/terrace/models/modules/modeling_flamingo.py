"""Idefics with Flamingo's resampler over the frames of a video. An export carries this file and those it imports.

A video is given as `perceiver_embeddings`: what `model.perceiver_resampler` makes of the tower's features of its frames and their number.
"""

from transformers.models.idefics.modeling_idefics import IdeficsForVisionText2Text

from .configuration_flamingo import FlamingoConfig
from .timed_resampler import TimedResampler


class FlamingoForConditionalGeneration(IdeficsForVisionText2Text):
    config: FlamingoConfig
    config_class = FlamingoConfig

    def __init__(self, config: FlamingoConfig) -> None:
        super().__init__(config)
        latent = config.perceiver_config
        sizes = (latent.resampler_depth, latent.resampler_n_heads, latent.resampler_head_dim, latent.resampler_n_latents)
        self.model.perceiver_resampler = TimedResampler(config.video_frames, config, config.vision_config.embed_dim, *sizes)
        self.post_init()


__all__ = ["FlamingoForConditionalGeneration"]
