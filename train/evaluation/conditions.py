"""What answers are given under: every context of an evaluation, in groups.

original, held-out (accepted mutations that no student is trained on), templates (written by hand), none, learned (soft
and KV contexts), other (named on the command line).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvopt.contexts import Context, TextContext
from kvopt.contexts.initial import split_spec
from kvopt.errors import InputError
from kvopt.files import file_name, sha256_json
from kvopt.run import Run
from kvopt.select import split_count
from kvopt.template import Template
from kvopt.train.config import OnPolicyConfig, StudentConfig
from kvopt.train.evaluation.config import EvaluateConfig
from kvopt.train.evaluation.templates import read_templates
from kvopt.train.pool import is_mutation, resolve

GROUPS = ("original", "held-out", "templates", "none", "learned", "other")
WORDINGS = ("original", "held-out", "templates")
"""The groups whose contexts state the task in words: together they are the group "wordings"."""
PROBES = ("frozen-prompt", "probes")
"""Files of an evaluation that belong to no context."""


@dataclass(frozen=True)
class Condition:
    """A context that answers are given under."""

    group: str
    context: Context

    @property
    def name(self) -> str:
        return self.context.name

    @property
    def is_text(self) -> bool:
        return isinstance(self.context, TextContext)


def conditions(run: Run, settings: EvaluateConfig, students: Sequence[StudentConfig]) -> list[Condition]:
    """Every context of the ``evaluate`` section.

    Args:
        students: all that the config trains; mutations that any of them is trained on are not held out.

    Raises:
        InputError: templates that cannot be used, names that are taken twice, learned contexts that do not exist.
    """
    learned = _learned_names(run, settings)
    templates = [run.text_context(name, template) for name, template in hand_written(run, settings).items()]
    found = [Condition("original", run.original)]
    found += [Condition("held-out", context) for context in held_out_mutations(run, settings, students)]
    found += [Condition("templates", context) for context in templates]
    found.append(Condition("none", run.none))
    found += [Condition("learned", context) for context in (run.learned(learned) if learned else ())]
    _check_names(found, "evaluate.templates")
    return found


def named_conditions(
    run: Run, specs: Sequence[str], settings: EvaluateConfig, students: Sequence[StudentConfig]
) -> list[Condition]:
    """The conditions that ``--context`` names: one of the config's, a whole group, or any other context. Mutations and
    learned contexts are made only where a spec asks for them. Raises InputError, as :func:`conditions`.
    """
    found: list[Condition] = []
    for spec in specs:
        known = _known(run, spec, settings, students)
        found += known or [Condition("other", context) for context in run.named_context(spec)]
    unique = list({condition.name: condition for condition in found}.values())
    _check_names(unique, "--context")
    return unique


def _known(run: Run, spec: str, settings: EvaluateConfig, students: Sequence[StudentConfig]) -> list[Condition]:
    """The conditions of the ``evaluate`` section that have this name or are of this group."""
    if spec in ("original", "none"):
        return [Condition(spec, run.original if spec == "original" else run.none)]
    templates = hand_written(run, settings)
    if names := [name for name in templates if spec in (name, "templates")]:
        return [Condition("templates", run.text_context(name, templates[name])) for name in names]
    if learned := [name for name in _learned_names(run, settings) if spec in (name, "learned")]:
        return [Condition("learned", context) for context in run.learned(learned)]
    if spec == "held-out" or is_mutation(run, spec):
        held_out = held_out_mutations(run, settings, students)
        return [Condition("held-out", context) for context in held_out if spec in (context.name, "held-out")]
    return []


def hand_written(run: Run, settings: EvaluateConfig) -> dict[str, Template]:
    """The templates written by hand, by name. Raises InputError."""
    return {} if settings.templates is None else read_templates(run.base_dir / settings.templates, run.template)


def held_out_mutations(run: Run, settings: EvaluateConfig, students: Sequence[StudentConfig]) -> list[TextContext]:
    """``held_out_mutations`` accepted mutations of those that no student is trained on, and that no learned context
    starts from; fewer, with a warning, when there are not enough. They are the first of an order that the config's seed
    and their own texts decide, so that another arm or more mutations change as few of them as can be, and what was
    evaluated under the others stays.
    """
    if settings.held_out_mutations == 0:
        return []
    if run.config.mutations.count == 0:
        run.say("warning: no held-out mutations, because mutations.count is 0")
        return []
    used = mutations_in_use(run, students)
    free = [context for context in run.mutation_contexts if context.name not in used]
    drawn = sorted(free, key=lambda context: sha256_json(["held-out", run.config.seed, context.template.sha256]))
    chosen = drawn[: settings.held_out_mutations]
    if len(chosen) < settings.held_out_mutations:
        run.say(
            f"warning: {len(chosen)} mutations are held out, not {settings.held_out_mutations}: of"
            f" {len(run.mutation_contexts)} accepted ones {len(used)} are trained on; raise mutations.count"
        )
    return sorted(chosen, key=lambda context: context.name)


def mutations_in_use(run: Run, students: Sequence[StudentConfig]) -> set[str]:
    """Names of the mutations that students are trained on: their own contexts, what a teacher sees, and what a learned
    context starts from.
    """
    used: set[str] = set()
    for student in students:
        taken: set[str] = set()
        seed = run.config.seed if student.seed is None else student.seed
        for choice in student.contexts:
            where = f"students.{student.name}.contexts"
            if split_count(choice.context, where):
                found = resolve(run, choice, seed, taken, where)
                taken |= {context.name for context in found}
            else:
                taken.add(choice.context)
        used |= taken
        if isinstance(student.loss, OnPolicyConfig):
            used.add(student.loss.teacher.context)
    for context in run.config.contexts:
        kind, argument = split_spec(context.init, context.name)
        if kind == "best-mutation" and run.ranked_mutations:
            used.add(run.ranked_mutations[0][0].name)
        elif kind == "mutation":
            used.add(argument)
    return used & {context.name for context in run.mutation_contexts}


def _learned_names(run: Run, settings: EvaluateConfig) -> list[str]:
    names = [context.name for context in run.config.contexts]
    for name in settings.contexts or ():
        if name not in names:
            mend = "known: " + (", ".join(names) or "none")
            raise InputError(f"no learned context {name!r}", where="evaluate.contexts", mend=mend)
    return names if settings.contexts is None else list(settings.contexts)


def _check_names(found: Sequence[Condition], where: str) -> None:
    """Refuse names whose answers would be stored in one file, or in that of a probe. Raises InputError."""
    names: dict[str, str] = {}
    for condition in found:
        name, file = condition.name, file_name(condition.name)
        if file in PROBES:
            raise InputError(f"{name!r} is the name of a probe", where=where, mend="name the context otherwise")
        if names.get(file) == name:
            raise InputError(f"two contexts are named {name!r}", where=where, mend="name the template otherwise")
        if file in names:
            what = f"answers under {names[file]!r} and {name!r} would be stored in one file"
            raise InputError(what, where=where, mend="name one of them otherwise")
        names[file] = name
