"""A checkpoint's tokenizer as transformers' AutoTokenizer loads it.

- Encoding puts the begin token in front, as everywhere in this project, and pads on the left. Padding is the begin
  token, which no model is trained to predict.
- Here a special token that is spelt in a text becomes that token, as transformers does it and chat templates need it;
  within this project text never becomes a special token.
"""

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers.processors import TemplateProcessing

from inl_core.corpus.tokenizer import Tokenizer


def convert_tokenizer(tokenizer: Tokenizer, *, max_seq_len: int, chat_template: str | None = None) -> Any:
    """transformers' tokenizer with the same ids for the same text."""
    from transformers import PreTrainedTokenizerFast

    names = {id: name for name, id in tokenizer.special_ids.items()}
    bos, eos = names[tokenizer.bos_id], names[tokenizer.eos_id]
    backend = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    backend.post_processor = TemplateProcessing(  # pyright: ignore - the stubs have no setter
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.bos_id)]
    )
    converted = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token=eos,
        pad_token=bos,
        model_max_length=max_seq_len,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
    converted.chat_template = chat_template
    return converted


def save_tokenizer(converted: Any, directory: Path) -> None:
    """Write it under the name of its class that transformers 4 knows, too; transformers 5 would write another one."""
    converted.save_pretrained(directory)
    file = directory / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
