"""Our models in `transformers`: once this is imported, its Auto classes know `model_type: "inl"`.

    import inl_core.interop.huggingface
    model = AutoModelForCausalLM.from_pretrained("exported")     # no remote code is needed

- modeling.py holds the configuration, the model and the cache that transformers sees; the model inside is ours.
- export.py writes a checkpoint as a directory that transformers loads, and compares the logits of the two.
- llama.py writes a model that computes what a Llama computes as a Llama, for programs that know no other models.
"""

try:
    import transformers as _transformers
except ImportError:
    raise ImportError('inl_core.interop.huggingface needs transformers: pip install "inl[hf]"') from None

from inl_core.interop.huggingface.modeling import InlCache, InlConfig, InlForCausalLM

_transformers.AutoConfig.register("inl", InlConfig, exist_ok=True)
_transformers.AutoModelForCausalLM.register(InlConfig, InlForCausalLM, exist_ok=True)

__all__ = ["InlCache", "InlConfig", "InlForCausalLM"]
