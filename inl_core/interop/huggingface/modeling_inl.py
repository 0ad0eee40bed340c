"""The code that lies in an exported directory, for `from_pretrained(..., trust_remote_code=True)`.

The model itself is the `inl` package's; this file only finds it.
"""

try:
    from inl_core.interop.huggingface import InlConfig, InlForCausalLM
except ModuleNotFoundError as error:
    raise ImportError(
        f'this model is computed by the inl package, which was not found ({error}): pip install "inl[hf]"'
    ) from error

__all__ = ["InlConfig", "InlForCausalLM"]
