"""Our models that Hugging Face transformers has, by our names."""

from milepost.ckpt.foreign import gpt2_architecture, llama_architecture

ARCHITECTURES = {each.model_type: each for each in (gpt2_architecture.ARCHITECTURE, llama_architecture.ARCHITECTURE)}
