"""Video-language backbones as transformers models."""
