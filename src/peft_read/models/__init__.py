"""Video-language backbones as transformers models; importing this package registers them with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM

from .grounding_records import grounding_records, write_submission
from .moment_detr import MomentDetrConfig, MomentDetrForTemporalGrounding
from .umt import UMTConfig, UMTForTemporalGrounding
from .vg_bart import VGBartConfig, VGBartForConditionalGeneration, VGBartModel
from .vg_t5 import VGT5Config, VGT5ForConditionalGeneration
from .vl_bart import VLBartConfig, VLBartForConditionalGeneration, VLBartModel
from .vl_t5 import VLT5Config, VLT5ForConditionalGeneration

__all__ = [
    "MomentDetrConfig",
    "MomentDetrForTemporalGrounding",
    "UMTConfig",
    "UMTForTemporalGrounding",
    "VGBartConfig",
    "VGBartForConditionalGeneration",
    "VGBartModel",
    "VGT5Config",
    "VGT5ForConditionalGeneration",
    "VLBartConfig",
    "VLBartForConditionalGeneration",
    "VLBartModel",
    "VLT5Config",
    "VLT5ForConditionalGeneration",
    "grounding_records",
    "write_submission",
]

AutoConfig.register("moment_detr", MomentDetrConfig)
AutoConfig.register("umt", UMTConfig)
AutoConfig.register("vg_bart", VGBartConfig)
AutoConfig.register("vg_t5", VGT5Config)
AutoConfig.register("vl_bart", VLBartConfig)
AutoConfig.register("vl_t5", VLT5Config)
AutoModel.register(MomentDetrConfig, MomentDetrForTemporalGrounding)
AutoModel.register(UMTConfig, UMTForTemporalGrounding)
AutoModel.register(VGBartConfig, VGBartModel)
AutoModel.register(VLBartConfig, VLBartModel)
AutoModelForSeq2SeqLM.register(VGBartConfig, VGBartForConditionalGeneration)
AutoModelForSeq2SeqLM.register(VGT5Config, VGT5ForConditionalGeneration)
AutoModelForSeq2SeqLM.register(VLBartConfig, VLBartForConditionalGeneration)
AutoModelForSeq2SeqLM.register(VLT5Config, VLT5ForConditionalGeneration)
