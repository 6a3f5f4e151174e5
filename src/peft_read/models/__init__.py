"""Video-language backbones as transformers models; importing this package registers them with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM

from .vg_bart import VGBartConfig, VGBartForConditionalGeneration, VGBartModel

__all__ = ["VGBartConfig", "VGBartForConditionalGeneration", "VGBartModel"]

AutoConfig.register("vg_bart", VGBartConfig)
AutoModel.register(VGBartConfig, VGBartModel)
AutoModelForSeq2SeqLM.register(VGBartConfig, VGBartForConditionalGeneration)
