"""What a run's newest checkpoint does on a text: a section of parts, and what they say."""

from collections.abc import Callable

import numpy as np

from inl_core.analysis.convergence.report import report_convergence
from inl_core.analysis.report.convergence import convergence_findings, convergence_parts
from inl_core.analysis.report.forces import ablation_part, forces_part, term_findings
from inl_core.analysis.report.jacobians import measure_reactions
from inl_core.analysis.report.parts import Finding, Part, Section
from inl_core.analysis.report.paths import paths_part
from inl_core.analysis.report.probe import Probe, probe
from inl_core.analysis.report.reactions import reaction_findings, reaction_parts
from inl_core.analysis.report.tokens import grouped_parts, text_part, token_names
from inl_core.inference.loading import LoadedModel
from inl_core.inference.texts import Text, default_window


def examine(
    name: str,
    loaded: LoadedModel,
    text: Text,
    *,
    max_tokens: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Section:
    """Measure a checkpoint on the first `max_tokens` tokens of a text.

    Args:
        name: what the report calls its run.
    """
    window = min(default_window(loaded), max(1, text.num_targets))
    found = probe(loaded, text, max_tokens=max_tokens, window=window)
    tokens = f"{len(found.loss):,} tokens of {text.name}"
    note = f"{loaded.path}, measured on {tokens}, in windows of {window:,}: all of this section is about these tokens."
    title = f"{name}: what the model does"
    if not np.isfinite(found.loss).all():
        sentence = f"{name}: the model of {loaded.path} gives losses that are not finite, so nothing else is measured."
        return Section(title, [], note, [Finding(sentence)])
    parts, findings = [], []
    if loaded.model.config.has_dynamics:
        report, _ = report_convergence(loaded, text, max_tokens=max_tokens, sample_tokens=1, progress=progress)
        summary = report.summary()
        findings = [*term_findings(name, found, summary), *convergence_findings(name, summary)]
        parts += [forces_part(name, found), ablation_part(name, summary), *convergence_parts(name, summary)]
        reactions = measure_reactions(loaded.model, text)
        findings += reaction_findings(name, reactions)
        parts += reaction_parts(name, reactions)
        parts.append(paths_part(name, found, token_names(loaded.tokenizer, found.token_ids.tolist())))
    return Section(title, [*parts, *_of_tokens(name, loaded, found)], note, findings)


def _of_tokens(name: str, loaded: LoadedModel, found: Probe) -> list[Part]:
    return [text_part(name, found, loaded.tokenizer), *grouped_parts(name, found, loaded.tokenizer)]
