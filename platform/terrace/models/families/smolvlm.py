"""SmolVLM with torch: Idefics3's names and forward."""

from terrace.models.families.idefics3 import Idefics3Model

MODEL = Idefics3Model
