"""A conversation -> the prompt that the checkpoint's chat template makes of it."""

from dataclasses import replace

from inl_core.corpus.chat_template import encode_chat, end_of_answer
from inl_core.errors import ArtefactError, RecipeError
from inl_core.inference.generate import Request, check_length
from inl_core.inference.loading import LoadedModel
from inl_core.interop.server.bodies import BadRequest, ChatBody, check_size


def chat_request(loaded: LoadedModel, body: ChatBody) -> Request:
    """The conversation as one prompt, which the assistant's answer follows.

    Raises:
        BadRequest: the checkpoint has no chat template, the template refuses the conversation, or it is too long.
    """
    template, tokenizer = loaded.chat_template, loaded.tokenizer
    if template is None:
        raise BadRequest("this model has no chat template: use /v1/completions", parameter="messages")
    context = loaded.model.config.max_seq_len
    try:
        messages = [message.plain() for message in body.messages]
        if len(messages) > context:  # each has at least the token that ends it
            raise RecipeError(f"{len(messages):,} messages cannot fit, the model's context holds {context:,} tokens")
        check_size(sum(len(message["content"]) for message in messages), "the conversation", tokenizer, context)
        ids = encode_chat(tokenizer, template, messages)
        check_length(ids, "the conversation", max_seq_len=context)
    except (ArtefactError, RecipeError) as error:
        raise BadRequest(str(error), parameter="messages") from None
    settings = body.settings(max_new_tokens=context)  # an answer ends by itself, or where the context does
    return Request(tuple(ids), replace(settings, end_ids=(end_of_answer(tokenizer, template),)))
