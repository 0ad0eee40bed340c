"""Our model as lm-eval asks it: log-likelihoods of continuations and of whole texts, and answers.

- Log-likelihoods are those of inl_core/inference/scoring.py.
- A context that is too long loses its beginning, as with lm-eval's own models.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from inl_core.inference.generate import generate
from inl_core.inference.loading import LoadedModel
from inl_core.inference.scoring import score_tokens
from inl_core.inference.settings import GenerationSettings
from inl_core.interop.harness.settings import Progress, TaskSettings

_DEFAULT_NEW_TOKENS = 256
"""As lm-eval has it, where a task says nothing."""


class InlLM(TemplateLM):
    """Answers lm-eval's three kinds of requests; TemplateLM divides a text into context and continuation."""

    def __init__(self, loaded: LoadedModel, settings: TaskSettings, progress: Progress) -> None:
        super().__init__()
        self.loaded, self.settings, self.progress = loaded, settings, progress

    @property
    def eot_token_id(self) -> int:
        return self.loaded.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.loaded.tokenizer.bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        ids = self.loaded.tokenizer.encode(string)
        return ids if add_special_tokens is False else [self.prefix_token_id, *ids]

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: list[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        found = self._score([(context, wanted) for _, context, wanted in requests], "continuations")
        for (key, _, _), result in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", key, result)
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        pairs, owners = [], []
        for index, request in enumerate(requests):
            windows = get_rolling_token_windows(
                self.tok_encode(request.args[0], add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.loaded.model.config.max_seq_len,
                context_len=1,
            )
            for window in windows:
                pairs.append(make_disjoint_window(window))
                owners.append(index)
        totals = [0.0] * len(requests)
        for owner, (total, _) in zip(owners, self._score(pairs, "windows"), strict=True):
            totals[owner] += total
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        groups: dict[GenerationSettings, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            groups[generation_settings(request.args[1], self.settings)].append(index)
        texts, done, told = [""] * len(requests), 0, self._told("answers")
        for settings, members in groups.items():
            for first in range(0, len(members), settings.batch_size):
                part = members[first : first + settings.batch_size]
                prompts = [self._fitting(requests[index].args[0], settings.max_new_tokens) for index in part]
                completions = generate(self.loaded.model, self.loaded.tokenizer, prompts, settings)
                for index, completion in zip(part, completions, strict=True):
                    texts[index] = completion.text
                done += len(part)
                told(done, len(requests))
        return texts

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]], what: str) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation in nats, and whether greedy decoding would write it."""
        scores = score_tokens(
            self.loaded.model,
            pairs,
            batch_size=self.settings.batch_size,
            options=self.settings.options,
            bf16=self.settings.bf16,
            progress=self._told(what),
        )
        return [(score.total, score.is_greedy) for score in scores]

    def _fitting(self, prompt: str, new_tokens: int) -> str:
        """The end of a prompt that leaves room for its answer."""
        tokenizer, longest = self.loaded.tokenizer, self.loaded.model.config.max_seq_len
        room = max(1, longest - min(new_tokens, longest // 2)) - 1
        ids, keep = tokenizer.encode(prompt), room
        while len(ids) > room:  # a text that was cut may take more tokens than it was cut to
            prompt, keep = tokenizer.decode(ids[-keep:]), keep - 1
            ids = tokenizer.encode(prompt)
        return prompt

    def _told(self, what: str) -> Callable[[int, int], None]:
        return lambda done, total: self.progress(what, done, total)


def generation_settings(given: dict[str, Any], settings: TaskSettings) -> GenerationSettings:
    """lm-eval's arguments of one `generate_until` request as ours; greedy unless it says do_sample."""
    until = given.get("until") or []
    names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    samples = bool(given.get("do_sample", float(given.get("temperature") or 0) > 0))
    return GenerationSettings(
        max_new_tokens=next((int(given[name]) for name in names if given.get(name)), _DEFAULT_NEW_TOKENS),
        temperature=float(given.get("temperature") or 1.0) if samples else 0.0,
        top_k=given.get("top_k") or None if samples else None,
        top_p=given.get("top_p") if samples else None,
        stop=tuple(stop for stop in ([until] if isinstance(until, str) else until) if stop),
        num_iterations=settings.options.num_iterations if isinstance(settings.options.num_iterations, int) else None,
        early_stopping=settings.options.early_stopping,
        batch_size=settings.batch_size,
        bf16=settings.bf16,
    )
