"""What answers are given under: every context of an evaluation, in groups.

original, held-out (accepted mutations that no student is trained on), templates (written by hand), none, learned (soft
and KV contexts), other (named on the command line).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvopt.config.evaluation import EvaluateConfig
from kvopt.config.names import MUTATION, ContextName
from kvopt.config.students import StudentConfig
from kvopt.contexts import Context, TextContext
from kvopt.errors import InputError, counted
from kvopt.run.catalogue import Catalogue
from kvopt.run.inputs import Inputs
from kvopt.storage.files import file_name, sha256_json
from kvopt.task.template import Template
from kvopt.task.template_files import read_templates
from kvopt.train.losses.on_policy import OnPolicyDivergence
from kvopt.train.pool import names_of

GROUPS = ("original", "held-out", "templates", "none", "learned", "other")
PROBES = ("frozen-prompt", "probes", "posix")
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


def evaluated_names(inputs: Inputs, settings: EvaluateConfig, students: Sequence[StudentConfig]) -> list[ContextName]:
    """What must be in the catalogue for :func:`conditions`: learned contexts, and with held-out mutations all that says
    which mutations are in use.
    """
    learned = [ContextName.parse(name, "evaluate.contexts") for name in learned_names(inputs, settings)]
    if settings.held_out_mutations == 0 or inputs.config.mutations.count == 0:
        return learned
    ordered = [name for student in students for name in names_of(student) if name.form in ("counted", "mutation")]
    starts = [context.start.source for context in inputs.config.learned if context.start.kind == "best-mutation"]
    any_mutation = ContextName.parse("random-mutations:1", "evaluate")
    return [*learned, any_mutation, *ordered, *(name for name in starts if name is not None)]


def conditions(catalogue: Catalogue, settings: EvaluateConfig, students: Sequence[StudentConfig]) -> list[Condition]:
    """Every context of the ``evaluate`` section.

    Args:
        catalogue: holds :func:`evaluated_names`.
        students: all that the config trains; mutations that any of them is trained on are not held out.

    Raises:
        InputError: templates that cannot be used, names that are taken twice, learned contexts that do not exist.
    """
    task = catalogue.task
    learned = [catalogue.learned[name] for name in learned_names(task.inputs, settings)]
    templates = [task.text_context(name, template) for name, template in hand_written(task.inputs, settings).items()]
    listed = [Condition("original", task.original)]
    listed += [Condition("held-out", context) for context in held_out_mutations(catalogue, settings, students)]
    listed += [Condition("templates", context) for context in templates]
    listed.append(Condition("none", task.none))
    listed += [Condition("learned", context) for context in learned]
    check_names(listed, "evaluate.templates")
    return listed


def names_behind(
    spec: str, inputs: Inputs, settings: EvaluateConfig, students: Sequence[StudentConfig]
) -> list[ContextName]:
    """What must be in the catalogue for :func:`conditions_named`: nothing but what the spec asks for."""
    if learned := [name for name in learned_names(inputs, settings) if spec in (name, "learned")]:
        return [ContextName.parse(name, "--context") for name in learned]
    return evaluated_names(inputs, settings, students) if _asks_for_held_out(spec, inputs) else []


def conditions_named(
    spec: str, catalogue: Catalogue, settings: EvaluateConfig, students: Sequence[StudentConfig]
) -> list[Condition]:
    """The conditions of the ``evaluate`` section that have this name or are of this group; none for any other."""
    task = catalogue.task
    if spec in ("original", "none"):
        return [Condition(spec, task.original if spec == "original" else task.none)]
    templates = hand_written(task.inputs, settings)
    if names := [name for name in templates if spec in (name, "templates")]:
        return [Condition("templates", task.text_context(name, templates[name])) for name in names]
    if names := [name for name in learned_names(task.inputs, settings) if spec in (name, "learned")]:
        return [Condition("learned", catalogue.learned[name]) for name in names]
    if _asks_for_held_out(spec, task.inputs):
        held_out = held_out_mutations(catalogue, settings, students)
        return [Condition("held-out", context) for context in held_out if spec in (context.name, "held-out")]
    return []


def _asks_for_held_out(spec: str, inputs: Inputs) -> bool:
    return spec == "held-out" or (inputs.config.mutations.count > 0 and MUTATION.fullmatch(spec) is not None)


def hand_written(inputs: Inputs, settings: EvaluateConfig) -> dict[str, Template]:
    """The templates written by hand, by name. Raises InputError."""
    return {} if settings.templates is None else read_templates(inputs.base_dir / settings.templates, inputs.template)


def held_out_mutations(
    catalogue: Catalogue, settings: EvaluateConfig, students: Sequence[StudentConfig]
) -> list[TextContext]:
    """``held_out_mutations`` accepted mutations of those that no student is trained on, and that no learned context
    starts from; fewer, with a warning, when there are not enough. They are the first of an order that the config's seed
    and their own texts decide, so that another arm or more mutations change as few of them as can be, and what was
    evaluated under the others stays.
    """
    config = catalogue.task.config
    if settings.held_out_mutations == 0:
        return []
    is_set = "held_out_mutations" in settings.model_fields_set  # nobody is warned of a number that nobody set
    if config.mutations.count == 0:
        if is_set:
            catalogue.say("warning: no held-out mutations, because mutations.count is 0")
        return []
    used = mutations_in_use(catalogue, students)
    free = [context for name, context in catalogue.mutations.items() if name not in used]
    drawn = sorted(free, key=lambda context: sha256_json(["held-out", config.seed, context.template.sha256]))
    chosen = drawn[: settings.held_out_mutations]
    if len(chosen) < settings.held_out_mutations and is_set:
        catalogue.say(
            f"warning: {counted(len(chosen), 'mutation')} held out, not {settings.held_out_mutations}:"
            f" {len(used)} of {len(catalogue.mutations)} accepted are trained on; raise mutations.count"
        )
    return sorted(chosen, key=lambda context: context.name)


def mutations_in_use(catalogue: Catalogue, students: Sequence[StudentConfig]) -> set[str]:
    """Names of the mutations that students are trained on: their own contexts, what a teacher sees, and what a learned
    context starts from.
    """
    config = catalogue.task.config
    used: set[str] = set()
    for student in students:
        taken: set[str] = set()
        seed = config.seed if student.seed is None else student.seed
        for name in names_of(student):
            if name.form == "counted":
                where = f"students.{student.name}.contexts"
                taken |= {context.name for context in catalogue.named(name, where, seed=seed, taken=taken)}
            else:
                taken.add(name.argument)
        used |= taken
        if isinstance(student.loss, OnPolicyDivergence):
            used.add(student.loss.teacher.context)
    for context in config.learned:
        if context.start.kind == "best-mutation":
            used |= set(catalogue.ranked[:1])
        elif context.start.kind == "mutation":
            used.add(context.start.argument)
    return used & set(catalogue.mutations)


def learned_names(inputs: Inputs, settings: EvaluateConfig) -> list[str]:
    """Names of the learned contexts that are evaluated under. Raises InputError for one that the config has not."""
    names = inputs.context_names
    for name in settings.contexts or ():
        if name not in names:
            fix = "known: " + (", ".join(names) or "none")
            raise InputError(f"no learned context {name!r}", where="evaluate.contexts", fix=fix)
    return names if settings.contexts is None else list(settings.contexts)


def check_names(conditions: Sequence[Condition], where: str) -> None:
    """Refuse names whose answers would be stored in one file, or in that of a probe. Raises InputError."""
    names: dict[str, str] = {}
    for condition in conditions:
        name, file = condition.name, file_name(condition.name)
        if file in PROBES:
            raise InputError(f"{name!r} is the name of a probe", where=where, fix="name the context otherwise")
        if names.get(file) == name:
            raise InputError(f"two contexts are named {name!r}", where=where, fix="name the template otherwise")
        if file in names:
            what = f"answers under {names[file]!r} and {name!r} would be stored in one file"
            raise InputError(what, where=where, fix="name one of them otherwise")
        names[file] = name
