"""What a person sees of generated text: a stream, headed blocks, or tokens coloured by their iterations."""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from inl_cli.console import Console
from inl_core.inference.settings import GenerationSettings

if TYPE_CHECKING:
    from inl_core.inference.generate import Completion, Piece
    from inl_core.inference.loading import LoadedModel

# From few iterations to many. Black text can be read on each of them, whatever the terminal, and spaces are visible.
_COLOURS = ("#9ecae1", "#a1d99b", "#e5e27a", "#fdae6b", "#fb8072")
_ENDINGS = {
    "eos": "ended by the model",
    "stop": "stopped at a stop string",
    "length": "stopped at --max-new-tokens",
    "context": "the model's context is full",
}


class CompletionView:
    """Shows completions on stdout: a single one as it comes, several in order under headings."""

    def __init__(
        self,
        console: Console,
        loaded: "LoadedModel",
        settings: GenerationSettings,
        *,
        prompts: list[str],
        show_iterations: bool,
    ) -> None:
        from inl_core.inference.evaluate import most_iterations

        self.console, self.tokenizer, self.settings = console, loaded.tokenizer, settings
        self.prompts = prompts
        self.max_iterations = most_iterations(loaded.model, settings.num_iterations) or 0.0
        self.show_iterations = show_iterations and self.max_iterations > 0
        if show_iterations and not self.show_iterations:
            console.warn(f"{loaded.model.config.without_integrator}: there are no iterations to show")

    @property
    def is_single(self) -> bool:
        """Whether there is one completion, which needs no heading."""
        return len(self.prompts) * self.settings.num_samples == 1

    def show(self, pieces: "Iterable[Piece]") -> "list[Completion]":
        """Print what comes, and return all completions by prompt and sample."""
        if self.is_single and not self.show_iterations:
            return self._show_stream(pieces)
        if self.show_iterations and self._has_colour:
            self._show_legend()
        done = []
        for completion in self._in_order(pieces):
            done.append(completion)
            if not self.is_single:
                heading = f"prompt {completion.prompt_index + 1} of {len(self.prompts)}"
                if self.settings.num_samples > 1:
                    heading += f", sample {completion.sample_index + 1} of {self.settings.num_samples}"
                self.console.write(f"=== {heading}\n")
            self._show_completion(completion)
        return done

    def summary(self, completions: "list[Completion]", seconds: float) -> str:
        """One line: how much, how fast, how many iterations, and why it ended."""
        used = [iterations for completion in completions for iterations in completion.iterations]
        parts = [f"{len(used):,} tokens in {seconds:.1f} s, {len(used) / max(seconds, 1e-9):,.0f} tokens/s"]
        if self.max_iterations:
            parts.append(f"{sum(used) / len(used):.2f} of {self.max_iterations:g} iterations a token")
        reasons = Counter(_ENDINGS[completion.finish_reason] for completion in completions)
        parts += [reason if self.is_single else f"{count} {reason}" for reason, count in reasons.items()]
        return "; ".join(parts)

    def _show_stream(self, pieces: "Iterable[Piece]") -> "list[Completion]":
        done = []
        self.console.write(self.prompts[0])
        for piece in pieces:
            if piece.completion is not None:
                done.append(piece.completion)
            self.console.write(piece.text)
        self.console.write("\n")
        return done

    def _in_order(self, pieces: "Iterable[Piece]") -> "Iterator[Completion]":
        """Completions as soon as all before them are done."""
        waiting: dict[tuple[int, int], Completion] = {}
        following = iter((p, s) for p in range(len(self.prompts)) for s in range(self.settings.num_samples))
        wanted = next(following)
        for piece in pieces:
            if piece.completion is not None:
                waiting[piece.prompt_index, piece.sample_index] = piece.completion
            while wanted in waiting:
                yield waiting.pop(wanted)
                wanted = next(following, (-1, -1))

    def _show_completion(self, completion: "Completion") -> None:
        if not self.show_iterations:
            self.console.write(f"{completion.prompt}{completion.text}\n")
        elif self._has_colour:
            self._show_coloured(completion)
        else:
            from inl_core.inference.generate import token_texts

            self.console.write(f"{completion.prompt}{completion.text}\n")
            rows = [(repr(text), f"{used:.2f}") for text, used in token_texts(self.tokenizer, completion)]
            title = f"integrator iterations a token, mean over layers, at most {self.max_iterations:g}"
            self.console.table(title, ("token", "iterations"), rows)

    @property
    def _has_colour(self) -> bool:
        rich_console = self.console.rich_stdout
        return rich_console.color_system is not None and not rich_console.no_color

    def _show_coloured(self, completion: "Completion") -> None:
        from rich.text import Text

        from inl_core.inference.generate import token_texts

        line = Text(completion.prompt)
        for text, used in token_texts(self.tokenizer, completion):
            line.append(text, style=self._style(used))
        self.console.rich_stdout.print(line, soft_wrap=True)

    def _show_legend(self) -> None:
        from rich.text import Text

        legend = Text("integrator iterations a token, mean over layers: ")
        for index in range(len(_COLOURS)):
            share = index / (len(_COLOURS) - 1)
            value = 1 + share * (self.max_iterations - 1)
            legend.append(f" {value:.2f} ", style=self._style(value))
        self.console.rich_stdout.print(legend, soft_wrap=True)

    def _style(self, used: float) -> str:
        share = (used - 1) / (self.max_iterations - 1) if self.max_iterations > 1 else 0.0
        return f"black on {_COLOURS[round(min(max(share, 0.0), 1.0) * (len(_COLOURS) - 1))]}"
